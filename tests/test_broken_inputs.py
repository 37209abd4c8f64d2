"""Broken recipes and inputs: one clear message on stderr, an exit code that tells the kind, and never a traceback.

2: the recipe or the command is wrong; 3: the data are wrong; 4: a checkpoint or a model is not there.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from preloaded_ranks import forked_ptft
from support import last_step, start, wait_until, write_documents, write_recipe

from ptft_dist.errors import RecipeError, StillRunningError
from ptft_dist.reporting import run_files
from ptft_dist.reporting.messages import messages
from ptft_dist.reporting.run_files import RunDirLock, lock_run_dir

Edit = Callable[[Path], object]


@dataclass
class Case:
    """A recipe broken by `changes`, `overrides` or an `edit` of its directory, and the expected message."""

    code: int
    says: list[str]
    changes: dict[str, Any] = field(default_factory=dict)
    overrides: list[str] = field(default_factory=list)
    edit: Edit | None = None
    verb: tuple[str, ...] = ("train",)
    options: list[str] = field(default_factory=list)
    ranks: int = 1
    kind: str = "cpu"


def source(name: str, **settings: Any) -> dict[str, Any]:
    return {"data": {"train": [{"path": name, **settings}], "validation": None}, "eval": {"every": None}}


def lines(name: str, *rows: str | bytes) -> Edit:
    def write(folder: Path) -> None:
        raw = [row if isinstance(row, bytes) else row.encode() for row in rows]
        (folder / name).write_bytes(b"\n".join(raw))

    return write


def ds_config(**extra: Any) -> Edit:
    """A launch config `mine.yaml` whose DeepSpeed JSON has other than ZeRO settings."""

    def write(folder: Path) -> None:
        (folder / "mine.json").write_text(json.dumps({"zero_optimization": {"stage": 2}} | extra))
        (folder / "mine.yaml").write_text(
            "distributed_type: DEEPSPEED\nnum_processes: 2\ndeepspeed_config: {deepspeed_config_file: mine.json}\n"
        )

    return write


def llama(**keys: Any) -> dict[str, Any]:
    return {"model": {"config": keys}}


GOOD_ROW = json.dumps({"text": "a good row with some words"})
MINE = ["--launch", "mine.yaml", "--processes", "2"]
CHECK = ("config", "check")

RECIPES: dict[str, Case] = {
    "an unknown key": Case(2, ["optim.lrr: unknown key; did you mean optim.lr?"], {"optim": {"lrr": 1}}, verb=CHECK),
    "a wrong type": Case(
        2, ["train.max_steps: expected a whole number", "'ten'"], {"train": {"max_steps": "ten"}}, verb=CHECK
    ),
    "an unknown task": Case(2, ["task: expected", "clm"], {"task": "clmm"}, verb=CHECK),
    "an unknown optimizer": Case(2, ["optim.name", "did you mean adamw?"], {"optim": {"name": "adamv"}}, verb=CHECK),
    "a recipe that is not YAML": Case(2, ["recipe.yaml:"], edit=lines("recipe.yaml", "task: [clm", "x: }"), verb=CHECK),
    "an empty recipe": Case(2, ["recipe.yaml:1: the recipe is empty"], edit=lines("recipe.yaml", ""), verb=CHECK),
    "a recipe in another encoding": Case(
        2, ["recipe.yaml:2: not UTF-8"], edit=lines("recipe.yaml", "task: clm", b"x: \xe9"), verb=CHECK
    ),
    "an override without a value": Case(2, ["optim.lr"], overrides=["optim.lr"], verb=CHECK),
    "two lengths of training": Case(
        2, ["exactly one of max_steps, epochs, max_tokens"], {"train": {"epochs": 1}}, verb=CHECK
    ),
    "no validation to evaluate": Case(
        2, ["eval.every", "needs data.validation"], {"data": {"validation": None}}, verb=CHECK
    ),
    "a batch that does not divide": Case(
        2,
        ["batch.global_size: 12 is not a multiple of batch.micro_size (5)", "or batch.micro_size to 4"],
        {"batch": {"micro_size": 5}},
        verb=CHECK,
    ),
    "a batch that two processes cannot share": Case(
        2,
        [
            "12 rows cannot be divided over 2 processes x micro-batches of 4",
            "set batch.global_size to 8 or 16",
            "batch.micro_size to 3",
        ],
        {"batch": {"micro_size": 4}},
        options=["--launch", "cpu", "--processes", "2"],
    ),
    "micro_tokens below a row": Case(
        2,
        ["batch.micro_tokens: 63 is less than one row (data.max_length: 64)"],
        {"batch": {"micro_size": None, "micro_tokens": 63}},
        verb=CHECK,
    ),
    "a NUL in run_dir": Case(2, ["run_dir: this text contains a NUL character"], {"run_dir": "a\0b"}),
    "more readers than any machine has": Case(
        2, ["data.workers: expected", "at most 256"], {"data": {"workers": 10**5}}
    ),
    "a vocabulary beyond all memory": Case(
        2, ["tokenizer.train.vocab_size: expected", "at most 2000000"], {"tokenizer": {"train": {"vocab_size": 10**9}}}
    ),
    "rows beyond all memory": Case(2, ["data.max_length: this number is too large"], {"data": {"max_length": 2**70}}),
    "an accepted key that is none": Case(
        2, ["--accept optim.lrr: there is no such key; did you mean optim.lr?"], options=["--accept", "optim.lrr"]
    ),
    "run_dir below a file": Case(2, ["run_dir: recipe.yaml/run cannot be written"], {"run_dir": "recipe.yaml/run"}),
    "an unknown launch config": Case(2, ["zero22", "did you mean zero2?"], options=["--launch", "zero22"]),
    "a launch config that is none": Case(
        2, ["mine.yaml: not an Accelerate config"], edit=lines("mine.yaml", "a: 1"), options=MINE
    ),
    "ds config: clipping": Case(
        2,
        ["mine.json: gradient_clipping: the recipe decides this, with optim.max_grad_norm"],
        edit=ds_config(gradient_clipping=1.0),
        options=MINE,
    ),
    "ds config: optimizer": Case(
        2,
        ["mine.json: optimizer: the recipe decides this, with optim;"],
        edit=ds_config(optimizer={"type": "Adam"}),
        options=MINE,
    ),
    "ds config: batch size": Case(
        2,
        ["mine.json: train_batch_size: the recipe decides this, with batch.global_size"],
        edit=ds_config(train_batch_size=12),
        options=MINE,
    ),
    "ds config: precision": Case(
        2,
        ["mine.json: bf16: the recipe decides this, with train.precision"],
        edit=ds_config(bf16={"enabled": True}),
        options=MINE,
    ),
    "ds config: no stage": Case(
        2,
        ["zero_optimization.stage: 0; expected 1, 2 or 3"],
        edit=ds_config(zero_optimization={"stage": 0}),
        options=MINE,
    ),
    "ds config: not there": Case(
        2,
        ["other"],
        edit=lines("mine.yaml", "distributed_type: DEEPSPEED", "deepspeed_config: {deepspeed_config_file: other.json}"),
        options=MINE,
    ),
    "an unknown model_type": Case(
        2, ["model.config.model_type: transformers has no model type 'lama'", "llama"], llama(model_type="lama")
    ),
    "a misspelt model key": Case(
        2,
        ["model.config.hiden_size: a llama config has no such key; did you mean model.config.hidden_size?"],
        llama(hiden_size=8),
    ),
    "too few embeddings": Case(2, ["it has 100 token embeddings, but the tokenizer has 320"], llama(vocab_size=100)),
    "rows beyond the positions": Case(
        2, ["data.max_length: 65 is more than the model's max_position_embeddings (64)"], {"data": {"max_length": 65}}
    ),
    "heads that do not divide": Case(
        2, ["model.config: a llama config", "(32) is not a multiple of"], llama(num_attention_heads=5)
    ),
    "a size that is text": Case(2, ["model.config: a llama config", "hidden_size"], llama(hidden_size="large")),
    "a model that is nowhere": Case(2, ["model.path"], {"model": {"config": None, "path": "./nowhere"}}),
    "a tokenizer that is nowhere": Case(
        2, ["tokenizer.path: there is no directory ./nowhere"], {"tokenizer": {"train": None, "path": "./nowhere"}}
    ),
    "a vocabulary below the bytes": Case(
        2, ["tokenizer.train.vocab_size"], {"tokenizer": {"train": {"vocab_size": 200}}}
    ),
    "adafactor under ZeRO": Case(
        2, ["optim.name: adafactor", "use adamw"], {"optim": {"name": "adafactor"}}, ranks=2, kind="cpu_zero2"
    ),
    "fp16 on a CPU": Case(2, ["train.precision: fp16 needs a GPU", "fp32 or bf16"], {"train": {"precision": "fp16"}}),
    "groups that match nothing": Case(
        2, ["optim.groups: no parameter's name matches 'lm_haed'"], {"optim": {"groups": [{"match": "lm_haed"}]}}
    ),
    "a group that is no expression": Case(
        2, ["optim.groups.0.match: is not a regular expression"], {"optim": {"groups": [{"match": "("}]}}, verb=CHECK
    ),
    "a metric that is none": Case(
        2, ["eval.metric: task clm has no metric 'f1', only loss, perplexity"], {"eval": {"metric": "f1"}}, verb=CHECK
    ),
    "an unknown recipe": Case(
        2,
        ["clmm", "did you mean clm?"],
        edit=lambda folder: (folder / "recipe.yaml").rename(folder / "x.yaml"),
        verb=("config", "check"),
    ),
    "an unknown option": Case(2, ["--lunch"], options=["--lunch", "cpu"]),
    "an unknown verb": Case(2, ["trian"], verb=("trian",)),
    "a checkpoint that is nowhere": Case(
        4, ["run/checkpoints/step-00000009 does not exist"], options=["--resume", "run/checkpoints/step-00000009"]
    ),
}

DATA: dict[str, Case] = {
    "a missing file": Case(3, ["data.train[0].path: nowhere.txt: no such file"], source("nowhere.txt"), verb=CHECK),
    "an empty file": Case(3, ["empty.txt: the file is empty"], source("empty.txt"), edit=lines("empty.txt", "")),
    "a folder": Case(
        3,
        ["this is a directory", "Name the files in it: ./**/*.txt"],
        source("."),
        edit=lines("poem.txt", "x"),
        verb=CHECK,
    ),
    "an unknown type": Case(3, ["unknown file type"], source("x.doc"), edit=lines("x.doc", "x"), verb=CHECK),
    "invalid UTF-8": Case(
        3,
        ["bad.txt:2: byte 0xff at offset 5 of the file is not UTF-8"],
        source("bad.txt", document="line"),
        edit=lines("bad.txt", "good", b"\xff"),
    ),
    "a malformed line": Case(
        3, ["bad.jsonl:2: not JSON"], source("bad.jsonl"), edit=lines("bad.jsonl", GOOD_ROW, '{"text": ')
    ),
    "a missing field": Case(
        3,
        ["bad.jsonl:2: there is no field 'text'; the fields are: 'txt'"],
        source("bad.jsonl"),
        edit=lines("bad.jsonl", GOOD_ROW, '{"txt": "x"}'),
    ),
    "a field that is a number": Case(
        3, ["bad.jsonl:1: the field 'text' is a number"], source("bad.jsonl"), edit=lines("bad.jsonl", '{"text": 3}')
    ),
    "a row that is a list": Case(
        3, ["bad.jsonl:1: this row is a list"], source("bad.jsonl"), edit=lines("bad.jsonl", "[1]")
    ),
    "a broken archive": Case(
        3,
        ["bad.jsonl.gz: the compressed file is truncated or damaged"],
        source("bad.jsonl.gz"),
        edit=lines("bad.jsonl.gz", "not gzip"),
    ),
    "a table with a stray comma": Case(
        3,
        ["bad.csv:2: this row has 2 columns, but the header has 1"],
        source("bad.csv"),
        edit=lines("bad.csv", "text", "a,b"),
    ),
    "nothing left to validate": Case(
        3,
        ["data.validation"],
        {"data": {"train": [{"path": "one.txt"}], "validation": 0.01}},
        edit=lines("one.txt", "a single document"),
    ),
    "too few rows for an update": Case(
        3,
        ["batch: one update needs 12 rows, the training data have 3", "Lower batch.global_size"],
        source("few.txt", document="line"),
        edit=lines("few.txt", "a b c", "d e f", "g h i"),
    ),
}


def fails_clearly(folder: Path, documents: Path, cache: Path, case: Case) -> None:
    write_recipe(folder, documents, **case.changes)
    if case.edit is not None:
        case.edit(folder)
    words = [*case.verb, "recipe.yaml" if (folder / "recipe.yaml").exists() else "clmm", *case.overrides, *case.options]
    run = start(*words, cwd=folder, cache=cache, ranks=case.ranks, kind=case.kind)
    assert run.wait(60) == case.code, run.stderr
    for text in case.says:
        assert text in run.stderr, run.stderr
    assert "Traceback" not in run.stdout + run.stderr
    errors = [line for line in run.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1, run.stderr
    assert not list(folder.glob("run/checkpoints/step-*"))


@pytest.mark.parametrize("name", RECIPES)
def test_a_broken_recipe(tmp_path: Path, documents: Path, cache: Path, name: str) -> None:
    fails_clearly(tmp_path, documents, cache, RECIPES[name])


@pytest.mark.parametrize("name", DATA)
def test_broken_data(tmp_path: Path, documents: Path, cache: Path, name: str) -> None:
    fails_clearly(tmp_path, documents, cache, DATA[name])


def test_all_mistakes_at_once(tmp_path: Path, documents: Path) -> None:
    """Reported by the real command, in the order of the file."""
    write_recipe(tmp_path, documents, optim={"lrr": 1, "name": "adamv"}, train={"max_steps": 0}, bach={})
    run = forked_ptft("config", "check", "recipe.yaml", cwd=tmp_path)
    assert run.returncode == 2
    assert run.stdout == ""
    places = [run.stderr.index(key) for key in ("optim.lrr", "optim.name", "train.max_steps", "bach")]
    assert places == sorted(places)
    assert run.stderr.count("recipe.yaml:") == 4
    assert "Traceback" not in run.stderr


@pytest.mark.parametrize("damage", ["truncated", "no summary", "no report"])
def test_a_damaged_cache(tmp_path: Path, documents: Path, damage: str) -> None:
    write_recipe(tmp_path, documents, train={"max_steps": 1})
    cache = tmp_path / "cache"
    run = start("prepare", "recipe.yaml", cwd=tmp_path, cache=cache)
    assert run.wait() == 0, run.stderr
    (store,) = (path for path in (cache / "stores").iterdir() if path.is_dir())
    if damage == "truncated":
        tokens = store / "train/tokens.bin"
        tokens.write_bytes(tokens.read_bytes()[:-2])
    else:
        (store / ("train/store.json" if damage == "no summary" else "report.json")).unlink()
    run = start("train", "recipe.yaml", cwd=tmp_path, cache=cache)
    assert run.wait() == 3
    assert "Traceback" not in run.stderr
    assert run.stderr.count("error:") == 1
    assert "damaged" in run.stderr
    assert str(store) in run.stderr  # what to delete
    assert not (tmp_path / "run/result.json").exists()  # the run had not begun


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["checkpoints", "nowhere"], 4, "nowhere/checkpoints contains no checkpoint"),
        (["generate", "nowhere", "--prompt", "x"], 4, "nowhere: there is no model"),
        (["tensorboard", "nowhere"], 2, "nowhere: no TensorBoard events in this directory"),
    ],
)
def test_a_run_that_is_nowhere(tmp_path: Path, cache: Path, words: list[str], code: int, says: str) -> None:
    run = start(*words, cwd=tmp_path, cache=cache)
    assert run.wait() == code
    assert run.stderr == f"error: {says}" + run.stderr.removeprefix(f"error: {says}")
    assert "Traceback" not in run.stderr
    assert not (tmp_path / "nowhere").exists()


def test_a_second_start_in_the_same_directory(tmp_path: Path, documents: Path, cache: Path) -> None:
    write_recipe(tmp_path, documents, train={"max_steps": 500}, eval={"every": None})
    first = start("train", "recipe.yaml", cwd=tmp_path, cache=cache)
    first.until((tmp_path / "run/environment.json").exists, "a start")
    second = start("train", "recipe.yaml", cwd=tmp_path, cache=cache)
    assert second.wait() == 2
    assert "run_dir: another process is training in run" in second.stderr
    assert first.running
    first.kill()


def test_a_requeued_job_waits_for_the_process_of_its_earlier_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """That process may still end, on a host that Slurm has given up; if not, the job is requeued once more."""
    monkeypatch.setattr(run_files, "LOCK_WAIT_S", 0.2)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    with messages():
        held = lock_run_dir(tmp_path)
        with pytest.raises(
            RecipeError, match=rf"\(process {os.getpid()} on {socket.gethostname()}, slurm-7\); wait for it"
        ):
            lock_run_dir(tmp_path)
        monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
        with pytest.raises(StillRunningError, match=r"slurm-7\)\. It has not ended within 0 s") as refused:
            lock_run_dir(tmp_path)
        assert refused.value.exit_code == 75
        monkeypatch.setattr(run_files, "LOCK_WAIT_S", 30.0)
        got: list[RunDirLock] = []
        waiting = threading.Thread(target=lambda: got.append(lock_run_dir(tmp_path)))
        waiting.start()
        time.sleep(0.3)
        assert not got
        held.release()
        waiting.join()
        assert len(got) == 1
    assert "waiting for it for 30 s" in capsys.readouterr().err


def test_a_good_recipe_is_good(tmp_path: Path, documents: Path) -> None:
    """Otherwise the tests above would prove nothing."""
    write_recipe(tmp_path, write_documents(tmp_path / "text.txt", count=3))
    run = forked_ptft("config", "check", "recipe.yaml", cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert "valid (task clm, 8 updates, 12 rows an update)" in run.stdout
    assert documents.exists()


def test_a_run_directory_on_a_full_disk(tmp_path: Path, documents: Path, cache: Path, disk: Path) -> None:
    write_recipe(tmp_path, documents, run_dir=str(disk / "run"))
    with (disk / "filler").open("wb", buffering=0) as filler, contextlib.suppress(OSError):
        while True:
            filler.write(bytes(4096))
    run = start("train", "recipe.yaml", cwd=tmp_path, cache=cache)
    assert run.wait() == 78
    assert "error: run_dir: " in run.stderr
    assert "cannot be written: No space left on device" in run.stderr
    assert "Traceback" not in run.stderr


@pytest.mark.parametrize(
    "changes",
    [
        {"batch": {"global_size": 3 * 10**18}},
        {"train": {"max_steps": 9 * 10**18}, "eval": {"every": 9 * 10**18}, "save": {"every": 9 * 10**18}},
        {"train": {"max_steps": None, "epochs": 1e6}},
        {"train": {"max_steps": None, "max_tokens": 9 * 10**18}},
        {"batch": {"global_size": None, "global_tokens": 9 * 10**18}},
        {"train": {"seed": 2**63 - 1, "max_steps": 1}, "eval": {"every": None}, "save": {"every": None}},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_the_largest_numbers_make_no_traceback(
    tmp_path: Path, documents: Path, cache: Path, changes: dict[str, Any]
) -> None:
    """A run with the largest numbers is refused, or trains."""
    write_recipe(tmp_path, documents, **changes)
    run = start("train", "recipe.yaml", cwd=tmp_path, cache=cache)
    wait_until(lambda: not run.running or last_step(tmp_path / "run") >= 1, "an end or a step", 60)
    run.kill()
    assert "Traceback" not in run.stderr
    assert "error: " in run.stderr or last_step(tmp_path / "run") >= 1, run.stderr
