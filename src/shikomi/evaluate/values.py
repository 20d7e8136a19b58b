"""How often a reward model gives the chosen answer of a pair the larger value, beside what length alone says."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch

from shikomi.data.packing import micro_batches
from shikomi.data.pairs import Pair, Thumb, pack_thumbs
from shikomi.errors import BadInput, Problem
from shikomi.metrics import Measurement, difference, measure
from shikomi.metrics._metric import Metric, Needs, Unit
from shikomi.metrics.accuracy import Accuracy
from shikomi.model.language_model import LanguageModel
from shikomi.progress import Progress

ALIKE = 0.1  # answers whose lengths differ by at most this share of the longer one are alike in length


@dataclass(frozen=True)
class MeanOfPairs(Metric):
    """Mean over pairs of a number of each: 1 right, 0 wrong, 1/2 where both answers are equal to who judges."""

    name: ClassVar[str] = "accuracy"
    needs: ClassVar[Needs] = "labels"
    unit: ClassVar[Unit] = "share"

    def statistics(self, predictions: Sequence[Any], references: Sequence[Any]) -> np.ndarray:
        return np.stack([np.asarray(predictions, np.float64), np.ones(len(references))], 1)

    def value(self, sums: np.ndarray) -> np.ndarray:
        share: np.ndarray = sums[..., 0] / sums[..., 1]
        return share


def values_of(
    lm: LanguageModel, rows: Sequence[Thumb], micro_batch_tokens: int, progress: Progress, what: str
) -> np.ndarray:
    """The value (n,) of each answer to its prompt; the prompt that several answers share is computed once."""
    found, done = np.zeros(len(rows)), 0
    lm.bind_dropout(None)
    numbered = [Thumb(row.prompt, row.completion, True, number) for number, row in enumerate(rows)]
    for groups in micro_batches(_by_prompt(numbered, micro_batch_tokens), micro_batch_tokens, _tokens):
        part = [answer for group in groups for answer in group]
        batch = pack_thumbs(part)
        with torch.no_grad():
            found[batch.packed.rows] = lm.values(batch.packed, batch.ends).double().cpu().numpy()
        done += len(part)
        progress.tick(done, len(rows), what)
    return found


def _tokens(group: Sequence[Thumb]) -> int:
    """What answers to one prompt take together: the prompt's last token, where they part, is computed with each."""
    return len(group[0].prompt) - 1 + sum(1 + len(answer.completion) for answer in group)


def _by_prompt(rows: Sequence[Thumb], most: int) -> list[list[Thumb]]:
    """The answers to each prompt together, as many as `most` tokens hold."""
    groups: dict[bytes, list[list[Thumb]]] = {}
    for row in rows:
        of_prompt = groups.setdefault(row.prompt.tobytes(), [[]])
        if of_prompt[-1] and _tokens([*of_prompt[-1], row]) > most:
            of_prompt.append([])
        of_prompt[-1].append(row)
    return [group for of_prompt in groups.values() for group in of_prompt]


def evaluate_pairs(
    lm: LanguageModel, pairs: Sequence[Pair], micro_batch_tokens: int, progress: Progress
) -> dict[str, Any]:
    """Accuracy on pairs with its 95% interval, that of the longer answer, and both where lengths are alike.

    Equal values count as wrong. The judge by length takes the answer with more tokens for the better one, and equal
    lengths as half right. Raises BadInput for no pairs.
    """
    if not pairs:
        raise BadInput([Problem("there are no pairs to evaluate on", fix="give a file of prompt, chosen, rejected")])
    started = time.perf_counter()
    answers = [Thumb(pair.prompt, answer, True) for pair in pairs for answer in pair.completions]
    values = values_of(lm, answers, micro_batch_tokens, progress, "values").reshape(-1, 2)  # chosen, rejected
    lengths = np.array([[len(answer) for answer in pair.completions] for pair in pairs])
    return judged(values, lengths) | {"seconds": round(time.perf_counter() - started, 3)}


def judged(values: np.ndarray, lengths: np.ndarray) -> dict[str, Any]:
    """What `evaluate_pairs` says of values (n, 2) and lengths (n, 2) in tokens, each of chosen and rejected."""
    right = values[:, 0] > values[:, 1]
    longer = (np.sign(lengths[:, 0] - lengths[:, 1]) + 1) / 2
    alike = np.abs(lengths[:, 0] - lengths[:, 1]) <= ALIKE * lengths.max(1)
    metrics: dict[str, Measurement] = {"accuracy": _accuracy(right)}
    by_length = {"accuracy": measure(MeanOfPairs(), longer.tolist(), [1] * len(longer))}
    notes = []
    if alike.any():
        metrics["accuracy_lengths_alike"] = _accuracy(right[alike])
        share = longer[alike]
        by_length["accuracy_lengths_alike"] = measure(MeanOfPairs(), share.tolist(), [1] * len(share))
        notes.append(f"lengths alike: {alike.sum():,} pairs whose lengths differ by at most {ALIKE:.0%}")
    else:
        notes.append(f"no pair has answers whose lengths differ by at most {ALIKE:.0%}")
    return {
        "n": len(values),
        "metrics": metrics,
        "by_length": by_length,
        "difference": difference(MeanOfPairs(), longer.tolist(), right.astype(float).tolist(), [1] * len(right)),
        "margin": float((values[:, 0] - values[:, 1]).mean()),
        "mean_reward": float(values.mean()),
        "notes": notes,
    }


def _accuracy(right: np.ndarray) -> Measurement:
    """The share of pairs whose chosen answer is preferred, with Wilson's interval."""
    preferred = np.where(right, "chosen", "rejected").tolist()
    return measure(Accuracy(), preferred, ["chosen"] * len(preferred))
