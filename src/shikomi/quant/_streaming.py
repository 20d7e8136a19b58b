"""Loading a transformers folder into stored weights, one tensor at a time: the dense model is never in memory."""

import contextlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.pytorch_utils import Conv1D

from shikomi.errors import BadInput, Problem
from shikomi.quant._quantized import Quantized, Scheme, Stored
from shikomi.quant._serialized import from_state_dict, stored_modules

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
READ_DIRECTLY = ("dt_proj",)  # Mamba layers multiply with this weight themselves instead of calling the layer
WHOLE = "the weights were loaded whole before they were quantized: transformers converts some on loading"


class Files:
    """The tensors of a transformers folder; one is mapped only while it is read, so that its pages do not stay."""

    def __init__(self, folder: Path):
        index = folder / INDEX
        if index.is_file():
            entries = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            self.files = {name: folder / file for name, file in entries.items()}
        else:
            with safe_open(folder / SINGLE, framework="pt") as file:
                self.files = dict.fromkeys(file.keys(), folder / SINGLE)

    @contextlib.contextmanager
    def mapped(self, name: str) -> Iterator[Tensor]:
        """A tensor as the file's own pages: valid within."""
        with safe_open(self.files[name], framework="pt") as file:
            yield file.get_tensor(name)

    def copy(self, name: str) -> Tensor:
        """A tensor of its own."""
        with self.mapped(name) as tensor:
            return tensor.clone()


def load_quantized(
    folder: Path,
    config: Any,
    scheme: Scheme,
    storage: torch.dtype,
    dtype: torch.dtype,
    device: torch.device,
    passed_over: frozenset[str] = frozenset(),
) -> tuple[Any, list[str]]:
    """The causal language model of a folder with its linear maps stored by `scheme`; and sentences to print once.

    Embeddings, head, norms and biases are kept in `storage`; `dtype` is that of the arithmetic. `config` is the
    folder's; its tensors named in `passed_over` are not read. Peak memory is the result and about twice the largest
    tensor; where transformers converts tensors on loading (experts), the model is loaded whole first. A folder that
    bitsandbytes quantized is taken as it is. Raises BadInput for one that is quantized in another way than `scheme`
    says.
    """
    files = Files(folder)
    stored = stored_modules(files.files)
    config.__dict__.pop("quantization_config", None)  # the weights will be ours, not transformers' own
    model = _skeleton(config, storage)
    beside = {name for module, names in stored.items() for name in names if name != f"{module}.weight"}
    where = _places(model, files, files.files.keys() - beside - passed_over, storage)
    if where is None:
        if stored:
            what = f"{folder}: the quantized weights of this model are not stored as it uses them"
            raise BadInput([Problem(what, fix="give the folder of the weights before quantization")])
        model = AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=storage, local_files_only=True)
        quantize_linears(model, scheme, dtype, device)
        return model.to(device), [WHOLE]
    for name in linear_names(model):
        linear = model.get_submodule(name)
        at = where[f"{name}.weight"].removesuffix(".weight")
        if stored and at not in stored:
            continue  # left dense by who quantized the folder
        if stored:
            weight = from_state_dict(files.copy, stored[at], f"{at}.", device)
            _agree(scheme, weight, at)
        else:
            with files.mapped(f"{at}.weight") as dense:
                weight = scheme.quantize(dense.t() if isinstance(linear, Conv1D) else dense, device)
        _fits(at, weight.shape, _shape(linear))
        _replace(model, name, Quantized(weight, linear.bias, dtype))
    _fill(model, files, where, storage, device)
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    return model.eval().to(device), []


def quantize_linears(model: nn.Module, scheme: Scheme, dtype: torch.dtype, device: torch.device) -> None:
    """Puts stored weights in the place of a loaded model's linear maps, letting go of each dense one in turn."""
    for name in linear_names(model):
        linear: Any = model.get_submodule(name)
        weight = linear.weight.detach()
        stored = scheme.quantize(weight.t() if isinstance(linear, Conv1D) else weight, device)
        _replace(model, name, Quantized(stored, linear.bias, dtype))


