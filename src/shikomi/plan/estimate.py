"""What a plan is made of: ranges instead of bare numbers, the machine, one stage of a run as values, its memory.

`architecture.py` reads a config.json, `jobs.py` makes the jobs of a recipe, `memory.py` says what one takes, `time.py`
how long it runs. Nothing here or there builds a model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shikomi.plan.architecture import Architecture

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


@dataclass(frozen=True)
class Range:
    """A number that is known only roughly: low <= likely <= high."""

    low: float
    likely: float
    high: float

    @classmethod
    def exact(cls, value: float) -> Range:
        """A number that is known."""
        return cls(value, value, value)

    def __add__(self, other: Range | float) -> Range:
        o = other if isinstance(other, Range) else Range.exact(other)
        return Range(self.low + o.low, self.likely + o.likely, self.high + o.high)

    __radd__ = __add__  # so that sum() adds ranges

    def __sub__(self, other: Range | float) -> Range:
        o = other if isinstance(other, Range) else Range.exact(other)
        return Range(self.low - o.high, self.likely - o.likely, self.high - o.low)

    def __mul__(self, other: Range | float) -> Range:
        """The product of numbers that are not negative."""
        o = other if isinstance(other, Range) else Range.exact(other)
        return Range(self.low * o.low, self.likely * o.likely, self.high * o.high)

    __rmul__ = __mul__

    def __truediv__(self, other: Range | float) -> Range:
        """The quotient of numbers that are above zero."""
        o = other if isinstance(other, Range) else Range.exact(other)
        return Range(self.low / o.high, self.likely / o.likely, self.high / o.low)

    def at_least(self, other: Range | float) -> Range:
        """The larger of both, end by end."""
        o = other if isinstance(other, Range) else Range.exact(other)
        return Range(max(self.low, o.low), max(self.likely, o.likely), max(self.high, o.high))

    def as_dict(self) -> dict[str, float]:
        return {"low": self.low, "likely": self.likely, "high": self.high}


@dataclass(frozen=True)
class Machine:
    """What a plan is for. `storage` and `arithmetic` are dtypes as `model/device.py` chooses them there."""

    name: str  # "this machine", "rtx-4090", "cpu-16gb"
    device: str  # "cpu", "cuda" or "mps"
    memory_bytes: int  # of the device; of the host where they are one
    host_memory_bytes: int
    storage: str = "bf16"  # of weights and of activations kept for the backward: "bf16", "fp16", "fp32"
    arithmetic: str = "fp32"  # of matrix products; "fp32" on a CPU without bf16 units

    @property
    def storage_bytes(self) -> int:
        return BYTES[self.storage]

    @property
    def arithmetic_bytes(self) -> int:
        return BYTES[self.arithmetic]


@dataclass(frozen=True)
class Rows:
    """The rows of one stage in tokens. A pair counts its prompt once and both answers."""

    count: int
    tokens: float  # of a row, on average
    longest: int  # tokens of the longest row, after it was cut to max_length
    scored_share: float = 0.5  # trained tokens of all tokens
    prompt_share: float = 0.0  # of preferences: tokens of the prompts of all tokens
    measured: bool = False  # by the tokenizer; otherwise estimated from bytes
    fullest: Range | None = None  # tokens computed in the fullest micro-batch, where the rows were packed to see
    fullest_scored: Range | None = None  # scored tokens in it
    shared: float = 0.0  # of conversations: tokens that all rows begin with, computed once in a micro-batch


@dataclass(frozen=True)
class Job:
    """One stage of a recipe on one model, as values, so that tables can make them without files."""

    architecture: Architecture
    adapter: Any  # the built components: adapters.*, quant.* (None: none), optim.*, objectives.*
    quant: Any
    optim: Any
    objective: Any
    rows: Rows
    steps: int = 1  # optimizer steps of the stage
    max_length: int = 1024
    batch_size: int = 16
    micro_batch_tokens: int = 2048
    recompute: str | int = "auto"  # "auto", "none", "full", or in how many layers
    share_prefix: bool = True
    reference: str = "live"  # of objectives with one: "live" or "precompute"
    fresh: bool = True  # the adapter was never trained before this stage
    new_tokens: int = 0
    save_steps: int | None = None  # None: by the clock
    save_total_limit: int | None = 2
    save_dtype: str = "bf16"
    evaluates: bool = False  # rows are scored besides training: validation, or a comparison
    stage: str = "sft"
    file_bytes: int | None = None  # of the folder's weights, where there is one: what loading reads
    file_dtype: str = "bf16"
    quantized: bool = False  # the folder's weights are stored in few bits already
    tokenizer_bytes: int | None = None  # of tokenizer.json, where there is one

    @property
    def preferences(self) -> bool:
        """Whether the rows are pairs or judged answers."""
        return self.objective.data != "conversations"

    @property
    def trained_with_reference(self) -> bool:
        return bool(self.objective.needs & {"ref_logp", "kl"})


@dataclass(frozen=True)
class Component:
    """One part of the memory: `name` is one of NAMES in `memory.py`; `why` is a sentence for the user."""

    name: str
    bytes: Range
    why: str


@dataclass(frozen=True)
class MemoryPlan:
    """What one job takes. `peak` is that of `device` (the process, on a CPU); on a GPU `host_peak` is the host's."""

    components: tuple[Component, ...]  # they add up to `peak`
    peak: Range
    loading_peak: Range  # while the weights are read and the adapter is put on
    disk: Range  # checkpoints that are kept, one that is being written, and the final adapter or model
    trainable_parameters: int
    total_parameters: int  # of the base as loaded
    recompute: str | int  # what "auto" comes to
    host_peak: Range
    final_bytes: int = 0  # of the saved adapter or model
    notes: tuple[str, ...] = ()

    def of(self, name: str) -> Range:
        """Bytes of one component; nothing where the job has none of it."""
        return sum((part.bytes for part in self.components if part.name == name), Range.exact(0))

    def as_dict(self) -> dict[str, Any]:
        """What `--json` and result.json hold."""
        return {
            "peak_memory_bytes": self.peak.as_dict(),
            "loading_peak_bytes": self.loading_peak.as_dict(),
            "disk_bytes": self.disk.as_dict(),
            "trainable_parameters": self.trainable_parameters,
            "total_parameters": self.total_parameters,
            "recompute": self.recompute,
            "components": {part.name: part.bytes.as_dict() for part in self.components},
        }
