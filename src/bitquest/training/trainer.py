"""The training loop: start or go on, step, write down, evaluate, save. It prints nothing; a display may listen.

Everything a step depends on is in the checkpoint or a function of (seed, step), so a run that was stopped, by a signal
or a power cut, and goes on is bit-identical to one that was not: same weights, same optimizer, same losses.
"""

import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from bitquest.errors import CheckpointError, ConfigError, UserError
from bitquest.models import Llama
from bitquest.models.fuse import fuse_
from bitquest.nn import training_backends
from bitquest.training.build import checkpoint_config, new_model, restored_model
from bitquest.training.checkpoint import (
    OPTIMIZER,
    Checkpoint,
    checkpoints_folder,
    forget_after,
    list_steps,
    named_tensors,
    read_checkpoint,
    remove_leftovers,
    save_checkpoint,
)
from bitquest.training.config import TrainConfig
from bitquest.training.data import Tokens, open_tokens
from bitquest.training.diagnose import Diagnosis
from bitquest.training.diagnostics import StepClock, environment, memory_mb
from bitquest.training.evaluate import HeldOutLoss, held_out_loss
from bitquest.training.loggers import Loggers, Record, require_loggers
from bitquest.training.optim import load_optimizer, optimizer_tensors
from bitquest.training.recipe import Recipe
from bitquest.training.recipe_distill import Distillation
from bitquest.training.runs import check_free, check_same, claimed, is_run, start_run
from bitquest.training.schedule import learning_rate_share
from bitquest.training.step import Stepper, StepResult, autocast, choose_device
from bitquest.training.surroundings import (
    changes,
    check_length,
    data_digest,
    generator_states,
    restore_generators,
    surroundings,
    with_absolute_paths,
)


class DivergenceError(UserError):
    """The loss or the gradient became infinite or NaN."""


@dataclass(frozen=True)
class RunStart:
    """What a display is told first; `step` is where the run goes on from, 0 for a new one."""

    run_dir: Path
    config: TrainConfig
    step: int
    parameters: int
    device: str
    precision: str
    notices: tuple[str, ...] = ()


@dataclass(frozen=True)
class TrainResult:
    """Where a call of `train` left the run. Losses in nats per token, seconds in training steps over all sessions.

    train_loss is the last step's; val_loss and bits_per_byte the last evaluation's, None before the first.
    resumed_from is the checkpoint's step this call went on from, None for a new run.
    """

    step: int
    finished: bool
    train_loss: float | None
    val_loss: float | None
    bits_per_byte: float | None
    seconds: float
    tokens_per_s: float
    interrupted: bool
    resumed_from: int | None


class Display(Protocol):
    """Listens to a run: `on_step`, `on_evaluate` and, if it has one, `on_diagnose` get the records of metrics.jsonl."""

    def on_start(self, start: RunStart) -> None: ...
    def on_step(self, record: Record) -> None: ...
    def on_evaluate(self, record: Record) -> None: ...
    def on_end(self, result: TrainResult | None) -> None: ...


