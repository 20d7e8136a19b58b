"""Which adapter a stage trains, and what becomes of the one before: trained on, kept frozen, or merged."""

from typing import Any

import torch
from torch import Tensor

from shikomi.adapters._attach import OnLayers
from shikomi.adapters._modules import LoraEmbedding
from shikomi.adapters.dora import Dora
from shikomi.checkpoint.merge import merge_weights
from shikomi.errors import BadInput, Problem
from shikomi.model.language_model import LanguageModel
from shikomi.model.load import put_on
from shikomi.recipe import build
from shikomi.recipe.schema import Recipe, Stage
from shikomi.steps.hooks import PREVIOUS, kept_tensors


def check_stages(recipe: Recipe, first: Any) -> None:
    """Refuses, before anything is computed, stages whose adapters cannot follow each other. Raises BadInput.

    `first` is the adapter of the first stage.
    """
    before = first
    for number, stage in enumerate(recipe.stages):
        where = f"stages.{number}"
        if number == 0:
            if stage.adapter is not None or stage.previous_adapter != "continue":
                fix = "the first stage's adapter is the recipe's `adapter`"
                raise BadInput([Problem(f"{where}: there is no stage before the first", fix=fix)])
            continue
        after = adapter_of_stage(recipe, stage)
        if stage.previous_adapter == "continue":
            if stage.adapter is not None and after != before:
                fix = f"{where}.previous_adapter: freeze, or merge"
                raise BadInput([Problem(f"{where}.adapter: one adapter cannot continue as another", fix=fix)])
            continue
        _check(where, stage.previous_adapter, before, after)
        before = after


def _check(where: str, how: str, before: Any, after: Any) -> None:
    if not before.capabilities.mergeable:
        fix = "previous_adapter: continue" if before == after else "two runs, the second with its own `model`"
        what = f"{where}: adapter: {before.name} of the stage before can be neither merged nor kept under another"
        raise BadInput([Problem(what, fix=fix)])
    if not (after.capabilities.mergeable or after.name == "full"):
        what = f"{where}: adapter: {after.name} over an earlier adapter would be no adapter for the recipe's model"
        raise BadInput([Problem(what, allowed="lora, dora, full", fix="merge the first in a run of its own")])
    plain = not isinstance(before, Dora) and before.bias == "none" and not before.modules_to_save
    if how == "freeze" and not (plain and after.capabilities.mergeable):
        what = f"{where}: only a LoRA adapter without biases or modules_to_save can stay frozen, under LoRA or DoRA"
        raise BadInput([Problem(what, found=f"{before.name}, then {after.name}", fix="previous_adapter: merge")])


def rebuild(lm: LanguageModel, recipe: Recipe, stage: int, saved: dict[str, Tensor]) -> None:
    """Brings a fresh model to the beginning of a stage as it was, from what a checkpoint keeps of earlier ones."""
    for index in range(1, stage + 1):
        if recipe.stages[index].previous_adapter == "continue":
            continue
        assert lm.attached is not None
        prefix = f"{PREVIOUS}.{len(lm.earlier)}."
        for name, tensor in kept_tensors(lm.attached).items():
            tensor.copy_(saved[prefix + name])
        begin_stage(lm, recipe, index)


def adapter_of_stage(recipe: Recipe, stage: Stage) -> Any:
    """The adapter options of a stage."""
    return build("adapters", stage.adapter or recipe.adapter)


def begin_stage(lm: LanguageModel, recipe: Recipe, index: int) -> str | None:
    """Puts the adapter of stage `index` on a model that has that of the stage before; returns a line for the user."""
    stage = recipe.stages[index]
    if index == 0 or stage.previous_adapter == "continue":
        return None
    before = lm.attached
    assert isinstance(before, OnLayers)
    lm.earlier.append({name: t.detach().clone() for name, t in kept_tensors(before).items()})
    merges = stage.previous_adapter == "merge"
    frozen = {} if merges else {path: (a.clone(), b.clone()) for path, (a, b) in before.active().items()}
    merged = before.whole() if merges else before.merged
    embeddings = any(isinstance(module, LoraEmbedding) for module in before.lora.values())
    exact = not (isinstance(before.options, Dora) or before.copies or before.biases or embeddings)
    if merges:
        merge_weights(lm, torch.float32)
    before.take_off(lm.model)
    for parameter in lm.model.parameters():
        parameter.requires_grad_(False)
    put_on(lm, adapter_of_stage(recipe, stage), recipe.seed + index, recipe.max_length, frozen)
    after = lm.attached
    if isinstance(after, OnLayers):
        after.merged = {path: (a.clone(), b.clone()) for path, (a, b) in merged.items()}
    how = "merged into the weights in fp32" if merges else "kept frozen"
    lm.rebased = lm.rebased or not exact or (isinstance(after, OnLayers) and isinstance(after.options, Dora))
    return f"stage {stage.name}: the adapter of the stage before is {how}"
