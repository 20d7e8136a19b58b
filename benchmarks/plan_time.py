"""Predicted against measured training time on short real runs, after the probe; the table goes into docs/results.md.

python benchmarks/plan_time.py [--only TEXT]

All runs are in this process on one thread, each between two fresh probes, because the speed of a shared machine drifts;
for the same reason probe and steps are measured in processor time. The first step is left out: it warms up. Models
are those of plan_memory.py.
"""

import argparse
import itertools
import re
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from measure import machine, table
from plan_memory import CACHE, FULL, QV, R8, RESULTS, Cell, recipe_of
from shikomi.progress import Silent

MARKS = ("<!-- plan_time -->", "<!-- /plan_time -->")
MEDIAN = 0.15  # what is asked of the relative errors
STEPS = 4


def cells() -> list[tuple[str, Cell]]:
    """Short runs of many kinds, each with a name for the table."""
    dora = {"name": "dora", "r": 8}
    return [
        ("LoRA r=8, all linear, 135M", Cell("smollm2", R8, length=256, rows=2, micro=512, steps=STEPS)),
        ("LoRA r=8, q and v, 135M", Cell("smollm2", QV, length=256, rows=2, micro=512, steps=STEPS)),
        ("full, 110M", Cell("llama-110m", FULL, length=256, rows=1, micro=256, steps=STEPS)),
        ("LoRA over NF4, 60M", Cell("llama-60m", R8, "nf4", length=256, rows=2, micro=512, steps=STEPS)),
        ("rows of 2,048 tokens, 20M", Cell("llama-20m", R8, length=2048, rows=1, micro=2048, steps=STEPS)),
        (
            "DPO, live reference, 60M",
            Cell("llama-60m", R8, objective="dpo", length=512, rows=2, micro=1024, steps=STEPS),
        ),
        ("DoRA r=8, 60M", Cell("llama-60m", dora, length=512, rows=1, micro=512, steps=STEPS)),
        ("all layers again, 60M", Cell("llama-60m", R8, length=512, rows=1, micro=512, recompute="full", steps=STEPS)),
        ("GPT-2, LoRA, 40M", Cell("gpt2-40m", R8, length=512, rows=1, micro=512, steps=STEPS)),
        ("all tokens trained, 90M", Cell("qwen2-90m", R8, length=256, rows=2, micro=512, scored=1.0, steps=STEPS)),
        ("ten micro-batches, 5M", Cell("llama-5m", R8, length=128, rows=20, micro=256, steps=STEPS)),
    ]


class Clock(Silent):
    """Processor seconds at the start of training and after every step."""

    def __init__(self) -> None:
        self.at: list[float] = []

    def start(self, total: int, what: str) -> None:
        self.at = [time.process_time()]

    def advance(self, record: dict[str, Any]) -> None:
        self.at.append(time.process_time())


def run(cell: Cell) -> dict[str, Any]:
    """Likely seconds a step by the plan, and the median of the measured ones after the first."""
    import torch

    from shikomi.model.device import choose_dtypes, tune_allocator
    from shikomi.plan.estimate import Machine
    from shikomi.plan.jobs import jobs
    from shikomi.plan.memory import memory
    from shikomi.plan.rates import here
    from shikomi.plan.speed import free_bytes, measure
    from shikomi.plan.time import timed
    from shikomi.recipe import load_recipe
    from shikomi.run import train

    tune_allocator()
    torch.set_num_threads(1)  # processor time of several adds up
    clock = Clock()
    device = torch.device("cpu")
    dtypes = choose_dtypes("auto", device)
    with tempfile.TemporaryDirectory() as name:
        recipe = load_recipe(recipe_of(cell, Path(name)))
        arithmetic = "bf16" if dtypes.arithmetic == torch.bfloat16 else "fp32"
        here_now = Machine("this machine", "cpu", *free_bytes(device), "bf16", arithmetic)
        (job,) = jobs(recipe)
        recompute = memory(job, here_now).recompute
        probes = [measure(device, *dtypes, time.process_time)]
        train(recipe, clock)
        probes.append(measure(device, *dtypes, time.process_time))
        rates = {kind: statistics.harmonic_mean([probe[kind] for probe in probes]) for kind in probes[0]}
        plan = timed(job, here(here_now, rates), recompute)
    seconds = [after - before for before, after in itertools.pairwise(clock.at)]
    measured = statistics.median(seconds[1:])
    return {"planned": plan.step_seconds, "measured": measured, "parts": plan.parts, "steps": job.steps}


def section(rows: list[tuple[str, dict[str, Any]]]) -> str:
    errors = [one["planned"] / one["measured"] - 1 for _, one in rows]
    lines = [
        [name, f"{one['planned']:.2f} s", f"{one['measured']:.2f} s", f"{error:+.0%}"]
        for (name, one), error in zip(rows, errors, strict=True)
    ]
    median = statistics.median(map(abs, errors))
    told = "met" if median <= MEDIAN else "not met"
    return (
        "## Time: planned against measured\n\n    python benchmarks/plan_time.py\n\n"
        f"{machine()}; one thread. Processor seconds of an optimizer step.\n\n"
        f"{table(['run', 'planned', 'measured', 'error'], lines)}\n\n"
        f"Median error {median:.0%}, largest {max(map(abs, errors)):.0%}. Asked for: a median of at most {MEDIAN:.0%}; "
        f"{told}.\n"
    )


def write(text: str) -> None:
    """Puts the section into docs/results.md in the place of its former one."""
    start, end = MARKS
    whole, block = RESULTS.read_text(encoding="utf-8"), f"{start}\n{text}{end}\n"
    pattern = re.compile(f"{re.escape(start)}.*?{re.escape(end)}\n", re.S)
    found = pattern.search(whole)
    whole = pattern.sub(lambda _: block, whole) if found else f"{whole.rstrip()}\n\n{block}"
    RESULTS.write_text(whole, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="only cells whose name holds this text; nothing is written then")
    only = parser.parse_args().only
    CACHE.mkdir(parents=True, exist_ok=True)
    rows = []
    for name, cell in cells():
        if only in name:
            found = run(cell)
            rows.append((name, found))
            parts = ", ".join(f"{part} {value / found['steps']:.2f}" for part, value in found["parts"].items())
            print(f"{name}: planned {found['planned']:.2f} s, measured {found['measured']:.2f} s ({parts})", flush=True)
    text = section(rows)
    print(text)
    if not only:
        write(text)


if __name__ == "__main__":
    main()
