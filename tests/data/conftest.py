"""Tokenizers small enough to train in a test, and the chat templates that installed packages carry."""

from __future__ import annotations

import re
from functools import cache
from importlib.resources import files

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

CORPUS = [
    "The quick brown fox jumps over the lazy dog, and the dog does not answer.",
    "user\nassistant\nsystem\nmodel\nYou are a helpful assistant. Answer with one of: games, net, web.",
    "end start turn im eot id header think tool call response 0123456789 <|>|/",
] * 3

# template: (tokenizer's special tokens, bos, eos)
SPECIAL = {
    "qwen2_5": (["<|endoftext|>", "<|im_start|>", "<|im_end|>"], None, "<|im_end|>"),
    "qwen3": (["<|endoftext|>", "<|im_start|>", "<|im_end|>"], None, "<|im_end|>"),
    "llama3": (
        ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
        "<|begin_of_text|>",
        "<|eot_id|>",
    ),
    "llama3_2": (
        ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
        "<|begin_of_text|>",
        "<|eot_id|>",
    ),
    "gemma": (["<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"], "<bos>", "<eos>"),
    "gemma3": (["<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"], "<bos>", "<eos>"),
    "phi3": (
        ["<s>", "<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"],
        "<s>",
        "<|endoftext|>",
    ),
    "deepseek_r1_distill": (
        ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"],
        "<｜begin▁of▁sentence｜>",
        "<｜end▁of▁sentence｜>",
    ),
}


@cache
def trained_backend(kind: str) -> str:
    """A tokenizer's JSON: `bytes` (as GPT-2), or with a space put before the text: `prepend` (Llama 2), `metaspace`."""
    if kind == "bytes":
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    else:
        byte_tokens = [f"<0x{b:02X}>" for b in range(256)]
        backend = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
        if kind == "prepend":
            backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        else:
            backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        backend.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        trainer = trainers.BpeTrainer(
            vocab_size=500, special_tokens=["<unk>", *byte_tokens], show_progress=False, max_token_length=8
        )
    backend.train_from_iterator(CORPUS, trainer)
    if kind != "bytes":  # the byte tokens are ordinary tokens, not special ones
        text = backend.to_str()
        return re.sub(r'"special":\s*true', '"special": false', text)
    return backend.to_str()


@cache
def tokenizer_for(template: str, kind: str = "bytes", rstrip: bool = False) -> PreTrainedTokenizerFast:
    """A tokenizer with the special tokens of a chat template, and that template."""
    base = template.removesuffix("_training")
    special, bos, eos = SPECIAL[base]
    backend = Tokenizer.from_str(trained_backend(kind))
    backend.add_special_tokens([AddedToken(s, special=True, normalized=False, rstrip=rstrip) for s in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=bos,
        eos_token=eos,
        chat_template=chat_template(template),
        clean_up_tokenization_spaces=False,
    )


@cache
def chat_template(name: str) -> str:
    return (files("trl") / "chat_templates" / f"{name}.jinja").read_text("utf-8")


@pytest.fixture(scope="session")
def make_tokenizer():
    """tokenizer_for(template name, kind, rstrip)."""
    return tokenizer_for


@pytest.fixture(scope="session")
def template_text():
    """chat_template(name)."""
    return chat_template
