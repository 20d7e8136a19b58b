"""Which device a run uses, and in which dtypes it keeps and multiplies numbers there."""

import ctypes
import functools
import sys
from typing import NamedTuple

import torch

from shikomi.errors import BadInput, Problem

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class Dtypes(NamedTuple):
    storage: torch.dtype  # weights, and activations kept for the backward
    arithmetic: torch.dtype  # matrix products and everything between them


def choose_device(name: str) -> torch.device:
    """The device of `auto | cpu | cuda | mps`; raises BadInput where it is not there."""
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        name = next(n for n in ("cuda", "mps", "cpu") if there[n])
    if not there[name]:
        fix = "install a CUDA build of torch and a driver" if name == "cuda" else None
        raise BadInput(
            [
                Problem(
                    f"device: {name} is not available here",
                    allowed=", ".join(n for n in there if there[n]),
                    fix=fix or "use device: auto",
                )
            ]
        )
    return torch.device(name)


def choose_dtypes(name: str, device: torch.device) -> Dtypes:
    """Dtypes of `auto | bf16 | fp16 | fp32` on a device.

    bf16 on a CPU without bf16 units is bf16 in memory and fp32 in arithmetic: there bf16 products are 10 to 100
    times slower than fp32 ones, and every bf16 number is an fp32 number.
    """
    if name == "auto":
        name = "bf16"
        if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
            name = "fp16"
    if name == "fp16" and device.type != "cuda":
        raise BadInput(
            [
                Problem(
                    "dtype: fp16 needs a CUDA device",
                    found=device.type,
                    allowed="auto, bf16, fp32",
                    fix="use dtype: auto; fp16 overflows in training and no CPU multiplies it fast",
                )
            ]
        )
    storage = DTYPES[name]
    if storage == torch.bfloat16 and device.type != "cuda" and not cpu_has_bf16():
        return Dtypes(storage, torch.float32)
    return Dtypes(storage, storage)


def cpu_has_bf16() -> bool:
    """Whether this CPU multiplies bf16 matrices in hardware (AVX512-BF16 or AMX)."""
    if not sys.platform.startswith("linux"):
        return False
    with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
        flags = next((line for line in file if line.startswith("flags")), "")
    return bool({"avx512_bf16", "amx_bf16"} & set(flags.split()))


def tune_allocator() -> None:
    """Keeps freed memory in the process: glibc otherwise gives every large tensor back and faults it in again."""
    libc = _glibc()
    if libc is None:
        return
    m_trim_threshold, m_top_pad, m_mmap_threshold = -1, -2, -3
    libc.mallopt(m_mmap_threshold, 32 << 20)
    libc.mallopt(m_trim_threshold, 512 << 20)
    libc.mallopt(m_top_pad, 64 << 20)


def give_back_freed() -> None:
    """Gives the pages of freed memory back, for the moments between which different things come and go."""
    libc = _glibc()
    if libc is not None:
        libc.malloc_trim(0)


@functools.cache
def _glibc() -> ctypes.CDLL | None:
    if not sys.platform.startswith("linux"):
        return None
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "gnu_get_libc_version") else None
