"""The equations of the preference objectives: numbers worked out by hand, signs of gradients, extremes, invariances."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from preference_records import by_hand, counts, loss, metrics, part, record

from shikomi import registry
from shikomi.errors import BadInput
from shikomi.objectives._objective import Preferences
from shikomi.objectives._preference import log1mexp, log_odds
from shikomi.objectives.cpo import Cpo
from shikomi.objectives.dpo import Dpo
from shikomi.objectives.ipo import Ipo
from shikomi.objectives.kto import Kto, kl_baseline
from shikomi.objectives.orpo import Orpo
from shikomi.objectives.reward import Reward
from shikomi.objectives.simpo import Simpo

PAIRED = [n for n in registry.names("objectives") if registry.find("objectives", n).data == "pairs" and n != "reward"]
WITH_REFERENCE = [Dpo(), Dpo(loss_type="sigmoid_norm"), Dpo(loss_type="hinge"), Ipo(), Ipo(log_ratio="sum")]


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def value(objective, scored: Preferences) -> float:
    return loss(objective(scored), counts(scored)).item()


# One pair: the chosen completion has two tokens, the rejected one has one.
CHOSEN, REJECTED = [-1.0, -0.5], [-0.7]
REFERENCE = torch.tensor([-1.2, -0.9, -0.2])  # log-ratios: 0.2 + 0.4 = 0.6 and -0.5, so d = 1.1


def one_pair(**more) -> Preferences:
    return by_hand([CHOSEN], [REJECTED], ref_logp=REFERENCE, **more)


@pytest.mark.parametrize(
    "objective, expected",
    [
        (Dpo(beta=0.5), -math.log(sigmoid(0.55))),
        (Dpo(beta=0.5, label_smoothing=0.1), -0.9 * math.log(sigmoid(0.55)) - 0.1 * math.log(sigmoid(-0.55))),
        (Dpo(beta=0.5, loss_type="sigmoid_norm"), -math.log(sigmoid(0.5 * (0.3 + 0.5)))),
        (Dpo(beta=0.5, loss_type="hinge"), 1 - 0.55),
        (Dpo(beta=2.0, loss_type="hinge"), 0.0),
        (
            Dpo(beta=0.5, loss_type="robust", label_smoothing=0.1),
            (-0.9 * math.log(sigmoid(0.55)) + 0.1 * math.log(sigmoid(-0.55))) / 0.8,
        ),
        (Dpo(beta=0.5, rpo_alpha=0.2), -math.log(sigmoid(0.55)) + 0.2 * 1.5 / 2),
        (Ipo(beta=0.5), (0.3 + 0.5 - 1) ** 2),
        (Ipo(beta=0.5, log_ratio="sum"), (1.1 - 1) ** 2),
        (Simpo(beta=2.0, gamma_beta_ratio=0.25), -math.log(sigmoid(2 * (-0.75 + 0.7) - 0.5))),
        (Cpo(beta=0.5, cpo_alpha=0.4), -math.log(sigmoid(0.5 * (-1.5 + 0.7))) + 0.4 * 1.5 / 2),
    ],
    ids=str,
)
def test_one_pair_by_hand(objective, expected):
    assert value(objective, one_pair()) == pytest.approx(expected, abs=1e-6)


def test_orpo_by_hand():
    p, q = math.exp(-0.75), math.exp(-0.7)
    odds_ratio = (p / (1 - p)) / (q / (1 - q))
    odds = -math.log(odds_ratio / (1 + odds_ratio))
    assert value(Orpo(beta=0.3), one_pair()) == pytest.approx(1.5 / 2 + 0.3 * odds, abs=1e-6)
    prompted = one_pair(prompt_logp=torch.tensor([-2.0, -1.0, -0.5]))
    whole = Orpo(beta=0.3, nll="prompt_and_answer")
    assert value(whole, prompted) == pytest.approx((1.5 + 3.5) / 5 + 0.3 * odds, abs=1e-6)
    assert whole.needs == {"prompt_logp"} and Orpo().needs == frozenset()


def test_ratios_of_long_completions_keep_their_digits():
    """Two sums of -20,000 leave 0.002 of rounding; their tokens' differences do not."""
    generator = torch.Generator().manual_seed(0)
    reference = -torch.rand(8000, generator=generator) * 10
    drift = 1e-4 * torch.randn(8000, generator=generator)
    scored = by_hand([(reference + drift)[:4000].tolist()], [(reference + drift)[4000:].tolist()], ref_logp=reference)
    exact = (scored.logp.detach().double() - reference.double()).reshape(2, -1).sum(1)
    shown = metrics(Dpo(beta=1.0)(scored), counts(scored))
    assert shown["rewards/margins"] == pytest.approx(float(exact[0] - exact[1]), abs=2e-6)


