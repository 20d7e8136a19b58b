"""The rows of a stage by what its objective learns from: split, held back, and as conversations to compare on."""

from collections.abc import Iterator, Sequence
from itertools import islice

from shikomi.data.check import SCANS, load_conversations, shown_labels
from shikomi.data.conversation import Conversation
from shikomi.data.preferences import Judgement, Preference, recognise_preference
from shikomi.data.problems import Problems
from shikomi.data.scan import Pass
from shikomi.data.sources import rows
from shikomi.data.split import Split, split_rows
from shikomi.errors import BadInput, Problem
from shikomi.recipe import build
from shikomi.recipe.schema import DataSpec, Recipe, Source, Stage

Labels = tuple[str, ...] | None


def kind_of(stage: Stage) -> str:
    """What the stage's objective learns from: conversations, pairs or thumbs."""
    kind: str = build("objectives", stage.objective).data
    return kind


def kind_of_rows(recipe: Recipe) -> str:
    """What the rows of the recipe's own `data` are: that of the first stage which trains on them."""
    return next((kind_of(stage) for stage in recipe.stages if stage.data is None), "conversations")


def split(spec: DataSpec, kind: str, seed: int) -> tuple[Split | None, Split | None]:
    """Training and validation side where the recipe asks for a share of the training rows."""
    if not isinstance(spec.validation, float):
        return None, None
    scan = SCANS[kind](spec.train, spec, shown_labels(spec, None, kind), "train")
    return split_rows(scan.conversations(), spec.validation, seed)


def answers(
    sources: Sequence[Source], spec: DataSpec, labels: Labels, role: str, side: Split | None, kind: str
) -> Iterator[Conversation]:
    """Rows as conversations: of pairs those with the chosen answer, of judged answers the desirable ones."""
    scan: Pass = SCANS[kind](sources, spec, shown_labels(spec, labels, kind), role, side)
    for item in scan:
        record = item.conversation
        if isinstance(record, Preference):
            yield record.chosen
        elif not isinstance(record, Judgement):
            yield record
        elif record.desirable:
            yield record.conversation
    scan.problems.raise_if_any()


def first_answers(spec: DataSpec, labels: Labels, side: Split | None, kind: str, limit: int) -> list[Conversation]:
    """The first training rows as conversations, for baselines that learn from them in the prompt."""
    return list(islice(answers(spec.train, spec, labels, "train", side, kind), limit))


def test_rows(spec: DataSpec, labels: Labels, kind: str) -> list[Conversation]:
    """The test rows as conversations; where the objective learns from preferences they may be of either kind."""
    assert spec.test is not None
    if kind != "conversations" and not _holds_preferences(spec, spec.test):
        plain = spec.model_copy(update={"format": "auto", "chosen": None, "rejected": None, "desirable": None})
        return [item.conversation for item in load_conversations(spec.test, plain, shown_labels(spec, labels, kind))]
    return list(answers(spec.test, spec, labels, "test", None, kind))


def _holds_preferences(spec: DataSpec, sources: Sequence[Source]) -> bool:
    """Whether the first test row, by its keys or the recipe's templates, is a pair or a judged answer."""
    if spec.chosen is not None or spec.desirable is not None:
        return True
    unread = Problems()  # what cannot be read is reported when the rows are
    first = next((row.data for source in sources for row in rows(source, unread, "test")), None)
    return first is None or recognise_preference(first) is not None


def check_metric(stage: Stage, kind: str) -> None:
    """Refuses to choose checkpoints by a score that held-back preferences do not give. Raises BadInput."""
    given = ("eval_loss", "eval_accuracy") if stage.objective.name == "reward" else ("eval_loss",)
    if kind != "conversations" and stage.metric_for_best_model not in given:
        what = f"metric_for_best_model: {stage.objective.name} is evaluated on preferences"
        raise BadInput([Problem(what, found=stage.metric_for_best_model, allowed=", ".join(given))])


def check_precompute(stage: Stage, needs: frozenset[str]) -> None:
    """Refuses `reference: precompute` where it cannot be. Raises BadInput."""
    if stage.reference == "live":
        return
    if "kl" in needs:
        what = f"objective: {stage.objective.name} puts answers after other prompts in every step"
        fix = "reference: live"
        raise BadInput([Problem(what, found="reference: precompute", fix=fix)])
    if "ref_logp" not in needs:
        what = f"objective: {stage.objective.name} has no reference"
        raise BadInput([Problem(what, found="reference: precompute", fix="delete `reference`")])
