"""Child process of `comfy_subprocess.py`, with the arguments <ComfyUI tree> <script> <work folder>."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import sys
from pathlib import Path


class LogLines(logging.Handler):
    """Collects log messages."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def main(tree: str, script: str, work: str) -> None:
    """Import ComfyUI's modules on the CPU, call the script's `main` and write its answer to `work`."""
    os.chdir(work)
    os.environ.pop("PYTEST_CURRENT_TEST", None)
    own = Path(__file__).resolve().parent
    others = [path for path in sys.path if path and Path(path).resolve() != own]
    sys.path[:] = [tree, *others, str(own)]  # last, for scripts that use each other
    sys.argv = ["main.py"]
    from comfy.cli_args import args

    args.cpu = True
    import utils.extra_config  # noqa: F401 - before a script imports another package named utils
    from safetensors.torch import load_file, save_file

    log = LogLines()
    logging.getLogger().addHandler(log)
    spec = importlib.util.spec_from_file_location("script", script)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    folder = Path(work)
    values = json.loads((folder / "question.json").read_text(encoding="utf-8"))
    tensors, values = module.main(load_file(folder / "question.safetensors"), values)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "answer.safetensors")
    answer = {"values": values, "log": log.lines}
    (folder / "answer.json").write_text(json.dumps(answer), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
