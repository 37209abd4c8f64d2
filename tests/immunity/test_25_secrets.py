"""Immunity 25: values of environment variables may be passwords. They are neither shown nor written to files."""

from __future__ import annotations

import json
import re
import traceback
from pathlib import Path
from types import SimpleNamespace

import pytest
from support import make_recipe, start, write_documents, write_recipe

from ptft_dist.api import evaluate, load_recipe, prepare, train
from ptft_dist.checkpoint.checkpoint import read_checkpoint
from ptft_dist.cli import main
from ptft_dist.config import secrets
from ptft_dist.config.load import describe
from ptft_dist.errors import PtftError, RecipeError

SECRET = "hf_5ecretT0ken\\'(x"  # what repr and regular expressions write differently has to stay hidden too

RECIPE = """\
task: clm
model: {path: "https://user:${env:PTFT_TEST_SECRET}@host/model", revision: "${env:PTFT_TEST_SECRET}"}
tokenizer: {path: x}
data: {train: [{source: python-stdlib}], cache_dir: "${run_dir}/cache"}
batch: {global_size: 64, micro_size: 8}
train: {max_steps: 300}
run_dir: runs/${env:PTFT_TEST_SECRET}
"""


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("PTFT_TEST_SECRET", SECRET)
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    return str(path)


def hidden(text: str) -> bool:
    return "5ecret" not in text and "T0ken" not in text


def test_neither_the_table_nor_the_resolved_recipe_shows_it(file: str) -> None:
    loaded = load_recipe(file)
    assert loaded.recipe.model.revision == SECRET  # it does reach the program
    assert loaded.recipe.data.cache_dir == f"runs/{SECRET}/cache"
    for text in (describe(loaded), loaded.resolved, repr(loaded.origins), repr(loaded.written)):
        assert hidden(text)
    assert "https://user:${env:PTFT_TEST_SECRET}@host/model" in loaded.resolved


def test_the_resolved_recipe_still_works(file: str, tmp_path: Path) -> None:
    loaded = load_recipe(file)
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(loaded.resolved)
    assert load_recipe(str(resolved)).recipe == loaded.recipe


@pytest.mark.parametrize("verb", ["show", "check"])
def test_the_command_does_not_print_it(
    file: str, verb: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["ptft", "config", verb, file])
    main()
    output = capsys.readouterr()
    assert output.out
    assert hidden(output.out + output.err)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "optim.lr=${env:PTFT_TEST_SECRET}",
            "optim.lr: expected a number above 0, got the text of ${env:PTFT_TEST_SECRET}",
        ),
        ("optim.name=${env:PTFT_TEST_SECRET}", "got the text of ${env:PTFT_TEST_SECRET}"),
        ("optim.betas=['${env:PTFT_TEST_SECRET}']", "optim.betas: expected a list of 2 items, got a list of 1 item"),
        ("optim.x=${env:PTFT_TEST_SECRET}", "optim.x: unknown key"),
        ("data.validation=${env:PTFT_TEST_SECRET}", "got the text of ${env:PTFT_TEST_SECRET}"),
        ("data.validation=[{pth: '${env:PTFT_TEST_SECRET}'}]", "data.validation.0.pth: unknown key"),
        ("train=${env:PTFT_TEST_SECRET}", "train: expected a section (key: value), got the text of"),
        ("optim.groups=[{match: '${env:PTFT_TEST_SECRET}'}]", "optim.groups.0.match: is not a regular expression"),
        ("run_dir=${env:PTFT_TEST_SECRET}${env:PTFT_TEST_UNSET}", "PTFT_TEST_UNSET is not set"),
        ('model.config.a="${env:PTFT_TEST_SECRET}\\ud800"', "model.config.a: this text is not valid Unicode"),
    ],
)
def test_no_error_shows_it(file: str, override: str, message: str) -> None:
    with pytest.raises(RecipeError) as error:
        load_recipe(file, [override])
    assert message in str(error.value)
    assert hidden(str(error.value))
    assert hidden("".join(traceback.format_exception(error.value)))


