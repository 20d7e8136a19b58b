"""data pairs: pairs of answers for prompts that have none."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from shikomi.commands.options import NewTokens, Prompt, Seed
from shikomi.commands.output import Device, Dtype, Json, Revision, TokenEnv, command_line, emit, showing
from shikomi.errors import BadInput, Problem
from shikomi.progress import Progress

if TYPE_CHECKING:
    from shikomi.evaluate.made_pairs import Counts, Pairing
    from shikomi.evaluate.ranking import Ranker

RANKERS = "reward:FOLDER, function:FILE.py:NAME, reference:chrf, reference:rougeL, column:NAME"

PAIRS = """Pairs of answers for DPO and its relatives: a model's samples, ranked, the best against the worst.

MODEL is an alias, folder, hub id, .gguf file, adapter or run; PROMPTS has rows with prompts, as for training. What says
which answer is better:

\b
  reward:FOLDER            a reward model (objective: reward), or a sequence classification model
  reference:chrf|rougeL    how near an answer is to the one in the row
  function:FILE.py:NAME    your NAME(prompt, answers, row), a number for each answer; this runs the code of FILE.py
  column:NAME              the rows hold answers and a score already: MODEL is then `none`, nothing is sampled

With --chosen reference the row's own answer is the chosen one and a sample the rejected one. Equal scores are left out.
The same command goes on where it was stopped. `margin` is the difference of the scores.

\b
Examples:
  shikomi data pairs runs/sft prompts.jsonl -o pairs.jsonl --samples 4 --rank-by reward:runs/reward
  shikomi data pairs runs/sft rows.jsonl -o pairs.jsonl --chosen reference
  shikomi data pairs none rated.jsonl -o pairs.jsonl --rank-by column:stars --min-margin 1
"""


def pairs(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="What answers; none with column:NAME.")],
    prompts: Annotated[Path, typer.Argument(metavar="PROMPTS", help="Rows: jsonl, json, csv or parquet.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The JSON lines to write, or to go on with.")],
    samples: Annotated[int | None, typer.Option(min=1, help="Answers to each prompt; absent: 4, or 1.")] = None,
    rank_by: Annotated[str | None, typer.Option(help="What ranks the answers: see above.")] = None,
    chosen: Annotated[str | None, typer.Option(help="reference: the row's own answer is the chosen one.")] = None,
    all_pairs: Annotated[bool, typer.Option(help="Every two answers, not the best and the worst alone.")] = False,
    min_margin: Annotated[float, typer.Option(min=0, help="Leave out pairs whose scores differ by less.")] = 0.0,
    temperature: Annotated[float, typer.Option(min=0, help="Of sampling.")] = 1.0,
    top_p: Annotated[float, typer.Option(min=0, max=1, help="Sample from the likeliest tokens of this mass.")] = 1.0,
    max_new_tokens: NewTokens = 256,
    prompt: Prompt = None,
    completion: Annotated[str | None, typer.Option(help="Template of the row's answer: '{label}'.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="At most this many prompts.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Answers that are sampled together: the knob of memory.")] = 32,
    seed: Seed = 0,
    dtype: Dtype = "auto",
    device: Device = "auto",
    revision: Revision = None,
    token_env: TokenEnv = None,
    as_json: Json = False,
) -> None:
    """Samples, ranks, writes; says what was left out, and whether length alone tells the answers apart."""
    count = samples or (1 if chosen is not None and rank_by is None else 4)
    kind, _, what = (rank_by or "").partition(":")
    _check(rank_by, chosen, model, count, temperature)
    with showing(as_json) as progress:
        progress.phase("importing torch")
        from shikomi.evaluate.made_pairs import Pairing

        pairing = Pairing(all_pairs, min_margin, chosen is not None)
        if kind == "column":
            counts = _from_column(prompts, what, prompt, completion, limit, pairing, output)
        else:
            ranker = _ranker(kind, what, dtype, device, progress)
            from shikomi.evaluate import ranking
            from shikomi.evaluate.made_pairs import make_pairs
            from shikomi.inference import open_model

            ready = open_model(model, revision, token_env, dtype, device, progress)
            answered = chosen is not None or kind == "reference"
            asked = ready.questions(prompts, prompt, completion, limit, answered)
            decided = {
                **{"model": model, "model_digest": ready.held.files.digest(), "samples": count},
                **{"rank_by": rank_by, "rank_digest": ranking.ranker_digest(kind, what)},
                **{"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p},
            }
            counts = make_pairs(
                asked,
                output,
                lambda rows, key: ready.sample(rows, count, max_new_tokens, temperature, top_p, key),
                ranker,
                pairing,
                decided,
                seed,
                max(1, batch // count),
                progress,
            )
    if as_json:
        emit({"output": output, **vars(counts)})
        return
    for line in counts.lines():
        print(line)
    print(f"pairs: {output}; look at them with: {command_line('data', 'preview', output)}")


def _check(rank_by: str | None, chosen: str | None, model: str, samples: int, temperature: float) -> None:
    """Raises BadInput for options that do not go together, before anything is loaded."""
    kind, _, what = (rank_by or "").partition(":")
    problems = []
    if chosen not in (None, "reference"):
        problems.append(Problem("--chosen", found=chosen, allowed="reference"))
    if rank_by is None and chosen is None:
        problems.append(Problem("nothing says which answer is better", allowed=RANKERS, fix="--rank-by, or --chosen"))
    if rank_by is not None and (kind not in ("reward", "function", "reference", "column") or not what):
        problems.append(Problem("--rank-by", found=rank_by, allowed=RANKERS))
    if (kind == "column") != (model == "none"):
        fix = "MODEL `none` with --rank-by column:NAME, a model with anything else"
        problems.append(Problem("a column ranks answers that are there, nothing is sampled", found=model, fix=fix))
    if kind == "column" and chosen is not None:
        problems.append(Problem("--chosen and column:NAME do not go together", fix="take one of them out"))
    if chosen is None and kind != "column" and samples < 2:
        problems.append(Problem("one answer makes no pair", found=f"--samples {samples}", allowed="2 or more"))
    if samples > 1 and temperature == 0:
        problems.append(Problem("at temperature 0 all samples are equal", fix="--temperature 0.7, or --samples 1"))
    if problems:
        raise BadInput(problems)


def _ranker(kind: str, what: str, dtype: str, device: str, progress: Progress) -> Ranker | None:
    from shikomi.evaluate import ranking

    if kind == "reference":
        return ranking.by_reference(what)
    if kind == "function":
        progress.note(f"--rank-by function runs the code of {what.rpartition(':')[0]}")
        return ranking.by_function(what)
    if kind == "reward":
        from shikomi.inference import open_reward_model

        return ranking.by_reward(open_reward_model(what, dtype=dtype, device=device, progress=progress).score)
    return None


def _from_column(
    file: Path, column: str, prompt: str | None, completion: str | None, limit: int | None, pairing: Pairing, out: Path
) -> Counts:
    from shikomi.evaluate.made_pairs import pairs_from_column

    return pairs_from_column(file, column, {"prompt": prompt, "completion": completion}, limit, pairing, out)
