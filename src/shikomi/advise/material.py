"""What there is to learn from: files that are looked at and counted, or numbers of rows that are expected."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from shikomi.advise.facts import AMOUNTS, NO, YES, amount
from shikomi.data.detect import Detected, detect
from shikomi.data.preferences import answer_of, parse_pair
from shikomi.data.sources import rows
from shikomi.errors import BadInput, Problem
from shikomi.plan.lengths import CHARACTERS_PER_TOKEN
from shikomi.recipe import DataSpec, Source

LONGER_SHARE = 2 / 3
"""Of the pairs, in how many the chosen answer is the longer one, from which on length alone tells them apart."""

KINDS = {"text": "text", "preference": "pairs", "unpaired_preference": "thumbs"}  # by a file's format; others are rows
FLAGS = {"rows": "--data", "pairs": "--pairs", "thumbs": "--thumbs", "text": "--text"}
KEYS = {
    "rows": '{"prompt": ..., "completion": ...}',
    "pairs": '{"prompt": ..., "chosen": ..., "rejected": ...}',
    "thumbs": '{"prompt": ..., "completion": ..., "label": true or false}',
    "text": '{"text": ...}',
}


@dataclass(frozen=True)
class Material:
    """One kind of data: a file with what was found in it, or only a count (rows; of text, tokens)."""

    kind: str
    count: int
    path: str
    detected: Detected | None = None  # None: the file is not there yet

    @property
    def amount(self) -> str:
        return amount(self.kind, self.count)

    @property
    def shown(self) -> str:
        """For a reader: how much, and where."""
        what = "tokens of text" if self.kind == "text" else self.kind
        return f"{self.count:,} {what}" + (f" in {self.path}" if self.detected is not None else "")

    @property
    def rows(self) -> int:
        """Rows to train on; of text that is not there yet, nothing is known."""
        if self.kind != "text":
            return self.count
        return 0 if self.detected is None else counted(self.detected)

    @cached_property
    def longer(self) -> str:
        """Whether the chosen answers are mostly the longer ones. Raises BadInput for a row that is no pair."""
        if self.kind != "pairs" or self.detected is None:
            return NO
        spec = DataSpec(train=(Source(path=self.path),))
        pairs = [parse_pair(row.data, spec, (row.file, row.line), None) for row in rows(spec.train[0])]
        longer = sum(len(str(answer_of(p.chosen))) > len(str(answer_of(p.rejected))) for p in pairs)
        return YES if longer > LONGER_SHARE * len(pairs) else NO


@dataclass(frozen=True)
class Materials:
    """All there is, by kind."""

    by_kind: dict[str, Material] = field(default_factory=dict)

    def get(self, kind: str) -> Material | None:
        return self.by_kind.get(kind)

    def amount(self, kind: str) -> str:
        return self.by_kind[kind].amount if kind in self.by_kind else AMOUNTS[0]


def materials(given: Sequence[tuple[str, str]]) -> Materials:
    """From (kind, FILE or COUNT) as flags give them; a file of another kind under `--data` is taken as what it is.

    Raises BadInput with every problem of every file.
    """
    found: dict[str, Material] = {}
    problems: list[Problem] = []
    for kind, text in given:
        try:
            one = _material(kind, text)
        except BadInput as error:
            problems += error.problems
            continue
        if one.kind in found:
            fix = f"give {one.kind} once: {FLAGS[one.kind]}"
            problems.append(
                Problem(f"{one.kind} are given twice", found=f"{found[one.kind].path}, {one.path}", fix=fix)
            )
        found[one.kind] = one
    if problems:
        raise BadInput(problems)
    return Materials(found)


def counted(found: Detected) -> int:
    """All rows of a file that was looked at."""
    return sum(1 for _ in rows(Source(path=found.path))) if found.at_least else found.rows


def _material(kind: str, text: str) -> Material:
    digits = text.replace(",", "").replace("_", "")
    if digits.isascii() and digits.isdigit():
        return Material(kind, int(digits), f"{kind}.jsonl")
    if not Path(text).exists() and text.lstrip("+-").replace(".", "").isdigit():
        raise BadInput([Problem(f"{FLAGS[kind]} is neither a file nor a count", found=text, allowed="FILE or COUNT")])
    found = detect(text)
    real = KINDS.get(found.format, "rows")
    if real != kind and kind != "rows":
        fix = f"{FLAGS[real]} {text}"
        raise BadInput([Problem(f"{FLAGS[kind]}: the file holds {real}", text, found=found.format, allowed=KEYS[kind],
                                fix=fix)])  # fmt: skip
    count = _tokens(found) if real == "text" else counted(found)
    return Material(real, count, text, found)


def _tokens(found: Detected) -> int:
    characters = sum(len(str(row.data.get("text", ""))) for row in rows(Source(path=found.path)))
    return round(characters / CHARACTERS_PER_TOKEN)
