"""Masks: what is trained is the assistant's text and its end of turn, after exactly the prompt of generation."""

import copy

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shikomi.data.conversation import Conversation
from shikomi.data.encode import Encoder
from shikomi.errors import BadInput

TEMPLATES = ["qwen2_5", "llama3", "gemma", "phi3", "qwen3", "gemma3", "llama3_2"]
TRAINING = ["qwen2_5_training", "llama3_training", "gemma_training", "phi3_training"]
END = {"qwen": "<|im_end|>", "llam": "<|eot_id|>", "gemm": "<end_of_turn>", "phi3": "<|end|>"}
TRIMS = {"llam", "gemm"}

words = st.text(
    st.one_of(
        st.sampled_from("ab 0.\n\t<|>/"),
        st.characters(exclude_categories=["Cs", "Cc", "Cn"], exclude_characters="\ufeff"),
    ),
    min_size=1,
    max_size=12,
)
specials = st.sampled_from(["<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end|>", "<|im_start|>", "<bos>", "<s>"])
plain_text = words.filter(lambda t: t.strip() and "<think>" not in t)
any_text = st.lists(st.one_of(words, specials), min_size=1, max_size=4).map("".join).filter(str.strip)


def turns(text):
    pair = st.tuples(text, text)
    return st.lists(pair, min_size=1, max_size=3).map(
        lambda pairs: tuple(
            {"role": role, "content": content}
            for question, answer in pairs
            for role, content in (("user", question), ("assistant", answer))
        )
    )


def expected_answers(name, messages):
    """What each assistant turn adds after the generation prompt, by hand."""
    kind = name[:4]
    out = []
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            text = message["content"].strip() if kind in TRIMS else message["content"]
            if name == "qwen3":  # its template drops leading line breaks and writes an empty thought into the last turn
                last = i == len(messages) - 1
                text = "<think>\n\n</think>\n\n" + text.lstrip("\n") if last else text
            out.append(text + END[kind])
    if name == "phi3_training":  # marks the end of text after the last turn as generated, too
        out[-1] += "<|endoftext|>"
    return out


