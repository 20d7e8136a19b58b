"""Every metric against the definition of the field, or the package that people quote."""

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics import BLEU, CHRF

from shikomi import registry
from shikomi.metrics import measure
from shikomi.metrics.accuracy import Accuracy
from shikomi.metrics.bleu import Bleu
from shikomi.metrics.chrf import ChrF
from shikomi.metrics.exact_match import ExactMatch
from shikomi.metrics.loss import Loss
from shikomi.metrics.macro_f1 import MacroF1
from shikomi.metrics.perplexity import Perplexity
from shikomi.metrics.rouge import Rouge

ENGLISH = [
    ("the quick brown fox jumps", "the quick brown dog jumps over"),
    ("a library for reading PNG files", "library for the PNG file format"),
    ("nothing in common", "Utterly different; really!"),
    ("", "an empty answer"),
    ("exactly the same words here", "exactly the same words here"),
]
JAPANESE = [
    ("画像ファイルを読むライブラリ", "画像ファイルを読み込むライブラリ"),
    ("簡単なテキストエディタ", "軽量なテキストエディタ"),
]
PREDICTIONS, REFERENCES = map(list, zip(*ENGLISH, strict=True))
SAMPLES: dict[str, tuple[list, list]] = {
    "labels": (["a", "b", "b", "c"], ["a", "b", "c", "c"]),
    "text": (PREDICTIONS, REFERENCES),
    "logp": ([-1.0, -2.5, -0.2], [3, 4, 1]),
}


def macro_f1_by_hand(predictions: list[str], references: list[str]) -> float:
    scores = []
    for label in set(predictions) | set(references):
        right = sum(p == r == label for p, r in zip(predictions, references, strict=True))
        wrong = sum((p == label) != (r == label) for p, r in zip(predictions, references, strict=True))
        scores.append(right / (right + wrong / 2))
    return float(np.mean(scores))


@pytest.mark.parametrize("name", registry.names("metrics"))
def test_every_metric_keeps_the_contract(name: str) -> None:
    metric: Any = registry.find("metrics", name)()
    predictions, references = SAMPLES[metric.needs]
    score = metric(predictions, references)
    assert np.isfinite(score["value"]) and len(score["rows"]) == score["n"] == len(references)
    # Additive: the value comes from sums, so doubled rows give the same value.
    assert metric(predictions * 2, references * 2)["value"] == pytest.approx(score["value"])
    # A perfect answer scores at least as well as this one, in the direction that the metric declares.
    perfect = metric([0.0] * 3 if metric.needs == "logp" else references, references)["value"]
    assert perfect > score["value"] if metric.higher_is_better else perfect < score["value"]
    measured = measure(metric, predictions, references)
    json.dumps(measured, allow_nan=False)
    assert measured["ci95"][0] <= measured["value"] <= measured["ci95"][1]
    with pytest.raises(ValueError, match="at least one row"):
        metric([], [])
    with pytest.raises(ValueError, match="predictions for"):
        metric(predictions, references[:-1])


def test_all_metrics_are_found() -> None:
    expected = "accuracy bleu chrf exact_match loss macro_f1 perplexity rouge"
    assert registry.names("metrics") == expected.split()


def test_accuracy_counts_rows() -> None:
    score = Accuracy()(["a", "b", "b", "c"], ["a", "b", "c", "c"])
    assert score["value"] == 0.75 and score["rows"] == [1, 1, 0, 1] and score["details"] == {"right": 3}


@given(st.lists(st.tuples(st.sampled_from("abcd"), st.sampled_from("abc")), min_size=1, max_size=40))
def test_macro_f1_is_the_mean_over_classes(rows: list[tuple[str, str]]) -> None:
    predictions, references = map(list, zip(*rows, strict=True))
    assert MacroF1()(predictions, references)["value"] == pytest.approx(macro_f1_by_hand(predictions, references))


