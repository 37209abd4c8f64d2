"""Building networks: mistakes are reported before weights are loaded; pretrained and frozen networks."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import Vocabulary, make_recipe, start, write_recipe
from tiny import BERT, LLAMA, T5, write_tiny
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    LlamaForCausalLM,
    PreTrainedModel,
)

from ptft_dist.api import load_recipe
from ptft_dist.config.places import local_directory
from ptft_dist.config.recipe import ModelSection
from ptft_dist.errors import RecipeError
from ptft_dist.networks import preview
from ptft_dist.networks.facts import read_facts
from ptft_dist.networks.frozen import FrozenSource, files_identity, frozen_source
from ptft_dist.networks.load import build_config, build_model
from ptft_dist.networks.names import directory_or_hub_name
from ptft_dist.networks.preview import check_weights, preview_network

GPT2 = {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}
AUTO = {"bert": AutoModelForMaskedLM, "t5": AutoModelForSeq2SeqLM}


class Tokens(Vocabulary):
    bos_token_id, eos_token_id = 1, 2


def check(keys: dict[str, Any]) -> None:
    """The checks of model.config in a session before the process group exists."""
    section = ModelSection(config=keys)
    config = build_config(section, Tokens(100, 0), 32)  # type: ignore[arg-type]
    preview_network(section, config, AUTO.get(keys["model_type"], AutoModelForCausalLM))


def tiny_llama(folder: Path, seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    model: LlamaForCausalLM = AutoModelForCausalLM.from_config(AutoConfig.for_model(**LLAMA, vocab_size=320))
    model.save_pretrained(folder)
    return model


# --- model.config -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keys", [LLAMA, BERT, T5, GPT2])
def test_good_configs_pass(keys: dict[str, Any]) -> None:
    check(keys)


@pytest.mark.parametrize(
    ("base", "key", "value", "message"),
    [
        (LLAMA, "hidden_size", -32, "-32 is not between 1 and"),
        (LLAMA, "num_hidden_layers", -1, "-1 is not between 1 and"),
        (LLAMA, "num_attention_heads", 0, "0 is not between 1 and"),
        (LLAMA, "num_key_value_heads", 0, "0 is not between 1 and"),
        (LLAMA, "vocab_size", 10**20, "is not between 1 and"),
        (LLAMA, "hidden_act", "foo", "no activation 'foo'"),
        (LLAMA, "hidden_act", "geluu", "did you mean .*gelu"),
        (BERT, "hidden_act", "foo", "no activation 'foo'"),
        (BERT, "type_vocab_size", -2, "-2 is not between 0 and"),
        (BERT, "intermediate_size", 0, "0 is not between 1 and"),
        (T5, "num_layers", -1, "-1 is not between 1 and"),
        (T5, "num_heads", 0, "0 is not between 1 and"),
        (T5, "d_ff", -1, "-1 is not between 1 and"),
        (LLAMA, "dtype", "bfloat16", "has no effect: new weights are trained in fp32. train.precision sets"),
        (LLAMA, "torch_dtype", "bfloat16", "has no effect: new weights are trained in fp32. train.precision sets"),
        (GPT2, "n_embd", -1, "-1 is not between 1 and"),
        (GPT2, "activation_function", "foo", "no activation 'foo'"),
    ],
)
def test_an_impossible_value_is_named_by_its_key(base: dict[str, Any], key: str, value: Any, message: str) -> None:
    with pytest.raises(RecipeError, match=rf"^model\.config\.{key}: .*{message}"):
        check(base | {key: value})


def test_heads_must_share_keys_and_values_evenly() -> None:
    with pytest.raises(RecipeError, match=r"^model\.config\.num_key_value_heads: 3 does not divide .*\(4\)"):
        check(LLAMA | {"num_attention_heads": 4, "num_key_value_heads": 3})


@pytest.mark.parametrize(
    ("base", "change", "message"),
    [
        (LLAMA, {"hidden_size": 33}, r"33\) is not a multiple"),
        (BERT, {"hidden_size": 33}, r"33\) is not a multiple"),
        (GPT2, {"n_head": 3}, "divisible"),
        (BERT, {"hidden_dropout_prob": 3.0}, "dropout probability"),
        (T5, {"feed_forward_proj": "foo"}, "foo"),
    ],
)
def test_what_only_the_architecture_knows_is_found_on_the_meta_device(
    base: dict[str, Any], change: dict[str, Any], message: str
) -> None:
    with pytest.raises(RecipeError, match=rf"^model\.config: .*{message}"):
        check(base | change)


def test_a_network_that_exceeds_the_memory_is_refused() -> None:
    """10^9 rows of 32 numbers, twice, in fp32: 256 GB."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preview, "machine_memory_bytes", lambda: 255 * 10**9)
        with pytest.raises(RecipeError, match=r"model\.config: the weights take 256 GB .*255 GB.*\[1000000000, 32\]"):
            check(LLAMA | {"vocab_size": 10**9})
        patch.setattr(preview, "machine_memory_bytes", lambda: 257 * 10**9)
        check(LLAMA | {"vocab_size": 10**9})


