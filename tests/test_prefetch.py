"""`ptft prefetch` and `missing_offline`, with a server of the Hub on this machine."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from hub_server import COMMIT, Hub, served
from pydantic import BaseModel
from support import environment, make_recipe, ptft, start
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from ptft_dist.api import load_recipe, missing_offline
from ptft_dist.config.named_models import named_models
from ptft_dist.config.section import NamesModel, documentation
from ptft_dist.config.tokenizer_section import TokenizerTraining
from ptft_dist.data.tokenizer import train_tokenizer
from ptft_dist.hub import needed_files
from ptft_dist.tasks.registry import recipe_class

SHORT: dict[str, Any] = {"train": {"max_steps": 2}, "save": {"every": None}, "eval": {"every": None}}


@pytest.fixture(scope="module")
def repositories(tmp_path_factory: pytest.TempPathFactory, documents: Path) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("hub")
    tokenizer = train_tokenizer(TokenizerTraining(vocab_size=300), documents.read_text().splitlines())
    llama = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(**llama, num_key_value_heads=2, max_position_embeddings=64, vocab_size=len(tokenizer))
    for name in ("llama", "teacher"):
        LlamaForCausalLM(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    LlamaForCausalLM(config).save_pretrained(folder / "sharded", max_shard_size="20KB")
    (folder / "llama/pytorch_model.bin").write_bytes(b"the same weights")
    (folder / "llama/onnx").mkdir()
    (folder / "llama/onnx/model.onnx").write_bytes(b"the same weights")
    (folder / "rows").mkdir()
    rows = [json.dumps({"text": line}) for line in documents.read_text().splitlines()]
    (folder / "rows/train.jsonl").write_text("\n".join(rows))
    names = {f"models/tiny/{name}": folder / name for name in ("llama", "teacher", "sharded")}
    return names | {"datasets/tiny/rows": folder / "rows"}


@pytest.fixture
def hub(repositories: dict[str, Path]) -> Iterator[Hub]:
    with served(Hub(repositories, branches=("main", "v1"))) as hub:
        yield hub


@pytest.fixture
def online(hub: Hub, tmp_path: Path) -> dict[str, str]:
    """The environment of a machine that reaches the Hub."""
    home = {"HF_HOME": str(tmp_path / "home"), "PTFT_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "0"}
    return home | {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}


def offline(online: dict[str, str]) -> dict[str, str]:
    """The environment of a node that shares its disk and reaches no Hub."""
    return online | {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}


def write(folder: Path, documents: Path, **changes: Any) -> None:
    recipe = make_recipe(documents, **SHORT)
    del recipe["tokenizer"]
    (folder / "recipe.yaml").write_text(json.dumps(recipe | {"model": {"path": "tiny/llama"}} | changes))


def forked(*words: str, cwd: Path, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """`support.ptft` without its imports."""
    run = start(*words, cwd=cwd, cache=Path(env["PTFT_CACHE"]), env=env, patches=["hub_of_environment"])
    return subprocess.CompletedProcess(words, run.wait(), run.stdout, run.stderr)


def missing(folder: Path, env: dict[str, str]) -> list[str]:
    """`missing_offline` in a process of its own, which must not import torch."""
    probe = (
        "import json, sys; from ptft_dist.api import load_recipe, missing_offline\n"
        "print(json.dumps(missing_offline(load_recipe('recipe.yaml'))))\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", probe], cwd=folder, env=environment(env), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found: list[str] = json.loads(done.stdout)
    return found


def test_an_offline_start_after_prefetch(tmp_path: Path, documents: Path, hub: Hub, online: dict[str, str]) -> None:
    """Model, tokenizer, teacher at a branch, and the data set; only in the format that is read."""
    teacher = {"teacher": "tiny/teacher", "revision": "v1"}
    data = {"train": [{"hub": "tiny/rows"}], "validation": 0.1, "max_length": 64}
    write(tmp_path, documents, distillation=teacher, data=data)
    before = missing(tmp_path, offline(online))
    assert [line.split(":")[0] for line in before] == [
        "model.path, tokenizer.path",
        "distillation.teacher",
        "data.train[0].hub",
    ]
    assert "tiny/teacher at revision v1: it is not in the cache of the Hub" in before[1]
    done = forked("prepare", "recipe.yaml", cwd=tmp_path, env=offline(online))
    assert (done.returncode, "tiny/rows" in done.stderr) == (3, True), done.stderr

    done = ptft("prefetch", "recipe.yaml", cwd=tmp_path, env=online)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    home = tmp_path / "home/hub"
    snapshot = home / f"models--tiny--llama/snapshots/{COMMIT}"
    size = sum(path.stat().st_size for path in snapshot.rglob("*") if path.is_file())
    assert lines[0] == f"model.path, tokenizer.path: tiny/llama, revision {COMMIT}, {size / 1e6:,.1f} MB, {snapshot}"
    assert lines[1].startswith(f"distillation.teacher: tiny/teacher, revision {COMMIT}, ")
    assert lines[2].startswith(f"data.train[0].hub: tiny/rows, revision {COMMIT}, ")
    assert not {"tiny/llama/pytorch_model.bin", "tiny/llama/onnx/model.onnx"} & set(hub.asked)

    assert missing(tmp_path, offline(online)) == []
    hub.asked.clear()
    again = forked("prefetch", "recipe.yaml", cwd=tmp_path, env=offline(online))
    assert (again.returncode, again.stdout) == (0, done.stdout), again.stderr
    done = ptft("train", "recipe.yaml", cwd=tmp_path, env=offline(online))
    assert done.returncode == 0, done.stderr
    assert hub.asked == []


def test_only_a_tokenizer(tmp_path: Path, documents: Path, hub: Hub, online: dict[str, str]) -> None:
    """No weights are fetched, and local files are said to be there."""
    model = make_recipe(documents)["model"]
    write(tmp_path, documents, model=model, tokenizer={"path": "tiny/llama"})
    done = forked("prefetch", "recipe.yaml", cwd=tmp_path, env=online)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith(f"tokenizer.path: tiny/llama, revision {COMMIT}, ")
    assert lines[1].startswith(f"data.train[0].path: {documents}, local, exists, ")
    assert "tiny/llama/model.safetensors" not in hub.asked
    assert missing(tmp_path, offline(online)) == []
    write(tmp_path, documents)
    assert missing(tmp_path, offline(online)) == [
        "model.path, tokenizer.path: tiny/llama: the cache does not have all of its weights"
    ]
    folder = tmp_path / f"home/hub/models--tiny--llama/snapshots/{COMMIT}"
    AutoTokenizer.from_pretrained(folder)


def test_shards_and_an_adapter_on_the_hub(tmp_path: Path, documents: Path, online: dict[str, str]) -> None:
    """The base of a local adapter is found by its adapter_config.json. A missing shard is noticed."""
    (tmp_path / "adapter").mkdir()
    base = {"base_model_name_or_path": "tiny/sharded", "revision": None}
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps(base))
    write(tmp_path, documents, distillation={"teacher": "adapter"})
    key = "distillation.teacher (base of the adapter): tiny/sharded"
    assert f"{key}: it is not in the cache of the Hub" in missing(tmp_path, offline(online))
    done = forked("prefetch", "recipe.yaml", cwd=tmp_path, env=online)
    assert done.returncode == 0, done.stderr
    assert [line.split(", ")[0] for line in done.stdout.splitlines()[1:3]] == ["distillation.teacher: adapter", key]
    assert missing(tmp_path, offline(online)) == []
    shards = sorted((tmp_path / f"home/hub/models--tiny--sharded/snapshots/{COMMIT}").glob("model-*.safetensors"))
    assert len(shards) > 1
    shards[1].resolve().unlink()
    assert missing(tmp_path, offline(online)) == [f"{key}: the cache does not have all of its weights"]
    assert forked("prefetch", "recipe.yaml", cwd=tmp_path, env=offline(online)).returncode == 1
    done = forked("prefetch", "recipe.yaml", cwd=tmp_path, env=online)  # fetches the one that is missing
    assert done.returncode == 0, done.stderr
    assert missing(tmp_path, offline(online)) == []


def test_all_mistakes_at_once(tmp_path: Path, documents: Path, online: dict[str, str]) -> None:
    teacher = {"teacher": "tiny/llama", "revision": "v9"}
    data = {"train": [{"path": "no.txt"}], "validation": 0.1}
    write(tmp_path, documents, model={"path": "tiny/nobody"}, distillation=teacher, data=data)
    done = forked("prefetch", "recipe.yaml", cwd=tmp_path, env=online)
    assert (done.returncode, done.stdout) == (2, "")
    lines = done.stderr.splitlines()
    assert lines[0].startswith(
        "error: model.path, tokenizer.path: tiny/nobody: neither a directory here nor a model on"
    )
    assert lines[1].startswith("distillation.teacher: tiny/llama at revision v9: neither a directory")
    assert lines[2].startswith("data.train[0].path: no.txt: no such file")
    assert len(lines) == 3
    write(tmp_path, documents, model={"path": "./nowhere"})
    done = forked("prefetch", "recipe.yaml", cwd=tmp_path, env=online)
    assert "model.path, tokenizer.path: there is no directory ./nowhere" in done.stderr
    assert missing(tmp_path, offline(online)) == []  # an earlier job may write it


def test_no_connection(tmp_path: Path, documents: Path, online: dict[str, str]) -> None:
    write(tmp_path, documents)
    for env in (offline(online), offline(online) | {"HF_HUB_OFFLINE": "0"}):
        done = forked("prefetch", "recipe.yaml", cwd=tmp_path, env=env)
        assert done.returncode == 1
        assert done.stderr.startswith(
            "error: model.path, tokenizer.path: tiny/llama: cannot be fetched. Start again where"
        )
        assert "Traceback" not in done.stderr


# --- what a recipe names ---------------------------------------------------------------------------------------------


def test_every_key_with_a_hub_name_has_the_type_of_one() -> None:
    """Found by what the keys' documentation says; data sets of the Hub are sources."""

    def keys(schema: Any, seen: set[type]) -> Iterator[tuple[str, bool, bool]]:
        for name, key in schema.model_fields.items():
            parts = [key.annotation, *key.metadata]
            for part in parts:
                parts += [*get_args(part), *getattr(part, "__metadata__", ())]
            says = "Hub name" in documentation(schema).get(name, "")
            yield f"{schema.__name__}.{name}", says, any(isinstance(part, NamesModel) for part in parts)
            for part in parts:
                if isinstance(part, type) and issubclass(part, BaseModel) and part not in seen:
                    seen.add(part)
                    yield from keys(part, seen)

    found = list(keys(recipe_class(), set()))
    assert [name for name, says, typed in found if says != typed] == []
    assert {name for name, _, typed in found if typed} >= {
        "ModelSection.path",
        "TokenizerSection.path",
        "AdaptSection.adapter",
        "DistillationSettings.teacher",
        "RewardSource.model",
        "PpoSettings.critic",
    }


