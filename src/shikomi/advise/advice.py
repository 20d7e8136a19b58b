"""Which method for this task: answers from flags, data, measurement and questions, walked through the rules."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from shikomi.advise.drafts import Draft, nearest, plain_prompt, prompt_draft, recipe_draft
from shikomi.advise.expected import Expected
from shikomi.advise.facts import AMOUNTS, COLUMNS, LEVELS, NO, TASKS
from shikomi.advise.material import Materials
from shikomi.advise.outcomes import NOT_BUILT, OUTCOMES, Outcome
from shikomi.advise.prompting import Measured, chosen_shots
from shikomi.advise.rules import ADAPTERS, Rule, Walk, unanswered, walk
from shikomi.errors import BadInput, Problem

FAMILY = "chatbot"  # what a task is taken for when nothing says it


@dataclass(frozen=True)
class Answer:
    """A value of a column and where it comes from: "given", "assumed", a file, a measurement."""

    value: str
    source: str


@dataclass(frozen=True)
class Case:
    """What is known about a task before anything is asked. `answers` are by column."""

    model: str
    materials: Materials
    answers: Mapping[str, Answer] = field(default_factory=dict)
    measured: Measured | None = None
    shots: int = 5
    seed: int = 0
    output: str | None = None  # folder of the run


@dataclass(frozen=True)
class Reason:
    """A rule that fired, with the facts that its cells looked at."""

    question: str
    rule: Rule
    facts: tuple[str, ...]


@dataclass(frozen=True)
class Advice:
    """What to do, why, what else there is, and the file that does it. `outcomes` are names of OUTCOMES, in order."""

    outcomes: tuple[str, ...]
    adapter: str | None
    family: str
    reasons: tuple[Reason, ...]
    answers: dict[str, Answer]
    draft: Draft
    notes: tuple[str, ...]
    measured: Measured | None

    @property
    def title(self) -> str:
        """The outcomes in words."""
        return ", then ".join(titles(self.outcomes, self.adapter))

    @property
    def alternatives(self) -> list[tuple[str, str]]:
        """(another outcome, when it would win), of every outcome, none twice and none that is advised."""
        found: dict[str, str] = {}
        for name in self.outcomes:
            for other, when in OUTCOMES[name].others:
                if other not in self.outcomes:
                    found.setdefault(other, when)
        return list(found.items())

    def as_dict(self, expected: Expected | None) -> dict[str, Any]:
        """What `--json` prints; the file's text under `recipe` or `prompt`."""
        return {
            "outcome": self.outcomes[0],
            "then": list(self.outcomes[1:]),
            "title": self.title,
            "adapter": self.adapter,
            "task": self.family,
            "built": not set(self.outcomes) & set(NOT_BUILT),
            "stages": list(self.draft.stages),
            "reasons": [{"question": r.question, "rule": r.rule.name, "why": r.rule.why, "facts": list(r.facts)}
                        for r in self.reasons],
            "answers": {column: {"value": a.value, "source": a.source} for column, a in self.answers.items()},
            "alternatives": [{"outcome": name, "wins_when": when} for name, when in self.alternatives],
            "usual_cost_usd": list(usual(self.outcomes)),
            **(expected.as_dict() if expected is not None else nothing_expected()),
            "baseline": None if self.measured is None else self.measured.as_dict(),
            "notes": list(self.notes),
            self.draft.kind: self.draft.text,
        }  # fmt: skip


def nothing_expected() -> dict[str, Any]:
    """The plan's keys where nothing is trained."""
    zero = {"low": 0, "likely": 0, "high": 0}
    return {"peak_memory_bytes": None, "seconds": zero, "cost": zero}


def titles(outcomes: Sequence[str], adapter: str | None) -> list[str]:
    """Outcomes in words, with the weights that preference learning and pre-training train."""
    weights = "" if adapter is None else f" ({OUTCOMES[adapter].title})"
    return [OUTCOMES[name].title + ("" if name in (*ADAPTERS, *NOT_BUILT) else weights) for name in outcomes]


def usual(outcomes: Sequence[str]) -> tuple[int, int]:
    """US dollars that people quote for all outcomes together."""
    bands = [OUTCOMES[name].usual for name in outcomes]
    return sum(low for low, _ in bands), sum(high for _, high in bands)


def band(outcomes: Sequence[str]) -> str:
    """The same in words."""
    return Outcome("", usual(outcomes)).band


def known_answers(case: Case) -> dict[str, Answer]:
    """Every answer that needs no question: given, counted, measured, or shown by the data."""
    found = dict(case.answers)
    for kind in LEVELS:
        material = case.materials.get(kind)
        source = material.shown if material is not None else "none given"
        found[kind] = Answer(case.materials.amount(kind), source)
    if "family" not in found and (family := family_of(case.materials)) is not None:
        found["family"] = family
    if case.measured is not None:
        found["prompt"] = Answer(case.measured.prompt, case.measured.sentence())
        if case.measured.understands is not None and "understands" not in found:
            found["understands"] = Answer(case.measured.understands, "measured: against the most frequent label")
    return found


