"""Scripts and languages of prompts and answers, and the rows that are not in those of the rest."""

from __future__ import annotations

import re
from array import array
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from shikomi.data.findings._finding import Findings
from shikomi.data.findings._index import Index
from shikomi.data.findings._texts import Texts

_SCRIPTS = {
    "Latin": re.compile("[A-Za-z\u00c0-\u024f\u1e00-\u1eff]+"),
    "Cyrillic": re.compile("[\u0400-\u052f]+"),
    "Greek": re.compile("[\u0370-\u03ff]+"),
    "Japanese": re.compile("[\u3041-\u30ff\uff66-\uff9d]+"),
    "Han": re.compile("[\u3400-\u4dbf\u4e00-\u9fff]+"),
    "Hangul": re.compile("[\uac00-\ud7af\u1100-\u11ff]+"),
    "Arabic": re.compile("[\u0600-\u06ff\u0750-\u077f]+"),
    "Hebrew": re.compile("[\u0590-\u05ff]+"),
    "Devanagari": re.compile("[\u0900-\u097f]+"),
    "Thai": re.compile("[\u0e00-\u0e7f]+"),
}

_FEWEST_LETTERS = 6
_LETTERS = re.compile(f"(?:[A-Za-z][^A-Za-z]*){{{_FEWEST_LETTERS}}}")

_FREQUENT = {
    "English": "the of and to in is that for it with as was on are by this be from have you not which can an or",
    "German": "der die und das ist den von mit zu nicht ein eine auf für sich des dem im auch es werden wird sie bei",
    "French": "le la les des et est une dans pour que qui pas sur du plus par au avec ce sont il ne vous cette ou",
    "Spanish": "el los las del que en una por con para es se no su al como más pero este son lo sus esta muy y",
    "Italian": "il di che è per una un non con sono del della gli le dei alla nel si più anche come questo da ha e",
    "Portuguese": "o os as do da que em um uma para com não por mais dos como mas ao no na se foi são você e",
    "Dutch": "de het een van en in is dat op te zijn voor met niet aan er om ook als maar bij door worden dit wordt",
    "Swedish": "och att det som en på är av för med den till inte om ett har de jag var kan från vi så eller",
    "Danish": "og at det er en til af på for med den ikke de som der har et jeg var vi kan om fra eller sig",
    "Polish": "i w na z do się nie jest to że o jak po co dla od ale przez są tak oraz może być czy już jego",
    "Turkish": "bir ve bu için ile da de olarak olan daha çok gibi en kadar sonra ne var değil olduğu her ya ben mi",
    "Indonesian": "yang dan di ini itu dengan untuk dari dalam tidak akan pada ke adalah saya juga ada atau oleh bisa",
}
_LANGUAGES: dict[str, list[str]] = {}
for _language, _words in _FREQUENT.items():
    for _word in _words.split():
        _LANGUAGES.setdefault(_word, []).append(_language)

_LONGEST = 2000
"""Characters of a text that are looked at."""

FEWEST_WORDS = 20
"""Words from which on a language is told."""

_MOST_WORDS = 80
"""Words that are looked at."""

_SURE = 0.15
"""Share of frequent words that a language must have; the next may have 0.6 of it at most."""

FEWEST_ROWS = 20
"""Rows of a known script or language from which on another one is the exception."""

RARE = 0.05
"""Share of the rows below which a language is the exception, where another one has nearly all."""

MAIN = 0.85
"""Share of the rows from which on a language is that of the data."""

_SIDES = ("prompts", "answers")


def script_of(text: str) -> str | None:
    """The script of most letters of a text; None for fewer than six letters (two where a sign is a word)."""
    text = text[:_LONGEST]
    if text.isascii():
        return "Latin" if _LETTERS.search(text) else None
    counts = {name: sum(map(len, pattern.findall(text))) for name, pattern in _SCRIPTS.items()}
    if counts["Japanese"]:
        counts["Japanese"] += counts.pop("Han")
    best = max(counts, key=lambda name: counts[name])
    dense = best in ("Japanese", "Han", "Hangul")
    return best if counts[best] >= (2 if dense else _FEWEST_LETTERS) else None


