"""The loss of every task's first update against transformers' own forward pass with labels, or a plain loop.

The learning rate is so small that the exported network has the weights that the first update began with. Rows are read
from the JSONL file here, tokenized by the exported tokenizer and given to the network one by one, unpadded. Where
the task draws masks, the first micro-batch is recorded, and its labels are checked against the text.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from sklearn.utils.class_weight import compute_class_weight
from support import start, train_rows
from tiny import ALL, ROLLING, write_tiny
from transformers.trainer_pt_utils import LabelSmoother

from ptft_dist.tasks.registry import TASKS

ROWS, LENGTH, SENTINELS = 60, 256, 13
TOO_SMALL_TO_MOVE_A_WEIGHT = 1e-30


class Finished:
    """A run of one update: its rows, its tokenizer, its network, the inputs of its first micro-batch [B, ...]."""

    def __init__(self, folder: Path) -> None:
        self.rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
        model = folder / "run/model"
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(model)
        config = transformers.AutoConfig.from_pretrained(model)
        assert config.architectures
        network = getattr(transformers, config.architectures[0])
        self.model = network.from_pretrained(model, dtype=torch.float32).eval()
        self.inputs = torch.load(folder / "inputs.pt")

    def ids(self, text: str) -> list[int]:
        """Without special tokens."""
        return list(self.tokenizer(text, add_special_tokens=False).input_ids)

    def document(self, row: dict[str, Any]) -> list[int]:
        return [*self.ids(row["text"]), self.tokenizer.eos_token_id]

    def output(self, encoded: Any, **labels: Any) -> Any:
        """transformers' output for one unpadded row."""
        return self.model(**{name: torch.tensor([values]) for name, values in dict(encoded).items()}, **labels)


def mean(parts: list[tuple[torch.Tensor, float]]) -> float:
    """The mean of losses, each weighted by its count."""
    return sum(loss.item() * count for loss, count in parts) / sum(count for _, count in parts)


def next_tokens(run: Finished, ids: list[int], labels: list[int]) -> tuple[torch.Tensor, float]:
    count = sum(label != -100 for label in labels[1:])
    return run.output({"input_ids": ids}, labels=torch.tensor([labels])).loss, count


def clm(run: Finished) -> float:
    documents = [run.document(row) for row in run.rows]
    return mean([next_tokens(run, ids, ids) for ids in documents])


def sft(run: Finished) -> float:
    """The learned tokens are those between the generation markers of the chat template."""
    parts = []
    for row in run.rows:
        said = run.tokenizer.apply_chat_template(row["messages"], return_dict=True, return_assistant_tokens_mask=True)
        pairs = zip(said["input_ids"], said["assistant_masks"], strict=True)
        parts.append(next_tokens(run, said["input_ids"], [i if learned else -100 for i, learned in pairs]))
    return mean(parts)


def classification(run: Finished) -> float:
    """Weighted by scikit-learn's balanced weights."""
    labels = [row["label"] for row in run.rows]
    names = sorted(set(labels))
    weights = dict(zip(names, compute_class_weight("balanced", classes=np.array(names), y=labels), strict=True))
    parts = []
    for row in run.rows:
        label = torch.tensor([run.model.config.label2id[row["label"]]])
        parts.append((run.output(run.tokenizer(row["text"]), labels=label).loss, weights[row["label"]]))
    return mean(parts)


def regression(run: Finished) -> float:
    return mean(
        [
            (run.output(run.tokenizer(row["text"], row["text_pair"]), labels=torch.tensor([row["label"]])).loss, 1)
            for row in run.rows
        ]
    )


def reward(run: Finished) -> float:
    """Bradley-Terry with margins, and the centring term with its weight in TINY."""
    parts = []
    for row in run.rows:
        rewards = []
        for side in ("chosen", "rejected"):
            said = run.tokenizer.apply_chat_template(row["prompt"] + row[side], return_dict=True)
            rewards.append(run.output({"input_ids": said["input_ids"]}).logits[0, 0].double())
        difference = rewards[0] - rewards[1] - row.get("margin", 0)
        parts.append((torch.log1p(torch.exp(-difference)) + 0.01 * (rewards[0] + rewards[1]) ** 2, 1.0))
    return mean(parts)