def family_of(materials: Materials) -> Answer | None:
    """The kind of task, where the rows show it: labels, or a summary or a translation as the answer."""
    rows = materials.get("rows")
    found = rows.detected if rows is not None else None
    if found is None:
        return None
    if found.labels:
        return Answer("classification", f"{len(found.labels)} labels in {found.path}")
    if found.prompt is not None and found.prompt.startswith(("Translate into", "Write a summary", "Write a title")):
        return Answer("summarisation", f"the answers in {found.path}: {found.completion}")
    return None


def assumed(column: str, family: str | None) -> Answer:
    """The answer to take where nobody gives one."""
    if column == "family":
        return Answer(FAMILY, "assumed")
    return Answer(TASKS[family or FAMILY].assumed[column], "assumed")


def advise(
    case: Case,
    room: Callable[[str], bool],
    ask: Callable[[str], Answer] | None = None,
    assume: bool = False,
) -> Advice:
    """Walks the table and drafts the file.

    `room` says whether a method (lora, qlora, full) fits memory and money; it is asked only where that matters. What
    is not known is asked with `ask`, or assumed with `assume`; without either BadInput names the flags.
    """
    answers = known_answers(case)
    computed = {"longer": lambda: _longer(case.materials), "room": lambda: _room(case.materials, room)}
    if ask is None and not assume:
        _refuse(answers, computed)

    def value_of(column: str) -> str:
        if column not in answers:
            if column in computed:
                answers[column] = computed[column]()
            else:
                family = answers["family"].value if "family" in answers else None
                answers[column] = ask(column) if ask is not None else assumed(column, family)
        return answers[column].value

    way = walk(value_of)
    family = value_of("family")
    draft, notes = _draft(case, way, family)
    used = {column: answers[column] for column in COLUMNS if column in answers}
    return Advice(
        way.outcomes, way.adapter, family, _reasons(way, answers), used, draft, (*notes, *draft.notes), case.measured
    )


def _refuse(answers: Mapping[str, Answer], computed: Mapping[str, Any]) -> None:
    """Raises BadInput for every question that nothing answers and that can change the outcome."""
    known = {column: answer.value for column, answer in answers.items()}
    open_ones = [column for column in unanswered(known) if column not in computed]
    if "family" not in known and "family" not in open_ones:
        open_ones.insert(0, "family")
    if open_ones:
        yes = "or take stated defaults with --yes"
        raise BadInput(
            [
                Problem(f"not answered: {COLUMNS[c].ask}", allowed=", ".join(COLUMNS[c].values),
                        fix=f"{COLUMNS[c].flags}, {yes}")
                for c in open_ones
            ]
        )  # fmt: skip


def _longer(materials: Materials) -> Answer:
    pairs = materials.get("pairs")
    if pairs is None or pairs.detected is None:
        return Answer(NO, "not known before the pairs are there")
    return Answer(pairs.longer, f"counted in {pairs.path}")


def _room(materials: Materials, fits: Callable[[str], bool]) -> Answer:
    """The largest method that fits. Full fine-tuning is looked at only where so much data asks for it."""
    if not fits("lora"):
        return Answer("qlora", "LoRA does not fit, QLoRA does") if fits("qlora") else Answer(NO, "QLoRA does not fit")
    if AMOUNTS[-1] in (materials.amount("rows"), materials.amount("text")) and fits("full"):
        return Answer("full", "full fine-tuning fits")
    return Answer("lora", "LoRA fits")


def _reasons(way: Walk, answers: Mapping[str, Answer]) -> tuple[Reason, ...]:
    """The rules that fired, each with the facts that were looked at for it first."""
    return tuple(
        Reason(
            fired.question,
            fired.rule,
            tuple(
                f"{COLUMNS[c].about}: {answers[c].value} ({answers[c].source})"
                for c in fired.looked
                if answers[c].value != AMOUNTS[0]
            ),
        )
        for fired in way.fired
    )


def _draft(case: Case, way: Walk, family: str) -> tuple[Draft, tuple[str, ...]]:
    notes: list[str] = []
    if way.adapter is None:
        file = plain_prompt(family, case.materials, case.model)
        if way.outcomes == ("few-shot",):
            rows = case.materials.get("rows")
            if case.measured is not None:
                file = case.measured.file
            elif rows is not None and rows.detected is not None:
                file = chosen_shots(file, rows.path, case.shots, case.seed)
        return prompt_draft(file, f"{titles(way.outcomes, None)[0]}: written by shikomi advise"), tuple(notes)
    if unbuilt := [NOT_BUILT[name] for name in way.outcomes if name in NOT_BUILT]:
        runs = [name if name != "sft" else way.adapter for name in nearest(way.outcomes, case.materials)]
        notes.append(f"{unbuilt[0]}; this is the nearest that runs: {', then '.join(titles(runs, None))}")
    heading = f"{', then '.join(titles(way.outcomes, way.adapter))}: written by shikomi advise"
    heading += "".join(f"\n{note}" for note in notes)
    draft = recipe_draft(way.outcomes, way.adapter, case.materials, case.model, heading, case.output)
    return draft, tuple(notes)
