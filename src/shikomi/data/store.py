"""The token cache: tokenised rows in flat files, made once per data, tokenizer, template and options."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Self, TypeVar

import numpy as np

from shikomi.data.answers import ANSWERS_VERSION, Answers
from shikomi.data.encode import Encoder
from shikomi.data.packing import Example
from shikomi.data.pairs import Completion, Pair, Thumb
from shikomi.data.preference_scan import PairPass, ThumbPass
from shikomi.data.render import Encoded
from shikomi.data.report import PreferenceReport, Report
from shikomi.data.scan import Pass, Scan
from shikomi.data.sources import file_sha256, fingerprint
from shikomi.data.split import Split
from shikomi.errors import TryAgain
from shikomi.progress import Progress, Silent

if TYPE_CHECKING:
    from shikomi.recipe import DataSpec, Source

VERSION = 1
"""Of the files below; part of every cache key."""

_ARRAYS = {
    "ids": np.int32,  # tokens of all rows, one row after the other
    "mask": np.bool_,  # trained targets
    "offsets": np.int64,  # (parts of all rows + 1,) first token of each part; a conversation is one part
    "source": np.int32,  # (rows,) number of the row's source
    "file": np.int32,  # (rows,) index into the file names
    "line": np.int64,  # (rows,) where the row stands in its file
}
_VALUE = {"value": np.float64}  # (rows,) margin of a pair; 1 for a desirable answer, 0 for another

RecordT = TypeVar("RecordT", covariant=True)
Part = tuple[np.ndarray, np.ndarray]
"""Tokens and mask of one part of a row."""


@dataclass(frozen=True, eq=False)
class Store(ABC, Generic[RecordT]):
    """Tokenised rows in the order of the data. `store[i]` is a record whose `row` is i.

    lengths (n,) int64 tokens per row; weights (n,) float64 how often each row is seen per epoch, None where all are
    seen once; report: the counts of the pass that made it; fingerprint: the cache key. A kind of rows is a class of
    this one, which says how a row is read, of how many parts it is, and what it becomes.
    """

    kind: ClassVar[str]
    scan: ClassVar[type[Pass[Any, Any]]]
    report_class: ClassVar[type[Report]] = Report
    arrays: ClassVar[dict[str, Any]] = _ARRAYS
    n_parts: ClassVar[int] = 1

    fingerprint: str
    folder: Path
    report: Report
    files: list[str]
    weights: np.ndarray | None
    _arrays: dict[str, np.ndarray]

    @staticmethod
    @abstractmethod
    def parts(encoded: Any) -> list[Part]:
        """The parts of an encoded row."""

    @abstractmethod
    def record(self, parts: list[Part], index: int) -> RecordT:
        """The record that row `index` becomes."""

    @classmethod
    def build(
        cls,
        sources: Sequence[Source],
        spec: DataSpec,
        encoder: Encoder,
        cache_dir: Path,
        labels: tuple[str, ...] | None = None,
        role: str = "train",
        side: Split | None = None,
        progress: Progress | None = None,
    ) -> Self:
        """Open the cached tokens of these rows, or make them.

        labels: what `{labels}` stands for in column templates; role: which files of a folder; side: one side of a
        validation split. A cache that is damaged is made again. Raises BadInput with every problem of the data (and
        writes nothing then), TryAgain when the disk is full.
        """
        shown = progress or Silent()
        key = cls.cache_key(sources, spec, encoder, labels, role, side)
        folder = cache_dir / key
        cache_dir.mkdir(parents=True, exist_ok=True)
        with _one_builder(cache_dir / f"{key}.lock"):
            if folder.exists():
                damage = cls._damage(folder)
                if damage is None:
                    return cls._open(folder, sources)
                shown.note(f"the token cache is damaged ({damage}) and is made again")
                shutil.rmtree(folder)
            temporary = cache_dir / f"{key}.tmp"
            shutil.rmtree(temporary, ignore_errors=True)  # of a builder that was killed: the lock is ours
            try:
                temporary.mkdir()
                cls._write(temporary, cls.scan(sources, spec, labels, role, side), encoder, shown)
                os.rename(temporary, folder)
            except OSError as error:
                if error.errno == errno.ENOSPC:
                    raise TryAgain(f"the disk is full: tokens cannot be written to {cache_dir}") from error
                raise
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
        return cls._open(folder, sources)

    @classmethod
    def _open(cls, folder: Path, sources: Sequence[Source]) -> Self:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        arrays = {name: _mapped(folder / f"{name}.bin", dtype) for name, dtype in cls.arrays.items()}
        weights = np.asarray([source.weight for source in sources], np.float64)[arrays["source"]]
        return cls(
            fingerprint=folder.name,
            folder=folder,
            report=cls.report_class(**meta["report"]),
            files=meta["files"],
            weights=None if (weights == 1).all() else weights,
            _arrays=arrays,
        )

    def __len__(self) -> int:
        return len(self._arrays["source"])

    def __getitem__(self, index: int) -> RecordT:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        first = int(index) * self.n_parts
        bounds = self._arrays["offsets"][first : first + self.n_parts + 1].tolist()
        ids, mask = (self._read(name, bounds[0], bounds[-1]) for name in ("ids", "mask"))
        ends = [bound - bounds[0] for bound in bounds]
        return self.record([(ids[a:b], mask[a:b]) for a, b in zip(ends, ends[1:], strict=False)], int(index))

    def _read(self, name: str, start: int, end: int) -> np.ndarray:
        """Values start..end of a file. Read, not mapped: pages of a map count as this process's memory and stay."""
        dtype = np.dtype(self.arrays[name])
        path = self.folder / f"{name}.bin"
        return np.fromfile(path, dtype, count=end - start, offset=start * dtype.itemsize)

    def __iter__(self) -> Iterator[RecordT]:
        return (self[i] for i in range(len(self)))

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each row, (n,) int64; of a pair the prompt once."""
        return np.diff(self._arrays["offsets"][:: self.n_parts])

    def value(self, index: int) -> float:
        """The number that is stored with row `index`."""
        return float(self._arrays["value"][index])

    def where(self, index: int) -> tuple[str, int]:
        """File and line that row `index` came from."""
        return self.files[int(self._arrays["file"][index])], int(self._arrays["line"][index])

    @classmethod
    def cache_key(
        cls,
        sources: Sequence[Source],
        spec: DataSpec,
        encoder: Encoder,
        labels: tuple[str, ...] | None,
        role: str,
        side: Split | None,
    ) -> str:
        """SHA-256 (hex) of everything that decides the tokens."""
        content: dict[str, Any] = {
            "version": VERSION,
            "sources": [fingerprint(source, role) for source in sources],
            "encoder": encoder.fingerprint(),
            "format": [spec.format, spec.prompt, spec.completion, spec.system],
            "labels": [labels, spec.labels],
            "side": [side.side, side.seed, side.threshold] if side else None,
        }
        content |= cls.key_part(spec)
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    @classmethod
    def _write(cls, folder: Path, scan: Pass[Any, Any], encoder: Encoder, progress: Progress) -> None:
        """Tokenise the rows of `scan` into the folder's files, then its meta.json with their SHA-256."""
        files: dict[str, int] = {}
        offset = 0
        handles = {name: (folder / f"{name}.bin").open("wb") for name in cls.arrays}

        def write(name: str, values: Any) -> None:
            handles[name].write(np.asarray(values, cls.arrays[name]).tobytes())

        try:
            write("offsets", [0])
            for item, encoded in scan.encoded(encoder, progress):
                for ids, mask in cls.parts(encoded):
                    offset += len(ids)
                    write("ids", ids)
                    write("mask", mask)
                    write("offsets", [offset])
                if "value" in cls.arrays:
                    write("value", [item.conversation.value])
                write("source", [item.source])
                write("file", [files.setdefault(item.row.file, len(files))])
                write("line", [item.row.line])
            for handle in handles.values():
                handle.flush()
                os.fsync(handle.fileno())
        finally:
            for handle in handles.values():
                handle.close()
        scan.problems.raise_if_any()
        sums = {name: file_sha256(folder / f"{name}.bin") for name in cls.arrays}
        meta = {"sha256": sums, "report": scan.report.as_dict(), "files": list(files)}
        with (folder / "meta.json").open("w", encoding="utf-8") as file:
            json.dump(meta, file, ensure_ascii=False)
            file.flush()
            os.fsync(file.fileno())

    @classmethod
    def _damage(cls, folder: Path) -> str | None:
        """What is wrong with a cache folder; None if every file is as it was written."""
        try:
            meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
            for name, expected in meta["sha256"].items():
                if file_sha256(folder / f"{name}.bin") != expected:
                    return f"{name}.bin has other bytes"
            cls.report_class(**meta["report"])
            complete = set(meta["sha256"]) == set(cls.arrays) and isinstance(meta["files"], list)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            return str(error)
        return None if complete else "meta.json is not complete"

    @classmethod
    def key_part(cls, spec: DataSpec) -> dict[str, Any]:
        """What else decides the tokens of this kind of rows."""
        return {}


