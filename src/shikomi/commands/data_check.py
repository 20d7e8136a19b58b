"""data check: what is wrong with rows before they are trained on, as lines, as JSON and as a page."""

from __future__ import annotations

import gc
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shikomi.commands.output import EXIT_CODES, Json, emit, short_path, showing
from shikomi.errors import EXIT_BAD_INPUT, BadInput, Problem, TryAgain
from shikomi.progress import Progress

if TYPE_CHECKING:
    from shikomi.data.checkup import Checkup
    from shikomi.data.encode import Encoder
    from shikomi.data.findings._finding import Finding
    from shikomi.data.tasks import Task
    from shikomi.recipe import Recipe

CHECK = f"""Every problem of your rows before they are trained on, each with its line and what to do.

Format, copies, rows of validation and test that are trained on, languages, control characters and wrong encodings,
secrets and personal data, labels, lengths and what max_length cuts, special tokens, refusals; of preferences also pairs
without a difference, contradictions, length that gives the answer away, and the balance of labels.
`shikomi explain CODE` says what a code means. Tokens are counted with a model's tokenizer: that of the recipe, or of
--model; else they are estimated from characters. The exit code is 2 where there are errors, 0 where there are warnings
and notes only.

\b
Examples:
  shikomi data check my.jsonl
  shikomi data check my.jsonl --valid valid.jsonl --model smollm2 --max-length 1024
  shikomi data check my.yaml --html check.html
  shikomi data check my.jsonl --fix my-fixed.jsonl

{EXIT_CODES}"""

PLACES_SHOWN = 3


def check(
    source: Annotated[str, typer.Argument(metavar="FILE|RECIPE", help="Rows (a file or folder), or a recipe.")],
    model: Annotated[str | None, typer.Option(help="Whose tokenizer counts: alias, folder, hub id or .gguf.")] = None,
    max_length: Annotated[int | None, typer.Option(min=8, help="Longest row in tokens; a recipe has its own.")] = None,
    valid: Annotated[Path | None, typer.Option(help="Held-out rows, to compare with.")] = None,
    fix: Annotated[Path | None, typer.Option(help="Write the training rows, repaired, to this new file.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write a page as well.")] = None,
    as_json: Json = False,
) -> None:
    """Imports no torch where no model is named."""
    from shikomi.commands.data_tools import is_recipe

    with showing(as_json) as progress:
        progress.phase(f"reading {short_path(Path(source))}")
        recipe = None
        if is_recipe(Path(source)):
            from shikomi.recipe import load_recipe

            recipe = load_recipe(source)
        tasks = _tasks(source, recipe, valid)
        if fix is not None:
            _check_fix(fix, tasks)
        tokenizer, notes = _tokenizer(model, recipe, progress)
        limit = max_length or (recipe.max_length if recipe is not None else None)
        from shikomi.data.checkup import checkup

        gc.freeze()  # a tokenizer's objects stay: no collection while rows are read has to look at them
        found = [
            (task, checkup(task.spec, task.kind, _encoder(tokenizer, recipe, task, limit), limit, progress, True))
            for task in tasks
        ]
        fixed = None
        if fix is not None:
            from shikomi.data.findings.repair import repair

            progress.phase(f"writing {short_path(fix)}")
            fixed = repair(found[0][0].spec, found[0][1], fix)
        if html is not None:
            from shikomi.commands.data_check_page import as_page

            html.parent.mkdir(parents=True, exist_ok=True)
            html.write_text(as_page(Path(source).name, found, notes), encoding="utf-8")
    code = EXIT_BAD_INPUT if any(checked.errors for _, checked in found) else 0
    if as_json:
        named = [{"name": task.name, "kind": task.kind, **checked.as_dict()} for task, checked in found]
        emit({"source": source, "exit_code": code, "reading": notes, "tasks": named, "html": html,
              "fix": None if fixed is None else fixed.as_dict()})  # fmt: skip
    else:
        _print(found, notes, [] if fixed is None else fixed.lines())
        if html is not None:
            print(f"page: {short_path(html)}")
    if code:
        raise typer.Exit(code)


def _tasks(source: str, recipe: Recipe | None, valid: Path | None) -> list[Task]:
    from shikomi.data.tasks import task_of_file, tasks_of_stages

    if recipe is None:
        return [task_of_file(source, None if valid is None else str(valid))]
    from shikomi.recipe import Source

    stages = []
    for stage in recipe.stages:
        kind, spec = "conversations", recipe.data_of(stage)
        if stage.objective.name != "sft":  # its class imports torch
            from shikomi.steps.rows import kind_of

            kind = kind_of(stage)
        if valid is not None:
            spec = spec.model_copy(update={"validation": (Source(path=str(valid)),)})
        stages.append((f"stage {stage.name}" if len(recipe.stages) > 1 else "rows", spec, kind))
    return tasks_of_stages(stages)


