"""What a recipe holds once it is resolved: every default filled in, every path absolute, at least one stage.

`load_recipe` makes these from a file; they can be built from Python too. Nothing here imports torch.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, model_serializer

LEARNING_RATE_ADAPTER = 2e-4
LEARNING_RATE_FULL = 2e-5
PREFERENCES = ("cpo", "dpo", "ipo", "kto", "orpo", "simpo")  # objectives that learn from preferences
LEARNING_RATE_PREFERENCES, LEARNING_RATE_PREFERENCES_FULL = 5e-6, 5e-7

Steps = Annotated[int, Field(ge=1, le=1_000_000_000)]
ShortName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
Text = Annotated[str, Field(min_length=1)]


class Part(BaseModel):
    """Base of every part of a recipe: frozen, without unknown keys, without infinities."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())


class ComponentSpec(Part):
    """A component by name, with options: `lora`, or `{name: lora, r: 8}`."""

    name: ShortName = Field(description="Which component: the name of a file in its folder.")
    options: dict[str, Any] = Field(default_factory=dict, description="The component's own options.")

    @model_serializer
    def flat(self) -> str | dict[str, Any]:
        return {"name": self.name, **self.options} if self.options else self.name


class Source(Part):
    """One place that rows come from."""

    path: Text = Field(description="A file (jsonl, json, csv, parquet, txt), a folder, or a hub data set.")
    weight: float = Field(
        default=1.0, gt=0, le=1000, description="How often its rows are seen, relative to the other sources' rows."
    )
    limit: Steps | None = Field(default=None, description="Use only the first rows, at most this many.")
    split: Text | None = Field(default=None, description="Which split of a folder or of a hub data set.")


class DataSpec(Part):
    """Where the rows are and how a row becomes a conversation."""

    train: tuple[Source, ...] = Field(
        min_length=1, description="Training rows: a path, or a list of {path, weight, limit, split}."
    )
    validation: tuple[Source, ...] | Annotated[float, Field(gt=0, lt=1)] | None = Field(
        default=None,
        description="Rows evaluated during training: paths, or a share of the training rows to split off (0.05).",
    )
    test: tuple[Source, ...] | None = Field(
        default=None, description="Rows of the comparison after training; never used to choose anything."
    )
    format: Literal[
        "auto",
        "text",
        "messages",
        "sharegpt",
        "alpaca",
        "prompt_completion",
        "columns",
        "preference",
        "unpaired_preference",
    ] = Field(default="auto", description="What the rows look like; auto recognises them by their keys.")
    prompt: Text | None = Field(
        default=None, description="Template of the user's turn from the columns of a row: `Classify: {text}`."
    )
    completion: Text | None = Field(default=None, description="Template of the answer to train: `{label}`.")
    system: Text | None = Field(default=None, description="Template of the system message.")
    chosen: Text | None = Field(default=None, description="Template of the preferred answer, for pairs: `{better}`.")
    rejected: Text | None = Field(default=None, description="Template of the other answer, for pairs: `{worse}`.")
    margin: Text | None = Field(
        default=None,
        description="By how much the chosen answer is better, for pairs: `{score}`; absent: the column `margin`.",
    )
    desirable: Text | None = Field(
        default=None,
        description="Whether the answer is good (true or false), for KTO: `{thumb}`; absent: the column `label`.",
    )
    labels: tuple[Text, ...] | None = Field(
        default=None, min_length=2, description="The label set; absent: the sorted distinct training answers."
    )
    train_on: Literal["all", "last", "everything"] = Field(
        default="all",
        description="Which tokens are trained: all assistant turns, only the last one, or every token of the row.",
    )


class EvaluateSpec(Part):
    """The comparison after training: the trained model against the untouched one, on the same rows."""

    metrics: tuple[ShortName, ...] = Field(default=(), description="Scores to compute on the test rows.")
    baselines: tuple[Literal["zero-shot", "few-shot", "majority"], ...] = Field(
        default=("zero-shot", "few-shot"), description="What the trained model is compared with."
    )
    shots: int = Field(default=5, ge=1, le=100, description="Examples in the few-shot prompt.")
    limit: Steps | None = Field(default=None, description="Compare on at most this many test rows.")
    max_new_tokens: int = Field(default=64, ge=1, le=100_000, description="Longest answer generated for a score.")


