"""What the components of a job cost that does not depend on how many tokens are computed at a time.

Every adapter says what it trains and reads, every optimizer what state and gradients it keeps, every scheme its bits;
here these are put together with the weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from shikomi.adapters._adapter import Reads
from shikomi.optim._places import Places
from shikomi.plan.architecture import SCORE
from shikomi.plan.estimate import Job, Machine, Range

SHARED_EMBEDDING_PAGE = 64 << 10  # bytes that the system maps around a row of an embedding that is read from a file
DISTINCT = 0.2  # of a data set's tokens, how many are the first of their kind; no more than the vocabulary


@dataclass(frozen=True)
class Costs:
    """Bytes that are there during the whole stage, and what they belong to."""

    trained: dict[str, tuple[int, ...]]
    own: int  # trained numbers that are no part of the base: the adapter's
    reads: Reads
    weights: Range  # of the base as it is kept, trained parts in fp32
    adapter: int
    state: Places
    gradients: int  # that exist together at most
    reference: int  # a frozen copy of what is trained
    scratch: int  # the buffer that weights are widened or dequantized into
    head_trained: bool
    largest_gradient: int


def costs(job: Job, machine: Machine, micro_batches: int) -> Costs:
    """Raises BadInput where the adapter cannot be put on the model."""
    model, adapter = job.architecture, job.adapter
    trained = adapter.trained_shapes(model)
    if SCORE in model.tensors:
        trained = {**trained, SCORE: model.tensors[SCORE]}
    numbers = sum(prod(shape) for shape in trained.values())
    inside = {name for name in trained if name in model.tensors}
    own = numbers - sum(prod(trained[name]) for name in inside)
    head_weight = f"{model.head}.weight" if not model.tied else f"{next(iter(model.embeddings))}.weight"
    head_trained = head_weight in inside or any(name.endswith(f".{model.head}.weight") for name in trained)
    return Costs(
        trained=trained,
        own=own,
        reads=adapter.reads(model),
        weights=_weights(job, machine, inside),
        adapter=4 * (own + adapter.frozen_numbers(model)),
        state=job.optim.places(trained, machine.device),
        gradients=job.optim.gradient_bytes(trained, micro_batches),
        reference=_reference(job, numbers),
        scratch=_scratch(job, machine, inside),
        head_trained=head_trained,
        largest_gradient=4 * max((prod(trained[name]) for name in inside), default=0),
    )


def _weights(job: Job, machine: Machine, inside: set[str]) -> Range:
    """The base in memory: few bits, storage, or what transformers multiplies itself in the arithmetic dtype.

    Where weights are pages of their file, those of converted ones are there as well for as long as one weight lies in
    it; the system can take them back where memory is short, so that the low end is without them.
    """
    model, total, converted, stay = job.architecture, 0.0, 0, False
    for name, shape in model.tensors.items():
        path, numbers = name.rpartition(".")[0], prod(shape)
        if name in inside:
            total += 4 * numbers
            converted += numbers
        elif path in model.linears and len(shape) == 2:
            few = job.quant is not None and path != model.head and not path.endswith("dt_proj")
            total += numbers * job.quant.bits / 8 if few else numbers * machine.storage_bytes
            stay = True
        elif path == next(iter(model.embeddings)):
            total += numbers * machine.storage_bytes
        else:
            total += numbers * machine.arithmetic_bytes
            converted += numbers if machine.arithmetic != machine.storage else 0
    twice = converted * machine.storage_bytes if stay and _lies_in_file(job, machine) else 0
    return _mapped(job, machine, inside, total) + Range(0, twice, twice)


def _lies_in_file(job: Job, machine: Machine) -> bool:
    """Whether weights are the pages of their file: on a CPU, where nothing has to be converted."""
    return machine.device == "cpu" and job.quant is None and job.file_dtype == machine.storage


def _mapped(job: Job, machine: Machine, inside: set[str], total: float) -> Range:
    """Of an input embedding that lies in its file, only the rows that were read are in memory."""
    model = job.architecture
    path, (rows, width) = next(iter(model.embeddings.items()))
    if not _lies_in_file(job, machine) or model.tied or f"{path}.weight" in inside or job.new_tokens:
        return Range.exact(total)
    whole = rows * width * machine.storage_bytes
    distinct = min(rows, DISTINCT * job.rows.count * job.rows.tokens)
    likely = total - whole + min(whole, distinct * SHARED_EMBEDDING_PAGE)
    return Range(total - whole, likely, total)


def _reference(job: Job, numbers: int) -> int:
    """Bytes of the copy that the reference is kept as; none where it is the model with the adapter off."""
    if not job.trained_with_reference or job.reference == "precompute":
        return 0
    return 0 if job.fresh and job.adapter.off_is_start else 4 * numbers


def _scratch(job: Job, machine: Machine, inside: set[str]) -> int:
    """The largest weight that is widened or dequantized at each use; of layers that share an input, all of them."""
    model = job.architecture
    widened = machine.storage != machine.arithmetic
    groups: dict[tuple[str, ...], int] = {}
    fused = model.path_at(job.max_length) == "fused"
    for path, (out, width) in model.linears.items():
        head = path == model.head
        trained = f"{path}.weight" in inside and machine.arithmetic == "fp32"
        if trained or not (widened or (job.quant is not None and not head)):
            continue
        if head and model.tied and f"{next(iter(model.embeddings))}.weight" in inside:
            continue
        key: tuple[str, ...] = (path,)
        if fused and path.endswith(("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")):
            key = (path.rpartition(".")[0], "in")
        groups[key] = groups.get(key, 0) + out * width
    return machine.arithmetic_bytes * max(groups.values(), default=0)
