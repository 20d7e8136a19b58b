"""What two runs must share to give the same bits."""

import json

import torch

from shikomi.checkpoint.diff import differences
from shikomi.checkpoint.fingerprint import compare, fingerprint


def test_it_names_versions_threads_and_machine_and_survives_json():
    found = fingerprint()
    assert json.loads(json.dumps(found)) == found
    assert found["torch"] == torch.__version__ and found["threads"] == torch.get_num_threads()
    assert found["cpu_capability"] == torch.backends.cpu.get_cpu_capability()
    assert found["processor"] and found["transformers"][0].isdigit() and found["device"] == "cpu"


def test_threads_are_counted_when_asked():
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(before + 1)
        changed = compare({**fingerprint(), "threads": before}, fingerprint())
    finally:
        torch.set_num_threads(before)
    assert changed == [f"threads: was {before}, now {before + 1}"]
    assert compare(fingerprint(), fingerprint()) == []


def test_differences_are_leaves_in_words():
    before = {"a": {"b": 1, "gone": None}, "stages": [{"lr": 0.1}, {"lr": 0.2}], "same": (1, 2)}
    now = {"a": {"b": 1.5}, "stages": [{"lr": 0.1}, {"lr": 0.3}, {"lr": 0.4}], "same": [1, 2], "new": []}
    assert differences(before, now) == [
        "a.b: was 1, now 1.5",
        "a.gone: was None, now absent",
        "stages[1].lr: was 0.2, now 0.3",
        "stages[2].lr: was absent, now 0.4",
        "new: was absent, now []",
    ]
    assert differences({"a": 1}, {"a": 2}, ("x", "y")) == ["a: x 1, y 2"]
    assert differences({"a": {}}, {"a": {"b": 1}}) == ["a: was {}, now absent", "a.b: was absent, now 1"]
