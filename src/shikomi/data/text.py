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


def text_chunks(path: Path, problems: Problems) -> Iterator[str]:
    """Decoded text in chunks that may end anywhere; stops at the first problem."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    line, first = 1, True
    with open_bytes(path) as file:
        while True:
            raw = file.read(CHUNK)
            if first and raw.startswith(_UTF16):
                problems.add(_utf16(path))
                return
            try:
                text = decoder.decode(raw, final=not raw)
            except UnicodeDecodeError as error:
                before = error.object[: error.start]
                column = error.start - (before.rfind(b"\n") + 1)
                problems.add(_not_utf8(path, line + before.count(b"\n"), error.object[error.start], column))
                return
            if "\x00" in text:
                at = text.index("\x00")
                problems.add(_nul(path, line + text.count("\n", 0, at), at - (text.rfind("\n", 0, at) + 1)))
                return
            if text:
                yield text.removeprefix(BOM) if first else text
                first = False
            line += text.count("\n")
            if not raw:
                return


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
