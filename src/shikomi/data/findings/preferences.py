"""Pairs and judged answers: pairs without a difference, contradictions, length that gives the answer away, balance."""

from __future__ import annotations

import hashlib
import json
import re
from array import array
from typing import Any

import numpy as np

from shikomi.data.findings._finding import Findings, excerpt
from shikomi.data.findings._index import Index
from shikomi.data.findings._texts import Texts
from shikomi.data.preferences import Judgement, Preference
from shikomi.data.report import LENGTH_BIAS

FEWEST = 20
"""Pairs from which on a share of them says something."""

BALANCED = (0.75, 4 / 3)
"""Ratios of undesirable to desirable answers that need no weights."""

_NOT_SAID = re.compile(r"[\W_]+")


class Preferences:
    """Collects what only all preferences together show."""

    def __init__(self) -> None:
        self._rows, self._judged = array("q"), array("Q")
        self._longer = self._shorter = self._pairs = self._difference = 0
        self._labels = [0, 0]

    def add(self, texts: Texts, record: Preference | Judgement, role: str, findings: Findings) -> bool:
        """The next row; whether it is trained on."""
        place = (texts.file, texts.line)
        if record.same:
            if isinstance(record, Preference) or record.desirable:  # a pair that was taken apart is named once
                findings.add("P101", *place, excerpt(texts.answers[0]))
            return False
        if isinstance(record, Preference):
            self._pair(texts, role, findings)
            key, way = sorted(texts.answers), texts.answers[0] < texts.answers[1]
        else:
            key, way = list(texts.answers), record.desirable
            if role == "train":
                self._labels[record.desirable] += 1
        plain = [answer.plain for answer in record.answers]
        if all(p is not None and p[0].strip() and p[1].startswith(p[0]) for p in plain):
            findings.add("P105", *place, excerpt(texts.answers[0]))
        content = json.dumps([texts.prompt, key, str(record.identity[:2]) if not texts.prompt else ""])
        digest = hashlib.blake2b(content.encode("utf-8", "surrogatepass"), digest_size=8).digest()
        self._rows.append(texts.number)
        self._judged.append(int.from_bytes(digest, "big") & ~1 | way)
        return True

    def _pair(self, texts: Texts, role: str, findings: Findings) -> None:
        chosen, rejected = texts.answers
        if _NOT_SAID.sub("", chosen).casefold() == _NOT_SAID.sub("", rejected).casefold():
            findings.add("P102", texts.file, texts.line, excerpt(chosen))
        if role == "train":
            self._pairs += 1
            self._longer += len(chosen) > len(rejected)
            self._shorter += len(chosen) < len(rejected)
            self._difference += len(chosen) - len(rejected)

    def finish(self, index: Index, findings: Findings) -> dict[str, Any] | None:
        """The figures of all pairs, or of all judged answers; None where there are none."""
        keys = np.asarray(self._judged, np.uint64)
        for at in np.flatnonzero(np.isin(keys ^ np.uint64(1), keys)).tolist():
            findings.add("P103", *index.place(self._rows[at]), index.answer(self._rows[at]))
        if self._pairs:
            return self._lengths(findings)
        return self._balance(findings) if sum(self._labels) else None

    def _lengths(self, findings: Findings) -> dict[str, Any]:
        longer, shorter = self._longer / self._pairs, self._shorter / self._pairs
        mean = self._difference / self._pairs
        if max(longer, shorter) > LENGTH_BIAS and self._pairs >= FEWEST:
            which = "longer" if longer > shorter else "shorter"
            text = (
                f"chosen is {which} in {max(longer, shorter):.0%} of {self._pairs:,} pairs, by {mean:+.1f} characters"
            )
            findings.say("P104", f"{text} on average")
        return {"pairs": self._pairs, "chosen_longer": longer, "chosen_shorter": shorter, "mean_difference": mean}

    def _balance(self, findings: Findings) -> dict[str, Any]:
        bad, good = self._labels
        if good and bad and good + bad >= FEWEST and not BALANCED[0] <= bad / good <= BALANCED[1]:
            ratio = bad / good
            weights = f"desirable_weight from {ratio:.3g} to {4 / 3 * ratio:.3g}"
            if ratio < 1:
                weights = f"undesirable_weight from {0.75 / ratio:.3g} to {1 / ratio:.3g}"
            findings.say("P108", f"{good:,} good and {bad:,} bad answers: {weights}")
        return {"good": good, "bad": bad}
