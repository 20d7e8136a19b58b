"""Peak memory of a job: what is there all the time, and the largest of what comes and goes.

Three moments can be the peak: the head with every layer's activations kept, the backward of the last layer, and the
update with all gradients and the optimizer's state; and before them the loading of the weights.
"""

from __future__ import annotations

from math import prod
from typing import NamedTuple

from shikomi.plan import kept
from shikomi.plan.costs import Costs, costs
from shikomi.plan.estimate import Component, Job, Machine, MemoryPlan, Range

PROCESS = Range(385 << 20, 417 << 20, 480 << 20)  # the interpreter, torch, transformers and the program, on the host
TOKENIZER = 18.0  # bytes in memory for a byte of tokenizer.json, both of a run's tokenizers
TEXT_PER_ENTRY = 70  # bytes of tokenizer.json for an entry of the vocabulary
QUANT_PROCESS, BITSANDBYTES = 10 << 20, 37 << 20  # loading tensor by tensor; and the library where it is used
WORKSPACE, WORKSPACE_TOKENS = 4 << 10, 4096  # bytes for a token, of matrix products themselves, and up to how many
CUDA_PROCESS = Range(400 << 20, 600 << 20, 900 << 20)  # a context with its kernels and workspaces, on the device
TILE_BYTES, STRIP = 48 << 20, 32  # of model/logprobs.py
MAPPED_ALONE = 32 << 20  # bytes from which glibc gives a block pages of its own, as model/device.py sets it
ROWS = 128  # queries of an attention block, as in model/attention.py
SLACK = {"cpu": Range(1.0, 1.0, 1.2), "cuda": Range(1.0, 1.08, 1.2), "mps": Range(1.0, 1.08, 1.2)}
"""What an allocator holds for the bytes that come and go."""
SCATTERED = Range(1.1, 1.3, 1.85)
"""The same on a CPU where transformers' own layers are used: what they drop lies between what is kept."""
SCATTERED_AGAIN = Range(1.2, 2.0, 2.6)
"""The same where such layers are computed again, one after the other, in the backward."""
PINNED = Range(0.0, 1.5, 2.5)
"""Of the largest small block, how many times it does not find its old place: gradients and state now lie there."""


def memory(job: Job, machine: Machine) -> MemoryPlan:
    """The memory that a job takes on a machine. Raises BadInput where its adapter does not go with its model."""
    tokens, scored = micro_batch(job)
    micro_batches = max(1, round(job.rows.tokens * job.batch_size / max(1.0, tokens.likely) + 0.49))
    cost = costs(job, machine, micro_batches)
    recompute = choose_recompute(job, machine, cost, tokens.likely) if job.recompute == "auto" else job.recompute
    phases = _phases(job, machine, cost, tokens, scored, recompute, micro_batches)
    name, moving = max(phases.items(), key=lambda item: _total(item[1]).likely)
    held = _held(phases, machine, _slack(job, machine, recompute)) - _total(moving).likely
    allocator = Component("allocator", held.at_least(0), "memory that was freed and is kept to be used again")
    parts = [*_always(job, machine, cost, tokens), *(part.component for part in moving), allocator]
    loading = _loading(job, machine, cost)
    steady = sum((part.bytes for part in parts), Range.exact(0))
    if loading.likely > steady.likely:
        parts.append(Component("loading", loading - steady, "reading the weights takes more than a step"))
    peak = steady.at_least(loading)
    host = peak if machine.device != "cuda" else PROCESS + cost.state.host + _file(job) * 0.3
    final = _final_bytes(job, cost)
    return MemoryPlan(
        components=tuple(part for part in parts if part.bytes.high > 0),
        peak=peak,
        loading_peak=loading,
        disk=_disk(job, cost, final),
        trainable_parameters=sum(prod(shape) for shape in cost.trained.values()),
        total_parameters=job.architecture.parameters,
        recompute=recompute,
        host_peak=host,
        final_bytes=final,
        notes=(f"the peak is in {name}",),
    )


def micro_batch(job: Job) -> tuple[Range, Range]:
    """Tokens that are computed at a time in the fullest micro-batch, and scored ones among them."""
    rows = job.rows
    virtual = job.adapter.num_virtual_tokens if job.adapter.name == "prompt" else 0
    if rows.fullest is not None:
        scored = rows.fullest_scored or rows.fullest * rows.scored_share
        return rows.fullest + virtual, scored
    twice = 1.0 + (0.0 if job.share_prefix or job.objective.data != "pairs" else rows.prompt_share)
    mean, longest = rows.tokens * twice, rows.longest * twice
    step = min(job.batch_size, rows.count) * mean
    limit = max(longest, float(job.micro_batch_tokens))
    full = job.micro_batch_tokens * (1.0 if step <= job.micro_batch_tokens else 0.96)
    likely = min(max(step, longest), max(longest, full))
    tokens = Range(min(likely, max(mean, 0.8 * likely)), likely, min(limit, max(likely, job.batch_size * longest)))
    prompts = rows.prompt_share if "prompt_logp" in job.objective.needs else 0.0
    return tokens + virtual, tokens * ((rows.scored_share + prompts) / twice)


