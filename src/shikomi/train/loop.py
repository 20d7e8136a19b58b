"""The loop, the same for every method: take a batch, add gradients, clip, update, tell the hooks."""

import contextlib
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from shikomi.errors import NonFinite, Stopped, TryAgain
from shikomi.model.language_model import LanguageModel
from shikomi.objectives._objective import Objective
from shikomi.optim._schedule import factor
from shikomi.train.prepare import Reference
from shikomi.train.state import Settings, State, better
from shikomi.train.step import Plan, gradients, plan_step

SAVE_SECONDS = 300.0  # between checkpoints where save_steps is not given


class Hooks(Protocol):
    """What happens outside the loop."""

    def record(self, record: dict[str, Any]) -> None:
        """One finished optimizer step."""

    def evaluate(self, state: State) -> dict[str, float]:
        """Scores on the validation rows; may be empty."""

    def save(self, state: State, best: bool) -> None:
        """Writes a checkpoint."""

    def non_finite(self, plan: Plan, state: State) -> str:
        """Writes down the batch that gave a non-finite loss; returns where."""

    def note(self, text: str) -> None:
        """One line for the user."""


@dataclass
class Run:
    """The parts that the loop drives."""

    lm: LanguageModel
    objective: Objective[Any]
    batch: Callable[[int], list[Any]]  # examples of optimizer step i, of the objective's kind: a function of i alone
    optimizer: torch.optim.Optimizer
    settings: Settings
    state: State
    hooks: Hooks
    reference: Reference | None = None  # where the objective needs one


def train(run: Run) -> None:
    """Runs the stage from `run.state` to its end; updates parameters and state in place.

    Raises Stopped after a signal (the step is finished and saved), NonFinite before the update that a non-finite
    loss would make, TryAgain when memory is short even for half the micro-batch.
    """
    settings, state = run.settings, run.state
    state.micro_batch_tokens = state.micro_batch_tokens or settings.micro_batch_tokens
    saved_at = time.monotonic()
    scaler = torch.amp.GradScaler(run.lm.device.type, enabled=run.lm.dtypes.arithmetic == torch.float16)
    if state.loss_scale:
        scaler.load_state_dict(state.loss_scale)
    scaler.scale(torch.zeros((), device=run.lm.device))  # makes its tensors; `gradients` multiplies the loss itself
    with _signals() as asked:
        while state.step < settings.total_steps and not state.stopped_early:
            record = _step(run, scaler)
            run.hooks.record(record)
            ends = state.step == settings.total_steps
            if settings.eval_steps and (state.step % settings.eval_steps == 0 or ends):
                _evaluate(run)
            due = settings.save_steps and state.step % settings.save_steps == 0
            overdue = not settings.save_steps and time.monotonic() - saved_at > SAVE_SECONDS
            if due or overdue or ends or state.stopped_early or asked:
                state.loss_scale = scaler.state_dict()
                run.hooks.save(state, best=False)
                saved_at = time.monotonic()
            if asked and not ends:
                code = 130 if asked[0] == signal.SIGINT else 143
                raise Stopped(f"stopped after step {state.step} of {settings.total_steps}; it is saved", code)


