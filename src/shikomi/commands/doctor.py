"""doctor: whether this machine and installation can train, line by line, with what puts each thing right."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from shikomi.commands.output import Json, emit, showing

if TYPE_CHECKING:
    from shikomi.doctor.checks import Line, Status

EXIT_BROKEN = 1
"""Something that a run needs does not work."""

DOCTOR = """Look at this machine and installation: versions, processor, GPU, memory, disks, and a tiny model trained.

Every line is OK, WARN or FAIL, with the command that puts it right. Exit code 1 where something would stop a run.

\b
Examples:
  shikomi doctor
  shikomi doctor --output-dir runs --quick
"""


def doctor(
    output_dir: Annotated[Path, typer.Option(help="Where runs will be written: its disk is looked at.")] = Path("runs"),
    quick: Annotated[bool, typer.Option("--quick", help="Half a second of training instead of five.")] = False,
    as_json: Json = False,
) -> None:
    """Nothing is written and nothing is fetched."""
    from shikomi.doctor.checks import counts
    from shikomi.doctor.examine import examine

    with showing(as_json) as progress:
        lines = examine(output_dir, quick, progress)
    counted = counts(lines)
    code = EXIT_BROKEN if counted["FAIL"] else 0
    if as_json:
        emit({"checks": [vars(line) for line in lines], "counts": counted, "exit_code": code})
    else:
        print_lines(lines, counted)
    if code:
        raise typer.Exit(code)


def print_lines(lines: list[Line], counted: dict[Status, int]) -> None:
    """One line a check, its fix below; then the count."""
    coloured = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    colours = {"OK": "\x1b[32m", "WARN": "\x1b[33m", "FAIL": "\x1b[1;31m"}
    width = max(len(line.name) for line in lines)
    for line in lines:
        status = f"{colours[line.status]}{line.status:<4}\x1b[0m" if coloured else f"{line.status:<4}"
        print(f"{status}  {line.name:<{width}}  {line.says}")
        if line.fix is not None:
            print(f"{'':<{width + 8}}fix: {line.fix}")
    print(", ".join(f"{count} {status}" for status, count in counted.items()))
