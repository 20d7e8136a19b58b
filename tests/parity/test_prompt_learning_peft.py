"""Prompt and prefix tuning against PEFT on the same weights: start, gradients, logits, files both ways, generation."""

import copy
import json

import pytest
import torch
from against_peft import assert_equal_but_for_rounding, peft_loss, rows
from architectures import build
from peft import PeftModel, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from tiny_models import tiny_model, tiny_tokenizer

from shikomi.adapters.prefix import Prefix
from shikomi.adapters.prompt import Prompt
from shikomi.checkpoint.peft_format import load_adapter, save_adapter
from shikomi.data.packing import Example, pack
from shikomi.model.device import Dtypes
from shikomi.model.load import wrap
from shikomi.model.probe import choose_path
from shikomi.steps.saved import adapter_of

CPU = torch.device("cpu")
FP32 = Dtypes(torch.float32, torch.float32)
N = 5  # virtual tokens; windows of the tiny models are 6 wide, so that rows leave them behind
PROJECTED = {"prefix_projection": True, "encoder_hidden_size": 7}
CASES = {
    "prompt fused": ("llama", Prompt, {}),
    "prompt fused window": ("mistral", Prompt, {}),
    "prompt windows soft caps": ("gemma2", Prompt, {}),
    "prompt scaled embeddings": ("gemma3_text", Prompt, {}),
    "prompt absolute positions": ("gpt2", Prompt, {}),
    "prompt separate": ("bloom", Prompt, {}),
    "prefix fused": ("llama", Prefix, {}),
    "prefix fused qk norm": ("qwen3", Prefix, {}),
    "prefix fused window": ("mistral", Prefix, {}),
    "prefix windows soft caps": ("gemma2", Prefix, {}),
    "prefix local global": ("gemma3_text", Prefix, {}),
    "prefix absolute positions": ("gpt2", Prefix, {}),
    "prefix separate": ("bloom", Prefix, {}),
    "prefix projection fused": ("llama", Prefix, PROJECTED),
    "prefix projection packed": ("gpt2", Prefix, PROJECTED),
}


def peft_of(base, kind, options, seed: int = 5):
    """PEFT's model around a base."""
    config = PromptTuningConfig if kind is Prompt else PrefixTuningConfig
    torch.manual_seed(seed)
    return get_peft_model(base, config(task_type="CAUSAL_LM", num_virtual_tokens=N, **options))


def pair(name: str):
    """PEFT's model and ours with the same base, and each with its own random start from one seed."""
    architecture, kind, options = CASES[name]
    base = build(architecture)
    ours = wrap(copy.deepcopy(base), None, kind(num_virtual_tokens=N, **options), FP32, CPU, seed=5)
    choose_path(ours, 64)
    return peft_of(base, kind, options).eval(), ours


def of_peft(peft, name: str) -> torch.nn.Parameter:
    """PEFT's parameter under our name."""
    inner = "embedding.weight" if name == "prompt_embeddings" else name
    return peft.get_parameter(f"prompt_encoder.default.{inner}")


@pytest.mark.parametrize("name", CASES)
def test_start_loss_gradients_and_counts_are_pefts(name):
    peft, ours = pair(name)
    mine = ours.trainable()
    assert all(torch.equal(p, of_peft(peft, n)) for n, p in mine.items())
    trained, total = peft.get_nb_trainable_parameters()
    share = f"trainable params: {trained:,} || all params: {total:,} || "
    assert ours.trainable_parameters == trained and ours.parameter_line().startswith(share)
    assert ours.total_parameters == total - trained
    expected = peft_loss(peft)
    expected.backward()
    loss = -ours.score(pack(rows())).logp.mean()
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    assert all(p.grad.abs().max() > 1e-4 for p in mine.values())
    assert_equal_but_for_rounding(
        {n: p.grad for n, p in mine.items()}, peft, lambda model: {n: of_peft(model, n).grad.clone() for n in mine}
    )


def logits(lm, ids: torch.Tensor) -> torch.Tensor:
    """Ours, through the path that trains: (S, V) for one row."""
    packed = pack([Example(ids.numpy().astype("int32"), (torch.arange(len(ids)) > 0).numpy(), 0)])
    rows = lm.hidden(packed) if lm.path != "separate" else lm.hidden_alone(ids)
    raw = lm.head(rows)
    return raw if lm.shape.softcap is None else lm.shape.softcap * torch.tanh(raw / lm.shape.softcap)


FILES = {name: CASES[name] for name in CASES if "qk norm" not in name and "local" not in name}


