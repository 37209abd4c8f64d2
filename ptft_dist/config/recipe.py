"""The schema of a recipe: what is trained, on what, and how. Nothing here speaks of machines or imports torch.

Every model is frozen and refuses unknown keys. The docstring under a field is its description in the JSON Schema.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import Field, PositiveInt, model_validator

from ptft_dist.config.data_section import Augmentation, DataSection, Source
from ptft_dist.config.distillation import DistillationSettings
from ptft_dist.config.section import (
    BelowOne,
    Fraction,
    NonNegative,
    Positive,
    Section,
    Text,
    exactly_one,
    only_with,
)
from ptft_dist.config.task_settings import DocumentSettings, TaskSettings

__all__ = ["Augmentation", "DataSection", "DocumentSettings", "Recipe", "Source"]


class ModelSection(Section):
    """The network: built from a config with random weights, or loaded from a directory or the Hub."""

    config: dict[str, Any] | None = None
    """A transformers config, as keyword arguments with `model_type` among them. The weights start random; the
    vocabulary size, and the ids of special tokens, are taken from the tokenizer."""
    path: Text | None = None
    """A local directory or a Hub name with weights to go on from."""
    revision: Text | None = None
    """The commit, branch or tag of a Hub model."""
    attention: Literal["auto", "eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention"] = "auto"
    """The attention kernel; `auto` leaves the choice to transformers."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time, the same numbers."""
    compile: bool = False
    """torch.compile the network."""
    new_head: bool = False
    """Start weights anew whose size is not the task's, such as a head for other labels."""
    trust_remote_code: bool = False
    """Run Python code that the model's repository carries. Off, unless you have read that code."""

    @model_validator(mode="after")
    def _check(self) -> ModelSection:
        exactly_one(self, "config", "path")
        if self.config is not None and not isinstance(self.config.get("model_type"), str):
            raise ValueError("config needs a model_type, such as llama, qwen3 or gpt2")
        only_with(self, ("revision", "new_head"), self.path is not None, "model.path")
        return self


class TokenizerTraining(Section):
    """A tokenizer learned from the training documents, as part of `prepare`."""

    algorithm: Literal["bpe", "wordpiece", "unigram"] = "bpe"
    """`bpe`: byte-level byte-pair encoding; every text can be encoded, nothing is unknown. `wordpiece`: BERT's, with
    its normalisation, cased. `unigram`: SentencePiece's. Text that the last two cannot encode is counted."""
    vocab_size: Annotated[int, Field(ge=257)] = 8192
    """Number of tokens, special tokens included, and with `bpe` the 256 bytes."""
    min_frequency: PositiveInt = 2
    """A pair of tokens seen fewer times than this is not merged."""
    max_megabytes: Positive | None = None
    """Learn from about the first this many MB of training text (documents in order); all of it when not given."""


class TokenizerSection(Section):
    """How text becomes token ids."""

    path: Text | None = None
    """A local directory or a Hub name."""
    revision: Text | None = None
    """The commit, branch or tag of a Hub tokenizer."""
    train: TokenizerTraining | None = None
    """Learn a tokenizer from the training documents."""
    add: tuple[Text, ...] = ()
    """Words that become tokens of their own. The network's embeddings grow with them."""
    trust_remote_code: bool = False
    """Run Python code that the tokenizer's repository carries."""

    @model_validator(mode="after")
    def _check(self) -> TokenizerSection:
        exactly_one(self, "path", "train")
        only_with(self, ("revision", "trust_remote_code"), self.path is not None, "tokenizer.path")
        return self


class BatchSection(Section):
    """How much goes into one optimizer update, over all processes, and into one forward pass."""

    global_size: PositiveInt | None = None
    """Rows of one update, over all processes."""
    global_tokens: PositiveInt | None = None
    """Tokens of one update, over all processes: as many rows as fit, at least one."""
    micro_size: PositiveInt | None = None
    """Rows of one forward pass of one process. Accumulation follows: global_size / (processes x micro_size)."""
    micro_tokens: PositiveInt | None = None
    """Instead of micro_size: at most this many tokens, padding included, in one forward pass of one process. (For text
    to text a row's length is source and target together; each is padded for itself, so a bit more can go through.)"""
    group_by_length: bool = True
    """Sort the rows of one update by length before they are cut into micro-batches: less padding, the same update."""

    @model_validator(mode="after")
    def _check(self) -> BatchSection:
        exactly_one(self, "global_size", "global_tokens")
        exactly_one(self, "micro_size", "micro_tokens")
        return self


class ParameterGroup(Section):
    """Parameters that want a learning rate or a weight decay of their own."""

    match: str
    """A regular expression, searched in the parameter's name; the first group that matches takes the parameter."""
    lr_scale: NonNegative = 1.0
    """The learning rate is multiplied by this."""
    weight_decay: NonNegative | None = None
    """Replaces optim.weight_decay."""

    @model_validator(mode="after")
    def _check(self) -> ParameterGroup:
        try:
            re.compile(self.match)
        except re.error as error:
            raise ValueError(f"match is not a regular expression: {error}") from None
        return self


