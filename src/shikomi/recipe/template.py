"""The commented recipe that `init` and `advise` write: every key that matters first, each with its reason."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from shikomi.recipe.dump import Dumper12

WIDTH = 110
COLUMN = 44  # where the comments beside short lines start

REASONS = {
    "model": "alias, folder, hub id or file.gguf",
    "quant": "the frozen model is stored in four bits",
    "adapter": "low-rank updates beside a frozen base; r is their rank",
    "prompt": "the columns of a row become the user's turn",
    "completion": "what the model learns to answer",
    "system": "the same system message before every prompt",
    "format": "what the rows look like",
    "train_on": "every token of a row is learned, the question too",
    "labels": "the only answers that count when accuracy is scored",
    "validation": "evaluated while training; never trained",
    "test": "for the comparison at the end; never used to choose anything",
    "objective": "what is learned from the rows; beta says how strongly the model is held to where it began",
    "max_length": "tokens; longer rows are cut, and counted",
    "batch_size": "rows per optimizer step; micro_batch_tokens bounds the memory",
    "num_train_epochs": "times every row is seen",
    "learning_rate": "about ten times that of full fine-tuning",
    "evaluate": "the trained model against the untouched one, on the rows above",
}
"""The reason of each key when the caller gives no better one."""


def starter_recipe(
    *,
    model: str,
    train: str | Sequence[str],
    validation: str | float | None = None,
    test: str | None = None,
    prompt: str | None = None,
    completion: str | None = None,
    system: str | None = None,
    labels: Sequence[str] | None = None,
    rows: int | None = None,
    r: int = 16,
    quant: str | None = None,
    adapter: dict[str, Any] | str | None = None,
    format: str | None = None,
    train_on: str | None = None,
    stages: Sequence[tuple[str, Mapping[str, Any]]] = (),
    batch_size: int = 16,
    num_train_epochs: float = 1,
    learning_rate: float = 2e-4,
    objective: Mapping[str, Any] | None = None,
    max_length: int = 1024,
    metrics: Sequence[str] = (),
    baselines: Sequence[str] = ("zero-shot", "few-shot"),
    output_dir: str | None = None,
    reasons: Mapping[str, str] | None = None,
    estimate: str | None = None,
) -> str:
    """A recipe in YAML with a comment for each key; `load_recipe` accepts it as it is.

    `rows` is the number of training rows, `estimate` the lines at the top (minutes, memory), `reasons` replaces the
    comment of a key. `stages` are (comment, keys) of each stage where there are several: then the objective, its
    epochs and learning rate stand there. `adapter` replaces LoRA with rank `r`. Raises ValueError for a reason whose
    key is not in the recipe.
    """
    page = Page({**REASONS, **(reasons or {})})
    page.heading(estimate)
    page.key("model", model)
    if quant is not None:
        page.key("quant", quant)
    low_rank = {"name": "lora", "r": r, "lora_alpha": 2 * r, "target_modules": "all-linear"}
    page.key("adapter", low_rank if adapter is None else adapter)
    page.gap()
    page.line("data:")
    if rows is not None:
        page.reasons.setdefault("train", f"{rows:,} rows")
    page.key("train", train if isinstance(train, str) else list(train), indent=2)
    if validation is None:
        page.off("validation", 0.05, "splits rows off that are evaluated while training", indent=2)
    for key, value in (("validation", validation), ("test", test)):
        page.optional(key, value)
    for key, value in (("format", format), ("system", system), ("prompt", prompt), ("completion", completion)):
        page.optional(key, value)
    page.optional("train_on", train_on)
    if labels:
        page.words("labels", labels, indent=2)
    page.gap()
    if objective is not None:
        page.key("objective", dict(objective))
    page.key("max_length", max_length)
    page.key("batch_size", batch_size)
    if stages:
        page.stages(stages)
    else:
        page.key("num_train_epochs", num_train_epochs)
        page.key("learning_rate", learning_rate)
    if metrics and (test is not None or validation is not None):
        page.gap()
        page.key("evaluate", {"metrics": list(metrics), "baselines": list(baselines)})
    if output_dir is not None:
        page.gap()
        page.key("output_dir", output_dir)
    unused = set(reasons or {}) - page.written
    if unused:
        raise ValueError(f"reasons for keys that are not in the recipe: {', '.join(sorted(unused))}")
    return page.text()


class Page:
    """Lines of a YAML file and the comments beside or above them; `reasons` are the comments by key."""

    def __init__(self, reasons: dict[str, str]) -> None:
        self.reasons = reasons
        self.lines: list[str] = []
        self.written: set[str] = set()

    def heading(self, estimate: str | None) -> None:
        for paragraph in (estimate or "").splitlines():
            self.lines.extend(f"# {line}" for line in textwrap.wrap(_clean(paragraph), WIDTH - 2))
        if estimate:
            self.gap()

    def gap(self) -> None:
        self.lines.append("")

    def line(self, text: str) -> None:
        self.lines.append(text)

    def optional(self, key: str, value: Any) -> None:
        if value is not None:
            self.key(key, value, indent=2)

    def key(self, key: str, value: Any, indent: int = 0) -> None:
        """One `key: value` line; its comment stands beside it where there is room, else above."""
        self.written.add(key)
        line = " " * indent + f"{key}: {_inline(value)}"
        reason = _clean(self.reasons.get(key, ""))
        if not reason:
            self.lines.append(line)
        elif len(line) <= COLUMN and len(reason) <= WIDTH - COLUMN - 4:
            self.lines.append(f"{line:<{COLUMN}}  # {reason}")
        else:
            self.above(reason, indent)
            self.lines.append(line)

    def off(self, key: str, value: Any, reason: str, indent: int = 0) -> None:
        """A key that is commented out, to be switched on by deleting the #."""
        self.lines.append(f"{' ' * indent + f'# {key}: {_inline(value)}':<{COLUMN}}  # {reason}")

    def item(self, values: Mapping[str, Any], indent: int) -> None:
        """An item of a list, a key on each line."""
        for i, (key, value) in enumerate(values.items()):
            self.lines.append(" " * indent + ("- " if i == 0 else "  ") + f"{_inline(str(key))}: {_inline(value)}")

    def stages(self, stages: Sequence[tuple[str, Mapping[str, Any]]]) -> None:
        """`stages`, each with its comment above it."""
        self.line("stages:")
        for reason, values in stages:
            self.above(_clean(reason), 2)
            self.item(values, 2)

    def words(self, key: str, values: Sequence[str], indent: int) -> None:
        """A list of words, over as many lines as it needs."""
        self.written.add(key)
        self.above(_clean(self.reasons.get(key, "")), indent)
        line = " " * indent + f"{key}: ["
        for i, value in enumerate(values):
            word = _inline(value) + (", " if i < len(values) - 1 else "]")
            if len(line) + len(word) > WIDTH and line.strip():
                self.lines.append(line.rstrip())
                line = " " * (indent + 2)
            line += word
        self.lines.append(line)

    def above(self, reason: str, indent: int) -> None:
        self.lines.extend(" " * indent + f"# {line}" for line in textwrap.wrap(reason, WIDTH - indent - 2))

    def text(self) -> str:
        return "\n".join(self.lines) + "\n"


def _inline(value: Any) -> str:
    """A value as YAML on one line, as it may stand inside brackets too."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_inline(child)}" for key, child in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(_inline(child) for child in value) + "]"
    text = yaml.dump([value], Dumper=Dumper12, default_flow_style=True, allow_unicode=True, width=float("inf"))
    return text.strip().removeprefix("[").removesuffix("]")


def _clean(text: str) -> str:
    """A comment's text on one line, without characters that YAML refuses."""
    return "".join(c if c.isprintable() else "?" for c in " ".join(text.split()))
