"""Several adapters on one base: each answers bit for bit as it does when opened alone, and the base is itself again."""

import copy
import json

import numpy as np
import pytest
import torch
from running import tiny_recipe
from tiny_models import save_tiny, tiny_tokenizer

from shikomi import registry
from shikomi.adapters.bottleneck import Bottleneck
from shikomi.checkpoint.bottleneck_format import save_bottleneck
from shikomi.checkpoint.peft_format import save_adapter
from shikomi.data.packing import Example, pack
from shikomi.errors import BadInput
from shikomi.inference import open_model
from shikomi.model.load import load_model
from shikomi.run import train

KINDS = {
    "few": ("lora", {"r": 4, "target_modules": ["q_proj", "v_proj"]}),
    "all": ("lora", {"r": 2, "lora_alpha": 5, "use_rslora": True, "target_modules": "all-linear"}),
    "whole": ("lora", {"r": 3, "target_modules": ["down_proj"], "modules_to_save": ["norm", "lm_head", "k_proj"]}),
    "embedding": ("lora", {"r": 2, "target_modules": ["embed_tokens", "lm_head"]}),
    "biases": ("lora", {"r": 2, "target_modules": ["q_proj"], "bias": "all"}),
    "dora": ("dora", {"r": 3, "target_modules": ["q_proj", "up_proj"]}),
    "bottleneck": ("bottleneck", {"reduction_factor": 4}),
    "prefix": ("prefix", {"num_virtual_tokens": 3}),
    "prompt": ("prompt", {"num_virtual_tokens": 4}),
}


def save_one(base, folder, kind, options, seed=0):
    """A random adapter on the model in `base`, saved as a run saves it."""
    lm = load_model(str(base), registry.find("adapters", kind)(**options), "fp32", seed=seed)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in lm.trainable().values():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    config, tensors = lm.attached.export()
    save = save_bottleneck if kind == Bottleneck.name else save_adapter
    save(folder, config, tensors, str(base), dtype="fp32")
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("base"), "llama", attention_bias=True)


@pytest.fixture(scope="module")
def folders(base, tmp_path_factory):
    place = tmp_path_factory.mktemp("adapters")
    return {name: save_one(base, place / name, *KINDS[name], seed=i) for i, name in enumerate(KINDS)}


def answers(ready):
    """Log-probabilities by the packed path, logits by transformers' own, and an answer."""
    ids = np.random.default_rng(0).integers(3, 300, 24).astype(np.int32)
    with torch.no_grad():
        logp = ready.lm.score(pack([Example(ids[:15], np.arange(15) > 3, 0), Example(ids, np.arange(24) > 8, 1)])).logp
        with ready.lm.generating():
            logits = ready.lm.model(input_ids=torch.from_numpy(ids.astype("int64"))[None], use_cache=False).logits
    return logp, logits, ready.generate("What is a font?", max_new_tokens=8)


def equal(a, b):
    return torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) and a[2] == b[2]


def state(model):
    """Every module and tensor of a model, by identity and value."""
    modules = {name: module for name, module in model.named_modules(remove_duplicate=False)}
    tensors = {name: (p, p.dtype, p.detach().clone()) for name, p in model.named_parameters(remove_duplicate=False)}
    return modules, tensors


def same_state(a, b):
    modules = a[0].keys() == b[0].keys() and all(a[0][name] is b[0][name] for name in a[0])
    return modules and all(
        p is b[1][name][0] and dtype == b[1][name][1] and torch.equal(value, b[1][name][2])
        for name, (p, dtype, value) in a[1].items()
    )


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_switching_gives_the_bits_of_each_adapter_alone(dtype, base, folders):
    alone = {name: answers(open_model(folder, dtype=dtype)) for name, folder in folders.items()}
    alone[None] = answers(open_model(base, dtype=dtype))
    ready = open_model(base, dtype=dtype)
    loaded = state(ready.lm.model)
    for name, folder in folders.items():
        ready.add_adapter(name, folder)
        assert ready.active is None and same_state(loaded, state(ready.lm.model)), name
    assert ready.adapters == tuple(folders)
    order = [*folders, None, *reversed(folders), None]
    np.random.default_rng(1).shuffle(order)
    for name in order:
        ready.use(name)
        assert ready.active == name and equal(answers(ready), alone[name]), name
    ready.use(None)
    assert same_state(loaded, state(ready.lm.model))
    assert not any(equal(alone[a], alone[b]) for a in alone for b in alone if a != b)


