"""The schema of a recipe: task, model, data and training. It has no settings of machines, and does not import torch.

The docstring below a key is its documentation, which `ptft config schema` prints.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import Field, PositiveInt, field_validator, model_validator

from ptft_dist.config.adapt import AdaptSection, Quantization
from ptft_dist.config.consistency import problems
from ptft_dist.config.continual import ContinualSection
from ptft_dist.config.data_section import Augmentation, DataSection, Source
from ptft_dist.config.distillation import DistillationSettings
from ptft_dist.config.log_section import LogSection
from ptft_dist.config.places import expanded
from ptft_dist.config.section import (
    BelowOne,
    Fraction,
    ModelName,
    NonNegative,
    Positive,
    RecipeProblems,
    Section,
    Text,
    exactly_one,
    only_with,
)
from ptft_dist.config.task_settings import DocumentSettings, TaskSettings
from ptft_dist.config.tokenizer_section import TokenizerSection

__all__ = ["Augmentation", "DataSection", "DocumentSettings", "Recipe", "Source"]


class ModelSection(Section):
    """The network: random weights from a config, or pretrained weights from a directory or the Hub."""

    config: dict[str, Any] | None = None
    """A transformers config: keyword arguments, with `model_type` among them. Weights are initialized at random.
    Vocabulary size and special token ids are taken from the tokenizer."""
    path: ModelName | None = None
    """Pretrained weights: a local directory or a Hub name."""
    revision: Text | None = None
    """The commit, branch or tag of a Hub model."""
    attention: Literal["auto", "eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention"] = "auto"
    """The attention implementation; `auto`: the default of transformers."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time, the same results."""
    compile: bool = False
    """Compile the network with torch.compile."""
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Data type of the frozen weights. `auto`: that of model.path in bf16 and fp16 training, fp32 in fp32 training.
    Trained weights are always fp32."""
    quantize: Quantization | None = None
    """Quantize the frozen weights: nf4 or int8."""
    adapt: AdaptSection = AdaptSection()
    """Which parameters of a pretrained network are trained. Default: all of them."""
    new_head: bool = False
    """Initialize weights at random if their shape does not fit the task, such as a head for other labels."""
    trust_remote_code: bool = False
    """Run Python code from the model's repository. Read that code before you set this."""

    @model_validator(mode="after")
    def _check(self) -> ModelSection:
        exactly_one(self, "config", "path")
        if self.config is not None and not isinstance(self.config.get("model_type"), str):
            raise ValueError("config needs a model_type, such as llama, qwen3 or gpt2")
        pretrained_only = ("revision", "new_head", "dtype", "quantize", "adapt")
        only_with(self, pretrained_only, self.path is not None, "model.path")
        frozen_only = f"it applies to frozen weights, and model.adapt: {self.adapt.method} freezes none"
        if self.adapt.full and self.quantize is not None:
            raise ValueError(f"quantize: quantized weights cannot be trained; {frozen_only}. Set adapt: lora")
        if self.adapt.full and self.dtype not in ("auto", "fp32"):
            raise ValueError(f"dtype: {frozen_only}. Trained weights are fp32; train.precision: bf16 saves memory")
        if self.quantize is not None and not self.adapt.adds_adapter and self.adapt.last_layers is not None:
            raise ValueError("quantize: last_layers would train quantized weights. Use an adapter, such as adapt: lora")
        if self.quantize is not None:
            self._check_quantized_start()
        if self.quantize is not None and self.dtype != "auto":
            raise ValueError("dtype: has no effect on quantized weights; quantize.compute_dtype sets their products")
        return self

    def _check_quantized_start(self) -> None:
        """Raises ValueError if the adapter's initial values would change quantized weights."""
        lora, given = self.adapt.lora, self.adapt.peft or {}
        init = str(given.get("init_lora_weights") if lora is None else lora.init).lower()
        key = f"adapt.{self.adapt.init_key}"
        if init.startswith("pissa"):
            raise ValueError(f"{key}: pissa cannot decompose quantized weights. Use the default, or remove quantize")
        if init == "olora":
            raise ValueError(
                f"{key}: olora changes the quantized weights, which are rounded again, so the exported adapter would "
                "not fit the base. Use the default, or remove quantize"
            )


class BatchSection(Section):
    """The size of one optimizer update, over all processes, and of one forward pass."""

    global_size: PositiveInt | None = None
    """Rows in one update, over all processes."""
    global_tokens: PositiveInt | None = None
    """Tokens in one update, over all processes: as many rows as fit, at least one."""
    micro_size: PositiveInt | None = None
    """Rows in one forward pass of one process. Gradient accumulation is global_size / (processes x micro_size)."""
    micro_tokens: PositiveInt | None = None
    """Instead of micro_size: at most this many tokens, padding included, in one forward pass of one process. For
    text-to-text tasks a row's length is source plus target. They are padded separately, which can take a bit more."""
    group_by_length: bool = True
    """Sort the rows of one update by length before they are split into micro-batches: less padding, the same update."""

    @model_validator(mode="after")
    def _check(self) -> BatchSection:
        exactly_one(self, "global_size", "global_tokens")
        exactly_one(self, "micro_size", "micro_tokens")
        return self


