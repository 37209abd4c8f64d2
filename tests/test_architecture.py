"""The arrows of docs/architecture.md, read from the imports themselves."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "ptft_dist"

# Room -> rooms it may import. A room is a module or a package directly below ptft_dist.
MAY_IMPORT = {
    "errors": set(),
    "config": {"errors"},
    "reporting": {"config", "errors", "launch"},
    "launch": {"config", "errors"},
    "data": {"config", "errors"},
    "engine": {"config", "errors"},
    "checkpoint": {"config", "errors"},
    "networks": {"checkpoint", "config", "data", "engine", "errors", "training"},
    "tasks": {"config", "data", "errors"},
    "training": {"checkpoint", "config", "data", "engine", "errors", "reporting", "tasks"},
    "session": None,
    "api": None,
    "cli": None,
    "__main__": {"cli"},
}


def modules() -> list[Path]:
    return sorted(p for p in PACKAGE.rglob("*.py") if p != PACKAGE / "__init__.py")


def imports(path: Path) -> Iterator[str]:
    """Full names of all modules that a file imports, in functions too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide the arrows"
            yield f"{node.module}"


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def test_every_room_is_on_the_plan() -> None:
    assert {room(path) for path in modules()} == set(MAY_IMPORT)


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_arrows_point_one_way(path: Path) -> None:
    allowed = MAY_IMPORT[room(path)]
    for name in imports(path):
        parts = name.split(".")
        if parts[0] != "ptft_dist" or len(parts) == 1 or parts[1] == room(path):
            continue
        assert parts[1] not in ("cli", "api", "session") or room(path) in ("cli", "api", "session", "__main__"), (
            f"{path} imports {name}"
        )
        assert allowed is None or parts[1] in allowed, f"{path} imports {name}"


def test_only_the_engine_speaks_accelerate_and_deepspeed() -> None:
    speakers = {
        room(path) for path in modules() for name in imports(path) if name.split(".")[0] in ("accelerate", "deepspeed")
    }
    assert speakers == {"engine"}


def test_the_loop_is_short_and_the_only_one() -> None:
    assert len((PACKAGE / "training/trainer.py").read_text().splitlines()) < 250
    callers = {room(path) for path in modules() for node in ast.walk(ast.parse(path.read_text())) if is_backward(node)}
    assert callers == {"training", "engine"}


def is_backward(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "backward"


@pytest.mark.parametrize("verb", [["--help"], ["train", "--help"], ["config", "check", "clm"], ["config", "schema"]])
def test_the_login_node_is_light(verb: list[str]) -> None:
    probe = (
        "import sys; sys.argv = ['ptft', *sys.argv[1:]]\n"
        "from ptft_dist.cli import main\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "assert not {'torch', 'transformers', 'accelerate', 'deepspeed'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", probe, *verb], check=True, capture_output=True, cwd=ROOT)
