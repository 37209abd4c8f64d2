"""Preparing stores from a recipe: reading, splitting, encoding and counting."""

from __future__ import annotations

import hashlib
import json
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
from prepare_support import DOCUMENTS, all_ids, prepare, recipe, save_tokenizer, write_text

from ptft_dist.config.tokenizer_section import TokenizerTraining
from ptft_dist.data import chunks, tokenizer_files, tokenizer_provider
from ptft_dist.data.formats import Document
from ptft_dist.data.prepare import describe
from ptft_dist.data.report import SideReport
from ptft_dist.data.tokenizer import DocumentEncoder, load_tokenizer, tokenizer_fingerprint, train_tokenizer
from ptft_dist.errors import DataError, RecipeError
from ptft_dist.reporting import messages as reporting
from ptft_dist.reporting.messages import messages
from ptft_dist.tasks.registry import recipe_class


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_text(tmp_path)


def ends_with_eos(tokenizer_path: Path, texts: list[str]) -> list[list[int]]:
    tokenizer = load_tokenizer(tokenizer_path)
    return [[*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id] for text in texts]


def test_packed_rows_hold_every_document_in_order(base: Path, tokenizer_dir: Path) -> None:
    prepared = prepare(recipe(tokenizer_dir), base)
    expected = [token for ids in ends_with_eos(tokenizer_dir, DOCUMENTS) for token in ids]
    expected = expected[: -1 if len(expected) % 16 == 1 else None]
    assert all_ids(prepared.train) == expected
    assert prepared.validation is None
    assert not prepared.from_cache
    assert prepared.tokenizer_path == tokenizer_dir


def test_unpacked_rows_and_bos(base: Path, tokenizer_dir: Path) -> None:
    prepared = prepare(recipe(tokenizer_dir, clm={"packing": False, "bos": True}), base)
    bos = load_tokenizer(tokenizer_dir).bos_token_id
    expected: list[list[int]] = []
    for ids in ends_with_eos(tokenizer_dir, DOCUMENTS):
        document = [bos, *ids]
        expected += [document[i : i + 16] for i in range(0, len(document), 16) if len(document[i : i + 16]) > 1]
    assert [prepared.train.row(i).input_ids.tolist() for i in range(len(prepared.train))] == expected


def test_a_share_for_validation_depends_on_the_text_alone(base: Path, tokenizer_dir: Path) -> None:
    (base / "text.txt").write_text("\n".join(DOCUMENTS * 2))
    prepared = prepare(recipe(tokenizer_dir, validation=0.25, clm={"packing": False}, max_length=100), base)
    sides: dict[bool, list[str]] = {True: [], False: []}
    for text in DOCUMENTS * 2:
        number = int(hashlib.blake2b(text.encode(), digest_size=8).hexdigest(), 16)
        sides[number < 0.25 * 2**64].append(text)
    assert 5 < len(sides[True]) < 60
    for store, texts in ((prepared.train, sides[False]), (prepared.validation, sides[True])):
        assert store is not None
        rows = [store.row(i).input_ids.tolist() for i in range(len(store))]
        assert rows == ends_with_eos(tokenizer_dir, texts)


def test_validation_sources_of_their_own(base: Path, tokenizer_dir: Path) -> None:
    (base / "held_out.jsonl").write_text('{"text": "held out"}\n')
    prepared = prepare(recipe(tokenizer_dir, validation=[{"path": "held_out.jsonl"}]), base)
    assert prepared.validation is not None
    assert all_ids(prepared.validation) == ends_with_eos(tokenizer_dir, ["held out"])[0]
    assert prepared.train.documents == 60


@pytest.mark.parametrize(("share", "side"), [(1e-9, "validation"), (1 - 1e-9, "train")])
def test_a_side_without_documents_is_an_error(base: Path, tokenizer_dir: Path, share: float, side: str) -> None:
    with pytest.raises(DataError, match=f"no rows for {side}: 60 documents.*paragraph") as caught:
        prepare(recipe(tokenizer_dir, validation=share), base)
    assert caught.value.exit_code == 3
    assert list((base / "cache/stores").glob("*/")) == []


