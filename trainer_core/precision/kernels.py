"""Triton kernels for products of 8-bit codes. Import it only where Triton is installed.

`eight_bit` defines what they compute. int8 products are exact in int32, so the tile sizes, which are chosen by timing,
don't change a result. An adapter's change is added in float32; `tests/gpu` checks that tiles don't change that either.
"""

# ruff: noqa: ANN202 - a kernel has no return type
# pyright: reportMissingParameterType=false, reportIndexIssue=false, reportAttributeAccessIssue=false
# pyright: reportPossiblyUnboundVariable=false

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..device import seconds_on_device

AS_TORCH = {"enable_fp_fusion": False}  # for Triton: a product is rounded before something is added to it


class Tiles(NamedTuple):
    """Sizes of a program's part of a product, and how Triton compiles it."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


# By compute capability, the best guess first. A program holds tiles of both operands in shared memory, of which a
# multiprocessor has 227 KiB (9.0), 163 KiB (8.0) or 99 KiB (8.6, 8.9, 12.0) for one program. The first tiles of 9.0
# were the fastest there for pictures of 2278 and 8422 tokens. Other cards were not measured; the timing decides.
_HOPPER = (Tiles(128, 128, 128, 4, 3), Tiles(128, 256, 128, 8, 3))
_AMPERE = (Tiles(128, 128, 128, 4, 3), Tiles(128, 256, 64, 8, 4), Tiles(128, 128, 64, 4, 4))
_SMALL = (Tiles(128, 128, 64, 4, 4), Tiles(128, 256, 64, 8, 3), Tiles(128, 128, 128, 8, 3), Tiles(128, 256, 128, 8, 3))
# For a prompt, whose few tokens would give most multiprocessors no larger tile.
_FOR_PROMPTS = (Tiles(64, 128, 128, 4, 4), Tiles(64, 128, 128, 4, 5), Tiles(64, 64, 128, 4, 4))
_PROMPT_ROWS = 512  # the most


def candidates(capability: tuple[int, int], rows: int) -> tuple[Tiles, ...]:
    """Tile sizes to try on a card for a product with so many rows, the best guess first."""
    large = _HOPPER if capability[0] == 9 else _AMPERE if capability == (8, 0) else _SMALL
    return (*_FOR_PROMPTS, large[0]) if rows <= _PROMPT_ROWS else (*large, _FOR_PROMPTS[0])


@triton.jit(do_not_specialize=["rows"])
def int8_product_kernel(
    a, b, y, a_scale, b_scale, bias, inner, up, inner_stride, rows, columns, depth: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
    HAS_SCALE: tl.constexpr, HAS_BIAS: tl.constexpr, RANK: tl.constexpr, PADDED_RANK: tl.constexpr,
):  # fmt: skip
    """y [rows, columns] = a [rows, depth] · b [columns, depth]ᵀ · scales + bias + inner [rows, RANK] · up [columns,
    RANK]ᵀ, one rounding to y's dtype. RANK 0: without the last product."""
    # Programs that run at the same time share GROUP rows of tiles, whose operands then stay in the L2 cache.
    program, down, across = tl.program_id(0), tl.cdiv(rows, BM), tl.cdiv(columns, BN)
    first = program // (GROUP * across) * GROUP
    height = tl.minimum(down - first, GROUP)
    m = (first + program % (GROUP * across) % height) * BM + tl.arange(0, BM)
    n = program % (GROUP * across) // height * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    at_m, at_n = tl.where(m < rows, m, 0), tl.where(n < columns, n, 0)
    a_at = a + at_m[:, None].to(tl.int64) * depth + k[None, :]
    b_at = b + at_n[None, :].to(tl.int64) * depth + k[:, None]
    total = tl.zeros((BM, BN), dtype=tl.int32)
    for start in range(0, depth, BK):
        if depth % BK == 0:
            total = tl.dot(tl.load(a_at), tl.load(b_at), total, out_dtype=tl.int32)
        else:
            is_in = k < depth - start
            left, right = tl.load(a_at, mask=is_in[None, :], other=0), tl.load(b_at, mask=is_in[:, None], other=0)
            total = tl.dot(left, right, total, out_dtype=tl.int32)
        a_at += BK
        b_at += BK
    values = total.to(tl.float32) * tl.load(a_scale + at_m)[:, None]
    if HAS_SCALE:
        values *= tl.load(b_scale + at_n)[None, :]
    if HAS_BIAS:
        values += tl.load(bias + at_n).to(tl.float32)[None, :]
    if RANK:
        r = tl.arange(0, PADDED_RANK)
        left = tl.load(
            inner + at_m[:, None].to(tl.int64) * inner_stride + r[None, :], mask=(r < RANK)[None, :], other=0
        )
        right = tl.load(up + at_n[None, :] * RANK + r[:, None], mask=(r < RANK)[:, None], other=0)
        values = tl.dot(left, right, values)
    y_at = y + m[:, None].to(tl.int64) * columns + n[None, :]
    tl.store(y_at, values.to(y.dtype.element_ty), mask=(m < rows)[:, None] & (n < columns)[None, :])


