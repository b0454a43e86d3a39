"""`make demo`: trains the demo LoRA in a real ComfyUI, over its API.

Starts ComfyUI with the published files of the pack, queues workflows/api/demo.json, shows progress, and copies the LoRA
and the validation grid to .demo/. The last line of the output is:

    demo: lora=<path> keys=<n> steps=<n> psnr_base=<dB> psnr_lora=<dB> psnr_vae=<dB> seconds=<s>
"""

from __future__ import annotations

import argparse
import json
import shutil
import struct
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tools.comfyui import (
    REPO,
    ComfyUI,
    ComfyUIError,
    device_arguments,
    failure,
    install_pack,
    make_base,
    status_of,
)

WORKFLOW = REPO / "workflows" / "api" / "demo.json"
MARK = ".made-by-make-demo"  # the demo empties a folder only if it contains this file
RESULT = "qwen_edit_run"  # the key of the training node's ui output
FIGURES = ("psnr_base", "psnr_lora", "psnr_vae")


def say(text: str) -> None:
    """Print a line and flush it."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


class Progress:
    """Shows ComfyUI's progress: one line for every tenth of a node's work, or an updated line on a terminal."""

    def __init__(self, prompt: dict[str, Any]) -> None:
        self.titles = {
            node_id: node.get("_meta", {}).get("title", node["class_type"]) for node_id, node in prompt.items()
        }
        self.live = sys.stdout.isatty()
        self.shown = ("", -1)
        self.started = time.monotonic()

    def __call__(self, event: dict[str, Any]) -> None:
        data = event.get("data", {})
        if event["type"] == "progress" and data.get("max"):
            self._show(str(data.get("node")), int(data["value"]), int(data["max"]))
        elif event["type"] == "executing" and data.get("node"):
            self._show(str(data["node"]), 0, 0)

    def _show(self, node_id: str, value: int, total: int) -> None:
        tenth = 10 * value // total if total else 0
        if self.shown == (node_id, tenth) and not (self.live and total):
            return
        seconds = time.monotonic() - self.started
        count = f"{value}/{total}" if total else "..."
        line = f"[{seconds:5.0f} s] {self.titles.get(node_id, node_id):<32} {count}"
        if self.live:
            sys.stdout.write("\r\x1b[K" + line + ("\n" if total and value >= total else ""))
            sys.stdout.flush()
        else:
            say(line)
        self.shown = (node_id, tenth)


def result_of(entry: dict[str, Any]) -> dict[str, Any]:
    """The training node's result.

    Raises:
        ComfyUIError: the prompt did not succeed, or no node returned a run.
    """
    if status_of(entry) != "execution_success":
        raise ComfyUIError(failure(entry))
    for output in entry["outputs"].values():
        if output.get(RESULT):
            return output[RESULT][0]
    raise ComfyUIError(f"The prompt succeeded, but no node reported {RESULT!r}. The outputs are {entry['outputs']}.")


def find_file(base: Path, name: str) -> Path:
    """The path of a file that ComfyUI reported, absolute or relative to its LoRA or output folders.

    Raises:
        ComfyUIError: there is no such file.
    """
    for folder in (base, base / "models" / "loras", base / "output" / "loras", base / "output"):
        if (folder / name).is_file():
            return folder / name
    raise ComfyUIError(f"ComfyUI reported the file {name!r}, but {base} does not contain it.")


def count_keys(file: Path) -> int:
    """Number of tensors in a safetensors file."""
    with file.open("rb") as opened:
        (size,) = struct.unpack("<Q", opened.read(8))
        return len(set(json.loads(opened.read(size))) - {"__metadata__"})


def run_demo(folder: Path, server: ComfyUI, timeout: float) -> str:
    """Queue the demo, wait for it, and copy its files to `folder`. Returns the last line of the output."""
    started = time.monotonic()
    prompt = json.loads(WORKFLOW.read_text(encoding="utf-8"))
    server.on_event = Progress(prompt)
    entry = server.wait(server.queue(prompt), timeout)
    seconds = time.monotonic() - started
    result = result_of(entry)
    lora = Path(shutil.copy2(find_file(server.base, result["lora_file"]), folder))
    if result.get("grid_file"):
        grid = shutil.copy2(find_file(server.base, result["grid_file"]), folder / "grid.png")
        say(f"grid (reference | base | LoRA | target): {grid}")
    say(f"run folder: {result.get('run_dir')}")
    figures = " ".join(f"{name}={float(result[name]):.2f}" for name in FIGURES)
    return f"demo: lora={lora} keys={count_keys(lora)} steps={result['steps']} {figures} seconds={seconds:.0f}"


def prepare(folder: Path) -> Path:
    """Empty `folder` and create a ComfyUI base folder in it, with the pack. Returns the base folder.

    Raises:
        ComfyUIError: the folder contains files that an earlier demo did not make.
    """
    if folder.exists() and any(folder.iterdir()) and not (folder / MARK).is_file():
        raise ComfyUIError(f"{folder} contains other files. Choose an empty or a new folder.")
    base = folder / "base"
    shutil.rmtree(folder, ignore_errors=True)
    make_base(base)
    (folder / MARK).touch()
    install_pack(base)
    return base


def main() -> int:
    """Run the demo."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=REPO / ".demo", help="emptied first; everything is written here")
    parser.add_argument("--timeout", type=float, default=3600, help="seconds before the demo fails")
    given = parser.parse_args()
    folder = given.folder.absolute()
    try:
        base = prepare(folder)
        say("starting ComfyUI")
        arguments = [*device_arguments(), "--disable-api-nodes"]
        with ComfyUI(base, *arguments, log=folder / "comfyui.log") as server:
            say(f"ComfyUI is ready at {server.url}; its log is {server.log}")
            say(run_demo(folder, server, given.timeout))
    except ComfyUIError as error:
        raise SystemExit(f"demo: failed: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit("demo: stopped") from None
    return 0


if __name__ == "__main__":
    sys.exit(main())
