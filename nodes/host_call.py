"""Long calls inside ComfyUI: memory, torch modes, progress and interruption."""

from __future__ import annotations

import gc
import logging
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import comfy.model_management
import comfy.utils
import numpy as np
import torch

from ..trainer_core.errors import Interrupted
from ..trainer_core.events import SampleReport, StepReport, Stop
from .active_runs import RUN_MESSAGE, ActiveRun, LiveMessages, active_run, note_ended
from .host_server import executing_node, executing_prompt, send_message, server

_LOG = logging.getLogger(__name__)
_TEXT_EVERY_SECONDS = 1.0


class NodeObserver:
    """Reports progress on the executing node and to open pages, and reports the user's stop requests.

    Implements `trainer_core.events.Observer`. `runs` are the runs that the call trains or encodes for. `on_open` is
    called when a training has opened its run folder.
    """

    def __init__(self, runs: Sequence[ActiveRun] = (), on_open: Callable[[], None] | None = None) -> None:
        self._runs, self._on_open = runs, on_open
        self._live = [LiveMessages(run, send_message) for run in runs]
        for live in self._live:
            live.begin()
        self._bar = comfy.utils.ProgressBar(1)
        self._node_id = executing_node()
        self._text_at = 0.0
        # The page shows a run on its own node, in better words.
        self._has_text = self._node_id is not None and all(run.node_id != self._node_id for run in runs)

    def on_progress(self, phase: str, done: int, total: int) -> None:
        """Show one progress bar per phase."""
        text = f"{phase}: {done} of {total}"
        self._update(done, total)
        self._show(text, final=done >= total)
        for live in self._live:
            live.phase(text, done, total)

    def on_note(self, text: str) -> None:
        """Log the sentence, and show it until the next progress."""
        _LOG.info("%s", text)
        self._show(text, final=True)
        for live in self._live:
            live.phase(text)

    def on_open(self, run_dir: Path) -> None:
        """Save the graph in the run folder."""
        _ = run_dir
        if self._on_open is not None:
            self._on_open()

    def on_step(self, report: StepReport) -> None:
        """Show the training progress bar."""
        for live in self._live:
            live.step(report)
        self._update(report.step, report.num_steps)
        self._show(f"Step {report.step} of {report.num_steps}, loss {report.loss:.4f}")

    def on_samples(self, report: SampleReport) -> None:
        """Tell the page, which shows the pictures. ComfyUI's preview would stay on the node, below its last grid."""
        for live in self._live:
            live.samples(report.step)

    def should_stop(self) -> Stop:
        """PAUSE after ComfyUI's interrupt, KEEP after "Stop and keep", otherwise NO."""
        if comfy.model_management.processing_interrupted():
            return Stop.PAUSE
        return Stop.KEEP if any(run.keep.is_set() for run in self._runs) else Stop.NO

    def _update(self, done: int, total: int) -> None:
        """Move the bar. ComfyUI's bar raises and clears a pending interrupt; set it again for `should_stop`."""
        if total != self._bar.total or done < self._bar.current:
            # Since ComfyUI 0.13 a bar sends nothing until it passes the last value it sent: use a new bar.
            self._bar = comfy.utils.ProgressBar(total)
        try:
            self._bar.update_absolute(done, total)
        except comfy.model_management.InterruptProcessingException:
            comfy.model_management.interrupt_current_processing()

    def _show(self, text: str, *, final: bool = False) -> None:
        send = getattr(server(), "send_progress_text", None)
        now = time.monotonic()
        if send is None or not self._has_text or (now - self._text_at < _TEXT_EVERY_SECONDS and not final):
            return
        self._text_at = now
        send(text, self._node_id)


@contextmanager
def interruptible(runs: Sequence[ActiveRun] = (), on_open: Callable[[], None] | None = None) -> Iterator[NodeObserver]:
    """Yield an observer. Turns `Interrupted` into ComfyUI's own exception if ComfyUI was interrupted."""
    try:
        yield NodeObserver(runs, on_open)
    except Interrupted:
        comfy.model_management.throw_exception_if_processing_interrupted()
        raise


@contextmanager
def short_call() -> Iterator[NodeObserver]:
    """Run one interruptible call that needs no device memory. Empty networks that it makes can be trained later."""
    with interruptible() as observer, torch.inference_mode(mode=False), torch.enable_grad():
        yield observer


@contextmanager
def long_call(
    run_name: str = "", on_open: Callable[[], None] | None = None, *, encodes_for: Mapping[str, str] | None = None
) -> Iterator[NodeObserver]:
    """Run one interruptible call with ComfyUI's networks unloaded and autograd on; restore global state afterwards.

    Lists in `active_runs` the run `run_name` as training, and those of `encodes_for` (training nodes by run name) as
    encoding. `on_open` is called when the run folder is open. ComfyUI executes nodes in inference mode, and tensors
    created in that mode can never be used by autograd, so networks must be loaded inside this context.
    """
    free_memory()
    waiting = encodes_for or {}
    try:
        with (
            ExitStack() as listed,
            interruptible(_listed(listed, run_name, waiting), on_open) as observer,
            _globals_kept(),
            torch.inference_mode(mode=False),
            torch.enable_grad(),
        ):
            try:
                yield observer
            finally:  # while the run is listed, so that it is not taken for a queued one in between
                if run_name:
                    note_ended(executing_prompt(), executing_node())
    finally:
        free_memory()
        for name in filter(None, (run_name, *waiting)):
            send_message(RUN_MESSAGE, {"run_name": name, "active": False})  # the run folder says how it ended


def _listed(stack: ExitStack, run_name: str, waiting: Mapping[str, str]) -> list[ActiveRun]:
    """The runs of a call, listed in `active_runs` until `stack` ends."""
    runs = [stack.enter_context(active_run(name, node_id, "encoding")) for name, node_id in waiting.items()]
    if run_name:
        runs.append(stack.enter_context(active_run(run_name, executing_node())))
    return runs


def free_memory() -> None:
    """Unload all of ComfyUI's networks. Unloading also removes LoRA patches from their weights."""
    comfy.model_management.unload_all_models()
    gc.collect()
    comfy.model_management.soft_empty_cache()


@contextmanager
def _globals_kept() -> Iterator[None]:
    """Restores the global random generators and default dtype, so that the results of other nodes do not change."""
    python_state, numpy_state, dtype = random.getstate(), np.random.get_state(), torch.get_default_dtype()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        torch.set_default_dtype(dtype)
