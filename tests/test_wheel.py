"""The contents of the wheel: an installed wheel finds launch configs and recipes by name."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from page_support import write_run

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy of the checkout and unpacked."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    for name in (
        "ptft_dist",
        "launch_configs",
        "ds_configs",
        "slurm",
        "recipes",
        "pipelines",
        "sweeps",
        "pyproject.toml",
        "README.md",
        "LICENSE",
    ):
        source.mkdir(exist_ok=True)
        subprocess.run(["cp", "-r", str(ROOT / name), str(source)], check=True)
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(source)],
        check=True,
        capture_output=True,
    )
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def run(installed: Path, tmp_path: Path, *words: str) -> str:
    env = {**os.environ, "PYTHONPATH": str(installed)}
    done = subprocess.run([sys.executable, *words], cwd=tmp_path, env=env, capture_output=True, text=True, check=True)
    return done.stdout


def test_recipes_and_launch_configs_are_found_by_name(installed: Path, tmp_path: Path) -> None:
    where = run(installed, tmp_path, "-c", "import ptft_dist; print(ptft_dist.__file__)").strip()
    assert Path(where).is_relative_to(installed)  # not the checkout
    assert "valid" in run(installed, tmp_path, "-m", "ptft_dist", "config", "check", "clm")
    probe = (
        "from ptft_dist.launch.launch_file import read_launch_file as read\n"
        "print(read('zero2').path, read('FILE').deepspeed_json)"
    )
    old = tmp_path / "old.yaml"  # names the JSON as the launch configs of the first version did
    names_json = "deepspeed_config: {deepspeed_config_file: ds_configs/zero3.json}"
    old.write_text(f"distributed_type: DEEPSPEED\nnum_processes: 2\n{names_json}\n")
    paths = run(installed, tmp_path, "-c", probe.replace("FILE", str(old))).split()
    assert [Path(path).name for path in paths] == ["zero2.yaml", "zero3.json"]
    for path in paths:
        assert Path(path).is_file()
        assert Path(path).is_relative_to(installed)


def test_it_writes_pages(installed: Path, tmp_path: Path) -> None:
    write_run(tmp_path / "run")
    assert run(installed, tmp_path, "-m", "ptft_dist", "report", "run") == "run/report.html\n"


@pytest.mark.parametrize("kind", ["launch_configs", "ds_configs", "slurm", "recipes", "pipelines", "sweeps"])
def test_the_wheel_holds_every_shipped_file(installed: Path, kind: str) -> None:
    there = {p.name for p in (installed / "ptft_dist/shipped" / kind).iterdir() if p.is_file()}
    assert there == {p.name for p in (ROOT / kind).iterdir() if p.is_file()}


def test_the_wheel_names_its_license(installed: Path) -> None:
    (info,) = installed.glob("ptft_dist-*.dist-info")
    assert "License-Expression: Apache-2.0\n" in (info / "METADATA").read_text()
    assert "Version 2.0, January 2004" in (info / "licenses" / "LICENSE").read_text()
