"""Immunity 27: Accelerate enables parallelism from a launch config although every rank reads other rows.

Accelerate builds a ParallelismConfig from the variables PARALLELISM_CONFIG_*, which `accelerate launch` sets. Tensor,
context and sequence parallelism would need ranks that share their rows.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from in_process import make_recipe
from preloaded_ranks import forked_ptft, preloaded_ptft
from support import environment, write_recipe

from ptft_dist.errors import RecipeError
from ptft_dist.launch.environment import check_launch

ON = {"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}


def check(monkeypatch: pytest.MonkeyPatch, **variables: str) -> None:
    for key in [key for key in os.environ if key.startswith(("PARALLELISM_CONFIG_", "ACCELERATE_", "FSDP_"))]:
        monkeypatch.delenv(key)
    for key, value in variables.items():
        monkeypatch.setenv(key, value)
    check_launch(make_recipe())


@pytest.mark.parametrize("size", ["tp_size", "cp_size", "sp_size", "dp_replicate_size", "dp_shard_size"])
def test_a_size_above_one_is_refused_by_name(monkeypatch: pytest.MonkeyPatch, size: str) -> None:
    with pytest.raises(RecipeError, match=f"{size}: 2"):
        check(monkeypatch, **ON, **{f"PARALLELISM_CONFIG_{size.upper()}": "2"})


def test_sizes_of_one_and_unused_variables_are_no_parallelism(monkeypatch: pytest.MonkeyPatch) -> None:
    check(monkeypatch, **ON, PARALLELISM_CONFIG_TP_SIZE="1", PARALLELISM_CONFIG_CP_SIZE="1")
    check(monkeypatch, PARALLELISM_CONFIG_TP_SIZE="2")  # Accelerate reads it only when told to use it


CONTEXT_PARALLEL = """
compute_environment: LOCAL_MACHINE
distributed_type: FSDP
fsdp_config: {fsdp_version: 2, fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP, fsdp_reshard_after_forward: true}
num_machines: 1
num_processes: 2
same_network: true
gpu_ids: '-1,-1'
parallelism_config:
  parallelism_config_cp_size: 2
  parallelism_config_cp_comm_strategy: allgather
"""


def test_through_our_launcher_nothing_starts(tmp_path: Path, documents: Path, cache: Path) -> None:
    write_recipe(tmp_path, documents)
    (tmp_path / "cp.yaml").write_text(CONTEXT_PARALLEL)
    done = forked_ptft("train", "recipe.yaml", "--launch", "cp.yaml", cwd=tmp_path, env={"PTFT_CACHE": str(cache)})
    assert done.returncode == 2
    assert "cp.yaml: parallelism_config: cp_size: 2" in done.stderr
    assert not (tmp_path / "run").exists()


def test_through_stock_accelerate_launch(tmp_path: Path, documents: Path, cache: Path) -> None:
    recipe = write_recipe(tmp_path, documents)
    (tmp_path / "cp.yaml").write_text(CONTEXT_PARALLEL)
    words = ["accelerate.commands.launch", "--config_file", "cp.yaml", "--main_process_port", "0"]
    done = subprocess.run(
        [preloaded_ptft() / "python", "-m", *words, "-m", "ptft_dist", "train", str(recipe)],
        cwd=tmp_path,
        env=environment({"PTFT_CACHE": str(cache)}),
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    assert "cp_size: 2" in done.stderr
    assert not (tmp_path / "run/metrics.jsonl").exists()
