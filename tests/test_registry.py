import subprocess
import sys

import pytest

import shikomi
from shikomi import registry
from shikomi.errors import BadInput

COMPONENT = """
from dataclasses import dataclass
from typing import ClassVar

class Helper:
    pass

@dataclass(frozen=True)
class Length:
    name: ClassVar[str] = "{name}"
"""


@pytest.fixture
def rewards(tmp_path, monkeypatch):
    """An empty folder that stands in for shikomi/rewards."""
    folder = tmp_path / "rewards"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    for module in [name for name in sys.modules if name.startswith("shikomi.rewards")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setattr(shikomi, "__path__", [str(tmp_path), *shikomi.__path__])
    yield folder
    for module in [name for name in sys.modules if name.startswith("shikomi.rewards")]:
        del sys.modules[module]


def test_a_component_is_a_file_that_names_itself(rewards):
    (rewards / "length.py").write_text(COMPONENT.format(name="length"))
    (rewards / "_hidden.py").write_text(COMPONENT.format(name="_hidden"))
    (rewards / "tables.py").write_text("name = 'tables'\n")  # a module without a component
    (rewards / "other.py").write_text(COMPONENT.format(name="another"))
    assert registry.names("rewards") == ["length"]
    assert registry.find("rewards", "length").__name__ == "Length"


def test_listing_runs_no_component(rewards):
    (rewards / "length.py").write_text("raise RuntimeError('imported')\n" + COMPONENT.format(name="length"))
    assert registry.names("rewards") == ["length"]


def test_an_unknown_name_gets_the_nearest_and_the_list(rewards):
    (rewards / "length.py").write_text(COMPONENT.format(name="length"))
    with pytest.raises(BadInput, match=r"unknown reward `lenght`: allowed: length; fix: did you mean `length`\?"):
        registry.find("rewards", "lenght")


def test_a_name_cannot_leave_the_folder():
    with pytest.raises(BadInput):
        registry.find("adapters", "../errors")
    with pytest.raises(ValueError, match="unknown kind"):
        registry.names("recipe")


def test_a_kind_without_a_folder_has_no_names(monkeypatch):
    monkeypatch.setattr(registry, "KINDS", ("nothing",))
    assert registry.names("nothing") == []


def test_the_components_of_the_package_are_found():
    assert {"full", "lora"} <= set(registry.names("adapters"))
    assert not [name for kind in registry.KINDS for name in registry.names(kind) if name.startswith("_")]
    assert vars(registry.find("metrics", "accuracy"))["name"] == "accuracy"


def test_listing_all_components_and_reading_a_recipe_import_no_torch():
    script = (
        "import sys; from shikomi import registry, recipe\n"
        "[registry.names(kind) for kind in registry.KINDS]\n"
        "recipe.load_recipe({'model': 'm', 'data': 'rows.jsonl'}); recipe.json_schema(); recipe.reference()\n"
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules), 'heavy import'"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
