"""A GGUF file on disk: its metadata, its table of tensors, and single tensors in fp32; without torch.

Layout (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md): magic, version, two counts, key-value pairs, tensor
table, padding to `general.alignment`, tensor data. gguf's own reader makes several Python objects per vocabulary entry
(seconds and hundreds of MB), so the vocabulary is stepped over here.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from shikomi.errors import BadInput, Problem

if TYPE_CHECKING:
    import numpy as np

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
SLAB = 1 << 18  # numbers converted at a time: 1 MB of fp32, so that temporaries stay far below a tensor
LONGEST_ARRAY = 4096  # longer arrays are vocabularies: kept as their length
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY, _UINT32, _FLOAT32_TENSOR = 8, 9, 4, 0


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of the file: `shape` in torch's order, `offset` and `n_bytes` in bytes from the start of the file."""

    name: str
    shape: tuple[int, ...]
    ggml_type: int
    offset: int
    n_bytes: int


@dataclass(frozen=True)
class GgufHeader:
    """`metadata` has every key, a long array (a vocabulary) as its length; `raw` has the bytes of the short pairs."""

    path: Path
    metadata: dict[str, Any]
    tensors: tuple[TensorEntry, ...]
    raw: dict[str, bytes]

    @property
    def architecture(self) -> str:
        """What llama.cpp calls the model's family, such as "llama"."""
        return str(self.metadata["general.architecture"])


class _Cursor:
    """A position in the file's bytes; every read moves it. Raises `ValueError` beyond the end."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data = data
        self.position = 0

    def skip(self, count: int) -> int:
        start = self.position
        if count < 0 or start + count > len(self.data):
            raise ValueError(f"the header goes on after the end of the file, at byte {len(self.data)}")
        self.position = start + count
        return start

    def numbers(self, code: str, count: int = 1) -> tuple[Any, ...]:
        layout = f"<{count}{code}"
        return struct.unpack_from(layout, self.data, self.skip(struct.calcsize(layout)))

    def string(self) -> str:
        (length,) = self.numbers("Q")
        start = self.skip(length)
        return self.data[start : start + length].decode("utf-8")

    def value(self, kind: int) -> Any:
        if kind in _SCALARS:
            return self.numbers(_SCALARS[kind])[0]
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            raise ValueError(f"a metadata value is of the unknown type {kind}")
        (element,) = self.numbers("I")
        (count,) = self.numbers("Q")
        if count <= LONGEST_ARRAY:
            return [self.value(element) for _ in range(count)]
        if element in _SCALARS:
            self.skip(count * struct.calcsize("<" + _SCALARS[element]))
        elif element == _STRING:
            for _ in range(count):
                self.skip(self.numbers("Q")[0])
        else:
            raise ValueError(f"a metadata array of {count} values is of the unknown type {element}")
        return count


def read_header(path: Path) -> GgufHeader:
    """Read metadata and tensor table; `BadInput` for a file that is not GGUF, is cut off, or of an unknown version."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(len(MAGIC))
        if start != MAGIC:
            raise BadInput(
                [Problem("not a GGUF file", str(path), found=f"first bytes {start!r}", allowed=f"{MAGIC!r}")]
            )
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            try:
                return _parse(_Cursor(data), path, size)
            except (ValueError, struct.error) as error:
                raise BadInput(
                    [Problem(f"a damaged GGUF file: {error}", str(path), fix="download or copy the file again")]
                ) from error


