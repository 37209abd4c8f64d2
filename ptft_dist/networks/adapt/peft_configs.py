"""The peft config of a method of model.adapt."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import (
    AdaLoraConfig,
    EvaConfig,
    IA3Config,
    LoraConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    PromptTuningInit,
)
from peft.config import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from transformers.pytorch_utils import Conv1D

from ptft_dist.config.adapt import AdaptSection
from ptft_dist.errors import RecipeError
from ptft_dist.networks.adapt import bottleneck
from ptft_dist.networks.adapt.partial import sample

TASK_TYPES = {
    "AutoModelForCausalLM": "CAUSAL_LM",
    "AutoModelForSeq2SeqLM": "SEQ_2_SEQ_LM",
    "AutoModelForSequenceClassification": "SEQ_CLS",
    "AutoModelForTokenClassification": "TOKEN_CLS",
    "AutoModelForQuestionAnswering": "QUESTION_ANS",
}
"""transformers class -> peft's name of the task; peft treats all others alike."""
SET_BY_US = ("peft_type", "task_type", "inference_mode", "base_model_name_or_path", "revision", "auto_mapping")

NOT_HERE = {
    **dict.fromkeys(("multitask_prompt_tuning", "poly"), "needs a task number for each row, which rows do not have"),
    "cartridge": "needs keys and values of a text, which ptft does not compute. Use prefix_tuning",
    "cpt": "computes its loss itself, from labels of each token. Use prompt_tuning",
    "xlora": "needs adapters that are already trained. Use lora",
}
"""Methods of peft that cannot be trained -> why."""


@dataclass(frozen=True)
class AdapterSetup:
    """What an adapter's config needs besides the recipe's section."""

    task_type: str | None
    """peft's name of the task, see TASK_TYPES."""
    base: str
    """Directory or Hub name of the base."""
    revision: str | None
    total_steps: int
    """Number of optimizer updates of the run."""
    new_tokens: tuple[int, ...]
    """Ids of tokens whose embeddings are new."""
    tokenizer_path: str
    seed: int


def peft_config(model: Any, adapt: AdaptSection, setup: AdapterSetup, fresh: Sequence[str]) -> PeftConfig:
    """The config of a new adapter.

    Args:
        fresh: names of parameters with random weights; their layers are trained and saved with the adapter.

    Raises:
        RecipeError: a key or value does not fit the method or the network.
    """
    build = {
        "lora": _lora,
        "adalora": _adalora,
        "ia3": _ia3,
        "prompt_tuning": _prompt_tuning,
        "p_tuning": _p_tuning,
        "prefix_tuning": _prefix_tuning,
        "bottleneck": _bottleneck,
        "peft": _any,
    }[adapt.method]
    try:
        config: Any = build(model, adapt.settings, setup)
    except (TypeError, ValueError, NotImplementedError) as error:
        raise RecipeError(f"model.adapt.{adapt.method}: {error}") from error
    if _transposed(model) and str(getattr(config, "init_lora_weights", "")).lower() == "olora":
        raise RecipeError(
            f"model.adapt.{adapt.init_key}: olora is wrong for this network, whose layers store transposed weights, as "
            "those of GPT-2: peft decomposes them as if they were not. Use pissa"
        )
    config.task_type, config.base_model_name_or_path, config.revision = setup.task_type, setup.base, setup.revision
    _save_embeddings(model, config, adapt, setup)
    whole = whole_layers(fresh)
    if getattr(config, "target_modules", None) == "all-linear":  # layers that are trained as a whole get no adapter
        heads = [name for name, _ in model.named_children() if name != model.base_model_prefix]
        classifies = setup.task_type in ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")
        config.exclude_modules = (
            sorted({*(config.exclude_modules or ()), *whole, *(heads if classifies else ())}) or None
        )
    if whole:
        if not hasattr(config, "modules_to_save"):
            raise RecipeError(
                f"model.adapt.{adapt.method}: it cannot train {', '.join(whole)}, which model.path has no weights for. "
                "Use lora, or a model.path with these weights"
            )
        config.modules_to_save = sorted({*(config.modules_to_save or ()), *whole})
    return config


def changes_base(config: PeftConfig) -> bool:
    """Whether the initialization of the adapter has changed the base's weights (PiSSA, OLoRA)."""
    return str(getattr(config, "init_lora_weights", "")).lower().startswith(("pissa", "olora"))


