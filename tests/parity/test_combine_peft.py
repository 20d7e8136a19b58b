"""Combined adapters against PEFT's `add_weighted_adapter` on the same model: equal logits, in both engines."""

import copy
import warnings
from functools import partial

import pytest
import torch
from architectures import VOCABULARY, build
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import merge_utils

from shikomi.adapters.lora import Lora
from shikomi.checkpoint.arithmetic import Settings, merged
from shikomi.checkpoint.combine import combine, combine_adapters
from shikomi.checkpoint.peft_format import load_adapter
from shikomi.errors import BadInput
from shikomi.model.device import Dtypes
from shikomi.model.load import wrap
from shikomi.steps.saved import adapter_of

FP32 = Dtypes(torch.float32, torch.float32)
IDS = torch.randint(3, VOCABULARY, (2, 13), generator=torch.Generator().manual_seed(3))

SAME = ({"r": 4, "lora_alpha": 8}, {"r": 4, "lora_alpha": 2})
PARTS = ({"r": 3, "target_modules": ["q_proj", "down_proj"]}, {"r": 5, "target_modules": ["q_proj", "up_proj"]})
PATTERNS = (
    {"r": 2, "target_modules": ["q_proj", "v_proj"], "rank_pattern": {"v_proj": 6}, "alpha_pattern": {"q_proj": 30}},
    {"r": 3, "target_modules": ["v_proj", "q_proj"], "alpha_pattern": {r"layers\.1\..*": 1}},
)
EMBEDDING = ({"r": 4, "target_modules": ["embed_tokens", "q_proj"]}, {"r": 4, "target_modules": ["embed_tokens"]})
REGEX = ({"r": 4, "target_modules": r".*0.*q_proj"}, {"r": 4, "target_modules": r".*_proj"})

CASES = {
    "cat": ("llama", SAME, "cat", {}),
    "cat of parts": ("llama", PARTS, "cat", {}),
    "cat of patterns": ("llama", PATTERNS, "cat", {}),
    "cat of embeddings": ("llama", EMBEDDING, "cat", {}),
    "cat of expressions": ("llama", REGEX, "cat", {}),
    "cat conv1d": ("gpt2", SAME, "cat", {}),
    "linear": ("llama", SAME, "linear", {}),
    "linear of embeddings": ("llama", EMBEDDING, "linear", {}),
    "linear conv1d": ("gpt2", SAME, "linear", {}),
    "ties": ("llama", SAME, "ties", {"density": 0.4}),
    "ties whole": ("llama", SAME, "ties", {"density": 1.0}),
    "ties by frequency": ("llama", SAME, "ties", {"density": 0.7, "majority_sign_method": "frequency"}),
    "prune": ("llama", SAME, "magnitude_prune", {"density": 0.3}),
    "svd": ("llama", SAME, "svd", {}),
    "svd of parts": ("llama", PARTS, "svd", {"svd_rank": 2}),
    "svd of embeddings": ("llama", EMBEDDING, "svd", {"svd_rank": 3}),
    "svd conv1d": ("gpt2", SAME, "svd", {"svd_rank": 2}),
    "ties then svd": ("llama", PARTS, "ties_svd", {"density": 0.4}),
    "ties then svd conv1d": ("gpt2", SAME, "ties_svd", {"density": 0.4}),
    "prune then svd": ("llama", SAME, "magnitude_prune_svd", {"density": 0.4, "svd_rank": 3}),
}


def peft_pair(architecture: str, options: tuple[dict, dict]) -> PeftModel:
    """A model with the non-zero adapters "a" and "b"."""
    every = {"target_modules": "all-linear", "lora_alpha": 6, "task_type": "CAUSAL_LM"}
    configs = [LoraConfig(**{**every, **given}) for given in options]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(copy.deepcopy(build(architecture)), configs[0], adapter_name="a")
        model.add_adapter("b", configs[1])
    torch.manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.2)
    return model.eval()


