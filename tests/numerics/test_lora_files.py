"""LoRA files of other programs: alpha wherever it is stated, every naming, and files that can't be used."""

from __future__ import annotations

import dataclasses
import json
import logging
import re
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.support.adapter_cases import KINDS, inputs, randomise
from trainer_core.adapters.inject import inject_lora, load_into
from trainer_core.adapters.plan import plan_adapter
from trainer_core.adapters.reader import Kronecker, LowRank, adapter_parts, read_adapter
from trainer_core.adapters.scaling import find_scaling
from trainer_core.config import LoraConfig, ModelConfig
from trainer_core.errors import ModelFileError
from trainer_core.qwen_image.base_model import BaseModel
from trainer_core.qwen_image.transformer import load_transformer, predict_velocity

CPU = torch.device("cpu")
LAYERS = ("transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.to_out.0", "transformer_blocks.1.img_mlp.net.2")
Q, OUT, MLP = LAYERS
RANK, ALPHA = 4, 16


def tensors(name_of=lambda layer, part: f"transformer.{layer}.{part}.weight", alpha: float | None = None):
    found = {}
    for layer in LAYERS:
        for number, part in enumerate(("lora_A", "lora_B")):
            shape = (RANK, 6) if part == "lora_A" else (6, RANK)
            found[name_of(layer, part)] = torch.full(shape, 0.5 + number)
        if alpha is not None:
            found[f"{name_of(layer, '|').split('.|')[0]}.alpha"] = torch.tensor(alpha)
    return found


def header(**values: object) -> dict[str, str]:
    return {"lora_adapter_metadata": json.dumps({f"transformer.{key}": value for key, value in values.items()})}


def scales(path: Path) -> dict[str, float]:
    parts = read_adapter(path, LAYERS)
    return {layer: parts[layer].scale for layer in LAYERS}


STATED = {
    "alpha": ({"r": 4, "lora_alpha": 16}, [4, 4, 4]),
    "rslora": ({"r": 4, "lora_alpha": 16, "use_rslora": True}, [8, 8, 8]),
    "a pattern of a name": ({"r": 4, "lora_alpha": 16, "alpha_pattern": {Q: 2}}, [0.5, 4, 4]),
    "a pattern of its end": ({"r": 4, "lora_alpha": 16, "alpha_pattern": {"to_out.0": 8}}, [4, 2, 4]),
    "the first of two patterns": ({"r": 4, "lora_alpha": 16, "alpha_pattern": {"to_q": 8, Q: 2}}, [2, 4, 4]),
    "an escaped pattern": (
        {"r": 4, "lora_alpha": 16, "alpha_pattern": {"^" + Q.replace(".", r"\.") + "$": 2}},
        [0.5, 4, 4],
    ),
    "rank patterns": ({"r": 32, "lora_alpha": 16, "rank_pattern": {"to_q": 4, "to_out.0": 4, "net.2": 4}}, [4, 4, 4]),
}


