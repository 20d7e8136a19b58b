"""Conversations to token ids and masks: the chat template decides what is trained, token by token."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from shikomi.data.answers import (
    Answers,
    RenderedAnswer,
    answer_pieces,
    check_one_prompt,
    join_answers,
    split_answer,
)
from shikomi.data.conversation import Conversation
from shikomi.data.pieces import Piece, TextTokenizer
from shikomi.data.render import Encoded, Rendered, cut_pieces, join_pieces, leading_ids
from shikomi.data.template import (
    chat_template_of,
    special_variables,
    wants_text_arguments,
    with_text_arguments,
)
from shikomi.data.turns import PROBE_PROMPT, TurnFinder
from shikomi.errors import BadInput, Problem

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from shikomi.data.preferences import Preference

VERSION = 1
"""Part of every cache key: raise it when the same row would be encoded differently."""


class Encoder:
    """Encodes conversations with one tokenizer and one chat template.

    chat: auto (the template where there is one) | always | never; template: text or path that replaces the
    tokenizer's own; train_on: all assistant turns | last | everything (every token but the first). Rows
    longer than `max_length` tokens lose their end. Raises BadInput for a tokenizer or template that cannot
    do this.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        chat: str = "auto",
        template: str | None = None,
        train_on: str = "all",
        max_length: int | None = None,
    ) -> None:
        if not tokenizer.is_fast:
            raise BadInput(
                [
                    Problem(
                        what="this tokenizer cannot say which characters a token comes from",
                        found=type(tokenizer).__name__,
                        allowed="a fast tokenizer (a model folder with tokenizer.json)",
                    )
                ]
            )
        self.tokenizer = tokenizer
        self.train_on = train_on
        self.max_length = max_length
        self.notes: list[str] = []
        self._chat, self._template = chat, template
        self._tokens = TextTokenizer(tokenizer.backend_tokenizer)
        self._bos = leading_ids(tokenizer)
        self.template = None if chat == "never" else chat_template_of(tokenizer, template)
        if self.template is None and chat == "always":
            raise BadInput(
                [
                    Problem(
                        what="chat: always needs a chat template, and this tokenizer has none",
                        allowed="chat: auto or never, or a chat_template in the recipe",
                        fix="give chat_template",
                    )
                ]
            )
        self._finder = TurnFinder(self.template, self._tokens) if self.template else None
        self._arguments_as_text = self.template is not None and wants_text_arguments(self.template)
        self._answers: dict[str, list[int]] = {}
        if self._finder and self._finder.end_of_last is None:
            self.notes.append(
                f"{self._finder.template.name} writes no end of turn: {tokenizer.eos_token} is added after the answer"
            )

    def __reduce__(self) -> tuple[type[Encoder], tuple[Any, ...]]:
        """For another process: a compiled template cannot be sent, and is made there again."""
        return Encoder, (self.tokenizer, self._chat, self._template, self.train_on, self.max_length)

    @property
    def end_of_turn(self) -> str | None:
        """The text that ends an answer: the template's end of turn, else the end-of-text token."""
        found = self._finder.end_of_last if self._finder else None
        return found or self.tokenizer.eos_token

    @property
    def stop_ids(self) -> list[int]:
        """Token ids at which generation stops: end of turn and end of text."""
        ends = [self._finder.end_of_last, self._finder.end_of_inner] if self._finder else []
        found = (self._tokens.last_special(end) for end in ends if end is not None)
        ids = {number for number in found if number is not None}
        if self.tokenizer.eos_token_id is not None:
            ids.add(self.tokenizer.eos_token_id)
        return sorted(ids)

    def fingerprint(self) -> str:
        """SHA-256 (hex) of everything here that decides how a row is encoded."""
        settings = {
            "version": VERSION,
            "tokenizer": self._tokens.backend.to_str(),
            "template": self.template.source if self.template else None,
            "special": special_variables(self.tokenizer),
            "bos": self._bos,
            "eos": self.tokenizer.eos_token_id,
            "train_on": self.train_on,
            "max_length": self.max_length,
        }
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()

    def as_chat(self, conversation: Conversation) -> bool:
        """Whether this row goes through the chat template. Raises BadInput for messages where there is
        none.
        """
        if conversation.text is not None:
            return False
        implicit = not conversation.messages and conversation.plain is not None
        if self._finder is not None and not implicit:
            return True
        if implicit and self._chat == "always":
            raise BadInput(
                [
                    Problem(
                        what="a pair of strings without `prompt` cannot go through a chat template",
                        allowed="chat: auto or never, or pairs with `prompt`",
                        fix="add the prompt to the row",
                    )
                ]
            )
        if conversation.plain is None:
            reason = "chat: never" if self._chat == "never" else "a tokenizer without a chat template"
            raise BadInput(
                [
                    Problem(
                        what=f"a row of messages cannot be encoded with {reason}",
                        allowed="rows of text, or of prompt and completion strings",
                        fix="chat: auto" if self._chat == "never" else "give a chat_template in the recipe",
                    )
                ]
            )
        return False

    def count(self, texts: Sequence[str]) -> list[int]:
        """Tokens of texts by themselves, without a template."""
        return [len(e) for e in self._tokens.backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def encode(self, conversation: Conversation) -> Encoded:
        """One row. Raises BadInput when the template refuses it."""
        result = self.encode_many([conversation])[0]
        if isinstance(result, BadInput):
            raise result
        return result

    def encode_many(self, conversations: Sequence[Conversation]) -> list[Encoded | BadInput]:
        """Many rows, tokenised in one batch; a row that the template refuses gives its BadInput."""
        rendered: list[Rendered | BadInput] = []
        for conversation in conversations:
            try:
                rendered.append(self._render(conversation))
            except BadInput as error:
                rendered.append(error)
        encoded = iter(self._tokens.encode([p for r in rendered if isinstance(r, Rendered) for p in r.pieces]))
        everything = self.train_on == "everything"
        return [
            r
            if isinstance(r, BadInput)
            else join_pieces(r, [next(encoded) for _ in r.pieces], everything, self.max_length)
            for r in rendered
        ]

    def encode_pair(self, pair: Preference) -> Answers:
        """One pair: its prompt, its chosen and its rejected answer. Raises BadInput when the template refuses it."""
        result = self.encode_answers([pair.answers])[0]
        if isinstance(result, BadInput):
            raise result
        return result

    def encode_answers(self, rows: Sequence[Sequence[Conversation]]) -> list[Answers | BadInput]:
        """Many rows of answers to one prompt, tokenised in one batch.

        Prompt and answer are tokenised apart, as a model sees them that generates the answer: the prompt's tokens are
        the beginning of both. Each answer is cut so that it fits into `max_length` behind the prompt. `train_on`:
        all assistant turns of the answer | only its last | everything (every token of the answer, as TRL).
        """
        rendered: list[list[RenderedAnswer] | BadInput] = []
        for answers in rows:
            try:
                found = [self._render_answer(answer) for answer in answers]
                check_one_prompt(found, self.template.name if self.template else "the text")
                rendered.append(found)
            except BadInput as error:
                rendered.append(error)
        pieces = [p for row in rendered if isinstance(row, list) for p in answer_pieces(row)]
        encoded = iter(self._tokens.encode(pieces))
        return [
            row if isinstance(row, BadInput) else join_answers(row, encoded, self._tokens, self.max_length)
            for row in rendered
        ]

    def encode_prompt(self, conversation: Conversation) -> list[int]:
        """Everything before the answer, generation prompt included: the ids that training has before it."""
        if not self.as_chat(conversation):
            text = conversation.text if conversation.text is not None else _plain(conversation)[0]
            rendered = Rendered((self._piece(text, first=True),), self._bos)
        else:
            assert self._finder is not None
            messages = list(conversation.messages)
            if messages and messages[-1]["role"] == "assistant":
                messages.pop()
            clean, tools, marked = self._clean(messages, conversation.tools)
            rendered = Rendered(cut_pieces(self._finder.prompt(clean, tools), marked))
        return join_pieces(rendered, self._tokens.encode(rendered.pieces), False, None).ids.tolist()

    def encode_answer(self, text: str) -> list[int]:
        """The trained tokens of an answer, end of turn included, as they follow the generation prompt."""
        if text not in self._answers:
            if self._finder is None:
                rendered = Rendered((self._piece(text, first=False, trained=True),), suffix=(self._eos(),))
            else:
                turns = ({"role": "user", "content": PROBE_PROMPT}, {"role": "assistant", "content": text})
                rendered = self._render_chat(Conversation(turns), {1})
            encoded = join_pieces(rendered, self._tokens.encode(rendered.pieces), False, None)
            # without a prompt the first token of a plain answer is token 0, which is never a target
            self._answers[text] = encoded.ids[encoded.mask if self._finder else slice(None)].tolist()
        return list(self._answers[text])

    def decode_answer(self, ids: Sequence[int]) -> str:
        """Generated ids as text: up to the first stop token, without special tokens and surrounding space."""
        stops = set(self.stop_ids)
        end = next((k for k, token in enumerate(ids) if token in stops), len(ids))
        return self.tokenizer.decode(list(ids[:end]), skip_special_tokens=True).strip()

    def _render(self, conversation: Conversation) -> Rendered:
        if conversation.text is not None:
            return Rendered((self._piece(conversation.text, True, trained=True),), self._bos, (self._eos(),))
        if not self.as_chat(conversation):
            prompt, completion = _plain(conversation)
            pieces = (self._piece(prompt, first=True), self._piece(completion, first=not prompt, trained=True))
            return Rendered(pieces, self._bos, (self._eos(),))
        return self._render_chat(conversation, self._trained(conversation))

    def _render_chat(self, conversation: Conversation, trained: set[int]) -> Rendered:
        assert self._finder is not None
        messages, tools, marked = self._clean(conversation.messages, conversation.tools)
        layout = self._finder.find(messages, tools, trained)
        return Rendered(cut_pieces(layout, marked), suffix=(self._eos(),) if layout.lacks_end else ())

    def _render_answer(self, conversation: Conversation) -> RenderedAnswer:
        everything = self.train_on == "everything"
        if not self.as_chat(conversation):
            prompt, answer = _plain(conversation)
            after = self._piece(answer, first=not prompt, trained=True)
            return RenderedAnswer((self._piece(prompt, first=True),), (after,), everything, self._bos, (self._eos(),))
        assert self._finder is not None
        first = conversation.completion_from
        turns = {i for i, m in enumerate(conversation.messages) if m["role"] == "assistant" and i >= first}
        messages, tools, marked = self._clean(conversation.messages, conversation.tools)
        layout = self._finder.find(messages, tools, turns)
        wanted = turns if everything else self._trained(conversation)
        suffix = (self._eos(),) if layout.lacks_end else ()
        return split_answer(layout, first, wanted, marked, everything, suffix)

    def _trained(self, conversation: Conversation) -> set[int]:
        """Numbers of the messages whose text is trained."""
        if self.train_on == "everything":
            return set()
        turns = [
            i
            for i, message in enumerate(conversation.messages)
            if message["role"] == "assistant" and i >= conversation.completion_from
        ]
        if self.train_on == "last":
            turns = turns[-1:]
        return {i for i in turns if conversation.messages[i].get("train") is not False}

    def _clean(
        self, messages: Sequence[Mapping[str, Any]], tools: list[Any] | None
    ) -> tuple[list[dict[str, Any]], list[Any] | None, bool]:
        """Messages as templates expect them, special-token strings marked; the last value: whether any
        were.
        """
        clean = []
        for message in messages:
            kept = {key: value for key, value in message.items() if key != "train"}
            reasoning = next((kept[key] for key in _REASONING if key in kept), None)
            if reasoning is not None:
                kept = {"thinking": reasoning, **kept, "reasoning_content": reasoning}
            if self._arguments_as_text and "tool_calls" in kept:
                kept["tool_calls"] = [with_text_arguments(call) for call in kept["tool_calls"]]
            clean.append(kept)
        marked, marked_tools = self._tokens.mark(clean), self._tokens.mark(tools)
        return marked, marked_tools, (marked, marked_tools) != (clean, tools)

    def _piece(self, text: str, first: bool, trained: bool = False) -> Piece:
        marked = self._tokens.mark(text)
        return Piece(marked, len(marked) if trained else 0, starts_text=first, marked=marked != text)

    def _eos(self) -> int:
        if self.tokenizer.eos_token_id is None:
            raise BadInput("this tokenizer has no end-of-text token (eos_token), so that no answer could end")
        return self.tokenizer.eos_token_id


_REASONING = ("reasoning_content", "thinking", "reasoning")


def _plain(conversation: Conversation) -> tuple[str, str]:
    assert conversation.plain is not None
    return conversation.plain
