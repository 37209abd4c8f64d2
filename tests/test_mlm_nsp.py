"""BERT's pretraining: the origin of segments, their truncation, and the losses of transformers' heads."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from prepare_support import prepare
from support import ROOT
from task_support import for_model, make_task
from transformers import (
    AlbertConfig,
    AutoModelForPreTraining,
    BertConfig,
    BertForPreTraining,
    BigBirdConfig,
    FNetConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
    RobertaConfig,
)

from ptft_dist.config.recipe import Recipe
from ptft_dist.config.tokenizer_section import TokenizerTraining
from ptft_dist.data.prepare import Prepared, describe
from ptft_dist.data.store import Store
from ptft_dist.data.tokenizer import load_tokenizer, train_tokenizer
from ptft_dist.errors import DataError, RecipeError
from ptft_dist.networks.load import build_model
from ptft_dist.tasks.mlm_nsp.encode import Pair, split_sentences
from ptft_dist.tasks.mlm_nsp.settings import MlmNspSettings
from ptft_dist.tasks.mlm_nsp.task import MaskedLMWithPairs
from ptft_dist.tasks.protocol import TaskSetup
from ptft_dist.tasks.registry import recipe_class
from ptft_dist.training.batches import mask_all

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
MARK = re.compile(r"d(\d+)s(\d+)e")
Documents = list[list[str]]


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    texts = [path.read_text() for path in sorted((ROOT / "ptft_dist").rglob("*.py"))[:20]]
    settings = TokenizerTraining(algorithm="bpe", vocab_size=600)
    train_tokenizer(settings, texts, MlmNspSettings().special_tokens).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(tokenizer_dir: Path) -> PreTrainedTokenizerFast:
    return load_tokenizer(tokenizer_dir)


def made(count: int, fewest: int = 1, most: int = 9) -> Documents:
    """Documents of sentences that say which they are: d3s0e, d3s1e and so on, and a few words."""
    chance = random.Random(0)
    words = ["red", "cat", "sleeps", "under", "every", "tree"]
    return [
        [f"d{d}s{s}e {' '.join(chance.choices(words, k=chance.randint(1, 6)))}." for s in range(n)]
        for d, n in enumerate(chance.randint(fewest, most) for _ in range(count))
    ]


def recipe(tokenizer_dir: Path, max_length: int = 400, seed: int = 0, validation: Any = None, **section: Any) -> Recipe:
    return recipe_class().model_validate(
        {
            "task": "mlm_nsp",
            "model": {"config": {"model_type": "bert"}},
            "tokenizer": {"path": str(tokenizer_dir)},
            "data": {
                "train": [{"path": "text.jsonl"}],
                "validation": validation,
                "max_length": max_length,
                "cache_dir": "cache",
            },
            "mlm_nsp": {"short_probability": 0.0} | section,
            "batch": {"global_size": 1, "micro_size": 1},
            "train": {"max_steps": 1, "seed": seed},
            "run_dir": "run",
        }
    )


def prepared(base: Path, tokenizer_dir: Path, documents: Documents, **settings: Any) -> Prepared:
    base.mkdir(exist_ok=True)
    (base / "text.jsonl").write_text("".join(json.dumps({"text": " ".join(d)}) + "\n" for d in documents))
    return prepare(recipe(tokenizer_dir, **settings), base)


def segments(store: Store, tokenizer: PreTrainedTokenizerFast) -> list[tuple[str, str, bool]]:
    """Both segments of each row, split at [SEP], and whether the row is a negative pair."""
    found = []
    for i in range(len(store)):
        row = store.row(i)
        ids = row.input_ids.tolist()
        middle = ids.index(tokenizer.sep_token_id)
        assert ids[0] == tokenizer.cls_token_id
        assert ids.index(tokenizer.sep_token_id, middle + 1) == len(ids) - 1
        assert row.columns["token_type_ids"].tolist() == [0] * (middle + 1) + [1] * (len(ids) - middle - 1)
        texts = tokenizer.decode(ids[1:middle]), tokenizer.decode(ids[middle + 1 : -1])
        found.append((*texts, bool(row.columns["next"][0])))
    return found


def marks(text: str) -> list[tuple[int, int]]:
    return [(int(d), int(s)) for d, s in MARK.findall(text)]


def test_segments_are_whole_sentences_that_follow_or_are_from_elsewhere(
    tmp_path: Path, tokenizer_dir: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Read back from the text. Sentences that a random segment displaced are used again: none is lost."""
    documents, several = made(150), 0
    for max_length in (2000, 100):  # of the shorter ones, some lose an end
        seen = set()
        done = prepared(tmp_path / str(max_length), tokenizer_dir, documents, max_length=max_length)
        for first, second, unrelated in segments(done.train, tokenizer):
            ours, theirs = marks(first), marks(second)
            if max_length == 2000:
                for text, found in ((first, ours), (second, theirs)):
                    d, s = found[0]
                    assert text == "".join(documents[d][s : s + len(found)])
            if ours and theirs:
                several += len(ours) > 1 < len(theirs)
                document, s = ours[-1]
                assert {d for d, _ in ours} == {document}
                assert len({d for d, _ in theirs}) == 1
                assert theirs[0][0] != document if unrelated else theirs[0] == (document, s + 1)
                seen |= set(ours) if unrelated else set(ours + theirs)
        if max_length == 2000:
            assert seen == {(d, s) for d, document in enumerate(documents) for s in range(len(document))}
    assert several > 20


