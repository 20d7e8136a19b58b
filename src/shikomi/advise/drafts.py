"""The recipe, or the prompt.yaml, of an outcome: text with a comment for each key that runs as it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shikomi.advise.facts import ENOUGH, ROWS, TASKS
from shikomi.advise.material import KEYS, Material, Materials
from shikomi.advise.outcomes import OUTCOMES
from shikomi.advise.starter import (
    VALIDATION_SHARE,
    comparison,
    other_splits,
    passes,
    reasons_of,
    run_name,
)
from shikomi.evaluate.prompts import PromptFile, prompt_text
from shikomi.recipe import starter_recipe
from shikomi.recipe.schema import LEARNING_RATE_ADAPTER, LEARNING_RATE_FULL, LEARNING_RATE_PREFERENCES

PRETRAIN_SHARE = 0.5  # of the learning rate of supervised fine-tuning: every token is trained, and old ones must stay
FEW_PREFERENCES = 5e-5  # as recipes/dpo.yaml: with 5e-6 a hundred steps and fewer change next to nothing
ORPO_RATE = 1e-4  # it learns answers, as supervised fine-tuning does
BETA = {"dpo": 0.1, "ipo": 0.1, "kto": 0.1, "orpo": 0.1, "simpo": 2.0}
SOURCES = {"kto": "thumbs", **dict.fromkeys(("dpo", "ipo", "orpo", "simpo"), "pairs")}
NEAREST_WHY = "the nearest that runs here: the same judgements, learned without a reward model"


@dataclass(frozen=True)
class Draft:
    """A text to write, what it is (recipe or prompt), and what it leaves to the reader."""

    text: str
    kind: str
    stages: tuple[str, ...]
    sources: tuple[Material, ...] = ()  # what each stage learns from
    notes: tuple[str, ...] = ()


def nearest(outcomes: Sequence[str], materials: Materials) -> tuple[str, ...]:
    """The outcomes with RLHF, which is not built, replaced by what learns from the same data; nothing stands twice."""
    found: list[str] = []
    for name in outcomes:
        if name != "rlhf":
            found.append(name)
        elif materials.amount("pairs") in ENOUGH:
            found.append("dpo")
        elif materials.amount("thumbs") in ENOUGH:
            found.append("kto")
    return tuple(found) or ("sft",)


def recipe_draft(
    outcomes: Sequence[str],
    adapter: str,
    materials: Materials,
    model: str,
    heading: str = "",
    output: str | None = None,
) -> Draft:
    """The recipe of outcomes that train, in order; `adapter` is lora, qlora or full, `output` the run's folder."""
    stages = ["sft" if name in ("lora", "qlora", "full") else name for name in nearest(outcomes, materials)]
    sources = [_source(stage, materials) for stage in stages]
    own = [i for i, stage in enumerate(stages) if stage == "sft" or sources[i].kind == "rows"]
    main = own[-1] if own else len(stages) - 1
    top = _data(stages[main], sources[main])
    top["reasons"] |= _adapter_reasons(adapter)
    common: dict[str, Any] = {
        "model": model,
        "r": 32 if "pretrain" in stages else 16,
        "quant": "nf4" if adapter == "qlora" else None,
        "adapter": "full" if adapter == "full" else None,
        "output_dir": output or f"runs/{run_name(Path(sources[main].path))}",
        "estimate": heading or None,
    }
    if len(stages) == 1:
        keys = _stage(stages[0], sources[0], adapter)
        objective = keys.pop("objective")
        reasons = top.pop("reasons")
        if stages[0] != "sft":
            reasons["learning_rate"] = _rate_reason(stages[0])
        text = starter_recipe(
            **common, **top, **keys, objective=None if objective == "sft" else objective, reasons=reasons
        )
    else:
        written = [
            _block(stage, source, adapter, i == main)
            for i, (stage, source) in enumerate(zip(stages, sources, strict=True))
        ]
        top["reasons"].pop("learning_rate", None)
        text = starter_recipe(**common, **top, stages=written)
    missing = [source for source in sources if source.detected is None]
    notes = tuple(f"{source.path} is not there yet: a line for each row, {KEYS[source.kind]}" for source in missing)
    return Draft(text, "recipe", tuple(stages), tuple(sources), notes)


def prompt_draft(file: PromptFile, heading: str = "") -> Draft:
    """The prompt.yaml of an outcome without training."""
    notes = () if file.shots else ("there are no examples yet: write some under `shots`",)
    return Draft(prompt_text(file, heading=heading or None), "prompt", (), (), notes)


