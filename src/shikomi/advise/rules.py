"""Which method for which task: one table of rules, read from top to bottom, that `advise` walks and the guide shows.

A question has rules; the first whose cells all hold says what to train, if anything, and which question comes next.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from shikomi.advise.facts import COLUMNS, ENOUGH, LEVELS, NO, SHORT, YES


@dataclass(frozen=True)
class Rule:
    """If all cells of `when` hold: train `adds`, and go on with the question `then` (None: done)."""

    name: str
    why: str
    when: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    adds: str | None = None
    then: str | None = None


@dataclass(frozen=True)
class Question:
    """A node of the tree: its rules are tried in order."""

    text: str
    rules: tuple[Rule, ...]


def _all_short(*names: str) -> dict[str, tuple[str, ...]]:
    return dict.fromkeys(names, SHORT)


TABLE: dict[str, Question] = {
    "prompt": Question(
        "Does a prompt solve it?",
        (
            Rule(
                "prompt-solves",
                "an instruction is enough: nothing is cheaper to change, and nothing has to be trained",
                {"prompt": ("zero-shot",)},
                adds="prompt",
            ),
            Rule(
                "examples-solve",
                "with some solved examples in the prompt it is good enough: tokens in every call, but no training",
                {"prompt": ("few-shot",)},
                adds="few-shot",
            ),
            Rule("prompt-falls-short", "a prompt does not solve it", then="material"),
        ),
    ),
    "material": Question(
        "Is there enough to learn from?",
        (
            Rule(
                "nothing-to-learn-from",
                "without rows, pairs, thumbs or text nothing can be trained: improve the prompt and collect answers",
                dict.fromkeys(LEVELS, ("none",)),
                adds="prompt",
            ),
            Rule(
                "too-little",
                "there is too little to train on: show the best of it in the prompt, and collect more",
                _all_short(*LEVELS),
                adds="few-shot",
            ),
            Rule(
                "only-text",
                "plain text is all there is to learn from: continued pre-training",
                _all_short("rows", "pairs", "thumbs"),
                adds="pretrain",
                then="adapter",
            ),
            Rule("enough-to-train", "there is enough to train on", then="knowledge"),
        ),
    ),
    "knowledge": Question(
        "Is it a wholly new domain?",
        (
            Rule(
                "new-domain",
                "new words and facts are learned from text in which they stand, token by token",
                {"knowledge": (YES,), "text": ENOUGH},
                adds="pretrain",
                then="task",
            ),
            Rule(
                "new-domain-in-rows",
                "there is no text of the new domain but in the rows: every token of them is learned, the questions too",
                {"knowledge": (YES,), "rows": ENOUGH},
                adds="pretrain",
                then="preference",
            ),
            Rule(
                "new-domain-without-text",
                "new facts cannot be learned from judgements of answers alone: find text, or put the facts into the "
                "prompt",
                {"knowledge": (YES,)},
                then="task",
            ),
            Rule("known-domain", "the domain is not new to the model", then="task"),
        ),
    ),
    "task": Question(
        "Does the model understand the task?",
        (
            Rule(
                "show-the-task",
                "a model that does not understand the task has to be shown answers: supervised fine-tuning",
                {"understands": (NO,), "rows": ENOUGH},
                adds="sft",
                then="preference",
            ),
            Rule(
                "show-and-prefer",
                "the chosen answers show the task and the rejected ones what to avoid, at once and without a reference",
                {"understands": (NO,), "pairs": ENOUGH},
                adds="orpo",
                then="adapter",
            ),
            Rule(
                "judged-answers-only",
                "answers with thumbs are all there is; the good ones show the task",
                {"understands": (NO,)},
                adds="kto",
                then="adapter",
            ),
            Rule(
                "understands-the-task",
                "the model understands the task: what is left is which of its answers are better",
                {"understands": (YES,)},
                then="preference",
            ),
        ),
    ),
    "preference": Question(
        "Which answers are better: who says so?",
        (
            Rule(
                "labels-are-learned",
                "a label is right or wrong, and fine-tuning says which: preferences would add nothing",
                {"family": ("classification",), "rows": ENOUGH, "trained": (YES,)},
                then="adapter",
            ),
            Rule(
                "labels-to-copy",
                "a label is right or wrong: the rows say which, and preferences would add nothing",
                {"family": ("classification",), "rows": ENOUGH},
                adds="sft",
                then="adapter",
            ),
            Rule(
                "many-pairs",
                "so many pairs teach a reward model, which then judges new answers of the model itself",
                {"pairs": ("many",)},
                adds="rlhf",
                then="adapter",
            ),
            Rule(
                "longer-is-chosen",
                "the chosen answers are mostly the longer ones: SimPO compares per token, so that length alone does "
                "not win",
                {"pairs": ENOUGH, "longer": (YES,)},
                adds="simpo",
                then="adapter",
            ),
            Rule(
                "few-pairs",
                "with few pairs IPO is the careful choice: its margin has a target and does not grow without end",
                {"pairs": ("few",)},
                adds="ipo",
                then="adapter",
            ),
            Rule("pairs", "pairs are what DPO learns from", {"pairs": ("medium",)}, adds="dpo", then="adapter"),
            Rule(
                "many-thumbs",
                "so many judgements teach a reward model, which then judges new answers of the model itself",
                {"thumbs": ("many",)},
                adds="rlhf",
                then="adapter",
            ),
            Rule(
                "thumbs",
                "single answers with a thumb up or down are what KTO learns from",
                {"thumbs": ("few", "medium")},
                adds="kto",
                then="adapter",
            ),
            Rule(
                "a-program-judges",
                "nobody has judged answers, but a program can: RL with compile errors and failed tests penalised",
                {"family": ("code",), "checkable": (YES,)},
                adds="rlhf",
                then="adapter",
            ),
            Rule("no-judgements", "nobody has judged answers: it ends here", {"trained": (YES,)}, then="adapter"),
            Rule(
                "answers-to-copy",
                "nobody has judged answers: until then there are answers to copy",
                adds="sft",
                then="adapter",
            ),
        ),
    ),
    "adapter": Question(
        "Which weights are trained?",
        (
            Rule(
                "nothing-fits",
                "not even QLoRA fits memory and budget: begin there with a smaller model, fewer or shorter rows",
                {"room": (NO,)},
                adds="qlora",
            ),
            Rule(
                "four-bits-fit",
                "the frozen model fits in four bits only",
                {"room": ("qlora",)},
                adds="qlora",
            ),
            Rule(
                "many-rows",
                "so many rows can use more than a low rank, and all weights fit",
                {"copies": (YES,), "rows": ("many",), "room": ("full",)},
                adds="full",
            ),
            Rule(
                "much-text",
                "so much text can use more than a low rank, and all weights fit",
                {"reads": (YES,), "text": ("many",), "room": ("full",)},
                adds="full",
            ),
            Rule(
                "code-in-four-bits",
                "models that write useful code are large: in four bits one fits one GPU",
                {"family": ("code",)},
                adds="qlora",
            ),
            Rule("low-rank", "a low-rank adapter learns it with a fraction of the memory", adds="lora"),
        ),
    ),
}
FIRST = "prompt"
ADAPTERS = ("lora", "qlora", "full")
PREFERENCES = ("dpo", "ipo", "orpo", "kto", "simpo", "rlhf")


@dataclass(frozen=True)
class Fired:
    """A rule that held, its question, and the columns that this question was the first to look at."""

    question: str
    rule: Rule
    looked: tuple[str, ...]


@dataclass(frozen=True)
class Walk:
    """A way through the table: the rules that fired, in order, and what they add."""

    fired: tuple[Fired, ...]
    added: tuple[str, ...]

    @property
    def outcomes(self) -> tuple[str, ...]:
        """What to do, in order, as names of OUTCOMES: supervised fine-tuning goes by the weights that it trains."""
        steps = [name for name in self.added if name not in ADAPTERS]
        return tuple(self.adapter if name == "sft" and self.adapter else name for name in steps)

    @property
    def adapter(self) -> str | None:
        """lora, qlora or full; None where nothing is trained."""
        return next((name for name in self.added if name in ADAPTERS), None)


def walk(value_of: Callable[[str], str]) -> Walk:
    """Goes through the table; `value_of` is asked for a column when a cell first looks at it."""
    fired: list[Fired] = []
    added: list[str] = []
    known: dict[str, str] = {}
    question: str | None = FIRST
    while question is not None:
        before = len(known)
        above = {"trained": bool(added), "copies": "sft" in added, "reads": "pretrain" in added}
        # Every question ends with a rule that always holds, or with the other answer of its last cell.
        rule = next(r for r in TABLE[question].rules if _holds(r, above, known, value_of))
        fired.append(Fired(question, rule, tuple(known)[before:]))
        if rule.adds is not None:
            added.append(rule.adds)
        question = rule.then
    return Walk(tuple(fired), tuple(added))


def _holds(rule: Rule, above: Mapping[str, bool], known: dict[str, str], value_of: Callable[[str], str]) -> bool:
    """Whether every cell holds; cells are looked at in their order, up to the first that does not."""
    for column, cell in rule.when.items():
        if column in above:
            value = YES if above[column] else NO
        else:
            if column not in known:
                known[column] = value_of(column)
            value = known[column]
        if value not in cell:
            return False
    return True


def unanswered(known: Mapping[str, str]) -> list[str]:
    """The columns that some way through the table looks at and that `known` lacks, in the order in which they come."""
    found: dict[str, None] = {}
    waiting = [dict(known)]
    while waiting:
        facts = waiting.pop()
        try:
            walk(facts.__getitem__)
        except KeyError as error:
            column = str(error.args[0])
            found[column] = None
            waiting += [{**facts, column: value} for value in reversed(COLUMNS[column].values)]
    return [column for column in COLUMNS if column in found]
