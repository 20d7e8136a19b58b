"""Tensors to safetensors files, hashed and fsynced on their way out, and back."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from shikomi.checkpoint.files import NewFile, Written
from shikomi.errors import BadInput, Problem

# In the order in which the safetensors library lays tensors out: wide ones first, so that all are aligned.
_DTYPES = {
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int16: "I16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_RANK = {dtype: rank for rank, dtype in enumerate(_DTYPES)}


def write_safetensors(path: Path, tensors: Mapping[str, Tensor]) -> Written:
    """Writes the bytes that `safetensors.torch.save_file(tensors, path, {"format": "pt"})` writes, and fsyncs them.

    Written here because the library hides errno (a full disk must be told from a fault) and would need a second
    read for the hash. Holds one tensor at a time beyond what the caller holds. Tensors may share memory, be
    non-contiguous or live on a device. Raises ValueError for a dtype the format has no name for.
    """
    for name, tensor in tensors.items():
        if tensor.dtype not in _DTYPES:
            raise ValueError(f"{name}: safetensors has no name for {tensor.dtype}")
    order = sorted(tensors, key=lambda name: (_RANK[tensors[name].dtype], name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in order:
        tensor = tensors[name]
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with NewFile(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            if tensors[name].numel():
                flat = tensors[name].detach().cpu().contiguous().reshape(-1)
                file.write(flat.view(torch.uint8).numpy())
    return file.written()


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a file, on the CPU, in the dtypes they have there. Raises BadInput when the file is not whole."""
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        problem = Problem(
            what="cannot be read as safetensors",
            file=str(path),
            found=str(error),
            fix="copy or download the file again; it may have been cut short",
        )
        raise BadInput([problem]) from error
