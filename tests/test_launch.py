"""Launch configs are stock accelerate configs, DeepSpeed configs hold ZeRO knobs only, and `ptft` starts both."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support import QUIET_MACHINE, eval_rows, start, train_rows, write_recipe

from ptft_dist.config.shipped import shipped
from ptft_dist.errors import RecipeError
from ptft_dist.launch.deepspeed_config import RECIPE_SAYS, read_deepspeed_config
from ptft_dist.launch.local import command, launch_config, machines, own_exit_code

CONFIGS = sorted(path.stem for path in shipped("launch_configs").glob("*.yaml"))
EXPECTED = {
    "single_gpu",
    "multi_gpu",
    "zero1",
    "zero2",
    "zero3",
    "zero3_offload",
    "fsdp2",
    "multi_node_ddp",
    "multi_node_zero2",
    "multi_node_zero3",
    "cpu",
    "cpu_zero1",
    "cpu_zero2",
    "cpu_zero3",
}


def test_all_launch_configs_are_there() -> None:
    assert set(CONFIGS) == EXPECTED


@pytest.mark.parametrize("name", CONFIGS)
def test_stock_accelerate_accepts_the_config(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Accelerate's own launcher reads the file and finds in it what the name says."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser

    monkeypatch.chdir(shipped("launch_configs").parent)
    words = command(name, 4, machines(2, 1, "10.0.0.1:29500") if "node" in name else None, ["train", "clm"])[2:]
    args, _, _ = _validate_launch_command(launch_command_parser().parse_args(words))
    assert args.training_script == "ptft_dist"
    assert args.module
    assert args.num_processes == 4
    assert bool(args.use_deepspeed) == ("zero" in name)
    assert bool(args.use_fsdp) == (name == "fsdp2")
    if "zero" in name:
        stage = int(name.split("zero")[1][0])
        config = json.loads(Path(args.deepspeed_config_file).read_text())
        assert config["zero_optimization"]["stage"] == stage
    if "node" in name:
        assert (args.num_machines, args.machine_rank) == (2, 1)
        assert (args.main_process_ip, args.main_process_port) == ("10.0.0.1", 29500)


@pytest.mark.parametrize("path", sorted(shipped("ds_configs").glob("*.json")), ids=lambda p: p.stem)
def test_shipped_deepspeed_configs_hold_zero_knobs_only(path: Path) -> None:
    assert set(read_deepspeed_config(path)) == {"zero_optimization"}


@pytest.mark.parametrize("key", RECIPE_SAYS)
def test_a_deepspeed_config_may_not_speak_for_the_recipe(key: str, tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 2}, key: {"enabled": True}}))
    with pytest.raises(RecipeError, match=key):
        read_deepspeed_config(path)
    path.write_text(json.dumps({"zero_optimization": {"stage": 2}, key: "auto"}))
    assert key not in read_deepspeed_config(path)


def test_a_launch_config_from_another_folder_finds_the_shipped_deepspeed_config(tmp_path: Path) -> None:
    copy = tmp_path / "mine.yaml"
    copy.write_text((shipped("launch_configs") / "zero3.yaml").read_text())
    _, deepspeed = launch_config(str(copy))
    assert deepspeed == (shipped("ds_configs") / "zero3.json").resolve()


def test_the_exit_code_is_the_ranks_own(tmp_path: Path) -> None:
    result = tmp_path / "result.json"
    assert own_exit_code(0, result, 0.0) == 0
    assert own_exit_code(-9, result, 0.0) == 1
    result.write_text(json.dumps({"exit_code": 75}))
    assert own_exit_code(1, result, 0.0) == 75
    assert own_exit_code(1, result, result.stat().st_mtime + 10) == 1  # of an earlier start


def accelerate_node(rank: int, port: int, recipe: Path, cache: Path, cwd: Path) -> subprocess.Popen[str]:
    """Stock `accelerate launch` with the shipped two-machine config, as node `rank`."""
    words = ["accelerate.commands.launch", "--config_file", str(shipped("launch_configs") / "multi_node_ddp.yaml")]
    words += ["--num_processes", "2", "--machine_rank", str(rank), "--main_process_ip", "127.0.0.1"]
    words += ["--main_process_port", str(port), "-m", "ptft_dist", "train", str(recipe)]
    env = os.environ | QUIET_MACHINE | {"PTFT_CACHE": str(cache)}
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, "-m", *words], cwd=cwd, env=env, stdout=pipe, stderr=pipe, text=True)


def test_two_nodes_on_one_host(tmp_path: Path, documents: Path, cache: Path) -> None:
    """Two launchers with ranks, an address and a port meet, and compute what one process computes."""
    from support import free_port

    recipe = write_recipe(tmp_path, documents)
    alone = start("train", str(recipe), "run_dir=alone", cwd=tmp_path, cache=cache)
    assert alone.wait() == 0, alone.stderr
    port = free_port()
    nodes = [accelerate_node(rank, port, recipe, cache, tmp_path) for rank in (0, 1)]
    for node in nodes:
        _, errors = node.communicate(timeout=120)
        assert node.returncode == 0, errors
    environment = json.loads((tmp_path / "run/environment.json").read_text())
    assert (environment["kind"], environment["world_size"]) == ("ddp", 2)
    for key, get in (("loss", train_rows), ("eval/loss", eval_rows)):
        expected = [row[key] for row in get(tmp_path / "alone")]
        assert [row[key] for row in get(tmp_path / "run")] == pytest.approx(expected, rel=1e-5)
