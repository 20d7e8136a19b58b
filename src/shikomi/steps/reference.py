"""The reference of a stage: fixed before its first step, kept for a resume, and where it is asked for precomputed."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shikomi.checkpoint.lock import RunLock
from shikomi.checkpoint.manifest import STATE, damage, read_tensors, write_checkpoint
from shikomi.data.packing import micro_batches
from shikomi.data.pairs import PackedPreferences, pack_pairs, pack_thumbs
from shikomi.data.store import Store
from shikomi.errors import BadInput, Problem
from shikomi.model.language_model import LanguageModel
from shikomi.model.reference import OFF, START, Reference, copies, taken
from shikomi.progress import Progress
from shikomi.recipe.schema import Recipe, Stage
from shikomi.train.prepare import Live

VERSION = 1  # of precomputed references; part of their key
CHUNK = 256  # rows that are sorted by length together while a reference is precomputed


def fix_reference(lm: LanguageModel, folder: Path, fresh: bool, begun: bool) -> str:
    """Fixes the reference of a stage as the model is now; where the stage has begun, as `folder` kept it.

    `fresh`: the stage's adapter was never trained. Returns a line for the user. Raises BadInput where a stage that has
    begun has lost its reference.
    """
    if not begun:
        lm.fixed = taken(lm.attached, lm.trainable(), fresh)
        write_checkpoint(folder, {"reference": lm.fixed.tensors}, {"step": 0, "how": lm.fixed.how})
        return _told(lm, lm.fixed)
    wrong = damage(folder)
    if wrong is not None:
        fix = "the stage cannot go on without it: train anew with another output_dir"
        raise BadInput([Problem("the reference of this stage is lost", str(folder), found=wrong, fix=fix)])
    how = json.loads((folder / STATE).read_bytes())["how"]
    saved = read_tensors(folder, "reference")
    tensors = copies(lm.trainable()) if how == START else {}
    for name, tensor in tensors.items():
        tensor.copy_(saved[name])
    lm.fixed = Reference(how, tensors)
    return _told(lm, lm.fixed)


def _told(lm: LanguageModel, reference: Reference) -> str:
    if reference.how == OFF:
        virtual = lm.context is not None
        rest = ", which has no virtual tokens: rewards are not 0 at the first step" if virtual else ""
        return f"reference: the model with the adapter off{rest}"
    what = "trained weights" if lm.attached is None else "adapter as the stage found it"
    return f"reference: a frozen copy of the {what} ({reference.bytes / 1e6:,.1f} MB)"


class Precomputed:
    """log p_ref of every completion of a store, computed once: `logp` of all completions, one after the other."""

    def __init__(self, logp: Tensor, offsets: Tensor, completions: int):
        self.logp, self.offsets, self.completions = logp, offsets.tolist(), completions

    def __call__(self, batches: Sequence[PackedPreferences]) -> list[Tensor]:
        return [self._of(batch).to(batch.packed.ids.device) for batch in batches]

    def _of(self, batch: PackedPreferences) -> Tensor:
        found = []
        for number, (row, length) in enumerate(zip(batch.packed.rows, batch.lengths, strict=True)):
            at = row * self.completions + number % self.completions
            piece = self.logp[self.offsets[at] : self.offsets[at + 1]]
            if len(piece) != length:
                raise ValueError(f"row {row} has {length} scored tokens, {len(piece)} are precomputed")
            found.append(piece)
        return torch.cat(found)


def precomputed(
    lm: LanguageModel, recipe: Recipe, stage: Stage, model: str, store: Store[Any], cache: Path, progress: Progress
) -> Precomputed:
    """The reference's log-probabilities of every row of a store, from the cache where they are, else computed now.

    `model` is the hash of the base. Raises TryAgain while another process computes the same.
    """
    folder = cache / _key(lm, recipe, stage, model, store.fingerprint)
    with RunLock(folder):
        made = folder / "reference"
        if damage(made) is None:
            found = read_tensors(made, "logp")
        else:
            found = _computed(lm, stage, store, progress)
            write_checkpoint(made, {"logp": found}, {"step": 0})
    return Precomputed(found["logp"], found["offsets"], store.n_parts - 1)


def _computed(lm: LanguageModel, stage: Stage, store: Store[Any], progress: Progress) -> dict[str, Tensor]:
    lengths = [completion.n_targets for row in store for completion in row.completions]
    offsets = torch.from_numpy(np.cumsum([0, *lengths]))
    logp, live, size = torch.empty(int(offsets[-1])), Live(lm), store.n_parts - 1
    pack = pack_pairs if store.kind == "pairs" else pack_thumbs
    for start in range(0, len(store), CHUNK):
        rows = [store[i] for i in range(start, min(start + CHUNK, len(store)))]
        for part in micro_batches(rows, stage.micro_batch_tokens):
            batch = pack(part, True)
            scored = live([batch])[0].cpu()
            pieces = scored.split(batch.lengths)
            for number, (row, piece) in enumerate(zip(batch.packed.rows, pieces, strict=True)):
                at = int(offsets[row * size + number % size])
                logp[at : at + len(piece)] = piece
        progress.tick(start + len(rows), len(store), "rows under the reference")
    return {"logp": logp, "offsets": offsets}


def _key(lm: LanguageModel, recipe: Recipe, stage: Stage, model: str, rows: str) -> str:
    """SHA-256 (hex) of everything that decides the reference's log-probabilities, but how they are packed."""
    assert lm.fixed is not None
    number = recipe.stages.index(stage)
    before = [spec.model_dump_json() for s in recipe.stages[:number] if (spec := s.adapter or recipe.adapter)]
    content = {
        "version": VERSION,
        "rows": rows,
        "model": [model, recipe.new_tokens, recipe.seed if recipe.new_tokens else 0],
        "numbers": [recipe.quant.model_dump(mode="json"), str(lm.dtypes), lm.device.type],
        "how": lm.fixed.how,
        "adapter": repr(lm.attached.options) if lm.attached is not None and lm.fixed.how == START else None,
        "kept": [s.previous_adapter for s in recipe.stages[1 : number + 1]],
        "tensors": _digest(lm.fixed.tensors),
        "fixed": _digest(lm.attached.fixed()) if lm.attached is not None and lm.fixed.how == START else None,
        "earlier": [before, *(_digest(tensors) for tensors in lm.earlier)] if lm.earlier else [],
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _digest(tensors: Mapping[str, Tensor]) -> str:
    sha = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        sha.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()
