"""What pages and scripts may ask of runs. Names, never paths; nothing changes by GET; nothing for other origins.

GET  /qwen_edit_trainer/runs                                    all runs, newest first
GET  /qwen_edit_trainer/runs/{run}                              one of them with its pictures by step
GET  /qwen_edit_trainer/runs/{run}/curve?points=600             loss, learning rate, what validation measured
GET  /qwen_edit_trainer/runs/{run}/samples/{step}/{pair}/{column}?edge=192    one picture, whole or small
GET  /qwen_edit_trainer/runs/{run}/settings                     its settings
GET  /qwen_edit_trainer/runs/{run}/graph                        the graph that continues it
POST /qwen_edit_trainer/stop  {"run_name": ...}                 end it and keep the LoRA
"""

from __future__ import annotations

import asyncio
import io
import json
import re
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from aiohttp import web
from PIL import Image

from ..trainer_core.errors import TrainerError
from ..trainer_core.runs import view as run_view
from . import host_folders, host_server
from .active_runs import active_runs, stop_and_keep
from .graph_file import graph_to_continue
from .untrusted import checked_run_name, file_below, folder_below

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

_BASE = "/qwen_edit_trainer"
_BODY_BYTES = 4096
_MAX_RUNS, _MAX_POINTS, _POINTS = 500, 2000, 600
_MIN_EDGE, _MAX_EDGE, _MAX_PIXELS = 32, 512, 64_000_000
_NO_STEP = {"step": 0, "num_steps": 0, "loss": None}
_NUMBER = re.compile(r"[0-9]{1,9}")
_HEADERS = {"X-Content-Type-Options": "nosniff", "Cache-Control": "no-store"}
_PICTURE_HEADERS = {"X-Content-Type-Options": "nosniff", "Cache-Control": "private, max-age=86400"}  # see `version`


class _NotThereError(Exception):
    """Nothing of that name. Told as 404."""


def register_routes() -> None:
    """Where there is a server, and once."""
    server = host_server.server()
    if server is None or any(getattr(route, "path", "") == f"{_BASE}/runs" for route in server.routes):
        return
    for path, answer in _READABLE.items():
        server.routes.get(_BASE + path)(_reading(answer))
    server.routes.post(f"{_BASE}/stop")(_stop)


def is_same_origin(request: web.Request) -> bool:
    """True unless a browser says that the page asking is of another origin. Scripts say nothing and may ask."""
    site = request.headers.get("Sec-Fetch-Site")
    if site is not None:  # set by browsers, out of a page's reach
        return site in ("same-origin", "none")
    origin = request.headers.get("Origin")
    return origin is None or origin.partition("://")[2].lower() == request.headers.get("Host", "").lower()


def _reading(answer: Callable[[web.Request], web.Response]) -> Handler:
    """A GET handler. Disks may be slow: reading happens beside the server's loop."""

    async def handler(request: web.Request) -> web.StreamResponse:
        if not is_same_origin(request):
            return _problem(403, "Only pages of this server may ask.")
        try:
            return await asyncio.to_thread(answer, request)
        except (_NotThereError, TrainerError) as error:
            return _problem(404, str(error))

    return handler


async def _stop(request: web.Request) -> web.Response:
    """Body {"run_name": ...}. JSON only: a page of another origin can't send that type unasked."""
    if not is_same_origin(request):
        return _problem(403, "Only pages of this server may ask.")
    length = request.content_length
    if request.content_type != "application/json" or length is None or length > _BODY_BYTES:
        return _problem(400, 'Send a small JSON object: {"run_name": "..."}')
    try:
        body = await request.json()
    except ValueError:
        body = None
    name = body.get("run_name") if isinstance(body, dict) else None
    if stop_and_keep(name):
        return _json({"stopping": name})
    return _problem(404, "No training of that name is under way.")


