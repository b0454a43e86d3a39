"""The HTTP route that says what a training will do before it starts.

POST /qwen_edit_trainer/before_start  {"prompt": a prompt for ComfyUI's API, "node_id": of a training node in it,
"measure_pairs": true to measure the pictures of the pairs too}

Its answer is that of `before_start`. One request is answered at a time. One that is stopped by a newer one is answered
with 204, because browsers log every error status.
"""

from __future__ import annotations

import asyncio
from typing import Any

from aiohttp import web

from ..trainer_core.errors import Interrupted
from ..trainer_core.events import SilentObserver, Stop
from . import host_folders
from .answers import BASE, NotFoundAnswer, RefusedAnswer, answering, is_gone, json_answer, json_object
from .before_start import before_start
from .graph_values import GraphValues
from .training import TRAININGS

_BODY_BYTES = 4 << 20
_EXAMPLE = '{"prompt": {...}, "node_id": "...", "measure_pairs": false}'

_one_at_a_time = asyncio.Lock()


class _Newest(SilentObserver):
    """Stops its request when a newer one comes, or when the page has gone."""

    current: _Newest | None = None

    def __init__(self, request: web.Request) -> None:
        self._request = request
        _Newest.current = self

    def should_stop(self) -> Stop:
        return Stop.PAUSE if is_gone(self._request) or _Newest.current is not self else Stop.NO


def add_routes(routes: Any) -> None:
    """Add the route to a table of aiohttp."""
    routes.post(f"{BASE}/before_start")(answering(_before_start, host_folders.cache_dir))


async def _before_start(request: web.Request) -> web.Response:
    body = await json_object(request, _BODY_BYTES, _EXAMPLE)
    prompt, node_id, measure = body.get("prompt"), body.get("node_id"), body.get("measure_pairs", False)
    if not (isinstance(prompt, dict) and isinstance(node_id, str) and isinstance(measure, bool)):
        raise RefusedAnswer(400, f"Send a JSON object: {_EXAMPLE}")
    if GraphValues(prompt, {}).kind_of(node_id) not in TRAININGS:
        raise NotFoundAnswer("The prompt has no training node with this id.")
    observer = _Newest(request)
    async with _one_at_a_time:
        try:
            answer = await asyncio.to_thread(_unless_stopped, prompt, node_id, observer, measure)
        except Interrupted:
            return web.Response(status=204)
    return json_answer(answer)


def _unless_stopped(prompt: Any, node_id: str, observer: _Newest, measure_pairs: bool) -> dict[str, Any]:
    if observer.should_stop():
        raise Interrupted
    return before_start(prompt, node_id, observer, measure_pairs=measure_pairs)
