"""Immunity 22: each node uses its own rank and the same address as the others; no launch config sets them.

The batch file runs here with stand-ins for Slurm's commands; tests/slurm runs it on a real cluster.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from ruamel.yaml import YAML
from support import ROOT

# Each node is a process with variables of its own, and the file's shell has those of the first.
SRUN = f"""#!{sys.executable}
import os, subprocess, sys
words = sys.argv[1:]
while words[0].startswith("-"):
    words.pop(0)
count = int(os.environ["SLURM_JOB_NUM_NODES"])
for node in reversed(range(count)):
    own = {{"SLURM_NODEID": str(node), "SLURM_NNODES": str(count), "SLURMD_NODENAME": f"node{{node}}"}}
    code = subprocess.run(words, env=os.environ | own).returncode
    assert code == 0, code
"""
PTFT = f"""#!{sys.executable}
import json, os, sys
if sys.argv[1] == "requeue":
    sys.exit(int(sys.argv[3]))
json.dump(sys.argv[1:], open(f"heard-{{os.environ['SLURMD_NODENAME']}}.json", "w"))
"""
SCONTROL = """#!/bin/sh
case "$*" in
  "show hostnames node[0-2]") printf 'node0\\nnode1\\nnode2\\n' ;;
  "--oneliner show node node0") echo "NodeName=node0 Arch=x86_64 CoresPerSocket=1 NodeAddr=10.0.0.5 NodeHostName=a" ;;
  *) exit 1 ;;
esac
"""


def heard(folder: Path, nodes: int, variables: dict[str, str]) -> list[list[str]]:
    """The arguments that the substitute for ptft received on each node."""
    for name, text in (("srun", SRUN), ("ptft", PTFT), ("scontrol", SCONTROL)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    unset = ("SLURM_GPUS_ON_NODE", "PROCESSES_PER_NODE")
    env = {key: value for key, value in os.environ.items() if key not in unset}
    env |= {"PATH": f"{folder}:{os.environ['PATH']}", "SLURM_JOB_ID": "31234", "SLURM_JOB_NUM_NODES": str(nodes)}
    # The rank of the first node, and of a process, stand in the file's own environment too.
    env |= {"SLURM_NODEID": "0", "SLURM_PROCID": "0", "SLURM_JOB_NODELIST": f"node[0-{nodes - 1}]"}
    batch = ["bash", str(ROOT / "slurm/train.sbatch"), "my.yaml", "--launch", "multi_node_ddp"]
    subprocess.run(batch, cwd=folder, env=env | variables, check=True)
    return [json.loads((folder / f"heard-node{node}.json").read_text()) for node in range(nodes)]


@pytest.mark.parametrize(
    ("variables", "processes"),
    [
        ({}, 3),
        ({"SLURM_GPUS_ON_NODE": "8"}, 24),
        ({"PROCESSES_PER_NODE": "2"}, 6),
        ({"SLURM_GPUS_ON_NODE": "8", "PROCESSES_PER_NODE": "4"}, 12),
    ],
)
def test_each_node_says_its_own_rank(tmp_path: Path, variables: dict[str, str], processes: int) -> None:
    words = ["train", "my.yaml", "--launch", "multi_node_ddp", "--processes", str(processes), "--machines", "3"]
    words += ["--address", "10.0.0.5:21234", "--machine-rank"]
    assert heard(tmp_path, 3, variables) == [[*words, "0"], [*words, "1"], [*words, "2"]]


def test_one_node_needs_no_address(tmp_path: Path) -> None:
    words = ["train", "my.yaml", "--launch", "multi_node_ddp", "--processes", "8"]
    assert heard(tmp_path, 1, {"SLURM_GPUS_ON_NODE": "8"}) == [words]


@pytest.mark.parametrize("path", sorted((ROOT / "launch_configs").glob("multi_node_*.yaml")), ids=lambda p: p.stem)
def test_no_launch_config_fixes_the_rank(path: Path) -> None:
    config = YAML(typ="safe").load(path)
    assert "machine_rank" not in config
    assert config["num_machines"] == 2
