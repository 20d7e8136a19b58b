"""What is wrong with a model folder is said before anything is loaded, without torch."""

import json
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from shikomi.errors import BadInput
from shikomi.model.check import check_adapter, check_folder, read_safetensors_header


@pytest.fixture
def folder(tiny_llama: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(tiny_llama, tmp_path / "model"))


@pytest.fixture
def sharded(folder: Path, tmp_path: Path) -> Path:
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.save_pretrained(tmp_path / "sharded", max_shard_size="40KB")
    return tmp_path / "sharded"


def problems(folder: Path) -> str:
    with pytest.raises(BadInput) as caught:
        check_folder(folder)
    return str(caught.value)


def test_good_folders_pass(folder, sharded):
    check_folder(folder)
    check_folder(sharded)
    assert len(list(sharded.glob("*.safetensors"))) > 2


def test_a_missing_folder_is_named_with_the_nearest(folder):
    message = problems(folder.parent / "modle")
    assert "no such model" in message and f"did you mean {folder}?" in message


def test_everything_wrong_is_said_at_once(folder):
    (folder / "config.json").write_text('{"hidden_size": 32,\n "oops"}')
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    message = problems(folder)
    assert "config.json:2" in message and "not valid JSON" in message
    assert "model.safetensors" in message and "truncated" in message


@pytest.mark.parametrize(("text", "said"), [("[]", "not a JSON object"), ("{}", "no weight_map")])
def test_index_that_is_none(folder, text, said):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(text if text == "[]" else '{"metadata": {}}')
    assert said in problems(folder)


def test_config_is_needed(folder):
    (folder / "config.json").write_text('{"hidden_size": 32}')
    assert "names no architecture" in problems(folder)
    (folder / "config.json").unlink()
    assert "config.json is missing" in problems(folder) and "model.safetensors" in problems(folder)


def test_a_folder_without_weights_says_what_it_holds(folder):
    (folder / "model.safetensors").unlink()
    message = problems(folder)
    assert "no weights in the folder" in message and "tokenizer.json" in message
    (folder / "other.gguf").write_bytes(b"GGUF")
    assert f"give the file itself: {folder / 'other.gguf'}" in problems(folder)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickles_are_refused_with_the_way_out(folder, name):
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(b"\x80\x02")
    message = problems(folder)
    assert "pickle checkpoint is refused" in message and name in message
    assert "save_pretrained" in message and "allowed: safetensors" in message


def test_the_hint_for_pickles_works(folder, tiny_llama):
    (folder / "model.safetensors").unlink()
    torch.save(AutoModelForCausalLM.from_pretrained(tiny_llama).state_dict(), folder / "pytorch_model.bin")
    code = problems(folder).split('python -c "')[1].split('"')[0]
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    check_folder(Path(f"{folder}-safetensors"))


def test_a_missing_shard_is_named(sharded):
    shard = sorted(sharded.glob("*.safetensors"))[1]
    shard.unlink()
    assert f"{shard}: a shard is missing" in problems(sharded)


def test_a_shard_that_lacks_its_tensors_is_named(sharded):
    shard = sorted(sharded.glob("*.safetensors"))[1]
    save_file({"other": torch.zeros(3)}, shard)
    message = problems(sharded)
    assert "a shard of another model" in message and shard.name in message


@pytest.mark.parametrize(
    "name", ["../secret.safetensors", "/etc/x.safetensors", "a\\b.safetensors", "..", "weights.bin"]
)
def test_shard_names_that_leave_the_folder_are_refused(sharded, name):
    index = sharded / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"][next(iter(content["weight_map"]))] = name
    index.write_text(json.dumps(content))
    (sharded.parent / "secret.safetensors").write_bytes(b"x")
    assert "refused shard name" in problems(sharded)


def test_header_of_a_good_file(tmp_path):
    save_file({"a": torch.zeros(3, 4, dtype=torch.bfloat16), "b": torch.zeros(())}, tmp_path / "x", metadata={"k": "v"})
    header = read_safetensors_header(tmp_path / "x")
    assert {name: (entry["dtype"], entry["shape"]) for name, entry in header.items()} == {
        "a": ("BF16", [3, 4]),
        "b": ("F32", []),
    }


