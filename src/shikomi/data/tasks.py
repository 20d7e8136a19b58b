"""What a check reads: the tasks of a recipe, or of a file by the keys of its rows."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

from shikomi.data.detect import SAMPLE, propose
from shikomi.data.formats import recognise
from shikomi.data.preferences import recognise_preference
from shikomi.data.problems import Problems
from shikomi.data.sources import rows
from shikomi.errors import BadInput
from shikomi.recipe import DataSpec, Source

if TYPE_CHECKING:
    from collections.abc import Sequence

KINDS = {"preference": "pairs", "unpaired_preference": "thumbs"}
"""What is learned from a format, where it is not conversations."""


@dataclass(frozen=True)
class Task:
    """Rows that are trained on together: `kind` is what is learned from them; `notes` say how they are read."""

    name: str
    spec: DataSpec
    kind: str = "conversations"
    notes: tuple[str, ...] = ()


def task_of_file(path: str, validation: str | None = None) -> Task:
    """The task of a file or folder, by the keys of its first rows; a prompt and an answer are proposed for columns.

    Never raises for the rows: what cannot be read or recognised is what the check finds.
    """
    source = Source(path=path)
    held = None if validation is None else (Source(path=validation),)
    plain = DataSpec(train=(source,), validation=held)
    read = _first_rows(source)
    kinds = Counter(recognise_preference(row) or recognise(row) for row in read)
    format = kinds.most_common(1)[0][0] if kinds else None
    if format is not None or not read:
        return Task("rows", plain, KINDS.get(format or "", "conversations"))
    try:
        found = propose(source, list(dict.fromkeys(str(key) for row in read for key in row)), read, False)
    except BadInput:
        return Task("rows", plain)  # no question and answer: every row is of no known format
    spec = DataSpec(train=(source,), validation=held, prompt=found.prompt, completion=found.completion)
    asked = "`shikomi init` writes a recipe in which you can say it better"
    return Task(
        "rows", spec, notes=(f"read as columns: prompt {found.prompt!r}, completion {found.completion!r}; {asked}",)
    )


def tasks_of_stages(stages: Sequence[tuple[str, DataSpec, str]]) -> list[Task]:
    """The tasks of a recipe's stages (name, rows, kind), each set of rows once.

    Test rows of a preference stage may be plain prompts and answers: these are a task of their own.
    """
    tasks: list[Task] = []
    for name, spec, kind in stages:
        if any(task.spec == spec and task.kind == kind for task in tasks):
            continue
        if kind != "conversations" and spec.test is not None and not _holds_preferences(spec):
            update = {"format": "auto", "chosen": None, "rejected": None, "desirable": None, "validation": None}
            tests = spec.model_copy(update={**update, "train": spec.test, "test": None})
            tasks += [Task(name, spec.model_copy(update={"test": None}), kind), Task(f"{name}: test rows", tests)]
        else:
            tasks.append(Task(name, spec, kind))
    return tasks


def _holds_preferences(spec: DataSpec) -> bool:
    if spec.chosen is not None or spec.desirable is not None:
        return True
    first = next((row for source in spec.test or () for row in _first_rows(source, "test")), None)
    return first is None or recognise_preference(first) is not None


def _first_rows(source: Source, role: str = "train") -> list[dict]:
    unread = Problems()  # what cannot be read is what the check finds
    try:
        return [row.data for row in islice(rows(source, unread, role), SAMPLE)]
    except BadInput:
        return []
