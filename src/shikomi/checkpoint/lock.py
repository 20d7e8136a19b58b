"""One writer for each run directory: the kernel's lock, which ends with the process however that ends."""

import errno
import fcntl
import os
import time
from pathlib import Path
from types import TracebackType

from shikomi.errors import BadInput, Problem, TryAgain

LOCK_NAME = ".lock"
_TRIES, _PAUSE = 5, 0.05  # seconds; `is_locked` of another process holds the lock for an instant

_held: "set[RunLock]" = set()


class RunLock:
    """Holds `output_dir/.lock` from construction until `release`, the end of a `with` block, or the process's death.

    Creates `output_dir`. Raises TryAgain when a live process has it, BadInput when the folder cannot be made or its
    file system has no locks.
    """

    def __init__(self, output_dir: Path):
        self.output_dir = output_dir
        try:
            output_dir.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(output_dir / LOCK_NAME, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise BadInput([_unusable(output_dir, error)]) from error
        try:
            self._acquire()
        except BaseException:
            os.close(self._descriptor)
            raise
        _held.add(self)

    def _acquire(self) -> None:
        for attempt in range(_TRIES):
            try:
                fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError as error:
                if attempt + 1 == _TRIES:
                    raise TryAgain(
                        f"another process is writing {self.output_dir} now: wait until it ends "
                        f"(`shikomi runs` lists it), stop it, or choose another output_dir"
                    ) from error
                time.sleep(_PAUSE)
            except OSError as error:
                raise BadInput([_unusable(self.output_dir, error)]) from error

    def release(self) -> None:
        """Safe to call twice."""
        if self in _held:
            _held.remove(self)
            os.close(self._descriptor)

    def __enter__(self) -> "RunLock":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def is_locked(output_dir: Path) -> bool:
    """True while a live process writes this run directory."""
    try:
        descriptor = os.open(output_dir / LOCK_NAME, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)


def _unusable(output_dir: Path, error: OSError) -> Problem:
    if error.errno in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
        what, fix = "this file system cannot lock files", "choose an output_dir on a local disk"
    else:
        what, fix = "cannot be used as a run directory", "choose another output_dir"
    return Problem(what=what, file=str(output_dir), found=str(error.strerror), fix=fix)


def _forget_in_child() -> None:
    """A forked child that outlives a killed trainer must not keep its run directory locked."""
    for lock in list(_held):
        lock.release()


os.register_at_fork(after_in_child=_forget_in_child)
