"""How long a ComfyUI server takes to answer while it trains."""

from __future__ import annotations

import math
import time
import urllib.request

from tools.comfyui import ComfyUI

EVERY_SECONDS = 0.05


def waits(server: ComfyUI, path: str, seconds: float) -> list[float]:
    """Seconds that each answer took, of requests one after the other over a time."""
    found, end = [], time.monotonic() + seconds
    while time.monotonic() < end:
        began = time.perf_counter()
        with urllib.request.urlopen(server.url + path, timeout=60) as answer:
            answer.read()
        found.append(time.perf_counter() - began)
        time.sleep(EVERY_SECONDS)
    return found


def percentile(values: list[float], share: float) -> float:
    """The value below which a share of all lies."""
    return sorted(values)[min(len(values) - 1, math.ceil(share * len(values)) - 1)]


def wait_for_steps(server: ComfyUI, count: int, seconds: float = 600) -> None:
    """Until the training has done so many."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if any(run["active"] and run["step"] >= count for run in server.get("/qwen_edit_trainer/runs")["runs"]):
            return
        time.sleep(0.5)
    raise TimeoutError(f"The training has not done {count} steps within {seconds} s.")
