"""The Triton kernels without a card: their results in Triton's interpreter, and their code for cards of all kinds."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from tools.comfyui import REPO

triton = pytest.importorskip("triton")
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from trainer_core.precision import kernels

# KiB of shared memory that a program can have, by compute capability
SHARED = {(8, 0): 163, (8, 6): 99, (8, 9): 99, (9, 0): 227, (12, 0): 99}
CASES = [
    (card, tiles)
    for card in SHARED
    for tiles in dict.fromkeys((*kernels.candidates(card, 300), *kernels.candidates(card, 8000)))
]
INTERPRETED = """
import itertools

import torch
from trainer_core.precision import eight_bit, kernels

draws = torch.Generator().manual_seed(0)
for columns, has_factors in itertools.product((200, 192, 210), (False, True)):  # also three blocks, whole or not
    x, before = (torch.randn(37, columns, generator=draws).bfloat16() for _ in range(2))
    x[3], x[5, 7] = 0, 1000.0
    each = torch.rand(columns, generator=draws) if has_factors else None
    for kind, others in enumerate(({}, {"gelu": True}, {"gelu_input": before})):
        wanted = eight_bit.quantised(x, torch.int8, each, **others)
        codes, scales = kernels.quantise(x, torch.int8, 127.0, each, kind, others.get("gelu_input"))
        if kind == 0:
            assert torch.equal(codes, wanted.codes) and torch.equal(scales, wanted.scales)
            continue
        # torch's gelu and the kernel's may differ in the last bit that bfloat16 keeps, also that of the largest number.
        found, right = (each.float() * scale.unsqueeze(1) for each, scale in ((codes, scales), wanted[:2]))
        assert ((found - right).abs() <= 0.51 * (scales + wanted.scales).unsqueeze(1) + 2**-7 * right.abs()).all()
        assert (codes == wanted.codes).float().mean() > 0.9
x[2, 3], x[4, 4] = torch.nan, torch.inf
_, scales = kernels.quantise(x, torch.int8, 127.0, None, 0, None)
assert scales.isfinite().logical_not().nonzero().flatten().tolist() == [2, 4]

few, matrix = torch.randn(2, 200, generator=draws), torch.randint(-127, 128, (90, 200), generator=draws).to(torch.int8)
rows = torch.rand(90, 1, generator=draws)
for bias in (None, torch.rand(90, generator=draws)):
    found = kernels.few_rows(few, matrix, rows.flatten(), bias)
    torch.testing.assert_close(found, eight_bit.few_rows(few, bias, matrix, rows), rtol=1e-5, atol=1e-3)

a, b, g = (
    torch.randint(-127, 128, shape, dtype=torch.int8, generator=draws) for shape in ((37, 200), (90, 200), (37, 90))
)
a_scale, b_scale, bias = (torch.rand(count, generator=draws) for count in (37, 90, 90))
assert torch.equal(kernels.transposed(b), b.T)
for tokens, weight, scales, added, backward in ((a, b, b_scale, bias, False), (g, b, None, None, True)):
    operand = kernels.transposed(weight) if backward else weight
    found = kernels.int8_product(tokens, operand, a_scale, scales, added, torch.float32)
    wanted = eight_bit._multiplied(
        eight_bit.Coded(tokens, a_scale), weight, scales, added, torch.float32, backward=backward
    )
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-2)
for rank in (4, 16, 48):
    inner = torch.randn(37, 2 * rank, generator=draws)[:, rank:].half()  # the interpreter multiplies no bfloat16
    change = eight_bit.Change(inner, torch.randn(90, rank, generator=draws).half())
    found = kernels.int8_product(a, b, a_scale, b_scale, bias, torch.float32, *change[:2])
    wanted = eight_bit._multiplied(
        eight_bit.Coded(a, a_scale), b, b_scale, bias, torch.float32, change=change, backward=False
    )
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-2)

from trainer_core.qwen_image import query_key, query_key_kernels

