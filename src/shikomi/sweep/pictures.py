"""Two pictures of a sweep as SVG: the score against what is trained, and against memory; labels do not overlap."""

import io
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

from shikomi.evaluate.loss_picture import EVAL, GRID, INK, TRAIN, inline_svg
from shikomi.evaluate.wording import metric_name
from shikomi.sweep.table import count

Box = tuple[float, float, float, float]
"""Left, bottom, right, top, in pixels."""

_MARK = 5.0  # pixels around a point that no label covers
_ROOM = 2.0  # pixels between labels


def score_svg(results: Mapping[str, Any], key: str, salt: str) -> str:
    """The picture of `key` (trainable_parameters or peak_memory_bytes) against the score, or an empty text.

    A point is a setting's mean over its seeds with the score's 95% interval; the line is the best baseline.
    """
    rows = [row for row in results["settings"] if row["score"] and row[key]]
    if not rows:
        return ""
    unit = rows[0]["score"]["unit"]
    scale = 100 if unit == "share" else 1
    # Fixed ids and no date: the same results give the same bytes. Text stays text, in the reader's own font.
    settings = {"svg.hashsalt": f"shikomi {salt}", "svg.fonttype": "none", "font.size": 11, "text.color": INK}
    with rc_context(settings):
        figure = Figure(figsize=(9, 5.2), layout="constrained")
        canvas = FigureCanvasAgg(figure)
        axes = figure.subplots()
        xs = [row[key]["mean"] / (1 if key == "trainable_parameters" else 1e6) for row in rows]
        ys = [row["score"]["mean"] * scale for row in rows]
        bounds = [row["score"]["ci95"] or [row["score"]["mean"]] * 2 for row in rows]
        for x, y, (low, high), row in zip(xs, ys, bounds, rows, strict=True):
            colour = EVAL if row["name"] == results["reference"] else TRAIN
            axes.plot([x, x], [low * scale, high * scale], color=colour, alpha=0.35, linewidth=2)
            axes.plot([x], [y], color=colour, marker="o", markersize=7, linestyle="")
        _baseline(axes, results, scale)
        axes.set_ylabel(f"{metric_name(results['metric'])}{', %' if unit == 'share' else ''}", color=INK)
        if key == "trainable_parameters":
            _log_axis(axes, xs)
            axes.set_xlabel("trained parameters", color=INK)
        else:
            axes.set_xlabel("peak memory, MB", color=INK)
            axes.xaxis.set_major_locator(MaxNLocator(nbins=8))
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        axes.margins(x=0.12, y=0.12)
        axes.grid(color=GRID, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[:].set_visible(False)
        axes.tick_params(colors=INK, length=0)
        canvas.draw()  # places the axes, so that points and texts have pixels
        _labels(axes, canvas, [row["name"] for row in rows], xs, ys, [(a * scale, b * scale) for a, b in bounds])
        figure.set_layout_engine("none")  # the labels were placed for these axes
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None}, facecolor="white")
    return out.getvalue()


def _baseline(axes: Axes, results: Mapping[str, Any], scale: float) -> None:
    """A dashed line at the best score of the untouched model."""
    measured = {
        name: system["metrics"][results["metric"]]
        for name, system in results["baselines"].items()
        if results["metric"] in system["metrics"]
    }
    if measured:
        best = (max if next(iter(measured.values()))["higher_is_better"] else min)(
            measured, key=lambda name: measured[name]["value"]
        )
        dashes = (0, (5, 3))
        line = axes.axhline(measured[best]["value"] * scale, color=INK, linewidth=1.2, linestyle=dashes)
        axes.legend([line], [f"untouched model, {best}"], loc="lower left", bbox_to_anchor=(0, 1), frameon=False)


def _log_axis(axes: Axes, xs: Sequence[float]) -> None:
    axes.set_xscale("log")
    if max(xs) < 4 * min(xs):  # a decade may have no mark within
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: count(value)))


