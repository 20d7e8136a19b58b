"""Bottleneck adapters against hooks on transformers' own layers, architecture by architecture; files, runs, errors."""

import copy
import itertools
import json
import os
import shutil
import signal

import numpy as np
import pytest
import torch
from architectures import EXPECTED, SPECS, VOCABULARY, build
from running import final_bytes, losses, tiny_recipe, write_rows
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM

from shikomi.adapters.bottleneck import Bottleneck, BottleneckLayer
from shikomi.adapters.lora import Lora
from shikomi.checkpoint.bottleneck_format import is_bottleneck, load_bottleneck, save_bottleneck
from shikomi.data.packing import Example, pack
from shikomi.errors import BadInput, Stopped
from shikomi.inference import merge, open_model
from shikomi.model.device import Dtypes
from shikomi.model.load import count_parameters, wrap
from shikomi.model.probe import choose_path
from shikomi.progress import Silent
from shikomi.recipe import load_recipe
from shikomi.run import resume, train
from shikomi.steps.prepare import prepare

CPU = torch.device("cpu")
FP32 = Dtypes(torch.float32, torch.float32)
HIDDEN, LAYERS = 32, 2
FUNCTIONS = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu, "tanh": torch.tanh}
MIXED = {"jamba": ((0, "mamba"), (1, "self_attn")), "lfm2": ((0, "conv"), (1, "self_attn"))}
# Where the sublayers are: (attention, feed-forward) of each layer.
PLACES = {name: [(f"model.layers.{i}.self_attn", f"model.layers.{i}.mlp") for i in range(LAYERS)] for name in SPECS} | {
    "gpt2": [(f"transformer.h.{i}.attn", f"transformer.h.{i}.mlp") for i in range(LAYERS)],
    "gpt_neox": [(f"gpt_neox.layers.{i}.attention", f"gpt_neox.layers.{i}.mlp") for i in range(LAYERS)],
    "jamba": [(f"model.layers.{i}.{m}", f"model.layers.{i}.feed_forward") for i, m in MIXED["jamba"]],
    "lfm2": [(f"model.layers.{i}.{m}", f"model.layers.{i}.feed_forward") for i, m in MIXED["lfm2"]],
}
SERVED = [name for name in SPECS if name != "bloom"]  # Bloom's sublayers add the residual themselves
OPTIONS = {name: Bottleneck(4, "houlsby", f) for name, f in zip(SERVED, itertools.cycle(FUNCTIONS), strict=False)}


def ours(name: str, options: Bottleneck | None, dtypes: Dtypes = FP32, moved: float = 0.3):
    """The architecture with the adapter, every parameter of it moved off its start."""
    lm = wrap(build(name), None, options, dtypes, CPU, seed=3)
    choose_path(lm, 64)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in lm.trainable().values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * moved)
    return lm


def hooked(name: str, options: Bottleneck, tensors: dict[str, torch.Tensor]):
    """transformers' model with hooks that add up(f(down(z))) to the outputs of its sublayers; and their parameters."""
    model, parameters = build(name).requires_grad_(False), {}
    places = [p[0] for p in PLACES[name]] * (options.placement == "houlsby") + [p[1] for p in PLACES[name]]
    for place in places:
        own = {key: nn.Parameter(tensors[f"{place}.bottleneck.{key}"].detach().clone()) for key in PARTS}
        parameters |= {f"{place}.bottleneck.{key}": p for key, p in own.items()}

        def hook(module, args, out, own=own):
            z = out[0] if isinstance(out, tuple) else out
            act = FUNCTIONS[options.non_linearity](F.linear(z, own["down.weight"], own["down.bias"]))
            z = z + F.linear(act, own["up.weight"], own["up.bias"])
            return (z, *out[1:]) if isinstance(out, tuple) else z

        model.get_submodule(place).register_forward_hook(hook)
    assert set(parameters) == set(tensors)
    return model, parameters


PARTS = ("down.weight", "down.bias", "up.weight", "up.bias")


def rows() -> list[Example]:
    rng = np.random.default_rng(3)
    prefix, found = rng.integers(3, VOCABULARY, 16).astype(np.int32), []
    for row, length in enumerate((17, 9, 23, 5)):
        ids = rng.integers(3, VOCABULARY, length).astype(np.int32)
        ids[: 16 if length > 16 else 0] = prefix[: 16 if length > 16 else 0]
        found.append(Example(ids, np.arange(length) >= max(1, length - 6), row))
    return found


