"""data preview, convert and split: looking at rows as they are trained, and writing them otherwise."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from shikomi.commands.output import Json, emit, one_of, short_path, show, showing, split_list
from shikomi.errors import BadInput, Problem
from shikomi.progress import Progress

if TYPE_CHECKING:
    from shikomi.recipe import DataSpec, Recipe, Source

LARGEST_RECIPE = 1 << 20  # bytes
FORMATS = (
    *("messages", "prompt_completion", "sharegpt", "alpaca", "text"),
    *("preference", "unpaired_preference"),
)

PREVIEW = """Rows as the trainer sees them: which tokens are trained, where rows are cut, which are packed together.

Shown is the first optimizer step, or the first that holds --row. The tokens come from the run's own cache, the packing
from its own code. Give a recipe, or a file of rows: then it is the recipe that `shikomi init` would write.

\b
Examples:
  shikomi data preview my.yaml
  shikomi data preview my.yaml max_length=512 --row 17
  shikomi data preview pairs.jsonl --model smollm2 --rows 1 --html preview.html
"""

CONVERT = """Rows of one format as rows of another, and files of one kind as files of another.

IN is a file, a folder or a hub data set, in any format that trains; OUT is .jsonl, .json, .csv, .tsv or .parquet. Other
columns are taken along. What the new format cannot hold is an error that says so, or with --allow-loss left out and
counted. The file is read back and compared before it gets its name.

\b
Examples:
  shikomi data convert chats.json chats.jsonl --to messages
  shikomi data convert my.csv my.jsonl --to prompt_completion --prompt "Classify: {text}" --completion "{label}"
  shikomi data convert pairs.jsonl good.jsonl --to messages --allow-loss
"""
SPLIT = """Rows shared out to train, validation and test files, so that no side knows anything of another.

Rows of one group, with the same prompt, and copies or near copies stay together. The rows are written as they are.

\b
Examples:
  shikomi data split my.jsonl --validation 0.1 -o data/my
  shikomi data split my.csv --validation 0.1 --test 0.1 --group customer --stratify label -o data/my
