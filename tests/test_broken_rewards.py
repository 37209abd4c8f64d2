"""Broken inputs of tasks that learn from rewards or preferences: one error that names key, file or function, and a
remedy; or the result that the same input has elsewhere."""

from __future__ import annotations

import datetime
import functools
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from accelerate.state import PartialState
from peft import LoraConfig, PeftModel, get_peft_model
from support import merge, start
from tiny import WORDS, write_rows, write_tiny
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)

import ptft_dist
from ptft_dist.api import load_recipe
from ptft_dist.config.rollouts import RewardSource
from ptft_dist.config.tokenizer_section import TokenizerTraining
from ptft_dist.data.tokenizer import train_tokenizer
from ptft_dist.engine import reset_accelerate
from ptft_dist.errors import CheckpointError, DataError, RecipeError
from ptft_dist.launch.environment import place
from ptft_dist.reporting.messages import hide_messages
from ptft_dist.rl.rewards import RunningMoments, call_function, final_number, load_function, mixed, shaped
from ptft_dist.rl.rollout import Rollout
from ptft_dist.session import Session

CONTROL = ["<|im_start|>", "<|im_end|>"]
TASKS = ("ppo", "grpo", "rloo")
ENDS = ("eos", "bos", "pad")
FUNCTIONS = """
import collections

calls = collections.Counter()

def length(completions, **columns):
    calls["length"] += 1
    return [len(text) / 10 for text in completions]

def constant(completions, **columns):
    calls["constant"] += 1
    return [0.1] * len(completions)

async def later(completions, **columns):
    return [0.0] * len(completions)

number = 3
"""


# --- tiny networks, and sessions of recipes ---------------------------------------------------------------------------


def tokenizer_of(size: int, roles: Sequence[str] = ENDS) -> Any:
    return train_tokenizer(TokenizerTraining(vocab_size=size), [" ".join(WORDS)] * 9, roles)


