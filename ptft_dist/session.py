"""What one rank does: recipe -> data -> network -> engine -> trainer -> result.

Everything that can be wrong with the recipe, the data or the machine is looked at before the process group forms.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, cast

import torch
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from ptft_dist.checkpoint.checkpoint import Checkpoints
from ptft_dist.checkpoint.identity import run_identity
from ptft_dist.checkpoint.resume import Resume
from ptft_dist.config.load import Loaded, dump_resolved
from ptft_dist.config.recipe import ModelSection, Recipe
from ptft_dist.config.resolve import BatchShape, batch_shape
from ptft_dist.data.order import Plan, make_plan
from ptft_dist.data.prepare import Prepared, describe, prepare
from ptft_dist.data.sources import check_sources
from ptft_dist.data.store import Store
from ptft_dist.data.tokenizer import load_tokenizer
from ptft_dist.engine import Engine, complete_deepspeed_config, planned_kind
from ptft_dist.engine.hardware import peak_flops
from ptft_dist.errors import EXIT_FINISHED, EXIT_PREEMPTED, DataError, PtftError, RecipeError
from ptft_dist.launch.deepspeed_config import deepspeed_config_of_launch
from ptft_dist.launch.environment import Place, check_launch, place
from ptft_dist.networks.export import export
from ptft_dist.networks.frozen import Teacher, check_teacher, load_teacher, teacher_fingerprint, teacher_section
from ptft_dist.networks.load import build_config, build_model, check_positions, flops_per_token, local_or_hub
from ptft_dist.reporting.metrics import JsonLines, Sink, TensorBoard, Terminal, say
from ptft_dist.reporting.run_files import FailureReport, lock_run_dir, make_run_dir, write_result, write_start
from ptft_dist.tasks.common.distillation import METRICS as DISTILLATION_METRICS
from ptft_dist.tasks.common.distillation import Distillation
from ptft_dist.tasks.protocol import Task
from ptft_dist.tasks.registry import task_class
from ptft_dist.training.batches import Shape, SupervisedBatches, UpdateDataset
from ptft_dist.training.schedule import warmup_steps
from ptft_dist.training.stopping import StopRequest
from ptft_dist.training.trainer import Outcome, Trainer
from ptft_dist.training.validation import Validation


@dataclass(frozen=True)
class Options:
    """How the command line wants the run to start. resume: auto, never, or the path of a checkpoint."""

    resume: str = "auto"
    accept: tuple[str, ...] = ()


def run(loaded: Loaded, options: Options) -> int:
    """Train as this process's rank; the exit code. A failure is told once, logged, and written to result.json."""
    where, run_dir = place(), Path(loaded.recipe.run_dir)
    make_run_dir(run_dir)
    lock = lock_run_dir(run_dir) if where.is_main else None
    report = FailureReport(run_dir, where)
    stop = StopRequest(run_dir / "stop" if where.is_main else None)
    stop.listen()
    started = time.monotonic()
    try:
        code = train(loaded, options, where, stop)
    except Exception as error:
        code = error.exit_code if isinstance(error, PtftError) else 1
        report.write(error, code, time.monotonic() - started)
    finally:
        if lock is not None:
            lock.release()
    if where.world_size > 1:
        _end(code)
    return code


def _end(code: int) -> NoReturn:
    """End a rank without a polite farewell: after a failure the others may wait in a collective, and tearing the group
    down would wait for them; after a success see Engine.close."""
    for reader in multiprocessing.active_children():
        reader.kill()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


@dataclass(frozen=True)
class Intent:
    """What this rank is going to do, known and found good before a process group exists."""

    loaded: Loaded
    prepared: Prepared
    task_class: Any
    shape: BatchShape
    plan: Plan
    tokenizer: PreTrainedTokenizerBase
    network: ModelSection
    config: PretrainedConfig
    deepspeed: dict[str, Any] | None
    identity: dict[str, Any]
    resume: Resume
    teacher: Teacher | None = None


