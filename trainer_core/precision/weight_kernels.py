"""Triton kernels from quantised weights to int8 codes. Import it only where Triton is installed.

`eight_bit.coded` defines what they compute: the weight in float32, and of that the codes. They read a weight in words
of four bytes: eight codes of NF4, or four of the other formats, which are neighbours in a row and share a scale.
"""

# pyright: reportMissingParameterType=false, reportIndexIssue=false, reportAttributeAccessIssue=false

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .kernels import AS_TORCH, cdiv, e4m3_numbers, magnitudes, nearest, on_device_of, power_of_2, scale_of

# A program that transposes reads a sector of memory of each of its rows, and writes as wide as a line of the cache.
ROWS, SECTOR = 128, 8  # rows, words
_PER_THREAD, _PER_THREAD_TRANSPOSED = 32, 16  # numbers; the fastest of 8, 16 and 32 on an H200


def numbers_in_word(kind: str) -> int:
    """Rows and blocks must consist of whole words."""
    return 8 if kind == "nf4" else 4


@triton.jit
def nf4_numbers(words, word, is_in, absmax, quant_map, nested_absmax, nested_map, offset,
                BLOCK: tl.constexpr, NESTED: tl.constexpr):  # fmt: skip
    """The numbers [N, 8] in float32 of words [N] at the places `word`."""
    block = word // (BLOCK // 8)
    code = tl.load(absmax + block, mask=is_in, other=0).to(tl.int32)
    scale = tl.load(nested_map + code) * tl.load(nested_absmax + block // NESTED, mask=is_in, other=0)
    scale += tl.load(offset)
    place = tl.arange(0, 8)
    codes = words[:, None] >> (place // 2 * 8 + 4 - place % 2 * 4)[None, :]  # the first in the upper half of its byte
    return tl.load(quant_map + (codes & 15)) * scale[:, None]


@triton.jit
def e5m2_numbers(codes):
    """The numbers in float32 of codes from 0 to 255: the upper halves of float16's."""
    return (codes << 8).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def fp8_numbers(words, row, is_in, scale, IS_E5M2: tl.constexpr, HAS_SCALES: tl.constexpr):
    """As `nf4_numbers`."""
    codes = (words[:, None] >> (tl.arange(0, 4) * 8)[None, :]) & 255
    values = e5m2_numbers(codes) if IS_E5M2 else e4m3_numbers(codes)
    factor = tl.load(scale + row * HAS_SCALES, mask=is_in, other=0).to(tl.float32)
    return values * factor[:, None]


@triton.jit
def numbers_of(row, n, is_in, codes, a, b, c, d, e, height, WORDS: tl.constexpr,
               KIND: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr):  # fmt: skip
    """The numbers [N, 8] or [N, 4] in float32 of the words n [N] of rows [N]. Words that are not `is_in` give any."""
    at, word = codes.to(tl.pointer_type(tl.int32)), row * WORDS + n
    if KIND == "nf4":
        words = tl.load(at + word, mask=is_in, other=0)
        values = nf4_numbers(words, word, is_in, a, b, c, d, e, FIRST, SECOND)
    elif KIND == "packed":  # a matrix of groups, cut into parts of this height, which lie in the same bytes
        group = word // (SECOND // 4)
        part = tl.zeros_like(group)
        for each in tl.static_range(1, 8 // FIRST):
            part += (group >= each * height).to(tl.int32)
        words = tl.load(at + (word - part * height * (SECOND // 4)), mask=is_in, other=0)
        packed = words[:, None] >> ((tl.arange(0, 4) * 8)[None, :] + (part * FIRST)[:, None])
        factor = tl.load(a + group, mask=is_in, other=0).to(tl.float32)
        shift = tl.load(b + group, mask=is_in, other=0).to(tl.float32)
        values = (packed & (2**FIRST - 1)).to(tl.float32) * factor[:, None] - shift[:, None]
    else:
        words = tl.load(at + word, mask=is_in, other=0)
        values = fp8_numbers(words, row, is_in, a, FIRST, SECOND)
    return values


@triton.jit
def int8_codes(values, scale):
    """Integers whose last byte is the code of each value, as `eight_bit.quantised` rounds them."""
    inverse = tl.math.div_rn(tl.zeros_like(scale) + 1.0, scale)
    return nearest(values * inverse)


@triton.jit
def quantise_rows_kernel(
    inputs, a, b, c, d, e, height, codes, scales, WORDS: tl.constexpr, KIND: tl.constexpr, FIRST: tl.constexpr,
    SECOND: tl.constexpr, LARGEST: tl.constexpr, LEAST: tl.constexpr, BLOCK: tl.constexpr, WRITES: tl.constexpr,
):  # fmt: skip
    """A row's scale, and with WRITES its codes. BLOCK is the least power of two that holds its WORDS words."""
    n = tl.arange(0, BLOCK)
    row, is_in = tl.program_id(0) + tl.zeros_like(n), n < WORDS
    values = numbers_of(row, n, is_in, inputs, a, b, c, d, e, height, WORDS, KIND, FIRST, SECOND)
    values = tl.where(is_in[:, None], values, 0.0)
    scale = scale_of(tl.max(tl.max(magnitudes(values), axis=1), axis=0), LARGEST, LEAST)
    if WRITES:
        COUNT: tl.constexpr = values.shape[1] // 4
        found = tl.reshape(int8_codes(values, scale) & 255, (BLOCK, COUNT, 4)) << (tl.arange(0, 4) * 8)[None, None, :]
        at = (row * WORDS + n)[:, None] * COUNT + tl.arange(0, COUNT)[None, :]
        tl.store(codes.to(tl.pointer_type(tl.int32)) + at, tl.sum(found, axis=2), mask=is_in[:, None])
    tl.store(scales + tl.program_id(0), scale)


@triton.jit
def quantise_transposed_kernel(
    inputs, a, b, c, d, e, height, codes, scales, rows, WORDS: tl.constexpr, KIND: tl.constexpr, FIRST: tl.constexpr,
    SECOND: tl.constexpr, BM: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    """BW words of BM rows as columns of transposed codes [columns, rows], for the rows' scales."""
    place = tl.arange(0, BM * BW)
    row, n = tl.program_id(1) * BM + place // BW, tl.program_id(0) * BW + place % BW
    is_in = (row < rows) & (n < WORDS)
    values = numbers_of(row, n, is_in, inputs, a, b, c, d, e, height, WORDS, KIND, FIRST, SECOND)
    found = int8_codes(values, tl.load(scales + row, mask=is_in, other=1)[:, None]).to(tl.int8)
    WIDTH: tl.constexpr = values.shape[1] * BW
    j, m = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH), tl.program_id(1) * BM + tl.arange(0, BM)
    is_in = (j < WORDS * values.shape[1])[:, None] & (m < rows)[None, :]
    tl.store(codes + j[:, None].to(tl.int64) * rows + m[None, :], tl.trans(tl.reshape(found, (BM, WIDTH))), mask=is_in)


def quantise(
    kind: str,
    shape: Sequence[int],
    sizes: Sequence[int],
    tensors: Sequence[Tensor],
    largest: float,
    *,
    transposed: bool,
) -> tuple[Tensor, Tensor]:
    """int8 codes [rows, columns], or [columns, rows] if `transposed`, and scales [rows] of a weight of this shape.

    `tensors` are those of a format, and `sizes` its numbers: of "nf4" the two block sizes, of "packed" bits and group,
    of "fp8" none.
    """
    rows, columns = shape
    codes, *others = (each.contiguous() for each in tensors)
    result = torch.empty((columns, rows) if transposed else (rows, columns), dtype=torch.int8, device=codes.device)
    scales = torch.empty(rows, dtype=torch.float32, device=codes.device)
    inputs = codes.view(torch.uint8), *others, *[None] * (5 - len(others)), len(codes), result, scales
    count = numbers_in_word(kind)
    words = columns // count
    first, second = sizes or (codes.dtype == torch.float8_e5m2, others[0].numel() > 1)
    block = power_of_2(words)
    with on_device_of(codes):
        quantise_rows_kernel[(rows,)](
            *inputs, words, kind, first, second, largest, torch.finfo(torch.float32).tiny, block, not transposed,
            **options(block * count // _PER_THREAD),
        )  # fmt: skip
        if transposed:
            quantise_transposed_kernel[(cdiv(words, SECTOR), cdiv(rows, ROWS))](
                *inputs, rows, words, kind, first, second, ROWS, SECTOR,
                **options(ROWS * SECTOR * count // _PER_THREAD_TRANSPOSED),
            )  # fmt: skip
    return result, scales


def options(threads: int) -> dict[str, int]:
    """How Triton compiles a program for about so many threads."""
    return {"num_warps": min(16, max(1, threads // 32)), **AS_TORCH}
