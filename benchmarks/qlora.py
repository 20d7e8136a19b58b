"""A base in few bits, measured: size, time, memory, quality. Each part is written into docs/results.md by itself.

python benchmarks/qlora.py --part bits|steps|peer|phone|state|large|long|vocabulary|perplexity

`steps` and `peer` compare times, and want a quiet machine. `large` takes QLoRA steps on a random model of 1.5 billion
parameters (3 GB of disk while it runs); with --large also on one of 7 billion (14 GB of disk, a quarter of an hour).
"""

import argparse
import json
import re
import statistics
import sys
import tempfile
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import yaml

import sft
from measure import ALLOCATOR, HERE, SHIKOMI, Done, Failed, machine, read_metrics, run, table
from shapes import SHAPES, SMALL, VOCABULARY, count, make_model, shapes_of

RESULTS = HERE.parent / "docs" / "results.md"
SECTION = "## A base in few bits\n"
TEXT = HERE.parent / "src" / "shikomi" / "examples" / "text" / "train.jsonl"


def measured(what: str, *args: str) -> dict[str, Any]:
    return run([sys.executable, str(HERE / "qlora_measures.py"), what, *args]).result


def train(model: Path, scratch: Path, **keys: Any) -> tuple[Done, list[dict[str, Any]]]:
    """A run of `shikomi train` with QLoRA on the example rows: r=8 on all linear layers."""
    content = {
        "model": str(model),
        "quant": "nf4",
        "adapter": {"name": "lora", "r": 8, "lora_alpha": 16},
        "data": {
            "train": "examples/sections/train.jsonl",
            "prompt": "Which section is this package in?\n\n{text}",
            "completion": "{label}",
        },
        "share_prefix": False,
        **keys,
    }
    recipe, folder = scratch / "recipe.yaml", scratch / "run"
    recipe.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    done = run([SHIKOMI, "train", str(recipe), f"output_dir={folder}", "--json"])
    steps = read_metrics(folder)
    if not steps or not all(step["grad_norm"] > 0 for step in steps):
        raise Failed(f"no step, or a gradient norm that is not above zero: {steps}")
    return done, steps


def part_bits(args: argparse.Namespace) -> str:
    """Size of the linear maps: measured on the model, computed at 7B."""
    found = measured("bits", str(args.model))
    llama = shapes_of(SHAPES["7B"][0] | {"vocab_size": 32_000})
    outer = sum(count({n: s}) for n, s in llama.items() if "layers" not in n or len(s) == 1)
    linear = count(llama) - outer
    rows, bits = [], {}
    for name in ("bf16", "int8", "NF4", "FP4", "NF4 + double quantization"):
        bits[name] = 8 * found[name] / found["parameters"]
        rows.append(
            [
                name,
                f"{bits[name]:.3f}",
                f"{found[name] / 1e6:.1f} MB",
                f"{linear * bits[name] / 8e9:.2f} GB",
                f"{(linear * bits[name] / 8 + 2 * outer) / 1e9:.2f} GB",
            ]
        )
    if bits["NF4 + double quantization"] > 4.13 or bits["NF4"] > 4.501:
        raise Failed(f"more bits than allowed: {bits}")
    head = ["", "bits a weight", "linear maps, SmolLM2-135M (resident)", "linear maps, Llama-2-7B", "all weights, 7B"]
    return (
        f"{table(head, rows)}\n\nBits are counted on the {found['parameters']:,} weights of SmolLM2's linear maps, "
        "codes and scales. The 7B columns are computed from them; embeddings, head and norms stay in 16 bits."
    )


def part_steps(args: argparse.Namespace) -> str:
    """Step time of LoRA, QLoRA and full fine-tuning, in turns in one process."""
    found = measured("steps", str(args.model), "--tokens", "512", "--rounds", str(args.rounds))
    lora = found["LoRA, bf16"]["median"]
    rows = [[n, f"{s['median']:.2f} s", f"{s['best']:.2f} s", f"{s['median'] / lora:.3f}"] for n, s in found.items()]
    ratio = found["QLoRA"]["median"] / found["full"]["median"]
    return (
        f"{table(['', 'step, median', 'best', 'against LoRA'], rows)}\n\nOne micro-batch of 512 tokens, a tenth "
        f"scored, r=8 on all linear layers, {args.rounds} steps each in turns after a warm-up. QLoRA's step takes "
        f"{ratio:.2f} of full fine-tuning's."
    )


