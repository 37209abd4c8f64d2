"""Continual learning: EWC, L2-SP, replay and distillation from the old network."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapt_support import write_adapted, write_base
from safetensors.torch import load_file
from support import outcome, start, train_rows
from tiny import classified, made, write_rows
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertForMaskedLM

from ptft_dist.api import load_recipe
from ptft_dist.checkpoint.identity import differences
from ptft_dist.config.continual import ReplaySettings
from ptft_dist.engine.regularizer import penalty_and_gradient
from ptft_dist.errors import DataError, RecipeError
from ptft_dist.launch.environment import place
from ptft_dist.networks.continual import Ewc, L2Sp
from ptft_dist.session import Session, old_network

OLD = [{"path": "old.jsonl"}]
EWC = {"strength": 50.0, "data": OLD, "rows": 20}
REPLAY = {"data": OLD, "weight": 0.25}
ALL = {"ewc": EWC, "l2_sp": {"strength": 0.1}, "replay": REPLAY}
FOUR: dict[str, Any] = {  # updates
    "train": {"max_steps": 4},
    "eval": {"every": 2},
    "save": {"every": 2},
    "batch": {"global_size": 12, "micro_size": 2},
}
SPLITS = {
    "ddp": (2, "cpu"),
    "zero2": (2, "cpu_zero2"),
    "zero3": (2, "cpu_zero3"),
    "zero3_padded": (3, "cpu_zero3"),
    "fsdp2": (2, "fsdp2"),
    "fsdp2_efficient": (2, "fsdp2_efficient"),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    return write_base(tmp_path_factory.mktemp("base"), cache, "classification", layers=1)


def write(
    folder: Path, base: Path, continual: dict[str, Any], model: dict[str, Any] | None = None, **more: Any
) -> Path:
    """The tiny recipe of classification, which goes on from `base`, and 40 old rows that are not among the new ones."""
    path = write_adapted(folder, base, "classification", model or {}, continual=continual, **more)
    write_rows(folder / "old.jsonl", [{**row, "text": f"zebra {row['text']}"} for row in made(40, classified)])
    return path


@pytest.fixture
def session(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Session]:
    """Makes the session of a recipe in this process. Nothing is trained."""
    monkeypatch.setenv("PTFT_CACHE", str(tmp_path / "cache"))

    def make(continual: dict[str, Any], model: dict[str, Any] | None = None, **more: Any) -> Session:
        return Session(load_recipe(str(write(tmp_path, base, continual, model, **more))), place())

    return make


# --- penalties --------------------------------------------------------------------------------------------------------


def test_fisher_is_that_of_a_naive_loop(session: Callable[..., Session], base: Path, tmp_path: Path) -> None:
    """All old rows one by one in plain transformers; class weights and label smoothing are not part of it."""
    smooth = {"class_weights": "balanced", "label_smoothing": 0.2}
    made_here = session({"ewc": {**EWC, "rows": 1000}}, classification=smooth)
    made_here.prepare_penalties()
    found = load_file(made_here.penalty_files["fisher"])
    model = AutoModelForSequenceClassification.from_pretrained(base).eval()
    tokenizer = AutoTokenizer.from_pretrained(base)
    rows = [json.loads(line) for line in (tmp_path / "old.jsonl").read_text().splitlines()]
    expected = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for row in rows:
        model.zero_grad()
        ids = torch.tensor([tokenizer(row["text"], truncation=True, max_length=32).input_ids])
        model(input_ids=ids, labels=torch.tensor([model.config.label2id[row["label"]]])).loss.backward()
        for name, parameter in model.named_parameters():
            expected[name] += parameter.grad.square() / len(rows)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.allclose(found[name], value, rtol=1e-4, atol=1e-12), name
    assert sum(float(value.sum()) for value in expected.values()) > 1e-3
    start = load_file(made_here.penalty_files["start"])
    assert all(torch.equal(start[name], parameter) for name, parameter in model.named_parameters())


def test_penalties_and_their_gradients_are_those_of_the_formulas() -> None:
    random = torch.Generator().manual_seed(0)
    now, old, fisher = (torch.randn(3, 4, generator=random) for _ in range(3))
    terms = [L2Sp(0.5, {"w": old}), Ewc(7.0, {"w": old}, {"w": fisher.square()})]
    found = penalty_and_gradient(terms, "w", now)
    assert found is not None
    leaf = now.clone().requires_grad_(True)
    naive = sum(
        0.25 * (leaf[i, j] - old[i, j]) ** 2 + 3.5 * fisher[i, j] ** 2 * (leaf[i, j] - old[i, j]) ** 2
        for i in range(3)
        for j in range(4)
    )
    assert isinstance(naive, torch.Tensor)
    naive.backward()
    assert leaf.grad is not None
    assert torch.allclose(found[0], naive.detach())
    assert torch.allclose(found[1], leaf.grad)
    assert penalty_and_gradient(terms, "new_head", now) is None


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, base: Path, cache: Path) -> Path:
    """The directory of a run of everything in one process."""
    folder = tmp_path_factory.mktemp("whole")
    write(folder, base, ALL, **FOUR)
    run = start("train", "recipe.yaml", "run_dir=whole", cwd=folder, cache=cache)
    assert run.wait() == 0, run.stderr
    return folder


def test_the_first_update_has_no_penalty_and_the_others_have_one(whole: Path) -> None:
    first, *others = [row["penalty"] for row in train_rows(whole / "whole")]
    assert first == 0.0
    assert all(penalty > 0 for penalty in others)


@pytest.mark.parametrize("name", SPLITS)
def test_any_split_has_the_same_losses_and_penalties(whole: Path, cache: Path, name: str) -> None:
    ranks, kind = SPLITS[name]
    run = start("train", "recipe.yaml", f"run_dir={name}", cwd=whole, cache=cache, ranks=ranks, kind=kind)
    assert run.wait() == 0, run.stderr
    ours, theirs = train_rows(whole / name), train_rows(whole / "whole")
    assert len(ours) == len(theirs) == 4
    for row, expected in zip(ours, theirs, strict=True):
        assert row["loss"] == pytest.approx(expected["loss"], rel=1e-5), row
        assert row["penalty"] == pytest.approx(expected["penalty"], rel=1e-3, abs=1e-9), row


def test_old_conversations_of_a_recipe_that_generates(tmp_path: Path, cache: Path) -> None:
    """Prompts to generate from are kept for validation rows only."""
    base = write_base(tmp_path / "base", cache, "sft", layers=1)
    ewc = {"strength": 5.0, "data": [{"path": "rows.jsonl"}], "rows": 6}
    write_adapted(tmp_path, base, "sft", {}, continual={"ewc": ewc}, **FOUR)
    run = start("train", "recipe.yaml", cwd=tmp_path, cache=cache)
    assert run.wait() == 0, run.stderr
    assert train_rows(tmp_path / "run")[-1]["penalty"] > 0


def test_killed_and_resumed_is_never_killed(tmp_path: Path, base: Path, cache: Path) -> None:
    """On two ranks; the last checkpoint is lost. The second start finds the Fisher information in the cache."""
    write(tmp_path, base, {"ewc": {**EWC, "rows": 21}, "replay": REPLAY}, **FOUR)
    first = start("train", "recipe.yaml", cwd=tmp_path, cache=cache, ranks=2)
    assert first.wait() == 0, first.stderr
    assert "Fisher information of 21 old rows" in first.stderr  # computed by the rank that came first
    expected = outcome(tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoints/step-00000004")
    shutil.rmtree(tmp_path / "run/model")
    again = start("train", "recipe.yaml", cwd=tmp_path, cache=cache, ranks=2)
    assert again.wait() == 0, again.stderr
    assert "resumed from" in again.stderr
    assert re.search(r"Fisher information of 21 old rows, .* loaded from the cache", again.stderr)
    assert outcome(tmp_path / "run") == expected
    report = json.loads((tmp_path / "run/data_report.json").read_text())
    assert report["continual.replay.data"]["train"]["rows"] == 40


def test_the_fisher_information_is_computed_again_for_other_rows_only(
    session: Callable[..., Session], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    estimates, real = [], old_network.fisher_diagonal
    monkeypatch.setattr(old_network, "fisher_diagonal", lambda *given: estimates.append(1) or real(*given))
    session({"ewc": EWC}).prepare_penalties()
    session({"ewc": {**EWC, "strength": 3.0}}, optim={"lr": 0.5}).prepare_penalties()
    assert len(estimates) == 1
    write_rows(tmp_path / "other.jsonl", made(30, classified))
    session({"ewc": {**EWC, "data": [{"path": "other.jsonl"}]}}).prepare_penalties()
    assert len(estimates) == 2
    session({"ewc": EWC}, {"adapt": "bitfit"}).prepare_penalties()
    assert len(estimates) == 3


def test_a_new_head_has_no_start_value(session: Callable[..., Session]) -> None:
    made_here = session({"l2_sp": {"strength": 1.0}}, {"new_head": True})
    made_here.prepare_penalties()
    start = load_file(made_here.penalty_files["start"])
    assert start
    assert not {name for name in start if name.startswith("classifier")}


# --- replay -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("weight", "shares"), [(0.2, (4, 1)), (0.25, (3, 1)), (1 / 3, (2, 1)), (0.999, (1, 999))])
def test_shares_of_a_weight(weight: float, shares: tuple[int, int]) -> None:
    assert ReplaySettings.model_validate({"data": OLD, "weight": weight}).shares == shares


def test_replay_has_the_share_that_was_asked_for(session: Callable[..., Session]) -> None:
    made_here = session({"replay": REPLAY}, train={"max_steps": None, "epochs": 2})
    new, plan, taken, old_rows = made_here.rows.sizes[0], made_here.plan, [], 0
    for step in range(plan.total_steps):
        rows = plan.rows_of(step).tolist()
        old_here = sum(row >= new for row in rows)
        assert abs(old_here - len(rows) * 0.25) < 2
        taken, old_rows = taken + rows, old_rows + old_here
    assert old_rows / len(taken) == pytest.approx(0.25, abs=1 / len(taken))
    assert [taken.count(row) for row in range(new)] == [2] * new  # an epoch is one pass over the new rows
    ids = [made_here.store.row(row).input_ids.tolist() for row in taken]
    assert ["zebra" in text for text in made_here.trained.tokenizer.batch_decode(ids)] == [row >= new for row in taken]
    assert made_here.store.lengths(plan.rows_of(0)).tolist() == list(map(len, ids[: len(plan.rows_of(0))]))


def test_a_row_outside_of_all_stores_is_refused(session: Callable[..., Session]) -> None:
    store = session({"replay": REPLAY}).store
    for bad in (-1, len(store)):
        with pytest.raises(IndexError):
            store.row(bad)
        with pytest.raises(IndexError):
            store.lengths(torch.tensor([bad]).numpy())


# --- the old network as a teacher -------------------------------------------------------------------------------------


def test_the_old_network_can_be_the_teacher(tmp_path: Path, base: Path, cache: Path) -> None:
    write(tmp_path, base, {"replay": REPLAY}, distillation={"teacher": str(base)}, train={"max_steps": 2})
    run = start("train", "recipe.yaml", "eval.at_start=true", cwd=tmp_path, cache=cache)
    assert run.wait() == 0, run.stderr
    (first,) = [row for row in map(json.loads, (tmp_path / "run/metrics.jsonl").open()) if row["step"] == 0]
    assert first["eval/divergence"] == pytest.approx(0, abs=1e-6)


# --- identity ---------------------------------------------------------------------------------------------------------


def test_the_contents_of_old_data_are_compared_and_not_their_paths(
    session: Callable[..., Session], tmp_path: Path
) -> None:
    saved = session({"replay": REPLAY, "ewc": EWC}).identity
    (tmp_path / "moved.jsonl").write_bytes((tmp_path / "old.jsonl").read_bytes())
    moved = session({"replay": {**REPLAY, "data": [{"path": "moved.jsonl"}]}, "ewc": EWC}).identity
    assert differences(saved, moved) == {}
    write_rows(tmp_path / "moved.jsonl", made(30, classified))
    other = session({"replay": {**REPLAY, "data": [{"path": "moved.jsonl"}]}, "ewc": EWC}).identity
    assert set(differences(saved, other)) == {"continual.replay.data's contents"}
    stronger = session({"replay": REPLAY, "ewc": {**EWC, "strength": 3.0}}).identity
    assert set(differences(saved, stronger)) == {"continual.ewc.strength"}


# --- refusals ---------------------------------------------------------------------------------------------------------

L2_SP = {"l2_sp": {"strength": 1.0}}
REFUSED: list[tuple[dict[str, Any], dict[str, Any], dict[str, Any], str]] = [
    ({"ewc": {**EWC, "strength": 0.0}}, {}, {}, r"continual\.ewc\.strength: expected a number above 0, got 0\.0"),
    ({"replay": {"data": OLD, "weight": 1.0}}, {}, {}, r"continual\.replay\.weight: expected .*, got 1\.0"),
    ({"ewc": {"strength": 1.0}}, {}, {}, r"continual\.ewc\.data: required, but not given"),
    ({}, {}, {}, r"continual: nothing is set: set ewc, l2_sp or replay"),
    ({"ewc": EWC}, {"adapt": "lora"}, {}, r"continual\.ewc: has no effect here: model\.adapt: lora freezes"),
    (L2_SP, {"adapt": "ia3"}, {}, r"continual\.l2_sp: has no effect here: model\.adapt: ia3 freezes"),
    ({"ewc": EWC}, {"new_head": True}, {}, r"continual\.ewc: model\.new_head: the new head cannot do the old task"),
    (L2_SP, {}, {"tokenizer.add": ["zebra"]}, r"continual\.l2_sp: tokens are added"),
    (L2_SP, {}, {"train.precision": "fp16"}, r"continual\.l2_sp: its gradient is not scaled as fp16 needs"),
    ({"replay": {"data": [{**OLD[0], "fields": {"tex": "x"}}]}}, {}, {}, r"continual\.replay\.data\.0\.fields\.tex:"),
]


@pytest.mark.parametrize(("continual", "model", "more", "text"), REFUSED, ids=range(len(REFUSED)))
def test_what_has_no_effect_is_refused(
    tmp_path: Path, continual: dict[str, Any], model: dict[str, Any], more: dict[str, Any], text: str
) -> None:
    with pytest.raises(RecipeError, match=text):
        load_recipe(str(write(tmp_path, tmp_path, continual, model)), more)


@pytest.mark.parametrize(("settings", "refused"), [({}, True), ({"loss": "simpo"}, False)], ids=["dpo", "simpo"])
def test_a_loss_with_a_reference_says_nothing_about_the_old_network(
    tmp_path: Path, settings: dict[str, Any], refused: bool
) -> None:
    path = write_adapted(tmp_path, tmp_path, "dpo", {}, continual={"ewc": EWC}, dpo=settings)
    text = r"continual\.ewc: the loss of task dpo compares with a reference.* Use l2_sp or replay"
    with pytest.raises(RecipeError, match=text) if refused else contextlib.nullcontext():
        load_recipe(str(path))


def test_a_network_with_random_weights_has_nothing_to_forget(tmp_path: Path) -> None:
    path = write(tmp_path, tmp_path, {"replay": REPLAY})
    config = {"model_type": "bert", "hidden_size": 32}
    text = r"continual: has no effect here: it needs model\.path"
    with pytest.raises(RecipeError, match=text):
        load_recipe(str(path), {"model.path": None, "model.config": config})


def test_missing_old_data_end_the_run_with_their_key(tmp_path: Path, base: Path, cache: Path) -> None:
    write(tmp_path, base, {"ewc": {**EWC, "data": [{"path": "lost.jsonl"}]}})
    run = start("train", "recipe.yaml", cwd=tmp_path, cache=cache)
    assert run.wait() == 3
    assert "continual.ewc.data[0].path: lost.jsonl: no such file" in run.stderr


def test_old_rows_with_other_labels_are_refused(session: Callable[..., Session], tmp_path: Path) -> None:
    write_rows(tmp_path / "odd.jsonl", [{"text": "a cat", "label": "animal"}, {"text": "rain", "label": "weather"}])
    with pytest.raises(DataError, match=r"continual\.replay\.data: .*odd\.jsonl:2: the label 'weather' is none of"):
        session({"replay": {"data": [{"path": "odd.jsonl"}]}})


def test_ewc_of_a_network_that_never_did_the_task_is_refused(
    session: Callable[..., Session], base: Path, tmp_path: Path
) -> None:
    BertForMaskedLM.from_pretrained(base).save_pretrained(tmp_path / "body")
    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "body")
    with pytest.raises(RecipeError, match=r"continual\.ewc: model\.path has no weights for .*classifier"):
        session({"ewc": EWC}, {"path": str(tmp_path / "body")}).prepare_penalties()


def test_l2_sp_of_a_new_head_alone_is_refused(session: Callable[..., Session]) -> None:
    model = {"new_head": True, "adapt": {"match": "^classifier"}}
    with pytest.raises(RecipeError, match=r"continual\.l2_sp: has no effect here: model\.path has no weights for the"):
        session(L2_SP, model).prepare_penalties()
