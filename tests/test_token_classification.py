"""Token classification: label alignment, split sentences, seqeval's scores and transformers' loss."""

from __future__ import annotations

import json
import os
import random
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from prepare_support import prepare
from support import merge
from task_support import for_model, make_task
from tiny import write_rows
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoTokenizer, BertConfig, BertForTokenClassification, DataCollatorForTokenClassification

from ptft_dist.config.recipe import Recipe
from ptft_dist.config.tokenizer_section import TokenizerTraining
from ptft_dist.data.formats import Record, read_file
from ptft_dist.data.prepare import Prepared
from ptft_dist.data.tokenizer import train_tokenizer
from ptft_dist.errors import DataError, RecipeError
from ptft_dist.tasks.common.scores.entities import AVERAGES, entities, entity_scores, score_names
from ptft_dist.tasks.registry import recipe_class
from ptft_dist.tasks.token_classification.encode import TaggedRows, misplaced, tag_names
from ptft_dist.tasks.token_classification.task import TokenClassification
from ptft_dist.training.batches import mask_all

seqeval = pytest.importorskip("seqeval.metrics")
ZERO_WIDTH = "\u200b"  # BERT's normalisation removes it


def tagged_sentence(chance: random.Random, longest: int = 30) -> dict[str, Any]:
    """Words of 1 to 12 letters; capitals are entities."""
    tokens: list[str] = []
    tags: list[str] = []
    while len(tokens) < chance.randint(1, longest):
        size, kind = chance.randint(1, 3), chance.choice(["O", "O", "PER", "LOC"])
        words = ["".join(chance.choices("abcdef", k=chance.randint(1, 12))) for _ in range(size)]
        tokens += words if kind == "O" else [word.title() for word in words]
        tags += ["O"] * size if kind == "O" else [f"B-{kind}", *[f"I-{kind}"] * (size - 1)]
    return {"tokens": tokens, "tags": tags}


def sentences(count: int = 60, seed: int = 0) -> list[dict[str, Any]]:
    chance = random.Random(seed)
    return [tagged_sentence(chance) for _ in range(count)]


def make_recipe(folder: Path, train: list[dict[str, Any]], validation: list[dict[str, Any]], **changes: Any) -> Recipe:
    write_rows(folder / "train.jsonl", train)
    write_rows(folder / "valid.jsonl", validation)
    recipe: dict[str, Any] = {
        "task": "token_classification",
        "model": {"config": {"model_type": "bert"}},
        "tokenizer": {"train": {"algorithm": "wordpiece", "vocab_size": 300}},
        "data": {"train": [{"path": "train.jsonl"}], "validation": [{"path": "valid.jsonl"}], "max_length": 24},
        "batch": {"global_size": 1, "micro_size": 1},
        "train": {"max_steps": 1},
        "run_dir": "run",
    }
    recipe["data"]["cache_dir"] = str(folder / "cache")
    return recipe_class().model_validate(merge(recipe, changes))


def made(folder: Path, train: list[dict[str, Any]], validation: list[dict[str, Any]], **changes: Any) -> Any:
    """(what was prepared, its tokenizer, the task)."""
    recipe = make_recipe(folder, train, validation, **changes)
    prepared = prepare(recipe, folder)
    tokenizer = AutoTokenizer.from_pretrained(prepared.tokenizer_path)
    return prepared, tokenizer, make_task(recipe, tokenizer, prepared.survey)


def refused(folder: Path, train: list[dict[str, Any]], validation: list[dict[str, Any]], **changes: Any) -> str:
    with pytest.raises(DataError) as caught:
        made(folder, train, validation, **changes)
    return str(caught.value)


# --- scores -----------------------------------------------------------------------------------------------------------

ALPHABETS = {
    "iob2 and iob1": ["O", "B-A", "I-A", "B-B", "I-B"],
    "bioes": ["O", *(f"{letter}-{kind}" for letter in "BIES" for kind in ("A", "B"))],
    "types with hyphens": ["O", "B-a-b", "I-a-b", "B-a", "I-a", "I-a-c"],
    "no types": ["O", "B", "I", "E", "S"],
    "no entity that is right": ["O", "O", "B-A", "I-C"],
}


