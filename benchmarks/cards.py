"""Runs the presets end to end on cards of their sizes: `python -m benchmarks.cards [--presets 12gb 24gb] [--via both]`.

Makes full-size files in ComfyUI's layouts with random weights, and pairs of pictures in three aspect ratios. Each row
is one preset on one card: it encodes, trains 8 steps, samples one validation picture and exports the LoRA, through the
command line or through the API of a ComfyUI that then samples with the LoRA. `--via short` is ComfyUI with the four
nodes of the short path, which choose the preset themselves, and prints what they foresaw. The process gets no more
device memory than the card has, and is told so. Prints seconds and peaks by phase. The exit code is 1 if a row fails or
doesn't fit.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.card_files import TEXT_ENCODERS, TRANSFORMER, VAE
from benchmarks.card_probe import CARD, EVENTS, LAYERS, MARK_ROUTE, write_custom_node
from benchmarks.card_table import LORA, Row, tables
from tools.comfyui import REPO, ComfyUI, ComfyUIError, comfyui_dir, device_arguments, failure, make_base, status_of
from tools.serve import link_pack
from trainer_core.config import JobConfig
from trainer_core.job import load_job
from trainer_core.presets import preset_names

# Memory that a card of this size tells, in GiB: less than its name says, and a desktop holds some of it.
CARDS = {8: 7.5, 12: 11.5, 16: 15.5, 24: 23.5, 32: 31.0, 48: 47.0}
STEPS, PAIRS, FLAVOUR = 8, 8, "edit-v2"
ASPECTS = (1.0, 4 / 3, 2 / 3)
LORA_STEPS = 2
SECTIONS = {"lora": "Lora", "optimizer": "Optimizer", "validation": "Validation", "memory": "Memory", "ema": "Ema"}
LOOP = ("batching", "noise", "checkpoints", "gradient_checkpointing")  # sections of the training settings node


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", default=card_presets(), help="default: those named after a card")
    parser.add_argument("--cards", nargs="+", type=float, help="sizes in GB; default: the one in the preset's name")
    parser.add_argument("--via", choices=["cli", "comfyui", "short", "both"], default="both")
    parser.add_argument("--seconds", type=float, default=1e9, help="start no further row after this time")
    parser.add_argument("--row-seconds", type=float, default=300, help="a row that takes longer has failed")
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="NAME=VALUE", help="settings that override the presets"
    )
    parser.add_argument("--text-encoder", choices=list(TEXT_ENCODERS), default="fp8")
    parser.add_argument("--layers", type=int, default=0, help="layers of each network, for a small trial; default: all")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--work", type=Path, help="folder for models and runs; default: the faster of two, if it fits")
    parser.add_argument("--out", type=Path, help="file for the tables; logs go beside it")
    given = parser.parse_args()
    if given.set and given.via == "short":
        parser.error("--via short takes no --set: its preset is chosen by the card, and nothing overrides it")
    return given


def card_presets() -> list[str]:
    """The presets that are named after a card, smallest first."""
    return sorted((name for name in preset_names() if re.fullmatch(r"\d+gb", name)), key=lambda name: int(name[:-2]))


def rows_to_run(given: argparse.Namespace) -> Iterator[Row]:
    """Each preset on each card, through the command line and ComfyUI."""
    for preset in given.presets:
        for size in given.cards or [float(preset.removesuffix("gb"))]:
            for via in ("cli", "comfyui") if given.via == "both" else (given.via,):
                yield Row(preset, via, 0.0 if given.device == "cpu" else CARDS.get(int(size), size - 0.5))


def work_folder(layers: int) -> Path:
    """A folder in memory if it has room for all files, else on disk."""
    memory = Path("/dev/shm")
    needed = (8 if layers else 45) * 2**30
    is_large = memory.is_dir() and shutil.disk_usage(memory).free > needed
    return Path(tempfile.mkdtemp(prefix="cards-", dir=memory if is_large else None))


def make_pairs(folder: Path, side: int) -> None:
    """Write PAIRS + 1 pairs with the area of a square of `side`, in three aspect ratios. The edit inverts colours."""
    draws = np.random.default_rng(0)
    for part in ("target", "reference"):
        (folder / part).mkdir(parents=True)
    for number in range(PAIRS + 1):
        aspect = ASPECTS[number % len(ASPECTS)]
        size = round(side * aspect**0.5 / 32) * 32, round(side / aspect**0.5 / 32) * 32
        small = Image.fromarray(draws.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        picture = small.resize(size, Image.Resampling.BICUBIC)
        picture.save(folder / "reference" / f"{number}.png", compress_level=1)
        Image.fromarray(255 - np.asarray(picture)).save(folder / "target" / f"{number}.png", compress_level=1)
        (folder / "target" / f"{number}.txt").write_text("Turn the picture into its negative.")


def write_job(folder: Path, row: Row, models: Path, given: argparse.Namespace) -> tuple[Path, JobConfig]:
    """Write the pairs and the job file of a row. Returns the file, and the job with the preset's settings."""
    model = {
        "transformer_file": str(models / TRANSFORMER),
        "text_encoder_file": str(models / TEXT_ENCODERS[given.text_encoder]),
        "vae_file": str(models / VAE),
        "tokenizer": str(comfyui_dir() / "comfy/text_encoders/qwen25_tokenizer"),
        "flavour": FLAVOUR,
        "device": given.device,
    }
    job = {
        "model": model,
        "dataset": {"target_dir": "input/pairs/target", "reference_dirs": ["input/pairs/reference"]},
        "encoding": {"num_eval_images": 1},
        "cache_dir": "cache",
        "run_dir": "runs/card",
        "max_train_steps": STEPS,
    }
    path = folder / "job.json"
    path.write_text(json.dumps(job, indent=2))
    loaded = load_job(path, given.set, preset=row.preset)
    make_pairs(folder / "input/pairs", loaded.encoding.resolution)
    return path, loaded


