"""Seconds and host memory of loading a transformer of several GB, in a separate process each time.

    python benchmarks/loading.py --blocks 7 --precision int8-quanto

Writes a bf16 file of that many blocks with random weights, then loads it in fresh processes: `ours` block by block;
`first` the same, and stores the quantised weights (quantised_cache_gb); `second` is the next start, which reads them;
`read` only reads the stored files; `whole` is diffusers' from_pretrained followed by quantising. Before each, the files
are dropped from the system's file cache, or with `--warm` read into it. Peaks: `anonymous` is the process's own memory,
which must fit into RAM; `resident` also counts mapped pages of the files, which the system can take back.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
GIB = 2**30
WAYS = ("ours", "first", "second", "read", "whole")
CACHED = ("first", "second")  # these use the cache of quantised weights


class PeakMemory(threading.Thread):
    """Polls this process's memory, in bytes."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.anonymous, self.resident, self._over = 0, 0, threading.Event()

    def read(self) -> tuple[int, int]:
        """Anonymous and resident bytes now."""
        lines = Path("/proc/self/status").read_text().splitlines()
        found = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.startswith("Rss")}
        return found["RssAnon"], sum(found.values())

    def run(self) -> None:
        """Poll until `stop` is called."""
        while not self._over.wait(0.005):
            anonymous, resident = self.read()
            self.anonymous, self.resident = max(self.anonymous, anonymous), max(self.resident, resident)

    def stop(self) -> None:
        """Stop polling, and wait for the thread."""
        self._over.set()
        self.join()


def write(folder: Path, blocks: int) -> int:
    """Write a transformer in diffusers' layout, one file per block. Returns its size in bytes."""
    from diffusers import QwenImageTransformer2DModel
    from safetensors.torch import save_file

    with torch.device("meta"):
        empty = QwenImageTransformer2DModel(num_layers=blocks)
    empty.save_config(folder / "transformer")
    shapes, index, total = {name: each.shape for name, each in empty.named_parameters()}, {}, 0
    groups = [f"transformer_blocks.{number}." for number in range(blocks)] + [""]
    for number, prefix in enumerate(groups):
        names = [n for n in shapes if n.startswith(prefix) and (prefix or not n.startswith("transformer_blocks."))]
        file = f"diffusion_pytorch_model-{number + 1:05d}-of-{len(groups):05d}.safetensors"
        tensors = {n: torch.empty(shapes[n], dtype=torch.bfloat16).uniform_(-0.03, 0.03) for n in names}
        total += sum(each.nbytes for each in tensors.values())
        save_file(tensors, folder / "transformer" / file)
        index |= dict.fromkeys(names, file)
    listed = {"metadata": {"total_size": total}, "weight_map": index}
    (folder / "transformer" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(listed))
    for part in ("vae", "text_encoder"):
        (folder / part).mkdir()
        (folder / part / "config.json").write_text("{}")
    return total


def load(way: str, folder: Path, precision: str, device: torch.device) -> None:
    """Load in this process in one of the WAYS, and print the figures as JSON."""
    from diffusers import QwenImageTransformer2DModel

    from trainer_core.config import ModelConfig
    from trainer_core.events import SILENT
    from trainer_core.precision.quantise import converter, quantise
    from trainer_core.qwen_image.base_model import BaseModel
    from trainer_core.qwen_image.transformer import SENSITIVE_LAYERS, load_transformer

    kept = {"quantised_cache_gb": 100.0, "quantised_cache_dir": str(folder / "kept")} if way in CACHED else {}
    config = ModelConfig(base=str(folder), base_model_precision=precision, device=str(device), **kept)
    convert = converter(config.base_model_precision)
    if convert is not None:
        convert(torch.nn.Linear(64, 64, device=device).bfloat16(), device)  # its imports should not be timed
    peak = PeakMemory()
    before, start = peak.read()[0], time.monotonic()
    peak.start()
    if way == "read":
        read_all(folder / "kept")
        network = None
    elif way != "whole":
        network = load_transformer(BaseModel(config), device)
    else:
        network = QwenImageTransformer2DModel.from_pretrained(folder / "transformer", torch_dtype=torch.bfloat16)
        quantise(network, config.base_model_precision, SENSITIVE_LAYERS, device, SILENT)
        network.to(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    seconds = time.monotonic() - start
    peak.stop()
    figures = {"seconds": seconds, "anonymous": peak.anonymous - before, "resident": peak.resident}
    print(json.dumps({**figures, "left": peak.read()[0] - before, "there": network is not None}))


def forget(folder: Path) -> None:
    """Drop the files from the system's file cache."""
    for path in folder.rglob("*.safetensors"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_all(folder: Path) -> None:
    """Read all safetensors files below `folder`."""
    for path in sorted(folder.rglob("*.safetensors")):
        buffer = torch.empty(path.stat().st_size, dtype=torch.uint8)
        with path.open("rb") as file:
            file.readinto(buffer.numpy().data)


def main() -> None:
    """Write the model, load it in all WAYS, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=7)
    parser.add_argument("--precision", default="int8-quanto")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--way", choices=WAYS)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--warm", action="store_true")
    given = parser.parse_args()
    if given.way:
        load(given.way, given.folder, given.precision, torch.device(given.device))
        return
    with tempfile.TemporaryDirectory() as name:
        size = write(Path(name), given.blocks)
        threads = torch.get_num_threads()
        print(
            f"{size / GIB:.2f} GiB in bf16, {given.blocks} blocks, {given.precision}, {threads} threads, {given.device}"
        )
        print(
            "| way | seconds | peak anonymous, GiB | left after, GiB | peak resident, GiB |\n"
            "| --- | --- | --- | --- | --- |"
        )
        for way in WAYS:
            read_all(Path(name)) if given.warm else forget(Path(name))
            command = [sys.executable, __file__, "--way", way, "--folder", name, "--precision", given.precision]
            command += ["--device", given.device]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            row = json.loads(output.splitlines()[-1])
            sizes = " | ".join(f"{row[key] / GIB:.2f}" for key in ("anonymous", "left", "resident"))
            print(f"| {way} | {row['seconds']:.1f} | {sizes} |", flush=True)


if __name__ == "__main__":
    main()