OptimizerName = Literal["adamw", "sgd", "adafactor", "adamw_8bit", "paged_adamw", "paged_adamw_8bit"]
ScheduleName = Literal["constant", "linear", "cosine", "inverse_sqrt", "wsd", "polynomial"]


class OptimSection(Section):
    """The optimizer and the learning rate."""

    name: OptimizerName = "adamw"
    """`adamw` is PyTorch's, fused where it exists; the 8-bit and paged ones are bitsandbytes'."""
    lr: Positive = 3e-4
    """The peak learning rate."""
    weight_decay: NonNegative = 0.1
    """Decoupled weight decay of parameters with two or more dimensions; biases and norms get none. (For `sgd` it is
    an L2 penalty, as in PyTorch.)"""
    betas: tuple[BelowOne, BelowOne] | None = None
    """Adam's decay rates; (0.9, 0.95) when not given."""
    eps: Positive | None = None
    """Adam's epsilon; 1e-8 when not given."""
    momentum: BelowOne | None = None
    """SGD's momentum; 0 when not given."""
    groups: tuple[ParameterGroup, ...] = ()
    """Parameters with a learning rate or weight decay of their own."""
    max_grad_norm: Positive | None = 1.0
    """The gradient's global 2-norm is clipped to this; null: never clipped."""
    schedule: ScheduleName = "cosine"
    """The shape of the learning rate after the warmup. `wsd`: warmup, stable, decay."""
    warmup: NonNegative = 0.0
    """Linear warmup: a share of all updates if below 1, else a number of updates."""
    min_lr_ratio: Fraction = 0.0
    """The schedule ends at this share of the peak (linear, cosine, wsd, polynomial)."""
    decay: Fraction | None = None
    """`wsd`: the share of all updates that the final decay takes; 0.2 when not given."""
    power: Positive | None = None
    """`polynomial`: the exponent; 2 when not given."""

    @model_validator(mode="after")
    def _check(self) -> OptimSection:
        adam = "adamw" in self.name
        only_with(self, ("betas", "eps"), adam, "an adamw optimizer")
        only_with(self, ("momentum",), self.name == "sgd", "optim.name: sgd")
        only_with(self, ("decay",), self.schedule == "wsd", "optim.schedule: wsd")
        only_with(self, ("power",), self.schedule == "polynomial", "optim.schedule: polynomial")
        falls = self.schedule in ("linear", "cosine", "wsd", "polynomial")
        only_with(self, ("min_lr_ratio",), falls, "a schedule that falls: linear, cosine, wsd or polynomial")
        if self.warmup >= 1 and self.warmup != int(self.warmup):
            raise ValueError(f"warmup: {self.warmup} is neither a share below 1 nor a whole number of updates")
        return self


class TrainSection(Section):
    """How long, from which seed, in which precision."""

    max_steps: PositiveInt | None = None
    """Stop after this many optimizer updates."""
    epochs: Positive | None = None
    """Stop after this many passes over the rows; every row is seen, the last update may be smaller."""
    max_tokens: PositiveInt | None = None
    """Stop with the update that reaches this many tokens."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Weights, order and dropout follow from it."""
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    """fp32; or bf16/fp16 mixed precision with fp32 master weights. fp16 needs a GPU."""
    deterministic: bool = False
    """Ask PyTorch for deterministic kernels everywhere (slower on a GPU); an operation without one is an error."""

    @model_validator(mode="after")
    def _check(self) -> TrainSection:
        exactly_one(self, "max_steps", "epochs", "max_tokens")
        return self


class EvalSection(Section):
    """Evaluation on the validation rows. It changes no bit of the training."""

    every: PositiveInt | None = None
    """Evaluate each time this many updates are done, and at the end; only at the end when not given."""
    at_start: bool = False
    """Evaluate before the first update too; `best` and `patience` do not look at it."""
    micro_size: PositiveInt | None = None
    """Rows of one forward pass of one process; batch.micro_size, or what fits batch.micro_tokens, when not given."""
    max_rows: PositiveInt | None = None
    """Use only the first this many validation rows."""
    metric: str = "loss"
    """What `best` and `patience` look at: a name as it stands in the log, without the `eval/`."""
    goal: Literal["min", "max"] | None = None
    """Whether a smaller or a larger metric is better; when not given, a smaller one for losses, errors and perplexity,
    and a larger one for all other scores."""
    patience: PositiveInt | None = None
    """Stop after this many evaluations in a row without a better metric."""

    @property
    def larger_is_better(self) -> bool:
        if self.goal is not None:
            return self.goal == "max"
        return self.metric not in ("loss", "perplexity", "mse", "mae", "divergence") and not self.metric.endswith(
            "_loss"
        )


