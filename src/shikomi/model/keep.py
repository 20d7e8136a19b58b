"""Where fused layers keep what their backward reads.

On a CPU that lies in blocks of its own, apart from what comes and goes: among temporaries it would hold their pages,
and the process would take up to half as much again as is in use.
"""

from __future__ import annotations

import mmap

import torch
from torch import Tensor

BLOCK = 32 << 20  # bytes; pages that are not written to take no memory


class Keep:
    """Copies in the storage dtype, laid one behind the other in blocks that are given back with their last copy."""

    def __init__(self, storage: torch.dtype, apart: bool) -> None:
        self._storage = storage
        self._apart = apart
        self._free = torch.empty(0, dtype=storage)

    def __call__(self, x: Tensor, copy: bool = False) -> Tensor:
        """x in the storage dtype; x itself where it has that already, unless `copy`."""
        if not self._apart or x.device.type != "cpu" or (x.dtype == self._storage and not copy):
            return x.to(self._storage, copy=copy)
        count = x.numel()
        if self._free.numel() < count:
            pages = mmap.mmap(-1, max(count * self._storage.itemsize, BLOCK))
            self._free = torch.frombuffer(pages, dtype=self._storage)
        block = self._free.data  # autograd counts writes to each copy by itself
        self._free = block[count:]
        return block[:count].view(x.shape).copy_(x)
