"""Adapter arithmetic: several LoRA adapters of one base as one, as PEFT's `add_weighted_adapter` makes it.

Each adapter adds s B A to W0 (s its scaling). `cat` is the weighted sum itself: ranks add up. `linear` sums A and B
each by itself, which is not the sum of the products. The other methods first drop or elect entries. A name that ends
in `_svd` works on the products s B A instead of on A and B, and keeps the best approximation of rank r.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from shikomi.adapters._targets import pattern_of
from shikomi.checkpoint.arithmetic import RULES, Settings, merged, product_svd, svd
from shikomi.checkpoint.bottleneck_format import is_bottleneck
from shikomi.checkpoint.peft_config import CONFIG, DEFAULTS
from shikomi.checkpoint.peft_format import PREFIX, Adapter, load_adapter, lora_modules, save_adapter
from shikomi.errors import BadInput, Problem, nearest
from shikomi.model.check import listing_of

DENSITY = 0.5  # share of the entries that the dropping methods keep, where it is not given
SIDES = (("lora_A.weight", "lora_B.weight"), ("lora_embedding_A", "lora_embedding_B"))
SAVED_BASE = ".base_layer.weight"  # PEFT saves the base's embedding and head beside an adapter on them
DROPPING = tuple(name + end for name in RULES if name != "linear" for end in ("", "_svd"))
METHODS = ("cat", "svd", "linear", *DROPPING)


class Update(NamedTuple):
    """What one adapter adds to one module, weight * scaling * B A, with A (r, in) and B (out, r) in fp32."""

    weight: float
    scaling: float
    a: Tensor
    b: Tensor


def combine(
    adapters: Sequence[Adapter],
    weights: Sequence[float],
    method: str = "cat",
    density: float | None = None,
    majority_sign_method: str = "total",
    r: int | None = None,
    seed: int = 0,
    names: Sequence[str] = (),
) -> Adapter:
    """One LoRA adapter (fp32, scaling 1) from several of the same base; a module that one of them lacks adds nothing.

    method: one of METHODS. density: share of the entries that ties, dare and magnitude_prune keep. r: rank after svd,
    by default the largest of the adapters. seed: of DARE. names: what errors call the adapters. Raises BadInput, every
    problem at once: settings out of range, adapters that are not LoRA alone or not of one base, and for the methods
    on A and B different ranks.
    """
    names = names or [f"adapter {i + 1}" for i in range(len(adapters))]
    problems = _setting_problems(len(adapters), weights, method, density, majority_sign_method, r)
    problems += [p for adapter, name in zip(adapters, names, strict=True) for p in _kind_problems(adapter, name)]
    problems = problems or [*_base_problems(adapters, names)]
    if problems:
        raise BadInput(problems)
    updates = _updates(adapters, weights)
    rule = method.removesuffix("_svd")
    _check_shapes(updates, names, method)
    settings = Settings(density or DENSITY, majority_sign_method, torch.Generator().manual_seed(seed))
    rank = r or max(u.a.shape[0] for some in updates.values() for _, u in some)
    pairs: dict[str, tuple[Tensor, Tensor]] = {}
    kept = whole = 0.0
    for path, numbered in updates.items():
        some = [update for _, update in numbered]
        if method == "cat":
            pairs[path] = _side_by_side(some)
        elif method == rule and method != "svd":
            pairs[path] = _of_factors(rule, settings, some)
        else:
            a, s, b = _svd_of_sum(some) if rule == "svd" else svd(_of_products(rule, settings, some))
            pairs[path] = a[:rank].float().contiguous(), (b * s)[:, :rank].float().contiguous()
            kept, whole = kept + float(s[:rank].square().sum()), whole + float(s.square().sum())
    notes = [note for adapter in adapters for note in adapter.notes]
    if whole:
        notes.append(f"rank {rank} keeps {kept / whole:.2%} of the squared norm of what the adapters add together")
    tensors: dict[str, Tensor] = {}
    for path, (a, b) in pairs.items():
        side_a, side_b = SIDES[_is_embedding(adapters, path)]
        tensors |= {f"{PREFIX}{path}.{side_a}": a, f"{PREFIX}{path}.{side_b}": b}
    saved = {name: t for adapter in adapters for name, t in adapter.tensors.items() if name.endswith(SAVED_BASE)}
    return Adapter(_config(adapters, {p: a.shape[0] for p, (a, _) in pairs.items()}), {**tensors, **saved}, notes)


def _side_by_side(some: Sequence[Update]) -> tuple[Tensor, Tensor]:
    """A (sum of r, in) and B (out, sum of r), weight and scaling in B: their product is the weighted sum."""
    return torch.cat([u.a for u in some]), torch.cat([u.b * (u.weight * u.scaling) for u in some], 1)


def _svd_of_sum(some: Sequence[Update]) -> tuple[Tensor, Tensor, Tensor]:
    a, b = _side_by_side(some)
    return product_svd(b, a)


def _of_factors(rule: str, settings: Settings, some: Sequence[Update]) -> tuple[Tensor, Tensor]:
    """The rule on A and on B, each weighted by the root of |weight * scaling|; A bears the sign."""
    factors = [u.weight * u.scaling for u in some]
    roots = [math.sqrt(abs(f)) for f in factors]
    signed = [math.copysign(root, f) for root, f in zip(roots, factors, strict=True)]
    return merged(rule, settings, [u.a for u in some], signed), merged(rule, settings, [u.b for u in some], roots)


def _of_products(rule: str, settings: Settings, some: Sequence[Update]) -> Tensor:
    """The rule on the updates themselves (out, in), where the papers have it."""
    return merged(rule, settings, [(u.b @ u.a) * u.scaling for u in some], [u.weight for u in some])


def _setting_problems(
    count: int, weights: Sequence[float], method: str, density: float | None, sign_method: str, r: int | None
) -> list[Problem]:
    problems = []
    if not count:
        problems.append(Problem("no adapter to combine", fix="name two runs or adapter folders"))
    if len(weights) != count:
        fix = "give one weight for each adapter, in the same order"
        problems.append(Problem("as many weights as adapters", found=f"{len(weights)} for {count} adapters", fix=fix))
    for weight in weights:
        if not math.isfinite(weight):
            problems.append(Problem("a weight is not a finite number", found=str(weight), allowed="such as 0.5 or -1"))
    if method not in METHODS:
        close = nearest(method, METHODS)
        hint = f"did you mean {close!r}?" if close else None
        problems.append(Problem(f"no such method: {method!r}", allowed=", ".join(METHODS), fix=hint))
        return problems
    if density is not None and method not in DROPPING:
        what = f"{method} drops nothing and takes no density"
        problems.append(Problem(what, found=str(density), allowed=", ".join(DROPPING)))
    elif density is not None and not 0 < density <= 1:
        problems.append(Problem("density is no share", found=str(density), allowed="above 0, up to 1"))
    if sign_method not in ("total", "frequency"):
        problems.append(Problem("unknown majority_sign_method", found=repr(sign_method), allowed="total, frequency"))
    if r is not None and not method.endswith("svd"):
        allowed = ", ".join(m for m in METHODS if m.endswith("svd"))
        problems.append(Problem(f"{method} cannot choose its rank", found=f"r={r}", allowed=allowed))
    elif r is not None and r < 1:
        problems.append(Problem("a rank below 1", found=f"r={r}", allowed="1 or more"))
    return problems


def _kind_problems(adapter: Adapter, name: str) -> list[Problem]:
    """Why an adapter is not A and B alone."""
    kind = adapter.config.get("peft_type", "LORA")
    switch = "open the base and switch between adapters: add_adapter(name, folder), use(name)"
    if kind in ("PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING"):
        what = "virtual tokens are no change of weights: such adapters cannot be added up"
        return [Problem(what, name, found=f"peft_type {kind}", allowed="LORA", fix=switch)]
    if kind != "LORA":
        what = "only low-rank updates can be added up, and this adapter computes another function"
        return [Problem(what, name, found=f"peft_type {kind}", allowed="LORA", fix=switch)]
    if adapter.config.get("use_dora"):
        what = "DoRA scales every row of W0 + s B A: the effects of two such adapters do not add up"
        return [Problem(what, name, found="use_dora", allowed="LoRA without DoRA", fix=switch)]
    sides = tuple("." + side for pair in SIDES for side in pair)
    others = [n.removeprefix(PREFIX) for n in adapter.tensors if not n.endswith((*sides, SAVED_BASE))]
    if others:
        what = "the adapter holds weights that were trained whole (modules_to_save, bias), which do not add up"
        more = f" and {len(others) - 3} more" if len(others) > 3 else ""
        return [Problem(what, name, found=", ".join(others[:3]) + more, allowed="A and B alone", fix=switch)]
    return []


def _base_problems(adapters: Sequence[Adapter], names: Sequence[str]) -> Iterable[Problem]:
    first = adapters[0]
    saved: dict[str, Tensor] = {}
    for adapter, name in zip(adapters, names, strict=True):
        for key in ("base_model_name_or_path", "revision"):
            ours, theirs = first.config.get(key), adapter.config.get(key)
            if ours != theirs and (key != "revision" or None not in (ours, theirs)):
                fix = f"if that is the same model, write the same {key} into both files {CONFIG}"
                found = f"{key} {theirs!r}, and of {names[0]} {ours!r}"
                yield Problem("adapters of different bases", name, found=found, fix=fix)
        for path, tensor in adapter.tensors.items():
            if path.endswith(SAVED_BASE) and not _same(saved.setdefault(path, tensor), tensor):
                what = "the adapter comes with a base weight of its own, which differs from another adapter's"
                yield Problem(what, name, found=path)


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a.float(), b.float())


def _updates(adapters: Sequence[Adapter], weights: Sequence[float]) -> dict[str, list[tuple[int, Update]]]:
    """Module path -> what each adapter that has it adds there, with the adapter's number."""
    found: dict[str, list[tuple[int, Update]]] = {}
    for number, (adapter, weight) in enumerate(zip(adapters, weights, strict=True)):
        for path in lora_modules(adapter.tensors):
            side_a, side_b = SIDES[_is_embedding([adapter], path)]
            a, b = (adapter.tensors[f"{PREFIX}{path}.{side}"].float() for side in (side_a, side_b))
            update = Update(weight, _scaling(adapter.config, path, a.shape[0]), a, b)
            found.setdefault(path, []).append((number, update))
    return dict(sorted(found.items()))


