"""Preference learning side by side with TRL, and with ourselves: speed, memory, first loss, margins, shared prompts.

python benchmarks/preferences.py [--part trl prefix methods] [--model FOLDER] [--pairs 24] [--rounds 2] [--quick]

trl      DPO, r=8 on q and v, beta 0.1, 2 pairs a step, live reference, against TRL's DPOTrainer: same adapter, same
         pairs in the same order. The first loss has to be equal (log 2), the margins of the steps to stay together.
prefix   our own speed with the prompt computed once for both answers, against each answer with its own prompt:
         where prompt and answers are of equal length, and where a short prompt has long answers.
methods  time and peak memory of DPO and IPO with live and cached reference, ORPO, SimPO and SFT on the same tokens.
Every program is a fresh process, and they take turns; see sft.py.
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import yaml

from measure import ALLOCATOR, HERE, SHIKOMI, Failed, machine, read_metrics, run, table, write_section
from sft import BEST, PLAIN, RANK, TEMPLATE, make_adapter, median, peer_command, summary

BATCH, RATE, BETA, MAX_LENGTH = 2, 5e-5, 0.1, 1024
CUT = 420  # characters of a text: some 100 tokens
LOSS, MARGIN = 1e-3, 0.02  # how far the first loss, and the margin of any step, may be from the peer's


def texts() -> list[tuple[str, str]]:
    """(package, description of CUT characters) out of the example data."""
    source = HERE.parent / "src" / "shikomi" / "examples" / "summaries" / "train.jsonl"
    rows = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()]
    return [(row["package"], " ".join(row["text"].split())[:CUT]) for row in rows if len(row["text"]) >= CUT]


def make_pairs(path: Path, count: int, short_prompt: bool) -> None:
    """Pairs of a package's own description and another's; the prompt is as long as they, or one line."""
    found = texts()
    with path.open("w", encoding="utf-8") as out:
        for number in range(count):
            (name, good), (_, bad), (_, like) = (found[(number + k * 7) % len(found)] for k in range(3))
            asked = f"Describe the package {name} in a paragraph."
            asked += "" if short_prompt else f" Write it like this one:\n\n{like[: CUT - 60]}"
            turns = {"prompt": ("user", asked), "chosen": ("assistant", good), "rejected": ("assistant", bad)}
            out.write(json.dumps({k: [{"role": role, "content": text}] for k, (role, text) in turns.items()}) + "\n")


def make_rows(path: Path, pairs: Path) -> None:
    """SFT rows of the same tokens: each answer of every pair after its prompt."""
    with path.open("w", encoding="utf-8") as out:
        for line in pairs.read_text(encoding="utf-8").splitlines():
            pair = json.loads(line)
            for side in ("chosen", "rejected"):
                out.write(json.dumps({"prompt": pair["prompt"], "completion": pair[side]}) + "\n")


def write_recipe(path: Path, model: Path, rows: Path, objective: Any, **keys: Any) -> None:
    recipe = {
        "model": str(model),
        "data": {"train": str(rows)},
        "objective": objective,
        "chat_template": TEMPLATE,
        "max_length": MAX_LENGTH,
        "batch_size": BATCH,
        "learning_rate": RATE,
        **PLAIN,
        **keys,
    }
    path.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")


def ours(recipe: Path, folder: Path) -> dict[str, Any]:
    """One run of ours, in the peer's terms, with a cache of its own; stops where no gradient arrived."""
    command = [SHIKOMI, "train", str(recipe), f"output_dir={folder}", "--json"]
    done = run(command, {"SHIKOMI_CACHE": str(folder.with_suffix(".cache"))})
    steps = read_metrics(folder)
    if min(step["grad_norm"] for step in steps) <= 0:
        raise Failed(f"a gradient norm is not above zero: {[step['grad_norm'] for step in steps]}")
    return summary(
        done,
        first_step_at=done.started_at,
        rows=len(steps) * BATCH,
        seconds=done.result["training_seconds"],
        pairs_per_second=len(steps) * BATCH / done.result["training_seconds"],
        loss=[step["loss"] for step in steps],
        margins=[step.get("rewards/margins", 0.0) for step in steps],
    )


