"""Predicted against measured peak memory, over a grid of short real runs; the table goes into docs/results.md.

python benchmarks/plan_memory.py [--cells N] [--only TEXT]

Every cell is a `shikomi train` of its own; what it measured is kept, so that the same command goes
on with what is missing, and the prediction is made anew each time. Models are random weights made from a configuration.
"""

import argparse
import json
import os
import random
import shutil
import statistics
import sys
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import torch

from measure import HERE, SHIKOMI, machine, run, table
from shapes import write_weights
from shikomi.model.device import choose_dtypes
from shikomi.plan.architecture import architecture
from shikomi.plan.estimate import Machine
from shikomi.plan.jobs import jobs
from shikomi.plan.memory import memory
from shikomi.recipe import load_recipe

sys.path.insert(0, str(HERE.parent / "tests" / "support"))
CACHE = HERE / ".cache" / "plan_memory"
DONE = CACHE / "cells.jsonl"
MODELS_MADE = CACHE / "models"
RESULTS = HERE.parent / "docs" / "results.md"
RECORD = HERE.parent / "tests" / "plan" / "measured.jsonl"
"""What was measured and what was planned for it: a test plans it again."""
MARKS = ("<!-- plan_memory -->", "<!-- /plan_memory -->")
MEDIAN, P95, TOO_LOW = 0.05, 0.12, 0.05  # what is asked of the relative errors
LONG = 2048


@dataclass(frozen=True)
class Cell:
    """One run. `rows` of `length` tokens make an optimizer step; `scored` is the share of them that is trained."""

    model: str
    adapter: dict[str, Any] = field(default_factory=lambda: {"name": "lora", "r": 8})
    quant: str = "none"
    objective: str = "sft"
    optim: str = "adamw"
    length: int = 256
    rows: int = 2
    micro: int = 512
    scored: float = 0.5
    recompute: str | int = "none"
    share_prefix: bool = True
    reference: str = "live"
    steps: int = 2

    @property
    def name(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)


LLAMA = {"model_type": "llama", "max_position_embeddings": 4096, "bos_token_id": 1, "eos_token_id": 2}


def llama(hidden: int, inner: int, layers: int, heads: int, kv: int, vocabulary: int, **more: Any) -> dict[str, Any]:
    """A Llama-like configuration."""
    return {
        **LLAMA,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "vocab_size": vocabulary,
        "head_dim": hidden // heads,
        "tie_word_embeddings": True,
        **more,
    }


MODELS: dict[str, dict[str, Any]] = {
    "llama-5m": llama(256, 704, 4, 4, 2, 4096),
    "llama-20m": llama(384, 1024, 8, 6, 3, 16384),
    "llama-60m": llama(512, 1408, 12, 8, 8, 32000, tie_word_embeddings=False),
    "llama-110m": llama(768, 2048, 12, 12, 12, 32000),
    "llama-400m": llama(1024, 2816, 24, 16, 8, 49152),
    "qwen2-90m": llama(512, 2432, 12, 8, 2, 65536, model_type="qwen2"),
    "qwen3-160m": llama(640, 1920, 16, 8, 4, 65536, model_type="qwen3", head_dim=128),
    "gemma2-60m": llama(384, 1536, 8, 4, 2, 65536, model_type="gemma2", head_dim=128, query_pre_attn_scalar=128),
    "gemma3-40m": llama(320, 1280, 8, 4, 1, 65536, model_type="gemma3_text", head_dim=128, query_pre_attn_scalar=128),
    "phi3-40m": llama(512, 1408, 8, 8, 8, 16000, model_type="phi3", pad_token_id=0, tie_word_embeddings=False),
    "olmo2-40m": llama(512, 1408, 8, 8, 8, 16000, model_type="olmo2", tie_word_embeddings=False),
    "gpt2-40m": {
        "model_type": "gpt2", "n_embd": 512, "n_layer": 8, "n_head": 8, "n_positions": 2048, "vocab_size": 32000,
        "tie_word_embeddings": True, "bos_token_id": 1, "eos_token_id": 2,
    },
    "qwen3moe-70m": llama(
        384, 1024, 8, 6, 3, 32000, model_type="qwen3_moe", head_dim=64, num_experts=8, num_experts_per_tok=2,
        moe_intermediate_size=512, norm_topk_prob=True,
    ),
    "qwen2.5-1.5b": llama(1536, 8960, 28, 12, 2, 151936, model_type="qwen2"),
}  # fmt: skip

