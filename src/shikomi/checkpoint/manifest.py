"""Checkpoints: a folder that is either whole and verified, or not there.

    checkpoints/step-000120/{adapter.safetensors, optimizer.safetensors, state.json, manifest.json}

The manifest is written last and holds the SHA-256 and size of every other file; then the folder gets its name.
"""

import hashlib
import json
import os
import re
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from shikomi.checkpoint.files import REPLACED, clear_leftovers, new_folder, remove_folder, saving, write_bytes
from shikomi.checkpoint.fingerprint import fingerprint
from shikomi.checkpoint.tensors import read_safetensors, write_safetensors
from shikomi.errors import BadInput, Problem

FORMAT = 1
MANIFEST, STATE = "manifest.json", "state.json"
_STEP = re.compile(rf"(?:{re.escape(REPLACED)})?step-(\d+)")
_PART = re.compile(r"[A-Za-z0-9_-]+")


class NewerFormat(BadInput):
    """A checkpoint this version is too old for: not damage, so nothing falls back from it."""


class Found(NamedTuple):
    """The checkpoint to go on from; `folder` is None and `state` empty where none is valid."""

    folder: Path | None
    state: dict[str, Any]
    notes: list[str]


def checkpoint_folder(checkpoints: Path, step: int) -> Path:
    return checkpoints / f"step-{step:06d}"


def write_checkpoint(
    folder: Path,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    machine: Mapping[str, Any] | None = None,
) -> None:
    """Writes `folder` whole or not at all; a kill at any instant leaves what was there, or the new one.

    tensors: {"adapter": {name: tensor}, ...}, one safetensors file for each part, dtypes kept.
    state: JSON values with an integer "step"; floats come back bit for bit, tuples as lists.
    machine: what `fingerprint()` gives, which is taken where this is None.
    Checkpoints of later steps (damaged ones that a resume fell back from) are removed once it is written.
    The caller holds the run's lock. Raises TryAgain on a full disk, with the older checkpoints intact.
    """
    step = state["step"]
    for part in tensors:
        if not _PART.fullmatch(part):
            raise ValueError(f"{part!r} cannot name a part of a checkpoint")
    with saving(f"the checkpoint of step {step}", folder):
        clear_leftovers(folder.parent)
        with new_folder(folder) as temporary:
            files = {}
            for part, named in tensors.items():
                files[f"{part}.safetensors"] = write_safetensors(temporary / f"{part}.safetensors", named)
            files[STATE] = write_bytes(temporary / STATE, json.dumps(state).encode())
            manifest = {
                "format": FORMAT,
                "step": step,
                "files": {name: written._asdict() for name, written in files.items()},
                "fingerprint": dict(fingerprint() if machine is None else machine),
            }
            manifest["sha256"] = _digest(manifest)
            write_bytes(temporary / MANIFEST, json.dumps(manifest, indent=1).encode())
        for later, stale in _steps(folder.parent):
            if later > step:
                remove_folder(stale)


def _digest(manifest: Mapping[str, Any]) -> str:
    """SHA-256 of all of a manifest but this."""
    rest = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest: format, step, files, fingerprint.

    Raises BadInput when it is absent or malformed, of a newer format, or names a file outside its folder.
    """
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_bytes())
        version, step, files = manifest["format"], manifest["step"], manifest["files"]
        entries = [(name, entry["sha256"], entry["bytes"]) for name, entry in files.items()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        found = f"{type(error).__name__}: {error}"
        raise BadInput([Problem("no readable manifest", str(path), found=found)]) from error
    if not isinstance(version, int) or version > FORMAT:
        fix = "install the version that wrote it, or a newer one"
        problem = Problem("checkpoint of a newer format", str(path), None, repr(version), f"1 to {FORMAT}", fix)
        raise NewerFormat([problem])
    if manifest.get("sha256") != _digest(manifest):
        raise BadInput([Problem("is not as it was written (SHA-256 differs)", str(path))])
    if not isinstance(step, int) or STATE not in files:
        raise BadInput([Problem("manifest without a step or a state", str(path))])
    for name, sha, size in entries:
        if not _stays_inside(folder, name):
            what = "manifest names something that is not a plain file in its folder"
            raise BadInput([Problem(what, str(path), found=repr(name))])
        if not isinstance(sha, str) or not isinstance(size, int):
            raise BadInput([Problem("manifest without a SHA-256 and a size", str(path), found=repr(name))])
    return manifest


def _stays_inside(folder: Path, name: str) -> bool:
    """True for the bare name of a regular file (or of none) in `folder`: no path, no link."""
    if not name or name in (".", "..") or "/" in name or "\\" in name or "\0" in name:
        return False
    try:
        return stat.S_ISREG(os.lstat(folder / name).st_mode)
    except FileNotFoundError:
        return True


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, in words; None when every byte is as it was written. Raises NewerFormat."""
    try:
        manifest = read_manifest(folder)
    except NewerFormat:
        raise
    except BadInput as error:
        return error.message
    numbered = _STEP.fullmatch(folder.name)
    if numbered and int(numbered[1]) != manifest["step"]:
        return f"the manifest is of step {manifest['step']}"
    for name in manifest["files"]:
        wrong = _damaged_file(folder, name, manifest)
        if wrong:
            return wrong
    return None


