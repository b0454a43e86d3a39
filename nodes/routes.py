"""HTTP routes about runs, for pages and scripts. Requests use names, never paths; GET changes nothing; requests from
other origins are refused.

GET  /qwen_edit_trainer/runs                                    all runs, newest first
GET  /qwen_edit_trainer/runs/{run}                              one run with its pictures and LoRAs by step
GET  /qwen_edit_trainer/runs/{run}/curve?points=600             loss, learning rate and validation results
GET  /qwen_edit_trainer/runs/{run}/samples/{step}/{pair}/{column}?edge=192    one picture, full size or reduced
GET  /qwen_edit_trainer/runs/{run}/settings                     settings of the run
GET  /qwen_edit_trainer/runs/{run}/graph                        the graph that continues the run
POST /qwen_edit_trainer/stop  {"run_name": ...}                 stop the run and keep its LoRA
POST /qwen_edit_trainer/runs/{run}/save_step  {"step": ...}     copy the LoRA of a step to where LoRA loaders list it
"""

from __future__ import annotations

import asyncio
import io
from pathlib import Path
from typing import Any

from aiohttp import web
from PIL import Image

from ..trainer_core.errors import RunFolderError
from ..trainer_core.runs import view as run_view
from . import before_start_route, host_folders, host_server, pair_routes
from .active_runs import active_runs, stop_and_keep
from .answers import (
    BASE,
    PICTURE_HEADERS,
    NotFoundAnswer,
    RefusedAnswer,
    answering,
    json_answer,
    json_object,
    number,
    problem,
    reading,
)
from .graph_file import graph_to_continue
from .publish import listed_name, save_step
from .queued_runs import graph_of, queued_runs
from .run_folders import all_runs, run_folder
from .same_origin import guard
from .untrusted import file_below

_MAX_POINTS, _POINTS = 2000, 600
_MIN_EDGE, _MAX_EDGE, _MAX_PIXELS = 32, 512, 64_000_000
_NO_STEP = {"step": 0, "num_steps": 0, "loss": None}
_NO_CURVE = {"steps": [], "loss": [], "learning_rate": [], "measured": {}}
_BODY_BYTES = 4096


def register_routes() -> None:
    """Register the routes once, if this process runs a server."""
    server = host_server.server()
    if server is None or any(getattr(route, "path", "") == f"{BASE}/runs" for route in server.routes):
        return
    server.app.middlewares.insert(0, guard(BASE, problem))
    for path, answer in _READABLE.items():
        server.routes.get(BASE + path)(reading(answer))
    server.routes.post(f"{BASE}/stop")(answering(_stop, host_folders.runs_dir))
    server.routes.post(f"{BASE}/runs/{{run}}/save_step")(answering(_save_step, host_folders.lora_dir))
    pair_routes.add_routes(server.routes)
    before_start_route.add_routes(server.routes)


async def _stop(request: web.Request) -> web.Response:
    """Body {"run_name": ...}."""
    name = (await json_object(request, _BODY_BYTES, '{"run_name": "..."}')).get("run_name")
    if not stop_and_keep(name):
        raise NotFoundAnswer("No run of that name is in progress.")
    return json_answer({"stopping": name})


async def _save_step(request: web.Request) -> web.Response:
    """Body {"step": ...}."""
    step = (await json_object(request, _BODY_BYTES, '{"step": 250}')).get("step")
    if not isinstance(step, int) or isinstance(step, bool):
        raise RefusedAnswer(400, "step must be a whole number.")
    return json_answer({"lora_name": await asyncio.to_thread(lambda: save_step(_run_folder(request), step))})


def _current() -> dict[str, dict[str, Any]]:
    """The runs in ComfyUI's queue and in progress, by name. Their folder may not have been made yet."""
    return {str(run["run_name"]): run for run in (*queued_runs(), *active_runs())}


def _list_runs(_request: web.Request) -> web.Response:
    listed = [run_view.summary(folder) for folder in all_runs()]
    known, current = {run["run_name"] for run in listed}, _current()
    starting = [_summary({**_NO_STEP, "run_name": name}, run) for name, run in current.items() if name not in known]
    return json_answer({"runs": [*starting, *(_summary(run, current.get(run["run_name"])) for run in listed)]})


def _one_run(request: web.Request) -> web.Response:
    name = request.match_info["run"]
    current, has_graph = _current().get(name), bool(graph_of(name))
    folder = _folder_unless_current(request)
    if folder is None:
        summary = _summary({**_NO_STEP, "run_name": name}, current)
        return json_answer({**summary, "has_graph": has_graph, "samples": [], "loras": []})
    file = run_view.lora_file(folder)
    details = {
        "has_graph": has_graph or bool(graph_to_continue(folder)),
        "samples": run_view.samples(folder),
        "loras": run_view.loras(folder),
        "lora_name": listed_name(file, folder.name) if file else "",
    }
    return json_answer({**_summary(run_view.summary(folder), current), **details})


def _folder_unless_current(request: web.Request) -> Path | None:
    """Folder of the requested run; None if it is not there yet, because the run is in the queue or has just begun."""
    try:
        return _run_folder(request)
    except RunFolderError:
        if request.match_info["run"] in _current():
            return None
        raise


def _summary(run: dict[str, Any], current: dict[str, Any] | None) -> dict[str, Any]:
    """The state stored in the folder, updated with the live state if the run is in progress or in the queue."""
    if current is not None:
        is_active = "phase" in current
        return {**run, "state": "queued", **current, "problem": "", "active": is_active}
    state = "interrupted" if run["state"] == "started" else run["state"]
    return {**run, "state": state, "active": False}


def _curve(request: web.Request) -> web.Response:
    points = number(request.query.get("points", str(_POINTS)))
    folder = _folder_unless_current(request)
    return json_answer(run_view.curve(folder, max(2, min(points, _MAX_POINTS))) if folder else _NO_CURVE)


def _settings(request: web.Request) -> web.Response:
    return json_answer({"settings": run_view.read_config(_run_folder(request))})


def _graph(request: web.Request) -> web.Response:
    folder = _folder_unless_current(request)
    graph = (graph_to_continue(folder) if folder else {}) or graph_of(request.match_info["run"])
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
    return run_folder(request.match_info["run"])


_READABLE = {
    "/runs": _list_runs,
    "/runs/{run}": _one_run,
    "/runs/{run}/curve": _curve,
    "/runs/{run}/samples/{step}/{pair}/{column}": _picture,
    "/runs/{run}/settings": _settings,
    "/runs/{run}/graph": _graph,
}
