"""model.adapt in one process: which parameters are trained, against plain peft, and requests that cannot work."""

from __future__ import annotations

import contextlib
import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from adapt_support import write_adapted, write_base
from peft.optimizers import create_loraplus_optimizer
from rl_support import Numbers
from safetensors.torch import load_file
from support import eval_rows, start, train_rows
from task_support import make_task
from tiny import ALL, BERT, LLAMA, T5
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
)

import ptft_dist
from ptft_dist.config.adapt import AdaptSection
from ptft_dist.config.recipe import ModelSection, OptimSection
from ptft_dist.data.store import Row
from ptft_dist.engine.optim import parameter_groups
from ptft_dist.engine.parameters import stored_tensors
from ptft_dist.errors import RecipeError
from ptft_dist.networks.adapt import adapt_network, check_backend
from ptft_dist.networks.adapt.adalora import Orthogonality
from ptft_dist.networks.adapt.adapters import adapter_state, write_adapter
from ptft_dist.networks.adapt.bottleneck import places
from ptft_dist.networks.adapt.peft_configs import AdapterSetup
from ptft_dist.networks.adapt.rates import lr_scales
from ptft_dist.networks.export import cast_weights
from ptft_dist.networks.facts import read_facts
from ptft_dist.tasks.registry import recipe_class

CAUSAL = {**LLAMA, "vocab_size": 64, "pad_token_id": 0}


def network(config: dict[str, Any], auto_class: Any) -> Any:
    torch.manual_seed(1)
    return auto_class.from_config(AutoConfig.for_model(**config)).eval()


def bert() -> Any:
    return network({**BERT, "vocab_size": 64, "num_labels": 2}, AutoModelForSequenceClassification)


def llama(**more: Any) -> Any:
    return network({**CAUSAL, **more}, AutoModelForCausalLM)


def setup(task_type: str | None = "CAUSAL_LM", **changes: Any) -> AdapterSetup:
    values: dict[str, Any] = {"base": "nowhere", "revision": None, "total_steps": 10, "new_tokens": ()}
    return AdapterSetup(task_type=task_type, tokenizer_path="nowhere", **{"seed": 0, **values, **changes})


def adapted(model: Any, adapt: Any, *, task_type: str | None = "CAUSAL_LM", fresh: Any = (), **changes: Any) -> Any:
    return adapt_network(model, AdaptSection.model_validate(adapt), setup(task_type, **changes), fresh)


def trained(model: Any) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


IDS = torch.tensor([[5, 6, 7, 8, 9, 10], [11, 12, 13, 14, 15, 16]])


# --- parts of the network ---------------------------------------------------------------------------------------------


def test_last_layers_are_the_last_blocks_and_what_follows() -> None:
    names = trained(adapted(bert(), {"last_layers": 1}))
    assert names
    assert all(name.startswith(("bert.encoder.layer.1.", "bert.pooler.", "classifier.")) for name in names)
    assert {"classifier.bias", "bert.pooler.dense.weight", "bert.encoder.layer.1.output.dense.bias"} <= names


def test_a_tied_output_head_stays_frozen_with_the_embeddings() -> None:
    names = trained(adapted(llama(tie_word_embeddings=True), {"last_layers": 1}))
    assert "model.norm.weight" in names
    assert not any("embed" in name or "lm_head" in name for name in names)
    assert "lm_head.weight" in trained(adapted(llama(tie_word_embeddings=False), {"last_layers": 1}))


def test_of_an_encoder_decoder_the_decoders_last_layers_are_trained() -> None:
    model = network({**T5, "vocab_size": 64, "decoder_start_token_id": 0}, AutoModelForSeq2SeqLM)
    names = trained(adapted(model, {"last_layers": 1}))
    assert {name.split(".block.")[1][0] for name in names if ".block." in name} == {"1"}
    assert not any(name.startswith("encoder.") for name in names)


def test_bitfit_trains_biases_and_new_weights() -> None:
    names = trained(adapted(bert(), "bitfit", fresh=["classifier.weight", "classifier.bias"]))
    assert names == {name for name, _ in bert().named_parameters() if name.endswith("bias")} | {"classifier.weight"}


def test_match_trains_what_it_matches() -> None:
    names = trained(adapted(bert(), {"match": r"attention\.self"}))
    assert names == {name for name, _ in bert().named_parameters() if "attention.self" in name}


def test_full_trains_everything() -> None:
    assert trained(adapted(bert(), "full")) == {name for name, _ in bert().named_parameters()}


# --- learning rates ---------------------------------------------------------------------------------------------------


def scales_of(model: Any, adapt: Any = "full", **optim: Any) -> dict[str, float]:
    facts = read_facts(model)
    changed = adapted(model, adapt, task_type="SEQ_CLS" if "classifier" in dict(model.named_modules()) else "CAUSAL_LM")
    section = ModelSection.model_validate({"path": "x", "adapt": adapt})
    return lr_scales(changed, section, OptimSection(**optim), facts)


def test_layer_decay_counts_blocks_from_the_head() -> None:
    """Two blocks: the last has decay^1, the first decay^2, the embeddings decay^3, everything after the blocks 1."""
    scales = scales_of(bert(), layer_decay=0.5)
    assert scales["classifier.weight"] == scales["bert.pooler.dense.weight"] == 1.0
    assert scales["bert.encoder.layer.1.output.dense.weight"] == 0.5
    assert scales["bert.encoder.layer.0.output.dense.weight"] == 0.25
    assert scales["bert.embeddings.word_embeddings.weight"] == 0.125


def test_the_head_has_its_own_learning_rate() -> None:
    scales = scales_of(bert(), head_lr_scale=10.0)
    assert {name for name, scale in scales.items() if scale == 10.0} == {"classifier.weight", "classifier.bias"}
    with_adapter = scales_of(bert(), "lora", head_lr_scale=10.0)
    assert {name.split(".")[-1] for name, scale in with_adapter.items() if scale == 10.0} == {"weight", "bias"}
    assert all("classifier" in name for name, scale in with_adapter.items() if scale == 10.0)


def test_a_critic_of_its_own_has_its_own_blocks_and_head() -> None:
    """It has more blocks than the policy."""
    model = llama()
    critic = network({**LLAMA, "vocab_size": 64, "num_hidden_layers": 5}, AutoModelForSequenceClassification)
    scales = scales_of(model, layer_decay=0.5)
    model.critic = critic
    together = scales_of(model, layer_decay=0.5)
    alone = scales_of(critic, layer_decay=0.5)
    assert together == scales | {f"critic.{name}": scale for name, scale in alone.items()}
    assert alone["model.embed_tokens.weight"] == 0.5**6
    heads = {name for name, scale in scales_of(model, head_lr_scale=10.0).items() if scale == 10.0}
    assert heads == {"lm_head.weight", "critic.score.weight"}


