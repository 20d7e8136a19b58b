"""Column templates: `Classify: {text}` with the cells of a row in place of its column names."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from shikomi.data.conversation import Parsed, prompt_answer
from shikomi.data.messages import text_problem
from shikomi.errors import BadInput, Problem, nearest

if TYPE_CHECKING:
    from shikomi.recipe import DataSpec

LABELS = "labels"
"""`{labels}` in a template stands for the label set, joined by commas."""

_TOKEN = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")


@dataclass(frozen=True)
class ColumnTemplate:
    """A parsed template: literal texts and column names in turn, `parts` = ((literal, column or None),
    ...).
    """

    key: str
    parts: tuple[tuple[str, str | None], ...]

    @classmethod
    def parse(cls, key: str, source: str) -> ColumnTemplate:
        """Parse `source`, the value of `data.<key>`. `{{` and `}}` are literal braces.

        Raises BadInput for a lone brace or an empty name.
        """
        parts: list[tuple[str, str | None]] = []
        literal, at = "", 0
        for match in _TOKEN.finditer(source):
            literal += source[at : match.start()]
            at = match.end()
            text, name = match.group(), match.group(1)
            if text in ("{{", "}}"):
                literal += text[0]
            elif name is None or not name.strip():
                raise BadInput(
                    [
                        Problem(
                            what=f"data.{key} has a lone brace" if name is None else f"data.{key} has an empty name",
                            found=source[max(0, match.start() - 15) : match.end() + 15],
                            allowed="{column}, and {{ or }} for a literal brace",
                            fix="name a column between the braces, or double the brace",
                        )
                    ]
                )
            else:
                parts.append((literal, name.strip()))
                literal = ""
        parts.append((literal + source[at:], None))
        return cls(key, tuple(parts))

    @property
    def columns(self) -> list[str]:
        """Column names in the template, in order, `labels` left out."""
        return [name for _, name in self.parts if name is not None and name != LABELS]

    @property
    def uses_labels(self) -> bool:
        """Whether `{labels}` occurs."""
        return any(name == LABELS for _, name in self.parts)

    def missing(self, row: Mapping[str, Any]) -> list[Problem]:
        """One problem per column that the row does not have."""
        return [
            Problem(
                what=f"data.{self.key} names a column that this row does not have",
                found=f"{{{name}}}",
                allowed=", ".join(map(str, row)) or "(the row is empty)",
                fix=f"did you mean `{close}`?" if (close := nearest(name, map(str, row))) else None,
            )
            for name in dict.fromkeys(self.columns)
            if name not in row
        ]

    def fill(self, row: Mapping[str, Any], labels: Sequence[str] | None = None) -> str:
        """The text for this row. Raises KeyError for a missing column, ValueError if `{labels}` has no
        label set.
        """
        out = []
        for literal, name in self.parts:
            out.append(literal)
            if name == LABELS:
                if labels is None:
                    raise ValueError(f"data.{self.key} uses {{labels}}, and no label set was given")
                out.append(", ".join(labels))
            elif name is not None:
                out.append(cell_text(row[name]))
        return "".join(out)


def cell_text(value: Any) -> str:
    """A cell as text: strings as they are, nothing for a missing value, numbers, lists and objects as JSON."""
    if isinstance(value, str):
        return value
    if value is None:
        return ""
    return json.dumps(value, ensure_ascii=False, default=str)


def unused_columns(templates: Iterable[ColumnTemplate], columns: Iterable[str]) -> list[str]:
    """Columns of the data that no template names."""
    used = {name for template in templates for name in template.columns}
    return [name for name in columns if name not in used]


@lru_cache(maxsize=64)
def _parse_templates(given: tuple[tuple[str, str], ...]) -> dict[str, ColumnTemplate]:
    return {key: ColumnTemplate.parse(key, source) for key, source in given}


def column_templates(spec: DataSpec) -> dict[str, ColumnTemplate]:
    """The recipe's templates by key (system, prompt, completion). Raises BadInput for a malformed one."""
    return _given((("system", spec.system), ("prompt", spec.prompt), ("completion", spec.completion)))


def pair_templates(spec: DataSpec) -> dict[str, ColumnTemplate]:
    """The recipe's templates for pairs: system, prompt, chosen, rejected, margin."""
    answers = (("chosen", spec.chosen), ("rejected", spec.rejected), ("margin", spec.margin))
    return _given((("system", spec.system), ("prompt", spec.prompt), *answers))


def thumb_templates(spec: DataSpec) -> dict[str, ColumnTemplate]:
    """The recipe's templates for judged answers: system, prompt, completion, desirable."""
    return column_templates(spec) | _given((("desirable", spec.desirable),))


def _given(sources: tuple[tuple[str, str | None], ...]) -> dict[str, ColumnTemplate]:
    return _parse_templates(tuple((key, source) for key, source in sources if source is not None))


def read_columns(row: Mapping[str, Any], spec: DataSpec, labels: tuple[str, ...] | None, answer: bool) -> Parsed:
    templates = column_templates(spec)
    check_needed(templates, {"prompt": "Classify: {text}"} | ({"completion": "{label}"} if answer else {}), row)
    texts, problems = fill_all([t for key, t in templates.items() if answer or key != "completion"], row, labels)
    if problems:
        return None, problems
    return prompt_answer(texts.get("system"), texts["prompt"], texts.get("completion"), texts["prompt"])


def check_needed(templates: Mapping[str, ColumnTemplate], needed: Mapping[str, str], row: Mapping[str, Any]) -> None:
    """Raises BadInput that names the templates which are not given; `needed` holds an example of each."""
    allowed = " and ".join(f'{key}: "{example}"' for key, example in needed.items())
    missing = [
        Problem(
            what=f"format columns needs a template in data.{key}",
            allowed=f"for example {allowed}",
            fix=f"columns of this file: {', '.join(map(str, row))}",
        )
        for key in needed
        if key not in templates
    ]
    if missing:
        raise BadInput(missing)


def fill_all(
    templates: Sequence[ColumnTemplate], row: Mapping[str, Any], labels: tuple[str, ...] | None
) -> tuple[dict[str, str], list[Problem]]:
    """(the text of each template for this row, or none of them; what is wrong with the cells that they use)."""
    problems = [problem for template in templates for problem in template.missing(row)]
    if problems:
        return {}, problems
    texts = {template.key: template.fill(row, labels) for template in templates}
    for template in templates:
        for name in dict.fromkeys(template.columns):
            text = cell_text(row[name])
            problem = text_problem(text, f"column `{name}`")
            if problem is None and not text.strip():
                problem = Problem(what=f"column `{name}` is empty", found=repr(row[name]), allowed="text")
            problems += [problem] if problem else []
    return ({} if problems else texts), problems
