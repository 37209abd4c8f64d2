"""The loop. Every task runs through it; logging, evaluating, saving and stopping are written out where they happen."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from ptft_dist.checkpoint.checkpoint import Checkpoint, Checkpoints, SaveError
from ptft_dist.config.recipe import Recipe
from ptft_dist.engine import Engine
from ptft_dist.errors import CheckpointError, CheckpointVersionError, NonFiniteLossError
from ptft_dist.reporting.metrics import Averages, JsonLines, Sink, say
from ptft_dist.tasks.protocol import Batch, Task
from ptft_dist.training.batches import Batches
from ptft_dist.training.schedule import lr_at
from ptft_dist.training.stopping import StopRequest
from ptft_dist.training.validation import Validation


@dataclass
class Progress:
    """How far the run is: everything that a checkpoint must know beside weights, optimizer and batches."""

    step: int = 0
    tokens: int = 0
    best: float | None = None
    best_step: int | None = None
    worse_evaluations: int = 0
    evaluated_step: int = -1
    first_metrics: dict[str, float] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    best_metrics: dict[str, float] = field(default_factory=dict)  # all of the best evaluation


@dataclass(frozen=True)
class UpdateReport:
    """What one optimizer update did, the same on every rank. loss is the mean over `count`, in nats."""

    loss: float
    lr: float
    grad_norm: float | None
    count: int
    tokens: int
    stop: bool
    metrics: dict[str, float]


@dataclass(frozen=True)
class Outcome:
    finished: bool
    reason: str


class Trainer:
    def __init__(
        self,
        recipe: Recipe,
        engine: Engine,
        task: Task,
        batches: Batches,
        total_steps: int,
        validation: Validation | None,
        checkpoints: Checkpoints,
        facts: dict[str, Any],
        sinks: Sequence[Sink],
        stop: StopRequest,
        samples: JsonLines | None = None,
        flops_per_token: float = 0.0,
        peak_flops: float = 0.0,
    ) -> None:
        """facts: what every manifest says of the run. sinks: where rows go; empty on all ranks but the first.
        samples: where texts go that were written at evaluations."""
        self.recipe, self.engine, self.task, self.batches = recipe, engine, task, batches
        self.total_steps, self.validation, self.samples = total_steps, validation, samples
        self.checkpoints, self.facts, self.sinks, self.stop = checkpoints, facts, sinks, stop
        self.flops_per_token, self.peak_flops = flops_per_token, peak_flops
        self.progress = Progress()
        self.saved_step = -1
        self.tokens_here, self.seconds_here = 0, 0.0  # of this start, not of the whole run

    def fit(self) -> Outcome:
        """Train to the end, or until all ranks have agreed to stop."""
        progress, recipe = self.progress, self.recipe
        if recipe.eval.at_start and progress.evaluated_step < 0:
            self.evaluate()
        while progress.step < self.total_steps and not self.out_of_patience():
            stop, started = False, time.perf_counter()
            for group in self.batches.next_phase():
                report = self.update(group)
                progress.step += 1
                progress.tokens += report.tokens
                stop = stop or report.stop
                seconds, started = time.perf_counter() - started, time.perf_counter()
                self.tokens_here += report.tokens
                self.seconds_here += seconds
                if progress.step % recipe.log.every == 0 or progress.step == self.total_steps:
                    self.log(self.train_row(report, seconds))
            # Between phases, and only here, weights, optimizer, batches and progress tell of the same moment.
            ended = progress.step >= self.total_steps
            improved = self.due(recipe.eval.every) and not ended and self.evaluate()
            if stop and not ended:
                self.save(must=True)
                return Outcome(False, self.stop_reason())
            if not ended and (self.due(recipe.save.every) or (improved and recipe.save.best)):
                self.save(must=False)
        if progress.evaluated_step != progress.step:
            self.evaluate()
        self.save(must=True)
        return Outcome(True, "out of patience" if self.out_of_patience() else "all updates done")

    def update(self, group: Sequence[Batch]) -> UpdateReport:
        """One optimizer update from this rank's micro-batches; each loss is averaged over all ranks' counts."""
        engine, progress = self.engine, self.progress
        lr = lr_at(progress.step, self.recipe.optim, self.total_steps)
        wish = float(self.stop.requested())
        counts = [float(sum(each)) for each in zip(*(b.counts for b in group), strict=True)]
        totals = engine.all_sum(*counts, float(sum(b.tokens for b in group)), wish)
        # Data parallelism averages gradients over ranks; this makes it the mean over everything that counts.
        scale = engine.world_size / totals[: len(counts)].where(totals[: len(counts)] > 0, 1.0)
        averages = Averages()
        for i, batch in enumerate(group):
            with engine.micro_batch(last=i == len(group) - 1):
                engine.seed(self.recipe.train.seed, progress.step, i)
                loss, metrics, _ = engine.forward(self.task.loss, batch.inputs)
                engine.backward((loss.reshape(-1) * scale.to(loss.dtype)).sum())
            averages.add(loss, metrics)
        reduced = engine.all_sum(*averages.sums())
        norm = engine.clip_gradients()
        parts = [totals, reduced] if norm is None else [totals, reduced, norm.double().reshape(1)]
        # The step's one wait for the device: nothing moves before every rank knows that the loss is finite.
        numbers = torch.cat(parts).tolist()
        counts, (tokens, stop, *rest) = numbers[: len(counts)], numbers[len(counts) :]
        grad_norm = None if norm is None else rest.pop()
        loss_mean, metrics = averages.read(rest, counts)
        self.require_finite("loss", loss_mean)
        if engine.precision != "fp16":  # the fp16 loss scaler skips such a step, and lowers its scale
            self.require_finite("gradient norm", grad_norm)
        stepped_norm = engine.step(lr)
        if engine.precision != "fp16":
            self.require_finite("gradient norm", stepped_norm)
        norm_value = stepped_norm if grad_norm is None else grad_norm
        return UpdateReport(loss_mean, lr, norm_value, round(counts[0]), round(tokens), stop > 0, metrics)

    def require_finite(self, what: str, value: float | None) -> None:
        if value is not None and not math.isfinite(value):
            raise NonFiniteLossError(
                f"the {what} at update {self.progress.step + 1} is {value}: nothing was saved after it. Go on from "
                "the last checkpoint with a lower optim.lr, more warmup, a smaller max_grad_norm or cleaner data"
            )

    def due(self, every: int | None) -> bool:
        return every is not None and self.progress.step % every == 0

    def out_of_patience(self) -> bool:
        patience = self.recipe.eval.patience
        return patience is not None and self.progress.worse_evaluations >= patience

    def stop_reason(self) -> str:
        reasons = [reason for reason in self.engine.gather_objects(self.stop.reason) if reason]
        return reasons[0]

    def evaluate(self) -> bool:
        """Score the validation rows, each once; True if the chosen metric is the best so far."""
        if self.validation is None:
            return False
        started, progress = time.perf_counter(), self.progress
        metrics, samples = self.validation.score(self.engine, self.task)
        self.require_finite("validation loss", metrics["loss"])
        if self.samples is not None:
            for sample in samples:
                self.samples.write({"step": progress.step, **sample})
        row = {f"eval/{name}": value for name, value in metrics.items()}
        self.log({"step": progress.step, **row, "eval/time_s": round(time.perf_counter() - started, 3)})
        progress.metrics = row
        progress.first_metrics = progress.first_metrics or row
        progress.evaluated_step = progress.step
        return self.is_best(metrics)

    def is_best(self, metrics: dict[str, float]) -> bool:
        progress, value = self.progress, metrics[self.recipe.eval.metric]
        if progress.step == 0:
            return False  # weights that have not learned are no candidate: no checkpoint holds them
        sign = 1 if self.recipe.eval.larger_is_better else -1
        if progress.best is not None and not sign * value > sign * progress.best:
            progress.worse_evaluations += 1
            return False
        progress.best, progress.best_step, progress.worse_evaluations = value, progress.step, 0
        progress.best_metrics = progress.metrics
        return True

    def save(self, *, must: bool) -> None:
        """Commit a checkpoint. One that fails on the way does not end the run, unless it `must` succeed."""
        step = self.progress.step
        if step == self.saved_step:
            return
        for sink in (*self.sinks, self.samples):
            if sink is not None:
                sink.flush()
        facts = {**self.facts, "progress": asdict(self.progress), "batches": self.batches.state_dict()}
        try:
            self.checkpoints.commit(step, self.engine.save_state, facts, self.engine, self.engine.state_bytes())
        except SaveError as error:
            if must:
                raise
            if self.engine.is_main:
                say(f"SAVE FAILED at step {step}, training goes on: {error}")
            return
        self.saved_step = step
        if self.engine.is_main:
            best = self.progress.best_step if self.recipe.save.best else None
            self.checkpoints.retain(self.recipe.save.keep, best)
        self.engine.barrier()

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go on from a verified checkpoint."""
        self.engine.load_state(checkpoint.path)
        self.batches.load_state_dict(checkpoint.fact("batches", dict))
        try:
            self.progress = Progress(**checkpoint.fact("progress", dict))
        except TypeError as error:
            raise CheckpointVersionError(f"{checkpoint.path} was written by another version of ptft: {error}") from None
        self.saved_step = checkpoint.step
        if self.progress.step != checkpoint.step:
            raise CheckpointError(f"{checkpoint.path}: its manifest tells of step {self.progress.step}")

    def log(self, row: dict[str, Any]) -> None:
        for sink in self.sinks:
            sink.write(row)

    def train_row(self, report: UpdateReport, seconds: float) -> dict[str, Any]:
        row: dict[str, Any] = {"step": self.progress.step, "loss": report.loss, "lr": report.lr}
        if report.grad_norm is not None and math.isfinite(report.grad_norm):
            row["grad_norm"] = report.grad_norm
        elif report.grad_norm is not None:
            row["skipped"] = 1  # by the fp16 loss scaler
        row |= report.metrics
        row |= {"tokens": self.progress.tokens, "loss_tokens": report.count}
        row |= {"time_s": round(seconds, 4), "tokens_per_s": round(report.tokens / seconds, 1)}
        if self.peak_flops and self.flops_per_token:
            row["mfu"] = round(report.tokens * self.flops_per_token / seconds / self.peak_flops, 4)
        row["memory_bytes"] = self.engine.peak_memory_bytes()
        return row
