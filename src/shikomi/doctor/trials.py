"""What the doctor tries with torch: bf16 against fp32, the GPU, bitsandbytes' kernels, a tiny model's gradients."""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from shikomi.adapters.lora import Lora
from shikomi.data.packing import Example
from shikomi.doctor.checks import SHIKOMI_EXTRA, Line
from shikomi.doctor.versions import MINIMUM_DRIVER, MPS_BF16, OLD_GPUS
from shikomi.model.device import Dtypes, choose_device, choose_dtypes
from shikomi.model.load import wrap
from shikomi.model.probe import choose_path
from shikomi.objectives.sft import Sft
from shikomi.progress import size
from shikomi.quant import _bnb
from shikomi.train.step import gradients, plan_step

SECONDS = 5.0
QUICK_SECONDS = 0.5
SLOWER = 1.2  # the chosen arithmetic may be this many times slower than the other before it is a warning
REINSTALL = "pip install --force-reinstall torch"
DRIVER = "install NVIDIA's driver (Ubuntu: sudo ubuntu-drivers install)"
CUDA_BUILD = f"{REINSTALL}, with the index that https://pytorch.org/get-started/locally names for your driver"


@dataclass(frozen=True)
class Gpu:
    """Graphics cards and what torch makes of them."""

    cards: tuple[str, ...]  # makers on the bus, or those that torch found
    driver: str | None  # NVIDIA's
    torch_version: str
    cuda: str | None  # that torch is built for
    hip: str | None
    usable: str | None  # cuda (also for ROCm), mps, or None
    names: tuple[str, ...] = ()
    capabilities: tuple[tuple[int, int], ...] = ()
    kernels: tuple[str, ...] = ()  # sm_80, compute_120, gfx942
    free: int | None = None
    total: int | None = None
    has_bf16: bool = True
    macos: str | None = None


def read_gpu(cards: list[str], driver: str | None) -> Gpu:
    """What torch finds; `cards` and `driver` are the kernel's."""
    version, cuda, hip = str(torch.__version__), torch.version.cuda, torch.version.hip
    macos = platform.mac_ver()[0] or None
    if torch.cuda.is_available():
        devices = range(torch.cuda.device_count())
        free, total = torch.cuda.mem_get_info()
        return Gpu(
            tuple(cards) or ("AMD" if hip else "NVIDIA",) * len(devices),
            driver,
            version,
            cuda,
            hip,
            "cuda",
            tuple(torch.cuda.get_device_name(i) for i in devices),
            tuple(torch.cuda.get_device_capability(i) for i in devices),
            tuple(torch.cuda.get_arch_list()),
            free,
            total,
            torch.cuda.is_bf16_supported(including_emulation=False),
        )
    usable = "mps" if torch.backends.mps.is_available() else None
    return Gpu(tuple(cards), driver, version, cuda, hip, usable, macos=macos)


def check_gpu(gpu: Gpu) -> Line:
    """Whether torch's build, the driver and the card go together."""
    build = f"torch {gpu.torch_version}"
    if gpu.usable == "mps":
        if gpu.macos is not None and int(gpu.macos.partition(".")[0]) < 14:
            return Line(
                "gpu", "FAIL", f"macOS {gpu.macos}: bf16 on its GPU needs macOS 14 ({MPS_BF16})", "use --device cpu"
            )
        return Line("gpu", "OK", f"Apple GPU through MPS, macOS {gpu.macos}")
    if gpu.usable == "cuda":
        return _check_kernels(gpu)
    if not gpu.cards:
        return Line("gpu", "OK", f"none; {build} computes on the CPU")
    cards = " and ".join(sorted(set(gpu.cards)))
    if gpu.cuda is None and gpu.hip is None:
        return Line("gpu", "WARN", f"{cards} card, and {build} is a build for CPUs", CUDA_BUILD)
    if "NVIDIA" in gpu.cards and gpu.cuda is not None:
        if gpu.driver is None:
            return Line("gpu", "WARN", f"NVIDIA card without a driver; {build}", DRIVER)
        least = MINIMUM_DRIVER.get(int(gpu.cuda.partition(".")[0]))
        if least is not None and int(gpu.driver.partition(".")[0]) < least:
            says = f"driver {gpu.driver} is too old for CUDA {gpu.cuda}, which {build} is built for: {least} or newer"
            return Line("gpu", "WARN", says, f"{DRIVER}, or take a build of torch for an older CUDA")
        return Line("gpu", "WARN", f"driver {gpu.driver} and {build}, but torch finds no device", "nvidia-smi")
    kind = "ROCm" if gpu.hip else f"CUDA {gpu.cuda}"
    return Line("gpu", "WARN", f"{cards} card, and {build} is built for {kind} and finds no device", CUDA_BUILD)


