"""What advice depends on: how much data is much, the kinds of tasks, and the facts that the rules look at."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Levels:
    """Where "too few" ends, where "medium" and where "many" begin, each with its reason."""

    what: str
    few: int
    medium: int
    many: int
    why_few: str
    why_medium: str
    why_many: str


ROWS = Levels(
    *("rows with an answer", 50, 500, 100_000),
    "hosted services see a gain from 50 to 100 rows on, and a tenth of fewer says nothing when it is held back",
    "below it, several passes over the rows are worth their time",
    "full fine-tuning was measured ahead of LoRA at 110,000 rows of code and 262,000 of mathematics (arXiv:2405.09673)",
)
PAIRS = Levels(
    *("pairs of a better and a worse answer", 50, 500, 30_000),
    "a pair says less than an answer to copy: below it, chance decides",
    "below it, pairs that all agree let DPO's margin grow without end; IPO's has a target (arXiv:2310.12036)",
    "InstructGPT's reward model learned from 33,000 prompts (arXiv:2203.02155)",
)
THUMBS = Levels(
    *("answers with a thumb up or down", 100, 1_000, 60_000),
    "two judged answers say about as much as one pair",
    "as for pairs, twice as many",
    "as for pairs, twice as many",
)
TEXT = Levels(
    *("tokens of plain text", 10_000, 1_000_000, 100_000_000),
    "fewer fit into a prompt: put them there",
    "a few megabytes: enough for the words and the facts of a domain, seen more than once",
    "from here on a domain is large enough for a low rank to be what limits it (arXiv:2405.09673)",
)
LEVELS = {"rows": ROWS, "pairs": PAIRS, "thumbs": THUMBS, "text": TEXT}
AMOUNTS = ("none", "too few", "few", "medium", "many")
ENOUGH = ("few", "medium", "many")
SHORT = ("none", "too few")
YES, NO = "yes", "no"


def amount(what: str, count: int) -> str:
    """`count` of rows, pairs, thumbs or text (tokens) as one of AMOUNTS."""
    if count == 0:
        return "none"
    levels = LEVELS[what]
    bounds = (levels.few, levels.medium, levels.many)
    return AMOUNTS[1 + sum(count >= bound for bound in bounds)]


@dataclass(frozen=True)
class TaskFamily:
    """A kind of task: its usual path, and the answers to assume where nobody gives them."""

    title: str
    path: str
    assumed: Mapping[str, str]
    instruction: str


TASKS = {
    "chatbot": TaskFamily(
        "chatbot, assistant",
        "prompt -> SFT with LoRA -> DPO",
        {"prompt": NO, "knowledge": NO, "understands": NO, "checkable": NO},
        "You answer the questions of our users, briefly and politely. Say so when you do not know.",
    ),
    "classification": TaskFamily(
        "classification, tagging",
        "prompt -> LoRA if needed",
        {"prompt": NO, "knowledge": NO, "understands": NO, "checkable": NO},
        "Answer with the label alone.",
    ),
    "code": TaskFamily(
        "code generation",
        "prompt -> SFT with QLoRA -> RL with compile errors penalised, or DPO",
        {"prompt": NO, "knowledge": NO, "understands": NO, "checkable": YES},
        "Answer with code alone, without explanations. It must run as it is.",
    ),
    "summarisation": TaskFamily(
        "summarisation, translation",
        "prompt -> DPO",
        {"prompt": NO, "knowledge": NO, "understands": YES, "checkable": NO},
        "Answer with the result alone, without a word before or after it.",
    ),
}


@dataclass(frozen=True)
class Column:
    """A fact that cells look at. Without `ask`, it is counted, measured or computed, never asked for."""

    about: str
    values: tuple[str, ...]
    ask: str | None = None
    flags: str = ""


COLUMNS = {
    "family": Column("kind of task", tuple(TASKS), "What kind of task is it?", "--task"),
    "prompt": Column(
        "what a prompt reaches",
        ("zero-shot", "few-shot", NO),
        "Does a prompt to the untouched model solve it well enough?",
        "--prompt-solves, --examples-solve or --no-prompt-solves; --run-baseline measures it",
    ),
    "knowledge": Column(
        "a wholly new domain",
        (YES, NO),
        "Is it a wholly new domain: words and facts that the model has not seen?",
        "--new-knowledge or --no-new-knowledge",
    ),
    "understands": Column(
        "the model understands the task",
        (YES, NO),
        "Does the model understand the task: are its answers of the right kind, only not good enough?",
        "--understands or --no-understands",
    ),
    "checkable": Column(
        "a program can judge answers",
        (YES, NO),
        "Can a program tell a right answer from a wrong one (a compiler, tests)?",
        "--checkable or --no-checkable",
    ),
    "rows": Column("rows with answers", AMOUNTS, flags="--data FILE|COUNT"),
    "pairs": Column("pairs", AMOUNTS, flags="--pairs FILE|COUNT"),
    "thumbs": Column("thumbs", AMOUNTS, flags="--thumbs FILE|COUNT"),
    "text": Column("plain text", AMOUNTS, flags="--text FILE|TOKENS"),
    "longer": Column("chosen answers are mostly the longer ones", (YES, NO)),
    "trained": Column("a rule above trains something", (YES, NO)),
    "copies": Column("a rule above trains on rows", (YES, NO)),
    "reads": Column("a rule above trains on text", (YES, NO)),
    "room": Column("largest method that memory and money allow", ("full", "lora", "qlora", NO)),
}