@pytest.mark.parametrize("alphabet", ALPHABETS.values(), ids=ALPHABETS)
def test_scores_are_those_of_seqeval(alphabet: list[str]) -> None:
    """Random tags, nearly all of which break their scheme, in seqeval's default mode."""
    chance = random.Random(0)
    for _ in range(150):
        lengths = [chance.randint(1, 9) for _ in range(chance.randint(1, 6))]
        gold = [chance.choices(alphabet, k=n) for n in lengths]
        ours = [[tag if chance.random() < 0.6 else chance.choice(alphabet) for tag in tags] for tags in gold]
        if not any(map(entities, gold + ours)):
            continue  # seqeval divides by zero
        scores = entity_scores(gold, ours)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert scores["accuracy"] == pytest.approx(seqeval.accuracy_score(gold, ours), abs=1e-12)
            for average in AVERAGES:
                for name, score in zip(score_names(average), ("precision", "recall", "f1"), strict=True):
                    expected = getattr(seqeval, f"{score}_score")(gold, ours, average=average)
                    assert scores[name] == pytest.approx(expected, abs=1e-12), (name, gold, ours)


def test_a_score_by_hand() -> None:
    """Of two entities, one is correct and one has a wrong end; a third one is predicted without reason."""
    gold = [["B-PER", "I-PER", "O", "B-LOC", "I-LOC", "O"]]
    ours = [["B-PER", "I-PER", "O", "B-LOC", "O", "B-ORG"]]
    scores = entity_scores(gold, ours)
    assert scores["accuracy"] == 4 / 6
    assert (scores["precision_micro"], scores["recall_micro"]) == (1 / 3, 1 / 2)
    assert scores["f1_micro"] == pytest.approx(0.4)
    assert scores["f1_macro"] == pytest.approx(1 / 3)
    assert scores["f1_weighted"] == pytest.approx(1 / 2)
    assert set(entity_scores([["O"]], [["O"]]).values()) == {0.0, 1.0}  # nothing is there, nothing is found


@pytest.mark.parametrize(("inner", "last", "single"), ["IES", "MES", "ILU"])
def test_entities_of_every_scheme_by_hand(inner: str, last: str, single: str) -> None:
    tags = f"B-A {inner}-A {last}-A O {single}-B B-A {last}-A {single}-A {last}-B".split()
    assert entities(tags) == {("A", 0, 2), ("B", 4, 4), ("A", 5, 6), ("A", 7, 7), ("B", 8, 8)}  # the last is a mistake


# --- schemes ----------------------------------------------------------------------------------------------------------

MISPLACED = [
    ("iob2", "B-A I-A I-A O B-A B-A I-A", None),
    ("iob2", "I-A O", 0),
    ("iob2", "B-A I-B", 1),
    ("iob2", "B-A O I-A", 2),
    ("iob2", "O S-A", 1),
    ("iob2", "O A", 1),
    ("iob2", "O B-", 1),
    ("iob2", "O O-A", 1),
    ("iob2", "B I O", None),
    ("iob1", "I-A I-A B-A I-A I-B O I-A", None),
    ("iob1", "B-A I-A", 0),
    ("iob1", "I-A B-B", 1),
    ("iob1", "I-A O B-A", 2),
    ("bioes", "S-A B-A I-A E-A B-A E-A S-B O", None),
    ("bioes", "B-A", 0),
    ("bioes", "O B-A I-A", 2),
    ("bioes", "B-A O", 0),
    ("bioes", "B-A E-B", 0),
    ("bioes", "O E-A", 1),
    ("bioes", "S-A I-A E-A", 1),
    ("bioes", "B-A B-A E-A", 0),
    ("bmes", "S-A B-A M-A M-A E-A B-A E-A S-B O", None),
    ("bmes", "B M E S", None),
    ("bmes", "B-A I-A E-A", 1),
    ("bmes", "M-A E-A", 0),
    ("bmes", "B-A M-A O", 1),
    ("bilou", "U-A B-A I-A L-A B-A L-A U-B O", None),
    ("bilou", "B-A I-A U-A", 1),
    ("bilou", "L-A", 0),
    ("plain", "I-A whatever B-", None),
]


