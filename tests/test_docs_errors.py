"""docs/errors.md: its exit codes are those of the program, and the messages that it quotes are in the code."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator

import pytest
from support import ROOT

from ptft_dist import errors

PAGE = (ROOT / "docs/errors.md").read_text()
QUOTED = re.findall(r"^\| `([^`]+)` \|", PAGE.split("\n## Recipe\n")[1], re.MULTILINE)


@functools.cache
def texts() -> str:
    """Every string of the program, one per line, with ... for what f-strings put in."""
    found = [text for path in (ROOT / "ptft_dist").rglob("*.py") for text in strings(ast.parse(path.read_text()))]
    return "\n".join(" ".join(text.split()) for text in found)


def strings(tree: ast.AST) -> Iterator[str]:
    """All literals but docstrings; `a + b` with a text in it is one text."""
    skipped = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if id(node) not in skipped and isinstance(node, ast.Constant | ast.JoinedStr | ast.BinOp):
            yield shown(node)


def shown(node: ast.AST) -> str:
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr(values=values):
            return "".join(map(shown, values))
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return shown(left) + shown(right)
    return "..."


@pytest.mark.parametrize("message", QUOTED)
def test_a_quoted_message_is_in_the_code(message: str) -> None:
    assert re.search(".*".join(map(re.escape, message.split("..."))), texts()), f"no such message any more: {message}"


def test_there_are_messages_and_one_that_is_not_there_is_noticed() -> None:
    assert len(QUOTED) > 40
    assert "unknown key; did you see ..." not in texts()
    assert texts().count("\n") > 2000


def test_the_exit_codes_are_all_of_those_of_the_program() -> None:
    codes = {int(code) for code in re.findall(r"^\| (\d+) \|", PAGE, re.MULTILINE)}
    classes = (each for each in vars(errors).values() if isinstance(each, type) and issubclass(each, errors.PtftError))
    of_classes = {each.exit_code for each in classes}
    of_names = {value for name, value in vars(errors).items() if name.startswith("EXIT_")}
    assert codes == of_classes | of_names
