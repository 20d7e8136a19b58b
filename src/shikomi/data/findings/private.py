"""Secrets and personal data: keys, tokens, passwords, addresses, telephone, card and account numbers."""

from __future__ import annotations

import re
from collections.abc import Iterator

from shikomi.data.findings._finding import Findings, excerpt
from shikomi.data.findings._texts import Texts

_TOKENS = (
    ("AKIA", r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b", "access key of AWS"),
    ("ASIA", r"\bASIA[0-9A-Z]{16}\b", "access key of AWS"),
    ("gh", r"\bgh[pousr]_[A-Za-z0-9]{36,}\b", "token of GitHub"),
    ("github_pat_", r"\bgithub_pat_[A-Za-z0-9_]{40,}\b", "token of GitHub"),
    ("glpat-", r"\bglpat-[A-Za-z0-9_-]{20,}", "token of GitLab"),
    ("sk-", r"\bsk-(?:ant-|proj-|or-)?[A-Za-z0-9_-]{20,}", "API key"),
    ("_live_", r"\b[rs]k_live_[A-Za-z0-9]{20,}", "key of Stripe"),
    ("xox", r"\bxox[abeprs]-[A-Za-z0-9-]{10,}", "token of Slack"),
    ("hooks.slack", r"https://hooks\.slack\.com/services/[A-Za-z0-9/]{20,}", "webhook of Slack"),
    ("AIza", r"\bAIza[0-9A-Za-z_-]{35}", "API key of Google"),
    ("hf_", r"\bhf_[A-Za-z]{30,}\b", "token of Hugging Face"),
    ("npm_", r"\bnpm_[A-Za-z0-9]{36}\b", "token of npm"),
    ("pypi-", r"\bpypi-[A-Za-z0-9_-]{50,}", "token of PyPI"),
    ("eyJ", r"\beyJ[A-Za-z0-9_-]{10,}\.eyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10,}", "JSON web token"),
    (
        "PRIVATE KEY",
        r"-----BEGIN (?:[A-Z0-9]+ )*PRIVATE KEY(?: BLOCK)?-----[\s\S]{20,}?"
        r"(?:-----END (?:[A-Z0-9]+ )*PRIVATE KEY(?: BLOCK)?-----|\Z)",
        "private key",
    ),
    ("://", r"\b[a-z][a-z0-9+.-]*://[^\s/:@]+:(?P<value>[^\s/@]{3,})@[A-Za-z0-9]", "password in an address"),
)
_SECRETS = tuple((mark, re.compile(pattern), name) for mark, pattern, name in _TOKENS)

_ASSIGNED = re.compile(
    r"(?i)\b[\w.-]*(?:passwd|password|secret|token|api[_-]?key|access[_-]?key|auth[_-]?key)[\w.-]*[\"']?\s*(?:=|:=|:)\s*"
    r"(?:(?P<quote>[\"'])(?P<value>[^\s\"']{8,})(?P=quote)|(?P<bare>(?<==)[^\s\"'<>(){}\[\],;]{8,}))"
)
_ASSIGNED_WORDS = ("passw", "secret", "token", "key")

_PLACEHOLDER = re.compile(
    r"(?i)x{4,}|\*{3,}|\.{3}|your|example|sample|dummy|change.?me|placeholder|redacted|password|secret|<|\$\{|%\(|0{8}|1234567"
)

_EMAIL = re.compile(
    r"(?<![\w.+-])[A-Za-z0-9](?:[A-Za-z0-9._%+-]{0,62}[A-Za-z0-9_+-])?@(?:[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?\.)+[A-Za-z]{2,24}\b"
)
_NO_PERSON = re.compile(
    r"(?i)@(?:[\w-]+\.)*(?:example|test|invalid|localhost)(?:\.(?:com|net|org|edu))?$|^(?:no-?reply|git|user(?:name)?|"
    r"name|foo|me|you|someone)@|@(?:[\w-]+\.)*(?:noreply\.[\w.]+|domain\.(?:com|tld|org)|[\w-]+\.(?:png|jpg|service))$"
)

_DIGITS = re.compile(r"\d[\d ()./-]{6,}\d")
_PHONE = re.compile(
    r"(?<![\w.+/-])(?:"
    r"\+[1-9]\d{0,2}(?:[ .-]?\(?\d{1,5}\)?){2,6}"  # international
    r"|\+[1-9]\d{8,14}"
    r"|(?:1[ .-])?\([2-9]\d{2}\) ?\d{3}[ .-]\d{4}"  # North America
    r"|(?:1-)?[2-9]\d{2}([.-])[2-9]\d{2}\1\d{4}"
    r"|0\d{1,4}-\d{1,4}-\d{4}"  # Japan
    r")(?![\w-]|\.\d)"
)
_CARD = re.compile(r"(?<![\w.-])(?:\d[ -]?){12,18}\d(?![\w-]|\.\d)")
_CARD_NUMBER = re.compile(
    r"4(?:\d{12}|\d{15}|\d{18})|5[1-5]\d{14}|2(?:22[1-9]|2[3-9]\d|[3-6]\d\d|7[01]\d|720)\d{12}|3[47]\d{13}|"
    r"3(?:0[0-5]|[68]\d)\d{11}|6(?:011|4[4-9]\d|5\d\d)\d{12}|35(?:2[89]|[3-8]\d)\d{12}"
)
"""First digits and lengths of the large networks."""
_IBAN = re.compile(r"(?<![A-Za-z0-9])[A-Z]{2}\d{2}(?: ?[A-Z0-9]{2,4}){3,8}(?: ?[A-Z0-9]{1,3})?(?![A-Za-z0-9])")
_IBAN_LENGTH = dict(
    pair.split(":")
    for pair in (
        "AD:24 AE:23 AL:28 AT:20 AZ:28 BA:20 BE:16 BG:22 BH:22 BR:29 BY:28 CH:21 CR:22 CY:28 CZ:24 DE:22 DK:18 DO:28 "
        "EE:20 EG:29 ES:24 FI:18 FO:18 FR:27 GB:22 GE:22 GI:23 GL:18 GR:27 GT:28 HR:21 HU:28 IE:22 IL:23 IQ:23 IS:26 "
        "IT:27 JO:30 KW:30 KZ:20 LB:28 LC:32 LI:21 LT:20 LU:20 LV:21 MC:27 MD:24 ME:22 MK:19 MR:27 MT:31 MU:30 NL:18 "
        "NO:15 PK:24 PL:28 PS:29 PT:25 QA:29 RO:24 RS:22 SA:24 SC:31 SE:24 SI:19 SK:24 SM:27 ST:25 SV:28 TL:23 TN:24 "
        "TR:26 UA:29 VA:22 VG:24 XK:20"
    ).split()
)

Match = tuple[str, int, int, str]
"""(code, first character, end, what it is)."""


def check(texts: Texts, findings: Findings) -> None:
    """Look at all text of a row: one finding of each code."""
    codes: set[str] = set()
    for code, start, end, name in matches(texts.own):
        if code not in codes:
            codes.add(code)
            findings.add(code, texts.file, texts.line, _hidden(texts.own, start, end), name)


def mask(text: str) -> str:
    """The text with `[secret]`, `[e-mail]`, `[phone]`, `[card]` and `[iban]` in the place of what they stand for."""
    names = {"D901": "[secret]", "D902": "[e-mail]", "D903": "[phone]", "D904": "[card]", "D905": "[iban]"}
    for code, start, end, _ in sorted(matches(text), key=lambda match: -match[1]):
        text = text[:start] + names[code] + text[end:]
    return text


def matches(text: str) -> list[Match]:
    """Everything found in a text; where two overlap, the first in the order of the checks."""
    found: list[Match] = []
    for match in _all(text):
        if not any(match[1] < end and start < match[2] for _, start, end, _ in found):
            found.append(match)
    return found


def _all(text: str) -> Iterator[Match]:
    for mark, pattern, name in _SECRETS:
        if mark in text:
            for match in pattern.finditer(text):
                group = "value" if "value" in pattern.groupindex else 0
                if not _PLACEHOLDER.search(match[group]):
                    yield "D901", *match.span(group), name
    if "=" in text or ":" in text:
        folded = text.lower()
        if any(word in folded for word in _ASSIGNED_WORDS):
            yield from _assigned(text)
    if "@" in text:
        for match in _EMAIL.finditer(text):
            if not _NO_PERSON.search(match.group()):
                yield "D902", *match.span(), "e-mail address"
    if _DIGITS.search(text):
        yield from _numbers(text)


def _assigned(text: str) -> Iterator[Match]:
    """Values of passwords and keys in code and settings: of letters and digits both, and no placeholder."""
    for match in _ASSIGNED.finditer(text):
        group = "value" if match["value"] is not None else "bare"
        value = match[group]
        mixed = any(c.isdigit() for c in value) and any(c.isalpha() for c in value)
        if mixed and not _PLACEHOLDER.search(value):
            yield "D901", *match.span(group), "value of a password or key"


def _numbers(text: str) -> Iterator[Match]:
    for match in _IBAN.finditer(text):
        end = _iban_end(text, match.start())
        if end is not None and end <= match.end() and is_iban(text[match.start() : end]):
            yield "D905", match.start(), end, "IBAN"
    for match in _CARD.finditer(text):
        if is_card(match.group()):
            yield "D904", *match.span(), "card number"
    for match in _PHONE.finditer(text):
        if _is_phone(match.group()):
            yield "D903", *match.span(), "telephone number"


def _iban_end(text: str, start: int) -> int | None:
    """Where an IBAN ends that begins at `start`, by its country's length: a word in capitals may follow."""
    left = int(_IBAN_LENGTH.get(text[start : start + 2], 0))
    for at in range(start, min(len(text), start + 2 * left)):
        left -= text[at] != " "
        if not left:
            return at + 1
    return None


def is_card(text: str) -> bool:
    """Whether the digits are those of a card network and Luhn's check digit is right (ISO/IEC 7812-1)."""
    number = re.sub(r"\D", "", text)
    if not _CARD_NUMBER.fullmatch(number) or len(set(number)) < 3:
        return False
    digits = [int(c) for c in number]
    doubled = (sum(divmod(2 * d, 10)) for d in digits[-2::-2])
    return (sum(digits[-1::-2]) + sum(doubled)) % 10 == 0


def is_iban(text: str) -> bool:
    """Whether an IBAN has its country's length and right check digits (ISO 13616: remainder 1 by 97)."""
    compact = text.replace(" ", "")
    if _IBAN_LENGTH.get(compact[:2]) != str(len(compact)):
        return False
    return int("".join(str(int(c, 36)) for c in compact[4:] + compact[:4])) % 97 == 1


def _is_phone(text: str) -> bool:
    digits = [c for c in text if c.isdigit()]
    enough = 10 <= len(digits) <= 11 if digits[0] == "0" else 9 <= len(digits) <= 15
    return enough and len(set(digits)) > 2


def _hidden(text: str, start: int, end: int) -> str:
    """The place without what was found there: a report of secrets should not spread them."""
    first = text[start : start + min(4, (end - start) // 3)]
    shown = text[:start] + first + "…" + text[end:]
    return excerpt(shown, start, start + len(first) + 1)