def test_kto_by_hand():
    # log-ratios 0.6 (desirable), -0.5 and 0.4 (undesirable), baseline 0.1, beta 0.5
    more = {"ref_logp": torch.tensor([-1.2, -0.9, -0.2, -1.4]), "kl": torch.tensor(0.1)}
    scored = by_hand([CHOSEN], [REJECTED, [-1.0]], **more)
    expected = 2 * (1 - sigmoid(0.5 * 0.5)) + 0.5 * (1 - sigmoid(0.5 * 0.6)) + 0.5 * (1 - sigmoid(0.5 * -0.3))
    objective = Kto(beta=0.5, desirable_weight=2.0, undesirable_weight=0.5)
    assert value(objective, scored) == pytest.approx(expected / 3, abs=1e-6)
    shown = metrics(objective(scored), counts(scored))
    assert shown["rewards/chosen"] == pytest.approx(0.3) and shown["rewards/rejected"] == pytest.approx(-0.025)
    assert shown["rewards/margins"] == pytest.approx(0.325) and shown["kl"] == pytest.approx(0.1)
    assert shown["logps/chosen"] == pytest.approx(-1.5) and shown["logps/rejected"] == pytest.approx(-0.85)
    assert shown["lengths/chosen"] == 2 and shown["lengths/rejected"] == 1


def test_reward_by_hand():
    values = torch.tensor([1.5, 0.2, 0.5, 0.4])  # two pairs: 1.5 over 0.5, 0.2 over 0.4
    scored = by_hand([[-1.0], [-1.0]], [[-1.0], [-1.0]], value=values.requires_grad_())
    plain = (-math.log(sigmoid(1.0)) - math.log(sigmoid(-0.2))) / 2
    assert value(Reward(), scored) == pytest.approx(plain, abs=1e-6)
    centred = plain + 0.1 * (2.0**2 + 0.6**2) / 2
    assert value(Reward(center_rewards_coefficient=0.1), scored) == pytest.approx(centred, abs=1e-6)
    margins = (-math.log(sigmoid(0.6)) - math.log(sigmoid(-0.3))) / 2
    assert value(Reward(), scored._replace(margin=torch.tensor([0.4, 0.1]))) == pytest.approx(margins, abs=1e-6)
    shown = metrics(Reward()(scored), counts(scored))
    assert shown == {"accuracy": 0.5, "margin": pytest.approx(0.4), "mean_reward": pytest.approx(0.65)}


def test_metrics_of_pairs_by_hand():
    # the second pair's log-ratios are -0.2 (chosen) and -0.1 (rejected): the wrong way round, and below the reference
    reference = torch.tensor([-1.2, -0.9, -0.8, -0.2, -0.4, -0.5])
    scored = by_hand([CHOSEN, [-1.0]], [REJECTED, [-0.6, -0.4]], ref_logp=reference)
    for objective in (Dpo(beta=0.5), Dpo(beta=0.5, loss_type="sigmoid_norm"), Ipo(beta=0.5)):
        assert metrics(objective(scored), counts(scored)) == {
            "rewards/chosen": pytest.approx(0.5 * (0.6 - 0.2) / 2),
            "rewards/rejected": pytest.approx(0.5 * (-0.5 - 0.1) / 2),
            "rewards/margins": pytest.approx(0.5 * (1.1 - 0.1) / 2),
            "rewards/accuracies": 0.5,
            "logps/chosen": pytest.approx(-1.25),
            "logps/rejected": pytest.approx(-0.85),
            "lengths/chosen": 1.5,
            "lengths/rejected": 1.5,
            "chosen_below_reference": 0.5,
        }
    shown = metrics(Simpo(beta=2.0)(scored), counts(scored))
    assert shown["rewards/chosen"] == pytest.approx(-1.75) and shown["logps/rejected"] == pytest.approx(-0.6)
    shown = metrics(Dpo(rpo_alpha=3.0)(scored), counts(scored))
    assert shown["nll_loss"] == pytest.approx(2.5 / 3)


