"""Sequence to sequence: token ids of rows, the loss of transformers' heads, and generated texts of all rows."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from prepare_support import prepare
from pydantic import ValidationError
from support import merge
from task_support import for_model, make_task
from tiny import write_rows
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    BartConfig,
    DataCollatorForSeq2Seq,
    LlamaConfig,
    M2M100Config,
    MBart50Tokenizer,
    MBartConfig,
    MBartTokenizer,
    MT5Config,
    NllbTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5Config,
)
from transformers.trainer_pt_utils import LabelSmoother

from ptft_dist.config.recipe import Recipe
from ptft_dist.config.tokenizer_section import TokenizerTraining
from ptft_dist.data.encoder import EncoderContext, RowError
from ptft_dist.data.formats import Record
from ptft_dist.data.store import Row
from ptft_dist.data.tokenizer import train_tokenizer
from ptft_dist.errors import DataError, RecipeError
from ptft_dist.networks.load import build_model
from ptft_dist.tasks.protocol import TaskSetup
from ptft_dist.tasks.registry import recipe_class
from ptft_dist.tasks.seq2seq.encode import Seq2SeqRows
from ptft_dist.tasks.seq2seq.task import Seq2Seq
from ptft_dist.training.batches import mask_all

TEXTS = ["the quick brown fox jumps", "over the lazy dog", "ein Bär läuft", "高祖东进", "name: 42"] * 5
T5 = {"model_type": "t5", "d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2}
BART = {"model_type": "bart", "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 64}
BART |= {"decoder_ffn_dim": 64, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
BART |= {"max_position_embeddings": 128, "dropout": 0.0}


def recipe(folder: Path = Path(), tokenizer: Any = None, **changes: Any) -> Recipe:
    base = {
        "task": "seq2seq",
        "model": {"config": T5},
        "tokenizer": tokenizer or {"train": {"vocab_size": 300}},
        "data": {"train": [{"path": "rows.jsonl"}], "max_length": 16, "cache_dir": str(folder / "cache")},
        "batch": {"global_size": 1, "micro_size": 1},
        "train": {"max_steps": 1},
        "run_dir": "run",
    }
    return recipe_class().model_validate(merge(base, changes))


def tokenizer_that(adds: str = "nothing") -> PreTrainedTokenizerFast:
    """adds: `nothing`, as one learned here; `eos`, as T5's; `both`, <s> and EOS, as BART's."""
    tokenizer = train_tokenizer(TokenizerTraining(vocab_size=300), TEXTS, ("eos", "pad"), ("<s>",))
    template = {"eos": "$A <|endoftext|>", "both": "<s> $A <|endoftext|>"}.get(adds)
    if template:
        ids = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<s>", "<|endoftext|>")]
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=ids)
    return tokenizer


def encoded(tokenizer: PreTrainedTokenizerFast, *rows: tuple[str, str], **changes: Any) -> Any:
    encoder = Seq2SeqRows(EncoderContext.of(recipe(**changes), tokenizer))
    records = [Record({"source": source, "target": target}, "here") for source, target in rows]
    pieces = [piece for record in records for piece in encoder.pieces(record)]
    encodings = encoder.encode(pieces)
    return [encoder.build(record, encodings[2 * i : 2 * i + 2])[0] for i, record in enumerate(records)]


# --- languages --------------------------------------------------------------------------------------------------------

LETTERS = "abcdefgh"
SPECIAL = ["<s>", "<pad>", "</s>", "<unk>"]
MARKING: dict[str, tuple[type, list[str], str, str]] = {
    "nllb": (NllbTokenizer, ["eng_Latn", "deu_Latn"], "m2m_100", "first"),
    "mbart": (MBartTokenizer, ["en_XX", "de_DE"], "mbart", "last"),
    "mbart50": (MBart50Tokenizer, ["en_XX", "de_DE"], "mbart", "first"),
}


def marking_tokenizer(name: str) -> Any:
    kind, languages, _, _ = MARKING[name]
    pieces = [*SPECIAL, "\u2581", *LETTERS]
    vocabulary = (
        {"vocab": {piece: i for i, piece in enumerate(pieces)}, "merges": []}
        if name == "nllb"
        else {"vocab": [(piece, -1.0) for piece in pieces]}
    )
    return kind(**vocabulary, src_lang=languages[0], tgt_lang=languages[1])


def translation(name: str, **changes: Any) -> dict[str, Any]:
    _, (source, target), _, _ = MARKING[name]
    return {"seq2seq": {"source_language": source, "target_language": target, **changes}}


@pytest.mark.parametrize("name", MARKING)
def test_texts_are_marked_as_by_their_own_tokenizer(name: str) -> None:
    tokenizer = marking_tokenizer(name)
    expected = marking_tokenizer(name)("abc de", text_target="fgh")
    (example,) = encoded(tokenizer, ("abc de", "fgh"), **translation(name))
    assert example.columns == {"input_ids": expected.input_ids, "labels": expected.labels}
    assert tokenizer("a").input_ids == marking_tokenizer(name)("a").input_ids  # it still marks sources, for later uses


@pytest.mark.parametrize("key", ["source_language", "target_language"])
def test_languages_that_do_not_fit_are_refused(key: str) -> None:
    section = translation("nllb")["seq2seq"]
    for value, text in (
        (None, f"seq2seq.{key}: .*set source_language and target_language"),
        ("de", "de is no language"),
    ):
        with pytest.raises(RecipeError, match=text):
            encoded(marking_tokenizer("nllb"), seq2seq=section | {key: value})
    with pytest.raises(RecipeError, match=f"seq2seq.{key}: has no effect"):
        encoded(tokenizer_that(), seq2seq={key: "deu_Latn"})
    for name in ("src_lang", "tgt_lang", "lang_code_to_id"):
        tokenizer = tokenizer_that()
        setattr(tokenizer, name, "en_XX")
        with pytest.raises(RecipeError, match="in a way that is not supported"):
            encoded(tokenizer)


# --- rows -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adds", ["nothing", "eos", "both"])
def test_both_sides_end_with_one_eos(adds: str) -> None:
    tokenizer = tokenizer_that(adds)
    eos, begin = tokenizer.eos_token_id, [tokenizer.convert_tokens_to_ids("<s>")] if adds == "both" else []
    examples = encoded(tokenizer, ("the lazy", "dog"), ("ein Bär", "läuft"))
    for example, (source, target) in zip(examples, [("the lazy", "dog"), ("ein Bär", "läuft")], strict=True):
        for column, text in (("input_ids", source), ("labels", target)):
            plain = tokenizer(text, add_special_tokens=False).input_ids
            assert example.columns[column] == [*begin, *plain, eos]
        assert example.meta == {"source": source, "reference": target}
        assert example.notes == ()


@pytest.mark.parametrize("adds", ["nothing", "eos", "both"])
def test_what_is_too_long_is_cut_before_its_end_and_noted(adds: str) -> None:
    tokenizer = tokenizer_that(adds)
    long, eos = "the quick brown fox jumps over the lazy dog " * 3, tokenizer.eos_token_id
    plain, begin = tokenizer(long, add_special_tokens=False).input_ids, int(adds == "both")
    rows = encoded(tokenizer, (long, "dog"), ("dog", long), (long, long), seq2seq={"max_target_length": 7})
    assert rows[0].columns["input_ids"][begin:] == [*plain[: 15 - begin], eos]
    assert rows[1].columns["labels"][begin:] == [*plain[: 6 - begin], eos]
    assert [len(row.columns["input_ids"]) for row in rows] == [16, len(rows[1].columns["input_ids"]), 16]
    source, target = (
        "with a source truncated to data.max_length",
        "with a target truncated to seq2seq.max_target_length",
    )
    assert [row.notes for row in rows] == [(source,), (target,), (source, target)]
    assert rows[1].meta["reference"] == long, "the reference is the whole text"


def test_a_text_of_exactly_the_length_is_not_cut() -> None:
    tokenizer = tokenizer_that()
    text = "the quick brown fox jumps over the lazy dog"
    count = len(tokenizer(text).input_ids)
    for room, notes in ((count + 1, ()), (count, ("with a target truncated to seq2seq.max_target_length",))):
        assert encoded(tokenizer, ("dog", text), seq2seq={"max_target_length": room})[0].notes == notes


def test_the_prefix_stands_before_the_source_alone() -> None:
    tokenizer = tokenizer_that()
    example = encoded(tokenizer, ("the dog", "fox"), seq2seq={"prefix": "name: "})[0]
    assert tokenizer.decode(example.columns["input_ids"], skip_special_tokens=True) == "name: the dog"
    assert tokenizer.decode(example.columns["labels"], skip_special_tokens=True) == "fox"
    assert example.meta["source"] == "the dog"
    settings = recipe(seq2seq={"prefix": "name: "}).settings
    texts = list(Seq2SeqRows.texts(settings, Record({"source": "a", "target": "b"}, "")))
    assert texts == ["name: a", "b"]
    with pytest.raises(RecipeError, match=r"data\.max_length: 16 leaves no room.*prefix"):
        encoded(tokenizer, ("a", "b"), seq2seq={"prefix": "the quick brown fox jumps over the lazy dog " * 3})


def test_a_text_that_spells_eos_stays_text() -> None:
    tokenizer = tokenizer_that("eos")
    ids = encoded(tokenizer, ("a <|endoftext|> b", "c"))[0].columns["input_ids"]
    assert ids.count(tokenizer.eos_token_id) == 1
    assert tokenizer.decode(ids[:-1]) == "a <|endoftext|> b"


def test_a_tokenizer_that_can_only_read_it_as_the_end() -> None:
    """One whose vocabulary has the token as an ordinary piece."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    backend = Tokenizer(models.WordLevel({"</s>": 0, "<pad>": 1, "<unk>": 2, "a": 3}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )
    with pytest.raises(RowError, match="'target' contains the text of the EOS token"):
        encoded(tokenizer, ("a", "a </s> a"))


