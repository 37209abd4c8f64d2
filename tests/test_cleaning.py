"""data.steps: which records remain, that shards, processes and interruptions do not matter, and the report."""

from __future__ import annotations

import datetime
import gzip
import json
import os
import random
import signal
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from prepare_support import all_ids, prepare, recipe, save_tokenizer
from support import fork_server
from tiny import write_tiny

from ptft_dist.api import load_recipe
from ptft_dist.config.cleaning import ExactDedupStep, NearDedupStep
from ptft_dist.config.recipe import Recipe
from ptft_dist.data import shards
from ptft_dist.data.cleaning import stage
from ptft_dist.data.cleaning.exact_dedup import ExactDedup
from ptft_dist.data.cleaning.near_dedup import NearDedup, rows_per_band
from ptft_dist.data.cleaning.words import words
from ptft_dist.data.prepare import Prepared, describe, records_of
from ptft_dist.data.workers import in_processes
from ptft_dist.errors import DataError, PtftError, RecipeError
from ptft_dist.tasks.registry import encoder_class, recipe_class

WORDS = [f"{a}{b}{c}" for a in "bcdfgklm" for b in "aeiou" for c in "nrstl"]


def sentence(rng: random.Random, length: int = 40) -> str:
    return " ".join(rng.choices(WORDS, k=length))


def write(path: Path, texts: list[str]) -> list[dict[str, str]]:
    path.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts))
    return [{"path": path.name}]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(shards.SHARD_VARIABLE, "0.002")


def clm(tokenizer: Path, steps: list[Any], **data: Any) -> Recipe:
    return recipe(tokenizer, steps=steps, **data)


def texts_of(recipe: Recipe, base: Path, side: Any = "train", index: int = 0) -> list[str]:
    return [r.values["text"] for r in records_of(recipe, base, encoder_class(recipe.task)).of(side, index)]


# --- deduplication ---------------------------------------------------------------------------------------------------


def test_the_first_of_equal_documents_is_kept(tmp_path: Path, tokenizer: Path) -> None:
    rng = random.Random(0)
    texts = [rng.choice("abcdefgh") * 3 + " 文本" for _ in range(60)]
    source = write(tmp_path / "rows.jsonl", texts)
    assert texts_of(clm(tokenizer, ["exact_dedup"], train=source), tmp_path) == list(dict.fromkeys(texts))


@pytest.mark.parametrize("unit", ["line", "paragraph"])
def test_repeated_parts_are_removed_and_short_ones_are_not(tmp_path: Path, tokenizer: Path, unit: str) -> None:
    gap = "\n" if unit == "line" else "\n\n"
    long = [f"this part of a text has the number {i} and is long" for i in range(6)]
    texts = [
        gap.join([long[0], "short", long[1]]),
        gap.join([long[1], "short", long[2]]),
        long[0],  # nothing is left
        gap.join(
            [f"  {long[2]}  ", long[3], long[3]]
        ),  # spaces around do not count, and a repeat within a document does
    ]
    got = texts_of(
        clm(tokenizer, [{"exact_dedup": {"unit": unit}}], train=write(tmp_path / "rows.jsonl", texts)), tmp_path
    )
    assert [text.strip() for text in got] == [texts[0], gap.join(["short", long[2]]), long[3]]


