"""`shikomi doctor`: each check is a function of values that gives a line OK, WARN or FAIL, with what puts it right.

FAIL means that a run would stop or give wrong numbers, WARN that it would be slower or miss something. What is measured
with torch is in `trials.py`; how the values are read, in `machine_facts.py` and `versions.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement

from shikomi.doctor.versions import BAD_PAIRS, BadPair, known_to_be_bad, satisfies, unmet
from shikomi.plan.machine_facts import Cpu, Limits, Memory, Volume
from shikomi.progress import size

Status = Literal["OK", "WARN", "FAIL"]

LEAST_PYTHON = (3, 11)
GB = 10**9
LEAST_MEMORY, LITTLE_MEMORY = GB, 4 * GB  # the smallest shipped model trains in 1.3 GB
LEAST_DISK, LITTLE_DISK = GB // 5, 5 * GB
SHIKOMI_EXTRA = "pip install --upgrade 'shikomi[quant]'"


@dataclass(frozen=True)
class Line:
    """What one check says: a name, a status, one sentence, and the command or setting that puts it right."""

    name: str
    status: Status
    says: str
    fix: str | None = None


def attempt(name: str, check: Callable[[], Line | list[Line]], fix: str) -> list[Line]:
    """The lines of a check; one that breaks is a FAIL with its error and `fix`, so that the others still run."""
    try:
        lines = check()
    except Exception as error:  # whatever a broken installation raises is what the user needs to read
        said = (str(error).strip().splitlines() or ["no message"])[0]
        return [Line(name, "FAIL", f"does not work: {type(error).__name__}: {said}", fix)]
    return [lines] if isinstance(lines, Line) else lines


def check_python(version: Sequence[int], bits: int) -> Line:
    """Python's version and word size."""
    shown = ".".join(map(str, version[:3]))
    if tuple(version[:2]) < LEAST_PYTHON:
        wanted = ".".join(map(str, LEAST_PYTHON))
        return Line("python", "FAIL", f"{shown}; {wanted} or newer is needed", f"python{wanted} -m venv .venv")
    if bits < 64:
        return Line("python", "FAIL", f"{shown}, {bits} bits: torch needs 64", "install a 64-bit Python")
    return Line("python", "OK", shown)


def check_package(requirement: Requirement, found: str | None, optional: bool) -> Line:
    """One package against what Shikomi requires of it."""
    name, allowed = requirement.name, str(requirement.specifier)
    install = SHIKOMI_EXTRA if optional else f"pip install --upgrade '{name}{allowed}'"
    if found is None and optional:
        return Line(name, "WARN", "not installed: no 4-bit or 8-bit weights (quant), no 8-bit optimizers", install)
    if found is None:
        return Line(name, "FAIL", f"not installed; {allowed} is needed", install)
    if not satisfies(found, allowed):
        return Line(name, "FAIL", f"{found}; {allowed} is needed", install)
    return Line(name, "OK", found)


def check_versions(
    versions: Mapping[str, str],
    requirements: Mapping[str, Sequence[Requirement]],
    pairs: Sequence[BadPair] = BAD_PAIRS,
) -> list[Line]:
    """Installed versions against known bad pairs, and against what each package declares of the others."""
    lines = []
    for pair in known_to_be_bad(versions, pairs):
        named = " with ".join(f"{name} {versions[name]}" for name in pair.versions)
        lines.append(Line("versions", "FAIL", f"{named}: {pair.what} ({pair.source})", pair.fix))
    for package, wanted, here in unmet(requirements, versions):
        lines.append(Line("versions", "WARN", f"{package} requires {wanted}; here: {here}", f"pip install '{wanted}'"))
    return lines or [Line("versions", "OK", "no known bad pair; the packages' own requirements are met")]


def check_cpu(cpu: Cpu) -> Line:
    """The processor's instructions for matrices."""
    wanted = ("bf16", "i8mm", "sve") if cpu.is_arm else ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16")
    names = [flag for flag in wanted if flag in cpu.flags]
    shown = f"{cpu.model}: {', '.join(names) or 'none of ' + ', '.join(wanted)}"
    if not cpu.is_arm and "avx2" not in cpu.flags:
        fix = "use another machine or a GPU (device: cuda)"
        return Line("cpu", "WARN", f"{shown}; without AVX2 training is many times slower", fix)
    units = "multiplies bf16" if cpu.has_bf16 else "no bf16 units: weights are kept in bf16 and multiplied in fp32"
    return Line("cpu", "OK", f"{shown}; {units}")


def check_threads(cpu: Cpu, limits: Limits, allowed: int, used: int, environment: Mapping[str, str]) -> list[Line]:
    """Threads that torch would use against physical cores, the container's quota and the process's affinity.

    `allowed`: CPUs in the affinity mask; `environment`: as the process was started, before OMP_DYNAMIC was set here.
    """
    cores = min(cpu.cores or cpu.threads, allowed)
    shown = f"{used} threads; {cpu.cores or 'unknown'} cores, {cpu.threads} hardware threads, {allowed} allowed"
    lines = []
    if limits.cpus is not None:
        shown += f", container quota {limits.cpus:g} CPUs"
    most = cores if limits.cpus is None else min(cores, max(1, int(limits.cpus)))
    if used > most:
        why = "two threads of one core wait for each other in matrix products"
        if limits.cpus is not None and most < cores:
            why = "the container stops them for part of the time"
        lines.append(Line("threads", "WARN", f"{shown}; {why}", f"export OMP_NUM_THREADS={most}"))
    else:
        lines.append(Line("threads", "OK", shown))
    if environment.get("OMP_DYNAMIC", "").upper() in ("TRUE", "1"):
        says = "OMP_DYNAMIC=TRUE in the environment has given NaN; it is switched off here, not in your own scripts"
        lines.append(Line("threads", "WARN", says, "unset OMP_DYNAMIC"))
    return lines