def intend(loaded: Loaded, options: Options, where: Place, tell: Callable[[str], None]) -> Intent:
    """Prepare the data and hold recipe, data, model, launch config and newest checkpoint against each other."""
    recipe = loaded.recipe
    check_launch(recipe)
    found = task_class(recipe.task)
    names = (*found.metric_names(recipe), *(DISTILLATION_METRICS if recipe.distillation else ()))
    if recipe.eval.metric not in names:
        raise RecipeError(f"eval.metric: {recipe.eval.metric!r} is none of: {', '.join(names)}")
    shape = batch_shape(recipe, where.world_size)
    knobs = deepspeed_config_of_launch()
    check_sources(recipe, loaded.base)
    prepared = prepare(recipe, loaded.base, progress=where.is_main)
    if not prepared.from_cache:
        tell(describe(prepared.report))
    tokenizer = load_tokenizer(prepared.tokenizer_path, trust_remote_code=recipe.tokenizer.trust_remote_code)
    network = local_or_hub(recipe.model, loaded.base)
    teacher = None
    if recipe.distillation is not None:
        section = teacher_section(recipe, loaded.base)
        teacher = Teacher(section, check_teacher(recipe, section, tokenizer, prepared.facts))
    files = {}
    if teacher is not None:
        files["distillation.teacher's files"] = teacher_fingerprint(recipe, teacher.section, loaded.base)
    who = run_identity(loaded, prepared.fingerprint, prepared.parts, files)
    kind = planned_kind(where.world_size, knobs)
    checkpoints = Checkpoints(Path(recipe.run_dir) / "checkpoints")
    resume = Resume(checkpoints, options.resume, options.accept, who, kind, where.world_size)
    resume.look()
    plan = plan_updates(recipe, prepared, shape)
    warmup = warmup_steps(recipe.optim, plan.total_steps)
    if warmup >= plan.total_steps:
        tell(f"optim.warmup: {warmup} updates of warmup in a run of {plan.total_steps}: optim.lr is never reached")
    config = build_config(
        network,
        tokenizer,
        recipe.data.max_length,
        found.model_settings(recipe, prepared.facts),
        grown=bool(recipe.tokenizer.add or recipe.settings.added_tokens),
    )
    found.fit_config(recipe, config, tokenizer)
    return Intent(
        loaded,
        prepared,
        found,
        shape,
        plan,
        tokenizer,
        network,
        config,
        deepspeed_settings(recipe, shape, knobs),
        who,
        resume,
        teacher,
    )


def train(loaded: Loaded, options: Options, where: Place, stop: StopRequest) -> int:
    recipe, run_dir, started = loaded.recipe, Path(loaded.recipe.run_dir), time.monotonic()
    tell: Callable[[str], None] = say if where.is_main else lambda _text: None
    quiet_libraries()
    intent = intend(loaded, options, where, tell)

    torch.use_deterministic_algorithms(recipe.train.deterministic)
    engine = Engine(recipe.train.precision, intent.deepspeed)
    task = intent.task_class(recipe, intent.tokenizer, engine.device, intent.prepared.facts)
    if intent.teacher is not None:
        task = with_teacher(task, intent.teacher, recipe, engine)
    model = prepare_network(recipe, intent.network, engine, task, intent.config, len(intent.tokenizer), tell)
    checkpoint = intent.resume.choose(engine, tell)
    device = device_name(engine)
    if engine.is_main:
        write_start(run_dir, loaded, {"device": device, "kind": engine.kind, "world_size": engine.world_size})
    sinks = open_sinks(loaded, checkpoint.step if checkpoint else 0, intent.plan.total_steps) if engine.is_main else []
    trainer = make_trainer(intent, engine, task, model, sinks, stop, checkpoint.step if checkpoint else 0)
    if checkpoint is not None:
        trainer.restore(checkpoint)
        tell(f"resumed from {checkpoint.path}, update {checkpoint.step} of {trainer.total_steps}")
    tell(
        f"{engine.parameter_count:,} parameters, {engine.kind}, {engine.world_size} x {device}, "
        f"{recipe.train.precision}, {trainer.total_steps:,} updates"
    )
    rows = intent.prepared.train.largest(intent.shape.largest_micro_batch(recipe.data.max_length))
    engine.warm_up(task.loss, task.collate(rows, [(0, i) for i in range(len(rows))]).inputs)
    outcome = trainer.fit()
    if outcome.finished:
        export(recipe, engine, trainer, intent.tokenizer, run_dir / "model")
    for sink in (*sinks, *([trainer.samples] if trainer.samples else [])):
        sink.close()
    if engine.is_main:
        finish(run_dir, trainer, outcome, time.monotonic() - started)
        stop.honoured()
    engine.barrier()
    engine.close()
    return EXIT_FINISHED if outcome.finished else EXIT_PREEMPTED


