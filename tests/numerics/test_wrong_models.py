"""What can't be trained on is recognised by name from files' headers, before anything is encoded."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLQwenImage
from safetensors.torch import save_file

from tests.support.layouts import Weights, as_bytes, gguf, int8_rows, matrices, random_weights, scaled_fp8
from tests.support.narrow import NARROW
from trainer_core.config import EncodingConfig, LoraConfig, ModelConfig, TrainConfig
from trainer_core.errors import ModelFileError
from trainer_core.planning.preparation import prepare_model
from trainer_core.qwen_image import base_model
from trainer_core.qwen_image.base_model import BaseModel
from trainer_core.qwen_image.text_encoder import check_text_encoder
from trainer_core.qwen_image.text_encoder_file import check_text_encoder_file, qwen25_vl_7b
from trainer_core.qwen_image.vae import check_vae

LAYER = "transformer_blocks.1.attn.to_q"


@pytest.fixture(autouse=True)
def narrow_heads(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(base_model.ROPE_AXES, NARROW["attention_head_dim"], NARROW["axes_dims_rope"])


@pytest.fixture(scope="module")
def weights() -> Weights:
    return random_weights(NARROW)


def config_of(path: Path, **changes: object) -> ModelConfig:
    given = {"tokenizer": "none", "mixed_precision": "no", "device": "cpu", **changes}
    return ModelConfig(transformer_file=str(path), text_encoder_file=str(path), vae_file=str(path), **given)  # type: ignore[arg-type]


def write(path: Path, tensors: Weights, metadata: dict[str, str] | None = None) -> Path:
    save_file(tensors, path, metadata)
    return path


def complaint(path: Path, **changes: object) -> str:
    """The error that `check`, `plan`, `encode` and `train` give for a transformer, and Load Qwen Edit Model Files."""
    base = BaseModel(config_of(path, **changes))
    with pytest.raises(ModelFileError) as caught:
        prepare_model(TrainConfig(run_dir="-", encoded="-", model=base.config, lora=LoraConfig()), base)
    assert path.name in str(caught.value)
    return str(caught.value)


def test_the_narrow_file_is_accepted(weights: Weights, tmp_path: Path):
    base = BaseModel(config_of(write(tmp_path / "a.safetensors", weights)))
    assert prepare_model(TrainConfig(run_dir="-", encoded="-", model=base.config), base).size


def packed(weights: Weights, **parts: tuple[str, ...]) -> Weights:
    """The weights with other tensors in place of each matrix."""
    found = {name: each for name, each in weights.items() if name.removesuffix(".weight") not in matrices(weights)}
    for layer in matrices(weights):
        found |= {f"{layer}{ending}": torch.zeros(4, 4) for ending in parts["endings"]}
    return found


PACKED = {
    "nunchaku's SVDQuant": (".qweight", ".wscales", ".smooth_factor", ".proj_down", ".proj_up"),
    "GPTQ or AWQ": (".qweight", ".qzeros", ".scales"),
    "fp8 with a scale per block": (".weight", ".weight_scale_inv"),
    "NVFP4 with a scale per block": (".weight", ".weight_scale", ".weight_scale_2"),
    "bitsandbytes' int8": (".weight", ".SCB"),
    "quanto's own layout": (".weight._data", ".weight._scale"),
    "SDNQ's layout": (".weight", ".zero_point"),
    "HQQ's layout": (".W_q", ".meta"),
}


@pytest.mark.parametrize("layout", list(PACKED))
def test_layouts_that_cannot_be_trained_on(layout: str, weights: Weights, tmp_path: Path):
    path = write(tmp_path / "a.safetensors", packed(weights, endings=PACKED[layout]))
    text = complaint(path, flavour="edit-v2")
    assert layout in text and "can't be trained on. Choose qwen_image_edit_2509_fp8_e4m3fn.safetensors" in text
    with pytest.raises(ModelFileError, match=r"can't be trained on. Choose qwen_2\.5_vl_7b_fp8_scaled\.safetensors"):
        check_text_encoder_file(path)
    with pytest.raises(ModelFileError, match=r"can't be trained on. Choose qwen_image_vae\.safetensors"):
        check_vae(BaseModel(config_of(path)))


def test_formats_of_comfyui_that_cannot_be_trained_on(weights: Weights, tmp_path: Path):
    """The format is read from the layers' entries or the header, and scales per block from their shape."""
    codes, scale = scaled_fp8(weights[f"{LAYER}.weight"])
    fp8 = {**weights, f"{LAYER}.weight": codes, f"{LAYER}.weight_scale": scale}
    path = tmp_path / "a.safetensors"
    for name in ("nvfp4", "mxfp8", "w4a8"):
        assert f"ComfyUI's format '{name}'" in complaint(
            write(path, {**fp8, f"{LAYER}.comfy_quant": as_bytes({"format": name})})
        )
        note = json.dumps({"layers": {LAYER: {"format": name}}})
        assert f"ComfyUI's format '{name}'" in complaint(write(path, fp8, {"_quantization_metadata": note}))
    blocks = {**fp8, f"{LAYER}.weight_scale": torch.ones(48, 3)}
    assert "blocks, with scales of shape [48, 3]" in complaint(write(path, blocks))
    assert "int8 without a scale" in complaint(
        write(path, {**weights, f"{LAYER}.weight": int8_rows(weights[f"{LAYER}.weight"])[0]})
    )
    assert "the type U8" in complaint(
        write(path, {**weights, f"{LAYER}.weight": torch.zeros(48, 24, dtype=torch.uint8)})
    )
    for odd in ({"format": ["nvfp4"]}, {"format": 5}):
        assert "ComfyUI's format" in complaint(write(path, {**fp8, f"{LAYER}.comfy_quant": as_bytes(odd)}))


