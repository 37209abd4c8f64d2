"""The keys of a DeepSpeed JSON: those passed to DeepSpeed, with their valid values, and why others are refused.

Source: DeepSpeed 0.19.8, `deepspeed/runtime/config.py` and `deepspeed/runtime/zero/config.py`. The tables are copied,
because importing DeepSpeed takes seconds. tests/test_deepspeed_config.py compares them with DeepSpeed's schema, to
detect keys of later versions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Values:
    """A key that is passed to DeepSpeed, and its valid values."""

    expected: str
    accepts: Callable[[Any], bool]


@dataclass(frozen=True)
class Refused:
    """A key that is not passed to DeepSpeed."""

    reason: str
    neutral: Callable[[Any], bool] = lambda _value: False
    """Returns whether a value is equivalent to a missing key."""


Table = Mapping[str, "Values | Refused | Table"]


def one_of(*values: Any) -> Callable[[Any], bool]:
    """A function that accepts exactly these values. The types are compared too, so 1 is not true."""
    return lambda value: any(value == each and type(value) is type(each) for each in values)


def is_auto(value: Any) -> bool:
    """Whether a value is "auto" or null, or a block of such values."""
    if isinstance(value, dict):
        return all(is_auto(inner) for inner in value.values())
    return value is None or value == "auto"


def _is_count(value: Any) -> bool:
    """Whether a value is a whole number from 0, also in the form 5e8."""
    return isinstance(value, int | float) and not isinstance(value, bool) and value >= 0 and value == value // 1


def _is_precision_block(value: Any) -> bool:
    """Whether `enabled` is "auto" and loss scaling is DeepSpeed's default, as in many published files."""
    if not isinstance(value, dict):
        return is_auto(value)
    defaults = {
        "auto_cast": False,
        "loss_scale": 0,
        "loss_scale_window": 1000,
        "initial_scale_power": 16,
        "hysteresis": 2,
        "min_loss_scale": 1,
    }
    return all(is_auto(inner) or inner == defaults.get(key, object()) for key, inner in value.items())


BOOL = Values("true or false", one_of(True, False))
COUNT = Values("a whole number, 0 or more", _is_count)
COUNT_OR_AUTO = Values('a whole number, 0 or more, or "auto"', lambda value: value == "auto" or _is_count(value))
FRACTION = Values("a number from 0 to 1", lambda v: isinstance(v, int | float) and v is not True and 0 <= v <= 1)
TEXT = Values("a text", lambda value: isinstance(value, str))
TEXTS = Values(
    "a text or a list of texts", lambda v: isinstance(v, str) or (isinstance(v, list) and all(map(TEXT.accepts, v)))
)
DEVICE = Values("none, cpu or nvme", one_of("none", "cpu", "nvme"))
STAGE = Values("1, 2 or 3 (for stage 0, plain data parallelism, use the launch config multi_gpu)", one_of(1, 2, 3))


def _removed(feature: str) -> Refused:
    return Refused(f"DeepSpeed has removed {feature}; remove the key", one_of(False))


def _recipe(key: str, neutral: Callable[[Any], bool] = is_auto) -> Refused:
    return Refused(f'the recipe decides this, with {key}; remove the key or set it to "auto"', neutral)


def _no_effect(use: str, neutral: Callable[[Any], bool] = lambda _value: False) -> Refused:
    return Refused(f"no effect here; {use}", neutral)


def _disabled(value: Any) -> bool:
    return value is False or (isinstance(value, dict) and value.get("enabled", False) is False)


_SAME_GRADIENT = "it changes the gradient with the number of processes; remove the key"
_LOSSY = "it rounds what the processes exchange, so the loss would depend on their number; remove the key"
_ONE_MODEL = "only data parallelism is supported; remove the key"
_TWO_WRITERS = "a second metrics writer; metrics are in metrics.jsonl and TensorBoard; remove the key"
_OFFLOAD = 'deprecated by DeepSpeed; use offload_optimizer or offload_param: {"device": "cpu"}'
_CHECKPOINTS = "ptft writes, hashes and commits checkpoints itself (save in the recipe); remove the key"