@pytest.mark.parametrize(("scheme", "tags", "at"), MISPLACED)
def test_tags_that_break_the_scheme_are_found(scheme: str, tags: str, at: int | None) -> None:
    found = misplaced(scheme, tags.split())
    assert (found and found[0]) == at


@pytest.mark.parametrize("scheme", ["iob2", "iob1", "bioes"])
def test_what_is_written_by_a_scheme_is_read_back(scheme: str) -> None:
    """Tags of random spans pass, and the spans come out."""
    chance = random.Random(0)
    for _ in range(200):
        tags: list[str] = []
        spans: set[tuple[str, int, int]] = set()
        before = ""
        while len(tags) < 12:
            kind, size, at = chance.choice(["", "A", "B"]), chance.randint(1, 3), len(tags)
            if not kind:
                tags += ["O"] * size
            elif scheme == "bioes":
                tags += [f"S-{kind}"] if size == 1 else [f"B-{kind}", *[f"I-{kind}"] * (size - 2), f"E-{kind}"]
            else:
                first = "B" if scheme == "iob2" or before == kind else "I"
                tags += [f"{first}-{kind}", *[f"I-{kind}"] * (size - 1)]
            if kind:
                spans.add((kind, at, len(tags) - 1))
            before = kind
        assert misplaced(scheme, tags) is None
        assert entities(tags) == spans


# --- rows -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ["wordpiece", "bpe", "unigram"])
@pytest.mark.parametrize("pieces", ["first", "all"])
def test_labels_stand_where_the_words_begin(tmp_path: Path, algorithm: str, pieces: str) -> None:
    """Against a loop over transformers' word_ids. Nothing is split at this length."""
    rows = sentences()
    prepared, tokenizer, _ = made(
        tmp_path,
        rows,
        rows[:5],
        tokenizer={"train": {"algorithm": algorithm, "vocab_size": 320}},
        data={"max_length": 400},
        token_classification={"pieces": pieces},
    )
    labels = prepared.survey["labels"]
    assert labels == ["B-LOC", "B-PER", "I-LOC", "I-PER", "O"]
    assert len(prepared.train) == len(rows)
    several = 0
    for i, row in enumerate(rows):
        encoding = tokenizer(row["tokens"], is_split_into_words=True)
        expected, before = [], None
        for word in encoding.word_ids():
            tag = None if word is None else row["tags"][word]
            if word == before:
                several += word is not None
                tag = None if pieces == "first" or tag is None else tag.replace("B-", "I-")
            expected.append(-100 if tag is None else labels.index(tag))
            before = word
        found = prepared.train.row(i)
        assert found.input_ids.tolist() == encoding.input_ids
        assert found.columns["labels"].tolist() == expected
        assert "meta" not in found.columns
    assert several > 100


def test_later_pieces_need_labels_of_their_own(tmp_path: Path) -> None:
    """No word is I-FOOD, but pieces of words are; in BIOES too."""
    row = {"tokens": ["abcabcabc", "x"], "tags": ["B-FOOD", "O"]}
    for scheme, tags in (("iob2", ["B-FOOD", "O"]), ("bioes", ["S-FOOD", "O"]), ("plain", ["B-FOOD", "O"])):
        prepared, _, _ = made(
            tmp_path,
            [{**row, "tags": tags}] * 3,
            [{**row, "tags": tags}],
            token_classification={"scheme": scheme, "pieces": "all"},
            tokenizer={"train": {"algorithm": "bpe", "vocab_size": 262}},
        )
        inner = [] if scheme == "plain" else ["I-FOOD"]
        assert prepared.survey["labels"] == sorted([*tags, *inner])
        found = [prepared.survey["labels"][i] for i in prepared.train.row(0).columns["labels"] if i != -100]
        assert found == [tags[0], *[(inner or tags)[0]] * (len(found) - 2), "O"]
        assert len(found) > 3


