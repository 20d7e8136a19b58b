"""Parameter groups: which parameters decay, and which learn faster than the others."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from shikomi.errors import BadInput, Problem

Ratio = Callable[[str, nn.Parameter], float]

ADAPTER_NAMES = ("base_model.model.", "prompt_embeddings", "embedding.weight", "transform.")
"""How the names of an adapter's parameters begin, PEFT's names; a full model's begin with its decoder or head."""

HEADS = ("lm_head", "embed_out")
EMBEDDINGS = ("wte", "wpe")  # those whose module name does not say "embed"

LOW_RANK_B = ("lora_B", "lora_embedding_B")
EMBEDDING_FACTORS = ("lora_embedding_A", "lora_embedding_B")


def grouped(
    trained: Mapping[str, nn.Parameter], learning_rate: float, weight_decay: float, ratio: Ratio
) -> list[dict[str, Any]]:
    """Groups for a torch optimizer, one for each pair of decay and rate, matrices before vectors.

    Weight decay goes to matrices only, not to norms, biases and magnitudes. `ratio` says how many times
    `learning_rate` a parameter learns with; the loop multiplies a group's "ratio" with the rate of each step.
    """
    found: dict[tuple[bool, float], list[nn.Parameter]] = {}
    for name, parameter in trained.items():
        found.setdefault((parameter.dim() <= 1, ratio(name, parameter)), []).append(parameter)
    return [
        {"params": params, "weight_decay": 0.0 if vectors else weight_decay, "ratio": r, "lr": learning_rate * r}
        for (vectors, r), params in sorted(found.items(), key=lambda item: item[0])
    ]


def is_head(name: str) -> bool:
    """Whether a trained tensor belongs to an output head."""
    return any(part in HEADS for part in name.split(".")[-2:-1])


def is_embedding(name: str) -> bool:
    """Whether a trained tensor is an embedding of tokens or positions; a head that is tied to one is that one."""
    return any("embed" in part or part in EMBEDDINGS for part in name.split(".")[-2:-1]) and not is_head(name)


def same_rate(name: str, parameter: nn.Parameter) -> float:
    """Every parameter learns with the learning rate itself."""
    return 1.0


def loraplus(
    trained: Mapping[str, nn.Parameter], learning_rate: float, lr_ratio: float, lr_embedding: float | None
) -> Ratio:
    """LoRA+ (Hayou et al. 2024, arXiv:2402.12354, section 4): eta_B = lr_ratio * eta_A.

    It is **B** that learns faster: B (out, r) starts at zero and must grow, while A (r, in) is as large as the width
    makes it (theorem 1). Popular write-ups swap the two. As in PEFT's `create_loraplus_optimizer`, vectors (biases,
    norms, DoRA's magnitudes) learn with B's rate, and matrices that are trained whole with A's. `lr_embedding` is the
    rate, not the ratio, of both factors of an adapted embedding; None: they learn as other factors do (PEFT: 1e-6).

    Raises BadInput when no low-rank B is trained.
    """
    if not any(part in name for name in trained for part in LOW_RANK_B):
        raise BadInput(
            [
                Problem(
                    "`optim.loraplus_lr_ratio` needs the low-rank B of LoRA, and none is trained",
                    found=f"{len(trained)} trained parameters, such as {next(iter(trained), 'none')}",
                    allowed="adapter: lora, or dora",
                    fix="set adapter: lora, or delete loraplus_lr_ratio",
                )
            ]
        )

    def ratio(name: str, parameter: nn.Parameter) -> float:
        if lr_embedding is not None and any(part in name for part in EMBEDDING_FACTORS):
            return lr_embedding / learning_rate
        return lr_ratio if parameter.dim() <= 1 or any(part in name for part in LOW_RANK_B) else 1.0

    return ratio
