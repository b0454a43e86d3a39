"""8-bit products on a GPU: the kernels compute what `eight_bit` defines, in both passes, with and without compiler."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.support import weight_codes
from tests.support.both_passes import quantised_layer
from tests.support.random_base import relative_error
from trainer_core.config import BaseModelPrecision
from trainer_core.memory.compilation import _compiled
from trainer_core.precision import card_operators, eight_bit
from trainer_core.precision.formats import EightBits, QuantisedWeight
from trainer_core.precision.frozen_linear import FrozenLinear, mlp, set_products
from trainer_core.rng import stream

pytest.importorskip("triton")
from trainer_core.precision import kernels

CUDA = torch.device("cuda")
FORMATS = (
    "int8-quanto",
    "fp8-quanto",
    "nf4-bnb",
    "int4-quanto",
    "int2-quanto",
    "rotated",
    "fp8, one scale",
    "int8, one scale",
)
# Codes that lie between two may be rounded to either side: a division or a sum differs in its last bit.
ROUNDED = 4e-3
TILES = dict.fromkeys(
    tiles for rows in (300, 8000) for tiles in kernels.candidates(torch.cuda.get_device_capability(), rows)
)
pytestmark = pytest.mark.skipif(
    torch.cuda.get_device_capability() < (8, 0), reason="int8 products need compute capability 8.0"
)


def layer_of(form: str, columns: int, rows: int, dtype: torch.dtype = torch.bfloat16) -> FrozenLinear:
    """A layer with random weights [rows, columns] and a bias, in a format, on the card."""
    if form not in ("rotated", "fp8, one scale", "int8, one scale"):
        precision: BaseModelPrecision = form  # type: ignore[assignment]
        made = quantised_layer(precision, columns, rows, "cuda", dtype).quantised
    elif form == "rotated":
        made = quantised_layer("int8-quanto", columns, rows, "cuda", dtype).quantised
        made = QuantisedWeight(dataclasses.replace(made.format, rotation=64), made.tensors)
    else:
        weight = torch.randn(rows, columns, generator=stream(0, "one scale")).to(CUDA)
        scale = torch.tensor(columns**-0.5 / 20, device=CUDA)
        codes = (20 * weight).to(torch.float8_e4m3fn if form.startswith("fp8") else torch.int8)
        made = QuantisedWeight(EightBits(), {"codes": codes, "scale": scale})
    bias = torch.randn(rows, generator=stream(0, "bias")).to(dtype)
    return FrozenLinear(made, bias.to(CUDA))


def both_passes(layer: FrozenLinear, rows: int, dtype: torch.dtype, forward: object = None) -> tuple[Tensor, Tensor]:
    """y and dx of random inputs and gradients of so many tokens, the same on each call and device."""
    draws, device = stream(0, "both", rows), layer.weight.device
    x = torch.randn(1, rows, layer.in_features, generator=draws)
    x[0, 1], x[0, 2, 5] = 0, 1000.0  # a token of zeros, and one with an outlier
    g = torch.randn(1, rows, layer.out_features, generator=draws).to(dtype).to(device)
    x = x.to(dtype).to(device).requires_grad_()
    y = (forward or layer)(x)  # type: ignore[operator]
    (dx,) = torch.autograd.grad(y, x, g)
    return y.detach().cpu().float(), dx.cpu().float()


def on_the_cpu(layer: FrozenLinear) -> FrozenLinear:
    """The same layer where plain torch multiplies the same type of codes."""
    twin = copy.deepcopy(layer).cpu()
    twin.codes = layer.codes
    return twin


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_card_computes_the_definition(form: str, dtype: torch.dtype) -> None:
    """At sizes that fill no tile, also with the compiler."""
    layer = layer_of(form, 448, 320, dtype)
    set_products(layer, CUDA, in_8_bits=True)
    assert layer.codes == (torch.int8 if not form.startswith("fp8") else eight_bit.code_dtype(*of(layer)))
    wanted = both_passes(on_the_cpu(layer), 77, dtype)
    torch.compiler.reset()
    bound = 6e-3 if layer.codes == torch.float8_e4m3fn else ROUNDED  # fast accumulation
    for forward in (None, _compiled(layer.forward, None)):
        for found, right in zip(both_passes(layer, 77, dtype, forward), wanted, strict=True):
            assert relative_error(found, right) < bound, (form, dtype, forward)


def of(layer: FrozenLinear) -> tuple[EightBits, torch.dtype, torch.device]:
    assert isinstance(layer.format, EightBits)
    return layer.format, layer.weight.dtype, CUDA


@pytest.mark.parametrize(("rows", "columns", "depth"), [(8422, 3072, 3072), (300, 200, 176), (17, 3072, 12288)])
@pytest.mark.parametrize("rank", [0, 16, 64])
def test_all_tiles_give_the_same_bits(
    rows: int, columns: int, depth: int, rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    draws = torch.Generator("cuda").manual_seed(0)
    a, b = (
        torch.randint(-127, 128, (each, depth), device=CUDA, dtype=torch.int8, generator=draws)
        for each in (rows, columns)
    )
    a_scale, b_scale = (torch.rand(each, device=CUDA, generator=draws) for each in (rows, columns))
    bias = torch.randn(columns, device=CUDA, generator=draws, dtype=torch.bfloat16)
    wanted = (a.double() @ b.double().T).float() * a_scale[:, None] * b_scale + bias.float()  # the sums are exact
    change = []
    if rank:
        wide = (torch.randn(each, 3 * rank, device=CUDA, generator=draws).bfloat16() for each in (rows, columns))
        change = [each[:, rank : 2 * rank] for each in wide]
        wanted += (change[0].double() @ change[1].double().T).float()
    results = []
    for tiles in TILES:
        monkeypatch.setattr(kernels, "_chosen", lambda *_, tiles=tiles: tiles)
        results.append(kernels.int8_product(a, b, a_scale, b_scale, bias, torch.float32, *change))
    torch.testing.assert_close(results[0], wanted, rtol=1e-6, atol=1e-2)
    assert [tiles for tiles, found in zip(TILES, results, strict=True) if not torch.equal(found, results[0])] == []


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_codes_of_tokens_are_those_of_plain_torch(dtype: torch.dtype) -> None:
    if dtype.is_floating_point and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("no fp8 on this card")
    x = torch.randn(100, 3072, generator=stream(0, "tokens")).bfloat16()
    x[3], factors = 0, torch.rand(3072, generator=stream(1, "tokens"))
    for each in (None, factors):
        wanted = eight_bit.quantised(x, dtype, each)
        found = eight_bit.quantised(x.cuda(), dtype, None if each is None else each.cuda())
        assert torch.equal(found.scales.cpu(), wanted.scales)
        assert torch.equal(found.codes.cpu().float(), wanted.codes.float())
    assert torch.equal(
        eight_bit.quantised(x.cuda()[:, ::2], dtype).codes.cpu().float(),
        eight_bit.quantised(x[:, ::2], dtype).codes.float(),
    )


def test_gelu_is_rounded_with_the_codes() -> None:
    """Numbers between two codes, and those of bfloat16, may be rounded to either side."""
    h, g = (torch.randn(100, 12288, generator=stream(each, "gelu")).bfloat16() for each in (0, 1))
    factors = torch.rand(12288, generator=stream(2, "gelu"))
    for x, others in ((h, {"gelu": True}), (g, {"gelu_input": h, "factors": factors})):
        wanted = eight_bit.quantised(x, torch.int8, **others)
        there = {name: each.cuda() if isinstance(each, Tensor) else each for name, each in others.items()}
        found = eight_bit.quantised(x.cuda(), torch.int8, **there)
        values = (each.codes.cpu().float() * each.scales.cpu()[:, None] for each in (found, wanted))
        assert relative_error(*values) < ROUNDED


@pytest.mark.parametrize("precision", ["int8-quanto", "fp8-quanto"])
def test_an_mlp_equals_its_layers_one_by_one(precision: BaseModelPrecision) -> None:
    first, last = layer_of(precision, 448, 320), layer_of(precision, 320, 192)
    set_products(nn.ModuleList([first, last]), CUDA, in_8_bits=True)

    def fused(x: Tensor) -> Tensor:
        return mlp(first, last, x, gradient_only=False)

    def one_by_one(x: Tensor) -> Tensor:
        return last(functional.gelu(first(x), approximate="tanh"))

    x, g = (torch.randn(1, 77, wide, device=CUDA, dtype=torch.bfloat16) for wide in (448, 192))
    wanted = passes_of(one_by_one, x, g)
    for forward in (fused, _compiled(fused, None)):
        for found, right in zip(passes_of(forward, x, g), wanted, strict=True):
            assert relative_error(found.float(), right.float()) < 2 * ROUNDED


def passes_of(forward: Any, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """y and dx."""
    x = x.detach().requires_grad_()
    y = forward(x)
    return y.detach(), torch.autograd.grad(y, x, g)[0]


@pytest.mark.parametrize("form", ["int8-quanto", "fp8, one scale"])
@pytest.mark.parametrize("rows", [1, 2])
def test_few_rows_compiled_equal_the_dequantised_weight(form: str, rows: int) -> None:
    layer = layer_of(form, 3072, 18432)
    x = torch.randn(1, rows, 3072, device=CUDA, dtype=torch.bfloat16)
    with torch.no_grad():
        exact = functional.linear(x.double(), layer.dequantised(torch.float32).double(), layer.bias.double())
        assert relative_error(_compiled(layer.forward, None)(x).double(), exact) < 3e-3


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
def test_a_number_that_is_not_finite_is_not_hidden(wrong: float) -> None:
    x = torch.randn(40, 3072, device=CUDA, dtype=torch.bfloat16)
    x[7, 5] = wrong
    layer = layer_of("int8-quanto", 3072, 256)
    set_products(layer, CUDA, in_8_bits=True)
    finite = layer(x).isfinite()
    assert not finite[7].any() and finite[:7].all() and finite[8:].all()


@pytest.mark.parametrize("form", ["int8-quanto", "nf4-bnb", "int4-quanto"])
def test_the_backward_pass_keeps_nothing(form: str) -> None:
    """Neither x nor its codes nor those of the weight, also compiled. The stored weight itself is the layer's."""
    layer = layer_of(form, 3072, 3072)
    set_products(layer, CUDA, in_8_bits=True)
    for forward in (layer.forward, _compiled(layer.forward, None)):
        x = torch.randn(1, 4096, 3072, device=CUDA, dtype=torch.bfloat16, requires_grad=True)
        forward(x).sum().backward()  # compiles, and chooses tiles
        before = torch.cuda.memory_allocated()
        y = forward(x)
        assert torch.cuda.memory_allocated() - before <= y.nbytes + 2**16


