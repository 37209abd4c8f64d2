"""Exports the final weights as a Hugging Face model directory, which transformers 4.57 can also load."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import save_file
from transformers import GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase

from ptft_dist.config.recipe import ModelSection
from ptft_dist.errors import RecipeError
from ptft_dist.networks.critic import CRITIC, VALUE_HEAD
from ptft_dist.networks.facts import NetworkFacts
from ptft_dist.networks.load import DTYPES
from ptft_dist.networks.rounding import kept_change

NO_LIMIT = 10**9
"""Tokenizers without a limit have model_max_length 10^30."""
_ROPE_KEYS: dict[str, dict[str, str]] = {
    "gpt_neox": {"theta": "rotary_emb_base", "share": "rotary_pct"},
    "gpt_neox_japanese": {"theta": "rotary_emb_base", "share": "rotary_pct"},
    "modernbert": {"theta": "global_rope_theta", "local": "local_rope_theta"},
    "modernbert-decoder": {"theta": "global_rope_theta", "local": "local_rope_theta"},
}
"""model_type -> its key names in transformers 4, if they differ from the usual ones."""


class Writer(Protocol):
    """The methods of the engine that export uses."""

    is_main: bool

    def barrier(self) -> None: ...

    def full_state_dict(self) -> dict[str, torch.Tensor]:
        """All weights by name on rank 0; undefined on other ranks. All ranks must call it."""

    def trained_state_dict(self) -> dict[str, torch.Tensor]:
        """Trained parameters and buffers by name on rank 0; undefined on other ranks. All ranks must call it."""


@dataclass(frozen=True)
class Export:
    """The contents of an exported directory."""

    model: Any
    """The network; a PeftModel if an adapter was trained, which is exported without its base."""
    tokenizer: PreTrainedTokenizerBase
    network: NetworkFacts
    dtype: torch.dtype
    """Data type of the weights."""
    card: str | None = None
    """The text of README.md."""
    start: ModelSection | None = None
    """The network that was trained on from, to see how much of the change remains."""


def export(engine: Writer, content: Export, target: Path) -> float | None:
    """Write the current weights to `target`, atomically. All ranks must call it.

    Returns:
        On rank 0, the share of the weights' change that their data type keeps, if it is known; see `kept_change`.

    Raises:
        RecipeError: the weights overflow the data type.
    """
    # Hidden names: a user may have directories named model.old or model.partial.
    partial, old = (target.with_name(f".{target.name}.{kind}") for kind in ("partial", "old"))
    if engine.is_main:
        shutil.rmtree(partial, ignore_errors=True)
    engine.barrier()
    adapter = hasattr(content.model, "peft_config")
    state = engine.trained_state_dict() if adapter else engine.full_state_dict()
    kept = None
    if engine.is_main:
        head = {name: state.pop(name) for name in list(state) if name.startswith(f"{VALUE_HEAD}.")}
        critic = {name: state.pop(name) for name in list(state) if name.startswith(f"{CRITIC}.")}
        if adapter:
            from ptft_dist.networks.adapt.adapters import write_adapter

            write_adapter(content.model, state, partial, lambda weights: cast_weights(weights, content.dtype))
            _write_tokenizer(content, partial)
        else:
            write_model(content, state, partial)
        if head:
            save_file({name: x.contiguous().cpu() for name, x in head.items()}, partial / f"{VALUE_HEAD}.safetensors")
            _give_usual_modes(partial)
        if critic:
            own = {name.removeprefix(f"{CRITIC}."): x for name, x in critic.items()}
            write_model(replace(content, model=content.model.critic), own, partial / CRITIC)
        if content.card is not None:
            (partial / "README.md").write_text(content.card, encoding="utf-8")
        shutil.rmtree(old, ignore_errors=True)
        if target.exists():
            target.rename(old)
        partial.rename(target)
        shutil.rmtree(old, ignore_errors=True)
        if content.start is not None and not adapter:
            kept = kept_change(content.start, content.model.base_model_prefix, state, content.dtype)
    return kept


def require_free(target: Path) -> None:
    """Raises RecipeError if `target` exists and is not an empty directory."""
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise RecipeError(f"{target}: already exists and is not empty. Choose another directory, or remove it")


def write_model(content: Export, state: Mapping[str, torch.Tensor], folder: Path) -> None:
    """Write weights `state`, config and tokenizer to `folder`. The network in memory does not change.

    Raises:
        RecipeError: the weights overflow the data type.
    """
    model = content.model
    training_config, generation = model.config, model.generation_config if model.can_generate() else None
    model.config = copy.deepcopy(training_config)
    model.config.use_cache = True
    if generation is not None:
        model.generation_config = GenerationConfig()
    try:
        model.save_pretrained(folder, state_dict=cast_weights(state, content.dtype))
    finally:
        model.config = training_config
        if generation is not None:
            model.generation_config = generation
    if generation is not None:
        # Some bases have values for sampling without do_sample. transformers reads such a config, and saves it as it
        # was read, but refuses to save one that was changed since, such as its EOS.
        generation.to_json_file(folder / "generation_config.json", keys_to_pop=["compile_config"])
    more = {"dtype": str(content.dtype).removeprefix("torch."), **renamed_keys(model.config)}
    _edit(folder / "config.json", lambda config: with_legacy_rope(config) | more)
    _write_tokenizer(content, folder)


def _write_tokenizer(content: Export, folder: Path) -> None:
    """Write the tokenizer, and give all files their usual modes."""
    content.tokenizer.save_pretrained(folder)
    _edit(folder / "tokenizer_config.json", lambda config: portable_tokenizer(config, content.network.max_positions))
    _give_usual_modes(folder)


def _give_usual_modes(folder: Path) -> None:
    """Give all files the mode that follows from the umask; safetensors writes 0600."""
    mode = (folder / "tokenizer_config.json").stat().st_mode
    for file in folder.iterdir():
        if file.is_file():
            file.chmod(mode)


def export_dtype(wanted: str, section: ModelSection, config: PretrainedConfig) -> torch.dtype:
    """The data type of exported weights: `save.dtype`; `auto` is that of the weights in model.path, and fp32 for an
    adapter.

    config: the config as it was read, before a network was built from it in fp32.
    """
    if wanted != "auto":
        return DTYPES[wanted]
    source = None if section.path is None or section.adapt.adds_adapter else config.dtype
    return source if isinstance(source, torch.dtype) and source in DTYPES.values() else torch.float32


def cast_weights(state: Mapping[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Cast floating-point weights to `dtype`; tied weights remain one tensor. Raises RecipeError at an overflow."""
    done: dict[tuple[int, tuple[int, ...], tuple[int, ...]], torch.Tensor] = {}
    weights = {}
    for name, tensor in state.items():
        if not tensor.is_floating_point() or tensor.dtype == dtype:
            weights[name] = tensor
            continue
        place = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride())
        if place not in done:
            done[place] = tensor.to(dtype)
            if dtype == torch.float16 and tensor.abs().max() > torch.finfo(dtype).max:
                raise RecipeError(
                    f"save.dtype: {name} has values above {torch.finfo(dtype).max:.0f}, the limit of fp16. Set "
                    "save.dtype: bf16 or fp32 and start again; training resumes from the last checkpoint"
                )
        weights[name] = done[place]
    return weights


