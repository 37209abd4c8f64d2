"""Every source format with real files, and every type of invalid file."""

from __future__ import annotations

import gzip
import json
import re
import subprocess
import sys
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import zstandard

from ptft_dist.config.recipe import Recipe, Source
from ptft_dist.data.sources import HashMemo, check_sources, fingerprint_source, read_documents, read_records
from ptft_dist.errors import DataError
from ptft_dist.tasks.registry import recipe_class

TEXTS = ["first", "zwei\nZeilen", 'drei, "mit" Komma\tund Tab', "第四"]


def read(base: Path, path: str, **settings: Any) -> list[tuple[str, str]]:
    """(text, where relative to base)."""
    documents = read_documents(Source(path=path, **settings), base)
    return [(document.text, document.where.removeprefix(f"{base}/")) for document in documents]


def refused(base: Path, path: str, **settings: Any) -> str:
    with pytest.raises(DataError) as caught:
        read(base, path, **settings)
    assert caught.value.exit_code == 3
    return str(caught.value).replace(f"{base}/", "")


def plain(data: bytes) -> bytes:
    return data


def zstd(data: bytes) -> bytes:
    return zstandard.ZstdCompressor().compress(data)


COMPRESSIONS: list[tuple[str, Callable[[bytes], bytes]]] = [("", plain), (".gz", gzip.compress), (".zst", zstd)]
each_compression = pytest.mark.parametrize(("suffix", "compress"), COMPRESSIONS, ids=["plain", "gz", "zst"])


@each_compression
def test_txt_as_one_document(tmp_path: Path, suffix: str, compress: Callable[[bytes], bytes]) -> None:
    text = "a\r\nb\n\n c \n"  # not a byte of it may change
    (tmp_path / f"x.txt{suffix}").write_bytes(compress(text.encode()))
    assert read(tmp_path, f"x.txt{suffix}") == [(text, f"x.txt{suffix}")]


@each_compression
def test_txt_lines_and_paragraphs(tmp_path: Path, suffix: str, compress: Callable[[bytes], bytes]) -> None:
    name = f"x.txt{suffix}"
    (tmp_path / name).write_bytes(compress(b"\none\ntwo\r\n \n\nthree\n\nfour"))
    lines = ["", "one", "two", " ", "", "three", "", "four"]
    assert read(tmp_path, name, document="line") == [(line, f"{name}:{n}") for n, line in enumerate(lines, 1)]
    assert read(tmp_path, name, document="paragraph") == [
        ("one\ntwo", f"{name}:2"),
        ("three", f"{name}:6"),
        ("four", f"{name}:8"),
    ]


@each_compression
def test_jsonl(tmp_path: Path, suffix: str, compress: Callable[[bytes], bytes]) -> None:
    rows = "\n".join(json.dumps({"id": 1, "body": text}) for text in TEXTS[:2]) + "\n\n"
    rows += "\n".join(json.dumps({"body": text}, ensure_ascii=False) for text in TEXTS[2:])
    (tmp_path / f"x.jsonl{suffix}").write_bytes(compress(rows.encode()))
    name = f"x.jsonl{suffix}"
    expected = [(text, f"{name}:{line}") for text, line in zip(TEXTS, (1, 2, 4, 5), strict=True)]
    assert read(tmp_path, name, field="body") == expected


@each_compression
@pytest.mark.parametrize("indent", [None, 1])
def test_json(tmp_path: Path, suffix: str, compress: Callable[[bytes], bytes], indent: int | None) -> None:
    text = "\n" + json.dumps([{"text": text} for text in TEXTS], indent=indent) + "\n"
    (tmp_path / f"x.json{suffix}").write_bytes(compress(text.encode()))
    lines = ["2", "2 (row 2)", "2 (row 3)", "2 (row 4)"] if indent is None else ["3", "6", "9", "12"]
    assert read(tmp_path, f"x.json{suffix}") == [
        (text, f"x.json{suffix}:{line}") for text, line in zip(TEXTS, lines, strict=True)
    ]


