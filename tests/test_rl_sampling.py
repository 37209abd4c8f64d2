"""Sampling: draws follow the policy's softmax, and each response from its seed alone."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from scipy.stats import chisquare
from transformers import LlamaConfig, LlamaForCausalLM

from ptft_dist.config.rollouts import SamplingSettings
from ptft_dist.rl.sampling import KeyedSampling, response_seed, sample, until_end
from ptft_dist.tasks.common.generation import left_padded

CPU = torch.device("cpu")
VOCAB, PAD, EOS = 8, 0, 7
NOT_CHANCE = 1e-4  # the seeds are fixed, so a test that passes once passes always


@pytest.fixture(scope="module")
def network() -> LlamaForCausalLM:
    """A tiny fp32 Llama with large logits, so that its choices are neither certain nor all alike."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.5,
        bos_token_id=None,
        eos_token_id=EOS,
        pad_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


def drawn(
    network: Any, prompts: Sequence[Sequence[int]], seeds: Sequence[int] | None, multiple: int = 1, **settings: Any
) -> list[list[int]]:
    """The responses up to their ends."""
    inputs = left_padded([np.array(ids, np.int64) for ids in prompts], PAD, multiple)
    settings = {"max_new_tokens": 10} | settings
    ids = sample(network, inputs, SamplingSettings(**settings), seeds, pad_id=PAD, eos_ids=[EOS])
    return [until_end(each.numpy(), [EOS])[0].tolist() for each in ids]


def probabilities(network: Any, prompt: Sequence[int], temperature: float = 1.0) -> np.ndarray:
    """Of the token after the prompt, by the network's own forward pass."""
    logits = network(input_ids=torch.tensor([list(prompt)])).logits[0, -1].double()
    return (logits / temperature).softmax(-1).detach().numpy()


def first_tokens(network: Any, prompt: Sequence[int], count: int = 4000, **settings: Any) -> np.ndarray:
    """How often each token was the first of `count` responses."""
    seeds = [response_seed(1, 2, 3, i) for i in range(count)]
    tokens = [each[0] for each in drawn(network, [prompt] * count, seeds, max_new_tokens=1, **settings)]
    return np.bincount(tokens, minlength=VOCAB)


# --- the distribution -------------------------------------------------------------------------------------------------


def test_draws_follow_the_softmax() -> None:
    logits = torch.tensor([2.0, 0.0, -1.0, 1.0, -torch.inf, 0.5])
    count = 20_000
    processor = KeyedSampling([response_seed(0, 0, 0, i) for i in range(count)], CPU)
    tokens = processor(torch.zeros(count, 1, dtype=torch.long), logits.expand(count, -1)).argmax(-1)  # type: ignore[arg-type]
    counts, expected = np.bincount(tokens.numpy(), minlength=6), count * logits.double().softmax(-1).numpy()
    assert counts[4] == 0
    possible = [0, 1, 2, 3, 5]
    assert chisquare(counts[possible], expected[possible]).pvalue > NOT_CHANCE


def test_successive_draws_of_a_row_are_independent() -> None:
    """Pairs of draws of the same generator are as frequent as the product of the probabilities."""
    count, p = 9000, torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    processor = KeyedSampling([response_seed(5, 0, 0, i) for i in range(count)], CPU)
    draws = [
        processor(torch.zeros(count, 1, dtype=torch.long), p.log().expand(count, -1)).argmax(-1)  # type: ignore[arg-type]
        for _ in range(2)
    ]
    counts = np.bincount((3 * draws[0] + draws[1]).numpy(), minlength=9)
    assert chisquare(counts, [count * float(a * b) for a, b in product(p, p)]).pvalue > NOT_CHANCE


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_the_temperature_is_that_of_the_log_probabilities(network: Any, temperature: float) -> None:
    counts = first_tokens(network, [1, 2, 3], temperature=temperature)
    expected = 4000 * probabilities(network, [1, 2, 3], temperature)
    frequent = expected > 5
    assert frequent.sum() > 2
    assert chisquare(
        counts[frequent], expected[frequent] * counts[frequent].sum() / expected[frequent].sum()
    ).pvalue > (NOT_CHANCE)
    assert counts[~frequent].sum() <= 20 + 3 * expected[~frequent].sum()


@pytest.mark.parametrize("option", ["top_k", "top_p", "min_p"])
def test_options_restrict_the_tokens(network: Any, option: str) -> None:
    p = probabilities(network, [1, 2, 3])
    order = np.argsort(-p)
    if option == "top_k":
        value, allowed = 3.0, set(order[:3])
    elif option == "top_p":  # the smallest set whose probability reaches the limit
        value = float(p[order[:2]].sum() + p[order[2]] / 2)
        allowed = set(order[:3])
    else:
        value = float((p[order[1]] + p[order[2]]) / 2 / p[order[0]])
        allowed = set(order[:2])
    given = int(value) if option == "top_k" else value
    counts = first_tokens(network, [1, 2, 3], **{option: given})
    assert set(np.flatnonzero(counts)) == allowed
    kept = sorted(allowed)
    assert chisquare(counts[kept], 4000 * p[kept] / p[kept].sum()).pvalue > NOT_CHANCE


