"""API prompts that train on a narrow model, and helpers that read their results."""

from __future__ import annotations

import copy
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.support.comfyui_server import PackServer
from tests.support.narrow import make_base, make_pairs
from tools.comfyui import status_of
from trainer_core.files import read_tensors

BASE = "narrow"
PAIRS = "pairs"
TRAIN, PLOT, ENCODE, PAIR, LOAD = "train", "plot", "encode", "pair", "load"

Prompt = dict[str, Any]


def place_base(server: PackServer, tokenizer: Path, name: str = BASE, flavour: str = "edit-v2") -> str:
    """Write a narrow base model below models/diffusers; returns its name."""
    make_base(server.base / "models" / "diffusers" / name, tokenizer, flavour)
    return name


def place_pairs(server: PackServer, name: str = PAIRS, count: int = 5, **options: Any) -> str:
    """Write pairs below ComfyUI's input folder; returns the folder's name."""
    make_pairs(server.input / name, count, **options)
    return name


def node(class_type: str, **inputs: Any) -> dict[str, Any]:
    """One node of a prompt."""
    return {"class_type": class_type, "inputs": inputs}


def ours(class_type: str, **inputs: Any) -> dict[str, Any]:
    """One of this pack's nodes."""
    return node(f"QwenEdit_{class_type}", **inputs)


def helper(class_type: str, **inputs: Any) -> dict[str, Any]:
    """One of the nodes in tests/support/test_nodes."""
    return node(f"QetTest_{class_type}", **inputs)


def pairing(folder: str = PAIRS, **inputs: Any) -> Prompt:
    """Prompt: pairing only, with a preview as the output node."""
    widgets = {
        "target_folder": f"{folder}/target",
        "reference_folder_1": f"{folder}/reference_1",
        "caption_strategy": "textfile",
        "instance_prompt": "",
        **inputs,
    }
    return {PAIR: ours("PairFolders", **widgets), "preview": ours("PreviewPairs", dataset=[PAIR, 0], max_pairs=4)}


def encoding(folder: str = PAIRS, base: str = BASE, **inputs: Any) -> Prompt:
    """Prompt: pairing and encoding, with an output node."""
    widgets = {
        "resolution": 96,
        "preprocessing": "comfyui",
        "match_target_res": True,
        "num_eval_images": 1,
        "validation_negative_prompt": " ",
        "seed": 0,
        **inputs,
    }
    return {
        LOAD: ours("LoadModel", base_model=base, flavour="edit-v2", base_model_precision="none", mixed_precision="no"),
        PAIR: pairing(folder)[PAIR],
        ENCODE: ours("EncodePairs", model=[LOAD, 0], dataset=[PAIR, 0], **widgets),
        "encoded": helper("SaveText", value=[ENCODE, 0]),
    }


EMA = ours(
    "EmaSettings",
    use_ema=True,
    ema_device="cpu",
    ema_decay=0.995,
    ema_update_interval=1,
    ema_validation="comparison",
)


MEMORY = {  # inputs of the memory settings node
    "memory": "auto",
    "gradient_checkpointing_blocks": -1,
    "activation_offload": False,
    "blocks_to_stream": 0,
    "stream_buffers": 2,
    "compile_blocks": "auto",
    "vram_gib": 0.0,
    "recompute_attention": False,
}


def settings(validate: int, draw: int) -> Prompt:
    """The settings nodes of a small training that validates every `validate` steps with `draw` sampling steps."""
    return {
        "lora": ours(
            "LoraSettings",
            lora_rank=4,
            lora_alpha=2.0,
            lora_targets="attention",
            lora_target_pattern="",
            lora_dropout=0.0,
        ),
        "optimizer": ours(
            "OptimizerSettings",
            optimizer="adamw",
            learning_rate=0.01,
            lr_scheduler="constant_with_warmup",
            lr_warmup_steps=0,
            weight_decay=0.01,
            adam_beta1=0.9,
            adam_beta2=0.999,
            adam_epsilon=1e-8,
            max_grad_norm=1.0,
        ),
        "loop": ours(
            "TrainingSettings",
            train_batch_size=1,
            gradient_accumulation_steps=1,
            gradient_checkpointing=False,
            sigma_distribution="logit_normal",
            logit_mean=0.0,
            logit_std=1.0,
            flow_schedule_shift=1.73,
            flow_schedule_auto_shift=False,
            checkpoint_step_interval=1000,
            checkpoints_total_limit=2,
        ),
        "validation": ours(
            "ValidationSettings",
            validation_step_interval=validate,
            validation_num_inference_steps=draw,
            validation_guidance=1.0,
            validation_seed=42,
            num_validation_images=1,
        ),
    }