def save(folder: Path, model_class: Any, tokenizer: Any, *, with_tokenizer: bool = True, **changes: Any) -> Path:
    """A network with random weights, so large that probabilities and scores differ."""
    torch.manual_seed(0)
    values: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.3,
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    model_class(LlamaConfig(**values | changes)).save_pretrained(folder)
    if with_tokenizer:
        tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy, reward models, prompts and reward functions."""
    folder = tmp_path_factory.mktemp("home")
    tokenizer = tokenizer_of(300)
    save(folder / "policy", LlamaForCausalLM, tokenizer)
    save(folder / "judge", LlamaForSequenceClassification, tokenizer, num_labels=1)
    write_rows(folder / "prompts.jsonl", [{"prompt": f"the cat {word}"} for word in WORDS] * 2)
    (folder / "functions.py").write_text(FUNCTIONS)
    return folder


Make = Callable[..., Session]


@pytest.fixture
def session(home: Path, tmp_path: Path) -> Iterator[Make]:
    """Makes the session of a recipe in this process; `start` builds its networks."""
    hide_messages()

    def make(task: str, settings: Mapping[str, Any], *, start: bool = False, **changes: Any) -> Session:
        rewards = [{"function": "functions:length"}]
        own: dict[str, Any] = {"prompts": 4, "kl": 0.0, "sampling": {"max_new_tokens": 4}, "rewards": rewards}
        if task in ("grpo", "rloo"):
            own |= {"prompts": 2, "group_size": 4}
        recipe: dict[str, Any] = {
            "task": task,
            "model": {"path": str(home / "policy")},
            "tokenizer": {"path": str(home / "policy")},
            "data": {"train": [{"path": "prompts.jsonl"}], "max_length": 16, "cache_dir": str(home / "cache")},
            task: own if task in TASKS else {},
            "batch": {"global_size": 4, "micro_size": 2},
            "train": {"max_steps": 2, "precision": "fp32"},
            "eval": {"every": None},
            "run_dir": str(tmp_path / "run"),
        }
        file = home / "recipe.yaml"
        file.write_text(json.dumps(merge(merge(recipe, {task: settings}), changes), indent=1))
        made = Session(load_recipe(str(file)), place())
        if start:
            made.start()
        return made

    yield make
    reset_accelerate()


def roll_out(made: Session, number: int = 0) -> Rollout:
    rollout: Rollout = made._batches().roll_out(made.engine, number)  # type: ignore[attr-defined]
    return rollout


def score_of(model: Any, ids: Sequence[int]) -> float:
    """By transformers, which reads a single row without a padding token at its last position."""
    model.config.pad_token_id = None
    with torch.no_grad():
        return float(model(input_ids=torch.tensor([list(ids)])).logits[0, 0])


# --- what reward functions return -------------------------------------------------------------------------------------


def raising(completions: Any, **_: Any) -> list[float]:
    return [1.0 / len(text) for text in completions]


def needs_a_column(completions: Any, answer: Any, **_: Any) -> list[float]:
    return final_number(completions, answer)


RETURNED: dict[str, tuple[Callable[..., Any], str]] = {
    "nan": (lambda **_: [1.0, math.nan], r"returned nan for the completion ''. A reward function must return a list"),
    "inf": (lambda **_: [-math.inf, 1.0], "returned -inf for the completion 'cat'"),
    "a tensor of nan": (lambda **_: torch.tensor([1.0, math.nan]), r"returned tensor\(nan\) for"),
    "too few": (lambda **_: [1.0], "returned 1 rewards for 2 completions. .* one number, or None, for each"),
    "too many": (lambda **_: [1.0] * 3, "returned 3 rewards for 2 completions"),
    "none at all": (lambda **_: [], "returned 0 rewards for 2 completions"),
    "a number": (lambda **_: 1.0, "returned 1.0. A reward function must return a list"),
    "nothing": (lambda **_: None, "returned None. A reward function must return a list"),
    "text": (lambda **_: "12", "returned '12'. A"),
    "bytes": (lambda **_: b"12", "returned b'12'. A"),
    "texts": (lambda **_: ["1.5", "2"], "returned '1.5' for the completion 'cat'"),
    "a dictionary": (lambda **_: {1: 0.5, 2: 0.5}, "returned {1: 0.5, 2: 0.5}. A"),
    "lists": (lambda **_: [[1.0], [2.0]], r"returned \[1.0\] for the completion 'cat'"),
    "a matrix": (lambda **_: torch.ones(2, 3), r"returned tensor\(.*\) for the completion 'cat'"),
    "a scalar array": (lambda **_: np.array(1.0), "failed: TypeError: iteration over a 0-d array"),
    "an error": (raising, rf"failed: ZeroDivisionError: .* \(line \d+ of {__file__}\). Correct it; its arguments are"),
    "a missing column": (
        needs_a_column,
        r"failed: TypeError: .*'answer'. Correct it; its arguments are completions, prompts, completion_ids, wanted$",
    ),
    "an exit": (lambda **_: exit(), r"failed: SystemExit: "),
}


@pytest.mark.parametrize("name", RETURNED)
def test_what_is_no_reward_names_the_function_and_the_completion(name: str) -> None:
    function, says = RETURNED[name]
    with pytest.raises(RecipeError, match=rf"^ppo\.rewards\.0\.function: mine:reward {says}"):
        call_function(
            function,
            "ppo.rewards.0.function: mine:reward",
            ["a", "b"],
            ["cat", ""],
            [[5], []],
            {"wanted": [1, 2]},
        )


@pytest.mark.parametrize("key", ["answer", "prompts"])
def test_an_argument_with_the_name_of_a_column_is_an_error(key: str) -> None:
    """The column would replace it."""
    function = functools.partial(lambda **given: [1.0 for _ in given["prompts"]], **{key: "5"})
    with pytest.raises(RecipeError, match=rf"^f: the rows have a column {key}, and its `arguments` a key of this name"):
        call_function(function, "f", ["a"], ["b"], [[1]], {"answer": ["7"]})


@pytest.mark.parametrize(
    "returned",
    [[True, None], (1, None), np.array([1.0, None]), iter([1, None]), [torch.tensor(1.0), None], [np.float32(1), None]],
    ids=["list", "tuple", "array", "iterator", "tensors", "numbers of numpy"],
)
def test_numbers_of_all_types_are_rewards(returned: Any) -> None:
    assert call_function(lambda **_: returned, "f", ["a", "b"], ["c", "d"], [[1], [2]], {}) == [1.0, None]


def test_a_response_without_any_reward_is_shown() -> None:
    rewards = {"a": [1.0, None], "b": [None, None]}
    with pytest.raises(DataError, match=r"none of a, b gave a reward to the response 'dog'. A function may return"):
        mixed(rewards, {"a": 1.0, "b": 1.0}, ["cat", "dog"])


@pytest.mark.parametrize(("value", "weight"), [(1e39, 1.0), (1e300, -1.0), (1e20, 1e20), (1e200, 1e200)])
def test_a_score_that_is_too_large_for_fp32_is_an_error(value: float, weight: float) -> None:
    """Each of the rewards is finite. As infinity, it would make all advantages of the rollout NaN."""
    with pytest.raises(RecipeError, match=r"rewards: the score of the response 'cat' is .*too large.*lower their"):
        mixed({"a": [value]}, {"a": weight}, ["cat"])


def test_large_scores_are_normalized_without_overflow() -> None:
    """Their squares are too large for fp32."""
    moments, scores = RunningMoments(), np.array([1e30, -1e30, 0.0], np.float32)
    with np.errstate(over="raise"):
        found = shaped(scores, np.ones(3), np.ones(3, bool), moments=moments)
    assert found.tolist() == pytest.approx([1.0, -1.0, 0.0])  # their unbiased deviation is 1e30


# --- functions that a recipe names ------------------------------------------------------------------------------------

MODULES = {
    "raising": "x = 1\nraise ValueError('no such model')\n",
    "exiting": "import sys\nsys.exit(0)\n",
    "importing": "import a_package_that_is_not_installed\n",
    "unfinished": "def reward(completions:\n",
}
NAMED: dict[str, tuple[str, str]] = {
    "no module": ("nowhere:reward", "nowhere cannot be imported: ModuleNotFoundError.*name another module: an install"),
    "no module in the name": ("reward", "'reward' names no function of a module; write it as module:function"),
    "no function in the name": (
        "functions:",
        "'functions:' names no function of a module; write it as module:function",
    ),
    "no function": ("functions:missing", "functions has no function 'missing'. Correct the name, or define"),
    "a number": ("functions:number", "functions has no function 'number'. Correct"),
    "a coroutine": ("functions:later", "later is not an ordinary function. Write `def`"),
    "a path": ("../functions.py:length", "../functions.py cannot be imported: .*name another module"),
    "a module that raises": (
        "raising:reward",
        r"raising cannot be imported: ValueError: no such model \(line 2 of .*raising.py\). Correct it",
    ),
    "a module that exits": ("exiting:reward", r"exiting cannot be imported: SystemExit: 0 \(line 2 of .*exiting.py\)"),
    "a missing package": (
        "importing:reward",
        r"ModuleNotFoundError: No module named 'a_package_that_is_not_installed' \(line 1 of .*importing.py\)",
    ),
    "a syntax error": ("unfinished:reward", r"SyntaxError: .*\(unfinished.py, line 1\)"),
}


@pytest.mark.parametrize("name", NAMED)
def test_a_function_that_cannot_be_used_ends_the_run_before_a_process_group_exists(
    home: Path, session: Make, name: str
) -> None:
    function, says = NAMED[name]
    for module, text in MODULES.items():
        (home / f"{module}.py").write_text(text)
    reset_accelerate()  # another test of this process may have left its state
    with pytest.raises(RecipeError, match=rf"^grpo\.rewards\.1\.function: .*{says}"):
        session("grpo", {"rewards": [{"function": "functions:length", "name": "first"}, {"function": function}]})
    assert PartialState._shared_state == {}


def test_functions_of_a_file_share_one_module_until_the_file_changes(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(FUNCTIONS)
    length, constant = (
        load_function(RewardSource(function=f"mine:{x}"), "k", tmp_path) for x in ("length", "constant")
    )
    length(completions=["a"])
    constant(completions=["a"])
    assert length.__globals__["calls"] == {"length": 1, "constant": 1}  # type: ignore[attr-defined]
    file.write_text("def length(completions, **columns):\n    return [7.0]\n")
    assert load_function(RewardSource(function="mine:length"), "k", tmp_path)(completions=["a"]) == [7.0]


@pytest.mark.parametrize(
    ("function", "arguments", "says"),
    [
        ("functions:length", {}, r"functions:length\(\*\*arguments\) failed: TypeError: .*'completions'.*`arguments`"),
        ("builtins:dict", {"size": 3}, r"builtins:dict returned {'size': 3} and not a reward function.*remove `make`"),
    ],
    ids=["fails", "returns something else"],
)
def test_what_makes_no_reward_function(home: Path, function: str, arguments: dict[str, Any], says: str) -> None:
    source = RewardSource(function=function, arguments=arguments, make=True)
    with pytest.raises(RecipeError, match=rf"ppo\.rewards\.0\.function: {says}"):
        load_function(source, "ppo.rewards.0.function", home)


COUNTING = """
calls = 0

