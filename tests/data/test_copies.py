"""Nearly copied texts: found among many, and only those that a comparison of every pair finds."""

import numpy as np
import pytest

from shikomi.data import copies
from shikomi.data.copies import FEWEST, SIMILAR, Shingles


def runs(words):
    return {tuple(words[k : k + 3]) for k in range(len(words) - 2)}


def similarity(a, b):
    a, b = runs(a), runs(b)
    return len(a & b) / len(a | b)


@pytest.fixture
def texts():
    """Texts of 12 to 60 words; every other one is an earlier one with one word in ten or twenty changed, or none."""
    rng = np.random.default_rng(0)
    made = []
    for number in range(600):
        if number % 2 and number > 10:
            words = list(made[int(rng.integers(len(made)))])
            for at in np.flatnonzero(rng.random(len(words)) < rng.choice([0, 0.03, 0.06, 0.1])):
                words[at] = f"changed{number}x{at}"
        else:
            words = [f"w{n}" for n in rng.integers(0, 5000, int(rng.integers(12, 60)))]
        made.append(words)
    return made


def near(texts, without=None):
    shingles = Shingles()
    for words in texts:
        shingles.add(words)
    return shingles.near(without)


def test_found_are_those_of_every_pair_compared(texts):
    found = near(texts)
    sets = [runs(words) for words in texts]

    def alike(a, b):
        return len(a) >= FEWEST and len(a & b) >= SIMILAR * len(a | b)

    wanted = {i for i, own in enumerate(sets) if any(alike(own, other) for other in sets[:i])}
    assert all(other < text and alike(sets[text], sets[other]) for text, other in found)
    assert len({text for text, _ in found}) == len(found) and len(wanted) > 100
    assert len(wanted - {text for text, _ in found}) <= 0.02 * len(wanted)


def test_blocks_do_not_change_what_is_found(texts, monkeypatch):
    whole = near(texts)
    monkeypatch.setattr(copies, "_BLOCK", 7)
    assert near(texts) == whole


def test_texts_that_are_left_out_are_not_compared(texts):
    without = np.arange(len(texts)) % 2 == 0
    found = near(texts, without)
    assert found and all(text % 2 and other % 2 for text, other in found)


def test_what_many_texts_share_does_not_make_them_alike():
    common = [f"instruction{k}" for k in range(80)]
    made = [[*common, *(f"row{n}word{k}" for k in range(12))] for n in range(100)]
    assert similarity(made[0], made[1]) >= SIMILAR
    assert near(made) == []
    made[70] = [*made[30][:-1], "end"]
    assert near(made) == [(70, 30)]


def test_short_and_empty_texts_are_never_nearly_copies():
    assert near([["yes"], ["yes"], [], [], ["one", "two", "three"], ["one", "two", "three"]]) == []
    assert near([]) == []


def test_what_does_not_fit_is_counted(monkeypatch):
    monkeypatch.setattr(copies, "MOST_SHINGLES", 15)
    monkeypatch.setattr(copies, "_BLOCK", 1)
    shingles = Shingles()
    words = [f"w{n}" for n in range(20)]
    for _ in range(4):
        shingles.add(words)
    assert shingles.near() == [] and shingles.left_out == 3
