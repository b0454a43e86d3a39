"""The demo model's Qwen2.5-VL: the real architecture, but narrow, with random weights from a fixed seed."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..packages import explained_imports
from ..rng import stream

if TYPE_CHECKING:
    from transformers import Qwen2_5_VLForConditionalGeneration
    from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig

_BRANCH_GAIN = 0.5  # scales what attention and MLP add, so that a token's embedding dominates its hidden state
_BRANCH_ENDS = ("o_proj.weight", "down_proj.weight", "attn.proj.weight")


def build_text_encoder(config_dir: Path) -> Qwen2_5_VLForConditionalGeneration:
    """Build the network of `config_dir`/config.json with weights from the seed in seed.json there; float32, CPU.

    Weights depend only on the seed and the parameter names, not on the platform or the version of transformers. They
    are uniform draws, scaled to a standard deviation that depends on the fan-in; norms are one and biases zero.
    """
    with explained_imports("transformers"):
        from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    config = Qwen2_5_VLConfig(**json.loads((config_dir / "config.json").read_text(encoding="utf-8")))
    seed = int(json.loads((config_dir / "seed.json").read_text(encoding="utf-8"))["seed"])
    with torch.device("meta"):
        network = Qwen2_5_VLForConditionalGeneration(config)
    network = network.to_empty(device="cpu").float()
    network.tie_weights()
    for name, parameter in network.named_parameters():
        parameter.data.copy_(_weights(seed, _stable_name(name), parameter.shape))
    _restore_buffers(network)
    return network.eval().requires_grad_(False)  # noqa: FBT003 - torch's signature


def _stable_name(name: str) -> str:
    """A parameter's name without the parts that differ between versions of transformers."""
    return ".".join(part for part in name.split(".") if part not in ("model", "language_model"))


def _weights(seed: int, name: str, shape: torch.Size) -> Tensor:
    if name.endswith("bias"):
        return torch.zeros(shape)
    if len(shape) == 1:
        return torch.ones(shape)
    fan_in = 1 if "embed_tokens" in name else math.prod(shape[1:])
    gain = _BRANCH_GAIN if name.endswith(_BRANCH_ENDS) else 1.0
    draws = torch.rand(shape, generator=stream(seed, "demo text encoder", name))
    return (draws - 0.5) * (gain * math.sqrt(12 / fan_in))


def _restore_buffers(network: Qwen2_5_VLForConditionalGeneration) -> None:
    """Compute the rotary frequencies, which the meta device left without values."""
    for module in network.modules():
        names = [name for name, _ in module.named_buffers(recurse=False)]
        if not names:
            continue
        arguments = (
            (module.config,) if hasattr(module, "config") else (_vision_rotary_width(network.config.vision_config),)
        )
        fresh = type(module)(*arguments)
        for name in names:
            setattr(module, name, getattr(fresh, name))


def _vision_rotary_width(vision: Qwen2_5_VLVisionConfig) -> int:
    """The argument of transformers 4's vision rotary embedding: half the head width."""
    return vision.hidden_size // vision.num_heads // 2
