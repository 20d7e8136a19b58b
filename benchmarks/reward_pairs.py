"""How often the reward model of benchmarks/preference_methods.py is right, by what the rejected answer is.

python benchmarks/reward_pairs.py [-o runs/preference-methods]

After that benchmark, with its files. The chosen answer is always the maintainer's synopsis. The rejected one is a
sample of the SFT model (100 held-back pairs, as it was trained on), or on 300 rows that neither model has seen the
greedy answer of the SFT model, or another package's synopsis that is as long in tokens: does it belong to the text?
Prints the table of docs/results.md.
"""

import argparse
import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoTokenizer

from measure import HERE, SHIKOMI, table
from preference_methods import DATA, PROMPT, rows_of, write_rows

Row = dict[str, Any]
UNSEEN = 300


def lines_of_others(rows: Sequence[Row], tokenizer: Any) -> list[Row]:
    """Pairs whose rejected answer is another row's synopsis, the nearest in tokens; each is used once at most."""
    lengths = np.array([len(tokenizer(row["summary"]).input_ids) for row in rows])
    free = np.random.default_rng(0).permutation(len(rows))
    pairs = []
    for row, length in zip(rows, lengths, strict=True):
        mine = row["summary"]
        by_distance = free[np.argsort(np.abs(lengths[free] - length), kind="stable")]
        taken = next(i for i in by_distance if rows[i]["summary"] != mine)
        free = free[free != taken]
        pairs.append({"prompt": PROMPT.format(**row), "chosen": mine, "rejected": rows[taken]["summary"]})
    return pairs


def greedy_answers(rows: Sequence[Row], answers: Path) -> list[Row]:
    """Pairs whose rejected answer is a model's, where it is not the maintainer's line itself."""
    return [
        {"prompt": PROMPT.format(**row), "chosen": row["summary"], "rejected": answer["prediction"]}
        for row, answer in zip(rows, rows_of(answers), strict=False)
        if answer["prediction"].strip() not in ("", row["summary"])
    ]


def asked(run: Path, pairs: Path, out: Path) -> Row:
    """What `shikomi eval` says of a reward model on pairs; kept in `out`."""
    if not out.exists():
        done = subprocess.run([SHIKOMI, "eval", run, pairs, "--json"], check=True, text=True, stdout=subprocess.PIPE)
        out.write_text(done.stdout.splitlines()[-1], encoding="utf-8")
    found: Row = json.loads(out.read_text(encoding="utf-8"))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, default=HERE.parent / "runs" / "preference-methods")
    work = parser.parse_args().output.absolute()
    rows = rows_of(DATA / "test.jsonl")[:UNSEEN]
    tokenizer = AutoTokenizer.from_pretrained(work / "sft" / "final")
    told = []
    for name, pairs in {
        "a sample of the SFT model": work / "held.jsonl",
        "its greedy answer": write_rows(work / "greedy.test.jsonl", greedy_answers(rows, work / "sft.answers.jsonl")),
        "another package's line": write_rows(work / "lines.test.jsonl", lines_of_others(rows, tokenizer)),
    }.items():
        report = asked(work / "reward", pairs, work / f"reward.{pairs.stem}.json")
        keys = ("accuracy", "accuracy_lengths_alike")
        told.append([name, *(share(report[by][key]) for key in keys for by in ("metrics", "by_length"))])
    head = ["rejected", "right", "the longer answer is right", "right, alike in length", "the longer answer there"]
    print(table(head, told))


def share(measured: Row) -> str:
    """A share with its interval and how many pairs it is of."""
    low, high = measured["ci95"]
    return f"{measured['value']:.1%} ({low:.1%} to {high:.1%}) of {measured['n']}"


if __name__ == "__main__":
    main()
