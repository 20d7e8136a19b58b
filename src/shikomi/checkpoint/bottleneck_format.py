"""Bottleneck adapters on disk: adapter_config.json and adapter_model.safetensors, a format of this package.

PEFT has no bottleneck adapters. The config holds `shikomi_type: "bottleneck"`, the options of `adapters/bottleneck.py`
by their names, `base_model_name_or_path` and `revision`. Tensors are `<sublayer>.bottleneck.down.weight` (width,
hidden), `.down.bias` (width,), `.up.weight` (hidden, width), `.up.bias` (hidden,); <sublayer> is the path of the
attention or feed-forward module in the base, such as model.layers.0.mlp. A reward model has `task_type: "SEQ_CLS"` in
the config and its scalar head beside them, `score.weight` (1, hidden).
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from shikomi.adapters.bottleneck import Bottleneck
from shikomi.checkpoint.files import TEMPORARY, replace_file, saving
from shikomi.checkpoint.peft_config import CONFIG
from shikomi.checkpoint.peft_format import CARD, WEIGHTS
from shikomi.checkpoint.tensors import read_safetensors, write_safetensors
from shikomi.errors import BadInput, Problem
from shikomi.model.heads import SCORE
from shikomi.model.task import SEQ_CLS

TYPE = "shikomi_type"
ABOUT = (TYPE, "base_model_name_or_path", "revision", "task_type")
PARTS = ("down.weight", "down.bias", "up.weight", "up.bias")

_NAME = re.compile(r"(?P<sublayer>.+)\.bottleneck\.(down|up)\.(weight|bias)")


class Saved(NamedTuple):
    """A bottleneck adapter as its folder has it; `notes` say what was passed over."""

    options: Bottleneck
    tensors: dict[str, Tensor]
    notes: list[str]


def is_bottleneck(folder: Path) -> bool:
    """Whether an adapter folder says that it holds a bottleneck adapter; a config that cannot be read does not."""
    try:
        config = json.loads((folder / CONFIG).read_bytes())
    except (OSError, ValueError):
        return False  # the reader of PEFT's format says what is wrong with it
    return isinstance(config, dict) and config.get(TYPE) == Bottleneck.name


def save_bottleneck(
    folder: Path,
    options: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    base_model_name: str,
    dtype: Literal["bf16", "fp32"] = "bf16",
    revision: str | None = None,
    data: str = "",
    method: str = "",
    score: Tensor | None = None,
) -> None:
    """Writes adapter_config.json, adapter_model.safetensors and a model card.

    options, tensors: as the adapter's `export` gives them. data, method: a line of the card each. score (1, hidden):
    the scalar head of a reward model. Raises ValueError for a name of another format, TryAgain on a full disk.
    """
    odd = [name for name in tensors if not _NAME.fullmatch(name)]
    if odd:
        raise ValueError(f"not a tensor of a bottleneck adapter: {odd[0]}")
    target = {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
    task = "CAUSAL_LM" if score is None else SEQ_CLS
    about = dict(zip(ABOUT, (Bottleneck.name, base_model_name, revision, task), strict=True))
    tensors = {**tensors} if score is None else {**tensors, SCORE: score}
    with saving("the adapter", folder):
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / (TEMPORARY + WEIGHTS)
        write_safetensors(temporary, {name: tensor.detach().to(target) for name, tensor in tensors.items()})
        temporary.rename(folder / WEIGHTS)
        replace_file(folder / CONFIG, json.dumps({**options, **about}, indent=2, sort_keys=True).encode())
        replace_file(folder / CARD, _card(base_model_name, data, method, task).encode())


def load_bottleneck(folder: Path) -> Saved:
    """Reads what `save_bottleneck` wrote.

    Raises BadInput, every problem at once: weights absent, broken or pickled, options out of range, names that are not
    an adapter's, one part of a bottleneck without the others.
    """
    raw = json.loads((folder / CONFIG).read_bytes())
    given = {key: value for key, value in raw.items() if key in Bottleneck.__dataclass_fields__}
    problems = []
    try:
        options = TypeAdapter(Bottleneck).validate_json(json.dumps(given), strict=True)
    except ValidationError as error:
        for detail in error.errors(include_url=False):
            what = f"wrong value for {detail['loc'][0]}"
            problems.append(Problem(what, str(folder / CONFIG), found=repr(detail["input"]), allowed=detail["msg"]))
    weights = folder / WEIGHTS
    if not weights.is_file():
        fix = "copy or download it completely; pickled weights (.bin, .pt) are not read"
        raise BadInput([*problems, Problem(f"an adapter folder without {WEIGHTS}", str(folder), fix=fix)])
    tensors = read_safetensors(weights)
    found: dict[str, set[str]] = {}
    if (SCORE in tensors) != (raw.get("task_type") == SEQ_CLS):
        found_task = f"task_type {raw.get('task_type')!r}"
        problems.append(
            Problem(f"{SCORE} belongs to task_type {SEQ_CLS} and to no other", str(weights), found=found_task)
        )
    for name in sorted(tensors.keys() - {SCORE}):
        match = _NAME.fullmatch(name)
        if match is None:
            allowed = "<sublayer>.bottleneck.down.weight and the like"
            problems.append(Problem("not a tensor of a bottleneck adapter", str(weights), found=name, allowed=allowed))
        else:
            found.setdefault(match["sublayer"], set()).add(name.removeprefix(f"{match['sublayer']}.bottleneck."))
    for sublayer, parts in found.items():
        lacking = [part for part in PARTS if part not in parts]
        if lacking:
            problems.append(Problem(f"{sublayer}.bottleneck lacks {', '.join(lacking)}", str(weights)))
    if problems:
        raise BadInput(problems)
    unknown = {key: raw[key] for key in sorted(raw.keys() - given.keys() - set(ABOUT))}
    listed = ", ".join(f"{key}={value!r}" for key, value in unknown.items())
    note = f"{folder / CONFIG}: settings that are not known here and are passed over: {listed}"
    return Saved(options, tensors, [note] if unknown else [])


def _card(base_model_name: str, data: str, method: str, task: str) -> str:
    """A README.md with the hub's front matter; parts that are empty are left out."""
    reward = task == SEQ_CLS
    front = f"base_model: {json.dumps(base_model_name, ensure_ascii=False)}\n"
    front += f"pipeline_tag: text-{'classification' if reward else 'generation'}\n"
    front += "tags:\n- bottleneck-adapter\n- shikomi\n"
    title = f"# A {'reward model (bottleneck adapter)' if reward else 'bottleneck adapter'} for {base_model_name}\n"
    lines = [f"---\n{front}---\n", title, f"- Base model: {base_model_name}"]
    lines += [f"- {label}: {text}" for label, text in (("Data", data), ("Method", method)) if text]
    use = "eval FOLDER pairs.jsonl" if reward else 'generate FOLDER "text"'
    lines.append(f"\nUse it with `shikomi {use}`.\n")
    return "\n".join(lines)