class SaveSection(Section):
    """Checkpoints to resume from, and the final model."""

    every: PositiveInt | None = None
    """Save each time this many updates are done, and at the end; only at the end when not given."""
    keep: PositiveInt | None = 2
    """Keep the newest this many checkpoints (null: all), and the best one if `best` is set."""
    best: bool = False
    """Keep the checkpoint with the best eval.metric too, whatever its age. Evaluations save when they find it."""
    export: Literal["last", "best"] = "last"
    """Which weights become run_dir/model."""
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Data type of the weights in run_dir/model. `auto`: that of the weights in model.path, fp32 with model.config."""

    @model_validator(mode="after")
    def _check(self) -> SaveSection:
        if self.export == "best" and not self.best:
            raise ValueError("export: best needs best: true")
        return self


class LogSection(Section):
    """metrics.jsonl is always written."""

    every: PositiveInt = 1
    """A row of metrics.jsonl and a TensorBoard point each this many updates."""
    tensorboard: bool = True
    """Write TensorBoard events to run_dir/tensorboard."""


class Recipe(Section):
    """What to train. `task` comes first in every recipe.

    The sections of the tasks are added by `ptft_dist.tasks.registry.recipe_class`.
    """

    task: Text
    """What is trained. The section of the same name has the task's own settings."""
    model: ModelSection
    tokenizer: TokenizerSection
    data: DataSection
    distillation: DistillationSettings | None = None
    """Learn from a teacher too, for tasks that choose from a list: tokens or labels."""
    batch: BatchSection
    optim: OptimSection = OptimSection()
    train: TrainSection
    eval: EvalSection = EvalSection()
    save: SaveSection = SaveSection()
    log: LogSection = LogSection()
    run_dir: Text
    """Everything that the run writes goes here. A relative path starts at the current directory."""

    @property
    def settings(self) -> TaskSettings:
        """The section of the recipe's task."""
        settings: TaskSettings = getattr(self, self.task)
        return settings

    @classmethod
    def task_sections(cls) -> dict[str, TaskSettings]:
        """Task -> its section with all defaults."""
        defaults = {name: field.default for name, field in cls.model_fields.items()}
        return {name: default for name, default in defaults.items() if isinstance(default, TaskSettings)}

    @property
    def validated(self) -> bool:
        """There is a validation side."""
        return self.data.validation is not None or self.data.folds is not None

    @model_validator(mode="after")
    def _check(self) -> Recipe:
        for name, default in self.task_sections().items():
            if name != self.task and getattr(self, name) != default:
                raise ValueError(f"{name} has no effect here: the task is {self.task}")
        if self.distillation is not None and not self.settings.distillable:
            able = ", ".join(name for name, section in self.task_sections().items() if section.distillable)
            raise ValueError(f"distillation has no effect here: it needs one of the tasks {able}")
        self._check_data()
        for name in ("every", "at_start", "micro_size", "max_rows", "patience", "metric", "goal"):
            if getattr(self.eval, name) != EvalSection.model_fields[name].default and not self.validated:
                raise ValueError(f"eval.{name} has no effect here: it needs data.validation")
        for name in self.settings.evaluation_only:
            if getattr(self.settings, name) != type(self.settings).model_fields[name].default and not self.validated:
                raise ValueError(f"{self.task}.{name} has no effect here: it needs data.validation")
        for name, value in (("best", self.save.best), ("every", self.eval.patience)):
            if value and self.eval.every is None:
                what = "save.best" if name == "best" else "eval.patience"
                raise ValueError(f"{what} has no effect here: it needs eval.every")
        if getattr(self.settings, "generation", None) is not None and not self.validated:
            raise ValueError(f"{self.task}.generation has no effect here: it needs data.validation")
        tokens, length = self.batch.global_tokens, self.data.max_length
        if tokens is not None and self.settings.full_rows and tokens % length:
            low = tokens // length * length
            near = [n for n in (low, low + length) if n]
            raise ValueError(
                f"batch.global_tokens: {tokens} is not a multiple of data.max_length ({length}); the nearest that "
                f"are: {', '.join(map(str, near))}"
            )
        return self

    def _check_data(self) -> None:
        """Settings of sources and rows that mean something to other tasks only."""
        documents, data = isinstance(self.settings, DocumentSettings), self.data
        for side in (data.train, data.validation):
            for source in side if isinstance(side, list) else ():
                if source.fields and documents:
                    raise ValueError(
                        f"fields has no effect here: task {self.task} reads one column; name it with field"
                    )
                if source.field and not documents:
                    raise ValueError(f"field has no effect here: name the columns of task {self.task} with fields")
                unknown = [] if documents else [role for role in source.fields if role not in self.settings.roles]
                if unknown:
                    roles = ", ".join(self.settings.roles)
                    raise ValueError(f"fields: task {self.task} has no {unknown[0]!r}, only {roles}")
        if data.bad_rows != "stop" and documents:
            raise ValueError(f"data.bad_rows has no effect here: it needs a task with rows, and not {self.task}")
        if data.augment and not self.settings.augmentable:
            able = ", ".join(name for name, section in self.task_sections().items() if section.augmentable)
            raise ValueError(f"data.augment has no effect here: it needs one of the tasks {able}")
