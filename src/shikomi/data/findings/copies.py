"""Rows that are copies, or nearly, of other rows: in the training rows, and of training rows among held-out ones."""

from __future__ import annotations

import hashlib
from array import array
from typing import Any

import numpy as np

from shikomi.data.copies import Shingles
from shikomi.data.findings._finding import Findings
from shikomi.data.findings._index import Index
from shikomi.data.findings._texts import Texts, normal


class Copies:
    """Collects hashes of each row: of all of it, and of its prompt (of plain texts, of the text)."""

    def __init__(self) -> None:
        self._whole, self._prompt = array("Q"), array("Q")
        self._shingles = Shingles()
        self._open = array("b")  # rows whose prompt may have several answers without a contradiction

    def add(self, texts: Texts, record: Any) -> None:
        """The next row; `record` is what was read of it."""
        self._whole.append(_hash(_content(texts, record)))
        self._prompt.append(_hash(texts.normal_prompt or normal(texts.own)))
        self._open.append(texts.answer is None or texts.kind != "conversations" or not texts.prompt)
        self._shingles.add(texts.words)

    def finish(self, index: Index, findings: Findings, labels: bool) -> None:
        """Findings of all rows together. labels: the answers are labels, of which one prompt can have only one."""
        whole, prompts = np.asarray(self._whole), np.asarray(self._prompt)
        train = np.asarray(index.roles) == 0
        copied = self._exact(whole, train, index, findings)
        leaked = self._leaks(prompts, train, index, findings)
        otherwise = self._answers(whole, prompts, train & ~copied, labels, index, findings)
        compared = self._shingles.near(copied | leaked | otherwise)
        for row, other in compared:
            if self._open[row] and prompts[row] == prompts[other]:
                continue  # several answers to one prompt
            if train[row] and train[other]:
                findings.add("D202", *index.place(row), index.head(row), f"as {index.name(other)}")
            elif train[row] != train[other]:
                held, known = (other, row) if train[row] else (row, other)
                note = f"{index.role(held)} row; training row {index.name(known)}"
                findings.add("D302", *index.place(held), index.head(held), note)
        if self._shingles.left_out:
            for code in ("D202", "D302"):
                findings.explain(code, f"{self._shingles.left_out:,} rows at the end were not compared")

    def _exact(self, keys: np.ndarray, train: np.ndarray, index: Index, findings: Findings) -> np.ndarray:
        """Which training rows are copies of an earlier one."""
        copied = np.zeros(len(keys), bool)
        rows = np.flatnonzero(train)
        _, first, inverse = np.unique(keys[rows], return_index=True, return_inverse=True)
        for at in np.flatnonzero(first[inverse] != np.arange(len(rows))).tolist():
            row, earlier = int(rows[at]), int(rows[first[inverse[at]]])
            copied[row] = True
            findings.add("D201", *index.place(row), index.head(row), f"as {index.name(earlier)}")
        return copied

    def _leaks(self, prompts: np.ndarray, train: np.ndarray, index: Index, findings: Findings) -> np.ndarray:
        """Which held-out rows have the prompt of a training row; the training rows are what `--fix` drops."""
        leaked = np.zeros(len(prompts), bool)
        known = np.flatnonzero(train)
        order = known[np.argsort(prompts[known], kind="stable")]
        ordered = prompts[order]
        dropped: set[int] = set()
        for row in np.flatnonzero(~train & np.isin(prompts, prompts[known])).tolist():
            leaked[row] = True
            first = int(np.searchsorted(ordered, prompts[row]))
            note = f"{index.role(row)} row; training row {index.name(int(order[first]))}"
            findings.add("D301", *index.place(row), index.head(row), note)
            if first not in dropped:
                dropped.add(first)
                for twin in order[first : int(np.searchsorted(ordered, prompts[row], side="right"))].tolist():
                    findings.lines.setdefault(index.place(twin), "D301")
        return leaked

    def _answers(
        self,
        whole: np.ndarray,
        prompts: np.ndarray,
        among: np.ndarray,
        labels: bool,
        index: Index,
        findings: Findings,
    ) -> np.ndarray:
        """Which rows have a prompt that an earlier row answers otherwise."""
        otherwise = np.zeros(len(whole), bool)
        rows = np.flatnonzero(among & ~np.asarray(self._open, bool))
        _, first, inverse = np.unique(prompts[rows], return_index=True, return_inverse=True)
        for at in np.flatnonzero(first[inverse] != np.arange(len(rows))).tolist():
            row, earlier = int(rows[at]), int(rows[first[inverse[at]]])
            if whole[row] != whole[earlier]:
                otherwise[row] = True
                note = f"{index.name(earlier)} has another {'label' if labels else 'answer'}"
                findings.add("D203", *index.place(row), index.head(row), note)
        return otherwise


def _content(texts: Texts, record: Any) -> str:
    parts = [texts.normal_prompt, *map(normal, texts.answers)] if texts.answers else [normal(texts.own)]
    judged = str(record.desirable) if texts.kind == "thumbs" else ""
    return "\n".join([*parts, judged])  # a line break is in none of the parts


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")
