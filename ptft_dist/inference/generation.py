"""Generate text with a trained model: continue a text, answer a message, or rewrite a source."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from torch import Tensor
from transformers import AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer
from transformers.utils import logging

from ptft_dist.data.tokenizer import added_around, after_answer
from ptft_dist.errors import CheckpointError, RecipeError
from ptft_dist.networks.names import is_adapter
from ptft_dist.tasks.common.control_tokens import ControlTokens

_CAUSAL, _SEQ2SEQ = "AutoModelForCausalLM", "AutoModelForSeq2SeqLM"
_AUTO_CLASSES = {"ForCausalLM": _CAUSAL, "LMHeadModel": _CAUSAL, "ForConditionalGeneration": _SEQ2SEQ}

_ALL_TOKENS = {"top_k": 0, "top_h": None, "min_p": None, "typical_p": 1.0, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0}
"""Nothing but top_p limits the tokens that are sampled from. transformers has top_k: 50 otherwise."""

_ANSWERING = ("ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")


@dataclass(frozen=True)
class Sampling:
    """How the tokens of a text are chosen."""

    max_new_tokens: int
    temperature: float
    """0: greedy decoding."""
    top_p: float
    """Nucleus sampling (Holtzman et al. 2020)."""
    seed: int


def generate(
    model_dir: Path,
    prompt: str,
    sampling: Sampling,
    *,
    raw: bool | None,
    adapters: Mapping[str, Path],
    use: str | None = None,
) -> str:
    """Generate one text; see `api.generate`."""
    with libraries_restored():
        model, tokenizer = load_network(model_dir, adapters, use)
        source = bool(model.config.is_encoder_decoder)
        model.to(available_device())
        torch.manual_seed(sampling.seed)
        chat = bool(tokenizer.chat_template) and not raw and not source
        prefix = source_prefix(model.config) if source and not raw else ""
        ids = encode_prompt(tokenizer, prefix + prompt, chat=chat, source=source).to(model.device)
        if ids.shape[1] == 0:
            raise RecipeError("prompt: the tokenizer returns no token for it. Give some text.")
        _check_positions(model, ids.shape[1], sampling.max_new_tokens)
        output = continue_prompt(model, tokenizer, ids, sampling, chat=chat)
    begin = ids.shape[1] if chat else 0  # an answer is returned without the question
    return str(tokenizer.decode(output[begin:], skip_special_tokens=True)).strip()


def _check_positions(model: Any, prompt: int, new: int) -> None:
    """Raises RecipeError if prompt and text have more tokens than a table of positions has rows. Rotary positions have
    no table."""
    config = model.config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None)
    if not isinstance(positions, int) or positions <= 0 or getattr(config, "rope_parameters", None):
        return
    virtual = getattr(getattr(model, "active_peft_config", None), "num_virtual_tokens", None) or 0
    needed = max(prompt, new) if model.config.is_encoder_decoder else prompt + new - 1  # nothing follows the last one
    if needed + virtual > positions:
        raise RecipeError(
            f"prompt: it has {prompt:,} tokens, and the text up to {new:,}: more than the model's "
            f"max_position_embeddings ({positions:,}). Shorten it, or lower max_new_tokens"
        )


def available_device() -> torch.device:
    """The accelerator of this process, or the CPU."""
    return torch.accelerator.current_accelerator() or torch.device("cpu")


def continue_prompt(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    ids: Tensor,
    sampling: Sampling,
    streamer: BaseStreamer | None = None,
    *,
    chat: bool = False,
) -> Tensor:
    """Generate tokens after a prompt [1, T]: int64 [T + N] with the prompt; of an encoder-decoder the decoder's [N].

    How tokens are chosen follows from `sampling` alone; penalties, forced tokens and stop strings of the network's
    generation config apply.

    Args:
        chat: the text is an answer, which ends with its turn, whether or not the network's config says so.
    """
    options: dict[str, Any] = {"do_sample": False, "num_beams": 1, "num_return_sequences": 1}
    if sampling.temperature:
        options |= _ALL_TOKENS | {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p}
    pad_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    options |= {"max_new_tokens": sampling.max_new_tokens, "pad_token_id": pad_id}
    if streamer is not None:
        options["streamer"] = streamer
    if chat and (turn := ControlTokens(tokenizer).of(after_answer(tokenizer))):
        own = model.generation_config.eos_token_id
        ends = [tokenizer.eos_token_id, turn[0], *(own if isinstance(own, list) else [own])]
        options["eos_token_id"] = [i for i in dict.fromkeys(ends) if i is not None]
    # Without a mask, transformers takes tokens of the prompt that are PAD for padding.
    output: Tensor = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        tokenizer=tokenizer,
        return_dict_in_generate=False,
        **options,
    )
    return output[0]


def load_network(model_dir: Path, adapters: Mapping[str, Path], use: str | None) -> tuple[Any, PreTrainedTokenizerBase]:
    """The network with its active adapter, if any, in evaluation mode, and the tokenizer.

    Raises:
        CheckpointError: there is no model that generates text.
        RecipeError: an adapter or its base cannot be loaded.
    """
    own = {"default": model_dir} if is_adapter(model_dir) else {}
    if not own and not adapters:
        auto_class = _auto_class(model_dir)
        tokenizer = AutoTokenizer.from_pretrained(model_dir)
        return getattr(transformers, auto_class).from_pretrained(model_dir).eval(), tokenizer
    from ptft_dist.networks.adapt.reading import load_adapters, on_base, read_adapter

    if twice := own.keys() & adapters.keys():
        raise RecipeError(
            f"adapter {', '.join(twice)}: this is the name of the adapter in {model_dir}. Use another name"
        )
    files = {name: read_adapter(path, check_base=bool(own)) for name, path in {**own, **adapters}.items()}
    if not own:
        files = {name: on_base(each, model_dir) for name, each in files.items()}
    chosen = next(reversed(files)) if use is None else use
    if chosen not in files:
        raise RecipeError(f"there is no adapter {use}. Adapters: {', '.join(files)}")
    network, file = files[chosen].auto_class.__name__, files[chosen]
    _check_generates(network, file.base_config().model_type, file.path)
    model = load_adapters(files, chosen, "auto")
    return model, file.tokenizer


def source_prefix(config: PretrainedConfig) -> str:
    """The source prefix that an encoder-decoder was trained with, from its exported config."""
    return str(((getattr(config, "task_specific_params", None) or {}).get("ptft") or {}).get("prefix") or "")


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str, *, chat: bool, source: bool) -> Tensor:
    """The prompt as token ids [1, T]: a user's message, a source with EOS, or a text to continue.

    A text to continue gets the special tokens that the tokenizer adds before a text (BOS), but not those after it.
    """
    if chat:
        messages = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return cast(Tensor, tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids)
    if source:
        ids = tokenizer(prompt).input_ids
        if ids and tokenizer.eos_token_id not in ids[-2:]:  # mBART's language code comes after it
            ids = [*ids, tokenizer.eos_token_id]
    else:
        before, _ = added_around(tokenizer)
        ids = [*before, *tokenizer(prompt, add_special_tokens=False).input_ids]
    return torch.tensor([ids], dtype=torch.long)


def _auto_class(model_dir: Path) -> str:
    """The transformers class that loads the model. Raises CheckpointError if it cannot generate text."""
    try:
        config = json.loads((model_dir / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{model_dir / 'config.json'} cannot be read: {error}. Export the model again.") from None
    architecture = str((config.get("architectures") or [""])[0])
    return _check_generates(architecture, str(config.get("model_type")), model_dir)


def _check_generates(architecture: str, model_type: str, path: Path) -> str:
    """The auto class of an architecture, or the auto class itself. Raises CheckpointError if it generates no text."""
    classes = {**_AUTO_CLASSES, _CAUSAL: _CAUSAL, _SEQ2SEQ: _SEQ2SEQ}
    name = next((auto for ending, auto in classes.items() if architecture.endswith(ending)), None)
    # XLNet's LMHeadModel is trained on permuted texts.
    if name is None or architecture.startswith("XLNet") or model_type == "xlnet":
        run = path.parent if path.name == "model" else path
        answers = f" Its answers to rows: ptft predict {run} --file rows.jsonl --out answers.jsonl"
        raise CheckpointError(
            f"{path}: {architecture or 'a network of unknown architecture'} cannot generate text. Give a causal "
            f"or sequence-to-sequence model.{answers if architecture.endswith(_ANSWERING) else ''}"
        )
    return name


@contextlib.contextmanager
def libraries_restored() -> Iterator[None]:
    """Hide the progress bars of transformers, and restore them and PyTorch's random state afterwards."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        if shown:
            logging.enable_progress_bar()
