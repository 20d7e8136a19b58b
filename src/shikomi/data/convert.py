"""Rows of one format as rows of another: what the other cannot hold is refused, or left out when that is allowed.

Every file is read back and compared with what was meant before it gets its name.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shikomi.data.conversation import Conversation
from shikomi.data.dialects import KEYS
from shikomi.data.formats import recognise
from shikomi.data.preferences import Judgement, Preference, recognise_preference
from shikomi.data.problems import Problems
from shikomi.data.records import Held, Record, held_rows, kind_of_rows
from shikomi.data.rewrite import TARGETS, Cannot, Written, is_plain
from shikomi.data.writers import check_suffix, replaced, write_rows
from shikomi.errors import BadInput, Problem
from shikomi.progress import Progress, Silent
from shikomi.recipe import DataSpec, Source

KINDS = {"preference": ("pairs",), "unpaired_preference": ("thumbs", "pairs")}
"""Kinds of rows that the formats of preferences can be made of."""


@dataclass
class Converted:
    """Counts of a conversion; `lost` and `notes` have a sentence and in how many rows it is so."""

    read: int = 0
    written: int = 0
    left_out: int = 0
    lost: dict[str, int] = field(default_factory=dict)
    notes: dict[str, int] = field(default_factory=dict)
    first: dict[str, tuple[str, int]] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """As JSON data."""
        return {key: value for key, value in vars(self).items() if key != "first"}

    def lines(self) -> list[str]:
        """What was lost, and what other tools read otherwise, one sentence each."""
        out = [f"left out: {what}, in {count:,} rows" for what, count in self.lost.items()]
        return out + [
            f"note: {count:,} rows hold {what}, which other tools may not read" for what, count in self.notes.items()
        ]

    def count(self, lost: Sequence[str], notes: Sequence[str], held: Held) -> None:
        """One record's."""
        for names, table in ((lost, self.lost), (notes, self.notes)):
            for name in names:
                table[name] = table.get(name, 0) + 1
                self.first.setdefault(name, (held.row.file, held.row.line))


def convert(
    spec: DataSpec,
    target: str,
    out: Path,
    allow_loss: bool = False,
    drop: Sequence[str] = (),
    progress: Progress | None = None,
) -> Converted:
    """Writes the rows of the first source of `spec` to `out` in the format `target`, a file of its suffix.

    Columns that the format does not read are kept, but for `drop`. Raises BadInput with every problem of the rows, and
    for what the target cannot hold: with `allow_loss` that is left out and counted. Nothing is written then.
    """
    shown = progress or Silent()
    check_suffix(out)
    kind = kind_of_rows(spec) or "conversations"
    if kind == "conversations" and target in KINDS or target in KINDS and kind not in KINDS[target]:
        raise BadInput([_wrong_kind(kind, target)])
    plan = _Plan(spec, kind, target, allow_loss, frozenset(drop))
    shown.phase(f"reading {spec.train[0].path}")
    done = plan.check()
    shown.phase(f"writing {out}")
    with replaced(out) as temporary:
        done.written = write_rows(temporary, plan.rows)
        shown.phase(f"reading {out} back")
        plan.compare(temporary, out)
    return done