class Moving(NamedTuple):
    """A component that comes and goes, with the size of its largest blocks in bytes, which decides where they lie."""

    component: Component
    block: float


def _total(parts: list[Moving]) -> Range:
    return sum((part.component.bytes for part in parts), Range.exact(0))


def _slack(job: Job, machine: Machine, recompute: str | int) -> Range:
    """What an allocator takes for small blocks that come and go."""
    if machine.device != "cpu" or is_fused(job):
        return SLACK[machine.device]
    return SCATTERED_AGAIN if layers_again(job, recompute)[1] else SCATTERED


def _held(phases: dict[str, list[Moving]], machine: Machine, slack: Range) -> Range:
    """What the allocator takes for what comes and goes.

    glibc keeps small blocks when they are freed, so that their peak and that of large blocks, which are given back, add
    up even where they are at different moments; what stays in between (gradients, state) breaks up the largest.
    """
    if machine.device != "cpu":
        return max((_total(parts) for parts in phases.values()), key=lambda total: total.likely) * slack
    small, large = Range.exact(0), Range.exact(0)
    for parts in phases.values():
        small = small.at_least(_total([part for part in parts if part.block < MAPPED_ALONE]))
        large = large.at_least(_total([part for part in parts if part.block >= MAPPED_ALONE]))
    blocks = [part.block for parts in phases.values() for part in parts if part.component.bytes.likely]
    lost = max((block for block in blocks if block < MAPPED_ALONE), default=0.0)
    return small * slack + large + PINNED * lost


def _always(job: Job, machine: Machine, cost: Costs, tokens: Range) -> list[Component]:
    process = CUDA_PROCESS
    if machine.device != "cuda":
        process = PROCESS + TOKENIZER * _tokenizer(job)
        if job.quant is not None:
            process += QUANT_PROCESS + (BITSANDBYTES if job.quant.bits < 8 else 0)
    workspace = Range(*(min(n, WORKSPACE_TOKENS) for n in (tokens.low, tokens.likely, tokens.high))) * WORKSPACE
    few = f"linear maps in {job.quant.bits:.2f} bits, the rest" if job.quant is not None else "all"
    return [
        Component("process", workspace + process, "the program and its libraries"),
        Component("weights", cost.weights, f"{few} in {machine.storage}; trained ones in fp32"),
        Component("adapter", Range.exact(cost.adapter), "the adapter's numbers in fp32"),
        Component("optimizer", Range.exact(cost.state.device), "state of the optimizer"),
        Component("reference", Range.exact(cost.reference), "a frozen copy of what is trained"),
        Component("buffers", Range.exact(cost.scratch), f"one weight in {machine.arithmetic}, reused by all layers"),
    ]


def is_fused(job: Job) -> bool:
    """Whether its layers are the fused ones."""
    return job.architecture.path_at(job.max_length) == "fused"


def widths_of(job: Job, machine: Machine, cost: Costs) -> kept.Widths:
    """What a layer keeps."""
    if is_fused(job):
        return kept.fused(job.architecture, cost.reads, machine.storage != machine.arithmetic)
    return kept.own(job.architecture, cost.reads, cost.trained)


def layers_again(job: Job, recompute: str | int) -> tuple[int, bool]:
    """In how many layers gate and up are computed again, and whether whole layers are."""
    if recompute == "full" or (recompute not in ("none", 0) and not is_fused(job)):
        return job.architecture.layers, True
    return (0 if recompute == "none" else min(int(recompute), job.architecture.layers)), False


def activations(job: Job, machine: Machine, cost: Costs, recompute: str | int) -> float:
    """Bytes per token that all layers keep together."""
    widths, fused = widths_of(job, machine, cost), is_fused(job)
    size = machine.storage_bytes if fused else machine.arithmetic_bytes
    layers, hidden = job.architecture.layers, job.architecture.hidden
    again, whole = layers_again(job, recompute)
    if whole:
        return layers * hidden * machine.arithmetic_bytes + widths.kept * size
    return layers * widths.kept * size + (layers - again) * widths.gate_up * size


