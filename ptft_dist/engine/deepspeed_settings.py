"""The DeepSpeed config that is passed to DeepSpeed: what the launch config says, completed from the recipe."""

from __future__ import annotations

from typing import Any, Literal

import torch

Precision = Literal["fp32", "bf16", "fp16"]


def complete_deepspeed_config(
    launch_config: dict[str, Any],
    precision: Precision,
    max_grad_norm: float | None,
    micro_size: int,
    accumulation: int,
) -> dict[str, Any]:
    """The DeepSpeed config of the trained network.

    launch_config: ZeRO settings only. max_grad_norm None: gradients are not clipped.

    DeepSpeed divides gradients by the accumulation count; the engine switches that off. The count only makes DeepSpeed
    keep buffers for accumulated gradients: hence never 1.
    """
    zero = {**launch_config["zero_optimization"], "stage3_gather_16bit_weights_on_model_save": True}
    return {
        **launch_config,
        "zero_optimization": zero,
        "train_micro_batch_size_per_gpu": micro_size,
        "gradient_accumulation_steps": max(2, accumulation),
        "gradient_clipping": 0.0 if max_grad_norm is None else max_grad_norm,
        "bf16": {"enabled": precision == "bf16"},
        "fp16": {"enabled": precision == "fp16"},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2**62,
    }


def frozen_deepspeed_config(trained: dict[str, Any], hidden_size: int, dtype: torch.dtype) -> dict[str, Any]:
    """The DeepSpeed config of a network that is read but not trained, from that of the trained network under ZeRO-3.

    hidden_size: of the frozen network; "auto" sizes follow from it as they do in Accelerate.
    """
    zero = dict(trained["zero_optimization"])
    zero.pop("offload_optimizer", None)  # there is none
    sizes = {
        "reduce_bucket_size": hidden_size * hidden_size,
        "stage3_prefetch_bucket_size": int(0.9 * hidden_size * hidden_size),
        "stage3_param_persistence_threshold": 10 * hidden_size,
    }
    zero |= {key: size for key, size in sizes.items() if zero.get(key, "auto") == "auto"}
    return {
        "zero_optimization": zero,
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": dtype == torch.bfloat16},
        "fp16": {"enabled": dtype == torch.float16},
        "steps_per_print": 2**62,
    }
