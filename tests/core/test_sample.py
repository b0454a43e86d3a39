"""Sampling: bad requests fail before a network is loaded; pictures have the requested size and are reproducible."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.support.narrow import picture
from trainer_core import sample as sample_module
from trainer_core.config import ModelConfig, ValidationConfig
from trainer_core.errors import ConfigError, Interrupted, JobError
from trainer_core.events import SilentObserver, Stop
from trainer_core.geometry import Size
from trainer_core.sample import SampleRequest, check_sample, sample_edit


def request(model: ModelConfig, **changes: Any) -> SampleRequest:
    values = {"references": (picture(0, (128, 64)),), "prompt": "a negative", "resolution": 64, **changes}
    sampling = ValidationConfig(validation_num_inference_steps=2, validation_guidance=1.0)
    return SampleRequest(model=model, sampling=sampling, **values)


@pytest.mark.parametrize(
    ("flavour", "changes", "words"),
    [
        ("edit-v1", {"references": ()}, "0 reference"),
        ("edit-v1", {"references": (picture(0), picture(1))}, "2 reference"),
        ("edit-v2", {"references": (picture(0),) * 4}, "4 reference"),
        ("edit-v1", {"size": Size(96, 100)}, "96 x 100"),
        ("edit-v1", {"size": Size(0, 96)}, "0 x 96"),
        ("edit-v2", {"references": (picture(0), picture(1, (1, 33)))}, "picture 2 is 1 x 33. The long side may"),
    ],
)
def test_what_can_not_be_drawn_is_refused_at_once(
    flavour: str, changes: dict[str, Any], words: str, model: ModelConfig
) -> None:
    with pytest.raises(ConfigError, match=words):
        sample_edit(request(dataclasses.replace(model, flavour=flavour), **changes))


def test_all_problems_are_in_one_report(model: ModelConfig, tmp_path: Path) -> None:
    """Of the request, the LoRA, both prompts and each part of the model, before a network is loaded."""
    base = tmp_path / "model"
    shutil.copytree(model.base, base)
    (base / "scheduler").mkdir(exist_ok=True)
    (base / "scheduler" / "scheduler_config.json").write_text("[")
    (base / "vae" / "config.json").write_text("{}")
    lora = tmp_path / "lora.safetensors"
    lora.write_bytes(b"")
    wrong = {"references": (), "prompt": "x" * 20_001, "negative_prompt": "a\ud800", "lora_file": lora}
    for call in (sample_edit, check_sample):
        with pytest.raises(JobError) as caught:
            call(request(dataclasses.replace(model, base=str(base)), **wrong))
        words = ("0 reference", "The VAE", "scheduler_config.json", "lora.safetensors", "prompt", "negative_prompt")
        found = [str(error) for error in caught.value.errors]
        assert len(found) == len(words)
        assert all(word in text for word, text in zip(words, found, strict=True)), found


class Watching(SilentObserver):
    """Records sampling progress as (done, total). Requests `stop` from the start."""

    def __init__(self, stop: Stop = Stop.NO) -> None:
        self.stop = stop
        self.seen: list[tuple[int, int]] = []

    def on_progress(self, phase: str, done: int, total: int) -> None:
        if phase == "Sampling":
            self.seen.append((done, total))

    def should_stop(self) -> Stop:
        return self.stop


@pytest.mark.slow
def test_a_picture_has_the_asked_size_and_repeats_with_its_seed(model: ModelConfig) -> None:
    observer = Watching()
    first = sample_edit(request(model), observer)
    assert observer.seen[-1] == (2, 2)
    assert first.size == (96, 32), "must have the first reference's aspect ratio, in multiples of 32"
    assert sample_edit(request(model, size=Size(*first.size))).tobytes() == first.tobytes()
    assert sample_edit(request(model, seed=1, size=Size(48, 64))).size == (48, 64)


def test_a_stop_is_obeyed_before_the_next_network_is_loaded(
    model: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sample_module, "load_text_encoder", lambda *_, **__: pytest.fail("it was loaded"))
    with pytest.raises(Interrupted):
        sample_edit(request(model), Watching(Stop.PAUSE))
