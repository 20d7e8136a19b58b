"""What a stage of preferences has besides the loop: its references, its held-back rows, and a look at how it ended."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

from shikomi.checkpoint.rundir import RunDir
from shikomi.evaluate.preferences import PreferenceTask
from shikomi.model.catalog import cache_root
from shikomi.model.language_model import LanguageModel
from shikomi.objectives._objective import Objective
from shikomi.progress import Progress
from shikomi.recipe.schema import Recipe, Stage
from shikomi.steps.prepare import Prepared, StageData
from shikomi.steps.reference import fix_reference, precomputed
from shikomi.train.prepare import Live, Reference
from shikomi.train.state import State

FEWEST = 12  # optimizer steps below which nothing is said of how log-probabilities moved
LONGER = 1.1  # chosen answers of this many times the length of the rejected ones are said to be longer


def references(
    lm: LanguageModel,
    recipe: Recipe,
    objective: Objective[Any],
    prepared: Prepared,
    rundir: RunDir,
    state: State,
    progress: Progress,
) -> tuple[Reference | None, Reference | None]:
    """Where the reference's log-probabilities of a stage's training rows and held-back rows come from.

    (None, None) for an objective without a reference. Fixes it at the beginning of the stage; raises BadInput where a
    stage that goes on has lost it.
    """
    lm.fixed = None
    if not objective.needs & {"ref_logp", "kl"}:
        return None, None
    started = time.perf_counter()
    stage, data = recipe.stages[state.stage], prepared.stages[state.stage]
    fresh = prepared.tensors is None if state.stage == 0 else stage.previous_adapter != "continue"
    folder = rundir.path / "reference" / rundir.stage(state.stage + 1, stage.name).name
    told = fix_reference(lm, folder, fresh, state.step > 0)
    progress.note(told)
    rundir.log(told)
    if stage.reference == "live":
        return Live(lm), Live(lm)
    progress.phase("computing the reference of all rows")
    cache, model = cache_root() / "references", prepared.fingerprints["model"]
    found = [
        None if store is None else precomputed(lm, recipe, stage, model, store, cache, progress)
        for store in (data.store, data.held_back)
    ]
    lm.fixed = None  # its memory is free again
    if state.step == 0:
        state.training_seconds += time.perf_counter() - started
    return found[0], found[1]


def held_back_task(
    stage: Stage, data: StageData, objective: Objective[Any], reference: Reference | None, max_length: int
) -> PreferenceTask | None:
    """The evaluation of a stage on held-back preferences, where it has any."""
    if data.held_back is None:
        return None
    return PreferenceTask(
        data.held_back, objective, reference, stage.micro_batch_tokens, stage.share_prefix, max_length
    )


def failure(records: Sequence[Mapping[str, Any]]) -> str | None:
    """The known failure of preference training in words, from a stage's records; None where it does not show.

    A margin grows as well when both log-probabilities fall, the rejected ones faster (arXiv:2402.13228), and answers
    grow longer where the chosen ones are longer (arXiv:2403.19159).
    """
    steps = [record for record in records if "logps/chosen" in record and "logps/rejected" in record]
    if len(steps) < FEWEST:
        return None
    quarter = len(steps) // 4
    compared = "chosen_below_reference" in steps[0] or "kl" in steps[0]  # then rewards are measured from a reference
    chosen, rejected = (
        _mean(steps[-quarter:], f"rewards/{side}") if compared else _moved(steps, f"logps/{side}", quarter)
        for side in ("chosen", "rejected")
    )
    if max(chosen, rejected) >= 0:
        return None
    text = (
        f"both answers have become less likely, the chosen ones ({'reward' if compared else 'log-probability'} "
        f"{chosen:+.3g}) as well as the rejected ones ({rejected:+.3g}): the margin can grow while good answers fade"
    )
    longer = _mean(steps, "lengths/chosen") / max(1e-9, _mean(steps, "lengths/rejected"))
    if longer > LONGER:
        text += f"; the chosen answers are {longer - 1:.0%} longer, so that the model's own tend to grow"
    answers = [record["samples"] for record in records if record.get("samples")]
    if len(answers) > 1:
        first, last = (sum(len(sample["answer"]) for sample in some) / len(some) for some in (answers[0], answers[-1]))
        if last > LONGER * first:
            text += f"; the sample answers grew from {first:.0f} to {last:.0f} characters"
    return f"{text}. Lower learning_rate or raise beta; dpo with rpo_alpha: 1 holds the chosen answers up"


def _moved(steps: Sequence[Mapping[str, Any]], name: str, count: int) -> float:
    """How far the mean over the last `count` records is from that over the first."""
    return _mean(steps[-count:], name) - _mean(steps[:count], name)


def _mean(steps: Sequence[Mapping[str, Any]], name: str) -> float:
    return sum(float(step[name]) for step in steps) / len(steps)
