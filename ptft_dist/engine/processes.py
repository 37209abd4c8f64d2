"""The processes of a run: how they form a group, how long they wait for each other, and which one failed."""

from __future__ import annotations

import contextlib
import os
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState, DistributedType, GradientState
from accelerate.utils import DeepSpeedPlugin, DistributedDataParallelKwargs, InitProcessGroupKwargs

from ptft_dist.errors import RecipeError

# Outside of updates ranks wait for one that writes a checkpoint or exports, and never for tokenization.
PROCESS_GROUP_TIMEOUT = timedelta(minutes=30)
# Within an update all ranks do the same work, and differ by a slow read or a kernel that is compiled.
UPDATE_TIMEOUT = timedelta(minutes=5)
FAILURE_KEY = "ptft_dist/failure"


def planned_kind(world_size: int, deepspeed_config: dict[str, Any] | None) -> str:
    """How the network will be spread: single, ddp, fsdp2, zero1, zero2 or zero3, as the launcher's environment says."""
    if deepspeed_config is not None:
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
    # The config is complete. Accelerate would refuse inline fields of the launch config beside it.
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
    """Make Accelerate shard without a GPU, where it would start every rank alone or train without sharding."""
    state = PartialState(cpu=True)
    if kind == "fsdp2":
        state.distributed_type = DistributedType.MULTI_GPU
        return
    import deepspeed

    # DeepSpeed would compile a shared-memory collective here: most of a minute, and a process that is killed meanwhile
    # leaves a lock for which every later start waits for ever. Gloo does without.
    deepspeed.ops.__compatible_ops__ = {}
    state.distributed_type = DistributedType.DEEPSPEED
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False, verbose=False)


def reset_accelerate() -> None:
    """Forget Accelerate's process-wide state, so that one process can hold several engines one after the other."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def set_collective_timeout(timeout: timedelta) -> None:
    """How long collectives that start from now on wait for other ranks, in every process group."""
    for group in list(dist.distributed_c10d._world.pg_map):
        dist.distributed_c10d._set_pg_timeout(timeout, group)


def announce_failure(text: str) -> None:
    """Tell the other ranks why this one is about to end; the first failure of a run stays. Call before exit.

    A rank that waits for this one sees only a broken connection, or a timeout.
    """
    if dist.is_initialized():
        with contextlib.suppress(dist.DistError):  # the store has ended with the process that held it
            _store().compare_set(FAILURE_KEY, "", text)


def who_failed() -> str | None:
    """The text of the rank that announced its failure first; None if none did."""
    if not dist.is_initialized():
        return None
    try:
        return _store().get(FAILURE_KEY).decode() if _store().check([FAILURE_KEY]) else None
    except dist.DistError:
        return "the process that holds the rendezvous store (rank 0, or the launcher) has ended"


def _store() -> dist.Store:
    return dist.distributed_c10d._get_default_store()
