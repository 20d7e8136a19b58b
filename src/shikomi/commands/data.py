"""The commands of `shikomi data`."""

from __future__ import annotations

import typer

from shikomi.commands import data_check, data_tools, making_pairs

DATA = """Look at data before it is trained on.

\b
Examples:
  shikomi data check my.jsonl
  shikomi data check my.yaml --html check.html
"""

app = typer.Typer(help=DATA, rich_markup_mode=None, no_args_is_help=True)


@app.callback()
def data() -> None:
    """A group of commands."""


for name, command, about, in_short in (
    ("check", data_check.check, data_check.CHECK, "Every problem of the rows, with line and fix."),
    ("preview", data_tools.preview, data_tools.PREVIEW, "Rows as the trainer sees them."),
    ("convert", data_tools.convert, data_tools.CONVERT, "Rows of one format or file as another."),
    ("split", data_tools.split, data_tools.SPLIT, "Train, validation and test files without leaks."),
    ("pairs", making_pairs.pairs, making_pairs.PAIRS, "Pairs of answers that a model samples."),
):
    app.command(name, help=about, short_help=in_short)(command)
