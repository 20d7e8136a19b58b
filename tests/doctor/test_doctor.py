"""The doctor: every check on healthy values and on broken ones; kernels and a tiny model for real."""

import json
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

from shikomi.cli import main
from shikomi.doctor import checks, trials, versions
from shikomi.doctor import examine as command
from shikomi.doctor.checks import Line
from shikomi.plan import machine_facts as machine
from shikomi.plan.machine_facts import Cpu, Limits, Memory, Volume

GB = 10**9
ZEN = Cpu("AMD EPYC", "x86_64", frozenset({"avx2", "avx512f", "avx512_bf16"}), 4, 8)

CPUINFO = """processor\t: {n}
model name\t: Some CPU
physical id\t: 0
core id\t\t: {core}
flags\t\t: fpu sse2 avx2 amx_bf16

"""
ARM = """processor\t: 0
BogoMIPS\t: 50.00
Features\t: fp asimd sve bf16 i8mm

processor\t: 1
BogoMIPS\t: 50.00
Features\t: fp asimd sve bf16 i8mm
"""
MEMINFO = "MemTotal:       32000000 kB\nMemFree: 1000 kB\nMemAvailable:   16000000 kB\nHugePages_Total:       0\n"


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_python_must_be_new_enough_and_wide_enough():
    assert checks.check_python((3, 12, 1), 64) == Line("python", "OK", "3.12.1")
    old = checks.check_python((3, 10, 4), 64)
    assert old.status == "FAIL" and "3.10.4; 3.11" in old.says and old.fix == "python3.11 -m venv .venv"
    assert checks.check_python((3, 12, 1), 32).status == "FAIL"


@pytest.mark.parametrize(
    "found, optional, status, fix",
    [
        ("5.24.0", False, "OK", None),
        ("5.4.0.dev0", False, "OK", None),
        ("5.3.0+cpu", False, "OK", None),
        ("5.3.0.dev0", False, "OK", None),
        ("4.57.1", False, "FAIL", "pip install --upgrade 'transformers>=5.3'"),
        (None, False, "FAIL", "pip install --upgrade 'transformers>=5.3'"),
        (None, True, "WARN", checks.SHIKOMI_EXTRA),
        ("not a version", False, "FAIL", "pip install --upgrade 'transformers>=5.3'"),
    ],
)
def test_a_package_is_held_against_what_is_required(found, optional, status, fix):
    line = checks.check_package(Requirement("transformers>=5.3"), found, optional)
    assert (line.name, line.status, line.fix) == ("transformers", status, fix)


def test_what_is_required_is_what_the_package_declares():
    names = {r.name for r in versions.declared("shikomi")}
    assert {"torch", "transformers", "safetensors", "tokenizers", "numpy"} <= names
    assert [r.name for r in versions.extra_of("shikomi", "quant")] == ["bitsandbytes"]
    assert "bitsandbytes" not in names and versions.declared("no-such-package-here") == []


@pytest.mark.parametrize(
    "found, part",
    [
        ({"numpy": "2.1.0", "torch": "2.2.2+cpu"}, "NumPy 1"),
        ({"transformers": "5.0.0", "torch": "2.3.1"}, "switches torch off"),
        ({"transformers": "5.3.0", "huggingface-hub": "0.36.0"}, "is_offline_mode"),
        ({"transformers": "4.56.1", "huggingface-hub": "1.0.0"}, "refuses"),
        ({"triton": "3.2.0", "bitsandbytes": "0.45.0"}, "triton.ops"),
    ],
)
def test_known_bad_pairs_fail_with_their_source(found, part):
    (line,) = checks.check_versions(found, {})
    assert line.status == "FAIL" and part in line.says and "https://github.com/" in line.says and line.fix
    name = next(iter(found))
    assert checks.check_versions({k: v for k, v in found.items() if k != name}, {})[0].status == "OK"


def test_requirements_of_the_packages_among_themselves_are_checked():
    wanted = {"transformers": [Requirement("tokenizers>=0.23.1,<0.24"), Requirement("Some_Thing")]}
    assert checks.check_versions({"tokenizers": "0.23.3", "some-thing": "1"}, wanted)[0].status == "OK"
    lines = checks.check_versions({"tokenizers": "0.22.0"}, wanted)
    assert [line.status for line in lines] == ["WARN", "WARN"]
    assert lines[0].fix == "pip install 'tokenizers<0.24,>=0.23.1'" and "not installed" in lines[1].says


