"""The cache of quantised weights: the next load reads the same bits, and the folder stays within its size limit."""

from __future__ import annotations

import dataclasses
import errno
import logging
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import QwenImageTransformer2DModel
from torch import Tensor, nn

from tests.support import layouts
from tests.support.narrow import NARROW
from trainer_core.config import BaseModelPrecision, ModelConfig
from trainer_core.errors import ConfigError, Interrupted
from trainer_core.events import SilentObserver, Stop
from trainer_core.precision import materialise, quantised_cache
from trainer_core.precision.formats import format_of
from trainer_core.precision.frozen_linear import FrozenLinear
from trainer_core.precision.materialise import Placement
from trainer_core.qwen_image.base_model import BaseModel
from trainer_core.qwen_image.quantised_entry import quantised_entry
from trainer_core.qwen_image.transformer import load_transformer, predict_velocity
from trainer_core.qwen_image.types import Condition
from trainer_core.rng import stream
from trainer_core.weights.source import open_weights

CPU = torch.device("cpu")


def make_folder(folder: Path, seed: int = 0) -> Path:
    """A narrow transformer with torch's initial weights, in a base model's folder."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        QwenImageTransformer2DModel(**NARROW).save_pretrained(folder / "transformer")
    for part in ("vae", "text_encoder"):
        (folder / part).mkdir()
        (folder / part / "config.json").write_text("{}")
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("base"))


def config_of(base: Path, kept: Path, precision: BaseModelPrecision = "int8-quanto", **changes: object) -> ModelConfig:
    """A model with a quantised cache of up to 1 GB in `kept`."""
    settings = {"mixed_precision": "no", "device": "cpu", "quantised_cache_gb": 1.0, **changes}
    return ModelConfig(base=str(base), base_model_precision=precision, quantised_cache_dir=str(kept), **settings)


def load(config: ModelConfig) -> nn.Module:
    return load_transformer(BaseModel(config), CPU)


@torch.no_grad()
def velocity(network: nn.Module) -> Tensor:
    """The velocity for inputs that are always the same."""
    draws = stream(0, "kept")
    latents, reference = (torch.randn(1, 16, 8, 12, generator=draws) for _ in range(2))
    prompt = torch.randn(1, 20, 128, generator=draws)
    return predict_velocity(network, latents, torch.tensor([0.6]), Condition((reference,), prompt))  # type: ignore[arg-type]


def entries(kept: Path) -> set[str]:
    """The names of the cache's entries."""
    return {path.name for path in kept.iterdir()} if kept.is_dir() else set()


@pytest.fixture
def no_converter(monkeypatch: pytest.MonkeyPatch):
    """A function that makes all later quantising fail."""

    def forbidden(*_: object) -> nn.Module:
        raise AssertionError("quantised again")

    return lambda: monkeypatch.setattr(materialise, "converter", lambda _precision: forbidden)


@pytest.mark.parametrize(
    ("precision", "arithmetic"),
    [
        ("int8-quanto", "no"),
        ("fp8-quanto", "bf16"),
        ("int4-quanto", "no"),
        ("int4-quanto", "bf16"),
        ("int2-quanto", "bf16"),
        ("nf4-bnb", "bf16"),
    ],
)
def test_the_second_start_reads_the_same_bits(
    base: Path, tmp_path: Path, precision: BaseModelPrecision, arithmetic: str, no_converter
) -> None:
    config = config_of(base, tmp_path, precision, mixed_precision=arithmetic)
    plain = load(dataclasses.replace(config, quantised_cache_gb=0.0))
    assert not entries(tmp_path)
    first = load(config)
    assert len(entries(tmp_path)) == 1
    no_converter()
    second = load(config)
    wanted = velocity(plain)
    assert torch.equal(velocity(first), wanted) and torch.equal(velocity(second), wanted)
    compared = 0
    for (name, one), (other, two) in zip(first.named_modules(), second.named_modules(), strict=True):
        assert (name, type(one)) == (other, type(two))
        if isinstance(one, FrozenLinear) and isinstance(two, FrozenLinear):
            compared += 1
            written, again = one.quantised, two.quantised
            assert written.format == again.format
            assert all(torch.equal(written.tensors[key], again.tensors[key]) for key in written.tensors), name
    assert compared > 20
    assert not any(parameter.requires_grad for parameter in second.parameters())


def test_whatever_decides_the_codes_makes_another_entry(base: Path, tmp_path: Path) -> None:
    config, kept = config_of(base, tmp_path / "kept"), tmp_path / "kept"
    load(config)
    for other in (
        dataclasses.replace(config, base_model_precision="fp8-quanto"),
        dataclasses.replace(config, mixed_precision="bf16"),
        dataclasses.replace(config, base=str(make_folder(tmp_path / "other", seed=1))),
    ):
        before = entries(kept)
        load(other)
        assert len(entries(kept)) == len(before) + 1
    load(dataclasses.replace(config, quantize_activations=True))
    load(dataclasses.replace(config, base_model_precision="none"))
    assert len(entries(kept)) == 4


