"""Builds the parts of a run from a recipe: data, tokenizer, networks, engine, and on request a Trainer.

`Session(...)` does everything that needs no other process. It reports mistakes in the recipe, the data and the launch
config before a process group exists. `Session.start` forms the group and builds the networks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from transformers import PretrainedConfig

from ptft_dist.checkpoint.checkpoint import Checkpoints
from ptft_dist.checkpoint.identity import run_identity
from ptft_dist.checkpoint.resume import group_entries
from ptft_dist.config.load import Loaded
from ptft_dist.config.recipe import ModelSection
from ptft_dist.config.resolve import batch_shape
from ptft_dist.data.cache import HashMemo, cache_root
from ptft_dist.data.column_store import ColumnStore
from ptft_dist.data.order import Plan
from ptft_dist.data.prepare import describe, prepare
from ptft_dist.data.sources import check_sources
from ptft_dist.data.store import Store
from ptft_dist.engine import Engine, complete_deepspeed_config, planned_kind
from ptft_dist.engine.hardware import local_device, peak_flops
from ptft_dist.engine.parameters import network_sizes
from ptft_dist.errors import DataError
from ptft_dist.launch.environment import Place, check_launch, deepspeed_config_of_launch
from ptft_dist.networks.adapt.rates import lr_scales
from ptft_dist.networks.critic import CRITIC
from ptft_dist.networks.frozen import files_identity, frozen_source
from ptft_dist.networks.load import DTYPES, flops_per_token, local_or_hub
from ptft_dist.reporting.messages import say
from ptft_dist.reporting.metrics import JsonLines
from ptft_dist.session.frozen_networks import FrozenNetworks
from ptft_dist.session.old_network import OldNetwork, add_penalties
from ptft_dist.session.trained_network import TrainedNetwork
from ptft_dist.tasks.common.distillation import Distillation, teacher_order
from ptft_dist.tasks.protocol import FrozenRole, StartColumn, Task
from ptft_dist.tasks.registry import encoder_class
from ptft_dist.training.batches import BaselineBatches, Batches, Shape, SupervisedBatches, UpdateDataset
from ptft_dist.training.plan import plan_run
from ptft_dist.training.rollouts import RollingTask, RolloutBatches
from ptft_dist.training.rows import training_rows
from ptft_dist.training.schedule import warmup_steps
from ptft_dist.training.stopping import StopRequest
from ptft_dist.training.trainer import Trainer
from ptft_dist.training.validation import Validation

TEACHER = "teacher"
EWC, REPLAY = "continual.ewc.data", "continual.replay.data"


class Session:
    """The parts of one run on this process's rank."""

    engine: Engine

    def __init__(
        self, loaded: Loaded, place: Place, *, tokenizer_from: Path | None = None, start: ModelSection | None = None
    ) -> None:
        """Prepare the data, and check recipe, data, model and launch config against each other.

        Args:
            tokenizer_from: a directory with the tokenizer that was trained when this run first started.
            start: the model section that training started from, if the recipe's names a trained network.

        Raises:
            RecipeError, DataError: the recipe, the launch config or the data are wrong.
        """
        self.loaded, self.place, self.recipe = loaded, place, loaded.recipe
        recipe = loaded.recipe
        check_launch(recipe)
        self.shape = batch_shape(recipe, place.world_size)
        self.zero_config = deepspeed_config_of_launch()
        self.kind = planned_kind(place.world_size, self.zero_config)
        check_sources(recipe, loaded.base)
        self.prepared = prepare(
            recipe,
            loaded.base,
            encoder_class(recipe.task),
            tokenizer_from=tokenizer_from if tokenizer_from is not None and tokenizer_from.is_dir() else None,
        )
        say(describe(self.prepared.report, from_cache=self.prepared.from_cache))
        for key, old in self.prepared.old.items():
            say(f"{key}:\n{describe(old.report, from_cache=old.from_cache)}")
        self.rows = training_rows(recipe, self.prepared, self.shape.global_size)
        self.store = self.rows.store
        self.trained = TrainedNetwork(
            loaded, self.prepared.tokenizer_path, self.prepared.survey, self.kind, lambda: self.plan.total_steps
        )
        self.trained.check_saved_adapter()
        self.start_section = self.trained.section if start is None else local_or_hub(start, loaded.base)
        self.penalty_files: dict[str, Path] = {}
        self.column_files: list[Path] = []
        roles = self._frozen_roles()
        sources = {
            role: frozen_source(each.key, each.path, each.revision, recipe.model, loaded.base)
            for role, each in roles.items()
        }
        self.frozen = FrozenNetworks(roles, sources, recipe.train.offload_frozen)
        self.frozen.check(self.kind, local_device(place.local_rank))
        self.trained.task_class.check_setup(self.trained.setup, sources)
        self.teacher_order = teacher_order(self.trained.setup, sources[TEACHER]) if recipe.distillation else []

    def _frozen_roles(self) -> dict[str, FrozenRole]:
        """The frozen networks of the run: those of the task, or the teacher."""
        trained, settings = self.trained, self.recipe.distillation
        if settings is None:
            roles: dict[str, FrozenRole] = trained.task_class.frozen_roles(trained.setup, self.start_section)
            return roles
        role = FrozenRole("distillation.teacher", settings.teacher, settings.revision, trained.task_class.auto_class)
        return {TEACHER: role}

    # --- identity of the run ----------------------------------------------------------------------------

    @cached_property
    def identity(self) -> dict[str, Any]:
        """The identity of this run, which a checkpoint must share; see `run_identity`."""
        files = {}
        for source in self.frozen.sources.values():
            files[f"{source.key}'s files"] = source.identity(self._digests)
        for key, path in self.trained.task_class.named_files(self.trained.setup).items():
            files[f"{key}.file"] = self._digests([path])[0][:16]
        for key, old in self.prepared.old.items():
            files[f"{key}'s contents"] = " ".join(old.parts["data.train"])
        if self._penalized or (self.start_column and self.start_section.path):
            # Its weights are read again at each start.
            files["model.path's files"] = str(self.base_identity())
        return run_identity(self.loaded, self.prepared.fingerprint, self.prepared.parts, files)

    @property
    def _digests(self) -> Any:
        return HashMemo(self._cache / "hashes.json").digests

    @property
    def _cache(self) -> Path:
        return cache_root(self.recipe.data.cache_dir, self.loaded.base.absolute())

    def base_identity(self) -> str | None:
        """A hash of the files of the pretrained network; None for a network with random weights."""
        return self.trained.base_identity(self._digests)

    @cached_property
    def plan(self) -> Plan:
        """The rows of all updates. Raises DataError if the data have too few rows for one update."""
        plan = plan_run(self.recipe, self.shape, self.store, self.rows)
        warmup = warmup_steps(self.recipe.optim, plan.total_steps)
        if warmup >= plan.total_steps:
            say(f"optim.warmup: {warmup} updates of warmup in a run of {plan.total_steps}; optim.lr is never reached")
        return plan

    @property
    def _penalized(self) -> bool:
        """Whether there is a penalty on changes of the weights of model.path."""
        return self.recipe.continual is not None and bool(self.recipe.continual.penalties)

    def prepare_penalties(self) -> None:
        """Compute what penalties on changes of weights need, or find it in the cache. Needs no other process.

        Raises:
            RecipeError: the network of model.path does not fit the penalty.
        """
        continual = self.recipe.continual
        if continual is None or not self._penalized:
            return
        old = self._old_network(str(self.base_identity()), self.trained.config)
        self.penalty_files["start"] = old.start()
        if continual.ewc is not None:
            rows = self.prepared.old[EWC]
            self.penalty_files["fisher"] = old.fisher(rows.train, rows.fingerprint, continual.ewc.rows)

    @cached_property
    def start_column(self) -> StartColumn | None:
        """The column of the rows that is computed with the network that training starts from."""
        column: StartColumn | None = self.trained.task_class.start_column(self.trained.setup, self.start_section)
        return column

    def add_start_column(self, *, training: bool) -> None:
        """Compute the start column of all rows, or find it in the cache. Needs no other process."""
        if (column := self.start_column) is None:
            return
        start, trained, prepared = self.start_section, self.trained, self.prepared
        config = trained.config if start is trained.section else trained.config_of(start)
        if start.path is not None:
            identity = files_identity(start, self._digests)
        else:
            identity = f"{config.to_json_string(use_diff=False)} {start.attention}"
        old, precision = self._old_network(identity, config), DTYPES[self.recipe.train.precision]

        def extended(store: Store) -> ColumnStore:
            return old.with_column(store, f"{prepared.fingerprint}/{store.path.name}", column, precision)

        if training:
            self.store = extended(self.store)
        if prepared.validation is not None:
            self.prepared = replace(prepared, validation=extended(prepared.validation))
        both = (self.store, self.prepared.validation)
        self.column_files = [store.file for store in both if isinstance(store, ColumnStore)]

    def _old_network(self, identity: str, config: PretrainedConfig) -> OldNetwork:
        trained, device = self.trained, local_device(self.place.local_rank)
        return OldNetwork(
            self.start_section,
            identity,
            config,
            trained.setup,
            trained.task_class,
            self._cache,
            device,
            trained.new_tokens_of(self.start_section),
        )

    # --- with the other processes ------------------------------------------------------------------------------------

    def start(self, *, training: bool = True, formed: Callable[[Engine], None] = lambda _engine: None) -> None:
        """Form the process group, build network and task, and wrap the network; the optimizer only for training.

        formed: called as soon as the process group exists.

        Raises:
            RecipeError: the network does not fit the task.
            DataError: the ranks have different data.
        """
        recipe = self.recipe
        if training:
            self.prepare_penalties()
        self.add_start_column(training=training)
        self.engine = Engine(recipe.train.precision, self._deepspeed_config())
        formed(self.engine)
        self.agree_on_data()
        self.trained.build(self.engine, wrap=self._with_teacher, rows=self.prepared.train if training else None)
        model, section = self.trained.model, self.trained.section
        if section.compile:
            model.compile(dynamic=True)
        if training:
            self.engine.prepare(model, recipe.optim, say, lr_scales(model, section, recipe.optim, self.trained.facts))
            self._regularize()
        else:
            self.engine.prepare_reading(model)
        self.networks = network_sizes(model, apart=(CRITIC,))
        """Sizes of the trained network and of the frozen ones, by role; see `network_sizes`."""
        self.networks |= self.frozen.place(self.engine, self.task, self.trained, self.start_section)
        run_probe(self.engine, self.task)

    @property
    def task(self) -> Task:
        return self.trained.task

    def _regularize(self) -> None:
        """Add the penalties on parameters, and what AdaLoRA does after each update."""
        if self.recipe.continual is not None and self._penalized:
            files = self.penalty_files
            add_penalties(self.engine, self.recipe.continual, files["start"], files.get("fisher"))
        if self.trained.section.adapt.adalora is None:
            return
        from ptft_dist.networks.adapt.adalora import Orthogonality

        model: Any = self.trained.model
        self.engine.regularize_with(Orthogonality(model), "model.adapt.adalora")
        self.engine.change_after_each_step(model.rank_state)

    def agree_on_data(self) -> None:
        """Raises DataError, with the ranks, unless all ranks have the same tokenizer, rows and plan."""
        prepared = self.prepared
        mine = {
            "tokenizer": _directory_hash(prepared.tokenizer_path),
            "prepared data": prepared.fingerprint,
            "old data": [old.fingerprint for old in prepared.old.values()],
            "old weights and Fisher information": self._digests(list(self.penalty_files.values())),
            "log-probabilities of the reference": self._digests(self.column_files),
            "training rows": len(self.store),
            "validation rows": 0 if prepared.validation is None else len(prepared.validation),
            "updates": self.plan.total_steps,
            "recipe": hashlib.sha256(repr(sorted(self.identity.items())).encode()).hexdigest(),
        }
        all_ranks = self.engine.gather_objects(mine)
        different = [name for name in mine if len({str(each[name]) for each in all_ranks}) > 1]
        if different:
            ranks = {i for i, each in enumerate(all_ranks) if each != all_ranks[0]}
            raise DataError(
                f"data: rank {', '.join(map(str, sorted(ranks)))} and rank 0 do not have the same data; different: "
                f"{', '.join(different)}. Probably each machine has its own cache, with another tokenizer or other "
                "files. Set PTFT_CACHE (or data.cache_dir) to a directory that all machines share, or run "
                "`ptft prepare` once and set tokenizer.path to its tokenizer"
            )

    def _deepspeed_config(self) -> dict[str, Any] | None:
        if self.zero_config is None:
            return None
        recipe, micro_size = self.recipe, self.shape.micro_size or 1
        return complete_deepspeed_config(
            self.zero_config, recipe.train.precision, recipe.optim.max_grad_norm, micro_size, self.shape.accumulation
        )

    def _with_teacher(self, task: Any) -> Task:
        """The task, with the divergence from the teacher if the recipe has one."""
        settings = self.recipe.distillation
        return task if settings is None else cast(Task, Distillation(task, settings, self.teacher_order))

    # --- training ----------------------------------------------------------------------------------------------------

    def make_trainer(self, checkpoints: Checkpoints, stop: StopRequest, base: str | None) -> Trainer:
        """The Trainer. Writers of metrics are added when the run begins."""
        recipe, engine, store = self.recipe, self.engine, self.store
        manifest = {
            "identity": self.identity,
            "kind": engine.kind,
            "world_size": engine.world_size,
            "total_steps": self.plan.total_steps,
            "base": base,
            **group_entries(engine.groups),
        }
        return Trainer(
            recipe,
            engine,
            self.task,
            self._batches(),
            self.plan.total_steps,
            self.validation,
            checkpoints,
            manifest,
            stop,
            flops_per_token=flops_per_token(
                self.trained.model,
                self.trained.config,
                engine.parameter_count,
                engine.trained_count,
                store.tokens / len(store),
            ),
            peak_flops=peak_flops(engine.device, recipe.train.precision) * engine.world_size if engine.is_main else 0.0,
        )

    def _batches(self) -> Batches:
        recipe, engine, shape = self.recipe, self.engine, self.layout
        if recipe.settings.rollout_prompts is not None:
            assert self.shape.global_size is not None
            task = cast(RollingTask, self.task)
            return RolloutBatches(task, self.store, self.plan, shape, recipe.train.seed, self.shape.global_size)
        workers = recipe.data.workers if recipe.data.workers is not None else (0 if engine.device.type == "cpu" else 2)
        dataset = UpdateDataset(self.store, self.plan, shape, self.task.collate)
        pin_memory = engine.device.type == "cuda"
        if self.task.needs_baseline:
            return BaselineBatches(dataset, workers, pin_memory, self.task)
        return SupervisedBatches(dataset, workers, pin_memory)

    @property
    def layout(self) -> Shape:
        """How training rows are distributed over data-parallel ranks and micro-batches."""
        engine, shape = self.engine, self.shape
        by_length = self.recipe.batch.group_by_length
        return Shape(engine.dp_rank, engine.dp_size, shape.micro_size, shape.micro_tokens, by_length)

    @cached_property
    def validation(self) -> Validation | None:
        store, recipe, layout = self.prepared.validation, self.recipe, self.layout
        if store is None:
            return None
        micro_size = recipe.eval.micro_size or layout.micro_size
        micro_tokens = None if micro_size is not None else layout.micro_tokens
        shape = Shape(layout.rank, layout.world_size, micro_size, micro_tokens, group_by_length=True)
        return Validation(store, shape, self.task.collate, recipe.eval.max_rows, self.prepared.fingerprint)

    def warm_up(self) -> None:
        """Run forward and backward on the largest micro-batch without an update; see Engine.warm_up."""
        rows = self.task.longest_rows(self.store.largest(self.shape.largest_micro_batch(self.recipe.longest_row)))
        batch = self.task.collate(rows, [(0, i) for i in range(len(rows))])
        self.engine.warm_up(self.task.loss, batch.inputs)

    def samples(self, last_step: int, last_evaluation: int) -> JsonLines | None:
        """The writer of generated texts; None if the task generates none."""
        settings = self.recipe.settings
        evaluated = getattr(settings, "generation", None) is not None and self.recipe.validated
        if not evaluated and settings.rollout_prompts is None:
            return None
        return JsonLines(Path(self.recipe.run_dir) / "samples.jsonl", last_step, last_evaluation)

    @property
    def device_name(self) -> str:
        device = self.engine.device
        return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper()


def run_probe(engine: Engine, task: Task) -> None:
    """Run the task's probe on the wrapped network, for example: does attention stay within packed documents?

    Raises:
        RecipeError: the network failed the probe.
    """
    probe = task.probe()
    if probe is not None:
        with engine.evaluating(), torch.compiler.set_stance("force_eager"):  # nothing is compiled for these shapes
            probe.check(engine.forward(probe.outputs, probe.inputs))


def _directory_hash(directory: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(path for path in directory.iterdir() if path.suffix in (".json", ".txt", ".model", ".jinja")):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()