def test_processors_are_read_from_the_tables_of_linux_and_macos():
    cpu = machine.cpu_of_cpuinfo("".join(CPUINFO.format(n=n, core=n // 2) for n in range(4)), "x86_64")
    assert (cpu.model, cpu.cores, cpu.threads, cpu.has_bf16) == ("Some CPU", 2, 4, True)
    arm = machine.cpu_of_cpuinfo(ARM, "aarch64")
    assert (arm.cores, arm.threads, arm.has_bf16) == (None, 2, True) and "i8mm" in arm.flags
    mac = "hw.physicalcpu: 8\nhw.logicalcpu: 8\nhw.optional.arm.FEAT_BF16: 1\nmachdep.cpu.brand_string: Apple M4\n"
    apple = machine.cpu_of_sysctl(mac, "arm64")
    assert (apple.model, apple.cores, apple.has_bf16) == ("Apple M4", 8, True)
    assert machine.cpu_of_cpuinfo("", "x86_64").threads >= 1


def test_a_processor_without_avx2_is_a_warning_and_bf16_units_are_said():
    assert checks.check_cpu(ZEN).status == "OK" and "multiplies bf16" in checks.check_cpu(ZEN).says
    plain = Cpu("Old", "x86_64", frozenset({"sse2"}), 2, 2)
    assert checks.check_cpu(plain).status == "WARN" and "AVX2" in checks.check_cpu(plain).says
    line = checks.check_cpu(Cpu("New", "x86_64", frozenset({"avx2"}), 2, 2))
    assert line.status == "OK" and "no bf16 units" in line.says
    assert "bf16, i8mm" in checks.check_cpu(Cpu("N", "aarch64", frozenset({"bf16", "i8mm"}), None, 2)).says


@pytest.mark.parametrize(
    "quota, allowed, used, fix",
    [
        (None, 8, 4, None),
        (None, 8, 8, "export OMP_NUM_THREADS=4"),
        (2.0, 8, 4, "export OMP_NUM_THREADS=2"),
        (0.5, 8, 2, "export OMP_NUM_THREADS=1"),
        (16.0, 8, 4, None),
        (None, 2, 4, "export OMP_NUM_THREADS=2"),
    ],
)
def test_threads_are_held_against_cores_quota_and_affinity(quota, allowed, used, fix):
    (line,) = checks.check_threads(ZEN, Limits(cpus=quota), allowed, used, {})
    assert (line.status, line.fix) == ("WARN" if fix else "OK", fix)
    assert ("quota" in line.says) is (quota is not None)


@pytest.mark.parametrize("value, warns", [("TRUE", True), ("1", True), ("false", False), ("", False)])
def test_omp_dynamic_of_the_shell_is_told(value, warns):
    found = machine.environment_of(f"A=b\0OMP_DYNAMIC={value}\0".encode())
    lines = checks.check_threads(ZEN, Limits(), 8, 4, found)
    assert any(line.fix == "unset OMP_DYNAMIC" for line in lines) is warns


def test_limits_of_cgroup_v2_are_the_tightest_on_the_way_up(tmp_path):
    root = write(
        tmp_path,
        {
            "cgroup.controllers": "cpu memory",
            "a/memory.max": "4000000000\n",
            "a/memory.current": "3000000000\n",
            "a/memory.stat": "anon 1\ninactive_file 1000000000\n",
            "a/cpu.max": "150000 100000\n",
            "a/b/memory.max": "max\n",
            "a/b/cpu.max": "max 100000\n",
        },
    )
    assert machine.limits_of("0::/a/b\n", root) == Limits(4 * GB, 2 * GB, 1.5)
    assert machine.limits_of("0::/elsewhere\n", root) == Limits()
    assert machine.limits_of("", root) == Limits()


def test_limits_of_cgroup_v1_are_read_also_where_only_the_mounts_root_is_seen(tmp_path):
    unlimited = "9223372036854771712\n"
    root = write(
        tmp_path,
        {
            "memory/memory.limit_in_bytes": "2000000000\n",
            "memory/memory.usage_in_bytes": "500000000\n",
            "memory/memory.stat": "inactive_file 9\ntotal_inactive_file 100000000\n",
            "cpu,cpuacct/cpu.cfs_quota_us": "50000\n",
            "cpu,cpuacct/cpu.cfs_period_us": "100000\n",
        },
    )
    table = "5:memory:/docker/abc\n3:cpu,cpuacct:/docker/abc\n1:name=systemd:/\n0::/\n"
    assert machine.limits_of(table, root) == Limits(2 * GB, 400_000_000, 0.5)
    write(root, {"memory/memory.limit_in_bytes": unlimited, "cpu,cpuacct/cpu.cfs_quota_us": "-1\n"})
    assert machine.limits_of(table, root) == Limits()


@pytest.mark.parametrize(
    "available, limits, status, free",
    [
        (16_384_000_000, Limits(), "OK", 16_384_000_000),
        (3 * GB, Limits(), "WARN", 3 * GB),
        (GB // 2, Limits(), "FAIL", GB // 2),
        (16 * GB, Limits(4 * GB, 3 * GB + 1), "FAIL", GB - 1),
        (16 * GB, Limits(8 * GB, 2 * GB), "OK", 6 * GB),
        (16 * GB, Limits(900 * GB, 100 * GB), "OK", 16 * GB),
    ],
)
def test_memory_is_what_machine_and_container_leave(available, limits, status, free):
    memory = machine.memory_of(MEMINFO.replace("16000000", str(available // 1024)), limits)
    assert abs(memory.free - free) < 1024
    line = checks.check_memory(memory)
    assert line.status == status and (line.fix is None) is (status == "OK")
    assert ("container" in line.says) is (limits.memory is not None and limits.memory < 32 * GB)
    assert checks.check_memory(None).status == "OK"


@pytest.mark.parametrize(
    "role, free, kind, writable, status",
    [
        ("output", 90 * GB, "ext4", True, "OK"),
        ("output", 90 * GB, "ext4", False, "FAIL"),
        ("output", 2 * GB, "ext4", True, "WARN"),
        ("cache", GB // 10, "ext4", True, "FAIL"),
        ("temp", 2 * GB, "tmpfs", True, "OK"),
    ],
)
def test_disks(role, free, kind, writable, status):
    volume = Volume(role, Path("runs"), Path("."), free, kind, writable)
    line = checks.check_volume(volume, 5)
    assert (line.name, line.status) == (f"disk: {role}", status) and (line.fix is None) is (status == "OK")
    assert ("takes memory" in line.says) is (kind == "tmpfs")


def test_the_volume_of_a_folder_that_is_not_there_yet_is_that_of_the_one_above(tmp_path):
    volume = machine.read_volume("output", tmp_path / "a" / "b")
    assert volume.existing == tmp_path and volume.writable and volume.free > 0
    (tmp_path / "file").write_text("12345")
    assert not machine.read_volume("output", tmp_path / "file" / "b").writable
    assert machine.folder_bytes(tmp_path) == 5
    mounts = "/dev/a / ext4 rw 0 0\ntmpfs /mine/my\\040runs tmpfs rw 0 0\n/dev/b /mine xfs rw 0 0\n"
    assert machine.file_system(mounts, Path("/mine/my runs/x")) == "tmpfs"
    assert machine.file_system(mounts, Path("/mine/other")) == "xfs"
    assert machine.file_system(mounts, Path("/else")) == "ext4"


def test_the_sandbox_tier_is_the_strongest_that_works(tmp_path, monkeypatch):
    works = checks.check_sandbox({"bubblewrap": "works", "nsjail": "missing"}, "Linux")
    assert works.status == "OK" and "bubblewrap can isolate" in works.says
    refused = {"bubblewrap": "missing", "user namespaces": "unshare: Operation not permitted"}
    line = checks.check_sandbox(refused, "Linux")
    assert line.status == "WARN" and "limits only" in line.says and line.fix.startswith("allow user namespaces")
    assert checks.check_sandbox({"bubblewrap": "missing"}, "Linux").fix == "sudo apt install bubblewrap"
    assert checks.check_sandbox({"bubblewrap": "missing"}, "Darwin").status == "WARN"
    for name, text in {"bwrap": "exit 0", "nsjail": "echo no right >&2; exit 3"}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert machine.isolation() == {"bubblewrap": "works", "nsjail": "no right", "user namespaces": "missing"}


def test_a_compiler_is_never_needed():
    assert [checks.check_compiler(path).status for path in (None, "cc")] == ["OK", "OK"]
    assert "none is needed" in checks.check_compiler(None).says


def test_the_hub_offline_with_an_empty_cache_is_a_warning_and_a_token_is_never_shown(tmp_path):
    line = checks.check_hub({"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "0"}, 0)
    assert line.status == "WARN" and line.fix == "unset HF_HUB_OFFLINE"
    assert checks.check_hub({"HF_HUB_OFFLINE": "1"}, 3).status == "OK"
    line = checks.check_hub({"HF_TOKEN": "hf_secret"}, 0)
    assert line.status == "OK" and "HF_TOKEN is set" in line.says and "secret" not in line.says
    (tmp_path / "hub" / "models--a--b").mkdir(parents=True)
    assert checks.hub_models(machine.hub_cache({"HF_HOME": str(tmp_path)})) == 1
    assert machine.hub_cache({"HF_HUB_CACHE": "x", "HF_HOME": "y"}) == Path("x")


def test_an_encoding_that_is_not_utf8_is_a_warning():
    assert checks.check_terminal("UTF-8", "utf-8", "xterm", True).status == "OK"
    assert "plain lines" in checks.check_terminal("utf8", "utf-8", "dumb", True).says
    line = checks.check_terminal("ANSI_X3.4-1968", "cp1252", "xterm", True)
    assert line.status == "WARN" and "files ANSI_X3.4-1968, output cp1252" in line.says and "PYTHONUTF8" in line.fix


def gpu(**changed) -> trials.Gpu:
    values = dict(
        cards=("NVIDIA",), driver="570.86.10", torch_version="2.13.0+cu128", cuda="12.8", hip=None, usable="cuda"
    )
    values |= dict(names=("L4",), capabilities=((8, 9),), kernels=("sm_80", "sm_90"), free=20 * GB, total=24 * GB)
    return trials.Gpu(**(values | changed))  # type: ignore[arg-type]


NONE = dict(names=(), capabilities=(), kernels=(), free=None, total=None, usable=None)


@pytest.mark.parametrize(
    "changed, status, part",
    [
        ({}, "OK", "L4, 20.0 GB free of 24.0 GB; CUDA 12.8, driver 570.86.10; bf16"),
        ({"has_bf16": False}, "OK", "dtype auto is fp16"),
        ({"names": ("V100",), "capabilities": ((7, 0),)}, "FAIL", "V100 (sm_70)"),
        ({"capabilities": ((9, 0),), "kernels": ("sm_80", "compute_80")}, "OK", "bf16"),
        ({"capabilities": ((9, 0),), "kernels": ("sm_80",)}, "FAIL", "has no kernels"),
        ({"cuda": None, "hip": "6.4", "cards": ("AMD",), "kernels": ("gfx942",), "driver": None}, "OK", "ROCm 6.4"),
        (NONE | {"cards": (), "cuda": None}, "OK", "computes on the CPU"),
        (NONE | {"cards": ()}, "OK", "computes on the CPU"),
        (NONE | {"cuda": None}, "WARN", "a build for CPUs"),
        (NONE | {"driver": None}, "WARN", "without a driver"),
        (NONE | {"driver": "470.1"}, "WARN", "too old for CUDA 12.8"),
        (NONE | {"driver": "570.1", "cuda": "13.0"}, "WARN", "580 or newer"),
        (NONE, "WARN", "finds no device"),
        (NONE | {"cards": ("AMD",), "driver": None}, "WARN", "built for CUDA 12.8"),
        (NONE | {"usable": "mps", "cards": (), "macos": "15.2"}, "OK", "MPS, macOS 15.2"),
        (NONE | {"usable": "mps", "cards": (), "macos": "13.6"}, "FAIL", "needs macOS 14"),
    ],
)
def test_gpu_driver_and_build_must_go_together(changed, status, part):
    line = trials.check_gpu(gpu(**changed))
    assert line.status == status and part in line.says and (line.fix is None) is (status == "OK")


def test_cards_and_drivers_are_read_from_the_kernels_tables(tmp_path):
    root = write(
        tmp_path,
        {
            "0/vendor": "0x10de\n",
            "0/class": "0x030200\n",
            "1/vendor": "0x10de\n",
            "1/class": "0x040300\n",
            "2/vendor": "0x1002\n",
            "2/class": "0x030000\n",
            "3/vendor": "0x8086\n",
            "3/class": "0x030000\n",
        },
    )
    assert machine.gpus_on_bus(root) == ["NVIDIA", "AMD"]
    assert machine.gpus_on_bus(root / "none") == []
    text = (
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.183.01  Sun May 12 19:39:15 UTC 2024\nGCC version: 12.3.0"
    )
    assert machine.driver_of(text) == "535.183.01" and machine.driver_of("570.86\n") == "570.86"
    assert machine.driver_of("no driver") is None


def test_arithmetic_warns_where_the_chosen_one_is_slower():
    assert trials.check_arithmetic(900e9, 200e9, "bf16").status == "OK"
    line = trials.check_arithmetic(50e9, 200e9, "bf16")
    assert line.status == "WARN" and "dtype: fp32" in line.fix
    assert trials.check_arithmetic(1e9, 200e9, "fp32").status == "OK"
    assert trials.rate(torch.float32, torch.device("cpu"), 8, 8, seconds=0) > 0


def test_four_bit_kernels_give_the_bits_of_plain_torch_and_others_fail(monkeypatch):
    pytest.importorskip("bitsandbytes")
    cpu = torch.device("cpu")
    assert trials.nf4_errors(cpu) == 0
    assert trials.measure_kernels(gpu=False).status == "OK"
    write = trials._bnb.FourBit.write

    def wrong(self, into):
        write(self, into)
        into[3, 5] = torch.nextafter(into[3, 5], torch.tensor(9.0))

    monkeypatch.setattr(trials._bnb.FourBit, "write", wrong)
    assert trials.nf4_errors(cpu) == 1
    line = trials.measure_kernels(gpu=False)
    assert line.status == "FAIL" and "1 wrong numbers on cpu" in line.says and line.fix


def test_a_tiny_model_trains_through_the_engine():
    trial = trials.tiny_run("cpu", 0)
    assert trial.path == "fused" and trial.tokens_per_second > 0
    assert 7 < trial.loss < 10  # log(4096) = 8.3
    assert 0 < trial.grad_norm < 100
    assert trials.check_trial(trial).status == "OK"


@pytest.mark.parametrize(
    "changed, status", [({"loss": float("nan")}, "FAIL"), ({"grad_norm": float("inf")}, "FAIL"),
                        ({"grad_norm": 0.0}, "FAIL"), ({"path": "separate"}, "WARN"), ({}, "OK")]
)  # fmt: skip
def test_numbers_that_are_not_finite_or_no_gradient_fail(changed, status):
    good = dict(device="cpu", arithmetic="float32", path="fused", tokens_per_second=9.0, loss=8.3, grad_norm=0.5)
    assert trials.check_trial(trials.Trial(**(good | changed))).status == status  # type: ignore[arg-type]


def test_a_check_that_breaks_is_a_fail_with_its_error():
    def broken() -> Line:
        raise OSError("libtorch.so: undefined symbol\nmore")

    (line,) = checks.attempt("torch", broken, "pip install torch")
    assert line == Line("torch", "FAIL", "does not work: OSError: libtorch.so: undefined symbol", "pip install torch")
    assert checks.attempt("a", lambda: Line("a", "OK", ""), "") == [Line("a", "OK", "")]


@pytest.fixture
def quick(monkeypatch, tmp_path):
    """No sleep and a healthy machine, whatever this one is."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(trials, "QUICK_SECONDS", 0)
    monkeypatch.setattr(machine, "read_memory", lambda limits: Memory(32 * GB, 16 * GB))
    monkeypatch.setattr(machine, "read_volume", lambda role, path: Volume(role, path, path, 90 * GB, "ext4", True))


def report(capsys) -> dict:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_the_command_runs_every_check_and_leaves_with_0(quick, capsys, tmp_path):
    assert main(["doctor", "--quick", "--json", "--output-dir", "mine"]) == 0
    said = report(capsys)
    names = {line["name"] for line in said["checks"]}
    assert {"python", "shikomi", "torch", "versions", "cpu", "threads", "arithmetic", "gpu", "memory", "disk: output",
            "disk: cache", "disk: temp", "disk: hub cache", "sandbox", "compiler", "hub", "terminal", "4-bit kernels",
            "training: cpu"} <= names  # fmt: skip
    assert said["counts"]["FAIL"] == 0 and said["exit_code"] == 0
    assert next(line["says"] for line in said["checks"] if line["name"] == "disk: output").startswith("mine")
    assert list(tmp_path.iterdir()) == [], "the doctor wrote something"


def test_a_fail_is_printed_with_its_fix_and_leaves_with_1(quick, capsys, monkeypatch):
    monkeypatch.setattr(machine, "read_memory", lambda limits: Memory(32 * GB, GB // 2))
    monkeypatch.setattr(command, "_training", lambda quick, progress: [])
    assert main(["doctor", "--quick"]) == 1
    lines = capsys.readouterr().out.splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("FAIL  memory"))
    assert lines[at + 1].strip() == "fix: close other programs"
    assert lines[-1].endswith(", 1 FAIL")


def test_a_torch_that_cannot_be_imported_leaves_the_other_checks(quick, capsys, monkeypatch):
    def broken():
        raise ImportError("libcudart.so.13: cannot open shared object file")

    monkeypatch.setattr(command, "_import_torch", broken)
    assert main(["doctor", "--quick", "--json"]) == 1
    lines = {
        line["name"]: line for line in report(capsys)["checks"] if line["status"] != "OK" or "disk" in line["name"]
    }
    assert "libcudart.so.13" in lines["torch"]["says"] and "disk: output" in lines
    assert "training: cpu" not in lines