@pytest.mark.parametrize("keys", [LLAMA, BERT, T5, GPT2, LLAMA | {"tie_word_embeddings": True}])
def test_a_preview_has_the_facts_of_the_network(keys: dict[str, Any]) -> None:
    auto = AUTO.get(keys["model_type"], AutoModelForCausalLM)
    section, config = ModelSection(config=keys), AutoConfig.for_model(**keys)
    assert read_facts(preview_network(section, config, auto)) == read_facts(build_model(section, config, 0, auto))


def test_a_wrong_config_ends_a_run_before_it_trains(tmp_path: Path, documents: Path, cache: Path) -> None:
    recipe = write_recipe(tmp_path, documents, model={"config": {"hidden_act": "foo"}})
    run = start("train", str(recipe), cwd=tmp_path, cache=cache)
    assert run.wait() == 2
    assert "model.config.hidden_act: transformers has no activation 'foo'" in run.stderr
    assert "Traceback" not in run.stderr


# --- model.path -------------------------------------------------------------------------------------------------------


def damage(folder: Path, kind: str, how: str) -> Path:
    model = tiny_llama(folder)
    file = folder / "model.safetensors"
    if kind != "safetensors":
        file.unlink()
        file = folder / "pytorch_model.bin"
        torch.save(model.state_dict(), file, _use_new_zipfile_serialization=kind == "zip")
    check_weights(ModelSection(path=str(folder)))  # whole, it passes
    data = file.read_bytes()
    file.write_bytes({"half": data[: len(data) // 2], "garbage": b"x" * 1000, "empty": b""}[how])
    return file


@pytest.mark.parametrize("how", ["half", "garbage", "empty"])
@pytest.mark.parametrize("kind", ["safetensors", "zip", "pickle"])
def test_damaged_weights_are_named(tmp_path: Path, kind: str, how: str) -> None:
    file = damage(tmp_path, kind, how)
    with pytest.raises(RecipeError, match=rf"^model\.path: {file} cannot be read; it is damaged"):
        check_weights(ModelSection(path=str(tmp_path)))
    with pytest.raises(RecipeError, match=r"^distillation\.teacher: .* damaged"):
        frozen_source("distillation.teacher", str(tmp_path), None, ModelSection(config=LLAMA), tmp_path)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    model = tiny_llama(tmp_path / "one")
    model.save_pretrained(tmp_path / "many", max_shard_size="20KB")
    section = ModelSection(path=str(tmp_path / "many"))
    check_weights(section)
    shard = max((tmp_path / "many").glob("model-*.safetensors"))
    shard.unlink()
    with pytest.raises(RecipeError, match=rf"model\.path: .* has no {shard.name}"):
        check_weights(section)


def test_other_files_and_names_on_the_hub_are_not_opened(tmp_path: Path) -> None:
    tiny_llama(tmp_path)
    (tmp_path / "training_args.bin").write_bytes(b"x")
    check_weights(ModelSection(path=str(tmp_path)))
    check_weights(ModelSection(path="owner/name"))
    check_weights(ModelSection(config=LLAMA))


def test_a_damaged_file_ends_a_run_before_it_trains(tmp_path: Path, documents: Path, cache: Path) -> None:
    damage(tmp_path / "source", "safetensors", "half")
    recipe = write_recipe(tmp_path, documents)
    values = json.loads(recipe.read_text())
    recipe.write_text(json.dumps({**values, "model": {"path": "source"}}))
    run = start("train", str(recipe), cwd=tmp_path, cache=cache)
    assert run.wait() == 2
    assert "model.safetensors cannot be read; it is damaged" in run.stderr
    assert "Traceback" not in run.stderr


def test_what_another_task_wrote_about_its_sources_is_dropped(tmp_path: Path) -> None:
    model = tiny_llama(tmp_path)
    model.config.task_specific_params = {"ptft": {"prefix": "old"}, "summary": {"num_beams": 4}}
    model.save_pretrained(tmp_path)
    config = build_config(ModelSection(path=str(tmp_path)), Tokens(100, 0), 32)  # type: ignore[arg-type]
    assert config.task_specific_params == {"summary": {"num_beams": 4}}


def test_the_labels_of_a_head_are_compared_in_the_order_of_their_ids(tmp_path: Path) -> None:
    """config.json of many models on the Hub has the ids as sorted texts: 0, 1, 10, 11, 2, ..."""
    labels = [f"class {i}" for i in range(12)]
    config = AutoConfig.for_model(**BERT, vocab_size=100, architectures=["BertForSequenceClassification"]).to_dict()
    config["id2label"] = {i: labels[int(i)] for i in sorted(map(str, range(12)))}
    (tmp_path / "config.json").write_text(json.dumps(config))

    def checked(names: list[str]) -> None:
        settings = {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
        build_config(ModelSection(path=str(tmp_path)), Tokens(100, 0), 32, settings)  # type: ignore[arg-type]

    checked(labels)
    with pytest.raises(RecipeError, match=", ".join(labels)):
        checked(list(config["id2label"].values()))


# --- frozen networks --------------------------------------------------------------------------------------------------


def digests(files: Sequence[Path]) -> list[str]:
    return [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]


def test_a_frozen_network_is_identified_by_its_files(tmp_path: Path) -> None:
    tiny_llama(tmp_path / "a")
    tiny_llama(tmp_path / "same")
    tiny_llama(tmp_path / "other", seed=1)
    sources = {
        name: frozen_source("distillation.teacher", name, None, ModelSection(config=LLAMA), tmp_path)
        for name in ("a", "same", "other")
    }
    identity = {name: source.identity(digests) for name, source in sources.items()}
    assert identity["a"] == identity["same"]
    assert identity["a"] != identity["other"]
    (tmp_path / "a/README.md").write_text("not part of the network")
    assert sources["a"].identity(digests) == identity["a"]
    config = json.loads((tmp_path / "a/config.json").read_text())
    (tmp_path / "a/config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.1}))
    assert sources["a"].identity(digests) != identity["a"]
    (tmp_path / "same/model.safetensors").rename(tmp_path / "same/model-1.safetensors")
    assert sources["same"].identity(digests) != identity["same"]


def test_the_path_of_a_model_does_not_lead_through_the_directory_of_the_recipe(tmp_path: Path) -> None:
    """An adapter names its base by it, and the recipe's directory may be moved. But `..` may follow a link."""
    for name in ("models/base", "project", "far/off/place", "far/off/models/base"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "far/off/place")
    found = directory_or_hub_name("../models/base", tmp_path / "project", "model.path")
    assert found == str(tmp_path / "models/base")
    behind = directory_or_hub_name("../models/base", tmp_path / "link", "model.path")
    assert Path(behind).samefile(tmp_path / "far/off/models/base")


def test_the_identity_of_a_hub_model_is_its_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    config = AutoConfig.for_model(**LLAMA)
    config._commit_hash = "abc123"
    monkeypatch.setattr(AutoConfig, "from_pretrained", lambda *_args, **_more: config)
    assert files_identity(ModelSection(path="owner/name"), digests) == "abc123"


def test_a_frozen_network_is_loaded_as_it_is_used(tmp_path: Path) -> None:
    saved = tiny_llama(tmp_path / "teacher")
    settings = ModelSection(config=BERT, attention="eager")
    source = frozen_source("distillation.teacher", "teacher", None, settings, tmp_path)
    assert source.path == str(tmp_path / "teacher")
    model: PreTrainedModel = source.load(AutoModelForCausalLM, torch.bfloat16)
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert model.config._attn_implementation == "eager"
    for name, value in model.state_dict().items():
        assert torch.equal(value, saved.state_dict()[name].bfloat16()), name


@pytest.mark.parametrize("key", ["model", "tokenizer", "ppo.rewards.0"])
def test_a_revision_of_a_local_directory_has_no_effect(tmp_path: Path, key: str) -> None:
    paths = {"model": "org/policy", "tokenizer": "org/policy", "ppo.rewards.0": "org/reward"} | {key: str(tmp_path)}
    words = [f"model.path={paths['model']}", f"tokenizer={{path: {paths['tokenizer']}}}"]
    words += [f"ppo.rewards=[{{model: {paths['ppo.rewards.0']}}}]"]
    assert load_recipe("ppo", words).recipe
    with pytest.raises(RecipeError, match=rf"^{key}\.revision: has no effect on the local directory {tmp_path}"):
        load_recipe("ppo", [*words, f"{key}.revision=v1"])
    load_recipe("ppo", [*[word.replace(str(tmp_path), "org/other") for word in words], f"{key}.revision=v1"])


def test_a_missing_directory_is_looked_for_in_each_folder_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecipeError, match=rf"^model\.path: there is no directory \./x in {tmp_path}$"):
        local_directory("./x", tmp_path, "model.path")
    with pytest.raises(RecipeError, match=rf"there is no directory \./x in {tmp_path}/recipes or {tmp_path}$"):
        local_directory("./x", tmp_path / "recipes", "model.path")
    with pytest.raises(RecipeError, match=r"there is no directory /x$"):
        local_directory("/x", tmp_path, "model.path")


def test_messages_name_the_key_of_the_frozen_network(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"^distillation\.teacher: there is no directory \./nowhere"):
        frozen_source("distillation.teacher", "./nowhere", None, ModelSection(config=LLAMA), tmp_path)
    (tmp_path / "empty").mkdir()
    source = FrozenSource("distillation.teacher", ModelSection(path=str(tmp_path / "empty")))
    with pytest.raises(RecipeError, match=r"^distillation\.teacher: cannot load a config from"):
        source.load(AutoModelForCausalLM, torch.float32)
    tiny_llama(tmp_path / "empty").config.save_pretrained(tmp_path / "empty")
    (tmp_path / "empty/model.safetensors").unlink()
    with pytest.raises(RecipeError, match=r"^distillation\.teacher: .*the network cannot be built"):
        source.load(AutoModelForCausalLM, torch.float32)


@pytest.mark.parametrize("task", ["plm", "clm"])
def test_another_base_network_is_refused_where_weights_are_frozen(tmp_path: Path, cache: Path, task: str) -> None:
    """A checkpoint holds the trained weights only, and plm freezes those for segments. Where all weights are trained,
    the files of model.path no longer matter at a resume."""
    recipe = write_tiny(tmp_path, task, train={"max_steps": 1}, eval={"every": None}, run_dir="base")
    made = start("train", "recipe.yaml", cwd=tmp_path, cache=cache)
    assert made.wait() == 0, made.stderr
    base = {"path": str(tmp_path / "base/model")}
    changes = {"model": base, "tokenizer": base, "train": {"max_steps": 8, "precision": "fp32"}, "run_dir": "run"}
    recipe.write_text(json.dumps(json.loads(recipe.read_text()) | changes))
    start("train", "recipe.yaml", cwd=tmp_path, cache=cache, patches=["die_in_rank:0:6"]).wait()
    weights = tmp_path / "base/model/model.safetensors"
    tensors = load_file(weights)
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, weights, metadata={"format": "pt"})
    run = start("train", "recipe.yaml", cwd=tmp_path, cache=cache)
    assert run.wait() == (4 if task == "plm" else 0), run.stderr
    assert ("was trained on another base model: the files of model.path have changed" in run.stderr) is (task == "plm")
    assert ("resumed from run/checkpoints/step-00000004" in run.stderr) is (task == "clm")


@pytest.mark.parametrize("key", ["model.path", "distillation.teacher"])
def test_a_run_that_would_replace_a_model_that_it_reads_is_refused(
    tmp_path: Path, documents: Path, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    """As in a project directory with the base in model/, and run_dir: the directory itself."""
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path)
    named = {"distillation": {"teacher": "./model"}}
    if key == "model.path":
        named = {"model": {"config": None, "path": "model"}, "tokenizer": {"train": None, "path": "model"}}
    recipe = make_recipe(documents, run_dir=".", **named)
    with pytest.raises(RecipeError, match=rf"^run_dir: the trained model is written to .*/model, .* {key}.*run_dir"):
        load_recipe(recipe, training=True)
    load_recipe(recipe)
    load_recipe(recipe, ["run_dir=other"], training=True)
