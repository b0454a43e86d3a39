"""Settings for which the memory plan is compared with a step of the full-width network."""

from __future__ import annotations

import gc
from typing import Any, NamedTuple

import torch

from tests.support.full_size_step import Setting, memory_plan, our_step

PLAN_CASES: tuple[dict[str, Any], ...] = (
    {"precision": "none"},
    {"precision": "nf4-bnb", "memory": "none"},
    {"precision": "int4-quanto", "side": 512},
    {"precision": "fp8-quanto", "references": 2, "memory": "full,offload"},
    {"references": 3, "memory": "blocks=2"},
    {"adapter": "dora", "targets": "attention-mlp", "memory": "full,stream=4,buffers=2", "side": 512, "references": 0},
    {"adapter": "lokr", "targets": "attention-mlp", "memory": "none"},
    {"adapter": "dora", "targets": "attention-mlp", "memory": "none"},
    {"dropout": 0.1, "targets": "attention", "memory": "none"},
    {"batch": 2, "rollout": True, "memory": "none"},
    {"flavour": "edit-v3", "memory": "none", "batch": 2, "targets": "all"},
    {"quantised_inputs": True},
    {"memory": "full,8bit"},
    {"precision": "nf4-bnb", "memory": "none,8bit"},
    {"precision": "fp8-quanto", "memory": "full,8bit", "references": 2},
    {"arithmetic": "no", "memory": "none"},
    {"rank": 128, "targets": "all", "side": 512, "micro_batches": 2, "ema": True},
    {"rank": 128, "targets": "all", "side": 64, "optimizer": "adamw-schedulefree"},
)


class PlannedStep(NamedTuple):
    """Planned bytes of a step: its frozen weights, what it needs beside them, and workspaces of CUDA's libraries."""

    weights: int
    others: int
    libraries: int


def setting(precision: str = "int8-quanto", memory: str = "full", side: int = 1024, **others: Any) -> Setting:
    """The trainer's step with one reference, unless `references` says otherwise."""
    return Setting("ours", precision, side, others.pop("references", 1), memory, **others)


def case_name(case: dict[str, Any]) -> str:
    """A case as the id of a test."""
    return " ".join(str(value) if isinstance(value, str) else f"{name}={value}" for name, value in case.items())


def planned_step(setting: Setting, layers: int) -> PlannedStep:
    """What the planner expects of the phase "training"."""
    phase = memory_plan(setting, layers).phase("training")
    assert phase is not None
    weights = phase.parts["frozen weights"] + phase.parts.get("streaming buffers", 0)
    libraries = phase.parts["libraries"]
    return PlannedStep(weights, phase.total_bytes - weights - libraries, libraries)


def measured_peak(setting: Setting, layers: int, device: torch.device) -> int:
    """Peak of the bytes that a CUDA device has allocated in the second step, when the optimizer has its state."""
    gc.collect()
    torch._C._cuda_clearCublasWorkspaces()  # those of an earlier setting, so that each has its own
    before = torch.cuda.memory_allocated(device)
    _transformer, step = our_step(setting, layers, device)
    inputs = setting.inputs(device)
    step(*inputs)
    torch.cuda.reset_peak_memory_stats(device)
    step(*inputs)
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before