"""

Template = Annotated[str | None, typer.Option(help="Template over the columns of a row.")]


def preview(
    source: Annotated[str, typer.Argument(metavar="RECIPE|FILE", help="A recipe, or a file of rows.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Keys of the recipe.")] = None,
    rows: Annotated[int, typer.Option(min=0, help="Rows of the step to show as tokens.")] = 3,
    row: Annotated[int | None, typer.Option(min=1, help="Only this row, counted from 1, and its step.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write a page as well.")] = None,
    model: Annotated[str | None, typer.Option(help="Alias, folder, hub id or .gguf file: as model=...")] = None,
    as_json: Json = False,
) -> None:
    """Loads the tokenizer, no weights."""
    wrong = [word for word in overrides or () if "=" not in word]
    if wrong:
        raise BadInput([Problem("not a key=value", found=word, allowed="key=value") for word in wrong])
    with showing(as_json) as progress:
        recipe = _recipe(source, [*(overrides or ()), *([f"model={model}"] if model else [])], model, progress)
        for note in recipe.notes:
            progress.note(note)
        progress.phase("importing torch")
        from shikomi.steps.preview import preview as look
        from shikomi.steps.preview_page import as_page, as_text

        stages = look(recipe, progress, rows, row)
        if html is not None:
            html.write_text(as_page(Path(source).name, recipe.model, stages), encoding="utf-8")
    if as_json:
        emit({"model": recipe.model, "html": html, "stages": [stage.as_dict() for stage in stages]})
        return
    show(as_text(stages, brackets=not sys.stdout.isatty() or "NO_COLOR" in os.environ))
    if html is not None:
        print(f"page: {short_path(html)}")


def _recipe(source: str, overrides: list[str], model: str | None, progress: Progress) -> Recipe:
    """The recipe, or the one that `init` would write for a file of rows."""
    path = Path(source)
    progress.phase(f"reading {short_path(path)}")
    from shikomi.recipe import load_recipe, parse_recipe

    if is_recipe(path):
        return load_recipe(path, overrides)
    from shikomi.advise.starter import starter

    made = starter(path, model or "smollm2")
    for reason in made.detected.reasons:
        progress.note(reason)
    return parse_recipe(made.text, path.name.partition(".")[0], overrides)


def is_recipe(path: Path) -> bool:
    """Whether a file is a recipe and not rows: YAML, or one JSON object that names its data."""
    if path.suffix.lower() in (".yaml", ".yml"):
        return True
    if path.suffix.lower() != ".json" or not path.is_file() or path.stat().st_size > LARGEST_RECIPE:
        return False
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return False  # JSON lines, or broken: whoever reads the rows says which
    return isinstance(found, dict) and "data" in found


def convert(
    source: Annotated[str, typer.Argument(metavar="IN", help="A file, a folder, or a hub data set.")],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="The file to write; its suffix says the kind.")],
    to: Annotated[str, typer.Option("--to", callback=one_of(*FORMATS), help=", ".join(FORMATS))],
    format: Annotated[
        str, typer.Option("--from", callback=one_of("auto", *FORMATS), help="Format of IN; auto: by its keys.")
    ] = "auto",
    prompt: Template = None,
    completion: Template = None,
    system: Template = None,
    chosen: Template = None,
    rejected: Template = None,
    margin: Template = None,
    desirable: Template = None,
    split: Annotated[str | None, typer.Option(help="Which split of a folder or a hub data set.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="At most this many rows.")] = None,
    drop: Annotated[str | None, typer.Option(help="Columns to leave out, comma-separated.")] = None,
    allow_loss: Annotated[bool, typer.Option(help="Leave out what the format cannot hold, and count it.")] = False,
    force: Annotated[bool, typer.Option(help="Write over an existing file.")] = False,
    as_json: Json = False,
) -> None:
    """Two passes over the rows, and one over what was written."""
    if output.exists() and not force:
        raise BadInput([Problem("is there already", str(output), fix="choose another OUT, or add --force")])
    templates = {"prompt": prompt, "completion": completion, "system": system, "chosen": chosen}
    templates |= {"rejected": rejected, "margin": margin, "desirable": desirable}
    with showing(as_json) as progress:
        progress.phase(f"reading {short_path(Path(source))}")
        from shikomi.data.convert import convert as write
        from shikomi.recipe import Source

        spec = _spec(Source(path=source, split=split, limit=limit), format, templates)
        done = write(spec, to, output, allow_loss, split_list(drop), progress)
    if as_json:
        emit({"output": output, "format": to, **done.as_dict()})
        return
    print(f"{done.read:,} rows read, {done.written:,} written: {short_path(output)}")
    for line in done.lines():
        print(line)


def split(
    source: Annotated[str, typer.Argument(metavar="FILE", help="Rows: jsonl, json, csv or parquet.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the new files.")],
    validation: Annotated[float, typer.Option(min=0, max=1, help="Share of the rows for validation.")] = 0.0,
    test: Annotated[float, typer.Option(min=0, max=1, help="Share of the rows for the test.")] = 0.0,
    group: Annotated[str | None, typer.Option(help="Column whose rows of one value stay together.")] = None,
    stratify: Annotated[str | None, typer.Option(help="Column whose values all files have in equal shares.")] = None,
    together: Annotated[
        str, typer.Option(help="What keeps rows together, comma-separated: prompt, copy, near; or none.")
    ] = "prompt,copy,near",
    prompt: Template = None,
    completion: Template = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the draw.")] = 0,
    force: Annotated[bool, typer.Option(help="Write over existing files.")] = False,
    as_json: Json = False,
) -> None:
    """The same rows, seed and options give the same files."""
    shares = {side: share for side, share in (("validation", validation), ("test", test)) if share > 0}
    if not shares:
        raise BadInput([Problem("nothing to split off", fix="--validation 0.1, --test 0.1, or both")])
    reasons = [] if together == "none" else split_list(together)
    unknown = [reason for reason in reasons if reason not in ("prompt", "copy", "near")]
    if unknown:
        raise BadInput([Problem("--together", found=", ".join(unknown), allowed="prompt, copy, near, or none")])
    with showing(as_json) as progress:
        progress.phase(f"reading {short_path(Path(source))}")
        from shikomi.data.splits import split_file
        from shikomi.recipe import Source

        spec = _spec(Source(path=source), "auto", {"prompt": prompt, "completion": completion})
        done = split_file(spec, output, shares, group, stratify, seed, reasons, force, progress)
    if as_json:
        emit(done.as_dict())
        return
    for line in done.lines():
        print(line)


def _spec(source: Source, format: str, templates: dict[str, str | None]) -> DataSpec:
    """How the rows are read. Raises BadInput for a malformed template."""
    from shikomi.data.columns import column_templates, pair_templates, thumb_templates
    from shikomi.recipe import DataSpec

    given = {key: template for key, template in templates.items() if template is not None}
    spec = DataSpec(train=(source,), format=format, **given)  # type: ignore[arg-type]
    for check in (column_templates, pair_templates, thumb_templates):
        check(spec)
    return spec
