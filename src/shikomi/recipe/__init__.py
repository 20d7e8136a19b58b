"""Recipes: one file that says what to train. Reading one imports torch only where it names a component's options."""

from shikomi.recipe.components import build
from shikomi.recipe.describe import component_reference, json_schema, reference
from shikomi.recipe.dump import RESUMABLE, as_json, differences, dump_recipe, refused_on_resume
from shikomi.recipe.foreign import translations
from shikomi.recipe.load import load_recipe, parse_recipe
from shikomi.recipe.schema import ComponentSpec, DataSpec, EvaluateSpec, Recipe, Source, Stage
from shikomi.recipe.template import starter_recipe

__all__ = [
    "RESUMABLE",
    "ComponentSpec",
    "DataSpec",
    "EvaluateSpec",
    "Recipe",
    "Source",
    "Stage",
    "as_json",
    "build",
    "component_reference",
    "differences",
    "dump_recipe",
    "json_schema",
    "load_recipe",
    "parse_recipe",
    "reference",
    "refused_on_resume",
    "starter_recipe",
    "translations",
]