def test_inner_tags_that_label_names_lack_follow_its_names(tmp_path: Path) -> None:
    """Tag 2 is in the validation data only. No tag of the data is I-PER or I-LOC."""
    prepared, _, _ = made(
        tmp_path,
        [{"tokens": ["abcabcabc", "x"], "tags": [1, 0]}] * 3,
        [{"tokens": ["cbacbacba", "x"], "tags": [2, 0]}],
        token_classification={"pieces": "all", "label_names": {"0": "O", "1": "B-PER", "2": "B-LOC"}},
        tokenizer={"train": {"algorithm": "bpe", "vocab_size": 262}},
    )
    assert prepared.survey["labels"] == ["O", "B-PER", "B-LOC", "I-PER", "I-LOC"]
    for rows, first, inner in ((prepared.train, 1, 3), (prepared.validation, 2, 4)):
        found = [i for i in rows.row(0).columns["labels"] if i != -100]
        assert found == [first, *[inner] * (len(found) - 2), 0]
        assert len(found) > 3


def test_long_sentences_are_split_between_words(tmp_path: Path) -> None:
    """Each word is in exactly one piece, in order, and every piece has room for its special tokens."""
    rows, chance = sentences(30), random.Random(5)
    for row in rows:
        row["tokens"].insert(0, "".join(chance.choices("abcdef", k=90)))
        row["tags"].insert(0, "O")
    prepared, tokenizer, _ = made(tmp_path, rows, rows)
    store, plain = prepared.validation, prepared.survey["labels"]
    assert store is not None
    at = several = 0
    for number, row in enumerate(rows, 31):  # the training rows came first
        words = [tokenizer.convert_tokens_to_ids(tokenizer.tokenize(word))[:22] for word in row["tokens"]]
        tags: list[str] = []
        seen: list[int] = []
        while len(tags) < len(words):
            piece = store.row(at)
            assert piece.meta["sentence"] == number
            ids = piece.input_ids.tolist()
            assert (ids[0], ids[-1]) == (tokenizer.cls_token_id, tokenizer.sep_token_id)
            assert len(ids) <= 24
            positions = np.flatnonzero(piece.columns["labels"] != -100).tolist()
            assert positions == piece.meta["at"]
            assert [plain[piece.columns["labels"][p]] for p in positions] == piece.meta["tags"]
            seen += ids[1:-1]
            tags += piece.meta["tags"]
            at += 1
            if len(tags) < len(words):
                assert len(ids) + len(words[len(tags)]) > 24, "the next word had room"
        several += seen != ids[1:-1]
        assert tags == row["tags"]
        assert seen == [token for word in words for token in word]
    assert at == len(store)
    notes = prepared.report.notes
    assert [count for note, (count, _) in notes.items() if "split between" in note] == [2 * several]
    assert [count for note, (count, _) in notes.items() if "was truncated" in note] == [60]


def test_a_word_without_tokens_is_counted(tmp_path: Path) -> None:
    """It is predicted as O at any position, and a sentence of only such words is scored too."""
    train = sentences()
    rows = [
        {"tokens": [ZERO_WIDTH, "abc", ZERO_WIDTH], "tags": ["O", "B-PER", "I-PER"]},
        {"tokens": [ZERO_WIDTH], "tags": ["B-LOC"]},
    ]
    prepared, _, task = made(tmp_path, train, rows)
    store = prepared.validation
    assert store is not None
    assert [store.row(i).meta["at"] for i in range(2)] == [[None, 1, None], [None]]
    assert prepared.report.notes.popitem()[1][0] == 2
    b_per = prepared.survey["labels"].index("B-PER")
    scores, _ = task.scores({i: [b_per] * len(store.row(i).input_ids) for i in range(2)}, store.row)
    assert scores == entity_scores([rows[0]["tags"], rows[1]["tags"]], [["O", "B-PER", "O"], ["O"]])
    assert scores["accuracy"] == 2 / 4
    assert scores["recall_micro"] == 0.0


