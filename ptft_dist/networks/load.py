"""Builds networks from the recipe's model section, with random weights or with pretrained ones from a directory or the
Hub."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from ptft_dist.config.recipe import ModelSection
from ptft_dist.config.token_ids import id_count
from ptft_dist.errors import RecipeError
from ptft_dist.networks.config_keys import config_from_keys
from ptft_dist.networks.facts import NetworkFacts, input_embedding, labels_of
from ptft_dist.networks.names import directory_or_hub_name

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def dtype_name(dtype: torch.dtype) -> str:
    """The name that recipes use for a data type."""
    return next(name for name, each in DTYPES.items() if each == dtype)


def local_or_hub(section: ModelSection, base: Path, key: str = "model.path") -> ModelSection:
    """The section with an absolute model.path if that is a directory; see `directory_or_hub_name`."""
    if section.path is None:
        return section
    return section.model_copy(update={"path": directory_or_hub_name(section.path, base, key)})


def build_config(
    section: ModelSection,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    settings: Mapping[str, Any] | None = None,
    *,
    grown: bool = False,
) -> PretrainedConfig:
    """The network's config, including the keys that follow from tokenizer and task.

    Args:
        max_length: maximum number of tokens in a row.
        settings: config keys that follow from the task.
        grown: tokens were added to the tokenizer, and embeddings will be added for them.

    Raises:
        RecipeError: a key is unknown, or a value does not fit tokenizer, data or task.
    """
    if section.path is not None:
        config = read_config(section, settings or {})
        _forget_source_format(config)
        if "id2label" in (settings or {}) and not section.new_head:
            _check_labels(section, read_config(section, {}), config)
    else:
        assert section.config is not None
        set_by_task = set(settings or {}) | ({"num_labels"} if "id2label" in (settings or {}) else set())
        if duplicates := sorted(set(section.config) & set_by_task):
            raise RecipeError(f"model.config.{duplicates[0]}: the task sets this key itself. Remove it.")
        config = config_from_keys(section.config, tokenizer, settings or {})
    _check_sizes(config, tokenizer, max_length, grown)
    return config


def read_config(section: ModelSection, settings: Mapping[str, Any], key: str = "model.path") -> PretrainedConfig:
    """The config of pretrained weights, with its values replaced by `settings`. Raises RecipeError without one."""
    assert section.path is not None
    try:
        return AutoConfig.from_pretrained(
            section.path, revision=section.revision, trust_remote_code=section.trust_remote_code, **settings
        )
    except (OSError, ValueError) as error:
        raise RecipeError(f"{key}: cannot load a config from {section.path!r}: {error}") from None


def _forget_source_format(config: PretrainedConfig) -> None:
    """Remove the source format that an earlier run wrote to the config; the task writes its own."""
    if params := getattr(config, "task_specific_params", None):
        config.task_specific_params = {task: values for task, values in params.items() if task != "ptft"}


def _is_classifier(config: PretrainedConfig) -> bool:
    return any(name.endswith("Classification") for name in config.architectures or ())


def _check_labels(section: ModelSection, saved: PretrainedConfig, config: PretrainedConfig) -> None:
    """Raises RecipeError if the head of model.path was trained for other labels; see `check_head`."""
    if _is_classifier(saved):
        remedy = ", or set model.new_head: true for a head with random weights"
        check_head(f"model.path: the head of {section.path!r}", labels_of(saved), labels_of(config), remedy)


def check_head(head: str, head_labels: Sequence[str], labels: Sequence[str], remedy: str = "") -> None:
    """Check that a saved head was trained for these labels, in this order; otherwise its outputs get wrong names.

    The shapes of the weights may be equal nevertheless. LABEL_0, LABEL_1, ... are transformers' default names and are
    not compared.

    Args:
        head: names the head, for the message.
        head_labels: its labels, in the order of their ids.

    Raises:
        RecipeError: it was trained for other labels, or for the same labels in another order.
    """
    if list(head_labels) not in (list(labels), [f"LABEL_{i}" for i in range(len(head_labels))]):
        raise RecipeError(
            f"{head} was trained for the labels {', '.join(head_labels)}, and this task has {', '.join(labels)}. List "
            f"the labels in the head's order in the task's section (labels: [...]){remedy}"
        )


def check_positions(network: NetworkFacts, max_length: int) -> None:
    """Raises RecipeError if rows exceed the positions of a network whose positions start at an offset, as RoBERTa's."""
    positions, offset = network.max_positions, network.position_offset
    if offset and positions is not None and positions < max_length:
        raise RecipeError(
            f"data.max_length: {max_length} is more than the {positions} positions of this network, which start "
            f"at {offset}: lower it, or raise max_position_embeddings ({positions + offset})"
        )


def _check_sizes(config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, max_length: int, grown: bool) -> None:
    text_config = config.get_text_config()
    if text_config.vocab_size < (ids := id_count(tokenizer)) and not grown:
        raise RecipeError(
            f"model: it has {text_config.vocab_size} token embeddings, but the tokenizer has {ids} token ids: "
            "remove model.config.vocab_size, or use the model's own tokenizer. List tokens that were added to it "
            "in tokenizer.add"
        )
    positions = getattr(text_config, "max_position_embeddings", None)
    if isinstance(positions, int) and 0 < positions < max_length:
        raise RecipeError(
            f"data.max_length: {max_length} is more than the model's max_position_embeddings ({positions}): "
            "lower data.max_length, or raise max_position_embeddings"
        )


