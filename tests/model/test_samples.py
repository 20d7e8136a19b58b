"""Several answers to a prompt: the prompt is computed once, and each answer is what it is when asked for alone."""

import pytest
from tiny_models import ARCHITECTURES

from shikomi.model.load import load_model

PROMPTS = [[5, 9, 12, 40, 77, 8, 30, 31, 200, 16, 11, 7], [90, 17, 33], [44, 45, 46, 47, 48, 49]]


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_greedy_samples_are_the_answer_alone(architecture, tiny_folder, monkeypatch):
    lm = load_model(str(tiny_folder(architecture)), None, "fp32", "cpu", 0, 64)
    expected = lm.generate(PROMPTS, max_new_tokens=12)
    computed = []
    base = type(lm.model.base_model)
    forward = base.forward

    def counted(self, *args, **kwargs):
        computed.append(kwargs["input_ids"].numel() if kwargs.get("input_ids") is not None else args[0].numel())
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(lm.model.base_model, "forward", counted.__get__(lm.model.base_model), raising=False)
    found = lm.generate(PROMPTS, max_new_tokens=12, samples=3)
    assert found == [answer for answer in expected for _ in range(3)]
    assert any(expected)
    longest = max(map(len, PROMPTS))
    if architecture != "falcon_h1":  # which has a recurrent state beside keys and values
        assert computed[:2] == [3 * (longest - 1), 9]
    else:
        assert computed[0] == 9 * longest


def test_samples_differ_and_are_those_of_their_seed(tiny_llama):
    lm = load_model(str(tiny_llama), None, "fp32", "cpu", 0, 64)
    how = {"max_new_tokens": 8, "temperature": 1.0, "samples": 4}
    found = lm.generate(PROMPTS, seed=1, **how)
    assert len(found) == 12 and len(set(map(tuple, found[:4]))) > 1
    assert found == lm.generate(PROMPTS, seed=1, **how) != lm.generate(PROMPTS, seed=2, **how)
