"""The dependencies in docs/architecture.md, checked against the imports."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "ptft_dist"
TASK_NAMES = sorted(path.parent.name for path in PACKAGE.glob("tasks/*/task.py"))

# Package (or module directly below ptft_dist) -> the packages that it may import.
MAY_IMPORT = {
    "errors": set(),
    "signals": set(),
    "config": {"errors"},
    "converting": {"config", "errors"},
    "launch": {"config", "errors", "signals"},
    "reporting": {"config", "errors", "launch"},
    "engine": {"config", "errors"},
    "checkpoint": {"config", "errors"},
    "networks": {"config", "errors"},
    "data": {"config", "errors", "reporting", "signals"},
    "rl": {"config", "data", "errors", "networks"},
    "tasks": {"config", "data", "errors", "networks", "rl"},
    "training": {"checkpoint", "config", "data", "engine", "errors", "reporting", "rl", "tasks", "signals"},
    "session": {
        "checkpoint",
        "config",
        "data",
        "engine",
        "errors",
        "launch",
        "networks",
        "reporting",
        "tasks",
        "training",
    },
    "pages": {"config", "data", "errors", "launch", "reporting"},
    "failures": {"config", "engine", "errors", "launch", "reporting"},
    "run": {
        "checkpoint",
        "config",
        "engine",
        "errors",
        "failures",
        "launch",
        "networks",
        "pages",
        "reporting",
        "session",
        "training",
    },
    "api": {
        "checkpoint",
        "config",
        "converting",
        "data",
        "errors",
        "exporting",
        "hub",
        "inference",
        "judging",
        "launch",
        "networks",
        "pages",
        "reporting",
        "run",
        "tasks",
    },
    "doctor": {"config", "data", "engine", "errors", "launch", "slurm"},
    "starter": {"config", "data", "errors", "launch", "tasks"},
    "judging": {
        "config",
        "data",
        "engine",
        "errors",
        "inference",
        "launch",
        "networks",
        "reporting",
        "run",
        "session",
        "tasks",
        "training",
    },
    "inference": {"data", "errors", "networks", "reporting", "tasks"},
    "hub": {"config", "data", "errors", "networks"},
    "exporting": {
        "checkpoint",
        "config",
        "data",
        "engine",
        "errors",
        "networks",
        "reporting",
        "run",
        "session",
        "tasks",
    },
    "runs": {"api", "config", "errors", "launch", "reporting", "signals", "slurm"},
    "slurm": {"config", "data", "errors", "hub", "launch", "tasks"},
    "cli": None,
    "__main__": {"cli"},
}
SHARED_BY_TASKS = {"common", "protocol", "registry"}


def modules() -> list[Path]:
    return sorted(p for p in PACKAGE.rglob("*.py") if p != PACKAGE / "__init__.py")


def imports(path: Path) -> Iterator[str]:
    """The full names of all modules that a file imports, also within functions."""
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
        assert allowed is None or parts[1] in allowed, f"{path} imports {name}"


def test_only_the_engine_speaks_accelerate_and_deepspeed() -> None:
    """Except for Accelerate's command line, which `ptft train --launch` runs."""
    speakers = {
        room(path)
        for path in modules()
        for name in imports(path)
        if name.split(".")[0] in ("accelerate", "deepspeed") and name != "accelerate.commands.launch"
    }
    assert speakers == {"engine"}


def test_the_loop_is_short_and_the_only_one() -> None:
    assert len((PACKAGE / "training/trainer.py").read_text().splitlines()) < 300
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


def test_no_task_imports_another() -> None:
    for path in modules():
        parts = path.relative_to(PACKAGE).parts
        if parts[0] != "tasks" or len(parts) < 3 or parts[1] in SHARED_BY_TASKS:
            continue
        for name in imports(path):
            if name.startswith("ptft_dist.tasks."):
                assert name.split(".")[2] in {parts[1], "common", "protocol"}, f"{path} imports {name}"


def test_no_module_outside_of_tasks_names_a_task() -> None:
    """A new task is a folder and a line in the registry. Help texts may name a shipped recipe as an example."""
    from ptft_dist.tasks.registry import TASKS

    for path in modules():
        if room(path) in ("tasks", "cli"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                words = set(re.findall(r"[a-z_0-9]+", node.value)) if "\n" not in node.value else set()
                unusual = {name for name in TASKS if name not in ("classification", "regression", "reward")}
                assert not words & unusual, f"{path}:{node.lineno}: {node.value!r}"


@pytest.mark.parametrize("task", TASK_NAMES)
def test_a_task_is_a_folder(task: str) -> None:
    folder = PACKAGE / "tasks" / task
    assert {"settings.py", "task.py"} <= {path.name for path in folder.iterdir()}
    light = subprocess.run(
        [sys.executable, "-c", f"import sys, ptft_dist.tasks.{task}.settings; assert 'torch' not in sys.modules"],
        check=False,
        cwd=ROOT,
    )
    assert light.returncode == 0
