"""Row files of every kind that is read, written: jsonl, json, csv, tsv, parquet."""

from __future__ import annotations

import csv
import errno
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

from shikomi.errors import BadInput, Problem, TryAgain

Rows = Callable[[], Iterator[Mapping[str, Any]]]
"""Gives the rows anew each time: tables need to know all columns before the first row."""

_BATCH = 1024


def check_suffix(path: Path) -> None:
    """Raises BadInput for a file of a kind that is not written."""
    if path.suffix.lower() not in WRITERS:
        raise BadInput(
            [
                Problem(
                    what="this kind of file is not written",
                    file=str(path),
                    found=path.suffix or "no suffix",
                    allowed=" ".join(WRITERS),
                    fix="name another output file",
                )
            ]
        )


def write_rows(path: Path, rows: Rows) -> int:
    """Writes a new file by its suffix and returns the number of rows. Raises TryAgain for a full disk.

    Raises BadInput for rows that a table cannot hold: lists and objects in a csv, columns of mixed types in parquet.
    """
    check_suffix(path)
    with _full_disk(path):
        return WRITERS[path.suffix.lower()](path, rows)


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """A new name beside `path`, of the same suffix, which becomes `path` at the end and is gone after an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".new-{path.name}")
    try:
        yield temporary
        with _full_disk(path):
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def _full_disk(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise TryAgain(f"the disk is full: {path} cannot be written") from error
        raise


def _jsonl(path: Path, rows: Rows) -> int:
    count = 0
    with path.open("w", encoding="utf-8") as out:
        for row in rows():
            out.write(json.dumps(row, ensure_ascii=False) + "\n")
            count += 1
    return count


def _json(path: Path, rows: Rows) -> int:
    count = 0
    with path.open("w", encoding="utf-8") as out:
        out.write("[")
        for count, row in enumerate(rows(), start=1):
            out.write(("\n" if count == 1 else ",\n") + json.dumps(row, ensure_ascii=False))
        out.write("\n]\n")
    return count


def _csv(path: Path, rows: Rows) -> int:
    columns = list(dict.fromkeys(key for row in rows() for key in row))
    count = 0
    with path.open("w", encoding="utf-8", newline="") as out:
        delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
        writer = csv.writer(out, delimiter=delimiter, lineterminator="\n")
        quoting = csv.writer(out, delimiter=delimiter, lineterminator="\n", quoting=csv.QUOTE_ALL)
        writer.writerow(columns)
        for count, row in enumerate(rows(), start=1):
            cells = [_cell(row.get(column), column, count) for column in columns]
            # a lone carriage return is not quoted by itself, and ends a line where it is read; an empty line is no row
            (quoting if any("\r" in cell for cell in cells) or not any(cells) else writer).writerow(cells)
    return count


def _cell(value: Any, column: str, row: int) -> str:
    """A cell as its reader takes it: nothing for None, true and false, numbers as in JSON."""
    if isinstance(value, list | dict):
        raise BadInput(
            [
                Problem(
                    what=f"a cell of a table holds text, and `{column}` of row {row} is a list or an object",
                    allowed="jsonl, json or parquet for such rows",
                    fix=f"name another output file, or leave the column out: --drop {column}",
                )
            ]
        )
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value)


def _parquet(path: Path, rows: Rows) -> int:
    import pyarrow
    import pyarrow.parquet

    count = 0
    try:
        schema = pyarrow.schema([])
        for batch in _batches(rows):
            found = pyarrow.Table.from_pylist(batch).schema
            schema = pyarrow.unify_schemas([schema, found], promote_options="permissive")
        columns = list(dict.fromkeys(key for row in rows() for key in row))
        schema = pyarrow.schema([schema.field(name) for name in columns if name in schema.names])
        with pyarrow.parquet.ParquetWriter(path, schema) as writer:
            for batch in _batches(rows):
                writer.write_table(pyarrow.Table.from_pylist(batch, schema=schema))
                count += len(batch)
    except (pyarrow.ArrowInvalid, pyarrow.ArrowTypeError, pyarrow.ArrowNotImplementedError) as error:
        what = f"parquet cannot hold these rows: {str(error).splitlines()[0]}"
        raise BadInput([Problem(what, str(path), fix="write jsonl, or leave the column out with --drop")]) from error
    return count


def _batches(rows: Rows) -> Iterator[list[dict[str, Any]]]:
    iterator = rows()
    while batch := [_flat(row) for row in islice(iterator, _BATCH)]:
        # a row of a table has every column: the columns of the batch, not those of its first row
        names = list(dict.fromkeys(key for row in batch for key in row))
        yield [{name: row.get(name) for name in names} for row in batch]


def _flat(row: Mapping[str, Any]) -> dict[str, Any]:
    """Objects of free shape as JSON text, which the readers take: in a column all objects would get all keys."""
    found = dict(row)
    if isinstance(found.get("tools"), list):
        found["tools"] = json.dumps(found["tools"], ensure_ascii=False)
    for key in ("messages", "conversations", "prompt", "completion", "chosen", "rejected"):
        if isinstance(found.get(key), list):
            found[key] = [_flat_turn(turn) for turn in found[key]]
    return found


def _flat_turn(turn: Any) -> Any:
    if not isinstance(turn, dict) or not isinstance(turn.get("tool_calls"), list):
        return turn
    calls = []
    for call in turn["tool_calls"]:
        function = call.get("function") if isinstance(call, dict) else None
        if isinstance(function, dict) and not isinstance(function.get("arguments"), str):
            arguments = json.dumps(function.get("arguments"), ensure_ascii=False)
            call = {**call, "function": {**function, "arguments": arguments}}
        calls.append(call)
    return {**turn, "tool_calls": calls}


WRITERS: dict[str, Callable[[Path, Rows], int]] = {
    ".jsonl": _jsonl,
    ".ndjson": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".tsv": _csv,
    ".parquet": _parquet,
}
