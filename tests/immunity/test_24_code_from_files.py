"""24: no code runs from a file of another source.

A checkpoint of one process or DDP holds no pickle at all; DeepSpeed's are pickles, and no byte of them is unpickled
before the manifest's hashes agree. Code that a model's repository carries runs only if the recipe says so.
"""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import pytest
from support import Vocabulary, start, write_recipe

from ptft_dist.config.recipe import ModelSection, TokenizerSection
from ptft_dist.errors import RecipeError
from ptft_dist.networks.load import build_config


class Bomb:
    """Unpickling it creates a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return Path.touch, (self.target,)  # type: ignore[return-value]


def test_a_checkpoint_of_one_process_holds_no_pickle(tmp_path: Path, documents: Path, cache: Path) -> None:
    recipe = write_recipe(tmp_path, documents, train={"max_steps": 2})
    run = start("train", str(recipe), cwd=tmp_path, cache=cache)
    assert run.wait() == 0, run.stderr
    files = [p for p in (tmp_path / "run/checkpoints").rglob("*") if p.is_file()]
    assert {p.suffix for p in files} == {".json", ".safetensors"}


def test_an_altered_deepspeed_file_is_refused_before_it_is_unpickled(
    tmp_path: Path, documents: Path, cache: Path
) -> None:
    recipe = write_recipe(tmp_path, documents, train={"max_steps": 2})
    run = start("train", str(recipe), cwd=tmp_path, cache=cache, ranks=2, kind="cpu_zero2")
    assert run.wait() == 0, run.stderr
    bombed = tmp_path / "bombed"
    pickle_file = next((tmp_path / "run/checkpoints").rglob("*optim_states.pt"))
    pickle_file.write_bytes(pickle.dumps(Bomb(bombed)))
    shutil.rmtree(tmp_path / "run/model")
    again = start("train", str(recipe), cwd=tmp_path, cache=cache, ranks=2, kind="cpu_zero2")
    assert again.wait() == 4
    assert pickle_file.name in again.stderr
    assert not bombed.exists()
    with pytest.raises(OSError, match="No such file"):  # the bomb works: this test can fail
        bombed.stat()
    pickle.loads(pickle_file.read_bytes())
    assert bombed.exists()


def test_code_of_a_model_repository_runs_only_on_wish(tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "custom", "auto_map": {"AutoConfig": "code.Custom"}, "vocab_size": 8})
    )
    (tmp_path / "code.py").write_text(
        f"from pathlib import Path\nPath({str(ran)!r}).touch()\n"
        "from transformers import PretrainedConfig\n"
        "class Custom(PretrainedConfig):\n    model_type = 'custom'\n"
    )
    section = ModelSection(path=str(tmp_path))
    assert not section.trust_remote_code
    assert not TokenizerSection(path="x").trust_remote_code
    with pytest.raises(RecipeError, match=r"model\.path"):
        build_config(section, Vocabulary(8, 0), 8)  # type: ignore[arg-type]
    assert not ran.exists()
    build_config(ModelSection(path=str(tmp_path), trust_remote_code=True), Vocabulary(8, 0), 8)  # type: ignore[arg-type]
    assert ran.exists()
