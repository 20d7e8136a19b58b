"""Where the answers are in a rendered conversation: which characters the model has to produce.

An answer begins where the generation prompt ends, so that training and generation see the same text before
it. It ends with the end-of-turn token (trained: it is how a model learns to stop); the line break that many
templates write after that token is not trained, because generation has stopped by then.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from shikomi.data.pieces import TextTokenizer
from shikomi.data.template import USER_MARK, ChatTemplate, Message, generation_spans
from shikomi.errors import BadInput, Problem

PROBE_PROMPT, PROBE_ANSWER, PROBE_NEXT = "zqprompt", "zqanswer", "zqnext"


@dataclass(frozen=True)
class Answer:
    """Characters [start, end) of the text are what message number `index` adds; index -1: not known which."""

    index: int
    start: int
    end: int


@dataclass(frozen=True)
class Layout:
    """A rendered conversation: its text, the answers to train, where to cut it for the tokenizer.

    Cuts are the ends of the generation prompts of all assistant turns, trained or not; `starts` has them by message,
    where the text begins with that prompt. `lacks_end`: the template writes no end of turn after the last answer; the
    text stops at that answer.
    """

    text: str
    answers: tuple[Answer, ...]
    cuts: tuple[int, ...]
    lacks_end: bool = False
    starts: Mapping[int, int] = field(default_factory=dict)


class TurnFinder:
    """Finds answers through a template: `{% generation %}` parts where it has them, else by rendering
    beginnings.

    Raises BadInput when the template cannot render a user turn with its answer.
    """

    def __init__(self, template: ChatTemplate, tokens: TextTokenizer) -> None:
        self.template = template
        self._tokens = tokens
        turns = [
            {"role": "user", "content": PROBE_PROMPT},
            {"role": "assistant", "content": PROBE_ANSWER},
            {"role": "user", "content": PROBE_NEXT},
        ]
        last, _ = self._render(turns[:2])
        inner, _ = self._render(turns)
        if PROBE_ANSWER not in last or PROBE_ANSWER not in inner:
            raise BadInput([Problem(what=f"{template.name} does not write the assistant's text")])
        after_last = last.rsplit(PROBE_ANSWER, 1)[1]
        after_inner = inner.rsplit(PROBE_ANSWER, 1)[1].split(PROBE_NEXT, 1)[0]
        before = last.split(PROBE_PROMPT, 1)[0]
        self.end_of_last = tokens.special_run(after_last) or after_last.strip() or None
        self.end_of_inner = self._inner_end(after_inner, before)

    def _inner_end(self, after: str, before: str) -> str | None:
        """The end of a turn that is not the last; a special token that also opens turns is not one."""
        if self.end_of_last is not None and after.lstrip().startswith(self.end_of_last):
            return self.end_of_last
        special = self._tokens.first_special(after)
        return None if special is None or special in before else special

    def _render(
        self, messages: Sequence[Message], tools: list[Any] | None = None, prompt: bool = False
    ) -> tuple[str, list[tuple[int, int]]]:
        return generation_spans(self.template.render(messages, tools, add_generation_prompt=prompt))

    def prompt(self, messages: Sequence[Message], tools: list[Any] | None) -> Layout:
        """The text before an answer that is to come, cut like the training text."""
        text, _ = self._render(messages, tools, prompt=True)
        starts = self._starts(text, messages, tools)
        return Layout(text, (), tuple(sorted(starts.values())))

    def find(self, messages: Sequence[Message], tools: list[Any] | None, trained: set[int]) -> Layout:
        """Render the conversation and locate the answers of the messages in `trained`.

        Raises BadInput naming the template when it is not prefix-stable.
        """
        text, spans = self._render(messages, tools)
        starts = self._starts(text, messages, tools)
        if spans:
            return self._from_spans(text, spans, starts, messages, trained)
        unstable = sorted(trained - set(starts))
        if unstable:
            raise BadInput([self._unstable(unstable[0], messages)])
        answers, lacks_end = [], False
        for index in sorted(trained):
            is_last = index == len(messages) - 1
            end_of_turn = self.end_of_last if is_last else self.end_of_inner
            limit = min((s for s in starts.values() if s > starts[index]), default=len(text))
            end = self._end(text, messages[index], starts[index], limit, end_of_turn)
            answers.append(Answer(index, starts[index], end))
            if is_last and end_of_turn is None:
                lacks_end, text = True, text[:end]
        return Layout(text, tuple(answers), tuple(sorted(starts.values())), lacks_end, starts)

    def _starts(self, text: str, messages: Sequence[Message], tools: list[Any] | None) -> dict[int, int]:
        """End of the generation prompt of each assistant turn, where that prompt is how the text begins."""
        starts = {}
        for index, message in enumerate(messages):
            if message["role"] == "assistant" and index > 0:
                prompt, _ = self._render(messages[:index], tools, prompt=True)
                if text.startswith(prompt):
                    starts[index] = len(prompt)
        return starts

    def _end(self, text: str, message: Message, start: int, limit: int, end_of_turn: str | None) -> int:
        content = str(message.get("content") or "").strip()
        found = text.find(content, start, limit) if content else start
        if end_of_turn is not None:
            at = self._find_written(text, end_of_turn, found + len(content) if found >= 0 else start, limit)
            if at >= 0 and (found >= 0 or self._tokens.first_special(end_of_turn)):
                return at + len(end_of_turn)
        elif found >= 0:
            return found + len(content)
        raise BadInput(
            [
                Problem(
                    what=f"the end of an answer was not found in the text that {self.template.name} renders",
                    found=repr(text[start : start + 60]),
                    allowed=f"the answer, then {end_of_turn!r}" if end_of_turn else "the answer as it is in the row",
                    fix="give a chat_template with {% generation %} around the assistant's text",
                )
            ]
        )

    def _find_written(self, text: str, wanted: str, start: int, limit: int) -> int:
        """The first place in [start, limit) where the template, not a user, wrote `wanted`; -1 if nowhere."""
        at = text.find(wanted, start, limit)
        while at > 0 and text[at - 1] == USER_MARK:
            at = text.find(wanted, at + 1, limit)
        return at

    def _from_spans(
        self,
        text: str,
        spans: list[tuple[int, int]],
        starts: dict[int, int],
        messages: Sequence[Message],
        trained: set[int],
    ) -> Layout:
        assistants = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
        stable = set(assistants) <= set(starts)
        if stable:
            owners = [max((i for i in assistants if starts[i] < end), default=-1) for _, end in spans]
        elif len(spans) == len(assistants):
            owners = assistants
        elif trained == set(assistants):
            owners = [-1] * len(spans)
        else:
            raise BadInput([self._unstable(min(set(assistants) - set(starts)), messages)])
        answers = []
        for index, (start, end) in zip(owners, spans, strict=True):
            if stable and index >= 0:
                start = max(start, starts[index])
            end = self._span_end(text, start, end)
            if (index in trained or (index < 0 and not stable)) and start < end:
                answers.append(Answer(index, start, end))
        cuts = {*starts.values(), *(a.start for a in answers)}
        return Layout(text, tuple(answers), tuple(sorted(cuts)), starts=starts)

    def _span_end(self, text: str, start: int, end: int) -> int:
        """The marked part without white space after its end of turn; with an end of turn that stands right
        after.
        """
        ends = [e for e in (self.end_of_last, self.end_of_inner) if e is not None]
        part = text[start:end].rstrip()
        if any(part.endswith(e) for e in ends):
            return start + len(part)
        following = next((e for e in ends if text.startswith(e, end)), "")
        return end + len(following)

    def _unstable(self, index: int, messages: Sequence[Message]) -> Problem:
        return Problem(
            what=f"{self.template.name} is not prefix-stable: what it writes before the answer in turn {index + 1} "
            "differs from its generation prompt",
            found=f"turns {' '.join(str(m['role']) for m in messages)}",
            allowed="a template that renders the beginning of a conversation as the whole begins",
            fix="give a chat_template with {% generation %} around the assistant's text, or data.train_on: last",
        )
