"""GaLore: AdamW whose moments live in a low-rank space of the gradient (Zhao et al. 2024, arXiv:2403.03507)."""

import math
import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from shikomi.errors import BadInput, Problem
from shikomi.optim import _moments
from shikomi.optim._groups import ADAPTER_NAMES, grouped, is_embedding, is_head, same_rate
from shikomi.optim._places import Places
from shikomi.optim._subspace import Sides, back, low_rank_shape, project, sides_of, subspace


class StateBytes(NamedTuple):
    """Bytes of optimizer state: of the projected matrices, and of everything that is trained."""

    projected: int
    projected_adamw: int  # what AdamW would keep for the same matrices
    total: int
    total_adamw: int


@dataclass(frozen=True)
class GaLore:
    """Algorithm 2 of the paper for `adapter: full`. For a matrix W (m, n) with gradient G, m <= n, every step does

        R = P^T G,   W <- (1 - lr * weight_decay) W - lr * scale * P AdamUpdate(R)

    and P (m, r) is renewed every `update_proj_gap` steps from the left singular vectors of that step's G (the right
    ones for m > n: R = G P). What is saved is optimizer state: (m + 2n) r numbers instead of 2 m n; weights stay full.
    The moments are kept when P is renewed, as in the paper and in the reference implementation, whose names these
    options have. Epsilon enters as in torch's AdamW, after the correction of the bias.

    Projecting there and back costs a step as much arithmetic as about 2 r / 3 tokens; a renewal adds an SVD, which is a
    randomized sketch where that is cheaper (`_subspace.py`), a function of step and parameter alone.

    Vectors, embeddings and the head (unless `project_embeddings`), parameters with more than two dimensions, and
    matrices with min(m, n) <= rank have nothing to project: P is the identity there, and they are trained as AdamW
    does, without `scale`.

    Gradients: each one is projected as soon as a micro-batch has made it, added to an accumulator of R's shape, and
    freed, so the full gradients of the projected matrices never exist together. grad_norm and max_grad_norm therefore
    see R, not G, of a projected matrix. A renewal needs the whole step's G: with one micro-batch a step P is renewed
    at once and nothing more is kept; with several, that one step in `update_proj_gap` accumulates G in full, and has
    the peak memory that full gradients have.
    """

    name: ClassVar[str] = "galore"

    rank: Annotated[int, Field(ge=1, le=65_536, description="rank r of the projected gradient")] = 128
    update_proj_gap: Annotated[int, Field(ge=1, description="steps between renewals of the projection")] = 200
    scale: Annotated[float, Field(gt=0, le=100, description="factor of the update of projected matrices")] = 0.25
    proj_type: Annotated[
        Literal["std", "reverse_std", "right", "left", "full"],
        Field(description="projected side: std the shorter, reverse_std the longer, left, right, full both"),
    ] = "std"
    project_embeddings: Annotated[bool, Field(description="project embeddings and head too")] = False
    adam_beta1: Annotated[float, Field(ge=0, lt=1, description="decay of the mean of gradients")] = 0.9
    adam_beta2: Annotated[float, Field(ge=0, lt=1, description="decay of the mean of squares")] = 0.999
    adam_epsilon: Annotated[float, Field(gt=0, description="added to the root of the squares")] = 1e-8
    state_bits: Annotated[Literal[32, 8], Field(description="bits of a moment; 8 are block-wise, by bitsandbytes")] = 32

    def build(
        self, trained: dict[str, nn.Parameter], learning_rate: float, weight_decay: float, folder: Path | None = None
    ) -> torch.optim.Optimizer:
        """An optimizer over `trained`; weight decay goes to matrices only.

        Raises BadInput when `trained` are the parameters of an adapter, or bitsandbytes is missing for 8 bits.
        """
        adapted = next((name for name in trained if name.startswith(ADAPTER_NAMES)), None)
        if adapted is not None:
            raise BadInput(
                [
                    Problem(
                        "`optim: galore` projects the gradients of full weights; an adapter's are low-rank already",
                        found=f"trained parameters of an adapter, such as {adapted}",
                        allowed="adapter: full",
                        fix="set adapter: full, or optim: adamw to keep the adapter",
                    )
                ]
            )
        matrices = []
        for index, (name, parameter) in enumerate(trained.items()):
            sides = self.sides(name, parameter.shape)
            if sides:
                matrices.append(Matrix(parameter, index, sides, self.rank))
        projected = {matrix.parameter for matrix in matrices}
        others = {name: p for name, p in trained.items() if p not in projected}
        groups = grouped(others, learning_rate, weight_decay, same_rate)
        if matrices:
            groups.append({"params": [m.parameter for m in matrices], "weight_decay": weight_decay})
            groups.append({"params": [m.gradient for m in matrices], "stands_in": True})
        defaults = {"lr": learning_rate, "betas": (self.adam_beta1, self.adam_beta2), "eps": self.adam_epsilon}
        eight_bit = None
        if self.state_bits == 8:
            eight_bit = _moments.EightBit(next(iter(trained.values())).device, "optim.state_bits: 32")
        return ProjectedAdamW(groups, defaults, matrices, self.update_proj_gap, self.scale, eight_bit)

    def sides(self, name: str, shape: Sequence[int]) -> Sides:
        """On which sides a trained tensor is projected; () where it is not."""
        outer = is_embedding(name) or is_head(name)
        if len(shape) != 2 or (outer and not self.project_embeddings):
            return ()
        return sides_of(shape[0], shape[1], self.rank, self.proj_type)

    def places(self, shapes: Mapping[str, Sequence[int]], device: str) -> Places:
        """Where that state is."""
        return Places(device=self.state_bytes(shapes).total)

    def gradient_bytes(self, shapes: Mapping[str, Sequence[int]], micro_batches: int) -> int:
        """Bytes of the gradients that exist together at most: all in full where a renewal waits for micro-batches."""
        full = {name: 4 * math.prod(shape) for name, shape in shapes.items()}
        low = {
            name: 4 * math.prod(low_rank_shape(shape[0], shape[1], self.rank, sides))
            for name, shape in shapes.items()
            if (sides := self.sides(name, shape))
        }
        if micro_batches > 1:
            return sum(full.values()) + max(low.values(), default=0)
        others = sum(size for name, size in full.items() if name not in low)
        return sum(low.values()) + others + max((full[name] for name in low), default=0)

    def state_bytes(self, shapes: Mapping[str, Sequence[int]]) -> StateBytes:
        """Bytes of optimizer state for trained tensors of these shapes, beside those of AdamW in 32 bits."""
        counts = StateBytes(0, 0, 0, 0)
        for name, shape in shapes.items():
            sides = self.sides(name, shape)
            moments, projection = torch.Size(shape).numel(), 0
            plain = _moments.state_bytes(moments)
            if sides:
                low = low_rank_shape(shape[0], shape[1], self.rank, sides)
                projection = 4 * self.rank * sum(shape[0] if side == "left" else shape[1] for side in sides)
                moments = low[0] * low[1]
            own = projection + _moments.state_bytes(moments, self.state_bits)
            counts = StateBytes(
                counts.projected + (own if sides else 0),
                counts.projected_adamw + (plain if sides else 0),
                counts.total + own,
                counts.total_adamw + plain,
            )
        return counts


