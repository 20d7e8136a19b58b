"""What the benchmarks share: running a program under observation, describing the machine, and the results file."""

import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "RESULTS.md"
SHIKOMI = str(Path(sys.executable).with_name("shikomi"))

# The settings that this project gives its own process, as glibc takes them from the environment.
ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(8 << 30),
    "MALLOC_TOP_PAD_": str(256 << 20),
}


class Failed(SystemExit):
    """A program under measurement failed, or learned nothing."""


@dataclass(frozen=True)
class Done:
    """A finished program: its last line as JSON, wall seconds, peak memory in bytes, when it started (epoch)."""

    result: dict[str, Any]
    wall_seconds: float
    peak_memory_bytes: int
    started_at: float


def run(command: list[str], env: dict[str, str] | None = None, watch: Callable[[int], None] | None = None) -> Done:
    """Run a program whose last line on stdout is JSON; `watch(pid)` runs beside it in a thread.

    The peak is the kernel's count for this very process (`ru_maxrss`), measured alike for everyone.
    """
    environment = {**os.environ, "OMP_DYNAMIC": "FALSE", "HF_HUB_OFFLINE": "1", **(env or {})}
    started_at = time.time()
    child = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, cwd=HERE.parent
    )
    assert child.stdout is not None and child.stderr is not None
    noise: list[str] = []
    drain = threading.Thread(target=lambda: noise.extend(child.stderr or ()))
    drain.start()
    if watch:
        threading.Thread(target=watch, args=(child.pid,), daemon=True).start()
    lines = child.stdout.read().strip().splitlines()
    _, status, usage = os.wait4(child.pid, 0)
    wall = time.time() - started_at
    drain.join()
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode != 0 or not lines:
        raise Failed(f"{' '.join(command)}\nexited {child.returncode}\n{''.join(noise[-40:])}")
    scale = 1 if sys.platform == "darwin" else 1024
    return Done(json.loads(lines[-1]), wall, usage.ru_maxrss * scale, started_at)


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The training records of a run, one a step."""
    lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [record for line in lines if "loss" in (record := json.loads(line))]


def cpu_flags() -> set[str]:
    """Instruction sets of this CPU, where the system tells (Linux)."""
    info = Path("/proc/cpuinfo")
    found = re.search(r"^(?:flags|Features)\s*:(.*)$", info.read_text(), re.M) if info.exists() else None
    return set(found.group(1).split()) if found else set()


def has_bf16_units() -> bool:
    """Whether bf16 matrix products run in hardware (AVX512-BF16, AMX, or Arm's bf16)."""
    return bool(cpu_flags() & {"avx512_bf16", "amx_bf16", "bf16"})


def machine() -> str:
    """One line: processor, cores, memory, instruction sets, system, versions."""
    info = Path("/proc/cpuinfo")
    name = re.search(r"model name\s*:\s*(.*)", info.read_text()) if info.exists() else None
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    units = sorted(cpu_flags() & {"avx2", "avx512f", "avx512_bf16", "amx_bf16", "bf16"})
    versions = ", ".join(f"{p} {importlib.metadata.version(p)}" for p in ("torch", "transformers", "peft", "trl"))
    return (
        f"{name.group(1) if name else platform.processor()}, {os.cpu_count()} cores, {memory:.0f} GiB, "
        f"{' '.join(units) or 'no known vector units'}; {platform.system()} {platform.release()}, "
        f"Python {platform.python_version()}, {versions}"
    )


def write_section(name: str, title: str, text: str, command: str) -> None:
    """Put one benchmark's result into RESULTS.md in the place of its former one."""
    head = "# Results\n\nWritten by `make bench`; every section says when, on what machine and by which command.\n"
    whole = RESULTS.read_text(encoding="utf-8") if RESULTS.exists() else head
    section = (
        f"<!-- {name} -->\n## {title}\n\n{date.today().isoformat()}, `{command}`\n\n{machine()}\n\n"
        f"{text.strip()}\n<!-- /{name} -->\n"
    )
    pattern = re.compile(rf"<!-- {name} -->.*?<!-- /{name} -->\n", re.S)
    if pattern.search(whole):
        whole = pattern.sub(lambda _: section, whole)
    else:
        whole = f"{whole.rstrip()}\n\n{section}"
    RESULTS.write_text(whole, encoding="utf-8")
    print(f"\n{title}\n{text.strip()}\n\n-> {RESULTS.relative_to(HERE.parent)}")


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
