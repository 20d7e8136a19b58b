"""The arithmetic of one optimizer step, counted by kind from the architecture and the method; no machine is in it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from math import prod
from typing import Any

from shikomi.plan.architecture import Architecture
from shikomi.plan.estimate import Job

BLOCK = 128  # query rows of one block of attention: model/attention.py
FORWARD, BACKWARD_INPUT, BACKWARD_WEIGHT = 2, 2, 2  # FLOP per matrix element and token
BOTTLENECK = 64  # about as wide as bottlenecks are
LOW_RANK = 7  # FLOP per trained number of a low-rank update and token: A takes 8, B takes 6 (quant/_linear.py)


@dataclass(frozen=True)
class Work:
    """What is computed: products in FLOP, the rest in numbers that are read or written once."""

    products: float = 0.0  # FLOP with weight matrices
    thin: float = 0.0  # FLOP with low-rank updates, whose products are slower
    attention: float = 0.0  # FLOP of scores and values
    softmax: float = 0.0  # exponentials: of attention, and of the vocabulary for every scored token
    elementwise: float = 0.0  # norms, activations, rotations, copies
    weights: float = 0.0  # stored weights that are read, and widened or unpacked, before they are multiplied
    updated: float = 0.0  # parameters that the optimizer moves

    def __add__(self, other: Work) -> Work:
        return Work(*(a + b for a, b in zip(_values(self), _values(other), strict=True)))

    def __mul__(self, times: float) -> Work:
        return Work(*(value * times for value in _values(self)))

    @property
    def flop(self) -> float:
        """Every product: what a GPU's peak is compared with."""
        return self.products + self.thin + self.attention


def _values(work: Work) -> tuple[float, ...]:
    return (work.products, work.thin, work.attention, work.softmax, work.elementwise, work.weights, work.updated)


@dataclass(frozen=True)
class Tokens:
    """The tokens of one optimizer step."""

    computed: float  # with a gradient; shared prefixes once
    scored: float
    micro_batches: int
    keys: float  # that a query is multiplied with, on average, in blocks of 128 rows


def tokens_of(job: Job) -> Tokens:
    """The tokens of an optimizer step: a prompt that several answers share is computed once, unless told otherwise."""
    rows = job.rows
    examples = min(job.batch_size, rows.count)
    whole = examples * rows.tokens  # a pair's prompt once
    scored = whole * rows.scored_share
    if job.preferences and "prompt_logp" in job.objective.needs:
        scored += whole * rows.prompt_share
    answers = 2 if job.preferences and job.objective.data == "pairs" else 1
    computed, alone, before = whole, rows.tokens, 0.0
    if answers == 2:
        own = rows.tokens * (1 - rows.prompt_share) / 2
        alone, before = own, rows.tokens * rows.prompt_share
        if not job.share_prefix:
            computed, alone, before = whole * (1 + rows.prompt_share), own + before, 0.0
    elif job.share_prefix and rows.shared:
        together = min(float(examples), max(1.0, job.micro_batch_tokens / rows.tokens))  # rows of a micro-batch
        before = min(rows.shared, rows.tokens - 1) * (together > 1)
        computed -= before * examples * (1 - 1 / together)
        alone = rows.tokens - before
    virtual = _virtual(job.adapter)
    keys = _keys(alone) + before + virtual
    micro = max(1, math.ceil(max(whole, computed) / job.micro_batch_tokens))  # filled by whole rows
    if _name(job.adapter) == "prompt":
        computed += virtual * micro  # they run through the model, once a micro-batch
    return Tokens(computed, scored, micro, min(keys, job.rows.longest + BLOCK + virtual))


