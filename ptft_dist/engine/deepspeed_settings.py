"""The config that is passed to DeepSpeed: that of the launch config, completed with values of the recipe."""

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

    The accumulation count is at least 2, so that DeepSpeed allocates buffers for accumulated gradients. It has no other
    effect, because the engine disables the division of gradients by it.

    Args:
        launch_config: ZeRO settings only.
        max_grad_norm: None: gradients are not clipped.
    """
    return {
        **launch_config,
        "train_micro_batch_size_per_gpu": micro_size,
        "gradient_accumulation_steps": max(2, accumulation),
        "gradient_clipping": 0.0 if max_grad_norm is None else max_grad_norm,
        "bf16": {"enabled": precision == "bf16"},
        "fp16": {"enabled": precision == "fp16"},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2**62,
    }


def frozen_deepspeed_config(trained: dict[str, Any], hidden_size: int, dtype: torch.dtype) -> dict[str, Any]:
    """The DeepSpeed config of a frozen network, derived from that of the trained network under ZeRO-3.

    hidden_size: of the frozen network. "auto" sizes are computed from it as in Accelerate.
    """
    zero = dict(trained["zero_optimization"])
    zero.pop("offload_optimizer", None)  # a frozen network has no optimizer
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
