"""20: a save at SIGTERM is missing, is done by ranks at different steps, or is done in the signal handler."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from in_process import make_recipe, make_store, make_trainer, ragged
from support import last_step, start, write_recipe

from ptft_dist.training.stopping import StopRequest
from ptft_dist.training.trainer import Outcome


@pytest.fixture(autouse=True)
def _handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_the_handler_saves_nothing_and_the_loop_does(tmp_path: Path) -> None:
    """The signal arrives during the second of three micro-batches of update 2."""
    recipe = make_recipe(batch={"micro_size": 2}, train={"max_steps": 9})
    stop = StopRequest(None)
    store = make_store(tmp_path / "store", ragged(30))
    with stop.listening(), make_trainer(tmp_path, store, recipe, stop) as (trainer, kept):
        healthy, calls = trainer.task.loss, 0

        def signalled(*args: object) -> object:
            nonlocal calls
            calls += 1
            if calls == 5:
                os.kill(os.getpid(), signal.SIGTERM)
                assert not (tmp_path / "checkpoints").exists()
            return healthy(*args)  # type: ignore[arg-type]

        trainer.task.loss = signalled  # type: ignore[assignment,method-assign]
        # The sum in which ranks tell each other was made before: all stop after the update that follows.
        assert trainer.fit() == Outcome(False, "SIGTERM")
    assert calls == 9
    assert [row["step"] for row in kept.rows] == [1, 2, 3]
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000003"]


def test_a_second_ctrl_c_interrupts() -> None:
    """The first Ctrl-C requests a stop after the update; the second interrupts at once."""
    stop = StopRequest(None)
    with stop.listening():
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested()
        assert stop.reason == "SIGINT"
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("signalled", [[1], [0, 1]], ids=["rank 1 only", "both, one after the other"])
def test_all_ranks_stop_after_the_same_update(
    tmp_path: Path, documents: Path, cache: Path, signalled: list[int]
) -> None:
    write_recipe(tmp_path, documents, train={"max_steps": 500}, eval={"every": None}, save={"every": None})
    run = start("train", "recipe.yaml", cwd=tmp_path, cache=cache, ranks=2, patches=["slow_updates:0.05"])
    run.until(lambda: last_step(tmp_path / "run") >= 2, "update 2")
    for rank in signalled:  # the second signal comes while the first one is being honoured
        os.kill(run.processes[rank].pid or 0, signal.SIGTERM)
        time.sleep(0.03)
    assert run.wait(30) == 75, run.stderr
    assert run.exit_codes == [75, 75]
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert (result["status"], result["reason"]) == ("stopped", "SIGTERM")
    assert result["steps"] == last_step(tmp_path / "run")
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == [f"step-{result['steps']:08d}"]
    checked = start("checkpoints", "run", cwd=tmp_path, cache=cache)
    assert checked.wait() == 0
