"""`ptft submit`, `status`, `logs` and `cancel` on a real cluster of two nodes."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

from cluster import SLOW_PATH, Cluster, Job
from pipeline_support import small_demo
from support import last_step, outcome, start, write_recipe

STEPS = 60
SLOW = {"PYTHONPATH": SLOW_PATH, "PTFT_SLOW_STARTS": "1"}
ODD = """it's 100% "mine" $(touch pwned)"""


def ptft(
    cluster: Cluster, cache: Path, cwd: Path, *words: str, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    variables = cluster.variables | {"PTFT_CACHE": str(cache), "OMP_NUM_THREADS": "1"} | (env or {})
    return subprocess.run(["ptft", *words], cwd=cwd, env=variables, capture_output=True, text=True, check=False)


def test_a_run_is_submitted_watched_cancelled_and_resumed(
    cluster: Cluster, tmp_path: Path, documents: Path, cache: Path
) -> None:
    write_recipe(tmp_path, documents, train={"max_steps": STEPS}, save={"every": 50}, eval={"every": 50})
    written = ptft(cluster, cache, tmp_path, "init", "start", "--site")
    assert written.returncode == 0, written.stderr
    profile = (tmp_path / "start/site.yaml").read_text()
    assert "#   all: 2 nodes with 8 CPUs and 2 GPUs, no time limit, the default\n" in profile
    (tmp_path / "site.yaml").write_text(profile.replace("cpus_per_task: 8", "cpus_per_task: 2"))
    run = start("train", "recipe.yaml", "run_dir=whole", cwd=tmp_path, cache=cache, ranks=2)
    assert run.wait() == 0, run.stderr

    run_dir = tmp_path / ODD
    words = ("submit", "recipe.yaml", f"run_dir={json.dumps(ODD)}", "--site", "site.yaml", "--nodes", "2")
    done = ptft(cluster, cache, tmp_path, *words, "--launch", "multi_node_ddp", env=SLOW)
    assert done.returncode == 0, done.stderr
    number = done.stdout.split(":")[0].removeprefix("job ")
    job = Job(cluster, number, run_dir / f"slurm/{number}.log")
    job.until(lambda: last_step(run_dir) >= 2, "update 2")
    again = ptft(cluster, cache, tmp_path, *words, "--launch", "multi_node_ddp")
    assert again.returncode == 2
    assert f"run_dir: job {number} (RUNNING) has it" in again.stderr
    status = ptft(cluster, cache, tmp_path, "status", ODD).stdout
    for line in (rf"job {number}", "state running", "nodes n[0-1]"):
        assert line in " ".join(status.split())

    assert ptft(cluster, cache, tmp_path, "status", number).stdout.splitlines()[0].split() == ["job", number]
    (listed,) = ptft(cluster, cache, tmp_path, "status").stdout.splitlines()
    assert listed.split()[:2] == [number, "running"]
    assert listed.endswith(f" {run_dir}")
    assert ptft(cluster, cache, tmp_path, "cancel", ODD).stdout == f"job {number} saves a checkpoint and ends\n"
    assert job.wait() == ("FAILED", "75:0"), job.log
    step = last_step(run_dir)
    assert step < STEPS
    assert (run_dir / f"checkpoints/step-{step:08d}/manifest.json").exists()
    assert job.fact("Restarts") == "0"
    (row,) = [json.loads(line) for line in (run_dir / "slurm.jsonl").read_text().splitlines()]
    assert (row["exit_code"], row["requeued"]) == (75, False)
    assert "not requeued, because the job was cancelled" in row["cause"]
    status = ptft(cluster, cache, tmp_path, "status", ODD).stdout
    assert "state cancelled by ptft cancel" in " ".join(status.split())
    assert "left without evaluations" not in status
    assert "has already ended" in ptft(cluster, cache, tmp_path, "cancel", ODD).stdout

    done = ptft(cluster, cache, tmp_path, *words, "--launch", "multi_node_ddp")
    assert done.returncode == 0, done.stderr
    logs = ptft(cluster, cache, tmp_path, "logs", "-f", ODD)
    assert f"resumed from {ODD}/checkpoints/step-{step:08d}" in logs.stdout
    assert "ptft: finished" in logs.stdout
    assert outcome(run_dir) == outcome(tmp_path / "whole")
    second = ptft(cluster, cache, tmp_path, "logs", "--task", "1", ODD).stdout
    assert second.startswith("1: + accelerate launch")
    assert all(line.startswith("1: ") for line in second.splitlines())
    status = ptft(cluster, cache, tmp_path, "status", ODD).stdout
    assert f"checkpoint  update {STEPS}" in status
    assert "start 1" in status
    assert status.splitlines()[-1].endswith(": finished")
    assert not list(tmp_path.rglob("pwned"))


def submitted(done: subprocess.CompletedProcess[str], cluster: Cluster, log: Path) -> list[Job]:
    """The jobs of a submission, in its order."""
    assert done.returncode == 0, done.stderr
    numbers = [line.split(":")[0].removeprefix("job ") for line in done.stdout.splitlines() if line.startswith("job ")]
    return [Job(cluster, number, log / f"{number}.log") for number in numbers]


def test_folds_are_an_array_with_a_table(cluster: Cluster, tmp_path: Path, documents: Path, cache: Path) -> None:
    """Two tasks train on one node at the same time, each with two processes and without a launcher between; on a site
    with GPUs the data are prepared before, in a job of their own."""
    data = {"validation": None, "folds": 2}
    write_recipe(tmp_path, documents, train={"max_steps": 4}, save={"every": 4}, eval={"every": 4}, data=data)
    (tmp_path / "site.yaml").write_text("gpus: gres\nstarter: srun\nlead_s: 30\ncpu_jobs: {time: '9'}\n")
    words = ("submit", "recipe.yaml", "--site", "site.yaml", "--gpus-per-node", "1", "--processes-per-node", "2")
    done = ptft(cluster, tmp_path / "cache", tmp_path, *words, "--launch", "cpu", "--array")
    prepare, folds, table = submitted(done, cluster, tmp_path / "run/slurm")
    assert table.fact("Dependency").startswith(f"afterok:{folds.number}")
    assert table.wait() == ("COMPLETED", "0:0"), table.log
    assert prepare.fact("JobState") == "COMPLETED"
    assert prepare.fact("TimeLimit") == "00:09:00"
    assert prepare.fact("TRES").find("gres") == -1
    logs = [(tmp_path / f"run/slurm/{folds.number}_{task}.log").read_text() for task in (0, 1)]
    for log in logs:
        assert "loaded from the cache" in log
        assert "accelerate launch" not in log
    summary = json.loads((tmp_path / "run/folds.json").read_text())
    assert summary["folds"] == 2
    assert "each fold, and mean +- sample standard deviation over 2 folds" in table.log
    environment = json.loads((tmp_path / "run/fold-1/environment.json").read_text())
    assert (environment["kind"], environment["world_size"]) == ("ddp", 2)
    run = start("train", "recipe.yaml", "data.fold=1", "run_dir=here", cwd=tmp_path, cache=cache, ranks=2)
    assert run.wait() == 0, run.stderr
    assert outcome(tmp_path / "run/fold-1") == outcome(tmp_path / "here")
    assert ptft(cluster, cache, tmp_path, "status", "run/fold-1").stdout.startswith(f"job         {folds.number}_1\n")

    lines = ptft(cluster, cache, tmp_path, "status", "run").stdout.splitlines()
    assert [line.split()[:4] for line in lines] == [
        [f"fold-{i}", "job", f"{folds.number}_{i}", "completed,"] for i in (0, 1)
    ]
    ended = ptft(cluster, cache, tmp_path, "cancel", "run").stdout.splitlines()
    assert ended == [f"fold-{i}: job {folds.number}_{i} has already ended" for i in (1, 0)]
    again = ptft(cluster, tmp_path / "cache", tmp_path, *words, "--launch", "cpu", "--array", "--dry-run")
    assert "set -- prepare" not in again.stdout  # the data are there


def test_a_sweep_is_an_array_that_goes_on(cluster: Cluster, tmp_path: Path, documents: Path, cache: Path) -> None:
    """Two tasks share four trials. Both get a signal in their first trials, are requeued, and go on with them; a trial
    ends as without Slurm."""
    write_recipe(tmp_path, documents, train={"max_steps": 20}, save={"every": 5}, eval={"every": 10})
    choices = [0.002, 0.004, 0.006, 0.008]
    (tmp_path / "search.yaml").write_text(f"method: grid\nsearch: {{optim.lr: {{choice: {choices}}}}}\n")
    (tmp_path / "site.yaml").write_text("lead_s: 30\n")
    words = ("submit", "recipe.yaml", "--site", "site.yaml", "--sweep", "search.yaml", "--tasks", "2")
    (array,) = submitted(ptft(cluster, cache, tmp_path, *words, env=SLOW), cluster, tmp_path / "run/slurm")
    tasks = [Job(cluster, f"{array.number}_{i}", tmp_path / f"run/slurm/{array.number}_{i}.log") for i in (0, 1)]
    tasks[0].until(lambda: last_step(tmp_path / "run/trial-0000") >= 2, "update 2 of the first trial")
    lines = ptft(cluster, cache, tmp_path, "status", "run").stdout.splitlines()
    assert [line.split()[:3] for line in lines] == [[f"worker-{i}", "job", f"{array.number}_{i}"] for i in (0, 1)]
    for task in tasks:
        subprocess.run(["scancel", "--signal=TERM", task.number], env=cluster.variables, check=True)
    for task in tasks:
        task.requeued()
    for task in tasks:
        assert task.wait() == ("COMPLETED", "0:0"), task.log
    history = [json.loads(line) for line in (tmp_path / "run/slurm.jsonl").read_text().splitlines()]
    codes: dict[str, list[int]] = {}
    for row in history:  # one task may end before the other is requeued
        codes.setdefault(row["job"], []).append(row["exit_code"])
    assert list(codes.values()) == [[75, 0], [75, 0]]
    trials = json.loads((tmp_path / "run/sweep.json").read_text())["trials"]
    assert sorted(trial["parameters"]["optim.lr"] for trial in trials) == choices
    assert {trial["status"] for trial in trials} == {"finished"}
    number = next(trial["trial"] for trial in trials if trial["parameters"]["optim.lr"] == choices[0])
    words = ("log.report=false", f"optim.lr={choices[0]}", "run_dir=here")
    run = start("train", "recipe.yaml", *words, cwd=tmp_path, cache=cache)
    assert run.wait() == 0, run.stderr
    assert outcome(tmp_path / f"run/trial-{number:04d}") == outcome(tmp_path / "here")


def test_a_pipeline_of_six_jobs_is_repaired_and_goes_on(cluster: Cluster, tmp_path: Path, cache: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    broken: dict[str, object] = {"data.train.0.source": None, "data.train.0.path": str(rows)}
    rows.write_text('{"messages": "a conversation"}\n')
    (tmp_path / "small.yaml").write_text(small_demo("out", sft=broken))
    (tmp_path / "site.yaml").write_text("lead_s: 30\n")
    words = ("pipeline", "small.yaml", "--submit", "--site", "site.yaml")
    out = tmp_path / "out"

    def jobs(done: subprocess.CompletedProcess[str]) -> dict[str, Job]:
        assert done.returncode == 0, done.stderr
        lines = [line.removeprefix("job ").split(": ") for line in done.stdout.splitlines() if line.startswith("job ")]
        return {name: Job(cluster, number, out / name / f"slurm/{number}.log") for number, name in lines}

    first = jobs(ptft(cluster, cache, tmp_path, *words))
    assert list(first) == ["tokenizer", "clm", "sft", "reward", "ppo", "evaluate"]
    held = jobs(ptft(cluster, cache, tmp_path, *words))  # all are queued already
    assert held == {}
    assert first["evaluate"].wait(300)[0] == "CANCELLED"
    assert first["clm"].wait() == ("COMPLETED", "0:0"), first["clm"].log
    assert first["sft"].wait() == ("FAILED", "3:0"), first["sft"].log
    status = ptft(cluster, cache, tmp_path, "status", "out").stdout
    assert "sft         job" in status
    assert "last start: failed: the data are wrong" in status

    answer = {"role": "assistant", "content": "It counts items."}
    talks = [[{"role": "user", "content": f"What does len do in case {i}?"}, answer] for i in range(40)]
    rows.write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks))
    second = jobs(ptft(cluster, cache, tmp_path, *words))
    assert list(second) == ["sft", "reward", "ppo", "evaluate"]
    assert second["ppo"].fact("Dependency").startswith("afterok:")
    assert second["evaluate"].wait(300) == ("COMPLETED", "0:0"), "\n".join(job.log for job in second.values())
    assert json.loads((out / "evaluate/metrics.json").read_text())["metrics"]["eval/perplexity"] > 1
    assert jobs(ptft(cluster, cache, tmp_path, *words)) == {}


