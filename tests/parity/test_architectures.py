"""Packed forward and gradients against transformers' own padded forward, architecture by architecture."""

import copy

import numpy as np
import pytest
import torch
from architectures import EXPECTED, SPECS, VOCABULARY, build

from shikomi.adapters.full import Full
from shikomi.data.packing import Example, pack
from shikomi.model.device import Dtypes
from shikomi.model.load import wrap
from shikomi.model.probe import choose_path

FP32 = Dtypes(torch.float32, torch.float32)
LENGTHS = (17, 9, 23, 5)


def examples() -> list[Example]:
    rng = np.random.default_rng(3)
    prefix = rng.integers(3, VOCABULARY, 16).astype(np.int32)
    found = []
    for row, length in enumerate(LENGTHS):
        ids = rng.integers(3, VOCABULARY, length).astype(np.int32)
        if length > 16:
            ids[:16] = prefix
        mask = np.zeros(length, bool)
        mask[max(1, length - 6) :] = True
        found.append(Example(ids, mask, row))
    return found


def padded_loss(model, rows: list[Example]) -> torch.Tensor:
    """The mean negative log-likelihood of the trained tokens by transformers, right-padded."""
    longest = max(len(r) for r in rows)
    ids, attend = torch.zeros(len(rows), longest, dtype=torch.long), torch.zeros(len(rows), longest, dtype=torch.long)
    labels = torch.full((len(rows), longest), -100)
    for i, row in enumerate(rows):
        tokens = torch.from_numpy(row.ids.astype(np.int64))
        ids[i, : len(row)], attend[i, : len(row)] = tokens, 1
        labels[i, : len(row)] = torch.where(torch.from_numpy(row.mask), tokens, -100)
    logits = model(input_ids=ids, attention_mask=attend, use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("share_prefix", [False, True])
def test_loss_and_gradients_equal_the_padded_forward(name, share_prefix):
    reference = build(name)
    ours = wrap(copy.deepcopy(reference), None, Full(), FP32, torch.device("cpu"))
    choose_path(ours, max_length=64)
    assert ours.path == EXPECTED[name], ours.path_reason
    if ours.path == "separate":
        assert ours.path_reason

    expected = padded_loss(reference, examples())
    expected.backward()
    scored = ours.score(pack(examples(), share_prefix))
    loss = -scored.logp.mean()
    loss.backward()

    torch.testing.assert_close(loss, expected, rtol=2e-5, atol=2e-6)
    want = {n: p.grad for n, p in reference.named_parameters() if p.grad is not None}
    got = {n: p.grad for n, p in ours.trainable().items() if p.grad is not None}
    assert sum(bool(g.abs().max() > 0) for g in want.values()) > 10
    for key, grad in want.items():
        scale = float(grad.abs().max())
        torch.testing.assert_close(
            got[key], grad, rtol=1e-3, atol=2e-5 * max(scale, 1e-2), msg=lambda m, k=key: f"{k}: {m}"
        )


def test_expected_paths_cover_every_architecture():
    assert set(EXPECTED) == set(SPECS)
