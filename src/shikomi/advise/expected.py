"""What advice will take: memory, time and cost of its recipe by the plan, as far as they can be known."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from shikomi.advise.drafts import Draft, recipe_draft
from shikomi.advise.facts import ENOUGH
from shikomi.advise.material import Material
from shikomi.errors import BadInput
from shikomi.plan.architecture import SHIPPED, known_names
from shikomi.plan.estimate import Range, Rows
from shikomi.plan.hardware import HERE, hardware
from shikomi.plan.jobs import model_of
from shikomi.plan.prices import check_currency, check_price
from shikomi.plan.whole import estimate
from shikomi.recipe import parse_recipe

if TYPE_CHECKING:
    from shikomi.advise.advice import Case

ROW_TOKENS = 256
"""Of a row that is not there yet: a short question with an answer of a paragraph, as chats and summaries have them."""

LONGEST = 1024  # tokens; the recipe's max_length


@dataclass(frozen=True)
class Expected:
    """Of one recipe on one machine. None: not known, and `notes` say why."""

    machine: str
    peak_memory: Range | None
    memory: int  # bytes that a run may take there
    seconds: Range | None
    cost: Range | None
    currency: str
    basis: str = ""
    notes: tuple[str, ...] = ()

    @property
    def fits(self) -> bool:
        """Whether the likely peak fits; what is not known is taken to fit."""
        return self.peak_memory is None or self.peak_memory.likely <= self.memory

    def as_dict(self) -> dict[str, Any]:
        """As `shikomi plan --json` names them."""
        return {
            "machine": self.machine,
            "peak_memory_bytes": None if self.peak_memory is None else self.peak_memory.as_dict(),
            "seconds": None if self.seconds is None else self.seconds.as_dict(),
            "cost": None if self.cost is None else self.cost.as_dict(),
            "currency": self.currency,
            "cost_basis": self.basis or None,
        }

    def lines(self, size: Callable[[float], str], duration: Callable[[float], str]) -> Iterator[tuple[str, str]]:
        """(title, words) for a reader; `size` and `duration` write bytes and seconds."""
        for title, value, write in (
            ("memory", self.peak_memory, size),
            ("time", self.seconds, duration),
            ("cost", self.cost, self._money),
        ):
            if value is None:
                yield title, "not known"
            else:
                yield title, f"{write(value.likely)} ({write(value.low)} to {write(value.high)})"
        yield "machine", self.machine + (f", {size(self.memory)}" if self.memory else "")
        if self.basis:
            yield "price", self.basis
        for note in self.notes:
            yield "note", note

    def _money(self, amount: float) -> str:
        digits = 0 if amount >= 100 else 2
        while amount and amount < 10**-digits and digits < 6:
            digits += 1
        return f"{amount:,.{digits}f} {self.currency}"


@dataclass(frozen=True)
class Expecting:
    """Plans drafts for a machine (None: this one), and says which methods its memory and a budget allow."""

    machine: str | None = None
    currency: str = "USD"
    budget: float | None = None  # in `currency`
    price: float | None = None  # US dollars an hour; None: by the table of prices

    def of(self, draft: Draft) -> Expected | None:
        """What a drafted recipe takes; None for a prompt."""
        if draft.kind != "recipe":
            return None
        recipe = parse_recipe(draft.text)
        try:
            model_of(recipe.model)
        except BadInput as error:
            why = (error.message, "none of this can be known before the model is on this machine")
            return Expected(self.machine or HERE, None, 0, None, None, self.currency, notes=why)
        made = estimate(
            recipe,
            self.machine,
            price=self.price,
            currency=self.currency,
            rows=[_expected_rows(one) for one in draft.sources],
        )
        notes = tuple(dict.fromkeys((*made.notes, *made.cost.warnings)))
        if any(source.detected is None for source in draft.sources):
            notes = (*notes, f"rows that are not there yet are taken to have {ROW_TOKENS} tokens")
        return Expected(
            made.title,
            made.peak,
            made.limit,
            made.seconds,
            made.cost.amount,
            made.cost.currency,
            made.cost.basis,
            notes,
        )

    def check(self) -> None:
        """Raises BadInput for a machine and for a currency that the tables do not have, and for what is no price."""
        if self.price is not None:
            check_price(str(self.price))
        check_currency(self.currency)
        if self.machine is not None:
            hardware(self.machine)

    def room(self, case: Case) -> Callable[[str], bool]:
        """Whether lora, qlora or full fits, by the plan of a recipe on the largest rows that there are."""

        def fits(method: str) -> bool:
            draft = recipe_draft((_tried(case, method),), method, case.materials, case.model)
            expected = self.of(draft)
            return expected is None or self._allowed(expected)

        return fits

    def _allowed(self, expected: Expected) -> bool:
        if not expected.fits:
            return False
        return self.budget is None or expected.cost is None or expected.cost.likely <= self.budget


def loadable(model: str) -> str:
    """The hub id of a model that the plan knows by a short name, so that a recipe can load it; else the same."""
    if model not in known_names():
        return model
    origin: str = json.loads((SHIPPED / f"{model}.json").read_text(encoding="utf-8"))["_name_or_path"]
    return origin


def _expected_rows(source: Material) -> Rows | None:
    """Rows to plan with where there is only a count; None: the plan reads the file."""
    if source.detected is not None:
        return None
    if source.kind == "text":
        return Rows(max(1, source.count // LONGEST), LONGEST, LONGEST, 1.0)
    return Rows(max(1, source.count), ROW_TOKENS, LONGEST)


def _tried(case: Case, method: str) -> str:
    """The outcome whose recipe stands for a method: on the rows that there are."""
    kinds = {"rows": method, "pairs": "dpo", "thumbs": "kto", "text": "pretrain"}
    return next((name for kind, name in kinds.items() if case.materials.amount(kind) in ENOUGH), method)