def child_environment(folder: Path, row: Row, layers: int) -> dict[str, str]:
    """Environment of a child process."""
    ours = {EVENTS: str(folder / "notes.jsonl"), CARD: str(row.card), LAYERS: str(layers), "PYTHONUNBUFFERED": "1"}
    return {**os.environ, **ours}


def run_command_line(row: Row, folder: Path, job: Path, given: argparse.Namespace) -> None:
    """Train through the command line."""
    command = [sys.executable, "-m", "benchmarks.card_probe", "train", str(job), "--example", row.preset]
    command += [part for change in given.set for part in ("--set", change)]
    with (folder / "log.txt").open("w") as log:
        child = subprocess.Popen(
            command, cwd=REPO, stdout=log, stderr=subprocess.STDOUT, env=child_environment(folder, row, given.layers)
        )
        try:
            code = child.wait(given.row_seconds)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
            code = f"more than {given.row_seconds:.0f} s"
    if code != 0:
        lines = (folder / "log.txt").read_text(errors="replace").strip().splitlines()
        row.problem = f"ended with {code}: {' '.join(lines[-1:])[:300]}"


def settings_of(info: dict[str, Any], *places: Any) -> dict[str, Any]:
    """Values for a node's inputs, from the first of `places` that has a setting of that name.

    Leaves out empty text, because a choice such as init_lora has a word for "none" as its default.
    """
    inputs = {**info["input"].get("required", {}), **info["input"].get("optional", {})}
    found = {name: [getattr(place, name) for place in places if hasattr(place, name)] for name in inputs}
    values = {name: each[0] for name, each in found.items() if each}
    texts = {name: "\n".join(value) if isinstance(value, tuple) else value for name, value in values.items()}
    return {name: value for name, value in texts.items() if value != "" or name in info["input"].get("required", {})}


def training_prompt(server: ComfyUI, row: Row, job: JobConfig, changes: Sequence[str]) -> dict[str, Any]:
    """The graph that people build with a preset: its name on the training node, the rest on the other nodes."""
    info = server.get("/object_info")

    def node(name: str, *places: Any, **inputs: Any) -> dict[str, Any]:
        class_type = f"QwenEdit_{name}"
        return {"class_type": class_type, "inputs": {**settings_of(info[class_type], *places), **inputs}}

    files = {
        f"{part}_file": Path(getattr(job.model, f"{part}_file")).name for part in ("transformer", "text_encoder", "vae")
    }
    pairs = {"target_folder": "pairs/target", "reference_folder_1": "pairs/reference", "caption_strategy": "textfile"}
    prompt = {
        "model": node("LoadModelFiles", job.model, **files),
        "pairs": node("PairFolders", instance_prompt="", **pairs),
        "encoded": node("EncodePairs", job.encoding, model=["model", 0], dataset=["pairs", 0]),
    }
    own = {"run_name": "card", "if_run_exists": "continue", "preset": row.preset, "model": ["model", 0]}
    changed = {change.partition(".")[0].partition("=")[0] for change in changes}
    for section, name in SECTIONS.items():
        if section in changed:
            prompt[section] = node(f"{name}Settings", getattr(job, section))
            own[f"{section}_settings"] = [section, 0]
    if changed & set(LOOP):
        prompt["loop"] = node("TrainingSettings", job.batching, job.noise, job.checkpoints, job)
        own["training_settings"] = ["loop", 0]
    train = {"max_train_steps": STEPS, "seed": job.seed, "encoded": ["encoded", 0], **own}
    return {**prompt, "train": {"class_type": "QwenEdit_TrainLora", "inputs": train}}


