"""Blocks of other tools, as their documentation shows them."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shikomi.errors import BadInput
from shikomi.recipe import dump_recipe, load_recipe, parse_recipe, translations
from shikomi.recipe.dump import to_yaml
from shikomi.recipe.foreign import KEYS, LEFT_OUT, PEFT_UNSET, UNSET
from shikomi.recipe.pasted import TOP_KEYS, Pasted
from shikomi.recipe.schema import DataSpec, EvaluateSpec, Stage
from shikomi.recipe.yaml12 import read_yaml

BASE = "model: m\ndata: {train: rows.jsonl, validation: 0.1}\n"

PEFT = """\
model: m
data: rows.jsonl
adapter:
  alora_invocation_tokens: null
  alpha_pattern: {}
  arrow_config: null
  auto_mapping: null
  base_model_name_or_path: HuggingFaceTB/SmolLM2-135M-Instruct
  bias: none
  corda_config: null
  ensure_weight_tying: false
  eva_config: null
  exclude_modules: null
  fan_in_fan_out: false
  inference_mode: true
  init_lora_weights: true
  layer_replication: null
  layers_pattern: null
  layers_to_transform: null
  loftq_config: {}
  lora_alpha: 16
  lora_bias: false
  lora_dropout: 0.05
  megatron_config: null
  megatron_core: megatron.core
  modules_to_save: null
  peft_type: LORA
  peft_version: 0.18.0
  qalora_group_size: 16
  r: 8
  rank_pattern: {}
  revision: null
  target_modules: [q_proj, v_proj]
  target_parameters: null
  task_type: CAUSAL_LM
  trainable_token_indices: null
  use_dora: false
  use_qalora: false
  use_rslora: true
"""

AXOLOTL = """\
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
model_type: LlamaForCausalLM
load_in_8bit: false
load_in_4bit: false
strict: false
datasets:
  - path: owner/alpaca
    type: alpaca
  - path: data/more.jsonl
    type: alpaca
