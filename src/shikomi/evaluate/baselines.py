"""What a trained model has to beat: the most frequent label, and prompts to the untouched model."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from shikomi.data.conversation import Conversation
from shikomi.data.encode import Encoder


def answer_of(conversation: Conversation) -> str | None:
    """The reference answer: the last turn where it is the assistant's; None for plain text rows and open prompts."""
    if conversation.messages:
        last = conversation.messages[-1]
        return last["content"] if last["role"] == "assistant" else None
    return conversation.plain[1] if conversation.plain and conversation.plain[1] else None


def input_of(conversation: Conversation) -> str:
    """What a reader should see of a row's input: its last turn before the answer, or its text."""
    if conversation.messages:
        before = conversation.messages[: -1 if answer_of(conversation) is not None else None]
        return before[-1]["content"] if before else ""
    return conversation.plain[0] if conversation.plain else conversation.text or ""


def majority_label(labels: Sequence[str]) -> str:
    """The most frequent label of training rows, the first in alphabetical order where several are."""
    counts = Counter(labels)
    return min(counts, key=lambda label: (-counts[label], label))


def choose_shots(rows: Sequence[Conversation], shots: int, seed: int, balanced: bool) -> list[Conversation]:
    """`shots` examples for a few-shot prompt from training rows, in the order they are shown.

    Drawn at random from the shorter half, so that they fit the context. With `balanced`, answers are labels: every
    label gives one example before any gives a second. Fewer than `shots` where there are not as many rows with an
    answer.
    """
    rng = np.random.default_rng([seed, 0x5807])
    groups: dict[str, list[Conversation]] = {}
    for row in rows:
        answer = answer_of(row)
        if answer is not None and not row.tools:
            groups.setdefault(answer if balanced else "", []).append(row)
    queues = []
    for answer in sorted(groups):
        # Where a label is rare, the shorter half would leave nothing to draw.
        ordered = sorted(groups[answer], key=_length)
        short = ordered[: max(len(ordered) // 2, min(shots, len(ordered)))]
        queues.append([short[i] for i in rng.permutation(len(short))])
    chosen: list[Conversation] = []
    turn = 0
    while queues and len(chosen) < shots:
        order = rng.permutation(len(queues))
        chosen += [queues[i][turn] for i in order[: shots - len(chosen)]]
        turn += 1
        queues = [queue for queue in queues if len(queue) > turn]
    return chosen


def _length(conversation: Conversation) -> int:
    if conversation.messages:
        return sum(len(message["content"]) for message in conversation.messages)
    return sum(map(len, conversation.plain or ()))


def with_shots(conversation: Conversation, shots: Sequence[Conversation]) -> Conversation:
    """The row with the examples as earlier turns, after its own system message; plain text rows get blocks of text."""
    system = conversation.messages[:1] if _has_system(conversation) else ()
    turns: list[dict[str, Any]] = [*system]
    for shot in shots:
        turns += shot.messages[1:] if _has_system(shot) else shot.messages
    own = conversation.messages[len(system) :]
    plain = conversation.plain
    if plain:
        blocks = ["".join(shot.plain) for shot in shots if shot.plain]
        plain = ("\n\n".join([*blocks, plain[0]]), plain[1])
    return replace(
        conversation,
        messages=(*turns, *own) if conversation.messages else (),
        plain=plain,
        completion_from=conversation.completion_from + len(turns) - len(system),
    )


def _has_system(conversation: Conversation) -> bool:
    return bool(conversation.messages) and conversation.messages[0]["role"] == "system"


@dataclass(frozen=True)
class FewShot:
    """Few-shot prompts of all rows, with the number of examples that fit each."""

    prompts: list[list[int]]
    used: list[int]

    def notes(self) -> list[str]:
        """What to tell about rows that had no room for all examples."""
        most = max(self.used, default=0)
        fewer = sum(used < most for used in self.used)
        if not fewer:
            return []
        return [f"few-shot: {fewer:,} of {len(self.used):,} rows had room for fewer than {most} examples"]


def few_shot_prompts(
    rows: Sequence[Conversation], shots: Sequence[Conversation], encoder: Encoder, max_length: int, room: int
) -> FewShot:
    """Prompts of every row with as many of the examples, from the first on, as fit `max_length` tokens.

    `room` tokens are left for the answer. A row that is itself longer keeps its prompt without examples.
    """
    prompts, used = [], []
    for row in rows:
        number = len(shots)
        prompt = encoder.encode_prompt(with_shots(row, shots))
        while number and len(prompt) + room > max_length:
            number -= 1
            prompt = encoder.encode_prompt(with_shots(row, shots[:number]))
        prompts.append(prompt)
        used.append(number)
    return FewShot(prompts, used)
