"""The learning rate against transformers' schedules, and against points computed by hand.

transformers gives update s of a warmup of W the share s / W, so its first update moves nothing; ours gets (s + 1) / W.
After the warmup both count alike. So: ours(s) == theirs(s + 1) for s < W, and ours(s) == theirs(s) from W on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import get_scheduler

from ptft_dist.config.recipe import OptimSection
from ptft_dist.training.schedule import lr_at, warmup_steps

PEAK = 3e-3
FALLING = ["linear", "cosine", "wsd", "polynomial"]
ALL = [*FALLING, "constant", "inverse_sqrt"]


def optim(schedule: str, **settings: Any) -> OptimSection:
    return OptimSection.model_validate({"schedule": schedule, "lr": PEAK, **settings})


def theirs(name: str, warmup: int, total: int, **specific: Any) -> Callable[[int], float]:
    # Only its lambda is called here; the optimizer never steps.
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)
    scheduler = get_scheduler(name, optimizer, warmup, total, specific)
    return lambda step: PEAK * scheduler.lr_lambdas[0](step)


CASES = [
    ("constant", {}, "constant_with_warmup", {}),
    ("linear", {}, "linear", {}),
    ("cosine", {}, "cosine", {}),
    ("cosine", {"min_lr_ratio": 0.1}, "cosine_with_min_lr", {"min_lr_rate": 0.1}),
    ("polynomial", {}, "polynomial", {"power": 2.0, "lr_end": 0.0}),
    ("polynomial", {"power": 3, "min_lr_ratio": 0.25}, "polynomial", {"power": 3.0, "lr_end": PEAK / 4}),
    ("wsd", {"decay": 0.5}, "warmup_stable_decay", {"num_decay_steps": 20, "decay_type": "linear"}),
    (
        "wsd",
        {"min_lr_ratio": 0.1},
        "warmup_stable_decay",
        {"num_decay_steps": 8, "decay_type": "linear", "min_lr_ratio": 0.1},
    ),
    # Without a warmup transformers takes a time scale of 10,000 updates unless told otherwise.
    ("inverse_sqrt", {"warmup": 3}, "inverse_sqrt", {"timescale": 3}),
]


@pytest.mark.parametrize("warmup", [0, 1, 7])
@pytest.mark.parametrize(("schedule", "settings", "name", "specific"), CASES)
def test_agrees_with_transformers(
    schedule: str, settings: dict[str, Any], name: str, specific: dict[str, Any], warmup: int
) -> None:
    total = 40
    warmup = settings.get("warmup", warmup)
    section = optim(schedule, **{"warmup": warmup, **settings})
    lr = theirs(name, warmup, total, **specific)
    # transformers lifts the warmup of wsd to min_lr_ratio too; ours starts low whatever the floor is.
    compared = range(warmup if name == "warmup_stable_decay" else 0, total)
    for step in compared:
        expected = lr(step + 1 if step < warmup else step)
        assert lr_at(step, section, total) == pytest.approx(expected, rel=1e-12), f"update {step}"


@pytest.mark.parametrize(
    ("schedule", "settings", "shares"),
    [
        # ten updates each, as shares of the peak
        ("constant", {"warmup": 4}, [0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1, 1]),
        ("linear", {}, [1, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1]),
        ("linear", {"warmup": 2, "min_lr_ratio": 0.2}, [0.5, 1, 1, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3]),
        ("linear", {"warmup": 0.5}, [0.2, 0.4, 0.6, 0.8, 1, 1, 0.8, 0.6, 0.4, 0.2]),
        ("wsd", {"warmup": 2, "decay": 0.4}, [0.5, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25]),
        ("wsd", {"decay": 0.0}, [1] * 10),
        ("wsd", {"decay": 1.0}, [1, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1]),
        ("wsd", {"warmup": 6, "decay": 1.0}, [1 / 6, 1 / 3, 0.5, 2 / 3, 5 / 6, 1, 1, 0.75, 0.5, 0.25]),
        ("wsd", {}, [1, 1, 1, 1, 1, 1, 1, 1, 1, 0.5]),
        ("polynomial", {}, [1, 0.81, 0.64, 0.49, 0.36, 0.25, 0.16, 0.09, 0.04, 0.01]),
        ("polynomial", {"power": 1, "min_lr_ratio": 0.5}, [1, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55]),
        ("inverse_sqrt", {"warmup": 1}, [1, 1, 2**-0.5, 3**-0.5, 0.5, 5**-0.5, 6**-0.5, 7**-0.5, 8**-0.5, 1 / 3]),
        (
            "inverse_sqrt",
            {"warmup": 4},
            [0.25, 0.5, 0.75, 1, 1, 0.8**0.5, (2 / 3) ** 0.5, (4 / 7) ** 0.5, 0.5**0.5, 2 / 3],
        ),
    ],
)
def test_points_by_hand(schedule: str, settings: dict[str, Any], shares: list[float]) -> None:
    section = optim(schedule, **settings)
    assert [lr_at(step, section, 10) / PEAK for step in range(10)] == pytest.approx(shares, rel=1e-12)


def test_cosine_by_hand() -> None:
    """Half a cosine over 4 updates from 1 to 0.2: at a quarter, 0.2 + 0.8 (1 + sqrt(2)/2) / 2."""
    section = optim("cosine", min_lr_ratio=0.2)
    shares = [lr_at(step, section, 4) / PEAK for step in range(5)]
    root = 2**0.5 / 2
    assert shares == pytest.approx([1, 0.2 + 0.4 * (1 + root), 0.6, 0.2 + 0.4 * (1 - root), 0.2], rel=1e-12)


@pytest.mark.parametrize(
    ("warmup", "total", "updates"),
    [(0.0, 50, 0), (0.05, 300, 15), (0.5, 7, 4), (0.999, 1000, 999), (1, 50, 1), (30, 50, 30)],
)
def test_a_warmup_below_one_is_a_share_and_from_one_on_a_number(warmup: float, total: int, updates: int) -> None:
    assert warmup_steps(optim("cosine", warmup=warmup), total) == updates


@pytest.mark.parametrize("warmup", [0, 1, 3, 0.1, 0.9])
@pytest.mark.parametrize("schedule", ALL)
@pytest.mark.parametrize("total", [1, 2, 3, 10, 1000])
def test_every_update_moves_something_and_none_exceeds_the_peak(schedule: str, warmup: float, total: int) -> None:
    section = optim(schedule, warmup=warmup)
    for step in range(total):
        assert 0 < lr_at(step, section, total) <= PEAK * (1 + 1e-12)


@pytest.mark.parametrize("ratio", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("schedule", FALLING)
def test_ends_at_min_lr_ratio_and_never_goes_below(schedule: str, ratio: float) -> None:
    total = 50
    section = optim(schedule, min_lr_ratio=ratio, warmup=5)
    rates = [lr_at(step, section, total) for step in range(5, total)]
    assert lr_at(total, section, total) == pytest.approx(PEAK * ratio, abs=1e-15)
    assert min(rates) >= PEAK * ratio * (1 - 1e-12)
    assert rates == sorted(rates, reverse=True)


@pytest.mark.parametrize("schedule", ALL)
def test_the_warmup_arrives_at_the_peak_and_the_decay_starts_there(schedule: str) -> None:
    section = optim(schedule, warmup=10)
    assert [lr_at(9, section, 100), lr_at(10, section, 100)] == pytest.approx([PEAK, PEAK], rel=1e-12)
