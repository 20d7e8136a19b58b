import pytest

from shikomi.quant import _bnb


@pytest.fixture
def no_bitsandbytes(monkeypatch):
    """Within: bitsandbytes is not installed."""
    monkeypatch.setattr(_bnb.importlib.util, "find_spec", lambda name: None)
    _bnb.functional.cache_clear()
    yield
    _bnb.functional.cache_clear()