def with_legacy_rope(config: dict[str, Any]) -> dict[str, Any]:
    """Add the config keys of rotary position embeddings that transformers 4 reads.

    transformers 5 stores them in `rope_parameters`. transformers 4 ignores this key silently, and would use the default
    theta without scaling.
    """
    if isinstance(text := config.get("text_config"), dict):
        config = {**config, "text_config": with_legacy_rope(text)}
    rope = config.get("rope_parameters")
    if not rope:
        return config
    by_layer = [each for each in rope.values() if isinstance(each, dict)]
    main = (rope.get("full_attention") or by_layer[0]) if by_layer else rope
    local = rope.get("sliding_attention") if by_layer else None
    names = _ROPE_KEYS.get(config["model_type"], {})
    legacy = {names.get("theta", "rope_theta"): main.get("rope_theta")}
    if (share := main.get("partial_rotary_factor")) is not None:
        legacy[names.get("share", "partial_rotary_factor")] = share
    if local is not None:
        legacy[names.get("local", "rope_local_base_freq")] = local["rope_theta"]
    if main.get("rope_type", "default") != "default":
        own = ("rope_theta", "partial_rotary_factor")  # keys outside of rope_scaling
        legacy["rope_scaling"] = {key: value for key, value in main.items() if key not in own}
    return config | legacy


def renamed_keys(config: PretrainedConfig) -> dict[str, Any]:
    """Config keys that transformers 5 has renamed, under the names of transformers 4: the number of experts."""
    old, new = "num_experts", "num_local_experts"
    return {old: getattr(config, new)} if config.attribute_map.get(old) == new else {}


def portable_tokenizer(config: dict[str, Any], max_positions: int | None) -> dict[str, Any]:
    """A tokenizer_config.json that transformers 4 can load, with the network's positions as model_max_length.

    Without a limit, `truncation=True` does not truncate, and a pipeline fails on a long text.
    """
    config = {key: value for key, value in config.items() if key not in ("is_local", "local_files_only")}
    if config.get("tokenizer_class") == "TokenizersBackend":  # unknown to transformers 4; both know the older name
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(more := config.pop("extra_special_tokens", None), list):  # transformers 4 expects a dictionary
        config["additional_special_tokens"] = more
    elif more is not None:
        config["extra_special_tokens"] = more
    limits = [limit for limit in (config.get("model_max_length"), max_positions) if limit and limit < NO_LIMIT]
    return config | ({"model_max_length": min(limits)} if limits else {})


def _edit(path: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(change(config), indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
