"""Answers of the text encoder with its language head equal those of transformers' own `generate` on the same files."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import Qwen2_5_VLForConditionalGeneration

from tests.support.narrow import picture
from tests.support.writers import make_writing_base
from trainer_core.conditioning.pictures import to_tensor
from trainer_core.config import BaseModelPrecision, ModelConfig
from trainer_core.errors import Interrupted, ModelFileError
from trainer_core.events import SILENT, SilentObserver, Stop
from trainer_core.qwen_image import text_encoder, text_encoder_file, writer
from trainer_core.qwen_image.base_model import BaseModel
from trainer_core.qwen_image.text_encoder_file import load_by_layers
from trainer_core.qwen_image.text_encoder_size import text_encoder_size
from trainer_core.qwen_image.vision_attention import attend_in_batches

CPU = torch.device("cpu")
PICTURES = [
    to_tensor(picture(seed, size)) for seed, size in ((1, (140, 112)), (2, (140, 112)), (3, (56, 168)), (4, (84, 84)))
]
QUESTION = "What was changed?"


@pytest.fixture(scope="module")
def base(model: ModelConfig, tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    return make_writing_base(tmp_path_factory.mktemp("writing") / "base", model)


def theirs(base: ModelConfig, dtype: torch.dtype = torch.float32) -> Any:
    """What transformers itself loads from the folder."""
    folder = Path(base.base) / "text_encoder"
    return Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=dtype).eval()


def generated(network: Any, inputs: dict[str, torch.Tensor], **settings: Any) -> list[int]:
    found = network.generate(**inputs, do_sample=False, **{"max_new_tokens": 24, **settings})
    return found[0, inputs["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize("count", [2, 3, 4])
def test_the_same_tokens_as_transformers(base: ModelConfig, count: int) -> None:
    ours, plain = writer.load_writer(BaseModel(base), CPU), theirs(base)
    inputs = ours.inputs(QUESTION, PICTURES[:count])
    wanted = generated(plain, inputs)
    assert ours.token_ids(QUESTION, PICTURES[:count], 24) == wanted
    assert len(set(wanted)) > 8
    words = ours.tokenizer.decode(wanted).strip()
    assert ours.answer(QUESTION, PICTURES[:count], 24) == writer.Answer(words, is_whole=False)
    if "mm_token_type_ids" in inputs:  # the rotary positions matter: without them transformers answers otherwise
        del inputs["mm_token_type_ids"]
        assert generated(plain, inputs) != wanted


def test_the_same_tokens_in_bf16(base: ModelConfig) -> None:
    """With the vision tower's attention as ours, whose sums are in another order: in bf16 that may change a token."""
    loaded = load_by_layers(base, Path(base.base) / "text_encoder", torch.bfloat16, CPU, SILENT, with_head=True)
    plain = theirs(base, torch.bfloat16)
    for network in (loaded, plain):
        attend_in_batches(network.model.visual)
    ours = writer.Writer(loaded, writer.load_writer(BaseModel(base), CPU).tokenizer)
    inputs = ours.inputs(QUESTION, PICTURES)
    assert inputs["pixel_values"].dtype == torch.bfloat16
    assert ours.token_ids(QUESTION, PICTURES, 24) == generated(plain, inputs)


def test_the_pictures_matter(base: ModelConfig) -> None:
    ours = writer.load_writer(BaseModel(base), CPU)
    answers = {tuple(ours.token_ids(QUESTION, order, 8)) for order in (PICTURES[:2], PICTURES[1::-1], PICTURES[1:3])}
    assert len(answers) == 3
    assert ours.token_ids(QUESTION, PICTURES[:2], 8) in [list(each) for each in answers], "no state of the last call"


