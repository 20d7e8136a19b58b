"""A cell's progress as a part of the sweep's: which cell it is, and how long the sweep will take."""

from collections.abc import Mapping
from typing import Any

from shikomi.evaluate.wording import metric_name, number
from shikomi.progress import Progress, duration


class Numbered:
    """A Progress that puts the cell before what it passes on; a note that an earlier cell made is not repeated.

    `left`: seconds until the sweep ends, this cell included; None where that is not known yet. `said`: the notes so
    far, which the cells of a sweep share.
    """

    def __init__(self, progress: Progress, title: str, left: float | None, said: set[str]) -> None:
        self._progress = progress
        self._title = title
        self._left = "" if left is None else f" (the sweep: {duration(left)} left)"
        self._said = said

    def phase(self, text: str) -> None:
        self._progress.phase(f"{self._title}: {text}")

    def note(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            self._progress.note(f"{self._title}: {text}")

    def start(self, total: int, what: str) -> None:
        self._progress.start(total, f"{self._title}, {what}{self._left}")

    def advance(self, record: dict[str, Any]) -> None:
        self._progress.advance(record)

    def tick(self, done: int, total: int, what: str) -> None:
        self._progress.tick(done, total, f"{self._title}: {what}")

    def finish(self) -> None:
        return None  # the sweep goes on

    def ended(self, row: Mapping[str, Any], seconds: float, left: float | None) -> None:
        """One line on what came of the cell, and the time that the others will take."""
        if row["status"] == "failed":
            came = f"failed, {row['error']['kind']}: {row['error']['message']}"
        elif row["score"]:
            came = f"{metric_name(row['metric'])} {number(row['score']['value'], row['score']['unit'])}"
        elif row["final_loss"] is not None:
            came = f"final loss {row['final_loss']:.4f}"
        else:
            came = row["status"]
        more = "" if left is None else f"; about {duration(left)} left"
        self._progress.note(f"{self._title}: {came}, {duration(seconds)}{more}")
