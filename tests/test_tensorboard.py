"""What a run writes for TensorBoard, and the names under which `ptft tensorboard` shows runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support import last_step, start, write_recipe
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from ptft_dist.cli.tensorboard import event_folders, link_runs
from ptft_dist.reporting.metrics import tag


def content(events: EventAccumulator, name: str, plugin: str) -> bytes:
    """The plugin data of a summary."""
    return events.SummaryMetadata(name).plugin_data.content if plugin else b""


def text(events: EventAccumulator, name: str) -> list[str]:
    return [value.decode() for event in events.Tensors(name) for value in event.tensor_proto.string_val]


def test_a_run_that_was_killed(tmp_path: Path, documents: Path, cache: Path) -> None:
    """Recipe, hyperparameters and charts are there once, and every tag is in a group."""
    write_recipe(tmp_path, documents, save={"every": 2}, eval={"metric": "perplexity"})
    run = start("train", "recipe.yaml", "optim.lr=0.003", cwd=tmp_path, cache=cache, patches=["slow_updates:0.1"])
    run.until(lambda: last_step(tmp_path / "run") >= 3, "update 3")
    run.kill()
    run = start("train", "recipe.yaml", "optim.lr=0.003", cwd=tmp_path, cache=cache)
    assert run.wait() == 0, run.stderr

    events = EventAccumulator(str(tmp_path / "run/tensorboard")).Reload()
    tags: dict[str, Any] = events.Tags()
    assert {name.split("/")[0] for name in tags["scalars"]} == {"train", "eval", "speed"}
    assert {"train/loss", "eval/loss", "eval/perplexity", "speed/tokens_per_s", "speed/eval_time_s"} <= {
        *tags["scalars"]
    }

    (recipe,) = text(events, "recipe/text_summary")
    places = [recipe.index(word) for word in ("**as given**", "**from the command line**", "**with every value**")]
    assert places == sorted(places)
    assert "    optim.lr: 0.003" in recipe

    layout = Layout.FromString(text_bytes(events, "custom_scalars__config__"))
    (category,) = layout.category
    charts = {chart.title: list(chart.multiline.tag) for chart in category.chart}
    assert charts == {
        "training and validation loss": ["^train/loss$", "^eval/loss$"],
        "perplexity": ["^eval/perplexity$"],
    }

    session = HParamsPluginData.FromString(content(events, "_hparams_/session_start_info", "hparams"))
    values = session.session_start_info.hparams
    assert values["optim.lr"].number_value == 0.003
    assert "run_dir" not in values
    assert not values["clm.packing"].bool_value
    experiment = HParamsPluginData.FromString(content(events, "_hparams_/experiment", "hparams"))
    shown = {info.name.tag for info in experiment.experiment.metric_infos}
    assert shown == {"train/loss", "eval/loss", "eval/perplexity"}


def text_bytes(events: EventAccumulator, name: str) -> bytes:
    (event,) = events.Tensors(name)
    (value,) = event.tensor_proto.string_val
    assert isinstance(value, bytes)
    return value


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("loss", "train/loss"),
        ("eval/loss", "eval/loss"),
        ("tokens_per_s", "speed/tokens_per_s"),
        ("eval/time_s", "speed/eval_time_s"),
        ("generation_s", "speed/generation_s"),
        ("rewards/margin", "train/rewards/margin"),
    ],
)
def test_tags(key: str, expected: str) -> None:
    assert tag(key) == expected


def test_names_of_runs(tmp_path: Path) -> None:
    for name in ("a", "sweep/trial-1", "folds", "folds/fold-0"):
        (tmp_path / name / "tensorboard").mkdir(parents=True)
        (tmp_path / name / "tensorboard/events.out.tfevents.1").touch()
    (tmp_path / "b/tensorboard").mkdir(parents=True)  # without events
    links = tmp_path / "links"
    link_runs(tmp_path, links)
    link_runs(tmp_path, links)  # again, as it does every 30 seconds
    found = {str(path.relative_to(links)) for path in links.rglob("*") if path.is_symlink()}
    assert found == {"a", "sweep/trial-1", "folds", "folds, fold-0"}
    assert (links / "a").resolve() == tmp_path / "a/tensorboard"
    (tmp_path / "sweep/tensorboard").mkdir()  # a run around one that is shown already
    (tmp_path / "sweep/tensorboard/events.out.tfevents.1").touch()
    link_runs(tmp_path, links)
    found = {str(path.relative_to(links)) for path in links.rglob("*") if path.is_symlink()}
    assert found == {"a", "sweep", "sweep, trial-1", "folds", "folds, fold-0"}
    assert (tmp_path / "sweep/trial-1/tensorboard/events.out.tfevents.1").exists()
    assert list(event_folders(tmp_path / "a")) == ["a"]
