"""What stands in a model in the place of an embedding with an update, or of a module that is trained whole."""

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shikomi.quant._linear import Base, Gradients, LowRank, PlainLinear


class LoraEmbedding(nn.Module):
    """An embedding with a low-rank update: W[ids] + scaling * B A[:, ids]; A (r, vocabulary) starts at zero."""

    def __init__(self, base: nn.Embedding, r: int, scaling: float, generator: torch.Generator):
        super().__init__()
        self.inner, self.scaling, self.enabled = base, scaling, True
        self.key: int | None = None  # embeddings have no dropout
        self.lora_embedding_A = nn.Parameter(torch.zeros(r, base.num_embeddings, device=base.weight.device))
        b = torch.empty(base.embedding_dim, r).normal_(generator=generator)
        self.lora_embedding_B = nn.Parameter(b.to(base.weight.device))

    @property
    def weight(self) -> Tensor:
        return self.inner.weight

    def own(self) -> dict[str, nn.Parameter]:
        """The adapter's parameters by PEFT's names."""
        return {"lora_embedding_A": self.lora_embedding_A, "lora_embedding_B": self.lora_embedding_B}

    def forward(self, ids: Tensor) -> Tensor:
        y = self.inner(ids)
        if not self.enabled:
            return y
        a, b = self.lora_embedding_A.to(y.dtype), self.lora_embedding_B.to(y.dtype)
        return y + F.linear(F.embedding(ids, a.t()), b) * self.scaling


class TrainedCopy(nn.Module):
    """A module that is trained whole (`modules_to_save`) beside the one that was loaded."""

    def __init__(self, original: nn.Module):
        super().__init__()
        self.original = original
        self.copy = copy.deepcopy(original)
        self.enabled = True
        for parameter in self.copy.parameters():
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)

    @property
    def active(self) -> nn.Module:
        return self.copy if self.enabled else self.original

    @property
    def weight(self) -> Tensor:
        return self.active.weight  # type: ignore[return-value]

    def forward(self, *args, **kwargs):
        return self.active(*args, **kwargs)

    # Something linear, where the module is

    @property
    def base(self) -> Base:
        assert isinstance(self.active, PlainLinear)
        return self.active.base

    @property
    def in_features(self) -> int:
        return self.base.in_features

    @property
    def out_features(self) -> int:
        return self.base.out_features

    @property
    def needs_input(self) -> bool:
        return self.base.needs_input

    needs_output = False

    def trained(self) -> list[nn.Parameter]:
        return self.base.trained()

    def update(self) -> LowRank | None:
        return None

    def factor(self) -> Tensor | None:
        return None

    def own_gradients(self, of: Gradients) -> list[Tensor]:
        return []
