"""Files that can't be used are refused with a clear message, before weights are read."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import QwenImageTransformer2DModel
from safetensors.torch import save_file

from tests.support.layouts import Weights, as_bytes, gguf, int8_rows, nf4, random_weights
from tests.support.narrow import NARROW
from trainer_core.config import ModelConfig
from trainer_core.errors import Interrupted, ModelFileError
from trainer_core.events import SilentObserver, Stop
from trainer_core.qwen_image import base_model
from trainer_core.qwen_image.base_model import BaseModel, transformer_settings
from trainer_core.qwen_image.folder import model_folder
from trainer_core.qwen_image.text_encoder import load_text_encoder
from trainer_core.qwen_image.transformer import load_transformer
from trainer_core.qwen_image.vae import load_vae

CPU = torch.device("cpu")
LAYER = "transformer_blocks.1.attn.to_q"


@pytest.fixture(autouse=True)
def narrow_heads(monkeypatch: pytest.MonkeyPatch):
    """Allows files of narrow transformers, which are refused otherwise."""
    monkeypatch.setitem(base_model.ROPE_AXES, NARROW["attention_head_dim"], NARROW["axes_dims_rope"])


@pytest.fixture(scope="module")
def weights() -> Weights:
    return random_weights(NARROW)


def config_of(path: Path, **changes: object) -> ModelConfig:
    given = {"tokenizer": "none", "mixed_precision": "no", "device": "cpu", **changes}
    return ModelConfig(transformer_file=str(path), text_encoder_file=str(path), vae_file=str(path), **given)  # type: ignore[arg-type]


def write(path: Path, tensors: Weights) -> Path:
    save_file(tensors, path)
    return path


def complaint(path: Path, **changes: object) -> str:
    with pytest.raises(ModelFileError) as caught:
        load_transformer(BaseModel(config_of(path, **changes)), CPU)
    assert path.name in str(caught.value)
    return str(caught.value)


def test_a_narrow_file_loads(weights: Weights, tmp_path: Path):
    """Otherwise the refusals below would prove nothing. The loaded network also matches diffusers'."""
    network = load_transformer(BaseModel(config_of(write(tmp_path / "a.safetensors", weights))), CPU)
    assert all(torch.equal(each, weights[name].float()) for name, each in network.named_parameters())
    assert not any(each.requires_grad for each in network.parameters())
    assert not any(each.is_meta for each in [*network.parameters(), *network.buffers()])
    theirs = QwenImageTransformer2DModel(**NARROW)
    assert torch.equal(network.pos_embed.pos_freqs, theirs.pos_embed.pos_freqs)
    assert {key: network.config[key] for key in NARROW} == NARROW


def test_another_kind_of_file(tmp_path: Path, weights: Weights):
    lora = {f"transformer.{LAYER}.lora_A.weight": torch.zeros(2, 48)}
    assert "looks like a LoRA" in complaint(write(tmp_path / "lora.safetensors", lora))
    encoder = {"model.layers.0.self_attn.k_proj.bias": torch.zeros(2)}
    assert "looks like a text encoder" in complaint(write(tmp_path / "clip.safetensors", encoder))
    vae = {"decoder.conv1.weight": torch.zeros(2)}
    path = write(tmp_path / "vae.safetensors", vae)
    assert "looks like a VAE" in complaint(path)
    with pytest.raises(ModelFileError, match="not a Qwen-Image VAE"):
        load_vae(BaseModel(config_of(path)), CPU)
    with pytest.raises(ModelFileError, match=r"not a Qwen2\.5-VL.*text_encoders"):
        load_text_encoder(BaseModel(config_of(path)), "comfyui", CPU)
    assert "128" in complaint(write(tmp_path / "w.safetensors", _other_heads(weights)))


def _other_heads(weights: Weights) -> Weights:
    return {**weights, "transformer_blocks.0.attn.norm_added_k.weight": torch.zeros(24)}


