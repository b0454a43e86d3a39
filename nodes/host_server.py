"""ComfyUI's server: messages to open pages, and the node being executed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from server import PromptServer


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
    """Whether ComfyUI is running a prompt."""
    return bool(getattr(getattr(server(), "prompt_queue", None), "currently_running", {}))


def is_asked_for(node_id: str) -> bool:
    """Whether the prompt that runs now was queued for this output node. A page may queue a graph for some of them."""
    running = getattr(getattr(server(), "prompt_queue", None), "currently_running", {})
    outputs = [item[4] for item in list(running.values())]
    return not outputs or any(node_id in each for each in outputs)


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
