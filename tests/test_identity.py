"""The identity of a run: what a checkpoint and the recipe that resumes it must have in common."""

from __future__ import annotations

import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from ptft_dist.api import load_recipe
from ptft_dist.checkpoint.checkpoint import (
    MANIFEST,
    Checkpoint,
    Checkpoints,
    OneProcess,
    _manifest_hash,
    read_checkpoint,
)
from ptft_dist.checkpoint.identity import _keys, differences, may_change, run_identity
from ptft_dist.checkpoint.resume import Resume, group_entries
from ptft_dist.config.load import Loaded, describe
from ptft_dist.config.mistakes import Schema
from ptft_dist.errors import CheckpointError, PtftError, RecipeError
from ptft_dist.tasks.registry import TASKS, recipe_class

RECIPE: dict[str, Any] = {
    "task": "clm",
    "model": {"config": {"model_type": "llama", "hidden_size": 32}},
    "tokenizer": {"train": {"vocab_size": 300}},
    "data": {"train": [{"source": "python-stdlib"}], "validation": 0.1, "max_length": 64},
    "batch": {"global_size": 12, "micro_size": 3},
    "train": {"max_steps": 5},
    "run_dir": "run",
}

# Written down by a97cc8b: every section of every task, with defaults, and one hash of the prepared data.
SAVED_BY_A97CC8B: dict[str, Any] = {
    "batch.global_size": 12,
    "batch.global_tokens": None,
    "classification.class_weights": None,
    "classification.entities": False,
    "classification.label_smoothing": 0.0,
    "classification.labels": None,
    "classification.multi_label": False,
    "classification.pair": False,
    "clm.attention": None,
    "clm.bos": False,
    "clm.packing": True,
    "data.augment": [],
    "data.bad_rows": "stop",
    "data.fold": None,
    "data.folds": None,
    "data.max_length": 64,
    "distillation": None,
    "mlm.attention": None,
    "mlm.mask_share": 0.8,
    "mlm.packing": True,
    "mlm.probability": 0.15,
    "mlm.random_share": 0.1,
    "mlm.span_length": None,
    "mlm.unit": "token",
    "mlm_nsp.attention": None,
    "mlm_nsp.duplicates": 1,
    "model.config.hidden_size": 32,
    "model.config.model_type": "llama",
    "model.new_head": False,
    "model.path": None,
    "model.revision": None,
    "model.trust_remote_code": False,
    "optim.betas": None,
    "optim.decay": None,
    "optim.eps": None,
    "optim.groups": [],
    "optim.lr": 3e-4,
    "optim.max_grad_norm": 1.0,
    "optim.min_lr_ratio": 0.0,
    "optim.momentum": None,
    "optim.name": "adamw",
    "optim.power": None,
    "optim.schedule": "cosine",
    "optim.warmup": 0.0,
    "optim.weight_decay": 0.1,
    "plm.longest_span": 5,
    "prepared data": "d4713e1e8769d791dc6ed854fed47967",
    "question_answering.stride": 64,
    "regression.loss": "mse",
    "seq2seq.prefix": "",
    "sft.too_long": "cut",
    "span_corruption.sentinels": 100,
    "task": "clm",
    "token_classification.scheme": "iob2",
    "train.epochs": None,
    "train.max_steps": 5,
    "train.max_tokens": None,
    "train.precision": "bf16",
    "train.seed": 0,
}
PRINT = "d4713e1e8769d791dc6ed854fed47967"
PARTS: dict[str, Any] = {
    "data.train": ["a", "b", "c"],
    "data.validation": 0.1,
    "tokenizer": "t",
    "libraries": {"tokenizers": "0.22"},
}


def load(folder: Path, *overrides: str) -> Loaded:
    file = folder / "recipe.yaml"
    file.write_text(json.dumps(RECIPE))
    return load_recipe(str(file), overrides)