def test_not_whole(tmp_path: Path, weights: Weights):
    whole = write(tmp_path / "whole.safetensors", weights).read_bytes()
    length = int.from_bytes(whole[:8], "little")
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 40900000000\n"
    contents = {
        "half": (whole[: len(whole) // 2], f"it has {len(whole) // 2:,} of {len(whole):,} bytes"),
        "half header": (whole[: length // 2], "ends within its header"),
        "longer": (whole + b"x", f"its header describes {len(whole):,}"),
        "flipped": (whole[:20] + b"\0" + whole[21:], "its header is damaged"),
        "page": (b"\n<!DOCTYPE html><html>not found</html>", "it is a web page"),
        "text": (b"Invalid username or password.", "it is a text, 'Invalid username or password.'"),
        "none": (b"", "it is empty"),
        "pointer": (pointer, "git-lfs pointer in place of the 40.9 GB file. Run `git lfs pull`"),
        "pickle": (b"PK\x03\x04" + bytes(99), "can run code"),
        "renamed": (b"GGUF" + bytes(99), "it is a .gguf file"),
        "huge header": (b"\xff" * 8 + b"{}", "not the length of a header"),
    }
    for name, (content, words) in contents.items():
        path = tmp_path / f"{name}.safetensors"
        path.write_bytes(content)
        assert words in complaint(path)
        for place in (load_vae, lambda base, device: load_text_encoder(base, "comfyui", device)):
            with pytest.raises(ModelFileError, match=re.escape(words)):
                place(BaseModel(config_of(path)), CPU)
    for content in (b"GGUF\x03\x00\x00\x00", whole):
        path = tmp_path / "half.gguf"
        path.write_bytes(content)
        assert "Download it again" in complaint(path)
    path = write(tmp_path / "unfinished.safetensors", weights)
    (tmp_path / "unfinished.safetensors.aria2").touch()
    assert "still being downloaded" in complaint(path)


def test_missing_and_misshapen_weights(tmp_path: Path, weights: Weights):
    fewer = {name: each for name, each in weights.items() if not name.startswith(f"{LAYER}.")}
    text = complaint(write(tmp_path / "fewer.safetensors", fewer))
    assert "lacks 2 of" in text
    assert f"{LAYER}.weight" in text
    other = {**weights, f"{LAYER}.weight": torch.zeros(48, 32)}
    assert "[48, 32] instead of [48, 48]" in complaint(write(tmp_path / "other.safetensors", other))


def test_unknown_formats(tmp_path: Path, weights: Weights):
    codes, scale = int8_rows(weights[f"{LAYER}.weight"])
    bare = {**weights, f"{LAYER}.weight": codes}
    assert "without a scale" in complaint(write(tmp_path / "bare.safetensors", bare))
    noted = {**bare, f"{LAYER}.weight_scale": scale}
    nvfp4 = {**noted, f"{LAYER}.comfy_quant": as_bytes({"format": "nvfp4"})}
    assert "ComfyUI's format 'nvfp4'" in complaint(write(tmp_path / "nvfp4.safetensors", nvfp4))
    odd = {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 32}
    rotated = {**noted, f"{LAYER}.comfy_quant": as_bytes(odd)}
    assert "power of four" in complaint(write(tmp_path / "odd.safetensors", rotated))
    blocks = {**noted, f"{LAYER}.weight_scale": torch.ones(3, 3)}
    assert "blocks, with scales of shape [3, 3]" in complaint(write(tmp_path / "blocks.safetensors", blocks))
    garbled = {**noted, f"{LAYER}.comfy_quant": torch.zeros(3, dtype=torch.uint8)}
    assert "is empty" in complaint(write(tmp_path / "garbled.safetensors", garbled))


def test_formats_that_hold_code_and_missing_files(tmp_path: Path):
    path = tmp_path / "model.ckpt"
    path.write_bytes(b"x")
    assert "can run code" in complaint(path)
    with pytest.raises(ModelFileError, match="does not exist"):
        model_folder(config_of(tmp_path / "nowhere.safetensors"))


def test_a_missing_part(tmp_path: Path):
    (tmp_path / "config.json").write_text('{"_class_name": "QwenImageTransformer2DModel"}')
    index = {"weight_map": {"a": "diffusion_pytorch_model-00001-of-00002.safetensors"}}
    (tmp_path / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    assert "lacks 1 of 1 parts" in complaint(tmp_path)


def test_parts_without_their_index(tmp_path: Path, weights: Weights):
    """The names of the parts tell whether all are there. A single part is called that."""
    folder = tmp_path / "transformer"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"_class_name": "QwenImageTransformer2DModel", **NARROW}))
    names = list(weights)
    for number, part in enumerate((names[::3], names[1::3], names[2::3]), 1):
        file = folder / f"diffusion_pytorch_model-{number:05d}-of-00003.safetensors"
        write(file, {name: weights[name] for name in part})
    network = load_transformer(BaseModel(config_of(folder)), CPU)
    assert all(torch.equal(each, weights[name].float()) for name, each in network.named_parameters())
    assert "is part 3 of 3 of a model. Choose the folder" in complaint(file)
    (folder / "diffusion_pytorch_model-00002-of-00003.safetensors").unlink()
    assert "lacks part 2 of 3" in complaint(folder)


def test_single_files_need_each_other_or_a_folder(tmp_path: Path, weights: Weights):
    path = write(tmp_path / "a.safetensors", weights)
    with pytest.raises(ModelFileError, match="vae_file and text_encoder_file are empty"):
        model_folder(ModelConfig(transformer_file=str(path), tokenizer="x"))
    with pytest.raises(ModelFileError, match="without a tokenizer"):
        model_folder(replace(config_of(path), tokenizer=""))


def test_flavour_by_the_marker(tmp_path: Path, weights: Weights):
    marked = write(tmp_path / "2511.safetensors", {**weights, "__index_timestep_zero__": torch.zeros(0)})
    assert transformer_settings(marked)["zero_cond_t"]
    assert "the chosen release is 2509 (edit-v2). Choose 2511 (edit-v3)." in complaint(marked, flavour="edit-v2")
    assert load_transformer(BaseModel(config_of(marked, flavour="edit-v3")), CPU).zero_cond_t
    bare = write(tmp_path / "bare.safetensors", weights)
    assert load_transformer(BaseModel(config_of(bare, flavour="edit-v3")), CPU).zero_cond_t
    assert not load_transformer(BaseModel(config_of(bare, flavour="edit-v2")), CPU).zero_cond_t


PLUS, PLAIN = "QwenImageEditPlusPipeline", "QwenImageEditPipeline"


@pytest.mark.parametrize(
    ("pipeline", "zero_cond_t", "fitting"),
    [
        (PLAIN, False, ["edit-v1"]),
        (PLUS, False, ["edit-v2"]),
        (PLUS, True, ["edit-v3"]),
        ("MyPipeline", False, ["edit-v1", "edit-v2"]),
        (None, False, ["edit-v1", "edit-v2"]),
        (None, True, ["edit-v3"]),
    ],
)
def test_flavour_by_the_download(pipeline: str | None, zero_cond_t: bool, fitting: list[str], tmp_path: Path):
    config = {"_class_name": "QwenImageTransformer2DModel", "zero_cond_t": zero_cond_t}
    for part in ("transformer", "vae", "text_encoder"):
        (tmp_path / part).mkdir()
        (tmp_path / part / "config.json").write_text(json.dumps(config))
        save_file({"x": torch.zeros(1)}, tmp_path / part / "diffusion_pytorch_model.safetensors")
    if pipeline:
        (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": pipeline}))
    model = ModelConfig(base=str(tmp_path))
    for flavour in ("edit-v1", "edit-v2", "edit-v3"):
        if flavour in fitting:
            assert BaseModel(replace(model, flavour=flavour)).network_settings
            continue
        with pytest.raises(ModelFileError, match=f"release is .*{flavour}.*Choose .*{'.* or .*'.join(fitting)}"):
            assert BaseModel(replace(model, flavour=flavour)).network_settings


def test_folders_in_the_place_of_files(base_of: Callable[[str], ModelConfig], tokenizer_dir: Path):
    """ComfyUI's lists offer folders too. The tokenizer comes from elsewhere."""
    base = Path(base_of("edit-v1").base)
    parts = {f"{part}_file": str(base / part) for part in ("transformer", "text_encoder", "vae")}
    config = ModelConfig(**parts, tokenizer=str(tokenizer_dir), mixed_precision="no", device="cpu")
    load_transformer(BaseModel(config), CPU)
    load_vae(BaseModel(config), CPU)
    load_text_encoder(BaseModel(config), "diffusers", CPU)


def test_gguf_is_not_kept_as_it_is(tmp_path: Path, weights: Weights):
    path = gguf(weights, tmp_path / "a.gguf", "F16")
    assert "stores its weights as GGUF" in complaint(path, base_model_precision="file")
    load_transformer(BaseModel(config_of(path)), CPU)


def test_nf4_is_not_kept_as_it_is(tmp_path: Path):
    """The plan would count the bytes of NF4 codes, but bf16 would be loaded."""
    folder = nf4(random_weights({**NARROW, "num_layers": 1}), tmp_path / "transformer")
    (folder / "config.json").write_text(json.dumps({"_class_name": "QwenImageTransformer2DModel", **NARROW}))
    config = replace(config_of(folder), base_model_precision="file")
    for refused in (lambda: load_transformer(BaseModel(config), CPU), lambda: BaseModel(config).network):
        with pytest.raises(ModelFileError, match=r"stores its weights as NF4.*Set base_model_precision to nf4-bnb"):
            refused()


def test_loading_can_be_stopped(tmp_path: Path, weights: Weights):
    class AfterOneBlock(SilentObserver):
        done = 0

        def on_progress(self, phase: str, done: int, total: int) -> None:
            assert phase == "Loading the transformer"
            assert total == NARROW["num_layers"] + 1
            self.done = done

        def should_stop(self) -> Stop:
            return Stop.PAUSE if self.done else Stop.NO

    observer = AfterOneBlock()
    with pytest.raises(Interrupted):
        load_transformer(BaseModel(config_of(write(tmp_path / "a.safetensors", weights))), CPU, observer)
    assert observer.done == 1
