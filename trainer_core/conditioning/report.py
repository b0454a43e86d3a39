"""What was encoded, for people."""

from __future__ import annotations

from collections import Counter

from ..data.images import shown
from ..qwen_image.latents import VAE_FACTOR
from .encoded import EncodedDataset

_MOST_KEYS = 20


def encoding_report(encoded: EncodedDataset) -> str:
    """Numbers of pairs, their sizes, and what was left out. A size of few pairs is told, and trained all the same."""
    lines = [f"{len(encoded.pairs)} pairs to train on, {len(encoded.validation_pairs)} held out for validation."]
    sizes = Counter(entry.shape for entry in encoded.pairs)
    for (_, height, width), count in sorted(sizes.items(), key=lambda item: (-item[1], item[0])):
        lines.append(f"  {width * VAE_FACTOR} x {height * VAE_FACTOR}: {count}")
    lonely = sum(count == 1 for count in sizes.values())
    if lonely:
        lines.append(
            f"Sizes of a single pair: {lonely}. They are trained like all others, but a train_batch_size above 1 can't "
            "put them together with another pair."
        )
    lines += _epoch(encoded)
    if encoded.left_out:
        names = ", ".join(map(shown, encoded.left_out[:_MOST_KEYS]))
        more = ", …" if len(encoded.left_out) > _MOST_KEYS else ""
        lines.append(f"Left out, smaller than minimum_image_size: {len(encoded.left_out)} ({names}{more}).")
    if encoded.changed:
        names = ", ".join(map(shown, encoded.changed[:_MOST_KEYS])) + (
            ", …" if len(encoded.changed) > _MOST_KEYS else ""
        )
        lines.append(
            f"Files that changed, came or went while encoding: {len(encoded.changed)} ({names}). What is encoded is "
            "what was paired before; run again to take the changes in."
        )
    return "\n".join(lines)


def _epoch(encoded: EncodedDataset) -> list[str]:
    """How long an epoch of a mix is, and how references are seen."""
    lines = []
    if any(pair.repeats or pair.probability < 1 for pair in encoded.pairs):
        turns = sum((1 + pair.repeats) * pair.probability for pair in encoded.pairs)
        lines.append(f"An epoch has about {turns:.0f} turns, by repeats and probability.")
    several = Counter(len(pair.alone) for pair in encoded.pairs if pair.alone)
    lines += [f"Pairs that show one of {sets} references a turn: {count}." for sets, count in sorted(several.items())]
    flying = sum(len(pair.reference_files) for pair in encoded.pairs)
    if flying:
        lines.append(f"References encoded on the fly while training, with the VAE in memory: {flying}.")
    alone = sum(not pair.references for pair in encoded.pairs)
    if alone:
        lines.append(f"Pairs without a reference, trained as text-to-image: {alone}.")
    return lines
