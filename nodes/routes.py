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

import io
from pathlib import Path
from typing import Any

from aiohttp import web
from PIL import Image

from ..trainer_core.errors import ConfigError
from ..trainer_core.pictures.sample_pictures import INDEX
from ..trainer_core.runs import view as run_view
from . import before_start_route, host_folders, host_server, pair_routes
from .active_runs import active_runs, stop_and_keep
from .answers import BASE, PICTURE_HEADERS, NotFoundAnswer, json_answer, json_object, number, problem, reading
from .graph_file import graph_to_continue
from .same_origin import guard
from .untrusted import checked_run_name, file_below, strays

_MAX_RUNS, _MAX_POINTS, _POINTS = 500, 2000, 600
_MIN_EDGE, _MAX_EDGE, _MAX_PIXELS = 32, 512, 64_000_000
_NO_STEP = {"step": 0, "num_steps": 0, "loss": None}
_FILES = ("run.json", "config.json", "metrics.jsonl", "graph.json", "samples")  # that the routes read
_BODY_BYTES = 4096


def register_routes() -> None:
    """Register the routes once, if this process runs a server."""
    server = host_server.server()
    if server is None or any(getattr(route, "path", "") == f"{BASE}/runs" for route in server.routes):
        return
    server.app.middlewares.insert(0, guard(BASE, problem))
    for path, answer in _READABLE.items():
        server.routes.get(BASE + path)(reading(answer))
    server.routes.post(f"{BASE}/stop")(_stop)
    pair_routes.add_routes(server.routes)
    before_start_route.add_routes(server.routes)


async def _stop(request: web.Request) -> web.Response:
    """Body {"run_name": ...}."""
    try:
        body = await json_object(request, _BODY_BYTES, '{"run_name": "..."}')
    except ConfigError as error:
        return problem(400, str(error))
    name = body.get("run_name")
    if stop_and_keep(name):
        return json_answer({"stopping": name})
    return problem(404, "No run of that name is in progress.")


def _list_runs(_request: web.Request) -> web.Response:
    in_progress = {str(run["run_name"]): run for run in active_runs()}
    runs = host_folders.runs_dir()
    folders = [folder for folder in run_view.run_folders(runs, _MAX_RUNS) if not strays(runs, [folder.name])]
    listed = [run_view.summary(folder) for folder in folders if not strays(folder, _FILES)]
    starting = [
        _summary({**_NO_STEP, "run_name": name}, run) for name, run in in_progress.items() if name not in _names(listed)
    ]
    return json_answer({"runs": [*starting, *(_summary(run, in_progress.get(run["run_name"])) for run in listed)]})


def _one_run(request: web.Request) -> web.Response:
    folder = _run_folder(request)
    in_progress = {run["run_name"]: run for run in active_runs()}
    summary = _summary(run_view.summary(folder), in_progress.get(folder.name))
    has_graph = bool(graph_to_continue(folder))
    return json_answer({**summary, "has_graph": has_graph, "samples": run_view.samples(folder)})


def _names(runs: list[dict[str, Any]]) -> set[str]:
    return {run["run_name"] for run in runs}


def _summary(run: dict[str, Any], in_progress: dict[str, Any] | None) -> dict[str, Any]:
    """The state stored in the folder, updated with the live state if the run is in progress."""
    if in_progress is not None:
        return {**run, **in_progress, "state": "training", "problem": "", "active": True}
    state = "interrupted" if run["state"] == "started" else run["state"]
    return {**run, "state": state, "active": False}


def _curve(request: web.Request) -> web.Response:
    points = number(request.query.get("points", str(_POINTS)))
    return json_answer(run_view.curve(_run_folder(request), max(2, min(points, _MAX_POINTS))))


def _settings(request: web.Request) -> web.Response:
    return json_answer({"settings": run_view.read_config(_run_folder(request))})


def _graph(request: web.Request) -> web.Response:
    graph = graph_to_continue(_run_folder(request))
    if not graph:
        raise NotFoundAnswer("The graph of this run was not saved. Queue the graph that started it.")
    return json_answer(graph)


def _picture(request: web.Request) -> web.Response:
    folder, asked = _run_folder(request), request.match_info
    name = run_view.picture_name(folder, number(asked["step"]), number(asked["pair"]), asked["column"])
    if not name:
        raise NotFoundAnswer("Picture not found.")
    path = file_below(name, folder, {"run": folder}, "picture")
    if "edge" not in request.query:
        return web.Response(body=path.read_bytes(), content_type="image/png", headers=PICTURE_HEADERS)
    edge = max(_MIN_EDGE, min(number(request.query["edge"]), _MAX_EDGE))
    return web.Response(body=_small(path, edge), content_type="image/jpeg", headers=PICTURE_HEADERS)


def _small(path: Path, edge: int) -> bytes:
    """The picture as JPEG, reduced to at most `edge` pixels per side."""
    try:
        with Image.open(path, formats=["PNG"]) as picture:
            if picture.width * picture.height > _MAX_PIXELS:
                raise NotFoundAnswer("The picture is too large to reduce.")
            small = picture.convert("RGB")
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise NotFoundAnswer("The picture is damaged.") from error
    small.thumbnail((edge, edge))
    data = io.BytesIO()
    small.save(data, "JPEG", quality=88)
    return data.getvalue()


def _run_folder(request: web.Request) -> Path:
    """Folder of the requested run.

    Raises:
        ConfigError: the name is not allowed.
        NotFoundAnswer: there is no such run, or its folder or a file in it leads elsewhere.
    """
    runs, name = host_folders.runs_dir(), checked_run_name(request.match_info["run"])
    if strays(runs, [name]):
        raise NotFoundAnswer("This run's folder is a link that leads out of the folder of runs, so it is not shown.")
    folder = runs / name
    if not (folder / "run.json").is_file():
        raise NotFoundAnswer("Run not found.")
    indexes = (path.relative_to(folder).as_posix() for path in folder.glob(f"samples/*/{INDEX}"))
    if stray := strays(folder, (*_FILES, *indexes)):
        raise NotFoundAnswer(f"{stray} of this run is not a file or leads out of its folder, so the run is not shown.")
    return folder


_READABLE = {
    "/runs": _list_runs,
    "/runs/{run}": _one_run,
    "/runs/{run}/curve": _curve,
    "/runs/{run}/samples/{step}/{pair}/{column}": _picture,
    "/runs/{run}/settings": _settings,
    "/runs/{run}/graph": _graph,
}
