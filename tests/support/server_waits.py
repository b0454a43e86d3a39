"""Measures how long a ComfyUI server takes to answer while it trains."""

from __future__ import annotations

import math
import time
import urllib.request

from tools.comfyui import ComfyUI

EVERY_SECONDS = 0.05


def waits(server: ComfyUI, path: str, seconds: float) -> list[float]:
    """Response times in seconds of requests sent one after the other for `seconds`."""
    found, end = [], time.monotonic() + seconds
    while time.monotonic() < end:
        began = time.perf_counter()
        with urllib.request.urlopen(server.url + path, timeout=300) as answer:
            answer.read()
        found.append(time.perf_counter() - began)
        time.sleep(EVERY_SECONDS)
    return found


def percentile(values: list[float], share: float) -> float:
    """The nearest-rank percentile; `share` is between 0 and 1."""
    return sorted(values)[min(len(values) - 1, math.ceil(share * len(values)) - 1)]


def wait_for_steps(server: ComfyUI, count: int, seconds: float = 600) -> None:
    """Wait until the training has done `count` steps. Raises TimeoutError after `seconds`."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if any(run["active"] and run["step"] >= count for run in server.get("/qwen_edit_trainer/runs")["runs"]):
            return
        time.sleep(0.5)
    raise TimeoutError(f"The training has not done {count} steps within {seconds} s.")
