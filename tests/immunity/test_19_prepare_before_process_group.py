"""19: ranks that tokenize within a process group run into its timeout. Here they tokenize before it exists.

Any number of processes may ask for the same data at once: one prepares them, the others wait on its lock, then open.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
from prepare_support import prepare

import ptft_dist.data
from ptft_dist.config.recipe import Recipe
from ptft_dist.tasks.registry import recipe_class

# The first process stops in the middle of its work until it is told to go on; so the order of events is certain.
PREPARE = """
import sys
from pathlib import Path
from ptft_dist.data import stream
from ptft_dist.data import prepare as module
from ptft_dist.reporting.messages import show_messages
from ptft_dist.tasks.registry import encoder_class, recipe_class

show_messages()
write = stream.write

def pause_and_write(*args, **kwargs):
    print("working", flush=True)
    sys.stdin.readline()
    return write(*args, **kwargs)

stream.write = pause_and_write
recipe = recipe_class().model_validate_json(sys.argv[1])
prepared = module.prepare(recipe, Path(sys.argv[2]), encoder_class(recipe.task))
print(prepared.from_cache, prepared.fingerprint, prepared.train.row(0).input_ids.tolist(), flush=True)
"""


def make_recipe() -> Recipe:
    return recipe_class().model_validate(
        {
            "task": "clm",
            "model": {"config": {"model_type": "llama"}},
            "tokenizer": {"train": {"vocab_size": 270}},
            "data": {"train": [{"path": "text.txt", "document": "line"}], "max_length": 8, "cache_dir": "cache"},
            "batch": {"global_size": 1, "micro_size": 1},
            "train": {"max_steps": 1},
            "run_dir": "run",
        }
    )


def start(base: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", PREPARE, make_recipe().model_dump_json(exclude_unset=True), str(base)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, env=os.environ)


def wait_for_line(process: subprocess.Popen[str], text: str) -> None:
    """Read stderr up to a line with this text. Two waiting processes may have waited for each other before."""
    assert process.stderr is not None
    lines = []
    for line in iter(process.stderr.readline, ""):
        lines.append(line)
        if text in line:
            return
    raise AssertionError(f"the process ended without {text!r}:\n{''.join(lines)}")


@pytest.mark.timeout(180)  # a process that waits without a word is not waited for
def test_one_process_prepares_and_the_others_wait(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("\n".join(f"this is line {i}" for i in range(100)))
    first = start(tmp_path)
    assert first.stdout is not None
    assert first.stdout.readline() == "working\n"
    others = [start(tmp_path) for _ in range(2)]
    for other in others:  # they say whom they wait for, before the first is done
        wait_for_line(other, f"waiting for process {first.pid}, which prepares the same data")

    answers = [process.communicate("go on\n", timeout=120)[0].split(maxsplit=1) for process in (first, *others)]

    assert [process.returncode for process in (first, *others)] == [0, 0, 0]
    assert [from_cache for from_cache, _ in answers] == ["False", "True", "True"]
    assert len({rest for _, rest in answers}) == 1
    assert len(list((tmp_path / "cache/stores").glob("*/"))) == 1


@pytest.mark.timeout(180)
def test_when_the_first_is_killed_a_waiting_one_takes_over(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("\n".join(f"this is line {i}" for i in range(100)))
    first = start(tmp_path)
    assert first.stdout is not None
    assert first.stdout.readline() == "working\n"
    second = start(tmp_path)
    wait_for_line(second, f"waiting for process {first.pid}")
    first.kill()
    first.communicate()

    answer, _ = second.communicate("go on\n", timeout=120)

    assert answer.split()[:2] == ["working", "False"]
    assert list((tmp_path / "cache").rglob("*.building-*")) == []
    assert prepare(make_recipe(), tmp_path).from_cache


def test_preparing_knows_no_process_group() -> None:
    imported = set()
    for file in Path(next(iter(ptft_dist.data.__path__))).glob("*.py"):
        if file.name in {"sources.py", "formats.py", "tokenizer.py", "store.py", "encode.py", "prepare.py", "cache.py"}:
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Import):
                    imported |= {name.name.split(".")[0] for name in node.names}
                elif isinstance(node, ast.ImportFrom) and node.module:
                    imported.add(node.module.split(".")[0])
    assert {"numpy", "filelock"} <= imported
    assert not imported & {"torch", "accelerate", "deepspeed"}
