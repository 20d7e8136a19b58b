"""The token cache: the same tokens as the encoder's, made once, and made again when damaged."""

import errno
import json
import multiprocessing
import os

import numpy as np
import pytest

from shikomi.data import store as store_module
from shikomi.data.check import Scan
from shikomi.data.conversation import Conversation
from shikomi.data.encode import Encoder
from shikomi.data.split import split_rows
from shikomi.data.store import TokenStore
from shikomi.errors import BadInput, TryAgain
from shikomi.recipe import DataSpec, Source


@pytest.fixture
def data(tmp_path):
    rows = [{"prompt": f"question {n}", "completion": "answer " * (n % 3 + 1)} for n in range(10)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n\n" for row in rows), encoding="utf-8")
    return Source(path=str(path))


@pytest.fixture(scope="module")
def encoder(make_tokenizer):
    return Encoder(make_tokenizer("qwen2_5"), max_length=200)


def build(data, encoder, cache, **options):
    spec = DataSpec(train=(data,))
    return TokenStore.build([data], spec, encoder, cache, **options)


def test_rows_are_the_encoders(tmp_path, data, encoder):
    store = build(data, encoder, tmp_path / "cache")
    conversations = [item.conversation for item in Scan([data], DataSpec(train=(data,)))]
    assert len(store) == 10 and isinstance(conversations[0], Conversation)
    for i, conversation in enumerate(conversations):
        expected = encoder.encode(conversation)
        example = store[i]
        assert example.row == i
        assert np.array_equal(example.ids, expected.ids) and np.array_equal(example.mask, expected.mask)
        assert example.ids.dtype == np.int32 and example.mask.dtype == np.bool_
        assert store.where(i) == (data.path, 2 * i + 1)
    assert store.lengths.tolist() == [len(e) for e in store]
    assert store.report.rows == 10 and store.report.tokens == store.lengths.sum()
    assert store.report.trained_tokens == sum(e.n_targets for e in store)
    assert store.weights is None
    with pytest.raises(IndexError):
        store[10]


def test_second_time_nothing_is_tokenised(tmp_path, data, encoder, monkeypatch):
    first = build(data, encoder, tmp_path / "cache")
    monkeypatch.setattr(Encoder, "encode_many", None)
    again = build(data, encoder, tmp_path / "cache")
    assert again.fingerprint == first.fingerprint
    assert again.report == first.report and np.array_equal(again[3].ids, first[3].ids)


def test_key_follows_data_template_and_options(tmp_path, data, encoder, make_tokenizer):
    cache = tmp_path / "cache"
    keys = {
        build(data, encoder, cache).fingerprint,
        build(data, Encoder(make_tokenizer("qwen2_5"), max_length=150), cache).fingerprint,
        build(data, Encoder(make_tokenizer("qwen3"), max_length=200), cache).fingerprint,
        build(data.model_copy(update={"limit": 3}), encoder, cache).fingerprint,
        TokenStore.build(
            [data], DataSpec(train=(data,), prompt="{prompt}!", completion="{completion}"), encoder, cache
        ).fingerprint,
    }
    with open(data.path, "a", encoding="utf-8") as file:
        file.write('{"prompt": "p", "completion": "c"}\n')
    keys.add(build(data, encoder, cache).fingerprint)
    assert len(keys) == 6


@pytest.mark.parametrize("name", ["ids.bin", "mask.bin", "line.bin", "meta.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_damaged_cache_is_made_again(tmp_path, data, encoder, name, damage):
    cache = tmp_path / "cache"
    first = build(data, encoder, cache)
    path = cache / first.fingerprint / name
    content = path.read_bytes()
    path.unlink()
    if damage != "remove":
        path.write_bytes(content[:-3] if damage == "cut" else bytes([content[0] ^ 1]) + content[1:])
    again = build(data, encoder, cache)
    assert path.read_bytes() == content
    assert np.array_equal(
        again[0].ids, encoder.encode(next(iter(Scan([data], DataSpec(train=(data,))))).conversation).ids
    )


def test_bad_rows_leave_nothing_behind(tmp_path, data, encoder):
    with open(data.path, "a", encoding="utf-8") as file:
        file.write('{"prompt": "p"}\nbroken\n')
    with pytest.raises(BadInput) as error:
        build(data, encoder, tmp_path / "cache")
    assert [p.line for p in error.value.problems] == [21, 22]
    assert [p.suffix for p in (tmp_path / "cache").iterdir()] == [".lock"]


def test_full_disk_says_try_again_and_leaves_nothing(tmp_path, data, encoder, monkeypatch):
    def full(fd):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(TryAgain, match="disk is full"):
        build(data, encoder, tmp_path / "cache")
    monkeypatch.undo()
    assert not [p for p in (tmp_path / "cache").iterdir() if p.is_dir()]
    assert len(build(data, encoder, tmp_path / "cache")) == 10


def test_remains_of_a_killed_builder_are_removed(tmp_path, data, encoder):
    cache = tmp_path / "cache"
    key = build(data, encoder, cache).fingerprint
    (cache / key).rename(cache / f"{key}.tmp")
    (cache / f"{key}.tmp" / "ids.bin").write_bytes(b"half")
    assert len(build(data, encoder, cache)) == 10
    assert not (cache / f"{key}.tmp").exists()


def _build_in_process(data, encoder, cache):
    build(data, encoder, cache)


def test_builders_at_the_same_time(tmp_path, data, encoder):
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_build_in_process, args=(data, encoder, tmp_path / "cache")) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [w.exitcode for w in workers] == [0] * 4
    assert len(build(data, encoder, tmp_path / "cache")) == 10


def test_sources_with_weights_and_sides(tmp_path, data, encoder):
    other = tmp_path / "other.jsonl"
    other.write_text('{"prompt": "o", "completion": "c"}\n', encoding="utf-8")
    sources = [data.model_copy(update={"weight": 0.5, "limit": 4}), Source(path=str(other), weight=2.5)]
    spec = DataSpec(train=tuple(sources))
    store = TokenStore.build(sources, spec, encoder, tmp_path / "cache")
    assert store.weights.tolist() == [0.5] * 4 + [2.5]
    assert store.where(4) == (str(other), 1)
    train, validation = split_rows((item.conversation for item in Scan(sources, spec)), 0.4, seed=0)
    sides = [TokenStore.build(sources, spec, encoder, tmp_path / "cache", side=side) for side in (train, validation)]
    assert [len(s) for s in sides] == [3, 2]
    assert {s.where(i) for s in sides for i in range(len(s))} == {store.where(i) for i in range(5)}


def test_tokens_stay_on_the_disk(tmp_path, data, encoder):
    store = build(data, encoder, tmp_path / "cache")
    assert isinstance(store._arrays["ids"], np.memmap)
    assert store_module.VERSION >= 1