def identity(folder: Path, *overrides: str, fingerprint: str = PRINT, **parts: Any) -> dict[str, Any]:
    """The identity after it was written to and read from a manifest."""
    return json.loads(json.dumps(run_identity(load(folder, *overrides), fingerprint, PARTS | parts)))


# --- which keys -------------------------------------------------------------------------------------------------------

# Every key of the sections that all tasks share, and of the tasks' own, that a resumed run may change.
MAY_CHANGE = {
    "run_dir",
    "save.every", "save.keep", "save.best", "save.export", "save.dtype",
    "eval.every", "eval.at_start", "eval.micro_size", "eval.max_rows", "eval.metric", "eval.goal", "eval.patience",
    "log.every", "log.tensorboard", "log.report",
    "log.wandb", "log.mlflow", "log.trackio", "log.swanlab", "log.comet",
    "data.train", "data.validation",  # their contents are compared instead
    "data.cache_dir", "data.workers",
    "continual.ewc.data", "continual.replay.data",  # their contents are compared instead
    "tokenizer.path", "tokenizer.revision", "tokenizer.train.algorithm", "tokenizer.train.vocab_size",
    "tokenizer.train.min_frequency", "tokenizer.train.max_megabytes", "tokenizer.add", "tokenizer.trust_remote_code",
    "tokenizer.train.normalizer", "tokenizer.train.lowercase", "tokenizer.train.strip_accents",
    "tokenizer.train.pre_tokenizer", "tokenizer.train.split_digits", "tokenizer.train.split_cjk",
    "tokenizer.train.byte_fallback", "tokenizer.train.special_tokens", "tokenizer.extend",
    "batch.micro_size", "batch.micro_tokens", "batch.group_by_length",
    "model.attention", "model.gradient_checkpointing", "model.compile",
    "train.deterministic", "train.offload_frozen",
    "clm.head",
    "sft.head", "sft.generation",
    "dpo.head", "kto.head",
    "seq2seq.generation",
    "ppo.show", "grpo.show", "rloo.show",
    *(f"{task}.sampling.vllm.{key}" for task in ("ppo", "grpo", "rloo") for key in ("server", "memory", "sleep")),
    "question_answering.max_answer_length", "question_answering.n_best", "question_answering.no_answer_margin",
}  # fmt: skip
WITH_THE_ROWS = {"clm.bos"}  # named as the reason if the prepared rows differ
MUST_STAY = {
    "task",
    "model.config.model_type", "model.config.hidden_size", "model.path", "model.revision", "model.new_head",
    "model.trust_remote_code", "model.dtype", "model.quantize",
    "model.adapt.last_layers", "model.adapt.match", "model.adapt.bitfit", "model.adapt.lora", "model.adapt.adalora",
    "model.adapt.ia3", "model.adapt.prompt_tuning", "model.adapt.p_tuning", "model.adapt.prefix_tuning",
    "model.adapt.bottleneck", "model.adapt.peft", "model.adapt.adapter", "model.adapt.name", "model.adapt.embeddings",
    "tokenizer.init_added",
    "data.folds", "data.fold", "data.max_length", "data.bad_rows", "data.augment", "data.steps", "data.mixing",
    "distillation", "continual",
    "batch.global_size", "batch.global_tokens",
    "optim.name", "optim.lr", "optim.weight_decay", "optim.betas", "optim.eps", "optim.momentum", "optim.groups",
    "optim.layer_decay", "optim.head_lr_scale", "optim.max_grad_norm",
    "optim.schedule", "optim.warmup", "optim.min_lr_ratio", "optim.decay", "optim.power",
    "train.max_steps", "train.epochs", "train.max_tokens", "train.seed", "train.precision",
}  # fmt: skip
OWN_MUST_STAY = {
    "clm": {"packing", "attention"},
    "mlm": {"packing", "attention", "probability", "mask_share", "random_share", "unit", "span_length"},
    "mlm_nsp": {
        "packing", "attention", "probability", "mask_share", "random_share", "unit", "span_length", "sentence",
        "short_probability", "duplicates",
    },
    "plm": {"packing", "attention", "mask_share", "longest_span"},
    "span_corruption": {"packing", "attention", "density", "mean_span", "sentinels"},
    "seq2seq": {"prefix", "source_language", "target_language", "max_target_length", "label_smoothing"},
    "sft": {"shape", "template", "system", "loss", "too_long", "packing", "neftune_alpha"},
    "classification": {"pair", "labels", "label_names", "multi_label", "class_weights", "label_smoothing", "entities"},
    "regression": {"pair", "loss"},
    "token_classification": {"label_names", "scheme", "labels", "pieces"},
    "question_answering": {"stride"},
    "reward": {
        "center_rewards_coefficient", "dropout", "shape", "system", "template", "too_long",
    },
    "dpo": {"loss", "beta", "label_smoothing", "gamma", "reference", "shape", "system", "template", "too_long"},
    "kto": {
        "loss", "beta", "desirable_weight", "undesirable_weight", "reference", "shape", "system", "template",
        "too_long",
    },
    "ppo": {
        "clip", "clip_rewards", "critic", "entropy_coefficient", "epochs", "gamma", "kl", "kl_estimator", "kl_horizon",
        "kl_target", "lam", "length_penalty", "length_target", "missing_eos_penalty", "normalize_rewards", "prompts",
        "rewards", "sampling.max_new_tokens", "sampling.micro_size", "sampling.min_p", "sampling.temperature",
        "sampling.top_k", "sampling.top_p", "sampling.vllm", "shape", "system", "target_kl", "template", "too_long",
        "value_clip", "value_coefficient", "whiten_advantages", "whiten_rewards",
    },
    "grpo": {
        "clip", "clip_high", "clip_rewards", "epochs", "group_size", "kl", "kl_estimator", "length_penalty",
        "length_target", "missing_eos_penalty", "normalization", "normalize_rewards", "prompts", "rewards",
        "sampling.max_new_tokens", "sampling.micro_size", "sampling.min_p", "sampling.temperature", "sampling.top_k",
        "sampling.top_p", "sampling.vllm", "scale_rewards", "shape", "system", "template", "too_long",
    },
    "rloo": {
        "clip", "clip_rewards", "epochs", "group_size", "kl", "kl_estimator", "length_penalty", "length_target",
        "missing_eos_penalty", "normalize_rewards", "prompts", "rewards", "sampling.max_new_tokens",
        "sampling.micro_size", "sampling.min_p", "sampling.temperature", "sampling.top_k", "sampling.top_p",
        "sampling.vllm", "shape", "system", "template", "too_long", "whiten_advantages",
    },
}  # fmt: skip


