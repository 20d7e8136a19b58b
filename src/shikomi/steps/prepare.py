"""Before the first step: model files, tokenizer, tokens, and the rows that are evaluated; the run is not touched."""

import math
import os
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
from torch import Tensor
from transformers import AutoTokenizer

from shikomi.adapters.full import Full
from shikomi.adapters.lora import Lora
from shikomi.checkpoint.peft_format import load_adapter
from shikomi.data.check import Scan, labels_of, load_conversations, template_labels
from shikomi.data.conversation import Conversation
from shikomi.data.encode import Encoder
from shikomi.data.order import Steps
from shikomi.data.packing import Example
from shikomi.data.sources import fingerprint
from shikomi.data.split import Split, split_rows
from shikomi.data.store import TokenStore
from shikomi.errors import BadInput, Problem
from shikomi.evaluate.run_eval import Task, choose_metrics, sample_rows
from shikomi.model.catalog import cache_root
from shikomi.model.check import weight_shapes
from shikomi.model.files import ModelFiles, resolve
from shikomi.model.language_model import LanguageModel
from shikomi.model.load import load_model
from shikomi.progress import Progress
from shikomi.recipe import build
from shikomi.recipe.schema import DataSpec, Recipe, Stage
from shikomi.registry import find
from shikomi.steps.memory import check_room

FEW_LABELS = 50  # distinct answers up to which a task without data.labels is scored as classification
ROWS_FOR_SHOTS = 20_000  # training rows that the few-shot and majority baselines look at


@dataclass(frozen=True)
class StageData:
    """The tokens of one stage and the order in which they are trained."""

    spec: DataSpec
    encoder: Encoder
    store: TokenStore
    steps: Steps
    total_steps: int
    validation: Task | None
    side: Split | None  # of a validation split: which rows are trained

    @property
    def steps_per_epoch(self) -> int:
        return self.steps.per_epoch

    def examples(self, step: int) -> list[Example]:
        """Examples of optimizer step `step`, a function of the seed and the step alone."""
        return [self.store[int(i)] for i in self.steps.indices(step)]

    def largest(self, micro_batch_tokens: int) -> list[Example]:
        """The fullest micro-batch that an optimizer step could hold: the longest rows, as many as fit."""
        lengths = self.store.lengths
        order = np.argsort(-lengths, kind="stable")[: self.steps.batch_size]
        chosen, tokens = [int(order[0])], int(lengths[order[0]])
        for index in order[1:]:
            if tokens + lengths[index] <= micro_batch_tokens:
                chosen.append(int(index))
                tokens += int(lengths[index])
        return [self.store[i] for i in chosen]


@dataclass(frozen=True)
class Prepared:
    """Everything that a run reads, checked."""

    recipe: Recipe
    files: ModelFiles
    stages: tuple[StageData, ...]
    test: Task | None
    labels: tuple[str, ...] | None
    fingerprints: dict[str, str]
    adapter: Any  # Lora or Full: the recipe's, or that of the adapter which is continued
    tensors: dict[str, Tensor] | None  # of the adapter which is continued
    memory_bound: int  # bytes that the run needs at least

    def train_rows(self) -> list[Conversation]:
        """Training rows as conversations, for the baselines that learn from them in the prompt."""
        data = self.recipe.data
        side = next((stage.side for stage in self.stages if stage.spec is data), None)
        scan = Scan(data.train, data, template_labels(data, self.labels), "train", side)
        return [item.conversation for item in islice(scan, ROWS_FOR_SHOTS)]

    def summary(self) -> dict[str, Any]:
        """What result.json says of the data."""
        reports = {
            f"{i + 1:02d}-{s.name}": d.store.report.as_dict()
            for i, (s, d) in enumerate(zip(self.recipe.stages, self.stages, strict=True))
        }
        return {"stages": reports, "labels": self.labels, "test_rows": len(self.test.rows) if self.test else 0}


