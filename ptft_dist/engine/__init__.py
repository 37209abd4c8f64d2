"""The only package that calls Accelerate and DeepSpeed: processes, precision, backward, step, collectives, state.

Rules of this package, and their reasons:
- Only the network and the optimizer are passed to `prepare`. Accelerate's schedulers step once per process, and its
  data loaders change the accumulation boundary. Order, schedule, random numbers and retention are implemented by ptft.
- Accelerate and DeepSpeed divide the loss by an accumulation count that they assume constant. Both divisions are
  disabled. The caller scales by world_size / total, because data parallelism averages gradients over processes.
- The weights are updated only after all ranks know that the loss is finite on every rank.
"""

from __future__ import annotations

import contextlib
import os
import resource
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import PreTrainedModel
from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config

from ptft_dist.config.recipe import OptimSection
from ptft_dist.engine.backends import backend_class, why_not_loadable
from ptft_dist.engine.deepspeed_settings import Precision, complete_deepspeed_config
from ptft_dist.engine.frozen import FrozenNetwork, place_frozen
from ptft_dist.engine.loss_module import LossModule
from ptft_dist.engine.machines import Loss, Machines, watch_machines
from ptft_dist.engine.optim import BITSANDBYTES, build_optimizer, moment_bytes, parameter_groups, set_lr
from ptft_dist.engine.parameters import (
    element_counts,
    first_names,
    real_shape,
    require_tied,
    tied_groups,
    trainable_names,
)
from ptft_dist.engine.processes import (
    PROCESS_GROUP_TIMEOUT,
    STORE_GONE,
    UPDATE_TIMEOUT,
    announce_failure,
    first_failure,
    make_accelerator,
    planned_kind,
    reset_accelerate,
    set_collective_timeout,
)
from ptft_dist.engine.regularizer import Regularizer, penalty_and_gradient
from ptft_dist.engine.saved import SavedState
from ptft_dist.engine.state import Files
from ptft_dist.engine.weight_rule import WeightRule
from ptft_dist.errors import RecipeError

__all__ = [
    "STORE_GONE",
    "Engine",
    "FrozenNetwork",
    "Loss",
    "Machines",
    "Precision",
    "SavedState",
    "announce_failure",
    "complete_deepspeed_config",
    "first_failure",
    "planned_kind",
    "reset_accelerate",
    "watch_machines",
    "why_not_loadable",
]

MIXED_PRECISION = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}
_LEFT_BEHIND: list[Any] = []  # references that keep a closed process group alive; see Engine.close


