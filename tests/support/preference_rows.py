"""Files of pairs and of judged answers for whole runs on a tiny model."""

import json
from pathlib import Path

from running import WORDS


def pairs(count: int = 24, seed: int = 0) -> list[dict]:
    """Pairs of uneven lengths whose prompts share a beginning; the chosen answer names what the prompt lists first."""
    rows = []
    for i in range(count):
        k = (i * 7 + seed) % len(WORDS)
        prompt = "What is it, in one word or a few? " + " ".join(WORDS[(k + j) % len(WORDS)] for j in range(1 + i % 5))
        chosen, rejected = f"a {WORDS[k]}", f"the {WORDS[(k + 3) % len(WORDS)]} with {i % 4} parts"
        rows.append({"prompt": f"{prompt} {i}", "chosen": chosen, "rejected": rejected})
    return rows


def thumbs(count: int = 24, seed: int = 0) -> list[dict]:
    """Judged answers, two of three of them good."""
    return [
        {"prompt": row["prompt"], "completion": row["rejected" if i % 3 == 2 else "chosen"], "label": i % 3 != 2}
        for i, row in enumerate(pairs(count, seed))
    ]


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
