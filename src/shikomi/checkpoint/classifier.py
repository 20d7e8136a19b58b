"""A whole reward model as transformers has them: a sequence classification model with one label."""

from pathlib import Path

import torch
from torch import Tensor

from shikomi.checkpoint.files import saving
from shikomi.model.heads import SCORE, classifier_of
from shikomi.model.language_model import LanguageModel


def save_classifier(lm: LanguageModel, folder: Path, weights: dict[str, Tensor], dtype: torch.dtype) -> None:
    """Writes a folder that AutoModelForSequenceClassification loads by itself, with tokenizer and chat template.

    `weights` are those of the causal language model by transformers' names; the head for tokens is left out. Without a
    token to pad with, transformers computes one row at a time, and says so.
    """
    assert lm.scalar is not None
    classifier = classifier_of(lm.config)
    kept = {name: tensor for name, tensor in weights.items() if name not in classifier.dropped}
    kept[SCORE] = lm.scalar.weight.detach().to(dtype)
    config = classifier.model.config
    config.dtype, config.pad_token_id = dtype, pad_with(lm)
    with saving("the reward model", folder):
        folder.mkdir(parents=True, exist_ok=True)
        classifier.model.save_pretrained(str(folder), state_dict=kept)
        lm.tokenizer.save_pretrained(str(folder))


def pad_with(lm: LanguageModel) -> int | None:
    """The token that pads rows, which becomes the tokenizer's; None where every special token may end a row.

    transformers reads a value at the last token that is not this one: where rows end with the token that also pads
    them (SmolLM2's end of turn), it would read it one token too early.
    """
    tokenizer = lm.tokenizer
    wanted = [tokenizer.pad_token, tokenizer.unk_token]
    others = [token.content for _, token in sorted(tokenizer.added_tokens_decoder.items()) if token.special]
    ends = {tokenizer.convert_ids_to_tokens(number) for number in lm.stop_ids} | {tokenizer.eos_token}
    found = next((t for t in [*wanted, *others] if t is not None and t not in ends and t != tokenizer.bos_token), None)
    tokenizer.pad_token = found
    return None if found is None else int(tokenizer.convert_tokens_to_ids(found))
