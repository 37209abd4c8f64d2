"""Builds the parts of a run from a recipe: data, tokenizer, networks, engine, and on request a Trainer.

`Session(...)` does everything that needs no other process. It reports mistakes in the recipe, the data and the launch
config before a process group exists. `Session.start` forms the group and builds the networks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from transformers import PreTrainedModel

from ptft_dist.checkpoint.checkpoint import Checkpoints
from ptft_dist.checkpoint.identity import run_identity
from ptft_dist.config.load import Loaded
from ptft_dist.config.recipe import ModelSection
from ptft_dist.config.resolve import batch_shape
from ptft_dist.data.cache import HashMemo, cache_root
from ptft_dist.data.mixed_store import MixedStore
from ptft_dist.data.order import Plan, make_plan
from ptft_dist.data.prepare import describe, prepare
from ptft_dist.data.sources import check_sources
from ptft_dist.data.store import Store
from ptft_dist.data.tokenizer import load_tokenizer
from ptft_dist.engine import Engine, complete_deepspeed_config, planned_kind
from ptft_dist.engine.hardware import local_device, peak_flops
from ptft_dist.errors import DataError, RecipeError
from ptft_dist.launch.environment import Place, check_launch, deepspeed_config_of_launch
from ptft_dist.networks.adapt import adapt_network, adapted_facts, check_backend, check_positions_left, convert_trained
from ptft_dist.networks.adapt.quantized import check_placement, heads
from ptft_dist.networks.adapt.rates import lr_scales
from ptft_dist.networks.export import export_dtype
from ptft_dist.networks.facts import NetworkFacts, read_facts
from ptft_dist.networks.frozen import FrozenSource, files_identity, frozen_source
from ptft_dist.networks.load import (
    build_config,
    build_network,
    check_positions,
    flops_per_token,
    local_or_hub,
    read_config,
)
from ptft_dist.networks.preview import check_weights, preview_network
from ptft_dist.old_network import OldNetwork, add_penalties
from ptft_dist.reporting.messages import say
from ptft_dist.reporting.metrics import JsonLines
from ptft_dist.tasks.common.distillation import Distillation, teacher_order
from ptft_dist.tasks.protocol import Task, TaskSetup
from ptft_dist.tasks.registry import encoder_class, task_class
from ptft_dist.training.batches import Shape, SupervisedBatches, UpdateDataset
from ptft_dist.training.schedule import warmup_steps
from ptft_dist.training.stopping import StopRequest
from ptft_dist.training.trainer import Trainer
from ptft_dist.training.validation import Validation

EWC, REPLAY = "continual.ewc.data", "continual.replay.data"
MOST_EPOCHS = 1_000_000
"""The maximum of train.epochs, so that the table of a run's updates fits into memory."""


