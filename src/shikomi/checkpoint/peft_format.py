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
from shikomi.checkpoint.peft_config import CONFIG, MODULE, adapter_config, read_config
from shikomi.checkpoint.tensors import read_safetensors, write_safetensors
from shikomi.errors import BadInput, Problem
from shikomi.model.heads import SCORE
from shikomi.model.task import SEQ_CLS

WEIGHTS, CARD = "adapter_model.safetensors", "README.md"
PREFIX = "base_model.model."
VIRTUAL = "prompt_embeddings"
SCORES = {"LORA": f"{PREFIX}{SCORE}"}  # the scalar head of a reward model by method; elsewhere BESIDE_VIRTUAL
BESIDE_VIRTUAL = f"base_model.{SCORE}"
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
    dtype: Literal["bf16", "fp32"] = "bf16",
    revision: str | None = None,
    data: str = "",
    method: str = "",
    score: Tensor | None = None,
    pad_token_id: int | None = None,
) -> None:
    """Writes adapter_config.json, adapter_model.safetensors and a model card; PEFT loads the folder.

    config: PEFT's names; its `peft_type` says the method, without it LoRA. tensors: PEFT's names, without an adapter
    name. data, method: a line of the card each. score (1, H): the scalar head, which makes it a reward model;
    pad_token_id: what its card says of padding.
    Raises ValueError for a name that is not PEFT's, TryAgain on a full disk.
    """
    kind = config.get("peft_type", "LORA")
    lora = kind == "LORA"
    if score is not None:
        tensors = {**tensors, SCORES.get(kind, BESIDE_VIRTUAL): score}
        saved_whole = [*(config.get("modules_to_save") or []), MODULE]
        config = {**config, "task_type": SEQ_CLS, "modules_to_save": saved_whole}
    if lora:
        odd = [name for name in tensors if not name.startswith(PREFIX) or _WITH_NAME.search(name)]
    else:
        odd = [name for name in tensors if name not in (VIRTUAL, BESIDE_VIRTUAL)]
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
        about = (base_model_name, data, method, full["peft_type"])
        card = model_card(*about) if score is None else reward_card(*about, pad_token_id)
        replace_file(folder / CARD, card.encode())


def _beginning(base_model_name: str, data: str, method: str, peft_type: str, task: str, title: str) -> list[str]:
    """Front matter, title and facts of a card; parts that are empty are left out."""
    front = f"base_model: {json.dumps(base_model_name, ensure_ascii=False)}\nlibrary_name: peft\n"
    front += f"pipeline_tag: {task}\ntags:\n- {peft_type.lower().replace('_', '-')}\n- shikomi\n"
    lines = [f"---\n{front}---\n", f"# {title} for {base_model_name}\n", f"- Base model: {base_model_name}"]
    return lines + [f"- {label}: {text}" for label, text in (("Data", data), ("Method", method)) if text]


def reward_card(base_model_name: str, data: str, method: str, peft_type: str, pad_token_id: int | None) -> str:
    """The README.md of a reward model."""
    title = f"A reward model ({KINDS[peft_type].split(' ', 1)[1]})"
    lines = _beginning(base_model_name, data, method, peft_type, "text-classification", title)
    pad = (
        f"model.config.pad_token_id = {pad_token_id}  # one that ends no row: the value is that of the last other token"
    )
    lines.append(
        "\nIts value of an answer is read at the last token of prompt and answer, end of turn included. Use it with "
        "`shikomi eval FOLDER pairs.jsonl` or `shikomi.open_reward_model(FOLDER).score(rows)`, or with PEFT:\n\n"
        "```python\nfrom peft import AutoPeftModelForSequenceClassification\n\n"
        'model = AutoPeftModelForSequenceClassification.from_pretrained("FOLDER", num_labels=1)\n'
        + (f"{pad}\n```\n" if pad_token_id is not None else "```\n")
    )
    return "\n".join(lines)


def model_card(base_model_name: str, data: str = "", method: str = "", peft_type: str = "LORA") -> str:
    """A README.md with the hub's front matter; parts that are empty are left out."""
    lines = _beginning(base_model_name, data, method, peft_type, "text-generation", KINDS[peft_type])
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
    wanted = [VIRTUAL, BESIDE_VIRTUAL] if config["task_type"] == SEQ_CLS else [VIRTUAL]
    if tensors.keys() != set(wanted):
        found, what = ", ".join(sorted(tensors)), "not the tensors of virtual tokens"
        raise BadInput([Problem(what, str(weights), found=found, allowed=", ".join(wanted))])
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
