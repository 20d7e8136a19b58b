"""Whether a model folder can be trained: config, complete safetensors, an adapter that fits its base; without torch."""

from __future__ import annotations

import json
import re
import struct
from collections import Counter
from collections.abc import Iterable
from math import prod
from pathlib import Path
from typing import Any

from shikomi.errors import BadInput, Problem, nearest

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
LONGEST_HEADER = 100_000_000  # bytes; the limit of the safetensors library itself
_BITS = {
    "F64": 64, "I64": 64, "U64": 64, "C64": 64, "F32": 32, "I32": 32, "U32": 32, "F16": 16, "BF16": 16,
    "I16": 16, "U16": 16, "I8": 8, "U8": 8, "BOOL": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
}  # fmt: skip


def read_safetensors_header(path: Path) -> dict[str, dict[str, Any]]:
    """Tensor name -> {dtype, shape, data_offsets} of a complete safetensors file.

    Raises `ValueError` that says what is wrong where the file is cut off, damaged, or not safetensors.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        if len(start) < 8:
            raise ValueError(f"{size} bytes, too few for a safetensors file")
        (length,) = struct.unpack("<Q", start)
        if length > LONGEST_HEADER:
            raise ValueError("not a safetensors file: its first 8 bytes are no header length")
        if 8 + length > size:
            raise ValueError(f"truncated: the header needs {8 + length:,} bytes and the file has {size:,}")
        header = json.loads(file.read(length))
    if not isinstance(header, dict):
        raise ValueError("not a safetensors file: its header is not a JSON object")
    header.pop("__metadata__", None)
    end = 0
    for name, entry in header.items():
        try:
            first, last = entry["data_offsets"]
            expected = prod(entry["shape"]) * _BITS[entry["dtype"]] // 8
        except (TypeError, KeyError, ValueError) as error:
            raise ValueError(f"damaged header: the entry of {name} cannot be read ({error})") from error
        if first < 0 or last - first != expected:
            raise ValueError(f"damaged header: {name} has {last - first} bytes for {entry['dtype']} {entry['shape']}")
        end = max(end, last)
    if 8 + length + end != size:
        what = "truncated" if 8 + length + end > size else "longer than its header says"
        raise ValueError(f"{what}: the header needs {8 + length + end:,} bytes and the file has {size:,}")
    return header


def check_folder(folder: Path) -> None:
    """Raise `BadInput` with every problem of a transformers folder: config, weights, shards; nothing is loaded."""
    if not folder.is_dir():
        raise missing(folder)
    problems: list[Problem] = []
    read_config(folder, problems)
    weight_shapes(folder, problems)
    if problems:
        raise BadInput(problems)


def missing(path: Path) -> BadInput:
    """The error for a path that is not there, with the nearest name beside it."""
    siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    close = nearest(path.name, siblings)
    fix = f"did you mean {path.parent / close}?" if close else "give a folder, a .gguf file, a hub id or an alias"
    return BadInput([Problem("no such model", str(path), found="nothing there", fix=fix)])


def read_config(folder: Path, problems: list[Problem]) -> dict[str, Any]:
    """`config.json` as a dictionary; appends to `problems` where it is missing or wrong, and returns {} then."""
    path = folder / CONFIG
    if not path.is_file():
        fix = "a transformers folder has one beside its weights; save the model with save_pretrained"
        problems.append(Problem("config.json is missing", str(folder), found=listing_of(folder), fix=fix))
        return {}
    config = _json_object(path, problems)
    if config and not isinstance(config.get("model_type"), str):
        problems.append(
            Problem("config.json names no architecture", str(path), found="no model_type", allowed='such as "llama"')
        )
    return config


def _json_object(path: Path, problems: list[Problem]) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        line = error.lineno if isinstance(error, json.JSONDecodeError) else None
        problems.append(Problem("not valid JSON", str(path), line, found=str(error), fix="copy the file again"))
        return {}
    if not isinstance(value, dict):
        problems.append(Problem("not a JSON object", str(path), found=type(value).__name__))
        return {}
    return value


def weight_files(folder: Path, problems: list[Problem]) -> dict[Path, list[str]]:
    """Safetensors file -> tensors that an index says it has; appends to `problems` what is missing or refused."""
    if (folder / WEIGHTS).is_file():
        return {folder / WEIGHTS: []}
    if not (folder / INDEX).is_file():
        problems.append(_no_weights(folder))
        return {}
    index = _json_object(folder / INDEX, problems)
    if not index:
        return {}
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        problems.append(Problem("no weight_map", str(folder / INDEX), found=", ".join(index), fix="copy it again"))
        return {}
    shards: dict[str, list[str]] = {}
    for name, value in weight_map.items():
        shards.setdefault(str(value), []).append(name)
    files = {}
    for shard, names in sorted(shards.items()):
        # a name, not a path: a crafted index must not make us read files elsewhere
        if shard in ("", ".", "..") or re.search(r"[/\\:\0]", shard) or not shard.endswith(".safetensors"):
            allowed = "names of .safetensors files in the same folder"
            problems.append(Problem("refused shard name", str(folder / INDEX), found=repr(shard), allowed=allowed))
        elif not (folder / shard).is_file():
            problems.append(
                Problem("a shard is missing", str(folder / shard), found=listing_of(folder), fix="download it again")
            )
        else:
            files[folder / shard] = names
    return files


def weight_shapes(folder: Path, problems: list[Problem]) -> dict[str, tuple[int, ...]]:
    """Tensor name -> shape over all weight files; appends to `problems` for files that are cut off or do not fit."""
    shapes: dict[str, tuple[int, ...]] = {}
    for path, promised in weight_files(folder, problems).items():
        try:
            header = read_safetensors_header(path)
        except ValueError as error:
            fix = "download or copy the file again"
            problems.append(Problem("damaged weights", str(path), found=str(error), fix=fix))
            continue
        if absent := [name for name in promised if name not in header]:
            found = f"{len(absent)} tensors of the index are not in it, {absent[0]} first"
            problems.append(Problem("a shard of another model", str(path), found=found, fix="download it again"))
        shapes.update({name: tuple(entry["shape"]) for name, entry in header.items()})
    return shapes


def _no_weights(folder: Path) -> Problem:
    names = [entry.name for entry in folder.iterdir()]
    pickles = [name for name in names if name.endswith(PICKLES)]
    ggufs = [name for name in names if name.endswith(".gguf")]
    found = listing_of(folder)
    if pickles:
        here, there = repr(str(folder)), repr(f"{folder}-safetensors")
        code = f"from transformers import AutoModelForCausalLM as M; M.from_pretrained({here}).save_pretrained({there})"
        return Problem(
            "a pickle checkpoint is refused: reading one can run any program hidden in it",
            str(folder),
            found=", ".join(sorted(pickles)),
            allowed="safetensors",
            fix=f'if you trust its author, convert it once: python -c "{code}" and copy the tokenizer files',
        )
    if ggufs:
        fix = f"give the file itself: {folder / sorted(ggufs)[0]}"
    elif any(name.endswith(".safetensors") for name in names):
        fix = f"rename the weights to {WEIGHTS}, or save the model with save_pretrained"
    else:
        fix = "give a folder that save_pretrained wrote"
    return Problem("no weights in the folder", str(folder), found=found, allowed=f"{WEIGHTS} or {INDEX}", fix=fix)


def listing_of(folder: Path, shown: int = 8) -> str:
    """The first names in a folder, for an error message."""
    names = sorted(entry.name for entry in folder.iterdir())
    rest = f" and {len(names) - shown} more" if len(names) > shown else ""
    return (", ".join(names[:shown]) + rest) or "an empty folder"


def check_adapter(adapter_folder: Path, base_folder: Path) -> None:
    """Raise `BadInput` where a PEFT adapter's shapes do not belong to the base model in `base_folder`.

    A LoRA pair A (r, in), B (out, r) needs a base weight of (out, in), or (in, out) for Conv1D. Only headers are read.
    """
    problems: list[Problem] = []
    config = _json_object(adapter_folder / ADAPTER_CONFIG, problems)
    base = weight_shapes(base_folder, problems)
    tied = bool(read_config(base_folder, problems).get("tie_word_embeddings"))
    path = adapter_folder / ADAPTER_WEIGHTS
    if not path.is_file():
        problems.append(_no_adapter_weights(adapter_folder))
    if problems:
        raise BadInput(problems)
    try:
        header = read_safetensors_header(path)
    except ValueError as error:
        raise BadInput([Problem("damaged adapter", str(path), found=str(error), fix="copy it again")]) from error
    wrong = _misfits({name: tuple(entry["shape"]) for name, entry in header.items()}, base, tied)
    if wrong:
        rest = f"; and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise BadInput(
            [
                Problem(
                    f"the adapter belongs to another base than {base_folder}",
                    str(adapter_folder),
                    found="; ".join(wrong[:3]) + rest,
                    allowed=f"the base it was trained on: {config.get('base_model_name_or_path')}",
                    fix="set base_model_name_or_path in adapter_config.json to that model",
                )
            ]
        )


def _no_adapter_weights(folder: Path) -> Problem:
    if any(entry.name.endswith(PICKLES) for entry in folder.iterdir()):
        fix = "load the adapter with PEFT, if you trust its author, and save_pretrained it as safetensors"
        return Problem("a pickle adapter is refused", str(folder), found=listing_of(folder), fix=fix)
    return Problem(f"{ADAPTER_WEIGHTS} is missing", str(folder), found=listing_of(folder))


_ADAPTER_SIDE = re.compile(
    r"base_model\.model\.(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<side>[AB])(?:\.weight)?"
)


def _misfits(adapter: dict[str, tuple[int, ...]], base: dict[str, tuple[int, ...]], tied: bool) -> list[str]:
    """One sentence for each adapted module that the base lacks or has in another shape."""
    sides: dict[str, dict[str, int]] = {}
    for name, shape in adapter.items():
        match = _ADAPTER_SIDE.fullmatch(name)
        if match is None or len(shape) != 2 or ".experts" in name:
            continue  # experts are stored under other names than their modules'
        # lora_A is (r, in) and lora_B (out, r); for embeddings (r, vocabulary) and (hidden, r)
        size = shape[1] if match["side"] == "A" else shape[0]
        grows = (match["side"] == "A" and match["embedding"]) or (
            match["side"] == "B" and match["module"].endswith("lm_head")
        )
        if not grows:  # new tokens lengthen a vocabulary: only the other side must fit
            sides.setdefault(match["module"], {})[match["side"]] = size
    wrong: list[str] = []
    absent: list[str] = []
    for module, sizes in sides.items():
        in_base = _base_shape(module, base)
        if in_base is None:
            if not (tied and module.endswith("lm_head")):
                absent.append(module)
        elif Counter(sizes.values()) - Counter(in_base):
            found = ", ".join(f"{side} {size}" for side, size in sorted(sizes.items()))
            wrong.append(f"{module} is {in_base} in the base, and the adapter's sides are {found}")
    if len(absent) < len(sides):  # a name that no layer of the base ends with may only be stored under another
        leaves = {name.split(".")[-2] for name in base if "." in name}
        absent = [module for module in absent if module.split(".")[-1] in leaves]
    return wrong + [f"the base has no {module}" for module in absent]


def _base_shape(module: str, base: dict[str, tuple[int, ...]]) -> tuple[int, ...] | None:
    """Some checkpoints store names without the model's own prefix ("h.0" for "transformer.h.0")."""
    for name in _spellings(module):
        if name in base:
            return base[name]
    return None


def _spellings(module: str) -> Iterable[str]:
    yield f"{module}.weight"
    if "." in module:
        yield module.split(".", 1)[1] + ".weight"
    yield f"model.{module}.weight"