class Session:
    """The parts of one run on this process's rank."""

    engine: Engine
    task: Task
    model: PreTrainedModel
    network: NetworkFacts

    def __init__(self, loaded: Loaded, place: Place, *, tokenizer_from: Path | None = None) -> None:
        """Prepare the data, and check recipe, data, model and launch config against each other.

        Args:
            tokenizer_from: a directory with the tokenizer that was trained when this run first started.

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
        self.teacher: FrozenSource | None = None
        self.teacher_order: Sequence[int] = ()
        self.store, self.sizes, self.weights = self._training_rows()
        self._describe_network(self.prepared.tokenizer_path, self.prepared.survey)
        if (settings := recipe.distillation) is not None:
            self.teacher = frozen_source(
                "distillation.teacher", settings.teacher, settings.revision, recipe.model, loaded.base
            )
            self.teacher_order = teacher_order(self.setup, self.teacher)

    def _describe_network(self, tokenizer_path: Path, survey: Mapping[str, Any]) -> None:
        """Read the tokenizer, and compute and check the network's config.

        survey: properties of the training rows, from the encoder.
        """
        loaded, recipe = self.loaded, self.recipe
        self.tokenizer_path = tokenizer_path
        self.tokenizer = load_tokenizer(tokenizer_path, trust_remote_code=recipe.tokenizer.trust_remote_code)
        self.section: ModelSection = local_or_hub(recipe.model, loaded.base)
        self.task_class = task_class(recipe.task)
        self.setup = TaskSetup.of(recipe, self.tokenizer, survey)
        self.config = build_config(
            self.section,
            self.tokenizer,
            recipe.data.max_length,
            self.task_class.config_settings(self.setup),
            grown=bool(recipe.tokenizer.add or recipe.settings.added_tokens),
        )
        self.task_class.fit_config(self.setup, self.config)
        self.export_dtype = export_dtype(recipe.save.dtype, self.section, self.config)
        check_weights(self.section)
        self._preview()
        self.penalty_files: dict[str, Path] = {}

    def _preview(self) -> None:
        """Check network and adapter on a copy without weights. Raises RecipeError."""
        check_placement(self.section.quantize, self.kind, self.recipe.train.precision)
        check_backend(self.section, self.kind)
        model = preview_network(self.section, self.config, self.task_class.auto_class)
        self.heads = heads(model)
        network = adapted_facts(read_facts(model), self.section.adapt)
        check_positions(network, self.recipe.data.max_length)
        check_positions_left(network, self.section.adapt, self.recipe.data.max_length)
        adapt_network(model, self.section.adapt, self._adapter_setup(), preview=True)

    def _adapter_setup(self) -> Any:
        """What the config of an adapter needs; None without an adapter."""
        recipe, section = self.recipe, self.section
        if not section.adapt.adds_adapter:
            return None
        from ptft_dist.networks.adapt.peft_configs import TASK_TYPES, AdapterSetup

        assert section.path is not None
        added: Any = self.tokenizer.convert_tokens_to_ids([*recipe.tokenizer.add, *recipe.settings.added_tokens])
        beyond = range(read_config(section, {}).get_text_config().vocab_size, len(self.tokenizer))
        return AdapterSetup(
            task_type=TASK_TYPES.get(self.task_class.auto_class.__name__),
            base=section.path,
            revision=section.revision,
            total_steps=self.total_steps,
            new_tokens=tuple(sorted({*added, *beyond})),
            tokenizer_path=str(self.tokenizer_path),
            seed=recipe.train.seed,
        )

    def _training_rows(self) -> tuple[Store, list[int], tuple[int, ...]]:
        """The store of the training rows, the numbers of new and of old rows in it, and their weights."""
        prepared, continual = self.prepared, self.recipe.continual
        if continual is None or continual.replay is None:
            return prepared.train, [len(prepared.train)], (1,)
        old = prepared.old[REPLAY]
        stores = (prepared.train, old.train)
        mixed = MixedStore(stores, prepared.train.path.parent / f"with-{old.fingerprint}")
        return mixed, [len(store) for store in stores], continual.replay.shares

    # --- identity of the run ----------------------------------------------------------------------------

    @cached_property
    def identity(self) -> dict[str, Any]:
        """The identity of this run, which a checkpoint must share; see `run_identity`."""
        files = {}
        if self.teacher is not None:
            files["distillation.teacher's files"] = self.teacher.identity(self._digests)
        for key, old in self.prepared.old.items():
            files[f"{key}'s contents"] = " ".join(old.parts["data.train"])
        if self._penalized:  # they read the weights of model.path again at each start
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
        return None if self.section.path is None else files_identity(self.section, self._digests)

    @property
    def total_steps(self) -> int:
        """Number of optimizer updates of the run."""
        return self.plan.total_steps

    @cached_property
    def plan(self) -> Plan:
        """The rows of all updates. Raises DataError if the data have too few rows for one update."""
        train, rows, tokens = self.recipe.train, len(self.store), self.store.tokens
        if (self.shape.global_tokens or 0) > tokens:
            raise DataError(
                f"batch.global_tokens: one update needs {self.shape.global_tokens:,} tokens, the training data have "
                f"{tokens:,}: lower batch.global_tokens, or add data"
            )
        if train.max_tokens is not None and train.max_tokens > MOST_EPOCHS * tokens:
            raise RecipeError(
                f"train.max_tokens: {train.max_tokens:,} is more than {MOST_EPOCHS:,} epochs of the training data's "
                f"{tokens:,} tokens: lower it"
            )
        if self.shape.global_size is not None and rows < self.shape.global_size:
            raise DataError(
                f"batch: one update needs {self.shape.global_size} rows, the training data have {rows}. Lower "
                "batch.global_size (or global_tokens) or data.max_length, or add data"
            )
        plan = make_plan(
            self.sizes,
            self.store.lengths,
            train.seed,
            weights=self.weights,
            global_size=self.shape.global_size,
            global_tokens=self.shape.global_tokens,
            max_steps=train.max_steps,
            epochs=train.epochs,
            max_tokens=train.max_tokens,
            cache=self.store.path.parent / ("plans" if len(self.sizes) == 1 else f"plans-{self.store.path.name}"),
        )
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
        identity, device = str(self.base_identity()), local_device(self.place.local_rank)
        old = OldNetwork(self.section, identity, self.config, self.setup, self.task_class, self._cache, device)
        self.penalty_files["start"] = old.start()
        if continual.ewc is not None:
            rows = self.prepared.old[EWC]
            self.penalty_files["fisher"] = old.fisher(rows.train, rows.fingerprint, continual.ewc.rows)

    # --- with the other processes ------------------------------------------------------------------------------------

    def start(self, *, training: bool = True) -> None:
        """Form the process group, build network and task, and wrap the network; the optimizer only for training.

        Raises:
            RecipeError: the network does not fit the task.
            DataError: the ranks have different data.
        """
        recipe = self.recipe
        if training:
            self.prepare_penalties()
        self.engine = Engine(recipe.train.precision, self._deepspeed_config())
        self.agree_on_data()
        self._build(training=training)
        if self.section.compile:
            self.model.compile(dynamic=True)
        if training:
            self.engine.prepare(
                self.model, recipe.optim, say, lr_scales(self.model, self.section, recipe.optim, self.network)
            )
            self._regularize()
        else:
            self.engine.prepare_reading(self.model)
        self._place_teacher()
        run_probe(self.engine, self.task)

    def _build(self, *, training: bool) -> None:
        """Build network and task, and adapt the network. Raises RecipeError."""
        recipe = self.recipe
        with self.engine.building(pretrained=self.section.path is not None):
            base, fresh = build_network(
                self.section,
                self.config,
                recipe.train.seed,
                self.task_class.auto_class,
                len(self.tokenizer),
                say,
                precision=recipe.train.precision,
                whole=self.heads,
            )
        adapt = self.section.adapt
        self.network = adapted_facts(read_facts(base), adapt)
        self.task = self._make_task()
        self.task.prepare_network(base)
        self.model = adapt_network(base, adapt, self._adapter_setup(), fresh)
        if training and adapt.lora is not None and adapt.lora.init == "eva":
            self._initialize_from_activations(adapt.lora.eva_rows)
        convert_trained(self.model, self.engine.trained_dtype)

    def _initialize_from_activations(self, count: int) -> None:
        """Initialize the adapter from the first `count` training rows, the same on every rank."""
        from ptft_dist.networks.adapt.adapters import initialize_from_activations
        from ptft_dist.tasks.common.losses import network_inputs

        if self.network.encoder_decoder:
            raise RecipeError("model.adapt.lora.init: eva works for encoders and decoders only; use init: pissa")
        store = self.prepared.train
        keys = [(0, row) for row in range(min(count, len(store)))]
        rows = [store.row(row) for _, row in keys]
        inputs = network_inputs(self.task.collate(rows, keys).inputs)
        lengths = torch.tensor([len(row.input_ids) for row in rows])[:, None]
        model: Any = self.model
        initialize_from_activations(model, {**inputs, "tokens": torch.arange(inputs["input_ids"].shape[1]) < lengths})

    def _regularize(self) -> None:
        """Add the penalties on parameters, and what AdaLoRA does after each update."""
        if self.recipe.continual is not None and self._penalized:
            files = self.penalty_files
            add_penalties(self.engine, self.recipe.continual, files["start"], files.get("fisher"))
        if self.section.adapt.adalora is None:
            return
        from ptft_dist.networks.adapt.adalora import Orthogonality

        model: Any = self.model
        self.engine.regularize_with(Orthogonality(model), "model.adapt.adalora")
        self.engine.after_each_step(model.rank_state.after_step)

    def agree_on_data(self) -> None:
        """Raises DataError, with the ranks, unless all ranks have the same tokenizer, rows and plan."""
        prepared = self.prepared
        mine = {
            "tokenizer": _directory_hash(prepared.tokenizer_path),
            "prepared data": prepared.fingerprint,
            "old data": [old.fingerprint for old in prepared.old.values()],
            "old weights and Fisher information": self._digests(list(self.penalty_files.values())),
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

    def _make_task(self) -> Task:
        task = self.task_class(self.setup, self.network, self.engine.device)
        if self.recipe.distillation is not None:
            task = Distillation(task, self.recipe.distillation, self.teacher_order)
        return cast(Task, task)

    def _place_teacher(self) -> None:
        """Load and place the teacher, if any, after the student, because its DeepSpeed config has the bucket sizes."""
        if self.teacher is None:
            return
        assert isinstance(self.task, Distillation)
        with self.engine.building(pretrained=False):
            teacher = self.teacher.load(self.task.auto_class, self.engine.dtype)
        self.task.prepare_teacher(teacher)
        network = read_facts(teacher)
        self.task.adopt(self.engine.prepare_frozen(teacher), network)

    # --- training ----------------------------------------------------------------------------------------------------

    def make_trainer(self, checkpoints: Checkpoints, stop: StopRequest, base: str | None) -> Trainer:
        """The Trainer. Writers of metrics are added when the run begins."""
        recipe, engine, store = self.recipe, self.engine, self.store
        workers = recipe.data.workers if recipe.data.workers is not None else (0 if engine.device.type == "cpu" else 2)
        dataset = UpdateDataset(store, self.plan, self.layout, self.task.collate)
        manifest = {
            "identity": self.identity,
            "kind": engine.kind,
            "world_size": engine.world_size,
            "total_steps": self.plan.total_steps,
            "base": base,
        }
        return Trainer(
            recipe,
            engine,
            self.task,
            SupervisedBatches(dataset, workers, pin_memory=engine.device.type == "cuda"),
            self.plan.total_steps,
            self.validation,
            checkpoints,
            manifest,
            stop,
            flops_per_token=flops_per_token(
                self.model, self.config, engine.parameter_count, engine.trained_count, store.tokens / len(store)
            ),
            peak_flops=peak_flops(engine.device, recipe.train.precision) * engine.world_size,
        )

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
        rows = self.store.largest(self.shape.largest_micro_batch(self.recipe.data.max_length))
        batch = self.task.collate(rows, [(0, i) for i in range(len(rows))])
        self.engine.warm_up(self.task.loss, batch.inputs)

    def samples(self, last_evaluation: int) -> JsonLines | None:
        """The writer of generated texts; None if the task generates none."""
        if getattr(self.recipe.settings, "generation", None) is None or not self.recipe.validated:
            return None
        return JsonLines(Path(self.recipe.run_dir) / "samples.jsonl", last_evaluation, last_evaluation)

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
        with engine.evaluating():
            probe.check(engine.forward(probe.outputs, probe.inputs))


def _directory_hash(directory: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(path for path in directory.iterdir() if path.suffix in (".json", ".txt", ".model", ".jinja")):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()