@pytest.mark.parametrize("missing", ["eos", "pad"])
def test_tokenizers_without_an_end_or_padding_are_refused(missing: str) -> None:
    tokenizer = tokenizer_that()
    setattr(tokenizer, f"{missing}_token", None)
    with pytest.raises(RecipeError, match=f"no {missing.upper()} token"):
        Seq2SeqRows(EncoderContext.of(recipe(), tokenizer))


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"source": "a text"}, "there is no field 'target'; the fields are: 'source'"),
        ({"source": None, "target": "b"}, "the field 'source' is null"),
        ({"source": "a", "target": 7}, "the field 'target' is a number and not text"),
        ({"source": ["a"], "target": "b"}, "the field 'source' is a list and not text"),
        ({"source": " \t ", "target": "b"}, "the field 'source' is empty"),
        ({"source": "a", "target": ""}, "the field 'target' is empty"),
        (
            {"source": "a", "target": "\ud800"},
            "character 0 of the field 'target', '\\ud800', is half of",
        ),
    ],
)
def test_broken_rows_are_named(tmp_path: Path, row: dict[str, Any], says: str) -> None:
    good = {"source": "the quick brown fox", "target": "a dog"}
    path = write_rows(tmp_path / "rows.jsonl", [good, good, row, good])
    with pytest.raises(DataError) as error:
        prepare(recipe(tmp_path), tmp_path)
    assert f"{path}:3: {says}" in str(error.value)
    assert "bad_rows: skip" in str(error.value)
    skipped = prepare(recipe(tmp_path, data={"bad_rows": "skip"}), tmp_path)
    assert len(skipped.train) == 3
    assert skipped.report.bad_rows.count == 1


