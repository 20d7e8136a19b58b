"""Writing that survives a crash: every byte is fsynced before the one rename that makes it visible."""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from shikomi.errors import BadInput, Problem, TryAgain

# Prefixes of names that no reader takes for finished work.
TEMPORARY, REPLACED, REMOVED = ".tmp-", ".old-", ".gone-"

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_FORBIDDEN = {errno.EACCES, errno.EPERM, errno.EROFS}


class Written(NamedTuple):
    sha256: str
    bytes: int


@contextmanager
def saving(what: str, where: Path) -> Iterator[None]:
    """Turns an operating system error while `what` is written below `where` into one the user can act on.

    Raises TryAgain (disk full, quota, file size limit, input/output error) or BadInput (not allowed to write there).
    """
    try:
        yield
    except OSError as error:
        if error.errno in _FORBIDDEN:
            problem = Problem(
                what=f"cannot write {what}",
                file=str(where),
                found=str(error.strerror),
                fix="choose another output_dir, or make this one writable",
            )
            raise BadInput([problem]) from error
        reason = "the disk is full" if error.errno in _FULL else "the system refused"
        raise TryAgain(
            f"could not write {what} in {where}: {reason} ({error.strerror or error}; {_free(where)}). "
            "What was saved before is intact: make room and run the same command again, or resume."
        ) from error


def _free(where: Path) -> str:
    place = where
    while not place.exists() and place != place.parent:
        place = place.parent
    return f"{shutil.disk_usage(place).free / 1e6:,.0f} MB free"


def sync(path: Path) -> None:
    """fsync of a file's bytes, or of the names in a directory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class NewFile:
    """A new file whose bytes are hashed on their way out."""

    def __init__(self, path: Path):
        self.descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        self.sha = hashlib.sha256()
        self.bytes = 0

    def write(self, data: Any) -> None:
        view = memoryview(data).cast("B")
        self.sha.update(view)
        self.bytes += len(view)
        while view:
            view = view[os.write(self.descriptor, view) :]

    def __enter__(self) -> "NewFile":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            if kind is None:
                os.fsync(self.descriptor)
        finally:
            os.close(self.descriptor)

    def written(self) -> Written:
        return Written(self.sha.hexdigest(), self.bytes)


def write_bytes(path: Path, data: bytes) -> Written:
    """Writes a new file and fsyncs it; returns the SHA-256 and size of what was meant to be written."""
    with NewFile(path) as file:
        file.write(data)
    return file.written()


def replace_file(path: Path, data: bytes) -> None:
    """The file holds either its old bytes or `data`, whatever happens; `data` is durable on return."""
    temporary = path.with_name(TEMPORARY + path.name)
    write_bytes(temporary, data)
    os.rename(temporary, path)
    sync(path.parent)


def replace_json(path: Path, value: Any) -> None:
    """`replace_file` with indented JSON."""
    replace_file(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Yields an empty temporary folder that becomes `target` when the block ends, or is removed when it raises.

    `target` is at every instant the old folder, absent for the moment between two renames (the old one then waits
    as `.old-NAME`, see `clear_leftovers`), or the new one. One writer at a time: hold the run's lock.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(TEMPORARY + target.name)
    if temporary.exists():
        shutil.rmtree(temporary)
    temporary.mkdir()
    try:
        yield temporary
        for folder, _, names in os.walk(temporary, topdown=False):
            for name in names:
                sync(Path(folder, name))
            sync(Path(folder))
        _swap(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)  # the error that brought us here is the one to report
        raise


def _swap(temporary: Path, target: Path) -> None:
    aside = target.with_name(REPLACED + target.name)
    if target.exists():
        if aside.exists():
            shutil.rmtree(aside)
        os.rename(target, aside)
        sync(target.parent)
    os.rename(temporary, target)
    sync(target.parent)
    if aside.exists():
        shutil.rmtree(aside)


def remove_folder(folder: Path) -> None:
    """Removes a folder under a name no reader looks at, so that a crash leaves no half of it."""
    gone = folder.with_name(REMOVED + folder.name)
    if gone.exists():
        shutil.rmtree(gone)
    os.rename(folder, gone)
    shutil.rmtree(gone)


def clear_leftovers(parent: Path) -> None:
    """Finishes what a killed writer left in `parent`: half-written and half-removed folders go, and a folder that was
    moved aside for a replacement that never came is put back. Only for the holder of the run's lock."""
    for entry in sorted(parent.iterdir()) if parent.is_dir() else []:
        name = entry.name
        if name.startswith((TEMPORARY, REMOVED)):
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        elif name.startswith(REPLACED):
            target = entry.with_name(name.removeprefix(REPLACED))
            shutil.rmtree(entry) if target.exists() else os.rename(entry, target)
