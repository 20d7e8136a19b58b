"""Files of stored weights: transformers with bitsandbytes loads what is written here, and the other way round."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import save_tiny
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

from shikomi.errors import BadInput
from shikomi.quant._quantized import Quantized
from shikomi.quant._serialized import (
    from_config,
    from_state_dict,
    model_to_state_dict,
    stored_modules,
    to_config,
    to_state_dict,
)
from shikomi.quant._streaming import load_quantized
from shikomi.quant.fp4 import Fp4
from shikomi.quant.int8 import Int8
from shikomi.quant.nf4 import Nf4

CPU = torch.device("cpu")
IDS = torch.arange(40, 60)[None]
FOUR = {"nf4": Nf4(), "nf4 single": Nf4(double_quant=False), "fp4": Fp4()}
ALL = FOUR | {"int8": Int8(), "nf4 128": Nf4(block_size=128)}


def streamed(folder: Path, scheme):
    config = AutoConfig.from_pretrained(folder)
    return load_quantized(folder, config, scheme, torch.float32, torch.float32, CPU)[0]


def theirs(folder: Path, scheme) -> torch.nn.Module:
    """What transformers makes of a dense folder."""
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=scheme.name,
        bnb_4bit_use_double_quant=scheme.double_quant,
        bnb_4bit_compute_dtype=torch.float32,
    )
    return AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=config, dtype=torch.float32, device_map="cpu"
    )


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def write(model: torch.nn.Module, dense: Path, folder: Path, scheme) -> Path:
    """Our model as a folder that transformers reads."""
    folder.mkdir()
    save_file(model_to_state_dict(model), folder / "model.safetensors", {"format": "pt"})
    config = json.loads((dense / "config.json").read_text())
    config["quantization_config"] = to_config(scheme, torch.float32)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", FOUR)
def test_both_ways_with_transformers(name, tied, tmp_path, tiny_folder):
    dense, scheme = tiny_folder("qwen2", tie_word_embeddings=tied), FOUR[name]
    ours, other = streamed(dense, scheme), theirs(dense, scheme)
    torch.testing.assert_close(logits(ours), logits(other), rtol=1e-5, atol=1e-5)

    other.save_pretrained(tmp_path / "theirs")
    written = write(ours, dense, tmp_path / "ours", scheme)
    wanted, found = (load_file(f / "model.safetensors") for f in (tmp_path / "theirs", written))
    assert found.keys() == wanted.keys()
    for key, tensor in wanted.items():
        assert found[key].dtype == tensor.dtype and torch.equal(found[key], tensor), key

    again = AutoModelForCausalLM.from_pretrained(written, dtype=torch.float32, device_map="cpu")
    assert torch.equal(logits(again), logits(other))
    config = AutoConfig.from_pretrained(tmp_path / "theirs")
    assert from_config(config.quantization_config, "theirs") == scheme
    assert torch.equal(logits(streamed(tmp_path / "theirs", scheme)), logits(ours))


def test_int8_files_are_read_by_transformers_and_read_back(tmp_path, tiny_folder):
    dense = tiny_folder("llama")
    ours = streamed(dense, Int8())
    written = write(ours, dense, tmp_path / "ours", Int8())
    other = AutoModelForCausalLM.from_pretrained(written, dtype=torch.float32, device_map="cpu")
    module = other.model.layers[1].mlp.up_proj
    mine = ours.model.layers[1].mlp.up_proj
    assert torch.equal(module.weight.data, mine.stored.weight)
    assert torch.equal(logits(streamed(written, Int8())), logits(ours))
    # they round what they multiply to 8 bits too
    assert (logits(other) - logits(ours)).norm() < 0.1 * logits(ours).norm()


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("shape", [(48, 96), (7, 33)])
def test_one_weight_comes_back_bit_for_bit(name, shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()
    bias = torch.nn.Parameter(torch.ones(shape[0]), requires_grad=False)
    module = Quantized(ALL[name].quantize(weight, CPU), bias, torch.float32)
    tensors = to_state_dict(module, "a.b.")
    assert set(stored_modules(tensors)) == {"a.b"}
    names = stored_modules(tensors)["a.b"]
    assert names == tensors.keys() - {"a.b.bias"}
    again = from_state_dict(tensors.__getitem__, names, "a.b.", CPU)
    assert again.options == module.stored.options == {"name": ALL[name].name, **vars(ALL[name])}
    full = torch.empty(shape)
    again.write(full)
    assert torch.equal(full, module.full_weight())


@pytest.mark.parametrize("gone", ["weight.absmax", "weight.quant_map", "weight.nested_quant_map", "weight"])
def test_a_missing_tensor_is_named(gone):
    tensors = to_state_dict(Quantized(Nf4().quantize(torch.ones(4, 64), CPU), None, torch.float32), "x.")
    names = stored_modules(tensors)["x"] - {f"x.{gone}"}
    with pytest.raises(BadInput, match=f"without x.{gone}"):
        from_state_dict(tensors.__getitem__, names, "x.", CPU)


@pytest.mark.parametrize(
    "key, value, words",
    [
        ("x.weight", torch.zeros(3, 1, dtype=torch.uint8), "3 bytes"),
        ("x.weight.quant_map", torch.linspace(-1, 1, 16), "unknown table"),
        ("x.weight.quant_state.bitsandbytes__nf4", torch.tensor(list(b"{}"), dtype=torch.uint8), "only"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(key, value, words):
    tensors = to_state_dict(Quantized(Nf4().quantize(torch.ones(4, 64), CPU), None, torch.float32), "x.")
    tensors[key] = value
    with pytest.raises(BadInput, match=words):
        from_state_dict(tensors.__getitem__, stored_modules(tensors)["x"], "x.", CPU)


@pytest.mark.parametrize("other", [Nf4(double_quant=False), Fp4(), Int8(), Nf4(block_size=128)])
def test_quantizing_twice_is_refused_with_what_the_folder_holds(other, tmp_path):
    dense = save_tiny(tmp_path / "dense", "llama")
    folder = write(streamed(dense, Nf4()), dense, tmp_path / "nf4", Nf4())
    with pytest.raises(BadInput, match="quantized already.*name: nf4, block_size: 64, double_quant: True"):
        streamed(folder, other)


def test_other_formats_are_refused_by_name():
    with pytest.raises(BadInput, match="found gptq"):
        from_config({"quant_method": "gptq", "bits": 4}, "some/folder")
    assert from_config(None, "some/folder") is None
