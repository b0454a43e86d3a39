"""Device memory of a training step of the full-size transformer, counted without a device.

    python benchmarks/step_bytes.py --precision none int8-quanto --memory full full,offload

Runs the trainer's step on torch's meta device, where tensors have sizes but no data, and sums the live tensors after
each operation. The largest sum equals the peak of allocated bytes that torch's allocator reports on a GPU, without the
workspaces of CUDA's libraries (0.1 GiB). Attention counts as FlashAttention. `--memory` is as in gpu_step.py;
precisions are `none`, `int8-quanto` and `fp8-quanto`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.gpu_step import GIB, Setting, planned_bytes
from tests.support.live_bytes import traced_step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=60)
    parser.add_argument("--side", type=int, nargs="+", default=[1024])
    parser.add_argument("--references", type=int, nargs="+", default=[1])
    parser.add_argument("--precision", nargs="+", default=["none", "int8-quanto"])
    parser.add_argument("--memory", nargs="+", default=["full"])
    parser.add_argument("--list", type=int, default=0, metavar="N", help="Also print the N largest kinds of tensors.")
    arguments = parser.parse_args()
    print("| weights | side | references | memory | counted GiB | planned GiB | planned / counted |")
    print(f"|{' --- |' * 7}", flush=True)
    for precision in arguments.precision:
        for side in arguments.side:
            for references in arguments.references:
                for memory in arguments.memory:
                    setting = Setting("ours", precision, side, references, memory)
                    live = traced_step(setting, arguments.layers, names=arguments.list > 0)
                    planned = planned_bytes(setting, arguments.layers)
                    print(
                        f"| `{precision}` | {side} | {references} | {memory} | {live.peak / GIB:.2f} "
                        f"| {planned / GIB:.2f} | {planned / live.peak:.3f} |",
                        flush=True,
                    )
                    for name, num_bytes in live.at_peak.most_common(arguments.list):
                        print(f"    {num_bytes / 2**20:9.1f} MiB {name}")


if __name__ == "__main__":
    main()
