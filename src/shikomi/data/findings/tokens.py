"""The tokens of rows, counted beside the other checks: in a thread, and of many rows in a process of its own."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from types import TracebackType
from typing import Any

from shikomi.data.encode import Encoder
from shikomi.data.findings import lengths
from shikomi.data.findings.sampling import MAYBE, Settled, longest_text
from shikomi.errors import BadInput, TryAgain

MANY_ROWS = 2048
"""From so many rows on a process pays, which takes seconds to start; a thread shares the checks' interpreter."""

Weighted = tuple[Any, int]
"""A record, and how many rows it stands for, or MAYBE."""

Counted = list[tuple[int, lengths.Measured | BadInput | None]]
"""Weights and lengths of rows; None for a row of weight 0."""


class Tokens:
    """Counts tokens; it shares nothing with the checks, so that it can be sent to another process.

    encode: what the pass over rows of this kind encodes records with.
    """

    def __init__(self, encoder: Encoder, encode: Callable[[Encoder, Sequence[Any]], Sequence[Any]]) -> None:
        self._encoder, self._encode = encoder, encode
        self._settled = Settled(encoder.max_length)

    def count(self, rows: Sequence[Weighted]) -> Counted:
        """Weights and lengths of the rows."""
        maybe = iter(self._encoder.count([longest_text(record) for record, weight in rows if weight == MAYBE]))
        weights = [self._settled.weight(next(maybe)) if weight == MAYBE else weight for _, weight in rows]
        kept = [record for (record, _), weight in zip(rows, weights, strict=True) if weight]
        encoded = iter(self._encode(self._encoder, kept))
        return [(weight, _measured(next(encoded)) if weight else None) for weight in weights]


class Beside:
    """Where tokens are counted while the caller goes on; a context manager. Results are the same in either place.

    Raises TryAgain at its end where the process was killed.
    """

    def __init__(self, tokens: Tokens, processes: bool) -> None:
        self._tokens, self._processes = tokens, processes
        self._rows = 0
        self._pool: Executor = ThreadPoolExecutor(1)
        self._count = tokens.count

    def count(self, rows: Sequence[Weighted]) -> Future[Counted]:
        """The lengths of the next rows, when they are there."""
        self._rows += len(rows)
        if self._processes and self._rows > MANY_ROWS:
            self._processes = False
            self._pool.shutdown()  # what is left to do there is done: the process goes on from its end
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(1, context, _keep, (self._tokens,))
            self._count = _count
        return self._pool.submit(self._count, rows)

    def __enter__(self) -> Beside:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._pool.shutdown(cancel_futures=True)
        if isinstance(error, BrokenProcessPool):
            raise TryAgain(
                "the process that counts tokens was killed, most likely because memory was short; fix: free some, or "
                "name no model: then they are estimated"
            ) from error


_kept: list[Tokens] = []  # in the process: what it counts with


def _keep(tokens: Tokens) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the caller, who ends this process
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one core is for the checks, and one keeps up with them
    _kept.append(tokens)


def _count(rows: Sequence[Weighted]) -> Counted:
    return _kept[0].count(rows)


def _measured(encoded: Any) -> lengths.Measured | BadInput:
    return encoded if isinstance(encoded, BadInput) else lengths.measure(encoded)