def reward(completions, **columns):
    global calls
    calls += 1
    if calls > 2:
        raise ValueError("the third rollout")
    return [len(text) / 10 for text in completions]
"""


def test_a_function_that_fails_in_the_third_rollout(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The error names it; checkpoints and samples of the rollouts before are kept, and a resume goes on from there."""
    path = write_tiny(
        tmp_path,
        "ppo",
        ppo={"prompts": 4, "epochs": 1, "rewards": [{"function": "counting:reward"}]},
        batch={"global_size": 4, "micro_size": 2},
        train={"max_steps": 4},
        eval={"every": None},
        save={"every": 1},
        data={"validation": None, "cache_dir": str(tmp_path / "cache")},
        run_dir=str(tmp_path / "run"),
    )
    (tmp_path / "counting.py").write_text(COUNTING)
    with pytest.raises(RecipeError, match=r"counting:reward failed: ValueError: the third rollout \(line 8 of .*\)"):
        ptft_dist.train(path)
    errors = capsys.readouterr().err
    assert errors.count("the third rollout") == 1
    assert "Traceback" not in errors
    run = tmp_path / "run"
    assert sorted(each.name for each in (run / "checkpoints").iterdir()) == ["step-00000001", "step-00000002"]
    assert json.loads((run / "result.json").read_text())["exit_code"] == RecipeError.exit_code
    kept = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    assert [sample["phase"] for sample in kept] == [0, 0, 0, 1, 1, 1]
    (tmp_path / "counting.py").write_text(COUNTING.replace("> 2", "> 20"))
    with pytest.raises(CheckpointError, match=r"(?s)ppo\.rewards\.0\.function\.file: .* --accept ppo\.rewards"):
        ptft_dist.train(path)
    assert ptft_dist.train(path, accept=["ppo.rewards.0.function.file"]).steps == 4
    again = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    assert again[:6] == kept
    assert [sample["phase"] for sample in again] == [phase for phase in range(4) for _ in range(3)]


# --- reward models ----------------------------------------------------------------------------------------------------


def write_adapter(folder: Path, home: Path, *, task_type: str | None = "SEQ_CLS", **options: Any) -> Path:
    """A LoRA adapter on the policy, of peft alone, as if it was trained."""
    base = AutoModelForSequenceClassification.from_pretrained(home / "policy", num_labels=1)
    torch.manual_seed(1)
    lora = LoraConfig(task_type=task_type, r=2, target_modules=["q_proj", "v_proj"], **options)
    model = get_peft_model(base, lora)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.3 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return folder


