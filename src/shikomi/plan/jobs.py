"""The jobs of a recipe: one for each stage, from the model's config.json, its components and its rows."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path
from typing import Any

from shikomi.errors import BadInput, Problem, nearest
from shikomi.model import catalog
from shikomi.model.check import ADAPTER_CONFIG, CONFIG, missing, read_safetensors_header
from shikomi.plan.architecture import SHIPPED, Architecture, known, known_names, of_folder
from shikomi.plan.estimate import Job, Rows
from shikomi.plan.lengths import rows_of
from shikomi.recipe import build
from shikomi.recipe.schema import Recipe, Stage

ALIASES = {"smollm2": "smollm2-135m"}
DTYPES = {"BF16": "bf16", "F16": "fp16", "F32": "fp32"}


@dataclass(frozen=True)
class Model:
    """What a recipe's `model` is, as far as a plan needs it."""

    architecture: Architecture
    folder: Path | None = None  # of the base, where it is on this machine
    file_bytes: int | None = None
    file_dtype: str = "bf16"
    quantized: bool = False
    continued: bool = False  # an adapter that was trained before
    tokenizer_bytes: int | None = None

    @classmethod
    def of(cls, folder: Path, continued: bool = False) -> Model:
        """A model folder with a config.json; weights need not be there."""
        files = sorted(folder.glob("*.safetensors"))
        kinds: Counter[str] = Counter()
        for path in files[:1]:
            for entry in read_safetensors_header(path).values():
                kinds[entry["dtype"]] += entry["data_offsets"][1] - entry["data_offsets"][0]
        dtype = DTYPES.get(kinds.most_common(1)[0][0], "bf16") if kinds else "bf16"
        size = sum(path.stat().st_size for path in files) or None
        model = of_folder(folder)
        quantized = bool((model.config or {}).get("quantization_config"))
        tokenizer = folder / "tokenizer.json"
        text = tokenizer.stat().st_size if tokenizer.is_file() else None
        return cls(model, folder, size, dtype, quantized, continued, text)


def model_of(name: str) -> Model:
    """The model of a recipe: an alias, a folder, a run, an adapter with its base, or a public model by name.

    Nothing is fetched. Raises BadInput where neither files nor a shipped architecture are there.
    """
    if name in ALIASES:
        found = next(row for row in catalog.listing() if row["name"] == name)
        return Model.of(Path(found["folder"])) if found["present"] else Model(known(ALIASES[name]))
    path = Path(name).expanduser()
    if path.is_dir():
        if (path / "final").is_dir():
            path = path / "final"
        if (path / ADAPTER_CONFIG).is_file():
            base = json.loads((path / ADAPTER_CONFIG).read_text(encoding="utf-8"))["base_model_name_or_path"]
            below = model_of(str(path / base) if base.startswith(".") else base)
            return replace(below, continued=True)
        if not (path / CONFIG).is_file():
            raise BadInput([Problem("config.json is missing", str(path), fix="give the folder of a model")])
        return Model.of(path)
    if path.suffix == ".gguf" and path.is_file():
        return Model.of(catalog.converted(path))
    if path.exists() or name.startswith((".", "/", "~")):
        raise missing(path)
    return _public(name)


def _public(name: str) -> Model:
    """A shipped architecture by its short name, or by the hub id that it is from."""
    if name in known_names():
        return Model(known(name))
    origins = {
        json.loads(p.read_text(encoding="utf-8"))["_name_or_path"].lower(): p.stem for p in SHIPPED.glob("*.json")
    }
    short = origins.get(name.lower()) or _longest_prefix(name.rpartition("/")[2].lower(), known_names())
    if short is not None:
        return Model(known(short))
    choices = [*ALIASES, *known_names()]
    close = nearest(name.rpartition("/")[2], choices)
    fix = f"did you mean {close}?" if close else "give a folder with its config.json"
    what = "the plan does not know this model: it is not on this machine, and no architecture of that name ships"
    raise BadInput([Problem(what, found=name, allowed=", ".join(choices), fix=fix)])


def _longest_prefix(name: str, names: Sequence[str]) -> str | None:
    """The longest of `names` that `name` begins with: Qwen3-8B-Base is a qwen3-8b."""
    return max((other for other in names if name.startswith(other)), key=len, default=None)


def jobs(recipe: Recipe, rows: Sequence[Rows | None] | None = None, model: Model | None = None) -> list[Job]:
    """The job of every stage; `rows` of each stage where they are known already.

    Raises BadInput for a model or rows that cannot be read, and for an adapter that cannot be put on the model.
    """
    found = model_of(recipe.model) if model is None else model
    made = []
    for number, stage in enumerate(recipe.stages):
        objective = build("objectives", stage.objective)
        given = rows[number] if rows is not None else None
        if given is None:
            given = rows_of(recipe.data_of(stage), objective.data, recipe.max_length, found.folder, recipe.chat)
        made.append(job_of(recipe, stage, found, given, objective))
    return made


def job_of(recipe: Recipe, stage: Stage, model: Model, rows: Rows, objective: Any) -> Job:
    """One stage as values. Raises BadInput for an adapter that cannot be put on the model."""
    adapter: Any = build("adapters", stage.adapter or recipe.adapter)
    quant: Any = build("quant", recipe.quant)
    adapter.trained_shapes(model.architecture)
    first = stage is recipe.stages[0]
    steps = stage.max_steps or max(1, ceil(stage.num_train_epochs * rows.count / stage.batch_size - 1e-9))
    return Job(
        architecture=model.architecture.as_reward() if "value" in objective.needs else model.architecture,
        adapter=adapter,
        quant=None if quant.name == "none" else quant,
        optim=build("optim", stage.optim),
        objective=objective,
        rows=rows,
        steps=steps,
        max_length=recipe.max_length,
        batch_size=stage.batch_size,
        micro_batch_tokens=stage.micro_batch_tokens,
        recompute=stage.recompute,
        share_prefix=stage.share_prefix,
        reference=stage.reference,
        fresh=not model.continued if first else stage.previous_adapter != "continue",
        new_tokens=len(recipe.new_tokens),
        save_steps=stage.save_steps,
        save_total_limit=stage.save_total_limit,
        save_dtype=recipe.save_dtype,
        evaluates=bool(recipe.evaluate or recipe.data_of(stage).validation),
        stage=stage.name,
        file_bytes=model.file_bytes,
        file_dtype=model.file_dtype,
        quantized=model.quantized,
        tokenizer_bytes=model.tokenizer_bytes,
    )
