"""Recipes: one file that says what to train. Reading one never imports torch."""

from shikomi.recipe.schema import ComponentSpec, DataSpec, EvaluateSpec, Recipe, Source, Stage

__all__ = ["ComponentSpec", "DataSpec", "EvaluateSpec", "Recipe", "Source", "Stage"]