R8 = {"name": "lora", "r": 8}
QV = {"name": "lora", "r": 8, "target_modules": ["q_proj", "v_proj"]}
FULL = {"name": "full"}
GALORE = "galore"


def grid() -> list[Cell]:
    """The cells: each axis on a few models, and some far corners."""
    cells = [Cell("smollm2", length=n, rows=2, micro=2 * n) for n in (128, 256)]
    cells += [Cell("smollm2", FULL, length=128, micro=128), Cell("smollm2", R8, "nf4", length=256)]
    for model in ("llama-5m", "llama-20m", "llama-60m"):
        cells += [Cell(model, length=n, rows=2, micro=n) for n in (128, 512, LONG)]
        cells += [Cell(model, length=512, rows=4, micro=2048, recompute=r) for r in ("none", 2, "full")]
    cells += [Cell("llama-110m", a, length=512, rows=2, micro=m) for a in (R8, QV, FULL) for m in (512, 1024)]
    for adapter in (
        {"name": "dora", "r": 8},
        {"name": "bottleneck"},
        {"name": "bottleneck", "placement": "pfeiffer"},
        {"name": "prefix", "num_virtual_tokens": 30},
        {"name": "prompt", "num_virtual_tokens": 30},
        {"name": "lora", "r": 64},
        {"name": "lora", "r": 8, "init_lora_weights": "olora"},
        {"name": "lora", "r": 8, "lora_dropout": 0.1},
        {"name": "full", "last_layers": 2},
    ):
        cells.append(Cell("llama-60m", adapter, length=512, rows=2, micro=1024))
    cells.append(Cell("llama-60m", FULL, optim=GALORE, length=256, rows=1, micro=512))
    cells.append(Cell("llama-60m", FULL, optim=GALORE, length=256, rows=2, micro=256))
    cells.append(Cell("llama-20m", FULL, length=LONG, rows=1, micro=LONG))
    cells.append(Cell("llama-20m", FULL, length=LONG, rows=1, micro=LONG, recompute="full"))
    for quant in ("nf4", "int8"):
        cells += [Cell(m, R8, quant, length=256, rows=2, micro=512) for m in ("llama-60m", "llama-110m", "qwen3-160m")]
    cells.append(Cell("llama-400m", length=256, rows=1, micro=256))
    cells.append(Cell("llama-400m", R8, "nf4", length=512, rows=1, micro=512))
    cells.append(Cell("llama-400m", FULL, length=128, rows=1, micro=128))
    for objective in ("dpo", "orpo", "kto"):
        cells += [Cell(m, objective=objective, length=512, rows=2, micro=1024) for m in ("llama-20m", "llama-110m")]
    cells.append(Cell("llama-60m", objective="dpo", length=1024, rows=2, micro=2048, share_prefix=False))
    cells.append(Cell("llama-60m", objective="dpo", length=1024, rows=2, micro=2048, reference="precompute"))
    cells.append(Cell("llama-60m", FULL, objective="dpo", length=512, rows=1, micro=512))
    for model in ("qwen2-90m", "qwen3-160m", "gemma2-60m", "gemma3-40m", "phi3-40m", "olmo2-40m", "qwen3moe-70m"):
        cells += [Cell(model, length=n, rows=2, micro=2 * n) for n in (128, 512)]
    cells += [Cell("gpt2-40m", length=n, rows=2, micro=2 * n) for n in (128, 512)]
    cells += [Cell(m, length=512, rows=2, micro=1024, recompute="full") for m in ("gemma2-60m", "gpt2-40m")]
    cells += [Cell(m, FULL, length=256, rows=1, micro=256) for m in ("gpt2-40m", "qwen3-160m")]
    cells += [Cell("llama-20m", length=1024, rows=1, micro=1024, scored=s) for s in (0.1, 1.0)]
    cells.append(Cell("qwen2.5-1.5b", R8, "nf4", length=128, rows=1, micro=128, steps=1))
    return cells


