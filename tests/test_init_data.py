"""`ptft init --data`: what it sees in files of all kinds, and recipes that run."""

from __future__ import annotations

import csv
import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import environment, start, train_rows
from tiny import ALL, made, write_rows

from ptft_dist.api import load_recipe
from ptft_dist.cli.init import init
from ptft_dist.data.sources import check_sources
from ptft_dist.data.survey import Column, estimated_tokens, kind_of, survey, text_of
from ptft_dist.errors import DataError, RecipeError
from ptft_dist.tasks.proposals import NEEDS, fitting_tasks
from ptft_dist.tasks.registry import TASKS

LABELLED = [{"sentence": f"row {i} has words", "gold": "good" if i % 3 else "bad"} for i in range(90)]


def write_table(path: Path, delimiter: str) -> None:
    with path.open("w", newline="") as file:
        table = csv.DictWriter(file, list(LABELLED[0]), delimiter=delimiter)
        table.writeheader()
        table.writerows(LABELLED)


def write_parquet(path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(LABELLED), path)


def write_conll(path: Path) -> None:
    sentence = "Ann\tB-PER\nBlack\tI-PER\nlives\tO\nin\tO\nRome\tB-LOC\n\n"
    path.write_text("".join(sentence.replace("lives", f"lived{i}") for i in range(60)))


def write_folder(path: Path) -> None:
    path.mkdir()
    for i in range(3):
        (path / f"{i}.txt").write_text("\n\n".join(f"Paragraph {i} {j} has some words." for j in range(40)))


COLUMNS: dict[str, Any] = {"fields": {"text": "sentence", "label": "gold"}}
FILES: dict[str, tuple[Callable[[Path], Any], str, dict[str, Any]]] = {
    "rows.csv": (lambda path: write_table(path, ","), "classification", COLUMNS),
    "rows.tsv": (lambda path: write_table(path, "\t"), "classification", COLUMNS),
    "rows.jsonl": (lambda path: write_rows(path, LABELLED), "classification", COLUMNS),
    "rows.json": (lambda path: path.write_text(json.dumps(LABELLED)), "classification", COLUMNS),
    "rows.parquet": (write_parquet, "classification", COLUMNS),
    "rows.conll": (write_conll, "token_classification", {}),
    "lines.txt": (
        lambda path: path.write_text("".join(f"line {i} of text\n" for i in range(90))),
        "clm",
        {"document": "line"},
    ),
    "folder": (write_folder, "clm", {"document": "paragraph"}),
}


def made_from(folder: Path, data: str, *words: str, **options: Any) -> dict[str, Any]:
    """The recipe that `ptft init --data` writes, which has to be valid."""
    before = set(folder.glob("*.yaml"))
    init(*words, data=Path(data), **options)
    (path,) = set(folder.glob("*.yaml")) - before
    loaded = load_recipe(path)
    check_sources(loaded.recipe, loaded.base)
    return loaded.recipe.own_values()


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_each_kind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write, task, expected = FILES[name]
    write(Path(name))
    recipe = made_from(tmp_path, name)
    assert recipe["task"] == task
    (source,) = recipe["data"]["train"]
    assert source["path"] == ("folder/**/*.txt" if name == "folder" else name)
    assert {key: source[key] for key in expected} == expected
    said = capsys.readouterr().out
    assert f"ptft config check {task}.yaml" in said
    assert f"wrote {task}.yaml" in said
    if task == "classification":
        assert f"{name}: 90 rows" in said
        assert "column gold: text; good: 60, bad: 30 -> label" in said
        assert recipe["data"]["max_length"] == 32  # about 6 tokens and 16 for a template, in multiples of 16
        assert recipe["data"]["validation"] == 0.1


def write_tiny_rows(folder: Path, task: str) -> Path:
    rows = made(80, ALL[task][1])
    for row in rows:
        row.pop("margin", None)
    return write_rows(folder / "rows.jsonl", rows)


EXPECTED = {task: task for task in ALL} | {"reward": "dpo", "rloo": "grpo", "ppo": "grpo"}
EXPECTED |= dict.fromkeys(("mlm", "mlm_nsp", "plm", "span_corruption"), "clm")


@pytest.mark.parametrize("task", ALL)
def test_rows_of_every_task_are_recognized(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, task: str) -> None:
    """Those that share their columns with another task are made if they are asked for."""
    monkeypatch.chdir(tmp_path)
    write_tiny_rows(tmp_path, task)
    assert made_from(tmp_path, "rows.jsonl")["task"] == EXPECTED[task]
    for path in tmp_path.glob("*.yaml"):
        path.unlink()
    assert made_from(tmp_path, "rows.jsonl", task)["task"] == task


