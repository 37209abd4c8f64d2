"""`ptft evaluate` and `ptft predict`: every task, row by row, interrupted, and without a recipe."""

from __future__ import annotations

import csv
import json
import math
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas
import pytest
import sacrebleu
import sklearn.metrics
import torch
from adapt_support import METHODS, write_adapted
from peft import AutoPeftModelForSequenceClassification
from preloaded_ranks import forked_ptft
from safetensors.torch import load_file, save_file
from seqeval.metrics import classification_report
from support import eval_rows, make_recipe, start
from tiny import ALL, made, write_tiny
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from ptft_dist import api
from ptft_dist.cli.ranks import launched
from ptft_dist.data.formats import read_file
from ptft_dist.data.store import Row
from ptft_dist.errors import DataError, PtftError, RecipeError
from ptft_dist.judging import prediction
from ptft_dist.judging.examples import RowResults
from ptft_dist.judging.journal import Journal
from ptft_dist.judging.perplexity import windows
from ptft_dist.judging.target import find_target, recipe_of
from ptft_dist.pages.evaluation import paired, why_not_paired
from ptft_dist.pages.read import read_run
from ptft_dist.reporting.tables import SEPARATORS, table
from ptft_dist.tasks.common.causal import NextTokenTask
from ptft_dist.tasks.common.scores.tables import calibration
from ptft_dist.tasks.common.scores.text import count_words
from ptft_dist.tasks.registry import TASKS, encoder_class
from ptft_dist.tasks.sft.encode import NO_ANSWER_LEFT
from ptft_dist.training.validation import Validation

SHORT: dict[str, Any] = {"layers": 1, "train": {"max_steps": 2}, "eval": {"every": None, "micro_size": 6}}
TRAINED = tuple(task for task, spec in TASKS.items() if spec.settings.trains)
ANSWERED = ("classification", "regression", "token_classification", "question_answering", "seq2seq", "sft")


