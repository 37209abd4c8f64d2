"""Folds an adapter into its base, and compares the logits before and after."""

from __future__ import annotations

import gc
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import PeftModel

from ptft_dist.config.recipe import ModelSection
from ptft_dist.errors import RecipeError
from ptft_dist.networks.adapt.reading import AdapterFiles, load_adapters
from ptft_dist.networks.export import Export, write_model
from ptft_dist.networks.facts import read_facts
from ptft_dist.networks.load import dtype_name
from ptft_dist.networks.rounding import kept_change

ROWS, LENGTH = 4, 16
"""The size of the token rows whose logits are compared."""
FP32_TOLERANCE = 1e-5
"""Of one layer. It is measured: 5e-6 for 30 layers of SmolLM2-135M."""
_OUTPUTS = ("logits", "start_logits", "end_logits", "prediction_logits", "seq_relationship_logits")


def not_mergeable(files: AdapterFiles) -> str | None:
    """Why an adapter of this method cannot be folded into weights; None if it can."""
    method = str(getattr(files.config.peft_type, "value", files.config.peft_type))
    if files.config.is_prompt_learning:
        reason = "trains virtual tokens"
    elif method == "BOTTLENECK":
        reason = "adds nonlinear layers"
    elif getattr(files.config, "layer_replication", None):
        reason = "repeats layers of the base"  # the copies share their weights
    else:
        return None
    return f"{method} {reason}, which no weight of the base can replace, so it cannot be merged"


def check_mergeable(files: AdapterFiles) -> None:
    """Raises RecipeError if an adapter of this method cannot be folded into weights."""
    if reason := not_mergeable(files):
        raise RecipeError(f"{files.path}: {reason}. Use the adapter directory itself, for example with ptft generate")


class Merged(NamedTuple):
    """What is known of a merged model. Differences are relative to the largest logit, or to 1 if that is smaller."""

    difference: float
    """The largest difference of logits from those of base and adapter."""
    tolerance: float
    kept: float | None
    """The share of the adapter's change that the data type keeps, see `kept_change`; None if it is unknown."""


def merge(files: AdapterFiles, dtype: torch.dtype, folder: Path) -> Merged:
    """Write the merged model with the adapter's tokenizer to `folder`.

    Weights are merged in fp32, which must change no logit by more than rounding does, and then rounded to `dtype`
    once. The model that is read from `folder` is compared with the base, quantized if it was quantized in training,
    and the adapter on it. All compute in fp32.

    Raises:
        RecipeError: the method cannot be merged, or the logits differ by more than the tolerance.
    """
    check_mergeable(files)
    adapted = load_adapters({"adapter": files}, "adapter", torch.float32)
    inputs = _rows(adapted.get_base_model(), len(files.tokenizer), files.tokenizer.all_special_ids)
    trained = expected = _outputs(adapted, inputs)
    if files.quantize is not None:
        del adapted
        gc.collect()
        adapted = _on_dequantized_base(files)
        expected = _outputs(adapted, inputs)
    try:
        merged: Any = adapted.merge_and_unload(safe_merge=True)
    except (AttributeError, RuntimeError, ValueError, TypeError) as error:  # also NotImplementedError
        raise RecipeError(
            f"{files.path}: peft cannot merge it: {str(error).rstrip('.')}. Use the adapter directory itself"
        ) from None
    _compare(files, _outputs(merged, inputs), expected, FP32_TOLERANCE * _growth(merged.config), "fp32")
    auto_class = files.auto_class
    merged.config.architectures = [type(merged).__name__]
    state = merged.state_dict()
    write_model(Export(merged, files.tokenizer, read_facts(merged), dtype), state, folder)
    base = ModelSection(path=files.base, revision=files.revision)
    kept = kept_change(base, merged.base_model_prefix, state, dtype) if files.quantize is None else None
    del state, merged, adapted
    gc.collect()
    again = auto_class.from_pretrained(folder, dtype=torch.float32, trust_remote_code=files.trust_remote_code).eval()
    tolerance = _tolerance(files, dtype) * _growth(again.config)
    difference = _compare(files, _outputs(again, inputs), trained, tolerance, dtype_name(dtype))
    return Merged(difference, tolerance, kept)


def _compare(
    files: AdapterFiles, found: list[torch.Tensor], expected: list[torch.Tensor], tolerance: float, name: str
) -> float:
    """The largest difference, relative to the largest logit, or to 1. Raises RecipeError if it is above `tolerance`."""
    difference = max(
        float((ours - theirs).abs().max() / max(1.0, float(theirs.abs().max())))
        for ours, theirs in zip(found, expected, strict=True)
    )
    if not difference <= tolerance:  # also if it is NaN
        other = "" if name == "fp32" else ", or merge with --dtype fp32"
        raise RecipeError(
            f"{files.path}: the merged model differs from base and adapter: logits by {difference:.2e} of the largest "
            f"logit; the tolerance for {name} is {tolerance:.1e}. Use the adapter directory itself{other}"
        )
    return difference


def _on_dequantized_base(files: AdapterFiles) -> PeftModel:
    """The adapter on the dequantized base in fp32."""
    base: Any = files.load_base(torch.float32).dequantize()
    for name in ("quantization_config", "_pre_quantization_dtype"):
        if hasattr(base.config, name):
            delattr(base.config, name)
    for name in ("hf_quantizer", "quantization_method", "is_quantized", "is_loaded_in_4bit", "is_loaded_in_8bit"):
        base.__dict__.pop(name, None)
    plain = replace(files, quantize=None)
    return load_adapters({"adapter": plain}, "adapter", torch.float32, base=base.float())


def _tolerance(files: AdapterFiles, dtype: torch.dtype) -> float:
    """The largest difference that rounding explains in a network of one layer.

    A weight is rounded by at most half an eps; the factor 8 is for the largest of many logits. The merge itself is
    compared in fp32, so this is to find files that are damaged, and numbers beyond fp16. LLM.int8() also rounds
    activations to 127 steps, which the merged model does not.
    """
    if files.quantize is not None and files.quantize.type == "int8":
        return float(8 * max(1 / 127, torch.finfo(dtype).eps))
    return FP32_TOLERANCE if dtype == torch.float32 else float(8 * torch.finfo(dtype).eps)


def _growth(config: Any) -> float:
    """Rounding errors of layers add up like independent ones: they grow with the square root of their number."""
    return float(max(1, getattr(config.get_text_config(), "num_hidden_layers", 1)) ** 0.5)


def _rows(model: Any, tokens: int, special: list[int]) -> dict[str, torch.Tensor]:
    """Token rows from a fixed seed, without special tokens; also for the decoder of an encoder-decoder."""
    draw = torch.Generator().manual_seed(0)
    usual = torch.tensor(sorted(set(range(tokens)) - set(special)))
    length = min(LENGTH, read_facts(model).max_positions or LENGTH)
    ids = usual[torch.randint(len(usual), (ROWS, length), generator=draw)]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids.flip(0)
    return inputs


@torch.no_grad()
def _outputs(model: Any, inputs: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
    output = model(**inputs)
    values = [getattr(output, name, None) for name in _OUTPUTS]
    tensors = [value.float() for value in values if isinstance(value, torch.Tensor)]
    assert tensors, f"{type(output).__name__} has no logits"
    return tensors
