"""Launch configs are unmodified Accelerate configs: shipped ones, those of `accelerate config`, refused ones."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from in_process import make_recipe
from launch_support import HEAD, STOCK, launcher_arguments, launcher_environment
from preloaded_ranks import forked_ptft, preloaded_ptft
from support import ROOT, environment, eval_rows, free_port, start, train_rows, write_recipe

from ptft_dist.api import load_recipe
from ptft_dist.cli.train import _launch
from ptft_dist.config.shipped import shipped
from ptft_dist.errors import RecipeError
from ptft_dist.launch import accelerate_launch
from ptft_dist.launch.deepspeed_config import resolve_deepspeed_config
from ptft_dist.launch.environment import COMMAND, check_launch, describe_backend, job_id, restarted_job, start_token
from ptft_dist.launch.launch_file import LaunchFile, read_launch_file
from ptft_dist.launch.launch_keys import BLOCKS, KEYS
from ptft_dist.launch.local import command, launch, local_processes, machines, own_exit_code, run_ranks
from ptft_dist.launch.settings import LaunchSettings, check_settings, settings_of_environment
from ptft_dist.reporting.run_files import lock_run_dir
from ptft_dist.signals import STOP

CONFIGS = sorted(path.stem for path in shipped("launch_configs").glob("*.yaml"))
EXPECTED = {
    "single_gpu",
    "multi_gpu",
    "zero1",
    "zero2",
    "zero3",
    "zero3_offload",
    "fsdp2",
    "multi_node_ddp",
    "multi_node_zero2",
    "multi_node_zero3",
    "cpu",
    "cpu_zero1",
    "cpu_zero2",
    "cpu_zero3",
}
ADDRESS = "10.0.0.1:23456"  # not Accelerate's default port


def write(folder: Path, text: str) -> LaunchFile:
    """`text` as a launch config, read."""
    (folder / "mine.yaml").write_text(HEAD + text)
    return read_launch_file(str(folder / "mine.yaml"))


# --- shipped launch configs -------------------------------------------------------------------------------------------


def test_all_launch_configs_are_there() -> None:
    assert set(CONFIGS) == EXPECTED


@pytest.mark.parametrize("name", CONFIGS)
def test_stock_accelerate_accepts_the_config(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Accelerate's own launcher reads the file, from any directory, and finds in it what the name says."""
    monkeypatch.chdir(tmp_path)
    several = machines(2, 1, ADDRESS) if "node" in name else None
    file = read_launch_file(name)
    if name == "single_gpu":
        args = launcher_arguments(command(file, None, None, ["train", "clm"]))
        assert (args.num_processes, bool(args.multi_gpu)) == (1, False)
        return
    args = launcher_arguments(command(file, 4, several, ["train", "clm"]))
    assert args.training_script == "ptft_dist"
    assert args.module
    assert args.num_processes == 4
    assert bool(args.use_deepspeed) == ("zero" in name)
    assert bool(args.use_fsdp) == (name == "fsdp2")
    if "zero" in name:
        assert args.zero_stage == int(name.split("zero")[1][0])
        assert args.deepspeed_config_file is None  # no path, so that it works from anywhere
    if several:
        assert (args.num_machines, args.machine_rank) == (2, 1)
        assert (args.main_process_ip, args.main_process_port) == ("10.0.0.1", 23456)


def test_the_shipped_offloading_is_the_shipped_json() -> None:
    file = read_launch_file("zero3_offload")
    assert file.settings.deepspeed is not None
    config = resolve_deepspeed_config(file.settings.deepspeed, "zero3_offload")
    expected = json.loads((shipped("ds_configs") / "zero3_offload.json").read_text())
    for name in ("offload_optimizer", "offload_param"):
        assert expected["zero_optimization"][name].pop("pin_memory") is True  # DeepSpeed's default
    assert config == expected


def test_a_config_of_the_first_version_still_finds_the_shipped_json(tmp_path: Path) -> None:
    file = write(
        tmp_path, "distributed_type: DEEPSPEED\ndeepspeed_config: {deepspeed_config_file: ds_configs/zero3.json}"
    )
    assert file.deepspeed_json == (shipped("ds_configs") / "zero3.json").resolve()
    words = command(file, None, None, [])
    assert words[words.index("--deepspeed_config_file") + 1] == str(file.deepspeed_json)


