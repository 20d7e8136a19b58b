"""GGUF files become transformers folders that hold exactly what transformers itself reads from them."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_gguf import vocabulary, write_tiny
from tiny_models import CHATML, tiny_config
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GgufConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from shikomi.errors import BadInput, TryAgain
from shikomi.model import gguf as conversion
from shikomi.model.gguf import convert
from shikomi.model.gguf_header import read_header
from shikomi.progress import Silent

Kind = gguf.GGMLQuantizationType

CASES: list[tuple[str, Kind, dict[str, Any]]] = [
    ("llama", Kind.Q4_1, {}),
    ("llama", Kind.Q8_0, {"tie_word_embeddings": True}),
    ("llama", Kind.F32, {"num_key_value_heads": 4}),
    ("llama", Kind.F16, {}),
    ("llama", Kind.BF16, {}),
    ("qwen2", Kind.Q5_0, {"use_sliding_window": False, "sliding_window": None}),
    ("qwen3", Kind.Q4_0, {"head_dim": 128}),
    ("gemma2", Kind.Q8_0, {"tie_word_embeddings": True}),
    ("gemma3_text", Kind.Q8_0, {"tie_word_embeddings": True}),
    ("phi3", Kind.Q8_0, {"sliding_window": None}),
    ("gpt2", Kind.Q8_0, {"n_positions": 1024}),
    ("qwen3_moe", Kind.Q8_0, {"moe_intermediate_size": 768, "head_dim": 8}),
]


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    path = tmp_path / "source" / "tiny.gguf"
    path.parent.mkdir()
    write_tiny(path)
    return path


@pytest.mark.parametrize(("architecture", "kind", "overrides"), CASES, ids=lambda value: str(value)[:40])
def test_weights_are_those_that_transformers_reads(tmp_path, architecture, kind, overrides):
    write_tiny(tmp_path / "tiny.gguf", architecture, kind, **overrides)
    notes = convert(tmp_path / "tiny.gguf", tmp_path / "out")
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="tiny.gguf", dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert notes == []
    assert type(ours) is type(theirs)
    expected, found = theirs.state_dict(), ours.state_dict()
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert found[name].dtype == torch.bfloat16
        assert torch.equal(found[name], values), name
    ids = torch.tensor([[5, 17, 40, 3, 99, 200, 8]])
    assert torch.equal(ours(ids).logits, theirs(ids).logits)


def test_unquantized_file_gives_back_the_model_it_was_made_of(tmp_path):
    model = write_tiny(tmp_path / "tiny.gguf", "llama", Kind.F32)
    convert(tmp_path / "tiny.gguf", tmp_path / "out")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    expected = dict(model.named_parameters())
    assert stored.keys() == expected.keys()
    for name, values in expected.items():
        assert torch.equal(stored[name], values.to(torch.bfloat16)), name


def test_config_is_transformers_own_with_readable_numbers(tiny, tmp_path):
    convert(tiny, tmp_path / "out")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    theirs = AutoConfig.from_pretrained(tiny.parent, gguf_file=tiny.name).to_dict()
    assert theirs["rms_norm_eps"] != 1e-6  # through float32: the very thing that is put right
    assert written["rms_norm_eps"] == 1e-6
    assert written["architectures"] == ["LlamaForCausalLM"]
    assert written["dtype"] == "bfloat16"
    assert "quantization_config" not in written
    assert "_model_name_or_path" not in written
    assert (written["bos_token_id"], written["eos_token_id"], written["pad_token_id"]) == (1, 2, 3)
    for key in ("hidden_size", "rope_parameters", "num_key_value_heads", "head_dim", "vocab_size"):
        assert written[key] == theirs[key], key


def test_generation_ends_at_the_end_of_a_turn_too(tmp_path):
    write_tiny(tmp_path / "tiny.gguf", metadata={"tokenizer.ggml.eot_token_id": 7})
    convert(tmp_path / "tiny.gguf", tmp_path / "out")
    generation = GenerationConfig.from_pretrained(tmp_path / "out")
    assert generation.eos_token_id == [2, 7]
    assert (generation.bos_token_id, generation.pad_token_id) == (1, 3)


def test_digits_stay_apart_after_saving_and_loading_twice(tiny, tmp_path):
    convert(tiny, tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.tokenize("2024") == ["2", "0", "2", "4"]
    assert tokenizer.tokenize("  12") == ["Ġ", "Ġ", "1", "2"]
    tokenizer.save_pretrained(tmp_path / "again")
    again = AutoTokenizer.from_pretrained(tmp_path / "again")
    for text in ("2024", "  12", "a 20 b", "the package 24", "é20ü\n\n  x"):
        assert again(text).input_ids == tokenizer(text).input_ids
        assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_digits_join_where_the_file_names_the_splitter_of_gpt2(tmp_path):
    write_tiny(tmp_path / "tiny.gguf", splitter="gpt-2")
    assert convert(tmp_path / "tiny.gguf", tmp_path / "out") == []
    assert AutoTokenizer.from_pretrained(tmp_path / "out").tokenize("2024") == ["2024"]


def test_an_unknown_splitter_is_said(tmp_path):
    write_tiny(tmp_path / "tiny.gguf", splitter="poro-chat")
    (note,) = convert(tmp_path / "tiny.gguf", tmp_path / "out")
    assert "'poro-chat'" in note and "tiny.gguf" in note


def test_a_splitter_that_transformers_knows_is_its_own(tmp_path):
    write_tiny(tmp_path / "tiny.gguf", splitter="llama-bpe")
    assert convert(tmp_path / "tiny.gguf", tmp_path / "out") == []
    assert AutoTokenizer.from_pretrained(tmp_path / "out").tokenize("2024") == ["20", "2", "4"]  # by threes


def test_special_tokens_and_chat_template(tiny, tmp_path):
    convert(tiny, tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 3)
    assert tokenizer.chat_template == CHATML
    assert tokenizer("<|im_end|>").input_ids == [2]
    assert len(tokenizer) == len(vocabulary()[0])
    text = (tmp_path / "out" / "tokenizer_config.json").read_text()
    assert str(tmp_path) not in text and "local_files_only" not in text


def test_vocabulary_size_is_the_embedding_s_where_the_file_pads_it(tmp_path):
    rows = len(vocabulary()[0]) + 5
    padded = {"token_embd.weight": np.zeros((rows, 32)), "output.weight": np.zeros((rows, 32))}
    write_tiny(tmp_path / "tiny.gguf", extra=padded)
    convert(tmp_path / "tiny.gguf", tmp_path / "out")
    assert AutoConfig.from_pretrained(tmp_path / "out").vocab_size == rows


@pytest.mark.parametrize("kind", ["linear", "yarn"])
def test_scaled_positions_are_read(tmp_path, kind):
    metadata = {
        "llama.rope.scaling.type": kind,
        "llama.rope.scaling.factor": 4.0,
        "llama.rope.scaling.original_context_length": 2048,
    }
    write_tiny(tmp_path / "tiny.gguf", metadata=metadata)
    convert(tmp_path / "tiny.gguf", tmp_path / "out")
    rope = AutoConfig.from_pretrained(tmp_path / "out").rope_parameters
    assert (rope["rope_type"], rope["factor"]) == (kind, 4.0)
    assert kind == "linear" or rope["original_max_position_embeddings"] == 2048


def llama3_factors(**changes: float) -> np.ndarray:
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope = {"rope_theta": 500000.0, "original_max_position_embeddings": 8192, **scaling, **changes}
    plain = 1.0 / 500000.0 ** (torch.arange(0, 128, 2) / 128)
    config = tiny_config("llama", head_dim=128, rope_parameters=rope, max_position_embeddings=131072)
    return (plain / ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))[0]).numpy()


def test_llama3_positions_are_recognised_by_their_factors(tmp_path):
    plain: dict[str, Any] = {"head_dim": 128, "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}
    head = {"llama.rope.dimension_count": 128}
    write_tiny(tmp_path / "a.gguf", extra={"rope_freqs.weight": llama3_factors()}, metadata=head, **plain)
    convert(tmp_path / "a.gguf", tmp_path / "out")
    rope = AutoConfig.from_pretrained(tmp_path / "out").rope_parameters
    assert rope["rope_type"] == "llama3"
    assert rope["factor"] == 8.0 and rope["original_max_position_embeddings"] == 8192
    other = llama3_factors(high_freq_factor=2.0)
    write_tiny(tmp_path / "b.gguf", extra={"rope_freqs.weight": other}, metadata=head, **plain)
    with pytest.raises(BadInput, match="rope_freqs.weight holds a rotary scaling other than"):
        convert(tmp_path / "b.gguf", tmp_path / "other")


def test_refused_by_name(tmp_path):
    path = tmp_path / "tiny.gguf"
    cases: list[tuple[dict[str, Any], str]] = [
        ({"extra": {"blk.0.ffn_gate_exps.weight": np.zeros((2, 32, 32))}}, "no place for blk.0.ffn_gate_exps.weight"),
        ({"leave_out": ("blk.1.",)}, r"no tensors for LlamaForCausalLM's model.layers.1.* and 6 more"),
        ({"extra": {"blk.0.attn_q.weight": np.zeros((64, 32))}}, r"q_proj.weight is \(64, 32\) there and \(32, 32\)"),
        ({"metadata": {"llama.rope.scaling.type": "longrope"}}, "LongRoPE"),
        ({"metadata": {"llama.rope.scaling.type": "sphere"}}, "none, linear and yarn"),
    ]
    for arguments, message in cases:
        write_tiny(path, **arguments)
        with pytest.raises(BadInput, match=message) as caught:
            convert(path, tmp_path / "out")
        assert "tiny.gguf" in str(caught.value)
    writer = gguf.GGUFWriter(path, "rwkv6")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(BadInput, match=r"\(rwkv6\) cannot be converted"):
        convert(path, tmp_path / "out")


def test_header_equals_the_gguf_package_s(tiny):
    reader = gguf.GGUFReader(tiny)
    header = read_header(tiny)
    assert header.architecture == "llama"
    names = [key for key in reader.fields if not key.startswith("GGUF.")]
    assert list(header.metadata) == names
    for key in names:
        value = header.metadata[key]
        assert value == reader.fields[key].contents(), key
    for entry, tensor in zip(header.tensors, reader.tensors, strict=True):
        assert (entry.name, entry.offset, entry.n_bytes) == (tensor.name, tensor.data_offset, tensor.n_bytes)
        assert list(reversed(entry.shape)) == list(tensor.shape)
        assert entry.ggml_type == tensor.tensor_type


def test_long_vocabularies_are_stepped_over(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "big.gguf", "llama")
    writer.add_token_list([f"token {index}" for index in range(5000)])
    writer.add_token_scores([0.5] * 5000)
    writer.add_bos_token_id(77)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    header = read_header(tmp_path / "big.gguf")
    assert header.metadata["tokenizer.ggml.tokens"] == 5000
    assert header.metadata["tokenizer.ggml.scores"] == 5000
    assert header.metadata["tokenizer.ggml.bos_token_id"] == 77
    assert "tokenizer.ggml.tokens" not in header.raw


def test_a_file_cut_off_anywhere_is_refused(tiny, tmp_path):
    data = tiny.read_bytes()
    broken = tmp_path / "broken.gguf"
    lengths = [*range(0, 64, 3), *range(64, len(data), len(data) // 40), len(data) - 40]
    for length in lengths:
        broken.write_bytes(data[:length])
        with pytest.raises(BadInput, match="broken.gguf") as caught:
            convert(broken, tmp_path / "out")
        assert "not a GGUF file" in str(caught.value) or "damaged" in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "x.gguf"
    path.write_bytes(b"PK\x03\x04 a zip file")
    with pytest.raises(BadInput, match="not a GGUF file: found first bytes b'PK"):
        read_header(path)
    path.write_bytes(b"GGUF" + (1).to_bytes(4, "little") + bytes(64))
    with pytest.raises(BadInput, match="GGUF version 1"):
        read_header(path)
    path.write_bytes(b"GGUF" + (3).to_bytes(4, "big") + bytes(64))
    with pytest.raises(BadInput, match="big-endian"):
        read_header(path)


def test_too_small_a_disk_is_said_before_anything_is_written(tiny, tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(conversion.shutil, "disk_usage", lambda place: usage)
    with pytest.raises(TryAgain, match="SHIKOMI_CACHE"):
        convert(tiny, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_progress_counts_the_tensors(tiny, tmp_path):
    seen = []

    class Recorder(Silent):
        def tick(self, done: int, total: int, what: str) -> None:
            seen.append((done, total))

    convert(tiny, tmp_path / "out", Recorder())
    count = len(load_file(tmp_path / "out" / "model.safetensors"))
    assert seen == [(done, count) for done in range(1, count + 1)]


MEASURE = """
import sys
from pathlib import Path
from shikomi.model.gguf import convert
from shikomi.progress import Silent

def status(key):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))

class Peak(Silent):
    before = 0
    def tick(self, done, total, what):
        if done == 1:
            Peak.before = status("VmRSS")

convert(Path(sys.argv[1]), Path(sys.argv[2]), Peak())
print(status("VmHWM") - Peak.before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_stays_near_one_tensor(tmp_path):
    # 8 layers of 38 MB in fp32 each; the largest tensor has 9.4 MB
    write_tiny(tmp_path / "big.gguf", "llama", Kind.F16, hidden_size=768, intermediate_size=3072, num_hidden_layers=8)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "big.gguf"), str(tmp_path / "out")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert (tmp_path / "out" / "model.safetensors").stat().st_size > 140e6
    assert int(done.stdout) < 60e6
