"""Importing writes no file, opens no connection, changes no global state and loads no package that ComfyUI lacks."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tools.comfyui import REPO

# Runs in a new Python process and records the effects of each step. `before` runs first, unrecorded, and loads what
# ComfyUI has loaded already.
PROBE = """
import json, logging, os, random, signal, sys, threading, warnings
sys.dont_write_bytecode = True
{before}
import numpy, torch

happened = []
def watch(event, arguments):
    if event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+"):
        happened.append(f"writes {{arguments[0]}}")
    elif event in ("socket.connect", "subprocess.Popen", "os.mkdir", "os.system", "os.rename", "os.remove"):
        happened.append(f"{{event}} {{arguments}}")

def state():
    return {{
        "grad": torch.is_grad_enabled(), "inference": torch.is_inference_mode_enabled(),
        "dtype": str(torch.get_default_dtype()), "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "matmul": torch.get_float32_matmul_precision(), "cuda": torch.cuda.is_initialized(),
        "torch generator": torch.get_rng_state().tolist(), "python generator": repr(random.getstate()),
        "numpy generator": repr(numpy.random.get_state()), "environment": dict(os.environ), "path": list(sys.path),
        "arguments": list(sys.argv), "folder": os.getcwd(), "handlers": repr(logging.getLogger().handlers),
        "level": logging.getLogger().level, "running": threading.active_count(),
        "signals": repr([signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]),
        "filters": len(warnings.filters),
    }}

sys.addaudithook(watch)
results = []
for step in {steps!r}:
    happened.clear()
    before, loaded = state(), set(sys.modules)
    exec(step)
    after = state()
    changed = [name for name in before if before[name] != after[name]]
    results.append({{"happened": list(happened), "changed": changed, "loaded": sorted(set(sys.modules) - loaded)}})
print("RESULT" + json.dumps(results))
"""

LOAD_PACK = """
import importlib.util
path = {path!r}
spec = importlib.util.spec_from_file_location({name!r}, path + "/__init__.py")
pack = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = pack
spec.loader.exec_module(pack)
"""
ENTER_PACK = """
import asyncio
async def enter():
    extension = await pack.comfy_entrypoint()
    return [node.GET_SCHEMA().node_id for node in await extension.get_node_list()]
loop = asyncio.new_event_loop()
ids = loop.run_until_complete(enter())
assert len(ids) >= 8, ids
"""
AS_COMFYUI = """
sys.path.insert(0, {comfyui!r})
import asyncio
import utils.extra_config
import comfy.cli_args
comfy.cli_args.args.cpu = True
import comfy.utils, comfy.model_management, comfy.sd, folder_paths, server, execution, nodes
from comfy_api.latest import ComfyExtension, io, ui
asyncio.new_event_loop().close()
server.PromptServer(asyncio.new_event_loop())
"""


FOUNDATIONS = "import trainer_core, trainer_core.config, trainer_core.errors, trainer_core.events, trainer_core.rng"
# Statement -> text in the probe's report of it.
ACTS = {
    "open('x', 'w').close()": "writes x",
    "os.mkdir('y')": "os.mkdir",
    "torch.set_grad_enabled(False)": "grad",
    "torch.rand(1)": "torch generator",
    "torch.set_default_dtype(torch.float64)": "dtype",
    "os.environ['A'] = '1'": "environment",
}
PACK_NAME = "/some/custom_nodes/Qwen-Edit_x_Trainer test"  # ComfyUI makes such a name from the pack's folder
OURS = ("trainer_core", PACK_NAME)


def probe(folder: Path, *steps: str, before: str = "") -> list[dict]:
    """Runs the steps in order in one new process. Returns a report of each: what happened, changed and was loaded."""
    source = PROBE.format(before=before, steps=steps)
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, cwd=folder, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.split("RESULT")[-1])


def assert_inert(result: dict) -> None:
    assert result["happened"] == []
    assert result["changed"] == []
    loaded = {module.split(".")[0] for module in result["loaded"]}
    assert {name for name in loaded if name not in sys.stdlib_module_names and not name.startswith(OURS)} == set()


# Imported only where Triton is installed.
NEED_TRITON = {
    "trainer_core.precision.kernels",
    "trainer_core.precision.weight_kernels",
    "trainer_core.qwen_image.query_key_kernels",
}


def core_modules() -> list[str]:
    paths = sorted(path for path in (REPO / "trainer_core").rglob("*.py") if path.name != "__main__.py")
    dotted = [path.relative_to(REPO).with_suffix("").as_posix().replace("/", ".") for path in paths]
    return [module.removesuffix(".__init__") for module in dotted if module not in NEED_TRITON]


@pytest.fixture(scope="module")
def probed(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """Reports of the pack's import, of FOUNDATIONS and of each of ACTS, in this order."""
    steps = (LOAD_PACK.format(path=str(REPO), name=PACK_NAME), FOUNDATIONS, *ACTS)
    path = f"sys.path.insert(0, {str(REPO)!r})"
    return probe(tmp_path_factory.mktemp("probe"), *steps, before=path)


def test_the_pack_before_its_entry_point(probed: list[dict]):
    assert_inert(probed[0])
    assert not any("trainer_core" in module for module in probed[0]["loaded"])


def test_the_foundations_of_the_core(probed: list[dict]):
    assert_inert(probed[1])
    assert "trainer_core.config" in probed[1]["loaded"]


@pytest.mark.parametrize("act", ACTS)
def test_the_probe_sees_what_is_done(probed: list[dict], act: str):
    result = probed[2 + list(ACTS).index(act)]
    assert any(ACTS[act] in each for each in (*result["happened"], *result["changed"]))


@pytest.mark.slow
def test_every_module_of_the_core(tmp_path: Path):
    """Only the third-party packages that the modules import, loaded beforehand, may have side effects."""
    modules = core_modules()
    assert len(modules) > 10
    others = "import diffusers, transformers, peft, optimum.quanto, bitsandbytes, matplotlib.figure, PIL.Image"
    before = f"sys.path.insert(0, {str(REPO)!r})\n{others}"
    (result,) = probe(tmp_path, "import " + ", ".join(modules), before=before)
    assert set(modules) <= set(result["loaded"])
    assert [event for event in result["happened"] if "matplotlib" not in event] == []
    assert set(result["changed"]) <= {"environment", "filters"}  # lazily loaded parts of transformers


@pytest.mark.slow
def test_the_pack_with_its_nodes_inside_comfyui(tmp_path: Path, comfyui_dir: Path):
    before = AS_COMFYUI.format(comfyui=str(comfyui_dir))
    (result,) = probe(tmp_path, LOAD_PACK.format(path=str(REPO), name=PACK_NAME) + ENTER_PACK, before=before)
    assert_inert(result)