class ParameterGroup(Section):
    """Parameters with their own learning rate or weight decay."""

    match: str
    """A regular expression, searched in the parameter's name. The first matching group applies."""
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
    """`adamw`: PyTorch's, fused where available. The 8-bit and paged optimizers are those of
    bitsandbytes, and do not run under FSDP2."""
    lr: Positive = 3e-4
    """The peak learning rate."""
    weight_decay: NonNegative = 0.1
    """Decoupled weight decay of parameters with two or more dimensions; biases and norms get none. For `sgd` it is an
    L2 penalty, as in PyTorch."""
    betas: tuple[BelowOne, BelowOne] | None = None
    """Adam's decay rates. Default: [0.9, 0.95]."""
    eps: Positive | None = None
    """Adam's epsilon. Default: 1e-8."""
    momentum: BelowOne | None = None
    """SGD's momentum. Default: 0."""
    groups: tuple[ParameterGroup, ...] = ()
    """Parameters with their own learning rate or weight decay."""
    layer_decay: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None
    """Layer-wise learning rate decay: the learning rate of each block is this many times that of the next one."""
    head_lr_scale: Positive | None = None
    """The learning rate of the output head, such as a new classifier, is multiplied by this."""
    max_grad_norm: Positive | None = 1.0
    """Clip the gradient to this global 2-norm; null: no clipping."""
    schedule: ScheduleName = "cosine"
    """The shape of the learning rate after the warmup. `wsd`: warmup, stable, decay."""
    warmup: NonNegative = 0.0
    """Linear warmup: a fraction of all updates if below 1, otherwise a number of updates."""
    min_lr_ratio: Fraction = 0.0
    """The final learning rate as a fraction of the peak (linear, cosine, wsd, polynomial)."""
    decay: Fraction | None = None
    """`wsd`: the final decay as a fraction of all updates. Default: 0.2."""
    power: Positive | None = None
    """`polynomial`: the exponent. Default: 2."""

    @model_validator(mode="after")
    def _check(self) -> OptimSection:
        adam = "adamw" in self.name
        only_with(self, ("betas", "eps"), adam, "an adamw optimizer")
        only_with(self, ("momentum",), self.name == "sgd", "optim.name: sgd")
        only_with(self, ("decay",), self.schedule == "wsd", "optim.schedule: wsd")
        only_with(self, ("power",), self.schedule == "polynomial", "optim.schedule: polynomial")
        falls = self.schedule in ("linear", "cosine", "wsd", "polynomial")
        only_with(self, ("min_lr_ratio",), falls, "a decaying schedule: linear, cosine, wsd or polynomial")
        if self.warmup >= 1 and self.warmup != int(self.warmup):
            raise ValueError(f"warmup: {self.warmup} is neither a fraction below 1 nor a whole number of updates")
        return self


class TrainSection(Section):
    """Length, seed and precision of the training."""

    max_steps: PositiveInt | None = None
    """Stop after this many optimizer updates."""
    epochs: Annotated[float, Field(gt=0.0, le=1e6)] | None = None
    """Stop after this many passes over the rows. Every row is used; the last update may be smaller."""
    max_tokens: PositiveInt | None = None
    """Stop after the update that reaches this many tokens."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seed of initial weights, row order, masking and dropout."""
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    """`bf16`, `fp16`: mixed precision with fp32 master weights; fp16 needs a GPU."""
    deterministic: bool = False
    """Use deterministic kernels only (slower on a GPU). An operation without one is an error."""
    offload_frozen: bool = False
    """Keep the frozen networks (teacher, reference, reward models) in the host's memory. Each is copied to the GPU
    whenever it runs. Not for ZeRO-3 and FSDP2, which shard them."""

    @model_validator(mode="after")
    def _check(self) -> TrainSection:
        exactly_one(self, "max_steps", "epochs", "max_tokens")
        return self


def is_better(value: float, than: float, *, larger_is_better: bool) -> bool:
    """Whether a metric is better than another value of it."""
    return value > than if larger_is_better else value < than


def goal_of(metric: str) -> Literal["min", "max"]:
    """Whether a metric, named without `eval/`, is to be minimized or maximized, unless eval.goal says it."""
    smaller = ("loss", "perplexity", "mse", "mae", "divergence", "ece", "brier")
    return "min" if metric in smaller or metric.endswith("_loss") else "max"


