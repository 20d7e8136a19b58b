"""File readers: rows with their line numbers, one at a time; what cannot be read becomes a problem, and
reading goes on.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from shikomi.data.problems import Problems
from shikomi.data.text import CHUNK, NotText, first_line, text_chunks, text_lines
from shikomi.errors import Problem

Rows = Iterator[tuple[int, dict[str, Any]]]
"""(line or row number from 1, the row)."""

_LONGEST_ITEM = 1 << 26
_DELIMITERS = ",;\t|"


def read_file(path: Path, problems: Problems) -> Rows:
    """The rows of a file, by its suffix; an unknown suffix or an empty file is a problem."""
    reader = READERS.get(data_suffix(path))
    if reader is None:
        problems.add(
            Problem(
                what="unknown kind of file",
                file=str(path),
                found=path.suffix or "no suffix",
                allowed=" ".join(READERS) + " (text files also with .gz)",
                fix="convert the file, or give it the suffix of what it holds",
            )
        )
        return
    before, empty = problems.count, True
    try:
        for row in reader(path, problems):
            empty = False
            yield row
    except OSError as error:
        problems.add(Problem(what=f"cannot be read: {error.strerror or error}", file=str(path)))
    except EOFError:
        problems.add(Problem(what="the compressed file ends in the middle", file=str(path), fix="copy it again"))
    if empty and problems.count == before:
        problems.add(Problem(what="the file holds no rows", file=str(path), fix="write rows to it or leave it out"))


def data_suffix(path: Path) -> str:
    """The suffix that names the kind of data: .jsonl for rows.jsonl and rows.jsonl.gz."""
    name = path.name.lower()
    return Path(name.removesuffix(".gz")).suffix


def read_jsonl(path: Path, problems: Problems) -> Rows:
    """One JSON object per line; blank lines are skipped."""
    for number, line in text_lines(path, problems):
        if not line.strip():
            continue
        if number == 1 and line.lstrip().startswith("[") and not line.rstrip().endswith("]"):
            problems.add(
                Problem(
                    what="a JSON array where JSON lines are expected",
                    file=str(path),
                    line=1,
                    allowed="one object per line",
                    fix="rename the file to .json",
                )
            )
            return
        try:
            row = json.loads(line)
        except ValueError as error:
            problems.add(_broken(error, line, str(path), number))
            continue
        except RecursionError:
            problems.add(Problem("JSON nested too deeply", str(path), number))
            continue
        yield from _object(row, str(path), number, problems)


def _broken(error: ValueError, text: str, file: str, line: int) -> Problem:
    if not isinstance(error, json.JSONDecodeError):
        return Problem(what=f"broken JSON: {error}", file=file, line=line)
    near = text[max(0, error.pos - 20) : error.pos + 20].strip()
    return Problem(
        what=f"broken JSON: {error.msg} at character {error.pos + 1}",
        file=file,
        line=line,
        found=near or "the end of the line",
        fix="use double quotes" if "'" in near and '"' not in near else None,
    )


def _object(row: Any, file: str, line: int, problems: Problems) -> Rows:
    if isinstance(row, dict):
        yield line, row
    else:
        found = json.dumps(row, ensure_ascii=False)[:40]
        problems.add(Problem("the row is not an object", file, line, found, '{"column": value, ...}'))


def read_json(path: Path, problems: Problems) -> Rows:
    """A JSON array of objects, read in chunks; or JSON lines under this suffix."""
    first = first_line(path)
    if first.startswith("["):
        try:
            yield from _array_items(text_chunks(path), str(path), problems)
        except NotText as error:
            problems.add(error.problem)
        return
    if first.rstrip() == "{":
        problems.add(
            Problem(
                what="the file is neither a JSON array nor JSON lines",
                file=str(path),
                line=1,
                found="one object over several lines",
                allowed="[{...}, {...}], or one object per line",
            )
        )
        return
    yield from read_jsonl(path, problems)


def _array_items(chunks: Iterator[str], file: str, problems: Problems) -> Rows:
    """Items of the array that the chunks spell, each with the line on which it begins."""
    decoder = json.JSONDecoder()
    buffer, line, ended, opened = "", 1, False, False

    def skip(count: int) -> None:
        nonlocal buffer, line
        line += buffer.count("\n", 0, count)
        buffer = buffer[count:]

    wanted = CHUNK
    while True:
        while len(buffer) < wanted and not ended:
            part = next(chunks, None)
            ended = part is None
            buffer += part or ""
        skip(len(buffer) - len(buffer.lstrip(" \t\r\n" + ("," if opened else "["))))
        opened = True
        if buffer[:1] in ("]", ""):
            if buffer[:1] == "":
                problems.add(Problem("the JSON array is not closed", file, line, "the end of the file", "]"))
            elif buffer[1:].strip():
                problems.add(Problem("text after the JSON array", file, line, buffer[1:].strip()[:40]))
            return
        try:
            item, end = decoder.raw_decode(buffer)
        except ValueError as error:
            if ended or len(buffer) > _LONGEST_ITEM:
                problems.add(_broken(error, buffer, file, line))
                return
            wanted = 2 * len(buffer)  # the item may only be incomplete
            continue
        wanted = CHUNK
        yield from _object(item, file, line, problems)
        skip(end)


def read_csv(path: Path, problems: Problems) -> Rows:
    """Rows of a table whose first line names the columns; the delimiter is a comma, semicolon, tab or bar."""
    last = 0

    def lines() -> Iterator[str]:
        nonlocal last
        for last, line in text_lines(path, problems):  # noqa: B007, B020
            yield line

    source = lines()
    first = next(source, None)
    if first is None:
        return
    delimiter = "\t" if data_suffix(path) == ".tsv" else max(_DELIMITERS, key=first.count)
    csv.field_size_limit(_LONGEST_ITEM)

    def all_lines() -> Iterator[str]:
        yield first
        yield from source

    reader = csv.reader(all_lines(), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    start = 1
    try:
        for cells in reader:
            begin, start = start, last + 1
            if not cells:
                continue
            if header is None:
                header = [name.strip() for name in cells]
                twice = sorted({name for name in header if header.count(name) > 1})
                if twice:
                    problems.add(Problem("a column name occurs twice", str(path), begin, ", ".join(twice)))
                    return
            elif len(cells) != len(header):
                problems.add(
                    Problem(
                        what="the row has a wrong number of cells",
                        file=str(path),
                        line=begin,
                        found=str(len(cells)),
                        allowed=f"{len(header)}: {', '.join(header)}",
                        fix="put cells that hold the delimiter or a line break in double quotes",
                    )
                )
            else:
                yield begin, dict(zip(header, cells, strict=True))
    except csv.Error as error:
        problems.add(
            Problem(f"broken CSV: {error}", str(path), start, fix='close the quotes; write " inside them as ""')
        )


def read_parquet(path: Path, problems: Problems) -> Rows:
    """Rows of a Parquet file, numbered from 1."""
    import pyarrow
    import pyarrow.parquet

    try:
        number = 0
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except (pyarrow.ArrowInvalid, pyarrow.ArrowNotImplementedError) as error:
        problems.add(Problem(f"not a readable Parquet file: {str(error).splitlines()[0]}", str(path)))


def read_text(path: Path, problems: Problems) -> Rows:
    """Plain text: each paragraph (lines up to a blank line) is a row {"text": ...}."""
    paragraph: list[str] = []
    start = 1
    for number, line in text_lines(path, problems):
        if line.strip():
            start = start if paragraph else number
            paragraph.append(line)
        elif paragraph:
            yield start, {"text": "".join(paragraph).rstrip()}
            paragraph = []
    if paragraph:
        yield start, {"text": "".join(paragraph).rstrip()}


READERS: dict[str, Callable[[Path, Problems], Rows]] = {
    ".jsonl": read_jsonl,
    ".ndjson": read_jsonl,
    ".json": read_json,
    ".csv": read_csv,
    ".tsv": read_csv,
    ".parquet": read_parquet,
    ".txt": read_text,
}
