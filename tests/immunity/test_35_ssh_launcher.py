"""Immunity 35: several machines are started over ssh by default, and environment variables are written to a file.

`accelerate launch` does that where a DeepSpeed config names no deepspeed_multinode_launcher: it runs `deepspeed` with
pdsh and appends the environment to `.deepspeed_env`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
from in_process import make_recipe
from preloaded_ranks import forked_ptft
from support import ROOT, write_recipe

from ptft_dist.errors import RecipeError
from ptft_dist.launch.environment import check_launch
from ptft_dist.launch.launch_file import read_launch_file
from ptft_dist.launch.local import command, machines

NO_LAUNCHER = """
compute_environment: LOCAL_MACHINE
distributed_type: DEEPSPEED
deepspeed_config: {zero_stage: 2}
num_machines: 2
num_processes: 4
same_network: true
"""


def accelerate_starts(words: list[str], monkeypatch: pytest.MonkeyPatch) -> list[str] | None:
    """The command that Accelerate's launcher would run instead of torchrun; None: it uses torchrun."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_deepspeed_cmd_env

    args: argparse.Namespace = launch_command_parser().parse_args(words[2:])
    args, _, _ = _validate_launch_command(args)
    args.deepspeed_fields_from_accelerate_config = ""
    monkeypatch.setattr("accelerate.utils.launch.is_port_in_use", lambda _port: False)
    started: list[str] | None = prepare_deepspeed_cmd_env(args)[0]
    return started


@pytest.mark.parametrize("name", ["mine.yaml", "zero2", "multi_node_zero3"])
def test_our_command_starts_torchrun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    (tmp_path / "mine.yaml").write_text(NO_LAUNCHER)
    monkeypatch.chdir(tmp_path)
    words = command(read_launch_file(name), 4, machines(2, 1, "10.0.0.1:2345"), ["train", "clm"])
    assert accelerate_starts(words, monkeypatch) is None


def test_the_test_above_can_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a launcher's name, Accelerate starts `deepspeed --launcher pdsh`."""
    (tmp_path / "mine.yaml").write_text(NO_LAUNCHER)
    words = ["accelerate", "launch", "--config_file", str(tmp_path / "mine.yaml"), "--main_process_ip", "10.0.0.1"]
    started = accelerate_starts([*words, "--machine_rank", "0", "-m", "ptft_dist", "train", "clm"], monkeypatch)
    assert started is not None
    assert "pdsh" in started


@pytest.mark.parametrize("launcher", ["pdsh", "openmpi", "nossh", "slurm"])
def test_another_launcher_is_refused_for_several_machines(tmp_path: Path, documents: Path, launcher: str) -> None:
    write_recipe(tmp_path, documents)
    text = NO_LAUNCHER.replace("zero_stage: 2", f"zero_stage: 2, deepspeed_multinode_launcher: {launcher}")
    (tmp_path / "mine.yaml").write_text(text)
    several = ["--machines", "2", "--machine-rank", "0", "--address", "127.0.0.1:2345"]
    done = forked_ptft("train", "recipe.yaml", "--launch", "mine.yaml", *several, cwd=tmp_path)
    assert done.returncode == 2
    assert f"deepspeed_multinode_launcher: {launcher}" in done.stderr
    assert "standard" in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "variables",
    [
        {"RANK": "1", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "CROSS_RANK": "1", "CROSS_SIZE": "2"},  # pdsh, nossh
        {"OMPI_COMM_WORLD_SIZE": "2"},  # MPI: no RANK at all
    ],
)
def test_a_rank_sees_that_another_launcher_started_it(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]
) -> None:
    for key in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(key, raising=False)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
    for key, value in variables.items():
        monkeypatch.setenv(key, value)
    with pytest.raises(RecipeError, match="deepspeed_multinode_launcher: standard"):
        check_launch(make_recipe())


@pytest.mark.parametrize("path", sorted((ROOT / "launch_configs").glob("*zero*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_deepspeed_config_names_the_launcher(path: Path) -> None:
    assert "deepspeed_multinode_launcher: standard" in path.read_text()
