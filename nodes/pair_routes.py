"""HTTP routes about data sets in ComfyUI's input folder. Requests use names, never paths; GET changes nothing.

`{set}` is the name of a data set, `{side}` is reference, reference_2, reference_3 or target, `{file}` the name of a
picture, with / written as %2F if it is in a subfolder.

GET  /qwen_edit_trainer/data_sets                      all data sets, and the limits of uploads
POST /qwen_edit_trainer/data_sets  {"name"}            make an empty one
GET  /qwen_edit_trainer/data_sets/{set}                pairs, pictures without a partner, captions, marks
GET  /qwen_edit_trainer/data_sets/{set}/pictures/{side}/{file}?edge=256&v=VERSION    one picture, small, as JPEG
POST /qwen_edit_trainer/data_sets/{set}/pictures?side=SIDE&name=FILE    add the picture, caption or ZIP file in the body
POST /qwen_edit_trainer/data_sets/{set}/captions  {"captions": {key: text}} or {"all": text}
POST /qwen_edit_trainer/data_sets/{set}/match     {"pairs": [{"reference", "target", "side"?}]}
POST /qwen_edit_trainer/data_sets/{set}/swap      {"keys": [...] or null, "captions_back": [...]}
POST /qwen_edit_trainer/data_sets/{set}/hold_out  {"keys": [...], "held_out": true}
POST /qwen_edit_trainer/data_sets/{set}/delete    {"pictures": [{"side", "file"}]}
POST /qwen_edit_trainer/data_sets/{set}/restore   {"undo": token}
POST /qwen_edit_trainer/data_sets/{set}/empty_trash  {"state"}   delete the trash for good; `state` as GET told it
POST /qwen_edit_trainer/data_sets/{set}/check     {}   findings of the checks, by pair
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import os
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from aiohttp import web
from aiohttp.http_exceptions import PayloadEncodingError

from ..trainer_core.data_sets import changes, reading
from ..trainer_core.data_sets.adding import LIMITS, add_file, full, is_zip, received_file
from ..trainer_core.data_sets.folders import (
    DataSet,
    create_data_set,
    find_data_sets,
    open_data_set,
    usage,
)
from ..trainer_core.data_sets.moves import changing
from ..trainer_core.data_sets.names import AUTO, REFERENCES
from ..trainer_core.data_sets.thumbnails import EDGES, Thumbnails
from ..trainer_core.data_sets.trash import empty_trash, read_trash
from ..trainer_core.data_sets.use import check_data_set
from ..trainer_core.disk import disk_errors, size_in_words
from ..trainer_core.errors import ConfigError, Interrupted, TrainerError
from ..trainer_core.events import SilentObserver, Stop
from . import host_folders
from .answers import (
    BASE,
    HEADERS,
    PICTURE_HEADERS,
    NotFoundAnswer,
    RefusedAnswer,
    answering,
    is_gone,
    json_answer,
    json_object,
    number,
)

if TYPE_CHECKING:
    from aiohttp.typedefs import Handler

UPLOADS_VARIABLE = "QWEN_EDIT_TRAINER_UPLOADS"
_SETS = f"{BASE}/data_sets"
_BODY_BYTES = 16 << 20
_WRITTEN_BYTES = 1 << 20  # received before they are written
_MOST_UPLOADS = 16  # at a time
_THREADS = 2  # decoding more at a time would slow the server down
_FORMS = ("multipart/form-data", "application/x-www-form-urlencoded", "text/plain")  # sent without a preflight
_SILENT_SECONDS = 60  # after which a sender counts as gone
_MOST_NAMES = 20  # of files in an answer about the trash
_TEXTS = (".txt", ".caption")
_POLL_SECONDS = 0.5

T = TypeVar("T")
Change = Callable[[DataSet, dict[str, Any]], dict[str, Any]]


def add_routes(routes: Any) -> None:
    """Add the routes to a table of aiohttp."""
    routes.get(_SETS)(_answering(_list))
    routes.post(_SETS)(_answering(_create))
    routes.get(f"{_SETS}/{{set}}")(_answering(_one))
    routes.get(f"{_SETS}/{{set}}/pictures/{{side}}/{{file}}")(_answering(_picture))
    routes.post(f"{_SETS}/{{set}}/pictures")(_answering(_upload))
    routes.post(f"{_SETS}/{{set}}/check")(_answering(_check))
    for name, change in _CHANGES.items():
        routes.post(f"{_SETS}/{{set}}/{name}")(_answering(functools.partial(_change, change)))


def _answering(handler: Handler) -> Handler:
    return answering(handler, host_folders.input_dir)


def uploads_allowed() -> bool:
    """Whether pages may change data sets."""
    return os.environ.get(UPLOADS_VARIABLE, "").strip().lower() not in ("off", "0", "no", "false")


def _check_uploads() -> None:
    if not uploads_allowed():
        raise RefusedAnswer(
            403,
            f"This server's owner has turned changes to data sets off (environment variable {UPLOADS_VARIABLE}=off). "
            "Ask the owner to add the pictures, or to turn them on.",
        )


def _data_set(request: web.Request) -> DataSet:
    return open_data_set(host_folders.input_dir(), request.match_info["set"])


async def _list(_request: web.Request) -> web.Response:
    def found() -> list[dict[str, Any]]:
        root, sets = host_folders.input_dir(), list[dict[str, Any]]()
        for name in find_data_sets(root):
            try:
                data_set = open_data_set(root, name)
                pairs, changed = reading.count_pairs(data_set), reading.last_change(data_set)
            except (TrainerError, OSError):  # removed meanwhile
                continue
            sets.append({"name": name, "pairs": pairs, "changed": changed})
        return sets

    limits = LIMITS._asdict()
    return json_answer({"data_sets": await asyncio.to_thread(found), "uploads": uploads_allowed(), "limits": limits})


async def _create(request: web.Request) -> web.Response:
    _check_uploads()
    body = await json_object(request, _BODY_BYTES, '{"name": "..."}')
    made = await asyncio.to_thread(create_data_set, host_folders.input_dir(), body.get("name"))
    return json_answer({"name": made.name})


async def _one(request: web.Request) -> web.Response:
    def contents() -> dict[str, Any]:
        data_set = _data_set(request)
        found, trash = dataclasses.asdict(reading.read_data_set(data_set)), read_trash(data_set)
        notes = [host_folders.without_paths(note) for note in found["notes"]]
        thrown = {**dataclasses.asdict(trash), "size": size_in_words(trash.bytes)}
        thrown["newest_files"] = trash.newest_files[:_MOST_NAMES]
        return {**found, "notes": notes, "trash": thrown}

    return json_answer(await asyncio.to_thread(contents))


# Pictures


@functools.cache
def _thumbnails() -> Thumbnails:
    return Thumbnails(host_folders.cache_dir() / "thumbnails")


async def _in_thread_for(kind: str, call: Callable[[], T]) -> T:
    """Runs a call in one of a few threads of its kind, so that no number of such calls delays other requests."""
    return await asyncio.get_running_loop().run_in_executor(_threads(kind), call)


@functools.cache
def _threads(kind: str) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_THREADS, thread_name_prefix=kind)


async def _picture(request: web.Request) -> web.Response:
    edge = number(request.query.get("edge", str(EDGES[-1])))

    def small() -> tuple[bytes, bool]:
        path = _data_set(request).picture(request.match_info["side"], request.match_info["file"])
        is_this = request.query.get("v") == reading.version_of(path)
        try:
            return _thumbnails().get(path, edge), is_this
        except TrainerError as error:
            raise NotFoundAnswer(str(error)) from error

    data, is_this = await _in_thread_for("thumbnails", small)
    return web.Response(body=data, content_type="image/jpeg", headers=PICTURE_HEADERS if is_this else HEADERS)


# Uploads

_uploads = asyncio.BoundedSemaphore(_MOST_UPLOADS)


async def _upload(request: web.Request) -> web.Response:
    """Receive one file into the data set's folder under a hidden name, then check and add it."""
    _check_uploads()
    name, side = request.query.get("name", ""), request.query.get("side", AUTO)
    is_caption = request.content_type == "text/plain" and name.lower().endswith(_TEXTS)
    if request.content_type in _FORMS and not is_caption:
        raise RefusedAnswer(400, "Send the bytes of one file as the body, not a form.")
    if _uploads.locked():
        raise RefusedAnswer(429, f"Only {_MOST_UPLOADS} files are received at a time. Send this one again later.")
    async with _uploads:
        data_set = await asyncio.to_thread(_data_set, request)
        used = await asyncio.to_thread(usage, data_set.root)
        limit, left = LIMITS.zip_bytes if is_zip(name) else LIMITS.file_bytes, LIMITS.set_bytes - used.bytes
        why = f"The file is too large: at most {size_in_words(limit)} are received. Nothing was added."
        if left < limit:
            why = f"The file was not added, because {await asyncio.to_thread(full, data_set)}"
        with received_file(data_set) as path:
            await _receive(request, path, min(limit, left), why)
            added = await _in_thread_for("data-sets", lambda: _add(data_set, path, name, side))
    files = [{"file": file, "side": where} for file, where in added.added]
    return json_answer({"added": files, "problems": [host_folders.without_paths(each) for each in added.problems]})


