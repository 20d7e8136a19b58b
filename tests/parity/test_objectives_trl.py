"""Values, gradients and logged numbers of the preference objectives against TRL's own loss code.

TRL's trainers are made without their constructors, which would load models and data; the methods that compute the loss
run unchanged, on a stand-in for the model that returns the log-probabilities, logits or rewards of this test.
"""

from collections import defaultdict
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from preference_records import counts, loss, metrics
from tiny_models import tiny_tokenizer
from torch import Tensor, nn
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.kto_trainer import KTOTrainer
from trl.trainer.reward_trainer import RewardTrainer

from shikomi.data.pairs import Completion, Thumb, mismatched
from shikomi.objectives._objective import Preferences
from shikomi.objectives.cpo import Cpo
from shikomi.objectives.dpo import Dpo
from shikomi.objectives.ipo import Ipo
from shikomi.objectives.kto import Kto, kl_baseline
from shikomi.objectives.orpo import Orpo
from shikomi.objectives.reward import Reward
from shikomi.objectives.simpo import Simpo

PROMPT = 4
CHOSEN, REJECTED = [3, 6, 1], [5, 2, 4]
LENGTHS = [*CHOSEN, *REJECTED]  # TRL's batch: all chosen completions, then all rejected ones
WIDTH, VOCABULARY = PROMPT + max(LENGTHS), 7

ACCELERATOR = SimpleNamespace(
    device=torch.device("cpu"),
    gather=lambda x: x,
    gather_for_metrics=lambda x: x,
    unwrap_model=lambda x: x,
    autocast=nullcontext,
)


def trainer(cls: type, **options: Any) -> Any:
    """One of TRL's trainers with only what its loss reads."""
    made = object.__new__(cls)
    made.model = nn.Module()
    made.model.is_gradient_checkpointing = False
    made.accelerator = ACCELERATOR
    made._metrics = {"train": defaultdict(list)}
    made._total_train_tokens, made._tp_size = 0, 1
    made.aux_loss_enabled = made.precompute_ref_logps = made.use_weighting = False
    made.ld_alpha = None
    made.f_divergence_type = "reverse_kl"
    made.ref_model = None
    for name, value in options.items():
        setattr(made, name, value)
    return made


def random_logps(rows: int, seed: int) -> Tensor:
    return -torch.rand(rows, WIDTH - 1, generator=torch.Generator().manual_seed(seed)) * 3 - 0.01


def completion_mask(lengths: list[int]) -> Tensor:
    """(rows, WIDTH) with ones on each row's completion, right after the prompt."""
    at = torch.arange(WIDTH)
    return torch.stack([(at >= PROMPT) & (at < PROMPT + n) for n in lengths]).long()


def model_of(logps: Tensor) -> Any:
    """A model whose fused head returns these log-probabilities (rows, WIDTH - 1), masked by its labels."""

    def call(labels: Tensor, **ignored: Any) -> SimpleNamespace:
        kept = torch.where(labels[:, 1:] != -100, logps, 0.0)
        nothing = torch.zeros_like(kept)
        return SimpleNamespace(log_probs=kept, entropy=nothing, mean_logits=nothing, is_top1=nothing.bool())

    return call


def ours(logps: Tensor, lengths: list[int], chosen: list[int], rejected: list[int], **more: Any) -> Preferences:
    """The same log-probabilities as one ragged record."""
    mask = completion_mask(lengths)[:, 1:].bool()
    return Preferences(
        logp=logps[mask],
        segment=torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)),
        chosen=torch.tensor(chosen, dtype=torch.long),
        rejected=torch.tensor(rejected, dtype=torch.long),
        **more,
    )


