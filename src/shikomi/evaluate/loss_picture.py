"""The loss picture: training and evaluation loss over steps with the learning rate behind, as SVG."""

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

POINTS = 600
"""Most points of a curve; longer runs are averaged, so that the picture of a long run stays small."""

INK, GRID, TRAIN, EVAL, RATE = "#3a3f4b", "#d9d7d0", "#0b7285", "#c2410c", "#6b7280"
THEMED = {INK: "--muted", GRID: "--line", TRAIN: "--accent", EVAL: "--second", RATE: "--faint"}
"""Colours of the picture and the page's variables that replace them where the picture stands in the page."""


@dataclass(frozen=True)
class Curve:
    """One quantity over global steps within one stage."""

    steps: np.ndarray
    values: np.ndarray


def curves(records: Sequence[Mapping[str, Any]], key: str) -> list[Curve]:
    """The finite values of `key` in metrics.jsonl, one curve per stage: losses of two objectives do not compare."""
    found = [
        (record.get("stage"), record["step"], record[key])
        for record in records
        if isinstance(record.get(key), int | float) and math.isfinite(record[key])
    ]
    return [
        Curve(np.array([row[1] for row in rows]), np.array([row[2] for row in rows], np.float64))
        for rows in (list(group) for _, group in groupby(found, key=lambda row: row[0]))
    ]


def thinned(curve: Curve) -> Curve:
    """At most POINTS points, each the mean of as many neighbours."""
    if len(curve.steps) <= POINTS:
        return curve
    parts = np.array_split(np.arange(len(curve.steps)), POINTS)
    return Curve(
        np.array([curve.steps[part].mean() for part in parts]),
        np.array([curve.values[part].mean() for part in parts]),
    )


def smoothed(values: np.ndarray) -> np.ndarray:
    """Exponential moving average over about a twentieth of the run, without the bias of its start."""
    keep = 1 - 1 / max(1.0, len(values) / 20)
    average, weight, out = 0.0, 0.0, np.empty_like(values)
    for i, value in enumerate(values):
        average, weight = keep * average + (1 - keep) * value, keep * weight + (1 - keep)
        out[i] = average / weight
    return out


def describe(records: Sequence[Mapping[str, Any]]) -> str:
    """What the picture shows, in words: its caption, and its text for those who do not see it."""
    sentences = []
    for name, key in (("Training loss", "loss"), ("Evaluation loss", "eval_loss")):
        for curve in curves(records, key):
            line = smoothed(curve.values) if key == "loss" else curve.values
            if len(line) == 1:
                sentences.append(f"{name} {line[0]:.3f} at step {curve.steps[0]:,}.")
            elif len(line):
                start = f"{curve.values[0]:.3f} at step {curve.steps[0]:,}"
                sentences.append(f"{name} from {start} to {line[-1]:.3f} at step {curve.steps[-1]:,}.")
    return " ".join(sentences) or "No loss was recorded."


def _draw_losses(axes: Axes, records: Sequence[Mapping[str, Any]]) -> None:
    train = [thinned(curve) for curve in curves(records, "loss")]
    held_out = curves(records, "eval_loss")
    for number, curve in enumerate(train):
        label = "training loss (smoothed)" if number == 0 else None
        axes.plot(curve.steps, curve.values, color=TRAIN, alpha=0.3, linewidth=0.9)
        axes.plot(curve.steps, smoothed(curve.values), color=TRAIN, linewidth=2, label=label)
        if number:
            axes.axvline(curve.steps[0] - 0.5, color=GRID, linewidth=1, linestyle=(0, (4, 3)))
    for number, curve in enumerate(held_out):
        label = "evaluation loss" if number == 0 else None
        axes.plot(curve.steps, curve.values, color=EVAL, linewidth=1.6, marker="o", markersize=4.5, label=label)
    shown = [np.quantile(c.values, [0.005, 0.99]) for c in train] + [c.values for c in held_out]
    shown += [smoothed(c.values) for c in train]
    if shown:
        # One wild batch must not flatten the curve.
        low, high = (float(f(np.concatenate(shown))) for f in (np.min, np.max))
        room = 0.06 * (high - low) or 0.05 * abs(high) or 0.1
        axes.set_ylim(low - room, high + room)


def loss_svg(records: Sequence[Mapping[str, Any]]) -> str:
    """The picture from the records of metrics.jsonl (`step`, `loss`, `eval_loss`, `learning_rate`, `stage`)."""
    # Fixed ids and no date: the same run gives the same bytes. Text stays text, in the reader's own font.
    settings = {"svg.hashsalt": "shikomi", "svg.fonttype": "none", "font.size": 11, "text.color": INK}
    with rc_context(settings):
        figure = Figure(figsize=(9, 3.6), layout="constrained")
        axes = figure.subplots()
        rate = axes.twinx()
        axes.set_zorder(rate.get_zorder() + 1)  # the losses lie over the learning rate
        axes.patch.set_visible(False)
        for number, curve in enumerate(thinned(c) for c in curves(records, "learning_rate")):
            label = "learning rate (right)" if number == 0 else None
            rate.plot(curve.steps, curve.values, color=RATE, linewidth=0.9, linestyle=(0, (5, 3)), label=label)
        _draw_losses(axes, records)
        axes.set_xlabel("step", color=INK)
        axes.set_ylabel("loss", color=INK)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
        axes.margins(x=0.01)
        axes.grid(axis="y", color=GRID, linewidth=0.8)
        rate.set_ylim(bottom=0)
        rate.yaxis.set_major_locator(MaxNLocator(nbins=3))
        rate.ticklabel_format(axis="y", style="sci", scilimits=(-2, 2), useMathText=False)
        rate.yaxis.get_offset_text().set_color(RATE)
        for each, colour in ((axes, INK), (rate, RATE)):
            each.spines[:].set_visible(False)
            each.tick_params(colors=colour, length=0)
        lines = [pair for each in (axes, rate) for pair in zip(*each.get_legend_handles_labels(), strict=True)]
        if lines:
            axes.legend(*zip(*lines, strict=True), frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=3)
        else:
            rate.set_axis_off()
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None}, facecolor="white")
    return out.getvalue()


def inline_svg(svg: str) -> str:
    """The picture as an element of an HTML page: no prolog, no background, colours of the page's theme."""
    body = svg[svg.index("<svg") :]
    for colour, variable in THEMED.items():
        body = body.replace(colour, f"var({variable})")
    # The figure's own background, the one white shape.
    return body.replace("fill: #ffffff", "fill: none").replace("<svg ", '<svg aria-hidden="true" ', 1)
