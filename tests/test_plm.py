"""Permuted language modelling: attention masks, transformers' collator and loss, and no information leak."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from support import ROOT
from task_support import for_model, make_task
from transformers import (
    AutoModelForCausalLM,
    DataCollatorForPermutationLanguageModeling,
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    XLNetConfig,
)

from ptft_dist.config.recipe import Recipe
from ptft_dist.config.tokenizer_section import TokenizerTraining
from ptft_dist.data.store import Row
from ptft_dist.data.tokenizer import train_tokenizer
from ptft_dist.errors import RecipeError
from ptft_dist.networks.load import build_model
from ptft_dist.tasks.plm.settings import PlmSettings
from ptft_dist.tasks.plm.task import PermutedLM, choose_spans, hidden
from ptft_dist.tasks.protocol import TaskSetup
from ptft_dist.tasks.registry import recipe_class
from ptft_dist.training.batches import mask_all

TEXTS = [path.read_text() for path in sorted((ROOT / "ptft_dist").rglob("*.py"))]
SIZES = {"d_model": 32, "d_inner": 64, "n_layer": 2, "n_head": 2}


def recipe(**section: Any) -> Recipe:
    return recipe_class().model_validate(
        {
            "task": "plm",
            "model": {"config": {"model_type": "xlnet"}},
            "tokenizer": {"train": {}},
            "data": {"train": [{"source": "python-stdlib"}]},
            "plm": section,
            "batch": {"global_size": 1, "micro_size": 1},
            "train": {"max_steps": 1},
            "run_dir": "run",
        }
    )


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(TokenizerTraining(vocab_size=600), TEXTS, PlmSettings().special_tokens)


@pytest.fixture(scope="module")
def model(tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    config = XLNetConfig(vocab_size=len(tokenizer), **SIZES)
    return build_model(recipe().model, config, 0, AutoModelForCausalLM).eval()


def make(tokenizer: PreTrainedTokenizerFast, **section: Any) -> PermutedLM:
    return make_task(recipe(**section), tokenizer)


def rows_of(tokenizer: PreTrainedTokenizerFast, lengths: list[int]) -> list[Row]:
    rows = []
    for length, text in zip(lengths, TEXTS, strict=False):
        ids = [*tokenizer(text, add_special_tokens=False).input_ids[: length - 1], tokenizer.eos_token_id]
        rows.append(Row(np.array(ids), np.zeros(1, np.int64)))
    return rows


def test_who_sees_whom_by_its_definition(tokenizer: PreTrainedTokenizerFast) -> None:
    """i attends to j if j is not predicted; or if both are predicted, and i is later in the order."""
    task, rows = make(tokenizer, mask_share=0.5), rows_of(tokenizer, [9, 14, 20])
    keys = [(1, i) for i in range(3)]
    inputs = task.collate(rows, keys).inputs
    width = inputs["input_ids"].shape[1]
    for b, (row, key) in enumerate(zip(rows, keys, strict=True)):
        chosen, order = task.draw(row, key)
        n, predicted = len(row.input_ids), [j for j in range(len(row.input_ids)) if chosen[j]]
        assert sorted(order.tolist()) == list(range(n))
        for i in range(n):
            for j in range(n):
                sees = not chosen[j] or bool(chosen[i] and order[i] > order[j])
                assert inputs["perm_mask"][b, i, j].item() == (0.0 if sees else 1.0), (i, j)
        assert inputs["attention_mask"][b].tolist() == [1.0] * n + [0.0] * (width - n)
        assert inputs["input_ids"][b, :n].tolist() == row.input_ids.tolist()
        for p, mapping in enumerate(inputs["target_mapping"][b].tolist()):
            there = p < len(predicted)
            assert mapping == [float(there and j == predicted[p]) for j in range(width)]
            assert inputs["targets"][b, p].item() == (row.input_ids[predicted[p]] if there else -100)


def test_the_mask_is_that_of_transformers_collator(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Given its choice, and the order that it drew: seen by watching torch.randperm, and put together as it does. It
    draws the order of one half of a row and uses it for both, the second half after the first."""
    drawn, randperm = [], torch.randperm
    monkeypatch.setattr(torch, "randperm", lambda n: drawn.append(randperm(n)) or drawn[-1])
    torch.manual_seed(0)
    ids = [row.input_ids[:-1].tolist() for row in rows_of(tokenizer, [41, 41, 41, 41])]  # without special tokens
    batch = DataCollatorForPermutationLanguageModeling(tokenizer, plm_probability=1 / 6)(ids)
    predicted = 0
    for b, half in enumerate(drawn):
        order = torch.cat([half, half + 20]).numpy()
        chosen = (batch["labels"][b] != -100).numpy()
        assert (hidden(chosen, order) == batch["perm_mask"][b].bool().numpy()).all()
        predicted += int(chosen.sum())
    assert len(drawn) == 4
    assert predicted > 10