def prepare(recipe: Recipe, progress: Progress) -> Prepared:
    """Finds the model, tokenizes the rows and reads what is evaluated. Raises BadInput with every problem found."""
    progress.phase("finding the model")
    token = os.environ.get(recipe.model_token_env) if recipe.model_token_env else None
    files = resolve(recipe.model, recipe.model_revision, token, progress)
    for note in files.notes:
        progress.note(note)
    adapter, tensors = _adapter(recipe, files, progress)
    bound = check_room(recipe, sum(p.stat().st_size for p in files.folder.glob("*.safetensors")), _parameters(files))
    progress.phase("reading the data")
    tokenizer = _tokenizer(recipe, files)
    labels = _labels(recipe)
    stages = tuple(_stage(recipe, stage, tokenizer, labels, progress) for stage in recipe.stages)
    test = None
    if recipe.evaluate is not None and recipe.data.test is not None:
        test = _test(recipe, stages[0].encoder, labels)
    elif recipe.evaluate is not None and stages[-1].validation is not None:
        progress.note("no data.test: the comparison is on the validation rows")
        held_back = sample_rows(stages[-1].validation.rows, recipe.evaluate.limit, recipe.seed)
        test = replace(stages[-1].validation, rows=held_back, metrics=choose_metrics(recipe.evaluate.metrics, labels))
    prints = {
        f"{i}.{role}.{s.path}": fingerprint(s, role)
        for i, stage in enumerate(recipe.stages)
        for role, sources in _sources(recipe.data_of(stage))
        for s in sources
    }
    return Prepared(recipe, files, stages, test, labels, {**prints, "model": files.digest()}, adapter, tensors, bound)


def _sources(spec: DataSpec) -> list[tuple[str, tuple]]:
    found = [("train", spec.train)]
    if isinstance(spec.validation, tuple):
        found.append(("validation", spec.validation))
    return found


def _tokenizer(recipe: Recipe, files: ModelFiles) -> Any:
    folder = files.folder
    if files.adapter is not None and (files.adapter / "tokenizer.json").is_file():
        folder = files.adapter
    tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    if recipe.new_tokens:
        tokenizer.add_tokens(list(recipe.new_tokens))
    return tokenizer


def _labels(recipe: Recipe) -> tuple[str, ...] | None:
    """The label set of a classification task, None for free text."""
    data = recipe.data
    if data.labels is not None:
        return tuple(data.labels)
    asked = set(recipe.evaluate.metrics) if recipe.evaluate else set()
    asked |= {s.metric_for_best_model.removeprefix("eval_") for s in recipe.stages}
    kinds: list[Any] = [find("metrics", name) for name in asked - {"loss"}]
    needs = any(kind.needs == "labels" for kind in kinds)
    if needs:
        return labels_of(data)
    if recipe.evaluate is not None and not recipe.evaluate.metrics:
        found = labels_of(data)
        return found if 2 <= len(found) <= FEW_LABELS else None
    return None


def _stage(
    recipe: Recipe, stage: Stage, tokenizer: Any, labels: tuple[str, ...] | None, progress: Progress
) -> StageData:
    spec = recipe.data_of(stage)
    encoder = Encoder(tokenizer, recipe.chat, recipe.chat_template, spec.train_on, recipe.max_length)
    train_side, validation_side = _split(recipe, spec)
    shown = template_labels(spec, labels if spec is recipe.data else None)
    store = TokenStore.build(spec.train, spec, encoder, cache_root() / "tokens", shown, "train", train_side, progress)
    for line in [*encoder.notes, *store.report.lines(recipe.max_length)]:
        progress.note(line)
    steps = Steps(
        len(store), stage.batch_size, _order_seed(recipe.seed, recipe.stages.index(stage)), stage.shuffle, store.weights
    )
    validation = None
    sources = spec.validation if isinstance(spec.validation, tuple) else spec.train if spec.validation else None
    if sources is not None:
        items = load_conversations(
            sources, spec, shown, "validation" if validation_side is None else "train", validation_side
        )
        metric = stage.metric_for_best_model.removeprefix("eval_")
        metrics = choose_metrics(list(dict.fromkeys(["loss", metric])), labels)
        validation = Task(
            tuple(i.conversation for i in items),
            encoder,
            metrics,
            labels,
            max_length=recipe.max_length,
            seed=recipe.seed,
        )
    elif stage.early_stopping_patience is not None or stage.load_best_model_at_end:
        key = "early_stopping_patience" if stage.early_stopping_patience is not None else "load_best_model_at_end"
        raise BadInput([Problem(f"{key} needs validation rows", fix="set data.validation: 0.05, or a file")])
    total = steps.total(stage.num_train_epochs, stage.max_steps)
    return StageData(spec, encoder, store, steps, total, validation, train_side)


