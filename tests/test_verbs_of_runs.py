"""`ptft export`, `merge` and `api.evaluate` on whole runs of every backend."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from adapt_support import METHODS, write_adapted, write_base
from peft import PeftModel
from safetensors.torch import load_file
from support import eval_rows, start
from tiny import write_tiny
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from ptft_dist import api
from ptft_dist.cli import export as command
from ptft_dist.config.recipe import ModelSection
from ptft_dist.errors import CheckpointError, PtftError, RecipeError
from ptft_dist.reporting.model_card import usage

SHORT: dict[str, Any] = {"train": {"max_steps": 4}, "save": {"every": 2}, "eval": {"every": 2}}
RUNS = {"ddp": (2, "cpu"), "zero2": (2, "cpu_zero2"), "zero3": (2, "cpu_zero3")}
RUNS |= {"fsdp2": (2, "fsdp2")}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Any:
    made: dict[str, Path] = {}

    def provide(task: str) -> Path:
        if task not in made:
            made[task] = write_base(tmp_path_factory.mktemp(task), cache, task)
        return made[task]

    return provide


def train(folder: Path, cache: Path, ranks: int = 1, kind: str = "cpu") -> Path:
    run = start("train", "recipe.yaml", cwd=folder, cache=cache, ranks=ranks, kind=kind)
    assert run.wait() == 0, run.stderr
    return folder / "run"


def same_files(one: Path, other: Path) -> None:
    assert sorted(path.name for path in one.iterdir()) == sorted(path.name for path in other.iterdir())
    for path in one.iterdir():
        assert path.read_bytes() == (other / path.name).read_bytes(), path.name


@pytest.mark.parametrize("name", ["single", "zero2", "zero3", "fsdp2"])
def test_an_exported_checkpoint_is_the_model_of_the_run(tmp_path: Path, cache: Path, name: str) -> None:
    """On one process and without the data. In bf16, the weights are the fp32 ones of ZeRO's optimizer."""
    precision = "bf16" if name.startswith("zero") else "fp32"
    changes = SHORT | {"train": {"max_steps": 4, "precision": precision}}
    write_tiny(tmp_path, "classification", **changes)
    run = train(tmp_path, cache, *RUNS.get(name, (1, "cpu")))
    (tmp_path / "rows.jsonl").unlink()
    command.export(run, tmp_path / "exported")
    same_files(tmp_path / "exported", run / "model")
    weights = load_file(run / "model/model.safetensors")
    assert all(x.dtype == torch.float32 and not x.equal(x.bfloat16().float()) for x in weights.values())
    earlier = api.export(run, tmp_path / "earlier", step=2)
    assert not torch.equal(
        *(load_file(each / "model.safetensors")["classifier.weight"] for each in (earlier, run / "model"))
    )
    first = {key: value for key, value in eval_rows(run)[0].items() if key.startswith("eval/")}
    assert f"| eval/loss | {first['eval/loss']:.6g} |" in (earlier / "README.md").read_text()


@pytest.mark.parametrize(
    ("method", "name"),
    [("lora", "zero3"), ("pissa", "single"), ("adalora", "ddp"), ("qlora", "zero2")],
)
def test_an_exported_adapter_is_that_of_the_run(
    tmp_path: Path, cache: Path, bases: Any, method: str, name: str
) -> None:
    base = bases("classification")
    write_adapted(tmp_path, base, "classification", METHODS[method], **SHORT)
    run = train(tmp_path, cache, *RUNS.get(name, (1, "cpu")))
    api.export(run, tmp_path / "exported")
    same_files(tmp_path / "exported", run / "model")
    assert "library_name: peft" in (run / "model/README.md").read_text()