def check_memory(memory: Memory | None) -> Line:
    """Free host memory, as far as the container allows."""
    if memory is None:
        return Line("memory", "OK", "this system does not tell how much is free")
    shown = f"{size(memory.free)} free of {size(memory.total)}"
    if memory.limit is not None:
        shown += f"; the container allows {size(memory.limit)}, {size(memory.used or 0)} of it in use"
    fix = "close other programs"
    if memory.limit is not None:
        fix += ", or start the container with more (docker run --memory)"
    if memory.free < LEAST_MEMORY:
        return Line("memory", "FAIL", f"{shown}; even the smallest model needs {size(LEAST_MEMORY)}", fix)
    if memory.free < LITTLE_MEMORY:
        return Line("memory", "WARN", f"{shown}; enough for models of a few 100 million parameters", fix)
    return Line("memory", "OK", shown)


def check_volume(volume: Volume, used: int | None = None) -> Line:
    """Free space and permission of one folder that runs write to; `used`: bytes that it holds already."""
    name, there = f"disk: {volume.role}", str(volume.path)
    setting = {
        "output": "choose another --output-dir (recipe: output_dir)",
        "cache": "export SHIKOMI_CACHE=FOLDER",
        "hub cache": "export HF_HOME=FOLDER",
        "temp": "export TMPDIR=FOLDER",
    }[volume.role]
    if not volume.writable:
        return Line(name, "FAIL", f"{there}: {volume.existing} is no folder that you can write to", setting)
    shown = f"{there}: {size(volume.free)} free" + ("" if used is None else f", {size(used)} in use by it")
    if volume.kind in ("tmpfs", "ramfs"):
        shown += f" ({volume.kind}: what is written there takes memory)"
    if volume.free < LEAST_DISK:
        return Line(name, "FAIL", f"{shown}; too little for a checkpoint", f"make room, or {setting}")
    if volume.free < LITTLE_DISK and volume.role != "temp":
        return Line(name, "WARN", f"{shown}; little for models and checkpoints", f"make room, or {setting}")
    return Line(name, "OK", shown)


def check_sandbox(tried: Mapping[str, str], system: str) -> Line:
    """The strongest isolation for programs that a model wrote; running them is not built yet, so this only reports."""
    working = [name for name, said in tried.items() if said == "works"]
    if working:
        return Line("sandbox", "OK", f"{', '.join(working)} can isolate programs that a model writes")
    told = "; ".join(f"{name}: {said}" for name, said in tried.items())
    if system != "Linux":
        return Line("sandbox", "WARN", f"resource limits only on {system}", "use a Linux container for generated code")
    refused = any(said not in ("works", "missing") for said in tried.values())
    fix = "allow user namespaces (docker run --security-opt seccomp=unconfined), or " if refused else ""
    return Line("sandbox", "WARN", f"resource limits only ({told})", f"{fix}sudo apt install bubblewrap")


def check_compiler(path: str | None) -> Line:
    """A C compiler is not needed; only torch.compile asks for one."""
    if path is None:
        return Line("compiler", "OK", "no C compiler; none is needed here (torch.compile would need one)")
    return Line("compiler", "OK", f"{path}; not needed here (torch.compile uses it)")


def check_hub(environment: Mapping[str, str], models_here: int) -> Line:
    """Whether models can be fetched; a token is named, never shown."""
    set_here = [name for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")
                if environment.get(name, "").upper() in ("1", "TRUE", "YES", "ON")]  # fmt: skip
    token = next((name for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN") if environment.get(name)), None)
    shown = f"{models_here} models in its cache; " + (f"{token} is set" if token else "no token in the environment")
    if endpoint := environment.get("HF_ENDPOINT"):
        shown += f"; HF_ENDPOINT is {endpoint}"
    if set_here and not models_here:
        says = f"{', '.join(set_here)} is set and the cache is empty: no hub id can be opened"
        return Line("hub", "WARN", says, f"unset {' '.join(set_here)}")
    return Line("hub", "OK", (f"offline ({', '.join(set_here)}); " if set_here else "") + shown)


def check_terminal(encoding: str, stdout: str, terminal: str, interactive: bool) -> Line:
    """Text encoding of files and of the terminal, and whether progress can be drawn."""
    wrong = [f"{what} {name}" for what, name in (("files", encoding), ("output", stdout)) if not _is_utf8(name)]
    if wrong:
        return Line("terminal", "WARN", f"not UTF-8: {', '.join(wrong)}", "export PYTHONUTF8=1 LANG=C.UTF-8")
    drawn = "progress is drawn" if interactive and terminal != "dumb" else "no terminal: progress as plain lines"
    return Line("terminal", "OK", f"UTF-8; {drawn}")


def _is_utf8(name: str) -> bool:
    return name.lower().replace("-", "").replace("_", "") in ("utf8", "utf8sig")


def counts(lines: Sequence[Line]) -> dict[Status, int]:
    """How many lines there are of each status."""
    return {status: sum(line.status == status for line in lines) for status in ("OK", "WARN", "FAIL")}


def hub_models(folder: Path) -> int:
    """Models in the hub's cache."""
    return len(list(folder.glob("models--*"))) if folder.is_dir() else 0