# --- stock configs ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*STOCK, *(name for name in CONFIGS if name not in ("single_gpu",))])
def test_file_and_variables_say_the_same(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The settings read from a file equal those read from the environment variables of Accelerate's launcher."""
    file = write(tmp_path, STOCK[name]) if name in STOCK else read_launch_file(name)
    words = ["accelerate", "launch", "--config_file", str(file.path), "--machine_rank", "0", "-m", "ptft_dist"]
    monkeypatch.setattr("accelerate.utils.launch.is_port_in_use", lambda _port: False)
    ranks = settings_of_environment(launcher_environment(words))
    assert replace(ranks, source="") == replace(
        file.settings, source="", dynamo_backend="no" if file.settings.deepspeed else file.settings.dynamo_backend
    )


@pytest.mark.parametrize("name", ["zero1", "zero2 with offloading", "zero3", "fsdp2"])
def test_what_accelerate_config_writes_is_accepted(name: str, tmp_path: Path) -> None:
    file = write(tmp_path, STOCK[name])
    check_settings(file.settings, make_recipe(optim={"max_grad_norm": 0.4}))
    assert local_processes(file, None, None) == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mixed_precision": "bf16"}, r"mixed_precision: bf16 contradicts the recipe's train\.precision: fp32"),
        ({"mixed_precision": "fp8"}, r"the precision \(fp32, bf16 or fp16\) in the recipe"),
        ({"dynamo_backend": "inductor"}, r"dynamo_backend: inductor: .* model\.compile: true"),
        ({"gradient_accumulation_steps": "4"}, r"gradient_accumulation_steps: 4: .*batch\.global_size"),
        ({"gradient_clipping": "1.0"}, r"gradient_clipping: 1\.0 contradicts the recipe's optim\.max_grad_norm: 0\.4"),
        ({"fsdp_version": 1}, "FSDP version 1 is not supported; .*accelerate to-fsdp2"),
        ({"megatron": True}, "Megatron-LM is not supported"),
        ({"fsdp_version": 2, "parallel_sizes": {"tp_size": 1}}, "parallelism_config: remove it"),
    ],
)
def test_what_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=f"mine.yaml: .*{message}"):
        check_settings(LaunchSettings("mine.yaml", **settings), make_recipe(optim={"max_grad_norm": 0.4}))


def test_empty_blocks_of_another_type_are_accepted(tmp_path: Path) -> None:
    """As earlier versions of `accelerate config` write them."""
    write(tmp_path, "distributed_type: MULTI_GPU\ndeepspeed_config: {}\nfsdp_config: {fsdp_version: null}")


def test_fsdp_keys_without_their_prefix(tmp_path: Path) -> None:
    file = write(tmp_path, "distributed_type: FSDP\nfsdp_config: {version: 2, offload_params: false}")
    assert file.settings.fsdp_version == 2


def test_what_repeats_the_recipe_is_accepted() -> None:
    recipe = make_recipe(train={"precision": "bf16"}, optim={"max_grad_norm": 1})
    check_settings(
        LaunchSettings("mine.yaml", "bf16", gradient_accumulation_steps="1", gradient_clipping="1.0"), recipe
    )
    with pytest.raises(RecipeError, match=r"gradient_clipping: 1\.0 .*max_grad_norm: None"):
        check_settings(LaunchSettings("mine.yaml", gradient_clipping="1.0"), make_recipe(optim={"max_grad_norm": None}))


def test_all_problems_come_in_one_message() -> None:
    settings = LaunchSettings("mine.yaml", "fp8", "eager", 1, gradient_accumulation_steps="2")
    with pytest.raises(RecipeError) as raised:
        check_settings(settings, make_recipe())
    assert [line.split(":")[0] for line in str(raised.value).splitlines()] == ["mine.yaml"] * 4


def test_a_rank_checks_its_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "2")
    with pytest.raises(RecipeError, match="the launch config: gradient_accumulation_steps: 2"):
        check_launch(make_recipe())


