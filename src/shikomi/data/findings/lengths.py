"""Lengths of rows in tokens: percentiles, what several values of max_length would cut, and how much is trained."""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from typing import Any

import numpy as np

from shikomi.data.answers import Answers
from shikomi.data.encode import Encoder
from shikomi.data.findings._finding import Findings
from shikomi.data.findings._texts import Texts
from shikomi.data.render import Encoded

CHARACTERS_PER_TOKEN = 4
LENGTHS = (256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
PERCENTILES = (50, 90, 95, 99, 100)
FEW_TRAINED = 0.01
"""Share of trained tokens below which that is said."""


@dataclass(frozen=True)
class Measured:
    """Tokens of a row (of a pair with its longest answer), trained ones; which answers are cut, and are one then."""

    tokens: int
    trained: int
    trained_kept: int
    cut: tuple[bool, ...] = ()
    same: bool = False


def measure(encoded: Encoded | Answers) -> Measured:
    """What an encoder with a max_length made of a row, and what it cut."""
    if isinstance(encoded, Encoded):
        trained = int(np.count_nonzero(encoded.mask))
        return Measured(len(encoded.ids) + encoded.cut, trained + encoded.targets_cut, trained)
    answers, prompt = encoded.answers, len(encoded.prompt)
    kept = [int(np.count_nonzero(answer.mask)) for answer in answers]
    same = len(answers) == 2 and np.array_equal(answers[0].ids, answers[1].ids)
    return Measured(
        tokens=prompt + max(len(answer.ids) + answer.cut for answer in answers),
        trained=sum(kept) + sum(answer.targets_cut for answer in answers),
        trained_kept=min(kept) and sum(kept),
        cut=tuple(answer.cut > 0 for answer in answers),
        same=same,
    )


def estimate(texts: Texts, max_length: int | None) -> Measured:
    """The same from characters, where there is no tokenizer."""
    prompt = -(-len(texts.prompt) // CHARACTERS_PER_TOKEN)
    answers = [-(-len(answer) // CHARACTERS_PER_TOKEN) for answer in texts.answers]
    if not answers:
        prompt, answers = 0, [-(-len(texts.own) // CHARACTERS_PER_TOKEN)]
    pair = texts.kind != "conversations"
    tokens = prompt + (max(answers) if pair else sum(answers))
    room = tokens if max_length is None else max(0, max_length - prompt)
    kept = [min(n, room) for n in answers]
    cut = tuple(n > room for n in answers) if pair else ()
    return Measured(tokens, sum(answers), min(kept) and sum(kept), cut)


class Lengths:
    """Collects the lengths of all rows; `encoder` is the model's, None where tokens are estimated."""

    def __init__(self, encoder: Encoder | None, max_length: int | None) -> None:
        self.encoder, self.max_length = encoder, max_length
        self._tokens, self._weights = array("q"), array("q")
        self._trained = 0

    def add(self, texts: Texts, measured: Measured, weight: int, findings: Findings) -> None:
        """The next row that is trained on, and how many rows it stands for."""
        self._tokens.append(measured.tokens)
        self._weights.append(weight)
        self._trained += weight * measured.trained
        limit = self.max_length
        place = (texts.file, texts.line)
        shown = texts.own[-60:].strip()
        if not measured.trained_kept:
            note = f"{measured.tokens:,} tokens" if measured.trained else "no turn is trained"
            findings.add("D702", *place, shown, note)
        elif measured.same:
            findings.add("P107", *place, shown)
        elif len(set(measured.cut)) > 1:
            side = "chosen" if measured.cut[0] else "rejected"
            findings.add("P106", *place, shown, f"the {side} answer is cut; {measured.tokens:,} tokens")
        elif limit is not None and measured.tokens > limit:
            findings.add("D701", *place, shown, f"{measured.tokens:,} tokens, max_length {limit:,}")

    def finish(self, findings: Findings) -> dict[str, Any] | None:
        """The figures of all rows; None where there are none."""
        if not len(self._tokens):
            return None
        tokens = np.repeat(np.asarray(self._tokens), np.asarray(self._weights))
        total = int(tokens.sum())
        share = self._trained / max(1, total)
        if findings.count("D702") == len(self._tokens):
            limit = "none is trained" if self.max_length is None else f"max_length {self.max_length:,}"
            findings.say("D112", f"no row has a trained token: {limit}; the longest has {int(tokens.max()):,} tokens")
        if share < FEW_TRAINED:
            findings.say("D703", f"{share:.2%} of {total:,} tokens")
        if self.encoder is None:
            for code in ("D701", "D702", "P106"):
                findings.explain(code, f"estimated: {CHARACTERS_PER_TOKEN} characters a token")
        if self.max_length is not None and findings.count("D701"):
            findings.explain("D701", f"max_length={int(tokens.max())} would cut none")
        limits = sorted({n for n in LENGTHS if n < tokens.max()} | ({self.max_length} if self.max_length else set()))
        return {
            "unit": "tokens"
            if self.encoder is not None
            else f"tokens, estimated as characters / {CHARACTERS_PER_TOKEN}",
            "total": total,
            "trained": self._trained,
            "trained_share": share,
            "mean": total / len(tokens),
            "percentiles": {str(p): int(np.percentile(tokens, p, method="higher")) for p in PERCENTILES},
            "cut_at": {
                str(limit): {
                    "rows": int((tokens > limit).sum()),
                    "share": float((tokens > limit).mean()),
                    "tokens": int(np.maximum(tokens - limit, 0).sum()),
                }
                for limit in limits
            },
        }