ZERO: Table = {
    "stage": STAGE,
    "contiguous_gradients": BOOL,
    "reduce_scatter": BOOL,
    "reduce_bucket_size": COUNT_OR_AUTO,
    "use_multi_rank_bucket_allreduce": BOOL,
    "allgather_partitions": BOOL,
    "allgather_bucket_size": COUNT,
    "overlap_comm": BOOL,
    "offload_param": {
        "device": DEVICE,
        "nvme_path": TEXT,
        "buffer_count": COUNT,
        "buffer_size": COUNT,
        "max_in_cpu": COUNT,
        "pin_memory": BOOL,
    },
    "offload_optimizer": {
        "device": DEVICE,
        "nvme_path": TEXT,
        "buffer_count": COUNT,
        "pin_memory": BOOL,
        "pipeline_read": BOOL,
        "pipeline_write": BOOL,
        "fast_init": BOOL,
        "ratio": FRACTION,
        "super_offload": Refused("SuperOffload steps by itself, which ptft does not support", one_of(False)),
        "cpuadam_cores_perc": _no_effect("it belongs to super_offload, which is not supported"),
    },
    "sub_group_size": COUNT,
    "stage3_prefetch_bucket_size": COUNT_OR_AUTO,
    "stage3_param_persistence_threshold": COUNT_OR_AUTO,
    "stage3_model_persistence_threshold": COUNT,
    "stage3_max_live_parameters": COUNT,
    "stage3_max_reuse_distance": COUNT,
    # The export always gathers the weights, so both values are accepted.
    "stage3_gather_16bit_weights_on_model_save": Refused("expected true or false", one_of(True, False)),
    "stage3_module_granularity_threshold": COUNT,
    "stage3_use_all_reduce_for_fetch_params": BOOL,
    "stage3_allgather_sequential": BOOL,
    "ignore_unused_parameters": BOOL,
    "round_robin_gradients": BOOL,
    "parameter_alignment": BOOL,
    "zero_hpz_partition_size": COUNT,
    "memory_efficient_linear": BOOL,
    "override_module_apply": BOOL,
    "log_trace_cache_warnings": BOOL,
    "enable_sanity_checks": BOOL,
    "leaf_module": {"classes": TEXTS, "names": TEXTS, "name_suffixes": TEXTS},
    "zero_quantized_weights": Refused(_LOSSY, one_of(False)),
    "zero_quantized_gradients": Refused(_LOSSY, one_of(False)),
    "zero_quantized_nontrainable_weights": Refused(_LOSSY, one_of(False)),
    "zenflow": Refused("ZenFlow decides itself when to step, which ptft does not support; remove the key"),
    "load_from_fp32_weights": Refused("false would lose precision at every resume; remove the key", one_of(True)),
    "compute_grad_norm": Refused("false would take away the gradient norm that ptft logs and clips", one_of(True)),
    "elastic_checkpoint": Refused("deprecated by DeepSpeed, and ptft writes checkpoints itself", one_of(False)),
    "legacy_stage1": Refused("deprecated by DeepSpeed; remove the key", one_of(False)),
    "pipeline_loading_checkpoint": Refused("pipeline parallelism is not supported; remove the key", one_of(False)),
    "save_muon_momentum_buffer_in_memory": _no_effect("DeepSpeed's Muon is not used; remove the key", one_of(False)),
    "cpu_offload": Refused(_OFFLOAD, one_of(False)),
    "cpu_offload_param": Refused(_OFFLOAD, one_of(False)),
    "cpu_offload_use_pin_memory": Refused(_OFFLOAD, one_of(False)),
    "stage3_gather_fp16_weights_on_model_save": Refused("deprecated by DeepSpeed; remove the key", one_of(True, False)),
    "mics_shard_size": _removed("MiCS"),
    "mics_hierarchical_params_gather": _removed("MiCS"),
    "zeropp_loco_param": _removed("LoCo"),
}

