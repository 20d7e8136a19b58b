"""What several tensors become together: weighted sums, TIES and DARE, and the best approximation of low rank."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Settings(NamedTuple):
    """What the methods that drop entries are given."""

    density: float
    majority_sign_method: str
    generator: torch.Generator

    def every(self, tensor: Tensor) -> Tensor:
        """Every entry."""
        return tensor

    def largest(self, tensor: Tensor) -> Tensor:
        """TIES' trim (Yadav et al. 2023, arXiv:2306.01708, section 4.1): the entries of the largest magnitude."""
        if self.density == 1:
            return tensor
        kept = tensor.abs().flatten().topk(int(self.density * tensor.numel())).indices
        mask = torch.zeros(tensor.numel()).index_fill_(0, kept, 1)
        return tensor * mask.view(tensor.shape)

    def random(self, tensor: Tensor) -> Tensor:
        """DARE (Yu et al. 2023, arXiv:2311.03099, eq. 3): each entry with the chance `density`, the mean kept."""
        if self.density == 1:
            return tensor
        chances = torch.full_like(tensor, self.density)
        return tensor * torch.bernoulli(chances, generator=self.generator) / self.density

    def summed(self, tensors: Tensor, weights: Tensor) -> Tensor:
        """The weighted sum over the first dimension."""
        return (tensors * weights).sum(0)

    def elected(self, tensors: Tensor, weights: Tensor) -> Tensor:
        """TIES' sign election and disjoint merge (arXiv:2306.01708, section 4.2 and 4.3), with weights as in PEFT.

        The sign of an entry is that of the sum of the unweighted values (`total`) or of their signs (`frequency`); the
        weighted values that have it are averaged. No sign at all counts as plus.
        """
        votes = tensors.sum(0) if self.majority_sign_method == "total" else tensors.sign().sum(0)
        agrees = tensors.sign() == torch.where(votes >= 0, 1, -1)
        return (tensors * weights * agrees).sum(0) / agrees.sum(0).clamp_min(1)


Keep = Callable[[Settings, Tensor], Tensor]
Join = Callable[[Settings, Tensor, Tensor], Tensor]
RULES: dict[str, tuple[Keep, Join]] = {
    "linear": (Settings.every, Settings.summed),
    "ties": (Settings.largest, Settings.elected),
    "dare_linear": (Settings.random, Settings.summed),
    "dare_ties": (Settings.random, Settings.elected),
    "magnitude_prune": (Settings.largest, Settings.summed),
}


def merged(rule: str, settings: Settings, tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Tensors of one shape (rows, columns) as one, by a name of RULES."""
    keep, join = RULES[rule]
    kept = torch.stack([keep(settings, tensor) for tensor in tensors])  # (adapters, rows, columns)
    return join(settings, kept, torch.tensor(list(weights))[:, None, None])


def svd(delta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """V^T (k, in), S (k,) and U (out, k) of a matrix (out, in)."""
    u, s, v = torch.linalg.svd(delta, full_matrices=False)
    return v, s, u


def product_svd(b: Tensor, a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """V^T, S and U of b a, b (out, k) and a (k, in), in fp64; nothing of size (out, in) is made."""
    q_b, r_b = torch.linalg.qr(b.double())
    q_a, r_a = torch.linalg.qr(a.double().t())
    v, s, u = svd(r_b @ r_a.t())
    return v @ q_a.t(), s, q_b @ u
