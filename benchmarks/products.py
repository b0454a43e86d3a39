"""Speed and error of a linear layer's two products, ours beside those of libraries.

    python benchmarks/products.py --device cuda

For each size: y = x · Wᵀ (forward) and dx = g · W (backward), W [out, in] with a scale per output row. `ours` is what a
training step runs uncompiled: its time includes rounding the tokens. With `operands ready` that is left out; compiled
blocks do it in other kernels. Both include the transposition of the codes in the backward pass. Libraries get their
operands ready. They have no backward product with scales per output row, so theirs is their forward product on codes
that torch transposed, with the scales folded into g; the time includes the transposition. Errors are relative to the
product in float64 of unrounded x or g and the layer's weight. Libraries that are not installed are left out.
"""

from __future__ import annotations

import argparse
import itertools
import platform
import statistics
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))

from trainer_core.precision import eight_bit
from trainer_core.precision.card_operators import define_operators
from trainer_core.precision.eight_bit import FP8, Coded

Call = Callable[[], Tensor]


def ours(x: Tensor, g: Tensor, weight: Coded) -> Iterator[tuple[str, Call, Call]]:
    """Our products, with and without rounding the tokens."""
    name = "int8" if weight.codes.dtype == torch.int8 else "fp8"
    yield (
        f"{name}, ours",
        lambda: eight_bit.product(x, weight, None),
        lambda: eight_bit.input_gradient(g, weight),
    )
    a, b = eight_bit.quantised(x, weight.codes.dtype), eight_bit.quantised(g, weight.codes.dtype, weight.scales)
    yield (
        f"{name}, ours, operands ready",
        lambda: eight_bit._multiplied(a, weight.codes, weight.scales, None, x.dtype, backward=False),
        lambda: eight_bit._multiplied(b, weight.codes, None, None, x.dtype, backward=True),
    )


def libraries(x: Tensor, g: Tensor, weight: Coded) -> Iterator[tuple[str, Call, Call]]:
    """The products of torch, bitsandbytes, torchao and comfy-kitchen with int8 or fp8 codes."""
    codes, scales, one = weight.codes, weight.scales, torch.ones(weight.codes.shape[1], device=x.device)
    a, b = eight_bit.quantised(x, codes.dtype), eight_bit.quantised(g, codes.dtype, scales)

    def both(
        name: str, multiply: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    ) -> Iterator[tuple[str, Call, Call]]:
        """`multiply`: codes [rows, depth], codes [columns, depth], and the scales of both."""

        def backward() -> Tensor:
            return multiply(b.codes, codes.view(torch.int8).T.contiguous().view(codes.dtype), b.scales, one)

        yield name, lambda: multiply(a.codes, codes, a.scales, scales), backward

    if codes.dtype == FP8:
        for fast in (True, False):
            yield from both(
                f"fp8, torch._scaled_mm, {'fast' if fast else 'exact'} accumulation",
                lambda p, q, s, t, fast=fast: torch._scaled_mm(
                    p, q.T, scale_a=s[:, None], scale_b=t[None], out_dtype=x.dtype, use_fast_accum=fast
                ),
            )
        return
    yield from both("int8, torch._int_mm", lambda p, q, s, t: (torch._int_mm(p, q.T) * s[:, None] * t).to(x.dtype))
    if find_spec("bitsandbytes"):
        import bitsandbytes  # noqa: F401 - defines the operator

        scaled = torch.ops.bitsandbytes.int8_scaled_mm.default  # its scales stand for the code 127
        yield from both(
            "int8, bitsandbytes' int8_scaled_mm", lambda p, q, s, t: scaled(p, q, 127 * s, 127 * t, dtype=x.dtype)
        )
    if find_spec("torchao"):
        from torchao.prototype.quantized_training.int8_mm import scaled_int8_mm

        yield from both("int8, torchao's scaled_int8_mm", lambda p, q, s, t: scaled_int8_mm(p, q.T, s, t).to(x.dtype))
    if find_spec("comfy_kitchen"):
        from comfy_kitchen import int8_linear

        yield (
            "int8, comfy-kitchen's int8_linear (rounds x itself)",
            lambda: int8_linear(x, codes, scales[:, None]),
            lambda: int8_linear(g * scales.to(g.dtype), codes.T.contiguous(), one[:, None]),
        )


