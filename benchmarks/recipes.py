"""Which settings learn an edit best: `python -m benchmarks.recipes --tokenizer FOLDER`.

Trains demo edits with one setting changed at a time, with several seeds each, and prints a Markdown table: PSNR of
held-out pictures as mean ± standard deviation over seeds, and the difference to the first row. A difference below twice
its standard error is shown in parentheses: seeds alone can explain it.
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .demo_edits import NEW, Outcome, Training, mean_and_spread, run_all


def _noise(**values: Any) -> dict[str, Any]:
    return {"noise": values}


def _ema(decay: float) -> dict[str, Any]:
    return {"ema": {"use_ema": True, "ema_decay": decay, "ema_validation": "ema_only"}}


ROWS: dict[str, Mapping[str, Any]] = {
    "demo preset: all layers, rank 16, shift 1.73": {},
    "lora_targets image-attention": {"lora": {"lora_targets": "image-attention"}},
    "lora_targets attention": {"lora": {"lora_targets": "attention"}},
    "lora_targets attention-mlp": {"lora": {"lora_targets": "attention-mlp"}},
    "lora_rank 4": {"lora": {"lora_rank": 4}},
    "lora_rank 8": {"lora": {"lora_rank": 8}},
    "lora_rank 32": {"lora": {"lora_rank": 32}},
    "flow_schedule_shift 1": _noise(flow_schedule_shift=1.0),
    "flow_schedule_shift 2.2": _noise(flow_schedule_shift=2.2),
    "flow_schedule_shift 3": _noise(flow_schedule_shift=3.0),
    "sigma_distribution uniform": _noise(sigma_distribution="uniform"),
    "sigma_distribution mode": _noise(sigma_distribution="mode"),
    "sigma_distribution cosmap": _noise(sigma_distribution="cosmap"),
    "stratified_sigmas off": _noise(stratified_sigmas=False),
    "edit_weight 0.3": _noise(edit_weight=0.3),
    "edit_weight 0.6": _noise(edit_weight=0.6),
    "EMA, decay 0.95": _ema(0.95),
    "EMA, decay 0.98": _ema(0.98),
    "caption_dropout_probability 0.05": {"batching": {"caption_dropout_probability": 0.05}},
    "caption_dropout_probability 0.1": {"batching": {"caption_dropout_probability": 0.1}},
}


def head(edits: Sequence[str]) -> str:
    """The table's first two lines."""
    heads = [cell for edit in edits for cell in (f"{edit}, dB", "difference")]
    return f"| setting | {' | '.join(heads)} | s per step |\n" + "| --- " * (len(heads) + 2) + "|"


def line(outcomes: Sequence[Outcome], first: Sequence[Outcome], edits: Sequence[str]) -> str:
    """The table's line for the outcomes of a row: for each edit, dB and the difference to the `first` row's."""
    cells = []
    for edit in edits:
        values, others = ([each.lora[edit] for each in row if each.training.edit == edit] for row in (outcomes, first))
        cells += [mean_and_spread(values), "" if outcomes is first else _difference(values, others)]
    seconds = statistics.median(each.seconds for each in outcomes)
    return f"| {outcomes[0].training.row} | {' | '.join(cells)} | {seconds:.3f} |"


def _difference(values: Sequence[float], first: Sequence[float]) -> str:
    difference = statistics.fmean(values) - statistics.fmean(first)
    if min(len(values), len(first)) < 2:
        return f"({difference:+.2f})"
    error = math.sqrt(statistics.variance(values) / len(values) + statistics.variance(first) / len(first))
    return f"{difference:+.2f}" if abs(difference) > 2 * error else f"({difference:+.2f})"


def main() -> None:
    """Train all rows and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder of the Qwen2.5 tokenizer")
    parser.add_argument("--jobs", type=int, default=2, help="processes, each with one thread")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--edits", nargs="+", default=list(NEW), choices=list(NEW))
    parser.add_argument("--rows", nargs="+", default=list(ROWS))
    options = parser.parse_args()
    trainings = [
        Training(row, edit, seed, ROWS[row], with_old=False)
        for row in options.rows
        for edit in options.edits
        for seed in range(options.seeds)
    ]
    with tempfile.TemporaryDirectory() as folder:
        first: list[Outcome] = []
        for outcomes in run_all(Path(folder), options.tokenizer, trainings, options.jobs):
            if not first:
                first = outcomes
                print(head(options.edits))
            print(line(outcomes, first, options.edits), flush=True)


if __name__ == "__main__":
    main()
