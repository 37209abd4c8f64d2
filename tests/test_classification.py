"""Classification: transformers' own heads, losses, collator and pipeline; padding; pairs; relations; saved heads."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from peft import PromptEncoderConfig, PromptTuningConfig, get_peft_model
from prepare_support import prepare
from support import eval_rows, start
from task_support import for_model, make_task
from tiny import BERT, WORDS, write_rows, write_tiny
from tokenizers.normalizers import Replace
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    PreTrainedTokenizerFast,
    pipeline,
)

from ptft_dist.config.recipe import Recipe
from ptft_dist.config.tokenizer_section import TokenizerTraining
from ptft_dist.data.encoder import EncoderContext, LeftOut
from ptft_dist.data.example_store import ExampleStore
from ptft_dist.data.formats import Record
from ptft_dist.data.store import Row
from ptft_dist.data.tokenizer import load_tokenizer, train_tokenizer
from ptft_dist.errors import RecipeError
from ptft_dist.networks.facts import read_facts
from ptft_dist.networks.load import build_config, build_model, check_positions
from ptft_dist.tasks.classification.encode import ClassificationRows, _marked
from ptft_dist.tasks.classification.settings import ENTITY_MARKERS
from ptft_dist.tasks.classification.task import Classification, label_weights
from ptft_dist.tasks.protocol import Task, TaskSetup
from ptft_dist.tasks.registry import recipe_class
from ptft_dist.training.batches import mask_all

CPU = torch.device("cpu")
ROLES = ("cls", "sep", "mask", "pad")
TEXTS = [" ".join(WORDS[i % 14 : i % 14 + 1 + i % 5] * (1 + i % 3)) for i in range(12)]
LABELS = ["animal", "plant", "thing"]
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
CONFIGS: dict[str, dict[str, Any]] = {
    "bert": {**SIZES, "max_position_embeddings": 64},
    "roberta": {**SIZES, "max_position_embeddings": 96, "type_vocab_size": 1},  # as the published one
    "llama": {**SIZES, "num_key_value_heads": 2, "max_position_embeddings": 64},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64},
}


def recipe(kind: str = "bert", max_length: int = 32, **settings: Any) -> Recipe:
    raw = {
        "task": "classification",
        "model": {"config": {"model_type": kind, **CONFIGS[kind]}},
        "tokenizer": {"train": {"vocab_size": 320}},
        "data": {"train": [{"path": "rows.jsonl"}], "max_length": max_length},
        "classification": settings,
        "batch": {"global_size": 1, "micro_size": 1},
        "train": {"max_steps": 1},
        "run_dir": "run",
    }
    return recipe_class().model_validate_json(json.dumps(raw), strict=True)


def tokenizer(roles: tuple[str, ...] = ROLES) -> PreTrainedTokenizerFast:
    return train_tokenizer(TokenizerTraining(vocab_size=320), TEXTS, roles)


def survey(labels: list[str] = LABELS, frequencies: tuple[int, ...] = (6, 3, 3)) -> dict[str, Any]:
    return {"labels": labels, "frequencies": list(frequencies), "rows": 12}


def encoded(ours: Recipe, words: PreTrainedTokenizerFast, records: list[dict[str, Any]]) -> list[Row]:
    """The rows as read from the store."""
    encoder = ClassificationRows(EncoderContext.of(ours, words, survey()))
    rows = []
    for values in records:
        record = Record(values, "here")
        encoder.check(ours.settings, record)
        (example,) = encoder.build(record, encoder.encode(encoder.pieces(record)))
        columns = {name: np.array(column, np.int64) for name, column in example.columns.items()}
        rows.append(Row(columns.pop("input_ids"), np.zeros(1, np.int64), columns))
    return rows


def made(ours: Recipe, words: PreTrainedTokenizerFast) -> tuple[Task, torch.nn.Module]:
    task: Any = make_task(ours, words, survey())
    setup = TaskSetup.of(ours, words, survey())
    config = build_config(ours.model, words, ours.data.max_length, Classification.config_settings(setup))
    Classification.fit_config(setup, config)
    model = build_model(ours.model, config, 0, task.auto_class).eval()
    task = for_model(task, model)
    return task, model


def keys(count: int) -> list[tuple[int, int]]:
    return [(0, i) for i in range(count)]


@pytest.mark.parametrize("pair", [False, True])
@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_inputs_and_loss_are_those_of_transformers(kind: str, pair: bool) -> None:
    """Ids, types and mask as its tokenizer and DataCollatorWithPadding make them, cut texts among them; its loss."""
    ours, words = recipe(kind, 12, pair=pair), tokenizer()
    records = [{"text": text, "label": LABELS[i % 3]} for i, text in enumerate(TEXTS)]
    for i, record in enumerate(records):
        record |= {"text_pair": TEXTS[-i]} if pair else {}
    task, model = made(ours, words)
    batch = task.collate(encoded(ours, words, records), keys(12))
    pairs = [(r["text"], r["text_pair"]) if pair else (r["text"],) for r in records]
    singles = [words(*texts, truncation=True, max_length=12) for texts in pairs]
    assert max(len(words(*texts).input_ids) for texts in pairs) > 12
    theirs = DataCollatorWithPadding(words)([dict(single) for single in singles])
    assert torch.equal(batch.inputs["input_ids"], theirs["input_ids"])
    assert torch.equal(batch.inputs["attention_mask"], theirs["attention_mask"])
    assert ("token_type_ids" in batch.inputs) == (kind == "bert")
    if kind == "bert":
        assert torch.equal(batch.inputs["token_type_ids"], theirs["token_type_ids"])
        assert bool((theirs["token_type_ids"] == 1).any()) == pair
    with torch.no_grad():
        loss, metrics, logits, *_ = task.loss(model, batch.inputs)
        expected = model(**theirs, labels=torch.tensor([i % 3 for i in range(12)]))
    assert batch.count == 12
    assert loss.item() / batch.count == pytest.approx(expected.loss.item(), rel=1e-5)
    torch.testing.assert_close(logits, expected.logits, rtol=1e-5, atol=1e-6)
    right = int((expected.logits.argmax(-1) == batch.inputs["targets"]).sum())
    assert [x.item() for x in metrics["accuracy"]] == [right, 12]


def test_several_labels_are_those_of_transformers() -> None:
    ours, words = recipe(multi_label=True), tokenizer()
    chosen = [[], ["animal"], ["thing", "animal"], LABELS]
    rows = encoded(ours, words, [{"text": t, "label": c} for t, c in zip(TEXTS, chosen, strict=False)])
    task, model = made(ours, words)
    batch = task.collate(rows, keys(4))
    gold = torch.tensor([[0.0, 0, 0], [1, 0, 0], [1, 0, 1], [1, 1, 1]])
    assert torch.equal(batch.inputs["targets"], gold)
    with torch.no_grad():
        loss, *_ = task.loss(model, batch.inputs)
        plain = {k: x for k, x in batch.inputs.items() if k != "targets"}
        expected = model(**plain, labels=gold)
    assert model.config.problem_type == "multi_label_classification"
    assert loss.item() / batch.count == pytest.approx(expected.loss.item(), rel=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weights", ["balanced", {"animal": 0.5, "plant": 2.0, "thing": 7.0}])
def test_weights_and_smoothing_are_pytorchs(weights: Any, smoothing: float) -> None:
    """Split in two micro-batches and added up: cross_entropy's weighted mean over all rows."""
    ours, words = recipe(class_weights=weights, label_smoothing=smoothing), tokenizer()
    rows = encoded(ours, words, [{"text": t, "label": LABELS[(i * i) % 3]} for i, t in enumerate(TEXTS)])
    task, model = made(ours, words)
    parts = [task.collate(rows[:5], keys(5)), task.collate(rows[5:], keys(7))]
    with torch.no_grad():
        total = sum(task.loss(model, part.inputs).loss_sum.item() for part in parts)
        logits = torch.cat([task.loss(model, part.inputs).predictions for part in parts])  # type: ignore[misc]
    by_hand = torch.tensor([12 / (3 * 6), 12 / (3 * 3), 12 / (3 * 3)] if weights == "balanced" else [0.5, 2.0, 7.0])
    targets = torch.tensor([(i * i) % 3 for i in range(12)])
    expected = F.cross_entropy(logits, targets, by_hand, label_smoothing=smoothing)
    assert total / sum(part.count for part in parts) == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("weights", ["balanced", {"animal": 0.5, "plant": 2.0, "thing": 7.0}])