def compare(objective: Any, scored: Preferences, leaf: Tensor, theirs: Tensor, logged: dict[str, Any]) -> None:
    """Loss, gradient and every number that both log under one name."""
    outcome = objective(scored)
    total = loss(outcome, counts(scored))
    torch.testing.assert_close(total, theirs, rtol=1e-5, atol=1e-6)
    (expected,) = torch.autograd.grad(theirs, leaf)
    (grad,) = torch.autograd.grad(total, leaf)
    assert expected.abs().max() > 0
    torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-7)
    shown = metrics(outcome, counts(scored))
    shared = set(shown) & set(logged)
    assert set(shown) - shared <= {"lengths/chosen", "lengths/rejected", "chosen_below_reference"}
    for name in shared:
        assert shown[name] == pytest.approx(float(torch.as_tensor(logged[name])), rel=1e-4, abs=1e-6), name


def last(made: Any) -> dict[str, Any]:
    return {name: values[-1] for name, values in made._metrics["train"].items()}


GRADIENTS = SimpleNamespace(gradient_checkpointing_kwargs=None)
DPO = [
    (Dpo(beta=0.3), {"loss_types": ["sigmoid"]}),
    (Dpo(beta=0.3, loss_type="hinge"), {"loss_types": ["hinge"]}),
    (Dpo(beta=0.3, loss_type="sigmoid_norm"), {"loss_types": ["sigmoid_norm"]}),
    (Dpo(beta=0.3, loss_type="robust", label_smoothing=0.2), {"loss_types": ["robust"], "label_smoothing": 0.2}),
    (Dpo(beta=0.3, rpo_alpha=0.7), {"loss_types": ["sigmoid", "sft"], "loss_weights": [1.0, 0.7]}),
    (Ipo(beta=0.3), {"loss_types": ["ipo"]}),
]


@pytest.mark.parametrize("objective, options", DPO, ids=[str(objective) for objective, _ in DPO])
def test_dpo_and_ipo(objective, options):
    logps, reference = random_logps(6, 1).requires_grad_(), random_logps(6, 2)
    options = {"loss_weights": [1.0], "label_smoothing": 0.0} | options
    theirs = trainer(DPOTrainer, beta=0.3, ref_model=model_of(reference), args=GRADIENTS, **options)
    mask = completion_mask(LENGTHS)
    inputs = {"input_ids": torch.ones_like(mask), "attention_mask": torch.ones_like(mask), "completion_mask": mask}
    value = theirs._compute_loss(model_of(logps), inputs, False)
    ref_logp = reference[mask[:, 1:].bool()]
    scored = ours(logps, LENGTHS, [0, 1, 2], [3, 4, 5], ref_logp=ref_logp)
    logged = last(theirs)
    if objective.name == "dpo" and objective.rpo_alpha is not None:
        logged["nll_loss"] = -logps.detach()[:3][mask[:3, 1:].bool()].mean()
    compare(objective, scored, logps, value, logged)


SMOOTHED = [
    (Dpo(beta=0.3), "sigmoid", 0.0),
    (Dpo(beta=0.3, label_smoothing=0.2), "sigmoid", 0.2),
    (Ipo(beta=0.3, log_ratio="sum"), "ipo", 0.0),
]


@pytest.mark.parametrize(
    "objective, loss_type, smoothing", SMOOTHED, ids=[str(objective) for objective, *_ in SMOOTHED]
)
def test_label_smoothing_and_summed_ratios_are_cpos_loss_of_log_ratios(objective, loss_type, smoothing):
    """DPOTrainer lost cDPO's smoothing and has no summed IPO; CPOTrainer has both, on what it is given."""
    logps, reference = random_logps(6, 3).requires_grad_(), random_logps(6, 4)
    mask = completion_mask(LENGTHS)[:, 1:].bool()
    sums = torch.where(mask, logps - reference, 0.0).sum(1)
    theirs = trainer(CPOTrainer, beta=0.3, loss_type=loss_type, label_smoothing=smoothing, alpha=0.0)
    losses, chosen, rejected = theirs.cpo_loss(sums[:3], sums[3:])
    scored = ours(logps, LENGTHS, [0, 1, 2], [3, 4, 5], ref_logp=reference[mask])
    logged = {"rewards/chosen": chosen.mean(), "rewards/rejected": rejected.mean()}
    logged["rewards/margins"] = (chosen - rejected).mean()
    logged["rewards/accuracies"] = (chosen > rejected).float().mean()
    plain = torch.where(mask, logps.detach(), 0.0).sum(1)
    logged |= {"logps/chosen": plain[:3].mean(), "logps/rejected": plain[3:].mean()}
    compare(objective, scored, logps, losses.mean(), logged)