class Stage(Part):
    """One objective trained on one set of rows; a stage starts from the result of the one before."""

    name: ShortName = Field(default="sft", description="Name of the stage's folder; absent: its objective's name.")
    objective: ComponentSpec = Field(
        default=ComponentSpec(name="sft"), description="What is minimised: sft, or {name: ..., its options}."
    )
    adapter: ComponentSpec | None = Field(
        default=None, description="What this stage trains, where that is not the recipe's `adapter`."
    )
    previous_adapter: Literal["continue", "freeze", "merge"] = Field(
        default="continue",
        description="What becomes of the adapter of the stage before: it is trained on, kept frozen under a new one, "
        "or merged into the weights before a new one is put on.",
    )
    data: DataSpec | None = Field(default=None, description="Rows of this stage; absent: the recipe's `data`.")
    num_train_epochs: float = Field(default=1.0, gt=0, le=10_000, description="Passes over the training rows.")
    max_steps: Steps | None = Field(default=None, description="Stop after this many optimizer steps.")
    batch_size: int = Field(
        default=16, ge=1, le=1_000_000, description="Examples per optimizer step, over all micro-batches and devices."
    )
    micro_batch_tokens: int = Field(
        default=2048, ge=8, le=100_000_000, description="Tokens computed at a time: the knob of memory."
    )
    learning_rate: float = Field(
        default=LEARNING_RATE_ADAPTER,
        gt=0,
        le=1,
        description="Peak learning rate; absent: 2e-4 with an adapter, 2e-5 with `adapter: full`; for objectives of "
        "preferences 5e-6 and 5e-7.",
    )
    lr_scheduler_type: Literal["constant", "linear", "cosine", "wsd"] = Field(
        default="linear", description="How the learning rate goes down after the warm-up."
    )
    warmup_steps: float = Field(
        default=0.03, ge=0, le=1_000_000_000, description="Steps of warm-up; below 1: a share of all steps."
    )
    weight_decay: float = Field(default=0.0, ge=0, le=1, description="Decoupled weight decay, on matrices only.")
    max_grad_norm: Annotated[float, Field(gt=0, le=1_000_000)] | None = Field(
        default=1.0, description="Clip the gradient to this norm; null: no clipping."
    )
    optim: ComponentSpec = Field(
        default=ComponentSpec(name="adamw"), description="The optimizer: adamw, or {name: adamw, adam_beta2: 0.95}."
    )
    shuffle: bool = Field(default=True, description="Another order of the rows in every epoch, drawn from `seed`.")
    logging_steps: Steps = Field(
        default=10, description="Steps between lines on the console and in the writers; metrics.jsonl has every step."
    )
    eval_steps: Steps | None = Field(
        default=None, description="Steps between evaluations on the validation rows; absent: at the end of each epoch."
    )
    save_steps: Steps | None = Field(
        default=None, description="Steps between checkpoints; absent: one every five minutes."
    )
    save_total_limit: Annotated[int, Field(ge=1, le=1_000_000)] | None = Field(
        default=2, description="Checkpoints kept, the newest; null: all."
    )
    early_stopping_patience: Annotated[int, Field(ge=1, le=1_000_000)] | None = Field(
        default=None, description="Stop after this many evaluations without a better `metric_for_best_model`."
    )
    load_best_model_at_end: bool = Field(
        default=False, description="Finish with the best checkpoint by `metric_for_best_model`, not the last."
    )
    metric_for_best_model: ShortName = Field(
        default="eval_loss", description="Which validation score decides: eval_loss, or eval_ and a metric's name."
    )
    sample_prompts: tuple[Text, ...] = Field(
        default=(), description="Prompts whose answers are generated and logged at every evaluation."
    )
    recompute: Literal["auto", "none", "full"] | Annotated[int, Field(ge=0, le=100_000)] = Field(
        default="auto", description="Layers computed again in the backward to save memory: auto, none, full, a number."
    )
    share_prefix: bool = Field(
        default=True, description="Compute the prompt that several examples share once per micro-batch."
    )
    reference: Literal["live", "precompute"] = Field(
        default="live",
        description="Where a reference policy's log-probabilities come from: computed in every step, or once for all "
        "rows before the first step, which costs a pass over the rows and saves one in every epoch.",
    )