def test_fsdp_without_a_version_is_version_1() -> None:
    """The same default as in Accelerate's launcher."""
    assert settings_of_environment({"ACCELERATE_USE_FSDP": "true"}).fsdp_version == 1
    assert settings_of_environment({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}).fsdp_version == 2
    assert settings_of_environment({}).fsdp_version is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("distributed_type: MULTI_GPU\nnum_proceses: 2", "num_proceses: unknown key; did you mean num_processes?"),
        (
            "distributed_type: DEEPSPEED\ndeepspeed_config: {zero_stag: 3}",
            "deepspeed_config.zero_stag: unknown key; did you mean deepspeed_config.zero_stage?",
        ),
        (
            "distributed_type: FSDP\nfsdp_config: {fsdp_version: 2, fsdp_ofload_params: true}",
            "fsdp_config.fsdp_ofload_params: unknown key; did you mean fsdp_config.fsdp_offload_params?",
        ),
        ("distributed_type: MEGATRON_LM", "distributed_type: MEGATRON_LM: not supported; use one of NO, DEEPSPEED"),
        ("distributed_type: MULTI_CPU", r"distributed_type: MULTI_CPU: not supported; .*launch config cpu"),
        ("distributed_type: 'NO'", "num_processes: 2: distributed_type NO starts one process"),
        (
            "distributed_type: MULTI_GPU\ndeepspeed_config: {zero_stage: 3}",
            "deepspeed_config: no effect with distributed_type: MULTI_GPU; set distributed_type: DEEPSPEED, or remove",
        ),
        (
            "distributed_type: DEEPSPEED\ndeepspeed_config: {deepspeed_inclusion_filter: 'localhost:2,3'}",
            "deepspeed_config.deepspeed_inclusion_filter: no effect, because torchrun starts the processes",
        ),
        ("distributed_type: DEEPSPEED\ndeepspeed_config: 3", "deepspeed_config: 3; expected a block of keys"),
    ],
)
def test_keys_and_types_that_cannot_work(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=message.replace("?", r"\?")):
        write(tmp_path, text)


def test_the_known_keys_are_accelerates() -> None:
    from accelerate.commands.config.config_args import ClusterConfig
    from accelerate.commands.launch import launch_command_parser

    assert set(KEYS) == set(ClusterConfig.__dataclass_fields__) | {"fp16", "dynamo_backend"}
    options = {action.dest for action in launch_command_parser()._actions}
    assert set(BLOCKS["parallelism_config"]) == {name for name in options if name.startswith("parallelism_config_")}
    assert set(BLOCKS["fsdp_config"]) - {"fsdp_ignored_modules"} == {n for n in options if n.startswith("fsdp_")}
    assert set(BLOCKS["deepspeed_config"]) <= options


def environments_of_children(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, str]]:
    """The environments of the processes that our launcher starts from now on. Each ends at once."""
    environments: list[dict[str, str]] = []

    class Child:
        def __init__(self, _words: list[str], env: dict[str, str], **_options: Any) -> None:
            environments.append(env)

        def wait(self) -> int:
            return 0

    monkeypatch.setattr("ptft_dist.launch.local.subprocess.Popen", Child)
    return environments


def test_inline_nvme_paths_reach_the_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`accelerate launch` sets no variable for them; our launcher does."""
    inline = "{zero_stage: 3, offload_param_device: nvme, offload_param_nvme_path: /nvme}"
    file = write(tmp_path, f"distributed_type: DEEPSPEED\ndeepspeed_config: {inline}")
    environments = environments_of_children(monkeypatch)
    assert launch(command(file, None, None, []), tmp_path / "run", 1, file.variables) == 0
    assert environments[0]["ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_NVME_PATH"] == "/nvme"


@pytest.mark.parametrize(("given", "expected"), [(None, "6"), ("3", "3")])
def test_a_number_of_threads_of_the_user_stays(
    given: str | None, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    environments = environments_of_children(monkeypatch)
    if given is None:
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    else:
        monkeypatch.setenv("OMP_NUM_THREADS", given)
    assert launch(["accelerate", "launch"], tmp_path / "run", 6, {}) == 0
    assert environments[0]["OMP_NUM_THREADS"] == expected


def test_the_stop_file_of_a_killed_launcher_stops_no_later_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All starts in an interactive Slurm job have the same token. That of a user stays."""
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    environments_of_children(monkeypatch)
    for text, address, stays in (
        (start_token({"SLURM_JOB_ID": "7"}), None, False),
        (start_token({"SLURM_JOB_ID": "7"}), "127.0.0.1:29500", True),  # perhaps of another machine of this start
        ("", None, True),
    ):
        (tmp_path / "stop").write_text(text)
        assert launch(["accelerate", "launch"], tmp_path, 1, {}, address) == 0
        assert (tmp_path / "stop").exists() == stays, text


# --- processes and machines -------------------------------------------------------------------------------------------