def linear_names(model: nn.Module) -> list[str]:
    """The linear maps of a model that are stored in few bits: all but the head and those with tied weights."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    uses = Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)
    return [
        name
        for name, module in model.named_modules()
        if type(module) in (nn.Linear, Conv1D)
        and module is not head
        and uses[id(module.weight)] == 1
        and not name.endswith(READ_DIRECTLY)
    ]


def _skeleton(config: Any, storage: torch.dtype) -> Any:
    """The model with its buffers computed and its parameters on the meta device, where they take no memory."""

    def to_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if parameter is None or parameter.is_meta:
            return parameter  # tied parameters stay one
        return nn.Parameter(parameter.to("meta"), requires_grad=False)

    handle = register_module_parameter_registration_hook(to_meta)  # type: ignore[arg-type]
    try:
        return AutoModelForCausalLM.from_config(config, dtype=storage)
    finally:
        handle.remove()


def _places(model: Any, files: Files, names: set[str], storage: torch.dtype) -> dict[str, str] | None:
    """The file's name of each parameter and buffer of the model; None where transformers converts some on loading."""
    every = model.state_dict()
    tied = {n for n, _ in model.named_parameters(remove_duplicate=False)} - {n for n, _ in model.named_parameters()}
    mapping = get_model_conversion_mapping(model)
    renamings = [t for t in mapping if isinstance(t, WeightRenaming)]
    converters = [t for t in mapping if isinstance(t, WeightConverter)]
    if storage != torch.float32 and (model._keep_in_fp32_modules or model._keep_in_fp32_modules_strict):
        return None
    where = {}
    for name in names:
        mine, converted = rename_source_key(name, renamings, converters, model.base_model_prefix, every)
        if mine not in every or converted is not None:
            return None
        where[mine] = name
    for alias in tied & where.keys():
        if not _same_as_its_twin(model, files, where, alias):
            return None
        del where[alias]
    return where if where.keys() == every.keys() - tied else None


def _same_as_its_twin(model: nn.Module, files: Files, where: dict[str, str], alias: str) -> bool:
    """Whether a tied weight that the file holds a second time is the same there."""
    parameter = model.get_parameter(alias)
    twin = next(name for name, other in model.named_parameters() if other is parameter)
    if twin not in where:
        return False
    with files.mapped(where[alias]) as one, files.mapped(where[twin]) as other:
        return torch.equal(one, other)


def _fill(model: nn.Module, files: Files, where: dict[str, str], storage: torch.dtype, device: torch.device) -> None:
    """Reads what is still on the meta device, and the saved buffers, from the files."""
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for own, parameter in module._parameters.items():
            if parameter is not None:
                places.setdefault(id(parameter), []).append((module, own))
    for name, parameter in list(model.named_parameters()):
        if parameter.is_meta:
            with files.mapped(where[name]) as tensor:
                _fits(where[name], tuple(tensor.shape), tuple(parameter.shape))
                filled = nn.Parameter(tensor.to(device, storage, copy=True), requires_grad=False)
            for module, own in places[id(parameter)]:
                module._parameters[own] = filled
    buffers = dict(model.named_buffers())
    for name in where.keys() & buffers.keys():
        with files.mapped(where[name]) as tensor:
            _fits(where[name], tuple(tensor.shape), tuple(buffers[name].shape))
            buffers[name].copy_(tensor)


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, own = name.rpartition(".")
    model.get_submodule(parent)._modules[own] = module


def _shape(linear: nn.Module) -> tuple[int, ...]:
    shape = tuple(linear.weight.shape)  # type: ignore[arg-type]
    return shape[::-1] if isinstance(linear, Conv1D) else shape


def _fits(name: str, found: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    if found != wanted:
        what = f"{name} has a shape that config.json does not say"
        raise BadInput([Problem(what, found=str(found), allowed=str(wanted), fix="use an intact model folder")])


def _agree(scheme: Scheme, weight: Stored, name: str) -> None:
    wanted = {"name": scheme.name, **asdict(scheme)}  # type: ignore[call-overload]
    if wanted != weight.options:
        found = ", ".join(f"{key}: {value}" for key, value in weight.options.items())
        fix = f"write quant: {{{found}}}, or give the folder of the weights before quantization"
        raise BadInput([Problem(f"{name} is quantized already", found=found, allowed=str(wanted), fix=fix)])