TRAINED = [name for name, spec in TASKS.items() if spec.settings.trains]


def of_task(task: str) -> list[str]:
    """Overrides that make a recipe of a task."""
    if task not in ("ppo", "grpo", "rloo"):
        return [f"task={task}", "data.max_length=128"]
    return [f"task={task}", "data.max_length=128", f"{task}.prompts=12", f'{task}.rewards=[{{"function": "a:b"}}]']


@pytest.mark.parametrize("task", TRAINED)
def test_every_key_is_named_here_as_one_that_may_change_or_must_stay(tmp_path: Path, task: str) -> None:
    saved = identity(tmp_path, *of_task(task))
    keys = saved["chosen"].keys() | saved["default"].keys()
    assert keys == MUST_STAY | {f"{task}.{key}" for key in OWN_MUST_STAY[task]}
    not_compared = set(_keys(load(tmp_path, *of_task(task)).recipe.own_values())) - keys
    assert not_compared <= MAY_CHANGE | WITH_THE_ROWS
    assert {key for key in WITH_THE_ROWS if key.startswith(f"{task}.")} <= saved["data"].keys()
    settings = recipe_class().model_fields[task].annotation
    assert settings is not None
    free = {key.split(".")[1] for key in MAY_CHANGE | WITH_THE_ROWS if key.startswith(f"{task}.")}
    assert set(settings.model_fields) == {key.partition(".")[0] for key in OWN_MUST_STAY[task]} | free  # type: ignore[attr-defined]


