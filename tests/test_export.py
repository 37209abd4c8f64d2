"""The exported directory, read by other programs. Expected values are hand-written or come from transformers."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from support import start
from tiny import BERT, LLAMA, T5, write_tiny
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    pipeline,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from ptft_dist.config.recipe import ModelSection
from ptft_dist.config.tokenizer_section import TokenizerTraining
from ptft_dist.data.tokenizer import train_tokenizer
from ptft_dist.engine.saved import SavedState
from ptft_dist.errors import RecipeError
from ptft_dist.networks.export import (
    Export,
    cast_weights,
    export,
    export_dtype,
    portable_tokenizer,
    with_legacy_rope,
    write_model,
)
from ptft_dist.networks.facts import read_facts
from ptft_dist.tasks.registry import recipe_class

WORDS = "red green blue cat dog house tree runs sleeps eats"


def build(keys: dict[str, Any]) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(**{"vocab_size": 300, **keys}), dtype=torch.float32)


def content(model: PreTrainedModel, dtype: torch.dtype = torch.float32, extra: tuple[str, ...] = ()) -> Export:
    tokenizer = train_tokenizer(TokenizerTraining(vocab_size=300), [WORDS] * 3, extra=extra)
    return Export(model, tokenizer, read_facts(model), dtype)


def read(path: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(path.read_text())
    return values


# --- whole runs -------------------------------------------------------------------------------------------------------


def test_a_pipeline_truncates_a_long_text(tmp_path: Path, cache: Path) -> None:
    """The network has 64 positions. transformers' pipelines truncate to the tokenizer's model_max_length."""
    recipe = write_tiny(tmp_path, "classification", train={"max_steps": 1}, eval={"every": None})
    run = start("train", str(recipe), cwd=tmp_path, cache=cache)
    assert run.wait() == 0, run.stderr
    folder = tmp_path / "run/model"
    assert read(folder / "tokenizer_config.json")["model_max_length"] == 64
    answer = pipeline("text-classification", str(folder), truncation=True)(f"{WORDS} " * 50)
    assert answer[0]["label"] in ("animal", "thing")
    modes = {file.name: file.stat().st_mode & 0o777 for file in folder.iterdir()}
    umask = os.umask(0)
    os.umask(umask)
    assert modes == dict.fromkeys(modes, 0o666 & ~umask)


def test_a_sequence_to_sequence_model_says_how_sources_are_written(tmp_path: Path, cache: Path) -> None:
    recipe = write_tiny(tmp_path, "seq2seq", train={"max_steps": 1}, seq2seq={"prefix": "sort: ", "generation": None})
    run = start("train", str(recipe), cwd=tmp_path, cache=cache)
    assert run.wait() == 0, run.stderr
    written = read(tmp_path / "run/model/config.json")["task_specific_params"]
    assert written == {"ptft": {"prefix": "sort: ", "source_eos": True}}


def test_a_run_from_bf16_weights_exports_bf16(tmp_path: Path, cache: Path) -> None:
    """save.dtype: auto is the data type of the source; training is in fp32."""
    source = tmp_path / "source"
    build(LLAMA | {"vocab_size": 320}).to(torch.bfloat16).save_pretrained(source)
    recipe = write_tiny(tmp_path, "sft", train={"max_steps": 1}, sft={"generation": None})
    values = json.loads(recipe.read_text())
    values["model"] = {"path": str(source)}
    recipe.write_text(json.dumps(values))
    run = start("train", str(recipe), cwd=tmp_path, cache=cache)
    assert run.wait() == 0, run.stderr
    assert read(tmp_path / "run/model/config.json")["dtype"] == "bfloat16"
    weights = load_file(tmp_path / "run/model/model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "run/model").dtype == torch.bfloat16


# --- data types -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("wanted", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_a_named_data_type_is_used(wanted: str, dtype: torch.dtype) -> None:
    assert export_dtype(wanted, ModelSection(path="x"), BertConfig(dtype=torch.float16)) == dtype


def test_auto_is_the_data_type_of_the_source(tmp_path: Path) -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        build(LLAMA).to(dtype).save_pretrained(tmp_path)
        config = AutoConfig.from_pretrained(tmp_path)
        assert export_dtype("auto", ModelSection(path=str(tmp_path)), config) == dtype
    assert export_dtype("auto", ModelSection(path="x"), BertConfig()) == torch.float32
    assert export_dtype("auto", ModelSection(config=LLAMA), BertConfig(dtype=torch.bfloat16)) == torch.float32


@pytest.mark.parametrize("tied", [False, True])
def test_weights_are_rounded_once_and_the_network_is_not_changed(tmp_path: Path, tied: bool) -> None:
    model = build(LLAMA | {"tie_word_embeddings": tied})
    before = {name: value.clone() for name, value in model.state_dict().items()}
    write_model(content(model, torch.bfloat16), model.state_dict(), tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert ("lm_head.weight" in file.keys()) is not tied  # noqa: SIM118
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert (again.lm_head.weight is again.model.embed_tokens.weight) is tied
    for name, value in again.state_dict().items():
        assert torch.equal(value, before[name].bfloat16()), name
        assert torch.equal(model.state_dict()[name], before[name]), name
    assert model.config.dtype != "bfloat16"


def test_a_second_export_replaces_the_first_and_nothing_else(tmp_path: Path) -> None:
    """A user may have put a model aside as model.old."""
    writer, names = SavedState(), ("model.old", "model.partial")
    writer.model = build(LLAMA)
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(b"of the user")
    for dtype in (torch.float32, torch.bfloat16):
        export(writer, content(writer.model, dtype), tmp_path / "model")
        assert AutoConfig.from_pretrained(tmp_path / "model").dtype == dtype
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", *names]
    for name in names:
        assert (tmp_path / name / "model.safetensors").read_bytes() == b"of the user"


def test_integers_keep_their_type_and_fp16_refuses_an_overflow() -> None:
    state = {"ids": torch.arange(3), "weight": torch.tensor([1.0, 65504.0])}
    cast = cast_weights(state, torch.float16)
    assert cast["ids"].dtype == torch.int64
    assert cast["weight"].tolist() == [1.0, 65504.0]
    with pytest.raises(RecipeError, match=r"save\.dtype: weight has values above 65504"):
        cast_weights({"weight": torch.tensor([1e6])}, torch.float16)


def test_parts_of_one_tensor_keep_their_own_shape() -> None:
    """A view of the first rows begins at the same address as the whole."""
    whole = torch.arange(6.0).reshape(3, 2)
    cast = cast_weights({"whole": whole, "part": whole[:2], "turned": whole.T, "same": whole}, torch.bfloat16)
    for name, expected in (("whole", whole), ("part", whole[:2]), ("turned", whole.T)):
        assert cast[name].tolist() == expected.tolist(), name
    assert cast["same"] is cast["whole"]


def test_the_schema_knows_the_data_types() -> None:
    assert recipe_class().model_fields["save"].default.dtype == "auto"


# --- what transformers 4 reads ----------------------------------------------------------------------------------------

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
BY_LAYER = {
    "full_attention": {"rope_type": "linear", "rope_theta": 5e5, "factor": 2.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 2e3},
}
ROPE: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("llama", {"rope_type": "default", "rope_theta": 5e5}, {"rope_theta": 5e5}),
    ("llama", {**LLAMA3, "rope_theta": 5e5}, {"rope_theta": 5e5, "rope_scaling": LLAMA3}),
    (
        "phi",
        {"rope_type": "default", "rope_theta": 5e5, "partial_rotary_factor": 0.25},
        {"rope_theta": 5e5, "partial_rotary_factor": 0.25},
    ),
    (
        "gpt_neox",
        {"rope_type": "default", "rope_theta": 5e5, "partial_rotary_factor": 0.5},
        {"rotary_emb_base": 5e5, "rotary_pct": 0.5},
    ),
    (
        "gemma3_text",
        BY_LAYER,
        {"rope_theta": 5e5, "rope_local_base_freq": 2e3, "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    ),
    (
        "modernbert",
        {kind: {"rope_type": "default", "rope_theta": value["rope_theta"]} for kind, value in BY_LAYER.items()},
        {"global_rope_theta": 5e5, "local_rope_theta": 2e3},
    ),
]


@pytest.mark.parametrize(("model_type", "rope", "legacy"), ROPE)
def test_rotary_embeddings_stand_under_the_old_names_too(
    tmp_path: Path, model_type: str, rope: dict[str, Any], legacy: dict[str, Any]
) -> None:
    config: PretrainedConfig = CONFIG_MAPPING[model_type](**SMALL, rope_parameters=rope)
    config.save_pretrained(tmp_path)
    plain = read(tmp_path / "config.json")
    both = with_legacy_rope(plain)
    assert {key: value for key, value in both.items() if plain.get(key) != value} == legacy
    assert plain == {key: both[key] for key in plain}
    (tmp_path / "config.json").write_text(json.dumps(both))
    assert AutoConfig.from_pretrained(tmp_path).rope_parameters == config.rope_parameters


def test_a_config_without_rotary_embeddings_is_left_alone() -> None:
    for keys in (BERT, T5):
        config = AutoConfig.for_model(**keys).to_dict()
        assert with_legacy_rope(config) == config


def test_the_written_config_is_complete(tmp_path: Path) -> None:
    model = build(LLAMA | {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}})
    model.config.use_cache = False  # as in training
    write_model(content(model), model.state_dict(), tmp_path)
    config = read(tmp_path / "config.json")
    assert (config["rope_theta"], config["rope_parameters"]["rope_theta"]) == (5e5, 5e5)
    assert config["use_cache"] is True
    assert model.config.use_cache is False


def test_a_changed_generation_config_is_written_with_what_the_base_has(tmp_path: Path) -> None:
    """Vicuna's has values for sampling without do_sample, which transformers saves only if the config is as it was."""
    model = build(LLAMA)
    model.generation_config = GenerationConfig.from_dict({"temperature": 0.9, "top_p": 0.6, "eos_token_id": 1})
    model.generation_config.eos_token_id = [1, 2]
    write_model(content(model), model.state_dict(), tmp_path)
    written = read(tmp_path / "generation_config.json")
    assert (written["eos_token_id"], written["temperature"], written["top_p"]) == ([1, 2], 0.9, 0.6)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).generation_config
    assert (loaded.eos_token_id, loaded.do_sample) == ([1, 2], model.generation_config.do_sample)