def test_each_machine_starts_its_share(tmp_path: Path) -> None:
    file = write(tmp_path, "distributed_type: MULTI_GPU")  # num_processes: 2
    two = machines(2, 0, ADDRESS)
    assert local_processes(file, None, None) == 2
    assert local_processes(file, 8, None) == 8
    assert local_processes(file, 8, two) == 4
    assert local_processes(file, None, two) == 1
    with pytest.raises(RecipeError, match="--processes: 7 cannot be divided over 2 machines"):
        local_processes(file, 7, two)


def test_a_config_for_two_machines_does_not_start_all_processes_on_one() -> None:
    file = read_launch_file("multi_node_ddp")
    assert local_processes(file, None, machines(2, 1, ADDRESS)) == 8
    assert local_processes(file, 4, None) == 4
    with pytest.raises(RecipeError, match=r"multi_node_ddp\.yaml is for 2 machines: give --machines"):
        local_processes(file, None, None)


def test_one_process_and_no_number_of_processes(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"--processes: 4: .* starts one process"):
        local_processes(read_launch_file("single_gpu"), 4, None)
    (tmp_path / "mine.yaml").write_text("distributed_type: MULTI_GPU")
    with pytest.raises(RecipeError, match="no num_processes; give --processes N"):
        local_processes(read_launch_file(str(tmp_path / "mine.yaml")), None, None)


@pytest.mark.parametrize(
    ("count", "rank", "address", "message"),
    [
        (2, 2, ADDRESS, "--machine-rank: 2; with --machines 2 it must be from 0 to 1"),
        (2, 0, None, "several machines need all of"),
        (2, None, ADDRESS, "several machines need all of"),
        (None, 1, ADDRESS, "several machines need all of"),
        (2, 0, "host", "--address: 'host'; expected HOST:PORT"),
        (2, 0, ":1", "--address: ':1'; expected HOST:PORT"),
    ],
)
def test_options_for_several_machines_that_do_not_fit(
    count: int | None, rank: int | None, address: str | None, message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        machines(count, rank, address)


def test_the_ranks_meet_at_the_address(monkeypatch: pytest.MonkeyPatch) -> None:
    """Accelerate's launcher gives torchrun the host and the port of --address, whatever the config says."""
    from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

    monkeypatch.setattr("accelerate.utils.launch.is_port_in_use", lambda _port: False)
    for name in ("multi_node_ddp", "zero2"):
        args = launcher_arguments(command(read_launch_file(name), 4, machines(2, 1, ADDRESS), ["train", "clm"]))
        args.deepspeed_fields_from_accelerate_config = ""
        (prepare_deepspeed_cmd_env if args.use_deepspeed else prepare_multi_gpu_env)(args)
        assert args.rdzv_endpoint == ADDRESS
        assert (args.nnodes, args.node_rank, args.nproc_per_node) == ("2", 1, "2")


@pytest.mark.parametrize("option", [["--launch", "zero3"], ["--processes", "2"], ["--machine-rank", "0"]])
def test_a_launched_process_launches_nothing(option: list[str], tmp_path: Path, documents: Path, cache: Path) -> None:
    write_recipe(tmp_path, documents)
    rank = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    run = start("train", "recipe.yaml", *option, cwd=tmp_path, cache=cache, env=rank)
    assert run.wait() == 2
    assert f"{option[0]}: no effect in a process that a launcher has started" in run.stderr


def test_a_signal_without_a_stop_file_goes_to_the_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error would leave them training without a launcher."""
    sent: list[tuple[int, int]] = []

    class Child:
        pid = 7

        def __init__(self, *_: Any, **__: Any) -> None: ...

        def wait(self) -> int:
            os.kill(os.getpid(), signal.SIGUSR1)
            return 0

    monkeypatch.setattr("ptft_dist.launch.local.subprocess.Popen", Child)
    monkeypatch.setattr("ptft_dist.launch.local.os.killpg", lambda *to: sent.append(to))
    monkeypatch.setattr("ptft_dist.launch.local.ignore_stop_signals", lambda: None)
    monkeypatch.setattr("ptft_dist.launch.local.Path.write_text", full_quota)
    before = {number: signal.getsignal(number) for number in STOP}
    try:
        launch(["accelerate", "launch"], tmp_path, 1, {})
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert sent == [(7, signal.SIGTERM)]


def full_quota(path: Path, _text: str) -> int:
    raise OSError(errno.EDQUOT, "Disk quota exceeded", str(path))


def test_the_exit_code_is_the_ranks_own() -> None:
    assert own_exit_code(0, "75") == 0
    assert own_exit_code(-9, "") == 1
    assert own_exit_code(3, "") == 3
    assert own_exit_code(1, "75") == 75


def test_ranks_without_a_run_that_are_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Such as those of `ptft evaluate`: there is no result.json to write, and a new start may succeed."""
    environments = environments_of_children(monkeypatch)
    assert run_ranks(["accelerate", "launch"], 1, {}) == 0
    (tmp_path / "exit_code").touch()
    monkeypatch.setattr("os.environ", environments[0] | {"PTFT_EXIT_CODE_FILE": str(tmp_path / "exit_code")})
    assert accelerate_launch._report({1: -9}) == 76
    assert "was killed by SIGKILL" in capsys.readouterr().err


def test_a_start_that_is_killed_before_it_begins_keeps_the_result_of_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also in an interactive Slurm job, all of whose starts have the same token."""
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    started = {"start": start_token({"SLURM_JOB_ID": "7"})}
    before = json.dumps({"status": "finished", **started})
    (tmp_path / "result.json").write_text(before)
    (tmp_path / "environment.json").write_text(json.dumps(started))
    environments = environments_of_children(monkeypatch)
    assert launch(["accelerate", "launch"], tmp_path, 1, {}) == 0
    (tmp_path / "code").touch()
    monkeypatch.setattr("os.environ", environments[0] | {"PTFT_EXIT_CODE_FILE": str(tmp_path / "code")})
    assert accelerate_launch._report({0: -9}) == 76
    assert (tmp_path / "result.json").read_text() == before
    os.utime(tmp_path / "environment.json", (1, 1))  # as if the run had begun
    assert accelerate_launch._report({0: -9}) == 76
    assert json.loads((tmp_path / "result.json").read_text())["status"] == "failed"


def test_each_task_of_a_slurm_array_is_a_job_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slurm gives each task a SLURM_JOB_ID of its own, and all tasks the SLURM_ARRAY_JOB_ID of the array."""
    monkeypatch.delenv("TORCHELASTIC_RESTART_COUNT", raising=False)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    monkeypatch.setenv("SLURM_JOB_ID", "124")
    assert job_id() == restarted_job() == "slurm-124"
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "123")
    for task in ("0", "1"):
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", task)
        assert job_id() == restarted_job() == f"slurm-123_{task}"
    monkeypatch.setenv("SLURM_RESTART_COUNT", "0")
    assert restarted_job() is None