@pytest.mark.parametrize("case", list(STATED))
@pytest.mark.parametrize("place", ["header", "header of a network", "file beside it"])
def test_alpha_beside_the_tensors(case: str, place: str, tmp_path: Path):
    values, wanted = STATED[case]
    path = tmp_path / "adapter_model.safetensors"
    if place == "header":
        save_file(tensors(), path, header(**values))
    elif place == "header of a network":
        save_file(tensors(), path, {"lora_adapter_metadata": json.dumps(values)})
    else:
        save_file(tensors(lambda layer, part: f"base_model.model.{layer}.{part}.weight"), path)
        (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", **values}))
    assert list(scales(path).values()) == wanted


@pytest.mark.parametrize("values", [case[0] for case in STATED.values()], ids=list(STATED))
def test_the_scale_is_pefts(values: dict, tmp_path: Path):
    """peft itself, given the same configuration, scales each layer alike."""

    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            for layer in LAYERS:
                *parents, last = layer.split(".")
                module = self
                for name in parents:
                    if name not in dict(module.named_children()):
                        module.add_module(name, torch.nn.Module())
                    module = getattr(module, name)
                module.add_module(last, torch.nn.Linear(6, 6))

    model = peft.get_peft_model(Block(), peft.LoraConfig(target_modules=list(LAYERS), **values))
    theirs = {layer: model.base_model.model.get_submodule(layer).scaling["default"] for layer in LAYERS}
    model.save_pretrained(tmp_path)
    assert scales(tmp_path / "adapter_model.safetensors") == theirs


def test_which_place_applies(tmp_path: Path):
    """Alpha tensors, then the header, then the file beside it; the header's ss_network_alpha never."""
    path = tmp_path / "x.safetensors"
    beside = tmp_path / "adapter_config.json"
    beside.write_text(json.dumps({"r": 4, "lora_alpha": 2}))
    save_file(tensors(alpha=12.0), path, header(r=4, lora_alpha=16))
    assert set(scales(path).values()) == {3}
    save_file(tensors(), path, header(r=4, lora_alpha=16))
    assert set(scales(path).values()) == {4}
    save_file(tensors(), path, {"ss_network_alpha": "1", "ss_network_dim": "4"})
    assert set(scales(path).values()) == {0.5}
    save_file(tensors(), tmp_path / "another.safetensors")  # so the file beside may describe either
    assert set(scales(path).values()) == {1}
    named_by_peft = tensors(lambda layer, part: f"base_model.model.{layer}.{part}.weight")
    save_file(named_by_peft, path)
    assert set(scales(path).values()) == {0.5}
    beside.unlink()
    save_file(tensors(), path, {"ss_network_alpha": "1", "ss_network_dim": "4"})
    assert set(scales(path).values()) == {1}


def test_the_scale_that_was_taken_is_said_in_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    path = tmp_path / "x.safetensors"
    wanted = [
        ({}, None, r"x\.safetensors states no alpha: .*Scale 1 is used, as in ComfyUI and diffusers\.$"),
        (
            {"ss_network_alpha": "16", "ss_network_dim": "4"},
            None,
            "Scale 1 is used, .*ss_network_alpha '16' in its header is ignored.*an adapter_config.json that states",
        ),
        ({"ss_network_alpha": "16"}, 8.0, None),
        (header(r=4, lora_alpha=16), None, "used with scale 4: alpha / rank, as stated in the header"),
        (
            header(r=4, lora_alpha=16, use_rslora=True),
            None,
            "used with scale 8: alpha / √rank, because of use_rslora, as",
        ),
        (header(r=4, lora_alpha=16, alpha_pattern={"to_q": 2}), None, r"scale 0\.5 to 4"),
        ({}, 8.0, None),
        ({"qwen_edit_trainer.lora_type": "lora"}, None, None),
    ]
    for metadata, alpha, line in wanted:
        save_file(tensors(alpha=alpha), path, metadata)
        caplog.clear()
        with caplog.at_level(logging.INFO, logger="trainer_core.adapters"):
            read_adapter(path, LAYERS)
        assert len(caplog.messages) == (line is not None)
        if line:
            assert re.search(line, caplog.messages[0]), caplog.messages
    mixed = tensors(alpha=8.0)
    del mixed[f"transformer.{Q}.alpha"]
    save_file(mixed, path)
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="trainer_core.adapters"):
        assert scales(path) == {Q: 1, OUT: 2, MLP: 2}
    assert "states no alpha for 1 of its 3 layers" in caplog.messages[0]


PREFIXES = ["", "transformer.", "diffusion_model.", "model.diffusion_model.", "pipe.dit.", "base_model.model."]
PREFIXES += [
    "base_model.model.transformer.",
    "base_model.model.pipe.dit.",
    "module.",
    "_orig_mod.",
    "transformer._orig_mod.",
]
INFIXES = ["", ".default", ".default_0", ".my_edit", ".Käse 1"]


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("infix", INFIXES)
def test_prefixes_and_the_adapters_name(prefix: str, infix: str):
    parts = adapter_parts(tensors(lambda layer, part: f"{prefix}{layer}.{part}{infix}.weight"), LAYERS, "x")
    assert set(parts) == set(LAYERS)
    assert all(torch.equal(part.change(), torch.full((6, 6), 0.5 * 1.5 * RANK)) for part in parts.values())


