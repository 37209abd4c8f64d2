"""Runs an adapted network as its base, or with another adapter, without changing what is trained.

peft's own `disable_adapter` and `set_adapter` also change requires_grad.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from ptft_dist.config.adapt import AdaptSection
from ptft_dist.config.recipe import ModelSection
from ptft_dist.errors import RecipeError
from ptft_dist.networks.names import ADAPTER_CONFIG, is_adapter

_HEADS = (".score.weight", ".classifier.weight")
_KEEPS_BASE = ("default", "gaussian", "orthogonal", "eva")  # model.adapt.lora.init
_PLAIN_STARTS = (True, "gaussian", "orthogonal", "eva")
"""Values of peft's init_lora_weights that leave the base as it is."""
_NEVER_BASE = ("vblora", "unilora")
"""Methods of peft that change the outputs of the network from the start, whatever their options."""
_RANDOM_IF_NAMED = ("c3a", "tinylora")
"""Methods whose init_weights is the name of a random distribution, or true for zeros."""


@contextlib.contextmanager
def adapters_off(model: torch.nn.Module) -> Iterator[None]:
    """The layers of an adapted network compute what the base's compute."""
    with _layers_with(model, "_disable_adapters", True):
        yield


@contextlib.contextmanager
def using_adapter(model: torch.nn.Module, name: str) -> Iterator[None]:
    """The layers of an adapted network use the adapter `name` alone."""
    with _layers_with(model, "_active_adapter", [name]):
        yield


@contextlib.contextmanager
def _layers_with(model: torch.nn.Module, attribute: str, value: Any) -> Iterator[None]:
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    layers = [part for part in model.modules() if isinstance(part, BaseTunerLayer | AuxiliaryTrainingWrapper)]
    assert layers, "this network has no adapter"
    before = [getattr(part, attribute) for part in layers]
    for part in layers:
        setattr(part, attribute, value)
    try:
        yield
    finally:
        for part, old in zip(layers, before, strict=True):
            setattr(part, attribute, old)


def computes_logits_by_weight(model: Any) -> bool:
    """Whether the logits of an adapted causal network are its hidden states times the weight of the output head.

    They are not if the adapter changes the head itself, or puts virtual tokens before the hidden states.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import TrainableTokensWrapper

    if not hasattr(model, "peft_config"):
        return True
    config = model.active_peft_config
    if config.is_prompt_learning and config.peft_type != "PREFIX_TUNING":
        return False
    head = model.get_base_model().get_output_embeddings()
    return not isinstance(head, BaseTunerLayer | TrainableTokensWrapper)


def shares_base(path: str, section: ModelSection) -> bool:
    """Whether `path` is a LoRA adapter on the base that `section` adapts with LoRA too, and both leave it as it is.

    PiSSA and others change the base when the adapter is added; trained biases and embeddings replace those of the base.
    """
    ours = section.adapt.lora
    if ours is None or ours.init not in _KEEPS_BASE or ours.bias != "none" or not is_adapter(path):
        return False
    config = json.loads((Path(path) / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    base, own = str(config.get("base_model_name_or_path")), str(section.path)
    if Path(base).is_dir():
        same = Path(base).resolve() == Path(own).resolve()
    else:
        same = (base, config.get("revision")) == (own, section.revision)
    plain = config.get("peft_type") == "LORA" and config.get("init_lora_weights", True) in _PLAIN_STARTS
    file = Path(path) / "adapter_model.safetensors"
    if not (same and plain and file.is_file()):
        return False
    with safe_open(file, "pt") as weights:
        return all(".lora_" in name or name.endswith(_HEADS) for name in weights.keys())  # noqa: SIM118


def add_frozen_scorer(model: Any, path: str, name: str) -> None:
    """Add the LoRA adapter of a sequence classifier with one label to an adapted network, frozen.

    Its head becomes the module `<name>_head`. `read_scorer` reads its scores.

    Raises:
        RecipeError: the adapter has no head of one label, or weights that this network has no place for.
    """
    from peft import set_peft_model_state_dict
    from peft.config import PeftConfig

    config = PeftConfig.from_pretrained(path)
    config.inference_mode, config.modules_to_save = True, None
    trained = {key for key, parameter in model.named_parameters() if parameter.requires_grad}
    active = model.active_adapter
    state = load_file(Path(path) / "adapter_model.safetensors")
    heads = [key for key in state if key.endswith(_HEADS)]
    if len(heads) != 1 or state[heads[0]].shape[0] != 1:
        raise RecipeError(f"{path}: this adapter has no head with one label; train it with task: reward")
    weight = state.pop(heads[0])
    if isinstance(excluded := getattr(config, "exclude_modules", None), set):  # the policy has no such head
        config.exclude_modules = excluded - {heads[0].split(".")[-2]} or None
    model.add_adapter(name, config)
    loaded: Any = set_peft_model_state_dict(model, state, adapter_name=name)
    if unexpected := loaded.unexpected_keys:
        raise RecipeError(f"{path}: this adapter has weights that the policy has no place for: {unexpected[0]}")
    model.set_adapter(active)
    head = torch.nn.Linear(weight.shape[1], 1, bias=False)
    head.weight.data.copy_(weight)
    setattr(model, f"{name}_head", head)
    for key, parameter in model.named_parameters():
        parameter.requires_grad_(key in trained)


def read_scorer(model: Any, inputs: Mapping[str, torch.Tensor], name: str) -> torch.Tensor:
    """The scores of `add_frozen_scorer`, read at the last token of each row by the mask: fp32 [B].

    inputs: input_ids and attention_mask [B, T], padded on the right.
    """
    with using_adapter(model, name):
        hidden = model(**inputs, use_cache=False, output_hidden_states=True, logits_to_keep=1).hidden_states[-1]
    last = inputs["attention_mask"].sum(1) - 1
    head = getattr(model, f"{name}_head")
    states = hidden[torch.arange(len(hidden), device=hidden.device), last]
    scores: torch.Tensor = head(states.to(head.weight.dtype)).float().squeeze(-1)
    return scores


def check_start_is_base(adapt: AdaptSection, key: str, otherwise: str = ", or set it to 0") -> None:
    """Check that the network without its adapter is the one that training starts from.

    Args:
        key: the recipe's key that needs it, for messages.
        otherwise: what the user can do instead.

    Raises:
        RecipeError: the start is another network: it begins with an adapter, or the initialization changes the base.
    """
    if adapt.adapter is not None:
        raise RecipeError(
            f"{key}: the reference is the network that training starts from, and with model.adapt.adapter that is not "
            f"the base. Merge the adapter into its base first (ptft merge){otherwise}"
        )
    if adapt.lora is not None and adapt.lora.init not in _KEEPS_BASE:
        raise RecipeError(
            f"{key}: model.adapt.lora.init: {adapt.lora.init} changes the weights of the base, so the network without "
            f"its adapter is not the one that training starts from. Use init: default{otherwise}"
        )
    if adapt.peft is not None and (unlike := _unlike_base(adapt.peft)):
        raise RecipeError(
            f"{key}: model.adapt.peft: {unlike} does not begin as the base, so the network without its adapter is not "
            f"the one that training starts from. Use lora{otherwise}"
        )
    if any(each is not None for each in (adapt.prompt_tuning, adapt.p_tuning, adapt.prefix_tuning)):
        raise RecipeError(
            f"{key}: model.adapt: {adapt.method} changes the input of the network, and the reference needs the base "
            f"without it. Use lora{otherwise}"
        )


def _unlike_base(given: dict[str, Any]) -> str | None:
    """The method of model.adapt.peft, and its initial values, if they change the outputs of the network; else None."""
    method, options = str(given["type"]).lower(), peft_options(given)
    if method in _NEVER_BASE:
        return method
    for name in ("init_weights", "init_ia3_weights"):
        value = options.get(name)
        if value is False or (isinstance(value, str) and method in _RANDOM_IF_NAMED):
            return f"{method} with {name}: {value}"
    return None


def peft_options(given: dict[str, Any]) -> dict[str, Any]:
    """The options of model.adapt.peft with the defaults of peft's config; an unknown method has no defaults."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    known: Any = {str(kind.value).lower(): each for kind, each in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    config_class = known.get(str(given["type"]).lower())
    defaults = {} if config_class is None else {field.name: field.default for field in dataclasses.fields(config_class)}
    return {**defaults, **given}