def padded_loss(model) -> torch.Tensor:
    """The mean negative log-likelihood of the trained tokens by transformers, right-padded."""
    longest = max(len(r) for r in rows())
    ids, attend, labels = (torch.full((len(rows()), longest), v) for v in (0, 0, -100))
    for i, row in enumerate(rows()):
        tokens = torch.from_numpy(row.ids.astype(np.int64))
        ids[i, : len(row)], attend[i, : len(row)] = tokens, 1
        labels[i, : len(row)] = torch.where(torch.from_numpy(row.mask), tokens, -100)
    logits = model(input_ids=ids, attention_mask=attend, use_cache=False).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def rounding_noise(name, options, tensors, exact: dict[str, torch.Tensor]) -> dict[str, float]:
    """How far the reference's own gradients move when every weight moves by its last bit."""
    found = dict.fromkeys(exact, 0.0)
    generator = torch.Generator().manual_seed(11)
    for _ in range(4):
        model, parameters = hooked(name, options, tensors)
        with torch.no_grad():
            for parameter in [*model.parameters(), *parameters.values()]:
                parameter.mul_(1 + (torch.randint(0, 2, parameter.shape, generator=generator) * 2 - 1) * 2.0**-23)
        padded_loss(model).backward()
        for key, parameter in parameters.items():
            found[key] = max(found[key], float((parameter.grad - exact[key]).abs().max()))
    return found


def check_gradients(lm, expected, exact, noise, share_prefix: bool) -> None:
    for parameter in lm.trainable().values():
        parameter.grad = None
    loss = -lm.score(pack(rows(), share_prefix)).logp.mean()
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=2e-5, atol=2e-6)
    for key, parameter in lm.trainable().items():
        worst = float((parameter.grad - exact[key]).abs().max())
        allowed = 4 * noise[key] + 1e-6 * float(exact[key].abs().max())
        assert worst <= allowed, f"{lm.path}, {key}: {worst:.3g}, noise {noise[key]:.3g}"


@pytest.mark.parametrize("name", SERVED)
@pytest.mark.parametrize("placement", ["houlsby", "pfeiffer"])
def test_loss_and_gradients_equal_hooks_on_the_padded_forward(name, placement):
    options = Bottleneck(4, placement, OPTIONS[name].non_linearity)
    lm = ours(name, options)
    assert lm.path == EXPECTED[name], lm.path_reason
    model, parameters = hooked(name, options, lm.trainable())
    expected = padded_loss(model)
    expected.backward()
    exact = {key: p.grad for key, p in parameters.items()}
    assert all(float(grad.abs().max()) > 0 for grad in exact.values())
    noise = rounding_noise(name, options, lm.trainable(), exact)
    check_gradients(lm, expected, exact, noise, share_prefix=False)
    check_gradients(lm, expected, exact, noise, share_prefix=True)
    if lm.path == "fused":
        for lm.recompute in (1, "full"):
            check_gradients(lm, expected, exact, noise, share_prefix=True)
        lm.path = "packed"
        check_gradients(lm, expected, exact, noise, share_prefix=True)
    if lm.path == "packed":
        how = {"use_reentrant": False, "context_fn": lm.recomputing}
        lm.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=how)
        lm.model.train()
        check_gradients(lm, expected, exact, noise, share_prefix=True)


@pytest.mark.parametrize("name", SERVED)
def test_it_starts_as_the_model_itself_and_off_is_the_model_as_loaded(name):
    fresh, trained, plain = ours(name, OPTIONS[name], moved=0), ours(name, OPTIONS[name]), ours(name, None)
    packed = pack(rows())
    for path in {plain.path, "packed"} if plain.path != "separate" else {"separate"}:
        fresh.path = trained.path = plain.path = path
        with torch.no_grad():
            expected = plain.score(packed).logp
            assert torch.equal(fresh.score(packed).logp, expected)
            before = trained.score(packed).logp
            with trained.adapter_off():
                assert torch.equal(trained.score(packed).logp, expected)
                with trained.adapter_off():
                    pass
                assert torch.equal(trained.score(packed).logp, expected)
            assert torch.equal(trained.score(packed).logp, before)
            assert (before - expected).abs().max() > 1e-2


