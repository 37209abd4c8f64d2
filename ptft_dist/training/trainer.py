"""The training loop of all tasks. Logging, evaluation, saving and stopping are called directly from it."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ptft_dist.checkpoint.checkpoint import Checkpoint, Checkpoints, SaveError, record
from ptft_dist.config.recipe import Recipe
from ptft_dist.engine import Engine
from ptft_dist.errors import CheckpointError, NonFiniteLossError
from ptft_dist.reporting.messages import say, warn
from ptft_dist.reporting.metrics import JsonLines, Sink
from ptft_dist.tasks.protocol import Batch, Task
from ptft_dist.training.averages import Averages
from ptft_dist.training.batches import Batches, PhaseContext
from ptft_dist.training.progress import Best, Judge, RunProgress
from ptft_dist.training.report import UpdateReport
from ptft_dist.training.schedule import lr_at
from ptft_dist.training.stopping import StopRequest
from ptft_dist.training.validation import Validation


@dataclass(frozen=True)
class Outcome:
    finished: bool
    reason: str


@dataclass
class Trainer:
    """Runs the updates, evaluations and saves of one run."""

    recipe: Recipe
    engine: Engine
    task: Task
    batches: Batches
    total_steps: int
    validation: Validation | None
    checkpoints: Checkpoints
    manifest: dict[str, Any]
    """Entries of every checkpoint's manifest that do not change during the run."""
    stop: StopRequest
    sinks: list[Sink] = field(default_factory=list)
    """Writers of metrics; empty on all ranks except rank 0."""
    samples: JsonLines | None = None
    """Writer of generated texts; None if the task generates none."""
    flops_per_token: float = 0.0
    peak_flops: float = 0.0
    progress: RunProgress = field(default_factory=RunProgress)
    saved: Checkpoint | None = None
    """The last checkpoint: committed, or resumed from."""
    tried_step: int = 0
    """The last update after which a save was due. A failed save is not repeated before the next one is due."""
    stop_agreed: bool = False
    """All ranks know that one of them was asked to stop."""
    tokens_here: int = 0  # since this start, not of the whole run
    seconds_here: float = 0.0

    def fit(self) -> Outcome:
        """Train until the last update, or until all ranks have agreed to stop."""
        self.stop_agreed = self.anyone_asked_to_stop()
        if self.recipe.eval.at_start and self.progress.evaluated_step < 0 and not self.stop_agreed:
            self.evaluate()
        while not self.ended():
            # Phase boundary: state is consistent only here.
            if self.stop_agreed:
                self.save(must=True)
                return Outcome(False, self.stop_reason())
            if self.due(self.recipe.save.every, since=self.tried_step):
                self.tried_step = self.progress.step
                self.save(must=False)
            if self.due(self.recipe.eval.every, since=self.progress.evaluated_step):
                self.evaluate()
                if self.ended() or self.stop_agreed:
                    continue
            self.run_phase()
        self.save(must=True)
        if self.progress.evaluated_step != self.progress.step:
            self.evaluate()
            if self.validation is not None and self.progress.evaluated_step != self.progress.step:  # abandoned
                return Outcome(False, self.stop_reason())
        return Outcome(True, "stopped early: out of patience" if self.out_of_patience() else "all updates done")

    def run_phase(self) -> None:
        """Do the updates of one phase. The last update of the run ends it early."""
        began = started = time.perf_counter()
        for group in self.batches.next_phase(PhaseContext(self.progress.step, self.engine)):
            with self.engine.updating():
                report = self.update(group)
            self.progress.step, self.progress.tokens = report.step, self.progress.tokens + report.tokens
            self.stop_agreed = self.stop_agreed or report.stop
            self.batches.observe(report)
            seconds, started = time.perf_counter() - started, time.perf_counter()
            self.tokens_here, self.seconds_here = self.tokens_here + report.tokens, self.seconds_here + seconds
            if report.step % self.recipe.log.every == 0 or report.step == self.total_steps:
                self.log(self.train_row(report, seconds) | dict(self.batches.metrics))
            self.show(self.batches.take_samples())
            if report.step == self.total_steps:
                return
        self.stop.took(phase_s=time.perf_counter() - began)

    def update(self, group: Sequence[Batch]) -> UpdateReport:
        """Do one optimizer update with this rank's micro-batches; each loss is averaged over all ranks."""
        engine, step = self.engine, self.progress.step
        counts = [float(sum(each)) for each in zip(*(b.counts for b in group), strict=True)]
        totals = engine.all_sum(*counts, float(sum(b.tokens for b in group)), float(self.stop.requested()))
        # Data parallelism averages gradients over ranks; this factor makes it the mean over all labels.
        scale = engine.world_size / totals[: len(counts)].where(totals[: len(counts)] > 0, 1.0)
        averages = Averages()
        for i, batch in enumerate(group):
            with engine.micro_batch(last=i == len(group) - 1):
                engine.seed(self.recipe.train.seed, step, i)
                loss, metrics, *_ = engine.forward(self.task.loss, batch.inputs)
                engine.backward((loss.reshape(-1) * scale.to(loss.dtype)).sum())
            averages.add(loss, metrics)
        reduced = engine.all_sum(*averages.sums())
        penalty, norm = engine.regularize(), engine.clip_gradients()
        more = [x.double().reshape(1) for x in (penalty, norm) if x is not None]
        # The only wait for the device in an update. All ranks learn here whether the loss is finite.
        numbers = torch.cat([totals, reduced, *more]).tolist()
        counts, (tokens, stop, *rest) = numbers[: len(counts)], numbers[len(counts) :]
        grad_norm = None if norm is None else rest.pop()
        loss_mean, metrics = averages.read(rest, counts)
        metrics |= {} if penalty is None else {"penalty": rest.pop()}
        self.require_finite("loss", loss_mean)
        self.require_finite("gradient norm", grad_norm)
        # An update without labels must not change the weights, not even by weight decay.
        lr = lr_at(step, self.recipe.optim, self.total_steps) if any(counts) else 0.0
        stepped_norm = engine.step(lr)
        self.require_finite("gradient norm", stepped_norm)
        norm_value = stepped_norm if grad_norm is None else grad_norm
        return UpdateReport(step + 1, loss_mean, lr, norm_value, round(counts[0]), round(tokens), stop > 0, metrics)

    def require_finite(self, what: str, value: float | None) -> None:
        skipped = what == "gradient norm" and self.engine.precision == "fp16"  # the loss scaler lowers its scale then
        if value is not None and not math.isfinite(value) and not skipped:
            raise NonFiniteLossError(
                f"the {what} at update {self.progress.step + 1} is {value}; nothing was saved after it. Resume from "
                "the last checkpoint with a lower optim.lr, more warmup, a smaller max_grad_norm or cleaner data"
            )

    def due(self, every: int | None, *, since: int) -> bool:
        """Whether a multiple of `every` was crossed after update `since`; a phase may have many updates."""
        return every is not None and self.progress.step // every > max(since, 0) // every

    def ended(self) -> bool:
        return self.progress.step >= self.total_steps or self.out_of_patience()

    def out_of_patience(self) -> bool:
        patience = self.recipe.eval.patience
        return patience is not None and self.progress.worse_evaluations >= patience

    def anyone_asked_to_stop(self) -> bool:
        """Whether any rank was asked to stop; the same on every rank."""
        return self.engine.all_sum(float(self.stop.requested())).item() > 0

    def stop_reason(self) -> str:
        """What asked the run to stop, from the first rank that knows."""
        return next((reason for reason in self.engine.gather_objects(self.stop.reason) if reason), "a stop request")

    @property
    def saved_in_this_run(self) -> bool:
        """Whether this update is saved, and not only in a checkpoint of another run."""
        saved = self.saved
        return saved is not None and saved.step == self.progress.step and self.checkpoints.own(saved)

    @property
    def judge(self) -> Judge:
        """What makes this run's evaluations comparable."""
        rows = "" if self.validation is None else self.validation.identity
        return Judge(self.recipe.eval.metric, self.recipe.eval.larger_is_better, rows)

    def evaluate(self) -> None:
        """Evaluate the validation rows. A stop request abandons it; it is repeated at the resume."""
        if self.validation is None:
            return
        started, progress = time.perf_counter(), self.progress
        try:
            scores = self.validation.score(self.engine, self.task, self.stop.requested)
        except NonFiniteLossError as error:
            raise NonFiniteLossError(f"evaluation after update {progress.step}: {error}") from None
        if scores is None:
            self.stop_agreed = True
            return
        metrics, samples = scores
        self.stop_agreed = self.stop_agreed or self.anyone_asked_to_stop()
        self.show(samples)
        row = {f"eval/{name}": value for name, value in metrics.items()}
        self.log({"step": progress.step, **row, "eval/time_s": round(time.perf_counter() - started, 3)})
        progress.metrics, progress.first_metrics = row, progress.first_metrics or row
        progress.evaluated_step = progress.step
        best = progress.judge(self.judge, row, metrics[self.recipe.eval.metric]) and self.recipe.save.best
        if not self.saved_in_this_run:
            if best:  # it counts as the best checkpoint only when committed
                self.save(must=False, best=progress.best)
            return
        if best:
            progress.best_checkpoint = progress.best
        self.record_evaluation()

    def record_evaluation(self) -> None:
        """Write this evaluation to the manifest of the update's checkpoint, so that a resume does not repeat it."""
        if self.saved is None or not self.engine.is_main or not self.checkpoints.own(self.saved):
            return
        self.flush_rows()  # a resume keeps the rows of an evaluation that is in its checkpoint
        try:
            record(self.saved, progress=self.progress.to_dict())
        except OSError as error:
            warn(f"the evaluation was not written to its checkpoint, so a resume from there repeats it: {error}")

    def save(self, *, must: bool, best: Best | None = None) -> None:
        """Commit a checkpoint. A failure does not end the run, unless the save `must` succeed.

        best: the evaluation, if this checkpoint is the best one.
        """
        step, started = self.progress.step, time.perf_counter()
        if step == 0 or self.saved_in_this_run:
            return
        self.flush_rows()
        progress = self.progress if best is None else replace(self.progress, best_checkpoint=best)
        manifest = {**self.manifest, "progress": progress.to_dict(), "batches": self.batches.state_dict()}
        try:
            saved = self.checkpoints.commit(
                step, self.engine.save_state, manifest, self.engine, self.engine.state_bytes()
            )
        except SaveError as error:
            if must:
                raise
            if self.engine.is_main:
                warn(f"SAVE FAILED at update {step}, training continues: {error}")
            return
        self.progress, self.saved = progress, saved
        if self.engine.is_main:
            kept = progress.best_checkpoint if self.recipe.save.best else None
            self.checkpoints.retain(self.recipe.save.keep, None if kept is None else kept.step, warn)
        self.engine.barrier()
        self.stop.took(save_s=time.perf_counter() - started)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Load a verified checkpoint."""
        self.engine.load_state(checkpoint.path)
        self.batches.load_state_dict(checkpoint.entry("batches", dict))
        self.progress = RunProgress.from_dict(checkpoint.entry("progress", dict))
        self.saved, self.tried_step = checkpoint, checkpoint.step
        if self.progress.step != checkpoint.step:
            raise CheckpointError(
                f"{checkpoint.path}: its manifest belongs to update {self.progress.step}; restore the checkpoint"
            )
        dropped = self.progress.forget_incomparable(self.judge)
        why = "eval.metric, eval.goal, eval.max_rows or the validation rows have changed"
        if dropped is None and self.recipe.save.best and not self.checkpoints.own(checkpoint):
            dropped, why = self.progress.forget_best_checkpoint(), "its checkpoint is not one of this run"
        if dropped is not None and self.engine.is_main:
            best = f"{dropped.judge.metric} {dropped.value:.4g}, update {dropped.step}"
            say(f"the best evaluation so far ({best}) no longer counts: {why}")

    def rehearse(self) -> None:
        """Evaluate one micro-batch, generation included, so that a failing evaluation fails before training."""
        if self.validation is not None:
            self.validation.rehearse(self.engine, self.task, self.recipe.eval.metric)

    def show(self, samples: Sequence[dict[str, Any]]) -> None:
        """Write texts that the network has generated."""
        if self.samples is None or not samples:
            return
        rows = [{"step": self.progress.step, **sample} for sample in samples]
        for row in rows:
            self.samples.write(row)
        for sink in self.sinks:
            sink.show(rows)

    def log(self, row: dict[str, Any]) -> None:
        for sink in self.sinks:
            sink.write(row)

    def flush_rows(self) -> None:
        for sink in (*self.sinks, self.samples):
            if sink is not None:
                sink.flush()

    def train_row(self, report: UpdateReport, seconds: float) -> dict[str, Any]:
        row: dict[str, Any] = {"step": report.step, "loss": report.loss, "lr": report.lr}
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
