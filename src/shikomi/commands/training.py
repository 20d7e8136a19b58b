"""demo, train and resume."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shikomi.commands.output import EXIT_CODES, Json, command_line, emit, short_path, show, showing
from shikomi.errors import EXIT_INTERRUPTED, BadInput, NonFinite, Problem, Stopped, TryAgain
from shikomi.progress import Progress, duration, size

if TYPE_CHECKING:
    from shikomi.recipe import Recipe

TRAIN = f"""Train what a recipe says, and compare the result with the untouched model.

Any key of the recipe can be changed on the command line: key=value, dotted for inner keys. With --model and
--data instead of a recipe, one is made as `shikomi init` would make it; the run directory holds the recipe used.

\b
Examples:
  shikomi train recipes/sections-lora.yaml
  shikomi train my.yaml learning_rate=1e-4 adapter.r=32 output_dir=runs/my-r32
  shikomi train my.yaml --dry-run
  shikomi train --model smollm2 --data my.jsonl max_steps=100

{EXIT_CODES}"""

RESUME = f"""Go on with a run that was stopped, bit for bit as if it had not been; or train a finished one further.

Only keys that extend a run can be changed: num_train_epochs, max_steps, save_*, eval_*, logging_*, report_to.

\b
Examples:
  shikomi resume runs/my
  shikomi resume runs/my num_train_epochs=3

{EXIT_CODES}"""

DEMO = """A real run from beginning to end: a small model learns to sort package descriptions into 17 sections.

Shows the untouched model's accuracy (most frequent answer, zero-shot, few-shot), trains LoRA, shows the same for the
trained model on the same held-back rows, and uses it on a text of yours. A few minutes on two cores.

\b
Examples:
  shikomi demo
  shikomi demo --text "A chess program that can be played over the network"
  shikomi demo -o runs/longer num_train_epochs=2
"""


def demo(
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Keys of its recipe to change.")
    ] = None,
    text: Annotated[str | None, typer.Option(help="A text of your own to classify at the end.")] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the run.")] = Path("runs/demo"),
    force: Annotated[bool, typer.Option(help="Train anew where this demo is already finished.")] = False,
) -> None:
    """The work is in commands/demo.py."""
    from shikomi.commands.demo import run_demo

    with showing() as progress:
        run_demo(output, overrides or (), text, force, progress)


def train(
    words: Annotated[
        list[str] | None, typer.Argument(metavar="RECIPE|KEY=VALUE", help="A recipe, and keys to change in it.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Without a recipe: alias, folder, hub id or .gguf file.")] = None,
    data: Annotated[Path | None, typer.Option(help="Without a recipe: the file of training rows.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be trained and what it needs; write nothing.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Reads the recipe before importing torch, so that a wrong one is told at once."""
    with showing(as_json) as progress:
        path, overrides = _recipe_and_overrides(words or [], model, data)
        if path is not None:
            progress.phase(f"reading {short_path(Path(path))}")
            from shikomi.recipe import load_recipe

            recipe = load_recipe(path, overrides)
        else:
            assert data is not None
            recipe = _recipe_for(data, model or "smollm2", overrides, progress)
        for note in recipe.notes:
            progress.note(note)
        progress.phase("importing torch")
        from shikomi import run

        if dry_run:
            found = run.dry_run(recipe, progress)
            progress.finish()
            emit(found) if as_json else _show_dry_run(found)
            return
        again = command_line("train", *(words or []))
        with resumable(recipe.output_dir, again):
            result = run.train(recipe, progress)
    emit(result.values) if as_json else show_result(result.output_dir, result.values)


def resume(
    run_folder: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Keys to extend it.")] = None,
    as_json: Json = False,
) -> None:
    """A finished run that is not extended gives its result again."""
    with showing(as_json) as progress:
        progress.phase("importing torch")
        from shikomi import run

        with resumable(run_folder, command_line("resume", run_folder)):
            result = run.resume(run_folder, overrides or (), progress)
    emit(result.values) if as_json else show_result(result.output_dir, result.values)


@contextmanager
def resumable(folder: Path | None, again: str) -> Iterator[None]:
    """Adds the exact command that goes on to what stopped a run; an interrupt becomes Stopped.

    That is `shikomi resume` where a run was started in `folder`, else `again`.
    """

    def go_on() -> str:
        if folder is not None and (folder / "run.json").is_file():
            return command_line("resume", folder)
        return again

    try:
        yield
    except (Stopped, NonFinite, TryAgain) as error:
        error.message += f"\n  go on:   {go_on()}"
        raise
    except KeyboardInterrupt as error:
        raise Stopped(f"interrupted\n  go on:   {go_on()}", EXIT_INTERRUPTED) from error