@pytest.mark.parametrize("single", [0, 60])
def test_half_of_the_pairs_are_random(
    tmp_path: Path, tokenizer_dir: Path, tokenizer: PreTrainedTokenizerFast, single: int
) -> None:
    """Also where some documents have one sentence only, and so no continuation; and the report says how many."""
    documents = made(150, 2) + [[f"d{150 + i}s0e red."] for i in range(single)]
    random.Random(0).shuffle(documents)
    done = prepared(tmp_path, tokenizer_dir, documents, max_length=60, duplicates=3)
    pairs = segments(done.train, tokenizer)
    unrelated = sum(pair[2] for pair in pairs)
    assert unrelated / len(pairs) == pytest.approx(0.5, abs=0.03)
    assert done.report.notes["with a random second segment"].times == unrelated
    assert done.report.notes["with the next segment"].times == len(pairs) - unrelated
    shown = describe(done.report)
    assert f"{unrelated:,} examples with a random" in shown
    assert f"{len(pairs):,} examples," in shown  # pairs, which are not as many as documents
    assert "each of one example" in shown
    firsts = {marks(first)[-1] for first, _, _ in pairs if marks(first)}
    assert {(150 + i, 0) for i in range(single)} <= firsts


def test_length_does_not_tell_a_random_segment(tmp_path: Path, tokenizer_dir: Path) -> None:
    store = prepared(tmp_path, tokenizer_dir, made(400, 12, 30), max_length=60, duplicates=2).train
    lengths: dict[bool, list[int]] = {True: [], False: []}
    for i in range(len(store)):
        row = store.row(i)
        lengths[bool(row.columns["next"][0])].append(int(row.columns["token_type_ids"].sum()))
    assert np.mean(lengths[True]) == pytest.approx(np.mean(lengths[False]), rel=0.06)


def test_rows_are_short_enough_and_some_are_shorter(tmp_path: Path, tokenizer_dir: Path) -> None:
    lengths = {}
    for share in (0.0, 1.0):
        done = prepared(tmp_path, tokenizer_dir, made(100, 5), max_length=40, short_probability=share)
        store = done.train
        lengths[share] = store.lengths(np.arange(len(store)))
        assert lengths[share].max() == 40
        assert done.report.notes["truncated at their outer ends"].times > 0
    assert lengths[1.0].mean() < lengths[0.0].mean() - 2


