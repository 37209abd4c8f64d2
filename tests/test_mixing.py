"""data.mixing: which source each row of a run comes from, and that nothing else changes it."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import outcome, start, train_rows, write_recipe

from ptft_dist.api import load_recipe
from ptft_dist.config.data_section import MixingSection
from ptft_dist.data.mixture import limited, periods_of, whole_weights
from ptft_dist.data.order import Stream
from ptft_dist.errors import DataError, RecipeError
from ptft_dist.launch.environment import place
from ptft_dist.session import Session

NAMES = ("red", "green", "blue")


def sources(folder: Path) -> list[dict[str, Any]]:
    """Three files of documents, each with a word of its own, of 60, 30 and 10 documents."""
    folder.mkdir(exist_ok=True)
    rng = random.Random(0)
    for name, count in zip(NAMES, (60, 30, 10), strict=True):
        texts = [" ".join([name, *rng.choices("abcdefgh", k=rng.randint(5, 40))]) for _ in range(count)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return [{"path": f"{name}.jsonl", "name": name} for name in NAMES]


@pytest.fixture
def session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Session]:
    monkeypatch.setenv("PTFT_CACHE", str(tmp_path / "cache"))

    def make(mixing: dict[str, Any] | None, packing: bool = False, steps: Any = (), **more: Any) -> Session:
        data = {"train": sources(tmp_path), "validation": None, "mixing": mixing, "steps": list(steps)}
        given = {"data": data, "clm": {"packing": packing}, "eval": {"every": None}, **more}
        path = write_recipe(tmp_path, tmp_path, **given)
        return Session(load_recipe(str(path)), place())

    return make


# --- the order -------------------------------------------------------------------------------------------------------


def draws(table: Any, most: Any, sizes: tuple[int, ...], positions: int) -> list[int]:
    periods, _ = limited(table, most)
    rows = Stream(sizes, 7, periods).rows(0, positions)
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    return [next(i for i, end in enumerate(ends) if row < end) for row in rows.tolist()]


def test_each_period_has_its_own_weights() -> None:
    table = [(0, (3, 1, 0)), (400, (0, 0, 1)), (500, (1, 1, 2))]
    order = draws(table, None, (50, 20, 9), 1000)
    assert Counter(order[:400]) == {0: 300, 1: 100}
    assert set(order[400:500]) == {2}
    assert Counter(order[500:900]) == {0: 100, 1: 100, 2: 200}
    for start_at in range(0, 400, 8):  # evenly spread
        assert abs(order[start_at : start_at + 8].count(1) - 2) <= 1


def test_any_interval_gives_the_same_rows() -> None:
    periods, end = limited([(0, (3, 1, 2)), (45, (1, 2, 2))], [100, 40, 30])
    stream = Stream((50, 20, 9), 7, periods)
    assert end == 170  # everything is used up
    whole, epochs = stream.rows(0, 170), stream.epochs(0, 170)
    rng = random.Random(0)
    for _ in range(50):
        first = rng.randrange(170)
        last = rng.randint(first + 1, 170)
        assert stream.rows(first, last).tolist() == whole[first:last].tolist()
        assert stream.epochs(first, last).tolist() == epochs[first:last].tolist()
    counts = Counter(whole.tolist())
    assert [counts[row] for row in range(70)] == [2] * 70  # two epochs of each of these rows
    assert sorted(counts[row] for row in range(70, 79)) == [3] * 6 + [4] * 3
    assert [sorted(whole[epochs == 0].tolist()).count(row) for row in range(79)] == [1] * 79


def test_a_source_that_is_used_up_is_left_out() -> None:
    most, weights = [1000, 30, 20], (1, 1, 2)
    order = draws([(0, weights)], most, (500, 20, 9), 600)
    assert Counter(order[:40]) == {0: 10, 1: 10, 2: 20}  # then nothing of the third is left
    assert 2 not in order[40:]
    assert Counter(order[40:80]) == {0: 20, 1: 20}
    assert set(order[80:]) == {0}
    assert order.count(1) == 30


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ((3, 1), (3, 1)),
        ((0.7, 0.3), (7, 3)),
        ((6.0, 2.0, 0.0), (3, 1, 0)),
        ((1 / 3, 2 / 3), (1, 2)),
        ((2**0.5, 1.0), (5858, 4142)),
        ((1e-9, 1.0), (1, 9999)),
    ],
)
def test_whole_weights(weights: tuple[float, ...], expected: tuple[int, ...]) -> None:
    assert whole_weights(weights) == expected


def test_temperature_is_a_power_of_the_sizes() -> None:
    sizes = [8100, 900, 1]
    for temperature, expected in ((1.0, (8100, 900, 1)), (2.0, (90, 30, 1))):
        (period,), end = periods_of(MixingSection(temperature=temperature), NAMES, sizes, None)
        assert period.weights == expected
        assert end is None


# --- runs ------------------------------------------------------------------------------------------------------------


def test_rows_of_a_run_come_from_the_sources_by_weight(session: Callable[..., Session]) -> None:
    mixing = {"weights": {"red": 1, "green": 1, "blue": 2}}
    made = session(mixing, train={"max_steps": 20}, batch={"global_size": 8, "micro_size": 8})
    words: Counter[str] = Counter()
    for step in range(20):
        rows = made.plan.rows_of(step)
        texts = made.trained.tokenizer.batch_decode([made.store.row(int(row)).input_ids.tolist() for row in rows])
        here = Counter(next(name for name in NAMES if name in text) for text in texts)
        assert here == {"red": 2, "green": 2, "blue": 4}
        words += here
    report = made.prepared.report
    assert [report.sources[f"train[{i}]"].records for i in range(3)] == [60, 30, 10]
    assert sum(each.tokens for each in report.sources.values()) == report.train.tokens
    plain = session(None)
    assert plain.prepared.fingerprint != made.prepared.fingerprint
    assert len(plain.store) == len(made.store) == 100


def test_packed_rows_do_not_cross_sources(session: Callable[..., Session]) -> None:
    made = session({"temperature": 1e6}, packing=True, train={"max_steps": 4})
    for i in range(len(made.store)):
        text = made.trained.tokenizer.decode(made.store.row(i).input_ids)
        assert sum(name in text for name in NAMES) <= 1


def test_a_curriculum_changes_the_weights_at_its_updates(session: Callable[..., Session]) -> None:
    table = [
        {"from_step": 0, "weights": {"red": 1, "green": 0, "blue": 0}},
        {"from_step": 3, "weights": {"red": 0, "green": 1, "blue": 1}},
    ]
    made = session({"schedule": table}, train={"max_steps": 6}, batch={"global_size": 6, "micro_size": 6})
    starts = [0, 60, 90]
    for step in range(6):
        source = Counter(sum(row >= first for first in starts[1:]) for row in made.plan.rows_of(step).tolist())
        assert source == ({0: 6} if step < 3 else {1: 3, 2: 3})


def test_a_run_that_needs_more_than_there_is_is_refused(session: Callable[..., Session]) -> None:
    mixing = {"temperature": 1.0, "max_epochs": 2}
    fits = {"train": {"max_steps": 25}, "batch": {"global_size": 8, "micro_size": 8}}
    assert session(mixing, **fits).plan.positions(24)[1] == 200
    with pytest.raises(DataError, match="the run needs 208 rows, and the sources give 200"):
        _ = session(mixing, **fits | {"train": {"max_steps": 26}}).plan
    with pytest.raises(DataError, match="until all are used up"):
        _ = session(mixing, train={"max_steps": None, "max_tokens": 10**6}).plan


def test_a_period_whose_sources_are_used_up_before_the_next_one_is_named(session: Callable[..., Session]) -> None:
    """The 60 documents of red last for 7 updates, and a half; green has not been read at all."""
    table = [
        {"from_step": 0, "weights": {"red": 1, "green": 0, "blue": 0}},
        {"from_step": 10, "weights": {"red": 0, "green": 1, "blue": 0}},
    ]
    given = {"train": {"max_steps": 12}, "batch": {"global_size": 8, "micro_size": 8}}
    with pytest.raises(DataError) as refused:
        _ = session({"schedule": table, "max_epochs": 1}, **given).plan
    assert "the run needs 96 rows, and after 60 of them (update 7) the sources" in str(refused.value)
    assert "schedule.0 are used up" in str(refused.value)
    table[1]["from_step"] = 7
    assert session({"schedule": table, "max_epochs": 1}, **given | {"train": {"max_steps": 10}}).plan.total_steps == 10
    with pytest.raises(DataError, match=r"after 86 of them \(update 10\) the sources .* schedule\.1 are used up"):
        _ = session({"schedule": table, "max_epochs": 1}, **given).plan


def test_a_source_without_rows_is_named(session: Callable[..., Session], tmp_path: Path) -> None:
    """The function drops all documents of one source."""
    (tmp_path / "mine.py").write_text("def without_blue(text):\n    return None if 'blue' in text else text\n")
    steps = [{"custom": {"function": "mine.without_blue"}}]
    with pytest.raises(DataError, match=r"data\.train\.2 \(blue\): no rows are left"):
        session({"weights": {"red": 1, "green": 1, "blue": 1}}, steps=steps)


def test_a_mixed_run_is_resumed_to_the_bit(tmp_path: Path, cache: Path) -> None:
    """Killed and resumed on two ranks with shards and steps; the losses are those of one process."""
    mixing = {
        "schedule": [
            {"from_step": 0, "weights": {"red": 2, "green": 1, "blue": 0}},
            {"from_step": 3, "weights": {"red": 0, "green": 1, "blue": 2}},
        ]
    }
    data = {"train": sources(tmp_path), "validation": 0.1, "mixing": mixing, "steps": ["whitespace", "exact_dedup"]}
    common = {"train": {"max_steps": 6}, "save": {"every": 2}, "eval": {"every": 6}, "data": data}
    path = write_recipe(tmp_path, tmp_path, **common)
    env = {"PTFT_SHARD_MB": "0.001"}

    def run(name: str, ranks: int, *patches: str) -> int:
        words = ("train", str(path), f"run_dir={name}")
        return start(*words, cwd=tmp_path, cache=cache, ranks=ranks, env=env, patches=patches).wait()

    assert run("whole", 2) == 0
    assert run("parted", 2, "die_in_rank:1:4") != 0  # after the save at update 4, in the second period
    assert run("parted", 2) == 0
    assert outcome(tmp_path / "parted") == outcome(tmp_path / "whole")
    assert run("alone", 1) == 0
    for row, expected in zip(train_rows(tmp_path / "alone"), train_rows(tmp_path / "whole"), strict=True):
        assert row["loss"] == pytest.approx(expected["loss"], rel=1e-5)


WRONG: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({}, {}, "exactly one of weights, temperature, schedule"),
    ({"weights": {"red": 1, "green": 1}}, {}, "the source 'blue' has no weight"),
    ({"weights": {"red": 1, "green": 1, "blue": 1, "pink": 1}}, {}, "no source with the name 'pink'"),
    ({"weights": {"red": 0, "green": 1, "blue": 1}}, {}, "above 0"),
    ({"temperature": 0.5}, {}, "at least 1"),
    ({"temperature": 2}, {"train": {"max_steps": None, "epochs": 1}}, "each source has its own epochs"),
    (
        {"schedule": [{"from_step": 5, "weights": {"red": 1, "green": 1, "blue": 1}}]},
        {},
        "the first period needs from_step: 0",
    ),
    ({"schedule": [{"from_step": 0, "weights": {"red": 0, "green": 0, "blue": 0}}]}, {}, "needs a weight above 0"),
    (
        {"schedule": [{"from_step": 0, "weights": {"red": 1, "green": 1, "blue": 1}}]},
        {"batch": {"global_size": None, "global_tokens": 500}},
        "set batch.global_size",
    ),
]


@pytest.mark.parametrize(("mixing", "more", "message"), WRONG, ids=range(len(WRONG)))
def test_wrong_mixtures(session: Callable[..., Session], mixing: Any, more: Any, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        session(mixing, **more)
    assert message in str(caught.value)


def test_sources_need_different_names(tmp_path: Path) -> None:
    data = {"train": [{**source, "name": "same"} for source in sources(tmp_path)], "mixing": {"temperature": 1}}
    with pytest.raises(RecipeError, match="same is the name of another source too"):
        load_recipe(str(write_recipe(tmp_path, tmp_path, data=data)))
    one = {"train": sources(tmp_path)[:1], "mixing": {"temperature": 1}}
    with pytest.raises(RecipeError, match="needs several sources"):
        load_recipe(str(write_recipe(tmp_path, tmp_path, data=one)))
