"""What runs against TRL share: one template, the settings of our run, rows as TRL takes them, the comparison."""

import json
from pathlib import Path

from preference_rows import write
from running import tiny_recipe

from shikomi.run import train

STEPS, BATCH, RATE = 12, 4, 5e-3

# Without the line break after the last turn, which TRL scores as a part of the answer.
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' }}"
    "{% if not loop.last or add_generation_prompt %}{{ '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def as_messages(row: dict) -> dict:
    """A row of preferences with turns in place of texts."""
    answers = {key: row[key] for key in ("chosen", "rejected", "completion") if key in row}
    turns = {key: [{"role": "assistant", "content": text}] for key, text in answers.items()}
    return row | turns | {"prompt": [{"role": "user", "content": row["prompt"]}]}


def ours(begun: tuple[Path, Path], run: Path, rows: list[dict], **keys) -> list[dict]:
    """Records of our run, from the adapter of (model, adapter)."""
    _, adapter = begun
    rows = write(run.with_suffix(".jsonl"), rows)
    settings = {
        "max_steps": STEPS, "batch_size": BATCH, "learning_rate": RATE, "lr_scheduler_type": "constant",
        "warmup_steps": 0, "shuffle": False, "chat_template": TEMPLATE,
    }  # fmt: skip
    train(tiny_recipe(adapter, rows, run, **(settings | keys)))
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def compare(got: list[dict], again: list[dict], want: list[dict], names: tuple[str, ...]) -> None:
    """`got` and `again` are two packings of ours, `want` is TRL's run."""
    assert len(got) == len(again) == len(want) == STEPS
    for name in names:
        values, others, theirs = ([float(record[name]) for record in run] for run in (got, again, want))
        size = max(abs(value) for value in theirs)
        assert max(theirs) - min(theirs) > 0.05 * size, f"{name} does not move: nothing would be compared"
        noise = max(abs(a - b) for a, b in zip(values, others, strict=True))
        gap = max(abs(a - b) for a, b in zip(values, theirs, strict=True))
        print(f"{name}: size {size:.3g}, own {noise:.2e}, TRL {gap:.2e}")
        assert noise < 1e-3 * size  # it is noise
        assert gap <= 10 * noise + 1e-6 * size, f"{name}: {gap} from TRL, two packings differ by {noise}"