def _keys(length: float) -> float:
    """Keys of an average query of a segment: short segments share a block, long ones are cut into some."""
    if length <= BLOCK / 2:
        return max(1, BLOCK // max(length, 1)) * length
    return length if length <= BLOCK else (length + BLOCK) / 2


def step(job: Job, recompute: str | int = 0) -> Work:
    """One optimizer step: forward and backward of all micro-batches, the reference, and the update.

    `recompute` is what the job's comes to: layers whose gate and up are computed again, or "full".
    """
    tokens = tokens_of(job)
    method = _Method.of(job)
    arch = job.architecture
    work = (
        forward(arch, tokens, method) + _backward(arch, tokens, method) + _recomputed(arch, tokens, method, recompute)
    )
    work += _head(arch, tokens, method)
    work += reference(job) if job.reference == "live" else Work()
    if job.preferences and "kl" in job.objective.needs:  # answers put behind other prompts, under the policy
        work += forward(arch, tokens, method) + _scoring(arch, tokens, method)
        work += reference(job) if job.reference == "live" else Work()
    return work + _update(job, method)


def reference(job: Job) -> Work:
    """One pass of a step's rows under the reference policy; nothing for objectives without one."""
    if not job.trained_with_reference:
        return Work()
    tokens, method = tokens_of(job), _Method.of(job)
    return forward(job.architecture, tokens, method) + _scoring(job.architecture, tokens, method)


@dataclass(frozen=True)
class _Method:
    """What of a method decides the arithmetic."""

    low_rank: float  # trained numbers beside the weights
    trained: float  # elements of the body's matrices that get a gradient
    depth: float  # share of the layers that the backward goes through
    trains_head: bool
    parameters: float  # all that are trained
    passes: float  # elementwise work against the fused layers'
    norms: float  # FLOP of DoRA's norms of W + B A, which read every weight once more

    @classmethod
    def of(cls, job: Job) -> _Method:
        arch, name = job.architecture, _name(job.adapter)
        passes = 1.0 if arch.path_at(job.max_length) == "fused" else 1.6
        if name == "dora":
            passes += 0.3  # outputs are kept, scaled, and read again
        parameters = float(sum(prod(shape) for shape in job.adapter.trained_shapes(arch).values()))
        norms = 2.0 * job.adapter.r * arch.body_parameters if name == "dora" else 0.0
        if name != "full":
            return cls(parameters, 0.0, 1.0, False, parameters, passes, norms)
        body = arch.body_parameters
        last = job.adapter.last_layers
        depth = 1.0 if last is None else min(1.0, last / arch.layers)
        trained = min(body * depth, parameters)
        return cls(0.0, trained, depth, parameters > trained, parameters, passes, 0.0)


def _name(component: Any) -> str:
    return str(component.name)


def rank_of(adapter: Any) -> int:
    """Of the low-rank products of an adapter: a bottleneck's are as wide as it is. 16 where it has none."""
    if _name(adapter) in ("lora", "dora"):
        return int(adapter.r)
    return BOTTLENECK if _name(adapter) == "bottleneck" else 16


def _virtual(adapter: Any) -> int:
    """Virtual tokens before every sequence."""
    return int(adapter.num_virtual_tokens) if _name(adapter) in ("prefix", "prompt") else 0


def _attention_flop(arch: Architecture, tokens: Tokens, products: int) -> float:
    """FLOP of `products` batched products of queries (or their gradients) with all their keys."""
    return 2.0 * products * tokens.computed * tokens.keys * arch.heads * arch.head_dim * arch.attention_layers


def _exponentials(arch: Architecture, tokens: Tokens) -> float:
    return tokens.computed * tokens.keys * arch.heads * arch.attention_layers


def _width(arch: Architecture, hidden: float, qkv: float, wide: float) -> float:
    """Numbers of one token in all layers: so many passes over hidden states, over q, k, v, and over the wide part."""
    chosen = arch.expert_width * arch.experts_per_token if arch.experts else arch.intermediate
    heads = (arch.heads + 2 * arch.kv_heads) * arch.head_dim
    wide *= 1.0 if arch.gated else 0.6
    return (hidden * arch.hidden + qkv * heads + wide * chosen) * arch.layers


def forward(arch: Architecture, tokens: Tokens, method: _Method) -> Work:
    """All layers once, without the head. Passes over activations are counted in model/fused.py."""
    return Work(
        products=FORWARD * arch.body_parameters * tokens.computed,
        thin=FORWARD * method.low_rank * tokens.computed + method.norms * tokens.micro_batches,
        attention=_attention_flop(arch, tokens, 2),
        softmax=_exponentials(arch, tokens),
        elementwise=_width(arch, 6, 6, 8) * tokens.computed * method.passes,
        weights=arch.body_parameters * tokens.micro_batches * (1.3 if method.norms else 1.0),  # read, not arranged
    )


def _backward(arch: Architecture, tokens: Tokens, method: _Method) -> Work:
    """Gradients of the activations, of what is trained, and the probabilities of attention again."""
    return Work(
        products=(BACKWARD_INPUT * arch.body_parameters * method.depth + BACKWARD_WEIGHT * method.trained)
        * tokens.computed,
        thin=(LOW_RANK - FORWARD) * method.low_rank * tokens.computed + method.norms * tokens.micro_batches,
        attention=_attention_flop(arch, tokens, 6) * method.depth,
        softmax=2 * _exponentials(arch, tokens) * method.depth,
        elementwise=_width(arch, 16, 10, 14) * tokens.computed * method.depth * method.passes
        + 2.0 * method.trained * tokens.micro_batches,
        weights=arch.body_parameters * tokens.micro_batches * (1.3 if method.norms else 1.0),  # read, not arranged
    )


def _recomputed(arch: Architecture, tokens: Tokens, method: _Method, recompute: str | int) -> Work:
    """Layers that are computed again in the backward: all of them, or gate and up of some."""
    if recompute == "full" or (recompute and method.passes > 1):
        return forward(arch, tokens, method)
    layers = 0 if recompute in ("none", "auto") else min(int(recompute), arch.layers)
    gate_up = 2.0 * arch.hidden * arch.intermediate * layers
    return Work(products=FORWARD * gate_up * tokens.computed, weights=gate_up * tokens.micro_batches)


def _scoring(arch: Architecture, tokens: Tokens, method: _Method) -> Work:
    """Log-probabilities of the scored tokens, without a gradient."""
    return Work(
        products=FORWARD * arch.head_parameters * tokens.scored,
        softmax=arch.vocabulary * tokens.scored,
        elementwise=2.0 * arch.vocabulary * tokens.scored,
        weights=arch.head_parameters * tokens.micro_batches,
    )


def _head(arch: Architecture, tokens: Tokens, method: _Method) -> Work:
    """The head with its gradient: a frozen one gives J in the forward, a trained one is computed twice."""
    once = _scoring(arch, tokens, method)
    gradient = Work(
        products=BACKWARD_INPUT * arch.head_parameters * tokens.scored,
        elementwise=2.0 * arch.vocabulary * tokens.scored,
    )
    if not method.trains_head:
        return once + gradient
    weight = Work(
        products=BACKWARD_WEIGHT * arch.head_parameters * tokens.scored,
        elementwise=2.0 * arch.head_parameters * tokens.micro_batches,
    )
    return once * 2 + gradient + weight


def _update(job: Job, method: _Method) -> Work:
    """The optimizer; GaLore projects the gradients of the matrices and what it makes of them back."""
    work = Work(updated=method.parameters, elementwise=4.0 * method.parameters)  # the norm and the clipping
    if _name(job.optim) != "galore":
        return work
    micro = tokens_of(job).micro_batches
    return work + Work(products=2.0 * job.optim.rank * method.trained * (1 + micro))
