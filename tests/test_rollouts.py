"""Rollouts within the test process: what is sampled, looked up and scored, against passes over single unpadded rows."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from rl_support import EOS, PAD, VOCAB, Numbers, batch_of, llama, look, recipe, some_trajectories, task_for, trajectory
from safetensors.torch import save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedTokenizerFast,
)

from ptft_dist.config.adapt import AdaptSection
from ptft_dist.config.recipe import ModelSection
from ptft_dist.config.tokenizer_section import TokenizerTraining
from ptft_dist.data.encoder import EncoderContext
from ptft_dist.data.formats import Record
from ptft_dist.data.store import Row
from ptft_dist.data.tokenizer import train_tokenizer
from ptft_dist.errors import RecipeError
from ptft_dist.networks.adapt import adapt_network, adapted_facts
from ptft_dist.networks.adapt.peft_configs import AdapterSetup
from ptft_dist.networks.adapt.switching import add_frozen_scorer, read_scorer, shares_base
from ptft_dist.networks.facts import read_facts
from ptft_dist.rl.advantages import adapted_kl_coefficient
from ptft_dist.rl.reward_model import RewardModel, check_reward_model, read_scores
from ptft_dist.rl.rollout import Phase, Rollout, Trajectory
from ptft_dist.rl.sampling import sample
from ptft_dist.tasks.common.chat_template import CHATML
from ptft_dist.tasks.common.generation import left_padded
from ptft_dist.tasks.common.preference_rows import PreferenceRows, halves
from ptft_dist.tasks.common.prompt_rows import PromptRows
from ptft_dist.tasks.protocol import TaskSetup
from ptft_dist.tasks.registry import task_class
from ptft_dist.tasks.reward.settings import RewardSettings
from ptft_dist.training.batches import Shape, mask_all
from ptft_dist.training.rollouts import RolloutBatches

POLICIES = {
    "llama": {"model_type": "llama", "attention_dropout": 0.5, "num_key_value_heads": 2},
    "gpt2": {"model_type": "gpt2", "attn_pdrop": 0.5, "embd_pdrop": 0.5, "resid_pdrop": 0.5},
    "gpt_neox": {"model_type": "gpt_neox", "attention_dropout": 0.5, "hidden_dropout": 0.5},
    "opt": {"model_type": "opt", "dropout": 0.5, "attention_dropout": 0.5, "layerdrop": 0.5, "word_embed_proj_dim": 16},
    "falcon": {"model_type": "falcon", "attention_dropout": 0.5, "hidden_dropout": 0.5},
    "bloom": {"model_type": "bloom", "attention_dropout": 0.5, "hidden_dropout": 0.5},
    "gpt_neo": {
        "model_type": "gpt_neo",
        "attention_dropout": 0.5,
        "embed_dropout": 0.5,
        "resid_dropout": 0.5,
        "attention_types": [[["global"], 2]],
    },
    "mpt": {"model_type": "mpt", "resid_pdrop": 0.5, "emb_pdrop": 0.5},
    "gptj": {"model_type": "gptj", "attn_pdrop": 0.5, "embd_pdrop": 0.5, "resid_pdrop": 0.5, "rotary_dim": 4},
}
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 64}


def setup(task: str, settings: dict[str, Any] | None = None) -> TaskSetup:
    return TaskSetup.of(recipe(task, settings), Numbers(), {})  # type: ignore[arg-type]


def policy(name: str) -> Any:
    """A network with dropout in its config, as the task builds it; in training mode."""
    config = AutoConfig.for_model(
        **{
            **SIZES,
            "intermediate_size": 32,
            "ffn_dim": 32,
            "vocab_size": VOCAB,
            "eos_token_id": EOS,
            "pad_token_id": PAD,
        }
        | POLICIES[name]
    )
    task_class("ppo").fit_config(setup("ppo"), config)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter *= 5
    return model.train()


# --- the policy -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("task", ["ppo", "grpo"])
def test_the_ratio_is_exactly_1_on_the_first_pass(name: str, task: str) -> None:
    """In training mode, with dropout in the config that the recipe gave."""
    model = policy(name)
    made = task_for(model, task, {"kl": 0.0, "sampling": {"max_new_tokens": 8, "temperature": 0.7}})
    trajectories = some_trajectories()
    model.eval()
    look(made, made.look_at_policy, model, trajectories)
    made.advantages(trajectories)
    model.train()
    batch = batch_of(made, trajectories)
    metrics = made.loss(model, batch.inputs).metrics
    total, count = metrics["ratio"]
    assert float(total) == float(count) == sum(len(each.response) for each in trajectories) == batch.count
    assert float(metrics["approx_kl"][0]) == 0
    assert float(metrics["clip_fraction"][0]) == 0


def one_row(model: Any, each: Trajectory, temperature: float = 1.0) -> tuple[list[float], list[float]]:
    """Log-probabilities and entropies of a response, by a pass over its unpadded row."""
    ids = np.concatenate([each.prompt.ids, each.response])
    with torch.no_grad():
        logits = model(input_ids=torch.from_numpy(ids)[None]).logits[0].double() / temperature
    start, logprobs, entropies = len(each.prompt.ids), [], []
    for t, token in enumerate(each.response):
        distribution = torch.distributions.Categorical(logits=logits[start + t - 1])
        logprobs.append(float(distribution.log_prob(torch.tensor(token))))
        entropies.append(float(distribution.entropy()))
    return logprobs, entropies


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_log_probabilities_are_those_of_unpadded_rows(name: str) -> None:
    model = policy(name).eval()
    task, trajectories = task_for(model, "grpo", {"sampling": {"temperature": 0.7}}), some_trajectories()
    look(task, task.look_at_policy, model, trajectories)
    for each in trajectories:
        assert each.tokens["logprobs"].tolist() == pytest.approx(one_row(model, each, 0.7)[0], abs=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize("pad_token", [PAD, EOS, 5])
def test_padding_does_not_change_log_probabilities(name: str, pad_token: int) -> None:
    """Neither more of it, nor its id."""
    model = policy(name).eval()
    task = task_for(model, "grpo")
    narrow = some_trajectories()
    wide = [copy.deepcopy(each) for each in narrow]
    look(task, task.look_at_policy, model, narrow)
    task.pad_multiple, task.pad_id = 16, pad_token
    look(task, task.look_at_policy, model, wide)
    for a, b in zip(narrow, wide, strict=True):
        assert np.abs(a.tokens["logprobs"] - b.tokens["logprobs"]).max() < 1e-5


def test_the_score_is_given_at_the_last_token() -> None:
    """With lambda 0, gamma 1 and values of 0 the advantages are the rewards of the tokens."""
    model = llama(0)
    settings = {"kl": 0.0, "lam": 0.0, "gamma": 1.0, "whiten_advantages": False}
    task, trajectories = task_for(model, "ppo", settings), some_trajectories()
    look(task, task.look_at_policy, model, trajectories)
    task.advantages(trajectories)
    for each in trajectories:
        expected = [0.0] * (len(each.response) - 1) + [each.score]
        assert each.tokens["advantages"].tolist() == pytest.approx(expected)
        assert each.tokens["returns"].tolist() == pytest.approx(expected)


def test_the_kl_penalty_is_given_at_every_token() -> None:
    model, reference = llama(0), llama(1)
    settings = {"kl": 0.5, "lam": 0.0, "whiten_advantages": False}
    task, trajectories = task_for(model, "ppo", settings), some_trajectories()
    look(task, task.look_at_policy, model, trajectories)
    look(task, task.look_at_reference, reference, trajectories)
    task.advantages(trajectories)
    for each in trajectories:
        ours, theirs = one_row(model, each)[0], one_row(reference, each)[0]
        rewards = [-0.5 * (a - b) for a, b in zip(ours, theirs, strict=True)]
        rewards[-1] += each.score
        assert each.tokens["advantages"].tolist() == pytest.approx(rewards, abs=1e-4)


def test_the_loss_of_ppo_against_a_loop() -> None:
    """Policy, value and entropy terms after an update, over unpadded rows."""
    model = llama(0)
    settings = {"kl": 0.0, "value_coefficient": 0.3, "entropy_coefficient": 0.2, "clip": 0.1, "value_clip": 0.05}
    task, trajectories = task_for(model, "ppo", settings), some_trajectories()
    look(task, task.look_at_policy, model, trajectories)
    assert all(not each.tokens["values"].any() for each in trajectories)  # the head begins with zeros
    task.advantages(trajectories)
    with torch.no_grad():
        chance = torch.Generator().manual_seed(3)
        for parameter in model.parameters():
            parameter += 0.03 * torch.randn(parameter.shape, generator=chance)
    expected = 0.0
    for each in trajectories:
        logprobs, entropies = one_row(model, each)
        ids = torch.from_numpy(np.concatenate([each.prompt.ids, each.response]))[None]
        with torch.no_grad():
            hidden = model.model(input_ids=ids).last_hidden_state[0, len(each.prompt.ids) - 1 : -1]
            values = (hidden @ model.value_head.weight[0] + model.value_head.bias[0]).tolist()
        for t in range(len(each.response)):
            ratio = np.exp(logprobs[t] - each.tokens["logprobs"][t])
            advantage, wanted = each.tokens["advantages"][t], each.tokens["returns"][t]
            near = min(max(values[t], -0.05), 0.05)
            expected -= min(ratio * advantage, min(max(ratio, 0.9), 1.1) * advantage)
            expected += 0.3 * 0.5 * max((values[t] - wanted) ** 2, (near - wanted) ** 2)
            expected -= 0.2 * entropies[t]
    batch = batch_of(task, trajectories)
    assert float(task.loss(model, batch.inputs).loss_sum.detach()) == pytest.approx(expected, rel=1e-4)


# --- a whole rollout --------------------------------------------------------------------------------------------------


class OneProcess:
    """The engine's methods that a rollout needs."""

    rank = 0

    def __init__(self, model: Any) -> None:
        self.model = model.eval()

    def forward(self, call: Callable[..., Any], inputs: dict[str, torch.Tensor]) -> Any:
        with torch.no_grad():
            return call(self.model, inputs)

    @contextlib.contextmanager
    def generating(self) -> Iterator[None]:
        yield

    evaluating = generating

    def gather_objects(self, value: Any) -> list[Any]:
        return [value]


