"""What the trainer is fed, to look at: rows as tokens, and how the rows of an optimizer step share micro-batches."""

import copy
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from shikomi.data.check import SCANS
from shikomi.data.packing import Packed
from shikomi.data.pairs import PackedPreferences, Pair
from shikomi.data.shown import Span, brackets, spans
from shikomi.errors import BadInput, Problem
from shikomi.progress import Progress
from shikomi.recipe import build
from shikomi.recipe.schema import Recipe, Stage
from shikomi.steps.prepare import StageData, stage_data
from shikomi.train.step import Plan, plan_step


@dataclass(frozen=True)
class ShownPart:
    """One stretch of a row: `text` of a conversation, else prompt, chosen, rejected, desirable, undesirable.

    cut: the tokens that `max_length` took from its end.
    """

    name: str
    tokens: tuple[Span, ...]
    cut: tuple[Span, ...] = ()

    @property
    def ids(self) -> list[int]:
        return [i for span in self.tokens for i in span.ids]

    @property
    def trained(self) -> int:
        """How many of the tokens are trained."""
        return sum(len(span.ids) for span in self.tokens if span.trained)


@dataclass(frozen=True)
class ShownRow:
    """A row, counted from 1, where it stands, and its parts."""

    row: int
    file: str
    line: int
    parts: tuple[ShownPart, ...]


@dataclass(frozen=True)
class ShownSegment:
    """A stretch of the packed row: what it holds, for which rows, behind which earlier segment (-1: none)."""

    name: str  # row, prompt, beginning (of several rows or prompts), or the name of an answer
    rows: tuple[int, ...]
    parent: int
    tokens: int
    trained: int


@dataclass(frozen=True)
class ShownBatch:
    """A micro-batch: its tokens without sharing, those that are computed, and its segments in the order of the row."""

    tokens: int
    computed: int
    segments: tuple[ShownSegment, ...]


@dataclass(frozen=True)
class ShownStage:
    """A stage: counts over all its rows, the optimizer step that is shown (from 1), its micro-batches and rows.

    No step is shown where the row that was asked for is in none of the first epoch.
    """

    name: str
    kind: str
    objective: str
    counts: dict[str, int]
    max_length: int
    step: int | None
    steps: int
    micro_batch_tokens: int
    batches: tuple[ShownBatch, ...]
    mismatched: int  # micro-batches of prompts with the answers to others, for KTO's baseline
    rows: tuple[ShownRow, ...]

    def as_dict(self) -> dict[str, Any]:
        """As JSON data; tokens of a part as ids, their texts and 1 for each trained one."""
        rows = []
        for row in self.rows:
            parts = []
            for part in row.parts:
                trained = [int(span.trained) for span in part.tokens for _ in span.ids]
                cut = {"tokens": sum(len(span.ids) for span in part.cut), "text": text_of(part.cut)}
                parts.append({"name": part.name, "text": text_of(part.tokens), "marked": brackets(part.tokens),
                              "ids": part.ids, "trained": trained, "cut": cut})  # fmt: skip
            rows.append({"row": row.row, "file": row.file, "line": row.line, "parts": parts})
        plain = {key: value for key, value in vars(self).items() if key not in ("batches", "rows")}
        return {**plain, "batches": [asdict(batch) for batch in self.batches], "rows": rows}


def text_of(tokens: Sequence[Span]) -> str:
    """The text that tokens stand for."""
    return "".join(span.text for span in tokens)


def preview(recipe: Recipe, progress: Progress, rows: int = 3, row: int | None = None) -> list[ShownStage]:
    """Each stage as it is trained: of the first step, or of the first that has `row` (from 1), and up to `rows` rows.

    Tokens come from the run's own cache, packing from the step's own plan; no weights are loaded. Raises BadInput with
    every problem of recipe and data, and for a row that is not there.
    """
    progress.phase("reading the data")
    found = stage_data(recipe, progress)
    return [
        _stage(recipe, stage, data, rows, None if row is None else row - 1)
        for stage, data in zip(recipe.stages, found, strict=True)
    ]


