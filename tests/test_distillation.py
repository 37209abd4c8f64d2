"""Distillation: divergences against hand computation and TRL, resumed and split runs, refused recipes."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from preloaded_ranks import forked_ptft
from support import eval_rows, start, train_rows
from tiny import write_tiny

from ptft_dist.config.distillation import DistillationSettings
from ptft_dist.networks.facts import read_facts
from ptft_dist.tasks.common.distillation import Distillation, divergence


def settings(**changes: Any) -> DistillationSettings:
    return DistillationSettings(teacher="none", **changes)


# --- divergences ------------------------------------------------------------------------------------------------------


def kl(p: list[float], q: list[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def test_divergences_by_hand() -> None:
    student, teacher = [0.2, 0.3, 0.5], [0.6, 0.3, 0.1]
    ours, theirs = torch.tensor([student]).log(), torch.tensor([teacher]).log()
    mixture = [0.25 * t + 0.75 * s for s, t in zip(student, teacher, strict=True)]
    expected = {
        ("forward_kl", None): kl(teacher, student),
        ("reverse_kl", None): kl(student, teacher),
        ("jsd", 0.25): 0.25 * kl(teacher, mixture) + 0.75 * kl(student, mixture),
    }
    for (name, beta), value in expected.items():
        found = divergence(ours, theirs, settings(divergence=name, beta=beta))
        assert found.tolist() == pytest.approx([value], rel=1e-5), name
    for name in ("forward_kl", "reverse_kl", "jsd"):
        assert divergence(ours, ours, settings(divergence=name)).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(("name", "beta"), [("forward_kl", 0.0), ("reverse_kl", 1.0), ("jsd", 0.5), ("jsd", 0.1)])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_divergences_are_trl_s(name: str, beta: float, temperature: float) -> None:
    from trl.experimental.gkd import GKDTrainer

    random = torch.Generator().manual_seed(0)
    ours, theirs = torch.randn(2, 7, 11, generator=random) * 3, torch.randn(2, 7, 11, generator=random) * 3
    given = settings(divergence=name, temperature=temperature, beta=beta if name == "jsd" else None)
    expected = GKDTrainer.generalized_jsd_loss(ours, theirs, beta=beta, temperature=temperature, reduction="none")
    assert torch.allclose(divergence(ours, theirs, given), expected.sum(-1), rtol=1e-5, atol=1e-6)


# --- whole runs -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> dict[str, Path]:
    """A trained network for each task."""
    found = {}
    for task in ("sft", "classification"):
        folder = tmp_path_factory.mktemp(f"teacher-{task}")
        write_tiny(folder, task, **({"sft": {"generation": None}} if task == "sft" else {}))
        run = start("train", "recipe.yaml", cwd=folder, cache=cache)
        assert run.wait() == 0, run.stderr
        found[task] = folder / "run/model"
    return found


def write_student(folder: Path, task: str, teacher: Path, **changes: Any) -> Path:
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    more: dict[str, Any] = {"tokenizer": {"train": None, "path": str(teacher)}}
    if task == "sft":
        more["sft"] = {"generation": None}
    distillation = {"teacher": str(teacher), "temperature": 2.0, **changes}
    return write_tiny(folder, task, model={"config": small}, distillation=distillation, **more)


RUNS = {"ddp": (2, "cpu"), "zero3": (2, "cpu_zero3")}


@pytest.mark.parametrize("task", ["sft", "classification"])
def test_a_student_learns_from_its_teacher_the_same_over_any_split(
    tmp_path: Path, cache: Path, teachers: dict[str, Path], task: str
) -> None:
    write_student(tmp_path, task, teachers[task])
    words = ("train", "recipe.yaml", "train.max_steps=4", "save.every=null")
    whole = start(*words, "run_dir=whole", cwd=tmp_path, cache=cache)
    assert whole.wait() == 0, whole.stderr
    expected = train_rows(tmp_path / "whole")
    assert len(expected) == 4
    assert expected[-1]["divergence"] < expected[0]["divergence"]
    for row in expected:
        assert row["loss"] == pytest.approx(0.5 * row["hard_loss"] + 0.5 * 4.0 * row["divergence"], rel=1e-5)
    scored = eval_rows(tmp_path / "whole")[-1]
    assert scored["eval/loss"] == pytest.approx(
        0.5 * scored["eval/hard_loss"] + 0.5 * 4.0 * scored["eval/divergence"], rel=1e-5
    )
    for name, (ranks, kind) in RUNS.items():
        run = start(*words, f"run_dir={name}", cwd=tmp_path, cache=cache, ranks=ranks, kind=kind)
        assert run.wait() == 0, run.stderr
        losses = [row["loss"] for row in train_rows(tmp_path / name)]
        assert losses == pytest.approx([row["loss"] for row in expected], rel=1e-5), name


def test_the_losses_by_hand_and_a_teacher_with_its_labels_in_another_order(
    tmp_path: Path, cache: Path, teachers: dict[str, Path]
) -> None:
    """The student stays as it is, so that its first losses can be computed from what was exported."""
    from safetensors.torch import load_file, save_file
    from sklearn.utils.class_weight import compute_class_weight
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    reversed_teacher = tmp_path / "reversed"
    shutil.copytree(teachers["classification"], reversed_teacher)
    config = json.loads((reversed_teacher / "config.json").read_text())
    config["id2label"] = {"0": "thing", "1": "animal"}
    del config["label2id"]  # many models on the Hub have id2label alone
    (reversed_teacher / "config.json").write_text(json.dumps(config))
    weights = load_file(reversed_teacher / "model.safetensors")
    weights |= {name: x.flip(0).contiguous() for name, x in weights.items() if name.startswith("classifier.")}
    save_file(weights, reversed_teacher / "model.safetensors", metadata={"format": "pt"})

    losses = {}
    for name, teacher in (("same", teachers["classification"]), ("reversed", reversed_teacher)):
        folder = tmp_path / f"student-{name}"
        folder.mkdir()
        path = write_student(folder, "classification", teacher)
        recipe = json.loads(path.read_text())
        recipe["data"]["validation"], recipe["eval"], recipe["save"]["every"] = None, {"every": None}, None
        recipe["batch"], recipe["train"]["max_steps"] = {"global_size": 160, "micro_size": 40}, 1
        recipe["optim"]["lr"] = 1e-30
        path.write_text(json.dumps(recipe))
        run = start("train", "recipe.yaml", cwd=folder, cache=cache)
        assert run.wait() == 0, run.stderr
        (losses[name],) = train_rows(folder / "run")

    tokenizer = AutoTokenizer.from_pretrained(folder / "run/model")
    student, teacher_network = (
        AutoModelForSequenceClassification.from_pretrained(path, dtype=torch.float32).eval()
        for path in (folder / "run/model", teachers["classification"])
    )
    assert student.config.label2id == teacher_network.config.label2id == {"animal": 0, "thing": 1}
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    labels = [student.config.label2id[row["label"]] for row in rows]
    balanced = compute_class_weight("balanced", classes=np.array([0, 1]), y=labels)
    hard = total = distance = 0.0
    with torch.no_grad():
        for row, label in zip(rows, labels, strict=True):
            encoded = tokenizer(row["text"], truncation=True, max_length=32, return_tensors="pt")
            ours, theirs = (network(**encoded).logits[0].double() for network in (student, teacher_network))
            hard -= balanced[label] * ours.log_softmax(0)[label].item()
            total += balanced[label]
            distance += kl((theirs / 2).softmax(0).tolist(), (ours / 2).softmax(0).tolist())  # temperature 2
    for row in losses.values():
        assert row["hard_loss"] == pytest.approx(hard / total, rel=1e-5)
        assert row["divergence"] == pytest.approx(distance / 160, rel=1e-4)
        assert row["loss"] == pytest.approx(0.5 * hard / total + 0.5 * 4 * distance / 160, rel=1e-5)


def test_a_teacher_that_is_the_student_says_nothing_new(tmp_path: Path, cache: Path, teachers: dict[str, Path]) -> None:
    """The divergence from itself is 0, and without it the hard loss is what fine-tuning has."""
    teacher = teachers["sft"]
    recipe = json.loads(write_student(tmp_path, "sft", teacher, temperature=1.0).read_text())
    recipe["model"] = {"path": str(teacher)}
    recipe["train"]["max_steps"] = 1
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    run = start("train", "recipe.yaml", cwd=tmp_path, cache=cache)
    assert run.wait() == 0, run.stderr
    with_teacher = train_rows(tmp_path / "run")[0]
    assert with_teacher["divergence"] == pytest.approx(0, abs=1e-6)
    del recipe["distillation"]
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    run = start("train", "recipe.yaml", "run_dir=alone", cwd=tmp_path, cache=cache)
    assert run.wait() == 0, run.stderr
    assert train_rows(tmp_path / "alone")[0]["loss"] == pytest.approx(with_teacher["hard_loss"], rel=1e-6)


def test_another_vocabulary_and_other_labels_are_refused(
    tmp_path: Path, cache: Path, teachers: dict[str, Path]
) -> None:
    write_student(tmp_path, "sft", teachers["sft"])
    recipe = json.loads((tmp_path / "recipe.yaml").read_text())
    recipe["tokenizer"] = {"train": {"algorithm": "unigram", "vocab_size": 300}}
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    refused = start("train", "recipe.yaml", cwd=tmp_path, cache=cache)
    assert refused.wait() == 2
    assert "has another vocabulary" in refused.stderr
    folder = tmp_path / "labels"
    folder.mkdir()
    write_student(folder, "classification", teachers["classification"])
    rows = (folder / "rows.jsonl").read_text().replace('"animal"', '"beast"')
    (folder / "rows.jsonl").write_text(rows)
    refused = start("train", "recipe.yaml", cwd=folder, cache=cache)
    assert refused.wait() == 2
    assert "but not beast" in refused.stderr


def test_a_decoder_teacher_reads_the_students_padding(tmp_path: Path, cache: Path) -> None:
    """Its own config may name another pad token, or none; the losses must not depend on how rows are padded."""
    from transformers import AutoConfig, AutoModelForSequenceClassification

    write_tiny(tmp_path, "classification")
    first = start("train", "recipe.yaml", "train.max_steps=1", cwd=tmp_path, cache=cache)
    assert first.wait() == 0, first.stderr
    student = tmp_path / "run/model"
    saved = AutoConfig.from_pretrained(student)
    labels = {"id2label": saved.id2label, "label2id": saved.label2id}
    sizes = {"vocab_size": saved.vocab_size, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 64}
    config = AutoConfig.for_model("gpt2", **sizes, **labels, pad_token_id=None)
    teacher = tmp_path / "teacher"
    AutoModelForSequenceClassification.from_config(config).save_pretrained(teacher)
    for file in student.glob("tokenizer*"):
        (teacher / file.name).write_bytes(file.read_bytes())
    write_student(tmp_path, "classification", teacher)
    losses = {}
    for size in (1, 12):
        run = start("train", "recipe.yaml", f"run_dir=by{size}", f"batch.micro_size={size}", cwd=tmp_path, cache=cache)
        assert run.wait() == 0, run.stderr
        losses[size] = [row["loss"] for row in train_rows(tmp_path / f"by{size}")]
    assert losses[1] == pytest.approx(losses[12], rel=1e-5)


def test_each_network_gets_the_token_types_that_it_knows() -> None:
    """A BERT teaches a DistilBERT on pairs: the teacher must see which text is the second, the student cannot."""
    from transformers import AutoConfig, AutoModelForSequenceClassification

    small = {"vocab_size": 20, "num_labels": 2}
    bert = AutoConfig.for_model("bert", hidden_size=16, num_hidden_layers=1, num_attention_heads=2, **small)
    distilled = AutoConfig.for_model("distilbert", dim=16, hidden_dim=32, n_layers=1, n_heads=2, **small)
    teacher, student = (AutoModelForSequenceClassification.from_config(c) for c in (bert, distilled))
    seen: dict[str, set[str]] = {}

    def choices(model: str, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        seen[model] = set(inputs)
        return torch.zeros(1, 2, requires_grad=model == "student"), torch.tensor([1])

    task = SimpleNamespace(
        auto_class=None,
        pad_id=3,
        has_types=False,
        network=read_facts(student),
        choices=choices,
        loss_of=lambda logits, _: (logits.sum(), torch.tensor(1)),
    )
    distillation = Distillation(task, settings(), [0, 1])
    source: Any = None  # not used
    distillation.prepare_frozen("teacher", teacher, source)
    network = SimpleNamespace(forward=lambda call, inputs: call("teacher", inputs))
    distillation.adopt("teacher", network, read_facts(teacher))
    assert task.has_types
    assert teacher.config.pad_token_id == 3
    distillation.loss("student", {name: torch.zeros(1, 2) for name in ("input_ids", "token_type_ids")})
    assert seen == {"teacher": {"input_ids", "token_type_ids"}, "student": {"input_ids"}}


def test_another_teacher_in_the_same_place_is_another_run(
    tmp_path: Path, cache: Path, teachers: dict[str, Path]
) -> None:
    teacher = tmp_path / "teacher"
    shutil.copytree(teachers["sft"], teacher)
    write_student(tmp_path, "sft", teacher)
    first = start("train", "recipe.yaml", "train.max_steps=4", cwd=tmp_path, cache=cache)
    assert first.wait() == 0, first.stderr
    from safetensors.torch import load_file, save_file

    changed = {name: tensor * 1.5 for name, tensor in load_file(teacher / "model.safetensors").items()}
    save_file(changed, teacher / "model.safetensors", metadata={"format": "pt"})
    again = start("train", "recipe.yaml", "train.max_steps=4", cwd=tmp_path, cache=cache)
    assert again.wait() == 4
    assert "distillation.teacher's files" in again.stderr


def test_settings_that_cannot_work(tmp_path: Path) -> None:
    write_tiny(tmp_path, "regression", distillation={"teacher": "x"})
    refused = forked_ptft("config", "check", "recipe.yaml", cwd=tmp_path)
    assert refused.returncode == 2
    assert "distillation: has no effect here: it needs one of the tasks clm, sft, classification" in refused.stderr
    for changes, message in (
        ({"beta": 0.5}, "beta has no effect here"),
        ({"divergence": "jsd", "beta": 1.0}, "above 0 and below 1"),
        ({"hard": 1.0}, "the teacher has no effect"),
    ):
        with pytest.raises(ValueError, match=message):
            settings(**changes)