def test_what_the_cluster_cannot_do_is_refused_before_queueing(
    cluster: Cluster, tmp_path: Path, documents: Path, cache: Path
) -> None:
    write_recipe(tmp_path, documents)
    (tmp_path / "site.yaml").write_text("gpus: gres\ncpus_per_task: 99\n")
    words = ("submit", "recipe.yaml", "--site", "site.yaml", "--nodes", "3", "--gpus-per-node", "4", "--time", "1")
    words += ("--launch", "multi_gpu")
    done = ptft(cluster, cache, tmp_path, *words)
    assert done.returncode == 2
    for problem in (
        "--nodes: 3; partition all has 2",
        "--gpus-per-node: 4; a node of partition all has 2",
        "cpus_per_task: 99; a node of partition all has 8",
        "--time: 1; the warning comes 120 s before its end",
    ):
        assert problem in done.stderr
    assert cluster.ask("squeue", "--noheader") == ""
    assert not (tmp_path / "run").exists()


def test_an_array_prepares_the_shards_and_training_follows(
    cluster: Cluster, tmp_path: Path, documents: Path, cache: Path
) -> None:
    """Two tasks clean and encode six shards; the stores and the run have the bytes of one machine."""
    lines = documents.read_text().splitlines()
    for number in range(6):
        (tmp_path / f"part-{number}.txt").write_text("\n".join(lines[number * 8 : number * 8 + 12]))  # they overlap
    data = {
        "train": [{"path": "part-*.txt", "document": "line"}],
        "steps": ["whitespace", "exact_dedup", "near_dedup"],
        "validation": 0.1,
    }
    write_recipe(tmp_path, documents, train={"max_steps": 4}, save={"every": 4}, eval={"every": 4}, data=data)
    shards = {"PTFT_SHARD_MB": "0.0001"}
    here = start("train", "recipe.yaml", "run_dir=here", cwd=tmp_path, cache=cache, env=shards)
    assert here.wait() == 0, here.stderr
    (tmp_path / "site.yaml").write_text("lead_s: 30\n")
    words = ("submit", "recipe.yaml", "--site", "site.yaml", "--prepare-tasks", "2")
    done = ptft(cluster, tmp_path / "cache", tmp_path, *words, env=shards)
    prepare, train = submitted(done, cluster, tmp_path / "run/slurm")
    assert train.fact("Dependency").startswith(f"afterok:{prepare.number}")
    assert train.wait() == ("COMPLETED", "0:0"), train.log
    logs = [(tmp_path / f"run/slurm/{prepare.number}_{task}.log").read_text() for task in (0, 1)]
    assert all("near_dedup of" in log for log in logs)
    assert "loaded from the cache" in train.log
    assert outcome(tmp_path / "run") == outcome(tmp_path / "here")
    stores = (tmp_path / "cache/stores").glob("*/*/tokens.bin")
    for store in stores:
        assert store.read_bytes() == (cache / store.relative_to(tmp_path / "cache")).read_bytes()
    assert not list((tmp_path / "cache/encoded").glob("*[!k]"))