def base_dtype(section: ModelSection, config: PretrainedConfig, precision: str) -> torch.dtype:
    """The data type in which weights are loaded; trained ones become fp32. precision: train.precision."""
    if section.dtype != "auto":
        return DTYPES[section.dtype]
    own = config.dtype
    frozen = section.path is not None and not section.adapt.full
    return own if frozen and precision != "fp32" and isinstance(own, torch.dtype) else torch.float32


class Built(NamedTuple):
    """A network, and which of its parameters are new."""

    model: PreTrainedModel
    fresh: frozenset[str]
    """Names of the parameters that model.path has no weights for, and that are initialized at random."""


def build_network(
    section: ModelSection,
    config: PretrainedConfig,
    seed: int,
    auto_class: Any,
    tokens: int = 0,
    tell: Callable[[str], None] = lambda _text: None,
    key: str = "model.path",
    precision: str = "fp32",
    whole: Sequence[str] = (),
) -> Built:
    """Build the network with a transformers auto class, in training mode.

    Args:
        seed: random weights depend only on it, on every machine.
        tokens: embeddings are added up to this number of tokens.
        tell: called with a message about weights that the pretrained network lacks and that are initialized at random.
        key: the recipe's key that names the network, for messages.
        precision: train.precision, for the data type of frozen weights.
        whole: names of layers that are not quantized.

    Raises:
        RecipeError: the weights cannot be loaded, or do not fit the task.
    """
    options: dict[str, Any] = {} if section.attention == "auto" else {"attn_implementation": section.attention}
    options["dtype"] = base_dtype(section, config, precision)
    if section.quantize is not None:
        from ptft_dist.networks.adapt.quantized import keep_layout, quantization_config

        options["quantization_config"] = quantization_config(section.quantize, precision, list(whole))
    torch.manual_seed(seed)
    fresh: set[str] = set()
    try:
        if section.path is None:
            model: PreTrainedModel = auto_class.from_config(
                config, trust_remote_code=section.trust_remote_code, **options
            )
        else:
            model, info = auto_class.from_pretrained(
                section.path,
                config=config,
                revision=section.revision,
                trust_remote_code=section.trust_remote_code,
                ignore_mismatched_sizes=section.new_head,
                output_loading_info=True,
                **options,
            )
            if section.quantize is not None:
                keep_layout(model)
            fresh = {*info["missing_keys"], *(key[0] for key in info["mismatched_keys"])}
            if section.new_head and _is_classifier(read_config(section, {})):
                fresh |= _renew_head(model, seed)
            if fresh:
                tell(f"initialized at random, because {section.path} lacks them: {', '.join(sorted(fresh))}")
        if model.config.get_text_config().vocab_size < tokens:
            model.resize_token_embeddings(tokens, mean_resizing=False)
    except RuntimeError as error:
        if "ignore_mismatched_sizes" not in str(error):
            raise
        raise RecipeError(
            f"{key}: weights of {section.path!r} have other shapes than this task needs, for example because its "
            f"head has other labels; with model.new_head: true such weights are initialized at random. {error}"
        ) from None
    except (OSError, ValueError, ImportError) as error:
        where = "model.config" if section.path is None else f"{key}: {section.path!r}"
        raise RecipeError(f"{where}: the network cannot be built: {error}") from None
    if section.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.config.use_cache = False
    return Built(model.train(), frozenset(fresh))


def build_model(section: ModelSection, config: PretrainedConfig, seed: int, auto_class: Any) -> PreTrainedModel:
    """The network of `build_network`."""
    return build_network(section, config, seed, auto_class).model


def _renew_head(model: PreTrainedModel, seed: int) -> set[str]:
    """Initialize the classification layer at random, for any saved shape; return the names of its weights."""
    torch.manual_seed(seed)
    names = set()
    for name, module in list(model.named_modules()):
        inside = name.startswith(f"{model.base_model_prefix}.")
        if isinstance(module, torch.nn.Linear) and not inside and module.out_features == model.config.num_labels:
            fresh = torch.nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
            model._init_weights(fresh)
            model.set_submodule(name, fresh)
            names |= {f"{name}.{weight}" for weight, _ in fresh.named_parameters()}
    return names


def flops_per_token(
    model: PreTrainedModel, config: PretrainedConfig, parameters: int, trained: int, length: float
) -> float:
    """FLOPs per training token, forward and backward pass (Chowdhery et al. 2022, appendix B).

    6 N + 12 layers x heads x head size x length. N is the number of parameters without the input embedding, unless
    it is tied to the output projection. A frozen parameter has no gradient of its own: it counts 4 instead of 6.
    Recomputation by gradient checkpointing is not counted.
    """
    text = config.get_text_config()
    frozen = parameters - trained
    if input_embedding(model) is not None and not text.tie_word_embeddings:
        parameters -= text.vocab_size * text.hidden_size
        frozen -= min(frozen, text.vocab_size * text.hidden_size)
    layers = getattr(text, "num_hidden_layers", 0)
    return 6.0 * parameters - 2.0 * frozen + 12.0 * layers * text.hidden_size * length
