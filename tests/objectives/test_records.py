"""From packed preferences through a model to a loss: the record, its counts, and that packing does not matter."""

import numpy as np
import pytest
import torch
from architectures import VOCABULARY, build
from preference_records import counts, loss, metrics
from torch import Tensor

from shikomi.adapters.lora import Lora
from shikomi.data.pairs import Completion, Pair, Thumb, pack_pairs, pack_thumbs
from shikomi.model.device import Dtypes
from shikomi.model.load import wrap
from shikomi.model.probe import choose_path
from shikomi.objectives._objective import Preferences, divided, preference_counts, preferences
from shikomi.objectives.dpo import Dpo
from shikomi.objectives.kto import Kto
from shikomi.objectives.orpo import Orpo
from shikomi.objectives.simpo import Simpo


@pytest.fixture(scope="module")
def lm():
    """A tiny model whose adapter has moved away from the reference."""
    model = wrap(build("llama"), None, Lora(r=4), Dtypes(torch.float32, torch.float32), torch.device("cpu"))
    choose_path(model, 64)
    generator = torch.Generator().manual_seed(3)
    for parameter in model.trainable().values():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


def completion(rng: np.random.Generator, length: int, unscored: int = 0) -> Completion:
    mask = np.arange(length) >= unscored
    return Completion(rng.integers(3, VOCABULARY, length).astype(np.int32), mask)


@pytest.fixture(scope="module")
def pairs() -> list[Pair]:
    rng = np.random.default_rng(0)
    shapes = [(20, 5, 3), (17, 2, 6), (4, 1, 4)]
    return [
        Pair(rng.integers(3, VOCABULARY, p).astype(np.int32), completion(rng, c), completion(rng, r, 1), 0.5 * i)
        for i, (p, c, r) in enumerate(shapes)
    ]


def read(lm, batch) -> Preferences:
    with lm.adapter_off(), torch.no_grad():
        ref_logp = lm.score(batch.packed).logp
    return preferences(lm.score(batch.packed), batch, ref_logp, kl=torch.tensor(0.1))


def test_the_record_holds_each_completions_tokens(lm, pairs):
    batch = pack_pairs(pairs, score_prompts=True)
    scored = read(lm, batch)
    assert scored.margin is not None and scored.margin.tolist() == [0.0, 0.5, 1.0]
    assert scored.prompt_logp is not None and scored.ref_logp is not None

    def alone(ids: np.ndarray) -> Tensor:
        """log p of every token but the first, from the model on this one sequence."""
        tokens = torch.from_numpy(ids.astype(np.int64))
        logits = lm.model(input_ids=tokens[None]).logits[0]
        return logits[:-1].log_softmax(-1).gather(1, tokens[1:, None])[:, 0]

    with torch.no_grad():
        prompts = []
        for i, pair in enumerate(pairs):
            for number, answer in ((scored.chosen[i], pair.chosen), (scored.rejected[i], pair.rejected)):
                whole = alone(np.concatenate([pair.prompt, answer.ids]))
                expected = whole[len(pair.prompt) - 1 :][torch.from_numpy(answer.mask)]
                torch.testing.assert_close(scored.logp[scored.segment == number], expected, rtol=1e-4, atol=1e-5)
            prompts.append(whole[: len(pair.prompt) - 1])
    torch.testing.assert_close(scored.prompt_logp.sort()[0], torch.cat(prompts).sort()[0], rtol=1e-4, atol=1e-5)
    with lm.adapter_off(), torch.no_grad():
        torch.testing.assert_close(scored.ref_logp, lm.score(batch.packed).logp[: len(scored.logp)])
    assert (scored.ref_logp - scored.logp).abs().max() > 0.01


def test_the_counts_are_those_of_the_record(lm, pairs):
    batch = pack_pairs(pairs, score_prompts=True)
    assert preference_counts([batch]) == counts(read(lm, batch))
    split = [pack_pairs(pairs[:1], score_prompts=True), pack_pairs(pairs[1:], score_prompts=True)]
    assert preference_counts(split) == preference_counts([batch])
    assert preference_counts([batch])["prompt_and_chosen_tokens"] == 5 + 2 + 1 + 19 + 16 + 3
    thumbs = pack_thumbs([Thumb(pairs[0].prompt, pairs[0].chosen, True)])
    assert preference_counts([thumbs])["rejected"] == 0
    assert "rewards/rejected" not in divided(Kto()(read(lm, thumbs)).metrics, preference_counts([thumbs]))


@pytest.mark.parametrize("objective", [Dpo(rpo_alpha=0.5), Simpo(), Orpo(nll="prompt_and_answer")], ids=str)
def test_packing_and_micro_batches_do_not_change_loss_or_gradient(lm, pairs, objective):
    prompts = "prompt_logp" in objective.needs

    def step(batches) -> tuple[float, list[Tensor], dict[str, float]]:
        divide = preference_counts(batches)
        outcomes = [objective(read(lm, batch)) for batch in batches]
        total = torch.stack([loss(outcome, divide) for outcome in outcomes]).sum()
        shown = [metrics(outcome, divide) for outcome in outcomes]
        grads = torch.autograd.grad(total, list(lm.trainable().values()))
        return total.item(), list(grads), {key: sum(part[key] for part in shown) for key in shown[0]}

    value, grads, shown = step([pack_pairs(pairs, score_prompts=prompts)])
    assert max(float(g.abs().max()) for g in grads) > 1e-4
    others = [
        [pack_pairs(pairs, share_prefix=False, score_prompts=prompts)],
        [pack_pairs([pair], score_prompts=prompts) for pair in reversed(pairs)],
    ]
    for batches in others:
        again, same, logged = step(batches)
        assert again == pytest.approx(value, rel=1e-5) and logged == pytest.approx(shown, rel=1e-4, abs=1e-6)
        for got, want in zip(same, grads, strict=True):
            assert (got - want).norm() < 1e-4 * want.norm()