def test_weights_of_several_labels_are_pytorchs_pos_weight(weights: Any) -> None:
    ours, words = recipe(class_weights=weights, multi_label=True), tokenizer()
    chosen = [[LABELS[j] for j in range(3) if (i >> j) & 1] for i in range(8)]
    rows = encoded(ours, words, [{"text": t, "label": c} for t, c in zip(TEXTS, chosen, strict=False)])
    task, model = made(ours, words)
    parts = [task.collate(rows[:3], keys(3)), task.collate(rows[3:], keys(5))]
    with torch.no_grad():
        outs = [task.loss(model, part.inputs) for part in parts]
    logits = torch.cat([out.predictions for out in outs])  # type: ignore[misc]
    gold = torch.tensor([[float((i >> j) & 1) for j in range(3)] for i in range(8)])
    by_hand = torch.tensor([(12 - 6) / 6, (12 - 3) / 3, (12 - 3) / 3] if weights == "balanced" else [0.5, 2.0, 7.0])
    expected = torch.nn.BCEWithLogitsLoss(pos_weight=by_hand)(logits, gold)
    total = sum(out.loss_sum.item() for out in outs)
    assert total / sum(part.count for part in parts) == pytest.approx(expected.item(), rel=1e-5)


def test_weights_that_cannot_be() -> None:
    def weights(found: dict[str, Any], **section: Any) -> torch.Tensor | None:
        return label_weights(TaskSetup.of(recipe(**section), tokenizer(), found))

    with pytest.raises(RecipeError, match=r"class_weights.*only one of them has: plant, stone, thing"):
        weights(survey(), class_weights={"animal": 1.0, "stone": 2.0})
    with pytest.raises(RecipeError, match="no training row has the label 'plant'"):
        weights(survey(frequencies=(6, 0, 6)), class_weights="balanced")
    with pytest.raises(RecipeError, match="every training row has the label 'animal'"):
        weights(survey(frequencies=(12, 3, 6)), class_weights="balanced", multi_label=True)