@pytest.mark.parametrize("placement, sublayers", [("houlsby", 2), ("pfeiffer", 1)])
@pytest.mark.parametrize("factor, width", [(1, 32), (4, 8), (3, 10), (16, 2), (100, 1)])
def test_parameters_are_counted_by_the_formula(placement, sublayers, factor, width, tiny_folder):
    """Per bottleneck 2 H w + w + H, one or two per layer."""
    each = 2 * HIDDEN * width + width + HIDDEN
    lm = wrap(build("llama"), None, Bottleneck(factor, placement), FP32, CPU)
    assert lm.trainable_parameters == lm.attached.added() == LAYERS * sublayers * each
    assert lm.total_parameters == sum(p.numel() for p in build("llama").parameters())
    one = wrap(build("llama"), None, Bottleneck(factor, placement, layers_to_transform=[1]), FP32, CPU)
    assert one.trainable_parameters == sublayers * each and all(".layers.1." in n for n in one.trainable())
    assert count_parameters(str(tiny_folder()), Bottleneck(factor, placement))[0] == LAYERS * sublayers * each


def test_the_start_is_a_function_of_the_seed():
    a, b, c = (wrap(build("llama"), None, Bottleneck(), FP32, CPU, seed).trainable() for seed in (0, 0, 1))
    down = "model.layers.1.mlp.bottleneck.down.weight"
    assert torch.equal(a[down], b[down]) and not torch.equal(a[down], c[down])
    assert 0 < float(a[down].detach().abs().max()) <= HIDDEN**-0.5  # Kaiming-uniform with a = sqrt(5)
    assert all(not p.any() for n, p in a.items() if not n.endswith("down.weight"))


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("non_linearity", FUNCTIONS)
def test_the_function_keeps_only_z_in_the_storage_dtype(non_linearity, dropout):
    layer = BottleneckLayer(24, 5, non_linearity, dropout, torch.Generator().manual_seed(0))
    layer.key = 17 if dropout else None
    for parameter in layer.parameters():
        nn.init.normal_(parameter, generator=torch.Generator().manual_seed(1))
    h, z, weight = (torch.randn(3, 7, 24, generator=torch.Generator().manual_seed(i)) for i in (2, 3, 4))
    h, rounded = h.requires_grad_(), z.bfloat16().float().requires_grad_()
    z.requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append((t.dtype, tuple(t.shape))) or t, lambda t: t):
        out = layer.added(h, z, torch.bfloat16)
    assert sorted(map(str, kept)) == sorted(
        map(str, [(torch.bfloat16, (21, 24)), *((torch.float32, tuple(p.shape)) for p in layer.parameters())])
    )
    (out * weight).sum().backward()
    grads = [h.grad, z.grad, *(p.grad for p in layer.parameters())]

    mask = torch.ones(21, 24) if layer.mask(z.view(21, 24)) is None else layer.mask(z.view(21, 24))

    def plain(z):
        narrow = FUNCTIONS[non_linearity](F.linear(z, layer.down.weight, layer.down.bias))
        return h + z + F.linear(narrow, layer.up.weight, layer.up.bias) * mask.view(z.shape)

    torch.testing.assert_close(out, plain(z), rtol=1e-5, atol=1e-5)
    expected = torch.autograd.grad((plain(rounded) * weight).sum(), [h, rounded, *layer.parameters()])
    for got, want in zip(grads, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-4)


def test_dropout_is_a_function_of_its_key_and_keeps_the_mean():
    lm = ours("llama", Bottleneck(4, dropout=0.5))
    packed = pack(rows())
    found = {}
    with torch.no_grad():
        for name, key in (("none", None), ("a", 5), ("again", 5), ("b", 6)):
            lm.bind_dropout(key)
            found[name] = lm.score(packed).logp
        lm.bind_dropout(None)
        assert torch.equal(lm.score(packed).logp, found["none"])
    assert torch.equal(found["a"], found["again"])
    assert all((found[x] - found[y]).abs().max() > 1e-2 for x, y in (("a", "b"), ("a", "none")))
    keys = {block.bottleneck.key for block in lm.attached.blocks.values()}
    lm.bind_dropout(5)
    layers = [block.bottleneck for block in lm.attached.blocks.values()]
    assert keys == {None} and len({layer.key for layer in layers}) == len(layers)
    masks = torch.cat([layer.mask(torch.zeros(4000, HIDDEN)) for layer in layers])
    assert set(masks.unique().tolist()) == {0.0, 2.0} and abs(float(masks.mean()) - 1) < 0.01


