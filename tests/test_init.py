"""`ptft init` copies files that work unchanged, and overwrites none."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from ptft_dist.cli.init import init
from ptft_dist.config.shipped import shipped
from ptft_dist.errors import RecipeError
from ptft_dist.launch.launch_file import read_launch_file
from ptft_dist.launch.local import default_launch

DEFAULT = default_launch()


def same(copy: Path, kind: str) -> bool:
    return copy.read_bytes() == (shipped(kind) / copy.name).read_bytes()  # type: ignore[arg-type]


def test_it_copies_recipe_launch_config_and_batch_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "new/project"
    init(str(folder), recipe="sft", launch="zero3")
    assert sorted(path.name for path in folder.iterdir()) == ["sft.yaml", "train.sbatch", "zero3.yaml"]
    assert same(folder / "sft.yaml", "recipes")
    assert same(folder / "zero3.yaml", "launch_configs")
    assert same(folder / "train.sbatch", "slurm")
    said = capsys.readouterr().out
    for step in (
        f"cd {folder}",
        "ptft config check sft.yaml",
        "ptft train sft.yaml --launch zero3.yaml",
        "sbatch train",
    ):
        assert step in said


def test_the_next_commands_are_for_a_shell(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also if a name has a space in it."""
    for name, source in (
        ("my recipe", shipped("recipes") / "clm.yaml"),
        ("my cpu", shipped("launch_configs") / "cpu.yaml"),
    ):
        (tmp_path / f"{name}.yaml").write_text(source.read_text())
    folder = tmp_path / "a project"
    init(str(folder), recipe=str(tmp_path / "my recipe.yaml"), launch=str(tmp_path / "my cpu.yaml"))
    steps = [shlex.split(line.split("  ")[1]) for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    assert ["cd", str(folder)] in steps
    assert ["ptft", "config", "check", "my recipe.yaml"] in steps
    assert ["ptft", "train", "my recipe.yaml", "--launch", "my cpu.yaml"] in steps
    assert ["sbatch", "train.sbatch", "my recipe.yaml", "--launch", "my cpu.yaml"] in steps
    (tmp_path / "my rows.jsonl").write_text('{"text": "a text"}\n' * 9)
    init("mlm", str(folder), data=tmp_path / "my rows.jsonl")
    assert f"  ptft train '{folder}/mlm.yaml'  " in capsys.readouterr().out


@pytest.mark.parametrize(("recipe", "first"), [("sft_lora", ["clm"]), ("ppo", ["sft", "reward"]), ("clm", [])])
def test_it_names_the_runs_that_must_come_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], recipe: str, first: list[str]
) -> None:
    init(str(tmp_path), recipe=recipe)
    steps = [line.split("  ")[1] for line in capsys.readouterr().out.splitlines() if line.startswith("  ptft train")]
    assert steps == [*(f"ptft train {name}" for name in first), f"ptft train {recipe}.yaml --launch {DEFAULT}.yaml"]


def test_it_takes_the_deepspeed_json_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = tmp_path / "mine"
    (mine / "conf").mkdir(parents=True)
    (mine / "conf/ds.json").write_text(json.dumps({"zero_optimization": {"stage": 1, "reduce_bucket_size": 7}}))
    text = "distributed_type: DEEPSPEED\nnum_processes: 2\ndeepspeed_config: {deepspeed_config_file: conf/ds.json}\n"
    (mine / "launch.yaml").write_text(text)
    init(str(tmp_path / "copy"), recipe="clm", launch=str(mine / "launch.yaml"))
    monkeypatch.chdir(tmp_path / "copy")
    assert read_launch_file("launch.yaml").deepspeed_json == tmp_path / "copy/conf/ds.json"


def test_it_overwrites_nothing(tmp_path: Path) -> None:
    (tmp_path / "cpu.yaml").write_text("mine")
    with pytest.raises(RecipeError, match=r"cpu\.yaml: already exists, nothing was written"):
        init(str(tmp_path), recipe="clm", launch="cpu")
    assert [path.name for path in tmp_path.iterdir()] == ["cpu.yaml"]
    assert (tmp_path / "cpu.yaml").read_text() == "mine"


def test_a_json_outside_of_the_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "ds.json").write_text('{"zero_optimization": {"stage": 1}}')
    text = "distributed_type: DEEPSPEED\nnum_processes: 2\ndeepspeed_config: {deepspeed_config_file: ../ds.json}\n"
    (tmp_path / "mine/launch.yaml").write_text(text)
    with pytest.raises(RecipeError, match=r"outside of .*; name the DeepSpeed JSON by its absolute path"):
        init(str(tmp_path / "a/copy"), recipe="clm", launch=str(tmp_path / "mine/launch.yaml"))
    assert not (tmp_path / "a").exists()


def test_through_the_command_line_without_torch(tmp_path: Path) -> None:
    probe = (
        "import sys; sys.argv = ['ptft', 'init', 'here', '--launch', 'zero2']\n"
        "from ptft_dist.cli import main\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "assert not {'torch', 'transformers', 'accelerate', 'deepspeed'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", probe], check=True, capture_output=True, cwd=tmp_path)
    assert (tmp_path / "here/clm.yaml").is_file()
    assert (tmp_path / "here/zero2.yaml").is_file()
