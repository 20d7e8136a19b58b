"""AdamW whose state is not where the model is: on the host for a model on a GPU, or in a file."""

import math
import mmap
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from shikomi.errors import TryAgain
from shikomi.optim import _moments
from shikomi.optim._by_tensor import TensorAdamW
from shikomi.optim._places import Places
from shikomi.optim.adamw import AdamW

ZEROS = 16 << 20  # bytes written at a time to a new file


@dataclass(frozen=True)
class Offload(AdamW):
    """AdamW with its state elsewhere: the same updates, bit for bit on a CPU, tensor after tensor.

    A device holds the state of one tensor at a time. `host` gains nothing for a model on a CPU, whose state is on the
    host anyway. `disk` maps a file without a name in the run's folder, which goes when the process does: it writes 8
    bytes for each trained number in every step, through the system's file cache, which uses what memory is free.
    """

    name: ClassVar[str] = "offload"

    offload_to: Annotated[
        Literal["host", "disk"],
        Field(description="host: main memory, for a model on a GPU; disk: a file in the run's folder"),
    ] = "host"

    def build(
        self, trained: dict[str, nn.Parameter], learning_rate: float, weight_decay: float, folder: Path | None = None
    ) -> torch.optim.Optimizer:
        """An optimizer over `trained`. Its first step raises TryAgain where the disk has no room for its state."""
        groups = self.groups(trained, learning_rate, weight_decay)
        if self.offload_to == "host":
            return OffloadedAdamW(groups, self.defaults(learning_rate))
        if folder is None:
            raise ValueError("offload_to: disk needs a folder")
        size = sum(2 * _pages(4 * p.numel()) for p in trained.values())
        return OnDiskAdamW(groups, self.defaults(learning_rate), folder, size)

    def places(self, shapes: Mapping[str, Sequence[int]], device: str) -> Places:
        """The state of the largest tensor is with the model, all of it elsewhere."""
        whole, largest = self.state_bytes(shapes), 8 * max((math.prod(shape) for shape in shapes.values()), default=0)
        if self.offload_to == "disk":
            return Places(device=largest, disk=whole)
        return Places(device=whole) if device == "cpu" else Places(device=largest, host=whole)


class OffloadedAdamW(TensorAdamW):
    """AdamW with moments in main memory; on a GPU those of one tensor come and go in every step."""

    def start(self, parameter: Tensor) -> dict[str, Tensor]:
        step = torch.zeros((), dtype=torch.float32, device=parameter.device)
        return {"step": step, **{key: self.zeros(parameter) for key in _moments.MOMENTS}}

    def zeros(self, like: Tensor) -> Tensor:
        return torch.zeros_like(like, device="cpu")

    def update(self, parameter: Tensor, grad: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> None:
        here = {key: kept.to(parameter.device) for key, kept in state.items()}  # on a CPU itself
        _moments.update(parameter, grad, here, group, group["weight_decay"])
        for key, kept in state.items():
            if here[key] is not kept:
                kept.copy_(here[key])


class OnDiskAdamW(OffloadedAdamW):
    """AdamW with moments in a mapped file; memory holds those of one tensor."""

    def __init__(self, groups: list[dict[str, Any]], defaults: dict[str, Any], folder: Path, size: int):
        super().__init__(groups, defaults)
        self.folder, self.size, self.used = folder, size, 0
        self.file: mmap.mmap | None = None

    def zeros(self, like: Tensor) -> Tensor:
        if self.file is None:
            self.file = _mapped(self.folder, self.size)
        first = self.used
        self.used += _pages(4 * like.numel())
        return torch.frombuffer(self.file, dtype=torch.float32, count=like.numel(), offset=first).view(like.shape)

    def leave(self) -> None:
        if self.file is not None:
            self.file.madvise(mmap.MADV_DONTNEED)  # of a shared mapping: what was written stays in the file


def _pages(size: int) -> int:
    """Bytes rounded up to whole pages."""
    return -(-size // mmap.PAGESIZE) * mmap.PAGESIZE


def _mapped(folder: Path, size: int) -> mmap.mmap:
    """A file of zeros, mapped. Written whole: a write to a hole of a mapped file on a full disk kills the process."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            for first in range(0, size, ZEROS):
                file.write(bytes(min(ZEROS, size - first)))
            file.flush()
            return mmap.mmap(file.fileno(), size)
    except OSError as error:
        raise TryAgain(
            f"no room for {size / 1e6:,.0f} MB of optimizer state in {folder} ({error.strerror or error}): free space, "
            "choose another output_dir, or set optim.offload_to: host, and resume"
        ) from error
