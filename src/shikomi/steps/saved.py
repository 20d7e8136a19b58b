"""Adapters on disk as options and tensors: what a run continues, and what answers or gives values."""

from dataclasses import fields
from pathlib import Path
from typing import Any

from torch import Tensor

from shikomi.adapters.dora import Dora
from shikomi.adapters.lora import Lora
from shikomi.adapters.prefix import Prefix
from shikomi.adapters.prompt import Prompt
from shikomi.checkpoint.bottleneck_format import is_bottleneck, load_bottleneck
from shikomi.checkpoint.peft_config import without_classifiers
from shikomi.checkpoint.peft_format import BESIDE_VIRTUAL, SCORES, load_adapter
from shikomi.errors import BadInput, Problem
from shikomi.model.heads import SCORE
from shikomi.model.language_model import LanguageModel
from shikomi.model.task import SEQ_CLS


def saved_adapter(folder: Path) -> tuple[Any, dict[str, Tensor], list[str]]:
    """Options, tensors and notes of an adapter folder, in PEFT's format or our own. Raises BadInput.

    The scalar head of a reward model is `score.weight` among the tensors.
    """
    if is_bottleneck(folder):
        return load_bottleneck(folder)
    config, tensors, notes = load_adapter(folder)
    if config["task_type"] == SEQ_CLS:
        config, name = without_classifiers(config), SCORES.get(config["peft_type"], BESIDE_VIRTUAL)
        if name not in tensors:
            found = ", ".join(sorted(tensors)[:3])
            raise BadInput(
                [Problem(f"an adapter with task_type {SEQ_CLS} and without {name}", str(folder), found=found)]
            )
        tensors = {SCORE if n == name else n: tensor for n, tensor in tensors.items()}
    return adapter_of(config), tensors, notes


def adapter_of(config: dict[str, Any]) -> Any:
    """The options of a saved adapter, from PEFT's config."""
    tokens = int(config.get("num_virtual_tokens") or 0)
    if config["peft_type"] == "PROMPT_TUNING":
        start = config["prompt_tuning_init"]
        return Prompt(tokens, start, config["prompt_tuning_init_text"] if start == "TEXT" else None)
    if config["peft_type"] == "PREFIX_TUNING":  # the file has what the projection made, not the projection
        return Prefix(tokens, init_weights=config["init_weights"])
    kind = Dora if config.get("use_dora") else Lora
    return kind(**{f.name: config[f.name] for f in fields(kind) if config.get(f.name) is not None})


def put_in(lm: LanguageModel, tensors: dict[str, Tensor], source: str) -> None:
    """Gives a model's adapter and scalar head the saved tensors. Raises BadInput where they do not fit.

    A policy's adapter has no scalar head: the model's own stays, fresh or that of its base.
    """
    rest = {name: tensor for name, tensor in tensors.items() if name != SCORE}
    if lm.attached is not None:
        lm.attached.load(rest, source)
    if lm.scalar is not None and SCORE in tensors:
        lm.scalar.load(tensors[SCORE], source)
