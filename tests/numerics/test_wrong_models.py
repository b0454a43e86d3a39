"""What can't be trained on is recognised by name from files' headers, before anything is encoded."""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLQwenImage
from safetensors.torch import load_file, save_file
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from tests.support.layouts import Weights, as_bytes, gguf, int8_rows, matrices, random_weights, scaled_fp8
from tests.support.narrow import NARROW
from trainer_core.config import EncodingConfig, LoraConfig, ModelConfig, TrainConfig
from trainer_core.errors import ModelFileError
from trainer_core.planning.preparation import check_training, prepare_model
from trainer_core.qwen_image import base_model
from trainer_core.qwen_image.base_model import BaseModel
from trainer_core.qwen_image.prompt import load_tokenizer
from trainer_core.qwen_image.text_encoder import check_text_encoder
from trainer_core.qwen_image.text_encoder_file import check_text_encoder_file, qwen25_vl_7b
from trainer_core.qwen_image.vae import check_vae, load_vae

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


def test_an_incomplete_transformer(weights: Weights, tmp_path: Path):
    path = write(tmp_path / "a.safetensors", {key: each for key, each in weights.items() if key != "txt_in.weight"})
    assert "a.safetensors is incomplete: it has no txt_in.weight. Download it again. Choose qwen" in complaint(path)
    other = {key: each for key, each in weights.items() if key.startswith("transformer_blocks.0.attn.")}
    said = complaint(write(tmp_path / "b.safetensors", other))  # as Stable Diffusion 3 has them too
    assert "not a Qwen-Image transformer: it has no txt_norm.weight; it looks like a transformer of another" in said


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


@pytest.fixture(scope="module")
def seven_b() -> dict[str, tuple[int, ...]]:
    """Shapes of the weights of a Qwen2.5-VL-7B by ComfyUI's names."""
    with torch.device("meta"):
        network = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**qwen25_vl_7b()))
    shapes = {name: tuple(each.shape) for name, each in network.state_dict().items()}
    old = [("model.language_model.", "model."), ("model.visual.", "visual.")]
    return {
        next((to + name.removeprefix(new) for new, to in old if name.startswith(new)), name): shapes[name]
        for name in shapes
    }


def sparse(path: Path, shapes: dict[str, tuple[int, ...]]) -> Path:
    """A file with weights of these shapes, all zero, which takes only its header's space on the disk."""
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return path


def test_text_encoders_of_another_size(seven_b: dict[str, tuple[int, ...]], tmp_path: Path):
    path, last = tmp_path / "a.safetensors", "visual.merger.mlp.2.bias"
    check_text_encoder_file(sparse(path, seven_b))
    others = [
        ({**seven_b, "model.layers.0.self_attn.k_proj.bias": (256,)}, "of another size than 7B.*Choose qwen_2"),
        ({name: each for name, each in seven_b.items() if "visual" not in name}, "has no vision tower.*Choose qwen_2"),
        ({name: each for name, each in seven_b.items() if "layers.27" not in name}, "is incomplete.*Choose qwen_2"),
        ({name: each for name, each in seven_b.items() if name != last}, f"lacks 1 of .*model.{last}"),
        ({**seven_b, last: (7,)}, f"1 weights of the wrong shape, such as model.{last}"),
    ]
    for shapes, words in others:
        with pytest.raises(ModelFileError, match=words):
            check_text_encoder_file(sparse(path, shapes))


def test_tokenizers_that_make_other_tokens(tokenizer_dir: Path, comfyui_dir: Path, tmp_path: Path):
    """Prompts made of other tokens would be trained without a word."""
    load_tokenizer(tokenizer_dir)
    with pytest.raises(
        ModelFileError, match=r"not Qwen2\.5's: it makes other tokens\. Choose the folder of the Qwen2\.5"
    ):
        load_tokenizer(comfyui_dir / "comfy" / "sd1_tokenizer")
    bare = tmp_path / "bare"  # without its special tokens
    shutil.copytree(tokenizer_dir, bare)
    (bare / "tokenizer_config.json").unlink()
    with pytest.raises(ModelFileError, match=r"has no tokenizer_config\.json\."):
        load_tokenizer(bare)
    damages = [
        ("merges.txt", b"", "makes other tokens"),
        ("tokenizer_config.json", b"{}", "makes other tokens"),
        ("vocab.json", b'{"a"', "has wrong values.*EOF"),
        ("merges.txt", b"\xff", "has wrong values.*UTF-8"),
        ("tokenizer_config.json", b"null", "has wrong values"),
    ]
    for number, (name, data, words) in enumerate(damages):
        folder = tmp_path / str(number)
        shutil.copytree(tokenizer_dir, folder)
        (folder / name).write_bytes(data)
        with pytest.raises(ModelFileError, match=words):
            load_tokenizer(folder)


def test_a_schedule_that_can_not_be_read_is_found_before_encoding(model: ModelConfig, tmp_path: Path):
    shutil.copytree(model.base, tmp_path / "base")
    schedule = tmp_path / "base" / "scheduler" / "scheduler_config.json"
    changed = replace(model, base=str(tmp_path / "base"))
    config = TrainConfig(run_dir="-", encoded="-", model=changed, lora=LoraConfig(lora_rank=2))
    check_training(config, BaseModel(changed))
    for content, words in (("[", r"scheduler_config\.json"), ('{"max_shift": "x"}', "max_shift in .*scheduler_config")):
        schedule.write_text(content)
        with pytest.raises(ModelFileError, match=words):
            check_training(config, BaseModel(changed))


