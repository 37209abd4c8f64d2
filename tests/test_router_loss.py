"""The router loss of mixtures of experts against transformers' loss, and the check for causal networks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from support import Vocabulary
from task_support import make_task
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedModel
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func as mixtral_loss
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func as qwen3_loss

from ptft_dist.config.recipe import Recipe
from ptft_dist.data.store import Row
from ptft_dist.errors import RecipeError
from ptft_dist.tasks.common.router_loss import router_loss
from ptft_dist.tasks.registry import recipe_class

VOCAB = 60
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
EXPERTS = {"num_experts_per_tok": 2, "router_aux_loss_coef": 0.5, "head_dim": 8}
MIXTRAL = {"model_type": "mixtral", **SIZES, **EXPERTS, "num_local_experts": 4}
QWEN3 = {"model_type": "qwen3_moe", **SIZES, **EXPERTS, "num_experts": 4, "moe_intermediate_size": 16}
ROWS = [[3, 9, 4, 17, 5], [8, 8, 30, 41, 2, 25, 11, 50, 7], [6, 12]]


class Tokens(Vocabulary):
    eos_token_id = 2


def recipe(task: str, **settings: Any) -> Recipe:
    return recipe_class().model_validate(
        {
            "task": task,
            "model": {"config": {"model_type": "llama"}},
            "tokenizer": {"train": {}},
            "data": {"train": [{"path": "none"}], "max_length": 32},
            task: {"packing": False, **settings},
            "batch": {"global_size": 1, "micro_size": 1},
            "train": {"max_steps": 1, "precision": "fp32"},
            "run_dir": "run",
        }
    )


def build(keys: dict[str, Any], auto: Any = AutoModelForCausalLM) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(**{"vocab_size": VOCAB, "pad_token_id": 0, "eos_token_id": 2, **keys})
    model: PreTrainedModel = auto.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():  # uneven routers
        for parameter in model.parameters():
            parameter.mul_(4.0)
    return model


def rows(learned: bool = False) -> list[Row]:
    columns = [{"learned": np.arange(len(ids)) % 3 != 1} if learned else {} for ids in ROWS]
    return [Row(np.array(ids), np.zeros(1, np.int64), more) for ids, more in zip(ROWS, columns, strict=True)]


def task_for(name: str, model: PreTrainedModel, **settings: Any) -> Any:
    return make_task(recipe(name, **settings), Tokens(VOCAB, 0), model=model)


@pytest.mark.parametrize(("keys", "reference"), [(MIXTRAL, mixtral_loss), (QWEN3, qwen3_loss)])
def test_each_row_has_the_loss_that_transformers_gives_it(keys: dict[str, Any], reference: Any) -> None:
    """Row by row with an attention mask, from the router logits of a padded batch."""
    model, width = build(keys), max(map(len, ROWS))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in ROWS])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in ROWS])
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask, output_router_logits=True, use_cache=False).router_logits
    ours = router_loss(logits, mask.sum(1), 2)
    for i in range(len(ROWS)):
        of_row = tuple(layer.view(len(ROWS), width, -1)[i] for layer in logits)
        assert ours[i].item() == pytest.approx(reference(of_row, 4, 2, mask[i : i + 1]).item(), rel=1e-5)
    assert ours.std() > 0.01  # the rows differ, so a mean over all of them would not pass


def test_even_use_costs_the_number_of_chosen_experts_and_dummy_rows_nothing() -> None:
    """By hand: 4 experts, 2 tokens that choose experts 0, 1 and 2, 3, with equal mean probabilities: 4 x 4 x 1/2 x 1/4
    = 2 with f = 1/2 and P = 1/4 of each expert."""
    one = torch.tensor([[1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 1.0]])
    both = router_loss([torch.cat([one, one])], torch.tensor([2, -100]), 2)
    assert both.tolist() == pytest.approx([2.0, 0.0])
    assert router_loss((), torch.tensor([3, 4]), 2).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("keys", [MIXTRAL, QWEN3])
def test_the_loss_of_one_row_is_that_of_transformers(keys: dict[str, Any]) -> None:
    model = build(keys)
    task = task_for("clm", model)
    for row in rows():
        batch = task.collate([row], [(0, 0)])
        ids = torch.tensor([row.input_ids.tolist()])
        with torch.no_grad():
            ours = task.loss(model, batch.inputs).loss_sum / torch.tensor(batch.counts)
            reference = model(input_ids=ids, labels=ids, output_router_logits=True, use_cache=False)
        assert ours.sum().item() == pytest.approx(reference.loss.item(), rel=1e-5)
        assert ours[1].item() == pytest.approx(0.5 * reference.aux_loss.item(), rel=1e-5)


@pytest.mark.parametrize("name", ["clm", "sft"])
def test_the_loss_does_not_depend_on_which_rows_share_a_micro_batch(name: str) -> None:
    model = build(MIXTRAL)
    task, all_rows = task_for(name, model), rows(learned=name == "sft")

    def total(parts: list[list[Row]]) -> torch.Tensor:
        with torch.no_grad():
            return sum(  # type: ignore[return-value]
                task.loss(model, task.collate(part, [(0, i) for i in range(len(part))]).inputs).loss_sum
                for part in parts
            )

    singly, pairs, whole = (total([all_rows[i : i + n] for i in range(0, 3, n)]) for n in (1, 2, 3))
    assert pairs.tolist() == pytest.approx(singly.tolist(), rel=1e-5)
    assert whole.tolist() == pytest.approx(singly.tolist(), rel=1e-5)
    naive = sum(
        0.5 * model(input_ids=torch.tensor([ids]), output_router_logits=True, use_cache=False).aux_loss.item()
        for ids in ROWS
    )
    assert singly[1].item() == pytest.approx(naive, rel=1e-5)


def test_the_router_learns() -> None:
    model = build(MIXTRAL)
    task = task_for("clm", model)
    out = task.loss(model, task.collate(rows(), [(0, i) for i in range(3)]).inputs)
    (gradient,) = torch.autograd.grad(out.loss_sum[1], model.get_submodule("model.layers.0.mlp.gate").weight)
    assert gradient.abs().max() > 1e-4


SMALL_EXPERTS: dict[str, dict[str, Any]] = {
    "olmoe": {"num_experts": 4},
    "qwen2_moe": {"num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16},
    "gpt_oss": {"num_local_experts": 4, "head_dim": 8},
    "granitemoe": {"num_local_experts": 4},
    "phimoe": {"num_local_experts": 4},
}


@pytest.mark.parametrize("model_type", sorted(SMALL_EXPERTS))
def test_other_architectures_report_the_same_kind_of_logits(model_type: str) -> None:
    model = build({"model_type": model_type, **SIZES, "num_experts_per_tok": 2, **SMALL_EXPERTS[model_type]})
    with torch.no_grad():
        output = model(input_ids=torch.tensor([ROWS[1]]), output_router_logits=True, use_cache=False)
    ours = router_loss(output.router_logits, torch.tensor([len(ROWS[1])]), 2)
    assert ours.item() == pytest.approx(output.aux_loss.item(), rel=1e-5)


def test_a_fused_head_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"^clm\.head: .*router logits.* set clm\.head: logits"):
        task_for("clm", build(MIXTRAL), head="fused")


def test_a_task_that_adds_no_router_loss_refuses_the_network() -> None:
    keys = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2, "num_experts": 4}
    keys |= {"num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1, "decoder_start_token_id": 0}
    model = build({"model_type": "switch_transformers", **keys}, AutoModelForSeq2SeqLM)
    ours = recipe_class().model_validate({**recipe("clm").model_dump(exclude={"clm"}), "task": "seq2seq"})
    with pytest.raises(RecipeError, match=r"mixture of experts with a router loss, which task seq2seq does not add"):
        make_task(ours, Tokens(VOCAB, 0), model=model)


# --- causality --------------------------------------------------------------------------------------------------------

BERT = {"model_type": "bert", **{k: v for k, v in SIZES.items() if k != "num_key_value_heads"}}
CAUSAL = {
    "llama": {"model_type": "llama", **SIZES},
    "gpt2": {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 2},
    "bert as a decoder": BERT | {"is_decoder": True},
    "mixtral": MIXTRAL,
}


def ask(task: Any, model: PreTrainedModel) -> None:
    probe = task.probe()
    with torch.no_grad():
        probe.check(probe.outputs(model, probe.inputs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["clm", "sft"])
def test_a_network_that_sees_later_tokens_is_refused(name: str, dtype: torch.dtype) -> None:
    model = build(BERT).to(dtype)
    with pytest.raises(RecipeError, match=r"this bert network is not causal: a token attends to later tokens"):
        ask(task_for(name, model), model)


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["clm", "sft"])
@pytest.mark.parametrize("network", sorted(CAUSAL))
def test_a_causal_network_is_accepted(network: str, name: str, dtype: torch.dtype, fresh: bool) -> None:
    model = build(CAUSAL[network])
    if fresh:
        model.apply(model._init_weights)
    model.to(dtype)
    ask(task_for(name, model), model)


def test_a_fresh_network_that_sees_later_tokens_is_refused_too() -> None:
    """Weights of a new network are small, and so is what it sees."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**BERT, vocab_size=VOCAB)).eval()
    with pytest.raises(RecipeError, match="a token attends to later tokens"):
        ask(task_for("clm", model), model)
