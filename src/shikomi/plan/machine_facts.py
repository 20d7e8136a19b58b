"""What this machine is, from the kernel's tables and the environment; no library is imported.

Each reader takes the text of a table or the root of a tree, so that another machine's can be given to it.
"""

from __future__ import annotations

import contextlib
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
UNLIMITED = 1 << 60  # cgroup v1 writes the largest number of pages where there is no limit
GPU_VENDORS = {"0x10de": "NVIDIA", "0x1002": "AMD"}


@dataclass(frozen=True)
class Cpu:
    """The processor: `flags` as Linux names them, physical `cores` (None: not told) and hardware `threads`."""

    model: str
    machine: str
    flags: frozenset[str]
    cores: int | None
    threads: int

    @property
    def is_arm(self) -> bool:
        return self.machine in ("aarch64", "arm64")

    @property
    def has_bf16(self) -> bool:
        """Whether it multiplies bf16 matrices in hardware."""
        return bool(self.flags & ({"bf16"} if self.is_arm else {"avx512_bf16", "amx_bf16"}))


@dataclass(frozen=True)
class Limits:
    """What a container may use: bytes of memory, bytes it holds now, and CPUs; None where nothing is limited."""

    memory: int | None = None
    used: int | None = None
    cpus: float | None = None


@dataclass(frozen=True)
class Memory:
    """Bytes of host memory: of the machine, available there, and what the container leaves of it."""

    total: int
    available: int
    limit: int | None = None
    used: int | None = None

    @property
    def free(self) -> int:
        """What a run can take: the smaller of what the machine and the container have left."""
        if self.limit is None:
            return self.available
        return max(0, min(self.available, self.limit - (self.used or 0)))


@dataclass(frozen=True)
class Volume:
    """A folder that a run writes to: its nearest existing folder, free bytes there, file system, writability."""

    role: str
    path: Path
    existing: Path
    free: int
    kind: str
    writable: bool


def read_cpu() -> Cpu:
    """The processor of this machine."""
    if sys.platform == "darwin":
        done = subprocess.run(["sysctl", "-a"], capture_output=True, text=True, errors="replace", check=False)
        return cpu_of_sysctl(done.stdout, platform.machine())
    table = Path("/proc/cpuinfo")
    return cpu_of_cpuinfo(table.read_text(errors="replace") if table.exists() else "", platform.machine())


def cpu_of_cpuinfo(text: str, machine: str) -> Cpu:
    """The processor of Linux's /proc/cpuinfo; on ARM it does not tell cores from threads, and few have both."""
    processors = [dict(_pairs(block.splitlines(), ":")) for block in text.strip().split("\n\n") if block.strip()]
    numbered = [p for p in processors if "processor" in p]
    places = {(p["physical id"], p["core id"]) for p in numbered if "physical id" in p and "core id" in p}
    first = next((p for p in numbered if "flags" in p or "Features" in p), {})
    flags = frozenset((first.get("flags") or first.get("Features") or "").split())
    threads = len(numbered) or os.cpu_count() or 1
    return Cpu(first.get("model name") or machine, machine, flags, len(places) or None, threads)


def cpu_of_sysctl(text: str, machine: str) -> Cpu:
    """The processor of macOS's `sysctl -a`; its names of features are turned into Linux's."""
    values = dict(_pairs(text.splitlines(), ":"))
    names = {"hw.optional.arm.FEAT_BF16": "bf16", "hw.optional.arm.FEAT_I8MM": "i8mm", "hw.optional.avx2_0": "avx2"}
    flags = {flag for name, flag in names.items() if values.get(name) == "1"}
    if values.get("hw.optional.avx512f") == "1":
        flags.add("avx512f")
    cores, threads = (int(values.get(f"hw.{kind}cpu") or 0) for kind in ("physical", "logical"))
    model = values.get("machdep.cpu.brand_string") or machine
    return Cpu(model, machine, frozenset(flags), cores or None, threads or os.cpu_count() or 1)


def read_limits() -> Limits:
    """What the container of this process may use."""
    table = Path("/proc/self/cgroup")
    return limits_of(table.read_text() if table.exists() else "", CGROUPS)


def limits_of(table: str, root: Path) -> Limits:
    """The tightest limits on the way from a process's control group up to the root, of cgroup v2 and v1 alike.

    `table` is /proc/self/cgroup, `root` where the hierarchies are mounted. Page cache that the kernel can drop
    (inactive_file) does not count as used.
    """
    memory, cpus = [], []
    for line in table.splitlines():
        number, _, rest = line.partition(":")
        names, _, path = rest.partition(":")
        controllers = names.split(",") if names else []
        if number == "0" and not controllers:
            bases = [root / "unified" if (root / "unified").is_dir() else root]
        else:
            bases = [folder for name in (names, *controllers) if (folder := root / name).is_dir()][:1]
        for base in bases:
            for folder in _upwards(base, path):
                memory += _memory_limits(folder)
                cpus += _cpu_limits(folder)
    limit, used = min(memory) if memory else (None, None)
    return Limits(limit, used, min(cpus, default=None))


def _upwards(base: Path, path: str) -> Iterator[Path]:
    """The group's folder and those above it; in a container only the root of the mount may be there."""
    folder = base / path.strip("/")
    while folder != base:
        yield folder
        folder = folder.parent
    yield base