def model_of(name: str, models: Path) -> str:
    """A folder with a configuration and a small tokenizer; smollm2 is the real model."""
    if name == "smollm2":
        return name
    folder = models / name
    if not (folder / "tokenizer.json").exists():
        from tiny_models import tiny_tokenizer

        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps({**MODELS[name], "dtype": "bfloat16"}))
        tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def make_weights(name: str, models: Path) -> None:
    """Random ones in bf16, where they are not there yet."""
    file = Path(model_of(name, models)) / "model.safetensors"
    if name != "smollm2" and not file.exists():
        write_weights(file, dict(architecture(MODELS[name]).tensors))


def digits(count: int, chance: random.Random) -> str:
    """Text of `count` tokens: the small tokenizer has no merges of digits, and neither has SmolLM2's."""
    return "".join(chance.choice("0123456789") for _ in range(count))


def rows_of(cell: Cell, count: int) -> list[dict[str, Any]]:
    """Rows of cell.length tokens each, the end token included."""
    found: list[dict[str, Any]] = []
    for number in range(count):
        chance = random.Random(number)
        trained = max(8, round(cell.scored * cell.length))
        if cell.objective == "sft":
            prompt, answer = digits(cell.length - trained, chance), digits(trained - 1, chance)
            found.append({"prompt": prompt, "completion": answer} if prompt else {"text": answer})
        elif cell.objective == "kto":
            prompt, answer = digits(cell.length // 2, chance), digits(cell.length // 2 - 1, chance)
            found.append({"prompt": prompt, "completion": answer, "label": number % 2 == 0})
        else:
            prompt, part = digits(cell.length // 2, chance), cell.length // 4 - 1
            found.append({"prompt": prompt, "chosen": digits(part, chance), "rejected": digits(part, chance)})
    return found


def recipe_of(cell: Cell, folder: Path, models: Path) -> dict[str, Any]:
    """The recipe of a cell, its rows written beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = folder / "rows.jsonl"
    found = rows_of(cell, cell.rows * cell.steps)
    rows.write_text("".join(json.dumps(row) + "\n" for row in found))
    return {
        "model": model_of(cell.model, models),
        "quant": cell.quant,
        "adapter": cell.adapter,
        "data": {"train": str(rows)},
        "chat": "never",
        "device": "cpu",
        "max_length": max(64, cell.length),
        "objective": cell.objective,
        "optim": cell.optim,
        "batch_size": cell.rows,
        "micro_batch_tokens": cell.micro,
        "max_steps": cell.steps,
        "recompute": cell.recompute,
        "share_prefix": cell.share_prefix,
        "reference": cell.reference,
        "output_dir": str(folder / "run"),
    }


def measured(cell: Cell) -> dict[str, Any]:
    """What `shikomi train` took for the cell, in a process of its own."""
    folder = CACHE / "run"
    shutil.rmtree(folder, ignore_errors=True)
    make_weights(cell.model, MODELS_MADE)
    recipe = folder / "recipe.json"
    recipe.write_text(json.dumps(recipe_of(cell, folder, MODELS_MADE)))
    done = run([SHIKOMI, "train", str(recipe), "--json"])
    result = json.loads((folder / "run" / "result.json").read_text())
    shutil.rmtree(folder)
    return {
        "cell": asdict(cell),
        "peak": result["peak_memory_bytes"],
        "seconds": round(done.wall_seconds, 1),
        "path": result["path"],
        "trained": result["trainable_parameters"],
        "total": result["total_parameters"],
    }


def known_cells() -> dict[str, dict[str, Any]]:
    """What was measured already, by the cell's name."""
    lines = DONE.read_text().splitlines() if DONE.exists() else []
    found = [json.loads(line) for line in lines]
    return {Cell(**f["cell"]).name: f for f in found}


def planned(cell: Cell, arithmetic: str, folder: Path, models: Path) -> float:
    """Likely peak bytes by the plan, from the recipe of the cell; `arithmetic` is the dtype of the machine's products.

    The machine's memory plays no part, since no cell leaves recomputation to the plan.
    """
    (job,) = jobs(load_recipe(recipe_of(cell, folder, models)))
    return memory(job, Machine("cpu", "cpu", 64 << 30, 64 << 30, "bf16", arithmetic)).peak.likely


def errors_of(errors: list[float]) -> tuple[float, float, float]:
    """(median, 95th percentile, most too low) of relative errors."""
    absolute = sorted(map(abs, errors))
    return statistics.median(absolute), absolute[round(0.95 * (len(absolute) - 1))], min(errors)


def changed(cell: Cell) -> dict[str, Any]:
    """The fields of a cell that are not the usual ones, and its model."""
    usual = asdict(Cell(cell.model))
    return {key: value for key, value in asdict(cell).items() if key == "model" or value != usual[key]}


def told(cell: Cell) -> str:
    """A cell in a line."""
    adapter = {"r": 8, **cell.adapter}
    name = " ".join([adapter.pop("name"), *(f"{k}={v}" for k, v in adapter.items() if (k, v) != ("r", 8))])
    more = [cell.quant] if cell.quant != "none" else []
    more += [cell.optim] if cell.optim != "adamw" else []
    more += [cell.objective] if cell.objective != "sft" else []
    more += [f"recompute {cell.recompute}"] if cell.recompute != "none" else []
    more += [] if cell.share_prefix else ["prompts not shared"]
    more += [cell.reference] if cell.reference != "live" else []
    more += [f"{cell.scored:.0%} scored"] if cell.scored != 0.5 else []
    return ", ".join([f"{cell.model}: {name}", *more])


def report(known: dict[str, dict[str, Any]]) -> None:
    """Prints every cell and the errors, and writes the table into docs/results.md, also of a part of the grid."""
    bf16 = choose_dtypes("auto", torch.device("cpu")).arithmetic == torch.bfloat16
    arithmetic, rows, errors, record = "bf16" if bf16 else "fp32", [], [], []
    cells = {cell.name: cell for cell in grid()}
    for name, cell in cells.items():
        if name not in known:
            continue
        peak, likely = known[name]["peak"], planned(cell, arithmetic, CACHE / "planned", MODELS_MADE)
        record.append({"cell": changed(cell), "arithmetic": arithmetic, "peak": peak, "planned": round(likely)})
        errors.append(likely / peak - 1)
        size = f"{cell.rows} x {cell.length} in {cell.micro}"
        rows.append([told(cell), size, f"{likely / 1e6:,.0f}", f"{peak / 1e6:,.0f}", f"{errors[-1]:+.1%}"])
        print("  ".join(rows[-1]))
    median, p95, low = errors_of(errors)
    RECORD.write_text("".join(json.dumps(line) + "\n" for line in record))
    asked = f"asked for: {MEDIAN:.0%}, {P95:.0%}, and never more than {TOO_LOW:.0%} too low"
    share = "" if len(rows) == len(cells) else f" of a grid of {len(cells)}, drawn at random"
    text = f"{len(rows)} runs{share}: median error {median:.1%}, 95th percentile {p95:.1%}, "
    text += f"most too low {low:+.1%} ({asked})."
    print(text)
    head = ["run", "rows x tokens in a micro-batch of", "planned MB", "measured MB", "error"]
    write(f"{machine()}; one thread; {date.today().isoformat()}.\n\n{text}\n\n{table(head, rows)}")


def write(text: str) -> None:
    """Puts the section into docs/results.md in the place of its former one."""
    title = "## Memory: planned against measured\n\n    python benchmarks/plan_memory.py\n\n"
    section = f"{MARKS[0]}\n{title}{text}\n{MARKS[1]}\n"
    whole = RESULTS.read_text(encoding="utf-8")
    if MARKS[0] in whole:
        before, after = whole.split(MARKS[0])[0], whole.split(MARKS[1])[1].lstrip("\n")
        whole = f"{before}{section}" + (f"\n{after}" if after else "")
    else:
        whole = f"{whole.rstrip()}\n\n{section}"
    RESULTS.write_text(whole, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, default=1000, help="measure at most this many that are missing")
    parser.add_argument("--only", default="", help="only cells whose name holds this text")
    arguments = parser.parse_args()
    CACHE.mkdir(parents=True, exist_ok=True)
    os.environ["SHIKOMI_CACHE"] = str(CACHE / "cache")
    known = known_cells()
    missing = {cell.name: cell for cell in grid() if cell.name not in known and arguments.only in cell.name}
    order = list(missing.values())
    random.Random(1).shuffle(order)  # so that a part of the grid says something of the whole
    for cell in order[: arguments.cells]:
        found = known[cell.name] = measured(cell)
        with DONE.open("a") as file:
            file.write(json.dumps(found) + "\n")
        print(f"{found['peak'] / 1e6:8.1f} MB {found['seconds']:6.1f} s  {told(cell)}", flush=True)
    report(known)


if __name__ == "__main__":
    main()