def test_a_model_opened_with_an_adapter_holds_others_and_its_base(base, folders):
    first = open_model(folders["biases"], dtype="fp32")
    assert first.adapters == ("default",) and first.active == "default"
    before = answers(first)
    first.add_adapter("other", folders["whole"])
    assert first.active == "default" and equal(answers(first), before)
    first.use("other")
    assert equal(answers(first), answers(open_model(folders["whole"], dtype="fp32")))
    with first.base():
        off = answers(first)
    first.use(None)
    plain = open_model(base, dtype="fp32")
    assert equal(answers(first), answers(plain)) and torch.allclose(off[1], answers(plain)[1], atol=1e-5)
    assert first.lm.path == plain.lm.path == "fused" and first.lm.attached is None
    first.remove("other")
    first.use("default")
    assert equal(answers(first), before) and first.adapters == ("default",)
    first.remove("default")
    assert first.active is None and first.adapters == () and equal(answers(first), answers(plain))
    assert [name for name, _ in first.lm.model.named_modules()] == [n for n, _ in plain.lm.model.named_modules()]


def test_only_the_tensors_of_the_adapters_are_added(base, folders):
    ready = open_model(base, dtype="fp32")
    weights = {p.data_ptr() for p in ready.lm.model.parameters()}
    for name in ("few", "dora", "bottleneck"):
        ready.add_adapter(name, folders[name])
    for name in ("few", "dora", "bottleneck"):
        ready.use(name)
        own = {id(p) for p in ready.lm.attached.parameters().values()}
        inside = [p for p in ready.lm.model.parameters() if id(p) not in own]
        assert len(inside) == len(weights) and len(own) > 0
    ready.use(None)
    assert sum(p.numel() for p in inside) == ready.lm.total_parameters


@pytest.mark.parametrize("architecture", ["gpt2", "bloom"])
def test_switching_works_where_layers_are_not_fused(architecture, tmp_path):
    base = save_tiny(tmp_path / "base", architecture)
    one = save_one(base, tmp_path / "one", "lora", {"r": 2}, seed=1)
    two = save_one(base, tmp_path / "two", "dora", {"r": 3}, seed=2)
    alone = {path: answers(open_model(path, dtype="fp32")) for path in (base, one, two)}
    ready = open_model(one, dtype="fp32")
    ready.add_adapter("two", two)
    for name, path in (("two", two), (None, base), ("default", one)):
        ready.use(name)
        assert equal(answers(ready), alone[path]) and ready.lm.path != "fused"


def test_a_base_weight_that_came_with_an_adapter_stays_with_it(base, folders, tmp_path):
    """PEFT saves the base's embedding beside an adapter on it; here one that was changed."""
    from safetensors.torch import load_file, save_file

    folder = copied(folders["embedding"], tmp_path / "changed")
    tensors = load_file(folder / "adapter_model.safetensors")
    changed = load_file(base / "model.safetensors")["model.embed_tokens.weight"] * 1.5
    save_file({**tensors, "base_model.model.model.embed_tokens.base_layer.weight": changed},
              folder / "adapter_model.safetensors")  # fmt: skip
    plain, alone = answers(open_model(base, dtype="fp32")), answers(open_model(folder, dtype="fp32"))
    ready = open_model(base, dtype="fp32")
    ready.add_adapter("changed", folder)
    assert equal(answers(ready), plain)
    ready.use("changed")
    assert equal(answers(ready), alone)
    ready.use(None)
    assert equal(answers(ready), plain) and not equal(alone, plain)


