"""A pass over preferences: pairs or judged answers, and what only all of them together show."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np

from shikomi.data.answers import Answers
from shikomi.data.columns import pair_templates, thumb_templates, unused_columns
from shikomi.data.encode import Encoder
from shikomi.data.preferences import (
    Judgement,
    Preference,
    answer_of,
    pair_format,
    parse_pair,
    parse_thumbs,
    thumb_format,
)
from shikomi.data.report import PreferenceReport
from shikomi.data.scan import Item, Pass
from shikomi.data.sources import Row
from shikomi.errors import BadInput, Problem

PLACES = 5
"""Rows that are named for each count."""

JudgedT = TypeVar("JudgedT", Preference, Judgement)


@dataclass
class _Seen:
    """A few bytes for each row, from which copies are found at the end: files may be larger than memory."""

    keys: array = field(default_factory=lambda: array("Q"))  # 63 bits of a hash, and which way it was judged
    files: array = field(default_factory=lambda: array("i"))
    lines: array = field(default_factory=lambda: array("q"))
    names: dict[str, int] = field(default_factory=dict)

    def add(self, row: Row, content: object, way: bool) -> None:
        digest = hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).digest()
        self.keys.append(int.from_bytes(digest[:8], "big") & ~1 | way)
        self.files.append(self.names.setdefault(row.file, len(self.names)))
        self.lines.append(row.line)

    def places(self, which: np.ndarray) -> list[str]:
        names = list(self.names)
        return [f"{names[self.files[i]]}:{self.lines[i]}" for i in which[:PLACES].tolist()]

    def copies(self) -> np.ndarray:
        """Indices of the rows that occur before."""
        _, first = np.unique(np.asarray(self.keys), return_index=True)
        return np.setdiff1d(np.arange(len(self.keys)), first)

    def contradicted(self) -> np.ndarray:
        """Indices of the rows of which the opposite occurs too."""
        keys = np.asarray(self.keys, np.uint64)
        return np.flatnonzero(np.isin(keys ^ np.uint64(1), keys))


@dataclass
class PreferencePass(Pass[JudgedT, Answers]):
    """What passes over pairs and over judged answers share."""

    report: PreferenceReport = field(default_factory=PreferenceReport)
    _seen: _Seen = field(default_factory=_Seen)

    @staticmethod
    def encode(encoder: Encoder, records: Sequence[JudgedT]) -> list[Answers | BadInput]:
        return encoder.encode_answers([record.answers for record in records])

    def seen(self, item: Item[JudgedT]) -> bool:
        record = item.conversation
        if record.same:
            self.report.same += 1
            self._place("same", item.row)
            return False
        self._seen.add(item.row, *self.judged(record))
        if self.repeats_prompt(record):
            self.report.repeats_prompt += 1
            self._place("repeats_prompt", item.row)
        return True

    def judged(self, record: JudgedT) -> tuple[object, bool]:
        """(what was judged, which way): rows that differ in the second alone contradict each other."""
        texts = [json.dumps(answer_of(answer), sort_keys=True, default=str) for answer in record.answers]
        if isinstance(record, Preference):
            return [record.identity, sorted(texts)], texts[0] < texts[1]
        return [record.identity, texts], record.desirable

    def repeats_prompt(self, record: JudgedT) -> bool:
        """Whether a plain prompt stands at the beginning of its answers too."""
        plain = [answer.plain for answer in record.answers]
        return all(p is not None and bool(p[0].strip()) and p[1].startswith(p[0]) for p in plain)

    def finish(self) -> None:
        copies, contradicted = self._seen.copies(), self._seen.contradicted()
        self.report.duplicates, self.report.contradictions = len(copies), len(contradicted)
        for name, which in (("duplicates", copies), ("contradictions", contradicted)):
            if len(which):
                self.report.places[name] = self._seen.places(which)
        if self.report.rows and self.report.same == self.report.rows:
            self.problems.add(
                Problem(
                    what="chosen and rejected are the same in all rows",
                    file=self._where(),
                    found=f"{self.report.rows:,} rows, such as {self.report.places['same'][0]}",
                    allowed="two different answers",
                    fix="give the rejected answers; to learn from good answers alone, use objective: sft",
                )
            )

    def count(self, item: Item[JudgedT], encoded: Answers, encoder: Encoder) -> bool:
        report, record, answers = self.report, item.conversation, encoded.answers
        report.longest = max(report.longest, *(len(encoded.prompt) + len(a.ids) + a.cut for a in answers))
        report.special_text += any(a.special_text for a in answers)
        self._count_plain(record, encoder)
        if not all(a.mask.any() for a in answers):
            lost = any(a.targets_cut > 0 for a in answers if not a.mask.any())
            report.too_long += lost
            report.dropped_no_target += not lost
            return False
        if len(answers) == 2 and np.array_equal(answers[0].ids, answers[1].ids):
            report.same_after_cut += 1
            self._place("same_after_cut", item.row)
            return False
        cut = [a.cut > 0 for a in answers]
        report.kept += 1
        report.truncated += any(cut)
        report.tokens_cut += sum(a.cut for a in answers)
        if len(set(cut)) > 1:
            report.cut_one_side += 1
            self._place("cut_one_side", item.row)
        report.tokens += sum(len(encoded.prompt) + len(a.ids) for a in answers)
        report.trained_tokens += sum(int(a.mask.sum()) for a in answers)
        report.merges += encoded.merges
        return True

    def _count_plain(self, record: JudgedT, encoder: Encoder) -> None:
        answer = record.answers[0]
        if answer.plain is None:
            return
        if encoder.as_chat(answer):
            self.report.plain_as_chat += 1
        elif not answer.messages:
            self.report.plain_implicit += encoder.template is not None
        elif not answer.plain[0][-1:].isspace() and not answer.plain[1][:1].isspace():
            self.report.joined_without_space += 1

    def _place(self, name: str, row: Row) -> None:
        places = self.report.places.setdefault(name, [])
        if len(places) < PLACES:
            places.append(f"{row.file}:{row.line}")

    def _where(self) -> str:
        return ", ".join(source.path for source in self.sources)

    def _nothing_left(self, encoder: Encoder) -> Problem:
        if self.report.same_after_cut and self.report.same_after_cut + self.report.same == self.report.rows:
            return Problem(
                what=f"chosen and rejected are the same up to max_length {encoder.max_length} in all rows",
                file=self._where(),
                fix=f"max_length={self.report.longest}, or shorten the prompts",
            )
        return super()._nothing_left(encoder)


class PairPass(PreferencePass[Preference]):
    """A pass over pairs."""

    def format_of(self, row: Row) -> str:
        return pair_format(row.data, self.spec, (row.file, row.line))

    def parse(self, row: Row) -> list[Preference]:
        return [parse_pair(row.data, self.spec, (row.file, row.line), self.labels)]

    def unused(self, kind: str, keys: list[str]) -> list[str]:
        templates = pair_templates(self.spec)
        if kind == "columns":
            return [key for key in unused_columns(templates.values(), keys) if key != "margin" or self.spec.margin]
        return unused_columns([t for t in templates.values() if t.key == "margin"], super().unused(kind, keys))

    def count(self, item: Item[Preference], encoded: Answers, encoder: Encoder) -> bool:
        if not super().count(item, encoded, encoder):
            return False
        chosen, rejected = (int(a.mask.sum()) + a.targets_cut for a in encoded.answers)
        self.report.chosen_longer += chosen > rejected
        self.report.rejected_longer += rejected > chosen
        self.report.length_difference += chosen - rejected
        self.report.margins += item.conversation.margin != 0
        return True


class ThumbPass(PreferencePass[Judgement]):
    """A pass over judged answers; the answers of pairs are judged by which side they are on."""

    def format_of(self, row: Row) -> str:
        return thumb_format(row.data, self.spec, (row.file, row.line))

    def parse(self, row: Row) -> list[Judgement]:
        return parse_thumbs(row.data, self.spec, (row.file, row.line), self.labels)

    def unused(self, kind: str, keys: list[str]) -> list[str]:
        templates = thumb_templates(self.spec)
        if kind == "columns":
            return [key for key in unused_columns(templates.values(), keys) if key != "label" or self.spec.desirable]
        return unused_columns([t for t in templates.values() if t.key == "desirable"], super().unused(kind, keys))

    def count(self, item: Item[Judgement], encoded: Answers, encoder: Encoder) -> bool:
        if not super().count(item, encoded, encoder):
            return False
        self.report.desirable += item.conversation.desirable
        self.report.undesirable += not item.conversation.desirable
        self.report.unpaired += item.conversation.of_pair
        return True

    def finish(self) -> None:
        super().finish()
        ways = {int(key) & 1 for key in self._seen.keys}
        trained = self.role == "train" and (self.side is None or self.side.side == "train")
        if trained and len(ways) == 1:
            good = ways == {1}
            self.problems.add(
                Problem(
                    what=f"all answers are {'desirable' if good else 'undesirable'}",
                    file=self._where(),
                    found=f"{len(self._seen.keys):,} rows with label {'true' if good else 'false'}",
                    allowed="rows of both labels",
                    fix="to learn from good answers alone, use objective: sft" if good else "add good answers",
                )
            )
