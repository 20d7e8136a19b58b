"""The tensors of an adapter's file, checked against those of an adapter on a model."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from shikomi.errors import BadInput, Problem


def take_over(mine: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor], source: str) -> None:
    """Copies the tensors of the file `source` into `mine`; raises BadInput for names or shapes that do not fit."""
    problems = [Problem(f"the adapter lacks {name}", source) for name in sorted(mine.keys() - tensors.keys())]
    for name in sorted(tensors.keys() - mine.keys()):
        problems.append(Problem(f"the adapter has {name}, which this model has no place for", source))
    for name in sorted(mine.keys() & tensors.keys()):
        found, want = tuple(tensors[name].shape), tuple(mine[name].shape)
        if found != want:
            problems.append(Problem(f"{name} has the wrong shape", source, found=str(found), allowed=str(want)))
    if problems:
        raise BadInput([*problems[:10], Problem("is this an adapter for another base model?", source)])
    with torch.no_grad():
        for name, parameter in mine.items():
            parameter.copy_(tensors[name])