def _check_kernels(gpu: Gpu) -> Line:
    """Whether torch holds kernels for every card that it finds."""
    shown = f"{', '.join(gpu.names)}, {size(gpu.free or 0)} free of {size(gpu.total or 0)}"
    shown += f"; ROCm {gpu.hip}" if gpu.hip else f"; CUDA {gpu.cuda}, driver {gpu.driver or 'unknown'}"
    if not gpu.hip:
        for name, (major, minor) in zip(gpu.names, gpu.capabilities, strict=True):
            if not any(_serves(kernel, major, minor) for kernel in gpu.kernels):
                says = f"{name} (sm_{major}{minor}): torch {gpu.torch_version} has no kernels for it ({OLD_GPUS})"
                return Line("gpu", "FAIL", says, "install a build of torch for CUDA 12.6, or use device: cpu")
    return Line("gpu", "OK", f"{shown}; {'bf16' if gpu.has_bf16 else 'no bf16 units: dtype auto is fp16'}")


def _serves(kernel: str, major: int, minor: int) -> bool:
    """sm_80 runs on 8.0 to 8.9; compute_90 is compiled for 9.0 and everything newer."""
    kind, _, number = kernel.partition("_")
    digits = "".join(c for c in number if c.isdigit())
    if not digits:
        return False
    theirs = (int(digits[:-1]), int(digits[-1]))
    return theirs <= (major, minor) if kind == "compute" else theirs[0] == major and theirs[1] <= minor


def rate(dtype: torch.dtype, device: torch.device, rows: int = 256, width: int = 512, seconds: float = 0.2) -> float:
    """FLOP/s of the best of some products (rows, width) x (width, width)."""
    a = torch.ones(rows, width, dtype=dtype, device=device)
    b = torch.ones(width, width, dtype=dtype, device=device)
    torch.mm(a, b)[0, 0].item()
    best, end = 0.0, time.perf_counter() + seconds
    while True:
        start = time.perf_counter()
        torch.mm(a, b)[0, 0].item()  # .item() waits for a GPU
        now = time.perf_counter()
        best = max(best, 2 * rows * width * width / max(now - start, 1e-9))
        if now > end:
            return best


def check_arithmetic(bf16: float, fp32: float, chosen: str) -> Line:
    """Measured FLOP/s of bf16 and fp32 products against the one that training would use ("bf16" or "fp32")."""
    shown = f"bf16 {bf16 / 1e9:,.0f} and fp32 {fp32 / 1e9:,.0f} GFLOP/s; training multiplies in {chosen}"
    if chosen == "bf16" and fp32 > SLOWER * bf16:
        return Line("arithmetic", "WARN", f"{shown}, which is slower here", "dtype: fp32 in the recipe (--dtype fp32)")
    if chosen == "fp32" and bf16 > SLOWER * fp32:
        return Line("arithmetic", "OK", f"{shown}, though bf16 is faster: only AVX512-BF16 and AMX are trusted with it")
    return Line("arithmetic", "OK", shown)


def measure_arithmetic() -> Line:
    """bf16 against fp32 on the CPU."""
    device = torch.device("cpu")
    chosen = "bf16" if choose_dtypes("auto", device).arithmetic == torch.bfloat16 else "fp32"
    return check_arithmetic(rate(torch.bfloat16, device), rate(torch.float32, device), chosen)


