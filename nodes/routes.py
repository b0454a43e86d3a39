"""HTTP routes about runs, for pages and scripts. Requests use names, never paths; GET changes nothing; requests from
other origins are refused.

GET  /qwen_edit_trainer/runs                                    all runs, newest first
GET  /qwen_edit_trainer/runs/{run}                              one run with its pictures by step
GET  /qwen_edit_trainer/runs/{run}/curve?points=600             loss, learning rate and validation results
GET  /qwen_edit_trainer/runs/{run}/samples/{step}/{pair}/{column}?edge=192    one picture, full size or reduced
GET  /qwen_edit_trainer/runs/{run}/settings                     settings of the run
GET  /qwen_edit_trainer/runs/{run}/graph                        the graph that continues the run
POST /qwen_edit_trainer/stop  {"run_name": ...}                 stop the run and keep its LoRA
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

from ..trainer_core.errors import ConfigError, TrainerError
from ..trainer_core.json_text import parse_json
from ..trainer_core.pictures.sample_pictures import INDEX
from ..trainer_core.runs import view as run_view
from . import host_folders, host_server
from .active_runs import active_runs, stop_and_keep
from .graph_file import graph_to_continue
from .same_origin import guard
from .untrusted import checked_run_name, file_below, strays

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

_BASE = "/qwen_edit_trainer"
_BODY_BYTES = 4096
_MAX_RUNS, _MAX_POINTS, _POINTS = 500, 2000, 600
_MIN_EDGE, _MAX_EDGE, _MAX_PIXELS = 32, 512, 64_000_000
_NO_STEP = {"step": 0, "num_steps": 0, "loss": None}
_FILES = ("run.json", "config.json", "metrics.jsonl", "graph.json", "samples")  # that the routes read
_NUMBER = re.compile(r"[0-9]{1,9}")
# Pages of other sites can't embed the answers. A browser sends neither an Origin nor Sec-Fetch-Site for their pictures
# and scripts if this server is not on the same machine and without HTTPS.
_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
_PICTURE_HEADERS = {**_HEADERS, "Cache-Control": "private, max-age=86400"}  # the address has the picture's version


class _NotFoundError(Exception):
    """The requested object does not exist. Answered with 404."""


def register_routes() -> None:
    """Register the routes once, if this process runs a server."""
    server = host_server.server()
    if server is None or any(getattr(route, "path", "") == f"{_BASE}/runs" for route in server.routes):
        return
    server.app.middlewares.insert(0, guard(_BASE, _problem))
    for path, answer in _READABLE.items():
        server.routes.get(_BASE + path)(_reading(answer))
    server.routes.post(f"{_BASE}/stop")(_stop)


def _reading(answer: Callable[[web.Request], web.Response]) -> Handler:
    """A GET handler that runs `answer` in a thread, because reading from disk would block the server's event loop."""

    async def handler(request: web.Request) -> web.StreamResponse:
        try:
            return await asyncio.to_thread(answer, request)
        except (_NotFoundError, TrainerError) as error:
            return _problem(404, str(error))

    return handler


async def _stop(request: web.Request) -> web.Response:
    """Body {"run_name": ...}. JSON only, because a page of another origin cannot send that type without a preflight."""
    length = request.content_length
    if request.content_type != "application/json" or length is None or length > _BODY_BYTES:
        return _problem(400, f'Send a JSON object of at most {_BODY_BYTES} bytes: {{"run_name": "..."}}')
    try:
        body = parse_json(await request.read(), "The body")
    except ConfigError as error:
        return _problem(400, str(error))
    name = body.get("run_name") if isinstance(body, dict) else None
    if stop_and_keep(name):
        return _json({"stopping": name})
    return _problem(404, "No run of that name is in progress.")


def _list_runs(_request: web.Request) -> web.Response:
    in_progress = {str(run["run_name"]): run for run in active_runs()}
    runs = host_folders.runs_dir()
    folders = [folder for folder in run_view.run_folders(runs, _MAX_RUNS) if not strays(runs, [folder.name])]
    listed = [run_view.summary(folder) for folder in folders if not strays(folder, _FILES)]
    starting = [
        _summary({**_NO_STEP, "run_name": name}, run) for name, run in in_progress.items() if name not in _names(listed)
    ]
    return _json({"runs": [*starting, *(_summary(run, in_progress.get(run["run_name"])) for run in listed)]})


def _one_run(request: web.Request) -> web.Response:
    folder = _run_folder(request)
    in_progress = {run["run_name"]: run for run in active_runs()}
    summary = _summary(run_view.summary(folder), in_progress.get(folder.name))
    has_graph = bool(graph_to_continue(folder))
    return _json({**summary, "has_graph": has_graph, "samples": run_view.samples(folder)})


def _names(runs: list[dict[str, Any]]) -> set[str]:
    return {run["run_name"] for run in runs}


def _summary(run: dict[str, Any], in_progress: dict[str, Any] | None) -> dict[str, Any]:
    """The state stored in the folder, updated with the live state if the run is in progress."""
    if in_progress is not None:
        return {**run, **in_progress, "state": "training", "problem": "", "active": True}
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
        raise _NotFoundError("The graph of this run was not saved. Queue the graph that started it.")
    return _json(graph)


def _picture(request: web.Request) -> web.Response:
    folder, asked = _run_folder(request), request.match_info
    name = run_view.picture_name(folder, _number(asked["step"]), _number(asked["pair"]), asked["column"])
    if not name:
        raise _NotFoundError("Picture not found.")
    path = file_below(name, folder, {"run": folder}, "picture")
    if "edge" not in request.query:
        return web.Response(body=path.read_bytes(), content_type="image/png", headers=_PICTURE_HEADERS)
    edge = max(_MIN_EDGE, min(_number(request.query["edge"]), _MAX_EDGE))
    return web.Response(body=_small(path, edge), content_type="image/jpeg", headers=_PICTURE_HEADERS)


def _small(path: Path, edge: int) -> bytes:
    """The picture as JPEG, reduced to at most `edge` pixels per side."""
    try:
        with Image.open(path, formats=["PNG"]) as picture:
            if picture.width * picture.height > _MAX_PIXELS:
                raise _NotFoundError("The picture is too large to reduce.")
            small = picture.convert("RGB")
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise _NotFoundError("The picture is damaged.") from error
    small.thumbnail((edge, edge))
    data = io.BytesIO()
    small.save(data, "JPEG", quality=88)
    return data.getvalue()


def _run_folder(request: web.Request) -> Path:
    """Folder of the requested run.

    Raises:
        ConfigError: the name is not allowed.
        _NotFoundError: there is no such run, or its folder or a file in it leads elsewhere.
    """
    runs, name = host_folders.runs_dir(), checked_run_name(request.match_info["run"])
    if strays(runs, [name]):
        raise _NotFoundError("This run's folder is a link that leads out of the folder of runs, so it is not shown.")
    folder = runs / name
    if not (folder / "run.json").is_file():
        raise _NotFoundError("Run not found.")
    indexes = (path.relative_to(folder).as_posix() for path in folder.glob(f"samples/*/{INDEX}"))
    if stray := strays(folder, (*_FILES, *indexes)):
        raise _NotFoundError(f"{stray} of this run is not a file or leads out of its folder, so the run is not shown.")
    return folder


def _number(text: str) -> int:
    if not _NUMBER.fullmatch(text):
        raise _NotFoundError("step, pair, points and edge must be whole numbers.")
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