@pytest.mark.parametrize("objective", [*WITH_REFERENCE, Kto()], ids=str)
def test_at_the_reference_nothing_is_gained_yet(objective):
    scored = record([3, 5, 2], [4, 1, 6])
    scored = scored._replace(ref_logp=scored.logp.detach().clone(), kl=torch.tensor(0.0))
    outcome = objective(scored)
    shown = metrics(outcome, counts(scored))
    assert shown["rewards/chosen"] == shown["rewards/rejected"] == shown["rewards/margins"] == 0.0
    smooth = {"ipo": 1 / (2 * objective.beta) ** 2, "kto": 0.5}.get(objective.name, math.log(2))
    hinge = objective.name == "dpo" and objective.loss_type == "hinge"
    assert loss(outcome, counts(scored)).item() == pytest.approx(1.0 if hinge else smooth, rel=1e-6)
    (grad,) = torch.autograd.grad(loss(outcome, counts(scored)), scored.logp)
    assert (grad[torch.isin(scored.segment, scored.chosen)] < 0).all()
    assert (grad[torch.isin(scored.segment, scored.rejected)] > 0).all()


@pytest.mark.parametrize("loss_type", ["sigmoid", "sigmoid_norm"])
def test_the_gradient_of_dpo_is_the_papers(loss_type):
    """Eq. 8: -beta sigmoid(-(reward of chosen - reward of rejected)) on the chosen, its opposite on the rejected."""
    (grad,) = torch.autograd.grad(loss(Dpo(beta=0.5, loss_type=loss_type)(s := one_pair()), counts(s)), s.logp)
    if loss_type == "sigmoid":
        strength = 0.5 * sigmoid(-0.55)
        assert grad.tolist() == pytest.approx([-strength, -strength, strength])
    else:
        strength = 0.5 * sigmoid(-0.4)
        assert grad.tolist() == pytest.approx([-strength / 2, -strength / 2, strength])


@pytest.mark.parametrize("name", [*PAIRED, "kto"])
@pytest.mark.parametrize("chosen", [-1e-9, 0.0, -1e-4, -1.0, -1e3, -1e5])
@pytest.mark.parametrize("rejected", [0.0, -1e-4, -1e3])
def test_extreme_log_probabilities_keep_the_gradient_finite(name, chosen, rejected):
    more = {"ref_logp": torch.full((4,), -2.0), "kl": torch.tensor(50.0)}
    scored = by_hand([[chosen, chosen]], [[rejected, rejected]], **more)
    total = loss(registry.find("objectives", name)()(scored), counts(scored))
    (grad,) = torch.autograd.grad(total, scored.logp)
    assert torch.isfinite(total) and torch.isfinite(grad).all()


def test_orpo_still_pushes_where_a_probability_is_rounded_to_one():
    scored = by_hand([[-1.0]], [[0.0]])
    (grad,) = torch.autograd.grad(loss(Orpo()(scored), counts(scored)), scored.logp)
    assert grad[0] < -1 and grad[1] > 0.1 * 1e5


def test_log1mexp_keeps_its_digits_and_its_gradient():
    x = torch.tensor([-1e-9, -1e-6, -1e-3, -0.5, -math.log(2), -1.0, -20.0, -80.0, -1e3], requires_grad=True)
    exact = torch.tensor([math.log(-math.expm1(v)) if v > -1 else math.log1p(-math.exp(v)) for v in x.tolist()])
    torch.testing.assert_close(log1mexp(x).detach(), exact, rtol=1e-6, atol=0)
    (grad,) = torch.autograd.grad(log1mexp(x).sum(), x)
    slope = torch.tensor([math.exp(v) / math.expm1(v) for v in x.tolist()])
    torch.testing.assert_close(grad, slope, rtol=1e-5, atol=0)
    assert log_odds(torch.tensor(math.log(0.8))) == pytest.approx(math.log(4), abs=1e-6)


def test_the_baseline_is_a_mean_over_mismatched_pairs_that_is_never_negative():
    ratios = torch.tensor([0.5, -0.1, 0.2], requires_grad=True)
    assert float(kl_baseline(ratios)) == pytest.approx(0.2) and not kl_baseline(ratios).requires_grad
    assert float(kl_baseline(-ratios)) == 0.0 and float(kl_baseline(ratios[:0])) == 0.0
    leaf = torch.tensor(0.5, requires_grad=True)
    scored = record([2], [3])._replace(kl=leaf)
    assert torch.autograd.grad(loss(Kto()(scored), counts(scored)), leaf, allow_unused=True) == (None,)


