"""Virtual tokens before a sequence, as transformers' own forward and generate take them."""

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from shikomi.adapters._adapter import Context


def alone(model: Any, context: Context, ids: Tensor) -> dict[str, Any]:
    """Arguments of a forward over one sequence (S,) behind the virtual tokens."""
    virtual, embeds = context.embeddings(), model.get_input_embeddings()(ids)
    if virtual is None:
        return {"input_ids": ids[None], **_prefilled(model, context, 1, embeds.dtype)}
    return {"inputs_embeds": torch.cat([virtual.to(embeds.dtype), embeds])[None], "use_cache": False}


def batch(model: Any, context: Context, ids: Tensor, attend: Tensor) -> dict[str, Any]:
    """Arguments of generate for prompts (B, L), padded on the left where `attend` (B, L) is 0.

    A prefix is a cache that holds its tokens already, which stand before the padding. Virtual tokens that run through
    the model stand between the padding and the prompt.
    """
    n, virtual, embeds = context.tokens, context.embeddings(), model.get_input_embeddings()(ids)
    if virtual is None:
        seen = torch.cat([attend.new_ones(len(ids), n), attend], 1)
        past = torch.cat([ids.new_zeros(len(ids), n), ids], 1)  # n tokens of it are in the cache
        return {"input_ids": past, "attention_mask": seen, **_prefilled(model, context, len(ids), embeds.dtype)}
    rows, masks = [], []
    for row, mask in zip(embeds, attend, strict=True):
        padding = int((mask == 0).sum())
        rows.append(torch.cat([row[:padding], virtual.to(row.dtype), row[padding:]]))
        masks.append(torch.cat([mask[:padding], mask.new_ones(n), mask[padding:]]))
    return {"inputs_embeds": torch.stack(rows), "attention_mask": torch.stack(masks)}


def _prefilled(model: Any, context: Context, rows: int, dtype: torch.dtype) -> dict[str, Any]:
    """The prefix as the filled cache that a forward takes. Raises TypeError where it takes none."""
    names = inspect.signature(model.forward).parameters
    name = next((n for n in ("cache", "past_key_values") if n in names), None)  # renamed in transformers 5
    if name is None:
        raise TypeError(f"{type(model).__name__} takes no cache of keys and values")
    cache = DynamicCache(config=model.config)
    for layer, (keys, values) in enumerate(context.keys_values() or ()):
        keys, values = (x.to(dtype).expand(rows, *x.shape) for x in (keys, values))
        cache.update(keys, values, layer)
    return {name: cache, "use_cache": True}


def batches(model: Any, context: Context | None, lengths: list[int], new_tokens: int) -> list[list[int]]:
    """Prompts that may be answered in one batch, by their numbers.

    Windows count rows, and padding stands between a prefix and its prompt: where a window ends inside, only prompts of
    one length go together.
    """
    everyone = list(range(len(lengths)))
    window = model.config.to_dict().get("sliding_window")
    if context is None or context.embeddings() is not None or window is None:
        return [everyone]
    if context.tokens + max(lengths) + new_tokens <= window:
        return [everyone]
    return [[i for i in everyone if lengths[i] == n] for n in sorted(set(lengths))]