def test_the_number_of_experts_stands_under_the_old_name_too(tmp_path: Path) -> None:
    """transformers 4 would build a Qwen3 mixture of 128 experts, whatever num_local_experts says."""
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    model = build({"model_type": "qwen3_moe", **SMALL, "intermediate_size": 32, "num_key_value_heads": 2, **experts})
    write_model(content(model), model.state_dict(), tmp_path)
    config = read(tmp_path / "config.json")
    assert (config["num_experts"], config["num_local_experts"]) == (4, 4)
    assert AutoConfig.from_pretrained(tmp_path).num_experts == 4


def test_a_learned_tokenizer_has_a_class_that_transformers_4_knows(tmp_path: Path) -> None:
    model = build(LLAMA)
    made = content(model, extra=("<|user|>",))
    write_model(made, model.state_dict(), tmp_path)
    config = read(tmp_path / "tokenizer_config.json")
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert config["additional_special_tokens"] == ["<|user|>"]
    assert "extra_special_tokens" not in config  # a list here stops transformers 4
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again.get_vocab() == made.tokenizer.get_vocab()
    assert again.all_special_tokens == made.tokenizer.all_special_tokens
    text = f"<|user|>{WORDS}"
    assert again(text).input_ids == made.tokenizer(text).input_ids
    assert again.decode(again(text).input_ids, skip_special_tokens=True) == WORDS