def _add(data_set: DataSet, path: Path, name: str, side: str) -> Any:
    with changing(data_set):
        return add_file(data_set, path, name, side)


async def _receive(request: web.Request, path: Path, most: int, why: str) -> None:
    """Write the body to a file, whatever length the request states. `why`: what to say of one with more bytes."""
    if (request.content_length or 0) > most:
        raise RefusedAnswer(413, why)
    size, waiting = 0, bytearray()
    with disk_errors(path), await asyncio.to_thread(path.open, "wb") as file:
        async for chunk in _pieces(request):
            size += len(chunk)
            if size > most:
                raise RefusedAnswer(413, why)
            waiting += chunk
            if len(waiting) >= _WRITTEN_BYTES:
                await asyncio.to_thread(file.write, bytes(waiting))
                waiting.clear()
        await asyncio.to_thread(file.write, bytes(waiting))
    if not size:
        raise RefusedAnswer(400, "The file is empty.")


async def _pieces(request: web.Request) -> AsyncIterator[bytes]:
    """The body as it comes."""
    try:
        while chunk := await asyncio.wait_for(request.content.readany(), _SILENT_SECONDS):
            yield chunk
    except asyncio.TimeoutError as error:
        raise RefusedAnswer(408, f"Nothing came for {_SILENT_SECONDS} seconds, so nothing was added.") from error
    except (ConnectionError, web.RequestPayloadError, PayloadEncodingError) as error:
        raise RefusedAnswer(400, "The connection ended before the whole file had come.") from error