@pytest.mark.parametrize("name", FILES)
def test_an_adapter_trained_here_loads_in_peft_and_one_of_peft_here(name, tmp_path):
    architecture, kind, options = CASES[name]
    peft, ours = pair(name)
    optimizer = torch.optim.AdamW(ours.trainable().values(), 1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        (-ours.score(pack(rows())).logp.mean()).backward()
        optimizer.step()
    config, tensors = ours.attached.export()
    save_adapter(tmp_path / "ours", config, tensors, "base", dtype="fp32")
    ids = torch.from_numpy(rows()[2].ids.astype("int64"))
    with torch.no_grad():
        loaded = PeftModel.from_pretrained(build(architecture), str(tmp_path / "ours"))
        theirs = loaded(input_ids=ids[None]).logits[0, -len(ids) :]
        torch.testing.assert_close(logits(ours, ids), theirs, rtol=1e-5, atol=1e-5)
        assert (theirs - peft(input_ids=ids[None]).logits[0, -len(ids) :]).abs().max() > 1e-3
        # and the other way round
        peft.save_pretrained(str(tmp_path / "theirs"))
        file = load_adapter(tmp_path / "theirs")
        again = wrap(build(architecture), None, adapter_of(file.config), FP32, CPU)
        again.attached.load(file.tensors, "theirs")
        choose_path(again, 64)
        expected = peft(input_ids=ids[None]).logits[0, -len(ids) :]
        torch.testing.assert_close(logits(again, ids), expected, rtol=1e-5, atol=1e-5)
    written = [json.loads((tmp_path / f / "adapter_config.json").read_text()) for f in ("ours", "theirs")]
    assert written[0] == {**written[1], "base_model_name_or_path": "base"}
    assert tensors["prompt_embeddings"].shape == file.tensors["prompt_embeddings"].shape
    assert bool(file.notes) is bool(options)  # the projection is not in the file: said


def test_a_text_starts_as_pefts_and_is_repeated_or_cut(tmp_path):
    tiny_tokenizer().save_pretrained(tmp_path)
    assert len(tiny_tokenizer()("a b")["input_ids"]) < N
    for text in ("a b", "This package provides a library for reading"):
        init = {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": text}
        peft = peft_of(tiny_model("llama"), Prompt, {**init, "tokenizer_name_or_path": str(tmp_path)})
        ours = wrap(tiny_model("llama"), tiny_tokenizer(), Prompt(N, **init), FP32, CPU)
        assert torch.equal(ours.trainable()["prompt_embeddings"], of_peft(peft, "prompt_embeddings"))
        config, tensors = ours.attached.export()
        save_adapter(tmp_path / "saved", config, tensors, "some/base")
        PeftModel.from_pretrained(tiny_model("llama"), str(tmp_path / "saved"))
        assert adapter_of(load_adapter(tmp_path / "saved").config) == Prompt(N, **init)


def test_other_starts_are_pefts():
    zero = wrap(build("llama"), None, Prefix(N, init_weights="zero"), FP32, CPU).trainable()["prompt_embeddings"]
    assert torch.equal(zero, of_peft(peft_of(build("llama"), Prefix, {"init_weights": "zero"}), "prompt_embeddings"))
    options = {**PROJECTED, "init_weights": "zero"}
    projected = wrap(build("llama"), None, Prefix(N, **options), FP32, CPU, seed=5).trainable()
    peft = peft_of(build("llama"), Prefix, options)
    assert all(torch.equal(p, of_peft(peft, name)) for name, p in projected.items())
    base = build("llama")
    sampled = wrap(base, None, Prompt(N, "SAMPLE_VOCAB"), FP32, CPU).trainable()["prompt_embeddings"]
    same = (sampled[:, None] == base.get_input_embeddings().weight).all(-1)  # (N, vocabulary)
    assert same.any(1).all() and len(set(same.int().argmax(1).tolist())) > 1


@pytest.mark.parametrize("name", ["prompt fused window", "prompt absolute positions", "prompt windows soft caps",
                                  "prefix fused window", "prefix absolute positions", "prefix windows soft caps",
                                  "prefix separate"])  # fmt: skip
def test_greedy_generation_is_pefts_token_by_token(name):
    """Against the largest logit of PEFT's forward over all tokens so far.

    Its own generate cannot be asked: PEFT 0.21 looks for the cache under a name that transformers 5.24 no longer has.
    """
    peft, ours = pair(name)
    ours.stop_ids = []
    for row in rows():
        ids = torch.from_numpy(row.ids.astype("int64"))[None]
        so_far = ids
        with torch.no_grad():
            for _ in range(12):
                so_far = torch.cat([so_far, peft(input_ids=so_far).logits[:, -1:].argmax(-1)], 1)
        assert ours.generate([ids[0].tolist()], max_new_tokens=12) == [so_far[0, ids.shape[1] :].tolist()]
