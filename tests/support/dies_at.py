"""A small encoding and training that ends itself at a file operation: python -m tests.support.dies_at PLAN.json

The process ends with os._exit, so nothing is flushed and no `finally` runs, as after SIGKILL. It dies before an
operation, and in a write after the first half of the bytes. An fsync is not counted: the files before it are those
before the next operation.
"""

from __future__ import annotations

import builtins
import io
import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

DIED = 42  # exit code of a process that ended itself
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_APPEND


class Deaths:
    """Ends the process at the first operation below `root` that is new: of a kind that is not in `seen`.

    A kind is as `kind_of` says, such as "rename run/run.json". With `record`, the process does not end, and the kinds
    are appended to `seen`.
    """

    def __init__(self, root: Path, seen: list[str], *, record: bool) -> None:
        self.root, self.seen, self.record = f"{root}{os.sep}", seen, record
        self.known = set(seen)

    def note(self, operation: str, path: object, last_act: Callable[[], object] = lambda: None) -> None:
        """Called before each operation. `last_act` is done before the process ends."""
        place = os.fsdecode(path) if isinstance(path, str | bytes | os.PathLike) else ""
        if not place.startswith(self.root):
            return
        kind = kind_of(operation, place.removeprefix(self.root))
        if self.record:
            self.seen.append(kind)
        elif kind not in self.known:
            last_act()
            sys.stdout.write(f"{kind}\n")
            sys.stdout.flush()
            os._exit(DIED)

    def listen(self) -> None:
        """Hear of all operations of this process from now on."""
        open_file = io.open

        def heard(event: str, arguments: tuple[Any, ...]) -> None:
            if event == "open" and isinstance(arguments[2], int) and arguments[2] & _WRITES:
                self.note("open", arguments[0])
            elif event == "os.rename":
                self.note("rename", arguments[1])
            elif event in ("os.remove", "os.rmdir") and os.path.lexists(arguments[0]):
                self.note("remove", arguments[0])
            elif event == "os.mkdir" and not os.path.lexists(arguments[0]):
                self.note("mkdir", arguments[0])

        def heard_open(file: Any, mode: str = "r", *rest: Any, **more: Any) -> Any:
            opened = open_file(file, mode, *rest, **more)
            is_ours = isinstance(file, str | os.PathLike) and os.fspath(file).startswith(self.root)
            return _Written(opened, self, file) if is_ours and set(mode) & set("wax+") else opened

        sys.addaudithook(heard)
        os.fsync = lambda _file: None  # only a failing machine needs it, and it takes time
        io.open, builtins.open = heard_open, heard_open


class _Written:
    """An open file whose writes are heard."""

    def __init__(self, file: Any, deaths: Deaths, path: Any) -> None:
        self._file, self._deaths, self._path = file, deaths, path

    def write(self, data: Any) -> int:
        def write_half() -> None:
            self._file.write(data[: len(data) // 2])
            self._file.flush()

        self._deaths.note("write", self._path, write_half)
        return self._file.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> _Written:
        self._file.__enter__()
        return self

    def __exit__(self, *error: Any) -> Any:
        return self._file.__exit__(*error)

    def __iter__(self) -> Any:
        return iter(self._file)


def kind_of(operation: str, place: str) -> str:
    """What an operation on a path below the root has in common with others.

    Files that get their name by renaming are all written in the same way, so openings, writes and removals of their
    temporary files count by suffix. Each other operation changes what a reader sees, so it counts for each place, steps
    included. Only entries of the cache, whose names are digests, and the folders that hold them count together.
    """
    parts = [_final_name(part) if part.startswith(".") else part for part in Path(place).parts]
    if operation in ("open", "write", "remove") and parts != list(Path(place).parts):
        return f"{operation} a temporary {Path(parts[-1]).suffix}"
    name = "/".join(parts)
    for pattern, same in _SAME_PLACES:
        name = re.sub(pattern, same, name)
    return f"{operation} {name}"


_SAME_PLACES = (
    (r"[0-9a-f]{32}[0-9a-f-]*", "#"),
    (r"tfevents.*", "tfevents"),
    (r"^cache/(latents|prompt|picture|datasets|checked|conditioning_image_embeds(/\w+)?)$", "cache/folder"),
    (r"^cache/(latents|prompt|picture|conditioning_image_embeds/\w+)/\w\w\b", "cache/entry/#"),
    (r"/0-[\w-]+\.png", "/0-picture.png"),
)


def _final_name(temporary: str) -> str:
    """The name that a temporary file gets when it is complete."""
    stem, _, rest = temporary.lstrip(".").partition(".")
    suffix = rest.rpartition(".")[2]
    return stem if suffix == "tmp" else f"{stem}.{suffix}"


def encode_and_train(values: dict[str, Any]) -> None:
    """Pair, encode and train as the plan's configuration says."""
    from trainer_core.config import JobConfig, from_json
    from trainer_core.job import encode_job
    from trainer_core.run import train_lora

    job = from_json(JobConfig, values)
    encoded, _ = encode_job(job)
    train_lora(job.train_config(str(encoded.manifest)))


if __name__ == "__main__":
    plan = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    deaths = Deaths(Path(plan["root"]), plan["seen"], record=plan["record"])
    deaths.listen()
    encode_and_train(plan["job"])
    sys.stdout.write("\n".join(deaths.seen) if plan["record"] else "")
