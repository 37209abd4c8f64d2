"""The built-in data set of functions: each column is correct, and reading is deterministic."""

from __future__ import annotations

import ast
import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from ptft_dist.config.recipe import Source
from ptft_dist.data.builtin import _READ_AHEAD, _columns, _with_other_answers, read_builtin
from ptft_dist.data.formats import Record
from ptft_dist.data.sources import read_records


@pytest.fixture(scope="module")
def records() -> list[Record]:
    return list(itertools.islice(read_builtin("python-functions"), 1500))


def row(source: str) -> dict[str, Any] | None:
    node = ast.parse(source).body[0]
    assert isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    return _columns(node, "function", Path("shop.py"))


SOURCE = '''
@cached
def total(prices, rate=0.2, *, round_to: int = 2):
    """Sum of prices with tax at a rate.

    More of it.
    """
    if not prices:
        raise ValueError
    return sum(prices) * (1 + rate)
'''


def test_one_function_column_by_column() -> None:
    found = row(SOURCE)
    assert found is not None
    text = "def total(prices, rate=0.2, *, round_to: int=2): Sum of prices with tax at a rate."
    assert found["name"] == "total"
    assert found["module"] == "shop"
    assert found["kind"] == "function"
    assert found["summary"] == "Sum of prices with tax at a rate."
    assert found["signature"] == "def total(prices, rate=0.2, *, round_to: int=2)"
    assert found["arguments"] == 3
    assert found["lines"] == 8
    assert found["traits"] == ["arguments", "defaults", "returns", "raises", "decorated"]
    assert found["question"] == "What does total(prices, rate, round_to) do?"
    assert found["answer"] == found["summary"]
    assert [turn["role"] for turn in found["messages"]] == ["user", "assistant"]
    assert [turn["content"] for turn in found["messages"]] == [found["question"], found["answer"]]
    assert found["text"] == found["context"] == text
    assert found["answers"] == {"text": ["prices, rate=0.2, *, round_to: int=2"], "answer_start": [10]}
    assert dict(zip(found["tokens"][:4], found["tags"], strict=False)) == {
        "def": "O",
        "total": "B-FUNCTION",
        "(": "O",
        "prices": "B-ARGUMENT",
    }
    assert text[slice(*found["head"])] == "total"
    assert (found["relation"] == "argument") == (text[slice(*found["tail"])] in ("prices", "rate", "round_to"))


NO_SUMMARY = {
    "no docstring": "def f(a):\n    return a",
    "two words": 'def f(a):\n    """Two words."""',
    "spaces": 'def f(a):\n    """   """',
    "a control character": "def f(a):\n    'a\\0b c d'",
}


@pytest.mark.parametrize("source", NO_SUMMARY.values(), ids=NO_SUMMARY)
def test_what_has_no_summary_is_no_row(source: str) -> None:
    assert row(source) is None


def test_a_function_without_arguments_or_returns() -> None:
    found = row('async def go():\n    """Go to the other side."""\n    return')
    assert found is not None
    assert found["traits"] == []
    assert found["answers"] == {"text": [], "answer_start": []}
    assert found["arguments"] == 0
    assert found["relation"] == "word"
    assert "B-ARGUMENT" not in found["tags"]


def test_the_columns_of_all_rows_agree(records: list[Record]) -> None:
    kinds, relations = set(), []
    for record in records:
        values = record.values
        text = values["text"]
        json.dumps(values)
        assert values["context"] == text == f"{values['signature']}: {values['summary']}"
        assert len(values["summary"].split()) >= 3
        assert len(values["tokens"]) == len(values["tags"])
        assert "".join(values["tokens"]) == "".join(text.split())
        assert [tag for tag in values["tags"] if tag == "B-FUNCTION"] == ["B-FUNCTION"]
        for role in ("head", "tail"):
            start, end = values[role]
            assert 0 <= start < end <= len(text)
        assert text[slice(*values["head"])] == values["name"]
        assert values["tail"][0] >= values["head"][1]
        for answer, start in zip(values["answers"]["text"], values["answers"]["answer_start"], strict=True):
            assert text[start : start + len(answer)] == answer
        path, _, line = record.where.rpartition(":")
        declared = Path(path).read_text(errors="replace").splitlines()[int(line) - 1]
        assert f"def {values['name']}" in declared
        assert values["lines"] >= 2
        kinds.add(values["kind"])
        relations.append(values["relation"])
    assert kinds == {"function", "method"}
    assert 0.3 < relations.count("argument") / len(relations) < 0.7


def test_the_rows_are_the_same_at_each_reading(records: list[Record]) -> None:
    assert list(itertools.islice(read_builtin("python-functions"), 300)) == records[:300]


def test_roles_take_their_columns(records: list[Record]) -> None:
    source = Source(source="python-functions", limit=5, fields={"text": "summary", "label": "kind"})
    found = list(read_records(source, Path(), ("text", "label")))
    assert [r.values["text"] for r in found] == [r.values["summary"] for r in records[:5]]
    assert [r.values["label"] for r in found] == [r.values["kind"] for r in records[:5]]


def test_the_other_answer_is_that_of_another_function(records: list[Record]) -> None:
    answers = {record.values["answer"] for record in records}
    others = [record.values["other_answer"] for record in records]
    assert all(record.values["other_answer"] != record.values["answer"] for record in records)
    assert set(others) - answers == set(others[-_READ_AHEAD:]) - answers  # of functions read ahead
    assert len(set(others)) > len(others) / 3  # not the same few again and again


def test_a_lone_function_after_a_block_gets_an_answer_of_the_block() -> None:
    def record(i: int) -> Record:
        return Record({"answer": f"answer {i % 300}", "signature": f"def f{i}()"}, "f.py")

    found = list(_with_other_answers(record(i) for i in range(_READ_AHEAD + 1)))
    assert len(found) == _READ_AHEAD + 1
    assert found[-1].values["other_answer"] in {f"answer {i}" for i in range(_READ_AHEAD)}
    (alone,) = _with_other_answers([record(0)])
    assert "other_answer" not in alone.values
