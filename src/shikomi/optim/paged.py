"""Paged AdamW (QLoRA, Dettmers et al. 2023, arXiv:2305.14314, section 3): CUDA moves state to the host and back."""

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from shikomi.errors import BadInput, Problem
from shikomi.optim import _moments
from shikomi.optim.adamw_8bit import AdamW8bit, EightBitAdamW

DEVICES = ("cuda",)
SMALLEST_PAGED = 100_000  # elements below which bitsandbytes keeps state on the device


@dataclass(frozen=True)
class Paged(AdamW8bit):
    """bitsandbytes' paged AdamW: the state of large tensors is in CUDA's managed memory, whose pages go to the host
    where the GPU is full, and come back at the next step. CUDA only."""

    name: ClassVar[str] = "paged"

    state_bits: Annotated[Literal[32, 8], Field(description="bits of a moment; 8 are those of adamw_8bit")] = 32

    def build(
        self, trained: dict[str, nn.Parameter], learning_rate: float, weight_decay: float, folder: Path | None = None
    ) -> torch.optim.Optimizer:
        """An optimizer over `trained`; raises BadInput on other devices than CUDA, and as AdamW8bit does."""
        device = next(iter(trained.values())).device
        if device.type not in DEVICES:
            nearest = "optim: adamw_8bit" if self.state_bits == 8 else "optim: {name: offload, offload_to: disk}"
            raise BadInput(
                [
                    Problem(
                        "`optim: paged` needs the managed memory of CUDA: elsewhere nothing can be paged out",
                        found=f"device: {device.type}",
                        allowed=f"device: {', '.join(DEVICES)}",
                        fix=f"set {nearest}, which keeps less of the state in memory",
                    )
                ]
            )
        groups = self.groups(trained, learning_rate, weight_decay)
        eight_bit = _moments.EightBit(device, "optim: adamw")
        small = {p for name, p in trained.items() if self.bits(name, p.shape) == 8}
        return PagedAdamW(groups, self.defaults(learning_rate), eight_bit, small)

    def bits(self, name: str, shape: Any) -> int:
        return super().bits(name, shape) if self.state_bits == 8 else 32


class PagedAdamW(EightBitAdamW):
    """AdamW by bitsandbytes' kernels, which read and write managed memory."""

    def start(self, parameter: Tensor) -> dict[str, Tensor]:
        state = super().start(parameter)
        state["step"] = state["step"].cpu()
        if parameter.numel() >= SMALLEST_PAGED:
            for key in _moments.MOMENTS:
                state[key] = self.paged(parameter, state[key].dtype)
        return state

    def paged(self, like: Tensor, dtype: torch.dtype) -> Tensor:
        """Zeros in managed memory. bitsandbytes never gives it back: a run has one such optimizer for each stage."""
        library = self.eight_bit.library
        memory: Tensor = library.get_paged(*like.shape, dtype=dtype, device=like.device)
        library.fill(memory, 0)
        return memory

    def update(self, parameter: Tensor, grad: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> None:
        library = self.eight_bit.library
        if parameter.numel() >= SMALLEST_PAGED:
            for key in _moments.MOMENTS:
                library.prefetch_tensor(state[key])
        if parameter in self.small:
            self.eight_bit.update(parameter, grad, state, group, group["weight_decay"])
            return
        state["step"] += 1
        beta1, beta2 = group["betas"]
        library.optimizer_update_32bit(
            "adam", grad.contiguous(), parameter, state["exp_avg"], beta1, group["eps"], int(state["step"]),
            group["lr"], state["exp_avg_sq"], beta2, weight_decay=group["weight_decay"],
        )  # fmt: skip

    def finish(self) -> None:
        torch.cuda.synchronize()  # the kernels are asynchronous, and the host may read managed memory next
