"""The first recipe for a data file: what was detected, the defaults with their reasons, and how long it will take."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from shikomi.advise.facts import ROWS
from shikomi.data.detect import Detected, detect
from shikomi.data.sources import SPLIT_NAMES, rows
from shikomi.plan.lengths import CHARACTERS_PER_TOKEN, TOKENS_PER_TURN
from shikomi.recipe import Source
from shikomi.recipe.schema import LEARNING_RATE_ADAPTER, LEARNING_RATE_PREFERENCES
from shikomi.recipe.template import starter_recipe

TOKENS_OWN = 10  # of these, what is not the same beginning in every row: that is computed once for many rows
VALIDATION_SHARE = 0.1
ROWS_MEASURED = 1000
PREFERENCES = {"preference": "dpo", "unpaired_preference": "kto"}  # the objective that is proposed for a format
ONE_PASS = 2000  # rows, from which on one pass is enough


@dataclass(frozen=True)
class Starter:
    """`text` is the commented recipe; `tokens` counts one pass over the rows, estimated from their characters."""

    text: str
    detected: Detected
    tokens: int
    epochs: int
    estimate: str


def starter(file: Path, model: str, seconds_of: Callable[[int], float | None] | None = None) -> Starter:
    """A recipe for the rows of `file`; files of other splits beside `train.*` are taken too.

    `seconds_of` says how long a number of tokens trains (None where that is not known). Raises BadInput with every
    problem of the file.
    """
    found = detect(file)
    tokens = estimated_tokens(found)
    epochs = passes(found.rows)
    seconds = None if seconds_of is None else seconds_of(epochs * found.rows * (_own_tokens(found) + TOKENS_OWN))
    estimate = _estimate(found, tokens, epochs, seconds)
    validation, test = other_splits(file)
    reasons = reasons_of(found)
    share = None
    if validation is None and test is None and found.rows >= ROWS.few:
        share = VALIDATION_SHARE
        reasons["validation"] = "this share of the rows is kept out of training, to evaluate on"
    metrics, baselines = comparison(found)
    preferred = PREFERENCES.get(found.format)
    if preferred is not None:
        reasons["learning_rate"] = "a fortieth of that of supervised fine-tuning: higher, and good answers fade too"
    text = starter_recipe(
        model=model,
        train=str(file),
        validation=share if validation is None else str(validation),
        test=None if test is None else str(test),
        prompt=found.prompt,
        completion=found.completion,
        labels=found.labels,
        rows=None,
        num_train_epochs=epochs,
        learning_rate=LEARNING_RATE_ADAPTER if preferred is None else LEARNING_RATE_PREFERENCES,
        objective=None if preferred is None else {"name": preferred, "beta": 0.1},
        metrics=metrics,
        baselines=baselines,
        output_dir=f"runs/{run_name(file)}",
        reasons=reasons,
        estimate=estimate,
    )
    return Starter(text, found, tokens, epochs, estimate)


def passes(rows: int) -> int:
    """Epochs over so many rows."""
    return 3 if rows < ROWS.medium else 2 if rows < ONE_PASS else 1


def estimated_tokens(found: Detected) -> int:
    """Tokens of one pass over all rows, from their characters."""
    instruction = len(found.prompt or "") + len(", ".join(found.labels or ()))
    return round(found.rows * (_own_tokens(found) + instruction / CHARACTERS_PER_TOKEN + TOKENS_PER_TURN))


def _own_tokens(found: Detected) -> int:
    """Tokens of a row's own text, without instruction and chat template."""
    some = [row.data for row in islice(rows(Source(path=found.path)), ROWS_MEASURED)]
    used = [json.dumps(_used(found, row), ensure_ascii=False) for row in some]
    return round(sum(map(len, used)) / len(used) / CHARACTERS_PER_TOKEN)


def _used(found: Detected, row: dict[str, object]) -> dict[str, object]:
    if found.format != "columns":
        return row
    templates = f"{found.prompt}{found.completion}"
    return {key: value for key, value in row.items() if f"{{{key}}}" in templates}


def _estimate(found: Detected, tokens: int, epochs: int, seconds: float | None) -> str:
    passes = "one pass" if epochs == 1 else f"{epochs} passes"
    time = "the time is not known before the model is on this machine" if seconds is None else (
        f"{passes} will take about {_minutes(seconds)} on this machine, without evaluation"
    )  # fmt: skip
    more = "more than " if found.at_least else ""
    return f"{more}{found.rows:,} rows, about {tokens:,} tokens a pass. {time}."


def _minutes(seconds: float) -> str:
    if seconds < 60:
        return "a minute"
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"


def comparison(found: Detected) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Metrics and baselines for the kind of task; none for preferences, whose validation rows say enough."""
    if found.format in PREFERENCES:
        return (), ()
    if found.labels:
        return ("accuracy", "macro_f1"), ("majority", "zero-shot", "few-shot")
    if found.format in ("columns", "prompt_completion", "alpaca"):
        return ("chrf", "loss"), ("zero-shot", "few-shot")
    return ("loss",), ("zero-shot",)


def other_splits(file: Path) -> tuple[Path | None, Path | None]:
    """Validation and test files of the same kind beside a `train.*`."""
    stem, suffix = file.name.partition(".")[0], file.name.partition(".")[2]
    if stem.lower() not in SPLIT_NAMES["train"] or not file.is_file():
        return None, None
    found: list[Path | None] = []
    for role in ("validation", "test"):
        beside = [file.with_name(f"{name}.{suffix}") for name in SPLIT_NAMES[role]]
        found.append(next((path for path in beside if path.is_file()), None))
    return found[0], found[1]


def reasons_of(found: Detected) -> dict[str, str]:
    """The detector's sentences, each at the key it explains."""
    count = f"{'more than ' if found.at_least else ''}{found.rows:,} rows"
    if found.format != "columns":
        first, *labels = found.reasons
        reasons = {"train": f"{count}; {first}"}
    else:
        completion, prompt, *labels = found.reasons
        reasons = {"train": count, "prompt": f"{prompt}; change the wording to say your task", "completion": completion}
    if found.labels and labels:
        reasons["labels"] = labels[0]
    epochs = "few rows: several passes" if passes(found.rows) > 1 else "many rows: one pass is enough"
    return reasons | {"num_train_epochs": epochs}


def run_name(file: Path) -> str:
    """The file's name for runs/NAME; that of its folder where the file is called train."""
    stem = file.name.partition(".")[0]
    if stem.lower() in SPLIT_NAMES["train"] and file.absolute().parent.name:
        stem = file.absolute().parent.name
    kept = "".join(c if c.isalnum() and c.isascii() or c in "-_" else "-" for c in stem).strip("-_")
    return kept or "run"
