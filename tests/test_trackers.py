"""Experiment trackers: one run over kills and resumes, without gaps and doubled points; failures of a tracker.

What a tracker holds is read from its files with sqlite3, zipfile and a reader of the log format of LevelDB, not with
the code that wrote it.
"""

from __future__ import annotations

import importlib.util
import json
import sqlite3
import struct
import threading
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support import last_step, start, write_recipe

from ptft_dist.api import load_recipe
from ptft_dist.config.load import flat, public_values
from ptft_dist.errors import RecipeError
from ptft_dist.reporting import trackers
from ptft_dist.reporting.tracker_services import SERVICES
from ptft_dist.reporting.trackers import check_installed, open_trackers

Points = list[tuple[str, int, float]]
"""(tag, update, value), sorted."""
SECRET = "5ecretT0ken"


def leveldb_records(path: Path) -> Iterator[bytes]:
    """The records of a file in LevelDB's log format, after a header of 7 bytes."""
    data, position, part = path.read_bytes(), 7, b""
    while position + 7 <= len(data):
        if 32768 - position % 32768 < 7:
            position += 32768 - position % 32768
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + 7])
        part += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield part
            part = b""


def points_of_wandb(folder: Path, _run_id: str) -> Points:
    from wandb.proto.wandb_internal_pb2 import Record

    (file,) = (folder / "run/wandb").glob("offline-run-*/*.wandb")  # of the last start only
    points = []
    for data in leveldb_records(file):
        record = Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "history":
            values = {
                item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item
            }
            points += [(tag, values["_step"], value) for tag, value in values.items() if not tag.startswith("_")]
    return points


def points_of_mlflow(folder: Path, run_id: str) -> Points:
    with sqlite3.connect(folder / "mlflow.db") as database:
        assert database.execute("select count(*) from runs").fetchone() == (1,)
        return database.execute("select key, step, value from metrics where run_uuid = ?", [run_id]).fetchall()


def points_of_trackio(folder: Path, run_id: str) -> Points:
    with sqlite3.connect(folder / "trackio/ptft.db") as database:
        assert database.execute("select count(distinct run_id) from metrics").fetchone() == (1,)
        rows = database.execute("select run_name, step, metrics from metrics").fetchall()
    assert {name for name, _, _ in rows} == {f"run-{run_id[:6]}"}
    return [(tag, step, value) for _, step, text in rows for tag, value in json.loads(text).items()]


def points_of_swanlab(folder: Path, _run_id: str) -> Points:
    from swanlab.proto.swanlab.record.v1.record_pb2 import Record

    (file,) = (folder / "run/swanlab").glob("run-*/*.swanlab")
    points = []
    for data in leveldb_records(file):
        record = Record()
        record.ParseFromString(data)
        assert record.WhichOneof("record_type") != "log"  # of the terminal
        if record.WhichOneof("record_type") == "scalar":
            points.append((record.scalar.key, record.scalar.step, record.scalar.value.number))
    return points


def points_of_comet(folder: Path, run_id: str) -> Points:
    (file,) = (folder / "run/comet").glob(f"{run_id}-*.zip")
    points = []
    for line in zipfile.ZipFile(file).read("messages.json").splitlines():
        metric = json.loads(line)["payload"].get("metric")
        if metric is not None and not metric["metricName"].startswith("sys."):
            points.append((metric["metricName"], metric["step"], metric["metricValue"]))
    return points


READERS: dict[str, Callable[[Path, str], Points]] = {
    "wandb": points_of_wandb,
    "mlflow": points_of_mlflow,
    "trackio": points_of_trackio,
    "swanlab": points_of_swanlab,
    "comet": points_of_comet,
}
LOCAL: dict[str, dict[str, str]] = {
    "wandb": {"mode": "offline"},
    "mlflow": {"uri": "sqlite:///mlflow.db"},
    "trackio": {},
    "swanlab": {"mode": "offline"},
    "comet": {"mode": "offline"},
}


def need(key: str) -> None:
    module = SERVICES[key].module
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"{module} is not installed: pip install 'ptft_dist[{key}]'")


