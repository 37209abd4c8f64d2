"""Masked language modelling: the choice of tokens, the masked input, and the loss of transformers' head."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import ROOT, outcome, start, train_rows, write_recipe
from task_support import for_model, make_task
from tokenizers import Tokenizer
from transformers import AutoModelForMaskedLM, BertConfig, PreTrainedTokenizerFast, RobertaConfig

from ptft_dist.config.recipe import Recipe
from ptft_dist.config.token_ids import id_count
from ptft_dist.config.tokenizer_section import TokenizerTraining
from ptft_dist.data.store import Row
from ptft_dist.data.tokenizer import train_tokenizer
from ptft_dist.errors import RecipeError
from ptft_dist.networks.load import build_config, build_model
from ptft_dist.tasks.common.masking import word_beginnings
from ptft_dist.tasks.mlm.settings import MlmSettings
from ptft_dist.tasks.mlm.task import MaskedLM
from ptft_dist.tasks.registry import recipe_class

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
ROLES = MlmSettings().special_tokens
TEXTS = [path.read_text() for path in sorted((ROOT / "ptft_dist").rglob("*.py"))]


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, PreTrainedTokenizerFast]:
    return {
        algorithm: train_tokenizer(TokenizerTraining(algorithm=algorithm, vocab_size=600), TEXTS[:40], ROLES)
        for algorithm in ("bpe", "wordpiece", "unigram")
    }


def recipe(**mlm: Any) -> Recipe:
    return recipe_class().model_validate(
        {
            "task": "mlm",
            "model": {"config": {"model_type": "bert"}},
            "tokenizer": {"train": {}},
            "data": {"train": [{"source": "python-stdlib"}]},
            "mlm": mlm,
            "batch": {"global_size": 1, "micro_size": 1},
            "train": {"max_steps": 1},
            "run_dir": "run",
        }
    )


def make(tokenizer: PreTrainedTokenizerFast, **mlm: Any) -> MaskedLM:
    return make_task(recipe(**mlm), tokenizer)


def rows_of(tokenizer: PreTrainedTokenizerFast, count: int = 40, length: int = 100) -> list[Row]:
    """Rows [CLS] text [SEP] of one document each."""
    rows = []
    for text in TEXTS[:count]:
        ids = tokenizer(text, add_special_tokens=False).input_ids[: length - 2]
        whole = [tokenizer.cls_token_id, *ids, tokenizer.sep_token_id]
        rows.append(Row(np.array(whole), np.zeros(1, np.int64)))
    return rows


@pytest.mark.parametrize("unit", ["token", "word", "span"])
@pytest.mark.parametrize("algorithm", ["bpe", "wordpiece", "unigram"])
def test_the_shares_are_those_of_the_paper(tokenizers: dict[str, Any], algorithm: str, unit: str) -> None:
    """15 % of the tokens, never special ones; of these 80 % masked, 10 % replaced, 10 % kept."""
    tokenizer = tokenizers[algorithm]
    task, rows = make(tokenizer, unit=unit), rows_of(tokenizer)
    special = set(tokenizer.all_special_ids)
    chosen = masked = kept = ordinary = 0
    for epoch in range(12):
        for i, row in enumerate(rows):
            seen, targets = task.rows.masker.mask(row.input_ids, np.random.default_rng((0, epoch, i)))
            picked = targets != -100
            assert (targets[picked] == row.input_ids[picked]).all()
            assert (seen[~picked] == row.input_ids[~picked]).all()
            assert not special & set(row.input_ids[picked].tolist())
            ordinary += sum(token not in special for token in row.input_ids.tolist())
            chosen += int(picked.sum())
            masked += int((seen[picked] == tokenizer.mask_token_id).sum())
            kept += int((seen[picked] == row.input_ids[picked]).sum())
    assert chosen / ordinary == pytest.approx(0.15, abs=0.012)
    assert masked / chosen == pytest.approx(0.8, abs=0.03)
    assert kept / chosen == pytest.approx(0.1, abs=0.03)


@pytest.mark.parametrize("algorithm", ["bpe", "wordpiece", "unigram"])
def test_a_word_is_chosen_whole(tokenizers: dict[str, Any], algorithm: str) -> None:
    """Where a word is chosen, all its tokens are: words found by decoding, not by the code under test."""
    tokenizer = tokenizers[algorithm]
    task = make(tokenizer, unit="word", probability=0.3)
    text = "return everything between parentheses unchanged"
    words = [tokenizer(word, add_special_tokens=False).input_ids for word in text.split()]
    spaced = [tokenizer(" " + word, add_special_tokens=False).input_ids for word in text.split()]
    pieces = [words[0], *spaced[1:]]
    whole = tokenizer(text, add_special_tokens=False).input_ids
    assert [token for piece in pieces for token in piece] == whole
    assert max(map(len, pieces)) > 1
    ends = np.cumsum([len(piece) for piece in pieces])
    several = 0
    for i in range(50):
        _, targets = task.rows.masker.mask(np.array(whole), np.random.default_rng((0, 0, i)))
        parts = np.split(targets != -100, ends[:-1])
        assert all(part.all() or not part.any() for part in parts)
        several += sum(part.all() and len(part) > 1 for part in parts)
    assert several


def test_a_space_a_line_feed_and_a_tab_begin_a_word_in_bytes(tokenizers: dict[str, Any]) -> None:
    """Expected: byte-level BPE tokens whose text begins with the white space before a word."""
    tokenizer = tokenizers["bpe"]
    begins, seen = word_beginnings(tokenizer, "mlm"), set()
    for i, token in enumerate(tokenizer.convert_ids_to_tokens(range(len(tokenizer)))):
        if i not in tokenizer.all_special_ids:
            first = tokenizer.decode([i], clean_up_tokenization_spaces=False)[:1]
            assert begins[i] == (first in (" ", "\n", "\t")), token
            seen.add(first)
    assert {" ", "\n", "\t", "a"} <= seen


def test_spans_have_the_lengths_of_the_paper(tokenizers: dict[str, Any]) -> None:
    """The clipped geometric distribution of SpanBERT has mean 3.8; joined neighbours lengthen it a little."""
    task, lengths = make(tokenizers["bpe"], unit="span"), []
    for i in range(60):
        _, targets = task.rows.masker.mask(np.full(500, 300), np.random.default_rng((0, 0, i)))
        edges = np.flatnonzero(np.diff(np.concatenate(([0], targets != -100, [0]))))
        lengths += (edges[1::2] - edges[::2]).tolist()
    assert 3.4 < np.mean(lengths) < 5.0


def test_a_special_token_ends_a_word(tokenizers: dict[str, Any]) -> None:
    """Packed documents: the last word of one and the first of the next are chosen independently."""
    tokenizer = tokenizers["bpe"]
    task = make(tokenizer, unit="word", probability=0.5)
    first, second = (tokenizer(word, add_special_tokens=False).input_ids for word in ("return", "import"))
    ids = np.array([*first, tokenizer.sep_token_id, *second])
    pairs = set()
    for i in range(40):
        _, targets = task.rows.masker.mask(ids, np.random.default_rng((0, 0, i)))
        pairs.add((bool(targets[0] != -100), bool(targets[-1] != -100)))
    assert pairs == {(False, False), (False, True), (True, False), (True, True)}


def test_random_replacements_are_uniform(tokenizers: dict[str, Any]) -> None:
    """All 20,000 tokens are chosen and replaced: the 600 ids come about 33 times each, and many in every row."""
    task = make(tokenizers["bpe"], probability=0.999, mask_share=0.0, random_share=1.0)
    replaced = []
    for i in range(20):
        seen, targets = task.rows.masker.mask(np.full(1000, 300), np.random.default_rng((0, 0, i)))
        replaced.append(seen[targets != -100])
        assert len(set(replaced[-1].tolist())) > 400
    times = np.bincount(np.concatenate(replaced), minlength=600)
    assert len(times) == 600  # no id beyond the vocabulary
    assert (times.min(), times.max()) > (8, 40)
    assert times.max() < 70


@pytest.mark.parametrize("unit", ["token", "word"])
def test_ids_without_a_token(tokenizers: dict[str, Any], unit: str) -> None:
    """Tokens were removed from the vocabulary, so that the largest id is beyond the number of tokens."""
    backend = json.loads(tokenizers["wordpiece"].backend_tokenizer.to_str())
    vocabulary = backend["model"]["vocab"]
    last = max(vocabulary.values())
    for token in [token for token, i in vocabulary.items() if last - 40 < i < last]:
        del vocabulary[token]
    gaps = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(backend)), mask_token="[MASK]")
    assert id_count(gaps) == last + 1 > len(gaps) == last - 38
    settings = recipe(unit=unit, probability=0.999, mask_share=0.0, random_share=1.0)
    seen, targets = make_task(settings, gaps).rows.masker.mask(np.full(5000, last), np.random.default_rng(0))
    assert (targets == last).any()
    assert set(seen.tolist()) <= set(vocabulary.values())
    assert build_config(settings.model, gaps, 32).vocab_size == last + 1


def test_a_span_is_masked_replaced_or_kept_as_one(tokenizers: dict[str, Any]) -> None:
    task, fates = make(tokenizers["bpe"], unit="span"), {"masked": 0, "replaced": 0, "kept": 0}
    for i in range(40):
        seen, targets = task.rows.masker.mask(np.full(500, 300), np.random.default_rng((0, 0, i)))
        edges = np.flatnonzero(np.diff(np.concatenate(([0], targets != -100, [0]))))
        for span in (seen[a:b] for a, b in zip(edges[::2], edges[1::2], strict=True)):
            of_tokens = {"masked": span == tokenizers["bpe"].mask_token_id, "kept": span == 300}
            of_tokens["replaced"] = ~of_tokens["masked"] & ~of_tokens["kept"]
            fate = max(of_tokens, key=lambda name: of_tokens[name].sum())
            # A replacement is sometimes the mask or the token itself by chance: 1 of 300.
            assert of_tokens[fate].all() or (fate == "replaced" and of_tokens[fate].sum() >= len(span) - 1)
            fates[fate] += len(span) > 1
    assert min(fates.values()) > 10


def test_special_tokens_do_not_count_in_the_share_of_spans(tokenizers: dict[str, Any]) -> None:
    """A row of 200 ordinary tokens and 200 special ones: 15 % of the ordinary ones are chosen."""
    tokenizer = tokenizers["bpe"]
    task = make(tokenizer, unit="span")
    ids = np.concatenate([np.full(200, 300), np.full(200, tokenizer.sep_token_id)])
    for i in range(10):
        _, targets = task.rows.masker.mask(ids, np.random.default_rng((0, 0, i)))
        assert (targets != -100).sum() == 30


@pytest.mark.parametrize("length", [1, 3, 7])
def test_short_rows_have_their_share_of_spans(tokenizers: dict[str, Any], length: int) -> None:
    """15 % of their tokens over many rows, though no row has 15 % of a token."""
    masker = make(tokenizers["bpe"], unit="span").rows.masker
    ids, generator = np.full(length, 300), np.random.default_rng(0)
    share = np.mean([masker.mask(ids, generator)[1] != -100 for _ in range(2000)])
    assert 0.13 < share < 0.17


def test_the_choice_follows_from_seed_epoch_and_row_alone(tokenizers: dict[str, Any]) -> None:
    task, rows = make(tokenizers["bpe"]), rows_of(tokenizers["bpe"], 4)
    together = task.collate(rows, [(3, i) for i in range(4)]).inputs
    for i, row in enumerate(rows):
        alone = task.collate([row], [(3, i)]).inputs
        n = len(row.input_ids)
        assert torch.equal(alone["input_ids"][0, :n], together["input_ids"][i, :n])
        assert torch.equal(alone["targets"][0, :n], together["targets"][i, :n])
    other_epoch = task.collate(rows, [(4, i) for i in range(4)]).inputs
    assert not torch.equal(other_epoch["targets"], together["targets"])


@pytest.mark.parametrize("config", [BertConfig, RobertaConfig])
def test_the_loss_is_that_of_transformers(tokenizers: dict[str, Any], config: type[Any]) -> None:
    tokenizer = tokenizers["bpe"]
    task = make(tokenizer, packing=False)
    settings = config(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, **SIZES)
    model = build_model(recipe().model, settings, 0, AutoModelForMaskedLM).eval()
    rows = [Row(row.input_ids[: 20 + 9 * i], row.document_starts) for i, row in enumerate(rows_of(tokenizer, 5))]
    batch = task.collate(rows, [(0, i) for i in range(5)])
    task = for_model(task, model)
    with torch.no_grad():
        loss, metrics, *_ = task.loss(model, batch.inputs)
        ids, mask = batch.inputs["input_ids"], batch.inputs["attention_mask"].long()
        theirs = model(input_ids=ids, attention_mask=mask, labels=batch.inputs["targets"])
    assert loss.item() == pytest.approx(theirs.loss.item() * batch.count, rel=1e-5)
    right = (theirs.logits.argmax(-1) == batch.inputs["targets"]).sum().item()
    assert [x.item() for x in metrics["accuracy"]] == [right, batch.count]


@pytest.mark.parametrize("config", [BertConfig, RobertaConfig])
def test_packed_documents_do_not_see_each_other(tokenizers: dict[str, Any], config: type[Any]) -> None:
    """Packed, with the block mask: the outputs of each document alone; without it they differ."""
    tokenizer = tokenizers["bpe"]
    settings = config(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, **SIZES)
    model = build_model(recipe().model, settings, 0, AutoModelForMaskedLM).eval()
    documents = [row.input_ids[5 : 25 + i] for i, row in enumerate(rows_of(tokenizer, 3))]
    starts = np.cumsum([0, *map(len, documents)])[:-1]
    packed = Row(np.concatenate(documents), starts)
    alone = make(tokenizer, packing=False)
    with torch.no_grad():
        expected = [
            alone.logits(model, alone.rows.padded.inputs([Row(d, np.zeros(1, np.int64))])).squeeze(0) for d in documents
        ]
        for attention, same in (("document", True), ("across", False)):
            task = make(tokenizer, attention=attention)
            task = for_model(task, model)
            logits = task.logits(model, task.rows.padded.inputs([packed])).squeeze(0)
            pieces = torch.split(logits, [len(d) for d in documents])
            near = all(torch.allclose(a, b, atol=1e-5) for a, b in zip(pieces, expected, strict=True))
            assert near == same, attention


def test_an_architecture_that_cannot_is_refused(tokenizers: dict[str, Any]) -> None:
    """FNet mixes tokens by a Fourier transform: there is nothing to mask."""
    from transformers import FNetConfig

    tokenizer = tokenizers["bpe"]
    settings = FNetConfig(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2)
    model = build_model(recipe().model, settings, 0, AutoModelForMaskedLM).eval()
    probe = make(tokenizer).probe()
    assert probe is not None
    with pytest.raises(RecipeError, match=r"mlm\.attention.*mlm\.packing: false"), torch.no_grad():
        probe.check(probe.outputs(model, probe.inputs))


def test_unknown_words_and_missing_masks_are_refused(tokenizers: dict[str, Any]) -> None:
    assert word_beginnings(tokenizers["wordpiece"], "mlm").any()
    plain = train_tokenizer(TokenizerTraining(vocab_size=300), TEXTS)
    with pytest.raises(RecipeError, match="mask"):
        make(plain)


BERT = {"model_type": "bert", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
BERT |= {"num_attention_heads": 2, "max_position_embeddings": 64}


def mlm_recipe(folder: Path, documents: Path, dropout: float, **mlm: Any) -> Path:
    """The tiny recipe of the promise tests with BERT in the place of Llama."""
    path = write_recipe(folder, documents, task="mlm", mlm=mlm, tokenizer={"train": {"vocab_size": 320}})
    import json

    raw = json.loads(path.read_text())
    del raw["clm"]
    rates = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    raw["model"] = {"config": BERT | rates}
    path.write_text(json.dumps(raw))
    return path


def test_any_split_gives_the_same_losses(tmp_path: Path, documents: Path, cache: Path) -> None:
    """P1 for this task: one process, two of DDP, two under ZeRO-2 and ZeRO-3."""
    path = mlm_recipe(tmp_path, documents, 0.0, packing=False)
    runs = {"one": (1, "cpu"), "ddp": (2, "cpu"), "zero2": (2, "cpu_zero2"), "zero3": (2, "cpu_zero3")}
    curves = {}
    for name, (ranks, kind) in runs.items():
        words = ("train", str(path), f"run_dir={name}", "train.max_steps=4", "save.every=null")
        run = start(*words, cwd=tmp_path, cache=cache, ranks=ranks, kind=kind)
        assert run.wait() == 0, run.stderr
        curves[name] = [(row["loss"], row["accuracy"]) for row in train_rows(tmp_path / name)]
    assert len(curves["one"]) == 4
    for name, curve in curves.items():
        assert [loss for loss, _ in curve] == pytest.approx([loss for loss, _ in curves["one"]], rel=1e-5), name
        assert [share for _, share in curve] == pytest.approx([share for _, share in curves["one"]], abs=1e-9), name


def test_killed_and_resumed_is_never_killed(tmp_path: Path, documents: Path, cache: Path) -> None:
    """P2 for this task, with dropout: a run whose later checkpoints are lost ends with the same bits."""
    import shutil

    path = mlm_recipe(tmp_path, documents, 0.1, attention="document", packing=True)
    whole = start("train", str(path), cwd=tmp_path, cache=cache)
    assert whole.wait() == 0, whole.stderr
    expected = outcome(tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoints/step-00000008")
    shutil.rmtree(tmp_path / "run/model")
    again = start("train", str(path), cwd=tmp_path, cache=cache)
    assert again.wait() == 0, again.stderr
    assert "resumed from" in again.stderr
    assert outcome(tmp_path / "run") == expected


def test_a_network_that_reads_padding_is_refused(tmp_path: Path, documents: Path, cache: Path) -> None:
    """BigBird's blocks follow from the padded width."""
    import json

    path = mlm_recipe(tmp_path, documents, 0.0, packing=False)
    recipe = json.loads(path.read_text())
    recipe["model"]["config"] = {
        "model_type": "big_bird",
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    path.write_text(json.dumps(recipe))
    refused = start("train", str(path), cwd=tmp_path, cache=cache)
    assert refused.wait() == 2
    assert "attention_type: original_full" in refused.stderr
