"""Causal language modelling against hand computation, transformers' loss, and unpacked documents."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from support import Vocabulary
from task_support import for_model, make_task
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

from ptft_dist.config.recipe import Recipe
from ptft_dist.data.store import Row
from ptft_dist.errors import RecipeError
from ptft_dist.tasks.clm.task import CausalLM
from ptft_dist.tasks.protocol import Batch
from ptft_dist.tasks.registry import recipe_class

VOCAB, PAD = 40, 39
TINY: dict[str, dict[str, Any]] = {
    "llama": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4},
    "qwen3": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
    },
    "gpt2": {
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 64,
        "resid_pdrop": 0,
        "embd_pdrop": 0,
        "attn_pdrop": 0,
    },
    "marian": {
        "d_model": 32,
        "decoder_layers": 2,
        "decoder_attention_heads": 4,
        "decoder_ffn_dim": 48,
        "is_decoder": True,
        "pad_token_id": PAD,
        "decoder_vocab_size": VOCAB,
    },
    "mamba": {"hidden_size": 16, "state_size": 4, "num_hidden_layers": 2},
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """More threads do not help for such small networks."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def recipe(**clm: Any) -> Recipe:
    return recipe_class().model_validate(
        {
            "task": "clm",
            "model": {"config": {"model_type": "llama"}},
            "tokenizer": {"train": {}},
            "data": {"train": [{"source": "python-stdlib"}]},
            "clm": clm,
            "batch": {"global_size": 1, "micro_size": 1},
            "train": {"max_steps": 1},
            "run_dir": "run",
        }
    )


def clm(**settings: Any) -> CausalLM:
    task = make_task(recipe(**settings), Vocabulary(VOCAB, PAD))
    assert isinstance(task, CausalLM)
    return task


def network(model_type: str, **kernel: str) -> PreTrainedModel:
    """Random weights, larger than usual, so that attention is far from uniform."""
    model = fresh_network(model_type, **kernel)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(5)
    return model


def fresh_network(model_type: str, **kernel: str) -> PreTrainedModel:
    torch.manual_seed(0)
    # With a cache transformers does not look at position_ids for packed documents; build_model switches it off too.
    config = CONFIG_MAPPING[model_type](vocab_size=VOCAB, use_cache=False, **TINY[model_type])
    return AutoModelForCausalLM.from_config(config, **kernel)


def row(*documents: list[int]) -> Row:
    starts = np.cumsum([0, *map(len, documents)])[:-1]
    return Row(np.concatenate(documents), starts)


def random_documents(*lengths: int, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(VOCAB, (length,), generator=generator).tolist() for length in lengths]


def columns(batch: Batch) -> dict[str, list[list[int]]]:
    return {key: tensor.tolist() for key, tensor in batch.inputs.items()}


# --- collate ----------------------------------------------------------------------------------------------------------


def test_collate_packed_rows_by_hand() -> None:
    batch = clm().collate([row([1, 2, 3], [4, 5, 6, 7]), row([8, 9], [10], [11])])
    assert columns(batch) == {
        "input_ids": [[1, 2, 3, 4, 5, 6, 7], [8, 9, 10, 11, PAD, PAD, PAD]],
        # the last token of a document does not predict the first of the next
        "targets": [[2, 3, -100, 5, 6, 7, -100], [9, -100, -100, -100, -100, -100, -100]],
        "position_ids": [[0, 1, 2, 0, 1, 2, 3], [0, 1, 0, 0, 0, 1, 2]],
    }
    assert (batch.count, batch.tokens) == (6, 11)


def test_collate_rows_that_may_see_across_documents() -> None:
    batch = clm(attention="across").collate([row([1, 2, 3], [4, 5]), row([6, 7, 8])])
    assert columns(batch) == {
        "input_ids": [[1, 2, 3, 4, 5], [6, 7, 8, PAD, PAD]],
        "targets": [[2, 3, 4, 5, -100], [7, 8, -100, -100, -100]],
    }
    assert (batch.count, batch.tokens) == (6, 8)


def test_collate_a_document_a_row() -> None:
    batch = clm(packing=False).collate([row([1, 2]), row([3, 4, 5, 6])])
    assert columns(batch) == {
        "input_ids": [[1, 2, PAD, PAD], [3, 4, 5, 6]],
        "targets": [[2, -100, -100, -100], [4, 5, 6, -100]],
    }
    assert (batch.count, batch.tokens) == (4, 6)


def test_a_token_that_is_the_padding_token_still_counts() -> None:
    batch = clm(packing=False).collate([row([1, PAD]), row([3, PAD, 5])])
    assert columns(batch)["targets"] == [[PAD, -100, -100], [PAD, 5, -100]]


def test_on_an_accelerator_rows_are_padded_to_eights() -> None:
    task = make_task(recipe(packing=False), Vocabulary(VOCAB, PAD), device=torch.device("cuda"))
    assert task.collate([row(list(range(9)))]).inputs["input_ids"].shape == (1, 16)
    assert task.collate([row(list(range(8)))]).inputs["input_ids"].shape == (1, 8)


