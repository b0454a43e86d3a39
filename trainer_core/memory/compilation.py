"""Compiles the transformer's blocks with torch.compile: once for all sizes, and kept on disk for the next run."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..errors import TrainerError

_LOG = logging.getLogger(__name__)
T = TypeVar("T")
CACHE_BYTES = 2 << 30  # limit of the folder of compiled code
_CACHE_VARIABLES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")


class Compilation:
    """Compiles a transformer's blocks from `start` to `stop`. All share one graph with gradients and one without.

    The numbers of picture and prompt tokens are symbols in these graphs, so pairs of other sizes need no compilation.
    The last block is different, because it drops the prompt, and stays as it is: its own graphs would take longer to
    compile than they save.
    """

    def __init__(self, blocks: Sequence[nn.Module], *, dropout: bool = False) -> None:
        self._blocks = blocks[:-1]
        # A recomputed block must drop the same values again, although its second forward is another graph. Torch's own
        # dropout draws in the same order in both; the compiler's does not promise that.
        self._options = {"fallback_random": True} if dropout else None
        self.is_active = False

    def start(self) -> None:
        """Let the blocks run compiled from now on. Each graph is compiled when it is first needed."""
        import torch._dynamo.config as dynamo

        # Graphs differ between batches of one and of several pairs, with and without a mask or an enabled adapter.
        name = "recompile_limit" if hasattr(dynamo, "recompile_limit") else "cache_size_limit"  # before torch 2.6
        setattr(dynamo, name, max(64, getattr(dynamo, name)))
        # Lets blocks share graphs. Torch 2.4 has it off, other packages turn it off, and from 2.13 on it is always on.
        if torch.__version__ < "2.13":
            dynamo.inline_inbuilt_nn_modules = True
        for block in self._blocks:
            block.forward = _AnySize(torch.compile(block.forward, options=self._options))
        self.is_active = True

    def stop(self, reason: str) -> None:
        """Let the blocks run uncompiled from now on, and log the reason."""
        for block in self._blocks:
            del block.forward
        self.is_active = False
        _LOG.warning("The transformer's blocks run uncompiled from now on, because %s.", reason)

    def attempt(self, compute: Callable[[], T], clean_up: Callable[[], None] | None = None) -> T:
        """The result of `compute`. If it fails with compiled blocks, it is called again with uncompiled ones.

        `clean_up` is called in between.

        The compiler may fail at any time, in ways that differ between its versions, so this catches every error that
        is not ours and not about memory. An error that has another cause occurs again and is raised.
        """
        try:
            return compute()
        except (TrainerError, torch.OutOfMemoryError, MemoryError):
            raise
        except Exception as error:
            if not self.is_active:
                raise
            first_line = next(iter(str(error).splitlines()), "")
            self.stop(f"compiled ones fail ({type(error).__name__}: {first_line[:200]})")
        if clean_up is not None:
            clean_up()
        return compute()


class _AnySize:
    """A block's compiled forward, which tells the compiler which dimensions count tokens."""

    def __init__(self, compiled: Any) -> None:
        self._compiled = compiled

    def __call__(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        encoder_hidden_states_mask: Tensor | None,
        temb: Tensor,
        image_rotary_emb: tuple[Tensor, Tensor],
        joint_attention_kwargs: dict[str, Any] | None = None,
        modulate_index: Tensor | None = None,
    ) -> Any:
        rotary = tuple(map(torch.view_as_real, image_rotary_emb))  # inductor generates no code for complex numbers
        for tokens in (hidden_states, encoder_hidden_states, encoder_hidden_states_mask, modulate_index):
            _mark(tokens, 1)
        for angles in rotary:
            _mark(angles, 0)
        return self._compiled(
            hidden_states,
            encoder_hidden_states,
            encoder_hidden_states_mask,
            temb,
            rotary,
            joint_attention_kwargs,
            modulate_index,
        )


def _mark(tensor: Tensor | None, dim: int) -> None:
    if tensor is not None:
        torch._dynamo.maybe_mark_dynamic(tensor, dim)


def can_compile(device: torch.device) -> bool:
    """Whether torch.compile can generate code for the device: a CUDA device, with Triton installed."""
    return device.type == "cuda" and find_spec("triton") is not None


def code_folder() -> Path:
    """The folder of compiled code: below the user's cache folder.

    Torch unpickles files in it, so it must not be where a graph can make ComfyUI write.
    """
    caches = os.environ.get("XDG_CACHE_HOME") or os.environ.get("LOCALAPPDATA") or Path.home() / ".cache"
    return Path(caches) / "qwen_edit_trainer" / "compiled"


@contextmanager
def compiled_code_in(folder: Path) -> Iterator[None]:
    """Keep compiled code in `folder` while the context lasts, for this run and the next. Limits the folder's size."""
    before = {name: os.environ.get(name) for name in _CACHE_VARIABLES}
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder)
    os.environ["TRITON_CACHE_DIR"] = str(folder / "triton")
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
        _limit(folder, CACHE_BYTES)


def _limit(folder: Path, max_bytes: int) -> None:
    """Delete the least recently used files until the rest is within `max_bytes`."""
    with suppress(OSError):  # another run may be writing or deleting here; the next run tries again
        files = [(path, path.stat()) for path in folder.rglob("*") if path.is_file()]
        total = sum(stat.st_size for _, stat in files)
        for path, stat in sorted(files, key=lambda file: max(file[1].st_atime, file[1].st_mtime)):
            if total <= max_bytes:
                break
            path.unlink(missing_ok=True)
            total -= stat.st_size