def _labels(
    axes: Axes,
    canvas: FigureCanvasAgg,
    names: Sequence[str],
    xs: Sequence[float],
    ys: Sequence[float],
    bounds: Sequence[tuple[float, float]],
) -> None:
    """Names beside the points, with a thin line to a point that is not next to its name."""
    renderer = canvas.get_renderer()
    texts = [
        axes.text(x, y, name, fontsize=10, color=INK, va="bottom") for name, x, y in zip(names, xs, ys, strict=True)
    ]
    sizes = [(box.width, box.height) for box in (text.get_window_extent(renderer) for text in texts)]
    points = [tuple(axes.transData.transform((x, y))) for x, y in zip(xs, ys, strict=True)]
    bars = []
    for x, (low, high) in zip(xs, bounds, strict=True):
        (left, bottom), (right, top) = axes.transData.transform([(x, low), (x, high)])
        bars.append((left - 1, bottom, right + 1, top))
    frame = axes.get_window_extent(renderer)
    places = place_labels(points, sizes, (frame.x0, frame.y0, frame.x1, frame.y1), bars)
    back = axes.transData.inverted()
    for text, (px, py), (left, bottom), (width, height) in zip(texts, points, places, sizes, strict=True):
        text.set_position(tuple(back.transform((left, bottom))))
        near = (min(max(px, left), left + width), min(max(py, bottom), bottom + height))
        if math.dist(near, (px, py)) > 2 * _MARK:
            ends = back.transform([near, (px, py)])
            axes.plot(ends[:, 0], ends[:, 1], color=INK, linewidth=0.6, alpha=0.6, scalex=False, scaley=False)


def place_labels(
    points: Sequence[tuple[float, float]],
    sizes: Sequence[tuple[float, float]],
    frame: Box,
    bars: Sequence[Box] = (),
) -> list[tuple[float, float]]:
    """Lower left corners of labels (pixels): near their points, within the frame, over no point, bar or other label.

    Greedy from the left, each label at the nearest free of ever wider circles of places. Where the frame is full, a
    label stands below it, each in a line of its own.
    """
    taken: list[Box] = [*bars, *((x - _MARK, y - _MARK, x + _MARK, y + _MARK) for x, y in points)]
    corners: list[tuple[float, float]] = [(0.0, 0.0)] * len(points)
    for i in sorted(range(len(points)), key=lambda i: points[i]):
        (x, y), (width, height) = points[i], sizes[i]
        for corner in _candidates(x, y, width, height, frame):
            box = (corner[0] - _ROOM, corner[1] - _ROOM, corner[0] + width + _ROOM, corner[1] + height + _ROOM)
            within = box[0] >= frame[0] and box[1] >= frame[1] and box[2] <= frame[2] and box[3] <= frame[3]
            if within and not any(overlap(box, other) for other in taken):
                break
        else:
            lowest = min([frame[1], *(other[1] for other in taken)])
            corner = (frame[0], lowest - height - 2 * _ROOM)
            box = (corner[0], corner[1] - _ROOM, corner[0] + width, corner[1] + height + _ROOM)
        corners[i] = corner
        taken.append(box)
    return corners


def _candidates(x: float, y: float, width: float, height: float, frame: Box) -> Iterator[tuple[float, float]]:
    """Corners for a label around a point: right, left, above and below first, then wider circles."""
    farthest = math.hypot(frame[2] - frame[0], frame[3] - frame[1])
    distance = _MARK + 2 * _ROOM
    while distance < farthest:
        for turn in (0, 8, 4, 12, 2, 6, 14, 10, 1, 7, 15, 9, 3, 5, 11, 13):
            dx, dy = math.cos(turn * math.pi / 8), math.sin(turn * math.pi / 8)
            # The label's middle lies so far out that its nearest edge is `distance` from the point.
            yield x + dx * (distance + width / 2) - width / 2, y + dy * (distance + height / 2) - height / 2
        distance += height / 2


def overlap(a: Box, b: Box) -> bool:
    """Whether two boxes have a common inside."""
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def for_page(svg: str, prefix: str) -> str:
    """A picture as an element of a page that has another: ids of its own, colours of the page's theme."""
    for before in ('id="', "url(#", 'href="#'):
        svg = svg.replace(before, f"{before}{prefix}-")
    return inline_svg(svg)
