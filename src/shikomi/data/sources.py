"""Sources of rows: a file, a folder with splits, or a data set on the hub; and what identifies their
content.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shikomi.data.problems import Problems
from shikomi.data.readers import READERS, data_suffix, read_file
from shikomi.errors import BadInput, Problem, nearest

if TYPE_CHECKING:
    from shikomi.recipe import Source

SPLIT_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev", "eval"),
    "test": ("test", "testing"),
}
"""What the files of a split may be called: the name alone, or followed by one of - _ . as in
train-00000-of-00002.
"""

_HUB_ID = re.compile(r"(hub:)?(?P<id>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)")


@dataclass(frozen=True)
class Row:
    """A row as it was read: its file, its line (or row number, where a file has no lines), its columns."""

    file: str
    line: int
    data: dict[str, Any]


def rows(source: Source, problems: Problems | None = None, role: str = "train") -> Iterator[Row]:
    """The rows of a source, streaming, at most `source.limit`.

    `role` (train, validation, test) picks the files of a folder when the source names no split. What cannot
    be read goes to `problems` and reading goes on; without `problems` it is raised at the end as BadInput.
    A source that is not there is raised at once.
    """
    found = Problems() if problems is None else problems
    yield from islice(_all_rows(source, found, role), source.limit)
    if problems is None:
        found.raise_if_any()


def _all_rows(source: Source, problems: Problems, role: str) -> Iterator[Row]:
    hub = hub_id(source.path)
    if hub is not None:
        for number, data in enumerate(_hub_rows(hub, source.split or role), start=1):
            yield Row(f"hub:{hub}", number, data)
        return
    for path in files(source, role):
        for line, data in read_file(path, problems):
            yield Row(str(path), line, data)


def hub_id(path: str) -> str | None:
    """The data set id if the path is one: `owner/name` that is no local path and has no data file's suffix."""
    match = _HUB_ID.fullmatch(path)
    if match is None or (not path.startswith("hub:") and (Path(path).exists() or data_suffix(Path(path)) in READERS)):
        return None
    return match["id"]


def files(source: Source, role: str = "train") -> list[Path]:
    """The files of a local source, in the order in which they are read. Raises BadInput when there are
    none.
    """
    path = Path(source.path).expanduser()
    if path.is_dir():
        return _folder_files(path, source.split, role)
    if path.exists():
        return [path]
    parent = path.parent
    neighbours = sorted(p.name for p in parent.iterdir()) if parent.is_dir() else []
    close = nearest(path.name, neighbours)
    raise BadInput(
        [
            Problem(
                what="there is no such file" if parent.is_dir() else f"there is no folder {parent}",
                file=str(path),
                allowed="a file, a folder, or a hub data set (owner/name)",
                fix=f"did you mean `{parent / close}`?" if close else None,
            )
        ]
    )


def _folder_files(folder: Path, split: str | None, role: str) -> list[Path]:
    def data_files(place: Path) -> list[Path]:
        found = place.iterdir() if place.is_dir() else ()
        return sorted(p for p in found if p.is_file() and data_suffix(p) in READERS and p.name[0] != ".")

    wanted = split or role
    known = SPLIT_NAMES.get(wanted, (wanted,))
    pattern = re.compile(rf"({'|'.join(map(re.escape, known))})([-_.].*)?", re.IGNORECASE)
    here = [*data_files(folder), *data_files(folder / "data")]
    matching = [p for p in here if pattern.fullmatch(p.name)]
    for name in known:
        matching += data_files(folder / name)
    if matching:
        return matching
    every_name = "|".join(re.escape(name) for names in SPLIT_NAMES.values() for name in names)
    has_splits = any(re.fullmatch(rf"({every_name})([-_.].*)?", p.name, re.IGNORECASE) for p in here)
    if here and split is None and role == "train" and not has_splits:
        return here
    raise BadInput(
        [
            Problem(
                what=f"the folder has no files for {wanted}" if here else "the folder has no data files",
                file=str(folder),
                found=", ".join(p.name for p in here[:10]) or "no files of a known kind",
                allowed=", ".join(f"{name}{suffix}" for name in known[:2] for suffix in (".jsonl", ".csv")) + ", ...",
                fix="name the file itself, or set `split` for this source",
            )
        ]
    )


def _hub_rows(name: str, split: str) -> Iterator[dict[str, Any]]:
    datasets = _datasets()
    try:
        yield from datasets.load_dataset(name, split=split, streaming=True)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise BadInput([_hub_problem(name, error)]) from error


def _datasets() -> Any:
    try:
        import datasets
    except ImportError:
        raise BadInput(
            [
                Problem(
                    what="reading a data set from the hub needs the package `datasets`",
                    fix='pip install "shikomi[hub]", or give a file',
                )
            ]
        ) from None
    return datasets


def _hub_problem(name: str, error: Exception) -> Problem:
    return Problem(
        what=f"the hub data set {name} cannot be read: {str(error).splitlines()[0] if str(error) else type(error)}",
        allowed="a public data set, or a gated one with HF_TOKEN set; a network, or the data set in the local cache",
        fix="check the name, the split, the token and the network; or download the file and name it",
    )


def fingerprint(source: Source, role: str = "train") -> str:
    """SHA-256 (hex) of what the source gives: the content of its files and its options.

    Of a hub data set, the commit instead of the content.
    """
    hub = hub_id(source.path)
    content = [_hub_commit(hub)] if hub else [f"{path}:{file_sha256(path)}" for path in files(source, role)]
    options = [source.limit, source.weight, source.split or role]
    return hashlib.sha256(json.dumps([content, options]).encode()).hexdigest()


def file_sha256(path: Path) -> str:
    """SHA-256 (hex) of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _hub_commit(name: str) -> str:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        commit = HfApi().dataset_info(name).sha
    except (OSError, ValueError, HfHubHTTPError) as error:
        raise BadInput([_hub_problem(name, error)]) from error
    return f"{name}@{commit}"