def test_the_end_of_the_turn_ends_an_answer(base: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = writer.load_writer(BaseModel(base), CPU)
    whole = ours.token_ids(QUESTION, PICTURES[:2], 24)
    monkeypatch.setattr(writer, "END_OF_TURN", whole[5])
    end = whole.index(whole[5]) + 1
    assert ours.token_ids(QUESTION, PICTURES[:2], 24) == whole[:end]
    assert ours.answer(QUESTION, PICTURES[:2], 24).is_whole and ours.answer(QUESTION, PICTURES[:2], end).is_whole
    assert not ours.answer(QUESTION, PICTURES[:2], end - 1).is_whole


def test_the_inputs_are_those_of_transformers_processor(base: ModelConfig) -> None:
    """Qwen's own chat template with numbered pictures, and its processor. The sizes are whole tokens already."""
    from transformers import Qwen2_5_VLProcessor, Qwen2VLImageProcessor
    from transformers.video_processing_utils import BaseVideoProcessor

    ours = writer.load_writer(BaseModel(base), CPU)
    processor = Qwen2_5_VLProcessor(Qwen2VLImageProcessor(), ours.tokenizer, BaseVideoProcessor())
    pictures = [picture(seed, size) for seed, size in ((1, (140, 112)), (2, (84, 168)))]
    marked = "".join(f"Picture {number}: <|vision_start|><|image_pad|><|vision_end|>" for number in (1, 2))
    text = (
        f"<|im_start|>system\n{writer._SYSTEM}<|im_end|>\n<|im_start|>user\n{marked}{QUESTION}<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    wanted = processor(text=[text], images=pictures, return_tensors="pt")
    found = ours.inputs(QUESTION, [to_tensor(each) for each in pictures])
    assert set(found) <= {*wanted, "mm_token_type_ids"}
    for name in set(found) - {"pixel_values"}:
        assert torch.equal(found[name].long(), wanted[name].long()), name
    assert (found["pixel_values"] - wanted["pixel_values"]).abs().max() < 1e-5


@pytest.mark.parametrize("precision", ["none", "int8-quanto", "nf4-bnb"])
def test_streamed_layers_and_embeddings_in_host_memory_change_no_token(
    base: ModelConfig, precision: BaseModelPrecision, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = BaseModel(dataclasses.replace(base, text_encoder_precision=precision))
    wanted = writer.load_writer(chosen, CPU).token_ids(QUESTION, PICTURES, 12)
    monkeypatch.setattr(text_encoder, "_streamed_layers", lambda *_, **__: (0, 1))
    loaded = writer.load_writer(chosen, CPU)
    assert loaded.token_ids(QUESTION, PICTURES, 12) == wanted
    assert type(loaded.network.lm_head) is torch.nn.Linear, "the head is not quantised"


def test_a_comfyui_file_gives_the_same_tokens(
    base: ModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """bf16 and scaled fp8, as ComfyUI's files have them: older names, and a head that is not quantised."""
    narrow = json.loads((Path(base.base) / "text_encoder" / "config.json").read_text())
    monkeypatch.setattr(text_encoder_file, "qwen25_vl_7b", lambda: narrow)
    stored = {
        name.replace("model.language_model.", "model.").replace("model.visual.", "visual."): each
        for name, each in theirs(base, torch.bfloat16).state_dict().items()
    }
    save_file(stored, tmp_path / "bf16.safetensors")
    quantised: dict[str, torch.Tensor] = {"scaled_fp8": torch.empty(2, dtype=torch.float8_e4m3fn)}
    rounded = dict(stored)
    for name, each in stored.items():
        quantised[name] = each
        if each.ndim == 2 and "embed_tokens" not in name and "lm_head" not in name:
            scale = each.float().abs().max() / 448
            quantised[name] = (each.float() / scale).to(torch.float8_e4m3fn)
            quantised[f"{name.removesuffix('.weight')}.scale_weight"] = scale
            rounded[name] = quantised[name].float() * scale
    save_file(quantised, tmp_path / "fp8.safetensors")
    wanted = writer.load_writer(BaseModel(base), CPU)
    for file, weights in (("bf16", stored), ("fp8", rounded)):
        config = dataclasses.replace(base, text_encoder_file=str(tmp_path / f"{file}.safetensors"))
        writer.check_writer(BaseModel(config))
        plain = theirs(base)
        renamed = {text_encoder_file._in_transformers(name): each.float() for name, each in weights.items()}
        plain.load_state_dict(renamed)
        found = writer.load_writer(BaseModel(config), CPU).token_ids(QUESTION, PICTURES, 12)
        assert found == generated(plain, wanted.inputs(QUESTION, PICTURES), max_new_tokens=12)
    del stored["lm_head.weight"]
    save_file(stored, tmp_path / "headless.safetensors")
    headless = BaseModel(dataclasses.replace(base, text_encoder_file=str(tmp_path / "headless.safetensors")))
    text_encoder.check_text_encoder(headless, "comfyui")
    with pytest.raises(ModelFileError, match="can't write captions, because it has no language head"):
        writer.check_writer(headless)


def test_the_size_counts_the_head(base: ModelConfig) -> None:
    without, with_head = (text_encoder_size(BaseModel(base), 2, "nf4-bnb", with_head=each) for each in (False, True))
    assert with_head.others - without.others == 2 * 152064 * 128
    assert with_head.device_bytes(0) - without.device_bytes(0) == 2 * 152064 * 128


def test_a_stop_is_heard_between_layers(base: ModelConfig) -> None:
    class Asked(SilentObserver):
        limit, times = 10**9, 0

        def should_stop(self) -> Stop:
            self.times += 1
            return Stop.PAUSE if self.times > self.limit else Stop.NO

    observer = Asked()
    ours = writer.load_writer(BaseModel(base), CPU, observer)
    before = observer.times
    ours.token_ids(QUESTION, PICTURES[:2], 4)
    assert observer.times - before == 2 + 2 * 4, "each block of the vision tower, each layer for each token"
    observer.limit = observer.times + 5
    with pytest.raises(Interrupted):
        ours.token_ids(QUESTION, PICTURES[:2], 4)
    observer.limit = 10**9
    assert len(ours.token_ids(QUESTION, PICTURES[:2], 4)) == 4
