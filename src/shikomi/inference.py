"""A model ready to answer: an alias, a folder, a hub id, a GGUF file, an adapter, a run, or one with a prompt.yaml."""

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shikomi.checkpoint.merge import merge as merge_adapter
from shikomi.data.check import load_conversations, template_labels
from shikomi.data.columns import column_templates
from shikomi.data.conversation import Conversation
from shikomi.data.encode import Encoder
from shikomi.data.formats import PREFERENCES, parse_row
from shikomi.errors import BadInput, Problem
from shikomi.evaluate.labels import score_labels
from shikomi.evaluate.made_pairs import Answer
from shikomi.evaluate.prompts import Prompted, is_prompt_file, load_prompt
from shikomi.evaluate.ranking import Asked, asked
from shikomi.evaluate.run_eval import Task, choose_metrics, evaluate, sample_rows
from shikomi.model.files import ModelFiles, resolve
from shikomi.model.language_model import LanguageModel
from shikomi.model.task import check_policy, task_of_files
from shikomi.progress import Progress, Silent
from shikomi.recipe import DataSpec, Recipe, Source
from shikomi.steps.held import Held, open_held
from shikomi.steps.reward_model import RewardModel, open_reward

ROWS_AT_ONCE = 64  # rows answered together by `predict`


@dataclass(frozen=True)
class Ready:
    """A loaded model with the way its rows become prompts.

    It can hold several adapters of its base, one of them in force; the one that it was opened with is called "default".
    Each answers as it does when it is opened alone, and takes the memory of its own tensors only.
    """

    held: Held
    prompted: Prompted | None = None
    """Of a prompt.yaml: its instruction, templates, labels and examples are used instead of a run's."""

    @property
    def lm(self) -> LanguageModel:
        return self.held.lm

    @property
    def encoder(self) -> Encoder:
        return self.held.part.encoder

    @property
    def recipe(self) -> Recipe | None:
        """Of a run, else None."""
        return self.held.part.recipe

    @property
    def labels(self) -> tuple[str, ...] | None:
        """The label set of a prompt.yaml or of a run, else None."""
        if self.prompted is not None and self.prompted.file.labels is not None:
            return self.prompted.file.labels
        return self.held.part.labels

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of the adapters that it holds."""
        return self.held.names

    @property
    def active(self) -> str | None:
        """The name of the adapter in force; None: the base."""
        return self.held.active

    def add_adapter(self, name: str, folder: str | Path) -> None:
        """Loads another adapter of the same base (a run, an adapter folder, a hub id) beside those that are there.

        The one in force stays so: see `use`. Raises BadInput for a name that is taken, for an adapter of another base
        and for one that does not fit.
        """
        self.held.add(name, folder)

    def use(self, name: str | None) -> None:
        """Takes an adapter into force, or with None the base with its own chat template. Raises BadInput."""
        self.held.use(name)

    def remove(self, name: str) -> None:
        """Forgets an adapter; where it is in force, the base is afterwards. Raises BadInput for an unknown name."""
        self.held.remove(name)

    @contextlib.contextmanager
    def base(self) -> Iterator[None]:
        """Within: the untouched model answers, without the instruction and the examples of a prompt.yaml."""
        with self.lm.adapter_off(), self.prompted.off() if self.prompted is not None else contextlib.nullcontext():
            yield

    def generate(
        self,
        text: str | Sequence[dict[str, Any]],
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        stream: Callable[[str], None] | None = None,
    ) -> str:
        """The answer to a text, or to a conversation of messages.

        A text goes into the run's own prompt template where that has one column; with a label set the answer is the
        most probable label. Temperature 0 is greedy.
        """
        conversation = self._asked(text)
        (prompt,) = self._prompts([conversation], max_new_tokens)
        if self.labels is not None and isinstance(text, str):
            answer = self.labels[int(self._label_scores([prompt])[0].argmax())]
            if stream is not None:
                stream(answer)
            return answer
        ids = self.lm.generate([prompt], max_new_tokens, temperature, top_p, seed, stream)[0]
        return self.encoder.decode_answer(ids)

    def predict(
        self,
        file: str | Path,
        prompt: str | None = None,
        max_new_tokens: int = 256,
        limit: int | None = None,
        progress: Progress | None = None,
    ) -> Iterator[dict[str, Any]]:
        """The rows of a file, each with a "prediction", and with "probabilities" of the labels where there is a set.

        Raises BadInput with every problem of the file before the first row is answered.
        """
        spec, progress = self._spec(file, prompt, None), progress or Silent()
        source = Source(path=str(file), limit=limit)
        items = load_conversations([source], spec, template_labels(spec, self.labels), "test", answer=False)
        for start in range(0, len(items), ROWS_AT_ONCE):
            some = items[start : start + ROWS_AT_ONCE]
            prompts = self._prompts([item.conversation for item in some], max_new_tokens)
            for item, found in zip(some, self._answers(prompts, max_new_tokens), strict=True):
                yield {**item.row.data, **found}
            progress.tick(start + len(some), len(items), "predicting")

    def questions(
        self,
        file: str | Path,
        prompt: str | None = None,
        completion: str | None = None,
        limit: int | None = None,
        answered: bool = False,
    ) -> list[Asked]:
        """The prompts of a file, and with `answered` the rows' own answers. Raises BadInput with every problem."""
        spec = self._spec(file, prompt, completion)
        source = Source(path=str(file), limit=limit)
        items = load_conversations([source], spec, template_labels(spec, self.labels), "train", answer=answered)
        return [
            asked(i.conversation, i.row.data, (i.row.file, i.row.line), self.encoder.as_chat(i.conversation))
            for i in items
        ]

    def sample(
        self,
        rows: Sequence[Asked],
        samples: int,
        max_new_tokens: int = 256,
        temperature: float = 1.0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> list[list[Answer]]:
        """Several answers to each prompt, drawn together."""
        prompts = self._prompts([row.conversation for row in rows], max_new_tokens)
        found = self.lm.generate(prompts, max_new_tokens, temperature, top_p, seed, samples=samples)
        answers = [Answer(self.encoder.decode_answer(ids), len(ids) < max_new_tokens) for ids in found]
        return [answers[at : at + samples] for at in range(0, len(answers), samples)]

    def evaluate(
        self,
        file: str | Path,
        metrics: Sequence[str] = (),
        labels: Sequence[str] | None = None,
        prompt: str | None = None,
        completion: str | None = None,
        limit: int | None = None,
        max_new_tokens: int = 64,
        progress: Progress | None = None,
    ) -> dict[str, Any]:
        """Scores on a file: n, seconds, metrics {name: value with its 95% interval}, notes."""
        spec = self._spec(file, prompt, completion)
        known = tuple(labels) if labels else self.labels
        items = load_conversations([Source(path=str(file))], spec, template_labels(spec, known), "test")
        rows = sample_rows([item.conversation for item in items], limit, 0)
        task = Task(
            rows,
            self.encoder,
            choose_metrics(list(metrics), known),
            known,
            max_new_tokens=max_new_tokens,
            max_length=self.encoder.max_length or 1024,
        )
        given = self._prompts(rows, max_new_tokens) if self.prompted is not None else None
        done = evaluate(self.lm, task, given, progress)
        return {**done.to_json(), "notes": list(done.notes)}

    def _asked(self, text: str | Sequence[dict[str, Any]]) -> Conversation:
        if not isinstance(text, str):
            return Conversation(messages=tuple(text), completion_from=len(text))
        own = self._own_spec
        if own is not None and own.prompt is not None:
            columns = list(
                dict.fromkeys(c for t in column_templates(own).values() if t.key != "completion" for c in t.columns)
            )
            if len(columns) != 1:
                fix = "use `shikomi predict` on a file with these columns"
                raise BadInput([Problem("one text cannot fill the run's prompt", found=", ".join(columns), fix=fix)])
            row, spec = {columns[0]: text}, own
        else:
            row, spec = {"prompt": text, "completion": ""}, DataSpec(train=(Source(path="-"),))
        return parse_row(row, spec, ("text", 1), self.labels, answer=False)

    @property
    def _own_spec(self) -> DataSpec | None:
        """How the rows of a prompt.yaml or of a run become conversations; None where a model has no way of its own."""
        if self.prompted is not None:
            return self.prompted.file.spec
        if self.recipe is None:
            return None
        own = self.recipe.data  # of pairs and judged answers the question is read, by its keys or the recipe's template
        return own.model_copy(update={"format": "auto"}) if own.format in PREFERENCES else own

    def _prompts(self, rows: Sequence[Conversation], max_new_tokens: int) -> list[list[int]]:
        """Tokens of every row's prompt, those of a prompt.yaml with its instruction and examples."""
        if self.prompted is None:
            return [self.encoder.encode_prompt(row) for row in rows]
        answers = [self.encoder.encode_answer(label) for label in self.labels or ()]
        room = max(map(len, answers), default=max_new_tokens)
        return [self.prompted.encode(row, self.encoder, room) for row in rows]

    def _spec(self, file: str | Path, prompt: str | None, completion: str | None) -> DataSpec:
        spec = self._own_spec or DataSpec(train=(Source(path=str(file)),))
        if prompt is None and completion is None:
            return spec
        templates = {
            "prompt": prompt or spec.prompt or "{prompt}",
            "completion": completion or spec.completion or "{completion}",
        }
        return spec.model_copy(update=templates)

    def _label_scores(self, prompts: Sequence[Sequence[int]]) -> Any:
        assert self.labels is not None
        return score_labels(self.lm, prompts, [self.encoder.encode_answer(label) for label in self.labels])

    def _answers(self, prompts: list[list[int]], max_new_tokens: int) -> Iterator[dict[str, Any]]:
        if self.labels is None:
            for ids in self.lm.generate(prompts, max_new_tokens):
                yield {"prediction": self.encoder.decode_answer(ids)}
            return
        import numpy as np

        for scores in self._label_scores(prompts):
            p = np.exp(scores - scores.max())
            shares = dict(zip(self.labels, (p / p.sum()).round(6).tolist(), strict=True))
            yield {"prediction": max(shares, key=lambda name: shares[name]), "probabilities": shares}


def open_model(
    name: str | Path,
    revision: str | None = None,
    token_env: str | None = None,
    dtype: str = "auto",
    device: str = "auto",
    progress: Progress | None = None,
) -> Ready:
    """Loads what `name` means: alias, transformers folder, hub id, file.gguf, PEFT adapter folder or run directory.

    A prompt.yaml opens the model that it names. Raises BadInput for what cannot be found or read.
    """
    progress = progress or Silent()
    prompted = load_prompt(name) if is_prompt_file(name) else None
    if prompted is not None:
        name = prompted.file.model
    files = _resolved(name, revision, token_env, progress)
    check_policy(files, str(name))
    progress.phase("loading the model")
    return Ready(open_held(name, files, dtype, device), prompted)


def open_reward_model(
    name: str | Path,
    revision: str | None = None,
    token_env: str | None = None,
    dtype: str = "auto",
    device: str = "auto",
    progress: Progress | None = None,
) -> RewardModel:
    """Loads a reward model: a run of `objective: reward`, its PEFT adapter, or a sequence classification model.

    Raises BadInput for what cannot be found or read, and for a model that answers.
    """
    progress = progress or Silent()
    files = _resolved(name, revision, token_env, progress)
    progress.phase("loading the reward model")
    return open_reward(name, files, dtype, device)


def is_reward_model(
    name: str | Path, revision: str | None = None, token_env: str | None = None, progress: Progress | None = None
) -> bool:
    """Whether what `name` means gives values instead of answers. Raises BadInput for what cannot be found."""
    if is_prompt_file(name):
        return False
    return task_of_files(_resolved(name, revision, token_env, progress or Silent())) == "reward"


def _resolved(name: str | Path, revision: str | None, token_env: str | None, progress: Progress) -> ModelFiles:
    files = resolve(str(name), revision, os.environ.get(token_env) if token_env else None, progress)
    for note in files.notes:
        progress.note(note)
    return files


def merge(run: str | Path, output: str | Path, dtype: str = "auto", progress: Progress | None = None) -> dict[str, Any]:
    """Merges the adapter of a run (or an adapter folder) into its base; returns dtype and drift of logits or values.

    dtype: auto | fp32 | bf16 | bf16-stochastic. Raises BadInput where there is no adapter or `output` is not empty.
    """
    if dtype not in ("auto", "fp32", "bf16", "bf16-stochastic"):
        raise BadInput([Problem(f"unknown dtype {dtype!r}", allowed="auto, fp32, bf16, bf16-stochastic")])
    progress = progress or Silent()
    if Path(output).exists() and any(Path(output).iterdir()):
        raise BadInput([Problem("the output folder is not empty", str(output), fix="choose another --output")])
    if is_prompt_file(run):
        raise BadInput([Problem("a prompt has no weights to merge", str(run), fix="give a run, or an adapter folder")])
    opened = (open_reward_model if is_reward_model(run) else open_model)(run, progress=progress)
    progress.phase("merging")
    return merge_adapter(opened.lm, Path(output), dtype)  # type: ignore[arg-type]
