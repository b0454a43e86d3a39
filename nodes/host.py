"""ComfyUI at run time, with host_encoders alone: folders, memory, modes, progress, interruption, messages, loader."""

from __future__ import annotations

import gc
import json
import os
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import comfy.lora
import comfy.lora_convert
import comfy.model_management
import comfy.sd
import comfy.supported_models
import comfy.utils
import folder_paths
import numpy as np
import torch
from PIL import Image
from server import PromptServer

from ..trainer_core.adapters.reader import adapter_parts, changed_weight
from ..trainer_core.config import DEMO_MODEL
from ..trainer_core.errors import ConfigError, ExportError, Interrupted, ModelFileError
from ..trainer_core.events import SampleReport, StepReport, Stop
from .active_runs import RUN_MESSAGE, ActiveRun, LiveMessages, active_run

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

DEMO_CHOICE = "demo (embedded)"
NO_LORA = "none"
NO_FILE = "none found"
_SAVED_AS = {
    "diffusion_models": "QwenImageTransformer2DModel",
    "text_encoders": "Qwen2_5_VLForConditionalGeneration",
    "vae": "AutoencoderKLQwenImage",
}
_OWN_FOLDER = "qwen_edit_trainer"
_ROOTS_KEY, _ROOTS_VARIABLE = "qwen_edit_datasets", "QWEN_EDIT_DATASET_ROOTS"
_PREVIEW_EDGE = 768  # pixels
_TEXT_EVERY_SECONDS = 1.0


# Folders


def output_dir() -> Path:
    """ComfyUI's output folder."""
    return Path(folder_paths.get_output_directory())


def cache_dir() -> Path:
    """Where encoded pairs are kept."""
    return output_dir() / _OWN_FOLDER / "cache"


def runs_dir() -> Path:
    """Where the run folders lie."""
    return output_dir() / _OWN_FOLDER / "runs"


def output_name(path: Path) -> str:
    """`path` as people and scripts see it: below the output folder, without the private part before it."""
    try:
        return path.relative_to(output_dir()).as_posix()
    except ValueError:
        return path.name


def dataset_roots() -> dict[str, Path]:
    """The folders below which datasets may lie, by the name used for them in messages."""
    roots = {"input": Path(folder_paths.get_input_directory()), "output": output_dir()}
    named = folder_paths.get_folder_paths(_ROOTS_KEY) if _ROOTS_KEY in folder_paths.folder_names_and_paths else []
    for place in [*named, *os.environ.get(_ROOTS_VARIABLE, "").split(os.pathsep)]:
        if Path(place).is_absolute():
            roots.setdefault(Path(place).name or place, Path(place))
    return roots


def base_models() -> list[str]:
    """Names of the base models in diffusers' layout below ComfyUI's `diffusers` folders, and the demo."""
    found = {
        config.parent.parent.relative_to(root).as_posix()
        for root in _diffusers_dirs()
        for pattern in ("*", "*/*")
        for config in root.glob(f"{pattern}/transformer/config.json")
    }
    return [*sorted(found), DEMO_CHOICE]


def base_model(name: str) -> tuple[str, str]:
    """The `base` and `tokenizer` of ModelConfig for a name of `base_models`.

    Raises:
        ModelFileError: no such base model.
    """
    if name == DEMO_CHOICE:
        return DEMO_MODEL, tokenizer_dir()
    if name in base_models():
        return next(str(root / name) for root in _diffusers_dirs() if (root / name / "transformer").is_dir()), ""
    raise ModelFileError(
        f"The base model {name[:200]!r} is not there; found are {', '.join(base_models())}. Download a Qwen-Image-Edit "
        "in diffusers' layout into a folder of its own below models/diffusers, then press R to refresh the list."
    )


def model_files(folder: str) -> list[str]:
    """Names of ComfyUI's models of a kind (diffusion_models, text_encoders, vae) in formats that can't hold code.

    They are files, and folders as diffusers and transformers save a network.
    """
    suffixes = (".safetensors", ".gguf") if folder == "diffusion_models" else (".safetensors",)
    named = {name for name in folder_paths.get_filename_list(folder) if name.endswith(suffixes)}
    for root in map(Path, folder_paths.get_folder_paths(folder)):
        if ".gguf" in suffixes:  # ComfyUI itself lists none
            named |= {path.relative_to(root).as_posix() for path in root.rglob("*.gguf")}
        saved = (path for depth in ("*", "*/*") for path in root.glob(f"{depth}/config.json"))
        named |= {path.parent.relative_to(root).as_posix() for path in saved if _is_saved(path, _SAVED_AS[folder])}
    return sorted(named) or [NO_FILE]


def _is_saved(config: Path, class_name: str) -> bool:
    """Whether a network of this class lies in the folder of `config`."""
    try:
        stored = json.loads(config.read_text(encoding="utf-8"))
        named = {stored.get("_class_name"), *stored.get("architectures", ())}
    except (OSError, ValueError, AttributeError, TypeError):
        return False
    return class_name in named and any(config.parent.glob("*.safetensors"))


