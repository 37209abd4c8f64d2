"""From the recipe's model section to a network: random weights from a config, or weights from a path or the Hub."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from ptft_dist.config.recipe import ModelSection
from ptft_dist.errors import RecipeError
from ptft_dist.networks.facts import NetworkFacts


def local_or_hub(section: ModelSection, base: Path, key: str = "model.path") -> ModelSection:
    """The section with a relative model.path made absolute, if a directory is there: beside the recipe, or from here.

    Raises RecipeError if the path can only be a directory and there is none; other names are the Hub's.
    """
    if section.path is None:
        return section
    given = Path(section.path).expanduser()
    for candidate in (base / given, given.absolute()):
        if candidate.is_dir():
            return section.model_copy(update={"path": str(candidate)})
    if given.is_absolute() or section.path.startswith(".") or section.path.count("/") > 1:
        raise RecipeError(f"{key}: there is no directory {section.path}, neither in {base} nor in {Path.cwd()}")
    return section


def build_config(
    section: ModelSection,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    settings: Mapping[str, Any] | None = None,
    *,
    grown: bool = False,
) -> PretrainedConfig:
    """The network's config, fitted to tokenizer and task. Raises RecipeError for keys or sizes that cannot work.

    settings: keys that follow from the task. grown: tokens were added, so the network's embeddings may be too few.

    transformers keeps unknown config keys in silence; here they are errors, since a misspelt size has no effect.
    """
    if section.path is not None:
        config = read_config(section, settings or {})
        if "id2label" in (settings or {}) and not section.new_head:
            _check_labels(section, read_config(section, {}), config)
    else:
        assert section.config is not None
        said = set(settings or {}) | ({"num_labels"} if "id2label" in (settings or {}) else set())
        if double := sorted(set(section.config) & said):
            raise RecipeError(f"model.config.{double[0]}: the task says this itself. Remove it.")
        config = _config_from_keys(dict(section.config), tokenizer, settings or {})
    _check_sizes(config, tokenizer, max_length, grown)
    return config


def read_config(section: ModelSection, settings: Mapping[str, Any], key: str = "model.path") -> PretrainedConfig:
    """The config beside pretrained weights, with `settings` in place of its own. Raises RecipeError without one."""
    assert section.path is not None
    try:
        return AutoConfig.from_pretrained(
            section.path, revision=section.revision, trust_remote_code=section.trust_remote_code, **settings
        )
    except (OSError, ValueError) as error:
        raise RecipeError(f"{key}: cannot load a config from {section.path!r}: {error}") from None


def _is_classifier(config: PretrainedConfig) -> bool:
    return any(name.endswith("Classification") for name in config.architectures or ())


def _check_labels(section: ModelSection, saved: PretrainedConfig, config: PretrainedConfig) -> None:
    """Raises RecipeError if a head was learned for other labels, or in another order: its weights may fit all the same.
    The names LABEL_0, LABEL_1, ... say nothing."""
    theirs, labels = ([str(label) for label in (each.id2label or {}).values()] for each in (saved, config))
    if _is_classifier(saved) and theirs != labels and theirs != [f"LABEL_{i}" for i in range(len(theirs))]:
        raise RecipeError(
            f"model.path: the head of {section.path!r} was learned for the labels {', '.join(theirs)}, and this task "
            f"has {', '.join(labels)}. List the labels in the head's order in the task's section (labels: [...]), or "
            "start the head anew with model.new_head: true"
        )


def check_positions(network: NetworkFacts, max_length: int) -> None:
    """Raises RecipeError if rows are longer than position embeddings that begin behind the padding's, as RoBERTa's."""
    room, offset = network.max_positions, network.position_offset
    if offset and room is not None and room < max_length:
        raise RecipeError(
            f"data.max_length: {max_length} is more than the {room} positions of this network, which counts them "
            f"from {offset}: lower it, or raise max_position_embeddings ({room + offset})"
        )


def _config_from_keys(
    keys: dict[str, Any], tokenizer: PreTrainedTokenizerBase, settings: Mapping[str, Any]
) -> PretrainedConfig:
    model_type = keys.pop("model_type")
    if model_type not in CONFIG_MAPPING:
        near = difflib.get_close_matches(model_type, list(CONFIG_MAPPING.keys()), n=3)
        raise RecipeError(f"model.config.model_type: transformers knows no {model_type!r}; nearest: {', '.join(near)}")
    config_class = CONFIG_MAPPING[model_type]
    known = set(config_class().to_dict()) | set(config_class.attribute_map)
    for key in keys:
        if key not in known:
            near = difflib.get_close_matches(key, list(known), n=1)
            hint = f"; did you mean model.config.{near[0]}?" if near else ""
            raise RecipeError(f"model.config.{key}: a {model_type} config has no such key{hint}")
    defaults = {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    try:
        return config_class(**{**defaults, **keys, **settings})
    except (TypeError, ValueError, StrictDataclassError) as error:
        why = error.__cause__ or error  # what a StrictDataclassError itself says is the name of a validator
        raise RecipeError(f"model.config: a {model_type} config cannot be made from these keys: {why}") from None


def _check_sizes(config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, max_length: int, grown: bool) -> None:
    text_config = config.get_text_config()
    if text_config.vocab_size < len(tokenizer) and not grown:
        raise RecipeError(
            f"the model has {text_config.vocab_size} token embeddings, the tokenizer {len(tokenizer)} tokens: "
            "leave model.config.vocab_size out, or use the tokenizer that belongs to the model"
        )
    positions = getattr(text_config, "max_position_embeddings", None)
    if isinstance(positions, int) and 0 < positions < max_length:
        raise RecipeError(
            f"data.max_length: {max_length} is more than the model's max_position_embeddings ({positions}): "
            "lower the one or raise the other"
        )


def build_model(
    section: ModelSection,
    config: PretrainedConfig,
    seed: int,
    auto_class: Any,
    tokens: int = 0,
    tell: Callable[[str], None] = lambda _text: None,
    key: str = "model.path",
) -> PreTrainedModel:
    """The network, made by a transformers auto class, in fp32 and training mode.

    From a config, its weights follow from `seed` alone on every machine. tokens: the embeddings grow to this number.
    tell: called with a line about weights that a pretrained network lacks, and that therefore start random.
    key: what names the network in the recipe, for messages.
    """
    kernel: dict[str, Any] = {} if section.attention == "auto" else {"attn_implementation": section.attention}
    torch.manual_seed(seed)
    try:
        if section.path is None:
            model: PreTrainedModel = auto_class.from_config(
                config, dtype=torch.float32, trust_remote_code=section.trust_remote_code, **kernel
            )
        else:
            model, info = auto_class.from_pretrained(
                section.path,
                config=config,
                revision=section.revision,
                trust_remote_code=section.trust_remote_code,
                dtype=torch.float32,
                ignore_mismatched_sizes=section.new_head,
                output_loading_info=True,
                **kernel,
            )
            fresh = {*info["missing_keys"], *(key[0] for key in info["mismatched_keys"])}
            if section.new_head and _is_classifier(read_config(section, {})):
                fresh |= _renew_head(model, seed)
            if fresh:
                tell(f"new, random weights, which {section.path} does not have: {', '.join(sorted(fresh))}")
        if model.config.get_text_config().vocab_size < tokens:
            model.resize_token_embeddings(tokens, mean_resizing=False)
    except RuntimeError as error:
        if "ignore_mismatched_sizes" not in str(error):
            raise
        raise RecipeError(
            f"{key}: {section.path!r}: weights there have other sizes than this task needs, for example because "
            f"its head has other labels; model.new_head: true starts such weights anew. {error}"
        ) from None
    except (OSError, ValueError, ImportError) as error:
        where = "model.config" if section.path is None else f"{key}: {section.path!r}"
        raise RecipeError(f"{where}: the model cannot be built: {error}") from None
    if section.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.config.use_cache = False
    return model.train()


def _renew_head(model: PreTrainedModel, seed: int) -> set[str]:
    """Start the layer that scores labels anew, even where the saved one has its size; the names of its weights."""
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


def flops_per_token(model: PreTrainedModel, config: PretrainedConfig, parameters: int, length: float) -> float:
    """Floating-point operations of one training token, forward and backward (Chowdhery et al. 2022, appendix B).

    6 N + 12 layers x heads x head size x length, where N counts the parameters without the input embedding, unless
    that matrix is the output projection too. Recomputation by gradient checkpointing is not counted.
    """
    text = config.get_text_config()
    if model.get_input_embeddings() is not None and not text.tie_word_embeddings:
        parameters -= text.vocab_size * text.hidden_size
    layers = getattr(text, "num_hidden_layers", 0)
    return 6.0 * parameters + 12.0 * layers * text.hidden_size * length
