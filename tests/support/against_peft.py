"""Gradients of ours against PEFT's: the same rows, its loss on them, and how much of a difference is only rounding."""

import copy
from collections.abc import Callable, Mapping

import torch
from architectures import VOCABULARY
from torch import Tensor

from shikomi.data.packing import Example


def rows() -> list[Example]:
    generator = torch.Generator().manual_seed(9)
    found = []
    for i, n in enumerate((12, 7, 19)):
        ids = torch.randint(3, VOCABULARY, (n,), generator=generator).numpy().astype("int32")
        found.append(Example(ids, (torch.arange(n) > n // 2).numpy(), i))
    return found


def peft_loss(model) -> Tensor:
    """Mean over the trained tokens of `rows`, one row at a time; virtual tokens before a row are passed over."""
    total, count = torch.zeros(()), 0
    for row in rows():
        ids = torch.from_numpy(row.ids.astype("int64"))
        logp = model(input_ids=ids[None]).logits[0, -len(ids) :].log_softmax(-1)[:-1]
        mask = torch.from_numpy(row.mask)[1:]
        total = total - logp.gather(1, ids[1:, None])[:, 0][mask].sum()
        count += int(mask.sum())
    return total / count


def rounding_noise(peft, exact: Mapping[str, Tensor], gradients: Callable[..., Mapping[str, Tensor]]) -> dict:
    """How far PEFT's own gradients move when every weight moves by its last bit: what fp32 cannot tell apart."""
    found = dict.fromkeys(exact, 0.0)
    generator = torch.Generator().manual_seed(11)
    for _ in range(4):
        moved = copy.deepcopy(peft)
        moved.zero_grad()
        with torch.no_grad():
            for parameter in moved.parameters():
                signs = torch.randint(0, 2, parameter.shape, generator=generator) * 2 - 1
                parameter.mul_(1 + signs * 2.0**-23)
        peft_loss(moved).backward()
        for name, grad in gradients(moved).items():
            found[name] = max(found[name], float((grad - exact[name]).abs().max()))
    return found


def assert_equal_but_for_rounding(
    got: Mapping[str, Tensor], peft, gradients: Callable[..., Mapping[str, Tensor]]
) -> None:
    """Every gradient in `got` is PEFT's, after its backward, as far as fp32 can tell."""
    want = gradients(peft)
    noise = rounding_noise(peft, want, gradients)
    assert set(want) == set(got)
    for name, grad in want.items():
        worst = float((got[name] - grad).abs().max())
        allowed = 4 * noise[name] + 1e-6 * float(grad.abs().max())
        assert worst <= allowed, f"{name}: {worst:.3g}, noise {noise[name]:.3g}"
