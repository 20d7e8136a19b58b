"""A tiny real model for evaluation, loaded once."""

from pathlib import Path

import pytest

from shikomi.data.encode import Encoder
from shikomi.model.language_model import LanguageModel
from shikomi.model.load import load_model


@pytest.fixture(scope="session")
def lm(tiny_llama: Path) -> LanguageModel:
    return load_model(str(tiny_llama), dtype="fp32", device="cpu")


@pytest.fixture(scope="session")
def encoder(lm: LanguageModel) -> Encoder:
    return Encoder(lm.tokenizer)