@pytest.mark.parametrize("multi_label", [False, True])
def test_a_stand_in_counts_nothing(multi_label: bool) -> None:
    ours, words = recipe(multi_label=multi_label, class_weights="balanced"), tokenizer()
    label: Any = ["thing"] if multi_label else "thing"
    rows = encoded(ours, words, [{"text": TEXTS[3], "label": label}])
    task, model = made(ours, words)
    loss, metrics, *_ = task.loss(model, mask_all(task.collate(rows, keys(1)).inputs))
    loss.backward()
    assert loss.item() == 0
    assert [x.item() for x in metrics["accuracy"]] == [0, 0]
    assert all(p.grad is None or not p.grad.abs().max() for p in model.parameters())


@pytest.mark.parametrize("roles", [ROLES, ("eos",), ("eos", "pad")], ids=["cls", "no pad", "eos and pad"])
@pytest.mark.parametrize("kind", ["bert", "roberta", "llama", "gpt2"])
def test_padding_does_not_change_a_row(kind: str, roles: tuple[str, ...]) -> None:
    """Each row alone and together with a longer one: the same logits, from its last token."""
    ours, words = recipe(kind), tokenizer(roles)
    records = [{"text": text, "label": "thing"} for text in (*TEXTS, "!", "!!!", "red!")]
    assert words.convert_ids_to_tokens(0) != "!"
    rows = encoded(ours, words, records)
    task, model = made(ours, words)
    with torch.no_grad():
        together = task.loss(model, task.collate(rows, keys(15)).inputs).predictions
        alone = [task.loss(model, task.collate([row], keys(1)).inputs).predictions for row in rows]
        by_hand = []
        for row in rows:  # without any help of the head: the last position, or the whole network
            ids = torch.tensor(row.input_ids)[None]
            if kind in ("llama", "gpt2"):
                base = getattr(model, model.base_model_prefix)
                by_hand.append(model.score(base(input_ids=ids).last_hidden_state[:, -1]))
            else:
                by_hand.append(model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits)
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(together, torch.cat(by_hand), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("config", [PromptTuningConfig, PromptEncoderConfig])
def test_virtual_tokens_before_a_decoder(config: Any) -> None:
    """transformers would read the last column, also where it is padding. peft alone reads single rows."""
    ours, words = recipe("llama"), tokenizer()
    rows = encoded(ours, words, [{"text": text, "label": "thing"} for text in TEXTS])
    task, model = made(ours, words)
    single = copy.deepcopy(model)
    single.score._forward_hooks.clear()
    adapted = []
    for each in (model, single):
        torch.manual_seed(0)
        adapted.append(get_peft_model(each, config(task_type="SEQ_CLS", num_virtual_tokens=3)).eval())
    with torch.no_grad():
        together = task.loss(adapted[0], task.collate(rows, keys(12)).inputs).predictions
        alone = [adapted[1](input_ids=torch.from_numpy(row.input_ids)[None]).logits for row in rows]
        task.probe().check(task.probe().outputs(adapted[0], task.probe().inputs))
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("pair", "roles", "warned"), [(True, ("eos",), True), (True, ROLES, False), (False, ("eos",), False)]
)
def test_two_texts_without_a_token_between_them(pair: bool, roles: tuple[str, ...], warned: bool) -> None:
    ours, words = recipe(pair=pair), tokenizer(roles)
    warnings = ClassificationRows(EncoderContext.of(ours, words, survey())).warnings()
    assert bool(warnings) == warned
    assert all("no token between the two texts" in each for each in warnings)


