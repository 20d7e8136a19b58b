"""Pairs of answers for rows that have none: a model's samples, ranked, the best against the worst.

Written block by block; beside the file stands how far it is, so that the same call goes on where it was stopped.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

from shikomi.checkpoint.files import replace_json, saving
from shikomi.data.formats import recognise
from shikomi.data.problems import Problems
from shikomi.data.records import held_rows
from shikomi.data.sources import rows
from shikomi.data.writers import replaced, write_rows
from shikomi.errors import BadInput, Problem
from shikomi.evaluate.ranking import Asked, Ranker, asked, number
from shikomi.progress import Progress, Silent, duration
from shikomi.recipe import DataSpec, Source

VERSION = 1


@dataclass(frozen=True)
class Answer:
    """A sampled answer, and whether it came to its end before the longest length."""

    text: str
    ended: bool = True


Sampler = Callable[[Sequence[Asked], int], list[list[Answer]]]
"""Answers to each of a block of prompts, by a seed."""


@dataclass(frozen=True)
class Pairing:
    """How pairs are made of ranked answers.

    all_pairs: every two answers of different scores, not the best and the worst alone; min_margin: the least difference
    of scores; reference_chosen: the row's own answer is the chosen one, a sample the rejected one.
    """

    all_pairs: bool = False
    min_margin: float = 0.0
    reference_chosen: bool = False


@dataclass
class Counts:
    """What was made, and what was not: pairs with equal scores, with equal answers, below the margin, or in which the
    row's own answer scored lower than the sample. Lengths are in characters, of the pairs that were written."""

    prompts: int = 0
    answers: int = 0
    pairs: int = 0
    ties: int = 0
    same: int = 0
    below_margin: int = 0
    reference_lower: int = 0
    empty: int = 0
    not_ended: int = 0
    chosen_longer: int = 0
    rejected_longer: int = 0
    length_difference: int = 0

    def lines(self) -> list[str]:
        """What is worth saying, one sentence each."""
        out = [f"{self.pairs:,} pairs of {self.prompts:,} prompts, {self.answers:,} answers"]
        dropped = (
            (self.ties, "have equal scores"),
            (self.same, "are two equal answers"),
            (self.below_margin, "differ by less than --min-margin"),
            (self.reference_lower, "have a sample that scores above the row's own answer"),
        )
        out += [f"left out: {count:,} pairs that {why}" for count, why in dropped if count]
        out += [f"left out: {self.empty:,} empty answers"] if self.empty else []
        if self.not_ended:
            out.append(
                f"{self.not_ended:,} answers were cut at --max-new-tokens: as chosen answers they teach to stop there"
            )
        if self.pairs:
            longer, shorter = self.chosen_longer / self.pairs, self.rejected_longer / self.pairs
            by = f"by {self.length_difference / self.pairs:+.1f} characters on average"
            out.append(f"chosen is longer in {longer:.0%} of the pairs, shorter in {shorter:.0%}, {by}")
        return out


@dataclass
class _State:
    """How far a file of pairs is: prompts done, the hash of these, bytes written, what decided them."""

    settings: dict[str, Any]
    done: int = 0
    prompts: str = ""
    bytes: int = 0
    counts: Counts = field(default_factory=Counts)


def make_pairs(
    prompts: Sequence[Asked],
    out: Path,
    sample: Sampler,
    rank: Ranker | None,
    pairing: Pairing,
    settings: dict[str, Any],
    seed: int = 0,
    block: int = 8,
    progress: Progress | None = None,
) -> Counts:
    """Writes pairs of answers to `prompts` to `out` and returns what was made.

    settings: everything that decides the answers, as JSON data; a file that was made with others is refused. rank may
    be None where the row's own answer is chosen: there is no margin then. Raises BadInput for rows without an answer.
    """
    shown = progress or Silent()
    _check(prompts, rank, pairing)
    state = _resumed(out, prompts, {"version": VERSION, "seed": seed, **asdict(pairing), **settings})
    if state.done:
        shown.note(f"{out}: {state.done:,} prompts are done, {len(prompts) - state.done:,} are left")
    as_lists = any(one.prompt is None for one in prompts)
    started, before = time.monotonic(), state.done
    with saving("pairs", out), out.open("ab") as file:
        file.truncate(state.bytes)
        while state.done < len(prompts):
            some = prompts[state.done : state.done + block]
            answers = sample(some, (seed * 1_000_003 + state.done) % (1 << 63))
            made = _rows(some, answers, rank, pairing, as_lists, state.counts)
            file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in made).encode())
            file.flush()
            os.fsync(file.fileno())
            state.done += len(some)
            state.bytes, state.prompts = file.tell(), _prompts_hash(prompts[: state.done])
            replace_json(state_path(out), asdict(state))
            left = (time.monotonic() - started) / (state.done - before) * (len(prompts) - state.done)
            shown.tick(
                state.done, len(prompts), f"answering prompts ({duration(left)} left)" if left else "answering prompts"
            )
    return state.counts


