"""generate, predict, chat, merge and combine: using what was trained; eval is in scoring.py."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shikomi.commands.options import Limit, Model, NewTokens, Prompt, Rows, Seed, Temperature, TopP
from shikomi.commands.output import Device, Dtype, Json, Revision, TokenEnv, emit, one_of, showing, split_list
from shikomi.errors import BadInput, Problem
from shikomi.progress import Progress

if TYPE_CHECKING:
    from shikomi.inference import Ready

GENERATE = """The model's answer to one text. MODEL is an alias, folder, hub id, .gguf file, adapter or run.

A run that was trained with data.prompt puts your text into that template; a label set limits the answer to a label.

\b
Examples:
  shikomi generate smollm2 "Why is the sky blue?"
  shikomi generate runs/my "Some text"
  echo "Some text" | shikomi generate runs/my -
  shikomi generate smollm2 "Some text" --adapter legal=runs/legal --adapter plain=runs/plain
"""
PREDICT = """Answers for all rows of a file, written beside them as JSON lines with the key `prediction`.

\b
Examples:
  shikomi predict runs/my new.jsonl -o answers.jsonl
  shikomi predict smollm2 new.csv -o answers.jsonl --prompt "Translate to French: {text}"
"""
CHAT = """Talk with a model; works with piped input too, one message a line.

\b
In the chat:
  /base    the untouched model's answer to the same question
  /reset   forget the conversation
  /quit    leave (or Ctrl-D)

\b
Examples:
  shikomi chat runs/my
  echo "Why is the sky blue?" | shikomi chat smollm2
"""
MERGE = """Write a run's adapter into its base model: a plain transformers folder. Reports how far the logits drift.

\b
Examples:
  shikomi merge runs/my --output my-model
  shikomi merge runs/my --output my-model --dtype bf16
"""
COMBINE = """Make one LoRA adapter of several of the same base, and save it like PEFT.

\b
Methods, as PEFT's add_weighted_adapter has them:
  cat      the weighted sum of the updates, exactly; ranks add up (recommended)
  svd      the best approximation of that sum with rank --r
  linear   A and B summed each by itself: small, but not the sum of the updates; needs equal ranks
  ties     drops small entries, elects signs, averages those that agree (arXiv:2306.01708); needs equal ranks
  dare_linear, dare_ties   drop entries by chance first (arXiv:2311.03099); magnitude_prune: small ones
  ties_svd, dare_linear_svd, dare_ties_svd, magnitude_prune_svd   the same on the updates, then svd

DoRA, bottleneck, prefix and prompt adapters do not add up: hold them side by side (Python: model.add_adapter).

\b
Examples:
  shikomi combine runs/legal runs/medical -o both
  shikomi combine runs/a runs/b --weights 0.7,0.3 -o both
  shikomi combine runs/a runs/b --weights 1,-0.5 -o a-without-b
  shikomi combine runs/a runs/b runs/c --method ties --density 0.2 --weights 1,1,1 -o all
