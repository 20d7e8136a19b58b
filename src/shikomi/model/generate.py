"""Text from a model, through transformers' generate with its caches and the model's own attention."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, TextStreamer
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from shikomi.adapters._adapter import Context
from shikomi.model.context import batch


class _Pieces(TextStreamer):
    """Hands out finished pieces of text as they come."""

    def __init__(self, tokenizer: Any, emit: Callable[[str], None]):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.emit = emit

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            self.emit(text)


def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    stop_ids: Sequence[int],
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
    stream: Callable[[str], None] | None,
    context: Context | None = None,
    samples: int = 1,
) -> list[list[int]]:
    """New tokens of each prompt, without the stop token that ended them; temperature 0 is greedy.

    `stream` gets the text of a single prompt's answer piece by piece; `context` comes before every prompt; `samples`
    answers to each prompt stand behind each other, and the prompt is computed once for them where the cache allows it.
    """
    longest = max(len(p) for p in prompts)
    pad = stop_ids[0] if stop_ids else 0
    ids = torch.full((len(prompts), longest), pad, dtype=torch.long)
    attend = torch.zeros(len(prompts), longest, dtype=torch.long)
    for row, prompt in enumerate(prompts):  # padded on the left, where nothing follows
        ids[row, longest - len(prompt) :] = torch.tensor(list(prompt))
        attend[row, longest - len(prompt) :] = 1
    settings: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        settings = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
    config = GenerationConfig(
        max_new_tokens=max_new_tokens, eos_token_id=list(stop_ids) or None, pad_token_id=pad, **settings
    )
    device = model.device
    with torch.no_grad(), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        inputs: dict[str, Any] = {"input_ids": ids.to(device), "attention_mask": attend.to(device)}
        cache = _shared(model, **inputs, samples=samples) if samples > 1 and context is None else {}
        inputs = {name: tensor.repeat_interleave(samples, 0) for name, tensor in inputs.items()} | cache
        if context is not None:
            inputs = batch(model, context, inputs["input_ids"], inputs["attention_mask"])
        out = model.generate(
            **inputs, generation_config=config, streamer=_Pieces(tokenizer, stream) if stream is not None else None
        )
    stops, done = set(stop_ids), inputs["input_ids"].shape[1] if "input_ids" in inputs else 0
    answers = []
    for tokens in out[:, done:].tolist():
        end = next((i for i, token in enumerate(tokens) if token in stops), len(tokens))
        answers.append(tokens[:end])
    return answers


def _shared(model: Any, input_ids: Tensor, attention_mask: Tensor, samples: int) -> dict[str, Any]:
    """Keys and values of all but the last token of each prompt, once for every sample: an argument of generate.

    Nothing for caches that hold anything else, such as the state of a recurrent layer.
    """
    takes = inspect.signature(model.forward).parameters
    name = next((n for n in ("cache", "past_key_values") if n in takes), None)  # renamed in transformers 5
    cache = DynamicCache(config=model.config)
    known = all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers)
    if name is None or not known or not cache.layers or input_ids.shape[1] < 2:
        return {}
    place = (attention_mask.cumsum(1) - 1).clamp(min=0)[:, :-1]
    positions = {"position_ids": place} if "position_ids" in takes else {}
    seen = {"input_ids": input_ids[:, :-1], "attention_mask": attention_mask[:, :-1]}
    model.base_model(**seen, **positions, **{name: cache}, use_cache=True)
    cache.batch_repeat_interleave(samples)
    return {name: cache}
