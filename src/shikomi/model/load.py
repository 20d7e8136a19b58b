"""From a resolved folder to a LanguageModel: load, replace linear layers, attach the adapter, choose the path."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.pytorch_utils import Conv1D

from shikomi.adapters._adapter import Adapter, Attached
from shikomi.adapters._attach import PREFIX, OnLayers
from shikomi.adapters._modules import TrainedCopy
from shikomi.adapters.lora import Lora
from shikomi.errors import BadInput, Problem
from shikomi.model.device import Dtypes, choose_device, choose_dtypes, tune_allocator
from shikomi.model.heads import SCORE, classifier_of, deviation, fresh_head, saved_head, tie_head
from shikomi.model.language_model import LanguageModel
from shikomi.model.logprobs import Shape
from shikomi.model.probe import choose_path
from shikomi.model.task import Task, is_classifier
from shikomi.quant._dense import Dense, widen_embedding
from shikomi.quant._linear import PlainLinear
from shikomi.quant._loftq import Correcting
from shikomi.quant._quantized import Scheme
from shikomi.quant._serialized import from_config
from shikomi.quant._streaming import load_quantized


def load_model(
    folder: str,
    adapter: Adapter | None = None,
    dtype: str = "auto",
    device: str = "auto",
    seed: int = 0,
    max_length: int = 1024,
    new_tokens: tuple[str, ...] = (),
    tokenizer_folder: str | None = None,
    quant: Scheme | None = None,
    task: Task = "policy",
) -> LanguageModel:
    """The model of a transformers folder; `adapter` is put on it fresh, None leaves everything frozen.

    `quant` stores the base's linear maps in few bits; a folder that is stored so already needs none. A reward model has
    a scalar head, that of the folder or a fresh one, and no use for the head for tokens.

    Raises BadInput for an architecture that is not a causal language model.
    """
    tune_allocator()
    where = choose_device(device)
    dtypes = choose_dtypes(dtype, where)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder or folder, local_files_only=True)
    if quant is not None and isinstance(adapter, Lora) and adapter.init_lora_weights == "loftq":
        quant = Correcting(quant, max([adapter.r, *(adapter.rank_pattern or {}).values()]), adapter.loftq_iter)
    model, notes = _load(folder, dtypes, where, quant, task)
    notes += _grow(model, tokenizer, new_tokens)
    if new_tokens and isinstance(adapter, Lora):
        adapter, note = _with_embeddings(model, adapter)
        notes.append(note)
    lm = wrap(model, tokenizer, adapter, dtypes, where, seed)
    if task == "reward":
        notes.append(_put_scalar_head(lm, folder, seed))
    choose_path(lm, max_length)
    lm.notes = notes + lm.notes
    return lm


def count_parameters(folder: str, adapter: Adapter, task: Task = "policy") -> tuple[int, int]:
    """(trained, total) parameters from a folder's config alone: no weight is read."""
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    meta = torch.device("meta")
    if task == "reward":
        tie_head(model)
    lm = wrap(model, None, adapter, Dtypes(torch.float32, torch.float32), meta)
    if task == "reward":
        lm.scalar = fresh_head(config, 0, meta)
    return lm.trainable_parameters, lm.total_parameters


def _put_scalar_head(lm: LanguageModel, folder: str, seed: int) -> str:
    """Gives a model the scalar head of its folder, or a fresh one; returns a line for the user.

    Raises BadInput where the adapter trains the head for tokens, which a reward model has not.
    """
    lm.scalar = fresh_head(lm.config, seed, lm.device)
    head = next(name for name, module in lm.model.named_modules() if module is lm.model.get_output_embeddings())
    names = lm.attached.parameters() if lm.attached is not None else {}
    if found := [name for name in names if name.startswith(f"{PREFIX}{head}.")]:
        what = f"the adapter trains {head}, the head for tokens, which a reward model has not"
        raise BadInput([Problem(what, found=found[0], fix=f"take {head} out of target_modules and modules_to_save")])
    if is_classifier(Path(folder)):
        lm.scalar.load(saved_head(Path(folder)), folder)
        return f"value head: {SCORE} of {folder}"
    return f"value head: a fresh {SCORE}, normal with deviation {deviation(lm.config):.3g}"


def wrap(
    model, tokenizer, adapter: Adapter | None, dtypes: Dtypes, device: torch.device, seed: int = 0
) -> LanguageModel:
    """A loaded transformers model as a LanguageModel, without the choice of a path."""
    own_attention = model.config._attn_implementation
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    _replace_linears(model, dtypes.arithmetic)
    _widen_the_rest(model, dtypes.arithmetic)
    widen_embedding(model.get_input_embeddings(), dtypes.arithmetic)
    model.eval()
    attached = None if adapter is None else attach_to(model, tokenizer, adapter, dtypes, seed)
    return LanguageModel(
        stop_ids=sorted(stop_ids_of(model, tokenizer)),
        model=model,
        tokenizer=tokenizer,
        device=device,
        dtypes=dtypes,
        attached=attached,
        own_attention=own_attention,
        shape=_head_shape(model.config),
    )


