"""The settings of a launch config, from its file or from the environment variables of `accelerate launch`.

A launch config defines the processes and the backend. Settings that belong to the recipe (precision, batch, clipping,
compilation) must agree with it. Both sources are checked by the same function.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ptft_dist.errors import RecipeError

if TYPE_CHECKING:
    from ptft_dist.config.recipe import Recipe

# Fields of `deepspeed_config`, and the environment variables in which Accelerate 1.15 passes them.
DEEPSPEED_VARIABLES = {
    "deepspeed_config_file": "ACCELERATE_DEEPSPEED_CONFIG_FILE",
    "zero_stage": "ACCELERATE_DEEPSPEED_ZERO_STAGE",
    "offload_optimizer_device": "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE",
    "offload_param_device": "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE",
    "offload_optimizer_nvme_path": "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_NVME_PATH",
    "offload_param_nvme_path": "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_NVME_PATH",
}
PARALLEL_SIZES = {
    "tp_size": "tensor parallelism",
    "cp_size": "context parallelism",
    "sp_size": "sequence parallelism",
    "dp_replicate_size": "hybrid sharding",
    "dp_shard_size": "a sharding size of its own",
}


@dataclass(frozen=True)
class LaunchSettings:
    """The settings of a launch config that ptft reads. Values are spelled as in Accelerate."""

    source: str
    """The file, or `the launch config`; for messages."""
    mixed_precision: str = "no"
    dynamo_backend: str = "no"
    fsdp_version: int | None = None
    """None without FSDP."""
    megatron: bool = False
    gradient_accumulation_steps: str = "auto"
    gradient_clipping: str = "auto"
    parallel_sizes: Mapping[str, int] = field(default_factory=dict)
    deepspeed: Mapping[str, str] | None = None
    """The fields of `deepspeed_config` that DEEPSPEED_VARIABLES names, as text; None without DeepSpeed."""


def settings_of_environment(environ: Mapping[str, str]) -> LaunchSettings:
    """The settings that the launcher of this process passed; defaults without Accelerate's variables."""

    def is_true(name: str) -> bool:
        return environ.get(name, "false").lower() == "true"

    sizes = {name: environ.get(f"PARALLELISM_CONFIG_{name.upper()}", "1") for name in PARALLEL_SIZES}
    fields = {name: environ[variable] for name, variable in DEEPSPEED_VARIABLES.items() if variable in environ}
    return LaunchSettings(
        source="the launch config",
        mixed_precision=environ.get("ACCELERATE_MIXED_PRECISION", "no"),
        dynamo_backend=environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower(),
        fsdp_version=int(environ.get("FSDP_VERSION", "1")) if is_true("ACCELERATE_USE_FSDP") else None,
        megatron=is_true("ACCELERATE_USE_MEGATRON_LM"),
        gradient_accumulation_steps=environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "auto"),
        gradient_clipping=environ.get("ACCELERATE_GRADIENT_CLIPPING", "auto"),
        parallel_sizes={k: int(v) for k, v in sizes.items()} if is_true("ACCELERATE_USE_PARALLELISM_CONFIG") else {},
        deepspeed=fields if is_true("ACCELERATE_USE_DEEPSPEED") else None,
    )


def check_settings(settings: LaunchSettings, recipe: Recipe) -> None:
    """Raises RecipeError, with all problems, for unsupported settings and for settings that contradict the recipe."""
    problems = [*_unsupported(settings), *_contradictions(settings, recipe)]
    if problems:
        raise RecipeError("\n".join(f"{settings.source}: {problem}" for problem in problems))


def _unsupported(settings: LaunchSettings) -> Iterator[str]:
    for name, size in settings.parallel_sizes.items():
        if size != 1:
            yield (
                f"parallelism_config: {name}: {size}: {PARALLEL_SIZES[name]} is not supported; "
                "remove parallelism_config; ZeRO and FSDP2 shard over all processes"
            )
    if settings.fsdp_version == 2 and set(settings.parallel_sizes.values()) == {1}:
        yield "parallelism_config: remove it; FSDP2 shards over all processes, and Accelerate refuses sizes of 1"
    if settings.fsdp_version is not None and settings.fsdp_version != 2:
        yield (
            "FSDP version 1 is not supported; set fsdp_version: 2, or convert the file with "
            "`accelerate to-fsdp2 --config_file OLD --output_file NEW`"
        )
    if settings.megatron:
        yield "Megatron-LM is not supported; use ZeRO (launch config zero3) or FSDP2 (launch config fsdp2)"


def _contradictions(settings: LaunchSettings, recipe: Recipe) -> Iterator[str]:
    precision = settings.mixed_precision
    if precision not in ("no", recipe.train.precision):
        yield (
            f"mixed_precision: {precision} contradicts the recipe's train.precision: {recipe.train.precision}; "
            "set mixed_precision: 'no', and the precision (fp32, bf16 or fp16) in the recipe"
        )
    if settings.dynamo_backend != "no":
        yield (
            f"dynamo_backend: {settings.dynamo_backend}: compilation belongs to the recipe; remove it, and set "
            "model.compile: true in the recipe"
        )
    steps, clipping, limit = (
        settings.gradient_accumulation_steps,
        settings.gradient_clipping,
        recipe.optim.max_grad_norm,
    )
    if steps not in ("auto", "1"):
        yield (
            f"gradient_accumulation_steps: {steps}: it follows from the recipe's batch.global_size and "
            "batch.micro_size; remove it"
        )
    if clipping != "auto" and not _equal(clipping, limit):
        yield f"gradient_clipping: {clipping} contradicts the recipe's optim.max_grad_norm: {limit}; remove it"


def _equal(text: str, number: float | None) -> bool:
    try:
        return number is not None and float(text) == number
    except ValueError:
        return False
