"""What both peers do alike: options, model, adapter, the clock, and the one line of JSON at the end."""

import argparse
import json
import os
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback


def options(description: str, rows: str, batch: int, limit: int, learning_rate: float) -> argparse.ArgumentParser:
    """The options that both peers take; `rows` names the second argument."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("model", help="a transformers folder: safetensors, tokenizer, chat template")
    parser.add_argument(rows, type=Path)
    parser.add_argument("--r", type=int, default=8)
    parser.add_argument("--targets", default="q_proj,v_proj", help="comma-separated names, or all-linear")
    parser.add_argument("--batch", type=int, default=batch, help="examples per optimizer step")
    parser.add_argument("--limit", type=int, default=limit, help="use the first rows only")
    parser.add_argument("--max-length", type=int, default=1024)
    parser.add_argument("--lr", type=float, default=learning_rate)
    parser.add_argument("--schedule", default="linear", help="lr_scheduler_type")
    parser.add_argument("--fp32", action="store_true", help="fp32 weights and arithmetic instead of bf16")
    parser.add_argument("--chat-template", help="instead of the model's own")
    parser.add_argument("--adapter", help="start from this PEFT adapter, so that two programs can begin alike")
    return parser


def read_rows(path: Path, limit: int) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line, _ in zip(lines, range(limit), strict=False)]


def load_tokenizer(args: argparse.Namespace) -> Any:
    """The model's tokenizer, with another chat template where one was given."""
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    if args.chat_template:
        tokenizer.chat_template = args.chat_template
    return tokenizer


def load(args: argparse.Namespace, **how: Any) -> Any:
    """The model with its adapter where one was given; else the trainer makes a new one."""
    dtype = torch.float32 if args.fp32 else torch.bfloat16
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype, **how)
    return PeftModel.from_pretrained(model, args.adapter, is_trainable=True) if args.adapter else model


def lora(args: argparse.Namespace) -> LoraConfig | None:
    if args.adapter:
        return None
    targets = args.targets if args.targets == "all-linear" else args.targets.split(",")
    return LoraConfig(r=args.r, lora_alpha=2 * args.r, lora_dropout=0.0, target_modules=targets, task_type="CAUSAL_LM")


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """Trainer arguments that make the run comparable: one epoch in the given order, every choice written out."""
    return dict(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=args.batch,
        num_train_epochs=1,
        train_sampling_strategy="sequential",
        max_length=args.max_length,
        learning_rate=args.lr,
        lr_scheduler_type=args.schedule,
        warmup_steps=0,
        weight_decay=0.0,
        max_grad_norm=1.0,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        bf16=not args.fp32,
        gradient_checkpointing=False,
    )


class Clock(TrainerCallback):
    """Seconds of the training loop, and when the first step was over."""

    def __init__(self) -> None:
        self.started = self.seconds = self.first_step_at = 0.0

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.started = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.first_step_at = self.first_step_at or time.time()

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self.seconds = time.perf_counter() - self.started


def report(peer: str, clock: Clock, tokens: int, log: list[dict[str, Any]], extra: dict[str, Any]) -> None:
    """Print the result as one line of JSON; `log` is the trainer's history, one entry a step."""
    steps = [entry for entry in log if "loss" in entry]
    result = {
        "peer": peer,
        "tokens": tokens,
        "seconds": clock.seconds,
        "tokens_per_second": tokens / clock.seconds,
        "first_step_at": clock.first_step_at,
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "loss": [float(entry["loss"]) for entry in steps],
        "grad_norm": [float(entry["grad_norm"]) for entry in steps],
    }
    print(json.dumps(result | extra))