def store_of(prompts: Sequence[Sequence[int]], **columns: Sequence[Any]) -> Any:
    """Prompts with their text and the other columns of their rows."""
    rows = []
    for i, ids in enumerate(prompts):
        meta = {"prompt": f"prompt {i}", "columns": {name: values[i] for name, values in columns.items()}}
        raw = np.frombuffer(json.dumps(meta).encode(), np.uint8)
        rows.append(Row(np.array(ids, np.int64), np.zeros(1, np.int64), {"meta": raw}))
    return SimpleNamespace(row=lambda i: rows[i])


def parts_of(size: int) -> Callable[[np.ndarray], list[list[np.ndarray]]]:
    """Micro-batches of `size` rows of similar length, of one process."""

    def split(lengths: np.ndarray) -> list[list[np.ndarray]]:
        order = np.argsort(lengths, kind="stable")
        return [[order[i : i + size]] for i in range(0, len(order), size)]

    return split


PROMPTS = [[2, 3, EOS, 4], [5], [6, 7, 8, 9, 10, 11], [EOS], [12, EOS, EOS, 13]]


def roll(task: Any, model: Any, prompts: Sequence[Sequence[int]] = PROMPTS, size: int = 2, **columns: Any) -> Rollout:
    phase = Phase(0, OneProcess(model), parts_of(size), parts_of(size))
    rollout: Rollout = task.rollout(phase, store_of(prompts, **columns), range(len(prompts)))
    return rollout


def counted(settings: dict[str, Any] | None = None) -> dict[str, Any]:
    """Settings with a reward function that the test sets."""
    return {"rewards": [{"function": "ptft_dist.rl.rewards:final_number"}], **(settings or {})}