def test_what_may_change_is_in_the_schema() -> None:
    schema = {".".join(path) for path in Schema(recipe_class()).all_keys}
    assert schema >= MAY_CHANGE


@pytest.mark.parametrize("task", TRAINED)
def test_may_change_knows_the_keys_of_its_task(tmp_path: Path, task: str) -> None:
    recipe = load(tmp_path, *of_task(task)).recipe
    for key in MAY_CHANGE:
        section = key.partition(".")[0]
        assert may_change(key, recipe) == (section not in TASKS or section == task), key


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("optim.weight_decay=0.2", "optim.weight_decay"),
        ("optim.max_grad_norm=null", "optim.max_grad_norm"),
        ("train.precision=fp32", "train.precision"),
        ("model.config.hidden_size=64", "model.config.hidden_size"),
        ("model.config.num_hidden_layers=3", "model.config.num_hidden_layers"),
        ("clm.packing=false", "clm.packing"),
    ],
)
def test_a_key_that_must_stay_is_named_with_both_values(tmp_path: Path, override: str, key: str) -> None:
    different = differences(identity(tmp_path), identity(tmp_path, override))
    assert set(different) == {key}
    assert different[key].endswith(
        f"{json.loads(override.partition('=')[2].replace('fp32', chr(34) + 'fp32' + chr(34)))!r} now"
    )


@pytest.mark.parametrize(
    "override",
    [
        "batch.micro_size=4",
        "save.every=7",
        "run_dir=other",
        "clm.head=fused",
        "data.workers=3",
        "train.deterministic=true",
    ],
)
def test_a_key_that_may_change_is_not_compared(tmp_path: Path, override: str) -> None:
    assert differences(identity(tmp_path), identity(tmp_path, override)) == {}


# --- references -------------------------------------------------------------------------------------------------------


def test_another_value_behind_the_same_reference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    override = "model.revision=${env:PTFT_TEST_REVISION}"
    model = ("model.config=null", "model.path=org/model", override)
    monkeypatch.setenv("PTFT_TEST_REVISION", "first-secret")
    saved = identity(tmp_path, *model)
    assert differences(saved, identity(tmp_path, *model)) == {}
    monkeypatch.setenv("PTFT_TEST_REVISION", "other-secret")
    now = identity(tmp_path, *model)
    different = differences(saved, now)
    assert set(different) == {"model.revision"}
    assert different["model.revision"].count("${env:PTFT_TEST_REVISION}") == 2
    assert "secret" not in str(different) + json.dumps(saved) + json.dumps(now)


# --- other versions ---------------------------------------------------------------------------------------------------


def test_the_sections_of_other_tasks_are_not_part_of_it(tmp_path: Path) -> None:
    saved = identity(tmp_path)
    sections = {key.split(".")[0] for key in saved["chosen"].keys() | saved["default"].keys()}
    assert sections & TASKS.keys() == {"clm"}


def test_a_key_of_a_newer_version_counts_as_its_default(tmp_path: Path) -> None:
    old, new = identity(tmp_path), identity(tmp_path)
    new["default"]["optim.new_key"] = 3
    assert differences(old, new) == {}  # the program is newer than the checkpoint
    assert differences(new, old) == {}  # and the other way round
    new["chosen"]["optim.new_key"] = 4
    del new["default"]["optim.new_key"]
    assert differences(old, new) == {"optim.new_key": "not set in the checkpoint, 4 now"}
    assert differences(new, old) == {"optim.new_key": "4 in the checkpoint, not set now"}


def test_another_default_in_another_version_is_a_change(tmp_path: Path) -> None:
    old, new = identity(tmp_path), identity(tmp_path)
    old["default"]["optim.weight_decay"] = 0.01
    assert differences(old, new) == {"optim.weight_decay": "0.01 in the checkpoint, 0.1 now"}


