"""The only file that speaks Accelerate and DeepSpeed: processes, precision, backward, step, collectives, sharded state.

Rules that hold here, and the reason for each:
- Only the network and the optimizer are prepared. Accelerate's schedulers step once per process and its loaders move
  the accumulation boundary; order, schedule, random numbers and retention are ours.
- Accelerate and DeepSpeed divide the loss by an accumulation count that they assume constant. Both divisions are
  switched off; the caller scales by world_size / total, since data parallelism averages gradients over processes.
- DeepSpeed is stepped by hand, after every rank has agreed that the loss is finite.
"""

from __future__ import annotations

import contextlib
import copy
import json
import logging
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
from safetensors.torch import load_file, load_model, save_file, save_model
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel
from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config

from ptft_dist.config.recipe import OptimSection
from ptft_dist.errors import RecipeError
from ptft_dist.optim import build_optimizer, parameter_groups, set_lr

Precision = Literal["fp32", "bf16", "fp16"]
MIXED_PRECISION = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}
# Collectives wait for work of other ranks (a save, an evaluation), never for CPU work such as tokenization.
PROCESS_GROUP_TIMEOUT = timedelta(minutes=30)


class LossModule(torch.nn.Module):
    """The network inside one module whose forward runs any function of it, so that data-parallel hooks see it."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model
        self.config = getattr(model, "config", None)  # DeepSpeed's "auto" bucket sizes read it

    def forward(self, inputs: dict[str, torch.Tensor], call: Callable[..., Any]) -> Any:
        out = call(self.model, inputs)
        return tuple(out) if isinstance(out, tuple) else out


class Engine:
    """One rank's view of the machine. Construction forms the process group; `prepare` takes network and optimizer.

    kind is "single", "ddp", "zero1", "zero2" or "zero3"; state of the first two is whole on every rank, DeepSpeed's is
    sharded and belongs to its world size.
    """

    def __init__(self, precision: Precision, deepspeed_config: dict[str, Any] | None) -> None:
        self.precision = precision
        on_cpu = not torch.accelerator.is_available() or os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true"
        if precision == "fp16" and on_cpu:
            raise RecipeError("train.precision: fp16 needs a GPU; on a CPU use fp32 or bf16")
        if on_cpu:
            os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed warns when it has to find out
        self.deepspeed_config = deepspeed_config
        mixed = MIXED_PRECISION[precision]
        group = InitProcessGroupKwargs(timeout=PROCESS_GROUP_TIMEOUT)
        if deepspeed_config is None:
            ddp = DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)
            self.accelerator = Accelerator(mixed_precision=mixed, cpu=on_cpu, kwargs_handlers=[ddp, group])
        else:
            if on_cpu:
                _deepspeed_on_cpu()
            plugin = DeepSpeedPlugin(hf_ds_config=deepspeed_config)
            self.accelerator = Accelerator(
                mixed_precision=mixed,
                deepspeed_plugin=plugin,
                gradient_accumulation_steps=deepspeed_config["gradient_accumulation_steps"],
                kwargs_handlers=[group],
            )
            if self.accelerator.distributed_type != DistributedType.DEEPSPEED:
                raise RuntimeError("Accelerate did not take the DeepSpeed config: this run would not be sharded")
        self.rank, self.world_size = self.accelerator.process_index, self.accelerator.num_processes
        self.device = self.accelerator.device
        self.is_main = self.rank == 0
        if deepspeed_config is not None:
            self.kind = f"zero{deepspeed_config['zero_optimization']['stage']}"
        else:
            self.kind = "single" if self.world_size == 1 else "ddp"
        expected = int(os.environ.get("WORLD_SIZE", "1"))
        if self.world_size != expected:
            raise RuntimeError(f"the launcher started {expected} processes, but this one sees {self.world_size}")

    @contextlib.contextmanager
    def building(self, pretrained: bool) -> Iterator[None]:
        """The context in which a network is built: under ZeRO-3, pretrained weights are sharded as they are read.

        A network with random weights is built whole, so that it starts from the same weights as on any machine.
        """
        if self.kind != "zero3" or pretrained:
            yield
            return
        # transformers shards at construction when it finds a ZeRO-3 config in this module's global, whatever
        # Accelerate's zero3_init_flag says.
        plugin = self.accelerator.state.deepspeed_plugin
        unset_hf_deepspeed_config()
        try:
            yield
        finally:
            set_hf_deepspeed_config(plugin.dschf)

    def prepare(self, model: PreTrainedModel, optim: OptimSection) -> None:
        """Wrap the network and build its optimizer."""
        self.model, self.optim = model, optim
        module = LossModule(model)
        self.parameter_count = sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters())
        if self.sharded and optim.name == "adafactor":
            raise RecipeError(
                "optim.name: adafactor factors its state by rows and columns, which ZeRO's flat shards do not have; "
                "use adamw under ZeRO, or adafactor without it"
            )
        groups = parameter_groups(model.named_parameters(), optim)
        if not self.sharded:
            module.to(self.device)
        optimizer = build_optimizer(groups, optim, self.device)
        self.module, self.optimizer = self.accelerator.prepare(module, optimizer)
        if self.sharded and type(self.module).__name__ != "DeepSpeedEngine":
            raise RuntimeError(f"DeepSpeed was asked for, but the network became a {type(self.module).__name__}")

    @property
    def sharded(self) -> bool:
        return self.deepspeed_config is not None

    # --- one update -------------------------------------------------------------------------------------------------

    def to_device(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {key: x.to(self.device, non_blocking=True) for key, x in inputs.items()}

    def forward(self, call: Callable[..., Any], inputs: dict[str, torch.Tensor]) -> Any:
        return self.module(self.to_device(inputs), call)

    @contextlib.contextmanager
    def micro_batch(self, last: bool) -> Iterator[None]:
        """Around one forward and backward; gradients are exchanged in the `last` of an update only."""
        if self.sharded:
            self.module.set_gradient_accumulation_boundary(last)
            yield
        elif isinstance(self.module, DistributedDataParallel) and not last:
            with self.module.no_sync():
                yield
        else:
            yield

    def backward(self, loss: torch.Tensor) -> None:
        if self.sharded:
            self.module.backward(loss, scale_wrt_gas=False)
        elif self.accelerator.scaler is not None:
            self.accelerator.scaler.scale(loss).backward()
        else:
            loss.backward()

    def clip_gradients(self) -> torch.Tensor | None:
        """The gradient's global 2-norm before clipping; None under DeepSpeed, which knows it after `step` only."""
        if self.sharded:
            return None
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.unscale_(self.optimizer.optimizer)
        limit = self.optim.max_grad_norm
        return torch.nn.utils.clip_grad_norm_(self.model.parameters(), float("inf") if limit is None else limit)

    def step(self, lr: float) -> float | None:
        """Move the weights at rate `lr` and clear the gradients; under DeepSpeed, return the gradient's norm."""
        set_lr(self.optimizer, lr)
        if self.sharded:
            self.module.step()
            norm = self.module.get_global_grad_norm()
            return None if norm is None else float(norm)
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.step(self.optimizer.optimizer)
            self.accelerator.scaler.update()
        else:
            self.optimizer.optimizer.step()
        self.optimizer.optimizer.zero_grad(set_to_none=True)
        return None

    def warm_up(self, call: Callable[..., Any], inputs: dict[str, torch.Tensor]) -> None:
        """One forward and backward that changes nothing.

        DDP rearranges its buckets after its first backward, which changes the order of additions for three ranks or
        more: without this, a resumed run would differ in the last bit. It also meets out-of-memory errors early.
        """
        if self.sharded:
            return
        with self.micro_batch(last=True):
            loss = self.forward(call, inputs)[0]
            (loss * 0.0).backward()
        self.optimizer.optimizer.zero_grad(set_to_none=True)

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

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier()

    def close(self) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()

    # --- state ------------------------------------------------------------------------------------------------------

    def save_state(self, folder: Path) -> None:
        """Weights and optimizer, exactly. Whole state is written by rank 0, shards by their owners."""
        if self.sharded:
            with _quiet_deepspeed():
                self.module.save_checkpoint(str(folder), tag="deepspeed", save_latest=False)
            return
        if not self.is_main:
            return
        save_model(self.model, str(folder / "model.safetensors"))
        tensors, rest = flatten_optimizer(self.optimizer.optimizer.state_dict())
        save_file(tensors, str(folder / "optimizer.safetensors"))
        if self.accelerator.scaler is not None:
            rest["scaler"] = self.accelerator.scaler.state_dict()
        (folder / "optimizer.json").write_text(json.dumps(rest))

    def load_state(self, folder: Path) -> None:
        """The inverse of save_state. The caller has checked the files' hashes: DeepSpeed's are pickles."""
        if self.sharded:
            with _quiet_deepspeed():
                path, _ = self.module.load_checkpoint(str(folder), tag="deepspeed")
            if path is None:
                raise RuntimeError(f"DeepSpeed found nothing to load in {folder}")
            return
        device = "cpu" if self.device.type == "cpu" else str(self.device)
        load_model(self.model, folder / "model.safetensors", strict=True, device=device)
        rest = json.loads((folder / "optimizer.json").read_text())
        tensors = load_file(folder / "optimizer.safetensors", device=device)
        self.optimizer.optimizer.load_state_dict(unflatten_optimizer(tensors, rest))
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(rest["scaler"])

    def peak_memory_bytes(self) -> int:
        """The most memory this process has held: the accelerator's, or the process's own on a CPU."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def state_bytes(self) -> int:
        """About how many bytes save_state writes on all ranks together (fp32 weights and two moments)."""
        return 12 * self.parameter_count if self.optim.name != "sgd" else 8 * self.parameter_count

    def save_pretrained(self, folder: Path) -> None:
        """A plain Hugging Face model directory, gathered from all shards, written by rank 0."""
        state = self.accelerator.get_state_dict(self.module) if self.sharded else self.module.state_dict()
        if not self.is_main:
            return
        assert state is not None
        prefix = "module.model." if self.kind == "ddp" else "model."
        named = {key.removeprefix(prefix): value for key, value in state.items()}
        config, use_cache = copy.deepcopy(self.model.config), self.model.config.use_cache
        self.model.config.use_cache = True
        try:
            self.model.save_pretrained(folder, state_dict=named)
        finally:
            self.model.config = config
            self.model.config.use_cache = use_cache


def _mix_seed(*numbers: int) -> int:
    """One 63-bit seed from several numbers; near inputs give far outputs."""
    mixed = 0x9E3779B97F4A7C15
    for number in numbers:
        mixed = ((mixed ^ (number & (2**64 - 1))) * 0xBF58476D1CE4E5B9) % 2**64
        mixed ^= mixed >> 31
    return mixed >> 1


def _deepspeed_on_cpu() -> None:
    """Make Accelerate run DeepSpeed without a GPU: it otherwise believes every rank alone, or trains without ZeRO."""
    import deepspeed

    state = PartialState(cpu=True)
    state.distributed_type = DistributedType.DEEPSPEED
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False, verbose=False)


@contextlib.contextmanager
def _quiet_deepspeed() -> Iterator[None]:
    """DeepSpeed logs each file it opens; errors still come as exceptions."""
    logger = logging.getLogger("DeepSpeed")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)


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


def flatten_optimizer(state: dict[str, Any]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """An optimizer's state dict as named tensors ("<parameter>.<key>") and JSON, so that no pickle is needed."""
    tensors: dict[str, torch.Tensor] = {}
    plain: dict[str, dict[str, Any]] = {}
    for index, entries in state["state"].items():
        for key, value in entries.items():
            if isinstance(value, torch.Tensor):
                tensors[f"{index}.{key}"] = value.detach().contiguous()
            else:
                plain.setdefault(str(index), {})[key] = value
    return tensors, {"state": plain, "param_groups": state["param_groups"]}


def unflatten_optimizer(tensors: dict[str, torch.Tensor], rest: dict[str, Any]) -> dict[str, Any]:
    """The inverse of flatten_optimizer."""
    state: dict[int, dict[str, Any]] = {int(index): dict(values) for index, values in rest["state"].items()}
    for name, tensor in tensors.items():
        index, key = name.split(".", 1)
        state.setdefault(int(index), {})[key] = tensor
    return {"state": state, "param_groups": rest["param_groups"]}


def reset_accelerate() -> None:
    """Forget Accelerate's process-wide state, so that one process can hold several engines one after the other."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
