"""list: what a recipe can name; models: the aliases, and fetching one."""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path
from typing import Annotated, Any

import typer

from shikomi import registry
from shikomi.commands.output import Json, emit, showing
from shikomi.errors import BadInput, nearest
from shikomi.progress import size

LIST = """What a recipe can name: adapters, objectives, optim, quant, metrics, models; with a name, its options.

\b
Examples:
  shikomi list
  shikomi list adapters
  shikomi list adapters lora
"""
MODELS = """Models that have a short name here. Any transformers folder, hub id or .gguf file works without one.

\b
Examples:
  shikomi models
  shikomi models get smollm2
"""
MODELS_LIST = """The aliases: size, hash, licence, and whether it is on this machine.

\b
Examples:
  shikomi models list
  shikomi models list --json
"""
MODELS_GET = """Download a model and convert it once into the user's cache.

\b
Example:
  shikomi models get smollm2
"""


def components(
    kind: Annotated[str | None, typer.Argument(help="adapters, objectives, optim, quant, metrics or models.")] = None,
    name: Annotated[str | None, typer.Argument(help="One of them, to see its options.")] = None,
    as_json: Json = False,
) -> None:
    """Names read from the files of each folder; only the options of one component need its import."""
    kinds = [known for known in registry.KINDS if registry.names(known)]
    if kind == "models":
        list_models(as_json)
    elif kind is not None and kind not in kinds:
        close = nearest(kind, [*kinds, "models"])
        meant = f"; did you mean {close}?" if close else ""
        raise BadInput(f"unknown kind of component {kind!r}; the kinds are {', '.join([*kinds, 'models'])}{meant}")
    elif kind is not None and name is not None:
        _show_options(kind, name, as_json)
    else:
        found = {known: {n: _about(known, n) for n in registry.names(known)} for known in ([kind] if kind else kinds)}
        if as_json:
            emit(found)
            return
        for known, members in found.items():
            print(f"{known}:")
            for member, about in members.items():
                print(f"  {member:<14}{about}")


def _about(kind: str, name: str) -> str:
    """The first line of a component's module, read without importing it."""
    spec = importlib.util.find_spec(f"shikomi.{kind}.{name}")
    assert spec is not None and spec.origin is not None
    text = ast.get_docstring(ast.parse(Path(spec.origin).read_text(encoding="utf-8"))) or ""
    return text.partition("\n")[0]


def _show_options(kind: str, name: str, as_json: bool) -> None:
    with showing(as_json) as progress:
        progress.phase(f"reading {kind}/{name}")
        from shikomi.recipe import component_reference

        options = component_reference(kind, name)
    if as_json:
        emit({"kind": kind, "name": name, "options": as_objects(options)})
        return
    print(_about(kind, name))
    print_keys(options)
    if not options:
        print("no options")


def print_keys(rows: list[tuple[str, str, Any, str]]) -> None:
    """Keys with types, defaults and meanings, two lines each: to read, and to search with grep."""
    for key, kind, default, about in rows:
        print(f"{key}: {kind}" + ("" if default is None else f"; default {_as_written(default)}"))
        print(f"    {about}")


def as_objects(rows: list[tuple[str, str, Any, str]]) -> list[dict[str, Any]]:
    """The same for --json."""
    return [dict(zip(("key", "type", "default", "about"), row, strict=True)) for row in rows]


def _as_written(default: Any) -> str:
    return str(default).lower() if isinstance(default, bool) else str(default)


models = typer.Typer(help=MODELS, rich_markup_mode=None, invoke_without_command=True)


@models.callback()
def all_models(context: typer.Context, as_json: Json = False) -> None:
    """Without a subcommand: list."""
    if context.invoked_subcommand is None:
        list_models(as_json)


@models.command("list", help=MODELS_LIST)
def list_models(as_json: Json = False) -> None:
    """Nothing is fetched."""
    with showing(as_json) as progress:
        progress.phase("reading the catalogue")
        from shikomi.model import catalog

        rows = catalog.listing()
    if as_json:
        emit({"models": rows})
        return
    for row in rows:
        print(f"{row['name']}: {row['about']}")
        print(f"  parameters  {row['parameters']:,}")
        print(f"  size        {size(row['download_bytes'])} to download, {size(row['disk_bytes'])} on disk")
        print(f"  licence     {row['licence']}   {row['home']}")
        print(f"  sha256      {row['sha256']}")
        print(f"  here        {row['folder'] if row['present'] else 'no; shikomi models get ' + row['name']}")


@models.command("get", help=MODELS_GET)
def get_model(alias: Annotated[str, typer.Argument(help="The short name.")], as_json: Json = False) -> None:
    """Prints the folder."""
    with showing(as_json) as progress:
        progress.phase("reading the catalogue")
        from shikomi.model import catalog

        folder = catalog.get(alias, progress)
    emit({"name": alias, "folder": folder}) if as_json else print(folder)