def test_the_share_is_that_of_the_recipe() -> None:
    """In runs of 1 to 5 tokens, evenly, which may touch; never special tokens."""
    section, special = PlmSettings(), np.zeros(3000, bool)
    special[::10] = True
    shares, kept = [], 0
    for i in range(40):
        shares.append(choose_spans(np.zeros(3000, bool), section, np.random.default_rng(i)).mean())
        kept += int((choose_spans(special, section, np.random.default_rng(i)) & special).sum())
    assert np.mean(shares) == pytest.approx(1 / 6, abs=0.004)
    assert kept == 0
    edges = np.flatnonzero(np.diff(choose_spans(np.zeros(60000, bool), section, np.random.default_rng(0)).astype(int)))
    lengths = np.bincount(edges[1::2] - edges[::2])
    assert lengths[1:6].min() > 0.15 * lengths.sum()
    assert lengths[6:].sum() < 0.05 * lengths.sum()
    dense = PlmSettings(mask_share=0.99)
    for i in range(50):  # somebody must be seen
        assert not choose_spans(np.zeros(2, bool), dense, np.random.default_rng(i)).all()


def test_a_span_begins_anywhere_in_its_stretch_equally_often() -> None:
    """One token of every six: each of the six places about 1,000 times."""
    section = PlmSettings(longest_span=1, mask_share=1 / 6)
    chosen = choose_spans(np.zeros(36000, bool), section, np.random.default_rng(0))
    times = chosen.reshape(6000, 6).sum(0)
    assert times.sum() == 6000
    assert (abs(times - 1000) < 120).all(), times  # four standard deviations


def test_the_loss_is_that_of_transformers(tokenizer: PreTrainedTokenizerFast, model: PreTrainedModel) -> None:
    task = make(tokenizer)
    batch = task.collate(rows_of(tokenizer, [20, 41, 64]), [(0, i) for i in range(3)])
    inputs = {key: x for key, x in batch.inputs.items() if key != "targets"}
    with torch.no_grad():
        loss, metrics, *_ = task.loss(model, batch.inputs)
        theirs = model(**inputs, labels=batch.inputs["targets"])
    assert batch.count == (batch.inputs["targets"] != -100).sum() > 10
    assert loss.item() == pytest.approx(theirs.loss.item() * batch.count, rel=1e-5)
    right = (theirs.logits.argmax(-1) == batch.inputs["targets"]).sum().item()
    assert [x.item() for x in metrics["accuracy"]] == [right, batch.count]
    nothing = task.loss(model, mask_all(batch.inputs)).loss_sum
    assert nothing.item() == 0
    assert nothing.requires_grad


def test_no_prediction_knows_its_token_or_a_later_one(
    tokenizer: PreTrainedTokenizerFast, model: PreTrainedModel
) -> None:
    """Another token in the place of one that is predicted moves the predictions after it in the order alone."""
    task, row = make(tokenizer, mask_share=0.4), rows_of(tokenizer, [40])[0]
    chosen, order = task.draw(row, (0, 0))
    inputs = {k: x for k, x in task.collate([row], [(0, 0)]).inputs.items() if k != "targets"}
    places = np.flatnonzero(chosen)
    with torch.no_grad():
        before = model(**inputs).logits[0]
        for place in places:
            changed = inputs["input_ids"].clone()
            changed[0, place] = (changed[0, place] + 7) % 500 + 50
            after = model(**{**inputs, "input_ids": changed}).logits[0]
            moved = (after - before).abs().amax(-1) > 1e-7
            assert moved.tolist() == [bool(order[other] > order[place]) for other in places]


def test_a_row_alone_is_the_row_among_longer_ones(tokenizer: PreTrainedTokenizerFast, model: PreTrainedModel) -> None:
    """What is drawn follows from seed, epoch and row, and nobody sees the padding."""
    task, rows = make(tokenizer), rows_of(tokenizer, [15, 40, 64])
    with torch.no_grad():
        together = task.loss(model, task.collate(rows, [(2, i) for i in range(3)]).inputs).loss_sum
        alone = [task.loss(model, task.collate([row], [(2, i)]).inputs).loss_sum for i, row in enumerate(rows)]
    assert together.item() == pytest.approx(sum(x.item() for x in alone), rel=1e-5)
    other_epoch = task.collate(rows, [(3, i) for i in range(3)]).inputs["perm_mask"]
    assert not torch.equal(other_epoch, task.collate(rows, [(2, i) for i in range(3)]).inputs["perm_mask"])


def test_weights_that_move_nothing_are_frozen_and_all_others_learn(
    tokenizer: PreTrainedTokenizerFast, model: PreTrainedModel
) -> None:
    task = make(tokenizer)
    task = for_model(task, model)
    inputs = task.collate(rows_of(tokenizer, [40, 64]), [(0, 0), (0, 1)]).inputs
    task.loss(model, inputs).loss_sum.backward()
    without = {name.rsplit(".", 1)[-1] for name, p in model.named_parameters() if p.grad is None}
    assert without == {"seg_embed", "r_s_bias"}
    segments = {k: x for k, x in inputs.items() if k != "targets"}
    with torch.no_grad():
        plain, zeros = model(**segments), model(**segments, token_type_ids=torch.zeros_like(inputs["input_ids"]))
    assert torch.allclose(plain.logits, zeros.logits, atol=1e-6)


def test_other_networks_are_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(RecipeError, match=r"llama .*task: clm"):
        PermutedLM.fit_config(TaskSetup.of(recipe(), tokenizer, {}), LlamaConfig())
    for change in ({"attn_type": "uni"}, {"bi_data": True}):
        with pytest.raises(RecipeError, match="attn_type: bi and bi_data: false"):
            PermutedLM.fit_config(TaskSetup.of(recipe(), tokenizer, {}), XLNetConfig(**SIZES, **change))
    PermutedLM.fit_config(TaskSetup.of(recipe(), tokenizer, {}), XLNetConfig(**SIZES))
