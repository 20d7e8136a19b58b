"""What runs against TRL share: what both start from, one template, our run and TRL's, the comparison."""

import json
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from preference_rows import write
from running import tiny_recipe
from tiny_models import save_tiny
from transformers import AutoTokenizer

from shikomi.run import train

STEPS, BATCH, RATE = 12, 4, 5e-3

# Without the line break after the last turn, which TRL scores as a part of the answer.
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' }}"
    "{% if not loop.last or add_generation_prompt %}{{ '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def begin(folder: Path, load, moved: tuple[str, ...], **options) -> tuple[Path, Path]:
    """(model, adapter): PEFT's adapter of what `load` makes of a tiny model, the parts in `moved` off their start."""
    model = save_tiny(folder / "model")
    torch.manual_seed(0)
    peft = get_peft_model(load(model), LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", **options))
    for name, parameter in peft.named_parameters():
        if any(part in name for part in moved):
            torch.nn.init.normal_(parameter, std=0.05)
    peft.save_pretrained(folder / "adapter")
    return model, folder / "adapter"


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


def peers(trainer, config, load, begun: tuple[Path, Path], folder: Path, rows: list[dict], **options) -> list[dict]:
    """Records of a run of TRL's, from the adapter of (model, adapter) on what `load` makes of the model."""
    model, adapter = begun
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = TEMPLATE
    args = config(
        output_dir=str(folder), per_device_train_batch_size=BATCH, max_steps=STEPS, learning_rate=RATE,
        lr_scheduler_type="constant", warmup_steps=0, weight_decay=0.0, max_grad_norm=1.0, logging_steps=1,
        report_to=[], save_strategy="no", disable_tqdm=True, use_cpu=True, bf16=False, gradient_checkpointing=False,
        train_sampling_strategy="sequential", **options,
    )  # fmt: skip
    made = trainer(
        model=PeftModel.from_pretrained(load(model), str(adapter), is_trainable=True),
        args=args,
        train_dataset=Dataset.from_list([as_messages(row) for row in rows]),
        processing_class=tokenizer,
    )
    made.train()
    return [record for record in made.state.log_history if "loss" in record]


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
