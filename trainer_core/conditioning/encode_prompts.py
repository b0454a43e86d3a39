"""Encode captions with Qwen2.5-VL, each together with its references. The vision tower encodes each reference once."""

from __future__ import annotations

from itertools import count
from typing import Any

from ..data.images import open_checked_picture
from ..errors import DatasetError
from ..events import Observer, raise_if_stopped
from ..files import is_whole, write_tensors
from ..qwen_image.text_encoder import Picture, VisualTokens
from .encode_pictures import check_shape
from .encoders import EncodePrompts, PromptEncoder
from .encoding_plan import PlannedPair
from .entry import entry_path
from .image_embeds import ImageEmbeds
from .pictures import vision_picture
from .read_ahead import or_error, read_ahead

VisualInput = tuple[str, Picture | VisualTokens]  # a reference: cache key, and cached visual tokens or its picture


def encode_prompts(
    missing: list[tuple[PlannedPair, dict[str, str]]],
    encoder: PromptEncoder,
    image_embeds: ImageEmbeds,
    width: int,
    observer: Observer,
) -> list[str]:
    """Write the embeddings of `missing` prompts: pairs, each with its missing prompts (text by cache key).

    `width` is the required embedding width D. Returns the problems of unreadable references.
    """
    problems: list[str] = []
    total = sum(len(prompts) for _, prompts in missing)
    if not total:
        return problems
    raise_if_stopped(observer)
    progress = count(1)
    with encoder.loaded(observer) as network:
        for (_, prompts), found in read_ahead(missing, or_error(lambda each: _references(each[0], image_embeds))):
            if isinstance(found, DatasetError):
                problems.append(str(found))
                continue
            seen = [_see(network, image_embeds, *each) for each in found]
            for key, text in prompts.items():
                raise_if_stopped(observer)
                path = entry_path(image_embeds.cache_dir, "prompt", key)
                if not is_whole(path):
                    embeds = network.encode_seen(text, seen)
                    check_shape("text encoder", embeds, (width,))
                    write_tensors(path, {"prompt": embeds})
                observer.on_progress("Encoding prompts", next(progress), total)
    return problems


def _references(planned: PlannedPair, image_embeds: ImageEmbeds) -> list[VisualInput]:
    """For each reference its cached visual tokens, or else its picture."""
    found: list[VisualInput] = []
    views = zip(planned.pair.references, planned.pair.digests[1:], planned.plan.vision, strict=True)
    for path, content, view in views:
        key = image_embeds.key(content, view)
        known = image_embeds.find(key)
        found.append((key, known or vision_picture(open_checked_picture(path, content), view)))
    return found


def _see(network: EncodePrompts, image_embeds: ImageEmbeds, key: str, found: Picture | VisualTokens) -> Any:
    """The visual tokens of a reference: given, cached meanwhile by an earlier pair, or computed and then cached."""
    if isinstance(found, VisualTokens):
        return found
    if known := image_embeds.find(key):
        return known
    seen = network.see(found)
    image_embeds.keep(key, seen)
    return seen
