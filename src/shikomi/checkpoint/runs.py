"""Many runs: what `shikomi runs` lists, compares and clears away. Imports no torch."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import yaml

from shikomi.checkpoint.diff import differences
from shikomi.checkpoint.files import clear_leftovers, remove_folder
from shikomi.checkpoint.lock import RunLock, is_locked
from shikomi.checkpoint.rundir import MARKER, RunDir
from shikomi.errors import BadInput, TryAgain

_DEPTH = 4  # runs/sweep/NAME and a little more; a run's own folders are not searched


@dataclass(frozen=True)
class RunRow:
    """`seconds`: the result's wall time; for an unfinished run from its start to its last record, with pauses."""

    name: str
    path: Path
    status: Literal["running", "finished", "stopped"]
    step: int | None
    loss: float | None
    started: str
    seconds: float


@dataclass(frozen=True)
class Freed:
    paths: list[Path]
    bytes: int


def find_runs(root: Path) -> Iterator[Path]:
    """Every run directory at or below `root`, by name."""
    for folder, children, files in os.walk(root):
        if MARKER in files:
            yield Path(folder)
            children.clear()
        elif len(Path(folder).relative_to(root).parts) >= _DEPTH:
            children.clear()
        children[:] = sorted(c for c in children if not c.startswith("."))


def list_runs(root: Path) -> list[RunRow]:
    """One row for each run at or below `root`; running or not is told by the kernel's lock."""
    return [_row(root, path) for path in find_runs(root)]


def _row(root: Path, path: Path) -> RunRow:
    run = RunDir(path)
    result = run.result()
    records, _ = run.read_metrics()
    started = str(run.about()["started"])
    finished = result.get("finished") is True
    seconds = 0.0
    if finished and "wall_seconds" in result:
        seconds = float(result["wall_seconds"])
    elif run.metrics_path.exists():
        seconds = max(0.0, run.metrics_path.stat().st_mtime - datetime.fromisoformat(started).timestamp())
    return RunRow(
        name=path.relative_to(root).as_posix() if path != root else path.name,
        path=path,
        status="running" if is_locked(path) else "finished" if finished else "stopped",
        step=next((r["step"] for r in reversed(records) if "step" in r), None),
        loss=next((r["loss"] for r in reversed(records) if "loss" in r), None),
        started=started,
        seconds=seconds,
    )


def diff_recipes(a: Path, b: Path) -> list[str]:
    """The keys in which the recipes of two runs differ, in words; where they were written to is left out."""
    labels = (a.name, b.name) if a.name != b.name else (str(a), str(b))
    return differences(_recipe(a), _recipe(b), labels)


def _recipe(path: Path) -> dict[str, Any]:
    recipe = yaml.safe_load(RunDir(path).open().recipe_path.read_text(encoding="utf-8"))
    recipe.pop("output_dir", None)
    return recipe


def gc(root: Path, keep: int = 1, dry_run: bool = False) -> Freed:
    """Removes all but the newest `keep` checkpoints of every finished run; with `dry_run` only says what would go.

    The default keeps what is needed to extend a run; `final/` is never touched, nor are running and stopped runs.
    """
    if keep < 0:
        raise BadInput(f"keep must be 0 or more, not {keep}")
    gone: list[Path] = []
    freed = 0
    for path in find_runs(root):
        if not RunDir(path).is_finished():
            continue
        try:
            lock = RunLock(path)
        except TryAgain:
            continue  # being extended right now
        with lock:
            if not dry_run:
                clear_leftovers(path / "checkpoints")
            folders = sorted((path / "checkpoints").glob("step-*"), key=lambda folder: int(folder.name[5:]))
            for folder in folders[: max(0, len(folders) - keep)]:
                gone.append(folder)
                freed += sum(file.stat().st_size for file in folder.iterdir())
                if not dry_run:
                    remove_folder(folder)
    return Freed(gone, freed)
