"""sweep.json, sweep.csv, table.md and sweep.html, each replaced in one rename."""

import csv
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from markupsafe import Markup

from shikomi.checkpoint.files import replace_file, replace_json, saving
from shikomi.evaluate.page import render_page
from shikomi.sweep.check import RECORD
from shikomi.sweep.collect import MEASURED
from shikomi.sweep.page import MORE_STYLE, PAGE
from shikomi.sweep.pictures import for_page, score_svg
from shikomi.sweep.table import baseline_lines, cell_lines, columns_of, remarks, verdict_line

PICTURES = (("trainable_parameters", "parameters"), ("peak_memory_bytes", "memory"))
CSV = ("name", "setting", "seed", "status", "learning_rate", *MEASURED, "metric")


def write_results(folder: Path, results: Mapping[str, Any]) -> None:
    """Everything a sweep says of itself, into its folder. Raises TryAgain for a full disk."""
    with saving("the sweep's results", folder):
        replace_json(folder / RECORD, results)
        replace_file(folder / "sweep.csv", as_csv(results).encode())
        replace_file(folder / "table.md", as_markdown(results).encode())
        replace_file(folder / "sweep.html", as_page(results).encode())


def as_csv(results: Mapping[str, Any]) -> str:
    """One line per cell, with the numbers as they were measured."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([*CSV, "score", "score_low", "score_high", "test_rows", "label_nll", "error"])
    for cell in results["cells"]:
        score = cell["score"] or {"value": None, "ci95": [None, None], "n": None}
        error = cell["error"] and f"{cell['error']['kind']}: {cell['error']['message']}"
        own = [score["value"], *score["ci95"], score["n"], cell["label_nll"], error]
        writer.writerow([*(cell[key] for key in CSV), *own])
    return out.getvalue()


def as_markdown(results: Mapping[str, Any]) -> str:
    """The table over settings in Markdown, with what is to be said of it."""
    columns = columns_of(results)
    lines = [f"# {_md(results['name'])}", ""]
    lines += [f"| {' | '.join(title for title, _ in columns)} |", f"|{'|'.join('---' for _ in columns)}|"]
    lines += [f"| {' | '.join(_md(write(row)) for _, write in columns)} |" for row in results["settings"]]
    said = [verdict_line(results), *baseline_lines(results), *remarks(results)]
    return "\n".join([*lines, "", *(f"- {_md(line)}" for line in said if line)]) + "\n"


def _md(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def as_page(results: Mapping[str, Any]) -> str:
    """The page: table, pictures, cells; it holds everything it shows."""
    columns = columns_of(results)
    pictures = []
    for key, name in PICTURES:
        svg = score_svg(results, key, name)
        if svg:
            pictures.append({"svg": Markup(for_page(svg, name)), "title": PICTURE_TITLES[name]})
    done = sum(cell["status"] == "finished" for cell in results["cells"])
    return render_page(
        f"{results['name']}: sweep",
        PAGE,
        MORE_STYLE,
        kind="Sweep",
        heading=results["name"],
        subtitle=f"{done} of {len(results['cells'])} cells finished",
        verdict=verdict_line(results),
        titles=[title for title, _ in columns],
        rows=[
            {
                "name": row["name"],
                "reference": row["name"] == results["reference"],
                "cells": [w(row) for _, w in columns[1:]],
            }
            for row in results["settings"]
        ],
        baselines=baseline_lines(results),
        remarks=remarks(results),
        pictures=pictures,
        cells=cell_lines(results),
        overrides=[(row["name"], row["overrides"]) for row in results["settings"]],
    )


PICTURE_TITLES = {
    "parameters": "Score against trained parameters. Bars are 95% intervals; the reference is in the other colour.",
    "memory": "Score against peak memory of the whole process.",
}
