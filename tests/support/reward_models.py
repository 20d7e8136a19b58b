"""Reward models on tiny bases, conversations that they judge, and the same values by transformers."""

import torch
from architectures import build
from preference_rows import pairs

from shikomi.data.conversation import Conversation
from shikomi.model.device import Dtypes
from shikomi.model.heads import fresh_head
from shikomi.model.load import wrap
from shikomi.model.probe import choose_path

CPU = torch.device("cpu")
FP32 = Dtypes(torch.float32, torch.float32)


def reward_model(name: str, adapter=None, dtypes: Dtypes = FP32, seed: int = 0):
    """A tiny model with a fresh scalar head."""
    lm = wrap(build(name).to(dtypes.storage), None, adapter, dtypes, CPU)
    lm.scalar = fresh_head(lm.config, seed, CPU)
    choose_path(lm, 64)
    return lm


def conversations(count: int = 6) -> list[list[dict]]:
    """Prompts with chosen answers, then with rejected ones."""
    found = []
    for side in ("chosen", "rejected"):
        for row in pairs(count, seed=1):
            found.append([{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row[side]}])
    return found


def by_transformers(model, rm, rows: list[list[dict]], pad: int) -> torch.Tensor:
    """Values of a classifier of transformers, rows padded on the right."""
    encoded = rm.encoder.encode_answers([[conversation] for conversation in map(as_conversation, rows)])
    ids = [[*e.prompt.tolist(), *e.answers[0].ids.tolist()] for e in encoded]
    width = max(map(len, ids))
    padded = torch.tensor([row + [pad] * (width - len(row)) for row in ids])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in ids])
    with torch.no_grad():
        return model.eval()(input_ids=padded, attention_mask=mask).logits[:, 0].float()


def as_conversation(messages: list[dict]):
    return Conversation(tuple(messages), completion_from=len(messages) - 1)
