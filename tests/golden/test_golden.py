"""Loss and gradient norm of 20 steps of each stage of every recipe on a tiny model: a change of arithmetic shows here.

python tests/golden/test_golden.py records them anew; look at the difference before committing it.
"""

import json
import sys
import tempfile
from pathlib import Path

import pytest

from shikomi.recipe import load_recipe

ROOT = Path(__file__).resolve().parents[2]
RECORDED = Path(__file__).with_name("recorded.json")
RECIPES = sorted(path.stem for path in (ROOT / "recipes").glob("*.yaml"))


def curve(recipe: str, model: Path, folder: Path) -> list[list[float]]:
    """[loss, grad_norm] of each step."""
    from running import losses

    from shikomi.run import train

    keys = [f"model={model}", f"output_dir={folder / recipe}", "dtype=fp32", "max_steps=20", "batch_size=4"]
    keys += ["learning_rate=1e-2", "evaluate=null", "data.test=null"]
    train(load_recipe(ROOT / "recipes" / f"{recipe}.yaml", keys))
    return [[loss, norm] for _, loss, norm in losses(folder / recipe)]


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_recipe_runs_as_recorded(recipe, tiny_llama, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("SHIKOMI_CACHE", str(tmp_path / "cache"))
    found = curve(recipe, tiny_llama, tmp_path)
    wanted = json.loads(RECORDED.read_text())[recipe]
    stages = load_recipe(ROOT / "recipes" / f"{recipe}.yaml").stages
    assert len(found) == len(wanted) == 20 * len(stages)
    for step, (got, want) in enumerate(zip(found, wanted, strict=True)):
        assert got == pytest.approx(want, rel=5e-3), f"step {step + 1}"


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT / "tests" / "support"))
    from tiny_models import save_tiny

    with tempfile.TemporaryDirectory() as scratch:
        model = save_tiny(Path(scratch) / "model", "llama", 0)
        curves = {name: curve(name, model, Path(scratch)) for name in RECIPES}
    RECORDED.write_text(json.dumps(curves, indent=1) + "\n")