def _damaged_file(folder: Path, name: str, manifest: Mapping[str, Any]) -> str | None:
    expected = manifest["files"][name]
    try:
        with open(folder / name, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size != expected["bytes"]:
                return f"{name} has {size} bytes, {expected['bytes']} were written"
            if hashlib.file_digest(file, "sha256").hexdigest() != expected["sha256"]:
                return f"{name} is not as it was written (SHA-256 differs)"
    except OSError as error:
        return f"{name} cannot be read ({error.strerror})"
    return None


def newest_valid(checkpoints: Path) -> Found:
    """The newest checkpoint whose every file has the SHA-256 of its manifest, and one note for each that had not."""
    notes: list[str] = []
    newest_first = sorted(_steps(checkpoints), reverse=True)  # of one step, "step-" comes before ".old-step-"
    for _, folder in newest_first:
        wrong = damage(folder)
        if wrong is None:
            if notes:
                notes.append(f"going on from {folder.name} instead")
            return Found(folder, json.loads((folder / STATE).read_bytes()), notes)
        notes.append(f"checkpoint {folder.name} is damaged and left aside: {wrong}")
    if notes:
        notes.append("no valid checkpoint is left: starting at step 0")
    return Found(None, {}, notes)


def _steps(checkpoints: Path) -> list[tuple[int, Path]]:
    folders = [entry for entry in checkpoints.iterdir() if entry.is_dir()] if checkpoints.is_dir() else []
    return [(int(match[1]), folder) for folder in folders if (match := _STEP.fullmatch(folder.name))]


def read_tensors(folder: Path, part: str) -> dict[str, Tensor]:
    """The tensors of one part, on the CPU. Raises BadInput when the part is absent or not as it was written."""
    manifest = read_manifest(folder)
    name = f"{part}.safetensors"
    if name not in manifest["files"]:
        there = ", ".join(n.removesuffix(".safetensors") for n in manifest["files"] if n != STATE)
        raise BadInput([Problem("this checkpoint has no such part", str(folder), found=part, allowed=there)])
    wrong = _damaged_file(folder, name, manifest)
    if wrong:
        raise BadInput([Problem("damaged checkpoint", str(folder), None, wrong, None, "use an older one")])
    return read_safetensors(folder / name)


def prune(checkpoints: Path, keep: int | None, best: Path | None = None) -> list[Path]:
    """Removes all but the newest `keep` checkpoints (None: all stay) and `best`; returns what went.

    The caller holds the run's lock.
    """
    if keep is None:
        return []
    if keep < 0:
        raise ValueError(f"keep counts checkpoints, {keep} is none")
    kept = {folder.name for _, folder in sorted(_steps(checkpoints))[-keep:]} if keep else set()
    if best is not None:
        kept.add(best.name)
    gone = [folder for _, folder in sorted(_steps(checkpoints)) if folder.name not in kept]
    with saving("the list of checkpoints", checkpoints):
        for folder in gone:
            remove_folder(folder)
    return gone
