"""Which of several answers to a prompt is better: by a reward model, a Python function, a reference, or a column."""

import hashlib
import importlib.util
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shikomi.data.conversation import Conversation
from shikomi.errors import BadInput, Problem
from shikomi.metrics._metric import Metric
from shikomi.metrics.chrf import ChrF
from shikomi.metrics.rouge import Rouge
from shikomi.model.files import resolve

REFERENCES: dict[str, Callable[[], Metric]] = {"chrf": ChrF, "rougeL": Rouge}


@dataclass(frozen=True)
class Asked:
    """A prompt that is answered: what is asked, its answer in the row where there is one, and the row's columns.

    prompt: the text that is written, None where messages are.
    """

    conversation: Conversation
    prompt: str | None
    reference: str | None
    row: dict[str, Any]
    place: tuple[str, int]

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The turns before the answer."""
        if self.prompt is not None:
            return [{"role": "user", "content": self.prompt}]
        return [{k: v for k, v in turn.items() if k != "train"} for turn in _before(self.conversation)]


def asked(conversation: Conversation, row: dict[str, Any], place: tuple[str, int], as_chat: bool = True) -> Asked:
    """A row as a prompt and its answer; without a chat template it is text. Raises BadInput for plain texts."""
    if conversation.text is not None:
        raise BadInput([Problem("a plain text asks nothing", *place, allowed="rows with a prompt or with messages")])
    if not as_chat:
        assert conversation.plain is not None
        return Asked(conversation, conversation.plain[0], conversation.plain[1] or None, row, place)
    turns = _before(conversation)
    bare = [turn["role"] for turn in turns] == ["user"] and set(turns[0]) <= {"role", "content"}
    last = conversation.messages[-1]
    reference = last["content"] if last["role"] == "assistant" else None
    return Asked(conversation, turns[0]["content"] if bare and not conversation.tools else None, reference, row, place)


def _before(conversation: Conversation) -> list[dict[str, Any]]:
    turns = list(conversation.messages)
    return turns[:-1] if turns and turns[-1]["role"] == "assistant" else turns


Ranker = Callable[[Sequence[Asked], Sequence[Sequence[str]]], list[list[float]]]
"""Scores of the answers to each prompt: the higher, the better."""


def by_reference(name: str) -> Ranker:
    """How near an answer is to the one in the row, by chrF or ROUGE-L. Raises BadInput for another name."""
    if name not in REFERENCES:
        raise BadInput([Problem("--rank-by reference: no such score", found=name, allowed=", ".join(REFERENCES))])
    metric = REFERENCES[name]()

    def rank(prompts: Sequence[Asked], answers: Sequence[Sequence[str]]) -> list[list[float]]:
        found = []
        for one, several in zip(prompts, answers, strict=True):
            rows = metric.row_values(metric.statistics(list(several), [_reference(one)] * len(several)))
            found.append([float(value) for value in rows])
        return found

    return rank


Answered = dict[str, Any] | tuple[str, str]
"""What a reward model takes: a row of messages, or (prompt, answer)."""


def by_reward(score: Callable[[list[Answered]], list[float]]) -> Ranker:
    """A reward model's values of answers behind their prompts."""

    def rank(prompts: Sequence[Asked], answers: Sequence[Sequence[str]]) -> list[list[float]]:
        together = zip(prompts, answers, strict=True)
        values = iter(score([_answered(one, answer) for one, several in together for answer in several]))
        return [[float(next(values)) for _ in several] for several in answers]

    return rank


def _answered(one: Asked, answer: str) -> Answered:
    if one.prompt is not None:
        return one.prompt, answer
    turns = [*one.messages, {"role": "assistant", "content": answer}]
    return {"messages": turns} | ({"tools": one.conversation.tools} if one.conversation.tools else {})


def by_function(given: str) -> Ranker:
    """A function of the user's: `NAME(prompt, answers, row)` gives a number for each answer.

    given: FILE.py:NAME. prompt is text, or a list of messages where there is more than one question; row has the
    columns. The file is run, with all that it imports. Raises BadInput where there is no such function, and for an
    error in it or a value that is no number, with the row.
    """
    file, _, name = given.rpartition(":")
    if not file or not Path(file).is_file():
        raise BadInput([Problem("--rank-by function: no such file", found=given, allowed="function:FILE.py:NAME")])
    function = _load(Path(file), name)

    def rank(prompts: Sequence[Asked], answers: Sequence[Sequence[str]]) -> list[list[float]]:
        return [_called(function, name, one, several) for one, several in zip(prompts, answers, strict=True)]

    return rank


def ranker_digest(kind: str, what: str) -> str | None:
    """What the scores of `--rank-by kind:what` come from: SHA-256 (hex) of a function's file or of a reward model."""
    if kind == "function":
        return hashlib.sha256(Path(what.rpartition(":")[0]).read_bytes()).hexdigest()
    return resolve(what).digest() if kind == "reward" else None


def _load(file: Path, name: str) -> Callable[..., Any]:
    own_name = f"_ranking_{file.stem}"
    spec = importlib.util.spec_from_file_location(own_name, file)
    if spec is None or spec.loader is None:
        raise BadInput([Problem("not a Python file", str(file), allowed="FILE.py")])
    module = importlib.util.module_from_spec(spec)
    sys.modules[own_name] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise BadInput([Problem(f"an error in this file: {type(error).__name__}: {error}", str(file))]) from error
    function = vars(module).get(name)
    if not callable(function):
        own = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        what = f"there is no function `{name}` in this file"
        raise BadInput([Problem(what, str(file), allowed=", ".join(own) or "def score(prompt, answers, row)")])
    return function


def _called(function: Callable[..., Any], name: str, one: Asked, answers: Sequence[str]) -> list[float]:
    prompt = one.prompt if one.prompt is not None else one.messages
    try:
        found = list(function(prompt, list(answers), dict(one.row)))
        values = [float(value) for value in found]
    except Exception as error:
        raise BadInput([Problem(f"`{name}` raised {type(error).__name__}: {error}", *one.place)]) from error
    if len(values) != len(answers) or not all(map(math.isfinite, values)):
        allowed = f"{len(answers)} finite numbers, one for each answer"
        raise BadInput(
            [Problem(f"`{name}` returned something else", *one.place, found=repr(found)[:80], allowed=allowed)]
        )
    return values


def _reference(one: Asked) -> str:
    if one.reference is None:
        fix = "add the answer to the row, or rank by something else"
        raise BadInput([Problem("this row has no answer to compare with", *one.place, fix=fix)])
    return one.reference


def number(value: Any, name: str, place: tuple[str, int]) -> float:
    """A cell of the column that ranks: a number, true or false, or one of these as text. Raises BadInput."""
    text = str(value).strip().lower()
    try:
        found = {"true": 1.0, "false": 0.0}.get(text, math.nan) if text in ("true", "false") else float(text)
    except ValueError:
        found = math.nan
    if not math.isfinite(found):
        raise BadInput([Problem(f"`{name}` is not a number", *place, found=repr(value)[:40], allowed="5, 0.3, true")])
    return found