def _order_seed(seed: int, stage: int) -> int:
    return (seed * 1009 + stage) % (1 << 63)


def _split(recipe: Recipe, spec: DataSpec) -> tuple[Split | None, Split | None]:
    """Training and validation side where the recipe asks for a share of the training rows."""
    if not isinstance(spec.validation, float):
        return None, None
    scan = Scan(spec.train, spec, template_labels(spec, None), "train")
    return split_rows(scan.conversations(), spec.validation, recipe.seed)


def _test(recipe: Recipe, encoder: Encoder, labels: tuple[str, ...] | None) -> Task:
    assert recipe.evaluate is not None and recipe.data.test is not None
    items = load_conversations(recipe.data.test, recipe.data, template_labels(recipe.data, labels), "test")
    rows = sample_rows([item.conversation for item in items], recipe.evaluate.limit, recipe.seed)
    return Task(
        rows,
        encoder,
        choose_metrics(recipe.evaluate.metrics, labels),
        labels,
        max_new_tokens=recipe.evaluate.max_new_tokens,
        max_length=recipe.max_length,
        seed=recipe.seed,
    )


def _adapter(recipe: Recipe, files: ModelFiles, progress: Progress) -> tuple[Any, dict[str, Tensor] | None]:
    """The adapter that is trained: fresh, or the one that `model:` named, with its tensors."""
    adapter: Any = build("adapters", recipe.adapter)
    if files.adapter is None:
        return adapter, None
    if isinstance(adapter, Full):
        fix = "merge it first: shikomi merge, and name the merged folder as model"
        raise BadInput([Problem("adapter: full cannot continue an adapter", found=str(files.adapter), fix=fix)])
    loaded = load_adapter(files.adapter)
    progress.note(f"continuing the adapter {files.adapter} with its own r, lora_alpha and target_modules")
    for note in loaded.notes:
        progress.note(note)
    return lora_of(loaded.config), loaded.tensors


def _parameters(files: ModelFiles) -> int:
    """Parameters of a model folder from the headers of its weights."""
    problems: list[Problem] = []
    return sum(math.prod(shape) for shape in weight_shapes(files.folder, problems).values())


def build_model(recipe: Recipe, prepared: Prepared, progress: Progress) -> LanguageModel:
    """The model with its adapter on it."""
    files = prepared.files
    progress.phase("loading the model")
    lm = load_model(
        str(files.folder),
        prepared.adapter,
        recipe.dtype,
        recipe.device,
        recipe.seed,
        recipe.max_length,
        recipe.new_tokens,
        _tokenizer_folder(files),
    )
    if prepared.tensors is not None and lm.attached is not None:
        lm.attached.load(prepared.tensors, str(files.adapter))
    lm.origin = files.origin
    lm.stop_ids = sorted({*lm.stop_ids, *prepared.stages[0].encoder.stop_ids})
    return lm


def _tokenizer_folder(files: ModelFiles) -> str | None:
    if files.adapter is not None and (files.adapter / "tokenizer.json").is_file():
        return str(files.adapter)
    return None


def lora_of(config: dict[str, Any]) -> Lora:
    """The options of a saved adapter, from PEFT's config."""
    fields = {name: config[name] for name in Lora.__dataclass_fields__ if config.get(name) is not None}
    return Lora(**fields)
