"""`ptft doctor`: each fault of a machine is found and has a remedy; the true machine of the tests has no error."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import psutil
import pytest
from packaging.requirements import Requirement
from preloaded_ranks import forked_ptft, preloaded
from support import UNPRIVILEGED

from ptft_dist.doctor import Gpu, handshake
from ptft_dist.doctor.finding import Finding
from ptft_dist.doctor.gpus import describe_gpus
from ptft_dist.doctor.handshake import shake_hands
from ptft_dist.doctor.launches import launches
from ptft_dist.doctor.places import disk, network, places, slurm
from ptft_dist.doctor.software import package, packages
from ptft_dist.launch.network import Lookups

H200 = Gpu("NVIDIA H200", 150_000_000_000, 149_000_000_000, bf16=True)
V100 = Gpu("Tesla V100", 32_000_000_000, 8_000_000_000, bf16=False)
Usage = namedtuple("Usage", "total used free")


def by_name(findings: list[Finding]) -> dict[str, tuple[str, str, str]]:
    return {each.name: (each.level, each.text, each.remedy) for each in findings}


def test_this_machine(tmp_path: Path) -> None:
    """Everything but the meeting of two processes, as JSON."""
    done = forked_ptft("doctor", "--no-handshake", "--json", "--folder", str(tmp_path))
    found = {each["name"]: each for each in json.loads(done.stdout)}
    assert done.returncode == (1 if any(each["level"] == "error" for each in found.values()) else 0)
    assert {"python", "torch", "deepspeed", "CPU", "runs", "cache", "host name", "sbatch", "NF4", "cpu"} <= set(found)
    assert found["cpu"]["text"] == "--launch cpu --processes N"
    assert list(tmp_path.iterdir()) == []


def test_the_home_in_hf_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "hub").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("HF_HOME", "~/hub")
    assert by_name(list(places(tmp_path)))["Hub downloads"][1].startswith(f"{tmp_path / 'hub'}: ")


def test_two_processes_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHON_EXEC", preloaded()["PYTHON_EXEC"])
    (found,) = shake_hands(0)
    assert (found.name, found.level) == ("gloo", "ok")
    assert "GB/s" in found.text


def test_two_processes_that_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", preloaded()["PYTHON_EXEC"])
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nosuch0")
    (found,) = shake_hands(0)
    assert found.level == "error"
    assert found.text.startswith("they failed: ")
    assert "Error" in found.text


def test_two_processes_that_do_not_meet(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """They are killed, although they have sessions of their own, as those of torchrun."""
    launcher = tmp_path / "launcher"
    launcher.write_text(f"#!/bin/sh\nsetsid sleep 300 &\necho $! > {tmp_path}/rank\nwait\n")
    launcher.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(launcher))
    monkeypatch.setattr(handshake, "LIMIT_S", 0.4)
    (found,) = shake_hands(0)
    with contextlib.suppress(psutil.NoSuchProcess):
        psutil.Process(int((tmp_path / "rank").read_text())).wait(5)  # raises if it goes on
    assert (found.level, found.text) == ("error", "they did not meet within 0 s")
    assert "GLOO_SOCKET_IFNAME" in found.remedy


def test_packages() -> None:
    assert {each.level for each in packages()} == {"ok"}
    assert package(Requirement("no-such-package>=1")) == Finding(
        "packages", "no-such-package", "error", "not installed", "pip install -c constraints.txt 'no-such-package>=1'"
    )
    old = package(Requirement("numpy>=99"))
    assert (old.level, old.text.partition(";")[2]) == ("error", " needed: >=99")


def test_gpus() -> None:
    assert [each.level for each in describe_gpus([H200, H200])] == ["ok", "ok"]
    found = by_name(list(describe_gpus([H200, V100])))
    assert found["GPU 0"] == ("ok", "NVIDIA H200, 149.0 of 150.0 GB free", "")
    assert found["GPU 1"][0] == found["bf16"][0] == found["kinds"][0] == "warning"
    assert "fp16" in found["bf16"][2]
    assert [each.level for each in describe_gpus([], driver=False)] == ["absent"]
    (unused,) = describe_gpus([], driver=True)
    assert unused.level == "error"
    assert "CUDA build" in unused.remedy


def test_disks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert disk("runs", tmp_path / "not/yet/there", "run_dir").level == "ok"
    assert not (tmp_path / "not").exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: Usage(100e9, 99e9, 1e9))
    full = disk("cache", tmp_path, "PTFT_CACHE")
    assert full.level == "warning"
    assert "1.0 GB free" in full.text
    assert full.remedy.endswith("with PTFT_CACHE")
    monkeypatch.setattr("os.access", lambda _path, _mode: False)
    assert disk("runs", tmp_path, "run_dir").level == "error"


def test_a_disk_of_somebody_else(tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0)
    found = "from ptft_dist.doctor.places import Path, disk\nprint(disk('runs', Path('closed/runs/mine'), 'run_dir'))"
    words = [*UNPRIVILEGED, sys.executable, "-c", found]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert "level='error', text='closed/runs/mine: cannot be written'" in done.stdout, done.stderr


def test_little_shared_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(64e6, 0, 64e6 if "shm" in str(path) else 1e12))
    found = by_name(list(places(tmp_path)))
    if Path("/dev/shm").is_dir():
        assert found["shared memory"][0] == "warning"
        assert "--shm-size" in found["shared memory"][2]


@pytest.mark.parametrize(
    ("addresses", "level", "says"),
    [
        (["10.0.0.7"], "ok", "node7 is 10.0.0.7"),
        (["127.0.1.1"], "ok", "where other machines cannot reach it"),
        ([], "warning", "node7 has no address"),
    ],
)
def test_the_host_name(addresses: list[str], level: str, says: str) -> None:
    (found,) = network(Lookups(host=lambda: "node7", resolve=lambda _host: addresses))
    assert found.level == level
    assert says in found.text


def test_slurm_is_absent_or_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert [each.level for each in slurm()] == ["absent"]
    (tmp_path / "sbatch").write_text("#!/bin/sh\necho 'cannot reach the controller' >&2\nexit 1\n")
    (tmp_path / "sbatch").chmod(0o755)
    (found,) = slurm()
    assert found.level == "warning"
    assert "cannot reach the controller" in found.text


def test_launch_configs() -> None:
    on_cpu = by_name(list(launches(0, set())))
    assert {name for name, (level, *_) in on_cpu.items() if level == "ok"} == {
        "cpu",
        "cpu_zero1",
        "cpu_zero2",
        "cpu_zero3",
    }
    eight = by_name(list(launches(8, {"CPUAdamBuilder"})))
    assert eight["zero3"] == ("ok", "--launch zero3 --processes 8", "")
    assert eight["single_gpu"] == ("ok", "--launch single_gpu, one process", "")
    assert eight["zero3_offload"][:2] == ("absent", "needs DeepSpeed's CPUAdam, which cannot be compiled here")
    assert "--machines N" in eight["multi_node_ddp"][1]
