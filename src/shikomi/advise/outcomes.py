"""What advice can end in: what people usually pay for it, and which other way would win when."""

from __future__ import annotations

from dataclasses import dataclass

from shikomi.advise.facts import PAIRS, ROWS


@dataclass(frozen=True)
class Outcome:
    """What can come out: `usual` is what people quote for it in US dollars, on models of 7 billion parameters."""

    title: str
    usual: tuple[int, int]
    others: tuple[tuple[str, str], ...] = ()
    """(another outcome, when it would win)"""

    @property
    def band(self) -> str:
        low, high = self.usual
        return "$0" if high == 0 else f"${low:,}-{high:,}"


NOTHING, CHEAP, DEAR, MIDDLE = (0, 0), (10, 100), (1_000, 10_000), (100, 1_000)

OUTCOMES = {
    "prompt": Outcome(
        "prompt engineering",
        NOTHING,
        (
            ("few-shot", "the answers have a form that is easier to show than to say"),
            ("lora", "the prompt is long and paid in every call, or the model is to become a smaller one"),
        ),
    ),
    "few-shot": Outcome(
        "few-shot prompt",
        NOTHING,
        (
            ("prompt", "the examples do not help: compare with --run-baseline"),
            ("lora", f"there are more than {ROWS.few} rows and the examples' tokens in every call cost too much"),
        ),
    ),
    "lora": Outcome(
        "LoRA",
        CHEAP,
        (
            ("few-shot", "a larger model with examples in the prompt reaches the same: measure with --run-baseline"),
            ("qlora", "the model does not fit, or a larger one in four bits is better than this one"),
            ("full", f"there are {ROWS.many:,} rows or more, and memory for 16 bytes a parameter"),
            ("dpo", "the answers are of the right kind and you can say which of two is better"),
        ),
    ),
    "qlora": Outcome(
        "QLoRA",
        CHEAP,
        (
            ("lora", "the model fits without four bits: no rounding, and steps are faster"),
            ("full", f"there are {ROWS.many:,} rows or more, and memory for 16 bytes a parameter"),
            ("few-shot", "a larger model with examples in the prompt reaches the same"),
        ),
    ),
    "full": Outcome(
        "full fine-tuning",
        DEAR,
        (
            ("lora", "the model must not forget what else it knows, or several tasks share one base"),
            ("pretrain", "the domain itself is new, and there is text of it"),
        ),
    ),
    "pretrain": Outcome(
        "continued pre-training",
        DEAR,
        (
            ("prompt", "the facts change: put the documents that matter into the prompt (retrieval)"),
            ("lora", "the domain is known after all and only the form of the answers is missing"),
        ),
    ),
    "dpo": Outcome(
        "DPO",
        MIDDLE,
        (
            ("ipo", "the validation loss rises while the margins go on growing"),
            ("simpo", "answers become longer than they should, or memory for a reference is short"),
            ("orpo", "the model was not fine-tuned before"),
            ("lora", "good answers can be written down: copying them is simpler"),
        ),
    ),
    "ipo": Outcome(
        "IPO",
        MIDDLE,
        (
            ("dpo", f"there are {PAIRS.medium} pairs or more"),
            ("lora", "good answers can be written down: copying them is simpler"),
        ),
    ),
    "orpo": Outcome(
        "ORPO",
        MIDDLE,
        (
            ("lora", "there are rows with answers: fine-tune on them first, then DPO on the pairs"),
            ("dpo", "the model already gives answers of the right kind"),
        ),
    ),
    "kto": Outcome(
        "KTO",
        MIDDLE,
        (
            ("dpo", "the same prompts have good and bad answers: make pairs of them"),
            ("lora", "the good answers are good enough to copy: keep them as rows"),
        ),
    ),
    "simpo": Outcome(
        "SimPO",
        MIDDLE,
        (
            ("dpo", "chosen and rejected answers are about equally long"),
            ("lora", "good answers can be written down: copying them is simpler"),
        ),
    ),
    "rlhf": Outcome(
        "RLHF (RL on a reward)",
        DEAR,
        (
            ("dpo", "pairs of answers can be had: the same preferences without a reward model and without sampling"),
            ("lora", "right answers can be written down or filtered out of samples: fine-tune on them"),
        ),
    ),
}
NOT_BUILT = {"rlhf": "RL on a reward (PPO, GRPO) is not built yet"}
