"""The process of one cell: `python -m shikomi.sweep.child` reads a recipe on stdin and trains it.

A process of its own because peak memory is a process's. Linux counts for a started program what the process that
started it held (getrusage's ru_maxrss outlives exec), so this small process forks once more, and that child, which
counts from nothing, trains. Progress goes to stdout as JSON lines, all other output to stderr. The end of stdin means
that the sweep is gone: then the run saves and stops as after SIGTERM.
"""

import json
import os
import signal
import sys
import threading
import traceback
from typing import Any, TextIO

from shikomi.errors import ShikomiError

EXIT_BROKEN = 70
"""The cell ended by an error that is not one of the user's."""


class Told:
    """A Progress that writes what it is told as JSON lines: [method, arguments]."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def phase(self, text: str) -> None:
        self.send("phase", text)

    def note(self, text: str) -> None:
        self.send("note", text)

    def start(self, total: int, what: str) -> None:
        self.send("start", total, what)

    def advance(self, record: dict[str, Any]) -> None:
        self.send("advance", record)

    def tick(self, done: int, total: int, what: str) -> None:
        self.send("tick", done, total, what)

    def finish(self) -> None:
        self.send("finish")

    def send(self, method: str, *arguments: Any) -> None:
        print(json.dumps([method, arguments]), file=self._stream, flush=True)


def main() -> int:
    """Forks the process that trains, hands signals on to it, and ends as it ends; returns its exit code."""
    signals = (signal.SIGINT, signal.SIGTERM)
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)  # none may come before there is a handler
    trainer = os.fork()
    if trainer == 0:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
        return train_cell()

    def hand_on(number: int, frame: object) -> None:
        os.kill(trainer, number)  # not waited for yet, so the number is its own

    for number in signals:
        signal.signal(number, hand_on)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
    for descriptor in (0, 1):
        os.close(descriptor)  # the sweep reads until the trainer closes its own
    code = os.waitstatus_to_exitcode(os.waitpid(trainer, 0)[1])
    if code < 0:
        if code != -signal.SIGKILL:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    return code


def train_cell() -> int:
    """Trains the recipe (resolved YAML in a JSON string, one line) and returns the exit code."""
    # A library that prints must not write between our lines.
    told = Told(os.fdopen(os.dup(1), "w", encoding="utf-8"))
    os.dup2(2, 1)
    with os.fdopen(os.dup(0), "rb", buffering=0) as first:
        text = json.loads(first.readline())
    threading.Thread(target=_stop_at_end_of_input, daemon=True).start()
    try:
        from shikomi.recipe import parse_recipe
        from shikomi.run import train

        train(parse_recipe(text), told)
        return 0
    except ShikomiError as error:
        told.send("error", type(error).__name__, error.message)
        return error.exit_code
    except Exception as error:  # a broken cell is a row of the table, with its reason
        traceback.print_exc()
        told.send("error", type(error).__name__, str(error))
        return EXIT_BROKEN


def _stop_at_end_of_input() -> None:
    while os.read(0, 1):
        continue
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main())
