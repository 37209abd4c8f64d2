"""The example store: reading returns what was written, packing loses nothing, and damage is reported."""

from __future__ import annotations

import json
import pickle
import random
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ptft_dist.data import example_store
from ptft_dist.data.example_store import META, ExampleStore, ExampleWriter, best_fit, meta_bytes, token_dtype
from ptft_dist.errors import DataError

COLUMNS = {"input_ids": "<u2", "labels": "<i4", "score": "<f4", "kind": "u1", META: "u1"}


def examples(count: int, longest: int = 20, seed: int = 0) -> list[dict[str, Any]]:
    """Ragged rows; some columns empty, and one number where another has a list."""
    chance = random.Random(seed)
    made = []
    for i in range(count):
        length = chance.randint(1, longest)
        made.append(
            {
                "input_ids": [chance.randrange(2**16) for _ in range(length)],
                "labels": [chance.randrange(-(2**31), 2**31) for _ in range(chance.randint(0, 3))],
                "score": i / 4,
                "kind": [i % 256],
                META: meta_bytes({"text": f"näme {i} 猫", "n": i}),
            }
        )
    return made


def written(path: Path, rows: list[dict[str, Any]], **settings: Any) -> ExampleStore:
    writer = ExampleWriter(path, settings.pop("columns", COLUMNS), **{"max_length": 32} | settings)
    for row in rows:
        writer.add(row)
    writer.close()
    return ExampleStore.open(path)


@pytest.mark.parametrize("block", [1, 7, 2**16])
def test_what_is_written_is_what_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(example_store, "_BLOCK", block)
    made = examples(50)
    store = written(tmp_path / "store", made)
    assert len(store) == store.examples == 50
    assert store.tokens == sum(len(row["input_ids"]) for row in made)
    again = pickle.loads(pickle.dumps(store))
    for i, expected in enumerate(made):
        for row in (store.row(i), again.row(i)):
            assert row.input_ids.tolist() == expected["input_ids"]
            assert row.input_ids.dtype == np.int64
            assert row.columns["labels"].tolist() == expected["labels"]
            assert row.columns["score"].tolist() == [expected["score"]]
            assert row.columns["kind"].tolist() == expected["kind"]
            assert row.meta == {"text": f"näme {i} 猫", "n": i}
            assert row.document_starts.tolist() == [0]
    order = np.array([[3, 1], [49, 3]])
    assert store.lengths(order).tolist() == [[len(made[i]["input_ids"]) for i in pair] for pair in order]
    for wrong in (-1, 50):
        with pytest.raises(IndexError):
            store.row(wrong)
        with pytest.raises(IndexError):
            store.lengths(np.array([0, wrong]))


def test_a_length_may_be_that_of_several_columns(tmp_path: Path) -> None:
    made = [row | {"labels": [1] * (i % 3)} for i, row in enumerate(examples(9))]
    store = written(tmp_path / "store", made, length_columns=("input_ids", "labels"))
    expected = [len(row["input_ids"]) + i % 3 for i, row in enumerate(made)]
    assert store.lengths(np.arange(9)).tolist() == expected
    assert store.tokens == sum(expected)
    longest = sorted(expected, reverse=True)[:4]
    found = [len(row.input_ids) + len(row.columns["labels"]) for row in store.largest(4)]
    assert sorted(found, reverse=True) == longest
    assert len(store.largest(12)) == 12  # more than there are


def test_packed_rows_hold_every_example_once(tmp_path: Path) -> None:
    made = examples(200)
    store = written(tmp_path / "store", made, packing=True)
    assert store.examples == 200
    assert len(store) < 200
    lengths = store.lengths(np.arange(len(store)))
    assert lengths.max() <= 32
    assert lengths.sum() == store.tokens == sum(len(row["input_ids"]) for row in made)
    seen = []
    for i in range(len(store)):
        row = store.row(i)
        assert len(row.input_ids) == lengths[i]
        starts = [*row.document_starts.tolist(), len(row.input_ids)]
        for a, b in pairwise(starts):
            seen.append(tuple(row.input_ids[a:b].tolist()))
    assert sorted(seen) == sorted(tuple(row["input_ids"]) for row in made)
    first = store.row(0)
    scores = {tuple(row["input_ids"]): row["score"] for row in made}
    ends = [*first.document_starts.tolist(), len(first.input_ids)]
    pieces = [tuple(first.input_ids[a:b].tolist()) for a, b in pairwise(ends)]
    assert first.columns["score"].tolist() == [scores[piece] for piece in pieces]  # end to end, in the same order