REFUSED: dict[str, tuple[Callable[[Path, Path], object], str]] = {
    "two labels": (
        lambda folder, _: save(folder, LlamaForSequenceClassification, tokenizer_of(300), num_labels=2),
        r"has 2 labels; a reward model has one. Train one with task: reward",
    ),
    "a language model": (
        lambda folder, _: save(folder, LlamaForCausalLM, tokenizer_of(300)),
        r"\(LlamaForCausalLM\) has 2 labels; a reward model has one. Train one with task: reward",
    ),
    "no tokenizer": (
        lambda folder, _: save(
            folder, LlamaForSequenceClassification, tokenizer_of(300), with_tokenizer=False, num_labels=1
        ),
        r"cannot load a tokenizer from .*\nGive a directory with tokenizer.json",
    ),
    "too few positions": (
        lambda folder, _: save(
            folder, LlamaForSequenceClassification, tokenizer_of(300), num_labels=1, max_position_embeddings=19
        ),
        r"has 19 positions, and a prompt with its response has up to 20 tokens: lower data.max_length or",
    ),
    "no directory": (lambda _folder, _home: None, "there is no directory .*/model$"),
    "an empty directory": (lambda folder, _: folder.mkdir(), "cannot load a config from '.*/model'"),
    "a damaged file": (
        lambda folder, _: (
            save(folder, LlamaForSequenceClassification, tokenizer_of(300), num_labels=1),
            (folder / "model.safetensors").write_bytes(b"\0" * 99),
        ),
        r"model.safetensors cannot be read; it is damaged or incomplete .*Copy it again",
    ),
    "an adapter without a head": (
        lambda folder, home: write_adapter(folder, home, task_type=None),
        "has 2 labels; a reward model has one",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_reward_model_ends_the_run_before_a_process_group_exists(
    home: Path, session: Make, tmp_path: Path, name: str
) -> None:
    make, says = REFUSED[name]
    make(tmp_path / "model", home)
    with pytest.raises(RecipeError, match=rf"(?s)^ppo\.rewards\.0\.model: .*{says}"):
        session("ppo", {"rewards": [{"model": str(tmp_path / "model")}]})
    assert PartialState._shared_state == {}


@pytest.mark.parametrize("adapter", [False, True])
def test_a_score_head_is_never_random(home: Path, session: Make, tmp_path: Path, adapter: bool) -> None:
    """A language model whose config has one label. transformers would load it with a random head."""
    base = save(tmp_path / "base", LlamaForCausalLM, AutoTokenizer.from_pretrained(home / "policy"), num_labels=1)
    if adapter:
        lora = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"])
        get_peft_model(AutoModelForCausalLM.from_pretrained(base), lora).save_pretrained(tmp_path / "adapter")
    says = "LlamaForCausalLM, which gives tokens and no scores. Train" if adapter else "has no weights for score.weight"
    model = tmp_path / ("adapter" if adapter else "base")
    with pytest.raises(RecipeError, match=rf"^ppo\.rewards\.0\.model: {model} .*{says}"):
        session("ppo", {"rewards": [{"model": str(model)}]}, start=True)


def other_tokenizer(kind: str) -> Any:
    """A tokenizer with other tokens than the policy's, which adds nothing, BOS, or both ends as BERT's does."""
    tokenizer = tokenizer_of(270)
    bos, eos = tokenizer.bos_token, tokenizer.eos_token
    around = {"bos": f"{bos} $A", "both": f"{bos} $A {eos}"}
    if kind in around:
        pairs = [(bos, tokenizer.bos_token_id), (eos, tokenizer.eos_token_id)]
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=around[kind], special_tokens=pairs)
    return tokenizer


@pytest.mark.parametrize("kind", ["plain", "bos", "both"])
def test_a_reward_model_with_another_tokenizer_scores_the_text(
    session: Make, tmp_path: Path, kind: str, home: Path
) -> None:
    """As transformers does with the text and the model's own tokenizer, row by row."""
    folder = save(tmp_path / "other", LlamaForSequenceClassification, other_tokenizer(kind), num_labels=1)
    made = session("grpo", {"rewards": [{"model": str(folder)}], "sampling": {"max_new_tokens": 8}}, start=True)
    rollout = roll_out(made)
    theirs = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    own, policys = AutoTokenizer.from_pretrained(folder), AutoTokenizer.from_pretrained(home / "policy")
    for each in rollout.trajectories:
        text = each.prompt.text + policys.decode(each.response, skip_special_tokens=True)
        ids = own(text)["input_ids"]
        if each.ended and kind != "both":
            ids = [*ids, own.eos_token_id]
        assert each.rewards["other"] == pytest.approx(score_of(theirs, ids), abs=1e-5)
    assert len({each.score for each in rollout.trajectories}) > 4


def test_a_text_that_is_too_long_for_the_other_tokenizer_is_an_error(session: Make, tmp_path: Path) -> None:
    """It has more tokens than the policy's; a network with learned positions would end with an index error."""
    folder = save(
        tmp_path / "short", LlamaForSequenceClassification, tokenizer_of(260), num_labels=1, max_position_embeddings=9
    )
    made = session(
        "ppo",
        {"rewards": [{"model": str(folder)}], "sampling": {"max_new_tokens": 2}},
        start=True,
        data={"max_length": 7},
    )
    says = r"short has 9 positions, and a prompt with its response has \d\d tokens of its tokenizer: lower data.max_len"
    with pytest.raises(RecipeError, match=rf"^ppo\.rewards\.0\.model: .*{says}"):
        roll_out(made)


ADAPTERS: dict[str, tuple[dict[str, Any], bool]] = {
    "lora": ({}, True),
    "dora": ({"use_dora": True}, True),
    "pissa": ({"init_lora_weights": "pissa"}, False),
    "olora": ({"init_lora_weights": "olora"}, False),
    "embeddings": ({"modules_to_save": ["score", "embed_tokens"]}, False),
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_that_scores_leaves_the_policy_as_it_is(
    home: Path, session: Make, tmp_path: Path, name: str
) -> None:
    """PiSSA changes the base when the adapter is added, and trained embeddings replace those of the base. Such a reward
    model is a network of its own."""
    options, shared = ADAPTERS[name]
    folder = write_adapter(tmp_path / "adapter", home, **options)
    adapt = {"adapt": {"lora": {"r": 2}}}
    made = session("ppo", {"rewards": [{"model": str(folder)}], "kl": 0.1}, start=True, model=adapt)
    assert made.frozen.roles["adapter"].shared == shared
    plain = AutoModelForCausalLM.from_pretrained(home / "policy").eval()
    base = AutoModelForSequenceClassification.from_pretrained(home / "policy", num_labels=1)
    theirs = PeftModel.from_pretrained(base, str(folder)).eval()
    for each in roll_out(made).trajectories:
        ids = [*each.prompt.ids, *each.response]
        with torch.no_grad():
            logprobs = plain(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        before = len(each.prompt.ids) - 1
        expected = [float(logprobs[before + t, token]) for t, token in enumerate(each.response)]
        assert each.tokens["logprobs"].tolist() == pytest.approx(expected, abs=1e-5)
        assert each.tokens["reference"].tolist() == pytest.approx(expected, abs=1e-5)
        assert each.rewards["adapter"] == pytest.approx(score_of(theirs, ids), abs=1e-4)


@pytest.mark.parametrize("lora", [{"init": "pissa"}, {"init": "olora"}, {"bias": "all"}], ids=str)
def test_a_policy_that_changes_the_base_does_not_share_it(
    home: Path, session: Make, tmp_path: Path, lora: dict[str, Any]
) -> None:
    folder = write_adapter(tmp_path / "adapter", home)
    adapt = {"adapt": {"lora": {"r": 2, **lora}}}
    made = session("grpo", {"rewards": [{"model": str(folder)}]}, start=True, model=adapt)
    assert not made.frozen.roles["adapter"].shared
    base = AutoModelForSequenceClassification.from_pretrained(home / "policy", num_labels=1)
    theirs = PeftModel.from_pretrained(base, str(folder)).eval()
    for each in roll_out(made).trajectories:
        assert each.rewards["adapter"] == pytest.approx(score_of(theirs, [*each.prompt.ids, *each.response]), abs=1e-4)


def test_eva_reads_the_prompts(session: Make) -> None:
    adapt = {"adapt": {"lora": {"r": 2, "init": "eva", "eva_rows": 4}}}
    made = session("ppo", {}, start=True, model=adapt)
    matrices = [p for name, p in made.trained.model.named_parameters() if "lora_A" in name]
    for matrix in matrices:  # singular vectors
        torch.testing.assert_close(matrix @ matrix.T, torch.eye(len(matrix)), atol=1e-4, rtol=0)


# --- EOS and padding --------------------------------------------------------------------------------------------------


def test_padding_with_eos_changes_nothing(home: Path, session: Make, tmp_path: Path) -> None:
    """In policy and reward model: the same responses, ends, log-probabilities and rewards as with a PAD of its own."""
    rollouts, tokenizer = {}, AutoTokenizer.from_pretrained(home / "policy")
    classes = {"policy": AutoModelForCausalLM, "judge": AutoModelForSequenceClassification}
    for pad in ("own", "eos"):
        tokenizer.pad_token = tokenizer.eos_token if pad == "eos" else tokenizer.pad_token
        for name, auto_class in classes.items():
            model = auto_class.from_pretrained(home / name)
            model.config.pad_token_id = tokenizer.pad_token_id
            for made in (model, tokenizer):
                made.save_pretrained(tmp_path / pad / name)
        policy, judge = (tmp_path / pad / name for name in classes)
        settings = {"rewards": [{"model": str(judge)}], "kl": 0.1, "sampling": {"max_new_tokens": 16}, "group_size": 6}
        paths = {"model": {"path": str(policy)}, "tokenizer": {"path": str(policy)}}
        rollouts[pad] = roll_out(session("grpo", settings, start=True, **paths)).trajectories
        reset_accelerate()
    assert {each.ended for each in rollouts["own"]} == {True, False}
    eos, theirs = tokenizer.eos_token_id, AutoModelForSequenceClassification.from_pretrained(judge).eval()
    for own, each in zip(rollouts["own"], rollouts["eos"], strict=True):
        assert own.response.tolist() == each.response.tolist()
        assert own.ended == each.ended == (each.response[-1] == eos)
        assert own.rewards["judge"] == pytest.approx(each.rewards["judge"], abs=1e-6)
        assert each.rewards["judge"] == pytest.approx(score_of(theirs, [*each.prompt.ids, *each.response]), abs=1e-5)
        for name in ("logprobs", "reference", "advantages"):
            assert own.tokens[name].tolist() == pytest.approx(each.tokens[name].tolist(), abs=1e-5)


@pytest.fixture(scope="module")
def silent(home: Path) -> Path:
    """A policy that samples EOS at once: its last layer norm gives the same state everywhere, that of EOS."""
    tokenizer = AutoTokenizer.from_pretrained(home / "policy")
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 64, "vocab_size": len(tokenizer)}
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=None, eos_token_id=tokenizer.eos_token_id))
    with torch.no_grad():
        model.transformer.ln_f.weight.zero_()
        model.transformer.ln_f.bias.fill_(1.0)
        model.transformer.wte.weight[tokenizer.eos_token_id] = 5.0
    model.save_pretrained(home / "silent")
    tokenizer.save_pretrained(home / "silent")
    return home / "silent"


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("judge", ["judge", "other"])
def test_empty_completions(home: Path, silent: Path, session: Make, tmp_path: Path, task: str, judge: str) -> None:
    """The response is EOS alone. Functions get "", reward models read the prompt with its EOS, and nothing is NaN."""
    if judge == "other":
        folder = save(tmp_path / "other", LlamaForSequenceClassification, tokenizer_of(270), num_labels=1)
    else:
        folder = home / "judge"
    rewards = [{"model": str(folder)}, {"function": "ptft_dist.rl.rewards:final_number", "name": "numbers"}]
    rows = write_rows(home / "asked.jsonl", [{"prompt": f"the cat {word}", "answer": 3} for word in WORDS])
    paths: dict[str, Any] = {"model": {"path": str(silent)}, "data": {"train": [{"path": str(rows)}]}}
    normalized = {"rewards": rewards, "normalize_rewards": True, "missing_eos_penalty": 9.0, "kl": 0.1}
    made = session(task, normalized, start=True, **paths)
    rollout = roll_out(made)
    theirs = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    own = AutoTokenizer.from_pretrained(folder)
    for each in rollout.trajectories:
        assert (each.text, each.response.tolist(), each.ended) == ("", [made.trained.tokenizer.eos_token_id], True)
        ids = [*own(each.prompt.text)["input_ids"], own.eos_token_id]
        assert each.rewards[judge] == pytest.approx(score_of(theirs, ids), abs=1e-5)
        assert each.rewards["numbers"] == 0.0
        assert abs(each.score) < 5
        assert all(len(x) == 1 and np.isfinite(x).all() for x in each.tokens.values())
    assert all(math.isfinite(value) for value in rollout.metrics.values())
    batch = made.task.collate([made.task.as_row(each) for each in rollout.trajectories], [])  # type: ignore[attr-defined]
    out = made.task.loss(made.trained.model, batch.inputs)
    out.loss_sum.backward()
    assert math.isfinite(float(out.loss_sum.detach()))
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in made.trained.model.parameters())


