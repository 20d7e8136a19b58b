"""Before the first step: model files, tokenizer, tokens, and the rows that are evaluated; the run is not touched."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor
from transformers import AutoTokenizer

from shikomi.adapters.full import Full
from shikomi.adapters.lora import Lora
from shikomi.data.check import labels_of, load_conversations
from shikomi.data.conversation import Conversation
from shikomi.data.encode import Encoder
from shikomi.data.order import Steps
from shikomi.data.pairs import unshared_length
from shikomi.data.sources import fingerprint
from shikomi.data.split import Split
from shikomi.data.store import STORES, Store
from shikomi.errors import BadInput, Problem
from shikomi.evaluate.run_eval import Task, choose_metrics, sample_rows
from shikomi.model.catalog import cache_root
from shikomi.model.files import ModelFiles, resolve
from shikomi.model.language_model import LanguageModel
from shikomi.model.load import load_model
from shikomi.model.task import Task as ModelTask
from shikomi.plan.estimate import Rows
from shikomi.progress import Progress
from shikomi.quant.none import NoQuantization
from shikomi.recipe import build
from shikomi.recipe.schema import DataSpec, Recipe, Source, Stage
from shikomi.registry import find
from shikomi.steps.adapters import check_stages
from shikomi.steps.heads import check_task, task_of
from shikomi.steps.planned import Planned, check_lengths, check_room, measured_rows, plan_of
from shikomi.steps.rows import (
    answers,
    check_metric,
    check_precompute,
    first_answers,
    kind_of,
    kind_of_rows,
    shown_labels,
    split,
    test_rows,
)
from shikomi.steps.saved import put_in, saved_adapter

FEW_LABELS = 50  # distinct answers up to which a task without data.labels is scored as classification
ROWS_FOR_SHOTS = 20_000  # training rows that the few-shot and majority baselines look at


@dataclass(frozen=True)
class StageData:
    """The tokens of one stage and the order in which they are trained."""

    spec: DataSpec
    encoder: Encoder
    store: Store[Any]
    steps: Steps
    total_steps: int
    validation: Task | None  # of conversations
    side: Split | None  # of a validation split: which rows are trained
    kind: str = "conversations"  # what the objective learns from: that, pairs or thumbs
    held_back: Store[Any] | None = None  # validation rows of preferences
    labels: tuple[str, ...] | None = None  # what `{labels}` stands for

    @property
    def steps_per_epoch(self) -> int:
        return self.steps.per_epoch

    def examples(self, step: int) -> list[Any]:
        """Examples of optimizer step `step`, a function of the seed and the step alone."""
        return [self.store[int(i)] for i in self.steps.indices(step)]

    def measured(self, stage: Stage, max_length: int) -> Rows:
        """The rows in tokens, for the plan."""
        return measured_rows(self.store, self.examples, stage, self.kind, self.total_steps, max_length)

    def largest(self, micro_batch_tokens: int, share_prefix: bool = True) -> list[Any]:
        """The fullest micro-batch that an optimizer step could hold: the longest rows, as many as fit."""
        tokens_of = len if share_prefix or self.kind == "conversations" else unshared_length
        order = np.argsort(-self.store.lengths, kind="stable")[: self.steps.batch_size]
        longest, *others = [self.store[int(i)] for i in order]
        chosen, tokens = [longest], tokens_of(longest)
        for example in others:
            if tokens + tokens_of(example) <= micro_batch_tokens:
                chosen.append(example)
                tokens += tokens_of(example)
        return chosen


@dataclass(frozen=True)
class Prepared:
    """Everything that a run reads, checked."""

    recipe: Recipe
    files: ModelFiles
    stages: tuple[StageData, ...]
    test: Task | None
    labels: tuple[str, ...] | None
    fingerprints: dict[str, str]
    adapter: Any  # the recipe's, or that of the adapter which is continued
    tensors: dict[str, Tensor] | None  # of the adapter which is continued
    planned: Planned  # the memory that its stages will take

    @property
    def task(self) -> ModelTask:
        """What the run makes: a model that answers, or one that gives values."""
        return task_of(self.recipe)

    def train_rows(self) -> list[Conversation]:
        """Training rows as conversations, for the baselines that learn from them in the prompt."""
        data = self.recipe.data
        side = next((stage.side for stage in self.stages if stage.spec is data), None)
        return first_answers(data, self.labels, side, kind_of_rows(self.recipe), ROWS_FOR_SHOTS)

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
    scheme(recipe)
    check_stages(recipe, adapter)
    check_task(recipe, files, adapter)
    alone = plan_of(recipe, files, adapter)
    check_lengths(recipe, alone)
    check_room(recipe, alone)  # before the data is read: what even one short row needs
    progress.phase("reading the data")
    tokenizer = _tokenizer(recipe, files)
    labels = _labels(recipe)
    stages = tuple(_stage(recipe, stage, tokenizer, labels, progress) for stage in recipe.stages)
    test = None
    if recipe.evaluate is not None and recipe.data.test is not None:
        test = _test(recipe, stages[0].encoder, labels)
    elif recipe.evaluate is not None and (last := _validation_rows(recipe, stages[-1], labels)):
        progress.note("no data.test: the comparison is on the validation rows")
        test = _task(recipe, stages[-1].encoder, labels, last)
    rows = [d.measured(stage, recipe.max_length) for stage, d in zip(recipe.stages, stages, strict=True)]
    planned = plan_of(recipe, files, adapter, rows)
    check_room(recipe, planned)
    prints = {
        f"{i}.{role}.{s.path}": fingerprint(s, role)
        for i, stage in enumerate(recipe.stages)
        for role, sources in _sources(recipe.data_of(stage))
        for s in sources
    }
    return Prepared(recipe, files, stages, test, labels, {**prints, "model": files.digest()}, adapter, tensors, planned)


def stage_data(recipe: Recipe, progress: Progress) -> tuple[StageData, ...]:
    """The tokens of every stage as they are trained, for whoever only looks at them. Raises BadInput."""
    token = os.environ.get(recipe.model_token_env) if recipe.model_token_env else None
    tokenizer = _tokenizer(recipe, resolve(recipe.model, recipe.model_revision, token, progress))
    return tuple(_stage(recipe, stage, tokenizer, _labels(recipe), progress) for stage in recipe.stages)


def _sources(spec: DataSpec) -> list[tuple[str, tuple]]:
    found = [("train", spec.train)]
    if isinstance(spec.validation, tuple):
        found.append(("validation", spec.validation))
    return found


def _tokenizer(recipe: Recipe, files: ModelFiles) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(str(files.tokenizer_folder), local_files_only=True)
    if recipe.new_tokens:
        tokenizer.add_tokens(list(recipe.new_tokens))
    return tokenizer


def _labels(recipe: Recipe) -> tuple[str, ...] | None:
    """The label set of a classification task, None for free text."""
    data = recipe.data
    if data.labels is not None:
        return tuple(data.labels)
    if kind_of_rows(recipe) != "conversations":
        return None
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
    kind = kind_of(stage)
    check_metric(stage, kind)
    check_precompute(stage, build("objectives", stage.objective).needs)
    train_side, validation_side = split(spec, kind, recipe.seed)
    shown = shown_labels(spec, labels if spec is recipe.data else None, kind)
    build_store, cache = STORES[kind].build, cache_root() / "tokens"
    store = build_store(spec.train, spec, encoder, cache, shown, "train", train_side, progress)
    for line in [*encoder.notes, *store.report.lines(recipe.max_length)]:
        progress.note(line)
    steps = Steps(
        len(store), stage.batch_size, _order_seed(recipe.seed, recipe.stages.index(stage)), stage.shuffle, store.weights
    )
    validation, held_back = None, None
    sources, role = _validation_sources(spec)
    if sources and kind != "conversations":
        held_back = build_store(sources, spec, encoder, cache, shown, role, validation_side, progress)
    elif sources:
        items = load_conversations(sources, spec, shown, role, validation_side)
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
    return StageData(spec, encoder, store, steps, total, validation, train_side, kind, held_back, shown)


def _validation_sources(spec: DataSpec) -> tuple[tuple[Source, ...], str]:
    """Where validation rows come from, and which files of a folder: files of their own, or the training rows."""
    if isinstance(spec.validation, tuple):
        return spec.validation, "validation"
    return (spec.train, "train") if spec.validation else ((), "validation")


def _order_seed(seed: int, stage: int) -> int:
    return (seed * 1009 + stage) % (1 << 63)


def _test(recipe: Recipe, encoder: Encoder, labels: tuple[str, ...] | None) -> Task:
    return _task(recipe, encoder, labels, test_rows(recipe.data, labels, kind_of_rows(recipe)))


def _validation_rows(recipe: Recipe, data: StageData, labels: tuple[str, ...] | None) -> list[Conversation]:
    """The validation rows of a stage as conversations; none where there are none."""
    if data.validation is not None:
        return list(data.validation.rows)
    if data.held_back is None:
        return []
    sources, role = _validation_sources(data.spec)
    _, side = split(data.spec, data.kind, recipe.seed)
    return list(answers(sources, data.spec, labels, role, side, data.kind))


def _task(recipe: Recipe, encoder: Encoder, labels: tuple[str, ...] | None, found: Sequence[Conversation]) -> Task:
    """The comparison of the recipe's `evaluate` on these rows."""
    assert recipe.evaluate is not None
    return Task(
        sample_rows(found, recipe.evaluate.limit, recipe.seed),
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
    if recipe.new_tokens and not isinstance(adapter, Lora | Full):
        fix = "use adapter: lora, or take new_tokens out"
        what = f"adapter: {adapter.name} does not train embeddings, which new_tokens need"
        raise BadInput([Problem(what, found=", ".join(recipe.new_tokens), fix=fix)])
    if files.adapter is None:
        return adapter, None
    if isinstance(adapter, Full):
        fix = "merge it first: shikomi merge, and name the merged folder as model"
        raise BadInput([Problem("adapter: full cannot continue an adapter", found=str(files.adapter), fix=fix)])
    options, tensors, notes = saved_adapter(files.adapter)
    own = "r, lora_alpha and target_modules" if isinstance(options, Lora) else "options"
    progress.note(f"continuing the adapter {files.adapter} with its own {own}")
    for note in notes:
        progress.note(note)
    return options, tensors


def scheme(recipe: Recipe) -> Any:
    """How the base's linear maps are stored: None for as they were loaded. Raises BadInput for full fine-tuning."""
    quant: Any = build("quant", recipe.quant)
    if isinstance(quant, NoQuantization):
        return None
    if recipe.adapter.name == "full":
        fix = "use adapter: lora, or quant: none"
        raise BadInput([Problem(f"quant: {quant.name} freezes what adapter: full trains", fix=fix)])
    return quant


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
        str(files.tokenizer_folder),
        scheme(recipe),
        prepared.task,
    )
    if prepared.tensors is not None:
        put_in(lm, prepared.tensors, str(files.adapter))
    lm.origin = files.origin
    lm.stop_ids = sorted({*lm.stop_ids, *prepared.stages[0].encoder.stop_ids})
    return lm