for dtype in (torch.float32, torch.bfloat16):
    x, gradient = (torch.randn(1, 21, 3, 64, generator=draws).to(dtype) for _ in range(2))
    weight, angles = torch.rand(64, generator=draws).to(dtype), torch.randn(21, 32, 2, generator=draws)
    wanted, found = torch.empty_like(x), torch.full_like(x, torch.nan)
    query_key._plain_forward(x, weight, angles, 1e-6, out=wanted)
    query_key_kernels.forward(x, weight, angles, 1e-6, out=found)
    of_x = query_key._plain_backward(gradient, x, weight, angles, 1e-6)
    rounding = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(found, wanted, rtol=rounding, atol=rounding)
    torch.testing.assert_close(
        query_key_kernels.backward(gradient, x, weight, angles, 1e-6), of_x, rtol=rounding, atol=rounding
    )
print("same")
"""


def test_the_interpreter_finds_what_plain_torch_computes() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", INTERPRETED], capture_output=True, text=True, cwd=REPO, env=environment, check=False
    )
    assert done.stdout.strip() == "same", done.stderr[-3000:]


@pytest.mark.parametrize(("card", "tiles"), CASES, ids=str)
@pytest.mark.parametrize(("depth", "rank"), [(3072, 0), (3072, 16), (3072, 64), (3088, 0)])
def test_tiles_fit_every_card_and_use_its_tensor_cores(
    card: tuple[int, int], tiles: kernels.Tiles, depth: int, rank: int
) -> None:
    pointers = {"a": "*i8", "b": "*i8", "y": "*bf16", "a_scale": "*fp32", "b_scale": "*fp32", "bias": "*bf16"}
    pointers |= {"inner": "*bf16", "up": "*bf16"}
    fixed = {"depth": depth, "BM": tiles.rows, "BN": tiles.columns, "BK": tiles.depth, "GROUP": 8}
    fixed |= {"HAS_SCALE": True, "HAS_BIAS": True, "RANK": rank, "PADDED_RANK": max(16, rank)}
    signature = {
        **pointers,
        **dict.fromkeys(("inner_stride", "rows", "columns"), "i32"),
        **dict.fromkeys(fixed, "constexpr"),
    }
    # Addresses are multiples of 16, and so is the number of columns.
    aligned = {(place,): [["tt.divisibility", 16]] for place in (*range(9), 10)}
    source = ASTSource(kernels.int8_product_kernel, signature, constexprs=fixed, attrs=aligned)
    options = {"num_warps": tiles.warps, "num_stages": tiles.stages}
    made = triton.compile(source, target=GPUTarget("cuda", 10 * card[0] + card[1], 32), options=options)
    assert made.metadata.shared <= SHARED[card] * 1024
    instruction = r"wgmma\.mma_async[\w.]*\.s32\.s8\.s8" if card == (9, 0) else r"mma\.sync[\w.]*\.s32\.s8\.s8\.s32"
    assert re.search(instruction, made.asm["ptx"])


def test_sizes_are_rounded_up_as_triton_does() -> None:
    for size in (1, 2, 3, 4, 5, 127, 128, 129, 12288):
        assert kernels.cdiv(size, 8) == triton.cdiv(size, 8)
        assert kernels.power_of_2(size) == triton.next_power_of_2(size)
    assert kernels.power_of_2(0) == 1


@pytest.mark.parametrize("card", SHARED, ids=str)
@pytest.mark.parametrize("gelu", [0, 1, 2])
def test_rounding_compiles_for_every_card(card: tuple[int, int], gelu: int) -> None:
    pointers = {"x": "*bf16", "factors": "*fp32", "before": "*bf16", "codes": "*i8", "scales": "*fp32"}
    fixed = {"columns": 12288, "LARGEST": 127.0, "LEAST": 2.0**-126, "HAS_FACTORS": True, "GELU": gelu}
    fixed |= {"BLOCK": 4096, "IS_THREE": True}
    numbers = dict.fromkeys(("stride", "before_stride"), "i32")
    signature = {**pointers, **numbers, **dict.fromkeys(fixed, "constexpr")}
    source = ASTSource(kernels.quantise_kernel, signature, constexprs=fixed)
    options = {"num_warps": 8, **kernels.AS_TORCH}
    made = triton.compile(source, target=GPUTarget("cuda", 10 * card[0] + card[1], 32), options=options)
    assert "fma.rn" not in made.asm["ptx"]  # plain torch rounds a product before it adds to it
