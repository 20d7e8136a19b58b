"""Probe, then trust: two short sequences run packed and by themselves before anything is trained.

An architecture may accept a custom attention and never call it (Bloom), drop masks in silence, or carry state from
one segment to the next (recurrent and convolution layers). Registration proves nothing; numbers do.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface

from shikomi.adapters._adapter import Context
from shikomi.data.packing import Example, pack
from shikomi.errors import BadInput, Problem
from shikomi.model import attention, fused
from shikomi.model.language_model import PACKED, LanguageModel
from shikomi.model.logprobs import log_probabilities

_calls = 0


def packed_attention(
    module,
    query,
    key,
    value,
    attention_mask,
    scaling=None,
    dropout=0.0,
    sliding_window=None,
    softcap=None,
    s_aux=None,
    packed_layout=None,
    **kwargs,
):
    """transformers' attention interface over a packed row: (1, T, heads, D) from (1, heads, T, D)."""
    global _calls
    if packed_layout is None or s_aux is not None or attention_mask is not None:
        raise ValueError("this layer does not pass the packed layout on, or asks for sinks or a mask of its own")
    _calls += 1
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    rules = attention.Rules(float(scaling), sliding_window, softcap)
    k, v = key[0], value[0]
    if packed_layout.prefix:
        k, v = attention.after_prefix(packed_layout.prefix[module.layer_idx], k, v)
    return attention.attention(query[0], k, v, packed_layout, rules)[None], None


AttentionInterface.register(PACKED, packed_attention)


def choose_path(lm: LanguageModel, max_length: int) -> None:
    """Sets the fastest path of `lm` that computes what the model itself computes, and the reason for it.

    Raises BadInput where even one sequence at a time gives other log-probabilities than the model's own head.
    """
    reasons: list[str] = []
    context, stateful = lm.context, _stateful(lm.config, type(lm.model))
    if stateful and context is not None and context.embeddings() is None:
        raise _cannot_serve(lm, context, stateful)
    why = stateful or _refusal(lm.config, max_length + (context.tokens if context else 0))
    if why is None:
        refused = fused.refusal(lm.decoder) if _has_layers(lm) else "no list of layers"
        if refused is None:
            lm.blocks = fused.fuse(lm.decoder, lm.dtypes.storage)
        for path in ("packed",) if refused else ("fused", "packed"):
            lm.path, failure = path, None
            try:
                failure = _mismatch(lm)
            except (ValueError, TypeError, RuntimeError, AttributeError, IndexError) as error:
                failure = f"{type(error).__name__}: {error}"
            if failure is None:
                lm.path_reason = f"not fused: {refused}" if refused else "; ".join(reasons)
                if reasons:  # layers that should be fused and are not: said, never silent
                    lm.notes.append(f"slower path: {lm.path_reason}")
                return
            reasons.append(f"{path}: {failure}")
    lm.path, lm.blocks = "separate", None
    lm.path_reason = why or "; ".join(reasons)
    if context is not None:
        _check_context(lm, context)
    failure = _mismatch(lm)
    if failure is not None:
        raise BadInput(
            [
                Problem(
                    f"architecture {type(lm.model).__name__} cannot be trained here",
                    found=failure,
                    fix="its head does more than a linear map with scale and soft cap",
                )
            ]
        )


def _check_context(lm: LanguageModel, context: Context) -> None:
    """Raises BadInput where the model's own forward does not take the virtual tokens, or takes no notice of them."""
    ids = torch.arange(2, 5, device=lm.device)
    with torch.no_grad():
        try:
            seen = lm.hidden_alone(ids)
        except (ValueError, TypeError, RuntimeError, AttributeError, IndexError) as error:
            raise _cannot_serve(lm, context, f"{type(error).__name__}: {error}") from error
        with lm.adapter_off():
            unseen = lm.hidden_alone(ids)
    if torch.equal(seen, unseen):
        raise _cannot_serve(lm, context, "its forward takes no notice of virtual tokens")


