""".conll files: one word and its tag per line, an empty line between sentences, errors with file and line."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from ptft_dist.data.formats import read_file
from ptft_dist.errors import DataError

Sentence = tuple[list[str], list[str], int]


def read(path: Path, text: str | bytes) -> list[Sentence]:
    """(tokens, tags, line of the first word)."""
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    records = read_file(path, columns=(), unit="file")
    return [(r.values["tokens"], r.values["tags"], int(r.where.removeprefix(f"{path}:"))) for r in records]


@pytest.mark.parametrize(
    ("text", "sentences"),
    {
        "tabs": ("New\tB-LOC\nYork\tI-LOC\n\nis\tO\n", [(["New", "York"], ["B-LOC", "I-LOC"], 1), (["is"], ["O"], 4)]),
        "four columns": ("EU NNP B-NP B-ORG\nrejects VBZ B-VP O\n", [(["EU", "rejects"], ["B-ORG", "O"], 1)]),
        "runs of spaces": ("EU   B-ORG \n  is  O\n", [(["EU", "is"], ["B-ORG", "O"], 1)]),
        "no newline at the end": ("a\tO\nb\tO", [(["a", "b"], ["O", "O"], 1)]),
        "many empty lines": ("\n\n \na\tO\n\n\t\n\nb\tO\n\n\n", [(["a"], ["O"], 4), (["b"], ["O"], 8)]),
        "Windows": ("\ufeffa\tO\r\nb\tB-X\r\n\r\nc\tO\r\n", [(["a", "b"], ["O", "B-X"], 1), (["c"], ["O"], 4)]),
        "document starts": (
            "-DOCSTART- -X- -X- O\n\na X X O\n-DOCSTART-\nb X X O\n",
            [(["a"], ["O"], 3), (["b"], ["O"], 5)],
        ),
        "a hash is a word": ("#\tO\nx\tO\n", [(["#", "x"], ["O", "O"], 1)]),
        "comments": (
            "# sent_id = 1\n# text = a b\na\tO\n# note = c\nb\tO\n\n# x = y\n\n# sent_id = 2\nc\tO\n",
            [(["a", "b"], ["O", "O"], 3), (["c"], ["O"], 10)],
        ),
        "a hash is a word between others": ("a O\n# O\n#\t=\tO\n#x = O\n", [(["a", "#", "#", "#x"], ["O"] * 4, 1)]),
        "a word with a space": ("New York\tB-LOC\n", [(["New York"], ["B-LOC"], 1)]),
        "strange spaces are words": (
            "\u00a0\tO\n\u3000\tO\na\u00a0b O\n",
            [(["\u00a0", "\u3000", "a\u00a0b"], ["O"] * 3, 1)],
        ),
        "a line separator is no line": ("a\u2028b\tO\n", [(["a\u2028b"], ["O"], 1)]),
        "Chinese": ("我\tB-PER\n们\tI-PER\n", [(["我", "们"], ["B-PER", "I-PER"], 1)]),
    }.values(),
)
def test_sentences(tmp_path: Path, text: str, sentences: list[Sentence]) -> None:
    assert read(tmp_path / "x.conll", text) == sentences
    assert read(tmp_path / "x.conll.gz", gzip.compress(text.encode())) == sentences


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a\tO\nword\n", ":2: a line needs a word and a tag"),
        ("a\tO\n\tO\n", ":2: a line needs a word and a tag"),
        ("a\tO\nb\t\n", ":2: a line needs a word and a tag"),
        ("a O\n\nb O\n  O\n", ":4: a line needs a word and a tag"),
        ("\n\n", "the file has no documents"),
    ],
)
def test_broken_lines_are_named(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(DataError) as caught:
        read(tmp_path / "x.conll", text)
    assert f"{tmp_path}/x.conll" in str(caught.value)
    assert says in str(caught.value)