def expected_nf4(weight: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """(codes, weight again) of NF4 in plain torch: the nearest number of the table times the block's largest."""
    blocks = weight.flatten().reshape(-1, block_size)  # (blocks, block_size)
    largest = blocks.abs().amax(1, keepdim=True)
    table = _bnb.four_bit_table("nf4", weight.device)
    codes = ((blocks / largest)[..., None] - table).abs().argmin(-1)  # (blocks, block_size)
    return codes, (table[codes] * largest).reshape(weight.shape)


def nf4_errors(device: torch.device) -> int:
    """Numbers of a small weight that bitsandbytes dequantizes to other bits than plain torch does."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(48, 128, generator=generator).to(device)
    stored = _bnb.quantize(weight, "nf4", 64, False, device)
    again = torch.empty_like(weight)
    stored.write(again)
    _, wanted = expected_nf4(weight, 64)
    return int((again != wanted).sum())


def check_kernels(wrong: dict[str, int]) -> Line:
    """Numbers that came back with other bits, for each device whose kernels were tried."""
    bad = [f"{count} wrong numbers on {device}" for device, count in wrong.items() if count]
    if bad:
        return Line("4-bit kernels", "FAIL", f"bitsandbytes: {'; '.join(bad)}", f"{SHIKOMI_EXTRA}, or quant: none")
    return Line("4-bit kernels", "OK", f"bitsandbytes gives the right bits on {' and '.join(wrong)}")


def measure_kernels(gpu: bool) -> Line:
    """NF4 there and back on the CPU, and on CUDA where it works."""
    devices = [torch.device("cpu"), *([torch.device("cuda")] if gpu else [])]
    return check_kernels({device.type: nf4_errors(device) for device in devices})


@dataclass(frozen=True)
class Trial:
    """A tiny model trained for some seconds."""

    device: str
    arithmetic: str
    path: str
    tokens_per_second: float
    loss: float
    grad_norm: float


def tiny_run(device_name: str, seconds: float, clock: Callable[[], float] = time.perf_counter) -> Trial:
    """Forward and backward of a random model of 4 layers through the engine, until `seconds` are over."""
    from transformers import AutoConfig, AutoModelForCausalLM

    device = choose_device(device_name)
    dtypes: Dtypes = choose_dtypes("auto", device)
    config = AutoConfig.for_model(
        "llama", vocab_size=4096, hidden_size=256, intermediate_size=768, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=dtypes.storage).to(device)
    lm = wrap(model, None, Lora(r=8), dtypes, device)
    choose_path(lm, 256)
    rng = np.random.default_rng(0)
    rows = [Example(rng.integers(3, 4096, 256).astype(np.int32), np.arange(256) >= 64, i) for i in range(4)]
    plan, objective, tokens = plan_step(rows, 1024, True), Sft(), 0
    gradients(lm, objective, plan, 0)  # the first one makes buffers
    started = clock()
    while True:
        for parameter in lm.trainable().values():
            parameter.grad = None
        shown = gradients(lm, objective, plan, 0)
        grads = [p.grad for p in lm.trainable().values() if p.grad is not None]
        norm = float(torch.nn.utils.get_total_norm(grads))
        tokens += plan.tokens
        took = clock() - started
        if took >= seconds:
            break
    how = str(dtypes.arithmetic).removeprefix("torch.")
    return Trial(device.type, how, lm.path, tokens / took, float(shown["loss"]), norm)


def check_trial(trial: Trial) -> Line:
    """Whether loss and gradients are finite numbers, and how fast they came."""
    name = f"training: {trial.device}"
    numbers = f"loss {trial.loss:.3f}, gradient norm {trial.grad_norm:.3g}"
    if not math.isfinite(trial.loss) or not math.isfinite(trial.grad_norm):
        fix = REINSTALL if trial.device == "cpu" else f"device: cpu in the recipe, and {REINSTALL}"
        return Line(name, "FAIL", f"{numbers}: not finite on a tiny model", fix)
    if trial.grad_norm == 0:
        return Line(name, "FAIL", f"{numbers}: no gradient reaches the adapter", REINSTALL)
    how = f"{trial.arithmetic}, {trial.path} path"
    says = f"{trial.tokens_per_second:,.0f} tokens/s with a model of 4 layers ({how}); {numbers}"
    if trial.path == "separate":
        return Line(name, "WARN", f"{says}: packed attention does not give the model's own numbers", REINSTALL)
    return Line(name, "OK", says)


def train_tiny(device_name: str, seconds: float) -> Line:
    """`tiny_run`, judged."""
    return check_trial(tiny_run(device_name, seconds))
