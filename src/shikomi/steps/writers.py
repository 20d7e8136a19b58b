"""Writers of metrics besides metrics.jsonl; each is an optional package of the `track` extra."""

from pathlib import Path
from typing import Any, Protocol

from shikomi.errors import BadInput, Problem


class Writer(Protocol):
    def write(self, step: int, values: dict[str, float]) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Event files in the run's folder, read by `tensorboard --logdir`."""

    def __init__(self, folder: Path, config: dict[str, Any]):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder / "tensorboard"))

    def write(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


class Tracked:
    """Weights & Biases, or trackio, which has the same interface."""

    def __init__(self, module: Any, folder: Path, config: dict[str, Any]):
        self.module = module
        module.init(project="shikomi", name=folder.name, config=config)

    def write(self, step: int, values: dict[str, float]) -> None:
        self.module.log(values, step=step)

    def close(self) -> None:
        self.module.finish()


def open_writers(names: tuple[str, ...], folder: Path, config: dict[str, Any]) -> list[Writer]:
    """The writers of `report_to`. Raises BadInput where the package is not installed."""
    return [_open(name, folder, config) for name in names]


def _open(name: str, folder: Path, config: dict[str, Any]) -> Writer:
    try:
        if name == "tensorboard":
            return TensorBoard(folder, config)
        module = __import__(name)
    except ImportError as error:
        fix = "pip install 'shikomi[track]', or remove it from report_to"
        raise BadInput([Problem(f"report_to: {name} is not installed", found=str(error), fix=fix)]) from error
    return Tracked(module, folder, config)