def make_trainer(
    intent: Intent,
    engine: Engine,
    task: Task,
    model: PreTrainedModel,
    sinks: list[Sink],
    stop: StopRequest,
    first_step: int = 0,
) -> Trainer:
    """The loop with everything that it loops over."""
    recipe, shape, store = intent.loaded.recipe, intent.shape, intent.prepared.train
    layout = Shape(engine.rank, engine.world_size, shape.micro_size, shape.micro_tokens, recipe.batch.group_by_length)
    workers = recipe.data.workers if recipe.data.workers is not None else (0 if engine.device.type == "cpu" else 2)
    batches = SupervisedBatches(
        UpdateDataset(store, intent.plan, layout, task.collate), workers, pin_memory=engine.device.type == "cuda"
    )
    return Trainer(
        recipe,
        engine,
        task,
        batches,
        intent.plan.total_steps,
        validation(recipe, intent.prepared.validation, layout, task),
        intent.resume.checkpoints,
        {
            "identity": intent.identity,
            "kind": engine.kind,
            "world_size": engine.world_size,
            "total_steps": intent.plan.total_steps,
        },
        sinks,
        stop,
        samples_file(recipe, first_step) if engine.is_main else None,
        flops_per_token(model, intent.config, engine.parameter_count, store.tokens / len(store)),
        peak_flops(engine.device, recipe.train.precision) * engine.world_size,
    )


def quiet_libraries() -> None:
    """Progress bars and deprecation notes of libraries, repeated by every rank, would bury what we have to say."""
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch|deepspeed|accelerate|transformers")


def plan_updates(recipe: Recipe, prepared: Prepared, shape: BatchShape) -> Plan:
    rows, train = len(prepared.train), recipe.train
    if shape.global_size is not None and rows < shape.global_size:
        raise DataError(
            f"batch: one update needs {shape.global_size} rows, the training data have {rows}: lower "
            "batch.global_size (or global_tokens) or data.max_length, or add data"
        )
    return make_plan(
        rows,
        prepared.train.lengths,
        train.seed,
        global_size=shape.global_size,
        global_tokens=shape.global_tokens,
        max_steps=train.max_steps,
        epochs=train.epochs,
        max_tokens=train.max_tokens,
    )


def deepspeed_settings(recipe: Recipe, shape: BatchShape, knobs: dict[str, Any] | None) -> dict[str, Any] | None:
    if knobs is None:
        return None
    norm, micro_size = recipe.optim.max_grad_norm, shape.micro_size or 1
    return complete_deepspeed_config(knobs, recipe.train.precision, norm, micro_size, shape.accumulation)


def with_teacher(task: Any, teacher: Teacher, recipe: Recipe, engine: Engine) -> Task:
    """The task with a teacher beside it. Only the student is sharded."""
    assert recipe.distillation is not None
    task.fused = False  # a student needs logits
    with engine.building(pretrained=False):
        network = load_teacher(teacher.section, task.auto_class, engine.device, engine.dtype)
    # A Task but for its class methods, which have been asked of the task itself.
    return cast(Task, Distillation(task, recipe.distillation, network, teacher.order))


