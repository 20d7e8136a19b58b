"""The table of a sweep in words: the same columns and remarks for Markdown, page and terminal."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from shikomi.evaluate.wording import change, change_interval, duration, interval, metric_name, number, size

Write = Callable[[Mapping[str, Any]], str]
DASH = "\u2013"


def columns_of(results: Mapping[str, Any]) -> list[tuple[str, Write]]:
    """(title, cell of a settings row) of every column that some row has."""
    metric, reference = results["metric"], results["reference"]
    score = metric_name(metric) if metric else "score"
    candidates: list[tuple[str, str, Write]] = [
        ("name", "cell", lambda row: row["name"]),
        ("score", f"{score} (95% interval)", _score),
        ("difference", f"against {reference} (95% interval)", lambda row: _difference(row["difference"])),
        ("difference", "could be seen from", lambda row: _smallest(row["difference"])),
        ("label_nll", "label NLL", lambda row: _spread(row["label_nll"], 3)),
        (
            "label_nll_difference",
            f"label NLL against {reference}",
            lambda row: _difference(row["label_nll_difference"]),
        ),
        ("percent_of_full", "of full", lambda row: _or_dash(row["percent_of_full"], lambda v: f"{v:.1f}%")),
        ("trainable_parameters", "trained", lambda row: _mean(row, "trainable_parameters", lambda v: f"{v:,.0f}")),
        ("trained_percent", "of all", lambda row: percent(row["trained_percent"])),
        ("adapter_bytes", "on disk", lambda row: _mean(row, "adapter_bytes", size)),
        ("peak_memory_bytes", "peak memory", lambda row: _mean(row, "peak_memory_bytes", size)),
        ("peak_device_memory_bytes", "GPU memory", lambda row: _mean(row, "peak_device_memory_bytes", size)),
        ("tokens_per_second", "tokens/s", lambda row: _mean(row, "tokens_per_second", lambda v: f"{v:,.0f}")),
        ("training_seconds", "training time", lambda row: _mean(row, "training_seconds", duration)),
        ("final_loss", "final loss", lambda row: _spread(row["final_loss"], 3)),
        ("validation_best", "validation", lambda row: _spread(row["validation_best"], 3)),
        ("learning_rate", "learning rate", lambda row: f"{row['learning_rate']:g}"),
    ]
    rows = results["settings"]
    return [(title, write) for key, title, write in candidates if any(row[key] is not None for row in rows)]


def _or_dash(value: Any, write: Callable[[Any], str]) -> str:
    return DASH if value is None else write(value)


def _mean(row: Mapping[str, Any], key: str, write: Callable[[float], str]) -> str:
    return _or_dash(row[key], lambda stat: write(stat["mean"]))


def _spread(stat: Mapping[str, Any] | None, digits: int) -> str:
    """1.234 or, over seeds, 1.234 +- 0.012."""
    if stat is None:
        return DASH
    more = "" if stat["spread"] is None else f" \u00b1 {stat['spread']:.{digits}f}"
    return f"{stat['mean']:.{digits}f}{more}"


def percent(value: float | None) -> str:
    """A share in percent with two digits that count: 0.34%, 100%."""
    if value is None:
        return DASH
    return f"{value:.3g}%" if value >= 0.1 else f"{value:.2g}%"


def score_text(score: Mapping[str, Any]) -> str:
    """61.2%, and over seeds 61.2% +- 1.1."""
    text = number(score["mean"], score["unit"])
    if score["spread"] is not None:
        scaled = 100 * score["spread"] if score["unit"] == "share" else score["spread"]
        text += f" \u00b1 {scaled:.{1 if score['unit'] in ('share', 'points') else 3}f}"
    return text


def _score(row: Mapping[str, Any]) -> str:
    if row["score"] is None:
        return "failed" if row["failed"] else DASH
    return f"{score_text(row['score'])}{_bounds(row['score'])}"


def _bounds(score: Mapping[str, Any]) -> str:
    return f" ({interval(score)})" if score["ci95"] else ""


def _difference(gap: Mapping[str, Any] | None) -> str:
    return (
        DASH if gap is None else f"{change(gap['value'], gap['unit'])} ({change_interval(gap).removesuffix(' points')})"
    )


def _smallest(gap: Mapping[str, Any] | None) -> str:
    return DASH if gap is None else change(gap["smallest"], gap["unit"]).removeprefix("+")


def verdict_line(results: Mapping[str, Any]) -> str:
    """Which cells differ from the reference, by the intervals of the paired differences."""
    compared = [row for row in results["settings"] if row["difference"]]
    if not compared:
        return (
            "No cell is compared with another yet: that takes two finished cells with outcomes on the same test rows."
        )
    better, worse = [], []
    for row in compared:
        gap = row["difference"]
        low, high = gap["ci95"] if gap["higher_is_better"] else [-bound for bound in reversed(gap["ci95"])]
        if low > 0:
            better.append(row["name"])
        elif high < 0:
            worse.append(row["name"])
    said = [f"better than {results['reference']}: {', '.join(better)}"] if better else []
    said += [f"worse than {results['reference']}: {', '.join(worse)}"] if worse else []
    unclear = len(compared) - len(better) - len(worse)
    if unclear:
        said.append(f"no difference that these rows show: {unclear} of {len(compared)} cells")
    text = "; ".join(said)
    return f"{text[:1].upper()}{text[1:]}."


def baseline_lines(results: Mapping[str, Any]) -> list[str]:
    """One line for each score of the untouched model."""
    metric, found = results["metric"], []
    for name, system in results["baselines"].items():
        if metric in system["metrics"]:
            m = system["metrics"][metric]
            found.append(
                f"untouched model, {name}: {metric_name(metric)} {number(m['value'], m['unit'])} ({interval(m)})"
            )
    return found


def remarks(results: Mapping[str, Any]) -> list[str]:
    """How to read the table, and what is missing in it."""
    said = []
    gaps = [row["difference"] for row in results["settings"] if row["difference"]]
    if gaps:
        unit = gaps[0]["unit"]
        ends = [change(f(gap["smallest"] for gap in gaps), unit).removeprefix("+") for f in (min, max)]
        span = ends[0] if ends[0] == ends[1] else f"{ends[0].removesuffix(' points')} to {ends[1]}"
        said.append(
            f"Differences are paired on the same {gaps[0]['n']:,} test rows. The smallest that could be seen with so "
            f"many rows (95% interval, found in 80 of 100 repetitions): {span}, by cell."
        )
        if len(gaps) > 1:
            said.append(
                f"{len(gaps)} cells are compared with {results['reference']}: of so many intervals, one in twenty "
                "leaves out zero by chance."
            )
    seeds = max((len(row["seeds"]) for row in results["settings"]), default=0)
    if seeds > 1:
        said.append(
            f"Mean \u00b1 standard deviation over {seeds} seeds; intervals are over test rows, each with "
            "the answers of all seeds."
        )
    for cell in results["cells"]:
        if cell["status"] == "failed":
            said.append(f"{cell['name']} failed, {cell['error']['kind']}: {cell['error']['message']}")
    waiting = [cell["name"] for cell in results["cells"] if cell["status"] in ("waiting", "stopped")]
    if waiting:
        said.append(f"Not finished: {', '.join(waiting)}.")
    return [*said, *results["notes"]]


def cell_lines(results: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """(name, seed, status, score or error) of every cell."""
    lines = []
    for cell in results["cells"]:
        score = cell["score"]
        came = number(score["value"], score["unit"]) if score else ""
        if cell["error"]:
            came = f"{cell['error']['kind']}: {cell['error']['message']}"
        lines.append((cell["name"], str(cell["seed"]), cell["status"], came))
    return lines


def terminal(results: Mapping[str, Any]) -> RenderableType:
    """The table for a terminal, narrower than that of the files, with the remarks below it."""
    table = Table(box=box.SIMPLE_HEAD, title=results["name"], title_justify="left", title_style="bold")
    shown = _terminal_columns(results)
    for number_, (title, _) in enumerate(shown):
        first = number_ == 0
        table.add_column(title, justify="left" if first else "right", overflow="fold", no_wrap=not first)
    for row in results["settings"]:
        style = "bold" if row["name"] == results["reference"] else None
        # Text, not str: brackets in a name are no markup.
        table.add_row(*(Text(write(row)) for _, write in shown), style=style)
    lines = [verdict_line(results), *baseline_lines(results), *remarks(results)]
    return Group(table, *(Text(line) for line in lines))


def _terminal_columns(results: Mapping[str, Any]) -> list[tuple[str, Write]]:
    """What 120 columns have room for: intervals below their values, counts in short."""
    score = metric_name(results["metric"]) if results["metric"] else "final loss"
    shown: list[tuple[str, Write]] = [
        ("cell", lambda row: row["name"]),
        ("trained", lambda row: _mean(row, "trainable_parameters", count)),
        ("of all", lambda row: percent(row["trained_percent"])),
        ("on disk", lambda row: _mean(row, "adapter_bytes", size)),
        ("memory", lambda row: _mean(row, "peak_memory_bytes", size)),
        ("tokens/s", lambda row: _mean(row, "tokens_per_second", lambda v: f"{v:,.0f}")),
        (
            f"{score}\n(95%)",
            lambda row: _two_lines(_score(row) if results["metric"] else _spread(row["final_loss"], 3)),
        ),
    ]
    if any(row["label_nll"] for row in results["settings"]):
        shown.append(("label\nNLL", lambda row: _mean(row, "label_nll", lambda v: f"{v:.3f}")))
    if any(row["difference"] for row in results["settings"]):
        shown.append((f"against\n{results['reference']}", lambda row: _two_lines(_difference(row["difference"]))))
    return shown


def count(value: float) -> str:
    """921,600 as 922 k; 134,515,008 as 135 M."""
    for unit, scale in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= scale:
            return f"{value / scale:.3g} {unit}"
    return f"{value:.0f}"


def _two_lines(text: str) -> str:
    """The interval below its value."""
    return text.replace(" (", "\n(")


def planned_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """The cells of a sweep that was not run: name, overrides, parameters, steps."""
    table = Table(box=box.SIMPLE_HEAD)
    for title in ("cell", "changes", "trained", "of all", "learning rate", "steps"):
        table.add_column(title, justify="left" if title in ("cell", "changes") else "right", overflow="fold")
    for row in rows:
        share = 100 * row["trainable_parameters"] / row["total_parameters"]
        changes = " ".join(row["overrides"])
        numbers = (f"{row['trainable_parameters']:,}", percent(share), f"{row['learning_rate']:g}", f"{row['steps']:,}")
        table.add_row(Text(row["name"]), Text(changes), *numbers)
    return table