def test_a_config_with_another_padding_is_made_right() -> None:
    """A decoder whose config names another token than the one its rows are filled up with would read the padding."""
    words = tokenizer(("eos", "pad"))
    ours = recipe("llama")
    assert ours.model.config is not None
    ours.model.config["pad_token_id"] = words.convert_tokens_to_ids("a")
    rows = encoded(ours, words, [{"text": text, "label": "thing"} for text in TEXTS])
    task, model = made(ours, words)
    assert model.config.pad_token_id == words.pad_token_id
    with torch.no_grad():
        together = task.loss(model, task.collate(rows, keys(12)).inputs).predictions
        alone = torch.cat([task.loss(model, task.collate([row], keys(1)).inputs).predictions for row in rows])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)
    other = recipe("roberta")
    assert other.model.config is not None
    other.model.config["pad_token_id"] = 7
    with pytest.raises(RecipeError, match="computes positions with the PAD id"):
        made(other, tokenizer())


def test_tokenizers_and_networks_that_do_not_fit() -> None:
    bare = tokenizer(("eos",))
    bare.eos_token = None
    with pytest.raises(RecipeError, match="neither a PAD nor an EOS"):
        ClassificationRows(EncoderContext.of(recipe(), bare, survey()))
    with pytest.raises(RecipeError, match="leaves no room for a text beside 2 special tokens"):
        ClassificationRows(EncoderContext.of(recipe(max_length=2), tokenizer(), survey()))
    ours = recipe("roberta", 32)
    words = tokenizer()
    config = build_config(ours.model, words, 32, Classification.config_settings(TaskSetup.of(ours, words, survey())))
    config.max_position_embeddings = 32 + words.pad_token_id  # one too few: positions begin behind that of the padding
    model = build_model(ours.model, config, 0, AutoModelForSequenceClassification)
    with pytest.raises(RecipeError, match=rf"data.max_length: 32 is more than the 31 .* at {words.pad_token_id + 1}"):
        check_positions(read_facts(model), 32)
    check_positions(read_facts(model), 31)
    ids = torch.full((1, 31), words.convert_tokens_to_ids("a"))
    model(input_ids=ids)
    with pytest.raises((IndexError, RuntimeError), match="index"):
        model(input_ids=torch.cat([ids, ids[:, :1]], 1))
    bart = recipe("bert")
    assert bart.model.config is not None
    bart.model.config.clear()
    bart.model.config.update({"model_type": "bart", "d_model": 16, "encoder_layers": 1, "decoder_layers": 1})
    bart.model.config.update({"encoder_attention_heads": 2, "decoder_attention_heads": 2, "eos_token_id": 5})
    with pytest.raises(RecipeError, match="classifies a text at its EOS token"):
        made(bart, tokenizer())


