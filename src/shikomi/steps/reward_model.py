"""A reward model ready to give values: opened from a run or a folder, asked for answers or for pairs in a file."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from shikomi.data.conversation import Conversation, prompt_answer
from shikomi.data.encode import Encoder
from shikomi.data.formats import parse_row
from shikomi.data.pairs import Completion, Pair, Thumb
from shikomi.data.preference_scan import PairPass
from shikomi.errors import BadInput, Problem
from shikomi.evaluate.values import evaluate_pairs, values_of
from shikomi.model.files import ModelFiles
from shikomi.model.language_model import LanguageModel
from shikomi.model.load import load_model
from shikomi.model.task import check_reward_model
from shikomi.progress import Progress, Silent
from shikomi.recipe import DataSpec, Recipe, Source
from shikomi.steps.held import LENGTH, run_of
from shikomi.steps.prepare import scheme
from shikomi.steps.saved import put_in, saved_adapter

MICRO_BATCH_TOKENS = 2048

Answered = Mapping[str, Any] | Sequence[Mapping[str, Any]] | tuple[str, str]
"""An answer after its prompt: messages that end with the assistant's, (prompt, answer), or a row that holds either."""


@dataclass(frozen=True)
class RewardModel:
    """A loaded reward model with the way its rows become tokens."""

    lm: LanguageModel
    encoder: Encoder
    recipe: Recipe | None = None  # of a run

    def score(self, rows: Sequence[Answered], progress: Progress | None = None) -> list[float]:
        """The value of each answer, read at its last token, as training had it: the larger, the better.

        Values compare answers to one prompt; their zero means nothing. Raises BadInput, every problem at once, for rows
        that are no answers and for prompts that fill `max_length`.
        """
        problems: list[Problem] = []
        conversations = []
        for number, row in enumerate(rows, start=1):
            try:
                conversations.append([_answered(row, number)])
            except BadInput as error:
                problems += error.problems
        if problems:
            raise BadInput(problems)
        thumbs = []
        for number, answers in enumerate(self.encoder.encode_answers(conversations), start=1):
            if isinstance(answers, BadInput):
                problems += [replace(p, file=p.file or "rows", line=p.line or number) for p in answers.problems]
            elif not len(answers.answers[0].ids):
                what = "the prompt alone fills max_length, or the answer is empty"
                problems.append(Problem(what, "rows", number, f"{len(answers.prompt)} tokens before the answer"))
            else:
                answer = answers.answers[0]
                thumbs.append(Thumb(answers.prompt, Completion(answer.ids, answer.mask), True))
        if problems:
            raise BadInput(problems)
        values: list[float] = values_of(self.lm, thumbs, MICRO_BATCH_TOKENS, progress or Silent(), "values").tolist()
        return values

    def evaluate(self, file: str | Path, limit: int | None = None, progress: Progress | None = None) -> dict[str, Any]:
        """How often the chosen answer of a file's pairs has the larger value; see `evaluate.values.evaluate_pairs`.

        Raises BadInput with every problem of the file.
        """
        progress = progress or Silent()
        source = Source(path=str(file), limit=limit)
        spec = self.recipe.data if self.recipe is not None else DataSpec(train=(source,))
        scan = PairPass([source], spec, spec.labels, "test")
        pairs: list[Pair] = []
        for item, encoded in scan.encoded(self.encoder, progress):
            chosen, rejected = (Completion(answer.ids, answer.mask) for answer in encoded.answers)
            pairs.append(Pair(encoded.prompt, chosen, rejected, item.conversation.margin, len(pairs)))
        scan.problems.raise_if_any()
        found = evaluate_pairs(self.lm, pairs, MICRO_BATCH_TOKENS, progress)
        return found | {"notes": [*found["notes"], *scan.report.lines(self.encoder.max_length)]}


def _answered(row: Answered, number: int) -> Conversation:
    """A row as a conversation whose answer begins at its last turn. Raises BadInput where it has no answer."""
    where = ("rows", number)
    if isinstance(row, tuple):
        texts = [part for part in row if isinstance(part, str)]
        if not len(texts) == len(row) == 2:
            raise BadInput([Problem("not a prompt and an answer", *where, allowed="(prompt, answer), two strings")])
        found, _ = prompt_answer(None, texts[0], texts[1], texts[0])
        assert found is not None
        return found
    content = row if isinstance(row, Mapping) else {"messages": [dict(message) for message in row]}
    found = parse_row(content, DataSpec(train=(Source(path="-"),)), where)
    if not found.messages or found.messages[-1]["role"] != "assistant":
        allowed = "messages that end with the assistant's, or a prompt and a completion"
        raise BadInput([Problem("there is no answer to give a value", *where, allowed=allowed)])
    return replace(found, completion_from=max(found.completion_from, len(found.messages) - 1))


def open_reward(name: str | Path, files: ModelFiles, dtype: str, device: str) -> RewardModel:
    """Loads the reward model that `name` means, over the base as it was trained on. Raises BadInput for a policy."""
    check_reward_model(files, str(name))
    recipe, _ = run_of(Path(name))
    options: Any = None
    tensors: dict[str, Tensor] = {}
    if files.adapter is not None:
        options, tensors, _ = saved_adapter(files.adapter)
    lm = load_model(
        str(files.folder),
        options,
        dtype,
        device,
        max_length=recipe.max_length if recipe else LENGTH,
        tokenizer_folder=str(files.tokenizer_folder),
        quant=scheme(recipe) if recipe and files.adapter is not None else None,
        task="reward",
    )
    put_in(lm, tensors, str(files.adapter))
    lm.origin = files.origin
    assert lm.scalar is not None
    for parameter in (*lm.model.parameters(), *lm.trainable().values()):
        parameter.requires_grad_(False)
    chat, template = (recipe.chat, recipe.chat_template) if recipe else ("auto", None)
    train_on, max_length = (recipe.data.train_on, recipe.max_length) if recipe else ("all", None)
    encoder = Encoder(lm.tokenizer, chat, template, train_on, max_length)
    lm.stop_ids = sorted({*lm.stop_ids, *encoder.stop_ids})
    return RewardModel(lm, encoder, recipe)
