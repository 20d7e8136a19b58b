"""What keys of transformers, TRL, PEFT, Axolotl and LLaMA-Factory are called here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


class Refused(Exception):
    """A value of another tool's key that has no counterpart; says what is allowed and what to write instead."""

    def __init__(self, allowed: str | None = None, fix: str | None = None, secret: bool = False) -> None:
        super().__init__(fix or allowed)
        self.allowed, self.fix, self.secret = allowed, fix, secret


@dataclass(frozen=True)
class LeaveOut:
    """The key says nothing that is not so already, for the reason given."""

    reason: str


@dataclass(frozen=True)
class Means:
    """The dotted key that another tool's key is here, and how its value is written; `convert` may return LeaveOut."""

    target: str
    convert: Callable[[Any], Any] = lambda value: value


def among(values: dict[Any, Any], fix: str | None = None) -> Callable[[Any], Any]:
    """A conversion by table; a value that is not in it is refused."""

    def convert(value: Any) -> Any:
        for theirs, ours in values.items():
            if theirs == value and isinstance(theirs, bool) == isinstance(value, bool):
                return ours
        raise Refused(", ".join(sorted(str(v).lower() if isinstance(v, bool) else str(v) for v in values)), fix)

    return convert


def translated(values: dict[Any, Any]) -> Callable[[Any], Any]:
    """A conversion by table; a value that is not in it stays, and is checked as our own."""

    def convert(value: Any) -> Any:
        for theirs, ours in values.items():
            if theirs == value and isinstance(theirs, bool) == isinstance(value, bool):
                return ours
        return value

    return convert


def words(value: Any) -> Any:
    """`q_proj,v_proj` -> [q_proj, v_proj]; `all` -> all-linear; one word that could be a regex stays text."""
    if value == "all":
        return "all-linear"
    return [word.strip() for word in value.split(",")] if isinstance(value, str) and "," in value else value


def token(value: Any) -> str:
    if isinstance(value, str) and value.startswith("env:") and value[4:].isidentifier():
        return value[4:]
    raise Refused(
        "env:NAME, the environment variable that holds the token",
        "set HF_TOKEN in the environment and delete the key: a recipe is saved with the run and holds no secrets",
        secret=True,
    )


def data_paths(value: Any) -> Any:
    """Paths separated by commas; LLaMA-Factory's names of its own dataset_info.json are refused."""
    if not isinstance(value, str):
        return value
    paths = [part.strip() for part in value.split(",")]
    if all("/" in path or Path(path).suffix for path in paths):
        return paths if len(paths) > 1 else paths[0]
    raise Refused("paths of files, or hub ids", "write the files that the names stand for under `data.train`")


def share(value: Any) -> Any:
    if value == 0 and not isinstance(value, bool):
        return LeaveOut("no rows are split off unless `data.validation` says so")
    if isinstance(value, int | float) and value >= 1:
        raise Refused("a share between 0 and 1", "give the share of rows as `data.validation: 0.05`")
    return value


objective_of_loss = translated({"sigmoid": "dpo", "nll": "sft"})
LOSSES_OF_DPO = ("sigmoid", "sigmoid_norm", "hinge", "robust")  # values of `objective.loss_type`, not other objectives


def no_remote_code(value: Any) -> Any:
    if value is False:
        return LeaveOut("code from a model's folder is never run")
    raise Refused("false", "delete the key: code from a model's folder is never run")


def once_per_epoch(value: Any) -> Any:
    if value == 1:
        return LeaveOut("evaluation is at the end of each epoch")
    raise Refused("1", "give the steps between evaluations as `eval_steps`")


OFF = "steps are not limited unless `max_steps` is given"
BF16 = {True: "bf16", "auto": "auto", False: LeaveOut("`dtype` says it")}
DTYPES = {"bfloat16": "bf16", "float16": "fp16", "half": "fp16", "float32": "fp32", "float": "fp32"}
SCHEDULES = {"constant_with_warmup": "constant", "warmup_stable_decay": "wsd"}
OPTIMIZERS: dict[Any, Any] = {
    **dict.fromkeys(("adamw_torch", "adamw_torch_fused", "adamw_hf", "adamw_apex_fused"), "adamw"),
    **dict.fromkeys(("adamw_8bit", "adamw_bnb_8bit"), "adamw_8bit"),
    **dict.fromkeys(("paged_adamw", "paged_adamw_32bit"), "paged"),
    "paged_adamw_8bit": {"name": "paged", "state_bits": 8},
    "galore_adamw": "galore",
    "galore_adamw_layerwise": "galore",
}
MASK = {True: "all", False: "everything"}

