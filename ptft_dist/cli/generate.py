"""`ptft generate`: see what was learned."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def generate(
    run: Annotated[Path, typer.Argument(help="A run directory, or a model directory.")],
    prompt: Annotated[str, typer.Option(help="The text to go on from.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="How much to write.")] = 64,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: always the likeliest token.")] = 0.8,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0, help="Sample from this share of the likelihood.")] = 0.95,
    seed: Annotated[int, typer.Option(help="The same seed gives the same text.")] = 0,
) -> None:
    """Continue a prompt with the final model of a run."""
    from ptft_dist.errors import CheckpointError

    model_dir = run / "model" if (run / "model").is_dir() else run
    if not (model_dir / "config.json").is_file():
        raise CheckpointError(f"{run}: no model here; a run has one in {run / 'model'} when it has finished")

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    model = AutoModelForCausalLM.from_pretrained(model_dir).eval()
    model.to(device)
    torch.manual_seed(seed)
    ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt").input_ids.to(device)
    if ids.shape[1] == 0:
        raise CheckpointError("--prompt: the tokenizer makes no token of it; give some text")
    sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p} if temperature else {"do_sample": False}
    output = model.generate(
        ids, max_new_tokens=max_new_tokens, pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id, **sampling
    )
    print(tokenizer.decode(output[0], skip_special_tokens=True))