def token_classification(run: Finished) -> float:
    """A word's first token has its tag."""
    parts = []
    for row in run.rows:
        encoded = run.tokenizer(row["tokens"], is_split_into_words=True)
        words, labels = encoded.word_ids(), []
        for i, word in enumerate(words):
            first = word is not None and (i == 0 or words[i - 1] != word)
            labels.append(run.model.config.label2id[row["tags"][word]] if first else -100)
        loss = run.output(encoded, labels=torch.tensor([labels])).loss
        parts.append((loss, sum(label != -100 for label in labels)))
    return mean(parts)


def question_answering(run: Finished) -> float:
    """Both ends are the first token where there is no answer."""
    parts = []
    for row in run.rows:
        encoded = run.tokenizer(row["question"], row["context"], return_offsets_mapping=True)
        offsets, places = encoded.pop("offset_mapping"), [0]
        if row["answers"]["text"]:
            begin = row["answers"]["answer_start"][0]
            end = begin + len(row["answers"]["text"][0])
            sides = zip(encoded.sequence_ids(), offsets, strict=True)
            places = [i for i, (side, (a, b)) in enumerate(sides) if side == 1 and a < end and b > begin]
        first, last = torch.tensor([places[0]]), torch.tensor([places[-1]])
        parts.append((run.output(encoded, start_positions=first, end_positions=last).loss, 1))
    return mean(parts)


def seq2seq(run: Finished) -> float:
    """Smoothed by transformers' LabelSmoother."""
    smooth, eos, parts = LabelSmoother(epsilon=0.1), run.tokenizer.eos_token_id, []
    for row in run.rows:
        labels = torch.tensor([[*run.ids(row["target"]), eos]])
        output = run.output({"input_ids": [*run.ids(row["source"]), eos]}, labels=labels)
        parts.append((smooth(output, labels), labels.shape[1]))
    return mean(parts)


# --- tasks that draw masks --------------------------------------------------------------------------------------------


def unpadded(ids: torch.Tensor, mask: torch.Tensor) -> list[list[int]]:
    return [row[seen.bool()].tolist() for row, seen in zip(ids, mask, strict=True)]


def restored(run: Finished) -> list[list[int]]:
    """The rows with the labels in the place of what the network sees there."""
    ids, targets = run.inputs["input_ids"], run.inputs["targets"]
    return unpadded(torch.where(targets == -100, ids, targets), run.inputs["attention_mask"])


def forward(run: Finished, **labels: torch.Tensor) -> float:
    """transformers' loss of the recorded micro-batch."""
    inputs = {name: values for name, values in run.inputs.items() if not name.startswith("targets")}
    inputs["attention_mask"] = inputs["attention_mask"].to(torch.long if "perm_mask" not in inputs else torch.float)
    loss: float = run.model(**inputs, **labels).loss.item()
    return loss


def mlm(run: Finished) -> float:
    cls, sep = run.tokenizer.cls_token_id, run.tokenizer.sep_token_id
    documents = [[cls, *run.ids(row["text"]), sep] for row in run.rows]
    assert all(row in documents for row in restored(run))
    return forward(run, labels=run.inputs["targets"])


def squeezed(text: str) -> str:
    """Without spaces, which decoding does not restore exactly."""
    return "".join(text.split())


def mlm_nsp(run: Finished) -> float:
    """0: the second segment follows the first in its document."""
    texts = [squeezed(row["text"]) for row in run.rows]
    sep, follows = run.tokenizer.sep_token_id, run.inputs["targets_next"].tolist()
    for ids, label in zip(restored(run), follows, strict=True):
        middle = ids.index(sep)
        both = squeezed(run.tokenizer.decode(ids[1:middle]) + run.tokenizer.decode(ids[middle + 1 : -1]))
        assert any(both in text for text in texts) == (label == 0)
    assert set(follows) == {0, 1}
    return forward(run, labels=run.inputs["targets"], next_sentence_label=run.inputs["targets_next"])


