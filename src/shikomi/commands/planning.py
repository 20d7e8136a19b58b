"""plan: memory, time and cost before anything is loaded; the tables of what fits where."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from shikomi.commands.output import EXIT_CODES, Json, command_line, emit, short_path, show, showing
from shikomi.errors import BadInput, Problem
from shikomi.progress import duration, size

if TYPE_CHECKING:
    from rich.console import RenderableType

    from shikomi.plan.estimate import Range
    from shikomi.plan.tables import Table
    from shikomi.plan.whole import Plan

PLAN = f"""What a recipe will take, before it starts: memory, time, cost and disk, each as likely (low to high).

Computed from the model's config.json and the rows; no weight is loaded, and a folder with only a config.json is
enough. Time is that of training, without loading, evaluation and saving. On this machine its speed is measured once
and kept; for a GPU of the table it is a share of the peak on its data sheet: computed, not measured. Where memory is
short, the cheapest changes that fit are proposed, in order.

\b
Examples:
  shikomi plan my.yaml
  shikomi plan my.yaml batch_size=32 adapter=full
  shikomi plan my.yaml --machine rtx-4090 --currency JPY
  shikomi plan my.yaml --machine a100-80gb --price 1.5
  shikomi plan my.yaml --fit 24GB
  shikomi plan my.yaml --table                 where this recipe fits
  shikomi plan --table                         methods by model sizes and machines

{EXIT_CODES}"""


def plan(
    words: Annotated[
        list[str] | None, typer.Argument(metavar="RECIPE|KEY=VALUE", help="A recipe, and keys to change in it.")
    ] = None,
    machine: Annotated[
        str | None, typer.Option(help="A machine of the table, such as rtx-4090 or cpu-16gb; absent: this one.")
    ] = None,
    fit: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Memory that it must fit, such as 24GB; absent: the machine's.")
    ] = None,
    price: Annotated[str | None, typer.Option(help="US dollars an hour, instead of the table's prices.")] = None,
    currency: Annotated[str, typer.Option(help="Currency of the cost: USD, EUR, JPY, GBP or CHF.")] = "USD",
    table: Annotated[
        bool, typer.Option("--table", help="Tables: where this recipe fits, or methods by sizes and machines.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Prices, sizes and names are checked before the recipe is read."""
    from shikomi.plan.hardware import hardware
    from shikomi.plan.prices import check_currency, check_price

    check_currency(currency)
    dollars = None if price is None else check_price(price)
    if machine is not None:
        hardware(machine)
    recipe_path, overrides = _recipe_and_overrides(words or [], table)
    with showing(as_json) as progress:
        if recipe_path is None:
            progress.phase("computing the tables")
            from shikomi.plan.quoted import all_tables

            tables = list(all_tables())
            progress.finish()
            _show_tables(tables, as_json)
            return
        progress.phase(f"reading {short_path(Path(recipe_path))}")
        from shikomi.recipe import load_recipe

        recipe = load_recipe(recipe_path, overrides)
        for note in recipe.notes:
            progress.note(note)
        progress.phase("planning")
        from shikomi.plan.whole import estimate

        found = estimate(recipe, machine, memory_limit=fit, price=dollars, currency=currency)
        if table:
            from shikomi.plan.tables import of_job

            tables = [of_job(found.hungriest.job)]
    if table:
        _show_tables(tables, as_json)
    elif as_json:
        emit(found.as_dict())
    else:
        where = [word for name, value in (("--machine", machine), ("--fit", fit)) if value for word in (name, value)]
        _show(found, [recipe_path, *overrides], where, recipe.model, recipe.adapter.name)


def _recipe_and_overrides(words: list[str], table: bool) -> tuple[str | None, list[str]]:
    """The recipe's path, None for the general tables. Raises BadInput for neither, and for what is no key=value."""
    if not words and table:
        return None, []
    if not words or ("=" in words[0] and not Path(words[0]).exists()):
        fix = "shikomi plan RECIPE; `shikomi init FILE` writes one, `shikomi plan --table` needs none"
        raise BadInput([Problem("no recipe", found=words[0] if words else None, fix=fix)])
    wrong = [word for word in words[1:] if "=" not in word]
    if wrong:
        raise BadInput([Problem("not a key=value", found=word, allowed="key=value") for word in wrong])
    return words[0], words[1:]


def _show_tables(tables: list[Table], as_json: bool) -> None:
    if as_json:
        emit({"tables": [table.as_dict() for table in tables]})
        return
    for table in tables:
        show(_rich(table))
        for note in table.notes:
            print(note)
        print()
    print("computed, not measured: no GPU was at hand; docs/guide/plan.md compares with published measurements")


