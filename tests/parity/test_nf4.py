"""4-bit weights against bitsandbytes and against the paper's definition in plain torch, bit for bit."""

import bitsandbytes
import pytest
import torch
from bitsandbytes import functional
from hypothesis import given, settings
from hypothesis import strategies as st

from shikomi.quant import _bnb
from shikomi.quant._bnb import FourBit
from shikomi.quant._quantized import Quantized
from shikomi.quant.fp4 import Fp4
from shikomi.quant.int8 import Int8
from shikomi.quant.nf4 import Nf4

CPU = torch.device("cpu")
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634),
    *(0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)  # QLoRA, appendix E
SHAPES = [(64, 64), (33, 80), (7, 33), (5, 3), (1, 1), (300, 576), (1000, 333)]  # the last ones take several slices


def weight(shape: tuple[int, int], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def blocks(flat: torch.Tensor, size: int) -> torch.Tensor:
    """(blocks, size), the last one filled up with zeros."""
    return torch.nn.functional.pad(flat, (0, -flat.numel() % size)).view(-1, size)


def nearest(values: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Index of the nearest entry of a sorted table; halfway goes to the lower one."""
    return torch.bucketize(values, (table[:-1] + table[1:]) / 2)


def reference(w: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes (out * in,) and absmax (blocks,) of NF4 by its definition (QLoRA, eq. 1 and section 3)."""
    parts = blocks(w.flatten().float(), size)
    absmax = parts.abs().amax(1)
    scaled = parts * (1 / absmax.clamp(min=1e-38))[:, None]
    if w.numel() % size:
        scaled[-1] = parts[-1] / absmax[-1]
    return nearest(scaled.clamp(-1, 1), torch.tensor(NF4)).view(-1)[: w.numel()], absmax


def nested_reference(absmax: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes, scales and offset of double quantization (QLoRA, section 3)."""
    offset = absmax.mean()
    parts = blocks(absmax - offset, 256)
    scale = parts.abs().amax(1)
    scaled = (parts * (1 / scale)[:, None]).clamp(-1, 1)
    # bitsandbytes rounds to one of 65,536 steps first, and looks the nearest code of a step up
    steps = ((scaled + 1) * 0.5).double().mul(65535).add(0.5).float().long()
    step = -1 + 2 * torch.arange(65536).float() / 65535
    codes = nearest(step, functional.create_dynamic_map())[steps]
    return codes.view(-1)[: absmax.numel()], scale, offset


def unpacked(stored: FourBit) -> torch.Tensor:
    codes = torch.stack([stored.packed >> 4, stored.packed & 15], 1).view(-1)
    return codes[: stored.shape[0] * stored.shape[1]].long()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [32, 64, 4096])
def test_codes_scales_and_dequantized_weights_are_those_of_the_definition(shape, dtype, size):
    w = weight(shape, dtype)
    stored = Nf4(double_quant=False, block_size=size).quantize(w, CPU)
    codes, absmax = reference(w, size)
    assert torch.equal(stored.absmax, absmax)
    assert torch.equal(unpacked(stored), codes)
    exact = torch.tensor(NF4)[codes] * absmax.repeat_interleave(size)[: codes.numel()]
    for out in (torch.float32, torch.bfloat16, torch.float16):
        into = torch.full(shape, torch.nan, dtype=out)
        stored.write(into)
        assert torch.equal(into, exact.view(shape).to(out))


@pytest.mark.parametrize("shape", [(300, 576), (1000, 333), (64, 64)])
def test_nested_scales_are_those_of_the_definition(shape):
    w = weight(shape, torch.bfloat16)
    stored = Nf4().quantize(w, CPU)
    codes, scale, offset = nested_reference(reference(w, 64)[1])
    assert stored.nested is not None
    assert torch.equal(stored.absmax.long(), codes)
    assert torch.equal(stored.nested.scale, scale) and torch.equal(stored.nested.offset, offset)
    table = functional.create_dynamic_map()
    assert torch.equal(stored.scales(), table[codes] * scale.repeat_interleave(256)[: codes.numel()] + offset)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 300),
    width=st.integers(1, 700),
    size=st.sampled_from(_bnb.BLOCKS),
    kind=st.sampled_from([Nf4, Fp4]),
    double=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    transposed=st.booleans(),
)
def test_slices_equal_what_bitsandbytes_makes_of_the_whole(rows, width, size, kind, double, dtype, transposed):
    w = weight((width, rows), dtype).t() if transposed else weight((rows, width), dtype)
    stored = kind(double_quant=double, block_size=size).quantize(w, CPU)
    packed, state = functional.quantize_4bit(
        w.contiguous(), blocksize=size, compress_statistics=double, quant_type=kind.name
    )
    assert torch.equal(stored.packed, packed.view(-1))
    assert torch.equal(stored.absmax, state.absmax)
    if double:
        assert torch.equal(stored.nested.scale, state.state2.absmax)
        assert torch.equal(stored.nested.offset, state.offset)
    into = torch.empty(rows, width, dtype=dtype)
    stored.write(into)
    if width % 2 == 0:  # bitsandbytes compiles its own code for odd widths
        assert torch.equal(into, functional.dequantize_4bit(packed, state))
    table = functional.get_4bit_type(kind.name, device="cpu")
    scales = stored.scales().repeat_interleave(size)[: rows * width]
    assert torch.equal(into, (table[unpacked(stored)] * scales).view(rows, width).to(dtype))


def test_a_linear_layer_computes_what_bitsandbytes_computes():
    w, bias, x = (
        weight((48, 96), torch.float32),
        weight((1, 48), torch.float32, 1)[0],
        weight((5, 96), torch.float32, 2),
    )
    theirs = bitsandbytes.nn.Linear4bit(96, 48, compute_dtype=torch.float32, quant_type="nf4")
    theirs.load_state_dict({"weight": w, "bias": bias})
    theirs = theirs.to("cpu")
    ours = Quantized(Nf4().quantize(w, CPU), torch.nn.Parameter(bias), torch.float32)
    assert theirs.weight.bnb_quantized
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shape", [(7, 33), (1, 1), (600, 576)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_int8_rows_are_those_of_bitsandbytes(shape, dtype):
    w = weight(shape, dtype)
    stored = Int8().quantize(w, CPU)
    codes, absmax, _ = functional.int8_vectorwise_quant(w.float())
    assert torch.equal(stored.weight, codes) and torch.equal(stored.absmax, absmax)
    for out in (torch.float32, torch.bfloat16):
        into = torch.empty(shape, dtype=out)
        stored.write(into)
        assert torch.equal(into, functional.int8_vectorwise_dequant(codes, absmax).to(out))
