"""The chart of a training run: losses, drift and learning rate over the steps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from PIL import Image

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH, HEIGHT, _DPI = 900, 560, 100
_BACKGROUND, _PANEL, _LINES, _TEXT, _MUTED = "#1e2024", "#26292e", "#3a3e45", "#ecedf0", "#a0a5ae"
_LOSS, _VALIDATION, _RATE = "#5aa9ff", "#ffb454", "#8ec07c"
_AVERAGE = "#f2e394"
_DRIFT = {"drift_shift": ("shift, px", "#e06c9f"), "drift_zoom": ("zoom, %", "#c3a6ff"),
          "drift_colour": ("colour, of 255", "#56c8c8")}  # fmt: skip

Rows = Sequence[Mapping[str, object]]


def loss_chart(rows: Rows) -> Image.Image:
    """Loss, smoothed loss, validation loss, learning rate and any drift over the steps; RGB, 900 x 560 pixels.

    `rows` are the rows of metrics.jsonl with step, loss and learning_rate. Some also have validation_loss and drift_...
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, NullLocator

    figure = Figure(figsize=(WIDTH / _DPI, HEIGHT / _DPI), dpi=_DPI, facecolor=_BACKGROUND)
    canvas = FigureCanvasAgg(figure)
    drifts = any(_series(rows, name)[0] for name in _DRIFT)
    loss_axes, *drift_axes, rate_axes = figure.subplots(
        3 if drifts else 2, 1, sharex=True,
        gridspec_kw={"height_ratios": [5, 2, 1] if drifts else [5, 1], "hspace": 0.12, "left": 0.085, "right": 0.975,
                     "top": 0.91, "bottom": 0.1}
    )  # fmt: skip
    for axes in (loss_axes, *drift_axes, rate_axes):
        _style(axes)
    figure.text(0.085, 0.945, "Training loss", color=_TEXT, fontsize=13, fontweight="bold")
    _draw_loss(loss_axes, rows)
    for axes in drift_axes:
        _draw_drift(axes, rows)
    _draw_rate(rate_axes, rows)
    rate_axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True) if rows else NullLocator())
    canvas.draw()
    return Image.frombytes("RGBA", (WIDTH, HEIGHT), bytes(canvas.buffer_rgba())).convert("RGB")


def smoothed(values: Sequence[float], window: float) -> list[float]:
    """Bias-corrected exponential moving average over about `window` values. Skips values that are not finite."""
    keep = 1 - 1 / max(1.0, window)
    total = weight = 0.0
    means = []
    for value in values:
        if math.isfinite(value):
            total, weight = keep * total + (1 - keep) * value, keep * weight + (1 - keep)
        means.append(total / weight if weight else math.nan)
    return means


def _style(axes: Axes) -> None:
    axes.set_facecolor(_PANEL)
    axes.grid(visible=True, color=_LINES, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(colors=_MUTED, labelsize=9, length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _draw_loss(axes: Axes, rows: Rows) -> None:
    steps, losses = _series(rows, "loss")
    axes.set_ylabel("loss", color=_MUTED, fontsize=10)
    if not steps:
        axes.set_yticks([])
        axes.text(0.5, 0.5, "No finished steps yet", color=_MUTED, fontsize=12, ha="center", transform=axes.transAxes)
        return
    dot = "o" if len(steps) == 1 else ""
    axes.plot(steps, losses, color=_LOSS, alpha=0.35, linewidth=0.9, marker=dot, label="loss of each step")
    means = smoothed(losses, min(50, max(5, len(losses) / 20)))
    axes.plot(steps, means, color=_LOSS, linewidth=2.4, solid_capstyle="round", label=f"smoothed, now {means[-1]:.4g}")
    checked, validation = _series(rows, "validation_loss")
    if checked:
        label = f"validation pairs, now {validation[-1]:.4g}"
        axes.plot(
            checked,
            validation,
            color=_VALIDATION,
            linewidth=1.2,
            marker="D",
            markersize=5.5,
            label=label,
            clip_on=False,
        )
    averaged, average = _series(rows, "ema_validation_loss")
    if averaged:
        axes.plot(averaged, average, color=_AVERAGE, linewidth=1.2, marker="s", markersize=4.5, clip_on=False,
                  label=f"EMA on them, now {average[-1]:.4g}")  # fmt: skip
    _limit(axes, losses, [*means, *validation, *average])
    axes.legend(frameon=False, labelcolor=_TEXT, fontsize=9.5, loc="upper right", ncols=4, bbox_to_anchor=(1.0, 1.12))


def _draw_drift(axes: Axes, rows: Rows) -> None:
    """Plot three drifts on one axis that is linear up to 1 and logarithmic above, so that small values stay visible."""
    highest = 1.0
    for name, (words, colour) in _DRIFT.items():
        steps, values = _series(rows, name)
        if steps:
            highest, label = max(highest, *values), f"{words}, now {values[-1]:.2g}"
            axes.plot(steps, values, color=colour, linewidth=1.2, marker="D", markersize=4, label=label, clip_on=False)
    axes.set_yscale("symlog", linthresh=1.0)
    axes.set_yticks([0, 1, 2, 5, 10, 20, 50, 100], minor=False)
    axes.set_ylim(0, highest * 1.15)
    axes.set_ylabel("drift", color=_MUTED, fontsize=9)
    axes.yaxis.set_major_formatter(lambda value, _position: f"{value:g}")
    axes.legend(frameon=False, labelcolor=_TEXT, fontsize=8.5, loc="upper right", ncols=3, bbox_to_anchor=(1.0, 1.2))


def _draw_rate(axes: Axes, rows: Rows) -> None:
    steps, rates = _series(rows, "learning_rate")
    axes.set_xlabel("step", color=_MUTED, fontsize=10)
    axes.set_ylabel("learning\nrate", color=_MUTED, fontsize=9)
    axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3), useMathText=True)
    axes.yaxis.get_offset_text().set(color=_MUTED, fontsize=8)
    if steps:
        axes.plot(steps, rates, color=_RATE, linewidth=1.6, marker="o" if len(steps) == 1 else "", markersize=4)
        axes.set_ylim(0, (max(rates) or 1.0) * 1.2)
        beside = 1 if len(steps) == 1 else 0
        axes.set_xlim(min(steps) - beside, max(steps) + beside)
    else:
        axes.set_yticks([])


def _limit(axes: Axes, losses: Sequence[float], must_show: Sequence[float]) -> None:
    """Limit the y axis to the 99th percentile of the losses, so that single outliers don't flatten the curve."""
    finite = sorted(value for value in losses if math.isfinite(value))
    shown = [value for value in must_show if math.isfinite(value)]
    if len(finite) < 2:
        return
    low, high = finite[0], finite[min(len(finite) - 1, int(len(finite) * 0.99))]
    low, high = min([low, *shown]), max([high, *shown])
    margin = (high - low) * 0.08 or abs(high) * 0.1 or 1.0
    axes.set_ylim(max(0.0, low - margin) if low >= 0 else low - margin, high + margin)


def _series(rows: Rows, name: str) -> tuple[list[float], list[float]]:
    """Steps and values of the rows that have a finite value of this name."""
    found = [
        (float(step), float(value))
        for step, value in ((row.get("step"), row.get(name)) for row in rows)
        if isinstance(step, int | float) and isinstance(value, int | float) and math.isfinite(value)
    ]
    return [step for step, _ in found], [value for _, value in found]
