"""The keys of a launch config: the fields of Accelerate 1.15's ClusterConfig and of its blocks.

They are copied, because importing Accelerate imports torch. tests/test_launch.py compares them with Accelerate's.
"""

from __future__ import annotations

from ptft_dist.launch.settings import DEEPSPEED_VARIABLES, PARALLEL_SIZES

KEYS = (
    "compute_environment", "distributed_type", "mixed_precision", "use_cpu", "debug", "num_processes", "machine_rank",
    "num_machines", "gpu_ids", "main_process_ip", "main_process_port", "rdzv_backend", "same_network",
    "main_training_function", "enable_cpu_affinity", "fp8_config", "deepspeed_config", "fsdp_config",
    "parallelism_config", "megatron_lm_config", "mpirun_config", "downcast_bf16", "tpu_name", "tpu_zone",
    "tpu_use_cluster", "tpu_use_sudo", "command_file", "commands", "tpu_vm", "tpu_env", "dynamo_config",
    "fp16", "dynamo_backend",  # of older versions
)  # fmt: skip
DEEPSPEED_KEYS = (
    *DEEPSPEED_VARIABLES, "gradient_accumulation_steps", "gradient_clipping", "zero3_init_flag",
    "zero3_save_16bit_model", "deepspeed_hostfile", "deepspeed_exclusion_filter", "deepspeed_inclusion_filter",
    "deepspeed_multinode_launcher", "deepspeed_moe_layer_cls_names",
)  # fmt: skip
FSDP_KEYS = (
    "fsdp_version", "fsdp_offload_params", "fsdp_min_num_params", "fsdp_sharding_strategy",
    "fsdp_reshard_after_forward", "fsdp_auto_wrap_policy", "fsdp_transformer_layer_cls_to_wrap",
    "fsdp_backward_prefetch", "fsdp_state_dict_type", "fsdp_forward_prefetch", "fsdp_use_orig_params",
    "fsdp_cpu_ram_efficient_loading", "fsdp_sync_module_states", "fsdp_activation_checkpointing",
    "fsdp_activation_checkpointing_offload", "fsdp_ignored_modules",
)  # fmt: skip
PARALLEL_KEYS = tuple(
    f"parallelism_config_{name}"
    for name in (
        *PARALLEL_SIZES, "cp_backend", "cp_comm_strategy", "sp_backend", "sp_seq_length",
        "sp_seq_length_is_variable", "sp_attn_implementation",
    )
)  # fmt: skip
OF_OTHER_LAUNCHERS = ("deepspeed_hostfile", "deepspeed_exclusion_filter", "deepspeed_inclusion_filter")
BLOCK_TYPES = {"deepspeed_config": "DEEPSPEED", "fsdp_config": "FSDP"}
"""Block -> the distributed type that reads it."""
BLOCKS = {"deepspeed_config": DEEPSPEED_KEYS, "fsdp_config": FSDP_KEYS, "parallelism_config": PARALLEL_KEYS}

# Distributed types that start one process, or several through torchrun.
TYPES = (
    "NO", "DEEPSPEED", "FSDP", "MULTI_GPU", "MULTI_XPU", "MULTI_NPU", "MULTI_MLU", "MULTI_SDAA", "MULTI_MUSA",
    "MULTI_HPU", "MULTI_NEURON",
)  # fmt: skip
