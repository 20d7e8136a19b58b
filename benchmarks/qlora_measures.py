"""What benchmarks/qlora.py measures inside a process of its own; each prints one line of JSON.

python benchmarks/qlora_measures.py bits|steps|perplexity|head|long MODEL_FOLDER [...]
"""

import argparse
import gc
import json
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from shikomi.adapters.full import Full
from shikomi.adapters.lora import Lora
from shikomi.data.packing import Example, Packed, pack
from shikomi.model import fused_mlp
from shikomi.model.load import load_model
from shikomi.objectives.sft import Sft
from shikomi.optim.adamw import AdamW
from shikomi.quant._quantized import logical_parameters, resident_bytes
from shikomi.quant.fp4 import Fp4
from shikomi.quant.int8 import Int8
from shikomi.quant.nf4 import Nf4
from shikomi.train.step import gradients, plan_step

SCHEMES = {
    "bf16": None,
    "int8": Int8(),
    "NF4 + double quantization": Nf4(),
    "NF4": Nf4(double_quant=False),
    "FP4": Fp4(double_quant=False),
}
SEGMENT = 512  # tokens that see each other when perplexity is measured


def bits(folder: str) -> dict[str, Any]:
    """Bytes of the linear maps of a model in every scheme, by what is resident, and how many numbers they hold."""
    found: dict[str, Any] = {}
    for name, scheme in SCHEMES.items():
        if scheme is not None:
            lm = load_model(folder, quant=scheme, max_length=64)
            found[name] = resident_bytes(lm.model)
            found["parameters"] = logical_parameters(lm.model)
            found["total"] = lm.total_parameters
            del lm
            gc.collect()
    found["bf16"] = 2 * found["parameters"]
    return found


def perplexity(folder: str, text: str, limit: int) -> dict[str, Any]:
    """exp of the mean negative log-likelihood of a text in every scheme, in segments of 512 tokens."""
    found: dict[str, Any] = {}
    for name, scheme in SCHEMES.items():
        lm = load_model(folder, quant=scheme, max_length=SEGMENT)
        ids = lm.tokenizer(Path(text).read_text(encoding="utf-8"))["input_ids"][:limit]
        total, count = 0.0, 0
        with torch.no_grad():
            for first in range(0, len(ids), SEGMENT):
                scored = lm.score(packed(ids[first : first + SEGMENT])).logp
                total, count = total - float(scored.sum()), count + len(scored)
        found[name] = float(np.exp(total / count))
        found["tokens"] = count
        del lm
        gc.collect()
    return found


def packed(ids: list[int]) -> Packed:
    return pack([Example(np.array(ids, np.int32), np.arange(len(ids)) > 0, 0)])


def steps(folder: str, tokens: int, rounds: int) -> dict[str, Any]:
    """Seconds of an optimizer step on one micro-batch, in turns: LoRA over bf16, over NF4, and full fine-tuning."""
    setups = {"LoRA, bf16": (Lora(r=8), None), "QLoRA": (Lora(r=8), Nf4()), "full": (Full(), None)}
    models, seconds = {}, {name: [] for name in setups}
    for name, (adapter, scheme) in setups.items():
        lm = load_model(folder, adapter, quant=scheme, max_length=tokens)
        models[name] = (lm, AdamW().build(lm.trainable(), 1e-4, 0.0))
    ids = np.random.default_rng(0).integers(3, 40_000, tokens).astype(np.int32)
    plan = plan_step([Example(ids, np.arange(tokens) >= tokens * 9 // 10, 0)], tokens, True)
    norms = {}
    for turn in range(rounds + 1):
        for name, (lm, optimizer) in models.items():
            started = time.perf_counter()
            gradients(lm, Sft(), plan, turn)
            norms[name] = float(torch.nn.utils.get_total_norm([p.grad for p in lm.trainable().values()]))
            optimizer.step()
            optimizer.zero_grad()
            if turn:  # the first is a warm-up
                seconds[name].append(time.perf_counter() - started)
    if min(norms.values()) <= 0:
        raise SystemExit(f"a gradient norm is not above zero: {norms}")
    return {name: {"median": statistics.median(s), "best": min(s)} for name, s in seconds.items()}


def head(folder: str, tokens: int) -> dict[str, Any]:
    """Peak memory of a gradient with every token scored, above what the loaded model takes."""
    lm = load_model(folder, Lora(r=8), max_length=64)
    lm.recompute = "full"
    ids = np.random.default_rng(0).integers(3, 40_000, tokens).astype(np.int32)
    plan = plan_step([Example(ids, np.arange(tokens) > 0, 0)], tokens, True)
    gc.collect()
    before = memory("VmRSS:")
    gradients(lm, Sft(), plan, 0)
    norm = float(torch.nn.utils.get_total_norm([p.grad for p in lm.trainable().values()]))
    return {"before": before, "peak": memory("VmHWM:"), "norm": norm}


def long(folder: str, tokens: int, rows: int) -> dict[str, Any]:
    """Peak memory of a gradient over segments of 1,024 tokens, everything recomputed, the MLP `rows` rows at a time."""
    fused_mlp.ROWS = rows
    lm = load_model(folder, Lora(r=8), quant=Nf4(), max_length=64)
    lm.recompute = "full"
    chance = np.random.default_rng(0)
    rows_of = [chance.integers(3, 40_000, 1024).astype(np.int32) for _ in range(tokens // 1024)]
    plan = plan_step([Example(ids, np.arange(1024) >= 1000, 0) for ids in rows_of], tokens, False)
    gc.collect()
    before, started = memory("VmRSS:"), time.perf_counter()
    gradients(lm, Sft(), plan, 0)
    seconds = time.perf_counter() - started
    norm = float(torch.nn.utils.get_total_norm([p.grad for p in lm.trainable().values()]))
    return {"before": before, "peak": memory("VmHWM:"), "norm": norm, "seconds": seconds}


def memory(name: str) -> int:
    """A line of the kernel's account of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(name))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["bits", "steps", "perplexity", "head", "long"])
    parser.add_argument("model")
    parser.add_argument("--text")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", type=int, default=fused_mlp.ROWS)
    args = parser.parse_args()
    if args.what == "bits":
        print(json.dumps(bits(args.model)))
    elif args.what == "steps":
        print(json.dumps(steps(args.model, args.tokens, args.rounds)))
    elif args.what == "long":
        print(json.dumps(long(args.model, args.tokens, args.rows)))
    elif args.what == "head":
        print(json.dumps(head(args.model, args.tokens)))
    else:
        print(json.dumps(perplexity(args.model, args.text, args.tokens)))


if __name__ == "__main__":
    main()
