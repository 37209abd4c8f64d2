"""A DeepSpeed JSON may say how ZeRO works. What the recipe says (batches, precision, optimizer) it may not."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from ptft_dist.errors import RecipeError

# Key of the DeepSpeed config -> what says it instead.
RECIPE_SAYS = {
    "train_batch_size": "batch.global_size",
    "train_micro_batch_size_per_gpu": "batch.micro_size",
    "gradient_accumulation_steps": "batch.global_size and batch.micro_size",
    "gradient_clipping": "optim.max_grad_norm",
    "fp16": "train.precision",
    "bf16": "train.precision",
    "amp": "train.precision",
    "torch_autocast": "train.precision",
    "optimizer": "optim",
    "scheduler": "optim.schedule",
}


def read_deepspeed_config(path: Path) -> dict[str, Any]:
    """The ZeRO knobs in `path`, without the keys that are "auto". Raises RecipeError for keys that the recipe owns."""
    try:
        config = json.loads(path.read_text())
    except OSError as error:
        raise RecipeError(f"{path}: the DeepSpeed config cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise RecipeError(f"{path}: the DeepSpeed config is not JSON: {error}") from None
    if not isinstance(config, dict) or not isinstance(config.get("zero_optimization"), dict):
        raise RecipeError(f'{path}: a DeepSpeed config needs "zero_optimization": {{"stage": 1, 2 or 3}}')
    stage = config["zero_optimization"].get("stage")
    if stage not in (1, 2, 3):
        raise RecipeError(f"{path}: zero_optimization.stage is {stage!r}; it must be 1, 2 or 3")
    wrong = [f"{key} (the recipe's {says})" for key, says in RECIPE_SAYS.items() if not _is_auto(config.get(key))]
    if wrong:
        raise RecipeError(f'{path}: remove, or set to "auto", what the recipe decides: {", ".join(wrong)}')
    return {key: value for key, value in config.items() if key not in RECIPE_SAYS}


def _is_auto(value: Any) -> bool:
    if isinstance(value, dict):
        return all(_is_auto(inner) for inner in value.values())
    return value is None or value == "auto"


def deepspeed_config_of_launch() -> dict[str, Any] | None:
    """The DeepSpeed config that `accelerate launch` chose for this process; None without DeepSpeed."""
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() != "true":
        return None
    path = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "")
    if path in ("", "none"):
        raise RecipeError(
            "the launch config gives DeepSpeed settings inline; put them into a JSON file and name it with "
            "deepspeed_config_file, as launch_configs/zero2.yaml does"
        )
    return read_deepspeed_config(Path(path))
