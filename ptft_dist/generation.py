"""Generate text with a trained model: continue a text, answer a message, or rewrite a source."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from torch import Tensor
from transformers import AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase
from transformers.utils import logging

from ptft_dist.data.tokenizer import added_around
from ptft_dist.errors import CheckpointError, RecipeError

_CAUSAL, _SEQ2SEQ = "AutoModelForCausalLM", "AutoModelForSeq2SeqLM"
_AUTO_CLASSES = {"ForCausalLM": _CAUSAL, "LMHeadModel": _CAUSAL, "ForConditionalGeneration": _SEQ2SEQ}


def generate(
    model_dir: Path, prompt: str, *, max_new_tokens: int, temperature: float, top_p: float, seed: int, raw: bool
) -> str:
    """Generate one text; see `api.generate`."""
    auto_class = _auto_class(model_dir)
    source = auto_class == _SEQ2SEQ
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    with _libraries_restored():
        tokenizer = AutoTokenizer.from_pretrained(model_dir)
        model = getattr(transformers, auto_class).from_pretrained(model_dir).eval().to(device)
        torch.manual_seed(seed)
        chat = bool(tokenizer.chat_template) and not raw and not source
        prefix = source_prefix(model.config) if source and not raw else ""
        ids = encode_prompt(tokenizer, prefix + prompt, chat=chat, source=source).to(device)
        if ids.shape[1] == 0:
            raise RecipeError("prompt: the tokenizer returns no token for it. Give some text.")
        sampling: dict[str, Any] = {"do_sample": False}
        if temperature:
            sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p}
        pad_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        output = model.generate(ids, max_new_tokens=max_new_tokens, pad_token_id=pad_id, **sampling)
    begin = ids.shape[1] if chat else 0  # an answer is returned without the question
    return str(tokenizer.decode(output[0][begin:], skip_special_tokens=True)).strip()


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
        if ids and ids[-1] != tokenizer.eos_token_id:
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
    name = next((auto for ending, auto in _AUTO_CLASSES.items() if architecture.endswith(ending)), None)
    if name is None or architecture.startswith("XLNet"):  # XLNet's LMHeadModel is trained on permuted texts
        raise CheckpointError(
            f"{model_dir}: {architecture or 'a network of unknown architecture'} cannot generate text. Give a causal "
            "or sequence-to-sequence model."
        )
    return name


@contextlib.contextmanager
def _libraries_restored() -> Iterator[None]:
    """Hide the progress bars of transformers, and restore them and PyTorch's random state afterwards."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        if shown:
            logging.enable_progress_bar()