def _recipe_and_overrides(words: list[str], model: str | None, data: Path | None) -> tuple[str | None, list[str]]:
    """The recipe's path (None with --data) and the overrides. Raises BadInput for neither or both."""
    path = words[0] if words and ("=" not in words[0] or Path(words[0]).exists()) else None
    overrides = words[1:] if path is not None else words
    if path is not None and (data is not None or model is not None):
        fix = f"shikomi train {path} model=... data.train=..."
        raise BadInput([Problem("a recipe, and --model or --data beside it", found=path, fix=fix)])
    if path is None and data is None:
        fix = "shikomi train RECIPE, or shikomi train --model smollm2 --data FILE; `shikomi init FILE` writes a recipe"
        raise BadInput([Problem("no recipe and no --data", fix=fix)])
    wrong = [word for word in overrides if "=" not in word]
    if wrong:
        raise BadInput([Problem("not a key=value", found=word, allowed="key=value") for word in wrong])
    return path, overrides


def _recipe_for(data: Path, model: str, overrides: list[str], progress: Progress) -> Recipe:
    """The recipe that `init` would write, with its prompt said aloud: it is a guess."""
    from shikomi.commands.recipes import make_starter
    from shikomi.recipe import parse_recipe

    made = make_starter(data, model, progress)
    for reason in made.detected.reasons:
        progress.note(reason)
    if made.detected.prompt is not None:
        progress.note(f"prompt: {made.detected.prompt!r}; `shikomi init {data}` writes a recipe to change it in")
    progress.note(made.estimate)
    return parse_recipe(made.text, data.name.partition(".")[0], overrides)


def _show_dry_run(found: Mapping[str, Any]) -> None:
    trained, total = found["trainable_parameters"], found["total_parameters"]
    print(f"model      {found['model']}, {total:,} parameters")
    print(f"adapter    {found['adapter']}: {trained:,} parameters are trained")
    if found["planned"]:
        print(f"memory     {_planned(found['planned'])}")
    for stage in found.get("stages", [found]):  # a run of one stage is not nested
        share = 100 * stage["trained_tokens"] / max(1, stage["tokens"])
        cut = f", {stage['truncated']:,} of them cut" if stage["truncated"] else ""
        print(f"\nstage {stage['name']}")
        print(f"  rows     {stage['rows']:,}{cut}; the longest has {stage['longest']:,} tokens")
        print(f"  tokens   {stage['tokens']:,} a pass, {stage['trained_tokens']:,} of them trained ({share:.1f}%)")
        print(f"  steps    {stage['steps']:,}, {stage['steps_per_epoch']:,} a pass")
        micro = f"{stage['micro_batches']} micro-batches of at most {stage['micro_batch_tokens']:,} tokens"
        print(f"  batch    {stage['batch_size']} rows a step, the first in {micro}")
        print("  the first row, with what is trained in double brackets:")
        print(textwrap.indent(stage["first_example"], "    | ", lambda line: True))
    print(f"\nnothing was written; to train into {short_path(Path(found['output_dir']))}, leave --dry-run out")


def _planned(planned: Mapping[str, Any]) -> str:
    """A planned peak with its range and its largest parts."""
    peak = planned["peak_memory_bytes"]
    parts = sorted(planned["components"].items(), key=lambda part: -part[1]["likely"])[:4]
    told = ", ".join(f"{name} {size(part['likely'])}" for name, part in parts)
    return f"about {size(peak['likely'])} ({size(peak['low'])} to {size(peak['high'])}): {told}"


def show_result(folder: Path, values: Mapping[str, Any]) -> None:
    """What a finished run is worth, and the commands that come next."""
    if values.get("evaluation"):
        from shikomi.evaluate.tables import comparison

        show(comparison(values["evaluation"]))
    speed = values["tokens_per_second"]
    peak = values["planned"].get("peak_memory_bytes") if values.get("planned") else None
    planned = f" (planned {size(peak['likely'])})" if peak else ""
    print(
        f"{short_path(folder)}: {values['total_tokens']:,} tokens in {duration(values['training_seconds'])} "
        f"({speed:,.0f} tokens/s), peak memory {size(values['peak_memory_bytes'])}{planned}, "
        f"final loss {values['final_loss']:.4f}"
    )
    report = folder / "report.html"
    if report.exists():
        print(f"report:   {short_path(report)}")
    use = ("eval", folder, "pairs.jsonl") if values.get("task") == "reward" else ("generate", folder, "Some text")
    print(f"use it:   {command_line(*use)}")
    print(f"further:  {command_line('resume', folder)} num_train_epochs=...")
