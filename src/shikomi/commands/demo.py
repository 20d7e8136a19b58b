"""`shikomi demo`: one real run shown from beginning to end. It only prints; the run is that of examples/demo.yaml."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shikomi.commands.output import command_line, short_path, show
from shikomi.errors import BadInput, Problem
from shikomi.progress import Progress, duration, size

if TYPE_CHECKING:
    from shikomi.recipe import Recipe

TEXT = "Command line program that converts songs between FLAC, Ogg Vorbis and MP3 and keeps their tags."

WELCOME = """\
A small language model (SmolLM2, 135 million parameters) learns to sort package descriptions into 17 sections of a
software archive, from {rows} examples. Then it is compared with the untouched model on {test} descriptions that it has
not seen. It all runs on this machine; the first time, the model is fetched and converted.
"""


def demo_recipe(output: Path, overrides: Sequence[str] = ()) -> Recipe:
    """The demo's recipe, reading the rows that come with the package."""
    from shikomi.recipe import parse_recipe

    folder = Path(str(files("shikomi") / "examples"))
    text = (folder / "demo.yaml").read_text(encoding="utf-8")
    quoted = str(folder).replace("'", "''")  # inside YAML's single quotes
    text = text.replace("'examples/", f"'{quoted}/")
    return parse_recipe(text, "demo", [f"output_dir={_yaml_text(output)}", *overrides])


def _yaml_text(path: Path) -> str:
    return "'" + str(path.absolute()).replace("'", "''") + "'"


def run_demo(output: Path, overrides: Sequence[str], text: str | None, force: bool, progress: Progress) -> None:
    """Train (or show again what is there), compare, and use it on a text."""
    recipe = demo_recipe(output, overrides)
    if force:
        _clear(recipe.output_dir)
    assert recipe.evaluate is not None
    progress.note(WELCOME.format(rows=recipe.data.train[0].limit, test=recipe.evaluate.limit))
    progress.phase("importing torch")
    from shikomi import run
    from shikomi.checkpoint.rundir import RunDir
    from shikomi.commands.training import resumable

    with resumable(None, command_line("demo", "--output", recipe.output_dir)):  # it goes on, and shows the rest
        if RunDir(recipe.output_dir).is_finished():
            progress.note(f"{short_path(recipe.output_dir)} is finished already; --force trains it anew\n")
            result = run.resume(recipe.output_dir, (), progress)
        else:
            result = run.train(recipe, progress)
    progress.finish()
    print_comparison(result.values)
    _use_it(recipe.output_dir, text or TEXT, progress)
    print_ending(recipe.output_dir, result.values)


def _clear(folder: Path) -> None:
    """Removes an earlier demo. Raises BadInput for a folder that is not the demo's."""
    if not folder.exists():
        return
    recipe = folder / "recipe.yaml"
    if not recipe.is_file() or "examples/sections/train.jsonl" not in recipe.read_text(encoding="utf-8"):
        fix = "choose another --output, or remove it yourself"
        raise BadInput([Problem("is not a run of the demo; --force does not remove it", str(folder), fix=fix)])
    from shikomi.checkpoint.lock import RunLock

    with RunLock(folder):
        shutil.rmtree(folder)


def print_comparison(values: Mapping[str, Any]) -> None:
    """Before and after on the same rows, and five rows with both answers."""
    from shikomi.evaluate.tables import comparison, examples

    show(comparison(values["evaluation"]))
    print("\nFive of these rows, drawn at random:")
    show(examples(values["evaluation"]))


def _use_it(folder: Path, text: str, progress: Progress) -> None:
    from shikomi.inference import open_model

    print(f"$ {command_line('generate', folder, text)}")
    progress.phase("loading the trained model")
    ready = open_model(str(folder), progress=progress)
    answer = ready.generate(text, max_new_tokens=16)
    progress.finish()
    print(answer, end="\n\n")


def print_ending(folder: Path, values: Mapping[str, Any]) -> None:
    """What it took, where it is, and what to do next."""
    print(
        f"took      {duration(values['wall_seconds'])}, {duration(values['training_seconds'])} of it training "
        f"({values['tokens_per_second']:,.0f} tokens/s), peak memory {size(values['peak_memory_bytes'])}"
    )
    print(f"report    {short_path(folder / 'report.html')}")
    print(f"adapter   {short_path(folder / 'final')}")
    print("your own  shikomi init my.csv -o my.yaml && shikomi train my.yaml")
