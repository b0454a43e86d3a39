"""`make demo`: train the demo LoRA inside a real ComfyUI, from pictures to file, over its API.

Boots ComfyUI with the pack installed as people install it, queues workflows/api/demo.json, shows progress, and puts the
LoRA file and the picture grid into .demo/. The last line it prints:

    demo: lora=<path> keys=<n> steps=<n> psnr_base=<dB> psnr_lora=<dB> psnr_vae=<dB> seconds=<s>
"""

from __future__ import annotations

import argparse
import json
import shutil
import struct
import sys
import time
from collections.abc import Iterator
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
EXAMPLE = "example.png"  # lies in ComfyUI's own input folder, which is not this one
MARK = ".made-by-make-demo"  # only a folder with this file in it is emptied
RESULT = "qwen_edit_run"  # the key of the training node's ui output
FIGURES = ("psnr_base", "psnr_lora", "psnr_vae")


def say(text: str) -> None:
    """One line on standard output, at once."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


class Progress:
    """Shows ComfyUI's progress messages: one line per phase or per tenth of it, or a bar on a terminal."""

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


def strings(value: Any) -> Iterator[str]:
    """Every text in a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from strings(item)


def pictures_folder(prompt: dict[str, Any]) -> str:
    """The folder below ComfyUI's input that the demo graph reads pairs from.

    Raises:
        ComfyUIError: the graph names no folder `.../target`.
    """
    inputs = [node["inputs"] for node in prompt.values()]
    for text in strings(inputs):
        parts = text.replace("\\", "/").split("/")
        if len(parts) > 1 and parts[-1] == "target":
            return "/".join(parts[1:-1] if parts[0] == "input" else parts[:-1])
    raise ComfyUIError(f"{WORKFLOW} names no target folder.")


def result_of(entry: dict[str, Any]) -> dict[str, Any]:
    """What the training node reported.

    Raises:
        ComfyUIError: the prompt did not succeed, or no node reported a run.
    """
    if status_of(entry) != "execution_success":
        raise ComfyUIError(failure(entry))
    for output in entry["outputs"].values():
        if output.get(RESULT):
            return output[RESULT][0]
    raise ComfyUIError(f"The prompt ended, but no node reported {RESULT!r}; outputs are {entry['outputs']}.")


def find_file(base: Path, name: str) -> Path:
    """A reported file: an absolute path, or a path below ComfyUI's LoRA or output folders.

    Raises:
        ComfyUIError: there is no such file.
    """
    for folder in (base, base / "models" / "loras", base / "output" / "loras", base / "output"):
        if (folder / name).is_file():
            return folder / name
    raise ComfyUIError(f"ComfyUI reported the file {name!r}, but it is not below {base}.")


def count_keys(file: Path) -> int:
    """Tensors named in a safetensors header."""
    with file.open("rb") as opened:
        (size,) = struct.unpack("<Q", opened.read(8))
        return len(set(json.loads(opened.read(size))) - {"__metadata__"})


def run_demo(folder: Path, server: ComfyUI, timeout: float) -> str:
    """Queue the demo, wait, keep its files. Returns the closing line."""
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
    """A fresh ComfyUI base folder with the pack and the demo pairs in it.

    Raises:
        ComfyUIError: the folder holds things that are not a former demo's.
    """
    if folder.exists() and any(folder.iterdir()) and not (folder / MARK).is_file():
        raise ComfyUIError(f"{folder} holds other things; name an empty or a new folder.")
    from trainer_core.demo.pictures import make_demo_pairs

    base = folder / "base"
    shutil.rmtree(folder, ignore_errors=True)
    make_base(base)
    (folder / MARK).touch()
    install_pack(base)
    prompt = json.loads(WORKFLOW.read_text(encoding="utf-8"))
    pictures = base / "input" / pictures_folder(prompt)
    make_demo_pairs(pictures)
    shutil.copy(min((pictures / "reference").iterdir()), base / "input" / EXAMPLE)
    say(f"pairs: {pictures}")
    return base


def main() -> int:
    """Prepare, boot, train, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=REPO / ".demo", help="made anew; everything is written below it")
    parser.add_argument("--timeout", type=float, default=3600, help="seconds until it gives up")
    given = parser.parse_args()
    folder = given.folder.absolute()
    try:
        base = prepare(folder)
        say("starting ComfyUI")
        arguments = [*device_arguments(), "--disable-api-nodes"]
        with ComfyUI(base, *arguments, log=folder / "comfyui.log") as server:
            say(f"ComfyUI answers at {server.url}; its log is {server.log}")
            say(run_demo(folder, server, given.timeout))
    except ComfyUIError as error:
        raise SystemExit(f"demo: failed: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit("demo: stopped") from None
    return 0


if __name__ == "__main__":
    sys.exit(main())
