"""Adam's two moments of one tensor: in 32 bits by torch's fused kernel, in 8 bits by bitsandbytes."""

from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from shikomi.quant._bnb import functional

MOMENTS = ("exp_avg", "exp_avg_sq")
SMALLEST = 4096  # elements below which bitsandbytes keeps a state in 32 bits
BLOCK = 256  # elements that share one scale, fixed in bitsandbytes
SLICE = 1 << 20  # elements updated at a time on a CPU: bitsandbytes makes five fp32 copies of what it is given


def start(like: Tensor) -> dict[str, Tensor]:
    """State in 32 bits of a tensor that has not been updated."""
    step = torch.zeros((), dtype=torch.float32, device=like.device)
    return {"step": step, **{key: torch.zeros_like(like) for key in MOMENTS}}


def update(target: Tensor, grad: Tensor, state: dict[str, Tensor], group: dict[str, Any], weight_decay: float) -> None:
    """Adds AdamW's update for `grad` to `target`; state and tensors lie on one device."""
    beta1, beta2 = group["betas"]
    adamw(
        [target], [grad], [state["exp_avg"]], [state["exp_avg_sq"]], [], [state["step"]],
        fused=True, amsgrad=False, beta1=beta1, beta2=beta2, lr=group["lr"], weight_decay=weight_decay,
        eps=group["eps"], maximize=False,
    )  # fmt: skip


def state_bytes(numel: int, bits: int = 32) -> int:
    """Bytes of the state of a tensor of so many elements."""
    if bits == 8 and numel >= SMALLEST:
        return 4 + 2 * (numel + 4 * -(-numel // BLOCK))
    return 4 + 8 * numel


class EightBit:
    """Moments in 8 bits: a code for each element, a scale for each block of 256 (Dettmers et al. 2021,
    arXiv:2110.02861). Codes and scales are bitsandbytes'."""

    def __init__(self, device: torch.device, instead: str):
        """Raises BadInput where bitsandbytes is not installed; `instead` is the setting that needs none."""
        self.library = functional("8-bit optimizer state needs", instead)
        self.signed = self.library.create_dynamic_map(signed=True).to(device)
        self.unsigned = self.library.create_dynamic_map(signed=False).to(device)

    def start(self, like: Tensor) -> dict[str, Tensor]:
        """State of a tensor that has not been updated; `step` is on the CPU, where it is read."""
        state = {"step": torch.zeros((), dtype=torch.float32)}
        for key in MOMENTS:
            state[key] = torch.zeros_like(like, dtype=torch.uint8)
            state[f"{key}_absmax"] = torch.zeros(-(-like.numel() // BLOCK), device=like.device)
        return state

    def update(
        self, target: Tensor, grad: Tensor, state: dict[str, Tensor], group: dict[str, Any], weight_decay: float
    ) -> None:
        """Adds AdamW's update for `grad` to `target`, a slice of whole blocks at a time on a CPU."""
        state["step"] += 1
        if target.device.type != "cpu":  # whole: a view of managed memory is not known as such
            self._update(target, grad.contiguous(), state, group, weight_decay)
            return
        flat_target, flat_grad = target.view(-1), grad.reshape(-1)
        for first in range(0, target.numel(), SLICE):
            own, scales = slice(first, first + SLICE), slice(first // BLOCK, (first + SLICE) // BLOCK)
            part = {"step": state["step"]}
            for key in MOMENTS:
                part |= {key: state[key].view(-1)[own], f"{key}_absmax": state[f"{key}_absmax"][scales]}
            self._update(flat_target[own], flat_grad[own], part, group, weight_decay)

    def _update(
        self, target: Tensor, grad: Tensor, state: dict[str, Tensor], group: dict[str, Any], weight_decay: float
    ) -> None:
        beta1, beta2 = group["betas"]
        self.library.optimizer_update_8bit_blockwise(
            "adam", grad, target, state["exp_avg"], state["exp_avg_sq"], beta1, beta2, 0.0, 0.0, group["eps"],
            int(state["step"]), group["lr"], self.signed, self.unsigned, state["exp_avg_absmax"],
            state["exp_avg_sq_absmax"], weight_decay,
        )  # fmt: skip
