"""Memory: what is free, what a stage will keep, what was used."""

import resource
import sys
from pathlib import Path

import torch

from shikomi.model.language_model import LanguageModel
from shikomi.recipe.schema import Stage


def peak_memory_bytes() -> int:
    """Peak resident bytes of this process plus the largest finished child."""
    unit = 1 if sys.platform == "darwin" else 1024
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * unit
    own = _kilobytes(Path("/proc/self/status"), "VmHWM:")  # ru_maxrss begins at the parent's size on Linux
    return children + (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit if own is None else own * 1024)


def own_memory_bytes() -> int:
    """Bytes that this process has resident now; 0 where that cannot be told."""
    return (_kilobytes(Path("/proc/self/status"), "VmRSS:") or 0) * 1024


def peak_device_memory_bytes(device: torch.device) -> int | None:
    """Bytes that the allocator of a CUDA device reserved at most; None elsewhere."""
    return torch.cuda.max_memory_reserved(device) if device.type == "cuda" else None


def choose_recompute(lm: LanguageModel, stage: Stage, micro_batch_tokens: int) -> None:
    """Sets in how many layers activations are computed again; auto: as few as half of the free memory allows."""
    wanted: int | str = stage.recompute
    if wanted == "auto":
        wanted = _automatic(lm, micro_batch_tokens)
    elif wanted == "none":
        wanted = 0
    lm.recompute = wanted if wanted == "full" else min(int(wanted), lm.layers)
    if lm.path != "fused" and lm.recompute:
        settings = {"use_reentrant": False, "context_fn": lm.recomputing}
        lm.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings)
        lm.model.train()


def kept_bytes(lm: LanguageModel, micro_batch_tokens: int) -> tuple[int, int]:
    """Bytes of activations that one layer keeps for the backward, and how much of that is gate and up."""
    config = lm.config.to_dict()
    hidden = config.get("hidden_size") or config.get("n_embd")
    wide = config.get("intermediate_size") or config.get("n_inner") or 4 * hidden
    size = (lm.dtypes.storage if lm.path == "fused" else lm.dtypes.arithmetic).itemsize
    gate_up = 2 * wide * size * micro_batch_tokens
    rest = (_kept_widths(lm) if lm.path == "fused" else 16) * hidden * size * micro_batch_tokens
    return rest + (gate_up if lm.path == "fused" else 2 * gate_up), gate_up


def _kept_widths(lm: LanguageModel) -> int:
    """Hidden states that a fused layer keeps per token: h, q, k, v, h2; outputs too, where an adapter reads them."""
    assert lm.blocks is not None
    attention, mlp = lm.blocks.halves[0]
    read_again = (attention.out.needs_output or attention.after, mlp.down.needs_output or mlp.after)
    return 5 + sum(bool(again) for again in read_again)


def _automatic(lm: LanguageModel, micro_batch_tokens: int) -> int | str:
    free = free_memory(lm)
    if free is None:
        return 0
    layer, gate_up = kept_bytes(lm, micro_batch_tokens)
    excess = layer * lm.layers - free // 2
    if excess <= 0:
        return 0
    if lm.path == "fused" and excess <= gate_up * lm.layers:
        return -(-excess // gate_up)
    return "full"


def is_tight(lm: LanguageModel, micro_batch_tokens: int) -> bool:
    """Whether a micro-batch could run out of memory: its activations would take a quarter of what is free.

    Then the longest one is computed before the first step. Elsewhere that would only cost its time.
    """
    free = free_memory(lm)
    return free is None or lm.device.type == "cuda" or kept_bytes(lm, micro_batch_tokens)[0] * lm.layers > free // 4


def free_memory(lm: LanguageModel) -> int | None:
    """Bytes that the device has left; None where that cannot be told."""
    if lm.device.type == "cuda":
        return torch.cuda.mem_get_info(lm.device)[0]
    return host_memory()


def host_memory() -> int | None:
    """Bytes of host memory that are available; None where that cannot be told."""
    available = _kilobytes(Path("/proc/meminfo"), "MemAvailable:")
    return None if available is None else available * 1024


def _kilobytes(table: Path, name: str) -> int | None:
    """A line of a table of the kernel, in kB; None where there is no such table or line."""
    lines = table.read_text().splitlines() if table.exists() else []
    return next((int(line.split()[1]) for line in lines if line.startswith(name)), None)
