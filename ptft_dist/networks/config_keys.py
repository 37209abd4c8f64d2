"""Converts the recipe's model.config to a transformers config. Errors name the wrong key."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import PretrainedConfig, PreTrainedTokenizerBase
from transformers.activations import ACT2FN
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from ptft_dist.config.token_ids import id_count
from ptft_dist.errors import RecipeError

_SIZE = re.compile(r"^(num|n|d)_|_(size|layers|heads|dim|embeddings|rank)$")
_POSITIVE = {
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size"),
    *("vocab_size", "max_position_embeddings", "head_dim", "d_ff", "d_kv", "d_inner", "n_inner"),
    *("encoder_layers", "encoder_attention_heads", "encoder_ffn_dim"),
    *("decoder_layers", "decoder_attention_heads", "decoder_ffn_dim"),
}
"""Sizes that are 1 or more; others, such as the number of shared experts, may be 0."""
_OF_WEIGHTS = ("dtype", "torch_dtype")
_LARGEST_SIZE = 2**31 - 1
_ACTIVATIONS = {"hidden_act", "hidden_activation", "activation_function", "activation"}


def config_from_keys(
    keys: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, settings: Mapping[str, Any]
) -> PretrainedConfig:
    """The transformers config of model.config.

    transformers accepts unknown keys silently. Here they are errors, because a misspelled key has no effect.

    Args:
        keys: model.config, with `model_type`.
        tokenizer: defines vocabulary size and special token ids that are not in `keys`.
        settings: keys that follow from the task.

    Raises:
        RecipeError: a key is unknown, or its value cannot work.
    """
    keys = dict(keys)
    model_type = keys.pop("model_type")
    if model_type not in CONFIG_MAPPING:
        near = _nearest(model_type, CONFIG_MAPPING.keys(), 3)
        raise RecipeError(f"model.config.model_type: transformers has no model type {model_type!r}{near}")
    config_class = CONFIG_MAPPING[model_type]
    known = set(config_class().to_dict()) | set(config_class.attribute_map)
    for key in keys:
        if key in _OF_WEIGHTS:
            raise RecipeError(
                f"model.config.{key}: has no effect: new weights are trained in fp32. train.precision sets the data "
                "type of the computation, save.dtype that of the exported weights"
            )
        if key not in known:
            near = _nearest(key, known, 1, "model.config.")
            raise RecipeError(f"model.config.{key}: a {model_type} config has no such key{near}")
    check_values(keys, config_class.attribute_map)
    defaults = {
        "vocab_size": id_count(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    try:
        config: PretrainedConfig = config_class(**{**defaults, **keys, **settings})
    except (TypeError, ValueError, StrictDataclassError) as error:
        why = error.__cause__ or error  # a StrictDataclassError itself only names a validator
        raise RecipeError(f"model.config: a {model_type} config cannot be built from these keys: {why}") from None
    _check_heads(config)
    return config


def check_values(keys: Mapping[str, Any], attribute_map: Mapping[str, str]) -> None:
    """Raises RecipeError for sizes that are negative, zero or far too large, and for unknown activations.

    attribute_map: common key names -> the names of this model type, such as num_hidden_layers -> n_layer.
    """
    common = {own: name for name, own in attribute_map.items()}
    for key, value in keys.items():
        name = common.get(key, key)
        if isinstance(value, int) and not isinstance(value, bool) and (name in _POSITIVE or _SIZE.search(key)):
            least = 1 if name in _POSITIVE else 0
            if not least <= value <= _LARGEST_SIZE:
                raise RecipeError(f"model.config.{key}: {value} is not between {least} and {_LARGEST_SIZE}")
        if name in _ACTIVATIONS and isinstance(value, str) and value not in ACT2FN:
            near = _nearest(value, ACT2FN.keys(), 3) or "; for example gelu, relu, silu"
            raise RecipeError(f"model.config.{key}: transformers has no activation {value!r}{near}")


def _check_heads(config: PretrainedConfig) -> None:
    """Raises RecipeError if num_key_value_heads does not divide num_attention_heads; else the forward pass fails."""
    text = config.get_text_config()
    heads, shared = (getattr(text, key, None) for key in ("num_attention_heads", "num_key_value_heads"))
    if isinstance(heads, int) and isinstance(shared, int) and heads % shared:
        raise RecipeError(
            f"model.config.num_key_value_heads: {shared} does not divide num_attention_heads ({heads}); use a divisor"
        )


def _nearest(name: str, names: Iterable[str], count: int, prefix: str = "") -> str:
    near = difflib.get_close_matches(name, list(names), n=count)
    return f"; did you mean {' or '.join(prefix + each for each in near)}?" if near else ""