BAD_ROWS = {
    "no tags": ({"tokens": ["a"]}, "no field 'tags'"),
    "tokens as text": ({"tokens": "a b", "tags": ["O", "O"]}, "'tokens' is a string and not a list"),
    "fewer tags": ({"tokens": ["a", "b"], "tags": ["O"]}, "2 tokens and 1 tags"),
    "a number as a word": ({"tokens": ["a", 7], "tags": ["O", "O"]}, "word 2: the field 'tokens' is a number"),
    "an empty word": ({"tokens": ["a", ""], "tags": ["O", "O"]}, "word 2 is empty"),
    "a number as a tag": ({"tokens": ["a"], "tags": [0]}, "the tag of word 1 ('a') is a number"),
    "an empty tag": ({"tokens": ["a"], "tags": [""]}, "the tag of word 1 ('a') is empty"),
    "a broken scheme": ({"tokens": ["a", "Bonn"], "tags": ["O", "I-LOC"]}, "word 2 ('Bonn'): I-LOC without a B-LOC"),
    "another scheme": (
        {"tokens": ["a", "Bonn"], "tags": ["O", "S-LOC"]},
        "word 2 ('Bonn'): the tag 'S-LOC' is none of",
    ),
    "half a character": ({"tokens": ["\ud83d"], "tags": ["O"]}, "word 1: character 0 of the field 'tokens'"),
    "half a character in a tag": (
        {"tokens": ["a"], "tags": ["B-\ud83d"]},
        "character 2 of the field 'tags'",
    ),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_broken_row_is_named(tmp_path: Path, name: str) -> None:
    row, why = BAD_ROWS[name]
    train = [*sentences(3), row, *sentences(3)]
    said = refused(tmp_path, train, sentences(2))
    assert f"{tmp_path}/train.jsonl:4: " in said
    assert why in said
    prepared, _, _ = made(tmp_path, train, sentences(2), data={"bad_rows": "skip"})
    assert prepared.report.bad_rows.count == 1


def test_a_tag_that_training_does_not_know_is_named(tmp_path: Path) -> None:
    strange = {"tokens": ["a", "b"], "tags": ["O", "B-GOD"]}
    said = refused(tmp_path, sentences(), [*sentences(2), strange])
    assert f"{tmp_path}/valid.jsonl:3: word 2 ('b'): the tag 'B-GOD' is none of B-LOC, B-PER" in said
    labels = ["O", "B-GOD", "B-LOC", "I-LOC", "B-PER", "I-PER"]
    prepared, _, _ = made(tmp_path, sentences(), [*sentences(2), strange], token_classification={"labels": labels})
    assert prepared.survey["labels"] == labels
    assert "two or more are needed" in refused(tmp_path, [{"tokens": ["a"], "tags": ["O"]}], sentences(1))


def test_sentences_without_words_are_left_out_and_counted(tmp_path: Path) -> None:
    prepared, _, _ = made(tmp_path, [*sentences(3), {"tokens": [], "tags": []}], sentences(2))
    assert prepared.report.dropped["without words"] == (1, [f"{tmp_path}/train.jsonl:4"])


def test_a_row_without_tags_is_encoded_whatever_the_labels_are(tmp_path: Path) -> None:
    """No tag of these labels is valid at every word, and no tags at all are valid for three words."""
    settings = make_recipe(tmp_path, [], [], token_classification={"scheme": "bioes"}).settings
    survey = {"labels": ["B-LOC", "E-LOC"]}
    record = Record(TaggedRows.unanswered(settings, survey, {"tokens": ["a", "new", "york"]}), "here")
    TaggedRows.check(settings, record)
    assert set(tag_names(settings, record)) <= set(survey["labels"])


@pytest.mark.parametrize(
    ("section", "says"),
    [
        ({"labels": ["O", "O"]}, "a tag is listed twice"),
        ({"labels": ["O", "PER"]}, "'PER' is not a tag of the scheme iob2"),
        ({"labels": ["O", "B-A"], "pieces": "all"}, "needs the tag I-A, because of B-A"),
    ],
)
def test_labels_that_cannot_be(tmp_path: Path, section: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        make_recipe(tmp_path, [], [], token_classification=section)


@pytest.mark.parametrize("algorithm", ["wordpiece", "bpe"])
def test_a_tokenizer_that_wants_spaces_is_told_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, algorithm: str
) -> None:
    """A pretrained byte-level tokenizer causes a warning, unless it adds a space before each word itself."""
    section = TokenizerTraining.model_validate({"algorithm": algorithm, "vocab_size": 320})
    texts = [" ".join(row["tokens"]) + " and and and" for row in sentences()]
    tokenizer = train_tokenizer(section, texts, ("cls", "sep", "mask", "pad"))
    for prefix_space in (False, True):
        if algorithm == "bpe":
            tokenizer.backend_tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=prefix_space)
        tokenizer.save_pretrained(tmp_path / "tokenizer")
        caplog.clear()
        made(tmp_path, sentences(), sentences(2), tokenizer={"train": None, "path": str(tmp_path / "tokenizer")})
        assert ("add_prefix_space: true" in caplog.text) == (algorithm == "bpe" and not prefix_space)