OWN_KEYS = ("name", "adapter", "previous_adapter")
"""Keys of a stage that do not stand for every stage at the top of a file."""


class Recipe(Part):
    """A whole run. In a file, the keys of a stage may stand at the top: they are then every stage's defaults."""

    model: Text = Field(description="Alias, transformers folder, hub id, file.gguf, PEFT adapter folder or run folder.")
    model_revision: Text | None = Field(default=None, description="Branch, tag or commit of a hub model.")
    model_token_env: Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")] | None = Field(
        default=None, description="Environment variable that holds the hub token; absent: HF_TOKEN, where it is set."
    )
    quant: ComponentSpec = Field(default=ComponentSpec(name="none"), description="How the frozen base is stored.")
    adapter: ComponentSpec = Field(
        default=ComponentSpec(name="lora"), description="What is trained: lora, {name: lora, r: 8}, or full."
    )
    data: DataSpec = Field(description="Rows and how they become conversations; or just the path of training rows.")
    chat: Literal["auto", "always", "never"] = Field(
        default="auto",
        description="Whether plain prompts become a conversation; auto: when the model has a chat template.",
    )
    chat_template: Text | None = Field(
        default=None, description="A Jinja template, or the path of one, instead of the model's own."
    )
    new_tokens: tuple[Text, ...] = Field(default=(), description="Tokens added to the vocabulary; embeddings grow.")
    max_length: int = Field(
        default=1024, ge=8, le=1_000_000, description="Longest example in tokens; longer ones are cut and counted."
    )
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = Field(
        default="auto",
        description="How the base is stored; arithmetic is fp32 where the CPU has no bf16 units.",
    )
    device: Literal["auto", "cpu", "cuda", "mps"] = Field(default="auto", description="Where to train.")
    seed: int = Field(default=0, ge=0, le=2**32 - 1, description="Seed of initialisation, order and dropout.")
    stages: tuple[Stage, ...] = Field(min_length=1, description="What is done, in order; absent: one stage.")
    evaluate: EvaluateSpec | None = Field(default=None, description="The comparison after training; absent: none.")
    save_dtype: Literal["bf16", "fp32"] = Field(
        default="bf16", description="Numbers of the final adapter; checkpoints always keep fp32."
    )
    report_to: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = Field(
        default=(), description="Writers besides metrics.jsonl: none, tensorboard, wandb, trackio."
    )
    output_dir: Path = Field(description="Folder of the run; absent: runs/ and the recipe file's name.")
    _notes: tuple[str, ...] = PrivateAttr(default=())

    @property
    def name(self) -> str:
        """The run's short name: the last part of `output_dir`."""
        return self.output_dir.name

    @property
    def notes(self) -> list[str]:
        """What the loader understood from keys of other tools, one sentence each."""
        return list(self._notes)

    def with_notes(self, notes: list[str]) -> Recipe:
        """The same recipe, carrying these notes."""
        copy = self.model_copy()
        copy._notes = tuple(notes)
        return copy

    def data_of(self, stage: Stage) -> DataSpec:
        """The rows of a stage: its own `data`, else the recipe's."""
        return self.data if stage.data is None else stage.data

    def digest(self) -> str:
        """SHA-256 (hex) of everything that can change the trained weights; not of names, writers or saving."""
        content = self.model_dump(mode="json", exclude=_NOT_TRAINING)
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Recipe):
            return NotImplemented
        return self.model_dump() == other.model_dump()

    __hash__ = None  # type: ignore[assignment]


_NOT_TRAINING: Any = {
    "output_dir": True,
    "report_to": True,
    "model_token_env": True,
    "evaluate": True,
    "data": {"test": True},
    "stages": {
        "__all__": {
            "name": True,
            "logging_steps": True,
            "save_steps": True,
            "save_total_limit": True,
            "sample_prompts": True,
            "data": {"test"},
        }
    },
}
