"""Adapters on disk, against PEFT itself: what it writes is read alike, and it reads alike what is written here."""

import json
import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from shikomi.checkpoint import peft_config
from shikomi.checkpoint.peft_format import load_adapter, lora_modules, model_card, save_adapter
from shikomi.errors import BadInput, TryAgain

P = "base_model.model."
Q = P + "model.layers.0.self_attn.q_proj"

CASES = {
    "q and v": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
    "all linear": {"r": 2, "lora_alpha": 16, "target_modules": "all-linear", "lora_dropout": 0.1},
    "regex": {"r": 2, "target_modules": r".*\.layers\.1\..*_proj"},
    "some layers": {"r": 2, "target_modules": ["down_proj"], "layers_to_transform": [1]},
    "excluded": {"r": 2, "target_modules": "all-linear", "exclude_modules": ["down_proj"]},
    "patterns": {
        "r": 2,
        "target_modules": ["q_proj", "v_proj", "up_proj"],
        "rank_pattern": {"q_proj": 4, r"^model\.layers\.1\.mlp\.up_proj": 3},
        "alpha_pattern": {"v_proj": 32},
        "use_rslora": True,
    },
    "whole modules": {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm"]},
    "embeddings": {"r": 2, "target_modules": ["embed_tokens", "k_proj"]},
    "all biases": {"r": 2, "target_modules": ["q_proj"], "bias": "all"},
    "lora biases": {"r": 2, "target_modules": ["q_proj", "o_proj"], "bias": "lora_only"},
    "gaussian": {"r": 2, "target_modules": ["q_proj"], "init_lora_weights": "gaussian"},
}


def base() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=False, attention_bias=True,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def peft_model(options) -> PeftModel:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(base(), LoraConfig(task_type="CAUSAL_LM", **options))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    return model.eval()


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(12).reshape(2, 6)).logits


def shapes(model) -> dict[str, torch.Size]:
    return {name: parameter.shape for name, parameter in model.named_parameters()}


def test_the_fields_and_defaults_are_those_of_peft():
    theirs = LoraConfig(task_type="CAUSAL_LM").to_dict()
    theirs = {key: getattr(value, "value", value) for key, value in theirs.items()}
    version = theirs.pop("peft_version")
    ours = dict(peft_config.DEFAULTS)
    assert ours.pop("peft_version").split(".")[:2] == version.split(".")[:2] == ["0", "21"]
    assert ours == theirs


