"""Runs a test script inside a ComfyUI tree, in a separate process because both ComfyUI and this pack have `nodes`.

`comfy_subprocess_main.py` runs in that process: a fork that has the heavy packages loaded, but nothing of ComfyUI.
Tensors are passed as safetensors, other values as JSON.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.support.forked import Forked

SCRIPTS = Path(__file__).parent


@dataclass(frozen=True)
class Answer:
    """The results of a script's `main`, and ComfyUI's log lines."""

    tensors: dict[str, Tensor]
    values: dict[str, Any]
    log: list[str]


def run_in_comfyui(
    tree: Path,
    script: str,
    work: Path,
    tensors: Mapping[str, Tensor],
    values: Mapping[str, Any],
    seconds: float = 1200,
    *,
    environment: Mapping[str, str] | None = None,
) -> Answer:
    """Call `main(tensors, values)` of tests/support/`script` with `tree` on sys.path; exchanges files in `work`.

    `environment` adds variables to those that the first call of this test process found. `seconds` only ends a process
    that hangs: a busy machine can take minutes to import ComfyUI.
    """
    work.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, work / "question.safetensors")
    (work / "question.json").write_text(json.dumps(dict(values)), encoding="utf-8")
    process = Forked("tests.support.comfy_subprocess_main", tree, SCRIPTS / script, work, environment=environment)
    _, errors = process.communicate(seconds)
    if process.returncode != 0:
        raise AssertionError(f"{script} failed inside ComfyUI:\n{errors[-4000:]}")
    answer = json.loads((work / "answer.json").read_text(encoding="utf-8"))
    return Answer(load_file(work / "answer.safetensors"), answer["values"], answer["log"])
