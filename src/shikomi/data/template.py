"""Chat templates: rendered in Jinja's immutable sandbox, with the parts marked `{% generation %}` located."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, LoopControlExtension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from shikomi.errors import BadInput, Problem

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RESERVED = "\ufdd0\ufdd1\ufdd2\ufdd3\ufdd4"
"""Unicode noncharacters used as marks while a row is rendered and encoded; rows that hold one are refused."""

GENERATION_START, GENERATION_END, USER_MARK, NAME_START, NAME_END = tuple(RESERVED)

FIXED_DATE = datetime(2024, 7, 26)
"""What `strftime_now` of a template returns: the date Llama 3 falls back to. Training text that changes
from day to day would break the token cache and exact resumption.
"""

Message = Mapping[str, Any]


class _Generation(Extension):
    """`{% generation %}...{% endgeneration %}`: the enclosed output, between two marks."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_marked"), [], [], body).set_lineno(line)

    def _marked(self, caller: Callable[[], str]) -> str:
        return f"{GENERATION_START}{caller()}{GENERATION_END}"


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes HTML characters, which models are not trained on.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _environment() -> ImmutableSandboxedEnvironment:
    # The settings that transformers renders chat templates with.
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, LoopControlExtension]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = FIXED_DATE.strftime
    return environment


def read_template(given: str) -> tuple[str, str]:
    """(template text, its name) of a recipe's `chat_template`: an inline template or the path of a file.

    Raises BadInput when it looks like a path and there is no such file.
    """
    if "{" in given or "\n" in given:
        return given, "the recipe's chat_template"
    try:
        return Path(given).expanduser().read_text(encoding="utf-8"), given
    except FileNotFoundError:
        raise BadInput(
            [
                Problem(
                    what="chat_template names a file that does not exist",
                    found=given,
                    allowed="the path of a Jinja file, or the template itself",
                    fix="correct the path",
                )
            ]
        ) from None
    except UnicodeDecodeError as error:
        raise BadInput([Problem(what="the chat template is not UTF-8 text", file=given, found=str(error))]) from None


class ChatTemplate:
    """A compiled chat template.

    `source` is its Jinja text, `name` what messages call it, `variables` the special tokens it may refer to
    (`bos_token`, `eos_token`, ...). Raises BadInput when it does not compile.
    """

    def __init__(self, source: str, name: str, variables: Mapping[str, str]) -> None:
        self.source = source
        self.name = name
        self.marks_generation = re.search(r"\{%-?\s*generation\s*-?%\}", source) is not None
        self._variables = dict(variables)
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise BadInput(
                [Problem(what=f"{name} is not a valid Jinja template", line=error.lineno, found=str(error.message))]
            ) from None

    def render(
        self, messages: Sequence[Message], tools: list[Any] | None = None, add_generation_prompt: bool = False
    ) -> str:
        """The conversation as text; generation parts stand between GENERATION_START and GENERATION_END.

        Raises BadInput with the template's own words when it refuses the messages.
        """
        try:
            return self._template.render(
                messages=list(messages),
                tools=tools,
                add_generation_prompt=add_generation_prompt,
                **self._variables,
            )
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
            # Python errors come from the template's expressions, such as a concatenation with a missing field.
            roles = " ".join(str(m.get("role")) for m in messages)
            raise BadInput(
                [
                    Problem(
                        what=f"{self.name} refuses this conversation: {error}",
                        found=f"turns {roles or '(none)'}",
                        fix="reorder or merge the turns, or give another chat_template",
                    )
                ]
            ) from None


def generation_spans(marked: str) -> tuple[str, list[tuple[int, int]]]:
    """Remove the generation marks: (text, [start, end) of each marked part in it)."""
    if GENERATION_START not in marked:
        return marked, []
    spans, parts, size, start = [], [], 0, 0
    for piece in re.split(f"([{GENERATION_START}{GENERATION_END}])", marked):
        if piece == GENERATION_START:
            start = size
        elif piece == GENERATION_END:
            spans.append((start, size))
        else:
            parts.append(piece)
            size += len(piece)
    return "".join(parts), spans


def chat_template_of(tokenizer: PreTrainedTokenizerBase, given: str | None) -> ChatTemplate | None:
    """The recipe's template, else the tokenizer's own (its `default` one where it has several), else None."""
    source: str | None
    if given is not None:
        source, name = read_template(given)
    else:
        own: Any = tokenizer.chat_template
        source, name = own.get("default") if isinstance(own, dict) else own, "the model's chat template"
    return ChatTemplate(source, name, special_variables(tokenizer)) if source else None


def special_variables(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """The special tokens that a template may refer to: bos_token, eos_token and others."""
    return {key: value for key, value in tokenizer.special_tokens_map.items() if isinstance(value, str)}


def wants_text_arguments(template: ChatTemplate) -> bool:
    """Whether the template can only write tool-call arguments that are JSON text, not objects."""
    if "tool_calls" not in template.source:
        return False
    call = {"type": "function", "function": {"name": "f", "arguments": {}}}

    def renders(calls: list[dict[str, Any]]) -> bool:
        try:
            template.render(
                [
                    {"role": "user", "content": "question"},
                    {"role": "assistant", "content": None, "tool_calls": calls},
                ]
            )
        except BadInput:
            return False
        return True

    return not renders([call]) and renders([with_text_arguments(call)])


def with_text_arguments(call: Mapping[str, Any]) -> dict[str, Any]:
    """The tool call with its arguments as JSON text."""
    function = dict(call["function"])
    if not isinstance(function["arguments"], str):
        function["arguments"] = json.dumps(function["arguments"], ensure_ascii=False)
    return {**call, "function": function}
