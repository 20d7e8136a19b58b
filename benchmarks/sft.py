"""Supervised fine-tuning side by side with TRL: speed, memory, first step, and the same losses and gradient norms.

python benchmarks/sft.py [--model FOLDER] [--rows 24] [--rounds 2] [--targets q_proj,v_proj all-linear] [--quick]

Every program is a fresh process, and they take turns (A B C A B C ...) in one run, because a machine drifts by a fifth
within an hour. All start from one adapter and see the same rows in the same order, 4 a step, with a constant rate,
no warm-up and no weight decay. Tokens are real ones, never padding. The limit is measured between the turns (gemm.py).
A run whose losses or gradient norms are not the peer's is no result: the benchmark stops there.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from measure import (
    ALLOCATOR,
    HERE,
    SHIKOMI,
    Done,
    Failed,
    has_bf16_units,
    machine,
    read_metrics,
    run,
    table,
    write_section,
)

BATCH, RANK, RATE, MAX_LENGTH, MICRO_BATCH_TOKENS = 4, 8, 2e-4, 1024, 2048
BEST = "bf16" if has_bf16_units() else "fp32"
SLOW_ROWS = 1  # bf16 without bf16 units takes a minute for a hundred tokens

# What our recipes say so that a run is the peer's: see `settings` in peers/common.py.
PLAIN = {
    "num_train_epochs": 1,
    "lr_scheduler_type": "constant",
    "warmup_steps": 0,
    "weight_decay": 0.0,
    "max_grad_norm": 1.0,
    "shuffle": False,
    "save_steps": 1_000_000,
}

# SmolLM2's own template without the line break after the last turn, which TRL scores as part of the answer and we do
# not; without it both sides train exactly the same tokens.
TEMPLATE = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}{{ '<|im_start|>system\n"
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' }}"
    "{% if not loop.last or add_generation_prompt %}{{ '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def make_rows(path: Path, count: int) -> None:
    """Chat rows of some 80 to 800 tokens out of the example data: synopses asked for one to five packages at once."""
    source = HERE.parent / "src" / "shikomi" / "examples" / "summaries" / "train.jsonl"
    packages = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()]
    with path.open("w", encoding="utf-8") as out:
        at = 0
        for number in range(count):
            size = 1 + (2 * number) % 5
            group = [packages[(at + i) % len(packages)] for i in range(size)]
            at += size
            texts = "\n\n".join(f"{i}. {row['package']}: {row['text']}" for i, row in enumerate(group, 1))
            lines = "\n".join(f"{i}. {row['summary']}" for i, row in enumerate(group, 1))
            user = {"role": "user", "content": f"Summarise each of these packages in one short line.\n\n{texts}"}
            row = {"prompt": [user], "completion": [{"role": "assistant", "content": lines}]}
            out.write(json.dumps(row) + "\n")


def make_adapter(model: Path, targets: str, folder: Path, zero: bool = False) -> None:
    """A PEFT adapter to start from; B is not zero, so that the gradient of A is compared from the first step on.

    `zero`: it is, as for a fresh adapter; then the reference of preferences is the base for everyone.
    """
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    names = targets if targets == "all-linear" else targets.split(",")
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, lora_dropout=0.0, target_modules=names, task_type="CAUSAL_LM")
    peft = get_peft_model(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), config)
    for name, parameter in peft.named_parameters():
        if "lora_B" in name and not zero:
            torch.nn.init.normal_(parameter, std=0.01)
    peft.save_pretrained(folder)


def count_tokens(model: Path, rows: Path) -> list[tuple[int, int]]:
    """(tokens, scored tokens) of every step of four rows."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = TEMPLATE
    sizes = []
    for line in rows.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        whole = tokenizer.apply_chat_template(row["prompt"] + row["completion"], tokenize=True, return_dict=False)
        prompt = tokenizer.apply_chat_template(
            row["prompt"], tokenize=True, add_generation_prompt=True, return_dict=False
        )
        sizes.append((len(whole), len(whole) - len(prompt)))
    steps = [sizes[at : at + BATCH] for at in range(0, len(sizes), BATCH)]
    return [(sum(total for total, _ in step), sum(scored for _, scored in step)) for step in steps]