class Matrix:
    """A projected parameter and `gradient`, the tensor without storage whose `.grad` is the projected gradient."""

    def __init__(self, parameter: nn.Parameter, index: int, sides: Sides, rank: int):
        self.parameter, self.index, self.sides, self.rank = parameter, index, sides, rank
        low = low_rank_shape(parameter.shape[0], parameter.shape[1], rank, sides)
        nothing = torch.zeros((), dtype=parameter.dtype, device=parameter.device).expand(low)
        self.gradient = nn.Parameter(nothing, requires_grad=False)
        self.seen = 0  # micro-batches of this step


class ProjectedAdamW(torch.optim.Optimizer):
    """AdamW over parameter groups, some of whose matrices are stepped in a low-rank space.

    State by parameter: step, exp_avg, exp_avg_sq (of R's shape where projected; with 8 bits codes, and their scales as
    *_absmax), and left (m, r) and right (r, n), the projection. A group's "micro_batches" says how many times
    `backward` will be called before `step`; the loop sets it as it sets "lr". The projected gradients are the `.grad`
    of parameters that stand in a group of their own, so that whoever unscales or clips the gradients of an optimizer's
    groups reaches them.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        defaults: dict[str, Any],
        matrices: Sequence[Matrix],
        update_proj_gap: int,
        scale: float,
        eight_bit: _moments.EightBit | None,
    ):
        super().__init__(groups, {"weight_decay": 0.0, "micro_batches": 1, "stands_in": False, **defaults})
        self.matrices = {matrix.parameter: matrix for matrix in matrices}
        self.update_proj_gap, self.scale, self.eight_bit = update_proj_gap, scale, eight_bit
        reference = weakref.ref(self)  # a hook must not keep the optimizer of a finished stage alive

        def collect(matrix: Matrix, parameter: Tensor) -> None:
            optimizer = reference()
            if optimizer is not None:
                optimizer.collect(matrix)

        handles = [m.parameter.register_post_accumulate_grad_hook(partial(collect, m)) for m in matrices]
        weakref.finalize(self, lambda: [handle.remove() for handle in handles]).atexit = False

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        self._begin()

    def _begin(self) -> None:
        for matrix in self.matrices.values():
            matrix.seen = 0

    def _steps(self, parameter: Tensor) -> int:
        """Finished optimizer steps of a parameter."""
        state = self.state[parameter]
        return int(state["step"]) if "step" in state else 0

    @torch.no_grad()
    def collect(self, matrix: Matrix) -> None:
        """Takes the gradient that a micro-batch has just left in the `.grad` of a projected parameter."""
        matrix.seen += 1
        renews = self._steps(matrix.parameter) % self.update_proj_gap == 0
        expected = self.param_groups[0]["micro_batches"]
        if renews and matrix.seen < expected:
            return  # the renewal needs the gradient of the whole step
        self._project(matrix, renews and matrix.seen == expected)

    def _project(self, matrix: Matrix, renew: bool) -> None:
        """Moves a full gradient into the low-rank accumulator, after renewing the projection from it where asked."""
        parameter, total = matrix.parameter, matrix.gradient
        grad, parameter.grad = parameter.grad, None
        assert grad is not None
        state = self.state[parameter]
        if renew and not torch.isfinite(grad).all():
            total.grad = torch.full_like(total, torch.nan)  # for whoever decides about the step; no SVD exists
            return
        if renew:
            seed = (self._steps(parameter) * 1_000_003 + matrix.index) % (1 << 63)
            state.update(subspace(grad, matrix.rank, matrix.sides, seed))
        low = project(grad, state)
        total.grad = low if total.grad is None else total.grad.add_(low)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"] if not group["stands_in"] else ():
                if parameter in self.matrices:
                    self._step_projected(self.matrices[parameter], group)
                elif parameter.grad is not None:
                    self._adam(parameter, parameter.grad, parameter, group, group["weight_decay"])
        self._begin()
        return loss

    def _step_projected(self, matrix: Matrix, group: dict[str, Any]) -> None:
        parameter = matrix.parameter
        if parameter.grad is not None:  # fewer micro-batches reached it than were announced
            self._project(matrix, True)
        low = matrix.gradient.grad
        if low is None:
            return
        update = torch.zeros_like(low)
        self._adam(parameter, low, update, group, 0.0)  # update = -lr * AdamUpdate(R)
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        back(parameter, update, self.state[parameter], self.scale)

    def _adam(
        self, parameter: Tensor, grad: Tensor, target: Tensor, group: dict[str, Any], weight_decay: float
    ) -> None:
        """Adds AdamW's update for `grad` to `target`, with the moments of `parameter`."""
        state = self.state[parameter]
        eight_bit = self.eight_bit if grad.numel() >= _moments.SMALLEST else None
        if "step" not in state:
            state.update(_moments.start(grad) if eight_bit is None else eight_bit.start(grad))
        update = _moments.update if eight_bit is None else eight_bit.update
        update(target, grad, state, group, weight_decay)
