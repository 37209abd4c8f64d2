"""When a source counts as changed, and when its files are read for hashing."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from prepare_support import prepare
from tiny import write_tiny

from ptft_dist.config.recipe import Source
from ptft_dist.data import cache
from ptft_dist.data.sources import HashMemo, fingerprint_source
from ptft_dist.errors import DataError
from ptft_dist.tasks.registry import recipe_class


def test_the_fingerprint_follows_contents_and_settings(tmp_path: Path) -> None:
    def of(path: str = "a.txt", base: Path = tmp_path, **settings: Any) -> str:
        memo = HashMemo(tmp_path / "hashes.json")
        return fingerprint_source(Source(path=path, **settings), base, memo)

    (tmp_path / "a.txt").write_text("one\n")
    first = of()
    different = {first, of(document="line"), of(document="paragraph"), of(limit=1), of(limit=2)}
    (tmp_path / "a.txt").write_text("two\n")  # as long, and within the resolution of many a clock
    different.add(of())
    assert len(different) == 6

    (tmp_path / "copy").mkdir()
    (tmp_path / "copy/b.txt").write_text("two\n")
    assert of("copy/b.txt") == of("b.txt", tmp_path / "copy") == of("copy/*.txt") == of()  # wherever it lies

    (tmp_path / "a.jsonl").write_text("two\n")
    assert of("a.jsonl") != of()  # the same bytes, read in another way


def test_unchanged_files_are_hashed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed = []
    digest = cache._digest
    monkeypatch.setattr(cache, "_digest", lambda *a: hashed.append(a[0].name) or digest(*a))
    monkeypatch.setattr(cache, "SETTLED_AFTER_NS", 0)
    files = [tmp_path / "a.txt", tmp_path / "b.txt"]
    for file in files:
        file.write_text(file.name)
    memo_file = tmp_path / "hashes.json"

    first = HashMemo(memo_file).digests(files)
    assert hashed == [str(file) for file in files]
    assert HashMemo(memo_file).digests(files) == first
    assert len(hashed) == 2

    files[1].write_text("changed")
    second = HashMemo(memo_file).digests(files)
    assert hashed[2:] == [str(files[1])]
    assert (second[0] == first[0], second[1] == first[1]) == (True, False)

    memo_file.write_text("damaged")
    assert HashMemo(memo_file).digests(files) == second


def test_a_file_written_a_moment_ago_is_not_trusted_by_its_time_stamp(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one")
    HashMemo(tmp_path / "hashes.json").digests([tmp_path / "a.txt"])
    assert json.loads((tmp_path / "hashes.json").read_text()) == {}


def test_a_file_that_grows_while_it_is_hashed_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, digest = tmp_path / "a.txt", cache._digest
    file.write_text("one")
    monkeypatch.setattr(cache, "_digest", lambda *a: (file.write_text("one more"), digest(*a))[1])
    with pytest.raises(DataError, match=f"{file}: the file changes while it is read"):
        HashMemo(tmp_path / "hashes.json").digests([file])


def test_settings_that_decide_which_rows_are_usable_learn_their_own_tokenizer(tmp_path: Path) -> None:
    """Bad rows that are skipped are not learned from, and which are bad is the task's affair."""
    found = {}
    for scheme in ("iob2", "plain"):
        changes = {"token_classification": {"scheme": scheme}, "data": {"bad_rows": "skip", "cache_dir": "cache"}}
        values = json.loads(write_tiny(tmp_path, "token_classification", **changes).read_text())
        found[scheme] = prepare(recipe_class().model_validate(values), tmp_path)
    assert found["iob2"].tokenizer_path != found["plain"].tokenizer_path


def test_a_time_stamp_that_was_set_back_proves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `cp -p` and `rsync -t` do; the time of the inode's change cannot be set."""
    monkeypatch.setattr(cache, "SETTLED_AFTER_NS", 0)
    file = tmp_path / "a.txt"
    file.write_text("one")
    before = file.stat()
    first = HashMemo(tmp_path / "hashes.json").digests([file])
    file.write_text("two")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = file.stat()
    assert (after.st_size, after.st_ino, after.st_mtime_ns) == (before.st_size, before.st_ino, before.st_mtime_ns)
    assert HashMemo(tmp_path / "hashes.json").digests([file]) != first