# --- real runs --------------------------------------------------------------------------------------------------------


def accelerate(
    config: Path, *words: str, cwd: Path, cache: Path, python: str = sys.executable, of_ranks: Path | None = None
) -> subprocess.Popen[str]:
    """Stock `accelerate launch` with a config. python: with which it and, unless given, its ranks are started."""
    launch = ["accelerate.commands.launch", "--config_file", str(config), *words]
    env = environment({"PTFT_CACHE": str(cache), "PYTHONPATH": str(ROOT)})
    env |= {"PYTHON_EXEC": str(of_ranks)} if of_ranks else {}
    pipe = subprocess.PIPE
    return subprocess.Popen([python, "-m", *launch], cwd=cwd, env=env, stdout=pipe, stderr=pipe, text=True)


def same_curve(run: Path, expected: Path) -> None:
    for key, get in (("loss", train_rows), ("eval/loss", eval_rows)):
        values = [row[key] for row in get(expected)]
        assert values
        assert [row[key] for row in get(run)] == pytest.approx(values, rel=1e-5)


def backend_of(run: Path) -> tuple[str, int]:
    found = json.loads((run / "environment.json").read_text())
    return found["kind"], found["world_size"]


@pytest.fixture
def alone(tmp_path: Path, documents: Path, cache: Path) -> Path:
    """The run directory of the tiny recipe, trained by one process, with recipe.yaml in the same directory."""
    recipe = write_recipe(tmp_path, documents)
    run = start("train", str(recipe), "run_dir=alone", cwd=tmp_path, cache=cache)
    assert run.wait() == 0, run.stderr
    return tmp_path / "alone"