def _is_embedding(adapters: Sequence[Adapter], path: str) -> bool:
    return any(f"{PREFIX}{path}.{SIDES[1][0]}" in adapter.tensors for adapter in adapters)


def _scaling(config: Mapping[str, Any], path: str, r: int) -> float:
    alpha = pattern_of(config["alpha_pattern"], path, config["lora_alpha"])
    return alpha / (math.sqrt(r) if config["use_rslora"] else r)


def _check_shapes(updates: Mapping[str, list[tuple[int, Update]]], names: Sequence[str], method: str) -> None:
    """Raises BadInput where a module has other sides in another adapter, or, where A and B are summed, another rank."""
    problems = []
    for path, numbered in updates.items():
        (one, first), *rest = numbered
        for other, update in rest:
            sizes = [(u.b.shape[0], u.a.shape[1]) for u in (first, update)]
            if sizes[0] != sizes[1]:
                found = f"{path} is {sizes[1]} there, and {sizes[0]} in {names[one]}"
                problems.append(Problem("an adapter for another base", names[other], found=found))
            elif method in RULES and first.a.shape != update.a.shape:
                found = f"{path} has r={update.a.shape[0]} there, and r={first.a.shape[0]} in {names[one]}"
                fix = "--method cat (exact) or svd"
                problems.append(Problem(f"{method} needs adapters of equal rank", names[other], found=found, fix=fix))
    if problems:
        more = [Problem(f"and {len(problems) - 3} more modules")] if len(problems) > 3 else []
        raise BadInput([*problems[:3], *more])


