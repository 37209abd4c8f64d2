"""Unmodified Accelerate launch configs, and the environment that Accelerate's launcher creates from one."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence

HEAD = """
compute_environment: LOCAL_MACHINE
debug: false
downcast_bf16: 'no'
enable_cpu_affinity: false
machine_rank: 0
main_training_function: main
num_machines: 1
num_processes: 2
rdzv_backend: static
same_network: true
tpu_env: []
tpu_use_cluster: false
tpu_use_sudo: false
use_cpu: false
gpu_ids: '-1,-1'
"""
# What the questions of `accelerate config` lead to, with every answer that they offer.
STOCK = {
    "zero1": """distributed_type: DEEPSPEED
mixed_precision: 'no'
deepspeed_config:
  gradient_accumulation_steps: 1
  zero3_init_flag: false
  zero_stage: 1
""",
    "zero2 with offloading": """distributed_type: DEEPSPEED
mixed_precision: 'no'
deepspeed_config:
  deepspeed_multinode_launcher: standard
  gradient_accumulation_steps: 1
  gradient_clipping: 0.4
  offload_optimizer_device: cpu
  offload_param_device: none
  zero3_init_flag: false
  zero_stage: 2
""",
    "zero3": """distributed_type: DEEPSPEED
mixed_precision: 'no'
deepspeed_config:
  gradient_accumulation_steps: 1
  offload_optimizer_device: none
  offload_param_device: none
  zero3_init_flag: true
  zero3_save_16bit_model: true
  zero_stage: 3
""",
    "fsdp2": """distributed_type: FSDP
mixed_precision: 'no'
fsdp_config:
  fsdp_activation_checkpointing: false
  fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP
  fsdp_cpu_ram_efficient_loading: true
  fsdp_offload_params: false
  fsdp_reshard_after_forward: true
  fsdp_state_dict_type: FULL_STATE_DICT
  fsdp_version: 2
""",
    "fsdp1": """distributed_type: FSDP
mixed_precision: 'no'
fsdp_config:
  fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP
  fsdp_sharding_strategy: FULL_SHARD
  fsdp_version: 1
""",
    "context parallelism": """distributed_type: FSDP
mixed_precision: 'no'
fsdp_config: {fsdp_version: 2, fsdp_reshard_after_forward: true}
parallelism_config:
  parallelism_config_dp_replicate_size: 1
  parallelism_config_dp_shard_size: 1
  parallelism_config_tp_size: 1
  parallelism_config_cp_size: 2
  parallelism_config_cp_comm_strategy: allgather
""",
    "multi_gpu": """distributed_type: MULTI_GPU
mixed_precision: bf16
dynamo_config: {dynamo_backend: INDUCTOR}
""",
}


def launcher_arguments(words: Sequence[str]) -> Namespace:
    """The arguments of an `accelerate launch` command and its config file, as Accelerate's launcher parses them."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser

    args, _, _ = _validate_launch_command(launch_command_parser().parse_args(list(words[2:])))
    return args


def launcher_environment(words: Sequence[str]) -> dict[str, str]:
    """The environment variables that Accelerate's launcher would pass to the ranks."""
    from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

    args = launcher_arguments(words)
    args.deepspeed_fields_from_accelerate_config = ""
    environment: dict[str, str] = (
        prepare_deepspeed_cmd_env(args)[1] if args.use_deepspeed else prepare_multi_gpu_env(args)
    )
    return environment