@each_compression
def test_csv(tmp_path: Path, suffix: str, compress: Callable[[bytes], bytes]) -> None:
    long = "x" * 200_000  # beyond the csv module's usual limit
    table = f'id,text\r\n1,first\r\n2,"zwei\nZeilen"\r\n\r\n3,"drei, ""mit"" Komma"\r\n4,{long}'
    (tmp_path / f"x.csv{suffix}").write_bytes(compress(table.encode()))
    assert read(tmp_path, f"x.csv{suffix}") == [
        ("first", f"x.csv{suffix}:2"),
        ("zwei\nZeilen", f"x.csv{suffix}:3"),
        ('drei, "mit" Komma', f"x.csv{suffix}:6"),
        (long, f"x.csv{suffix}:7"),
    ]


@each_compression
def test_tsv_takes_quotes_as_they_are(tmp_path: Path, suffix: str, compress: Callable[[bytes], bytes]) -> None:
    (tmp_path / f"x.tsv{suffix}").write_bytes(compress(b'label\ttext\n1\t"open, and never closed\n0\tb\n'))
    assert read(tmp_path, f"x.tsv{suffix}") == [
        ('"open, and never closed', f"x.tsv{suffix}:2"),
        ("b", f"x.tsv{suffix}:3"),
    ]


def test_parquet(tmp_path: Path) -> None:
    write_parquet(tmp_path / "x.parquet", {"text": TEXTS * 600, "n": list(range(2400))})
    assert read(tmp_path, "x.parquet") == [(text, f"x.parquet#{i}") for i, text in enumerate(TEXTS * 600)]


def write_parquet(path: Path, columns: dict[str, list[Any]]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table(columns), path)


def test_compressed_files_of_several_members(tmp_path: Path) -> None:
    """`cat a.gz b.gz` is a valid file, and so is the same with .zst; parallel compressors write such files."""
    for suffix, compress in COMPRESSIONS[1:]:
        (tmp_path / f"x.txt{suffix}").write_bytes(compress(b"one\n") + compress(b"") + compress(b"two\n" * 100_000))
        assert read(tmp_path, f"x.txt{suffix}") == [("one\n" + "two\n" * 100_000, f"x.txt{suffix}")]


