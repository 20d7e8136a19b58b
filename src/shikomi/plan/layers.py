"""What the model types are described with: the fields of a config.json, and parameters in the making."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple


class Size(NamedTuple):
    """The numbers that memory and time depend on."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int


class Fields:
    """The fields of a config.json; what is missing is collected, so that one error names all of it."""

    def __init__(self, config: Mapping[str, Any], model_type: str):
        self.config, self.model_type = config, model_type
        self.missing: list[str] = []
        self.wrong: list[str] = []

    def need(self, *names: str) -> int:
        """A count under the first of these names that is there; 1 after a missing or nonsensical one is noted."""
        for name in names:
            value = self.config.get(name)
            if value is not None:
                if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                    self.wrong.append(f"{name} is {value!r}: a whole number above zero is needed")
                    return 1
                return value
        self.missing.append(names[0])
        return 1

    def get(self, name: str, default: Any) -> Any:
        """A field, or its default where it is absent or null."""
        value = self.config.get(name)
        return default if value is None else value

    def count(self, name: str, default: int) -> int:
        """A count that may be absent."""
        return default if self.config.get(name) is None else self.need(name)

    def problems(self) -> list[str]:
        """What is missing or nonsense, in words."""
        missing = [f"config.json lacks {', '.join(dict.fromkeys(self.missing))}"] if self.missing else []
        return missing + list(dict.fromkeys(self.wrong))

    def rope_limit(self) -> int | None:
        """Tokens beyond which long-rope or dynamic rotary factors follow the longest sequence; None for others."""
        rope = self.config.get("rope_parameters") or self.config.get("rope_scaling") or {}
        for part in [rope, *[r for r in rope.values() if isinstance(r, dict)]]:
            if part.get("rope_type", part.get("type", "default")) in ("longrope", "dynamic"):
                trained = part.get("original_max_position_embeddings")
                trained = trained or self.config.get("original_max_position_embeddings")
                return int(trained or self.config.get("max_position_embeddings", 0))
        return None


@dataclass
class Parts:
    """Parameters in the making, in the order of the model's modules."""

    tensors: dict[str, tuple[int, ...]] = field(default_factory=dict)
    linears: dict[str, tuple[int, int]] = field(default_factory=dict)
    embeddings: dict[str, tuple[int, int]] = field(default_factory=dict)
    head: str = "lm_head"

    def embedding(self, path: str, rows: int, width: int) -> None:
        self.embeddings[path] = (rows, width)
        self.tensors[f"{path}.weight"] = (rows, width)

    def linear(self, path: str, out: int, width: int, bias: bool = False, transposed: bool = False) -> None:
        self.linears[path] = (out, width)
        self.tensors[f"{path}.weight"] = (width, out) if transposed else (out, width)
        if bias:
            self.tensors[f"{path}.bias"] = (out,)

    def norm(self, path: str, width: int, bias: bool = False) -> None:
        self.tensors[f"{path}.weight"] = (width,)
        if bias:
            self.tensors[f"{path}.bias"] = (width,)

    def tensor(self, name: str, *shape: int) -> None:
        self.tensors[name] = shape

    def experts(self, path: str, count: int, hidden: int, width: int) -> None:
        self.tensor(f"{path}.gate_up_proj", count, 2 * width, hidden)
        self.tensor(f"{path}.down_proj", count, hidden, width)

    def tie(self, tied: bool, size: Size) -> bool:
        """Adds the head, as the input embedding where they are tied."""
        width = next(iter(self.embeddings.values()))[1]
        self.linears[self.head] = (size.vocabulary, width)
        if not tied:
            self.tensors[f"{self.head}.weight"] = (size.vocabulary, width)
        return tied


Described = tuple[Size, str, dict[str, Any]]  # size, path, further fields of Architecture
Family = Callable[[Fields, Parts], Described]


def size_of(f: Fields, head_dim: int | None = None) -> Size:
    """The numbers of a Llama-like configuration."""
    hidden, heads = f.need("hidden_size"), f.need("num_attention_heads")
    return Size(
        hidden=hidden,
        layers=f.need("num_hidden_layers"),
        heads=heads,
        kv_heads=f.count("num_key_value_heads", heads),
        head_dim=f.count("head_dim", head_dim or hidden // heads),
        intermediate=f.need("intermediate_size"),
        vocabulary=f.need("vocab_size"),
    )


def attention(p: Parts, at: str, s: Size, qkv_bias: bool = False, out_bias: bool = False, out: str = "o_proj") -> None:
    for name, heads in (("q_proj", s.heads), ("k_proj", s.kv_heads), ("v_proj", s.kv_heads)):
        p.linear(f"{at}.{name}", heads * s.head_dim, s.hidden, qkv_bias)
    p.linear(f"{at}.{out}", s.hidden, s.heads * s.head_dim, out_bias)


def mlp(p: Parts, at: str, hidden: int, width: int, bias: bool = False) -> None:
    p.linear(f"{at}.gate_proj", width, hidden, bias)
    p.linear(f"{at}.up_proj", width, hidden, bias)
    p.linear(f"{at}.down_proj", hidden, width, bias)


NORMS = ("input_layernorm", "post_attention_layernorm")
