"""The comparison on a terminal: baselines against trained with intervals, and answers side by side."""

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from shikomi.evaluate.wording import (
    change,
    change_interval,
    duration,
    interval,
    metric_name,
    number,
    verdict,
)

_COLOURS = {"better": "green", "worse": "red", "unclear": "yellow"}


def evaluation_table(systems: Mapping[str, Mapping[str, Any]], title: str | None = None) -> Table:
    """One row per system ({name: {n, seconds, metrics}}), one column per metric with its 95% interval below."""
    names = list(dict.fromkeys(name for system in systems.values() for name in system["metrics"]))
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", title_style="bold")
    table.add_column("")
    for name in names:
        table.add_column(metric_name(name), justify="right", no_wrap=True)
    table.add_column("time", justify="right", no_wrap=True)
    for label, system in systems.items():
        cells: list[Text] = []
        for name in names:
            measured = system["metrics"].get(name)
            if measured is None:
                cells.append(Text("-", style="dim"))
                continue
            cell = Text(number(measured["value"], measured["unit"]), style="bold")
            cells.append(cell.append(f"  {interval(measured)}", style="not bold dim"))
        table.add_row(label, *cells, duration(system["seconds"]), style="bold" if label == "trained" else None)
    return table


def comparison(evaluation: Mapping[str, Any]) -> RenderableType:
    """An `evaluation` of result.json: the table, the difference on every metric, and the verdict."""
    systems = {**evaluation["baseline"], "trained": evaluation["trained"]}
    title = f"On the same {evaluation['n']:,} rows (95% intervals)"
    parts: list[RenderableType] = [evaluation_table(systems, title)]
    difference = evaluation.get("difference")
    if difference:
        for name, gap in difference["metrics"].items():
            line = f"  trained against {difference['against']}, {metric_name(name)}: "
            line += f"{change(gap['value'], gap['unit'])} ({change_interval(gap)})"
            parts.append(Text(line))
    said = verdict(evaluation)
    if said:
        parts.append(Text(f"\n{said.headline}", style=f"bold {_COLOURS[said.outcome]}"))
        parts.append(Text(said.detail))
    for note in evaluation["notes"]:
        parts.append(Text(f"note: {note}", style="dim"))
    return Group(*parts)


def examples(evaluation: Mapping[str, Any], longest: int = 160) -> RenderableType:
    """The examples of an `evaluation` side by side, without the beginning that all inputs share.

    Texts are cut to `longest` characters.
    """
    table = Table(box=box.SIMPLE_HEAD, show_lines=True, expand=True)
    table.add_column("input", ratio=3, overflow="fold")
    table.add_column("reference", ratio=1, min_width=11, overflow="fold")
    table.add_column(evaluation["examples_base"] or "base", ratio=1, min_width=11, overflow="fold")
    table.add_column("trained", ratio=1, min_width=11, overflow="fold")
    for example in evaluation["examples"]:
        answers = [
            Text(shorten(example[side], longest), style="green" if example[side] == example["reference"] else "")
            for side in ("base", "trained")
        ]
        # Text, not str: brackets in the data are no markup.
        own = example["input"].removeprefix(evaluation["examples_common"])
        table.add_row(Text(shorten(own, longest)), Text(shorten(example["reference"], longest)), *answers)
    return table


def shorten(text: str, longest: int) -> str:
    """Text on one line, its middle left out where it is longer than `longest` characters."""
    line = " ".join(text.split())
    if len(line) <= longest:
        return line
    tail = longest // 4
    return f"{line[: longest - tail - 3]} \u2026 {line[-tail:]}"