def test_neither_virtual_tokens_nor_a_trained_embedding_table_are_the_head() -> None:
    scales = scales_of(bert(), {"prompt_tuning": {"tokens": 3}}, head_lr_scale=10.0)
    assert {name for name, scale in scales.items() if scale == 1.0} == {"prompt_encoder.default.embedding.weight"}
    assert any("classifier" in name for name, scale in scales.items() if scale == 10.0)
    scales = scales_of(llama(), {"lora": {}, "embeddings": "all"}, head_lr_scale=10.0)
    saved = {name: scale for name, scale in scales.items() if "modules_to_save" in name}
    assert {name.split(".modules_to_save")[0].rpartition(".")[2]: scale for name, scale in saved.items()} == {
        "embed_tokens": 1.0,
        "lm_head": 10.0,
    }


def test_a_decay_over_parameters_of_one_depth_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"optim\.layer_decay: has no effect here"):
        scales_of(llama(), {"prompt_tuning": {"tokens": 3}}, layer_decay=0.5)


def test_lora_plus_scales_b_as_peft_does() -> None:
    model = llama()
    scales = scales_of(model, {"lora": {"plus_ratio": 16.0}})
    assert {scale for name, scale in scales.items() if "lora_B" in name} == {16.0}
    assert {scale for name, scale in scales.items() if "lora_A" in name} == {1.0}
    other = peft.get_peft_model(llama(), peft.LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"))
    theirs = create_loraplus_optimizer(other, torch.optim.AdamW, lr=1.0, loraplus_lr_ratio=16.0)
    of = {id(p): group["lr"] for group in theirs.param_groups for p in group["params"]}
    expected = {name: of[id(p)] for name, p in other.named_parameters() if p.requires_grad}
    assert scales == expected


def test_scales_multiply_those_of_groups() -> None:
    model = bert()
    optim = OptimSection(groups=({"match": "classifier", "lr_scale": 3.0},), weight_decay=0.0)  # type: ignore[arg-type]
    groups = parameter_groups(model.named_parameters(), optim, {"classifier.weight": 2.0})
    of = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    assert of[id(model.classifier.weight)] == 6.0
    assert of[id(model.classifier.bias)] == 3.0


# --- against plain peft -----------------------------------------------------------------------------------------------

THEIRS: dict[str, tuple[Any, Any]] = {
    "lora": (
        {"lora": {"r": 4, "alpha": 8, "targets": ["q_proj", "v_proj"]}},
        lambda: peft.LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]),
    ),
    "rslora and dora on all linear layers": (
        {"lora": {"r": 4, "rslora": True, "dora": True, "rank_pattern": {"q_proj": 2}}},
        lambda: peft.LoraConfig(
            task_type="CAUSAL_LM",
            r=4,
            lora_alpha=8,
            target_modules="all-linear",
            use_rslora=True,
            use_dora=True,
            rank_pattern={"q_proj": 2},
        ),
    ),
    "ia3": ("ia3", lambda: peft.IA3Config(task_type="CAUSAL_LM")),
    "prompt tuning": (
        {"prompt_tuning": {"tokens": 3}},
        lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    ),
    "prefix tuning": (
        {"prefix_tuning": {"tokens": 3}},
        lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    ),
    "vera by its type": (
        {"peft": {"type": "vera", "r": 8, "target_modules": ["q_proj"]}},
        lambda: peft.VeraConfig(task_type="CAUSAL_LM", r=8, target_modules=["q_proj"]),
    ),
}


@pytest.mark.parametrize("case", THEIRS)
def test_losses_and_gradients_are_those_of_plain_peft(case: str) -> None:
    ours, make = THEIRS[case]
    mine = adapted(llama(), ours).train()
    theirs = plain(llama(), make()).train()
    with torch.no_grad():  # B is zero at first, and then A has no gradient
        for one, other in zip(parameters(mine), parameters(theirs), strict=True):
            assert one.equal(other)
            one.copy_(torch.randn_like(one))
            other.copy_(one)
    logits = mine(input_ids=IDS).logits
    assert logits.shape == (2, 6, 64)  # without those of virtual tokens
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].reshape(-1, 64), IDS[:, 1:].reshape(-1))
    labels = IDS.clone()
    labels[:, 0] = -100  # the first token is predicted from virtual tokens only, and is no target here
    expected = theirs(input_ids=IDS, labels=labels).loss
    loss.backward()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    gradients = [(one.grad, other.grad) for one, other in zip(parameters(mine), parameters(theirs), strict=True)]
    assert any(bool(one.abs().max() > 0) for one, _ in gradients)
    for one, other in gradients:
        torch.testing.assert_close(one, other)


def plain(base: Any, config: Any) -> Any:
    """The base with an adapter that peft makes from the seed 0."""
    torch.manual_seed(0)
    return peft.get_peft_model(base, config)


def parameters(model: Any) -> list[Any]:
    return [parameter for _, parameter in sorted(model.named_parameters()) if parameter.requires_grad]


def test_the_orthogonality_penalty_is_that_of_peft() -> None:
    """peft adds it to the loss that the network computes with labels."""
    model = adapted(llama(), {"adalora": {"r": 4, "target_r": 2, "orthogonality": 0.7}})
    with torch.no_grad():
        entropy = torch.nn.functional.cross_entropy(
            model(input_ids=IDS).logits[:, :-1].reshape(-1, 64), IDS[:, 1:].reshape(-1)
        )
        theirs = model(input_ids=IDS, labels=IDS).loss - entropy
        penalty = Orthogonality(model)
        terms = [penalty.term(name, parameter) for name, parameter in model.named_parameters()]
    assert sum(term.item() for term in terms if term is not None) == pytest.approx(theirs.item(), rel=1e-5)


def test_adalora_allocates_as_a_plain_loop_with_peft() -> None:
    """Ranks, importance and masks after every update, with the state going through buffers as at a resume."""
    adapt = {"adalora": {"r": 4, "target_r": 2, "start": 0.1, "end": 0.3, "alpha": 8}}
    mine, losses = adapted(llama(), adapt), []
    config = peft.AdaLoraConfig(
        task_type="CAUSAL_LM", init_r=4, target_r=2, lora_alpha=8, tinit=1, tfinal=3, total_step=10,
        target_modules="all-linear",
    )  # fmt: skip
    theirs = plain(llama(), config)
    for step in range(1, 11):
        for model in (mine, theirs):
            optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
            loss = model(input_ids=IDS, labels=IDS).loss
            loss.backward()
            optimizer.step()
            if model is mine:
                mine.rank_state.load_state_dict({k: v.clone() for k, v in mine.rank_state.state_dict().items()})
                own = {name: p for name, p in mine.named_parameters() if name in mine.rank_state.names}
                new = mine.rank_state.after_step(
                    {name: p.detach() for name, p in own.items()}, {name: p.grad for name, p in own.items()}
                )
                for name, value in new.items():
                    own[name].data.copy_(value)
            else:
                theirs.base_model.update_and_allocate(step)
            model.zero_grad()
            losses.append(loss.item())
        for (name, one), other in zip(mine.base_model.named_parameters(), theirs.base_model.parameters(), strict=True):
            assert one.equal(other), (step, name)
    assert mine.active_peft_config.rank_pattern == theirs.active_peft_config.rank_pattern
    kept = [sum(pattern) for pattern in theirs.active_peft_config.rank_pattern.values()]
    assert sum(kept) == 2 * len(kept)  # target_r on average
    assert losses[-1] < losses[0]


