"""The spine: a recipe becomes a trained, compared and usable model. Read this file first.

1 data   2 model   3 adapter   4 objective and optimizer   5 loop   6 final model   7 comparison   8 report
"""

import copy
import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

from shikomi.checkpoint.fingerprint import compare, fingerprint
from shikomi.checkpoint.lock import RunLock
from shikomi.checkpoint.manifest import Found, checkpoint_folder, newest_valid, read_manifest, read_tensors
from shikomi.checkpoint.rundir import RunDir
from shikomi.errors import BadInput, Problem, Stopped
from shikomi.evaluate.compare import comparison, evaluate_baselines
from shikomi.evaluate.outcomes import write_outcomes
from shikomi.evaluate.report import write_report
from shikomi.evaluate.run_eval import Evaluation, evaluate
from shikomi.model.language_model import LanguageModel
from shikomi.model.load import count_parameters
from shikomi.optim._schedule import warmup
from shikomi.progress import Progress, Silent
from shikomi.recipe import build, dump_recipe, load_recipe, refused_on_resume
from shikomi.recipe.schema import Recipe, Stage
from shikomi.steps.adapters import begin_stage, rebuild
from shikomi.steps.finish import result, save_final, stage_result
from shikomi.steps.hooks import RunHooks, restore_optimizer, restore_trained, restored_state
from shikomi.steps.memory import choose_recompute, is_tight
from shikomi.steps.preferences import failure, held_back_task, references
from shikomi.steps.prepare import Prepared, StageData, build_model, prepare
from shikomi.steps.preview import marked
from shikomi.steps.writers import Writer, open_writers
from shikomi.train.loop import Run, probe
from shikomi.train.loop import train as run_loop
from shikomi.train.state import Settings, State
from shikomi.train.step import plan_step


@dataclass(frozen=True)
class Result:
    """Where a finished run is, and its result.json."""

    output_dir: Path
    values: dict[str, Any]


def train(recipe: Recipe, progress: Progress | None = None) -> Result:
    """Runs a recipe from its beginning, or goes on where an interrupted run of the same recipe stopped.

    Raises BadInput before anything is written, Stopped after a signal (resumable), TryAgain and NonFinite as the loop
    does.
    """
    progress = progress or Silent()
    rundir = RunDir(recipe.output_dir)
    if rundir.is_finished():
        rundir.create(dump_recipe(recipe), recipe.digest())  # refuses, and says how to go on
    prepared = prepare(recipe, progress)
    with RunLock(rundir.path):
        rundir.create(dump_recipe(recipe), recipe.digest())
        rundir.check_data(prepared.fingerprints)
        return _execute(recipe, prepared, rundir, progress)


def resume(run: str | Path, overrides: Sequence[str] = (), progress: Progress | None = None) -> Result:
    """Continues an interrupted run bit for bit, or extends a finished one (`num_train_epochs=3`).

    A finished run without overrides gives its result and changes nothing. Raises BadInput with the difference for an
    override that would make it another run.
    """
    progress = progress or Silent()
    rundir = RunDir(Path(run).absolute()).open()
    before = load_recipe(rundir.recipe_path)
    rundir.check_recipe(dump_recipe(before), before.digest())  # a recipe.yaml that was edited by hand
    recipe = load_recipe(rundir.recipe_path, overrides)
    refused = refused_on_resume(before, recipe)
    if refused:
        raise BadInput(
            [
                Problem(
                    f"{key} cannot change on resume",
                    str(rundir.path),
                    found=f"{old!r} -> {new!r}",
                    fix="train with another output_dir",
                )
                for key, old, new in refused
            ]
        )
    if dump_recipe(before) == dump_recipe(recipe) and rundir.is_finished():
        progress.note(f"{rundir.path} is finished; nothing to do")
        return Result(rundir.path, rundir.result())
    prepared = prepare(recipe, progress)
    with RunLock(rundir.path):
        rundir.check_data(prepared.fingerprints)
        if dump_recipe(before) != dump_recipe(recipe):
            found = newest_valid(rundir.checkpoints)
            rundir.extend(dump_recipe(recipe), recipe.digest(), list(overrides), found.state.get("step", 0))
        return _execute(recipe, prepared, rundir, progress)