@pytest.mark.parametrize(
    ("precision", "layout", "device", "depends"),
    [
        ("nf4-bnb", layouts.bf16, "cuda", True),
        ("nf4-bnb", layouts.bf16, "cpu", False),
        ("int8-quanto", layouts.rotated_int8, "cuda", True),
        ("int8-quanto", layouts.rotated_int8, "cpu", False),
        ("int8-quanto", layouts.int8, "cuda", False),
        ("fp8-quanto", layouts.entry_fp8, "cuda", False),
        ("int4-quanto", layouts.bf16, "cuda", False),
        ("int2-quanto", layouts.parts, "cuda", False),
    ],
)
def test_the_card_is_in_the_key_where_the_codes_depend_on_it(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    precision: BaseModelPrecision,
    layout: Any,
    device: str,
    depends: bool,
) -> None:
    weights = layouts.random_weights({**NARROW, "num_layers": 1, "attention_head_dim": 128, "num_attention_heads": 2})
    place = layout(weights, tmp_path / "model.safetensors")
    there = torch.device(device)
    placement = Placement(precision=precision, dtype=torch.bfloat16, device=there, quantise_on=there)
    keys = set()
    for capability in ((8, 6), (9, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, found=capability: found)
        entry = quantised_entry(config_of(place, tmp_path, precision), open_weights(place), placement)
        assert entry is not None
        keys.add(entry.key)
    assert len(keys) == (2 if depends else 1)


def test_an_entry_that_is_not_whole_is_made_again(base: Path, tmp_path: Path, no_converter) -> None:
    config = config_of(base, tmp_path)
    wanted = velocity(load(config))
    (entry,) = tmp_path.iterdir()
    block = max(entry.glob("*.safetensors"), key=lambda path: path.stat().st_size)
    block.write_bytes(block.read_bytes()[:-1000])
    assert torch.equal(velocity(load(config)), wanted)
    assert entries(tmp_path) == {entry.name}
    no_converter()
    assert torch.equal(velocity(load(config)), wanted)


def test_a_stop_leaves_nothing_behind(base: Path, tmp_path: Path) -> None:
    class Stopper(SilentObserver):
        asked = 0

        def should_stop(self) -> Stop:
            self.asked += 1
            return Stop.PAUSE if self.asked > 2 else Stop.NO

    with pytest.raises(Interrupted):
        load_transformer(BaseModel(config_of(base, tmp_path)), CPU, Stopper())
    assert not entries(tmp_path)


def test_those_unused_longest_make_room(base: Path, tmp_path: Path) -> None:
    config = config_of(base, tmp_path)
    load(config)
    (first,) = entries(tmp_path)
    size = sum(path.stat().st_size for path in (tmp_path / first).iterdir())
    load(dataclasses.replace(config, base_model_precision="fp8-quanto"))
    (second,) = entries(tmp_path) - {first}
    for name, age in ((first, 200), (second, 100)):
        path = tmp_path / name / "entry.json"
        os.utime(path, (path.stat().st_atime, path.stat().st_mtime - age))
    load(config)  # uses the first entry, so that the second is now the older one
    left_over = tmp_path / ".abc.1.ff.tmp"
    left_over.mkdir()
    os.utime(left_over, (0, 0))
    limit = 2.5 * size / 1e9
    load(dataclasses.replace(config, base_model_precision="int4-quanto", quantised_cache_gb=limit))
    assert first in entries(tmp_path) and second not in entries(tmp_path) and len(entries(tmp_path)) == 2


def test_what_can_not_be_kept_does_not_keep_from_loading(
    base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = config_of(base, tmp_path / "kept")
    wanted = velocity(load(dataclasses.replace(config, quantised_cache_gb=0.0)))
    with caplog.at_level(logging.WARNING):
        assert torch.equal(velocity(load(dataclasses.replace(config, quantised_cache_gb=1e-6))), wanted)
    assert "more than quantised_cache_gb" in caplog.text and not entries(tmp_path / "kept")
    (tmp_path / "a file").write_text("")
    blocked = dataclasses.replace(config, quantised_cache_dir=str(tmp_path / "a file" / "kept"))
    with caplog.at_level(logging.WARNING):
        assert torch.equal(velocity(load(blocked)), wanted)
    assert "can't be written" in caplog.text
    with pytest.raises(ConfigError, match="quantised_cache_dir is empty"):
        load(dataclasses.replace(config, quantised_cache_dir=""))


def test_a_complete_cache_serves_from_a_read_only_disk(
    base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, no_converter
) -> None:
    config = config_of(base, tmp_path)
    wanted = velocity(load(config))
    no_converter()

    def refuse(path: Path, *_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    monkeypatch.setattr(quantised_cache.os, "utime", refuse)
    assert torch.equal(velocity(load(config)), wanted)
    assert caplog.text == ""


@pytest.mark.parametrize("precision", ["none", "int8-quanto", "int4-quanto", "nf4-bnb"])
def test_a_block_lies_in_one_piece_of_memory(base: Path, tmp_path: Path, precision: BaseModelPrecision) -> None:
    network = load(config_of(base, tmp_path, precision, quantised_cache_gb=0.0))
    block = network.transformer_blocks[0]  # type: ignore[index]
    held = [*block.parameters(), *block.buffers()]
    assert sum(each.nbytes for each in held) > 10_000
    assert len({each.untyped_storage().data_ptr() for each in held}) == 1


def test_the_notes_hold_no_code(base: Path, tmp_path: Path) -> None:
    load(config_of(base, tmp_path, "int4-quanto"))
    (entry,) = tmp_path.iterdir()
    path = max(entry.glob("*.safetensors"), key=lambda each: each.stat().st_size)
    note = next(iter(quantised_cache._read(path, CPU).values())).note
    with pytest.raises(KeyError):
        format_of({**note, "kind": "Popen"})


# 8-bit activations


@pytest.mark.parametrize(("precision", "most"), [("int8-quanto", 2e-2), ("fp8-quanto", 8e-2)])
def test_quantised_activations_are_near_and_pass_the_gradient(
    base: Path, tmp_path: Path, precision: BaseModelPrecision, most: float
) -> None:
    config = config_of(base, tmp_path, precision, quantised_cache_gb=0.0)
    plain, rounded = load(config), load(dataclasses.replace(config, quantize_activations=True))
    error = float((velocity(rounded) - velocity(plain)).norm() / velocity(plain).norm())
    assert 1e-4 < error < most
    layers = [
        (one, two) for one, two in zip(plain.modules(), rounded.modules(), strict=True) if isinstance(two, FrozenLinear)
    ]
    assert len(layers) > 20 and all(two.rounds_input for _, two in layers)
    one, two = layers[0]
    x = torch.randn(2, 5, one.in_features, generator=stream(0, "x")) * torch.tensor([[[1.0]], [[1000.0]]])
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    outputs = [layer(each) for layer, each in zip((one, two), inputs, strict=True)]
    for output in outputs:
        output.square().sum().backward()
    assert not torch.equal(*outputs) and torch.allclose(*outputs, rtol=0.1, atol=0.1 * float(outputs[0].abs().max()))
    plain_gradient, gradient = (each.grad for each in inputs)
    assert plain_gradient is not None and gradient is not None
    assert torch.cosine_similarity(plain_gradient.flatten(), gradient.flatten(), dim=0) > 0.99


def test_a_token_does_not_change_the_rounding_of_another() -> None:
    from trainer_core.precision.frozen_linear import rounded_tokens

    x = torch.randn(3, 16, generator=stream(0, "tokens"))
    loud = torch.cat([x[:1], x[1:] * 1e4])
    for dtype, most in ((torch.int8, 1 / 254), (torch.float8_e4m3fn, 1 / 16)):
        assert torch.equal(rounded_tokens(x, dtype)[0], rounded_tokens(loud, dtype)[0])
        assert float((rounded_tokens(x, dtype) - x).abs().max() / x.abs().max()) <= most + 1e-6


def test_a_token_of_zeros_stays_zero_on_devices_without_denormal_numbers() -> None:
    from trainer_core.precision.frozen_linear import rounded_tokens

    zeros = torch.zeros(2, 64)
    torch.set_flush_denormal(True)
    try:
        found = [rounded_tokens(zeros, dtype) for dtype in (torch.int8, torch.float8_e4m3fn)]
    finally:
        torch.set_flush_denormal(False)
    assert all(torch.equal(each, zeros) for each in found)


@pytest.mark.parametrize("precision", ["none", "no_change", "nf4-bnb", "int4-quanto", "int2-quanto", "file"])
def test_quantised_activations_need_eight_bits(precision: BaseModelPrecision) -> None:
    with pytest.raises(ConfigError, match=r"base_model_precision must be int8-quanto or fp8-quanto"):
        ModelConfig(base_model_precision=precision, quantize_activations=True)


@pytest.mark.parametrize("place", [100, -100])
def test_a_damaged_block_is_quantised_again(
    base: Path, tmp_path: Path, place: int, caplog: pytest.LogCaptureFixture, no_converter
) -> None:
    """One flipped bit of the header or the codes: the same weights, a warning, and a rebuilt entry."""
    config = config_of(base, tmp_path)
    wanted = velocity(load(config))
    (entry,) = tmp_path.iterdir()
    block = max(entry.glob("*.safetensors"), key=lambda path: path.stat().st_size)
    data = bytearray(block.read_bytes())
    data[place] ^= 1
    block.write_bytes(data)
    assert torch.equal(velocity(load(config)), wanted)
    assert str(block) in caplog.text and "damaged" in caplog.text and "not cached" not in caplog.text
    assert torch.equal(velocity(load(config)), wanted)
    no_converter()
    assert torch.equal(velocity(load(config)), wanted)