@pytest.mark.parametrize("buckets", [1, 7])
def test_exact_duplicates_are_those_of_a_naive_loop(monkeypatch: pytest.MonkeyPatch, buckets: int) -> None:
    monkeypatch.setattr("ptft_dist.data.cleaning.exact_dedup._SORTED_AT_ONCE", 300 // buckets)
    rng = random.Random(1)
    texts = [str(rng.randrange(120)) for _ in range(300)]
    step = ExactDedup(ExactDedupStep())
    parts = [step.sign(texts[:100]), step.sign([]), step.sign(texts[100:])]
    assert step.originals(parts).tolist() == [texts.index(text) for text in texts]


def grams(text: str, length: int) -> set[tuple[str, ...]]:
    all_words = words(text)
    return {tuple(all_words[i : i + length]) for i in range(len(all_words) - length + 1)}


def test_near_duplicates_are_those_of_brute_force() -> None:
    """Pairs well above the threshold are found, and nothing well below it is dropped. English and Chinese."""
    rng = random.Random(2)
    characters = [chr(code) for code in range(0x4E00, 0x4E00 + 800)]
    texts = []
    for _ in range(40):
        for vocabulary, gap in ((WORDS, " "), (characters, "")):
            original = rng.choices(vocabulary, k=120)
            texts.append(gap.join(original))
            for edits in (1, 3, 12):
                copy = list(original)
                for at in rng.sample(range(120), edits):
                    copy[at] = rng.choice(vocabulary)
                texts.append(gap.join(copy))
    rng.shuffle(texts)
    step = NearDedup(NearDedupStep(threshold=0.7, hashes=256))
    half = len(texts) // 2
    first = step.originals([step.sign(texts[:half]), step.sign(texts[half:])])
    groups = list(range(len(texts)))  # of pairs with a similarity of at least 0.7
    close, pairs = set(), set()
    sets = [grams(text, 5) for text in texts]
    for i, j in combinations(range(len(texts)), 2):
        similarity = len(sets[i] & sets[j]) / len(sets[i] | sets[j])
        if similarity >= 0.78:
            close.add((i, j))
        if similarity >= 0.62:
            pairs.add((i, j))
    assert len(close) > 100
    missed = sum(first[i] != first[j] for i, j in close)
    assert missed <= 0.02 * len(close)
    for i, j in sorted(pairs):
        low, high = sorted((groups[i], groups[j]))
        groups = [low if group == high else group for group in groups]
    assert all(groups[i] == groups[first[i]] for i in range(len(texts)))  # nothing else is joined
    assert len(set(groups)) > 70


@pytest.mark.timeout(120)
def test_large_chunks_are_signed_in_forked_processes_too() -> None:
    """Threads of a library that this process has started do not exist in a fork, which would wait for them for ever."""
    rng = random.Random(7)
    texts = [sentence(rng, 150) for _ in range(3000)]
    step = NearDedup(NearDedupStep())
    expected = step.sign(texts)
    signed = [signatures for _, signatures in in_processes([texts] * 5, step.sign, 2)]
    assert all((signatures == expected).all() for signatures in signed)
    one_by_one = np.concatenate([step.sign([text]) for text in texts[:50]])
    assert (one_by_one == expected[:50]).all()


def test_bands_find_pairs_at_the_threshold() -> None:
    for threshold in (0.5, 0.7, 0.8, 0.9):
        rows = rows_per_band(threshold, 128)
        caught = [
            any(np.all(agree[b * rows : (b + 1) * rows]) for b in range(128 // rows))
            for agree in np.random.default_rng(0).random((4000, 128)) < threshold
        ]
        assert np.mean(caught) > 0.97


def test_texts_without_words_and_short_texts_are_compared_too() -> None:
    step = NearDedup(NearDedupStep())
    texts = ["one two", "!!!", "one two", "???", "!!!", "one three", "ONE two"]
    assert step.originals([step.sign(texts)]).tolist() == [0, 1, 0, 3, 1, 5, 6]


@pytest.mark.parametrize("step", ["exact_dedup", "near_dedup"])
def test_copies_of_validation_records_leave_the_training_data(tmp_path: Path, tokenizer: Path, step: str) -> None:
    rng = random.Random(3)
    held_out, others = sentence(rng), [sentence(rng) for _ in range(3)]
    train = write(tmp_path / "train.jsonl", [others[0], held_out, others[1], others[0]])
    validation = write(tmp_path / "validation.jsonl", [held_out, held_out, others[2]])
    given = clm(tokenizer, [step], train=train, validation=validation)
    assert texts_of(given, tmp_path) == [others[0], others[1]]
    assert texts_of(given, tmp_path, "validation") == [held_out, held_out, others[2]]  # is never shortened


def test_order_of_sources_and_steps(tmp_path: Path, tokenizer: Path) -> None:
    """A later step sees what earlier ones have made; sources keep their places."""
    one = write(tmp_path / "one.jsonl", ["a  b", "c"])
    two = write(tmp_path / "two.jsonl", ["a b", "d", "c "])
    sources = [*one, *two]
    after = clm(tokenizer, ["whitespace", "exact_dedup"], train=sources)
    assert [texts_of(after, tmp_path, index=i) for i in (0, 1)] == [["a b", "c"], ["d"]]
    before = clm(tokenizer, ["exact_dedup", "whitespace"], train=sources)
    assert [texts_of(before, tmp_path, index=i) for i in (0, 1)] == [["a b", "c"], ["a b", "d", "c"]]


# --- processes, shards, interruptions --------------------------------------------------------------------------------


STEPS: list[Any] = ["whitespace", "exact_dedup", {"near_dedup": {"threshold": 0.7}}, {"exact_dedup": {"unit": "line"}}]


def dirty(base: Path, files: int = 6) -> list[dict[str, str]]:
    """Files of about 1 kB each, with equal and similar documents among them."""
    rng = random.Random(4)
    known = [sentence(rng) for _ in range(8)]
    for number in range(files):
        texts = []
        for _ in range(5):
            text = rng.choice(known).split()
            if rng.random() < 0.5:
                text[rng.randrange(40)] = rng.choice(WORDS)
            texts.append("  ".join(text) + rng.choice(["", "\n\n\n\nthe end of this page is always the same", " "]))
        write(base / f"part-{number}.jsonl", [*texts, sentence(rng)])
    return [{"path": "part-*.jsonl"}]


def outcome(prepared: Prepared) -> tuple[Any, ...]:
    return all_ids(prepared.train), prepared.report.read, [step.read for step in prepared.report.steps]


@pytest.mark.usefixtures("small_shards")
def test_shards_and_workers_do_not_matter(tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ptft_dist.data.cleaning.stage._CHUNK_RECORDS", 2)
    given = clm(tokenizer, STEPS, train=dirty(tmp_path), cache_dir="one")
    assert len(shards.shards_of(given, tmp_path)) >= 3
    one = prepare(given, tmp_path, workers=1)
    three = prepare(clm(tokenizer, STEPS, train=given_sources(given), cache_dir="three"), tmp_path, workers=3)
    monkeypatch.delenv(shards.SHARD_VARIABLE)
    whole = prepare(clm(tokenizer, STEPS, train=given_sources(given), cache_dir="whole"), tmp_path, workers=1)
    assert outcome(one) == outcome(three) == outcome(whole)
    assert one.fingerprint == three.fingerprint == whole.fingerprint
    assert [step.samples for step in one.report.steps] == [step.samples for step in whole.report.steps]


def given_sources(recipe: Recipe) -> list[dict[str, str]]:
    return [source.model_dump(exclude_unset=True) for source in recipe.data.train]


def killed_after(shards_left: int, base: Path, tokenizer: Path) -> None:
    """Prepare the data, and be killed after this many passes over a shard."""
    run = stage.Stage.run

    def stopped(self: stage.Stage, *arguments: Any) -> Any:
        nonlocal shards_left
        shards_left -= 1
        if shards_left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return run(self, *arguments)

    os.environ[shards.SHARD_VARIABLE] = "0.002"
    stage.Stage.run = stopped  # type: ignore[method-assign]
    prepare(clm(tokenizer, STEPS, train=[{"path": "part-*.jsonl"}]), base, workers=1)


def start(base: Path, tokenizer: Path, passes: int) -> Any:
    process = fork_server().Process(target=killed_after, args=(passes, base, tokenizer))
    process.start()
    return process


def exit_code(process: Any) -> Any:
    process.join()
    return process.exitcode


def test_killed_and_shared_work_ends_in_the_same_records(tmp_path: Path, tokenizer: Path) -> None:
    whole = tmp_path / "whole"
    whole.mkdir()
    expected = prepare(clm(tokenizer, STEPS, train=dirty(whole)), whole, workers=1)
    dirty(tmp_path)
    for passes in (2, 5):  # in the first stage, and in a later one
        assert exit_code(start(tmp_path, tokenizer, passes)) == -signal.SIGKILL
    both = [start(tmp_path, tokenizer, 1000) for _ in range(2)]
    assert [exit_code(process) for process in both] == [0, 0]
    again = prepare(clm(tokenizer, STEPS, train=[{"path": "part-*.jsonl"}]), tmp_path)
    assert again.from_cache
    assert all_ids(again.train) == all_ids(expected.train)
    assert not list((tmp_path / "cache" / "cleaned").glob("*.building-*"))


@pytest.mark.parametrize("given", ["0", "many", "-3", "inf", "nan"])
def test_a_wrong_size_of_shards(tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch, given: str) -> None:
    monkeypatch.setenv(shards.SHARD_VARIABLE, given)
    with pytest.raises(RecipeError, match=f"PTFT_SHARD_MB: '{given}'"):
        prepare(clm(tokenizer, [], train=dirty(tmp_path)), tmp_path)


def test_a_new_step_begins_where_the_others_end(
    tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write(tmp_path / "rows.jsonl", ["a  b", "a b", "c"])
    prepare(clm(tokenizer, ["whitespace", "exact_dedup"], train=source), tmp_path)
    monkeypatch.setattr("ptft_dist.data.sources._read_files", None)  # the sources are not read again
    monkeypatch.setattr("ptft_dist.data.cleaning.comparison.Comparison._build", None)  # nor compared
    got = texts_of(clm(tokenizer, ["whitespace", "exact_dedup", "whitespace"], train=source), tmp_path)
    assert got == ["a b", "c"]


def test_a_tokenizer_learns_from_cleaned_texts(tmp_path: Path) -> None:
    rng = random.Random(5)
    source = write(tmp_path / "rows.jsonl", [*[sentence(rng) for _ in range(30)], *["zzzzzzzz " * 20] * 30])
    training = {"vocab_size": 300, "algorithm": "bpe"}
    raw = prepare(recipe(training, train=source), tmp_path)
    clean = prepare(recipe(training, train=source, steps=["exact_dedup"]), tmp_path)
    assert raw.tokenizer_path != clean.tokenizer_path
    same = tmp_path / "same"
    same.mkdir()
    distinct = write(same / "rows.jsonl", texts_of(recipe(training, train=source, steps=["exact_dedup"]), tmp_path))
    other = prepare(recipe(training, train=distinct), same)
    assert [(clean.tokenizer_path / "tokenizer.json").read_text()] == [
        (other.tokenizer_path / "tokenizer.json").read_text()
    ]


# --- rows, the report, errors ----------------------------------------------------------------------------------------


def labelled(tokenizer: Path, task: str, steps: list[Any], **data: Any) -> Recipe:
    return recipe_class().model_validate(
        {
            "task": task,
            "model": {"config": {"model_type": "bert"}},
            "tokenizer": {"path": str(tokenizer)},
            "data": {"train": [{"path": "rows.jsonl"}], "max_length": 128, "cache_dir": "cache", "steps": steps} | data,
            "batch": {"global_size": 1, "micro_size": 1},
            "train": {"max_steps": 1},
            "run_dir": "run",
        }
    )


def test_conversations_are_cleaned_inside(tmp_path: Path, tokenizer: Path) -> None:
    turns = [{"role": "user", "content": " a   b "}, {"role": "assistant", "content": "c\n\n\n\nd"}]
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": turns, "tools": ["x  y"]}) + "\n")
    given = labelled(tokenizer, "sft", ["whitespace"])
    (record,) = records_of(given, tmp_path, encoder_class("sft")).of("train", 0)
    assert [turn["content"] for turn in record.values["messages"]] == ["a b", "c\n\nd"]
    assert record.values["messages"][0]["role"] == "user"
    assert record.values["tools"] == ["x  y"]


def part(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def conversation(user: Any, assistant: Any, **answer: Any) -> dict[str, Any]:
    return {
        "messages": [{"role": "user", "content": user}, {"role": "assistant", "content": assistant, **answer}],
    }


def cleaned(folder: Path, tokenizer: Path, steps: list[Any], rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The values of conversations after the steps."""
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = labelled(tokenizer, "sft", steps)
    return [record.values for record in records_of(given, folder, encoder_class("sft")).of("train", 0)]


def test_text_parts_are_cleaned_as_the_one_text_that_is_learned(tmp_path: Path, tokenizer: Path) -> None:
    row = conversation([part("write to bob@"), {**part("example.com "), "note": 1}], [part("a "), part(" b")])
    (found,) = cleaned(tmp_path, tokenizer, ["pii", "whitespace"], [row])
    assert [turn["content"] for turn in found["messages"]] == [[part("write to <EMAIL>")], [part("a b")]]


def test_text_parts_that_no_step_changes_stay_as_they_are(tmp_path: Path, tokenizer: Path) -> None:
    row = conversation([part("one"), part(" two")], [])
    assert cleaned(tmp_path, tokenizer, ["pii", "exact_dedup", "near_dedup"], [row]) == [row]


def test_the_reasoning_of_a_message_is_cleaned(tmp_path: Path, tokenizer: Path) -> None:
    keys = ("reasoning_content", "reasoning", "thinking")
    row = conversation("hello", "yes", **dict.fromkeys(keys, "mail  bob@example.com"))
    (found,) = cleaned(tmp_path, tokenizer, ["pii"], [row])
    assert [found["messages"][1][key] for key in keys] == ["mail  <EMAIL>"] * 3


def test_text_parts_count_for_steps_that_only_drop(tmp_path: Path, tokenizer: Path) -> None:
    (tmp_path / "benchmark.txt").write_text("one two three four five six seven eight nine")
    leaked = conversation([part("one two three four five "), part("six seven eight nine")], "ten")
    other = conversation([part("something else")], "ten")
    steps = [{"decontaminate": {"files": ["benchmark.txt"]}}]
    assert cleaned(tmp_path, tokenizer, steps, [leaked, other]) == [other]


@pytest.mark.parametrize("step", ["exact_dedup", "near_dedup"])
def test_text_parts_are_compared_like_texts(tmp_path: Path, tokenizer: Path, step: str) -> None:
    texts = ["one two three", "four five six", "one two three"]
    rows = [conversation([part(text[:5]), part(text[5:])], [part("yes")]) for text in texts]
    assert cleaned(tmp_path, tokenizer, [step], [*rows, conversation(texts[1], "yes")]) == rows[:2]


def test_repeated_lines_in_text_parts_are_removed(tmp_path: Path, tokenizer: Path) -> None:
    line = "this line of a text is long enough to be compared"
    rows = [conversation([part(f"{name}\n{line}\n"), part("end")], "yes") for name in ("first", "second")]
    found = cleaned(tmp_path, tokenizer, [{"exact_dedup": {"unit": "line"}}], rows)
    assert found == [rows[0], conversation([part("second\nend")], "yes")]


@pytest.mark.parametrize("step", ["exact_dedup", "near_dedup"])
def test_conversations_with_other_tool_calls_are_no_duplicates(tmp_path: Path, tokenizer: Path, step: str) -> None:
    def calling(city: str) -> dict[str, Any]:
        call = {"type": "function", "function": {"name": "weather", "arguments": {"city": city}}}
        return conversation("what is the weather", "", tool_calls=[call])

    rows = [calling(city) for city in ("paris", "rome", "paris", "oslo")]
    assert cleaned(tmp_path, tokenizer, [step], rows) == [rows[0], rows[1], rows[3]]


def test_relations_of_one_text_are_no_duplicates(tmp_path: Path) -> None:
    """Rows with the same text and other entities are other examples."""
    spans = [([0, 3], [8, 11]), ([8, 11], [0, 3]), ([0, 3], [8, 11])]
    rows = [{"text": "Ann and Bob", "label": f"r{i}", "head": h, "tail": t} for i, (h, t) in enumerate(spans)]
    raw = json.loads(write_tiny(tmp_path, "classification").read_text())
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    raw["data"] |= {"train": [{"path": "rows.jsonl"}], "steps": ["exact_dedup"], "cache_dir": "cache"}
    raw["classification"] = {"entities": True}
    given = recipe_class().model_validate(raw)
    found = records_of(given, tmp_path, encoder_class("classification")).of("train", 0)
    assert [record.values["label"] for record in found] == ["r0", "r1"]
    raw["data"]["steps"] = ["near_dedup"]
    with pytest.raises(ValueError, match="near_dedup compares texts only, and rows of one text differ in head, tail"):
        recipe_class().model_validate(raw)


@pytest.mark.parametrize("step", ["exact_dedup", "near_dedup"])
def test_nothing_is_left_to_compare(tmp_path: Path, tokenizer: Path, step: str) -> None:
    """The step before drops all records."""
    given = clm(
        tokenizer, [{"language": {"keep": ["zh"]}}, step], train=write(tmp_path / "rows.jsonl", ["an English text"])
    )
    assert texts_of(given, tmp_path) == []


@pytest.mark.parametrize("step", ["exact_dedup", "near_dedup"])
def test_rows_without_text_are_not_compared(tmp_path: Path, tokenizer: Path, step: str) -> None:
    """Their content is what no step reads, so nothing says that they are equal."""
    empty = [conversation([{"type": "image", "image": name}], " ") for name in ("one", "two")]
    rows = [empty[0], conversation("a", "b"), empty[1], conversation("a", "b")]
    assert cleaned(tmp_path, tokenizer, [step], rows) == [empty[0], rows[1], empty[1]]


def test_bad_rows_are_reported_with_their_place(tmp_path: Path, tokenizer: Path) -> None:
    rows = [
        {"text": "a  b", "label": "y"},
        {"text": "a", "label": "x"},
        {"text": 5, "label": "x"},
        {"text": "c", "label": None},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError) as caught:
        prepare(labelled(tokenizer, "classification", ["whitespace", "exact_dedup"]), tmp_path)
    assert "rows.jsonl:3" in str(caught.value)
    assert "rows.jsonl:4" in str(caught.value)


def test_a_mapped_column_that_no_file_has_is_refused(tmp_path: Path, tokenizer: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps({"text": "a", "label": "x"}) + "\n")
    source = [{"path": "rows.jsonl", "fields": {"text": "body"}}]
    with pytest.raises(DataError, match=r"fields: \{text: body\}"):
        prepare(labelled(tokenizer, "classification", ["whitespace"], train=source), tmp_path)


@pytest.mark.parametrize("task", ["token_classification", "question_answering"])
@pytest.mark.parametrize("step", ["unicode", {"exact_dedup": {"unit": "line"}}, {"custom": {"function": "a.b"}}])
def test_steps_that_change_texts_are_refused_where_answers_are_positions(tokenizer: Path, task: str, step: Any) -> None:
    with pytest.raises(ValueError, match="changes texts, which task"):
        labelled(tokenizer, task, [step])
    labelled(tokenizer, task, ["exact_dedup", "near_dedup", {"language": {"keep": ["en"]}}])


@pytest.mark.parametrize("task", ["dpo", "reward", "kto", "seq2seq"])
def test_parts_that_both_answers_have_are_not_removed_from_one(tokenizer: Path, task: str) -> None:
    """Such as the prompt, which chosen and rejected begin with: it would be left in the chosen text only."""
    for unit in ("line", "paragraph"):
        with pytest.raises(ValueError, match=f"exact_dedup drops {unit}s of one text only, and "):
            labelled(tokenizer, task, [{"exact_dedup": {"unit": unit}}])
    labelled(tokenizer, task, ["exact_dedup", "near_dedup"])


def test_the_report_counts_and_shows_what_changed(tmp_path: Path, tokenizer: Path) -> None:
    texts = ["a  b", "a b", "c", "c", " d "]
    given = clm(tokenizer, ["whitespace", "exact_dedup"], train=write(tmp_path / "rows.jsonl", texts))
    report = prepare(given, tmp_path).report
    assert report.read == 5
    whitespace, dedup = report.steps
    assert (whitespace.name, whitespace.read, whitespace.changed) == ("whitespace", 5, 2)
    assert whitespace.samples["changed"][0] == (f"{tmp_path / 'rows.jsonl'}:1", "a  b", "a b")
    assert (dedup.read, dedup.dropped["duplicate"].times) == (5, 2)
    assert [(sample.before, sample.after) for sample in dedup.samples["duplicate"]] == [("a b", "a b"), ("c", "c")]
    assert report.train.examples == 3
    shown = describe(report)
    assert "steps:       whitespace of 5: changed 2\n" in shown
    assert "             exact_dedup of 5: dropped 2 (2 x duplicate)\n" in shown


def test_a_value_that_cannot_be_stored_is_named(tmp_path: Path, tokenizer: Path) -> None:
    row = {"text": "a  b", "day": datetime.date(2024, 1, 1)}
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "rows.parquet")
    given = labelled(tokenizer, "sft", ["whitespace"], train=[{"path": "rows.parquet"}])
    with pytest.raises(DataError, match=r"rows.parquet#0: data.steps: .*'day' .*type date.*Leave its column out"):
        list(records_of(given, tmp_path, encoder_class("sft")).of("train", 0))


def test_damaged_records_are_named(tmp_path: Path, tokenizer: Path) -> None:
    given = clm(tokenizer, ["whitespace"], train=write(tmp_path / "rows.jsonl", ["a  b", "c"]))
    texts_of(given, tmp_path)
    (file,) = (tmp_path / "cache" / "cleaned").glob("*/records.jsonl.zst")
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(DataError, match="damaged"):
        texts_of(given, tmp_path)


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        (["unicod"], "did you mean unicode?"),
        ([{"quality": {"rules": ["c4"], "min_words": 5}}], "min_words: has no effect here: it needs gopher in rules"),
        ([{"quality": {"min_words": 9, "max_words": 5}}], "quality.min_words: 9 is more than max_words (5)"),
        ([{"unicode": {}, "html": {}}], "exactly one of"),
        ([{"exact_dedup": {"unit": "word"}}], "one of document, paragraph, line"),
        ([{"exact_dedup": {"min_characters": 9}}], "needs unit: paragraph or line"),
        ([{"near_dedup": {"threshold": 1.5}}], "below 1"),
        ([{"language": {}}], "exactly one of keep, drop"),
        ([{"custom": {"function": "nodots"}}], "custom.function"),
    ],
)
def test_wrong_settings(tmp_path: Path, steps: list[Any], message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe("clm", [f"data.steps={json.dumps(steps)}", f"run_dir={tmp_path}"])
    assert message in str(caught.value)


# --- shards without steps --------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("small_shards")
@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("split", ["fraction", "files", "none"])
def test_stores_of_shards_are_merged_to_the_store_of_all(
    tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch, packing: bool, split: str
) -> None:
    source = dirty(tmp_path)
    validation: dict[str, Any] = {"none": None, "fraction": 0.1, "files": [{"path": "part-1.jsonl"}, *source]}
    (tmp_path / "part-9.jsonl").write_text('{"text": "x"}\n{"text": " "}\n')  # a row of one token, and an empty one

    def prepared(cache: str) -> Prepared:
        own = {"train": source, "validation": validation[split], "cache_dir": cache}
        return prepare(recipe(tokenizer, {"packing": packing}, **own), tmp_path)

    one = prepared("one")
    assert not list((tmp_path / "one" / "encoded").glob("*[!k]"))  # only locks remain
    monkeypatch.delenv(shards.SHARD_VARIABLE)
    other = prepared("other")
    assert one.fingerprint == other.fingerprint
    assert one.report.to_dict() | {"seconds": 0} == other.report.to_dict() | {"seconds": 0}
    files = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one" / "stores").rglob("*.*"))
    for file in files:
        if file.name not in ("report.json",) and file.suffix != ".lock":
            assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "other" / file).read_bytes()
    assert sum(file.name == "tokens.bin" for file in files) == (1 if split == "none" else 2)


# --- broken input, full disks, functions of users --------------------------------------------------------------------


@pytest.mark.usefixtures("small_shards")
def test_after_a_broken_file_only_its_shard_is_read_again(
    tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(6)
    whole = b""
    for number in range(3):
        texts = "".join(json.dumps({"text": sentence(rng, 400)}) + "\n" for _ in range(3))
        whole = gzip.compress(texts.encode(), mtime=0)
        (tmp_path / f"part-{number}.jsonl.gz").write_bytes(whole if number < 2 else whole[:-40])
    given = clm(tokenizer, ["whitespace"], train=[{"path": "part-*.jsonl.gz"}])
    with pytest.raises(DataError, match=r"part-2\.jsonl\.gz"):
        prepare(given, tmp_path)
    cleaned = tmp_path / "cache" / "cleaned"
    assert len(list(cleaned.glob("*/records.jsonl.zst"))) == 2
    assert not list(cleaned.glob("*.building-*"))
    (tmp_path / "part-2.jsonl.gz").write_bytes(whole)
    runs: list[Any] = []
    run = stage.Stage.run
    monkeypatch.setattr(stage.Stage, "run", lambda self, *given: (runs.append(given), run(self, *given))[1])
    assert prepare(given, tmp_path).report.read == 9
    assert len(runs) == 1


def test_a_full_disk_leaves_nothing_half_written(
    tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = clm(tokenizer, STEPS, train=dirty(tmp_path))
    for module, name in ((stage.RecordWriter, "close"), (np, "save")):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, full)
            with pytest.raises(PtftError, match="the cache cannot be written"):
                prepare(given, tmp_path)
        assert not list((tmp_path / "cache" / "cleaned").glob("*.building-*"))
    again = prepare(given, tmp_path)
    other = tmp_path / "other"
    other.mkdir()
    assert all_ids(again.train) == all_ids(prepare(clm(tokenizer, STEPS, train=dirty(other)), other).train)


def full(*_: Any, **__: Any) -> None:
    raise OSError(28, "No space left on device")


FUNCTIONS = """
def upper(text):
    return None if "secret" in text else text.upper()

def faulty(text):
    return text[100]
"""


def test_a_function_of_the_user(tmp_path: Path, tokenizer: Path) -> None:
    source = write(tmp_path / "rows.jsonl", ["a b", "a secret", "c"])
    (tmp_path / "mine.py").write_text(FUNCTIONS)
    given = clm(tokenizer, [{"custom": {"function": "mine.upper"}}], train=source)
    assert texts_of(given, tmp_path) == ["A B", "C"]
    (tmp_path / "mine.py").write_text(FUNCTIONS.replace("upper()", "title()"))
    assert texts_of(given, tmp_path) == ["A B", "C"]
    (tmp_path / "mine.py").write_text(FUNCTIONS.replace("text.upper()", "text + '!'"))
    assert texts_of(given, tmp_path) == ["a b!", "c!"]
    faulty = clm(tokenizer, [{"custom": {"function": "mine.faulty"}}], train=source)
    with pytest.raises(IndexError) as caught:
        texts_of(faulty, tmp_path)
    assert caught.value.__notes__ == [f"{tmp_path / 'rows.jsonl'}:1: in the step custom of data.steps"]


def test_many_small_files_are_a_few_shards(tmp_path: Path, tokenizer: Path) -> None:
    folder = tmp_path / "files"
    folder.mkdir()
    for number in range(2000):
        (folder / f"{number:05}.txt").write_text(f"document {number % 50}")
    given = clm(tokenizer, ["exact_dedup"], train=[{"path": "files/*.txt"}])
    assert len(texts_of(given, tmp_path)) == 50
    assert len(list((tmp_path / "cache" / "cleaned").glob("*/records.jsonl.zst"))) == 2  # before and after the step