@pytest.mark.parametrize(
    ("row", "task", "fields", "settings"),
    [
        (
            {"question": "q", "answer": "a b"},
            "sft",
            {"prompt": "question", "completion": "answer"},
            {"shape": "single_turn"},
        ),
        (
            {"instruction": "q", "context": "c", "response": "a"},
            "sft",
            {"input": "context", "output": "response"},
            {"shape": "alpaca"},
        ),
        ({"conversations": [{"from": "human", "value": "a"}]}, "sft", {}, {"shape": "sharegpt"}),
        (
            {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"},
            "dpo",
            {},
            {"shape": "hh"},
        ),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "dpo", {}, {"shape": "single_turn"}),
        ({"messages": [{"role": "user", "content": "a"}], "label": True}, "kto", {}, {"shape": "messages"}),
        ({"prompt": "a b", "source": "x"}, "grpo", {}, {"shape": "single_turn"}),
        ({"en": "a b c", "de": "d e"}, "seq2seq", {"source": "en", "target": "de"}, {"max_target_length": 8}),
        ({"title": "a", "author": "b", "text": "a long text"}, "clm", {}, {}),
    ],
)
def test_columns_and_the_task(
    tmp_path: Path, row: dict[str, Any], task: str, fields: dict[str, str], settings: dict[str, Any]
) -> None:
    write_rows(tmp_path / "rows.jsonl", [row] * 3)
    proposed, fit = next(iter(fitting_tasks(survey(tmp_path / "rows.jsonl")).items()))
    assert (proposed, fit.renamed, fit.settings) == (task, fields, settings)