def test_training_goes_on_from_an_adapter_with_decided_ranks(tmp_path: Path) -> None:
    """AdaLoRA's exported matrices have the decided ranks, and so has an adapter that was trained on from them."""
    first = adapted(llama(), {"adalora": {"r": 4, "target_r": 2}})
    with torch.no_grad():
        for parameter in parameters(first):
            parameter.copy_(torch.randn_like(parameter))
        first.rank_state.decided.fill_(True)
        for i, kept in enumerate(value for name, value in first.rank_state.named_buffers() if name.endswith("_kept")):
            kept[: i % 4] = False
        write_adapter(first, stored_tensors(first), tmp_path / "first")
        model = adapted(llama(), {"adapter": str(tmp_path / "first")})
        for parameter in parameters(model):
            parameter.add_(torch.randn_like(parameter) * 0.1)
        write_adapter(model, stored_tensors(model), tmp_path / "second")
        again = peft.PeftModel.from_pretrained(llama(), tmp_path / "second")
        torch.testing.assert_close(again(input_ids=IDS).logits, model.eval()(input_ids=IDS).logits)


@pytest.mark.parametrize("method", ["prompt_tuning", "p_tuning", "prefix_tuning"])
def test_virtual_tokens_and_a_head_are_trained_on_from_a_saved_adapter(tmp_path: Path, method: str) -> None:
    """peft itself refuses to train saved virtual tokens."""
    base = network({**CAUSAL, "num_labels": 3}, AutoModelForSequenceClassification)
    first = adapted(copy.deepcopy(base), {method: {"tokens": 3}}, task_type="SEQ_CLS", fresh=["score.weight"])
    write_adapter(first, stored_tensors(first), tmp_path / "first")
    adapter = {"adapter": str(tmp_path / "first")}
    model = adapted(copy.deepcopy(base), adapter, task_type="SEQ_CLS", fresh=["score.weight"])
    assert {name.split(".")[0] for name in trained(model)} == {"prompt_encoder", "base_model"}
    assert [name for name in trained(model) if "score" in name] == ["base_model.score.modules_to_save.default.weight"]
    with torch.no_grad():
        for parameter in parameters(model):
            parameter.add_(torch.randn_like(parameter) * 0.1)
        write_adapter(model, stored_tensors(model), tmp_path / "second")
        again = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "second")
        torch.testing.assert_close(again(input_ids=IDS).logits, model.eval()(input_ids=IDS).logits)


def test_a_saved_adapter_must_contain_the_layers_that_the_base_has_not(tmp_path: Path) -> None:
    """Else a new head would keep random weights, and would not be exported."""
    masked = network({**BERT, "vocab_size": 64}, AutoModelForMaskedLM)
    first = adapted(masked, {"lora": {"r": 2, "targets": ["query"]}}, task_type=None)
    write_adapter(first, stored_tensors(first), tmp_path / "masked")
    adapter, fresh = {"adapter": str(tmp_path / "masked")}, ["classifier.bias", "classifier.weight"]
    says = r"^model\.adapt\.adapter: .* does not contain classifier, which model\.path has no weights for.*ptft merge"
    with pytest.raises(RecipeError, match=says):
        adapted(bert(), adapter, task_type="SEQ_CLS", fresh=fresh)
    assert trained(adapted(bert(), adapter, task_type="SEQ_CLS"))  # with a head in model.path
    with_head = adapted(bert(), {"lora": {"r": 2}}, task_type="SEQ_CLS", fresh=fresh)
    write_adapter(with_head, stored_tensors(with_head), tmp_path / "classifier")
    model = adapted(bert(), {"adapter": str(tmp_path / "classifier")}, task_type="SEQ_CLS", fresh=fresh)
    assert trained(model) == trained(with_head)


def test_an_adapter_of_another_task_has_one_clear_message(tmp_path: Path) -> None:
    """peft wraps a causal network in a class that a classifier does not fit."""
    first = adapted(llama(), {"lora": {"r": 2}})
    write_adapter(first, stored_tensors(first), tmp_path)
    classifier = network({**CAUSAL, "num_labels": 3}, AutoModelForSequenceClassification)
    with pytest.raises(RecipeError, match=r"^model\.adapt\.adapter: .* does not fit this network"):
        adapted(classifier, {"adapter": str(tmp_path)}, task_type="SEQ_CLS")


def check_export(model: Any, folder: Path) -> None:
    """After changes of the adapter, plain peft computes the same from the exported adapter and the unchanged base."""
    with torch.no_grad():
        for parameter in parameters(model):
            parameter.add_(torch.randn_like(parameter) * 0.1)
        state = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        write_adapter(model, state, folder)
        again = peft.PeftModel.from_pretrained(llama(), folder)
        torch.testing.assert_close(again(input_ids=IDS).logits, model.eval()(input_ids=IDS).logits)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_an_adapter_that_changed_the_base_is_saved_for_the_unchanged_base(tmp_path: Path, init: str) -> None:
    model = adapted(llama(), {"lora": {"r": 4, "init": init, "rslora": init == "olora"}})
    check_export(model, tmp_path)


def test_what_an_adapter_that_changed_the_base_has_learned_is_not_lost_in_bf16(tmp_path: Path) -> None:
    """A and B are the largest parts of the base's weights, with rounding errors larger than what is learned."""
    model, base = adapted(llama(), {"lora": {"r": 4, "init": "pissa"}}), llama()
    with torch.no_grad():
        for parameter in parameters(model):
            parameter.add_(torch.randn_like(parameter) * 1e-3 * parameter.abs().mean())
        write_adapter(model, stored_tensors(model), tmp_path, lambda state: cast_weights(state, torch.bfloat16))
        learned = model.eval()(input_ids=IDS).logits - base(input_ids=IDS).logits
        again = peft.PeftModel.from_pretrained(llama(), tmp_path)
        kept = again(input_ids=IDS).logits - base(input_ids=IDS).logits
    assert load_file(tmp_path / "adapter_model.safetensors").popitem()[1].dtype == torch.bfloat16
    assert float((kept - learned).norm() / learned.norm()) < 0.02