@pytest.mark.parametrize("task", ["dpo", "kto"])
def test_answers_need_a_tokenizer_with_an_end(home: Path, session: Make, tmp_path: Path, task: str) -> None:
    """Without EOS, a model would learn answers that do not end; the task sft refuses it too."""
    endless = AutoTokenizer.from_pretrained(home / "policy")
    endless.eos_token = None
    policy = save(tmp_path / "endless", LlamaForCausalLM, endless)
    rows = [{"prompt": f"the {word}", "chosen": " cat", "rejected": " dog"} for word in WORDS]
    paths: dict[str, Any] = {
        "model": {"path": str(policy)},
        "tokenizer": {"path": str(policy)},
        "data": {"train": [{"path": str(write_rows(tmp_path / "pairs.jsonl", rows))}]},
    }
    with pytest.raises(RecipeError, match=r"^tokenizer: it has no EOS token, .*Name one as eos_token in"):
        session(task, {}, **paths)


@pytest.mark.parametrize(
    ("peft", "says"),
    [
        ({"init_lora_weights": "pissa"}, "init_lora_weights: pissa changes the base.*Remove the option$"),
        ({"bias": "all"}, "bias: all changes the base.*Remove the option$"),
    ],
    ids=["pissa", "bias"],
)
def test_the_reference_of_dpo_is_the_base_of_an_adapter_of_peft_too(
    session: Make, tmp_path: Path, peft: dict[str, Any], says: str
) -> None:
    rows = [{"prompt": f"the {word}", "chosen": " cat", "rejected": " dog"} for word in WORDS]
    changes: dict[str, Any] = {
        "model": {"adapt": {"peft": {"type": "lora", "target_modules": ["q_proj"], **peft}}},
        "data": {"train": [{"path": str(write_rows(tmp_path / "pairs.jsonl", rows))}]},
    }
    with pytest.raises(RecipeError, match=rf"^task dpo: model\.adapt\.peft\.{says}"):
        session("dpo", {}, **changes)


