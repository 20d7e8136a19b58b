"""Stored weights under an adapter: the arithmetic of dense ones, nothing dequantized kept, few bits resident."""

import json
import os
import subprocess
import sys

import pytest
import torch

from shikomi import registry
from shikomi.adapters.lora import LoraLinear
from shikomi.errors import BadInput
from shikomi.quant import _bnb
from shikomi.quant._dense import Dense
from shikomi.quant._linear import Backward, compute
from shikomi.quant._loftq import loftq
from shikomi.quant._quantized import Quantized, logical_parameters, resident_bytes
from shikomi.quant.int8 import Int8
from shikomi.quant.nf4 import Nf4

CPU = torch.device("cpu")
OUTS = (40, 24, 33)  # of linear maps that read the same input
SCHEMES = {name: registry.find("quant", name) for name in registry.names("quant") if name != "none"}
ERRORS = {"nf4": 0.1, "fp4": 0.13, "int8": 0.012}  # of standard normal weights, relative


def stored(out: int, width: int, dtype: torch.dtype, scheme=None, seed: int = 0, bias: bool = True) -> Quantized:
    generator = torch.Generator().manual_seed(seed + out)
    weight = torch.randn(out, width, generator=generator).bfloat16()
    b = torch.nn.Parameter(torch.randn(out, generator=generator), requires_grad=False) if bias else None
    return Quantized((scheme or Nf4()).quantize(weight, CPU), b, dtype)


def dense_twin(base: Quantized) -> Dense:
    """The same numbers as a dense weight in the arithmetic dtype."""
    weight = torch.nn.Parameter(base.dequantize().clone(), requires_grad=False)
    return Dense(weight, base.bias, base.dtype)


def adapted(base, trained_bias: bool = False) -> LoraLinear:
    linear = LoraLinear(base, 4, 2.0, 0.0, False, torch.Generator().manual_seed(1))  # B is not zero
    if trained_bias:
        linear.inner.bias = torch.nn.Parameter(linear.inner.bias.detach().clone())
    return linear


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("shape", [(96, 320), (33, 47), (1, 5)])
def test_the_error_is_bounded_and_the_full_weight_is_exact(name, shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    base = Quantized(SCHEMES[name]().quantize(weight, CPU), None, torch.float32)
    error = (base.full_weight() - weight).norm() / weight.norm()
    assert 0 < error < ERRORS[name] * 1.5
    if weight.numel() > 1000:
        assert error < ERRORS[name]
    assert torch.equal(base.full_weight(), base.dequantize())
    assert base.full_weight().data_ptr() != base.dequantize().data_ptr()


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("trained_bias", [False, True])
def test_lora_over_stored_weights_equals_lora_over_the_same_dense_weights(name, dtype, trained_bias):
    width = 80  # no multiple of the block
    bases = [stored(out, width, dtype, SCHEMES[name]()) for out in OUTS]
    ours = [adapted(base, trained_bias) for base in bases]
    dense = [adapted(dense_twin(base), trained_bias) for base in bases]
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(19, width, generator=generator).to(dtype)
    dy = torch.randn(19, sum(OUTS), generator=generator).to(dtype)
    assert torch.equal(compute(ours, x), compute(dense, x))
    back, wanted_back = Backward(ours, dy), Backward(dense, dy)
    assert torch.equal(back.dx, wanted_back.dx)
    grads, wanted = back.gradients(x), wanted_back.gradients(x)
    assert len(grads) == len(wanted) == (9 if trained_bias else 6)
    assert all(torch.equal(a, b) for a, b in zip(grads, wanted, strict=True))


def test_calls_of_other_layers_between_forward_and_backward_change_no_gradient():
    width = 64
    base = stored(48, width, torch.float32)
    ours, dense = adapted(base), adapted(dense_twin(base))
    results = []
    for linear in (ours, dense):
        x = torch.randn(7, width, generator=torch.Generator().manual_seed(3)).requires_grad_()
        y = linear(x)
        stored(96, 128, torch.float32)(torch.ones(1, 128))  # overwrites the buffer
        y.square().sum().backward()
        results.append((y, x.grad, linear.lora_A.grad, linear.lora_B.grad))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert all(r.abs().max() > 0 for r in results[0])


@pytest.mark.parametrize("name", SCHEMES)
def test_autograd_keeps_nothing_that_was_dequantized(name):
    width, tokens = 512, 3
    layers = [adapted(stored(width, width, torch.float32, SCHEMES[name](), seed=i)) for i in range(4)]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.append(t.numel() * t.element_size()) or t, lambda t: t
    ):
        h = torch.randn(tokens, width, requires_grad=True)
        for layer in layers:
            h = layer(h)
    h.sum().backward()
    assert 0 < sum(kept) <= len(layers) * tokens * width * 4  # the inputs of A
    assert layers[0].lora_A.grad.abs().max() > 0


@pytest.mark.parametrize("double, most", [(True, 4.13), (False, 4.5)])
@pytest.mark.parametrize("shape", [(1536, 576), (576, 576), (192, 576)])
def test_resident_bits_per_weight(double, most, shape):
    scheme = Nf4(double_quant=double)
    models = [torch.nn.ModuleList([stored(*shape, torch.float32, scheme, i, False) for i in range(n)]) for n in (1, 9)]
    assert [logical_parameters(m) for m in models] == [n * shape[0] * shape[1] for n in (1, 9)]
    more = resident_bytes(models[1]) - resident_bytes(models[0])  # tables are shared
    bits = 8 * more / (logical_parameters(models[1]) - logical_parameters(models[0]))
    assert scheme.bits <= most and scheme.bits * 0.999 <= bits <= most
    assert sum(p.numel() for p in models[1].parameters()) == 0


