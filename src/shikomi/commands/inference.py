"""generate, predict, chat, eval and merge: using what was trained."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shikomi.commands.output import Device, Dtype, Json, Revision, TokenEnv, emit, one_of, show, showing, split_list
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
EVAL = """Score a model on a file; every metric comes with a 95% interval.

Accuracy takes the most probable of the labels (constrained decoding), for a base model and a trained one alike.
`shikomi list metrics` shows all metrics. A run brings its own templates and labels.

\b
Examples:
  shikomi eval runs/my test.jsonl --metrics accuracy,macro_f1
  shikomi eval smollm2 text.jsonl --metrics loss,perplexity --json
  shikomi eval smollm2 test.csv --labels good,bad --prompt "Good or bad? {text}" --completion "{label}"
"""
MERGE = """Write a run's adapter into its base model: a plain transformers folder. Reports how far the logits drift.

\b
Examples:
  shikomi merge runs/my --output my-model
  shikomi merge runs/my --output my-model --dtype bf16
"""

Model = Annotated[str, typer.Argument(metavar="MODEL|RUN", help="What answers.")]
Rows = Annotated[Path, typer.Argument(metavar="FILE", help="Rows: jsonl, json, csv or parquet.")]
NewTokens = Annotated[int, typer.Option("--max-new-tokens", min=1, help="Longest answer.")]
Temperature = Annotated[float, typer.Option(min=0, help="0: the most probable answer; above: sampled.")]
TopP = Annotated[float, typer.Option(min=0, max=1, help="Sample from the most probable tokens of this mass.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of sampling.")]
Prompt = Annotated[str | None, typer.Option(help="Template of the question: 'Classify: {text}'.")]
Completion = Annotated[str | None, typer.Option(help="Template of the reference answer: '{label}'.")]
Limit = Annotated[int | None, typer.Option(min=1, help="At most this many rows.")]


def generate(
    model: Model,
    text: Annotated[str, typer.Argument(help="The text; - reads it from stdin.")],
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
    with showing(as_json) as progress:
        ready = _open(model, revision, token_env, dtype, device, progress)
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
        ready = _open(model, revision, token_env, dtype, device, progress)
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
        ready = _open(model, revision, token_env, dtype, device, progress)

    def answer(messages: list[dict[str, Any]], stream: Callable[[str], None]) -> str:
        return ready.generate(messages, max_new_tokens, temperature, top_p, seed, stream)

    talk(Conversation(answer, ready.base, system), model)


def evaluate(
    model: Model,
    file: Rows,
    metrics: Annotated[str | None, typer.Option(help="Comma-separated; absent: those that suit the task.")] = None,
    labels: Annotated[str | None, typer.Option(help="The label set, comma-separated.")] = None,
    prompt: Prompt = None,
    completion: Completion = None,
    limit: Limit = None,
    max_new_tokens: NewTokens = 64,
    dtype: Dtype = "auto",
    device: Device = "auto",
    revision: Revision = None,
    token_env: TokenEnv = None,
    as_json: Json = False,
) -> None:
    """A table, or one JSON object."""
    with showing(as_json) as progress:
        ready = _open(model, revision, token_env, dtype, device, progress)
        found = ready.evaluate(
            file,
            split_list(metrics),
            labels=split_list(labels) or None,
            prompt=prompt,
            completion=completion,
            limit=limit,
            max_new_tokens=max_new_tokens,
            progress=progress,
        )
    if as_json:
        emit({"model": model, "file": file, **found})
        return
    from shikomi.evaluate.tables import evaluation_table

    print(f"{found['n']:,} rows of {file} (95% intervals)")
    show(evaluation_table({model: found}))
    for note in found["notes"]:
        print(f"note: {note}")


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


def _open(
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
