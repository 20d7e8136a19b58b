"""A resolved recipe as YAML, and what differs between two."""

from __future__ import annotations

import json
from typing import Any

import yaml

from shikomi.recipe.edit import DEFAULT_NAMES
from shikomi.recipe.schema import Recipe
from shikomi.recipe.yaml12 import Loader12

RESUMABLE = frozenset(
    ("num_train_epochs", "max_steps", "save_steps", "save_total_limit", "save_dtype")
    + ("eval_steps", "logging_steps", "report_to")
)
"""Keys, of the recipe or of a stage, that may change when a run is resumed or extended."""


class Dumper12(yaml.SafeDumper):
    """Writes text in quotes where YAML 1.1 or 1.2 would read something else without them."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


Dumper12.yaml_implicit_resolvers = {key: list(value) for key, value in yaml.SafeDumper.yaml_implicit_resolvers.items()}
for _first, _resolvers in Loader12.yaml_implicit_resolvers.items():
    Dumper12.yaml_implicit_resolvers.setdefault(_first, []).extend(_resolvers)


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    breaks = set("\n\r\x85\u2028\u2029").intersection(value)  # folded, and so changed, without double quotes
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style='"' if breaks else None)


Dumper12.add_representer(str, _text)


def to_yaml(value: Any) -> str:
    """Plain values as YAML that reads back unchanged."""
    return yaml.dump(value, Dumper=Dumper12, sort_keys=False, allow_unicode=True, width=110)


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML; loading it gives the same recipe, from any working directory."""
    return to_yaml(recipe.model_dump(mode="json"))


def differences(old: Recipe, new: Recipe) -> list[tuple[str, Any, Any]]:
    """(dotted key, old value, new value) of every key that differs; a key that is absent is None."""
    before, after = _flat(old.model_dump(mode="json")), _flat(new.model_dump(mode="json"))
    keys = dict.fromkeys([*before, *after])
    return [(key, before.get(key), after.get(key)) for key in keys if before.get(key) != after.get(key)]


def refused_on_resume(old: Recipe, new: Recipe) -> list[tuple[str, Any, Any]]:
    """The differences that a resumed run may not have: all but those of RESUMABLE keys."""
    return [difference for difference in differences(old, new) if not RESUMABLE.intersection(difference[0].split("."))]


def _flat(value: Any, above: str = "") -> dict[str, Any]:
    if isinstance(value, str) and above.rpartition(".")[2] in DEFAULT_NAMES:
        value = {"name": value}
    if isinstance(value, dict) and value:
        items = value.items()
    elif isinstance(value, list) and value:
        items = [(str(i), item) for i, item in enumerate(value)]  # type: ignore[assignment]
    else:
        return {above: value}
    flat: dict[str, Any] = {}
    for key, child in items:
        flat.update(_flat(child, f"{above}.{key}" if above else str(key)))
    return flat


def as_json(recipe: Recipe) -> str:
    """The resolved recipe as JSON, which is a recipe too."""
    return json.dumps(recipe.model_dump(mode="json"), ensure_ascii=False, indent=2)
