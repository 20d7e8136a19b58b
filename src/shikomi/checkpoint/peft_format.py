"""Adapters on disk exactly as PEFT 0.21 has them: adapter_config.json and adapter_model.safetensors.

Virtual tokens are one tensor, `prompt_embeddings`: (n, H), or for a prefix (n, layers * 2 * kv heads * D). Of LoRA the
tensor names are `base_model.model.<module path>.` and then `lora_A.weight` (r, in), `lora_B.weight` (out, r),
`lora_embedding_A` (r, rows), `lora_embedding_B` (columns, r), or `weight` and `bias` for what is trained whole.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from shikomi.checkpoint.files import TEMPORARY, replace_file, saving
from shikomi.checkpoint.peft_config import CONFIG, adapter_config, read_config
from shikomi.checkpoint.tensors import read_safetensors, write_safetensors
from shikomi.errors import BadInput, Problem

WEIGHTS, CARD = "adapter_model.safetensors", "README.md"
PREFIX = "base_model.model."
VIRTUAL = "prompt_embeddings"
KINDS = {"LORA": "A LoRA adapter", "PREFIX_TUNING": "A tuned prefix", "PROMPT_TUNING": "A tuned prompt"}

_LORA = re.compile(r"(?P<module>.+)\.(lora_[AB]\.weight|lora_embedding_[AB]|lora_magnitude_vector)")
_WITH_NAME = re.compile(r"\.(lora_(?:embedding_)?[AB]|lora_magnitude_vector)\.default(?=\.weight$|$)")


class Adapter(NamedTuple):
    """`config` has every field PEFT writes, `tensors` are on the CPU as saved, `notes` say what was passed over."""

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    notes: list[str]


def lora_modules(tensors: Mapping[str, Tensor]) -> list[str]:
    """Sorted paths in the base model of the modules that have an A and a B."""
    matches = (_LORA.fullmatch(name) for name in tensors)
    return sorted({match["module"].removeprefix(PREFIX) for match in matches if match})


def save_adapter(
    folder: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    base_model_name: str,
    *,
    dtype: Literal["bf16", "fp32"] = "bf16",
    revision: str | None = None,
    data: str = "",
    method: str = "",
) -> None:
    """Writes adapter_config.json, adapter_model.safetensors and a model card; PEFT loads the folder.

    config: PEFT's names; its `peft_type` says the method, without it LoRA. tensors: PEFT's names, without an adapter
    name. data, method: a line of the card each.
    Raises ValueError for a name that is not PEFT's, TryAgain on a full disk.
    """
    lora = config.get("peft_type", "LORA") == "LORA"
    if lora:
        odd = [name for name in tensors if not name.startswith(PREFIX) or _WITH_NAME.search(name)]
    else:
        odd = [name for name in tensors if name != VIRTUAL]
    if odd:
        raise ValueError(f"not a name in PEFT's format: {odd[0]}")
    target = {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
    saved = {name: t.detach().to(target) if t.is_floating_point() else t for name, t in tensors.items()}
    full = adapter_config(config, lora_modules(saved), base_model_name, revision)
    with saving("the adapter", folder):
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / (TEMPORARY + WEIGHTS)
        write_safetensors(temporary, saved)
        temporary.rename(folder / WEIGHTS)
        replace_file(folder / CONFIG, json.dumps(full, indent=2, sort_keys=True).encode())
        replace_file(folder / CARD, model_card(base_model_name, data, method, full["peft_type"]).encode())


def model_card(base_model_name: str, data: str = "", method: str = "", peft_type: str = "LORA") -> str:
    """A README.md with the hub's front matter; parts that are empty are left out."""
    front = f"base_model: {json.dumps(base_model_name, ensure_ascii=False)}\nlibrary_name: peft\n"
    front += f"pipeline_tag: text-generation\ntags:\n- {peft_type.lower().replace('_', '-')}\n- shikomi\n"
    title = f"# {KINDS[peft_type]} for {base_model_name}\n"
    lines = [f"---\n{front}---\n", title, f"- Base model: {base_model_name}"]
    lines += [f"- {label}: {text}" for label, text in (("Data", data), ("Method", method)) if text]
    lines.append(
        '\nUse it with `shikomi generate FOLDER "text"`, or with PEFT:\n\n```python\n'
        "from peft import AutoPeftModelForCausalLM\n\n"
        'model = AutoPeftModelForCausalLM.from_pretrained("FOLDER")\n```\n'
    )
    return "\n".join(lines)


def load_adapter(folder: Path) -> Adapter:
    """Reads an adapter that PEFT (any version) or this package saved.

    Raises BadInput, every problem at once: files absent, broken or pickled, an unknown method, settings under
    which A and B mean something else, names that are not an adapter's.
    """
    config, notes = read_config(folder)
    weights = folder / WEIGHTS
    if not weights.is_file():
        raise BadInput([_no_weights(folder)])
    if config["peft_type"] != "LORA":
        return Adapter(config, _virtual_tokens(weights, config), notes)
    tensors: dict[str, Tensor] = {}
    problems = []
    for name, tensor in read_safetensors(weights).items():
        plain = _WITH_NAME.sub(r".\1", name)
        known = plain.endswith((".weight", ".bias")) or _LORA.fullmatch(plain)
        if not (plain.startswith(PREFIX) and known):
            allowed = f"{PREFIX}<module>.lora_A.weight and the like"
            problems.append(Problem("not a tensor of a LoRA adapter", str(weights), found=name, allowed=allowed))
        tensors[plain] = tensor
    problems += [
        Problem(f"has one of A and B without the other: {path}", str(weights))
        for path in lora_modules(tensors)
        if _pair(tensors, path) is None
    ]
    if problems:
        raise BadInput(problems)
    return Adapter(config, tensors, notes)


def _virtual_tokens(weights: Path, config: Mapping[str, Any]) -> dict[str, Tensor]:
    tensors = read_safetensors(weights)
    if tensors.keys() != {VIRTUAL}:
        found, what = ", ".join(sorted(tensors)), "not the tensors of virtual tokens"
        raise BadInput([Problem(what, str(weights), found=found, allowed=VIRTUAL)])
    rows, tokens = len(tensors[VIRTUAL]), config["num_virtual_tokens"]
    if rows != tokens:
        what = f"{VIRTUAL} has another number of rows than {CONFIG} has num_virtual_tokens"
        raise BadInput([Problem(what, str(weights), found=str(rows), allowed=str(tokens))])
    return tensors


def _pair(tensors: Mapping[str, Tensor], path: str) -> tuple[Tensor, Tensor] | None:
    for a, b in (("lora_A.weight", "lora_B.weight"), ("lora_embedding_A", "lora_embedding_B")):
        names = (f"{PREFIX}{path}.{a}", f"{PREFIX}{path}.{b}")
        if all(name in tensors for name in names):
            return tensors[names[0]], tensors[names[1]]
    return None


def _no_weights(folder: Path) -> Problem:
    pickled = sorted(path.name for path in folder.glob("adapter_model.*") if path.suffix in (".bin", ".pt", ".pth"))
    if pickled:
        return Problem(
            what="the weights are a pickle, which can run code and is not read",
            file=str(folder / pickled[0]),
            allowed=WEIGHTS,
            fix="load it with PEFT where you trust it, and save it again with `save_pretrained(folder)`",
        )
    return Problem(f"an adapter folder without {WEIGHTS}", str(folder), fix="copy or download it completely")
