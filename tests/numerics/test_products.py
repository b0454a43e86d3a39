"""8-bit products: what they compute, how far that is from the exact product, and runs that train with them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.support.both_passes import quantised_layer
from tests.support.random_base import relative_error
from tests.support.runs import StopAfter, equal, lora_tensors, named, twelve_steps
from trainer_core.adapters.lora import LoraLinear
from trainer_core.conditioning.encoded import EncodedDataset
from trainer_core.config import BaseModelPrecision, ModelConfig, TrainConfig
from trainer_core.precision import eight_bit
from trainer_core.precision.formats import EightBits, QuantisedWeight
from trainer_core.precision.frozen_linear import (
    FrozenLinear,
    exact_products,
    mlp,
    only_gradients,
    rounded_tokens,
    set_products,
    together,
)
from trainer_core.qwen_image import block
from trainer_core.rng import stream
from trainer_core.run import train_lora
from trainer_core.training import validation as validation_module

CPU = torch.device("cpu")
COLUMNS, ROWS, TOKENS = 256, 192, 40
FORMATS = ("int8-quanto", "fp8-quanto", "fp8-file", "rotated", "e5m2", "nf4-bnb", "int4-quanto", "int2-quanto")
DTYPES = (torch.bfloat16, torch.float32)


def layer_of(form: str, dtype: torch.dtype) -> FrozenLinear:
    """A layer with a bias whose weight [ROWS, COLUMNS] has this format."""
    if form in ("fp8-file", "e5m2"):  # with one scale for the whole weight
        weight = torch.randn(ROWS, COLUMNS, generator=stream(0, "weight"))
        codes = weight.to(torch.float8_e5m2 if form == "e5m2" else torch.float8_e4m3fn)
        made = QuantisedWeight(EightBits(), {"codes": codes, "scale": torch.tensor(COLUMNS**-0.5)})
    elif form == "rotated":
        made = quantised_layer("int8-quanto", COLUMNS, ROWS, "cpu", dtype).quantised
        made = QuantisedWeight(EightBits(rotation=64), made.tensors)
    else:
        precision: BaseModelPrecision = form  # type: ignore[assignment]
        made = quantised_layer(precision, COLUMNS, ROWS, "cpu", dtype).quantised
    layer = FrozenLinear(made, torch.randn(ROWS, generator=stream(0, "bias")).to(dtype))
    set_products(layer, CPU, in_8_bits=True)
    return layer


def inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x and g of several tokens: one of zeros, one with an outlier, one tiny, and rows that are not contiguous."""
    x, g = (torch.randn(2, TOKENS, 2 * wide, generator=stream(wide, "x")) for wide in (COLUMNS, ROWS))
    for each in (x, g):
        each[0, 1], each[0, 2, 6], each[0, 3] = 0, 300.0, each[0, 3] * 1e-12
    return x.to(dtype)[..., ::2].requires_grad_(), g.to(dtype)[..., ::2] * 1e-3


