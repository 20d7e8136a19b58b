"""How fast this machine trains: the rates of each kind of work, measured in a second and kept in the user's cache."""

import hashlib
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn import functional as F

from shikomi.checkpoint.fingerprint import fingerprint
from shikomi.errors import Problem
from shikomi.model import catalog
from shikomi.model.check import weight_shapes
from shikomi.model.device import choose_device, choose_dtypes
from shikomi.plan.machine_facts import read_limits, read_memory
from shikomi.plan.rates import NARROW, WIDE

SHARE = 0.5
"""Of the rate of large matrix products, what training reaches: attention, norms and the head take the rest."""

FLOP_ADAPTER = 4  # per parameter and token: the products of the forward, and of the gradient of the activations
FLOP_FULL = 6  # and those of the gradient of the weights

_ROWS, _WIDTH = 1024, 1024  # the shape of a micro-batch's product with a layer of a small model
_SECONDS = 0.3
VERSION = 5  # of what is measured; part of the cache's key
_HEADS, _HEAD, _BLOCK, _STRIP, _VOCABULARY = 9, 64, 128, 32, 32768


# rows of a short and of a long micro-batch, the weights' width, and how many of them in the short and in the long one
_SHAPES = {"cpu": (64, 512, 1024, 24, 8), "cuda": (512, 4096, 4096, 8, 8), "mps": (128, 1024, 2048, 8, 8)}
Timer = tuple[Callable[[], None], Callable[[], float]]  # waits for the device, and the clock


def product_rate(device_name: str = "auto") -> float:
    """FLOP/s of matrix products as training would do them here, the best of some runs over 0.3 seconds."""
    device = choose_device(device_name)
    dtype = choose_dtypes("auto", device).arithmetic
    a = torch.ones(_ROWS, _WIDTH, dtype=dtype, device=device)
    b = torch.ones(_WIDTH, _WIDTH, dtype=dtype, device=device)
    torch.mm(a, b).sum().item()
    best, end = 0.0, time.perf_counter() + _SECONDS
    while time.perf_counter() < end:
        start = time.perf_counter()
        torch.mm(a, b)[0, 0].item()  # .item() waits for a GPU
        best = max(best, 2 * _ROWS * _WIDTH * _WIDTH / (time.perf_counter() - start))
    return best


def free_bytes(device: torch.device) -> tuple[int, int]:
    """Bytes that the device and the host have free now, within a container's limit; macOS keeps a third of its own."""
    facts = read_memory(read_limits())
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    host = total * 2 // 3 if facts is None else facts.free
    return (torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else host), host


def measured(device_name: str = "auto", dtype: str = "auto") -> dict[str, float]:
    """Rates of this machine as `plan/rates.py` names them: from the user's cache, else measured now and kept there.

    The key is the fingerprint that a resumed run must share: processor, threads, versions, device.
    """
    device = choose_device(device_name)
    dtypes = choose_dtypes(dtype, device)
    key = json.dumps({"version": VERSION, "dtypes": str(dtypes), **fingerprint(device)}, sort_keys=True)
    file = catalog.cache_root() / "speed" / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"
    if file.is_file():
        kept: dict[str, float] = json.loads(file.read_text(encoding="utf-8"))["rates"]
        return kept
    found = measure(device, dtypes.storage, dtypes.arithmetic)
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=file.parent, suffix=".tmp", delete=False, encoding="utf-8") as out:
        json.dump({"key": json.loads(key), "rates": found}, out, indent=1)
    os.replace(out.name, file)  # another process may write the same
    return found


