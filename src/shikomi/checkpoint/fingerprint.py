"""What must be equal for two runs to give the same bits: the machine's kind, the thread count, the versions."""

import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from shikomi.checkpoint.diff import differences

_PACKAGES = ("shikomi", "transformers", "safetensors", "numpy")
# The instruction sets that pick another GEMM kernel in oneDNN or MKL, and with it another rounding.
_FLAGS = {"avx2", "fma", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_int8", "bf16", "sve"}


def fingerprint(device: str | torch.device = "cpu") -> dict[str, Any]:
    """JSON-able description of this process on `device`; threads are counted now, not at import."""
    model, flags = _processor()
    found: dict[str, Any] = {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        **{package: _version(package) for package in _PACKAGES},
        "platform": f"{platform.system()} {platform.machine()}",
        "processor": model,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cpu_flags": " ".join(flags),
        "threads": torch.get_num_threads(),
        "device": torch.device(device).type,
    }
    if torch.device(device).type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
        found["cuda"] = str(torch.version.cuda)
    return found


def compare(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The differences in words; an empty list means a resumed run repeats the interrupted one bit for bit."""
    return differences(before, now)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _processor() -> tuple[str, list[str]]:
    """(model name, its flags that matter); Linux tells both, elsewhere the platform module's name has to do."""
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return platform.processor(), []
    fields = dict(_field(line) for line in reversed(cpuinfo.read_text(errors="replace").splitlines()) if ":" in line)
    flags = set(fields.get("flags", fields.get("Features", "")).split())
    return fields.get("model name", platform.machine()), sorted(flags & _FLAGS)


def _field(line: str) -> tuple[str, str]:
    key, _, value = line.partition(":")
    return key.strip(), value.strip()
