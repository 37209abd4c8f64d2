"""The DeepSpeed config of a run: accepted JSON files and inline fields, and the resulting config."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support import ROOT

from ptft_dist.engine import planned_kind
from ptft_dist.errors import RecipeError
from ptft_dist.launch.deepspeed_config import (
    check_deepspeed_config,
    find_deepspeed_json,
    inline_deepspeed_config,
    read_deepspeed_config,
    resolve_deepspeed_config,
)
from ptft_dist.launch.deepspeed_keys import TOP, ZERO, Refused, Table

RECIPE_DECIDES = [
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "fp16",
    "bf16",
    "amp",
    "torch_autocast",
    "optimizer",
    "scheduler",
]

# As the guides of Accelerate and transformers print it, but for the optimizer and the scheduler.
GUIDE = {
    "fp16": {
        "enabled": "auto",
        "loss_scale": 0,
        "loss_scale_window": 1000,
        "initial_scale_power": 16,
        "hysteresis": 2,
        "min_loss_scale": 1,
    },
    "bf16": {"enabled": "auto"},
    "zero_optimization": {
        "stage": 3,
        "offload_optimizer": {"device": "cpu", "pin_memory": True},
        "offload_param": {"device": "cpu", "pin_memory": True},
        "overlap_comm": True,
        "contiguous_gradients": True,
        "sub_group_size": 1e9,
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto",
        "stage3_max_live_parameters": 1e9,
        "stage3_max_reuse_distance": 1e9,
        "stage3_gather_16bit_weights_on_model_save": True,
    },
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "wall_clock_breakdown": False,
}


def write(path: Path, config: Any) -> Path:
    path.write_text(json.dumps(config))
    return path


# --- JSON files -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted((ROOT / "ds_configs").glob("*.json")), ids=lambda p: p.stem)
def test_shipped_files_say_only_how_zero_works(path: Path) -> None:
    assert read_deepspeed_config(path) == json.loads(path.read_text())
    assert set(read_deepspeed_config(path)) == {"zero_optimization"}


def test_the_file_of_the_guides_is_accepted(tmp_path: Path) -> None:
    read = read_deepspeed_config(write(tmp_path / "ds.json", GUIDE))
    zero: Any = GUIDE["zero_optimization"]
    kept = {key: value for key, value in zero.items() if key != "stage3_gather_16bit_weights_on_model_save"}
    assert read == {"zero_optimization": kept, "wall_clock_breakdown": False}


@pytest.mark.parametrize("key", RECIPE_DECIDES)
def test_what_the_recipe_decides_is_refused_unless_auto(key: str, tmp_path: Path) -> None:
    zero = {"zero_optimization": {"stage": 2}}
    with pytest.raises(RecipeError, match=f"ds.json: {key}: .*the recipe"):
        read_deepspeed_config(write(tmp_path / "ds.json", zero | {key: {"enabled": True}}))
    for value in ("auto", None, {"enabled": "auto"}):
        assert read_deepspeed_config(write(tmp_path / "ds.json", zero | {key: value})) == zero


def test_loss_scaling_other_than_the_default_is_refused(tmp_path: Path) -> None:
    config = {"zero_optimization": {"stage": 2}, "fp16": {"enabled": "auto", "loss_scale": 128}}
    with pytest.raises(RecipeError, match=r"fp16: the recipe decides this, with train\.precision"):
        read_deepspeed_config(write(tmp_path / "ds.json", config))


@pytest.mark.parametrize(
    ("zero", "message"),
    [
        ({}, 'needs "zero_optimization"'),
        ({"stage": 0}, r"zero_optimization\.stage: 0; expected 1, 2 or 3"),
        ({"stage": True}, r"zero_optimization\.stage: True; expected 1, 2 or 3"),
        ({"stage": 2, "reduce_bucket_size": -1}, "reduce_bucket_size: -1; expected a whole number"),
        ({"stage": 2, "reduce_bucket_size": 1.5}, "reduce_bucket_size: 1.5; expected a whole number"),
        ({"stage": 2, "allgather_bucket_size": "auto"}, "allgather_bucket_size: 'auto'; expected a whole number"),
        ({"stage": 2, "contiguous_gradients": 1}, "contiguous_gradients: 1; expected true or false"),
        ({"stage": 3, "offload_param": "cpu"}, r"zero_optimization\.offload_param: 'cpu'; expected a block"),
        ({"stage": 3, "offload_param": {"device": "gpu"}}, "offload_param.device: 'gpu'; expected none, cpu or nvme"),
        ({"stage": 2, "offload_param": {"device": "cpu"}}, "offload_param.device: cpu: needs stage 3"),
        ({"stage": 2, "offload_optimizer": {"device": "cpu", "ratio": 0.5}}, "a ratio below 1 need stage 3"),
        ({"stage": 3, "offload_optimizer": {"device": "nvme"}}, r"offload_optimizer\.device: nvme: needs nvme_path"),
        ({"stage": 1, "load_from_fp32_weights": False}, "load_from_fp32_weights: false would lose precision"),
    ],
)
def test_values_that_cannot_work(zero: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=message):
        read_deepspeed_config(write(tmp_path / "ds.json", {"zero_optimization": zero}))


def test_a_file_that_is_no_json(tmp_path: Path) -> None:
    (tmp_path / "ds.json").write_text("{zero: 1}")
    with pytest.raises(RecipeError, match=r"ds\.json: the DeepSpeed config is not valid JSON"):
        read_deepspeed_config(tmp_path / "ds.json")


# --- against DeepSpeed's own schema -----------------------------------------------------------------------------------


def names(model: Any) -> set[str]:
    return {field.alias or name for name, field in model.model_fields.items()}


def test_every_zero_key_of_deepspeed_is_accepted_or_refused_with_a_reason() -> None:
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.runtime.config import _REMOVED_ZERO_CONFIG_KEYS
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.runtime.zero.leaf_module_config import DeepSpeedZeroLeafModuleConfig
    from deepspeed.runtime.zero.offload_config import (
        DeepSpeedZeroOffloadOptimizerConfig,
        DeepSpeedZeroOffloadParamConfig,
    )

    assert set(ZERO) == names(DeepSpeedZeroConfig) | set(_REMOVED_ZERO_CONFIG_KEYS)
    assert set(ZERO["offload_param"]) == names(DeepSpeedZeroOffloadParamConfig)  # type: ignore[arg-type]
    assert set(ZERO["offload_optimizer"]) == names(DeepSpeedZeroOffloadOptimizerConfig)  # type: ignore[arg-type]
    assert set(ZERO["leaf_module"]) == names(DeepSpeedZeroLeafModuleConfig)  # type: ignore[arg-type]
    assert set(TOP["comms_logger"]) == names(CommsLoggerConfig)  # type: ignore[arg-type]


def examples(table: Table) -> dict[str, Any]:
    """One accepted value for every key that is passed on."""
    candidates = (True, 1, 0.5, "none", "prefix")
    out: dict[str, Any] = {}
    for key, rule in table.items():
        if isinstance(rule, dict):
            out[key] = examples(rule)
        elif not isinstance(rule, Refused):
            out[key] = next(value for value in candidates if rule.accepts(value))  # type: ignore[union-attr]
    return out


def test_deepspeed_takes_every_key_that_is_passed_on() -> None:
    """With one accepted value for each key, DeepSpeed's own schema finds nothing to object to."""
    from deepspeed.runtime.config import _REMOVED_TOP_LEVEL_CONFIG_KEYS
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    config = examples(TOP)
    config["zero_optimization"]["stage"] = 3
    checked = check_deepspeed_config(config, "ds.json")
    assert checked == config
    assert not set(checked) & set(_REMOVED_TOP_LEVEL_CONFIG_KEYS)
    autos = {key: 1 for key, value in checked["zero_optimization"].items() if value == "auto"}
    DeepSpeedZeroConfig(**(checked["zero_optimization"] | autos))