def measure(
    device: torch.device,
    storage: torch.dtype,
    arithmetic: torch.dtype,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Every rate, in the shapes of training; about a second in all."""

    def some(*shape: int, dtype: torch.dtype = arithmetic) -> torch.Tensor:
        return torch.ones(shape, dtype=dtype, device=device)

    timer = (_waiting(device), clock)
    wide = some(_ROWS, 4 * WIDE)
    narrow, small = some(_ROWS, NARROW), some(NARROW, NARROW)
    q, p = some(_HEADS, _BLOCK, _HEAD), some(_HEADS, _BLOCK, 2 * _BLOCK)
    k, v = some(_HEADS, 2 * _BLOCK, _HEAD), some(_HEADS, 2 * _BLOCK, _HEAD)
    logits = some(_STRIP, _VOCABULARY, dtype=torch.float32)
    weight = torch.nn.Parameter(some(WIDE, WIDE, dtype=torch.float32))
    weight.grad = torch.ones_like(weight)
    adam = torch.optim.AdamW([weight], lr=1e-3, fused=True)
    attend = 2 * 2 * _HEADS * _BLOCK * 2 * _BLOCK * _HEAD
    products, weights = _through_weights(device, storage, arithmetic, timer)
    rates = {
        "products": products,
        "narrow": 2 * _ROWS * NARROW * NARROW / _typical(lambda: narrow @ small.t(), timer),
        "thin": _low_rank(16, some, timer),
        "thin_8": _low_rank(8, some, timer),
        "thin_64": _low_rank(64, some, timer),
        "attention": attend / _typical(lambda: (torch.bmm(q, k.transpose(1, 2)), torch.bmm(p, v)), timer),
        "softmax": logits.numel() / _typical(lambda: logits.sub_(1.0).exp_().sum(-1), timer),
        "elementwise": 4 * wide.numel() / _typical(lambda: F.silu(wide).mul_(wide), timer),
        "weights": weights,
        "update": weight.numel() / _typical(adam.step, timer),
    }
    return {name: float(rate) for name, rate in rates.items()}


def _low_rank(rank: int, some: Callable[..., torch.Tensor], timer: Timer) -> float:
    """FLOP/s of the products of an update of this rank: x A^T, y + (x A^T) B^T, dy B, and a gradient."""
    x, y, a, b = some(_ROWS, WIDE), some(_ROWS, WIDE), some(rank, WIDE), some(WIDE, rank)
    xa = x @ a.t()
    seconds = _typical(lambda: (x @ a.t(), y.addmm_(xa, b.t()), y @ b, xa.t() @ y), timer)
    return 8 * _ROWS * WIDE * rank / seconds


def _through_weights(
    device: torch.device, storage: torch.dtype, arithmetic: torch.dtype, timer: Timer
) -> tuple[float, float]:
    """FLOP/s of products, and weights/s that are read, widened where needed, and arranged for a product.

    From products of few and of many rows with more weights than a cache holds: what does not grow with the rows is
    the weights' own.
    """
    few, many, width, short_count, long_count = _SHAPES.get(device.type, _SHAPES["cpu"])
    stored = [torch.ones(width, width, dtype=storage, device=device) for _ in range(max(short_count, long_count))]
    into = torch.empty(width, width, dtype=arithmetic, device=device)

    def seconds(rows: int, count: int) -> float:
        x = torch.ones(rows, width, dtype=arithmetic, device=device)

        def through() -> None:
            for weight in stored[:count]:
                x @ (weight if storage == arithmetic else into.copy_(weight)).t()

        return _typical(through, timer, 3) / count

    short, long = seconds(few, short_count), seconds(many, long_count)
    row = max((long - short) / (many - few), 0.1 * long / many)
    return 2 * width * width / row, width * width / max(short - few * row, 0.02 * long)


def _waiting(device: torch.device) -> Callable[[], None]:
    """What waits for a device that computes by itself."""
    if device.type == "cuda":
        return torch.cuda.synchronize
    return torch.mps.synchronize if device.type == "mps" else lambda: None


def _typical(work: Callable[[], object], timer: Timer, times: int = 5) -> float:
    """Seconds of the middle one of some runs after one that is not counted.

    The quickest would be that of a machine nobody else uses; training lasts, and meets what else there is.
    """
    finish, clock = timer
    work()
    finish()
    seconds = []
    for _ in range(times):
        start = clock()
        work()
        finish()
        seconds.append(clock() - start)
    return statistics.median(seconds)


def known_parameters(model: str) -> int | None:
    """Parameters of an alias or of a folder with weights, without loading any; None where that is not known."""
    if model in catalog.ALIASES:
        return catalog.ALIASES[model].parameters
    problems: list[Problem] = []
    if not Path(model).is_dir():
        return None
    shapes = weight_shapes(Path(model), problems)
    return sum(torch.Size(shape).numel() for shape in shapes.values()) or None


def training_seconds(tokens: float, parameters: int, rate: float, full: bool = False) -> float:
    """Seconds of training for `tokens` tokens at `rate` FLOP/s."""
    return tokens * parameters * (FLOP_FULL if full else FLOP_ADAPTER) / (rate * SHARE)