KEYS: dict[str, Means] = {
    # the model
    "base_model": Means("model"),
    "model_name_or_path": Means("model"),
    "model_id": Means("model"),
    "revision": Means("model_revision"),
    "revision_of_model": Means("model_revision"),
    "token": Means("model_token_env", token),
    "hf_token": Means("model_token_env", token),
    "hf_hub_token": Means("model_token_env", token),
    "hub_token": Means("model_token_env", token),
    "torch_dtype": Means("dtype", translated(DTYPES)),
    "bf16": Means("dtype", among(BF16)),
    "fp16": Means("dtype", among({True: "fp16", "auto": "auto", False: LeaveOut("`dtype` says it")})),
    "use_cpu": Means("device", among({True: "cpu", False: LeaveOut("`device` says it")})),
    "trust_remote_code": Means("model", no_remote_code),
    # the adapter: PEFT's own names first
    **{
        key: Means(f"adapter.{key}")
        for key in (
            *("r", "lora_alpha", "lora_dropout", "bias", "use_rslora", "rank_pattern", "alpha_pattern"),
            *("init_lora_weights", "layers_to_transform", "exclude_modules", "num_virtual_tokens"),
        )
    },
    "target_modules": Means("adapter.target_modules", words),
    "modules_to_save": Means("adapter.modules_to_save", words),
    "lora_r": Means("adapter.r"),
    "lora_rank": Means("adapter.r"),
    "lora_target": Means("adapter.target_modules", words),
    "lora_target_modules": Means("adapter.target_modules", words),
    "lora_target_linear": Means(
        "adapter.target_modules", among({True: "all-linear", False: LeaveOut("`adapter.target_modules` says it")})
    ),
    "lora_modules_to_save": Means("adapter.modules_to_save", words),
    "additional_target": Means("adapter.modules_to_save", words),
    "lora_exclude_modules": Means("adapter.exclude_modules"),
    "lora_layers_to_transform": Means("adapter.layers_to_transform"),
    "peft_layers_to_transform": Means("adapter.layers_to_transform"),
    "peft_use_rslora": Means("adapter.use_rslora"),
    # data
    "dataset_name": Means("data.train", data_paths),
    "dataset": Means("data.train", data_paths),
    "eval_dataset": Means("data.validation", data_paths),
    "val_set_size": Means("data.validation", share),
    "val_size": Means("data.validation", share),
    "train_on_inputs": Means("data.train_on", among({True: "everything", False: "all"})),
    "train_on_prompt": Means("data.train_on", among({True: "everything", False: "all"})),
    "completion_only_loss": Means("data.train_on", among(MASK)),
    "assistant_only_loss": Means("data.train_on", among(MASK)),
    "mask_history": Means("data.train_on", among({True: "last", False: "all"})),
    "tokens": Means("new_tokens"),
    "new_special_tokens": Means("new_tokens"),
    "add_tokens": Means("new_tokens"),
    "chat_template_path": Means("chat_template"),
    "sequence_len": Means("max_length"),
    "cutoff_len": Means("max_length"),
    "max_seq_length": Means("max_length"),
    "max_seq_len": Means("max_length"),
    "model_max_length": Means("max_length"),
    # the stage
    "rl": Means("objective.name"),
    "loss_type": Means("objective.name", objective_of_loss),
    "pref_loss": Means("objective.name", objective_of_loss),
    "beta": Means("objective.beta"),
    "dpo_beta": Means("objective.beta"),
    "pref_beta": Means("objective.beta"),
    "orpo_alpha": Means("objective.beta"),
    **{
        key: Means(f"objective.{key}")
        for key in (
            *("label_smoothing", "rpo_alpha", "cpo_alpha", "desirable_weight", "undesirable_weight"),
            *("gamma_beta_ratio", "center_rewards_coefficient"),
        )
    },
    "kto_chosen_weight": Means("objective.desirable_weight"),
    "kto_rejected_weight": Means("objective.undesirable_weight"),
    "precompute_ref_log_probs": Means("reference", among({True: "precompute", False: "live"})),
    "num_epochs": Means("num_train_epochs"),
    "epochs": Means("num_train_epochs"),
    "lr": Means("learning_rate"),
    "lr_scheduler": Means("lr_scheduler_type", translated(SCHEDULES)),
    "warmup_ratio": Means("warmup_steps"),
    "optimizer": Means("optim", translated(OPTIMIZERS)),
    "adam_beta1": Means("optim.adam_beta1"),
    "adam_beta2": Means("optim.adam_beta2"),
    "adam_epsilon": Means("optim.adam_epsilon"),
    "loraplus_lr_ratio": Means("optim.loraplus_lr_ratio"),
    "loraplus_lr_embedding": Means("optim.loraplus_lr_embedding"),
    "gradient_clipping": Means("max_grad_norm", translated({0: None})),
    "train_sampling_strategy": Means("shuffle", among({"random": True, "sequential": False})),
    "gradient_checkpointing": Means("recompute", among({True: "full", False: "none"})),
    "eval_max_new_tokens": Means("evaluate.max_new_tokens"),
    "evals_per_epoch": Means("eval_steps", once_per_epoch),
}
"""Keys that are called otherwise here. A key that is also ours in some block is ours there."""