# A layer's name in the files of each program, the ends of its two tensors, and whether it writes alpha tensors.
AB, DOWN_UP = ("lora_A.weight", "lora_B.weight"), ("lora_down.weight", "lora_up.weight")
PROGRAMS = {
    "ai-toolkit, diffusion-pipe": ("diffusion_model.{}", AB, False),
    "ComfyUI's training node": ("diffusion_model.{}", DOWN_UP, True),
    "diffusers, SimpleTuner, qflux": ("transformer.{}", AB, False),
    "DiffSynth-Studio": ("{}", ("lora_A.default.weight", "lora_B.default.weight"), False),
    "DiffSynth-Studio's training state": ("pipe.dit.{}", ("lora_A.default.weight", "lora_B.default.weight"), False),
    "LightX2V's Lightning": ("{}", DOWN_UP, True),
    "LyCORIS": ("lycoris_{flat}", DOWN_UP, True),
    "musubi-tuner, OneTrainer's kohya format": ("lora_unet_{flat}", DOWN_UP, True),
    "older diffusers": ("transformer.{}", ("lora.down.weight", "lora.up.weight"), False),
    "OneTrainer": ("transformer.{}", DOWN_UP, True),
    "older OneTrainer": ("lora_transformer_{flat}", DOWN_UP, True),
    "peft": ("base_model.model.{}", AB, False),
    "older SimpleTuner": ("transformer.base_model.model.{}", ("lora.down.weight", "lora.up.weight"), False),
    "SimpleTuner's comfyui format": ("diffusion_model.{}", AB, True),
}


@pytest.mark.parametrize("program", list(PROGRAMS))
def test_what_other_programs_write(program: str):
    stem, ends, has_alpha = PROGRAMS[program]
    end = dict(zip(("lora_A", "lora_B"), ends, strict=True))
    named: dict[str, Tensor] = {}
    for layer in LAYERS:
        name = stem.format(layer, flat=layer.replace(".", "_"))
        named |= {f"{name}.{end['lora_A']}": torch.full((RANK, 6), 0.5), f"{name}.{end['lora_B']}": torch.ones(6, RANK)}
        named |= {f"{name}.alpha": torch.tensor(8.0)} if has_alpha else {}
    parts = adapter_parts(named, LAYERS, "x")
    assert set(parts) == set(LAYERS)
    assert all(torch.equal(part.change(), torch.full((6, 6), 4.0 if has_alpha else 2.0)) for part in parts.values())


UNUSABLE = {
    "an unknown prefix": (lambda layer: f"my.net.{layer}", r"unknown naming.*such as my\.net\.transformer_blocks"),
    "an unknown flat prefix": (lambda layer: f"foo_{layer.replace('.', '_')}", "unknown naming.*foo_"),
    "more blocks": (lambda layer: f"transformer.{layer.replace('blocks.', 'blocks.7')}", "for another model. Choose"),
    "FLUX": (lambda layer: f"lora_unet_double_blocks_{len(layer)}_img_mlp_0", "another model, probably FLUX"),
    "SDXL": (lambda layer: f"unet.down_blocks.{len(layer)}.attn", "probably Stable Diffusion or SDXL"),
    "Wan": (lambda layer: f"diffusion_model.blocks.{len(layer)}.cross_attn.k", "probably Wan"),
    "CLIP": (lambda layer: f"lora_te1_text_model_{len(layer)}", "probably a text encoder"),
    "a text encoder with the same layers": (lambda layer: f"text_encoder.{layer}", "probably a text encoder"),
    "ComfyUI's text encoder": (lambda layer: f"text_encoders.qwen25_7b.{len(layer)}", "probably a text encoder"),
    "Qwen2.5-VL by peft": (
        lambda layer: f"base_model.model.model.layers.{len(layer)}.self_attn.q_proj",
        "probably a text encoder",
    ),
    "FLUX with layers of the same name": (
        lambda layer: f"transformer.single_{layer}",
        "belong to layers that this model doesn't have.*another model, probably FLUX",
    ),
    "SDXL with a layer of the same name": (
        lambda layer: f"lora_unet_output_blocks_{len(layer)}_{layer.replace('.', '_')}",
        "another model, probably Stable Diffusion or SDXL",
    ),
    "one layer of the same name": (
        lambda layer: f"foo.{layer if layer == Q else len(layer)}",
        r"for another model\. Choose",
    ),
}


