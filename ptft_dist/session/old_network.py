"""What a run needs to know about the network that training starts from, computed once and cached.

    <cache>/old_networks/<fingerprint>/start.safetensors   the values of the trained parameters, fp32
    <cache>/old_networks/<fingerprint>/fisher.safetensors  the diagonal of the Fisher information, fp32
    <cache>/old_networks/<fingerprint>/report.json         rows and seconds of the estimate
    <cache>/old_networks/<fingerprint>/values.npy          numbers about each row of a store, fp32

The first two are for penalties against forgetting, the last one for tasks with a reference. All are computed before a
process group exists, on a complete copy of the network. So they are the same under every backend, other ranks wait for
a lock file and not in a collective, and a resumed run finds them in the cache. The first two take 4 bytes per
parameter on the disk.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers import PretrainedConfig, PreTrainedModel

from ptft_dist.config.continual import ContinualSection
from ptft_dist.config.recipe import ModelSection
from ptft_dist.config.token_ids import id_count
from ptft_dist.data.cache import build_once, fingerprint, writing
from ptft_dist.data.column_store import ColumnStore
from ptft_dist.data.store import Store
from ptft_dist.engine import Engine
from ptft_dist.errors import RecipeError
from ptft_dist.networks.adapt import adapt_network, convert_trained
from ptft_dist.networks.continual import Ewc, L2Sp, read_tensors
from ptft_dist.networks.facts import read_facts
from ptft_dist.networks.load import build_network
from ptft_dist.networks.new_tokens import NewTokens
from ptft_dist.reporting.messages import say
from ptft_dist.tasks.protocol import StartColumn, Task, TaskSetup
from ptft_dist.training.fisher import FISHER_VERSION, fisher_diagonal
from ptft_dist.training.start_values import START_VERSION, start_values

START, FISHER, VALUES, REPORT = "start.safetensors", "fisher.safetensors", "values.npy", "report.json"


class _Loaded(NamedTuple):
    model: PreTrainedModel
    task: Task
    fresh: frozenset[str]
    """Names of parameters that model.path has no weights for."""


@dataclass(frozen=True)
class OldNetwork:
    """The network that training starts from, complete and in fp32: that of model.path, or one with random weights."""

    section: ModelSection
    identity: str
    """A hash of the files of model.path, or of the config and the seed."""
    config: PretrainedConfig
    setup: TaskSetup
    task_class: Any
    cache: Path
    device: torch.device
    """Where it is computed."""
    new_tokens: NewTokens

    def start(self) -> Path:
        """The file with the start values of the trained parameters that model.path has weights for.

        Raises:
            RecipeError: there are no such parameters.
        """
        if self.config.get_text_config().vocab_size < id_count(self.setup.tokenizer):
            raise RecipeError(
                "continual: the tokenizer has more tokens than model.path, and their embeddings have no old values "
                "for ewc or l2_sp. Use the model's own tokenizer"
            )

        def build(unfinished: Path) -> None:
            model, _, fresh = self._loaded
            known = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad and name not in fresh}
            if not known:
                raise RecipeError(
                    "continual.l2_sp: has no effect here: model.path has no weights for the trained parameters. Change "
                    "model.adapt, or remove the section"
                )
            _save(unfinished / START, {name: tensor.float().cpu().contiguous() for name, tensor in known.items()})

        return self._cached(["start", *self._key], build)[0] / START

    def fisher(self, store: Store, store_print: str, rows: int) -> Path:
        """The file with the Fisher information of the trained parameters on `rows` rows of a store.

        store_print: fingerprint of the store.

        Raises:
            RecipeError: some of the network's weights are random.
        """

        def build(unfinished: Path) -> None:
            (model, task, fresh), started = self._loaded, time.monotonic()
            if fresh:
                raise RecipeError(
                    f"continual.ewc: model.path has no weights for {', '.join(sorted(fresh)[:4])}, so it was not "
                    "trained for this task, and its Fisher information says nothing. Use a model that was, or l2_sp"
                )
            _save(unfinished / FISHER, fisher_diagonal(model, task, store, rows, self.setup.seed, self.device))
            report = {"rows": min(rows, len(store)), "seconds": round(time.monotonic() - started, 2)}
            with writing(unfinished):
                (unfinished / REPORT).write_text(json.dumps(report))

        key = ["fisher", FISHER_VERSION, *self._key, store_print, rows, self.setup.seed]
        directory, from_cache = self._cached(key, build)
        report = json.loads((directory / REPORT).read_text())
        text = f"continual.ewc: Fisher information of {report['rows']:,} old rows, {report['seconds']:,.1f} s"
        say(text + ", loaded from the cache" * from_cache)
        return directory / FISHER

    def with_column(self, store: Store, store_print: str, column: StartColumn, precision: torch.dtype) -> ColumnStore:
        """The store with a column that the task computes with this network.

        Args:
            store_print: identifies the rows of the store.
            precision: the data type of matrix products, as in training.
        """

        def build(unfinished: Path) -> None:
            (model, task, _), started = self._loaded, time.monotonic()
            values = start_values(model, task, store, column.width, self.device, precision)
            with writing(unfinished):
                np.save(unfinished / VALUES, values)
                (unfinished / REPORT).write_text(json.dumps({"seconds": round(time.monotonic() - started, 2)}))

        new_head, device, name = self.section.new_head, self.device.type, self.setup.name
        network = [self.identity, self.setup.seed, new_head, str(precision), device]
        if self.new_tokens.pieces:
            network.append([self.new_tokens.start, sorted(self.new_tokens.pieces.items())])
        directory, from_cache = self._cached(["values", START_VERSION, network, name, column, store_print], build)
        report = json.loads((directory / REPORT).read_text())
        text = f"{column.name}: log-probabilities of {len(store):,} rows, {report['seconds']:,.1f} s"
        say(text + ", loaded from the cache" * from_cache)
        return ColumnStore(store, column.name, directory / VALUES)

    @property
    def _key(self) -> list[Any]:
        """Everything that decides the network and its loss."""
        model = self.section.model_dump(mode="json", include={"adapt", "new_head"})
        return [self.identity, model, self.setup.name, self.setup.settings.model_dump(mode="json"), self._labels]

    @property
    def _labels(self) -> Any:
        return self.setup.survey.get("labels")

    @cached_property
    def _loaded(self) -> _Loaded:
        """The network, and its task with minus the log-likelihood of the labels as its loss."""
        section = self.section.model_copy(update={"dtype": "auto", "quantize": None})
        config = copy.deepcopy(self.config)  # new embeddings change it
        tokens = id_count(self.setup.tokenizer)
        model, fresh = build_network(section, config, self.setup.seed, self.task_class.auto_class, tokens)
        self.new_tokens.initialize(self.new_tokens.tables(model))
        settings = self.setup.settings
        plain = {name: type(settings).model_fields[name].default for name in settings.not_likelihood}
        setup = replace(self.setup, settings=settings.model_copy(update=plain))
        task: Task = self.task_class(setup, replace(read_facts(model), router_loss_weight=0.0), self.device)
        task.prepare_network(model)
        adapt_network(model, section.adapt, None, fresh)
        convert_trained(model, torch.float32)
        return _Loaded(model, task, fresh)

    def _cached(self, key: Any, build: Callable[[Path], object]) -> tuple[Path, bool]:
        libraries = [version(name) for name in ("torch", "transformers")]
        directory = self.cache / "old_networks" / fingerprint([libraries, key])
        return directory, build_once(directory, build)


def _save(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    with writing(path):
        try:
            save_file(tensors, path)
        except SafetensorError as error:
            raise OSError(str(error)) from error


def add_penalties(engine: Engine, continual: ContinualSection, start: Path, fisher: Path | None) -> None:
    """Add the penalties of a recipe to the engine.

    Where each rank has the complete weights on its device, it keeps the old values there too: 4 bytes per parameter, 8
    with EWC. Under ZeRO-3 and FSDP2 they stay in files that are mapped into the memory of the host, which the ranks of
    a machine share, and are copied to the device one parameter at a time.
    """
    device = torch.device("cpu") if engine.kind in ("zero3", "fsdp2") else engine.device
    values = read_tensors(start, device)
    if continual.l2_sp is not None:
        engine.regularize_with(L2Sp(continual.l2_sp.strength, values), "continual.l2_sp")
    if continual.ewc is not None:
        assert fisher is not None
        engine.regularize_with(Ewc(continual.ewc.strength, values, read_tensors(fisher, device)), "continual.ewc")
