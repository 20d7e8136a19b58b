"""A look at all rows before training: everything that is wrong or worth knowing, as findings, and the figures."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any

from shikomi.data.check import shown_labels
from shikomi.data.encode import Encoder
from shikomi.data.findings import characters, lengths, private
from shikomi.data.findings._finding import Finding, Findings
from shikomi.data.findings._index import Index
from shikomi.data.findings._texts import Reader, Texts
from shikomi.data.findings.answers import AnswerChecks
from shikomi.data.findings.copies import Copies
from shikomi.data.findings.formats import FormatProblems
from shikomi.data.findings.labels import Labels
from shikomi.data.findings.languages import Languages
from shikomi.data.findings.preferences import Preferences
from shikomi.data.findings.sampling import Sample
from shikomi.data.findings.tokens import Beside, Counted, Tokens
from shikomi.data.preference_scan import PairPass, ThumbPass
from shikomi.data.preferences import Judgement, Preference
from shikomi.data.scan import BATCH, Item, Pass, Scan, placed
from shikomi.errors import BadInput
from shikomi.progress import Progress, Silent

if TYPE_CHECKING:
    from shikomi.recipe import DataSpec, Source


_Rows = list[tuple[Item[Any], Texts]]

_AHEAD = 16
"""Batches whose tokens are being counted while the next ones are looked at."""


class _AllPairs(PairPass):
    """Also the pairs whose answers are one."""

    def seen(self, item: Item[Preference]) -> bool:
        super().seen(item)
        return True


class _AllThumbs(ThumbPass):
    """Also the answers of such pairs."""

    def seen(self, item: Item[Judgement]) -> bool:
        super().seen(item)
        return True


_PASSES: dict[str, type[Pass[Any, Any]]] = {"conversations": Scan, "pairs": _AllPairs, "thumbs": _AllThumbs}


@dataclass
class Checkup:
    """What was found in the rows of one task.

    rows: good rows by role; formats: their formats by role; lengths: of the training rows; labels: rows of each label;
    preferences: counts of pairs or judged answers; shares: of scripts and languages; notes: sentences on how the rows
    are read; spelling: the label for each of its other spellings; dropped: why `--fix` leaves a line out.
    """

    findings: list[Finding] = field(default_factory=list)
    rows: dict[str, int] = field(default_factory=dict)
    formats: dict[str, dict[str, int]] = field(default_factory=dict)
    lengths: dict[str, Any] | None = None
    labels: dict[str, int] | None = None
    preferences: dict[str, Any] | None = None
    shares: dict[str, dict[str, float]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    spelling: dict[str, str] = field(default_factory=dict)
    dropped: dict[tuple[str, int], str] = field(default_factory=dict)

    @property
    def errors(self) -> int:
        """How many findings are errors, by place."""
        return self.count("error")

    def count(self, severity: str) -> int:
        """Places of this severity."""
        return sum(finding.count for finding in self.findings if finding.severity == severity)

    def as_dict(self) -> dict[str, Any]:
        """As JSON data."""
        return {
            "rows": self.rows,
            "formats": self.formats,
            "errors": self.count("error"),
            "warnings": self.count("warning"),
            "notes": self.count("note"),
            "findings": [finding.as_dict() for finding in self.findings],
            "lengths": self.lengths,
            "labels": self.labels,
            "preferences": self.preferences,
            "languages": self.shares,
            "reading": self.notes,
        }


def checkup(
    spec: DataSpec,
    kind: str = "conversations",
    encoder: Encoder | None = None,
    max_length: int | None = None,
    progress: Progress | None = None,
    processes: bool = False,
) -> Checkup:
    """Look at every row that `spec` names: train, and validation and test where they are files of their own.

    kind: what is learned from the rows: conversations, pairs or thumbs; encoder: counts tokens and cuts to its own
    max_length; without one, tokens are estimated and `max_length` is what they are compared with; processes: a large
    file's tokens are counted in a second process, which a script may allow that keeps its work behind
    `if __name__ == "__main__"`.
    """
    shown = progress or Silent()
    limit = max_length if encoder is None else encoder.max_length
    state = _State(spec, kind, encoder, limit, processes)
    labels = None
    try:
        labels = shown_labels(spec, None, kind)
    except BadInput as error:
        labels = ()
        if not any(problem.file for problem in error.problems):  # a source that is missing is named by the pass
            state.problems.add(error.problems)
    for role, sources in roles_of(spec).items():
        state.read(role, sources, labels, shown)
    shown.phase("comparing the rows with each other")
    return state.finish()


def roles_of(spec: DataSpec) -> dict[str, Sequence[Source]]:
    """The sources that are read, by role; a share of the training rows is none of its own."""
    roles: dict[str, Sequence[Source]] = {"train": spec.train}
    if spec.validation is not None and not isinstance(spec.validation, float):
        roles["validation"] = spec.validation
    if spec.test is not None:
        roles["test"] = spec.test
    return roles


class _State:
    """The checks of one task, which see every row once."""

    def __init__(
        self, spec: DataSpec, kind: str, encoder: Encoder | None, max_length: int | None, processes: bool
    ) -> None:
        self._spec, self._kind, self._encoder, self._processes = spec, kind, encoder, processes
        self._findings, self._index = Findings(), Index()
        self.problems = FormatProblems(self._findings)
        self._answers = AnswerChecks(encoder.tokenizer.all_special_tokens if encoder is not None else ())
        self._languages, self._copies = Languages(), Copies()
        self._labels, self._preferences = Labels(spec.labels), Preferences()
        self._lengths = lengths.Lengths(encoder, max_length)
        self._sample = Sample(max_length)
        self._out = Checkup()

    def read(self, role: str, sources: Sequence[Source], labels: tuple[str, ...] | None, progress: Progress) -> None:
        """One pass over the rows of a role."""
        scan = _PASSES[self._kind](sources, self._spec, labels, role, problems=self.problems)
        reader = Reader(self._spec, role, self._kind, len(self._index))
        with self._beside(role, scan) as beside:
            waiting: deque[tuple[_Rows, Future[Counted]]] = deque()
            for batch in _batches(scan):
                rows = [(item, reader.read(item)) for item in batch]
                kept = [row for row in rows if self._look(*row, role)]
                if beside is not None:
                    waiting.append(self._count(beside, kept))
                elif role == "train":
                    self._estimate(kept)
                if len(waiting) > _AHEAD:
                    self._add_lengths(*waiting.popleft())
                progress.tick(scan.report.rows, 0, f"{role} rows checked")
            for counting in waiting:
                self._add_lengths(*counting)
        report = scan.report
        self._out.rows[role], self._out.formats[role] = report.rows, report.formats
        if report.unused:
            self._note(f"columns not used: {', '.join(report.unused)}")

    def finish(self) -> Checkup:
        """What all rows together show."""
        out, index, findings = self._out, self._index, self._findings
        out.labels = self._labels.finish(index, findings)
        self._copies.finish(index, findings, out.labels is not None)
        self._languages.finish(index, findings)
        out.shares = self._languages.shares()
        if self._kind != "conversations":
            out.preferences = self._preferences.finish(index, findings)
        out.lengths = self._lengths.finish(findings)
        out.findings, out.dropped, out.spelling = findings.all(), findings.lines, self._labels.spelling()
        for note in (self._sample.note(), *(self._encoder.notes if self._encoder is not None else ())):
            self._note(note)
        return out

    def _look(self, item: Item[Any], texts: Texts, role: str) -> bool:
        """Every check of one row; whether it is trained on."""
        findings, record = self._findings, item.conversation
        characters.check(texts, findings)
        private.check(texts, findings)
        self._answers.check(texts, findings)
        self._index.add(texts)
        self._languages.add(texts)
        self._labels.add(texts)
        self._copies.add(texts, record)
        if isinstance(record, Preference | Judgement):
            return self._preferences.add(texts, record, role, findings)
        return True

    def _beside(self, role: str, scan: Pass[Any, Any]) -> AbstractContextManager[Beside | None]:
        if role != "train" or self._encoder is None:
            return nullcontext()
        return Beside(Tokens(self._encoder, scan.encode), self._processes)

    def _estimate(self, rows: _Rows) -> None:
        for _, texts in rows:
            self._lengths.add(texts, lengths.estimate(texts, self._lengths.max_length), 1, self._findings)

    def _count(self, beside: Beside, rows: _Rows) -> tuple[_Rows, Future[Counted]]:
        """The rows of which tokens are counted, and the counts to come."""
        weights = [self._sample.weight(item.conversation) for item, _ in rows]
        kept = [(row, weight) for row, weight in zip(rows, weights, strict=True) if weight]
        return [row for row, _ in kept], beside.count([(item.conversation, weight) for (item, _), weight in kept])

    def _add_lengths(self, rows: _Rows, counting: Future[Counted]) -> None:
        for (item, texts), (weight, measured) in zip(rows, counting.result(), strict=True):
            self._sample.measured += measured is not None
            if isinstance(measured, BadInput):
                self.problems.add(placed(measured, item.row))
            elif measured is not None:
                self._sample.accept(item.conversation)
                self._lengths.add(texts, measured, weight, self._findings)

    def _note(self, note: str | None) -> None:
        if note is not None and note not in self._out.notes:
            self._out.notes.append(note)


def _batches(items: Iterable[Item[Any]]) -> Iterator[list[Item[Any]]]:
    left = iter(items)
    while batch := list(islice(left, BATCH)):
        yield batch
