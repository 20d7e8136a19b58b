"""Full fine-tuning: no adapter, every weight is trained."""

from typing import ClassVar

from pydantic.dataclasses import dataclass


@dataclass(frozen=True)
class Full:
    """Trains all weights of the model, as fp32 masters."""

    name: ClassVar[str] = "full"