def dry_run(recipe: Recipe, progress: Progress | None = None) -> dict[str, Any]:
    """What `train` would do, without loading weights and without writing to the run's folder."""
    progress = progress or Silent()
    prepared = prepare(recipe, progress)
    stages = []
    for stage, data in zip(recipe.stages, prepared.stages, strict=True):
        report = data.store.report
        needs = build("objectives", stage.objective).needs
        how = (stage.micro_batch_tokens, stage.share_prefix, data.kind, needs, recipe.max_length)
        first = plan_step(data.examples(0), *how)
        stages.append(
            {
                "name": stage.name,
                "rows": len(data.store),
                "tokens": report.tokens,
                "trained_tokens": report.trained_tokens,
                "longest": report.longest,
                "truncated": report.truncated,
                "steps": data.total_steps,
                "steps_per_epoch": data.steps_per_epoch,
                "batch_size": stage.batch_size,
                "micro_batches": len(first.micro),
                "micro_batch_tokens": stage.micro_batch_tokens,
                "first_example": marked(data),
            }
        )
    trained, total = count_parameters(str(prepared.files.folder), prepared.adapter, prepared.task)
    return {
        "model": recipe.model,
        "output_dir": str(recipe.output_dir),
        "adapter": recipe.adapter.name,
        "trainable_parameters": trained,
        "total_parameters": total,
        "memory_bound_bytes": prepared.planned.memory_bound,
        "planned": prepared.planned.as_dict(),
        **(stages[0] if len(stages) == 1 else {"stages": stages}),
    }


def _execute(recipe: Recipe, prepared: Prepared, rundir: RunDir, progress: Progress) -> Result:
    started = time.perf_counter()
    lm = build_model(recipe, prepared, progress)
    slow = [f"slow path: {lm.path_reason}"] if lm.path == "separate" else []
    for line in (*prepared.planned.lines(), lm.parameter_line(), *lm.notes, *slow):
        progress.note(line)
        rundir.log(line)
    for stage in takewhile(lambda stage: stage.previous_adapter == "continue", recipe.stages):
        _optimizer(lm, stage, rundir)  # one that cannot train this is refused before anything is computed
    baselines = _baselines(lm, recipe, prepared, progress)
    state, found = _restore(lm, recipe, rundir, prepared, progress)
    restored = state.stage
    writers = open_writers(recipe.report_to, rundir.path, recipe.model_dump(mode="json"))
    try:
        for index, stage in enumerate(recipe.stages):
            if index >= state.stage:
                if index > restored and (told := begin_stage(lm, recipe, index)):
                    progress.note(told)
                    rundir.log(told)
                _stage(lm, recipe, stage, prepared, rundir, state, found, writers, progress)
    except Stopped as stopped:
        again = f"shikomi resume {shlex.quote(str(rundir.path))}"
        raise Stopped(f"{stopped.message}; continue with: {again}", stopped.exit_code) from None
    finally:
        for writer in writers:
            writer.close()
    progress.phase("saving the final model")
    save_final(lm, recipe, prepared.files, rundir.final, f"{recipe.adapter.name}, {state.global_step} steps")
    evaluation = None
    if prepared.test is not None:
        trained = evaluate(lm, prepared.test, None, progress, "trained")
        write_outcomes(rundir.path, prepared.test, trained)
        evaluation = comparison(prepared.test, baselines, trained)
    seconds = time.perf_counter() - started
    planned = prepared.planned.as_dict()
    values = result(lm, recipe, state, seconds, prepared.summary(), planned, evaluation)
    rundir.write_result(values)
    records, _ = rundir.read_metrics()
    write_report(rundir.path, rundir.path.name, values, records, dump_recipe(recipe))
    progress.finish()
    return Result(rundir.path, values)


def _baselines(lm: LanguageModel, recipe: Recipe, prepared: Prepared, progress: Progress) -> dict[str, Evaluation]:
    """The untouched model's scores, before the first step."""
    if prepared.test is None or recipe.evaluate is None:
        return {}
    with lm.adapter_off():
        found = evaluate_baselines(
            lm, prepared.test, prepared.train_rows(), recipe.evaluate.baselines, recipe.evaluate.shots, progress
        )
    for name, evaluation in found.items():
        scores = ", ".join(f"{metric} {m['value']:.3g}" for metric, m in evaluation.measurements.items())
        progress.note(f"{name}: {scores}")
    return found