def part_peer(args: argparse.Namespace) -> str:
    """Speed and memory beside TRL with PEFT and bitsandbytes, in turns."""
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        rows, adapter, recipe = scratch / "rows.jsonl", scratch / "adapter", scratch / "recipe.yaml"
        sft.make_rows(rows, args.rows)
        sft.make_adapter(args.model, "all-linear", adapter)
        sft.write_recipe(recipe, adapter, rows)
        recipe.write_text(recipe.read_text() + "quant: nf4\n", encoding="utf-8")
        nf4 = ["--nf4"]
        contenders: dict[str, Callable[[int], dict[str, Any]]] = {
            "shikomi": lambda turn: sft.ours(recipe, scratch / f"run-{turn}"),
            f"TRL NF4, {sft.BEST}": lambda _: sft.peer(args.model, rows, adapter, sft.BEST, {}, args.rows, nf4),
            f"TRL NF4, {sft.BEST}, our allocator settings": lambda _: sft.peer(
                args.model, rows, adapter, sft.BEST, ALLOCATOR, args.rows, nf4
            ),
        }
        runs: dict[str, list[dict[str, Any]]] = {name: [] for name in contenders}
        losses = (0.0, 0.0)
        for turn in range(args.rounds):
            for name, start in contenders.items():
                runs[name].append(start(turn))
                print(f"turn {turn + 1}, {name}: {runs[name][-1]['tokens_per_second']:.0f} tokens/s", flush=True)
            losses = sft.compare(runs["shikomi"][turn], runs[f"TRL NF4, {sft.BEST}"][turn])
        if sft.BEST == "fp32":  # as shipped it asks for bf16
            slow = sft.peer(args.model, rows, adapter, "bf16", {}, sft.SLOW_ROWS, nf4)
            runs[f"TRL NF4, bf16 as shipped, {sft.SLOW_ROWS} row only"] = [slow]
    mine = runs["shikomi"]
    lines = []
    for name, entries in runs.items():
        speed, peak = (statistics.median(e[key] for e in entries) for key in ("tokens_per_second", "peak"))
        faster = sft.median(mine, "tokens_per_second") / speed
        smaller = peak / sft.median(mine, "peak")
        compared = ["", ""] if name == "shikomi" else [f"{faster:.1f}x", f"1/{smaller:.1f}"]
        lines.append([name, f"{speed:.0f}", f"{peak / 1e9:.2f} GB", *compared])
    head = ["", "tokens/s", "peak memory", "ours is faster by", "ours of it"]
    return (
        f"{table(head, lines)}\n\nr=8 on all linear layers, {args.rows} rows, 4 a step, rounds in turns: "
        f"{args.rounds}, from one adapter. Losses differ by {losses[0]:.2%} at most, gradient norms by {losses[1]:.2%}."
    )


def part_phone(args: argparse.Namespace) -> str:
    """SmolLM2 with QLoRA in a gigabyte, the whole process."""
    with tempfile.TemporaryDirectory() as name:
        done, steps = train(
            args.model, Path(name), max_steps=4, batch_size=8, micro_batch_tokens=512, max_length=512, recompute="full"
        )
    return held(
        done.peak_memory_bytes,
        1.0,
        f"SmolLM2-135M, QLoRA r=8 on all linear layers, micro-batches of 512 tokens, recompute: full, "
        f"{len(steps)} steps of 8 rows: the whole process, with Python, torch and transformers",
    )


def part_state(args: argparse.Namespace) -> str:
    """Peak memory of full fine-tuning with the optimizer's state whole, in 8 bits, and on disk."""
    optims: dict[str, Any] = {
        "adamw": "adamw",
        "adamw_8bit": "adamw_8bit",
        "offload_to: disk": {"name": "offload", "offload_to": "disk"},
    }
    rows, losses = [], {}
    for name, optim in optims.items():
        with tempfile.TemporaryDirectory(dir=args.scratch) as place:
            keys = {"quant": "none", "adapter": "full", "optim": optim, "learning_rate": 1e-5}
            done, steps = train(args.model, Path(place), max_steps=3, batch_size=2, max_length=64, **keys)
            state = next(Path(place).glob("run/checkpoints/*/optimizer.safetensors")).stat().st_size
        losses[name] = [step["loss"] for step in steps]
        seconds = statistics.median(step["seconds"] for step in steps[1:])
        rows.append([name, f"{state / 1e6:,.0f} MB", f"{done.peak_memory_bytes / 1e9:.2f} GB", f"{seconds:.1f} s"])
    if losses["adamw"] != losses["offload_to: disk"]:
        raise Failed(f"state on disk gives other losses: {losses}")
    head = ["`optim`", "state", "peak of the process", "step"]
    return (
        f"{table(head, rows)}\n\nFull fine-tuning of SmolLM2-135M, three steps on two rows of at most 64 tokens: the "
        "optimizer takes most of a step. The losses of `adamw` and of the state on disk are the same to the last digit."
    )


