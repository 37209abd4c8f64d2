"""Which Slurm job belongs to a run directory, without Slurm. tests/slurm/test_submit.py has a real cluster."""

from __future__ import annotations

from pathlib import Path

import pytest

from ptft_dist.errors import RecipeError
from ptft_dist.slurm import checks, jobs
from ptft_dist.slurm.client import Partition
from ptft_dist.slurm.render import Job
from ptft_dist.slurm.requests import Request, check, submit_all
from ptft_dist.slurm.site import Site

ALL = Partition("all", is_default=True, limit_s=None, nodes=2, cpus=8, gpus=0)


@pytest.fixture
def states(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Job -> its state, as Slurm tells it from now on. Submitted jobs have the ids 1, 2, ... and run."""
    found: dict[str, str] = {}

    def sbatch(_script: Path, _log: Path, *, array: bool = False) -> str:
        number = str(len({each.partition("_")[0] for each in found}) + 1)
        found.update(dict.fromkeys([f"{number}_0", f"{number}_1"] if array else [number], "RUNNING"))
        return number

    def facts(name: str) -> dict[str, str]:
        array, _, task = name.partition("_")
        number = {"JobId": f"{array}0{task}", "ArrayJobId": array, "ArrayTaskId": task} if task else {"JobId": array}
        return {**number, "JobState": found[name]}

    monkeypatch.setattr(jobs, "ask", lambda *_: "")
    monkeypatch.setattr(jobs, "sbatch", sbatch)
    monkeypatch.setattr(jobs, "job_facts", facts)
    monkeypatch.setattr(checks, "job_facts", facts)
    return found


def request(run: Path, part: str = "") -> Request:
    """A job that trains in `run`, or an array of two tasks with directories such as `run/PART-0`."""
    run_dirs = tuple(run / f"{part}-{i}" for i in range(2)) if part else (run,)
    job = Job(commands=[("train", "x.yaml")] * len(run_dirs), folder=run, log=run / "slurm", name="x")
    return Request("x", job, Site(), run_dirs)


@pytest.mark.parametrize("part", ["fold", "worker"])
def test_the_last_submission_of_a_run_is_the_one_that_is_asked_about(
    tmp_path: Path, states: dict[str, str], part: str
) -> None:
    submit_all([request(tmp_path)])
    assert jobs.status(tmp_path)[0] == ("job", "1")
    states["1"] = "COMPLETED"
    submit_all([request(tmp_path, part)])
    assert jobs.status(tmp_path) == [(f"{part}-{i}", f"job 2_{i} running") for i in range(2)]
    states |= {"2_0": "COMPLETED", "2_1": "COMPLETED"}
    submit_all([request(tmp_path)])
    assert jobs.status(tmp_path)[0] == ("job", "3")
    states["3"] = "COMPLETED"
    other = {"fold": "worker", "worker": "fold"}[part]
    submit_all([request(tmp_path, part)])
    states |= {"4_0": "COMPLETED", "4_1": "COMPLETED"}
    submit_all([request(tmp_path, other)])
    assert [name for name, _ in jobs.status(tmp_path)] == [f"{other}-0", f"{other}-1"]


@pytest.mark.parametrize(("first", "second"), [("", "fold"), ("fold", ""), ("worker", "fold")])
def test_a_run_directory_has_one_submission_at_a_time(
    tmp_path: Path, states: dict[str, str], monkeypatch: pytest.MonkeyPatch, first: str, second: str
) -> None:
    monkeypatch.setattr("ptft_dist.slurm.requests.partitions", lambda: {"all": ALL})
    monkeypatch.setattr("ptft_dist.slurm.requests.associations", lambda: None)
    submit_all([request(tmp_path, first)])
    job_id = "1_0" if first else "1"
    with pytest.raises(RecipeError, match=rf"run_dir: job {job_id} \(RUNNING\) has it: {tmp_path}.*ptft cancel"):
        check([request(tmp_path, second)], ask_slurm=True)
    states |= dict.fromkeys(states, "COMPLETED")
    check([request(tmp_path, second)], ask_slurm=True)


@pytest.mark.usefixtures("states")
def test_a_file_that_a_full_disk_has_cut_off_is_none(tmp_path: Path) -> None:
    """The same submission replaces it."""
    (tmp_path / "slurm").mkdir()
    (tmp_path / "slurm/job.json").write_text('{"job": "9')
    (tmp_path / "pipeline.json").write_text('{"sta')
    with pytest.raises(RecipeError, match="no Slurm job has trained here"):
        jobs.status(tmp_path)
    submit_all([request(tmp_path)])
    assert jobs.status(tmp_path)[0] == ("job", "1")


def test_a_log_that_is_followed_keeps_its_characters(
    tmp_path: Path, states: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also one that is written in two pieces."""
    submit_all([request(tmp_path)])
    log, text = tmp_path / "slurm/1.log", "损失 é\nend\n".encode()
    log.write_bytes(text[:4])

    def wait(_seconds: float) -> None:
        log.write_bytes(text)
        states["1"] = "COMPLETED"

    monkeypatch.setattr(jobs.time, "sleep", wait)
    assert "".join(jobs.log_lines(tmp_path, follow=True)) == text.decode()


@pytest.mark.parametrize("part", ["", "fold"])
def test_a_cancelled_job_is_said_to_be_cancelled(tmp_path: Path, states: dict[str, str], part: str) -> None:
    """Slurm says that it has failed, because the run has ended with exit code 75."""
    submit_all([request(tmp_path, part)])
    jobs.cancel(tmp_path)
    states |= dict.fromkeys(states, "FAILED")
    said = [text for name, text in jobs.status(tmp_path) if name in ("state", "fold-0", "fold-1")]
    assert said
    assert all(text.endswith("cancelled by ptft cancel") for text in said)


def test_a_pipeline_without_jobs_has_nothing_to_cancel(tmp_path: Path) -> None:
    (tmp_path / "pipeline.json").write_text('{"stages": {"base": "model"}}')
    with pytest.raises(RecipeError, match=f"{tmp_path}: no stage has a Slurm job"):
        jobs.cancel(tmp_path)