def test_a_checkpoint_of_a97cc8b_goes_on(tmp_path: Path) -> None:
    assert differences(SAVED_BY_A97CC8B, identity(tmp_path)) == {}
    assert set(differences(SAVED_BY_A97CC8B | {"clm.packing": False, "mlm.unit": "token"}, identity(tmp_path))) == {
        "clm.packing"
    }
    assert set(differences(SAVED_BY_A97CC8B, identity(tmp_path, "optim.lr=0.5"))) == {"optim.lr"}
    other = differences(SAVED_BY_A97CC8B, identity(tmp_path, "clm.bos=false", fingerprint="e"))
    assert set(other) == {"prepared data"}
    assert "by an earlier version" in other["prepared data"]


@pytest.mark.parametrize("flat", [True, False])
def test_a_setting_of_the_rows_may_change_while_the_rows_stay(tmp_path: Path, flat: bool) -> None:
    """clm.bos was false by default; `auto` gives the same rows unless the tokenizer begins a text with BOS."""
    saved = SAVED_BY_A97CC8B if flat else identity(tmp_path, "clm.bos=false")
    if not flat:  # as it was before such settings stood with the data
        saved["default"]["clm.bos"] = saved["data"].pop("clm.bos")
    assert differences(saved, identity(tmp_path)) == {}
    assert differences(saved, identity(tmp_path, "clm.bos=true")) == {}
    other = {"clm.bos": "False in the checkpoint, 'auto' now"}
    assert differences(saved, identity(tmp_path, fingerprint="other")) == other
    assert differences(identity(tmp_path, "clm.bos=false"), identity(tmp_path, fingerprint="other")) == other


# --- prepared data ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parts", "key", "text"),
    [
        ({"data.train": ["a", "x", "c"]}, "data.train", "other contents in data.train[1]"),
        ({"data.train": ["a", "x", "y"]}, "data.train", "other contents in data.train[1], data.train[2]"),
        ({"data.train": ["a"]}, "data.train", "3 sources in the checkpoint, 1 source now"),
        ({"data.validation": 0.2}, "data.validation", "0.1 in the checkpoint, 0.2 now"),
        ({"data.validation": ["v"]}, "data.validation", "0.1 in the checkpoint, 1 source now"),
        ({"tokenizer": "u"}, "tokenizer", "another tokenizer"),
        ({"libraries": {"tokenizers": "0.23"}}, "libraries.tokenizers", "'0.22' in the checkpoint, '0.23' now"),
    ],
)
def test_what_changed_in_the_prepared_data_is_named(tmp_path: Path, parts: dict[str, Any], key: str, text: str) -> None:
    different = differences(identity(tmp_path), identity(tmp_path, fingerprint="other", **parts))
    assert set(different) == {key}
    assert text in different[key]


def test_prepared_data_that_differ_for_an_unknown_reason(tmp_path: Path) -> None:
    saved = identity(tmp_path)
    assert set(differences(saved, identity(tmp_path, fingerprint="other"))) == {"prepared data"}
    for change in ("optim.lr=1", "batch.global_size=24", "train.max_steps=9"):  # none of them decides any row
        different = differences(saved, identity(tmp_path, change, fingerprint="other"))
        assert set(different) == {"prepared data", change.partition("=")[0]}
    assert set(differences(saved, identity(tmp_path, "clm.bos=true", fingerprint="other"))) == {"clm.bos"}


# --- --accept ---------------------------------------------------------------------------------------------------------


def checkpoint(folder: Path, saved: dict[str, Any], **facts: Any) -> Checkpoint:
    manifest = {"identity": saved, "kind": "single", "world_size": 1, "step": 3, "files": {}} | facts
    return Checkpoint(folder / "step-00000003", 3, manifest)


def resume(folder: Path, current: dict[str, Any], *accept: str) -> Resume:
    free = partial(may_change, recipe=load(folder).recipe)
    return Resume(Checkpoints(folder), "auto", accept, current, lambda _kind, _ranks: None, free)