def _step(run: Run, scaler: torch.amp.GradScaler) -> dict[str, Any]:
    """One optimizer step with its record; on out-of-memory once more with half the micro-batch."""
    started = time.perf_counter()
    settings, state = run.settings, run.state
    examples = run.batch(state.step)
    rate = settings.learning_rate * factor(settings.schedule, state.step, settings.total_steps, settings.warmup_steps)
    for group in run.optimizer.param_groups:
        group["lr"] = rate * group.get("ratio", 1.0)
    plan, sums = _gradients(run, examples, float(scaler.get_scale()))
    held = [*run.lm.trainable().values(), *(p for group in run.optimizer.param_groups for p in group["params"])]
    trained = [p for p in dict.fromkeys(held) if p.grad is not None]  # with what stands in for projected gradients
    scaler.unscale_(run.optimizer)
    norm = nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None])
    values = torch.stack(
        [norm.float(), *[v.float() for v in sums.values()]]
    ).tolist()  # the step's only synchronisation
    loss = values[1]
    if not math.isfinite(loss) or (not math.isfinite(values[0]) and not scaler.is_enabled()):
        where = run.hooks.non_finite(plan, state)
        raise NonFinite(
            f"step {state.step + 1}: loss {loss}, grad_norm {values[0]}; the update was not made. "
            f"The batch is in {where}. Try a lower learning_rate or dtype: fp32."
        )
    if settings.max_grad_norm is not None:
        nn.utils.clip_grads_with_norm_(trained, settings.max_grad_norm, norm)
    scaler.step(run.optimizer)
    scaler.update()
    run.optimizer.zero_grad(set_to_none=True)
    state.step += 1
    state.global_step += 1
    state.total_tokens += plan.tokens
    state.trained_tokens += plan.counts["tokens"]
    seconds = time.perf_counter() - started
    state.training_seconds += seconds
    state.last_loss = loss
    named = dict(zip(sums, values[1:], strict=True))
    return {
        "step": state.global_step,
        "loss": named.pop("loss"),
        "grad_norm": values[0],
        "learning_rate": rate,
        "tokens": plan.tokens,
        "trained_tokens": plan.counts["tokens"],
        "computed_tokens": plan.computed,
        "seconds": round(seconds, 4),
        **named,
    }


def _gradients(run: Run, examples: list[Any], scale: float) -> tuple[Plan, dict[str, torch.Tensor]]:
    settings, state, objective = run.settings, run.state, run.objective
    kind = (objective.data, objective.needs, settings.max_length)
    key = _key(settings.seed, state.global_step)
    for attempt in (1, 2):
        plan = plan_step(examples, state.micro_batch_tokens, settings.share_prefix, *kind)
        for group in run.optimizer.param_groups:
            group["micro_batches"] = len(plan.micro)
        try:
            return plan, gradients(run.lm, objective, plan, key, scale, run.reference)
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if not _is_out_of_memory(error):
                raise
            run.optimizer.zero_grad(set_to_none=True)
            halved = state.micro_batch_tokens // 2
            if attempt == 2 or halved < 8:
                raise TryAgain(
                    f"out of memory with micro_batch_tokens={state.micro_batch_tokens}: lower it, shorten max_length, "
                    f"set recompute: full, or free memory, and resume"
                ) from error
            run.hooks.note(f"out of memory: micro_batch_tokens {state.micro_batch_tokens} -> {halved}")
            state.micro_batch_tokens = halved
        if run.lm.device.type == "cuda":
            torch.cuda.empty_cache()
    raise AssertionError("unreachable")


def probe(run: Run, largest: list[Any]) -> None:
    """Computes the gradients of the largest micro-batch of the stage once and throws them away.

    So an out-of-memory shows in the first seconds, where it halves the micro-batch, and not at step 164.
    """
    started = time.perf_counter()
    run.state.micro_batch_tokens = run.state.micro_batch_tokens or run.settings.micro_batch_tokens
    _gradients(run, largest, 1.0)
    run.optimizer.zero_grad(set_to_none=True)
    run.state.training_seconds += time.perf_counter() - started


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return "can't allocate memory" in str(error) or "out of memory" in str(error)


def _key(seed: int, step: int) -> int:
    """The seed of a step's dropout masks: derived, never drawn from history."""
    return (seed * 2_147_483_629 + step * 65_537) % (1 << 62)


def _evaluate(run: Run) -> None:
    settings, state = run.settings, run.state
    scores = run.hooks.evaluate(state)
    if settings.metric not in scores:
        return
    if better(settings.metric, scores[settings.metric], state.best):
        state.best, state.best_step, state.worse_evaluations = scores[settings.metric], state.global_step, 0
        if settings.keep_best:
            run.hooks.save(state, best=True)
    else:
        state.worse_evaluations += 1
        patience = settings.early_stopping_patience
        if patience is not None and state.worse_evaluations >= patience:
            state.stopped_early = True
            run.hooks.note(f"stopped early: {settings.metric} has not improved for {patience} evaluations")


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """Within: SIGTERM and SIGINT are noted instead of killing; a second SIGINT interrupts at once."""
    asked: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def note(number: int, frame: object) -> None:
        if asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked.append(number)

    before = {n: signal.signal(n, note) for n in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
