"""Prompt tuning: trained input embeddings before every sequence (Lester et al. 2021, arXiv:2104.08691)."""

import math
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from shikomi.adapters._adapter import Attached, Capabilities, Declares, Shapes
from shikomi.adapters._context import SAVED, OnContext, first_of
from shikomi.errors import BadInput, Problem


@dataclass(frozen=True)
class Prompt(Declares):
    """The model sees [P; X]: P (num_virtual_tokens, H) is trained, X are the embeddings of the tokens (section 2).

    Names and initialisations are those of PEFT's `PromptTuningConfig`.
    """

    name: ClassVar[str] = "prompt"
    capabilities: ClassVar[Capabilities] = Capabilities(mergeable=False, starts_as_base=False, context=True)

    num_virtual_tokens: Annotated[int, Field(ge=1, le=4096, description="trained tokens before every sequence")] = 20
    prompt_tuning_init: Annotated[
        Literal["RANDOM", "TEXT", "SAMPLE_VOCAB"],
        Field(
            description="RANDOM: normal with deviation 1; TEXT: the embeddings of prompt_tuning_init_text; "
            "SAMPLE_VOCAB: those of random tokens"
        ),
    ] = "RANDOM"
    prompt_tuning_init_text: Annotated[
        str | None, Field(description="for TEXT; repeated or cut to num_virtual_tokens tokens")
    ] = None

    def __post_init__(self) -> None:
        text = self.prompt_tuning_init_text
        if self.prompt_tuning_init == "TEXT" and not text:
            fix = 'add prompt_tuning_init_text: "Classify the package:", or use prompt_tuning_init: SAMPLE_VOCAB'
            raise BadInput([Problem("prompt_tuning_init: TEXT needs prompt_tuning_init_text", fix=fix)])
        if self.prompt_tuning_init != "TEXT" and text is not None:
            found, fix = f"prompt_tuning_init: {self.prompt_tuning_init}", "use TEXT, or delete the text"
            raise BadInput([Problem("prompt_tuning_init_text is for TEXT only", found=found, fix=fix)])

    def attach(self, model: nn.Module, output_name: str | None, seed: int, tokenizer: Any) -> Attached:
        """Makes the virtual tokens; the model stays as it is. Raises BadInput for a text without tokens."""
        embedding: nn.Embedding = model.get_input_embeddings()  # type: ignore[operator]
        virtual = VirtualTokens(self._start(embedding, seed, tokenizer))
        settings = model.config.to_dict()  # type: ignore[operator, union-attr]
        config = {
            "peft_type": "PROMPT_TUNING",
            "num_virtual_tokens": self.num_virtual_tokens,
            "prompt_tuning_init": self.prompt_tuning_init,
            "prompt_tuning_init_text": self.prompt_tuning_init_text,
            "token_dim": embedding.embedding_dim,
            "num_layers": model.config.num_hidden_layers,  # type: ignore[union-attr]
            "num_attention_heads": first_of(settings, "num_attention_heads", "n_head", "num_heads"),
        }
        return OnContext(self, virtual, config)

    def trained_shapes(self, model: Shapes) -> dict[str, tuple[int, ...]]:
        """The virtual tokens."""
        return {SAVED: (self.num_virtual_tokens, next(iter(model.embeddings.values()))[1])}

    def _start(self, embedding: nn.Embedding, seed: int, tokenizer: Any) -> Tensor:
        """P (num_virtual_tokens, H) in fp32 before the first step."""
        device, shape = embedding.weight.device, (self.num_virtual_tokens, embedding.embedding_dim)
        if device.type == "meta":
            return torch.empty(shape, device=device)
        generator = torch.Generator().manual_seed(seed)
        if self.prompt_tuning_init == "RANDOM":
            return torch.empty(shape).normal_(generator=generator).to(device)
        if self.prompt_tuning_init == "SAMPLE_VOCAB":
            ids = torch.randint(0, embedding.num_embeddings, shape[:1], generator=generator)
        else:
            ids = torch.tensor(self._text_tokens(tokenizer))
        with torch.no_grad():
            return embedding(ids.to(device)).float()

    def _text_tokens(self, tokenizer: Any) -> list[int]:
        tokens: list[int] = tokenizer(self.prompt_tuning_init_text)["input_ids"]
        if not tokens:
            found = repr(self.prompt_tuning_init_text)
            raise BadInput([Problem("prompt_tuning_init_text has no tokens", found=found, fix="write a longer text")])
        return (tokens * math.ceil(self.num_virtual_tokens / len(tokens)))[: self.num_virtual_tokens]


class VirtualTokens:
    """Trained embeddings P (tokens, H), fp32 masters."""

    def __init__(self, start: Tensor):
        self.prompt_embeddings = nn.Parameter(start)
        self.tokens = start.shape[0]

    def embeddings(self) -> Tensor | None:
        return self.prompt_embeddings

    def keys_values(self) -> list[Tensor] | None:
        return None

    def own(self) -> dict[str, nn.Parameter]:
        return {SAVED: self.prompt_embeddings}

    def flat(self) -> Tensor:
        return self.prompt_embeddings