def test_runs_bring_their_own_prompts_and_labels(base, folders, tmp_path):
    rows = tmp_path / "rows.jsonl"
    lines = [{"text": f"{word} {i}", "kind": word} for i in range(8) for word in ("tool", "game")]
    rows.write_text("\n".join(json.dumps(line) for line in lines))
    data = {"train": str(rows), "prompt": "Kind of {text}?", "completion": "{kind}", "labels": ["tool", "game"]}
    train(tiny_recipe(base, rows, tmp_path / "run", data=data, max_steps=2, adapter={"name": "lora", "r": 2}))
    alone = open_model(tmp_path / "run", dtype="fp32")
    ready = open_model(base, dtype="fp32")
    free = ready.generate("tool 3", max_new_tokens=8)
    ready.add_adapter("kinds", tmp_path / "run")
    assert ready.labels is None and ready.recipe is None
    ready.use("kinds")
    assert ready.labels == alone.labels and ready.generate("tool 3") == alone.generate("tool 3") in ("tool", "game")
    assert ready.encoder.encode_prompt(ready._asked("x")) == alone.encoder.encode_prompt(alone._asked("x"))
    ready.use(None)
    assert ready.generate("tool 3", max_new_tokens=8) == free


def copied(source, folder, **config):
    """A copy of an adapter's folder with other settings."""
    folder.mkdir()
    for path in source.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    return folder


def test_an_adapter_brings_its_own_tokenizer_and_ends_of_answers(base, folders, tmp_path):
    own = copied(folders["few"], tmp_path / "own")
    tokenizer = copy.deepcopy(tiny_tokenizer())
    tokenizer.eos_token = "<|endoftext|>"
    tokenizer.save_pretrained(own)
    ready, alone = open_model(base, dtype="fp32"), open_model(own, dtype="fp32")
    before = ready.lm.tokenizer, ready.lm.stop_ids
    ready.add_adapter("own", own)
    assert (ready.lm.tokenizer, ready.lm.stop_ids) == before
    ready.use("own")
    assert ready.lm.stop_ids == alone.lm.stop_ids != before[1]
    assert ready.lm.tokenizer.eos_token == "<|endoftext|>" and ready.encoder.tokenizer is ready.lm.tokenizer
    ready.use(None)
    assert (ready.lm.tokenizer, ready.lm.stop_ids) == before
    tokenizer.add_tokens(["<new>"])
    grown = copied(folders["few"], tmp_path / "grown")
    tokenizer.save_pretrained(grown)
    with pytest.raises(BadInput, match="another vocabulary"):
        ready.add_adapter("grown", grown)


def test_what_cannot_be_held_is_refused_and_changes_nothing(base, folders, tmp_path):
    ready = open_model(folders["few"], dtype="fp32")
    before, modules = answers(ready), state(ready.lm.model)
    other = save_tiny(tmp_path / "other", "llama", seed=3, attention_bias=True)
    stranger = save_one(other, tmp_path / "stranger", "lora", {"r": 2})
    broken = copied(folders["all"], tmp_path / "broken", target_modules=["q_proj"])
    absent = copied(folders["all"], tmp_path / "absent", modules_to_save=["scores"])
    refused = (
        ("default", folders["all"], "name of its own: found 'default'"),
        ("", folders["all"], "name of its own"),
        ("x", base, "a whole model, not an adapter"),
        ("x", stranger, "an adapter for another base"),
        ("x", tmp_path / "nothing", "no such model"),
        ("x", broken, "has no place for"),
        ("x", absent, "no module is named 'scores'"),
    )
    for name, folder, said in refused:
        with pytest.raises(BadInput, match=said):
            ready.add_adapter(name, folder)
        assert ready.adapters == ("default",) and ready.active == "default"
        assert same_state(modules, state(ready.lm.model)), said
    ready.add_adapter("all", folders["all"])
    with pytest.raises(BadInput, match="no adapter named 'al': allowed: default, all; fix: did you mean 'all'"):
        ready.use("al")
    with pytest.raises(BadInput, match="no adapter named 'x'"):
        ready.remove("x")
    assert equal(answers(ready), before)
