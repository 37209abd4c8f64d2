"""The only package that speaks Accelerate and DeepSpeed: processes, precision, backward, step, collectives, state.

Rules that hold here, and the reason for each:
- Only the network and the optimizer are prepared. Accelerate's schedulers step once per process and its loaders move
  the accumulation boundary; order, schedule, random numbers and retention are ours.
- Accelerate and DeepSpeed divide the loss by an accumulation count that they assume constant. Both divisions are
  switched off; the caller scales by world_size / total, since data parallelism averages gradients over processes.
- The weights move after every rank has agreed that the loss is finite.
"""

from __future__ import annotations

import contextlib
import os
import resource
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState, DistributedType, GradientState
from accelerate.utils import DeepSpeedPlugin, DistributedDataParallelKwargs, InitProcessGroupKwargs
from transformers import PreTrainedModel

from ptft_dist.config.recipe import OptimSection
from ptft_dist.engine.backends import Backend, Fsdp2, Whole, Zero, built_whole
from ptft_dist.engine.optim import build_optimizer, parameter_groups, set_lr
from ptft_dist.errors import RecipeError

Precision = Literal["fp32", "bf16", "fp16"]
MIXED_PRECISION = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}
# Collectives wait for work of other ranks (a save, an evaluation), never for CPU work such as tokenization.
PROCESS_GROUP_TIMEOUT = timedelta(minutes=30)
_LEFT_BEHIND: list[Any] = []  # what holds on to a process group that was left; see Engine.close


class LossModule(torch.nn.Module):
    """The network inside one module whose forward runs any function of it, so that data-parallel hooks see it."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        self.config = model.config  # DeepSpeed's "auto" bucket sizes read it
        self._no_split_modules = getattr(model, "_no_split_modules", None)  # FSDP's wrapping reads it

    def forward(self, inputs: dict[str, torch.Tensor], call: Callable[..., Any]) -> Any:
        out = call(self.model, inputs)
        return tuple(out) if isinstance(out, tuple) else out


class FrozenNetwork:
    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    def forward(self, call: Callable[..., Any], inputs: dict[str, torch.Tensor]) -> Any:
        with torch.no_grad():
            return call(self.model, inputs)


def planned_kind(world_size: int, deepspeed_config: dict[str, Any] | None) -> str:
    """How the network will be spread: single, ddp, fsdp2, zero1, zero2 or zero3, as the launcher's environment says."""
    if deepspeed_config is not None:
        return f"zero{deepspeed_config['zero_optimization']['stage']}"
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        if os.environ.get("FSDP_VERSION", "1") != "2":
            raise RecipeError("the launch config asks for FSDP version 1; convert it with `accelerate to-fsdp2`")
        return "fsdp2"
    return "single" if world_size == 1 else "ddp"


