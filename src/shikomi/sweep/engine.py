"""Runs the cells one after the other: the finished are read, the interrupted go on, what fails is recorded."""

import time
from collections.abc import Callable
from typing import Any

from shikomi.checkpoint.lock import RunLock
from shikomi.checkpoint.rundir import RunDir
from shikomi.checkpoint.runs import gc
from shikomi.errors import BadInput, Stopped
from shikomi.progress import Progress
from shikomi.recipe import Recipe
from shikomi.sweep.cells import Cell, Sweep
from shikomi.sweep.check import Checked, check_folder, read_record
from shikomi.sweep.collect import cell_row, collect
from shikomi.sweep.grid import as_text
from shikomi.sweep.numbered import Numbered
from shikomi.sweep.runner import CellFailed, Runner, run_in_child
from shikomi.sweep.write import write_results

UNTOUCHED = (
    *("model", "model_revision", "quant", "data", "chat", "chat_template", "new_tokens", "max_length", "dtype"),
    *("device", "evaluate"),
)
"""Recipe keys that say what the untouched model is and how it is scored."""


def run_sweep(
    sweep: Sweep,
    checked: Checked,
    progress: Progress,
    runner: Runner = run_in_child,
    keep: int | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> dict[str, Any]:
    """Brings every cell to its end and returns the results as sweep.json holds them; written anew after each cell.

    `keep`: checkpoints left of a finished cell, the newest; None: as the recipe says. Raises BadInput where the folder
    is of another sweep, TryAgain where another process writes it, Stopped after a signal: run it again to go on.
    """
    with RunLock(sweep.folder):
        problems = check_folder(sweep, checked.data)
        if problems:
            raise BadInput(problems)
        before = read_record(sweep.folder)
        data = {**before.get("data", {}), **checked.data}
        failures: dict[str, dict[str, str]] = {}
        _say_what_is_there(sweep, before, progress)
        results = _write(sweep, failures, data)
        todo = [cell for cell in sweep.cells if not RunDir(cell.folder).is_finished()]
        taken: list[float] = []
        said: set[str] = set()
        for cell in todo:
            started = clock()
            title = f"cell {sweep.cells.index(cell) + 1} of {len(sweep.cells)}, {cell.name}"
            shown = Numbered(progress, title, _left(len(todo) - len(taken), taken), said)
            try:
                runner(_recipe_to_run(cell, sweep), shown)
            except CellFailed as failed:
                failures[cell.name] = {"kind": failed.kind, "message": failed.message, "output": failed.output}
            except Stopped as stopped:
                _write(sweep, failures, data)
                raise Stopped(f"cell {cell.name}: {stopped.message}", stopped.exit_code) from None
            if keep is not None:
                gc(cell.folder, keep)
            taken.append(clock() - started)
            results = _write(sweep, failures, data)
            shown.ended(cell_row(cell, failures), taken[-1], _left(len(todo) - len(taken), taken))
        return results


def _say_what_is_there(sweep: Sweep, before: dict[str, Any], progress: Progress) -> None:
    done = sum(RunDir(cell.folder).is_finished() for cell in sweep.cells)
    if done:
        progress.note(f"{done} of {len(sweep.cells)} cells are finished already and are not run again")
    names = {cell.name for cell in sweep.cells}
    others = [row["name"] for row in before.get("cells", []) if row["name"] not in names]
    if others:
        progress.note(f"cells of an earlier grid that are not in this one stay in the folder: {', '.join(others)}")


def _write(sweep: Sweep, failures: dict[str, dict[str, str]], data: dict[str, str]) -> dict[str, Any]:
    results = {"format": 1, "name": sweep.folder.name, **collect(sweep, failures), "data": data}
    write_results(sweep.folder, results)
    return results


def _recipe_to_run(cell: Cell, sweep: Sweep) -> Recipe:
    """The cell's recipe; without baselines where an earlier cell has measured the same untouched model."""
    evaluate = cell.recipe.evaluate
    if evaluate is None or not evaluate.baselines:
        return cell.recipe
    for other in sweep.cells:
        run = RunDir(other.folder)
        if _untouched(other.recipe) == _untouched(cell.recipe) and run.is_finished():
            if (run.result().get("evaluation") or {}).get("baseline"):
                without = evaluate.model_copy(update={"baselines": ()})
                return cell.recipe.model_copy(update={"evaluate": without})
    return cell.recipe


def _untouched(recipe: Recipe) -> str:
    """What the baselines depend on: the model, the rows and how they are scored; the seed only draws examples."""
    return as_text(recipe.model_dump(mode="json", include=set(UNTOUCHED)))


def _left(cells: int, taken: list[float]) -> float | None:
    """Seconds that so many cells will take, from those that were run; None before the first is."""
    return cells * sum(taken) / len(taken) if taken and cells else None