@pytest.mark.parametrize(
    ("own", "positions", "expected"),
    [(10**30, 512, 512), (128, 512, 128), (2048, 512, 512), (10**30, None, 10**30), (512, None, 512), (None, 64, 64)],
)
def test_the_tokenizer_truncates_to_what_the_network_can_read(
    own: int | None, positions: int | None, expected: int
) -> None:
    config = {} if own is None else {"model_max_length": own}
    assert portable_tokenizer(config, positions)["model_max_length"] == expected


def test_files_follow_the_umask(tmp_path: Path) -> None:
    model = build(LLAMA)
    before = os.umask(0o027)
    try:
        write_model(content(model), model.state_dict(), tmp_path / "model")
    finally:
        os.umask(before)
    assert {file.stat().st_mode & 0o777 for file in (tmp_path / "model").iterdir()} == {0o640}


def test_the_value_head_can_be_read_by_others(tmp_path: Path, cache: Path) -> None:
    recipe = write_tiny(tmp_path, "ppo", train={"max_steps": 1}, eval={"every": None})
    run = start("train", str(recipe), cwd=tmp_path, cache=cache)
    assert run.wait() == 0, run.stderr
    modes = {file.name: file.stat().st_mode & 0o777 for file in (tmp_path / "run/model").iterdir()}
    assert modes["value_head.safetensors"] == modes["config.json"]