# --- inline fields ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["1", "2", "3"])
def test_an_inline_stage_is_the_shipped_file(stage: str) -> None:
    shipped = json.loads((ROOT / f"ds_configs/zero{stage}.json").read_text())
    none = {"offload_optimizer_device": "none", "offload_param_device": "none"}
    assert inline_deepspeed_config({"zero_stage": stage} | none, "mine.yaml") == shipped


def test_no_stage_is_accelerates_default() -> None:
    from accelerate.utils import DeepSpeedPlugin

    config = inline_deepspeed_config({}, "mine.yaml")
    assert config["zero_optimization"]["stage"] == DeepSpeedPlugin().zero_stage == 2


def test_inline_offloading() -> None:
    fields = {"zero_stage": "3", "offload_param_device": "nvme", "offload_param_nvme_path": "/nvme"}
    zero = inline_deepspeed_config(fields | {"offload_optimizer_device": "CPU"}, "mine.yaml")["zero_optimization"]
    assert zero["stage"] == 3
    assert zero["offload_param"] == {"device": "nvme", "nvme_path": "/nvme"}
    assert zero["offload_optimizer"] == {"device": "cpu"}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"zero_stage": "0"}, "mine.yaml: zero_stage: 0; expected 1, 2 or 3"),
        ({"zero_stage": "2", "offload_param_device": "cpu"}, "offload_param.device: cpu: needs stage 3"),
        ({"zero_stage": "3", "offload_param_device": "nvme"}, "offload_param.device: nvme: needs nvme_path"),
        (
            {"deepspeed_config_file": "zero1.json", "zero_stage": "3"},
            "zero_stage: 3: no effect together with deepspeed_config_file: zero1.json",
        ),
    ],
)
def test_inline_fields_that_cannot_work(fields: dict[str, str], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        resolve_deepspeed_config(fields, "mine.yaml")


@pytest.mark.parametrize(("part", "processes"), [(2, 3), (8, 4), (2, 1)])
def test_parts_of_machines_divide_the_processes(part: int, processes: int) -> None:
    """DeepSpeed would fail with an assertion without the name of the key, after the group has formed."""
    zero = {"stage": 3, "zero_hpz_partition_size": part}
    with pytest.raises(RecipeError, match=f"zero_hpz_partition_size: {part}: .* multiple of it, not {processes}"):
        planned_kind(processes, {"zero_optimization": zero})
    for fitting in (0, 1, processes):
        assert planned_kind(processes, {"zero_optimization": {**zero, "zero_hpz_partition_size": fitting}}) == "zero3"


# --- where a file is found --------------------------------------------------------------------------------------------


def test_a_named_file_from_the_current_directory_beside_the_launch_config_or_shipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("here", "beside"):
        (tmp_path / folder).mkdir()
    monkeypatch.chdir(tmp_path / "here")
    beside = write(tmp_path / "beside/mine.json", {})
    assert find_deepspeed_json("mine.json", "mine.yaml", tmp_path / "beside") == beside
    here = write(tmp_path / "here/mine.json", {})
    assert find_deepspeed_json("mine.json", "mine.yaml", tmp_path / "beside") == here
    assert find_deepspeed_json("ds_configs/zero3.json", "mine.yaml") == ROOT / "ds_configs/zero3.json"
    with pytest.raises(RecipeError, match=r"mine\.yaml: deepspeed_config_file: other/zero3\.json: no such file"):
        find_deepspeed_json("other/zero3.json", "mine.yaml")
