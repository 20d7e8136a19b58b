"""How much memory this process and its children have used."""

import resource
import sys

import torch


def peak_memory_bytes() -> int:
    """Peak resident bytes of this process plus the largest finished child."""
    unit = 1 if sys.platform == "darwin" else 1024
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    return (own + children) * unit


def peak_device_memory_bytes(device: torch.device) -> int | None:
    """Bytes that the allocator of a CUDA device reserved at most; None elsewhere."""
    return torch.cuda.max_memory_reserved(device) if device.type == "cuda" else None