def language_of(words: Sequence[str]) -> str | None:
    """The language of a text in Latin letters by its most frequent words; None where that is not sure."""
    if len(words) < FEWEST_WORDS:
        return None
    words = words[:_MOST_WORDS]
    counts = Counter(language for word in words if word in _LANGUAGES for language in _LANGUAGES[word])
    (first, most), (_, second) = [*counts.most_common(2), ("", 0), ("", 0)][:2]
    return first if most and most >= _SURE * len(words) and second <= 0.6 * most else None


class Languages:
    """Collects the script and language of each row's prompt and answers; plain texts count as answers."""

    def __init__(self) -> None:
        self._names: dict[str, int] = {"": 0}
        self._kinds = {side: (array("b"), array("b")) for side in _SIDES}  # script, language

    def add(self, texts: Texts) -> None:
        """The next row."""
        whole = not texts.answers
        answers = texts.own if whole else "\n".join(texts.answers[:1] if texts.kind == "pairs" else texts.answers)
        for side, text in zip(_SIDES, ("" if whole else texts.prompt, answers), strict=True):
            script = script_of(text)
            language = None
            if script == "Latin" and len(text) > 3 * FEWEST_WORDS:
                language = language_of(text[:_LONGEST].lower().split(None, _MOST_WORDS))
            for values, name in zip(self._kinds[side], (script, language), strict=True):
                values.append(self._names.setdefault(name or "", len(self._names)))

    def shares(self) -> dict[str, dict[str, float]]:
        """Shares of scripts and languages among the rows in which they could be told, by side."""
        found: dict[str, dict[str, float]] = {}
        for side in _SIDES:
            for kind, values in zip(("scripts", "languages"), self._kinds[side], strict=True):
                counts = self._counts(values)
                total = sum(counts.values())
                if total:
                    found[f"{kind} of {side}"] = {name: n / total for name, n in counts.most_common()}
        return found

    def finish(self, index: Index, findings: Findings) -> None:
        """Name the rows that are not in the script or language of the rest; a row once."""
        named: set[int] = set()
        for side in _SIDES:
            for kind, code in enumerate(("D401", "D402")):
                self._rare(code, side, kind, index, findings, named)

    def _rare(self, code: str, side: str, kind: int, index: Index, findings: Findings, named: set[int]) -> None:
        values = self._kinds[side][kind]
        counts = self._counts(values)
        if sum(counts.values()) < RARE * len(values):  # short answers, of which few tell their language
            counts = sum((self._counts(self._kinds[other][kind]) for other in _SIDES), Counter())
        total = sum(counts.values())
        if total < FEWEST_ROWS:
            return
        main, most = counts.most_common(1)[0]
        shared = {name: n for name, n in counts.items() if n >= RARE * total and n > 1}
        if len(shared) > 1:
            shares = ", ".join(f"{name} {n / total:.0%}" for name, n in sorted(shared.items(), key=lambda x: -x[1]))
            findings.say("D403", f"{side}: {shares}")
        if most < MAIN * total:
            return
        rare = [self._names[name] for name in counts if name not in shared]
        names = list(self._names)
        for row in np.flatnonzero(np.isin(np.asarray(values), rare)).tolist():
            if row not in named:
                named.add(row)
                shown = index.answer(row) if side == "answers" else index.head(row)
                note = f"{side[:-1]} in {names[values[row]]}; {most / total:.0%} are in {main}"
                findings.add(code, *index.place(row), shown, note)

    def _counts(self, values: Any) -> Counter[str]:
        numbers = np.bincount(np.asarray(values), minlength=len(self._names)).tolist() if len(values) else []
        return Counter({name: n for name, n in zip(self._names, numbers, strict=False) if name and n})