def peer(model: Path, pairs: Path, adapter: Path, env: dict[str, str], limit: int, dtype: str = BEST) -> dict[str, Any]:
    command = peer_command("trl_dpo.py", model, pairs, adapter, dtype, limit, BATCH, RATE, MAX_LENGTH)
    done = run([*command, "--beta", str(BETA)], env)
    keep = ("pairs_per_second", "seconds", "loss", "margins", "grad_norm")
    return summary(done, first_step_at=done.started_at, **{key: done.result[key] for key in keep})


def compare(mine: dict[str, Any], theirs: dict[str, Any]) -> tuple[float, float]:
    """Difference of the first losses, and the largest of the margins; stops where they are not one computation."""
    loss = abs(mine["loss"][0] - theirs["loss"][0])
    margin = max(abs(a - b) for a, b in zip(mine["margins"], theirs["margins"], strict=True))
    if loss > LOSS or margin > MARGIN or max(theirs["margins"]) <= 0:
        raise Failed(f"not one computation: first losses differ by {loss}, margins by {margin}\n{mine}\n{theirs}")
    return loss, margin


def against_trl(model: Path, count: int, rounds: int, scratch: Path) -> str:
    pairs, adapter, recipe = scratch / "pairs.jsonl", scratch / "adapter", scratch / "recipe.yaml"
    make_pairs(pairs, count, short_prompt=False)
    make_adapter(model, "q_proj,v_proj", adapter, zero=True)
    write_recipe(recipe, adapter, pairs, {"name": "dpo", "beta": BETA})
    contenders = {
        "shikomi": lambda turn: ours(recipe, scratch / f"run-{turn}"),
        f"TRL {BEST}": lambda _: peer(model, pairs, adapter, {}, count),
        f"TRL {BEST}, our allocator settings": lambda _: peer(model, pairs, adapter, ALLOCATOR, count),
    }
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in contenders}
    differences = (0.0, 0.0)
    for turn in range(rounds):
        for name, start in contenders.items():
            runs[name].append(start(turn))
            print(f"turn {turn + 1}, {name}: {runs[name][-1]['pairs_per_second']:.3f} pairs/s", flush=True)
        differences = compare(runs["shikomi"][turn], runs[f"TRL {BEST}"][turn])
    if BEST == "fp32":  # as shipped it asks for bf16
        runs[f"TRL bf16 as shipped, {BATCH} pairs only"] = [peer(model, pairs, adapter, {}, BATCH, "bf16")]
    lines = []
    for name, entries in runs.items():
        speeds = [entry["pairs_per_second"] for entry in entries]
        faster = median(runs["shikomi"], "pairs_per_second") / statistics.median(speeds)
        smaller = median(entries, "peak") / median(runs["shikomi"], "peak")
        mine = name == "shikomi"
        speed = f"{statistics.median(speeds):.3f} ({min(speeds):.3f}-{max(speeds):.3f})"
        memory = f"{median(entries, 'peak') / 1e9:.2f} GB"
        lines.append([name, speed, "" if mine else f"{faster:.1f}x", memory, "" if mine else f"1/{smaller:.1f}"])
    head = ["", "pairs/s, median (range)", "ours is faster by", "peak memory", "ours of it"]
    return (
        f"### DPO, r={RANK} on q and v, {BATCH} pairs a step, live reference\n\n{table(head, lines)}\n\n"
        f"{count} pairs, prompt and answers of some 100 tokens each. First loss {runs['shikomi'][0]['loss'][0]:.4f}, "
        f"TRL's differs by {differences[0]:.1e}; the margins of {count // BATCH} steps by at most {differences[1]:.1e} "
        f"(the last is {runs['shikomi'][-1]['margins'][-1]:.3f}).\n"
    )


def lora() -> dict[str, Any]:
    return {"name": "lora", "r": RANK, "lora_alpha": 2 * RANK, "target_modules": ["q_proj", "v_proj"]}