def prepare_network(
    recipe: Recipe,
    section: ModelSection,
    engine: Engine,
    task: Task,
    config: PretrainedConfig,
    tokens: int = 0,
    tell: Callable[[str], None] = lambda _text: None,
) -> PreTrainedModel:
    """The network, wrapped by the engine, and asked whether it does what the task needs of it."""
    with engine.building(pretrained=section.path is not None):
        model = build_model(section, config, recipe.train.seed, task.auto_class, tokens, tell)
    check_positions(model, recipe.data.max_length)
    task.install(model)
    if section.compile:
        model.compile(dynamic=True)
    engine.prepare(model, recipe.optim)
    probe = task.probe()
    if probe is not None:
        with engine.evaluating():
            probe.check(engine.forward(probe.outputs, probe.inputs))
    return model


def device_name(engine: Engine) -> str:
    return torch.cuda.get_device_name(engine.device) if engine.device.type == "cuda" else engine.device.type.upper()


def validation(recipe: Recipe, store: Store | None, layout: Shape, task: Task) -> Validation | None:
    if store is None:
        return None
    micro_size = recipe.eval.micro_size or layout.micro_size
    micro_tokens = None if micro_size is not None else layout.micro_tokens
    shape = Shape(layout.rank, layout.world_size, micro_size, micro_tokens, group_by_length=True)
    return Validation(store, shape, task.collate, recipe.eval.max_rows)


def samples_file(recipe: Recipe, first_step: int) -> JsonLines | None:
    """Where written texts go, if the task writes any."""
    if getattr(recipe.settings, "generation", None) is None or not recipe.validated:
        return None
    return JsonLines(Path(recipe.run_dir) / "samples.jsonl", first_step)


def open_sinks(loaded: Loaded, first_step: int, total_steps: int) -> list[Sink]:
    run_dir = Path(loaded.recipe.run_dir)
    sinks: list[Sink] = [JsonLines(run_dir / "metrics.jsonl", first_step), Terminal(total_steps, first_step)]
    if loaded.recipe.log.tensorboard:
        sinks.append(TensorBoard(run_dir / "tensorboard", first_step, dump_resolved(loaded)))
    return sinks


def finish(run_dir: Path, trainer: Trainer, outcome: Outcome, wall_s: float) -> None:
    progress = trainer.progress
    metrics, step = progress.metrics, progress.evaluated_step
    if outcome.finished and trainer.recipe.save.export == "best" and progress.best_step is not None:
        metrics, step = progress.best_metrics, progress.best_step  # those of the weights in run_dir/model
    result = {
        "status": "finished" if outcome.finished else "preempted",
        "exit_code": EXIT_FINISHED if outcome.finished else EXIT_PREEMPTED,
        "reason": outcome.reason,
        "steps": progress.step,
        "tokens": progress.tokens,
        "wall_s": round(wall_s, 2),
        "tokens_per_s": round(trainer.tokens_here / max(trainer.seconds_here, 1e-9), 1),
        "peak_memory_bytes": trainer.engine.peak_memory_bytes(),
        "metrics": metrics,
        "metrics_step": step,
        "best": {"step": progress.best_step, trainer.recipe.eval.metric: progress.best},
    }
    write_result(run_dir, result)
    say(f"{result['status']} after update {progress.step}: {outcome.reason}")
    for name, last in metrics.items():
        first = progress.first_metrics.get(name)  # none, where a new metric was accepted at a resume
        change = "" if first is None else f"{first:.4g} -> "
        share = f"  ({last / first - 1:+.0%})" if first and first > 0 and last >= 0 else ""
        say(f"  {name:<16} {change}{last:.4g}{share}")
    if outcome.finished:
        hint = f"   (ptft generate {run_dir} --prompt ...)" if trainer.recipe.settings.writes else ""
        best = f"   (the best, of update {step})" if trainer.recipe.save.export == "best" else ""
        say(f"  {'model':<16} {run_dir / 'model'}{best}{hint}")
    if trainer.samples is not None:
        say(f"  {'samples':<16} {run_dir / 'samples.jsonl'}")
    say(f"  {'metrics':<16} {run_dir / 'metrics.jsonl'}   (ptft tensorboard {run_dir})")