def test_a_shipped_deepspeed_config_under_stock_accelerate_from_anywhere(
    tmp_path: Path, cache: Path, alone: Path
) -> None:
    """Launcher and rank 0 start as those of a user, with all their imports."""
    config = shipped("launch_configs") / "cpu_zero2.yaml"
    python = tmp_path / "python"
    python.write_text(
        f'#!/bin/sh\n[ "$RANK" = 0 ] && exec {sys.executable} "$@"\nexec {preloaded_ptft()}/python "$@"\n'
    )
    python.chmod(0o755)
    words = ("--main_process_port", "0", "-m", "ptft_dist", "train", "recipe.yaml")
    node = accelerate(config, *words, cwd=tmp_path, cache=cache, of_ranks=python)
    _, errors = node.communicate(timeout=180)
    assert node.returncode == 0, errors
    assert backend_of(tmp_path / "run") == ("zero2", 2)
    same_curve(tmp_path / "run", alone)


def test_a_stock_deepspeed_config_under_our_launcher(tmp_path: Path, cache: Path, alone: Path) -> None:
    write(tmp_path, STOCK["zero3"])
    done = forked_ptft("train", "recipe.yaml", "--launch", "mine.yaml", cwd=tmp_path, env={"PTFT_CACHE": str(cache)})
    assert done.returncode == 0, done.stderr
    assert backend_of(tmp_path / "run") == ("zero3", 2)
    same_curve(tmp_path / "run", alone)


def test_a_refusal_by_the_ranks_keeps_its_exit_code(tmp_path: Path, documents: Path, cache: Path) -> None:
    """The launcher process does not read checkpoints; torchrun ends with 1 for every failure."""
    write_recipe(tmp_path, documents)
    words = ["train", "recipe.yaml", "--launch", "cpu", "--resume", "no/such/checkpoint"]
    done = forked_ptft(*words, cwd=tmp_path, env={"PTFT_CACHE": str(cache)})
    assert done.returncode == 4, done.stderr
    assert "no/such/checkpoint" in done.stderr
    assert not (tmp_path / "run/result.json").exists()


def test_two_nodes_on_one_host(tmp_path: Path, cache: Path, alone: Path) -> None:
    """Two launchers with ranks, an address and a port meet, and compute what one process computes."""
    port = str(free_port())
    config = shipped("launch_configs") / "multi_node_ddp.yaml"
    words = ["--num_processes", "2", "--main_process_ip", "127.0.0.1", "--main_process_port", port]
    train = ["-m", "ptft_dist", "train", "recipe.yaml"]
    python = str(preloaded_ptft() / "python")
    nodes = [
        accelerate(config, *words, "--machine_rank", str(rank), *train, cwd=tmp_path, cache=cache, python=python)
        for rank in (0, 1)
    ]
    for node in nodes:
        _, errors = node.communicate(timeout=120)
        assert node.returncode == 0, errors
    assert backend_of(tmp_path / "run") == ("ddp", 2)
    same_curve(tmp_path / "run", alone)


@pytest.mark.parametrize("machine", [0, 1])
def test_a_machine_that_starts_late_does_not_take_its_own_run_for_another(
    tmp_path: Path, documents: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, machine: int
) -> None:
    """Rank 0 may lock the run directory while machine 1 still prepares: only machine 0 looks for another process."""
    write_recipe(tmp_path, documents)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PTFT_CACHE", str(cache))
    monkeypatch.setenv(COMMAND, "[]")  # which a launch sets for its ranks
    started: list[Path] = []
    monkeypatch.setattr("ptft_dist.launch.local.launch", lambda _words, run_dir, *_rest: started.append(run_dir) or 0)
    (tmp_path / "run").mkdir()
    lock = lock_run_dir(tmp_path / "run")
    try:
        several = machines(2, machine, "127.0.0.1:1")
        loaded = load_recipe("recipe.yaml", [], training=True)
        attempt = partial(_launch, loaded, "multi_node_ddp", 2, several, [], by_srun=False)
        if machine == 0:
            with pytest.raises(RecipeError, match="another process is training in run"):
                attempt()
        else:
            assert attempt() == 0
    finally:
        lock.release()
    assert len(started) == machine


def test_the_start_line_names_the_backend(tmp_path: Path, documents: Path, cache: Path) -> None:
    write_recipe(tmp_path, documents, train={"max_steps": 4})
    for name, variables, text in (
        ("torchrun", {}, "ddp (default: started without a launch config"),
        ("config", {"ACCELERATE_MIXED_PRECISION": "no"}, "ddp, 2 x CPU"),
    ):
        run = start("train", "recipe.yaml", f"run_dir={name}", cwd=tmp_path, cache=cache, ranks=2, env=variables)
        assert run.wait() == 0, run.stderr
        assert f"parameters, {text}" in run.stdout + run.stderr
    assert describe_backend("zero3", {}) == "zero3"