def short_prompt(job: JobConfig) -> dict[str, Any]:
    """The graph of the short path, as a beginner runs it: the preset is chosen by the card."""

    def node(name: str, **inputs: Any) -> dict[str, Any]:
        return {"class_type": f"QwenEdit_{name}", "inputs": inputs}

    trial = {"run_name": "card", "step": 0, "strength": 1.0, "pair": 1, "picture": "held-out pair", "instruction": ""}
    return {
        "model": node("ChooseModel", model=Path(job.model.transformer_file).name, release="2509"),
        "pairs": node("EditPairs", data_set="pairs", instruction=""),
        "train": node(
            "Train",
            run_name="card",
            preset="automatic",
            max_train_steps=STEPS,
            model=["model", 0],
            dataset=["pairs", 0],
        ),
        "try": node("TryLora", run=["train", 4], **trial),
    }


def foreseen(server: ComfyUI, prompt: dict[str, Any], preset: str) -> None:
    """Print what the training node says before the start.

    Raises:
        ComfyUIError: it would refuse to run, or has chosen another preset.
    """
    asked = {"prompt": prompt, "node_id": "train", "measure_pairs": False}
    answer = server.post("/qwen_edit_trainer/before_start", asked)
    print(json.dumps(answer), flush=True)
    if answer["problems"] or answer["preset"]["name"] != preset:
        raise ComfyUIError(f"Before the start: preset {answer['preset']['name']}, problems {answer['problems']}")


def lora_prompt(job: JobConfig, lora_name: str, *, small: bool) -> dict[str, Any]:
    """The workflow that people use the LoRA in, with two sampling steps. `small`: a tiny picture without references."""
    text = (REPO / "workflows/api/use_2509.json").read_text(encoding="utf-8")
    prompt = json.loads(text)
    inputs = {node["class_type"]: node["inputs"] for node in prompt.values()}
    inputs["UNETLoader"]["unet_name"] = Path(job.model.transformer_file).name
    inputs["CLIPLoader"]["clip_name"] = Path(job.model.text_encoder_file).name
    inputs["VAELoader"]["vae_name"] = Path(job.model.vae_file).name
    inputs["LoadImage"]["image"] = "picture.png"
    inputs["LoraLoaderModelOnly"]["lora_name"] = lora_name
    inputs["KSampler"]["steps"] = LORA_STEPS
    if small:
        scaled = next(node for node in prompt.values() if node["class_type"] == "FluxKontextImageScale")
        size = {"width": 64, "height": 64, "upscale_method": "area", "crop": "disabled"}
        scaled["class_type"], scaled["inputs"] = "ImageScale", {**scaled["inputs"], **size}
        for node in prompt.values():
            if node["class_type"] == "TextEncodeQwenImageEditPlus":
                del node["inputs"]["vae"]
    return prompt


def finished(server: ComfyUI, prompt: dict[str, Any], seconds: float) -> dict[str, Any]:
    """Run a prompt. Returns its history entry.

    Raises:
        ComfyUIError: it failed.
    """
    entry = server.wait(server.queue(prompt), seconds)
    if status_of(entry) != "execution_success":
        raise ComfyUIError(failure(entry))
    return entry


