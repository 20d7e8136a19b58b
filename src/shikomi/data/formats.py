"""Row formats: a row of any accepted kind becomes a Conversation. Formats are recognised by keys, never
guessed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from shikomi.data.columns import column_templates, read_columns
from shikomi.data.conversation import Conversation
from shikomi.data.dialects import READERS
from shikomi.data.messages import content_text
from shikomi.errors import BadInput, Problem, nearest

if TYPE_CHECKING:
    from shikomi.recipe import DataSpec

Where = tuple[str, int]
"""File and line (from 1) of a row."""

METADATA = frozenset({"id", "idx", "index", "uuid", "meta", "metadata", "source", "url", "timestamp", "date", "lang"})
"""Columns that may stand beside `text` without making it doubtful that the text alone is to be learned."""

PREFERENCES = ("preference", "unpaired_preference")
"""Formats that only objectives for preferences read."""

_ALLOWED_KEYS = (
    "messages | conversations | prompt, completion | instruction, output | text | any columns, with "
    "data.prompt and data.completion in the recipe"
)


def recognise(row: Mapping[str, Any], answer: bool = True) -> str | None:
    """The format of a row by its keys, or None. Without `answer` the keys of the question are enough."""
    keys = set(row)
    if "messages" in keys or "conversations" in keys:
        return "messages" if "messages" in keys else "sharegpt"
    if {"prompt", "completion"} <= keys:
        return "prompt_completion"
    if {"instruction", "output"} <= keys:
        return "alpaca"
    if "text" in keys and keys - {"text"} <= METADATA:
        return "text"
    if not answer and ("prompt" in keys or "instruction" in keys):
        return "prompt_completion" if "prompt" in keys else "alpaca"
    return None


def row_format(row: Mapping[str, Any], spec: DataSpec, where: Where, answer: bool = True) -> str:
    """The format this row is read as: the recipe's, or the one its keys show. Without `answer` that of its question.

    Raises BadInput for rows of other methods and for keys that no format has.
    """
    if spec.format in PREFERENCES:
        raise BadInput([_preferences(where, f"data.format: {spec.format}")])
    if spec.format != "auto":
        return spec.format
    if spec.prompt is not None or spec.completion is not None or spec.system is not None:
        return "columns"
    judged = isinstance(row.get("label"), bool) and "prompt" in row
    if answer and (judged or {"chosen", "rejected"} & set(row)):
        raise BadInput([_preferences(where, f"keys {_keys(row)}")])
    found = recognise(row, answer)
    if found is None:
        hint = _key_hint(row)
        raise BadInput(
            [
                Problem(
                    what="the keys of this row are of no known format",
                    file=where[0],
                    line=where[1],
                    found=_keys(row),
                    allowed=_ALLOWED_KEYS,
                    fix=hint,
                )
            ]
        )
    return found


def parse_row(
    row: Mapping[str, Any],
    spec: DataSpec,
    where: Where,
    labels: tuple[str, ...] | None = None,
    answer: bool = True,
) -> Conversation:
    """Read one row. `labels` stands for `{labels}` in column templates; `answer`: the row must hold an
    answer.

    Raises BadInput with every problem of the row, each with file and line.
    """
    kind = row_format(row, spec, where, answer)
    if kind == "columns":
        conversation, problems = read_columns(row, spec, labels, answer)
    else:
        conversation, problems = READERS[kind](row, answer)
    if conversation is not None and conversation.label is not None and spec.labels is not None:
        problems = [*problems, *_label_problems(conversation.label, spec.labels)]
    if conversation is None or problems:
        raise BadInput([replace(p, file=p.file or where[0], line=p.line or where[1]) for p in problems])
    return conversation


def uses_labels(spec: DataSpec) -> bool:
    """Whether the recipe's templates need a label set."""
    return any(template.uses_labels for template in column_templates(spec).values())


def label_set(spec: DataSpec, rows: Iterable[Mapping[str, Any]]) -> tuple[str, ...]:
    """The recipe's `data.labels`, else the sorted distinct answers of the training rows.

    Rows whose answer cannot be read are left out here; the check reports them.
    """
    if spec.labels is not None:
        return tuple(spec.labels)
    template = column_templates(spec).get("completion")
    found = set()
    for row in rows:
        if template is not None:
            text = None if template.missing(row) else template.fill(row)
        else:
            answer = row.get("completion", row.get("output"))
            last = answer[-1] if isinstance(answer, list) and answer else None
            text = content_text(last.get("content") if isinstance(last, dict) else answer)
        if text is not None and text.strip():
            found.add(text)
    return tuple(sorted(found))


def _label_problems(answer: str, labels: tuple[str, ...]) -> list[Problem]:
    if answer in labels:
        return []
    close = nearest(answer, labels)
    return [
        Problem(
            what="the answer is not in the label set",
            found=answer,
            allowed=", ".join(labels),
            fix=f"did you mean `{close}`?" if close else "add it to data.labels, or correct the row",
        )
    ]


def _preferences(where: Where, found: str) -> Problem:
    return Problem(
        what="this is a row of preferences, which this objective does not train on",
        file=where[0],
        line=where[1],
        found=found,
        allowed=_ALLOWED_KEYS,
        fix="choose an objective for preferences, or keep the good answers as prompt, completion",
    )


def _keys(row: Mapping[str, Any]) -> str:
    return ", ".join(map(str, row)) or "no keys"


def _key_hint(row: Mapping[str, Any]) -> str | None:
    known = ("messages", "conversations", "prompt", "completion", "instruction", "output", "text")
    for key in row:
        close = nearest(str(key), known)
        if close is not None and close not in row:
            return f"did you mean `{close}` by `{key}`?"
    names = list(map(str, row))
    if len(names) >= 2:
        shown = names if "text" not in names else ["text", *(n for n in names if n != "text" and n not in METADATA)]
        return f'in the recipe: data.prompt: "{{{shown[0]}}}" and data.completion: "{{{shown[-1]}}}"'
    return None