@pytest.fixture(scope="module")
def run_of(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Any:
    """The directory of a task's finished run, trained once."""
    runs: dict[str, Path] = {}

    def provide(task: str) -> Path:
        if task not in runs:
            folder = tmp_path_factory.mktemp(task)
            changes: dict[str, Any] = {"save": {"every": None}}
            if task == "regression":
                changes["model"] = {"config": {"initializer_range": 0.2}}
            if task == "sft":
                changes["data"] = {"max_length": 60}  # room for the last question of each row
            with pytest.MonkeyPatch.context() as patch:
                patch.chdir(folder)
                patch.syspath_prepend(str(folder))
                patch.setenv("PTFT_CACHE", str(cache))
                api.train(write_tiny(folder, task, **SHORT, **changes), {"run_dir": str(folder / "run")}, quiet=True)
            runs[task] = folder / "run"
        return runs[task]

    return provide


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PTFT_CACHE", str(cache))


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def validation_rows(run: Path, task: str, count: int = 40) -> tuple[Path, list[dict[str, Any]]]:
    """A file with rows for predictions."""
    rows = made(count, ALL[task][1])
    file = run.parent / "more.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file, rows


# --- evaluate ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", TRAINED)
def test_the_last_evaluation_of_a_run_is_reproduced(run_of: Any, task: str) -> None:
    """To the last digit, for every task; and the losses of the rows add up to the loss."""
    run = run_of(task)
    result = api.evaluate_model(run)
    expected = {key: value for key, value in eval_rows(run)[-1].items() if key.startswith("eval/")}
    assert result.metrics == expected
    assert json.loads((run / "evaluation.json").read_text()) == result.values()
    rows = lines(run / "evaluation.rows.jsonl")
    assert not [path.name for path in run.iterdir() if "rank-" in path.name]
    if task in ("dpo", "kto", "ppo", "grpo", "rloo"):  # their loss is no sum over rows alone
        return
    total, count = np.sum([row["values"]["loss"] for row in rows], axis=0)
    name = "eval/mlm_loss" if task == "mlm_nsp" else "eval/loss"
    assert total / count == pytest.approx(result.metrics[name], rel=1e-5)
    means = [row["values"]["loss"][0] / (row["values"]["loss"][1] or 1) for row in rows]
    worst = result.details["worst"]
    assert [each["loss"] for each in worst] == pytest.approx(sorted(means, reverse=True)[: len(worst)])
    assert worst[0]["text"].strip()
    if task == "question_answering":  # not the context alone, which other questions have too
        assert all(each["text"].startswith("where is") for each in worst)


def test_tables_of_labels_are_scikit_learn_s(run_of: Any) -> None:
    run = run_of("classification")
    result = api.evaluate_model(run)
    rows = lines(run / "evaluation.rows.jsonl")
    gold, predicted = [row["reference"] for row in rows], [row["answer"]["label"] for row in rows]
    report = sklearn.metrics.classification_report(gold, predicted, output_dict=True, zero_division=0)
    names = {"precision": "precision", "recall": "recall", "f1-score": "f1", "support": "support"}
    for row in result.details["labels"]:
        for theirs, ours in names.items():
            assert row[ours] == pytest.approx(report[row["label"]][theirs])
    matrix = result.details["confusion"]
    for i, a in enumerate(matrix["labels"]):
        for j, b in enumerate(matrix["labels"]):
            assert matrix["counts"][i][j] == sum(pair == (a, b) for pair in zip(gold, predicted, strict=True))
    shares = [row["answer"]["probabilities"] for row in rows]
    assert [max(each, key=each.__getitem__) for each in shares] == predicted
    assert all(sum(each.values()) == pytest.approx(1) for each in shares)


def test_the_calibration_error_is_that_of_a_loop() -> None:
    chance = np.random.default_rng(0)
    confidence = np.concatenate([chance.random(200), [0.0, 1.0, 1 / 15, 2 / 15]])
    correct = chance.random(204) < confidence
    error = 0.0
    for b in range(15):  # (b/15, (b+1)/15]
        inside = [i for i, c in enumerate(confidence) if (b / 15 < c <= (b + 1) / 15) or (b == 0 and c == 0)]
        if inside:
            error += abs(sum(correct[i] for i in inside) - sum(confidence[i] for i in inside)) / 204
    assert calibration(confidence, correct)["ece"] == pytest.approx(error)
    assert sum(row["rows"] for row in calibration(confidence, correct)["bins"]) == 204


def test_tables_of_entities_are_seqeval_s(run_of: Any) -> None:
    run = run_of("token_classification")
    result = api.evaluate_model(run)
    rows = lines(run / "evaluation.rows.jsonl")
    gold, predicted = [row["reference"] for row in rows], [row["answer"]["tags"] for row in rows]
    report = classification_report(gold, predicted, output_dict=True, zero_division=0)
    for row in result.details["labels"]:
        assert (row["precision"], row["recall"], row["f1"], row["support"]) == pytest.approx(
            tuple(report[row["label"]][key] for key in ("precision", "recall", "f1-score", "support"))
        )
    words = sum(map(len, gold))
    assert sum(map(sum, result.details["confusion"]["counts"])) == words


def test_rows_have_the_same_ids_for_every_model(run_of: Any, tmp_path: Path) -> None:
    """A hash of what was judged, so that two models can be compared on the same rows."""
    run = run_of("classification")
    first = api.evaluate_model(run, overrides={"eval.max_rows": 8}, out="a.json")
    second = api.evaluate_model(run, overrides={"eval.max_rows": 8, "tokenizer.train.vocab_size": 310}, out="b.json")
    other = api.evaluate_model(run, overrides={"eval.max_rows": 7}, out="c.json")
    assert first.judged == second.judged != other.judged
    ids = [[row["id"] for row in lines(tmp_path / f"{name}.rows.jsonl")] for name in "ab"]
    assert ids[0] == ids[1]
    assert len(set(ids[0])) == 8


def test_an_interrupted_evaluation_goes_on(run_of: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_of("classification")
    whole = api.evaluate_model(run, overrides={"eval.micro_size": 2}, out="whole.json")
    keep, kept = RowResults.keep, []

    def fail(self: RowResults, result: Any) -> None:
        keep(self, result)
        kept.append(result)
        if len(kept) == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(RowResults, "keep", fail)
        with pytest.raises(KeyboardInterrupt):
            api.evaluate_model(run, overrides={"eval.micro_size": 2}, out="part.json")
    assert not (tmp_path / "part.json").exists()
    journal = tmp_path / ".part.json.rank-0"
    journal.write_bytes(journal.read_bytes() + b'{"loss_s')  # cut off by a kill
    (tmp_path / ".part.json.rank-1").write_bytes(journal.read_bytes())  # it had two processes
    parts: list[int] = []
    batches = Validation.batches

    def counted(self: Validation, *args: Any) -> Any:
        for batch in batches(self, *args):
            parts.append(len(batch.rows))
            yield batch

    monkeypatch.setattr(Validation, "batches", counted)
    again = api.evaluate_model(run, overrides={"eval.micro_size": 2}, out="part.json")
    assert again == whole
    assert sum(parts) == whole.rows - 6
    assert (tmp_path / "part.rows.jsonl").read_text() == (tmp_path / "whole.rows.jsonl").read_text()
    assert sorted(path.name for path in tmp_path.glob("*part*")) == ["part.json", "part.rows.jsonl"]
    assert not journal.exists()


def test_a_journal_of_other_work_is_dropped(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j", {"model": 1})
    journal.add({"a": 1}, {"a": "ü"})
    journal.close()
    again = Journal(tmp_path / "j", {"model": 1})
    assert (again.count, list(again.values())) == (2, [{"a": 1}, {"a": "ü"}])
    again.keep(1)
    again.add({"b": 2})
    assert list(again.values()) == [{"a": 1}, {"b": 2}]
    for model in (1, 2):  # neither shares the lines nor drops them
        with pytest.raises(PtftError, match="j: another command writes it now"):
            Journal(tmp_path / "j", {"model": model})
    assert list(again.values()) == [{"a": 1}, {"b": 2}]
    again.close()
    other = Journal(tmp_path / "j", {"model": 2})
    assert (other.count, list(other.values())) == (0, [])
    other.remove()
    assert not (tmp_path / "j").exists()
    with pytest.raises(PtftError, match="cannot be written"):
        Journal(tmp_path / "none" / "j", 1)


# --- perplexity -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def language_model(tmp_path_factory: pytest.TempPathFactory, documents: Path, cache: Path) -> Path:
    folder = tmp_path_factory.mktemp("language_model")
    recipe = make_recipe(documents, train={"max_steps": 2}, save={"every": None}, eval={"every": None})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PTFT_CACHE", str(cache))
        api.train(recipe, {"run_dir": str(folder / "run")}, quiet=True)
    return folder / "run"


TEXTS = ["ab cd ef gh dog eat dog " * 30, "the end", "ein zwei drei vier " * 17]


def test_strided_perplexity_is_that_of_a_loop(language_model: Path, tmp_path: Path) -> None:
    """As in the documentation of transformers: each window predicts the tokens that no window before it has had."""
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    changes = {"data.max_length": 24}
    result = api.evaluate_model(language_model, overrides=changes, data="texts.jsonl", stride=10)
    model = AutoModelForCausalLM.from_pretrained(language_model / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(language_model / "model")
    total, count = 0.0, 0
    for text in TEXTS:
        ids = [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        done = 1
        for begin in range(0, len(ids), 10):
            end = min(begin + 24, len(ids))
            window = torch.tensor([ids[begin:end]])
            with torch.no_grad():
                logprobs = model(window).logits[0].log_softmax(-1)
            for position in range(max(done, begin + 1), end):
                total -= float(logprobs[position - 1 - begin, ids[position]])
                count += 1
            done = max(done, end)
            if end == len(ids):
                break
    assert count == sum(len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in TEXTS)
    found = result.details["strided_perplexity"]
    assert (found["tokens"], found["documents"], found["window"], found["stride"]) == (count, 3, 24, 10)
    assert found["token"] == pytest.approx(math.exp(total / count), rel=1e-4)
    starts = [tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"][:1]) for text in TEXTS]
    rests = [text.removeprefix(start) for text, start in zip(TEXTS, starts, strict=True)]  # what is predicted
    size, words = sum(len(text.encode()) for text in rests), sum(len(text.split()) for text in rests)
    assert (found["bytes"], found["words"]) == (size, words)
    assert found["byte"] == pytest.approx(math.exp(total / size), rel=1e-4)
    assert found["word"] == pytest.approx(math.exp(total / words), rel=1e-4)
    assert found["bits_per_byte"] == pytest.approx(total / size / math.log(2), rel=1e-4)


def test_perplexity_by_byte_and_word(language_model: Path, tmp_path: Path) -> None:
    """Without a window, documents shorter than a row: the first token is predicted from nothing, so not at all."""
    texts = [text[:30] for text in TEXTS]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    result = api.evaluate_model(language_model, data="texts.jsonl")
    found = result.details["perplexity"]
    assert found["token"] == pytest.approx(result.metrics["eval/perplexity"], rel=1e-5)
    tokenizer = AutoTokenizer.from_pretrained(language_model / "model")
    predicted = [tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"][1:]) for text in texts]
    assert found["bytes"] == sum(len(text.encode()) for text in predicted)
    loss = math.log(found["token"]) * found["tokens"]
    assert found["byte"] == pytest.approx(math.exp(loss / found["bytes"]))


def test_the_token_before_the_targets() -> None:
    """Its text is not counted, but the space after it is, which decoders of SentencePiece remove at the beginning."""
    row = Row(np.array([5, 6, 9, 7, 8]), np.zeros(1, np.int64))
    for targets, expected in (([-100, -100, 7, 8], [9]), ([6, 9, 7, 8], [5]), ([-100] * 4, [])):
        task: Any = SimpleNamespace(_targets=lambda _row, targets=targets: np.array(targets))
        assert NextTokenTask.before_targets(task, row).tolist() == expected


def test_windows_predict_each_token_once() -> None:
    for length in (1, 2, 5, 24, 25, 100):
        rows = windows(np.arange(length), 24, 7)
        predicted = [int(t) for row in rows for t in row.input_ids[int(row.columns["scored"][0]) :]]
        assert predicted == list(range(1, length))
        assert all(len(row.input_ids) <= 24 for row in rows)


def test_words_are_counted() -> None:
    assert [count_words(text) for text in ("", "a  b\nc.", "你好 world", "今天天气 很好。")] == [0, 3, 3, 7]


def test_a_stride_that_makes_no_sense(language_model: Path, run_of: Any) -> None:
    with pytest.raises(RecipeError, match=r"--stride: 500 is not between 0 and data\.max_length"):
        api.evaluate_model(language_model, stride=500)
    with pytest.raises(RecipeError, match=r"--stride: moves a window over documents.* has another task, mlm"):
        api.evaluate_model(run_of("mlm"), stride=16)


# --- predict ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ANSWERED)
def test_predictions_have_the_scores_of_the_evaluation(run_of: Any, tmp_path: Path, task: str) -> None:
    """Scored by scikit-learn, seqeval and sacrebleu; rows without the columns of answers have the same predictions."""
    run = run_of(task)
    file, rows = validation_rows(run, task)
    metrics = api.evaluate_model(run, data=file).metrics
    assert api.predict(run, file, "out.jsonl").rows == len(rows)
    found = lines(tmp_path / "out.jsonl")
    assert [{key: value for key, value in row.items() if key != "prediction"} for row in found] == rows
    answers = [row["prediction"] for row in found]
    for name, value in scored(task, rows, answers).items():
        assert metrics[f"eval/{name}"] == pytest.approx(value, rel=1e-6), name

    bare = [{key: x for key, x in row.items() if key not in ("label", "tags", "answers", "target")} for row in rows]
    if task == "sft":
        bare = [{"messages": row["messages"][:-1]} for row in rows]
    (tmp_path / "bare.jsonl").write_text("".join(json.dumps(row) + "\n" for row in bare))
    api.predict(run, "bare.jsonl", "bare_out.jsonl")
    assert [row["prediction"] for row in lines(tmp_path / "bare_out.jsonl")] == answers


@pytest.mark.parametrize(("task", "ending"), [("classification", "csv"), ("question_answering", "tsv"), ("sft", "csv")])
def test_predictions_as_a_table(run_of: Any, tmp_path: Path, task: str, ending: str) -> None:
    """pandas reads what it makes of the JSON lines itself; a text with quotes, separators and line breaks is whole."""
    run = run_of(task)
    _, rows = validation_rows(run, task, count=6)
    if task == "classification":
        rows[0]["text"], rows[1]["note"] = 'a "quoted", text\twith\na line break', None
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    api.predict(run, "rows.jsonl", "out.jsonl")
    api.predict(run, "rows.jsonl", f"out.{ending}")
    expected = pandas.json_normalize(lines(tmp_path / "out.jsonl"))
    separator = {"csv": ",", "tsv": "\t"}[ending]
    quoting = {"csv": csv.QUOTE_MINIMAL, "tsv": csv.QUOTE_NONE}[ending]
    found = pandas.read_csv(
        tmp_path / f"out.{ending}", sep=separator, quoting=quoting, dtype=str, keep_default_na=False
    )
    assert set(found.columns) == set(expected.columns)
    for name in expected.columns:
        for cell, value in zip(found[name], expected[name], strict=True):
            missing = value is None or (isinstance(value, float) and math.isnan(value))
            written = "" if missing else cell if isinstance(value, str) else json.loads(cell)
            assert written == ("" if missing else value)


TABLE = [
    {"text": '"Great" film', "prediction": {"label": "a"}},
    {"text": ' "', "note": "x,y", "prediction": {"label": 'b"'}},
    {"text": "", "note": "half \\ud83d", "prediction": {"tags": ["O", '"']}},
]
READ_BACK = [
    {"text": '"Great" film', "prediction.label": "a", "note": "", "prediction.tags": ""},
    {"text": ' "', "prediction.label": 'b"', "note": "x,y", "prediction.tags": ""},
    {"text": "", "prediction.label": "", "note": "half \\ud83d", "prediction.tags": '["O", "\\""]'},
]


def tabled(path: Path, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The rows after they were written as a table and read as data."""
    path.write_bytes(b"".join(table(lambda: rows, SEPARATORS[path.suffix])))
    return [record.values for record in read_file(path, columns=(), unit="line")]


@pytest.mark.parametrize("ending", ["csv", "tsv"])
def test_a_table_is_read_back_unchanged(tmp_path: Path, ending: str, caplog: pytest.LogCaptureFixture) -> None:
    assert tabled(tmp_path / f"out.{ending}", TABLE) == READ_BACK
    assert caplog.messages == []


def test_a_csv_table_holds_every_line_break(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"text": f"a{gap}b", "n": "1"} for gap in ("\t", "\n", "\r", "\r\n", "\x0b", "\u2028")]
    assert tabled(tmp_path / "out.csv", rows) == rows
    assert caplog.messages == []


def test_tabs_and_line_breaks_are_spaces_in_a_tsv_table(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"text": f"a{gap}b", "n": "1"} for gap in ("\t", "\n", "\r", "\r\n", "\t\t")]
    found = tabled(tmp_path / "out.tsv", rows)
    assert [row["text"] for row in found] == ["a b"] * 4 + ["a  b"]
    (message,) = caplog.messages
    assert message.startswith("5 cells had tabs or line breaks, which a .tsv table cannot hold")
    assert "in text" in message
    assert ".csv" in message


def scored(task: str, rows: Sequence[dict[str, Any]], answers: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Metrics of predictions by other libraries."""
    if task == "classification":
        gold, predicted = [row["label"] for row in rows], [each["label"] for each in answers]
        return {
            "accuracy": sklearn.metrics.accuracy_score(gold, predicted),
            "f1_macro": sklearn.metrics.f1_score(gold, predicted, average="macro", zero_division=0),
            "mcc": sklearn.metrics.matthews_corrcoef(gold, predicted),
        }
    if task == "regression":
        gold, predicted = [row["label"] for row in rows], [each["number"] for each in answers]
        return {
            "mse": sklearn.metrics.mean_squared_error(gold, predicted),
            "pearson": float(np.corrcoef(gold, predicted)[0, 1]),
        }
    if task == "token_classification":
        tags = [row["tags"] for row in rows], [each["tags"] for each in answers]
        report = classification_report(*tags, output_dict=True, zero_division=0)
        return {"f1_micro": report["micro avg"]["f1-score"], "f1_macro": report["macro avg"]["f1-score"]}
    if task == "question_answering":
        for row, each in zip(rows, answers, strict=True):
            if each["text"]:
                assert row["context"][each["start"] : each["end"]] == each["text"]
        exact = [each["text"] in (row["answers"]["text"] or [""]) for row, each in zip(rows, answers, strict=True)]
        return {"exact_match": float(np.mean(exact))}
    texts = [each["text"] for each in answers]
    gold = [row["target"] if task == "seq2seq" else row["messages"][-1]["content"] for row in rows]
    return {"chrf": sacrebleu.corpus_chrf(texts, [gold]).score}


def test_probabilities_are_those_of_transformers(run_of: Any, tmp_path: Path) -> None:
    """Row by row, with the exported model alone; and a model without a run and a recipe predicts the same."""
    run = run_of("classification")
    file, rows = validation_rows(run, "classification")
    api.predict(run, file, "out.jsonl")
    api.predict(run / "model", file, "same.jsonl")
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "same.jsonl").read_bytes()
    copy = tmp_path / "copy"
    copy.symlink_to(run / "model")
    api.predict(copy, file, "alone.jsonl")
    model = AutoModelForSequenceClassification.from_pretrained(copy).eval()
    tokenizer = AutoTokenizer.from_pretrained(copy)
    for row, own, alone in zip(rows, lines(tmp_path / "out.jsonl"), lines(tmp_path / "alone.jsonl"), strict=True):
        with torch.no_grad():
            shares = model(**tokenizer(row["text"], return_tensors="pt")).logits[0].softmax(-1).tolist()
        expected = {model.config.id2label[i]: share for i, share in enumerate(shares)}
        for found in (own, alone):
            assert found["prediction"]["probabilities"] == pytest.approx(expected, rel=1e-5)
            assert found["prediction"]["label"] == max(expected, key=expected.__getitem__)


def test_an_interrupted_prediction_goes_on(run_of: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_of("token_classification")
    file, rows = validation_rows(run, "token_classification")
    monkeypatch.setattr(prediction, "CHUNK", 7)
    api.predict(run, file, "whole.jsonl")
    add, added = Journal.add, []

    def fail(self: Journal, *values: Any) -> None:
        add(self, *values)
        added.append(len(values))
        if len(added) == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "add", fail)
        with pytest.raises(KeyboardInterrupt):
            api.predict(run, file, "part.jsonl")
    assert not (tmp_path / "part.jsonl").exists()
    with monkeypatch.context() as patch:
        again: list[int] = []
        patch.setattr(Journal, "add", lambda self, *values: (again.append(len(values)), add(self, *values))[1])
        api.predict(run, file, "part.jsonl")
    assert sum(again) == len(rows) - 21
    assert (tmp_path / "part.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["part.jsonl", "whole.jsonl"]


def test_a_changed_file_is_answered_from_its_beginning(run_of: Any, tmp_path: Path) -> None:
    run = run_of("classification")
    file, rows = validation_rows(run, "classification", 3)
    journal = Journal(tmp_path / ".out.jsonl.journal", ["another file"])
    journal.add({"text": "old"})
    journal.close()
    api.predict(run, file, "out.jsonl")
    assert [row["text"] for row in lines(tmp_path / "out.jsonl")] == [row["text"] for row in rows]


def test_a_changed_custom_step_answers_all_rows_again(
    run_of: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_of("classification")
    file, _ = validation_rows(run, "classification", 3)
    module, steps = run.parent / "more_words.py", {"data.steps": [{"custom": {"function": "more_words.step"}}]}
    module.write_text("def step(text):\n    return text\n")
    with monkeypatch.context() as patch:
        patch.setattr(Journal, "lines", lambda _self: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            api.predict(run, file, "out.jsonl", overrides=steps)
    module.write_text("def step(text):\n    return text + ' dog bird'\n")
    api.predict(run, file, "out.jsonl", overrides=steps)
    api.predict(run, file, "whole.jsonl", overrides=steps)
    assert lines(tmp_path / "out.jsonl") == lines(tmp_path / "whole.jsonl")


def test_rows_without_an_answer_say_why(run_of: Any, tmp_path: Path) -> None:
    run = run_of("token_classification")
    (tmp_path / "in.jsonl").write_text('{"tokens": ["cat"]}\n{"tokens": []}\n')
    result = api.predict(run, "in.jsonl", "out.jsonl")
    assert (result.rows, result.unanswered) == (2, 1)
    assert [list(row["prediction"]) for row in lines(tmp_path / "out.jsonl")] == [["tags"], ["problem"]]
    assert lines(tmp_path / "out.jsonl")[1]["prediction"]["problem"] == "without words"


def test_a_question_that_does_not_fit_is_not_replaced_by_an_earlier_one(
    run_of: Any, tmp_path: Path, cache: Path
) -> None:
    """Also if it is the only row of a process."""
    asked, answered = {"role": "user", "content": "red cat"}, {"role": "assistant", "content": "it sleeps"}
    long = {"role": "user", "content": "the dog " * 60}
    rows = [[asked, answered, asked], [asked, answered, long], [long]]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    assert api.predict(run_of("sft"), "in.jsonl", "out.jsonl").unanswered == 2
    first, *others = (row["prediction"] for row in lines(tmp_path / "out.jsonl"))
    assert list(first) == ["text"]
    assert others == [{"problem": NO_ANSWER_LEFT}] * 2
    words = ("predict", str(run_of("sft")), "--file", "in.jsonl", "--out", "two.jsonl")
    done = start(*words, cwd=tmp_path, cache=cache, ranks=2)
    assert done.wait() == 0, done.stderr
    assert (tmp_path / "two.jsonl").read_bytes() == (tmp_path / "out.jsonl").read_bytes()


def test_a_run_with_packed_conversations_answers_each(tmp_path: Path) -> None:
    """Packing is for training: answers and losses are those without it."""
    changes = {
        **SHORT,
        "model": {"config": {"max_position_embeddings": 192}},
        "data": {"max_length": 120},
        "sft": {"packing": True, "generation": None},
    }
    api.train(write_tiny(tmp_path, "sft", **changes), {"run_dir": "run"}, quiet=True)
    (tmp_path / "in.jsonl").write_text('{"messages": [{"role": "user", "content": "red cat"}]}\n' * 2)
    api.predict("run", "in.jsonl", "packed.jsonl")
    api.predict("run", "in.jsonl", "alone.jsonl", overrides={"sft.packing": False})
    assert lines(tmp_path / "packed.jsonl") == lines(tmp_path / "alone.jsonl")
    assert [list(row["prediction"]) for row in lines(tmp_path / "packed.jsonl")] == [["text"], ["text"]]
    packed, alone = api.evaluate_model("run"), api.evaluate_model("run", overrides={"sft.packing": False})
    assert packed.rows < alone.rows
    assert packed.metrics["eval/loss"] == pytest.approx(alone.metrics["eval/loss"], rel=1e-5)
    assert lines(tmp_path / "run/evaluation.rows.jsonl")[-1]["row"] == packed.rows - 1


def test_half_a_surrogate_pair_in_another_column_is_kept(run_of: Any, tmp_path: Path) -> None:
    """JSON can spell it, and UTF-8 cannot."""
    (tmp_path / "in.jsonl").write_text('{"text": "a cat", "note": "\\ud83d"}\n')
    api.predict(run_of("classification"), "in.jsonl", "out.jsonl")
    assert lines(tmp_path / "out.jsonl")[0]["note"] == "\ud83d"


def test_columns_are_mapped_as_in_training(run_of: Any, tmp_path: Path) -> None:
    run = run_of("classification")
    (tmp_path / "in.csv").write_text("review,stars\ngood cat,5\nbad house,1\n")
    fields = {"data.train": [{"path": "none.jsonl", "fields": {"text": "review", "label": "gone"}}]}
    api.predict(run, "in.csv", "out.jsonl", overrides=fields)
    found = lines(tmp_path / "out.jsonl")
    assert [(row["text"], row["stars"]) for row in found] == [("good cat", "5"), ("bad house", "1")]


def wide(text: str) -> str:
    """The text in full-width letters, which NFKC undoes."""
    return "".join(chr(ord(letter) + 0xFEE0) if "a" <= letter <= "z" else letter for letter in text)


def test_the_network_reads_rows_after_the_steps_that_edit(run_of: Any, tmp_path: Path) -> None:
    """Steps that drop rows and deduplications are left out: each row is answered, and written as it was given."""
    run = run_of("classification")
    _, rows = validation_rows(run, "classification", 6)
    for name, change in (("plain", str), ("wide", wide)):
        texts = [change(rows[i]["text"]) for i in (0, 1, 2, 3, 4, 5, 0)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    drops = ["exact_dedup", "near_dedup", {"exact_dedup": {"unit": "line"}}, {"language": {"keep": ["zh"]}}, "quality"]
    steps = {"data.steps": [{"unicode": {"form": "NFKC"}}, *drops, {"decontaminate": {"files": ["none.jsonl"]}}]}
    api.predict(run, "plain.jsonl", "plain_out.jsonl")
    result = api.predict(run, "wide.jsonl", "wide_out.jsonl", overrides=steps)
    assert (result.rows, result.unanswered) == (7, 0)
    plain, found = lines(tmp_path / "plain_out.jsonl"), lines(tmp_path / "wide_out.jsonl")
    assert [row["text"] for row in found] == [wide(row["text"]) for row in plain]
    assert [row["prediction"] for row in found] == [row["prediction"] for row in plain]


def test_a_row_that_a_step_empties_says_why(run_of: Any, tmp_path: Path) -> None:
    """Rows are checked after the steps: one of them repairs half a surrogate pair."""
    texts = ["\u200b", "a cat \ud83d", "a cat"]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    steps = {"data.steps": ["control", "unicode"]}
    result = api.predict(run_of("classification"), "in.jsonl", "out.jsonl", overrides=steps)
    assert (result.rows, result.unanswered) == (3, 1)
    found = lines(tmp_path / "out.jsonl")
    assert [row["text"] for row in found] == texts
    assert found[0]["prediction"] == {"problem": "data.steps: no text is left"}
    assert [list(row["prediction"]) for row in found[1:]] == [["label", "probabilities"]] * 2


def test_a_made_up_answer_is_not_edited(run_of: Any, tmp_path: Path) -> None:
    """A conversation without its answer gets a short one, which this step would drop."""
    (tmp_path / "no_short_texts.py").write_text("def step(text):\n    return text if len(text) > 5 else None\n")
    run = run_of("sft")
    _, rows = validation_rows(run, "sft", 2)
    rows = [{"messages": row["messages"][:-1]} for row in rows]
    rows.append({"messages": [{"role": "user", "content": "hm"}]})
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    steps = {"data.steps": [{"custom": {"function": "no_short_texts.step"}}]}
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(tmp_path))
        api.predict(run, "in.jsonl", "out.jsonl", overrides=steps)
    problem = {"problem": "data.steps: custom: no_short_texts.step"}
    assert [row["prediction"] == problem for row in lines(tmp_path / "out.jsonl")] == [False, False, True]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ('{"text": "a"}\n{"words": "b"}\n', r"in\.jsonl:2: there is no field 'text'; the fields are: 'words'\."),
        ('{"text": "a"}\n{"text": ""}\n', r"in\.jsonl:2: the field 'text' is empty"),
        ('{"text": "a", "prediction": 1}\n', r"in\.jsonl:1: the row has a field 'prediction' already"),
        ('{"text": "a"}\nnothing\n', r"in\.jsonl:2: not JSON"),
        ("", r"in\.jsonl: the file is empty"),
    ],
)
def test_bad_rows_are_named(run_of: Any, tmp_path: Path, rows: str, message: str) -> None:
    (tmp_path / "in.jsonl").write_text(rows)
    with pytest.raises(DataError, match=message):
        api.predict(run_of("classification"), "in.jsonl", "out.jsonl")
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_what_cannot_be_predicted_is_said(run_of: Any, language_model: Path, tmp_path: Path) -> None:
    run = run_of("classification")
    (tmp_path / "in.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(DataError, match=r"nothing\.jsonl does not exist"):
        api.predict(run, "nothing.jsonl", "out.jsonl")
    with pytest.raises(RecipeError, match=r"out\.txt: the answers are written as JSON lines or .*: out\.jsonl$"):
        api.predict(run, "in.jsonl", "out.txt")
    with pytest.raises(RecipeError, match="this is the file with the rows"):
        api.predict(run, "in.jsonl", "in.jsonl")
    with pytest.raises(RecipeError, match="this is a directory"):
        api.predict(run, "in.jsonl", tmp_path)
    with pytest.raises(RecipeError, match=r"task clm gives no answers to rows\. For texts use ptft generate"):
        api.predict(language_model, "in.jsonl", "out.jsonl")
    with pytest.raises(RecipeError, match="task reward gives no answers to rows"):
        api.predict(run_of("reward"), "in.jsonl", "out.jsonl")
    with pytest.raises(RecipeError, match="task sft gives no answers to rows with these settings"):
        api.predict(run_of("sft"), "in.jsonl", "out.jsonl", overrides={"sft": {"shape": "text"}})
    with pytest.raises(RecipeError, match="there is no directory"):
        api.predict("./nowhere", "in.jsonl", "out.jsonl")
    with pytest.raises(RecipeError, match=re.escape("classification.labels")):
        api.predict(run, "in.jsonl", "out.jsonl", overrides={"classification.labels": ["one"]})


# --- without a recipe -------------------------------------------------------------------------------------------------

NETWORKS: dict[str, tuple[dict[str, Any], str, dict[str, Any]]] = {
    "BertForSequenceClassification": ({"id2label": {0: "no", 1: "yes"}}, "classification", {"labels": ["no", "yes"]}),
    "RobertaForSequenceClassification": ({"num_labels": 1}, "regression", {}),
    "BertForTokenClassification": (
        {"id2label": {0: "O", 1: "B-X", 2: "I-X"}},
        "token_classification",
        {"labels": ["O", "B-X", "I-X"], "scheme": "iob2"},
    ),
    "RobertaForTokenClassification": (
        {"id2label": {0: "O", 1: "B-X", 2: "I-X", 3: "E-X", 4: "S-X"}},
        "token_classification",
        {"scheme": "bioes"},
    ),
    "ElectraForTokenClassification": ({"id2label": {0: "NOUN", 1: "ADJ"}}, "token_classification", {"scheme": "plain"}),
    "BertForQuestionAnswering": ({}, "question_answering", {}),
    "BertForMaskedLM": ({}, "mlm", {}),
    "T5ForConditionalGeneration": ({}, "seq2seq", {}),
    "LlamaForCausalLM": ({}, "clm", {}),
    "GPT2LMHeadModel": ({}, "clm", {}),
}


@pytest.mark.parametrize("architecture", NETWORKS)
def test_a_task_follows_from_the_architecture(tmp_path: Path, architecture: str) -> None:
    more, task, settings = NETWORKS[architecture]
    model_type = re.split("For|LM", architecture)[0].lower()
    config = {"model_type": model_type, "architectures": [architecture], **more}
    (tmp_path / "config.json").write_text(json.dumps(config))
    recipe = recipe_of(str(tmp_path), Path("rows.jsonl"))
    assert recipe["task"] == task
    for key, value in settings.items():
        assert recipe[task][key] == value
    loaded = api.load_recipe(recipe)
    assert loaded.recipe.task == task


def test_an_unknown_architecture_needs_a_recipe(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert", "architectures": ["BertModel"]}')
    with pytest.raises(RecipeError, match=r"no task is known for BertModel\. Give a RECIPE"):
        find_target(tmp_path, None, [], Path("rows.jsonl"))
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "x"}')
    with pytest.raises(RecipeError, match="an adapter directory does not say how rows are read"):
        find_target(tmp_path, None, [], Path("rows.jsonl"))


def test_every_task_with_rows_of_answers_is_here() -> None:
    assert {task for task in TRAINED if encoder_class(task).answer_roles} == set(ANSWERED)


def test_evaluations_are_compared_example_by_example(run_of: Any) -> None:
    """The files of `ptft evaluate` are those that `ptft compare` reads, also where an example has several rows."""
    run = run_of("token_classification")
    other = run.parent / "other"
    if not other.exists():
        shutil.copytree(run, other)
    for each in (run, other):
        result = api.evaluate_model(each)
        assert result.rows >= result.examples == len(lines(each / "evaluation.rows.jsonl"))
    evaluations = [read_run(each).evaluation for each in (run, other)]
    assert evaluations[0] is not None
    assert evaluations[1] is not None
    assert why_not_paired(evaluations[0], evaluations[1]) is None
    tested = paired(evaluations[0], evaluations[1])
    assert set(tested) == {"loss", "accuracy"}
    assert tested["loss"].difference.value == 0
    assert evaluations[0].intervals()["loss"].value == pytest.approx(result.metrics["eval/loss"], rel=1e-5)


# --- adapters and several processes -----------------------------------------------------------------------------------


def test_an_adapter_predicts_on_its_base(run_of: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """As peft does, row by row; the run, and its adapter directory with the recipe. The base has no labels and no head:
    that of the adapter is not said to be random."""
    base = shutil.copytree(run_of("classification") / "model", tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    save_file({name: x for name, x in weights.items() if "classifier" not in name}, base / "model.safetensors")
    config = json.loads((base / "config.json").read_text())
    labels = list(config.pop("id2label").values())
    (base / "config.json").write_text(json.dumps(config))
    recipe = write_adapted(tmp_path, base, "classification", METHODS["lora"], **SHORT)
    api.train(recipe)
    assert "initialized at random" in capfd.readouterr().err
    file, rows = validation_rows(run_of("classification"), "classification", 10)
    api.predict("run", file, "out.jsonl")
    assert "initialized at random" not in capfd.readouterr().err
    shutil.copytree("run/model", "elsewhere")
    api.predict("elsewhere", file, "same.jsonl", source=recipe)
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "same.jsonl").read_bytes()
    assert list(lines(tmp_path / "out.jsonl")[0]["prediction"]["probabilities"]) == labels
    with pytest.raises(RecipeError, match=f"the head of .* was trained for the labels {', '.join(labels)}"):
        api.evaluate_model("elsewhere", recipe, overrides={"classification.labels": labels[::-1]})
    model = AutoPeftModelForSequenceClassification.from_pretrained("run/model", num_labels=2).eval()
    tokenizer = AutoTokenizer.from_pretrained("run/model")
    for row, found in zip(rows, lines(tmp_path / "out.jsonl"), strict=True):
        with torch.no_grad():
            shares = model(**tokenizer(row["text"], return_tensors="pt")).logits[0].softmax(-1).tolist()
        assert list(found["prediction"]["probabilities"].values()) == pytest.approx(shares, rel=1e-5)


def test_the_exported_ranks_are_those_that_were_evaluated(run_of: Any, tmp_path: Path) -> None:
    """AdaLoRA's last allocation is not that of an earlier checkpoint."""
    adapt = {"adapt": {"adalora": {"r": 6, "target_r": 2, "start": 0.0, "end": 0.3}}}
    changes: dict[str, Any] = {
        "train": {"max_steps": 16},
        "optim": {"lr": 0.02, "schedule": "constant"},
        "eval": {"every": 2, "goal": "max"},  # so that the best evaluation is an early one
        "save": {"best": True, "export": "best"},
    }
    result = api.train(
        write_adapted(tmp_path, run_of("classification") / "model", "classification", adapt, **changes), quiet=True
    )
    assert result.metrics_step < 16
    assert api.evaluate_model("run").metrics["eval/loss"] == pytest.approx(result.metrics["eval/loss"], rel=1e-6)


@pytest.mark.parametrize(("task", "kind"), [("token_classification", "cpu_zero3"), ("sft", "cpu")])
def test_two_processes_evaluate_and_predict_alike(
    run_of: Any, tmp_path: Path, cache: Path, task: str, kind: str
) -> None:
    """A split sentence and generated answers; an odd number of rows, so that a process has fewer than the other."""
    run = run_of(task)
    file, rows = validation_rows(run, task, 7)
    expected = api.evaluate_model(run, out="one.json")
    api.predict(run, file, "one.jsonl")
    done = start("evaluate", str(run), "--out", "two.json", cwd=tmp_path, cache=cache, ranks=2, kind=kind)
    assert done.wait() == 0, done.stderr
    found = json.loads((tmp_path / "two.json").read_text())
    assert found["metrics"] == pytest.approx(expected.metrics, rel=1e-6)
    assert (found["judged"], found["rows"]) == (expected.judged, expected.rows)
    words = ("predict", str(run), "--file", str(file), "--out", "two.jsonl")
    done = start(*words, cwd=tmp_path, cache=cache, ranks=2, kind=kind)
    assert done.wait() == 0, done.stderr
    assert done.stdout == f"{len(rows)} rows in two.jsonl\n"
    assert (tmp_path / "two.jsonl").read_bytes() == (tmp_path / "one.jsonl").read_bytes()


def test_a_launch_config_starts_the_processes(
    run_of: Any, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_of("classification")
    words = ("evaluate", str(run), "--launch", "cpu", "--processes", "2", "--data", "nothing.jsonl")
    done = forked_ptft(*words, cwd=tmp_path, env={"PTFT_CACHE": str(cache)})
    assert done.returncode == 3  # the exit code of the rank, not of the launcher
    assert done.stderr.count("nothing.jsonl does not exist") == 1
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(RecipeError, match="no effect in a process that a launcher has started"):
        launched("cpu", 2, ["evaluate"])
