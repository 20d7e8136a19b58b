"""Which head a run trains, and what a run of a reward model cannot have; told before anything is computed."""

from typing import Any

from transformers import AutoConfig

from shikomi.adapters.full import Full
from shikomi.errors import BadInput, Problem
from shikomi.model.files import ModelFiles
from shikomi.model.heads import classifier_of
from shikomi.model.task import Task, check_policy, check_reward_model, task_of_files
from shikomi.recipe import build
from shikomi.recipe.schema import Recipe, Stage

VALUE = "value"


def gives_values(stage: Stage) -> bool:
    """Whether the stage's objective learns values."""
    return VALUE in build("objectives", stage.objective).needs


def task_of(recipe: Recipe) -> Task:
    """What the run makes: the stages agree on it (see `check_task`)."""
    return "reward" if gives_values(recipe.stages[0]) else "policy"


def check_task(recipe: Recipe, files: ModelFiles, adapter: Any) -> None:
    """Raises BadInput for a base, stages or keys that do not go with what the run makes. `adapter`: what is trained."""
    kinds = {gives_values(stage) for stage in recipe.stages}
    if len(kinds) > 1 or (True in kinds and any(s.previous_adapter != "continue" for s in recipe.stages)):
        what = "objective: reward puts another head on the model: its stages cannot follow or be followed by others"
        names = ", ".join(f"{stage.objective.name} ({stage.previous_adapter})" for stage in recipe.stages)
        allowed = "stages that are all reward, each with previous_adapter: continue"
        fix = "make it a recipe of its own, with `model:` the folder of the run before"
        raise BadInput([Problem(what, found=names, allowed=allowed, fix=fix)])
    if task_of(recipe) == "policy":
        check_policy(files, recipe.model)
        return
    if task_of_files(files) == "reward":
        check_reward_model(files, recipe.model)
    classifier_of(AutoConfig.from_pretrained(str(files.folder), local_files_only=True))
    problems = []
    if recipe.evaluate is not None:
        fix = "take `evaluate` out; `shikomi eval RUN PAIRS` says how often it prefers the chosen answer"
        problems.append(Problem("evaluate compares answers, and a reward model gives none", fix=fix))
    if any(stage.sample_prompts for stage in recipe.stages):
        problems.append(Problem("sample_prompts: a reward model gives no answers", fix="take sample_prompts out"))
    if recipe.new_tokens and not isinstance(adapter, Full):
        fix = "fine-tune with them first, and name the merged model; or use adapter: full"
        problems.append(Problem("new_tokens train the head for tokens, which a reward model has not", fix=fix))
    if problems:
        raise BadInput(problems)
