"""A whole model as a plain transformers folder: after full fine-tuning, or with its adapter merged into the weights."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from shikomi.adapters._attach import OnLayers
from shikomi.adapters._modules import LoraEmbedding, TrainedCopy
from shikomi.checkpoint.classifier import save_classifier
from shikomi.checkpoint.files import saving
from shikomi.errors import BadInput, Problem
from shikomi.model.language_model import LanguageModel
from shikomi.quant._dense import Dense
from shikomi.quant._linear import Base
from shikomi.quant._quantized import Quantized

MergeDtype = Literal["auto", "bf16", "fp32", "bf16-stochastic"]
SMALL_MODEL = 1_000_000_000  # parameters below which auto merges to fp32: small updates vanish in bf16
LARGE_DRIFT = 0.05  # of the adapter's own effect on the logits, above which auto gives up bf16

PROBE_TEXTS = (
    "The capital of France is Paris, and the capital of Japan is Tokyo.",
    "To make bread you need flour, water, salt and yeast. First mix the flour with the",
    "def add(a, b):\n    return a + b\n\nprint(add(2, 3))",
    "Dear Sir or Madam, thank you for your message of last week about the order that did not arrive.",
)


def merge_weights(lm: LanguageModel, dtype: torch.dtype, stochastic: bool = False, seed: int = 0) -> None:
    """Adds every low-rank update to its base weight in place, rounds to `dtype` once, and takes the adapter's part off.

    `stochastic` rounds to bf16 up or down with the probability that keeps the mean, so that updates below half a
    unit in the last place do not all vanish.
    """
    if not isinstance(lm.attached, OnLayers):
        return
    generator = torch.Generator().manual_seed(seed)
    for module in lm.attached.wrapped().values():
        if isinstance(module, LoraEmbedding):
            delta = (module.lora_embedding_B.detach() @ module.lora_embedding_A.detach()).t() * module.scaling
            merged = module.inner.weight.detach().float() + delta
            module.inner.weight = _parameter(_rounded(merged, dtype, stochastic, generator))
        else:
            merged = _rounded(module.merged_weight(), dtype, stochastic, generator)
            module.inner = _dense(module.inner, merged)
        module.enabled = False
    for path, base in list(lm.model.named_modules()):
        if isinstance(base, Quantized):  # what has no adapter leaves its few bits too
            weight = _rounded(base.full_weight(), dtype, stochastic, generator)
            _put(lm.model, path, _dense(base, weight))
    for copied in lm.attached.copies.values():
        for parameter in copied.copy.parameters():
            parameter.data = _rounded(parameter.detach(), dtype, stochastic, generator)


def _put(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    model.get_submodule(parent)._modules[name] = module


def _dense(base: Base, weight: Tensor) -> Dense:
    """A dense map with this weight (out, in), laid out in memory as the base had it."""
    transposed = isinstance(base, Dense) and base.transposed
    return Dense(_parameter(weight.t() if transposed else weight), base.bias, base.dtype, transposed)


def _parameter(weight: Tensor) -> nn.Parameter:
    """A parameter of its own, so that a tied one stays as it was."""
    return nn.Parameter(weight.contiguous(), requires_grad=False)


def _rounded(weight: Tensor, dtype: torch.dtype, stochastic: bool, generator: torch.Generator) -> Tensor:
    if not stochastic or dtype != torch.bfloat16:
        return weight.to(dtype)
    bits = weight.cpu().float().contiguous().view(torch.int32)
    noise = torch.randint(0, 1 << 16, bits.shape, dtype=torch.int32, generator=generator)
    return ((bits + noise) & -65536).view(torch.float32).to(torch.bfloat16).to(weight.device)


def state_dict(lm: LanguageModel, dtype: torch.dtype) -> dict[str, Tensor]:
    """Weights by transformers' names, without an adapter's parts; merge first where there is an adapter."""
    found: dict[str, Tensor] = {}
    for path, module in lm.model.named_modules(remove_duplicate=False):
        for name, tensor in [*module.named_parameters(recurse=False), *_persistent(module)]:
            parts = [*path.split("."), name]
            if any(part.startswith("lora_") for part in parts) or "original" in parts:
                continue
            plain = ".".join(part for part in parts if part not in ("inner", "copy", ""))
            found[plain] = tensor.detach().to(dtype) if tensor.is_floating_point() else tensor.detach()
    return found


def _persistent(module: nn.Module) -> list[tuple[str, Tensor]]:
    hidden = module._non_persistent_buffers_set
    return [(n, b) for n, b in module.named_buffers(recurse=False) if n not in hidden]


def save_model(lm: LanguageModel, folder: Path, dtype: torch.dtype) -> None:
    """Writes a folder that transformers loads by itself: config, safetensors, tokenizer, chat template.

    A reward model becomes a sequence classification model.
    """
    copied: dict[str, TrainedCopy] = lm.attached.copies if isinstance(lm.attached, OnLayers) else {}
    if lm.scalar is not None:
        save_classifier(lm, folder, state_dict(lm, dtype), dtype)
        return
    untied = any(m.active is lm.head for m in copied.values()) or (
        lm.model.get_input_embeddings().weight is not lm.head.weight
    )
    weights = state_dict(lm, dtype)
    config = lm.config
    before = (config.dtype, config.tie_word_embeddings)
    config.dtype, config.tie_word_embeddings = dtype, bool(before[1] and not untied)
    try:
        with saving("the model", folder):
            folder.mkdir(parents=True, exist_ok=True)
            lm.model.save_pretrained(str(folder), state_dict=weights)
            lm.tokenizer.save_pretrained(str(folder))
    finally:
        config.dtype, config.tie_word_embeddings = before


def merge(
    lm: LanguageModel, output: Path, dtype: MergeDtype = "auto", texts: Sequence[Sequence[int]] = (), seed: int = 0
) -> dict[str, Any]:
    """Merges the adapter into the weights and saves the model; returns what that did to the logits.

    `texts` are token ids on which logits are compared; without them a few sentences serve. Raises BadInput for a
    model without an adapter and for a folder that is not empty.
    """
    if lm.attached is None:
        raise BadInput([Problem("there is no adapter to merge: this is a full model already", found=lm.origin)])
    if not isinstance(lm.attached, OnLayers):
        kind = lm.attached.options.name
        what = f"adapter: {kind} cannot be merged: its effect is no change of the base's weights"
        raise BadInput([Problem(what, found=lm.origin, fix="use it as it is: every command takes its folder")])
    if output.exists() and any(output.iterdir()):
        raise BadInput([Problem("the output folder is not empty", str(output), fix="choose another --output")])
    probes = [list(t) for t in texts] or [lm.tokenizer(t)["input_ids"] for t in PROBE_TEXTS]
    with lm.adapter_off():
        base = _logits(lm, probes)
    adapted = _logits(lm, probes)
    effect = float((adapted - base).abs().mean())
    notes = []
    chosen = (
        torch.float32 if dtype == "fp32" or (dtype == "auto" and lm.total_parameters < SMALL_MODEL) else torch.bfloat16
    )
    if dtype == "auto" and chosen == torch.bfloat16:
        kept = {p: (m.inner, m.inner.weight) for p, m in lm.attached.wrapped().items()}
        few = {p: m for p, m in lm.model.named_modules() if isinstance(m, Quantized)}
        copies = [(p, p.data) for copied in lm.attached.copies.values() for p in copied.copy.parameters()]
        merge_weights(lm, chosen)
        if float((_logits(lm, probes) - adapted).abs().mean()) > LARGE_DRIFT * effect:
            chosen = torch.float32
            notes.append("bf16 would have lost part of the update: merged to fp32")
        for path, module in lm.attached.wrapped().items():
            module.inner, weight = kept[path]
            if isinstance(module, LoraEmbedding):
                module.inner.weight = weight
            module.enabled = True
        for path, stored in few.items():
            _put(lm.model, path, stored)
        for parameter, data in copies:
            parameter.data = data
    merge_weights(lm, chosen, stochastic=dtype == "bf16-stochastic", seed=seed)
    merged = _logits(lm, probes)
    drift = (merged - adapted).abs()
    save_model(lm, output, chosen)
    found = {
        "output": str(output),
        "dtype": str(chosen).removeprefix("torch."),
        "max_logit_drift": float(drift.max()),
        "mean_logit_drift": float(drift.mean()),
        "adapter_effect": effect,
        "lost_share": float(drift.mean()) / max(effect, 1e-12),
        "notes": notes,
    }
    if lm.scalar is not None:
        return found
    log_p, log_q = adapted.log_softmax(-1), merged.log_softmax(-1)
    return found | {
        "kl": float((log_p.exp() * (log_p - log_q)).sum(-1).mean()),
        "top1_agreement": float((adapted.argmax(-1) == merged.argmax(-1)).float().mean()),
    }


def _logits(lm: LanguageModel, texts: Sequence[Sequence[int]]) -> Tensor:
    """(sum of lengths, V) in fp32, by transformers' own forward; of a reward model (sum of lengths, 1)."""
    with torch.no_grad(), lm.generating():
        if lm.scalar is not None:
            h = torch.cat([lm.hidden_alone(torch.tensor(list(t), device=lm.device)) for t in texts])
            return lm.scalar.values(h)[:, None].cpu()
        rows = [lm.model(input_ids=torch.tensor([list(t)], device=lm.device), use_cache=False).logits[0] for t in texts]
    return torch.cat(rows).float().cpu()