def _memory_limits(folder: Path) -> list[tuple[int, int]]:
    """[(limit, used)] of a group; nothing where it has none."""
    names = (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes"))
    for limit_name, used_name in names:
        limit = _first_word(folder / limit_name)
        if limit and limit != "max" and int(limit) < UNLIMITED:
            table = folder / "memory.stat"
            stat = dict(_pairs(table.read_text().splitlines() if table.exists() else [], " "))
            dropped = int(stat.get("total_inactive_file") or stat.get("inactive_file") or 0)
            return [(int(limit), max(0, int(_first_word(folder / used_name) or 0) - dropped))]
    return []


def _cpu_limits(folder: Path) -> list[float]:
    """[CPUs] of a group's quota; nothing where it has none."""
    if (folder / "cpu.max").exists():
        quota, period = ((folder / "cpu.max").read_text().split() + ["100000"])[:2]
        return [int(quota) / int(period)] if quota != "max" else []
    quota, period = (_first_word(folder / f"cpu.cfs_{name}_us") for name in ("quota", "period"))
    return [int(quota) / int(period)] if quota and period and int(quota) > 0 else []


def _first_word(file: Path) -> str:
    words = file.read_text().split() if file.exists() else []
    return words[0] if words else ""


def _pairs(lines: Sequence[str], separator: str) -> Iterator[tuple[str, str]]:
    for line in lines:
        key, found, value = line.partition(separator)
        if found:
            yield key.strip(), value.strip()


def read_memory(limits: Limits) -> Memory | None:
    """Host memory of this machine; None where the system does not tell it."""
    table = Path("/proc/meminfo")
    return memory_of(table.read_text(), limits) if table.exists() else None


def memory_of(meminfo: str, limits: Limits) -> Memory:
    """Host memory from Linux's /proc/meminfo and the container's limits; one above the machine's is none."""
    values = {key: int(value.split()[0]) * 1024 for key, value in _pairs(meminfo.splitlines(), ":") if value}
    total = values["MemTotal"]
    available = values.get("MemAvailable", values.get("MemFree", 0))
    limit = limits.memory if limits.memory is not None and limits.memory < total else None
    return Memory(total, available, limit, limits.used if limit is not None else None)


def read_volume(role: str, path: Path) -> Volume:
    """The volume that a folder lies on, or will."""
    path = path.expanduser().absolute()
    existing = next(place for place in (path, *path.parents) if place.exists())
    table = Path("/proc/mounts")
    kind = file_system(table.read_text(errors="replace") if table.exists() else "", existing)
    writable = existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)
    return Volume(role, path, existing, shutil.disk_usage(existing).free, kind, writable)


def file_system(mounts: str, path: Path) -> str:
    """The kind of file system that holds a path, from /proc/mounts; empty where it is not told."""
    best, kind = "", ""
    for line in mounts.splitlines():
        words = line.split()
        if len(words) >= 3:
            place = re.sub(r"\\(\d{3})", lambda octal: chr(int(octal[1], 8)), words[1])
            if path.is_relative_to(place) and len(place) >= len(best):
                best, kind = place, words[2]
    return kind


def folder_bytes(folder: Path) -> int:
    """Bytes of the files below a folder, links not followed."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):  # another process may be cleaning up
                total += (Path(place) / name).lstat().st_size
    return total


def initial_environment() -> Mapping[str, str]:
    """The environment that this process was started with, before anything here changed it."""
    table = Path("/proc/self/environ")
    return environment_of(table.read_bytes()) if table.exists() else dict(os.environ)


def environment_of(table: bytes) -> dict[str, str]:
    """Linux's /proc/PID/environ as a mapping."""
    return dict(_pairs(table.decode(errors="replace").split("\0"), "="))


def gpus_on_bus(root: Path = Path("/sys/bus/pci/devices")) -> list[str]:
    """Makers of the display and compute cards on the PCI bus, whether a driver serves them or not."""
    found = []
    for device in sorted(root.iterdir()) if root.is_dir() else []:
        vendor, kind = _first_word(device / "vendor"), _first_word(device / "class")
        if kind.startswith(("0x03", "0x12")) and vendor in GPU_VENDORS:
            found.append(GPU_VENDORS[vendor])
    return found


def nvidia_driver() -> str | None:
    """The version of the NVIDIA driver; None where there is none."""
    table = Path("/proc/driver/nvidia/version")
    if table.exists():
        return driver_of(table.read_text(errors="replace"))
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    return driver_of(done.stdout) if done.returncode == 0 else None


def driver_of(text: str) -> str | None:
    """The version in /proc/driver/nvidia/version, or in what nvidia-smi prints."""
    found = re.search(r"\b(\d{3,}\.\d+(\.\d+)?)\b", text)
    return found.group(1) if found else None


# What each tool is tried with: a program without network, in its own process and user namespaces.
ISOLATION = {
    "bubblewrap": ("bwrap", "--ro-bind", "/", "/", "--dev", "/dev", "--unshare-all", "--die-with-parent", "true"),
    "nsjail": ("nsjail", "-Mo", "--really_quiet", "--chroot", "/", "--", "/bin/true"),
    "user namespaces": ("unshare", "--user", "--map-root-user", "--net", "--pid", "--fork", "true"),
}


def isolation() -> dict[str, str]:
    """What each tool that isolates a program said when it was tried: "works", "missing", or its error."""
    return {name: _try(command) for name, command in ISOLATION.items()}


def _try(command: Sequence[str]) -> str:
    if shutil.which(command[0]) is None:
        return "missing"
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    said = (done.stderr or done.stdout).strip().splitlines()
    return "works" if done.returncode == 0 else (said[-1] if said else f"exit code {done.returncode}")


def hub_cache(environment: Mapping[str, str]) -> Path:
    """Where the hub's library keeps models."""
    if chosen := environment.get("HF_HUB_CACHE") or environment.get("HUGGINGFACE_HUB_CACHE"):
        return Path(chosen).expanduser()
    caches = Path(environment.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return Path(environment.get("HF_HOME") or caches / "huggingface").expanduser() / "hub"


def allowed_cpus() -> int:
    """CPUs that this process may run on."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
