"""Inside ComfyUI: nodes/host_*.py and nodes/publish.py with the real ComfyUI modules.

Input: paths of the repository and of working folders. Output: the result of each call as text.
"""

from __future__ import annotations

import importlib
import random
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

RANK, DEPTH = 2, 2
# 2 heads of width 16: the attention is 32 wide, the MLP's hidden layer 128
NARROW = {
    "image_model": "qwen_image",
    "num_layers": DEPTH,
    "in_channels": 64,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "joint_attention_dim": 32,
    "axes_dims_rope": (4, 6, 6),
}
PHASES = [("long", 80, 80), ("shorter", 1, 41), ("shorter", 41, 41), ("steps", 1, 9), ("steps", 2, 9)]
PHASES += [("drawing", 4, 4), ("steps", 3, 9), ("drawing", 1, 9), ("drawing", 2, 9)]


def pack(repo: str) -> Callable[[str], types.ModuleType]:
    """Returns a function that imports modules of the pack under another package name, as ComfyUI does."""
    parent = types.ModuleType("qwen_edit_pack")
    parent.__path__ = [repo]
    sys.modules["qwen_edit_pack"] = parent
    return lambda name: importlib.import_module(f"qwen_edit_pack.{name}")


def outcome(call: Callable[[], Any]) -> str:
    """The call's result as text, or its error as "Class: message"."""
    try:
        return str(call())
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"


def write(folder: Path, name: str, tensors: dict[str, Tensor]) -> Path:
    """Write a LoRA file; returns its path."""
    from safetensors.torch import save_file

    save_file(tensors, folder / name)
    return folder / name


def good_lora(width: int = 32) -> dict[str, Tensor]:
    """LoRA tensors for attn.to_q and attn.to_out.0 of every block."""
    generator = torch.Generator().manual_seed(1)
    names = [f"transformer_blocks.{block}.attn.{layer}" for block in range(DEPTH) for layer in ("to_q", "to_out.0")]
    return {
        f"transformer.{name}.lora_{part}.weight": torch.randn(shape, generator=generator)
        for name in names
        for part, shape in (("A", (RANK, width)), ("B", (width, RANK)))
    }


def other_kinds() -> dict[str, dict[str, Tensor]]:
    """A DoRA and a LoKr of the same layers, and a DoRA that scales columns, which must be refused."""
    generator = torch.Generator().manual_seed(2)
    good = good_lora()
    names = {key.split(".lora_")[0] for key in good}
    dora = {**good, **{f"{name}.dora_scale": 1 + torch.rand(32, 1, generator=generator) for name in sorted(names)}}
    columns = {**good, **{f"{name}.dora_scale": torch.ones(1, 32) for name in names}}
    shapes = {"lokr_w1": (4, 4), "lokr_w2_a": (8, 2), "lokr_w2_b": (2, 8)}
    lokr = {
        f"{name}.{part}": torch.randn(shape, generator=generator)
        for name in sorted(names)
        for part, shape in shapes.items()
    }
    return {"dora": dora, "lokr": lokr, "columns": columns}


def check_files(host: types.ModuleType, folder: Path) -> dict[str, str]:
    """Results of `check_lora_file` for good and bad files, by label."""
    good = good_lora()
    halved = {**good, "transformer.transformer_blocks.0.attn.to_q.alpha": torch.tensor(RANK / 2)}
    raw_names = {f"base_model.model.{key}": tensor for key, tensor in good.items()}
    one_wrong = {key.replace("blocks.1.attn.to_q", "blocks.1.attn.query"): tensor for key, tensor in good.items()}
    files = {"good": good, "halved": halved, "raw names": raw_names, "one wrong": one_wrong, **other_kinds()}
    found = {
        label: outcome(lambda tensors=tensors: host.check_lora_file(write(folder, "a.safetensors", tensors), DEPTH))
        for label, tensors in files.items()
    }
    path = write(folder, "a.safetensors", good)
    return {**found, "too shallow": outcome(lambda: host.check_lora_file(path, DEPTH - 1))}


def apply_files(host: types.ModuleType, folder: Path) -> dict[str, str]:
    """Apply a LoRA file to a narrow model and check a weight's change against up @ down; try a file that can't fit."""
    import comfy.model_patcher
    import comfy.supported_models

    config = comfy.supported_models.QwenImage(dict(NARROW))
    config.set_inference_dtype(torch.float32, None)
    model = config.get_model({}, device=torch.device("cpu"))
    for parameter in model.parameters():
        parameter.data.zero_()
    patcher = comfy.model_patcher.ModelPatcher(model, torch.device("cpu"), torch.device("cpu"))
    good = good_lora()
    patched = host.apply_lora(patcher, write(folder, "b.safetensors", good), 0.5)
    key = "diffusion_model.transformer_blocks.1.attn.to_out.0.weight"
    patched.patch_weight_to_device(key)
    name = "transformer.transformer_blocks.1.attn.to_out.0"
    wanted = 0.5 * good[f"{name}.lora_B.weight"] @ good[f"{name}.lora_A.weight"]
    change = patched.model.state_dict()[key]
    deeper = {key.replace("blocks.1", "blocks.7"): tensor for key, tensor in good.items()}
    return {
        "applied": str(bool(torch.allclose(change, wanted, atol=1e-6) and wanted.abs().max() > 0.1)),
        "number of patches": str(len(patched.patches)),
        "base is untouched": str(len(patcher.patches) == 0),
        "does not fit": outcome(lambda: host.apply_lora(patcher, write(folder, "c.safetensors", deeper), 1.0)),
    }


