"""The adapter: which layers get one, peft puts it in, and its weights start from the seed."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..config import LoraConfig, LoraTargets
from ..errors import ConfigError
from ..rng import stream, undisturbed

if TYPE_CHECKING:
    from diffusers import QwenImageTransformer2DModel

ADAPTER = "default"
_ATTENTION_IMAGE = r"attn\.(to_q|to_k|to_v|to_out\.0)"
_ATTENTION = r"attn\.(to_q|to_k|to_v|to_out\.0|add_q_proj|add_k_proj|add_v_proj|to_add_out)"
_MLP = r"(img_mlp|txt_mlp)\.net\.(0\.proj|2)"
_MODULATION = r"(img_mod|txt_mod)\.1"

TARGET_PATTERNS: dict[LoraTargets, str] = {
    "image-attention": rf"transformer_blocks\.\d+\.{_ATTENTION_IMAGE}",
    "attention": rf"transformer_blocks\.\d+\.{_ATTENTION}",
    "attention-mlp": rf"transformer_blocks\.\d+\.({_ATTENTION}|{_MLP})",
    "all": rf"transformer_blocks\.\d+\.({_ATTENTION}|{_MLP}|{_MODULATION})",
}
# Of the last block only the image stream is read: these layers get no gradient there.
_WITHOUT_GRADIENT = re.compile(r"attn\.(to_add_out|add_q_proj)|txt_mlp\..*")


def target_modules(transformer: nn.Module, lora: LoraConfig) -> list[str]:
    """Full names of the layers that get an adapter.

    Raises:
        ConfigError: the pattern is no regular expression, or matches no linear layer.
    """
    pattern = TARGET_PATTERNS.get(lora.lora_targets, lora.lora_target_pattern)
    try:
        matcher = re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"lora_target_pattern {pattern!r} is not a regular expression: {error}.") from error
    last = f"transformer_blocks.{len(transformer.transformer_blocks) - 1}."  # type: ignore[arg-type]
    names = [name for name, module in transformer.named_modules() if isinstance(module, nn.Linear)]
    chosen = [
        name
        for name in names
        if matcher.fullmatch(name)
        and not (name.startswith(last) and _WITHOUT_GRADIENT.fullmatch(name.removeprefix(last)))
    ]
    if not chosen:
        raise ConfigError(f"lora_target_pattern {pattern!r} matches no layer. Layers are named like {names[2]!r}.")
    return chosen


def inject_lora(transformer: QwenImageTransformer2DModel, lora: LoraConfig, seed: int) -> dict[str, nn.Parameter]:
    """Put a fresh adapter into the frozen transformer; its float32 parameters by name, the only trainable ones.

    Names are `<module>.lora_A` and `<module>.lora_B`. A is drawn uniformly (Kaiming, as peft) from (seed, name),
    B is zero, so the output does not change.
    """
    import peft

    modules = target_modules(transformer, lora)
    settings = peft.LoraConfig(
        r=lora.lora_rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type] - a float scales as well
        lora_dropout=lora.lora_dropout,
        target_modules=modules,
        init_lora_weights=False,
    )
    with undisturbed(transformer.device):
        peft.inject_adapter_in_model(settings, transformer, ADAPTER)
    parameters: dict[str, nn.Parameter] = {}
    for module in modules:
        layer = transformer.get_submodule(module)
        for side in ("lora_A", "lora_B"):
            weight = getattr(layer, side)[ADAPTER].weight
            weight.data = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
            weight.requires_grad_(True)  # noqa: FBT003
            parameters[f"{module}.{side}"] = weight
    _draw_initial_weights(parameters, seed)
    return parameters


def _draw_initial_weights(parameters: dict[str, nn.Parameter], seed: int) -> None:
    for name, weight in parameters.items():
        if name.endswith(".lora_A"):
            bound = 1 / math.sqrt(weight.shape[1])
            drawn = torch.rand(weight.shape, generator=stream(seed, "lora", name))
            weight.data.copy_((drawn * 2 - 1) * bound)


@contextmanager
def without_lora(transformer: nn.Module) -> Iterator[None]:
    """The base model's own output while the context lasts."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers: list[Any] = [module for module in transformer.modules() if isinstance(module, BaseTunerLayer)]
    for layer in layers:
        layer.enable_adapters(enabled=False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(enabled=True)


@contextmanager
def without_dropout(transformer: nn.Module) -> Iterator[None]:
    """As it is used after the training, while the context lasts."""
    was_training = transformer.training
    transformer.eval()
    try:
        yield
    finally:
        transformer.train(was_training)