def test_bf16_weights_train_fp32_masters():
    lm = ours("llama", Bottleneck(4), Dtypes(torch.bfloat16, torch.bfloat16), moved=0.1)
    exact = ours("llama", Bottleneck(4), moved=0.1)
    for model in (lm, exact):
        (-model.score(pack(rows())).logp.mean()).backward()
    for name, parameter in lm.trainable().items():
        assert parameter.dtype == parameter.grad.dtype == torch.float32
        want = exact.trainable()[name].grad
        assert float((parameter.grad - want).norm()) < 0.1 * float(want.norm()), name


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "gpt_neox", "jamba", "qwen3_moe"])
def test_generation_with_cache_equals_the_hooked_model_without(name):
    lm = ours(name, OPTIONS[name], moved=1.0)
    model, _ = hooked(name, OPTIONS[name], lm.trainable())
    ids = torch.from_numpy(rows()[1].ids.astype(np.int64))[None]
    with torch.no_grad():
        with lm.generating():
            got = lm.model.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)
        wanted, base = ids, build(name)
        for _ in range(8):
            wanted = torch.cat([wanted, model(input_ids=wanted, use_cache=False).logits[:, -1:].argmax(-1)], 1)
        plain = base.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert got.tolist() == wanted.tolist() and got.tolist() != plain.tolist()


def test_a_wrapped_sublayer_looks_like_itself_to_other_code():
    lm = wrap(build("qwen2"), None, Bottleneck(), FP32, CPU)
    attention = lm.model.model.layers[1].self_attn
    assert attention.layer_idx == 1 and attention.q_proj is attention.inner.q_proj
    assert lm.model.model.layers[0].mlp.act_fn is lm.model.model.layers[0].mlp.inner.act_fn
    with pytest.raises(AttributeError, match="nothing_here"):
        attention.nothing_here  # noqa: B018
    again = copy.deepcopy(attention)
    assert again.layer_idx == 1 and again.inner is not attention.inner


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_an_adapter_survives_its_folder(dtype, tmp_path):
    options = Bottleneck(4, "pfeiffer", "gelu", 0.25, [1])
    lm = ours("qwen3", options)
    save_bottleneck(tmp_path, *lm.attached.export(), "some/base", dtype=dtype, revision="abc", data="rows.jsonl")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config == {
        "shikomi_type": "bottleneck",
        "base_model_name_or_path": "some/base",
        "revision": "abc",
        "task_type": "CAUSAL_LM",
        "reduction_factor": 4,
        "placement": "pfeiffer",
        "non_linearity": "gelu",
        "dropout": 0.25,
        "layers_to_transform": [1],
    }
    assert "some/base" in (tmp_path / "README.md").read_text() and is_bottleneck(tmp_path)
    assert set(load_file(tmp_path / "adapter_model.safetensors")) == {
        f"model.layers.1.mlp.bottleneck.{part}" for part in PARTS
    }
    saved = load_bottleneck(tmp_path)
    assert saved.options == options and saved.notes == []
    other = ours("qwen3", saved.options, moved=1.0)
    other.attached.load(saved.tensors, "here")
    for name, parameter in lm.trainable().items():
        want = parameter if dtype == "fp32" else parameter.bfloat16().float()
        assert torch.equal(other.trainable()[name], want)


@pytest.fixture
def data(tmp_path, monkeypatch):
    monkeypatch.setenv("SHIKOMI_CACHE", str(tmp_path / "cache"))
    return write_rows(tmp_path / "rows.jsonl")


ADAPTER = {"name": "bottleneck", "reduction_factor": 4, "non_linearity": "tanh", "dropout": 0.1}


