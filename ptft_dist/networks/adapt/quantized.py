"""Quantization of the frozen weights with bitsandbytes, while they are loaded."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from ptft_dist.config.adapt import Quantization
from ptft_dist.errors import RecipeError
from ptft_dist.networks.load import DTYPES


def quantization_config(quantize: Quantization, precision: str, whole: list[str]) -> Any:
    """The transformers config for `from_pretrained`.

    Args:
        precision: train.precision, for compute_dtype: auto.
        whole: names of layers that are not quantized, because they may be trained: see `heads`.
    """
    from transformers import BitsAndBytesConfig

    if quantize.type == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=whole)
    compute = precision if quantize.compute_dtype == "auto" else quantize.compute_dtype
    storage = torch.uint8 if quantize.storage_dtype == "uint8" else DTYPES[quantize.storage_dtype]
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=quantize.double is not False,
        bnb_4bit_compute_dtype=DTYPES[compute],
        bnb_4bit_quant_storage=storage,
        llm_int8_skip_modules=whole,  # of both types, in spite of its name
    )


def heads(model: PreTrainedModel) -> list[str]:
    """The names of the layers outside of a network's body, and of poolers: they may be new."""
    outside = [name for name, _ in model.named_children() if name != model.base_model_prefix]
    return [*outside, "pooler"]


def keep_layout(model: torch.nn.Module) -> None:
    """Keep the layout of 4-bit weights on a CPU. In evaluation mode bitsandbytes would reorder them in place, which
    fails for shards and for small layers."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010  # no attribute of every module


def check_placement(quantize: Quantization | None, kind: str, precision: str) -> None:
    """Check that quantized weights can be placed by this backend.

    kind: single, ddp, zero1, zero2, zero3 or fsdp2.

    Raises:
        RecipeError: FSDP2 cannot shard them without changing them.
    """
    if quantize is None or kind != "fsdp2":
        return
    if quantize.type == "nf4" and quantize.storage_dtype == precision == "fp32":
        return
    storage = "int8 weights" if quantize.type == "int8" else f"nf4 weights in {quantize.storage_dtype}"
    raise RecipeError(
        f"model.quantize: FSDP2 cannot shard {storage} with train.precision: {precision}: it leaves integers whole on "
        "every rank, and may change bits that are no valid 16-bit numbers. Use DDP, ZeRO-2 or ZeRO-3 (--launch zero3), "
        "or nf4 with quantize.storage_dtype: fp32 and train.precision: fp32"
    )
