"""Where every row of a check stood: a few bytes a row, for the findings that only all rows together show."""

from __future__ import annotations

from array import array

from shikomi.data.findings._finding import excerpt
from shikomi.data.findings._texts import Texts

HEADS_KEPT = 200_000
"""Rows whose first characters are kept, for excerpts."""

HEAD = 120
"""Characters of them."""


class Index:
    """File, line, role and first characters of each row, by its number."""

    def __init__(self) -> None:
        self.roles = array("b")
        self._names: dict[str, int] = {}
        self._role_names: dict[str, int] = {}
        self._files = array("i")
        self._lines = array("q")
        self._heads: list[tuple[str, str]] = []

    def __len__(self) -> int:
        return len(self._files)

    def add(self, texts: Texts) -> None:
        """The next row."""
        self._files.append(self._names.setdefault(texts.file, len(self._names)))
        self._lines.append(texts.line)
        self.roles.append(self._role_names.setdefault(texts.role, len(self._role_names)))
        if len(self._heads) < HEADS_KEPT:
            self._heads.append((texts.own[:HEAD], "\n".join(texts.answers)[:HEAD]))

    def place(self, row: int) -> tuple[str, int]:
        """File and line of a row."""
        return list(self._names)[self._files[row]], self._lines[row]

    def head(self, row: int) -> str:
        """The beginning of a row's own text."""
        return excerpt(self._heads[row][0]) if row < len(self._heads) else ""

    def answer(self, row: int) -> str:
        """The beginning of a row's answers, of plain texts that of the text."""
        own, answer = self._heads[row] if row < len(self._heads) else ("", "")
        return excerpt(answer or own)

    def role(self, row: int) -> str:
        """train, validation or test."""
        return list(self._role_names)[self.roles[row]]

    def name(self, row: int) -> str:
        """file:line."""
        file, line = self.place(row)
        return f"{file}:{line}"