def test_a_stopped_run_resumes_bit_for_bit(tiny_llama, data, tmp_path):
    class Impatient:
        def __getattr__(self, name):
            def told(*args):
                if name == "advance" and args[0]["step"] == 3:
                    os.kill(os.getpid(), signal.SIGTERM)

            return told

    keys = {"adapter": ADAPTER, "max_steps": 6, "learning_rate": 2e-2}
    with pytest.raises(Stopped):
        train(tiny_recipe(tiny_llama, data, tmp_path / "run", **keys), Impatient())
    assert [step for step, *_ in losses(tmp_path / "run")] == [1, 2, 3]
    resume(tmp_path / "run")
    train(tiny_recipe(tiny_llama, data, tmp_path / "whole", **keys))
    assert final_bytes(tmp_path / "run") == final_bytes(tmp_path / "whole")
    curve = losses(tmp_path / "whole")
    assert losses(tmp_path / "run") == curve
    assert curve[-1][1] < 0.9 * curve[0][1] and all(norm > 0 for *_, norm in curve)


def test_a_run_is_continued_and_answers(tiny_llama, data, tmp_path):
    keys = {"adapter": ADAPTER, "max_steps": 8, "learning_rate": 5e-2, "save_dtype": "fp32"}
    train(tiny_recipe(tiny_llama, data, tmp_path / "run", **keys))
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["adapter"] == "bottleneck" and result["path"] == "fused"
    assert result["trainable_parameters"] == LAYERS * 2 * (2 * HIDDEN * 8 + 8 + HIDDEN)

    ready, base = open_model(tmp_path / "run", dtype="fp32"), open_model(tiny_llama, dtype="fp32")
    assert ready.lm.attached.options == Bottleneck(4, "houlsby", "tanh", 0.1)
    trained = load_file(tmp_path / "run" / "final" / "adapter_model.safetensors")
    assert all(torch.equal(p, trained[n]) for n, p in ready.lm.trainable().items()) and len(trained) == 16
    question = "What is it? server library"
    answer, untouched = ready.generate(question, 12), base.generate(question, 12)
    assert answer != untouched
    with ready.base():
        assert ready.generate(question, 12) == untouched
    assert [row["prediction"] for row in ready.predict(data, max_new_tokens=4, limit=3)]
    scores = [model.evaluate(data, ["loss"], limit=8)["metrics"]["loss"]["value"] for model in (ready, base)]
    assert scores[0] < scores[1] - 0.1

    # the adapter is not named again: its own options count, and steps of no length leave it as it was
    still = {"model": str(tmp_path / "run"), "max_steps": 2, "learning_rate": 1e-30, "save_dtype": "fp32"}
    recipe = load_recipe({**still, "data": {"train": str(data)}, "dtype": "fp32", "output_dir": str(tmp_path / "on")})
    train(recipe)
    assert final_bytes(tmp_path / "on") == final_bytes(tmp_path / "run")
    assert json.loads((tmp_path / "on" / "result.json").read_text())["adapter"] == "bottleneck"
    ready.add_adapter("again", tmp_path / "on")
    for name, expected in (("again", answer), (None, untouched), ("default", answer)):
        ready.use(name)
        assert ready.generate(question, 12) == expected
    with pytest.raises(BadInput, match="bottleneck cannot be merged"):
        merge(tmp_path / "run", tmp_path / "merged")
    with pytest.raises(BadInput, match="does not train embeddings"):
        prepare(tiny_recipe(tiny_llama, data, tmp_path / "new", adapter=ADAPTER, new_tokens=["<x>"]), Silent())


def saved_folder(folder, base="some/base"):
    lm = ours("llama", Bottleneck(4))
    save_bottleneck(folder, *lm.attached.export(), base, dtype="fp32")
    return folder


def test_bad_folders_are_refused_with_every_problem(tmp_path):
    folder = saved_folder(tmp_path / "adapter")
    weights, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    tensors, good = load_file(weights), json.loads(config.read_text())
    dropped = "model.layers.0.mlp.bottleneck.up.bias"
    save_file({"odd.weight": torch.zeros(1), **{n: t for n, t in tensors.items() if n != dropped}}, weights)
    config.write_text(json.dumps(good | {"placement": "left", "reduction_factor": 0}))
    with pytest.raises(BadInput) as refused:
        load_bottleneck(folder)
    text = str(refused.value)
    assert all(
        part in text
        for part in ("wrong value for placement", "'left'", "wrong value for reduction_factor", "odd.weight")
    )
    assert "model.layers.0.mlp.bottleneck lacks up.bias" in text
    config.write_text(json.dumps(good | {"later": 1}))
    save_file(tensors, weights)
    assert "later=1" in load_bottleneck(folder).notes[0]
    weights.write_bytes(weights.read_bytes()[:-5])
    with pytest.raises(BadInput, match="cannot be read as safetensors"):
        load_bottleneck(folder)
    weights.rename(folder / "adapter_model.bin")
    with pytest.raises(BadInput, match="pickled weights"):
        load_bottleneck(folder)
    for broken in ("[1]", "{", '{"peft_type": "LORA"}', '{"shikomi_type": "prefix"}'):
        config.write_text(broken)
        assert not is_bottleneck(folder)
    config.unlink()
    assert not is_bottleneck(folder)
    with pytest.raises(ValueError, match="lora_A"):
        save_bottleneck(tmp_path / "no", {}, {"q.lora_A.weight": torch.zeros(1)}, "base")