def _check_fix(path: Path, tasks: Sequence[Task]) -> None:
    from shikomi.data.findings.repair import check_output

    if len(tasks) > 1:
        found = ", ".join(task.name for task in tasks)
        raise BadInput(
            [Problem("--fix repairs the rows of one task", found=found, fix="give the file, not the recipe")]
        )
    check_output(path, tasks[0].spec)


def _tokenizer(model: str | None, recipe: Recipe | None, progress: Progress) -> tuple[Any, list[str]]:
    """The tokenizer that counts, None without one; and what to say about it.

    Raises BadInput or TryAgain for a model named by --model; a recipe's model that is not there is only said.
    """
    name = model or (recipe.model if recipe is not None else None)
    if name is None:
        return None, ["tokens are estimated as characters / 4; --model NAME counts them"]
    progress.phase(f"loading the tokenizer of {name}")
    from shikomi.model.files import resolve

    own = recipe is not None and model is None
    token = os.environ.get(recipe.model_token_env or "") if recipe is not None and own else None
    try:
        files = resolve(name, recipe.model_revision if recipe is not None and own else None, token, progress)
    except (BadInput, TryAgain) as error:
        if not own:
            raise
        return None, [f"tokens are estimated as characters / 4: {error.message.splitlines()[0]}"]
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(files.folder), local_files_only=True)
    if recipe is not None and recipe.new_tokens:
        tokenizer.add_tokens(list(recipe.new_tokens))
    return tokenizer, [f"tokens are those of {name}"]


def _encoder(tokenizer: Any, recipe: Recipe | None, task: Task, max_length: int | None) -> Encoder | None:
    if tokenizer is None:
        return None
    from shikomi.data.encode import Encoder

    chat = "auto" if recipe is None else recipe.chat
    return Encoder(tokenizer, chat, recipe.chat_template if recipe else None, task.spec.train_on, max_length)


def _print(found: Sequence[tuple[Task, Checkup]], notes: Sequence[str], fixed: Sequence[str]) -> None:
    for note in notes:
        print(note)
    for task, checked in found:
        if len(found) > 1:
            print(f"\n{task.name}")
        rows = ", ".join(f"{role} {count:,}" for role, count in checked.rows.items())
        formats = ", ".join(sorted({name for by in checked.formats.values() for name in by})) or "none"
        print(f"rows: {rows}; format: {formats}")
        for note in (*task.notes, *checked.notes):
            print(note)
        for finding in checked.findings:
            _print_finding(finding)
        print()
        for line in figures(checked):
            print(line)
    counts = {severity: sum(c.count(severity) for _, c in found) for severity in ("error", "warning", "note")}
    print()
    print(", ".join(f"{n:,} {name}{'' if n == 1 else 's'}" for name, n in counts.items()))
    for line in fixed:
        print(line)


def _print_finding(finding: Finding) -> None:
    print(f"\n{finding.code} {finding.severity}: {finding.title}: {finding.count:,}")
    for detail in finding.details:
        print(f"  {detail}")
    for place in finding.places[:PLACES_SHOWN]:
        note = f"  ({place.note})" if place.note else ""
        print(f"  {where(place.file, place.line)}: {place.excerpt}{note}")
    if finding.count > PLACES_SHOWN and finding.places:
        print(f"  and {finding.count - PLACES_SHOWN:,} more; --json and --html list them")
    print(f"  fix: {finding.fix}")


def where(file: str | None, line: int | None) -> str:
    """file:line, as far as it is known."""
    name = "the rows" if file is None else short_path(Path(file))
    return name if line is None else f"{name}:{line}"


def figures(checked: Checkup) -> list[str]:
    """Lengths, labels, languages and preferences in a line each."""
    out = []
    if checked.lengths is not None:
        lengths: Mapping[str, Any] = checked.lengths
        shares = ", ".join(f"{'longest' if p == '100' else p + '%'} {n:,}" for p, n in lengths["percentiles"].items())
        out.append(f"length in {lengths['unit']}: mean {lengths['mean']:,.0f}, {shares}")
        out.append(f"trained: {lengths['trained']:,} of {lengths['total']:,} tokens ({lengths['trained_share']:.1%})")
        if lengths["cut_at"]:
            cut = ", ".join(f"{limit}: {c['rows']:,} ({c['share']:.1%})" for limit, c in lengths["cut_at"].items())
            out.append(f"rows that max_length would cut: {cut}")
    if checked.labels is not None:
        labels = list(checked.labels.items())
        more = f", and {len(labels) - 10} more" if len(labels) > 10 else ""
        out.append(f"labels: {', '.join(f'{name} {n:,}' for name, n in labels[:10])}{more}")
    for what, by in checked.shares.items():
        out.append(f"{what}: {', '.join(f'{name} {share:.1%}' for name, share in list(by.items())[:6])}")
    if checked.preferences is not None:
        made = ", ".join(f"{k.replace('_', ' ')} {v:.2f}" if isinstance(v, float) else f"{k} {v:,}"
                         for k, v in checked.preferences.items())  # fmt: skip
        out.append(f"preferences: {made}")
    return out
