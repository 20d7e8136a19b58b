"""What happens around the loop: records, evaluations, samples, checkpoints."""

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shikomi.adapters._adapter import Attached
from shikomi.checkpoint.fingerprint import fingerprint
from shikomi.checkpoint.manifest import checkpoint_folder, prune, write_checkpoint
from shikomi.checkpoint.rundir import RunDir
from shikomi.data.encode import Encoder
from shikomi.evaluate.preferences import PreferenceTask, evaluate_preferences
from shikomi.evaluate.run_eval import Task, evaluate
from shikomi.model.language_model import LanguageModel
from shikomi.optim._by_tensor import InTurn, TensorAdamW
from shikomi.progress import Progress
from shikomi.recipe.schema import Stage
from shikomi.steps.memory import peak_memory_bytes
from shikomi.steps.writers import Writer
from shikomi.train.state import Settings, State
from shikomi.train.step import Plan

# Of held-back preferences, on the console.
SHOWN = ("eval_loss", "eval_rewards/accuracies", "eval_rewards/margins", "eval_accuracy", "eval_margin")
PREVIOUS = "previous"  # first part of the names under which a checkpoint keeps adapters of earlier stages


@dataclass
class RunHooks:
    """The loop's hooks for one stage of a run."""

    lm: LanguageModel
    optimizer: torch.optim.Optimizer
    rundir: RunDir
    stage: Stage
    settings: Settings
    state: State
    encoder: Encoder
    validation: Task | PreferenceTask | None
    progress: Progress
    writers: list[Writer]
    samples: list[dict[str, Any]] = field(default_factory=list)

    def record(self, record: dict[str, Any]) -> None:
        record = {"stage": self.stage.name, **record}
        self.rundir.append_metrics(record)
        state, total = self.state, self.settings.total_steps
        speed = state.total_tokens / max(state.training_seconds, 1e-9)
        left = (total - state.step) * state.training_seconds / max(1, state.global_step)
        every = self.settings.save_steps
        self.progress.advance(
            {
                **record,
                "step": state.step,
                "total_steps": total,
                "tokens_per_second": speed,
                "eta_seconds": left,
                "peak_memory_bytes": peak_memory_bytes(),
                "next_checkpoint_step": None if not every else min(total, (state.step // every + 1) * every),
            }
        )
        if state.step % self.stage.logging_steps == 0 or state.step == total:
            for writer in self.writers:
                shown = {k: float(v) for k, v in record.items() if isinstance(v, int | float) and k != "step"}
                writer.write(state.global_step, shown)

    def evaluate(self, state: State) -> dict[str, float]:
        """Validation loss and metrics as eval_*, and the answers to the sample prompts."""
        started, scores = time.perf_counter(), {}
        if isinstance(self.validation, PreferenceTask):
            scores = {f"eval_{name}": v for name, v in evaluate_preferences(self.lm, self.validation).items()}
        elif self.validation is not None:
            done = evaluate(self.lm, self.validation, None, self.progress, "validation")
            scores = {f"eval_{name}": float(m["value"]) for name, m in done.measurements.items()}
        record: dict[str, Any] = {"stage": self.stage.name, "step": state.global_step, **scores}
        record["eval_seconds"] = round(time.perf_counter() - started, 3)
        if self.stage.sample_prompts:
            record["samples"] = self._sample()
        self.rundir.append_metrics(record)
        for writer in self.writers:
            writer.write(state.global_step, scores)
        if scores:
            shown = scores if isinstance(self.validation, Task) else {k: v for k, v in scores.items() if k in SHOWN}
            self.note(f"step {state.step}: " + ", ".join(f"{k} {v:.4g}" for k, v in shown.items()))
        return scores

    def _sample(self) -> list[dict[str, str]]:
        from shikomi.data.conversation import prompt_answer

        answers = []
        for prompt in self.stage.sample_prompts:
            conversation, _ = prompt_answer(None, prompt, None, prompt)
            assert conversation is not None
            ids = self.lm.generate([self.encoder.encode_prompt(conversation)], max_new_tokens=64)[0]
            answers.append({"prompt": prompt, "answer": self.encoder.decode_answer(ids)})
            self.note(f"sample: {prompt!r} -> {answers[-1]['answer']!r}")
        return answers

    def save(self, state: State, best: bool) -> None:
        save_checkpoint(self.rundir, self.lm, self.optimizer, state)
        best_folder = None
        if self.settings.keep_best and state.best_step is not None:
            best_folder = checkpoint_folder(self.rundir.checkpoints, state.best_step)
        prune(self.rundir.checkpoints, self.stage.save_total_limit, best_folder)

    def non_finite(self, plan: Plan, state: State) -> str:
        path = self.rundir.path / "non_finite_batch.json"
        rows = [row for packed in plan.micro for row in packed.rows]
        text = [self.lm.tokenizer.decode(packed.ids) for packed in plan.micro]
        path.write_text(json.dumps({"step": state.step + 1, "data_rows": rows, "text": text}, ensure_ascii=False))
        return str(path)

    def note(self, text: str) -> None:
        self.rundir.log(text)
        self.progress.note(text)


def save_checkpoint(rundir: RunDir, lm: LanguageModel, optimizer: torch.optim.Optimizer, state: State) -> None:
    """Adapter (or model) in fp32, optimizer, and state: everything that a resume needs, bit for bit."""
    rundir.sync_metrics()
    tensors = {"adapter": checkpoint_tensors(lm), "optimizer": optimizer_tensors(lm, optimizer)}
    folder = checkpoint_folder(rundir.checkpoints, state.global_step)
    content = state.to_json() | {"step": state.global_step, "stage_step": state.step}
    write_checkpoint(folder, tensors, content, fingerprint(lm.device))


def kept_tensors(attached: Attached) -> dict[str, Tensor]:
    """What a checkpoint keeps of an adapter: trained parameters, and what was fixed at its start."""
    return {name: p.detach() for name, p in attached.parameters().items()} | attached.fixed()


def checkpoint_tensors(lm: LanguageModel) -> dict[str, Tensor]:
    """What a checkpoint keeps of the model: what is trained now, and the adapters of earlier stages as they ended."""
    mine = {n: p.detach() for n, p in lm.trainable().items()}
    if lm.attached is not None:
        mine |= kept_tensors(lm.attached)
    earlier = {f"{PREVIOUS}.{i}.{n}": t for i, tensors in enumerate(lm.earlier) for n, t in tensors.items()}
    return mine | earlier


def restored_state(saved: dict[str, Any]) -> State:
    """The State of a checkpoint's JSON."""
    values = {**saved, "step": saved["stage_step"]}
    values.pop("stage_step")
    return State(**values)


def optimizer_tensors(lm: LanguageModel, optimizer: torch.optim.Optimizer) -> Mapping[str, Tensor]:
    """The optimizer's state by parameter name: {"exp_avg/name": ...}."""
    found = {}
    for name, parameter in lm.trainable().items():
        for key, value in optimizer.state.get(parameter, {}).items():
            found[f"{key}/{name}"] = value if isinstance(value, Tensor) else torch.tensor(value)
    return InTurn(found, optimizer) if isinstance(optimizer, TensorAdamW) else found


def restore_optimizer(lm: LanguageModel, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Puts saved state back; `step` stays where the fused kernel wants it."""
    trained = lm.trainable()
    for name, tensor in tensors.items():
        key, _, parameter = name.partition("/")
        target = trained[parameter]
        if isinstance(optimizer, TensorAdamW):
            optimizer.put(target, key, tensor)
            continue
        kept = tensor.to(target.device).clone()
        if kept.shape == target.shape:  # the fused kernel takes state to lie in memory as its parameter does
            kept = torch.empty_like(target, dtype=kept.dtype, requires_grad=False).copy_(kept)
        optimizer.state[target][key] = kept


def restore_trained(lm: LanguageModel, tensors: dict[str, Tensor], folder: Path) -> None:
    """Puts trained parameters back from a checkpoint."""
    mine = checkpoint_tensors(lm)
    missing = mine.keys() ^ tensors.keys()
    if missing:
        raise ValueError(f"{folder} does not hold this run's parameters: {sorted(missing)[:3]}")
    with torch.no_grad():
        for name, tensor in mine.items():
            tensor.copy_(tensors[name])
