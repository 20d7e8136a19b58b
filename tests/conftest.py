"""What every test shares: a quiet and deterministic environment, tiny models, and the real small one."""

import os

# Before torch is imported: OMP_DYNAMIC=TRUE has given NaN, and nothing here may ask a hub.
os.environ["OMP_DYNAMIC"] = "FALSE"
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"  # not setdefault: a worker inherits what its parent has set below
os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("COLUMNS", "200")
os.environ.setdefault("NO_COLOR", "1")

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import save_tiny, tiny_tokenizer
from transformers import PreTrainedTokenizerFast

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="no CUDA device")
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(skip)


@pytest.fixture(scope="module", autouse=True)
def _cache_is_left_as_found() -> Iterator[None]:
    """A module that leaves its cache behind would hide the real model from later ones of the same worker."""
    before = os.environ.get("SHIKOMI_CACHE")
    yield
    assert os.environ.get("SHIKOMI_CACHE") == before


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the checkout."""
    return Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def examples(repository: Path) -> Path:
    """The folder of the example data."""
    return repository / "src" / "shikomi" / "examples"


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer of the tiny models: byte-level BPE with ChatML markers and template."""
    return tiny_tokenizer()


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Makes a tiny model of an architecture, once a session: `tiny_folder("qwen3", tie_word_embeddings=True)`."""
    made: dict[Any, Path] = {}

    def folder(architecture: str = "llama", seed: int = 0, **overrides: Any) -> Path:
        key = (architecture, seed, *sorted(overrides.items()))
        if key not in made:
            made[key] = save_tiny(tmp_path_factory.mktemp(architecture), architecture, seed, **overrides)
        return made[key]

    return folder


@pytest.fixture(scope="session")
def tiny_llama(tiny_folder: Callable[..., Path]) -> Path:
    """A folder with a tiny random Llama, its tokenizer and a chat template. Read it; do not write into it."""
    return tiny_folder("llama")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a cache of the test's own."""
    monkeypatch.setenv("SHIKOMI_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="session")
def smollm2_folder() -> Path:
    """SmolLM2-135M-Instruct as a transformers folder, converted once into the user's cache."""
    from shikomi.model import catalog

    return Path(catalog.get("smollm2"))
