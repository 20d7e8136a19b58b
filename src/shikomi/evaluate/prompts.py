"""prompt.yaml: a prompt as a result. A model, an instruction, templates and solved examples, used like an adapter."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from shikomi.data.columns import ColumnTemplate
from shikomi.data.conversation import Conversation
from shikomi.data.encode import Encoder
from shikomi.data.formats import parse_row
from shikomi.errors import BadInput, Problem, nearest
from shikomi.evaluate.baselines import answer_of, with_shots
from shikomi.recipe import DataSpec, Source
from shikomi.recipe.load import read_recipe_file
from shikomi.recipe.template import Page
from shikomi.recipe.tree import Block, Items, Where, shown

SUFFIXES = (".yaml", ".yml")
LENGTH = 2048
"""Tokens of a prompt with its answer where the file does not say: the context of the smallest models in use."""

KEYS = {
    "model": "alias, folder, hub id, file.gguf, adapter or run",
    "system": "the instruction: a system message before everything",
    "prompt": "the columns of a row become the user's turn",
    "completion": "the right answer, for `eval` and in the shots",
    "labels": "the only answers that count: the most probable of them is given",
    "max_length": "tokens of prompt and answer; shots that do not fit are left out, the last first",
    "shots": "solved examples, as rows of a data file",
}
RECIPE_KEYS = (
    "adapter",
    "data",
    "objective",
    "quant",
    "stages",
)  # by which a recipe is known that was given by mistake


@dataclass(frozen=True)
class PromptFile:
    """What a prompt.yaml says. `shots` are rows as they stand in a data file; they go through the same templates."""

    model: str
    system: str | None = None
    prompt: str | None = None
    completion: str | None = None
    labels: tuple[str, ...] | None = None
    max_length: int = LENGTH
    shots: tuple[Mapping[str, Any], ...] = ()

    @property
    def spec(self) -> DataSpec:
        """How a row becomes a conversation."""
        source = (Source(path="-"),)
        return DataSpec(train=source, prompt=self.prompt, completion=self.completion, labels=self.labels)


class Prompted:
    """A prompt file in use: rows and conversations get its instruction and as many of its examples as fit."""

    def __init__(self, file: PromptFile, shots: Sequence[Conversation]) -> None:
        self.file = file
        self.shots = tuple(shots)
        self.on = True

    @contextmanager
    def off(self) -> Iterator[None]:
        """Within: rows are shown as they are."""
        before, self.on = self.on, False
        try:
            yield
        finally:
            self.on = before

    def shown(self, row: Conversation, shots: int | None = None) -> Conversation:
        """The row as the model sees it, with the first `shots` examples (None: all)."""
        if not self.on:
            return row
        return with_system(with_shots(row, self.shots[:shots]), self.file.system)

    def encode(self, row: Conversation, encoder: Encoder, room: int) -> list[int]:
        """The prompt's tokens with as many examples as leave `room` tokens for the answer."""
        for shots in range(len(self.shots), -1, -1):
            ids = encoder.encode_prompt(self.shown(row, shots))
            if len(ids) + room <= self.file.max_length:
                break
        return ids


def with_system(conversation: Conversation, system: str | None) -> Conversation:
    """The conversation with this system message in front; one that has its own keeps that."""
    messages, plain = conversation.messages, conversation.plain
    if system is None or (messages and messages[0]["role"] == "system"):
        return conversation
    if messages:
        messages = ({"role": "system", "content": system}, *messages)
    if plain:
        plain = (f"{system}\n\n{plain[0]}", plain[1])
    start = conversation.completion_from + (len(messages) - len(conversation.messages))
    return replace(conversation, messages=messages, plain=plain, completion_from=start)


def is_prompt_file(name: str | Path) -> bool:
    """Whether `name` is a file that `load_prompt` should read."""
    path = Path(name)
    return path.suffix.lower() in SUFFIXES and path.is_file()


def load_prompt(path: str | Path) -> Prompted:
    """Reads a prompt.yaml. Raises BadInput with every problem in it, each with its line."""
    tree = read_recipe_file(Path(path))
    problems = list(_unknown_keys(tree))
    texts = {key: _text(tree, key, problems) for key in ("model", "system", "prompt", "completion")}
    if "model" not in tree:
        problems.append(tree.where.problem("`model` is missing", fix=f"add it: {KEYS['model']}"))
    labels = _labels(tree, problems)
    length = tree.get("max_length", LENGTH)
    if not isinstance(length, int) or isinstance(length, bool) or length < 8:
        problems.append(tree.place("max_length").problem("`max_length`", shown(length), "a whole number from 8 on"))
        length = LENGTH
    problems += [p for key in ("prompt", "completion") for p in _template_problems(tree, key, texts[key])]
    if texts["completion"] is not None and texts["prompt"] is None:
        place = tree.place("completion")
        problems.append(place.problem("`completion` without `prompt`", fix='add prompt: "{column}"'))
    file = PromptFile(texts["model"] or "", texts["system"], texts["prompt"], texts["completion"], labels, length)
    rows = _shot_rows(tree, problems)
    shots = [] if problems else _parsed(file, rows, problems)
    if problems:
        raise BadInput(sorted(problems, key=lambda problem: (problem.line is None, problem.line or 0)))
    return Prompted(replace(file, shots=tuple(row for row, _ in rows)), shots)