@pytest.mark.parametrize("several", [False, True])
def test_weights_are_balanced_over_what_is_learned(tmp_path: Path, several: bool) -> None:
    """Augmented copies count; validation rows and skipped or dropped rows do not."""
    rows = [{"text": f"red cat {i}" if i % 3 else f"dog{i}", "label": ["few", "many"][i % 3 > 0]} for i in range(40)]
    rows += [{"text": "red cat", "label": "strange"}] * 3  # skipped: not listed
    rows += [{"text": "\u200b" * i, "label": "few"} for i in range(1, 9)]  # left out: of no token
    if several:
        rows = [{**row, "label": [row["label"]]} for row in rows]
    section = {"class_weights": "balanced", "labels": ["few", "many"], "multi_label": several}
    data = {"bad_rows": "skip", "augment": [{"method": "swap"}], "cache_dir": "cache"}
    path = write_tiny(tmp_path, "classification", classification=section, data=data)
    raw = json.loads(path.read_text())
    raw["tokenizer"] = {"path": "words"}
    path.write_text(json.dumps(raw))
    words = tokenizer(("eos", "pad"))
    words.backend_tokenizer.normalizer = Replace("\u200b", "")
    words.save_pretrained(tmp_path / "words")
    write_rows(tmp_path / "rows.jsonl", rows)
    prepared, _ = _prepared(path)
    labels = [int(prepared.train.row(i).columns["labels"][0]) for i in range(len(prepared.train))]
    counts = [labels.count(0), labels.count(1)]
    report = prepared.report
    assert report.bad_rows.count == 3
    assert report.dropped["with a text for which the tokenizer returns no token"].times == 8
    assert report.steps[0].notes["augmented (swap)"].times > 0
    assert (prepared.survey["frequencies"], prepared.survey["rows"]) == (counts, len(labels))
    setup = TaskSetup.of(recipe(class_weights="balanced", multi_label=several), words, prepared.survey)
    weights = label_weights(setup)
    assert weights is not None
    share = [len(labels) / (2 * count) for count in counts]
    expected = [counts[1] / counts[0], counts[0] / counts[1]] if several else share
    assert weights.tolist() == pytest.approx(expected)


def test_cut_texts_are_counted_and_keep_their_special_tokens(tmp_path: Path, cache: Path) -> None:
    path = write_tiny(tmp_path, "classification", data={"max_length": 8, "cache_dir": str(cache)})
    prepared, words = _prepared(path)
    ids = [prepared.train.row(i).input_ids.tolist() for i in range(len(prepared.train))]
    assert all(row[0] == words.cls_token_id and row[-1] == words.sep_token_id and len(row) <= 8 for row in ids)
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    long = sum(len(words(row["text"]).input_ids) > 8 for row in rows)
    assert 0 < long < 160
    count, places = prepared.report.notes["truncated to data.max_length"]
    assert count == long
    assert all(str(tmp_path / "rows.jsonl") in place for place in places)


