"""A record as rows of each format, with what is lost on the way: the inverse of the readers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from shikomi.data.conversation import Conversation, prompt_answer
from shikomi.data.preferences import Judgement, Preference
from shikomi.data.records import Record

SHAREGPT_ROLES = {"system": "system", "user": "human", "assistant": "gpt", "tool": "observation"}


@dataclass(frozen=True)
class Written:
    """Rows, the records that they hold, what was lost, and what other tools would read differently."""

    rows: list[dict[str, Any]]
    records: list[Any]
    lost: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Cannot:
    """A record that the format cannot express at all."""

    why: str


def is_plain(record: Record) -> bool:
    """Whether prompt and answers can be written as strings without a loss."""
    answers = record.answers if isinstance(record, Preference | Judgement) else (record,)
    return all(_is_plain(answer) for answer in answers)


def _is_plain(conversation: Conversation) -> bool:
    if conversation.plain is not None:
        return True
    roles = [message["role"] for message in conversation.messages]
    bare = all(set(message) <= {"role", "content"} for message in conversation.messages)
    return roles == ["user", "assistant"] and bare and not conversation.tools


def _as_text(record: Record, as_lists: bool) -> Written | Cannot:
    conversation, lost = _conversation(record)
    if conversation is None:
        return Cannot(lost[0])
    if conversation.text is not None:
        return Written([{"text": conversation.text}], [conversation], lost)
    if conversation.plain is None:
        return Cannot("conversations: a chat template makes text of them when they are trained")
    text = "".join(conversation.plain)
    return Written([{"text": text}], [Conversation(text=text)], (*lost, "which part of a text is trained"))


def _as_messages(record: Record, as_lists: bool) -> Written | Cannot:
    conversation, lost = _turns(record)
    if conversation is None:
        return Cannot(lost[0])
    turns = [_flagged(conversation, at) for at in range(len(conversation.messages))]
    row = {"messages": turns, **_tools(conversation)}
    return Written([row], [conversation], lost, _untrained(turns))


def _as_sharegpt(record: Record, as_lists: bool) -> Written | Cannot:
    conversation, lost = _turns(record)
    if conversation is None:
        return Cannot(lost[0])
    turns = []
    for at in range(len(conversation.messages)):
        turn = _flagged(conversation, at)
        role, said = turn.pop("role"), turn.pop("content")
        turns.append({"from": SHAREGPT_ROLES[role], "value": said, **turn})
    return Written([{"conversations": turns, **_tools(conversation)}], [conversation], lost, _untrained(turns))


def _as_prompt_completion(record: Record, as_lists: bool) -> Written | Cannot:
    conversation, lost = _turns(record)
    if conversation is None:
        return Cannot(lost[0])
    row, notes = _prompt_and_answer(conversation, as_lists, "completion")
    return Written([row], [conversation], lost, notes)


def _as_alpaca(record: Record, as_lists: bool) -> Written | Cannot:
    conversation, lost = _turns(record)
    if conversation is None:
        return Cannot(lost[0])
    if not _is_plain(replace(conversation, messages=_without_system(conversation), plain=None)):
        return Cannot("conversations of several turns, tools or names")
    system, prompt, answer = _strings(conversation)
    row = {"instruction": prompt, "input": "", "output": answer} | ({"system": system} if system else {})
    return Written([row], [conversation], lost)


def _as_preference(record: Record, as_lists: bool) -> Written | Cannot:
    assert isinstance(record, Preference)
    margin = {"margin": record.margin} if record.margin else {}
    if not record.chosen.messages:  # where the prompt ends is where the answers part
        assert record.chosen.plain is not None and record.rejected.plain is not None
        texts = {"chosen": "".join(record.chosen.plain), "rejected": "".join(record.rejected.plain)}
        return Written([{**texts, **margin}], [record])
    row, notes = _prompt_and_answer(record.chosen, as_lists, "chosen")
    other, _ = _prompt_and_answer(record.rejected, as_lists, "rejected")
    return Written([{**row, "rejected": other["rejected"], **margin}], [record], (), notes)


def _as_unpaired(record: Record, as_lists: bool) -> Written | Cannot:
    if isinstance(record, Judgement):
        return _judged(record.conversation, record.desirable, as_lists)
    assert isinstance(record, Preference)
    good, bad = _judged(record.chosen, True, as_lists), _judged(record.rejected, False, as_lists)
    lost = ("margins",) if record.margin else ()
    return Written(good.rows + bad.rows, good.records + bad.records, lost, good.notes)


def _judged(answer: Conversation, desirable: bool, as_lists: bool) -> Written:
    conversation = _explicit(answer)
    row, notes = _prompt_and_answer(conversation, as_lists, "completion")
    if not answer.messages:
        notes = (*notes, "a prompt that was the common beginning of the answers")
    return Written([{**row, "label": desirable}], [Judgement(conversation, desirable)], (), notes)


def _conversation(record: Record) -> tuple[Conversation | None, tuple[str, ...]]:
    """(the conversation that is left of a record, what is lost with the rest)."""
    if isinstance(record, Preference):
        return _explicit(record.chosen), ("rejected answers", *(("margins",) if record.margin else ()))
    if isinstance(record, Judgement):
        if not record.desirable:
            return None, ("answers that were judged bad",)
        return _explicit(record.conversation), ("judgements",)
    return record, ()


def _turns(record: Record) -> tuple[Conversation | None, tuple[str, ...]]:
    """`_conversation` where turns are needed."""
    conversation, lost = _conversation(record)
    if conversation is not None and conversation.text is not None:
        return None, ("plain texts: nothing says which part is the question",)
    return conversation, lost


def _explicit(conversation: Conversation) -> Conversation:
    """With a prompt of its own, where it was the common beginning of two answers."""
    if conversation.messages or conversation.plain is None:
        return conversation
    prompt, answer = conversation.plain
    found, _ = prompt_answer(None, prompt, answer, prompt)
    assert found is not None
    return found


def _flagged(conversation: Conversation, at: int) -> dict[str, Any]:
    """A message, with `train: false` where an assistant's turn is not trained."""
    message = {key: value for key, value in conversation.messages[at].items() if key != "train"}
    if message["role"] == "assistant" and not _trained(conversation, at):
        message["train"] = False
    return message


