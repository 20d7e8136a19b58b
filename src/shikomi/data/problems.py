"""A bounded list of problems: a file with a million bad lines gives fifty messages and a count."""

from __future__ import annotations

from collections.abc import Iterable

from shikomi.errors import BadInput, Problem

LISTED = 50


class Problems:
    """Collects problems; keeps the first LISTED and counts the rest."""

    def __init__(self) -> None:
        self.listed: list[Problem] = []
        self.count = 0

    def add(self, problems: Problem | Iterable[Problem]) -> None:
        """Take one problem or several."""
        for problem in [problems] if isinstance(problems, Problem) else problems:
            self.count += 1
            if len(self.listed) < LISTED:
                self.listed.append(problem)

    def all(self) -> list[Problem]:
        """The listed problems, and one that counts those left out."""
        left = self.count - len(self.listed)
        if not left:
            return list(self.listed)
        return [*self.listed, Problem(f"and {left:,} more problem{'s' if left > 1 else ''} of this kind or others")]

    def raise_if_any(self) -> None:
        """Raise BadInput with all of them."""
        if self.count:
            raise BadInput(self.all())
