"""Decode every picture once to check it. Results are kept on disk and reused while the file stays unchanged."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any, Literal, NamedTuple

from PIL import Image

from ..config.dataset import ColorProfiles
from ..errors import DatasetError
from ..events import Observer
from ..geometry import Size
from .colour_profiles import ColourProfile
from .images import accepts_cut_pictures, content_name, decode_picture, open_picture_file, stream_digest
from .in_threads import in_threads
from .kept import read_kept, write_kept
from .masks import MaskSource, MaskSpread, mask_grey, mask_spread

_FORMAT = 3  # of the results file; raise it when the checks change
_SETTLED_NS = 2 * 10**9  # a newer file could change again without changing its timestamp

State = tuple[int, int, int, int]  # size in bytes, mtime (ns), ctime (ns), inode


class Checked(NamedTuple):
    """Properties of a readable picture. `sha256` is that of the file; see `Picture` for the profile and corrections.

    `mask` says where the weights of a mask come from; empty for other pictures. `spread` is None for other pictures.
    """

    sha256: str
    size: Size
    animated: bool
    transparent: bool
    profile: ColourProfile | None
    corrections: tuple[str, ...]
    mask: MaskSource | Literal[""] = ""
    spread: MaskSpread | None = None

    def converted(self, color_profiles: ColorProfiles) -> bool:
        """Whether this picture is converted to sRGB under this setting. A mask never is."""
        usable = self.profile is not None and not self.profile.problem
        return usable and color_profiles == "convert" and not self.mask

    def content(self, color_profiles: ColorProfiles) -> str:
        """The `content_name` of the picture, or of the mask."""
        read_as = (self.mask,) if self.mask not in ("", "grey") else ()
        return content_name(self.sha256, (*self.corrections, *read_as), to_srgb=self.converted(color_profiles))


CheckedPictures = dict[Path, Checked | DatasetError]


def check_pictures(
    paths: Iterable[Path], observer: Observer, *, masks: Collection[Path] = (), memory: Path | None = None
) -> CheckedPictures:
    """The properties of each picture, or its error. Decodes several at a time and keeps no pixels.

    `memory` is a JSON file with earlier results. Pictures whose files are unchanged since then are not opened again.

    Raises:
        Interrupted: the observer asked to stop; results so far are saved.
    """
    Image.init()  # registers the formats; concurrent first opens would race
    paths = list(dict.fromkeys(paths))
    states = {path: state for path in paths if memory is not None and (state := _state(path)) is not None}
    known = _recall(memory, states, masks)
    results: CheckedPictures = {}

    def work(path: Path) -> Checked | DatasetError:
        return _check(path, is_mask=path in masks)

    try:
        new = [path for path in paths if path not in known]
        for done, (path, result) in enumerate(in_threads(work, new, observer, "check-pictures")):
            results[path] = result
            observer.on_progress("Checking pictures", done + 1, len(new))
    finally:
        found = {**known, **{path: each for path, each in results.items() if isinstance(each, Checked)}}
        if memory is not None and found.keys() != known.keys() and not accepts_cut_pictures():
            _remember(memory, found, states)
    return {path: known[path] if path in known else results[path] for path in paths}


def _check(path: Path, *, is_mask: bool) -> Checked | DatasetError:
    try:
        with open_picture_file(path) as file:
            sha256 = stream_digest(file)
            picture = decode_picture(file, path, convert=False)
            found = Checked(
                sha256,
                Size(*picture.pixels.size),
                picture.animated,
                picture.alpha is not None,
                picture.profile,
                picture.corrections,
            )
            if not is_mask:
                return found
            grey, source = mask_grey(picture, path)
            return found._replace(mask=source, spread=mask_spread(grey))
    except DatasetError as error:
        return error


def _state(path: Path) -> State | None:
    try:
        state = path.stat()
    except OSError:
        return None
    return state.st_size, state.st_mtime_ns, state.st_ctime_ns, state.st_ino


def _recall(memory: Path | None, states: dict[Path, State], masks: Collection[Path]) -> dict[Path, Checked]:
    """Saved results of pictures that are unchanged. A results file that can't be read counts as empty."""

    def known(stored: Any) -> dict[Path, Checked]:
        rows = stored["pictures"] if stored["format"] == _FORMAT else {}
        found = ((path, state, rows[str(path)]) for path, state in states.items() if str(path) in rows)
        unchanged = {path: _from_json(values) for path, state, (then, values) in found if tuple(then) == state}
        return {path: each for path, each in unchanged.items() if (path in masks) == bool(each.mask)}

    return {} if accepts_cut_pictures() else read_kept(memory, known)


def _from_json(values: Any) -> Checked:
    sha256, size, animated, transparent, profile, corrections, mask, spread = values
    profile, spread = profile and ColourProfile(*profile), spread and MaskSpread(*spread)
    return Checked(sha256, Size(*size), animated, transparent, profile, tuple(corrections), mask, spread)


def _remember(memory: Path, found: dict[Path, Checked], states: dict[Path, State]) -> None:
    """Save results, except of files written within the last 2 seconds, which may still change unnoticed."""
    now = time.time_ns()
    rows = {
        str(path): [states[path], each]
        for path, each in found.items()
        if path in states and now - max(states[path][1:3]) > _SETTLED_NS and _state(path) == states[path]
    }
    write_kept(memory, {"format": _FORMAT, "pictures": rows})