def training(
    run_name: Any, steps: Any = 4, *, folder: str = PAIRS, validate: int = 0, draw: int = 2, **inputs: Any
) -> Prompt:
    """Prompt: load, pair, encode, settings, train, plot. Samples `draw` steps in each validation."""
    prompt = encoding(folder)
    del prompt["encoded"]
    return {
        **prompt,
        **settings(validate, draw),
        TRAIN: ours(
            "TrainLora",
            **{
                "model": [LOAD, 0],
                "encoded": [ENCODE, 0],
                "run_name": run_name,
                "max_train_steps": steps,
                "seed": 0,
                "if_run_exists": "continue",
                "lora_settings": ["lora", 0],
                "optimizer_settings": ["optimizer", 0],
                "training_settings": ["loop", 0],
                "validation_settings": ["validation", 0],
                "trigger_words": "negative",
                **inputs,
            },
        ),
        PLOT: ours("PlotLoss", run=[TRAIN, 4]),
    }


def changed(prompt: Prompt, node_id: str, **inputs: Any) -> Prompt:
    """A copy of the prompt with other inputs at one node."""
    prompt = copy.deepcopy(prompt)
    prompt[node_id]["inputs"].update(inputs)
    return prompt


def hidden(value: Any, after: list[Any] | None = None) -> dict[str, Any]:
    """A node that outputs `value` for any input, so that ComfyUI cannot check it before the run."""
    return helper("PassOn", value=json.dumps(value), **({"after": after} if after else {}))


def forget(server: PackServer) -> None:
    """Empty ComfyUI's cache of results and models. ComfyUI does this between two prompts, so one is run."""
    server.post("/free", {"unload_models": True, "free_memory": True})
    server.run({"state": helper("GlobalState")})


def figures(outputs: dict[str, Any], node_id: str = TRAIN) -> dict[str, Any]:
    """The figures that the training node reports."""
    return outputs[node_id]["qwen_edit_run"][0]


def run_dir(server: PackServer, name: str) -> Path:
    """The folder of a run."""
    return server.output / "qwen_edit_trainer" / "runs" / name


def cache_entries(server: PackServer, kind: str) -> dict[Path, int]:
    """Modification time (ns) of the cached files of this kind ("latents" or "prompt"), by path."""
    folder = server.output / "qwen_edit_trainer" / "cache" / kind
    return {path: path.stat().st_mtime_ns for path in folder.glob("*/*.safetensors")}


def state_of(server: PackServer, name: str) -> dict[str, Any]:
    """The parsed run.json of a run."""
    return json.loads((run_dir(server, name) / "run.json").read_text(encoding="utf-8"))


def under_way(server: PackServer) -> list[dict[str, Any]]:
    """The trainings that the server lists as active."""
    return [run for run in server.get("/qwen_edit_trainer/runs")["runs"] if run["active"]]


def steps_written(server: PackServer, name: str) -> list[int]:
    """The step numbers in a run's metrics file."""
    lines = (run_dir(server, name) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["step"] for line in lines]


def assert_same_lora(one: Path, other: Path) -> None:
    """Assert that two LoRA files have bit-identical tensors."""
    left, right = read_tensors(one), read_tensors(other)
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


def error_of(entry: dict[str, Any]) -> dict[str, Any]:
    """The data of the execution_error message of a failed prompt."""
    assert status_of(entry) == "execution_error", entry["status"]
    return next(data for name, data in entry["status"]["messages"] if name == "execution_error")


def progress_of(node_id: str, value: int = 1, total: int | None = None) -> Callable[[dict[str, Any]], bool]:
    """Returns a filter for progress messages of a node that have reached `value`, and have this `total` if given."""

    def matches(event: dict[str, Any]) -> bool:
        data = event.get("data", {})
        mine = event["type"] == "progress" and data.get("node") == node_id
        return mine and data["value"] >= value and total in (None, data["max"])

    return matches


class Pressed:
    """Runs a prompt, presses `button` (default: ComfyUI's interrupt) at the first message that `when` accepts."""

    def __init__(
        self,
        server: PackServer,
        prompt: Prompt,
        when: Callable[[dict[str, Any]], bool],
        button: Callable[[], Any] | None = None,
    ) -> None:
        queued = threading.Event()
        self.pressed = False
        self.answer: Any = None
        self._prompt_id = ""

        def listen(event: dict[str, Any]) -> None:
            queued.wait()
            mine = event.get("data", {}).get("prompt_id") == self._prompt_id
            if mine and not self.pressed and when(event):
                self.pressed = True
                self.answer = (button or server.interrupt)()

        server.on_event = listen
        try:
            self._prompt_id = server.queue(prompt)
            queued.set()
            self.entry = server.wait(self._prompt_id)
        finally:
            queued.set()
            server.on_event = None
        assert self.pressed, f"the expected message did not arrive; the prompt ended with {status_of(self.entry)}"
        self.progress = [event["data"] for event in server.events_of(self._prompt_id, "progress")]

    def assert_interrupted_at(self, node_id: str) -> None:
        """Assert that the prompt was interrupted at this node, as reported by ComfyUI."""
        assert status_of(self.entry) == "execution_interrupted", self.entry["status"]
        messages = dict(self.entry["status"]["messages"])
        assert messages["execution_interrupted"]["node_id"] == node_id
