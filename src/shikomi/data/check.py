"""Which pass reads the rows of an objective, rows in memory for evaluation, and the label set of a task."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from shikomi.data.formats import label_set, uses_labels
from shikomi.data.preference_scan import PairPass, ThumbPass
from shikomi.data.problems import Problems
from shikomi.data.scan import Item, Pass, Scan
from shikomi.data.sources import rows
from shikomi.data.split import Split
from shikomi.errors import BadInput, Problem

if TYPE_CHECKING:
    from shikomi.recipe import DataSpec, Source

SCANS: dict[str, type[Pass[Any, Any]]] = {"conversations": Scan, "pairs": PairPass, "thumbs": ThumbPass}
"""How rows are read, by what an objective learns from."""

MOST_LABELS = 200
"""Answers that may stand in a prompt."""


def labels_of(spec: DataSpec) -> tuple[str, ...]:
    """The label set of a task: `data.labels`, else the distinct answers of all its training rows, sorted.

    Raises BadInput for sources that cannot be found.
    """
    if spec.labels is not None:
        return tuple(spec.labels)
    unread = Problems()  # what cannot be read is reported by the check of the rows
    return label_set(spec, (row.data for source in spec.train for row in rows(source, unread)))


def load_conversations(
    sources: Sequence[Source],
    spec: DataSpec,
    labels: tuple[str, ...] | None = None,
    role: str = "test",
    side: Split | None = None,
    answer: bool = True,
) -> list[Item]:
    """All rows of the sources in memory, for evaluation and prediction. Raises BadInput with every problem."""
    scan = Scan(sources, spec, template_labels(spec, labels), role, side, answer)
    items = list(scan)
    scan.problems.raise_if_any()
    return items


def shown_labels(spec: DataSpec, labels: tuple[str, ...] | None, kind: str) -> tuple[str, ...] | None:
    """What `{labels}` stands for in the templates of rows of this kind. Raises BadInput as `template_labels` does."""
    return template_labels(spec, labels) if kind == "conversations" else labels or spec.labels


def template_labels(spec: DataSpec, labels: tuple[str, ...] | None) -> tuple[str, ...] | None:
    """`labels`, or the label set read from the training rows where a template needs one.

    Raises BadInput where `{labels}` would stand for more than MOST_LABELS answers.
    """
    if labels is not None or not uses_labels(spec):
        return labels
    found = labels_of(spec)
    if len(found) > MOST_LABELS and spec.labels is None:
        raise BadInput(
            [
                Problem(
                    what="{labels} in a template stands for too many answers",
                    found=f"{len(found):,} distinct answers in the training rows",
                    allowed=f"up to {MOST_LABELS}",
                    fix="remove {labels} from the template, or list them in data.labels",
                )
            ]
        )
    return found
