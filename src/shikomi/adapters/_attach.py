"""Adapters on linear layers: which modules match, what they become, what is trained beside them, PEFT's names."""

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from shikomi.adapters._file import take_over
from shikomi.adapters._modules import LoraEmbedding, TrainedCopy
from shikomi.adapters._targets import pattern_of, saved_modules, targets
from shikomi.errors import BadInput, Problem
from shikomi.quant._linear import PlainLinear
from shikomi.quant._quantized import Quantized

if TYPE_CHECKING:
    from shikomi.adapters._adapter import Context
    from shikomi.adapters.lora import Lora, LoraLinear

PREFIX = "base_model.model."


@dataclass
class OnLayers:
    """What an adapter put on the layers of a model, by module path."""

    options: "Lora"
    lora: dict[str, "LoraLinear | LoraEmbedding"] = field(default_factory=dict)
    copies: dict[str, TrainedCopy] = field(default_factory=dict)
    biases: dict[str, tuple[nn.Parameter, Tensor]] = field(default_factory=dict)  # trained, and as loaded
    kept: dict[str, "LoraLinear"] = field(default_factory=dict)  # of an earlier adapter, frozen, on layers of its own
    merged: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)  # scaled A and B that are in the base now
    context: "Context | None" = None

    def parameters(self) -> dict[str, nn.Parameter]:
        """Trained parameters by the names that PEFT gives them in its file."""
        found: dict[str, nn.Parameter] = {}
        for path, module in self.lora.items():
            found |= {f"{PREFIX}{path}.{name}": p for name, p in module.own().items()}
        for path, copied in self.copies.items():
            found |= {f"{PREFIX}{path}.{name}": p for name, p in copied.copy.named_parameters()}
        for path, (parameter, _) in self.biases.items():
            found[f"{PREFIX}{path}"] = parameter
        return found

    def fixed(self) -> dict[str, Tensor]:
        """Tensors of the adapter that are not trained: the start of A and B, where that is a part of the base."""
        starts = {path: m.start for path, m in self.linears().items() if m.start is not None}
        names = (("start_A", 0), ("start_B", 1))
        return {f"{PREFIX}{path}.{name}": start[i] for path, start in starts.items() for name, i in names}

    def linears(self) -> dict[str, "LoraLinear"]:
        """The wrapped linear layers, without embeddings."""
        return {path: m for path, m in self.lora.items() if not isinstance(m, LoraEmbedding)}

    def wrapped(self) -> "dict[str, LoraLinear | LoraEmbedding]":
        """Every layer that is wrapped: by this adapter, or for an earlier one that is kept frozen."""
        return self.lora | self.kept

    def added(self) -> int:
        """How many of the trained numbers are no part of the base as loaded."""
        base = {id(p) for p, _ in self.biases.values()}
        return sum(p.numel() for p in self.parameters().values() if id(p) not in base)

    def export(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Fields of PEFT's config, and tensors by PEFT's names."""
        tensors = {name: p.detach() for name, p in self.parameters().items()}
        config = self.options.peft_config()
        wider, own = self.whole(), self.linears()
        if any(path not in own or a.shape[0] != own[path].r for path, (a, _) in wider.items()):
            ranks = {re.escape(path): a.shape[0] for path, (a, _) in wider.items()}
            config |= {"rank_pattern": ranks, "alpha_pattern": dict(ranks), "use_rslora": False}  # a scaling of 1
            config |= {"init_lora_weights": True, "target_modules": sorted(self.lora.keys() | wider.keys())}
            config |= {"exclude_modules": None, "layers_to_transform": None}
            for path, (a, b) in wider.items():
                tensors |= {f"{PREFIX}{path}.lora_A.weight": a, f"{PREFIX}{path}.lora_B.weight": b}
        return config, tensors

    def active(self) -> dict[str, tuple[Tensor, Tensor]]:
        """A and scaled B of what is beside the base's weights: this adapter, and an earlier one that is kept frozen."""
        found: dict[str, tuple[Tensor, Tensor]] = {}
        for path, module in (self.linears() | self.kept).items():
            a, b = module.factors()
            found[path] = (a, b * module.scaling)
        return found

    def whole(self) -> dict[str, tuple[Tensor, Tensor]]:
        """A and scaled B of the whole update of every linear layer against the model as it was loaded."""
        found = self.active()
        for path, (a, b) in self.merged.items():
            own = found.get(path)
            found[path] = (a, b) if own is None else (torch.cat([own[0], a]), torch.cat([own[1], b], 1))
        return found

    def bind_dropout(self, key: int | None) -> None:
        """Binds the dropout masks of every wrapped layer to one micro-batch; None switches dropout off."""
        for index, module in enumerate(self.lora.values()):
            module.key = None if key is None else (key * 1_000_003 + index) % (1 << 63)

    def load(self, tensors: dict[str, Tensor], source: str) -> None:
        """Takes over an adapter's tensors; raises BadInput for names or shapes that do not fit this model."""
        for path, module in self.lora.items():  # PEFT saves the base's embedding and head where they are adapted
            saved = tensors.get(f"{PREFIX}{path}.base_layer.weight")
            if saved is not None and saved.shape == module.inner.weight.shape:
                tensors = {k: t for k, t in tensors.items() if t is not saved}
                module.inner.weight.data.copy_(saved)
                if not isinstance(module, LoraEmbedding):
                    module.base_changed()
        take_over(self.parameters(), tensors, source)

    @contextlib.contextmanager
    def off(self) -> Iterator[None]:
        """Within: the model exactly as it was loaded."""
        with self.reference():
            self._frozen(False)
            try:
                yield
            finally:
                self._frozen(True)

    @contextlib.contextmanager
    def reference(self) -> Iterator[None]:
        """Within: what this adapter began on: the model as loaded, with an earlier adapter that is kept frozen."""
        modules = [*self.lora.values(), *self.copies.values()]
        trained = {path: parameter.detach().clone() for path, (parameter, _) in self.biases.items()}
        self._switch(modules, False, {path: loaded for path, (_, loaded) in self.biases.items()})
        try:
            yield
        finally:
            self._switch(modules, True, trained)

    def _switch(self, modules: list, enabled: bool, biases: dict[str, Tensor]) -> None:
        for module in modules:
            module.enabled = enabled
        with torch.no_grad():
            for path, value in biases.items():
                self.biases[path][0].copy_(value)

    def _frozen(self, enabled: bool) -> None:
        for module in self.linears().values():
            module.frozen_enabled = enabled
        for module in self.kept.values():
            module.enabled = enabled

    def take_off(self, model: nn.Module) -> None:
        """Puts the base's own modules back; what was trained of it in place (biases, whole modules) stays trained."""
        for path, module in self.wrapped().items():
            inner = module.inner
            assert isinstance(inner, nn.Module)
            _replace(model, path, inner)
        for path, copied in self.copies.items():
            _replace(model, path, copied.copy)

    def keep_frozen(self, model: nn.Module, earlier: dict[str, tuple[Tensor, Tensor]]) -> None:
        """Keeps an earlier adapter, A and scaled B by path, frozen under this one."""
        for path, (a, b) in earlier.items():
            own = self.linears().get(path)
            if own is not None:
                own.keep((a, b))
                continue
            module = self.options.wrap_frozen(model.get_submodule(path), a, b)
            self.kept[path] = module
            _replace(model, path, module)


def attach(model: nn.Module, options: "Lora", output_name: str | None, seed: int) -> OnLayers:
    """Wraps the modules of `model` that `options` names; returns what was put there.

    `output_name` is the head's path, which all-linear leaves out. Raises BadInput when nothing matches.
    """
    modules = dict(model.named_modules())
    names = targets(modules, options, output_name)
    attached = OnLayers(options)
    generator = torch.Generator().manual_seed(seed)
    for path in names:
        r = pattern_of(options.rank_pattern, path, options.r)
        scaling = options.scaling(int(r), pattern_of(options.alpha_pattern, path, options.lora_alpha))
        module = modules[path]
        wrapped: LoraLinear | LoraEmbedding
        if isinstance(module, PlainLinear):
            wrapped = options.wrap(module.base, int(r), scaling, generator)
        else:
            assert isinstance(module, nn.Embedding)
            wrapped = options.wrap_embedding(path, module, int(r), scaling, generator)
        attached.lora[path] = wrapped
        _replace(model, path, wrapped)
    _train_biases(model, modules, attached)
    for path in saved_modules(modules, options):
        if isinstance(modules[path], Quantized):
            fix = "name it in target_modules, or use quant: none"
            raise BadInput(
                [Problem(f"modules_to_save: {path} is stored in few bits and cannot be trained whole", fix=fix)]
            )
        attached.copies[path] = TrainedCopy(modules[path])
        _replace(model, path, attached.copies[path])
    return attached


def _train_biases(model: nn.Module, modules: dict[str, nn.Module], attached: OnLayers) -> None:
    if attached.options.bias == "none":
        return
    for path, module in modules.items():
        bias = module._parameters.get("bias")
        if bias is None or (attached.options.bias == "lora_only" and path not in attached.lora):
            continue
        bias.data = bias.data.float()
        bias.requires_grad_(True)
        name = f"{path}.base_layer.bias" if path in attached.lora else f"{path}.bias"
        attached.biases[name] = (bias, bias.detach().clone())


def _replace(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    model.get_submodule(parent)._modules[name] = module