def plm(run: Finished) -> float:
    documents, inputs = [run.document(row) for row in run.rows], run.inputs
    assert all(row in documents for row in unpadded(inputs["input_ids"], inputs["attention_mask"]))
    mapped = torch.einsum("bpt,bt->bp", inputs["target_mapping"], inputs["input_ids"].float()).long()
    there = inputs["targets"] != -100
    assert there.any()
    assert torch.equal(mapped[there], inputs["targets"][there])
    return forward(run, labels=inputs["targets"])


def span_corruption(run: Finished) -> float:
    """Each sentinel of the source stands for what is written after it in the target."""
    documents, eos = [run.document(row) for row in run.rows], run.tokenizer.eos_token_id
    sentinels = {run.tokenizer.convert_tokens_to_ids(f"<extra_id_{i}>") for i in range(SENTINELS)}
    sources = unpadded(run.inputs["input_ids"], run.inputs["attention_mask"])
    for source, padded in zip(sources, run.inputs["targets"].tolist(), strict=True):
        target = [i for i in padded if i != -100]
        assert source[-1] == target[-1] == eos
        hidden: dict[int, list[int]] = {}
        for token in target[:-1]:
            if token in sentinels:
                sentinel = token
                hidden[sentinel] = []
            else:
                hidden[sentinel].append(token)
        whole = [token for seen in source for token in (hidden[seen] if seen in sentinels else [seen])]
        assert whole in documents
    del run.inputs["decoder_input_ids"]  # transformers makes them from the labels
    return forward(run, labels=run.inputs["targets"])


REFERENCES: dict[str, Callable[[Finished], float]] = {
    function.__name__: function
    for function in (
        clm,
        mlm,
        mlm_nsp,
        plm,
        span_corruption,
        sft,
        classification,
        regression,
        reward,
        token_classification,
        question_answering,
        seq2seq,
    )
}
DRAWN = {"mlm", "mlm_nsp", "plm", "span_corruption"}


def test_every_task_has_a_reference() -> None:
    others = {*ROLLING, "dpo", "kto"}  # test_trl_ppo.py, test_preference_optimization.py
    assert set(REFERENCES) | others == set(ALL) == {name for name, spec in TASKS.items() if spec.settings.trains}


@pytest.mark.parametrize("task", REFERENCES)
def test_the_first_loss_is_the_reference(tmp_path: Path, cache: Path, task: str) -> None:
    size, micro_size = (12, 12) if task in DRAWN else (ROWS, 20)  # a padded micro-batch beside rows without padding
    changes: dict[str, Any] = {
        "data": {"validation": None, "max_length": LENGTH},
        "batch": {"global_size": size, "micro_size": micro_size},
        "optim": {"lr": TOO_SMALL_TO_MOVE_A_WEIGHT},
        "train": {"max_steps": 1},
        "eval": {"every": None},
        "save": {"every": None},
    }
    if ALL[task][0]["model"]["config"]["model_type"] in ("bert", "llama"):
        changes["model"] = {"config": {"max_position_embeddings": LENGTH}}
    if task in ("sft", "seq2seq"):
        changes[task] = {"generation": None}
    if task == "span_corruption":
        changes[task] = {"sentinels": SENTINELS}  # for rows of LENGTH tokens
    write_tiny(tmp_path, task, **changes)
    lines = (tmp_path / "rows.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "rows.jsonl").write_text("".join(lines[:ROWS]))
    run = start("train", "recipe.yaml", cwd=tmp_path, cache=cache, patches=["record_inputs"])
    assert run.wait() == 0, run.stderr
    (row,) = train_rows(tmp_path / "run")
    with torch.no_grad():
        expected = REFERENCES[task](Finished(tmp_path))
    assert row["loss"] == pytest.approx(expected, rel=1e-5)
