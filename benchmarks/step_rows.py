"""Rows of other programs, ratios of rows, and the gradients of one row against those of another."""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tests.support.full_size_step import GIB, OurStep, Setting
from trainer_core.qwen_image.types import Condition
from trainer_core.rng import stream

# Fields of a setting that say what is computed. The gradients of rows that differ in them can't be compared.
WORK = ("side", "references", "prompt_tokens", "batch", "flavour", "adapter", "targets", "rank", "micro_batches")


@dataclass(frozen=True)
class Ratio:
    """Seconds per step of one row divided by those of another, and the bar that it must not exceed."""

    above: str
    below: str
    bar: float


@dataclass(frozen=True)
class Gradients:
    """Mean loss of a setting's pairs, and the gradients of its adapter by name, in float32 on the CPU."""

    setting: Setting
    loss: float
    by_name: dict[str, Tensor]


@dataclass(frozen=True)
class Peer:
    """Another program: the name of its row, and the command that measures its step."""

    name: str
    command: str


def peer_of(text: str) -> Peer:
    """A peer from NAME=COMMAND."""
    name, separator, command = text.partition("=")
    if not (name and separator and command):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=COMMAND")
    return Peer(name, command)


def ratio_of(text: str, names: Collection[str]) -> Ratio:
    """A ratio from A/B=BAR. A and B are names of rows, which may contain "/" and "=" themselves.

    Raises:
        ValueError: the bar is no number, or A/B is no two names of rows.
    """
    rows, _, bar = text.rpartition("=")
    parts = rows.split("/")
    splits = [("/".join(parts[:at]), "/".join(parts[at:])) for at in range(1, len(parts))]
    found = [(above, below) for above, below in splits if above in names and below in names]
    if len(found) != 1:
        raise ValueError(f"--ratio {text!r} is not A/B=BAR with two of these rows: {', '.join(sorted(names))}")
    return Ratio(*found[0], float(bar))


def run_peer(peer: Peer) -> dict[str, Any]:
    """Run a peer's command in a shell. Returns the figures in the last line of its output that is a JSON object.

    `s_per_step` is required, `peak_gib` and `reserved_gib` are expected, and `first`, `weights_gib` and `build_s` are
    shown if it prints them.

    Raises:
        RuntimeError: the command fails or prints no such line.
    """
    run = subprocess.run(peer.command, shell=True, capture_output=True, text=True, errors="replace")
    for line in reversed(run.stdout.splitlines()):
        if line.startswith("{") and line.endswith("}"):
            figures = json.loads(line)
            if run.returncode == 0 and isinstance(figures.get("s_per_step"), float | int):
                return figures
    said = "\n".join([*run.stdout.splitlines()[-5:], *run.stderr.splitlines()[-15:]])
    raise RuntimeError(f"{peer.name} ended with {run.returncode} and no line of JSON with s_per_step:\n{said}")


def print_ratios(ratios: Collection[Ratio], seconds: Mapping[str, float], peaks: Mapping[str, float]) -> None:
    """Print the ratios of rows. `seconds` and `peaks` (bytes, reserved) are those of the rows that were measured."""
    if not ratios:
        return
    print("\n| row | divided by | ratio | bar | | reserved GiB | of the other |")
    print(f"|{' --- |' * 7}")
    for each in ratios:
        rows = each.above, each.below
        value = seconds[each.above] / seconds[each.below] if all(row in seconds for row in rows) else math.nan
        kept = "not measured" if math.isnan(value) else "met" if value <= each.bar else "missed"
        reserved = " | ".join(f"{peaks.get(row, math.nan) / GIB:.2f}" for row in rows)
        print(f"| {each.above} | {each.below} | {value:.3f} | {each.bar:.2f} | {kept} | {reserved} |", flush=True)


def adapter_gradients(step: OurStep, latents: Tensor, conditions: Sequence[Condition]) -> Gradients:
    """Gradients of an adapter whose matrices are all drawn anew, so that none of them has a gradient of zero.

    The draws depend on the names only, so all rows compute with the same adapter. Leaves no gradients behind.
    """
    masters = step.weights.masters
    with torch.no_grad():
        for name, weight in masters.items():
            if weight.ndim > 1:
                weight.copy_(torch.randn(weight.shape, generator=stream(0, "gradient check", name)) * 0.01)
    step.weights.publish()
    step.optimizer.zero_grad(set_to_none=True)
    loss = float(step.passes(latents, conditions).mean())
    found = {name: each.grad.float().cpu() for name, each in masters.items() if each.grad is not None}
    step.optimizer.zero_grad(set_to_none=True)
    return Gradients(step.setting, loss, found)


def print_against(reference: str, found: Mapping[str, Gradients]) -> None:
    """Print how far the gradients of the rows lie from those of the row `reference`, where they compute the same."""
    if reference not in found:
        print(f"\nno gradients to compare: {reference} was not measured", file=sys.stderr)
        return
    theirs = found[reference]
    print(f"\nGradients of the adapter against {reference} (loss {theirs.loss:.5f}):\n")
    print("| row | loss | cosine | relative error | lowest cosine of a matrix |")
    print(f"|{' --- |' * 5}")
    for name, own in found.items():
        if name == reference:
            continue
        if any(getattr(own.setting, each) != getattr(theirs.setting, each) for each in WORK):
            print(f"| {name} | other work: not compared | - | - | - |")
            continue
        cosines = [_cosine(gradient, theirs.by_name[key]) for key, gradient in own.by_name.items()]
        all_own, all_theirs = (
            torch.cat([each.by_name[key].flatten() for key in own.by_name]) for each in (own, theirs)
        )
        error = float((all_own - all_theirs).double().norm() / all_theirs.double().norm())
        print(f"| {name} | {own.loss:.5f} | {_cosine(all_own, all_theirs):.5f} | {error:.4f} | {min(cosines):.5f} |")


def _cosine(a: Tensor, b: Tensor) -> float:
    a, b = a.flatten().double(), b.flatten().double()
    return float(a @ b / (a.norm() * b.norm()))