def _config(adapters: Sequence[Adapter], ranks: Mapping[str, int]) -> dict[str, Any]:
    """Fields of PEFT's LoraConfig; `lora_alpha` equals r everywhere, so that the scaling is 1."""
    configs = [adapter.config for adapter in adapters]
    r = Counter(ranks.values()).most_common(1)[0][0]
    by_leaf: dict[str, set[int]] = {}
    for path, rank in ranks.items():
        by_leaf.setdefault(path.rpartition(".")[2], set()).add(rank)
    pattern = {}
    for path, rank in ranks.items():
        leaf = path.rpartition(".")[2]
        if by_leaf[leaf] != {r}:
            pattern[leaf if len(by_leaf[leaf]) == 1 else path] = rank
    limits = ("exclude_modules", "layers_to_transform", "layers_pattern")
    plain = all(isinstance(c["target_modules"], list) and not any(c.get(key) for key in limits) for c in configs)
    return {
        **DEFAULTS,
        "base_model_name_or_path": configs[0].get("base_model_name_or_path"),
        "revision": next((c["revision"] for c in configs if c.get("revision")), None),
        "fan_in_fan_out": any(c.get("fan_in_fan_out") for c in configs),
        "lora_dropout": max(c.get("lora_dropout", 0.0) for c in configs),
        "target_modules": sorted({n for c in configs for n in c["target_modules"]} if plain else ranks),
        "r": r,
        "lora_alpha": r,
        "rank_pattern": pattern,
        "alpha_pattern": pattern,
    }