# Changes


async def _change(change: Change, request: web.Request) -> web.Response:
    _check_uploads()
    body = await json_object(request, _BODY_BYTES, "see the documentation of this route")

    def changed() -> dict[str, Any]:
        data_set = _data_set(request)
        with changing(data_set):
            result = change(data_set, body)
        return {**result, "revision": reading.revision(data_set)}

    return json_answer(await _in_thread_for("data-sets", changed))


def _captions(data_set: DataSet, body: dict[str, Any]) -> dict[str, Any]:
    if isinstance(body.get("all"), str):
        return {"undo": changes.write_caption_of_all(data_set, body["all"])}
    captions = body.get("captions")
    if not isinstance(captions, dict):
        raise ConfigError('Send {"captions": {key: text}} or {"all": text}.')
    changes.write_captions(data_set, captions)
    return {}


def _match(data_set: DataSet, body: dict[str, Any]) -> dict[str, Any]:
    pairs = _objects(body, "pairs", ("reference", "target"))
    changes.match(data_set, [(_text(each, "side", REFERENCES[0]), each["reference"], each["target"]) for each in pairs])
    return {}


def _swap(data_set: DataSet, body: dict[str, Any]) -> dict[str, Any]:
    keys = None if body.get("keys", ()) is None else _texts(body, "keys")
    back = _texts(body, "captions_back") if "captions_back" in body else ()
    return {"captions_came": changes.swap_sides(data_set, keys, back)}


