"""The comparison: same rows, the adapter really off for baselines, and a difference against the best of them."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from evaluating import LABELS, conversation, label_rows

from shikomi.adapters.lora import Lora
from shikomi.data.encode import Encoder
from shikomi.errors import BadInput
from shikomi.evaluate.compare import (
    best_baseline,
    common_beginning,
    compare,
    comparison,
    evaluate_baselines,
    majority,
)
from shikomi.evaluate.run_eval import Evaluation, Task, choose_metrics, evaluate, measured
from shikomi.model.language_model import LanguageModel
from shikomi.model.load import load_model

NAMES = ("majority", "zero-shot", "few-shot")


@pytest.fixture()
def task(encoder: Encoder) -> Task:
    return Task(label_rows(12), encoder, choose_metrics(["accuracy", "loss"], LABELS), LABELS, max_length=4096)


def answers(task: Task, *predictions: str) -> Evaluation:
    return measured(Evaluation(predictions, (), (), {}, 1.0), task)


def test_compare_with_an_adapter_that_moved(tiny_llama: Path, lm: LanguageModel, task: Task) -> None:
    adapted = load_model(str(tiny_llama), Lora(r=4), dtype="fp32", device="cpu")
    with torch.no_grad():
        for name, parameter in adapted.trainable().items():
            if "lora_B" in name:
                parameter.normal_(0, 0.5, generator=torch.Generator().manual_seed(1))
    found = compare(adapted, task, label_rows(30), NAMES, shots=2)
    json.dumps(found, allow_nan=False)
    untouched = evaluate(lm, task)
    zero = found["baseline"]["zero-shot"]["metrics"]
    assert zero["loss"]["value"] == pytest.approx(untouched.measurements["loss"]["value"], rel=1e-4)
    assert found["trained"]["metrics"]["loss"]["value"] != pytest.approx(zero["loss"]["value"], rel=1e-3)
    assert list(found["baseline"]) == list(NAMES) and found["n"] == 12
    assert found["baseline"]["majority"]["label"] == "admin" and found["baseline"]["few-shot"]["shots"] == 2
    assert "loss" not in found["baseline"]["majority"]["metrics"]
    assert len(found["examples"]) == 5 and found["examples_base"] in ("zero-shot", "few-shot")
    assert found["examples_common"].startswith("Which section")


def test_few_shot_prompts_reach_the_model(lm: LanguageModel, task: Task) -> None:
    found = evaluate_baselines(lm, task, label_rows(30), ("zero-shot", "few-shot"), shots=3)
    losses = [found[name].measurements["loss"]["value"] for name in ("zero-shot", "few-shot")]
    assert losses[0] != pytest.approx(losses[1], rel=1e-4)


def test_baselines_that_cannot_be_are_left_out(lm: LanguageModel, encoder: Encoder) -> None:
    rows = tuple(conversation(f"number {i}", "a text") for i in range(3))
    task = Task(rows, encoder, choose_metrics(["exact_match"], None), max_new_tokens=2)
    assert list(evaluate_baselines(lm, task, [], NAMES)) == ["zero-shot"]


def test_the_difference_is_against_the_best_baseline(task: Task) -> None:
    task = replace(task, metrics=task.metrics[:1])
    truth = task.references()
    half = [t if i % 2 else "net" for i, t in enumerate(truth)]
    baselines = {"zero-shot": answers(task, *["net"] * 12), "few-shot": answers(task, *half)}
    found = comparison(task, baselines, answers(task, *truth))
    assert best_baseline(task, baselines) == found["difference"]["against"] == "few-shot"
    gap = found["difference"]["metrics"]["accuracy"]
    wrong = sum(h != t for h, t in zip(half, truth, strict=True))
    assert gap["value"] == pytest.approx(wrong / 12) and gap["gained"] == wrong and gap["lost"] == 0
    assert comparison(task, {}, answers(task, *truth))["difference"] is None
    assert comparison(task, {}, answers(task, *truth))["examples"] == []


def test_lower_is_better_for_a_loss(task: Task) -> None:
    task = replace(task, metrics=task.metrics[1:])

    def with_loss(loss: float) -> Evaluation:
        return measured(Evaluation((), (-loss,) * 12, (1,) * 12, {}, 1.0), task)

    baselines = {"zero-shot": with_loss(3.0), "few-shot": with_loss(2.0)}
    found = comparison(task, baselines, with_loss(1.5))
    assert found["difference"]["against"] == "few-shot"
    assert found["difference"]["metrics"]["loss"]["value"] == pytest.approx(-0.5)
    other_tokens = replace(with_loss(1.5), tokens=(2,) * 12)
    assert comparison(task, baselines, other_tokens)["difference"]["metrics"] == {}


def test_examples_are_the_same_rows_for_everyone_and_not_picked(task: Task) -> None:
    task = replace(task, metrics=task.metrics[:1])
    baselines = {"majority": majority(task, label_rows(4)), "zero-shot": answers(task, *["net"] * 12)}
    trained = answers(task, *["admin"] * 12)
    first, again = (comparison(task, baselines, trained)["examples"] for _ in range(2))
    other = comparison(replace(task, seed=1), baselines, trained)["examples"]
    assert first == again != other
    by_input = dict(zip((row.messages[0]["content"] for row in task.rows), task.references(), strict=True))
    for example in first:
        assert by_input[example["input"]] == example["reference"]
        assert (example["base"], example["trained"]) == ("net", "admin")


def test_majority_needs_training_rows_with_labels(task: Task) -> None:
    assert set(majority(task, label_rows(4)).predictions) == {"admin"}
    with pytest.raises(BadInput, match="majority"):
        majority(task, [conversation("x", "not a label")])


def test_common_beginnings_end_at_a_space() -> None:
    start = "Answer with one of the following sections: admin, games, net. "
    assert common_beginning([f"{start}some text", f"{start}something", f"{start}other"]) == start
    assert common_beginning(["short one", "short two"]) == "" == common_beginning([start])
    assert common_beginning([start, start]) == start