def test_what_was_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Languages are those of the texts, not of tags; columns that are read without a mapping are not called unused."""
    monkeypatch.chdir(tmp_path)
    Path("tags.conll").write_text("".join(f"{word}\tB-PERSON.NAME\n" for word in "北京大学") + "\n")
    turns = [{"from": "human", "value": "天气怎么样？"}, {"from": "gpt", "value": "天气很好。"}]
    tools = json.dumps([{"name": "weather", "description": "The weather of a city. " * 20, "parameters": {}}])
    write_rows(tmp_path / "calls.jsonl", [{"conversations": turns, "tools": tools, "id": "a"}])
    write_rows(tmp_path / "prompts.jsonl", [{"prompt": "二加二？", "answer": 4}])
    made_from(tmp_path, "tags.conll")
    assert "languages: zh 100%" in capsys.readouterr().out
    assert made_from(tmp_path, "calls.jsonl")["data"]["max_length"] > 100  # the tools are in the prompt
    said = capsys.readouterr().out
    assert "languages: zh 100%" in said
    assert re.search("^column tools: .* -> tools$", said, re.MULTILINE)
    assert re.search(r"^column id: .* \(not used\)$", said, re.MULTILINE)
    init("grpo", data=Path("prompts.jsonl"))
    assert re.search(r"^column answer: .* \(for reward functions\)$", capsys.readouterr().out, re.MULTILINE)


def test_labels(tmp_path: Path) -> None:
    def first(rows: list[dict[str, Any]]) -> tuple[str, dict[str, str], dict[str, Any]]:
        fits = fitting_tasks(survey(write_rows(tmp_path / "rows.jsonl", rows)))
        task, fit = next(iter(fits.items()))
        return task, fit.renamed, fit.settings

    pair = {"text": "premise", "text_pair": "hypothesis"}
    assert first([{"premise": "a", "hypothesis": f"b{i}", "label": i % 3} for i in range(30)]) == (
        "classification",
        pair,
        {"pair": True},
    )
    assert first([{"sentence1": "a", "sentence2": "b", "score": i / 7} for i in range(30)])[0] == "regression"
    assert first([{"text": "a", "labels": ["x", "y"][: i % 3]} for i in range(30)]) == (
        "classification",
        {"label": "labels"},
        {"multi_label": True},
    )
    spans = {"text": "a b", "head": [0, 1], "tail": [2, 3]}
    assert first([{**spans, "relation": "xy"[i % 2]} for i in range(30)]) == (
        "classification",
        {"label": "relation"},
        {"entities": True},
    )


@pytest.mark.parametrize(
    ("tags", "scheme"),
    [
        (["B-A", "I-A", "O"], "iob2"),
        (["I-A", "I-A", "O"], "iob1"),
        (["B-A", "E-A", "S-B"], "bioes"),
        (["NOUN", "VERB", "DET"], "plain"),
        (["B-PER", "L-PER", "U-LOC"], "bilou"),
        (["B", "E", "S"], "bioes"),
        (["B", "M", "E"], "bmes"),
    ],
)
def test_the_scheme_of_tags(tmp_path: Path, tags: list[str], scheme: str) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [{"tokens": ["a", "b", "c"], "tags": tags}])
    assert fitting_tasks(survey(path))["token_classification"].settings == {"scheme": scheme}


def test_a_file_of_validation_rows_beside_the_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("train", "dev", "test"):
        write_rows(tmp_path / f"{name}.jsonl", LABELLED)
    (source,) = made_from(tmp_path, "train.jsonl")["data"]["validation"]
    assert source["path"] == "dev.jsonl"
    assert source["fields"] == {"text": "sentence", "label": "gold"}


def test_the_recipe_lies_in_another_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "rows.jsonl", LABELLED)
    init("classification", "new/project", data=Path("rows.jsonl"))
    loaded = load_recipe("new/project/classification.yaml")
    check_sources(loaded.recipe, loaded.base)
    assert loaded.recipe.data.train[0].path == "../../rows.jsonl"


def test_the_data_lie_in_the_home_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Quoted, or as --data=~/rows.jsonl, a shell leaves the tilde as it is."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    write_rows(tmp_path / "rows/train.jsonl", LABELLED)
    for name in ("file", "folder"):
        init("classification", name, data=Path("~/rows" if name == "folder" else "~/rows/train.jsonl"))
        loaded = load_recipe(f"{name}/classification.yaml")
        check_sources(loaded.recipe, loaded.base)


def test_a_pretrained_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "rows.jsonl", LABELLED)
    recipe = made_from(tmp_path, "rows.jsonl", model="org/name")
    assert (recipe["model"]["path"], recipe["tokenizer"]["path"], recipe["optim"]["lr"]) == (
        "org/name",
        "org/name",
        2e-5,
    )
    (tmp_path / "net").mkdir()
    init("classification", "sub", data=Path("rows.jsonl"), model="net")
    assert load_recipe("sub/classification.yaml").recipe.model.path == "../net"  # as for the data


@pytest.mark.parametrize("gpus", [0, 1, 3, 8])
def test_batches_fit_the_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpus: int) -> None:
    monkeypatch.setattr("ptft_dist.starter._gpus", lambda: gpus)
    monkeypatch.setattr("ptft_dist.starter.default_launch", lambda: "multi_gpu" if gpus else "cpu")
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "rows.jsonl", LABELLED * 10)
    recipe = made_from(tmp_path, "rows.jsonl")
    batch = recipe["batch"]
    assert batch["global_size"] % (batch["micro_size"] * max(1, gpus)) == 0
    assert 16 < batch["global_size"] <= 32
    assert recipe["train"]["max_steps"] == 3 * 900 // batch["global_size"]
    assert recipe["train"]["precision"] == ("bf16" if gpus else "fp32")


def test_bad_rows_are_found_and_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [{"instruction": f"say {i}", "output": "" if i in (7, 9) else "a"} for i in range(80)]
    write_rows(tmp_path / "rows.jsonl", rows)
    assert made_from(tmp_path, "rows.jsonl")["data"]["bad_rows"] == "skip"
    assert "2 rows cannot be used and are skipped, such as rows.jsonl:8: the field 'output'" in capsys.readouterr().out


def test_what_to_train_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "rows.jsonl", [{"prompt": f"a {i}"} for i in range(80)])
    assert made_from(tmp_path, "rows.jsonl")["model"]["path"] == "runs/sft/model"
    said = capsys.readouterr().out
    assert "ptft train sft " in said
    assert "ptft train reward " in said
    made_from(tmp_path, "rows.jsonl", "ppo", model="org/name")
    assert "ptft train sft " not in capsys.readouterr().out


@pytest.mark.parametrize("task", ["ppo", "grpo", "rloo"])
@pytest.mark.parametrize("count", [3, 12, 60, 500])
def test_few_prompts_are_enough_for_a_rollout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, task: str, count: int
) -> None:
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "rows.jsonl", [{"prompt": f"tell me {i}"} for i in range(count)])
    recipe = made_from(tmp_path, "rows.jsonl", task, model="org/name")
    assert count / 3 < recipe[task]["prompts"] <= count or recipe[task]["prompts"] >= 16
    responses = recipe[task]["prompts"] * recipe[task].get("group_size", 1)
    assert responses % recipe["batch"]["global_size"] == 0
    assert (
        f"# Written by: ptft init {task} --data rows.jsonl --model org/name\n"
        in (tmp_path / f"{task}.yaml").read_text()
    )
    assert recipe["data"]["max_length"] >= 64  # a chat model's template may add a system message


def test_few_rows_have_no_validation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "rows.jsonl", LABELLED[:20])
    recipe = made_from(tmp_path, "rows.jsonl")
    assert (recipe["data"]["validation"], recipe["eval"]["every"]) == (None, None)


def test_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "odd.jsonl", [{"a": 1, "b": [[1]]}])
    write_rows(tmp_path / "rows.jsonl", LABELLED)
    (tmp_path / "mixed").mkdir()
    write_rows(tmp_path / "mixed/a.jsonl", LABELLED)
    (tmp_path / "mixed/b.txt").write_text("text")
    no_task, other_task = (
        "fit no task; they are a (number), b (other). Needed:",
        "do not fit task dpo; they are sentence",
    )
    cases: list[tuple[tuple[str, ...], dict[str, Any], type[Exception], list[str]]] = [
        ((), {"data": "odd.jsonl"}, DataError, [no_task, "  seq2seq: source and target"]),
        (
            ("dpo",),
            {"data": "rows.jsonl"},
            DataError,
            [other_task, "  dpo, reward: chosen", "They fit: classification"],
        ),
        (("mixed",), {"data": "mixed"}, DataError, ["the folder has 1 x .jsonl, 1 x .txt"]),
        ((), {"data": "missing.csv"}, DataError, ["no such file"]),
        (
            ("clasification",),
            {"data": "rows.jsonl"},
            RecipeError,
            ["no task clasification; did you mean classification"],
        ),
        (("x", "y"), {"data": "rows.jsonl"}, RecipeError, ["there is no task x; the tasks are clm"]),
        (("prompting",), {"data": "rows.jsonl"}, RecipeError, ["evaluated only"]),
        ((), {"data": "rows.jsonl", "launch": "cpu"}, RecipeError, ["--launch: has no effect with --data"]),
        (("here",), {"model": "x"}, RecipeError, ["--model: has no effect here"]),
        ((), {}, RecipeError, ["expected one directory"]),
    ]
    for words, options, error, says in cases:
        given = options | ({"data": Path(options["data"])} if "data" in options else {})
        with pytest.raises(error) as raised:
            init(*words, **given)
        assert all(text in str(raised.value) for text in says), raised.value
    assert not list(tmp_path.glob("*.yaml"))
    (tmp_path / "classification.yaml").write_text("mine")
    with pytest.raises(RecipeError, match="already exists, nothing was written"):
        init(data=Path("rows.jsonl"))
    assert (tmp_path / "classification.yaml").read_text() == "mine"


def test_every_task_that_trains_says_what_it_needs() -> None:
    named = [task for tasks in NEEDS for task in tasks.split(", ")]
    assert Counter(named) == Counter(task for task, spec in TASKS.items() if spec.settings.trains)


def test_kinds_and_lengths() -> None:
    message, turn = {"role": "user", "content": "a"}, {"from": "gpt", "value": "a"}
    values = {"text": "a", "number": 1.5, "boolean": True, "texts": ["a"], "numbers": [1, 2], "other": {"a": 1}}
    values |= {"messages": [message], "message": message, "turns": [turn], "turn": turn}
    values |= {"answers": {"text": [], "answer_start": []}}
    assert {kind_of(value): value for value in values.values()} == values
    assert kind_of(None) is kind_of("") is kind_of([]) is None  # an empty list may be one of anything
    parts = [{"role": "user", "content": [{"type": "text", "text": "two"}, {"type": "text", "text": "words."}]}]
    assert text_of(parts) == "two words."
    assert estimated_tokens("two words.") == round(1.5 * 3)
    assert estimated_tokens("中文字") == round(1.5 * 3)


def test_a_number_beyond_all_floats() -> None:
    column = Column("score")
    for value in (10**400, 1):
        column.add(value)
    assert (column.kind, column.numeric, column.whole) == ("number", True, True)


@pytest.mark.parametrize("name", ["rows.csv", "folder"])
def test_the_recipe_trains(tmp_path: Path, cache: Path, name: str) -> None:
    write, task, _ = FILES[name]
    write(tmp_path / name)
    made_recipe = start("init", "--data", name, cwd=tmp_path, cache=cache)
    assert made_recipe.wait() == 0, made_recipe.stderr
    run = start("train", f"{task}.yaml", "train.max_steps=2", "log.report=false", cwd=tmp_path, cache=cache)
    assert run.wait() == 0, run.stderr
    assert len(train_rows(tmp_path / f"runs/{task}")) == 2


def test_it_imports_no_torch(tmp_path: Path) -> None:
    import subprocess
    import sys

    write_rows(tmp_path / "rows.jsonl", LABELLED)
    probe = (
        "import sys; sys.argv = ['ptft', 'init', '--data', 'rows.jsonl']\n"
        "from ptft_dist.cli import main\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "assert not {'torch', 'transformers', 'accelerate', 'deepspeed', 'datasets'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", probe], check=True, capture_output=True, cwd=tmp_path, env=environment())
    assert (tmp_path / "classification.yaml").is_file()
