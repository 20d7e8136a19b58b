"""Where an optimizer keeps its state, for plans."""

from typing import NamedTuple


class Places(NamedTuple):
    """Bytes of optimizer state by where they are."""

    device: int = 0  # with the model
    host: int = 0  # in main memory, for a model on another device
    disk: int = 0