def prompted(file: PromptFile) -> Prompted:
    """A prompt file from Python. Raises BadInput for shots that are no rows."""
    problems: list[Problem] = []
    shots = _parsed(file, [(row, Where("shots", number)) for number, row in enumerate(file.shots, 1)], problems)
    if problems:
        raise BadInput(problems)
    return Prompted(file, shots)


def prompt_text(file: PromptFile, reasons: Mapping[str, str] | None = None, heading: str | None = None) -> str:
    """The file's text in YAML, with a comment for each key; `load_prompt` reads the same from it."""
    page = Page({**KEYS, **(reasons or {})})
    page.heading(heading)
    page.key("model", file.model)
    for key, value in (("system", file.system), ("prompt", file.prompt), ("completion", file.completion)):
        if value is not None:
            page.key(key, value)
    if file.labels:
        page.words("labels", file.labels, indent=0)
    page.key("max_length", file.max_length)
    page.above(page.reasons["shots"], 0)
    page.line("shots:" if file.shots else "shots: []")
    for row in file.shots:
        page.item(row, indent=2)
    return page.text()


def _unknown_keys(tree: Block) -> Iterator[Problem]:
    for key in tree:
        if key in KEYS:
            continue
        if key in RECIPE_KEYS:
            fix = "`shikomi train` takes a recipe; give its run (runs/NAME) here"
            yield tree.place(key).problem(f"`{key}`: this is a recipe, not a prompt file", fix=fix)
            return
        close = nearest(key, KEYS)
        meant = f"did you mean `{close}`?" if close else None
        yield tree.place(key).problem(f"unknown key `{key}`", allowed=", ".join(KEYS), fix=meant)


def _text(tree: Block, key: str, problems: list[Problem]) -> str | None:
    value = tree.get(key)
    if key not in tree:
        return None
    if isinstance(value, str) and value.strip():
        return value
    problems.append(tree.place(key).problem(f"`{key}`", shown(value), "text"))
    return None


def _labels(tree: Block, problems: list[Problem]) -> tuple[str, ...] | None:
    if "labels" not in tree:
        return None
    value = tree["labels"]
    if not isinstance(value, Items) or len(value) < 2:
        problems.append(tree.place("labels").problem("`labels`", shown(value), "a list of at least two texts"))
        return None
    for i, label in enumerate(value):
        if not isinstance(label, str) or not label.strip():
            fix = "put quotes around it" if isinstance(label, bool | int | float) else None
            problems.append(value.at[i].problem("`labels`", shown(label), "texts", fix))
        elif label in value[:i]:
            problems.append(value.at[i].problem(f"`labels` names {shown(label)} twice", fix="delete one of the two"))
    return tuple(str(label) for label in value)


def _template_problems(tree: Block, key: str, source: str | None) -> list[Problem]:
    if source is None:
        return []
    where = tree.place(key)
    try:
        ColumnTemplate.parse(key, source)
    except BadInput as error:
        return [replace(_in_words_of_a_prompt(p), file=where.file, line=where.line) for p in error.problems]
    return []


def _in_words_of_a_prompt(problem: Problem) -> Problem:
    """A problem of a row as the data stage tells it, without the recipe's block `data`."""

    def told(text: str | None) -> str | None:
        return text and text.replace("data.", "").replace(" in the recipe", "").replace("in the recipe: ", "")

    return replace(problem, what=told(problem.what) or "", allowed=told(problem.allowed), fix=told(problem.fix))


def _shot_rows(tree: Block, problems: list[Problem]) -> list[tuple[dict[str, Any], Where]]:
    value = tree.get("shots")
    if "shots" not in tree or (isinstance(value, Items) and not value):
        return []
    if not isinstance(value, Items):
        problems.append(tree.place("shots").problem("`shots`", shown(value), "a list of rows"))
        return []
    rows = []
    for shot, where in zip(value, value.at, strict=True):
        if isinstance(shot, Block):
            rows.append((_plain(shot), where))
        else:
            problems.append(where.problem("a shot", shown(shot), "a row: the columns that the templates name"))
    return rows


def _plain(tree: Any) -> Any:
    """A tree without its places."""
    if isinstance(tree, Block):
        return {key: _plain(value) for key, value in tree.items()}
    return [_plain(value) for value in tree] if isinstance(tree, Items) else tree


def _parsed(
    file: PromptFile, rows: Sequence[tuple[Mapping[str, Any], Where]], problems: list[Problem]
) -> list[Conversation]:
    """The shots as conversations that end with an answer."""
    shots = []
    for row, where in rows:
        try:
            shot = parse_row(row, file.spec, (where.file or "shots", where.line or 1), file.labels)
        except BadInput as error:
            problems += [_in_words_of_a_prompt(problem) for problem in error.problems]
            continue
        if answer_of(shot) is None:
            problems.append(where.problem("a shot without an answer", fix="end it with the assistant's turn"))
        shots.append(shot)
    return shots
