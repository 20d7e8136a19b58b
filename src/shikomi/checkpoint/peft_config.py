"""adapter_config.json as PEFT 0.21 writes it: its fields by method, and which of their values are understood here."""

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from shikomi.errors import BadInput, Problem
from shikomi.model.task import SEQ_CLS

CONFIG = "adapter_config.json"
MODULE = "score"  # the head of a classifier in decoders of transformers
CLASSIFIERS = (MODULE, "classifier")  # names that PEFT puts among modules_to_save of every classifier

# `peft.LoraConfig(task_type="CAUSAL_LM").to_dict()` of PEFT 0.21; a test compares.
DEFAULTS: dict[str, Any] = {
    "alora_invocation_tokens": None,
    "alpha_pattern": {},
    "arrow_config": None,
    "auto_mapping": None,
    "base_model_name_or_path": None,
    "bias": "none",
    "corda_config": None,
    "ensure_weight_tying": False,
    "eva_config": None,
    "exclude_modules": None,
    "fan_in_fan_out": False,
    "inference_mode": False,
    "init_lora_weights": True,
    "kasa_config": None,
    "layer_replication": None,
    "layers_pattern": None,
    "layers_to_transform": None,
    "loftq_config": {},
    "lora_alpha": 8,
    "lora_bias": False,
    "lora_dropout": 0.0,
    "lora_ga_config": None,
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "modules_to_save": None,
    "monteclora_config": None,
    "peft_type": "LORA",
    "peft_version": "0.21.2",
    "qalora_group_size": 16,
    "r": 8,
    "rank_pattern": {},
    "revision": None,
    "target_modules": None,
    "target_parameters": None,
    "task_type": "CAUSAL_LM",
    "trainable_token_indices": None,
    "use_bdlora": None,
    "use_dora": False,
    "use_qalora": False,
    "use_rslora": False,
    "velora_config": None,
}

_PROMPT_LEARNING: dict[str, Any] = {
    "auto_mapping": None,
    "base_model_name_or_path": None,
    "inference_mode": False,
    "modules_to_save": None,
    "num_attention_heads": None,
    "num_layers": None,
    "num_transformer_submodules": 1,
    "num_virtual_tokens": None,
    "peft_version": "0.21.2",
    "revision": None,
    "task_type": "CAUSAL_LM",
    "token_dim": None,
}
# The fields of each method's config; of prompt learning with what PEFT fills in for a causal language model.
FIELDS: dict[str, dict[str, Any]] = {
    "LORA": DEFAULTS,
    "PREFIX_TUNING": {
        **_PROMPT_LEARNING,
        "encoder_hidden_size": None,
        "init_weights": None,
        "peft_type": "PREFIX_TUNING",
        "prefix_projection": False,
    },
    "PROMPT_TUNING": {
        **_PROMPT_LEARNING,
        "peft_type": "PROMPT_TUNING",
        "prompt_tuning_init": "RANDOM",
        "prompt_tuning_init_text": None,
        "tokenizer_kwargs": None,
        "tokenizer_name_or_path": None,
    },
}

# Settings under which the same A and B mean another function than W0 x + scaling B A x.
_OTHER_FUNCTION = (
    *("alora_invocation_tokens", "arrow_config", "kasa_config", "layer_replication", "lora_bias"),
    *("monteclora_config", "target_parameters", "trainable_token_indices", "use_bdlora", "use_qalora"),
)
# Initialisations that leave the base as it was loaded; the others move a part of it into A and B.
_KEEPS_BASE = (True, False, None, "gaussian", "orthogonal", "eva")


def adapter_config(
    config: Mapping[str, Any], modules: Iterable[str], base: str, revision: str | None = None
) -> dict[str, Any]:
    """Every field PEFT writes. `config` has PEFT's names; what it leaves out, or sets to None, is PEFT's default.

    `all-linear` becomes the last parts of the paths of the adapted `modules`, as PEFT itself saves it.
    Raises ValueError for a key that PEFT does not have.
    """
    method = config.get("peft_type", "LORA")
    fields = FIELDS[method]
    unknown = sorted(set(config) - set(fields))
    if unknown:
        kind = {"LORA": "Lora", "PREFIX_TUNING": "PrefixTuning", "PROMPT_TUNING": "PromptTuning"}[method]
        raise ValueError(f"not fields of peft.{kind}Config: {', '.join(unknown)}")
    given = {key: value for key, value in config.items() if value is not None}
    full = {**fields, **given}
    full.update(base_model_name_or_path=base, revision=revision, inference_mode=True)
    if method != "LORA":
        if full.get("prompt_tuning_init") == "TEXT":  # PEFT asks for it even where it reads no text
            full["tokenizer_name_or_path"] = full["tokenizer_name_or_path"] or base
        return full
    if full["target_modules"] == "all-linear":
        full["target_modules"] = sorted({path.rpartition(".")[2] for path in modules})
    for key in ("target_modules", "exclude_modules", "modules_to_save"):
        if isinstance(full[key], list | tuple | set):
            full[key] = sorted(full[key])
    full["lora_alpha"] = _whole(full["lora_alpha"])
    full["alpha_pattern"] = {key: _whole(alpha) for key, alpha in full["alpha_pattern"].items()}
    return full


def _whole(alpha: float) -> float:
    """PEFT declares an int: 32.0 is written as 32, 12.5 stays."""
    return int(alpha) if float(alpha).is_integer() else alpha