def test_a_byte_order_mark_is_not_text(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_bytes(b"\xef\xbb\xbftext\na\n")
    (tmp_path / "x.txt").write_bytes(b"\xef\xbb\xbfa\n")
    assert read(tmp_path, "x.csv") == [("a", "x.csv:2")]
    assert read(tmp_path, "x.txt") == [("a\n", "x.txt")]


def test_limit(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("a\nb\nc\n")
    (tmp_path / "y.txt").write_text("d\n")
    assert [text for text, _ in read(tmp_path, "*.txt", document="line", limit=2)] == ["a", "b"]
    assert [text for text, _ in read(tmp_path, "*.txt", document="line", limit=9)] == ["a", "b", "c", "d"]


def test_globs_are_sorted_and_go_into_folders(tmp_path: Path) -> None:
    for name in ("b/2.txt", "b/10.txt", "a.txt", "b/c/d.txt", "b/other.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    inside = tmp_path / "b"
    assert [text for text, _ in read(tmp_path, "**/*.txt")] == ["a.txt", "b/10.txt", "b/2.txt", "b/c/d.txt"]
    assert [text for text, _ in read(inside, "../a.txt")] == ["a.txt"]
    assert [text for text, _ in read(inside, f"{tmp_path}/b/*.txt")] == ["b/10.txt", "b/2.txt"]


def test_a_name_with_brackets_is_a_name(tmp_path: Path) -> None:
    base = tmp_path / "run [1]"
    base.mkdir()
    (base / "a[b].txt").write_text("x")
    assert read(base, "a[b].txt") == [("x", "a[b].txt")]
    assert read(base, "*.txt") == [("x", "a[b].txt")]


BROKEN_LINES = {
    "not JSON": ('{"text": "a"}\n{"text": \n', ("x.jsonl:2:", "not JSON", "column")),
    "not an object": ('{"text": "a"}\n\n["text"]\n', ("x.jsonl:3:", "a list", "object")),
    "no field": ('{"body": "a", "title": "b"}\n', ("x.jsonl:1:", "'text'", "'body', 'title'", "field:")),
    "null": ('{"text": null}\n', ("x.jsonl:1:", "'text'", "null")),
    "a number": ('{"text": 3}\n', ("x.jsonl:1:", "'text'", "a number")),
    "half a surrogate pair": ('{"text": "ab\\ud83d"}\n', ("x.jsonl:1:", "character 2", "\\ud83d")),
    "too deep": ('{"text": "a"}\n' + "[" * 100_000, ("x.jsonl:2:", "nested too deeply")),
    "5,000 digits": (
        '{"text": "a"}\n{"text": "b", "n": %s}\n' % ("1" * 5000),
        ("x.jsonl:2:", "4,300 digits", "as text"),
    ),
    "blank": ("\n \n", ("x.jsonl:", "no documents")),
}


@pytest.mark.parametrize("case", BROKEN_LINES)
def test_broken_jsonl(tmp_path: Path, case: str) -> None:
    text, expected = BROKEN_LINES[case]
    (tmp_path / "x.jsonl").write_text(text)
    message = refused(tmp_path, "x.jsonl")
    assert [part for part in expected if part not in message] == []


BROKEN_JSON = {
    "5,000 digits": ('[{"text": "a"},\n{"text": "b", "n": %s}]' % ("1" * 5000), ("x.json:2:", "4,300 digits")),
    "too deep": ('[{"text": "a"},\n' + "[" * 100_000, ("x.json:2:", "nested too deeply")),
    "not an array": ('{"text": "a"}\n', ("x.json:1:", "not an array", ".jsonl")),
    "an element": ('[{"text": "a"},\n "b"]', ("x.json:2:", "a string")),
    "syntax": ('[{"text": "a"},\n {"text" "b"}]', ("x.json:2:", "not JSON")),
    "comma": ('[{"text": "a"}\n\n {"text": "b"}]', ("x.json:3:", "comma")),
    "open end": ('[{"text": "a"}\n', ("x.json:2:", "closing bracket")),
    "rest": ('[{"text": "a"}]\n\n[]', ("x.json:3:", "after the end")),
    "nothing in it": ("[]", ("x.json:", "no documents")),
}


@pytest.mark.parametrize("case", BROKEN_JSON)
def test_broken_json(tmp_path: Path, case: str) -> None:
    text, expected = BROKEN_JSON[case]
    (tmp_path / "x.json").write_text(text)
    message = refused(tmp_path, "x.json")
    assert [part for part in expected if part not in message] == []


ANSWER = {"text": "cat", "answer_start": 4}
SQUAD = {
    "version": "v2.0",
    "data": [
        {
            "title": "Cats",
            "paragraphs": [
                {
                    "context": "the cat sat",
                    "qas": [
                        {"id": "a", "question": "who?", "answers": [ANSWER, ANSWER], "is_impossible": False},
                        {"id": "b", "question": "why?", "answers": [], "plausible_answers": [ANSWER]},
                    ],
                }
            ],
        }
    ],
}


def test_nested_squad(tmp_path: Path) -> None:
    (tmp_path / "dev.json").write_text(json.dumps(SQUAD, indent=2))
    first, second = read_records(Source(path="dev.json"), tmp_path, ("question", "context", "answers"))
    assert first.values["answers"] == {"text": ["cat", "cat"], "answer_start": [4, 4]}
    assert second.values == {
        "id": "b",
        "question": "why?",
        "context": "the cat sat",
        "answers": {"text": [], "answer_start": []},
    }
    assert second.where == f"{tmp_path}/dev.json: data[0].paragraphs[0].qas[1]"


def test_broken_nested_squad(tmp_path: Path) -> None:
    broken = json.loads(json.dumps(SQUAD))
    del broken["data"][0]["paragraphs"][0]["qas"][0]["answers"][1]["answer_start"]
    (tmp_path / "dev.json").write_text(json.dumps(broken))
    with pytest.raises(DataError, match=r"data\[0\]\.paragraphs\[0\]\.qas\[0\]\.answers: there is no 'answer_start'"):
        list(read_records(Source(path="dev.json"), tmp_path, ("question",)))


def test_rows_of_an_array_that_share_a_line_have_numbers(tmp_path: Path) -> None:
    (tmp_path / "y.json").write_text('[{"text": "a"},\n{"text": "b"}, {"text": "c"}]')
    assert [where for _, where in read(tmp_path, "y.json")] == ["y.json:1", "y.json:2", "y.json:2 (row 3)"]


def test_rows_within_an_object(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(json.dumps({"version": 1, "data": [{"text": text} for text in TEXTS]}))
    assert read(tmp_path, "x.json") == [(text, f"x.json: data[{i}]") for i, text in enumerate(TEXTS)]
    (tmp_path / "lines.json").write_text('{"text": "a"}\n{"text": "b"}\n')
    assert "name the file .jsonl" in refused(tmp_path, "lines.json")


@pytest.mark.parametrize("shards", [1, 2])
def test_a_directory_of_save_to_disk(tmp_path: Path, shards: int) -> None:
    import datasets

    rows = datasets.Dataset.from_dict({"text": TEXTS, "n": list(range(len(TEXTS)))})
    rows.save_to_disk(str(tmp_path / "saved"), num_shards=shards)
    names = [f"saved/data-{i:05d}-of-{shards:05d}.arrow" for i in range(shards)]
    found = read(tmp_path, "saved")
    assert [text for text, _ in found] == TEXTS
    assert sorted({where.split("#")[0] for _, where in found}) == names
    assert read(tmp_path, "saved", limit=1) == [(TEXTS[0], f"{names[0]}#0")]
    assert "'body'; the fields are: 'text', 'n'" in refused(tmp_path, "saved", field="body")

    datasets.DatasetDict({"train": rows, "test": rows}).save_to_disk(str(tmp_path / "splits"))
    assert "wrote the splits test, train here. Name one:" in refused(tmp_path, "splits")
    assert [text for text, _ in read(tmp_path, "splits/train")] == TEXTS

    (tmp_path / names[0]).write_bytes(b"ARROW1 and then something else")
    assert "not an Arrow stream of `datasets.save_to_disk`, or damaged" in refused(tmp_path, names[0])


BROKEN_TABLES = {
    "ragged": ("x.csv", "id,text\n1,a\n2,b,c\n", ("x.csv:3:", "3 columns", "header has 2")),
    "ragged tsv": ("x.tsv", "id\ttext\n1\ta\n2\n", ("x.tsv:3:", "1 columns", "header has 2", "tab")),
    "quote never closed": ("x.csv", 'id,text\n1,a\n2,"b\n3,c\n', ("x.csv:3:", "quote")),
    "quote inside": ("x.csv", 'id,text\n1,"a"b\n', ("x.csv:2:", "quote")),
    "no field": ("x.csv", "id,body\n1,a\n", ("x.csv:1:", "'text'", "'id', 'body'", "field:")),
    "two fields": ("x.csv", "text,text\n1,a\n", ("x.csv:1:", "2 columns named 'text'")),
    "header only": ("x.csv", "id,text\n", ("x.csv:", "no documents")),
}


@pytest.mark.parametrize("case", BROKEN_TABLES)
def test_broken_tables(tmp_path: Path, case: str) -> None:
    name, text, expected = BROKEN_TABLES[case]
    (tmp_path / name).write_text(text)
    message = refused(tmp_path, name)
    assert [part for part in expected if part not in message] == []


@pytest.mark.parametrize(("first", "offset"), [(b"abc\n", 7), (b"\xef\xbb\xbfabc\n", 10)])
@pytest.mark.parametrize("name", ["x.txt", "x.jsonl", "x.csv", "x.json"])
def test_invalid_utf8_is_found_by_line_and_offset(tmp_path: Path, name: str, first: bytes, offset: int) -> None:
    start = {"x.jsonl": b'{"text": ""}\n', "x.csv": b"text\n"}.get(name, first)
    if start is not first:
        offset = len(start) + 3
    (tmp_path / name).write_bytes(start + b"def\xfcg\n")
    message = refused(tmp_path, name)
    assert f"{name}:2: byte 0xfc at offset {offset}" in message
    assert "iconv" in message


def test_a_parquet_value_that_python_has_not(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    years = pa.array([0, 10**13], pa.timestamp("s"))  # the second one is the year 318857
    pq.write_table(pa.table({"text": ["a", "b"], "at": years}), tmp_path / "x.parquet")
    assert [text for text, _ in read(tmp_path, "x.parquet")] == ["a", "b"]
    with pytest.raises(DataError, match=r"x\.parquet#0: a value of this row or of a later one .*out of range"):
        list(read_records(Source(path="x.parquet"), tmp_path, ("text",)))


def test_broken_parquet(tmp_path: Path) -> None:
    write_parquet(tmp_path / "x.parquet", {"body": ["a", None]})
    assert "'text'; the fields are: 'body'" in refused(tmp_path, "x.parquet")
    assert "x.parquet#1: the field 'body' is null" in refused(tmp_path, "x.parquet", field="body")
    (tmp_path / "x.parquet").write_bytes((tmp_path / "x.parquet").read_bytes()[:-9])
    assert "x.parquet: not a Parquet file, or damaged" in refused(tmp_path, "x.parquet")


@pytest.mark.parametrize(("suffix", "compress"), COMPRESSIONS[1:], ids=["gz", "zst"])
def test_truncated_archives(tmp_path: Path, suffix: str, compress: Callable[[bytes], bytes]) -> None:
    whole = compress(bytes(range(32, 127)) * 5000)
    for kept in (len(whole) - 1, len(whole) // 2, 5):
        (tmp_path / f"x.txt{suffix}").write_bytes(whole[:kept])
        assert f"x.txt{suffix}: the compressed file is truncated or damaged" in refused(tmp_path, f"x.txt{suffix}")
    (tmp_path / f"x.txt{suffix}").write_bytes(b"not an archive at all")
    assert "truncated or damaged" in refused(tmp_path, f"x.txt{suffix}")


def test_an_empty_archive_has_no_documents(tmp_path: Path) -> None:
    for suffix, compress in COMPRESSIONS[1:]:
        (tmp_path / f"x.txt{suffix}").write_bytes(compress(b""))
        assert "no documents" in refused(tmp_path, f"x.txt{suffix}")


def recipe(train: list[dict[str, Any]], validation: Any = None) -> Recipe:
    return recipe_class().model_validate(
        {
            "task": "clm",
            "model": {"config": {"model_type": "llama"}},
            "tokenizer": {"train": {}},
            "data": {"train": train, "validation": validation},
            "batch": {"global_size": 1, "micro_size": 1},
            "train": {"max_steps": 1},
            "run_dir": "run",
        }
    )


def test_check_sources_lists_every_mistake(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "good.txt").write_text("x")
    (tmp_path / "good.jsonl").write_text("x")
    (tmp_path / "empty.txt").touch()
    (tmp_path / "thesis.docx").write_text("x")
    (tmp_path / "packed.parquet.gz").write_text("x")
    (tmp_path / "link.txt").symlink_to("nowhere.txt")
    train = ["missing.txt", "*.xyz", "folder", "empty.txt", "good.txt", "thesis.docx", "packed.parquet.gz", "l*.txt"]
    broken = recipe(
        [
            *({"path": path} for path in train),
            {"path": "good.jsonl", "document": "line"},
            {"path": "good.txt", "field": "body"},
            {"source": "python-stdlib"},
        ],
        validation=[{"path": "none/*.txt"}],
    )
    with pytest.raises(DataError) as caught:
        check_sources(broken, tmp_path)
    lines = str(caught.value).replace(f"{tmp_path}/", "").splitlines()
    expected = [
        (
            "data.train[0].path: missing.txt:",
            f"no such file. A relative path starts at the recipe's directory, {tmp_path}",
        ),
        ("data.train[1].path: *.xyz:", "no such file"),
        ("data.train[2].path: folder:", "this is a directory"),
        ("data.train[3].path: empty.txt:", "empty"),
        ("data.train[5].path: thesis.docx:", "unknown file type"),
        ("data.train[6].path: packed.parquet.gz:", "unknown file type"),
        ("data.train[7].path: link.txt:", "broken link"),
        ("data.train[8].document:", "no effect"),
        ("data.train[9].field:", "no effect"),
        ("data.validation[0].path: none/*.txt:", "no such file"),
    ]
    assert len(lines) == len(expected)
    for line, (start, part) in zip(lines, expected, strict=True):
        assert line.startswith(start)
        assert part in line


def test_check_sources_is_content_with_good_ones(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    check_sources(recipe([{"path": "*.txt"}], validation=0.5), tmp_path)


def test_many_bad_files_are_summed_up(tmp_path: Path) -> None:
    for i in range(20):
        (tmp_path / f"{i}.bin").write_text("x")
    with pytest.raises(DataError, match="and 15 more") as caught:
        check_sources(recipe([{"path": "*"}]), tmp_path)
    assert len(str(caught.value).splitlines()) == 6


def test_reading_a_source_that_is_not_there(tmp_path: Path) -> None:
    assert "no such file" in refused(tmp_path, "nothing.txt")


def test_python_stdlib_is_the_library_and_nothing_else(tmp_path: Path) -> None:
    documents = list(read_documents(Source(source="python-stdlib"), tmp_path))
    root = Path(json.__file__).parent.parent
    names = [Path(document.where).relative_to(root).as_posix() for document in documents]
    assert names == sorted(names)
    assert len(names) > 400
    assert {"json/decoder.py", "os.py", "idlelib/editor.py", "asyncio/base_events.py"} <= set(names)
    parts = {part for name in names for part in name.split("/")}
    assert not parts & {"test", "tests", "idle_test", "turtledemo", "site-packages", "__pycache__"}
    text = next(d.text for d, name in zip(documents, names, strict=True) if name == "json/decoder.py")
    assert text == (root / "json/decoder.py").read_text(encoding="utf-8")


def test_hub_data_set_from_a_local_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "set").mkdir()
    (tmp_path / "set/train.jsonl").write_text('{"body": "one"}\n{"body": "two"}\n{"body": null}\n')
    name = str(tmp_path / "set")
    source = Source(hub=name, field="body")
    documents = [(d.text, d.where) for d in islice(read_documents(source, tmp_path), 2)]
    assert documents == [("one", f"hub:{name}[train]#0"), ("two", f"hub:{name}[train]#1")]
    with pytest.raises(DataError, match=r"\[train\]#2: the field 'body' is null"):
        list(read_documents(source, tmp_path))
    with pytest.raises(DataError, match="no field 'text'; the fields are: 'body'"):
        list(read_documents(Source(hub=name), tmp_path))
    with pytest.raises(DataError, match=r"split nonsense.*cannot be loaded"):
        list(read_documents(Source(hub=name, split="nonsense"), tmp_path))

    memo = HashMemo(tmp_path / "hashes.json")
    assert fingerprint_source(source, tmp_path, memo) == fingerprint_source(source, tmp_path, memo)
    assert fingerprint_source(source, tmp_path, memo) != fingerprint_source(
        Source(hub=name, field="body", split="train[:1]"), tmp_path, memo
    )


def test_sources_import_nothing_heavy() -> None:
    code = "import sys, ptft_dist.data.sources; print({'torch', 'transformers', 'datasets'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "set()"


@pytest.mark.parametrize(
    ("files", "says"),
    [
        (("a/1.txt", "a/2.txt", "3.jsonl.gz"), "Name the files in it: poems/**/*.txt or poems/**/*.jsonl.gz$"),
        (("a.doc",), "this is a directory without a file that can be read"),
    ],
)
def test_a_directory_is_answered_with_what_lies_in_it(tmp_path: Path, files: tuple[str, ...], says: str) -> None:
    for name in files:
        (tmp_path / "poems" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "poems" / name).write_text("x")
    with pytest.raises(DataError, match=re.escape(says).replace(r"\$", "$")):
        check_sources(recipe([{"path": "poems"}]), tmp_path)


def test_empty_files_among_others_are_skipped_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name, text in {"a.txt": "one", "b.txt": "", "c.txt": "two", "d.txt": ""}.items():
        (tmp_path / name).write_text(text)
    assert [document.text for document in read_documents(Source(path="*.txt"), tmp_path)] == ["one", "two"]
    check_sources(recipe([{"path": "*.txt"}]), tmp_path)
    assert [record.getMessage().replace(f"{tmp_path}/", "") for record in caplog.records] == [
        "path: *.txt: skipped 2 empty files: b.txt, d.txt"
    ]
    with pytest.raises(DataError, match="the file is empty"):
        check_sources(recipe([{"path": "[bd].txt"}]), tmp_path)
