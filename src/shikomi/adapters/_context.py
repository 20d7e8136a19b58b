"""Adapters on the context: virtual tokens before every sequence, kept beside a model that they do not touch."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from shikomi.adapters._adapter import Context
from shikomi.errors import BadInput, Problem

if TYPE_CHECKING:
    from shikomi.adapters.prefix import Prefix
    from shikomi.adapters.prompt import Prompt

SAVED = "prompt_embeddings"  # what PEFT calls the one tensor of its file


class Virtual(Context, Protocol):
    """Virtual tokens and what is trained of them."""

    def own(self) -> dict[str, nn.Parameter]:
        """Trained parameters by their names in a checkpoint."""

    def flat(self) -> Tensor:
        """The tensor of PEFT's file: a row for each virtual token."""


@dataclass
class OnContext:
    """What an adapter put before every sequence of a model."""

    options: "Prompt | Prefix"
    virtual: Virtual
    config: dict[str, Any]  # fields of PEFT's config
    enabled: bool = True

    @property
    def context(self) -> Context | None:
        return self.virtual if self.enabled else None

    def parameters(self) -> dict[str, nn.Parameter]:
        """Trained parameters: `prompt_embeddings`, or with a projection the parts that make them."""
        return self.virtual.own()

    def fixed(self) -> dict[str, Tensor]:
        return {}

    def added(self) -> int:
        return sum(p.numel() for p in self.parameters().values())

    def export(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Fields of PEFT's config, and its one tensor."""
        return self.config, {SAVED: self.virtual.flat().detach()}

    def load(self, tensors: dict[str, Tensor], source: str) -> None:
        """Takes over the virtual tokens of a file; raises BadInput for names or a shape that do not fit this model."""
        mine = self.parameters()
        if mine.keys() != tensors.keys():
            found = ", ".join(sorted(tensors))
            raise BadInput([Problem("not the virtual tokens of this adapter", source, None, found, ", ".join(mine))])
        for name, parameter in mine.items():
            if parameter.shape != tensors[name].shape:
                found, want = str(tuple(tensors[name].shape)), str(tuple(parameter.shape))
                fix = "is this an adapter for another base model?"
                raise BadInput([Problem(f"{name} has the wrong shape", source, None, found, want, fix)])
        with torch.no_grad():
            for name, parameter in mine.items():
                parameter.copy_(tensors[name])

    @contextlib.contextmanager
    def off(self) -> Iterator[None]:
        """Within: no virtual tokens."""
        self.enabled = False
        try:
            yield
        finally:
            self.enabled = True

    def bind_dropout(self, key: int | None) -> None:
        """Nothing is dropped out."""


def first_of(settings: dict[str, Any], *names: str) -> int | None:
    """The value of the first of these keys that a model's configuration has."""
    return next((int(settings[name]) for name in names if settings.get(name) is not None), None)