def test_no_room_beside_the_special_tokens(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"data\.max_length: 2 leaves no room"):
        made(tmp_path, sentences(), sentences(2), data={"max_length": 2})


# --- loss and evaluation ----------------------------------------------------------------------------------------------


def network(tokenizer: Any, labels: int) -> BertForTokenClassification:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = BertConfig(vocab_size=len(tokenizer), num_labels=labels, pad_token_id=tokenizer.pad_token_id, **sizes)
    return BertForTokenClassification(config).eval()


@pytest.mark.parametrize("pieces", ["first", "all"])
def test_the_loss_is_that_of_transformers(tmp_path: Path, pieces: str) -> None:
    """Their head, their collator, their way to align: labels on `first` tokens, or on all."""
    rows = sentences()
    options: dict[str, Any] = {"data": {"max_length": 400}, "token_classification": {"pieces": pieces}}
    prepared, tokenizer, task = made(tmp_path, rows, rows, **options)
    labels = prepared.survey["labels"]
    model = network(tokenizer, len(labels))
    task = for_model(task, model)
    features = []
    for row in rows[:8]:
        encoding = tokenizer(row["tokens"], is_split_into_words=True)
        words, ids = encoding.word_ids(), []
        for i, word in enumerate(words):
            if word is None or (pieces == "first" and words[i - 1] == word):
                ids.append(-100)
            else:
                tag = row["tags"][word]
                ids.append(labels.index(tag.replace("B-", "I-") if words[i - 1] == word else tag))
        features.append({**encoding, "labels": ids})
    theirs_in = DataCollatorForTokenClassification(tokenizer)(features)
    batch = task.collate([prepared.train.row(i) for i in range(8)], [(0, i) for i in range(8)])
    for ours, name in (("input_ids",) * 2, ("attention_mask",) * 2, ("targets", "labels")):
        assert torch.equal(batch.inputs[ours], theirs_in[name]), name
    theirs = model(**theirs_in)
    loss, metrics, predictions, *_ = task.loss(model, batch.inputs)
    assert loss.item() / batch.count == pytest.approx(theirs.loss.item(), rel=1e-5)
    counted = theirs_in["labels"] != -100
    assert batch.count == counted.sum()
    assert torch.equal(predictions, theirs.logits.argmax(-1))
    right = (predictions == theirs_in["labels"])[counted].sum()
    assert [x.item() for x in metrics["accuracy"]] == [right, batch.count]


def test_a_stand_in_counts_nothing(tmp_path: Path) -> None:
    rows = sentences(8)
    prepared, tokenizer, task = made(tmp_path, rows, rows)
    model = network(tokenizer, len(prepared.survey["labels"]))
    task = for_model(task, model)
    batch = task.collate([prepared.train.row(0)], [(0, 0)])
    loss, metrics, *_ = task.loss(model, mask_all(batch.inputs))
    loss.backward()
    assert loss.item() == 0
    assert [x.item() for x in metrics["accuracy"]] == [0, 0]
    assert all(p.grad is not None and not p.grad.any() for p in model.classifier.parameters())


