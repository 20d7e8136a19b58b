"""Full fine-tuning: no adapter, the model's own weights are trained; all of them, or only some layers'."""

import re
from typing import Annotated, Any, ClassVar

from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import nn

from shikomi.adapters._adapter import Attached, Capabilities, Declares, Reads, Shapes
from shikomi.errors import BadInput, Problem
from shikomi.quant._quantized import Quantized


@dataclass(frozen=True)
class Full(Declares):
    """Trains the model's weights, as fp32 masters; what is frozen stays as it is stored."""

    name: ClassVar[str] = "full"
    capabilities: ClassVar[Capabilities] = Capabilities(mergeable=False, starts_as_base=True, context=False)

    last_layers: Annotated[
        int | None, Field(ge=1, description="train only the last layers, this many, the final norm and the head")
    ] = None
    freeze: Annotated[
        str | None, Field(description="one regular expression: parameters whose whole name matches are not trained")
    ] = None

    def attach(self, model: nn.Module, output_name: str | None, seed: int, tokenizer: Any) -> Attached | None:
        """Chooses what is trained. Raises BadInput where that is nothing, or weights are stored in few bits."""
        few = next((name for name, module in model.named_modules() if isinstance(module, Quantized)), None)
        if few is not None:
            what = "adapter: full trains weights, and those of this model are stored in few bits"
            fix = "set adapter: lora, or give the folder of the weights before quantization"
            raise BadInput([Problem(what, found=few, fix=fix)])
        trained = self._trained([name for name, _ in model.named_parameters()])
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in trained)
            if name in trained:
                parameter.data = parameter.data.float()
        return None

    def trained_shapes(self, model: Shapes) -> dict[str, tuple[int, ...]]:
        """The trained parameters of the model itself. Raises BadInput where that is nothing."""
        trained = self._trained(list(model.tensors))
        return {name: shape for name, shape in model.tensors.items() if name in trained}

    @property
    def off_is_start(self) -> bool:
        return False

    def reads(self, model: Shapes) -> Reads:
        """Inputs of the trained layers."""
        trained = self.trained_names(list(model.tensors))
        return Reads(frozenset(path for path in model.linears if f"{path}.weight" in trained))

    def _trained(self, names: list[str]) -> set[str]:
        """`trained_names`; raises BadInput where that is nothing."""
        trained = self.trained_names(names)
        if not trained:
            found = f"last_layers={self.last_layers}, freeze={self.freeze!r}"
            fix = "freeze less: names look like " + ", ".join(names[1:4])
            raise BadInput([Problem("adapter: full with nothing left to train", found=found, fix=fix)])
        return trained

    def trained_names(self, names: list[str]) -> set[str]:
        """Those of a model's parameters that are trained."""
        chosen = set(names)
        if self.last_layers is not None:
            numbers = {name: int(m[1]) for name in names if (m := re.search(r"\.(\d+)\.", name))}
            first = max(numbers.values(), default=-1) + 1 - self.last_layers
            after = max((i for i, name in enumerate(names) if name in numbers), default=-1)
            chosen = {n for i, n in enumerate(names) if numbers.get(n, first if i > after else -1) >= first}
        if self.freeze is not None:
            chosen = {name for name in chosen if re.fullmatch(self.freeze, name) is None}
        return chosen
