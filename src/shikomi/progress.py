"""What a long piece of work tells about itself; the command line shows it, Python calls stay silent."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol, TextIO

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

SECONDS_BETWEEN_LINES = 10.0


class Progress(Protocol):
    """Receives what is going on; every method returns at once."""

    def phase(self, text: str) -> None:
        """Names a silent phase: an import, a conversion."""

    def note(self, text: str) -> None:
        """One line worth reading."""

    def start(self, total: int, what: str) -> None:
        """`total` steps of training begin."""

    def advance(self, record: dict[str, Any]) -> None:
        """One training step: step, total_steps, loss, grad_norm, learning_rate, tokens_per_second, eta_seconds, ..."""

    def tick(self, done: int, total: int, what: str) -> None:
        """Countable work that is not training: tokenising, evaluating."""

    def finish(self) -> None:
        """Nothing more will come."""


class Silent:
    """Shows nothing."""

    def phase(self, text: str) -> None:
        return None

    def note(self, text: str) -> None:
        return None

    def start(self, total: int, what: str) -> None:
        return None

    def advance(self, record: dict[str, Any]) -> None:
        return None

    def tick(self, done: int, total: int, what: str) -> None:
        return None

    def finish(self) -> None:
        return None


class Lines:
    """Plain lines, for a file or a pipe: phases and notes at once, counted work and steps one line every 10 seconds."""

    def __init__(
        self,
        stream: TextIO | None = None,
        every: float = SECONDS_BETWEEN_LINES,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stream = stream if stream is not None else sys.stderr
        self._every = every
        self._clock = clock
        self._last = clock()
        self._counting = ""  # the countable work of which a line was printed

    def phase(self, text: str) -> None:
        self._line(f"{text} ...")

    def note(self, text: str) -> None:
        self._line(text)

    def start(self, total: int, what: str) -> None:
        self._line(f"{what}: {total} steps")

    def advance(self, record: dict[str, Any]) -> None:
        last = record["step"] == record.get("total_steps")
        if record["step"] == 1 or last or self._due():
            self._line(f"step {_count(record)}  {describe(record)}")

    def tick(self, done: int, total: int, what: str) -> None:
        if self._due() or (done == total and self._counting == what):
            self._line(f"{what} {done}/{total}" if total else f"{what} {done}")
            self._counting = what if done != total else ""

    def finish(self) -> None:
        return None

    def _due(self) -> bool:
        return self._clock() - self._last >= self._every

    def _line(self, text: str) -> None:
        self._last = self._clock()
        print(text, file=self._stream, flush=True)


class Terminal:
    """A live display at the foot of the terminal; what it leaves behind are notes and phases that took a while."""

    def __init__(self, console: Console | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        from rich.console import Console
        from rich.live import Live
        from rich.spinner import Spinner

        self._console = console or Console(stderr=True)
        self._clock = clock
        self._spinner = Spinner("dots")
        self._phase = ""
        self._since = clock()
        self._training: dict[str, Any] = {}
        self._title = "training"
        self._counted: tuple[int, int, str] | None = None
        self._live = Live(
            get_renderable=self._view,
            console=self._console,
            transient=True,
            refresh_per_second=8,
            redirect_stdout=False,  # results go to stdout as they are
        )

    def phase(self, text: str) -> None:
        self._end_phase()
        self._phase, self._since = text, self._clock()
        self._counted = None
        self._live.start(refresh=True)

    def note(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def start(self, total: int, what: str) -> None:
        self._end_phase()
        self._counted = None
        self._title, self._training = what, {"step": 0, "total_steps": total}
        self._live.start(refresh=True)

    def advance(self, record: dict[str, Any]) -> None:
        self._end_phase()
        self._counted = None
        self._training = record
        if record["step"] == record.get("total_steps"):
            self._leave_training()

    def tick(self, done: int, total: int, what: str) -> None:
        self._end_phase()
        self._counted = (done, total, what) if done != total else None
        self._live.start()

    def finish(self) -> None:
        self._end_phase()
        self._leave_training()
        self._counted = None
        self._live.stop()

    def _end_phase(self) -> None:
        """Phases of more than a second stay on the screen, with how long they took."""
        taken = self._clock() - self._since
        if self._phase and taken > 1:
            self.note(f"{self._phase}: {duration(taken)}")
        self._phase = ""

    def _leave_training(self) -> None:
        if self._training.get("step"):
            self.note(f"{self._title}: step {_count(self._training)}  {describe(self._training)}")
        self._training = {}

    def _view(self) -> RenderableType:
        from rich.console import Group
        from rich.text import Text

        rows: list[RenderableType] = []
        if self._training:
            rows += [self._bar(self._title, self._training["step"], self._training.get("total_steps"))]
            rows += [Text(f"  {describe(self._training)}")]
        if self._counted:
            done, total, what = self._counted
            rows += [self._bar(what, done, total)]
        if self._phase:
            self._spinner.update(text=Text(f"{self._phase}  {duration(self._clock() - self._since)}"))
            rows += [self._spinner]
        return Group(*rows)

    def _bar(self, what: str, done: int, total: int | None) -> RenderableType:
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        row = Table.grid(padding=(0, 1))
        count = f"{done:,}/{total:,}" if total else f"{done:,}"
        row.add_row(Text(what), ProgressBar(total or None, done, width=32, pulse=not total), count)
        return row


def make(json: bool = False) -> Progress:
    """The display that suits stderr: live on a terminal, lines in a file, a pipe or beside `--json`."""
    if json or not sys.stderr.isatty() or os.environ.get("TERM") == "dumb":
        return Lines()
    return Terminal()


def describe(record: dict[str, Any]) -> str:
    """Loss, speed, time left, memory and the next checkpoint of a step, as far as the record has them."""
    parts = []
    if record.get("loss") is not None:
        parts.append(f"loss {record['loss']:.4f}")
    if record.get("tokens_per_second"):
        parts.append(f"{record['tokens_per_second']:,.0f} tokens/s")
    if record.get("eta_seconds") is not None and record["step"] != record.get("total_steps"):
        parts.append(f"{duration(record['eta_seconds'])} left")
    if record.get("peak_memory_bytes"):
        parts.append(f"peak {size(record['peak_memory_bytes'])}")
    if record.get("next_checkpoint_step") is not None:
        parts.append(f"checkpoint at {record['next_checkpoint_step']:,}")
    return "  ".join(parts)


def _count(record: dict[str, Any]) -> str:
    total = record.get("total_steps")
    return f"{record['step']:,}/{total:,}" if total else f"{record['step']:,}"


def duration(seconds: float) -> str:
    """12 s, 3 min 5 s, 2 h 10 min."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if rest else f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if minutes else f"{hours} h"


def size(n_bytes: float) -> str:
    """Bytes in decimal units: 912 kB, 1.3 GB."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n_bytes >= scale:
            return f"{n_bytes / scale:.1f} {unit}" if n_bytes < 100 * scale else f"{n_bytes / scale:.0f} {unit}"
    return f"{n_bytes:.0f} B"