def _cannot_serve(lm: LanguageModel, context: Context, why: str) -> BadInput:
    name, other = ("prefix", "prompt or lora") if context.embeddings() is None else ("prompt", "lora")
    what = f"adapter: {name} cannot serve {type(lm.model).__name__}"
    return BadInput([Problem(what, found=why, fix=f"use adapter: {other}")])


def _has_layers(lm: LanguageModel) -> bool:
    return "layers" in dict(lm.decoder.named_children())


def _stateful(config, kind: Any) -> str | None:
    """Why the layers are not all attention, from the configuration alone."""
    if kind._is_stateful:
        return f"{kind.__name__} carries a state along the row (recurrent layers), which would leak between segments"
    kinds = set(config.to_dict().get("layer_types") or []) - {"full_attention", "sliding_attention"}
    return f"layers of kind {', '.join(sorted(kinds))}" if kinds else None


def _refusal(config, max_length: int) -> str | None:
    """What else short probes cannot see, from the configuration alone."""
    settings = config.to_dict()
    rope = settings.get("rope_parameters") or {}
    for part in [rope, *[r for r in rope.values() if isinstance(r, dict)]]:
        kind_of = part.get("rope_type", "default")
        trained = part.get("original_max_position_embeddings") or settings.get("original_max_position_embeddings")
        trained = trained or settings.get("max_position_embeddings", 0)
        if kind_of in ("longrope", "dynamic") and max_length > trained:
            return f"{kind_of} rotary embeddings choose their factors from the longest sequence of the row"
    return None


def _mismatch(lm: LanguageModel) -> str | None:
    """How packed and separate computation differ, without virtual tokens and with them; None when they agree."""
    if lm.context is None:
        return _gap(lm)
    with lm.adapter_off():
        found = _gap(lm)
    return found or _gap(lm)


def _gap(lm: LanguageModel) -> str | None:
    global _calls
    generator = torch.Generator().manual_seed(1)
    sizes, vocabulary = (5, 9, 3), lm.model.get_input_embeddings().weight.shape[0]
    sequences = [torch.randint(0, vocabulary, (n,), generator=generator) for n in sizes]
    examples = [Example(ids.numpy().astype("int32"), _all_but_first(len(ids)), i) for i, ids in enumerate(sequences)]
    packed = pack(examples, share_prefix=False).to(lm.device)
    tolerance = 2e-3 if lm.dtypes.arithmetic == torch.float32 else 6e-2
    with torch.no_grad():
        own = [_own_logits(lm, ids.to(lm.device)) for ids in sequences]
        alone = torch.cat([logp for logp, _ in own])
        if lm.path != "separate":
            _calls = 0
            together = lm.hidden(packed)
            if lm.path == "packed" and _calls < lm.layers:
                return f"its layers called the packed attention {_calls} times for {lm.layers} layers"
            separate = torch.cat([h for _, h in own])
            gap = _relative(together, separate)
            if not gap < tolerance:
                return f"hidden states of packed and separate rows differ by {gap:.2g}"
            scored = packed.scored
        else:
            together, scored = lm._separate(packed, packed.scored)
        ours = log_probabilities(together, scored, packed.targets, lm.head, lm.shape)
    gap = float((ours - alone).abs().max())
    return None if gap < 50 * tolerance else f"log-probabilities differ from the model's own head by {gap:.2g}"


def _all_but_first(n: int):
    return torch.cat([torch.zeros(1), torch.ones(n - 1)]).bool().numpy()


def _own_logits(lm: LanguageModel, ids: Tensor) -> tuple[Tensor, Tensor]:
    """log p of each next token (S - 1,) and hidden states (S, H), both by the model's own forward."""
    with lm.generating():
        logits = lm.model(**lm.alone(lm.model, ids)).logits[0, -len(ids) :].float()
    logp = logits.log_softmax(-1)[:-1].gather(1, ids[1:, None])[:, 0]
    return logp, lm.hidden_alone(ids)


def _relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).float().norm() / b.float().norm().clamp_min(1e-12))
