"""Every recipe under recipes/ runs from beginning to end, on a tiny model and a few of its rows."""

import json
import math
from pathlib import Path

import pytest
import yaml

from shikomi.cli import main

ROOT = Path(__file__).resolve().parent.parent
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_recipe_trains(path, tiny_llama, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("SHIKOMI_CACHE", str(tmp_path / "cache"))
    run = tmp_path / "run"
    words = [f"model={tiny_llama}", f"output_dir={run}", "max_steps=3", "batch_size=4", "learning_rate=1e-2"]
    if "evaluate:" in path.read_text():
        words += ["evaluate.limit=6", "evaluate.max_new_tokens=4"]
    assert main(["train", str(path), *words, "--json"]) == 0
    result = json.loads(capsys.readouterr().out.strip().splitlines()[-1])

    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [record for record in records if "loss" in record]
    stages = len(yaml.safe_load(path.read_text()).get("stages", [{}]))
    assert [record["step"] for record in steps] == list(range(1, 3 * stages + 1))
    assert all(math.isfinite(record["loss"]) and record["grad_norm"] > 0 for record in steps)
    assert result["trained_tokens"] > 0
    assert (run / "report.html").exists() and (run / "recipe.yaml").exists()
    assert list((run / "final").glob("*.safetensors"))
    if "evaluate:" in path.read_text():
        assert result["evaluation"]["trained"] and result["evaluation"]["baseline"]
