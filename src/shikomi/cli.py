"""The `shikomi` command: every subcommand parses, calls and prints; the work is done elsewhere."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from shikomi import __version__
from shikomi.commands import (
    advising,
    components,
    data,
    doctor,
    explain,
    inference,
    inspection,
    planning,
    recipes,
    scoring,
    sweep,
    training,
)
from shikomi.commands.output import EXIT_CODES, print_error
from shikomi.errors import EXIT_INTERRUPTED, ShikomiError

ABOUT = """Fine-tune a language model on your own data, on the machine you have, and see whether it was worth it.

\b
The usual way:
  shikomi demo                                a real run from beginning to end, in a few minutes
  shikomi init my.csv -o my.yaml              a recipe for your own file
  shikomi train my.yaml                       train, and compare with the untouched model
  shikomi generate runs/my "Some text"        use the result

\b
What each recipe key means:  shikomi recipe
"""

app = typer.Typer(
    name="shikomi",
    help=ABOUT,
    epilog=EXIT_CODES,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)


def _version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit


@app.callback()
def shikomi(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Replaced by ABOUT."""


for name, command, about, in_short in (
    ("demo", training.demo, training.DEMO, "A real run from beginning to end, in minutes."),
    ("advise", advising.advise, advising.ADVISE, "Which method for your task, why, and a recipe for it."),
    ("init", recipes.init, recipes.INIT, "Write a recipe for your data file."),
    ("plan", planning.plan, planning.PLAN, "What it takes: memory, time, cost; what fits where."),
    ("train", training.train, training.TRAIN, "Train what a recipe says; compare with the base."),
    ("resume", training.resume, training.RESUME, "Go on with a run, bit for bit; or extend it."),
    ("sweep", sweep.sweep, sweep.SWEEP, "Run a grid of settings; compare them in one table."),
    ("generate", inference.generate, inference.GENERATE, "The model's answer to one text."),
    ("predict", inference.predict, inference.PREDICT, "Answers for all rows of a file."),
    ("chat", inference.chat, inference.CHAT, "Talk with a model, and with its base beside it."),
    ("eval", scoring.evaluate, scoring.EVAL, "Score a model on a file, with intervals."),
    ("merge", inference.merge, inference.MERGE, "Write an adapter into its base model."),
    ("combine", inference.combine, inference.COMBINE, "Make one adapter of several."),
    ("doctor", doctor.doctor, doctor.DOCTOR, "Whether this machine and installation can train."),
    ("recipe", recipes.reference, recipes.REFERENCE, "What every key of a recipe means."),
    ("explain", explain.explain, explain.EXPLAIN, "What a number, an error or a key means, and what to do."),
    ("list", components.components, components.LIST, "What a recipe can name, and its options."),
):
    app.command(name, help=about, short_help=in_short)(command)
app.add_typer(data.app, name="data", short_help="Check rows before they are trained on.")
app.add_typer(inspection.app, name="runs", short_help="List, watch, compare runs; clear checkpoints away.")
app.add_typer(components.models, name="models", short_help="Models with a short name; fetch one.")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code; what the user can put right is printed without a traceback."""
    _set_environment()
    argv = list(sys.argv[1:] if arguments is None else arguments)
    try:
        return _run(argv)
    except ShikomiError as error:
        print_error(error, as_json="--json" in argv)
        return error.exit_code
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader has gone (`shikomi recipe | head`). What is still buffered goes nowhere, also at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _set_environment() -> None:
    """What torch and transformers read when they are imported, which happens later."""
    os.environ["OMP_DYNAMIC"] = "FALSE"  # TRUE has given NaN
    # Threads that spin while they wait made everything 4 times slower beside one other busy process, and nothing faster
    # on an idle machine.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # transformers' too: progress has one display


def _run(argv: list[str]) -> int:
    usage_error = typer.BadParameter.__mro__[1]  # UsageError, which typer does not export under a name of its own
    assert issubclass(usage_error, Exception)
    command = typer.main.get_command(app)
    try:
        with command.make_context("shikomi", argv) as context:
            command.invoke(context)
    except typer.Exit as error:
        return error.exit_code
    except typer.Abort as error:
        raise KeyboardInterrupt from error
    except usage_error as error:
        error.show()  # type: ignore[attr-defined]
        return error.exit_code  # type: ignore[attr-defined]
    sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
