"""Evaluation of a real (tiny) model against transformers' own forward and generate."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from evaluating import LABELS, conversation, label_rows
from transformers import AutoModelForCausalLM

from shikomi.data.conversation import Conversation
from shikomi.data.encode import Encoder
from shikomi.errors import BadInput
from shikomi.evaluate.run_eval import Task, choose_metrics, evaluate, sample_rows
from shikomi.model.language_model import LanguageModel


@pytest.fixture(scope="module")
def reference(tiny_llama: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()


def token_logp(reference: Any, ids: list[int]) -> torch.Tensor:
    """log p of ids[1:] by transformers' forward."""
    with torch.no_grad():
        logits = reference(torch.tensor([ids])).logits[0, :-1].double()
    return logits.log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]


def test_labels_are_chosen_as_by_separate_forwards(lm: LanguageModel, encoder: Encoder, reference: Any) -> None:
    rows = label_rows(6)
    task = Task(rows, encoder, choose_metrics([], LABELS), LABELS)
    result = evaluate(lm, task)
    expected = []
    for row in rows:
        prompt = encoder.encode_prompt(row)
        sums = [
            token_logp(reference, prompt + (answer := encoder.encode_answer(label)))[-len(answer) :].sum()
            for label in LABELS
        ]
        expected.append(LABELS[int(torch.stack(sums).argmax())])
    assert list(result.predictions) == expected
    right = sum(e == r for e, r in zip(expected, task.references(), strict=True))
    assert result.measurements["accuracy"]["details"] == {"right": right}
    assert set(result.measurements) == {"accuracy", "macro_f1"} and result.seconds > 0


def test_loss_is_that_of_the_trained_tokens(lm: LanguageModel, encoder: Encoder, reference: Any) -> None:
    turns = [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "a server"},
        {"role": "user", "content": "more"},
        {"role": "assistant", "content": "tools for drawing graphs"},
    ]
    rows = (Conversation(messages=tuple(turns)), *label_rows(3), Conversation(text="plain text of a library"))
    result = evaluate(lm, Task(rows, encoder, choose_metrics(["loss", "perplexity"], None), micro_batch_tokens=64))
    nll, tokens = 0.0, 0
    for row in rows:
        encoded = encoder.encode(row)
        logp = token_logp(reference, encoded.ids.tolist())[torch.from_numpy(encoded.mask[1:])]
        nll, tokens = nll - float(logp.sum()), tokens + len(logp)
    assert result.measurements["loss"]["value"] == pytest.approx(nll / tokens, rel=1e-4)
    assert result.measurements["loss"]["details"] == {"tokens": tokens}
    assert result.measurements["perplexity"]["value"] == pytest.approx(np.exp(nll / tokens), rel=1e-3)
    assert result.predictions == ()


def test_few_shot_prompts_change_the_loss_only_through_the_context(
    lm: LanguageModel, encoder: Encoder, reference: Any
) -> None:
    rows = label_rows(4)
    task = Task(rows, encoder, choose_metrics(["loss"], None))
    own = [encoder.encode_prompt(row) for row in rows]
    given, plain = evaluate(lm, task, own), evaluate(lm, task)
    assert given.logp == pytest.approx(plain.logp, rel=1e-4) and given.tokens == plain.tokens
    shot = encoder.encode_prompt(conversation("before", "x"))
    longer = evaluate(lm, task, [shot + prompt for prompt in own])
    answer = encoder.encode_answer(task.references()[1])
    expected = token_logp(reference, shot + own[1] + answer)[-len(answer) :].sum()
    assert longer.logp[1] == pytest.approx(float(expected), rel=1e-4)


def test_free_text_is_generated_greedily(lm: LanguageModel, encoder: Encoder, reference: Any) -> None:
    rows = tuple(conversation(f"Summarise number {i}: " + "drawing " * (i % 3), "a text") for i in range(20))
    result = evaluate(lm, Task(rows, encoder, choose_metrics([], None), max_new_tokens=5))
    for row, text in list(zip(rows, result.predictions, strict=True))[::7]:
        ids = list(encoder.encode_prompt(row))
        start = len(ids)
        with torch.no_grad():
            for _ in range(5):
                ids.append(int(reference(torch.tensor([ids])).logits[0, -1].argmax()))
        assert text == encoder.decode_answer(ids[start:])
    assert set(result.measurements) == {"exact_match", "chrf"}


def test_text_metrics_of_a_label_task_see_the_label(lm: LanguageModel, encoder: Encoder) -> None:
    task = Task(label_rows(6), encoder, choose_metrics(["accuracy", "exact_match"], LABELS), LABELS)
    measured = evaluate(lm, task).measurements
    assert measured["accuracy"]["value"] == measured["exact_match"]["value"]


def test_metrics_must_fit_the_task() -> None:
    with pytest.raises(BadInput, match="accuracy need a label set"):
        choose_metrics(["accuracy"], None)
    with pytest.raises(BadInput, match="did you mean `accuracy`"):
        choose_metrics(["acuracy"], LABELS)
    assert [metric.name for metric in choose_metrics(["loss", "loss"], None)] == ["loss"]


def test_rows_must_fit_the_metrics(lm: LanguageModel, encoder: Encoder) -> None:
    task = Task(label_rows(3), encoder, choose_metrics([], LABELS), LABELS)
    with pytest.raises(BadInput, match="no rows"):
        evaluate(lm, replace(task, rows=()))
    with pytest.raises(BadInput, match="row 2"):
        evaluate(lm, replace(task, rows=(task.rows[0], conversation("open", None))))
    with pytest.raises(BadInput, match="no row's answer is a label"):
        evaluate(lm, replace(task, rows=(conversation("x", "sound"),)))
    result = evaluate(lm, replace(task, rows=(*task.rows, conversation("x", "sound"))))
    assert "1 rows count as wrong" in result.notes[0] and "sound" in result.notes[0]
    assert result.predictions[3] in LABELS


def test_a_sample_is_seeded_and_keeps_the_order() -> None:
    rows = label_rows(50)
    some = sample_rows(rows, 10, seed=1)
    assert some == sample_rows(rows, 10, seed=1) != sample_rows(rows, 10, seed=2)
    assert list(some) == sorted(some, key=rows.index) and len(set(map(rows.index, some))) == 10
    assert some != rows[:10]
    assert sample_rows(rows, None, 0) == sample_rows(rows, 50, 0) == rows
