"""Stored weights in the files that bitsandbytes and transformers write: a few tensors beside each weight."""

import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from shikomi.errors import BadInput, Problem
from shikomi.quant import _bnb
from shikomi.quant._quantized import Quantized, Stored
from shikomi.quant.fp4 import Fp4
from shikomi.quant.int8 import Int8, RowInt8
from shikomi.quant.nf4 import Nf4

KINDS: tuple[_bnb.Kind, ...] = ("nf4", "fp4")
STATE = "weight.quant_state.bitsandbytes__"
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def to_state_dict(module: Quantized, prefix: str = "") -> dict[str, Tensor]:
    """The tensors of a quantized linear map under bitsandbytes' names; `prefix` ends with a dot."""
    stored = module.stored
    shared = ("weight.quant_map", "weight.nested_quant_map")  # one tensor may not be in a file under two names
    found = {prefix + n: t.clone() if n in shared else t for n, t in stored.tensors().items()}
    if isinstance(stored, RowInt8):
        found[f"{prefix}weight_format"] = torch.tensor(0, dtype=torch.uint8)  # rows, the one format that is left
    else:
        assert isinstance(stored, _bnb.FourBit)
        found[f"{prefix}weight"] = stored.packed[:, None]
        found[f"{prefix}{STATE}{stored.kind}"] = _packed(_facts(stored))
    if module.bias is not None:
        found[f"{prefix}bias"] = module.bias.detach()
    return found


def model_to_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """All tensors of a model as transformers saves it with bitsandbytes; tied ones once."""
    twice = {n for n, _ in model.named_parameters(remove_duplicate=False)} - {n for n, _ in model.named_parameters()}
    found = {name: tensor for name, tensor in model.state_dict().items() if name not in twice}
    for name, module in model.named_modules():
        if isinstance(module, Quantized):
            found |= to_state_dict(module, f"{name}.")
    return {name: tensor.contiguous() for name, tensor in found.items()}


def to_config(scheme: Nf4 | Fp4 | Int8, dtype: torch.dtype) -> dict[str, object]:
    """`quantization_config` of a config.json with which transformers loads such a file; computes in `dtype`."""
    config: dict[str, object] = {"quant_method": "bitsandbytes"}
    if isinstance(scheme, Int8):
        return config | {"load_in_8bit": True, "load_in_4bit": False, "llm_int8_threshold": 0.0}
    return config | {
        "load_in_8bit": False,
        "load_in_4bit": True,
        "bnb_4bit_quant_type": scheme.name,
        "bnb_4bit_use_double_quant": scheme.double_quant,
        "bnb_4bit_compute_dtype": str(dtype).removeprefix("torch."),
        "bnb_4bit_quant_storage": "uint8",
    }


def from_config(config: Mapping[str, Any] | None, folder: str) -> Nf4 | Fp4 | Int8 | None:
    """The scheme that a folder's `quantization_config` names, with the usual block size; None for a dense model.

    Raises BadInput for formats other than bitsandbytes'.
    """
    if config is None:
        return None
    if config.get("load_in_8bit"):
        return Int8()
    if config.get("load_in_4bit"):
        double = bool(config.get("bnb_4bit_use_double_quant", False))
        return Nf4(double) if config.get("bnb_4bit_quant_type", "fp4") == "nf4" else Fp4(double)
    raise BadInput(
        [
            Problem(
                f"{folder} is quantized already",
                found=str(config.get("quant_method", "an unnamed format")),
                allowed="bitsandbytes (4 or 8 bits), or weights that are not quantized",
                fix="give the folder of the weights before quantization",
            )
        ]
    )


def stored_modules(names: Iterable[str]) -> dict[str, set[str]]:
    """Modules of a checkpoint whose weights are stored by bitsandbytes, each with the names of its tensors."""
    names = set(names)
    ends = [f".{STATE}{kind}" for kind in KINDS]
    modules = {n[: -len(e)] for n in names for e in ends if n.endswith(e)}
    modules |= {n.removesuffix(".SCB") for n in names if n.endswith(".SCB")}
    own = ("weight", "SCB", "weight_format", *(f"{STATE}{kind}" for kind in KINDS))
    scales = ("weight.absmax", "weight.quant_map", "weight.nested_absmax", "weight.nested_quant_map")
    return {m: {f"{m}.{part}" for part in (*own, *scales)} & names for m in modules}