val_set_size: 0.05
output_dir: ./outputs/lora-out
sequence_len: 2048
sample_packing: true
adapter: lora
lora_model_dir:
lora_r: 32
lora_alpha: 16
lora_dropout: 0.05
lora_target_linear: true
lora_fan_in_fan_out:
wandb_project:
gradient_accumulation_steps: 4
micro_batch_size: 2
num_epochs: 3
optimizer: adamw_torch
lr_scheduler: cosine
learning_rate: 0.0002
train_on_inputs: false
bf16: auto
tf32: false
gradient_checkpointing: true
flash_attention: true
warmup_ratio: 0.1
evals_per_epoch: 1
weight_decay: 0.0
special_tokens:
"""

LLAMA_FACTORY = """\
model_name_or_path: Qwen/Qwen3-4B
trust_remote_code: false
stage: sft
do_train: true
finetuning_type: lora
lora_rank: 8
lora_target: all
dataset: data/a.jsonl,data/b.jsonl
template: qwen3
cutoff_len: 2048
max_samples: 1000
overwrite_cache: true
output_dir: saves/qwen
plot_loss: true
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 1.0e-4
num_train_epochs: 3.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
ddp_timeout: 180000000
resume_from_checkpoint: null
"""


def rewritten(text: str):
    """The tree after the rewriting alone: what it says of components that may not be built yet."""
    tree, pasted = read_yaml(text, "r.yaml"), Pasted()
    pasted.rewrite(tree)
    assert pasted.problems == []
    return tree


def problems(text: str) -> list[str]:
    with pytest.raises(BadInput) as caught:
        parse_recipe(text, "r")
    return [str(problem) for problem in caught.value.problems]


def test_a_peft_adapter_config_is_an_adapter_block():
    recipe = parse_recipe(PEFT, "r")
    assert recipe.adapter.name == "lora"
    assert {
        key: value for key, value in recipe.adapter.options.items() if key not in ("alpha_pattern", "rank_pattern")
    } == {
        "bias": "none",
        "init_lora_weights": True,
        "lora_alpha": 16,
        "lora_dropout": 0.05,
        "r": 8,
        "target_modules": ["q_proj", "v_proj"],
        "use_rslora": True,
    }


def test_a_lora_config_may_also_stand_at_the_top_or_under_peft_config():
    top = "peft_type: LORA\ntask_type: CAUSAL_LM\nr: 8\nlora_alpha: 16\ntarget_modules: [q_proj]\nuse_rslora: true\n"
    inside = "peft_config:\n  " + top.strip().replace("\n", "\n  ")
    expected = {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj"], "use_rslora": True}
    for text in (BASE + top, BASE + inside):
        recipe = parse_recipe(text, "r")
        assert (recipe.adapter.name, recipe.adapter.options) == ("lora", expected)


def test_peft_options_that_do_something_are_not_dropped():
    assert (
        "unknown key `adapter.layer_replication`"
        in problems(PEFT.replace("replication: null", "replication: [[0, 4]]"))[0]
    )
    assert "unknown key `adapter.task_type`" in problems(PEFT.replace("CAUSAL_LM", "SEQ_CLS"))[0]


def test_an_axolotl_recipe():
    recipe = parse_recipe(AXOLOTL, "r")
    (stage,) = recipe.stages
    assert recipe.model == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert [source.path.rpartition("/")[2] for source in recipe.data.train] == ["alpaca", "more.jsonl"]
    assert (recipe.data.format, recipe.data.validation, recipe.data.train_on) == ("alpaca", 0.05, "all")
    assert (recipe.max_length, recipe.dtype, recipe.quant.name) == (2048, "auto", "none")
    assert recipe.adapter.options == {"r": 32, "lora_alpha": 16, "lora_dropout": 0.05, "target_modules": "all-linear"}
    assert (stage.batch_size, stage.num_train_epochs, stage.warmup_steps) == (8, 3, 0.1)
    assert (stage.optim.name, stage.lr_scheduler_type, stage.recompute) == ("adamw", "cosine", "full")


def test_a_llama_factory_recipe():
    recipe = parse_recipe(LLAMA_FACTORY, "r")
    (stage,) = recipe.stages
    assert (recipe.model, recipe.max_length, recipe.dtype) == ("Qwen/Qwen3-4B", 2048, "bf16")
    assert [(source.path.rpartition("/")[2], source.limit) for source in recipe.data.train] == [
        ("a.jsonl", 1000),
        ("b.jsonl", 1000),
    ]
    assert recipe.adapter.options == {"r": 8, "target_modules": "all-linear"}
    assert (stage.batch_size, stage.num_train_epochs, stage.learning_rate) == (8, 3, 1e-4)


def test_every_key_that_was_understood_is_echoed_with_its_line():
    notes = "\n".join(parse_recipe(AXOLOTL, "r").notes)
    assert "r.yaml:17: `lora_r: 32` is read as `adapter.r: 32`" in notes
    assert "`micro_batch_size: 2` with `gradient_accumulation_steps: 4` is read as `batch_size: 8`" in notes
    own = {"output_dir", "adapter", "learning_rate", "weight_decay"}
    for key in (line.split(":")[0] for line in AXOLOTL.splitlines() if line[0] not in " "):
        assert (f"`{key}:" in notes or f"`{key}`" in notes) == (key not in own), key


@pytest.mark.parametrize(
    ("line", "where", "value"),
    [
        ("use_dora: true", ("adapter", "name"), "dora"),
        ("adapter: {name: lora, r: 8, use_dora: true}", ("adapter", "name"), "dora"),
        ("load_in_4bit: true", ("quant",), "nf4"),
        ("adapter: qlora", ("quant",), "nf4"),
        ("quantization_bit: 4", ("quant",), "nf4"),
        ("quantization_config: {load_in_4bit: true, bnb_4bit_use_double_quant: true}", ("quant", "double_quant"), True),
        ("quant: {load_in_4bit: true, bnb_4bit_compute_dtype: bfloat16}", ("quant",), "nf4"),
        ("load_in_4bit: true\nbnb_4bit_quant_type: fp4", ("quant",), "fp4"),
        ("loss_type: ipo", ("objective", "name"), "ipo"),
        ("loss_type: sigmoid", ("objective", "name"), "dpo"),
        ("objective: dpo\nloss_type: ipo", ("objective", "name"), "ipo"),
        ("objective: {name: dpo, loss_type: ipo, beta: 0.2}", ("objective", "name"), "ipo"),
        ("loss_type: hinge", ("objective", "loss_type"), "hinge"),
        ("pref_loss: robust", ("objective", "name"), "dpo"),
        ("objective: {name: dpo, loss_type: sigmoid_norm}", ("objective", "name"), "dpo"),
        ("objective: simpo\nsimpo_gamma: 1.0\nbeta: 2.0", ("objective", "gamma_beta_ratio"), 0.5),
        ("loss_type: simpo\nsimpo_gamma: 1.0\npref_beta: 2.0\ncpo_alpha: 0", ("objective", "gamma_beta_ratio"), 0.5),
        ("objective: orpo\norpo_alpha: 0.3", ("objective", "beta"), 0.3),
        ("objective: kto\nundesirable_weight: 1.5", ("objective", "undesirable_weight"), 1.5),
        ("objective: dpo\nprecompute_ref_log_probs: true", ("reference",), "precompute"),
        ("loss_type: dft", ("objective", "dft"), True),
        ("rl: kto\nbeta: 0.2", ("objective", "beta"), 0.2),
        ("stage: pt", ("data", "train_on"), "everything"),
        ("use_peft: false", ("adapter",), "full"),
        ("per_device_train_batch_size: 6", ("batch_size",), 6),
        ("warmup_ratio: 0.1", ("warmup_steps",), 0.1),
        ("lora_target_modules: 'q_proj, v_proj'", ("adapter", "target_modules"), ["q_proj", "v_proj"]),
        ("torch_dtype: bfloat16", ("dtype",), "bf16"),
        ("dtype: float32", ("dtype",), "fp32"),
        ("optim: adamw_torch_fused", ("optim",), "adamw"),
        ("lr_scheduler_type: warmup_stable_decay", ("lr_scheduler_type",), "wsd"),
        ("max_grad_norm: 0", ("max_grad_norm",), None),
        ("adam_beta2: 0.95", ("optim", "adam_beta2"), 0.95),
        ("train_on_inputs: true", ("data", "train_on"), "everything"),
        ("mask_history: true", ("data", "train_on"), "last"),
        ("dataset_train_split: train_sft", ("data", "train", 0, "split"), "train_sft"),
        ("use_cpu: true", ("device",), "cpu"),
    ],
)
def test_single_keys_mean_what_they_mean_elsewhere(line, where, value):
    node = rewritten(BASE + line)
    for part in where:
        node = node[part]
    assert node == value and type(node) is type(value) or isinstance(value, list) and node == value


def test_a_stage_may_hold_keys_of_other_tools():
    recipe = parse_recipe(
        BASE + "stages:\n  - {num_epochs: 3, per_device_train_batch_size: 2, warmup_ratio: 0.2}\n", "r"
    )
    assert (recipe.stages[0].num_train_epochs, recipe.stages[0].batch_size, recipe.stages[0].warmup_steps) == (
        3,
        2,
        0.2,
    )
    assert "unknown key `stages.0.new_special_tokens`" in problems(BASE + "stages:\n  - {new_special_tokens: [a]}\n")[0]


def test_hf_spells_no_limit_as_minus_one():
    assert parse_recipe(BASE + "max_steps: -1", "r").stages[0].max_steps is None


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("trust_remote_code: true", "code from a model's folder is never run"),
        ("gradient_accumulation_steps: 4", "`gradient_accumulation_steps: 4` alone: fix: give `batch_size`"),
        ("micro_batch_size: 2\nbatch_size: 3", "`micro_batch_size: 2` and `batch_size: 3` say different things"),
        ("micro_batch_size: two", "whole numbers, at least 1"),
        ("lora_r: 4\nadapter: {r: 8}", "`lora_r: 4` and `adapter.r: 8` say different things"),
        ("warmup_ratio: 0.1\nwarmup_steps: 10", "say different things"),
        ("num_epochs: 3\nnum_train_epochs: 2", "keep `num_train_epochs` and delete the other"),
        ("dataset: identity,alpaca_en_demo", "write the files that the names stand for"),
        ("val_set_size: 500", "give the share of rows as `data.validation: 0.05`"),
        ("evals_per_epoch: 4", "give the steps between evaluations as `eval_steps`"),
        ("bf16: maybe", "`bf16`: found 'maybe'; allowed: auto, false, true"),
        ("deepspeed: ds_z3.json", "unknown key `deepspeed`"),
        ("load_in_4bit: maybe", "allowed: false, true"),
        ("datasets: [{path: a.jsonl, type: mystery}]", "`type: mystery`"),
        ("warmup_ratio: -1", "`warmup_steps`: found -1"),
    ],
)
def test_what_has_no_counterpart_says_what_to_write_instead(line, says):
    assert any(says in problem and problem.startswith("r.yaml:") for problem in problems(BASE + line))


def test_equal_statements_are_no_conflict():
    assert parse_recipe(BASE + "num_epochs: 3\nnum_train_epochs: 3", "r").stages[0].num_train_epochs == 3


def test_no_key_of_ours_is_taken_for_another_tools():
    assert not set(TOP_KEYS) & (set(KEYS) | set(LEFT_OUT) | set(UNSET) | set(PEFT_UNSET))
    assert not set(KEYS) & (set(LEFT_OUT) | set(UNSET))


def test_every_translation_leads_to_a_key_that_exists():
    blocks = {"data": DataSpec.model_fields, "evaluate": EvaluateSpec.model_fields}
    for key, means in KEYS.items():
        root, _, rest = means.target.partition(".")
        assert root in TOP_KEYS and root in {**Stage.model_fields, **dict.fromkeys(TOP_KEYS)}, key
        assert not rest or rest in blocks.get(root, [rest]), key
    listed = dict(translations())
    assert listed["lora_r"] == "adapter.r" and listed["packing"].startswith("not needed: ")


def test_pasted_keys_work_in_a_recipe_from_python():
    recipe = load_recipe({"model": "m", "data": "a.csv", "num_epochs": 2, "lora_r": 4})
    assert recipe.stages[0].num_train_epochs == 2 and recipe.notes[0].startswith("`num_epochs: 2`")


SPECIAL = [
    "datasets",
    "max_samples",
    "dataset_train_split",
    "stage",
    "use_dora",
    "use_peft",
    "peft_config",
    "peft_type",
]
SPECIAL += ["quantization_config", "bnb_4bit_quant_type", "micro_batch_size", "gradient_accumulation_steps", "name"]
NAMES = st.sampled_from(sorted({*TOP_KEYS, *KEYS, *LEFT_OUT, *UNSET, *PEFT_UNSET, *SPECIAL}))
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-1, 10**30)
    | st.floats()
    | st.sampled_from(["lora", "full", "a.jsonl", "1e-4", ""]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(NAMES | st.just("path"), inner, max_size=3),
    max_leaves=6,
)
ENDS = st.sampled_from(["", ".r", ".name", ".0", ".0.learning_rate"])


@settings(deadline=None, max_examples=300)
@given(st.dictionaries(NAMES, VALUES, max_size=4), st.lists(st.tuples(NAMES, ENDS, VALUES), max_size=2))
def test_nothing_that_yaml_can_say_is_more_than_a_list_of_problems(keys, overrides):
    text = to_yaml({"model": "m", "data": "a.csv", **keys})
    try:
        recipe = parse_recipe(text, "r", [f"{name}{end}={to_yaml(value)}" for name, end, value in overrides])
    except BadInput as error:
        assert error.problems and all(problem.what and "\n" not in str(problem) for problem in error.problems)
    else:
        assert parse_recipe(dump_recipe(recipe)) == recipe