def read_config(folder: Path) -> tuple[dict[str, Any], list[str]]:
    """The config with every key of its method, and notes on keys that are passed over. Raises BadInput."""
    path = folder / CONFIG
    try:
        raw = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise BadInput([Problem(f"no adapter here: {CONFIG} is missing", str(folder))]) from error
    except json.JSONDecodeError as error:
        raise BadInput([Problem("is not JSON", str(path), error.lineno, found=error.msg)]) from error
    except (OSError, ValueError) as error:
        raise BadInput([Problem("cannot be read", str(path), found=str(error))]) from error
    if not isinstance(raw, dict):
        raise BadInput([Problem("is not a JSON object", str(path), found=type(raw).__name__)])
    problems = _config_problems(raw, str(path))
    if problems:
        raise BadInput(problems)
    fields = FIELDS[raw["peft_type"]]
    unknown = {key: raw[key] for key in sorted(set(raw) - set(fields))}
    listed = ", ".join(f"{key}={value!r}" for key, value in unknown.items())
    notes = [f"{path}: settings that are not known here and are passed over: {listed}"] if unknown else []
    if raw.get("prefix_projection"):
        notes.append(f"{path}: it holds the keys and values that the projection made; they are trained on themselves")
    config = {key: raw[key] if raw.get(key) is not None else default for key, default in fields.items()}
    return config, notes


def _config_problems(raw: Mapping[str, Any], file: str) -> list[Problem]:
    merge = "merge it into its base with PEFT, and use the merged model"
    method, task, start = raw.get("peft_type"), raw.get("task_type"), raw.get("init_lora_weights")
    if method not in FIELDS:
        return [Problem("an adapter of another method", file, None, f"peft_type {method!r}", ", ".join(FIELDS), merge)]
    problems = []
    if task not in (None, "CAUSAL_LM", SEQ_CLS):
        allowed = f"CAUSAL_LM, {SEQ_CLS}"
        problems.append(Problem("an adapter for another task", file, None, f"task_type {task!r}", allowed))
    if method != "LORA":
        raw = without_classifiers(raw) if task == SEQ_CLS else raw
        for key, only in (("modules_to_save", (None, [])), ("num_transformer_submodules", (None, 1))):
            if raw.get(key) not in only:
                what = "virtual tokens with more beside them than is supported"
                problems.append(Problem(what, file, None, f"{key}={raw[key]!r}", str(only[1])))
        return problems + _wrong_types(raw, file)
    for key in _OTHER_FUNCTION:
        if raw.get(key) not in (None, False, [], {}, DEFAULTS[key]):
            found = f"{key}={raw[key]!r}"
            problems.append(Problem("a variant of LoRA that is not supported", file, None, found, None, merge))
    if start not in _KEEPS_BASE:
        what = "an adapter for a base that its initialisation changed"
        fix = "convert it to plain LoRA: PEFT's save_pretrained(path_initial_model_for_weight_conversion=...)"
        problems.append(Problem(what, file, None, f"init_lora_weights={start!r}", None, fix))
    return problems + _wrong_types(raw, file)


def without_classifiers(config: Mapping[str, Any]) -> dict[str, Any]:
    """A classifier's config without its head among modules_to_save."""
    others = [name for name in config.get("modules_to_save") or [] if name not in CLASSIFIERS]
    return {**config, "modules_to_save": others or None}


def _wrong_types(raw: Mapping[str, Any], file: str) -> list[Problem]:
    def is_number(value: Any) -> bool:
        return isinstance(value, int | float) and not isinstance(value, bool)

    def is_names(value: Any) -> bool:
        return isinstance(value, list) and all(isinstance(item, str) for item in value)

    def is_pattern(value: Any) -> bool:
        return isinstance(value, dict) and all(is_number(item) and item > 0 for item in value.values())

    def is_whole(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and value > 0

    if raw["peft_type"] != "LORA":
        missing = [] if "num_virtual_tokens" in raw else [Problem("num_virtual_tokens is missing", file)]
        virtual = (
            ("num_virtual_tokens", lambda v: is_whole(v) and v <= 4096, "a whole number from 1 to 4096"),
            ("prompt_tuning_init", lambda v: v in ("RANDOM", "TEXT", "SAMPLE_VOCAB"), "RANDOM, TEXT, SAMPLE_VOCAB"),
            ("init_weights", lambda v: v == "zero", "zero"),
        )
        return missing + _failed(raw, file, virtual)
    checks = (
        ("r", is_whole, "a whole number above 0"),
        ("lora_alpha", is_number, "a number"),
        ("lora_dropout", lambda v: is_number(v) and 0 <= v < 1, "a number from 0 to below 1"),
        ("bias", lambda v: v in ("none", "all", "lora_only"), "none, all, lora_only"),
        ("target_modules", lambda v: isinstance(v, str) or is_names(v), "a list of names or a regular expression"),
        ("modules_to_save", is_names, "a list of names"),
        ("rank_pattern", is_pattern, "names to numbers above 0"),
        ("alpha_pattern", is_pattern, "names to numbers above 0"),
    )
    return _failed(raw, file, checks)


def _failed(raw: Mapping[str, Any], file: str, checks: Iterable[tuple[str, Callable, str]]) -> list[Problem]:
    """The values that are there and are not what they should be."""
    return [
        Problem(f"wrong value for {key}", file, found=repr(raw[key]), allowed=allowed)
        for key, good, allowed in checks
        if raw.get(key) is not None and not good(raw[key])
    ]