def test_scales_do_not_change_with_a_models_dtype():
    base = stored(64, 64, torch.float32, Nf4(double_quant=False))
    before = base.full_weight()
    base.to(torch.bfloat16).half()
    assert base.stored.absmax.dtype == torch.float32 and base.bias.dtype == torch.float16
    assert torch.equal(base.full_weight(), before)


def test_the_weight_tells_its_device_and_multiplies_nothing():
    base = stored(16, 64, torch.float32)
    assert base.weight.device == CPU
    with pytest.raises(RuntimeError):
        torch.nn.functional.linear(torch.ones(2, 64), base.weight)


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(name, bad):
    weight = torch.ones(4, 64)
    weight[2, 5] = bad
    with pytest.raises(BadInput, match="NaN or infinite"):
        SCHEMES[name]().quantize(weight, CPU)


@pytest.mark.parametrize("name", SCHEMES)
def test_zeros_stay_zeros(name):
    weight = torch.zeros(6, 64)
    weight[3] = torch.linspace(-1, 1, 64)
    base = Quantized(SCHEMES[name]().quantize(weight, CPU), None, torch.float32)
    full = base.full_weight()
    assert full.isfinite().all() and full[[0, 1, 2, 4, 5]].abs().max() < 1e-6 and full[3].abs().max() > 0.9


ALONE = """
import json, sys
import torch
from shikomi.quant import _bnb
from shikomi.quant.int8 import Int8
from shikomi.quant.nf4 import Nf4

class Finder:
    seen = []

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == "bitsandbytes.backends.cpu.ops":
            Finder.seen.append(sys.modules.get("kernels", "free"))

def status(key):
    lines = open("/proc/self/status").read().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1]) * 1024

sys.meta_path.insert(0, Finder)
cpu, kept, extra = torch.device("cpu"), [], []
for scheme in (Nf4(), Int8()):
    kept.append(scheme.quantize(torch.ones(640, 512, dtype=torch.bfloat16), cpu))
after = "kernels" in sys.modules
weight = torch.ones(16384, 2048, dtype=torch.bfloat16)  # 67 MB
for scheme in (Nf4(), Int8()):
    before = status("VmRSS")
    kept.append(scheme.quantize(weight, cpu))
    result = sum(t.numel() * t.element_size() for t in kept[-1].tensors().values())
    extra.append(status("VmHWM") - before - result)
print(json.dumps({"extra": extra, "seen": Finder.seen, "after": after}))
"""


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What a process saw that does nothing but quantize, on a machine with the library that fetches kernels."""
    folder = tmp_path_factory.mktemp("hub")
    (folder / "kernels.py").write_text("raise SystemExit('fetched')\n")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(folder), *(path for path in sys.path if path)])}
    done = subprocess.run([sys.executable, "-c", ALONE], env=environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_quantizing_takes_a_few_megabytes_beside_the_result(alone):
    assert all(extra < 16e6 for extra in alone["extra"]), alone


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_no_code_is_fetched_from_a_hub(alone):
    assert alone["seen"] == [None]  # `import kernels` fails while bitsandbytes is imported
    assert not alone["after"]


def test_the_library_of_kernels_is_hidden_and_comes_back(tmp_path, monkeypatch):
    (tmp_path / "kernels.py").write_text("here = True\n")
    monkeypatch.syspath_prepend(tmp_path)
    with _bnb.no_hub_kernels(), pytest.raises(ImportError):
        import kernels
    import kernels

    with _bnb.no_hub_kernels():
        pass
    assert sys.modules["kernels"] is kernels and kernels.here
    monkeypatch.delitem(sys.modules, "kernels")


def test_loftq_undoes_most_of_the_error_of_quantization():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(96, 16, generator=generator) @ torch.randn(16, 128, generator=generator) / 4
    weight += torch.randn(96, 128, generator=generator) * 0.3
    plain = Quantized(Nf4().quantize(weight, CPU), None, torch.float32)
    errors = [(weight - plain.full_weight()).norm()]
    for iterations in (1, 5):
        a, b, rest = loftq(weight, Nf4(), 16, iterations)
        assert a.shape == (16, 128) and b.shape == (96, 16)
        q = torch.empty(96, 128)
        rest.write(q)
        errors.append((weight - q - b @ a).norm())
    assert errors[1] < 0.8 * errors[0] and errors[2] < errors[1]


def test_other_devices_and_a_missing_library_are_refused_by_name(monkeypatch):
    with pytest.raises(BadInput, match="quant: nf4 on mps.*cpu, cuda"):
        _bnb.quantize(torch.ones(4, 64), "nf4", 64, True, torch.device("mps"))
    monkeypatch.setattr(_bnb.importlib.util, "find_spec", lambda name: None)
    _bnb.functional.cache_clear()
    try:
        with pytest.raises(BadInput, match=r"shikomi\[quant\]"):
            Nf4().quantize(torch.ones(4, 64), CPU)
    finally:
        _bnb.functional.cache_clear()
    Int8().quantize(torch.ones(4, 64), CPU)  # needs no library
