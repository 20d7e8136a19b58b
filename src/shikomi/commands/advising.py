"""advise: which method for a task, why, what it takes, and the recipe or prompt that does it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from shikomi.commands.output import Device, Dtype, Json, command_line, emit, short_path, showing
from shikomi.errors import BadInput, Problem
from shikomi.progress import Progress, duration, size

if TYPE_CHECKING:
    from shikomi.advise.advice import Advice, Answer
    from shikomi.advise.expected import Expected
    from shikomi.advise.material import Materials
    from shikomi.advise.prompting import Measured

ADVISE = """Which method for your task: a prompt, LoRA, QLoRA, full fine-tuning, pre-training, DPO and its kin, or RLHF.

It answers from flags and your data, asks what is left on a terminal, says why, what else would do and when, what it
takes in memory, time and money, and writes a recipe that runs as it is. Where a prompt is enough it writes a
prompt.yaml, which `eval`, `predict`, `chat` and `generate` take like an adapter. The rules: docs/guide/advise.md.

\b
Examples:
  shikomi advise
  shikomi advise --data my.jsonl --run-baseline -o my.yaml
  shikomi advise --task chatbot --data 900 --pairs 400 --no-prompt-solves --no-new-knowledge --no-understands
  shikomi advise --task code --data code.jsonl --model qwen3-8b --machine rtx-4090 --currency JPY --yes
  shikomi advise --data my.jsonl --yes --json
"""
MATERIAL = {
    "rows": "Rows with a question and its answer",
    "pairs": "Pairs of a better and a worse answer",
    "thumbs": "Answers with a thumb up or down",
    "text": "Plain text of the domain",
}


def advise(
    task: Annotated[str | None, typer.Option(help="chatbot, classification, code or summarisation.")] = None,
    data: Annotated[str | None, typer.Option(metavar="FILE|COUNT", help="Rows with answers; any format.")] = None,
    pairs: Annotated[str | None, typer.Option(metavar="FILE|COUNT", help="Rows with chosen and rejected.")] = None,
    thumbs: Annotated[str | None, typer.Option(metavar="FILE|COUNT", help="Answers that were judged.")] = None,
    text: Annotated[str | None, typer.Option(metavar="FILE|TOKENS", help="Plain text of the domain.")] = None,
    model: Annotated[str, typer.Option(help="Alias, folder, hub id, .gguf file, or a name of `shikomi plan`.")] = (
        "smollm2"
    ),
    prompt_solves: Annotated[
        bool | None, typer.Option("--prompt-solves/--no-prompt-solves", help="An instruction is good enough, or not.")
    ] = None,
    examples_solve: Annotated[bool, typer.Option("--examples-solve", help="Solved examples in it make it so.")] = False,
    new_knowledge: Annotated[
        bool | None, typer.Option("--new-knowledge/--no-new-knowledge", help="A wholly new domain, or not.")
    ] = None,
    understands: Annotated[
        bool | None, typer.Option("--understands/--no-understands", help="The model understands the task, or not.")
    ] = None,
    checkable: Annotated[
        bool | None, typer.Option("--checkable/--no-checkable", help="A program can judge answers, or not.")
    ] = None,
    run_baseline: Annotated[bool, typer.Option(help="Measure what a prompt reaches on a sample of the data.")] = False,
    sample: Annotated[int, typer.Option(min=2, help="Rows of that sample.")] = 50,
    shots: Annotated[int, typer.Option(min=0, max=100, help="Examples in the prompt.")] = 5,
    tries: Annotated[int, typer.Option(min=1, max=100, help="Sets of examples to choose from by their score.")] = 1,
    target: Annotated[float | None, typer.Option(help="Score from which on a prompt solves it.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of sample and examples.")] = 0,
    budget: Annotated[float | None, typer.Option(min=0, help="Most to spend, in --currency.")] = None,
    machine: Annotated[str | None, typer.Option(help="Where it will run; absent: this machine.")] = None,
    currency: Annotated[str, typer.Option(help="Of the costs: USD, JPY, EUR ...")] = "USD",
    price: Annotated[float | None, typer.Option(help="US dollars an hour; absent: by the table of prices.")] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Ask nothing: take stated defaults.")] = False,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="The recipe or prompt.yaml to write.")] = None,
    force: Annotated[bool, typer.Option(help="Write over an existing file.")] = False,
    dtype: Dtype = "auto",
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Reasons on stdout; the file with -o, else printed too."""
    if output is not None and output.exists() and not force:
        raise BadInput([Problem("is there already", str(output), fix="choose another --output, or add --force")])
    at_terminal = sys.stdin.isatty() and sys.stderr.isatty() and not yes and not as_json
    given = [(kind, value) for kind, value in
             (("rows", data), ("pairs", pairs), ("thumbs", thumbs), ("text", text)) if value is not None]  # fmt: skip
    if at_terminal and not given:
        given = _ask_material()
        budget = _ask_budget(currency) if budget is None else budget
    answers = _given_answers(
        task, prompt_solves, examples_solve,
        {"knowledge": new_knowledge, "understands": understands, "checkable": checkable},
    )  # fmt: skip
    with showing(as_json) as progress:
        progress.phase("reading the data")
        from shikomi.advise.advice import Case, known_answers
        from shikomi.advise.advice import advise as advised
        from shikomi.advise.expected import Expecting, loadable
        from shikomi.advise.material import materials

        model = loadable(model)
        case = Case(model, materials(given), answers, shots=shots, seed=seed)
        expecting = Expecting(machine, currency.upper(), budget, price)
        expecting.check()
        if run_baseline:
            family = known_answers(case)["family"].value if "family" in known_answers(case) else "chatbot"
            measured = _measure(
                case.materials, family, model, sample, shots, tries, target, seed, dtype, device, progress
            )
            case = Case(model, case.materials, answers, measured, shots, seed)
        progress.phase("planning")
        ask = _asker(progress) if at_terminal else None
        made = advised(case, expecting.room(case), ask, yes)
        expected = expecting.of(made.draft)
        progress.finish()
    _finish(made, expected, output, as_json)


