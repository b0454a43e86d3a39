"""What the pack's HTTP routes share: headers, answers in JSON, and the bodies of requests."""

from __future__ import annotations

import asyncio
import errno
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aiohttp import web

from ..trainer_core.data_sets.folders import NameTakenError, NotFoundError
from ..trainer_core.disk import disk_errors
from ..trainer_core.errors import ConfigError, DiskError, RunFolderError, TrainerError
from ..trainer_core.json_text import parse_json
from ..trainer_core.runs.view import finite
from .refused import for_page

if TYPE_CHECKING:
    from aiohttp.typedefs import Handler

BASE = "/qwen_edit_trainer"
# Pages of other sites can't embed the answers. A browser sends neither an Origin nor Sec-Fetch-Site for their pictures
# and scripts if this server is not on the same machine and without HTTPS.
HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
PICTURE_HEADERS = {**HEADERS, "Cache-Control": "private, max-age=86400"}  # the address has the picture's version
_NUMBER = re.compile(r"[0-9]{1,9}")


_FULL = (errno.ENOSPC, errno.EDQUOT)


class RefusedAnswer(Exception):  # noqa: N818 - an answer
    """A request is refused with this status and sentence."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


class NotFoundAnswer(RefusedAnswer):
    """The requested object does not exist."""

    def __init__(self, text: str) -> None:
        super().__init__(404, text)


def answering(handler: Handler, folder: Callable[[], Path]) -> Handler:
    """The handler, with errors turned into answers. `folder`: where it writes, for errors of the disk."""

    async def answer(request: web.Request) -> web.StreamResponse:
        try:
            with disk_errors(folder()):
                return await handler(request)
        except (RefusedAnswer, TrainerError) as error:
            return problem(_status_of(error), str(error))

    return answer


def _status_of(error: Exception) -> int:
    if isinstance(error, RefusedAnswer):
        return error.status
    if isinstance(error, NotFoundError | RunFolderError):
        return 404
    if isinstance(error, DiskError):
        return 507 if error.errno in _FULL else 500
    return 409 if isinstance(error, NameTakenError) else 400


def reading(answer: Callable[[web.Request], web.Response]) -> Handler:
    """A GET handler that runs `answer` in a thread, because reading from disk would block the server's event loop."""

    async def handler(request: web.Request) -> web.StreamResponse:
        try:
            return await asyncio.to_thread(answer, request)
        except (NotFoundAnswer, TrainerError) as error:
            return problem(404, str(error))

    return handler


def is_gone(request: web.Request) -> bool:
    """Whether the page or program that sent this request has closed the connection."""
    return request.transport is None or request.transport.is_closing()


async def json_object(request: web.Request, most_bytes: int, example: str) -> dict[str, Any]:
    """The JSON object in a request's body.

    JSON only, because a page of another origin can't send that type without a preflight.

    Raises:
        ConfigError: the body is something else, or too large. `example` shows what to send.
    """
    length = request.content_length
    if request.content_type != "application/json" or length is None or length > most_bytes:
        raise ConfigError(f"Send a JSON object of at most {most_bytes} bytes: {example}")
    body = parse_json(await request.read(), "The body")
    if not isinstance(body, dict):
        raise ConfigError(f"Send a JSON object: {example}")
    return body


def number(text: str) -> int:
    """The whole number in a part of an address.

    Raises:
        NotFoundAnswer: it is none.
    """
    if not _NUMBER.fullmatch(text):
        raise NotFoundAnswer("The numbers in the address must be whole numbers.")
    return int(text)


def json_answer(value: Any, status: int = 200) -> web.Response:
    """An answer in JSON. NaN and infinite numbers become null."""
    return web.Response(text=json.dumps(finite(value)), status=status, content_type="application/json", headers=HEADERS)


def problem(status: int, text: str) -> web.Response:
    """An answer that says what is wrong, without paths of this machine."""
    return json_answer({"error": for_page(text)}, status)
