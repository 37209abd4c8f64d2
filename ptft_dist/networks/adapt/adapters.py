"""Adds an adapter to a network with peft, and returns its state for the exported adapter directory."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from peft import (
    PeftModel,
    PeftType,
    PromptEmbedding,
    PromptTuningInit,
    get_peft_model,
    get_peft_model_state_dict,
    initialize_lora_eva_weights,
)
from peft.config import PeftConfig
from peft.tuners.trainable_tokens.layer import TrainableTokensLayer
from peft.utils import ModulesToSaveWrapper
from safetensors.torch import save_file
from transformers import PreTrainedModel

from ptft_dist.config.adapt import AdaptSection
from ptft_dist.errors import RecipeError
from ptft_dist.networks.adapt import bottleneck
from ptft_dist.networks.adapt.adalora import RankState
from ptft_dist.networks.adapt.peft_configs import AdapterSetup, changes_base, peft_config, whole_layers
from ptft_dist.networks.adapt.reading import TASK_CONFIG, head_labels, task_keys
from ptft_dist.networks.adapt.virtual import hide_virtual_tokens
from ptft_dist.networks.facts import input_embedding, labels_of
from ptft_dist.networks.load import check_head

WEIGHTS = "adapter_model.safetensors"
Weights = Mapping[str, torch.Tensor]


def add_adapter(
    model: PreTrainedModel, adapt: AdaptSection, setup: AdapterSetup, fresh: Sequence[str], *, preview: bool
) -> PeftModel:
    """The network with the adapter of model.adapt. Its random weights follow from the seed only.

    Raises:
        RecipeError: the method does not fit the network, or the adapter cannot be loaded.
    """
    checkpointing = model.is_gradient_checkpointing
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if adapt.adapter is not None:
            adapted = load_adapter(model, adapt.adapter, adapt.name, trained=True, preview=preview)
            _check_new_layers(adapted, adapt.adapter, fresh)
        else:
            config = peft_config(model, adapt, setup, fresh)
            if preview and getattr(config, "init_lora_weights", None) not in (None, False, True):
                config.init_lora_weights = True  # type: ignore[attr-defined]  # others read the weights
            torch.manual_seed(setup.seed)
            try:
                adapted = get_peft_model(model, config, adapter_name=adapt.name)
            except (TypeError, ValueError, NotImplementedError, AttributeError) as error:
                raise RecipeError(f"model.adapt.{adapt.method}: {error}") from error
    if adapt.adapter is None:
        _check_biases(adapted, adapt)
    if getattr(adapted.active_peft_config, "init_lora_weights", None) not in (None, True, False, "gaussian"):
        # Known before anything is sharded: what PiSSA and OLoRA begin with, and what MiCA never trains.
        adapted.initial_adapter = _low_rank(adapted)  # type: ignore[assignment]
    adapted.changed_base = adapt.adapter is None and changes_base(adapted.active_peft_config)  # type: ignore[assignment]
    if adapt.adalora is not None and not preview:  # a saved adapter keeps its ranks
        adapted.rank_state = RankState(adapted)
    hide_virtual_tokens(adapted)
    if checkpointing:  # peft may have switched to the reentrant kind
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return adapted


def _check_new_layers(model: PeftModel, path: str, fresh: Sequence[str]) -> None:
    """Raises RecipeError if a saved adapter does not train and save a layer that has random weights."""
    wrappers = [name for name, module in model.named_modules() if isinstance(module, ModulesToSaveWrapper)]
    saved = tuple(f"{name.removeprefix('base_model.').removeprefix('model.')}." for name in wrappers)
    if missing := [layer for layer in whole_layers(fresh) if not f"{layer}.".startswith(saved)]:
        raise RecipeError(
            f"model.adapt.adapter: {path} does not contain {', '.join(missing)}, which model.path has no weights for. "
            "Use ptft merge, and train a new adapter on the merged model"
        )


def _check_biases(model: PeftModel, adapt: AdaptSection) -> None:
    """Raises RecipeError if single rows of a layer with a bias are trained: peft computes the layer without it."""
    for name, layer in model.named_modules():
        if isinstance(layer, TrainableTokensLayer) and getattr(layer.get_base_layer(), "bias", None) is not None:
            raise RecipeError(
                f"model.adapt.{adapt.method}: single rows are trained of an output head, and peft ignores the bias of "
                f"{name.removeprefix('base_model.model.').partition('.token_adapter')[0]} then. Train rows of "
                "embeddings that are not tied to it, or use model.adapt: full"
            )


def initialize_from_activations(model: PeftModel, inputs: dict[str, torch.Tensor]) -> None:
    """Set the A matrices and the ranks of `init: eva` from the activations of some rows (Paischer et al. 2024).

    inputs: inputs of the network [B, T], with `tokens`, which is false at padding.
    """

    def forward(network: PeftModel, given: dict[str, torch.Tensor]) -> Any:
        return network(**{name: value for name, value in given.items() if name != "tokens"})

    def of_tokens(layer_input: Any, places: torch.Tensor, _name: str) -> torch.Tensor:
        x: torch.Tensor = layer_input[0] if isinstance(layer_input, tuple | list) else layer_input
        return (x[places.T.unbind()] if x.dim() == 3 else x).contiguous()  # a pooler has one input for each row

    training = model.training
    initialize_lora_eva_weights(
        model.eval(),
        [inputs],
        forward_fn=forward,
        prepare_model_inputs_fn=lambda given, _config: given["tokens"].nonzero(),
        prepare_layer_inputs_fn=of_tokens,
        adapter_name=model.active_adapter,
        gather_distributed_inputs=False,
        show_progress_bar=False,
    )
    model.train(training)
    for parameter in model.parameters():
        if parameter.requires_grad and not parameter.is_contiguous():  # a transposed matrix of the decomposition
            parameter.data = parameter.data.contiguous()


def load_adapter(
    model: PreTrainedModel, path: str, name: str = "default", *, trained: bool, preview: bool = False
) -> PeftModel:
    """The network with a saved adapter.

    Raises:
        RecipeError: there is no adapter, or it belongs to another network or to other labels.
    """
    bottleneck.register()
    key = "model.adapt.adapter"
    try:
        config = PeftConfig.from_pretrained(path)
    except (OSError, ValueError, TypeError) as error:
        raise RecipeError(f"{key}: {path} is no adapter: {error}") from None
    if labels := head_labels(path):
        check_head(f"{key}: the head of {path}", labels, labels_of(model.config))
    # A saved prompt is the output of its encoder. peft refuses to train it; here its vectors themselves are trained.
    prompt = config.is_prompt_learning
    config.inference_mode = prompt or not trained
    try:
        if preview:
            return get_peft_model(model, config, adapter_name=name)
        adapted: PeftModel = PeftModel.from_pretrained(
            model, path, adapter_name=name, is_trainable=trained and not prompt, config=config
        )
        if trained and prompt:
            adapted.get_parameter(f"prompt_encoder.{name}.embedding.weight").requires_grad_(True)
            for module in adapted.modules():
                if isinstance(module, ModulesToSaveWrapper):
                    module.modules_to_save[name].requires_grad_(True)
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RecipeError(
            f"{key}: {path} does not fit this network; it was trained on {config.base_model_name_or_path}: {error}"
        ) from None
    return adapted


def unsaved_tokens(path: str, model: PreTrainedModel, new_tokens: Collection[int]) -> list[int]:
    """Those of `new_tokens` whose embeddings a saved adapter does not train and save. model: its base."""
    config = PeftConfig.from_pretrained(path)
    table = input_embedding(model)
    names = [name for name, module in model.named_modules() if module is table]
    whole = getattr(config, "modules_to_save", None) or ()
    if any(name == each or name.endswith(f".{each}") for name in names for each in whole):
        return []
    saved = getattr(config, "trainable_token_indices", None) or getattr(config, "token_indices", None) or ()
    if isinstance(saved, dict):  # by table
        saved = set.intersection(*map(set, saved.values()))
    return sorted(set(new_tokens) - set(saved))


def adapter_state(model: PeftModel, trained: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of adapter_model.safetensors, under peft's names.

    trained: the unsharded trained parameters and buffers by name.
    """
    frozen = {name: value for name, value in getattr(model, "initial_adapter", {}).items() if name not in trained}
    trained = {**frozen, **_with_tied_names(model, trained)}
    name = model.active_adapter
    config: Any = model.peft_config[name]
    if not config.is_prompt_learning:
        state: dict[str, torch.Tensor] = get_peft_model_state_dict(
            model, state_dict=dict(trained), adapter_name=name, save_embedding_layers=False
        )
        return state
    prefix = f"prompt_encoder.{name}."
    own = {key.removeprefix(prefix): value.float().cpu() for key, value in trained.items() if key.startswith(prefix)}
    state = {"prompt_embeddings": own["embedding.weight"] if config.inference_mode else _prompt(model, config, own)}
    for wrapper, module in model.named_modules():
        if hasattr(module, "modules_to_save") and hasattr(module, "adapter_state_dict"):
            inner = {key.removeprefix(f"{wrapper}."): v for key, v in trained.items() if key.startswith(f"{wrapper}.")}
            state |= {f"{wrapper}.{key}": value for key, value in module.adapter_state_dict(name, inner).items()}
    return state