def write_recipe(path: Path, adapter: Path, rows: Path) -> None:
    """Our half: a recipe that says what the peer's settings say. It continues the given adapter."""
    recipe = {
        "model": str(adapter),
        "data": {"train": str(rows), "format": "prompt_completion"},
        "chat_template": TEMPLATE,
        "max_length": MAX_LENGTH,
        "batch_size": BATCH,
        "micro_batch_tokens": MICRO_BATCH_TOKENS,
        "learning_rate": RATE,
        **PLAIN,
    }
    path.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")


def ours(recipe: Path, folder: Path) -> dict[str, Any]:
    """One run of ours, in the peer's terms."""
    first: list[float] = []

    def wait_for_first_step(_: int) -> None:
        deadline = time.time() + 600
        while not first and time.time() < deadline:
            metrics = folder / "metrics.jsonl"
            if metrics.exists() and metrics.stat().st_size:
                first.append(time.time())
            time.sleep(0.02)

    done = run([SHIKOMI, "train", str(recipe), f"output_dir={folder}", "--json"], watch=wait_for_first_step)
    steps = read_metrics(folder)
    result = done.result
    return summary(
        done,
        tokens=result["total_tokens"],
        tokens_per_second=result["tokens_per_second"],
        first_step_at=first[0],
        loss=[step["loss"] for step in steps],
        grad_norm=[step["grad_norm"] for step in steps],
    )


def peer(
    model: Path, rows: Path, adapter: Path, dtype: str, env: dict[str, str], limit: int, options: Sequence[str] = ()
) -> dict[str, Any]:
    """One run of TRL in this dtype, with these additions to its environment, on the first `limit` rows."""
    command = peer_command("trl_sft.py", model, rows, adapter, dtype, limit, BATCH, RATE, MAX_LENGTH)
    done = run([*command, *options], env)
    keep = ("tokens", "tokens_per_second", "first_step_at", "loss", "grad_norm")
    return summary(done, **{key: done.result[key] for key in keep})


def peer_command(
    script: str, model: Path, rows: Path, adapter: Path, dtype: str, limit: int, batch: int, rate: float, length: int
) -> list[str]:
    """A peer's command line: from this adapter, on the first `limit` rows, `batch` a step, at a constant rate."""
    command = [sys.executable, str(HERE / "peers" / script), str(model), str(rows), "--adapter", str(adapter)]
    command += ["--chat-template", TEMPLATE, "--batch", str(batch), "--max-length", str(length), "--lr", str(rate)]
    return [*command, "--schedule", "constant", "--limit", str(limit), *(["--fp32"] if dtype == "fp32" else [])]


def summary(done: Done, **values: Any) -> dict[str, Any]:
    first = values.pop("first_step_at") - done.started_at
    return {**values, "first_step": first, "peak": done.peak_memory_bytes, "wall": done.wall_seconds}


def compare(mine: dict[str, Any], theirs: dict[str, Any]) -> tuple[float, float]:
    """Largest relative difference of loss and of grad_norm over the steps; stops where they are not one computation."""
    if not (mine["grad_norm"] and min(mine["grad_norm"] + theirs["grad_norm"]) > 0):
        raise Failed(f"a gradient norm is not above zero: {mine['grad_norm']} and {theirs['grad_norm']}")
    if abs(mine["tokens"] / theirs["tokens"] - 1) > 0.01:
        raise Failed(f"not the same tokens: {mine['tokens']} and {theirs['tokens']}")
    loss, norm = (
        max(abs(a / b - 1) for a, b in zip(mine[key], theirs[key], strict=True)) for key in ("loss", "grad_norm")
    )
    if loss > 0.01 or norm > 0.03:
        raise Failed(f"loss differs by {loss:.2%} (1% allowed), grad_norm by {norm:.2%} (3% allowed)\n{mine}\n{theirs}")
    return loss, norm


def median(runs: list[dict[str, Any]], key: str) -> float:
    return statistics.median(entry[key] for entry in runs)


