"""Batch scripts and the checks before a job is queued, without Slurm. tests/slurm/test_submit.py has a real cluster."""

from __future__ import annotations

import os
import random
import re
import shutil
import subprocess
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest
from preloaded_ranks import forked_ptft
from support import ROOT, write_recipe

from ptft_dist.errors import RecipeError
from ptft_dist.slurm import checks, client
from ptft_dist.slurm.client import Partition, fields, seconds
from ptft_dist.slurm.render import Job, hand_written, render
from ptft_dist.slurm.site import Container, Site, proposed, read_site

SITES = ("cpu", "gpu", "preemptible")
GOLDEN = ROOT / "tests/golden"
"""UPDATE_GOLDEN=1 writes them anew."""


def job(*words: str, **values: Any) -> Job:
    given: dict[str, Any] = {"folder": Path("/shared/me"), "log": Path("/shared/me/runs/a/slurm"), "name": "a"}
    return Job(commands=[("train", *(words or ("sft.yaml", "--launch", "zero3")))], **given | values)


def script_of(site: str) -> str:
    gpus = None if site == "cpu" else 8
    return render(job(nodes=2, gpus_per_node=gpus, time="24:00:00"), read_site(site))


@pytest.mark.parametrize("site", SITES)
def test_scripts_of_the_example_sites(site: str) -> None:
    path = GOLDEN / f"{site}.sbatch"
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_text(script_of(site))
    assert script_of(site) == path.read_text()


def test_the_hand_written_script_is_the_same_template() -> None:
    assert (ROOT / "slurm/train.sbatch").read_text() == hand_written()


@pytest.mark.parametrize("script", [*(f"tests/golden/{site}.sbatch" for site in SITES), "slurm/train.sbatch"])
def test_a_script_is_good_bash(script: str) -> None:
    subprocess.run(["bash", "-n", ROOT / script], check=True)
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    words = ["shellcheck", "--exclude=SC1091", ROOT / script]  # the environment that a site activates is not here
    assert subprocess.run(words, capture_output=True, text=True, check=False).stdout == ""


PIECES = ["'", '"', "$(touch pwned)", "`touch pwned`", "\n#SBATCH --exclusive\n", "#SBATCH --uid=0", "; touch pwned #"]
PIECES += ["\\", " ", "\t", "$HOME", "${IFS}", "&& touch pwned", "| cat", ">pwned", "{{ 7*7 }}", "{% raw %}", "é"]
PIECES += ["模型", "*", "~", "-n", "--", "!x", "a", "\r"]


