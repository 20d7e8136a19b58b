"""Virtual tokens in packed rows, in generation, in runs: always the same as each sequence alone behind them."""

import json
import os
import signal
from dataclasses import replace

import pytest
import torch
from architectures import VOCABULARY, build
from running import final_bytes, losses, tiny_recipe, write_rows
from safetensors.torch import load_file, save_file
from tiny_models import tiny_model, tiny_tokenizer

from shikomi.adapters.prefix import Prefix
from shikomi.adapters.prompt import Prompt
from shikomi.checkpoint.peft_format import save_adapter
from shikomi.data.packing import Example, pack, pack_tree, with_root
from shikomi.errors import BadInput, Stopped
from shikomi.evaluate.labels import score_labels
from shikomi.inference import open_model
from shikomi.model import attention
from shikomi.model.attention_cuda import visible
from shikomi.model.device import Dtypes
from shikomi.model.load import count_parameters, wrap
from shikomi.model.probe import choose_path
from shikomi.run import resume, train
from shikomi.steps.saved import saved_adapter

CPU = torch.device("cpu")
FP32 = Dtypes(torch.float32, torch.float32)
BOTH = [Prompt(5), Prefix(5)]


def named(value) -> str:
    return value if isinstance(value, str) else value.name


def model_with(architecture: str, options, dtypes: Dtypes = FP32):
    lm = wrap(build(architecture), None, options, dtypes, CPU)
    choose_path(lm, 64)
    lm.stop_ids = []
    return lm


def ids(*lengths: int, seed: int = 3) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCABULARY, (n,), generator=generator).tolist() for n in lengths]


