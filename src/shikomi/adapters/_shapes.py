"""What an adapter would train of a model that is known by its shapes only, for plans: the arithmetic of `attach`."""

import re
from typing import TYPE_CHECKING

from shikomi.adapters._adapter import Shapes
from shikomi.adapters._targets import chosen, pattern_of, saved_modules

if TYPE_CHECKING:
    from shikomi.adapters.lora import Lora

PREFIX = "base_model.model."


def lora_targets(model: Shapes, options: "Lora") -> tuple[list[str], list[str]]:
    """Names of the linear layers, and of the embeddings, that are adapted. Raises BadInput as `attach` does."""
    usable = [*model.embeddings, *model.linears]
    found = chosen(usable, model.linears, options, model.head)
    return [p for p in found if p in model.linears], [p for p in found if p in model.embeddings]


def lora_shapes(model: Shapes, options: "Lora") -> dict[str, tuple[int, ...]]:
    """A (r, in) and B (out, r) of every target, biases, and modules trained whole, by the names of the file."""
    linears, embeddings = lora_targets(model, options)
    found: dict[str, tuple[int, ...]] = {}
    for path in linears:
        r, (out, width) = int(pattern_of(options.rank_pattern, path, options.r)), model.linears[path]
        found[f"{PREFIX}{path}.lora_A.weight"], found[f"{PREFIX}{path}.lora_B.weight"] = (r, width), (out, r)
    for path in embeddings:
        r, (rows, width) = int(pattern_of(options.rank_pattern, path, options.r)), model.embeddings[path]
        found[f"{PREFIX}{path}.lora_embedding_A"], found[f"{PREFIX}{path}.lora_embedding_B"] = (r, rows), (width, r)
    for name, shape in model.tensors.items():
        path, _, kind = name.rpartition(".")
        if kind == "bias" and options.bias != "none" and (options.bias == "all" or path in linears):
            found[f"{PREFIX}{path}.base_layer.bias" if path in linears else f"{PREFIX}{name}"] = shape
    for path in saved_modules(modules_of(model), options):
        below = {name: shape for name, shape in model.tensors.items() if name.startswith(f"{path}.")}
        if not below and path == model.head:  # tied to the embedding, and a copy of its own once it is trained
            below = {f"{path}.weight": model.linears[path]}
        found |= {f"{PREFIX}{name}": shape for name, shape in below.items()}
    return found


def modules_of(model: Shapes) -> list[str]:
    """Names of all modules that hold parameters, and of those around them."""
    found: dict[str, None] = {}
    for name in (*model.tensors, f"{model.head}.weight"):
        parts = name.split(".")[:-1]
        found |= {".".join(parts[:end]): None for end in range(1, len(parts) + 1)}
    return list(found)


def children_of(model: Shapes) -> tuple[str, dict[int, list[str]]]:
    """The path of the list of decoder layers, and the names of each layer's children."""
    layers: dict[int, dict[str, None]] = {}
    path = ""
    for name in model.tensors:
        match = re.match(r"(.*?)\.(\d+)\.([^.]+)\.", name)
        if match:
            path = match[1]
            layers.setdefault(int(match[2]), {})[match[3]] = None
    return path, {number: list(children) for number, children in layers.items()}
