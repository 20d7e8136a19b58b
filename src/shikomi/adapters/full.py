"""Full fine-tuning: no adapter, the model's own weights are trained; all of them, or only some layers'."""

import re
from typing import Annotated, Any, ClassVar

from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import nn

from shikomi.adapters._adapter import Attached, Capabilities
from shikomi.errors import BadInput, Problem


@dataclass(frozen=True)
class Full:
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
        """Chooses what is trained. Raises BadInput where that is nothing."""
        trained = self.trained_names([name for name, _ in model.named_parameters()])
        if not trained:
            found = f"last_layers={self.last_layers}, freeze={self.freeze!r}"
            fix = "freeze less: names look like " + ", ".join(n for n, _ in list(model.named_parameters())[1:4])
            raise BadInput([Problem("adapter: full with nothing left to train", found=found, fix=fix)])
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in trained)
            if name in trained:
                parameter.data = parameter.data.float()
        return None

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
