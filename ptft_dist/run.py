"""One start of a run on this process's rank: choose a checkpoint, train, export, write the result."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shlex
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from ptft_dist.checkpoint.checkpoint import Checkpoint, Checkpoints, read_checkpoint, verify
from ptft_dist.checkpoint.identity import may_change, values_of_environment
from ptft_dist.checkpoint.resume import Resume, after_requeue
from ptft_dist.config.load import Loaded
from ptft_dist.config.recipe import Recipe, is_better
from ptft_dist.engine import Engine, reset_accelerate, why_not_loadable
from ptft_dist.engine.trackers import make_tracker
from ptft_dist.errors import EXIT_FINISHED, EXIT_STOPPED, CheckpointError
from ptft_dist.failures import Failures
from ptft_dist.launch.environment import (
    Place,
    describe_backend,
    end_of_job,
    job_id,
    may_be_requeued,
    restarted_job,
    start_token,
    tell_launcher,
    user_command,
)
from ptft_dist.launch.result import write_result
from ptft_dist.networks.export import export
from ptft_dist.networks.rounding import little_kept
from ptft_dist.pages.page import write_report
from ptft_dist.reporting.messages import messages_shown, plain, say, warn
from ptft_dist.reporting.metrics import METRICS, JsonLines, Sink
from ptft_dist.reporting.model_card import model_card
from ptft_dist.reporting.run_files import (
    keep_tokenizer,
    kept_tokenizer,
    lock_run_dir,
    make_run_dir,
    save_tokenizer,
    write_start,
)
from ptft_dist.reporting.summary import continuing, results
from ptft_dist.reporting.tensorboard import TensorBoard
from ptft_dist.reporting.terminal import Terminal
from ptft_dist.reporting.trackers import check_installed, open_trackers
from ptft_dist.session import Session
from ptft_dist.training.stopping import StopRequest
from ptft_dist.training.trainer import Outcome, Trainer


@dataclass(frozen=True)
class Result:
    """How a run ended."""

    status: str
    """`finished` or `stopped`. After `stopped`, the same call resumes from the last checkpoint."""
    reason: str
    steps: int
    run_dir: Path
    model: Path | None
    """The directory of the final model; None if the run was stopped."""
    metrics: dict[str, float]
    """Metrics of the last evaluation, or of the best one if `save.export: best` exported it."""
    metrics_step: int
    """The update at which `metrics` were measured; -1 without an evaluation."""
    best: dict[str, Any] | None
    """metric, value and step of the best evaluation; None without an evaluation."""
    history: list[dict[str, Any]] = field(repr=False)
    """The rows of metrics.jsonl."""
    summary: str = field(default="", repr=False)
    """What `ptft train` prints: results, files and the next commands; empty on ranks other than 0."""

    @property
    def exit_code(self) -> int:
        return EXIT_FINISHED if self.status == "finished" else EXIT_STOPPED


def run(
    loaded: Loaded, place: Place, *, resume: str, accept: Sequence[str], failures: Failures | None = None
) -> Result:
    """Train as this rank.

    A failure is reported once and raised. If training had begun, it is also written to logs/ and result.json.

    failures: to learn the exit code of a failure from.
    """
    run_dir, lock = Path(loaded.recipe.run_dir), None
    failures = failures or Failures(run_dir, place)
    try:
        make_run_dir(run_dir)
        lock = lock_run_dir(run_dir) if place.is_main else None
        stop_file, end = (run_dir / "stop", end_of_job(os.environ)) if place.is_main else (None, None)
        stop = StopRequest(stop_file, start_token(os.environ), end)
        with libraries_restored(loaded.recipe.train.deterministic):
            return _train(loaded, failures, stop, resume, accept)
    except Exception as error:
        failures.report_error(error)
        raise
    finally:
        if lock is not None:
            lock.release()


def _train(loaded: Loaded, failures: Failures, stop: StopRequest, how: str, accept: Sequence[str]) -> Result:
    recipe, run_dir, place = loaded.recipe, Path(loaded.recipe.run_dir), failures.place
    main = place.is_main
    checkpoints = Checkpoints(run_dir / "checkpoints")
    check_installed(recipe.log)
    mode = after_requeue(checkpoints, how, restarted_job())
    session = Session(loaded, place, tokenizer_from=_tokenizer_of(loaded, mode, checkpoints))
    loadable = partial(why_not_loadable, kind=session.kind, ranks=place.world_size)
    free = partial(may_change, recipe=recipe)
    resume = Resume(checkpoints, mode, accept, session.identity, loadable, free, first=how)
    resume.precheck()
    session.plan  # noqa: B018  # raises its errors before a process group exists
    session.start(formed=failures.watch_machines)
    engine = session.engine
    checkpoint = resume.choose(engine, warn if main else _ignore)
    base = session.base_identity() if engine.trained_count < engine.parameter_count else None
    trainer = session.make_trainer(checkpoints, stop, base)
    if checkpoint is not None:
        resume.check_base(checkpoint, base)
        resume.check_groups(checkpoint, engine.groups)
        trainer.restore(checkpoint)
    trainer.rehearse()
    session.warm_up()
    # All checks have passed: the run directory is changed only from here on.
    try:
        if main:
            resume.begin(checkpoint, warn, job_id())
            _begin(session, trainer, checkpoint, new_run=resume.how != "auto")
        failures.report.begin()
        with stop.listening():
            outcome = trainer.fit()
        if outcome.finished:
            _export(session, trainer, run_dir / "model")
    finally:
        for sink in (*trainer.sinks, *([trainer.samples] if trainer.samples else [])):
            sink.close()
    result = _result(trainer, outcome, run_dir)
    if main:
        result = replace(result, summary=_finish(result, trainer, failures.wall_s))
        stop.fulfilled()
    engine.barrier()
    failures.over()
    engine.close()
    tell_launcher(result.exit_code)
    return result


def _tokenizer_of(loaded: Loaded, how: str, checkpoints: Checkpoints) -> Path | None:
    """The tokenizer that was trained by the run that this start resumes; None if it resumes none."""
    if how == "never":
        return None
    if how != "auto":
        return kept_tokenizer(_learned_by(loaded), Path(how).parent.parent)
    return kept_tokenizer(_learned_by(loaded), Path(loaded.recipe.run_dir)) if checkpoints.paths() else None


def _learned_by(loaded: Loaded) -> dict[str, Any]:
    """The settings that decide, together with the training texts, which tokenizer is trained."""
    recipe = loaded.recipe
    special = [*recipe.settings.special_tokens, *recipe.settings.extra_special_tokens]
    return {"tokenizer": recipe.tokenizer.model_dump(mode="json"), "special": special}


def _begin(session: Session, trainer: Trainer, checkpoint: Checkpoint | None, *, new_run: bool) -> None:
    """Write the first files of the run directory and open the writers of metrics; on rank 0 only.

    new_run: for trackers: the user chose where to start, so the curves may differ from those of earlier starts.
    """
    recipe, engine, progress = session.recipe, session.engine, trainer.progress
    run_dir = Path(recipe.run_dir)
    environment = {"device": session.device_name, "kind": engine.kind, "world_size": engine.world_size}
    environment |= {"networks": session.networks, "inputs": session.prepared.inputs, "updates": trainer.total_steps}
    environment |= {"variables": values_of_environment(session.loaded)}
    report = session.prepared.report.to_dict()
    report |= {key: old.report.to_dict() for key, old in session.prepared.old.items()}
    write_start(run_dir, session.loaded, report, environment)
    if recipe.tokenizer.train is not None:
        keep_tokenizer(session.prepared.tokenizer_path, _learned_by(session.loaded), run_dir)
    else:
        save_tokenizer(session.trained.tokenizer, run_dir, session.trained.tokenizer_origin)
    trainer.sinks = open_sinks(session.loaded, progress.step, progress.evaluated_step, trainer.total_steps)
    trainer.sinks += open_trackers(session.loaded, make_tracker, new_run=new_run)
    trainer.samples = session.samples(progress.step, progress.evaluated_step)
    if checkpoint is not None:
        say(f"resumed from {checkpoint.path}, update {checkpoint.step} of {trainer.total_steps}")
    say(
        f"{_parameters(engine)}, {describe_backend(engine.kind, os.environ)}, "
        f"{engine.world_size} x {session.device_name}, {recipe.train.precision}, {trainer.total_steps:,} updates"
    )


def _parameters(engine: Engine) -> str:
    count, trained = engine.parameter_count, engine.trained_count
    if trained == count:
        return f"{count:,} parameters"
    return f"{trained:,} of {count:,} parameters trained ({trained / count:.2%})"


def open_sinks(loaded: Loaded, first_step: int, last_evaluation: int, total_steps: int) -> list[Sink]:
    """The writers of metrics, without trackers."""
    run_dir = Path(loaded.recipe.run_dir)
    sinks: list[Sink] = [JsonLines(run_dir / METRICS, first_step, last_evaluation)]
    if messages_shown():
        sinks.append(Terminal(total_steps, first_step, loaded.recipe.eval.metric))
    if loaded.recipe.log.tensorboard:
        sinks.append(TensorBoard(run_dir / "tensorboard", first_step, loaded))
    return sinks


def _export(session: Session, trainer: Trainer, target: Path) -> None:
    """Export the last weights; with `save.export: best` those of the best checkpoint, if there is one."""
    best, engine, step = trainer.progress.best_checkpoint, session.engine, trainer.progress.step
    if session.recipe.save.export == "best" and best is None and engine.is_main:
        warn("save.export: best: no checkpoint of this run has the best weights; the last weights are exported")
    if session.recipe.save.export == "best" and best is not None and best.step != trainer.progress.step:
        try:
            checkpoint = read_checkpoint(trainer.checkpoints.path_of(best.step))
            if problems := verify(checkpoint, engine):
                raise CheckpointError("; ".join(problems))
            engine.load_state(checkpoint.path)
            step = best.step
        except CheckpointError as error:
            trainer.progress.best_checkpoint = None
            if engine.is_main:
                warn(f"save.export: best: {error}. The last weights are exported instead")
    card, trained = None, session.trained
    if engine.is_main:
        card = model_card(session.loaded, target.parent, step, **trained.card_facts)
    kept = export(engine, trained.content(card), target)
    again = f"ptft export {shlex.quote(str(target.parent))} --step {step} --out DIR --dtype fp32"
    if note := little_kept(kept, trained.export_dtype, f"To keep all of it: {again}; or set save.dtype: fp32"):
        warn(note)


def _result(trainer: Trainer, outcome: Outcome, run_dir: Path) -> Result:
    progress, recipe = trainer.progress, trainer.recipe
    exported = progress.best_checkpoint if outcome.finished and recipe.save.export == "best" else None
    best = None
    if progress.best is not None:
        best = {"metric": progress.best.judge.metric, "value": progress.best.value, "step": progress.best.step}
    history: list[dict[str, Any]] = []
    if trainer.engine.is_main:
        history = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return Result(
        status="finished" if outcome.finished else "stopped",
        reason=outcome.reason,
        steps=progress.step,
        run_dir=run_dir,
        model=run_dir / "model" if outcome.finished else None,
        metrics=dict(progress.metrics if exported is None else exported.metrics),
        metrics_step=progress.evaluated_step if exported is None else exported.step,
        best=best,
        history=history,
    )


def _finish(result: Result, trainer: Trainer, wall_s: float) -> str:
    """Write result.json, say how the run ended, and return its summary."""
    progress = trainer.progress
    values = {
        "status": result.status,
        "exit_code": result.exit_code,
        "reason": result.reason,
        "steps": result.steps,
        "tokens": progress.tokens,
        "wall_s": round(wall_s, 2),
        "tokens_per_s": round(trainer.tokens_here / max(trainer.seconds_here, 1e-9), 1),
        "peak_memory_bytes": trainer.engine.peak_memory_bytes(),
        "metrics": result.metrics,
        "metrics_step": result.metrics_step,
        "best": result.best,
    }
    write_result(result.run_dir, values)
    run_dir = result.run_dir
    page = _report(run_dir) if trainer.recipe.log.report and result.history else None
    if result.status == "stopped":
        saved = f"saved to {trainer.saved.path}" if trainer.saved else "nothing to save yet"
        go_on = continuing(user_command(os.environ), in_job=may_be_requeued())
        say(f"stopped by {result.reason} after update {result.steps}; {saved}; {go_on}")
    else:
        say(f"finished after update {result.steps}: {result.reason}")
    return results(
        run_dir,
        result.metrics,
        progress.first_metrics,
        trainer.recipe.eval.metric,
        note=_about_the_best(result, progress.first_metrics, trainer.recipe),
        model=result.model,
        samples=trainer.samples is not None,
        report=page,
        generates=trainer.recipe.settings.writes,
    )


def _about_the_best(result: Result, first: Mapping[str, float], recipe: Recipe) -> str:
    """Which evaluation the metrics are of, if that is a question; and whether the network was better at the start.

    first: metrics of the first evaluation. The best one is an evaluation of trained weights.
    """
    best = result.best
    if best is None or best["step"] == result.steps:
        return ""
    start, before = first.get(f"eval/{best['metric']}"), ""
    if start is not None and is_better(start, best["value"], larger_is_better=recipe.eval.larger_is_better):
        before = f"; {plain(start)} before the training was better"
    if recipe.save.export == "best" and result.model is not None:
        return f"of update {result.metrics_step}, the best evaluation, whose weights are the model{before}"
    return f"the best {best['metric']} was {plain(best['value'])}, after update {best['step']}{before}"


def _report(run_dir: Path) -> Path | None:
    """Write report.html. A failure is a warning: the run has finished, and `ptft report` writes the page again.

    An evaluation.json in the directory is of earlier weights, so it is left out.
    """
    try:
        return write_report(run_dir, evaluation=False)
    except Exception as error:
        warn(f"the report was not written: {type(error).__name__}: {error}. Try again: ptft report {run_dir}")
        return None


@contextlib.contextmanager
def libraries_restored(deterministic: bool = False) -> Iterator[None]:
    """Silence libraries during a run, and restore the state of PyTorch, transformers and Accelerate afterwards.

    Progress bars and deprecation warnings of libraries, repeated by every rank, would hide our messages.
    """
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    was_deterministic = torch.are_deterministic_algorithms_enabled()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)  # missing kernels, at every import
    torch.use_deterministic_algorithms(deterministic)
    try:
        with warnings.catch_warnings(), torch.random.fork_rng(enabled=True):
            warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch|deepspeed|accelerate|transformers")
            yield
    finally:
        torch.use_deterministic_algorithms(was_deterministic)
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
        reset_accelerate()


def _ignore(_text: str) -> None: ...