def put_on(
    lm: LanguageModel, adapter: Adapter, seed: int, max_length: int, frozen: dict[str, tuple[Tensor, Tensor]]
) -> None:
    """Puts a fresh adapter on a model that has none on; `frozen`: A and scaled B of an earlier one, kept under it."""
    lm.attached = attach_to(lm.model, lm.tokenizer, adapter, lm.dtypes, seed)
    if frozen:
        assert isinstance(lm.attached, OnLayers)
        lm.attached.keep_frozen(lm.model, frozen)
    lm.blocks = None
    choose_path(lm, max_length)


def attach_to(model: Any, tokenizer: Any, adapter: Adapter, dtypes: Dtypes, seed: int) -> Attached | None:
    """Puts a fresh adapter on a bare model; copies of embeddings that it trains are multiplied in the arithmetic."""
    head = model.get_output_embeddings()
    head_name = next((name for name, module in model.named_modules() if module is head), None)
    attached = adapter.attach(model, head_name, seed, tokenizer)
    if isinstance(attached, OnLayers):
        for copied in attached.copies.values():
            if isinstance(copied.copy, nn.Embedding):
                widen_embedding(copied.copy, dtypes.arithmetic)
    return attached


def stop_ids_of(model: Any, tokenizer: Any) -> set[int]:
    """Tokens that end an answer: what the model's two configs and the tokenizer, if there is one, say."""
    ends = [model.generation_config.eos_token_id, model.config.eos_token_id]
    ends += [tokenizer.eos_token_id] if tokenizer else []
    return {i for end in ends if end is not None for i in (end if isinstance(end, list) else [end])}


def _load(folder: str, dtypes: Dtypes, device: torch.device, quant: Scheme | None, task: Task) -> tuple[Any, list[str]]:
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise BadInput(
            [
                Problem(
                    f"{folder}: {config.model_type} is not a causal language model",
                    allowed="decoder-only architectures of transformers",
                )
            ]
        )
    no_dropout(config)
    passed_over: frozenset[str] = frozenset()
    if task == "reward":
        passed_over = classifier_of(config).dropped | {SCORE}
        config.tie_word_embeddings = config.tie_word_embeddings or is_classifier(Path(folder))
    scheme = quant or from_config(config.to_dict().get("quantization_config"), folder)
    if scheme is not None:
        config.tie_word_embeddings = config.tie_word_embeddings or task == "reward"
        how = (scheme, dtypes.storage, dtypes.arithmetic, device, passed_over)
        model, notes = load_quantized(Path(folder), config, *how)
    else:
        kind = AutoModelForCausalLM
        model = kind.from_pretrained(folder, config=config, dtype=dtypes.storage, local_files_only=True)
        model, notes = model.to(device), []
    if task == "reward":
        tie_head(model)
    return model, notes


def no_dropout(config) -> None:
    """Sets the base model's own dropout to 0: fine-tuning regularizes through the adapter."""
    for key, value in config.to_dict().items():
        if isinstance(value, float) and key.endswith(("dropout", "pdrop", "_drop", "dropout_rate", "dropout_prob")):
            setattr(config, key, 0.0)


def _grow(model, tokenizer, new_tokens: tuple[str, ...]) -> list[str]:
    notes = []
    added = tokenizer.add_tokens(list(new_tokens)) if new_tokens else 0
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        _mean_rows(model, rows)
        notes.append(f"vocabulary grown from {rows} to {len(tokenizer)} rows ({added} new tokens)")
    return notes


def _mean_rows(model, rows: int) -> None:
    """New rows start as the mean of the old ones, the same way every time."""
    with torch.no_grad():
        for module in {model.get_input_embeddings(), model.get_output_embeddings()}:
            module.weight[rows:] = module.weight[:rows].float().mean(0).to(module.weight.dtype)


def _with_embeddings(model, adapter: Lora) -> tuple[Lora, str]:
    names = {id(m): n.rsplit(".", 1)[-1] for n, m in model.named_modules()}
    wanted = [names[id(m)] for m in (model.get_input_embeddings(), model.get_output_embeddings())]
    saved = list(dict.fromkeys([*(adapter.modules_to_save or []), *wanted]))
    return replace(adapter, modules_to_save=saved), f"new tokens: {' and '.join(wanted)} are trained whole"


def _replace_linears(model: nn.Module, arithmetic: torch.dtype) -> None:
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                assert isinstance(child.weight, nn.Parameter)
                parent._modules[name] = Dense(child.weight, child.bias, arithmetic)
            elif type(child) is Conv1D:
                assert isinstance(child.weight, nn.Parameter) and isinstance(child.bias, nn.Parameter)
                parent._modules[name] = Dense(child.weight, child.bias, arithmetic, transposed=True)


def _widen_the_rest(model: nn.Module, arithmetic: torch.dtype) -> None:
    """Casts what is not a Dense or the input embedding (norms, experts, positions): transformers multiplies those."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()  # type: ignore[operator]
    for module in model.modules():
        if isinstance(module, PlainLinear | TrainedCopy) or module is embedding or module is head:
            continue
        for parameter in module.parameters(recurse=False):
            parameter.data = parameter.data.to(arithmetic)


def _head_shape(config) -> Shape:
    """The logit scale and soft cap of an architecture, from the keys that transformers uses for them."""
    settings = config.to_dict()
    scale = float(settings.get("logit_scale") or 1.0)  # Cohere
    if settings.get("logits_scaling"):
        scale /= float(settings["logits_scaling"])  # Granite
    return Shape(scale, settings.get("final_logit_softcapping"))  # Gemma 2, 3
