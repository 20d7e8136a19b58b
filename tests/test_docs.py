"""Recipes and documents say what is so: recipes load, generated pages are current, commands exist."""

import re
import runpy
from pathlib import Path

import pytest
import yaml

from shikomi.recipe import Recipe, dump_recipe, load_recipe, reference
from shikomi.recipe.schema import OWN_KEYS, Stage

ROOT = Path(__file__).resolve().parent.parent
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
# The order in which data flows: what is trained, on what, how, how it is judged, where it goes.
LAST = ["stages", "evaluate", "save_dtype", "report_to", "output_dir"]
FLOW = [key for key in Recipe.model_fields if key not in LAST]
FLOW += [*(key for key in Stage.model_fields if key not in (*OWN_KEYS, "data")), *LAST]


@pytest.fixture(autouse=True)
def _at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def test_there_are_recipes():
    assert len(RECIPES) >= 6


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_loads_and_reloads_unchanged(path, tmp_path):
    recipe = load_recipe(path)
    assert recipe.output_dir == ROOT / "runs" / path.stem
    for source in (*recipe.data.train, *(recipe.data.test or ())):
        assert Path(source.path).exists(), source
    again = tmp_path / path.name
    again.write_text(dump_recipe(recipe))
    assert load_recipe(again) == recipe


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_explains_itself_in_the_order_of_the_data_flow(path):
    text = path.read_text()
    assert text.startswith("# "), "the first line says what the recipe is for"
    keys = list(yaml.safe_load(text))
    stage_order = [key for key in keys if key in Stage.model_fields and key not in (*OWN_KEYS, "data")]
    outer = [key for key in keys if key not in stage_order]
    assert outer == sorted(outer, key=FLOW.index)
    first, last = keys.index(stage_order[0]), keys.index(stage_order[-1])
    assert keys[first : last + 1] == stage_order, "keys of the stage stand together"


@pytest.mark.parametrize("name", ["recipe.md", "other-tools.md"])
def test_generated_pages_are_current(name):
    pages = runpy.run_path(str(ROOT / "docs" / "generate.py"))["PAGES"]
    assert (ROOT / "docs" / "guide" / name).read_text() == pages[name](), "run: python docs/generate.py"


def test_the_reference_has_every_key():
    keys = {row[0] for row in reference()}
    assert set(Recipe.model_fields) <= keys
    assert set(Stage.model_fields) - {*OWN_KEYS, "data"} <= keys
    assert {f"stages.N.{key}" for key in OWN_KEYS} <= keys


def documented_commands() -> set[str]:
    text = "\n".join(page.read_text() for page in PAGES)
    return {m.group(1) for m in re.finditer(r"(?:^\s*|[`(])shikomi ([a-z]+)", text, re.M)}


def test_commands_in_the_documents_exist():
    import typer.main

    from shikomi.cli import app

    known = set(typer.main.get_command(app).commands)  # type: ignore[attr-defined]
    assert documented_commands() >= {"train", "resume", "demo", "init"}
    assert documented_commands() <= known
    assert known <= documented_commands(), "a command that no document names"


def recipe_keys_of(text: str) -> set[str]:
    return {m.group(1) for m in re.finditer(r"`((?:data|evaluate|adapter)\.[a-z_]+)", text)}


def test_recipe_keys_in_the_guide_exist():
    known = {row[0] for row in reference()}
    for page in PAGES:
        if page.name != "other-tools.md":
            unknown = {k for k in recipe_keys_of(page.read_text()) if not k.startswith("adapter.")} - known
            assert not unknown, (page.name, unknown)