def model_file(folder: str, name: str) -> str:
    """The path of a listed file or folder.

    Raises:
        ModelFileError: not in the list.
    """
    roots = folder_paths.get_folder_paths(folder) if name in model_files(folder) else []
    found = next((str(Path(root) / name) for root in roots if (Path(root) / name).exists()), "")
    if not found:
        raise ModelFileError(
            f"There is no file {name[:200]!r} in models/{folder}. Put it there, then press R to refresh the list."
        )
    return found


def tokenizer_dir() -> str:
    """The Qwen2.5 tokenizer that ComfyUI brings."""
    return str(Path(comfy.sd.__file__).parent / "text_encoders" / "qwen25_tokenizer")


def _diffusers_dirs() -> list[Path]:
    return [Path(place) for place in folder_paths.get_folder_paths("diffusers")]


def device_name() -> str:
    """The device ComfyUI computes on, as torch names it."""
    return str(comfy.model_management.get_torch_device())


def lora_dir() -> Path:
    """Where a new LoRA is put so that LoRA loaders list it: output/loras, else the first LoRA folder."""
    places = [Path(place) for place in folder_paths.get_folder_paths("loras")]
    preferred = output_dir() / "loras"
    return preferred if preferred in places else places[0]


def lora_names() -> list[str]:
    """The LoRA files that ComfyUI lists, without formats that can hold code."""
    return [NO_LORA, *(name for name in folder_paths.get_filename_list("loras") if name.endswith(".safetensors"))]


def lora_path(name: str) -> Path:
    """The file of a listed LoRA.

    Raises:
        ConfigError: not in the list.
    """
    if name not in lora_names()[1:]:
        raise ConfigError(f"The LoRA {name[:200]!r} is not there; allowed is a .safetensors file that ComfyUI lists.")
    return Path(folder_paths.get_full_path_or_raise("loras", name))


# A long call: memory, modes, progress, interruption


class NodeObserver:
    """Progress bar, text and preview on the node being executed; messages for pages; the user's wish to stop."""

    def __init__(self, run: ActiveRun | None = None, on_first_step: Callable[[], None] | None = None) -> None:
        self._run, self._on_first_step = run, on_first_step
        self._live = LiveMessages(run, send_message) if run is not None else None
        self._bar = comfy.utils.ProgressBar(1)
        self._node_id = _executing_node()
        self._text_at = 0.0

    def on_progress(self, phase: str, done: int, total: int) -> None:
        """A bar per phase."""
        self._update(done, max(1, total))
        self._show(f"{phase}: {done} of {total}", final=done >= total)
        if self._live is not None:
            self._live.phase(f"{phase}: {done} of {total}")

    def on_step(self, report: StepReport) -> None:
        """The training's bar."""
        if self._live is not None:
            self._live.step(report)
        if self._on_first_step is not None:
            self._on_first_step()
            self._on_first_step = None
        self._update(report.step, report.num_steps)
        self._show(f"Step {report.step} of {report.num_steps}, loss {report.loss:.4f}")

    def on_samples(self, report: SampleReport) -> None:
        """The grid as the node's live preview."""
        with Image.open(report.grid_file) as grid:
            preview = ("JPEG", grid.convert("RGB"), _PREVIEW_EDGE)
        self._update(self._bar.current, self._bar.total, preview)
        if self._live is not None:
            self._live.samples(report.step)

    def should_stop(self) -> Stop:
        """Interrupt pauses, stop-and-keep ends."""
        if comfy.model_management.processing_interrupted():
            return Stop.PAUSE
        return Stop.KEEP if self._run is not None and self._run.keep.is_set() else Stop.NO

    def _update(self, done: int, total: int, preview: tuple[str, Image.Image, int] | None = None) -> None:
        """ComfyUI's bar raises its interruption and forgets it; here it waits until `should_stop` is asked."""
        if total != self._bar.total or done < self._bar.current:
            # From ComfyUI 0.13 on a bar is silent until it is past the last value it sent, the former phase's too.
            self._bar = comfy.utils.ProgressBar(total)
        try:
            self._bar.update_absolute(done, total, preview)
        except comfy.model_management.InterruptProcessingException:
            comfy.model_management.interrupt_current_processing()

    def _show(self, text: str, *, final: bool = False) -> None:
        send = getattr(server(), "send_progress_text", None)
        now = time.monotonic()
        if send is None or self._node_id is None or (now - self._text_at < _TEXT_EVERY_SECONDS and not final):
            return
        self._text_at = now
        send(text, self._node_id)


def server() -> PromptServer | None:
    """ComfyUI's server, where this process is one."""
    return getattr(PromptServer, "instance", None)


def send_message(event: str, values: dict[str, Any]) -> None:
    """To every page that is open, from any thread."""
    instance = server()
    if instance is not None:
        instance.send_sync(event, values, None)


