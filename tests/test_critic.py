"""A critic of its own: its values, its start, and the promises of a run that trains it beside the policy."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rl_support import llama as policy_of
from rl_support import look, some_trajectories, task_for
from support import Start, outcome, start, train_rows
from tiny import write_tiny
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, BertConfig

from ptft_dist.config.recipe import ModelSection
from ptft_dist.errors import RecipeError
from ptft_dist.networks.critic import add_critic, token_values
from ptft_dist.networks.facts import read_facts
from ptft_dist.networks.frozen import FrozenSource
from ptft_dist.tasks.ppo.task import Ppo

FOUR: dict[str, Any] = {"train": {"max_steps": 4}, "eval": {"every": 2}, "save": {"every": 2}}  # updates


@pytest.fixture(scope="module")
def starts(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    """chat/run/model, and reward/run/model with the same tokenizer."""
    folder = tmp_path_factory.mktemp("starts")
    for name, task in (("chat", "sft"), ("reward", "reward")):
        (folder / name).mkdir()
        own = {} if name == "chat" else {"tokenizer": {"path": f"{folder}/chat/run/model", "train": None}}
        write_tiny(folder / name, task, layers=1, train={"max_steps": 4}, **own)
        done(start("train", "recipe.yaml", cwd=folder / name, cache=cache))
    return folder


def done(run: Start) -> Start:
    assert run.wait() == 0, run.stderr
    return run


def write_ppo(folder: Path, starts: Path, critic: Path | str, **changes: Any) -> None:
    model = str(starts / "chat/run/model")
    folder.mkdir(exist_ok=True)
    given = {"model": {"path": model, "config": None}, "tokenizer": {"path": model, "train": None}}
    ppo = {"critic": str(critic), "kl": 0.1, "epochs": 2}
    write_tiny(folder, "ppo", **{**given, "ppo": ppo, **FOUR, **changes})


def test_values_are_those_of_the_prefixes(starts: Path) -> None:
    """The value before a token is what transformers' reward model says about the tokens before it."""
    path = starts / "reward/run/model"
    judge = AutoModelForSequenceClassification.from_pretrained(path)
    judge.config.pad_token_id = None  # with it, the score would be read before tokens with this id
    policy = policy_of(0, vocab_size=judge.config.vocab_size)
    task = task_for(policy, "ppo", {"kl": 0.0})
    task.settings = task.settings.model_copy(update={"critic": str(path)})
    source = FrozenSource("ppo.critic", ModelSection(path=str(path), dtype="fp32"))
    task.critic_takes = read_facts(add_critic(policy, source)).takes
    trajectories = some_trajectories()
    look(task, task.look_at_policy, policy, trajectories)
    for each in trajectories:
        ids = np.concatenate([each.prompt.ids, each.response])
        for t, value in enumerate(each.tokens["values"]):
            prefix = torch.from_numpy(ids[: len(each.prompt.ids) + t])[None]
            with torch.no_grad():
                expected = judge(input_ids=prefix, attention_mask=torch.ones_like(prefix)).logits.item()
            assert value == pytest.approx(expected, abs=1e-5)


def test_a_critic_from_a_language_model_begins_with_zeros(starts: Path) -> None:
    policy = policy_of(0)
    source = FrozenSource("ppo.critic", ModelSection(path=str(starts / "chat/run/model"), dtype="fp32"))
    critic = add_critic(policy, source)
    ids = torch.arange(4)[None]
    assert not token_values(critic, {"input_ids": ids}).any()
    body = AutoModelForCausalLM.from_pretrained(starts / "chat/run/model").model
    with torch.no_grad():
        assert torch.equal(critic.model(ids).last_hidden_state, body(ids).last_hidden_state)


def test_a_critic_is_loaded_as_the_policy_is(starts: Path) -> None:
    """model.attention and model.trust_remote_code are of both."""
    policy = policy_of(0)
    task = task_for(policy, "ppo", {"kl": 0.0})
    settings = task.settings.model_copy(update={"critic": str(starts / "reward/run/model")})
    for attention in ("eager", "sdpa"):
        section = ModelSection(path="policy", attention=attention)
        task.setup = replace(task.setup, settings=settings, model=section)
        task.extend_network(policy, section)
        assert policy.critic.config._attn_implementation == attention