def _trained(conversation: Conversation, at: int) -> bool:
    return at >= conversation.completion_from and conversation.messages[at].get("train") is not False


def _untrained(turns: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    return ("`train: false` on turns that are not trained",) if any("train" in turn for turn in turns) else ()


def _prompt_and_answer(conversation: Conversation, as_lists: bool, key: str) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The prompt up to the first trained turn, and the rest under `key`; what other tools read otherwise."""
    if not as_lists:
        system, prompt, answer = _strings(conversation)
        row = {"system": system} if system else {}
        return {**row, "prompt": prompt, key: answer}, ("a `system` column",) if system else ()
    messages = conversation.messages
    first = conversation.completion_from
    if key == "completion":
        first = next(at for at, m in enumerate(messages) if m["role"] == "assistant" and _trained(conversation, at))
    before = [{k: v for k, v in message.items() if k != "train"} for message in messages[:first]]
    rest = [_flagged(conversation, at) for at in range(first, len(messages))]
    several = ("answers of several turns, the user's included",) if any(m["role"] == "user" for m in rest) else ()
    return {"prompt": before, key: rest, **_tools(conversation)}, (*several, *_untrained(rest))


def _strings(conversation: Conversation) -> tuple[str, str, str]:
    """(system, prompt, answer) of a conversation that is plain."""
    *before, answer = conversation.messages
    system = before[0]["content"] if before[0]["role"] == "system" else ""
    return system, before[-1]["content"], answer["content"]


def _without_system(conversation: Conversation) -> tuple[dict[str, Any], ...]:
    messages = conversation.messages
    return messages[1:] if messages and messages[0]["role"] == "system" else messages


def _tools(conversation: Conversation) -> dict[str, Any]:
    return {"tools": conversation.tools} if conversation.tools else {}


TARGETS: dict[str, Callable[[Record, bool], Written | Cannot]] = {
    "messages": _as_messages,
    "prompt_completion": _as_prompt_completion,
    "sharegpt": _as_sharegpt,
    "alpaca": _as_alpaca,
    "text": _as_text,
    "preference": _as_preference,
    "unpaired_preference": _as_unpaired,
}
