"""Loads adapter directories for reading: the base, with embeddings for all tokens, and one or several adapters on it.

A directory that ptft has written also contains TASK_CONFIG: the keys of the network's config that its task has set.
peft stores no such keys. With a config.json, transformers would take the directory for a complete model.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel
from peft.config import PeftConfig
from safetensors import safe_open
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from ptft_dist.config.adapt import Quantization
from ptft_dist.config.token_ids import id_count
from ptft_dist.errors import RecipeError
from ptft_dist.networks.adapt import bottleneck
from ptft_dist.networks.adapt.peft_configs import TASK_TYPES, changes_base
from ptft_dist.networks.adapt.virtual import hide_virtual_tokens

TASK_CONFIG = "task_config.json"
_LABELS = ("id2label", "label2id", "problem_type")
_OTHER_KEYS = ("task_specific_params", "pad_token_id", "decoder_start_token_id")
_OF_GENERATION = ("eos_token_id", "forced_bos_token_id")


def task_keys(model: PreTrainedModel) -> dict[str, Any]:
    """The contents of TASK_CONFIG for an adapter on `model`."""
    values: dict[str, Any] = {key: getattr(model.config, key, None) for key in (*_LABELS, *_OTHER_KEYS)}
    values["architectures"] = [type(model).__name__]
    for key in _OF_GENERATION:
        values[key] = getattr(getattr(model, "generation_config", None), key, None)
    return {key: value for key, value in values.items() if value is not None}


def saved_keys(path: str | Path) -> dict[str, Any]:
    """The contents of TASK_CONFIG in an adapter directory; empty in one of other programs. Raises RecipeError."""
    file = Path(path) / TASK_CONFIG
    try:
        return dict(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else {}
    except ValueError as error:
        raise RecipeError(f"{file} cannot be read: {error}. Export the adapter again") from None


def set_generation_keys(model: PreTrainedModel, keys: Mapping[str, Any]) -> None:
    """Let a base begin and end its texts as it did when an adapter was trained. keys: see `saved_keys`."""
    for key in (*_OF_GENERATION, "decoder_start_token_id"):
        if key in keys and model.generation_config is not None:
            setattr(model.generation_config, key, keys[key])


def head_labels(path: str | Path) -> list[str]:
    """The labels of the classification head in an adapter directory, in the order of their ids; empty without one."""
    keys = saved_keys(path)
    names = keys.get("id2label") or {}
    classifies = any(architecture.endswith("Classification") for architecture in keys.get("architectures", ()))
    return [names[i] for i in sorted(names, key=int)] if classifies else []


@dataclass(frozen=True)
class AdapterFiles:
    """What an adapter directory says about its base."""

    path: Path
    config: PeftConfig
    base: str
    """An absolute directory or a Hub name."""
    revision: str | None
    keys: Mapping[str, Any]
    """The contents of TASK_CONFIG; empty in a directory of other programs."""
    quantize: Quantization | None = None
    """How the base is quantized. The directory itself does not say this."""
    trust_remote_code: bool = False
    whole: Sequence[str] = ()
    """Names of layers that are not quantized."""

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of the directory; that of the base if it has none."""
        own = (self.path / "tokenizer_config.json").is_file()
        source, revision = (str(self.path), None) if own else (self.base, self.revision)
        try:
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                source, revision=revision, trust_remote_code=self.trust_remote_code
            )
        except (OSError, ValueError) as error:
            raise RecipeError(f"{source}: the tokenizer cannot be loaded: {error}") from None
        return tokenizer

    def base_config(self) -> PretrainedConfig:
        """The base's config, without the keys of the task. Raises RecipeError if there is no base."""
        try:
            config: PretrainedConfig = AutoConfig.from_pretrained(
                self.base, revision=self.revision, trust_remote_code=self.trust_remote_code
            )
        except (OSError, ValueError) as error:
            raise RecipeError(self._no_base(str(error))) from None
        return config

    @property
    def auto_class(self) -> Any:
        """The transformers class that loads the base. Raises RecipeError if it is unknown."""
        names = {task_type: name for name, task_type in TASK_TYPES.items()}
        given = str(getattr(self.config.task_type, "value", self.config.task_type))
        architectures = self.keys.get("architectures") or self.base_config().architectures or [""]
        name = names.get(given, architectures[0])
        if not hasattr(transformers, name):
            raise RecipeError(f"{self.path}: transformers has no class {name!r} for its base. Load it in Python")
        return getattr(transformers, name)

    def load_base(self, dtype: torch.dtype | str) -> PreTrainedModel:
        """The base in evaluation mode, with the labels of the adapter. Raises RecipeError if it cannot be loaded."""
        config = self.base_config()
        config.update(self.label_keys())
        options: dict[str, Any] = {}
        if self.quantize is not None:
            from ptft_dist.networks.adapt.quantized import quantization_config

            exact = self.quantize.model_copy(update={"compute_dtype": "fp32"} if self.quantize.type == "nf4" else {})
            options["quantization_config"] = quantization_config(exact, "fp32", list(self.whole))
        torch.manual_seed(0)
        try:
            model: PreTrainedModel = self.auto_class.from_pretrained(
                self.base,
                config=config,
                revision=self.revision,
                dtype=dtype,
                ignore_mismatched_sizes=True,  # a head for other labels, which the adapter contains
                trust_remote_code=self.trust_remote_code,
                **options,
            )
        except (OSError, ValueError) as error:
            raise RecipeError(self._no_base(str(error))) from None
        if self.quantize is not None:
            from ptft_dist.networks.adapt.quantized import keep_layout

            keep_layout(model)
        return model.eval()

    def label_keys(self) -> dict[str, Any]:
        """The keys of the config with the labels of the adapter's head; empty without one."""
        labels = {key: self.keys[key] for key in _LABELS if key in self.keys}
        if "id2label" in labels:
            labels["id2label"] = {int(i): name for i, name in labels["id2label"].items()}
        elif (count := self._labels_of_head()) is not None:  # of other programs
            labels["num_labels"] = count
        return labels

    def _labels_of_head(self) -> int | None:
        """The number of labels of the classification head in the adapter's weights; None without one."""
        file = self.path / "adapter_model.safetensors"
        if not file.is_file():
            return None
        with safe_open(file, "pt") as weights:
            heads = [name for name in weights.keys() if name.endswith((".score.weight", ".classifier.weight"))]  # noqa: SIM118
            return weights.get_slice(heads[0]).get_shape()[0] if len(heads) == 1 else None

    def set_task_keys(self, model: PreTrainedModel) -> None:
        """Set the ids and other keys of the task in the config of a base that has embeddings for all tokens."""
        model.config.update({key: self.keys[key] for key in _OTHER_KEYS if key in self.keys})
        set_generation_keys(model, self.keys)

    def _no_base(self, reason: str) -> str:
        if Path(self.base).is_absolute() and not Path(self.base).is_dir():
            return (
                f"{self.path}: its base {self.base} does not exist. Restore it, or write its new directory to "
                "base_model_name_or_path in adapter_config.json"
            )
        revision = f" (revision {self.revision})" if self.revision else ""
        return f"{self.path}: its base {self.base}{revision} cannot be loaded: {reason}"