def test_an_adapter_of_another_base_is_refused(tiny_folder, tmp_path):
    wide = tiny_folder("llama", hidden_size=64)
    folder = saved_folder(tmp_path / "adapter", str(wide))
    with pytest.raises(BadInput, match=r"wrong shape: found \(8, 32\); allowed: \(16, 64\)[\s\S]*another base model"):
        open_model(folder)
    deep = tiny_folder("llama", num_hidden_layers=3)
    config = folder / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": str(deep)}))
    with pytest.raises(BadInput, match=r"lacks model\.layers\.2\.mlp\.bottleneck\.down\.bias"):
        open_model(folder)
    lm = wrap(build("gpt2"), None, Bottleneck(4), FP32, CPU)
    with pytest.raises(BadInput, match=r"the adapter lacks transformer\.h\.0"):
        lm.attached.load(load_bottleneck(folder).tensors, "here")
    lm = wrap(build("llama"), None, Bottleneck(4, layers_to_transform=[1]), FP32, CPU)
    with pytest.raises(BadInput, match=r"model\.layers\.0\S+, which this model has no place for"):
        lm.attached.load(load_bottleneck(folder).tensors, "here")
    shutil.move(folder / "adapter_model.safetensors", folder / "adapter_model.bin")
    with pytest.raises(BadInput, match="pickle"):
        open_model(folder)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"layers_to_transform": [0, 2]}, "no such layer: found 2; allowed: 0 to 1"),
        ({"layers_to_transform": [-1]}, "no such layer: found -1"),
        ({"layers_to_transform": []}, "names no layer"),
    ],
)
def test_layers_that_are_not_there_are_refused(options, message):
    with pytest.raises(BadInput, match=message):
        wrap(build("llama"), None, Bottleneck(**options), FP32, CPU)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"placement": "left"}, "houlsby"),
        ({"reduction_factor": 0}, "reduction_factor"),
        ({"non_linearity": "sine"}, "relu"),
        ({"reduction_facto": 8}, "did you mean `reduction_factor`"),
    ],
)
def test_a_recipe_with_a_wrong_option_is_refused(options, message, tmp_path):
    with pytest.raises(BadInput, match=message):
        tiny_recipe(tmp_path, tmp_path / "rows", tmp_path / "run", adapter={"name": "bottleneck", **options})


def test_models_whose_sublayers_cannot_be_told_are_refused():
    for placement, part in (("houlsby", "self_attention"), ("pfeiffer", "mlp")):
        with pytest.raises(BadInput, match=rf"BloomBlock: found transformer\.h\.0\.{part} adds the residual itself"):
            wrap(build("bloom"), None, Bottleneck(placement=placement), FP32, CPU)
    config = AutoConfig.for_model(
        "opt", vocab_size=64, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4,
        word_embed_proj_dim=32, max_position_embeddings=32,
    )  # fmt: skip
    with pytest.raises(BadInput, match="feed-forward part of OPTDecoderLayer.*has self_attn, .*fc1, fc2.*lora"):
        wrap(AutoModelForCausalLM.from_config(config), None, Bottleneck(), FP32, CPU)


def test_without_a_bottleneck_nothing_stands_in_the_half_blocks():
    lm = wrap(build("llama"), None, Lora(r=2), FP32, CPU)
    choose_path(lm, 64)
    assert lm.path == "fused" and all(half.after is None for pair in lm.blocks.halves for half in pair)
    pfeiffer = ours("llama", Bottleneck(placement="pfeiffer"))
    assert all(a.after is None and m.after is not None for a, m in pfeiffer.blocks.halves)
