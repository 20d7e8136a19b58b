"""The benchmarks refuse results that are none, and keep each other's sections of the results file."""

from pathlib import Path

import pytest


@pytest.fixture
def benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parent.parent / "benchmarks"))


def test_a_run_that_learns_nothing_or_something_else_is_no_result(benchmarks):
    import sft
    from measure import Failed

    good = {"tokens": 1000, "loss": [2.0, 1.9], "grad_norm": [1.0, 1.1]}
    assert sft.compare(good, {**good, "loss": [2.01, 1.9]})[0] == pytest.approx(0.005, rel=0.01)
    for bad in (
        {"grad_norm": [0.0, 1.1]},
        {"grad_norm": [1.0, 1.2]},
        {"loss": [2.0, 2.0]},
        {"tokens": 900},
        {"grad_norm": []},
    ):
        with pytest.raises(Failed):
            sft.compare({**good, **bad}, good)


def test_gemm_limit_counts_four_flop_per_parameter_and_token(benchmarks):
    import gemm

    config = {
        **{"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 100},
        **{"num_attention_heads": 4, "num_key_value_heads": 2},
    }
    flop = sum(2 * a * b * c * times for a, b, c, times in gemm.shapes(config, tokens=10, scored=3))
    body = 2 * (32 * 64 + 32 * 32 + 3 * 32 * 64)  # q, k, v; o; gate, up, down; in two layers
    assert flop == 4 * body * 10 + 4 * 32 * 100 * 3


def test_a_section_is_replaced_and_the_others_stay(benchmarks, tmp_path, monkeypatch, capsys):
    import measure

    monkeypatch.setattr(measure, "HERE", tmp_path / "benchmarks")
    monkeypatch.setattr(measure, "RESULTS", tmp_path / "RESULTS.md")
    measure.write_section("a", "First", "one", "run a")
    measure.write_section("b", "Second", "two", "run b")
    measure.write_section("a", "First", "three", "run a")
    text = (tmp_path / "RESULTS.md").read_text()
    assert "one" not in text and text.index("three") < text.index("two")
    assert text.count("## ") == 2
