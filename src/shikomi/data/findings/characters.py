"""Characters that do not belong into a text: control characters, invisible ones, and what wrong decoding left."""

from __future__ import annotations

import re
from collections.abc import Iterator

from shikomi.data.findings._finding import Findings, excerpt
from shikomi.data.findings._texts import Texts

_CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f]")
"""Terminal sequences, and every control character but tab, line feed, carriage return and next line."""

_INVISIBLE = re.compile("[\u200b\u200e\u200f\u202a-\u202e\u2060-\u2064\u2066-\u2069\ufeff\U000e0001-\U000e007f]")
"""Joiners (U+200C, U+200D) are left: emoji and several scripts need them."""

_RIGHT_TO_LEFT = re.compile("[\u0590-\u08ff\ufb1d-\ufdff\ufe70-\ufefc]")
_DIRECTION = re.compile("[\u200e\u200f\u202a-\u202c\u2066-\u2069]")

_FLAG = "\U0001f3f4"
"""Tag characters behind a black flag spell the flag of a region."""

_UNENCODABLE = re.compile("[\x00\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]")

_CP1252 = {bytes([b]).decode("cp1252"): b for b in range(0x80, 0xA0) if b not in (0x81, 0x8D, 0x8F, 0x90, 0x9D)}
_CONTINUATION = "\u0080-\u00bf" + "".join(map(re.escape, _CP1252))
_MOJIBAKE = re.compile(
    f"(?:[\u00c2-\u00df][{_CONTINUATION}]|[\u00e0-\u00ef][{_CONTINUATION}]{{2}}|[\u00f0-\u00f4][{_CONTINUATION}]{{3}})+"
)

_LIKELY = re.compile(
    "[\u00a0-\u00ff\u0100-\u017f\u2010-\u2044\u20ac\u2122\u2190-\u21ff\u2500-\u257f\u2600-\u27bf\U0001f300-\U0001faff]+"
)
"""What one wrongly decoded character may have been: a letter of a European language, a quotation mark, an emoji."""

_SCRIPTS = re.compile(
    "[\u0370-\u03ff\u0400-\u04ff\u0590-\u06ff\u0900-\u097f\u0e00-\u0e7f\u3000-\u9fff\uac00-\ud7af]{2,}"
)
"""Of other scripts at least two characters in a row: one alone may be meant as it stands."""


def check(texts: Texts, findings: Findings) -> None:
    """Look at all text of a row."""
    text = texts.own
    if not text.isascii():
        text = _others(texts, findings)
    match = _CONTROL.search(text)
    if match:
        findings.add("D501", texts.file, texts.line, excerpt(text, match.start(), match.end()))


def _others(texts: Texts, findings: Findings) -> str:
    """What is no ASCII. Returns the text as it was meant: parts of a wrongly decoded character look like controls."""
    text, place = texts.own, (texts.file, texts.line)
    for match in _MOJIBAKE.finditer(text):
        meant = _meant(match.group())
        if meant is not None:
            findings.add("D503", *place, excerpt(text, match.start(), match.end()), f"was {meant!r}")
            text = _MOJIBAKE.sub(lambda match: _meant(match.group()) or match.group(), text)
            break
    first = next(_invisible(text), None)
    if first is not None:
        found = f"U+{ord(first.group()):04X}"
        findings.add("D502", *place, excerpt(text, first.start(), first.end()), found)
    at = text.find("\ufffd")
    if at >= 0:
        findings.add("D504", *place, excerpt(text, at, at + 1))
    return text


def clean(text: str) -> str:
    """The text without characters that cannot be encoded or seen, and with wrongly decoded ones turned back."""
    text = _UNENCODABLE.sub("", text)
    if not text.isascii():
        text = _MOJIBAKE.sub(lambda match: _meant(match.group()) or match.group(), text)
        for match in reversed(list(_invisible(text))):
            text = text[: match.start()] + text[match.end() :]
    return _CONTROL.sub("", text)


def _invisible(text: str) -> Iterator[re.Match[str]]:
    """Invisible characters; marks of direction are needed where text runs from right to left."""
    right_to_left = None
    for match in _INVISIBLE.finditer(text):
        if match.group() >= "\U000e0001" and _FLAG in text:
            continue
        if _DIRECTION.match(match.group()):
            if right_to_left is None:
                right_to_left = bool(_RIGHT_TO_LEFT.search(text))
            if right_to_left:
                continue
        yield match


def _meant(run: str) -> str | None:
    """What UTF-8 bytes that were read as Windows-1252 or Latin-1 say; None where the text is as likely as it stands."""
    try:
        meant = bytes(_CP1252.get(c, ord(c)) for c in run).decode("utf-8")
    except (UnicodeDecodeError, ValueError):
        return None
    likely = bool(_LIKELY.fullmatch(meant)) or bool(_SCRIPTS.fullmatch(meant))
    return meant if likely else None