def combine_adapters(
    folders: Sequence[str | Path],
    output: str | Path,
    weights: Sequence[float] | None = None,
    method: str = "cat",
    density: float | None = None,
    majority_sign_method: str = "total",
    r: int | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Combines the adapters of runs or PEFT folders and saves the result like PEFT, in fp32; says what was made.

    weights: equal shares where they are not given; the other arguments are those of `combine`. Raises BadInput, also
    for a folder without an adapter and for an `output` that is not empty.
    """
    output = Path(output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise BadInput([Problem("the output folder is not empty", str(output), fix="choose another --output")])
    places = [adapter_folder(Path(folder)) for folder in folders]
    adapters = [_read(place) for place in places]
    names = [str(folder) for folder in folders]
    shares = [1 / len(names)] * len(names) if weights is None else list(weights)
    made = combine(adapters, shares, method, density, majority_sign_method, r, seed, names)
    base, revision = made.config["base_model_name_or_path"], made.config["revision"]
    parts = ", ".join(f"{weight:g} x {Path(name).name}" for name, weight in zip(names, shares, strict=True))
    drops = f", density {density or DENSITY:g}" if method in DROPPING else ""
    how = f"{len(names)} adapters combined ({method}{drops}): {parts}"
    save_adapter(output, made.config, made.tensors, base, dtype="fp32", revision=revision, method=how)
    return {
        "output": str(output),
        "base": base,
        "method": method,
        "adapters": [{"adapter": n, "weight": w} for n, w in zip(names, shares, strict=True)],
        "r": max([made.config["r"], *made.config["rank_pattern"].values()]),
        "modules": len(lora_modules(made.tensors)),
        "parameters": sum(t.numel() for t in made.tensors.values()),
        "notes": made.notes,
    }


def adapter_folder(path: Path) -> Path:
    """The folder of a run's final adapter, or an adapter folder itself. Raises BadInput."""
    if not path.is_dir():
        close = nearest(path.name, [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else [])
        fix = f"did you mean {path.parent / close}?" if close else "give runs, or folders with an adapter"
        raise BadInput([Problem("no such run or adapter folder", str(path), found="nothing there", fix=fix)])
    folder = path / "final" if (path / "final").is_dir() else path
    if (folder / CONFIG).is_file():
        return folder
    found, allowed = listing_of(folder), "runs and folders with an adapter"
    if (folder / "config.json").is_file():
        raise BadInput([Problem("a whole model, which has no A and B to combine", str(path), None, found, allowed)])
    if (path / "run.json").is_file():
        fix = f"shikomi resume {path}"
        raise BadInput([Problem("the run is not finished: it has no final/", str(path), None, found, allowed, fix)])
    raise BadInput([Problem(f"no adapter here: {CONFIG} is missing", str(path), None, found, allowed)])


def _read(folder: Path) -> Adapter:
    """An adapter whose base has a name that means the same from another folder."""
    if is_bottleneck(folder):
        return Adapter({"peft_type": "BOTTLENECK"}, {}, [])  # told apart, and refused with the others
    adapter = load_adapter(folder)
    base = adapter.config["base_model_name_or_path"]
    if not isinstance(base, str) or not base:
        fix = f"write the base model's folder or hub id into {CONFIG}"
        raise BadInput([Problem("base_model_name_or_path is empty", str(folder), found=repr(base), fix=fix)])
    beside = folder / base
    found = beside if base.startswith(".") and beside.exists() else Path(base)
    name = str(found.resolve()) if found.is_dir() else base
    return adapter._replace(config={**adapter.config, "base_model_name_or_path": name})
