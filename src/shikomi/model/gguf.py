"""A GGUF file becomes a transformers folder: bf16 safetensors and tokenizer; one tensor in memory at a time."""

from __future__ import annotations

import json
import os
import shutil
import struct
from math import prod
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, BinaryIO

from shikomi.errors import BadInput, TryAgain
from shikomi.model.gguf_config import (
    ROPE_FACTORS,
    read_config,
    read_tokenizer,
    unsupported,
    write_generation_config,
)
from shikomi.model.gguf_header import SLAB, GgufHeader, TensorEntry, dequantized, read_header
from shikomi.progress import Progress, Silent

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel

CONVERTER = 1  # raise it when the converted files change: cached conversions of an older one are made again
Plan = dict[str, list[TensorEntry]]  # parameter name -> the tensors of the file that make it


def convert(gguf_path: Path, out_folder: Path, progress: Progress | None = None) -> list[str]:
    """Write config, generation config, tokenizer and bf16 weights into `out_folder`; returns notes to print.

    Weights equal, bit for bit, those of transformers with `GgufConfig(dequantize=True)` and `dtype=bfloat16`. Memory
    beyond the libraries' own is about the largest tensor in fp32. Raises `BadInput` for a file that cannot be read, or
    whose architecture or tensors transformers has no place for, and `TryAgain` where the disk is too small.
    """
    progress = progress or Silent()
    progress.phase(f"converting {gguf_path.name} to bf16, once")
    header = read_header(gguf_path)
    config, raw_config = read_config(header)
    model = _empty_model(config)
    plan = _plan(header, model, raw_config)
    tokenizer, notes = read_tokenizer(header)
    _check_disk(out_folder, model)
    out_folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(out_folder)
    config.architectures = [type(model).__name__]
    config.save_pretrained(out_folder)
    write_generation_config(header, config, out_folder)
    weights = out_folder / "model.safetensors"
    _write_weights(header, plan, model, raw_config, weights, progress)
    return notes


def _empty_model(config: PreTrainedConfig) -> PreTrainedModel:
    """The model without storage: names and shapes only."""
    import torch
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    except ValueError as error:
        raise BadInput(f"{config.model_type} is not a decoder-only language model of transformers: {error}") from error


def _plan(header: GgufHeader, model: PreTrainedModel, raw_config: dict[str, Any]) -> Plan:
    """Which tensors make which parameter; `BadInput` for tensors without a place and parameters without tensors."""
    names = _name_map(header, model, raw_config)
    parameters = {name for name, _ in model.named_parameters()}  # a tied weight appears once
    plan: Plan = {}
    homeless = []
    for entry in header.tensors:
        target = names.get(entry.name) or names.get(entry.name.removesuffix(".weight"))
        if target is not None and target in parameters:
            plan.setdefault(target, []).append(entry)
        elif target is None and entry.name != ROPE_FACTORS:
            homeless.append(entry.name)
    kind = type(model).__name__
    if homeless:
        raise unsupported(header, f"{kind} has no place for {_some(homeless)}")
    if missing := [name for name in parameters if name not in plan]:
        raise unsupported(header, f"the file has no tensors for {kind}'s {_some(sorted(missing))}")
    return plan


def _name_map(header: GgufHeader, model: PreTrainedModel, raw_config: dict[str, Any]) -> dict[str, str]:
    from transformers.modeling_gguf_pytorch_utils import get_gguf_hf_weights_map

    processor = _processor(header, raw_config)
    # transformers walks every submodule and builds its table for each, which takes seconds; the top one nearly always
    # names everything, and Bloom-like files get the whole walk.
    top = SimpleNamespace(config=model.config, state_dict=model.state_dict, named_children=list)
    try:
        names = get_gguf_hf_weights_map(top, processor)
        known = names.keys() | {name + ".weight" for name in names}
        if any(entry.name not in known and entry.name != ROPE_FACTORS for entry in header.tensors):
            names = get_gguf_hf_weights_map(model, processor)
    except RuntimeError as error:  # an architecture that gguf has no table of names for
        raise unsupported(header, str(error)) from error
    return names


def _processor(header: GgufHeader, raw_config: dict[str, Any]) -> Any:
    """What undoes llama.cpp's changes of the values (permuted heads, norms plus one) for this architecture."""
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor

    return TENSOR_PROCESSORS.get(header.architecture, TensorProcessor)(config=raw_config)


def _check_disk(out_folder: Path, model: PreTrainedModel) -> None:
    needed = 2 * sum(parameter.numel() for parameter in model.parameters()) + (64 << 20)
    place = next(folder for folder in (out_folder, *out_folder.absolute().parents) if folder.exists())
    free = shutil.disk_usage(place).free
    if needed > free:
        raise TryAgain(
            f"converting to {out_folder} needs {needed / 1e9:.1f} GB of disk and {free / 1e9:.1f} GB are free; "
            "fix: free some, or set SHIKOMI_CACHE to a folder on a larger disk"
        )


def _write_weights(
    header: GgufHeader,
    plan: Plan,
    model: PreTrainedModel,
    raw_config: dict[str, Any],
    target: Path,
    progress: Progress,
) -> None:
    """Stream every parameter as bf16 into one safetensors file, whose header is known from the shapes."""
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    index: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in plan:
        start, end = end, end + 2 * prod(shapes[name])
        index[name] = {"dtype": "BF16", "shape": list(shapes[name]), "data_offsets": [start, end]}
    text = json.dumps(index, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    processor, names = _processor(header, raw_config), _name_map(header, model, raw_config)
    with header.path.open("rb") as source, target.open("wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        for done, (name, entries) in enumerate(plan.items(), start=1):
            values = _parameter(source, entries, name, processor, names)
            if tuple(values.shape) != shapes[name]:
                raise unsupported(header, f"{name} is {tuple(values.shape)} there and {shapes[name]} in transformers")
            _write_bf16(values, out)
            del values  # or it would live on while the next one is made
            progress.tick(done, len(plan), f"converting {header.path.name}, tensors")
        out.flush()
        os.fsync(out.fileno())


def _parameter(
    source: BinaryIO, entries: list[TensorEntry], name: str, processor: Any, names: dict[str, str]
) -> torch.Tensor:
    """One parameter in fp32, made of one tensor of the file or of several (gate and up of a layer's experts)."""
    import torch

    made: dict[str, torch.Tensor] = {}
    for entry in entries:
        result = processor.process(
            weights=dequantized(source, entry),
            name=entry.name,
            tensor_key_mapping=names,
            parsed_parameters={"tensors": made},
        )
        if result.name is not None:  # otherwise the processor has put it into `made` itself
            made[name] = torch.from_numpy(result.weights)
    if name not in made:
        raise BadInput(f"{name} cannot be made of {_some([entry.name for entry in entries])}")
    return made[name]


def _write_bf16(values: torch.Tensor, out: BinaryIO) -> None:
    import torch

    flat = values.contiguous().view(-1)
    for first in range(0, flat.numel(), SLAB):
        out.write(flat[first : first + SLAB].to(torch.bfloat16).view(torch.uint8).numpy().data)


def _some(names: list[str], shown: int = 3) -> str:
    rest = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + rest