class _Plan:
    """The rows of a conversion, made twice: once to check them all, once to write them."""

    def __init__(self, spec: DataSpec, kind: str, target: str, allow_loss: bool, drop: frozenset[str]) -> None:
        self.spec, self.kind, self.target = spec, kind, target
        self.allow_loss, self.drop = allow_loss, drop
        self.as_lists = False  # strings for prompts and answers, where all rows can be written so
        self.meant: list[bytes] = []

    def check(self) -> Converted:
        """Counts and problems of all rows. Raises BadInput."""
        problems, done, plain = Problems(), Converted(), True
        for held in held_rows(self.spec, self.kind, problems):
            done.read += 1
            plain = plain and all(is_plain(record) for record in held.records)
            problems.add(self._collisions(held))
        problems.raise_if_any()
        self.as_lists = not plain
        formats = set()
        for held, written in self._written(problems):
            formats.add(held.format)
            if isinstance(written, Cannot):
                done.left_out += 1
                done.count([written.why], (), held)
            else:
                done.count(written.lost, written.notes, held)
        problems.raise_if_any()
        if done.lost and not self.allow_loss:
            raise BadInput([_loss(what, count, done, self.target) for what, count in done.lost.items()])
        if done.left_out and not any(not isinstance(w, Cannot) for _, w in self._written(problems)):
            raise BadInput([Problem(f"no row can be written as {self.target}", self.spec.train[0].path)])
        return done

    def _written(self, problems: Problems) -> Iterator[tuple[Held, Written | Cannot]]:
        for held in held_rows(self.spec, self.kind, problems):
            if held.format == self.target:  # only the kind of file changes
                row = {key: value for key, value in held.row.data.items() if key not in self.drop}
                yield held, Written([row], [content(record) for record in held.records])
                continue
            kept = {key: held.row.data[key] for key in held.others if key not in self.drop}
            for record in held.records:
                made = TARGETS[self.target](record, self.as_lists)
                if isinstance(made, Written):
                    rows = [{**row, **kept} for row in made.rows]
                    made = Written(rows, [content(r) for r in made.records], made.lost, made.notes)
                yield held, made

    def rows(self) -> Iterator[dict[str, Any]]:
        """The rows to write; `meant` is filled with what they hold."""
        self.meant = []
        problems = Problems()
        for _, written in self._written(problems):
            if isinstance(written, Written):
                self.meant += [_hash(record) for record in written.records]
                yield from written.rows
        problems.raise_if_any()

    def compare(self, written: Path, out: Path) -> None:
        """Raises BadInput where the file does not hold what was meant."""
        problems = Problems()
        spec = DataSpec(train=(Source(path=str(written)),), format=self.target)  # type: ignore[arg-type]
        kind = {"preference": "pairs", "unpaired_preference": "thumbs"}.get(self.target, "conversations")
        at = 0
        for held in held_rows(spec, kind, problems):
            for record in held.records:
                if at >= len(self.meant) or _hash(content(record)) != self.meant[at]:
                    what = f"{out.suffix} does not keep this row as it is"
                    found = json.dumps(held.row.data, ensure_ascii=False, default=str)[:120]
                    raise BadInput([Problem(what, str(out), held.row.line, found, fix="write jsonl")])
                at += 1
        if problems.count:
            what = f"what was written cannot be read back from {out.suffix}: {problems.all()[0].what}"
            raise BadInput([Problem(what, str(out), fix="write jsonl")])
        if at != len(self.meant):
            raise BadInput([Problem(f"{out.suffix} does not keep all rows", str(out), fix="write jsonl")])

    def _collisions(self, held: Held) -> list[Problem]:
        """Columns beside the format that would be read as part of the new one, or make it another."""
        if held.format == self.target:
            return []
        others = [key for key in held.others if key not in self.drop]
        wrong = [key for key in others if key in KEYS[self.target]]
        row = dict.fromkeys(KEYS[self.target][:3], "") | (
            {"label": True} if self.target == "unpaired_preference" else {}
        )
        for key in others:
            also = row | {key: held.row.data[key]}
            if key not in wrong and (recognise_preference(also) or recognise(also)) != self.target:
                wrong.append(key)
        what = f"a column beside the {held.format} keys would be read as part of {self.target}"
        place = (held.row.file, held.row.line)
        return [Problem(what, *place, found=key, fix=f"leave it out: --drop {key}") for key in wrong]


def content(record: Record) -> list[Any]:
    """What a record says, as JSON data: turns with which of them are trained, answers with how they were judged."""
    if isinstance(record, Preference):
        return ["pair", _turns(record.chosen), _turns(record.rejected), record.margin]
    if isinstance(record, Judgement):
        return ["thumb", _turns(record.conversation), record.desirable]
    return ["row", _turns(record)]


def _turns(conversation: Conversation) -> list[Any]:
    if not conversation.messages:
        return [conversation.text, conversation.plain]
    turns = []
    for at, message in enumerate(conversation.messages):
        trained = message["role"] == "assistant" and at >= conversation.completion_from
        kept = {key: value for key, value in message.items() if key != "train"}
        turns.append([kept, trained and message.get("train") is not False])
    return [turns, conversation.tools]


def _hash(said: list[Any]) -> bytes:
    return hashlib.sha256(json.dumps(said, sort_keys=True, default=str).encode("utf-8", "surrogatepass")).digest()[:12]


def _wrong_kind(kind: str, target: str) -> Problem:
    if kind == "conversations":
        fix = "shikomi data pairs samples second answers from a model"
        return Problem(f"rows with one answer cannot become {target}", allowed="rows of preferences", fix=fix)
    fix = "objective: kto trains on judged answers as they are"
    return Problem("judged answers cannot become pairs: nothing says which belong together", fix=fix)


def _loss(what: str, count: int, done: Converted, target: str) -> Problem:
    file, line = done.first[what]
    fix = "--allow-loss writes the rest, or choose another format"
    return Problem(f"{target} cannot hold {what}", file, line, found=f"{count:,} rows", fix=fix)
