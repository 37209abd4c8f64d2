"""14: tokens attend to other documents of a packed row, for all or for some lengths."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from support import Vocabulary
from task_support import make_task
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

from ptft_dist.config.recipe import Recipe
from ptft_dist.data.store import Row
from ptft_dist.engine import Engine, reset_accelerate
from ptft_dist.errors import RecipeError
from ptft_dist.networks.load import build_model
from ptft_dist.session import run_probe
from ptft_dist.tasks.registry import recipe_class

VOCAB, LENGTH = 40, 8
DECODER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
NETWORKS: dict[str, dict[str, Any]] = {
    "llama": DECODER,
    "qwen3": {**DECODER, "num_key_value_heads": 2, "head_dim": 8},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 16},
    "mistral": {**DECODER, "num_key_value_heads": 2, "sliding_window": 3},
    "mamba": {"hidden_size": 16, "state_size": 4, "num_hidden_layers": 2},
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
}


def recipe(network: str, kernel: str = "auto", **clm: Any) -> Recipe:
    return recipe_class().model_validate(
        {
            "task": "clm",
            "model": {"config": {"model_type": network, **NETWORKS[network]}, "attention": kernel},
            "tokenizer": {"path": "unused"},
            "data": {"train": [{"path": "unused"}]},
            "clm": clm,
            "batch": {"global_size": 1, "micro_size": 1},
            "train": {"max_steps": 1, "precision": "fp32"},
            "run_dir": "run",
        }
    )


def build(settings: Recipe) -> PreTrainedModel:
    assert settings.model.config is not None
    keys = {key: value for key, value in settings.model.config.items() if key != "model_type"}
    config = CONFIG_MAPPING[settings.model.config["model_type"]](vocab_size=VOCAB, **keys)
    return build_model(settings.model, config, 0, AutoModelForCausalLM).eval()


def all_ways_to_pack() -> list[list[int]]:
    """The document starts of all 128 divisions of a row, from one document to eight documents of one token."""
    inner = range(1, LENGTH)
    return [[0, *chosen] for n in range(LENGTH) for chosen in itertools.combinations(inner, n)]


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@pytest.mark.parametrize("network", ["llama", "qwen3", "gpt2", "mistral"])
def test_no_division_of_a_row_lets_a_document_see_another(network: str, kernel: str) -> None:
    """In each way of packing a row, a change of one document does not change the log-probabilities of the others."""
    settings = recipe(network, kernel)
    model, task = build(settings), make_task(settings, Vocabulary(VOCAB, 0))
    divisions = all_ways_to_pack()
    ids = torch.randint(VOCAB, (len(divisions), LENGTH), generator=torch.Generator().manual_seed(0)).numpy()

    def logprobs(tokens: np.ndarray) -> torch.Tensor:
        rows = [Row(row, np.array(starts)) for row, starts in zip(tokens, divisions, strict=True)]
        with torch.no_grad():
            return task.logprobs(model, task.collate(rows).inputs, fused=False)

    before = logprobs(ids)
    for which in range(LENGTH):
        changed, others = ids.copy(), torch.ones((len(divisions), LENGTH), dtype=torch.bool)
        for i, starts in enumerate(divisions):
            if which < len(starts):
                document = slice(starts[which], [*starts, LENGTH][which + 1])
                changed[i, document] = (changed[i, document] + 7) % VOCAB
                others[i, document] = False
        after = logprobs(changed)
        torch.testing.assert_close(after[others], before[others], rtol=0, atol=1e-6)
        # The last document of eight is a single token, which predicts nothing.
        assert which == LENGTH - 1 or not torch.equal(after[~others], before[~others])


@pytest.mark.parametrize("network", ["llama", "gpt2"])
def test_a_row_without_a_second_document_is_kept_apart_from_one_with(network: str) -> None:
    """transformers detects packing for a whole batch, not for each row."""
    settings = recipe(network)
    model, task = build(settings), make_task(settings, Vocabulary(VOCAB, 0))
    ids = np.arange(LENGTH)
    whole, divided = Row(ids, np.array([0])), Row(ids, np.array([0, 4]))
    with torch.no_grad():
        together = task.logprobs(model, task.collate([whole, divided]).inputs, fused=False)
        alone = [task.logprobs(model, task.collate([row]).inputs, fused=False)[0] for row in (whole, divided)]
    torch.testing.assert_close(together[0], alone[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(together[1], alone[1], rtol=1e-5, atol=1e-6)
    assert (together[0, 4:7] - together[1, 4:7]).abs().max() > 1e-3, "where the second document begins matters"


@pytest.fixture
def engine() -> Iterator[Engine]:
    reset_accelerate()
    yield Engine("fp32", None)
    reset_accelerate()


@pytest.mark.parametrize("network", ["mamba", "bloom"])
def test_a_run_with_a_network_that_cannot_is_refused_before_it_trains(engine: Engine, network: str) -> None:
    """mamba has no attention to mask, and bloom does not read position_ids."""
    settings = recipe(network)
    model = build(settings)
    task = make_task(settings, Vocabulary(VOCAB, 0), model=model, device=engine.device)
    engine.prepare(model, settings.optim)
    with pytest.raises(RecipeError, match=r"clm\.attention: .*clm\.packing: false"):
        run_probe(engine, task)


@pytest.mark.parametrize("remedy", [{"packing": False}, {"attention": "across"}])
def test_the_remedies_that_the_message_names_are_accepted(engine: Engine, remedy: dict[str, Any]) -> None:
    settings = recipe("bloom", **remedy)
    model = build(settings)
    task = make_task(settings, Vocabulary(VOCAB, 0), model=model, device=engine.device)
    engine.prepare(model, settings.optim)
    run_probe(engine, task)
