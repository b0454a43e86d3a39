"""Compiles the transformer's blocks with torch.compile: once for all sizes, and kept on disk for the next run."""

from __future__ import annotations

import logging
import os
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, TypeVar

import torch
from torch import nn

from ..device import release_memory
from ..text import reason_of

_LOG = logging.getLogger(__name__)
T = TypeVar("T")
CACHE_BYTES = 2 << 30  # limit of the folder of compiled code
_CACHE_VARIABLES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")


class Compilation:
    """Switches a transformer's blocks to compiled code and back. They are uncompiled until `start` is called.

    A block's class names the methods to compile in `COMPILED`, with the dimension of each argument that counts tokens.
    All blocks share their graphs: for each method one without gradients, one with, and one with gradients for the
    second pass of a recomputed block. The numbers of tokens are symbols in these graphs, so pairs of other sizes need
    no compilation.
    """

    def __init__(self, blocks: Sequence[nn.Module], *, dropout: bool = False) -> None:
        self._blocks = blocks
        # A recomputed block must drop the same values again. With torch's own random operations, the same graph draws
        # the same values from the same state of the generator.
        self._options = {"fallback_random": True} if dropout else None
        self.is_active = False
        self.is_forward_only = False  # see `forward_only`
        self.on_stop: Callable[[], None] = lambda: None  # called when blocks run uncompiled again

    def start(self) -> None:
        """Run the blocks compiled from now on. Each graph is compiled when it is first needed."""
        for block, name, token_dims in self._parts():
            setattr(block, name, _AnySize(self, getattr(block, name), token_dims, self._options))
        self.is_active = True

    def stop(self, reason: str) -> None:
        """Run the blocks uncompiled from now on, and log the reason."""
        for block, name, _ in self._parts():
            delattr(block, name)
        self.is_active = False
        self.on_stop()
        _LOG.warning("The transformer's blocks run uncompiled from now on, because %s.", reason)

    def _parts(self) -> Iterator[tuple[nn.Module, str, tuple[int | None, ...]]]:
        for block in self._blocks:
            compiled: dict[str, tuple[int | None, ...]] = block.COMPILED  # type: ignore[assignment]
            yield from ((block, name, token_dims) for name, token_dims in compiled.items())

    def attempt(self, compute: Callable[[], T], clean_up: Callable[[], None]) -> T:
        """Call `compute`, which runs forward and backward passes, and return its result.

        If compiled code fails or memory runs out, it is called again with uncompiled blocks, after `clean_up`. The
        compiler may fail in any pass, and its errors differ between versions of torch. All other errors are raised.
        """
        was_active = self.is_active
        try:
            return compute()
        except Exception as error:
            # Compiled blocks may need more memory. Which operation then fails is a matter of chance.
            if not was_active or not (isinstance(error, torch.OutOfMemoryError) or _is_from_compiled_code(error)):
                raise
            self.stop(_reason(error))
        clean_up()
        release_memory()  # only now: until here, the error's traceback has kept the tensors of the failed pass
        return compute()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """A context in which the blocks run uncompiled, for a few passes of a network with other layers."""
        parts = [(block, name, vars(block).pop(name)) for block, name, _ in self._parts()] if self.is_active else []
        try:
            yield
        finally:
            for block, name, part in parts:
                setattr(block, name, part)

    @contextmanager
    def forward_only(self) -> Iterator[None]:
        """A context for forward passes without gradients. If a block's compiled code fails there, that block and all
        later ones run uncompiled at once, so nothing has to be repeated."""
        self.is_forward_only = True
        try:
            yield
        finally:
            self.is_forward_only = False


def _reason(error: Exception) -> str:
    if isinstance(error, torch.OutOfMemoryError):
        return "compiled ones need more VRAM than is free"
    first_line = next(iter(str(error).splitlines()), "")
    return f"compiled ones fail ({type(error).__name__}: {first_line[:200]})"


