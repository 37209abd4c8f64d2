"""The `ptft` command in a separate process."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import support
import typer

from ptft_dist import __version__
from ptft_dist.cli import VERBS, _hint, command
from ptft_dist.tasks.registry import TASKS

ROOT = Path(__file__).parent.parent

GOOD = """\
task: clm
model: {config: {model_type: llama}}
tokenizer: {train: {vocab_size: 512}}
data: {train: [{source: python-stdlib}]}
batch: {global_size: 1024, micro_size: 8}
train: {max_steps: 3000}
run_dir: run
"""


def python(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def ptft(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return python(folder, "-m", "ptft_dist", *arguments)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "recipe.yaml").write_text(GOOD)
    return tmp_path


def imported(folder: Path, *arguments: str) -> set[str]:
    """The packages that a command has imported at its end."""
    probe = (
        "import atexit, sys; from ptft_dist.cli import main; sys.argv[1:] = sys.argv[1:];"
        "atexit.register(lambda: print(*{name.partition('.')[0] for name in sys.modules}, file=sys.stderr)); main()"
    )
    done = python(folder, "-c", probe, *arguments)
    assert done.returncode == 0, done.stderr
    return set(done.stderr.split())


def test_help_imports_nothing_heavy(folder: Path) -> None:
    packages = imported(folder, "--help")
    assert "typer" in packages  # the probe works
    assert not packages & {"torch", "pydantic", "ruamel", "numpy", "rich", "transformers", "accelerate"}


@pytest.mark.parametrize("arguments", [("check", "recipe.yaml"), ("show", "recipe.yaml"), ("schema",)])
def test_config_imports_no_torch(folder: Path, arguments: tuple[str, ...]) -> None:
    assert not imported(folder, "config", *arguments) & {"torch", "transformers", "accelerate", "deepspeed", "datasets"}


def test_help_and_version(folder: Path) -> None:
    for arguments in ((), ("--help",)):
        done = ptft(folder, *arguments)
        assert done.returncode == 0
        assert {name for name, _, _ in VERBS} <= set(done.stdout.split())
    assert ptft(folder, "--version").stdout == f"ptft {__version__}\n"
    assert "KEY=VALUE" in ptft(folder, "config", "check", "--help").stdout


def test_check(folder: Path) -> None:
    done = ptft(folder, "config", "check", "recipe.yaml", "optim.lr=1e-4")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "recipe.yaml: valid (task clm, 3,000 updates, 1,024 rows an update)\n"
    overrides = ("batch.global_size=", "batch.global_tokens=8192", "train.max_steps=", "train.epochs=0.5")
    done = ptft(folder, "config", "check", "recipe.yaml", *overrides)
    assert done.stdout == "recipe.yaml: valid (task clm, 0.5 epochs, 8,192 tokens an update)\n"


@pytest.mark.parametrize("arguments", [("config", "schema"), ("config", "show", "recipe.yaml")])
def test_a_reader_that_has_seen_enough(folder: Path, arguments: tuple[str, ...]) -> None:
    """As in `ptft config schema | head`; the exit code is that of a process ended by SIGPIPE."""
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "ptft_dist", *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, cwd=folder, env=environment, stdout=writing, stderr=subprocess.PIPE, text=True, timeout=60, check=False
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, "")


def test_show(folder: Path) -> None:
    done = ptft(folder, "config", "show", "recipe.yaml", "optim.lr=1e-4")
    assert (done.returncode, done.stderr) == (0, "")
    assert ["optim.lr", "0.0001", "command", "line"] in [line.split() for line in done.stdout.splitlines()]


def test_schema(folder: Path) -> None:
    schema = json.loads(ptft(folder, "config", "schema").stdout)
    assert schema["$schema"].startswith("https://json-schema.org/")
    assert schema["title"] == "Recipe"
    assert schema["description"]
    assert {"model", "data", "batch", "optim", "train"} <= set(schema["properties"])


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("confg",), 2, "error: No such command 'confg'"),
        (("config", "check"), 2, "error: Missing argument 'RECIPE'"),
        (("config", "check", "recipe.yaml", "--fast"), 2, "error: No such option: --fast"),
        (("config", "check", "missing.yaml"), 2, "error: missing.yaml: no such file"),
        (
            ("config", "check", "recipe.yaml", "optim.lrr=1"),
            2,
            "error: command line: optim.lrr: unknown key; did you mean optim.lr?\n",
        ),
        (
            ("config", "show", "recipe.yaml", "task=x"),
            2,
            f"error: command line: task: expected one of {', '.join(TASKS)}, got 'x'\n",
        ),
        (("config", "check", "recipe.yaml", "data.train=[{path: no/*.txt}]"), 3, "error: data.train"),
    ],
)
def test_a_failure_is_one_message_and_an_exit_code(
    folder: Path, arguments: tuple[str, ...], code: int, message: str
) -> None:
    done = ptft(folder, *arguments)
    assert done.returncode == code
    assert done.stdout == ""
    assert done.stderr.startswith(message)
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--learning_rate", "1e-4"], "KEY=VALUE: optim.lr=1e-4\n"),
        (["--learning-rate=2e-4"], "KEY=VALUE: optim.lr=2e-4\n"),
        (["--max_steps", "5"], "KEY=VALUE: train.max_steps=5\n"),
        (["--optim.lr"], "KEY=VALUE: optim.lr=VALUE\n"),
        (["--lunch", "cpu"], "No such option: --lunch (Possible options: --launch)\n"),
    ],
)
def test_an_option_that_is_a_key_of_the_recipe(words: list[str], says: str) -> None:
    line = ["train", "recipe.yaml", *words]
    with pytest.raises(typer.TyperException) as refused:
        command("train").invoke(command("train").make_context("ptft", line))
    assert f"{refused.value.format_message()}{_hint(refused.value, line)}\n".endswith(says)


def test_long_messages_are_not_wrapped(folder: Path) -> None:
    key = "x" * 300
    assert f"command line: {key}: unknown key" in ptft(folder, "config", "show", "recipe.yaml", f"{key}=1").stderr


@pytest.mark.parametrize(
    "words",
    [
        "report closed/run",
        "compare closed/a closed/b",
        "status closed/run",
        "checkpoints closed/run",
        "tensorboard closed/run",
        "init closed/new",
        "init --data closed/rows.jsonl",
    ],
)
def test_a_directory_of_somebody_else(tmp_path: Path, words: str) -> None:
    (tmp_path / "closed").mkdir(mode=0)
    done = support.ptft(*words.split(), cwd=tmp_path, command=[*support.UNPRIVILEGED, *support.COMMAND])
    assert done.returncode == 2, done.stderr
    denied = r"error: (\S*/)?closed\S*: Permission denied. Change its owner or its mode, or name another path\n"
    assert re.fullmatch(denied, done.stderr)


@pytest.mark.parametrize(
    ("raised", "code", "end"),
    [
        ("KeyboardInterrupt()", 130, ""),
        ("errors.CheckpointError('gone')", 4, "error: gone\n"),
        ("PermissionError(13, 'Permission denied')", 1, "PermissionError: [Errno 13] Permission denied\n"),
        (
            "OSError(30, 'Read-only file system', 'out')",
            2,
            "error: out: Read-only file system. Change its owner or its mode, or name another path\n",
        ),
        ("EOFError('cut short')", 1, "EOFError: cut short\n"),
        ("BrokenPipeError(32, 'worker')", 1, "BrokenPipeError: [Errno 32] worker\n"),
        ("ValueError('a bug')", 1, "ValueError: a bug\n"),
    ],
)
def test_how_a_verb_can_end(folder: Path, raised: str, code: int, end: str) -> None:
    """Unexpected errors keep their traceback, without local variables; expected errors have none."""
    (folder / "verb.py").write_text(
        "import sys\n"
        "from ptft_dist import cli, errors\n"
        "def verb():\n"
        "    password = 'hun' + 'ter2'\n"
        f"    raise {raised}\n"
        "sys.modules['a_module'] = sys.modules['__main__']\n"
        "cli.VERBS = (*cli.VERBS, ('verb', 'a_module', 'verb'))\n"
        "cli.main()\n"
    )
    done = python(folder, "verb.py", "verb")
    assert done.returncode == code
    assert done.stderr.endswith(end) if end else done.stderr == ""
    assert ("Traceback" in done.stderr) == (code == 1)
    assert "hunter2" not in done.stderr
