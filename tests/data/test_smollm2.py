"""The real tokenizer and chat template of SmolLM2 on the shipped example rows."""

import numpy as np
import pytest
from transformers import AutoTokenizer

from shikomi.data.check import load_conversations
from shikomi.data.encode import Encoder
from shikomi.data.preferences import parse_pair
from shikomi.recipe import DataSpec, Source


@pytest.fixture(scope="module")
def smollm2(smollm2_folder):
    return AutoTokenizer.from_pretrained(smollm2_folder)


@pytest.fixture(scope="module")
def conversations(examples):
    source = Source(path=str(examples / "sections" / "train.jsonl"), limit=200)
    spec = DataSpec(train=(source,), prompt="Which section? One of: {labels}.\n\n{text}", completion="{label}")
    return [item.conversation for item in load_conversations([source], spec)]


def test_ids_are_those_of_transformers(smollm2, conversations):
    for conversation, encoded in zip(conversations, Encoder(smollm2).encode_many(conversations), strict=True):
        reference = smollm2.apply_chat_template(list(conversation.messages), tokenize=True, return_dict=False)
        assert encoded.ids.tolist() == reference


def test_trained_tokens_are_the_label_and_its_end(smollm2, conversations):
    encoder = Encoder(smollm2)
    for conversation in conversations:
        encoded = encoder.encode(conversation)
        assert smollm2.decode(encoded.ids[encoded.mask]) == conversation.label + "<|im_end|>"
        start = int(np.argmax(encoded.mask))
        assert encoder.encode_prompt(conversation) == encoded.ids[:start].tolist()
        assert encoder.encode_answer(conversation.label) == encoded.ids[encoded.mask].tolist()
    assert encoder.stop_ids == [smollm2.convert_tokens_to_ids("<|im_end|>")]


def test_pairs_are_what_transformers_renders(smollm2, conversations):
    encoder = Encoder(smollm2)
    for conversation in conversations[:50]:
        prompt, answers = (
            list(conversation.messages[:-1]),
            [[conversation.messages[-1]], [{"role": "assistant", "content": "I do not know.\n\nSorry."}]],
        )
        row = {"prompt": prompt, "chosen": answers[0], "rejected": answers[1]}
        found = encoder.encode_pair(parse_pair(row, DataSpec(train=(Source(path="r"),)), ("r", 1), None))
        for answer, ids in zip(answers, found.answers, strict=True):
            whole = smollm2.apply_chat_template([*prompt, *answer], tokenize=True, return_dict=False)
            assert [*found.prompt.tolist(), *ids.ids.tolist()] == whole
            assert smollm2.decode(ids.ids[ids.mask]) == answer[0]["content"] + "<|im_end|>"
        reference = smollm2.apply_chat_template(prompt, tokenize=True, return_dict=False, add_generation_prompt=True)
        assert found.prompt.tolist() == reference
