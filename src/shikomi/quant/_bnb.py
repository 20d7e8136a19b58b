"""Calls into bitsandbytes: packing weights to 4 bits, and dequantizing them into a buffer of ours."""

import contextlib
import ctypes
import importlib.util
import logging
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor

from shikomi.errors import BadInput, Problem

BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
NESTED = 256  # blocks whose scales share one second scale
SLICE = 1 << 16  # elements that are quantized at a time: packing takes 28 bytes for each
_KERNELS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
_scales: dict[torch.device, Tensor] = {}

Kind = Literal["nf4", "fp4"]


@dataclass(frozen=True, eq=False)
class Nested:
    """Scales of scales: absmax = table[code] * scale + offset, in groups of 256."""

    scale: Tensor  # (ceil(blocks / 256),) fp32
    offset: Tensor  # () fp32: the mean of all absmax
    table: Tensor  # (256,) fp32, one for all weights of a device


@dataclass(frozen=True, eq=False)
class FourBit:
    """A weight (out, in) as 4-bit codes with one scale per block of its flat elements (arXiv:2305.14314, section 3)."""

    kind: Kind
    block_size: int
    shape: tuple[int, int]
    source: torch.dtype  # of the weight that was quantized
    packed: Tensor  # (ceil(out * in / 2),) uint8, the earlier element in the high half
    absmax: Tensor  # (blocks,) fp32; under double quantization uint8 codes
    table: Tensor  # (16,) fp32, one for all weights of a device
    nested: Nested | None

    @property
    def codes(self) -> Tensor:
        return self.packed

    @property
    def options(self) -> dict[str, object]:
        return {"name": self.kind, "block_size": self.block_size, "double_quant": self.nested is not None}

    def scales(self) -> Tensor:
        """absmax (blocks,) in fp32; under double quantization valid until the next call."""
        if self.nested is None:
            return self.absmax
        count, device = self.absmax.numel(), self.absmax.device
        buffer = _scales.get(device)
        if buffer is None or buffer.numel() < count:
            buffer = _scales[device] = torch.empty(count, device=device)
        into = buffer[:count]
        if device.type == "cpu":
            pointers = [_pointer(t) for t in (self.nested.table, self.absmax, self.nested.scale, into)]
            native().cdequantize_blockwise_cpu_fp32(*pointers, _long(NESTED), _long(count))
        else:
            operation = library().dequantize_blockwise.out
            operation(self.absmax, self.nested.scale, self.nested.table, NESTED, torch.float32, out=into)
        return into.add_(self.nested.offset)

    def write(self, into: Tensor) -> None:
        """Dequantizes into a contiguous (out, in) buffer: table[code] * absmax in fp32, rounded to its dtype."""
        assert into.is_contiguous() and tuple(into.shape) == self.shape and into.device == self.packed.device
        scales = self.scales()
        if into.device.type != "cpu":
            operation = library().dequantize_4bit.out
            operation(self.packed, scales, self.block_size, self.kind, self.shape, into.dtype, out=into)
            return
        # One block per row: given the weight's own rows, the AVX-512 kernel takes the wrong scales where a row
        # is no multiple of the block, and odd rows are refused.
        kernel = native()[f"cdequantize_blockwise_cpu_{self.kind}_{_KERNELS[into.dtype]}"]
        size = self.block_size
        full, rest = divmod(into.numel(), size)
        source, target = self.packed.data_ptr(), into.data_ptr()
        for rows, width, first in ((full, size, 0), (1, rest, full * size)):
            if rows and width:
                at = ctypes.c_void_p(source + first // 2)
                scale = ctypes.c_void_p(scales.data_ptr() + first // size * 4)
                to = ctypes.c_void_p(target + first * into.element_size())
                kernel(at, scale, to, _long(size), _long(rows), _long(width))

    def tensors(self) -> dict[str, Tensor]:
        own = {"weight": self.packed, "weight.absmax": self.absmax, "weight.quant_map": self.table}
        if self.nested is not None:
            own |= {"weight.nested_absmax": self.nested.scale, "weight.nested_quant_map": self.nested.table}
        return own

    def to(self, device: torch.device) -> "FourBit":
        nested = self.nested
        if nested is not None:
            nested = Nested(nested.scale.to(device), nested.offset.to(device), dynamic_table(device))
        table = four_bit_table(self.kind, device)
        return replace(self, packed=self.packed.to(device), absmax=self.absmax.to(device), table=table, nested=nested)


def quantize(weight: Tensor, kind: Kind, block_size: int, double_quant: bool, device: torch.device) -> FourBit:
    """What `bitsandbytes.functional.quantize_4bit` makes of `weight` (out, in), bit for bit, a slice of rows at a time.

    The second quantization (QLoRA, section 3) is over the scales of the whole weight, as there. Raises BadInput for a
    device without kernels, and for weights that are not finite.
    """
    operation = library().quantize_4bit.default
    check_device(device, kind)
    out, width = weight.shape
    numel = out * width
    packed = torch.empty(-(-numel // 2), dtype=torch.uint8, device=device)
    absmax = torch.empty(-(-numel // block_size), device=device)
    whole = block_size // math.gcd(width, block_size)  # rows that fill whole blocks
    rows = whole * max(1, SLICE // (whole * width))
    for first in range(0, out, rows):
        part = weight[first : first + rows].to(device).contiguous()
        codes, scales = operation(part, block_size, kind, torch.uint8)
        at, block = first * width // 2, first * width // block_size
        packed[at : at + codes.numel()] = codes.view(-1)
        absmax[block : block + scales.numel()] = scales
    if not bool(absmax.isfinite().all()):
        raise BadInput([Problem(f"quant: {kind}: a weight holds NaN or infinite numbers", fix="use intact weights")])
    nested = None
    if double_quant:
        offset = absmax.mean()
        table = dynamic_table(device)
        absmax, scale = library().quantize_blockwise.default(absmax.sub_(offset), table, NESTED)
        nested = Nested(scale, offset, table)
    table = four_bit_table(kind, device)
    return FourBit(kind, block_size, (out, width), weight.dtype, packed, absmax, table, nested)


def bits(block_size: int, double_quant: bool) -> float:
    """Bits per weight: the code and its share of the scales."""
    return 4 + (8 + 32 / NESTED if double_quant else 32) / block_size


def check_device(device: torch.device, kind: str) -> None:
    """Raises BadInput for a device on which bitsandbytes cannot write into a given buffer."""
    if device.type not in ("cpu", "cuda"):
        fix = "use device: cpu, or quant: none"
        raise BadInput([Problem(f"quant: {kind} on {device.type}", allowed="device: cpu, cuda", fix=fix)])


@cache
def four_bit_table(kind: str, device: torch.device) -> Tensor:
    """The 16 numbers that the codes of a kind mean, in [-1, 1]."""
    return _functional().get_4bit_type(kind, device=device)


@cache
def dynamic_table(device: torch.device) -> Tensor:
    """The 256 numbers that the codes of nested scales mean: a signed dynamic 8-bit type (arXiv:1511.04561)."""
    return _functional().create_dynamic_map().to(device)


def library():
    """The torch operations of bitsandbytes."""
    _functional()
    return torch.ops.bitsandbytes


@cache
def native() -> Any:
    """The C library of bitsandbytes; raises BadInput where it was not built for this machine."""
    _functional()
    from bitsandbytes.cextension import ErrorHandlerMockBNBNativeLibrary, lib

    if isinstance(lib, ErrorHandlerMockBNBNativeLibrary):
        fix = "install a build of bitsandbytes for this machine, or use quant: none"
        raise BadInput([Problem("the C library of bitsandbytes does not load here", fix=fix)])
    return lib


def _functional() -> ModuleType:
    return functional("4-bit weights need", "quant: none")


@cache
def functional(needs: str, instead: str) -> ModuleType:
    """`bitsandbytes.functional`; raises BadInput where it is not installed, with `instead` as the other way out."""
    if importlib.util.find_spec("bitsandbytes") is None:
        fix = f"pip install 'shikomi[quant]', or use {instead}"
        raise BadInput([Problem(f"{needs} bitsandbytes, which is not installed", fix=fix)])
    with no_hub_kernels():
        import bitsandbytes.functional
    return bitsandbytes.functional


@contextlib.contextmanager
def no_hub_kernels() -> Iterator[None]:
    """Within: `import kernels` fails. With it bitsandbytes, where a CPU has bf16 units, fetches code from a hub."""
    log = logging.getLogger("bitsandbytes.backends.cpu.ops")
    level, before = log.level, sys.modules.get("kernels")
    absent = "kernels" not in sys.modules
    log.setLevel(logging.ERROR)  # it warns that it could not fetch
    sys.modules["kernels"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        log.setLevel(level)
        if absent:
            del sys.modules["kernels"]
        else:
            sys.modules["kernels"] = before  # type: ignore[assignment]


def _pointer(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def _long(number: int) -> ctypes.c_longlong:
    return ctypes.c_longlong(number)
