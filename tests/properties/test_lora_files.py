"""LoRA files of strangers: the right scale in every layout, and a result or our own error for any file whatsoever."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save, save_file
from torch import Tensor

from tests.support.limits import result_or_own_error
from trainer_core.adapters.reader import AdapterPart, Kronecker, LowRank, read_adapter

LAYERS = ("transformer_blocks.0.attn.to_q", "transformer_blocks.1.attn.to_out.0", "proj_out")
WIDTH = 6
PREFIXES = ("", "transformer.", "diffusion_model.", "model.diffusion_model.", "pipe.dit.", "base_model.model.")
FLAT = ("lora_unet_", "lycoris_", "lora_transformer_")

numbers = st.floats(0.25, 64).map(lambda value: round(value, 3))
configurations = st.fixed_dictionaries(
    {"lora_alpha": numbers, "use_rslora": st.booleans()},
    optional={"alpha_pattern": st.dictionaries(st.sampled_from([*LAYERS, "to_q", "to_out.0"]), numbers, max_size=3)},
)


def stated_scale(values: Mapping[str, Any], layer: str, rank: int) -> float:
    """peft's rule, written as in its documentation: the first pattern that is the end of the layer's name applies."""
    fitting = [
        alpha for name, alpha in values.get("alpha_pattern", {}).items() if layer == name or layer.endswith("." + name)
    ]
    alpha = fitting[0] if fitting else values["lora_alpha"]
    return alpha / (math.sqrt(rank) if values["use_rslora"] else rank)


@st.composite
def layouts(draw: st.DrawFn) -> tuple[dict[str, Tensor], dict[str, str], dict[str, Any] | None, dict[str, float]]:
    """A file's tensors and header, the configuration beside it, and the scale of each layer."""
    flat = draw(st.booleans())
    prefix = draw(st.sampled_from(FLAT if flat else PREFIXES))
    infix = "" if flat else draw(st.sampled_from(["", ".default", ".default_0", ".my_edit"]))
    sides = ("lora_down", "lora_up") if flat or draw(st.booleans()) else ("lora_A", "lora_B")
    place = draw(st.sampled_from(["tensors", "header", "header and tensors", "beside", "nowhere"]))
    configuration = draw(configurations)
    tensors: dict[str, Tensor] = {}
    scales: dict[str, float] = {}
    ranks: dict[str, int] = {}
    for layer in LAYERS:
        stem = prefix + (layer.replace(".", "_") if flat else layer)
        rank = ranks[layer] = draw(st.integers(1, 8))
        tensors[f"{stem}.{sides[0]}{infix}.weight"] = torch.ones(rank, WIDTH)
        tensors[f"{stem}.{sides[1]}{infix}.weight"] = torch.ones(WIDTH, rank)
        if "tensors" in place:
            alpha = draw(numbers)
            tensors[f"{stem}.alpha"] = torch.tensor(alpha, dtype=torch.float64)
            scales[layer] = alpha / rank
        else:
            scales[layer] = 1.0 if place == "nowhere" else stated_scale(configuration, layer, rank)
    configuration = {"r": 99, "rank_pattern": ranks, **configuration}
    header = {"ss_network_alpha": "1", "ss_network_dim": "32"}
    if "header" in place:
        component = draw(st.sampled_from(["", "transformer."]))
        named = {component + key: value for key, value in configuration.items()}
        header["lora_adapter_metadata"] = json.dumps(named)
    return tensors, header, configuration if place == "beside" else None, scales


@given(layouts())
def test_every_layout_gets_its_scale(
    layout: tuple[dict[str, Tensor], dict[str, str], dict[str, Any] | None, dict[str, float]],
) -> None:
    tensors, header, beside, scales = layout
    with TemporaryDirectory() as folder:
        path = Path(folder) / "adapter_model.safetensors"
        save_file(tensors, path, header)
        if beside is not None:
            (Path(folder) / "adapter_config.json").write_text(json.dumps(beside))
        found = {layer: part.scale for layer, part in read_adapter(path, LAYERS).items()}
    assert found.keys() == scales.keys()
    assert all(math.isclose(found[layer], scales[layer], rel_tol=1e-6) for layer in LAYERS)


def usable(parts: object) -> None:
    """What is read can be applied: finite changes of the shape that they state."""
    assert isinstance(parts, dict)
    assert parts
    for layer, part in parts.items():
        assert layer in LAYERS
        assert isinstance(part, LowRank | Kronecker)
        assert isinstance(part.scale, float)
        if math.prod(part.shape) < 10_000:
            assert part.change().shape == part.shape


def read(data: bytes, beside: bytes | None = None) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "adapter_model.safetensors"
        path.write_bytes(data)
        if beside is not None:
            (Path(folder) / "adapter_config.json").write_bytes(beside)
        found: dict[str, AdapterPart] | Exception = result_or_own_error(lambda: read_adapter(path, LAYERS))
    if not isinstance(found, Exception):
        usable(found)


parts_of_names = st.sampled_from(
    [
        *LAYERS,
        *(layer.replace(".", "_") for layer in LAYERS),
        *("transformer", "diffusion_model", "lora_unet_", "_orig_mod", "base_model", "model", "x" * 200, "", "\n", "ä"),
        *("lora_A", "lora_B", "lora_down", "lora_up", "lora", "weight", "default", "alpha", "dora_scale", "lokr_w1"),
        *("lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lora_magnitude_vector", "down", "up"),
    ]
)
names = st.lists(parts_of_names, min_size=1, max_size=6).map(".".join)
types = st.sampled_from([torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.bool, torch.uint8])
shapes = st.lists(st.sampled_from([0, 1, 2, 3, WIDTH, 5000]), max_size=3).filter(
    lambda shape: math.prod(shape) < 40_000
)
tensors = st.builds(lambda shape, kind: torch.zeros(shape, dtype=kind), shapes, types)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=6,
)
settings = st.dictionaries(
    st.sampled_from(["r", "lora_alpha", "alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora"])
    | st.sampled_from(["transformer.r", "transformer.lora_alpha", "transformer.alpha_pattern"]),
    json_values | numbers | st.dictionaries(names, json_values | numbers, max_size=3),
    max_size=6,
)
written = settings.map(json.dumps) | json_values.map(json.dumps) | st.text(max_size=50)


@given(st.dictionaries(names, tensors, max_size=6), st.none() | written, st.none() | written)
def test_any_names_shapes_types_and_configurations(
    stored: dict[str, Tensor], header: str | None, beside: str | None
) -> None:
    metadata = {} if header is None else {"lora_adapter_metadata": header}
    read(save(stored, metadata), None if beside is None else beside.encode())


GOOD = {f"transformer.{LAYERS[0]}.lora_{side}.weight": torch.ones(4, 4) for side in "AB"}
WHOLE = save(GOOD, {"lora_adapter_metadata": '{"r": 4, "lora_alpha": 8}'})


@given(st.integers(0, len(WHOLE)), st.binary(max_size=4), st.integers(0, 2**10))
def test_files_cut_short_or_with_other_bytes(cut: int, other: bytes, place: int) -> None:
    read(WHOLE[:cut])
    read(WHOLE[: place % len(WHOLE)] + other + WHOLE[place % len(WHOLE) + len(other) :])
    read(other + WHOLE[cut:])