def train(
    config: TrainConfig,
    run_dir: str | Path,
    *,
    resume: bool = True,
    from_step: int | None = None,
    display: Display | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> TrainResult:
    """Train in `run_dir`, going on from its newest checkpoint if it has one; a finished run is left as it is.

    resume=False refuses a directory that holds a run. from_step goes back to that checkpoint and removes later ones.
    should_stop is asked after every step; once true, the run is saved and the result says `interrupted`.
    display.on_end is called with None when an error ends the run.

    Raises ConfigError (nothing was written), DataError, CheckpointError, MissingExtraError, and DivergenceError when
    the loss or gradient is no longer finite (nothing of that is saved).
    """
    run_dir, config = Path(run_dir), with_absolute_paths(config)
    with ExitStack() as stack:
        checkpoint, is_new = None, not is_run(run_dir)
        if not is_new:
            if not resume:
                raise ConfigError(f"{run_dir} already holds a run; remove it, or choose another directory with --out")
            stack.enter_context(claimed(run_dir))
            check_same(run_dir, config)
            checkpoint = _checkpoint_to_resume(run_dir, from_step)
            if checkpoint is not None and checkpoint.step >= config.train.steps:
                return _result(
                    config, checkpoint.step, checkpoint.state, interrupted=False, resumed_from=checkpoint.step
                )
        else:
            check_free(run_dir)
            if from_step is not None:
                raise CheckpointError(f"{run_dir}: no checkpoint of step {from_step}: there is no run yet")
        stack.enter_context(surroundings(config))
        session = _Session(config, run_dir, checkpoint)
        if is_new:
            stack.enter_context(claimed(run_dir))
            if is_run(run_dir):  # another process began one while this one read its data
                raise ConfigError(
                    f"{run_dir}: another process has begun a run here meanwhile; choose another directory with --out, "
                    "or give the same command again to go on with that run"
                )
            start_run(run_dir, config, session.tokens.tokenizer())
        remove_leftovers(run_dir)
        if checkpoint is not None:
            forget_after(run_dir, checkpoint.step)
        return session.run(display, should_stop)


def _checkpoint_to_resume(run_dir: Path, from_step: int | None) -> Checkpoint | None:
    if from_step is None and not list_steps(run_dir):
        return None
    return read_checkpoint(run_dir, from_step)


class _Session:
    """One call of `train` on an unfinished run: model, optimizer and data, ready for the step after `self.step`."""

    def __init__(self, config: TrainConfig, run_dir: Path, checkpoint: Checkpoint | None) -> None:
        self.config, self.run_dir = config, run_dir
        require_loggers(config.log)
        self.device = choose_device(config.train.device)
        self.tokens = open_tokens(Path(config.data.path), "train")
        self.held_out = open_tokens(Path(config.data.path), "val")
        check_length(self.tokens, "train", config)
        check_length(self.held_out, "val", config)
        self.step = 0 if checkpoint is None else checkpoint.step
        self.resumed_from = None if checkpoint is None else checkpoint.step
        self.environment = environment(self.device)
        self.notices: tuple[str, ...] = ()
        where = str(checkpoints_folder(run_dir) / f"step-{self.step}")
        if checkpoint is None:
            model = new_model(config, self.tokens)
        else:
            self._check_data(checkpoint)
            trained = checkpoint_config(checkpoint, where)
            model = restored_model(trained, checkpoint, where, config.train.backend)
        self.model: Llama = model.to(self.device).train()
        self.environment["engine"] = training_backends(self.model)
        if self.environment["engine"] != "torch":
            fuse_(self.model)
        self.model.activation_checkpointing = config.train.activation_checkpointing
        self.recipe = Recipe(self.model, config, is_new=checkpoint is None and config.model.init_from is None)
        teacher = Distillation(config.recipe, self.tokens, self.device) if config.recipe.teacher else None
        self.optimizer = self.recipe.optimizer
        self.stepper = Stepper(
            self.model,
            self.optimizer,
            config.train,
            config.optimizer.clip,
            self.device,
            lambda lr: self.recipe.before_update(self.step + 1, lr),
            None if teacher is None else teacher.loss,
        )
        # what checkpoints carry on: the last losses, tokens and seconds
        self.progress: Record = {
            "train_loss": None,
            "val_loss": None,
            "bits_per_byte": None,
            "tokens": 0,
            "seconds": 0.0,
        }
        if checkpoint is not None:
            load_optimizer(self.optimizer, self.model, checkpoint.optimizer, f"{where}/{OPTIMIZER}")
            self.recipe.load(checkpoint.optimizer, f"{where}/{OPTIMIZER}")
            restore_generators(checkpoint.optimizer, self.device)
            self.progress = {name: checkpoint.state.get(name, start) for name, start in self.progress.items()}
            self.notices = changes(checkpoint.state.get("environment", {}), self.environment)
        if teacher is not None:
            self.notices += (teacher.cost,)
        self.clock = StepClock(self.progress["seconds"])
        self.diagnosis = Diagnosis(config, self.model, self.held_out, self.stepper.precision, checkpoint)

    def run(self, display: Display | None, should_stop: Callable[[], bool] | None) -> TrainResult:
        loggers = Loggers(self.run_dir, self.config, self.step)
        result = None
        try:
            if display is not None:
                display.on_start(self._start())
            result = self._loop(loggers, display, should_stop)
        finally:
            loggers.close()
            if display is not None:
                display.on_end(result)
        return result

    def _start(self) -> RunStart:
        parameters = sum(p.numel() for p in self.model.parameters())
        name, precision = str(self.environment["device"]), self.stepper.precision
        return RunStart(self.run_dir, self.config, self.step, parameters, name, precision, self.notices)

    def _loop(self, loggers: Loggers, display: Display | None, should_stop: Callable[[], bool] | None) -> TrainResult:
        config, steps = self.config, self.config.train.steps
        tokens_per_step = config.train.batch_size * config.data.context
        if self.step == 0:
            self._emit(self.diagnosis.look_if_due(0, self.clock), loggers, display)
        self.clock.lap()
        lap_from, stopping = self.step, False
        while self.step < steps and not stopping:
            step = self.step + 1
            logs = step % config.log.every == 0 or step in (1, steps)
            evaluates = _is_due(step, config.evaluate.every, steps)
            lr = config.optimizer.lr * learning_rate_share(config.schedule, step, steps)
            windows = self.tokens.batch(config.seed, step - 1, config.train.batch_size, config.data.context)
            self.recipe.before_step(step)
            result = self.stepper.step(windows.to(self.device), lr, record=logs)
            self.recipe.after_step(step)
            stopping = should_stop is not None and should_stop()
            saves = stopping or _is_due(step, config.checkpoint.every, steps)
            self.progress["tokens"] += tokens_per_step
            if logs or evaluates or saves or self.device.type == "cpu":  # elsewhere looking means waiting
                self._check_finite(step, result)
                self.progress["train_loss"] = result.loss.item()
            self.step = step
            if logs:
                speed = tokens_per_step * (step - lap_from) / self.clock.lap()
                lap_from = step
                self._emit(self._train_record(result, lr, speed), loggers, display)
            if evaluates:
                with self.clock.paused():
                    self._emit(self._evaluate(), loggers, display)
            self._emit(self.diagnosis.look_if_due(step, self.clock), loggers, display)
            if saves:
                with self.clock.paused():
                    self.progress["seconds"] = self.clock.seconds
                    loggers.metrics.sync()
                    self._save()
        return _result(config, self.step, self._state(), interrupted=self.step < steps, resumed_from=self.resumed_from)

    def _emit(self, record: Record | None, loggers: Loggers, display: Display | None) -> None:
        if record is not None:
            loggers.write(record)
            told = {"train": "on_step", "evaluate": "on_evaluate", "diagnose": "on_diagnose"}[record["kind"]]
            if (listen := getattr(display, told, None)) is not None:  # on_diagnose is not everybody's
                listen(record)

    def _train_record(self, result: StepResult, lr: float, tokens_per_s: float) -> Record:
        return {
            "kind": "train",
            "step": self.step,
            "loss": self.progress["train_loss"],
            "lr": lr,
            "grad_norm": result.grad_norm.item(),
            "tokens": self.progress["tokens"],
            "tokens_per_s": tokens_per_s,
            "masked_share": result.masked_share,
            "memory_mb": memory_mb(self.device),
            "seconds": self.clock.seconds,
        }

    def _evaluate(self) -> Record:
        with self.recipe.published():
            loss = evaluate_split(self.model, self.held_out, self.config, self.device, self.stepper.precision)
        if not math.isfinite(loss.loss):
            raise DivergenceError(self._diverged(self.step, f"the validation loss is {loss.loss}"))
        bits_per_byte = loss.bits_per_byte(self.held_out.utf8_bytes / self.held_out.count)
        self.progress |= {"val_loss": loss.loss, "bits_per_byte": bits_per_byte}
        return {"kind": "evaluate", "step": self.step, "loss": loss.loss, "bits_per_byte": bits_per_byte}

    def _check_finite(self, step: int, result: StepResult) -> None:
        if not result.is_finite():
            loss, norm = result.loss.item(), result.grad_norm.item()
            raise DivergenceError(self._diverged(step, f"the loss is {loss}, the gradient's norm {norm}"))

    def _diverged(self, step: int, what: str) -> str:
        steps = list_steps(self.run_dir)
        good = f"the last good checkpoint is of step {steps[-1]}" if steps else "there is no earlier checkpoint"
        return (
            f"{self.run_dir}: training diverged: at step {step} {what}. Nothing of it was saved; {good}. "
            f"In a new run lower optimizer.lr (now {self.config.optimizer.lr:g}), raise schedule.warmup, "
            "or set optimizer.clip"
        )

    def _save(self) -> None:
        tensors = named_tensors(
            optimizer_tensors(self.optimizer, self.model) | self.recipe.tensors() | self.diagnosis.tensors()
        )
        tensors |= generator_states(self.device)
        with self.recipe.published() as model:
            checkpoint = Checkpoint(self.step, named_tensors(model), tensors, self._state())
            save_checkpoint(self.run_dir, checkpoint, self.config.checkpoint.keep)

    def _state(self) -> dict[str, Any]:
        return {
            **self.progress,
            "config": self.config.to_dict(),
            "model": self.model.config.to_json(),
            "data": {"manifest_sha256": data_digest(self.config), "vocab_size": self.tokens.vocab_size},
            "environment": self.environment,
        }

    def _check_data(self, checkpoint: Checkpoint) -> None:
        before = checkpoint.state.get("data", {}).get("manifest_sha256")
        if before != data_digest(self.config):
            raise ConfigError(
                f"data.path = {self.config.data.path} is not the data that {self.run_dir} was trained on up to step "
                f"{checkpoint.step} (its manifest.json differs): give that data, or start another run with --out"
            )


def evaluate_split(
    model: torch.nn.Module, tokens: Tokens, config: TrainConfig, device: torch.device, precision: str
) -> HeldOutLoss:
    """Loss on evaluate.batches batches of non-overlapping windows, each as large as a training micro-batch."""
    batch_size = config.train.batch_size // config.train.accumulation
    windows = tokens.windows(config.data.context, batch_size, limit=config.evaluate.batches or None)
    return held_out_loss(model, windows, device, autocast(device, precision))


def _is_due(step: int, every: int, steps: int) -> bool:
    return step == steps or (every > 0 and step % every == 0)


def _result(
    config: TrainConfig, step: int, state: dict[str, Any], *, interrupted: bool, resumed_from: int | None
) -> TrainResult:
    seconds = state["seconds"]
    return TrainResult(
        step=step,
        finished=step >= config.train.steps,
        train_loss=state["train_loss"],
        val_loss=state["val_loss"],
        bits_per_byte=state["bits_per_byte"],
        seconds=seconds,
        tokens_per_s=state["tokens"] / seconds if seconds else 0.0,
        interrupted=interrupted,
        resumed_from=resumed_from,
    )
