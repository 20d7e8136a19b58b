"""A first look at a data file: its format, and a proposal of prompt, completion and label set for `init`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from shikomi.data.columns import cell_text
from shikomi.data.formats import METADATA, label_set, recognise
from shikomi.data.preferences import recognise_preference
from shikomi.data.problems import Problems
from shikomi.data.sources import files, rows
from shikomi.errors import BadInput, Problem
from shikomi.recipe import DataSpec, Source

SAMPLE = 5000
"""Rows looked at."""

MOST_LABELS = 50
ROWS_PER_LABEL = 5
LONGEST_LABEL = 60

ANSWER_NAMES = (
    *("completion", "answer", "output", "response", "target", "label", "labels", "category", "class"),
    *("summary", "translation", "intent", "sentiment", "topic", "section", "tag", "title"),
)
"""Column names of answers, the surest first."""

PROMPT_NAMES = (
    *("prompt", "question", "input", "instruction", "query", "text", "sentence", "review", "message", "content"),
    *("document", "article", "description", "body", "source", "context", "premise", "hypothesis"),
)

LANGUAGES = {
    **{"en": "English", "ja": "Japanese", "de": "German", "fr": "French", "es": "Spanish", "it": "Italian"},
    **{"pt": "Portuguese", "nl": "Dutch", "pl": "Polish", "ru": "Russian", "uk": "Ukrainian", "zh": "Chinese"},
    **{"ko": "Korean", "ar": "Arabic", "hi": "Hindi", "tr": "Turkish", "sv": "Swedish", "cs": "Czech"},
}


@dataclass(frozen=True)
class Detected:
    """What a data file looks like. The templates are None where the format needs none.

    rows: how many there are, `at_least` says that there are more; labels: the label set where the answers are few;
    reasons: one sentence for each thing proposed; sample: the first rows.
    """

    path: str
    format: str
    columns: list[str]
    rows: int
    at_least: bool
    prompt: str | None = None
    completion: str | None = None
    labels: tuple[str, ...] | None = None
    reasons: list[str] = field(default_factory=list)
    sample: list[dict[str, Any]] = field(default_factory=list)


def detect(path: str | Path) -> Detected:
    """Look at the first SAMPLE rows of a file or folder.

    Raises BadInput with every problem met there, or when no prompt and answer can be proposed.
    """
    source = Source(path=str(path))
    problems = Problems()
    read = [row.data for row in islice(rows(source, problems), SAMPLE + 1)]
    problems.raise_if_any()
    more, read = len(read) > SAMPLE, read[:SAMPLE]
    if not read:
        raise BadInput([Problem(what="there are no rows", file=str(path))])
    columns = list(dict.fromkeys(str(key) for row in read for key in row))
    kinds = {recognise_preference(row) or recognise(row) for row in read}
    kind = kinds.pop() if len(kinds) == 1 else None
    if kind is not None:
        spec = DataSpec(train=(source,))
        labels = _labels(spec, read) if kind in ("prompt_completion", "alpaca") else None
        reasons = [f"the rows have the keys of format {kind}"]
        reasons += [f"there are only {len(labels)} different answers"] if labels else []
        return Detected(str(path), kind, columns, len(read), more, None, None, labels, reasons, read[:3])
    return propose(source, columns, read, more)


def propose(source: Source, columns: list[str], read: list[dict[str, Any]], more: bool) -> Detected:
    """A prompt and an answer from columns, by their names and what they hold. Raises BadInput where there are none."""
    usable = [name for name in columns if _is_text(name, read)]
    answer, why = _answer_column(usable, read)
    prompts = _prompt_columns([name for name in usable if name != answer], read)
    if answer is None or not prompts:
        raise BadInput(
            [
                Problem(
                    what="no question and answer were found in the columns",
                    file=str(files(source)[0]),
                    found=", ".join(columns),
                    allowed="at least two columns of text",
                    fix='write the recipe yourself: data.prompt: "...{column}..." and data.completion: "{column}"',
                )
            ]
        )
    completion = f"{{{answer}}}"
    labels = _labels(DataSpec(train=(source,), prompt="{" + prompts[0] + "}", completion=completion), read)
    reasons = [why, f"the prompt is made of {', '.join(f'`{name}`' for name in prompts)}"]
    if labels:
        reasons.append(f"`{answer}` has only {len(labels)} different values in {len(read):,} rows: a label set")
    prompt = _prompt(prompts, answer, labels)
    return Detected(source.path, "columns", columns, len(read), more, prompt, completion, labels, reasons, read[:3])


def _is_text(name: str, read: Sequence[dict[str, Any]]) -> bool:
    """Whether a column can stand in a template: a usable name, and something in nearly every row."""
    if not name.strip() or re.search(r"[{}]", name):
        return False
    filled = sum(bool(cell_text(row.get(name)).strip()) for row in read)
    return filled >= 0.9 * len(read)


def _answer_column(usable: list[str], read: Sequence[dict[str, Any]]) -> tuple[str | None, str]:
    by_name = {name.lower().strip(): name for name in reversed(usable)}
    for known in ANSWER_NAMES:
        if known in by_name:
            return by_name[known], f"`{by_name[known]}` is the answer by its name"
    few = {name: len({cell_text(row.get(name)) for row in read}) for name in usable}
    labels = [name for name in usable if 2 <= few[name] <= MOST_LABELS and few[name] * ROWS_PER_LABEL <= len(read)]
    if labels:
        name = min(labels, key=lambda name: few[name])
        return name, f"`{name}` is the answer: it has the fewest different values"
    if usable:
        return usable[-1], f"`{usable[-1]}` is the answer: it is the last column"
    return None, ""


def _prompt_columns(usable: list[str], read: Sequence[dict[str, Any]]) -> list[str]:
    """The columns of the question: those known by name, else the longest; identifiers are left out."""
    known = [name for name in usable if name.lower().strip() in PROMPT_NAMES]
    if known:
        return known
    usable = [name for name in usable if name.lower().strip() not in METADATA] or usable
    size = {name: sum(len(cell_text(row.get(name))) for row in read) / len(read) for name in usable}
    longest = max(size.values(), default=0)
    return [name for name in usable if size[name] >= max(longest / 4, 1)]


def _labels(spec: DataSpec, read: Sequence[dict[str, Any]]) -> tuple[str, ...] | None:
    found = label_set(spec, read)
    few = 2 <= len(found) <= MOST_LABELS and len(found) * ROWS_PER_LABEL <= len(read)
    return found if few and max(map(len, found)) <= LONGEST_LABEL else None


def _prompt(prompts: list[str], answer: str, labels: tuple[str, ...] | None) -> str:
    if len(prompts) == 1:
        body = f"{{{prompts[0]}}}"
    else:
        body = "\n\n".join(f"{name}: {{{name}}}" for name in prompts)
    if labels:
        return f"What is the {answer.replace('_', ' ')} of this text? Answer with one of: {{labels}}.\n\n{body}"
    language = LANGUAGES.get(answer.lower())
    if language and prompts[0].lower() in LANGUAGES:
        return f"Translate into {language}.\n\n{body}"
    if answer.lower() in ("summary", "title"):
        return f"Write a {answer.lower()} of this text.\n\n{body}"
    return body
