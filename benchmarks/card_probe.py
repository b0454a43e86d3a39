"""Runs inside the child processes of `benchmarks.cards`: caps the card's memory, and notes time and memory by phase.

As a program it is the command line of the trainer: `python -m benchmarks.card_probe train job.json --example 12gb`.
In ComfyUI it is a custom node, see `write_custom_node`. The environment says what to do: CARD_EVENTS is the file of
notes, CARD_GIB the memory of the card (0: all of it), CARD_LAYERS the layers of the text encoder (0: all).
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.abc
import importlib.machinery
import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

GIB = 2**30
EVENTS, CARD, LAYERS = "CARD_EVENTS", "CARD_GIB", "CARD_LAYERS"
MARK_ROUTE = "/card_probe/mark"


class Notes:
    """Writes one JSON line per event.

    An event's `phase` names what happened since the event before it. `reserved` and `allocated` are the peaks of
    torch's device memory in that time, in bytes.
    """

    def __init__(self) -> None:
        self._file = Path(os.environ[EVENTS]).open("a", encoding="utf-8")  # noqa: SIM115 - open until the process ends
        self._reset: Callable[[], None] | None = None
        self.patches = 0  # weights that ComfyUI patched with a LoRA since the last mark

    def watch_resets(self, torch: Any) -> None:
        """The trainer resets torch's peaks too. Note what they were before it does."""
        self._reset = torch.cuda.reset_peak_memory_stats

        def reset(*arguments: Any) -> None:
            self.note("")
            assert self._reset is not None
            self._reset(*arguments)

        torch.cuda.reset_peak_memory_stats = reset

    def note(self, phase: str, **more: Any) -> None:
        """Write an event and start a new peak. An empty phase belongs to the next event."""
        event = {"at": time.time(), "phase": phase, "reserved": 0, "allocated": 0, **more}
        torch = sys.modules.get("torch")
        if self._reset is not None and torch is not None and torch.cuda.is_initialized():
            event["reserved"], event["allocated"] = torch.cuda.max_memory_reserved(), torch.cuda.max_memory_allocated()
            event["backend"] = torch.cuda.get_allocator_backend()
            self._reset()
        self._file.write(json.dumps(event) + "\n")
        self._file.flush()


class AfterImport(importlib.abc.MetaPathFinder):
    """Calls a function with a module right after its import. A name that begins with a dot is the end of a name."""

    def __init__(self, functions: dict[str, Callable[[Any], None]]) -> None:
        self._functions = functions

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """The spec that the other finders give, with a loader that calls the function."""
        end = next(
            (end for end in self._functions if fullname == end or (end[0] == "." and fullname.endswith(end))), None
        )
        if end is None:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        found = (finder.find_spec(fullname, path, target) for finder in others)
        spec = next((each for each in found if each is not None), None)
        if spec is None or spec.loader is None:
            return spec
        execute, function = spec.loader.exec_module, self._functions[end]

        def execute_and_call(module: ModuleType) -> None:
            execute(module)
            function(module)

        spec.loader.exec_module = execute_and_call  # type: ignore[method-assign]
        return spec


def cap_memory(torch: Any, card: float) -> None:
    """Make torch's first CUDA device a card with `card` GiB.

    `mem_get_info` tells that size and what is left of it. The allocator refuses more than what is left now, after CUDA
    has started, so that the memory of CUDA itself counts.
    """
    true_info, size = torch.cuda.mem_get_info, int(card * GIB)
    free, total = true_info(0)
    torch.cuda.set_per_process_memory_fraction((size - (total - free)) / total, 0)

    def info(device: Any = None) -> tuple[int, int]:
        free_now, _ = true_info(device)
        return max(0, size - (total - free_now)), size

    torch.cuda.mem_get_info = torch.cuda.memory.mem_get_info = info


def watch_observer(notes: Notes, observer: Any) -> None:
    """Note every report that observers of this class get."""
    progress, sentence, step, samples = observer.on_progress, observer.on_note, observer.on_step, observer.on_samples

    @functools.wraps(progress)
    def on_progress(self: Any, phase: str, done: int, total: int) -> None:
        notes.note(phase, done=done, total=total)
        progress(self, phase, done, total)

    @functools.wraps(sentence)
    def on_note(self: Any, text: str) -> None:
        notes.note(text)
        sentence(self, text)

    @functools.wraps(step)
    def on_step(self: Any, report: Any) -> None:
        notes.note("step", **report.as_dict())
        step(self, report)

    @functools.wraps(samples)
    def on_samples(self: Any, report: Any) -> None:
        notes.note("preview", grid=str(report.grid_file))
        samples(self, report)

    observer.on_progress, observer.on_note = on_progress, on_note
    observer.on_step, observer.on_samples = on_step, on_samples


def noted(notes: Notes, function: Callable[..., Any], before: str, after: str) -> Callable[..., Any]:
    """The function, with a note before and after each call."""

    @functools.wraps(function)
    def call(*arguments: Any, **named: Any) -> Any:
        notes.note(before)
        result = function(*arguments, **named)
        notes.note(after)
        return result

    return call


