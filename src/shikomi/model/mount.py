"""Several adapters on one loaded base, one in force at a time: putting an adapter on and taking it off is exact.

While an adapter attaches, what it changes in the model is written down: which module stands where, and which of the
base's own tensors it trains in place. Taking it off puts the very same modules and tensors back; nothing is computed,
and every adapter keeps its fused blocks, so that a switch costs less than a millisecond.
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from shikomi.adapters._adapter import Adapter, Attached, Capabilities
from shikomi.adapters._attach import PREFIX, OnLayers
from shikomi.model import fused
from shikomi.model.language_model import LanguageModel
from shikomi.model.load import attach_to
from shikomi.model.probe import choose_path


@dataclass
class Recorded:
    """An adapter that, when it attaches, notes what it changes in the model."""

    name: ClassVar[str] = "recorded"
    capabilities: ClassVar[Capabilities] = Capabilities(mergeable=False, starts_as_base=False, context=False)
    options: Adapter
    children: list[tuple[nn.Module, str, nn.Module, nn.Module]] = field(default_factory=list)  # parent, name, base, own
    values: list[tuple[nn.Parameter, Tensor]] = field(default_factory=list)  # trained in place, and as loaded
    attached: Attached | None = None

    def attach(self, model: nn.Module, output_name: str | None, seed: int, tokenizer: Any) -> Attached | None:
        """Attaches the adapter; where that fails, the model is as it was."""
        before = {module: dict(module._modules) for module in model.modules()}
        loaded = {id(p): (p, p.data) for p in model.parameters()}
        try:
            self.attached = self.options.attach(model, output_name, seed, tokenizer)
        finally:
            for parent, children in before.items():
                for name, child in children.items():
                    own = parent._modules[name]
                    if own is not child:
                        assert child is not None and own is not None
                        self.children.append((parent, name, child, own))
            if self.attached is None:
                self._put_back()
        if self.attached is not None:
            for parameter in self.attached.parameters().values():
                if id(parameter) in loaded:
                    self._in_place(*loaded[id(parameter)])
        return self.attached

    def load(self, tensors: dict[str, Tensor], source: str) -> None:
        """Takes over an adapter's tensors; raises BadInput where they do not fit."""
        assert self.attached is not None
        for parameter, saved in self._base_weights(tensors):
            if parameter.shape == saved.shape and not torch.equal(saved.to(parameter), parameter):
                self._in_place(parameter, parameter.data)
        self.attached.load(tensors, source)
        for parameter in self.attached.parameters().values():
            parameter.requires_grad_(False)

    def _base_weights(self, tensors: dict[str, Tensor]) -> list[tuple[nn.Parameter, Tensor]]:
        """Weights of the base that PEFT saved beside the adapter: loading writes them over the base's."""
        layers = self.attached.lora if isinstance(self.attached, OnLayers) else {}
        pairs = [(module.inner.weight, tensors.get(f"{PREFIX}{p}.base_layer.weight")) for p, module in layers.items()]
        return [(w, saved) for w, saved in pairs if saved is not None and isinstance(w, nn.Parameter)]

    def _in_place(self, parameter: nn.Parameter, loaded: Tensor) -> None:
        """From now on the adapter has a tensor of its own there, and the base's stays what it is."""
        if parameter.data_ptr() == loaded.data_ptr():
            parameter.data = parameter.data.clone()
        self.values.append((parameter, loaded))

    def _put_back(self) -> None:
        for parent, name, child, _ in self.children:
            parent._modules[name] = child
        for parameter, loaded in self.values:
            parameter.data = loaded


@dataclass(eq=False)
class Mount:
    """What a language model is made of while one adapter is in force; without one: the base."""

    attached: Attached | None
    children: list[tuple[nn.Module, str, nn.Module, nn.Module]]  # parent, name, the base's child, the adapter's
    values: list[tuple[nn.Parameter, Tensor, Tensor]]  # parameter, as loaded, the adapter's
    path: str
    path_reason: str
    blocks: fused.Blocks | None

    def put_on(self, lm: LanguageModel) -> None:
        """Puts the adapter on a model that has none on."""
        assert lm.attached is None
        for parent, name, _, own in self.children:
            parent._modules[name] = own
        for parameter, _, own_value in self.values:
            parameter.data = own_value
        lm.attached, lm.path, lm.path_reason, lm.blocks = self.attached, self.path, self.path_reason, self.blocks

    def take_off(self, lm: LanguageModel) -> None:
        """The base as it was loaded, module for module; its path is to be chosen or put on."""
        assert lm.attached is self.attached
        for parent, name, child, _ in self.children:
            parent._modules[name] = child
        for parameter, loaded, _ in self.values:
            parameter.data = loaded
        lm.attached = None


def mounted(lm: LanguageModel, recorded: Recorded | None) -> Mount:
    """What is in force in `lm` now: the adapter that was recorded while it attached, None for the base."""
    if recorded is None:
        return Mount(None, [], [], lm.path, lm.path_reason, lm.blocks)
    values = [(parameter, loaded, parameter.data) for parameter, loaded in recorded.values]
    return Mount(recorded.attached, recorded.children, values, lm.path, lm.path_reason, lm.blocks)


def mount(
    lm: LanguageModel, options: Adapter, tensors: dict[str, Tensor], source: str, tokenizer: Any, max_length: int
) -> Mount:
    """Puts a saved adapter on a model that has none on, as `load_model` does, and takes it into force.

    Raises BadInput for an adapter that does not fit; the model is then without one.
    """
    recorded = Recorded(options)
    lm.attached = attach_to(lm.model, tokenizer, recorded, lm.dtypes, 0)
    try:
        lm.blocks = None
        choose_path(lm, max_length)
        recorded.load(tensors, source)
    except BaseException:
        mounted(lm, recorded).take_off(lm)
        raise
    return mounted(lm, recorded)


def choose_base(lm: LanguageModel, max_length: int) -> Mount:
    """The base without an adapter, with the path that suits it."""
    lm.blocks = None
    choose_path(lm, max_length)
    return mounted(lm, None)