def test_the_name_of_an_initialization_may_be_written_as_in_its_paper(tmp_path: Path) -> None:
    """peft takes OLoRA for olora. Else the export would need the base to be decomposed again whenever it is loaded."""
    model = adapted(
        llama(), {"peft": {"type": "lora", "r": 4, "init_lora_weights": "OLoRA", "target_modules": ["q_proj"]}}
    )
    check_export(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["init_lora_weights"], config["r"]) == (True, 8)


@pytest.mark.parametrize("rslora", [False, True])
def test_pissa_with_an_adapted_embedding_is_saved_for_the_unchanged_base(tmp_path: Path, rslora: bool) -> None:
    """peft does not change the weight of the embedding, whose matrices get the doubled rank too."""
    pattern = {"rank_pattern": {"embed_tokens": 2}, "alpha_pattern": {"embed_tokens": 5}}
    lora = {"r": 4, "init": "pissa", "targets": ["q_proj", "embed_tokens"], "rslora": rslora, **pattern}
    model = adapted(llama(), {"lora": lora})
    check_export(model, tmp_path)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_training_goes_on_from_an_adapter_of_peft_that_changes_the_base(tmp_path: Path, init: str) -> None:
    """peft stores it for the base that it decomposes again whenever it loads it, and so it stays."""
    settings = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"], init_lora_weights=init)
    theirs = plain(llama(), settings)
    with torch.no_grad():
        for parameter in parameters(theirs):
            parameter.add_(torch.randn_like(parameter) * 0.1)
    theirs.save_pretrained(tmp_path / "theirs")
    model = adapted(llama(), {"adapter": str(tmp_path / "theirs")})
    torch.testing.assert_close(model.eval()(input_ids=IDS).logits, theirs.eval()(input_ids=IDS).logits)
    check_export(model, tmp_path / "ours")


def test_frozen_matrices_of_an_adapter_are_saved_with_it(tmp_path: Path) -> None:
    """MiCA trains A only. Its B comes from the base's weights, and is another one for a base that is read in bf16."""
    model = adapted(
        llama(), {"peft": {"type": "lora", "r": 4, "init_lora_weights": "mica", "target_modules": ["q_proj"]}}
    )
    check_export(model, tmp_path / "ours")
    model.save_pretrained(tmp_path / "theirs")
    ours, theirs = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "theirs"))
    assert ours.keys() == theirs.keys()
    assert all(ours[name].equal(value) for name, value in theirs.items())


GPT2: dict[str, Any] = {"model_type": "gpt2", "vocab_size": 64, "n_embd": 32, "n_layer": 1, "n_head": 2}


@pytest.mark.parametrize(
    ("adapt", "key"),
    [
        ({"lora": {"r": 4, "init": "olora"}}, "lora.init"),
        ({"peft": {"type": "lora", "r": 4, "init_lora_weights": "OLoRA"}}, "peft.init_lora_weights"),
    ],
)
def test_olora_is_refused_where_weights_are_transposed(adapt: Any, key: str) -> None:
    """peft decomposes the weight of a Conv1D as if it were that of a linear layer."""
    with pytest.raises(RecipeError, match=rf"^model\.adapt\.{key}: .*GPT-2.* pissa"):
        adapted(network(GPT2, AutoModelForCausalLM), adapt)


@pytest.mark.parametrize("targets", [["attn.c_attn"], ["attn.c_proj"]], ids=str)
def test_pissa_starts_from_the_base_where_weights_are_transposed(targets: list[str]) -> None:
    model = adapted(network(GPT2, AutoModelForCausalLM), {"lora": {"r": 4, "init": "pissa", "targets": targets}})
    expected = network(GPT2, AutoModelForCausalLM)(input_ids=IDS).logits
    torch.testing.assert_close(model.eval()(input_ids=IDS).logits, expected)


def test_bottleneck_adapters_compute_the_papers_formula() -> None:
    """h + up(relu(down(h))) after the feed-forward layer; houlsby also after attention."""
    model = adapted(bert(), {"bottleneck": {"size": 4, "placement": "houlsby"}}, task_type="SEQ_CLS")
    names = [name for name, module in model.named_modules() if type(module).__name__ == "BottleneckLayer"]
    assert [name.split("layer.")[1] for name in names] == [
        f"{i}.{place}" for i in (0, 1) for place in ("attention.output.dense", "output.dense")
    ]
    layer = model.get_submodule(names[0])
    hidden = torch.randn(3, 32)
    assert layer(hidden).equal(layer.base_layer(hidden))  # up is zero at first
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn_like(parameter))
        down, up, h = layer.bottleneck_down["default"], layer.bottleneck_up["default"], layer.base_layer(hidden)
        expected = h + (h @ down.weight.T + down.bias).clamp(min=0) @ up.weight.T + up.bias
        torch.testing.assert_close(layer(hidden), expected)
    pfeiffer = adapted(bert(), "bottleneck", task_type="SEQ_CLS")
    names = [name for name, module in pfeiffer.named_modules() if type(module).__name__ == "BottleneckLayer"]
    assert [name.split("layer.")[1] for name in names] == ["0.output.dense", "1.output.dense"]


@pytest.mark.parametrize("kind", ["gptj", "gpt_neo", "phi", "mpt"])
def test_houlsby_adapters_stand_after_both_layers(kind: str) -> None:
    """Some networks have names of their own for them."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind))
    names = places(model, "houlsby")
    assert names
    blocks = [name.split(".")[2] for name in names]
    assert all(blocks.count(block) == 2 for block in blocks)


def test_bottleneck_adapters_need_known_places() -> None:
    """Experts are no linear layers, and half of the adapters would be another method."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_local_experts": 2}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 2}
    mixtral = network({"model_type": "mixtral", "vocab_size": 64, **sizes}, AutoModelForCausalLM)
    with pytest.raises(RecipeError, match="set targets, because it is not known where houlsby adapters stand"):
        adapted(mixtral, {"bottleneck": {"placement": "houlsby"}})


@pytest.mark.parametrize("tied", [True, False])
def test_new_tokens_are_trained_and_saved_with_the_adapter(tmp_path: Path, tied: bool) -> None:
    model = llama(tie_word_embeddings=tied)
    model.resize_token_embeddings(66, mean_resizing=False)
    changed = adapted(model, "lora", new_tokens=(64, 65))
    with torch.no_grad():
        for parameter in parameters(changed):
            parameter.add_(torch.randn_like(parameter) * 0.1)
    state = {name: parameter for name, parameter in changed.named_parameters() if parameter.requires_grad}
    write_adapter(changed, state, tmp_path)
    saved = adapter_state(changed, state)
    assert sum(value.numel() for name, value in saved.items() if "token" in name) == (1 if tied else 2) * 2 * 32
    base = llama(tie_word_embeddings=tied)
    torch.manual_seed(3)  # other values of the new rows
    base.resize_token_embeddings(66, mean_resizing=False)
    again = peft.PeftModel.from_pretrained(base, tmp_path)
    ids = torch.tensor([[5, 64, 65, 7]])
    with torch.no_grad():
        torch.testing.assert_close(again(input_ids=ids).logits, changed.eval()(input_ids=ids).logits)