KINDS = {
    "a LoRA": "transformer_blocks.0.attn.to_q.lora_down.weight",
    "a ControlNet": "controlnet_blocks.0.weight",
    "a text encoder of llama.cpp, in GGUF": "blk.0.attn_k.weight",
    "a text encoder, T5": "encoder.block.0.layer.0.SelfAttention.k.weight",
    "a text encoder, CLIP": "text_model.encoder.layers.0.mlp.fc1.weight",
    "a text encoder, Qwen2.5-VL": "visual.blocks.0.attn.qkv.bias",
    "a text encoder, Qwen3 or Gemma 3": "model.layers.0.self_attn.q_norm.weight",
    "a VAE, that of Qwen-Image or Wan": "decoder.middle.0.residual.0.gamma",
    "a VAE of FLUX or Stable Diffusion": "decoder.mid.block_1.norm1.weight",
    "a transformer of FLUX or HunyuanVideo": "model.diffusion_model.double_blocks.0.img_attn.qkv.weight",
    "a transformer of Wan": "blocks.0.cross_attn.k.weight",
    "a transformer of Lumina or Z-Image": "noise_refiner.0.attention.qkv.weight",
    "a network of Stable Diffusion or SDXL": "input_blocks.0.0.weight",
}


@pytest.mark.parametrize("kind", list(KINDS))
def test_files_chosen_in_the_wrong_place(kind: str, tmp_path: Path):
    path = write(tmp_path / "a.safetensors", {KINDS[kind]: torch.zeros(2)})
    assert f"not a Qwen-Image transformer: it has no txt_norm.weight; it looks like {kind}. Choose qwen" in complaint(
        path
    )
    base = BaseModel(config_of(path))
    if "Qwen2.5-VL" not in kind:
        with pytest.raises(ModelFileError, match=rf"not a Qwen2.5-VL.*looks like {kind}\. Choose qwen_2.5_vl"):
            check_text_encoder_file(path)
    if "Qwen-Image or Wan" not in kind:
        with pytest.raises(ModelFileError, match=rf"not a Qwen-Image VAE.*looks like {kind}\. Choose qwen_image_vae"):
            check_vae(base)


def test_a_transformer_in_the_place_of_the_others(weights: Weights, tmp_path: Path):
    path = write(tmp_path / "a.safetensors", weights)
    with pytest.raises(ModelFileError, match=r"not a Qwen2\.5-VL.*looks like a Qwen-Image transformer"):
        check_text_encoder_file(path)
    with pytest.raises(ModelFileError, match=r"not a Qwen-Image VAE.*looks like a Qwen-Image transformer"):
        check_vae(BaseModel(config_of(path)))


def test_gguf_is_for_the_transformer_alone(weights: Weights, tmp_path: Path):
    path = gguf(weights, tmp_path / "a.gguf", "F16")
    with pytest.raises(ModelFileError, match=r"a GGUF file.*qwen_2\.5_vl_7b_fp8_scaled\.safetensors"):
        check_text_encoder_file(path)
    with pytest.raises(ModelFileError, match=r"a GGUF file.*qwen_image_vae\.safetensors"):
        check_vae(BaseModel(config_of(path)))


def test_layered(weights: Weights, tmp_path: Path):
    added = {**weights, "time_text_embed.addition_t_embedding.weight": torch.zeros(2, 48)}
    assert "is Qwen-Image-Layered" in complaint(write(tmp_path / "a.safetensors", added))
    config = {"_class_name": "QwenImageTransformer2DModel", **NARROW, "use_additional_t_cond": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert "is Qwen-Image-Layered" in complaint(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "QwenImageControlNetModel"}))
    assert "the class 'QwenImageControlNetModel'" in complaint(tmp_path)