def check_base_stays(adapt: AdaptSection, key: str, otherwise: str = ", or set it to 0") -> None:
    """Check that training the adapter leaves the base as it is, so that `adapters_off` gives the base.

    Args:
        key: the recipe's key that needs it, for messages.
        otherwise: what the user can do instead.

    Raises:
        RecipeError: biases of the base are trained, or a method of peft adapts no layers or changes the base.
    """
    if adapt.lora is not None and adapt.lora.bias != "none":
        raise RecipeError(
            f"{key}: model.adapt.lora.bias: {adapt.lora.bias} trains biases of the base, which the reference needs "
            f"unchanged. Use bias: none{otherwise}"
        )
    if adapt.peft is None:
        return
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
    from peft.tuners.tuners_utils import BaseTuner

    name = str(adapt.peft["type"])
    tuner = {str(kind.value): each for kind, each in PEFT_TYPE_TO_TUNER_MAPPING.items()}.get(name.upper())
    if tuner is not None and not issubclass(tuner, BaseTuner):
        raise RecipeError(
            f"{key}: model.adapt.peft: {name} adapts no layers that can be switched off, and the reference needs the "
            f"base without it. Use lora{otherwise}"
        )
    plain = {
        "bias": ("none",),
        "init_lora_weights": _PLAIN_STARTS,
        "layer_replication": (None,),
    }
    for option, values in plain.items():
        if adapt.peft.get(option, values[0]) not in values:
            raise RecipeError(
                f"{key}: model.adapt.peft.{option}: {adapt.peft[option]} changes the base, which the reference needs "
                f"unchanged. Remove the option{otherwise}"
            )


def check_no_dropout(adapt: AdaptSection, task: str) -> None:
    """Check that the adapter has no dropout. task: the task whose probabilities must not change between passes.

    Raises:
        RecipeError: it has.
    """
    if adapt.peft is not None and str(adapt.peft["type"]).lower() == "pvera":
        raise RecipeError(
            f"model.adapt.peft: task {task} compares probabilities of the same tokens at several passes, and pvera "
            "draws random numbers at each. Use vera"
        )
    settings = adapt.settings if adapt.adds_adapter else None
    given = peft_options(settings) if isinstance(settings, dict) else getattr(settings, "__dict__", {})
    for name, value in given.items():
        if name.endswith("dropout") and isinstance(value, int | float) and value:
            raise RecipeError(
                f"model.adapt.{adapt.method}.{name}: task {task} compares probabilities of the same tokens at several "
                "passes, which dropout would change. Set it to 0"
            )