# --- loss -------------------------------------------------------------------------------------------------------------


def gradients(model: nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_loss(model: nn.Module, loss: torch.Tensor, expected: torch.Tensor) -> None:
    """In value to 1e-5, and in every gradient to 1e-4 of its size."""
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    mine, theirs = gradients(model, loss), gradients(model, expected)
    assert mine.keys() == theirs.keys()
    for name in mine:
        assert (mine[name] - theirs[name]).norm() <= 1e-4 * theirs[name].norm() + 1e-7, name


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gpt2"])
def test_padded_rows_cost_what_transformers_says(model_type: str) -> None:
    """It gets labels and an attention mask; ours has neither, since no token sees the padding to its right."""
    model, documents = network(model_type), random_documents(3, 11, 7, 2)
    batch = clm(packing=False).collate([row(ids) for ids in documents])
    ids = torch.full((4, 11), PAD)
    mask = torch.zeros((4, 11), dtype=torch.long)
    for i, document in enumerate(documents):
        ids[i, : len(document)] = torch.tensor(document)
        mask[i, : len(document)] = 1
    labels = ids.masked_fill(mask == 0, -100)
    theirs = model(input_ids=ids, attention_mask=mask, labels=labels).loss
    assert batch.count == 2 + 10 + 6 + 1
    assert_same_loss(model, clm().loss(model, batch.inputs).loss_sum, theirs * batch.count)


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gpt2"])
def test_packed_rows_cost_what_transformers_says(model_type: str) -> None:
    model, documents = network(model_type), random_documents(5, 9, 2, 12)
    batch = clm().collate([row(*documents[:2]), row(*documents[2:])])
    ids = torch.tensor([documents[0] + documents[1], documents[2] + documents[3]])
    positions = torch.tensor([[*range(5), *range(9)], [*range(2), *range(12)]])
    labels = ids.masked_fill(positions == 0, -100)
    theirs = model(input_ids=ids, position_ids=positions, labels=labels).loss
    assert batch.count == 4 + 8 + 1 + 11
    assert_same_loss(model, clm().loss(model, batch.inputs).loss_sum, theirs * batch.count)


def alone(model: nn.Module, document: list[int]) -> torch.Tensor:
    """The summed loss of a document by itself, from its logits."""
    logits = model(input_ids=torch.tensor([document])).logits[0]
    logprobs = torch.log_softmax(logits, dim=-1)
    costs = [-logprobs[t, token] for t, token in enumerate(document[1:])]
    return torch.stack(costs).sum() if costs else logits.sum() * 0


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gpt2"])
def test_packed_documents_cost_as_much_as_alone(model_type: str, kernel: str) -> None:
    model, task = network(model_type, attn_implementation=kernel), clm()
    rows = [[1, 6, 1, 1, 9], [18], [4, 14], [2, 2, 2], [1, 1]]
    documents = [random_documents(*lengths, seed=i) for i, lengths in enumerate(rows)]
    batch = task.collate([row(*packed) for packed in documents])
    expected = torch.stack([alone(model, document) for packed in documents for document in packed]).sum()
    assert_same_loss(model, task.loss(model, batch.inputs).loss_sum, expected)


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_rows_that_may_see_across_cost_as_one_document(model_type: str) -> None:
    model, task = network(model_type), clm(attention="across")
    documents = random_documents(4, 7, 3)
    batch = task.collate([row(*documents), row(documents[1])])
    expected = alone(model, [token for document in documents for token in document]) + alone(model, documents[1])
    assert_same_loss(model, task.loss(model, batch.inputs).loss_sum, expected)
    separately = sum(alone(model, document).item() for document in [*documents, documents[1]])
    assert abs(separately - expected.item()) > 0.1, "the test can tell the two apart"


def test_a_batch_without_targets_costs_nothing() -> None:
    model, task = network("llama"), clm()
    inputs = task.collate([row([5, 6, 7])]).inputs
    loss = task.loss(model, {**inputs, "targets": torch.full((1, 3), -100)}).loss_sum
    assert loss.item() == 0
    assert all(not gradient.any() for gradient in gradients(model, loss).values())


def test_perplexity_is_the_exponential_of_the_mean_loss() -> None:
    task = clm()
    assert task.eval_metrics({"loss": 3.0}) == {
        "loss": 3.0,
        "perplexity": pytest.approx(20.0855369),
    }
    # JSON has no infinity: exp(700) is about the largest float.
    assert task.eval_metrics({"loss": 1e6})["perplexity"] == math.exp(700)


# --- the probe --------------------------------------------------------------------------------------------------------


def ask(task: CausalLM, model: nn.Module) -> None:
    probe = task.probe()
    assert probe is not None
    with torch.no_grad():
        probe.check(probe.outputs(model, probe.inputs))


class Changed(nn.Module):
    """A network whose inputs pass through `change` first."""

    def __init__(self, model: nn.Module, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
        super().__init__()
        self.model, self.change = model, change

    def forward(self, **inputs: Any) -> Any:
        return self.model(**self.change(inputs))


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gpt2"])
def test_networks_that_keep_documents_apart_are_accepted(model_type: str) -> None:
    ask(clm(), network(model_type).eval())


def test_a_network_without_attention_lets_documents_see_each_other() -> None:
    with pytest.raises(
        RecipeError, match=r"clm\.attention: .*attend to other documents.*clm\.packing: false.*clm\.attention: across"
    ):
        ask(clm(), network("mamba").eval())


def test_a_network_that_ignores_positions_is_refused() -> None:
    def drop(inputs: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in inputs.items() if key != "position_ids"}

    with pytest.raises(RecipeError, match="attend to other documents"):
        ask(clm(), Changed(network("llama").eval(), drop))


def test_a_network_that_counts_positions_on_through_the_row_is_refused() -> None:
    """It may well keep documents apart; but one that begins at position 8 is not the document alone."""

    def count_on(inputs: dict[str, Any]) -> dict[str, Any]:
        # A gap of more than one position also tells transformers that another document begins.
        positions = inputs["position_ids"]
        return {**inputs, "position_ids": positions + 20 * (positions == 0).cumsum(dim=-1) - 20}

    for model_type in [
        "gpt2",
        "marian",
    ]:  # marian leaves position_ids unread, and so lightly that fresh weights hide it
        model = fresh_network(model_type).eval()
        with pytest.raises(RecipeError, match="attend to other documents"):
            ask(clm(), Changed(model, count_on) if model_type == "gpt2" else model)


def test_a_network_that_gives_nan_is_refused() -> None:
    model = network("llama").eval()
    with torch.no_grad():
        model.get_output_embeddings().weight[0] = float("nan")
    with pytest.raises(RecipeError):
        ask(clm(), model)


def test_only_isolated_rows_of_the_probe_have_positions_that_restart() -> None:
    assert "position_ids" not in clm(packing=False).probe().inputs
    assert "position_ids" not in clm(attention="across").probe().inputs
    assert "position_ids" in clm().probe().inputs


class FusedHead(nn.Module):
    """Log-probabilities as the fused head returns them, computed from the logits and then bent by `bend`."""

    def __init__(self, model: nn.Module, bend: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.model, self.bend = model, bend

    def forward(self, shift_labels: torch.Tensor | None = None, fused_lm_head: bool = False, **inputs: Any) -> Any:
        output = self.model(**inputs)
        if fused_lm_head:
            assert shift_labels is not None
            logprobs = torch.log_softmax(self.bend(output.logits), dim=-1)
            chosen = logprobs.gather(-1, shift_labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
            output.log_probs = chosen.masked_fill(shift_labels == -100, 0)
        return output


@pytest.mark.parametrize("settings", [{}, {"packing": False}, {"attention": "across"}])
@pytest.mark.parametrize("build", [network, fresh_network])
def test_a_fused_head_that_misses_a_scale_is_refused(
    build: Callable[[str], PreTrainedModel], settings: dict[str, Any]
) -> None:
    """Also while the weights are fresh, when all logits are near zero and a wrong head is off by little."""
    task, model = clm(head="fused", **settings), build("llama").eval()
    ask(task, FusedHead(model, lambda logits: logits))
    ask(task, FusedHead(model, lambda logits: logits.bfloat16().float()))
    for scale in (0.5, 1.2):
        with pytest.raises(RecipeError, match=r"clm\.head: the fused head.*set clm\.head: logits"):
            ask(task, FusedHead(model, lambda logits, scale=scale: scale * logits))


def test_a_fused_head_that_misses_a_soft_cap_is_refused() -> None:
    task, model = clm(head="fused"), network("llama").eval()
    with pytest.raises(RecipeError, match=r"clm\.head: the fused head"):
        ask(task, FusedHead(model, lambda logits: 2 * torch.tanh(logits / 2)))


def test_the_fused_head_gives_the_loss_and_gradients_of_the_logits() -> None:
    """For packed rows with padding; and the network still answers in logits, so that it can generate."""
    for model_type in ["llama", "qwen3", "gpt2"]:
        model, fused, plain = network(model_type), clm(head="fused"), clm(head="logits")
        documents = random_documents(5, 9, 2, 7)
        inputs = plain.collate([row(*documents[:2]), row(*documents[2:])]).inputs
        expected = plain.loss(model, inputs).loss_sum
        fused = for_model(fused, model)
        ask(fused, model)
        assert_same_loss(model, fused.loss(model, inputs).loss_sum, expected)
        assert plain.loss(model, inputs).loss_sum.item() == expected.item()
        prompt = torch.tensor([documents[0]])
        assert model.generate(prompt, max_new_tokens=4, do_sample=False, eos_token_id=None).shape == (1, 9)