@triton.jit
def transposed_kernel(source, target, rows, columns, BM: tl.constexpr, BN: tl.constexpr):
    """target [columns, rows] = source [rows, columns]ᵀ, in bytes."""
    m, n = tl.program_id(0) * BM + tl.arange(0, BM), tl.program_id(1) * BN + tl.arange(0, BN)
    is_in = (m < rows)[:, None] & (n < columns)[None, :]
    tile = tl.load(source + m[:, None].to(tl.int64) * columns + n[None, :], mask=is_in, other=0)
    tl.store(target + n[:, None].to(tl.int64) * rows + m[None, :], tl.trans(tile), mask=tl.trans(is_in))


@triton.jit
def quantise_kernel(
    x, factors, before, codes, scales, columns: tl.constexpr, stride, before_stride,
    LARGEST: tl.constexpr, LEAST: tl.constexpr, HAS_FACTORS: tl.constexpr, GELU: tl.constexpr,
    BLOCK: tl.constexpr, IS_THREE: tl.constexpr,
):  # fmt: skip
    """One row of x to its codes and its scale. GELU 1: of gelu(x); 2: of x · gelu'(before). With IS_THREE, a row is
    three blocks: the network's widths are three times a power of two, and a larger block would be empty in part."""
    row = tl.program_id(0).to(tl.int64)
    x, before, codes = x + row * stride, before + row * before_stride if GELU == 2 else before, codes + row * columns
    one = _row_part(x, factors, before, 0, columns, HAS_FACTORS, GELU, BLOCK)
    largest = magnitudes(one)
    if IS_THREE:
        two = _row_part(x, factors, before, BLOCK, columns, HAS_FACTORS, GELU, BLOCK)
        three = _row_part(x, factors, before, 2 * BLOCK, columns, HAS_FACTORS, GELU, BLOCK)
        largest = tl.maximum(largest, tl.maximum(magnitudes(two), magnitudes(three)))
    scale = scale_of(tl.max(largest, axis=0), LARGEST, LEAST)
    tl.store(scales + row, scale)
    inverse = tl.math.div_rn(1.0, scale)
    _store_codes(codes, one * inverse, 0, columns, BLOCK)
    if IS_THREE:
        _store_codes(codes, two * inverse, BLOCK, columns, BLOCK)
        _store_codes(codes, three * inverse, 2 * BLOCK, columns, BLOCK)


@triton.jit
def _row_part(x, factors, before, start, columns: tl.constexpr, HAS_FACTORS: tl.constexpr, GELU: tl.constexpr,
              BLOCK: tl.constexpr):  # fmt: skip
    """The numbers of a block of a row that are rounded, in float32."""
    at = start + tl.arange(0, BLOCK)
    is_in = at < columns
    given = tl.load(x + at, mask=is_in, other=0)
    values = given.to(tl.float32)
    if GELU == 1:
        values = values * _gate(values)
    if GELU == 2:
        values = values * _gelu_slope(tl.load(before + at, mask=is_in, other=0).to(tl.float32))
    if GELU:
        values = values.to(given.dtype).to(tl.float32)  # rounded where torch's own operations round
    if HAS_FACTORS:
        values *= tl.load(factors + at, mask=is_in, other=0)
    return values


@triton.jit
def magnitudes(values):
    """Bits that are in the order of the numbers without their signs, with those of NaN last."""
    return values.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def scale_of(largest, LARGEST: tl.constexpr, LEAST: tl.constexpr):
    """The scale of a row whose `magnitudes` are at most this."""
    scale = tl.math.div_rn(largest.to(tl.float32, bitcast=True), LARGEST)
    return tl.where(scale < LEAST, LEAST, scale)  # NaN stays: the loss must become NaN


