"""Encoding in several processes: the same bytes as in one process, and messages about failures."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from prepare_support import prepare
from tiny import TINY, write_tiny

from ptft_dist.api import load_recipe
from ptft_dist.data import workers
from ptft_dist.data.row_encoder import RowEncoder
from ptft_dist.data.workers import in_processes, in_threads, worker_count
from ptft_dist.errors import DataError, PtftError, RecipeError

ROW_TASKS = [task for task in TINY if task not in ("mlm_nsp", "plm", "span_corruption")]


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes are started for 160 rows, and each gets several chunks."""
    monkeypatch.setattr(workers, "_SMALL", 1)
    monkeypatch.setattr(RowEncoder, "chunk_records", 7)


@pytest.fixture
def forks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Process ids of all workers."""
    found: list[int] = []
    fork = workers._fork

    def counted(*arguments: Any) -> Any:
        worker = fork(*arguments)
        found.append(worker.pid)
        return worker

    monkeypatch.setattr(workers, "_fork", counted)
    return found


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != "report.json"
    }


BAD_ROWS = {
    "classification": ({"text": "red cat"}, {"text": " ", "label": "animal"}),
    "sft": ({"instruction": "a", "output": "b"}, {"messages": []}),
    "token_classification": ({"tokens": [], "tags": []}, {"tokens": ["a"], "tags": []}),
}
"""One that becomes a bad row or is dropped, wherever it stands, and one more."""


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("task", ROW_TASKS)
def test_the_same_bytes_and_report_on_any_number_of_workers(tmp_path: Path, task: str, forks: list[int]) -> None:
    augment = [{"method": "swap", "copies": 2}] if task == "classification" else []
    path = write_tiny(tmp_path, task, data={"bad_rows": "skip", "augment": augment})
    rows = (tmp_path / "rows.jsonl").read_text().splitlines()
    for at, bad in zip((40, 130), BAD_ROWS.get(task, ()), strict=False):
        rows.insert(at, json.dumps(bad))
    (tmp_path / "rows.jsonl").write_text("\n".join(rows) + "\n")

    found = {}
    for count in (1, 2, 3):
        loaded = load_recipe(str(path), [f"data.cache_dir=cache{count}"])
        prepared = prepare(loaded.recipe, tmp_path, workers=count)
        report = prepared.report.to_dict() | {"seconds": None, "tokenizer": None}
        found[count] = (prepared.fingerprint, files(prepared.train.path.parent), report)
    assert len(forks) == 2 + 3
    assert "train/input_ids.bin" in found[1][1]
    assert found[2] == found[1]
    assert found[3] == found[1]
    report = found[1][2]
    if task in BAD_ROWS:
        dropped = sum(times for times, _ in report["dropped"].values())
        assert report["bad_rows"]["count"] + dropped == 2
    if task == "sft":  # found where the rows are encoded, and sent back
        assert isinstance(report["survey"]["end_of_turn"], int)
    if task == "classification":
        assert report["survey"]["rows"] == report["train"]["examples"] > 160


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("task", ["token_classification", "question_answering"])
def test_validation_examples_are_numbered_by_their_row(tmp_path: Path, task: str) -> None:
    """Pieces of one row share a number; numbers rise in reading order, over both sides."""
    loaded = load_recipe(str(write_tiny(tmp_path, task)), [f"data.cache_dir={tmp_path}/cache"])
    store = prepare(loaded.recipe, tmp_path, workers=2).validation
    assert store is not None
    key = {"token_classification": "sentence", "question_answering": "question"}[task]
    numbers = [store.row(i).meta[key] for i in range(len(store))]
    assert numbers == sorted(numbers)
    assert 160 >= numbers[-1] > len(set(numbers)) > 5  # training rows have the numbers in between
    assert next(iter(store.row(0).meta)) == key


@pytest.mark.usefixtures("small_chunks")
def test_a_bad_row_is_named_as_without_workers(tmp_path: Path) -> None:
    path = write_tiny(tmp_path, "classification")
    rows = (tmp_path / "rows.jsonl").read_text().splitlines()
    rows[99] = json.dumps({"text": 7, "label": "animal"})
    rows[150] = json.dumps({"text": "a", "label": None})
    (tmp_path / "rows.jsonl").write_text("\n".join(rows) + "\n")
    loaded = load_recipe(str(path), [f"data.cache_dir={tmp_path}/cache", "tokenizer.train.vocab_size=300"])
    messages = []
    for count in (1, 3):
        with pytest.raises(DataError) as refused:
            prepare(loaded.recipe, tmp_path, workers=count)
        messages.append(str(refused.value))
    assert messages[0] == messages[1]
    assert messages[0].splitlines()[0].startswith(f"{tmp_path}/rows.jsonl:100: ")


# --- the pool ---------------------------------------------------------------------------------------------------------


def numbers(count: int) -> Iterator[int]:
    return iter(range(count))


@pytest.mark.parametrize("count", [1, 2, 5])
def test_results_come_in_order_from_several_processes(count: int) -> None:
    found = list(in_processes(numbers(50), lambda n: (n * n, os.getpid()), count))
    assert [(n, square) for n, (square, _) in found] == [(n, n * n) for n in range(50)]
    elsewhere = {pid for _, (_, pid) in found} - {os.getpid()}
    assert (len(elsewhere) > 0) == (count > 1)


def test_short_streams_start_no_process() -> None:
    assert {pid for _, pid in in_processes(numbers(workers._SMALL), lambda _: os.getpid(), 4)} == {os.getpid()}


def test_memory_is_bounded() -> None:
    """No more chunks are taken from the source than workers can soon encode."""
    taken = []

    def source() -> Iterator[int]:
        for n in range(200):
            taken.append(n)
            yield n

    for done, (n, _) in enumerate(in_processes(source(), lambda n: n, 2)):
        assert n == done
        assert len(taken) - done <= 2 * workers._AHEAD + 2


@pytest.mark.parametrize("runner", [lambda s, w: in_processes(s, w, 2), in_threads])
@pytest.mark.parametrize("error", [DataError("rows.jsonl:3: is wrong"), ValueError("a bug")])
def test_an_error_comes_back_as_it_is(runner: Any, error: Exception) -> None:
    def work(n: int) -> int:
        if n == 30:
            raise error
        return n

    seen, before = [], psutil.Process().children()
    with pytest.raises(type(error), match=str(error)) as caught:
        seen.extend(n for n, _ in runner(numbers(50), work))
    assert type(caught.value) is type(error)
    if isinstance(error, ValueError) and caught.value is not error:
        assert "in work" in caught.value.__notes__[0]  # where it happened in the other process
    assert psutil.Process().children() == before  # no worker is left


def test_a_killed_worker_is_explained() -> None:
    def work(n: int) -> int:
        if n == 30:
            os.kill(os.getpid(), signal.SIGKILL)
        return n

    with pytest.raises(PtftError, match=r"encoding process \(process id \d+\) was killed.*PTFT_ENCODE_WORKERS"):
        list(in_processes(numbers(50), work, 2))


def test_workers_end_when_their_parent_is_killed() -> None:
    reader, writer = os.pipe()
    parent = os.fork()
    if parent == 0:
        os.close(reader)

        def work(n: int) -> int:
            os.write(writer, f"{os.getpid()}\n".encode())
            return n

        for n, _ in in_processes(numbers(1000), work, 2):
            if n == 20:
                os.kill(os.getpid(), signal.SIGKILL)
        os._exit(0)
    os.close(writer)
    os.waitpid(parent, 0)
    with os.fdopen(reader) as pipe:  # its end is reached when the last worker that could write is gone
        assert len(set(pipe.read().split())) == 3


def test_the_number_of_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(workers.WORKERS_VARIABLE, raising=False)
    assert worker_count() == len(os.sched_getaffinity(0))
    monkeypatch.setenv(workers.WORKERS_VARIABLE, "3")
    assert worker_count() == 3
    for wrong in ("0", "-1", "two", "1.5", ""):
        monkeypatch.setenv(workers.WORKERS_VARIABLE, wrong)
        with pytest.raises(RecipeError, match="PTFT_ENCODE_WORKERS"):
            worker_count()


def test_the_tokenizer_library_keeps_its_threads_here_and_has_none_in_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
    found = {value for _, value in in_processes(numbers(30), lambda _: os.environ.get("TOKENIZERS_PARALLELISM"), 2)}
    assert found == {None, "false"}  # the first chunks are encoded here
    assert "TOKENIZERS_PARALLELISM" not in os.environ
