"""Which modules of a model an adapter's options name, by PEFT's rules."""

import re
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from torch import nn

from shikomi.errors import BadInput, Problem, nearest
from shikomi.quant._linear import PlainLinear

if TYPE_CHECKING:
    from shikomi.adapters.lora import Lora

BARE = ("dt_proj",)  # Mamba layers read this weight instead of calling the layer: an update beside it has no effect


def targets(modules: dict[str, nn.Module], options: "Lora", output_name: str | None) -> list[str]:
    """Names of the layers of a model that are adapted. Raises BadInput where none is, or a name is unknown."""
    usable = [path for path, m in modules.items() if isinstance(m, PlainLinear | nn.Embedding)]
    linears = {path for path in usable if isinstance(modules[path], PlainLinear)}
    return chosen(usable, linears, options, output_name)


def chosen(usable: Sequence[str], linears: Collection[str], options: "Lora", output_name: str | None) -> list[str]:
    """Those of the names of linear and embedding layers that `options` adapt, in their order."""
    want = options.target_modules
    if want == "all-linear":
        found = [p for p in usable if p in linears and p != output_name and not p.endswith(BARE)]
    else:
        found = [p for p in usable if matches(want, p)]
    if options.exclude_modules:
        found = [p for p in found if not matches(options.exclude_modules, p)]
    if options.layers_to_transform is not None:
        layers = {str(i) for i in options.layers_to_transform}
        found = [p for p in found if layers & set(re.findall(r"\.(\d+)\.", p)[:1])]
    known = sorted({p.rsplit(".", 1)[-1] for p in usable})
    for name in want if isinstance(want, list) else []:
        if not any(matches([name], p) for p in usable):
            close = nearest(name, known)
            raise BadInput(
                [
                    Problem(
                        f"target_modules: no linear or embedding module is named {name!r}",
                        allowed=", ".join(known),
                        fix=f"did you mean {close!r}?" if close else "use all-linear",
                    )
                ]
            )
    if not found:
        raise BadInput(
            [
                Problem(
                    "target_modules match no module of this model",
                    found=str(want),
                    allowed=", ".join(known),
                    fix="use all-linear, or a list of these names",
                )
            ]
        )
    return found


def matches(want: str | list[str], path: str) -> bool:
    if isinstance(want, str):
        return re.fullmatch(want, path) is not None
    return any(path == name or path.endswith("." + name) for name in want)


def pattern_of(patterns: dict | None, path: str, default: float) -> float:
    for key, value in (patterns or {}).items():
        if re.match(rf"(^|.*\.)({key})$", path):
            return value
    return default


def saved_modules(modules: Collection[str], options: "Lora") -> list[str]:
    """Names of the modules that are trained whole. Raises BadInput for a name that no module ends with."""
    found = []
    for name in options.modules_to_save or []:
        matches = [path for path in modules if path.endswith(name)]  # PEFT's rule: also the end of a word
        if not matches:
            known = sorted({p.rsplit(".", 1)[-1] for p in modules if p and not p.rsplit(".", 1)[-1].isdigit()})
            close = nearest(name, known)
            raise BadInput(
                [
                    Problem(
                        f"modules_to_save: no module is named {name!r}",
                        allowed=", ".join(known),
                        fix=f"did you mean {close!r}?" if close else None,
                    )
                ]
            )
        found += matches
    return found