def test_macro_f1_of_one_class_everywhere_is_low() -> None:
    references = ["common"] * 9 + ["rare"]
    score = MacroF1()(["common"] * 10, references)
    assert score["value"] == pytest.approx((18 / 19) / 2)
    assert score["details"]["classes"]["rare"] == {"f1": 0.0, "rows": 1}


def test_exact_match_compares_normal_forms() -> None:
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    assert ExactMatch()([f" {decomposed}\n", "Net"], [composed, "net"])["rows"] == [1, 0]
    assert ExactMatch(ignore_case=True)(["Net"], ["net"])["value"] == 1
    assert ExactMatch(ignore_punctuation=True)(["web, server."], ["web server"])["value"] == 1
    assert ExactMatch(ignore_punctuation=True)(["webserver"], ["web server"])["value"] == 0


@pytest.mark.parametrize("stem", [False, True])
@pytest.mark.parametrize("variant", ["rouge1", "rouge2", "rougeL"])
def test_rouge_is_rouge_score_on_english(variant: Any, stem: bool) -> None:
    scorer = RougeScorer([variant], use_stemmer=stem)
    expected = [scorer.score(reference, answer)[variant].fmeasure for answer, reference in ENGLISH]
    score = Rouge(variant=variant, stem=stem)(PREDICTIONS, REFERENCES)
    assert score["rows"] == pytest.approx(expected)
    assert score["value"] == pytest.approx(np.mean(expected)) == pytest.approx(score["details"][variant])


def test_rouge_sees_other_scripts_and_typographic_signs() -> None:
    japanese = Rouge(variant="rouge1")(*map(list, zip(*JAPANESE, strict=True)))
    assert 0.7 < japanese["value"] < 1
    plain, curly = ["it's a reader - fast readers"], ["it\u2019s a reader \u2014 fast readers"]
    assert Rouge(stem=True)(curly, plain)["value"] == 1
    assert Rouge()(["\u00e9tude"], ["tude"])["value"] == 0  # rouge-score itself calls these equal


@pytest.mark.parametrize("rows", [ENGLISH, JAPANESE, ENGLISH[2:4]])
def test_chrf_is_sacrebleu(rows: list[tuple[str, str]]) -> None:
    predictions, references = map(list, zip(*rows, strict=True))
    score = ChrF()(predictions, references)
    assert score["value"] == pytest.approx(CHRF().corpus_score(predictions, [references]).score)
    alone = [CHRF().sentence_score(p, [r]).score for p, r in rows]
    assert score["rows"] == pytest.approx(alone)
    other = CHRF(char_order=4, beta=3).corpus_score(predictions, [references]).score
    assert ChrF(char_order=4, beta=3.0)(predictions, references)["value"] == pytest.approx(other)


def test_bleu_is_sacrebleu() -> None:
    score = Bleu()(PREDICTIONS, REFERENCES)
    assert score["value"] == pytest.approx(BLEU().corpus_score(PREDICTIONS, [REFERENCES]).score)
    assert score["value"] > 1
    alone = BLEU(effective_order=True)
    assert score["rows"] == pytest.approx([alone.sentence_score(p, [r]).score for p, r in ENGLISH])
    assert score["details"]["tokenize"] == "13a"


def test_bleu_of_japanese_counts_characters() -> None:
    predictions, references = map(list, zip(*JAPANESE, strict=True))
    expected = BLEU(tokenize="char").corpus_score(predictions, [references]).score
    score = Bleu()(predictions, references)
    assert score["value"] == pytest.approx(expected) and score["details"]["tokenize"] == "char"
    assert Bleu(tokenize="13a")(predictions, references)["value"] < score["value"]


def test_loss_weighs_tokens_and_perplexity_is_its_exponential() -> None:
    logp, tokens = [-1.0, -6.0], [1, 3]
    assert Loss()(logp, tokens)["value"] == pytest.approx(7 / 4)
    assert Loss()(logp, tokens)["rows"] == pytest.approx([1, 2])
    assert Perplexity()(logp, tokens)["value"] == pytest.approx(np.exp(7 / 4))