@pytest.mark.parametrize(
    ("pipeline", "words"),
    [
        ("QwenImagePipeline", "is the text-to-image model Qwen-Image, as its model_index.json says"),
        ("QwenImageLayeredPipeline", "is for QwenImageLayeredPipeline"),
        ("QwenImageControlNetPipeline", "is for QwenImageControlNetPipeline"),
    ],
)
def test_downloads_of_other_models(pipeline: str, words: str, base_of: Callable[[str], ModelConfig], tmp_path: Path):
    model = base_of("edit-v2")
    for each in Path(model.base).iterdir():
        (tmp_path / each.name).symlink_to(each)
    (tmp_path / "model_index.json").unlink(missing_ok=True)
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": pipeline}))
    with pytest.raises(ModelFileError, match=f"{words}.*download Qwen/Qwen-Image-Edit-2509"):
        assert BaseModel(replace(model, base=str(tmp_path))).network


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("qwen_image_2512_bf16", "text-to-image"),
        ("Qwen-Image_ComfyUI", "text-to-image"),
        ("qwen_image_edit_2511_lightning_4steps", "distilled"),
        ("Qwen-Rapid-AIO-NSFW-v9", "distilled"),
        ("qwen_image_edit_2511_bf16", ""),
        ("my_edit_model", ""),
    ],
)
def test_names_that_raise_doubts(name: str, words: str, weights: Weights, tmp_path: Path, caplog):
    """The content doesn't tell, so the file is accepted with a note in the log."""
    path = write(tmp_path / f"{name}.safetensors", weights)
    with caplog.at_level(logging.WARNING, logger="trainer_core.qwen_image"):
        assert BaseModel(config_of(path, flavour="edit-v3")).network
    assert len(caplog.messages) == bool(words)
    assert not words or words in caplog.messages[0]


def seven_b() -> Weights:
    """Tensors without data of a Qwen2.5-VL-7B by ComfyUI's names, as far as they are looked at."""
    text, vision = (qwen25_vl_7b()[part] for part in ("text_config", "vision_config"))
    found = {"model.layers.0.self_attn.k_proj.bias": torch.zeros(512)}
    found |= {f"model.layers.{n}.self_attn.k_proj.weight": torch.zeros(1) for n in range(text["num_hidden_layers"])}
    return found | {f"visual.blocks.{n}.attn.qkv.weight": torch.zeros(1) for n in range(vision["depth"])}


def test_text_encoders_of_another_size(tmp_path: Path):
    path = tmp_path / "a.safetensors"
    check_text_encoder_file(write(path, seven_b()))
    others = [
        ({**seven_b(), "model.layers.0.self_attn.k_proj.bias": torch.zeros(256)}, "of another size than 7B"),
        ({name: each for name, each in seven_b().items() if "visual" not in name}, "has no vision tower"),
        ({name: each for name, each in seven_b().items() if "layers.27" not in name}, "is incomplete"),
    ]
    for tensors, words in others:
        with pytest.raises(ModelFileError, match=rf"{words}.*Choose qwen_2\.5_vl_7b_fp8_scaled"):
            check_text_encoder_file(write(path, tensors))


def test_vaes_of_other_models(tmp_path: Path):
    """Same names, other shapes: Layered has four channels, Wan 2.2 twelve."""
    path, real_vae = tmp_path / "a.safetensors", AutoencoderKLQwenImage(base_dim=8).state_dict()
    check_vae(BaseModel(config_of(write(path, real_vae))))
    first = real_vae["encoder.conv_in.weight"]
    for channels, model in ((4, "Qwen-Image-Layered"), (12, "Wan 2.2")):
        other = {**real_vae, "encoder.conv_in.weight": first[:, :1].repeat(1, channels, 1, 1, 1)}
        with pytest.raises(ModelFileError, match=f"not a Qwen-Image VAE.*{model}"):
            check_vae(BaseModel(config_of(write(path, other))))


def test_it_is_found_before_encoding(base_of: Callable[[str], ModelConfig], tmp_path: Path):
    """`plan_dataset` checks the encoders it will load; see `check_job` for the transformer."""
    model = base_of("edit-v2")
    pointer = tmp_path / "qwen_2.5_vl_7b.safetensors"
    pointer.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 16584333312\n")
    base = BaseModel(replace(model, text_encoder_file=str(pointer)))
    with pytest.raises(ModelFileError, match=r"git-lfs pointer in place of the 16\.6 GB file"):
        check_text_encoder(base, EncodingConfig().preprocessing)
