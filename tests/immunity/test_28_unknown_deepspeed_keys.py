"""Immunity 28: keys of the DeepSpeed JSON that are misspelled, have no effect, or change the mathematics."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from preloaded_ranks import forked_ptft
from support import start, write_recipe

from ptft_dist.errors import RecipeError
from ptft_dist.launch.deepspeed_config import read_deepspeed_config


def refusal(path: Path, config: Any) -> str:
    path.write_text(config if isinstance(config, str) else json.dumps(config))
    with pytest.raises(RecipeError) as raised:
        read_deepspeed_config(path)
    return str(raised.value)


TYPOS = {
    "zero_optimisation": "zero_optimization",
    "comms_loger": "comms_logger",
    "overlap_comm": "zero_optimization.overlap_comm",  # on the wrong level
}
ZERO_TYPOS = {"overlap_com": "overlap_comm", "stage3_max_live_parameter": "stage3_max_live_parameters"}


@pytest.mark.parametrize(("typo", "meant"), TYPOS.items())
def test_a_misspelt_key_gets_the_nearest(tmp_path: Path, typo: str, meant: str) -> None:
    message = refusal(tmp_path / "ds.json", {"zero_optimization": {"stage": 2}, typo: True})
    assert f"{typo}: unknown key; did you mean {meant}?" in message


@pytest.mark.parametrize(("typo", "meant"), ZERO_TYPOS.items())
def test_a_misspelt_key_inside_a_block_gets_the_nearest(tmp_path: Path, typo: str, meant: str) -> None:
    message = refusal(tmp_path / "ds.json", {"zero_optimization": {"stage": 3, typo: 1}})
    assert f"zero_optimization.{typo}: unknown key; did you mean zero_optimization.{meant}?" in message


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("gradient_allreduce_op", "sum"),
        ("gradient_predivide_factor", 2.0),
        ("prescale_gradients", True),
        ("tensor_parallel", {"autotp_size": 2}),
        ("sequence_parallel_size", 2),
        ("expert_parallel", {"enabled": True}),
        ("checkpoint", {"load_universal": True}),
        ("checkpoint", {"writer": {"type": "fast", "decoupled": True}}),
        ("communication_data_type", "bf16"),
    ],
)
def test_what_changes_the_mathematics_or_the_checkpoints_is_refused(tmp_path: Path, key: str, value: Any) -> None:
    message = refusal(tmp_path / "ds.json", {"zero_optimization": {"stage": 2}, key: value})
    assert f"{tmp_path / 'ds.json'}: {key}: " in message
    assert "unknown" not in message


@pytest.mark.parametrize("key", ["zenflow", "zero_quantized_gradients", "zero_quantized_weights"])
def test_the_same_inside_zero_optimization(tmp_path: Path, key: str) -> None:
    message = refusal(tmp_path / "ds.json", {"zero_optimization": {"stage": 2, key: True}})
    assert f"zero_optimization.{key}: " in message
    assert "unknown" not in message


@pytest.mark.parametrize(
    ("key", "value", "instead"),
    [
        ("activation_checkpointing", {"partition_activations": True}, "model.gradient_checkpointing"),
        ("compile", {"deepcompile": True}, "model.compile"),
        ("data_efficiency", {"enabled": True}, "remove"),
        ("autotuning", {"enabled": True}, "remove"),
        ("steps_per_print", 10, "remove"),
    ],
)
def test_a_key_without_effect_names_what_has_one(tmp_path: Path, key: str, value: Any, instead: str) -> None:
    message = refusal(tmp_path / "ds.json", {"zero_optimization": {"stage": 2}, key: value})
    assert f"{key}: no effect here; " in message
    assert instead in message


def test_removed_keys_are_those_of_deepspeed(tmp_path: Path) -> None:
    from deepspeed.runtime.config import _REMOVED_TOP_LEVEL_CONFIG_KEYS, _REMOVED_ZERO_CONFIG_KEYS

    removed = {key: {"enabled": True} for key in _REMOVED_TOP_LEVEL_CONFIG_KEYS}
    zero = {"stage": 3} | dict.fromkeys(_REMOVED_ZERO_CONFIG_KEYS, 4)
    message = refusal(tmp_path / "ds.json", {"zero_optimization": zero} | removed)
    for key in (*removed, *(f"zero_optimization.{key}" for key in _REMOVED_ZERO_CONFIG_KEYS)):
        assert f"{key}: DeepSpeed has removed " in message, key


def test_all_problems_come_in_one_message(tmp_path: Path) -> None:
    config = {"zero_optimization": {"stage": 2, "overlap_comm": "yes", "stagee": 1}, "gradient_clipping": 1.0, "xyz": 1}
    message = refusal(tmp_path / "ds.json", config)
    for part in ("zero_optimization.overlap_comm: 'yes'", "zero_optimization.stagee", "gradient_clipping", "xyz"):
        assert part in message


def test_a_key_that_stands_twice_is_refused(tmp_path: Path) -> None:
    text = '{"zero_optimization": {"stage": 2, "overlap_comm": true, "overlap_comm": false}}'
    assert "overlap_comm: this key is given twice" in refusal(tmp_path / "ds.json", text)


LAUNCH = """
distributed_type: DEEPSPEED
num_processes: 2
gpu_ids: '-1,-1'
deepspeed_config: {deepspeed_config_file: ds.json}
"""


def test_before_the_group_forms_with_exit_code_2(tmp_path: Path, documents: Path, cache: Path) -> None:
    """With `ptft train --launch` no rank starts; under another launcher a rank exits before the process group forms."""
    write_recipe(tmp_path, documents)
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 2, "mics_shard_size": 2}}))
    (tmp_path / "mine.yaml").write_text(LAUNCH)
    done = forked_ptft("train", "recipe.yaml", "--launch", "mine.yaml", cwd=tmp_path, env={"PTFT_CACHE": str(cache)})
    assert done.returncode == 2, done.stderr
    assert "ds.json: zero_optimization.mics_shard_size: " in done.stderr
    rank = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    rank |= {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(path)}
    alone = start("train", "recipe.yaml", cwd=tmp_path, cache=cache, env=rank)  # rank 1 never comes
    assert alone.wait() == 2, alone.stderr
    assert f"{path}: zero_optimization.mics_shard_size: " in alone.stderr
