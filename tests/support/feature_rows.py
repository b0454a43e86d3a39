"""Settings for one short demo training per feature."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from trainer_core.config import JobConfig, from_json
from trainer_core.job import resolve_job

DEMO: dict[str, Any] = {
    "model": {"base": "demo", "mixed_precision": "no"},
    "dataset": {"target_dir": "pairs/target", "reference_dirs": ["pairs/reference"]},
    "encoding": {"resolution": 128, "match_target_res": True, "num_eval_images": 4},
    "cache_dir": "cache",
    "run_dir": "runs",
    "gradient_checkpointing": False,
    "lora": {"lora_targets": "attention-mlp"},
    "optimizer": {"learning_rate": 2e-3},
    "batching": {"train_batch_size": 4, "gradient_accumulation_steps": 1},
    "validation": {
        "validation_step_interval": 0,
        "validation_num_inference_steps": 20,
        "validation_guidance": 1.0,
        "num_validation_images": 4,
    },
}

Changes = dict[str, dict[str, Any]]

FIRST = "the demo's settings (adamw, logit_normal, l2)"


def rollout(**changes: Any) -> Changes:
    """Scheduled sampling for half of the pairs; `changes` are its settings without the common prefix."""
    values = {"max_step_offset": 5, "probability": 0.5, **changes}
    return {"rollout": {f"scheduled_sampling_{name}": value for name, value in values.items()}}


ROWS: dict[str, Changes] = {
    FIRST: {},
    "optimizer adafactor": {"optimizer": {"optimizer": "adafactor"}},
    "optimizer lion": {"optimizer": {"optimizer": "lion", "learning_rate": 5e-4}},
    "optimizer prodigy": {"optimizer": {"optimizer": "prodigy", "learning_rate": 1.0}},
    "optimizer adamw-schedulefree": {"optimizer": {"optimizer": "adamw-schedulefree", "learning_rate": 5e-3}},
    "lr_scheduler constant": {"optimizer": {"lr_scheduler": "constant", "lr_warmup_steps": 0}},
    "lr_scheduler linear": {"optimizer": {"lr_scheduler": "linear", "learning_rate": 3e-3}},
    "lr_scheduler cosine": {"optimizer": {"lr_scheduler": "cosine", "learning_rate": 3e-3}},
    "lr_scheduler cosine_with_restarts": {
        "optimizer": {"lr_scheduler": "cosine_with_restarts", "lr_num_cycles": 2, "learning_rate": 3e-3}
    },
    "lr_scheduler cosine_wave": {
        "optimizer": {"lr_scheduler": "cosine_wave", "lr_wave_steps": 50, "lr_warmup_steps": 0, "learning_rate": 3e-3}
    },
    "lr_scheduler sine_wave": {
        "optimizer": {"lr_scheduler": "sine_wave", "lr_wave_steps": 50, "lr_warmup_steps": 0, "learning_rate": 3e-3}
    },
    "lr_scheduler polynomial": {"optimizer": {"lr_scheduler": "polynomial", "lr_power": 2.0, "learning_rate": 4e-3}},
    "sigma_distribution uniform": {"noise": {"sigma_distribution": "uniform"}},
    "sigma_distribution mode": {"noise": {"sigma_distribution": "mode"}},
    "sigma_distribution cosmap": {"noise": {"sigma_distribution": "cosmap"}},
    "stratified_sigmas": {"noise": {"stratified_sigmas": True}},
    "flow_schedule_auto_shift": {"noise": {"flow_schedule_auto_shift": True}},
    "loss_type huber": {"noise": {"loss_type": "huber"}},
    "loss_type huber, huber_schedule exponential": {"noise": {"loss_type": "huber", "huber_schedule": "exponential"}},
    "loss_type huber, huber_schedule constant": {"noise": {"loss_type": "huber", "huber_schedule": "constant"}},
    "loss_type smooth_l1": {"noise": {"loss_type": "smooth_l1"}},
    "lora_type dora": {"lora": {"lora_type": "dora"}},
    "lora_type lokr": {"lora": {"lora_type": "lokr", "lokr_factor": 4}, "optimizer": {"learning_rate": 5e-3}},
    "use_rslora at rank 64": {
        "lora": {"lora_rank": 64, "use_rslora": True},
        "optimizer": {"learning_rate": 5e-4},
    },
    "rank_pattern, 4 in the first block": {"lora": {"rank_pattern": ["0 = 4"]}},
    "alpha_pattern, 4 in the first block": {"lora": {"alpha_pattern": ["0 = 4"]}},
    "init_lora, the first row's file": {"lora": {"init_lora": f"files/{FIRST}.safetensors"}},
    "use_ema, the average's file": {"ema": {"use_ema": True, "ema_decay": 0.95, "ema_validation": "ema_only"}},
    "rollout euler": rollout(sampler="euler", reflexflow=False),
    "rollout unipc, ReflexFlow": rollout(),
    "rollout dpm on a ramp": rollout(sampler="dpm", ramp_steps=60, reflexflow=False),
    "rollout rk4 on a cosine ramp": rollout(sampler="rk4", ramp_steps=60, ramp_shape="cosine", reflexflow=False),
    "rollout biased_early": rollout(strategy="biased_early", sampler="euler", reflexflow=False),
    "rollout biased_late": rollout(strategy="biased_late", sampler="euler", reflexflow=False),
}


def job_of(changes: Changes, name: str, work: Path, arguments: argparse.Namespace) -> JobConfig:
    """The demo's job with one row's changes."""
    values = {**DEMO, "max_train_steps": arguments.steps, "run_dir": f"runs/{name}"}
    values["model"] = {**DEMO["model"], "tokenizer": str(arguments.tokenizer.resolve()), "device": arguments.device}
    for section, settings in changes.items():
        values[section] = {**values.get(section, {}), **settings} if isinstance(settings, dict) else settings
    return resolve_job(from_json(JobConfig, values), work)
