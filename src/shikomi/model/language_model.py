"""A causal language model with its adapter: scores packed micro-batches; the one object that the stages below use."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from shikomi.adapters._adapter import Attached, Context
from shikomi.adapters._modules import TrainedCopy
from shikomi.data.packing import Packed, with_root
from shikomi.model import attention, fused
from shikomi.model.context import alone, batches
from shikomi.model.device import Dtypes, give_back_freed
from shikomi.model.generate import generate
from shikomi.model.heads import SCORE, ScalarHead
from shikomi.model.logprobs import Scored, Shape, log_probabilities
from shikomi.model.reference import OFF, Reference, in_place_of
from shikomi.quant._quantized import logical_parameters

PACKED = "shikomi_packed"  # our attention's name among transformers' attention functions


@dataclass(eq=False)
class LanguageModel:
    """`path` is how a packed row is computed: "fused" half blocks, "packed" through transformers' own layers with our
    attention, or "separate", one segment at a time (slow, exact, for architectures that cannot be packed)."""

    model: Any  # the transformers model
    tokenizer: Any
    device: torch.device
    dtypes: Dtypes
    attached: Attached | None = None  # None: full fine-tuning, or no training
    own_attention: str = "sdpa"  # the model's own attention, for generation and the separate path
    shape: Shape = Shape()
    path: str = "separate"
    path_reason: str = ""
    blocks: fused.Blocks | None = None
    recompute: int | str = 0
    origin: str = ""  # what the user called the base
    stop_ids: list[int] = field(default_factory=list)  # tokens that end an answer
    notes: list[str] = field(default_factory=list)
    earlier: list[dict[str, Tensor]] = field(default_factory=list)  # adapters of earlier stages, kept frozen or merged
    rebased: bool = False  # what is trained is no adapter for the base as loaded: its result is a whole model
    fixed: Reference | None = None  # the reference policy of the stage that is trained
    scalar: ScalarHead | None = None  # of a reward model

    @property
    def config(self) -> Any:
        return self.model.config

    @property
    def decoder(self) -> Any:
        return self.model.base_model

    @property
    def head(self) -> Any:
        module = self.model.get_output_embeddings()
        return module.active if isinstance(module, TrainedCopy) else module

    @property
    def layers(self) -> int:
        return self.config.num_hidden_layers

    def trainable(self) -> dict[str, nn.Parameter]:
        """Trained parameters: an adapter's by the names of its file, a full model's and a scalar head's by theirs."""
        head = {} if self.scalar is None or not self.scalar.weight.requires_grad else {SCORE: self.scalar.weight}
        if self.attached is not None:
            return self.attached.parameters() | head
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad} | head

    @property
    def trainable_parameters(self) -> int:
        return sum(p.numel() for p in self.trainable().values())

    @property
    def total_parameters(self) -> int:
        """Parameters of the base as loaded, tied ones once, and the scalar head."""
        inside = {id(p): p.numel() for p in self.model.parameters()}
        total = sum(inside.values()) + logical_parameters(self.model)
        if self.scalar is not None:
            total += self.scalar.weight.numel()
        if self.attached is None:
            return total
        own = self.attached.parameters().values()
        trained = sum(p.numel() for p in own if id(p) in inside)
        of_the_base = sum(p.numel() for p in own) - self.attached.added()
        return total - trained + of_the_base

    def parameter_line(self) -> str:
        """What PEFT's print_trainable_parameters says: there the total includes the adapter."""
        trained, total = self.trainable_parameters, self.total_parameters
        if self.attached:
            total += self.attached.added()
        return f"trainable params: {trained:,} || all params: {total:,} || trainable%: {100 * trained / total:.4f}"

    @property
    def context(self) -> Context | None:
        """Virtual tokens that the adapter puts before every sequence; None without any, and while it is off."""
        return self.attached.context if self.attached is not None else None

    def adapter_off(self) -> contextlib.AbstractContextManager[None]:
        """Within: the model as it was loaded."""
        return self.attached.off() if self.attached is not None else contextlib.nullcontext()

    def reference(self) -> contextlib.AbstractContextManager[None]:
        """Within: the reference policy, which `fixed` is; raises ValueError where none is fixed."""
        if self.fixed is None:
            raise ValueError("this stage has no reference")
        return self.adapter_off() if self.fixed.how == OFF else in_place_of(self.trainable(), self.fixed.tensors)

    def bind_dropout(self, key: int | None) -> None:
        """Dropout masks of the next forward and its backward; None: no dropout."""
        if self.attached is not None:
            self.attached.bind_dropout(key)

    def score(self, packed: Packed) -> Scored:
        """Log-probabilities of the scored tokens of a micro-batch, with autograd where it is enabled."""
        packed = packed.to(self.device)
        if self.path == "separate":
            rows, scored = self._separate(packed, packed.scored)
        else:
            rows, scored = self.hidden(packed), packed.scored
        self._give_back()
        return Scored(log_probabilities(rows, scored, packed.targets, self.head, self.shape), packed.segment)

    def values(self, packed: Packed, rows: Sequence[int]) -> Tensor:
        """Values (S,) in fp32 that the scalar head reads at these rows of a micro-batch, with autograd where it is on.

        Raises ValueError where there is no such head.
        """
        if self.scalar is None:
            raise ValueError("this model has no scalar head")
        packed = packed.to(self.device)
        at = torch.tensor(list(rows), dtype=torch.int64, device=self.device)
        if self.path == "separate":
            h, at = self._separate(packed, at)
        else:
            h = self.hidden(packed)
        return self.scalar.values(h.index_select(0, at))

    def hidden(self, packed: Packed) -> Tensor:
        """Hidden states (T, H) after the final norm of a packed row, on the fused or the packed path."""
        self._give_back()
        embeds, ahead = self.model.get_input_embeddings()(packed.ids), 0  # (T, H)
        prefix: tuple[Tensor, ...] = ()
        if (context := self.context) is not None:
            virtual = context.embeddings()
            if virtual is not None:
                embeds, ahead = torch.cat([virtual.to(embeds.dtype), embeds]), context.tokens
                packed = with_root(packed, ahead)
            else:
                prefix = tuple(layer.to(embeds.dtype) for layer in context.keys_values() or ())
                packed = replace(packed, positions=packed.positions + context.tokens)
        plan = attention.layout(packed, prefix)
        if self.path == "fused" and self.blocks is not None:
            cos, sin = self.decoder.rotary_emb(embeds[None], position_ids=packed.positions[None])
            half = cos.shape[-1] // 2
            h = self.blocks.forward(embeds, cos[0, :, :half], sin[0, :, :half], plan, self.recompute)
            return self.decoder.norm(h[ahead:])
        with self._attention(PACKED):
            out = self.decoder(
                inputs_embeds=embeds[None], position_ids=packed.positions[None], use_cache=False, packed_layout=plan
            )
        return out.last_hidden_state[0, ahead:]

    def _give_back(self) -> None:
        """Before the layers and before the head: so that what each of them takes does not add up."""
        if torch.is_grad_enabled() and self.device.type == "cpu":
            give_back_freed()

    def _separate(self, packed: Packed, wanted: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden states (N, H) of the wanted rows (N,), each chain of segments computed by itself; and their places."""
        offsets, rows = packed.offsets, wanted.tolist()
        spans = [(o, o + n) for o, n in zip(offsets, packed.lengths, strict=True)]
        owner = [index for index, (a, b) in enumerate(spans) for _ in range(a, b)]
        found: dict[int, Tensor] = {}
        for index in sorted({owner[row] for row in rows}):
            chain: list[int] = []
            at = index
            while at >= 0:
                chain.insert(0, at)
                at = packed.parents[at]
            ids = torch.cat([packed.ids[slice(*spans[i])] for i in chain])
            found[index] = self.hidden_alone(ids)[-packed.lengths[index] :]
        picked = [found[owner[row]][row - offsets[owner[row]]] for row in rows]
        return torch.stack(picked), torch.arange(len(rows), device=self.device)

    def hidden_alone(self, ids: Tensor) -> Tensor:
        """Hidden states (S, H) of one sequence by transformers' own forward and masks."""
        with self._attention(self.own_attention):
            return self.decoder(**self.alone(self.decoder, ids)).last_hidden_state[0, -len(ids) :]

    def alone(self, module: Any, ids: Tensor) -> dict[str, Any]:
        """Arguments with which transformers' forward of `module` computes one sequence (S,), virtual tokens first."""
        context = self.context
        if context is None:
            return {"input_ids": ids[None], "use_cache": False}
        if context.keys_values() is not None:
            module.eval()  # layers that recompute would leave the prefix out
        return alone(module, context, ids)

    @contextlib.contextmanager
    def _attention(self, name: str) -> Iterator[None]:
        """Within: transformers' layers use this attention."""
        before = self.config._attn_implementation
        if before == name:
            yield
            return
        self.model.set_attn_implementation(name)
        try:
            yield
        finally:
            self.model.set_attn_implementation(before)

    def recomputing(self) -> tuple[contextlib.AbstractContextManager[None], contextlib.AbstractContextManager[None]]:
        """Around a layer that recomputes, first and again: the backward is no longer within the packed attention."""
        packed = self.path == "packed"
        return contextlib.nullcontext(), self._attention(PACKED) if packed else contextlib.nullcontext()

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        stream: Callable[[str], None] | None = None,
        samples: int = 1,
    ) -> list[list[int]]:
        """New tokens of each prompt up to a stop token, `samples` of each in turn; temperature 0 is greedy."""
        how = (self.stop_ids, max_new_tokens, temperature, top_p, seed, stream, self.context, samples)
        found: dict[int, list[list[int]]] = {}
        with self.generating():
            for some in batches(self.model, self.context, [len(p) for p in prompts], max_new_tokens):
                answers = generate(self.model, self.tokenizer, [prompts[i] for i in some], *how)
                found |= {i: answers[k * samples : (k + 1) * samples] for k, i in enumerate(some)}
        return [answer for i in range(len(prompts)) for answer in found[i]]

    @contextlib.contextmanager
    def generating(self) -> Iterator[None]:
        """Within: transformers' generate uses the model's own attention, masks and caches."""
        training = self.model.training  # where layers recompute, they keep no cache
        self.model.eval()
        try:
            with self._attention(self.own_attention):
                yield
        finally:
            self.model.train(training)
