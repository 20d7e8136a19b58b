"""One pass over sources: the good rows, and meanwhile every problem and count."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Generic, TypeVar

from shikomi.data.columns import column_templates, unused_columns
from shikomi.data.conversation import Conversation
from shikomi.data.dialects import KEYS
from shikomi.data.encode import Encoded, Encoder
from shikomi.data.formats import parse_row, row_format
from shikomi.data.problems import Problems
from shikomi.data.report import Report
from shikomi.data.sources import Row, rows
from shikomi.data.split import Split, Splittable
from shikomi.errors import BadInput, Problem
from shikomi.progress import Progress, Silent

if TYPE_CHECKING:
    from shikomi.recipe import DataSpec, Source

BATCH = 512
"""Rows tokenised at a time."""


RecordT = TypeVar("RecordT", bound=Splittable)
EncodedT = TypeVar("EncodedT")


@dataclass(frozen=True)
class Item(Generic[RecordT]):
    """A good row: its number among those read, the number of its source, where it stood, its conversation.

    In a pass over preferences the conversation is a Preference or a Judgement.
    """

    number: int
    source: int
    row: Row
    conversation: RecordT


@dataclass
class Pass(ABC, Generic[RecordT, EncodedT]):
    """One pass over sources. Iterating gives the good rows; `problems` and `report` fill up meanwhile.

    labels: the label set for `{labels}`; role: train, validation or test (which files of a folder); side: keep only
    one side of a validation split; answer: rows must hold an answer. A kind of rows is a class of this one.
    """

    sources: Sequence[Source]
    spec: DataSpec
    labels: tuple[str, ...] | None = None
    role: str = "train"
    side: Split | None = None
    answer: bool = True
    problems: Problems = field(default_factory=Problems)
    report: Report = field(default_factory=Report)

    @abstractmethod
    def format_of(self, row: Row) -> str:
        """The format that a row is read as. Raises BadInput when it is of none."""

    @abstractmethod
    def parse(self, row: Row) -> list[RecordT]:
        """What a row holds. Raises BadInput with every problem of the row."""

    @staticmethod
    @abstractmethod
    def encode(encoder: Encoder, records: Sequence[RecordT]) -> list[EncodedT | BadInput]:
        """The tokens of many rows; a row that the template refuses gives its BadInput."""

    @abstractmethod
    def count(self, item: Item[RecordT], encoded: EncodedT, encoder: Encoder) -> bool:
        """Count an encoded row; whether it is kept."""

    def unused(self, kind: str, keys: list[str]) -> list[str]:
        """Columns that are not read."""
        return [key for key in keys if key not in KEYS[kind]]

    def seen(self, item: Item[RecordT]) -> bool:
        """Look at a good row on its way; whether it is kept."""
        return True

    def finish(self) -> None:
        """After the last row: problems and counts of all rows together."""

    def __iter__(self) -> Iterator[Item[RecordT]]:
        number = 0
        formats: Counter[str] = Counter()
        files_read: Counter[str] = Counter()
        columns: dict[str, dict[str, None]] = {}
        for index, source in enumerate(self.sources):
            first: dict[str, tuple[str, int]] = {}
            for row in self._rows(source):
                records = self._parse(row, first)
                if not records:
                    continue
                kind = first[row.file][0]
                columns.setdefault(kind, {}).update(dict.fromkeys(row.data))
                for record in records:
                    number += 1
                    if self.side is not None and record not in self.side:
                        continue
                    formats[kind] += 1
                    files_read[row.file] += 1
                    self.report.rows += 1
                    item = Item(number - 1, index, row, record)
                    if self.seen(item):
                        yield item
        self.report.formats, self.report.files = dict(formats), dict(files_read)
        self.report.unused = [name for kind, keys in columns.items() for name in self.unused(kind, list(keys))]
        self.finish()

    def encoded(self, encoder: Encoder, progress: Progress | None = None) -> Iterator[tuple[Item[RecordT], EncodedT]]:
        """The good rows with their tokens; rows without a trained token are counted and left out.

        A row that the template refuses becomes a problem, and so does it when nothing is left.
        """
        shown = progress or Silent()
        items = iter(self)
        while batch := list(islice(items, BATCH)):
            results = self.encode(encoder, [item.conversation for item in batch])
            for item, result in zip(batch, results, strict=True):
                if isinstance(result, BadInput):
                    self.problems.add(placed(result, item.row))
                elif self.count(item, result, encoder):
                    yield item, result
            shown.tick(self.report.rows, 0, "rows tokenised")
        self.report.notes += encoder.notes
        if self.report.rows and not self.report.kept and not self.problems.count:
            self.problems.add(self._nothing_left(encoder))

    def conversations(self) -> Iterator[RecordT]:
        """What the good rows hold, streaming; raises BadInput with every problem at the end."""
        yield from (item.conversation for item in self)
        self.problems.raise_if_any()

    def _rows(self, source: Source) -> Iterator[Row]:
        try:
            yield from rows(source, self.problems, self.role)
        except BadInput as error:
            self.problems.add(error.problems)

    def _parse(self, row: Row, first: dict[str, tuple[str, int]]) -> list[RecordT]:
        """What a row holds; `first` is the format of each file and the line that showed it."""
        try:
            kind = self.format_of(row)
            known, line = first.setdefault(row.file, (kind, row.line))
            if known != kind:
                self.problems.add(
                    Problem(
                        what="the file mixes row formats",
                        file=row.file,
                        line=row.line,
                        found=kind,
                        allowed=f"{known}, as on line {line}",
                        fix="put the formats in separate files, as two sources",
                    )
                )
                return []
            return self.parse(row)
        except BadInput as error:
            self.problems.add(placed(error, row))
            return []

    def _nothing_left(self, encoder: Encoder) -> Problem:
        where = ", ".join(source.path for source in self.sources)
        if self.report.too_long:
            return Problem(
                what=f"all rows are too long: no answer begins before max_length {encoder.max_length}",
                file=where,
                found=f"up to {self.report.longest:,} tokens",
                allowed=f"{encoder.max_length:,} tokens",
                fix=f"max_length={self.report.longest}, or shorten the prompts",
            )
        return Problem(what="no row has a trained token", file=where, fix="look at data.train_on and `train: false`")


class Scan(Pass[Conversation, Encoded]):
    """A pass over rows that hold a conversation or a text."""

    def format_of(self, row: Row) -> str:
        return row_format(row.data, self.spec, (row.file, row.line), self.answer)

    def parse(self, row: Row) -> list[Conversation]:
        return [parse_row(row.data, self.spec, (row.file, row.line), self.labels, self.answer)]

    @staticmethod
    def encode(encoder: Encoder, records: Sequence[Conversation]) -> list[Encoded | BadInput]:
        return encoder.encode_many(records)

    def unused(self, kind: str, keys: list[str]) -> list[str]:
        if kind == "columns":
            return unused_columns(column_templates(self.spec).values(), keys)
        return super().unused(kind, keys)

    def count(self, item: Item[Conversation], encoded: Encoded, encoder: Encoder) -> bool:
        report, conversation = self.report, item.conversation
        report.longest = max(report.longest, len(encoded.ids) + encoded.cut)
        report.special_text += encoded.special_text
        if conversation.plain is not None:
            if encoder.as_chat(conversation):
                report.plain_as_chat += 1
            elif not conversation.plain[0][-1:].isspace() and not conversation.plain[1][:1].isspace():
                report.joined_without_space += 1
        if not encoded.mask.any():
            report.too_long += encoded.targets_cut > 0
            report.dropped_no_target += encoded.targets_cut == 0
            return False
        report.kept += 1
        report.truncated += encoded.cut > 0
        report.tokens_cut += encoded.cut
        report.tokens += len(encoded.ids)
        report.trained_tokens += int(encoded.mask.sum())
        return True


def placed(error: BadInput, row: Row) -> list[Problem]:
    """The problems of a row with its file and line."""
    return [Problem(p.what, p.file or row.file, p.line or row.line, p.found, p.allowed, p.fix) for p in error.problems]
