"""Bytes of a file as UTF-8 text, by lines or by chunks; what is not clean text becomes a problem."""

from __future__ import annotations

import codecs
import gzip
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from shikomi.data.problems import Problems
from shikomi.errors import Problem

BOM = "\ufeff"
_UTF16 = (b"\xff\xfe", b"\xfe\xff")
CHUNK = 1 << 20
"""Bytes read at a time."""


def open_bytes(path: Path) -> IO[bytes]:
    """The file for reading, unpacked if it ends in .gz."""
    return gzip.open(path, "rb") if path.name.lower().endswith(".gz") else path.open("rb")  # type: ignore[return-value]


def text_lines(path: Path, problems: Problems) -> Iterator[tuple[int, str]]:
    """Decoded lines with their numbers; lines that are not clean UTF-8 text become problems."""
    with open_bytes(path) as file:
        for number, raw in enumerate(file, start=1):
            if number == 1 and raw.startswith(_UTF16):
                problems.add(_utf16(path))
                return
            try:
                text = raw.decode("utf-8")
            except UnicodeDecodeError as error:
                problems.add(_not_utf8(path, number, raw[error.start], error.start))
                continue
            if "\x00" in text:
                problems.add(_nul(path, number, text.index("\x00")))
                continue
            if number == 1:
                text = text.removeprefix(BOM)
            if text.startswith(BOM):
                problems.add(
                    Problem(
                        what="a byte order mark in the middle of the file",
                        file=str(path),
                        line=number,
                        found="U+FEFF",
                        allowed="one at the very beginning, or none",
                        fix="remove it; it comes from joining files",
                    )
                )
                continue
            yield number, text


class NotText(Exception):
    """A file that is not clean UTF-8 text; `problem` says where."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(str(problem))
        self.problem = problem


def first_line(path: Path) -> str:
    """The first line that is not blank, as far as it lies in the first chunk, with bad bytes replaced."""
    with open_bytes(path) as file:
        raw = file.read(CHUNK)
    if raw.startswith(_UTF16):
        return ""
    lines = raw.decode("utf-8", errors="replace").removeprefix(BOM).lstrip().splitlines()
    return lines[0] if lines else ""


def text_chunks(path: Path) -> Iterator[str]:
    """Decoded text in chunks that may end anywhere. Raises NotText at the first place that is not clean text."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    line, first, raw = 1, True, b"-"
    with open_bytes(path) as file:
        while raw:
            raw = file.read(CHUNK)
            try:
                text = decoder.decode(raw, final=not raw)
            except UnicodeDecodeError as error:
                before = error.object[: error.start]
                column = error.start - (before.rfind(b"\n") + 1)
                problem = _not_utf8(path, line + before.count(b"\n"), error.object[error.start], column)
                raise NotText(problem) from None
            if "\x00" in text:
                at = text.index("\x00")
                column = at - (text.rfind("\n", 0, at) + 1)
                raise NotText(_nul(path, line + text.count("\n", 0, at), column))
            yield text.removeprefix(BOM) if first else text
            first = first and not text
            line += text.count("\n")


def _utf16(path: Path) -> Problem:
    return Problem("the file is UTF-16 text", str(path), 1, allowed="UTF-8", fix="save it as UTF-8")


def _not_utf8(path: Path, line: int, byte: int, column: int) -> Problem:
    return Problem(
        what="not UTF-8 text",
        file=str(path),
        line=line,
        found=f"byte 0x{byte:02X} at byte {column + 1} of the line",
        allowed="UTF-8",
        fix="save the file as UTF-8",
    )


def _nul(path: Path, line: int, column: int) -> Problem:
    return Problem("a NUL byte", str(path), line, f"at character {column + 1}", "text", "remove the byte")
