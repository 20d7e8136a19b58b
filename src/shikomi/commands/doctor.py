"""doctor: whether this machine and installation can train, line by line, with what puts each thing right."""

from __future__ import annotations

import locale
import os
import platform
import shutil
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from shikomi.commands.output import Json, emit, showing
from shikomi.doctor import checks, versions
from shikomi.doctor.checks import Line, attempt
from shikomi.plan import machine_facts as machine
from shikomi.progress import Progress

EXIT_BROKEN = 1
"""Something that a run needs does not work."""

DOCTOR = """Look at this machine and installation: versions, processor, GPU, memory, disks, and a tiny model trained.

Every line is OK, WARN or FAIL, with the command that puts it right. Exit code 1 where something would stop a run.

\b
Examples:
  shikomi doctor
  shikomi doctor --output-dir runs --quick
"""


def doctor(
    output_dir: Annotated[Path, typer.Option(help="Where runs will be written: its disk is looked at.")] = Path("runs"),
    quick: Annotated[bool, typer.Option("--quick", help="Half a second of training instead of five.")] = False,
    as_json: Json = False,
) -> None:
    """Nothing is written and nothing is fetched."""
    with showing(as_json) as progress:
        lines = examine(output_dir, quick, progress)
    counted = checks.counts(lines)
    code = EXIT_BROKEN if counted["FAIL"] else 0
    if as_json:
        emit({"checks": [vars(line) for line in lines], "counts": counted, "exit_code": code})
    else:
        print_lines(lines)
    if code:
        raise typer.Exit(code)


def examine(output_dir: Path, quick: bool, progress: Progress) -> list[Line]:
    """All checks in order; what needs torch is left out where torch does not work."""
    progress.phase("looking at versions")
    lines = [checks.check_python(sys.version_info[:3], 64 if sys.maxsize > 2**32 else 32)]
    lines += attempt("versions", _versions, "pip install --force-reinstall shikomi")
    progress.phase("importing torch")
    broken = attempt("torch", _import_torch, "pip install --force-reinstall torch transformers")
    lines += broken
    progress.phase("looking at the machine")
    cpu = machine.read_cpu()
    lines.append(checks.check_cpu(cpu))
    if not broken:
        lines += _with_torch(cpu, progress)
    lines.append(checks.check_memory(machine.read_memory(machine.read_limits())))
    lines += _volumes(output_dir, bool(broken))
    lines.append(checks.check_sandbox(machine.isolation(), platform.system()))
    lines.append(checks.check_compiler(next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)))
    environment = dict(os.environ)
    lines.append(checks.check_hub(environment, checks.hub_models(machine.hub_cache(environment))))
    encoding = locale.getpreferredencoding(False)
    lines.append(checks.check_terminal(encoding, sys.stdout.encoding, environment.get("TERM", ""), sys.stderr.isatty()))
    if not broken:
        lines += _training(quick, progress)
    return lines


def _versions() -> list[Line]:
    """The packages on lines of their own, then pairs of them."""
    needed = versions.declared("shikomi")
    optional = versions.extra_of("shikomi", "quant")
    found = versions.installed(["shikomi", *(r.name for r in (*needed, *optional))])
    shown = [r for r in (*needed, *optional) if r.name in versions.PACKAGES]
    lines = [Line("shikomi", "OK", found.get("shikomi", "from a folder, not installed"))]
    lines += [checks.check_package(r, found.get(r.name), r in optional) for r in shown]
    theirs = {name: versions.declared(name) for name in ("transformers", "tokenizers", "torch", "bitsandbytes")}
    ours = {"shikomi": [r for r in needed if r not in shown]}
    names = [r.name for wanted in theirs.values() for r in wanted]
    everything = versions.installed(["shikomi", *names, *(r.name for r in (*needed, *optional)), "triton"])
    return lines + checks.check_versions(everything, theirs | ours)


def _import_torch() -> list[Line]:
    import shikomi.doctor.trials  # noqa: F401  imports torch, transformers and the engine

    return []


def _with_torch(cpu: machine.Cpu, progress: Progress) -> list[Line]:
    """Threads, arithmetic, GPU and 4-bit kernels."""
    import torch

    from shikomi.doctor import trials

    progress.phase("measuring products of matrices")
    used, allowed = torch.get_num_threads(), machine.allowed_cpus()
    lines = checks.check_threads(cpu, machine.read_limits(), allowed, used, machine.initial_environment())
    lines += attempt("arithmetic", trials.measure_arithmetic, trials.REINSTALL)
    gpu = trials.read_gpu(machine.gpus_on_bus(), machine.nvidia_driver())
    lines += attempt("gpu", partial(trials.check_gpu, gpu), trials.CUDA_BUILD)
    if versions.installed(["bitsandbytes"]):
        kernels = partial(trials.measure_kernels, gpu.usable == "cuda")
        lines += attempt("4-bit kernels", kernels, checks.SHIKOMI_EXTRA)
    return lines


def _volumes(output_dir: Path, torch_is_broken: bool) -> list[Line]:
    """The disks of what a run writes."""
    places = {"output": output_dir, "hub cache": machine.hub_cache(os.environ), "temp": Path(tempfile.gettempdir())}
    lines = [checks.check_volume(machine.read_volume(role, path)) for role, path in places.items()]
    if torch_is_broken:
        return lines
    from shikomi.model.catalog import cache_root

    cache = cache_root()
    return [*lines, checks.check_volume(machine.read_volume("cache", cache), machine.folder_bytes(cache))]


def _training(quick: bool, progress: Progress) -> list[Line]:
    """A tiny model on the CPU, and on the GPU where there is one."""
    import torch

    from shikomi.doctor import trials

    seconds = trials.QUICK_SECONDS if quick else trials.SECONDS
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    devices += ["mps"] if torch.backends.mps.is_available() else []
    lines = []
    for device in devices:
        progress.phase(f"training a tiny model on {device}")
        lines += attempt(f"training: {device}", partial(trials.train_tiny, device, seconds), trials.REINSTALL)
    return lines


def print_lines(lines: list[Line]) -> None:
    """One line a check, its fix below; then the count."""
    coloured = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    colours = {"OK": "\x1b[32m", "WARN": "\x1b[33m", "FAIL": "\x1b[1;31m"}
    width = max(len(line.name) for line in lines)
    for line in lines:
        status = f"{colours[line.status]}{line.status:<4}\x1b[0m" if coloured else f"{line.status:<4}"
        print(f"{status}  {line.name:<{width}}  {line.says}")
        if line.fix is not None:
            print(f"{'':<{width + 8}}fix: {line.fix}")
    counted = checks.counts(lines)
    print(", ".join(f"{count} {status}" for status, count in counted.items()))