# --- prompts ----------------------------------------------------------------------------------------------------------


def test_prompts_that_are_too_long_are_dropped_or_lose_their_beginning(
    home: Path, session: Make, tmp_path: Path
) -> None:
    texts = ["the cat runs", "the cat sleeps and the dog eats"]
    rows = {"train": [{"path": str(write_rows(tmp_path / "p.jsonl", [{"prompt": x} for x in texts]))}]}
    tokenizer = AutoTokenizer.from_pretrained(home / "policy")
    short, long = (tokenizer(text)["input_ids"] for text in texts)
    limit, one = len(short), {"global_size": 1, "micro_size": 1}
    assert len(long) > limit
    dropped = session("ppo", {"prompts": 1}, data={**rows, "max_length": limit}, batch=one)
    assert [dropped.store.row(i).input_ids.tolist() for i in range(len(dropped.store))] == [short]
    assert dropped.prepared.report.dropped["longer than data.max_length"].times == 1
    cut = session("ppo", {"prompts": 1, "too_long": "cut"}, data={**rows, "max_length": limit}, batch=one)
    assert [cut.store.row(i).input_ids.tolist() for i in range(2)] == [short, long[-limit:]]
    with pytest.raises(
        DataError, match=r"train: 2 rows were read; 2 longer than data.max_length. Raise data.max_length"
    ):
        session("ppo", {}, data={**rows, "max_length": limit - 1})


