"""runs: list them, watch one, compare two, clear old checkpoints away."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shikomi.commands.output import Json, emit, short_path, show, showing
from shikomi.progress import describe, duration, size

if TYPE_CHECKING:
    from shikomi.checkpoint.rundir import RunDir

ROOT = Path("runs")
POLL_SECONDS = 1.0

RUNS = """The runs of a folder: whether they are running, how far they came, what they were told.

\b
Examples:
  shikomi runs
  shikomi runs watch runs/my
  shikomi runs diff runs/my runs/my-r32
  shikomi runs gc --dry-run
"""
LIST = """List the runs below a folder.

\b
Examples:
  shikomi runs list
  shikomi runs list experiments --json
"""
WATCH = """Follow a run that another process trains, until it ends. Ctrl-C stops watching, not the run.

\b
Example:
  shikomi runs watch runs/my
"""
DIFF = """The recipe keys in which two runs differ, with what came of them.

\b
Example:
  shikomi runs diff runs/my runs/my-r32
"""
GC = """Remove the checkpoints of finished runs but the newest; results and adapters stay.

\b
Examples:
  shikomi runs gc --dry-run
  shikomi runs gc experiments --keep 0
"""

app = typer.Typer(help=RUNS, rich_markup_mode=None, invoke_without_command=True)

Root = Annotated[Path, typer.Argument(metavar="[FOLDER]", help="Where the runs are.")]
Run = Annotated[Path, typer.Argument(help="The folder of a run.")]


@app.callback()
def runs(context: typer.Context, as_json: Json = False) -> None:
    """Without a subcommand: list."""
    if context.invoked_subcommand is None:
        list_runs(ROOT, as_json)


@app.command("list", help=LIST)
def list_runs(root: Root = ROOT, as_json: Json = False) -> None:
    """One row for each run."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from shikomi.checkpoint import runs as many

    rows = many.list_runs(root)
    if as_json:
        emit({"runs": [vars(row) for row in rows]})
        return
    if not rows:
        print(f"no runs in {root}; `shikomi train RECIPE` starts one")
        return
    table = Table(box=box.SIMPLE_HEAD)
    for title in ("run", "status", "step", "loss", "time", "started"):
        table.add_column(title, justify="right" if title in ("step", "loss", "time") else "left", no_wrap=True)
    for row in rows:
        step = "" if row.step is None else f"{row.step:,}"
        loss = "" if row.loss is None else f"{row.loss:.4f}"
        started = row.started[:16].replace("T", " ")
        table.add_row(Text(short_path(row.path)), row.status, step, loss, duration(row.seconds), started)
    show(table)


@app.command(help=WATCH)
def watch(run: Run) -> None:
    """Shows each new record of metrics.jsonl."""
    from shikomi.checkpoint.lock import is_locked
    from shikomi.checkpoint.rundir import RunDir

    folder, start, last = RunDir(run).open(), 0, {}
    with showing() as progress:
        progress.phase(f"watching {short_path(run)}")
        while True:
            running = is_locked(run)  # asked before reading, so that the last records are not missed
            records, start = folder.read_metrics(start)
            steps = [record for record in records if "loss" in record]
            for record in records:
                if "eval_loss" in record:
                    progress.note(f"step {record['step']:,}: eval_loss {record['eval_loss']:.4f}")
            if steps:
                last = _with_speed(steps[-1])
                progress.advance(last)
            if not running:
                break
            time.sleep(POLL_SECONDS)
    print(_how_it_ended(folder, last))


def _with_speed(record: dict[str, Any]) -> dict[str, Any]:
    seconds = record.get("seconds")
    return {**record, "tokens_per_second": record["tokens"] / seconds} if seconds else record


def _how_it_ended(folder: RunDir, last: dict[str, Any]) -> str:
    end = "finished" if folder.is_finished() else f"not running; `shikomi resume {short_path(folder.path)}` goes on"
    return f"{short_path(folder.path)}: {end}" + (f"  step {last['step']:,}  {describe(last)}" if last else "")


@app.command(help=DIFF)
def diff(a: Run, b: Run, as_json: Json = False) -> None:
    """The keys of the recipes, then the results."""
    from shikomi.checkpoint.rundir import RunDir
    from shikomi.checkpoint.runs import diff_recipes

    lines = diff_recipes(a, b)
    results = {short_path(path): RunDir(path).result() for path in (a, b)}
    if as_json:
        emit({"recipe": lines, "results": results})
        return
    print("\n".join(lines) if lines else "the recipes are the same")
    for path, result in results.items():
        print(f"{path}: " + (f"final loss {result['final_loss']:.4f}" if "final_loss" in result else "not finished"))


@app.command(help=GC)
def gc(
    root: Root = ROOT,
    keep: Annotated[int, typer.Option(help="Newest checkpoints kept in each finished run.")] = 1,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
    as_json: Json = False,
) -> None:
    """Running and stopped runs are not touched."""
    from shikomi.checkpoint import runs as many

    freed = many.gc(root, keep, dry_run)
    if as_json:
        emit({"removed": freed.paths, "bytes": freed.bytes, "dry_run": dry_run})
        return
    for path in freed.paths:
        print(short_path(path))
    print(f"{'would free' if dry_run else 'freed'} {size(freed.bytes)} in {len(freed.paths)} checkpoints")