def _rich(table: Table) -> RenderableType:
    """A table for the terminal."""
    from rich import box
    from rich.table import Table as Shown
    from rich.text import Text

    shown = Shown(box=box.SIMPLE_HEAD, title=table.title, title_justify="left")
    for title in table.head:
        shown.add_column(title)
    for row in table.rows:
        shown.add_row(*(Text(cell) for cell in row))
    return shown


def _show(plan: Plan, words: list[str], where: list[str], model: str, adapter: str) -> None:
    """What is needed, of what there is, and what to do about it."""
    from rich import box
    from rich.table import Table as Shown

    stage = plan.hungriest
    memory, machine = stage.memory, plan.machine
    trained, total = memory.trainable_parameters, memory.total_parameters
    print(f"model      {model}, {total:,} parameters")
    print(f"trained    {adapter}: {trained:,} parameters ({trained / total:.2%})")
    arithmetic = "" if machine.arithmetic == machine.storage else f", multiplied in {machine.arithmetic}"
    print(f"machine    {plan.title}: {machine.device}, {size(plan.limit)} to use, {machine.storage}{arithmetic}")
    shown = Shown(box=box.SIMPLE_HEAD)
    for title in ("", "likely", "low", "high", ""):
        shown.add_column(title, justify="right" if title else "left")
    for part in memory.components:
        shown.add_row(part.name, size(part.bytes.likely), size(part.bytes.low), size(part.bytes.high), part.why)
    shown.add_section()
    verdict = {"yes": "fits", "just": "fits only if all goes well", "no": "DOES NOT FIT"}[plan.fits]
    shown.add_row("peak memory", *_sizes(memory.peak), f"{verdict} in {size(plan.limit)}")
    shown.add_row("while loading", *_sizes(memory.loading_peak), "")
    if machine.device == "cuda":
        shown.add_row("host memory", *_sizes(memory.host_peak), "")
    shown.add_row("disk", *_sizes(plan.disk), "checkpoints and result")
    show(shown)
    for one in plan.stages:
        counted = "" if one.job.rows.measured else "about "
        print(
            f"stage {one.job.stage}: {one.job.steps:,} steps of {one.job.batch_size} rows, {counted}"
            f"{one.time.tokens:,.0f} tokens to compute, {one.time.tokens_per_second:,.0f} tokens/s"
        )
    seconds = plan.seconds
    print(f"time       {duration(seconds.likely)} ({duration(seconds.low)} to {duration(seconds.high)}) of training")
    print(f"cost       {_money(plan.cost.amount, plan.cost.currency)}; {plan.cost.basis}")
    if plan.fits != "no" and stage.micro_batch_tokens > stage.job.micro_batch_tokens:
        print(f"room for   micro_batch_tokens={stage.micro_batch_tokens}, which changes no result")
    for note in (*plan.notes, *plan.cost.warnings):
        print(f"note       {note}")
    _show_changes(plan, words, where)


def _show_changes(plan: Plan, words: list[str], where: list[str]) -> None:
    """The proposed changes, and the command that plans with them all."""
    if not plan.changes:
        if plan.fits != "yes":
            print("\nno change of the recipe makes it smaller: take a smaller model, or a larger machine")
        return
    print(f"\nto fit {size(plan.limit)}, the cheapest changes in order:")
    for number, change in enumerate(plan.changes, 1):
        print(f"  {number}. {change.override}: saves {size(change.saves)}; {change.costs}")
    if plan.fits_after:
        print(f"then it takes {size(plan.peak_after)}:")
    else:
        print(f"even then it takes {size(plan.peak_after)}: take a smaller model, or a larger machine. All of them:")
    every = [word for change in plan.changes for word in change.override.split()]
    last = {word.partition("=")[0]: word for word in (*words[1:], *every)}
    print(f"  {command_line('plan', Path(words[0]), *last.values(), *where)}")


def _sizes(value: Range) -> tuple[str, str, str]:
    return size(value.likely), size(value.low), size(value.high)


def _money(amount: Range, currency: str) -> str:
    """Likely (low to high), with as many decimals as the likely amount asks for."""
    decimals = 0 if amount.likely >= 1000 or currency == "JPY" and amount.likely >= 10 else 2
    while amount.likely and amount.likely < 10**-decimals and decimals < 6:
        decimals += 1
    low, likely, high = (f"{value:,.{decimals}f}" for value in (amount.low, amount.likely, amount.high))
    return f"{likely} {currency} ({low} to {high})"
