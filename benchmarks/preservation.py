"""What the demo model still does after it has learned a new edit.

`python -m benchmarks.preservation --tokenizer FOLDER` prints a Markdown table with a row per setting: PSNR of held-out
pictures with the new edit and with edits that the model knew before, as mean ± standard deviation over seeds.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainer_core.settings import merged

from .demo_edits import NEW, OLD, Outcome, Training, mean_and_spread, run_all

_PROMPTS = [phrasing for each in OLD for phrasing in each.phrasings[1:3] if phrasing.strip()]
_NEUTRAL = ["do not change anything"]
_COLOURS = ("copy", "grey", "darker", "red-blue", "sepia", "warm")


def _preserving(probability: float, prompts: list[str], weight: float = 1.0) -> dict[str, Any]:
    return {
        "preservation": {"preservation_probability": probability, "preservation_weight": weight},
        "encoding": {"preservation_prompts": prompts},
    }


def _with_old_edits(probability: float, weight: float) -> dict[str, Any]:
    """Regularisation data: pairs of the old edits. An epoch draws this share of them."""
    old = {"id": "old_edits", "place": "old_trained", "is_regularisation_data": True, "probability": probability}
    return {"extra_sets": [old], "preservation": {"preservation_weight": weight}}


_LONGER = {"max_train_steps": 240}
ROWS: dict[str, Mapping[str, Any]] = {
    "none": {},
    "none, 240 steps": _LONGER,
    "0.25, one neutral instruction": _preserving(0.25, _NEUTRAL),
    "0.25, other instructions": _preserving(0.25, _PROMPTS),
    "0.5, other instructions": _preserving(0.5, _PROMPTS),
    "0.5, other instructions, 240 steps": merged(_LONGER, _preserving(0.5, _PROMPTS)),
    "0.5, other instructions, weight 4": _preserving(0.5, _PROMPTS, 4.0),
    "0.5, other instructions, weight 4, 240 steps": merged(_LONGER, _preserving(0.5, _PROMPTS, 4.0)),
    "regularisation data, a third of the turns": _with_old_edits(0.07, 1.0),
    "regularisation data, half, 240 steps": merged(_LONGER, _with_old_edits(0.14, 1.0)),
    "regularisation data, half, weight 4, 240 steps": merged(_LONGER, _with_old_edits(0.14, 4.0)),
}


HEAD = "| preservation | new edit, dB | old colours, dB | lost, dB | mirror, dB | lost, dB |\n" + "| --- " * 6 + "|"


def line(found: list[Outcome]) -> str:
    """The table's line for the outcomes of a row."""

    def mean(values: Mapping[str, float]) -> float:
        return statistics.fmean(values[name] for name in _COLOURS)

    cells = [
        mean_and_spread(each.lora[each.training.edit] for each in found),
        mean_and_spread(mean(each.lora) for each in found),
        mean_and_spread(mean(each.base) - mean(each.lora) for each in found),
        mean_and_spread(each.lora["mirror"] for each in found),
        mean_and_spread(each.base["mirror"] - each.lora["mirror"] for each in found),
    ]
    return f"| {found[0].training.row} | {' | '.join(cells)} |"


def main() -> None:
    """Train all rows and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder of the Qwen2.5 tokenizer")
    parser.add_argument("--jobs", type=int, default=2, help="processes, each with one thread")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--edit", default="negative", choices=list(NEW))
    parser.add_argument("--rows", nargs="+", default=list(ROWS))
    options = parser.parse_args()
    trainings = [Training(row, options.edit, seed, ROWS[row]) for row in options.rows for seed in range(options.seeds)]
    with tempfile.TemporaryDirectory() as folder:
        print(HEAD)
        for outcomes in run_all(Path(folder), options.tokenizer, trainings, options.jobs):
            print(line(outcomes), flush=True)


if __name__ == "__main__":
    main()
