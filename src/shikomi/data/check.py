"""Reading and checking data in one pass: every problem of every file at once, and what is worth knowing besides."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from shikomi.data.copies import near_copies
from shikomi.data.encode import Encoder
from shikomi.data.formats import label_set, uses_labels
from shikomi.data.preference_scan import PROMPTS_KEPT, PairPass, PreferencePass, ThumbPass
from shikomi.data.problems import Problems
from shikomi.data.report import Report
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


def check_data(
    spec: DataSpec,
    encoder: Encoder | None = None,
    labels: tuple[str, ...] | None = None,
    kind: str = "conversations",
) -> tuple[dict[str, Report], list[Problem]]:
    """Check every source that a recipe names: (report by role, all problems). With an encoder, tokens are counted.

    kind: what the objective learns from, its `data`: conversations, pairs or thumbs. Of preferences the prompts of
    the files are compared too, where they are few.
    """
    roles: dict[str, Sequence[Source]] = {"train": spec.train}
    if spec.validation is not None and not isinstance(spec.validation, float):
        roles["validation"] = spec.validation
    if spec.test is not None:
        roles["test"] = spec.test
    reports, problems = {}, Problems()
    prompts: dict[str, list[str]] = {}
    try:
        labels = template_labels(spec, labels) if kind == "conversations" else labels or spec.labels
    except BadInput as error:
        labels = ()
        if not any(p.file for p in error.problems):  # a source that is missing is named by the scan
            problems.add(error.problems)
    for role, sources in roles.items():
        scan = SCANS[kind](sources, spec, labels, role, problems=problems)
        for _ in scan.encoded(encoder) if encoder is not None else scan:
            pass
        reports[role] = scan.report
        if isinstance(scan, PreferencePass):
            prompts[role] = scan.prompts
    for role in [role for role in prompts if role != "train"]:
        reports[role].notes += overlap(prompts["train"], prompts[role], role)
    return reports, problems.all()


def overlap(train: Sequence[str], other: Sequence[str], role: str) -> list[str]:
    """Sentences on the prompts that a split shares with the training rows; none where there are too many to compare."""
    if max(len(train), len(other)) > PROMPTS_KEPT:
        return []
    known = set(train)
    same = sum(prompt in known for prompt in other)
    near = len(near_copies(train, [prompt for prompt in other if prompt not in known]))
    out = [f"{same:,} prompts of the {role} rows are in the training rows too"] if same else []
    return out + ([f"{near:,} prompts of the {role} rows are nearly those of training rows"] if near else [])
