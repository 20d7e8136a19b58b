"""One model on one set of rows: predictions, then every metric with its interval."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from shikomi import registry
from shikomi.data.conversation import Conversation
from shikomi.data.encode import Encoder
from shikomi.data.packing import Example, micro_batches, pack, pack_tree
from shikomi.errors import BadInput, Problem
from shikomi.evaluate.baselines import answer_of
from shikomi.evaluate.labels import MICRO_BATCH_TOKENS, prompt_groups, score_labels
from shikomi.evaluate.outcomes import label_nll
from shikomi.metrics import Measurement, Metric, measure
from shikomi.model.language_model import LanguageModel
from shikomi.progress import Progress, Silent

PROMPTS_AT_ONCE = 16
"""Prompts handed to the generator together; similar lengths, so that little of a batch is padding."""


@dataclass(frozen=True)
class Task:
    """Rows with reference answers and how they are scored; the same object for every system that is compared."""

    rows: tuple[Conversation, ...]
    encoder: Encoder
    metrics: tuple[Metric, ...]
    labels: tuple[str, ...] | None = None
    """The label set: then the answer is the most probable label, and nothing is generated."""
    max_new_tokens: int = 64
    max_length: int = 1024
    """Tokens that a few-shot prompt with its answer may have."""
    micro_batch_tokens: int = MICRO_BATCH_TOKENS
    seed: int = 0

    def needs(self, kind: str) -> bool:
        """Whether a metric takes this kind of predictions: labels, text, logp."""
        return any(metric.needs == kind for metric in self.metrics)

    def references(self) -> list[str]:
        """The reference answer of every row."""
        return [answer_of(row) or "" for row in self.rows]

    def label_tokens(self) -> list[list[int]]:
        """Tokens of every label as an answer, end of turn included."""
        return [self.encoder.encode_answer(label) for label in self.labels or ()]


@dataclass(frozen=True)
class Evaluation:
    """What one system answered and how good that is."""

    predictions: tuple[str, ...]  # empty where only log-probabilities were asked for
    logp: tuple[float, ...]  # summed log-probability (nats) of each reference answer; empty where not asked for
    tokens: tuple[int, ...]  # tokens that each logp sums over
    measurements: dict[str, Measurement]
    seconds: float
    notes: tuple[str, ...] = ()
    settings: dict[str, Any] = field(default_factory=dict)
    label_nll: tuple[float | None, ...] = ()  # see outcomes.label_nll; empty where there is no label set

    def inputs(self, metric: Metric, task: Task) -> tuple[Sequence[Any], Sequence[Any]]:
        """Predictions and references of a metric; predictions are empty where this system has none for it."""
        if metric.needs == "logp":
            return self.logp, self.tokens
        return self.predictions, task.references()

    def to_json(self) -> dict[str, Any]:
        """Its place in result.json."""
        n = max(len(self.predictions), len(self.logp))
        return {"n": n, "seconds": round(self.seconds, 3), **self.settings, "metrics": self.measurements}


def choose_metrics(names: Sequence[str], labels: Sequence[str] | None) -> tuple[Metric, ...]:
    """Metrics by name; without names, those of the kind of task.

    Raises BadInput for an unknown name, and for a metric of labels where there is no label set.
    """
    if not names:
        names = ("accuracy", "macro_f1") if labels else ("exact_match", "chrf")
    metrics: list[Metric] = [registry.find("metrics", name)() for name in dict.fromkeys(names)]
    homeless = [metric.name for metric in metrics if metric.needs == "labels"]
    if homeless and not labels:
        fix = "give data.labels (or --labels); for free text use exact_match, rouge or chrf"
        raise BadInput([Problem(f"{' and '.join(homeless)} need a label set, and this task has none", fix=fix)])
    return tuple(metrics)


def sample_rows(rows: Sequence[Conversation], limit: int | None, seed: int) -> tuple[Conversation, ...]:
    """At most `limit` rows, drawn by `seed` (files are often sorted) and kept in their order."""
    if limit is None or limit >= len(rows):
        return tuple(rows)
    chosen = np.random.default_rng([seed, 0x11317]).choice(len(rows), limit, replace=False)
    return tuple(rows[i] for i in sorted(chosen.tolist()))


def check_rows(task: Task) -> list[str]:
    """What to tell about the rows of a task. Raises BadInput for no rows, or ones without an answer to compare with."""
    if not task.rows:
        raise BadInput([Problem("there are no rows to evaluate on", fix="give data.test, or a file with rows")])
    if not (task.needs("labels") or task.needs("text")):
        return []
    bare = [number for number, row in enumerate(task.rows, start=1) if answer_of(row) is None]
    if bare:
        shown = ", ".join(map(str, bare[:10])) + (", ..." if len(bare) > 10 else "")
        fix = "add answers, or evaluate with loss and perplexity only"
        raise BadInput([Problem("rows without a reference answer", found=f"row {shown}", fix=fix)])
    if task.labels is None:
        return []
    unknown = sorted(set(task.references()) - set(task.labels))
    if not unknown:
        return []
    count = sum(reference in unknown for reference in task.references())
    if count == len(task.rows):
        raise BadInput([Problem("no row's answer is a label", found=repr(unknown[0]), allowed=", ".join(task.labels))])
    shown = ", ".join(unknown[:5]) + (", ..." if len(unknown) > 5 else "")
    return [f"{count:,} rows count as wrong for every system: their answer is not a label ({shown})"]


def evaluate(
    model: LanguageModel,
    task: Task,
    prompts: Sequence[Sequence[int]] | None = None,
    progress: Progress | None = None,
    what: str = "evaluating",
) -> Evaluation:
    """The model's answers to all rows and every metric of the task.

    `prompts` replace the rows' own (few-shot). Labels are scored by constrained decoding, other answers generated
    greedily; loss and perplexity come from the log-probabilities of the trained tokens, or with `prompts` of the last
    answer. Raises BadInput where the rows do not fit the metrics.
    """
    progress = progress or Silent()
    notes = check_rows(task)
    start = time.perf_counter()
    model.bind_dropout(None)
    given = prompts
    predictions: tuple[str, ...] = ()
    nll: tuple[float | None, ...] = ()
    logp, tokens = np.zeros(0), np.zeros(0, np.int64)
    if task.needs("labels") or task.needs("text"):
        prompts = prompts or [task.encoder.encode_prompt(row) for row in task.rows]
        if task.labels is None:
            predictions = generated(model, task.encoder, prompts, task.max_new_tokens, progress, what)
        else:
            labels, size = task.label_tokens(), task.micro_batch_tokens
            scores = score_labels(model, prompts, labels, size, progress, what)
            predictions = tuple(task.labels[i] for i in scores.argmax(axis=1))
            nll = label_nll(scores, task.labels, task.references())
    if task.needs("logp"):
        if given is None:
            logp, tokens = row_logp(model, task, progress, f"{what}: loss")
        else:
            logp, tokens = answer_logp(model, task, given, progress, f"{what}: loss")
    unmeasured = Evaluation(
        predictions,
        tuple(logp.tolist()),
        tuple(tokens.tolist()),
        {},
        time.perf_counter() - start,
        tuple(notes),
        label_nll=nll,
    )
    return measured(unmeasured, task)


def measured(evaluation: Evaluation, task: Task) -> Evaluation:
    """The evaluation with every metric of the task that it has predictions for."""
    measurements = {}
    for metric in task.metrics:
        predictions, references = evaluation.inputs(metric, task)
        if len(predictions):
            measurements[metric.name] = measure(metric, predictions, references, task.seed)
    return replace(evaluation, measurements=measurements)


def generated(
    model: LanguageModel,
    encoder: Encoder,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    progress: Progress,
    what: str,
) -> tuple[str, ...]:
    """The answer to every prompt, each token the most probable one (greedy), as text without special tokens."""
    answers = [""] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    progress.tick(0, len(prompts), what)
    for start in range(0, len(order), PROMPTS_AT_ONCE):
        some = order[start : start + PROMPTS_AT_ONCE]
        ids = model.generate([list(prompts[i]) for i in some], max_new_tokens=max_new_tokens, temperature=0.0)
        for i, tokens in zip(some, ids, strict=True):
            answers[i] = encoder.decode_answer(tokens)
        progress.tick(start + len(some), len(prompts), what)
    return tuple(answers)


def row_logp(model: LanguageModel, task: Task, progress: Progress, what: str) -> tuple[np.ndarray, np.ndarray]:
    """Summed log-probability (n,) of the trained tokens of every row, and their number (n,): what training minimises.

    A row that truncation leaves without a trained token counts with no tokens. Raises BadInput where all are such.
    """
    examples = []
    for number, row in enumerate(task.rows):
        encoded = task.encoder.encode(row)
        if encoded.mask.any():
            examples.append(Example(encoded.ids, encoded.mask, number))
    if not examples:
        raise BadInput([Problem("no row has a token to score", fix="raise max_length, or check the answers")])
    logp, tokens = np.zeros(len(task.rows)), np.zeros(len(task.rows), np.int64)
    done = 0
    for batch in micro_batches(examples, task.micro_batch_tokens):
        packed = pack(batch)
        with torch.no_grad():
            scored = model.score(packed)
        segment, values = scored.segment.cpu().numpy(), scored.logp.double().cpu().numpy()
        logp[packed.rows] = np.bincount(segment, values, len(batch))
        tokens[packed.rows] = np.bincount(segment, minlength=len(batch))
        done += len(batch)
        progress.tick(done, len(examples), what)
    return logp, tokens


def answer_logp(
    model: LanguageModel, task: Task, prompts: Sequence[Sequence[int]], progress: Progress, what: str
) -> tuple[np.ndarray, np.ndarray]:
    """Summed log-probability (n,) of every row's reference answer after its prompt, and its tokens (n,)."""
    answers = [task.encoder.encode_answer(reference) for reference in task.references()]
    logp = np.zeros(len(prompts))
    done = 0
    for rows in prompt_groups(prompts, max(map(len, answers)), task.micro_batch_tokens):
        with torch.no_grad():
            scored = model.score(pack_tree([prompts[i] for i in rows], [[answers[i]] for i in rows]))
        segment, values = scored.segment.cpu().numpy(), scored.logp.double().cpu().numpy()
        logp[rows] = np.bincount(segment, values, len(rows))
        done += len(rows)
        progress.tick(done, len(prompts), what)
    return logp, np.array([len(answer) for answer in answers])