def test_documents_without_text_are_dropped_and_counted(base: Path, tokenizer_dir: Path) -> None:
    (base / "text.txt").write_text("a b\n\n \t\nc d\n" + "\n" * 7)
    prepared = prepare(recipe(tokenizer_dir), base)
    assert all_ids(prepared.train) == list(chain(*ends_with_eos(tokenizer_dir, ["a b", "c d"])))
    report = prepared.report
    assert (report.read, report.dropped["without text"].times) == (11, 9)
    assert report.dropped["without text"].places == [f"{base}/text.txt:{line}" for line in (2, 3, 5, 6, 7)]
    assert "9 of 11 documents without text" in describe(report)


def test_the_report_counts_right(base: Path, tokenizer_dir: Path) -> None:
    (base / "text.txt").write_text("QQQ\nQQ\nÜQQ")  # letters that the tokenizer never met: a token for each byte
    prepared = prepare(recipe(tokenizer_dir, clm={"packing": False}, max_length=3), base)
    # With EOS they have 4, 3 and 5 tokens: 3 and a lonely 1, 3, 3 + 2.
    assert prepared.report.train == SideReport(examples=3, rows=4, tokens=11, text_bytes=9, dropped_tokens=1)
    assert prepared.report.vocabulary == len(load_tokenizer(tokenizer_dir))
    assert prepared.report.unknown_tokens == 0
    lines = describe(prepared.report)
    assert "1 one-token row: nothing to predict" in lines
    assert "3 documents" in lines


def test_a_text_that_spells_a_special_token_stays_text(base: Path, tokenizer_dir: Path, tmp_path: Path) -> None:
    text = "a <|endoftext|> b<|pad|><|bos|>"
    trained = train_tokenizer(TokenizerTraining(vocab_size=300), DOCUMENTS)
    trained.save_pretrained(tmp_path / "again")
    for tokenizer in (trained, load_tokenizer(tmp_path / "again")):
        (ids,) = DocumentEncoder(tokenizer, ("bos", "eos")).encode([Document(text, "x")])
        assert not set(tokenizer.all_special_ids) & set(ids[1:-1])
        assert (ids[0], ids[-1]) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
        assert tokenizer.decode(ids[1:-1]) == text

    (base / "text.txt").write_text(text)
    store = prepare(recipe(tokenizer_dir, clm={"packing": False}, max_length=100), base).train
    eos = load_tokenizer(tokenizer_dir).eos_token_id
    assert [i for i, token in enumerate(all_ids(store)) if token == eos] == [len(all_ids(store)) - 1]


def bos_tokenizer(folder: Path) -> Any:
    """A tokenizer that begins a text with BOS, as those of Llama, Gemma and Mistral do."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = train_tokenizer(TokenizerTraining(vocab_size=300), DOCUMENTS)
    special = [("<|bos|>", tokenizer.bos_token_id)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<|bos|> $A", special_tokens=special)
    tokenizer.save_pretrained(folder)
    return load_tokenizer(folder)


def test_documents_begin_as_the_tokenizer_s_texts_do(base: Path, tokenizer_dir: Path, tmp_path: Path) -> None:
    """The three values of clm.bos have different stores in one cache."""
    (base / "text.txt").write_text("a lazy dog")
    tokenizer = bos_tokenizer(tmp_path / "bos")
    ids = tokenizer("a lazy dog", add_special_tokens=False).input_ids
    begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id

    def rows(directory: Path, **clm: Any) -> tuple[list[int], str, str]:
        found = prepare(recipe(directory, clm={"packing": False, **clm}, max_length=100), base)
        return all_ids(found.train), found.fingerprint, describe(found.report)

    assert rows(tmp_path / "bos")[0] == [begin, *ids, end] == [*tokenizer("a lazy dog").input_ids, end]
    assert rows(tmp_path / "bos", bos=False)[0] == [*ids, end]
    assert rows(tmp_path / "bos")[1] == rows(tmp_path / "bos", bos=True)[1]
    assert "<|bos|> text" not in rows(tmp_path / "bos")[2]
    assert "the tokenizer itself encodes a text as `<|bos|> text`" in rows(tmp_path / "bos", bos=False)[2]

    assert rows(tokenizer_dir)[0] == [*ids, end]
    assert rows(tokenizer_dir)[1] == rows(tokenizer_dir, bos=False)[1]
    assert rows(tokenizer_dir, bos=True)[0] == [begin, *ids, end]
    assert "warning" not in rows(tokenizer_dir)[2]


@pytest.mark.parametrize("task", ["clm", "mlm", "plm"])
def test_no_warning_about_the_special_tokens_of_a_tokenizer_that_is_trained_here(base: Path, task: str) -> None:
    """plm: texts of its tokenizer end with SEP, for fine-tuning, and documents with EOS."""
    values = recipe({"vocab_size": 300}).model_dump(exclude_unset=True, exclude={"clm"})
    prepared = prepare(recipe_class().model_validate(values | {"task": task}), base)
    assert prepared.report.warnings == []
    written = json.loads((prepared.train.path.parent / "report.json").read_text())
    assert written["warnings"] == []


def test_clm_bos_that_the_trained_tokenizer_does_not_add_is_a_warning(base: Path) -> None:
    (warning,) = prepare(recipe({"vocab_size": 300}, clm={"bos": True}), base).report.warnings
    assert "encoded as `<|bos|> text <|endoftext|>`" in warning
    assert "the tokenizer itself encodes a text as `text`" in warning


def test_the_cache_is_found_without_loading_the_tokenizer(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tokenizer trained here adds no BOS, so it is not loaded."""
    prepare(recipe({"vocab_size": 300}), base)
    for user in (tokenizer_provider, tokenizer_files):
        monkeypatch.setattr(user, "load_tokenizer", lambda *_args, **_options: pytest.fail("loaded"))
    assert prepare(recipe({"vocab_size": 300}), base).from_cache


