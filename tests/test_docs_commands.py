"""Every command of README.md and of every page is run, or at least parsed; see docs_commands.py."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from pathlib import Path

import pytest
from docs_commands import REASONS, Block, TyperException, blocks, check, commands, smaller
from preloaded_ranks import preloaded, preloaded_ptft
from support import ROOT, environment

PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]


def run_block(block: Block, folder: Path, cache: Path) -> str:
    """Run a block in `folder` with bash; `ptft` and `python` are those with everything imported. Returns its output."""
    text = smaller(block.text, folder) if block.mark == "smaller" else block.text
    text = re.sub(r"^\$ ", "", text, flags=re.MULTILINE)
    path = f"{preloaded_ptft()}:{os.environ['PATH']}"
    env = environment({"PTFT_CACHE": str(cache), "PATH": path, **preloaded()})
    words = ["bash", "-euo", "pipefail", "-c", text]
    done = subprocess.run(words, cwd=folder, env=env, capture_output=True, text=True, timeout=120, check=False)
    expected = int(block.mark.removeprefix("exit ")) if block.mark.startswith("exit ") else 0
    assert done.returncode == expected, f"line {block.line}:\n{text}\n{done.stdout[-2000:]}{done.stderr[-3000:]}"
    return done.stdout


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_the_commands_of_a_page(page: Path, tmp_path: Path, cache: Path) -> None:
    """In order, in one directory."""
    output = ""
    for block in blocks(page):
        kind, mark = block.kind, block.mark
        where = f"{page}:{block.line}: {mark}"
        if kind == "sh":
            check_all(block.text, where)
        if mark.startswith("file "):
            file = tmp_path / mark.removeprefix("file ")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(block.text)
        elif mark.startswith("output"):
            if mark.removeprefix("output of Python ") == platform.python_version():
                assert output == block.text, where
        elif mark.startswith("parsed, "):
            assert mark.removeprefix("parsed, ") in REASONS, where
        elif mark or kind == "sh":
            assert kind == "sh", where
            assert mark in ("", "smaller") or mark.startswith("exit "), where
            output = run_block(block, tmp_path, cache)


def check_all(text: str, where: str) -> None:
    """Check every command of a block."""
    for words in commands(text):
        try:
            check(words)
        except (TyperException, AssertionError) as error:
            raise AssertionError(f"{where}: {' '.join(words)}: {error}") from error


def test_every_block_with_commands_is_found() -> None:
    """A block of commands has a fence, because those that are indented are not tested."""
    for page in PAGES:
        text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
        shown = re.findall(r"^    (?:ptft|accelerate|sbatch|make) [^\n]*", text, re.MULTILINE)
        assert page.name == "commands.md" or not shown, f"{page}: put ```sh around {shown}"
        assert len(re.findall(r"^```", page.read_text(), re.MULTILINE)) == 2 * len(blocks(page)), (
            f"{page}: name the language of each block"
        )
        assert page.read_text().count("<!-- test:") == sum(bool(block.mark) for block in blocks(page)), page


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("ptft trane clm", "no such verb"),
        ("ptft train clm --nodes 2", "No such option"),
        ("ptft train clmm", "no shipped recipe"),
        ("ptft train clm optim.lrr=1", "no such key"),
        ("ptft train clm --launch zero9", "no shipped launch config"),
        ("make pizza", "pizza"),
        ("frobnicate x", "unknown program"),
    ],
)
def test_a_wrong_command_is_noticed(line: str, said: str) -> None:
    (words,) = commands(line)
    with pytest.raises(Exception, match=said):
        check(words)


def test_numbers_of_the_walk_are_those_of_its_script() -> None:
    """Those with a comma or a point in its text; `walk.py` computes them."""
    text = (ROOT / "docs/walk.md").read_text()
    (output,) = (block.text for block in blocks(ROOT / "docs/walk.md") if block.mark.startswith("output"))
    prose = re.sub(r"`[^`\n]*`", "", text.split("## 1.")[1])
    used = set(re.findall(r"(?<![\w.])\d+[.,]\d+(?![\w.]*\.md)", prose))
    assert len(used) > 8
    assert {each for each in used if each not in output} == set()