def side_by_side(model: Path, rows: Path, targets: str, rounds: int, scratch: Path) -> str:
    """All contenders in turns on one choice of targets; returns the text for the results file."""
    adapter, recipe = scratch / "adapter", scratch / "recipe.yaml"
    make_adapter(model, targets, adapter)
    write_recipe(recipe, adapter, rows)
    steps = count_tokens(model, rows)
    count = len(rows.read_text(encoding="utf-8").splitlines())
    gemm = [sys.executable, str(HERE / "gemm.py"), str(model), json.dumps(steps)]
    contenders: dict[str, Callable[[int], dict[str, Any]]] = {
        "shikomi": lambda turn: ours(recipe, scratch / f"run-{turn}"),
        f"TRL {BEST}": lambda _: peer(model, rows, adapter, BEST, {}, count),
        f"TRL {BEST}, our allocator settings": lambda _: peer(model, rows, adapter, BEST, ALLOCATOR, count),
    }
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in contenders}
    limits, losses = [], (0.0, 0.0)
    for turn in range(rounds):
        limits.append(sum(run([*gemm, "--dtype", BEST]).result["seconds"]))
        for name, start in contenders.items():
            runs[name].append(start(turn))
            print(f"{targets}, turn {turn + 1}, {name}: {runs[name][-1]['tokens_per_second']:.0f} tokens/s", flush=True)
        losses = compare(runs["shikomi"][turn], runs[f"TRL {BEST}"][turn])
    limits.append(sum(run([*gemm, "--dtype", BEST]).result["seconds"]))
    if BEST == "fp32":
        runs[f"TRL bf16, {SLOW_ROWS} row only"] = [peer(model, rows, adapter, "bf16", {}, SLOW_ROWS)]
    return describe(targets, runs, steps, statistics.median(limits), losses)


def describe(
    targets: str,
    runs: dict[str, list[dict[str, Any]]],
    steps: list[tuple[int, int]],
    limit_seconds: float,
    losses: tuple[float, float],
) -> str:
    mine = runs["shikomi"]
    tokens = sum(total for total, _ in steps)
    limit = tokens / limit_seconds
    lines = []
    for name, entries in runs.items():
        speeds = [entry["tokens_per_second"] for entry in entries]
        ratio = median(mine, "tokens_per_second") / median(entries, "tokens_per_second")
        lines.append(
            [
                name,
                f"{statistics.median(speeds):.0f} ({min(speeds):.0f}-{max(speeds):.0f})",
                "" if name == "shikomi" else f"{ratio:.1f}x",
                f"{median(entries, 'peak') / 1e9:.2f} GB",
                "" if name == "shikomi" else f"1/{median(entries, 'peak') / median(mine, 'peak'):.1f}",
                f"{median(entries, 'first_step'):.1f} s",
            ]
        )
    head = ["", "tokens/s, median (range)", "ours is faster by", "peak memory", "ours of it", "first step after"]
    share = median(mine, "tokens_per_second") / limit
    return (
        f"### r={RANK} on {targets}\n\n{table(head, lines)}\n\n"
        f"GEMM limit in {BEST}: {limit:.0f} tokens/s; shikomi reaches {share:.0%} of it. "
        f"{len(steps)} steps of {BATCH} rows, {tokens:,} tokens, {sum(s for _, s in steps):,} of them scored. "
        f"Largest difference to TRL {BEST} from the same adapter over these steps: loss {losses[0]:.2%}, "
        f"grad_norm {losses[1]:.2%}.\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a transformers folder (default: smollm2 from the cache)")
    parser.add_argument("--rows", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--targets", nargs="+", default=["q_proj,v_proj", "all-linear"])
    parser.add_argument("--quick", action="store_true", help="8 rows, one round, nothing written: does it run at all?")
    args = parser.parse_args()
    if args.quick:
        args.rows, args.rounds = 8, 1
    model = args.model
    if model is None:
        from shikomi.model import catalog

        model = Path(catalog.get("smollm2"))
    print(machine(), flush=True)
    texts = []
    for targets in args.targets:
        with tempfile.TemporaryDirectory() as name:
            scratch = Path(name)
            make_rows(scratch / "rows.jsonl", args.rows)
            texts.append(side_by_side(model.resolve(), scratch / "rows.jsonl", targets, args.rounds, scratch))
    best = (
        "This CPU multiplies bf16 in hardware: bf16 is the peer's best and the limit's arithmetic."
        if BEST == "bf16"
        else "This CPU has no bf16 units: the peer's fp32 is its best, and the limit is measured in fp32. Its bf16 "
        "(what its script asks for unless told otherwise) is timed on the first rows only, so its memory is "
        "not comparable."
    )
    text = f"{best}\n\n" + "\n".join(texts)
    if args.quick:
        print(text)
    else:
        write_section("sft", "SFT with LoRA on SmolLM2-135M, side by side with TRL", text, "python benchmarks/sft.py")


if __name__ == "__main__":
    main()