def test_accept_lets_a_named_change_through(tmp_path: Path) -> None:
    saved, now = identity(tmp_path), identity(tmp_path, "optim.lr=0.5", "train.seed=1")
    with pytest.raises(CheckpointError) as error:
        resume(tmp_path, now, "optim.lr").check(checkpoint(tmp_path, saved))
    assert "train.seed: 0 in the checkpoint, 1 now" in str(error.value)
    assert "optim.lr:" not in str(error.value)
    assert "start over with --resume never, or accept the changes: --accept train.seed" in str(error.value)
    resume(tmp_path, now, "optim.lr", "train.seed").check(checkpoint(tmp_path, saved))


def test_accept_of_what_is_no_key(tmp_path: Path) -> None:
    now = identity(tmp_path, "optim.lr=0.5")
    with pytest.raises(RecipeError) as error:
        resume(tmp_path, now, "optim.lrr").check(checkpoint(tmp_path, identity(tmp_path)))
    assert "--accept optim.lrr: there is no such key; did you mean optim.lr?" in str(error.value)
    with pytest.raises(RecipeError, match=r"--accept zzz: .* Keys that differ: optim\.lr") as error:
        resume(tmp_path, now, "zzz").check(checkpoint(tmp_path, identity(tmp_path)))
    with pytest.raises(RecipeError, match=r"--accept run_dir: .* may always change"):
        resume(tmp_path, now, "run_dir").check(checkpoint(tmp_path, identity(tmp_path)))


def test_accept_without_a_checkpoint_is_checked_too(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"--accept optim\.lrr"):
        resume(tmp_path, identity(tmp_path), "optim.lrr").precheck()


def test_a_key_that_only_the_checkpoint_has_can_be_accepted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved, now = identity(tmp_path), identity(tmp_path)
    saved["chosen"]["model.adapt.lora.r"] = 8
    monkeypatch.setattr("ptft_dist.checkpoint.resume.read_checkpoint", lambda _path: checkpoint(tmp_path, saved))
    monkeypatch.setattr(Checkpoints, "paths", lambda _self: [tmp_path])
    with pytest.raises(CheckpointError, match=r"changes: --accept model\.adapt\.lora\.r$"):
        resume(tmp_path, now).precheck()
    resume(tmp_path, now, "model.adapt.lora.r").precheck()


def test_accept_of_a_change_that_was_accepted_before_is_no_error(tmp_path: Path) -> None:
    """A requeued job has the same command line, and its checkpoints already have the new value."""
    now = identity(tmp_path, "optim.lr=0.5")
    resume(tmp_path, now, "optim.lr").check(checkpoint(tmp_path, now))
    resume(tmp_path, now, "optim.lr").precheck()


def test_other_parameters_in_groups_of_the_same_sizes_are_refused(tmp_path: Path) -> None:
    """Their saved moments would silently belong to other parameters."""
    before, now = [["embed", "layers.0"], ["layers.1"]], [["embed", "layers.1"], ["layers.0"]]
    saved, chosen = checkpoint(tmp_path, {}, **group_entries(before)), resume(tmp_path, identity(tmp_path))
    chosen.check_groups(saved, before)
    with pytest.raises(CheckpointError, match=r"of \[2, 1\] parameters, but this recipe has other parameters in them"):
        chosen.check_groups(saved, now)
    chosen.check_groups(checkpoint(tmp_path, {}, groups=[2, 1]), now)  # of an earlier version
    with pytest.raises(CheckpointError, match=r"of \[3\] parameters, but this recipe has groups of \[2, 1\]"):
        chosen.check_groups(checkpoint(tmp_path, {}, groups=[3]), now)


