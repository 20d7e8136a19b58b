"""The rows of a stage in tokens: counted by the model's tokenizer on a sample, or estimated from characters."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from shikomi.data.check import shown_labels
from shikomi.data.conversation import Conversation
from shikomi.data.findings.lengths import CHARACTERS_PER_TOKEN
from shikomi.data.messages import content_text
from shikomi.data.packing import MIN_SHARED_PREFIX
from shikomi.data.sources import Row, hub_id, rows
from shikomi.errors import BadInput, Problem
from shikomi.plan.estimate import Rows
from shikomi.recipe.schema import DataSpec

SAMPLE = 1000  # rows whose tokens are counted
TURN = 4  # tokens of a turn in a chat template besides its text and the name of who speaks
TOKENS_PER_TURN = 25  # what a chat template adds to a row
HUB_ROWS = 10_000  # assumed of a data set on the hub, which is not fetched to plan

Count = Callable[[Collection[str]], dict[str, int]]
"""Tokens of each of some texts."""


def rows_of(spec: DataSpec, kind: str, max_length: int, folder: Path | None, chat: str = "auto") -> Rows:
    """Rows of a stage; `kind` is what the objective learns from. Raises BadInput for rows that cannot be read."""
    if any(hub_id(source.path) for source in spec.train):
        return Rows(count=HUB_ROWS, tokens=max_length / 2, longest=max_length)
    count, extra, measured = _tokenizer(folder, chat)
    total = 0
    sample: list[Row] = []
    for source in spec.train:
        for row in rows(source):
            total += 1
            if len(sample) < SAMPLE:
                sample.append(row)
    if not sample:
        raise BadInput([Problem("there are no rows to train on", ", ".join(s.path for s in spec.train))])
    labels = shown_labels(spec, None, kind)
    records = [record for row in sample for record in _parsed(row, spec, kind, labels)]
    texts = {text for record in records for answer in _answers(record) for side in _texts(answer) for text in side}
    counted = count(texts | {"user", "assistant"})
    lengths = [_lengths(record, kind, counted, extra, max_length) for record in records]
    tokens, scored, prompts = (sum(column) for column in zip(*lengths, strict=True))
    validation = spec.validation if isinstance(spec.validation, float) else 0.0
    return Rows(
        count=max(1, round(total * len(lengths) / len(sample) * (1 - validation))),
        tokens=max(1.0, tokens / len(lengths)),
        longest=max(length for length, _, _ in lengths),
        scored_share=1.0 if spec.train_on == "everything" else scored / max(1, tokens),
        prompt_share=prompts / max(1, tokens) if kind != "conversations" else 0.0,
        measured=measured,
        shared=_shared(records, count, extra) if kind == "conversations" else 0.0,
    )


def _shared(conversations: list[Conversation], count: Count, extra: int) -> float:
    """Tokens that all rows begin with: an instruction, or a system message."""
    prompts = ["\n".join(_texts(conversation)[0]) for conversation in conversations]
    common = os.path.commonprefix(prompts)
    tokens = count({common})[common] + extra if common else 0
    return float(tokens) if tokens >= MIN_SHARED_PREFIX and len(prompts) > 1 else 0.0


def _tokenizer(folder: Path | None, chat: str) -> tuple[Count, int, bool]:
    """How to count the tokens of a text, how many a chat template adds to a turn, and whether that is counted."""
    path = None if folder is None else folder / "tokenizer.json"
    if folder is None or path is None or not path.is_file():
        return _estimated, TOKENS_PER_TURN // 4, False
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(path))
    config = folder / "tokenizer_config.json"
    template = (folder / "chat_template.jinja").is_file()
    template = template or (config.is_file() and '"chat_template"' in config.read_text(encoding="utf-8"))
    extra = TURN if chat == "always" or (chat == "auto" and template) else 0

    def count(texts: Collection[str]) -> dict[str, int]:
        return dict(
            zip(texts, map(len, tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)), strict=True)
        )

    return count, extra, True


def _estimated(texts: Collection[str]) -> dict[str, int]:
    return {text: round(len(text) / CHARACTERS_PER_TOKEN) for text in texts}


def _parsed(row: Row, spec: DataSpec, kind: str, labels: tuple[str, ...] | None) -> list[Any]:
    """A row as conversations, pairs or judged answers. Raises BadInput."""
    from shikomi.data.formats import parse_row
    from shikomi.data.preferences import parse_pair, parse_thumbs

    where = (row.file, row.line)
    if kind == "pairs":
        return [parse_pair(row.data, spec, where, labels)]
    if kind == "thumbs":
        return list(parse_thumbs(row.data, spec, where, labels))
    return [parse_row(row.data, spec, where, labels)]


def _answers(record: Any) -> Iterable[Conversation]:
    """The one conversation of a row, or those that a preference compares."""
    return [record] if isinstance(record, Conversation) else record.answers


def _lengths(record: Any, kind: str, tokens: Mapping[str, int], extra: int, max_length: int) -> tuple[int, int, int]:
    """Tokens of a row, those that are trained, and those of its prompt."""
    prompt, trained = 0, []
    for answer in _answers(record):
        before, after = _texts(answer)
        names = tokens["user"] * len(before) + tokens["assistant"] * (len(after) > 0) if extra else 0
        prompt = sum(tokens[text] + extra for text in before) + names + extra // 2  # the answer's header is no target
        trained.append(sum(tokens[text] + 1 for text in after))
    if kind == "conversations":
        length = min(max_length, prompt + trained[0])
        return length, max(0, length - prompt), min(prompt, length)
    answers_kept = [min(n, max(1, max_length - prompt)) for n in trained]
    return prompt + sum(answers_kept), sum(answers_kept), prompt


def _texts(conversation: Conversation) -> tuple[list[str], list[str]]:
    """Texts before the answer, and of the answer; a row of plain text is trained whole."""
    if conversation.text is not None and not conversation.messages:
        return [], [conversation.text]
    texts = [content_text(message.get("content")) or "" for message in conversation.messages]
    at = conversation.completion_from or next(
        (i for i, message in enumerate(conversation.messages) if message.get("role") == "assistant"), len(texts)
    )
    return texts[:at], texts[at:]
