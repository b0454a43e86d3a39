"""Says in words how the settings and the dataset of a run differ from those that it was started with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..conditioning.encoded import EncodedDataset, find_manifest, load_encoded, trained_values
from ..errors import DatasetError, RunFolderError
from ..json_text import read_json
from ..qwen_image.flavours import title_of
from ..qwen_image.latents import VAE_FACTOR
from ..text import brief, shown

DATASET = "dataset.json"
_MAX_BYTES = 1 << 30  # of dataset.json, which has a line of about 1 kB per pair
_DATASET_SETTING = "encoded"  # the digest of the dataset in a run's key
_MOST_LINES, _MOST_NAMES = 20, 3

Change = tuple[str, Any, Any]  # dotted name of a setting, value in the folder, value of this start
Row = Mapping[str, Any]  # a pair, as in a manifest


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[Change]:
    """(dotted name, old value, new value) of every setting that differs."""
    found: list[Change] = []
    for name in sorted({*old, *new}):
        before, after = old.get(name), new.get(name)
        if isinstance(before, dict) and isinstance(after, dict):
            found += differences(before, after, f"{prefix}{name}.")
        elif before != after:
            found.append((prefix + name, before, after))
    return found


def in_words(run_dir: Path, changes: Sequence[Change], encoded: EncodedDataset | None) -> str:
    """One line per change, each starting with "- "."""
    lines: list[str] = []
    for name, old, new in changes:
        if name == _DATASET_SETTING:
            lines += _dataset_in_words(run_dir, str(old), encoded)
        else:
            lines.append(f"{shown(name)}: was {_value(name, old)}, now {_value(name, new)}")
    more = [f"and {len(lines) - _MOST_LINES} more"] if len(lines) > _MOST_LINES else []
    return "\n".join(f"  - {line}" for line in [*lines[:_MOST_LINES], *more])


def _value(name: str, value: Any) -> str:
    is_flavour = name.rpartition(".")[2] == "flavour" and isinstance(value, str)
    return brief(title_of(value) if is_flavour else value)


def _dataset_in_words(run_dir: Path, digest: str, encoded: EncodedDataset | None) -> list[str]:
    unknown = ["the dataset is another one: pairs, captions, pictures or their sizes have changed"]
    before = _values_before(run_dir, digest, encoded)
    if encoded is None or before is None:
        return unknown
    try:
        found = list(dataset_changes(before, trained_values(encoded)))
    except (LookupError, TypeError, AttributeError):  # dataset.json is damaged
        return unknown
    return found or ["the dataset was encoded in another way, for example with another VAE or text encoder"]


def _values_before(run_dir: Path, digest: str, encoded: EncodedDataset | None) -> Row | None:
    """The values of the run's dataset, from the run folder, or else from a manifest that is still in the cache."""
    try:
        values = read_json(run_dir / DATASET, finite=False, max_bytes=_MAX_BYTES, error=RunFolderError)
        return values if isinstance(values, dict) else None
    except RunFolderError:
        pass
    try:
        manifest = find_manifest(encoded.cache_dir, digest) if encoded else None
        return trained_values(load_encoded(manifest)) if manifest else None
    except DatasetError:
        return None


def dataset_changes(old: Row, new: Row) -> Iterator[str]:
    """How the training pairs differ. Both are values of `trained_values`."""
    re_encoded = [name for name in ("flavour", "preprocessing") if old.get(name) != new.get(name)]
    for name in re_encoded:
        yield f"{name} of the dataset: was {_value(name, old.get(name))}, now {_value(name, new.get(name))}"
    before, after = ({str(row["key"]): row for row in values["pairs"]} for values in (old, new))
    added, removed = [name for name in after if name not in before], [name for name in before if name not in after]
    contents = {_content(before[name]) for name in removed}
    if added and len(added) == len(removed) and contents == {_content(after[name]) for name in added}:
        yield f"{_pairs(added)} got another name"
        added = removed = []
    if added:
        yield f"{_pairs(added)} {_were(added)} added"
    if removed:
        yield f"{_pairs(removed)} {_were(removed)} removed"
    kinds = [kind for kind in _KINDS if not re_encoded or kind[0] is not _encoded_otherwise]
    common = [(before[name], after[name]) for name in before if name in after]
    reworded = [both for both in common if _differ("captions")(*both)]
    if reworded:  # pictures and sizes may have changed too
        yield f"the captions of {_of(reworded)} changed"
    for is_changed, said in kinds:
        changed = [both for both in common if is_changed(*both)]
        common = [both for both in common if not is_changed(*both)]  # each pair is named once
        if changed:
            yield said(changed)
    if not reworded and list(before) != list(after) and before.keys() == after.keys() and len(common) == len(before):
        yield "the pairs are in another order"


def _content(row: Row) -> str:
    return str(sorted((name, value) for name, value in row.items() if name != "key"))


def _differ(*names: str) -> Callable[[Row, Row], bool]:
    return lambda old, new: any(old.get(name) != new.get(name) for name in names)


def _sizes(changed: list[tuple[Row, Row]]) -> str:
    old, new = changed[0]
    if old["shape"] != new["shape"]:
        sizes = f"was {_size(old['shape'])} pixels, now {_size(new['shape'])}"
        return f"{_of(changed)} {_have(changed)} another size: the first {sizes}"
    before, after = (" and ".join(map(_size, row["reference_shapes"])) or "none" for row in (old, new))
    return (
        f"the references of {_of(changed)} have another size or number: those of the first were {before}, now {after}"
    )


def _size(shape: Sequence[int]) -> str:
    return f"{shape[2] * VAE_FACTOR}x{shape[1] * VAE_FACTOR}"


def _encoded_otherwise(old: Row, new: Row) -> bool:
    return not _differ("captions")(old, new) and _differ(*_TEXTS)(old, new)


_TEXTS = ("prompts", "empty", "alone", "alone_empty")
_KINDS: tuple[tuple[Callable[[Row, Row], bool], Callable[[list[tuple[Row, Row]]], str]], ...] = (
    (_differ("shape", "reference_shapes"), _sizes),
    (
        _differ("target", "references", "reference_files"),
        lambda changed: f"{_of(changed)} {_have(changed)} other pictures or crops",
    ),
    (_differ("mask"), lambda changed: f"{_of(changed)} {_have(changed)} another mask"),
    (_differ("differences"), lambda changed: f"{_of(changed)} {_have(changed)} other pixel differences"),
    (_encoded_otherwise, lambda changed: f"the prompts of {_of(changed)} were encoded in another way"),
    (_differ("is_regularisation"), lambda changed: f"is_regularisation_data of {_of(changed)} changed"),
    (
        _differ("timestep_sampling_offset"),
        lambda changed: f"timestep_sampling_offset of {_of(changed)} changed",
    ),
    (_differ("repeats", "probability"), lambda changed: f"repeats or probability of {_of(changed)} changed"),
)


def _of(changed: list[tuple[Row, Row]]) -> str:
    return _pairs([str(new["key"]) for _, new in changed])


def _pairs(names: Sequence[str]) -> str:
    """ "2 pairs ('a', 'b')"."""
    first = ", ".join(repr(shown(name)) for name in names[:_MOST_NAMES])
    more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    return f"{len(names)} {'pair' if len(names) == 1 else 'pairs'} ({first}{more})"


def _were(names: Sequence[str]) -> str:
    return "was" if len(names) == 1 else "were"


def _have(changed: Sequence[object]) -> str:
    return "has" if len(changed) == 1 else "have"
