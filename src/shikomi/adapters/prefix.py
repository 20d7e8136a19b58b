"""Prefix tuning: trained keys and values before every sequence in each layer (Li and Liang 2021, arXiv:2101.00190)."""

import math
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from torch.nn import functional as F

from shikomi.adapters._adapter import Attached, Capabilities, Declares, Shapes
from shikomi.adapters._context import SAVED, OnContext, first_of
from shikomi.errors import BadInput, Problem


@dataclass(frozen=True)
class Prefix(Declares):
    """Every layer attends to [P_K; K] and [P_V; V]; P stands for num_virtual_tokens tokens (section 4.2).

    With prefix_projection P = MLP(P') (section 4.3): tanh between two linear maps, shared by all tokens; only the
    keys and values that it makes are in the final adapter. Names are those of PEFT's `PrefixTuningConfig`.
    """

    name: ClassVar[str] = "prefix"
    capabilities: ClassVar[Capabilities] = Capabilities(mergeable=False, starts_as_base=False, context=True)

    num_virtual_tokens: Annotated[int, Field(ge=1, le=4096, description="virtual tokens before every sequence")] = 20
    prefix_projection: Annotated[
        bool, Field(description="train a smaller matrix and an MLP that makes keys and values of it")
    ] = False
    encoder_hidden_size: Annotated[
        int | None, Field(ge=1, description="width of that MLP; default: that of a layer's keys")
    ] = None
    init_weights: Annotated[
        Literal["zero"] | None, Field(description="zero: keys and values start at zero; default: normal, deviation 1")
    ] = None

    def __post_init__(self) -> None:
        if self.encoder_hidden_size is not None and not self.prefix_projection:
            fix = "add prefix_projection: true, or delete encoder_hidden_size"
            raise BadInput([Problem("encoder_hidden_size has no effect without prefix_projection", fix=fix)])

    def attach(self, model: nn.Module, output_name: str | None, seed: int, tokenizer: Any) -> Attached:
        """Makes the keys and values; the model stays as it is. Raises BadInput for a model without such layers."""
        layers, heads, width = _shape(model)
        hidden = self.encoder_hidden_size or heads * width
        embedding = model.get_input_embeddings()  # type: ignore[operator]
        parameters = self._start(layers * 2 * heads * width, heads * width, hidden, seed)
        moved = {name: nn.Parameter(p.to(embedding.weight.device)) for name, p in parameters.items()}
        config = {
            "peft_type": "PREFIX_TUNING",
            "num_virtual_tokens": self.num_virtual_tokens,
            "prefix_projection": self.prefix_projection,
            "encoder_hidden_size": hidden,
            "init_weights": self.init_weights,
            "token_dim": heads * width,
            "num_layers": layers,
            "num_attention_heads": heads,
        }
        return OnContext(self, KeysValues(moved, layers, heads, width), config)

    def trained_shapes(self, model: Shapes) -> dict[str, tuple[int, ...]]:
        """Keys and values of every layer, or the parts that make them."""
        narrow = model.kv_heads * model.head_dim
        wide, hidden = model.layers * 2 * narrow, self.encoder_hidden_size or narrow
        if not self.prefix_projection:
            return {SAVED: (self.num_virtual_tokens, wide)}
        return {
            "embedding.weight": (self.num_virtual_tokens, narrow),
            "transform.0.weight": (hidden, narrow),
            "transform.0.bias": (hidden,),
            "transform.2.weight": (wide, hidden),
            "transform.2.bias": (wide,),
        }

    def _start(self, wide: int, narrow: int, hidden: int, seed: int) -> dict[str, Tensor]:
        """Parameters before the first step, drawn in PEFT's order: of `prompt_embeddings`, or of matrix and MLP."""
        generator = torch.Generator().manual_seed(seed)
        zero = self.init_weights == "zero"
        if not self.prefix_projection:
            start = torch.empty(self.num_virtual_tokens, wide).normal_(generator=generator)
            return {SAVED: torch.zeros_like(start) if zero else start}
        found = {"embedding.weight": torch.empty(self.num_virtual_tokens, narrow).normal_(generator=generator)}
        for name, inputs, outputs in (("transform.0", narrow, hidden), ("transform.2", hidden, wide)):
            weight = torch.empty(outputs, inputs)
            nn.init.kaiming_uniform_(weight, a=math.sqrt(5), generator=generator)
            bound = 1 / math.sqrt(inputs)
            bias = torch.empty(outputs).uniform_(-bound, bound, generator=generator)
            found |= {f"{name}.weight": weight, f"{name}.bias": bias}
        if zero:
            found["transform.2.weight"].zero_()
            found["transform.2.bias"].zero_()
        return found


def _shape(model: nn.Module) -> tuple[int, int, int]:
    """Layers, heads of the keys, and width of such a head, by PEFT's rule."""
    settings = model.config.to_dict()  # type: ignore[operator, union-attr]
    heads = first_of(settings, "num_attention_heads", "n_head", "num_heads")
    if heads is None or first_of(settings, "num_kv_shared_layers"):
        kind = type(model).__name__
        why = "has no attention" if heads is None else "shares keys and values between layers"
        fix = "use adapter: prompt, or adapter: lora"
        raise BadInput([Problem(f"adapter: prefix cannot serve {kind}: it {why}", fix=fix)])
    hidden = int(settings.get("hidden_size") or settings["n_embd"])
    width = first_of(settings, "head_dim") if "num_key_value_heads" in settings else None
    kv_heads = first_of(settings, "num_key_value_heads") or heads
    return int(first_of(settings, "num_hidden_layers", "n_layer") or 0), kv_heads, width or hidden // heads


class KeysValues:
    """Trained keys and values of every layer, fp32 masters: `prompt_embeddings` (tokens, layers * 2 * heads * D).

    With a projection: `embedding.weight` (tokens, heads * D) and the MLP `transform.0`, tanh, `transform.2`.
    """

    def __init__(self, parameters: dict[str, nn.Parameter], layers: int, heads: int, width: int):
        self.parameters, self.layers, self.heads, self.width = parameters, layers, heads, width
        self.tokens = next(iter(parameters.values())).shape[0]

    def embeddings(self) -> Tensor | None:
        return None

    def keys_values(self) -> list[Tensor] | None:
        flat = self.flat().view(self.tokens, self.layers, 2, self.heads, self.width)
        return list(flat.permute(1, 2, 3, 0, 4).unbind(0))  # each (2, heads, tokens, D)

    def own(self) -> dict[str, nn.Parameter]:
        return dict(self.parameters)

    def flat(self) -> Tensor:
        p = self.parameters
        if SAVED in p:
            return p[SAVED]
        inner = torch.tanh(F.linear(p["embedding.weight"], p["transform.0.weight"], p["transform.0.bias"]))
        return F.linear(inner, p["transform.2.weight"], p["transform.2.bias"])
