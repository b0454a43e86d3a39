"""The entries of multidatabackend.json and their roles: training, validation, references, masks or caches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..errors import ConfigError
from ..settings import did_you_mean
from ..text import brief, shown
from .section import Section

CACHES = ("text_embeds", "image_embeds", "conditioning_image_embeds")
MASKS = ("mask", "segmentation")


def ids_of(value: object) -> list[Any]:
    """The ids as a list. `value` is one id, a list of ids, or empty."""
    return [value] if isinstance(value, str) else list(value) if isinstance(value, list) else [value] if value else []


class Backends:
    """The enabled entries by id, with their roles."""

    def __init__(self, entries: object, eval_ids: list[Any], notes: list[str]) -> None:
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise ConfigError(
                f"The data file must be a list of data sets, each an object with an `id`, got {brief(entries)}."
            )
        self.entries: dict[str, dict[str, Any]] = {}
        for number, entry in enumerate(entries):
            name = entry.get("id")
            if not isinstance(name, str) or not name:
                raise ConfigError(f"Data set {number + 1} of the data file has no `id`. Add one.")
            if name in self.entries:
                raise ConfigError(f"Two data sets have the id {brief(name)}. Give each its own id.")
            section = Section(entry, shown(name), [])
            if section.truth("disabled", "disable"):
                notes.append(f"{shown(name)}: left out because it is disabled.")
            else:
                self.entries[name] = entry
        self.eval_ids = [self.named(name, "eval_dataset_id", tuple(self.entries)) for name in eval_ids]
        self.eval_ids += [name for name in self.of_kind("eval") if name not in self.eval_ids]

    def kind(self, name: str) -> str:
        """The dataset_type: image, conditioning or another one."""
        entry = self.entries[name]
        # in the Kontext document, references have a conditioning_type but no dataset_type
        kind = entry.get("dataset_type") or ("conditioning" if entry.get("conditioning_type") else "image")
        return kind if isinstance(kind, str) else brief(kind)

    def of_kind(self, *kinds: str) -> tuple[str, ...]:
        """Ids of the entries of these types, in file order."""
        return tuple(name for name in self.entries if self.kind(name) in kinds)

    def named_embeds(self) -> set[Any]:
        """Ids of the visual token caches that data sets refer to."""
        names = (entry.get("conditioning_image_embeds") for entry in self.entries.values())
        return {name for name in names if isinstance(name, str)}

    def text_embeds_of(self, name: object) -> str:
        """Id of the text_embeds entry that a data set uses: the named one, or else the default; "" if there is none."""
        known = self.of_kind("text_embeds")
        default = (each for each in known if self.entries[each].get("default"))
        return name if isinstance(name, str) and name in known else next(default, known[0] if len(known) == 1 else "")

    def named(self, name: object, key: str, known: Sequence[str]) -> str:
        """Return `name` if it is one of `known`.

        Raises:
            ConfigError: it is not; lists the known names.
        """
        if isinstance(name, str) and name in known:
            return name
        there = (
            f"It must be one of {shown(', '.join(known))}." if known else "The data file has no data set of that type."
        )
        raise ConfigError(f"{key} refers to {brief(name)}. {there}{did_you_mean(name, known)}")

    def main(self) -> tuple[str, ...]:
        """Ids of the data sets for training and validation. Those without references are text-to-image.

        Raises:
            ConfigError: there is no data set with references to train on.
        """
        candidates = self.of_kind("image", "eval")
        paired = tuple(name for name in candidates if self.entries[name].get("conditioning_data") or self.made_of(name))
        if set(paired) - set(self.eval_ids):
            linked = [each for entry in self.entries.values() for each in ids_of(entry.get("conditioning_data"))]
            return tuple(name for name in candidates if name in paired or name not in linked)
        candidates = tuple(name for name in candidates if name not in self.eval_ids)
        references = ", ".join(self.of_kind("conditioning")) or "none in this file"
        raise ConfigError(
            f"No data set to train on: one of {shown(', '.join(candidates)) or 'dataset_type image'} needs "
            f"`conditioning_data` with the ids of its references (dataset_type conditioning: {shown(references)})."
        )

    def made_of(self, name: str) -> tuple[str, ...]:
        """Ids of the references and masks that name this data set in source_dataset_id, in file order."""
        conditioning = self.of_kind("conditioning")
        return tuple(each for each in conditioning if self.entries[each].get("source_dataset_id") == name)
