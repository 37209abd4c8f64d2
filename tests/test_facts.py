"""NetworkFacts of tiny networks against values from their configs and papers, also below adapters."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from task_support import make_task
from transformers import AutoConfig, PreTrainedModel

from ptft_dist.config.tokenizer_section import TokenizerTraining
from ptft_dist.data.store import Row
from ptft_dist.data.tokenizer import train_tokenizer
from ptft_dist.networks.facts import NetworkFacts, read_facts
from ptft_dist.tasks.registry import recipe_class

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}
BART = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "max_position_embeddings": 64,
}
T5 = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2}
MOE = {**SIZES, "num_key_value_heads": 2, "num_experts_per_tok": 2}


def build(model_type: str, auto: str, keys: dict[str, Any]) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **{"vocab_size": 100, **keys})
    model: PreTrainedModel = getattr(transformers, f"AutoModelFor{auto}").from_config(config)
    return model


# model type, head, config, (offset, positions, token types, tied, output head)
PLAIN: list[tuple[str, str, dict[str, Any], tuple[int, int | None, int, bool, str | None]]] = [
    ("bert", "MaskedLM", SIZES, (0, 64, 2, True, "cls.predictions.decoder")),
    ("bert", "SequenceClassification", SIZES, (0, 64, 2, False, None)),
    ("roberta", "MaskedLM", SIZES | {"pad_token_id": 1, "type_vocab_size": 1}, (2, 62, 1, True, "lm_head.decoder")),
    ("ibert", "MaskedLM", SIZES | {"pad_token_id": 1}, (2, 62, 2, True, "lm_head.decoder")),
    ("mpnet", "MaskedLM", SIZES | {"pad_token_id": 1}, (2, 62, 0, True, "lm_head.decoder")),
    (
        "distilbert",
        "MaskedLM",
        {"dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 2, "max_position_embeddings": 64},
        (0, 64, 0, True, "vocab_projector"),
    ),
    ("electra", "MaskedLM", SIZES | {"embedding_size": 16}, (0, 64, 2, True, "generator_lm_head")),
    ("xlnet", "CausalLM", {"d_model": 32, "d_inner": 64, "n_layer": 2, "n_head": 2}, (0, None, 0, True, "lm_loss")),
    ("fnet", "MaskedLM", SIZES | {"tpu_short_seq_length": 64}, (0, 64, 4, True, "cls.predictions.decoder")),
    ("t5", "Seq2SeqLM", T5, (0, None, 0, True, "lm_head")),
    ("bart", "Seq2SeqLM", BART, (0, 64, 0, True, "lm_head")),
    ("llama", "CausalLM", SIZES, (0, 64, 0, False, "lm_head")),
    ("gpt2", "CausalLM", {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}, (0, 64, 0, True, "lm_head")),
]


@pytest.mark.parametrize(("model_type", "auto", "keys", "expected"), PLAIN)
def test_positions_segments_and_heads(model_type: str, auto: str, keys: dict[str, Any], expected: Any) -> None:
    facts = read_facts(build(model_type, auto, keys))
    tied, head = facts.tied_embeddings, facts.output_head
    assert (facts.position_offset, facts.max_positions, facts.token_types, tied, head) == expected
    assert (facts.model_type, facts.layers, facts.hidden_size, facts.vocab_size) == (model_type, 2, 32, 100)
    assert facts.encoder_decoder is (model_type in ("t5", "bart"))
    assert facts.takes("attention_mask") is (model_type != "fnet")
    assert facts.takes("token_type_ids") is (model_type not in ("mpnet", "distilbert", "t5", "bart", "llama"))
    assert facts.takes("position_ids") is (model_type not in ("xlnet", "t5", "bart"))
    assert (facts.router_loss_weight, facts.experts, facts.experts_per_token) == (0.0, 0, 0)


def test_ids_of_special_tokens() -> None:
    bart = read_facts(build("bart", "Seq2SeqLM", BART | {"pad_token_id": 1, "decoder_start_token_id": 3}))
    assert (bart.decoder_start_id, bart.pad_token_id, bart.eos_ids) == (3, 1, (2,))
    model = build("llama", "CausalLM", SIZES)
    assert model.generation_config is not None
    model.generation_config.eos_token_id = [5, 7]
    assert read_facts(model).eos_ids == (5, 7)
    assert read_facts(build("bert", "SequenceClassification", SIZES)).eos_ids == ()


def test_the_first_token_of_a_decoder_may_stand_in_the_generation_config() -> None:
    model = build("bart", "Seq2SeqLM", BART | {"pad_token_id": 1, "decoder_start_token_id": 3})
    assert model.generation_config is not None
    model.generation_config.decoder_start_token_id = 4
    assert read_facts(model).decoder_start_id == 3
    model.config.decoder_start_token_id = None
    assert read_facts(model).decoder_start_id == 4


@pytest.mark.parametrize(
    ("model_type", "auto", "keys", "expected"),
    [
        ("mixtral", "CausalLM", MOE | {"num_local_experts": 4, "router_aux_loss_coef": 0.02}, (0.02, 4, 2)),
        ("mixtral", "CausalLM", MOE | {"num_local_experts": 4, "router_aux_loss_coef": 0.0}, (0.0, 4, 2)),
        # transformers adds no router loss to a classifier, nor to Llama 4, whatever their configs say.
        ("mixtral", "SequenceClassification", MOE | {"num_local_experts": 4}, (0.0, 4, 2)),
        (
            "llama4_text",
            "CausalLM",
            MOE | {"num_local_experts": 4, "head_dim": 16, "intermediate_size_mlp": 32, "num_experts_per_tok": 1},
            (0.0, 4, 1),
        ),
        (
            "qwen3_moe",
            "CausalLM",
            MOE | {"num_experts": 4, "head_dim": 16, "moe_intermediate_size": 16, "router_aux_loss_coef": 0.03},
            (0.03, 4, 2),
        ),
        (
            "jetmoe",  # calls its weight aux_loss_coef
            "CausalLM",
            {
                **{"hidden_size": 32, "num_hidden_layers": 2, "num_key_value_heads": 2, "kv_channels": 8},
                **{"intermediate_size": 32, "num_local_experts": 4, "num_experts_per_tok": 2, "aux_loss_coef": 0.04},
            },
            (0.04, 4, 2),
        ),
    ],
)
def test_mixtures_of_experts(model_type: str, auto: str, keys: dict[str, Any], expected: Any) -> None:
    facts = read_facts(build(model_type, auto, keys))
    assert (facts.router_loss_weight, facts.experts, facts.experts_per_token) == expected


# --- behind an adapter ------------------------------------------------------------------------------------------------

TEXTS = ["red green blue cat", "dog house tree runs sleeps eats red", "old new"]


def roberta(auto: str, words: Any) -> PreTrainedModel:
    ids = {"pad_token_id": words.pad_token_id, "bos_token_id": 0, "eos_token_id": 2}
    keys = SIZES | ids | {"vocab_size": len(words), "num_labels": 2, "type_vocab_size": 1}
    model = build("roberta", auto, keys).eval()
    with torch.no_grad():  # so large that a wrong position or mask shows
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


@pytest.mark.parametrize(("name", "auto"), [("mlm", "MaskedLM"), ("classification", "SequenceClassification")])
def test_an_adapter_hides_neither_attention_mask_nor_position_offset(name: str, auto: str) -> None:
    """A LoRA adapter starts at zero, so the loss of padded rows is that of the network alone. The facts are read
    before the adapter is put around it."""
    words = train_tokenizer(TokenizerTraining(vocab_size=320), TEXTS * 3, ("cls", "sep", "pad", "mask", "unk"))
    raw: dict[str, Any] = {
        "task": name,
        "model": {"config": {"model_type": "roberta"}},
        "tokenizer": {"train": {}},
        "data": {"train": [{"path": "none"}], "max_length": 32},
        "batch": {"global_size": 3, "micro_size": 3},
        "train": {"max_steps": 1, "precision": "fp32"},
        "run_dir": "run",
        **({"mlm": {"packing": False}} if name == "mlm" else {}),
    }
    model = roberta(auto, words)
    survey = {"labels": ["a", "b"], "frequencies": [2, 1], "rows": 3}
    task = make_task(recipe_class().model_validate(raw), words, survey, model=model)
    rows = [
        Row(np.array(words(text).input_ids), np.zeros(1, np.int64), {"labels": np.array([i % 2])})
        for i, text in enumerate(TEXTS)
    ]
    batch = task.collate(rows, [(0, i) for i in range(3)])
    assert bool((batch.inputs["attention_mask"] == 0).any())
    with torch.no_grad():
        alone = task.loss(model, batch.inputs).loss_sum
        singly = sum(task.loss(model, task.collate([row], [(0, i)]).inputs).loss_sum for i, row in enumerate(rows))
    wrapped = get_peft_model(model, LoraConfig(r=4, target_modules=["query", "value"])).eval()  # type: ignore[arg-type]
    with torch.no_grad():
        adapted = task.loss(wrapped, batch.inputs).loss_sum
    assert adapted.item() == pytest.approx(alone.item(), rel=1e-6)
    assert alone.item() == pytest.approx(float(singly), rel=1e-5)  # the padding is not read


def test_facts_are_a_value() -> None:
    facts: NetworkFacts = read_facts(build("llama", "CausalLM", SIZES))
    assert facts == read_facts(build("llama", "CausalLM", SIZES))