class Engine:
    """One rank's view of the machine. Construction forms the process group; `prepare` takes network and optimizer."""

    def __init__(self, precision: Precision, deepspeed_config: dict[str, Any] | None) -> None:
        """deepspeed_config: complete (see complete_deepspeed_config), or None without DeepSpeed."""
        self.precision, expected = precision, int(os.environ.get("WORLD_SIZE", "1"))
        self.kind, self.deepspeed_config = planned_kind(expected, deepspeed_config), deepspeed_config
        on_cpu = not torch.accelerator.is_available() or os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true"
        if precision == "fp16" and (on_cpu or self.kind == "fsdp2"):
            raise RecipeError("train.precision: fp16 needs a GPU, and not FSDP2; use fp32 or bf16")
        self.accelerator = _accelerator(self.kind, MIXED_PRECISION[precision], deepspeed_config, on_cpu)
        self.rank, self.world_size = self.accelerator.process_index, self.accelerator.num_processes
        self.device = self.accelerator.device
        self.is_main = self.rank == 0
        if self.world_size != expected:
            raise RuntimeError(f"the launcher started {expected} processes, but this one sees {self.world_size}")

    @property
    def dtype(self) -> torch.dtype:
        """Of networks that are not trained."""
        return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[self.precision]

    def building(self, pretrained: bool) -> contextlib.AbstractContextManager[None]:
        """The context in which a network is built. Under ZeRO-3, pretrained weights are sharded as they are read."""
        return built_whole(self.accelerator) if self.kind == "zero3" and not pretrained else contextlib.nullcontext()

    def prepare(self, model: PreTrainedModel, optim: OptimSection) -> None:
        """Wrap the network and build its optimizer."""
        if optim.name == "adafactor" and self.kind not in ("single", "ddp"):
            raise RecipeError(
                "optim.name: adafactor factors its state by rows and columns, which shards do not have; use adamw "
                f"under {self.kind}, or adafactor without sharding"
            )
        offload = (self.deepspeed_config or {}).get("zero_optimization", {}).get("offload_optimizer", {})
        if offload.get("device", "none") != "none" and optim.name != "adamw":
            # Accelerate would put Adam in its place and not say so.
            raise RecipeError(f"optim.name: {optim.name} cannot be offloaded by DeepSpeed; use adamw, or no offload")
        self.model, self.optim = model, optim
        self.parameter_count = sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters())
        optimizer = build_optimizer(parameter_groups(model.named_parameters(), optim), optim, self.device)
        spread = Zero if self.kind.startswith("zero") else Fsdp2 if self.kind == "fsdp2" else Whole
        self.backend: Backend = spread(self.accelerator, model, LossModule(model), optimizer)

    def prepare_frozen(self, model: PreTrainedModel) -> FrozenNetwork:
        return FrozenNetwork(model.to(self.device))

    @property
    def frozen_parameter_count(self) -> int:
        return sum(p.numel() for p in self.model.parameters() if not p.requires_grad)

    @property
    def module(self) -> torch.nn.Module:
        return self.backend.module

    # --- one update -------------------------------------------------------------------------------------------------

    def forward(self, call: Callable[..., Any], inputs: dict[str, torch.Tensor]) -> Any:
        """call(network, inputs) on the device; what `call` returns, a named tuple as a plain one."""
        return self.module({key: x.to(self.device, non_blocking=True) for key, x in inputs.items()}, call)

    def micro_batch(self, last: bool) -> contextlib.AbstractContextManager[None]:
        """Around one forward and backward; gradients are exchanged in the `last` of an update only."""
        return self.backend.micro_batch(last)

    def backward(self, loss: torch.Tensor) -> None:
        self.backend.backward(loss)

    def clip_gradients(self) -> torch.Tensor | None:
        """The gradient's global 2-norm before clipping; None under DeepSpeed, where `step` tells it."""
        limit = self.optim.max_grad_norm
        return self.backend.clip(float("inf") if limit is None else limit)

    def step(self, lr: float) -> float | None:
        """Move the weights at rate `lr` and clear the gradients; under DeepSpeed, return the gradient's norm."""
        set_lr(self.backend.optimizer, lr)
        return self.backend.step()

    def warm_up(self, call: Callable[..., Any], inputs: dict[str, torch.Tensor]) -> None:
        """One forward and backward that changes nothing.

        DDP rearranges its buckets after its first backward, which changes the order of additions for three ranks or
        more: without this, a resumed run would differ in the last bit. It also meets out-of-memory errors early.
        """
        if self.kind.startswith("zero"):
            return
        with self.micro_batch(last=True):
            self.backend.warm_up_backward(self.forward(call, inputs)[0].sum())

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """Evaluation mode without gradients; training mode afterwards."""
        self.module.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self.module.train()

    def seed(self, seed: int, step: int, micro_step: int) -> None:
        """Random numbers (dropout) of a micro-batch as a function of its place: there is no generator state to save."""
        torch.manual_seed(_mix_seed(seed, step, self.rank, micro_step))

    # --- collectives ------------------------------------------------------------------------------------------------

    def all_sum(self, *values: float | torch.Tensor) -> torch.Tensor:
        """Sums over ranks, fp64 [len(values)], left on the device: reading them is the caller's host sync."""
        on_device = [v.detach().double().reshape(()) for v in values if isinstance(v, torch.Tensor)]
        plain = torch.tensor([v for v in values if not isinstance(v, torch.Tensor)], dtype=torch.float64)
        plain = plain.to(self.device, non_blocking=True)
        tensors, numbers = iter(on_device), iter(plain)
        total = torch.stack([next(tensors) if isinstance(v, torch.Tensor) else next(numbers) for v in values])
        if self.world_size > 1:
            dist.all_reduce(total)
        return total

    def gather_objects(self, value: Any) -> list[Any]:
        """`value` of every rank, on every rank."""
        if self.world_size == 1:
            return [value]
        gathered: list[Any] = [None] * self.world_size
        dist.all_gather_object(gathered, value)
        return gathered

    def gather_on_main(self, value: Any) -> list[Any]:
        """`value` of every rank, on rank 0; an empty list on the others."""
        if self.world_size == 1:
            return [value]
        gathered: list[Any] = [None] * self.world_size if self.is_main else []
        dist.gather_object(value, gathered if self.is_main else None)
        return gathered

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier()

    def close(self) -> None:
        """Leave the process group. A process that had one should then end by os._exit.

        gloo's destructor joins its threads while it holds Python's lock. A thread that just wants that lock, to forget
        the tensor of the last barrier, never ends (one run of 300 on a busy CPU). So nothing is destroyed here.
        """
        if dist.is_initialized():
            _LEFT_BEHIND.extend((self, dist.group.WORLD))
            dist.destroy_process_group()

    # --- state ------------------------------------------------------------------------------------------------------

    def save_state(self, folder: Path) -> None:
        """Weights and optimizer, exactly. All ranks call it; which of them write is the backend's affair."""
        self.backend.save(folder)

    def load_state(self, folder: Path) -> None:
        """The inverse of save_state. The caller has checked the files' hashes: DeepSpeed's are pickles."""
        self.backend.load(folder)

    def peak_memory_bytes(self) -> int:
        """The most memory this process has held: the accelerator's, or the process's own on a CPU."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def state_bytes(self) -> int:
        """About how many bytes save_state writes on all ranks together: fp32 weights and two moments; ZeRO-1 and -2
        store the network beside their own fp32 copy. Rather more than less: see Checkpoints.commit."""
        each = (8 if self.optim.name == "sgd" else 12) + (4 if self.kind in ("zero1", "zero2") else 0)
        return each * self.parameter_count + 2**20

    def full_state_dict(self) -> dict[str, torch.Tensor]:
        """The whole network's weights by name on rank 0; elsewhere not to be used. All ranks call it."""
        return self.backend.full_state_dict()