def saved(model: PeftModel, folder) -> list:
    """The folders of "a" and "b"."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the base cannot be found, to see whether its vocabulary grew
        model.save_pretrained(str(folder))
    for name in ("a", "b"):
        path = folder / name / "adapter_config.json"
        path.write_text(
            path.read_text().replace('"base_model_name_or_path": null', '"base_model_name_or_path": "base"')
        )
    return [folder / "a", folder / "b"]


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


def ours(architecture: str, folder) -> torch.Tensor:
    adapter = load_adapter(folder)
    lm = wrap(build(architecture), None, adapter_of(adapter.config), FP32, torch.device("cpu"))
    lm.attached.load(adapter.tensors, str(folder))
    return logits(lm.model)


close = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("weights", [(0.7, 0.3), (1.2, -0.6)], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_combined_adapters_equal_those_of_peft(name, weights, tmp_path):
    architecture, options, method, settings = CASES[name]
    peft = peft_pair(architecture, options)
    folders = saved(peft, tmp_path)
    peft.add_weighted_adapter(["a", "b"], list(weights), "both", method, **settings)
    peft.set_adapter("both")
    expected = logits(peft)
    given = {"r" if key == "svd_rank" else key: value for key, value in settings.items()}
    combine_adapters(folders, tmp_path / "both", weights, method, **given)
    close(ours(architecture, tmp_path / "both"), expected)
    close(logits(PeftModel.from_pretrained(build(architecture), str(tmp_path / "both"))), expected)
    assert (expected - logits(build(architecture))).abs().max() > 0.05


@pytest.mark.parametrize("method", ["cat", "svd"])
def test_the_sum_is_that_of_both_adapters_at_once_also_under_rslora(method, tmp_path):
    """PEFT's own combination keeps `use_rslora` of the first adapter, and is too large by the root of the new rank."""
    peft = peft_pair("llama", ({"r": 4, "use_rslora": True}, {"r": 6, "lora_alpha": 3}))
    folders = saved(peft, tmp_path)
    peft.base_model.set_adapter(["a", "b"])
    expected = logits(peft)
    combine_adapters(folders, tmp_path / "both", (1, 1), method, r=10 if method == "svd" else None)
    close(ours("llama", tmp_path / "both"), expected)
    peft.add_weighted_adapter(["a", "b"], [1.0, 1.0], "both", "cat")
    peft.set_adapter("both")
    assert (logits(peft) - expected).abs().max() > 0.1


@pytest.mark.parametrize("rule", ["dare_linear", "dare_ties"])
def test_dare_draws_and_rescales_as_peft_does(rule):
    tensors = [torch.randn(6, 9, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)]
    torch.manual_seed(5)
    expected = getattr(merge_utils, rule)(tensors, torch.tensor([0.8, -0.4]), 0.6)
    found = merged(rule, Settings(0.6, "total", torch.Generator().manual_seed(5)), tensors, [0.8, -0.4])
    torch.testing.assert_close(found, expected)


def test_peft_refuses_linear_over_different_ranks_as_we_do(tmp_path):
    peft = peft_pair("llama", PARTS)
    a, b = (load_adapter(folder) for folder in saved(peft, tmp_path))
    with pytest.raises(ValueError, match="same r"):
        peft.add_weighted_adapter(["a", "b"], [0.5, 0.5], "both", "linear")
    with pytest.raises(BadInput, match="linear needs adapters of equal rank.*r=5 there, and r=3"):
        combine([a, b], [0.5, 0.5], "linear")


def test_the_result_is_named_by_modules_not_by_layers(tmp_path):
    folders = saved(peft_pair("llama", PARTS), tmp_path)
    config = combine([load_adapter(f) for f in folders], [0.5, 0.5]).config
    assert config["target_modules"] == ["down_proj", "q_proj", "up_proj"]
    assert {8, 3, 5} == {config["r"], *config["rank_pattern"].values()}
    assert set(config["rank_pattern"]) < {"down_proj", "q_proj", "up_proj"}
    assert adapter_of(config) == Lora(
        r=config["r"], lora_alpha=config["r"], target_modules=config["target_modules"],
        rank_pattern=config["rank_pattern"], alpha_pattern=config["rank_pattern"],
    )  # fmt: skip
