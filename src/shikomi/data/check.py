"""Reading and checking data in one pass: every problem of every file at once, and what is worth knowing besides."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any

from shikomi.data.columns import column_templates, unused_columns
from shikomi.data.conversation import Conversation
from shikomi.data.dialects import KEYS
from shikomi.data.encode import Encoded, Encoder
from shikomi.data.formats import label_set, parse_row, row_format, uses_labels
from shikomi.data.problems import Problems
from shikomi.data.sources import Row, rows
from shikomi.data.split import Split
from shikomi.errors import BadInput, Problem
from shikomi.progress import Progress, Silent

if TYPE_CHECKING:
    from shikomi.recipe import DataSpec, Source

BATCH = 512
"""Rows tokenised at a time."""

MOST_LABELS = 200
"""Answers that may stand in a prompt."""


@dataclass
class Report:
    """Counts of a pass over data. Lengths are in tokens; `tokens` counts what is kept."""

    rows: int = 0
    kept: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    truncated: int = 0
    tokens_cut: int = 0
    too_long: int = 0
    dropped_no_target: int = 0
    special_text: int = 0
    plain_as_chat: int = 0
    joined_without_space: int = 0
    longest: int = 0
    files: dict[str, int] = field(default_factory=dict)
    formats: dict[str, int] = field(default_factory=dict)
    unused: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """The counts and notes as JSON data."""
        return asdict(self)

    def lines(self, max_length: int | None) -> list[str]:
        """One sentence for each thing that a user should know: nothing is dropped or changed in silence."""
        out = list(self.notes)
        if self.unused:
            out.append(f"columns not used: {', '.join(self.unused)}")
        if self.truncated:
            out.append(
                f"{self.truncated:,} of {self.rows:,} rows were longer than max_length {max_length} and lost their "
                f"end ({self.tokens_cut:,} tokens)"
            )
        if self.too_long:
            out.append(f"{self.too_long:,} rows were dropped: their answer begins after max_length {max_length}")
        if self.dropped_no_target:
            out.append(f"{self.dropped_no_target:,} rows were dropped: none of their tokens is trained")
        if self.special_text:
            out.append(
                f"{self.special_text:,} rows hold special-token strings (such as <|im_end|>); they were encoded as "
                "ordinary text"
            )
        if self.plain_as_chat:
            out.append(
                f"{self.plain_as_chat:,} plain prompts became a conversation through the chat template "
                "(chat: never keeps them as they are)"
            )
        if self.joined_without_space:
            out.append(
                f"in {self.joined_without_space:,} rows prompt and completion are joined without white space between"
            )
        return out


@dataclass(frozen=True)
class Item:
    """A good row: its number among those read, the number of its source, where it stood, its conversation."""

    number: int
    source: int
    row: Row
    conversation: Conversation


@dataclass
class Scan:
    """One pass over sources. Iterating gives the good rows; `problems` and `report` fill up meanwhile.

    labels: the label set for `{labels}`; role: train, validation or test (which files of a folder); side: keep only
    one side of a validation split; answer: rows must hold an answer.
    """

    sources: Sequence[Source]
    spec: DataSpec
    labels: tuple[str, ...] | None = None
    role: str = "train"
    side: Split | None = None
    answer: bool = True
    problems: Problems = field(default_factory=Problems)
    report: Report = field(default_factory=Report)

    def __iter__(self) -> Iterator[Item]:
        number = 0
        formats: Counter[str] = Counter()
        files_read: Counter[str] = Counter()
        columns: dict[str, dict[str, None]] = {}
        for index, source in enumerate(self.sources):
            first: dict[str, tuple[str, int]] = {}
            for row in self._rows(source):
                conversation = self._parse(row, first)
                if conversation is None:
                    continue
                kind = first[row.file][0]
                columns.setdefault(kind, {}).update(dict.fromkeys(row.data))
                number += 1
                if self.side is not None and conversation not in self.side:
                    continue
                formats[kind] += 1
                files_read[row.file] += 1
                self.report.rows += 1
                yield Item(number - 1, index, row, conversation)
        self.report.formats, self.report.files = dict(formats), dict(files_read)
        self.report.unused = [name for kind, keys in columns.items() for name in self._unused(kind, list(keys))]

    def encoded(self, encoder: Encoder, progress: Progress | None = None) -> Iterator[tuple[Item, Encoded]]:
        """The good rows with their tokens; rows without a trained token are counted and left out.

        A row that the template refuses becomes a problem, and so does it when nothing is left.
        """
        shown = progress or Silent()
        items = iter(self)
        while batch := list(islice(items, BATCH)):
            results = encoder.encode_many([item.conversation for item in batch])
            for item, result in zip(batch, results, strict=True):
                if isinstance(result, BadInput):
                    self.problems.add(_placed(result, item.row))
                elif self._count(item, result, encoder):
                    yield item, result
            shown.tick(self.report.rows, 0, "rows tokenised")
        self.report.notes += encoder.notes
        if self.report.rows and not self.report.kept and not self.problems.count:
            self.problems.add(self._nothing_left(encoder))

    def conversations(self) -> Iterator[Conversation]:
        """The conversations of the good rows, streaming; raises BadInput with every problem at the end."""
        yield from (item.conversation for item in self)
        self.problems.raise_if_any()

    def _rows(self, source: Source) -> Iterator[Row]:
        try:
            yield from rows(source, self.problems, self.role)
        except BadInput as error:
            self.problems.add(error.problems)

    def _parse(self, row: Row, first: dict[str, tuple[str, int]]) -> Conversation | None:
        """The conversation of a row; `first` is the format of each file and the line that showed it."""
        where = (row.file, row.line)
        try:
            kind = row_format(row.data, self.spec, where, self.answer)
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
                return None
            return parse_row(row.data, self.spec, where, self.labels, self.answer)
        except BadInput as error:
            self.problems.add(_placed(error, row))
            return None

    def _unused(self, kind: str, keys: list[str]) -> list[str]:
        if kind == "columns":
            return unused_columns(column_templates(self.spec).values(), keys)
        return [key for key in keys if key not in KEYS[kind]]

    def _count(self, item: Item, encoded: Encoded, encoder: Encoder) -> bool:
        """Count a row; whether it has a trained token left."""
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


def _placed(error: BadInput, row: Row) -> list[Problem]:
    return [Problem(p.what, p.file or row.file, p.line or row.line, p.found, p.allowed, p.fix) for p in error.problems]


def labels_of(spec: DataSpec) -> tuple[str, ...]:
    """The label set of a task: `data.labels`, else the distinct answers of all its training rows, sorted.

    Raises BadInput for sources that cannot be found.
    """
    if spec.labels is not None:
        return tuple(spec.labels)
    unread = Problems()  # what cannot be read is reported by the check of the rows
    return label_set(spec, (row.data for source in spec.train for row in rows(source, unread)))


def load_conversations(
    sources: Sequence[Source],
    spec: DataSpec,
    labels: tuple[str, ...] | None = None,
    role: str = "test",
    side: Split | None = None,
    answer: bool = True,
) -> list[Item]:
    """All rows of the sources in memory, for evaluation and prediction. Raises BadInput with every problem."""
    scan = Scan(sources, spec, template_labels(spec, labels), role, side, answer)
    items = list(scan)
    scan.problems.raise_if_any()
    return items


def template_labels(spec: DataSpec, labels: tuple[str, ...] | None) -> tuple[str, ...] | None:
    """`labels`, or the label set read from the training rows where a template needs one.

    Raises BadInput where `{labels}` would stand for more than MOST_LABELS answers.
    """
    if labels is not None or not uses_labels(spec):
        return labels
    found = labels_of(spec)
    if len(found) > MOST_LABELS and spec.labels is None:
        raise BadInput(
            [
                Problem(
                    what="{labels} in a template stands for too many answers",
                    found=f"{len(found):,} distinct answers in the training rows",
                    allowed=f"up to {MOST_LABELS}",
                    fix="remove {labels} from the template, or list them in data.labels",
                )
            ]
        )
    return found


def check_data(
    spec: DataSpec, encoder: Encoder | None = None, labels: tuple[str, ...] | None = None
) -> tuple[dict[str, Report], list[Problem]]:
    """Check every source that a recipe names: (report by role, all problems). With an encoder, tokens are counted."""
    roles: dict[str, Sequence[Source]] = {"train": spec.train}
    if spec.validation is not None and not isinstance(spec.validation, float):
        roles["validation"] = spec.validation
    if spec.test is not None:
        roles["test"] = spec.test
    reports, problems = {}, Problems()
    try:
        labels = template_labels(spec, labels)
    except BadInput as error:
        labels = ()
        if not any(p.file for p in error.problems):  # a source that is missing is named by the scan
            problems.add(error.problems)
    for role, sources in roles.items():
        scan = Scan(sources, spec, labels, role, problems=problems)
        for _ in scan.encoded(encoder) if encoder is not None else scan:
            pass
        reports[role] = scan.report
    return reports, problems.all()