def test_prepared_rows(tmp_path: Path) -> None:
    """Through the store: other column names, lengths of both sides together, and cuts in the report."""
    rows = [{"en": f"word{i} " * (1 + i % 9), "de": f"wort{i}"} for i in range(30)]
    write_rows(tmp_path / "rows.jsonl", rows)
    source = [{"path": "rows.jsonl", "fields": {"source": "en", "target": "de"}}]
    prepared = prepare(recipe(tmp_path, data={"train": source, "validation": 0.2}), tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(prepared.tokenizer_path)
    cut = sum(len(tokenizer(row["en"]).input_ids) + 1 > 16 for row in rows)
    for store in (prepared.train, prepared.validation):
        assert store is not None
        lengths = store.lengths(np.arange(len(store)))
        for i in range(len(store)):
            row = store.row(i)
            assert lengths[i] == len(row.input_ids) + len(row.columns["labels"])
            assert row.input_ids[-1] == row.columns["labels"][-1] == tokenizer.eos_token_id
    metas = [prepared.validation.row(i).meta for i in range(len(prepared.validation))]  # type: ignore
    assert all({"en": meta["source"], "de": meta["reference"]} in rows for meta in metas)
    assert prepared.report.notes["with a source truncated to data.max_length"][0] == cut > 0


def test_unknown_tokens_of_targets_are_counted_too(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl", [{"source": "a fox", "target": "a dog"}] * 4)
    write_rows(tmp_path / "more.jsonl", [{"source": "a fox ж", "target": "ж ж dog"}])
    given = recipe(
        tmp_path,
        {"train": {"algorithm": "wordpiece", "vocab_size": 300}},
        data={"validation": [{"path": "more.jsonl"}]},
    )
    assert prepare(given, tmp_path).report.unknown_tokens == 3


# --- loss -------------------------------------------------------------------------------------------------------------


def network(config: dict[str, Any], tokenizer: PreTrainedTokenizerFast, **seq2seq: Any) -> tuple[Any, PreTrainedModel]:
    """The task, and a network that it has fitted."""
    settings = recipe(model={"config": config}, seq2seq=seq2seq, data={"validation": 0.1})
    made_of = {key: value for key, value in config.items() if key != "model_type"}
    kinds = {"t5": T5Config, "mt5": MT5Config, "bart": BartConfig, "mbart": MBartConfig, "m2m_100": M2M100Config}
    kind = kinds[config["model_type"]]
    ids = {f"{role}_token_id": getattr(tokenizer, f"{role}_token_id") for role in ("eos", "pad", "bos")}
    fitted = kind(vocab_size=len(tokenizer), **ids, **made_of)
    Seq2Seq.fit_config(TaskSetup.of(settings, tokenizer, {}), fitted)
    model = build_model(settings.model, fitted, 0, AutoModelForSeq2SeqLM).eval()
    task = make_task(settings, tokenizer)
    task = for_model(task, model)
    return task, model


def rows_of(tokenizer: PreTrainedTokenizerFast, count: int = 5) -> list[Row]:
    chance, eos = np.random.default_rng(1), tokenizer.eos_token_id
    rows = []
    for _ in range(count):
        source, target = (np.append(chance.integers(5, 250, size=chance.integers(2, 12)), eos) for _ in range(2))
        rows.append(Row(source, np.zeros(1, np.int64), {"labels": target}))
    return rows


@pytest.mark.parametrize("config", [T5, T5 | {"model_type": "mt5"}, BART], ids=["t5", "mt5", "bart"])
def test_the_loss_is_that_of_transformers(config: dict[str, Any]) -> None:
    """Their collator, their shift of the labels, their head."""
    tokenizer = tokenizer_that()
    task, model = network(config, tokenizer)
    rows = rows_of(tokenizer)
    batch = task.collate(rows)
    features = [{"input_ids": row.input_ids.tolist(), "labels": row.columns["labels"].tolist()} for row in rows]
    theirs = DataCollatorForSeq2Seq(tokenizer, model=model)(features)
    labels = theirs["labels"]
    for ours, name in (("input_ids",) * 2, ("attention_mask",) * 2, ("targets", "labels")):
        assert torch.equal(batch.inputs[ours], theirs[name]), name
    read = labels != -100  # what stands in padding nobody reads
    assert torch.equal(batch.inputs["decoder_input_ids"][read], theirs["decoder_input_ids"][read])
    with torch.no_grad():
        loss, metrics, *_ = task.loss(model, batch.inputs)
        expected = model(**{key: theirs[key] for key in ("input_ids", "attention_mask", "labels")})
    assert batch.count == (labels != -100).sum() == sum(len(row.columns["labels"]) for row in rows)
    assert batch.tokens == batch.count + sum(len(row.input_ids) for row in rows)
    assert loss.item() == pytest.approx(expected.loss.item() * batch.count, rel=1e-5)
    right = ((expected.logits.argmax(-1) == labels) & (labels != -100)).sum().item()
    assert [x.item() for x in metrics["accuracy"]] == [right, batch.count]


@pytest.mark.parametrize("name", MARKING)
def test_networks_with_languages(name: str) -> None:
    """The loss is that of transformers' own shift, and generated texts are in the target's language."""
    _, (_, target), model_type, place = MARKING[name]
    tokenizer = marking_tokenizer(name)
    language = tokenizer.convert_tokens_to_ids(target)
    config = BART | {"model_type": model_type, "decoder_start_token_id": tokenizer.eos_token_id}
    task, model = network(config, tokenizer, **translation(name)["seq2seq"])
    texts = [("abc de", "fgh"), ("a", "bcde fg")]
    features = [dict(tokenizer(source, text_target=text)) for source, text in texts]
    rows = [
        Row(np.array(each["input_ids"]), np.zeros(1, np.int64), {"labels": np.array(each["labels"])})
        for each in features
    ]
    batch = task.collate(rows)
    theirs = DataCollatorForSeq2Seq(tokenizer, model=model)(features)
    with torch.no_grad():
        loss = task.loss(model, batch.inputs).loss_sum.item()
        expected = model(**{key: theirs[key] for key in ("input_ids", "attention_mask", "labels")}).loss.item()
        generated = model.generate(theirs["input_ids"], attention_mask=theirs["attention_mask"], max_new_tokens=3)
    assert loss == pytest.approx(expected * batch.count, rel=1e-5)
    start = [tokenizer.eos_token_id, language] if place == "first" else [language]
    assert generated[:, : len(start)].tolist() == [start, start]


@pytest.mark.parametrize("smoothing", [0.1, 0.6])
def test_label_smoothing_is_that_of_transformers(smoothing: float) -> None:
    tokenizer = tokenizer_that()
    task, model = network(T5, tokenizer, label_smoothing=smoothing)
    batch = task.collate(rows_of(tokenizer))
    with torch.no_grad():
        loss = task.loss(model, batch.inputs).loss_sum.item()
        plain = task.evaluate(model, batch.inputs).loss_sum.item()
        output = model(**{key: x for key, x in batch.inputs.items() if key != "targets"})
        expected = LabelSmoother(smoothing)(output, batch.inputs["targets"]).item()
        without = LabelSmoother(0.0)(output, batch.inputs["targets"]).item()
    assert loss == pytest.approx(expected * batch.count, rel=1e-5)
    assert plain == pytest.approx(without * batch.count, rel=1e-5), "evaluation is not smoothed"
    assert abs(loss - plain) > 1e-2
    assert task.eval_metrics({"loss": 2.0, "accuracy": 0.5}) == {
        "loss": 2.0,
        "accuracy": 0.5,
        "perplexity": math.exp(2.0),
    }


@pytest.mark.parametrize("config", [T5, BART], ids=["t5", "bart"])
def test_padding_of_either_side_changes_no_row(config: dict[str, Any]) -> None:
    """Each row alone; beside one with a longer source; beside one with a longer target."""
    tokenizer = tokenizer_that()
    task, model = network(config, tokenizer)
    long = np.arange(20, 50)
    wide_source = Row(long, np.zeros(1, np.int64), {"labels": np.array([7, 0])})
    wide_target = Row(np.array([7, 0]), np.zeros(1, np.int64), {"labels": long})
    with torch.no_grad():
        alone = [task.loss(model, task.collate([row]).inputs).loss_sum.item() for row in [wide_source, wide_target]]
        for row in rows_of(tokenizer):
            own = task.loss(model, task.collate([row]).inputs).loss_sum.item()
            for other, its in zip((wide_source, wide_target), alone, strict=True):
                both = task.loss(model, task.collate([row, other]).inputs).loss_sum.item()
                assert both - its == pytest.approx(own, rel=1e-5)


def test_a_stand_in_counts_nothing_and_its_gradient_is_zero() -> None:
    tokenizer = tokenizer_that()
    task, model = network(T5, tokenizer, label_smoothing=0.1)
    loss, metrics, *_ = task.loss(model, mask_all(task.collate(rows_of(tokenizer)).inputs))
    loss.backward()
    assert loss.item() == 0
    assert [x.item() for x in metrics["accuracy"]] == [0, 0]
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert gradients
    assert all(not g.any() for g in gradients)


def test_which_token_a_new_decoder_begins_with() -> None:
    """The pad token: also where the kind of network has ids of another vocabulary by default."""
    tokenizer = tokenizer_that()
    for config in (T5, T5 | {"model_type": "mt5"}, BART):
        task, model = network(config, tokenizer)
        assert task.start_id == model.config.decoder_start_token_id == tokenizer.pad_token_id
        assert model.generation_config.decoder_start_token_id == tokenizer.pad_token_id
        assert model.generation_config.forced_eos_token_id is None
        assert (task.collate(rows_of(tokenizer)).inputs["decoder_input_ids"][:, 0] == tokenizer.pad_token_id).all()
    task, model = network(BART | {"decoder_start_token_id": 9, "forced_eos_token_id": 0}, tokenizer)
    assert task.start_id == model.generation_config.decoder_start_token_id == 9
    assert model.generation_config.forced_eos_token_id == 0


def test_networks_that_cannot_are_refused() -> None:
    tokenizer = tokenizer_that()
    with pytest.raises(RecipeError, match="needs an encoder-decoder network, and llama is not one"):
        Seq2Seq.fit_config(TaskSetup.of(recipe(), tokenizer, {}), LlamaConfig())
    with pytest.raises(RecipeError, match=r"seq2seq\.max_target_length: 129 .* max_position_embeddings \(128\)"):
        network(BART, tokenizer, max_target_length=129)
    with pytest.raises(RecipeError, match=r"seq2seq\.generation\.max_new_tokens: 130"):
        network(BART, tokenizer, max_target_length=20, generation={"max_new_tokens": 130})
    task, model = network(T5, tokenizer)
    model.config.decoder_start_token_id = model.generation_config.decoder_start_token_id = None
    with pytest.raises(RecipeError, match="no decoder_start_token_id"):
        task = for_model(task, model)


def test_metric_names_follow_the_settings() -> None:
    plain = ("loss", "perplexity", "accuracy")
    assert tuple(recipe().settings.metric_names) == plain
    for metrics, names in ((["rouge"], ("rouge1", "rouge2", "rougeL")), (["chrf", "bleu"], ("chrf", "bleu"))):
        settings = recipe(data={"validation": 0.1}, seq2seq={"generation": {"metrics": metrics}})
        assert tuple(settings.settings.metric_names) == (*plain, *names)


def test_generation_without_validation_is_refused() -> None:
    with pytest.raises(ValidationError, match="generation: has no effect here"):
        recipe(seq2seq={"generation": {}})


def test_a_tokenizer_without_a_fast_version_is_refused(tmp_path: Path) -> None:
    """Marian's, of two sentencepiece models and a vocabulary."""
    import sentencepiece

    (tmp_path / "text.txt").write_text("\n".join(TEXTS))
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text.txt"), model_prefix=str(tmp_path / "m"), vocab_size=40, minloglevel=2
    )
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "m.model"))
    vocabulary = {pieces.id_to_piece(i): i for i in range(len(pieces))}
    for side in ("source", "target"):
        (tmp_path / f"{side}.spm").write_bytes((tmp_path / "m.model").read_bytes())
    (tmp_path / "vocab.json").write_text(json.dumps({**vocabulary, "<pad>": len(vocabulary)}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "MarianTokenizer"}))
    with pytest.raises(RecipeError, match=r"MarianTokenizer has no fast version .* such as NLLB, mBART or mT5 instead"):
        encoded(AutoTokenizer.from_pretrained(tmp_path), ("a", "b"))