@dataclass(frozen=True, eq=False)
class TokenStore(Store[Example]):
    """Conversations and texts: `store[i]` is an Example."""

    kind: ClassVar[str] = "conversations"
    scan: ClassVar[type[Pass[Any, Any]]] = Scan

    @staticmethod
    def parts(encoded: Encoded) -> list[Part]:
        return [(encoded.ids, encoded.mask)]

    def record(self, parts: list[Part], index: int) -> Example:
        [(ids, mask)] = parts
        return Example(ids, mask, index)


@dataclass(frozen=True, eq=False)
class _PreferenceStore(Store[RecordT]):
    """What the stores of pairs and of judged answers share: a prompt, then the answers, and a number."""

    report_class: ClassVar[type[Report]] = PreferenceReport
    arrays: ClassVar[dict[str, Any]] = _ARRAYS | _VALUE

    @staticmethod
    def parts(encoded: Answers) -> list[Part]:
        return [(encoded.prompt, np.zeros(len(encoded.prompt), bool)), *((a.ids, a.mask) for a in encoded.answers)]

    @classmethod
    def key_part(cls, spec: DataSpec) -> dict[str, Any]:
        columns = [spec.chosen, spec.rejected, spec.margin, spec.desirable]
        return {"kind": [cls.kind, ANSWERS_VERSION], "answers": columns}


