"""eval: scores of a model on a file, or of a reward model on pairs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from shikomi.commands.inference import open_named
from shikomi.commands.options import Completion, Limit, Model, NewTokens, Prompt, Rows
from shikomi.commands.output import Device, Dtype, Json, Revision, TokenEnv, emit, show, showing, split_list
from shikomi.errors import BadInput, Problem

EVAL = """Score a model on a file; every metric comes with a 95% interval.

Accuracy takes the most probable of the labels (constrained decoding), for a base model and a trained one alike.
`shikomi list metrics` shows all metrics. A run brings its own templates and labels.

A reward model is scored on pairs: how often the chosen answer has the larger value, beside what the length of the
answers alone would say.

\b
Examples:
  shikomi eval runs/my test.jsonl --metrics accuracy,macro_f1
  shikomi eval smollm2 text.jsonl --metrics loss,perplexity --json
  shikomi eval smollm2 test.csv --labels good,bad --prompt "Good or bad? {text}" --completion "{label}"
  shikomi eval runs/reward pairs.jsonl
"""


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
    given = {"--metrics": metrics, "--labels": labels, "--prompt": prompt, "--completion": completion}
    with showing(as_json) as progress:
        progress.phase("importing torch")
        from shikomi.inference import is_reward_model, open_reward_model

        if is_reward_model(model, revision, token_env, progress):
            if wrong := [name for name, value in given.items() if value is not None]:
                what = "a reward model is scored on pairs of prompt, chosen and rejected"
                raise BadInput([Problem(what, found=", ".join(wrong), fix=f"shikomi eval {model} {file}")])
            judge = open_reward_model(model, revision, token_env, dtype, device, progress)
            judged = judge.evaluate(file, limit, progress)
            progress.finish()
            _show_judged(model, file, judged, as_json)
            return
        ready = open_named(model, revision, token_env, dtype, device, progress)
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


def _show_judged(model: str, file: Path, judged: dict[str, Any], as_json: bool) -> None:
    """The accuracy of a reward model on pairs, under it that of the longer answer."""
    if as_json:
        emit({"model": model, "file": file, **judged})
        return
    from shikomi.evaluate.tables import evaluation_table
    from shikomi.evaluate.wording import change, change_interval

    length = {"metrics": judged["by_length"], "seconds": 0.0}
    print(f"{judged['n']:,} pairs of {file} (95% intervals)")
    show(evaluation_table({model: judged, "the longer answer": length}))
    gap = judged["difference"]
    print(f"against the longer answer: {change(gap['value'], gap['unit'])} ({change_interval(gap)})")
    print(f"mean value {judged['mean_reward']:.3g}, mean margin {judged['margin']:.3g}")
    for note in judged["notes"]:
        print(f"note: {note}")