@pytest.mark.parametrize("options", CASES.values(), ids=CASES.keys())
def test_what_peft_saves_is_read_with_its_names_tensors_and_config(options, tmp_path):
    model = peft_model(options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(tmp_path)
        expected = get_peft_model_state_dict(model)
    adapter = load_adapter(tmp_path)
    assert adapter.notes == []
    assert adapter.tensors.keys() == expected.keys()
    assert all(torch.equal(adapter.tensors[name], expected[name]) for name in expected)
    config = {key: list(v) if isinstance(v, set) else v for key, v in model.peft_config["default"].to_dict().items()}
    assert adapter.config == {**config, "inference_mode": True}


@pytest.mark.parametrize("options", CASES.values(), ids=CASES.keys())
def test_what_is_saved_here_loads_in_peft_with_equal_tensors_and_logits(options, tmp_path):
    model = peft_model(options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trained = get_peft_model_state_dict(model)
        save_adapter(tmp_path, options, trained, "some/base", dtype="fp32", revision="main")
        loaded = PeftModel.from_pretrained(base(), tmp_path)
        back = get_peft_model_state_dict(loaded)
        model.save_pretrained(tmp_path / "theirs")
    assert back.keys() == trained.keys()
    assert all(torch.equal(back[name], trained[name]) for name in trained)
    assert torch.equal(logits(loaded), logits(model))
    # The file itself: the same fields and values, but for the order of PEFT's sets and the names of the base.
    ours = json.loads((tmp_path / "adapter_config.json").read_text())
    theirs = json.loads((tmp_path / "theirs" / "adapter_config.json").read_text())
    for config in (ours, theirs):
        for key in ("target_modules", "exclude_modules", "modules_to_save"):
            config[key] = sorted(config[key]) if isinstance(config[key], list) else config[key]
    if options["target_modules"] == "all-linear":  # PEFT has whole paths where they are few, and what it then excludes
        last_parts = {name.rpartition(".")[2] for name in theirs["target_modules"]}
        theirs["target_modules"] = sorted(last_parts - set(options.get("exclude_modules", [])))
    theirs.update(base_model_name_or_path="some/base", revision="main", peft_version=ours["peft_version"])
    assert ours == theirs


def test_saved_bytes_and_layout_are_those_of_peft(tmp_path):
    model = peft_model(CASES["q and v"])
    model.save_pretrained(tmp_path / "theirs")
    save_adapter(tmp_path / "ours", CASES["q and v"], get_peft_model_state_dict(model), "b", dtype="fp32")
    weights = [tmp_path / folder / "adapter_model.safetensors" for folder in ("ours", "theirs")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    text = (tmp_path / "ours" / "adapter_config.json").read_text()
    assert text == json.dumps(json.loads(text), indent=2, sort_keys=True)


def test_bf16_is_the_default_and_rounds_to_nearest(tmp_path):
    tensors = {Q + ".lora_A.weight": torch.tensor([[1 + 2**-9, 1 + 3 * 2**-9]]), Q + ".lora_B.weight": torch.ones(2, 1)}
    save_adapter(tmp_path, {"r": 1, "target_modules": ["q_proj"]}, tensors, "b")
    found = load_file(tmp_path / "adapter_model.safetensors")
    assert {t.dtype for t in found.values()} == {torch.bfloat16}
    assert found[Q + ".lora_A.weight"].float().tolist() == [[1.0, 1 + 2**-7]]


def test_conv1d_adapters_fit_gpt2(tmp_path):
    def gpt2() -> GPT2LMHeadModel:
        return GPT2LMHeadModel(GPT2Config(vocab_size=32, n_positions=8, n_embd=8, n_layer=1, n_head=2))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(gpt2(), LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["c_attn"]))
    model.save_pretrained(tmp_path)
    adapter = load_adapter(tmp_path)
    assert adapter.config["fan_in_fan_out"] is True


def test_all_linear_is_saved_as_the_modules_it_came_to(tmp_path):
    trained = get_peft_model_state_dict(peft_model(CASES["all linear"]))
    save_adapter(tmp_path, CASES["all linear"], trained, "b")
    assert load_adapter(tmp_path).config["target_modules"] == [
        "down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj",
    ]  # fmt: skip
    assert len(lora_modules(trained)) == 14 and lora_modules(trained)[0] == "model.layers.0.mlp.down_proj"


def test_numbers_keep_pefts_types(tmp_path):
    config = {"r": 2, "lora_alpha": 32.0, "alpha_pattern": {"v": 8.0, "q": 2.5}, "rank_pattern": None}
    full = peft_config.adapter_config({**config, "target_modules": {"v", "q"}}, [], "b")
    assert repr((full["lora_alpha"], full["alpha_pattern"], full["rank_pattern"])) == "(32, {'v': 8, 'q': 2.5}, {})"
    assert full["target_modules"] == ["q", "v"]
    with pytest.raises(ValueError, match="not fields of peft.LoraConfig: loraplus_lr_ratio"):
        peft_config.adapter_config({"loraplus_lr_ratio": 16}, [], "b")


@pytest.mark.parametrize("name", ["model.q.lora_A.weight", Q + ".lora_A.default.weight"])
def test_names_that_are_not_pefts_are_not_saved(tmp_path, name):
    with pytest.raises(ValueError, match="not a name in PEFT's format"):
        save_adapter(tmp_path / "x", {}, {name: torch.ones(1, 1)}, "b")
    assert not (tmp_path / "x").exists()


def test_the_model_card_says_what_it_is(tmp_path):
    save_adapter(tmp_path, {}, {}, 'a "quoted" base', data="900 rows of train.jsonl", method="LoRA r=8, 2 epochs")
    card = (tmp_path / "README.md").read_text()
    assert 'base_model: "a \\"quoted\\" base"' in card and "library_name: peft" in card
    assert "- Data: 900 rows of train.jsonl\n- Method: LoRA r=8, 2 epochs\n" in card
    assert "Data" not in model_card("b")


def test_a_full_disk_keeps_the_adapter_that_was_there(tmp_path, monkeypatch):
    tensors = {Q + ".lora_A.weight": torch.ones(1, 2), Q + ".lora_B.weight": torch.ones(2, 1)}
    save_adapter(tmp_path, {"r": 1}, tensors, "b")
    before = (tmp_path / "adapter_model.safetensors").read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(TryAgain, match="the adapter in .*: the disk is full"):
        save_adapter(tmp_path, {"r": 1}, {name: t * 2 for name, t in tensors.items()}, "b")
    assert (tmp_path / "adapter_model.safetensors").read_bytes() == before


# Adapters from elsewhere


def folder_with(tmp_path, config, tensors=None):
    (tmp_path / "adapter_config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    if tensors is not None:
        save_file(tensors, tmp_path / "adapter_model.safetensors")
    return tmp_path


PAIR = {Q + ".lora_A.weight": torch.ones(2, 16), Q + ".lora_B.weight": torch.ones(16, 2)}


def test_an_old_config_gets_todays_defaults_and_unknown_settings_are_noted(tmp_path):
    old = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "enable_lora": None, "future": 3}
    adapter = load_adapter(folder_with(tmp_path, {**old, "rank_pattern": None}, PAIR))
    assert adapter.config["r"] == 2 and adapter.config["bias"] == "none" and adapter.config["rank_pattern"] == {}
    assert adapter.config.keys() == peft_config.DEFAULTS.keys()
    assert len(adapter.notes) == 1 and "passed over: enable_lora=None, future=3" in adapter.notes[0]


def test_an_adapter_name_inside_the_names_is_taken_out(tmp_path):
    named = {name.replace(".weight", ".default.weight"): tensor for name, tensor in PAIR.items()}
    assert load_adapter(folder_with(tmp_path, {"peft_type": "LORA"}, named)).tensors.keys() == PAIR.keys()


@pytest.mark.parametrize(
    "config, message",
    [
        ({"peft_type": "IA3"}, "another method: found peft_type 'IA3'; allowed: LORA"),
        ({"r": 8}, "found peft_type None; allowed: LORA"),
        ({"peft_type": "LORA", "task_type": "TOKEN_CLS"}, "found task_type 'TOKEN_CLS'; allowed: CAUSAL_LM, SEQ_CLS"),
        ({"peft_type": "LORA", "use_qalora": True}, "not supported: found use_qalora=True"),
        ({"peft_type": "LORA", "target_parameters": ["experts.w"]}, "found target_parameters="),
        ({"peft_type": "LORA", "init_lora_weights": "pissa_niter_4"}, "initialisation changed: .*pissa_niter_4"),
        ({"peft_type": "LORA", "r": "8"}, "wrong value for r: found '8'; allowed: a whole number above 0"),
        ({"peft_type": "LORA", "rank_pattern": {"q": 0}}, "wrong value for rank_pattern"),
        ("[1]", "not a JSON object: found list"),
        ('{\n"r": ,}', "adapter_config.json:2: is not JSON"),
        ("\udcff", "cannot be read"),
    ],
)
def test_what_cannot_be_understood_is_refused(tmp_path, config, message):
    if config == "\udcff":
        save_file(PAIR, tmp_path / "adapter_model.safetensors")
        (tmp_path / "adapter_config.json").write_bytes(b"\xff{}")
    else:
        folder_with(tmp_path, config, PAIR)
    with pytest.raises(BadInput, match=message):
        load_adapter(tmp_path)


def test_all_problems_of_a_config_come_at_once(tmp_path):
    config = {"peft_type": "LORA", "use_qalora": True, "lora_bias": True, "r": -1, "lora_dropout": 1.5, "bias": "some"}
    with pytest.raises(BadInput) as caught:
        load_adapter(folder_with(tmp_path, config, PAIR))
    assert len(caught.value.problems) == 5


def test_pickles_and_broken_files_are_refused(tmp_path):
    with pytest.raises(BadInput, match="adapter_config.json is missing"):
        load_adapter(tmp_path)
    folder_with(tmp_path, {"peft_type": "LORA"})
    with pytest.raises(BadInput, match="without adapter_model.safetensors"):
        load_adapter(tmp_path)
    torch.save(PAIR, tmp_path / "adapter_model.bin")
    with pytest.raises(BadInput, match="adapter_model.bin: the weights are a pickle"):
        load_adapter(tmp_path)
    save_file(PAIR, tmp_path / "adapter_model.safetensors")
    data = (tmp_path / "adapter_model.safetensors").read_bytes()
    (tmp_path / "adapter_model.safetensors").write_bytes(data[:-8])
    with pytest.raises(BadInput, match="cannot be read as safetensors"):
        load_adapter(tmp_path)


@pytest.mark.parametrize(
    "tensors, message",
    [
        ({"layers.0.lora_A.weight": torch.ones(1)}, "not a tensor of a LoRA adapter: found layers.0"),
        ({Q + ".lora_E": torch.ones(1)}, "not a tensor of a LoRA adapter"),
        ({Q + ".lora_A.weight": torch.ones(2, 16)}, "A and B without the other: model.layers.0.self_attn.q_proj"),
    ],
)
def test_tensors_that_are_no_adapter_are_refused(tmp_path, tensors, message):
    with pytest.raises(BadInput, match=message):
        load_adapter(folder_with(tmp_path, {"peft_type": "LORA"}, tensors))