def _restore(
    lm: LanguageModel, recipe: Recipe, rundir: RunDir, prepared: Prepared, progress: Progress
) -> tuple[State, Found]:
    """State and parameters of the newest valid checkpoint, or a beginning."""
    found = newest_valid(rundir.checkpoints)
    for note in found.notes:
        progress.note(note)
        rundir.log(note)
    if found.folder is None:
        rundir.truncate_metrics(0)
        return State(), found
    for line in compare(read_manifest(found.folder)["fingerprint"], fingerprint(lm.device)):
        progress.note(f"this machine differs from the one that saved: {line}; bits may differ")
    rundir.truncate_metrics(found.state["step"])
    state, saved = restored_state(found.state), read_tensors(found.folder, "adapter")
    rebuild(lm, recipe, state.stage, saved)
    restore_trained(lm, saved, found.folder)
    progress.note(f"resuming after step {state.global_step}")
    return state, found


def _stage(
    lm: LanguageModel,
    recipe: Recipe,
    stage: Stage,
    prepared: Prepared,
    rundir: RunDir,
    state: State,
    found: Found,
    writers: list[Writer],
    progress: Progress,
) -> None:
    """Trains one stage to its end and leaves its result in stages/NN-name/."""
    data = prepared.stages[state.stage]
    settings = stage_settings(stage, data, recipe.seed, recipe.max_length)
    before = copy.deepcopy(state)
    objective: Any = build("objectives", stage.objective)
    optimizer = _optimizer(lm, stage, rundir)
    if found.folder is not None and state.step:
        restore_optimizer(lm, optimizer, read_tensors(found.folder, "optimizer"))
    choose_recompute(lm, stage, state.micro_batch_tokens or settings.micro_batch_tokens)
    of_rows, of_held_back = references(lm, recipe, objective, prepared, rundir, state, progress)
    validation = held_back_task(stage, data, objective, of_held_back, recipe.max_length) or data.validation
    hooks = RunHooks(lm, optimizer, rundir, stage, settings, state, data.encoder, validation, progress, writers)
    run = Run(lm, objective, data.examples, optimizer, settings, state, hooks, of_rows)
    if state.step < settings.total_steps:
        progress.start(settings.total_steps, stage.name)
        if state.step == 0:
            if is_tight(lm, settings.micro_batch_tokens):
                progress.phase("probing memory with the longest micro-batch")
                probe(run, data.largest(settings.micro_batch_tokens, settings.share_prefix))
        run_loop(run)
        if told := failure([r for r in rundir.read_metrics()[0] if r.get("stage") == stage.name]):
            hooks.note(told)
    if settings.keep_best and state.best_step is not None and state.best_step != state.global_step:
        best = checkpoint_folder(rundir.checkpoints, state.best_step)
        restore_trained(lm, read_tensors(best, "adapter"), best)
        hooks.note(f"the best checkpoint is of step {state.best_step}: {settings.metric} {state.best:.4g}")
    if len(recipe.stages) > 1 and not lm.rebased:
        save_final(lm, recipe, prepared.files, rundir.stage(state.stage + 1, stage.name), stage.objective.name)
    used = {} if of_rows is None else {"reference": stage.reference}
    state.finished_stages.append(stage_result(stage.name, state, before) | used)
    lm.fixed = None
    state.stage += 1
    state.step, state.best, state.best_step = 0, None, None
    state.worse_evaluations, state.stopped_early, state.micro_batch_tokens = 0, False, 0
    state.loss_scale = {}


def _optimizer(lm: LanguageModel, stage: Stage, rundir: RunDir) -> Any:
    """The stage's optimizer over what is trained; raises BadInput where they do not go together."""
    optim: Any = build("optim", stage.optim)
    return optim.build(lm.trainable(), stage.learning_rate, stage.weight_decay, rundir.path)


def stage_settings(stage: Stage, data: StageData, seed: int, max_length: int) -> Settings:
    """What the loop reads of a stage; a missing eval_steps means once an epoch."""
    total = data.total_steps
    evaluates = data.validation is not None or data.held_back is not None or bool(stage.sample_prompts)
    return Settings(
        total_steps=total,
        learning_rate=stage.learning_rate,
        schedule=stage.lr_scheduler_type,
        warmup_steps=warmup(stage.warmup_steps, total),
        max_grad_norm=stage.max_grad_norm,
        micro_batch_tokens=stage.micro_batch_tokens,
        share_prefix=stage.share_prefix,
        max_length=max_length,
        seed=seed,
        eval_steps=(stage.eval_steps or data.steps_per_epoch) if evaluates else 0,
        save_steps=stage.save_steps,
        early_stopping_patience=stage.early_stopping_patience,
        metric=stage.metric_for_best_model,
        keep_best=stage.load_best_model_at_end,
    )