VALUES: dict[str, Callable[[Any], Any]] = {
    "dtype": translated(DTYPES),
    "lr_scheduler_type": translated(SCHEDULES),
    "optim": translated(OPTIMIZERS),
    "max_grad_norm": translated({0: None}),
    "max_steps": translated({-1: LeaveOut(OFF)}),
    "chat_template": translated({"tokenizer_default": LeaveOut("the model's own template is used")}),
}
"""Keys that are called the same here, with values that other tools spell otherwise."""

_PACKED = "examples are always packed, and never see each other"
_WRITES = "a run directory is written the same way every time"
_SAVES = "checkpoints are written by `save_steps`"
_EVALS = "the validation rows are evaluated by `eval_steps`, or at the end of each epoch"
_FAST = "it is not needed here"
_NO_PAD = "nothing is padded"

LEFT_OUT: dict[str, str] = {
    **dict.fromkeys(("packing", "sample_packing", "eval_sample_packing", "neat_packing", "padding_free"), _PACKED),
    **dict.fromkeys(("pad_to_sequence_len", "padding_side", "pad_token", "group_by_length"), _NO_PAD),
    **dict.fromkeys(("overwrite_output_dir", "plot_loss", "disable_tqdm", "save_safetensors"), _WRITES),
    **dict.fromkeys(("logging_strategy", "logging_first_step", "include_num_input_tokens_seen"), _WRITES),
    **dict.fromkeys(("save_strategy", "saves_per_epoch", "save_only_model"), _SAVES),
    **dict.fromkeys(("eval_strategy", "evaluation_strategy", "do_eval", "eval_on_start"), _EVALS),
    **dict.fromkeys(("per_device_eval_batch_size", "eval_batch_size", "micro_eval_batch_size"), _FAST),
    **dict.fromkeys(("attn_implementation", "flash_attention", "flash_attn", "sdp_attention"), _FAST),
    **dict.fromkeys(("xformers_attention", "use_liger_kernel", "enable_liger_kernel", "tf32"), _FAST),
    **dict.fromkeys(("dataloader_num_workers", "dataset_num_proc", "preprocessing_num_workers"), _FAST),
    **dict.fromkeys(("dataset_processes", "dataloader_pin_memory", "gradient_checkpointing_kwargs"), _FAST),
    **dict.fromkeys(("remove_unused_columns", "dataset_prepared_path", "overwrite_cache", "dataset_dir"), _FAST),
    **dict.fromkeys(("low_cpu_mem_usage", "device_map", "use_cache", "ddp_timeout", "torch_compile"), _FAST),
    **dict.fromkeys(("model_type", "tokenizer_type", "tokenizer_use_fast", "is_llama_derived_model"), _FAST),
    **dict.fromkeys(("use_fast_tokenizer", "do_train", "strict", "use_auth_token", "log_level"), _FAST),
    **dict.fromkeys(("packing_strategy", "eval_packing"), _PACKED),
    **dict.fromkeys(("torch_compile_backend", "torch_compile_mode", "dataloader_persistent_workers"), _FAST),
    **dict.fromkeys(("dataloader_prefetch_factor", "ddp_find_unused_parameters", "full_determinism"), _FAST),
    "pad_to_multiple_of": _NO_PAD,
    "run_name": "a run is named by `output_dir`",
    "template": "the model's own chat template is used, or `chat_template`",
    "greater_is_better": "each metric knows it",
    "local_rank": "the launcher says it",
}
"""Keys that change nothing here, each with the reason."""

