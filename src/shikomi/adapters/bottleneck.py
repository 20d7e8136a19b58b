"""Bottleneck adapters: a narrow network after a sublayer (Houlsby et al. 2019, arXiv:1902.00751, section 2.1)."""

import contextlib
import inspect
import math
from collections.abc import Callable, Collection, Iterator
from dataclasses import asdict, field
from dataclasses import dataclass as plain_dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import skip_init

from shikomi.adapters._adapter import Attached, Capabilities, Declares, Reads, Shapes
from shikomi.adapters._file import take_over
from shikomi.adapters._shapes import children_of
from shikomi.errors import BadInput, Problem

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "tanh": torch.tanh,
}
# What decoder layers of transformers call their two sublayers; the last three mix tokens without attention.
MIXERS = ("self_attn", "self_attention", "attention", "attn", "linear_attn", "mamba", "conv")
FEED_FORWARDS = ("mlp", "feed_forward", "ffn", "block_sparse_moe", "moe")


@dataclass(frozen=True)
class Bottleneck(Declares):
    """h + z + up(f(down(z))) in place of h + z, z the output of a sublayer; the base stays frozen.

    down is (hidden / reduction_factor, hidden), up the reverse, both with biases. As AdapterHub's "mam_adapter" start:
    down is Kaiming-uniform, up and the biases are zero, so that the model starts as it was loaded (Houlsby et al. start
    both near zero). Where a layer norms a sublayer's output (Gemma), the adapter stands before that norm. Names are
    those of AdapterHub's `BnConfig`; `placement` stands for its mh_adapter and output_adapter.
    """

    name: ClassVar[str] = "bottleneck"
    capabilities: ClassVar[Capabilities] = Capabilities(mergeable=False, starts_as_base=True, context=False)

    reduction_factor: Annotated[int, Field(ge=1, description="width of the bottleneck: hidden size / this")] = 16
    placement: Annotated[
        Literal["houlsby", "pfeiffer"],
        Field(
            description="houlsby: after attention and after the feed-forward part; pfeiffer: only after the "
            "feed-forward part (arXiv:2005.00247)"
        ),
    ] = "houlsby"
    non_linearity: Annotated[Literal["relu", "gelu", "silu", "tanh"], Field(description="f, between down and up")] = (
        "relu"
    )
    dropout: Annotated[float, Field(ge=0, lt=1, description="dropout on the output of up while training")] = 0.0
    layers_to_transform: Annotated[list[int] | None, Field(description="only these layers, counted from 0")] = None

    def attach(self, model: nn.Module, output_name: str | None, seed: int, tokenizer: Any) -> Attached:
        """Wraps the sublayers of every layer. Raises BadInput where they cannot be found."""
        hidden: int = model.config.hidden_size  # type: ignore[assignment, union-attr]
        device: torch.device = model.get_input_embeddings().weight.device  # type: ignore[operator]
        width = max(1, hidden // self.reduction_factor)
        generator = torch.Generator().manual_seed(seed)
        kinds = (MIXERS, FEED_FORWARDS) if self.placement == "houlsby" else (FEED_FORWARDS,)
        found = [place for layer in self._layers(model) for place in (_sublayer(*layer, kind) for kind in kinds)]
        attached = OnBlocks(self)
        for path, layer, name in found:
            narrow = BottleneckLayer(hidden, width, self.non_linearity, self.dropout, generator).to(device)
            attached.blocks[path] = AfterSublayer(layer.get_submodule(name), narrow)
            layer._modules[name] = attached.blocks[path]
        return attached

    def _layers(self, model: nn.Module) -> list[tuple[str, nn.Module]]:
        """Path and module of the chosen decoder layers."""
        count: int = model.config.num_hidden_layers  # type: ignore
        lists = [(p, m) for p, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == count]
        if not lists:
            what = f"adapter: bottleneck finds no list of {count} layers in {type(model).__name__}"
            raise BadInput([Problem(what, fix="use adapter: lora")])
        path, layers = lists[0]  # outer modules come first
        return [(f"{path}.{i}", layers[i]) for i in self._chosen(count)]

    def _chosen(self, count: int) -> list[int]:
        """Numbers of the chosen layers. Raises BadInput."""
        chosen = range(count) if self.layers_to_transform is None else self.layers_to_transform
        wrong = [i for i in chosen if not 0 <= i < count]
        if wrong or not chosen:
            raise BadInput(
                [
                    Problem(
                        "layers_to_transform: no such layer" if wrong else "layers_to_transform names no layer",
                        found=", ".join(map(str, wrong)) or "[]",
                        allowed=f"0 to {count - 1}",
                        fix="leave it out for all layers",
                    )
                ]
            )
        return sorted(set(chosen))

    def trained_shapes(self, model: Shapes) -> dict[str, tuple[int, ...]]:
        """The narrow network of every sublayer. Raises BadInput where sublayers cannot be found."""
        path, children = children_of(model)
        kinds = (MIXERS, FEED_FORWARDS) if self.placement == "houlsby" else (FEED_FORWARDS,)
        hidden, width = model.hidden, max(1, model.hidden // self.reduction_factor)
        shapes = {"down.weight": (width, hidden), "down.bias": (width,), "up.weight": (hidden, width)}
        shapes |= {"up.bias": (hidden,)}
        found: dict[str, tuple[int, ...]] = {}
        for i in self._chosen(model.layers):
            for kind in kinds:
                name = _one_of(f"{path}.{i}", "this model's layers", children[i], kind)
                found |= {f"{path}.{i}.{name}.bottleneck.{own}": shape for own, shape in shapes.items()}
        return found

    def reads(self, model: Shapes) -> Reads:
        """Outputs of the sublayers."""
        return Reads(sublayers=len(self.trained_shapes(model)) // 4)


def _sublayer(path: str, layer: nn.Module, names: tuple[str, ...]) -> tuple[str, nn.Module, str]:
    """Path, layer and name of the one child that is called one of `names`. Raises BadInput."""
    children = dict(layer.named_children())
    name = _one_of(path, type(layer).__name__, children, names)
    if "residual" in inspect.signature(children[name].forward).parameters:
        what = f"adapter: bottleneck cannot stand before the residual addition of {type(layer).__name__}"
        reason = f"{path}.{name} adds the residual itself"
        raise BadInput([Problem(what, found=reason, fix="use adapter: lora")])
    return f"{path}.{name}", layer, name


def _one_of(path: str, layer: str, children: Collection[str], names: tuple[str, ...]) -> str:
    """The one child of a layer that is called one of `names`. Raises BadInput."""
    found = [name for name in names if name in children]
    kind = "attention" if names is MIXERS else "feed-forward"
    if len(found) != 1:
        problem = Problem(
            f"adapter: bottleneck cannot tell the {kind} part of {layer}",
            found=f"{path} has {', '.join(children)}",
            allowed=f"exactly one of {', '.join(names)}",
            fix="use adapter: lora" if names is FEED_FORWARDS else "use placement: pfeiffer, or adapter: lora",
        )
        raise BadInput([problem])
    return found[0]


class BottleneckLayer(nn.Module):
    """z + dropout(up(f(down(z)))), z (..., hidden); fp32 masters, computed in the dtype of z."""

    def __init__(self, hidden: int, width: int, non_linearity: str, dropout: float, generator: torch.Generator):
        super().__init__()
        self.non_linearity, self.dropout, self.enabled = ACTIVATIONS[non_linearity], dropout, True
        self.key: int | None = None  # seeds the dropout mask of this forward and its backward; None: no dropout
        self.down = skip_init(nn.Linear, hidden, width)
        self.up = skip_init(nn.Linear, width, hidden)
        nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5), generator=generator)
        for zero in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(zero)

    def forward(self, z: Tensor) -> Tensor:
        return self.added(None, z, z.dtype)

    def added(self, h: Tensor | None, z: Tensor, storage: torch.dtype) -> Tensor:
        """What `forward` gives, added to h (..., hidden) where there is one; keeps only z, in the storage dtype."""
        rows = None if h is None else h.reshape(-1, h.shape[-1])
        out = _Added.apply(rows, z.reshape(-1, z.shape[-1]), self, storage, *self.parameters())
        return out.view(z.shape)

    def mask(self, z: Tensor) -> Tensor | None:
        """The dropout mask (N, hidden), scaled to keep the mean; None without dropout."""
        if self.key is None or not self.dropout:
            return None
        generator = torch.Generator(z.device).manual_seed(self.key)
        return torch.empty_like(z).bernoulli_(1 - self.dropout, generator=generator).div_(1 - self.dropout)


class _Added(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h, z, layer: BottleneckLayer, storage, *trained):  # h, z (N, hidden)
        down, down_bias, up, up_bias = (p.detach().to(z.dtype) for p in trained)
        act = layer.non_linearity(torch.addmm(down_bias, z, down.t()))  # (N, width)
        mask = layer.mask(z)
        if mask is None:
            out = torch.addmm(z, act, up.t()).add_(up_bias)
        else:
            out = torch.addmm(up_bias, act, up.t()).mul_(mask).add_(z)
        ctx.save_for_backward(z.to(storage), *trained)
        ctx.layer, ctx.dtype = layer, z.dtype
        return out if h is None else out.add_(h)

    @staticmethod
    def backward(ctx, dout):
        stored, *trained = ctx.saved_tensors
        layer, z = ctx.layer, stored.to(ctx.dtype)
        down, down_bias, up, _ = (p.detach().to(z.dtype) for p in trained)
        mask = layer.mask(z)
        dy = dout if mask is None else dout * mask
        with torch.enable_grad():
            before = torch.addmm(down_bias, z, down.t()).requires_grad_()
            act = layer.non_linearity(before)
        (dbefore,) = torch.autograd.grad(act, before, dy @ up)  # (N, width)
        dz = torch.addmm(dout, dbefore, down) if ctx.needs_input_grad[1] else None
        wide = (act.detach().t() @ dy).t()  # (hidden, width)
        sums = (t.sum(0, dtype=torch.float32) for t in (dbefore, dy))
        grads = ((dbefore.t() @ z).float(), next(sums), wide.float(), next(sums))
        return dout if ctx.needs_input_grad[0] else None, dz, None, None, *grads


class AfterSublayer(nn.Module):
    """A sublayer of a decoder layer with the bottleneck on its output; to other code it looks like the sublayer."""

    inner: nn.Module
    bottleneck: BottleneckLayer

    def __init__(self, inner: nn.Module, bottleneck: BottleneckLayer):
        super().__init__()
        self.inner, self.bottleneck = inner, bottleneck

    def __getattr__(self, name: str) -> Any:
        """What a module does not have itself is the sublayer's."""
        if name in ("inner", "bottleneck"):
            return super().__getattr__(name)
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.inner, name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = self.inner(*args, **kwargs)
        if not self.bottleneck.enabled:
            return out
        if isinstance(out, tuple):
            return (self.bottleneck(out[0]), *out[1:])
        return self.bottleneck(out)


@plain_dataclass
class OnBlocks:
    """The bottlenecks on the sublayers of a model, by the sublayers' paths."""

    options: Bottleneck
    blocks: dict[str, AfterSublayer] = field(default_factory=dict)
    context: None = None

    def parameters(self) -> dict[str, nn.Parameter]:
        """Trained parameters: model.layers.0.mlp.bottleneck.down.weight and the like."""
        return {
            f"{path}.bottleneck.{name}": parameter
            for path, block in self.blocks.items()
            for name, parameter in block.bottleneck.named_parameters()
        }

    def fixed(self) -> dict[str, Tensor]:
        return {}

    def added(self) -> int:
        return sum(p.numel() for p in self.parameters().values())

    def export(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """The options, and the parameters by their names."""
        return asdict(self.options), {name: p.detach() for name, p in self.parameters().items()}  # type: ignore

    def load(self, tensors: dict[str, Tensor], source: str) -> None:
        """Takes over an adapter's tensors; raises BadInput for names or shapes that do not fit this model."""
        take_over(self.parameters(), tensors, source)

    @contextlib.contextmanager
    def off(self) -> Iterator[None]:
        """Within: the model exactly as it was loaded."""
        before = {path: block.bottleneck.enabled for path, block in self.blocks.items()}
        try:
            for block in self.blocks.values():
                block.bottleneck.enabled = False
            yield
        finally:
            for path, block in self.blocks.items():
                block.bottleneck.enabled = before[path]

    def bind_dropout(self, key: int | None) -> None:
        """Binds the dropout masks of every bottleneck to one micro-batch; None switches dropout off."""
        for index, block in enumerate(self.blocks.values()):
            block.bottleneck.key = None if key is None else (key * 1_000_003 + index) % (1 << 63)
