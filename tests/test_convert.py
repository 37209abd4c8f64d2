"""Configurations of other trainers become recipes: the expected values are worked out by hand."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from adapt_support import write_base
from ruamel.yaml import YAML
from support import environment, start, train_rows
from tiny import made, preferred, write_rows

from ptft_dist.api import convert, load_recipe
from ptft_dist.config.other_trainers import foreign_settings
from ptft_dist.config.shipped import shipped
from ptft_dist.converting import model_rules, training_rules  # noqa: F401
from ptft_dist.converting.draft import trainers
from ptft_dist.converting.rules import RULES
from ptft_dist.errors import RecipeError

AXOLOTL = """\
base_model: tiny
model_type: AutoModelForCausalLM
tokenizer_type: AutoTokenizer
load_in_8bit: false
load_in_4bit: true
adapter: qlora
strict: false
datasets:
  - path: rows.jsonl
    type: alpaca
val_set_size: 0.1
output_dir: ./outputs/qlora
sequence_len: 48
sample_packing: true
pad_to_sequence_len: true
lora_r: 8
lora_alpha: 4
lora_dropout: 0.05
lora_target_linear: true
gradient_accumulation_steps: 3
micro_batch_size: 2
num_epochs: 4
optimizer: paged_adamw_32bit
lr_scheduler: cosine
cosine_min_lr_ratio: 0.1
learning_rate: 0.0002
train_on_inputs: false
bf16: auto
tf32: false
gradient_checkpointing: true
logging_steps: 1
flash_attention: false
warmup_steps: 10
evals_per_epoch: 4
saves_per_epoch: 1
weight_decay: 0.0
deepspeed: deepspeed_configs/zero3_bf16.json
wandb_project:
made_up: 3
"""
TRL = """\
model_name_or_path: tiny
dataset_name: rows.jsonl
learning_rate: 2.0e-4
num_train_epochs: 2
per_device_train_batch_size: 4
gradient_accumulation_steps: 2
lr_scheduler_type: cosine_with_min_lr
lr_scheduler_kwargs: {min_lr_rate: 0.2}
warmup_ratio: 0.05
max_length: 48
packing: true
bf16: false
use_peft: true
lora_r: 4
lora_target_modules: [q_proj, v_proj]
eval_strategy: "no"
save_steps: 20
save_total_limit: 3
assistant_only_loss: true
report_to: [wandb, tensorboard]
seed: "7"
output_dir: runs/trl
"""
FACTORY = """\
### model
model_name_or_path: tiny
trust_remote_code: true
### method
stage: sft
do_train: true
finetuning_type: lora
lora_rank: 8
lora_target: all
deepspeed: ds.json
### dataset
dataset: mine
dataset_dir: data
template: llama3
cutoff_len: 48
max_samples: 40
overwrite_cache: true
preprocessing_num_workers: 16
### output
output_dir: saves/lora
logging_steps: 10
save_steps: 500
plot_loss: true
### train
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 1.0e-4
num_train_epochs: 3.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: false
val_size: 0.1
eval_strategy: steps
eval_steps: 500
"""
INFO: dict[str, Any] = {
    "mine": {"file_name": "rows.jsonl", "columns": {"prompt": "instruction", "query": "input", "response": "answer"}},
    "turns": {
        "file_name": "turns.jsonl",
        "formatting": "sharegpt",
        "columns": {"messages": "messages"},
        "tags": {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"},
    },
    "shared": {"hf_hub_url": "org/shared", "subset": "en", "formatting": "sharegpt"},
    "pairs": {
        "file_name": "pairs.jsonl",
        "ranking": True,
        "formatting": "sharegpt",
        "columns": {"messages": "conversations", "chosen": "good", "rejected": "bad"},
    },
    "texts": {"file_name": "c4.jsonl", "columns": {"prompt": "body"}},
}


def converted(folder: Path, text: str, *overrides: str, **options: Any) -> dict[str, Any]:
    """The recipe of a configuration in `folder`, which has to be valid; `reports` keeps the report."""
    (folder / "theirs.yaml").write_text(text)
    report, mistakes = convert(folder / "theirs.yaml", folder / "recipe.yaml", overrides, **options)
    assert mistakes == ""
    values: dict[str, Any] = YAML(typ="safe", pure=True).load((folder / "recipe.yaml").read_text())
    given = set(YAML(typ="safe", pure=True).load(text)) - {"wandb_project"}  # null
    assert given <= set(report.converted) | set(report.lost)  # nothing is silent
    for name, why in report.lost.items():
        assert f"#   {name}: {why}" in (folder / "recipe.yaml").read_text()
    reports[folder] = report
    return values


reports: dict[Path, Any] = {}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    """A tiny Llama with a tokenizer and a chat template."""
    return write_base(tmp_path_factory.mktemp("base"), cache, "sft")


def trains(folder: Path, cache: Path, *overrides: str) -> None:
    """Two updates of the converted recipe."""
    (run_dir,) = [line.split()[-1] for line in (folder / "recipe.yaml").read_text().splitlines() if "run_dir:" in line]
    words = ["train.epochs=null", "train.max_steps=2", "train.precision=fp32", "log.report=false", "log.every=1"]
    words += overrides
    run = start("train", "recipe.yaml", *words, cwd=folder, cache=cache)
    assert run.wait() == 0, run.stderr
    assert len(train_rows(folder / run_dir)) == 2


def instructions(folder: Path, answer: str = "output") -> None:
    folder.mkdir(exist_ok=True)
    rows = [{"instruction": "say a", "input": "", answer: f"a b c {i}"} for i in range(60)]
    write_rows(folder / "rows.jsonl", rows)


def test_qlora_of_axolotl(tmp_path: Path, tiny: Path, cache: Path) -> None:
    instructions(tmp_path)
    recipe = converted(tmp_path, AXOLOTL, f"model.path={tiny}", processes=4)
    assert recipe == {
        "task": "sft",
        "model": {
            "path": str(tiny),
            "quantize": {"type": "nf4"},
            "adapt": {"lora": {"r": 8, "alpha": 4, "dropout": 0.05, "targets": "all-linear"}},
            "gradient_checkpointing": True,
        },
        "data": {"train": [{"path": "rows.jsonl"}], "validation": 0.1, "max_length": 48},
        "sft": {"shape": "alpaca", "packing": True, "too_long": "drop"},
        "batch": {"global_size": 2 * 3 * 4, "micro_size": 2},
        "optim": {
            "name": "paged_adamw",
            "schedule": "cosine",
            "min_lr_ratio": 0.1,
            "lr": 0.0002,
            "warmup": 10,
            "weight_decay": 0.0,
            "betas": [0.9, 0.999],
        },
        "train": {"epochs": 4, "precision": "bf16", "seed": 42},
        "log": {"every": 1},
        "run_dir": "./outputs/qlora",
    }
    report = reports[tmp_path]
    assert report.trainer == "axolotl"
    assert report.launch == "zero3"
    assert "number of updates" in report.lost["evals_per_epoch"]
    assert report.lost["made_up"] == "ptft does not know this name"
    trains(tmp_path, cache, "model.quantize=null", "model.gradient_checkpointing=false", "optim.name=adamw")


def test_lora_of_trl(tmp_path: Path, tiny: Path, cache: Path) -> None:
    instructions(tmp_path)
    recipe = converted(tmp_path, TRL, f"model.path={tiny}", processes=2)
    assert recipe == {
        "task": "sft",
        "model": {
            "path": str(tiny),
            "adapt": {"lora": {"r": 4, "targets": ["q_proj", "v_proj"], "alpha": 32, "dropout": 0.05}},
            "gradient_checkpointing": True,
        },
        "data": {"train": [{"path": "rows.jsonl"}], "max_length": 48},
        "sft": {"packing": True},
        "batch": {"micro_size": 4, "global_size": 4 * 2 * 2},
        "optim": {
            "lr": 2e-4,
            "schedule": "cosine",
            "min_lr_ratio": 0.2,
            "warmup": 0.05,
            "weight_decay": 0.0,
            "betas": [0.9, 0.999],
        },
        "train": {"epochs": 2, "precision": "fp32", "seed": 7},
        "save": {"every": 20, "keep": 3},
        "log": {"every": 10},
        "run_dir": "runs/trl",
    }
    trains(tmp_path, cache, "batch.global_size=4")


def test_lora_of_llama_factory(tmp_path: Path, tiny: Path, cache: Path) -> None:
    instructions(tmp_path / "data", "answer")
    (tmp_path / "data/dataset_info.json").write_text(json.dumps(INFO))
    (tmp_path / "ds.json").write_text(json.dumps({"zero_optimization": {"stage": 2}}))
    recipe = converted(tmp_path, FACTORY, f"model.path={tiny}", "model.trust_remote_code=false")
    source = {"path": "data/rows.jsonl", "fields": {"output": "answer"}, "limit": 40}
    assert recipe["data"] == {"train": [source], "max_length": 48, "validation": 0.1}
    assert recipe["sft"] == {"shape": "alpaca"}
    assert recipe["model"]["adapt"] == {"lora": {"r": 8, "targets": "all-linear"}}
    assert recipe["batch"] == {"micro_size": 1, "global_size": 8}
    assert recipe["optim"]["warmup"] == 0.1
    assert recipe["eval"] == {"every": 500}
    assert recipe["save"] == {"every": 500}
    assert reports[tmp_path].launch == "zero2"
    assert "tokenizer's own template" in reports[tmp_path].lost["template"]
    trains(tmp_path, cache, "eval.every=null")


@pytest.mark.parametrize(
    ("stage", "name", "task", "source", "shape"),
    [
        ("sft", "turns", "sft", {"path": "data/turns.jsonl"}, "messages"),
        ("sft", "shared", "sft", {"hub": "org/shared", "config": "en"}, "sharegpt"),
        (
            "dpo",
            "pairs",
            "dpo",
            {"path": "data/pairs.jsonl", "fields": {"chosen": "good", "rejected": "bad"}},
            "sharegpt",
        ),
        (
            "rm",
            "pairs",
            "reward",
            {"path": "data/pairs.jsonl", "fields": {"chosen": "good", "rejected": "bad"}},
            "sharegpt",
        ),
        ("pt", "texts", "clm", {"path": "data/c4.jsonl", "field": "body"}, None),
    ],
)
def test_data_sets_of_llama_factory(
    tmp_path: Path, stage: str, name: str, task: str, source: dict[str, Any], shape: str | None
) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data/dataset_info.json").write_text(json.dumps(INFO))
    text = FACTORY.replace("stage: sft", f"stage: {stage}").replace("dataset: mine", f"dataset: {name}")
    recipe = converted(tmp_path, text)
    assert recipe["task"] == task
    assert recipe["data"]["train"] == [source | {"limit": 40}]
    assert recipe.get(task, {}).get("shape") == shape


def test_two_data_sets_of_llama_factory_and_one_that_is_not_described(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data/dataset_info.json").write_text(json.dumps(INFO))
    recipe = converted(tmp_path, FACTORY.replace("dataset: mine", "dataset: shared,unknown"))
    assert recipe["data"]["train"][1] == {"path": "data/unknown.json", "limit": 40}
    assert "shape" not in recipe.get("sft", {})
    assert "unknown: data/dataset_info.json does not say what it is" in reports[tmp_path].remarks[0]


@pytest.mark.parametrize(
    ("entry", "source", "task", "shape"),
    [
        ("{path: org/name, type: alpaca, name: de}", {"hub": "org/name", "config": "de"}, "sft", "alpaca"),
        ("{path: org/name, type: sharegpt}", {"hub": "org/name"}, "sft", "sharegpt"),
        ("{path: a.jsonl, type: chat_template}", {"path": "a.jsonl"}, "sft", "messages"),
        (
            "{path: a.jsonl, type: chat_template, field_messages: talk}",
            {"path": "a.jsonl", "fields": {"messages": "talk"}},
            "sft",
            "messages",
        ),
        (
            "{path: a.jsonl, type: chat_template, message_property_mappings: {role: from, content: value}}",
            {"path": "a.jsonl"},
            "sft",
            "sharegpt",
        ),
        (
            "{path: json, data_files: [b.jsonl], type: completion, field: body}",
            {"path": "b.jsonl", "field": "body"},
            "clm",
            None,
        ),
        (
            "{path: a.jsonl, type: {field_instruction: q, field_output: a}}",
            {"path": "a.jsonl", "fields": {"instruction": "q", "output": "a"}},
            "sft",
            None,
        ),
        ("{path: org/pairs, type: chat_template.default}", {"hub": "org/pairs"}, "dpo", "preference"),
    ],
)
def test_types_of_data_sets_of_axolotl(
    tmp_path: Path, entry: str, source: dict[str, Any], task: str, shape: str | None
) -> None:
    text = AXOLOTL.replace("  - path: rows.jsonl\n    type: alpaca\n", f"  - {entry}\n")
    recipe = converted(tmp_path, text)
    assert recipe["task"] == task
    assert recipe["data"]["train"] == [source]
    assert recipe.get(task, {}).get("shape") == shape


@pytest.mark.parametrize(
    ("rl", "task", "loss"), [("dpo", "dpo", None), ("ipo", "dpo", "ipo"), ("orpo", "dpo", "orpo"), ("kto", "kto", None)]
)
def test_preferences_of_axolotl(tmp_path: Path, rl: str, task: str, loss: str | None) -> None:
    recipe = converted(tmp_path, f"{AXOLOTL}rl: {rl}\nrl_beta: 0.2\n".replace("type: alpaca", "split: train"))
    assert recipe["task"] == task
    assert recipe[task]["beta"] == 0.2
    assert recipe[task].get("loss") == loss


def test_simpo_of_axolotl_keeps_its_margin(tmp_path: Path) -> None:
    """cpo_alpha is the weight of another loss, and must not become the margin."""
    text = f"{AXOLOTL}rl: simpo\nsimpo_gamma: 0.8\ncpo_alpha: 0.0\n".replace("type: alpaca", "split: train")
    recipe = converted(tmp_path, text)
    assert recipe["dpo"]["gamma"] == 0.8
    assert "likelihood of the chosen answer" in reports[tmp_path].lost["cpo_alpha"]


@pytest.mark.parametrize("ends", ["last", "none", "all"])
def test_other_ends_of_turns_do_not_make_prompts_learned(tmp_path: Path, ends: str) -> None:
    recipe = converted(tmp_path, f"{AXOLOTL}train_on_eos: {ends}\nroles_to_train: [assistant]\n")
    assert "loss" not in recipe["sft"]
    assert "end of each turn" in reports[tmp_path].lost["train_on_eos"]


def test_roles_that_are_learned_besides_the_assistant(tmp_path: Path) -> None:
    recipe = converted(tmp_path, f"{AXOLOTL}roles_to_train: [assistant, tool]\n")
    assert "loss" not in recipe["sft"]
    assert "of the assistant only" in reports[tmp_path].lost["roles_to_train"]
    (tmp_path / "recipe.yaml").unlink()
    assert converted(tmp_path, f"{AXOLOTL}roles_to_train: [assistant, user]\n")["sft"]["loss"] == "all"


@pytest.mark.parametrize("other", ["completion", "assistant"])
def test_one_of_two_masks_of_trl_is_enough(tmp_path: Path, other: str) -> None:
    masks = {"completion": "assistant", "assistant": "completion"}
    lines = f"{other}_only_loss: true\n{masks[other]}_only_loss: false\n"
    assert "loss" not in converted(tmp_path, TRL.replace("assistant_only_loss: true\n", lines))["sft"]


def test_no_warmup_of_axolotl(tmp_path: Path) -> None:
    """Its default of warmup_ratio counts only if there is no warmup_steps."""
    recipe = converted(tmp_path, AXOLOTL.replace("warmup_steps: 10", "warmup_steps: 0"))
    assert "warmup" not in recipe["optim"]
    (tmp_path / "recipe.yaml").unlink()
    assert converted(tmp_path, AXOLOTL.replace("warmup_steps: 10\n", ""))["optim"]["warmup"] == 0.03


def test_rows_that_are_too_long_are_treated_as_there(tmp_path: Path) -> None:
    """axolotl drops them, also in SFT; TRL and LLaMA-Factory truncate them, also pairs."""
    assert converted(tmp_path, AXOLOTL)["sft"]["too_long"] == "drop"
    folder = tmp_path / "dpo"
    folder.mkdir()
    text = TRL.replace("assistant_only_loss: true\n", "")
    assert converted(folder, text, task="dpo")["dpo"]["too_long"] == "cut"
    (folder / "recipe.yaml").unlink()
    assert converted(folder, text, task="kto")["kto"]["too_long"] == "cut"
    (folder / "recipe.yaml").unlink()
    assert "too_long" not in converted(folder, text, task="reward").get("reward", {})
    (folder / "recipe.yaml").unlink()
    assert converted(folder, FACTORY.replace("stage: sft", "stage: rm"))["reward"]["too_long"] == "cut"


def test_the_other_default_of_trl_is_said(tmp_path: Path) -> None:
    converted(tmp_path, TRL.replace("assistant_only_loss: true\n", ""))
    assert any("TRL learns all tokens" in remark for remark in reports[tmp_path].remarks)
    (tmp_path / "recipe.yaml").unlink()
    converted(tmp_path, TRL)
    assert reports[tmp_path].remarks == []


def test_dpo_of_trl(tmp_path: Path, tiny: Path, cache: Path) -> None:
    write_rows(tmp_path / "rows.jsonl", made(60, preferred))
    text = TRL.replace("assistant_only_loss: true\n", "beta: 0.3\nloss_type: [ipo]\nprecompute_ref_log_probs: true\n")
    recipe = converted(tmp_path, text, f"model.path={tiny}", task="dpo")
    assert recipe["dpo"] == {"beta": 0.3, "loss": "ipo", "too_long": "cut"}
    trains(tmp_path, cache)


def test_reward_and_grpo_of_trl(tmp_path: Path) -> None:
    recipe = converted(tmp_path, TRL + "center_rewards_coefficient: 0.01\n")
    assert recipe["reward"] == {"center_rewards_coefficient": 0.01}
    (tmp_path / "recipe.yaml").unlink()
    text = TRL + "num_generations: 4\nreward_funcs: [think_format_reward, org/reward]\nreward_weights: [1.0, 0.5]\n"
    text += "temperature: 0.7\nepsilon: 0.3\nscale_rewards: none\ndataloader_num_workers: 4\n"
    recipe = converted(tmp_path, text, processes=2)
    assert recipe["grpo"] == {
        "group_size": 4,
        "prompts": 4 * 2 * 2 // 4,
        "rewards": [
            {"function": "trl.rewards:think_format_reward", "weight": 1.0},
            {"model": "org/reward", "weight": 0.5},
        ],
        "sampling": {"temperature": 0.7, "max_new_tokens": 512},
        "clip": 0.3,
        "scale_rewards": False,
        "kl": 0.0,
    }
    assert "workers" not in recipe["data"]
    assert "dataloader_num_workers" in reports[tmp_path].lost


def test_training_arguments(tmp_path: Path, tiny: Path, cache: Path) -> None:
    from transformers import TrainingArguments

    arguments = TrainingArguments(
        output_dir="out",
        per_device_train_batch_size=4,
        gradient_accumulation_steps=3,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=5,
        max_steps=100,
        optim="adamw_torch",
        max_grad_norm=0.0,
        save_strategy="no",
        use_cpu=True,
    )
    (tmp_path / "arguments.json").write_text(arguments.to_json_string())
    instructions(tmp_path)
    with pytest.raises(RecipeError, match=r"TrainingArguments do not say the task; name it with --task, one of clm"):
        convert(tmp_path / "arguments.json", tmp_path / "recipe.yaml")
    words = (f"model.path={tiny}", "data.train=[{path: rows.jsonl}]", "data.max_length=48")
    report, mistakes = convert(tmp_path / "arguments.json", tmp_path / "recipe.yaml", words, task="sft")
    assert mistakes == ""
    recipe = load_recipe(tmp_path / "recipe.yaml").recipe
    assert (recipe.batch.micro_size, recipe.batch.global_size) == (4, 12)
    assert (recipe.train.max_steps, recipe.train.epochs, recipe.train.seed) == (100, None, 42)
    assert (recipe.optim.schedule, recipe.optim.warmup, recipe.optim.max_grad_norm) == ("constant", 5, None)
    assert (recipe.optim.lr, recipe.optim.weight_decay, recipe.optim.betas) == (5e-5, 0.0, (0.9, 0.999))
    assert recipe.save.every is None
    assert report.lost["num_train_epochs"] == "max_steps overrides it"
    trains(tmp_path, cache)


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    (tmp_path / "theirs.json").write_text('{"learning_rate": 1e-4, "output_dir": "out", "warmup_ratio": 0.1}')
    _, mistakes = convert(tmp_path / "theirs.json", tmp_path / "recipe.yaml", task="classification")
    lines = [line.split(": ", 1)[1] for line in mistakes.splitlines()]
    assert lines == ["model: required, but not given", "data: required, but not given"]


def test_what_depends_on_validation_is_not_converted_without_it(tmp_path: Path) -> None:
    text = FACTORY.replace("val_size: 0.1\n", "load_best_model_at_end: true\nmetric_for_best_model: eval_loss\n")
    recipe = converted(tmp_path, text)
    assert "eval" not in recipe
    assert recipe["save"] == {"every": 500}
    report = reports[tmp_path]
    assert {"eval_steps", "metric_for_best_model", "load_best_model_at_end"} <= set(report.lost) - set(report.converted)


@pytest.mark.parametrize(
    ("value", "launch"),
    [
        ("ds_z3_config.json", "zero3"),
        ("examples/deepspeed/ds_bf16_z2.json", "zero2"),
        ("zero1_torch_compile.json", "zero1"),
        ("ds_z3_offload_config.json", "zero3_offload"),
        ("{zero_optimization: {stage: 2, offload_optimizer: {device: cpu}}}", "zero2"),
        ("{zero_optimization: {stage: 3, offload_param: {device: cpu}}}", "zero3_offload"),
        ("{zero_optimization: {stage: 0}}", "multi_gpu"),
    ],
)
def test_deepspeed_names_the_launch_config(tmp_path: Path, value: str, launch: str) -> None:
    converted(tmp_path, f"{TRL}deepspeed: {value}\n")
    assert reports[tmp_path].launch == launch
    assert shipped("launch_configs").joinpath(f"{launch}.yaml").is_file()


@pytest.mark.parametrize("line", ["warmup_ratio: often", "learning_rate: auto", "val_set_size: [1]", "lora_target: 3"])
def test_a_value_that_makes_no_sense_is_said(tmp_path: Path, line: str) -> None:
    """By the conversion, or by the check of the recipe."""
    name = line.partition(":")[0]
    (tmp_path / "theirs.yaml").write_text(
        "\n".join(row for row in TRL.splitlines() if not row.startswith(name)) + f"\n{line}\n"
    )
    report, mistakes = convert(tmp_path / "theirs.yaml", tmp_path / "recipe.yaml")
    assert mistakes or name in report.lost


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: 1\nb: 2\n", "its keys are neither those of TrainingArguments"),
        ("- a\n", "expected the keys and values of a training"),
        ("task: clm\nmodel: {path: x}\n", "this is a recipe already"),
        ("a: 1\na: 2\n", "theirs.yaml:2: "),
        ("a: {\n", "theirs.yaml:2: not valid YAML"),
    ],
)
def test_a_file_that_cannot_be_converted(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "theirs.yaml").write_text(text)
    with pytest.raises(RecipeError, match=says):
        convert(tmp_path / "theirs.yaml", tmp_path / "recipe.yaml")


def test_a_directory_may_look_like_a_number(tmp_path: Path) -> None:
    recipe = converted(tmp_path, TRL.replace("output_dir: runs/trl", 'output_dir: "7"'))
    assert (recipe["run_dir"], recipe["train"]["seed"]) == ("7", 7)


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("mine")
    with pytest.raises(RecipeError, match="already exists"):
        convert(tmp_path / "theirs.yaml", tmp_path / "recipe.yaml")
    assert (tmp_path / "recipe.yaml").read_text() == "mine"


def test_every_rule_of_the_table_exists_and_is_used() -> None:
    assert {setting.how for setting in foreign_settings()} - {""} == set(RULES)


def test_the_defaults_are_those_of_the_installed_libraries() -> None:
    import transformers
    import trl

    classes = {"sft": trl.SFTConfig, "dpo": trl.DPOConfig, "kto": trl.KTOConfig, "reward": trl.RewardConfig}
    classes |= {"grpo": trl.GRPOConfig, "rloo": trl.RLOOConfig}
    ours = trainers()
    for name, value in ours["defaults"]["transformers"].items():
        assert transformers.TrainingArguments.__dataclass_fields__[name].default == value, name
    for task, defaults in ours["task_defaults"]["trl"].items():
        for name, value in defaults.items():
            if (task, name) != ("kto", "truncation_mode"):  # its trainer has this one only
                assert classes[task].__dataclass_fields__[name].default == value, (task, name)
    for name in ("lora_r", "lora_alpha", "lora_dropout"):
        assert trl.ModelConfig.__dataclass_fields__[name].default == ours["defaults"]["trl"][name]
    for name in ("num_train_epochs", "weight_decay", "seed", "save_steps", "logging_steps", "gradient_checkpointing"):
        assert trl.SFTConfig.__dataclass_fields__[name].default == ours["defaults"]["trl"][name]


def test_axolotls_batch_size_is_that_of_a_process(tmp_path: Path) -> None:
    """gradient_accumulation_steps = batch_size // micro_batch_size, whatever the number of processes."""
    assert "gradient_accumulation_steps: 3\n" in AXOLOTL
    text = AXOLOTL.replace("gradient_accumulation_steps: 3\n", "batch_size: 9\n")
    values = converted(tmp_path, text, processes=4)
    assert values["batch"] == {"micro_size": 2, "global_size": 2 * (9 // 2) * 4}
    assert reports[tmp_path].converted["batch_size"] == "batch.micro_size: 2, batch.global_size: 32"


def test_the_command_reports_every_key_and_imports_no_torch(tmp_path: Path) -> None:
    (tmp_path / "theirs.yaml").write_text(AXOLOTL)
    probe = (
        "import sys; sys.argv = ['ptft', 'convert', 'theirs.yaml', '--processes', '2', '--out', 'my own.yaml', "
        "'model.path=org/other']\n"
        "from ptft_dist.cli import main\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "assert not {'torch', 'transformers', 'accelerate', 'deepspeed', 'datasets'} & set(sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", probe], check=True, capture_output=True, text=True, cwd=tmp_path, env=environment()
    )
    words = [line.split(maxsplit=1) for line in done.stdout.splitlines()]
    assert words[0] == ["recognized:", "axolotl, task sft, 2 processes"]
    assert ["micro_batch_size", "batch.micro_size: 2, batch.global_size: 12"] in words
    assert ["seed", "train.seed: 42"] in words  # a default of axolotl
    assert ["made_up", "ptft does not know this name"] in words
    assert ["ptft", "train 'my own.yaml' --launch zero3"] in words
    assert load_recipe(tmp_path / "my own.yaml").recipe.model.path == "org/other"