@pytest.mark.parametrize("task", ["clm", "sft"])
def test_giant_words_reach_no_tokenizer_training(base: Path, task: str, caplog: pytest.LogCaptureFixture) -> None:
    """A million characters would take the trainer 20 minutes; 50,000 take it seconds."""
    with (base / "rows.jsonl").open("w") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in [*DOCUMENTS, "a" * 50_000])
    values = recipe({"vocab_size": 300}, train=[{"path": "rows.jsonl"}]).model_dump(exclude_unset=True, exclude={"clm"})
    prepare(recipe_class().model_validate(values | {"task": task}), base)
    assert [
        r.message.split(": ")[0]
        for r in caplog.records
        if r.levelname == "WARNING" and "tokenizer" in r.message and "split" in r.message
    ] == [f"{base}/rows.jsonl:61"]


def test_a_tokenizer_that_must_read_a_spelled_eos_as_eos(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({"</s>": 0, "a": 1, "?": 2}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="?")
    encoder = DocumentEncoder(tokenizer, (None, "eos"))
    assert [ids.tolist() for ids in encoder.encode([Document("a b", "")])] == [[1, 2, 0]]
    with pytest.raises(DataError, match="file:7: the text contains '</s>'"):
        encoder.encode([Document("a </s> a", "file:7")])

    tokenizer.save_pretrained(tmp_path / "words")
    (tmp_path / "text.txt").write_text("a b\na c")
    report = prepare(recipe(tmp_path / "words"), tmp_path).report
    assert report.unknown_tokens == 2
    assert "2 unknown tokens" in describe(report)


def test_a_text_that_comes_to_nothing_is_empty(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({"</s>": 0, "a": 1, "?": 2}, unk_token="?"))
    backend.normalizer = normalizers.Replace("-", "")
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>").save_pretrained(tmp_path / "words")
    (tmp_path / "text.txt").write_text("a\n--\na a")
    prepared = prepare(recipe(tmp_path / "words"), tmp_path)
    assert all_ids(prepared.train) == [1, 0, 1, 1, 0]
    assert prepared.report.dropped["without text"].places == [f"{tmp_path}/text.txt:2"]


@pytest.mark.parametrize(("missing", "clm"), [("eos", {}), ("bos", {"bos": True})])
def test_a_tokenizer_without_the_special_token(
    base: Path, tokenizer_dir: Path, missing: str, clm: dict[str, Any]
) -> None:
    tokenizer = load_tokenizer(tokenizer_dir)
    setattr(tokenizer, f"{missing}_token", None)
    tokenizer.save_pretrained(base / "lacking")
    with pytest.raises(RecipeError, match=f"no {missing.upper()} token") as caught:
        prepare(recipe(base / "lacking", clm=clm), base)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("path", ["./nowhere", "a/b/c", "/nowhere/at/all", "text.txt"])
def test_a_tokenizer_that_is_not_there(base: Path, path: str) -> None:
    if path == "text.txt":
        path = str(base / path)
    with pytest.raises(RecipeError, match=r"tokenizer\.path: ") as caught:
        prepare(recipe(path), base)
    assert path in str(caught.value)


def test_a_tokenizer_learns_from_the_training_side_only(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    monkeypatch.setattr(
        tokenizer_provider,
        "train_tokenizer",
        lambda settings, texts, roles, _extra: train_tokenizer(settings, seen_too(list(texts)), roles),
    )

    def seen_too(texts: list[str]) -> list[str]:
        seen.extend(texts)
        return texts

    prepared = prepare(recipe({"vocab_size": 300}, validation=0.3), base)
    assert prepared.validation is not None
    assert len(seen) == prepared.train.documents
    assert len(seen) + prepared.validation.documents == 60
    assert prepared.report.vocabulary == 300
    assert len(load_tokenizer(prepared.tokenizer_path)) == 300


def test_documents_beyond_one_chunk_keep_their_order(
    base: Path, tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = all_ids(prepare(recipe(tokenizer_dir), base).train)
    monkeypatch.setattr(chunks, "CHUNK_CHARACTERS", 100)
    assert all_ids(prepare(recipe(tokenizer_dir, cache_dir="other"), base).train) == whole


def test_a_giant_document_is_announced(
    base: Path, tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (base / "giant.txt").write_text("word " * 30)
    monkeypatch.setattr(chunks, "_GIANT_CHARACTERS", 100)
    prepare(recipe(tokenizer_dir, train=[{"path": "text.txt", "document": "line"}, {"path": "giant.txt"}]), base)
    assert [record.message.split(": ")[0] for record in caplog.records if record.levelname == "WARNING"] == [
        f"{base}/giant.txt"
    ]


def test_every_mistake_in_the_sources_is_listed(base: Path, tokenizer_dir: Path) -> None:
    with pytest.raises(DataError) as caught:
        prepare(
            recipe(tokenizer_dir, train=[{"path": "a.txt"}, {"path": "b.txt"}], validation=[{"path": "c.txt"}]), base
        )
    keys = [line.split(": ")[0] for line in str(caught.value).splitlines()]
    assert keys == ["data.train[0].path", "data.train[1].path", "data.validation[0].path"]


def test_progress_of_long_work_and_none_of_short_work(
    base: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(recipe({"vocab_size": 300}), base)
    assert capsys.readouterr() == ("", "")  # messages are not shown here
    with messages():
        prepare(recipe({"vocab_size": 300}, cache_dir="other"), base)
    what = "training a tokenizer of 300 tokens on the training texts"
    assert capsys.readouterr() == ("", f"{what} ...\n")
    monkeypatch.setattr(reporting, "PLAIN_EVERY_S", -1.0)
    with messages():
        prepare(recipe({"vocab_size": 300}, cache_dir="third"), base)
    shown = {line.split(":")[0] for line in capsys.readouterr().err.splitlines() if " MB, 0:00" in line}
    assert shown == {"hashing 1 new or changed files", what, "encoding"}


def test_a_tokenizer_of_the_hub_is_kept_as_a_copy(
    base: Path, tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[Any, ...]] = []

    def load(path: Any, revision: str | None = None, trust_remote_code: bool = False) -> Any:
        asked.append((str(path), revision, trust_remote_code))
        return load_tokenizer(tokenizer_dir if path == "org/name" else path)

    for user in (tokenizer_provider, tokenizer_files):
        monkeypatch.setattr(user, "load_tokenizer", load)
    raw = recipe("org/name").model_dump(exclude_unset=True)
    raw["tokenizer"]["revision"] = "v1"
    wanted = recipe_class().model_validate(raw)
    prepared = prepare(wanted, base)
    assert asked == [("org/name", "v1", False), (str(prepared.tokenizer_path), None, False)]
    assert prepared.tokenizer_path.is_relative_to(base / "cache/tokenizers")
    assert all_ids(prepared.train) == all_ids(prepare(recipe(tokenizer_dir), base).train)
    assert prepare(wanted, base).from_cache


def test_a_tokenizer_written_in_python(base: Path) -> None:
    from transformers import ByT5Tokenizer

    tokenizer = ByT5Tokenizer()
    assert not tokenizer.is_fast
    text = "ab </s> ü"
    (ids,) = DocumentEncoder(tokenizer, (None, "eos")).encode([Document(text, "")])
    assert ids.tolist() == [byte + 3 for byte in text.encode()] + [tokenizer.eos_token_id]
    tokenizer.save_pretrained(base / "bytes")
    assert prepare(recipe(base / "bytes"), base).train.documents == 60
    assert tokenizer_fingerprint(tokenizer) == tokenizer_fingerprint(load_tokenizer(base / "bytes"))