def _given_answers(
    task: str | None, prompt_solves: bool | None, examples_solve: bool, others: dict[str, bool | None]
) -> dict[str, Answer]:
    """Flags as answers. Raises BadInput for an unknown task, and for flags that contradict each other."""
    from shikomi.advise.advice import Answer
    from shikomi.advise.facts import NO, TASKS, YES
    from shikomi.errors import nearest

    found = {column: Answer(YES if value else NO, "given") for column, value in others.items() if value is not None}
    if task is not None:
        if task not in TASKS:
            close = nearest(task, TASKS)
            fix = f"did you mean {close}?" if close else None
            raise BadInput([Problem("--task: unknown kind of task", found=task, allowed=", ".join(TASKS), fix=fix)])
        found["family"] = Answer(task, "given")
    if examples_solve and prompt_solves:
        raise BadInput("--prompt-solves and --examples-solve: give one of them")
    if examples_solve:
        found["prompt"] = Answer("few-shot", "given")
    elif prompt_solves is not None:
        found["prompt"] = Answer("zero-shot" if prompt_solves else NO, "given")
    return found


def _measure(
    there: Materials, family: str, model: str, sample: int, shots: int, tries: int, target: float | None, seed: int,
    dtype: str, device: str, progress: Progress,
) -> Measured:  # fmt: skip
    rows = there.get("rows")
    if rows is None or rows.detected is None:
        fix = "--data FILE with rows that have answers"
        raise BadInput([Problem("--run-baseline needs rows to measure on", fix=fix)])
    progress.phase("importing torch")
    from shikomi.advise.drafts import plain_prompt
    from shikomi.advise.prompting import measure_prompt
    from shikomi.inference import open_model

    ready = open_model(model, dtype=dtype, device=device, progress=progress)
    file = plain_prompt(family, there, model)
    return measure_prompt(
        ready.lm, ready.encoder, file, rows.path,
        sample=sample, shots=shots, tries=tries, target=target, seed=seed, progress=progress,
    )  # fmt: skip


def _ask_material() -> list[tuple[str, str]]:
    """What there is to learn from, one kind after the other; Enter: nothing of it."""
    print("What is there to learn from? A file, or how many you expect; Enter for none.", file=sys.stderr)
    asked = [(kind, typer.prompt(f"  {words}", default="", show_default=False, err=True).strip())
             for kind, words in MATERIAL.items()]  # fmt: skip
    return [(kind, value) for kind, value in asked if value]


def _ask_budget(currency: str) -> float | None:
    """The most to spend; None: no limit."""
    while True:
        said = typer.prompt(f"  Most to spend, {currency}", default="", show_default=False, err=True).strip()
        if not said:
            return None
        try:
            amount = float(said.replace(",", ""))
        except ValueError:
            amount = -1.0
        if 0 <= amount < float("inf"):
            return amount
        print("  a number, or Enter for no limit", file=sys.stderr)


def _asker(progress: Progress) -> Callable[[str], Answer]:
    """Asks for a column on the terminal."""
    from shikomi.advise.advice import Answer
    from shikomi.advise.facts import COLUMNS, NO, YES

    def ask(name: str) -> Answer:
        progress.finish()
        column = COLUMNS[name]
        if column.values == (YES, NO):
            return Answer(YES if typer.confirm(str(column.ask), err=True) else NO, "asked")
        while True:
            said = typer.prompt(f"{column.ask} ({', '.join(column.values)})", err=True).strip().lower()
            if said in column.values:
                return Answer(said, "asked")
            print(f"  one of {', '.join(column.values)}", file=sys.stderr)

    return ask


def _finish(made: Advice, expected: Expected | None, output: Path | None, as_json: bool) -> None:
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(made.draft.text, encoding="utf-8")
    if as_json:
        emit({**made.as_dict(expected), "file": output})
        return
    _print_advice(made, expected)
    if output is None:
        print(f"\n{made.draft.text}", end="")
        print(f"\n-o FILE writes this {made.draft.kind}")
        return
    print(f"\nwritten to {short_path(output)}; look at it, then:")
    nexts = [("train", output, "--dry-run"), ("train", output)] if made.draft.kind == "recipe" else [("chat", output)]
    for words in nexts:
        print(f"  {command_line(*words)}")


def _print_advice(made: Advice, expected: Expected | None) -> None:
    from shikomi.advise.advice import band
    from shikomi.advise.facts import TASKS
    from shikomi.advise.outcomes import OUTCOMES
    from shikomi.advise.rules import TABLE

    print(f"Advice: {made.title}")
    print(f"  the usual way for {TASKS[made.family].title}: {TASKS[made.family].path}")
    for note in made.notes:
        print(f"  note: {note}")
    print("\nBecause")
    for reason in made.reasons:
        print(f"  {TABLE[reason.question].text}")
        for fact in reason.facts:
            print(f"    {fact}")
        print(f"    -> {reason.rule.why} [{reason.rule.name}]")
    print("\nExpected")
    if expected is None:
        print("  memory, time   those of answering: nothing is trained")
    else:
        for title, words in expected.lines(size, duration):
            print(f"  {title:<15}{words}")
    print(f"  {'usually':<15}{band(made.outcomes)} is what people quote for models of 7 billion parameters")
    if made.alternatives:
        print("\nWhat else, and when it would win")
        for name, when in made.alternatives:
            print(f"  {OUTCOMES[name].title}: {when}")
