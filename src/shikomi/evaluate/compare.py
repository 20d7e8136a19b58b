"""Was it worth it? The untouched model with good prompts against the trained one, on the same rows."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from shikomi.data.conversation import Conversation
from shikomi.errors import BadInput, Problem
from shikomi.evaluate.baselines import (
    answer_of,
    choose_shots,
    few_shot_prompts,
    input_of,
    majority_label,
)
from shikomi.evaluate.run_eval import Evaluation, Task, evaluate, measured
from shikomi.metrics import Difference, difference
from shikomi.model.language_model import LanguageModel
from shikomi.progress import Progress

EXAMPLES = 5
SHORTEST_COMMON = 40
"""Characters. A shorter beginning that all inputs have in common is not worth telling apart."""


def evaluate_baselines(
    model: LanguageModel,
    task: Task,
    train_rows: Sequence[Conversation],
    names: Sequence[str],
    shots: int = 5,
    progress: Progress | None = None,
) -> dict[str, Evaluation]:
    """The baselines by name (majority, zero-shot, few-shot) in that order.

    The model must be as it was loaded: call it before training, or within `model.adapter_off()`. Majority is left out
    where the task has no label set, and few-shot where no training row can be an example.
    """
    found: dict[str, Evaluation] = {}
    if "majority" in names and task.labels is not None:
        found["majority"] = majority(task, train_rows)
    if "zero-shot" in names:
        found["zero-shot"] = evaluate(model, task, None, progress, "zero-shot")
    if "few-shot" in names:
        start = time.perf_counter()
        examples = choose_shots(train_rows, shots, task.seed, balanced=task.labels is not None)
        if examples:
            room = max(map(len, task.label_tokens()), default=task.max_new_tokens)
            few = few_shot_prompts(task.rows, examples, task.encoder, task.max_length, room)
            done = evaluate(model, task, few.prompts, progress, "few-shot")
            found["few-shot"] = Evaluation(
                done.predictions,
                done.logp,
                done.tokens,
                done.measurements,
                time.perf_counter() - start,
                (*done.notes, *few.notes()),
                {"shots": max(few.used)},
            )
    return found


def majority(task: Task, train_rows: Sequence[Conversation]) -> Evaluation:
    """Always the most frequent training label. Raises BadInput where no training row has a label of the set."""
    start = time.perf_counter()
    labels = [answer for row in train_rows if (answer := answer_of(row)) in set(task.labels or ())]
    if not labels:
        raise BadInput([Problem("majority: no training row has a label of the label set")])
    label = majority_label([label for label in labels if label is not None])
    answers = (label,) * len(task.rows)
    evaluation = Evaluation(answers, (), (), {}, time.perf_counter() - start, (), {"label": label})
    return measured(evaluation, task)


def compare(
    model: LanguageModel,
    task: Task,
    train_rows: Sequence[Conversation],
    names: Sequence[str] = ("zero-shot", "few-shot"),
    shots: int = 5,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """`evaluation` of result.json for a model with an adapter: baselines with it off, then with it on."""
    with model.adapter_off():
        baselines = evaluate_baselines(model, task, train_rows, names, shots, progress)
    return comparison(task, baselines, evaluate(model, task, None, progress, "trained"))


def best_baseline(task: Task, baselines: Mapping[str, Evaluation]) -> str | None:
    """The baseline with the best value of the main metric: what training has to beat."""
    main = task.metrics[0]
    values = {name: b.measurements[main.name]["value"] for name, b in baselines.items() if main.name in b.measurements}
    if not values:
        return None
    return (max if main.higher_is_better else min)(values, key=lambda name: values[name])


def comparison(task: Task, baselines: Mapping[str, Evaluation], trained: Evaluation) -> dict[str, Any]:
    """`evaluation` of result.json from evaluations of the same task.

    Keys: n, main_metric, baseline {name: {n, seconds, metrics}}, trained {...}, difference {against, metrics} or None,
    examples [{input, reference, base, trained}], examples_base, examples_common (a beginning all inputs share), notes.
    """
    against = best_baseline(task, baselines)
    gaps = None if against is None else {"against": against, "metrics": _gaps(task, baselines[against], trained)}
    return {
        "n": len(task.rows),
        "main_metric": task.metrics[0].name,
        "baseline": {name: baseline.to_json() for name, baseline in baselines.items()},
        "trained": trained.to_json(),
        "difference": gaps,
        **_examples(task, baselines, trained),
        "notes": list(dict.fromkeys(note for e in (*baselines.values(), trained) for note in e.notes)),
    }


def _gaps(task: Task, before: Evaluation, after: Evaluation) -> dict[str, Difference]:
    found = {}
    for metric in task.metrics:
        old, references = before.inputs(metric, task)
        new, theirs = after.inputs(metric, task)
        # Losses over different tokens (few-shot scores the last answer only) are not a pair.
        if len(old) and len(new) and references == theirs:
            found[metric.name] = difference(metric, old, new, references, seed=task.seed)
    return found


def _examples(task: Task, baselines: Mapping[str, Evaluation], trained: Evaluation) -> dict[str, Any]:
    """Rows drawn by the seed, not picked; beside the trained answers those of the best prompt baseline."""
    prompted = {n: b for n, b in baselines.items() if n != "majority" and b.predictions}
    if not trained.predictions or not prompted:
        return {"examples": [], "examples_base": None, "examples_common": ""}
    base = best_baseline(task, prompted) or next(iter(prompted))
    inputs, references = [input_of(row) for row in task.rows], task.references()
    count = min(EXAMPLES, len(task.rows))
    chosen = np.random.default_rng([task.seed, 0xE7A]).choice(len(task.rows), count, replace=False)
    return {
        "examples": [
            {
                "input": inputs[i],
                "reference": references[i],
                "base": prompted[base].predictions[i],
                "trained": trained.predictions[i],
            }
            for i in sorted(chosen.tolist())
        ],
        "examples_base": base,
        "examples_common": common_beginning(inputs),
    }


def common_beginning(texts: Sequence[str]) -> str:
    """The beginning, cut at a space, that all of two or more texts share; empty where it is short."""
    if len(texts) < 2:
        return ""
    first, last = min(texts), max(texts)  # in sorted order the ends differ the most
    same = next((k for k, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
    while same and not first[same - 1].isspace():
        same -= 1
    return first[:same] if same >= SHORTEST_COMMON else ""
