"""init: a recipe for a data file; recipe: what every key means."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from shikomi.commands.components import as_objects, print_keys
from shikomi.commands.output import Json, command_line, emit, short_path, showing
from shikomi.errors import BadInput, Problem
from shikomi.progress import Progress

if TYPE_CHECKING:
    from shikomi.advise.starter import Starter

INIT = """Write a recipe for your data file: the format it found, a proposed prompt, and the reason for each default.

Look at the prompt it proposes before training. Nothing is written over without --force.

\b
Examples:
  shikomi init my.csv
  shikomi init my.jsonl -o recipes/my.yaml --model smollm2
"""
REFERENCE = """What every key of a recipe means, with its type and default.

\b
Examples:
  shikomi recipe
  shikomi recipe learning_rate
  shikomi recipe --schema > recipe.schema.json
"""


def init(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Training rows: jsonl, json, csv, parquet or txt.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The recipe; absent: FILE's name with .yaml.")
    ] = None,
    model: Annotated[str, typer.Option(help="Alias, folder, hub id or .gguf file.")] = "smollm2",
    force: Annotated[bool, typer.Option(help="Write over an existing recipe.")] = False,
    as_json: Json = False,
) -> None:
    """Prints what was found on stderr and where the recipe is on stdout."""
    target = output or Path(f"{file.name.partition('.')[0]}.yaml")
    if target.exists() and not force:
        raise BadInput([Problem("is there already", str(target), fix="choose another --output, or add --force")])
    with showing(as_json) as progress:
        made = make_starter(file, model, progress)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(made.text, encoding="utf-8")
    if as_json:
        found = made.detected
        emit({"recipe": target, "format": found.format, "rows": found.rows, "tokens": made.tokens,
              "prompt": found.prompt, "completion": found.completion, "labels": found.labels,
              "estimate": made.estimate})  # fmt: skip
        return
    print(made.text)
    print(f"written to {short_path(target)}; look at the prompt, then:")
    print(f"  {command_line('train', target, '--dry-run')}")
    print(f"  {command_line('train', target)}")


def make_starter(file: Path, model: str, progress: Progress) -> Starter:
    """The recipe that `init` writes and `train --data` uses, with the time measured on this machine."""
    progress.phase(f"reading {short_path(file)}")
    from shikomi.advise.starter import starter

    progress.phase("importing torch, to estimate the time")
    from shikomi.plan.speed import known_parameters, product_rate, training_seconds

    parameters = known_parameters(model)
    if parameters is None:
        return starter(file, model)
    rate = product_rate()
    return starter(file, model, lambda tokens: training_seconds(tokens, parameters, rate))


def reference(
    key: Annotated[str | None, typer.Argument(help="Only keys with this in their name.")] = None,
    schema: Annotated[bool, typer.Option("--schema", help="The JSON Schema, for an editor.")] = False,
    as_json: Json = False,
) -> None:
    """Read from the schema; imports no component."""
    from shikomi.recipe import json_schema
    from shikomi.recipe import reference as keys

    if schema:
        emit(json_schema())
        return
    rows = [row for row in keys() if key is None or key in row[0]]
    if not rows:
        raise BadInput([Problem("no such key in a recipe", found=key, fix="`shikomi recipe` shows all of them")])
    if as_json:
        emit({"keys": as_objects(rows)})
        return
    print_keys(rows)