def both_passes(layer: FrozenLinear, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """y and dx of the inputs."""
    x, g = inputs(dtype)
    y = layer(x)
    (dx,) = torch.autograd.grad(y, x, g)
    assert y.dtype == dx.dtype == dtype
    return y.detach().double(), dx.double()


def rounded(x: Tensor, codes: torch.dtype) -> Tensor:
    """x [..., columns] in float64 rounded to 8-bit codes with a float32 scale per row, written anew."""
    largest = 448.0 if codes == torch.float8_e4m3fn else 127.0
    scale = (x.abs().amax(-1, keepdim=True).float() / largest).double().clamp_min(2.0**-126)
    if codes == torch.int8:
        return (x / scale).round() * scale
    steps = 2.0 ** ((x / scale).abs().clamp_min(2.0**-6).log2().floor() - 3)  # e4m3: 3 bits, least exponent -6
    return (x / scale / steps).round() * steps * scale


def turned(x: Tensor, rotation: int) -> Tensor:
    """x [..., columns] in float64 with each group of columns turned, as ComfyUI's convrot turns weights."""
    if not rotation:
        return x
    part = torch.tensor([[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]], dtype=torch.float64) / 2
    matrix = part
    while len(matrix) < rotation:
        matrix = torch.kron(matrix, part)
    return (x.unflatten(-1, (-1, rotation)) @ matrix).flatten(-2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMATS)
def test_products_equal_their_definition_in_float64(form: str, dtype: torch.dtype) -> None:
    """Up to sums in float32, codes that a last bit moves to the next one, and one rounding (two if rotated)."""
    layer = layer_of(form, dtype)
    codes, rotation = layer.codes, getattr(layer.format, "rotation", 0)
    assert codes == (torch.float8_e4m3fn if form in ("fp8-quanto", "fp8-file") else torch.int8)
    x, g = (each.detach().double() for each in inputs(dtype))
    weight = turned(layer.dequantised(torch.float32).double(), rotation)  # turned once more: as it is stored
    if layer.weight.dtype != codes:
        weight = rounded(layer.dequantised(torch.float32).double(), codes)
    scales = eight_bit.coded(layer.format, layer._tensors(), codes).scales.double()
    y = rounded(turned(x, rotation).to(dtype).double(), codes) @ weight.T + layer.bias.double()
    dx = turned(rounded(g * scales, codes) @ (weight / scales[:, None]), rotation)
    for found, wanted in zip(both_passes(layer, dtype), (y, dx), strict=True):
        bound = (2**-8 if dtype == torch.bfloat16 else 2**-20) * (2 if rotation else 1)
        assert float((found - wanted).norm() / wanted.norm()) < max(bound, 2e-4), (form, dtype)
        assert (found[0, 1] == (layer.bias.double() if wanted is y else 0)).all()  # the token of zeros


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMATS)
def test_no_result_is_further_from_the_exact_product_than_rounding_explains(form: str, dtype: torch.dtype) -> None:
    """int8: half a scale for each number. fp8: a sixteenth of each number, or half of the least step."""
    layer = layer_of(form, dtype)
    exact = layer.dequantised(torch.float32).double()
    coded = eight_bit.coded(layer.format, layer._tensors(), layer.codes)
    stored = coded.codes.double() * coded.scales.double()[:, None]
    of_weight = (turned(exact, coded.rotation) - stored).abs()
    x, g = (each.detach().double() for each in inputs(dtype))

    def most(values: Tensor) -> Tensor:
        scale = values.abs().amax(-1, keepdim=True) / eight_bit.largest_code(layer.codes)
        if layer.codes == torch.int8:
            return scale.expand(values.shape) / 2
        return values.abs() / 16 + scale * 2.0**-10

    y, dx = both_passes(layer, dtype)
    tokens, folded = turned(x, coded.rotation), g * coded.scales.double()
    allowed = most(tokens) @ stored.abs().T + tokens.abs() @ of_weight.T
    wanted = x @ exact.T + layer.bias.double()
    assert ((y - wanted).abs() <= 1.02 * allowed + 2**-7 * (wanted.abs() + 0.1 * allowed)).all()
    allowed = most(folded) @ coded.codes.double().abs() + g.abs() @ of_weight
    wanted, found = turned(g @ exact, coded.rotation), turned(dx, coded.rotation)
    assert ((found - wanted).abs() <= 1.02 * allowed + 2**-6 * wanted.norm(dim=-1, keepdim=True)).all()
    assert float((y - x @ exact.T - layer.bias.double()).norm()) > 0  # something was rounded


def test_rounded_inputs_are_those_of_the_products() -> None:
    """`quantize_activations` computes with the numbers that 8-bit products have."""
    x = inputs(torch.float32)[0].detach()
    for codes in (torch.int8, torch.float8_e4m3fn):
        tokens = eight_bit.quantised(x.flatten(0, 1), codes)
        assert torch.equal(rounded_tokens(x, codes).flatten(0, 1), tokens.codes.float() * tokens.scales[:, None])
    layer = layer_of("int8-quanto", torch.float32)
    with exact_products(layer):
        assert layer.codes is None
        layer.rounds_input = True
        emulated = both_passes(layer, torch.float32)[0]
    assert layer.codes == torch.int8
    torch.testing.assert_close(both_passes(layer, torch.float32)[0], emulated, rtol=1e-5, atol=1e-4)


def test_a_few_rows_are_not_rounded() -> None:
    layer = layer_of("int8-quanto", torch.float32)
    x = torch.randn(eight_bit.UNROUNDED_ROWS + 1, COLUMNS, generator=stream(0, "few"))
    with exact_products(layer):
        exact = layer(x)
    assert torch.equal(layer(x[:-1]), exact[:-1]) and not torch.equal(layer(x), exact)


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
def test_a_number_that_is_not_finite_is_not_hidden(wrong: float) -> None:
    layer = layer_of("int8-quanto", torch.float32)
    x = torch.randn(TOKENS, COLUMNS, generator=stream(0, "wrong"))
    x[7, 5] = wrong
    finite = layer(x).isfinite()
    assert not finite[7].any() and finite[:7].all() and finite[8:].all()


def test_nothing_of_the_activations_is_kept() -> None:
    """Only the layer's own tensors wait for the backward pass."""
    layer, kept = layer_of("nf4-bnb", torch.float32), list[Tensor]()
    x, _ = inputs(torch.float32)
    with torch.autograd.graph.saved_tensors_hooks(lambda each: kept.append(each) or each, lambda each: each):
        layer(x)
    own = {each.data_ptr() for each in layer._tensors()}
    assert kept and all(each.data_ptr() in own for each in kept)


@pytest.fixture
def config(encoded: EncodedDataset, model: ModelConfig, tmp_path: Path) -> TrainConfig:
    model = dataclasses.replace(model, base_model_precision="int8-quanto", matmul_precision="8bit")
    return dataclasses.replace(twelve_steps(encoded, model, tmp_path / "run"), max_train_steps=6)


