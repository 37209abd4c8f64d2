"""DPO and KTO: losses and metrics are TRL's, the three references agree, and broken inputs are refused."""

from __future__ import annotations

import copy
import json
import math
import random
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from adapt_support import write_adapted, write_base
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from support import eval_rows, outcome, start, train_rows
from task_support import make_task
from tiny import LLAMA, WORDS, judged, made, preferred, write_rows, write_tiny
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

import ptft_dist
from ptft_dist.api import load_recipe
from ptft_dist.checkpoint.identity import differences
from ptft_dist.config.recipe import ModelSection
from ptft_dist.config.tokenizer_section import TokenizerTraining
from ptft_dist.data.encoder import EncoderContext, LeftOut
from ptft_dist.data.example_store import ExampleStore
from ptft_dist.data.formats import Record
from ptft_dist.data.store import Row
from ptft_dist.data.tokenizer import train_tokenizer
from ptft_dist.errors import RecipeError
from ptft_dist.launch.environment import place
from ptft_dist.networks.adapt import adapters
from ptft_dist.session import Session
from ptft_dist.tasks.common import preference_losses as losses
from ptft_dist.tasks.common.chat_template import CHATML
from ptft_dist.tasks.common.preference_rows import halves
from ptft_dist.tasks.common.referenced import REFERENCE
from ptft_dist.tasks.protocol import BASELINE
from ptft_dist.tasks.registry import encoder_class
from ptft_dist.training import start_values as computing
from ptft_dist.training.batches import mask_all

PAIRS = made(5, preferred)
PLAIN = [
    {"prompt": f"a {w}", "chosen": " cat" * (i + 1) + " sleeps", "rejected": f" dog {w}"}
    for i, w in enumerate(WORDS[:5])
]
ANSWERS = [{**row, "label": row["label"]} for row in made(7, judged)]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    texts = [" ".join(WORDS), "user assistant system"] * 9
    trained = train_tokenizer(
        TokenizerTraining(vocab_size=320), texts, ("eos=<|im_end|>", "bos", "pad"), ["<|im_start|>"]
    )
    trained.chat_template = CHATML
    return trained