"""


def generate(
    model: Model,
    text: Annotated[str, typer.Argument(help="The text; - reads it from stdin.")],
    adapter: Annotated[
        list[str] | None,
        typer.Option("--adapter", metavar="NAME=FOLDER", help="An adapter of MODEL; each that is given answers."),
    ] = None,
    max_new_tokens: NewTokens = 256,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = 0,
    dtype: Dtype = "auto",
    device: Device = "auto",
    revision: Revision = None,
    token_env: TokenEnv = None,
    as_json: Json = False,
) -> None:
    """Streams to stdout."""
    if text == "-":
        text = sys.stdin.read().strip()
    if not text.strip():
        raise BadInput([Problem("an empty text", fix='shikomi generate MODEL "Some text"')])
    pairs = [_named(pair) for pair in adapter or ()]
    with showing(as_json) as progress:
        ready = open_named(model, revision, token_env, dtype, device, progress)
        answers = {}
        for name, folder in pairs:
            progress.phase(f"loading {name}")
            ready.add_adapter(name, folder)
        for name, _ in pairs:
            progress.phase(f"generating with {name}")
            ready.use(name)
            answers[name] = ready.generate(text, max_new_tokens, temperature, top_p, seed)
        if pairs:
            progress.finish()
            emit({"model": model, "text": text, "answers": answers}) if as_json else _by_name(answers)
            return
        progress.phase("generating")
        stream = None if as_json else _stream_to_stdout(progress)
        answer = ready.generate(text, max_new_tokens, temperature, top_p, seed, stream)
    emit({"model": model, "text": text, "answer": answer}) if as_json else print()


def predict(
    model: Model,
    file: Rows,
    output: Annotated[Path, typer.Option("--output", "-o", help="The JSON lines to write.")],
    prompt: Prompt = None,
    max_new_tokens: NewTokens = 256,
    limit: Limit = None,
    force: Annotated[bool, typer.Option(help="Write over an existing file.")] = False,
    dtype: Dtype = "auto",
    device: Device = "auto",
    revision: Revision = None,
    token_env: TokenEnv = None,
    as_json: Json = False,
) -> None:
    """One line of output for each row."""
    if output.exists() and not force:
        raise BadInput([Problem("is there already", str(output), fix="choose another --output, or add --force")])
    with showing(as_json) as progress:
        ready = open_named(model, revision, token_env, dtype, device, progress)
        count = 0
        partial = output.with_name(output.name + ".partial")
        try:
            with partial.open("w", encoding="utf-8") as out:
                answered = ready.predict(file, prompt, max_new_tokens=max_new_tokens, limit=limit, progress=progress)
                for row in answered:
                    out.write(json.dumps(row, ensure_ascii=False) + "\n")
                    count += 1
            partial.replace(output)
        finally:
            partial.unlink(missing_ok=True)
    emit({"model": model, "rows": count, "output": output}) if as_json else print(f"{count:,} rows: {output}")


def chat(
    model: Model,
    system: Annotated[str | None, typer.Option(help="A system message.")] = None,
    max_new_tokens: NewTokens = 512,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = 0,
    dtype: Dtype = "auto",
    device: Device = "auto",
    revision: Revision = None,
    token_env: TokenEnv = None,
) -> None:
    """Reads a line, answers, and so on."""
    from shikomi.commands.conversation import Conversation, talk

    with showing() as progress:
        ready = open_named(model, revision, token_env, dtype, device, progress)

    def answer(messages: list[dict[str, Any]], stream: Callable[[str], None]) -> str:
        return ready.generate(messages, max_new_tokens, temperature, top_p, seed, stream)

    talk(Conversation(answer, ready.base, system), model)


def merge(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run, or a PEFT adapter folder.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The new folder.")],
    dtype: Annotated[
        str,
        typer.Option(
            callback=one_of("auto", "fp32", "bf16", "bf16-stochastic"),
            help="Numbers of the merged weights: auto, fp32, bf16, or bf16-stochastic (rounded up or down by chance).",
        ),
    ] = "auto",
    as_json: Json = False,
) -> None:
    """Refuses a folder that is not empty."""
    with showing(as_json) as progress:
        progress.phase("importing torch")
        from shikomi import inference

        found = inference.merge(run, output, dtype, progress)
    if as_json:
        emit({"output": output, **found})
        return
    for key, value in found.items():
        print(f"{key}: {value:.3g}" if isinstance(value, float) else f"{key}: {value}")
    print(f"merged model: {output}")


def combine(
    adapters: Annotated[list[str], typer.Argument(metavar="RUN", help="Runs, or PEFT adapter folders.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The new adapter folder.")],
    weights: Annotated[str | None, typer.Option(help="One for each, comma-separated; absent: equal shares.")] = None,
    method: Annotated[str, typer.Option(help="cat, svd, linear, ties ...: see above.")] = "cat",
    density: Annotated[float | None, typer.Option(help="Share of entries kept, where some are dropped: 0.5.")] = None,
    majority_sign_method: Annotated[
        str, typer.Option(help="How ties elects a sign: total (of the values) or frequency.")
    ] = "total",
    r: Annotated[int | None, typer.Option("--r", help="Rank after svd; absent: the largest of the adapters.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of dare.")] = 0,
    as_json: Json = False,
) -> None:
    """Refuses a folder that is not empty."""
    numbers = _numbers(weights) if weights is not None else None
    with showing(as_json) as progress:
        progress.phase("importing torch")
        from shikomi.checkpoint.combine import combine_adapters

        progress.phase("combining")
        found = combine_adapters(adapters, output, numbers, method, density, majority_sign_method, r, seed)
    if as_json:
        emit(found)
        return
    for part in found["adapters"]:
        print(f"{part['weight']:g} x {part['adapter']}")
    print(f"{method}, rank {found['r']}, {found['modules']} modules, {found['parameters']:,} parameters")
    for note in found["notes"]:
        print(f"note: {note}")
    print(f"adapter: {output}")


def _named(pair: str) -> tuple[str, str]:
    name, separator, folder = pair.partition("=")
    if not (name and separator and folder):
        raise BadInput([Problem("--adapter: not a name with a folder", found=repr(pair), allowed="NAME=FOLDER")])
    return name, folder


def _by_name(answers: dict[str, str]) -> None:
    for name, answer in answers.items():
        print(f"{name}: {answer}")


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in split_list(text)]
    except ValueError as error:
        raise BadInput([Problem("--weights: not numbers", found=repr(text), allowed="such as 0.7,0.3")]) from error


def open_named(
    model: str, revision: str | None, token_env: str | None, dtype: str, device: str, progress: Progress
) -> Ready:
    progress.phase("importing torch")
    from shikomi.inference import open_model

    return open_model(model, revision, token_env, dtype, device, progress)


def _stream_to_stdout(progress: Progress) -> Callable[[str], None]:
    """Prints pieces of the answer as they come; the display is taken down before the first."""
    started = False

    def piece(text: str) -> None:
        nonlocal started
        if not started:
            progress.finish()
            started = True
        print(text, end="", flush=True)

    return piece