class Engine:
    """One rank's engine. Its constructor forms the process group; `prepare` wraps the network and its optimizer."""

    def __init__(self, precision: Precision, deepspeed_config: dict[str, Any] | None) -> None:
        """deepspeed_config: complete (see complete_deepspeed_config), or None without DeepSpeed."""
        self.precision, expected = precision, int(os.environ.get("WORLD_SIZE", "1"))
        self.kind, self.deepspeed_config = planned_kind(expected, deepspeed_config), deepspeed_config
        on_cpu = not torch.accelerator.is_available() or os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true"
        if precision == "fp16" and (on_cpu or self.kind == "fsdp2"):
            raise RecipeError("train.precision: fp16 needs a GPU, and not FSDP2; use fp32 or bf16")
        self.accelerator = make_accelerator(self.kind, MIXED_PRECISION[precision], deepspeed_config, on_cpu)
        self.rank, self.world_size = self.accelerator.process_index, self.accelerator.num_processes
        # Every process is a data-parallel rank with its own rows, because only data parallelism is supported.
        self.dp_rank, self.dp_size = self.rank, self.world_size
        self.device = self.accelerator.device
        self.is_main, self._first_update = self.rank == 0, True
        self._reader: FrozenNetwork | None = None
        self.regularizers: list[Regularizer] = []
        self.rule: WeightRule | None = None
        if self.world_size != expected:
            raise RuntimeError(f"the launcher started {expected} processes, but this one sees {self.world_size}")

    @property
    def dtype(self) -> torch.dtype:
        """The data type of frozen networks."""
        return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[self.precision]

    @property
    def trained_dtype(self) -> torch.dtype:
        """The data type of trained parameters: fp32; under DeepSpeed that of the precision, with fp32 copies."""
        return self.dtype if self.kind.startswith("zero") else torch.float32

    @contextlib.contextmanager
    def building(self, pretrained: bool) -> Iterator[None]:
        """The context in which a network is built. Under ZeRO-3, pretrained weights are sharded while they are read.

        A network with random weights is built unsharded, so that its weights are the same as without sharding.
        transformers shards at construction if a module's global variable has a ZeRO-3 config, regardless of
        Accelerate's zero3_init_flag. So this variable is unset meanwhile.
        """
        if pretrained or self.kind != "zero3":
            yield
            return
        unset_hf_deepspeed_config()
        try:
            yield
        finally:
            set_hf_deepspeed_config(self.accelerator.state.deepspeed_plugin.dschf)

    @contextlib.contextmanager
    def whole(self, parameters: Sequence[torch.nn.Parameter]) -> Iterator[None]:
        """A context in which parameters that were sharded while they were read are whole, and may be changed; every
        rank must make the same changes."""
        sharded = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
        if not sharded:
            yield
            return
        from ptft_dist.engine.zero import gathered

        with gathered(sharded):
            yield

    def prepare(
        self,
        model: PreTrainedModel,
        optim: OptimSection,
        tell: Callable[[str], None] = lambda _text: None,
        scales: Mapping[str, float] | None = None,
    ) -> None:
        """Wrap the network, and build an optimizer for its parameters that require gradients.

        Args:
            tell: called with messages about the optimizer.
            scales: parameter name -> factor of its learning rate.

        Raises:
            RecipeError: the optimizer does not support this backend, or a library has untied tied parameters.
        """
        self._check_optimizer(optim)
        self.model, self.optim = model, optim
        self.trainable_names, ties = trainable_names(model), tied_groups(model)
        self.parameter_count, self.trained_count = element_counts(model)
        groups = parameter_groups(model.named_parameters(), optim, scales)
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        self.groups = [[names[id(parameter)] for parameter in group["params"]] for group in groups]
        optimizer = build_optimizer(groups, optim, self.device, tell)
        self.backend = backend_class(self.kind)(self.accelerator, model, LossModule(model), optimizer)
        require_tied(model, ties, self.kind)

    def _check_optimizer(self, optim: OptimSection) -> None:
        if optim.name == "adafactor" and self.kind not in ("single", "ddp"):
            raise RecipeError(
                "optim.name: adafactor needs complete weight matrices, but shards are parts of them; use adamw under "
                f"{self.kind}, or adafactor without sharding"
            )
        if self.kind == "fsdp2" and optim.name in BITSANDBYTES:
            raise RecipeError(f"optim.name: {optim.name} cannot update the shards of fsdp2; use adamw, DDP or ZeRO")
        offload = (self.deepspeed_config or {}).get("zero_optimization", {}).get("offload_optimizer", {})
        if offload.get("device", "none") != "none" and optim.name != "adamw":
            # Accelerate would silently replace it by Adam.
            raise RecipeError(f"optim.name: {optim.name} cannot be offloaded by DeepSpeed; use adamw, or no offload")

    def regularize_with(self, regularizer: Regularizer, key: str) -> None:
        """Add a penalty on trained parameters to the loss of every update. Raises RecipeError in fp16.

        key: the recipe's key that asks for it, for messages.
        """
        if self.precision == "fp16":
            raise RecipeError(f"{key}: its gradient is not scaled as fp16 needs; use train.precision: bf16 or fp32")
        self.regularizers.append(regularizer)

    def change_after_each_step(self, rule: WeightRule) -> None:
        """Let `rule` change trained parameters after each update. Not in fp16, whose updates can be left out."""
        assert self.precision != "fp16"
        self.rule = rule

    def prepare_frozen(self, model: PreTrainedModel, *, offload: bool = False) -> FrozenNetwork:
        """Place a frozen network in evaluation mode. Its data type does not change.

        It is complete on the device of each rank, or with `offload` in the host's memory; sharded under ZeRO-3 and
        FSDP2. All ranks must call this method and the network together. Call `prepare` first.
        """
        return place_frozen(model, self.kind, self.accelerator, self.deepspeed_config, offload=offload)

    def prepare_reading(self, model: PreTrainedModel) -> None:
        """Place the engine's network for evaluation only, without an optimizer. Enables `forward` and `evaluating`."""
        self.model, self._reader = model, self.prepare_frozen(model)

    @property
    def module(self) -> torch.nn.Module:
        return self.backend.module if self._reader is None else self._reader.module

    # --- one update -------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def updating(self) -> Iterator[None]:
        """The context of one update: its collectives have the shorter UPDATE_TIMEOUT, to detect a dead rank early.

        Evaluations, saves and the first update of a process have PROCESS_GROUP_TIMEOUT, because they can take long. The
        first update compiles kernels and sets up communicators.
        """
        if self.world_size == 1 or self._first_update:
            yield
            self._first_update = False
            return
        set_collective_timeout(UPDATE_TIMEOUT)
        yield
        set_collective_timeout(PROCESS_GROUP_TIMEOUT)

    def forward(self, call: Callable[..., Any], inputs: dict[str, torch.Tensor]) -> Any:
        """Return call(network, inputs) with the inputs on the device. A named tuple becomes a plain tuple."""
        return self.module({key: x.to(self.device, non_blocking=True) for key, x in inputs.items()}, call)

    def micro_batch(self, last: bool) -> contextlib.AbstractContextManager[None]:
        """The context of one forward and backward pass. Gradients are reduced in the `last` one of an update only."""
        return self.backend.micro_batch(last)

    def backward(self, loss: torch.Tensor) -> None:
        self.backend.backward(loss)

    def regularize(self) -> torch.Tensor | None:
        """Add the gradients of the regularizers, after the last backward pass; return the penalty, fp32, or None."""
        if not self.regularizers:
            return None
        total = torch.zeros((), device=self.device)
        for name, parameter in self.model.named_parameters():
            if not parameter.requires_grad:
                continue
            whole = self.backend.whole_weight(parameter)
            if (found := penalty_and_gradient(self.regularizers, name, whole)) is not None:
                total += found[0]
                self.backend.add_gradient(parameter, found[1])
        return total

    def clip_gradients(self) -> torch.Tensor | None:
        """Clip the gradients and return their global 2-norm before clipping; None under DeepSpeed, see `step`."""
        limit = self.optim.max_grad_norm
        return self.backend.clip(float("inf") if limit is None else limit)

    def step(self, lr: float) -> float | None:
        """Update the weights with learning rate `lr` and clear the gradients. DeepSpeed also clips; return its norm."""
        set_lr(self.backend.optimizer, lr)
        return self.backend.step() if self.rule is None else self._step_and_change(self.rule)

    def _step_and_change(self, rule: WeightRule) -> float | None:
        parameters = {name: each for name, each in self.model.named_parameters() if name in rule.names}
        gradients = {name: self.backend.whole_gradient(each) for name, each in parameters.items()}
        norm, limit = self.backend.step(), self.optim.max_grad_norm
        if norm is not None and limit is not None:  # DeepSpeed clipped during the step
            factor = min(1.0, limit / (norm + 1e-6))
            gradients = {name: gradient * factor for name, gradient in gradients.items()}
        weights = {name: self.backend.whole_weight(each) for name, each in parameters.items()}
        for name, value in rule.after_step(weights, gradients).items():
            self.backend.set_weight(parameters[name], value)
        return norm

    def warm_up(self, call: Callable[..., Any], inputs: dict[str, torch.Tensor]) -> None:
        """Run one forward and backward pass without an update.

        DDP rebuilds its buckets after its first backward pass. With three or more ranks this changes the order of
        summation, so without this method a resumed run would differ in the last bit. It also makes out-of-memory errors
        occur at the start.
        """
        if self.kind.startswith("zero"):
            return
        again = True
        while again:
            with self.micro_batch(last=True):
                again = self.backend.warm_up_backward(self.forward(call, inputs)[0].sum())

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """Evaluation mode without gradients; training mode afterwards."""
        self.module.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self.module.train()

    @contextlib.contextmanager
    def generating(self) -> Iterator[None]:
        """As `evaluating`, with the complete weights on every rank, so that ranks may call the network independently.

        Under ZeRO-3 and FSDP2 the weights are gathered when this context begins and released when it ends, whatever
        happens. All ranks must enter and leave it together.
        """
        with self.evaluating(), self.backend.whole_weights():
            yield

    def seed(self, seed: int, step: int, micro_step: int) -> None:
        """Seed the random numbers of a micro-batch (dropout) by its position, so that no generator state is saved."""
        number = _mix_seed(seed, step, self.rank, micro_step)
        torch.default_generator.manual_seed(number)
        if self.device.type != "cpu":  # torch.manual_seed takes milliseconds for kinds of devices that are not used
            torch.get_device_module(self.device).manual_seed(number)

    # --- collectives ------------------------------------------------------------------------------------------------

    def all_sum(self, *values: float | torch.Tensor) -> torch.Tensor:
        """Sums over ranks, fp64 [len(values)], on the device. Reading them synchronizes host and device."""
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
        """Leave the process group. The process should then end with os._exit.

        gloo's destructor joins its threads while it holds the GIL. A thread that waits for the GIL, to release the
        tensor of the last barrier, never ends (one of 300 runs on a busy CPU). So the group object is kept alive.
        """
        if dist.is_initialized():
            _LEFT_BEHIND.extend((self, dist.group.WORLD))
            dist.destroy_process_group()

    # --- state ------------------------------------------------------------------------------------------------------

    def save_state(self, folder: Path) -> Files:
        """Write the trained parameters, the buffers and the optimizer without loss. All ranks must call it.

        Returns size and SHA-256 of the files that this rank hashed while writing; there may be other files.
        """
        return self.backend.save(folder)

    def load_state(self, folder: Path) -> None:
        """Load the files of save_state, whose hashes were verified. Raises CheckpointError if they contain other
        parameters than those that this run trains, or code."""
        groups = self.backend.optimizer.param_groups
        own = [{key: value for key, value in group.items() if key not in ("params", "step")} for group in groups]
        self.backend.load(folder)
        # Libraries restore the hyperparameters too, but those of the recipe count: `--accept` lets them change.
        for group, values in zip(self.backend.optimizer.param_groups, own, strict=True):
            group.update(values)

    def peak_memory_bytes(self) -> int:
        """Peak memory of this process: on the accelerator, or the resident memory on a CPU."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def state_bytes(self) -> int:
        """An upper bound of what save_state writes on all ranks together; see Checkpoints.commit.

        That is fp32 weights and the optimizer's moments of the trained parameters. ZeRO-1 and ZeRO-2 also store the
        network in addition to their fp32 copy.
        """
        each = 8 if self.kind in ("zero1", "zero2") else 4
        shapes = [real_shape(parameter) for parameter in self.model.parameters() if parameter.requires_grad]
        return each * self.trained_count + moment_bytes(self.optim, shapes) + 2**20

    def full_state_dict(self) -> dict[str, torch.Tensor]:
        """All weights by name on rank 0; undefined on other ranks. All ranks must call it.

        The names of a tied parameter have one tensor, as in an unsharded network, so that an export writes it once.
        """
        state = self.backend.full_state_dict()
        first = first_names(self.model)
        return {name: state.get(first.get(name, name), tensor) for name, tensor in state.items()}

    def trained_state_dict(self) -> dict[str, torch.Tensor]:
        """Trained parameters and buffers by name on rank 0; undefined on other ranks. All ranks must call it."""
        return self.backend.trained_state_dict()


def _mix_seed(*numbers: int) -> int:
    """Hash several numbers to one 63-bit seed."""
    mixed = 0x9E3779B97F4A7C15
    for number in numbers:
        mixed = ((mixed ^ (number & (2**64 - 1))) * 0xBF58476D1CE4E5B9) % 2**64
        mixed ^= mixed >> 31
    return mixed >> 1
