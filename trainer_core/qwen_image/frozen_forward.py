"""The frozen transformer's forward, which computes and keeps less than diffusers' in training, with the same result."""

from __future__ import annotations

import math
from collections.abc import Callable
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

_LAYOUTS_HELD = 8  # combinations of sizes and prompt lengths whose indices are kept on the device
Through = Callable[..., Tensor]  # calls a function of tensors that has a backward pass: see memory/step_graphs.py


def optimise_frozen_forward(transformer: QwenImageTransformer2DModel) -> None:
    """Replace the blocks of a frozen network by ours; the output stays the same."""
    *blocks, last = transformer.transformer_blocks
    transformer.transformer_blocks = nn.ModuleList([*map(EditBlock, blocks), LastBlock(last)])  # type: ignore[arg-type]


class PairShape(NamedTuple):
    """Prompt tokens of a pair, and frames, height and width in tokens of its target and of each reference."""

    prompt: int
    pictures: tuple[tuple[int, int, int], ...]

    @property
    def target(self) -> int:
        """The number of the target's tokens, which are the first of the picture tokens."""
        return math.prod(self.pictures[0])

    @property
    def picture(self) -> int:
        """The number of picture tokens."""
        return sum(map(math.prod, self.pictures))


def predict_tokens(
    transformer: QwenImageTransformer2DModel,
    picture: Tensor,
    sigma_B: Tensor,
    prompt: Tensor,
    shapes: tuple[PairShape, ...],
    through: Through | None = None,
) -> Tensor:
    """Predicted velocity [1, n, c] of the targets' tokens of B pairs of these shapes.

    `picture` [1, L, c] and `prompt` [1, T, p] are the tokens of all pairs, one pair after another, as is the result.

    If the transformer follows ComfyUI, the sinusoids of sigma [B] (float32) are computed in float32. Otherwise sigma
    and their frequencies are rounded as in diffusers' pipelines. In bfloat16 that changes most of the sinusoids:
    1000 sigma is wrong by up to 4.

    `through` runs the network, given all that this depends on; None for a plain call.
    """
    angles, device = _angles(transformer, shapes, picture.device), picture.device
    indices = _indices(shapes, device, is_zero_cond=transformer.zero_cond_t)

    def run(picture: Tensor, sigma_B: Tensor, prompt: Tensor) -> Tensor:
        return _run(transformer, picture, sigma_B, prompt, shapes, angles, indices)

    inputs = picture, sigma_B, prompt
    return run(*inputs) if through is None else through((transformer.zero_cond_t, shapes), run, *inputs)


def _run(
    transformer: QwenImageTransformer2DModel,
    picture: Tensor,
    sigma_B: Tensor,
    prompt: Tensor,
    shapes: tuple[PairShape, ...],
    angles: Tensor,
    indices: _Indices,
) -> Tensor:
    """The device's part of `predict_tokens`, which a CUDA graph can hold: nothing here depends on a tensor's values."""
    picture, prompt = transformer.img_in(picture), transformer.txt_in(transformer.txt_norm(prompt))
    if not follows_comfyui(transformer):
        sigma_B = rounded_by_pipelines(sigma_B, picture.dtype)
    if transformer.zero_cond_t:  # the references' rows follow those of the targets
        sigma_B = torch.cat([sigma_B, torch.zeros_like(sigma_B)])
    time = transformer.time_text_embed(sigma_B, picture)
    shared = Shared(time=time, prompt_time=time[: len(shapes)], angles=angles, **indices._asdict())
    recomputes = torch.is_grad_enabled() and transformer.gradient_checkpointing
    for block in transformer.transformer_blocks:
        again = transformer._gradient_checkpointing_func if recomputes else None
        picture, prompt = again(block, picture, prompt, shared) if again else block(picture, prompt, shared)
    of_pairs = zip(picture.split([shape.target for shape in shapes], dim=1), time.split(1), strict=False)
    return transformer.proj_out(torch.cat([transformer.norm_out(*each) for each in of_pairs], dim=1))


class _Indices(NamedTuple):
    """`Shared`'s fields of the same names."""

    targets: slice | Tensor
    picture_rows: Tensor | None
    prompt_rows: Tensor | None
    pairs: tuple[OfPair, ...] | None
    last_pairs: tuple[OfPair, ...] | None


def _angles(transformer: QwenImageTransformer2DModel, shapes: tuple[PairShape, ...], device: torch.device) -> Tensor:
    """`Shared.angles`."""
    angles = [
        transformer.pos_embed([list(shape.pictures)], max_txt_seq_len=shape.prompt, device=device) for shape in shapes
    ]
    of_pictures, of_prompts = zip(*angles, strict=True)
    return torch.view_as_real(torch.cat([*of_prompts, *of_pictures]))


@lru_cache(maxsize=_LAYOUTS_HELD)
def _indices(shapes: tuple[PairShape, ...], device: torch.device, *, is_zero_cond: bool) -> _Indices:
    """Which tokens are the targets', which row of the noise level's embedding they use, and which see each other."""
    prompts, pictures, targets = zip(*((shape.prompt, shape.picture, shape.target) for shape in shapes), strict=True)
    count, numbers = len(shapes), torch.arange(len(shapes))
    is_target = torch.cat([torch.arange(shape.picture) < shape.target for shape in shapes])
    rows = numbers.repeat_interleave(torch.tensor(pictures)) + count * (is_zero_cond & ~is_target)
    picture_rows = rows.to(device) if count > 1 or is_zero_cond else None
    if count == 1:
        return _Indices(slice(0, targets[0]), picture_rows, None, None, None)
    pieces = [torch.arange(start, end) for start, end in pairwise([0, *accumulate([*prompts, *pictures])])]
    keys = [torch.cat(of_pair).to(device) for of_pair in zip(pieces[:count], pieces[count:], strict=True)]
    queries = torch.arange(sum(targets), device=device).split(targets)
    return _Indices(
        targets=is_target.nonzero().flatten().to(device),
        picture_rows=picture_rows,
        prompt_rows=numbers.repeat_interleave(torch.tensor(prompts)).to(device),
        pairs=tuple(OfPair(each, each) for each in keys),
        last_pairs=tuple(map(OfPair, queries, keys)),
    )


def rounded_by_pipelines(sigma_B: Tensor, dtype: torch.dtype) -> Tensor:
    """The noise level [B] that diffusers' pipelines give to a network of `dtype`.

    They round 1000 sigma to `dtype`, divide by 1000 and round again. Because the result has the network's dtype,
    diffusers' time projection also rounds its frequencies to it.
    """
    return (sigma_B * 1000).to(dtype) / 1000