def network(tokenizer: Any, seed: int) -> Any:
    """A network without dropout, whose logits differ between seeds."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(**LLAMA, vocab_size=len(tokenizer), initializer_range=0.2, use_cache=False)
    config.pad_token_id = tokenizer.pad_token_id
    return AutoModelForCausalLM.from_config(config).eval()


def task_of(tokenizer: Any, name: str, model: Any, **settings: Any) -> Any:
    recipe = load_recipe(
        {
            "task": name,
            "model": {"config": LLAMA},
            "tokenizer": {"train": {"vocab_size": 320}},
            "data": {"train": [{"path": "rows.jsonl"}], "max_length": 64},
            "batch": {"global_size": 4, "micro_size": 4},
            "optim": {"lr": 0.1},
            "train": {"max_steps": 1},
            name: settings,
            "run_dir": "run",
        }
    ).recipe
    return make_task(recipe, tokenizer, model=model)


def rows_of(tokenizer: Any, task: Any, values: list[dict[str, Any]], folder: Path) -> list[Row]:
    """Rows as training reads them."""
    encoder = encoder_class(task.setup.name)(EncoderContext(task.settings, task.setup.name, tokenizer, 64, 0))
    writer = encoder.writer(folder / "store", "train")
    for result in encoder.outcomes([Record(each, f"rows.jsonl:{i + 1}") for i, each in enumerate(values)]):
        assert result.problem is None, result.problem
        for example in result.examples:
            writer.add(example)
    writer.close()
    store = type(encoder).store.open(folder / "store")
    return [store.row(i) for i in range(len(store))]


def with_reference(task: Any, rows: list[Row], reference: Any) -> Any:
    """The batch of rows with the cached log-probabilities of a reference network."""
    batch = task.collate(rows)
    with torch.no_grad():
        batch.inputs[REFERENCE] = task.start_values(reference, batch.inputs)
    return batch


def means(metrics: dict[str, Any]) -> dict[str, float]:
    return {name: (total / count).item() for name, (total, count) in metrics.items()}


# --- compared with TRL ------------------------------------------------------------------------------------------------

LOSSES: dict[str, dict[str, Any]] = {
    "sigmoid": {"loss": "sigmoid", "beta": 0.3},
    "cdpo": {"loss": "sigmoid", "label_smoothing": 0.2},
    "robust": {"loss": "robust", "label_smoothing": 0.2},
    "hinge": {"loss": "hinge", "beta": 0.05},
    "ipo": {"loss": "ipo", "beta": 0.7},
    "simpo": {"loss": "simpo", "beta": 2.0, "gamma": 0.9, "label_smoothing": 0.1},
    "orpo": {"loss": "orpo", "beta": 0.4},
}
TRL_NAMES = {"accuracy": "rewards/accuracies", "margin": "rewards/margins"}


def trl_config(cls: Any, folder: Path, count: int, **settings: Any) -> Any:
    return cls(
        output_dir=str(folder),
        use_cpu=True,
        bf16=False,
        report_to=[],
        max_length=64,
        per_device_train_batch_size=count,
        gradient_checkpointing=False,
        **settings,
    )


@pytest.mark.parametrize("values", [PAIRS, PLAIN], ids=["conversations", "texts"])
@pytest.mark.parametrize("name", ["sigmoid", "robust", "hinge", "ipo"])
def test_losses_with_a_reference_are_those_of_dpo_trainer(
    tokenizer: Any, tmp_path: Path, name: str, values: list[dict[str, Any]]
) -> None:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    given, policy, reference = LOSSES[name], network(tokenizer, 0), network(tokenizer, 1)
    task = task_of(tokenizer, "dpo", policy, **given)
    batch = with_reference(task, rows_of(tokenizer, task, values, tmp_path), reference)
    more = {"loss_type": [given["loss"]], "beta": given.get("beta", 0.1)}
    more |= {"label_smoothing": given.get("label_smoothing", 0.0)}
    trainer = DPOTrainer(
        model=policy,
        ref_model=reference,
        args=trl_config(DPOConfig, tmp_path, len(values), **more),
        train_dataset=Dataset.from_list([{k: v for k, v in row.items() if k != "margin"} for row in values]),
        processing_class=copy.deepcopy(tokenizer),
    )
    inputs = trainer.data_collator(list(trainer.train_dataset))
    assert torch.equal(batch.inputs["input_ids"], inputs["input_ids"])
    with torch.no_grad():
        theirs = trainer.compute_loss(policy.eval(), inputs)
        out = task.loss(policy, batch.inputs)
    assert abs(theirs.item() - math.log(2)) > 1e-3
    assert (out.loss_sum / batch.count).item() == pytest.approx(theirs.item(), rel=1e-5)
    logged = trainer._metrics["eval"]
    for metric, value in means(out.metrics).items():
        assert value == pytest.approx(logged[TRL_NAMES.get(metric, metric)][0], rel=1e-4, abs=1e-5), metric


def test_the_smoothed_loss_is_that_of_cpo_trainer(monkeypatch: pytest.MonkeyPatch) -> None:
    """On log-ratios. DPOTrainer ignores label_smoothing with sigmoid."""
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    from trl.experimental.cpo import CPOTrainer

    chosen, rejected = torch.randn(2, 6, generator=torch.Generator().manual_seed(0))
    self = SimpleNamespace(alpha=0.0, beta=0.4, loss_type="sigmoid", label_smoothing=0.2)
    self.accelerator = SimpleNamespace(device=torch.device("cpu"))
    theirs, *_ = CPOTrainer.cpo_loss(self, chosen, rejected)  # type: ignore[arg-type]
    assert torch.allclose(losses.sigmoid_loss(0.4 * (chosen - rejected), 0.2), theirs, rtol=1e-6)


@pytest.mark.parametrize("name", ["simpo", "orpo"])
def test_losses_without_a_reference_are_those_of_cpo_and_orpo_trainer(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Their loss functions on our token ids: these two trainers tokenize prompts and answers separately."""
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    from trl.experimental.cpo import CPOTrainer
    from trl.experimental.orpo import ORPOTrainer

    given, policy = LOSSES[name], network(tokenizer, 0)
    task = task_of(tokenizer, "dpo", policy, **given)
    batch = task.collate(rows_of(tokenizer, task, PAIRS, tmp_path))
    cls: Any = {"simpo": CPOTrainer, "orpo": ORPOTrainer}[name]
    trainer = cls.__new__(cls)
    same = lambda value: value  # noqa: E731
    values = {
        "accelerator": SimpleNamespace(device=torch.device("cpu"), gather_for_metrics=same),
        "beta": given["beta"],
    }
    values |= {"is_encoder_decoder": False, "aux_loss_enabled": False, "pad_token_id": 0, "padding_value": 0}
    values |= {"loss_type": name, "alpha": 0.0, "cpo_alpha": 0.0, "simpo_gamma": given.get("gamma")}
    values |= {"label_smoothing": given.get("label_smoothing", 0.0)}
    for key, value in values.items():
        setattr(trainer, key, value)
    inputs: dict[str, torch.Tensor] = {}
    ids, counted = batch.inputs["input_ids"], batch.inputs["targets"] != -100
    for side, part in (("chosen", slice(0, len(PAIRS))), ("rejected", slice(len(PAIRS), None))):
        ends = counted[part].long().cumsum(1).argmax(1) + 1  # the last token of each text
        mask = (torch.arange(ids.shape[1]) <= ends[:, None]).long()
        learned = torch.cat([torch.zeros(len(PAIRS), 1, dtype=torch.bool), counted[part, :-1]], 1)
        inputs |= {
            f"{side}_input_ids": ids[part],
            f"{side}_attention_mask": mask,
            f"{side}_labels": ids[part].where(learned, -100),
        }
    with torch.no_grad():
        theirs, logged = trainer.get_batch_loss_metrics(policy, inputs)
        out = task.loss(policy, batch.inputs)
    mean = (out.loss_sum.reshape(-1) / torch.tensor(batch.counts)).sum()
    assert mean.item() == pytest.approx(theirs.item(), rel=1e-5)
    assert len(batch.counts) == (2 if name == "orpo" else 1)
    for metric, value in means(out.metrics).items():
        if metric == "log_odds_ratio":
            metric = "log_odds_chosen"
        assert value == pytest.approx(logged[TRL_NAMES.get(metric, metric)], rel=1e-4, abs=1e-5), metric


