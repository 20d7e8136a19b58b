"""Jobs of a plan as values: a small Llama with a method and rows."""

from typing import Any

from shikomi.plan.architecture import architecture
from shikomi.plan.estimate import Job, Rows
from shikomi.recipe import ComponentSpec, build

CONFIG = {
    **{"model_type": "llama", "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 4},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 500, "tie_word_embeddings": True},
}


def spec(of: str | dict[str, Any]) -> ComponentSpec:
    """A component by its name, or with options."""
    options = {"name": of} if isinstance(of, str) else dict(of)
    return ComponentSpec(name=options.pop("name"), options=options)


def job_of(
    adapter: str | dict[str, Any] = "lora",
    objective: str = "sft",
    optim: str = "adamw",
    quant: str = "none",
    **more: Any,
) -> Job:
    """One stage on a small Llama; `more` are fields of Job, and `config` other numbers of the model."""
    found = {"rows": Rows(count=100, tokens=200, longest=256, measured=True), **more}
    return Job(
        architecture=architecture(CONFIG | found.pop("config", {})),
        adapter=build("adapters", spec(adapter)),
        quant=None if quant == "none" else build("quant", spec(quant)),
        optim=build("optim", spec(optim)),
        objective=build("objectives", spec(objective)),
        **found,
    )
