"""test_outcomes.json: what a trained model answered on every test row, for paired comparisons of runs."""

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from shikomi.checkpoint.files import replace_file, saving
from shikomi.data.conversation import Conversation

if TYPE_CHECKING:
    from shikomi.evaluate.run_eval import Evaluation, Task

OUTCOMES = "test_outcomes.json"


def label_nll(scores: np.ndarray, labels: Sequence[str], references: Sequence[str]) -> tuple[float | None, ...]:
    """-log p(right label | one of the labels) of every row, in nats, from summed log-probabilities (n, L).

    p is the softmax of a row's scores over the label set. It moves where accuracy does not: a label that becomes
    likelier counts before it is the likeliest. None for a row whose reference is not a label.
    """
    top = scores.max(axis=1, keepdims=True)
    normal = scores - top - np.log(np.exp(scores - top).sum(axis=1, keepdims=True))  # (n, L)
    number = {label: i for i, label in enumerate(labels)}
    return tuple(
        -float(row[number[reference]]) if reference in number else None
        for row, reference in zip(normal, references, strict=True)
    )


def row_ids(rows: Sequence[Conversation]) -> list[str]:
    """A digest of every row's content; rows that are alike are numbered, so that no two ids are the same."""
    seen: Counter[str] = Counter()
    ids = []
    for row in rows:
        digest = hashlib.sha256(json.dumps(asdict(row), sort_keys=True, default=str).encode()).hexdigest()[:16]
        seen[digest] += 1
        ids.append(digest if seen[digest] == 1 else f"{digest}#{seen[digest]}")
    return ids


def outcomes(task: "Task", evaluation: "Evaluation") -> dict[str, Any]:
    """Columns over the test rows; a column that was not asked for is empty."""
    return {
        "format": 1,
        "metrics": [metric.name for metric in task.metrics],
        "ids": row_ids(task.rows),
        "references": task.references(),
        "predictions": list(evaluation.predictions),
        "logp": list(evaluation.logp),
        "tokens": list(evaluation.tokens),
        "label_nll": list(evaluation.label_nll),
    }


def write_outcomes(folder: Path, task: "Task", evaluation: "Evaluation") -> None:
    """Write test_outcomes.json into a run's folder. Raises TryAgain for a full disk."""
    text = json.dumps(outcomes(task, evaluation), ensure_ascii=False)
    with saving(OUTCOMES, folder):
        replace_file(folder / OUTCOMES, f"{text}\n".encode())


def read_outcomes(folder: Path) -> dict[str, Any] | None:
    """The outcomes of a run's folder; None for a run without them."""
    path = folder / OUTCOMES
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
