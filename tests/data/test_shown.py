"""Tokens with their texts: they join to the whole text, for every kind of tokenizer."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shikomi.data.shown import HALF, brackets, spans

TEXT = "The dog ⛩ jumps.\n  日本語 and a\ttab 🦊"


@pytest.mark.parametrize("kind", ["bytes", "prepend", "metaspace"])
def test_texts_join_to_the_text_and_ids_to_the_ids(kind, make_tokenizer):
    tokenizer = make_tokenizer("qwen3", kind)
    ids = tokenizer.encode(TEXT, add_special_tokens=False)
    found = spans(tokenizer, ids, [False] * len(ids))
    assert "".join(span.text for span in found) == TEXT
    assert [token for span in found for token in span.ids] == ids
    assert not any(HALF in span.text for span in found), "a character in several tokens is shown whole"
    assert any(len(span.ids) > 1 for span in found)


@pytest.mark.parametrize("kind", ["prepend", "metaspace"])
def test_a_space_at_the_beginning_of_a_token_is_kept_behind_other_tokens(kind, make_tokenizer):
    tokenizer = make_tokenizer("qwen3", kind)
    ids = tokenizer.encode("The dog jumps", add_special_tokens=False)
    cut = len(ids) // 2
    whole = "".join(s.text for s in spans(tokenizer, ids, [False] * len(ids)))
    head, tail = (
        spans(tokenizer, ids[:cut], [False] * cut),
        spans(tokenizer, ids[cut:], [True] * (len(ids) - cut), ids[:cut]),
    )
    assert "".join(s.text for s in head + tail) == whole == "The dog jumps"


def test_what_is_trained_stands_in_brackets(tokenizer):
    ids = tokenizer.encode("a library of games", add_special_tokens=False)
    mask = [k % 4 > 1 for k in range(len(ids))]
    shown = brackets(spans(tokenizer, ids, mask))
    assert shown.replace("[[", "").replace("]]", "") == "a library of games"
    runs = [tokenizer.decode([i for i, m in zip(ids, mask, strict=True) if m][:2])]
    assert f"[[{runs[0]}]]" in shown


@settings(max_examples=25, deadline=None)
@given(text=st.text("ab 犬🦊é\n\ufffd", max_size=30), seed=st.integers(0, 7))
def test_a_mask_may_change_anywhere(text, seed, tokenizer):
    ids = tokenizer.encode(text, add_special_tokens=False)
    mask = [bool(seed >> (k % 3) & 1) for k in range(len(ids))]
    found = spans(tokenizer, ids, mask)
    assert [token for span in found for token in span.ids] == ids
    assert [span.trained for span in found for _ in span.ids] == mask