def _phases(
    job: Job, machine: Machine, cost: Costs, tokens: Range, scored: Range, recompute: str | int, micro_batches: int
) -> dict[str, list[Moving]]:
    """What comes and goes at the moments that can be the peak."""
    model, a = job.architecture, machine.arithmetic_bytes
    widths, fused = widths_of(job, machine, cost), is_fused(job)
    again, whole_layers = layers_again(job, recompute)
    size = machine.storage_bytes if fused else a
    if whole_layers:
        kept_block = tokens.likely * model.hidden * a
    elif fused and machine.storage != machine.arithmetic:
        kept_block = MAPPED_ALONE  # of model/keep.py
    else:
        kept_block = tokens.likely * max(widths.gate_up, widths.kept / 2) * size
    kept_bytes = tokens * activations(job, machine, cost, recompute)
    held = Moving(Component("activations", kept_bytes, "kept for the backward"), kept_block)
    earlier = Range.exact(cost.gradients if micro_batches > 1 else 0)
    grads = Moving(Component("gradients", earlier, "of earlier micro-batches, in fp32"), cost.largest_gradient)
    scores = model.heads * ROWS * min(job.rows.longest, tokens.high) * a
    mlp, rows = widths.mlp * tokens.likely * a, tokens.likely
    if fused and again == model.layers:
        rows = min(tokens.likely, kept.ROWS_AGAIN)
        mlp = a * (widths.mlp_rows * rows + widths.mlp_ends * tokens.likely)
    layer = max(widths.attention * tokens.likely * a + 4 * scores, mlp) / tokens.likely
    block = (widths.gate_up or 2 * model.intermediate) * rows * a
    temporary = Moving(Component("temporary", tokens * layer, "of the layer whose backward runs"), block)
    tied = cost.largest_gradient if model.tied and cost.head_trained else 0
    whole = Moving(
        Component(
            "gradients", Range.exact(cost.gradients + tied), "of what is trained, in fp32; of tied weights twice"
        ),
        cost.largest_gradient,
    )
    return {
        "the head": [held, grads, *_head(job, machine, cost, tokens, scored)],
        "the backward of the last layer": [held, grads, temporary],
        "the end of the backward": [whole, temporary],
    }


def _head(job: Job, machine: Machine, cost: Costs, tokens: Range, scored: Range) -> list[Moving]:
    """Hidden states before and after the last norm, the scored ones, J, and one tile of logits."""
    model, a = job.architecture, machine.arithmetic_bytes
    out, width = model.linears[model.head]
    states = tokens * (3 * width * a)
    if "value" in job.objective.needs:  # a scalar a sequence: no logits
        return [Moving(Component("head", states, "hidden states"), tokens.likely * width * a)]
    states += scored * (2 * width * a)
    rows = max(STRIP, TILE_BYTES // (4 * out) // STRIP * STRIP)
    tile = Range(*(min(n, rows) for n in (scored.low, scored.likely, scored.high))) * (out * a)
    trained = Range.exact(2.0 * out * width * 4 if cost.head_trained else 0)
    return [
        Moving(Component("head", states, "hidden states of scored tokens"), tokens.likely * width * a),
        Moving(Component("logits", tile, "one tile of logits"), tile.likely),
        Moving(Component("head gradient", trained, "the gradient of the head, twice"), trained.likely / 2),
    ]


def choose_recompute(job: Job, machine: Machine, cost: Costs, tokens: float) -> str | int:
    """As steps/memory.py chooses it: as few layers as half of the memory that is left allows."""
    free = machine.memory_bytes - cost.weights.likely - cost.adapter - cost.state.device - PROCESS.likely
    widths, fused = widths_of(job, machine, cost), is_fused(job)
    excess = tokens * activations(job, machine, cost, "none") - max(0.0, free) / 2
    gate_up = widths.gate_up * machine.storage_bytes * tokens
    if excess <= 0:
        return "none"
    if fused and excess <= gate_up * job.architecture.layers:
        return int(-(-excess // gate_up))
    return "full"


def _tokenizer(job: Job) -> int:
    """Bytes of the tokenizer's file."""
    return job.tokenizer_bytes or TEXT_PER_ENTRY * job.architecture.vocabulary


def _file(job: Job) -> Range:
    if job.file_bytes is not None:
        return Range.exact(job.file_bytes)
    return Range.exact(2 * job.architecture.parameters)


def _loading(job: Job, machine: Machine, cost: Costs) -> Range:
    """While the weights are read: their file's pages are in memory until they are converted."""
    process = CUDA_PROCESS if machine.device == "cuda" else PROCESS
    if job.quant is not None:
        largest = 2.0 * max(out * width for out, width in job.architecture.linears.values())
        return cost.weights + process + 2 * largest
    if machine.device == "cuda":
        return cost.weights + process
    converted = job.file_dtype != machine.storage or cost.trained.keys() & job.architecture.tensors.keys()
    return cost.weights + process + (_file(job) if converted else Range.exact(0))


def _final_bytes(job: Job, cost: Costs) -> int:
    size = 2 if job.save_dtype == "bf16" else 4
    return size * (cost.own or job.architecture.parameters)


def _disk(job: Job, cost: Costs, final: int) -> Range:
    """Checkpoints that are kept and the one that is being written, each with the optimizer's state; and `final/`."""
    one = 4 * sum(prod(shape) for shape in cost.trained.values()) + job.optim.places(cost.trained, "cpu").device
    one += cost.state.disk
    most = max(1, job.steps // (job.save_steps or 1))
    count = float(most if job.save_total_limit is None else min(most, job.save_total_limit))
    kept_now = (Range(1, min(2.0, count), count) if job.save_steps is None else Range.exact(count)) + 1
    return kept_now * one + final + cost.state.disk + (4 << 20)
