"""What a long piece of work tells about itself; the command line shows it, Python calls stay silent."""

from typing import Any, Protocol


class Progress(Protocol):
    """Receives what is going on; every method returns at once."""

    def phase(self, text: str) -> None:
        """Names a silent phase: an import, a conversion."""

    def note(self, text: str) -> None:
        """One line worth reading."""

    def start(self, total: int, what: str) -> None:
        """`total` steps of training begin."""

    def advance(self, record: dict[str, Any]) -> None:
        """One training step: step, total_steps, loss, grad_norm, learning_rate, tokens_per_second, eta_seconds, ..."""

    def tick(self, done: int, total: int, what: str) -> None:
        """Countable work that is not training: tokenising, evaluating."""

    def finish(self) -> None:
        """Nothing more will come."""


class Silent:
    """Shows nothing."""

    def phase(self, text: str) -> None:
        return None

    def note(self, text: str) -> None:
        return None

    def start(self, total: int, what: str) -> None:
        return None

    def advance(self, record: dict[str, Any]) -> None:
        return None

    def tick(self, done: int, total: int, what: str) -> None:
        return None

    def finish(self) -> None:
        return None
