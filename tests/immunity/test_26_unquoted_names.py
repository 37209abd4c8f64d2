"""Immunity 26: names and values reach the ranks unchanged, also with special characters of a shell or torchrun."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import ROOT, environment, write_recipe

# torchrun makes $ of $$ and fills in ${local_rank}; a shell does the rest.
NASTY = """it's "my" $(touch pwned) `touch pwned` $$ $HOME $local_rank ; & | * \\ ü #"""
MACRO = "${local_rank} $${local_rank}"  # in a recipe's value it would be a reference
PTFT = Path(sys.executable).with_name("ptft")

STAND_IN = """
import json, os, sys
with open(f"heard-{os.environ.get('RANK', '0')}.json", "w") as file:
    json.dump(sys.argv[1:], file)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A working directory in which `python -m ptft_dist`, started as a rank, writes its arguments to a file."""
    (tmp_path / "ptft_dist").mkdir()
    (tmp_path / "ptft_dist/__init__.py").touch()
    (tmp_path / "ptft_dist/__main__.py").write_text(STAND_IN)
    yield tmp_path
    assert not list(tmp_path.rglob("pwned"))


@pytest.mark.parametrize(("kind", "ranks"), [("single_gpu", 1), ("cpu", 2), ("cpu_zero2", 2)])
def test_through_each_of_accelerates_launchers(
    folder: Path, documents: Path, cache: Path, kind: str, ranks: int
) -> None:
    recipe = write_recipe(folder / NASTY / MACRO, documents)
    overrides = [f"run_dir={json.dumps('runs/' + NASTY)}", f"model.config.name={json.dumps(NASTY)}"]
    launch = ["--launch", kind, "--processes", str(ranks), "--accept", NASTY + MACRO]
    env = environment({"PTFT_CACHE": str(cache)})
    done = subprocess.run([PTFT, "train", recipe, *overrides, *launch], cwd=folder, env=env, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    assert (folder / "runs" / NASTY / "logs").is_dir()
    for rank in range(ranks):
        heard = json.loads((folder / f"heard-{rank}.json").read_text())
        assert heard == ["train", str(recipe), *overrides, "--resume", "auto", "--accept", NASTY + MACRO]


def test_through_the_batch_file(folder: Path) -> None:
    """The real batch file in a directory whose name needs quoting; srun and ptft are replaced by scripts."""
    script = folder / NASTY / "train.sbatch"
    script.parent.mkdir()
    shutil.copy(ROOT / "slurm/train.sbatch", script)
    programs = folder / "bin"
    programs.mkdir()
    for name, body in {
        "srun": 'while [ "${1#-}" != "$1" ]; do shift; done; exec "$@"',
        "ptft": f'[ "$1" = requeue ] && exit "$3"; exec {sys.executable} hear.py "$@"',
    }.items():
        (programs / name).write_text(f"#!/bin/sh\n{body}\n")
        (programs / name).chmod(0o755)
    (folder / "hear.py").write_text('import json, sys; json.dump(sys.argv[1:], open("heard.json", "w"))')
    env = os.environ | {"PATH": f"{programs}:{os.environ['PATH']}"}
    env |= {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "1", "SLURM_NNODES": "1", "SLURM_NODEID": "0"}
    words = [f"{NASTY}/recipe.yaml", f"run_dir={NASTY}", "a=\nb"]
    subprocess.run(["bash", script, *words, "--launch", "cpu"], cwd=folder, env=env, check=True)
    heard = json.loads((folder / "heard.json").read_text())
    assert heard == ["train", *words, "--launch", "cpu", "--processes", "1"]