@triton.jit
def nearest(values):
    """Integers whose last byte is the number nearest to the value, half to even."""
    return (values + 12582912.0).to(tl.int32, bitcast=True)  # 1.5 · 2²³


@triton.jit
def _store_codes(codes, values, start, columns: tl.constexpr, BLOCK: tl.constexpr):
    at = start + tl.arange(0, BLOCK)
    if codes.dtype.element_ty == tl.int8:
        values = nearest(values)
    tl.store(codes + at, values.to(codes.dtype.element_ty), mask=at < columns)


@triton.jit
def _gate(x):
    """gelu(x) / x: (1 + tanh(√(2/π) · (x + 0.044715 x³))) / 2."""
    return tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))


@triton.jit
def _gelu_slope(x):
    """The derivative of gelu."""
    gate = _gate(x)
    return gate + x * gate * (1 - gate) * 1.5957691216057308 * (1 + 0.134145 * x * x)


@triton.jit
def e4m3_numbers(codes):
    """The numbers in float32 of fp8 codes from 0 to 255. Triton knows e4m3 only where the card does."""
    without_sign = codes & 127
    values = (without_sign << 20).to(tl.float32, bitcast=True) * 2.0**120  # float32's bias is 120 larger
    return tl.where(without_sign == 127, float("nan"), tl.where(codes > 127, -values, values))


