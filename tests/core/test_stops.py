"""A stop is heard between the layers of a network, so a long prompt or a large picture on the CPU does not delay it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.support.narrow import make_pairs, picture, small_encoding
from trainer_core.conditioning.encode import plan_dataset
from trainer_core.conditioning.encoded import EncodedDataset
from trainer_core.conditioning.pictures import to_tensor
from trainer_core.config import ModelConfig, NoiseConfig, PairCheckConfig
from trainer_core.data.graph_pairs import pair_pictures
from trainer_core.data.pair_check import check_pairs
from trainer_core.data.pairing import pair_folders
from trainer_core.errors import Interrupted
from trainer_core.events import Observer, SilentObserver, Stop
from trainer_core.pictures.check_report import check_sheet
from trainer_core.pictures.contact_sheet import contact_sheet
from trainer_core.qwen_image.base_model import BaseModel
from trainer_core.qwen_image.text_encoder import load_text_encoder
from trainer_core.qwen_image.transformer import load_transformer
from trainer_core.qwen_image.vae import decode_latents, encode_picture, load_vae
from trainer_core.training.edit_weight import edit_weight_preview

CPU = torch.device("cpu")


class Asked(SilentObserver):
    """Counts how often it is asked, and stops from the `limit`-th time on."""

    def __init__(self) -> None:
        self.times, self.limit = 0, 10**9

    def should_stop(self) -> Stop:
        self.times += 1
        return Stop.PAUSE if self.times >= self.limit else Stop.NO


def ran(layers: list[nn.Module]) -> list[int]:
    """A list that grows by a layer's number each time the layer has run."""
    found: list[int] = []
    for number, layer in enumerate(layers):
        layer.register_forward_hook(lambda *_, number=number: found.append(number))
    return found


def stops_before_each(observer: Asked, layers: list[nn.Module], call: Callable[[], object]) -> None:
    """Asserts that `call` asks before each layer, and that no layer runs after a stop."""
    found = ran(layers)
    observer.times, observer.limit = 0, 10**9
    call()
    assert found == list(range(len(layers)))
    assert observer.times >= len(layers) >= 2
    for wanted in range(len(layers)):
        found.clear()
        observer.times, observer.limit = 0, wanted + 1
        with pytest.raises(Interrupted):
            call()
        assert found == list(range(wanted))


@pytest.mark.parametrize("preprocessing", ["comfyui", "diffusers"])
def test_the_language_model_stops_between_layers(preprocessing: str, model: ModelConfig):
    observer = Asked()
    encoder = load_text_encoder(BaseModel(model), preprocessing, CPU, observer)  # type: ignore[arg-type]
    layers = list(encoder.network.model.language_model.layers)
    stops_before_each(observer, layers, lambda: encoder.encode_seen("Turn it red.", []))


def test_the_vision_tower_stops_between_layers(model: ModelConfig):
    observer = Asked()
    encoder = load_text_encoder(BaseModel(model), "comfyui", CPU, observer)
    pixels = to_tensor(picture(0))
    stops_before_each(observer, list(encoder.network.model.visual.blocks), lambda: encoder.see(pixels))


def test_the_vae_stops_between_convolutions(model: ModelConfig):
    observer = Asked()
    vae = load_vae(BaseModel(model), CPU, observer)
    pixels = to_tensor(picture(0))
    observer.times = 0
    latents = encode_picture(vae, pixels)
    asked = observer.times
    assert asked > 10
    decode_latents(vae, latents)
    assert observer.times > asked + 10
    for limit in (1, asked // 2, asked):
        observer.times, observer.limit = 0, limit
        with pytest.raises(Interrupted):
            encode_picture(vae, pixels)
        assert observer.times == limit


def test_stops_do_not_change_results(model: ModelConfig):
    watched, plain = (load_text_encoder(BaseModel(model), "comfyui", CPU, each) for each in (Asked(), SilentObserver()))
    assert torch.equal(watched.encode_seen("Turn it red.", []), plain.encode_seen("Turn it red.", []))


class Stopping(SilentObserver):
    """Wants to stop after `calls` questions."""

    def __init__(self, calls: int = 0) -> None:
        self.left = calls

    def should_stop(self) -> Stop:
        self.left -= 1
        return Stop.NO if self.left >= 0 else Stop.PAUSE


def test_loops_over_files_and_pictures_hear_a_stop(encoded: EncodedDataset, tmp_path: Path):
    """Pairing, contact sheets and the writing of a graph's pictures stop at any item."""
    config = make_pairs(tmp_path / "pairs", 3)
    dataset = pair_folders(config)
    check = check_pairs(dataset, PairCheckConfig())
    pictures = [picture(number) for number in range(3)]
    calls: dict[str, Callable[[Observer], object]] = {
        "pairing": lambda observer: pair_folders(config, observer),
        "contact sheet": lambda observer: contact_sheet(dataset, observer=observer),
        "check": lambda observer: check_sheet(dataset, check, PairCheckConfig(), observer=observer),
        "edit weight": lambda observer: edit_weight_preview(encoded, NoiseConfig(edit_weight=0.5), observer=observer),
        "graph": lambda observer: pair_pictures(pictures, [pictures], ["Red."], tmp_path / "graph", observer=observer),
    }
    for name, call in calls.items():
        for questions in range(3):
            with pytest.raises(Interrupted):
                call(Stopping(questions))
        assert list((tmp_path / "graph").glob("*")) == [], name
        call(Stopping(10_000))


def test_planning_and_loading_hear_a_stop(model: ModelConfig, encoded: EncodedDataset, tmp_path: Path):
    dataset = pair_folders(make_pairs(tmp_path / "pairs", 3))
    for questions in range(3):
        with pytest.raises(Interrupted):
            plan_dataset(dataset, BaseModel(model), small_encoding(), tmp_path / "cache", observer=Stopping(questions))
        with pytest.raises(Interrupted):
            load_transformer(BaseModel(model), CPU, Stopping(questions))
