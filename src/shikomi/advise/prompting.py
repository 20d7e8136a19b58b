"""Does a prompt solve it? The untouched model with an instruction, and with examples, measured on rows held apart."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shikomi.advise.facts import NO, YES
from shikomi.advise.starter import other_splits
from shikomi.data.check import load_conversations
from shikomi.errors import BadInput, Problem
from shikomi.evaluate.baselines import choose_shots
from shikomi.evaluate.prompts import Prompted, PromptFile
from shikomi.recipe import Source

if TYPE_CHECKING:  # the table is walked without torch; only a measurement needs it
    from shikomi.data.conversation import Conversation
    from shikomi.data.encode import Encoder
    from shikomi.data.scan import Item
    from shikomi.evaluate.run_eval import Evaluation, Task
    from shikomi.metrics import Measurement
    from shikomi.model.language_model import LanguageModel
    from shikomi.progress import Progress

SHOTS = 5
SAMPLE = 50
TARGETS = {"accuracy": 0.9, "chrf": 60.0}
"""From which value on a prompt solves the task, where the user says none; chrF in points."""
NEW_TOKENS = 128  # of an answer that is generated
MOST_ROWS = 20_000  # read for shots and sample


@dataclass(frozen=True)
class Measured:
    """Scores of the untouched model; `file` is the prompt that did best, with the shots that were measured."""

    metric: str
    target: float
    n: int
    zero_shot: Measurement
    few_shot: Measurement | None
    understands: str | None  # None where the scores do not tell
    file: PromptFile
    notes: tuple[str, ...] = ()

    @property
    def prompt(self) -> str:
        """What a prompt reaches: zero-shot, few-shot or no."""
        if self.zero_shot["value"] >= self.target:
            return "zero-shot"
        return "few-shot" if self.few_shot is not None and self.few_shot["value"] >= self.target else NO

    def sentence(self) -> str:
        """The scores for a reader."""
        scores = [f"zero-shot {_shown(self.zero_shot)}"]
        scores += [f"{len(self.file.shots)} shots {_shown(self.few_shot)}"] if self.few_shot is not None else []
        return f"{self.metric} on {self.n} rows: {', '.join(scores)}; solved from {self.target:g} on"

    def as_dict(self) -> dict[str, Any]:
        return {
            "metric": self.metric, "target": self.target, "n": self.n, "zero_shot": self.zero_shot,
            "few_shot": self.few_shot, "shots": len(self.file.shots), "notes": list(self.notes),
        }  # fmt: skip


def _shown(score: Measurement) -> str:
    low, high = score["ci95"]
    return f"{score['value']:.3g} ({low:.3g} to {high:.3g})"


def chosen_shots(file: PromptFile, path: str, shots: int = SHOTS, seed: int = 0) -> PromptFile:
    """The prompt with examples out of a file of rows: with labels as many of each as there is room for, by the seed."""
    return _with_shots(file, _read(file, path), shots, seed)[0]


def measure_prompt(
    lm: LanguageModel,
    encoder: Encoder,
    file: PromptFile,
    path: str,
    *,
    sample: int = SAMPLE,
    shots: int = SHOTS,
    tries: int = 1,
    target: float | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Measured:
    """Scores the prompt with and without examples from `path` on rows that are no examples.

    With several `tries`, sets of examples by as many seeds are compared on half of the sample and the best is scored
    on the other half. Raises BadInput for rows without answers and for too few of them.
    """
    from shikomi.evaluate.run_eval import Task, choose_metrics, sample_rows

    train, held = _two_sides(file, path, sample, seed)
    rows = sample_rows([item.conversation for item in held], sample, seed)
    metrics = choose_metrics(["accuracy"] if file.labels else ["chrf"], file.labels)
    task = Task(rows, encoder, metrics, file.labels, max_new_tokens=NEW_TOKENS, seed=seed)
    name, notes = metrics[0].name, []
    choosing, scoring = (rows[::2], rows[1::2]) if tries > 1 and len(rows) > 1 else (rows, rows)
    candidates = [_with_shots(file, train, shots, seed + i) for i in range(tries if shots else 0)]
    best = candidates[0] if candidates else None
    if tries > 1 and candidates:
        scores = [
            _score(lm, replace(task, rows=choosing), one, progress, f"shots, try {i}").measurements[name]["value"]
            for i, one in enumerate(candidates, 1)
        ]
        best = candidates[scores.index(max(scores))]
        notes.append(f"of {tries} sets of examples the best on {len(choosing)} rows; scored on {len(scoring)} others")
    scored = replace(task, rows=scoring)
    zero = _score(lm, scored, (file, []), progress, "zero-shot")
    few = None if best is None or not best[1] else _score(lm, scored, best, progress, "few-shot")
    systems = [zero] if few is None else [zero, few]
    return Measured(
        name,
        TARGETS[name] if target is None else target,
        len(scoring),
        zero.measurements[name],
        None if few is None else few.measurements[name],
        _understands([one.measurements[name] for one in systems], scored) if file.labels else None,
        file if best is None else best[0],
        (*notes, *dict.fromkeys(note for one in systems for note in one.notes)),
    )


def _understands(scores: Sequence[Measurement], task: Task) -> str:
    """Whether the best prompt is clearly better than always giving the most frequent label."""
    references = task.references()
    majority = max(Counter(references).values()) / len(references)
    return YES if max(score["ci95"][0] for score in scores) > majority else NO


def _score(
    lm: LanguageModel, task: Task, one: tuple[PromptFile, Sequence[Conversation]], progress: Progress | None, what: str
) -> Evaluation:
    from shikomi.evaluate.run_eval import evaluate

    used = Prompted(*one)
    room = max(map(len, task.label_tokens()), default=task.max_new_tokens)
    prompts = [used.encode(row, task.encoder, room) for row in task.rows]
    return evaluate(lm, task, prompts, progress, what)


def _two_sides(file: PromptFile, path: str, sample: int, seed: int) -> tuple[list[Item], list[Item]]:
    """Rows for examples, and rows to score on: those of a validation file beside it, else a part of the same file."""
    train = _read(file, path)
    beside = other_splits(Path(path))[0]
    if beside is not None:
        return train, _read(file, str(beside))
    if len(train) < 2:
        fix = "give more rows with --data, or say it yourself: --prompt-solves"
        raise BadInput([Problem("too few rows to measure a prompt on", path, found=str(len(train)), fix=fix)])
    from shikomi.evaluate.run_eval import sample_rows

    count = min(sample, len(train) // 2)
    held = {id(row) for row in sample_rows([item.conversation for item in train], count, seed)}
    return (
        [item for item in train if id(item.conversation) not in held],
        [item for item in train if id(item.conversation) in held],
    )


def _read(file: PromptFile, path: str) -> list[Item]:
    source = Source(path=path, limit=MOST_ROWS)
    return load_conversations([source], file.spec, file.labels)


def _with_shots(
    file: PromptFile, items: Sequence[Item], shots: int, seed: int
) -> tuple[PromptFile, list[Conversation]]:
    rows = {id(item.conversation): item.row.data for item in items}
    chosen = choose_shots([item.conversation for item in items], shots, seed, balanced=file.labels is not None)
    kept = tuple(_used(file, rows[id(shot)]) for shot in chosen)
    return replace(file, shots=kept), chosen


def _used(file: PromptFile, row: dict[str, Any]) -> dict[str, Any]:
    """The columns of a row that the templates name; a row of another format whole, without what is beside it."""
    if file.prompt is not None:
        templates = f"{file.prompt}{file.completion}"
        return {key: value for key, value in row.items() if f"{{{key}}}" in templates}
    known = ("messages", "conversations", "system", "prompt", "completion", "instruction", "input", "output", "tools")
    return {key: value for key, value in row.items() if key in known}
