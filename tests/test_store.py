"""The token store against lists: rows, lengths and document starts computed by loops over plain Python lists."""

from __future__ import annotations

import json
import pickle
import random
import time
from pathlib import Path

import numpy as np
import pytest

from ptft_dist.data.store import StoreWriter, TokenStore
from ptft_dist.errors import DataError


def write(path: Path, documents: list[list[int]], max_length: int, packing: bool, vocab_size: int = 100) -> TokenStore:
    writer = StoreWriter(path, vocab_size=vocab_size, max_length=max_length, packing=packing)
    for ids in documents:
        writer.add(ids)
    writer.close()
    return TokenStore.open(path)


def naive_packed(documents: list[list[int]], max_length: int) -> list[tuple[list[int], list[int]]]:
    """(ids, document starts) of each row, token by token."""
    stream = [(token, position == 0) for ids in documents for position, token in enumerate(ids)]
    rows = []
    for begin in range(0, len(stream), max_length):
        piece = stream[begin : begin + max_length]
        if len(piece) > 1:
            starts = [p for p, (_, is_start) in enumerate(piece) if is_start or p == 0]
            rows.append(([token for token, _ in piece], starts))
    return rows


def naive_unpacked(documents: list[list[int]], max_length: int) -> list[tuple[list[int], list[int]]]:
    rows = []
    for ids in documents:
        rest = ids
        while rest:
            piece, rest = rest[:max_length], rest[max_length:]
            if len(piece) > 1:
                rows.append((piece, [0]))
    return rows


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("seed", range(20))
def test_rows_are_those_of_a_naive_loop(tmp_path: Path, packing: bool, seed: int) -> None:
    rng = random.Random(seed)
    max_length = rng.randint(2, 9)
    documents = [[rng.randrange(100) for _ in range(rng.randint(1, 25))] for _ in range(rng.randint(1, 12))]
    expected = (naive_packed if packing else naive_unpacked)(documents, max_length)

    store = write(tmp_path / "store", documents, max_length, packing)

    assert [(r.input_ids.tolist(), r.document_starts.tolist()) for r in map(store.row, range(len(store)))] == expected
    assert store.lengths(np.arange(len(store))).tolist() == [len(ids) for ids, _ in expected]
    assert store.tokens == sum(len(ids) for ids, _ in expected)
    assert store.documents == len(documents)
    assert (store.max_length, store.packing) == (max_length, packing)


def test_a_hand_packed_example(tmp_path: Path) -> None:
    store = write(tmp_path / "store", [[1, 2, 3], [4, 5], [6, 7, 8, 9]], max_length=4, packing=True)
    assert len(store) == 2  # 1 2 3 4 | 5 6 7 8, and the lonely 9 is left out
    assert store.row(0).input_ids.tolist() == [1, 2, 3, 4]
    assert store.row(0).document_starts.tolist() == [0, 3]
    assert store.row(1).input_ids.tolist() == [5, 6, 7, 8]
    assert store.row(1).document_starts.tolist() == [0, 1]
    assert store.tokens == 8
    assert json.loads((tmp_path / "store/store.json").read_text())["dropped_tokens"] == 1
    assert {store.row(0).input_ids.dtype, store.row(0).document_starts.dtype, store.lengths(np.array([1])).dtype} == {
        np.dtype(np.int64)
    }


def test_lengths_take_any_order_and_shape(tmp_path: Path) -> None:
    store = write(tmp_path / "store", [[1] * 10], max_length=4, packing=True)
    assert store.lengths(np.array([[2, 0], [1, 2]])).tolist() == [[2, 4], [4, 2]]
    assert store.lengths(np.array([], dtype=np.int64)).tolist() == []


@pytest.mark.parametrize("packing", [True, False])
def test_no_such_row(tmp_path: Path, packing: bool) -> None:
    store = write(tmp_path / "store", [[1] * 10], max_length=4, packing=packing)
    for index in (-1, len(store)):
        with pytest.raises(IndexError):
            store.row(index)
        with pytest.raises(IndexError):
            store.lengths(np.array([0, index]))


@pytest.mark.parametrize(("vocab_size", "bytes_per_token"), [(65_536, 2), (65_537, 4)])
def test_the_smallest_data_type_that_holds_the_vocabulary(
    tmp_path: Path, vocab_size: int, bytes_per_token: int
) -> None:
    ids = [0, vocab_size - 1, 7]
    store = write(tmp_path / "store", [ids], max_length=8, packing=True, vocab_size=vocab_size)
    assert store.row(0).input_ids.tolist() == ids
    assert (tmp_path / "store/tokens.bin").stat().st_size == 3 * bytes_per_token


@pytest.mark.parametrize("ids", [[65_536], np.array([65_536]), [-1], []])
def test_ids_that_would_wrap_around_are_refused(tmp_path: Path, ids: list[int] | np.ndarray) -> None:
    writer = StoreWriter(tmp_path / "store", vocab_size=100, max_length=4, packing=True)
    with pytest.raises(ValueError, match="token"):  # noqa: PT012  # the one without ids at once, the others in their block
        writer.add(ids)
        writer.close()


def test_a_pickled_store_holds_no_tokens(tmp_path: Path) -> None:
    store = write(tmp_path / "store", [list(range(100)) * 1000], max_length=16, packing=True)
    data = pickle.dumps(store)
    assert len(data) < 500
    assert pickle.loads(data).row(3).input_ids.tolist() == store.row(3).input_ids.tolist()


def test_a_row_can_be_written_to(tmp_path: Path) -> None:
    """Collators mask in place; the map underneath is read-only."""
    store = write(tmp_path / "store", [[1] * 8], max_length=4, packing=True)
    store.row(0).input_ids[0] = 9
    assert store.row(0).input_ids.tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize("name", ["tokens.bin", "documents.npy", "rows.npy"])
@pytest.mark.parametrize("damage", ["short", "missing"])
def test_a_damaged_store_is_refused(tmp_path: Path, name: str, damage: str) -> None:
    write(tmp_path / "prepared/train", [[1, 2, 3]], max_length=4, packing=False)
    file = tmp_path / "prepared/train" / name
    if damage == "short":
        file.write_bytes(file.read_bytes()[:-1])
    else:
        file.unlink()
    with pytest.raises(DataError, match=name) as caught:
        TokenStore.open(tmp_path / "prepared/train")
    assert str(caught.value).startswith(str(tmp_path / "prepared/train"))
    assert caught.value.exit_code == 3


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"version": 999}', "{"])
def test_an_unfinished_store_is_refused(tmp_path: Path, text: str) -> None:
    write(tmp_path / "store", [[1, 2, 3]], max_length=4, packing=True)
    (tmp_path / "store/store.json").write_text(text)
    with pytest.raises(DataError, match="damaged"):
        TokenStore.open(tmp_path / "store")


@pytest.mark.parametrize("packing", [True, False])
def test_opening_and_seeking_do_not_depend_on_the_size(tmp_path: Path, packing: bool) -> None:
    writer = StoreWriter(tmp_path / "store", vocab_size=100, max_length=512, packing=packing)
    document = np.arange(1000) % 100
    for _ in range(50_000):
        writer.add(document)
    writer.close()

    started = time.perf_counter()
    store = TokenStore.open(tmp_path / "store")
    row = store.row(len(store) - 1)
    lengths = store.lengths(np.arange(len(store) - 1000, len(store)))
    assert time.perf_counter() - started < 0.1  # a millisecond in truth; reading the 100 MB would show

    assert store.tokens == 50_000_000
    assert row.input_ids[-1] == 99
    assert lengths[-1] == len(row.input_ids)
