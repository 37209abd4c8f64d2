"""The cache of prepared data: its location, its reuse, and its state after a process was killed."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from filelock import FileLock
from prepare_support import all_ids, prepare, recipe, save_tokenizer, write_text

from ptft_dist.data import cache, sources, stream, tokenizer_provider
from ptft_dist.data.formats import Record
from ptft_dist.data.store import StoreWriter, TokenStore
from ptft_dist.data.tokenizer import DocumentEncoder, load_tokenizer, tokenizer_fingerprint
from ptft_dist.errors import DataError, PtftError, RecipeError


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_text(tmp_path)


def snapshot(directory: Path) -> dict[str, tuple[int, int]]:
    """Inode and time stamp of each file but the locks."""
    files = [path for path in directory.rglob("*") if path.is_file() and path.suffix != ".lock"]
    return {str(path): (path.stat().st_ino, path.stat().st_mtime_ns) for path in files}


@pytest.mark.parametrize(("owner", "name"), [(tokenizer_provider, "train_tokenizer"), (stream, "write")])
def test_a_source_that_changes_underneath_is_an_error(
    base: Path, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str
) -> None:
    work = getattr(owner, name)

    def work_and_change(*args: Any, **kwargs: Any) -> Any:
        result = work(*args, **kwargs)
        with (base / "text.txt").open("a") as file:
            file.write("one more\n")
        return result

    monkeypatch.setattr(owner, name, work_and_change)
    with pytest.raises(DataError, match="changed while"):
        prepare(recipe({"vocab_size": 300}), base)
    built = "tokenizers" if name == "train_tokenizer" else "stores"
    assert list((base / "cache" / built).glob("*/")) == []


def test_where_the_cache_is(base: Path, tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PTFT_CACHE", str(tmp_path / "by environment"))
    assert prepare(recipe(tokenizer_dir, cache_dir=None), base).train.path.is_relative_to(tmp_path / "by environment")
    assert prepare(recipe(tokenizer_dir), base).train.path.is_relative_to(base / "cache")
    (base / "in the way").write_text("")
    with pytest.raises(RecipeError, match=r"cannot be created.*PTFT_CACHE"):
        prepare(recipe(tokenizer_dir, cache_dir="in the way/cache"), base)


def test_a_full_disk_is_explained_and_leaves_nothing(
    base: Path, tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def disk_full(_: StoreWriter) -> dict[str, Any]:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(StoreWriter, "close", disk_full)
    with pytest.raises(PtftError, match=r"No space left on device.*PTFT_CACHE"):
        prepare(recipe(tokenizer_dir), base)
    assert [path for path in (base / "cache/stores").iterdir() if path.suffix != ".lock"] == []


def test_the_same_again_is_found_and_nothing_is_written(base: Path) -> None:
    wanted = recipe({"vocab_size": 300}, validation=0.3)
    first = prepare(wanted, base)
    before = snapshot(base / "cache/stores") | snapshot(base / "cache/tokenizers")
    started = time.perf_counter()
    second = prepare(wanted, base)
    assert time.perf_counter() - started < 0.5
    assert (first.from_cache, second.from_cache) == (False, True)
    assert snapshot(base / "cache/stores") | snapshot(base / "cache/tokenizers") == before
    assert all_ids(second.train) == all_ids(first.train)
    assert (second.fingerprint, second.report) == (first.fingerprint, first.report)


def test_a_hit_imports_nothing_heavy(base: Path) -> None:
    wanted = recipe({"vocab_size": 300})
    prepare(wanted, base)
    code = (
        "import sys; from pathlib import Path; from ptft_dist.config.recipe import Recipe\n"
        "from ptft_dist.data.prepare import prepare\n"
        "from ptft_dist.tasks.registry import encoder_class, recipe_class\n"
        f"recipe, base = recipe_class().model_validate_json(sys.argv[1]), Path({str(base)!r})\n"
        "prepared = prepare(recipe, base, encoder_class(recipe.task))\n"
        "print(prepared.from_cache, {'torch', 'transformers', 'datasets', 'tokenizers'} & set(sys.modules))"
    )
    command = [sys.executable, "-c", code, wanted.model_dump_json(exclude_unset=True)]
    assert subprocess.check_output(command, text=True).strip() == "True set()"


def test_a_deleted_tokenizer_comes_back(base: Path) -> None:
    wanted = recipe({"vocab_size": 300})
    first = prepare(wanted, base)
    before = tokenizer_fingerprint(load_tokenizer(first.tokenizer_path))
    for file in first.tokenizer_path.iterdir():
        file.unlink()
    first.tokenizer_path.rmdir()
    again = prepare(wanted, base)
    assert again.from_cache
    assert tokenizer_fingerprint(load_tokenizer(again.tokenizer_path)) == before


def kill(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


KILLED_AT: dict[str, tuple[Any, str, Callable[..., Any]]] = {
    "learning the tokenizer": (tokenizer_provider, "train_tokenizer", kill),
    "encoding": (DocumentEncoder, "encode", kill),
    "finishing a store": (StoreWriter, "close", kill),
    "flushing": (cache, "_flush", kill),
    "after the rename": (cache, "_fsync", lambda path: kill() if path.name in ("stores", "tokenizers") else None),
    "writing the memo": (cache.HashMemo, "_save", kill),
}


@pytest.mark.parametrize("moment", KILLED_AT)
def test_killed_at_any_moment_the_cache_stays_whole(base: Path, moment: str) -> None:
    wanted = recipe({"vocab_size": 300}, validation=0.3)
    owner, name, deadly = KILLED_AT[moment]
    child = os.fork()
    if child == 0:
        setattr(owner, name, deadly)
        try:
            prepare(wanted, base)
        finally:
            os._exit(1)  # not reached if the child was killed
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status)

    again = prepare(wanted, base)
    expected = prepare(recipe({"vocab_size": 300}, validation=0.3, cache_dir="fresh"), base)
    assert all_ids(again.train) == all_ids(expected.train)
    assert list((base / "cache").rglob("*.building-*")) == []
    assert prepare(wanted, base).from_cache


def test_what_a_killed_build_of_something_else_left_is_removed(base: Path, tokenizer_dir: Path) -> None:
    dead = base / "cache/stores/0123.building-99999@host"
    (dead / "train").mkdir(parents=True)
    alive = base / "cache/stores/4567.building-99998@host"
    alive.mkdir()
    with FileLock(base / "cache/stores/4567.lock"):
        prepare(recipe(tokenizer_dir), base)
        assert not dead.exists()
        assert alive.exists()


@pytest.mark.parametrize("name", ["report.json", "train/tokens.bin", "train/store.json", "validation"])
def test_damaged_data_are_refused_with_the_remedy(base: Path, tokenizer_dir: Path, name: str) -> None:
    wanted = recipe(tokenizer_dir, validation=0.3)
    directory = prepare(wanted, base).train.path.parent
    if (directory / name).is_dir():
        shutil.rmtree(directory / name)
    else:
        (directory / name).write_bytes((directory / name).read_bytes()[:-3])
    with pytest.raises(DataError, match=f"damaged.*\nDelete {directory} and start again"):
        prepare(wanted, base)
    shutil.rmtree(directory)
    assert not prepare(wanted, base).from_cache


def test_the_result_survives_a_change_of_directory(
    base: Path, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    monkeypatch.chdir(base)
    prepared = prepare(recipe({"vocab_size": 300}), Path())
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    assert TokenStore.open(prepared.train.path).tokens == prepared.train.tokens
    assert prepared.tokenizer_path.is_dir()


def test_a_cache_that_cannot_be_written(base: Path, tokenizer_dir: Path) -> None:
    (base / "cache").mkdir()
    (base / "cache/stores").touch()  # as good as a read-only folder, and it stops the superuser too
    with pytest.raises(PtftError, match=r"cannot be written.*PTFT_CACHE"):
        prepare(recipe(tokenizer_dir), base)


def test_a_cache_that_has_the_data_need_not_be_written(base: Path, tokenizer_dir: Path) -> None:
    """As one that a colleague has prepared. The files are new to its memo of hashes."""
    first = prepare(recipe(tokenizer_dir), base)
    (base / "cache/hashes.json").unlink()
    (base / "cache/hashes.lock").unlink()
    (base / "cache/hashes.lock").mkdir()
    again = prepare(recipe(tokenizer_dir), base)
    assert (again.from_cache, again.fingerprint) == (True, first.fingerprint)


def test_an_error_of_a_source_is_not_blamed_on_the_cache(
    base: Path, tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The Hub's connection errors are OSErrors too."""

    def lost(*_: Any) -> Any:
        yield Record({"text": "a b"}, "hub:org/name[train]#0")
        raise ConnectionError("Connection reset by peer")

    monkeypatch.setattr(sources, "_read_hub", lost)
    monkeypatch.setattr(sources, "hub_dataset", lambda _: SimpleNamespace(_fingerprint="0123"))
    with pytest.raises(DataError, match=r"hub: org/name: the source cannot be read \(Connection reset by peer\)"):
        prepare(recipe(tokenizer_dir, train=[{"hub": "org/name"}]), base)
    with pytest.raises(DataError, match=r"hub: org/name: the source cannot be read"):
        prepare(recipe({"vocab_size": 300}, train=[{"hub": "org/name"}]), base)
    assert [path for path in (base / "cache/stores").iterdir() if path.suffix != ".lock"] == []


def test_an_error_of_the_encoder_is_not_blamed_on_the_cache(
    base: Path, tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> Any:
        raise BlockingIOError("no more processes")

    monkeypatch.setattr(DocumentEncoder, "encode", broken)
    with pytest.raises(BlockingIOError):
        prepare(recipe(tokenizer_dir), base)


@pytest.mark.parametrize("tokenizer", [None, {"vocab_size": 300}], ids=["rows", "a learned tokenizer"])
def test_a_file_that_cannot_grow_is_explained(
    base: Path, tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch, tokenizer: dict[str, Any] | None
) -> None:
    """The kernel refuses every write beyond a size, as on a full disk; the tokenizer library writes its file itself."""
    (base / "text.txt").write_text("the quick brown fox jumps\n" * 3000)
    wanted = recipe(tokenizer_dir if tokenizer is None else tokenizer)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    monkeypatch.setattr(cache.HashMemo, "_save", lambda _: None)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, limits[1]))
    try:
        with pytest.raises(PtftError, match=r"the cache cannot be written \(.*File too large.*PTFT_CACHE"):
            prepare(wanted, base)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert list((base / "cache").rglob("*.building-*")) == []
