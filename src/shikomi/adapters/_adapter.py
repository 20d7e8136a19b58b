"""What every adapter gives and gets: options that attach themselves to a model, and what is then attached."""

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple, Protocol

from torch import Tensor, nn


class Capabilities(NamedTuple):
    """What an adapter promises; the contract tests hold it to this."""

    mergeable: bool  # its effect can be written into the base's weights
    starts_as_base: bool  # before the first step the model computes what it computed as loaded
    context: bool  # it changes what a segment sees before its first token (prefix, prompt)


class Shapes(Protocol):
    """A model as shapes, for plans: names are those of its modules, and no weight is there."""

    @property
    def hidden(self) -> int: ...

    @property
    def layers(self) -> int: ...

    @property
    def kv_heads(self) -> int: ...

    @property
    def head_dim(self) -> int: ...

    @property
    def head(self) -> str:
        """Name of the head."""

    @property
    def tensors(self) -> Mapping[str, tuple[int, ...]]:
        """Parameters by name, tied ones once, in the model's order."""

    @property
    def linears(self) -> Mapping[str, tuple[int, int]]:
        """(out, in) of every linear layer, the head among them."""

    @property
    def embeddings(self) -> Mapping[str, tuple[int, int]]:
        """(rows, width) of every embedding."""


class Reads(NamedTuple):
    """What an adapter's backward needs of the forward: names of linear layers, and how many sublayers."""

    inputs: frozenset[str] = frozenset()  # layers whose input it reads
    outputs: frozenset[str] = frozenset()  # layers whose output it reads
    sublayers: int = 0  # attention and feed-forward parts whose output (T, hidden) it reads


class Context(Protocol):
    """Virtual tokens that every segment without a parent sees before its own."""

    tokens: int

    def embeddings(self) -> Tensor | None:
        """Input embeddings (tokens, H) where the virtual tokens run through the model (prompt tuning)."""

    def keys_values(self) -> list[Tensor] | None:
        """Per layer keys and values (2, kv heads, tokens, D) in fp32, never rotated (prefix tuning)."""


class Attached(Protocol):
    """An adapter on a model."""

    @property
    def options(self) -> "Adapter":
        """What the recipe said of it."""

    @property
    def context(self) -> Context | None:
        """Virtual tokens, where the adapter has any."""

    def parameters(self) -> dict[str, nn.Parameter]:
        """Trained parameters by the names of the adapter's file."""

    def fixed(self) -> dict[str, Tensor]:
        """Tensors that belong to the adapter and are not trained; a checkpoint keeps them too."""

    def added(self) -> int:
        """How many of the trained numbers are no part of the base as loaded."""

    def export(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Settings and tensors of the final adapter as its file has them."""

    def load(self, tensors: dict[str, Tensor], source: str) -> None:
        """Takes over an adapter's tensors; raises BadInput for names or shapes that do not fit this model."""

    def off(self) -> contextlib.AbstractContextManager[None]:
        """Within: the model exactly as it was loaded."""

    def bind_dropout(self, key: int | None) -> None:
        """Dropout masks of the next forward and its backward; None: no dropout."""


class Adapter(Protocol):
    """The options of an adapter: a frozen class, one file each."""

    name: ClassVar[str]
    capabilities: ClassVar[Capabilities]

    def attach(self, model: nn.Module, output_name: str | None, seed: int, tokenizer: Any) -> Attached | None:
        """Puts the adapter on a model whose linear layers are replaced; None where nothing is beside the base.

        `output_name` is the head's path, which all-linear leaves out; `tokenizer` is the model's, None where only
        parameters are counted. Raises BadInput for a model that it cannot serve.
        """


class Declares(ABC):
    """What the options of an adapter say of its costs on a model that is known by its shapes only.

    What is not overridden is that of an adapter beside the base that starts as nothing and reads nothing of it.
    """

    @abstractmethod
    def trained_shapes(self, model: Shapes) -> dict[str, tuple[int, ...]]:
        """What it would train, by the names of its parameters, as `attach` would; in fp32. Raises BadInput alike."""

    def frozen_numbers(self, model: Shapes) -> int:
        """Further numbers in fp32 that it keeps beside the model and does not train."""
        return 0

    @property
    def off_is_start(self) -> bool:
        """Whether the reference of a fresh one is the model with it switched off, and so needs no copy."""
        return True

    def reads(self, model: Shapes) -> Reads:
        """What is kept of the forward for its gradients."""
        return Reads()