@pytest.mark.parametrize("loss", ["kto", "apo_zero_unpaired"])
@pytest.mark.parametrize("policy_seed", [0, 2])
def test_kto_is_that_of_kto_trainer(tokenizer: Any, tmp_path: Path, loss: str, policy_seed: int) -> None:
    from datasets import Dataset
    from trl import KTOConfig, KTOTrainer

    policy, reference = network(tokenizer, policy_seed), network(tokenizer, 1)
    weights = {"beta": 0.02, "desirable_weight": 1.3, "undesirable_weight": 0.7}
    task = task_of(tokenizer, "kto", policy, loss=loss, **weights)
    batch = with_reference(task, rows_of(tokenizer, task, ANSWERS, tmp_path), reference)
    trainer = KTOTrainer(
        model=policy,
        ref_model=reference,
        args=trl_config(KTOConfig, tmp_path, len(ANSWERS), loss_type=loss, **weights),
        train_dataset=Dataset.from_list(ANSWERS),
        processing_class=copy.deepcopy(tokenizer),
    )
    inputs = trainer.data_collator(list(trainer.train_dataset))
    assert torch.equal(batch.inputs["input_ids"], inputs["input_ids"])
    with torch.no_grad():
        theirs = trainer.compute_loss(policy.eval(), inputs)
        if task.needs_baseline:
            assert torch.equal(batch.inputs["other/input_ids"], inputs["KL_input_ids"])
            total, count = task.baseline(policy, batch.inputs)
            batch.inputs[BASELINE] = total / count
        out, evaluated = task.loss(policy, batch.inputs), task.evaluate(policy, batch.inputs)
    assert (out.loss_sum / batch.count).item() == pytest.approx(theirs.item(), rel=1e-5)
    scores, _ = task.scores(dict(enumerate(task.predictions(evaluated.predictions))), None)
    logged = {name: values[0] for name, values in trainer._metrics["eval"].items()}
    assert scores["loss"] == pytest.approx(theirs.item(), rel=1e-5)
    assert scores["margin"] == pytest.approx(logged["rewards/margins"], rel=1e-4)
    for found in (means(out.metrics), {name: x for name, x in scores.items() if name not in ("loss", "margin")}):
        assert {"kl"} & found.keys() == ({"kl"} if loss == "kto" else set())
        for metric, value in found.items():
            assert value == pytest.approx(logged[metric], rel=1e-4, abs=1e-5), metric