UNSET: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("deepspeed", "fsdp", "fsdp_config", "resume_from_checkpoint", "debug", "hub_model_id"), ()),
    **dict.fromkeys(("auto_resume_from_checkpoints", "special_tokens", "wandb_project", "wandb_entity"), ()),
    **dict.fromkeys(("wandb_watch", "wandb_name", "wandb_run_id", "wandb_log_model", "lora_model_dir"), ()),
    **dict.fromkeys(("load_in_4bit", "quantization_bit", "use_peft", "finetuning_type", "stage"), ()),
    **dict.fromkeys(("push_to_hub", "load_in_8bit", "auto_find_batch_size", "neftune_noise_alpha"), (False, 0)),
    **dict.fromkeys(("label_smoothing_factor", "gptq", "lora_fan_in_fan_out", "use_galore"), (False, 0)),
    **dict.fromkeys(("activation_offloading", "dataloader_drop_last", "shuffle_dataset"), (False,)),
    "lr_scheduler_kwargs": (),
    "dataset_text_field": ("text",),
    "quantization_method": ("bnb", "bitsandbytes"),
}
"""Keys that may stand in a recipe while they are empty or have one of these values; otherwise they are unknown."""

PEFT_UNSET: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("auto_mapping", "revision", "layers_pattern", "layer_replication", "corda_config"), ()),
    **dict.fromkeys(("eva_config", "megatron_config", "arrow_config", "alora_invocation_tokens"), ()),
    **dict.fromkeys(("trainable_token_indices", "target_parameters", "loftq_config", "lora_ga_config"), ()),
    **dict.fromkeys(("qalora_group_size", "peft_version", "base_model_name_or_path", "runtime_config"), (...,)),
    **dict.fromkeys(("fan_in_fan_out", "lora_bias", "use_qalora", "ensure_weight_tying", "use_dora"), (False,)),
    **dict.fromkeys(("use_bdlora",), (False,)),
    "megatron_core": ("megatron.core",),
    "task_type": ("CAUSAL_LM",),
    "inference_mode": (True, False),
}
"""Keys of a PEFT adapter_config.json that say nothing with these values (`...`: with any)."""

PEFT_TYPES = {"LORA": "lora", "PREFIX_TUNING": "prefix", "PROMPT_TUNING": "prompt"}


def translations() -> list[tuple[str, str]]:
    """(another tool's key, what it is called here), for the documentation."""
    several = {
        "per_device_train_batch_size": "batch_size (times gradient_accumulation_steps)",
        "micro_batch_size": "batch_size (times gradient_accumulation_steps)",
        "gradient_accumulation_steps": "batch_size (a factor of it)",
        "load_in_4bit": "quant: nf4",
        "quantization_bit": "quant: nf4",
        "bnb_4bit_use_double_quant": "quant.double_quant",
        "double_quantization": "quant.double_quant",
        "use_dora": "adapter: dora",
        "use_peft": "adapter: lora, or full",
        "finetuning_type": "adapter: lora, or full",
        "peft_config": "adapter",
        "datasets": "data.train",
        "test_datasets": "data.validation",
        "max_samples": "data.train.0.limit",
        "dataset_train_split": "data.train.0.split",
        "stage": "objective",
        "simpo_gamma": "objective.gamma_beta_ratio (divided by beta)",
    }
    plain = {key: means.target for key, means in KEYS.items() if key not in ("trust_remote_code", "evals_per_epoch")}
    left = {key: f"not needed: {reason}" for key, reason in LEFT_OUT.items()}
    return sorted((plain | several | left).items())
