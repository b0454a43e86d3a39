"""Requests to the routes about data sets."""

from __future__ import annotations

import http.client
import io
import json
import urllib.parse
from typing import Any

import numpy as np
from PIL import Image

from tests.support.comfyui_server import PackServer

SETS = "/qwen_edit_trainer/data_sets"
Answer = tuple[int, dict[str, str], bytes]


def picture(seed: int, size: tuple[int, int] = (64, 48)) -> bytes:
    """A PNG with coloured blobs."""
    blobs = np.random.default_rng(seed).integers(0, 255, (6, 8, 3), dtype=np.uint8)
    data = io.BytesIO()
    Image.fromarray(blobs).resize(size, Image.Resampling.BICUBIC).save(data, "PNG")
    return data.getvalue()


def asked(
    server: PackServer, method: str, path: str, body: bytes | None = None, kind: str = "application/json", **more: str
) -> Answer:
    """Status, headers and body of the answer. The path is sent exactly as written, without normalisation."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=300)
    headers = {name.replace("_", "-"): value for name, value in more.items()}
    try:
        connection.request(method, path, body, {**({"Content-Type": kind} if body is not None else {}), **headers})
        answer = connection.getresponse()
        return answer.status, dict(answer.getheaders()), answer.read()
    finally:
        connection.close()


def told(server: PackServer, method: str, path: str, body: Any = None) -> Any:
    """The JSON of an answer that must be 200."""
    status, _, data = asked(server, method, path, None if body is None else json.dumps(body).encode())
    assert status == 200, data
    return json.loads(data)


def address(name: str, rest: str = "") -> str:
    """The address of a data set, and of `rest` below it."""
    return f"{SETS}/{urllib.parse.quote(name, safe='')}{rest}"


def change(server: PackServer, name: str, action: str, body: Any) -> Any:
    """The answer to a change of a data set, which must be 200."""
    return told(server, "POST", address(name, f"/{action}"), body)


def add(server: PackServer, name: str, file: str, data: bytes, side: str = "auto") -> Any:
    """The answer to an upload, which must be 200."""
    query = urllib.parse.urlencode({"side": side, "name": file})
    status, _, answer = asked(server, "POST", address(name, f"/pictures?{query}"), data, "application/octet-stream")
    assert status == 200, answer
    return json.loads(answer)