@triton.jit
def few_rows_kernel(
    x, codes, scales, bias, y, columns, depth: tl.constexpr,
    ROWS: tl.constexpr, HAS_BIAS: tl.constexpr, IS_FP8: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """y [ROWS, columns] = x [ROWS, depth] · codes [columns, depth]ᵀ · scales + bias. Reads each code once."""
    n, k, row = tl.program_id(0) * BN + tl.arange(0, BN), tl.arange(0, BK), tl.arange(0, ROWS)
    is_in = n < columns
    at = codes + n[:, None].to(tl.int64) * depth + k[None, :]
    total = tl.zeros((ROWS, BN, BK), dtype=tl.float32)
    for start in range(0, depth, BK):
        is_here = k < depth - start
        code = tl.load(at + start, mask=is_in[:, None] & is_here[None, :], other=0)
        weight = e4m3_numbers(code.to(tl.int32) & 255) if IS_FP8 else code.to(tl.float32)
        tokens = tl.load(x + row[:, None] * depth + (start + k)[None, :], mask=is_here[None, :], other=0)
        total += weight[None, :, :] * tokens.to(tl.float32)[:, None, :]
    values = tl.sum(total, axis=2) * tl.load(scales + n, mask=is_in, other=0)[None, :]
    if HAS_BIAS:
        values += tl.load(bias + n, mask=is_in, other=0).to(tl.float32)[None, :]
    tl.store(y + row[:, None] * columns + n[None, :], values.to(y.dtype.element_ty), mask=is_in[None, :])


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up. Triton's own function and its `next_power_of_2` take ten times as long, in each launch."""
    return -(-a // b)


def power_of_2(least: int) -> int:
    """The smallest power of two that is at least this."""
    return 1 << max(0, least - 1).bit_length()


def quantise(
    x: Tensor, dtype: torch.dtype, largest: float, factors: Tensor | None, gelu: int, before: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Codes [rows, columns] and scales [rows] of x [rows, columns], see `eight_bit.quantised`; of gelu(x) if `gelu` is
    1, and with x as the gradient of gelu(before) if it is 2."""
    x, before = (each if each is None or each.stride(-1) == 1 else each.contiguous() for each in (x, before))
    rows, columns = x.shape
    codes = torch.empty(x.shape, dtype=dtype, device=x.device)
    scales = torch.empty(rows, dtype=torch.float32, device=x.device)
    is_three = columns % 3 == 0
    block = power_of_2(columns // 3 if is_three else columns)
    with on_device_of(x):
        quantise_kernel[(rows,)](
            x, factors, before, codes, scales, columns, x.stride(0), 0 if before is None else before.stride(0),
            LARGEST=largest, LEAST=torch.finfo(torch.float32).tiny, HAS_FACTORS=factors is not None, GELU=gelu,
            BLOCK=block, IS_THREE=is_three, num_warps=4 if columns <= 4096 else 8, **AS_TORCH,
        )  # fmt: skip
    return codes, scales


def few_rows(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    """y [rows, out] of one or two rows x [rows, in], 8-bit codes [out, in] and their scales [out]."""
    (rows, depth), columns = x.shape, len(codes)
    y = torch.empty(rows, columns, dtype=x.dtype, device=x.device)
    with on_device_of(x):
        few_rows_kernel[(cdiv(columns, 8),)](
            x.contiguous(), codes.view(torch.int8), scales, bias, y, columns, depth,
            ROWS=rows, HAS_BIAS=bias is not None, IS_FP8=codes.dtype.is_floating_point, BN=8, BK=512, num_warps=4,
        )  # fmt: skip
    return y


def transposed(codes: Tensor) -> Tensor:
    """8-bit codes [rows, columns] as a new contiguous tensor [columns, rows].

    Nine times as fast as torch's copy, which moves single bytes.
    """
    rows, columns = codes.shape
    result = torch.empty(columns, rows, dtype=codes.dtype, device=codes.device)
    source, target = (each.view(torch.int8) for each in (codes.contiguous(), result))
    with on_device_of(codes):
        grid = cdiv(rows, 64), cdiv(columns, 128)
        transposed_kernel[grid](source, target, rows, columns, BM=64, BN=128, num_warps=4)
    return result


def int8_product(
    a: Tensor,
    b: Tensor,
    a_scale: Tensor,
    b_scale: Tensor | None,
    bias: Tensor | None,
    dtype: torch.dtype,
    inner: Tensor | None = None,
    up: Tensor | None = None,
) -> Tensor:
    """a [rows, depth] · b [columns, depth]ᵀ times a_scale [rows] and b_scale [columns], plus bias [columns], plus
    inner [rows, rank] · up [columns, rank]ᵀ, as dtype.

    Both operands are contiguous int8 codes: tensor cores read 8-bit operands along the summed dimension only.
    """
    (rows, depth), columns = a.shape, b.shape[0]
    y = torch.empty(rows, columns, dtype=dtype, device=a.device)
    rank = 0 if inner is None else inner.shape[1]
    if inner is not None and up is not None:
        inner, up = inner if inner.stride(-1) == 1 else inner.contiguous(), up.contiguous()

    def launch(tiles: Tiles) -> None:
        grid = cdiv(rows, tiles.rows) * cdiv(columns, tiles.columns)
        int8_product_kernel[(grid,)](
            a, b, y, a_scale, b_scale, bias, inner, up, 0 if inner is None else inner.stride(0), rows, columns, depth,
            BM=tiles.rows, BN=tiles.columns, BK=tiles.depth, GROUP=8, HAS_SCALE=b_scale is not None,
            HAS_BIAS=bias is not None, RANK=rank, PADDED_RANK=max(16, power_of_2(rank)),
            num_warps=tiles.warps, num_stages=tiles.stages,
        )  # fmt: skip

    with on_device_of(a):
        launch(_chosen(a.device, rows, columns, depth, rank, launch))
    return y


_CHOSEN: dict[tuple[Any, ...], Tiles] = {}


def _chosen(
    device: torch.device, rows: int, columns: int, depth: int, rank: int, launch: Callable[[Tiles], None]
) -> Tiles:
    """The fastest tiles for products of about this size on this card, timed at the first one."""
    if device.type != "cuda":  # Triton's interpreter
        return Tiles(32, 32, 32, 4, 1)
    # Numbers of rows up to the next power of two share a choice: prompts and pictures differ in length.
    key = (device.index, power_of_2(rows), columns, depth, rank)
    if key not in _CHOSEN:
        tried = candidates(_capability(device), rows)
        if torch.cuda.is_current_stream_capturing():  # a CUDA graph is recorded: nothing can be timed
            return tried[0]
        _CHOSEN[key] = min(tried, key=lambda tiles: _seconds(device, tiles, launch))
    return _CHOSEN[key]


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def _seconds(device: torch.device, tiles: Tiles, launch: Callable[[Tiles], None]) -> float:
    """Seconds that a launch takes after the first one, which compiles; infinite if the card can't run these tiles."""
    try:
        return seconds_on_device(device, lambda: launch(tiles))
    except Exception:  # noqa: BLE001 - whatever the compiler raises; if no tiles work, the product itself raises it
        return float("inf")


def on_device_of(tensor: Tensor) -> Any:
    """A context in which the tensor's device is the current one: Triton launches there."""
    is_elsewhere = tensor.is_cuda and tensor.device.index != torch.cuda.current_device()
    return torch.cuda.device(tensor.device) if is_elsewhere else nullcontext()