def long_calls(host: types.ModuleType, runs: types.ModuleType, errors: types.ModuleType) -> dict[str, str]:
    """Check torch's modes inside `long_call`, the restored state after it, and ComfyUI's error on interruption."""
    import comfy.model_management as management

    def state() -> tuple[Any, ...]:
        modes = (torch.is_inference_mode_enabled(), torch.is_grad_enabled(), torch.get_default_dtype())
        return (
            *modes,
            torch.get_rng_state().sum().item(),
            random.getstate()[1][:3],
            np.random.get_state()[1][:3].tolist(),
        )

    found = {}
    with torch.inference_mode():
        before = state()
        with host.long_call("name") as observer:
            found["inside"] = str((torch.is_inference_mode_enabled(), torch.is_grad_enabled()))
            found["listed"] = str([row["run_name"] for row in runs.active_runs()])
            found["no wish"] = observer.should_stop().name
            torch.rand(3), random.random(), np.random.rand()
            torch.set_default_dtype(torch.float64)
            runs.stop_and_keep("name")
            found["keep"] = observer.should_stop().name
        found["as before"] = str(state() == before)

        def interrupted() -> None:
            with host.long_call("name") as observer:
                management.interrupt_current_processing()
                observer.on_progress("phase", 1, 2)  # a direct update of ComfyUI's bar would raise here
                found["pause"] = observer.should_stop().name
                raise errors.Interrupted("stopped")

        try:
            interrupted()
        except management.InterruptProcessingException:
            found["interrupted"] = "as ComfyUI's"
        found["flag is cleared"] = str(not management.processing_interrupted())
        found["as before after it"] = str(state() == before)
    return found


def bars(host: types.ModuleType) -> list[list[tuple[int, int]]]:
    """The (value, total) updates of each ComfyUI progress bar during PHASES."""
    import comfy.utils

    moved: list[list[tuple[int, int]]] = []

    class Bar:
        def __init__(self, total: int) -> None:
            self.current, self.total = 0, total
            self.values: list[tuple[int, int]] = []
            moved.append(self.values)

        def update_absolute(self, value: int, total: int, _preview: Any = None) -> None:
            self.current, self.total = value, total
            self.values.append((value, total))

    with mock.patch.object(comfy.utils, "ProgressBar", Bar):
        observer = host.NodeObserver()
        for phase, done, total in PHASES:
            observer.on_progress(phase, done, total)
            observer.on_note("About 3 h.")  # moves no bar
    return [values for values in moved if values]


def bar_that_raises() -> None:
    """Install a progress hook that raises after an interruption by the user, as ComfyUI's server does."""
    import comfy.model_management
    import comfy.utils

    def hook(*_: Any, **__: Any) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()

    comfy.utils.set_progress_bar_global_hook(hook)


def placed(publish: types.ModuleType, folder: Path) -> dict[str, str]:
    """Names that `place_lora` returns for two versions of a file, each placed twice."""
    good = good_lora()
    first = write(folder, "mine.safetensors", good)
    names = [publish.place_lora(first, "mine"), publish.place_lora(first, "mine")]
    write(folder, "mine.safetensors", {key: tensor * 2 for key, tensor in good.items()})
    names += [publish.place_lora(first, "mine"), publish.place_lora(first, "mine")]
    return {"names": str([name.replace("\\", "/") for name in names])}


def folders(host: types.ModuleType, values: dict[str, Any]) -> dict[str, str]:
    """Results of `host_folders` for models, datasets, LoRAs and output names, by label."""
    import folder_paths

    folder_paths.add_model_folder_path(host._ROOTS_KEY, values["named"])
    kinds = ("diffusion_models", "text_encoders", "vae")
    for kind in kinds:
        folder_paths.folder_names_and_paths[kind] = ([str(Path(values["folder"]) / "models" / kind)], {".safetensors"})
    listed = {kind: host.model_files(kind) for kind in kinds}
    place = values["folder"]
    said = f"{place}/input/my edit/a.png, '{place}/named_by_variable', {place}/models/vae/x, {place}/input2/b, "
    return {
        "networks": str(listed),
        "network": outcome(lambda: host.model_file("vae", "saved/vae")),
        "no network": outcome(lambda: host.model_file("vae", "saved")),
        "roots": str({name: str(path) for name, path in host.dataset_roots().items()}),
        "lora names": str(host.lora_names()),
        "secret": outcome(lambda: host.lora_path("../secret.safetensors")),
        "base models": str(host.base_models()),
        "outside": host.output_name(Path(values["named"]) / "x.png"),
        "said": host.without_paths(f"{said}my{place}/input and {place}/output. End"),
        "inside": host.output_name(host.output_dir() / "a" / "x.png"),
    }


