"""The reference policy: the model as a stage found it, as a mode of the same model and through the same kernels."""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from shikomi.adapters._adapter import Attached
from shikomi.adapters._attach import OnLayers
from shikomi.adapters.bottleneck import OnBlocks

OFF, START = "adapter off", "starting tensors"
ZERO = (".lora_B.weight", ".lora_embedding_A", ".up.weight", ".up.bias")  # while these are zero an adapter adds nothing


@dataclass(frozen=True, eq=False)
class Reference:
    """How the reference is computed: with the adapter off, or with what was trained when the stage began put back."""

    how: str
    tensors: dict[str, Tensor] = field(default_factory=dict)  # frozen copies, by the names of `LanguageModel.trainable`

    @property
    def bytes(self) -> int:
        """Memory of the copies."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values())


def taken(attached: Attached | None, parameters: Mapping[str, nn.Parameter], fresh: bool) -> Reference:
    """The reference of a model as it is now; `fresh`: its adapter was never trained.

    An adapter that still adds exactly nothing is switched off, which gives the same bits for less work. Virtual tokens
    (prefix and prompt tuning) are never nothing: a fresh adapter of that kind is switched off too, so that the
    reference is the model that the recipe names. Anything else (a trained adapter, one that starts inside the base's
    weights, the weights themselves) is kept as frozen copies.
    """
    if attached is not None and (adds_nothing(attached) or (fresh and attached.options.capabilities.context)):
        return Reference(OFF)
    return Reference(START, copies(parameters))


def adds_nothing(attached: Attached) -> bool:
    """Whether the model computes, bit for bit, what it computes with the adapter off."""
    if isinstance(attached, OnLayers):
        linears = attached.linears().values()
        if attached.copies or attached.biases or attached.kept:
            return False
        if any(module.start is not None or module.frozen is not None for module in linears):
            return False
        factors = [factor for module in linears if (factor := module.factor()) is not None]
        if not all(bool((factor == 1).all()) for factor in factors):
            return False
    elif not isinstance(attached, OnBlocks):
        return False
    last = [parameter for name, parameter in attached.parameters().items() if name.endswith(ZERO)]
    return bool(last) and not any(bool(parameter.detach().any()) for parameter in last)


def copies(parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """A copy of each parameter; those that lie in one storage still do, since kernels use that."""
    storages: dict[int, Tensor] = {}
    found = {}
    for name, parameter in parameters.items():
        data = parameter.detach()
        storage = data.untyped_storage()
        if storage.nbytes() == data.numel() * data.element_size():  # a storage of its own
            found[name] = data.clone()
            continue
        key = storage.data_ptr()
        if key not in storages:
            storages[key] = torch.empty(0, dtype=data.dtype, device=data.device).set_(storage.clone())
        found[name] = storages[key].as_strided(data.shape, data.stride(), data.storage_offset())
    return found


@contextlib.contextmanager
def in_place_of(parameters: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Within: the parameters hold these tensors. Nothing is copied; what is cached by version is made again."""
    mine = {name: parameter.data for name, parameter in parameters.items()}
    _put(parameters, tensors)
    try:
        yield
    finally:
        _put(parameters, mine)


def _put(parameters: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor]) -> None:
    if parameters.keys() != tensors.keys():
        raise ValueError("the reference is of another adapter than the one that is trained")
    for name, parameter in parameters.items():
        parameter.data = tensors[name]
        torch.autograd.graph.increment_version(parameter)
