"""All checks of this machine and installation, in order; what needs torch is imported after torch was tried."""

from __future__ import annotations

import locale
import os
import platform
import shutil
import sys
import tempfile
from functools import partial
from pathlib import Path

from shikomi.doctor import checks, versions
from shikomi.doctor.checks import Line, attempt
from shikomi.plan import machine_facts as machine
from shikomi.progress import Progress


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