def test_an_image_processor_with_wrong_values(base_of: Callable[[str], ModelConfig], tmp_path: Path):
    shutil.copytree(base_of("edit-v2").base, tmp_path / "base")
    processor = tmp_path / "base" / "processor"
    processor.mkdir(exist_ok=True)
    (processor / "preprocessor_config.json").write_text("[")
    with pytest.raises(ModelFileError, match=r"preprocessor_config\.json has wrong values"):
        check_text_encoder(BaseModel(replace(base_of("edit-v2"), base=str(tmp_path / "base"))), "diffusers")


WRONG_VALUES = {
    "transformer": {
        "num_layers": (None, 2.5, 0, 10**9),
        "num_attention_heads": (-1,),
        "attention_head_dim": (0,),
        "joint_attention_dim": ([3],),
        "patch_size": ([],),
        "axes_dims_rope": ([1], None),
        "in_channels": ("64",),
        "out_channels": (7,),
    },
    "text_encoder": {"text_config": (None, 5), "vision_config": ({"depth": "x"}, {"hidden_size": 0})},
}


@pytest.mark.parametrize("part", list(WRONG_VALUES))
def test_folders_whose_configuration_is_wrong(part: str, model: ModelConfig, tmp_path: Path):
    base = tmp_path / "base"
    shutil.copytree(model.base, base)
    config = base / part / "config.json"
    whole = json.loads(config.read_text())
    checks: dict[str, Callable[[BaseModel], object]] = {
        "transformer": lambda changed: (changed.num_blocks, changed.network),
        "text_encoder": lambda changed: check_text_encoder(changed, "comfyui"),
    }
    for name, values in WRONG_VALUES[part].items():
        for value in values:
            config.write_text(json.dumps({**whole, name: value}))
            changed = BaseModel(replace(model, base=str(base)))
            with pytest.raises(ModelFileError, match=r"config\.json (must|has wrong values)|wrong shape|lacks"):
                checks[part](changed)


def test_vaes_of_other_models(tmp_path: Path):
    """Same names, other shapes: Layered has four channels, Wan 2.2 twelve."""
    path, real_vae = tmp_path / "a.safetensors", AutoencoderKLQwenImage(base_dim=8).state_dict()
    check_vae(BaseModel(config_of(write(path, real_vae))))
    first = real_vae["encoder.conv_in.weight"]
    for channels, model in ((4, "Qwen-Image-Layered"), (12, "Wan 2.2")):
        other = {**real_vae, "encoder.conv_in.weight": first[:, :1].repeat(1, channels, 1, 1, 1)}
        with pytest.raises(ModelFileError, match=f"not a Qwen-Image VAE.*{model}"):
            check_vae(BaseModel(config_of(write(path, other))))


def test_vae_folders_that_do_not_fit(model: ModelConfig, tmp_path: Path):
    """diffusers loads a folder that lacks a weight, and leaves out what it doesn't know."""
    base = tmp_path / "base"
    shutil.copytree(model.base, base)
    changed = BaseModel(replace(model, base=str(base)))
    config, file = base / "vae" / "config.json", base / "vae" / "diffusion_pytorch_model.safetensors"
    values, weights = json.loads(config.read_text()), load_file(file)
    name = "decoder.conv_in.bias"
    cases = [
        (values, {key: each for key, each in weights.items() if key != name}, f"1 of .* missing.*first: {name}"),
        (values, {**weights, "foo": torch.zeros(2)}, "1 are unknown .first: foo"),
        ({**values, "base_dim": 16}, weights, "wrong shape"),
        ({**values, "input_channels": 4}, weights, "has 4 picture channels and 16 latent channels instead of 3 and 16"),
        ({**values, "latents_mean": [0.0]}, weights, "latent channels"),
        ({**values, "base_dim": "wide"}, weights, r"vae.config\.json has wrong values"),
        ({**values, "dim_mult": []}, weights, r"vae.config\.json has wrong values"),
    ]
    check_vae(changed)
    for settings, tensors, words in cases:
        config.write_text(json.dumps(settings))
        write(file, tensors)
        for call in (check_vae, partial(load_vae, device=torch.device("cpu"))):
            with pytest.raises(ModelFileError, match=words):
                call(changed)


def test_it_is_found_before_encoding(base_of: Callable[[str], ModelConfig], tmp_path: Path):
    """`plan_dataset` checks the encoders it will load; see `check_job` for the transformer."""
    model = base_of("edit-v2")
    pointer = tmp_path / "qwen_2.5_vl_7b.safetensors"
    pointer.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 16584333312\n")
    base = BaseModel(replace(model, text_encoder_file=str(pointer)))
    with pytest.raises(ModelFileError, match=r"git-lfs pointer in place of the 16\.6 GB file"):
        check_text_encoder(base, EncodingConfig().preprocessing)
