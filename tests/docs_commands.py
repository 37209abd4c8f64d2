"""The commands of README.md and docs/: blocks of shell in Markdown, run as they are written, or only parsed.

A block begins with ```sh, ```yaml or ```python. A comment in the line before says what tests do with it:

    <!-- test: parsed, REASON -->   not run; verbs, options, keys and file names are checked. REASON is one of REASONS
    <!-- test: smaller -->          run, with two updates on few rows for each `ptft train`
    <!-- test: file NAME -->        written to NAME for the blocks that follow
    <!-- test: exit 75 -->          run; its last command ends with this code
    <!-- test: output of Python 3.11.7 -->   with this version, exactly what the block before has printed
    none                            ```sh is run as it is; other blocks are left alone
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import typer
from support import ROOT
from test_recipes import smaller as overrides_of

from ptft_dist.cli import command
from ptft_dist.config.mistakes import Schema
from ptft_dist.config.shipped import find_shipped
from ptft_dist.tasks.registry import recipe_class

REASONS = ("synopsis", "minutes", "GPU", "Slurm", "download", "machines")
BLOCK = re.compile(r"(?:^<!-- test: (?P<mark>[^\n]*?) -->\n\n?)?^```(?P<kind>\w+)\n(?P<text>.*?)^```$", re.M | re.S)
COMMENT = re.compile(r"(?:^|\s+)#.*$")
KEY = re.compile(r"^\+?[a-z_][\w.]*=")
PROGRAMS = set(". accelerate cat cd cp export git head ls mkdir pip pre-commit printf python sleep tail touch".split())  # noqa: SIM905
TAKES_RECIPE = ("train", "prepare", "tokenizer", "prefetch", "submit", "sweep", "folds")


class Block(NamedTuple):
    kind: str
    """The language after the fence."""
    text: str
    mark: str
    """What the comment says, such as `parsed, GPU`; empty without one."""
    line: int


def blocks(page: Path) -> list[Block]:
    """All fenced blocks of a page."""
    text = page.read_text(encoding="utf-8")
    found = BLOCK.finditer(text)
    return [Block(m["kind"], m["text"], m["mark"] or "", text.count("\n", 0, m.start("kind")) + 1) for m in found]


def commands(text: str) -> Iterator[list[str]]:
    """The words of each command of a block: without comments, prompts, variables before it, and brackets of optional
    parts. `;` and `&&` separate commands."""
    for line in text.replace("\\\n", " ").splitlines():
        line = COMMENT.sub("", line.removeprefix("$ "))
        for part in re.split(r"\s*(?:;|&&|\|\||\s&(?=\s|$)|\s\|\s)\s*", line):
            words = [word for word in shlex.split(re.sub(r"[\[\]](?![^\s]*=)", "", part)) if word != "..."]
            while words and re.match(r"^[A-Z_]+=", words[0]):
                words = words[1:]
            if words:
                yield words


def check(words: list[str]) -> None:
    """Check a command without running it. Raises AssertionError or typer's error."""
    if words[:2] == ["sudo", "env"] or words[0] in ("sudo", "srun", "time"):
        return check(words[1:])
    if words[0] == "make":
        makefile = (ROOT / "Makefile").read_text()
        targets = [word for word in words[1:] if "=" not in word]
        assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets), words
    elif words[0] == "sbatch":
        (script,) = (word for word in words if word.endswith(".sbatch"))
        assert (ROOT / "slurm" / Path(script).name).is_file(), words
    elif words[0] == "accelerate" and "ptft_dist" in words:
        config = words[words.index("--config_file") + 1]
        assert (ROOT / "launch_configs" / Path(config).name).is_file(), words
        check(["ptft", *words[words.index("ptft_dist") + 1 :]])
    elif words[0] == "ptft":
        check_ptft(words[1:])
    else:
        assert words[0] in PROGRAMS, f"unknown program: {words}"
    return None


def check_ptft(words: list[str]) -> None:
    """Verbs and options exist, keys are those of a recipe, and names of shipped files too."""
    verb, name = command(), "ptft"
    while words and words[0] in getattr(verb, "commands", {}):
        verb, name, words = verb.commands[words[0]], words[0], words[1:]
    assert not hasattr(verb, "commands") or words == ["--version"] or words == ["--help"], f"no such verb: {words}"
    if not hasattr(verb, "commands") and "--help" not in words:
        verb.make_context(name, ["1" if word == "N" else word for word in words])
    for word in words:
        if KEY.match(word):
            check_key(word)
    for option, folder in (("--launch", "launch_configs"), ("--recipe", "recipes")):
        if option in words:
            check_shipped(folder, words[words.index(option) + 1])
    if name in TAKES_RECIPE and words:
        check_shipped("recipes", words[0])


def check_shipped(folder: str, name: str) -> None:
    """A name without a dot or capital letters is that of a shipped file."""
    if name.islower() and "." not in name and "/" not in name:
        find_shipped(folder, name, ".yaml")


def check_key(word: str) -> None:
    key = word.partition("=")[0]
    if key not in ("key", "french", "legal"):
        path = tuple(int(part) if part.isdigit() else part for part in key.split("."))
        assert Schema(recipe_class()).at(path) is not None, f"no such key: {word}"


def smaller(text: str, folder: Path) -> str:
    """The commands with overrides added to each `ptft train`, so that it makes two updates on few rows."""
    return re.sub(
        r"^(ptft (?:train|data inspect) (\S+).*?)((?:\s+#.*)?)$", partial(_smaller, folder), text, flags=re.MULTILINE
    )


def _smaller(folder: Path, match: re.Match[str]) -> str:
    own = folder / match[2]
    recipe = own if own.is_file() else ROOT / f"recipes/{match[2]}.yaml"
    text = re.sub(r" +#.*", "", recipe.read_text())
    return f"{match[1]} {shlex.join([*overrides_of(text), 'log.report=false'])}{match[3]}"


TyperException = typer.TyperException
