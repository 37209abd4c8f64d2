"""Recipes: parsing, validation, and the text of messages."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import in_process
import pytest
from pydantic import ValidationError
from ruamel.yaml import YAML

from ptft_dist.api import load_recipe
from ptft_dist.config.load import Loaded, describe
from ptft_dist.config.places import local_directory
from ptft_dist.config.recipe import Source
from ptft_dist.config.resolve import batch_shape
from ptft_dist.config.shipped import find_shipped, shipped
from ptft_dist.data.cache import cache_root
from ptft_dist.data.sources import source_files
from ptft_dist.errors import RecipeError
from ptft_dist.tasks.registry import TASKS, recipe_class

GOOD = """\
task: clm
model:
  config: {model_type: llama, hidden_size: 64}
tokenizer:
  train: {vocab_size: 512}
data:
  train:
    - source: python-stdlib
    - path: texts/*.txt
  validation: 0.02
batch:
  global_size: 64
  micro_size: 8
optim:
  lr: 1e-3
  betas: [0.9, 0.95]
train:
  max_steps: 300
run_dir: runs/clm
"""


def load(folder: Path, text: str = GOOD, *overrides: str) -> Loaded:
    file = folder / "recipe.yaml"
    file.write_text(text, encoding="utf-8")
    return load_recipe(str(file), overrides)


def refused(folder: Path, text: str = GOOD, *overrides: str) -> list[str]:
    """The lines of the error, without the folder."""
    with pytest.raises(RecipeError) as error:
        load(folder, text, *overrides)
    assert error.value.exit_code == 2
    message = str(error.value)
    assert "pydantic" not in message
    assert "Input should" not in message
    return message.replace(f"{folder}/", "").splitlines()


# Each: what stands in GOOD, what stands there instead, and the one line that has to come of it.
BROKEN = [
    ("lr: 1e-3", "lrr: 1e-3", "recipe.yaml:15: optim.lrr: unknown key; did you mean optim.lr?"),
    ("max_steps: 300", "max_steps: 300\n  lr: 1", "recipe.yaml:19: train.lr: unknown key; did you mean optim.lr?"),
    (
        "lr: 1e-3",
        "micro_size: 3",
        "recipe.yaml:15: optim.micro_size: unknown key; did you mean batch.micro_size or eval.micro_size?",
    ),
    (
        "max_steps: 300",
        "max_steps: 300\n  zzz: 1",
        "recipe.yaml:19: train.zzz: unknown key; the keys of train are max_steps, epochs, max_tokens, seed, precision, "
        "deterministic, offload_frozen",
    ),
    ("run_dir: runs/clm", "run_dir: a\nrundir: b", "recipe.yaml:20: rundir: unknown key; did you mean run_dir?"),
    (
        "- path: texts/*.txt",
        "- path: x\n      documents: line",
        "recipe.yaml:10: data.train.1.documents: unknown key; did you mean data.train.1.document?",
    ),
    ("run_dir: runs/clm\n", "", "recipe.yaml:1: run_dir: required, but not given"),
    ("train:\n  max_steps: 300\n", "", "recipe.yaml:1: train: required, but not given"),
    (
        "  train:\n    - source: python-stdlib\n    - path: texts/*.txt\n",
        "",
        "recipe.yaml:6: data.train: required, but not given",
    ),
    (
        "task: clm",
        "task: clmm",
        f"recipe.yaml:1: task: expected one of {', '.join(TASKS)}, got 'clmm'; did you mean clm?",
    ),
    (
        "lr: 1e-3",
        "schedule: cosin",
        "recipe.yaml:15: optim.schedule: expected one of constant, linear, cosine, inverse_sqrt, wsd, polynomial, "
        "got 'cosin'; did you mean cosine?",
    ),
    ("_size: 64\n  m", "_size: x\n  m", "recipe.yaml:12: batch.global_size: expected a whole number above 0, got 'x'"),
    (
        "global_size: 64",
        'global_size: "64"',
        "recipe.yaml:12: batch.global_size: expected a whole number above 0, got '64'; "
        "remove the quotes to make it a number",
    ),
    (
        "global_size: 64",
        "global_size: true",
        "recipe.yaml:12: batch.global_size: expected a whole number above 0, got true",
    ),
    (
        "global_size: 64",
        "global_size: 64.0",
        "recipe.yaml:12: batch.global_size: expected a whole number above 0, got 64.0",
    ),
    ("global_size: 64", "global_size: 0", "recipe.yaml:12: batch.global_size: expected a whole number above 0, got 0"),
    (
        "vocab_size: 512",
        "vocab_size: 7",
        "recipe.yaml:5: tokenizer.train.vocab_size: expected a whole number of at least 257 and at most 2000000, got 7",
    ),
    (
        "max_steps: 300",  # equal to the default in Python's eyes
        "max_steps: 300\n  seed: 0.0",
        "recipe.yaml:19: train.seed: expected a whole number of at least 0 and below 9223372036854775808, got 0.0",
    ),
    (
        "run_dir: runs/clm",  # the same, for a whole section
        "run_dir: runs/clm\nlog: {every: true, tensorboard: true}",
        "recipe.yaml:20: log.every: expected a whole number above 0, got true",
    ),
    ("lr: 1e-3", "lr: true", "recipe.yaml:15: optim.lr: expected a number above 0, got true"),
    ("lr: 1e-3", "lr: -1", "recipe.yaml:15: optim.lr: expected a number above 0, got -1"),
    ("lr: 1e-3", "lr: .inf", "recipe.yaml:15: optim.lr: expected a finite number, got inf"),
    (
        "hidden_size: 64",
        "hidden_size: .nan",
        "recipe.yaml:3: model.config.hidden_size: expected a finite number, got nan",
    ),
    (
        "lr: 1e-3",
        f"lr: 1{'0' * 400}",
        "recipe.yaml:15: optim.lr: this number is too large: at most 9223372036854775807",
    ),
    ("lr: 1e-3", "lr: null", "recipe.yaml:15: optim.lr: expected a number above 0, got null"),
    ("[0.9, 0.95]", "[0.9]", "recipe.yaml:16: optim.betas: expected a list of 2 items, got a list of 1 item"),
    ("[0.9, 0.95]", "[0.9, 1, 1]", "recipe.yaml:16: optim.betas: expected a list of 2 items, got a list of 3 items"),
    ("[0.9, 0.95]", "0.9", "recipe.yaml:16: optim.betas: expected a list of 2 items, got 0.9"),
    (
        "[0.9, 0.95]",
        "[0.9, 2]",
        "recipe.yaml:16: optim.betas.1: expected a number of at least 0 and below 1, got 2",
    ),
    (
        "micro_size: 8",
        "micro_size: 8\n  group_by_length: yes",
        "recipe.yaml:14: batch.group_by_length: expected true or false, got 'yes'",
    ),
    ("run_dir: runs/clm", "run_dir: 3", "recipe.yaml:19: run_dir: expected text, got 3; quote it to make it text"),
    (
        "  lr: 1e-3\n  betas: [0.9, 0.95]",
        "  - lr: 1e-3",
        "recipe.yaml:14: optim: expected a section (key: value), got a list of 1 item",
    ),
    ("  lr: 1e-3\n  betas: [0.9, 0.95]", "", "recipe.yaml:14: optim: expected a section (key: value), got null"),
    (
        "validation: 0.02",
        "validation: 1.5",
        "recipe.yaml:10: data.validation: expected a number above 0 and below 1 or a list of at least 1 item, got 1.5",
    ),
    (
        "validation: 0.02",
        "validation: []",
        "recipe.yaml:10: data.validation: expected a number above 0 and below 1 or a list of at least 1 item, "
        "got an empty list",
    ),
    (
        "validation: 0.02",
        "validation: {path: x}",
        "recipe.yaml:10: data.validation: expected a number above 0 and below 1 or a list of at least 1 item, "
        "got a section (key: value)",
    ),
    (
        "validation: 0.02",
        "validation:\n    - pth: x",
        "recipe.yaml:11: data.validation.0.pth: unknown key; did you mean data.validation.0.path?",
    ),
    (
        "    - source: python-stdlib\n    - path: texts/*.txt",
        "    []",
        "recipe.yaml:7: data.train: expected a list of at least 1 item, got an empty list",
    ),
    (
        "micro_size: 8",
        "micro_size: 8\n  micro_tokens: 9",
        "recipe.yaml:11: batch: exactly one of micro_size, micro_tokens is needed; given: micro_size, micro_tokens",
    ),
    (
        "  micro_size: 8\n",
        "",
        "recipe.yaml:11: batch: exactly one of micro_size, micro_tokens is needed; none is given",
    ),
    ("lr: 1e-3", "momentum: 0.9", "recipe.yaml:15: optim.momentum: has no effect here: it needs optim.name: sgd"),
    (
        "  validation: 0.02\n",
        "eval:\n  every: 3\n",
        "recipe.yaml:11: eval.every: has no effect here: it needs data.validation",
    ),
    (
        "lr: 1e-3",
        "groups: [{match: '('}]",
        "recipe.yaml:15: optim.groups.0.match: is not a regular expression: "
        "missing ), unterminated subpattern at position 0",
    ),
    ("lr: 1e-3", "lr: 1\n  lr: 2", "recipe.yaml:16: optim.lr: given twice, first in line 15"),
    ("lr: 1e-3", "<<: {lr: 1}", "recipe.yaml:15: optim: merge keys (<<) are not part of YAML 1.2"),
    ("lr: 1e-3", "[1]: 2", "recipe.yaml:15: optim: a key must be a name"),
    ("lr: 1e-3", "lr: !!int x", "recipe.yaml:15: optim.lr: 'x' is not a int"),
    (
        "lr: 1e-3",
        "lr: !!python/object/apply:os.getcwd []",
        "recipe.yaml:15: optim.lr: the tag !!python/object/apply:os.getcwd is not allowed in a recipe",
    ),
    (
        "runs/clm",
        "${env:NOT_SET_9}",
        "recipe.yaml:19: run_dir: the environment variable NOT_SET_9 is not set; set it, "
        "or write ${env:NOT_SET_9:-default}",
    ),
    (
        "runs/clm",
        "runs/${run_dir}",
        "recipe.yaml:19: run_dir: ${run_dir} cannot be used here: run_dir would refer to itself",
    ),
    (
        "runs/clm",
        "${home}",
        "recipe.yaml:19: run_dir: unknown reference ${home}; use ${env:NAME}, ${env:NAME:-default}, or a key of the "
        "recipe, such as ${run_dir} or ${optim.lr}",
    ),
    (
        "runs/clm",
        "a${env:X",
        "recipe.yaml:19: run_dir: a reference without its closing }, or within another reference; for a literal ${, "
        "write $${",
    ),
    ("clm\n", 'clm\nx: "\\ud800"\n', "recipe.yaml:2: x: this text is not valid Unicode"),
    ("runs/clm", '"runs\\0clm"', "recipe.yaml:19: run_dir: this text contains a NUL character"),
    ("texts/*.txt", '"texts\\0.txt"', "recipe.yaml:9: data.train.1.path: this text contains a NUL character"),
    (
        "global_size: 64",
        f"global_size: {2**70}",
        "recipe.yaml:12: batch.global_size: this number is too large: at most 9223372036854775807",
    ),
    (
        "max_steps: 300",
        f"max_steps: {2**63}",
        "recipe.yaml:18: train.max_steps: this number is too large: at most 9223372036854775807",
    ),
    (
        "max_steps: 300",
        f"max_steps: 300\n  seed: {'9' * 5000}",
        f"recipe.yaml:19: train.seed: '{'9' * 40}...' is not a int",
    ),
    (
        "validation: 0.02",
        "validation: 0.02\n  max_length: 1000000000",
        "recipe.yaml:11: data.max_length: expected a whole number of at least 2 and at most 16777216, got 1000000000",
    ),
    (
        "validation: 0.02",
        "validation: 0.02\n  workers: 100000",
        "recipe.yaml:11: data.workers: expected a whole number of at least 0 and at most 256, got 100000",
    ),
    (
        "vocab_size: 512",
        "vocab_size: 1000000000",
        "recipe.yaml:5: tokenizer.train.vocab_size: expected a whole number of at least 257 and at most 2000000, "
        "got 1000000000",
    ),
    # What follows from the recipe alone
    (
        "optim:\n",
        "eval: {metric: f1}\noptim:\n",
        "recipe.yaml:14: eval.metric: task clm has no metric 'f1', only loss, perplexity",
    ),
    (
        "global_size: 64\n  micro_size: 8",
        "global_size: 4\n  micro_size: 8",
        "recipe.yaml:12: batch.global_size: 4 is not a multiple of batch.micro_size (8); set batch.global_size to 8, "
        "or batch.micro_size to 4",
    ),
    (
        "global_size: 64\n  micro_size: 8",
        "global_size: 12\n  micro_size: 5",
        "recipe.yaml:12: batch.global_size: 12 is not a multiple of batch.micro_size (5); set batch.global_size to 10 "
        "or 15, or batch.micro_size to 4",
    ),
    (
        "global_size: 64\n  micro_size: 8",
        "global_tokens: 1536\n  micro_size: 2",
        "recipe.yaml:12: batch.global_tokens: 1536 tokens are 3 rows of data.max_length (512), not a multiple of "
        "batch.micro_size (2); set batch.micro_size to 1",
    ),
    (
        "global_size: 64",
        "global_tokens: 500",
        "recipe.yaml:12: batch.global_tokens: 500 is less than one row (data.max_length: 512)",
    ),
    (
        "global_size: 64",
        "global_tokens: 1000",
        "recipe.yaml:12: batch.global_tokens: 1000 is not a multiple of data.max_length (512); the nearest multiples: "
        "512, 1024",
    ),
    (
        "micro_size: 8",
        "micro_tokens: 500",
        "recipe.yaml:13: batch.micro_tokens: 500 is less than one row (data.max_length: 512)",
    ),
    (
        "- path: texts/*.txt",
        "- path: texts/*.txt\n      limit: 3\n      fields: {text: a}",
        "recipe.yaml:11: data.train.1.fields: has no effect here: task clm reads one column; name it with field",
    ),
    (
        "run_dir: runs/clm",
        "run_dir: runs/clm\nmlm:\n  unit: word",
        "recipe.yaml:20: mlm: has no effect here: the task is clm",
    ),
    (
        "max_steps: 300",
        "max_steps: 300\nsave: {best: true}",
        "recipe.yaml:19: save.best: has no effect here: it needs eval.every",
    ),
    (
        "tokenizer:\n  train: {vocab_size: 512}\n",
        "",
        "recipe.yaml:1: tokenizer: required with model.config: train one with tokenizer.train, or name one with "
        "tokenizer.path",
    ),
]


@pytest.mark.parametrize(("good", "bad", "expected"), BROKEN, ids=[bad.strip()[:30] for _, bad, _ in BROKEN])
def test_a_mistake_is_named_with_its_line_and_key(tmp_path: Path, good: str, bad: str, expected: str) -> None:
    assert good in GOOD
    assert refused(tmp_path, GOOD.replace(good, bad, 1)) == [expected]


UNREADABLE = [
    ("", "recipe.yaml:1: the recipe is empty; its required keys: task, model, data, batch, train, run_dir"),
    ("# nothing\n", "recipe.yaml:1: the recipe is empty"),
    ("- task: clm\n", "recipe.yaml:1: a recipe consists of `key: value` lines"),
    ("task: clm\nmodel: {a: b\nbatch: 3\n", "recipe.yaml:3: not valid YAML: while parsing a flow mapping"),
    ("task: clm\n\tmodel: 3\n", "recipe.yaml:2: not valid YAML: while scanning"),
    ("task: clm\nx: \x07\n", "recipe.yaml:2: not valid YAML: the character U+0007 is not allowed"),
    ("task: clm\n---\ntask: clm\n", "recipe.yaml:2: not valid YAML: expected a single document"),
    ("x: " + "[" * 60, "recipe.yaml:1: not valid YAML: nested more than 50 levels deep"),
]


@pytest.mark.parametrize(("text", "expected"), UNREADABLE)
def test_a_file_that_is_no_recipe(tmp_path: Path, text: str, expected: str) -> None:
    (line,) = refused(tmp_path, text)
    assert line.startswith(expected)


def test_a_path_that_is_no_text_file(tmp_path: Path) -> None:
    latin1 = tmp_path / "latin1.yaml"
    latin1.write_bytes(b"task: clm\nrun_dir: caf\xe9\n")
    with pytest.raises(RecipeError, match=r"latin1\.yaml:2: not UTF-8 text \(byte 0xe9\)"):
        load_recipe(str(latin1))
    with pytest.raises(RecipeError, match="this is a directory, not a recipe; give a file in it"):
        load_recipe(str(tmp_path))
    with pytest.raises(RecipeError, match="no such file"):
        load_recipe(str(tmp_path / "missing.yaml"))


def test_an_alias_inside_its_own_anchor_ends(tmp_path: Path) -> None:
    lines = refused(tmp_path, GOOD.replace("{model_type: llama, hidden_size: 64}", "&a {model_type: llama, x: *a}"))
    assert lines == ["recipe.yaml:3: model.config.x: an alias may not refer to a value that contains it"]


ROWS = """\
task: classification
model: {path: org/model}
data:
  train:
    - path: a.jsonl
    - path: b.jsonl
      fields:
        text: sentence
        lable: gold
        "a role": x
  validation:
    - {path: c.jsonl, field: text}
batch: {global_size: 4, micro_size: 8}
train: {max_steps: 5}
eval: {metric: f1}
run_dir: run
"""


def test_everything_that_follows_from_the_recipe_alone_is_reported_at_once(tmp_path: Path) -> None:
    assert refused(tmp_path, ROWS) == [
        "recipe.yaml:9: data.train.1.fields.lable: task classification has no role 'lable', only text, label; did you "
        "mean label?",
        "recipe.yaml:10: data.train.1.fields.a role: task classification has no role 'a role', only text, label",
        "recipe.yaml:12: data.validation.0.field: has no effect here: name the columns of task classification with "
        "fields",
        "recipe.yaml:13: batch.global_size: 4 is not a multiple of batch.micro_size (8); set batch.global_size to 8, "
        "or batch.micro_size to 4",
        "recipe.yaml:15: eval.metric: task classification has no metric 'f1', only loss, accuracy, precision_macro, "
        "recall_macro, f1_macro, precision_weighted, recall_weighted, f1_weighted, mcc",
    ]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            ["task=question_answering", "data.max_length=64"],
            "recipe.yaml:1: question_answering.stride: 64 leaves no room for a context in rows of data.max_length "
            "(64); lower it, or raise data.max_length",
        ),
        (
            ["task=span_corruption", "tokenizer={path: x}", "span_corruption.sentinels=50"],
            "command line: span_corruption.sentinels: has no effect here: it needs tokenizer.train",
        ),
        (
            ["task=clm", "distillation={teacher: x}", "clm.head=fused"],
            "command line: clm.head: the fused head computes no logits, and distillation needs them; remove the key, "
            "or set logits",
        ),
        (
            ["task=mlm", "distillation={teacher: x}", "eval.metric=divergence"],
            "command line: distillation: has no effect here: it needs one of the tasks clm, sft, classification",
        ),
        (
            ["task=grpo", "data.workers=2"],
            "command line: data.workers: has no effect here: task grpo learns from its own responses, which no process "
            "loads",
        ),
    ],
)
def test_a_setting_that_the_task_cannot_use(tmp_path: Path, overrides: list[str], expected: str) -> None:
    assert expected in refused(tmp_path, GOOD, *overrides)


def test_metrics_of_a_teacher(tmp_path: Path) -> None:
    loaded = load(tmp_path, GOOD, "distillation={teacher: x}", "eval.metric=divergence")
    assert loaded.recipe.eval.metric == "divergence"
    assert not loaded.recipe.eval.larger_is_better


@pytest.mark.parametrize("depth", [6, 9, 40])
def test_nested_aliases_are_bounded(tmp_path: Path, depth: int) -> None:
    """Each list holds the one before ten times ("billion laughs")."""
    lines = ["a0: &a0 [x]"] + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, depth + 1)]
    started = time.monotonic()
    (line,) = refused(tmp_path, GOOD + "\n".join(lines))
    assert time.monotonic() - started < 10
    assert line.startswith("recipe.yaml:")
    assert "more than 100,000 values, with aliases expanded" in line
    (line,) = refused(tmp_path, GOOD, "model.config.x={" + ", ".join(lines) + "}")
    assert line.startswith("command line: model.config.x: ")


def test_the_tokenizer_is_the_model_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODEL_9", "secret-name")
    text = GOOD.replace("tokenizer:\n  train: {vocab_size: 512}\n", "")
    given = "{path: 'org/${env:MODEL_9}', revision: abc, trust_remote_code: true}"
    text = text.replace("\n  config: {model_type: llama, hidden_size: 64}", " " + given)
    loaded = load(tmp_path, text)
    section = loaded.recipe.tokenizer
    assert (section.path, section.revision, section.trust_remote_code) == ("org/secret-name", "abc", True)
    assert (section.train, section.add) == (None, ())
    assert loaded.origins["tokenizer.path"] == "env MODEL_9 (recipe.yaml:2)"
    assert loaded.origins["tokenizer.revision"] == "recipe.yaml:2"
    assert loaded.origins["tokenizer.add"] == "default"
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(loaded.resolved)
    assert "secret-name" not in resolved.read_text() + describe(loaded)
    assert load_recipe(str(resolved)).recipe == loaded.recipe
    assert load(tmp_path, text, "tokenizer={path: other}").recipe.tokenizer.path == "other"
    assert load(tmp_path, text, "tokenizer={path: other}").recipe.tokenizer.revision is None


def test_a_wrong_model_is_no_mistake_of_the_tokenizer(tmp_path: Path) -> None:
    text = GOOD.replace("tokenizer:\n  train: {vocab_size: 512}\n", "").replace(
        "config: {model_type", "pth: {model_type"
    )
    assert refused(tmp_path, text) == ["recipe.yaml:3: model.pth: unknown key; did you mean model.path?"]


def test_all_mistakes_are_reported_at_once_in_the_order_of_the_file(tmp_path: Path) -> None:
    text = (
        GOOD.replace("task: clm", "task: nsp")
        .replace("lr: 1e-3", "lr: fast\n  lr: 2")
        .replace("micro_size: 8", "zzz: 8")
    )
    text = text.replace("runs/clm", "${env:NOT_SET_9}/${env:NOT_SET_8}").replace("max_steps: 300", "max_steps: 3.5")
    lines = refused(tmp_path, text, "data.max_length=1", "nonsense", "optim.eps=small")
    assert [line.split(": ")[:2] for line in lines] == [
        ["recipe.yaml:1", "task"],
        ["recipe.yaml:13", "batch.zzz"],
        ["recipe.yaml:16", "optim.lr"],  # given twice
        ["recipe.yaml:19", "train.max_steps"],
        ["recipe.yaml:20", "run_dir"],
        ["recipe.yaml:20", "run_dir"],
        ["command line", "'nonsense'"],
        ["command line", "data.max_length"],
        ["command line", "optim.eps"],
    ]


def test_yaml_is_1_2(tmp_path: Path) -> None:
    scalars = (
        "{model_type: llama, a: 1e-4, b: no, c: 010, d: 0o17, e: 2024-01-01, f: 12:30:45, g: off, h: ~, 0: x, i: =}"
    )
    loaded = load(tmp_path, GOOD.replace("{model_type: llama, hidden_size: 64}", scalars))
    expected = {"a": 1e-4, "b": "no", "c": 10, "d": 15, "e": "2024-01-01", "f": "12:30:45", "g": "off", "h": None}
    assert loaded.recipe.model.config == {"model_type": "llama", **expected, "0": "x", "i": "="}
    assert load(tmp_path, GOOD.replace("1e-3", "1")).recipe.optim.lr == 1.0  # a whole number is a number


def test_anchors_and_aliases(tmp_path: Path) -> None:
    text = GOOD.replace("- source: python-stdlib", "- &s {path: a}").replace("- path: texts/*.txt", "- *s")
    loaded = load(tmp_path, text, "data.train.1.path=b")
    assert [source.path for source in loaded.recipe.data.train] == ["a", "b"]


def test_a_recipe_as_a_dictionary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    values = YAML(typ="safe").load(GOOD) | {"run_dir": Path("runs/clm")}
    loaded = load_recipe(values, {"optim.lr": 1e-4, "data.train": [{"path": "é.txt"}], "optim.betas": (0.8, 0.9)})
    assert loaded.recipe.optim.lr == 1e-4
    assert loaded.recipe.optim.betas == (0.8, 0.9)
    assert loaded.recipe.run_dir == "runs/clm"
    assert loaded.base == tmp_path
    assert loaded.origins["train.max_steps"] == "recipe"
    assert loaded.origins["optim.lr"] == "command line"
    again = tmp_path / "recipe.yaml"
    again.write_text(loaded.text, encoding="utf-8")
    assert load_recipe(str(again)).recipe.optim.lr == 1e-3  # as it was given, without overrides
    with pytest.raises(RecipeError, match=r"^recipe: optim\.lrr: unknown key; did you mean optim\.lr\?$"):
        load_recipe(values | {"optim": {"lrr": 1}})
    with pytest.raises(RecipeError, match=r"^recipe: a value of the type set is not allowed"):
        load_recipe(values | {"optim": {1}})
    assert load_recipe(values, {"run_dir": Path("runs/a")}).recipe.run_dir == "runs/a"
    with pytest.raises(RecipeError, match=r"^recipe: a value of the type set is not allowed"):
        load_recipe(values, {"optim.betas": {1}})
    with pytest.raises(RecipeError, match=r"^recipe: a recipe consists of|^recipe: .*required"):
        load_recipe({})


def test_overrides(tmp_path: Path) -> None:
    loaded = load(
        tmp_path,
        GOOD,
        "optim.lr=1e-4",
        "data.train[0].source=",
        "data.train.0.path='*.txt'",
        "data.train[1]={hub: wikitext}",
        "data.validation=null",
        "log.every=7",
        "model.config.rope.factor=2",
        "run_dir=a=b",
        r'model.config.note={"\ud842\udfb7": "\ud83d\ude00"}',  # as json.dumps writes them
    )
    recipe = loaded.recipe
    assert recipe.optim.lr == 1e-4
    assert (recipe.data.train[0].source, recipe.data.train[0].path) == (None, "*.txt")
    assert (recipe.data.train[1].path, recipe.data.train[1].hub) == (None, "wikitext")
    assert recipe.data.validation is None
    assert recipe.log.every == 7
    own = {"rope": {"factor": 2}, "note": {"𠮷": "😀"}}
    assert recipe.model.config == {"model_type": "llama", "hidden_size": 64, **own}
    assert recipe.run_dir == "a=b"


BAD_OVERRIDES = [
    ("optim.lr", "command line: 'optim.lr': not an override of the form section.key=value"),
    ("=3", "command line: '': not an override of the form section.key=value"),
    ("optim..lr=3", "command line: 'optim..lr': not an override of the form section.key=value"),
    ("optim.lrr=3", "command line: optim.lrr: unknown key; did you mean optim.lr?"),
    ("optm.lr=3", "command line: optm: unknown key; did you mean optim?"),
    ("optim.lr=x", "command line: optim.lr: expected a number above 0, got 'x'"),
    ("optim.lr=", "command line: optim.lr: expected a number above 0, got null"),
    ("run_dir.x=3", "command line: run_dir.x: run_dir is neither a section nor a list"),
    (
        "document=line",
        "command line: document: unknown key; did you mean data.train.0.document or data.validation.0.document?",
    ),
    (
        "data.train.2.path=x",
        "command line: data.train.2.path: no item 2 in the list data.train, which has 2 items (the first is 0)",
    ),
    (
        "data.train.path=x",
        "command line: data.train.path: data.train is a list: name an item by its number, as in data.train.0.path",
    ),
    (
        "data.train=[{source: python-stdlb}]",
        "command line: data.train.0.source: expected one of python-stdlib, python-functions, got 'python-stdlb'; did "
        "you mean python-stdlib?",
    ),
    (
        "data.train.1.path=*.txt",
        "command line: data.train.1.path: not valid YAML: found undefined alias '.txt'; put text with special "
        "characters into quotes: data.train.1.path='\"...\"'",
    ),
    (
        "run_dir=${env:NOT_SET_9}",
        "command line: run_dir: the environment variable NOT_SET_9 is not set; set it, "
        "or write ${env:NOT_SET_9:-default}",
    ),
]


@pytest.mark.parametrize(("override", "expected"), BAD_OVERRIDES)
def test_a_mistake_on_the_command_line(tmp_path: Path, override: str, expected: str) -> None:
    assert refused(tmp_path, GOOD, override) == [expected]


def test_references(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCRATCH_9", "/scratch")
    monkeypatch.setenv("EMPTY_9", "")
    monkeypatch.delenv("NOT_SET_9", raising=False)
    text = GOOD.replace("runs/clm", "${env:SCRATCH_9}/runs").replace(
        "  validation", "  cache_dir: ${run_dir}/cache\n  validation"
    )
    text = text.replace("texts/*.txt", "${env:NOT_SET_9:-a b}/${env:EMPTY_9:-c}${env:EMPTY_9}/$${x}/$5")
    recipe = load(tmp_path, text).recipe
    assert recipe.run_dir == "/scratch/runs"
    assert recipe.data.cache_dir == "/scratch/runs/cache"
    assert recipe.data.train[1].path == "a b/c/${x}/$5"


def test_what_a_reference_gives_is_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LR_9", "1e-3")
    assert refused(tmp_path, GOOD.replace("1e-3", "${env:LR_9}")) == [
        "recipe.yaml:15: optim.lr: expected a number above 0, got the text of ${env:LR_9} "
        "(the value of a reference is always text)"
    ]


def test_references_to_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_9", "hidden-9")
    text = GOOD.replace(
        "runs/clm", "runs/${task}-${optim.lr}-${train.seed}-${optim.betas.0}-${model.config.model_type}"
    )
    text = text.replace("texts/*.txt", "${data.cache_dir}/${batch.group_by_length}.txt").replace(
        "  validation", "  cache_dir: ${env:SECRET_9}/$${x}/${optim.schedule}\n  validation"
    )
    loaded = load(tmp_path, text, "save={every: '${eval.every}'}", "eval={every: '${train.max_steps}'}", "train.seed=7")
    recipe = loaded.recipe
    assert recipe.run_dir == "runs/clm-0.001-7-0.9-llama"
    assert recipe.data.train[1].path == "hidden-9/${x}/cosine/true.txt"  # two defaults, one of them of a section
    assert (recipe.save.every, recipe.eval.every) == (300, 300)  # a reference alone keeps the type
    resolved = YAML(typ="safe").load(loaded.resolved)
    assert resolved["run_dir"] == recipe.run_dir
    assert resolved["save"]["every"] == 300
    assert resolved["data"]["train"][1]["path"] == "${env:SECRET_9}/$${x}/cosine/true.txt"
    assert "hidden-9" not in loaded.resolved + describe(loaded)
    (tmp_path / "resolved.yaml").write_text(loaded.resolved)
    assert load_recipe(str(tmp_path / "resolved.yaml")).recipe == recipe
    assert loaded.origins["run_dir"] == "recipe.yaml:20"


@pytest.mark.parametrize(
    ("run_dir", "says"),
    [
        ("${optim.lrr}", "unknown reference ${optim.lrr}; did you mean ${optim.lr}?"),
        ("${optim.a b}", "unknown reference ${optim.a b}; use ${env:NAME}"),
        ("${data.train.5.path}", "unknown reference ${data.train.5.path}"),
        ("${model.config}", "${model.config} cannot be used here: model.config is a section, and not one value"),
        ("${data.train}", "${data.train} cannot be used here: data.train is a list, and not one value"),
        ("${model.revision}", "${model.revision} cannot be used here: model.revision is null, and not one value"),
        ("${run_dir}", "${run_dir} cannot be used here: run_dir would refer to itself"),
    ],
)
def test_a_reference_that_leads_nowhere(tmp_path: Path, run_dir: str, says: str) -> None:
    (line,) = refused(tmp_path, GOOD.replace("runs/clm", run_dir))
    assert line.startswith(f"recipe.yaml:19: run_dir: {says}")


def test_a_cycle_of_references(tmp_path: Path) -> None:
    text = GOOD.replace("runs/clm", "a/${data.train.1.path}").replace("texts/*.txt", "${data.cache_dir}/x")
    assert refused(tmp_path, text, "data.cache_dir=${run_dir}/y") == [
        "recipe.yaml:19: run_dir: ${data.train.1.path} cannot be used here: data.train.1.path would refer to itself "
        "through data.cache_dir, run_dir"
    ]


def test_origins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_9", "a")
    text = GOOD.replace("runs/clm", "${env:A_9}/${env:B_9:-b}").replace("texts/*.txt", "${run_dir}/x")
    loaded = load(tmp_path, text, "optim.weight_decay=0.2", "data.train.0={path: '${env:A_9}'}", "train.seed=0")
    origins = loaded.origins
    assert origins["optim.lr"] == "recipe.yaml:15"
    assert origins["optim.betas.1"] == "recipe.yaml:16"
    assert origins["model.config.hidden_size"] == "recipe.yaml:3"
    assert origins["data.train.1.path"] == "recipe.yaml:9"
    assert origins["optim.weight_decay"] == origins["train.seed"] == "command line"
    assert origins["data.train.0.path"] == "env A_9 (command line)"
    assert origins["data.train.0.source"] == origins["optim.schedule"] == origins["log.every"] == "default"
    assert origins["run_dir"] == "env A_9, B_9 (recipe.yaml:19)"
    assert loaded.text == text
    assert loaded.base == tmp_path.resolve()


@pytest.mark.parametrize(
    "text",
    [
        "no", "1e-4", "010", "null", "~", "", " a ", "a: b", "# x", "two\nlines\n", "é漢😀", "2024-01-01", "=", "yes",
        "$${x}", "*x", "!x", "a'b\"c", "\\", "\u2028", "a\x85b", "\x85", "${env:A_9}b", "-", "x" * 5000, "a " * 3000,
    ],
)  # fmt: skip
def test_the_resolved_recipe_gives_an_equal_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("A_9", "a ${b} $${c}")
    loaded = load(
        tmp_path,
        GOOD,
        f"model.config.text={json.dumps(text)}",
        "optim.lr=1e-5",
        "optim.schedule=constant",
    )
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(loaded.resolved, encoding="utf-8")
    again = load_recipe(str(resolved))
    assert again.recipe == loaded.recipe
    assert again.resolved == loaded.resolved


@pytest.mark.parametrize("text", ["a\x85b", "a\x7fb", "a\x80b", "\ufeffa", "a\uffffb", "\u2028", "é漢😀"])
def test_a_dictionary_may_have_any_character(text: str) -> None:
    values = YAML(typ="safe").load(GOOD) | {"run_dir": text}
    assert load_recipe(values).recipe.run_dir == text
    assert load_recipe(values | {"run_dir": "x"}, {"run_dir": text}).recipe.run_dir == text


def test_the_first_line_says_where_data_paths_start(tmp_path: Path) -> None:
    """So that `ptft train RUN/resolved.yaml` reads the data of the run."""
    (tmp_path / "a").mkdir()
    loaded = load(tmp_path / "a")
    assert loaded.base == tmp_path / "a"
    moved = load(tmp_path, loaded.resolved)
    assert (moved.base, moved.recipe) == (loaded.base, loaded.recipe)
    assert refused(tmp_path, "# Its relative data paths start at here\n" + GOOD) == [
        "recipe.yaml:1: Its relative data paths start at: expected a directory in double quotes, or no such line"
    ]


def test_the_resolved_recipe_holds_every_value(tmp_path: Path) -> None:
    resolved = YAML(typ="safe").load(load(tmp_path).resolved)
    assert list(resolved) == [name for name in recipe_class().model_fields if name not in TASKS or name == "clm"]
    assert resolved["optim"]["schedule"] == "cosine"
    assert resolved["optim"]["betas"] == [0.9, 0.95]
    assert resolved["eval"]["every"] is None


def test_describe_is_a_table(tmp_path: Path) -> None:
    lines = describe(load(tmp_path, GOOD, "optim.lr=0.5")).splitlines()
    assert lines[0].split() == ["key", "value", "from"]
    assert ["optim.lr", "0.5", "command", "line"] in [line.split() for line in lines]
    assert ["train.max_steps", "300", "recipe.yaml:18"] in [line.split() for line in lines]
    assert len({line.index(line.split()[1]) for line in lines}) == 1  # the columns stand below each other


def test_describe_shows_other_tasks_if_asked(tmp_path: Path) -> None:
    """The keys of the file, of the common sections and of this task; with all_tasks those of every task."""
    loaded = load(tmp_path)
    shown, everything = (
        {line.split()[0].partition(".")[0] for line in describe(loaded, all_tasks=all_tasks).splitlines()[1:]}
        for all_tasks in (False, True)
    )
    assert shown & set(TASKS) == {"clm"}
    assert everything == shown | set(TASKS)
    assert len(set(describe(loaded, all_tasks=True).splitlines()) - set(describe(loaded).splitlines())) > 100


def test_the_schema_names_every_section_and_describes_every_key() -> None:
    schema = json.loads(json.dumps(recipe_class().model_json_schema()))
    assert {"task", "model", "tokenizer", "data", "clm", "batch", "optim", "train", "eval", "save", "log"} <= set(
        schema["properties"]
    )
    for section in schema["$defs"].values():
        assert section["description"]
        assert all("description" in key for key in section["properties"].values())


def test_pydantic_alone_would_not_be_strict() -> None:
    """Why load.py validates in strict mode: without it, text and true pass for numbers."""
    data = YAML(typ="safe").load(GOOD)
    data["batch"] = {"global_size": "64", "micro_size": True}
    assert recipe_class().model_validate(data).batch.micro_size == 1
    with pytest.raises(ValidationError):
        recipe_class().model_validate_json(json.dumps(data), strict=True)


def test_the_shipped_folder_is_the_package_s_or_else_the_checkout_s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ptft_dist.config.shipped.__file__", str(tmp_path / "ptft_dist" / "config" / "shipped.py"))
    assert shipped("ds_configs") == tmp_path / "ds_configs"
    (tmp_path / "ptft_dist" / "shipped" / "ds_configs").mkdir(parents=True)
    assert shipped("ds_configs") == tmp_path / "ptft_dist" / "shipped" / "ds_configs"


@pytest.fixture
def shipped_recipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "shipped"
    for name in ("clm", "mlm", "peft/lora", "a/same", "b/same"):
        file = folder / f"{name}.yaml"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(GOOD)
    monkeypatch.setattr("ptft_dist.config.shipped.shipped", lambda _kind: folder)
    monkeypatch.chdir(tmp_path)
    return folder


@pytest.mark.parametrize(
    ("name", "file"),
    [("clm", "clm"), ("peft/lora", "peft/lora"), ("lora", "peft/lora"), ("b/same", "b/same")],
)
def test_a_shipped_recipe_is_found_by_name(shipped_recipes: Path, name: str, file: str) -> None:
    assert find_shipped("recipes", name, ".yaml") == shipped_recipes / f"{file}.yaml"
    assert load_recipe(name).recipe.task == "clm"


def test_a_file_comes_before_a_shipped_recipe(shipped_recipes: Path) -> None:
    Path("clm").write_text("")
    assert find_shipped("recipes", "clm", ".yaml") == Path("clm")
    Path("mlm").mkdir()
    assert find_shipped("recipes", "mlm", ".yaml") == shipped_recipes / "mlm.yaml"


@pytest.mark.usefixtures("shipped_recipes")
@pytest.mark.parametrize("name", ["lora.yaml", "peft/lora.yaml"])
def test_a_file_that_is_not_here_is_not_the_shipped_one_of_its_name(tmp_path: Path, name: str) -> None:
    """`ptft init` writes files with such names, and a command in another directory would train the shipped recipe."""
    with pytest.raises(RecipeError) as error:
        load_recipe(name)
    assert str(error.value) == f"{name}: no such file here, in {tmp_path}; the shipped recipe is called peft/lora"


@pytest.mark.usefixtures("shipped_recipes")
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("clmm", "no such file, and no shipped recipe has this name; did you mean clm?"),
        ("recipes/lor.yaml", "no such file, and no shipped recipe has this name; did you mean peft/lora?"),
        ("qqqq", "no such file, and no shipped recipe has this name."),
        ("same", "there is more than one shipped recipe with this name; use one of: a/same, b/same"),
    ],
)
def test_a_name_that_is_not_shipped(name: str, expected: str) -> None:
    with pytest.raises(RecipeError) as error:
        find_shipped("recipes", name, ".yaml")
    listing = "" if "more than one" in expected else " Shipped: a/same, b/same, clm, mlm, peft/lora"
    assert str(error.value) == f"{name}: {expected}{listing}"


@pytest.mark.parametrize(
    ("batch", "ranks", "expected"),
    [
        ({"global_size": 24, "micro_size": 3}, 1, 8),
        ({"global_size": 24, "micro_size": 3}, 2, 4),
        ({"global_size": 10, "micro_size": None, "micro_tokens": 96}, 1, 4),  # 3 rows a pass: 3 + 3 + 3 + 1
        ({"global_size": None, "global_tokens": 500, "micro_size": None, "micro_tokens": 96}, 2, 3),  # 192 a pass
        ({"global_size": None, "global_tokens": 64, "micro_size": None, "micro_tokens": 96}, 2, 1),
    ],
)
def test_the_micro_batches_of_an_update_hold_all_of_it(batch: dict[str, Any], ranks: int, expected: int) -> None:
    """Rows have up to 32 tokens; the last micro-batch may be a small one."""
    assert batch_shape(in_process.make_recipe(batch=batch), ranks).accumulation == expected


def test_home_directories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shell does not expand ~ within key=value; an unknown user is a mistake in the recipe."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PTFT_CACHE", "~nobody-here/cache")
    assert load(tmp_path, GOOD, "run_dir=~/runs/a").recipe.run_dir == str(tmp_path / "home/runs/a")
    message = "~nobody-here has no home directory here; write the whole path"
    calls: dict[str, Callable[[], Any]] = {
        "~nobody-here/recipe.yaml": lambda: load_recipe("~nobody-here/recipe.yaml"),
        "~nobody-here/run": lambda: load(tmp_path, GOOD, "run_dir=~nobody-here/run"),
        "~nobody-here/a.txt": lambda: source_files(Source(path="~nobody-here/a.txt"), tmp_path),
        "~nobody-here/model": lambda: local_directory("~nobody-here/model", tmp_path, "model.path"),
        "~nobody-here/cache": lambda: cache_root(None, tmp_path),
    }
    for path, call in calls.items():
        with pytest.raises(RecipeError, match=rf"{path}: {message}"):
            call()