def _parse(cursor: _Cursor, path: Path, size: int) -> GgufHeader:
    cursor.skip(len(MAGIC))
    (version,) = cursor.numbers("I")
    if version not in VERSIONS:
        raise ValueError(f"GGUF version {version} (versions 2 and 3 are read; big-endian files are not)")
    tensor_count, pair_count = cursor.numbers("Q", 2)
    metadata: dict[str, Any] = {}
    raw: dict[str, bytes] = {}
    for _ in range(pair_count):
        start = cursor.position
        key = cursor.string()
        (kind,) = cursor.numbers("I")
        metadata[key] = cursor.value(kind)
        if kind != _ARRAY or isinstance(metadata[key], list):
            raw[key] = cursor.data[start : cursor.position]
    if "general.architecture" not in metadata:
        raise ValueError("it names no general.architecture")
    table = []
    for _ in range(tensor_count):
        name = cursor.string()
        (dimensions,) = cursor.numbers("I")
        # ggml counts the fastest dimension first, torch last
        shape = tuple(reversed(cursor.numbers("Q", dimensions)))
        ggml_type, offset = *cursor.numbers("I"), *cursor.numbers("Q")
        table.append((name, shape, ggml_type, offset))
    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment <= 0:
        raise ValueError(f"general.alignment is {alignment}")
    data_start = -(-cursor.position // alignment) * alignment
    tensors = tuple(_entry(entry, data_start, size) for entry in table)
    return GgufHeader(path, metadata, tensors, raw)


def _entry(entry: tuple[str, tuple[int, ...], int, int], data_start: int, size: int) -> TensorEntry:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    name, shape, ggml_type, offset = entry
    block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(ggml_type)]
    if not shape or shape[-1] % block:
        raise ValueError(f"tensor {name} of shape {shape} does not divide into blocks of {block}")
    n_bytes = prod(shape) // block * block_bytes
    if data_start + offset + n_bytes > size:
        raise ValueError(f"tensor {name} ends at byte {data_start + offset + n_bytes:,}, the file at {size:,}")
    return TensorEntry(name, shape, ggml_type, data_start + offset, n_bytes)


def write_skeleton(header: GgufHeader, target: Path) -> None:
    """Write a small GGUF file with the same short metadata and tensor names: enough to read the config from.

    Vocabularies are left out (their length goes in as `vocab_size`), and every tensor is one float, so that
    transformers reads it in no time and no memory.
    """
    pairs = dict(header.raw)
    size_key = f"{header.architecture}.vocab_size"
    vocabulary = header.metadata.get("tokenizer.ggml.tokens")
    if size_key not in pairs and vocabulary is not None:
        length = vocabulary if isinstance(vocabulary, int) else len(vocabulary)
        pairs[size_key] = _string(size_key) + struct.pack("<II", _UINT32, length)
    pairs.pop("general.alignment", None)
    names = [entry.name for entry in header.tensors]
    body = MAGIC + struct.pack("<IQQ", VERSIONS[-1], len(names), len(pairs)) + b"".join(pairs.values())
    for index, name in enumerate(names):
        body += _string(name) + struct.pack("<IQIQ", 1, 1, _FLOAT32_TENSOR, index * DEFAULT_ALIGNMENT)
    body += bytes(-len(body) % DEFAULT_ALIGNMENT) + bytes(DEFAULT_ALIGNMENT * len(names))
    target.write_bytes(body)


def dequantized(source: BinaryIO, entry: TensorEntry) -> np.ndarray:
    """The tensor's values in fp32, read from its place in the file and dequantized a slab of rows at a time."""
    import numpy as np
    from gguf import GGMLQuantizationType, dequantize

    kind = GGMLQuantizationType(entry.ggml_type)
    rows = prod(entry.shape[:-1])
    row_bytes, columns = entry.n_bytes // rows, entry.shape[-1]
    values = np.empty((rows, columns), dtype=np.float32)
    step = max(1, SLAB // columns)
    source.seek(entry.offset)
    for first in range(0, rows, step):
        count = min(step, rows - first)
        blocks = np.frombuffer(source.read(count * row_bytes), dtype=np.uint8).reshape(count, row_bytes)
        try:
            values[first : first + count] = dequantize(blocks, kind)
        except RuntimeError as error:  # a type that the gguf package can name and not read
            raise BadInput(f"{entry.name} is stored as {kind.name}: {error}") from error
    return values.reshape(entry.shape)


def _string(text: str) -> bytes:
    data = text.encode("utf-8")
    return struct.pack("<Q", len(data)) + data