def _stage(recipe: Recipe, stage: Stage, data: StageData, rows: int, row: int | None) -> ShownStage:
    if row is not None and not 0 <= row < len(data.store):
        what, allowed = f"there is no such row in stage {stage.name}", f"1 to {len(data.store):,}"
        raise BadInput([Problem(what, found=str(row + 1), allowed=allowed, fix="rows that are left out do not count")])
    step = 0 if row is None else _step_of(data, row)
    objective = build("objectives", stage.objective)
    plan, batches = None, []
    if step is not None:
        how = (stage.micro_batch_tokens, stage.share_prefix, data.kind, objective.needs, recipe.max_length)
        plan = plan_step(data.examples(step), *how)
        batches = [_batch(data, plan, index) for index in range(len(plan.micro))]
    shown = [row] if row is not None else _first_rows(batches)[:rows]
    report = data.store.report
    counts = {"rows": len(data.store), "tokens": report.tokens, "trained_tokens": report.trained_tokens}
    return ShownStage(
        stage.name,
        data.kind,
        stage.objective.name,
        {**counts, "longest": report.longest, "truncated": report.truncated},
        recipe.max_length,
        None if step is None else step + 1,
        data.total_steps,
        stage.micro_batch_tokens,
        tuple(batches),
        0 if plan is None else len(plan.mismatched),
        tuple(_rows(data, shown, recipe.max_length, "prompt_logp" in objective.needs)),
    )


def _step_of(data: StageData, row: int) -> int | None:
    """The first step that trains a row; None where the first epoch has none (a source of small weight)."""
    last = min(data.steps_per_epoch, data.total_steps)
    return next((step for step in range(last) if row in data.steps.indices(step)), None)


def _first_rows(batches: Sequence[ShownBatch]) -> list[int]:
    """The rows of a step in the order of its micro-batches, from 0."""
    rows = (row for batch in batches for segment in batch.segments for row in segment.rows)
    return [row - 1 for row in dict.fromkeys(rows)]


def _batch(data: StageData, plan: Plan, index: int) -> ShownBatch:
    packed = plan.micro[index]
    preferences = plan.preferences[index] if plan.preferences else None
    owner = _conversations(data, packed) if preferences is None else _answers(packed, preferences)
    answers = _names(data, packed, preferences)
    counts = np.bincount(packed.segment.numpy(), minlength=len(packed.rows))
    under: dict[int, list[int]] = defaultdict(list)  # examples of each segment and of those behind it
    for example, segment in enumerate(owner):
        while segment >= 0:
            under[segment].append(example)
            segment = packed.parents[segment]
    at = {segment: example for example, segment in enumerate(owner)}
    prompts = set() if preferences is None else {packed.parents[segment] for segment in owner}
    segments = []
    for segment, (length, parent) in enumerate(zip(packed.lengths, packed.parents, strict=True)):
        rows = tuple(dict.fromkeys(packed.rows[example] + 1 for example in under[segment]))
        name = answers[at[segment]] if segment in at else "prompt" if segment in prompts else "beginning"
        scored = preferences is not None and preferences.prompt_tokens  # all of each prompt but its first token
        trained = int(counts[at[segment]]) if segment in at else length - (parent < 0) if scored else 0
        segments.append(ShownSegment(name, rows, parent, length, trained))
    return ShownBatch(packed.n_tokens, len(packed.ids), tuple(segments))


def _conversations(data: StageData, packed: Packed) -> list[int]:
    """The segment that ends each example, found by the tokens: those of a segment behind its parents are the row's."""
    wanted: dict[bytes, list[int]] = defaultdict(list)
    for example, row in enumerate(packed.rows):
        wanted[data.store[row].ids.astype(np.int64).tobytes()].append(example)
    owner = [-1] * len(packed.rows)
    parts = np.split(packed.ids.numpy(), packed.offsets[1:])
    for segment in set(range(len(parts))) - set(packed.parents):
        chain, at = parts[segment], packed.parents[segment]
        while at >= 0:
            chain, at = np.concatenate([parts[at], chain]), packed.parents[at]
        owner[wanted[chain.tobytes()].pop(0)] = segment
    return owner