@pytest.mark.parametrize("form", weight_codes.FORMATS)
@pytest.mark.parametrize(("rows", "columns"), [(320, 448), (37, 200), (3072, 3072), (12288, 3072), (3072, 12288)])
def test_codes_of_weights_are_those_of_plain_torch(form: str, rows: int, columns: int) -> None:
    weight_codes.assert_codes_are_those_of_plain_torch(weight_codes.quantised_weight(form, rows, columns, "cuda"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_nf4_is_dequantised_alike_on_card_and_cpu(dtype: torch.dtype) -> None:
    layer = layer_of("nf4-bnb", 3072, 1024)
    assert torch.equal(layer.dequantised(dtype).cpu(), on_the_cpu(layer).dequantised(dtype))


@pytest.mark.parametrize("form", ["fp8-quanto", "fp8, one scale"])
def test_fp8_weights_where_the_card_has_no_fp8(form: str) -> None:
    """They are rounded to int8."""
    layer = layer_of(form, 448, 320)
    layer.codes = torch.int8
    card_operators.define_operators()
    wanted = both_passes(on_the_cpu(layer), 77, torch.bfloat16)
    for found, right in zip(both_passes(layer, 77, torch.bfloat16), wanted, strict=True):
        assert relative_error(found, right) < ROUNDED


def test_transposed_codes() -> None:
    for dtype in (torch.int8, torch.float8_e4m3fn):
        codes = torch.randint(-100, 100, (12288, 3080), device=CUDA, dtype=torch.int8).view(dtype)
        assert torch.equal(kernels.transposed(codes).view(torch.int8), codes.view(torch.int8).T)