@pytest.mark.parametrize("case", list(UNUSABLE))
def test_names_of_something_else(case: str):
    name_of, words = UNUSABLE[case]
    with pytest.raises(ModelFileError, match=words):
        adapter_parts(tensors(lambda layer, part: f"{name_of(layer)}.{part}.weight"), LAYERS, "x")


@pytest.mark.parametrize("name", ["lora_te_text_model_encoder_0", "text_encoder.model.layers.0.self_attn.q_proj"])
def test_a_file_that_also_changes_the_text_encoder(name: str):
    both = tensors() | {f"{name}.lora_A.weight": torch.ones(RANK, 6), f"{name}.lora_B.weight": torch.ones(6, RANK)}
    with pytest.raises(ModelFileError, match=r"also changes a text encoder: 2 of the 8 tensors.*Save it to a file"):
        adapter_parts(both, LAYERS, "x")


def test_files_that_contradict_themselves(tmp_path: Path):
    path = tmp_path / "x.safetensors"
    two = tensors() | tensors(lambda layer, part: f"transformer.{layer}.{part}.second.weight")
    nan = tensors()
    nan[f"transformer.{Q}.lora_A.weight"][0, 0] = torch.nan
    cases = [
        (two, {}, "several adapters"),
        (tensors(), header(r=8, lora_alpha=16), "rank 4 .* states 8"),
        (tensors(), header(r=4, lora_alpha="16"), "lora_alpha is '16'"),
        (tensors(), header(r=4, lora_alpha=float("nan")), "NaN is not a number"),
        (tensors(), header(r=4, lora_alpha=16, alpha_pattern={".*to_q": 2}), "Only names of layers"),
        (tensors(), header(r=4, lora_alpha=16, use_dora=True), "lacks its DoRA weights"),
        (tensors(), {"lora_adapter_metadata": "[" * 100_000}, "nested more than 100 levels"),
        (tensors() | {f"transformer.{Q}.alpha": torch.ones(3)}, {}, "alpha .* that is not one number"),
        (nan, {}, "infinite or undefined values in transformer.transformer_blocks.0.attn.to_q.lora_A"),
        ({name: each.int() for name, each in tensors().items()}, {}, "as int32"),
    ]
    for stored, metadata, words in cases:
        save_file(stored, path, metadata)
        with pytest.raises(ModelFileError, match=words):
            read_adapter(path, LAYERS)


