"""What a model is for: a policy answers, a reward model gives each answer a value. Told from its files; no torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from shikomi.errors import BadInput, Problem
from shikomi.model.check import ADAPTER_CONFIG, CONFIG
from shikomi.model.files import ModelFiles

Task = Literal["policy", "reward"]
CLASSIFIER = "ForSequenceClassification"  # how transformers' names of such classes end
SEQ_CLS = "SEQ_CLS"  # PEFT's name of the task


def task_of_files(files: ModelFiles) -> Task:
    """What the model of these files is for: its adapter says so, or the class that its base was saved from."""
    adapter = _read(files.adapter, ADAPTER_CONFIG) if files.adapter is not None else {}
    return "reward" if adapter.get("task_type") == SEQ_CLS or is_classifier(files.folder) else "policy"


def is_classifier(folder: Path) -> bool:
    """Whether a transformers folder holds a sequence classification model, which has no head for tokens."""
    return any(str(name).endswith(CLASSIFIER) for name in _read(folder, CONFIG).get("architectures") or [])


def check_policy(files: ModelFiles, name: str) -> None:
    """Raises BadInput for a reward model where something that answers is needed."""
    if task_of_files(files) == "reward":
        fix = f"give the model that answers; `shikomi eval {name} PAIRS` scores pairs with this one"
        raise BadInput([Problem("a reward model, which gives values and cannot answer", name, fix=fix)])


def check_reward_model(files: ModelFiles, name: str) -> None:
    """Raises BadInput for a model that answers where one that gives values is needed, and for one of several labels."""
    if task_of_files(files) == "policy":
        fix = "give a run of `objective: reward`, or a sequence classification model with one label"
        raise BadInput([Problem("not a reward model: it has no head for a value", name, fix=fix)])
    labels = len(_read(files.folder, CONFIG).get("id2label") or (0, 1))  # without them transformers has two
    if is_classifier(files.folder) and labels != 1:
        what = "a classifier of several labels, and a reward model gives one value"
        raise BadInput([Problem(what, name, found=f"{labels} labels", allowed="num_labels 1")])


def _read(folder: Path, name: str) -> dict[str, Any]:
    """A JSON object of a folder; {} where there is none (what is wrong with a file is said by who loads it)."""
    path = folder / name
    if not path.is_file():
        return {}
    value = json.loads(path.read_text(encoding="utf-8"))
    return value if isinstance(value, dict) else {}
