"""Whether memory stays flat: 1,000 steps on rows of 16 to 1,024 tokens, the process with its children.

python benchmarks/memory.py [--steps 1000]

The model is small (4 layers of 128), so that what grows is the program and not the arithmetic.
"""

import argparse
import json
import random
import sys
import tempfile
import time
from pathlib import Path

import psutil
import yaml

from measure import HERE, SHIKOMI, Failed, read_metrics, run, table, write_section

sys.path.insert(0, str(HERE.parent / "tests" / "support"))
ALLOWED_GROWTH = 0.02


def make_rows(path: Path, count: int) -> None:
    """Plain text rows whose lengths in tokens are spread over 16 to 1,024; a character is a token or less here."""
    chance = random.Random(0)
    with path.open("w", encoding="utf-8") as out:
        for number in range(count):
            size = 1023 if number % 50 == 0 else int(16 * 64 ** chance.random())
            text = "".join(chance.choice("0123456789") for _ in range(size - 1))
            out.write(json.dumps({"text": text}) + "\n")


def resident(process: psutil.Process) -> int:
    """Bytes resident in a process and all its children."""
    total = 0
    for one in [process, *process.children(recursive=True)]:
        try:
            total += one.memory_info().rss
        except psutil.NoSuchProcess:
            continue
    return total


def measure(steps: int, scratch: Path) -> list[tuple[int, int]]:
    """(finished steps, resident bytes) over the whole run, some 20 samples a second."""
    from tiny_models import save_tiny

    model = save_tiny(scratch / "model", hidden_size=128, intermediate_size=384, num_hidden_layers=4)
    make_rows(scratch / "rows.jsonl", steps)
    folder, recipe = scratch / "run", scratch / "recipe.yaml"
    content = {
        "model": str(model),
        "data": {"train": str(scratch / "rows.jsonl"), "format": "text"},
        "chat": "never",
        "max_length": 1024,
        "max_steps": steps,
        "batch_size": 1,
        "save_steps": max(1, steps // 10),
    }
    recipe.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    samples: list[tuple[int, int]] = []

    def watch(pid: int) -> None:
        process, metrics = psutil.Process(pid), folder / "metrics.jsonl"
        try:
            while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                done = metrics.read_bytes().count(b"\n") if metrics.exists() else 0
                samples.append((done, resident(process)))
                time.sleep(0.05)
        except psutil.NoSuchProcess:
            return

    # One thread: a model this small gains nothing from two, and waits for both on a busy machine.
    run([SHIKOMI, "train", str(recipe), f"output_dir={folder}", "--json"], {"OMP_NUM_THREADS": "1"}, watch)
    records = read_metrics(folder)
    if len(records) != steps or not all(record["grad_norm"] > 0 for record in records):
        raise Failed(f"{len(records)} steps of {steps} were recorded, or a gradient norm is not above zero")
    return samples


def around(samples: list[tuple[int, int]], step: int, reach: int) -> int:
    """Largest resident size within some steps before one, so that what comes after the last step does not count."""
    near = [size for done, size in samples if step - reach <= done < step]
    if not near:
        raise Failed(f"no sample near step {step}: the steps are too quick for this machine's clock")
    return max(near)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000)
    steps = parser.parse_args().steps
    with tempfile.TemporaryDirectory() as name:
        samples = measure(steps, Path(name))
    marks = [steps // 10, steps // 4, steps // 2, steps]
    sizes = [around(samples, mark, steps // 20) for mark in marks]
    growth = sizes[-1] / sizes[0] - 1
    rows = [
        [f"{mark}", f"{size / 1e6:.1f} MB", f"{size / sizes[0] - 1:+.2%}"]
        for mark, size in zip(marks, sizes, strict=True)
    ]
    text = f"{table(['up to step', 'resident, with children', 'against the first'], rows)}\n\n"
    text += f"Growth {growth:+.2%}; allowed {ALLOWED_GROWTH:.0%}: {'met' if growth <= ALLOWED_GROWTH else 'not met'}."
    write_section("memory", f"Memory over {steps} steps", text, "python benchmarks/memory.py")


if __name__ == "__main__":
    main()