@pytest.mark.parametrize("method", ["lora", "qlora", "prompt_tuning", "bottleneck"])
def test_an_evaluated_adapter_has_the_metrics_of_its_run(
    tmp_path: Path, cache: Path, bases: Any, monkeypatch: Any, method: str
) -> None:
    monkeypatch.setenv("PTFT_CACHE", str(cache))
    monkeypatch.chdir(tmp_path)
    recipe = write_adapted(tmp_path, bases("classification"), "classification", METHODS[method], **SHORT)
    run = train(tmp_path, cache)
    expected = {key: value for key, value in eval_rows(run)[-1].items() if key.startswith("eval/")}
    assert api.evaluate(recipe) == pytest.approx(expected, rel=1e-5)
    assert api.evaluate(recipe, model=api.export(run, tmp_path / "first", step=2)) != pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_quantized_base_is_dequantized_and_merged(tmp_path: Path, cache: Path, bases: Any, kind: str) -> None:
    base = bases("classification")
    write_adapted(tmp_path, base, "classification", METHODS["lora"] | {"quantize": {"type": kind}}, **SHORT)
    run = train(tmp_path, cache)
    merged = start("merge", "run", "--out", "merged", cwd=tmp_path, cache=cache)
    assert merged.wait() == 0, merged.stderr
    assert re.search(r"largest difference of logits: \S+ of the largest logit", merged.stderr)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert model.dtype == torch.bfloat16
    assert model.config.label2id == {"animal": 0, "thing": 1}
    assert "quantization_config" not in model.config.to_dict()

    from transformers import BitsAndBytesConfig

    fits = {"nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}}
    config = BitsAndBytesConfig(
        **fits.get(kind, {"load_in_8bit": True}), llm_int8_skip_modules=["classifier", "dropout", "pooler"]
    )
    theirs = AutoModelForSequenceClassification.from_pretrained(base, quantization_config=config, dtype=torch.float32)
    theirs = PeftModel.from_pretrained(theirs.dequantize().float(), run / "model").merge_and_unload().state_dict()
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(weight.float(), theirs[name].bfloat16().float(), atol=1e-6, rtol=2**-7)
    plain = AutoModelForSequenceClassification.from_pretrained(base).state_dict()
    name = "bert.encoder.layer.0.attention.self.key.weight"  # has no adapter
    assert not torch.allclose(model.state_dict()[name].float(), plain[name], atol=1e-4)


def test_a_base_that_has_changed(tmp_path: Path, cache: Path, bases: Any) -> None:
    base = shutil.copytree(bases("classification"), tmp_path / "base")
    write_adapted(tmp_path, base, "classification", METHODS["lora"], **SHORT)
    run = train(tmp_path, cache)
    command.export(run, tmp_path / "exported")
    state = load_file(base / "model.safetensors")
    from safetensors.torch import save_file

    save_file({**state, "classifier.bias": state["classifier.bias"] + 1}, base / "model.safetensors", {"format": "pt"})
    for verb in (api.merge, api.export):
        with pytest.raises(CheckpointError, match=f"{base} has changed since .*run was trained on it"):
            verb(run, tmp_path / "out")
    shutil.rmtree(base)
    with pytest.raises(RecipeError, match=f"its base {base} does not exist"):
        api.merge(run, tmp_path / "out")
    with pytest.raises(RecipeError, match=f"there is no directory {base}"):
        api.export(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / ".out.partial").exists()


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    folder = tmp_path_factory.mktemp("small")
    write_tiny(folder, "clm", **SHORT)
    return train(folder, cache)


def test_the_card(small: Path, tmp_path: Path) -> None:
    """Front matter as YAML for the Hub, and the numbers of the run's own files."""
    from huggingface_hub import ModelCard

    api.export(small, tmp_path / "out", step=2, license_id="apache-2.0")
    card = ModelCard.load(tmp_path / "out/README.md")
    assert card.data.license == "apache-2.0"
    assert (card.data.library_name, card.data.tags) == ("transformers", ["ptft", "clm"])
    loss = eval_rows(small)[0]["eval/loss"]
    report = json.loads((small / "data_report.json").read_text())
    versions = json.loads((small / "environment.json").read_text())["packages"]
    for text in (
        "after update 2",
        f"| eval/loss | {loss:.6g} |",
        f"| train | {report['train']['examples']} | {report['train']['rows']} | {report['train']['tokens']:,} |",
        f"| torch | {versions['torch']} |",
        "max_length: 32",
        'AutoModelForCausalLM.from_pretrained("DIRECTORY")',
    ):
        assert text in card.content, text
    own = (small / "model/README.md").read_text()
    assert "license: not set" in own
    assert "run_dir" not in own
    assert ModelCard(own).data.license is None


def test_the_card_of_an_adapter_loads_its_base() -> None:
    """In its revision, and from any directory: a relative model.path starts at the recipe."""
    model = ModelSection(path="../base", revision="abc", adapt={"lora": {}})  # type: ignore[arg-type]
    recipe = SimpleNamespace(model=model, settings=SimpleNamespace(writes=False))
    code = usage(recipe, "org/base", "AutoModelForTokenClassification", ["O", "B-时间"])
    labels = "{0: 'O', 1: 'B-时间'}"
    assert f'AutoModelForTokenClassification.from_pretrained("org/base", id2label={labels}, revision="abc")' in code
    recipe.model = ModelSection(path="../base", adapt={"lora": {}})  # type: ignore[arg-type]
    assert 'AutoModelForCausalLM.from_pretrained("/a/base")' in usage(recipe, "/a/base", "AutoModelForCausalLM", [])


def test_the_card_of_a_run_from_a_model_of_the_current_directory(
    small: Path, tmp_path: Path, cache: Path, monkeypatch: Any
) -> None:
    """`runs/clm/model` is no name of the Hub if the recipe lies elsewhere, as the shipped recipes do."""
    write_tiny(tmp_path / "recipes", "clm", model={"config": None, "path": "small/model"}, **SHORT)
    (tmp_path / "small").symlink_to(small)
    run = start("train", "recipes/recipe.yaml", "run_dir=run", cwd=tmp_path, cache=cache)
    assert run.wait() == 0, run.stderr
    monkeypatch.chdir(tmp_path)
    api.export(tmp_path / "run", tmp_path / "out")
    for card in (tmp_path / "run/model/README.md", tmp_path / "out/README.md"):
        assert "base_model" not in card.read_text()
        assert "# A model of model\n" in card.read_text()


def test_which_checkpoint(small: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no checkpoint of update 3\. It has: 2, 4"):
        api.export(small, tmp_path / "out", step=3)
    with pytest.raises(CheckpointError, match="contains no checkpoint"):
        api.export(tmp_path, tmp_path / "out")
    run = shutil.copytree(small, tmp_path / "run")
    weights = run / "checkpoints/step-00000004/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(CheckpointError, match=r"was altered.*others: 2"):
        api.export(run, tmp_path / "out")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    with pytest.raises(RecipeError, match="already exists and is not empty"):
        api.export(small, tmp_path / "full")
    with pytest.raises(RecipeError, match="private: applies to a repository"):
        api.export(small, tmp_path / "out", private=True)
    assert not (tmp_path / "out").exists()


def test_push(small: Path, tmp_path: Path, monkeypatch: Any) -> None:
    import huggingface_hub

    calls: list[tuple[str, dict[str, Any]]] = []

    class Api:
        def create_repo(self, repo_id: str, **options: Any) -> str:
            calls.append((repo_id, options))
            return f"https://huggingface.co/{repo_id}"

        def upload_folder(self, **options: Any) -> None:
            calls.append(
                (options["repo_id"], {"files": sorted(path.name for path in options["folder_path"].iterdir())})
            )

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    out = api.export(small, tmp_path / "out", push="someone/model", private=True)
    files = sorted(path.name for path in out.iterdir())
    assert calls == [("someone/model", {"private": True, "exist_ok": True}), ("someone/model", {"files": files})]
    assert {"README.md", "model.safetensors", "tokenizer.json"} <= set(files)

    def refused(*_: Any, **__: Any) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(Api, "upload_folder", refused)
    with pytest.raises(PtftError, match=r"the upload failed, .*again is complete: no route to host\nSet HF_TOKEN"):
        api.export(small, tmp_path / "again", push="someone/model")
    assert (tmp_path / "again/README.md").is_file()


def test_a_run_with_an_adapter_generates_and_is_merged(tmp_path: Path, cache: Path, bases: Any) -> None:
    write_adapted(tmp_path, bases("clm"), "clm", METHODS["lora"], **SHORT)
    run = train(tmp_path, cache)
    options: dict[str, Any] = {"max_new_tokens": 6, "temperature": 0}
    text = api.generate(run, "red green", **options)
    merged = api.merge(run, tmp_path / "merged")
    assert api.generate(merged, "red green", **options) == text
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(bases("clm")), run / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(run / "model")
    ids = tokenizer("red green", return_tensors="pt")
    written = model.generate(
        input_ids=ids.input_ids, attention_mask=ids.attention_mask, max_new_tokens=6, do_sample=False
    )
    assert tokenizer.decode(written[0], skip_special_tokens=True).strip() == text


def test_ranks_from_data_are_refused(tmp_path: Path, cache: Path, bases: Any) -> None:
    model = {"adapt": {"lora": {"r": 4, "init": "eva", "eva_rows": 12}}}
    write_adapted(tmp_path, bases("clm"), "clm", model, **SHORT)
    run = train(tmp_path, cache)
    with pytest.raises(RecipeError, match="init: eva computes the ranks from training rows"):
        api.export(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()
