"""A causal language model with its adapter: scores packed micro-batches; the one object that the stages below use."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from shikomi.adapters._attach import Attached, TrainedCopy, keyed
from shikomi.data.packing import Packed
from shikomi.model import attention, fused
from shikomi.model.device import Dtypes
from shikomi.model.generate import generate
from shikomi.model.logprobs import Scored, Shape, log_probabilities

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
        """Trained parameters; an adapter's by the names of its file, a full model's by their own."""
        if self.attached is not None:
            return self.attached.parameters()
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    @property
    def trainable_parameters(self) -> int:
        return sum(p.numel() for p in self.trainable().values())

    @property
    def total_parameters(self) -> int:
        """Parameters of the base as loaded, tied ones once."""
        added = {id(p) for p in self.attached.parameters().values()} if self.attached else set()
        if self.attached:
            added -= {id(p) for p, _ in self.attached.biases.values()}
        return sum(p.numel() for p in self.model.parameters() if id(p) not in added)

    def parameter_line(self) -> str:
        """What PEFT's print_trainable_parameters says: there the total includes the adapter."""
        trained, total = self.trainable_parameters, self.total_parameters
        if self.attached:
            total += trained - sum(p.numel() for p, _ in self.attached.biases.values())
        return f"trainable params: {trained:,} || all params: {total:,} || trainable%: {100 * trained / total:.4f}"

    def adapter_off(self) -> contextlib.AbstractContextManager[None]:
        """Within: the model as it was loaded."""
        return self.attached.off() if self.attached is not None else contextlib.nullcontext()

    def bind_dropout(self, key: int | None) -> None:
        """Dropout masks of the next forward and its backward; None: no dropout."""
        if self.attached is not None:
            keyed(self.attached, key)

    def score(self, packed: Packed) -> Scored:
        """Log-probabilities of the scored tokens of a micro-batch, with autograd where it is enabled."""
        packed = packed.to(self.device)
        if self.path == "separate":
            rows, scored = self._separate(packed)
        else:
            rows, scored = self.hidden(packed), packed.scored
        return Scored(log_probabilities(rows, scored, packed.targets, self.head, self.shape), packed.segment)

    def hidden(self, packed: Packed) -> Tensor:
        """Hidden states (T, H) after the final norm of a packed row, on the fused or the packed path."""
        plan = attention.layout(packed)
        embeds = self.model.get_input_embeddings()(packed.ids)  # (T, H)
        if self.path == "fused" and self.blocks is not None:
            cos, sin = self.decoder.rotary_emb(embeds[None], position_ids=packed.positions[None])
            half = cos.shape[-1] // 2
            h = self.blocks.forward(embeds, cos[0, :, :half], sin[0, :, :half], plan, self.recompute)
            return self.decoder.norm(h)
        with self._attention(PACKED):
            out = self.decoder(
                inputs_embeds=embeds[None], position_ids=packed.positions[None], use_cache=False, packed_layout=plan
            )
        return out.last_hidden_state[0]

    def _separate(self, packed: Packed) -> tuple[Tensor, Tensor]:
        """Hidden states of the scored rows (N, H), each chain of segments computed by itself."""
        offsets, rows = packed.offsets, packed.scored.tolist()
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
            return self.decoder(input_ids=ids[None], use_cache=False).last_hidden_state[0]

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

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        stream: Callable[[str], None] | None = None,
    ) -> list[list[int]]:
        """New tokens of each prompt up to a stop token; temperature 0 is greedy."""
        with self.generating():
            return generate(
                self.model, self.tokenizer, prompts, self.stop_ids, max_new_tokens, temperature, top_p, seed, stream
            )

    def generating(self) -> contextlib.AbstractContextManager[None]:
        """Within: transformers' generate uses the model's own attention and masks."""
        return self._attention(self.own_attention)
