"""Rows with what they hold, in the order of the file, for whoever makes other rows of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from shikomi.data.check import SCANS, shown_labels
from shikomi.data.conversation import Conversation
from shikomi.data.formats import recognise
from shikomi.data.preferences import Judgement, Preference, recognise_preference
from shikomi.data.problems import Problems
from shikomi.data.scan import Item
from shikomi.data.sources import Row, rows
from shikomi.errors import BadInput
from shikomi.recipe import DataSpec

Record = Conversation | Preference | Judgement


@dataclass(frozen=True)
class Held:
    """A row, the format it was read as, the columns that this format does not read, and the records that it holds."""

    row: Row
    format: str
    others: tuple[str, ...]
    records: tuple[Record, ...]

    def items(self) -> Iterator[Item[Any]]:
        """The records as a pass gives them."""
        return (Item(number, 0, self.row, record) for number, record in enumerate(self.records))


def kind_of_rows(spec: DataSpec) -> str | None:
    """What the rows are, by the first one and the templates: conversations, pairs, thumbs; None for none of these."""
    if spec.chosen is not None or spec.rejected is not None:
        return "pairs"
    if spec.desirable is not None:
        return "thumbs"
    if spec.format != "auto":
        return {"preference": "pairs", "unpaired_preference": "thumbs"}.get(spec.format, "conversations")
    if spec.prompt is not None or spec.completion is not None:
        return "conversations"
    for row in islice(rows(spec.train[0], Problems()), 1):
        found = recognise_preference(row.data)
        if found is not None:
            return "pairs" if found == "preference" else "thumbs"
        return "conversations" if recognise(row.data) is not None else None
    return "conversations"  # without rows: reading them says so


def held_rows(spec: DataSpec, kind: str, problems: Problems) -> Iterator[Held]:
    """The good rows of the first source; what is wrong with the others goes to `problems`."""
    labels = shown_labels(spec, None, kind)
    scan = SCANS[kind](spec.train, spec, labels)
    for row in rows(spec.train[0], problems):
        try:
            name = scan.format_of(row)
            found = tuple(scan.parse(row))
        except BadInput as error:
            problems.add(replace(p, file=p.file or row.file, line=p.line or row.line) for p in error.problems)
            continue
        yield Held(row, name, tuple(scan.unused(name, list(row.data))), found)
