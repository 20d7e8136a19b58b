"""Answers that teach something else than was meant: refusals, placeholders, transcripts, loops."""

from __future__ import annotations

import re
from collections.abc import Iterable

from shikomi.data.findings._finding import Findings, excerpt
from shikomi.data.findings._texts import Texts, normal

_SPECIAL = re.compile(
    r"<\|[A-Za-z][\w -]{0,40}\|>|<\uff5c[^\uff5c\n]{1,40}\uff5c>|\[/?INST\]|<</?SYS>>|<(?:start|end)_of_turn>|"
    r"<(?:bos|eos|pad|unk)>|</s>\s*(?:\Z|<s>)|\A<s>"
)
"""What chat templates of public models write, and nobody else."""

_SPECIAL_MARKS = ("<|", "<\uff5c", "INST]", "SYS>>", "_of_turn>", "os>", "<pad>", "<unk>", "<s>", "</s>")

_NEXT_TURN = re.compile(
    r"(?:^|\n)\s*(?:#{2,4} ?(?:Instruction|Response|Input|Human|User|Assistant) ?:?[ \t]*(?:\n|$)|"
    r"#{2,4} ?(?:Instruction|Response|Human|User|Assistant):|(?:Human|USER|ASSISTANT): )|"
    r"\n(?:User|Question|Q): [^\n]*\n+(?:Assistant|AI|Answer|A): "
)

_REFUSAL = re.compile(
    r"(?i)\b(?:i['\u2019]?m|i am) (?:so |very |really |truly )?sorry,? (?:but )?(?:i|as an ai|this|that)\b[^.\n]{0,30}"
    r"(?:can['\u2019]?t|cannot|can not|unable|not able|won['\u2019]?t|not comfortable|ai (?:language )?model)|"
    r"\bsorry,? (?:but )?i (?:can['\u2019]?t|cannot|am unable|['\u2019]?m unable|won['\u2019]?t)|"
    r"\bi (?:can['\u2019]?t|cannot|can not|am unable to|am not able to|won['\u2019]?t be able to|will not|"
    r"must decline to) (?:assist|help|comply|fulfill?|provide|answer|engage|support|continue|do that|create|generate|"
    r"participate)\b"
    r"[^.\n]{0,40}(?:with (?:that|this|your)|request|question|content|information|any |such|\.)|"
    r"\bi apologi[sz]e,? but (?:i|as an ai)\b|"
    r"\bas an? (?:ai|artificial intelligence)(?: language)? (?:model|assistant)\b|"
    r"\bich kann (?:ihnen |dir )?(?:dabei|damit|bei dieser)[^.\n]{0,30}nicht helfen|\bes tut mir leid,? aber ich kann|"
    r"\bje suis d[\u00e9e]sol[\u00e9e]e?,? mais je ne peux|\blo siento,? pero no puedo|"
    r"\u7533\u3057\u8a33(?:\u3054\u3056\u3044\u307e\u305b\u3093|\u3042\u308a\u307e\u305b\u3093)[^\n]{0,60}"
    r"(?:\u3067\u304d\u307e\u305b\u3093|\u3057\u304b\u306d\u307e\u3059)|"
    r"(?:\u5bf9\u4e0d\u8d77|\u62b1\u6b49)[^\n]{0,12}\u6211(?:\u65e0\u6cd5|\u4e0d\u80fd)"
)
_REFUSAL_MARKS = (
    *("sorry", "can't", "can\u2019t", "cannot", "can not", "unable", "not able", "will not", "won't", "won\u2019t"),
    *("decline", "apolog", "as an a", "kann", "peux", "puedo"),
)
_REFUSAL_WITHIN = 300
"""Characters of an answer in which a refusal stands; later it is spoken about."""

_PLACEHOLDER = re.compile(
    r"(?i)(?:n\.?/?a\.?|null|nil|none|nan|undefined|to ?do|tb[ad]|tbc|fixme|x{3,}|-+|\.+|\u2026|\?+|lorem ipsum\b.*|"
    r"(?:\[|<|\{)?(?:your |the |insert )?(?:answer|response|output|completion|text)(?: here)?(?:\]|>|\})|"
    r"(?:no |empty )(?:answer|response|output)\.?|(?:placeholder|insert)\b.{0,20})",
    re.DOTALL,
)
_ANY_WORD = re.compile(r"\w")
_FENCE = re.compile(r"^[ \t]{0,3}```", re.MULTILINE)

LOOP_WORDS = 60
"""Words from which on a text can be said to repeat itself."""

LOOP_NEW = 0.2
"""Share of different words below which it does."""

_ANSWERED = 20
"""Characters from which on an echo of the prompt is no coincidence."""


class AnswerChecks:
    """Checks of one row; `special` are the special tokens of the model, where there is one."""

    def __init__(self, special: Iterable[str] = ()) -> None:
        own = sorted((token for token in special if len(token) > 3), key=len, reverse=True)
        self._own = re.compile("|".join(map(re.escape, own))) if own else None

    def check(self, texts: Texts, findings: Findings) -> None:
        """Look at the answers of a row."""
        self._special(texts, findings)
        if not texts.answers and _is_loop(texts.own):
            findings.add("D807", texts.file, texts.line, excerpt(texts.own))
        for number, answer in enumerate(texts.answers):
            rejected = texts.kind == "pairs" and number == 1
            if not rejected and self._judged(texts, answer, findings):
                return

    def _special(self, texts: Texts, findings: Findings) -> None:
        text, match = texts.own, None
        if any(mark in text for mark in _SPECIAL_MARKS):
            match = _SPECIAL.search(text)
        if match is None and self._own is not None:
            match = self._own.search(text)
        if match:
            shown = excerpt(text, match.start(), match.end())
            findings.add("D801", texts.file, texts.line, shown, match.group().strip())

    def _judged(self, texts: Texts, answer: str, findings: Findings) -> bool:
        """Findings of an answer that is learned; whether there were any: one row is named once for each code."""
        found = False
        head = answer[:_REFUSAL_WITHIN]
        folded = head.lower()
        if any(mark in folded for mark in _REFUSAL_MARKS) or not head.isascii():
            match = _REFUSAL.search(head)
            if match:
                findings.add("D803", texts.file, texts.line, excerpt(answer, match.start(), match.end()))
                found = True
        if ":" in answer or "###" in answer:
            match = _NEXT_TURN.search(answer)
            if match:
                findings.add("D802", texts.file, texts.line, excerpt(answer, match.start(), match.end()))
                found = True
        if answer.count("```") % 2 and len(_FENCE.findall(answer)) % 2:
            findings.add("D806", texts.file, texts.line, excerpt(answer, max(0, len(answer) - 60), len(answer)))
            found = True
        if _is_loop(answer):
            findings.add("D807", texts.file, texts.line, excerpt(answer))
            found = True
        if len(answer) >= _ANSWERED and len(texts.prompt) >= _ANSWERED and normal(answer) == texts.normal_prompt:
            findings.add("D804", texts.file, texts.line, excerpt(answer))
            found = True
        return found


def _is_loop(text: str) -> bool:
    if len(text) < 2 * LOOP_WORDS:
        return False
    words = text.split()
    return len(words) >= LOOP_WORDS and len(set(words)) < LOOP_NEW * len(words)


def is_placeholder(answer: str) -> bool:
    """Whether an answer says nothing: N/A, null, punctuation alone. Of labels this may be meant."""
    short = answer.strip()
    return len(short) < 400 and (bool(_PLACEHOLDER.fullmatch(short)) or not _ANY_WORD.search(short))
