"""`ptft generate`: text from a trained model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PretrainedConfig, PreTrainedTokenizerBase


def generate(
    run: Annotated[Path, typer.Argument(help="A run directory, or a model directory.")],
    prompt: Annotated[str, typer.Option(help="A text to continue, a message to answer, or a source.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate.")] = 64,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: greedy decoding.")] = 0.8,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0, help="Nucleus sampling.")] = 0.95,
    seed: Annotated[int, typer.Option(help="The same seed gives the same text.")] = 0,
    raw: Annotated[bool, typer.Option(help="Continue the prompt itself: no chat template, no seq2seq prefix.")] = False,
) -> None:
    """Generate text with the final model of a run: continue a text, answer a message, or rewrite a source."""
    from ptft_dist.errors import CheckpointError

    model_dir = run / "model" if (run / "model").is_dir() else run
    if not (model_dir / "config.json").is_file():
        raise CheckpointError(f"{run}: there is no model. A finished run has one in {run / 'model'}.")

    kinds = {"ForCausalLM": "AutoModelForCausalLM", "LMHeadModel": "AutoModelForCausalLM"}
    kinds["ForConditionalGeneration"] = "AutoModelForSeq2SeqLM"
    architecture = str((json.loads((model_dir / "config.json").read_text()).get("architectures") or [""])[0])
    kind = next((auto for ending, auto in kinds.items() if architecture.endswith(ending)), None)
    if kind is None or architecture.startswith("XLNet"):
        raise CheckpointError(f"{model_dir}: a {architecture or 'network of unknown kind'} cannot write texts")

    import torch
    import transformers
    from transformers import AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    model = getattr(transformers, kind).from_pretrained(model_dir).eval()
    model.to(device)
    torch.manual_seed(seed)
    source = "Seq2Seq" in kind
    chat = bool(tokenizer.chat_template) and not raw and not source
    prefix = source_prefix(model.config) if source and not raw else ""
    ids = encode_prompt(tokenizer, prefix + prompt, chat=chat, source=source).to(device)
    if ids.shape[1] == 0:
        raise CheckpointError("--prompt: the tokenizer makes no token of it. Give some text.")
    sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p} if temperature else {"do_sample": False}
    pad_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    output = model.generate(ids, max_new_tokens=max_new_tokens, pad_token_id=pad_id, **sampling)
    begin = ids.shape[1] if chat else 0  # an answer is printed without the question
    print(str(tokenizer.decode(output[0][begin:], skip_special_tokens=True)).strip())


def source_prefix(config: PretrainedConfig) -> str:
    """The prefix of every source that a seq2seq model was trained with, as its export says."""
    return str(((config.task_specific_params or {}).get("ptft") or {}).get("prefix") or "")


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str, *, chat: bool, source: bool) -> Tensor:
    """The prompt as token ids [1, T]: a user's message, a source with its EOS, or a text to continue, which begins with
    what the tokenizer puts before a text (BOS) and does not end with what it puts behind one."""
    import torch

    from ptft_dist.data.tokenizer import added_around

    if chat:
        messages = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
    if source:
        ids = tokenizer(prompt).input_ids
        if ids and ids[-1] != tokenizer.eos_token_id:
            ids = [*ids, tokenizer.eos_token_id]
    else:
        before, _ = added_around(tokenizer)
        ids = [*before, *tokenizer(prompt, add_special_tokens=False).input_ids]
    return torch.tensor([ids], dtype=torch.long)
