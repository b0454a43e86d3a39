"""Decides which requests may use this pack's routes: those of scripts, and those of the server's own pages.

A page of another site is told apart by its Origin. In DNS rebinding, an attacker's name leads to this server, so that
origin and host are equal. Then the name gives it away: it belongs to the public DNS, and the page does not use HTTPS,
because nobody but its owner has a certificate for the name.
"""

from __future__ import annotations

import ipaddress
import os
import platform
import re
from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING

from aiohttp import web

if TYPE_CHECKING:
    from aiohttp.typedefs import Handler

HOSTS_VARIABLE = "QWEN_EDIT_TRAINER_HOSTS"
_NAME = r"\[[0-9A-Fa-f:.]+\]|[\w.-]+"
_HOST = re.compile(rf"(?P<name>{_NAME})(?::\d{{1,5}})?", re.ASCII)
_ORIGIN = re.compile(rf"(?P<scheme>https?)://(?P<host>(?:{_NAME})(?::\d{{1,5}})?)", re.ASCII)
# Endings that the public DNS doesn't have, so that no stranger can own such a name.
_PRIVATE_ENDINGS = (".localhost", ".local", ".lan", ".internal", ".home.arpa")


def refusal(headers: Mapping[str, str]) -> str:
    """Why a request with these headers is refused, as a sentence; empty if it is allowed."""
    site = headers.get("Sec-Fetch-Site")
    if site is not None:  # browsers set it, for HTTPS and for this machine's own names only; pages can't change it
        return "" if site in ("same-origin", "none") else _OTHER_ORIGIN
    host = _HOST.fullmatch(headers.get("Host", ""))
    if host is None:
        return "The Host header is not the name of a server."
    origin = headers.get("Origin")
    if origin is not None:
        found = _ORIGIN.fullmatch(origin)
        if found is None or not _same_host(found["host"], host[0], found["scheme"]):
            return _OTHER_ORIGIN
        if found["scheme"] == "https":
            return ""
    name = host["name"].lower()
    if _is_own(name) or name in os.environ.get(HOSTS_VARIABLE, "").lower().replace(",", " ").split():
        return ""
    return (
        f"The server does not know the name {name}, so a page of another site may have sent this request. If the name "
        f"is yours, add it to the environment variable {HOSTS_VARIABLE} and restart ComfyUI."
    )


_OTHER_ORIGIN = "Requests from other origins are not allowed."


def _same_host(origin: str, host: str, scheme: str) -> bool:
    """Whether both name the same server. Either may leave out the scheme's usual port."""
    usual = ":443" if scheme == "https" else ":80"
    return origin.lower().removesuffix(usual) == host.lower().removesuffix(usual)


def _is_own(name: str) -> bool:
    """Whether no stranger can own the name: it is an address, this machine's name, or no name of the public DNS."""
    try:
        ipaddress.ip_address(name.strip("[]"))
    except ValueError:
        return "." not in name or name.endswith(_PRIVATE_ENDINGS) or name == platform.node().lower()
    return True


def guard(path: str, refused: Callable[[int, str], web.Response]) -> Callable[..., Awaitable[web.StreamResponse]]:
    """Middleware that answers refused requests below `path` with `refused(403, reason)`. It lets all others through.

    It must come before ComfyUI's own check, which fails for an Origin that is no address.
    """

    @web.middleware
    async def check_origin(request: web.Request, handler: Handler) -> web.StreamResponse:
        if request.path.startswith((f"{path}/", f"/api{path}/")) and (reason := refusal(request.headers)):
            return refused(403, reason)
        return await handler(request)

    return check_origin
