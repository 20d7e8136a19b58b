"""The scalar head: one value a sequence, as transformers' own classifiers give it, on every path."""

import json

import numpy as np
import pytest
import torch
from architectures import EXPECTED, SPECS, VOCABULARY, build
from reward_models import CPU, FP32, reward_model
from transformers import AutoConfig, AutoModelForSequenceClassification

from shikomi.adapters.full import Full
from shikomi.adapters.lora import Lora
from shikomi.data.pairs import Completion, Thumb, pack_thumbs
from shikomi.errors import BadInput
from shikomi.model.device import Dtypes
from shikomi.model.files import ModelFiles
from shikomi.model.heads import SCORE, classifier_of, fresh_head
from shikomi.model.load import count_parameters, load_model, wrap
from shikomi.model.probe import choose_path
from shikomi.model.task import check_policy, check_reward_model, task_of_files
from shikomi.quant.nf4 import Nf4

CLASSIFIERS = [name for name in SPECS if name != "lfm2"]  # transformers has no classifier of LFM2


def answers() -> list[Thumb]:
    """Answers of uneven lengths, some to one prompt."""
    rng = np.random.default_rng(0)

    def some(n: int) -> np.ndarray:
        return rng.integers(3, VOCABULARY, n).astype(np.int32)

    prompts = [some(9), some(4)]
    found = []
    for row, (which, length) in enumerate([(0, 3), (0, 7), (1, 1), (1, 5), (0, 2)]):
        found.append(Thumb(prompts[which], Completion(some(length), np.ones(length, bool)), True, row))
    return found


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_values_are_those_of_the_classifier_of_transformers(name):
    base, lm = build(name), reward_model(name)
    assert lm.path == EXPECTED[name]
    _, dropped = classifier_of(base.config)
    base.config.num_labels = 1
    theirs = AutoModelForSequenceClassification.from_config(base.config, dtype=torch.float32).eval()
    weights = {n: t for n, t in base.state_dict().items() if n not in dropped} | {SCORE: lm.scalar.weight.detach()}
    assert not theirs.load_state_dict(weights, strict=False).unexpected_keys
    rows = answers()
    batch = pack_thumbs(rows)
    with torch.no_grad():
        got = lm.values(batch.packed, batch.ends)
        want = [
            theirs(input_ids=torch.from_numpy(np.concatenate([r.prompt, r.completion.ids]).astype(np.int64))[None])
            for r in rows
        ]
    want = torch.cat([out.logits[0] for out in want])
    assert got.dtype == torch.float32 and want.std() > 0.01
    torch.testing.assert_close(got, want, rtol=2e-4, atol=2e-5)


def test_a_fresh_head_is_normal_with_the_models_own_deviation_and_of_the_seed():
    config = build("llama").config
    wide = type(config).from_dict(config.to_dict() | {"hidden_size": 4096, "initializer_range": 0.3})
    head = fresh_head(wide, 1, CPU)
    assert head.weight.shape == (1, 4096) and head.weight.dtype == torch.float32
    assert float(head.weight.detach().std()) == pytest.approx(0.3, rel=0.05)
    assert abs(float(head.weight.detach().mean())) < 0.03
    assert torch.equal(head.weight, fresh_head(wide, 1, CPU).weight)
    assert not torch.equal(head.weight, fresh_head(wide, 2, CPU).weight)


