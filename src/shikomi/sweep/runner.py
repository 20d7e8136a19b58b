"""The sweep's side of a cell's process: starts it, passes its progress on, and says how it ended."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from shikomi.errors import EXIT_INTERRUPTED, EXIT_TERMINATED, Stopped
from shikomi.progress import Progress
from shikomi.recipe import Recipe, dump_recipe

_TAIL = 2000
"""Characters of a broken cell's own output that its record keeps."""


class CellFailed(Exception):
    """A cell that has no result. `kind` is the error's class; `output` the end of what its process printed."""

    def __init__(self, kind: str, message: str, output: str = "") -> None:
        super().__init__(f"{kind}: {message}")
        self.kind, self.message, self.output = kind, message, output


Runner = Callable[[Recipe, Progress], None]
"""Trains a recipe to its end, or goes on with it. Raises CellFailed, or Stopped after a signal (resumable)."""


def run_in_child(recipe: Recipe, progress: Progress) -> None:
    """Trains a recipe in a process of its own, so that its peak memory is its own."""
    # Of its own session: Ctrl-C reaches the sweep alone, which hands it on.
    with tempfile.TemporaryFile() as output:
        child = subprocess.Popen(
            [sys.executable, "-m", "shikomi.sweep.child"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=output,
            env=os.environ | {"PYTHONUNBUFFERED": "1"},
            start_new_session=True,
            text=True,
            encoding="utf-8",
        )
        assert child.stdin is not None and child.stdout is not None
        with _handed_on(child) as asked:
            try:
                child.stdin.write(json.dumps(dump_recipe(recipe)) + "\n")
                child.stdin.flush()
            except BrokenPipeError:
                pass  # it died before it read: its output says why
            error = _pass_on(child.stdout, progress)
            code = child.wait()
            with suppress(BrokenPipeError):  # what a dead child did not read is still to be written
                child.stdin.close()
            child.stdout.close()
        if code == 0:
            return
        stopped = {EXIT_INTERRUPTED, EXIT_TERMINATED, -signal.SIGINT, -signal.SIGTERM}
        if asked or code in stopped:
            how = EXIT_INTERRUPTED if signal.SIGINT in asked or code in (130, -signal.SIGINT) else EXIT_TERMINATED
            raise Stopped(error[1] if error else f"{recipe.output_dir} was stopped", how)
        raise _failure(code, error, _tail(output))


def _pass_on(lines: IO[str], progress: Progress) -> tuple[str, str] | None:
    """Plays a child's progress; returns (class, message) of the error that it ended with."""
    play: dict[str, Callable[..., None]] = {
        "phase": progress.phase,
        "note": progress.note,
        "start": progress.start,
        "advance": progress.advance,
        "tick": progress.tick,
        "finish": progress.finish,
    }
    error: tuple[str, str] | None = None
    for line in lines:
        try:
            method, arguments = json.loads(line)
        except ValueError:
            continue  # torn by a kill
        if method == "error":
            error = (arguments[0], arguments[1])
        else:
            play[method](*arguments)
    return error


def _failure(code: int, error: tuple[str, str] | None, output: str) -> CellFailed:
    if error is not None:
        return CellFailed(*error, output)
    if code == -signal.SIGKILL:
        return CellFailed("killed", "by the system, most likely for memory: lower micro_batch_tokens", output)
    if code < 0:
        return CellFailed("killed", f"by {signal.Signals(-code).name}", output)
    return CellFailed("ended", f"with exit code {code} before it could say why", output)


def _tail(output: IO[bytes]) -> str:
    output.seek(0)
    return output.read().decode("utf-8", "replace")[-_TAIL:].strip()


@contextmanager
def _handed_on(child: "subprocess.Popen[str]") -> Iterator[list[int]]:
    """Within: SIGINT and SIGTERM go to the child, which saves and stops; yields those that came."""
    asked: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def hand_on(number: int, frame: object) -> None:
        asked.append(number)
        child.send_signal(number)

    before = {number: signal.signal(number, hand_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def adapter_bytes(folder: Path) -> int | None:
    """Bytes of the weights in a run's `final/`; None where there are none."""
    files = list((folder / "final").glob("*.safetensors"))
    return sum(file.stat().st_size for file in files) if files else None