def test_what_was_set_aside_can_be_resumed(tmp_path: Path) -> None:
    """After a start over, the checkpoints of the first attempt are wanted back: the newest is then not the second's."""
    for name in ("aside-20260101-000000-1-step-00000004", "step-00000002", "step-00000004"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    folder, now = Checkpoints(tmp_path / "checkpoints"), identity(tmp_path)
    wanted = Checkpoint(next(folder.folder.glob("aside-*")), 4, {})
    Resume(folder, str(wanted.path), (), now, lambda _kind, _ranks: None).begin(wanted, print, None)
    assert folder.paths() == []
    assert len(list(folder.folder.glob("aside-*"))) == 3
    assert wanted.path.is_dir()


# --- manifests --------------------------------------------------------------------------------------------------------


def write_manifest(folder: Path, **changes: Any) -> Path:
    """A good manifest, then changed; a change to None takes the key away."""
    path = folder / "step-00000003"
    path.mkdir(exist_ok=True)
    manifest = {
        "format": 1,
        "step": 3,
        "identity": identity(folder),
        "kind": "single",
        "world_size": 1,
        "total_steps": 5,
        "files": {},
        "progress": {"step": 3, "best_step": None},
        "batches": {"step": 3},
    }
    manifest = {key: value for key, value in (manifest | changes).items() if value is not None}
    manifest["sha256"] = _manifest_hash(manifest)
    (path / MANIFEST).write_text(json.dumps(manifest))
    return path


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"format": 2}, "has format 2; this version reads format 1"),
        ({"format": None}, "has format None"),
        ({"step": None}, "was written by another version of ptft"),
        ({"step": "3"}, "was written by another version of ptft"),
        ({"identity": None}, "needs 'identity', a dict"),
        ({"identity": []}, "needs 'identity', a dict"),
        ({"kind": None}, "needs 'kind', a str"),
        ({"world_size": None}, "needs 'world_size', a int"),
        ({"files": None}, "was written by another version of ptft"),
    ],
)
def test_a_manifest_of_another_version_is_refused_in_one_sentence(
    tmp_path: Path, changes: dict[str, Any], says: str
) -> None:
    with pytest.raises(CheckpointError) as error:
        resume(tmp_path, identity(tmp_path)).check(read_checkpoint(write_manifest(tmp_path, **changes)))
    assert says in str(error.value)
    assert "another version" in str(error.value) or "this version" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_format_of_the_future_is_not_called_damage(tmp_path: Path) -> None:
    """It may compute its own hash in another way."""
    path = write_manifest(tmp_path, format=2)
    (path / MANIFEST).write_text(re.sub('"sha256": "[^"]*"', '"sha256": "other"', (path / MANIFEST).read_text()))
    with pytest.raises(CheckpointError, match="format 2"):
        read_checkpoint(path)


def test_a_checkpoint_of_another_version_is_never_skipped_as_damaged(tmp_path: Path) -> None:
    """Training must not start from zero, or from an older checkpoint, because the newest cannot be read."""
    write_manifest(tmp_path, format=2)
    with pytest.raises(PtftError, match="format 2"):
        Checkpoints(tmp_path).newest_good(OneProcess(), lambda _: None)


# --- what is shown ----------------------------------------------------------------------------------------------------


def test_resolved_and_shown_are_the_sections_of_the_own_task_only(tmp_path: Path) -> None:
    loaded = load(tmp_path, "clm.bos=true")
    for text in (loaded.resolved, describe(loaded)):
        assert {name for name in TASKS if re.search(rf"^{name}\b", text, re.MULTILINE)} == {"clm"}
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(loaded.resolved)
    assert load_recipe(str(resolved)).recipe == loaded.recipe


def test_a_reference_to_a_key_counts_as_its_value(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_9", "secret-9")
    written = identity(tmp_path, "model.config.name='m-${optim.lr}'", "optim.lr=0.5")
    assert written["chosen"]["model.config.name"] == "m-0.5"
    assert written == identity(tmp_path, "model.config.name=m-0.5", "optim.lr=0.5")
    hidden = identity(tmp_path, "model.config.name='${model.config.other}'", "model.config.other='${env:A_9}'")
    assert "secret-9" not in json.dumps(hidden)