def refusals(module: Callable[[str], types.ModuleType]) -> dict[str, str]:
    """What is said of prompts with two trainings, and which of them are looked at."""
    report, events = module("nodes.whole_report"), module("trainer_core.events")

    class AtOnce(events.SilentObserver):
        def should_stop(self) -> Any:
            return events.Stop.PAUSE

    def training(run_name: str) -> dict[str, Any]:
        widgets = {"run_name": run_name, "preset": "automatic", "max_train_steps": 2, "seed": 0}
        return {"class_type": "QwenEdit_Train", "inputs": {"model": ["model", 0], "dataset": ["pairs", 0], **widgets}}

    demo = "demo (embedded)"
    prompt = {
        "model": {"class_type": "QwenEdit_ChooseModel", "inputs": {"model": demo}},
        "pairs": {"class_type": "QwenEdit_EditPairs", "inputs": {"data_set": demo, "instruction": ""}},
        "stray": {"class_type": "QwenEdit_EditPairs", "inputs": {"data_set": "gone", "instruction": ""}},
        "good": training("good"),
        "bad": training("a/b"),
        "try": {"class_type": "QwenEdit_TryLora", "inputs": {"run": ["bad", 4]}},
    }
    stopped = report.refusals({"prompt": prompt}, AtOnce())
    looked: dict[str, str] = {}
    for targets in (["good"], ["try"], ["no such node"], None):
        with mock.patch.object(report, "problems_before", return_value=[]) as look:
            report.refusals({"prompt": prompt, "partial_execution_targets": targets})
        looked[str(targets)] = str([call.args[1] for call in look.call_args_list])
    with mock.patch.object(report, "problems_before", side_effect=ZeroDivisionError):
        failed = report.refusals({"prompt": prompt})
    return {"stopped": str(stopped), "failed": str(failed), **looked}


def failing(module: Callable[[str], types.ModuleType]) -> dict[str, str]:
    """The error of a node when the other nodes of its graph have these problems, or can't be looked at."""
    refused, errors = module("nodes.refused"), module("trainer_core.errors")
    own = errors.OutOfMemoryError("It needs 2.1 GiB.")
    again = errors.OutOfMemoryError("It needs 2.2 GiB.")

    def raised(look: Callable[..., Any]) -> str:
        refused.look_for_others(look)
        try:
            with refused.with_other_problems(None, None):
                raise own
        except errors.TrainerError as error:
            return str(error)

    long = errors.DatasetError("Wrong:", [str(number) for number in range(100)])
    return {
        "broken look": raised(mock.Mock(side_effect=ZeroDivisionError)),
        "others": raised(lambda *_: [("A", own), ("B", again), ("C", errors.ConfigError("No name."))]),
        "long": refused.for_page(errors.SettingsError([long, errors.ConfigError("No name.")])),
    }


def queued(module: Callable[[str], types.ModuleType]) -> list[str]:
    """What is noted while ComfyUI handles these bodies of requests to queue a prompt, and after that."""
    import asyncio

    server, refused = module("nodes.host_server"), module("nodes.refused")
    hidden, said = types.SimpleNamespace(unique_id="7"), list[str]()
    instance = types.SimpleNamespace(app=types.SimpleNamespace(middlewares=[]))

    async def handler(_: Any) -> None:
        said.append(refused.refusal_of(hidden))

    async def ask() -> None:
        for body in (b'{"prompt": "Ours_"}', b'{"prompt": "Other_"}', b'{"prompt": "Ours_'):
            read = mock.AsyncMock(return_value=body)
            await instance.app.middlewares[0](types.SimpleNamespace(method="POST", path="/prompt", read=read), handler)
            await handler(None)

    with mock.patch.object(server, "server", return_value=instance):
        server.before_queueing("Ours_", lambda request: {"7": request["prompt"]}, refused.noted)
    asyncio.run(ask())
    return said


def main(_: dict[str, Tensor], values: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Run all checks; returns their texts, by group."""
    import folder_paths
    import utils.extra_config  # noqa: F401 - imported before another package named utils

    folder = Path(values["folder"])
    folder_paths.set_output_directory(str(folder / "output"))
    folder_paths.set_input_directory(str(folder / "input"))
    folder_paths.add_model_folder_path("loras", str(folder / "output" / "loras"))
    folder_paths.folder_names_and_paths["diffusers"] = ([str(folder / "diffusers")], {"folder"})
    bar_that_raises()
    module = pack(values["repo"])
    lora, call, publish = module("nodes.host_lora"), module("nodes.host_call"), module("nodes.publish")
    answers = {
        "check": check_files(lora, folder),
        "apply": apply_files(lora, folder),
        "bars": bars(call),
        "long": long_calls(call, module("nodes.active_runs"), module("trainer_core.errors")),
        "placed": placed(publish, folder),
        "folders": folders(module("nodes.host_folders"), values),
        "refusals": refusals(module),
        "failing": failing(module),
        "queued": queued(module),
    }
    return {"nothing": torch.zeros(1)}, answers
