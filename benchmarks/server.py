"""Response times of ComfyUI during training: `python -m benchmarks.server`.

Trains the demo edit in a ComfyUI of its own. Requests two addresses up to twenty times a second, first while idle and
then during training, and prints a Markdown table. A slow response holds up every page and script.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
from pathlib import Path
from typing import Any

from tests.support.server_waits import percentile, wait_for_steps, waits
from tools.comfyui import REPO, ComfyUI, device_arguments, install_pack, make_base

ADDRESSES = ("/queue", "/qwen_edit_trainer/runs")


def demo_prompt(steps: int) -> dict[str, Any]:
    """The demo's training node and its inputs, without validation, so that all time is spent on steps."""
    prompt = json.loads((REPO / "workflows" / "api" / "demo.json").read_text(encoding="utf-8"))
    train = next(node for node in prompt.values() if node["class_type"] == "QwenEdit_Train")
    train["inputs"] |= {"run_name": "watched", "max_train_steps": steps, "more_settings": ["more", 0]}
    needed = {link[0] for link in train["inputs"].values() if isinstance(link, list)}
    given = {
        "more": {"class_type": "QwenEdit_MoreSettings", "inputs": {"validation_settings": ["validation", 0]}},
        "validation": {"class_type": "QwenEdit_ValidationSettings", "inputs": {"validation_step_interval": 0}},
    }
    return {"train": train, **given, **{key: node for key, node in prompt.items() if key in needed}}


def row(what: str, path: str, values: list[float]) -> str:
    """One line of the table, in milliseconds."""
    figures = [statistics.median(values), percentile(values, 0.95), percentile(values, 0.99), max(values)]
    return f"| {what} | `{path}` | {len(values)} | " + " | ".join(f"{value * 1000:.1f}" for value in figures) + " |"


def main() -> None:
    """Start ComfyUI, measure it idle and during training, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=30, help="time per address, idle and during training")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        base = make_base(Path(folder))
        install_pack(base)
        print(f"{platform.machine()}, {platform.system()}, Python {platform.python_version()}\n")
        print("| | address | responses | median ms | 95 % ms | 99 % ms | longest ms |")
        print("| --- | --- | --- | --- | --- | --- | --- |")
        with ComfyUI(base, *device_arguments(), "--disable-api-nodes", log=base / "comfyui.log") as server:
            for path in ADDRESSES:
                print(row("idle", path, waits(server, path, given.seconds)), flush=True)
            server.queue(demo_prompt(1_000_000))
            wait_for_steps(server, 3)
            for path in ADDRESSES:
                print(row("training", path, waits(server, path, given.seconds)), flush=True)


if __name__ == "__main__":
    main()
