"""After the last step: the final adapter or model, what is compared, and what the run says of itself."""

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from shikomi.adapters.bottleneck import Bottleneck
from shikomi.checkpoint.bottleneck_format import save_bottleneck
from shikomi.checkpoint.classifier import pad_with
from shikomi.checkpoint.merge import merge_weights, save_model
from shikomi.checkpoint.peft_format import save_adapter
from shikomi.model.files import ModelFiles
from shikomi.model.language_model import LanguageModel
from shikomi.recipe.schema import Recipe
from shikomi.steps.memory import peak_device_memory_bytes, peak_memory_bytes
from shikomi.train.state import State

PACKAGES = ("shikomi", "torch", "transformers", "tokenizers", "safetensors", "numpy")


def save_final(lm: LanguageModel, recipe: Recipe, files: ModelFiles, folder: Path, how: str) -> None:
    """`final/` (or a stage's folder): an adapter in PEFT's format, or our own where it has none, or a whole model."""
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[recipe.save_dtype]
    if lm.rebased:
        merge_weights(lm, torch.float32)
    if lm.attached is None or lm.rebased:
        save_model(lm, folder, dtype)
        return
    config, tensors = lm.attached.export()
    sources = ", ".join(Path(s.path).name for s in recipe.data.train)
    moved = {name: tensor.cpu() for name, tensor in tensors.items()}
    about = (folder, config, moved, files.origin, recipe.save_dtype, files.revision, sources, how)
    score, pad = (None, None) if lm.scalar is None else (lm.scalar.weight.detach().cpu(), pad_with(lm))
    if isinstance(lm.attached.options, Bottleneck):
        save_bottleneck(*about, score)
    else:
        save_adapter(*about, score, pad)
    lm.tokenizer.save_pretrained(str(folder))


def stage_result(name: str, state: State, before: State) -> dict[str, Any]:
    """What one finished stage did, from the states after and before it."""
    return {
        "name": name,
        "steps": state.global_step - before.global_step,
        "trained_tokens": state.trained_tokens - before.trained_tokens,
        "total_tokens": state.total_tokens - before.total_tokens,
        "training_seconds": round(state.training_seconds - before.training_seconds, 3),
        "final_loss": state.last_loss,
        "best": state.best,
        "best_step": state.best_step,
        "stopped_early": state.stopped_early,
        "micro_batch_tokens": state.micro_batch_tokens,
    }


def result(
    lm: LanguageModel,
    recipe: Recipe,
    state: State,
    wall_seconds: float,
    data: dict[str, Any],
    planned: dict[str, Any],
    evaluation: dict[str, Any] | None,
) -> dict[str, Any]:
    """result.json of a finished run."""
    return {
        "finished": True,
        "model": recipe.model,
        "task": "policy" if lm.scalar is None else "reward",
        "adapter": lm.attached.options.name if lm.attached is not None else recipe.adapter.name,
        "stages": state.finished_stages,
        "steps": state.global_step,
        "wall_seconds": round(wall_seconds, 3),
        "training_seconds": round(state.training_seconds, 3),
        "trained_tokens": state.trained_tokens,
        "total_tokens": state.total_tokens,
        "tokens_per_second": state.total_tokens / max(state.training_seconds, 1e-9),
        "peak_memory_bytes": peak_memory_bytes(),
        "peak_device_memory_bytes": peak_device_memory_bytes(lm.device),
        "trainable_parameters": lm.trainable_parameters,
        "total_parameters": lm.total_parameters,
        "final_loss": state.last_loss,
        "device": lm.device.type,
        "storage_dtype": str(lm.dtypes.storage).removeprefix("torch."),
        "arithmetic_dtype": str(lm.dtypes.arithmetic).removeprefix("torch."),
        "path": lm.path,
        "path_reason": lm.path_reason,
        "data": data,
        "planned": planned,
        "evaluation": evaluation,
        "versions": {name: _version(name) for name in PACKAGES},
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
