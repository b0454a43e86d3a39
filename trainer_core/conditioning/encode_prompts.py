"""Captions through Qwen2.5-VL, each with its references, which the vision tower sees once."""

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
from .entry import entry_path
from .image_embeds import ImageEmbeds
from .jobs import PlannedPair
from .pictures import vision_picture
from .read_ahead import or_error, read_ahead

Found = tuple[str, Picture | VisualTokens]  # key of a reference's visual tokens; these, or the picture to see


def encode_prompts(
    jobs: list[tuple[PlannedPair, dict[str, str]]],
    encoder: PromptEncoder,
    image_embeds: ImageEmbeds,
    width: int,
    observer: Observer,
) -> list[str]:
    """`jobs`: pairs with keys and texts of the prompts they lack. Returns what could not be read."""
    problems: list[str] = []
    total = sum(len(missing) for _, missing in jobs)
    if not total:
        return problems
    raise_if_stopped(observer)
    progress = count(1)
    with encoder.loaded(observer) as network:
        for (_, missing), found in read_ahead(jobs, or_error(lambda job: _references(job[0], image_embeds))):
            if isinstance(found, DatasetError):
                problems.append(str(found))
                continue
            seen = [_see(network, image_embeds, *each) for each in found]
            for key, text in missing.items():
                raise_if_stopped(observer)
                path = entry_path(image_embeds.cache_dir, "prompt", key)
                if not is_whole(path):
                    embeds = network.encode_seen(text, seen)
                    check_shape("text encoder", embeds, (width,))
                    write_tensors(path, {"prompt": embeds})
                observer.on_progress("Encoding prompts", next(progress), total)
    return problems


def _references(planned: PlannedPair, image_embeds: ImageEmbeds) -> list[Found]:
    """Of each reference what is known, or else its picture."""
    found: list[Found] = []
    views = zip(planned.pair.references, planned.pair.digests[1:], planned.plan.vision, strict=True)
    for path, content, view in views:
        key = image_embeds.key(content, view)
        known = image_embeds.find(key)
        found.append((key, known or vision_picture(open_checked_picture(path, content), view)))
    return found


def _see(network: EncodePrompts, image_embeds: ImageEmbeds, key: str, found: Picture | VisualTokens) -> Any:
    """What the vision tower makes of a reference; kept, if a pair before this one has not done so meanwhile."""
    if isinstance(found, VisualTokens):
        return found
    if known := image_embeds.find(key):
        return known
    seen = network.see(found)
    image_embeds.keep(key, seen)
    return seen
