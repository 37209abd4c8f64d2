"""18: a failed run exits with 0; other ranks keep waiting after a rank died.

With a real launcher: distributed/test_stop.py.
"""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from support import last_step, start, write_recipe

from ptft_dist.launch.local import own_exit_code


@pytest.mark.parametrize("code", [1, 2, 137, -9, -15])
@pytest.mark.parametrize("said", ["", "0", "5", "x", "-1"])
def test_a_failure_is_never_0(code: int, said: str) -> None:
    found = own_exit_code(code, said)
    assert found > 0
    if said == "5":
        assert found == 5


@pytest.mark.parametrize("ending", ["raise_in_rank:1:3", "die_in_rank:1:3"])
def test_the_other_rank_does_not_wait(tmp_path: Path, documents: Path, cache: Path, ending: str) -> None:
    write_recipe(tmp_path, documents, train={"max_steps": 500}, eval={"every": None}, save={"every": None})
    run = start("train", "recipe.yaml", cwd=tmp_path, cache=cache, ranks=2, patches=[ending])
    run.until(lambda: last_step(tmp_path / "run") >= 2, "update 2")
    ended = time.monotonic()
    assert run.wait(20) != 0
    assert time.monotonic() - ended < 20
    assert 0 not in run.exit_codes