def _list_runs(_request: web.Request) -> web.Response:
    under_way = {str(run["run_name"]): run for run in active_runs()}
    listed = [run_view.summary(folder) for folder in run_view.run_folders(host_folders.runs_dir(), _MAX_RUNS)]
    starting = [
        _summary({**_NO_STEP, "run_name": name}, run) for name, run in under_way.items() if name not in _names(listed)
    ]
    return _json({"runs": [*starting, *(_summary(run, under_way.get(run["run_name"])) for run in listed)]})


def _one_run(request: web.Request) -> web.Response:
    folder = _run_folder(request)
    under_way = {run["run_name"]: run for run in active_runs()}
    summary = _summary(run_view.summary(folder), under_way.get(folder.name))
    has_graph = bool(graph_to_continue(folder))
    return _json({**summary, "has_graph": has_graph, "samples": run_view.samples(folder)})


def _names(runs: list[dict[str, Any]]) -> set[str]:
    return {run["run_name"] for run in runs}


def _summary(run: dict[str, Any], under_way: dict[str, Any] | None) -> dict[str, Any]:
    """What the folder says, overruled by the training under way in it."""
    if under_way is not None:
        return {**run, **under_way, "state": "training", "active": True}
    state = "interrupted" if run["state"] == "started" else run["state"]
    return {**run, "state": state, "active": False}


def _curve(request: web.Request) -> web.Response:
    points = _number(request.query.get("points", str(_POINTS)))
    return _json(run_view.curve(_run_folder(request), max(2, min(points, _MAX_POINTS))))


def _settings(request: web.Request) -> web.Response:
    return _json({"settings": run_view.read_config(_run_folder(request))})


def _graph(request: web.Request) -> web.Response:
    graph = graph_to_continue(_run_folder(request))
    if not graph:
        raise _NotThereError("The graph of this run was not kept. Queue the one you started it with.")
    return _json(graph)


def _picture(request: web.Request) -> web.Response:
    folder, asked = _run_folder(request), request.match_info
    name = run_view.picture_name(folder, _number(asked["step"]), _number(asked["pair"]), asked["column"])
    if not name:
        raise _NotThereError("There is no such picture.")
    path = file_below(name, folder, {"run": folder}, "picture")
    if "edge" not in request.query:
        return web.Response(body=path.read_bytes(), content_type="image/png", headers=_PICTURE_HEADERS)
    edge = max(_MIN_EDGE, min(_number(request.query["edge"]), _MAX_EDGE))
    return web.Response(body=_small(path, edge), content_type="image/jpeg", headers=_PICTURE_HEADERS)


def _small(path: Path, edge: int) -> bytes:
    """The picture as a JPEG of at most `edge` pixels."""
    try:
        with Image.open(path, formats=["PNG"]) as picture:
            if picture.width * picture.height > _MAX_PIXELS:
                raise _NotThereError("The picture is too large.")
            small = picture.convert("RGB")
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise _NotThereError("The picture is damaged.") from error
    small.thumbnail((edge, edge))
    data = io.BytesIO()
    small.save(data, "JPEG", quality=88)
    return data.getvalue()


def _run_folder(request: web.Request) -> Path:
    """The folder of the run that is asked for.

    Raises:
        ConfigError: no name, or no folder of that name.
        _NotThereError: not a run.
    """
    folder = folder_below(checked_run_name(request.match_info["run"]), {"runs": host_folders.runs_dir()}, "run_name")
    if not (folder / "run.json").is_file():
        raise _NotThereError("There is no such run.")
    return folder


def _number(text: str) -> int:
    if not _NUMBER.fullmatch(text):
        raise _NotThereError("Steps, pairs, points and edges are whole numbers.")
    return int(text)


def _json(value: Any, status: int = 200) -> web.Response:
    return web.Response(
        text=json.dumps(run_view.finite(value)), status=status, content_type="application/json", headers=_HEADERS
    )


def _problem(status: int, text: str) -> web.Response:
    return _json({"error": text}, status)


_READABLE = {
    "/runs": _list_runs,
    "/runs/{run}": _one_run,
    "/runs/{run}/curve": _curve,
    "/runs/{run}/samples/{step}/{pair}/{column}": _picture,
    "/runs/{run}/settings": _settings,
    "/runs/{run}/graph": _graph,
}