def _answers(packed: Packed, preferences: PackedPreferences) -> list[int]:
    return [bisect_right(packed.offsets, end) - 1 for end in preferences.ends]


def _names(data: StageData, packed: Packed, preferences: PackedPreferences | None) -> list[str]:
    """What each example of a micro-batch is called."""
    if preferences is None:
        return ["row"] * len(packed.rows)
    better, worse = ("chosen", "rejected") if data.kind == "pairs" else ("desirable", "undesirable")
    chosen = set(preferences.chosen)
    return [better if number in chosen else worse for number in range(len(packed.rows))]


def _rows(data: StageData, rows: Sequence[int], max_length: int, prompts: bool = False) -> list[ShownRow]:
    """Rows as tokens; of those that reach `max_length` what was cut too, from the data as they stand in the file.

    prompts: the prompts of preferences are trained as well.
    """
    examples = [data.store[row] for row in rows]
    full = [e for e in examples if any(len(p) + len(ids) >= max_length for _, p, ids, _ in _parts(data.kind, e))]
    whole = _uncut(data, full) if full else {}
    found = []
    for row, example in zip(rows, examples, strict=True):
        tokenizer, parts = data.encoder.tokenizer, []
        uncut = whole.get(row)
        if data.kind != "conversations":
            scored = [prompts and at > 0 for at in range(len(example.prompt))]
            parts.append(ShownPart("prompt", tuple(spans(tokenizer, example.prompt.tolist(), scored))))
        for index, (name, prompt, ids, mask) in enumerate(_parts(data.kind, example)):
            tokens = spans(tokenizer, ids.tolist(), mask.tolist(), prompt.tolist())
            cut: list[Span] = []
            if uncut is not None:
                lost, lost_mask = (part[len(ids) :].tolist() for part in uncut[index])
                cut = spans(tokenizer, lost, lost_mask, [*prompt.tolist(), *ids.tolist()])
            parts.append(ShownPart(name, tuple(tokens), tuple(cut)))
        found.append(ShownRow(row + 1, *data.store.where(row), tuple(parts)))
    return found


_Part = tuple[str, np.ndarray, np.ndarray, np.ndarray]


def _parts(kind: str, example: Any) -> list[_Part]:
    """(name, what stands before it, ids, mask) of a conversation, or of each answer."""
    if kind == "conversations":
        return [("text", np.zeros(0, np.int32), example.ids, example.mask)]
    names = ("chosen", "rejected") if isinstance(example, Pair) else _judged(example.desirable)
    answers = zip(names, example.completions, strict=True)
    return [(name, example.prompt, answer.ids, answer.mask) for name, answer in answers]


def _judged(desirable: bool) -> tuple[str]:
    return ("desirable",) if desirable else ("undesirable",)


def _uncut(data: StageData, examples: Sequence[Any]) -> dict[int, list[tuple[np.ndarray, np.ndarray]]]:
    """(ids, mask) of the parts of each row without `max_length`, by the row's number: the file is read once more."""
    encoder = copy.copy(data.encoder)
    encoder.max_length = None
    thumbs = data.kind == "thumbs"  # a pair gives two of them from one line
    waiting = {(*data.store.where(e.row), e.desirable if thumbs else None): e.row for e in examples}
    scan = SCANS[data.kind](data.spec.train, data.spec, data.labels, "train", data.side)
    found: dict[int, list[tuple[np.ndarray, np.ndarray]]] = {}
    for item in scan:
        side = item.conversation.desirable if thumbs else None
        number = waiting.pop((item.row.file, item.row.line, side), None)
        if number is not None:
            [encoded] = scan.encode(encoder, [item.conversation])
            if isinstance(encoded, BadInput):
                raise encoded
            parts = [encoded] if data.kind == "conversations" else encoded.answers
            found[number] = [(part.ids, part.mask) for part in parts]
        if not waiting:
            break
    return found


def marked(data: StageData) -> str:
    """The first row as text, what is trained between double brackets; each answer of a preference by itself."""
    [row] = _rows(data, [0], data.encoder.max_length or 0)
    first, *answers = row.parts
    return "\n".join([brackets(first.tokens), *(f"{part.name}: {brackets(part.tokens)}" for part in answers)])
