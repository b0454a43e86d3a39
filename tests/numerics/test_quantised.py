"""Quantised base weights: how far the output moves, and whether the adapter's gradients keep their direction."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import quantize_4bit
from diffusers import QwenImageTransformer2DModel
from torch import nn
from torch.utils.checkpoint import checkpoint

from tests.support.adapter_gradients import gradients, predict, task, with_adapter
from tests.support.both_passes import quantised_layer, weights_of_both_passes
from tests.support.narrow import NARROW
from trainer_core.config import BaseModelPrecision, ModelConfig
from trainer_core.precision.formats import Packed
from trainer_core.precision.frozen_linear import FrozenLinear
from trainer_core.qwen_image.base_model import BaseModel
from trainer_core.qwen_image.transformer import load_transformer
from trainer_core.rng import stream
from trainer_core.weights.stored import StoredWeight


@dataclass(frozen=True)
class Bound:
    """Largest output error, smallest cosine of the adapter's gradients, largest share of a float32 weight's bytes."""

    error: float
    cosine: float
    share: float


# About three times the deviations measured on this network (int8 3.0e-4 and 0.99999, nf4 6.7e-3 and 0.993).
BOUNDS: dict[BaseModelPrecision, Bound] = {
    "int8-quanto": Bound(error=1e-3, cosine=0.999, share=0.28),
    "nf4-bnb": Bound(error=2e-2, cosine=0.98, share=0.14),
    "fp8-quanto": Bound(error=5e-3, cosine=0.997, share=0.28),
    "int4-quanto": Bound(error=1.2e-2, cosine=0.98, share=0.2),
    "int2-quanto": Bound(error=7e-2, cosine=0.8, share=0.14),
}
SENSITIVE = ("img_in", "txt_in", "time_text_embed", "norm_out", "proj_out")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A narrow transformer with torch's initial weights, in a base model's folder."""
    folder = tmp_path_factory.mktemp("base")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        QwenImageTransformer2DModel(**NARROW).save_pretrained(folder / "transformer")
    for part in ("vae", "text_encoder"):
        (folder / part).mkdir()
        (folder / part / "config.json").write_text("{}")
    return folder


@pytest.fixture(params=list(BOUNDS))
def precision(request: pytest.FixtureRequest) -> BaseModelPrecision:
    return request.param


def load(base: Path, precision: BaseModelPrecision) -> nn.Module:
    """The transformer in a precision, with float32 arithmetic."""
    config = ModelConfig(base=str(base), base_model_precision=precision, mixed_precision="no", device="cpu")
    return load_transformer(BaseModel(config), torch.device("cpu"))


def num_bytes(layer: nn.Module) -> int:
    """Bytes of a layer's frozen weight with its scales."""
    if isinstance(layer, FrozenLinear):
        return sum(each.nbytes for name, each in layer.quantised.tensors.items() if not name.endswith("_map"))
    return layer.weight.nbytes


@torch.no_grad()
def test_output_stays_near_float32(base: Path, precision: BaseModelPrecision):
    exact, quantised = predict(load(base, "none")), predict(load(base, precision))
    error = float((exact - quantised).norm() / exact.norm())
    assert 1e-5 < error < BOUNDS[precision].error, "below 1e-5 nothing was quantised"


def test_gradient_of_every_adapter_weight_points_the_same_way(base: Path, precision: BaseModelPrecision):
    found = {}
    for each in ("none", precision):
        transformer = load(base, each)
        found[each] = gradients(transformer, with_adapter(transformer))
    assert found["none"].keys() == found[precision].keys()
    flat = [torch.cat([each[name].flatten() for name in sorted(each)]) for each in found.values()]
    assert torch.cosine_similarity(*flat, dim=0) > BOUNDS[precision].cosine


def test_only_the_adapter_has_gradients(base: Path, precision: BaseModelPrecision):
    transformer = load(base, precision)
    lora = with_adapter(transformer)
    gradients(transformer, lora)
    trained = {id(weight) for weight in lora.values()}
    frozen = [parameter for parameter in transformer.parameters() if id(parameter) not in trained]
    assert len(frozen) > 50
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in frozen)


def test_sensitive_layers_stay_and_all_others_shrink(base: Path, precision: BaseModelPrecision):
    exact, quantised = load(base, "none"), load(base, precision)
    kept, shrunk = [], []
    for name, layer in exact.named_modules():
        if isinstance(layer, nn.Linear):
            twin = quantised.get_submodule(name)
            (kept if type(twin) is nn.Linear else shrunk).append(name)
            if name not in kept:
                assert num_bytes(twin) < BOUNDS[precision].share * layer.weight.nbytes, name
            else:
                assert torch.equal(twin.weight, layer.weight)
    assert all(name.startswith(SENSITIVE) for name in kept)
    assert {name.split(".")[0] for name in kept} == set(SENSITIVE)
    assert shrunk
    assert all(name.startswith("transformer_blocks.") for name in shrunk)