def biased_head(*, tied: bool, seed: int = 1) -> Any:
    """A BERT whose output head has a bias, with two added tokens. seed: of their rows."""
    model = network({**BERT, "vocab_size": 64, "tie_word_embeddings": tied}, AutoModelForMaskedLM)
    torch.nn.init.normal_(model.get_output_embeddings().bias)
    torch.manual_seed(seed)
    model.resize_token_embeddings(66, mean_resizing=False)
    with torch.no_grad():
        model.get_output_embeddings().bias[64:] = torch.randn(2)
    return model.eval()


@pytest.mark.parametrize(
    ("tied", "more", "remedy"),
    [
        (True, {}, "Use model.adapt: full"),
        (True, {"embeddings": "all"}, "Use model.adapt: full"),
        (False, {}, "Use embeddings: all, or model.adapt: full"),
    ],
)
def test_added_tokens_are_refused_where_the_bias_of_the_output_head_would_be_lost(
    tied: bool, more: dict[str, Any], remedy: str
) -> None:
    with pytest.raises(RecipeError, match=rf"^model\.adapt\.embeddings: .*bias.* {remedy}"):
        adapted(biased_head(tied=tied), {"lora": {}, **more}, task_type=None, new_tokens=(64, 65))
    adapted(biased_head(tied=tied), {"lora": {}}, task_type=None)  # without added tokens


@pytest.mark.parametrize(
    ("tied", "peft_keys"),
    [
        (True, {"type": "lora", "target_modules": ["query"], "trainable_token_indices": [5]}),
        (False, {"type": "lora", "target_modules": ["query"], "trainable_token_indices": {"decoder": [5]}}),
        (True, {"type": "trainable_tokens", "target_modules": ["word_embeddings"], "token_indices": [5]}),
    ],
    ids=str,
)
def test_rows_of_an_output_head_with_a_bias_are_refused_by_peft_s_keys_too(
    tied: bool, peft_keys: dict[str, Any]
) -> None:
    """peft computes such a head without its bias, so the network changes before it is trained."""
    with pytest.raises(RecipeError, match=r"^model\.adapt\.peft: .*bias of .*decoder.*model.adapt: full"):
        adapted(biased_head(tied=tied), {"peft": peft_keys}, task_type=None)
    tables = {**peft_keys, "trainable_token_indices": {"word_embeddings": [5]}}
    if not tied:  # rows of the embeddings alone
        adapted(biased_head(tied=tied), {"peft": tables}, task_type=None)


def test_rows_that_the_recipe_names_are_not_replaced_by_added_tokens() -> None:
    """peft has one key for both."""
    given = {"type": "lora", "target_modules": ["q_proj"], "trainable_token_indices": [5]}
    with pytest.raises(RecipeError, match=r"^model\.adapt\.peft\.trainable_token_indices: .*added tokens.*Remove"):
        adapted(llama(), {"peft": given}, new_tokens=(62, 63))


def test_the_bias_of_an_output_head_is_saved_with_the_whole_table(tmp_path: Path) -> None:
    adapt = {"lora": {}, "embeddings": "all"}
    model = adapted(biased_head(tied=False), adapt, task_type=None, new_tokens=(64, 65)).eval()
    ids = torch.tensor([[5, 64, 65, 7]])
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits, biased_head(tied=False)(input_ids=ids).logits)
        for parameter in parameters(model):
            parameter.add_(torch.randn_like(parameter) * 0.1)
        state = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        write_adapter(model, state, tmp_path)
        again = peft.PeftModel.from_pretrained(biased_head(tied=False, seed=3), tmp_path)
        torch.testing.assert_close(again(input_ids=ids).logits, model(input_ids=ids).logits)


@pytest.mark.parametrize("tied", [True, False])
def test_the_whole_table_is_trained_and_saved_if_asked_for(tmp_path: Path, tied: bool) -> None:
    changed = adapted(llama(tie_word_embeddings=tied), {"lora": {}, "embeddings": "all"})
    with torch.no_grad():
        for parameter in parameters(changed):
            parameter.add_(torch.randn_like(parameter) * 0.1)
    table = changed.get_input_embeddings().weight
    assert table.requires_grad
    assert (changed.get_output_embeddings().weight is table) == tied
    state = {name: parameter for name, parameter in changed.named_parameters() if parameter.requires_grad}
    write_adapter(changed, state, tmp_path)
    again = peft.PeftModel.from_pretrained(llama(tie_word_embeddings=tied), tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(again(input_ids=IDS).logits, changed.eval()(input_ids=IDS).logits)


def test_the_experts_of_a_mixture_are_adapted_as_by_peft() -> None:
    config = {**CAUSAL, "model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}
    target = "mlp.experts.gate_up_proj"
    mine = adapted(
        network(config, AutoModelForCausalLM), {"lora": {"r": 2, "targets": [], "target_parameters": [target]}}
    )
    settings = peft.LoraConfig(task_type="CAUSAL_LM", r=2, lora_alpha=4, target_modules=[], target_parameters=[target])
    theirs = plain(network(config, AutoModelForCausalLM), settings)
    assert len(parameters(mine)) == 4  # A and B for all experts of each of two layers
    for one, other in zip(parameters(mine), parameters(theirs), strict=True):
        assert one.equal(other)
        with torch.no_grad():
            one.add_(0.1)
            other.add_(0.1)
    assert mine(input_ids=IDS).logits.equal(theirs(input_ids=IDS).logits)
    assert not mine(input_ids=IDS).logits.equal(network(config, AutoModelForCausalLM)(input_ids=IDS).logits)


@pytest.mark.parametrize(
    ("adapt", "new_tokens", "fused"),
    [
        ("lora", (), True),
        ({"lora": {"targets": ["q_proj", "lm_head"]}}, (), False),
        ({"ia3": {"targets": ["q_proj", "lm_head"]}}, (), False),
        ({"bottleneck": {"targets": ["lm_head"]}}, (), False),
        ("lora", (7, 12), False),
        ({"lora": {}, "embeddings": "all"}, (), True),
        ({"prompt_tuning": {"tokens": 2}}, (), False),
        ({"prefix_tuning": {"tokens": 2}}, (), True),
    ],
    ids=str,
)
def test_the_fused_head_is_used_where_it_computes_the_adapted_network(
    adapt: Any, new_tokens: tuple[int, ...], fused: bool
) -> None:
    """It multiplies with the head's weight, and so passes over what an adapter does in the head."""
    sizes: dict[str, Any] = {"batch": {"global_size": 2, "micro_size": 2}, "train": {"max_steps": 1}}
    data: dict[str, Any] = {"train": [{"path": "none"}], "max_length": 16}
    named = {"task": "clm", "model": {"path": "none"}, "tokenizer": {"path": "none"}, "run_dir": "none"}
    raw = {**named, "data": data, **sizes}
    recipes = [recipe_class().model_validate({**raw, "clm": {"head": head}}) for head in ("auto", "fused")]
    base = llama()
    # As on an accelerator, where auto is fused; nothing is computed there.
    task, asked = (make_task(each, Numbers(), model=base, device=torch.device("meta")) for each in recipes)
    task.pad_multiple = 1
    assert task.fused
    model = adapted(base, adapt, new_tokens=new_tokens)
    task.extend_network(model, recipes[0].model)
    assert task.fused == fused
    with contextlib.nullcontext() if fused else pytest.raises(RecipeError, match=r"^clm\.head: .*head: logits"):
        asked.extend_network(model, recipes[1].model)
    with torch.no_grad():
        for parameter in parameters(model):
            parameter.add_(torch.randn_like(parameter) * 0.1)
    rows = [Row(ids.numpy(), np.zeros(1, np.int64)) for ids in IDS]
    loss = task.loss(model, task.collate(rows).inputs).loss_sum
    logits = model(input_ids=IDS).logits[:, :-1].reshape(-1, 64)
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(logits, IDS[:, 1:].reshape(-1), reduction="sum"))
    loss.backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in parameters(model))