def part_large(args: argparse.Namespace) -> str:
    """QLoRA steps on random models that do not fit otherwise."""
    lines = []
    for name in ("1.5B", "7B") if args.large else ("1.5B",):
        config, bound = SHAPES[name]
        with tempfile.TemporaryDirectory(dir=args.scratch) as place:
            scratch = Path(place)
            parameters = make_model(scratch, config, args.model)
            done, steps = train(
                scratch, scratch, max_steps=2, batch_size=2, micro_batch_tokens=256, max_length=128, recompute="full"
            )
        lines.append(
            held(
                done.peak_memory_bytes,
                bound,
                f"{parameters / 1e9:.2f} billion parameters ({2 * parameters / 1e9:.1f} GB in bf16), "
                f"{len(steps)} steps of {steps[0]['tokens']} tokens, the last in {steps[-1]['seconds']:.0f} s; the "
                f"whole run, loading and quantizing too, {done.wall_seconds:.0f} s",
            )
        )
    return "\n".join(lines)


def held(peak: int, bound: float, what: str) -> str:
    """A line with a peak and its bound; stops where it is missed."""
    line = f"- {what}: peak {peak / 1e9:.2f} GB, bound {bound:g} GB."
    if peak > bound * 1e9:
        raise Failed(f"missed: {line}")
    return line


def part_long(args: argparse.Namespace) -> str:
    """Peak memory of long micro-batches with the MLP in parts and whole."""
    rows = []
    with tempfile.TemporaryDirectory(dir=args.scratch) as place:
        make_model(Path(place), SMALL, args.model)
        for tokens in (2048, 4096, 8192):
            by = {}
            for name, size in (("whole", tokens), ("parts", 512)):
                by[name] = measured("long", place, "--tokens", str(tokens), "--rows", str(size))
            if abs(by["parts"]["norm"] / by["whole"]["norm"] - 1) > 1e-3:
                raise Failed(f"the gradients differ: {by}")
            used = {name: (one["peak"] - one["before"]) / 1e6 for name, one in by.items()}
            saved = used["whole"] - used["parts"]
            rows.append([f"{tokens:,}", f"{used['whole']:.0f} MB", f"{used['parts']:.0f} MB", f"{saved:.0f} MB"])
    head = ["tokens in a micro-batch", "whole", "512 rows at a time", "saved"]
    return (
        f"{table(head, rows)}\n\nMemory that a gradient takes above the loaded model: SmolLM2's widths, 5 layers, "
        "segments of 1,024 tokens, NF4, LoRA r=8, recompute: full. The saving is the same with more layers."
    )


def part_vocabulary(args: argparse.Namespace) -> str:
    """Memory of a vocabulary of 262,144: logits never exist together."""
    tokens = 2048
    with tempfile.TemporaryDirectory(dir=args.scratch) as place:
        parameters = make_model(Path(place), VOCABULARY, args.model)
        found = measured("head", place, "--tokens", str(tokens))
    used = found["peak"] - found["before"]
    logits = 4 * tokens * VOCABULARY["vocab_size"]
    if used > logits / 4:
        raise Failed(f"{used / 1e6:.0f} MB for a gradient; a quarter of the logits is {logits / 4e6:.0f} MB")
    return (
        f"A random model of {parameters / 1e6:.0f} million parameters, a vocabulary of 262,144, {tokens:,} "
        f"tokens, all scored: a gradient takes {used / 1e6:.0f} MB above the loaded model "
        f"({found['before'] / 1e6:.0f} MB); the logits in fp32 alone would take "
        f"{logits / 1e6:,.0f} MB, and twice that with their gradient."
    )


