"""A sweep without training: a recipe of the sections task, and a runner that leaves the files of a finished run."""

import json
from pathlib import Path
from typing import Any

import pytest

from shikomi.checkpoint.rundir import RunDir
from shikomi.evaluate.outcomes import OUTCOMES
from shikomi.metrics import measure
from shikomi.metrics.accuracy import Accuracy
from shikomi.progress import Progress
from shikomi.recipe import Recipe, dump_recipe
from shikomi.sweep.check import Checked
from shikomi.sweep.runner import CellFailed

LABELS = ("a", "b")
ROWS = 40


class FakeRunner:
    """Answers row i right where i is not a multiple of (seed + the number of letters of what is trained)."""

    def __init__(self) -> None:
        self.ran: list[str] = []
        self.recipes: list[Recipe] = []
        self.fails: dict[str, Exception] = {}

    def __call__(self, recipe: Recipe, progress: Progress) -> None:
        name = recipe.output_dir.name
        self.ran.append(name)
        self.recipes.append(recipe)
        run = RunDir(recipe.output_dir)
        run.create(dump_recipe(recipe), recipe.digest())
        if name in self.fails:
            raise self.fails[name]
        every = 2 + recipe.seed + len(recipe.adapter.name)
        references = [LABELS[i % 2] for i in range(ROWS)]
        predictions = [r if i % every else LABELS[1 - i % 2] for i, r in enumerate(references)]
        measured = {"accuracy": measure(Accuracy(), predictions, references)}
        assert recipe.evaluate is not None
        baseline = {b: {"n": ROWS, "seconds": 1.0, "metrics": measured} for b in recipe.evaluate.baselines}
        (run.final).mkdir(exist_ok=True)
        (run.final / "adapter_model.safetensors").write_bytes(b"x" * 100 * every)
        outcome = {
            **{"format": 1, "metrics": ["accuracy"], "ids": [f"r{i}" for i in range(ROWS)], "references": references},
            **{"predictions": predictions, "logp": [], "tokens": []},
            "label_nll": [0.1 if p == r else 2.0 for p, r in zip(predictions, references, strict=True)],
        }
        (run.path / OUTCOMES).write_text(json.dumps(outcome))
        run.write_result(
            {
                **{"finished": True, "adapter": recipe.adapter.name, "trainable_parameters": 1000 * every},
                **{"total_parameters": 1_000_000, "peak_memory_bytes": 1_000_000_000 + 1000 * every},
                **{"tokens_per_second": 100.0 * every, "training_seconds": 10.0 + every, "wall_seconds": 20.0 + every},
                **{"total_tokens": 5000, "final_loss": 1 / every, "stages": [{"best": 2 / every}]},
                "evaluation": {
                    **{"n": ROWS, "main_metric": "accuracy", "baseline": baseline},
                    "trained": {"n": ROWS, "seconds": 1.0, "metrics": measured},
                },
            }
        )


@pytest.fixture
def runner() -> FakeRunner:
    return FakeRunner()


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A recipe that loads; nothing of it is read by the fake runner."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "p", "completion": "a"}\n')
    return {
        "model": "smollm2",
        "adapter": {"name": "lora", "r": 4},
        "data": {"train": "rows.jsonl", "test": "rows.jsonl"},
        "evaluate": {"metrics": ["accuracy"], "baselines": ["zero-shot"]},
    }


@pytest.fixture
def checked() -> Checked:
    """What check_sweep would have found."""
    return Checked({}, {"test.rows.jsonl": "digest"})


@pytest.fixture
def failure() -> CellFailed:
    return CellFailed("NonFinite", "the loss is not a finite number at step 3", "last words")