def _executing_node() -> str | None:
    from comfy_execution.utils import get_executing_context

    context = get_executing_context()
    return context.node_id if context is not None else None


@contextmanager
def interruptible(
    run: ActiveRun | None = None, on_first_step: Callable[[], None] | None = None
) -> Iterator[NodeObserver]:
    """An observer for a call; if that ends interrupted, so does the prompt, as ComfyUI knows it."""
    try:
        yield NodeObserver(run, on_first_step)
    except Interrupted:
        comfy.model_management.throw_exception_if_processing_interrupted()
        raise


@contextmanager
def long_call(run_name: str = "", on_first_step: Callable[[], None] | None = None) -> Iterator[NodeObserver]:
    """The whole machine for one interruptible call, given back as it was. With a name it is listed as a training.

    ComfyUI runs nodes in inference mode, where autograd is off for good; networks must be loaded outside of it.
    """
    free_memory()
    try:
        with (
            active_run(run_name, _executing_node()) if run_name else nullcontext() as run,
            interruptible(run, on_first_step) as observer,
            _globals_kept(),
            torch.inference_mode(mode=False),
            torch.enable_grad(),
        ):
            yield observer
    finally:
        free_memory()
        if run_name:
            send_message(RUN_MESSAGE, {"run_name": run_name, "active": False})  # how it ended is in its folder


def free_memory() -> None:
    """Without ComfyUI's networks; their weights are then their files', without LoRAs."""
    comfy.model_management.unload_all_models()
    gc.collect()
    comfy.model_management.soft_empty_cache()


@contextmanager
def _globals_kept() -> Iterator[None]:
    """Global generators and default dtype are afterwards as before, so that other nodes' results don't change."""
    python_state, numpy_state, dtype = random.getstate(), np.random.get_state(), torch.get_default_dtype()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        torch.set_default_dtype(dtype)


# ComfyUI's LoRA loader


def check_lora_file(path: Path, num_layers: int) -> None:
    """Check that this ComfyUI would apply every key of the LoRA file to a Qwen-Image model, and with the same change.

    The model is built without weights (on the meta device), which takes a fraction of a second.

    Raises:
        ExportError: keys without a counterpart, or another weight change than the file means.
    """
    lora = comfy.utils.load_torch_file(str(path), safe_load=True)
    patches = _patches(lora, _key_map(num_layers), "The LoRA file")
    layers = {key.removeprefix("diffusion_model.").removesuffix(".weight"): key for key in patches}
    for layer, part in adapter_parts(lora, layers, path.name).items():
        like_the_change = part.change().abs().mean().clamp_min(1e-12)  # else a DoRA's norms would drown it
        base = like_the_change.expand(part.shape).clone() if part.kind == "dora" else torch.zeros(part.shape)
        wanted, key = changed_weight(part, base), layers[layer]
        found = comfy.lora.calculate_weight([(1.0, patches[key], 1.0, None, None)], base, key)
        if not torch.allclose(found, wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max())):
            raise ExportError(f"ComfyUI would change {key} by another amount than was trained.")


def _key_map(num_layers: int) -> dict[str, str]:
    """ComfyUI's names of the layers of a Qwen-Image model in LoRA files, to its own."""
    config = comfy.supported_models.QwenImage(
        {"image_model": "qwen_image", "num_layers": num_layers, "in_channels": 64}
    )
    config.set_inference_dtype(torch.float32, None)
    model = config.get_model({}, device=torch.device("meta"))
    return comfy.lora.model_lora_keys_unet(model, {})


def apply_lora(model: ModelPatcher, path: Path, strength: float) -> ModelPatcher:
    """A copy of `model` with the LoRA of `path`.

    Raises:
        ExportError: the model has no counterpart for some keys, so it is of another kind.
    """
    lora = comfy.utils.load_torch_file(str(path), safe_load=True)
    _patches(lora, comfy.lora.model_lora_keys_unet(model.model, {}), path.name)
    return comfy.sd.load_lora_for_models(model, None, lora, strength, 0.0)[0]


def _patches(lora: dict[str, torch.Tensor], key_map: dict[str, str], name: str) -> dict[str, Any]:
    """What ComfyUI makes of the file, if it makes something of every key."""
    lora = comfy.lora_convert.convert_lora(lora)
    patches = comfy.lora.load_lora(lora, key_map, log_missing=False)
    matched = {key for patch in patches.values() for key in getattr(patch, "loaded_keys", ())}
    unmatched = sorted(set(lora) - matched)
    if unmatched or not patches:
        shown = ", ".join(unmatched[:5]) or "it holds none"
        raise ExportError(
            f"{name}: ComfyUI finds no counterpart for {len(unmatched)} of {len(lora)} keys ({shown}), so the LoRA "
            "would not work. Use it with a Qwen-Image-Edit model of the same depth as the one it was trained on."
        )
    return patches