def packed_rows(*lengths: int):
    examples = [
        Example(torch.tensor(row).numpy().astype("int32"), (torch.arange(len(row)) > len(row) // 3).numpy(), i)
        for i, row in enumerate(ids(*lengths))
    ]
    return pack(examples)


def test_with_root_puts_one_segment_before_all():
    packed = pack_tree(ids(4, 3), [[[7, 8], [9]], [[5]]])
    rooted = with_root(packed, 6)
    assert rooted.lengths == [6, *packed.lengths] and rooted.parents == [-1, *(p + 1 for p in packed.parents)]
    assert rooted.parents[1] == 0
    assert rooted.positions.tolist() == [*range(6), *(packed.positions + 6).tolist()]
    assert torch.equal(rooted.ids[rooted.scored], packed.ids[packed.scored])
    assert rooted.ids[6:].tolist() == packed.ids.tolist()
    assert (rooted.n_tokens, rooted.rows) == (packed.n_tokens, packed.rows)
    assert rooted.targets is packed.targets and rooted.segment is packed.segment


@pytest.mark.parametrize("rules", [attention.Rules(0.3), attention.Rules(0.3, 7, 2.0)], ids=["plain", "window"])
def test_attention_behind_a_prefix_is_that_of_a_dense_mask(rules):
    packed = pack_tree(ids(140, 20), [ids(9, 30), ids(3)])
    n, rows, heads, kv, width = 4, len(packed.ids), 4, 2, 8
    generator = torch.Generator().manual_seed(0)
    q, k, v, prefix = (
        torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)
        for shape in ((heads, rows, width), (kv, rows, width), (kv, rows, width), (2, kv, n, width))
    )
    positions = packed.positions + n
    plan = attention.layout(replace(packed, positions=positions), (prefix,))
    weights = torch.randn((rows, heads, width), generator=generator, dtype=torch.float64)
    out = attention.attention(q, *attention.after_prefix(prefix, k, v), plan, rules)
    got = torch.autograd.grad((out * weights).sum(), (q, k, v, prefix))
    owner = [i for i, length in enumerate(packed.lengths) for _ in range(length)]
    chains = [{i} for i in range(len(packed.lengths))]
    for i, parent in enumerate(packed.parents):
        chains[i] |= chains[parent] if parent >= 0 else set()
    at = [*range(n), *positions.tolist()]
    seen = torch.tensor(
        [
            [
                (key < n or owner[key - n] in chains[owner[row]])
                and 0 <= at[n + row] - at[key] < (rules.window or 10_000)
                for key in range(n + rows)
            ]
            for row in range(rows)
        ]
    )
    mask_of_cuda = visible(plan, rules.window)(0, 0, torch.arange(rows)[:, None], torch.arange(n + rows)[None])
    assert torch.equal(mask_of_cuda, seen)
    keys, values = (x.repeat_interleave(heads // kv, 0) for x in attention.after_prefix(prefix, k, v))
    scores = q @ keys.transpose(1, 2) * rules.scaling
    scores = scores if rules.softcap is None else rules.softcap * torch.tanh(scores / rules.softcap)
    expected = (scores.masked_fill(~seen, float("-inf")).softmax(-1) @ values).transpose(0, 1)
    torch.testing.assert_close(out, expected)
    # the backward sums keys' gradients in fp32
    for mine, theirs in zip(got, torch.autograd.grad((expected * weights).sum(), (q, k, v, prefix)), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


def test_a_row_behind_a_prefix_is_not_plain():
    """Kernels that know only segments beside each other must not get it."""
    packed, prefix = packed_rows(5, 6), torch.zeros(2, 2, 3, 8)
    assert attention.layout(packed).plain and not attention.layout(packed, (prefix,)).plain
    assert not attention.layout(with_root(packed, 3)).plain


@pytest.mark.parametrize("options", BOTH, ids=named)
def test_the_probe_compares_rows_behind_virtual_tokens_too(options, monkeypatch):
    def wrong_root(packed, n):
        rooted = with_root(packed, n)
        return replace(rooted, positions=rooted.positions.clamp(max=n))

    monkeypatch.setattr("shikomi.model.language_model.with_root", wrong_root)
    monkeypatch.setattr(
        attention, "after_prefix", lambda prefix, k, v: (torch.cat([prefix[1], k], 1), torch.cat([prefix[1], v], 1))
    )
    lm = model_with("llama", options)
    assert lm.path == "separate" and "packed: " in lm.path_reason


@pytest.mark.parametrize("options", BOTH, ids=named)
@pytest.mark.parametrize("architecture", ["llama", "mistral", "gemma2", "gpt2", "bloom"])
def test_labels_after_shared_prompts_score_as_each_alone(architecture, options):
    lm = model_with(architecture, options)
    (shots,), tails = ids(18), ids(2, 5, 3, seed=4)
    prompts, labels = [shots + tail for tail in tails], [[7, 8, 2], [9, 2]]
    scores = score_labels(lm, prompts, labels)
    with torch.no_grad():
        for i, prompt in enumerate(prompts):
            for j, label in enumerate(labels):
                both = torch.tensor(prompt + label)
                with lm.generating():
                    logits = lm.model(**lm.alone(lm.model, both)).logits[0, -len(both) :]
                logp = logits.log_softmax(-1)[len(prompt) - 1 : -1].gather(1, both[len(prompt) :, None]).sum()
                assert scores[i, j] == pytest.approx(float(logp), rel=1e-4)
        with lm.adapter_off():
            off = score_labels(lm, prompts, labels)
    # two windows of 6 do not reach back to the virtual tokens, everything else does
    assert bool(abs(off - scores).max() > 1e-2) is (architecture != "mistral")


@pytest.mark.parametrize("options", BOTH, ids=named)
@pytest.mark.parametrize("architecture", ["llama", "mistral", "gemma3_text", "gpt2", "bloom"])
def test_prompts_of_different_lengths_are_answered_together_as_alone(architecture, options):
    lm = model_with(architecture, options)
    prompts = ids(3, 12, 7, 3)
    together = lm.generate(prompts, max_new_tokens=8)
    assert together == [lm.generate([prompt], max_new_tokens=8)[0] for prompt in prompts]
    with lm.adapter_off():
        plain = lm.generate(prompts, max_new_tokens=8)
    assert together != plain or architecture == "bloom"  # a random one only repeats the last token
    assert plain == [model_with(architecture, None).generate([prompt], max_new_tokens=8)[0] for prompt in prompts]


@pytest.mark.parametrize("options", BOTH, ids=named)
def test_an_answer_comes_in_pieces_without_its_prompt(options):
    lm = wrap(tiny_model("llama"), tiny_tokenizer(), options, FP32, CPU)
    choose_path(lm, 64)
    pieces: list[str] = []
    prompt = tiny_tokenizer()("This package provides a library")["input_ids"]
    answer = lm.generate([prompt], 12, stream=pieces.append)[0]
    assert answer and "".join(pieces) == tiny_tokenizer().decode(answer, skip_special_tokens=True)
    sampled = [lm.generate([prompt], 12, temperature=1.0, seed=seed)[0] for seed in (1, 1, 2)]
    assert sampled[0] == sampled[1] != sampled[2]


@pytest.mark.parametrize("options", [*BOTH, Prefix(5, prefix_projection=True)], ids=["prompt", "prefix", "projection"])
@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gpt2", "bloom"])
def test_recomputing_activations_changes_no_gradient(architecture, options):
    found = []
    for recompute in (0, "full"):
        lm = model_with(architecture, options)
        lm.recompute = recompute
        if recompute and lm.path != "fused":
            how = {"use_reentrant": False, "context_fn": lm.recomputing}
            answers = lm.generate(ids(7, 5), max_new_tokens=6)
            lm.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=how)
            lm.model.train()
            assert lm.generate(ids(7, 5), max_new_tokens=6) == answers and lm.model.training
        lm.score(packed_rows(9, 14)).logp.sum().backward()
        found.append({name: p.grad for name, p in lm.trainable().items()})
    assert all(found[0][name].abs().max() > 0 for name in found[0])
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", BOTH, ids=named)
@pytest.mark.parametrize("architecture, path", [("llama", "fused"), ("gemma2", "packed"), ("bloom", "separate")])
def test_bf16_computes_what_fp32_does_and_trains_fp32_masters(architecture, path, options):
    exact = model_with(architecture, options)
    for dtypes in (Dtypes(torch.bfloat16, torch.float32), Dtypes(torch.bfloat16, torch.bfloat16)):
        lm = wrap(build(architecture).to(dtypes.storage), None, options, dtypes, CPU)
        choose_path(lm, 64)
        assert lm.path == path
        logp = lm.score(packed_rows(9, 14)).logp
        assert (logp - exact.score(packed_rows(9, 14)).logp).abs().mean() < 0.2
        logp.sum().backward()
        assert all(p.dtype == p.grad.dtype == torch.float32 and p.grad.any() for p in lm.trainable().values())
        lm.stop_ids = []
        assert len(lm.generate(ids(4), max_new_tokens=3)[0]) == 3


@pytest.mark.parametrize(
    "architecture, why", [("jamba", "carries a state along the row"), ("lfm2", "layers of kind conv")]
)
def test_a_prefix_is_refused_where_layers_are_no_attention_and_a_prompt_is_not(architecture, why):
    with pytest.raises(BadInput, match=f"adapter: prefix cannot serve .*{why}.*use adapter: prompt or lora"):
        model_with(architecture, Prefix(5))
    lm = model_with(architecture, Prompt(5))
    assert lm.path == "separate"
    lm.score(packed_rows(6)).logp.sum().backward()
    assert lm.trainable()["prompt_embeddings"].grad.abs().max() > 0
    assert len(lm.generate(ids(4), max_new_tokens=3)[0]) == 3


def test_a_model_that_takes_no_notice_of_virtual_tokens_is_refused(monkeypatch):
    lm = wrap(build("bloom"), None, Prompt(5), FP32, CPU)
    monkeypatch.setattr(type(lm), "alone", lambda self, module, ids: {"input_ids": ids[None], "use_cache": False})
    with pytest.raises(BadInput, match="prompt cannot serve BloomForCausalLM: found its forward takes no notice"):
        choose_path(lm, 64)
    monkeypatch.undo()
    broken = Prefix(5).attach(build("llama"), None, 0, None)
    lm = wrap(build("bloom"), None, None, FP32, CPU)
    lm.attached = broken  # of another shape of keys
    with pytest.raises(BadInput, match="prefix cannot serve BloomForCausalLM: found RuntimeError"):
        choose_path(lm, 64)


def test_options_that_have_no_effect_are_refused():
    with pytest.raises(BadInput, match="TEXT needs prompt_tuning_init_text"):
        Prompt(prompt_tuning_init="TEXT")
    with pytest.raises(BadInput, match="prompt_tuning_init_text is for TEXT only: found prompt_tuning_init: RANDOM"):
        Prompt(prompt_tuning_init_text="Classify")
    with pytest.raises(BadInput, match="encoder_hidden_size has no effect"):
        Prefix(encoder_hidden_size=8)


def test_parameters_are_counted_without_weights(tiny_llama):
    text = Prompt(7, "TEXT", "This package")
    assert count_parameters(str(tiny_llama), text)[0] == 7 * 32
    assert count_parameters(str(tiny_llama), Prefix(7))[0] == 7 * 2 * 2 * 2 * 8  # layers, k and v, heads, width
    assert count_parameters(str(tiny_llama), text)[1] == count_parameters(str(tiny_llama), Prefix(7))[1]


class Impatient:
    """A Progress that ends the process, politely, after the third step."""

    def __getattr__(self, name):
        def told(*args):
            if name == "advance" and args[0]["step"] == 3:
                os.kill(os.getpid(), signal.SIGTERM)

        return told


ADAPTERS = {
    "projection": {"name": "prefix", "num_virtual_tokens": 4, "prefix_projection": True, "encoder_hidden_size": 6},
    "text": {
        "name": "prompt",
        "num_virtual_tokens": 4,
        "prompt_tuning_init": "TEXT",
        "prompt_tuning_init_text": "This package provides",
    },
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_run_resumes_bit_for_bit_and_its_result_is_used_and_continued(name, tiny_llama, tmp_path, monkeypatch):
    monkeypatch.setenv("SHIKOMI_CACHE", str(tmp_path / "cache"))
    rows = write_rows(tmp_path / "rows.jsonl")
    keys = {"adapter": ADAPTERS[name], "max_steps": 6, "learning_rate": 5e-2, "save_dtype": "fp32"}
    train(tiny_recipe(tiny_llama, rows, tmp_path / "whole", **keys))
    with pytest.raises(Stopped):
        train(tiny_recipe(tiny_llama, rows, tmp_path / "run", **keys), Impatient())
    resume(tmp_path / "run")
    assert final_bytes(tmp_path / "run") == final_bytes(tmp_path / "whole")
    curve = losses(tmp_path / "whole")
    assert losses(tmp_path / "run") == curve and curve[-1][1] < curve[0][1] - 0.1
    assert all(norm > 0 for _, _, norm in curve)
    ready = open_model(tmp_path / "run", dtype="fp32")
    assert ready.lm.attached.options.num_virtual_tokens == 4
    prompt = ready.encoder.encode_prompt(ready._asked("What is it?"))
    with torch.no_grad():
        alone = ready.lm.generate([prompt], 5)
        with ready.base():
            assert ready.lm.generate([prompt], 5) == open_model(tiny_llama, dtype="fp32").lm.generate([prompt], 5)
        assert ready.lm.generate([prompt], 5) == alone
    keys |= {"max_steps": 1, "learning_rate": 1e-6}
    train(tiny_recipe(tmp_path / "run" / "final", rows, tmp_path / "more", **keys))
    first = losses(tmp_path / "more")[0][1]
    assert first < curve[0][1] - 0.05
    result = json.loads((tmp_path / "more" / "result.json").read_text())
    assert result["trainable_parameters"] == (4 * 32 if name == "text" else 4 * 2 * 2 * 16)


PREFIX_FILE = {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 5}
TENSORS = {"prompt_embeddings": torch.zeros(5, 64)}


@pytest.mark.parametrize(
    "config, tensors, message",
    [
        (PREFIX_FILE | {"modules_to_save": ["lm_head"]}, TENSORS, r"more beside them.*modules_to_save=\['lm_head'\]"),
        (PREFIX_FILE | {"num_transformer_submodules": 2}, TENSORS, "num_transformer_submodules=2; allowed: 1"),
        (PREFIX_FILE | {"task_type": "TOKEN_CLS"}, TENSORS, "another task: found task_type 'TOKEN_CLS'"),
        (PREFIX_FILE | {"task_type": "SEQ_CLS"}, TENSORS, "allowed: prompt_embeddings, base_model.score.weight"),
        ({"peft_type": "PREFIX_TUNING"}, TENSORS, "num_virtual_tokens is missing"),
        (PREFIX_FILE | {"num_virtual_tokens": 0}, TENSORS, "wrong value for num_virtual_tokens: found 0"),
        (PREFIX_FILE | {"num_virtual_tokens": 6}, TENSORS, "another number of rows than .* found 5; allowed: 6"),
        (PREFIX_FILE | {"peft_type": "PROMPT_TUNING", "prompt_tuning_init": "x"}, TENSORS, "allowed: RANDOM, TEXT"),
        (PREFIX_FILE, {"embedding": torch.zeros(5, 64)}, "not the tensors of virtual tokens: found embedding"),
        (PREFIX_FILE, {"prompt_embeddings": torch.zeros(5, 63)}, r"wrong shape: found \(5, 63\); allowed: \(5, 64\)"),
    ],
)
def test_files_that_are_no_virtual_tokens_of_this_model_are_refused(config, tensors, message, tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(BadInput, match=message):
        options, found, _ = saved_adapter(tmp_path)
        model_with("llama", options).attached.load(found, "a file")


def test_the_file_says_what_it_is_and_takes_no_other_tensors(tmp_path):
    config, tensors = model_with("llama", Prefix(5)).attached.export()
    save_adapter(tmp_path, config, tensors, "some/base")
    card = (tmp_path / "README.md").read_text()
    assert "- prefix-tuning\n" in card and "# A tuned prefix for some/base" in card and "LoRA" not in card
    assert load_file(tmp_path / "adapter_model.safetensors")["prompt_embeddings"].dtype == torch.bfloat16
    with pytest.raises(ValueError, match="not a name in PEFT's format: q.lora_A.weight"):
        save_adapter(tmp_path, config, {"q.lora_A.weight": torch.ones(1)}, "some/base")
    with pytest.raises(ValueError, match="not fields of peft.PrefixTuningConfig: r"):
        save_adapter(tmp_path, {**config, "r": 8}, tensors, "some/base")
