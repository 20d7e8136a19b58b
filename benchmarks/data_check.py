"""How long `shikomi data check` takes on 100,000 rows: whole processes, with and without a tokenizer.

python benchmarks/data_check.py
"""

import json
import os
import random
import re
import resource
import subprocess
import tempfile
import time
from pathlib import Path

from measure import HERE, SHIKOMI, table, write_section

ROWS = 100_000
ALLOWED_SECONDS = 60
EXAMPLES = HERE.parent / "examples"


def make_rows(path: Path, count: int) -> None:
    """Prompts and answers of sentences drawn from package descriptions, three to seven for each row; seeded.

    One row in a hundred is a copy of an earlier one.
    """
    files = [EXAMPLES / "sections/train.jsonl", EXAMPLES / "summaries/train.jsonl", HERE / "data/sections/train.jsonl"]
    rows = [json.loads(line) for file in files for line in file.read_text("utf-8").splitlines()]
    sentences = sorted({s.strip() for row in rows for s in re.split(r"(?<=[.!?])\s+|\n\n", row["text"]) if len(s) > 20})
    answers = [row["summary"] for row in rows if "summary" in row]
    draw = random.Random(0)
    made: list[str] = []
    for number in range(count):
        if number % 100 == 99:
            made.append(made[draw.randrange(number)])
            continue
        text = " ".join(draw.sample(sentences, draw.randint(3, 7)))
        answer = f"{draw.choice(answers)} {draw.choice(sentences)}"
        made.append(json.dumps({"prompt": f"Summarise this package.\n\n{text}", "completion": answer}))
    path.write_text("\n".join(made) + "\n", encoding="utf-8")


def measure(arguments: list[str]) -> tuple[float, dict]:
    """Seconds of a process, and what it found."""
    start = time.perf_counter()
    done = subprocess.run([SHIKOMI, "data", "check", *arguments, "--json"], check=True, capture_output=True, text=True)
    return time.perf_counter() - start, json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    shown = []
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.jsonl"
        make_rows(file, ROWS)
        megabytes = file.stat().st_size / 1e6
        for name, more in (
            ("tokens estimated", []),
            ("tokens of smollm2", ["--model", "smollm2", "--max-length", "512"]),
        ):
            seconds, result = measure([str(file), *more])
            copies = sum(f["count"] for t in result["tasks"] for f in t["findings"] if f["code"] == "D201")
            if copies < ROWS // 100 or result["tasks"][0]["rows"] != {"train": ROWS}:
                raise SystemExit(
                    f"{copies} copies found in {result['tasks'][0]['rows']} rows: the check did not do its work"
                )
            peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e3
            met = "yes" if seconds <= ALLOWED_SECONDS else "no"
            shown.append([name, f"{seconds:.0f} s", f"{1e6 * seconds / ROWS:.0f} us", f"{peak:.0f} MB", met])
    head = ["", "time", "a row", "largest memory so far", f"within {ALLOWED_SECONDS} s"]
    text = f"{ROWS:,} rows of {megabytes:.0f} MB, {len(os.sched_getaffinity(0))} cores.\n\n{table(head, shown)}"
    write_section("data_check", "Time of data check", text, "python benchmarks/data_check.py")


if __name__ == "__main__":
    main()