def state_path(out: Path) -> Path:
    """The file that says how far `out` is."""
    return out.with_name(out.name + ".state.json")


def _resumed(out: Path, prompts: Sequence[Asked], settings: dict[str, Any]) -> _State:
    """What is there already. Raises BadInput for a file of other settings, of other prompts, or of nobody."""
    fix = "choose another --output, or remove the file"
    path = state_path(out)
    if not path.exists():
        if out.exists():
            raise BadInput([Problem("is there already, and nothing says how it was made", str(out), fix=fix)])
        out.parent.mkdir(parents=True, exist_ok=True)
        return _State(settings)
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        state = _State(**{**found, "counts": Counts(**found["counts"])})
    except (ValueError, KeyError, TypeError) as error:
        raise BadInput([Problem(f"cannot be read: {error}", str(path), fix=fix)]) from error
    changed = [k for k in sorted({*settings, *state.settings}) if settings.get(k) != state.settings.get(k)]
    if changed:
        was = ", ".join(f"{key}: {state.settings.get(key)!r}" for key in changed)
        now = ", ".join(f"{key}: {settings.get(key)!r}" for key in changed)
        raise BadInput([Problem("was made with other settings", str(out), found=now, allowed=was, fix=fix)])
    if state.prompts != _prompts_hash(prompts[: state.done]) or state.done > len(prompts):
        raise BadInput([Problem("was made of other prompts", str(out), fix=f"{fix}; prompts may be added at the end")])
    if not out.exists() or out.stat().st_size < state.bytes:
        raise BadInput([Problem("is shorter than it was", str(out), fix=f"remove {path}, and begin again")])
    return state


def _prompts_hash(prompts: Sequence[Asked], before: str = "") -> str:
    """SHA-256 (hex) of prompts behind those of hash `before`."""
    for one in prompts:
        said = json.dumps([before, one.prompt, one.messages, one.reference], sort_keys=True, default=str)
        before = hashlib.sha256(said.encode("utf-8", "surrogatepass")).hexdigest()
    return before


def _check(prompts: Sequence[Asked], rank: Ranker | None, pairing: Pairing) -> None:
    if rank is None and not pairing.reference_chosen:
        raise ValueError("without a ranker nothing says which answer is better")
    lacking = next((one for one in prompts if one.reference is None), None)
    if pairing.reference_chosen and lacking is not None:
        fix = "add the answer, or take --chosen out"
        raise BadInput([Problem("--chosen reference: this row has no answer", *lacking.place, fix=fix)])
    if not prompts:
        raise BadInput("there are no prompts")


def _rows(
    prompts: Sequence[Asked],
    answers: Sequence[Sequence[Answer]],
    rank: Ranker | None,
    pairing: Pairing,
    as_lists: bool,
    counts: Counts,
) -> Iterator[dict[str, Any]]:
    """The rows of a block of prompts."""
    texts = []
    for several in answers:
        counts.answers += len(several)
        counts.empty += sum(not answer.text.strip() for answer in several)
        counts.not_ended += sum(not answer.ended for answer in several)
        texts.append([answer.text for answer in several if answer.text.strip()])
    own = [[one.reference] if pairing.reference_chosen and one.reference is not None else [] for one in prompts]
    together = [mine + theirs for mine, theirs in zip(own, texts, strict=True)]
    ranked = rank(prompts, together) if rank is not None else [[0.0] * len(several) for several in together]
    for one, said, scores in zip(prompts, together, ranked, strict=True):
        counts.prompts += 1
        found = list(zip(said, scores, strict=True))
        for chosen, rejected, margin in pairs_of(found, pairing, rank is not None, counts):
            yield _row(one, chosen, rejected, margin if rank is not None else None, as_lists)