def test_a_rollout_against_single_rows() -> None:
    """Log-probabilities, reference, rewards, metrics; groups in the order of the prompts."""
    model, reference = llama(0), llama(1)
    task = task_for(model, "grpo", counted({"kl": 0.1, "group_size": 4, "sampling": {"max_new_tokens": 6}}))
    task.adopt("reference", OneProcess(reference), None)
    seen: dict[str, Any] = {}

    def reward(completions: Any, prompts: Any, completion_ids: Any, wanted: Any, **_: Any) -> list[float]:
        seen.update(completions=completions, prompts=prompts, ids=completion_ids, wanted=wanted)
        return [len(ids) / 2 for ids in completion_ids]

    task.rewards.functions["final_number"] = reward
    rollout = roll(task, model, wanted=list("abcde"))
    trajectories = rollout.trajectories
    assert [each.prompt.row for each in trajectories] == [row for row in range(5) for _ in range(4)]
    assert [each.number for each in trajectories] == [0, 1, 2, 3] * 5
    for each in trajectories:
        assert each.prompt.ids.tolist() == PROMPTS[each.prompt.row]
        assert each.tokens["logprobs"].tolist() == pytest.approx(one_row(model, each)[0], abs=1e-5)
        assert each.tokens["reference"].tolist() == pytest.approx(one_row(reference, each)[0], abs=1e-5)
        assert each.text == " ".join(map(str, each.response))
        assert each.score == each.rewards["final_number"] == len(each.response) / 2
        ends = [i for i, token in enumerate(each.response) if token == EOS]
        assert ends == ([len(each.response) - 1] if each.ended else [])
        assert each.ended or len(each.response) == 6
    assert seen["wanted"] == [x for x in "abcde" for _ in range(4)]
    assert seen["prompts"] == [f"prompt {i}" for i in range(5) for _ in range(4)]
    assert seen["ids"] == [each.response.tolist() for each in trajectories]
    assert seen["completions"] == [each.text for each in trajectories]
    lengths = [len(each.response) for each in trajectories]
    kl = [sum(one_row(model, t)[0]) - sum(one_row(reference, t)[0]) for t in trajectories]  # k1, as a check of scale
    assert rollout.metrics["reward"] == pytest.approx(np.mean(lengths) / 2)
    assert rollout.metrics["response_tokens"] == pytest.approx(np.mean(lengths))
    assert rollout.metrics["without_eos"] == pytest.approx(np.mean([not each.ended for each in trajectories]))
    assert 0 < rollout.metrics["without_eos"] < 1
    assert np.isfinite(kl).all()
    k3 = [
        sum(np.exp(b - a) - 1 - (b - a) for a, b in zip(one_row(model, t)[0], one_row(reference, t)[0], strict=True))
        for t in trajectories
    ]
    assert rollout.metrics["kl"] == pytest.approx(np.mean(k3), rel=1e-3)
    assert [sample["response"] for sample in rollout.samples] == [each.text for each in trajectories[:3]]


def test_a_prompt_that_occurs_twice_gets_other_responses() -> None:
    """A rollout that ends one epoch and begins the next may contain a row twice."""
    model, store = llama(0), store_of(PROMPTS)
    task = task_for(model, "grpo", counted({"kl": 0.0, "group_size": 2, "sampling": {"max_new_tokens": 6}}))
    task.rewards.functions["final_number"] = lambda completions, **_: [0.0] * len(completions)
    phase = Phase(0, OneProcess(model), parts_of(2), parts_of(2))
    trajectories = task.rollout(phase, store, [2, 0, 2]).trajectories
    assert [(each.prompt.row, each.number) for each in trajectories] == [(2, 0), (2, 1), (0, 0), (0, 1), (2, 2), (2, 3)]
    assert len({tuple(each.response) for each in trajectories if each.prompt.row == 2}) == 4
    alone = task.rollout(phase, store, [2]).trajectories
    assert [each.response.tolist() for each in alone] == [each.response.tolist() for each in trajectories[:2]]


def test_a_rollout_does_not_depend_on_micro_batches() -> None:
    model = llama(0)
    tasks = [task_for(model, "rloo", {"kl": 0.0, "group_size": 2}) for _ in range(2)]
    for each in tasks:
        each.rewards.functions["final_number"] = lambda completion_ids, **_: [float(sum(ids)) for ids in completion_ids]
    first, second = (roll(task, model, size=size) for task, size in zip(tasks, (1, 4), strict=True))
    for a, b in zip(first.trajectories, second.trajectories, strict=True):
        assert a.response.tolist() == b.response.tolist()
        assert a.score == b.score
        assert np.abs(a.tokens["logprobs"] - b.tokens["logprobs"]).max() < 1e-5
        assert np.abs(a.tokens["advantages"] - b.tokens["advantages"]).max() == 0


@pytest.mark.parametrize("rank", [0, 1])
def test_a_reward_function_gets_whole_groups(rank: int) -> None:
    """One that compares the responses to a prompt, such as their lengths, gives the same rewards on several ranks."""
    task, trajectories = task_for(llama(0), "grpo", counted({"kl": 0.0})), some_trajectories(9)
    for i, each in enumerate(trajectories):
        each.number = i % 3
    seen: list[list[int]] = []

    def reward(completion_ids: Any, **_: Any) -> list[float]:
        seen.extend(completion_ids)
        return [1.0] * len(completion_ids)

    def gathered(value: Any) -> list[Any]:
        other = None if value is None else {i: {"final_number": 0.0} for i in range(9) if i not in value}
        return [value, other]

    task.rewards.functions["final_number"] = reward
    ranks: Any = SimpleNamespace(rank=rank, gather_objects=gathered)
    task.rewards.call_functions(Phase(0, ranks, parts_of(1), parts_of(1)), trajectories)
    groups = [0, 1, 2, 6, 7, 8] if rank == 0 else [3, 4, 5]
    assert seen == [trajectories[i].response.tolist() for i in groups]
    assert [i for i, each in enumerate(trajectories) if each.rewards["final_number"]] == groups


@pytest.mark.parametrize("stop", [7, 11])
def test_a_stop_token_of_the_chat_template_is_an_end(stop: int) -> None:
    """Beside EOS, and only in the response."""
    model = llama(0)
    task = task_for(model, "grpo", {"kl": 0.0, "group_size": 8}, survey={"end_of_turn": stop})
    task.rewards.functions["final_number"] = lambda completions, **_: [0.0] * len(completions)
    trajectories = roll(task, model, [[2, stop, 3], [stop], [4, 5]]).trajectories
    last = [int(each.response[-1]) for each in trajectories]
    assert {stop, EOS} <= set(last)
    for each in trajectories:
        assert each.ended == (each.response[-1] in (stop, EOS))
        assert not {stop, EOS} & set(each.response[:-1].tolist())


