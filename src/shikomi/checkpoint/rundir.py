"""The directory of one run: its paths, its records, and who may write there.

recipe.yaml run.json metrics.jsonl log.txt result.json report.html checkpoints/ stages/NN-name/ final/
"""

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from shikomi.checkpoint.diff import differences
from shikomi.checkpoint.files import replace_file, replace_json, saving
from shikomi.errors import BadInput, Problem, nearest

MARKER = "run.json"
_OURS = ("recipe.yaml", "metrics.jsonl", "result.json", "log.txt", "report.html", "checkpoints", "stages", "final")
_SAFE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True)
class RunDir:
    """Paths and records below `path`. Whoever writes holds `RunLock(path)`; reading needs no lock."""

    path: Path

    @property
    def recipe_path(self) -> Path:
        return self.path / "recipe.yaml"

    @property
    def metrics_path(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def log_path(self) -> Path:
        return self.path / "log.txt"

    @property
    def result_path(self) -> Path:
        return self.path / "result.json"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def final(self) -> Path:
        return self.path / "final"

    def stage(self, number: int, name: str) -> Path:
        """stages/01-sft for number 1 and name "sft"."""
        if not _SAFE.fullmatch(name):
            fix = "use letters, digits, dot, dash and underscore"
            raise BadInput([Problem("a stage's name must be usable as a folder name", found=repr(name), fix=fix)])
        return self.path / "stages" / f"{number:02d}-{name}"

    # Which run this is

    def exists(self) -> bool:
        """True when a run was started here."""
        return (self.path / MARKER).is_file()

    def create(self, recipe: str, digest: str) -> bool:
        """Makes this the directory of a run of `recipe` (resolved YAML, and its `Recipe.digest()`).

        Returns True when it already holds a complete checkpoint of the same recipe: going on from it gives the same
        final bytes as starting again. Otherwise records of an earlier attempt are removed.
        Raises BadInput (nothing is written then) for a finished run, a complete checkpoint of another recipe, and a
        folder that is no run but has files under names a run uses.
        """
        self._refuse_finished()
        self._refuse_foreign()
        same = self._same_recipe(recipe, digest) if self.has_checkpoint() else False
        with saving("the run's recipe", self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            if not same:
                about = {"format": 1, "started": _now(), "digest": digest, "recipe": recipe, "data": {}, "extended": []}
                replace_json(self.path / MARKER, about)
                for stale in (self.metrics_path, self.result_path):
                    stale.unlink(missing_ok=True)
            replace_file(self.recipe_path, recipe.encode())
        return same

    def open(self) -> "RunDir":
        """Itself, when a run was started here; else BadInput that names the nearest run."""
        if not self.exists():
            beside = self.path.parent
            names = [p.name for p in beside.iterdir() if (p / MARKER).is_file()] if beside.is_dir() else []
            close = nearest(self.path.name, names)
            meant = f"did you mean {beside / close}? " if close else ""
            fix = f"{meant}`shikomi runs` lists the runs"
            raise BadInput([Problem("no run was started here", file=str(self.path), fix=fix)])
        return self

    def has_checkpoint(self) -> bool:
        return self.exists() and any(self.checkpoints.glob("step-*/manifest.json"))

    def about(self) -> dict[str, Any]:
        """run.json: when it started, the recipe it was started with, its data, how it was extended."""
        return json.loads((self.path / MARKER).read_bytes())

    def _refuse_finished(self) -> None:
        if self.is_finished():
            problem = Problem(
                what="holds a finished run",
                file=str(self.path),
                fix=f"to train it further, `shikomi resume {self.path} num_train_epochs=...`; "
                "to start anew, choose another output_dir",
            )
            raise BadInput([problem])

    def _refuse_foreign(self) -> None:
        there = [name for name in _OURS if (self.path / name).exists()]
        if there and not self.exists():
            problem = Problem(
                what="is no run, and has files a run would overwrite",
                file=str(self.path),
                found=", ".join(there),
                fix="choose another output_dir, or move these away",
            )
            raise BadInput([problem])

    def _same_recipe(self, recipe: str, digest: str) -> bool:
        """Raises BadInput with the differences when the run here is of another recipe."""
        about = self.about()
        changed = differences(yaml.safe_load(about["recipe"]), yaml.safe_load(recipe))
        if digest != about["digest"] and changed:
            problem = Problem(
                what="holds checkpoints of another recipe",
                file=str(self.path),
                found="; ".join(changed),
                fix=f"choose another output_dir, or go on with the old recipe: `shikomi resume {self.path}`",
            )
            raise BadInput([problem])
        return True

    def check_recipe(self, recipe: str, digest: str) -> None:
        """For resume: raises BadInput with the differences when `recipe` is not the one this run was started with."""
        self._same_recipe(recipe, digest)

    def check_data(self, fingerprints: Mapping[str, str]) -> None:
        """Remembers the SHA-256 of each data file the first time; later raises BadInput when one has changed."""
        about = self.about()
        if not about["data"]:
            about["data"] = dict(fingerprints)
            with saving("the fingerprints of the data", self.path):
                replace_json(self.path / MARKER, about)
            return
        changed = differences(about["data"], fingerprints)
        if changed:
            problem = Problem(
                what="the data is not what this run was started with",
                file=str(self.path),
                found="; ".join(changed),
                fix="put the old files back, or train into another output_dir",
            )
            raise BadInput([problem])

    def extend(self, recipe: str, digest: str, overrides: Sequence[str], step: int) -> None:
        """Gives a run a changed recipe (more epochs, other saving) from `step` on, and records the overrides."""
        about = self.about()
        about["extended"].append({"time": _now(), "step": step, "overrides": list(overrides)})
        about.update(recipe=recipe, digest=digest)
        with saving("the extended recipe", self.path):
            # In this order a crash leaves an unfinished run of the old recipe, which resumes to where it was.
            if self.is_finished():
                replace_json(self.result_path, {**self.result(), "finished": False})
            replace_json(self.path / MARKER, about)
            replace_file(self.recipe_path, recipe.encode())

    # Results

    def result(self) -> dict[str, Any]:
        """result.json, or an empty dict. Raises BadInput when it is not JSON."""
        try:
            return json.loads(self.result_path.read_bytes())
        except FileNotFoundError:
            return {}
        except ValueError as error:
            raise BadInput([Problem("is not JSON", str(self.result_path), found=str(error))]) from error

    def is_finished(self) -> bool:
        return self.result().get("finished") is True

    def write_result(self, result: Mapping[str, Any]) -> None:
        """Replaces result.json in one rename; with "finished": True the run is finished from then on."""
        with saving("result.json", self.path):
            replace_json(self.result_path, result)

    # Records

    def append_metrics(self, record: Mapping[str, Any]) -> None:
        """Adds one JSON line; it survives the process (not a power cut, until `sync_metrics`).

        A number that is not finite is written as null, which JSON has and NaN it has not.
        """
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        with saving("metrics.jsonl", self.path), open(self.metrics_path, "a", encoding="utf-8", buffering=1) as file:
            file.write(json.dumps(finite, allow_nan=False, ensure_ascii=False) + "\n")

    def sync_metrics(self) -> None:
        """fsync: call before a checkpoint, so that no record is younger than it."""
        if self.metrics_path.exists():
            with saving("metrics.jsonl", self.path), open(self.metrics_path, "ab") as file:
                os.fsync(file.fileno())

    def read_metrics(self, start: int = 0) -> tuple[list[dict[str, Any]], int]:
        """Records from byte `start` on, and where the next one will start: call again to follow a live run.

        A line that is still being written is left for the next call; one that is not a JSON object is skipped.
        """
        if not self.metrics_path.exists():
            return [], start
        with open(self.metrics_path, "rb") as file:
            file.seek(start)
            data = file.read()
        end = data.rfind(b"\n") + 1
        records = [record for line in data[:end].splitlines() if (record := _record(line)) is not None]
        return records, start + end

    def truncate_metrics(self, after_step: int) -> int:
        """Cuts every record of a step after `after_step`, and torn lines; returns how many lines went."""
        if not self.metrics_path.exists():
            return 0
        lines = self.metrics_path.read_bytes().splitlines(keepends=True)
        kept = [line for line in lines if _is_kept(line, after_step)]
        if len(kept) < len(lines):
            with saving("metrics.jsonl", self.path):
                replace_file(self.metrics_path, b"".join(kept))
        return len(lines) - len(kept)

    def log(self, text: str) -> None:
        """Adds `text` to log.txt under the time, one line for each line of it."""
        stamp = _now()
        with saving("log.txt", self.path), open(self.log_path, "a", encoding="utf-8") as file:
            file.write("".join(f"{stamp} {line}\n" for line in text.splitlines()))


def _record(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


def _is_kept(line: bytes, after_step: int) -> bool:
    record = _record(line) if line.endswith(b"\n") else None
    return record is not None and isinstance(record.get("step"), int) and record["step"] <= after_step


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