def pairs_of(
    ranked: Sequence[tuple[str, float]], pairing: Pairing, scored: bool, counts: Counts
) -> Iterator[tuple[str, str, float]]:
    """(chosen, rejected, margin) of the answers to one prompt; the first is the row's own where that is chosen."""
    if len(ranked) < 2:
        return
    if pairing.reference_chosen:
        own, *others = ranked
        if scored and not pairing.all_pairs:
            others = [min(others, key=lambda answer: answer[1])]
        tried = [(own, other) for other in (others if pairing.all_pairs else others[:1])]
    elif pairing.all_pairs:
        tried = list(combinations(sorted(ranked, key=lambda answer: -answer[1]), 2))
    else:
        first, last = ranked, reversed(ranked)  # of equal ones not the same one
        tried = [(max(first, key=lambda answer: answer[1]), min(last, key=lambda answer: answer[1]))]
    for (chosen, high), (rejected, low) in tried:
        margin = high - low
        if chosen.strip() == rejected.strip():
            counts.same += 1
        elif scored and margin == 0:
            counts.ties += 1
        elif scored and margin < 0:
            counts.reference_lower += 1
        elif scored and margin < pairing.min_margin:
            counts.below_margin += 1
        else:
            counts.pairs += 1
            counts.chosen_longer += len(chosen) > len(rejected)
            counts.rejected_longer += len(rejected) > len(chosen)
            counts.length_difference += len(chosen) - len(rejected)
            yield chosen, rejected, margin


def _row(one: Asked, chosen: str, rejected: str, margin: float | None, as_lists: bool) -> dict[str, Any]:
    found: dict[str, Any] = {"prompt": one.prompt, "chosen": chosen, "rejected": rejected}
    if as_lists:
        answers = ([{"role": "assistant", "content": answer}] for answer in (chosen, rejected))
        found = dict(zip(("prompt", "chosen", "rejected"), (one.messages, *answers), strict=True))
        found |= {"tools": one.conversation.tools} if one.conversation.tools else {}
    return found | ({} if margin is None else {"margin": round(margin, 6)})


def pairs_from_column(
    file: Path, column: str, templates: dict[str, str | None], limit: int | None, pairing: Pairing, out: Path
) -> Counts:
    """Pairs of the answers that a file holds to one prompt in several rows, scored by a column, written to `out`.

    templates: `prompt` and `completion` of the rows, where they have other columns. Raises BadInput with every problem.
    """
    if out.exists():
        raise BadInput([Problem("is there already", str(out), fix="choose another --output, or remove the file")])
    given = {key: template for key, template in templates.items() if template is not None}
    if given:
        given = {"prompt": "{prompt}", "completion": "{completion}"} | given
    source = Source(path=str(file), limit=limit)
    problems = Problems()
    first = next(rows(source, problems), None)
    known = None if given or first is None else recognise(first.data)  # with a column `label` too
    spec = DataSpec(train=(source,), format=known or "auto", **given)  # type: ignore[arg-type]
    groups: dict[str, tuple[Asked, list[tuple[str, float]]]] = {}
    for held in held_rows(spec, "conversations", problems):
        place = (held.row.file, held.row.line)
        if column not in held.row.data:
            problems.add(Problem(f"there is no column `{column}`", *place, allowed=", ".join(map(str, held.row.data))))
            continue
        try:
            one = asked(held.records[0], held.row.data, place)  # type: ignore[arg-type]
            score = number(held.row.data[column], column, place)
        except BadInput as error:
            problems.add(error.problems)
            continue
        key = json.dumps([one.messages, one.conversation.tools], sort_keys=True, default=str)
        if one.reference is not None:
            groups.setdefault(key, (one, []))[1].append((one.reference, score))
    problems.raise_if_any()
    made, counts = _from_scores(list(groups.values()), pairing)
    if not made:
        what = "no prompt has two answers of different scores"
        raise BadInput([Problem(what, str(file), found="; ".join(counts.lines()), allowed="rows that share a prompt")])
    with replaced(out) as temporary:
        write_rows(temporary, lambda: iter(made))
    return counts


def _from_scores(
    groups: Sequence[tuple[Asked, Sequence[tuple[str, float]]]], pairing: Pairing
) -> tuple[list[dict[str, Any]], Counts]:
    counts, made = Counts(), []
    as_lists = any(one.prompt is None for one, _ in groups)
    for one, ranked in groups:
        counts.prompts += 1
        counts.answers += len(ranked)
        for chosen, rejected, margin in pairs_of(ranked, pairing, True, counts):
            made.append(_row(one, chosen, rejected, margin, as_lists))
    return made, counts