def _prepared(path: Path) -> tuple[Any, PreTrainedTokenizerFast]:
    from ptft_dist.api import load_recipe

    loaded = load_recipe(str(path))
    prepared = prepare(loaded.recipe, loaded.base)
    assert isinstance(prepared.train, ExampleStore)
    return prepared, load_tokenizer(prepared.tokenizer_path)  # type: ignore[return-value]


def test_what_a_text_spells_is_text() -> None:
    ours, words = recipe(), tokenizer()
    (row,) = encoded(ours, words, [{"text": f"red {words.sep_token} dog", "label": "thing"}])
    assert row.input_ids.tolist().count(words.sep_token_id) == 1
    assert words.decode(row.input_ids[1:-1]) == f"red {words.sep_token} dog"


def test_labels_and_their_order() -> None:
    """Numbers by value, then words; texts, numbers and booleans alike; or as the recipe lists them."""
    values: list[Any] = [10, "9", 2.0, "b", "nan", True, "a", "-1", "1.5"]
    records = [Record({"text": "x", "label": value}, "here") for value in values]
    found = ClassificationRows.survey_of(recipe().settings, records, 0)
    assert found["labels"] == ["-1", "1.5", "2", "9", "10", "a", "b", "nan", "true"]
    listed = ClassificationRows.survey_of(recipe(labels=["thing", "animal"]).settings, [], 0)
    assert listed["labels"] == ["thing", "animal"]


# --- relations --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("head", "tail", "expected"),
    [
        ([0, 3], [4, 7], "[E1]red[/E1] [E2]cat[/E2] runs"),
        ([4, 7], [0, 3], "[E2]red[/E2] [E1]cat[/E1] runs"),
        ([0, 4], [4, 7], "[E1]red [/E1][E2]cat[/E2] runs"),
        ([4, 7], [0, 4], "[E2]red [/E2][E1]cat[/E1] runs"),
        ([8, 12], [7, 8], "red cat[E2] [/E2][E1]runs[/E1]"),
    ],
)
def test_markers_stand_around_the_spans(head: list[int], tail: list[int], expected: str) -> None:
    assert _marked(Record({"text": "red cat runs", "head": head, "tail": tail, "label": "x"}, "here")) == expected


def saved(folder: Path, **changes: Any) -> Path:
    """A tiny BERT with its tokenizer, as transformers saves them: a classifier of animal, plant and thing."""
    words = tokenizer()
    names = {"id2label": dict(enumerate(LABELS)), "label2id": {label: i for i, label in enumerate(LABELS)}}
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(3)
    sizes = {key: value for key, value in BERT.items() if key != "model_type"}
    config = BertConfig(**sizes, vocab_size=len(words), pad_token_id=words.pad_token_id, **(names | changes))
    BertForSequenceClassification(config).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def related(folder: Path) -> Path:
    rows = []
    for i in range(60):
        words = [WORDS[(i + 3 * j) % 14] for j in range(6)]
        ends = np.cumsum([len(word) + 1 for word in words])
        spans = [[int(ends[k] - len(words[k]) - 1), int(ends[k] - 1)] for k in (i % 3, 3 + i % 2)]
        rows.append({"text": " ".join(words), "head": spans[0], "tail": spans[1], "label": LABELS[i % 3]})
    return write_rows(folder / "rows.jsonl", rows)