@pytest.mark.parametrize(("adapt", "sharded"), [("full", "cpu_zero3"), ("lora", "fsdp2")])
def test_it_is_trained_exported_and_resumed(
    tmp_path: Path, starts: Path, cache: Path, adapt: str, sharded: str
) -> None:
    """DDP and sharded weights have the losses of one process, and a killed run ends with the same bits."""
    adapted = {"model": {"path": str(starts / "chat/run/model"), "config": None, "adapt": "lora"}}
    for name, ranks, kind in (("one", 1, "cpu"), ("ddp", 2, "cpu"), ("sharded", 2, sharded)):
        write_ppo(tmp_path / name, starts, starts / "reward/run/model", **(adapted if adapt == "lora" else {}))
        done(start("train", "recipe.yaml", cwd=tmp_path / name, cache=cache, ranks=ranks, kind=kind))
        for row, expected in zip(train_rows(tmp_path / name / "run"), train_rows(tmp_path / "one/run"), strict=True):
            for key in ("loss", "value_loss", "explained_variance", "grad_norm"):
                assert row[key] == pytest.approx(expected[key], rel=1e-3, abs=1e-5), (name, row["step"], key)
    run_dir = tmp_path / "ddp/run"
    critic = AutoModelForSequenceClassification.from_pretrained(run_dir / "model/critic")
    before = AutoModelForSequenceClassification.from_pretrained(starts / "reward/run/model")
    assert not torch.equal(critic.score.weight, before.score.weight)
    assert not torch.equal(critic.model.layers[0].mlp.up_proj.weight, before.model.layers[0].mlp.up_proj.weight)
    assert AutoTokenizer.from_pretrained(run_dir / "model/critic").get_vocab()
    names = json.dumps([str(path) for path in (run_dir / "model").iterdir()])
    assert "value_head" not in names
    sizes = json.loads((run_dir / "environment.json").read_text())["networks"]
    count = sum(p.numel() for p in before.parameters())
    assert sizes["critic"] == {"parameters": count, "trained": count, "bytes": 4 * count}
    reference = {"parameters": sizes["model"]["parameters"], "trained": 0, "bytes": sizes["model"]["bytes"]}
    assert sizes.get("reference", reference) == reference

    expected = outcome(run_dir)
    shutil.rmtree(run_dir / "checkpoints/step-00000004")
    shutil.rmtree(run_dir / "model")
    again = done(start("train", "recipe.yaml", cwd=tmp_path / "ddp", cache=cache, ranks=2))
    assert "resumed from" in again.stderr
    assert outcome(run_dir) == expected


def test_an_encoder_is_no_critic(tmp_path: Path) -> None:
    """The value before a token would depend on the tokens after it."""
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    judge = AutoModelForSequenceClassification.from_config(BertConfig(vocab_size=24, num_labels=1, **sizes))
    judge.save_pretrained(tmp_path)
    source = FrozenSource("ppo.critic", ModelSection(path=str(tmp_path), dtype="fp32"))
    with pytest.raises(RecipeError, match=r"^ppo\.critic: .* cannot be a critic\. Use a decoder, or a reward model"):
        add_critic(policy_of(0), source)


def test_an_adapter_is_no_critic(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    setup = task_for(policy_of(0), "ppo", {"kl": 0.0}).setup
    setup = replace(setup, settings=setup.settings.model_copy(update={"critic": str(tmp_path)}))
    with pytest.raises(RecipeError, match=r"^ppo\.critic: .* is an adapter, and a critic .* Merge it into its base"):
        Ppo.check_setup(setup, {})


def test_a_critic_that_does_not_fit_is_refused(tmp_path: Path, starts: Path, cache: Path) -> None:
    """Before a process group exists, and with the key."""
    other = tmp_path / "other"
    other.mkdir()
    write_tiny(other, "reward", train={"max_steps": 1}, tokenizer={"train": {"vocab_size": 280}})
    done(start("train", "recipe.yaml", cwd=other, cache=cache))
    short = tmp_path / "short"
    shutil.copytree(starts / "reward/run/model", short)
    config = json.loads((short / "config.json").read_text())
    (short / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 16}))
    for path, message in (
        (tmp_path / "none", "ppo.critic: "),
        (other / "run/model", "ppo.critic: .* has another vocabulary"),
        (short, r"the critic's max_position_embeddings \(16\)"),
    ):
        write_ppo(tmp_path / "ppo", starts, path)
        run = start("train", "recipe.yaml", cwd=tmp_path / "ppo", cache=cache)
        assert run.wait() == 2
        (error,) = [line for line in run.stderr.splitlines() if line.startswith("error:")]
        assert re.search(message, error), error
