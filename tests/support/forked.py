"""Runs this repository's modules as programs, in processes forked from one that has loaded the heavy packages.

A new Python takes about eight seconds of a core for torch, diffusers and peft, and a narrow training takes two.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import PIL

from tests.support.narrow import show_less
from tools.comfyui import REPO

PATIENCE = 1200  # seconds after which something hangs; a busy machine takes long for the rest
_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(
    [
        "trainer_core.job",
        "trainer_core.run",
        "trainer_core.sample",
        "diffusers.models.autoencoders.autoencoder_kl_qwenimage",
        "diffusers.models.transformers.transformer_qwenimage",
        "transformers.models.qwen2.tokenization_qwen2",
        "transformers.models.qwen2_5_vl.modeling_qwen2_5_vl",
        "tensorboardX",
        "packaging.requirements",
        *(f"PIL.{name}" for name in PIL._plugins),
    ]
)


def _program(module: str, arguments: list[str], environment: dict[str, str], out: Path, err: Path) -> None:
    """In the fork: what `python -m module arguments` does in the repository's folder."""
    os.environ.update(environment)
    os.chdir(REPO)
    for path, number in ((out, 1), (err, 2)):
        with path.open("w") as file:
            os.dup2(file.fileno(), number)
    show_less()  # as the fixture `small_sight` does in the tests' own process
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


class Forked:
    """A running `python -m module arguments`, with the methods of subprocess.Popen that tests need."""

    def __init__(self, module: str, *arguments: object, environment: Mapping[str, str] | None = None) -> None:
        self._written = tempfile.TemporaryDirectory()
        self._out, self._err = (Path(self._written.name) / name for name in ("out.txt", "err.txt"))
        given = (module, [*map(str, arguments)], dict(environment or {}), self._out, self._err)
        self._process = _FORKS.Process(target=_program, args=given)
        self._process.start()

    @property
    def pid(self) -> int:
        """Process id."""
        assert self._process.pid is not None
        return self._process.pid

    def poll(self) -> int | None:
        """Exit code, minus the signal's number after a signal; None while it runs."""
        return self._process.exitcode

    @property
    def returncode(self) -> int | None:
        """The same as `poll()`."""
        return self.poll()

    def communicate(self, timeout: float = PATIENCE) -> tuple[str, str]:
        """Wait until it ends. Returns what it wrote to stdout and stderr.

        Raises:
            subprocess.TimeoutExpired: it did not end in time; it was killed.
        """
        self._process.join(timeout)
        if self._process.is_alive():
            self.kill()
            raise subprocess.TimeoutExpired(sys.argv, timeout, stderr=self._err.read_text())
        return self._out.read_text(), self._err.read_text()

    def kill(self) -> None:
        """Send SIGKILL and wait for the end."""
        self._process.kill()
        self._process.join()