def run_comfyui(row: Row, folder: Path, job: JobConfig, models: Path, given: argparse.Namespace) -> None:
    """Train through ComfyUI's API, then sample with the LoRA there."""
    make_base(folder)
    for kind in ("diffusion_models", "text_encoders", "vae"):
        (folder / "models" / kind).symlink_to(models / kind, target_is_directory=True)
    link_pack(folder)
    write_custom_node(folder / "custom_nodes/card_probe")
    shutil.copy(folder / "input/pairs/reference/0.png", folder / "input/picture.png")
    page = folder / "page"  # the API works without ComfyUI's page, which is a large package
    page.mkdir()
    (page / "index.html").write_text("<!doctype html><title>No page</title>")
    options = ["--disable-api-nodes", "--front-end-root", str(page), *device_arguments()]
    environment = child_environment(folder, row, given.layers)
    try:
        with ComfyUI(folder, *options, log=folder / "log.txt", environment=environment) as server:
            server.post(f"{MARK_ROUTE}?phase=start")
            if row.via == "short":
                prompt = short_prompt(job)
                foreseen(server, prompt, row.preset)
            else:
                prompt = training_prompt(server, row, job, given.set)
            entry = finished(server, prompt, given.row_seconds)
            lora_name = entry["outputs"]["train"]["qwen_edit_run"][0]["lora_name"]
            server.post(f"{MARK_ROUTE}?phase=end")
            finished(server, lora_prompt(job, lora_name, small=given.layers > 0), given.row_seconds)
            server.post(f"{MARK_ROUTE}?phase={LORA.replace(' ', '%20')}")
    except ComfyUIError as error:
        row.problem = str(error)[:300].replace("\n", " ")
        return
    if "lora key not loaded" in (folder / "log.txt").read_text(errors="replace"):
        row.problem = "ComfyUI did not load some keys of the LoRA"


def run_row(row: Row, folder: Path, models: Path, given: argparse.Namespace) -> None:
    """Run one row in a folder of its own, and read its notes."""
    folder.mkdir(parents=True)
    begin = time.time()
    path, job = write_job(folder, row, models, given)
    begin, made = time.time(), time.time() - begin
    if row.via == "cli":
        run_command_line(row, folder, path, given)
    else:
        run_comfyui(row, folder, job, models, given)
    row.total = time.time() - begin
    row.read(folder / "notes.jsonl", begin)
    row.check(STEPS)
    log = (folder / "log.txt").read_text(errors="replace") if (folder / "log.txt").is_file() else ""
    print(
        f"{row.preset} via {row.via}: {row.total:.0f} s ({made:.1f} s for the pairs), {row.problem or 'OK'}", flush=True
    )
    if row.problem:
        print("\n".join(log.splitlines()[-40:]), flush=True)
    if given.out is not None:
        with given.out.with_suffix(".log").open("a") as whole:
            whole.write(f"\n##### {row.preset} via {row.via} on {row.card} GiB\n{log}")


def machine() -> str:
    """What the rows ran on. Asks nvidia-smi, because torch would keep device memory that the next row needs."""
    query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    names = subprocess.run(query, capture_output=True, text=True).stdout.splitlines() if shutil.which(query[0]) else []
    return f"{names[0] if names else 'CPU'}, torch {torch.__version__}, {os.cpu_count()} cores"


def main() -> int:
    """Make the files, run the rows, print the tables."""
    given, begin = arguments(), time.monotonic()
    work = given.work or work_folder(given.layers)
    models, rows = work / "models", list(rows_to_run(given))
    print(f"{len(rows)} rows in {work}", flush=True)
    files = [sys.executable, "-m", "benchmarks.card_files", str(models), "--device", given.device]
    files += ["--layers", str(given.layers), "--text-encoder", given.text_encoder]
    subprocess.run(files, cwd=REPO, check=True)  # a process of its own, so that it leaves no device memory in use
    done: list[Row] = []
    for number, row in enumerate(rows):
        if time.monotonic() - begin > given.seconds:
            break
        folder = work / f"row-{number}"
        shutil.rmtree(folder, ignore_errors=True)
        run_row(row, folder, models, given)
        done.append(row)
        if given.out is not None:
            given.out.write_text(report(done, rows))
        shutil.rmtree(folder, ignore_errors=True)
    print(report(done, rows), flush=True)
    if given.work is None:
        shutil.rmtree(work)
    return int(len(done) < len(rows) or any(row.problem for row in done))


def report(done: Sequence[Row], rows: Sequence[Row]) -> str:
    """The tables of the rows that were run."""
    left = [f"`{row.preset}` via {row.via}" for row in rows[len(done) :]]
    return f"{machine()}\n\n{tables(done)}" + (f"\nNot run: {', '.join(left)}\n" if left else "")


if __name__ == "__main__":
    sys.exit(main())