def test_columns_that_are_not_json_are_left_out_and_counted(session: Make, tmp_path: Path) -> None:
    """Their values could not be stored beside the prompt. Those of rows where they are null stay."""
    rows = [
        {"prompt": "the cat", "answer": "3", "day": datetime.date(2024, 1, day), "parts": [{"price": Decimal(day)}]}
        for day in (1, 2, 3)
    ]
    rows.append({"prompt": "the dog", "answer": "4", "day": None, "parts": None})
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "p.parquet")
    one = {"global_size": 1, "micro_size": 1}
    found = session("ppo", {"prompts": 1}, data={"train": [{"path": str(tmp_path / "p.parquet")}]}, batch=one)
    columns = [found.store.row(i).meta["columns"] for i in range(4)]
    assert columns == [{"answer": "3"}] * 3 + [{"answer": "4", "day": None, "parts": None}]
    notes = found.prepared.report.notes
    assert [entry.times for entry in notes.values()] == [3, 3]
    day, parts = notes
    assert day == (
        "without the column 'day' for reward functions (Object of type date is not JSON serializable; "
        "convert it to text)"
    )
    assert "'parts'" in parts
    assert "type Decimal" in parts


def test_columns_with_the_names_of_arguments_are_left_out_and_counted(session: Make, tmp_path: Path) -> None:
    """A function cannot get two arguments of one name."""
    rows = [{"prompt": "the cat", "answer": "3", "completions": ["a", "b"], "completion_ids": [1]}] * 4
    write_rows(tmp_path / "p.jsonl", rows)
    found = session("ppo", {}, data={"train": [{"path": str(tmp_path / "p.jsonl")}]}, start=True)
    assert found.store.row(0).meta["columns"] == {"answer": "3"}
    assert list(found.prepared.report.notes) == [
        f"without the column '{name}' for reward functions (an argument of theirs has this name; rename it)"
        for name in ("completions", "completion_ids")
    ]


def test_half_a_surrogate_pair_in_a_column_is_kept(session: Make, tmp_path: Path) -> None:
    write_rows(tmp_path / "p.jsonl", [{"prompt": "the cat", "note": "a \ud83d"}])
    one = {"global_size": 1, "micro_size": 1}
    found = session("ppo", {"prompts": 1}, data={"train": [{"path": str(tmp_path / "p.jsonl")}]}, batch=one)
    assert found.store.row(0).meta["columns"] == {"note": "a \ud83d"}


PROMPTS: dict[str, tuple[dict[str, Any], str]] = {
    "no column": ({"text": "a"}, "there is no field 'prompt'; the fields are: 'text'. Map one of them"),
    "an empty text": ({"prompt": " "}, "the field 'prompt' is empty. Fill it in, or remove the row"),
    "null": ({"prompt": None}, "the field 'prompt' is null"),
    "a number": ({"prompt": 3}, "the field 'prompt' is a number and not text"),
    "no message": ({"messages": []}, "the prompt has no message of a user to respond to. Correct or remove the row"),
    "an answer alone": ({"messages": [{"role": "assistant", "content": "a"}]}, "the prompt has no message of a user"),
    "a system message alone": ({"prompt": [{"role": "system", "content": "a"}]}, "the prompt has no message of a user"),
    "an empty message": ({"prompt": [{"role": "user", "content": ""}]}, r"message 1 (user) is empty. Fill it in"),
    "an unknown role": ({"prompt": [{"role": "bot", "content": "a"}]}, "message 1 has the role 'bot'; known roles are"),
    "a special token": (
        {"prompt": "a <|endoftext|>"},
        "the text contains the special token '<|endoftext|>'. Remove it",
    ),
}


@pytest.mark.parametrize("name", PROMPTS)
def test_a_broken_prompt_is_named_by_file_and_line(session: Make, tmp_path: Path, name: str) -> None:
    row, says = PROMPTS[name]
    rows = write_rows(tmp_path / "prompts.jsonl", [{"prompt": "the cat"}, row])
    with pytest.raises(DataError) as refused:
        session("ppo", {"template": "chatml"}, data={"train": [{"path": str(rows)}]}, tokenizer={"add": CONTROL})
    assert f"prompts.jsonl:2: {says}" in str(refused.value).replace("prompt: the text", "the text")


def test_conversations_need_a_chat_template(session: Make, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "prompts.jsonl", [{"prompt": [{"role": "user", "content": "the cat"}]}] * 4)
    with pytest.raises(RecipeError, match=r"rloo\.template: this tokenizer has no chat template, and rows with turns"):
        session("rloo", {}, data={"train": [{"path": str(rows)}]})


def test_too_few_prompts_for_a_rollout(session: Make) -> None:
    made = session("ppo", {"prompts": 100})
    with pytest.raises(DataError, match=r"ppo\.prompts: a rollout needs 100 prompts, the training data have 28. Lower"):
        made.plan  # noqa: B018


