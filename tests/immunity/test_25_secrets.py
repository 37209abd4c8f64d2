"""Immunity 25: what the environment gives may be a password. It is shown nowhere, and written to no resolved recipe."""

from __future__ import annotations

import re
import traceback
from pathlib import Path
from types import SimpleNamespace

import pytest

from ptft_dist.api import load_recipe
from ptft_dist.cli import main
from ptft_dist.config.load import describe, dump_resolved
from ptft_dist.errors import RecipeError

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
    for text in (describe(loaded), dump_resolved(loaded), repr(loaded.origins), repr(loaded.written)):
        assert hidden(text)
    assert "https://user:${env:PTFT_TEST_SECRET}@host/model" in dump_resolved(loaded)


def test_the_resolved_recipe_still_works(file: str, tmp_path: Path) -> None:
    loaded = load_recipe(file)
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(dump_resolved(loaded))
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