def dense(x: Tensor, g: Tensor, weight: Coded) -> Iterator[tuple[str, Call, Call]]:
    """The products in x's dtype, with the weight as it is and as a quantised layer has it."""
    values = (weight.codes.float() * weight.scales[:, None]).to(x.dtype)
    yield "bf16", lambda: x @ values.T, lambda: g @ values

    def dequantised() -> Tensor:
        exact = weight.codes if weight.codes.dtype == torch.int8 else weight.codes.to(x.dtype)
        return torch.mul(exact, weight.scales[:, None], out=torch.empty(exact.shape, dtype=x.dtype, device=x.device))

    yield "bf16, dequantised each time", lambda: x @ dequantised().T, lambda: g @ dequantised()


def operands(rows: int, depth: int, columns: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    """x [rows, in], g [rows, out] and the codes of W [out, in] with their scales. Some tokens have outliers."""
    draws = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draws, device=device)

    x, g = normal(rows, depth), normal(rows, columns) * 1e-4
    x[:, :8] *= 10
    weight = eight_bit.quantised(normal(columns, depth) / depth**0.5, dtype)
    return x.bfloat16(), g.bfloat16(), weight.codes, weight.scales


def milliseconds(call: Call, device: torch.device) -> float:
    """Median time of a call, with a cold L2 cache, after two calls that are not counted."""
    spoiler = torch.empty(2**28, dtype=torch.uint8, device=device)
    times = []
    for _ in range(2 + 10):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        spoiler.zero_()
        begin.record()
        call()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times[2:])


def table(rows: int, depth: int, columns: int, device: torch.device) -> None:
    """Print the rows of one size."""
    for dtype in (torch.int8, FP8):
        if dtype == FP8 and not eight_bit.multiplies_fp8(device):
            continue
        x, g, codes, scales = operands(rows, depth, columns, dtype, device)
        weight = Coded(codes, scales)
        exact = codes.double() * scales.double()[:, None]
        wanted = x.double() @ exact.T, g.double() @ exact
        operations = 2 * rows * depth * columns
        makers = (dense, ours, libraries) if dtype == torch.int8 else (ours, libraries)
        for name, *calls in itertools.chain.from_iterable(maker(x, g, weight) for maker in makers):
            cells = [f"{rows} x {depth} x {columns}", name]
            for call, right in zip(calls, wanted, strict=True):
                try:
                    error = float((call().double() - right).norm() / right.norm())
                    time = milliseconds(call, device)
                    cells += [f"{time:.3f}", f"{operations / time / 1e9:.0f}", f"{error:.1e}"]
                except Exception as failed:  # noqa: BLE001 - a library may refuse a size or a card
                    cells += [type(failed).__name__, "", ""]
            print(f"| {' | '.join(cells)} |", flush=True)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rows", type=int, nargs="+", default=[8422, 2278])
    parser.add_argument("--widths", type=int, nargs="+", default=[3072, 12288])
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    define_operators()
    versions = [f"{name} {sys.modules[name].__version__}" for name in ("torch", "triton") if name in sys.modules]
    print(torch.cuda.get_device_name(device), *versions, f"Python {platform.python_version()}", sep=", ")
    print("| rows x in x out | product | forward ms | TOP/s | error | backward ms | TOP/s | error |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for rows in arguments.rows:
        for depth, columns in itertools.product(arguments.widths, repeat=2):
            table(rows, depth, columns, device)


if __name__ == "__main__":
    main()