def test_names_of_a_recipe() -> None:
    loaded = load_recipe(
        "ppo", ["model.path=a/policy", "ppo.critic=b/critic", "ppo.rewards=[{model: c/r, revision: x}]"]
    )
    named = {each.key: (each.name, each.revision) for each in named_models(loaded.recipe)}
    assert named == {
        "model.path, tokenizer.path": ("a/policy", None),
        "ppo.critic": ("b/critic", None),
        "ppo.rewards.0.model": ("c/r", "x"),
    }
    assert named_models(load_recipe("clm").recipe) == []
    assert missing_offline(load_recipe("clm")) == []


def test_an_adapter_that_names_itself_and_a_name_that_none_has(tmp_path: Path, documents: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(tmp_path)}))
    write(tmp_path, documents, model={"path": "no such--name"}, distillation={"teacher": str(tmp_path)})
    loaded = load_recipe(tmp_path / "recipe.yaml")
    assert missing_offline(loaded) == [
        "model.path, tokenizer.path: no such--name: it is not in the cache of the Hub",
    ]


def test_files_that_are_needed() -> None:
    texts = ["README.md", "config.json", "model.safetensors.index.json", "tokenizer.json"]
    safe = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    others = [
        "consolidated.safetensors",
        "model.fp16.safetensors",
        "onnx/model.onnx",
        "tf_model.h5",
        "training_args.bin",
    ]
    assert needed_files([*texts, *safe, *others, "pytorch_model.bin"], weights=True) == [*texts, *safe]
    assert needed_files([*texts, *others, "pytorch_model.bin"], weights=True) == [*texts, "pytorch_model.bin"]
    assert needed_files([*texts, *safe, *others], weights=False) == texts
    assert needed_files(["adapter_config.json", "adapter_model.safetensors"], weights=True) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