def _prompt(model: PeftModel, config: Any, own: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The virtual tokens. peft computes them in place, from parameters that may be sharded; here a new encoder does."""
    encoder = _prompt_encoder(model, config)
    encoder.load_state_dict(own)
    tokens = model.prompt_tokens[model.active_adapter].unsqueeze(0).cpu()
    if config.peft_type == PeftType.PREFIX_TUNING:
        tokens = tokens[:, : config.num_virtual_tokens]
    with torch.no_grad():
        prompt: torch.Tensor = encoder(tokens)[0]
    return prompt


def _with_tied_names(model: PeftModel, trained: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors under all names of tied parameters and buffers: peft asks for each, and they are listed under one."""
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    by_tensor = {id(tensor): trained[name] for name, tensor in named if name in trained}
    return {**trained, **{name: by_tensor[id(tensor)] for name, tensor in named if id(tensor) in by_tensor}}


def _prompt_encoder(model: PeftModel, config: Any) -> torch.nn.Module:
    """A new encoder of virtual tokens, with random weights."""
    kind: Any = type(model.prompt_encoder[model.active_adapter])
    plain = copy.deepcopy(config)
    if config.peft_type != PeftType.PROMPT_TUNING:
        encoder: torch.nn.Module = kind(plain)
        return encoder
    plain.prompt_tuning_init = PromptTuningInit.RANDOM
    return PromptEmbedding(plain, torch.nn.Embedding(1, config.token_dim))


def write_adapter(
    model: PeftModel, trained: Weights, folder: Path, to_dtype: Callable[[Weights], Weights] = dict
) -> None:
    """Write an adapter directory that plain peft loads. to_dtype: casts the weights to the data type of the file."""
    name = model.active_adapter
    if hasattr(model, "rank_state"):
        model.rank_state.set_rank_pattern()
    state = adapter_state(model, trained)
    config = copy.deepcopy(model.peft_config[name])
    if getattr(model, "changed_base", False):  # a saved adapter stays as it was stored
        state = _relative_to_base(model, config, state)
    config.inference_mode = True
    config.save_pretrained(str(folder))
    _sort_names(folder / "adapter_config.json")
    keys = json.dumps(
        task_keys(cast(PreTrainedModel, model.get_base_model())), indent=2, sort_keys=True, ensure_ascii=False
    )
    (folder / TASK_CONFIG).write_text(f"{keys}\n", encoding="utf-8")
    # safetensors refuses two names of one tensor, such as tied embeddings.
    copies = {key: value.detach().cpu().contiguous().clone() for key, value in to_dtype(state).items()}
    save_file(copies, folder / WEIGHTS, {"format": "pt"})


def _sort_names(file: Path) -> None:
    """Sort the lists that peft writes from sets, whose order is another in every process."""
    config = json.loads(file.read_text(encoding="utf-8"))
    for key in ("target_modules", "exclude_modules", "feedforward_modules", "modules_to_save", "target_parameters"):
        if isinstance(config.get(key), list):
            config[key] = sorted(config[key])
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _low_rank(model: PeftModel) -> dict[str, torch.Tensor]:
    """Copies of all A and B."""
    return {
        name: parameter.detach().cpu().clone()
        for name, parameter in model.named_parameters()
        if "lora_A" in name or "lora_B" in name
    }


def _relative_to_base(model: PeftModel, config: Any, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The adapter for the unchanged base: of rank 2 r, since W - s B0 A0 + s B A = W + s [B - B0, B0] [A; A - A0].

    Differences, because [B, -B0] [A; A0] would be lost in the rounding of A and B to bf16: these are the largest parts
    of W. peft leaves the weights of embeddings as they are, so zeros follow there.
    """
    initial = {key.replace(f".{model.active_adapter}.", "."): value for key, value in model.initial_adapter.items()}
    for key, start in initial.items():
        if "lora_A" in key:
            state[key] = torch.cat([state[key].cpu(), state[key].cpu() - start], 0)
        elif "lora_B" in key:
            state[key] = torch.cat([state[key].cpu() - start, start], 1)
    for key, value in state.items():
        if "lora_embedding_A" in key:
            state[key] = torch.cat([value, torch.zeros_like(value)], 0)
        elif "lora_embedding_B" in key:
            state[key] = torch.cat([value, torch.zeros_like(value)], 1)
    factor = 2**0.5 if config.use_rslora else 2
    config.r, config.lora_alpha = 2 * config.r, config.lora_alpha * factor
    config.rank_pattern = {key: 2 * rank for key, rank in config.rank_pattern.items()}
    config.alpha_pattern = {key: alpha * factor for key, alpha in config.alpha_pattern.items()}
    config.init_lora_weights = True
    return state
