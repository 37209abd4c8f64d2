"""Rows within a JSON object: a list in `data`, or the nested files of SQuAD."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ptft_dist.errors import DataError

_ANSWER = ("text", "answer_start")


def nested_rows(value: dict[str, Any], where: str) -> Iterator[tuple[Any, str]]:
    """The rows of an object with their places, such as `file.json: data[0]`.

    Raises:
        DataError: there is no list `data`, or an article of SQuAD lacks a key.
    """
    rows = value.get("data")
    if not isinstance(rows, list):
        raise DataError(
            f"{where}:1: this is not an array, nor an object with the rows in `data`, such as SQuAD's files. "
            "A .json file must be one array of objects; .jsonl has one per line."
        )
    for number, row in enumerate(rows):
        place = f"{where}: data[{number}]"
        if isinstance(row, dict) and isinstance(row.get("paragraphs"), list):
            yield from _questions(row["paragraphs"], f"{place}.paragraphs")
        else:
            yield row, place


def _questions(paragraphs: list[Any], where: str) -> Iterator[tuple[dict[str, Any], str]]:
    """The questions of an article with their context, as SQuAD's flat format has them (Rajpurkar et al. 2016, 2018)."""
    for i, paragraph in enumerate(paragraphs):
        context = _key(paragraph, "context", f"{where}[{i}]")
        for j, question in enumerate(_key(paragraph, "qas", f"{where}[{i}]")):
            here = f"{where}[{i}].qas[{j}]"
            answers = _key(question, "answers", here)
            columns = {name: [_key(answer, name, f"{here}.answers") for answer in answers] for name in _ANSWER}
            values = {key: value for key, value in question.items() if key != "plausible_answers"}
            yield {**values, "context": context, "answers": columns}, here


def _key(values: Any, key: str, where: str) -> Any:
    if not isinstance(values, dict) or key not in values:
        raise DataError(f"{where}: there is no {key!r}, which SQuAD's nested format has here. Correct the file.")
    return values[key]