@pytest.mark.parametrize("adapt", ["lora", "bottleneck", {"prompt_tuning": {"tokens": 2}}, "bitfit"])
def test_gradient_checkpointing_of_a_frozen_base_really_trains(adapt: Any) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = llama(attention_bias=True)
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        changed = adapted(model, adapt).train()
        with torch.no_grad():
            torch.manual_seed(5)
            for parameter in parameters(changed):
                parameter.copy_(torch.randn_like(parameter))
        assert model.is_gradient_checkpointing == checkpointing
        changed(input_ids=IDS).logits.square().sum().backward()
        gradients.append([parameter.grad for parameter in parameters(changed)])
    for one, other in zip(*gradients, strict=True):
        assert bool(one.abs().max() > 0)
        torch.testing.assert_close(one, other)


def test_the_same_seed_gives_the_same_adapter_and_another_seed_another() -> None:
    one, same, other = (parameters(adapted(llama(), "lora", **more)) for more in ({}, {}, {"seed": 1}))
    assert all(a.equal(b) for a, b in zip(one, same, strict=True))
    assert not all(a.equal(b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("task", sorted(ALL))
def test_every_task_trains_an_adapter_and_evaluates_the_exported_one(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, task: str
) -> None:
    base = write_base(tmp_path / "base", cache, task)
    short: dict[str, Any] = {"train": {"max_steps": 2}, "save": {"every": None}, "eval": {"every": None}}
    recipe = write_adapted(tmp_path, base, task, {"adapt": {"lora": {"r": 2}}}, **short)
    run = start("train", recipe.name, cwd=tmp_path, cache=cache)
    assert run.wait() == 0, run.stderr
    assert (tmp_path / "run/model/adapter_config.json").is_file()
    monkeypatch.setenv("PTFT_CACHE", str(cache))
    monkeypatch.chdir(tmp_path)
    metrics = ptft_dist.evaluate(str(recipe))
    last = eval_rows(tmp_path / "run")[-1]
    assert metrics["eval/loss"] == pytest.approx(last["eval/loss"], rel=1e-5)


@pytest.mark.parametrize("targets", ["all-linear", ".*(q|up)_proj", ["q_proj", "up_proj"]], ids=str)
def test_lora_in_some_blocks_only(targets: Any) -> None:
    names = trained(adapted(llama(), {"lora": {"r": 2, "layers": [1], "targets": targets}}))
    assert names
    assert all(".layers.1." in name for name in names)
    assert any(".q_proj." in name for name in names)
    assert any(".up_proj." in name for name in names)
    assert any(".o_proj." in name for name in names) == (targets == "all-linear")


BACKENDS: list[tuple[dict[str, Any], str, str, str | None]] = [
    ({"adapt": {"peft": {"type": "LoHa"}}}, "zero3", "fp32", "loha cannot be trained under zero3"),
    ({"adapt": {"peft": {"type": "loha"}}}, "zero2", "fp32", None),
    ({"adapt": {"peft": {"type": "vblora"}}}, "fsdp2", "fp32", "vblora cannot be trained under fsdp2"),
    ({"adapt": {"peft": {"type": "vera"}}}, "fsdp2", "bf16", "vera has fp32 matrices of its own, and fsdp2"),
    ({"adapt": {"peft": {"type": "vera"}}}, "fsdp2", "fp32", None),
    ({"adapt": {"peft": {"type": "vera"}}}, "ddp", "bf16", None),
    ({"adapt": "ia3", "quantize": "nf4"}, "zero2", "bf16", "ia3 scales the results of quantized layers in fp32"),
    ({"adapt": "ia3", "quantize": "nf4"}, "ddp", "bf16", None),
    ({"adapt": "ia3"}, "zero2", "bf16", None),
    ({"adapt": "bitfit", "quantize": "nf4"}, "fsdp2", "fp32", "with model.adapt: bitfit the quantized weights are"),
    ({"adapt": {"lora": {"init": "eva"}}}, "zero3", "fp32", "eva runs the base before training"),
    ({"adapt": {"adalora": {}}}, "zero3", "bf16", None),
]


@pytest.mark.parametrize(("model", "kind", "precision", "said"), BACKENDS, ids=str)
def test_methods_that_a_backend_cannot_run(model: dict[str, Any], kind: str, precision: str, said: str | None) -> None:
    section = ModelSection.model_validate({"path": "there", **model})
    with pytest.raises(RecipeError, match=said) if said else contextlib.nullcontext():
        check_backend(section, kind, precision)


@pytest.mark.parametrize("gpu", [True, False])
def test_dora_on_int8_needs_a_gpu(monkeypatch: pytest.MonkeyPatch, gpu: bool) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    section = ModelSection.model_validate({"path": "there", "adapt": {"lora": {"dora": True}}, "quantize": "int8"})
    with contextlib.nullcontext() if gpu else pytest.raises(RecipeError, match="on a CPU, peft loses the scales"):
        check_backend(section, "single", "fp32")


def test_the_whole_table_of_an_encoder_decoder_is_refused() -> None:
    """peft would train a copy that neither encoder nor decoder reads."""
    model = network({**T5, "vocab_size": 64, "decoder_start_token_id": 0}, AutoModelForSeq2SeqLM)
    text = "embeddings: training the whole table has no effect in this network"
    with pytest.raises(RecipeError, match=text):
        adapted(model, {"lora": {"r": 2}, "embeddings": "all"}, task_type="SEQ_2_SEQ_LM")
    with pytest.raises(RecipeError, match=text):  # peft has no new tokens alone for this method
        adapted(model, {"ia3": {}}, task_type="SEQ_2_SEQ_LM", new_tokens=(60, 61))


# --- requests that cannot work ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> dict[str, Path]:
    """A classifier (BERT), a masked language model without a classifier (BERT), and a chat model (Llama)."""
    tasks = {"bert": "classification", "mlm": "mlm", "llama": "sft"}
    return {name: write_base(tmp_path_factory.mktemp(name), cache, task) for name, task in tasks.items()}


BROKEN: list[tuple[str, dict[str, Any], dict[str, Any], str]] = [
    ("bert", {"adapt": {"lora": {"targets": ["qury"]}}}, {}, "no layer of this network is called 'qury'; did you mean"),
    ("bert", {"adapt": {"lora": {"targets": "nothing.*"}}}, {}, "Its linear layers end in: query, key, value, dense"),
    ("bert", {"adapt": {"lora": {"targets": "("}}}, {}, "targets is not a regular expression"),
    ("bert", {"adapt": {"lora": {"r": 0}}}, {}, "lora.r: "),
    ("bert", {"adapt": {"lora": {"rang": 4}}}, {}, "rang"),
    ("bert", {"adapt": {"lora": {"init": "pizza"}}}, {}, "'pizza' is not one of default, gaussian, pissa"),
    ("bert", {"adapt": {"lora": {"layers": [2]}}}, {}, "there is no block 2; the network has 2, from 0"),
    ("bert", {"adapt": {"lora": {"rank_pattern": {"keyy": 2}}}}, {}, "no layer of this network is called 'keyy'"),
    ("bert", {"adapt": {"lora": {"target_parameters": ["experts.up"]}}}, {}, "no parameter is called 'experts.up'"),
    ("bert", {"adapt": {"lora": {"eva_rows": 8}}}, {}, "eva_rows: has no effect here: it needs init: eva"),
    ("bert", {"adapt": {"lora": {}, "bitfit": True}}, {}, "only one of last_layers, match"),
    ("bert", {"adapt": "lara"}, {}, "'lara': there is no such method; did you mean lora?"),
    ("bert", {"adapt": {"last_layers": 3}}, {}, "3 is more than the network's 2 blocks"),
    ("bert", {"adapt": {"match": "atention"}}, {}, "no parameter matches 'atention'. Some names: "),
    ("mlm", {"adapt": {"match": "query"}}, {}, "would keep random weights"),
    ("llama", {"adapt": "bitfit"}, {}, "this network has no biases. Use lora or last_layers"),
    ("bert", {"adapt": {"adalora": {"r": 4, "target_r": 4}}}, {}, "target_r: 4 is not below r (4)"),
    ("bert", {"adapt": {"adalora": {"start": 0.6, "end": 0.5}}}, {}, "leave no update in which ranks change"),
    ("bert", {"adapt": {"peft": {"type": "verra"}}}, {}, "peft has no method 'verra'; did you mean vera"),
    ("bert", {"adapt": {"peft": {"type": "vera", "rank": 4}}}, {}, "VeraConfig has no such key"),
    ("bert", {"adapt": {"peft": {"type": "poly", "r": 4}}}, {}, "poly needs a task number for each row"),
    (
        "llama",
        {"adapt": {"peft": {"type": "cartridge", "num_virtual_tokens": 3}}},
        {},
        "cartridge needs keys and values",
    ),
    ("llama", {"adapt": {"peft": {"type": "cpt"}}}, {}, "cpt computes its loss itself"),
    ("llama", {"adapt": {"peft": {"type": "xlora"}}}, {}, "xlora needs adapters that are already trained"),
    ("bert", {"adapt": {"peft": {"type": "adalora", "total_step": 9}}}, {}, "adalora: use model.adapt.adalora"),
    ("bert", {"adapt": {"peft": {"type": "lora", "init_lora_weights": "eva"}}}, {}, "eva: use model.adapt.lora.init"),
    ("bert", {"adapt": {"peft": {"type": "lora", "init_lora_weights": "lora_ga"}}}, {}, "lora_ga needs steps before"),
    ("bert", {"adapt": {"peft": {"type": "lora", "init_lora_weights": "loftq"}}}, {}, "loftq needs steps before"),
    ("bert", {"adapt": {"lora": {}, "name": "my.adapter"}}, {}, "adapt.name: 'my.adapter' contains a dot"),
    ("bert", {"adapt": {"bottleneck": {"targets": ["outputs"]}}}, {}, "no layer of this network is called 'outputs'"),
    ("bert", {"adapt": {"adapter": "no/such/adapter"}}, {}, "no/such/adapter"),
    ("bert", {"adapt": {"lora": {}, "embeddings": "new"}}, {}, "embeddings: new has no effect: no tokens are added"),
    ("bert", {"adapt": {"adapter": "x", "embeddings": "new"}}, {}, "embeddings: a saved adapter trains the embeddings"),
    ("llama", {"adapt": {"prompt_tuning": {}}}, {"sft": {"packing": True}}, "packing"),
    ("llama", {"adapt": {"prompt_tuning": {"tokens": 60}}}, {}, "60 virtual tokens leave 4 positions"),
    (
        "llama",
        {"adapt": {"peft": {"type": "prompt_tuning", "num_virtual_tokens": 60}}},
        {},
        "adapt: 60 virtual tokens leave 4 positions",
    ),
    (
        "bert",
        {"adapt": {"lora": {"layers": [1], "targets": ".*layer.0.*query"}}},
        {},
        "names no layer in the blocks of",
    ),
    ("bert", {"quantize": "nf4"}, {}, "quantized weights cannot be trained"),
    ("bert", {"quantize": "nf4", "adapt": {"lora": {"init": "pissa"}}}, {}, "pissa cannot decompose quantized weights"),
    (
        "bert",
        {"quantize": "nf4", "adapt": {"lora": {"init": "olora"}}},
        {},
        "olora changes the quantized weights, which",
    ),
    (
        "bert",
        {"quantize": "nf4", "adapt": {"peft": {"type": "lora", "init_lora_weights": "olora"}}},
        {},
        "adapt.peft.init_lora_weights: olora changes the quantized weights",
    ),
    ("bert", {"quantize": "nf4", "adapt": {"last_layers": 1}}, {}, "last_layers would train quantized weights"),
    ("bert", {"quantize": {"type": "int8", "double": True}, "adapt": "lora"}, {}, "double: has no effect here"),
    ("bert", {"quantize": "nf5", "adapt": "lora"}, {}, "there is no type 'nf5'; the types are nf4 and int8"),
    ("bert", {"dtype": "bf16"}, {}, "dtype: it applies to frozen weights"),
    ("bert", {"dtype": "bf16", "adapt": "lora"}, {}, "bf16 needs train.precision: bf16, which is fp32"),
    ("bert", {"adapt": "lora"}, {"optim": {"layer_decay": 1.5}}, "layer_decay"),
    ("bert", {"config": BERT, "path": None, "adapt": "lora"}, {}, "adapt: has no effect here: it needs model.path"),
]


@pytest.mark.parametrize(("base", "model", "changes", "said"), BROKEN, ids=[case[3][:40] for case in BROKEN])
def test_a_broken_request_has_one_clear_message(
    tmp_path: Path,
    bases: dict[str, Path],
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    base: str,
    model: dict[str, Any],
    changes: dict[str, Any],
    said: str,
) -> None:
    monkeypatch.setenv("PTFT_CACHE", str(cache))
    task = "sft" if base == "llama" else "classification"
    recipe = write_adapted(tmp_path, bases[base], task, model, **{"run_dir": str(tmp_path / "run"), **changes})
    with pytest.raises(RecipeError) as caught:
        ptft_dist.train(str(recipe), quiet=True)
    assert said in str(caught.value)
    assert not (tmp_path / "run/checkpoints").exists()


def test_an_adapter_for_another_network_is_refused(
    tmp_path: Path, bases: dict[str, Path], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PTFT_CACHE", str(cache))
    other = tmp_path / "adapter"
    wide = network({**BERT, "hidden_size": 48, "vocab_size": 64}, AutoModelForSequenceClassification)
    peft.get_peft_model(wide, peft.LoraConfig(task_type="SEQ_CLS", target_modules=["query"])).save_pretrained(other)
    model = {"adapt": {"adapter": str(other)}}
    recipe = write_adapted(tmp_path, bases["bert"], "classification", model, run_dir=str(tmp_path / "run"))
    with pytest.raises(RecipeError, match="does not fit this network"):
        ptft_dist.train(str(recipe), quiet=True)


def continued(folder: Path, base: Path, adapter: Path, add: list[str], **changes: Any) -> dict[str, Any]:
    """A recipe of the task sft that trains `adapter` further. add: tokens to add to the tokenizer."""
    path = write_adapted(folder, base, "sft", {"adapt": {"adapter": str(adapter)}}, **changes)
    recipe: dict[str, Any] = json.loads(path.read_text())
    return recipe | {"tokenizer": {"path": str(base), "add": add}}


def test_tokens_that_a_saved_adapter_does_not_save_are_refused(
    tmp_path: Path, bases: dict[str, Path], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rows of added tokens would not be trained, and the exported adapter would not contain them."""
    monkeypatch.setenv("PTFT_CACHE", str(cache))
    monkeypatch.chdir(tmp_path)
    plain_base = AutoModelForCausalLM.from_pretrained(bases["llama"])
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])
    peft.get_peft_model(plain_base, config).save_pretrained(tmp_path / "adapter")
    recipe = continued(tmp_path, bases["llama"], tmp_path / "adapter", ["small cat"], run_dir="run")
    with pytest.raises(RecipeError, match=r"^model\.adapt\.adapter: .* does not save .* 'small cat'.* ptft merge"):
        ptft_dist.train(recipe, quiet=True)
    assert not (tmp_path / "run/checkpoints").exists()


@pytest.mark.parametrize("embeddings", ["new", "all"])
def test_training_goes_on_from_an_adapter_with_added_tokens(
    tmp_path: Path, bases: dict[str, Path], cache: Path, monkeypatch: pytest.MonkeyPatch, embeddings: str
) -> None:
    """The adapter saves them, so the exported one has the loss of the last evaluation."""
    monkeypatch.setenv("PTFT_CACHE", str(cache))
    monkeypatch.chdir(tmp_path)
    short: dict[str, Any] = {"train": {"max_steps": 2}, "save": {"every": None}, "eval": {"every": 2}}
    adapt = {"adapt": {"lora": {"r": 2}, "embeddings": embeddings}}
    path = write_adapted(tmp_path, bases["llama"], "sft", adapt, run_dir="one", **short)
    recipe = json.loads(path.read_text())
    added = ["small cat", "old dog"]
    recipe["tokenizer"] = {"path": str(bases["llama"]), "add": added}
    ptft_dist.train(recipe, quiet=True)
    again = continued(tmp_path, bases["llama"], tmp_path / "one/model", added, run_dir="two", **short)
    last = ptft_dist.train(again, quiet=True).metrics["eval/loss"]
    assert ptft_dist.evaluate(again)["eval/loss"] == pytest.approx(last, rel=1e-5)


def test_a_changed_base_is_refused_at_a_resume(tmp_path: Path, bases: dict[str, Path], cache: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    for file in bases["bert"].iterdir():
        (base / file.name).write_bytes(file.read_bytes())
    write_adapted(tmp_path, base, "classification", {"adapt": "lora"}, train={"max_steps": 4})
    first = start("train", "recipe.yaml", cwd=tmp_path, cache=cache)
    assert first.wait() == 0, first.stderr
    weights = transformers.AutoModelForSequenceClassification.from_pretrained(base)
    with torch.no_grad():
        weights.bert.embeddings.word_embeddings.weight.add_(1.0)
    weights.save_pretrained(base)
    again = start("train", "recipe.yaml", "save.keep=5", cwd=tmp_path, cache=cache)
    assert again.wait() == 4, again.stderr
    assert "another base model" in again.stderr


def test_training_goes_on_from_an_adapter(tmp_path: Path, bases: dict[str, Path], cache: Path) -> None:
    """The first loss of the second run is that of the adapter, which plain peft computes too."""
    write_adapted(tmp_path, bases["llama"], "sft", {"adapt": "lora"}, run_dir="one", eval={"every": 8})
    first = start("train", "recipe.yaml", cwd=tmp_path, cache=cache)
    assert first.wait() == 0, first.stderr
    more = {"adapt": {"adapter": str(tmp_path / "one/model")}}
    changes: dict[str, Any] = {"run_dir": "two", "eval": {"every": 8, "at_start": True}}
    write_adapted(tmp_path, bases["llama"], "sft", more, **changes)
    second = start("train", "recipe.yaml", cwd=tmp_path, cache=cache)
    assert second.wait() == 0, second.stderr
    rows = {name: [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").open()] for name in ("one", "two")}
    last = [row for row in rows["one"] if "eval/loss" in row][-1]
    start_row = next(row for row in rows["two"] if "eval/loss" in row)
    assert start_row["eval/loss"] == pytest.approx(last["eval/loss"], rel=1e-6)
    assert train_rows(tmp_path / "two")[0]["loss"] < train_rows(tmp_path / "one")[0]["loss"]
