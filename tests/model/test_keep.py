"""What fused layers keep for the backward lies apart from what comes and goes, and changes nothing."""

import gc
import mmap
import weakref

import pytest
import torch

from shikomi.model import keep as module
from shikomi.model.keep import BLOCK, Keep


@pytest.fixture
def made(monkeypatch):
    """The blocks that were asked for, as weak references."""
    found = []

    class Pages(mmap.mmap):
        def __new__(cls, *arguments):
            pages = super().__new__(cls, *arguments)
            found.append(weakref.ref(pages))
            return pages

    monkeypatch.setattr(module.mmap, "mmap", Pages)
    return found


def test_copies_are_the_numbers_in_the_storage_dtype(made):
    keep = Keep(torch.bfloat16, apart=True)
    given = [torch.randn(3, 5), torch.randn(4, 2, 3).transpose(0, 1), torch.randn(7)]
    for x, copy in [(x, keep(x)) for x in given]:
        assert copy.dtype == torch.bfloat16 and torch.equal(copy, x.bfloat16())
    assert len(made) == 1


def test_autograd_counts_writes_to_each_copy_by_itself():
    keep = Keep(torch.bfloat16, apart=True)
    first = keep(torch.ones(4))
    version = first._version
    keep(torch.zeros(4)).add_(1)
    assert first._version == version and torch.equal(first, torch.ones(4, dtype=torch.bfloat16))


def test_a_block_goes_with_its_last_copy(made):
    keep = Keep(torch.bfloat16, apart=True)
    half = BLOCK // 2 // 2  # numbers
    copies = [keep(torch.zeros(half)) for _ in range(3)]
    large = keep(torch.zeros(3 * half))
    assert len(made) == 3 and large.numel() == 3 * half
    del keep
    del copies[1:], large
    gc.collect()
    assert [block() is not None for block in made] == [True, False, False]


def test_nothing_is_copied_where_the_dtype_is_right_already(made):
    x = torch.randn(3)
    assert Keep(torch.float32, apart=True)(x) is x
    assert Keep(torch.float32, apart=True)(x, copy=True) is not x
    assert len(made) == 1


def test_alone_copies_are_torch_s_own(made):
    x = torch.randn(3)
    assert torch.equal(Keep(torch.bfloat16, apart=False)(x), x.bfloat16())
    assert not made