def _hold_out(data_set: DataSet, body: dict[str, Any]) -> dict[str, Any]:
    held_out = body.get("held_out")
    if not isinstance(held_out, bool):
        raise ConfigError("held_out must be true or false.")
    changes.hold_out(data_set, _texts(body, "keys"), held_out=held_out)
    return {}


def _delete(data_set: DataSet, body: dict[str, Any]) -> dict[str, Any]:
    pictures = _objects(body, "pictures", ("side", "file"))
    return {"undo": changes.delete(data_set, [(each["side"], each["file"]) for each in pictures])}


def _restore(data_set: DataSet, body: dict[str, Any]) -> dict[str, Any]:
    return {"restored": changes.restore(data_set, body.get("undo"))}


def _empty_trash(data_set: DataSet, body: dict[str, Any]) -> dict[str, Any]:
    empty_trash(data_set, body.get("state"))
    return {}


def _texts(body: dict[str, Any], name: str) -> list[str]:
    found = body.get(name)
    if not isinstance(found, list) or not all(isinstance(each, str) for each in found):
        raise ConfigError(f"{name} must be a list of texts.")
    return found


def _text(each: dict[str, Any], name: str, default: str) -> str:
    found = each.get(name, default)
    if not isinstance(found, str):
        raise ConfigError(f"{name} must be a text.")
    return found


def _objects(body: dict[str, Any], name: str, fields: tuple[str, ...]) -> list[dict[str, Any]]:
    found = body.get(name)
    fits = isinstance(found, list) and all(
        isinstance(each, dict) and all(isinstance(each.get(field), str) for field in fields) for each in found
    )
    if not fits or not isinstance(found, list):
        raise ConfigError(f"{name} must be a list of objects with {' and '.join(fields)}.")
    return found


_CHANGES: dict[str, Change] = {
    "captions": _captions,
    "match": _match,
    "swap": _swap,
    "hold_out": _hold_out,
    "delete": _delete,
    "restore": _restore,
    "empty_trash": _empty_trash,
}


# The check

_one_check = threading.Lock()


class _Stoppable(SilentObserver):
    """Stops the check when the page that asked for it is gone."""

    def __init__(self) -> None:
        self.gone = False

    def should_stop(self) -> Stop:
        """PAUSE when the page is gone."""
        return Stop.PAUSE if self.gone else Stop.NO


async def _check(request: web.Request) -> web.Response:
    await json_object(request, _BODY_BYTES, "{}")
    observer = _Stoppable()

    def check() -> dict[str, Any]:
        if not _one_check.acquire(blocking=False):
            raise RefusedAnswer(409, "Another check is running. Try again when it has ended.")
        try:
            found = check_data_set(_data_set(request), observer, checked_dir=host_folders.checked_dir())
        finally:
            _one_check.release()
        findings = {key: [host_folders.without_paths(text) for text in texts] for key, texts in found.findings.items()}
        return {"findings": findings, "notes": [host_folders.without_paths(note) for note in found.notes]}

    task = asyncio.ensure_future(asyncio.to_thread(check))
    while not task.done():
        await asyncio.wait({task}, timeout=_POLL_SECONDS)
        observer.gone = observer.gone or is_gone(request)
    try:
        return json_answer(task.result())
    except Interrupted as error:
        raise RefusedAnswer(409, "The check was stopped.") from error