@given(st.data())
def test_a_file_cut_or_grown_anywhere_is_refused(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("cut") / "x"
    save_file({"a": torch.zeros(30), "b": torch.ones(7, 3)}, path)
    content = path.read_bytes()
    length = data.draw(st.integers(0, len(content) + 50).filter(lambda value: value != len(content)))
    path.write_bytes((content + bytes(50))[:length])
    with pytest.raises(ValueError, match="truncated|too few|longer|not a safetensors|header|Expecting|Unterminated"):
        read_safetensors_header(path)


def test_damaged_headers_are_refused(tmp_path):
    def written(header: object, data: int = 12) -> Path:
        text = json.dumps(header).encode()
        (tmp_path / "x").write_bytes(struct.pack("<Q", len(text)) + text + bytes(data))
        return tmp_path / "x"

    good = {"dtype": "F32", "shape": [3], "data_offsets": [0, 12]}
    assert read_safetensors_header(written({"a": good}))
    for changed in (
        {"dtype": "F99"},
        {"shape": [4]},
        {"data_offsets": [0]},
        {"data_offsets": [-12, 0]},
        {"shape": None},
    ):
        with pytest.raises(ValueError, match="damaged header"):
            read_safetensors_header(written({"a": good | changed}))
    with pytest.raises(ValueError, match="not a JSON object"):
        read_safetensors_header(written([1]))
    with pytest.raises(ValueError, match="truncated"):
        read_safetensors_header(written({"a": good}, data=11))


def adapter(base: Path, target: Path, **options: object) -> Path:
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=4, **options))
    model.save_pretrained(target)
    return target


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": "all-linear"},
        {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
        {"target_modules": ["v_proj"], "modules_to_save": ["lm_head"], "use_dora": True},
    ],
)
@pytest.mark.parametrize("tied", [False, True])
def test_adapters_of_this_base_pass(tiny_folder, tmp_path, options, tied):
    base = tiny_folder("llama", tie_word_embeddings=tied)
    check_adapter(adapter(base, tmp_path / "adapter", **options), base)


def test_adapter_of_a_conv1d_base_passes(tiny_folder, tmp_path):
    base = tiny_folder("gpt2")
    check_adapter(adapter(base, tmp_path / "adapter", target_modules=["c_attn"], fan_in_fan_out=True), base)


@pytest.mark.parametrize(
    ("other", "overrides", "said"),
    [
        ("llama", {"hidden_size": 64}, "q_proj is (64, 64) in the base, and the adapter's sides are A 32, B 32"),
        ("llama", {"num_hidden_layers": 1}, "the base has no model.layers.1.self_attn.q_proj"),
        ("gpt2", {}, "the base has no model.layers.0.self_attn.q_proj"),
    ],
)
def test_adapters_of_another_base_are_refused(tiny_folder, tiny_llama, tmp_path, other, overrides, said):
    made = adapter(tiny_llama, tmp_path / "adapter", target_modules=["q_proj", "v_proj"])
    with pytest.raises(BadInput) as caught:
        check_adapter(made, tiny_folder(other, **overrides))
    assert said in str(caught.value)
    assert f"the base it was trained on: {tiny_llama}" in str(caught.value)


def test_adapters_that_are_not_whole(tiny_llama, tmp_path):
    made = adapter(tiny_llama, tmp_path / "adapter", target_modules=["q_proj"])
    weights = made / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-5])
    with pytest.raises(BadInput, match="damaged adapter.*truncated"):
        check_adapter(made, tiny_llama)
    weights.unlink()
    with pytest.raises(BadInput, match="adapter_model.safetensors is missing"):
        check_adapter(made, tiny_llama)
    (made / "adapter_model.bin").write_bytes(b"\x80\x02")
    with pytest.raises(BadInput, match="a pickle adapter is refused"):
        check_adapter(made, tiny_llama)


def test_checking_needs_no_torch(tiny_llama):
    code = "import sys; from pathlib import Path; from shikomi.model.check import check_folder\n"
    code += f"check_folder(Path({str(tiny_llama)!r})); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
