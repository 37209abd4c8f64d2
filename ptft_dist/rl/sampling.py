"""Sampling from a network. Each response follows from its seed alone, whatever is sampled beside it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from ptft_dist.config.rollouts import SamplingSettings


def response_seed(seed: int, phase: int, prompt: int, sample: int) -> int:
    """The seed of one response: a hash of the run's seed, the phase, the prompt's row and the number of the sample."""
    return int(np.random.SeedSequence([seed, phase, prompt, sample]).generate_state(1, np.uint64)[0] >> 1)


class KeyedSampling(LogitsProcessor):
    """Adds Gumbel noise to logits [B, V], so that their argmax is a sample from their softmax (Gumbel 1954).

    The noise of a row comes from the row's own generator, and so does not depend on the rows of its batch, on the
    number of ranks, or on anything that was drawn before.
    """

    def __init__(self, seeds: Sequence[int], device: torch.device) -> None:
        self.generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:  # noqa: ARG002
        uniform = torch.empty_like(scores, dtype=torch.float64)  # fp32 would have too few values near 1
        for row, generator in zip(uniform, self.generators, strict=True):
            row.uniform_(generator=generator)
        return scores.float() - uniform.log_().neg_().log_().float()  # type: ignore[return-value]


def sample(
    model: Any,
    inputs: Mapping[str, torch.Tensor],
    settings: SamplingSettings,
    seeds: Sequence[int] | None,
    *,
    pad_id: int,
    eos_ids: Sequence[int],
    together: bool = False,
) -> torch.Tensor:
    """Sample a response to each prompt: token ids, int64 [B, N], N <= max_new_tokens, padded with `pad_id`.

    Args:
        model: the network with complete weights, in evaluation mode; see `Engine.generating`.
        inputs: input_ids and attention_mask [B, P], prompts padded on the left.
        seeds: one for each prompt; None: the most probable token each time.
        together: all ranks continue until the last one has finished, because the weights are sharded.
    """
    device = inputs["input_ids"].device
    processors = LogitsProcessorList()
    if seeds is not None:
        processors.append(TemperatureLogitsWarper(float(settings.temperature)))
        if settings.top_k is not None:
            processors.append(TopKLogitsWarper(settings.top_k))
        if settings.top_p is not None:
            processors.append(TopPLogitsWarper(settings.top_p))
        if settings.min_p is not None:
            processors.append(MinPLogitsWarper(settings.min_p))
        processors.append(KeyedSampling(seeds, device))
    config = GenerationConfig(
        max_new_tokens=settings.max_new_tokens,
        do_sample=False,
        num_beams=1,
        use_cache=True,
        return_dict_in_generate=False,
        repetition_penalty=1.0,
        pad_token_id=pad_id,
        eos_token_id=list(eos_ids),
    )
    with _without_generation_config(model):
        ids: torch.Tensor = model.generate(
            **inputs, generation_config=config, logits_processor=processors, synced_gpus=together
        )
    return ids[:, inputs["input_ids"].size(1) :]


@contextlib.contextmanager
def _without_generation_config(model: Any) -> Iterator[None]:
    """`generate` fills what is unset with the network's own generation config, whose penalties and forced tokens would
    make responses that the policy does not."""
    base = getattr(model, "get_base_model", lambda: model)()
    own = base.generation_config
    base.generation_config = GenerationConfig()
    try:
        yield
    finally:
        base.generation_config = own


def until_end(ids: np.ndarray, eos_ids: Sequence[int]) -> tuple[np.ndarray, bool]:
    """The response up to its first EOS, which it includes, and whether there is one. ids: int64 [N]."""
    (ends,) = np.nonzero(np.isin(ids, list(eos_ids)))
    return (ids[: ends[0] + 1], True) if len(ends) else (ids, False)
