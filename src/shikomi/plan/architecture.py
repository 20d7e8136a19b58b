"""What a model is made of, by arithmetic on its config.json: no model is built, no weight is read.

Names and shapes are those of transformers' own modules, tied weights once, so that an adapter's `target_modules` and an
optimizer's rules mean here what they mean on the model. `plan/families.py` knows how each model type is put together.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

from shikomi.errors import BadInput, Problem, nearest
from shikomi.plan.families import FAMILIES
from shikomi.plan.layers import Fields, Parts, Size

SCORE = "score.weight"  # of the scalar head of a reward model
SHIPPED = Path(__file__).parent / "architectures"


@dataclass(frozen=True)
class Architecture:
    """A causal language model as shapes. `path` is how a packed row is computed, unless rotary limits forbid it."""

    name: str
    model_type: str
    size: Size
    path: str  # "fused", "packed" or "separate", as in model/language_model.py
    tensors: Mapping[str, tuple[int, ...]]  # every parameter by its name, in the model's order, tied ones once
    linears: Mapping[str, tuple[int, int]]  # (out, in) of every linear map by its module's name, the head's too
    embeddings: Mapping[str, tuple[int, int]]  # (rows, width) by the module's name
    head: str  # module name of the head
    tied: bool
    attention_layers: int
    gated: bool  # the feed-forward part has gate and up
    positions: int | None  # rows of a learned position table
    window: int | None  # of sliding attention
    rope_limit: int | None  # tokens beyond which rotary embeddings depend on the longest sequence of a row
    experts: int = 0
    experts_per_token: int = 0
    expert_width: int = 0
    config: Mapping[str, Any] | None = None

    @cached_property
    def parameters(self) -> int:
        """Of the model as loaded, tied ones once."""
        return sum(prod(shape) for shape in self.tensors.values())

    @property
    def hidden(self) -> int:
        return self.size.hidden

    @property
    def layers(self) -> int:
        return self.size.layers

    @property
    def heads(self) -> int:
        return self.size.heads

    @property
    def kv_heads(self) -> int:
        return self.size.kv_heads

    @property
    def head_dim(self) -> int:
        return self.size.head_dim

    @property
    def intermediate(self) -> int:
        return self.size.intermediate

    @property
    def vocabulary(self) -> int:
        return self.size.vocabulary

    @cached_property
    def expert_parameters(self) -> int:
        """Of all experts: matrices that are no linear module, but one tensor of three dimensions."""
        return sum(prod(shape) for name, shape in self.tensors.items() if ".experts." in name)

    @cached_property
    def body_parameters(self) -> int:
        """Matrix elements that every token is multiplied with, without the head: of experts the chosen ones."""
        dense = sum(out * width for name, (out, width) in self.linears.items() if name != self.head)
        share = self.experts_per_token / self.experts if self.experts else 0.0
        return dense + round(self.expert_parameters * share)

    @property
    def head_parameters(self) -> int:
        """Matrix elements that every scored token is multiplied with."""
        out, width = self.linears[self.head]
        return out * width

    def as_reward(self) -> Architecture:
        """With a scalar head in the place of that for tokens, as model/heads.py puts one."""
        tensors = {name: shape for name, shape in self.tensors.items() if name != f"{self.head}.weight"}
        return replace(self, tied=True, tensors={**tensors, SCORE: (1, self.hidden)})

    def path_at(self, max_length: int) -> str:
        """`path` for sequences of at most `max_length` tokens."""
        return "separate" if self.rope_limit is not None and max_length > self.rope_limit else self.path


def architecture(config: Mapping[str, Any], name: str = "") -> Architecture:
    """The architecture of a config.json. Raises BadInput for an unknown model type and for missing fields."""
    model_type = config.get("model_type")
    family = FAMILIES.get(str(model_type))
    if family is None:
        known, close = ", ".join(sorted(FAMILIES)), nearest(str(model_type), FAMILIES)
        fix = f"did you mean {close}?" if close else "train it; the plan is for these model types"
        what = "no plan for this architecture"
        raise BadInput([Problem(what, name or None, found=f"model_type: {model_type!r}", allowed=known, fix=fix)])
    fields = Fields(config, str(model_type))
    parts = Parts()
    size, path, more = family(fields, parts)
    if wrong := fields.problems():
        raise BadInput([Problem(what, name or "config.json", found=f"model_type: {model_type}") for what in wrong])
    tied = parts.tie(bool(fields.get("tie_word_embeddings", more.pop("tied", False))), size)
    return Architecture(
        name=name or str(model_type),
        model_type=str(model_type),
        size=size,
        path=path,
        tensors=parts.tensors,
        linears=parts.linears,
        embeddings=parts.embeddings,
        head=parts.head,
        tied=tied,
        rope_limit=fields.rope_limit(),
        config=config,
        **{"attention_layers": size.layers, "gated": True, "positions": None, "window": None, **more},
    )


def known_names() -> list[str]:
    """The public models whose config files ship with this package."""
    return sorted(path.stem for path in SHIPPED.glob("*.json"))


def known(name: str) -> Architecture:
    """A public model by its name, such as qwen3-8b. Raises BadInput with the nearest name."""
    names = known_names()
    if name not in names:
        close = nearest(name, names)
        fix = f"did you mean {close}?" if close else "give the folder of a model"
        raise BadInput([Problem(f"no shipped architecture is called {name!r}", allowed=", ".join(names), fix=fix)])
    return architecture(json.loads((SHIPPED / f"{name}.json").read_text(encoding="utf-8")), name)


def of_folder(folder: Path) -> Architecture:
    """The architecture of a model folder. Raises BadInput where its config.json is missing or not readable."""
    from shikomi.model.check import read_config

    problems: list[Problem] = []
    config = read_config(folder, problems)
    if problems:
        raise BadInput(problems)
    return architecture(config, str(folder))