def whole_layers(parameters: Sequence[str]) -> list[str]:
    """The layers of parameters, such as `pooler.dense`; of a head all of it, such as `classifier`."""
    layers = {name.rpartition(".")[0] for name in parameters}
    heads = {
        layer.split(".")[0] if layer.split(".")[0] in ("classifier", "score", "qa_outputs") else layer
        for layer in layers
    }
    return sorted(heads - {""})


def linear_layers(model: torch.nn.Module) -> list[str]:
    """The names of all linear layers."""
    return [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear | Conv1D)]


def _targets(model: torch.nn.Module, targets: str | Sequence[str], key: str) -> list[str] | str:
    """The value of target_modules. Raises RecipeError if a target is no layer of the network, with candidates."""
    if targets == "all-linear":
        return "all-linear"
    names = [name for name, _ in model.named_modules() if name]
    if isinstance(targets, str):
        if not any(re.fullmatch(targets, name) for name in names):
            raise RecipeError(_no_layer(model, key, targets))
        return targets
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            raise RecipeError(_no_layer(model, key, target))
    return list(targets)


def _in_layers(model: torch.nn.Module, lora: Any, key: str) -> list[str] | str:
    """The targets of LoRA, in the blocks `lora.layers` only. Raises RecipeError if there are none.

    peft restricts a list of targets itself, but no regular expression and not all-linear.
    """
    targets = _targets(model, lora.targets, key)
    if not lora.layers or not isinstance(targets, str):
        return targets
    names = linear_layers(model)
    if targets != "all-linear":
        names = [name for name, _ in model.named_modules() if re.fullmatch(targets, name)]
    blocks = {name: re.search(r"\.(\d+)\.", name) for name in names}
    kept = [name for name, block in blocks.items() if block is not None and int(block[1]) in lora.layers]
    if not kept:
        raise RecipeError(f"{key}: {targets} names no layer in the blocks of model.adapt.lora.layers: {lora.layers}")
    return kept


def _no_layer(model: torch.nn.Module, key: str, target: str) -> str:
    endings = list(dict.fromkeys(name.rpartition(".")[2] for name in linear_layers(model)))
    near = difflib.get_close_matches(target, endings, 1)
    hint = f"; did you mean {near[0]}?" if near else "."
    return f"{key}: no layer of this network is called {target!r}{hint} Its linear layers end in: {', '.join(endings)}"


def _lora(model: torch.nn.Module, lora: Any, setup: AdapterSetup) -> PeftConfig:  # noqa: ARG001
    key, layers = "model.adapt.lora", _block_count(model)
    if lora.layers and max(lora.layers) >= layers:
        raise RecipeError(f"{key}.layers: there is no block {max(lora.layers)}; the network has {layers}, from 0")
    names = [name for name, _ in model.named_modules()]
    for pattern in (*lora.rank_pattern, *lora.alpha_pattern):
        if not any(re.search(rf"(.*\.)?({pattern})$", name) for name in names):
            raise RecipeError(_no_layer(model, f"{key}: rank_pattern and alpha_pattern", pattern))
    for excluded in lora.exclude:
        if not any(name == excluded or name.endswith(f".{excluded}") for name in names):
            raise RecipeError(_no_layer(model, f"{key}.exclude", excluded))
    parameters = [name for name, _ in model.named_parameters()]
    for target in lora.target_parameters:
        if not any(name == target or name.endswith(f".{target}") for name in parameters):
            raise RecipeError(f"{key}.target_parameters: no parameter is called {target!r}: {sample(parameters)}")
    init: Any = {"default": True}.get(lora.init, lora.init)
    only_parameters = bool(lora.target_parameters) and not lora.targets
    return LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha or 2 * lora.r,
        lora_dropout=lora.dropout,
        target_modules=[] if only_parameters else _in_layers(model, lora, f"{key}.targets"),
        exclude_modules=list(lora.exclude) or None,
        layers_to_transform=None if isinstance(lora.targets, str) else (list(lora.layers) or None),
        rank_pattern=dict(lora.rank_pattern),
        alpha_pattern=dict(lora.alpha_pattern),
        use_rslora=lora.rslora,
        use_dora=lora.dora,
        init_lora_weights=init,
        bias=lora.bias,
        target_parameters=list(lora.target_parameters) or None,
        eva_config=EvaConfig() if lora.init == "eva" else None,
        fan_in_fan_out=_transposed(model),
    )


