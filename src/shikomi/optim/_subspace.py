"""The low-rank space of a gradient: its singular vectors, and the way there and back."""

from typing import Any

import torch
from torch import Tensor

Sides = tuple[str, ...]  # of "left", "right"; () where nothing is projected

EXACT_BELOW = 256  # rows or columns below which an exact SVD is cheaper than the sketch's overhead
WIDEST_SKETCH = 3  # the sketch pays while rank + OVERSAMPLING is at most one in so many of the rows or columns
OVERSAMPLING = 8
POWER_ITERATIONS = 2


def sides_of(m: int, n: int, rank: int, proj_type: str) -> Sides:
    """Which sides of a gradient (m, n) are projected to `rank`; () where the rank is full already.

    As in the reference implementation: std projects the shorter side, reverse_std the longer one.
    """
    if rank >= min(m, n):
        return ()
    if proj_type == "full":
        return ("left", "right")
    if proj_type == "std":
        return ("right",) if m >= n else ("left",)
    if proj_type == "reverse_std":
        return ("left",) if m >= n else ("right",)
    return (proj_type,)


def low_rank_shape(m: int, n: int, rank: int, sides: Sides) -> tuple[int, int]:
    """Shape of a projected gradient: (r, n), (m, r) or (r, r)."""
    return (rank if "left" in sides else m, rank if "right" in sides else n)


def subspace(grad: Tensor, rank: int, sides: Sides, seed: int) -> dict[str, Tensor]:
    """The leading `rank` singular vectors of grad (m, n): left (m, r) and right (r, n), whichever `sides` names.

    The exact SVD where the matrix is small or the rank near full; elsewhere a randomized range finder with power
    iterations (Halko, Martinsson and Tropp 2011, arXiv:0909.4061, algorithm 4.4), a function of grad and seed alone.
    """
    short = min(grad.shape)
    if short < EXACT_BELOW or WIDEST_SKETCH * (rank + OVERSAMPLING) > short:
        u, _, vh = torch.linalg.svd(grad, full_matrices=False)
    else:
        u, vh = _sketched(grad, rank + OVERSAMPLING, seed)
    found = {"left": u[:, :rank], "right": vh[:rank]}
    return {side: found[side].clone(memory_format=torch.contiguous_format) for side in sides}


def _sketched(grad: Tensor, width: int, seed: int) -> tuple[Tensor, Tensor]:
    """Approximate leading singular vectors, (m, width) and (width, n)."""
    generator = torch.Generator().manual_seed(seed)
    sketch = torch.randn(grad.shape[1], width, generator=generator).to(grad)
    q = torch.linalg.qr(grad @ sketch).Q  # (m, width)
    for _ in range(POWER_ITERATIONS):
        q = torch.linalg.qr(grad.t() @ q).Q  # (n, width)
        q = torch.linalg.qr(grad @ q).Q  # (m, width)
    u, _, vh = torch.linalg.svd(q.t() @ grad, full_matrices=False)  # (width, n)
    return q @ u, vh


def project(grad: Tensor, space: dict[str, Any]) -> Tensor:
    """A gradient (m, n) in the coordinates of `space`: left^T G, G right^T, or both."""
    if "left" in space:
        grad = space["left"].t() @ grad
    return grad @ space["right"].t() if "right" in space else grad


def back(parameter: Tensor, update: Tensor, space: dict[str, Any], scale: float) -> None:
    """Adds scale * (left update right) to parameter (m, n), in place."""
    if "left" in space and "right" in space:
        parameter.addmm_(space["left"] @ update, space["right"], alpha=scale)
    elif "left" in space:
        parameter.addmm_(space["left"], update, alpha=scale)
    else:
        parameter.addmm_(update, space["right"], alpha=scale)
