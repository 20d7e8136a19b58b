"""Loading into stored weights tensor by tensor: the same model as loading it whole, without its memory."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import save_tiny, tiny_model
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from shikomi.errors import BadInput
from shikomi.quant._quantized import Quantized
from shikomi.quant._streaming import WHOLE, linear_names, load_quantized, quantize_linears
from shikomi.quant.int8 import Int8
from shikomi.quant.nf4 import Nf4

CPU = torch.device("cpu")
IDS = torch.arange(40, 60)[None]


def streamed(folder: Path, scheme=None, storage: torch.dtype = torch.float32):
    config = AutoConfig.from_pretrained(folder)
    return load_quantized(folder, config, scheme or Nf4(), storage, storage, CPU)


def whole(folder: Path, scheme=None, storage: torch.dtype = torch.float32):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=storage)
    quantize_linears(model, scheme or Nf4(), storage, CPU)
    return model


def same(ours: torch.nn.Module, theirs: torch.nn.Module) -> None:
    """Equal parameters, buffers, stored weights and logits."""
    assert [n for n, _ in ours.named_modules()] == [n for n, _ in theirs.named_modules()]
    mine, wanted = (dict(m.named_parameters()) | dict(m.named_buffers()) for m in (ours, theirs))
    assert mine.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert mine[name].dtype == tensor.dtype and torch.equal(mine[name], tensor), name
    for name, module in theirs.named_modules():
        if isinstance(module, Quantized):
            assert torch.equal(ours.get_submodule(name).full_weight(), module.full_weight()), name
    with torch.no_grad():
        assert torch.equal(ours(input_ids=IDS).logits, theirs(input_ids=IDS).logits)


@pytest.mark.parametrize(
    "architecture, overrides",
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": True}),
        ("qwen2", {"tie_word_embeddings": True}),
        ("qwen3", {}),
        ("mistral", {}),
        ("gemma2", {}),
        ("gpt2", {}),
        ("phi3", {}),
        ("gpt_neox", {}),
        ("bloom", {}),
    ],
)
def test_a_streamed_model_is_the_loaded_model_quantized(architecture, overrides, tiny_folder):
    folder = tiny_folder(architecture, **overrides)
    ours, notes = streamed(folder)
    theirs = whole(folder)
    assert notes == []
    same(ours, theirs)
    assert sum(isinstance(m, Quantized) for m in ours.modules()) == len(linear_names(tiny_model(architecture))) > 0
    assert not ours.training and not any(p.is_meta for p in ours.parameters())
    assert type(ours.get_output_embeddings()) is torch.nn.Linear
    if overrides:
        assert ours.get_output_embeddings().weight is ours.get_input_embeddings().weight
    assert ours.generation_config.eos_token_id == theirs.generation_config.eos_token_id


def test_a_conv1d_is_stored_turned(tiny_folder):
    folder = tiny_folder("gpt2")
    module = streamed(folder, Int8())[0].transformer.h[0].attn.c_attn
    weight = load_file(folder / "model.safetensors")["transformer.h.0.attn.c_attn.weight"]
    assert isinstance(module, Quantized) and (module.in_features, module.out_features) == weight.shape
    assert (module.full_weight() - weight.t()).norm() < 0.01 * weight.norm()


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float32])
def test_files_in_parts_and_without_the_prefix(storage, tmp_path):
    model = tiny_model("llama").to(torch.bfloat16)
    model.save_pretrained(tmp_path / "parts", max_shard_size="20KB")
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) > 2
    ours, notes = streamed(tmp_path / "parts", storage=storage)
    assert notes == []
    same(ours, whole(tmp_path / "parts", storage=storage))
    tensors = {name.removeprefix("model."): tensor.contiguous() for name, tensor in model.state_dict().items()}
    (tmp_path / "bare").mkdir()
    save_file(tensors, tmp_path / "bare" / "model.safetensors", {"format": "pt"})
    model.config.save_pretrained(tmp_path / "bare")
    ours, notes = streamed(tmp_path / "bare", storage=storage)
    assert notes == []
    same(ours, whole(tmp_path / "bare", storage=storage))


def test_a_tied_head_that_the_file_repeats(tmp_path):
    save_tiny(tmp_path, "llama", tie_word_embeddings=True)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, path, {"format": "pt"})
    ours, notes = streamed(tmp_path)
    assert notes == [] and ours.lm_head.weight is ours.model.embed_tokens.weight
    same(ours, whole(tmp_path))


def test_a_tied_head_that_is_another_in_the_file_is_left_to_transformers(tmp_path):
    save_tiny(tmp_path, "llama", tie_word_embeddings=True)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"] * 2}, path, {"format": "pt"})
    ours, notes = streamed(tmp_path)
    assert notes == [WHOLE]
    same(ours, whole(tmp_path))


def test_linear_maps_that_share_a_weight_stay_dense():
    model = tiny_model("llama")
    first, second = (model.model.layers[i].mlp for i in (0, 1))
    first.gate_proj.weight = second.gate_proj.weight
    names = linear_names(model)
    assert len(names) == 12 and not any(name.endswith("gate_proj") for name in names)


def test_names_that_transformers_converts_are_loaded_whole(tiny_folder):
    folder = tiny_folder("mixtral")
    ours, notes = streamed(folder)
    assert notes == [WHOLE]
    same(ours, whole(folder))
    assert isinstance(ours.model.layers[0].self_attn.q_proj, Quantized)


def test_a_wrong_shape_is_named(tmp_path):
    save_tiny(tmp_path, "llama")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"intermediate_size": 96}))
    with pytest.raises(BadInput, match=r"layers\.0\.mlp.*64.*96"):
        streamed(tmp_path)


PEAK = """
import json, sys
from pathlib import Path
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from shikomi.quant._quantized import resident_bytes
from shikomi.quant._streaming import load_quantized
from shikomi.quant.nf4 import Nf4

def status(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1]) * 1024

def load(folder):
    config = AutoConfig.from_pretrained(folder)
    return load_quantized(Path(folder), config, Nf4(), torch.bfloat16, torch.float32, torch.device("cpu"))[0]

load(sys.argv[1])  # everything is imported
before = status("VmRSS")
model = load(sys.argv[2])
dense = sum(p.numel() * p.element_size() for p in model.parameters())
print(json.dumps([status("VmHWM") - before, resident_bytes(model) + dense]))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_peak_memory_is_the_result_and_three_of_the_largest_tensor(tmp_path, tiny_folder):
    config = LlamaConfig(
        vocab_size=16000,
        hidden_size=512,
        intermediate_size=2048,
        num_hidden_layers=12,
        num_attention_heads=8,
        tie_word_embeddings=True,
    )
    with torch.device("meta"):
        shapes = {n: p.shape for n, p in LlamaForCausalLM(config).named_parameters()}
    tensors = {name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    config.save_pretrained(tmp_path)
    size = (tmp_path / "model.safetensors").stat().st_size
    largest = 16000 * 512 * 2
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, "-c", PEAK, str(tiny_folder("llama")), str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    peak, result = json.loads(done.stdout)
    assert size > 115e6 and result < 0.37 * size
    assert peak < result + 3 * largest
