"""Rows of preferences: a prompt with a chosen and a rejected answer, or with one answer that was judged."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from shikomi.data.columns import ColumnTemplate, check_needed, fill_all, pair_templates, read_columns, thumb_templates
from shikomi.data.conversation import Conversation, prompt_answer
from shikomi.data.dialects import READERS, parse_all, string_problem, type_name
from shikomi.data.implicit import message_prompt, text_prompt, without_prompt
from shikomi.data.messages import conversation_problems, parse_tools
from shikomi.errors import BadInput, Problem, nearest

if TYPE_CHECKING:
    from shikomi.recipe import DataSpec

Where = tuple[str, int]

PAIR_KEYS = "prompt, chosen, rejected (strings or lists of messages; the prompt may be their common beginning)"
THUMB_KEYS = "prompt, completion, label (true or false)"

_TRUTH = {"true": True, "false": False, "1": True, "0": False}


@dataclass(frozen=True)
class Preference:
    """Two answers to one prompt: `chosen` is the better one, by `margin` (0 where the row has none)."""

    chosen: Conversation
    rejected: Conversation
    margin: float = 0.0

    @property
    def answers(self) -> tuple[Conversation, ...]:
        """The conversation with each answer."""
        return (self.chosen, self.rejected)

    @property
    def value(self) -> float:
        """The number that is stored with the tokens."""
        return self.margin

    @property
    def identity(self) -> list[Any]:
        """Its prompt: rows that share it stay on one side of a split."""
        return self.chosen.question

    @property
    def same(self) -> bool:
        """Whether the two answers are one."""
        return answer_of(self.chosen) == answer_of(self.rejected)


@dataclass(frozen=True)
class Judgement:
    """One answer to a prompt, which is desirable or not.

    of_pair: it comes from a pair, and `same` says that both answers of that pair are one.
    """

    conversation: Conversation
    desirable: bool
    of_pair: bool = False
    same: bool = False

    @property
    def answers(self) -> tuple[Conversation, ...]:
        """The conversation with the answer."""
        return (self.conversation,)

    @property
    def value(self) -> float:
        """1 for a desirable answer, 0 for another."""
        return float(self.desirable)

    @property
    def identity(self) -> list[Any]:
        """Its prompt: rows that share it stay on one side of a split."""
        return self.conversation.question


def answer_of(conversation: Conversation) -> list[Any]:
    """The answer alone, as JSON data."""
    if conversation.messages or conversation.plain is None:
        return [*conversation.messages[conversation.completion_from :]]
    return [conversation.plain[1]]


def recognise_preference(row: Mapping[str, Any]) -> str | None:
    """The format of a row of preferences by its keys alone, or None."""
    if {"chosen", "rejected"} <= set(row):
        return "preference"
    judged = {"prompt", "completion", "label"} <= set(row) and isinstance(row["label"], bool)
    return "unpaired_preference" if judged else None


def pair_format(row: Mapping[str, Any], spec: DataSpec, where: Where) -> str:
    """The format of a row where pairs are needed: preference, or columns. Raises BadInput for any other."""
    templates = spec.prompt or spec.system or spec.chosen or spec.rejected
    if spec.format == "columns" or (spec.format == "auto" and templates):
        return "columns"
    if spec.format == "preference":
        return "preference"
    if spec.format != "auto":
        raise BadInput([_wrong_format(spec.format, "pairs", "auto, preference, columns")])
    if {"chosen", "rejected"} <= set(row):
        return "preference"
    fix = _hint(row, ("prompt", "chosen", "rejected"))
    if "completion" in row and "label" in row:
        fix = "choose objective: kto, which learns from judged answers"
    raise BadInput([_no_format(row, where, "this objective learns from pairs, and this row is none", PAIR_KEYS, fix)])


def thumb_format(row: Mapping[str, Any], spec: DataSpec, where: Where) -> str:
    """The format of a row where judged answers are needed; pairs are taken apart into two. Raises BadInput."""
    if spec.format == "columns" or (spec.format == "auto" and (spec.prompt or spec.completion or spec.system)):
        return "columns"
    if spec.format in ("preference", "unpaired_preference"):
        return spec.format
    if spec.format != "auto":
        raise BadInput([_wrong_format(spec.format, "judged answers", "auto, unpaired_preference, preference, columns")])
    if {"prompt", "completion"} <= set(row) and ("label" in row or spec.desirable is not None):
        return "unpaired_preference"
    if {"chosen", "rejected"} <= set(row):
        return "preference"
    fix = _hint(row, ("prompt", "completion", "label"))
    if {"prompt", "completion"} <= set(row) and fix is None:
        fix = 'name the column of the judgement: data.desirable: "{column}"'
    what = "this objective learns from judged answers, and this row is none"
    raise BadInput([_no_format(row, where, what, f"{THUMB_KEYS} | {PAIR_KEYS}", fix)])


def parse_pair(row: Mapping[str, Any], spec: DataSpec, where: Where, labels: tuple[str, ...] | None) -> Preference:
    """Read one pair. Raises BadInput with every problem of the row, each with file and line."""
    if pair_format(row, spec, where) == "columns":
        pair, problems = _pair_columns(row, spec, labels)
    else:
        pair, problems = _pair(row)
    margin, problem = _margin(row, spec)
    problems += [problem] if problem else []
    if pair is None or problems:
        raise _placed(problems, where)
    return replace(pair, margin=margin)


def parse_thumbs(
    row: Mapping[str, Any], spec: DataSpec, where: Where, labels: tuple[str, ...] | None
) -> list[Judgement]:
    """Read one judged answer, or both answers of a pair: the chosen one desirable, the rejected one not.

    Raises BadInput with every problem of the row, each with file and line.
    """
    kind = thumb_format(row, spec, where)
    if kind == "preference":
        pair, problems = _pair(row)
        if pair is not None and not problems:
            return [Judgement(pair.chosen, True, True, pair.same), Judgement(pair.rejected, False, True, pair.same)]
        raise _placed(problems, where)
    if kind == "columns":
        conversation, problems = read_columns(row, spec, labels, True)
    else:
        conversation, problems = READERS["prompt_completion"](row, True)
        if conversation is not None and conversation.messages[conversation.completion_from]["role"] != "assistant":
            problems = [*problems, _not_an_answer("completion")]
    desirable, problem = _desirable(row, spec)
    problems = [*problems, problem] if problem else problems
    if conversation is None or desirable is None or problems:
        raise _placed(problems, where)
    return [Judgement(conversation, desirable)]


def _pair(row: Mapping[str, Any]) -> tuple[Preference | None, list[Problem]]:
    kinds = {key: type_name(row.get(key)) for key in ("chosen", "rejected")}
    if set(kinds.values()) == {"a list"}:
        return _pair_of_messages(row)
    if "a list" not in kinds.values():
        return _pair_of_texts(row)
    found = ", ".join(f"{key} {kind}" for key, kind in kinds.items())
    what, allowed = "chosen and rejected are of different kinds", "two strings, or two lists of messages"
    return None, [Problem(what=what, found=found, allowed=allowed)]


def _pair_of_texts(row: Mapping[str, Any]) -> tuple[Preference | None, list[Problem]]:
    implicit = row.get("prompt") is None
    keys = ("chosen", "rejected") if implicit else ("prompt", "chosen", "rejected")
    problems = [p for p in (string_problem(row, key) for key in keys) if p]
    if problems:
        return None, problems
    system = row.get("system")
    if not implicit:
        return _two_answers(system, row["prompt"], row["chosen"], row["rejected"]), []
    length = text_prompt(row["chosen"], row["rejected"])
    prompt = row["chosen"][:length]
    if not prompt.strip():
        what = "there is no prompt, and chosen and rejected have no common beginning"
        return None, [Problem(what, found=f"keys {', '.join(map(str, row))}", allowed=PAIR_KEYS, fix="add the prompt")]
    if isinstance(system, str) and system.strip():
        prompt = f"{system}\n\n{prompt}"
    # Where the answers part is a place in a text, not a turn: such rows are not put into a chat template.
    chosen, rejected = (Conversation(plain=(prompt, row[key][length:])) for key in ("chosen", "rejected"))
    return Preference(chosen, rejected), []


def _two_answers(system: Any, prompt: str, chosen: str, rejected: str) -> Preference:
    (better, _), (worse, _) = (prompt_answer(system, prompt, answer, prompt) for answer in (chosen, rejected))
    assert better is not None and worse is not None
    return Preference(better, worse)


def _pair_of_messages(row: Mapping[str, Any]) -> tuple[Preference | None, list[Problem]]:
    given = row.get("prompt")
    turns: dict[str, list[dict[str, Any]]] = {}
    problems: list[Problem] = []
    for key in ("prompt", "chosen", "rejected") if isinstance(given, list) else ("chosen", "rejected"):
        turns[key], found = parse_all(row[key])
        problems += [replace(p, what=f"`{key}`: {p.what}") for p in found]
    tools, problem = parse_tools(row.get("tools"))
    problems += [problem] if problem else []
    if given is not None and not isinstance(given, str | list):
        problems.append(Problem(what="`prompt` is not text", found=type_name(given), allowed="a string or messages"))
    if problems:
        return None, problems
    if "prompt" in turns:
        prompt = turns["prompt"]
        parts = [without_prompt(prompt, turns[key], key) for key in ("chosen", "rejected")]
        problems = [p for _, p in parts if p]
        sides = [part for part, _ in parts]
    else:
        prompt, sides, problems = message_prompt(turns["chosen"], turns["rejected"], given)
    if problems:
        return None, problems
    system = row.get("system")
    if isinstance(system, str) and system.strip() and (not prompt or prompt[0]["role"] != "system"):
        prompt = [{"role": "system", "content": system}, *prompt]
    answers = []
    for side, key in zip(sides, ("chosen", "rejected"), strict=True):
        problems += [replace(p, what=f"`{key}`: {p.what}") for p in conversation_problems([*prompt, *side], True)]
        answers.append(Conversation((*prompt, *side), tools, completion_from=len(prompt)))
    return (None if problems else Preference(answers[0], answers[1])), problems


def _pair_columns(
    row: Mapping[str, Any], spec: DataSpec, labels: tuple[str, ...] | None
) -> tuple[Preference | None, list[Problem]]:
    templates = pair_templates(spec)
    check_needed(templates, {"prompt": "{question}", "chosen": "{better}", "rejected": "{worse}"}, row)
    if not labels and any(template.uses_labels for template in templates.values()):
        return None, [Problem(what="{labels} in a template of pairs needs data.labels", fix="list them in data.labels")]
    texts, problems = fill_all([t for key, t in templates.items() if key != "margin"], row, labels)
    if problems:
        return None, problems
    return _two_answers(texts.get("system"), texts["prompt"], texts["chosen"], texts["rejected"]), []


def _cell(row: Mapping[str, Any], template: ColumnTemplate | None, default: str) -> tuple[Any, str, list[Problem]]:
    """(value, what it is called, problems) of the recipe's template, or of the row's own column."""
    if template is None:
        return row.get(default), f"`{default}`", []
    missing = template.missing(row)
    return (None if missing else template.fill(row)), f"data.{template.key}", missing


def _margin(row: Mapping[str, Any], spec: DataSpec) -> tuple[float, Problem | None]:
    """A number; cells of a CSV are text. None and an empty cell are no margin."""
    value, name, missing = _cell(row, pair_templates(spec).get("margin"), "margin")
    if missing:
        return 0.0, missing[0]
    if value is None or (isinstance(value, str) and not value.strip()):
        return 0.0, None
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if math.isfinite(number):
        return number, None
    return 0.0, Problem(what=f"{name} is not a number", found=repr(value)[:40], allowed="a number, or nothing")


def _desirable(row: Mapping[str, Any], spec: DataSpec) -> tuple[bool | None, Problem | None]:
    value, name, missing = _cell(row, thumb_templates(spec).get("desirable"), "label")
    if missing:
        return None, missing[0]
    judged = _TRUTH.get(value.strip().lower()) if isinstance(value, str) else None
    if isinstance(value, bool | int) and value in (0, 1):
        judged = bool(value)
    if judged is not None:
        return judged, None
    found = "nothing" if value is None else repr(value)[:40]
    fix = 'name another column: data.desirable: "{column}"' if isinstance(value, str) else None
    allowed = "true, false (or 1, 0)"
    return None, Problem(what=f"{name} is not true or false", found=found, allowed=allowed, fix=fix)


def _not_an_answer(key: str) -> Problem:
    return Problem(
        what=f"`{key}` does not begin with an assistant turn",
        allowed="the answer alone; everything before it belongs to the prompt",
        fix="move the other turns to `prompt`",
    )


def _wrong_format(format: str, needs: str, allowed: str) -> Problem:
    return Problem(what=f"this objective learns from {needs}", found=f"data.format: {format}", allowed=allowed)


def _no_format(row: Mapping[str, Any], where: Where, what: str, allowed: str, fix: str | None) -> Problem:
    found = f"keys {', '.join(map(str, row)) or '(none)'}"
    return Problem(what=what, file=where[0], line=where[1], found=found, allowed=allowed, fix=fix)


def _hint(row: Mapping[str, Any], wanted: Sequence[str]) -> str | None:
    missing = [key for key in wanted if key not in row]
    others = [str(key) for key in row if key not in wanted]
    for key in missing:
        close = nearest(key, others)
        if close is not None:
            return f"did you mean `{key}` by `{close}`?"
    return f"add {', '.join(missing)}" if len(missing) < len(wanted) else None


def _placed(problems: Sequence[Problem], where: Where) -> BadInput:
    return BadInput([replace(p, file=p.file or where[0], line=p.line or where[1]) for p in problems])
