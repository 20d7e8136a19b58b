"""The singular vectors by which GaLore projects: exact, sketched, and repeatable."""

import pytest
import torch

from shikomi.optim import _subspace
from shikomi.optim._subspace import back, low_rank_shape, project, sides_of, subspace


def decaying(m: int, n: int, power: float = 1.0) -> torch.Tensor:
    """A matrix whose singular values fall as 1 / i^power, as a gradient's do."""
    generator = torch.Generator().manual_seed(m + n)
    k = min(m, n)
    u = torch.linalg.qr(torch.randn(m, k, generator=generator)).Q
    v = torch.linalg.qr(torch.randn(n, k, generator=generator)).Q
    return (u * torch.arange(1, k + 1).float().pow(-power)) @ v.t()


@pytest.mark.parametrize("m, n", [(300, 520), (520, 300), (300, 300)])
def test_a_sketch_keeps_what_the_exact_subspace_keeps(m, n, monkeypatch):
    grad = decaying(m, n)
    sketched = subspace(grad, 64, ("left", "right"), seed=7)
    again = subspace(grad, 64, ("left", "right"), seed=7)
    other = subspace(grad, 64, ("left", "right"), seed=8)
    monkeypatch.setattr(_subspace, "EXACT_BELOW", 10_000)
    exact = subspace(grad, 64, ("left", "right"), seed=7)
    assert sketched["left"].shape == (m, 64) and sketched["right"].shape == (64, n)
    for side in ("left", "right"):
        assert torch.equal(sketched[side], again[side]) and not torch.equal(sketched[side], other[side])
        basis, best = (found[side] if side == "right" else found[side].t() for found in (sketched, exact))
        torch.testing.assert_close(basis @ basis.t(), torch.eye(64), rtol=0, atol=1e-5)
        cosines = torch.linalg.svdvals(basis[:32] @ best.t())  # the leading half lies in the exact space
        assert cosines.min() > 0.999
    kept = [project(grad, {"left": found["left"]}).norm() / exact_norm(grad, 64) for found in (sketched, exact)]
    assert kept[0] > 0.998 and kept[1] == pytest.approx(1.0, abs=1e-4)


def exact_norm(grad: torch.Tensor, rank: int) -> torch.Tensor:
    """The most of a gradient's norm that any `rank` directions can keep."""
    return torch.linalg.svdvals(grad)[:rank].norm()


def test_near_full_rank_it_is_exact_and_the_global_generator_is_left_alone():
    grad = decaying(300, 310)
    before = torch.get_rng_state()
    near = subspace(grad, 150, ("left",), seed=1)["left"]
    assert torch.equal(near, torch.linalg.svd(grad, full_matrices=False).U[:, :150])
    subspace(grad, 16, ("left",), seed=1)
    assert torch.equal(before, torch.get_rng_state())


def test_a_projection_owns_no_more_memory_than_it_shows():
    for found in subspace(decaying(60, 40), 8, ("left", "right"), seed=0).values():
        assert found.untyped_storage().nbytes() == found.numel() * 4


@pytest.mark.parametrize(
    "proj_type, sides", [("std", "right"), ("reverse_std", "left"), ("left", "left"), ("full", "")]
)
def test_there_and_back_is_the_projection(proj_type, sides):
    grad = decaying(50, 30, 0.3)
    chosen = sides_of(50, 30, 10, proj_type)
    assert chosen == ((sides,) if sides else ("left", "right"))
    space = subspace(grad, 10, chosen, seed=0)
    low = project(grad, space)
    assert low.shape == low_rank_shape(50, 30, 10, chosen)
    found = torch.zeros(50, 30)
    back(found, low, space, 2.0)
    u, s, vh = torch.linalg.svd(grad, full_matrices=False)
    torch.testing.assert_close(found, 2 * (u[:, :10] * s[:10]) @ vh[:10], rtol=1e-4, atol=1e-5)


def test_a_matrix_without_a_gradient_and_one_of_full_rank():
    left = subspace(torch.zeros(300, 400), 8, ("left",), seed=0)["left"]
    assert torch.isfinite(left).all()
    assert sides_of(300, 400, 300, "std") == () and sides_of(300, 400, 299, "std") == ("left",)
    assert sides_of(8, 400, 8, "full") == ()