def test_a_thousand_hostile_values_change_no_directive_and_execute_nothing(tmp_path: Path) -> None:
    """Each of 50 scripts is run with 20 values as arguments, and with hostile names of its job and folders."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, body in (
        ("srun", 'while [ "$1" != bash ]; do shift; done; shift 4; printf "%s\\0" "$@" > "$HEARD"'),
        ("ptft", "exit 0"),
        ("scontrol", "exit 0"),
        ("apptainer", "exit 0"),
    ):
        (programs / name).write_text(f"#!/bin/bash\n{body}\n")
        (programs / name).chmod(0o755)
    plain = [line for line in render(job(), Site()).splitlines() if line.startswith("#SBATCH")]
    chance = random.Random(0)

    def hostile() -> str:
        return "".join(chance.choices(PIECES, k=chance.randint(1, 6)))

    for number in range(50):
        words = [hostile() for _ in range(20)]
        folder = tmp_path / f"folder{number}{hostile().replace('/', '')}"
        folder.mkdir()
        values = {"A": hostile(), "B": hostile()}
        box = Container(runtime="apptainer", image=hostile(), mounts=(hostile(), hostile())) if number % 2 else None
        site = Site(variables=values, cache=hostile(), container=box)
        script = render(job(*words, folder=folder, log=folder / hostile(), name=hostile()), site)
        # sbatch reads no options after the first command.
        read = takewhile(lambda line: not line.strip() or line.startswith("#"), script.split("\n"))
        directives = [line for line in read if line.startswith("#SBATCH") and "--output" not in line]
        assert [re.sub("job-name=.*", "job-name=a", line) for line in directives] == plain[:-1]
        heard = tmp_path / "heard"
        (tmp_path / "job.sh").write_text(script)
        environment = {"PATH": f"{programs}:/usr/bin:/bin", "SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_ID": "7"}
        environment["HEARD"] = str(heard)
        done = subprocess.run(
            ["bash", tmp_path / "job.sh"], env=environment, cwd=tmp_path, capture_output=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert heard.read_bytes().decode().split("\0")[:-1] == ["train", *words]
    assert not list(tmp_path.rglob("pwned"))


# --- site profiles ----------------------------------------------------------------------------------------------------

WRONG_SITES = [
    ("container: {runtime: docker, image: x}", "container.runtime: Input should be 'apptainer' or 'pyxis'"),
    ("container: {runtime: pyxis, imgae: x}", "container.imgae: unknown key; did you mean image?"),
    ("cpu_jobs: {time: '1 h'}", "cpu_jobs.time: a value without spaces"),
    ("starter: mpirun", "starter: Input should be 'accelerate' or 'srun'"),
    ("partitoin: gpu", "partitoin: unknown key; did you mean partition?"),
    ("partition: 'a b'", "partition: a value without spaces, quotes and line ends is needed here"),
    ('account: "x\\n#SBATCH --uid=0"', "account: a value without spaces"),
    ("gpus: many", "gpus: Input should be 'gpus-per-node' or 'gres'"),
    ("cpus_per_task: 0", "cpus_per_task: Input should be greater than 0"),
    ("modules: ['cuda; rm -rf x']", "modules.0: a value without spaces"),
    ("options: {'x y': 1}", "options.x y: a value without spaces"),
    ("variables: {'A B': x}", "variables.A B: a value without spaces"),
    ("- a", "a site profile consists of"),
    ("a: [", "the site profile cannot be read"),
]


@pytest.mark.parametrize(("text", "message"), WRONG_SITES, ids=range(len(WRONG_SITES)))
def test_a_wrong_site_profile(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=re.escape(message)) as refused:
        read_site(str(path))
    assert str(path) in str(refused.value)


def test_what_a_site_adds() -> None:
    site = Site(
        options={"exclusive": None, "mail-type": "END"},
        modules=("cuda/12.8", "a&touch"),
        setup="source /venv/bin/activate\n",
        requeue=False,
    )
    script = render(job(processes_per_node=3), site)
    for line in ("#SBATCH --exclusive", "#SBATCH --mail-type=END", "#SBATCH --no-requeue", "per_node=3"):
        assert line in script.splitlines()
    assert "module load 'a&touch'" in script
    assert script.index("module load cuda/12.8") < script.index("source /venv") < script.index("set -u")


def test_an_option_is_not_given_twice() -> None:
    """sbatch would read the last one: --time of the command line had no effect."""
    site = Site(options={"time": "24:00:00", "no-requeue": None, "mail-type": "END"})
    with pytest.raises(RecipeError, match=r"^options\.time, options\.no-requeue: the script has this option already"):
        render(job(time="1:00:00"), site)
    assert "#SBATCH --time=24:00:00" in render(job(), Site(options={"time": "24:00:00"})).splitlines()


def test_an_array_has_a_command_for_each_task(tmp_path: Path) -> None:
    folds = [("train", "my.yaml", f"data.fold={i}", f"run_dir=it's fold {i}") for i in range(3)]
    array = Job(commands=folds, folder=tmp_path, log=tmp_path / "slurm", name="a")
    script = render(array, Site())
    assert "#SBATCH --array=0-2" in script.splitlines()
    assert f"#SBATCH --output={tmp_path}/slurm/%A_%a.log" in script.splitlines()
    body = script[script.index("case ") : script.index("esac")] + 'esac\nprintf "%s\\n" "$@"\n'
    for task, words in enumerate(folds):
        env = {"SLURM_ARRAY_TASK_ID": str(task)}
        done = subprocess.run(["bash", "-c", body], env=env, capture_output=True, text=True, check=True)
        assert done.stdout.splitlines() == list(words)


def test_work_that_does_not_train_is_one_task() -> None:
    script = render(Job([("prepare", "my.yaml")], Path("/a"), Path("/a/slurm"), "a", gpus_per_node=None), Site())
    assert "set -- prepare my.yaml" in script
    for absent in ("--processes", "--machine-rank", "PTFT_END_TIME"):
        assert absent not in script


def test_a_node_that_does_not_see_the_run_directory_says_so(tmp_path: Path) -> None:
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, body in (
        ("srun", 'while [ "$1" != bash ]; do shift; done; exec "$@"'),
        ("ptft", '[ "$1" != requeue ] || exit "$3"; touch started'),
        ("scontrol", "exit 0"),
    ):
        (programs / name).write_text(f"#!/bin/bash\n{body}\n")
        (programs / name).chmod(0o755)
    environment = {"PATH": f"{programs}:/usr/bin:/bin", "SLURM_JOB_NUM_NODES": "1", "SLURM_NNODES": "1"}
    environment |= {"SLURM_JOB_ID": "7", "SLURM_NODEID": "0"}
    asked = job(folder=tmp_path, log=tmp_path / "run/slurm")
    script = tmp_path / "copy.sh"
    script.write_text(render(asked, Site()))

    def done() -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", script], env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
        )

    refused = done()
    assert (refused.returncode, (tmp_path / "started").exists()) == (2, False)
    assert f"does not see {asked.script}: run_dir must be on a disk that all nodes share" in refused.stderr
    asked.log.mkdir(parents=True)
    asked.script.touch()
    assert (done().returncode, (tmp_path / "started").exists()) == (0, True)


CONTAINERS = {
    "apptainer": (
        "container=(apptainer exec --nv --bind=/shared --bind=/a:/b '/images/my image.sif')",
        'srun "${step[@]}" "${container[@]}" bash -c \'',
        '"${container[@]}" ptft requeue "$job" "$code"',
    ),
    "pyxis": (
        "step+=('--container-image=/images/my image.sif' '--container-mounts=/shared:/shared,/a:/b')",
        'srun "${step[@]}" bash -c \'',
        "srun --overlap --nodes=1 --ntasks=1 '--container-image=/images/my image.sif' "
        '\'--container-mounts=/shared:/shared,/a:/b\' ptft requeue "$job" "$code"',
    ),
}


@pytest.mark.parametrize("runtime", CONTAINERS)
def test_ptft_runs_in_a_container(tmp_path: Path, runtime: str) -> None:
    site = tmp_path / "site.yaml"
    image = "image: /images/my image.sif, mounts: [/shared, '/a:/b']"
    site.write_text(f"gpus: gres\ncontainer: {{runtime: {runtime}, {image}}}\n")
    script = render(job(gpus_per_node=2), read_site(str(site)))
    for line in CONTAINERS[runtime]:
        assert line in script
    assert "command -v ptft" not in script  # it is in the image
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    if shutil.which("shellcheck") is not None:
        done = subprocess.run(["shellcheck", "-"], input=script, capture_output=True, text=True, check=False)
        assert done.stdout == ""


def test_a_container_without_mounts() -> None:
    script = render(job(), Site(container=Container(runtime="pyxis", image="ubuntu")))
    assert "step+=(--container-image=ubuntu)\n" in script


def test_srun_starts_each_process() -> None:
    script = render(job(nodes=2, processes_per_node=4), Site(starter="srun", cpus_per_task=32))
    lines = script.splitlines()
    assert "#SBATCH --ntasks-per-node=4" in lines
    assert "#SBATCH --cpus-per-task=8" in lines
    assert "tasks=$per_node" in lines
    assert '  exec ptft "$@" --starter srun' in lines


def test_work_without_gpus_has_its_own_partition() -> None:
    site = Site.model_validate(
        {"partition": "gpu", "gpus": "gres", "memory": "0", "cpu_jobs": {"partition": "cpu", "memory": "8G"}}
    ).without_gpus()
    assert (site.partition, site.gpus, site.memory) == ("cpu", None, "8G")
    gpu = {"constraint": "a100", "account": "mine", "options": {"exclusive": None}}
    plain = Site.model_validate({**gpu, "cpu_jobs": {"constraint": None, "options": {}}}).without_gpus()
    assert (plain.constraint, plain.account, plain.options) == (None, "mine", {})


# --- checks -----------------------------------------------------------------------------------------------------------

CLUSTER = {
    "all": Partition("all", is_default=True, limit_s=3600, nodes=2, cpus=8, gpus=2),
    "long": Partition("long", is_default=False, limit_s=None, nodes=1, cpus=8, gpus=0),
}
GPUS = {"gpus": "gres"}
WRONG_JOBS: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"nodes": 3}, {}, "--nodes: 3; partition all has 2"),
    ({"nodes": 2}, {"partition": "long"}, "--nodes: 2; partition long has 1"),
    ({"gpus_per_node": 4}, GPUS, "--gpus-per-node: 4; a node of partition all has 2"),
    ({"gpus_per_node": 1}, {**GPUS, "partition": "long"}, "--gpus-per-node: 1; a node of partition long has 0"),
    ({"time": "2:00:00"}, {}, "--time: 2:00:00; partition all allows 1 h 0 min"),
    ({"time": "1-0"}, {}, "--time: 1-0; partition all allows 1 h 0 min"),
    ({"time": "2"}, {}, "--time: 2; the warning comes 120 s before its end (lead_s), so nothing is trained"),
    ({}, {"cpus_per_task": 9}, "cpus_per_task: 9; a node of partition all has 8"),
    ({}, {"partition": "fast"}, "partition: this cluster has none with the name 'fast'; it has all, long"),
]


@pytest.mark.parametrize(("asked", "site", "message"), WRONG_JOBS, ids=range(len(WRONG_JOBS)))
def test_what_the_cluster_does_not_have(asked: dict[str, Any], site: dict[str, Any], message: str) -> None:
    assert list(checks.of_cluster(job(**asked), Site(**site), CLUSTER)) == [message]


SEVERAL: list[tuple[str, dict[str, Any], list[str]]] = [
    ("long,all", {"nodes": 2, "gpus_per_node": 1, "time": "1:00:00"}, []),
    ("long,all", {"nodes": 2, "time": "9"}, []),
    ("all,long", {"time": "9:00:00"}, []),
    ("all,long", {"nodes": 2, "time": "9:00:00"},
     ["--time: 9:00:00; partition all allows 1 h 0 min", "--nodes: 2; partition long has 1"]),
    ("fast,all,slow", {}, [f"partition: this cluster has none with the name '{name}'; it has all, long"
                           for name in ("fast", "slow")]),
]  # fmt: skip


@pytest.mark.parametrize(("partitions", "asked", "problems"), SEVERAL, ids=range(len(SEVERAL)))
def test_one_of_several_partitions_must_fit(partitions: str, asked: dict[str, Any], problems: list[str]) -> None:
    """Slurm starts the job in the first of them that can."""
    assert list(checks.of_cluster(job(**asked), Site(gpus="gres", partition=partitions), CLUSTER)) == problems


ACCOUNTS = {"physics": {"normal", "low"}, "biology": {"normal"}}
WRONG_ACCOUNTS: list[tuple[dict[str, Any], list[str]]] = [
    ({"account": "maths"}, ["account: maths; you have biology, physics"]),
    ({"account": "biology", "qos": "low"}, ["qos: low; you may use normal"]),
    ({"qos": "high"}, ["qos: high; you may use low, normal"]),
    ({"account": "physics", "qos": "low"}, []),
    ({}, []),
]


@pytest.mark.parametrize(("site", "problems"), WRONG_ACCOUNTS, ids=range(len(WRONG_ACCOUNTS)))
def test_accounts_that_a_user_does_not_have(site: dict[str, Any], problems: list[str]) -> None:
    assert list(checks.of_accounts(Site(**site), ACCOUNTS)) == problems
    assert not list(checks.of_accounts(Site(**site), None))  # Slurm keeps no accounts


def test_accounts_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert client.associations() is None
    program = tmp_path / "sacctmgr"
    program.write_text("#!/bin/sh\necho 'physics|normal,low'\necho 'biology|normal'\necho 'physics|'\n")
    program.chmod(0o755)
    assert client.associations() == ACCOUNTS
    program.write_text("#!/bin/sh\nexit 1\n")
    assert client.associations() is None


def test_several_nodes_need_a_launch_config(tmp_path: Path, documents: Path) -> None:
    """The default would be plain data parallelism, in silence."""
    write_recipe(tmp_path, documents)
    done = forked_ptft("submit", "recipe.yaml", "--nodes", "2", "--dry-run", cwd=tmp_path)
    assert done.returncode == 2
    assert "  --launch: needed on several nodes, such as multi_gpu, zero3 or cpu" in done.stderr
    words = ("--processes", "2", "--machines", "2", "--machine-rank", "0", "--address", "localhost:1")
    done = forked_ptft("train", "recipe.yaml", *words, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (
        2, "error: --launch: needed on several machines, such as multi_gpu, zero3 or cpu\n",
    )  # fmt: skip


def test_offline_nodes_need_what_the_recipe_names(tmp_path: Path, documents: Path) -> None:
    write_recipe(
        tmp_path,
        documents,
        model={"path": "nobody/nothing", "config": None},
        tokenizer={"path": "nobody/nothing", "train": None},
    )
    (tmp_path / "site.yaml").write_text("offline: true\n")
    done = forked_ptft("submit", "recipe.yaml", "--site", "site.yaml", "--dry-run", cwd=tmp_path)
    assert done.returncode == 2
    assert "  model.path, tokenizer.path: nobody/nothing: it is not in the cache of the Hub" in done.stderr
    assert "ptft prefetch fetches them, on a node with internet" in done.stderr


def test_an_array_needs_several_runs(tmp_path: Path, documents: Path) -> None:
    write_recipe(tmp_path, documents)
    done = forked_ptft("submit", "recipe.yaml", "--array", "--dry-run", cwd=tmp_path)
    message = "error: --array: the recipe has one run; data.folds: K makes K runs of it\n"
    assert (done.returncode, done.stderr) == (2, message)


def test_folds_in_one_job_need_a_starter_of_each_node(tmp_path: Path, documents: Path) -> None:
    """Every task of srun would train all folds."""
    write_recipe(tmp_path, documents, data={"validation": None, "folds": 2})
    (tmp_path / "site.yaml").write_text("starter: srun\n")
    words = ("submit", "recipe.yaml", "--site", "site.yaml", "--launch", "cpu", "--dry-run")
    done = forked_ptft(*words, cwd=tmp_path)
    assert done.returncode == 2
    assert "  data.folds: every task of srun would train all folds (starter: srun in the site profile)" in done.stderr
    assert "--array" in done.stderr
    for more in (["--array"], ["data.fold=1"]):
        done = forked_ptft(*words, *more, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    done = forked_ptft("submit", "recipe.yaml", "--site", "site.yaml", "--dry-run", cwd=tmp_path)  # one process
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("array", [["--array"], []])
def test_a_checkpoint_belongs_to_one_fold(tmp_path: Path, documents: Path, array: list[str]) -> None:
    write_recipe(tmp_path, documents, data={"validation": None, "folds": 2})
    words = ("submit", "recipe.yaml", *array, "--dry-run", "--resume")
    done = forked_ptft(*words, "run/fold-0/checkpoints/step-00000004", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: --resume: a checkpoint belongs to one fold. Choose the fold with data.fold")
    assert forked_ptft(*words, "never", cwd=tmp_path).returncode == 0


def test_a_sweep_is_an_array_of_the_same_command(tmp_path: Path, documents: Path) -> None:
    write_recipe(tmp_path, documents)
    (tmp_path / "search.yaml").write_text("method: random\ntrials: 9\nsearch: {optim.lr: {log: [1e-4, 1e-2]}}\n")
    words = ("submit", "recipe.yaml", "--sweep", "search.yaml", "--dry-run")
    done = forked_ptft(*words, "--tasks", "3", "--processes-per-node", "2", "optim.eps=1e-9", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = [line.strip() for line in done.stdout.splitlines()]
    assert "#SBATCH --array=0-2" in lines
    command = f"sweep recipe.yaml search.yaml optim.eps=1e-9 --out {tmp_path}/run --launch cpu --processes 2"
    assert [line for line in lines if "set -- sweep" in line] == [f"{i}) set -- {command} ;;" for i in range(3)]
    assert "export PTFT_END_TIME" in lines  # a trial saves before the time limit


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--sweep", "search.yaml", "--array"), "--array, --sweep: folds or trials; give one of them"),
        (("--tasks", "3"), "--tasks: no effect without --sweep SEARCH"),
        (("--sweep", "search.yaml", "--nodes", "2", "--launch", "cpu"), "--nodes: each trial of a sweep runs on one"),
        (("--sweep", "search.yaml", "--resume", "never"), "--resume, --accept: no effect on the trials of a sweep"),
        (("--sweep", "wrong.yaml"), "wrong.yaml:1: search.optim.lrr: unknown key; did you mean optim.lr?"),
        (("--sweep", "none.yaml"), "none.yaml"),
    ],
)
def test_sweeps_that_cannot_be_submitted(tmp_path: Path, documents: Path, words: tuple[str, ...], message: str) -> None:
    write_recipe(tmp_path, documents)
    for name, key in (("search", "optim.lr"), ("wrong", "optim.lrr")):
        (tmp_path / f"{name}.yaml").write_text(f"search: {{{key}: {{log: [1e-4, 1e-2]}}}}\nmethod: random\ntrials: 9\n")
    done = forked_ptft("submit", "recipe.yaml", *words, "--dry-run", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert message in done.stderr


def test_all_problems_at_once() -> None:
    found = list(checks.of_cluster(job(nodes=3, time="3:00:00"), Site(cpus_per_task=99), CLUSTER))
    assert [each.split(":")[0] for each in found] == ["--nodes", "cpus_per_task", "--time"]
    assert not list(checks.of_cluster(job(nodes=2, time="1:00:00"), Site(cpus_per_task=8), CLUSTER))
    (missing,) = checks.of_cluster(job(), Site(), {"long": CLUSTER["long"]})
    assert missing == "partition: this cluster has no default; set one in the site profile: long"


@pytest.mark.parametrize("time", ["soon", "1h", "-5", "1:2:3:4", "", "5\n#SBATCH --uid=0"])
def test_a_wrong_time(time: str) -> None:
    with pytest.raises(RecipeError, match=r"--time: .* expected D-HH:MM:SS"):
        job(time=time)


@pytest.mark.parametrize("after", ["", "x", "7:8", "7\n#SBATCH --uid=0"])
def test_a_wrong_dependency(after: str) -> None:
    with pytest.raises(RecipeError, match=r"--after: .* expected the id of a job"):
        job(after=("7", after))
    lines = render(job(after=("7", "8_1")), Site()).splitlines()
    assert "#SBATCH --dependency=afterok:7:8_1" in lines
    assert "#SBATCH --kill-on-invalid-dep=yes" in lines  # otherwise it waits for ever


def test_gpus_need_a_site_that_has_some() -> None:
    with pytest.raises(RecipeError, match="--gpus-per-node: the site profile does not say"):
        render(job(gpus_per_node=2), Site())


@pytest.mark.parametrize(
    ("limit", "expected"),
    [("90", 5400), ("5:30", 330), ("1:00:00", 3600), ("2-00:00:00", 172800), ("1-12", 129600), ("1-1:30", 91800),
     ("UNLIMITED", None), ("INFINITE", None)],
)  # fmt: skip
def test_time_limits(limit: str, expected: int | None) -> None:
    assert seconds(limit) == expected


def test_fields_of_scontrol() -> None:
    text = "JobId=7 JobName=a b=c UserId=root(0) Reason=None Command=/x y/z"
    found = fields(text)
    assert (found["JobId"], found["Reason"], found["Command"]) == ("7", "None", "/x y/z")


def test_partitions_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    said = {
        "sinfo": "gpu|64|gpu:a100:8(S:0-1)\ngpu|32|gpu:4,shard:2\ncpu|16|(null)",
        "scontrol": "PartitionName=gpu Default=NO MaxTime=2-00:00:00 TotalNodes=2\n"
        "PartitionName=cpu Default=YES MaxTime=UNLIMITED TotalNodes=1",
    }
    monkeypatch.setattr(client, "ask", lambda name, *_: said[name])
    assert client.partitions() == {
        "gpu": Partition("gpu", is_default=False, limit_s=172800, nodes=2, cpus=64, gpus=8),
        "cpu": Partition("cpu", is_default=True, limit_s=None, nodes=1, cpus=16, gpus=0),
    }


def test_a_proposed_site_profile(tmp_path: Path) -> None:
    """It is valid, and its job fits the cluster."""
    (tmp_path / "site.yaml").write_text(proposed(CLUSTER))
    site = read_site(str(tmp_path / "site.yaml"))
    assert (site.partition, site.gpus, site.cpus_per_task) == ("all", "gpus-per-node", 8)
    assert not list(checks.of_cluster(job(nodes=2, gpus_per_node=2), site, CLUSTER))
    assert "#   long: 1 nodes with 8 CPUs and 0 GPUs, no time limit\n" in proposed(CLUSTER)
    assert "gpus:" not in proposed({"long": CLUSTER["long"]})


# --- the command ------------------------------------------------------------------------------------------------------


def test_a_dry_run_prints_the_script_and_writes_nothing(tmp_path: Path, documents: Path) -> None:
    write_recipe(tmp_path, documents)
    words = ("submit", "recipe.yaml", "optim.lr=0.1", "--time", "1:00:00", "--dry-run")
    done = forked_ptft(*words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "set -- train recipe.yaml optim.lr=0.1\n" in done.stdout  # one process needs no launch config
    assert not (tmp_path / "run").exists()


def test_wrong_requests_are_refused_together(tmp_path: Path, documents: Path) -> None:
    """Also without Slurm, in a dry run."""
    write_recipe(
        tmp_path, documents, data={"train": [{"path": "absent.txt"}]}, batch={"global_size": 4, "micro_size": 4}
    )
    words = ("submit", "recipe.yaml", "--nodes", "3", "--launch", "zero7", "--dry-run")
    done = forked_ptft(*words, cwd=tmp_path)
    assert done.returncode == 2
    assert "nothing was submitted:" in done.stderr
    for problem in ("zero7: no such file", "batch", "absent.txt"):
        assert problem in done.stderr
    nowhere = forked_ptft("submit", "clm", cwd=tmp_path, env={"PATH": "/nowhere"})
    assert nowhere.returncode == 1
    assert nowhere.stderr.startswith("error: sinfo: not found on this machine. Run this on a login node")


@pytest.mark.parametrize("verb", ["status", "logs", "cancel"])
def test_a_run_without_a_job(tmp_path: Path, verb: str) -> None:
    done = forked_ptft(verb, "runs/a", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: runs/a: no Slurm job has trained here")