def test_virtual_tokens_must_leave_positions_for_prompt_and_response(session: Make, silent: Path) -> None:
    """64 positions; prompt and response have up to 20 tokens."""

    def start(tokens: int) -> None:
        model = {"path": str(silent), "adapt": {"prompt_tuning": {"tokens": tokens}}}
        session("ppo", {}, start=True, model=model)
        reset_accelerate()

    start(44)
    says = "have up to 20 tokens, more than the 19 positions of the model with its adapter: lower one of them"
    with pytest.raises(RecipeError, match=rf"^ppo\.sampling\.max_new_tokens: .* {says}"):
        start(45)


# --- groups, weights and names ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["grpo", "rloo"])
def test_equal_rewards_teach_nothing(session: Make, task: str) -> None:
    made = session(task, {"rewards": [{"function": "functions:constant"}], "normalize_rewards": True}, start=True)
    for phase in range(2):
        rollout = roll_out(made, phase)
        assert all((each.tokens["advantages"] == 0).all() for each in rollout.trajectories)
        assert rollout.metrics["groups_without_spread"] == 1
        assert rollout.metrics["score"] == 0
    batch = made.task.collate([made.task.as_row(each) for each in rollout.trajectories], [])  # type: ignore[attr-defined]
    made.task.loss(made.trained.model, batch.inputs).loss_sum.backward()
    assert all(p.grad is None or not p.grad.any() for p in made.trained.model.parameters())


def test_equal_rewards_have_no_deviation_to_divide_by() -> None:
    """0.1 has no exact fp32 value; the difference from the mean must not be divided by its rounding error."""
    moments, ones = RunningMoments(), np.ones(7)
    for count in (3, 7, 5):
        found = shaped(np.full(count, 0.1, np.float32), ones[:count], ones[:count] > 0, moments=moments)
        assert found.tolist() == [0.0] * count


@pytest.mark.parametrize(
    ("task", "settings", "says"),
    [
        ("grpo", {"group_size": 1}, r"grpo\.group_size: expected a whole number of at least 2, got 1"),
        ("rloo", {"group_size": 1}, r"rloo\.group_size: expected a whole number of at least 2, got 1"),
        (
            "ppo",
            {"rewards": [{"function": "functions:length"}] * 2},
            r"ppo\.rewards: several have the name 'length'; set their `name`",
        ),
        (
            "ppo",
            {"rewards": [{"function": "functions:length", "weight": 0}, {"model": "judge", "weight": 0}]},
            r"ppo\.rewards: all weights are 0, so nothing would be learned; give one source another weight",
        ),
        (
            "ppo",
            {"rewards": [{"model": "runs/reference/model"}]},
            r"ppo\.rewards: the name 'reference' means the network of `kl`; give this model another `name`",
        ),
        ("ppo", {"rewards": [{"function": "functions:length", "weight": math.nan}]}, r"rewards\.0\.weight: expected"),
        ("ppo", {"rewards": [{"function": "functions:length", "model": "judge"}]}, r"rewards\.0: exactly one of model"),
        ("ppo", {"rewards": []}, r"ppo\.rewards: required: name a reward model or a function, such as"),
    ],
    ids=["a group of one", "a group of one", "twice", "no weight", "reference", "nan", "two kinds", "none"],
)
def test_settings_that_cannot_work_are_named(session: Make, task: str, settings: dict[str, Any], says: str) -> None:
    with pytest.raises(RecipeError, match=rf"recipe\.yaml:\d+: .*{says}"):
        session(task, settings)


def test_weights_may_be_zero_or_negative_and_a_source_be_used_twice(session: Make) -> None:
    """-2 times the length in all; the source of weight 0 is shown only."""
    source = {"function": "functions:length"}
    weighted = [{**source, "name": name, "weight": weight} for name, weight in (("a", 1), ("b", -3), ("c", 0))]
    rollout = roll_out(session("ppo", {"rewards": weighted}, start=True))
    for each in rollout.trajectories:
        assert each.rewards == dict.fromkeys("abc", len(each.text) / 10)
        assert each.score == pytest.approx(-2 * len(each.text) / 10)
    assert rollout.metrics["reward/c"] == rollout.metrics["reward/a"] == pytest.approx(rollout.metrics["reward"] / -2)


# --- functions that change --------------------------------------------------------------------------------------------


def test_a_changed_reward_function_is_not_resumed_in_silence(tmp_path: Path, cache: Path) -> None:
    """Its file belongs to the identity of the run; a module that is installed does not."""
    write_tiny(tmp_path, "grpo", train={"max_steps": 4}, save={"every": 2}, eval={"every": None})
    first = start("train", "recipe.yaml", cwd=tmp_path, cache=cache)
    assert first.wait() == 0, first.stderr
    file = tmp_path / "rewarding.py"
    file.write_text(file.read_text() + "# another version\n")
    words = ["train", "recipe.yaml", "train.max_steps=8", "--accept", "train.max_steps"]
    again = start(*words, cwd=tmp_path, cache=cache)
    assert again.wait() == 4
    assert "grpo.rewards.0.function.file: " in again.stderr
    accepted = start(*words, "--accept", "grpo.rewards.0.function.file", cwd=tmp_path, cache=cache)
    assert accepted.wait() == 0, accepted.stderr