def predicted(task: TokenClassification, prepared: Prepared, rows: list[list[str]]) -> dict[int, list[int]]:
    """What a network must put out so that each sentence gets these tags: by row of the store, the pieces in order."""
    assert prepared.validation is not None
    store, out, left = prepared.validation, {}, [list(tags) for tags in rows]
    first = store.row(0).meta["sentence"]
    for i in range(len(store)):
        row = store.row(i)
        out[i] = [0] * len(row.input_ids)
        for at in row.meta["at"]:
            out[i][at] = task.labels.index(left[row.meta["sentence"] - first].pop(0))
    assert not any(left)
    return out


@pytest.mark.parametrize("scheme", ["iob2", "plain"])
def test_each_sentence_is_scored_once_and_whole(tmp_path: Path, scheme: str) -> None:
    """Most are in several pieces, some of which cut an entity in two: the scores are those of the whole sentences."""
    rows, chance = sentences(40), random.Random(1)
    prepared, _, task = made(tmp_path, rows, rows, token_classification={"scheme": scheme})
    assert len(prepared.validation) > 60  # type: ignore[arg-type]
    gold = [row["tags"] for row in rows]
    ours = [[tag if chance.random() < 0.7 else chance.choice(task.labels) for tag in tags] for tags in gold]
    assert prepared.validation is not None
    scores, samples = task.scores(predicted(task, prepared, ours), prepared.validation.row)
    assert samples == []
    assert {"loss", *scores} == set(task.settings.metric_names)
    if scheme == "iob2":
        assert scores["f1_micro"] == pytest.approx(seqeval.f1_score(gold, ours), abs=1e-12)
        assert scores["f1_macro"] == pytest.approx(seqeval.f1_score(gold, ours, average="macro"), abs=1e-12)
        assert scores["accuracy"] == pytest.approx(seqeval.accuracy_score(gold, ours), abs=1e-12)
        return
    from sklearn.metrics import f1_score

    flat = [[tag for tags in side for tag in tags] for side in (gold, ours)]
    assert scores["accuracy"] == sum(a == b for a, b in zip(*flat, strict=True)) / len(flat[0])
    assert scores["f1_macro"] == pytest.approx(f1_score(*flat, average="macro"), abs=1e-12)
    assert scores["f1_weighted"] == pytest.approx(f1_score(*flat, average="weighted"), abs=1e-12)


def test_the_network_knows_the_tags_by_name() -> None:
    setup = SimpleNamespace(survey={"labels": ["B-A", "I-A", "O"]})
    settings = TokenClassification.config_settings(setup)  # type: ignore[arg-type]
    assert settings["id2label"] == {0: "B-A", 1: "I-A", 2: "O"}
    assert settings["label2id"] == {"B-A": 0, "I-A": 1, "O": 2}


DATA = os.environ.get("PTFT_TEST_DATA")


@pytest.mark.skipif(DATA is None, reason="PTFT_TEST_DATA does not name a folder of real data")
@pytest.mark.parametrize(("name", "bad"), [("wnut17", 0), ("weibo_zh", 8)])
def test_real_sentences(tmp_path: Path, name: str, bad: int) -> None:
    """English and Chinese; of the latter some tags are not IOB2. Every word of the others is in the store."""
    folder = Path(str(DATA)) / "ner" / name
    recipe = make_recipe(tmp_path, [], []).model_dump(mode="json")
    sources = {"train": [{"path": str(folder / "train.conll")}], "validation": [{"path": str(folder / "dev.conll")}]}
    recipe = merge(recipe, {"data": {**sources, "bad_rows": "skip"}})
    prepared = prepare(recipe_class().model_validate(json.loads(json.dumps(recipe))), tmp_path)
    assert prepared.report.bad_rows.count == bad
    store = prepared.validation
    assert store is not None
    words = sum(len(record.values["tokens"]) for record in read_file(folder / "dev.conll", columns=(), unit="file"))
    assert sum(len(store.row(i).meta["tags"]) for i in range(len(store))) == words
