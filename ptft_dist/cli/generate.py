"""`ptft generate`: see what was learned."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase


def generate(
    run: Annotated[Path, typer.Argument(help="A run directory, or a model directory.")],
    prompt: Annotated[str, typer.Option(help="The text to go on from.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="How much to write.")] = 64,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: always the likeliest token.")] = 0.8,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0, help="Sample from this share of the likelihood.")] = 0.95,
    seed: Annotated[int, typer.Option(help="The same seed gives the same text.")] = 0,
    raw: Annotated[bool, typer.Option(help="Go on from the prompt itself, also with a model that chats.")] = False,
) -> None:
    """Let the final model of a run write: go on from a text, answer a message, or rewrite a source."""
    from ptft_dist.errors import CheckpointError

    model_dir = run / "model" if (run / "model").is_dir() else run
    if not (model_dir / "config.json").is_file():
        raise CheckpointError(f"{run}: no model here; a run has one in {run / 'model'} when it has finished")

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
    ids = _encode(tokenizer, prompt, chat=chat, source=source).to(device)
    if ids.shape[1] == 0:
        raise CheckpointError("--prompt: the tokenizer makes no token of it; give some text")
    sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p} if temperature else {"do_sample": False}
    output = model.generate(
        ids, max_new_tokens=max_new_tokens, pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id, **sampling
    )
    begin = ids.shape[1] if chat else 0  # an answer stands alone
    print(str(tokenizer.decode(output[0][begin:], skip_special_tokens=True)).strip())


def _encode(tokenizer: PreTrainedTokenizerBase, prompt: str, *, chat: bool, source: bool) -> Tensor:
    """The prompt as token ids [1, T]: a message of a user, a source with its EOS, or text to go on from."""
    import torch

    if chat:
        messages = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
    ids = tokenizer(prompt, add_special_tokens=source).input_ids
    if source and ids and ids[-1] != tokenizer.eos_token_id:
        ids = [*ids, tokenizer.eos_token_id]
    return torch.tensor([ids], dtype=torch.long)
