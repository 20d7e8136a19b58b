"""Heads beside the one for tokens: a scalar head gives each sequence one value, read at its last token."""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from shikomi.errors import BadInput, Problem
from shikomi.model.check import listing_of
from shikomi.quant._streaming import Files

SCORE = "score.weight"  # the head's name in transformers' classes for sequence classification
SEED_OFFSET = 7_919  # keeps the head's start apart from that of the adapter, which is drawn from the seed itself
USUAL_RANGE = 0.02  # transformers' deviation for a configuration that names none


@dataclass(eq=False)
class ScalarHead:
    """value = w h, with w (1, H) an fp32 master that is trained; computed in fp32, whatever the model computes in."""

    weight: nn.Parameter

    def values(self, h: Tensor) -> Tensor:
        """Values (N,) in fp32 of hidden states (N, H) after the final norm."""
        return F.linear(h.float(), self.weight)[:, 0]

    def load(self, weight: Tensor, source: str) -> None:
        """Takes over a saved head; raises BadInput where it is of another width or of several labels."""
        if weight.shape != self.weight.shape:
            found, want = str(tuple(weight.shape)), str(tuple(self.weight.shape))
            fix = "a reward model has one label, and is of this base model"
            raise BadInput([Problem(f"{SCORE} has the wrong shape", source, None, found, want, fix)])
        with torch.no_grad():
            self.weight.copy_(weight)


def fresh_head(config: Any, seed: int, device: torch.device) -> ScalarHead:
    """A head as transformers starts it, and TRL with it: normal with the deviation `initializer_range`."""
    settings = config.to_dict()
    width = int(settings.get("hidden_size") or settings["n_embd"])
    weight = torch.empty(1, width).normal_(0, deviation(config), generator=_generator(seed))
    return ScalarHead(nn.Parameter(weight.to(device)))


def deviation(config: Any) -> float:
    """The deviation of a fresh head."""
    return float(config.to_dict().get("initializer_range") or USUAL_RANGE)


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed + SEED_OFFSET)


def saved_head(folder: Path) -> Tensor:
    """The head of a sequence classification folder (labels, H). Raises BadInput where the folder has none."""
    files = Files(folder)
    if SCORE not in files.files:
        raise BadInput(
            [Problem(f"a sequence classification model without {SCORE}", str(folder), None, listing_of(folder))]
        )
    return files.copy(SCORE)


class Classifier(NamedTuple):
    """transformers' sequence classification model of an architecture, without numbers (on the meta device)."""

    model: Any
    dropped: frozenset[str]  # tensors of the causal language model that it has no place for: the head for tokens


def classifier_of(config: Any) -> Classifier:
    """The classifier with one label that a reward model of this architecture is saved as.

    Raises BadInput where transformers has none, or one that is more than a `score` over the same decoder.
    """
    kind = config.model_type
    if type(config) not in AutoModelForSequenceClassification._model_mapping:
        what = f"objective: reward cannot serve {kind}: transformers has no sequence classification model of it"
        raise BadInput([Problem(what, fix="choose a base such as Llama, Qwen, Mistral, Gemma or Phi")])
    own = copy.deepcopy(config)
    own.num_labels = 1
    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(own)
        names, causal = (_names(m) for m in (model, AutoModelForCausalLM.from_config(config)))
    if names - causal != {SCORE} or model.get_parameter(SCORE).shape[0] != 1:
        what = f"objective: reward cannot serve {kind}: {type(model).__name__} is more than a score over the decoder"
        raise BadInput([Problem(what, found=", ".join(sorted(names - causal)) or "no score", allowed=SCORE)])
    return Classifier(model, frozenset(causal - names))


def _names(model: nn.Module) -> set[str]:
    return {name for name, _ in model.named_parameters(remove_duplicate=False)}


def tie_head(model: Any) -> None:
    """Gives the head for tokens, of which a reward model has no use, the embeddings' weight: its own is let go."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head.weight.shape == embedding.weight.shape:
        head.weight = embedding.weight
        model.config.tie_word_embeddings = True
