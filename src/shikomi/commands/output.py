"""How commands speak: results on stdout, everything else on stderr, errors unwrapped with place and fix."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shikomi.errors import BadInput, Problem, ShikomiError, nearest
from shikomi.progress import Progress, make

if TYPE_CHECKING:
    from rich.console import RenderableType

EXIT_CODES = """\b
Exit codes:
  0    good
  1    shikomi doctor has found something that would stop a run
  2    bad input: recipe, data, model or command line; a finished run in the way; nothing was written
  3    the loss is not a finite number; stopped before the update
  75   try again: another process writes there, the disk is full, or memory is short
  130  stopped by Ctrl-C; a training run has finished its step and saved
  143  stopped by SIGTERM; a training run has finished its step and saved
"""


def one_of(*choices: str) -> Callable[[str], str]:
    """A check of an option's value, for typer."""

    def check(value: str) -> str:
        if value not in choices:
            close = nearest(value, choices)
            raise typer.BadParameter(f"{value!r}; choose from {', '.join(choices)}" + (f" ({close}?)" if close else ""))
        return value

    return check


Json = Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line of stdout.")]
Dtype = Annotated[
    str, typer.Option(callback=one_of("auto", "bf16", "fp16", "fp32"), help="Arithmetic: auto, bf16, fp16 or fp32.")
]
Device = Annotated[
    str, typer.Option(callback=one_of("auto", "cpu", "cuda", "mps"), help="Where to compute: auto, cpu, cuda or mps.")
]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub model.")]
TokenEnv = Annotated[str | None, typer.Option(help="Environment variable that holds the hub token; else HF_TOKEN.")]


@contextmanager
def showing(as_json: bool = False) -> Iterator[Progress]:
    """A progress display on stderr that is gone when the block ends, also by an error."""
    progress = make(as_json)
    try:
        yield progress
    finally:
        progress.finish()


def emit(values: Mapping[str, Any]) -> None:
    """One JSON object on one line of stdout."""
    print(json.dumps(values, ensure_ascii=False, default=_plain), flush=True)


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} is not JSON")


def show(renderable: RenderableType) -> None:
    """A rich table on stdout: as wide as the terminal, or 120 columns where there is none."""
    from rich.console import Console

    console = Console(highlight=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console = Console(highlight=False, width=120)
    console.print(renderable)


def print_error(error: ShikomiError, as_json: bool) -> None:
    """Every problem on lines of its own on stderr, never wrapped; with --json also one object on stdout."""
    problems = error.problems if isinstance(error, BadInput) else [Problem(error.message)]
    red, plain = ("\x1b[1;31m", "\x1b[0m") if sys.stderr.isatty() and "NO_COLOR" not in os.environ else ("", "")
    for problem in problems:
        print(f"{red}error:{plain} {_lines(problem)}", file=sys.stderr)
    if len(problems) > 1:
        print(f"{len(problems)} problems", file=sys.stderr)
    if as_json:
        emit({"error": type(error).__name__, "exit_code": error.exit_code, "problems": [vars(p) for p in problems]})


def _lines(problem: Problem) -> str:
    place = problem.file or ""
    if problem.line is not None:
        place = f"{place}:{problem.line}" if place else f"line {problem.line}"
    lines = [f"{place}: {problem.what}" if place else problem.what]
    for title, text in (("found", problem.found), ("allowed", problem.allowed), ("fix", problem.fix)):
        if text is not None:
            lines.append(f"  {title + ':':<9}{text}")
    return "\n".join(lines)


def command_line(*words: str | Path) -> str:
    """A command to copy: quoted for a shell, with paths below the working directory made relative."""
    return shlex.join(["shikomi", *(short_path(word) if isinstance(word, Path) else word for word in words)])


def short_path(path: Path) -> str:
    """The path from the working directory where it is below it."""
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_absolute() and path.is_relative_to(here) else str(path)


def split_list(text: str | None) -> list[str]:
    """`a, b` -> ["a", "b"]; None -> []."""
    return [part.strip() for part in (text or "").split(",") if part.strip()]