def from_state_dict(read: Callable[[str], Tensor], names: set[str], prefix: str, device: torch.device) -> Stored:
    """The weight whose tensors are among `names`, each `prefix` and bitsandbytes' own name; `read` gives one.

    Raises BadInput where one is missing or does not fit the others.
    """

    def take(name: str) -> Tensor:
        if prefix + name not in names:
            raise BadInput([Problem(f"a quantized weight without {prefix}{name}", fix="use an intact checkpoint")])
        return read(prefix + name).to(device, copy=True)  # out of the file's mapping

    if f"{prefix}SCB" in names:
        weight, absmax = take("weight"), take("SCB").float()
        _check(prefix, weight.dtype == torch.int8 and absmax.shape == weight.shape[:1], "weight and SCB do not fit")
        return RowInt8((weight.shape[0], weight.shape[1]), weight, absmax)
    kind = next(k for k in KINDS if f"{prefix}{STATE}{k}" in names)
    facts = json.loads(bytes(take(STATE + kind).cpu().tolist()))
    _check(prefix, set(facts) >= {"blocksize", "dtype", "shape"}, f"its state has only {sorted(facts)}")
    size, (out, width) = facts["blocksize"], facts["shape"]
    _check(prefix, facts["dtype"] in DTYPES and size in _bnb.BLOCKS, f"dtype {facts['dtype']}, block size {size}")
    packed = take("weight").view(torch.uint8).reshape(-1)  # other storage dtypes hold the same bytes
    absmax = take("weight.absmax")
    fits = packed.numel() >= -(-out * width // 2) and absmax.numel() == -(-out * width // size)
    _check(prefix, fits, f"{packed.numel()} bytes and {absmax.numel()} scales for {out} x {width}")
    table = _same(prefix, take("weight.quant_map"), _bnb.four_bit_table(kind, device))
    nested = None
    if f"{prefix}weight.nested_absmax" in names:
        _check(prefix, facts["nested_blocksize"] == _bnb.NESTED, f"nested block size {facts['nested_blocksize']}")
        offset = torch.tensor(float(facts["nested_offset"]), device=device)
        scale = take("weight.nested_absmax")
        nested_table = _same(prefix, take("weight.nested_quant_map"), _bnb.dynamic_table(device))
        nested = _bnb.Nested(scale, offset, nested_table)
    else:
        absmax = absmax.float()
    return _bnb.FourBit(kind, size, (out, width), DTYPES[facts["dtype"]], packed, absmax, table, nested)


def _facts(stored: _bnb.FourBit) -> dict[str, object]:
    facts: dict[str, object] = {
        "quant_type": stored.kind,
        "blocksize": stored.block_size,
        "dtype": str(stored.source).removeprefix("torch."),
        "shape": list(stored.shape),
    }
    if stored.nested is not None:
        facts |= {"nested_blocksize": _bnb.NESTED, "nested_dtype": "float32"}
        facts["nested_offset"] = stored.nested.offset.item()
    return facts


def _packed(facts: dict[str, object]) -> Tensor:
    return torch.tensor(list(json.dumps(facts).encode()), dtype=torch.uint8)


def _same(prefix: str, table: Tensor, known: Tensor) -> Tensor:
    """The shared table, if the file's is the same: the kernels have it built in."""
    _check(prefix, table.shape == known.shape and torch.allclose(table.float(), known, atol=1e-4), "an unknown table")
    return known


def _check(prefix: str, fits: bool, found: str) -> None:
    if not fits:
        what = f"{prefix}weight is not stored as bitsandbytes does"
        raise BadInput([Problem(what, found=found, fix="use an intact checkpoint, or the weights before quantization")])