def test_the_penalty_of_a_missing_end() -> None:
    model = llama(0)
    task = task_for(model, "grpo", {"kl": 0.0, "missing_eos_penalty": 2.5, "sampling": {"max_new_tokens": 6}})
    task.rewards.functions["final_number"] = lambda completions, **_: [1.0] * len(completions)
    trajectories = roll(task, model).trajectories
    assert {each.ended for each in trajectories} == {True, False}
    assert [each.score for each in trajectories] == [1.0 if each.ended else -1.5 for each in trajectories]


def test_the_normalizer_and_the_coefficient_survive_a_checkpoint() -> None:
    """The next rollout is the one of a run that was not interrupted."""

    def made() -> Any:
        settings = {"normalize_rewards": True, "kl": 0.2, "kl_target": 0.5, "kl_horizon": 40}
        task = task_for(model, "ppo", settings)
        task.adopt("reference", OneProcess(reference), None)
        task.rewards.functions["final_number"] = lambda completion_ids, **_: [float(sum(ids)) for ids in completion_ids]
        return task

    model, reference = llama(0), llama(1)
    whole, first, second = made(), made(), made()
    roll(whole, model)
    roll(first, model)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert second.kl_coefficient != 0.2
    a, b = (roll(task, model).trajectories for task in (whole, second))
    assert [each.score for each in a] == [each.score for each in b]
    assert all((x.tokens["advantages"] == y.tokens["advantages"]).all() for x, y in zip(a, b, strict=True))


# --- reward models ----------------------------------------------------------------------------------------------------


def scorer(name: str, pad: int | None) -> Any:
    kinds = {
        "llama": {"model_type": "llama", "num_key_value_heads": 2, "intermediate_size": 32},
        "gpt2": {"model_type": "gpt2", "n_inner": 32},
        "bert": {"model_type": "bert", "intermediate_size": 32},
    }
    torch.manual_seed(2)
    values = {**SIZES, "vocab_size": VOCAB, "eos_token_id": EOS, "pad_token_id": pad, "num_labels": 1}
    config = AutoConfig.for_model(**values | kinds[name] | {"initializer_range": 0.3})
    return AutoModelForSequenceClassification.from_config(config).eval()


@pytest.mark.parametrize(
    ("name", "pad"),
    [(name, pad) for name in ("llama", "gpt2", "bert") for pad in (PAD, EOS, None) if (name, pad) != ("bert", None)],
)
def test_scores_are_read_at_the_last_token(name: str, pad: int | None) -> None:
    """Rows that end with EOS too, which is the padding token here. transformers reads single unpadded rows, where the
    last token is the last position."""
    rows = [[2, 3, 4, EOS], [5, 6, 7, 8, 9, 10], [11, EOS], [12]]
    model = scorer(name, pad)
    texts = RewardModel.__new__(RewardModel)
    texts.pad_id = 0 if pad is None else pad
    with torch.no_grad():
        found = read_scores(model, texts.padded([np.array(row, np.int64) for row in rows]))
        model.config.pad_token_id = None  # so that transformers reads the last position of a single row
        alone = [float(model(input_ids=torch.tensor([row])).logits[0, 0]) for row in rows]
    assert found.tolist() == pytest.approx(alone, abs=1e-5)
    assert len(set(alone)) == 4


def test_a_reward_model_in_a_rollout() -> None:
    """The same tokenizer: it reads the ids of prompt and response."""
    model, judge = llama(0), scorer("llama", EOS)
    task = task_for(model, "grpo", {"kl": 0.0})
    shown = RewardModel.__new__(RewardModel)
    shown.tokenizer, shown.pad_id, shown.shared, shown.network = None, EOS, None, OneProcess(judge)
    task.rewards.models["judge"], task.rewards.weights = shown, {"judge": 2.0, "final_number": 1.0}
    task.rewards.functions["final_number"] = lambda completions, **_: [0.5] * len(completions)
    rollout = roll(task, model)
    judge.config.pad_token_id = None
    for each in rollout.trajectories:
        ids = torch.from_numpy(np.concatenate([each.prompt.ids, each.response]))[None]
        with torch.no_grad():
            expected = float(judge(input_ids=ids).logits[0, 0])
        assert each.rewards["judge"] == pytest.approx(expected, abs=1e-5)
        assert each.score == pytest.approx(2 * expected + 0.5, abs=1e-4)
    assert rollout.metrics["reward/final_number"] == 0.5


# --- reward models with another tokenizer -----------------------------------------------------------------------------

WORDS = "the cat sleeps and a dog eats in the house while it is red and green"


def tokenizer_of(size: int, template: str | None = None) -> PreTrainedTokenizerFast:
    trained = train_tokenizer(TokenizerTraining(vocab_size=size), [WORDS] * 9)
    trained.chat_template = template
    return trained


@pytest.fixture(scope="module")
def policy_tokenizer() -> PreTrainedTokenizerFast:
    return tokenizer_of(300)


TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("other")
    tokenizer_of(280, TEMPLATE).save_pretrained(folder)
    return folder


def said(tokenizer: Any, prompt: Any, text: str, ended: bool) -> Trajectory:
    each = trajectory([3], tokenizer(text)["input_ids"])
    each.prompt = type(each.prompt)(0, np.array([3]), prompt, {})
    each.text, each.ended = text, ended
    return each


def test_texts_are_tokenized_again(policy_tokenizer: Any, other: Path) -> None:
    model = RewardModel("ppo.rewards.0.model", str(other), policy_tokenizer)
    own = PreTrainedTokenizerFast.from_pretrained(other)
    chat = [{"role": "user", "content": "the cat"}]
    found = model.texts(
        [
            said(policy_tokenizer, "the cat ", "sleeps", True),
            said(policy_tokenizer, "the cat ", "sleeps", False),
            said(policy_tokenizer, chat, "eats", True),
        ]
    )
    plain = own("the cat sleeps", add_special_tokens=False)["input_ids"]
    assert own.decode(found[0]).replace(" ", "") == f"{own.decode(plain)}{own.eos_token}".replace(" ", "")
    assert found[0].tolist()[-1] == own.eos_token_id
    assert found[1].tolist() == found[0].tolist()[:-1] or found[1].tolist()[-1] != own.eos_token_id
    end = own.eos_token
    expected = own(f"<user>the cat{end}<assistant>eats{end}", add_special_tokens=False)["input_ids"]
    assert found[2].tolist() == expected
    assert model.pad_id == own.pad_token_id


