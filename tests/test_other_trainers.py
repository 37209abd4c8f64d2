"""Names of other trainers and typos: the message names the right key."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML
from support import ROOT

from ptft_dist.api import load_recipe
from ptft_dist.config.mistakes import schema_of
from ptft_dist.config.other_trainers import PAGE, foreign_name, foreign_names, foreign_settings, page
from ptft_dist.config.section import dotted
from ptft_dist.errors import RecipeError
from ptft_dist.runs.search import Search
from ptft_dist.tasks.registry import TASKS, recipe_class

RECIPE: dict[str, Any] = {
    "task": "sft",
    "model": {"path": "org/model"},
    "data": {"train": [{"path": "rows.jsonl"}], "validation": 0.1},
    "batch": {"global_size": 8, "micro_size": 4},
    "optim": {"lr": 1e-4},
    "train": {"max_steps": 3},
    "run_dir": "run",
}

# task, what a user writes (a dotted key: in that section), and the key that the message has to name
HABITS = """
sft learning_rate optim.lr
sft optim.learning_rate optim.lr
sft train.learning_rate optim.lr
sft LEARNING_RATE optim.lr
sft lr optim.lr
sft output_dir run_dir
sft train.output_dir run_dir
sft num_train_epochs train.epochs
sft train.num_epochs train.epochs
sft per_device_train_batch_size batch.micro_size
sft batch.per_device_train_batch_size batch.micro_size
sft micro_batch_size batch.micro_size
sft batch.micro_batch_size batch.micro_size
sft gradient_accumulation_steps batch.global_size
sft batch.gradient_accumulation_steps batch.global_size
sft train.batch_size batch.global_size
sft per_device_eval_batch_size eval.micro_size
sft bf16 train.precision
sft fp16 train.precision
sft train.bf16 train.precision
sft mixed_precision train.precision
sft max_seq_length data.max_length
sft data.max_seq_length data.max_length
sft sequence_len data.max_length
sft cutoff_len data.max_length
sft model.model_max_length data.max_length
sft lora_r model.adapt.lora.r
sft lora_rank model.adapt.lora.r
sft model.lora_r model.adapt.lora.r
sft model.adapt.lora_alpha model.adapt.lora.alpha
sft lora_dropout model.adapt.lora.dropout
sft lora_target model.adapt.lora.targets
sft lora_target_modules model.adapt.lora.targets
sft target_modules model.adapt.lora.targets
sft lora_target_linear model.adapt.lora.targets
sft use_peft model.adapt
sft finetuning_type model.adapt
sft adapter model.adapt
sft use_dora model.adapt.lora.dora
sft use_rslora model.adapt.lora.rslora
sft modules_to_save model.adapt.embeddings
sft load_in_4bit model.quantize
sft model.load_in_8bit model.quantize
sft quantization_bit model.quantize
sft bnb_4bit_quant_type model.quantize.type
sft model.name_or_path model.path
sft base_model model.path
sft tokenizer_name_or_path tokenizer.path
sft attn_implementation model.attention
sft flash_attention model.attention
sft gradient_checkpointing model.gradient_checkpointing
sft torch_dtype model.dtype
sft torch_compile model.compile
sft warmup_ratio optim.warmup
sft optim.warmup_steps optim.warmup
sft lr_scheduler_type optim.schedule
sft lr_scheduler optim.schedule
sft optimizer optim.name
sft train.weight_decay optim.weight_decay
sft adam_beta1 optim.betas
sft adam_epsilon optim.eps
sft train.max_grad_norm optim.max_grad_norm
sft neftune_noise_alpha sft.neftune_alpha
sft seed train.seed
sft max_steps train.max_steps
sft eval_strategy eval.every
sft eval_steps eval.every
sft eval.eval_steps eval.every
sft save_steps save.every
sft save.save_total_limit save.keep
sft save_strategy save.every
sft load_best_model_at_end save.best
sft metric_for_best_model eval.metric
sft early_stopping_patience eval.patience
sft logging_steps log.every
sft log.logging_steps log.every
sft report_to log.tensorboard
sft dataloader_num_workers data.workers
sft group_by_length batch.group_by_length
sft packing sft.packing
sft sample_packing sft.packing
clm packing clm.packing
sft train_on_inputs sft.loss
sft assistant_only_loss sft.loss
sft template sft.template
dpo chat_template dpo.template
sft default_system sft.system
sft dataset data.train
sft datasets data.train
sft dataset_name data.train
sft val_set_size data.validation
sft data.val_size data.validation
sft max_samples data.train.0.limit
sft data.dataset_text_field data.train.0.fields
dpo beta dpo.beta
dpo pref_beta dpo.beta
dpo loss_type dpo.loss
kto desirable_weight kto.desirable_weight
kto beta kto.beta
reward center_rewards_coefficient reward.center_rewards_coefficient
sft stage task
sft rl task
sft add_special_tokens tokenizer.add
sft optim.lrr optim.lr
sft optm optim
sft optim.wieght_decay optim.weight_decay
sft optim.schedul optim.schedule
sft optim.warm_up optim.warmup
sft train.epoch train.epochs
sft train.max_step train.max_steps
sft train.presicion train.precision
sft batch.globalsize batch.global_size
sft batch.micro_sise batch.micro_size
sft data.maxlength data.max_length
sft data.validaton data.validation
sft data.trian data.train
sft eval.evry eval.every
sft save.keeep save.keep
sft rundir run_dir
sft modle model
sft model.pth model.path
sft model.adpt model.adapt
sft model.adapt.lorra model.adapt.lora
sft sft.pakcing sft.packing
sft sft.templete sft.template
sft tain train
sft learning_rte optim.lr
sft gradient_acumulation_steps batch.global_size
sft train.num_train_epoch train.epochs
sft log.evrey log.every
sft max_length data.max_length
sft tokenizer.name_or_path tokenizer.path
sft tokenizer.pretrained_model_name_or_path tokenizer.path
sft model.name model.path
sft tokenizer.name tokenizer.path
sft optim.type optim.name
sft optim.optimizer optim.name
sft optim.scheduler optim.schedule
sft eval.batch_size eval.micro_size
sft eval.steps eval.every
sft save.steps save.every
sft log.interval log.every
sft train.steps train.max_steps
sft train.gradient_accumulation batch.global_size
sft data.test data.validation
sft data.num_workers data.workers
sft random_seed train.seed
sft save_dir run_dir
sft optim.grad_clip optim.max_grad_norm
sft tokenizer.vocab_size tokenizer.train.vocab_size
"""
CASES = [tuple(line.split()) for line in HABITS.strip().splitlines()]


def refused(source: Any, *overrides: str) -> str:
    with pytest.raises(RecipeError) as error:
        load_recipe(source, overrides)
    return str(error.value)


@pytest.mark.parametrize(("task", "written", "key"), CASES, ids=[f"{case[0]}-{case[1]}" for case in CASES])
def test_a_habit_or_a_typo_is_answered_with_the_key(task: str, written: str, key: str) -> None:
    (line,) = [line for line in refused(RECIPE, f"task={task}", f"{written}=1").splitlines() if written in line]
    assert line.startswith(f"command line: {written}: unknown key; did you mean {key}"), line
    assert line.removeprefix(f"command line: {written}: unknown key; did you mean {key}")[0] in " ?", line


def test_there_are_a_hundred() -> None:
    assert len(set(CASES)) == len(CASES) >= 100


def test_the_message_names_line_and_difference(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    values = RECIPE | {"gradient_accumulation_steps": 4, "deepspeed": "ds.json", "num_generations": 4}
    with path.open("w") as file:
        YAML().dump(values | {"optim": "adamw_torch"}, file)
    lines = [line.removeprefix(str(path)) for line in refused(str(path)).splitlines()]
    assert lines == [
        ":11: optim: expected a section (key: value), got 'adamw_torch'; did you mean optim.name?",
        ":15: gradient_accumulation_steps: unknown key; did you mean batch.global_size? Rows of an update over all "
        "processes; accumulation follows: global_size / (processes x micro_size).",
        ":16: deepspeed: unknown key; there is no counterpart. It belongs to the launch: ptft train RECIPE --launch "
        "zero2 or zero3, or your own launch config.",
        ":17: num_generations: unknown key; task sft has no such setting, only other tasks: grpo.group_size, "
        "rloo.group_size",
    ]


@pytest.mark.parametrize(
    ("written", "key"),
    [("model=gpt2", "model.path"), ("tokenizer=gpt2", "tokenizer.path"), ("data=a.csv", "data.train")],
)
def test_a_value_in_place_of_a_section(written: str, key: str) -> None:
    assert f"did you mean {key}?" in refused(RECIPE, written)


def test_a_file_that_is_no_recipe_gets_no_key_of_one(tmp_path: Path) -> None:
    from ptft_dist.config.load import read_section

    path = tmp_path / "search.yaml"
    path.write_text("learning_rate: 3\n")
    with pytest.raises(RecipeError) as error:
        read_section(path, Search, "search")
    assert "optim.lr" not in str(error.value)


def test_every_key_of_the_table_exists_and_every_other_name_has_advice() -> None:
    known = {dotted(path) for path in schema_of(recipe_class()).all_keys}
    names: list[str] = []
    for setting in foreign_settings():
        assert set(setting.keys) <= known, setting
        assert setting.keys or setting.note, setting
        assert set(setting.of) <= {"transformers", "trl", "axolotl", "llamafactory", "peft"}
        assert setting.task in ("", *TASKS)
        names += setting.names
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(
    ("known", "share"),
    [
        ("transformers.TrainingArguments", 0.9),
        ("trl.SFTConfig", 0.9),
        ("trl.ModelConfig", 0.9),
        ("peft.LoraConfig", 0.5),  # half of them belong to variants of LoRA
    ],
)
def test_the_names_of_the_installed_libraries_are_known(known: str, share: float) -> None:
    library, name = known.split(".")
    fields = [field.name for field in dataclasses.fields(getattr(__import__(library), name))]
    own = {path[-1] for path in schema_of(recipe_class()).all_keys}
    unknown = [field for field in fields if field not in foreign_names() and field not in own]
    assert len(unknown) <= (1 - share) * len(fields), unknown


def test_spellings() -> None:
    assert foreign_name("--learning-rate") is foreign_names()["learning_rate"]
    assert foreign_name("learning_rat") is None
    assert foreign_name("learning_rat", typos=True) is foreign_names()["learning_rate"]


def test_the_page_is_that_of_the_table() -> None:
    """Write it with: python -c "from ptft_dist.config.other_trainers import page; print(page(), end='')"."""
    assert (ROOT / PAGE).read_text() == page()
    assert "| `learning_rate`, `lr` | `optim.lr` |  |" in page()
