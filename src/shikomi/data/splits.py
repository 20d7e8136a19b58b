"""Rows shared out to training, validation and test files, so that nothing of one side is known from another.

Rows stay together that are of one group, have the same prompt, are copies or nearly copies. What must stay together is
a cluster; clusters are shared out by seed, the largest first.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from shikomi.data.columns import cell_text
from shikomi.data.copies import Shingles
from shikomi.data.findings._texts import Reader, Texts, normal
from shikomi.data.problems import Problems
from shikomi.data.readers import data_suffix
from shikomi.data.records import held_rows, kind_of_rows
from shikomi.data.sources import Row, rows
from shikomi.data.writers import WRITERS, replaced, write_rows
from shikomi.errors import BadInput, Problem, nearest
from shikomi.progress import Progress, Silent
from shikomi.recipe import DataSpec

SIDES = ("train", "validation", "test")
TOGETHER = ("prompt", "copy", "near")
"""Why rows stay together, besides a group: the same prompt, the same text, nearly the same text."""

WHY = {"group": "the same group", "prompt": "the same prompt", "copy": "the same text", "near": "nearly the same text"}


@dataclass(frozen=True)
class SplitReport:
    """What a split did. files: of each side; rows: their rows; strata: rows of each value on each side.

    clusters: of two rows or more, `together` rows in all; linked: pairs of rows that were put together, by reason.
    """

    files: dict[str, Path]
    rows: dict[str, int]
    strata: dict[str, dict[str, int]]
    clusters: int
    together: int
    linked: dict[str, int]
    seed: int

    def as_dict(self) -> dict[str, Any]:
        """As JSON data."""
        return {**vars(self), "files": {side: str(path) for side, path in self.files.items()}}

    def lines(self) -> list[str]:
        """The rows of each file, what was kept together, and what the sides have of each value."""
        total = sum(self.rows.values())
        out = [
            f"{self.rows[side]:>8,} rows ({self.rows[side] / total:.1%}): {path}" for side, path in self.files.items()
        ]
        if self.clusters:
            why = ", ".join(f"{WHY[name]} {count:,}" for name, count in self.linked.items())
            out.append(
                f"kept together: {self.together:,} rows in {self.clusters:,} clusters (put to another row by {why})"
            )
        for value, counts in sorted(self.strata.items()):
            out.append(f"  {value}: " + ", ".join(f"{side} {count:,}" for side, count in counts.items()))
        return out


def split_file(
    spec: DataSpec,
    folder: Path,
    shares: Mapping[str, float],
    group: str | None = None,
    stratify: str | None = None,
    seed: int = 0,
    together: Sequence[str] = TOGETHER,
    force: bool = False,
    progress: Progress | None = None,
) -> SplitReport:
    """Writes `train`, `validation` and `test` files with the rows of the first source as they are.

    shares: of validation and test, the rest is trained. group: a column whose rows of one value stay together;
    stratify: a column whose values every side has in equal shares; together: of TOGETHER; force: write over files that
    are there. Raises BadInput with every problem of the rows, and where the clusters do not allow a split.
    """
    shown = progress or Silent()
    kept = {side: share for side, share in shares.items() if share > 0}
    wanted = {"train": 1 - sum(kept.values()), **kept}
    if wanted["train"] <= 0:
        raise BadInput([Problem("nothing is left to train on", found=str(dict(shares)), allowed="a sum below 1")])
    suffix = data_suffix(Path(spec.train[0].path))
    files = {side: folder / f"{side}{suffix if suffix in WRITERS else '.jsonl'}" for side in wanted}
    there = [path for side in SIDES for path in folder.glob(f"{side}.*")]
    if there and not force:
        fix = "choose another --output, or add --force"
        raise BadInput([Problem("is there already", str(path), fix=fix) for path in there])
    shown.phase(f"reading {spec.train[0].path}")
    seen = _read(spec, group, stratify)
    shown.phase("looking for rows that belong together")
    roots, linked = _clusters(seen, together)
    sides = _share_out(roots, seen, wanted, seed)
    counts = Counter(sides)
    shown.phase(f"writing {folder}")
    for side, path in files.items():
        with replaced(path) as temporary:
            write_rows(temporary, lambda side=side: _of_side(spec, sides, side))  # type: ignore[misc]
    sizes = [size for size in Counter(roots).values() if size > 1]
    strata: dict[str, dict[str, int]] = {}
    if stratify is not None:
        for value, side in zip(seen.strata, sides, strict=True):
            strata.setdefault(value, dict.fromkeys(wanted, 0))[side] += 1
    return SplitReport(files, {side: counts[side] for side in wanted}, strata, len(sizes), sum(sizes), linked, seed)


class _Seen:
    """Of each row: keys that it shares with the rows it belongs to, its words, the value that it is stratified by."""

    def __init__(self) -> None:
        self.keys: dict[str, list[str]] = {"group": [], "prompt": [], "copy": []}
        self.strata: list[str] = []
        self.words: list[list[str]] = []

    def __len__(self) -> int:
        return len(self.words)


def _read(spec: DataSpec, group: str | None, stratify: str | None) -> _Seen:
    problems, seen = Problems(), _Seen()
    for row, texts in _texts(spec, (group, stratify), problems):
        for name, table in ((group, seen.keys["group"]), (stratify, seen.strata)):
            if name is not None and name not in row.data:
                close = nearest(name, map(str, row.data))
                fix = f"did you mean `{close}`?" if close else None
                what, allowed = f"there is no column `{name}`", ", ".join(map(str, row.data))
                problems.add(Problem(what, row.file, row.line, allowed=allowed, fix=fix))
            elif name is not None:
                table.append(cell_text(row.data[name]))
        seen.keys["prompt"].append(_key(texts.prompt or texts.own))
        seen.keys["copy"].append(_key("\n".join((texts.own, *texts.answers))))
        seen.words.append(texts.words)
    problems.raise_if_any()
    if len(seen) < 2:
        raise BadInput([Problem("fewer than two rows cannot be split", spec.train[0].path)])
    return seen


def _texts(spec: DataSpec, beside: Sequence[str | None], problems: Problems) -> Iterator[tuple[Row, Texts]]:
    """Each row with its texts; of rows of no known format all columns are their text, but for those in `beside`."""
    kind = kind_of_rows(spec)
    if kind is not None:
        reader = Reader(spec, "train", kind)
        for held in held_rows(spec, kind, problems):
            yield held.row, reader.read(next(held.items()))
        return
    for number, row in enumerate(rows(spec.train[0], problems)):
        own = "\n".join(cell_text(value) for key, value in row.data.items() if key not in beside)
        yield row, Texts(number, row.file, row.line, "train", "rows", "", (), own)


def _key(text: str) -> str:
    return hashlib.blake2b(normal(text).encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()


def _clusters(seen: _Seen, together: Sequence[str]) -> tuple[list[int], dict[str, int]]:
    """(number of each row's cluster, how many rows were put to others for each reason)."""
    parents = list(range(len(seen)))

    def root(row: int) -> int:
        while parents[row] != row:
            parents[row] = parents[parents[row]]
            row = parents[row]
        return row

    linked: dict[str, int] = {}

    def link(one: int, other: int, why: str) -> None:
        a, b = root(one), root(other)
        if a != b:
            parents[max(a, b)] = min(a, b)
            linked[why] = linked.get(why, 0) + 1

    for why, keys in seen.keys.items():
        if why == "group" or why in together:
            first: dict[str, int] = {}
            for row, key in enumerate(keys):
                link(row, first.setdefault(key, row), why)
    if "near" in together:
        known: dict[str, int] = {}
        copies = np.asarray([known.setdefault(key, row) != row for row, key in enumerate(seen.keys["copy"])])
        shingles = Shingles()
        for text in seen.words:
            shingles.add(text)
        for one, other in shingles.near(copies if "copy" in together else None, every=True):
            link(one, other, "near")
    return [root(row) for row in range(len(seen))], linked


def _share_out(clusters: Sequence[int], seen: _Seen, shares: Mapping[str, float], seed: int) -> list[str]:
    """The side of each row. Each cluster goes where the share that is still missing of its strata is largest.

    Raises BadInput where a side stays empty.
    """
    strata = seen.strata or [""] * len(clusters)
    held: dict[int, Counter[str]] = defaultdict(Counter)
    order: dict[int, str] = {}
    for cluster, stratum, key in zip(clusters, strata, seen.keys["copy"], strict=True):
        held[cluster][stratum] += 1
        order[cluster] = min(order.get(cluster, key), key)
    totals = Counter(strata)
    wanted = {side: {s: share * n for s, n in totals.items()} for side, share in shares.items()}
    missing = {side: dict(of) for side, of in wanted.items()}

    def urgency(side: str, inside: Counter[str]) -> float:
        return sum(n * (missing[side][s] - n) / wanted[side][s] for s, n in inside.items())

    chosen: dict[int, str] = {}
    for cluster in sorted(held, key=lambda c: (-held[c].total(), _key(f"{seed} {order[c]}"))):
        inside = held[cluster]
        side = max(shares, key=lambda side: urgency(side, inside))
        chosen[cluster] = side
        for stratum, n in inside.items():
            missing[side][stratum] -= n
    empty = [side for side in shares if side not in chosen.values()]
    if empty:
        largest = max(count.total() for count in held.values())
        raise BadInput(
            [
                Problem(
                    f"no rows are left for {', '.join(empty)}",
                    found=f"{len(held):,} clusters of rows that belong together, the largest of {largest:,} rows",
                    allowed=f"clusters that fit into {min(shares.values()):.0%} of {len(clusters):,} rows",
                    fix="a larger share, another --group, or fewer reasons to keep rows together: --together copy",
                )
            ]
        )
    return [chosen[cluster] for cluster in clusters]


def _of_side(spec: DataSpec, sides: Sequence[str], side: str) -> Iterator[Mapping[str, Any]]:
    for row, where in zip(rows(spec.train[0]), sides, strict=True):
        if where == side:
            yield row.data