def logits_batch(seed: int) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """Logits (6, WIDTH, V) to be differentiated, TRL's paired batch, and each next token's log-probability."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(6, WIDTH, VOCABULARY, generator=generator).requires_grad_()
    mask = completion_mask(LENGTHS)
    ids = torch.randint(VOCABULARY, (6, WIDTH), generator=generator)
    attention = ((torch.arange(WIDTH) < PROMPT) | mask.bool()).long()
    labels = torch.where(mask.bool(), ids, -100)
    batch = {}
    for side, rows in (("chosen", slice(0, 3)), ("rejected", slice(3, 6))):
        batch |= {f"{side}_input_ids": ids[rows], f"{side}_attention_mask": attention[rows]}
        batch[f"{side}_labels"] = labels[rows]
    logps = logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
    return logits, batch, logps


LOGITS = [
    (Orpo(beta=0.3, nll="prompt_and_answer"), ORPOTrainer, {}),
    (Simpo(beta=2.0, gamma_beta_ratio=0.3), CPOTrainer, {"loss_type": "simpo", "simpo_gamma": 0.6, "cpo_alpha": 0.0}),
    (
        Simpo(beta=2.0, gamma_beta_ratio=0.0, label_smoothing=0.1),
        CPOTrainer,
        {"loss_type": "simpo", "simpo_gamma": 0.0, "cpo_alpha": 0.0, "label_smoothing": 0.1},
    ),
    (Cpo(beta=0.3, cpo_alpha=0.7), CPOTrainer, {"loss_type": "sigmoid", "cpo_alpha": 0.7}),
    (
        Cpo(beta=0.3, cpo_alpha=1.0, label_smoothing=0.1),
        CPOTrainer,
        {"loss_type": "sigmoid", "cpo_alpha": 1.0, "label_smoothing": 0.1},
    ),
]


@pytest.mark.parametrize("objective, cls, options", LOGITS, ids=[str(objective) for objective, *_ in LOGITS])
def test_methods_without_a_reference(objective, cls, options):
    logits, batch, logps = logits_batch(5)
    options = {"label_smoothing": 0.0, "alpha": 0.0, "pad_token_id": 0, "padding_value": 0} | options
    theirs = trainer(cls, beta=objective.beta, is_encoder_decoder=False, **options)
    value, logged = theirs.get_batch_loss_metrics(lambda *_, **__: SimpleNamespace(logits=logits), batch)
    scored = ours(logps, LENGTHS, [0, 1, 2], [3, 4, 5], prompt_logp=logps[:3, : PROMPT - 1].flatten())
    compare(objective, scored, logits, value, logged)


def test_orpo_over_the_answer_differs_from_trl_by_the_prompt_alone():
    logits, batch, logps = logits_batch(6)
    options = {"is_encoder_decoder": False, "padding_value": 0}
    value, logged = trainer(ORPOTrainer, beta=0.3, **options).get_batch_loss_metrics(
        lambda *_, **__: SimpleNamespace(logits=logits), batch
    )
    scored = ours(logps, LENGTHS, [0, 1, 2], [3, 4, 5])
    answers = -logps[:3][completion_mask(CHOSEN)[:, 1:].bool()].mean()
    expected = value - logged["nll_loss"] + answers
    torch.testing.assert_close(loss(Orpo(beta=0.3)(scored), counts(scored)), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("labels", [[True, False, True, False, False], [True] * 5, [False] * 5])
@pytest.mark.parametrize("drift", [-1.0, 1.0])  # with -1 the mean of the mismatched pairs is negative, the baseline 0
def test_kto(labels, drift):
    lengths = [3, 6, 1, 5, 2]
    logps, reference = random_logps(5, 7).requires_grad_(), random_logps(5, 8)
    other_lengths = [*lengths[-1:], *lengths[:-1]]
    other_reference = random_logps(5, 10)
    other = other_reference + drift * 0.2
    mask, other_mask = completion_mask(lengths), completion_mask(other_lengths)

    def model(matched: Tensor, mismatch: Tensor) -> Any:
        def call(input_ids: Tensor, **rest: Any) -> SimpleNamespace:
            return model_of(mismatch if int(input_ids[0, 0]) == 2 else matched)(input_ids=input_ids, **rest)

        return call

    inputs = {
        **{"input_ids": torch.ones_like(mask), "attention_mask": torch.ones_like(mask), "completion_mask": mask},
        **{"KL_input_ids": 2 * torch.ones_like(mask), "KL_attention_mask": torch.ones_like(mask)},
        **{"KL_completion_mask": other_mask, "label": torch.tensor(labels)},
    }
    options = {"beta": 0.3, "loss_type": "kto", "calculate_KL": True, "desirable_weight": 1.4, "args": GRADIENTS}
    theirs = trainer(KTOTrainer, undesirable_weight=0.6, ref_model=model(reference, other_reference), **options)
    value = theirs._compute_loss(model(logps, other), inputs, False)

    kl = kl_baseline(torch.where(other_mask[:, 1:].bool(), other - other_reference, 0.0).sum(1))
    assert bool(kl > 0) == (drift > 0)
    chosen = [i for i, label in enumerate(labels) if label]
    rejected = [i for i, label in enumerate(labels) if not label]
    ref_logp = reference[mask[:, 1:].bool()]
    scored = ours(logps, lengths, chosen, rejected, ref_logp=ref_logp, kl=kl)
    compare(Kto(beta=0.3, desirable_weight=1.4, undesirable_weight=0.6), scored, logps, value, last(theirs))


def test_the_mismatched_pairs_are_trls():
    """KTOTrainer rotates the completions of each batch when it prepares its data."""
    rows = [{"prompt": "cat ", "completion": word, "label": True} for word in ("one", "two", "three", "four")]
    theirs = trainer(KTOTrainer, calculate_KL=True, _tokenizer=tiny_tokenizer(), _is_vision_dataset=False)
    arguments = SimpleNamespace(dataset_num_proc=None, max_length=None, per_device_train_batch_size=4)
    prepared = theirs._prepare_dataset(Dataset.from_list(rows), tiny_tokenizer(), arguments, "eval")
    thumbs = [
        Thumb(np.asarray(prompt), Completion(np.asarray(ids), np.ones(len(ids), bool)), True)
        for prompt, ids in zip(prepared["prompt_ids"], prepared["completion_ids"], strict=True)
    ]
    assert len({tuple(ids) for ids in prepared["completion_ids"]}) == 4
    assert [m.completion.ids.tolist() for m in mismatched(thumbs)] == list(prepared["KL_completion_ids"])


@pytest.mark.parametrize("margin", [False, True])
@pytest.mark.parametrize("centre", [None, 0.05])
def test_reward(margin, centre):
    generator = torch.Generator().manual_seed(11)
    rewards = (torch.randn(6, 1, generator=generator) * 2).requires_grad_()
    margins = torch.rand(3, generator=generator) if margin else None
    theirs = trainer(RewardTrainer, args=SimpleNamespace(center_rewards_coefficient=centre))
    inputs: dict[str, Any] = {"attention_mask": torch.ones(6, WIDTH)}
    if margin:
        inputs["margin"] = margins
    value = theirs.compute_loss(lambda **_: SimpleNamespace(logits=rewards), inputs)
    empty = torch.empty(0)
    chosen, rejected = torch.tensor([0, 1, 2]), torch.tensor([3, 4, 5])
    scored = Preferences(empty, empty.long(), chosen, rejected, value=rewards[:, 0], margin=margins)
    compare(Reward(center_rewards_coefficient=centre), scored, rewards, value, last(theirs))