def _transposed(model: torch.nn.Module) -> bool:
    """Whether linear layers store [in, out], as those of GPT-2."""
    return any(isinstance(module, Conv1D) for module in model.modules())


def _block_count(model: torch.nn.Module) -> int:
    config: Any = model.config
    return int(getattr(config.get_text_config(), "num_hidden_layers", 0))


def _adalora(model: torch.nn.Module, adalora: Any, setup: AdapterSetup) -> PeftConfig:
    first, last = round(adalora.start * setup.total_steps), round(adalora.end * setup.total_steps)
    if first + last >= setup.total_steps:
        raise RecipeError(
            f"model.adapt.adalora: start and end leave none of the {setup.total_steps} updates in which ranks change"
        )
    return AdaLoraConfig(
        init_r=adalora.r,
        target_r=adalora.target_r,
        lora_alpha=adalora.alpha or 2 * adalora.r,
        lora_dropout=adalora.dropout,
        target_modules=_targets(model, adalora.targets, "model.adapt.adalora.targets"),
        tinit=first,
        tfinal=last,
        deltaT=adalora.every,
        orth_reg_weight=adalora.orthogonality,
        total_step=setup.total_steps,
        fan_in_fan_out=_transposed(model),
    )


def _ia3(model: torch.nn.Module, ia3: Any, setup: AdapterSetup) -> PeftConfig:  # noqa: ARG001
    if not ia3.targets:
        return IA3Config(fan_in_fan_out=_transposed(model))
    targets = _targets(model, ia3.targets, "model.adapt.ia3.targets")
    return IA3Config(
        target_modules=targets, feedforward_modules=list(ia3.feedforward), fan_in_fan_out=_transposed(model)
    )


def _prompt_tuning(model: torch.nn.Module, tuning: Any, setup: AdapterSetup) -> PeftConfig:  # noqa: ARG001
    text = tuning.init_text
    return PromptTuningConfig(
        num_virtual_tokens=tuning.tokens,
        prompt_tuning_init=PromptTuningInit.RANDOM if text is None else PromptTuningInit.TEXT,
        prompt_tuning_init_text=text,
        tokenizer_name_or_path=None if text is None else setup.tokenizer_path,
    )


def _p_tuning(model: torch.nn.Module, tuning: Any, setup: AdapterSetup) -> PeftConfig:  # noqa: ARG001
    return PromptEncoderConfig(
        num_virtual_tokens=tuning.tokens,
        encoder_reparameterization_type=tuning.encoder.upper(),
        encoder_hidden_size=tuning.hidden_size,
    )


def _prefix_tuning(model: torch.nn.Module, tuning: Any, setup: AdapterSetup) -> PeftConfig:  # noqa: ARG001
    return PrefixTuningConfig(
        num_virtual_tokens=tuning.tokens, prefix_projection=tuning.projection, encoder_hidden_size=tuning.hidden_size
    )


def _bottleneck(model: torch.nn.Module, settings: Any, setup: AdapterSetup) -> PeftConfig:  # noqa: ARG001
    bottleneck.register()
    key = "model.adapt.bottleneck"
    if settings.targets:
        names = _targets(model, settings.targets, f"{key}.targets")
    else:
        names = bottleneck.places(model, settings.placement)
        if not names:
            endings = dict.fromkeys(name.rpartition(".")[2] for name in linear_layers(model))
            raise RecipeError(
                f"{key}: set targets, because it is not known where {settings.placement} adapters stand in this "
                f"network. Its linear layers end in: {', '.join(endings)}"
            )
    return bottleneck.BottleneckConfig(target_modules=names, size=settings.size, activation=settings.activation)


