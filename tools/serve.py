"""Runs ComfyUI with a link to this repository as the pack. Restart it to see changes of the code.

make comfyui [ARGS="--base folder --port 8188 -- further ComfyUI arguments"]
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tools.comfyui import PACK_NAME, REPO, ComfyUIError, comfyui_dir, device_arguments, make_base


def link_pack(base: Path) -> None:
    """Link this repository into custom_nodes."""
    link = base / "custom_nodes" / PACK_NAME
    if not link.exists():
        link.unlink(missing_ok=True)  # it may be a broken link
        link.symlink_to(REPO, target_is_directory=True)


def main() -> int:
    """Run the server until Ctrl+C."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, default=REPO / ".comfyui" / "base", help="for models, input and output")
    parser.add_argument("--port", type=int, default=8188)
    parser.add_argument("comfyui", nargs="*", help="arguments for ComfyUI's main.py")
    given = parser.parse_args()
    try:
        tree, base = comfyui_dir(), make_base(given.base.absolute())
    except ComfyUIError as error:
        raise SystemExit(str(error)) from None
    link_pack(base)
    command = [sys.executable, str(tree / "main.py"), "--base-directory", str(base), "--port", str(given.port)]
    command += ["--database-url", f"sqlite:///{base}/user/comfyui.db"]
    os.chdir(base)
    try:
        return subprocess.call([*command, *device_arguments(), *given.comfyui])
    except KeyboardInterrupt:
        return 0


if __name__ == "__main__":
    sys.exit(main())
