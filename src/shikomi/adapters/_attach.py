"""Putting an adapter on a model and taking its state off again: which modules match, what they become, PEFT's names."""

import contextlib
import copy
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shikomi.adapters.lora import Lora, LoraLinear
from shikomi.errors import BadInput, Problem, nearest
from shikomi.quant._dense import Dense

PREFIX = "base_model.model."
BARE = ("dt_proj",)  # Mamba layers read this weight instead of calling the layer: an update beside it has no effect


class LoraEmbedding(nn.Module):
    """An embedding with a low-rank update: W[ids] + scaling * B A[:, ids]; A (r, vocabulary) starts at zero."""

    def __init__(self, base: nn.Embedding, r: int, scaling: float, generator: torch.Generator):
        super().__init__()
        self.inner, self.scaling, self.enabled = base, scaling, True
        self.lora_embedding_A = nn.Parameter(torch.zeros(r, base.num_embeddings, device=base.weight.device))
        b = torch.empty(base.embedding_dim, r).normal_(generator=generator)
        self.lora_embedding_B = nn.Parameter(b.to(base.weight.device))

    @property
    def weight(self) -> Tensor:
        return self.inner.weight

    def forward(self, ids: Tensor) -> Tensor:
        y = self.inner(ids)
        if not self.enabled:
            return y
        a, b = self.lora_embedding_A.to(y.dtype), self.lora_embedding_B.to(y.dtype)
        return y + F.linear(F.embedding(ids, a.t()), b) * self.scaling


class TrainedCopy(nn.Module):
    """A module that is trained whole (`modules_to_save`) beside the one that was loaded."""

    def __init__(self, original: nn.Module):
        super().__init__()
        self.original = original
        self.copy = copy.deepcopy(original)
        self.enabled = True
        for parameter in self.copy.parameters():
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)

    @property
    def active(self) -> nn.Module:
        return self.copy if self.enabled else self.original

    @property
    def weight(self) -> Tensor:
        return self.active.weight  # type: ignore[return-value]

    def forward(self, *args, **kwargs):
        return self.active(*args, **kwargs)

    # Something linear, where the module is

    @property
    def base(self) -> Dense:
        assert isinstance(self.active, Dense)
        return self.active

    @property
    def in_features(self) -> int:
        return self.base.in_features

    @property
    def out_features(self) -> int:
        return self.base.out_features

    @property
    def needs_input(self) -> bool:
        return self.base.needs_input

    def trained(self) -> list[nn.Parameter]:
        return self.base.trained()

    def add_delta(self, y: Tensor, x: Tensor) -> None:
        return self.base.add_delta(y, x)

    def delta_gradients(self, dx: Tensor | None, dy: Tensor, x: Tensor | None) -> list[Tensor]:
        return self.base.delta_gradients(dx, dy, x)


@dataclass
class Attached:
    """What an adapter put on a model, by module path."""

    options: Lora
    lora: dict[str, LoraLinear | LoraEmbedding] = field(default_factory=dict)
    copies: dict[str, TrainedCopy] = field(default_factory=dict)
    biases: dict[str, tuple[nn.Parameter, Tensor]] = field(default_factory=dict)  # trained, and as loaded

    def parameters(self) -> dict[str, nn.Parameter]:
        """Trained parameters by the names that PEFT gives them in its file."""
        found: dict[str, nn.Parameter] = {}
        for path, module in self.lora.items():
            if isinstance(module, LoraLinear):
                found[f"{PREFIX}{path}.lora_A.weight"] = module.lora_A
                found[f"{PREFIX}{path}.lora_B.weight"] = module.lora_B
            else:
                found[f"{PREFIX}{path}.lora_embedding_A"] = module.lora_embedding_A
                found[f"{PREFIX}{path}.lora_embedding_B"] = module.lora_embedding_B
        for path, copied in self.copies.items():
            found |= {f"{PREFIX}{path}.{name}": p for name, p in copied.copy.named_parameters()}
        for path, (parameter, _) in self.biases.items():
            found[f"{PREFIX}{path}"] = parameter
        return found

    def load(self, tensors: dict[str, Tensor], source: str) -> None:
        """Takes over an adapter's tensors; raises BadInput for names or shapes that do not fit this model."""
        mine = self.parameters()
        for path, module in self.lora.items():  # PEFT saves the base's embedding and head where they are adapted
            saved = tensors.get(f"{PREFIX}{path}.base_layer.weight")
            if saved is not None and saved.shape == module.inner.weight.shape:
                tensors = {k: t for k, t in tensors.items() if t is not saved}
                module.inner.weight.data.copy_(saved)
        problems = []
        for name in sorted(mine.keys() - tensors.keys()):
            problems.append(Problem(f"the adapter lacks {name}", file=source))
        for name in sorted(tensors.keys() - mine.keys()):
            problems.append(Problem(f"the adapter has {name}, which this model has no place for", file=source))
        for name in sorted(mine.keys() & tensors.keys()):
            if mine[name].shape != tensors[name].shape:
                found, want = tuple(tensors[name].shape), tuple(mine[name].shape)
                problems.append(
                    Problem(f"{name} has the wrong shape", file=source, found=str(found), allowed=str(want))
                )
        if problems:
            raise BadInput([*problems[:10], Problem("is this an adapter for another base model?", file=source)])
        with torch.no_grad():
            for name, parameter in mine.items():
                parameter.copy_(tensors[name])

    @contextlib.contextmanager
    def off(self) -> Iterator[None]:
        """Within: the model exactly as it was loaded."""
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


