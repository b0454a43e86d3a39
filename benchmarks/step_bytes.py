"""Device memory of a training step of the full-size transformer, counted without a device.

    python benchmarks/step_bytes.py --precision none int8-quanto --memory full full,offload

Runs the trainer's step on torch's meta device, where tensors have sizes but no data, and sums the live tensors after
each operation. The largest sum equals the peak of allocated bytes that torch's allocator reports on a GPU, without the
workspaces of CUDA's libraries (0.1 GiB), which the planned bytes here leave out too. Attention counts as
FlashAttention. `--memory` is as in gpu_step.py. Each `--others` is a comma-separated list of other fields of Setting:

    python benchmarks/step_bytes.py --others adapter=lokr,targets=all batch=2,rollout=1 flavour=edit-v3
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections import Counter
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from tests.support.full_size_step import GIB, Setting, other_fields
from tests.support.live_bytes import traced_step
from tests.support.plan_cases import PLAN_CASES, measured_peak, planned_step, setting


def main() -> None:
    arguments = arguments_of_the_command()
    settings = [
        Setting("ours", precision, side, references, memory, **other_fields(others))
        for precision in arguments.precision
        for side in arguments.side
        for references in arguments.references
        for memory in arguments.memory
        for others in arguments.others
    ]
    if arguments.cases:
        settings = [setting(**case) for case in PLAN_CASES]
    print("| weights | side | references | memory | others | counted GiB | planned GiB | ratio | without weights |")
    print(f"|{' --- |' * 9}", flush=True)
    for each in settings:
        print_row(each, arguments)


def print_row(step: Setting, arguments: argparse.Namespace) -> None:
    """Count a setting and print its row. `ratio` is planned / counted, then without the frozen weights."""
    names: Counter[str] = Counter()
    weights, planned, libraries = planned_step(step, arguments.layers)
    if arguments.device == "meta":
        live = traced_step(step, arguments.layers, names=arguments.list > 0)
        found, names = live.peak - weights, live.at_peak
    else:
        found = measured_peak(step, arguments.layers, torch.device(arguments.device)) - weights
        planned += libraries
    changed = {each.name: getattr(step, each.name) for each in dataclasses.fields(step)[5:]}
    others = " ".join(f"{name}={value}" for name, value in changed.items() if value != getattr(Setting, name))
    print(
        f"| `{step.precision}` | {step.side} | {step.references} | {step.memory} | {others} "
        f"| {(weights + found) / GIB:.2f} | {(weights + planned) / GIB:.2f} "
        f"| {(weights + planned) / (weights + found):.3f} | {planned / found:.3f} |",
        flush=True,
    )
    for name, num_bytes in names.most_common(arguments.list):
        print(f"    {num_bytes / 2**20:9.1f} MiB {name}")


def arguments_of_the_command() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=60)
    parser.add_argument("--side", type=int, nargs="+", default=[1024])
    parser.add_argument("--references", type=int, nargs="+", default=[1])
    parser.add_argument("--precision", nargs="+", default=["none", "int8-quanto"])
    parser.add_argument("--memory", nargs="+", default=["full"])
    parser.add_argument("--others", nargs="+", default=[""])
    parser.add_argument(
        "--cases", action="store_true", help="The settings of the plan's tests, instead of those above."
    )
    parser.add_argument("--device", default="meta", help="meta to count, cuda to measure.")
    parser.add_argument("--list", type=int, default=0, metavar="N", help="Also print the N largest kinds of tensors.")
    return parser.parse_args()


if __name__ == "__main__":
    main()
