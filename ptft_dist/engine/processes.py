"""The processes of a run: forming the process group, timeouts of collectives, and announcing failures."""

from __future__ import annotations

import contextlib
import json
import os
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState, DistributedType, GradientState
from accelerate.utils import DeepSpeedPlugin, DistributedDataParallelKwargs, InitProcessGroupKwargs

from ptft_dist.errors import EXIT_FAILED, Failure, RecipeError

# Outside of updates, ranks may wait for one that writes a checkpoint or exports, but never for tokenization.
PROCESS_GROUP_TIMEOUT = timedelta(minutes=30)
# Within an update, all ranks do the same work and differ only by a slow read or the compilation of a kernel.
UPDATE_TIMEOUT = timedelta(minutes=5)
FAILURE_KEY = "ptft_dist/failure"
STORE_GONE = Failure(-1, "", EXIT_FAILED, "the process with the rendezvous store (rank 0 or the launcher) has ended")


def planned_kind(world_size: int, deepspeed_config: dict[str, Any] | None) -> str:
    """The backend that the launcher's environment selects: single, ddp, fsdp2, zero1, zero2 or zero3.

    Raises:
        RecipeError: it cannot run on this number of processes, or it is FSDP version 1.
    """
    if deepspeed_config is not None:
        part = deepspeed_config["zero_optimization"].get("zero_hpz_partition_size", 1) or 1
        if world_size % part:
            raise RecipeError(
                f"zero_hpz_partition_size: {part}: the number of processes must be a multiple of it, not {world_size}. "
                "It is usually the number of GPUs of a machine"
            )
        return f"zero{deepspeed_config['zero_optimization']['stage']}"
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        if os.environ.get("FSDP_VERSION", "1") != "2":
            raise RecipeError("the launch config asks for FSDP version 1; convert it with `accelerate to-fsdp2`")
        return "fsdp2"
    return "single" if world_size == 1 else "ddp"


def make_accelerator(kind: str, mixed: str, deepspeed_config: dict[str, Any] | None, on_cpu: bool) -> Accelerator:
    """Form the process group, and an Accelerator over it. mixed: no, bf16 or fp16."""
    group = InitProcessGroupKwargs(timeout=PROCESS_GROUP_TIMEOUT)
    if on_cpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed warns when it has to find out
    if kind in ("single", "ddp"):
        ddp = DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)
        return Accelerator(mixed_precision=mixed, cpu=on_cpu, kwargs_handlers=[ddp, group])
    if on_cpu:
        _shard_on_cpu(kind)
    if deepspeed_config is None:
        return Accelerator(mixed_precision=mixed, kwargs_handlers=[group])
    # The config is complete. Accelerate refuses inline fields of the launch config in addition to it.
    os.environ.pop("ACCELERATE_CONFIG_DS_FIELDS", None)
    accelerator = Accelerator(
        mixed_precision=mixed,
        deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=deepspeed_config),
        gradient_accumulation_steps=deepspeed_config["gradient_accumulation_steps"],
        kwargs_handlers=[group],
    )
    if accelerator.distributed_type != DistributedType.DEEPSPEED:
        raise RuntimeError("Accelerate did not take the DeepSpeed config: this run would not be sharded")
    return accelerator


def _shard_on_cpu(kind: str) -> None:
    """Make Accelerate shard on a CPU. Otherwise every rank would train alone, or without sharding."""
    state = PartialState(cpu=True)
    if kind == "fsdp2":
        state.distributed_type = DistributedType.MULTI_GPU
        return
    import deepspeed
    from deepspeed.utils import nvtx

    # Otherwise DeepSpeed compiles a shared-memory collective. This takes most of a minute, and a process killed during
    # it leaves a lock that blocks every later start. gloo does not need it.
    deepspeed.ops.__compatible_ops__ = {}
    nvtx.enable_nvtx = False  # marks for NVIDIA's profiler, around each of thousands of small calls
    state.distributed_type = DistributedType.DEEPSPEED
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False, verbose=False)


def reset_accelerate() -> None:
    """Reset Accelerate's process-wide state, so that one process can use several engines one after the other."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def set_collective_timeout(timeout: timedelta) -> None:
    """Set the timeout of collectives that start from now on, in all process groups."""
    for group in list(dist.distributed_c10d._world.pg_map):
        dist.distributed_c10d._set_pg_timeout(timeout, group)


def announce_failure(failure: Failure) -> None:
    """Announce to the other ranks why this one ends; the first announcement of a run is kept. Call before exit.

    Otherwise a rank that waits for this one only gets a broken connection or a timeout.
    """
    if dist.is_initialized():
        with contextlib.suppress(dist.DistError):  # the process with the store has ended
            _store().compare_set(FAILURE_KEY, "", json.dumps(failure))


def first_failure() -> Failure | None:
    """The failure that was announced first; None if there is none; STORE_GONE if nobody can say."""
    if not dist.is_initialized():
        return None
    try:
        return Failure(*json.loads(_store().get(FAILURE_KEY))) if _store().check([FAILURE_KEY]) else None
    except dist.DistError:
        return STORE_GONE


def _store() -> dist.Store:
    return dist.distributed_c10d._get_default_store()
