"""AdamW one tensor at a time, with its state wherever a subclass keeps it."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor


class TensorAdamW(torch.optim.Optimizer, ABC):
    """AdamW over parameter groups that updates one tensor after the other.

    State by parameter: step, exp_avg and exp_avg_sq, in 8 bits also *_absmax; `put` is how saved state comes back.
    """

    @abstractmethod
    def start(self, parameter: Tensor) -> dict[str, Tensor]:
        """State of a parameter that has not been updated, at its place."""

    @abstractmethod
    def update(self, parameter: Tensor, grad: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> None:
        """One step of one parameter."""

    def leave(self) -> None:
        """Called when the state of a tensor is not needed for now."""

    def finish(self) -> None:
        """Called at the end of a step."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self.update(parameter, parameter.grad, self.of(parameter), group)
                    self.leave()
        self.finish()
        return loss

    def of(self, parameter: Tensor) -> dict[str, Tensor]:
        """The state of a parameter, which is made at its first use."""
        state: dict[str, Tensor] = self.state[parameter]
        if not state:
            state.update(self.start(parameter))
        return state

    @torch.no_grad()
    def put(self, parameter: Tensor, key: str, saved: Tensor) -> None:
        """Copies saved state to where this optimizer keeps it."""
        self.of(parameter)[key].copy_(saved)
        self.leave()


class InTurn(Mapping[str, Tensor]):
    """State by name, to be saved tensor by tensor: asking for one leaves the one before."""

    def __init__(self, tensors: Mapping[str, Tensor], optimizer: TensorAdamW):
        self.tensors, self.optimizer = tensors, optimizer

    def __getitem__(self, name: str) -> Tensor:
        self.optimizer.leave()
        return self.tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)
