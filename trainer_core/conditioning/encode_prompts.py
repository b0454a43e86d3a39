"""Encode captions with Qwen2.5-VL, each together with its references. The vision tower encodes each reference once."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from itertools import count, islice
from typing import Any, NamedTuple

from ..data.images import open_checked_picture
from ..errors import DatasetError
from ..events import Observer, raise_if_stopped
from ..files import is_whole
from ..qwen_image.text_encoder import Picture, VisualTokens
from .encode_pictures import check_shape
from .encoders import EncodePrompts, PromptEncoder
from .encoding_plan import PlannedPair
from .entry import entry_path
from .image_embeds import ImageEmbeds
from .pictures import vision_picture
from .read_ahead import WRITE_BEHIND, Write, or_error, read_ahead, write_behind

MissingPrompts = tuple[PlannedPair, dict[str, str]]  # a pair and its missing prompts: texts by cache key
_PAIRS_AT_ONCE = 8  # pairs whose references may share a forward pass of the vision tower


class VisualInput(NamedTuple):
    """A reference: the cache key of its visual tokens (or empty), and its cached tokens or else its picture."""

    key: str
    found: Picture | VisualTokens


def encode_prompts(
    missing: list[MissingPrompts], encoder: PromptEncoder, image_embeds: ImageEmbeds, width: int, observer: Observer
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
    encoding: deque[str] = deque()  # cache keys of the prompts that the network has taken
    taken: set[str] = set()

    def prompts(pairs: Iterator[tuple[dict[str, str], list[Any]]]) -> Iterator[tuple[str, list[Any]]]:
        for texts, seen in pairs:
            for key, text in texts.items():
                raise_if_stopped(observer)
                if key in taken or is_whole(entry_path(image_embeds.cache_dir, "prompt", key)):
                    observer.on_progress("Encoding prompts", next(progress), total)
                    continue
                taken.add(key)
                encoding.append(key)
                yield text, seen

    with encoder.loaded(observer) as network, write_behind() as write:
        sight = _Sight(network, image_embeds, write, observer)
        for embeds in network.encode_all(prompts(sight.of_pairs(missing, problems))):
            check_shape("text encoder", embeds, (width,))
            write(entry_path(image_embeds.cache_dir, "prompt", encoding.popleft()), {"prompt": embeds})
            observer.on_progress("Encoding prompts", next(progress), total)
    return problems


class _Sight:
    """What the text encoder sees of the references."""

    def __init__(self, network: EncodePrompts, image_embeds: ImageEmbeds, write: Write, observer: Observer) -> None:
        self._network, self._embeds, self._write, self._observer = network, image_embeds, write, observer
        self._recent: dict[str, Any] = {}  # the last results, which may not be on the disk yet

    def of_pairs(
        self, missing: list[MissingPrompts], problems: list[str]
    ) -> Iterator[tuple[dict[str, str], list[Any]]]:
        """The missing prompts of each pair, with what is seen. Adds the problems of unreadable references."""
        # References of one size follow each other, so that they can share a forward pass.
        by_size = sorted(missing, key=lambda each: [view.size for view in each[0].plan.vision])
        reading = read_ahead(by_size, or_error(lambda each: _references(each[0], self._embeds)))
        while chunk := list(islice(reading, _PAIRS_AT_ONCE)):
            problems += [str(found) for _, found in chunk if isinstance(found, DatasetError)]
            pairs = [(texts, found) for (_, texts), found in chunk if not isinstance(found, DatasetError)]
            seen = self._see([each for _, found in pairs for each in found])
            for texts, found in pairs:
                yield texts, list(islice(seen, len(found)))

    def _see(self, inputs: Sequence[VisualInput]) -> Iterator[Any]:
        """Visual tokens of each reference: as given, from the cache, or else computed and written to the cache."""
        names = [each.key or str(number) for number, each in enumerate(inputs)]  # equal keys: the same picture
        known: dict[str, Any] = {}
        for name, (key, found) in zip(names, inputs, strict=True):
            if name not in known:
                given = found if isinstance(found, VisualTokens) else None
                known[name] = given or self._recent.get(key) or self._embeds.find(key)
        new = {name: each for name, each in zip(names, inputs, strict=True) if known[name] is None}
        for name, tokens in zip(new, self._network.see_all(self._pictures(new.values())), strict=True):
            known[name] = tokens
            if new[name].key:
                self._keep(name, tokens)
        return iter([known[name] for name in names])

    def _pictures(self, inputs: Iterable[VisualInput]) -> Iterator[Any]:
        for each in inputs:
            raise_if_stopped(self._observer)
            yield each.found

    def _keep(self, key: str, tokens: VisualTokens) -> None:
        self._write(self._embeds.path(key), {"tokens": tokens.tokens, "grid": tokens.grid})
        self._recent[key] = tokens
        if len(self._recent) > WRITE_BEHIND:
            del self._recent[next(iter(self._recent))]


def _references(planned: PlannedPair, image_embeds: ImageEmbeds) -> list[VisualInput]:
    """For each reference its cached visual tokens, or else its picture."""
    found: list[VisualInput] = []
    views = zip(planned.pair.references, planned.pair.digests[1:], planned.plan.vision, strict=True)
    for path, content, view in views:
        key = image_embeds.key(content, view)
        known = image_embeds.find(key)
        found.append(VisualInput(key, known or vision_picture(open_checked_picture(path, content), view)))
    return found
