"""The text report of an encoded dataset."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple

from ..config import EncodingConfig, FlavourName
from ..data.pairing import EditDataset
from ..geometry import Size
from ..qwen_image.flavours import FLAVOURS
from ..qwen_image.latents import VAE_FACTOR
from ..text import counted, shown
from .encoded import EncodedDataset
from .pictures import Framing, plan_pair

_MOST_KEYS = 20
_MOST_SIZES = 12


def encoding_report(encoded: EncodedDataset) -> str:
    """Number of pairs, their sizes, the length of an epoch, and what was left out or changed."""
    trained = encoded.trained_too(encoded)
    pairs, held_out = counted(len(encoded.pairs), "pair"), len(encoded.validation_pairs) - trained
    lines = [f"{pairs} to train on, {held_out} held out for validation."]
    if trained:
        lines.append(
            f"Pairs to train on that are also validated: {trained}. Their validation loss is a loss on training pairs."
        )
    sizes = Counter(entry.shape for entry in encoded.pairs)
    for (_, height, width), count in sorted(sizes.items(), key=lambda item: (-item[1], item[0])):
        lines.append(f"  {width * VAE_FACTOR} x {height * VAE_FACTOR}: {count}")
    targets_and_references = Counter(
        _Sizes(_pixels(entry.shapes[0]), _pixels(shape)) for entry in encoded.pairs for shape in entry.shapes[1:]
    )
    lines += _scales(targets_and_references)
    lines += _epoch(encoded)
    if encoded.left_out:
        names = ", ".join(map(shown, encoded.left_out[:_MOST_KEYS]))
        more = ", …" if len(encoded.left_out) > _MOST_KEYS else ""
        lines.append(f"Left out because smaller than minimum_image_size: {len(encoded.left_out)} ({names}{more}).")
    if encoded.changed:
        names = ", ".join(map(shown, encoded.changed[:_MOST_KEYS]))
        more = ", …" if len(encoded.changed) > _MOST_KEYS else ""
        lines.append(
            f"Files added, changed or removed while encoding: {len(encoded.changed)} ({names}{more}). The dataset is "
            "encoded without these changes; run again to include them."
        )
    return "\n".join(lines)


def scale_report(dataset: EditDataset, flavour: FlavourName, encoding: EncodingConfig) -> str:
    """The scale at which training will see the references of a dataset; empty if it has none. Reads no files."""
    counts: Counter[_Sizes] = Counter()
    for pair in dataset.pairs:
        kinds = pair.conditioning_types
        plan = plan_pair(pair.sizes, FLAVOURS[flavour], encoding, pair.key, conditioning_types=kinds)
        counts.update(
            _Sizes(plan.target.size, view.size, _FRAMED[framing])
            for view, framing in zip(plan.references, plan.framings, strict=True)
        )
    return "\n".join(_scales(counts))


_FRAMED: dict[Framing, str] = {
    "alike": "",
    "cropped": ", cropped to the target's aspect ratio",
    "whole": ", whole",
}


class _Sizes(NamedTuple):
    """The sizes of a target and a reference in training, and what is said of the reference's crop."""

    target: Size
    reference: Size
    framed: str = ""


def _scales(counts: Mapping[_Sizes, int]) -> list[str]:
    """Lines about the sizes of targets and references, the most frequent first."""
    if not counts:
        return []
    lines = [
        "References in training, their scale (reference pixels per target pixel, across and down), and their number:"
    ]
    frequent = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    for (target, reference, framed), count in frequent[:_MOST_SIZES]:
        across, down = reference.width / target.width, reference.height / target.height
        lines.append(
            f"  target {target.width} x {target.height}, reference {reference.width} x {reference.height}{framed}: "
            f"{across:.3f} and {down:.3f} ({count})"
        )
    if len(frequent) > _MOST_SIZES:
        lines.append(f"  … and {len(frequent) - _MOST_SIZES} more combinations of sizes.")
    return lines


def _pixels(shape: tuple[int, ...]) -> Size:
    _, height, width = shape
    return Size(width * VAE_FACTOR, height * VAE_FACTOR)


def _epoch(encoded: EncodedDataset) -> list[str]:
    """Lines about the length of a mix's epoch and the use of references."""
    lines = []
    if any(pair.repeats or pair.probability < 1 for pair in encoded.pairs):
        turns = sum((1 + pair.repeats) * pair.probability for pair in encoded.pairs)
        lines.append(f"An epoch uses about {turns:.0f} pairs, because of repeats and probability.")
    if regularising := sum(pair.is_regularisation for pair in encoded.pairs):
        lines.append(f"Regularisation pairs, trained towards the base model's own prediction: {regularising}.")
    offsets = Counter(pair.timestep_sampling_offset for pair in encoded.pairs if pair.timestep_sampling_offset)
    lines += [f"Pairs with timestep_sampling_offset {each:g}: {count}." for each, count in sorted(offsets.items())]
    several = Counter(len(pair.prompts_by_reference) for pair in encoded.pairs if pair.prompts_by_reference)
    lines += [f"Pairs that show one of {sets} references per use: {count}." for sets, count in sorted(several.items())]
    flying = sum(len(pair.reference_files) for pair in encoded.pairs)
    if flying:
        lines.append(f"References encoded on the fly while training, with the VAE in VRAM: {flying}.")
    unreferenced = sum(not pair.references for pair in encoded.pairs)
    if unreferenced:
        lines.append(f"Pairs without a reference, trained as text-to-image: {unreferenced}.")
    return lines
