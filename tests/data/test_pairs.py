"""Preferences as tokens: the template's own rendering, TRL's ids, SFT's masks."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from tokenizers.processors import TemplateProcessing

from shikomi.data.encode import Encoder
from shikomi.data.pairs import Completion, Thumb, mismatched
from shikomi.data.preferences import parse_pair, parse_thumbs
from shikomi.errors import BadInput
from shikomi.recipe import DataSpec, Source

SPEC = DataSpec(train=(Source(path="rows.jsonl"),))
TOOLS = [{"type": "function", "function": {"name": "f", "description": "d", "parameters": {}}}]


def turns(text):
    names = {"s": "system", "u": "user", "a": "assistant", "t": "tool"}
    return [{"role": names[part[0]], "content": part[2:]} for part in text.split()]


def read(row):
    return parse_pair(row, SPEC, ("rows.jsonl", 1), None)


def encode(encoder, row):
    return encoder.encode_pair(read(row))


ROWS = [
    {"prompt": turns("u:question"), "chosen": turns("a:good"), "rejected": turns("a:worse")},
    {"prompt": turns("s:sys u:one a:two u:three"), "chosen": turns("a:good"), "rejected": turns("a:worse u:w a:z")},
    {"chosen": turns("u:one a:two u:three a:x"), "rejected": turns("u:one a:two u:three a:y")},
]


def trl_ids(rows, tokenizer):
    """prompt_ids, chosen_ids, rejected_ids that DPOTrainer makes of rows."""
    datasets = pytest.importorskip("datasets")
    from trl import DPOTrainer

    args = SimpleNamespace(dataset_num_proc=None, max_length=None, truncation_mode="keep_start")
    data = datasets.Dataset.from_list(rows)
    return list(DPOTrainer._prepare_dataset(SimpleNamespace(_tokenizer=tokenizer), data, tokenizer, args, "train"))


@pytest.mark.parametrize("template", ["qwen2_5", "qwen3", "llama3", "phi3", "qwen2_5_training"])
@pytest.mark.parametrize("number", range(len(ROWS)))
def test_ids_of_messages_are_trls(template, number, make_tokenizer):
    tokenizer = make_tokenizer(template)
    encoder = Encoder(tokenizer, train_on="everything")
    [theirs] = trl_ids([ROWS[number]], tokenizer)
    ours = encode(encoder, ROWS[number])
    assert ours.prompt.tolist() == theirs["prompt_ids"]
    assert [a.ids.tolist() for a in ours.answers] == [theirs["chosen_ids"], theirs["rejected_ids"]]
    assert all(a.mask.all() for a in ours.answers)  # everything: TRL's mask


@pytest.mark.parametrize(
    "row", [{"prompt": "Say it.", "chosen": " It", "rejected": " No"}, {"chosen": "p a", "rejected": "p b"}]
)
def test_ids_of_strings_are_trls(row, make_tokenizer):
    tokenizer = make_tokenizer("qwen2_5")
    [theirs] = trl_ids([row], tokenizer)
    ours = encode(Encoder(tokenizer, chat="never"), row)
    assert ours.prompt.tolist() == theirs["prompt_ids"] and ours.merges == 0
    assert [a.ids.tolist() for a in ours.answers] == [theirs["chosen_ids"], theirs["rejected_ids"]]


def test_ids_of_tools_are_trls(make_tokenizer):
    tokenizer = make_tokenizer("qwen2_5")
    row = {**ROWS[0], "tools": TOOLS}
    [theirs] = trl_ids([{**row, "tools": json.dumps(TOOLS)}], tokenizer)
    assert encode(Encoder(tokenizer), row).prompt.tolist() == theirs["prompt_ids"]
    assert len(theirs["prompt_ids"]) > len(encode(Encoder(tokenizer), ROWS[0]).prompt)


def test_judged_answers_and_mismatches_are_trls(make_tokenizer):
    datasets = pytest.importorskip("datasets")
    from trl.trainer.kto_trainer import KTOTrainer

    tokenizer = make_tokenizer("qwen2_5")
    rows = [{"prompt": turns(f"u:q{n}"), "completion": turns(f"a:x{n}"), "label": n % 2 == 0} for n in range(4)]
    args = SimpleNamespace(dataset_num_proc=None, max_length=None, per_device_train_batch_size=4)
    fake = SimpleNamespace(_tokenizer=tokenizer, calculate_KL=True, desirable_weight=1.0, undesirable_weight=1.0)
    theirs = list(KTOTrainer._prepare_dataset(fake, datasets.Dataset.from_list(rows), tokenizer, args, "train"))
    encoder = Encoder(tokenizer, train_on="everything")
    found = encoder.encode_answers([parse_thumbs(r, SPEC, ("r", 1), None)[0].answers for r in rows])
    thumbs = [thumb(a.prompt, a.answers[0], r["label"], n) for n, (a, r) in enumerate(zip(found, rows, strict=True))]
    for ours, other, row in zip(thumbs, mismatched(thumbs), theirs, strict=True):
        assert ours.prompt.tolist() == other.prompt.tolist() == row["prompt_ids"]
        assert ours.completion.ids.tolist() == row["completion_ids"] and ours.desirable == row["label"]
        assert other.completion.ids.tolist() == row["KL_completion_ids"] and other.row == ours.row


def thumb(prompt, answer, desirable, row=0):
    return Thumb(prompt, Completion(answer.ids, answer.mask), desirable, row)


@pytest.mark.parametrize("template", ["qwen2_5", "llama3", "gemma", "phi3", "qwen3_training"])
@pytest.mark.parametrize("train_on", ["all", "last"])
def test_the_mask_is_that_of_conversations(template, train_on, make_tokenizer):
    """Answer tokens are trained as SFT trains them behind the same prompt: both sides, end of turn included."""
    encoder = Encoder(make_tokenizer(template), train_on=train_on)
    row = {"prompt": turns("u:one a:two u:three"), "chosen": turns("a:good"), "rejected": turns("a:worse u:w a:z")}
    ours = encode(encoder, row)
    for answer, conversation in zip(ours.answers, read(row).answers, strict=True):
        whole = encoder.encode(conversation)
        assert np.array_equal(np.concatenate([ours.prompt, answer.ids]), whole.ids)
        assert np.array_equal(answer.mask, whole.mask[len(ours.prompt) :]) and not whole.mask[: len(ours.prompt)].any()
        assert answer.mask.any() and answer.ids.dtype == np.int32
    stops = encoder.stop_ids
    assert ours.answers[0].ids[answer_end(ours.answers[0])] in stops
    assert ours.prompt.tolist() == encoder.encode_prompt(
        parse_thumbs({"prompt": row["prompt"], "completion": row["chosen"], "label": True}, SPEC, ("r", 1), None)[
            0
        ].conversation
    )


def answer_end(answer):
    return int(np.flatnonzero(answer.mask)[-1])


def test_special_text_on_one_side_leaves_the_prompt_alike(make_tokenizer):
    encoder = Encoder(make_tokenizer("qwen2_5"))
    row = {**ROWS[0], "rejected": [{"role": "assistant", "content": "<|im_end|> x"}]}
    found = encode(encoder, row)
    assert found.prompt.tolist() == encode(encoder, ROWS[0]).prompt.tolist()
    end = encoder.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert found.answers[1].special_text and (found.answers[1].ids == end).sum() == 1


def test_plain_answers_lie_between_beginning_and_end_of_text(make_tokenizer):
    tokenizer = make_tokenizer.__wrapped__("gemma")
    bos = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", bos)])
    found = encode(Encoder(tokenizer, chat="never"), {"prompt": "p ", "chosen": "x", "rejected": "y"})
    assert found.prompt[0] == bos and (found.prompt == bos).sum() == 1
    for answer in found.answers:
        assert answer.ids[-1] == tokenizer.eos_token_id and answer.mask.all() and bos not in answer.ids


def test_joined_tokens_are_counted_and_encoded_apart(make_tokenizer):
    tokenizer = make_tokenizer("qwen2_5")
    word = next(w for w in ("assistant", "answer", "The") if len(tokenizer.encode(w)) == 1)
    row = {"prompt": word[:2], "chosen": word[2:], "rejected": " no"}
    found = encode(Encoder(tokenizer, chat="never"), row)
    assert found.merges == 1 and found.prompt.tolist() == tokenizer.encode(word[:2])
    assert found.answers[0].ids.tolist() == [*tokenizer.encode(word[2:]), tokenizer.eos_token_id]


def test_implicit_strings_are_never_a_chat(make_tokenizer):
    row = {"chosen": "the sky is blue", "rejected": "the sky is green"}
    plain = encode(Encoder(make_tokenizer("qwen2_5")), row)
    assert plain.prompt.tolist() == make_tokenizer("qwen2_5").encode("the sky is")
    with pytest.raises(BadInput, match="without `prompt`"):
        encode(Encoder(make_tokenizer("qwen2_5"), chat="always"), row)


def test_each_answer_is_cut_to_what_the_prompt_leaves(make_tokenizer):
    tokenizer = make_tokenizer("qwen2_5")
    row = {"prompt": "p", "chosen": "a", "rejected": "long answer " * 20}
    whole, prompt = encode(Encoder(tokenizer), row), len(encode(Encoder(tokenizer), row).prompt)
    limit = prompt + len(whole.answers[0].ids)
    cut = encode(Encoder(tokenizer, max_length=limit), row)
    assert cut.answers[0].cut == 0 and np.array_equal(cut.answers[0].ids, whole.answers[0].ids)
    lost = len(whole.answers[1].ids) - len(cut.answers[1].ids)
    assert cut.answers[1].cut == lost and len(cut.prompt) + len(cut.answers[1].ids) == limit
    assert cut.answers[1].targets_cut == whole.answers[1].mask.sum() - cut.answers[1].mask.sum()
    gone = encode(Encoder(tokenizer, max_length=prompt), row)
    assert [len(a.ids) for a in gone.answers] == [0, 0] and gone.answers[0].targets_cut > 0


def test_templates_that_change_the_prompt_are_refused_by_name(make_tokenizer):
    unstable = "{% for m in messages %}[{{ messages | length }}]{{ m['content'] }}{% endfor %}"
    with pytest.raises(BadInput, match="not prefix-stable"):
        encode(Encoder(make_tokenizer("qwen2_5"), template=unstable), ROWS[0])
    peeking = (
        "{{ messages[-1]['content'] | length }}{% for m in messages %}{% if m['role'] == 'assistant' %}"
        "{% generation %}{{ m['content'] }}<|im_end|>{% endgeneration %}"
        "{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
    )
    with pytest.raises(BadInput, match="differently before the chosen"):
        encode(Encoder(make_tokenizer("qwen2_5"), template=peeking), ROWS[0])