def _accelerator(kind: str, mixed: str, deepspeed_config: dict[str, Any] | None, on_cpu: bool) -> Accelerator:
    group = InitProcessGroupKwargs(timeout=PROCESS_GROUP_TIMEOUT)
    if on_cpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed warns when it has to find out
    if kind in ("single", "ddp"):
        ddp = DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)
        return Accelerator(mixed_precision=mixed, cpu=on_cpu, kwargs_handlers=[ddp, group])
    if on_cpu:
        _sharded_on_cpu(kind)
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


def _sharded_on_cpu(kind: str) -> None:
    """Make Accelerate shard without a GPU: it otherwise believes every rank alone, or trains without sharding."""
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


def complete_deepspeed_config(
    knobs: dict[str, Any], precision: Precision, max_grad_norm: float | None, micro_size: int, accumulation: int
) -> dict[str, Any]:
    """A DeepSpeed config that holds ZeRO knobs only, completed with what the recipe says.

    DeepSpeed divides gradients by the accumulation count; the engine switches that off, and the count only tells
    DeepSpeed to keep buffers for accumulated gradients: hence never 1.
    """
    zero = {**knobs["zero_optimization"], "stage3_gather_16bit_weights_on_model_save": True}
    return {
        **knobs,
        "zero_optimization": zero,
        "train_micro_batch_size_per_gpu": micro_size,
        "gradient_accumulation_steps": max(2, accumulation),
        "gradient_clipping": 0.0 if max_grad_norm is None else max_grad_norm,
        "bf16": {"enabled": precision == "bf16"},
        "fp16": {"enabled": precision == "fp16"},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2**62,
    }


def _mix_seed(*numbers: int) -> int:
    """One 63-bit seed from several numbers; near inputs give far outputs."""
    mixed = 0x9E3779B97F4A7C15
    for number in numbers:
        mixed = ((mixed ^ (number & (2**64 - 1))) * 0xBF58476D1CE4E5B9) % 2**64
        mixed ^= mixed >> 31
    return mixed >> 1


def reset_accelerate() -> None:
    """Forget Accelerate's process-wide state, so that one process can hold several engines one after the other."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
