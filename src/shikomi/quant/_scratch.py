"""One reused buffer per dtype for weights that are widened or dequantized at each use."""

import torch
from torch import Tensor

_buffers: dict[tuple[torch.dtype, torch.device], Tensor] = {}


def scratch(numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A flat buffer that the next call overwrites.

    Only for use inside autograd Functions, where nothing keeps the result: autograd cannot see the overwriting.
    """
    key = (dtype, device)
    buffer = _buffers.get(key)
    if buffer is None or buffer.numel() < numel:
        buffer = _buffers[key] = torch.empty(numel, dtype=dtype, device=device)
    return buffer[:numel]