def expected(run_dir: Path) -> Points:
    """The points of metrics.jsonl, with the tags that the documentation promises."""
    points = []
    for line in (run_dir / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        for key, value in row.items():
            if key in ("time_s", "tokens_per_s", "mfu", "memory_bytes"):
                points.append((f"speed/{key}", row["step"], value))
            elif key == "eval/time_s":
                points.append(("speed/eval_time_s", row["step"], value))
            elif key != "step":
                points.append((key if key.startswith("eval/") else f"train/{key}", row["step"], value))
    return sorted(points)


def close_to(points: Points) -> list[Any]:
    return [(tag, step, pytest.approx(value, rel=1e-6)) for tag, step, value in points]


@pytest.mark.parametrize("key", SERVICES)
def test_one_run_over_a_kill_without_a_gap_or_a_doubled_point(
    tmp_path: Path, documents: Path, cache: Path, key: str
) -> None:
    need(key)
    more = {"train": {"max_steps": 10}, "save": {"every": 4}, "eval": {"every": 3, "at_start": True}}
    log = {"report": False, key: LOCAL[key] | {"project": "ptft"}}
    write_recipe(tmp_path, documents, **more, log=log, run_dir="run")
    env = {"TRACKIO_DIR": str(tmp_path / "trackio"), "PTFT_TEST_SECRET": SECRET}
    words = ["train", "recipe.yaml", "data.cache_dir=${env:PTFT_TEST_SECRET}"]
    run = start(*words, cwd=tmp_path, cache=cache, env=env, patches=["slow_updates:0.1"])
    run.until(lambda: last_step(tmp_path / "run") >= 7, "update 7", timeout_s=120)
    run.kill()
    ids = json.loads((tmp_path / "run/trackers.json").read_text())

    run = start(*words, cwd=tmp_path, cache=cache, env=env)
    assert run.wait() == 0, run.stderr
    assert json.loads((tmp_path / "run/trackers.json").read_text()) == ids
    points = sorted(READERS[key](tmp_path, ids[key]))
    speed = {point for point in points if point[0].startswith("speed/")}
    stable = [point for point in points if point not in speed]
    assert [tag for tag, step, _ in stable if step == 7]
    assert stable == close_to([p for p in expected(tmp_path / "run") if not p[0].startswith("speed/")])
    # Times differ between the starts, and MLflow keeps those that it got first.
    assert sorted(p[:2] for p in speed) == [p[:2] for p in expected(tmp_path / "run") if p[0].startswith("speed/")]
    assert [step for tag, step, _ in stable if tag == "train/loss"] == list(range(1, 11))
    assert [step for tag, step, _ in stable if tag == "eval/loss"] == [0, 3, 6, 9, 10]
    for path in tmp_path.rglob("*"):
        if path.is_file() and SECRET not in str(path) and cache not in path.parents:
            data = path.read_bytes()
            if zipfile.is_zipfile(path):
                data += b"".join(zipfile.ZipFile(path).read(name) for name in zipfile.ZipFile(path).namelist())
            assert SECRET.encode() not in data, path


# --- what every tracker does, with a made-up one ----------------------------------------------------------------------


class Recorder:
    """A tracker as Accelerate's classes are. broken: the method that raises."""

    def __init__(self, arguments: Mapping[str, Any], broken: str = "") -> None:
        self.arguments, self.broken = dict(arguments), broken
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.config: dict[str, Any] = {}
        self.finished = False
        self.threads: set[int] = set()
        self.tracker = SimpleNamespace(starting_step=0, url="https://example.org/run")

    def may(self, name: str) -> None:
        self.threads.add(threading.get_ident())
        if name == self.broken:
            raise ConnectionError(f"no route to host, key {SECRET}")

    def start(self) -> None:
        self.may("start")

    def store_init_configuration(self, config: dict[str, Any]) -> None:
        self.config = config

    def log(self, values: dict[str, float], step: int) -> None:
        self.may("log")
        self.logged.append((step, values))

    def finish(self) -> None:
        self.may("finish")
        self.finished = True


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Recorder]:
    monkeypatch.setattr(trackers, "check_installed", lambda _log: None)
    return []


def opened(
    folder: Path, made: list[Recorder], *, broken: str = "", new_run: bool = False, starting_step: int = 0
) -> Any:
    """Open a tracker of a run in `folder`."""
    text = folder / "text.txt"
    text.write_text("a\n")
    write_recipe(folder, text, run_dir=str(folder / "run"), log={"wandb": {"project": "p", "mode": "online"}})
    (folder / "run").mkdir(exist_ok=True)

    def make(key: str, project: str, arguments: Mapping[str, Any]) -> Recorder:
        assert (key, project) == ("wandb", "p")
        made.append(Recorder(arguments, broken))
        made[-1].tracker.starting_step = starting_step
        return made[-1]

    found = open_trackers(load_recipe(str(folder / "recipe.yaml")), make, new_run=new_run)
    return found[0] if found else None