def test_pairs_become_the_rows_of_unpair_preference_dataset(tokenizer: Any, tmp_path: Path) -> None:
    """Mismatched answers are those of the same side of the pair before, and never of the same prompt."""
    from datasets import Dataset
    from trl.data_utils import unpair_preference_dataset

    task = task_of(tokenizer, "kto", network(tokenizer, 0))
    rows = rows_of(tokenizer, task, PLAIN, tmp_path)
    unpaired = unpair_preference_dataset(Dataset.from_list(PLAIN)).to_list()
    found = sorted((tokenizer.decode(row.input_ids), bool(row.columns["desirable"][0])) for row in rows)
    expected = [(f"{each['prompt']}{each['completion']}<|im_end|>", each["label"]) for each in unpaired]
    assert found == sorted(expected)
    for i, row in enumerate(rows):
        side, before = ("chosen", "rejected")[i % 2], PLAIN[i // 2 - 1]
        assert tokenizer.decode(row.columns["other"]) == before[side] + "<|im_end|>"


def test_mismatches_are_found_in_one_pass(tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also among many rows with one prompt; a loop over all earlier rows gives the same."""
    task, chance = task_of(tokenizer, "kto", network(tokenizer, 0)), random.Random(0)
    values = [{"prompt": chance.choice(["a cat", "a dog"]), "completion": f" {w}", "label": True} for w in WORDS * 3]
    values += [{"prompt": "a cat", "completion": f" {w}", "label": True} for w in WORDS * 3]
    reads, read = [], ExampleStore.row
    monkeypatch.setattr(ExampleStore, "row", lambda store, i: reads.append(i) or read(store, i))
    rows = rows_of(tokenizer, task, values, tmp_path)
    assert len(reads) == 3 * len(values)
    for i, row in enumerate(rows):
        expected = next(x for j in range(1, len(values)) if (x := values[i - j])["prompt"] != values[i]["prompt"])
        assert tokenizer.decode(row.columns["other"][:-1]) == expected["completion"]


@pytest.mark.parametrize("name", ["dpo", "kto"])
def test_dropout_of_an_adapter_is_refused(tokenizer: Any, name: str) -> None:
    """TRL turns it off, so the setting would have no effect."""
    task = task_of(tokenizer, name, network(tokenizer, 0))
    section = ModelSection(path="there", adapt={"lora": {"dropout": 0.05}})
    with pytest.raises(RecipeError, match=rf"^model\.adapt\.lora\.dropout: task {name} .*Set it to 0"):
        task.frozen_roles(task.setup, section)


def test_dropout_of_an_adapter_that_is_trained_on_is_switched_off(tokenizer: Any, tmp_path: Path) -> None:
    """As in TRL; its config is its own. A loss without a reference takes any adapter."""
    task = task_of(tokenizer, "dpo", network(tokenizer, 0), loss="simpo")
    lora = LoraConfig(target_modules=["q_proj"], lora_dropout=0.5, init_lora_weights=False)
    model = get_peft_model(network(tokenizer, 0), lora).train()
    task.extend_network(model, ModelSection(path="there", adapt={"adapter": "there"}))
    inputs = task.collate(rows_of(tokenizer, task, [PAIRS[0]], tmp_path)).inputs
    assert task.loss(model, inputs).loss_sum.item() == task.loss(model, inputs).loss_sum.item()


@pytest.mark.parametrize(("name", "row"), [("dpo", PAIRS[0]), ("kto", ANSWERS[0])])
def test_the_exported_model_ends_its_texts_as_the_template_does(tokenizer: Any, name: str, row: dict[str, Any]) -> None:
    """The base is one without a chat template of its own: its EOS is another token than the end of a turn."""
    own, model = copy.deepcopy(tokenizer), network(tokenizer, 0)
    end_of_turn, own.eos_token = own.eos_token_id, own.bos_token
    model.generation_config.eos_token_id = own.eos_token_id
    task = task_of(own, name, model)
    encoder = encoder_class(name)(EncoderContext(task.settings, name, own, 64, 0))
    assert encoder.outcomes([Record(row, "rows.jsonl:1")])[0].examples
    task.setup = replace(task.setup, survey=encoder.discovered)
    task.prepare_network(model)
    assert model.generation_config.eos_token_id == [own.eos_token_id, end_of_turn]


def test_rows_with_the_same_prompt_are_no_mismatch(tokenizer: Any, tmp_path: Path) -> None:
    task = task_of(tokenizer, "kto", network(tokenizer, 0))
    prompts = ["a cat", "a dog", "a dog", "a dog"]
    values = [{"prompt": p, "completion": f" {w}", "label": True} for p, w in zip(prompts, WORDS, strict=False)]
    others = [tokenizer.decode(row.columns["other"][:-1]) for row in rows_of(tokenizer, task, values, tmp_path / "1")]
    assert others == [f" {w}" for w in (WORDS[3], WORDS[0], WORDS[0], WORDS[0])]
    same = [{**each, "prompt": "a dog"} for each in values]
    others = [tokenizer.decode(row.columns["other"][:-1]) for row in rows_of(tokenizer, task, same, tmp_path / "2")]
    assert others == [f" {w}" for w in (WORDS[3], *WORDS[:3])]


# --- hand-computed ----------------------------------------------------------------------------------------------------


def test_losses_by_hand() -> None:
    one, two = torch.tensor([math.log(3.0)]), torch.tensor([-0.5])
    assert losses.sigmoid_loss(one).item() == pytest.approx(math.log(4 / 3))
    smooth = 0.75 * math.log(4 / 3) + 0.25 * math.log(4)
    assert losses.sigmoid_loss(one, 0.25).item() == pytest.approx(smooth)
    assert losses.robust_loss(one, 0.25).item() == pytest.approx((0.75 * math.log(4 / 3) - 0.25 * math.log(4)) / 0.5)
    assert losses.hinge_loss(torch.tensor([0.25, 2.0])).tolist() == [0.75, 0.0]
    assert losses.ipo_loss(two, torch.tensor([-1.0]), beta=1.0).item() == pytest.approx(0.0)
    assert losses.simpo_loss(two, torch.tensor([-1.0]), beta=2.0, gamma=1.0).item() == pytest.approx(math.log(2))
    # Odds of 1/3 and 1: the log of their ratio is -log 3.
    quarter, half = torch.tensor([math.log(0.25)]), torch.tensor([math.log(0.5)])
    assert losses.log_odds_ratio(quarter, half).item() == pytest.approx(-math.log(3))
    assert losses.odds_ratio_loss(quarter, half).item() == pytest.approx(math.log(4))
    ratios, desirable = torch.tensor([2.0, 2.0]), torch.tensor([True, False])
    found = losses.kto_loss(ratios, desirable, torch.tensor(1.0), beta=math.log(3.0))
    assert found.tolist() == pytest.approx([0.25, 0.75])


def test_the_odds_of_an_almost_certain_answer_have_a_gradient() -> None:
    sure = torch.tensor([-1e-6, -1e-3, -40.0], requires_grad=True)
    found = losses.log_odds_ratio(sure, torch.full((3,), -math.log(2)))
    found.sum().backward()
    p = sure.detach().double().exp()
    assert torch.allclose(found.detach().double(), p.log() - torch.log1p(-p), rtol=1e-3)
    assert sure.grad is not None
    assert torch.allclose(sure.grad.double(), 1 / (1 - p), rtol=1e-2)


@pytest.mark.parametrize("name", [*LOSSES, "kto"])
def test_a_dummy_batch_adds_nothing(tokenizer: Any, tmp_path: Path, name: str) -> None:
    policy = network(tokenizer, 0)
    task = task_of(tokenizer, "kto" if name == "kto" else "dpo", policy, **LOSSES.get(name, {}))
    batch = task.collate(rows_of(tokenizer, task, PAIRS, tmp_path))
    if task.settings.has_reference:
        batch.inputs[REFERENCE] = torch.ones(len(batch.inputs["targets"]) // (1 if name == "kto" else 2), 2)
    dummy = mask_all(batch.inputs)
    out = task.loss(policy, dummy)
    assert out.loss_sum.sum().item() == 0
    assert all(total.item() == 0 == count.item() for total, count in out.metrics.values())
    if name == "kto":
        assert task.baseline(policy, dummy).tolist() == [0, 0]
    out.loss_sum.sum().backward()
    assert all(p.grad is None or not p.grad.any() for p in policy.parameters())


# --- the reference ----------------------------------------------------------------------------------------------------

SHORT: dict[str, Any] = {"train": {"max_steps": 3}, "eval": {"every": 3, "at_start": True}, "save": {"every": 3}}
PLACES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "cached": ({}, {}),
    "network": ({}, {"reference": "network"}),
    "adapter off": ({"adapt": {"lora": {"r": 4}}}, {}),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    """A chat model that was trained for two updates."""
    return write_base(tmp_path_factory.mktemp("base"), cache, "sft", layers=1)


def write(folder: Path, base: Path, task: str, model: dict[str, Any], settings: dict[str, Any], **more: Any) -> Path:
    changes = {**SHORT, task: settings, **more}
    if "adapt" in model:
        changes = {**changes, "optim": {"lr": 0.01}}
    return write_adapted(folder, base, task, model, **changes)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, base: Path, cache: Path) -> Callable[[str, str], Path]:
    """The directory of a run with one of PLACES by one process, which is started once."""
    folders: dict[tuple[str, str], Path] = {}

    def provide(task: str, name: str) -> Path:
        if (task, name) not in folders:
            folder = folders[task, name] = tmp_path_factory.mktemp("trained")
            write(folder, base, task, *PLACES[name])
            run = start("train", "recipe.yaml", cwd=folder, cache=cache)
            assert run.wait() == 0, run.stderr
        return folders[task, name]

    return provide


@pytest.mark.parametrize("name", PLACES)
@pytest.mark.parametrize(("task", "at_start"), [("dpo", math.log(2)), ("kto", None)])
def test_at_the_start_network_and_reference_are_equal(
    trained: Callable[[str, str], Path], task: str, at_start: float | None, name: str
) -> None:
    """The values of the same batch are equal to the bit; cached ones come from batches of other shapes."""
    run = trained(task, name) / "run"
    first, evaluated = train_rows(run)[0], eval_rows(run)[0]
    for side in ("chosen", "rejected"):
        tolerance = 1e-5 if name == "cached" else 0
        assert abs(first[f"rewards/{side}"]) <= tolerance
        assert abs(evaluated[f"eval/rewards/{side}"]) <= tolerance
    if at_start is not None:
        assert first["loss"] == pytest.approx(at_start, abs=1e-6)
        assert evaluated["eval/loss"] == pytest.approx(at_start, abs=1e-6)
    assert train_rows(run)[-1]["rewards/chosen"] != 0


@pytest.mark.parametrize("task", ["dpo", "kto"])
def test_a_cached_reference_is_a_frozen_network(trained: Callable[[str, str], Path], task: str) -> None:
    cached, frozen = (train_rows(trained(task, name) / "run") for name in ("cached", "network"))
    assert [row["loss"] for row in cached] == pytest.approx([row["loss"] for row in frozen], rel=1e-5)
    assert len(cached) == 3


@pytest.mark.parametrize("name", PLACES)
def test_the_exported_model_is_evaluated_against_the_same_reference(
    trained: Callable[[str, str], Path], cache: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    folder = trained("dpo", name)
    monkeypatch.setenv("PTFT_CACHE", str(cache))
    monkeypatch.chdir(folder)
    metrics, last = ptft_dist.evaluate(str(folder / "recipe.yaml")), eval_rows(folder / "run")[-1]
    for metric in ("loss", "margin", "accuracy", "rewards/chosen"):
        assert metrics[f"eval/{metric}"] == pytest.approx(last[f"eval/{metric}"], rel=1e-4, abs=1e-6), metric
    assert last["eval/margin"] != 0


@pytest.mark.parametrize(
    ("task", "name", "kind"),
    [
        ("dpo", "adapter off", "cpu_zero3"),
        ("dpo", "adapter off", "fsdp2"),
        ("kto", "adapter off", "cpu_zero3"),
        ("kto", "cached", "fsdp2"),
        ("dpo", "network", "cpu_zero3"),
    ],
)
def test_two_sharded_ranks_have_the_same_losses(
    trained: Callable[[str, str], Path], base: Path, tmp_path: Path, cache: Path, task: str, name: str, kind: str
) -> None:
    write(tmp_path, base, task, *PLACES[name])
    run = start("train", "recipe.yaml", cwd=tmp_path, cache=cache, ranks=2, kind=kind)
    assert run.wait() == 0, run.stderr
    ours, theirs = train_rows(tmp_path / "run"), train_rows(trained(task, name) / "run")
    for row, expected in zip(ours, theirs, strict=True):
        assert row["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert row["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)


def change_weights(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    save_file({name: value * 1.5 for name, value in tensors.items()}, model / "model.safetensors", {"format": "pt"})


@pytest.fixture
def session(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Session]:
    """Makes the session of a recipe in this process. Nothing is trained."""
    monkeypatch.setenv("PTFT_CACHE", str(tmp_path / "cache"))
    shutil.copytree(base, tmp_path / "base")

    def make(settings: dict[str, Any] | None = None, model: dict[str, Any] | None = None, **more: Any) -> Session:
        path = write(tmp_path, tmp_path / "base", "dpo", model or {}, settings or {}, **more)
        return Session(load_recipe(str(path)), place())

    return make


def test_the_reference_is_computed_again_for_other_rows_or_another_network_only(
    session: Callable[..., Session], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed, real = [], computing.start_values
    monkeypatch.setattr("ptft_dist.session.old_network.start_values", lambda *given: computed.append(1) or real(*given))
    first = session()
    first.add_start_column(training=True)
    assert len(computed) == 2  # training and validation rows
    session({"loss": "ipo", "beta": 0.5}, optim={"lr": 0.5}).add_start_column(training=True)
    assert len(computed) == 2
    session(train={"precision": "bf16"}).add_start_column(training=True)
    assert len(computed) == 4
    session(data={"max_length": 24}).add_start_column(training=True)
    assert len(computed) == 6
    saved = first.identity
    change_weights(tmp_path / "base")
    changed = session()
    changed.add_start_column(training=True)
    assert len(computed) == 8
    assert not np.array_equal(changed.store.row(0).columns[REFERENCE], first.store.row(0).columns[REFERENCE])
    assert set(differences(saved, changed.identity)) == {"model.path's files"}


@pytest.mark.parametrize("name", ["cached", "network"])
def test_another_base_is_refused_at_a_resume(tmp_path: Path, base: Path, cache: Path, name: str) -> None:
    shutil.copytree(base, tmp_path / "base")
    write(tmp_path, tmp_path / "base", "dpo", *PLACES[name], save={"every": 1})
    first = start("train", "recipe.yaml", cwd=tmp_path, cache=cache)
    assert first.wait() == 0, first.stderr
    shutil.rmtree(tmp_path / "run/checkpoints/step-00000003")
    change_weights(tmp_path / "base")
    again = start("train", "recipe.yaml", cwd=tmp_path, cache=cache)
    assert again.wait() == 4
    assert "model.path's files" in again.stderr


# --- learning ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_raises_the_margin_of_held_out_pairs(tmp_path: Path, cache: Path, loss: str) -> None:
    """An answer with an animal is better."""
    write_tiny(tmp_path, "dpo", **{**SHORT, "train": {"max_steps": 12}, "eval": {"every": 12, "at_start": True}})
    settings = json.dumps({**LOSSES[loss], "beta": 2.0 if loss == "simpo" else 0.1})
    run = start("train", "recipe.yaml", f"dpo={settings}", "optim.lr=0.01", cwd=tmp_path, cache=cache)
    assert run.wait() == 0, run.stderr
    before, after = eval_rows(tmp_path / "run")
    assert after["eval/margin"] > before["eval/margin"] + 0.02
    assert after["eval/accuracy"] > 0.9
    assert after["eval/loss"] < before["eval/loss"]


def test_a_killed_run_with_an_adapter_ends_like_one_that_was_not(tmp_path: Path, base: Path, cache: Path) -> None:
    write(tmp_path, base, "kto", *PLACES["adapter off"], save={"every": 2}, train={"max_steps": 4}, eval={"every": 2})
    first = start("train", "recipe.yaml", cwd=tmp_path, cache=cache, ranks=2)
    assert first.wait() == 0, first.stderr
    expected = outcome(tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoints/step-00000004")
    shutil.rmtree(tmp_path / "run/model")
    again = start("train", "recipe.yaml", cwd=tmp_path, cache=cache, ranks=2)
    assert again.wait() == 0, again.stderr
    assert outcome(tmp_path / "run") == expected


# --- refusals and broken rows -----------------------------------------------------------------------------------------

NO_EFFECT: list[tuple[str, dict[str, Any], str]] = [
    ("dpo", {"gamma": 1.0}, r"dpo\.gamma: has no effect here: it needs loss: simpo"),
    (
        "dpo",
        {"loss": "hinge", "label_smoothing": 0.1},
        "label_smoothing: has no effect here: it needs one of the losses",
    ),
    ("dpo", {"loss": "orpo", "reference": "cached"}, "reference: has no effect here: it needs a loss with a reference"),
    ("dpo", {"loss": "robust"}, "robust needs label_smoothing"),
    ("dpo", {"label_smoothing": 0.5}, r"dpo\.label_smoothing"),
    ("dpo", {"beta": 0.0}, r"dpo\.beta"),
    ("kto", {"loss": "sigmoid"}, r"kto\.loss"),
]


@pytest.mark.parametrize(("task", "settings", "text"), NO_EFFECT, ids=range(len(NO_EFFECT)))
def test_a_setting_without_effect_is_refused(tmp_path: Path, task: str, settings: dict[str, Any], text: str) -> None:
    with pytest.raises(RecipeError, match=text):
        load_recipe(str(write_tiny(tmp_path, task)), {task: settings})


@pytest.mark.parametrize(
    ("model", "settings", "text"),
    [
        ({"adapt": {"lora": {"init": "pissa"}}}, {}, r"task dpo: model\.adapt\.lora\.init: pissa changes the weights"),
        ({"adapt": {"lora": {"init": "olora"}}}, {}, r"init: olora changes the weights of the base"),
        ({"adapt": {"prompt_tuning": {"tokens": 4}}}, {}, "prompt_tuning changes the input of the network"),
        ({"adapt": "lora"}, {"reference": "cached"}, r"dpo\.reference: has no effect here: with model\.adapt"),
    ],
    ids=["pissa", "olora", "prompt tuning", "cached"],
)
def test_an_adapter_whose_base_is_not_the_start_is_refused(
    session: Callable[..., Session], model: dict[str, Any], settings: dict[str, Any], text: str
) -> None:
    with pytest.raises(RecipeError, match=text):
        session(settings, model)


@pytest.mark.parametrize("task", ["dpo", "kto"])
def test_eva_reads_the_texts_of_rows(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch, cache: Path, task: str
) -> None:
    """All of them, and no padding: both texts of a pair, and none of the mismatched ones of KTO."""
    monkeypatch.setenv("PTFT_CACHE", str(cache))
    path = write(tmp_path, base, task, {"adapt": {"lora": {"r": 2, "init": "eva", "eva_rows": 4}}}, {})
    made_here, seen, initialize = Session(load_recipe(str(path)), place()), [], adapters.initialize_from_activations
    monkeypatch.setattr(
        "ptft_dist.networks.adapt.adapters.initialize_from_activations",
        lambda model, inputs: seen.append(inputs) or initialize(model, inputs),
    )
    builder: Any = SimpleNamespace(
        building=lambda **_: nullcontext(), whole=lambda _: nullcontext(), device=torch.device("cpu"),
        trained_dtype=torch.float32,
    )  # fmt: skip
    made_here.trained.build(builder, rows=made_here.prepared.train)
    rows = [made_here.prepared.train.row(i) for i in range(4)]
    halved = [halves(row.input_ids, row.columns["parts"]) if task == "dpo" else [row.input_ids] for row in rows]
    (inputs,) = seen
    found = [ids[mask].tolist() for ids, mask in zip(inputs["input_ids"], inputs["tokens"], strict=True)]
    assert sorted(found) == sorted(text.tolist() for texts in halved for text in texts)


def test_a_loss_without_a_reference_takes_any_adapter(session: Callable[..., Session]) -> None:
    made_here = session({"loss": "simpo"}, {"adapt": {"lora": {"init": "pissa", "r": 4}}})
    assert (made_here.start_column, made_here.frozen.roles) == (None, {})


def test_a_reference_network_needs_a_path(tmp_path: Path, cache: Path) -> None:
    write_tiny(tmp_path, "dpo", **SHORT)
    run = start("train", "recipe.yaml", "dpo.reference=network", cwd=tmp_path, cache=cache)
    assert run.wait() == 2
    assert "dpo.reference: network needs model.path" in run.stderr


@pytest.mark.parametrize("task", ["dpo", "kto"])
def test_identical_answers_end_the_run_with_their_line(tmp_path: Path, cache: Path, task: str) -> None:
    write_tiny(tmp_path, task, **SHORT)
    write_rows(tmp_path / "rows.jsonl", [*PLAIN, {**PLAIN[0], "rejected": PLAIN[0]["chosen"]}])
    run = start("train", "recipe.yaml", cwd=tmp_path, cache=cache)
    assert run.wait() == 3
    assert "rows.jsonl:6" in run.stderr
    assert "chosen and rejected are identical" in run.stderr


def test_padding_with_eos_changes_nothing(tokenizer: Any, tmp_path: Path) -> None:
    """The targets come from lengths and not from token ids, so an answer's EOS is learned."""
    policy, reference, found = network(tokenizer, 0), network(tokenizer, 1), []
    for pad in (tokenizer.pad_token, tokenizer.eos_token):
        other = copy.deepcopy(tokenizer)
        other.pad_token = pad
        task = task_of(other, "dpo", policy)
        batch = with_reference(task, rows_of(other, task, PLAIN, tmp_path / str(len(found))), reference)
        targets = batch.inputs["targets"]
        assert ((targets == tokenizer.eos_token_id).sum(1) == 1).all()
        found.append(task.loss(policy, batch.inputs).loss_sum.item())
    assert found[0] == pytest.approx(found[1], rel=1e-6)


ROWS: list[tuple[dict[str, Any], str | type[Exception]]] = [
    ({"prompt": "a", "completion": " cat", "label": "perhaps"}, "the label 'perhaps' is not true or false"),
    ({"prompt": "a", "completion": " cat", "label": 2}, "the label 2 is not true or false"),
    ({"prompt": "a", "completion": "", "label": True}, "the field 'completion' is empty"),
    ({"prompt": "a", "completion": " cat", "label": None}, "there is no field 'chosen'"),
    ({"completion": " cat", "label": True}, "there is no field 'prompt'"),
    ({"messages": [{"role": "user", "content": "a"}], "label": True}, "the last message is not from the assistant"),
    ({"prompt": "a", "completion": " cat" * 80, "label": True}, LeftOut),
]


@pytest.mark.parametrize(("values", "text"), ROWS, ids=range(len(ROWS)))
def test_broken_rows_of_kto(tokenizer: Any, values: dict[str, Any], text: str | type[Exception]) -> None:
    task = task_of(tokenizer, "kto", network(tokenizer, 0))
    encoder = encoder_class("kto")(EncoderContext(task.settings, "kto", tokenizer, 64, 0))
    (result,) = encoder.outcomes([Record(values, "rows.jsonl:1")])
    assert not result.examples
    if isinstance(text, str):
        assert result.problem is not None
        assert text in result.problem
    else:
        assert result.dropped == "with a text longer than data.max_length"


SAME_ROW: list[dict[str, Any]] = [
    {"prompt": [{"role": "user", "content": "a cat"}], "completion": [{"role": "assistant", "content": "runs"}]},
    {"prompt": [{"role": "user", "content": "a cat"}], "completion": "runs"},
    {"messages": [{"role": "user", "content": "a cat"}, {"role": "assistant", "content": "runs"}]},
]


@pytest.mark.parametrize("label", [True, "true", 1, "1"])
@pytest.mark.parametrize("values", SAME_ROW, ids=range(len(SAME_ROW)))
def test_shapes_of_kto(tokenizer: Any, tmp_path: Path, values: dict[str, Any], label: Any) -> None:
    task = task_of(tokenizer, "kto", network(tokenizer, 0))
    (row,) = rows_of(tokenizer, task, [{**values, "label": label}], tmp_path)
    text = "<|im_start|>user\na cat<|im_end|>\n<|im_start|>assistant\nruns<|im_end|>\n"
    assert tokenizer.decode(row.input_ids) == text
    assert row.columns["desirable"].tolist() == [1]
    prompt = row.input_ids[: int(row.columns["parts"][0])]
    assert tokenizer.decode(prompt) == text.partition("runs")[0]