TOP: Table = {
    "zero_optimization": ZERO,
    "aio": {
        "block_size": COUNT,
        "queue_depth": COUNT,
        "intra_op_parallelism": COUNT,
        "single_submit": BOOL,
        "overlap_events": BOOL,
        "use_gds": BOOL,
    },
    "comms_logger": {
        "enabled": BOOL,
        "verbose": BOOL,
        "prof_all": BOOL,
        "prof_ops": TEXTS,
        "debug": BOOL,
    },
    "flops_profiler": {
        "enabled": BOOL,
        "recompute_fwd_factor": Values("a number, 0 or more", lambda v: isinstance(v, int | float) and v >= 0),
        "profile_step": COUNT,
        "module_depth": Values("a whole number", lambda v: isinstance(v, int) and v is not True),
        "top_modules": COUNT,
        "detailed": BOOL,
        "output_file": TEXT,
    },
    "wall_clock_breakdown": BOOL,
    "memory_breakdown": BOOL,
    "dump_state": BOOL,
    "disable_python_gc": BOOL,
    "zero_force_ds_cpu_optimizer": BOOL,
    # What the recipe decides.
    "train_batch_size": _recipe("batch.global_size"),
    "train_micro_batch_size_per_gpu": _recipe("batch.micro_size"),
    "gradient_accumulation_steps": _recipe("batch.global_size and batch.micro_size"),
    "gradient_clipping": _recipe("optim.max_grad_norm"),
    "fp16": _recipe("train.precision", _is_precision_block),
    "bf16": _recipe("train.precision", _is_precision_block),
    "bfloat16": _recipe("train.precision", _is_precision_block),
    "torch_autocast": _recipe("train.precision"),
    "data_types": _recipe("train.precision"),
    "communication_data_type": _recipe("train.precision"),
    "optimizer": _recipe("optim"),
    "scheduler": _recipe("optim.schedule"),
    # What would change the mathematics.
    "gradient_allreduce_op": Refused(_SAME_GRADIENT, one_of("mean")),
    "gradient_predivide_factor": Refused(_SAME_GRADIENT, one_of(1, 1.0)),
    "prescale_gradients": Refused(_SAME_GRADIENT, one_of(False)),
    "managed_gradient_accumulation": Refused("ptft accumulates gradients itself; remove the key", one_of(True)),
    "disable_allgather": Refused("the ranks' weights would differ; remove the key", one_of(False)),
    # What is not supported.
    "tensor_parallel": Refused(_ONE_MODEL),
    "sequence_parallel_size": Refused(_ONE_MODEL, one_of(1)),
    "seq_parallel_communication_data_type": Refused(_ONE_MODEL),
    "expert_parallel": Refused(_ONE_MODEL, _disabled),
    "use_data_before_expert_parallelism": Refused(_ONE_MODEL, one_of(False)),
    "pipeline": Refused(_ONE_MODEL),
    "hybrid_engine": Refused("the hybrid engine is not supported; remove the key", _disabled),
    "checkpoint": Refused(_CHECKPOINTS),
    "datastates": Refused(_CHECKPOINTS),
    "weight_quantization": Refused("it is for inference; remove the key"),
    "zero_allow_untested_optimizer": Refused("ptft needs true; remove the key", one_of(True)),
    # What would have no effect.
    "activation_checkpointing": _no_effect("use model.gradient_checkpointing: true in the recipe"),
    "compile": _no_effect("use model.compile: true in the recipe"),
    "steps_per_print": _no_effect("ptft logs every update; remove the key"),
    "log_level": _no_effect("remove the key"),
    "data_efficiency": _no_effect("ptft orders and loads the data itself; remove the key", _disabled),
    "dataloader_drop_last": _no_effect("ptft loads the data itself; remove the key", one_of(False)),
    "autotuning": _no_effect("DeepSpeed's autotuner cannot change a recipe; remove the key", _disabled),
    "tensorboard": Refused(_TWO_WRITERS, _disabled),
    "wandb": Refused(_TWO_WRITERS, _disabled),
    "csv_monitor": Refused(_TWO_WRITERS, _disabled),
    "comet": Refused(_TWO_WRITERS, _disabled),
    # What DeepSpeed no longer has.
    "amp": Refused("DeepSpeed has removed Apex amp; use train.precision in the recipe", is_auto),
    "nebula": _removed("Nebula"),
    "compression_training": _removed("model compression"),
    "quantize_training": _removed("mixture-of-quantization training"),
    "sparse_gradients": _removed("sparse gradients"),
    "eigenvalue": _removed("eigenvalue-based quantization"),
    "sparse_attention": _removed("sparse attention"),
    "elasticity": _removed("elastic training"),
    "graph_harvesting": _removed("graph harvesting"),
    "curriculum_learning": _removed("its legacy curriculum learning"),
    "progressive_layer_drop": _removed("progressive layer dropping"),
}