class EvalSection(Section):
    """Evaluation on the validation rows. It has no effect on the training."""

    every: PositiveInt | None = None
    """Evaluate every this many updates, and at the end. Default: only at the end."""
    at_start: bool = False
    """Evaluate before the first update too. `save.best` and `patience` ignore this evaluation."""
    micro_size: PositiveInt | None = None
    """Rows in one forward pass of one process. Default: batch.micro_size, or what fits batch.micro_tokens."""
    max_rows: PositiveInt | None = None
    """Evaluate on the first this many validation rows only."""
    metric: str = "loss"
    """The metric that `save.best` and `patience` compare: its name in the log, without `eval/`."""
    goal: Literal["min", "max"] | None = None
    """Whether the metric is to be minimized or maximized. Default: `min` for losses, errors and perplexity, `max` for
    all others."""
    patience: PositiveInt | None = None
    """Early stopping: stop after this many evaluations in a row without improvement."""

    @property
    def larger_is_better(self) -> bool:
        return goal_of(self.metric) == "max" if self.goal is None else self.goal == "max"


class SaveSection(Section):
    """Checkpoints for resuming, and the exported model."""

    every: PositiveInt | None = None
    """Save a checkpoint every this many updates, and at the end. Default: only at the end."""
    keep: PositiveInt | None = 2
    """Keep this many of the newest checkpoints (null: all), and the best one if `best` is set."""
    best: bool = False
    """Also keep the checkpoint with the best eval.metric. An evaluation with a new best saves a checkpoint."""
    export: Literal["last", "best"] = "last"
    """Which weights are exported to run_dir/model."""
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Data type of the exported weights. `auto`: that of the weights in model.path; fp32 with model.config. bf16 and
    fp16 can lose a training with a small learning rate; a warning says how much."""

    @model_validator(mode="after")
    def _check(self) -> SaveSection:
        if self.export == "best" and not self.best:
            raise ValueError("export: best needs best: true")
        return self


def _model_tokenizer(model: ModelSection) -> TokenizerSection:
    """The tokenizer of model.path. With model.config there is none: `problems` reports the empty section."""
    return TokenizerSection.model_construct(
        path=model.path, revision=model.revision, trust_remote_code=model.trust_remote_code
    )


class Recipe(Section):
    """A recipe.

    The sections of the tasks are added by `ptft_dist.tasks.registry.recipe_class`.
    """

    task: Text
    """The training task. Its own settings are in the section of the same name."""
    model: ModelSection
    tokenizer: TokenizerSection = Field(default_factory=lambda data: _model_tokenizer(data["model"]))
    data: DataSection
    distillation: DistillationSettings | None = None
    """Knowledge distillation from a teacher, for tasks that predict tokens or labels."""
    continual: ContinualSection | None = None
    """Continual learning: keep a pretrained network from forgetting old data."""
    batch: BatchSection
    optim: OptimSection = OptimSection()
    train: TrainSection
    eval: EvalSection = EvalSection()
    save: SaveSection = SaveSection()
    log: LogSection = LogSection()
    run_dir: Text
    """The directory for everything the run writes. A relative path starts at the current directory."""

    @field_validator("run_dir")
    @classmethod
    def _in_home(cls, given: str) -> str:
        return str(expanded(given)) if given.startswith("~") else given

    @property
    def settings(self) -> TaskSettings:
        """The section of the recipe's task."""
        settings: TaskSettings = getattr(self, self.task)
        return settings

    @property
    def longest_row(self) -> int:
        """The maximum number of tokens in a row, which may have several texts."""
        return self.data.max_length * self.settings.texts_per_row

    @classmethod
    def task_sections(cls) -> dict[str, TaskSettings]:
        """Task -> its section with all defaults."""
        defaults = {name: field.default for name, field in cls.model_fields.items()}
        return {name: default for name, default in defaults.items() if isinstance(default, TaskSettings)}

    @property
    def adds_tokens(self) -> bool:
        """Whether tokens are added to the tokenizer."""
        return bool(self.tokenizer.add or self.tokenizer.extend or self.settings.added_tokens)

    def own_values(self) -> dict[str, Any]:
        """All values as plain JSON, without the sections of other tasks, which are at their defaults."""
        return self.model_dump(mode="json", exclude=self.task_sections().keys() - {self.task})

    @property
    def metric_names(self) -> tuple[str, ...]:
        """The metrics of an evaluation: the valid values of eval.metric."""
        return *self.settings.metric_names, *(self.distillation.metric_names if self.distillation else ())

    @property
    def old_data(self) -> dict[str, list[Source]]:
        """Dotted key -> the sources of old data that it names."""
        return {} if self.continual is None else self.continual.old_data

    @property
    def validated(self) -> bool:
        """Whether there are validation rows."""
        return self.data.validation is not None or self.data.folds is not None

    @model_validator(mode="after")
    def _check(self) -> Recipe:
        if all_problems := list(problems(self)):
            raise RecipeProblems(all_problems)
        return self