@dataclass(frozen=True, eq=False)
class PairStore(_PreferenceStore[Pair]):
    """Pairs: `store[i]` is a Pair."""

    kind: ClassVar[str] = "pairs"
    scan: ClassVar[type[Pass[Any, Any]]] = PairPass
    n_parts: ClassVar[int] = 3

    def record(self, parts: list[Part], index: int) -> Pair:
        (prompt, _), chosen, rejected = parts
        return Pair(prompt, Completion(*chosen), Completion(*rejected), self.value(index), index)


@dataclass(frozen=True, eq=False)
class ThumbStore(_PreferenceStore[Thumb]):
    """Judged answers: `store[i]` is a Thumb."""

    kind: ClassVar[str] = "thumbs"
    scan: ClassVar[type[Pass[Any, Any]]] = ThumbPass
    n_parts: ClassVar[int] = 2

    def record(self, parts: list[Part], index: int) -> Thumb:
        (prompt, _), completion = parts
        return Thumb(prompt, Completion(*completion), self.value(index) == 1, index)


STORES: dict[str, type[Store[Any]]] = {store.kind: store for store in (TokenStore, PairStore, ThumbStore)}
"""Token caches by what an objective learns from: its `data`."""


def _mapped(path: Path, dtype: type) -> np.ndarray:
    if path.stat().st_size == 0:  # an empty file cannot be mapped
        return np.zeros(0, dtype)
    return np.memmap(path, dtype, mode="r")


@contextmanager
def _one_builder(lock: Path) -> Iterator[None]:
    """Hold the kernel's lock on `lock`, waiting for another builder of the same tokens to finish."""
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
