"""Whole runs on a tiny model: rows, recipes, and what they leave behind."""

import json
import os
import signal
from pathlib import Path
from typing import Any

from shikomi.recipe import Recipe, load_recipe

WORDS = ("server", "library", "font", "game", "editor", "driver", "parser", "viewer", "tool", "daemon")


def write_rows(path: Path, count: int = 40, seed: int = 0) -> Path:
    """Prompt and completion rows of uneven lengths."""
    lines = []
    for i in range(count):
        k = (i * 7 + seed) % len(WORDS)
        prompt = "What is it? " + " ".join(WORDS[(k + j) % len(WORDS)] for j in range(1 + i % 6))
        lines.append(json.dumps({"prompt": prompt, "completion": f"a {WORDS[k]} with {i % 5} parts"}))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def tiny_recipe(model: Path, rows: Path, run: Path, **keys: Any) -> Recipe:
    """A short LoRA run in fp32; `keys` are recipe keys."""
    settings: dict[str, Any] = {
        "model": str(model),
        "adapter": {"name": "lora", "r": 4, "lora_alpha": 8},
        "data": {"train": str(rows)},
        "dtype": "fp32",
        "max_steps": 6,
        "batch_size": 4,
        "learning_rate": 5e-3,
        "output_dir": str(run),
    }
    return load_recipe(settings | keys)


def losses(run: Path) -> list[tuple[int, float, float]]:
    """(step, loss, grad_norm) of every training record."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(r["step"], r["loss"], r["grad_norm"]) for r in records if "loss" in r]


def final_bytes(run: Path) -> bytes:
    """The weights of the final adapter or model."""
    (weights,) = (run / "final").glob("*.safetensors")
    return weights.read_bytes()


class Interrupting:
    """A progress that sends SIGTERM after a step."""

    def __init__(self, step: int):
        self.step = step

    def __getattr__(self, name):
        def told(*args):
            if name == "advance" and args[0]["step"] == self.step:
                os.kill(os.getpid(), signal.SIGTERM)

        return told