def write_rows(folder: Path, steps: range) -> None:
    (folder / "run").mkdir(exist_ok=True)
    (folder / "run/metrics.jsonl").write_text("".join(json.dumps({"step": i, "loss": 1.0}) + "\n" for i in steps))


def test_rows_that_the_tracker_lacks_are_sent_at_the_start(tmp_path: Path, made: list[Recorder]) -> None:
    write_rows(tmp_path, range(1, 6))
    tracker = opened(tmp_path, made, starting_step=3)
    tracker.write({"step": 6, "loss": 0.5, "mfu": 0.25})
    tracker.close()
    assert made[0].logged == [
        *((step, {"train/loss": 1.0}) for step in (3, 4, 5)),
        (6, {"train/loss": 0.5, "speed/mfu": 0.25}),
    ]
    assert made[0].finished
    assert made[0].arguments["name"] == "run"
    assert made[0].config["optim.lr"] == 0.01
    assert len(made[0].threads) == 1
    assert made[0].threads != {threading.get_ident()}


def test_a_start_that_the_user_chose_is_a_new_run(tmp_path: Path, made: list[Recorder]) -> None:
    for new_run in (False, False, True):
        opened(tmp_path, made, new_run=new_run).close()
    first, second, third = (each.arguments["id"] for each in made)
    assert first == second != third


def test_a_tracker_that_does_not_start_is_an_error_before_training(tmp_path: Path, made: list[Recorder]) -> None:
    with pytest.raises(RecipeError) as error:
        opened(tmp_path, made, broken="start")
    assert str(error.value).startswith("log.wandb: Weights & Biases did not start: ConnectionError: no route to host")
    assert str(error.value).endswith("Run `wandb login`, or set log.wandb.mode: offline")
    assert not (tmp_path / "run/trackers.json").exists()


def test_a_resume_goes_on_without_it(tmp_path: Path, made: list[Recorder], caplog: pytest.LogCaptureFixture) -> None:
    opened(tmp_path, made).close()
    assert opened(tmp_path, made, broken="start") is None
    assert "The run goes on without it; the next start sends what it lacks" in caplog.text


@pytest.mark.parametrize("broken", ["log", "finish"])
def test_a_failure_during_training_is_one_warning(
    tmp_path: Path, made: list[Recorder], caplog: pytest.LogCaptureFixture, broken: str
) -> None:
    tracker = opened(tmp_path, made, broken=broken)
    for step in range(1, 4):
        tracker.write({"step": step, "loss": 1.0})
    tracker.close()
    assert caplog.text.count("It gets no more metrics until the next start") == 1


def test_a_server_that_hangs_delays_neither_updates_nor_the_end(
    tmp_path: Path, made: list[Recorder], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = opened(tmp_path, made)
    release = threading.Event()
    monkeypatch.setattr(made[0], "log", lambda _values, step: release.wait(60))  # noqa: ARG005
    monkeypatch.setattr(trackers, "CLOSE_TIMEOUT_S", 0.1)
    tracker.write({"step": 1, "loss": 1.0})
    tracker.flush()
    tracker.close()
    assert "did not take the last metrics within 0 s" in caplog.text
    release.set()


def test_a_missing_package_is_named_with_its_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "text.txt").write_text("a\n")
    write_recipe(tmp_path, tmp_path / "text.txt", log={"swanlab": {}})
    log = load_recipe(str(tmp_path / "recipe.yaml")).recipe.log
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(RecipeError, match=r"log.swanlab: SwanLab is not installed: pip install 'ptft_dist\[swanlab\]'"):
        check_installed(log)


def test_the_values_that_a_tracker_gets_have_no_secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PTFT_TEST_SECRET", SECRET)
    (tmp_path / "text.txt").write_text("a\n")
    write_recipe(tmp_path, tmp_path / "text.txt", run_dir="runs/${env:PTFT_TEST_SECRET}", log={"wandb": {}})
    loaded = load_recipe(str(tmp_path / "recipe.yaml"))
    values = flat(public_values(loaded))
    assert values["run_dir"] == "runs/${env:PTFT_TEST_SECRET}"
    assert SECRET not in json.dumps(values)
    assert json.loads(values["data.train"])[0]["document"] == "line"
    service = SERVICES["wandb"](loaded.recipe.log.wandb, Path(loaded.recipe.run_dir), "id", known=False)
    assert service.arguments()["name"] == "${env:PTFT_TEST_SECRET}"