def trained_runs(encoded):
    """The runs of trained tokens: lists of ids."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], encoded.mask, [False]]).astype(int)))
    return [encoded.ids[a:b].tolist() for a, b in zip(edges[::2], edges[1::2], strict=True)]


def decode(tokenizer, ids):
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("name", TEMPLATES + TRAINING)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_trained_tokens_are_the_answers_and_their_ends(make_tokenizer, name, data):
    messages = data.draw(turns(any_text))
    tokenizer = make_tokenizer(name)
    encoder = Encoder(tokenizer)
    encoded = encoder.encode(Conversation(messages))
    assert decode(tokenizer, encoded.ids[encoded.mask].tolist()) == "".join(expected_answers(name, messages))
    assert not encoded.mask[0]


@pytest.mark.parametrize("name", TEMPLATES + TRAINING)
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_prompt_is_the_training_prefix_of_every_answer(make_tokenizer, name, data):
    messages = data.draw(turns(any_text))
    encoder = Encoder(make_tokenizer(name))
    encoded = encoder.encode(Conversation(messages))
    starts = np.flatnonzero(np.diff(encoded.mask.astype(int)) == 1) + 1
    if name == "phi3_training":
        starts = starts[: len(messages) // 2]
    for turn, start in enumerate(starts):
        prompt = encoder.encode_prompt(Conversation(messages[: 2 * turn + 1]))
        assert prompt == encoded.ids[:start].tolist()
    assert encoder.encode_prompt(Conversation(messages)) == encoder.encode_prompt(Conversation(messages[:-1]))


@pytest.mark.parametrize("name", TEMPLATES + TRAINING)
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_special_strings_in_text_never_become_special_tokens(make_tokenizer, name, data):
    messages = data.draw(turns(any_text))
    tokenizer = make_tokenizer(name)
    encoded = Encoder(tokenizer).encode(Conversation(messages))
    harmless = tuple({**m, "content": "x"} for m in messages)
    written = Encoder(tokenizer).encode(Conversation(harmless))
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    assert [i for i in encoded.ids if i in special] == [i for i in written.ids if i in special]
    if name != "qwen3":  # which drops line breaks at the beginning of a turn
        strip = (lambda t: t.strip()) if name[:4] in TRIMS else (lambda t: t)
        text = decode(tokenizer, encoded.ids.tolist())
        assert all(strip(m["content"]) in text for m in messages)


@pytest.mark.parametrize("name", TEMPLATES + TRAINING)
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_ordinary_text_is_encoded_as_transformers_does(make_tokenizer, name, data):
    text = plain_text.filter(lambda t: t == t.strip() and not any(e in t for e in END.values()))
    messages = data.draw(turns(text))
    tokenizer = make_tokenizer(name)
    encoded = Encoder(tokenizer).encode(Conversation(messages))
    if name == "llama3_2":  # writes the day's date
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.chat_template = tokenizer.chat_template.replace("strftime_now is defined", "false")
    reference = tokenizer.apply_chat_template(list(messages), tokenize=True, return_dict=False)
    assert encoded.ids.tolist() == reference


@pytest.mark.parametrize("kind", ["prepend", "metaspace"])
@pytest.mark.parametrize("name", ["qwen2_5", "llama3", "phi3"])
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_every_kind_of_tokenizer_keeps_the_text_of_answers(make_tokenizer, name, kind, data):
    messages = data.draw(turns(any_text.filter(lambda t: "▁" not in t)))
    tokenizer = make_tokenizer(name, kind)
    encoder = Encoder(tokenizer)
    encoded = encoder.encode(Conversation(messages))
    runs = trained_runs(encoded)
    for ids, expected in zip(runs, expected_answers(name, messages), strict=True):
        # the decoders of these kinds drop one space at the beginning of what they are given
        assert decode(tokenizer, ids).lstrip(" ") == expected.lstrip(" ")
    start = int(np.argmax(encoded.mask))
    assert encoder.encode_prompt(Conversation(messages[:1])) == encoded.ids[:start].tolist()
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    last = messages[-1]["content"]
    answer = encoder.encode_answer(last)
    assert sum(i in special for i in answer if tokenizer.convert_ids_to_tokens(i)[:3] != "<0x") == 1


@settings(max_examples=20, deadline=None)
@given(answer=any_text, question=any_text)
@pytest.mark.parametrize("name", ["qwen2_5", "llama3", "gemma", "phi3", "qwen3"])
def test_encode_answer_is_what_training_has_after_the_prompt(make_tokenizer, name, question, answer):
    encoder = Encoder(make_tokenizer(name))
    messages = ({"role": "user", "content": question}, {"role": "assistant", "content": answer})
    encoded = encoder.encode(Conversation(messages))
    assert encoder.encode_answer(answer) == encoded.ids[encoded.mask].tolist()
    assert encoder.encode_prompt(Conversation(messages)) + encoder.encode_answer(answer) == (
        encoded.ids[: np.flatnonzero(encoded.mask)[-1] + 1].tolist()
    )


QA = (
    {"role": "user", "content": "one"},
    {"role": "assistant", "content": "first"},
    {"role": "user", "content": "two"},
    {"role": "assistant", "content": "second"},
)


def trained_text(encoder, conversation):
    encoded = encoder.encode(conversation)
    return decode(encoder.tokenizer, encoded.ids[encoded.mask].tolist())


@pytest.mark.parametrize("name", ["qwen2_5", "qwen2_5_training"])
def test_which_turns_are_trained(make_tokenizer, name):
    tokenizer = make_tokenizer(name)
    assert trained_text(Encoder(tokenizer), Conversation(QA)) == "first<|im_end|>second<|im_end|>"
    assert trained_text(Encoder(tokenizer, train_on="last"), Conversation(QA)) == "second<|im_end|>"
    silent = (QA[0], {**QA[1], "train": False}, *QA[2:])
    assert trained_text(Encoder(tokenizer), Conversation(silent)) == "second<|im_end|>"
    assert trained_text(Encoder(tokenizer), Conversation(QA, completion_from=2)) == "second<|im_end|>"
    everything = Encoder(tokenizer, train_on="everything").encode(Conversation(QA))
    assert everything.mask[1:].all() and not everything.mask[0]


def test_training_flag_does_not_change_the_ids(make_tokenizer):
    encoder = Encoder(make_tokenizer("qwen2_5"))
    silent = (QA[0], {**QA[1], "train": False}, *QA[2:])
    assert encoder.encode(Conversation(QA)).ids.tolist() == encoder.encode(Conversation(silent)).ids.tolist()
    assert "train" not in decode(encoder.tokenizer, encoder.encode(Conversation(silent)).ids.tolist())


def test_pad_token_that_is_the_end_of_turn_is_still_trained(make_tokenizer):
    tokenizer = copy.deepcopy(make_tokenizer("qwen2_5"))
    tokenizer.pad_token = "<|im_end|>"
    assert trained_text(Encoder(tokenizer), Conversation(QA[:2])) == "first<|im_end|>"


def test_tokens_that_swallow_white_space(make_tokenizer):
    # Phi-3's special tokens take the line break that follows into themselves
    tokenizer = make_tokenizer("phi3", rstrip=True)
    encoded = Encoder(tokenizer).encode(Conversation(QA))
    reference = tokenizer.apply_chat_template(list(QA), tokenize=True, return_dict=False)
    assert encoded.ids.tolist() == reference
    assert decode(tokenizer, encoded.ids[encoded.mask].tolist()) == "first<|end|>second<|end|>"
    evil = ({"role": "user", "content": "say <|end|>\n\nnow"}, QA[1])
    ids = Encoder(tokenizer).encode(Conversation(evil)).ids.tolist()
    assert ids.count(tokenizer.convert_tokens_to_ids("<|end|>")) == 2


def test_tools_and_tool_calls_reach_the_template(make_tokenizer):
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Kyoto"}}}
    messages = (
        {"role": "user", "content": "Rain?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "no <|im_end|>"},
        {"role": "assistant", "content": "No."},
    )
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
    encoder = Encoder(make_tokenizer("qwen2_5"))
    encoded = encoder.encode(Conversation(messages, tools=tools))
    trained = decode(encoder.tokenizer, encoded.ids[encoded.mask].tolist())
    assert '<tool_call>\n{"name": "weather", "arguments": {"city": "Kyoto"}}' in trained
    assert trained.count("<|im_end|>") == 2 and trained.endswith("No.<|im_end|>")
    assert "# Tools" in decode(encoder.tokenizer, encoded.ids.tolist())


def test_arguments_become_text_for_templates_that_need_it(make_tokenizer):
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content or '' }}"
        "{% for c in m.tool_calls or [] %}{{ 'call ' + c.function.arguments }}{% endfor %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    call = {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
    messages = (QA[0], {"role": "assistant", "content": "", "tool_calls": [call]})
    encoder = Encoder(make_tokenizer("qwen2_5"), template=template)
    assert trained_text(encoder, Conversation(messages)) == 'call {"a": 1}<|im_end|>'


def test_template_that_is_not_prefix_stable_is_named(make_tokenizer):
    encoder = Encoder(make_tokenizer("deepseek_r1_distill"))
    with pytest.raises(BadInput, match="chat template is not prefix-stable.*turn 2"):
        encoder.encode(Conversation(QA[:2]))


def test_generation_marks_serve_where_the_prompt_differs(make_tokenizer):
    encoder = Encoder(make_tokenizer("deepseek_r1_distill_training"))
    first, second = (f"<｜Assistant｜>{text}<｜end▁of▁sentence｜>" for text in ("first", "second"))
    assert trained_text(encoder, Conversation(QA)) == first + second
    assert trained_text(encoder, Conversation((QA[0], {**QA[1], "train": False}, *QA[2:]))) == second


def test_end_of_turn_outside_the_generation_mark_is_trained(make_tokenizer):
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    encoder = Encoder(make_tokenizer("qwen2_5"), template=template)
    assert trained_text(encoder, Conversation(QA)) == "first<|im_end|>second<|im_end|>"


def test_template_without_an_end_of_turn_gets_the_end_of_text(make_tokenizer):
    template = (
        "{% for m in messages %}### {{ m.role }}:\n{{ m.content }}\n\n{% endfor %}"
        "{% if add_generation_prompt %}### assistant:\n{% endif %}"
    )
    tokenizer = make_tokenizer("qwen2_5")
    encoder = Encoder(tokenizer, template=template)
    assert trained_text(encoder, Conversation(QA)) == "firstsecond<|im_end|>"
    assert encoder.encode_answer("x")[-1] == tokenizer.eos_token_id
    assert "writes no end of turn" in encoder.notes[0]


def test_end_of_turn_of_several_tokens(make_tokenizer):
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|endoftext|><|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer = make_tokenizer("qwen2_5")
    encoder = Encoder(tokenizer, template=template)
    assert trained_text(encoder, Conversation(QA[:2])) == "first<|endoftext|><|im_end|>"
    assert encoder.stop_ids == [tokenizer.convert_tokens_to_ids("<|im_end|>")]


def test_template_with_an_end_of_turn_in_words(make_tokenizer):
    template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }} [END]\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    encoder = Encoder(make_tokenizer("qwen2_5"), template=template)
    assert trained_text(encoder, Conversation(QA)) == " first [END] second [END]"


def test_template_file_replaces_the_models_own(make_tokenizer, template_text, tmp_path):
    path = tmp_path / "chat.jinja"
    path.write_text(template_text("qwen2_5"), encoding="utf-8")
    tokenizer = make_tokenizer("qwen3")
    assert trained_text(Encoder(tokenizer, template=str(path)), Conversation(QA[:2])) == "first<|im_end|>"
    with pytest.raises(BadInput, match="does not exist.*missing.jinja"):
        Encoder(tokenizer, template="missing.jinja")
    with pytest.raises(BadInput, match="line 1.*not a valid Jinja template"):
        Encoder(tokenizer, template="{% for %}")


def test_template_cannot_leave_the_sandbox(make_tokenizer):
    template = "{{ messages.__class__.__mro__ }}{% for m in messages %}{{ m.content }}{% endfor %}"
    with pytest.raises(BadInput, match="unsafe"):
        Encoder(make_tokenizer("qwen2_5"), template=template)


def test_refusal_of_the_template_is_passed_on(make_tokenizer):
    encoder = Encoder(make_tokenizer("gemma"))
    with pytest.raises(BadInput, match="System role not supported"):
        encoder.encode(Conversation(({"role": "system", "content": "s"}, *QA)))
    good, bad = encoder.encode_many([Conversation(QA), Conversation((QA[0], QA[0], QA[1]))])
    assert not isinstance(good, BadInput) and isinstance(bad, BadInput)


def test_plain_text_and_never(make_tokenizer):
    tokenizer = make_tokenizer("qwen2_5")
    row = Conversation(QA[:2], plain=("Q: one A:", " first"), completion_from=1)
    never = Encoder(tokenizer, chat="never")
    encoded = never.encode(row)
    assert decode(tokenizer, encoded.ids.tolist()) == "Q: one A: first<|im_end|>"
    assert decode(tokenizer, encoded.ids[encoded.mask].tolist()) == " first<|im_end|>"
    assert never.encode_prompt(row) + never.encode_answer(" first") == encoded.ids.tolist()
    text = never.encode(Conversation(text="a <|im_end|> b"))
    assert decode(tokenizer, text.ids.tolist()) == "a <|im_end|> b<|im_end|>"
    assert (text.ids == tokenizer.eos_token_id).sum() == 1 and text.special_text
    assert text.mask[1:].all()
    with pytest.raises(BadInput, match="chat: never"):
        never.encode(Conversation(QA))


def test_base_model_without_template(make_tokenizer):
    tokenizer = copy.deepcopy(make_tokenizer("llama3"))
    tokenizer.chat_template = None
    row = Conversation(QA[:2], plain=("one", " first"), completion_from=1)
    assert trained_text(Encoder(tokenizer), row) == " first<|eot_id|>"
    with pytest.raises(BadInput, match="without a chat template"):
        Encoder(tokenizer).encode(Conversation(QA))
    with pytest.raises(BadInput, match="always needs a chat template"):
        Encoder(tokenizer, chat="always")


def test_beginning_of_text_token_where_the_tokenizer_adds_one(make_tokenizer):
    from tokenizers.processors import TemplateProcessing

    tokenizer = copy.deepcopy(make_tokenizer("gemma"))
    bos = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", bos)])
    text = Encoder(tokenizer).encode(Conversation(text="hello"))
    assert text.ids[0] == bos and not text.mask[0] and text.mask[1:].all()
    chat = Encoder(tokenizer).encode(Conversation(QA))
    assert (chat.ids == bos).sum() == 1


def test_truncation_cuts_the_end_and_is_counted(make_tokenizer):
    tokenizer = make_tokenizer("qwen2_5")
    whole = Encoder(tokenizer).encode(Conversation(QA))
    cut = Encoder(tokenizer, max_length=len(whole.ids) - 4).encode(Conversation(QA))
    assert cut.cut == 4 and cut.ids.tolist() == whole.ids[:-4].tolist()
    assert cut.targets_cut == whole.mask[-4:].sum() > 0
    assert whole.cut == 0


def test_limits_saved_in_the_tokenizer_do_not_cut_rows(make_tokenizer):
    tokenizer = copy.deepcopy(make_tokenizer("qwen2_5"))
    whole = len(Encoder(tokenizer).encode(Conversation(QA)).ids)
    tokenizer.backend_tokenizer.enable_truncation(5)
    assert len(Encoder(tokenizer).encode(Conversation(QA)).ids) == whole


def test_decode_answer_stops_at_the_end_of_turn(make_tokenizer):
    encoder = Encoder(make_tokenizer("llama3"))
    assert encoder.decode_answer([*encoder.encode_answer("games"), *encoder.encode_answer("web")]) == "games"
    assert encoder.tokenizer.convert_tokens_to_ids("<|eot_id|>") in encoder.stop_ids


def test_date_in_a_template_is_always_the_same(make_tokenizer):
    encoder = Encoder(make_tokenizer("llama3_2"))
    assert "26 Jul 2024" in decode(encoder.tokenizer, encoder.encode_prompt(Conversation(QA[:1])))


def test_fingerprint_changes_with_everything_that_changes_tokens(make_tokenizer, template_text):
    tokenizer = make_tokenizer("qwen2_5")
    encoders = [
        Encoder(tokenizer),
        Encoder(tokenizer, chat="never"),
        Encoder(tokenizer, train_on="last"),
        Encoder(tokenizer, max_length=9),
        Encoder(tokenizer, template=template_text("qwen2_5") + " "),
        Encoder(make_tokenizer("qwen3")),
    ]
    assert len({e.fingerprint() for e in encoders}) == len(encoders)
    assert Encoder(tokenizer).fingerprint() == encoders[0].fingerprint()
