"""Architectures by arithmetic against models on the meta device, and adapters against what they attach."""

import json
import subprocess
import sys

import pytest
import torch
from architectures import SPECS
from tiny_models import ARCHITECTURES, tiny_config
from transformers import AutoConfig, AutoModelForCausalLM

from shikomi.adapters.bottleneck import Bottleneck
from shikomi.adapters.dora import Dora
from shikomi.adapters.full import Full
from shikomi.adapters.lora import Lora
from shikomi.adapters.prefix import Prefix
from shikomi.adapters.prompt import Prompt
from shikomi.errors import BadInput
from shikomi.model.device import Dtypes
from shikomi.model.load import wrap
from shikomi.plan.architecture import architecture, known, known_names, of_folder

META = torch.device("meta")
SMALL = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, vocab_size=97, pad_token_id=0)
OTHERS = {
    "olmo2": SMALL | {"intermediate_size": 48, "num_key_value_heads": 2},
    "opt": SMALL | {"ffn_dim": 48, "word_embed_proj_dim": 16, "max_position_embeddings": 40},
    "falcon": SMALL | {"new_decoder_architecture": True, "num_kv_heads": 2},
}


def on_meta(config):
    with META:
        return AutoModelForCausalLM.from_config(config)


def own_config(name: str):
    if name in ARCHITECTURES:
        return tiny_config(name)
    return AutoConfig.for_model(name.removesuffix("-tied"), **(SPECS.get(name) or OTHERS[name]))


def plain(config) -> dict:
    return json.loads(config.to_json_string())


@pytest.mark.parametrize("name", known_names())
def test_a_shipped_architecture_has_as_many_parameters_as_the_model(name):
    found = known(name)
    model = on_meta(AutoConfig.for_model(**dict(found.config)))
    assert found.parameters == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", [*dict.fromkeys([*ARCHITECTURES, *SPECS]), *OTHERS])
def test_names_shapes_and_linear_layers_are_the_model_s(name):
    config = own_config(name)
    model, found = on_meta(config), architecture(plain(config))
    named = {n: tuple(p.shape) for n, p in model.named_parameters()}
    assert dict(found.tensors) == named and list(found.tensors)[-1] == list(named)[-1]
    linears = {n for n, m in model.named_modules() if type(m).__name__ in ("Linear", "Conv1D", "FalconLinear")}
    assert set(found.linears) == linears
    assert found.tied == (model.get_input_embeddings().weight is model.get_output_embeddings().weight)


ADAPTERS = {
    "lora": Lora(r=4),
    "patterns": Lora(r=4, target_modules=r".*\.(0|1)\..*", rank_pattern={"1": 2}, bias="all", layers_to_transform=[1]),
    "saved": Lora(r=4, modules_to_save=["norm", "lm_head"], bias="lora_only"),
    "dora": Dora(r=4),
    "full": Full(),
    "last": Full(last_layers=1, freeze=r".*norm.*"),
    "pfeiffer": Bottleneck(placement="pfeiffer", reduction_factor=4, layers_to_transform=[1]),
    "prefix": Prefix(num_virtual_tokens=5),
    "projected": Prefix(num_virtual_tokens=5, prefix_projection=True, encoder_hidden_size=7),
    "prompt": Prompt(num_virtual_tokens=5),
}


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2", "gemma2", "mixtral", "phi3", "jamba"])
def test_what_an_adapter_declares_is_what_it_attaches(kind):
    config = own_config(kind)
    found = architecture(plain(config))
    for name, adapter in ADAPTERS.items():
        if (kind, name) == ("gpt2", "saved"):
            adapter = Lora(r=4, modules_to_save=["ln_f", "lm_head"], bias="lora_only")
        lm = wrap(on_meta(config), None, adapter, Dtypes(torch.float32, torch.float32), META)
        attached = {n: tuple(p.shape) for n, p in lm.trainable().items()}
        assert adapter.trained_shapes(found) == attached, name
        assert lm.total_parameters == found.parameters


def test_llama_2_7b_with_r_8_on_q_and_v():
    model = known("llama-2-7b")
    trained = Lora(r=8, target_modules=["q_proj", "v_proj"]).trained_shapes(model)
    assert sum(torch.Size(shape).numel() for shape in trained.values()) == 4_194_304
    assert model.parameters == 6_738_415_616


def test_adapters_refuse_the_same():
    model = known("gpt2")
    with pytest.raises(BadInput, match="no linear or embedding module is named 'q_proj'"):
        Lora(target_modules=["q_proj"]).trained_shapes(model)
    with pytest.raises(BadInput, match="no module is named 'score'"):
        Lora(modules_to_save=["score"]).trained_shapes(model)
    with pytest.raises(BadInput, match="cannot tell the feed-forward part"):
        Bottleneck().trained_shapes(known("opt-1.3b"))
    with pytest.raises(BadInput, match="nothing left to train"):
        Full(freeze=".*").trained_shapes(model)
    with pytest.raises(BadInput, match="no such layer"):
        Bottleneck(layers_to_transform=[12]).trained_shapes(model)


def test_a_config_with_missing_fields_names_them_all():
    with pytest.raises(BadInput) as error:
        architecture({"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2}, "here")
    assert "lacks num_attention_heads, intermediate_size, vocab_size" in error.value.message
    with pytest.raises(BadInput, match="hidden_size is '64': a whole number above zero is needed"):
        architecture(plain(tiny_config("llama")) | {"hidden_size": "64"})


def test_an_unknown_model_type_is_refused_with_the_nearest():
    with pytest.raises(BadInput, match="found model_type: 'lama'.*did you mean llama"):
        architecture({"model_type": "lama"})
    with pytest.raises(BadInput, match="found model_type: None"):
        architecture({})
    with pytest.raises(BadInput, match="did you mean qwen3-8b"):
        known("qwen3-8")


def test_a_folder_without_a_config_is_refused(tmp_path):
    with pytest.raises(BadInput, match=r"config\.json is missing"):
        of_folder(tmp_path)


def test_long_rotary_embeddings_leave_packing_beyond_what_they_were_trained_on():
    rope = {"rope_type": "longrope", "original_max_position_embeddings": 4096}
    model = architecture(plain(tiny_config("phi3")) | {"rope_parameters": rope})
    assert model.path_at(4096) == "packed" and model.path_at(4097) == "separate"


def test_no_torch_is_imported():
    program = (
        "import sys\nfrom shikomi.plan.architecture import known\nknown('llama-3.1-8b').parameters\n"
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0