def test_without_seeds_the_most_probable_token_is_taken(network: Any) -> None:
    (ids,) = drawn(network, [[1, 2, 3]], None)
    context = [1, 2, 3]
    for token in ids:
        assert token == probabilities(network, context).argmax()
        context.append(token)


INHERITED = {
    "no_repeat_ngram_size": 1,
    "suppress_tokens": [1, 2, 3, 4],
    "begin_suppress_tokens": [1, 2, 3, 4],
    "min_new_tokens": 10,
    "min_length": 15,
    "bad_words_ids": [[5], [6]],
    "forced_eos_token_id": 3,
    "max_time": 1e-9,
    "repetition_penalty": 2.0,
    "temperature": 0.1,
    "do_sample": True,
    "top_k": 1,
    "num_beams": 2,
    "exponential_decay_length_penalty": (2, 5.0),
    "sequence_bias": [[[5], 9.0]],
    "return_dict_in_generate": True,
}


@pytest.fixture
def generation_config(network: Any) -> Iterator[Any]:
    before = network.generation_config
    network.generation_config = type(before)(eos_token_id=EOS)
    yield network.generation_config
    network.generation_config = before


@pytest.mark.parametrize("name", INHERITED)
def test_the_networks_generation_config_has_no_effect(network: Any, generation_config: Any, name: str) -> None:
    """Else tokens come from another distribution than the policy, whose log-probabilities the ratios are made of."""
    prompts, seeds = [[1, 2, 3], [4, 5]] * 4, list(range(8))
    plain = drawn(network, prompts, seeds)
    setattr(generation_config, name, INHERITED[name])
    assert drawn(network, prompts, seeds) == plain
    assert network.generation_config is generation_config
    assert getattr(generation_config, name) == INHERITED[name]  # an export keeps it


def test_the_generation_config_under_an_adapter_has_no_effect(network: Any) -> None:
    """peft passes its own view of the generation config on."""
    adapted: Any = get_peft_model(copy.deepcopy(network), LoraConfig(target_modules="all-linear"))
    own = adapted.get_base_model().generation_config
    plain = drawn(adapted, [[1, 2, 3]] * 4, range(4))
    own.suppress_tokens = [1, 2, 3, 4]
    assert drawn(adapted, [[1, 2, 3]] * 4, range(4)) == plain == drawn(network, [[1, 2, 3]] * 4, range(4))
    assert adapted.get_base_model().generation_config is adapted.generation_config is own


# --- what a response depends on ---------------------------------------------------------------------------------------

PROMPTS = [[1, 2, 3], [4], [5, 6, 1, 2, 3, 4, 5, 6], [2, 2, 2, 2, 2], [6, 5]]


def test_a_response_does_not_depend_on_its_batch(network: Any) -> None:
    """Neither on the other rows, nor on their order, nor on padding, nor on what was drawn before."""
    seeds = [response_seed(0, 4, i, 0) for i in range(5)]
    together = drawn(network, PROMPTS, seeds)
    alone = [drawn(network, [prompt], [seed])[0] for prompt, seed in zip(PROMPTS, seeds, strict=True)]
    assert together == alone
    assert drawn(network, PROMPTS[::-1], seeds[::-1])[::-1] == alone
    assert drawn(network, PROMPTS, seeds, multiple=16) == alone
    assert len({len(each) for each in alone}) > 1  # some rows end before others


def test_a_response_follows_from_its_seed(network: Any) -> None:
    first, again, other = (drawn(network, PROMPTS, [seed + i for i in range(5)]) for seed in (10, 10, 20))
    assert first == again
    assert first != other
    different = drawn(network, [[1, 2, 3]] * 6, list(range(6)), temperature=2.0)
    assert len(set(map(tuple, different))) > 3


def test_sampling_leaves_the_global_generator_alone(network: Any) -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    drawn(network, PROMPTS, [1, 2, 3, 4, 5])
    assert torch.equal(torch.rand(4), expected)
    torch.manual_seed(9)
    first = drawn(network, PROMPTS, [1, 2, 3, 4, 5])
    torch.manual_seed(10)
    assert drawn(network, PROMPTS, [1, 2, 3, 4, 5]) == first


def test_every_response_has_a_seed_of_its_own() -> None:
    keys = list(product(range(3), range(5), range(7), range(9)))
    seeds = [response_seed(*key) for key in keys]
    assert len(set(seeds)) == len(keys)
    assert seeds == [response_seed(*key) for key in keys]
    assert all(0 <= seed < 2**63 for seed in seeds)  # what torch.Generator takes
    assert response_seed(1, 0, 0, 0) != response_seed(0, 1, 0, 0)


@pytest.mark.parametrize(
    ("ids", "ends", "expected"),
    [
        ([3, 7, 7, 0], [7], ([3, 7], True)),
        ([7], [7], ([7], True)),
        ([3, 4], [7], ([3, 4], False)),
        ([3, 5, 7], [7, 5], ([3, 5], True)),  # a stop token of the chat template
        ([3, 7, 4], [7], ([3, 7], True)),
    ],
)
def test_a_response_ends_at_its_first_end(ids: list[int], ends: list[int], expected: tuple[list[int], bool]) -> None:
    found, ended = until_end(np.array(ids), ends)
    assert (found.tolist(), ended) == expected
