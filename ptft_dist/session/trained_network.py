"""The network that a run trains: its config, checks without weights, and how it is built and adapted."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from transformers import PretrainedConfig, PreTrainedModel

from ptft_dist.config.load import Loaded
from ptft_dist.config.recipe import ModelSection
from ptft_dist.config.token_ids import id_count
from ptft_dist.data.store import Store
from ptft_dist.data.tokenizer import load_tokenizer
from ptft_dist.data.tokenizer_files import ORIGIN, read_pieces, vocabulary_of
from ptft_dist.errors import RecipeError
from ptft_dist.networks.adapt import adapt_network, adapted_facts, check_backend, check_positions_left, convert_trained
from ptft_dist.networks.adapt.quantized import check_placement, heads
from ptft_dist.networks.export import Export, export_dtype
from ptft_dist.networks.facts import NetworkFacts, labels_of, read_facts
from ptft_dist.networks.frozen import Digests, files_identity
from ptft_dist.networks.load import build_config, build_network, check_positions, local_or_hub, read_config
from ptft_dist.networks.new_tokens import NewTokens
from ptft_dist.networks.preview import check_weights, preview_network
from ptft_dist.reporting.messages import say
from ptft_dist.tasks.common.losses import network_inputs
from ptft_dist.tasks.common.padding import pad, pad_id
from ptft_dist.tasks.protocol import Task, TaskSetup
from ptft_dist.tasks.registry import task_class


class Builder(Protocol):
    """What decides how the weights are placed while they are read: an Engine, or a SavedState."""

    @property
    def device(self) -> torch.device: ...
    @property
    def trained_dtype(self) -> torch.dtype: ...
    def building(self, pretrained: bool) -> AbstractContextManager[None]: ...
    def whole(self, parameters: Sequence[torch.nn.Parameter]) -> AbstractContextManager[None]: ...


class TrainedNetwork:
    """The network of a run, and its task. `model`, `facts` and `task` exist after `build`."""

    model: PreTrainedModel
    facts: NetworkFacts
    task: Task

    def __init__(
        self, loaded: Loaded, tokenizer_path: Path, survey: Mapping[str, Any], kind: str, steps: Callable[[], int]
    ) -> None:
        """Compute the config, and check network and adapter on a copy without weights.

        Args:
            survey: properties of the training rows, from the encoder.
            kind: the engine's backend.
            steps: returns the number of updates of the run; called only if the adapter depends on it.

        Raises:
            RecipeError: the network does not exist, or does not fit the task, the tokenizer or the backend.
        """
        recipe = self.recipe = loaded.recipe
        self.tokenizer_path, self.steps = tokenizer_path, steps
        self.tokenizer = load_tokenizer(tokenizer_path, trust_remote_code=recipe.tokenizer.trust_remote_code)
        self.section: ModelSection = local_or_hub(recipe.model, loaded.base)
        self.new_tokens = self.new_tokens_of(self.section)
        self.task_class = task_class(recipe.task)
        self.setup = TaskSetup.of(recipe, self.tokenizer, survey, loaded.base)
        self.config = self.config_of(self.section)
        self.export_dtype = export_dtype(recipe.save.dtype, self.section, self.config)
        check_weights(self.section)
        check_placement(self.section.quantize, kind, recipe.train.precision)
        check_backend(self.section, kind, recipe.train.precision)
        self._preview()

    @property
    def card_facts(self) -> dict[str, Any]:
        """What its model card says about loading it: arguments of `model_card`."""
        task_type = self.task_class.auto_class.__name__
        return {"base": self.section.path, "task_type": task_type, "labels": labels_of(self.config)}

    def content(self, card: str | None) -> Export:
        """What is exported. card: the text of README.md."""
        return Export(self.model, self.tokenizer, self.facts, self.export_dtype, card, self.section)

    @property
    def tokenizer_origin(self) -> Path:
        """A file about the added tokens; it exists only if there are some."""
        return self.tokenizer_path / ORIGIN

    def config_of(self, section: ModelSection) -> PretrainedConfig:
        """The config of a network for the run's task. section: the model section that names it. Raises RecipeError."""
        config = build_config(
            section,
            self.tokenizer,
            self.recipe.data.max_length,
            self.task_class.config_settings(self.setup),
            grown=self.recipe.adds_tokens,
        )
        self.task_class.fit_config(self.setup, config)
        return config

    def new_tokens_of(self, section: ModelSection) -> NewTokens:
        """The added tokens that are new for a network; one that was trained with them has learned their embeddings."""
        recipe, pieces = self.recipe, read_pieces(self.tokenizer_path)
        if section.path is None or not pieces:
            return NewTokens(pieces, "random")
        known = vocabulary_of(section.path, section.revision, trust_remote_code=recipe.tokenizer.trust_remote_code)
        ids = self.tokenizer.get_vocab()
        new = {i for token, i in ids.items() if known.get(token) != i}
        return NewTokens({i: each for i, each in pieces.items() if i in new}, recipe.tokenizer.init_added or "pieces")

    def _preview(self) -> None:
        """Check network and adapter on a copy without weights. Raises RecipeError."""
        model, adapt, max_length = self._network_without_weights(), self.section.adapt, self.recipe.data.max_length
        self.heads = heads(model)
        facts = adapted_facts(read_facts(model), adapt)
        check_positions(facts, max_length)
        check_positions_left(facts, adapt, max_length)
        adapt_network(model, adapt, self._adapter_setup(), preview=True)

    def _network_without_weights(self) -> PreTrainedModel:
        return preview_network(self.section, self.config, self.task_class.auto_class)

    def _tokens_without_weights(self) -> set[int]:
        """The ids of tokens that the pretrained network has no embeddings for."""
        embedded = read_config(self.section, {}).get_text_config().vocab_size
        beyond = (i for i in self.tokenizer.get_vocab().values() if i >= embedded)
        return {*beyond, *self.new_tokens.pieces}

    def check_saved_adapter(self) -> None:
        """Raises RecipeError if a saved adapter is trained further that does not save the embeddings of new tokens."""
        path = self.section.adapt.adapter
        if path is None or not (tokens := self._tokens_without_weights()):
            return
        from ptft_dist.networks.adapt.adapters import unsaved_tokens

        if unsaved := unsaved_tokens(path, self._network_without_weights(), tokens):
            example = self.tokenizer.convert_ids_to_tokens(unsaved[0])
            raise RecipeError(
                f"model.adapt.adapter: {path} does not save the embeddings of {len(unsaved)} tokens that its base has "
                f"not, such as {example!r}, so they would be lost. Use ptft merge, and train a new adapter on the "
                "merged model"
            )

    def _adapter_setup(self) -> Any:
        """What the config of an adapter needs; None without an adapter."""
        recipe, section = self.recipe, self.section
        if not section.adapt.adds_adapter:
            return None
        from ptft_dist.networks.adapt.peft_configs import TASK_TYPES, AdapterSetup

        assert section.path is not None
        added: Any = self.tokenizer.convert_tokens_to_ids([*recipe.tokenizer.add, *recipe.settings.added_tokens])
        return AdapterSetup(
            task_type=TASK_TYPES.get(self.task_class.auto_class.__name__),
            base=section.path,
            revision=section.revision,
            total_steps=self.steps(),
            new_tokens=tuple(sorted({*added, *self._tokens_without_weights()})),
            tokenizer_path=str(self.tokenizer_path),
            seed=recipe.train.seed,
        )

    def base_identity(self, digests: Digests) -> str | None:
        """A hash of the files of the pretrained network; None for a network with random weights."""
        return None if self.section.path is None else files_identity(self.section, digests)

    def add_tokens(self, model: Any, section: ModelSection) -> None:
        """Give the pretrained network of `section`, whole on this process, the embeddings of the added tokens."""
        if model.config.get_text_config().vocab_size < (ids := id_count(self.tokenizer)):
            model.resize_token_embeddings(ids, mean_resizing=False)
        new_tokens = self.new_tokens_of(section)
        new_tokens.initialize(new_tokens.tables(model))

    def build(
        self, builder: Builder, *, wrap: Callable[[Any], Task] = lambda task: task, rows: Store | None = None
    ) -> None:
        """Build network and task, and adapt the network.

        Args:
            wrap: what is put around the task, such as distillation.
            rows: training rows, from which EVA initializes the adapter; None: they are not there, and not needed.

        Raises:
            RecipeError: the network does not fit the task.
        """
        recipe, section = self.recipe, self.section
        with builder.building(pretrained=section.path is not None):
            base, fresh = build_network(
                section,
                self.config,
                recipe.train.seed,
                self.task_class.auto_class,
                id_count(self.tokenizer),
                say if section.adapt.adapter is None else _ignore,  # a saved adapter has these weights, or is refused
                precision=recipe.train.precision,
                whole=self.heads,
            )
        tables = self.new_tokens.tables(base)
        with builder.whole(tables):
            self.new_tokens.initialize(tables)
        adapt = section.adapt
        if adapt.adapter is not None:
            from ptft_dist.networks.adapt.reading import saved_keys, set_generation_keys

            set_generation_keys(base, saved_keys(adapt.adapter))
        self.facts = adapted_facts(read_facts(base), adapt)
        self.task = wrap(self.task_class(self.setup, self.facts, builder.device))
        self.task.prepare_network(base)
        self.model = adapt_network(base, adapt, self._adapter_setup(), fresh)
        if rows is not None and adapt.lora is not None and adapt.lora.init == "eva":
            self._initialize_from_activations(rows, adapt.lora.eva_rows)
        self.task.extend_network(self.model, section)
        convert_trained(self.model, builder.trained_dtype)

    def _initialize_from_activations(self, store: Store, count: int) -> None:
        """Initialize the adapter from the first `count` training rows, the same on every rank."""
        from ptft_dist.networks.adapt.adapters import initialize_from_activations

        if self.facts.encoder_decoder:
            raise RecipeError("model.adapt.lora.init: eva works for encoders and decoders only; use init: pissa")
        keys = [(0, row) for row in range(min(count, len(store)))]
        rows = [store.row(row) for _, row in keys]
        given = network_inputs(self.task.collate(rows, keys).inputs)
        inputs = {name: x for name, x in given.items() if "/" not in name}  # of the rows themselves
        if (mask := inputs.get("attention_mask")) is not None and mask.dim() == 2:
            tokens = mask.bool()  # of all texts of a row
        else:
            texts = [text for row in rows for text in self.task_class.texts_of(row)]
            lengths = torch.tensor([len(text) for text in texts])[:, None]
            if len(texts) > len(rows) or "input_ids" not in inputs:  # in another order, or prompts padded on the left
                inputs = {"input_ids": pad(texts, pad_id(self.tokenizer.pad_token_id))}
            tokens = torch.arange(inputs["input_ids"].shape[1]) < lengths
        initialize_from_activations(cast(Any, self.model), {**inputs, "tokens": tokens})


def _ignore(_text: str) -> None: ...