def test_a_pair_is_shortened_token_by_token() -> None:
    """From the longer segment each time, at the end that is not at the seam."""
    for a in range(1, 30):
        for b in range(1, 30):
            for room in (2, 3, 10, 21, 60):
                first, second = list(range(a)), list(range(100, 100 + b))
                while len(first) + len(second) > room:
                    if len(first) > len(second):
                        del first[0]
                    else:
                        del second[-1]
                ours = Pair(np.arange(a), np.arange(100, 100 + b), False).fitted(room)
                assert [x.tolist() for x in ours] == [first, second]


def test_everything_follows_from_the_seed(tmp_path: Path, tokenizer_dir: Path) -> None:
    def rows(name: str, **settings: Any) -> list[list[int]]:
        store = prepared(tmp_path / name, tokenizer_dir, made(60), **settings).train
        return [store.row(i).input_ids.tolist() for i in range(len(store))]

    first = rows("a", max_length=60)
    assert rows("b", max_length=60) == first
    assert rows("c", max_length=60, seed=1) != first
    twice = rows("d", max_length=60, duplicates=2)
    assert twice[: len(first)] == first
    assert twice[len(first) :] != first


def test_a_copy_of_a_document_is_not_another_document(
    tmp_path: Path, tokenizer_dir: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    documents = [made(1, 6)[0]] * 200 + [["d7s0e red.", "d7s1e cat."]]
    for first, second, unrelated in segments(prepared(tmp_path, tokenizer_dir, documents).train, tokenizer):
        assert ({d for d, _ in marks(first)} != {d for d, _ in marks(second)}) == unrelated


def test_sides_do_not_mix_and_nothing_is_left_behind(
    tmp_path: Path, tokenizer_dir: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    done = prepared(tmp_path, tokenizer_dir, made(100), validation=0.3)
    assert done.validation is not None
    sides = [
        {d for first, second, _ in segments(store, tokenizer) for d, _ in marks(first) + marks(second)}
        for store in (done.train, done.validation)
    ]
    assert min(map(len, sides)) > 10
    assert not sides[0] & sides[1]
    assert sorted(path.name for path in done.train.path.parent.iterdir()) == ["report.json", "train", "validation"]


@pytest.mark.parametrize(
    ("documents", "message"),
    [
        (made(1, 5), "one document"),
        ([["Red cat.", "Old dog."]] * 5, "one document"),
        (made(20, 1, 1), "no document with two sentences"),
        ([], "empty"),
    ],
)
def test_documents_that_give_no_pairs_are_refused(
    tmp_path: Path, tokenizer_dir: Path, documents: Documents, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        prepared(tmp_path, tokenizer_dir, documents)


def test_sentences() -> None:
    text = 'Is it 3.5? "Yes!" he said.  So\nit is... Fine'
    assert split_sentences(text, "punctuation") == ["Is it 3.5?", '"Yes!"', "he said.", "So", "it is...", "Fine"]
    assert split_sentences(text, "line") == ['Is it 3.5? "Yes!" he said.  So', "it is... Fine"]
    chinese = "\u4f60\u597d\u3002\u201c\u771f\u7684\uff1f\u201d\u662f\uff01\n \n\u5b8c"
    expected = ["\u4f60\u597d\u3002", "\u201c\u771f\u7684\uff1f\u201d", "\u662f\uff01", "\u5b8c"]
    assert split_sentences(chinese, "punctuation") == expected


def batch_of(task: MaskedLMWithPairs, store: Store, rows: list[int]) -> Any:
    return task.collate([store.row(i) for i in rows], [(0, i) for i in rows])


def test_the_losses_are_those_of_transformers(
    tmp_path: Path, tokenizer_dir: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    store = prepared(tmp_path, tokenizer_dir, made(30), max_length=60).train
    task = make_task(recipe(tokenizer_dir), tokenizer)
    config = BertConfig(vocab_size=len(tokenizer), **SIZES)
    model = build_model(recipe(tokenizer_dir).model, config, 0, AutoModelForPreTraining).eval()
    assert isinstance(model, BertForPreTraining)
    task = for_model(task, model)
    batch = batch_of(task, store, [0, 3, 5, 11, 12, 14])
    inputs = batch.inputs
    with torch.no_grad():
        loss, metrics, *_ = task.loss(model, inputs)
        theirs = model(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"].long(),
            token_type_ids=inputs["token_type_ids"],
            labels=inputs["targets"],
            next_sentence_label=inputs["targets_next"],
        )
    assert batch.counts == ((inputs["targets"] != -100).sum(), 6)
    assert {0, 1} == set(inputs["targets_next"].tolist())
    assert sum(a / b for a, b in zip(loss.tolist(), batch.counts, strict=True)) == pytest.approx(
        theirs.loss.item(), rel=1e-5
    )
    averages = {name: (total / count).item() for name, (total, count) in metrics.items()}
    scores = task.eval_metrics({"loss": theirs.loss.item(), **averages})
    assert set(scores) == set(task.settings.metric_names)
    assert scores["mlm_loss"] + scores["nsp_loss"] == pytest.approx(theirs.loss.item(), rel=1e-5)
    assert scores["perplexity"] == pytest.approx(np.exp(scores["mlm_loss"]))
    right = (theirs.seq_relationship_logits.argmax(-1) == inputs["targets_next"]).float().mean().item()
    assert scores["nsp_accuracy"] == pytest.approx(right)
    nothing = task.loss(model, mask_all(inputs)).loss_sum
    assert nothing.tolist() == [0, 0]
    assert nothing.requires_grad


def test_a_row_alone_is_the_row_among_longer_ones(
    tmp_path: Path, tokenizer_dir: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Also for FNet, which has no attention mask: all its rows are padded alike."""
    store = prepared(tmp_path, tokenizer_dir, made(30), max_length=60).train
    rows = np.argsort(store.lengths(np.arange(len(store))))[[0, 10, -1]].tolist()
    for config in (BertConfig(vocab_size=len(tokenizer), **SIZES), FNetConfig(vocab_size=len(tokenizer), **SIZES)):
        task = make_task(recipe(tokenizer_dir, max_length=60), tokenizer)
        task.fit_config(TaskSetup.of(recipe(tokenizer_dir), tokenizer, {}), config)
        model = build_model(recipe(tokenizer_dir).model, config, 0, AutoModelForPreTraining).eval()
        task = for_model(task, model)
        with torch.no_grad():
            together = task.loss(model, batch_of(task, store, rows).inputs).loss_sum
            alone = sum(task.loss(model, batch_of(task, store, [row]).inputs).loss_sum for row in rows)
        assert together.tolist() == pytest.approx(torch.as_tensor(alone).tolist(), rel=1e-5)


def test_what_cannot_learn_pairs_is_refused(
    tmp_path: Path, tokenizer_dir: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    for config in (RobertaConfig(), AlbertConfig(), LlamaConfig()):
        with pytest.raises(RecipeError, match=rf"{config.model_type} has none.*task: mlm"):
            MaskedLMWithPairs.fit_config(TaskSetup.of(recipe(tokenizer_dir), tokenizer, {}), config)
    with pytest.raises(RecipeError, match=r"attention_type: original_full"):
        MaskedLMWithPairs.fit_config(TaskSetup.of(recipe(tokenizer_dir), tokenizer, {}), BigBirdConfig())
    MaskedLMWithPairs.fit_config(
        TaskSetup.of(recipe(tokenizer_dir), tokenizer, {}), BigBirdConfig(attention_type="original_full")
    )
    with pytest.raises(RecipeError, match="raise it to 5 or more"):
        prepared(tmp_path, tokenizer_dir, made(10), max_length=4)