def test_the_same_tokenizer_reads_the_ids(policy_tokenizer: Any, tmp_path: Path) -> None:
    policy_tokenizer.save_pretrained(tmp_path)
    model = RewardModel("ppo.rewards.0.model", str(tmp_path), policy_tokenizer)
    each = trajectory([3, 4], [5, 1])
    assert [ids.tolist() for ids in model.texts([each])] == [[3, 4, 5, 1]]


def test_a_reward_model_reads_what_it_was_trained_on(tmp_path: Path) -> None:
    """ChatML writes a newline after the end of a turn, and a reward model was trained to be read there."""
    tokenizer = tokenizer_of(300, CHATML)
    tokenizer.add_special_tokens({"eos_token": "<|im_end|>", "additional_special_tokens": ["<|im_start|>"]})
    tokenizer.save_pretrained(tmp_path)
    model = RewardModel("ppo.rewards.0.model", str(tmp_path), tokenizer)
    chat = [{"role": "user", "content": "the cat"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
    answer, end = tokenizer("eats", add_special_tokens=False)["input_ids"], tokenizer.eos_token_id
    ended, cut = trajectory(prompt, [*answer, end]), trajectory(prompt, answer)
    for each in (ended, cut):
        each.prompt = dataclasses.replace(each.prompt, text=chat)
    pair = {"prompt": chat, "chosen": [said_by_assistant("eats")], "rejected": [said_by_assistant("sleeps")]}
    context = EncoderContext(RewardSettings(), "reward", tokenizer, 64, 0)
    (outcome,) = PreferenceRows(context).outcomes([Record(pair, "pairs.jsonl:1")])
    trained_on, _ = halves(outcome.examples[0].columns["input_ids"], outcome.examples[0].columns["parts"])
    assert trained_on.tolist()[-2] == end  # a newline follows
    texts = model.texts([ended, cut])
    assert [ids.tolist() for ids in texts] == [trained_on.tolist(), [*prompt, *answer]]
    assert {ids.dtype for ids in texts} == {np.dtype(np.int64)}


@pytest.mark.parametrize("text", [TEMPLATE, TEMPLATE.replace("<", "{# the same #}<")])
def test_a_reward_model_gets_conversations_as_its_own_chat_template_writes_them(tmp_path: Path, text: str) -> None:
    """Also if its tokens are those of the policy, whose template may be another one."""
    chat, answer = [{"role": "user", "content": "the cat"}], "eats the dog"
    policy, own = tokenizer_of(300, TEMPLATE), tokenizer_of(300, f"{{{{ bos_token }}}}{text}")
    own.save_pretrained(tmp_path)
    model = RewardModel("ppo.rewards.0.model", str(tmp_path), policy)
    ended, cut, plain = (
        said(policy, prompt, answer, end) for prompt, end in ((chat, True), (chat, False), ("a", True))
    )
    written = own.apply_chat_template([*chat, said_by_assistant(answer)])["input_ids"]
    assert written[-1] == own.eos_token_id
    assert [each.tolist() for each in model.texts([ended, cut])] == [written, written[:-1]]
    assert model.texts([plain])[0].tolist() == [3, *plain.response]
    tokenizer_of(300, text).save_pretrained(tmp_path / "alike")
    alike = RewardModel("ppo.rewards.0.model", str(tmp_path / "alike"), policy)
    assert alike.texts([cut])[0].tolist() == [3, *cut.response]


def said_by_assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def test_a_row_s_own_system_message_and_tools_are_read(tmp_path: Path) -> None:
    """As dpo reads them; a reward model with another template gets them too."""
    tokenizer = tokenizer_of(300, "{{ tools | tojson }}" + TEMPLATE)
    tool = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
    chat = [{"role": "user", "content": "the cat"}]
    rows = [{"prompt": chat, "system": "eats", "tools": json.dumps([tool])}, {"prompt": chat}]
    made = recipe("ppo", {"system": "sleeps"}, data={"max_length": 300})
    encoder = PromptRows(EncoderContext.of(made, tokenizer, {}))
    for row, system, tools in zip(rows, ("eats", "sleeps"), ([tool], None), strict=True):
        ((example,),) = [outcome.examples for outcome in encoder.outcomes([Record(row, "here")])]
        messages = [{"role": "system", "content": system}, *chat]
        expected = tokenizer.apply_chat_template(messages, tools=tools, add_generation_prompt=True)["input_ids"]
        assert example.columns["input_ids"].tolist() == expected
        assert (example.meta["prompt"], example.meta["tools"]) == (messages, tools)
    tokenizer_of(300, "{{ tools | tojson }}-" + TEMPLATE).save_pretrained(tmp_path)
    model = RewardModel("ppo.rewards.0.model", str(tmp_path), tokenizer)
    each = said(tokenizer, chat, "eats", True)
    each.prompt = dataclasses.replace(each.prompt, tools=[tool])
    written = model.template_of.apply_chat_template([*chat, said_by_assistant("eats")], tools=[tool])["input_ids"]
    assert model.texts([each])[0].tolist() == written


def test_a_conversation_without_a_chat_template(policy_tokenizer: Any, tmp_path: Path) -> None:
    tokenizer_of(280).save_pretrained(tmp_path)
    model = RewardModel("ppo.rewards.0.model", str(tmp_path), policy_tokenizer)
    with pytest.raises(RecipeError, match=r"ppo.rewards.0.model: .* no chat template.*Give its tokenizer"):
        model.texts([said(policy_tokenizer, [{"role": "user", "content": "a"}], "b", True)])


@pytest.mark.parametrize("conversation", [False, True])
def test_evaluations_score_the_prompt_too(policy_tokenizer: Any, other: Path, conversation: bool) -> None:
    """A reward model with another tokenizer gets the text of the prompt, as in a rollout."""
    model = llama(0, vocab_size=len(policy_tokenizer), eos_token_id=policy_tokenizer.eos_token_id)
    task = task_for(model, "grpo", {"kl": 0.0}, tokenizer=policy_tokenizer)
    reward = RewardModel("grpo.rewards.0.model", str(other), policy_tokenizer)
    seen: list[Trajectory] = []

    def texts(trajectories: Sequence[Trajectory]) -> list[np.ndarray]:
        seen.extend(trajectories)
        return [np.array([3])] * len(trajectories)

    reward.texts = texts  # type: ignore[method-assign]
    reward.network = SimpleNamespace(forward=lambda _call, inputs: torch.zeros(len(inputs["input_ids"])))
    task.rewards.models["judge"], task.rewards.weights = reward, {"judge": 1.0}
    texts_of = ["the cat", "a red dog é"]
    prompts = [[{"role": "user", "content": text}] for text in texts_of] if conversation else texts_of
    rows = []
    for prompt in prompts:
        raw = np.frombuffer(json.dumps({"prompt": prompt, "columns": {}}).encode(), np.uint8)
        rows.append(Row(np.array([5, 6, 7]), np.zeros(1, np.int64), {"meta": raw}))
    with torch.no_grad():
        task.evaluate(model.eval(), task.collate(rows, [(0, 0), (0, 1)]).inputs)
    assert [each.prompt.text for each in seen] == prompts


@pytest.mark.parametrize(("labels", "longest", "says"), [(2, 8, "has 2 labels; a reward model has one"), (1, 65, "64")])
def test_a_network_that_is_no_reward_model(labels: int, longest: int, says: str) -> None:
    config = AutoConfig.for_model("llama", num_labels=labels, max_position_embeddings=64)
    with pytest.raises(RecipeError, match=f"ppo.rewards.0.model: there .*{says}"):
        check_reward_model("ppo.rewards.0.model", "there", config, longest)
    check_reward_model("ppo.rewards.0.model", "there", AutoConfig.for_model("llama", num_labels=1), 64)


def test_a_score_that_is_no_number() -> None:
    """A reward model in fp16 may overflow. Without an error, the normalizer and all weights would be NaN too."""
    model = llama(0)
    task = task_for(model, "grpo", {"kl": 0.0})
    reward = RewardModel.__new__(RewardModel)
    reward.key, reward.path = "grpo.rewards.0.model", "there"
    reward.tokenizer, reward.pad_id, reward.shared = None, EOS, None
    reward.network = SimpleNamespace(forward=lambda _call, inputs: torch.full((len(inputs["input_ids"]),), torch.nan))
    task.rewards.models["judge"], task.rewards.weights = reward, {"judge": 1.0}
    task.rewards.functions = {}
    with pytest.raises(RecipeError, match=r"rewards: the reward model judge gave the score nan.*train.precision"):
        roll(task, model)


# --- the reference under an adapter -----------------------------------------------------------------------------------

ADAPTERS: dict[str, Any] = {
    "lora": {"lora": {"r": 2}},
    "dora": {"lora": {"r": 2, "dora": True}},
    "gaussian": {"lora": {"r": 2, "init": "gaussian"}},
    "orthogonal": {"lora": {"r": 2, "init": "orthogonal"}},
    "embeddings": {"lora": {"r": 2}, "embeddings": "all"},
    "adalora": {"adalora": {"r": 3, "target_r": 2}},
    "ia3": {"ia3": {}},
    "bottleneck": {"bottleneck": {"size": 4}},
    "houlsby": {"bottleneck": {"size": 4, "placement": "houlsby"}},
    "vera": {"peft": {"type": "vera", "r": 4, "target_modules": ["q_proj", "v_proj"]}},
    "loha": {"peft": {"type": "loha", "r": 4, "target_modules": ["q_proj", "v_proj"]}},
    "oft": {"peft": {"type": "oft", "oft_block_size": 8, "target_modules": ["q_proj", "v_proj"]}},
    "lora by peft": {"peft": {"type": "lora", "r": 4, "target_modules": ["q_proj"]}},
    "ln_tuning": {"peft": {"type": "ln_tuning", "target_modules": ["input_layernorm"]}},
}


def adapted(method: dict[str, Any]) -> tuple[Any, Any]:
    """The base, and a copy of it with an adapter that has been trained."""
    base = llama(0).eval()
    adapt = AdaptSection.model_validate(method)
    settings = AdapterSetup("CAUSAL_LM", "there", None, 10, (), "there", 0)
    model = adapt_network(copy.deepcopy(base), adapt, settings).eval()
    chance = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.3 * torch.randn(parameter.shape, generator=chance)
    return base, model


@pytest.mark.parametrize("name", ADAPTERS)
def test_the_reference_is_the_base_under_the_adapter(name: str) -> None:
    """To the bit, and what is trained stays as it was."""
    base, model = adapted(ADAPTERS[name])
    task, trajectories = task_for(llama(0), "grpo", {"kl": 0.1}), some_trajectories()
    wanted = copy.deepcopy(trajectories)
    trained = [parameter.requires_grad for parameter in model.parameters()]
    look(task, task.look_at_policy, model, trajectories)
    look(task, task.base_as_reference, model, trajectories)
    look(task, task.look_at_reference, base, wanted)
    for ours, expected in zip(trajectories, wanted, strict=True):
        assert (ours.tokens["reference"] == expected.tokens["reference"]).all()
        assert np.abs(ours.tokens["logprobs"] - ours.tokens["reference"]).max() > 1e-4
    assert [parameter.requires_grad for parameter in model.parameters()] == trained
    task_class("grpo").frozen_roles(setup("grpo", {"kl": 0.1}), ModelSection(path="x", adapt=ADAPTERS[name]))


@pytest.mark.parametrize(
    ("adapt", "says"),
    [
        ({"lora": {"init": "pissa"}}, "model.adapt.lora.init: pissa changes the weights of the base.*init: default"),
        ({"lora": {"init": "olora"}}, "model.adapt.lora.init: olora changes"),
        ({"lora": {"bias": "all"}}, "model.adapt.lora.bias: all trains biases of the base.*bias: none"),
        ({"adapter": "there"}, "model.adapt.adapter.*Merge the adapter"),
        ({"prompt_tuning": {}}, "model.adapt: prompt_tuning changes the input"),
        ({"peft": {"type": "prompt_tuning"}}, "model.adapt.peft: prompt_tuning adapts no layers that"),
        ({"peft": {"type": "lora", "init_lora_weights": "pissa"}}, "model.adapt.peft.init_lora_weights: pissa changes"),
        ({"peft": {"type": "lora", "bias": "all"}}, "model.adapt.peft.bias: all changes the base"),
        ({"peft": {"type": "fourierft"}}, "model.adapt.peft: fourierft with init_weights: False does not begin as"),
        ({"peft": {"type": "C3A"}}, "model.adapt.peft: c3a with init_weights: xavier_uniform does not begin as"),
        ({"peft": {"type": "vblora"}}, "model.adapt.peft: vblora does not begin as the base.*Use lora"),
        ({"peft": {"type": "loha", "init_weights": False}}, "model.adapt.peft: loha with init_weights: False does not"),
        ({"peft": {"type": "ia3", "init_ia3_weights": False}}, "ia3 with init_ia3_weights: False does not"),
    ],
    ids=str,
)
@pytest.mark.parametrize("task", ["ppo", "grpo", "rloo"])
def test_adapters_under_which_the_base_is_no_reference(task: str, adapt: dict[str, Any], says: str) -> None:
    """They are refused with a KL, and not without."""
    section = ModelSection(path="there", adapt=adapt)
    with pytest.raises(RecipeError, match=rf"^{task}\.kl: .*{says}.*or set it to 0"):
        task_class(task).frozen_roles(setup(task, {"kl": 0.1}), section)
    assert task_class(task).frozen_roles(setup(task, {"kl": 0.0}), section) == {}


@pytest.mark.parametrize(
    ("given", "same"),
    [
        ({"type": "fourierft", "n_frequency": 9}, False),
        ({"type": "fourierft", "n_frequency": 9, "init_weights": True}, True),
        ({"type": "c3a", "block_size": 8}, False),
        ({"type": "c3a", "block_size": 8, "init_weights": True}, True),
        ({"type": "vblora", "num_vectors": 8, "vector_length": 4}, False),
        ({"type": "unilora"}, False),
        ({"type": "tinylora", "init_weights": "uniform"}, False),
        ({"type": "hira", "init_weights": "gaussian"}, True),
        ({"type": "lokr", "init_weights": "lycoris"}, True),
        ({"type": "miss", "r": 4, "init_weights": "bat"}, True),
        ({"type": "boft", "boft_block_size": 4}, True),
        ({"type": "lora", "init_lora_weights": "orthogonal"}, True),
    ],
    ids=str,
)
def test_methods_of_peft_whose_start_is_the_base(given: dict[str, Any], same: bool) -> None:
    """What is refused is what changes the outputs of the network."""
    base, ids = llama(0), torch.arange(2, 12)[None]
    section = ModelSection(path="there", adapt={"peft": {**given, "target_modules": ["q_proj", "v_proj"]}})
    model = adapt_network(llama(0), section.adapt, AdapterSetup("CAUSAL_LM", "there", None, 9, (), "there", 0))
    with torch.no_grad():
        change = (model(input_ids=ids).logits - base(input_ids=ids).logits).abs().max()
    assert (change < 1e-5) == same
    with contextlib.nullcontext() if same else pytest.raises(RecipeError, match="does not begin as the base"):
        task_class("ppo").frozen_roles(setup("ppo", {"kl": 0.1}), section)


@pytest.mark.parametrize("method", ["prompt_tuning", "p_tuning", "prefix_tuning"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "bloom"])
def test_virtual_tokens_before_padded_prompts(name: str, method: str) -> None:
    """Padding lies between them and a prompt: responses and log-probabilities are those of each row alone."""
    section, base = AdaptSection.model_validate({method: {"tokens": 3}}), policy(name)
    task = task_for(base, "grpo", {"sampling": {"temperature": 0.7}})
    task.network = adapted_facts(read_facts(base), section)
    model: Any = adapt_network(base, section, AdapterSetup("CAUSAL_LM", "nowhere", None, 10, (), "nowhere", 0)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.4)
    trajectories = some_trajectories()
    look(task, task.look_at_policy, model, trajectories)
    for each in trajectories:
        assert each.tokens["logprobs"].tolist() == pytest.approx(one_row(model, each, 0.7)[0], abs=1e-5)
    prompts = [each.prompt.ids for each in trajectories[::3]]
    assert len({len(ids) for ids in prompts}) > 1
    options: dict[str, Any] = {"pad_id": PAD, "eos_ids": [EOS]}
    found = sample(model, left_padded(prompts, PAD), task.settings.sampling, [7, 8], **options)
    for seed, ids, response in zip([7, 8], prompts, found.tolist(), strict=True):
        alone = sample(model, left_padded([ids], PAD), task.settings.sampling, [seed], **options)[0].tolist()
        assert response == alone + [PAD] * (len(response) - len(alone))


@pytest.mark.parametrize(
    "adapt",
    [
        {"lora": {"dropout": 0.1}},
        {"adalora": {"dropout": 0.1}},
        {"peft": {"type": "lora", "lora_dropout": 0.1}},
        {"peft": {"type": "shadow"}},  # 0.2 by default
    ],
)
def test_dropout_of_an_adapter_is_refused(adapt: dict[str, Any]) -> None:
    """Else the ratio is not 1 on the first pass."""
    section = ModelSection(path="there", adapt=adapt)
    with pytest.raises(RecipeError, match=r"^model\.adapt\.(ada)?(lora|peft)\.\w*dropout: task ppo.*Set it to 0"):
        task_class("ppo").frozen_roles(setup("ppo", {"kl": 0.0}), section)


def test_an_adapter_that_draws_random_numbers_is_refused() -> None:
    """PVeRA does in every pass of the training, without dropout."""
    section = ModelSection(path="there", adapt={"peft": {"type": "pvera"}})
    with pytest.raises(RecipeError, match=r"^model\.adapt\.peft: task ppo.*pvera draws random numbers.*Use vera"):
        task_class("ppo").frozen_roles(setup("ppo", {"kl": 0.0}), section)


def test_dropout_of_an_adapter_that_is_trained_on_is_switched_off() -> None:
    """Its config is its own."""
    model = get_peft_model(llama(0), LoraConfig(target_modules="all-linear", lora_dropout=0.5))
    task, trajectories = task_for(llama(0), "grpo", {"kl": 0.0}), some_trajectories()
    task.extend_network(model, ModelSection(path="there", adapt={"adapter": "there"}))
    look(task, task.look_at_policy, model.eval(), trajectories)
    task.advantages(trajectories)
    total, count = task.loss(model.train(), batch_of(task, trajectories).inputs).metrics["ratio"]
    assert float(total) == float(count)


@pytest.mark.parametrize(("revision", "same"), [("v1", True), ("v2", False), (None, False)])
def test_a_reward_adapter_on_another_revision_of_the_base_is_not_read_on_the_policy_s(
    tmp_path: Path, revision: str | None, same: bool
) -> None:
    config = {"base_model_name_or_path": "some/model", "revision": "v1", "peft_type": "LORA"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    save_file({"base_model.model.score.weight": torch.zeros(1, 4)}, tmp_path / "adapter_model.safetensors")
    section = ModelSection(path="some/model", revision=revision, adapt={"lora": {}})
    assert shares_base(str(tmp_path), section) == same


def test_a_reward_adapter_is_added_without_warnings(tmp_path: Path) -> None:
    """It excludes its head from the adapted layers, and peft warns of excluded layers that a network does not have."""
    from transformers import AutoModelForSequenceClassification

    size = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = AutoConfig.for_model("llama", vocab_size=16, num_labels=1, pad_token_id=0, **size)
    lora = LoraConfig(r=2, target_modules=["q_proj"], exclude_modules=["score"], modules_to_save=["score"])
    get_peft_model(AutoModelForSequenceClassification.from_config(config), lora).save_pretrained(tmp_path)
    policy = get_peft_model(AutoModelForCausalLM.from_config(config), LoraConfig(target_modules=["q_proj"]))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        add_frozen_scorer(policy, str(tmp_path), "scorer")
    inputs = {"input_ids": torch.ones(1, 3, dtype=torch.long), "attention_mask": torch.ones(1, 3, dtype=torch.long)}
    assert read_scorer(policy, inputs, "scorer").shape == (1,)


# --- what cannot work -------------------------------------------------------------------------------------------------


def test_a_prompt_and_its_response_must_fit_the_context() -> None:
    config = AutoConfig.for_model("llama", max_position_embeddings=23)
    with pytest.raises(RecipeError, match=r"ppo.sampling.max_new_tokens: .* up to 24 tokens.* \(23\): lower one"):
        task_class("ppo").fit_config(setup("ppo"), config)
    config.max_position_embeddings = 24
    task_class("ppo").fit_config(setup("ppo"), config)


def test_a_policy_is_a_decoder() -> None:
    with pytest.raises(RecipeError, match=r"model: task grpo needs a decoder"):
        task_class("grpo").fit_config(setup("grpo"), AutoConfig.for_model("t5"))


def test_a_reference_needs_a_pretrained_network() -> None:
    section = ModelSection(config={"model_type": "llama"})
    with pytest.raises(RecipeError, match=r"ppo.kl: the reference is the network of model.path, and there is none"):
        task_class("ppo").frozen_roles(setup("ppo", {"kl": 0.1}), section)


def test_a_tokenizer_without_an_end() -> None:
    class Endless(Numbers):
        eos_token_id = None  # type: ignore[assignment]

    model = llama(0, eos_token_id=None)
    with pytest.raises(RecipeError, match=r"tokenizer: it has no EOS token"):
        task_for(model, "grpo", tokenizer=Endless())


def test_a_dummy_batch_does_not_count_in_an_evaluation() -> None:
    """A rank without validation rows repeats one, because all ranks must sample together."""
    task = task_for(model := llama(), "ppo", {"kl": 0.1})
    task.reference = SimpleNamespace(forward=lambda call, inputs: call(llama(1).eval(), inputs))
    batch = task.collate([Row(np.array([3, 4]), np.zeros(1, np.int64), {})], [(0, 0)])
    with torch.no_grad():
        counted, dummy = (task.evaluate(model.eval(), x).metrics["kl"] for x in (batch.inputs, mask_all(batch.inputs)))
    assert counted[0] != 0
    assert counted[1] == 1
    assert (float(dummy[0]), int(dummy[1])) == (0.0, 0)


# --- responses that never end -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("shares", "warnings"), [([0.9, 1.0, 1.0], 1), ([0.9, 0.0], 0)])
def test_a_policy_that_never_ends_a_response_is_warned_of_once(
    monkeypatch: pytest.MonkeyPatch, shares: list[float], warnings: int
) -> None:
    told: list[str] = []
    monkeypatch.setattr("ptft_dist.training.rollouts.warn", told.append)
    left = iter(shares)
    task: Any = SimpleNamespace(
        settings=SimpleNamespace(epochs=1, sampling=SimpleNamespace(micro_size=1, max_new_tokens=7)),
        rollout=lambda *_: Rollout([], {"without_eos": next(left)}, []),
    )
    plan: Any = SimpleNamespace(rows_of=lambda _number: np.arange(2))
    batches = RolloutBatches(task, cast(Any, None), plan, Shape(0, 1, 1, None, False), seed=0, global_size=2)
    for _ in shares:
        assert list(batches.next_phase(cast(Any, SimpleNamespace(engine=None)))) == []
    assert len(told) == warnings
    assert all("none of the 0 responses ended within sampling.max_new_tokens: 7" in text for text in told)


@pytest.mark.parametrize(("horizon", "fits"), [(12, False), (13, True)])
def test_the_coefficient_of_the_kl_stays_positive(horizon: int, fits: bool) -> None:
    """A rollout of 64 responses without any KL multiplies it by 1 - 0.2 * 64 / horizon."""
    settings = {"kl": 0.2, "kl_target": 0.5, "kl_horizon": horizon, "prompts": 64}
    assert (adapted_kl_coefficient(0.2, 0.0, 0.5, 64, horizon) > 0) == fits
    if fits:
        setup("ppo", settings)
    else:
        with pytest.raises(ValueError, match=r"kl_horizon: kl could become negative; use more than a fifth of prompts"):
            setup("ppo", settings)
