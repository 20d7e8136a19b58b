"""GaLore against a plain writing of the published algorithm, torch's AdamW, and bitsandbytes' 8-bit AdamW."""

import pytest
import torch
from torch import Tensor, nn

from shikomi.optim.galore import GaLore

SHAPES = {"tall": (30, 18), "wide": (18, 30), "square": (24, 24)}
LR, BETAS, EPS, DECAY, SCALE, GAP, RANK = 3e-2, (0.9, 0.95), 1e-6, 0.05, 0.25, 7, 5
OPTIONS = dict(adam_beta1=BETAS[0], adam_beta2=BETAS[1], adam_epsilon=EPS)


class Published:
    """Algorithm 2 of arXiv:2403.03507 for one matrix, with an exact SVD and Adam as the paper writes it."""

    def __init__(self, w: Tensor, proj_type: str):
        self.w, self.proj_type, self.t = w, proj_type, 0

    def renew(self, g: Tensor) -> None:
        u, _, vh = torch.linalg.svd(g, full_matrices=False)
        self.p, self.q = u[:, :RANK], vh[:RANK].T

    def sides(self) -> tuple[bool, bool]:
        m, n = self.w.shape
        right = {"std": m >= n, "reverse_std": m < n, "right": True, "left": False, "full": True}[self.proj_type]
        return (not right or self.proj_type == "full"), right

    def step(self, g: Tensor) -> None:
        if self.t % GAP == 0:
            self.renew(g)
        left, right = self.sides()
        r = self.p.T @ g if left else g
        r = r @ self.q if right else r
        if self.t == 0:
            self.m, self.v = torch.zeros_like(r), torch.zeros_like(r)
        self.t += 1
        self.m = BETAS[0] * self.m + (1 - BETAS[0]) * r
        self.v = BETAS[1] * self.v + (1 - BETAS[1]) * r**2
        n = (self.m / (1 - BETAS[0] ** self.t)) / ((self.v / (1 - BETAS[1] ** self.t)).sqrt() + EPS)
        n = self.p @ n if left else n
        n = n @ self.q.T if right else n
        self.w = (1 - LR * DECAY) * self.w - LR * SCALE * n


def losses(w: Tensor, steps: int = 30):
    """A loss per step: a regression on new rows each time, with a kink that makes gradients full-rank."""
    generator = torch.Generator().manual_seed(5)
    for _ in range(steps):
        x = torch.randn(40, w.shape[1], generator=generator, dtype=w.dtype)
        y = torch.randn(40, w.shape[0], generator=generator, dtype=w.dtype)
        yield lambda w, x=x, y=y: (torch.tanh(x @ w.T) - y).square().sum()


@pytest.mark.parametrize("proj_type", ["std", "reverse_std", "right", "left", "full"])
@pytest.mark.parametrize("shape", SHAPES)
def test_thirty_steps_with_renewals_are_the_published_algorithm(shape, proj_type):
    start = torch.randn(SHAPES[shape], dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 0.3
    parameter = nn.Parameter(start.clone())
    options = GaLore(rank=RANK, update_proj_gap=GAP, scale=SCALE, proj_type=proj_type, **OPTIONS)
    optimizer = options.build({"layers.0.w.weight": parameter}, LR, DECAY)
    published = Published(start.clone(), proj_type)
    for loss in losses(parameter):
        optimizer.zero_grad()
        loss(parameter).backward()
        optimizer.step()
        w = published.w.requires_grad_()
        (g,) = torch.autograd.grad(loss(w), w)
        with torch.no_grad():
            published.step(g)
        torch.testing.assert_close(parameter.detach(), published.w.detach(), rtol=1e-8, atol=1e-9)
    assert (parameter - start).abs().max() > 0.05  # far beyond the tolerance


def both(options: GaLore, other, decay: float, steps: int) -> None:
    """The same matrix and vector by GaLore and by another optimizer, bit for bit."""
    starts = {"layers.0.w.weight": torch.randn(80, 64) * 0.3, "norm.weight": torch.ones(64)}
    mine, theirs = ({n: nn.Parameter(t.clone()) for n, t in starts.items()} for _ in range(2))
    optimizers = options.build(mine, LR, decay), other(theirs)
    for loss in losses(starts["layers.0.w.weight"], steps):
        for named, optimizer in zip((mine, theirs), optimizers, strict=True):
            w, scale = named.values()
            optimizer.zero_grad()
            loss(w * scale).backward()
            optimizer.step()
    for name in mine:
        assert torch.equal(mine[name], theirs[name]), name


@pytest.mark.parametrize("rank", [64, 500])
@pytest.mark.parametrize("proj_type", ["std", "full"])
def test_at_full_rank_it_is_adamw_bit_for_bit(rank, proj_type):
    def adamw(named):
        w, scale = named.values()
        groups = [{"params": [w], "weight_decay": DECAY}, {"params": [scale], "weight_decay": 0.0}]
        return torch.optim.AdamW(groups, lr=LR, betas=BETAS, eps=EPS, fused=True)

    both(GaLore(rank=rank, scale=1.0, proj_type=proj_type, **OPTIONS), adamw, DECAY, 30)


def test_eight_bits_at_full_rank_are_bitsandbytes_adamw8bit():
    import bitsandbytes

    class Big(torch.optim.Optimizer):
        """AdamW8bit for the matrix; torch's AdamW for the vector, too small for 8 bits."""

        def __init__(self, named):
            w, scale = named.values()
            super().__init__([w, scale], {})
            self.parts = (
                bitsandbytes.optim.AdamW8bit([w], lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY),
                torch.optim.AdamW([scale], lr=LR, betas=BETAS, eps=EPS, weight_decay=0.0, fused=True),
            )

        def step(self):
            for part in self.parts:
                part.step()

    both(GaLore(rank=64, scale=1.0, state_bits=8, **OPTIONS), Big, DECAY, 12)


def test_eight_bits_follow_thirty_two():
    """Projected moments of 96 x 64 elements, quantized in blocks: the same way, a few percent off.

    One projection serves all steps: on these gradients, which are mostly noise, the singular vectors of a renewal
    lie so close together that they turn with the last bit.
    """
    start = torch.randn(96, 80, generator=torch.Generator().manual_seed(2)) * 0.3
    moved = {}
    for bits in (32, 8):
        parameter = nn.Parameter(start.clone())
        options = GaLore(rank=64, update_proj_gap=1000, scale=SCALE, state_bits=bits, **OPTIONS)
        optimizer = options.build({"w": parameter}, LR, DECAY)
        for loss in losses(parameter):
            optimizer.zero_grad()
            loss(parameter).backward()
            optimizer.step()
        moved[bits] = (parameter - start).detach()
        state = optimizer.state[parameter]
        assert state["exp_avg"].shape == (96, 64) and state["exp_avg"].dtype == (torch.float32, torch.uint8)[bits == 8]
    off = (moved[8] - moved[32]).norm() / moved[32].norm()
    assert 0 < off < 0.08, off
