"""The frozen transformer's forward, which computes and keeps less than diffusers' in training, with the same result."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from .attention import OfPair
from .block import EditBlock, LastBlock, Shared
from .positions import follows_comfyui

if TYPE_CHECKING:
    from diffusers import QwenImageTransformer2DModel

_LAYOUTS_HELD = 32  # combinations of sizes and prompt lengths whose indices are kept on the device
Through = Callable[..., Tensor]  # calls a function of tensors that has a backward pass: see memory/step_graphs.py


def optimise_frozen_forward(transformer: QwenImageTransformer2DModel) -> None:
    """Replace the blocks of a frozen network by ours; the output stays the same."""
    *blocks, last = transformer.transformer_blocks
    transformer.transformer_blocks = nn.ModuleList([*map(EditBlock, blocks), LastBlock(last)])  # type: ignore[arg-type]


def predict_tokens(
    transformer: QwenImageTransformer2DModel,
    picture: Tensor,
    sigma_B: Tensor,
    prompt: Tensor,
    prompt_mask: Tensor | None,
    shapes: Sequence[tuple[int, int, int]],
    through: Through | None = None,
) -> Tensor:
    """Predicted velocity [B, n, c] of the n target tokens, from picture tokens [B, L, c] with the target's first.

    If the transformer follows ComfyUI, the sinusoids of sigma [B] (float32) are computed in float32. Otherwise sigma
    and their frequencies are rounded as in diffusers' pipelines. In bfloat16 that changes most of the sinusoids:
    1000 sigma is wrong by up to 4.

    `prompt` is [B, T, p]; its mask [B, T], in host memory, is True for real tokens, which come first. `shapes` are
    frames, height and width in tokens of the target and of each reference. `through` runs the network, given all that
    this depends on; None for a plain call.
    """
    batch, tokens = picture.shape[:2]
    layout = _Layout(
        prompts=(prompt.shape[1],) * batch if prompt_mask is None else tuple(prompt_mask.sum(dim=1).tolist()),
        tokens=tokens,
        targets=math.prod(shapes[0]),
        is_zero_cond=transformer.zero_cond_t,
    )
    if batch > 1 or prompt_mask is not None:
        prompt = torch.cat([each[:length] for each, length in zip(prompt, layout.prompts, strict=True)]).unsqueeze(0)
        picture = picture.flatten(0, 1).unsqueeze(0)
    angles, indices = _angles(transformer, layout, shapes, picture.device), _indices(layout, picture.device)

    def run(picture: Tensor, sigma_B: Tensor, prompt: Tensor) -> Tensor:
        return _run(transformer, picture, sigma_B, prompt, angles, indices)

    inputs = picture, sigma_B, prompt
    return run(*inputs) if through is None else through((layout, tuple(shapes)), run, *inputs)


def _run(
    transformer: QwenImageTransformer2DModel,
    picture: Tensor,
    sigma_B: Tensor,
    prompt: Tensor,
    angles: Tensor,
    indices: _Indices,
) -> Tensor:
    """The device's part of `predict_tokens`, which a CUDA graph can hold: nothing here depends on a tensor's values."""
    batch = len(sigma_B)
    picture, prompt = transformer.img_in(picture), transformer.txt_in(transformer.txt_norm(prompt))
    if not follows_comfyui(transformer):
        sigma_B = rounded_by_pipelines(sigma_B, picture.dtype)
    if transformer.zero_cond_t:  # the references' rows follow those of the targets
        sigma_B = torch.cat([sigma_B, torch.zeros_like(sigma_B)])
    time = transformer.time_text_embed(sigma_B, picture)
    shared = Shared(time=time, prompt_time=time[:batch], angles=angles, **indices._asdict())
    recomputes = torch.is_grad_enabled() and transformer.gradient_checkpointing
    for block in transformer.transformer_blocks:
        again = transformer._gradient_checkpointing_func if recomputes else None
        picture, prompt = again(block, picture, prompt, shared) if again else block(picture, prompt, shared)
    of_targets = picture.view(batch, -1, picture.shape[-1])
    return transformer.proj_out(transformer.norm_out(of_targets, time[:batch]))


class _Layout(NamedTuple):
    """Lengths of the prompts, one per pair, and the numbers of picture tokens and of target tokens of each pair."""

    prompts: tuple[int, ...]
    tokens: int
    targets: int
    is_zero_cond: bool


class _Indices(NamedTuple):
    """`Shared`'s fields of the same names."""

    targets: slice | Tensor
    picture_rows: Tensor | None
    prompt_rows: Tensor | None
    pairs: tuple[OfPair, ...] | None
    last_pairs: tuple[OfPair, ...] | None


def _angles(
    transformer: QwenImageTransformer2DModel,
    layout: _Layout,
    shapes: Sequence[tuple[int, int, int]],
    device: torch.device,
) -> Tensor:
    """`Shared.angles`."""
    of_picture, of_prompt = transformer.pos_embed([list(shapes)], max_txt_seq_len=max(layout.prompts), device=device)
    of_prompts = (of_prompt[:length] for length in layout.prompts)
    return torch.view_as_real(torch.cat([*of_prompts, *len(layout.prompts) * [of_picture]]))


@lru_cache(maxsize=_LAYOUTS_HELD)
def _indices(layout: _Layout, device: torch.device) -> _Indices:
    """Which tokens are the targets', which row of the noise level's embedding they use, and which see each other."""
    batch, targets = len(layout.prompts), torch.arange(layout.tokens) < layout.targets
    rows = torch.arange(batch).unsqueeze(1) + batch * (layout.is_zero_cond & ~targets)
    picture_rows = rows.flatten().to(device) if batch > 1 or layout.is_zero_cond else None
    if batch == 1:
        return _Indices(slice(0, layout.targets), picture_rows, None, None, None)
    ends = [0, *accumulate([*layout.prompts, *batch * [layout.tokens]])]
    pieces = [torch.arange(start, end) for start, end in pairwise(ends)]
    keys = [torch.cat(of_pair).to(device) for of_pair in zip(pieces[:batch], pieces[batch:], strict=True)]
    queries = torch.arange(batch * layout.targets, device=device).split(layout.targets)
    return _Indices(
        targets=targets.repeat(batch).nonzero().flatten().to(device),
        picture_rows=picture_rows,
        prompt_rows=torch.arange(batch).repeat_interleave(torch.tensor(layout.prompts)).to(device),
        pairs=tuple(OfPair(each, each) for each in keys),
        last_pairs=tuple(map(OfPair, queries, keys)),
    )


def rounded_by_pipelines(sigma_B: Tensor, dtype: torch.dtype) -> Tensor:
    """The noise level [B] that diffusers' pipelines give to a network of `dtype`.

    They round 1000 sigma to `dtype`, divide by 1000 and round again. Because the result has the network's dtype,
    diffusers' time projection also rounds its frequencies to it.
    """
    return (sigma_B * 1000).to(dtype) / 1000