def test_a_saved_network_learns_markers(tmp_path: Path, cache: Path) -> None:
    """Markers are tokens, the embeddings grow, and what they held before is what was saved."""
    saved(tmp_path / "bert")
    write_tiny(tmp_path, "classification", classification={"entities": True, "class_weights": None})
    related(tmp_path)
    raw = json.loads((tmp_path / "recipe.yaml").read_text())
    raw |= {"model": {"path": "bert", "new_head": True}, "tokenizer": {"path": "bert"}, "train": {"max_steps": 1}}
    raw["optim"] = {"lr": 1e-9, "weight_decay": 0.0}
    (tmp_path / "recipe.yaml").write_text(json.dumps(raw))
    run = start("train", "recipe.yaml", cwd=tmp_path, cache=cache)
    assert run.wait() == 0, run.stderr
    before = AutoModelForSequenceClassification.from_pretrained(tmp_path / "bert")
    after = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run/model")
    old = len(AutoTokenizer.from_pretrained(tmp_path / "bert"))
    new = AutoTokenizer.from_pretrained(tmp_path / "run/model")
    assert len(new) == old + 4 == after.config.vocab_size
    assert new.convert_ids_to_tokens(range(old, old + 4)) == list(ENTITY_MARKERS)
    table = after.get_input_embeddings().weight
    torch.testing.assert_close(table[:old], before.get_input_embeddings().weight, rtol=0, atol=1e-6)
    assert table[old:].std() > 0.005
    prepared, _ = _prepared_with(tmp_path / "recipe.yaml", cache)
    for i in range(len(prepared.train)):
        ids = prepared.train.row(i).input_ids.tolist()
        assert [ids.count(marker) for marker in range(old, old + 4)] == [1, 1, 1, 1]


def _prepared_with(path: Path, cache: Path) -> tuple[Any, PreTrainedTokenizerFast]:
    raw = json.loads(path.read_text())
    raw["data"]["cache_dir"] = str(cache)
    path.write_text(json.dumps(raw))
    return _prepared(path)


def test_an_entity_beyond_the_end_leaves_its_row_out() -> None:
    ours, words = recipe(max_length=16, entities=True), tokenizer()
    words.add_tokens(list(ENTITY_MARKERS))
    text = " ".join(["red"] * 30)
    near = {"text": text, "head": [0, 3], "tail": [4, 7], "label": "thing"}
    encoded(ours, words, [near])
    with pytest.raises(LeftOut, match=r"with an entity beyond data\.max_length"):
        encoded(ours, words, [near | {"tail": [len(text) - 3, len(text)]}])


# --- a saved classifier -----------------------------------------------------------------------------------------------


def continued(folder: Path, labels: list[str], **model: Any) -> Path:
    """A recipe that starts from the saved BERT, on rows of `labels`."""
    write_tiny(folder, "classification", classification={"class_weights": None})
    words = [{"text": " ".join(WORDS[i % 9 : i % 9 + 4]), "label": labels[i % len(labels)]} for i in range(60)]
    write_rows(folder / "rows.jsonl", words)
    raw = json.loads((folder / "recipe.yaml").read_text())
    raw |= {"model": {"path": "bert", **model}, "tokenizer": {"path": "bert"}, "optim": {"lr": 1e-9}}
    raw["train"] = {"max_steps": 1}
    (folder / "recipe.yaml").write_text(json.dumps(raw))
    return folder / "recipe.yaml"