def plain_prompt(family: str, materials: Materials, model: str) -> PromptFile:
    """The prompt without examples: what was found in the rows, and the instruction of the kind of task."""
    rows = materials.get("rows")
    found = rows.detected if rows is not None else None
    system = TASKS[family].instruction
    if found is None:
        return PromptFile(model, system)
    if found.labels and found.prompt is None:
        system = f"{system} The labels: {', '.join(found.labels)}."
    return PromptFile(model, system, found.prompt, found.completion, found.labels)


def _source(stage: str, materials: Materials) -> Material:
    """What a stage learns from; where there is none yet, a file that is to come."""
    if stage == "pretrain":
        there = [m for kind in ("text", "rows") if (m := materials.get(kind)) is not None and m.amount in ENOUGH]
        return there[0] if there else Material("text", 0, "text.jsonl")
    kind = SOURCES.get(stage, "rows")
    return materials.get(kind) or Material(kind, 0, f"{kind}.jsonl")


def _data(stage: str, source: Material) -> dict[str, Any]:
    """Arguments of the recipe for the rows of its own `data`, with their reasons."""
    found = source.detected
    validation, test = other_splits(Path(source.path)) if found is not None else (None, None)
    share = VALIDATION_SHARE if validation is None and test is None and source.rows >= ROWS.few else None
    reasons = {"train": f"not there yet; a line for each row: {KEYS[source.kind]}"} if found is None else (
        reasons_of(found)
    )  # fmt: skip
    reasons.pop("num_train_epochs", None)
    if share is not None:
        reasons["validation"] = "this share of the rows is kept out of training, to evaluate on"
    metrics, baselines = comparison(found) if found is not None else ((), ())
    return {
        "train": source.path,
        "validation": share if validation is None else str(validation),
        "test": None if test is None else str(test),
        "prompt": found.prompt if found else None,
        "completion": found.completion if found else None,
        "labels": found.labels if found else None,
        "format": "text" if source.kind == "text" else None,
        "train_on": "everything" if stage == "pretrain" and source.kind == "rows" else None,
        "metrics": metrics,
        "baselines": baselines,
        "reasons": reasons,
    }


def _stage(stage: str, source: Material, adapter: str) -> dict[str, Any]:
    """Objective, passes and learning rate of a stage."""
    full = LEARNING_RATE_FULL if adapter == "full" else LEARNING_RATE_ADAPTER
    if stage == "sft":
        return {"objective": "sft", "num_train_epochs": passes(source.rows), "learning_rate": full}
    if stage == "pretrain":
        return {"objective": "sft", "num_train_epochs": 1, "learning_rate": full * PRETRAIN_SHARE}
    few = source.amount not in ("medium", "many")
    rate = ORPO_RATE if stage == "orpo" else FEW_PREFERENCES if few else LEARNING_RATE_PREFERENCES
    rate *= LEARNING_RATE_FULL / LEARNING_RATE_ADAPTER if adapter == "full" else 1
    objective = {"name": stage, "beta": BETA[stage]}
    return {"objective": objective, "num_train_epochs": 3 if few else 1, "learning_rate": rate}


def _block(stage: str, source: Material, adapter: str, own_data: bool) -> tuple[str, dict[str, Any]]:
    """(comment, keys) of one of several stages; with `own_data` it reads the rows of the recipe's `data`."""
    keys: dict[str, Any] = {"name": stage, **_stage(stage, source, adapter)}
    if not own_data:
        data: dict[str, Any] = {"train": source.path}
        if source.kind == "text":
            data["format"] = "text"
        beside = other_splits(Path(source.path))[0] if source.detected is not None else None
        if beside is not None or source.rows >= ROWS.few:
            data["validation"] = VALIDATION_SHARE if beside is None else str(beside)
        keys = {"name": stage, "objective": keys.pop("objective"), "data": data, **keys}
    return _stage_reason(stage, source), keys


def _stage_reason(stage: str, source: Material) -> str:
    what = {"sft": "supervised fine-tuning", "pretrain": OUTCOMES["pretrain"].title}.get(stage) or OUTCOMES[stage].title
    return f"{what} on {source.shown}; {_rate_reason(stage)}" if stage != "sft" else f"{what} on {source.shown}"


def _rate_reason(stage: str) -> str:
    if stage == "pretrain":
        return "half the learning rate of supervised fine-tuning, so that what the model knows stays"
    if stage == "orpo":
        return "the learning rate is nearer that of supervised fine-tuning: it learns the chosen answers too"
    return "a far lower learning rate than for supervised fine-tuning: higher, and good answers fade too"


def _adapter_reasons(adapter: str) -> dict[str, str]:
    if adapter != "full":
        return {}
    return {
        "adapter": "every weight is trained; 16 bytes of memory for each parameter",
        "learning_rate": "a tenth of that with an adapter",
    }