def shared_prefix(model: Path, count: int, rounds: int, scratch: Path) -> str:
    lines = []
    for name, short in (("prompt and answers of equal length", False), ("one line of prompt, long answers", True)):
        pairs = scratch / f"pairs-{short}.jsonl"
        make_pairs(pairs, count, short)
        speeds: dict[bool, list[float]] = {True: [], False: []}
        for turn in range(rounds):
            for shared in (True, False):
                recipe = scratch / "recipe.yaml"
                objective = {"name": "dpo", "beta": BETA}
                write_recipe(recipe, model, pairs, objective, adapter=lora(), share_prefix=shared)
                speeds[shared].append(ours(recipe, scratch / f"{short}-{shared}-{turn}")["pairs_per_second"])
        once, twice = statistics.median(speeds[True]), statistics.median(speeds[False])
        lines.append([name, f"{once:.3f}", f"{twice:.3f}", f"{once / twice:.2f}x"])
        print(*lines[-1], flush=True)
    head = ["", "pairs/s, the prompt once", "pairs/s, the prompt with each answer", "faster by"]
    return f"### The prompt computed once\n\n{table(head, lines)}\n"


def methods(model: Path, count: int, rounds: int, scratch: Path) -> str:
    pairs, rows = scratch / "pairs.jsonl", scratch / "rows.jsonl"
    make_pairs(pairs, count, short_prompt=False)
    make_rows(rows, pairs)
    contenders: dict[str, tuple[Path, Any, dict[str, Any]]] = {
        "SFT on both answers": (rows, "sft", {"batch_size": 2 * BATCH}),
        "ORPO": (pairs, "orpo", {}),
        "SimPO": (pairs, "simpo", {}),
        "DPO, live reference": (pairs, "dpo", {}),
        "DPO, cached reference": (pairs, "dpo", {"reference": "precompute"}),
        "IPO, live reference": (pairs, "ipo", {}),
        "IPO, cached reference": (pairs, "ipo", {"reference": "precompute"}),
    }
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in contenders}
    for turn in range(rounds):
        for number, (name, (data, objective, keys)) in enumerate(contenders.items()):
            recipe = scratch / "recipe.yaml"
            write_recipe(recipe, model, data, objective, **{"adapter": lora(), **keys})
            runs[name].append(ours(recipe, scratch / f"run-{turn}-{number}"))
            print(f"turn {turn + 1}, {name}: {runs[name][-1]['seconds']:.1f} s", flush=True)
    base = runs["SFT on both answers"]
    lines = []
    for name, entries in runs.items():
        seconds, peak = median(entries, "seconds"), median(entries, "peak")
        times, memory = f"{seconds / median(base, 'seconds'):.2f}x", f"{peak / median(base, 'peak'):.2f}x"
        lines.append([name, f"{seconds:.1f} s", times, f"{peak / 1e9:.2f} GB", memory])
    head = ["", f"seconds for {count} pairs", "of SFT's", "peak memory", "of SFT's"]
    return (
        f"### Methods on the same tokens\n\n{table(head, lines)}\n\n"
        "A cached reference is computed before the first step, and counted; a second run, or a second epoch, does not "
        "compute it again. With an adapter the reference is the same weights with the adapter off: caching it, or "
        "choosing IPO instead of DPO, saves time at best, not memory. ORPO and SimPO have none.\n"
    )


PARTS = {"trl": against_trl, "prefix": shared_prefix, "methods": methods}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--model", type=Path, help="a transformers folder (default: smollm2 from the cache)")
    parser.add_argument("--pairs", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="4 pairs, one round, nothing written: does it run at all?")
    args = parser.parse_args()
    if args.quick:
        args.pairs, args.rounds = 4, 1
    model = args.model
    if model is None:
        from shikomi.model import catalog

        model = Path(catalog.get("smollm2"))
    print(machine(), flush=True)
    for part in args.part:
        with tempfile.TemporaryDirectory() as name:
            text = PARTS[part](model.resolve(), args.pairs, args.rounds, Path(name))
        if args.quick:
            print(text)
        else:
            command = f"python benchmarks/preferences.py --part {part} --pairs {args.pairs} --rounds {args.rounds}"
            write_section(f"preferences-{part}", f"Preferences on SmolLM2-135M: {part}", text, command)


if __name__ == "__main__":
    main()