def _is_from_compiled_code(error: Exception) -> bool:
    """Whether the compiler or compiled code raised this error."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return any(
        frame.f_code is _AnySize.__call__.__code__  # forward
        or str(frame.f_globals.get("__name__")).startswith("torch._functorch.")  # backward
        for frame in frames
    )


class _AnySize:
    """A part of a block, compiled when it is first called. Tells the compiler which dimensions count tokens."""

    def __init__(
        self,
        compilation: Compilation,
        uncompiled: Callable[..., Any],
        token_dims: Sequence[int | None],
        options: dict[str, bool] | None,
    ) -> None:
        self._compilation, self._uncompiled = compilation, uncompiled
        self._token_dims, self._options = token_dims, options
        self._compiled: Callable[..., Any] | None = None

    def __call__(self, *inputs: Any) -> Any:
        for value, dim in zip(inputs, self._token_dims, strict=True):
            if value is not None and dim is not None:
                torch._dynamo.maybe_mark_dynamic(value, dim)
        try:
            if self._compiled is None:
                self._compiled = _compiled(self._uncompiled, self._options)
            return self._compiled(*inputs)
        except Exception as error:
            if not self._compilation.is_forward_only:
                raise
            self._compilation.stop(_reason(error))
        return self._uncompiled(*inputs)


def _compiled(forward: Callable[..., Any], options: dict[str, bool] | None) -> Callable[..., Any]:
    import torch._dynamo.config as dynamo

    # Graphs differ between batches of one and of several pairs, with and without a mask or an enabled adapter.
    name = "recompile_limit" if hasattr(dynamo, "recompile_limit") else "cache_size_limit"  # before torch 2.6
    setattr(dynamo, name, max(64, getattr(dynamo, name)))
    # Lets blocks share graphs. Torch 2.4 has it off, other packages turn it off, and from 2.13 on it is always on.
    if torch.__version__ < "2.13":
        dynamo.inline_inbuilt_nn_modules = True
    return torch.compile(forward, options=options)


def is_compiled(block: nn.Module) -> bool:
    """Whether the block runs as compiled code."""
    return any(isinstance(part, _AnySize) for part in vars(block).values())


def can_compile(device: torch.device) -> bool:
    """Whether torch.compile can generate code for the device: a CUDA device, with Triton installed."""
    return device.type == "cuda" and find_spec("triton") is not None


def code_folder() -> Path:
    """The folder of compiled code: below the user's cache folder.

    Torch unpickles files in it, so it must not be where a graph can make ComfyUI write.

    Raises:
        RuntimeError: the user has no home folder.
    """
    caches = os.environ.get("XDG_CACHE_HOME") or os.environ.get("LOCALAPPDATA") or Path.home() / ".cache"
    return Path(caches) / "qwen_edit_trainer" / "compiled"


@contextmanager
def compiled_code_kept(device: torch.device) -> Iterator[None]:
    """Keep compiled code in `code_folder` while the context lasts, for this run and later ones. Limits its size.

    Without a folder that can be written, torch keeps the code in a temporary folder.
    """
    if not can_compile(device):
        yield
        return
    try:
        folder = code_folder()
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            pass
    except (OSError, RuntimeError) as error:
        place = getattr(error, "filename", None) or "its folder"
        _LOG.warning(
            "Compiled code is not kept for later runs, because %s can't be written (%s).", place, reason_of(error)
        )
        yield
        return
    before = {name: os.environ.get(name) for name in _CACHE_VARIABLES}
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder)
    os.environ["TRITON_CACHE_DIR"] = str(folder / "triton")
    try:
        with _backward_passes_kept():
            yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
        _limit(folder, CACHE_BYTES)


def _backward_passes_kept() -> AbstractContextManager[None]:
    """Keeps the traced backward passes of custom autograd functions too. Their keys cover their code."""
    import torch._functorch.config as functorch

    name = "autograd_cache_allow_custom_autograd_functions"  # from torch 2.8 on
    return functorch.patch({name: True}) if hasattr(functorch, name) else nullcontext()  # type: ignore[attr-defined]


def start_compiler() -> None:
    """Start the compiler's processes, which takes seconds. Until they run, this process compiles kernels one by one.

    They take the folder from the environment, so call this inside `compiled_code_kept`. Torch ends them with the
    program.
    """
    # If the compiler doesn't work, the first compiled step fails too. The dry step then logs the reason and goes on.
    with suppress(Exception):
        from torch._inductor import async_compile

        if hasattr(async_compile, "maybe_warm_pool"):  # older versions do it when they are imported
            async_compile.maybe_warm_pool()


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
