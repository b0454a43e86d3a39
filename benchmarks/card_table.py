"""Reads the notes of `card_probe` and writes the tables of `benchmarks.cards`."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

GIB = 2**30
START, PICTURES, PROMPTS, LOAD, FIRST, STEPS = "start", "pictures", "prompts", "load", "first step", "steps"
PREVIEW, EXPORT, LORA = "preview", "export", "LoRA in ComfyUI"
COLUMNS = (START, PICTURES, PROMPTS, LOAD, FIRST, STEPS, PREVIEW, EXPORT)
_PEAKS = (PICTURES, PROMPTS, LOAD, FIRST, STEPS, PREVIEW, LORA)  # columns of the table of memory
# Columns by the beginnings of the phases' names. Other phases are listed below the table.
_COLUMN_OF = {
    "start": START,
    "Checking": PICTURES,
    "Encoding pictures": PICTURES,
    "Encoding masks": PICTURES,
    "Comparing pixels": PICTURES,
    "Loading the text encoder": PROMPTS,
    "Encoding prompts": PROMPTS,
    "preparing": LOAD,
    "Loading the transformer": LOAD,
    "step": STEPS,
    "validation": PREVIEW,
    "Drawing validation pictures": PREVIEW,
    "preview": PREVIEW,
    "saving": EXPORT,
    "export": EXPORT,
    "end": EXPORT,
    LORA: LORA,
}


@dataclass
class Spent:
    """What one phase took: seconds, and the peaks of device memory in bytes."""

    seconds: float = 0.0
    reserved: int = 0
    allocated: int = 0


@dataclass
class Row:
    """One preset on one card, run through the command line (`cli`) or ComfyUI."""

    preset: str
    via: str
    card: float
    total: float = 0.0
    problem: str = ""
    phases: dict[str, Spent] = field(default_factory=dict)
    steps: list[dict[str, Any]] = field(default_factory=list)
    plan: dict[str, Any] = field(default_factory=dict)
    exported: bool = False
    patches: int = 0
    backend: str = "native"

    def read(self, notes: Path, begin: float) -> None:
        """Add up the notes by phase. `begin` is when the process started, in seconds since the epoch."""
        before, held = begin, Spent()
        for line in notes.read_text(encoding="utf-8").splitlines() if notes.is_file() else []:
            event = json.loads(line)
            self.backend = event.get("backend", self.backend)
            held.seconds += event["at"] - before
            held.reserved, held.allocated = (max(getattr(held, key), event[key]) for key in ("reserved", "allocated"))
            before = event["at"]
            if not event["phase"]:
                continue  # belongs to the next event
            self._add(self._column(event), held)
            held = Spent()

    def _column(self, event: dict[str, Any]) -> str:
        self.exported = self.exported or event["phase"] == "export"
        if "plan" in event:
            self.plan = event
        self.patches += event.get("patches", 0) if event["phase"] == LORA else 0
        if "learning_rate" in event:
            self.steps.append(event)
        phase = next((each for begin, each in _COLUMN_OF.items() if event["phase"].startswith(begin)), event["phase"])
        return FIRST if phase == STEPS and len(self.steps) + ("loss" not in event) <= 1 else phase

    def _add(self, phase: str, spent: Spent) -> None:
        whole = self.phases.setdefault(phase, Spent())
        whole.seconds += spent.seconds
        whole.reserved, whole.allocated = max(whole.reserved, spent.reserved), max(whole.allocated, spent.allocated)

    @property
    def peak(self) -> int:
        """The highest peak in bytes. cudaMallocAsync keeps freed memory and returns it when needed: not counted."""
        name = "reserved" if self.backend == "native" else "allocated"
        return max((getattr(spent, name) for spent in self.phases.values()), default=0)

    @property
    def seconds_per_pair(self) -> float | None:
        """Median over the steps after the first, which may compile."""
        seconds = [step["seconds"] for step in self.steps[1:]]
        return statistics.median(seconds) / self.plan["pairs"] if seconds and self.plan else None

    def check(self, steps: int) -> None:
        """Set `problem` if something is missing or the card was too small, unless a problem is known already."""
        missing = [column for column in COLUMNS if column not in self.phases]
        found = [
            (len(self.steps) < steps, f"{len(self.steps)} of {steps} steps"),
            (bool(missing), f"no {', '.join(missing)}"),
            (not self.exported, "no LoRA was exported"),
            (self.peak > self.card * GIB > 0, f"peak of {self.peak / GIB:.2f} GiB is above the card's {self.card} GiB"),
            (self.via != "cli" and not self.patches, "ComfyUI patched no weight with the LoRA"),
        ]
        self.problem = self.problem or "; ".join(text for is_wrong, text in found if is_wrong)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    cells = [[cell.replace("|", "/").replace("\n", " ") for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, ["---"] * len(head), *cells])


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _start_of(row: Row) -> list[str]:
    return [f"`{row.preset}`", row.via, f"{row.card:g}" if row.card else "all"]


def _seconds(row: Row) -> list[str]:
    spent = [row.phases.get(column) for column in (*COLUMNS, LORA)]
    cells = [_number(each.seconds if each else None, 1) for each in spent]
    outcome = f"FAIL: {row.problem}" if row.problem else "OK"
    return [*_start_of(row), *cells, _number(row.seconds_per_pair, 2), _number(row.total, 0), outcome]


def _memory(row: Row) -> list[str]:
    spent = [row.phases.get(column) for column in _PEAKS]
    cells = [_number(each.reserved / GIB if each else None, 1) for each in spent]
    training = [row.phases[column].allocated for column in (FIRST, STEPS) if column in row.phases]
    planned = row.plan.get("plan", {}).get("training")
    step = f"{_number(max(training) / GIB if training else None, 2)} / {_number(planned and planned / GIB, 2)}"
    return [*_start_of(row), *cells, step, _settings(row.plan), row.backend]


def _settings(plan: dict[str, Any]) -> str:
    if not plan:
        return "-"
    memory = plan["memory"]
    offload = ", activations offloaded" if memory["activation_offload"] else ""
    offload += ", attention recomputed" if memory.get("recompute_attention") else ""
    text = f"{plan['precision']}, {plan['recomputed']} recomputed, {plan['streamed']} streamed{offload}"
    return f"{text}, compile_blocks {memory['compile_blocks']}; needs {plan['needed'] / GIB:.1f} GiB"


def tables(rows: Sequence[Row]) -> str:
    """The rows as Markdown: seconds, memory, and phases that have no column."""
    seconds = _table(
        [
            *("preset", "via", "card GiB"),
            *(f"{each} s" for each in (*COLUMNS, LORA)),
            "s per pair",
            "total s",
            "result",
        ],
        list(map(_seconds, rows)),
    )
    memory = _table(
        ["preset", "via", "card GiB", *_PEAKS, "step measured / planned", "plan", "allocator"],
        list(map(_memory, rows)),
    )
    known = (*COLUMNS, LORA)
    others = [
        f"- `{row.preset}` via {row.via}: {phase} {spent.seconds:.1f} s, {spent.reserved / GIB:.1f} GiB"
        for row in rows
        for phase, spent in row.phases.items()
        if phase not in known and spent.seconds >= 0.1
    ]
    below = "\n\nOther phases:\n\n" + "\n".join(others) if others else ""
    return (
        f"Seconds:\n\n{seconds}\n\nPeaks of device memory in GiB, reserved by torch; in a step also allocated, beside "
        f"what was planned:\n\n{memory}{below}\n"
    )
