"""sweep: a grid of runs on the same data, and one table of them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from shikomi.commands.output import EXIT_CODES, Json, command_line, emit, short_path, show, showing
from shikomi.errors import BadInput, Problem, Stopped, TryAgain

_EXIT_CODES = EXIT_CODES.replace(
    "  2 ", "  1    some cells failed; the others are finished and the results written\n  2 ", 1
)

SWEEP = f"""Run a grid of settings on the same rows, order and budget, and compare them on the same test rows.

Every cell is an ordinary run, in a folder and in a process of its own, so that its peak memory is its own. Run the
same command again to go on: finished cells are read, an interrupted one is resumed, a failed one is tried again.
Keys and values are those of the recipe; what differs between the methods goes into a sweep file (--methods):

\b
  methods:
    full:       {{adapter: full, learning_rate: 2e-5}}
    lora-qv-r2: {{adapter: {{name: lora, r: 2, target_modules: [q_proj, v_proj]}}}}
  grid: {{learning_rate: [1e-4, 3e-4]}}
  seeds: [0, 1, 2]

\b
Examples:
  shikomi sweep my.yaml --grid adapter=full,lora,dora --grid learning_rate=1e-4,3e-4
  shikomi sweep my.yaml --grid 'adapter.target_modules=[q_proj,v_proj],all-linear' --seeds 0,1,2
  shikomi sweep recipes/sections-lora.yaml --methods recipes/sweeps/methods.yaml --dry-run
  shikomi sweep my.yaml num_train_epochs=1 --grid adapter.r=2,8,32 -o runs/ranks

{_EXIT_CODES}
The folder of the sweep gets sweep.json, sweep.csv, table.md and sweep.html, anew after every cell.
"""


def sweep(
    recipe: Annotated[Path, typer.Argument(help="The recipe that all cells start from.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Keys of the recipe to change in all cells.")
    ] = None,
    grid: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE,VALUE", help="A key and its values; may be repeated.")
    ] = None,
    seeds: Annotated[str | None, typer.Option(help="Seeds to run every setting with: 0,1,2.")] = None,
    methods: Annotated[Path | None, typer.Option(help="A sweep file: methods, grid, seeds, reference.")] = None,
    reference: Annotated[
        str | None, typer.Option(help="The setting that the others are compared with; else the first.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output-dir", "-o", help="Folder of the sweep; else runs/sweep-RECIPE.")
    ] = None,
    keep: Annotated[
        int | None, typer.Option(min=0, help="Checkpoints left of each finished cell; else as the recipe says.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check and list the cells; run and write nothing.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Reads the grid and all recipes before importing torch, so that a wrong one is told at once."""
    wrong = [word for word in overrides or () if "=" not in word]
    if wrong:
        raise BadInput([Problem("not a key=value", found=word, allowed="key=value") for word in wrong])
    with showing(as_json) as progress:
        progress.phase(f"reading {short_path(recipe)}")
        from shikomi.sweep.cells import make_sweep
        from shikomi.sweep.grid import read_grid

        folder = (output or Path("runs") / f"sweep-{recipe.stem}").absolute()
        plan = make_sweep(recipe, overrides or (), read_grid(grid or (), seeds, methods, reference), folder)
        for note in plan.notes:
            progress.note(note)
        progress.phase("importing torch")
        from shikomi.sweep.check import check_sweep

        checked = check_sweep(plan, progress)
        if dry_run:
            rows = [
                {
                    "name": setting.name,
                    "overrides": setting.as_overrides(),
                    "learning_rate": plan.of(setting.name)[0].recipe.stages[-1].learning_rate,
                    "cells": [cell.name for cell in plan.of(setting.name)],
                    **vars(checked.planned[setting.name]),
                }
                for setting in plan.settings
            ]
            progress.finish()
            _show_plan(folder, rows, len(plan.cells), as_json)
            return
        from shikomi.sweep.engine import run_sweep

        try:
            results = run_sweep(plan, checked, progress, keep=keep)
        except (Stopped, TryAgain) as error:
            error.message += f"\n  go on:   {_again(recipe, overrides, grid, seeds, methods, reference, output, keep)}"
            raise
    _show_results(folder, results, as_json)
    if any(cell["status"] == "failed" for cell in results["cells"]):
        raise typer.Exit(1)


def _show_plan(folder: Path, rows: list[dict[str, Any]], cells: int, as_json: bool) -> None:
    if as_json:
        emit({"output_dir": folder, "cells": cells, "settings": rows})
        return
    from shikomi.sweep.table import planned_table

    show(planned_table(rows))
    seeds = "" if cells == len(rows) else f", {cells // len(rows)} seeds each: {cells} runs"
    print(
        f"{len(rows)} settings{seeds}; nothing was written; to run them into {short_path(folder)}, leave --dry-run out"
    )


def _show_results(folder: Path, results: dict[str, Any], as_json: bool) -> None:
    if as_json:
        emit({"output_dir": folder, **results})
        return
    from shikomi.sweep.table import terminal

    show(terminal(results))
    print(f"page:     {short_path(folder / 'sweep.html')}")
    print(f"table:    {short_path(folder / 'table.md')}")


def _again(
    recipe: Path,
    overrides: list[str] | None,
    grid: list[str] | None,
    seeds: str | None,
    methods: Path | None,
    reference: str | None,
    output: Path | None,
    keep: int | None,
) -> str:
    """The command line that goes on: the same one."""
    words: list[str | Path] = ["sweep", recipe, *(overrides or ())]
    for axis in grid or ():
        words += ["--grid", axis]
    for option, value in (("--seeds", seeds), ("--methods", methods), ("--reference", reference)):
        words += [option, value] if value is not None else []
    words += ["--output-dir", output] if output is not None else []
    words += ["--keep", str(keep)] if keep is not None else []
    return command_line(*words)
