"""Span corruption: no token is lost, fractions as in the paper, and the loss of transformers' head."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from support import ROOT
from task_support import for_model, make_task
from transformers import AutoModelForSeq2SeqLM, BartConfig, LlamaConfig, PreTrainedTokenizerFast, T5Config

from ptft_dist.config.recipe import Recipe
from ptft_dist.config.tokenizer_section import TokenizerTraining
from ptft_dist.data.store import Row
from ptft_dist.data.tokenizer import train_tokenizer
from ptft_dist.errors import RecipeError
from ptft_dist.networks.load import build_model
from ptft_dist.tasks.protocol import TaskSetup
from ptft_dist.tasks.registry import recipe_class
from ptft_dist.tasks.span_corruption.settings import SpanCorruptionSettings
from ptft_dist.tasks.span_corruption.task import SpanCorruption, noise_mask, sentinel_ids
from ptft_dist.training.batches import mask_all

TEXTS = [path.read_text() for path in sorted((ROOT / "ptft_dist").rglob("*.py"))]
T5 = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2}
BART = {"d_model": 32, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "encoder_layers": 2, "decoder_layers": 2}
BART |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_position_embeddings": 128}


def recipe(max_length: int = 64, tokenizer: dict[str, Any] | None = None, **section: Any) -> Recipe:
    return recipe_class().model_validate(
        {
            "task": "span_corruption",
            "model": {"config": {"model_type": "t5"}},
            "tokenizer": tokenizer or {"train": {}},
            "data": {"train": [{"source": "python-stdlib"}], "max_length": max_length},
            "span_corruption": section,
            "batch": {"global_size": 1, "micro_size": 1},
            "train": {"max_steps": 1},
            "run_dir": "run",
        }
    )


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    section = SpanCorruptionSettings(sentinels=40)
    settings = TokenizerTraining(algorithm="bpe", vocab_size=600)
    return train_tokenizer(settings, TEXTS, section.special_tokens, section.extra_special_tokens)


def make(tokenizer: PreTrainedTokenizerFast, **section: Any) -> SpanCorruption:
    return make_task(recipe(**section), tokenizer)


def rows_of(tokenizer: PreTrainedTokenizerFast, lengths: list[int], eos: bool = True) -> list[Row]:
    rows = []
    for length, text in zip(lengths, TEXTS, strict=False):
        ids = tokenizer(text, add_special_tokens=False).input_ids[: length - eos] + [tokenizer.eos_token_id] * eos
        rows.append(Row(np.array(ids), np.zeros(1, np.int64)))
    return rows


def merged(source: list[int], target: list[int], sentinels: list[int]) -> list[int]:
    """The text that source and target came from: each sentinel of the one stands for what follows it in the other."""
    assert source[-1] == target[-1], "both end with EOS"
    spans: dict[int, list[int]] = {}
    for token in target[:-1]:
        if token in sentinels:
            spans[token] = []
        else:
            spans[list(spans)[-1]].append(token)
    assert list(spans) == sentinels[: len(spans)], "each once, in order"
    assert [token for token in source if token in sentinels] == list(spans)
    assert all(spans.values())
    whole: list[int] = []
    for token in source[:-1]:
        whole += spans.get(token, [token])
    return whole


@pytest.mark.parametrize("eos", [True, False])
def test_source_and_target_together_are_the_row(tokenizer: PreTrainedTokenizerFast, eos: bool) -> None:
    """Sentinels are found by their names, and the row is put together by hand."""
    sentinels = tokenizer.convert_tokens_to_ids([f"<extra_id_{i}>" for i in range(40)])
    assert len(set(sentinels)) == 40
    task = make(tokenizer)
    for epoch in range(5):
        for i, row in enumerate(rows_of(tokenizer, list(range(2 + eos, 40)) * 2, eos)):
            source, target = (x.tolist() for x in task.corrupt(row.input_ids, (epoch, i)))
            assert source[-1] == tokenizer.eos_token_id
            assert merged(source, target, sentinels) == row.input_ids.tolist()[: len(row.input_ids) - eos]


@pytest.mark.parametrize(("density", "mean_span"), [(0.15, 3.0), (0.3, 5.0), (0.4, 1.0), (0.9, 2.0)])
def test_the_shares_are_those_of_the_recipe(density: float, mean_span: float) -> None:
    """So many tokens, in so many spans, as the length says: no more and no less, as in T5."""
    section = SpanCorruptionSettings(density=density, mean_span=mean_span)
    lengths = set()
    for length in (20, 100, 513):
        for i in range(50):
            mask = noise_mask(length, section, np.random.default_rng(i)).tolist()
            begins = sum(b and not a for a, b in pairwise([False, *mask]))
            assert sum(mask) == round(length * density)
            assert begins == min(round(sum(mask) / mean_span), length - sum(mask))
            assert not mask[0]
            assert mask[-1]
            lengths.add(tuple(mask))
    assert len(lengths) > 100, "the places are random"


def test_all_ways_to_cut_are_equally_likely() -> None:
    """Ten tokens, four hidden in two spans: 5 x 3 masks, each as often."""
    section, counts = SpanCorruptionSettings(density=0.4, mean_span=2.0), dict[tuple[bool, ...], int]()
    random = np.random.default_rng(0)
    for _ in range(6000):
        mask = tuple(noise_mask(10, section, random).tolist())
        counts[mask] = counts.get(mask, 0) + 1
    assert len(counts) == 15
    assert min(counts.values()) > 300
    assert max(counts.values()) < 500


def test_what_is_drawn_follows_from_seed_epoch_and_row_alone(tokenizer: PreTrainedTokenizerFast) -> None:
    task, rows = make(tokenizer), rows_of(tokenizer, [30, 40, 50])
    together = task.collate(rows, [(3, i) for i in range(3)]).inputs
    for i, row in enumerate(rows):
        alone = task.collate([row], [(3, i)]).inputs
        for name in ("input_ids", "attention_mask", "decoder_input_ids", "targets"):
            values = alone[name]
            assert torch.equal(values[0], together[name][i, : values.shape[1]]), name
    assert not torch.equal(task.collate(rows, [(4, i) for i in range(3)]).inputs["targets"], together["targets"])


@pytest.mark.parametrize("config", [T5Config(**T5), BartConfig(**BART)], ids=["t5", "bart"])
def test_the_loss_is_that_of_transformers(tokenizer: PreTrainedTokenizerFast, config: Any) -> None:
    """Which moves the labels to the right by itself."""
    task = make(tokenizer)
    config.vocab_size, config.pad_token_id = len(tokenizer), tokenizer.pad_token_id
    config.decoder_start_token_id = None
    SpanCorruption.fit_config(TaskSetup.of(recipe(), tokenizer, {}), config)
    assert config.decoder_start_token_id == tokenizer.pad_token_id
    model = build_model(recipe().model, config, 0, AutoModelForSeq2SeqLM).eval()
    task = for_model(task, model)
    batch = task.collate(rows_of(tokenizer, [20, 33, 64]), [(0, i) for i in range(3)])
    inputs = batch.inputs
    with torch.no_grad():
        loss, metrics, *_ = task.loss(model, inputs)
        theirs = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], labels=inputs["targets"])
    assert batch.count == (inputs["targets"] != -100).sum()
    assert loss.item() == pytest.approx(theirs.loss.item() * batch.count, rel=1e-5)
    right = (theirs.logits.argmax(-1) == inputs["targets"]).sum().item()
    assert [x.item() for x in metrics["accuracy"]] == [right, batch.count]
    nothing = task.loss(model, mask_all(inputs)).loss_sum
    assert nothing.item() == 0
    assert nothing.requires_grad


def test_a_row_of_one_token_hides_nothing(tokenizer: PreTrainedTokenizerFast) -> None:
    eos = tokenizer.eos_token_id
    source, target = make(tokenizer).corrupt(np.array([300, eos]), (0, 0))
    assert source.tolist() == [300, eos]
    assert target.tolist() == [eos]


def test_what_cannot_work_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    t5 = T5Config(**T5)
    with pytest.raises(RecipeError, match=r"1000 tokens has up to 50 .* has 40 .*span_corruption\.sentinels"):
        SpanCorruption.fit_config(TaskSetup.of(recipe(1000), tokenizer, {}), t5)
    with pytest.raises(RecipeError, match=r"tokenizer\.add"):
        SpanCorruption.fit_config(TaskSetup.of(recipe(1000, {"path": "somewhere"}), tokenizer, {}), t5)
    with pytest.raises(ValueError, match=r"span_corruption\.sentinels: has no effect here"):
        recipe(64, {"path": "somewhere"}, sentinels=40)
    with pytest.raises(RecipeError, match=r"llama .*task: clm"):
        SpanCorruption.fit_config(TaskSetup.of(recipe(), tokenizer, {}), LlamaConfig())
    assert sentinel_ids(train_tokenizer(TokenizerTraining(vocab_size=300), TEXTS)) == []


@pytest.mark.parametrize(("density", "mean_span"), [(0.15, 1.0), (0.5, 1.0), (0.9, 2.0), (0.9, 10.0)])
def test_rows_that_grow_beyond_the_positions_are_refused(
    tokenizer: PreTrainedTokenizerFast, density: float, mean_span: float
) -> None:
    """One position fewer than the longest input or target that comes out is too few; as many are enough."""
    ours = recipe(64, density=density, mean_span=mean_span)
    task = make_task(ours, tokenizer)
    made = [task.corrupt(np.arange(100, 100 + n), (0, n)) for n in range(1, 65)]
    longest = max(len(ids) for pair in made for ids in pair)
    bart = BartConfig(**BART | {"max_position_embeddings": longest - 1})
    if longest - 1 >= 64:  # otherwise, data.max_length itself is refused elsewhere
        with pytest.raises(RecipeError, match=rf"of {longest} tokens, .* has {longest - 1} positions"):
            SpanCorruption.fit_config(TaskSetup.of(ours, tokenizer, {}), bart)
    bart.max_position_embeddings = longest
    SpanCorruption.fit_config(TaskSetup.of(ours, tokenizer, {}), bart)