def read_adapter(path: Path, *, check_base: bool = True) -> AdapterFiles:
    """Read the configs of an adapter directory. Raises RecipeError if it is none, or if its base is missing."""
    bottleneck.register()
    try:
        config = PeftConfig.from_pretrained(str(path))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise RecipeError(f"{path} is no adapter directory: {error}") from None
    if not config.base_model_name_or_path:
        raise RecipeError(f"{path}: adapter_config.json does not name its base (base_model_name_or_path)")
    files = AdapterFiles(path, config, str(config.base_model_name_or_path), config.revision, saved_keys(path))
    if check_base:
        files.base_config()  # a missing base is reported before anything else is loaded
    return files


def load_adapters(
    adapters: Mapping[str, AdapterFiles], use: str, dtype: torch.dtype | str, base: PreTrainedModel | None = None
) -> PeftModel:
    """One base with adapters by name; `use` is active. In evaluation mode, on the CPU.

    base: the base, if it is already loaded.

    Raises:
        RecipeError: the adapters have different bases, or one does not fit.
    """
    chosen = adapters[use]
    for name, files in adapters.items():
        if not same_base(files, chosen):
            raise RecipeError(
                f"adapters {name} and {use} have different bases: {files.base} and {chosen.base}. Give adapters of one "
                "base"
            )
        if len(adapters) > 1 and (changes_base(files.config) or getattr(files.config, "bias", "none") != "none"):
            raise RecipeError(
                f"adapter {name}: {files.path} changes weights of the base when it is loaded, which the other adapters "
                "need unchanged. Load it alone"
            )
    sizes = {name: _embeddings(files) for name, files in adapters.items()}
    if len(set(sizes.values())) > 1:
        counts = ", ".join(f"{name} {size:,}" for name, size in sizes.items())
        raise RecipeError(f"adapters need different numbers of token embeddings ({counts}). Load them one by one")
    model: Any = chosen.load_base(dtype) if base is None else base
    if model.config.get_text_config().vocab_size < sizes[use]:
        torch.manual_seed(0)
        model.resize_token_embeddings(sizes[use], mean_resizing=False)
    chosen.set_task_keys(model)
    for name, files in adapters.items():
        files.config.inference_mode = True
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                if isinstance(model, PeftModel):
                    model.load_adapter(str(files.path), name, config=files.config)
                else:
                    model = PeftModel.from_pretrained(model, str(files.path), name, config=files.config)
        except (RuntimeError, ValueError, KeyError, TypeError, OSError) as error:
            raise RecipeError(f"adapter {name}: {files.path} cannot be loaded on {files.base}: {error}") from None
    if len(adapters) > 1:  # some methods cannot switch, and have only one adapter
        model.set_adapter(use, inference_mode=True)
    hide_virtual_tokens(model)
    adapted: PeftModel = model.eval()
    return adapted


def _embeddings(files: AdapterFiles) -> int:
    return max(id_count(files.tokenizer), files.base_config().get_text_config().vocab_size)


def same_base(one: AdapterFiles, other: AdapterFiles) -> bool:
    """Whether two adapters name the same base and revision."""
    places = [str(Path(each.base).resolve()) if Path(each.base).is_dir() else each.base for each in (one, other)]
    return places[0] == places[1] and one.revision == other.revision


def on_base(files: AdapterFiles, base: Path) -> AdapterFiles:
    """The adapter on the model directory `base`, which is its own base or replaces a missing one.

    Raises:
        RecipeError: its own base is another one.
    """
    own = Path(files.base)
    if own.is_dir() and own.resolve() != base.resolve():
        raise RecipeError(f"{files.path} was trained on {files.base}, not on {base}. Give its own base")
    return replace(files, base=str(base), revision=None)