def test_a_stopped_run_continues_bit_by_bit_and_previews_are_exact(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_8_bits, attention, previewed = [], [], []
    loss, attend = validation_module.Validator.loss, block.attend

    def seen(self, transformer, *others):
        in_8_bits.extend(layer.codes for layer in transformer.modules() if isinstance(layer, FrozenLinear))
        before = len(attention)
        try:
            return loss(self, transformer, *others)
        finally:
            previewed.extend(attention[before:])

    def attended(*given, in_8_bits):
        attention.append(in_8_bits)
        return attend(*given, in_8_bits=in_8_bits)

    monkeypatch.setattr(validation_module.Validator, "loss", seen)
    monkeypatch.setattr(block, "attend", attended)
    unbroken, broken = train_lora(config), named(config, "broken")
    assert any(attention) and previewed and not any(previewed)
    assert train_lora(broken, StopAfter(7)).lora_file is None
    assert equal(lora_tensors(train_lora(broken)), lora_tensors(unbroken))
    exact = dataclasses.replace(config.model, matmul_precision="bf16")
    assert not equal(lora_tensors(train_lora(named(config, "exact", model=exact))), lora_tensors(unbroken))
    assert len(in_8_bits) > 20 and not any(in_8_bits)


@pytest.mark.parametrize("gradient_only", [False, True])
@pytest.mark.parametrize("form", ["int8-quanto", "fp8-quanto", "nf4-bnb", "rotated"])
def test_an_mlp_equals_its_layers_one_by_one(form: str, gradient_only: bool) -> None:
    """Bit for bit: gelu between 8-bit products is part of their rounding, and computes the same."""
    first, last = layer_of(form, torch.bfloat16), square_layer(form)
    if form != "rotated":  # the rotation lies between gelu and the rounding
        last.forward = None  # type: ignore[assignment,method-assign]
    x, _ = inputs(torch.bfloat16)
    g = torch.randn(2, TOKENS, last.out_features, generator=stream(0, "g")).bfloat16()
    y = mlp(first, last, x, gradient_only=gradient_only)
    (dx,) = torch.autograd.grad(y, x, g)
    wanted = FrozenLinear.forward(last, functional.gelu(first(x), approximate="tanh"))
    assert gradient_only or torch.equal(y, wanted)
    assert torch.equal(dx, torch.autograd.grad(wanted, x, g)[0])


def square_layer(form: str) -> FrozenLinear:
    """A layer that takes the outputs of `layer_of`."""
    if form == "rotated":
        made = quantised_layer("int8-quanto", ROWS, ROWS, "cpu").quantised
        layer = FrozenLinear(QuantisedWeight(EightBits(rotation=64), made.tensors), None)
    else:
        layer = quantised_layer(form, ROWS, ROWS, "cpu")  # type: ignore[arg-type]
    set_products(layer, CPU, in_8_bits=True)
    return layer


@pytest.mark.parametrize("alpha", [4, 6], ids=["scale 1", "scale 1.5"])
def test_an_adapter_that_a_product_takes_along_computes_the_same(alpha: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to rounding to bfloat16: the product rounds the sum once. Alone, and as one of several with the same input."""
    layers = nn.ModuleDict({name: layer_of("int8-quanto", torch.bfloat16) for name in "qkv"})
    settings = peft.LoraConfig(r=4, lora_alpha=alpha, target_modules=list("qkv"))
    settings._register_custom_module({nn.Linear: LoraLinear})
    adapted: Any = peft.inject_adapter_in_model(settings, layers)
    for name, weight in adapted.named_parameters():
        if "lora_" in name:
            weight.data = torch.randn(weight.shape, generator=stream(0, name)).bfloat16() / 10
    x, g = (each.detach() for each in inputs(torch.bfloat16))
    alone: dict[Any, Any] = {}
    every = list(adapted.values())

    def gradients_alone(x: Tensor) -> list[Tensor]:
        """Of a second pass: the adapters' gradients are the same, bit for bit, but the outputs mean nothing."""
        return [only_gradients(each, x) for each in every]

    for call in (lambda x: [each(x) for each in every], lambda x: together(every, x), gradients_alone):
        found = []
        for fused in (False, True):
            monkeypatch.setattr(eight_bit, "adds_changes", lambda *_, fused=fused: fused)
            leaf = x.clone().requires_grad_()
            outputs = call(leaf)
            adapted.zero_grad()
            torch.autograd.backward(outputs, [g] * 3)
            with torch.no_grad():
                assert call is gradients_alone or all(map(torch.equal, call(leaf), outputs))
            gradients = {name: each.grad for name, each in adapted.named_parameters() if each.grad is not None}
            found.append({**dict(enumerate(outputs)), "x": leaf.grad, **gradients})
        assert len(found[0]) == 3 + 1 + 6
        if call is gradients_alone:
            assert all(torch.equal(found[1][name], alone[name]) for name in gradients)
            continue
        alone = alone or found[1]
        for name, wanted in found[0].items():
            assert relative_error(found[1][name], wanted) < 6e-3, name


def test_the_small_products_that_try_a_machine_run() -> None:
    """On the CPU in plain torch, with the shapes that a card gets."""
    assert eight_bit._failure.__wrapped__(CPU) == ""
