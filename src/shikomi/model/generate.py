"""Text from a model, through transformers' generate with its caches and the model's own attention."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import GenerationConfig, TextStreamer

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
) -> list[list[int]]:
    """New tokens of each prompt, without the stop token that ended them; temperature 0 is greedy.

    `stream` gets the text of a single prompt's answer piece by piece; `context` comes before every prompt.
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
        inputs = {"input_ids": ids.to(device), "attention_mask": attend.to(device)}
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