def test_a_validator_that_quotes_it_is_masked(file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def quote(pattern: str) -> None:
        raise ValueError(f"bad {pattern} and {pattern!r}")

    monkeypatch.setattr("ptft_dist.config.recipe.re", SimpleNamespace(compile=quote, error=re.error))
    with pytest.raises(RecipeError, match=r"optim\.groups\.0: bad") as error:
        load_recipe(file, ["optim.groups=[{match: '${env:PTFT_TEST_SECRET}'}]"])
    assert hidden(str(error.value))


# --- after loading ----------------------------------------------------------------------------------------------------


def test_every_spelling_is_hidden() -> None:
    secrets.remember(SECRET, "${env:A}")
    secrets.remember("päss/wörd", "${env:B}")
    assert secrets.hide(f"at {SECRET}!") == "at ${env:A}!"
    assert secrets.hide(repr(SECRET)) == '"${env:A}"'
    assert secrets.hide(json.dumps([SECRET])) == '["${env:A}"]'
    assert secrets.hide("https://p%C3%A4ss%2Fw%C3%B6rd@host") == "https://${env:B}@host"
    assert secrets.hide(json.dumps("päss/wörd")) == '"${env:B}"'


def test_a_value_inside_another_does_not_show_the_rest() -> None:
    secrets.remember("abcd", "${env:SHORT}")
    secrets.remember("abcdefgh", "${env:LONG}")
    assert secrets.hide("abcdefgh abcd") == "${env:LONG} ${env:SHORT}"


def test_four_characters_are_a_secret_and_three_are_not(file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PTFT_TEST_FOUR", "q7z!")
    monkeypatch.setenv("PTFT_TEST_THREE", "q7z")
    with pytest.raises(RecipeError) as error:
        load_recipe(file, ["optim.groups=[{match: '(${env:PTFT_TEST_FOUR}'}]", "optim.name=a${env:PTFT_TEST_THREE}"])
    assert "q7z!" not in str(error.value)
    assert secrets.hide("q7z! q7z") == "${env:PTFT_TEST_FOUR} q7z"


def written_files(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_that_fails_writes_it_nowhere(tmp_path: Path, documents: Path, cache: Path, ranks: int) -> None:
    """An OSError with a path, a warning and a log record, all with the value, during training."""
    write_recipe(tmp_path, documents, model={"config": {"_name_or_path": "${env:PTFT_TEST_SECRET}"}})
    patches = [f"quote_environment:{ranks - 1}:6:PTFT_TEST_SECRET"]
    run = start(
        "train",
        "recipe.yaml",
        cwd=tmp_path,
        cache=cache,
        ranks=ranks,
        patches=patches,
        env={"PTFT_TEST_SECRET": SECRET},
    )
    assert run.wait() == 1
    assert "Permission denied: '/data/${env:PTFT_TEST_SECRET}/file'" in run.stderr.replace('"', "'")
    assert "a warning about ${env:PTFT_TEST_SECRET}" in run.stderr
    assert "a record about ${env:PTFT_TEST_SECRET}" in run.stderr
    assert hidden(run.stderr + run.stdout)
    files = written_files(tmp_path / "run")
    assert "${env:PTFT_TEST_SECRET}/file" in (tmp_path / f"run/logs/rank-{ranks - 1}.log").read_text()
    assert b"${env:PTFT_TEST_SECRET}/file" in files[tmp_path / "run/result.json"]
    assert [path for path, raw in files.items() if not hidden(raw.decode(errors="replace"))] == []


def test_a_manifest_holds_a_hash_and_no_secret(tmp_path: Path, documents: Path, cache: Path) -> None:
    """A whole run with the value in a data path and in the model's config: no file in run_dir contains it."""
    secret = "hf_5ecretT0ken"
    folder = tmp_path / secret
    folder.mkdir()
    write_documents(folder / "text.txt")
    write_recipe(
        tmp_path,
        documents,
        data={"train": [{"path": "${env:PTFT_TEST_SECRET}/text.txt", "document": "line"}]},
        model={"config": {"_name_or_path": "${env:PTFT_TEST_SECRET}"}},
        train={"max_steps": 2},
        eval={"every": None},
        save={"every": None, "keep": 1},
    )
    run = start("train", "recipe.yaml", cwd=tmp_path, cache=cache, env={"PTFT_TEST_SECRET": secret})
    assert run.wait() == 0, run.stderr
    manifest = read_checkpoint(tmp_path / "run/checkpoints/step-00000002").manifest
    assert "${env:PTFT_TEST_SECRET} (sha256 " in json.dumps(manifest["identity"])
    assert [p for p, raw in written_files(tmp_path / "run").items() if not hidden(raw.decode(errors="replace"))] == []
    assert hidden(run.stderr + run.stdout)


def test_broken_data_under_such_a_path(tmp_path: Path, documents: Path, cache: Path) -> None:
    secret = "hf_5ecretT0ken"
    folder = tmp_path / secret
    folder.mkdir()
    (folder / "bad.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    write_recipe(
        tmp_path, documents, data={"train": [{"path": "${env:PTFT_TEST_SECRET}/bad.jsonl"}], "validation": None},
        eval={"every": None},
    )  # fmt: skip
    for verb in ("train", "prepare"):
        run = start(verb, "recipe.yaml", cwd=tmp_path, cache=cache, env={"PTFT_TEST_SECRET": secret})
        assert run.wait() == 3
        assert "${env:PTFT_TEST_SECRET}/bad.jsonl:2: not JSON" in run.stderr
        assert hidden(run.stderr + run.stdout)
    assert all(hidden(raw.decode(errors="replace")) for raw in written_files(tmp_path / "run").values())


def test_a_traceback_of_the_command_is_hidden(
    file: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise OSError(5, "Input/output error", f"/mnt/{SECRET}")

    monkeypatch.setattr("ptft_dist.data.sources.check_sources", fail)
    monkeypatch.setattr("sys.argv", ["ptft", "config", "check", file])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 1
    output = capsys.readouterr()
    assert "Traceback" in output.err
    assert "Input/output error" in output.err
    assert hidden(output.out + output.err)


VERBS = {"train": train, "prepare": prepare, "evaluate": evaluate}


@pytest.mark.parametrize("verb", VERBS)
def test_an_error_in_a_notebook_does_not_show_it(file: str, verb: str, tmp_path: Path) -> None:
    """The traceback as well: a cause may quote a path."""
    here = {"run_dir": str(tmp_path / "run"), "data.cache_dir": str(tmp_path / "cache")}
    missing = {"data.train": [{"path": str(tmp_path / "${env:PTFT_TEST_SECRET}.txt")}]}
    with pytest.raises(PtftError, match=r"data.train\[0\].path") as caught:
        VERBS[verb](file, here | missing | {"data.validation": 0.1})
    assert hidden("".join(traceback.format_exception(caught.value)))


def test_a_cause_that_shows_it_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PTFT_TEST_SECRET", SECRET)
    blocked = tmp_path / SECRET
    blocked.write_text("a file where the cache should be")
    with pytest.raises(PtftError, match="cache") as caught:
        prepare(
            make_recipe(write_documents(tmp_path / "text.txt")),
            {"data.cache_dir": str(tmp_path / "${env:PTFT_TEST_SECRET}/cache")},
        )
    assert hidden("".join(traceback.format_exception(caught.value)))