def _any(model: torch.nn.Module, given: dict[str, Any], setup: AdapterSetup) -> PeftConfig:  # noqa: ARG001
    bottleneck.register()
    known = {str(getattr(each, "value", each)).lower(): each for each in PEFT_TYPE_TO_CONFIG_MAPPING}
    name = given["type"].lower()
    if name not in known:
        near = difflib.get_close_matches(name, known, 3)
        hint = f"; did you mean {' or '.join(near)}?" if near else f": {', '.join(sorted(known))}"
        raise RecipeError(f"model.adapt.peft.type: peft has no method {given['type']!r}{hint}")
    if name in NOT_HERE:
        raise RecipeError(f"model.adapt.peft.type: {name} {NOT_HERE[name]}")
    if name == "adalora":
        raise RecipeError(
            "model.adapt.peft.type: adalora: use model.adapt.adalora, which changes the ranks; peft does not"
        )
    _check_initial_values(str(given.get("init_lora_weights")).lower())
    config_class = PEFT_TYPE_TO_CONFIG_MAPPING[known[name]]
    arguments = {key: value for key, value in given.items() if key != "type"}
    fields = {each.name for each in dataclasses.fields(config_class)} - set(SET_BY_US)
    for key in arguments:
        if key not in fields:
            near = difflib.get_close_matches(key, fields, 1)
            hint = f"; did you mean {near[0]}?" if near else f": {', '.join(sorted(fields))}"
            raise RecipeError(f"model.adapt.peft.{key}: peft's {config_class.__name__} has no such key{hint}")
    if isinstance(targets := arguments.get("target_modules"), list | str):
        _targets(model, targets, "model.adapt.peft.target_modules")
    return config_class(**arguments)


def _check_initial_values(init: str) -> None:
    """Raises RecipeError if peft needs more than its config for these initial values of LoRA; some it replaces by the
    default without a word."""
    key = "model.adapt.peft.init_lora_weights"
    if init == "eva":
        raise RecipeError(f"{key}: eva: use model.adapt.lora.init, which computes it from training rows; peft does not")
    if init in ("corda", "loftq", "lora_ga"):
        raise RecipeError(
            f"{key}: {init} needs steps before the training that ptft does not have. Use model.adapt.lora"
        )


def _save_embeddings(model: Any, config: Any, adapt: AdaptSection, setup: AdapterSetup) -> None:
    """Train and save token embeddings with the adapter: of new tokens, or the whole table with the output head."""
    wanted = adapt.embeddings or ("new" if setup.new_tokens else None)
    if wanted is None:
        return
    key = "model.adapt.embeddings"
    if adapt.embeddings == "new" and not setup.new_tokens:
        raise RecipeError(f"{key}: new has no effect: no tokens are added (tokenizer.add). Remove it, or set all")
    names = {id(module): name for name, module in model.named_modules()}
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head is not None and head.weight is table.weight
    single_rows = wanted == "new" and hasattr(config, "trainable_token_indices")
    if setup.new_tokens and getattr(head, "bias", None) is not None and (tied or single_rows):
        remedy = "" if tied else "embeddings: all, or "
        raise RecipeError(
            f"{key}: the output head of this network has a bias, and peft "
            + ("ignores it while it trains" if single_rows else "does not save its values for")
            + f" added tokens. Use {remedy}model.adapt: full"
        )
    if single_rows:
        if config.trainable_token_indices is not None:
            raise RecipeError(
                "model.adapt.peft.trainable_token_indices: peft trains the rows of added tokens by this key, which "
                "would replace yours. Remove it, or set model.adapt.embeddings: all"
            )
        chosen = {names[id(table)].rpartition(".")[2]: list(setup.new_tokens)}
        if head is not None and not tied:
            chosen[names[id(head)].rpartition(".")[2]] = list(setup.new_tokens)
        config.trainable_token_indices, config.ensure_weight_tying = chosen, tied
        return
    owners = [part for part in model.modules() if isinstance(part, torch.nn.Embedding) and part.weight is table.weight]
    if len(owners) > 1:
        raise RecipeError(
            f"{key}: training the whole table has no effect in this network, whose encoder and decoder read it through "
            "modules of their own. Use lora for the embeddings of new tokens only, or model.adapt: full or match"
        )
    if not hasattr(config, "modules_to_save"):
        raise RecipeError(
            f"model.adapt.{adapt.method}: it cannot train the embeddings of the added tokens. Use lora, or a model "
            "whose tokenizer has these tokens"
        )
    whole = [names[id(table)]] + ([names[id(head)]] if head is not None and not tied else [])
    config.modules_to_save = sorted({*(config.modules_to_save or ()), *whole})
    if tied and hasattr(config, "ensure_weight_tying"):
        config.ensure_weight_tying = True
    elif tied:
        raise RecipeError(
            f"model.adapt.{adapt.method}: embeddings and output head are tied, and peft keeps them tied with lora only"
        )