@pytest.mark.parametrize("seed", range(20))
def test_best_fit_never_overflows_and_never_loses(seed: int) -> None:
    chance = random.Random(seed)
    capacity = chance.randint(1, 60)
    lengths = np.array([chance.randint(1, capacity + 3) for _ in range(chance.randint(0, 120))], np.int64)
    rows = best_fit(lengths, capacity)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    for row in rows:
        assert lengths[row].sum() <= capacity or len(row) == 1
    assert rows == _naive_best_fit(lengths.tolist(), capacity)


def _naive_best_fit(lengths: list[int], capacity: int) -> list[list[int]]:
    """As few words as possible: among the rows with room the fullest, of equal ones the one that became so last."""
    rows: list[list[int]] = []
    free: list[int] = []
    stamps: list[int] = []
    for clock, i in enumerate(sorted(range(len(lengths)), key=lambda i: -lengths[i])):
        fits = [r for r in range(len(rows)) if free[r] >= lengths[i] and free[r] > 0]
        if fits:
            row = min(fits, key=lambda r: (free[r], -stamps[r]))
        else:
            row = len(rows)
            rows.append([])
            free.append(max(capacity, lengths[i]))
            stamps.append(0)
        rows[row].append(i)
        free[row] -= lengths[i]
        stamps[row] = clock
    return rows


def test_best_fit_wastes_little() -> None:
    chance = random.Random(0)
    lengths = np.array([chance.randint(1, 100) for _ in range(5000)], np.int64)
    assert len(best_fit(lengths, 128)) * 128 < 1.03 * lengths.sum()


def test_an_example_longer_than_a_row_stands_alone(tmp_path: Path) -> None:
    made = examples(6, longest=4)
    made[2]["input_ids"] = list(range(50))
    store = written(tmp_path / "store", made, packing=True)
    long = [store.row(i) for i in range(len(store)) if len(store.row(i).input_ids) > 32]
    assert [row.input_ids.tolist() for row in long] == [list(range(50))]
    assert len(long[0].document_starts) == 1


@pytest.mark.parametrize(
    ("column", "value"),
    [("input_ids", [1, 2**16]), ("input_ids", [-1]), ("labels", [2**31]), ("kind", 256), ("kind", [-1])],
)
def test_a_value_that_does_not_fit_is_refused(tmp_path: Path, column: str, value: Any) -> None:
    writer = ExampleWriter(tmp_path / "store", COLUMNS, max_length=32)
    with pytest.raises(ValueError, match="do not fit into"):
        writer.add(examples(1)[0] | {column: value})


def test_token_ids_of_large_vocabularies_fit(tmp_path: Path) -> None:
    assert [token_dtype(size) for size in (300, 2**16, 2**16 + 1)] == ["<u2", "<u2", "<u4"]
    ids = [0, 2**16, 2**32 - 1]
    store = written(tmp_path / "store", [{"input_ids": ids}], columns={"input_ids": token_dtype(2**17)})
    assert store.row(0).input_ids.tolist() == ids


def test_empty_columns_and_no_examples(tmp_path: Path) -> None:
    """A column in which every example is empty, such as the labels where no row has any."""
    store = written(tmp_path / "store", [row | {"labels": []} for row in examples(3)])
    assert [store.row(i).columns["labels"].tolist() for i in range(3)] == [[], [], []]
    assert len(written(tmp_path / "none", [])) == 0
    assert len(written(tmp_path / "packed", [], packing=True)) == 0


def cut(name: str) -> Callable[[Path], object]:
    return lambda path: (path / name).write_bytes((path / name).read_bytes()[:-2])


def summary(**changes: Any) -> Callable[[Path], object]:
    def change(path: Path) -> None:
        found = json.loads((path / "store.json").read_text())
        (path / "store.json").write_text(json.dumps(found | changes))

    return change


DAMAGE: dict[str, Callable[[Path], object]] = {
    "no summary": lambda path: (path / "store.json").unlink(),
    "half a summary": cut("store.json"),
    "a column cut short": cut("labels.bin"),
    "offsets cut short": cut("input_ids.offsets.npy"),
    "a column gone": lambda path: (path / "score.bin").unlink(),
    "rows cut short": cut("rows.npy"),
    "another version": summary(version=99),
    "a column too many": summary(columns={"input_ids": "<u2", "more": "<u2"}),
    "no files": summary(files=None),
}


@pytest.mark.parametrize("how", DAMAGE)
def test_damage_is_told(tmp_path: Path, how: str) -> None:
    written(tmp_path / "store", examples(5), packing=True)
    DAMAGE[how](tmp_path / "store")
    with pytest.raises(DataError, match=r"store: this token store is damaged .* Delete it and run ptft prepare again"):
        ExampleStore.open(tmp_path / "store")