def test_init_lora_and_sample_take_the_stated_scale(model: ModelConfig, tmp_path: Path):
    """A LoRA with alpha 4 times its rank, as diffusers saves it: training starts from the same network as it was."""
    lora = LoraConfig(lora_rank=4, lora_alpha=16, lora_targets="all")
    trained = load_transformer(BaseModel(model), CPU)
    parameters = inject_lora(trained, plan_adapter(trained, lora), 0)
    randomise(parameters)
    wanted = predict_velocity(trained, *inputs()).detach()
    named: dict[str, Tensor] = {f"transformer.{name}.weight": each.detach() for name, each in parameters.items()}
    path = tmp_path / "pytorch_lora_weights.safetensors"
    save_file(named, path, header(r=4, lora_alpha=16))
    for settings in (dataclasses.replace(lora, lora_rank=8, lora_alpha=8), dataclasses.replace(KINDS["dora"])):
        started = load_transformer(BaseModel(model), CPU)
        inject_lora(started, plan_adapter(started, dataclasses.replace(settings, init_lora=str(path))), 0)
        torch.testing.assert_close(predict_velocity(started, *inputs()).detach(), wanted, rtol=1e-4, atol=1e-4)
    sampled = load_transformer(BaseModel(model), CPU)
    load_into(sampled, path)
    torch.testing.assert_close(predict_velocity(sampled, *inputs()), wanted, rtol=1e-4, atol=1e-4)
    unscaled = load_transformer(BaseModel(model), CPU)
    save_file(named, path)
    load_into(unscaled, path)
    assert not torch.allclose(predict_velocity(unscaled, *inputs()), wanted, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("kind", ["dora", "lokr", "lokr of full matrices"])
def test_adapters_that_peft_saves(kind: str, model: ModelConfig, tmp_path: Path):
    """peft's own DoRA and LoKr in a transformer, saved by peft with its configuration, sampled here."""
    targets = [f"transformer_blocks.0.attn.{name}" for name in ("to_q", "to_k")]
    if kind == "dora":
        settings = peft.LoraConfig(r=4, lora_alpha=10, target_modules=targets, use_dora=True)
    else:
        rank = 2 if kind == "lokr" else 1024
        settings = peft.LoKrConfig(r=rank, alpha=3 * rank, target_modules=targets, decompose_factor=4)
    theirs = peft.get_peft_model(load_transformer(BaseModel(model), CPU), settings)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, each in theirs.named_parameters():
            if "lora_" in name or "lokr_" in name:
                drawn = torch.randn(each.shape, generator=generator)
                each.copy_(each * (1 + 0.2 * drawn) if "magnitude" in name else 0.2 * drawn)
    wanted = predict_velocity(theirs.base_model.model, *inputs()).detach()
    theirs.save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    assert all(name.startswith("base_model.model.") for name in load_file(path))
    ours = load_transformer(BaseModel(model), CPU)
    load_into(ours, path)
    torch.testing.assert_close(predict_velocity(ours, *inputs()), wanted, rtol=1e-4, atol=1e-4)


def test_shapes_that_do_not_multiply():
    low, two = (
        LowRank(torch.ones(2, 3), torch.ones(4, 2)),
        Kronecker(torch.ones(2, 2), (torch.ones(3, 1), torch.ones(1, 2))),
    )
    assert (low.shape, two.shape) == ((4, 3), (6, 4))
    wide = {
        f"{Q}.lokr_w1_a": torch.ones(20_000, 1),
        f"{Q}.lokr_w1_b": torch.ones(1, 20_000),
        f"{Q}.lokr_w2": torch.ones(1, 1),
    }
    empty = {f"{Q}.lora_A.weight": torch.ones(0, 6), f"{Q}.lora_B.weight": torch.ones(6, 0)}
    flat = {f"{Q}.lokr_w1": torch.ones(4), f"{Q}.lokr_w2": torch.ones(4)}
    for each in (wide, empty, flat):
        with pytest.raises(ModelFileError, match="incomplete or has an unsupported type"):
            adapter_parts(each, LAYERS, "x")


def test_downloads_that_failed(tmp_path: Path):
    path = tmp_path / "x.safetensors"
    save_file(tensors(), path)
    whole = path.read_bytes()
    contents = {
        b"": "it is empty",
        b"version https://git-lfs.github.com/spec/v1\nsize 300000000\n": "git-lfs pointer in place of the 0.3 GB file",
        b"<html><body>Log in</body></html>": "it is a web page",
        whole[:-7]: f"it has {len(whole) - 7:,} of {len(whole):,} bytes",
    }
    for content, words in contents.items():
        path.write_bytes(content)
        with pytest.raises(ModelFileError, match=words):
            read_adapter(path, LAYERS)
    with pytest.raises(ModelFileError, match=r"x\.pt is not a \.safetensors file"):
        read_adapter(tmp_path / "x.pt", LAYERS)


def test_an_unreadable_configuration_beside_the_file(tmp_path: Path):
    contents = {b"\xff": "not UTF-8", b"null": "not a JSON object", b"{": "not JSON", b" " * 2**21: "larger than 1 MiB"}
    for content, words in contents.items():
        (tmp_path / "adapter_config.json").write_bytes(content)
        with pytest.raises(ModelFileError, match=words):
            find_scaling(tmp_path / "adapter_model.safetensors", {}, is_peft=False)