def test_values_are_computed_in_fp32_over_bf16():
    lm = reward_model("llama", dtypes=Dtypes(torch.bfloat16, torch.bfloat16))
    h = torch.randn(3, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    want = h.double() @ lm.scalar.weight.double()[0]
    torch.testing.assert_close(lm.scalar.values(h).double(), want, rtol=1e-5, atol=1e-6)


def test_without_a_head_there_are_no_values():
    lm = wrap(build("llama"), None, None, FP32, CPU)
    choose_path(lm, 64)
    batch = pack_thumbs(answers())
    with pytest.raises(ValueError, match="no scalar head"):
        lm.values(batch.packed, batch.ends)


@pytest.mark.parametrize("name, what", [("lfm2", "no sequence classification model"), ("bert", "more than a score")])
def test_a_model_without_such_a_classifier_is_refused(name, what):
    settings = dict(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    config = build(name).config if name in SPECS else AutoConfig.for_model(name, **settings, is_decoder=True)
    with pytest.raises(BadInput, match=what):
        classifier_of(config)


@pytest.mark.parametrize("adapter", [Lora(r=2), Full()], ids=["lora", "full"])
def test_the_head_for_tokens_is_no_part_of_a_reward_model(adapter, tiny_folder):
    folder = tiny_folder("qwen3")
    policy = load_model(str(folder), adapter, "fp32", "cpu")
    reward = load_model(str(folder), adapter, "fp32", "cpu", task="reward")
    hidden, rows = 32, policy.head.weight.shape[0]
    assert reward.head.weight is reward.model.get_input_embeddings().weight
    assert reward.total_parameters == policy.total_parameters - rows * hidden + hidden
    assert reward.trainable().keys() - policy.trainable().keys() == {SCORE}
    assert not any("lm_head" in name for name in reward.trainable())
    assert count_parameters(str(folder), adapter, "reward") == (reward.trainable_parameters, reward.total_parameters)
    assert any("a fresh score.weight, normal with deviation 0.2" in note for note in reward.notes)


def test_a_base_in_few_bits_is_read_without_its_head_for_tokens(tiny_folder):
    lm = load_model(str(tiny_folder("qwen3")), Lora(r=2), "fp32", "cpu", quant=Nf4(), task="reward")
    assert lm.scalar is not None and not any("loaded whole" in note for note in lm.notes)
    assert lm.head.weight is lm.model.get_input_embeddings().weight


def test_an_adapter_on_the_head_for_tokens_is_refused(tiny_llama):
    for options in ({"target_modules": ["q_proj", "lm_head"]}, {"modules_to_save": ["lm_head"]}):
        with pytest.raises(BadInput, match="lm_head, the head for tokens.*take lm_head out"):
            load_model(str(tiny_llama), Lora(r=2, **options), "fp32", "cpu", task="reward")


def folder_of(path, config: dict, adapter: dict | None = None) -> ModelFiles:
    (path / "config.json").write_text(json.dumps(config))
    if adapter is None:
        return ModelFiles(path, "base")
    (path / "adapter").mkdir()
    (path / "adapter" / "adapter_config.json").write_text(json.dumps(adapter))
    return ModelFiles(path, "base", path / "adapter")


ONE = {"id2label": {"0": "LABEL_0"}}
POLICIES = [({"architectures": ["LlamaForCausalLM"]}, None), ({}, {"task_type": "CAUSAL_LM"}), ({}, {})]
REWARDS = [({"architectures": ["LlamaForSequenceClassification"], **ONE}, None), ({}, {"task_type": "SEQ_CLS"})]


@pytest.mark.parametrize("config, adapter", POLICIES)
def test_a_policy_is_no_reward_model(config, adapter, tmp_path):
    files = folder_of(tmp_path, config, adapter)
    assert task_of_files(files) == "policy"
    check_policy(files, "x")
    with pytest.raises(BadInput, match="x: not a reward model"):
        check_reward_model(files, "x")


@pytest.mark.parametrize("config, adapter", REWARDS)
def test_a_reward_model_is_no_policy(config, adapter, tmp_path):
    files = folder_of(tmp_path, config, adapter)
    assert task_of_files(files) == "reward"
    check_reward_model(files, "x")
    with pytest.raises(BadInput, match="a reward model, which gives values and cannot answer"):
        check_policy(files, "x")


@pytest.mark.parametrize("labels", [{}, {"id2label": {"0": "a", "1": "b", "2": "c"}}])
def test_a_classifier_of_several_labels_is_no_reward_model(labels, tmp_path):
    files = folder_of(tmp_path, {"architectures": ["LlamaForSequenceClassification"], **labels})
    with pytest.raises(BadInput, match=f"found {len(labels.get('id2label', 'ab'))} labels; allowed: num_labels 1"):
        check_reward_model(files, "x")
