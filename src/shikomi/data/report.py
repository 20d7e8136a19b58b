"""Counts of a pass over data, and what a user should know of them in words."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

LENGTH_BIAS = 0.65
"""Share of pairs whose chosen answer is longer, above which (or below one minus it) length alone tells them apart."""


@dataclass
class Report:
    """Counts of a pass over data. Lengths are in tokens; `tokens` counts what is kept."""

    rows: int = 0
    kept: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    truncated: int = 0
    tokens_cut: int = 0
    too_long: int = 0
    dropped_no_target: int = 0
    special_text: int = 0
    plain_as_chat: int = 0
    joined_without_space: int = 0
    longest: int = 0
    files: dict[str, int] = field(default_factory=dict)
    formats: dict[str, int] = field(default_factory=dict)
    unused: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """The counts and notes as JSON data."""
        return asdict(self)

    def lines(self, max_length: int | None) -> list[str]:
        """One sentence for each thing that a user should know: nothing is dropped or changed in silence."""
        out = list(self.notes)
        if self.unused:
            out.append(f"columns not used: {', '.join(self.unused)}")
        if self.truncated:
            out.append(
                f"{self.truncated:,} of {self.rows:,} rows were longer than max_length {max_length} and lost their "
                f"end ({self.tokens_cut:,} tokens)"
            )
        if self.too_long:
            out.append(f"{self.too_long:,} rows were dropped: their answer begins after max_length {max_length}")
        if self.dropped_no_target:
            out.append(f"{self.dropped_no_target:,} rows were dropped: none of their tokens is trained")
        if self.special_text:
            out.append(
                f"{self.special_text:,} rows hold special-token strings (such as <|im_end|>); they were encoded as "
                "ordinary text"
            )
        if self.plain_as_chat:
            out.append(
                f"{self.plain_as_chat:,} plain prompts became a conversation through the chat template "
                "(chat: never keeps them as they are)"
            )
        if self.joined_without_space:
            out.append(
                f"in {self.joined_without_space:,} rows prompt and completion are joined without white space between"
            )
        return out


@dataclass
class PreferenceReport(Report):
    """Counts of a pass over preferences; a row is a pair, or one judged answer.

    tokens: the prompt counted with each answer; same: rows left out because both answers are one, same_after_cut:
    because they are one up to max_length; cut_one_side: pairs of which max_length cut only one answer;
    length_difference: trained tokens of the chosen answers minus those of the rejected ones, before any cut, summed;
    merges: answers whose first characters the tokenizer would have joined with the prompt's last; desirable and
    undesirable: judged answers; unpaired: answers that were taken from pairs; duplicates: rows that occur before;
    contradictions: rows that another row says the opposite of; places: file and line of the first rows of a count.
    """

    same: int = 0
    same_after_cut: int = 0
    cut_one_side: int = 0
    chosen_longer: int = 0
    rejected_longer: int = 0
    length_difference: int = 0
    merges: int = 0
    margins: int = 0
    plain_implicit: int = 0
    repeats_prompt: int = 0
    desirable: int = 0
    undesirable: int = 0
    unpaired: int = 0
    duplicates: int = 0
    contradictions: int = 0
    places: dict[str, list[str]] = field(default_factory=dict)

    @property
    def pairs(self) -> int:
        """Pairs that are kept."""
        return 0 if self.desirable + self.undesirable else self.kept

    def lines(self, max_length: int | None) -> list[str]:
        """One sentence for each thing that a user should know."""
        out, counts = super().lines(max_length), self.as_dict()
        for key, text in _COUNTS.items():
            count = counts[key]
            if count:
                where = f" ({', '.join(self.places[key])})" if key in self.places else ""
                out.append(text.format(count=f"{count:,}", where=where, max_length=max_length))
        if self.pairs:
            out += self._lengths()
        if self.desirable + self.undesirable:
            out += self._balance()
        return out

    def _lengths(self) -> list[str]:
        share = self.chosen_longer / self.pairs
        difference = self.length_difference / self.pairs
        text = f"chosen is longer in {share:.0%} of the pairs, by {difference:+.1f} tokens on average"
        if share > LENGTH_BIAS or self.rejected_longer / self.pairs > LENGTH_BIAS:
            longer = "longer" if share > LENGTH_BIAS else "shorter"
            text += f": length alone tells the answers apart, and a model trained on them tends to {longer} answers"
        return [text]

    def _balance(self) -> list[str]:
        total = self.desirable + self.undesirable
        out = [f"{self.desirable:,} of {total:,} answers are desirable ({self.desirable / total:.0%})"]
        if self.desirable and self.undesirable:
            ratio = self.undesirable / self.desirable
            if not 0.75 <= ratio <= 4 / 3:
                # arXiv:2402.01306, eq. 9: desirable_weight * n_desirable / (undesirable_weight * n_undesirable)
                out.append(
                    f"for their balance KTO asks for desirable_weight from {ratio:.3g} to {4 / 3 * ratio:.3g}, or "
                    f"undesirable_weight from {0.75 / ratio:.3g} to {1 / ratio:.3g}"
                )
        return out


_COUNTS = {
    "same": "{count} rows were left out: chosen and rejected are the same{where}",
    "same_after_cut": "{count} pairs were left out: their answers are the same up to max_length {max_length}{where}",
    "cut_one_side": "in {count} pairs max_length {max_length} cut only one of the two answers{where}",
    "merges": "in {count} answers the tokenizer would have joined the end of the prompt with the answer; they are "
    "encoded apart, as in generation",
    "plain_implicit": "{count} pairs of strings have no `prompt` but a common beginning; they stay plain text (with "
    "`prompt` they go through the chat template)",
    "repeats_prompt": "in {count} rows both answers begin with the prompt, which then stands there twice{where}",
    "unpaired": "{count} judged answers were made from pairs: chosen is desirable, rejected is not",
    "duplicates": "{count} rows are copies of an earlier row{where}",
    "contradictions": "{count} rows are contradicted by another row: the same answers, judged the other way "
    "round{where}",
}