def attach(model: nn.Module, options: Lora, output_name: str | None, seed: int) -> Attached:
    """Wraps the modules of `model` that `options` names; returns what was put there.

    `output_name` is the head's path, which all-linear leaves out. Raises BadInput when nothing matches.
    """
    modules = dict(model.named_modules())
    names = _targets(modules, options, output_name)
    attached = Attached(options)
    generator = torch.Generator().manual_seed(seed)
    for path in names:
        r = _pattern(options.rank_pattern, path, options.r)
        scaling = options.scaling(int(r), _pattern(options.alpha_pattern, path, options.lora_alpha))
        module = modules[path]
        wrapped: LoraLinear | LoraEmbedding
        if isinstance(module, Dense):
            wrapped = LoraLinear(module, int(r), scaling, options.lora_dropout, options.init_lora_weights, generator)
        else:
            assert isinstance(module, nn.Embedding)
            wrapped = LoraEmbedding(module, int(r), scaling, generator)
        attached.lora[path] = wrapped
        _replace(model, path, wrapped)
    _train_biases(model, modules, attached)
    for path in _saved_modules(modules, options):
        attached.copies[path] = TrainedCopy(modules[path])
        _replace(model, path, attached.copies[path])
    return attached


def _targets(modules: dict[str, nn.Module], options: Lora, output_name: str | None) -> list[str]:
    usable = {path for path, m in modules.items() if isinstance(m, Dense | nn.Embedding)}
    want = options.target_modules
    if want == "all-linear":
        found = [p for p in modules if p in usable and isinstance(modules[p], Dense) and p != output_name]
        found = [p for p in found if not p.endswith(BARE)]
    else:
        found = [p for p in modules if p in usable and _matches(want, p)]
    if options.exclude_modules:
        found = [p for p in found if not _matches(options.exclude_modules, p)]
    if options.layers_to_transform is not None:
        layers = {str(i) for i in options.layers_to_transform}
        found = [p for p in found if layers & set(re.findall(r"\.(\d+)\.", p)[:1])]
    known = sorted({p.rsplit(".", 1)[-1] for p in usable})
    for name in want if isinstance(want, list) else []:
        if not any(_matches([name], p) for p in usable):
            close = nearest(name, known)
            raise BadInput(
                [
                    Problem(
                        f"target_modules: no linear or embedding module is named {name!r}",
                        allowed=", ".join(known),
                        fix=f"did you mean {close!r}?" if close else "use all-linear",
                    )
                ]
            )
    if not found:
        raise BadInput(
            [
                Problem(
                    "target_modules match no module of this model",
                    found=str(want),
                    allowed=", ".join(known),
                    fix="use all-linear, or a list of these names",
                )
            ]
        )
    return found


def _matches(want: str | list[str], path: str) -> bool:
    if isinstance(want, str):
        return re.fullmatch(want, path) is not None
    return any(path == name or path.endswith("." + name) for name in want)


def _pattern(patterns: dict | None, path: str, default: float) -> float:
    for key, value in (patterns or {}).items():
        if re.match(rf"(^|.*\.)({key})$", path):
            return value
    return default


def _train_biases(model: nn.Module, modules: dict[str, nn.Module], attached: Attached) -> None:
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


def _saved_modules(modules: dict[str, nn.Module], options: Lora) -> list[str]:
    found = []
    for name in options.modules_to_save or []:
        matches = [path for path in modules if path.endswith(name)]  # PEFT's rule: also the end of a word
        if not matches:
            known = sorted({p.rsplit(".", 1)[-1] for p in modules if p and not p.rsplit(".", 1)[-1].isdigit()})
            close = nearest(name, known)
            raise BadInput(
                [
                    Problem(
                        f"modules_to_save: no module is named {name!r}",
                        allowed=", ".join(known),
                        fix=f"did you mean {close!r}?" if close else None,
                    )
                ]
            )
        found += matches
    return found


def _replace(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    model.get_submodule(parent)._modules[name] = module


def keyed(attached: Attached, key: int | None) -> None:
    """Binds the dropout masks of every wrapped layer to one micro-batch; None switches dropout off."""
    for index, module in enumerate(attached.lora.values()):
        if isinstance(module, LoraLinear):
            module.key = None if key is None else (key * 1_000_003 + index) % (1 << 63)