def part_perplexity(args: argparse.Namespace) -> str:
    """Perplexity of a fixed text in every scheme."""
    with tempfile.TemporaryDirectory() as place:
        text = Path(place) / "text"
        rows = TEXT.read_text(encoding="utf-8").splitlines()
        text.write_text("\n\n".join(json.loads(row)["text"] for row in rows), encoding="utf-8")
        found = measured("perplexity", str(args.model), "--text", str(text), "--tokens", str(args.tokens))
    order = ["bf16", "int8", "NF4 + double quantization", "NF4", "FP4"]
    rows = [[name, f"{found[name]:.3f}", f"{found[name] / found['bf16'] - 1:+.2%}"] for name in order]
    fits = (
        found["bf16"] < min(found["NF4"], found["NF4 + double quantization"])
        and max(found["NF4"], found["NF4 + double quantization"]) < found["FP4"]
    )
    return (
        f"{table(['', 'perplexity', 'against bf16'], rows)}\n\nThe first {found['tokens']:,} tokens of the example "
        "texts, in segments of 512. SmolLM2's weights come from a 4-bit file (Q4_1) here and are bf16 copies of "
        'it, so that "bf16" has lost something already; a model published in bf16 is not at hand. The paper\'s order, '
        f"bf16, then NF4 with and without double quantization alike, then FP4, {'holds' if fits else 'does NOT hold'}."
    )


PARTS: dict[str, tuple[str, Callable[[argparse.Namespace], str]]] = {
    "bits": ("Size", part_bits),
    "steps": ("Time of a step", part_steps),
    "peer": ("Beside TRL, PEFT and bitsandbytes", part_peer),
    "phone": ("A phone's memory", part_phone),
    "state": ("The optimizer's state", part_state),
    "large": ("Models that do not fit otherwise", part_large),
    "long": ("Long rows", part_long),
    "vocabulary": ("A large vocabulary", part_vocabulary),
    "perplexity": ("Perplexity", part_perplexity),
}


def write(part: str, text: str, command: str) -> None:
    """Puts a part into its section of docs/results.md, in the place of its former one."""
    title = PARTS[part][0]
    block = (
        f"<!-- qlora {part} -->\n### {title}\n\n{date.today().isoformat()}, `{command}`; {machine()}.\n\n"
        f"{text}\n<!-- /qlora {part} -->\n"
    )
    whole = RESULTS.read_text(encoding="utf-8")
    pattern = re.compile(rf"<!-- qlora {part} -->.*?<!-- /qlora {part} -->\n", re.S)
    if pattern.search(whole):
        whole = pattern.sub(lambda _: block, whole)
    elif SECTION in whole:
        start = whole.index(SECTION) + len(SECTION)
        following = re.compile(r"^(?:## |<!-- (?!/?qlora))", re.M).search(whole, start)
        end = following.start() if following else len(whole)
        whole = f"{whole[:end].rstrip()}\n\n{block}" + (f"\n{whole[end:]}" if following else "")
    else:
        whole = f"{whole.rstrip()}\n\n{SECTION}\n{block}"
    RESULTS.write_text(whole, encoding="utf-8")


READ = {"steps": ["rounds"], "peer": ["rounds", "rows"], "perplexity": ["tokens"]}  # what a part takes of the options


def command(part: str, args: argparse.Namespace, parser: argparse.ArgumentParser) -> str:
    """The command that measures this part again."""
    other = [name for name in READ.get(part, []) if getattr(args, name) != parser.get_default(name)]
    options = "".join(f" --{name} {getattr(args, name)}" for name in other)
    return f"python benchmarks/qlora.py --part {part}{options}{' --large' * (args.large and part == 'large')}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="+", choices=PARTS, default=[p for p in PARTS if p not in ("steps", "peer")])
    parser.add_argument("--model", type=Path, help="a transformers folder (default: smollm2 from the cache)")
    parser.add_argument("--rows", type=int, default=24, help="of the comparison with TRL")
    parser.add_argument("--rounds", type=int, default=5, help="of steps and peer")
    parser.add_argument("--tokens", type=int, default=8192, help="of the text whose perplexity is measured")
    parser.add_argument("--large", action="store_true", help="the 7B shape too")
    parser.add_argument("--scratch", type=Path, help="where random models are written (default: the system's)")
    parser.add_argument("--dry", action="store_true", help="print, and write nothing")
    args = parser.parse_args()
    if args.model is None:
        args.model = Path(run([sys.executable, "-c", FIND]).result)
    args.model = args.model.resolve()
    for part in args.part:
        text = PARTS[part][1](args)
        print(f"\n{PARTS[part][0]}\n{text}", flush=True)
        if not args.dry:
            write(part, text, command(part, args, parser))


# In a child: torch must not be in this process, whose size a child's peak begins with.
FIND = "import json; from shikomi.model import catalog; print(json.dumps(str(catalog.get('smollm2'))))"

if __name__ == "__main__":
    main()
