"""ComfyUI's server: messages to open pages, and the node being executed."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, NamedTuple

from aiohttp import web
from server import PromptServer

from .raw_values import entries, needed_by

if TYPE_CHECKING:
    from aiohttp.typedefs import Handler

_LOG = logging.getLogger(__name__)

Found = dict[str, str]


class QueuedPrompt(NamedTuple):
    """A graph in ComfyUI's queue: nodes by id, what the page sent with it, and the output nodes to execute."""

    id: str
    prompt: dict[str, Any]
    extra: dict[str, Any]
    outputs: list[str]


def server() -> PromptServer | None:
    """ComfyUI's server, or None if this process does not run one."""
    return getattr(PromptServer, "instance", None)


def send_message(event: str, values: dict[str, Any]) -> None:
    """Send a message to every open page. Callable from any thread."""
    instance = server()
    if instance is not None:
        instance.send_sync(event, values, None)


def executing_node() -> str | None:
    """Id of the node that ComfyUI is executing in this context, or None."""
    from comfy_execution.utils import get_executing_context

    context = get_executing_context()
    return context.node_id if context is not None else None


def is_busy() -> bool:
    """Whether ComfyUI is running a prompt, other than the one that is executed in this context."""
    return any(item[1] != executing_prompt() for item in _running())


def executing_prompt() -> str | None:
    """Id of the prompt that ComfyUI is executing in this context, or None."""
    from comfy_execution.utils import get_executing_context

    context = get_executing_context()
    return context.prompt_id if context is not None else None


def asked_for(prompt: Any) -> set[str]:
    """The nodes of the prompt that runs now which its outputs need. A page may queue a graph for some output nodes."""
    outputs = [node_id for item in _running() for node_id in item[4]]
    return needed_by(prompt, *(outputs or (node_id for node_id, *_ in entries(prompt))))


def _running() -> list[Any]:
    """The items of ComfyUI's queue that it runs now."""
    return list(getattr(getattr(server(), "prompt_queue", None), "currently_running", {}).values())


def queued_prompts() -> tuple[list[QueuedPrompt], list[QueuedPrompt]]:
    """The prompts that ComfyUI runs now, and those that wait in its queue, the next one first."""
    queue = getattr(server(), "prompt_queue", None)
    read = getattr(queue, "get_current_queue_volatile", None) or getattr(queue, "get_current_queue", None)
    if read is None:
        return [], []
    running, waiting = read()
    parts = (running, sorted(waiting, key=lambda item: item[0]))
    return tuple([QueuedPrompt(item[1], item[2], item[3], item[4]) for item in part] for part in parts)  # type: ignore[return-value]


def ended_nodes() -> set[str]:
    """Ids of the nodes of the running prompt that have ended."""
    from comfy_execution.progress import NodeState, get_progress_state

    known = list(get_progress_state().nodes.items())
    return {node_id for node_id, state in known if state["state"] in (NodeState.Finished, NodeState.Error)}


def before_validation(look: Callable[[dict[str, Any]], None]) -> None:
    """Let `look` see and change the body of each request that queues a prompt, before ComfyUI validates the prompt.

    ComfyUI logs what it raises, and goes on.
    """
    instance = server()
    if instance is None:
        return

    def handler(request: Any) -> Any:
        if isinstance(request, dict):
            look(request)
        return request

    instance.add_on_prompt_handler(handler)


def before_queueing(
    mark: str, look: Callable[[dict[str, Any]], Found], noted: Callable[[Found], AbstractContextManager[None]]
) -> None:
    """Let `look` see a copy of each request to queue a prompt with this mark, in a thread: it may take seconds.

    ComfyUI then validates the prompt inside `noted` with what `look` returns. What `look` raises is logged.
    """

    def found(body: bytes) -> Found:
        try:
            request = json.loads(body)
        except (ValueError, RecursionError):  # ComfyUI says so
            return {}
        try:
            return look(request) if isinstance(request, dict) else {}
        except Exception:  # noqa: BLE001 - the prompt may be anything, and ComfyUI must answer
            _LOG.exception("A prompt could not be looked at before it is queued.")
            return {}

    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        if request.method == "POST" and request.path in ("/prompt", "/api/prompt"):
            body = await request.read()  # aiohttp keeps it for ComfyUI
            if mark.encode() in body:  # other prompts cost nothing
                with noted(await asyncio.to_thread(found, body)):
                    return await handler(request)
        return await handler(request)

    instance = server()
    if instance is not None:
        instance.app.middlewares.append(middleware)  # after ComfyUI's own checks of the request
