"""Reward modelling: the loss is TRL's, the score is read at the last token, and the exported model scores the same."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from support import merge, start
from task_support import for_model, make_task
from tiny import BERT, LLAMA, T5, WORDS, made, preferred, write_rows, write_tiny
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)

import ptft_dist
from ptft_dist.config.recipe import Recipe
from ptft_dist.config.resolve import batch_shape
from ptft_dist.config.tokenizer_section import TokenizerTraining
from ptft_dist.data.encoder import EncoderContext
from ptft_dist.data.formats import Record
from ptft_dist.data.prepare import prepare
from ptft_dist.data.store import Row
from ptft_dist.data.tokenizer import train_tokenizer
from ptft_dist.errors import CheckpointError, DataError, RecipeError
from ptft_dist.networks.load import build_config, build_model
from ptft_dist.tasks.common.chat_template import CHATML
from ptft_dist.tasks.common.dropout import turn_off_dropout
from ptft_dist.tasks.common.last_token import LastToken, last_positions, padding_token
from ptft_dist.tasks.common.scores.preferences import calibration_error, preference_scores
from ptft_dist.tasks.registry import encoder_class, recipe_class
from ptft_dist.tasks.reward.encode import RewardRows
from ptft_dist.training.batches import mask_all

GPT2 = {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}
CTRL = {"model_type": "ctrl", "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64, "dff": 64}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    texts = [" ".join(WORDS), "user assistant system tool it sleeps and the a"] * 9
    trained = train_tokenizer(
        TokenizerTraining(vocab_size=320), texts, ("eos=<|im_end|>", "bos", "pad"), ["<|im_start|>"]
    )
    trained.chat_template = CHATML
    return trained


def recipe(config: dict[str, Any] = LLAMA, **settings: Any) -> Recipe:
    return recipe_class().model_validate(
        {
            "task": "reward",
            "model": {"config": config},
            "tokenizer": {"path": "none"},
            "data": {"train": [{"path": "none"}], "max_length": 64},
            "reward": settings,
            "batch": {"global_size": 2, "micro_size": 2},
            "train": {"max_steps": 1, "precision": "fp32"},
            "run_dir": "run",
        }
    )


def network(task: Any, tokenizer: Any, settings: Recipe) -> Any:
    config = build_config(settings.model, tokenizer, settings.data.max_length, type(task).config_settings(task.setup))
    return build_model(settings.model, config, 0, AutoModelForSequenceClassification).eval()


def task_and_network(tokenizer: Any, config: dict[str, Any] = LLAMA, survey: Any = None, **settings: Any) -> Any:
    chosen = recipe(config, **settings)
    task = make_task(chosen, tokenizer, survey)
    model = network(task, tokenizer, chosen)
    return for_model(task, model), model


def rows_of(tokenizer: Any, values: list[dict[str, Any]], **settings: Any) -> list[Row]:
    encoder = RewardRows(EncoderContext(recipe(**settings).settings, "reward", tokenizer, 64, 0))
    outcomes = encoder.outcomes([Record(row, f"rows.jsonl:{i}") for i, row in enumerate(values, 1)])
    return [
        Row(
            outcome.examples[0].columns["input_ids"].astype(np.int64),
            np.zeros(1, np.int64),
            {name: outcome.examples[0].columns[name] for name in ("parts", "margin")},
        )
        for outcome in outcomes
    ]


# --- the loss, compared with TRL's ------------------------------------------------------------------------------------


def trl_trainer(tokenizer: Any, model: Any, rows: list[dict[str, Any]], folder: Path, **settings: Any) -> Any:
    from datasets import Dataset
    from trl import RewardConfig, RewardTrainer

    config = RewardConfig(
        output_dir=str(folder),
        use_cpu=True,
        bf16=False,
        report_to=[],
        max_length=64,
        per_device_train_batch_size=len(rows),
        gradient_checkpointing=False,
        **settings,
    )
    return RewardTrainer(model=model, args=config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)


MARGINS = [{**row, "margin": 0.3 * i} for i, row in enumerate(made(4, preferred))]
PLAIN = [
    {"prompt": f"a {w}", "chosen": " cat" * (i + 1) + " sleeps", "rejected": f" dog {w}"}
    for i, w in enumerate(WORDS[:4])
]
TRL_CASES: dict[str, tuple[dict[str, Any], list[dict[str, Any]], dict[str, Any]]] = {
    "conversations with margins": (LLAMA, MARGINS, {}),
    "centring": (LLAMA, MARGINS, {"center_rewards_coefficient": 0.3}),
    "plain texts": (GPT2, PLAIN, {}),
    "an encoder": (BERT, MARGINS, {"center_rewards_coefficient": 0.01}),
}


@pytest.mark.parametrize("name", TRL_CASES)
def test_the_loss_and_metrics_are_trl_s(tokenizer: Any, tmp_path: Path, name: str) -> None:
    config, values, settings = TRL_CASES[name]
    task, model = task_and_network(copy.deepcopy(tokenizer), config, **settings)
    batch = task.collate(rows_of(tokenizer, values))
    trainer = trl_trainer(copy.deepcopy(tokenizer), model, values, tmp_path, **settings)
    inputs = trainer.data_collator(list(trainer.train_dataset))
    assert torch.equal(batch.inputs["input_ids"], inputs["input_ids"])
    task.last_token.mask = None  # TRL gets transformers' own position
    with torch.no_grad():
        theirs = trainer.compute_loss(model.eval(), inputs)
        out = task.loss(model, batch.inputs)
    assert batch.count == len(values)
    assert (out.loss_sum / batch.count).item() == pytest.approx(theirs.item(), rel=1e-5)
    metrics = trainer._metrics["eval"]
    for ours, their in (("accuracy", "accuracy"), ("margin", "margin"), ("reward", "mean_reward")):
        total, count = out.metrics[ours]
        assert (total / count).item() == pytest.approx(metrics[their][0], rel=1e-5), ours


def test_a_dummy_batch_and_missing_margins_add_nothing(tokenizer: Any) -> None:
    task, model = task_and_network(tokenizer, center_rewards_coefficient=0.1)
    rows = rows_of(tokenizer, PLAIN)
    batch = task.collate(rows)
    assert batch.inputs["targets_margin"].tolist() == [0.0] * 4
    assert batch.tokens == sum(len(row.input_ids) for row in rows)
    out = task.loss(model, mask_all(batch.inputs))
    assert out.loss_sum.item() == 0
    assert all(total.item() == 0 == count.item() for total, count in out.metrics.values())
    out.loss_sum.backward()
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


# --- where the score is read ------------------------------------------------------------------------------------------


def by_hand(model: Any, ids: list[int]) -> float:
    """The head on the last hidden state of an unpadded text."""
    hidden = model.base_model(torch.tensor([ids])).last_hidden_state[0, -1]
    head = model.score if hasattr(model, "score") else model.classifier
    return float(head.weight[0] @ hidden + (0 if head.bias is None else head.bias[0]))


@pytest.mark.parametrize("pad", ["own", "eos", "none"])
@pytest.mark.parametrize("config", [LLAMA, GPT2, CTRL], ids=lambda config: config["model_type"])
def test_the_score_is_that_of_the_last_token_whatever_pad_is(tokenizer: Any, config: Any, pad: str) -> None:
    tokenizer = copy.deepcopy(tokenizer)
    if pad != "own":
        tokenizer.pad_token = tokenizer.eos_token if pad == "eos" else None
    rows = rows_of(tokenizer, PLAIN)  # the texts end with EOS
    assert all(row.input_ids[-1] == tokenizer.eos_token_id for row in rows)
    task, model = task_and_network(tokenizer, config, {"last_tokens": [tokenizer.eos_token_id]})
    if pad != "own":  # EOS would be skipped by transformers, so another token is PAD now
        assert tokenizer.pad_token == tokenizer.bos_token
    assert model.config.pad_token_id == tokenizer.pad_token_id
    texts = [row.input_ids[: row.columns["parts"][1]].tolist() for row in rows]
    texts += [row.input_ids[row.columns["parts"][1] :].tolist() for row in rows]
    assert len({len(ids) for ids in texts}) > 1
    batch = task.collate(rows)
    with torch.no_grad():
        task.last_token.mask = None
        expected = [by_hand(model, ids) for ids in texts]
        rewards = task.logits(model, batch.inputs)[:, 0].tolist()
        assert rewards == pytest.approx(expected, abs=1e-6)
        task.last_token.mask = None  # transformers' own position, also with padding
        inputs = {name: x for name, x in batch.inputs.items() if not name.startswith("targets")}
        assert model(**inputs).logits[:, 0].tolist() == pytest.approx(expected, abs=1e-6)
        assert [model(torch.tensor([ids])).logits.item() for ids in texts] == pytest.approx(expected, abs=1e-6)


def test_the_mask_decides_and_not_the_token_in_the_padding(tokenizer: Any) -> None:
    """PAD = EOS = the last token of every text, on either side."""
    task, model = task_and_network(tokenizer)
    texts = [row.input_ids.tolist() for row in rows_of(tokenizer, PLAIN)]
    longest, eos = max(map(len, texts)), tokenizer.eos_token_id
    model.config.pad_token_id = eos
    with torch.no_grad():
        expected = [by_hand(model, ids) for ids in texts]
        for left in (False, True):
            padded, masks = [], []
            for ids in texts:
                fill = longest - len(ids)
                padded.append([eos] * fill + ids if left else ids + [eos] * fill)
                masks.append([0] * fill + [1] * len(ids) if left else [1] * len(ids) + [0] * fill)
            mask = torch.tensor(masks)
            inputs = {"input_ids": torch.tensor(padded), "attention_mask": mask}
            if left:
                inputs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
            rewards = task.logits(model, inputs)[:, 0].tolist()
            assert rewards == pytest.approx(expected, abs=1e-5)


def test_last_positions() -> None:
    mask = torch.tensor([[1, 1, 0, 0], [0, 0, 1, 1], [1, 1, 1, 1], [0, 1, 1, 0]])
    assert last_positions(mask).tolist() == [1, 3, 3, 2]
    assert last_positions(mask.bool()).tolist() == [1, 3, 3, 2]


def test_a_copy_of_the_head_reads_the_same_mask(tokenizer: Any) -> None:
    _, model = task_and_network(tokenizer)
    hook = LastToken.of(model)
    head = copy.deepcopy(model.score)
    hook.mask = torch.tensor([[1, 1, 0]])
    hidden = torch.randn(1, 3, 32)
    expected = (hidden[0, 1] @ head.weight[0]).item()
    assert head(hidden).flatten().tolist() == pytest.approx([expected] * 3)


def test_the_padding_token_ends_no_text(tokenizer: Any) -> None:
    tokenizer = copy.deepcopy(tokenizer)
    own, eos, bos = tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id
    assert padding_token(tokenizer, []) == own
    assert padding_token(tokenizer, [own]) == eos
    assert padding_token(tokenizer, [own, eos]) == bos
    assert (
        padding_token(tokenizer, [*tokenizer.all_special_ids, tokenizer.convert_tokens_to_ids("<|im_start|>")]) is None
    )
    tokenizer.pad_token = None
    assert padding_token(tokenizer, []) == eos
    with pytest.raises(RecipeError, match=r'Add one: tokenizer\.add: \["<\|pad\|>"\]'):
        make_task(recipe(), tokenizer, {"last_tokens": range(len(tokenizer))})


def test_the_special_tokens_that_end_training_texts_are_counted(tokenizer: Any) -> None:
    encoder = RewardRows(EncoderContext(recipe().settings, "reward", tokenizer, 64, 0))
    for values in (MARGINS[0], PLAIN[0], PLAIN[1]):  # a conversation ends with a line break
        (outcome,) = encoder.outcomes([Record(values, "rows.jsonl:1")])
        encoder.count(outcome.examples[0])
    assert encoder.survey["last_tokens"] == [tokenizer.eos_token_id]


def test_an_encoder_decoder_is_refused(tmp_path: Path, cache: Path) -> None:
    write_tiny(tmp_path, "reward", model={"config": None})
    values = json.loads((tmp_path / "recipe.yaml").read_text())
    values["model"] = {"config": T5}
    (tmp_path / "recipe.yaml").write_text(json.dumps(values))
    run = start("train", "recipe.yaml", cwd=tmp_path, cache=cache)
    assert run.wait() == 2
    assert "t5 is an encoder-decoder. A reward model needs a decoder" in run.stderr


# --- dropout ----------------------------------------------------------------------------------------------------------


def test_dropout_is_off_unless_the_recipe_keeps_it(tokenizer: Any) -> None:
    for config in (
        {**LLAMA, "attention_dropout": 0.5},
        {**GPT2, "resid_pdrop": 0.5, "attn_pdrop": 0.5, "embd_pdrop": 0.5},
    ):
        for kept in (False, True):
            task, model = task_and_network(tokenizer, config, dropout=kept)
            batch = task.collate(rows_of(tokenizer, PLAIN))
            model.train()
            with torch.no_grad():
                one, other = (task.logits(model, batch.inputs) for _ in range(2))
            assert torch.equal(one, other) != kept
            assert 0.5 in model.config.to_dict().values()  # the exported config keeps its values


def test_dropout_modules_are_turned_off() -> None:
    module = torch.nn.Sequential(torch.nn.Dropout(0.3), torch.nn.Sequential(torch.nn.Dropout1d(0.2)))
    turn_off_dropout(module)
    assert module[0].p == module[1][0].p == 0


# --- metrics ----------------------------------------------------------------------------------------------------------


def test_scores_of_four_pairs_by_hand() -> None:
    rewards = np.array([[2.0, 0.0], [1.0, 1.0], [0.0, 1.0], [3.0, -1.0]])
    lengths = np.array([[5, 3], [4, 4], [2, 6], [7, 1]])
    scores = preference_scores(rewards, lengths)
    assert scores["accuracy"] == 0.5  # a tie is wrong
    assert scores["margin"] == (2 + 0 - 1 + 4) / 4
    assert scores["accuracy_longer"] == (1 + 0.5 + 0 + 1) / 4
    assert scores["accuracy_shorter"] == (0 + 0.5 + 1 + 0) / 4
    p = [1 / (1 + math.exp(-d)) for d in (2, 0, -1, 4)]
    assert scores["brier"] == pytest.approx(sum((1 - each) ** 2 for each in p) / 4)
    # Confidences .88, .5, .73, .98 are in four bins of width 0.05.
    assert scores["ece"] == pytest.approx(((1 - p[0]) + 0.5 + (1 - p[2]) + (1 - p[3])) / 4)
    assert scores["chosen_mean"] == 1.5
    assert scores["chosen_std"] == pytest.approx(math.sqrt((0.25 + 0.25 + 2.25 + 2.25) / 4))
    assert scores["reward_p50"] == 1.0
    assert set(scores) | {"loss"} == set(recipe().settings.metric_names)


def test_calibration_of_bins_with_several_pairs() -> None:
    """Ten pairs of confidence 0.8, of which 8 are right, are calibrated; with 5 right, the error is 0.3."""
    assert calibration_error(np.array([0.8] * 8 + [0.2] * 2)) == pytest.approx(0)
    assert calibration_error(np.array([0.8] * 5 + [0.2] * 5)) == pytest.approx(0.3)


def test_large_rewards_do_not_overflow() -> None:
    with np.errstate(all="raise"):
        assert preference_scores(np.array([[1e4, -1e4], [-1e4, 1e4]]), np.ones((2, 2)))["brier"] == 0.5


# --- runs, exported models and `ptft score` ---------------------------------------------------------------------------


def train(folder: Path, cache: Path, rows: list[dict[str, Any]] | None = None, **changes: Any) -> Path:
    short = {"train": {"max_steps": 4}, "eval": {"every": None}, "save": {"every": None}}
    write_tiny(folder, "reward", **merge(short, changes))
    if rows is not None:
        write_rows(folder / "rows.jsonl", rows)
    run = start("train", "recipe.yaml", cwd=folder, cache=cache)
    assert run.wait() == 0, run.stderr
    return folder / "run"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    return train(tmp_path_factory.mktemp("trained"), cache, model={"config": {"max_position_embeddings": 128}})


def plain_scores(model: Any, tokenizer: Any, conversations: list[list[dict[str, str]]]) -> list[float]:
    """The scores by plain transformers, one text at a time."""
    scores = []
    with torch.no_grad():
        for messages in conversations:
            encoded = tokenizer.apply_chat_template(messages, return_tensors="pt", return_dict=True)
            scores.append(model(input_ids=encoded["input_ids"]).logits.item())
    return scores


def test_an_exported_model_scores_the_same_in_transformers(trained: Path, tmp_path: Path) -> None:
    rows = made(12, preferred)
    file = write_rows(tmp_path / "pairs.jsonl", rows)
    summary = ptft_dist.score(trained, file, tmp_path / "out/scores.jsonl", batch_tokens=64)
    scored = [json.loads(line) for line in (tmp_path / "out/scores.jsonl").read_text().splitlines()]
    model = AutoModelForSequenceClassification.from_pretrained(trained / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(trained / "model")
    for side in ("chosen", "rejected"):
        expected = plain_scores(model, tokenizer, [row["prompt"] + row[side] for row in rows])
        assert [row[f"score_{side}"] for row in scored] == pytest.approx(expected, abs=1e-5)
    assert [{key: row[key] for key in old} for row, old in zip(scored, rows, strict=True)] == rows
    assert summary["pairs"] == summary["rows"] == 12
    assert summary["accuracy"] == np.mean([row["score_chosen"] > row["score_rejected"] for row in scored])
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["scores.jsonl"]


def test_texts_and_conversations_are_scored_as_sides_of_pairs(trained: Path, tmp_path: Path) -> None:
    pair = made(1, preferred)[0]
    messages = pair["prompt"] + pair["chosen"]
    texts = ["\n\nHuman: a\n\nAssistant: cat", "a cat sleeps " * 60]
    rows = [
        pair,
        {"messages": messages},
        {"prompt": pair["prompt"], "completion": pair["chosen"]},
        {"conversations": [{"from": m["role"], "value": m["content"]} for m in messages]},
        {"prompt": "a ", "completion": "cat"},
        {"prompt": "a ", "chosen": "cat", "rejected": "dog"},
        {"text": texts[0]},
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "cat"}]},
        {"text": texts[1]},
    ]
    summary = ptft_dist.score(trained, write_rows(tmp_path / "rows.jsonl", rows), tmp_path / "scores.jsonl")
    scored = [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text().splitlines()]
    assert [row["score"] for row in scored[1:4]] == pytest.approx([scored[0]["score_chosen"]] * 3, abs=1e-6)
    assert scored[4]["score"] == pytest.approx(scored[5]["score_chosen"], abs=1e-6)
    assert scored[6]["score"] == pytest.approx(scored[7]["score"], abs=1e-6)
    assert scored[8]["truncated"] is True  # longer than the network has positions for
    assert summary["truncated"] == 1
    assert summary["pairs"] == 2


def test_scoring_replaces_neither_columns_nor_the_file(trained: Path, tmp_path: Path) -> None:
    """UltraFeedback has scores of its own."""
    rows = [{**row, "score_chosen": 8.5} for row in made(2, preferred)]
    file = write_rows(tmp_path / "rows.jsonl", rows)
    with pytest.raises(DataError, match=r"rows\.jsonl:1: .*field 'score_chosen' already.*\n.*rows\.jsonl:2: "):
        ptft_dist.score(trained, file, tmp_path / "scores.jsonl")
    file = write_rows(tmp_path / "rows.jsonl", made(2, preferred))
    with pytest.raises(RecipeError, match=r"rows\.jsonl: this is the file with the rows"):
        ptft_dist.score(trained, file, file)
    with pytest.raises(RecipeError, match="this is a directory"):  # before the work
        ptft_dist.score(trained, file, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


def test_a_model_is_scored_in_the_shape_of_its_training(
    tmp_path: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "ptft")
    rows = [{"prompt": f"a  {w}", "chosen": f"cat {w}", "rejected": f"dog {w}"} for w in WORDS] * 3
    settings = {"shape": "single_turn", "system": "be kind"}
    data = {"max_length": 64, "validation": None, "steps": [{"whitespace": {}}]}
    train(tmp_path, cache, rows, reward=settings, data=data)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run/model").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run/model")
    ptft_dist.score(tmp_path / "run", tmp_path / "rows.jsonl", tmp_path / "scores.jsonl")
    assert "data.steps (whitespace) changed; here, rows are scored as they are" in caplog.text
    scored = [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text().splitlines()]
    system = {"role": "system", "content": "be kind"}
    said = [
        [system, {"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["chosen"]}]
        for row in rows
    ]
    assert [row["score_chosen"] for row in scored] == pytest.approx(plain_scores(model, tokenizer, said), abs=1e-5)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """A causal language model, whose PAD is EOS."""
    folder = tmp_path_factory.mktemp("base") / "model"
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.pad_token = tokenizer.eos_token
    settings = recipe({**LLAMA, "max_position_embeddings": 128})
    config = build_config(settings.model, tokenizer, 64)
    build_model(settings.model, config, 0, AutoModelForCausalLM).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


PEFT = {"lora": {"r": 2}, "prompt_tuning": {"tokens": 4}, "prefix_tuning": {"tokens": 3}, "ia3": {}}


@pytest.mark.parametrize("method", PEFT)
def test_an_adapter_of_a_causal_model_has_its_head(tmp_path: Path, cache: Path, base: Path, method: str) -> None:
    """Plain texts that end with EOS, where PAD is EOS; loaded by peft and transformers only."""
    from peft import PeftModel

    rows = [{"prompt": f"a {w}", "chosen": f" cat {w} sleeps", "rejected": f" dog {w}"} for w in WORDS] * 3
    write_tiny(
        tmp_path, "reward", train={"max_steps": 2}, eval={"every": 2}, save={"every": None}, data={"validation": 0.5}
    )
    values = json.loads((tmp_path / "recipe.yaml").read_text())
    values["model"] = {"path": str(base), "adapt": {method: PEFT[method]}}
    values["tokenizer"] = {"path": str(base)}
    (tmp_path / "recipe.yaml").write_text(json.dumps(values))
    write_rows(tmp_path / "rows.jsonl", rows)
    run = start("train", "recipe.yaml", cwd=tmp_path, cache=cache)
    assert run.wait() == 0, run.stderr

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run/model")
    assert tokenizer.pad_token == tokenizer.bos_token
    plain = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, pad_token_id=tokenizer.pad_token_id)
    model = PeftModel.from_pretrained(plain, str(tmp_path / "run/model")).eval()
    expected = []
    with torch.no_grad():
        for row in rows:
            ids = tokenizer(row["prompt"] + row["chosen"] + tokenizer.eos_token, return_tensors="pt").input_ids
            expected.append(model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.item())
    assert len(set(expected)) > 10
    ptft_dist.score(tmp_path / "run", tmp_path / "rows.jsonl", tmp_path / "scores.jsonl")
    scored = [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text().splitlines()]
    assert [row["score_chosen"] for row in scored] == pytest.approx(expected, abs=1e-5)
    card = (tmp_path / "run/model/README.md").read_text()
    used: dict[str, Any] = {}
    exec(card.split("```python")[1].split("```")[0].replace("DIRECTORY", str(tmp_path / "run/model")), used)
    assert used["model"].config.num_labels == 1


# --- broken inputs ----------------------------------------------------------------------------------------------------


def test_bad_pairs_are_named_by_file_and_line(tmp_path: Path) -> None:
    path = write_tiny(tmp_path, "reward")
    rows = made(40, preferred)
    rows[3]["rejected"] = rows[3]["chosen"]
    rows[7]["chosen"] = [{"role": "assistant", "content": " "}]
    rows[9] = {"prompt": rows[9]["prompt"], "chosen": rows[9]["chosen"]}
    rows[11]["chosen"] = [{"role": "assistant", "content": "yes<|im_end|>"}]
    write_rows(tmp_path / "rows.jsonl", rows)
    values = json.loads(path.read_text())
    values["data"] |= {"cache_dir": str(tmp_path / "cache")}
    recipe_ = recipe_class().model_validate(values)
    with pytest.raises(DataError) as refused:
        prepare(recipe_, tmp_path, encoder_class("reward"))
    for part in (
        "rows.jsonl:4: chosen and rejected are identical",
        "rows.jsonl:8: chosen: message 1 (assistant) is empty",
        "rows.jsonl:10: there is no field 'rejected'",
    ):
        assert part in str(refused.value)
    values["data"]["bad_rows"] = "skip"
    report = prepare(recipe_class().model_validate(values), tmp_path, encoder_class("reward")).report
    assert report.bad_rows.count == 4
    assert any("rows.jsonl:12: chosen: message 2.content: the text contains" in at for at in report.bad_rows.first)


def test_score_names_bad_rows_and_leaves_the_old_file(trained: Path, tmp_path: Path) -> None:
    rows = made(3, preferred)
    rows[1]["rejected"] = [{"role": "assistant", "content": ""}]
    rows.append({"question": "a"})
    file, out = write_rows(tmp_path / "pairs.jsonl", rows), tmp_path / "scores.jsonl"
    out.write_text("old")
    with pytest.raises(DataError) as refused:
        ptft_dist.score(trained, file, out)
    assert "pairs.jsonl:2: rejected: message 1 (assistant) is empty" in str(refused.value)
    assert "pairs.jsonl:4: the fields ('question') are no pair" in str(refused.value)
    assert out.read_text() == "old"


def test_score_refuses_other_networks_and_files(trained: Path, base: Path, tmp_path: Path) -> None:
    file = write_rows(tmp_path / "pairs.jsonl", made(2, preferred))
    with pytest.raises(CheckpointError, match="LlamaForCausalLM does not score texts"):
        ptft_dist.score(base, file, tmp_path / "scores.jsonl")
    two = AutoModelForSequenceClassification.from_pretrained(base, num_labels=2)
    two.save_pretrained(tmp_path / "two")
    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "two")
    with pytest.raises(CheckpointError, match="a classifier of 2 labels does not score texts"):
        ptft_dist.score(tmp_path / "two", file, tmp_path / "scores.jsonl")
    with pytest.raises(DataError, match="does not exist"):
        ptft_dist.score(trained, tmp_path / "no.jsonl", tmp_path / "scores.jsonl")
    with pytest.raises(RecipeError, match="shape: 'pairs' is none of auto"):
        ptft_dist.score(trained, file, tmp_path / "scores.jsonl", shape="pairs")


def test_the_command_prints_a_summary(trained: Path, tmp_path: Path, cache: Path) -> None:
    write_rows(tmp_path / "pairs.jsonl", made(4, preferred))
    run = start("score", str(trained), "--file", "pairs.jsonl", "--out", "scores.jsonl", cwd=tmp_path, cache=cache)
    assert run.wait() == 0, run.stderr
    assert "accuracy" in run.stdout
    assert "scores in scores.jsonl" in run.stdout
    assert len((tmp_path / "scores.jsonl").read_text().splitlines()) == 4


def test_a_row_of_a_micro_batch_has_two_texts() -> None:
    values = recipe().model_dump(exclude_unset=True) | {"batch": {"global_size": 4, "micro_tokens": 300}}
    settings = recipe_class().model_validate(values)
    shape = batch_shape(settings, 1)
    assert settings.longest_row == 128  # two texts of 64 tokens
    assert shape.largest_micro_batch(settings.longest_row) == 2
    assert shape.accumulation == 2
    values["batch"]["micro_tokens"] = 127
    with pytest.raises(ValidationError, match=r"127 is less than one row \(data\.max_length: 64, 2 texts\)"):
        recipe_class().model_validate(values)