CASES: dict[str, tuple[list[str], dict[str, Any], dict[str, Any], str | None]] = {
    "the same labels": (LABELS, {}, {}, "kept"),
    "labels without names": (LABELS, {}, {"id2label": {i: f"LABEL_{i}" for i in range(3)}, "label2id": {}}, "kept"),
    "another number": (["yes", "no"], {}, {}, None),
    "other names": (["x", "y", "z"], {}, {}, None),
    "another number, a new head": (["yes", "no"], {"new_head": True}, {}, "new"),
    "other names, a new head": (["x", "y", "z"], {"new_head": True}, {}, "new"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_head_for_other_labels(tmp_path: Path, cache: Path, case: str) -> None:
    labels, model, changes, head = CASES[case]
    saved(tmp_path / "bert", **changes)
    continued(tmp_path, labels, **model)
    run = start("train", "recipe.yaml", cwd=tmp_path, cache=cache)
    code = run.wait()
    if head is None:
        assert code == 2, run.stderr
        assert "model.new_head: true" in run.stderr
        assert "animal, plant, thing" in run.stderr
        return
    assert code == 0, run.stderr
    before = AutoModelForSequenceClassification.from_pretrained(tmp_path / "bert")
    after = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run/model")
    assert after.config.id2label == dict(enumerate(sorted(labels)))
    key = "bert.encoder.layer.0.output.dense.weight"
    torch.testing.assert_close(after.state_dict()[key], before.state_dict()[key], rtol=0, atol=1e-6)
    same = after.classifier.weight.shape == before.classifier.weight.shape and torch.allclose(
        after.classifier.weight, before.classifier.weight, atol=1e-6
    )
    assert same == (head == "kept")
    assert ("initialized at random" in run.stderr) == (head == "new")


# --- a whole run ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("multi_label", [False, True])
def test_the_pipeline_of_transformers_predicts_as_the_run_does(tmp_path: Path, cache: Path, multi_label: bool) -> None:
    """On two ranks with rows that do not divide evenly; scores by scikit-learn from the pipeline's predictions."""
    from sklearn import metrics

    write_tiny(tmp_path, "classification", classification={"multi_label": multi_label, "class_weights": None})
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    if multi_label:
        for row in rows:
            row["label"] = [word for word in ("cat", "red", "dog") if word in row["text"].split()]
    held = [row | {"text": " ".join(row["text"].split()[:8])} for row in rows[:23]]
    write_rows(tmp_path / "rows.jsonl", rows[23:])
    write_rows(tmp_path / "held.jsonl", held)
    raw = json.loads((tmp_path / "recipe.yaml").read_text())
    raw["data"]["validation"] = [{"path": "held.jsonl"}]
    raw["train"]["max_steps"] = 24
    (tmp_path / "recipe.yaml").write_text(json.dumps(raw))
    run = start("train", "recipe.yaml", "eval.micro_size=4", cwd=tmp_path, cache=cache, ranks=2)
    assert run.wait() == 0, run.stderr
    scores = {key.removeprefix("eval/"): value for key, value in eval_rows(tmp_path / "run")[-1].items()}
    config = json.loads((tmp_path / "run/model/config.json").read_text())
    labels = ["cat", "dog", "red"] if multi_label else ["animal", "thing"]
    assert config["id2label"] == {str(i): label for i, label in enumerate(labels)}
    assert config["label2id"] == {label: i for i, label in enumerate(labels)}

    classify = pipeline("text-classification", model=str(tmp_path / "run/model"), top_k=None)
    said = classify([row["text"] for row in held])
    chosen = [{each["label"]: each["score"] for each in one} for one in said]
    if multi_label:
        gold: Any = [[int(label in row["label"]) for label in labels] for row in held]
        predicted: Any = [[int(one[label] > 0.5) for label in labels] for one in chosen]
    else:
        gold = [labels.index(row["label"]) for row in held]
        predicted = [labels.index(max(one, key=lambda label: one[label])) for one in chosen]
        assert scores["mcc"] == pytest.approx(metrics.matthews_corrcoef(gold, predicted))
    assert scores["accuracy"] == pytest.approx(metrics.accuracy_score(gold, predicted))
    for average in ("macro", "weighted", *(["micro"] if multi_label else [])):
        expected = metrics.f1_score(gold, predicted, average=average, zero_division=0)
        assert scores[f"f1_{average}"] == pytest.approx(expected)
    if not multi_label:
        # The loss is the mean of what the pipeline gives the right label.
        right = [one[row["label"]] for one, row in zip(chosen, held, strict=True)]
        assert scores["loss"] == pytest.approx(float(np.mean(-np.log(right))), rel=1e-4)