def test_a_data_set_is_streamed_without_a_download(tmp_path: Path, documents: Path, online: dict[str, str]) -> None:
    """The same rows as of a downloaded one; found in the cache by its commit; refused where there is no network."""
    stores = []
    for streaming in (True, False):
        data = {"train": [{"hub": "tiny/rows", "streaming": streaming}], "validation": 0.1, "max_length": 64}
        write(tmp_path, documents, data=data, tokenizer={"train": {"vocab_size": 300}})
        done = forked("prepare", "recipe.yaml", cwd=tmp_path, env=online)
        assert done.returncode == 0, done.stderr
        downloaded = list((tmp_path / "home/datasets").rglob("*.arrow"))
        assert bool(downloaded) is not streaming
        (new,) = set((tmp_path / "cache/stores").glob("*[!k]")) - set(stores)
        stores.append(new)
    for side in ("train", "validation"):
        assert (stores[0] / side / "tokens.bin").read_bytes() == (stores[1] / side / "tokens.bin").read_bytes()
    data["train"][0]["streaming"] = True  # type: ignore[index]
    write(tmp_path, documents, data=data, tokenizer={"train": {"vocab_size": 300}})
    again = forked("prepare", "recipe.yaml", cwd=tmp_path, env=online)
    assert "loaded from the cache" in again.stdout
    fetched = forked("prefetch", "recipe.yaml", cwd=tmp_path, env=online)
    assert "data.train[0].streaming: a stream is not fetched beforehand" in fetched.stdout + fetched.stderr
    refused = forked("prepare", "recipe.yaml", cwd=tmp_path, env=offline(online))
    assert (refused.returncode, "hub: tiny/rows: streaming: the Hub cannot be asked" in refused.stderr) == (3, True)
