"""No quantization: weights stay in the storage dtype of the run."""

from typing import ClassVar

from pydantic.dataclasses import dataclass


@dataclass(frozen=True)
class NoQuantization:
    """The base as loaded."""

    name: ClassVar[str] = "none"