def test_two_steps_with_gradient_checkpointing_lower_the_loss(base: Path, precision: BaseModelPrecision):
    transformer = load(base, precision)
    lora = with_adapter(transformer)
    transformer.enable_gradient_checkpointing(partial(checkpoint, use_reentrant=False, preserve_rng_state=False))
    optimizer = torch.optim.AdamW(lora.values(), lr=1e-3)
    losses = []
    for _ in range(3):
        loss = (predict(transformer) - task()[-1]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > losses[1] > losses[2]


def test_gradient_checkpointing_changes_no_gradient(base: Path, precision: BaseModelPrecision):
    found = []
    for recompute in (False, True):
        transformer = load(base, precision)
        lora = with_adapter(transformer)
        if recompute:
            transformer.enable_gradient_checkpointing(partial(checkpoint, use_reentrant=False))
        found.append(gradients(transformer, lora))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_backward_pass_uses_the_weights_of_the_forward_pass(precision: BaseModelPrecision, dtype: torch.dtype):
    layer = quantised_layer(precision, 384, 256, "cpu", dtype)
    forward, backward = weights_of_both_passes(layer, dtype)
    assert torch.equal(forward, layer.dequantised(dtype))
    assert torch.equal(backward, forward)


@pytest.mark.parametrize(("columns", "rows"), [(96, 10), (32, 64), (160, 40), (200, 37), (24, 3)])
def test_blocks_of_nf4_may_begin_within_a_row(columns: int, rows: int):
    """bitsandbytes' code for CPUs with AVX-512 takes wrong scales there."""
    layer = quantised_layer("nf4-bnb", columns, rows, "cpu")
    codes, absmax, quant_map, nested_absmax, nested_map, offset = layer.quantised.tensors.values()
    scales = nested_map[absmax.int()] * nested_absmax.repeat_interleave(256)[: len(absmax)] + offset
    values = quant_map[torch.stack([codes >> 4, codes & 15], dim=-1).flatten().int()]
    wanted = values * scales.repeat_interleave(64)[: len(values)]
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(layer.dequantised(dtype), wanted.view(rows, columns).to(dtype))


@pytest.mark.parametrize(("columns", "rows"), [(160, 40), (24, 3), (128, 8)])
def test_files_in_nf4_are_read_alike(columns: int, rows: int) -> None:
    """Their blocks, too, may begin within a row."""
    layer, (codes, state) = quantised_layer("nf4-bnb", columns, rows, "cpu"), nf4_of_a_file(columns, rows)
    read = StoredWeight(codes, nf4=state).dequantise(torch.bfloat16)
    assert torch.equal(read, layer.dequantised(torch.bfloat16))


def nf4_of_a_file(columns: int, rows: int) -> tuple[torch.Tensor, dict[str, Any]]:
    """The weight of `quantised_layer` as bitsandbytes stores it."""
    weight = torch.randn(rows, columns, generator=stream(0, "both passes")) / columns**0.5
    codes, state = quantize_4bit(weight.bfloat16(), quant_type="nf4", compress_statistics=True)
    return codes, state.as_dict(packed=True)


@pytest.mark.parametrize(("precision", "bits"), [("int4-quanto", 4), ("int2-quanto", 2)])
def test_packed_codes_are_quantos_plain_ones_on_every_device(
    monkeypatch: pytest.MonkeyPatch, precision: BaseModelPrecision, bits: int
):
    """At Qwen-Image's width quanto would repack 4-bit codes for a GPU's kernels, whose layout no other device reads."""
    from optimum.quanto import WeightQBitsTensor, qtypes
    from optimum.quanto.tensor.packed import PackedTensor

    def repack(*_: object) -> None:
        raise AssertionError("repacked for a device")

    monkeypatch.setattr(WeightQBitsTensor, "create", repack)  # chooses the layout by device and width
    layer = quantised_layer(precision, 3072, 256, "cpu")
    assert layer.format == Packed(256, 3072, bits, 128)
    packed, scale, shift = (layer.quantised.tensors[name] for name in ("codes", "scale", "shift"))
    codes = torch.cat([packed >> bits * number & 2**bits - 1 for number in range(8 // bits)])
    assert torch.equal(PackedTensor.pack(codes, bits)._data, packed)
    plain = WeightQBitsTensor(qtypes[f"qint{bits}"], 0, 128, (256, 3072), (3072, 1), codes, scale, shift)
    plain._data = codes  # unpacked, or quanto would first compile its C++ kernel for a minute
    assert (layer.dequantised(torch.float32) - plain.dequantize().float()).abs().max() < 1e-3