@pytest.mark.parametrize("chosen, rejected", [([2, 3], []), ([], [4])])
def test_kto_needs_no_completion_of_the_other_kind(chosen, rejected):
    scored = record(chosen, rejected)
    outcome = Kto()(scored)
    total = loss(outcome, counts(scored))
    (grad,) = torch.autograd.grad(total, scored.logp)
    assert torch.isfinite(total) and (grad != 0).all()
    shown = metrics(outcome, counts(scored))
    assert ("rewards/chosen" in shown) == bool(chosen) and ("rewards/rejected" in shown) == bool(rejected)
    assert "rewards/margins" not in shown and all(math.isfinite(v) for v in shown.values())


def test_a_record_that_lacks_what_is_needed_is_refused():
    bare = by_hand([CHOSEN], [REJECTED])
    for objective in (Dpo(), Ipo(), Kto(), Reward(), Orpo(nll="prompt_and_answer")):
        with pytest.raises(ValueError, match="needs"):
            objective(bare)
        scored = record([2], [3])
        kept = {key: None for key in ("ref_logp", "prompt_logp", "value", "margin", "kl") if key not in objective.needs}
        assert math.isfinite(value(objective, scored._replace(**kept)))


def test_hinge_refuses_label_smoothing():
    with pytest.raises(BadInput, match="hinge"):
        Dpo(loss_type="hinge", label_smoothing=0.1)


sizes = st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=5)
betas = st.floats(0.01, 5.0)


@settings(max_examples=40, deadline=None)
@given(sizes, betas, st.integers(0, 2**31), st.sampled_from(PAIRED))
def test_pairs_may_come_in_any_order_and_any_micro_batch(lengths, beta, seed, name):
    chosen, rejected = zip(*lengths, strict=True)
    objective = registry.find("objectives", name)(beta=beta)
    scored = record(chosen, rejected, seed)
    whole = loss(objective(scored), counts(scored))
    (expected,) = torch.autograd.grad(whole, scored.logp)
    order = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(seed)).tolist()
    cut = seed % (len(lengths) + 1)
    parts = [part(scored, some, some) for some in (order[:cut], order[cut:]) if some]
    split = torch.stack([loss(objective(p), counts(scored)) for p in parts]).sum()
    torch.testing.assert_close(split, whole, rtol=1e-5, atol=1e-6)
    (grad,) = torch.autograd.grad(split, scored.logp)
    torch.testing.assert_close(grad, expected, rtol=1e-5, atol=1e-7)


@settings(max_examples=40, deadline=None)
@given(sizes, st.floats(-2.0, 2.0), st.integers(0, 2**31), st.sampled_from(WITH_REFERENCE))
def test_only_the_ratio_to_the_reference_counts(lengths, shift, seed, objective):
    chosen, rejected = zip(*lengths, strict=True)
    scored = record(chosen, rejected, seed)
    assert scored.ref_logp is not None
    moved = scored._replace(logp=scored.logp + shift, ref_logp=scored.ref_logp + shift)
    assert value(objective, moved) == pytest.approx(value(objective, scored), rel=1e-4, abs=1e-4)


@settings(max_examples=40, deadline=None)
@given(sizes, betas, st.integers(0, 2**31))
def test_swapping_a_pair_adds_its_margin_to_the_loss(lengths, beta, seed):
    """-log sigmoid(-x) = x - log sigmoid(x)."""
    chosen, rejected = zip(*lengths, strict=True)
    scored = record(chosen, rejected, seed)
    swapped = scored._replace(chosen=scored.rejected, rejected=scored.chosen)
    objective = Dpo(beta=beta)
    margin = metrics(objective(scored), counts(scored))["rewards/margins"]
    assert value(objective, swapped) == pytest.approx(value(objective, scored) + margin, rel=1e-4, abs=1e-4)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(1, 6), max_size=4),
    st.lists(st.integers(1, 6), max_size=4),
    st.floats(0.01, 5.0),
    st.floats(0.0, 20.0),
    st.integers(0, 2**31),
)
def test_kto_is_additive_and_bounded(desirable, undesirable, beta, kl, seed):
    if not desirable and not undesirable:
        return
    objective = Kto(beta=beta, desirable_weight=1.3, undesirable_weight=0.7)
    scored = record(desirable, undesirable, seed)._replace(kl=torch.tensor(kl))
    whole = value(objective, scored)
    divide = counts(scored)
    parts = [part(scored, [i], []) for i in range(len(desirable))]
    parts += [part(scored, [], [i]) for i in range(len(undesirable))]
    assert sum(loss(objective(p), divide).item() for p in parts) == pytest.approx(whole, rel=1e-5, abs=1e-6)
    assert 0 <= whole <= 1.3