def watch_plan(notes: Notes, preparation: Any) -> None:
    """Note the memory plan and the chosen settings."""
    prepare = preparation.prepare_training

    @functools.wraps(prepare)
    def prepare_and_note(*arguments: Any, **named: Any) -> Any:
        notes.note("preparing")
        result = prepare(*arguments, **named)
        plan, config = result.memory_plan(), result.config
        notes.note(
            "preparing",
            plan={phase.name: phase.total_bytes for phase in plan.device},
            needed=plan.needed_device_bytes,
            recomputed=plan.recomputed,
            streamed=plan.streamed,
            memory=dataclasses.asdict(config.memory),
            precision=config.model.base_model_precision,
            pairs=config.batching.train_batch_size * config.batching.gradient_accumulation_steps,
        )
        return result

    preparation.prepare_training = prepare_and_note


def watch_patches(notes: Notes, lora: Any) -> None:
    """Count the weights that ComfyUI's loader computes from a LoRA."""
    calculate = lora.calculate_weight

    @functools.wraps(calculate)
    def calculate_and_count(*arguments: Any, **named: Any) -> Any:
        notes.patches += 1
        return calculate(*arguments, **named)

    lora.calculate_weight = calculate_and_count


def fewer_layers(layers: int) -> dict[str, Callable[[Any], None]]:
    """Changes that make the trainer and ComfyUI expect a text encoder with this many layers, for a small trial."""

    def trainer(module: Any) -> None:
        whole = module.qwen25_vl_7b

        def fewer() -> dict[str, Any]:
            settings = whole()
            settings["text_config"]["num_hidden_layers"] = settings["vision_config"]["depth"] = layers
            return settings

        module.qwen25_vl_7b = fewer

    def comfyui(module: Any) -> None:
        module.Qwen25_7BVLI_Config = functools.partial(module.Qwen25_7BVLI_Config, num_hidden_layers=layers)

    def comfyui_vision(module: Any) -> None:
        module.Qwen2VLVisionTransformer = functools.partial(module.Qwen2VLVisionTransformer, num_layers=layers)

    return {
        ".qwen_image.text_encoder_file": trainer,
        "comfy.text_encoders.llama": comfyui,
        "comfy.text_encoders.qwen_vl": comfyui_vision,
    }


def install() -> Notes:
    """Watch everything that is imported from now on."""
    notes = Notes()
    card, layers = float(os.environ.get(CARD) or 0), int(os.environ.get(LAYERS) or 0)

    def started(torch: Any) -> None:
        if torch.cuda.is_available():
            notes.watch_resets(torch)
            if card:
                cap_memory(torch, card)

    def validation(module: Any) -> None:
        module.Validator.loss = noted(notes, module.Validator.loss, "step", "validation loss")
        module.Validator.sample = noted(notes, module.Validator.sample, "validation loss", "preview")

    def writer(module: Any) -> None:
        module.export_lora = noted(notes, module.export_lora, "saving", "export")

    functions: dict[str, Callable[[Any], None]] = {
        "torch": started,
        ".nodes.host_call": lambda module: watch_observer(notes, module.NodeObserver),
        ".planning.preparation": lambda module: watch_plan(notes, module),
        ".training.validation": validation,
        ".adapters.writer": writer,
        "comfy.lora": lambda module: watch_patches(notes, module),
    }
    if layers:
        functions |= fewer_layers(layers)
    if "torch" in sys.modules:
        raise RuntimeError("torch is imported already, so the card can't be capped before it is used")
    sys.meta_path.insert(0, AfterImport(functions))
    return notes


def write_custom_node(folder: Path) -> None:
    """Write a custom node for ComfyUI that installs the probe before ComfyUI imports torch, and adds a route."""
    folder.mkdir(parents=True)
    start = (
        "import importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('card_probe', {str(Path(__file__).resolve())!r})\n"
        "probe = sys.modules['card_probe'] = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(probe)\n"
        "probe.NOTES = probe.install()\n"
    )
    (folder / "prestartup_script.py").write_text(start, encoding="utf-8")
    text = "import card_probe\n\ncard_probe.add_route(card_probe.NOTES)\nNODE_CLASS_MAPPINGS = {}\n"
    (folder / "__init__.py").write_text(text, encoding="utf-8")


def add_route(notes: Notes) -> None:
    """Add the route that notes the end of a phase, for what the trainer doesn't report. Call it inside ComfyUI."""
    from aiohttp import web
    from server import PromptServer  # type: ignore[import-not-found]

    async def mark(request: Any) -> Any:
        patches, notes.patches = notes.patches, 0
        notes.note(request.query["phase"], patches=patches)
        return web.json_response({"patches": patches})

    PromptServer.instance.routes.post(MARK_ROUTE)(mark)


def main() -> int:
    """The trainer's command line."""
    notes = install()
    # The trainer imports these later. Here, so that their time counts as the start and not as encoding.
    from diffusers import AutoencoderKLQwenImage, QwenImageTransformer2DModel  # noqa: F401
    from transformers import Qwen2_5_VLForConditionalGeneration  # noqa: F401

    import trainer_core.__main__ as command_line

    watch_observer(notes, command_line.ConsoleObserver)
    notes.note("start")
    code = command_line.main(sys.argv[1:])
    notes.note("end")
    return code


if __name__ == "__main__":
    sys.exit(main())
