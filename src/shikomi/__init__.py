"""Shikomi: fine-tune a language model on your own data, on the machine you have, and see whether it was worth it.

import shikomi

recipe = shikomi.load_recipe({"model": "smollm2", "data": "my.jsonl", "output_dir": "runs/my"})
run = shikomi.train(recipe)
print(run.values["final_loss"])
model = shikomi.open_model(run.output_dir)
print(model.generate("Hello"))
"""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Before torch starts its threads: OMP_DYNAMIC has given NaN, and busy-waiting threads make two processes on the same
# cores many times slower than one.
os.environ["OMP_DYNAMIC"] = "FALSE"
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

if TYPE_CHECKING:
    from shikomi.checkpoint.combine import combine_adapters as combine_adapters
    from shikomi.errors import BadInput as BadInput
    from shikomi.errors import ShikomiError as ShikomiError
    from shikomi.inference import Ready as Ready
    from shikomi.inference import merge as merge
    from shikomi.inference import open_model as open_model
    from shikomi.inference import open_reward_model as open_reward_model
    from shikomi.plan.whole import estimate as estimate
    from shikomi.progress import Progress as Progress
    from shikomi.recipe import DataSpec as DataSpec
    from shikomi.recipe import Recipe as Recipe
    from shikomi.recipe import load_recipe as load_recipe
    from shikomi.run import Result as Result
    from shikomi.run import resume as resume
    from shikomi.run import train as train

_HOMES = {
    "BadInput": "errors",
    "ShikomiError": "errors",
    "Progress": "progress",
    "DataSpec": "recipe",
    "Recipe": "recipe",
    "load_recipe": "recipe",
    "Result": "run",
    "resume": "run",
    "train": "run",
    "Ready": "inference",
    "combine_adapters": "checkpoint.combine",
    "estimate": "plan.whole",
    "merge": "inference",
    "open_model": "inference",
    "open_reward_model": "inference",
}

__all__ = [*_HOMES, "__version__"]


def __getattr__(name: str) -> Any:
    """Public names are imported when they are first asked for, so that `import shikomi` costs nothing."""
    if name not in _HOMES:
        raise AttributeError(f"module 'shikomi' has no attribute {name!r}")
    return getattr(import_module(f"shikomi.{_HOMES[name]}"), name)
