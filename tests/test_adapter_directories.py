"""Adapter directories: plain peft loads those of ptft, ptft loads those of peft, and both generate the same text."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    AdaptionPromptConfig,
    IA3Config,
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    get_peft_model,
)
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from ptft_dist import api
from ptft_dist.cli import generate as command
from ptft_dist.config.adapt import AdaptSection
from ptft_dist.config.recipe import ModelSection
from ptft_dist.config.tokenizer_section import TokenizerTraining
from ptft_dist.data.tokenizer import train_tokenizer
from ptft_dist.engine.parameters import stored_tensors
from ptft_dist.errors import CheckpointError, RecipeError
from ptft_dist.inference.generation import source_prefix
from ptft_dist.networks.adapt import adapt_network, bottleneck, reading_section
from ptft_dist.networks.adapt.adapters import load_adapter, write_adapter
from ptft_dist.networks.adapt.peft_configs import AdapterSetup
from ptft_dist.networks.adapt.reading import load_adapters, read_adapter
from ptft_dist.tasks.common.generation import left_padded

METHODS: dict[str, Any] = {
    "lora": {"lora": {"r": 4}},
    "dora": {"lora": {"r": 4, "dora": True}},
    "pissa": {"lora": {"r": 4, "init": "pissa"}},
    "ia3": {"ia3": {}},
    "adalora": {"adalora": {"r": 4, "target_r": 2}},
    "prompt_tuning": {"prompt_tuning": {"tokens": 4}},
    "p_tuning": {"p_tuning": {"tokens": 4}},
    "prefix_tuning": {"prefix_tuning": {"tokens": 4}},
    "bottleneck": {"bottleneck": {"size": 8}},
}
IDS = torch.randint(5, 60, (3, 9), generator=torch.Generator().manual_seed(7))
PROMPT = "one two three"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random causal network with a tokenizer."""
    folder = tmp_path_factory.mktemp("base")
    tokenizer = train_tokenizer(TokenizerTraining(vocab_size=300), ["one two three vier"] * 9, ("bos", "eos"))
    torch.manual_seed(1)
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": None}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=64, **sizes, **ids)).eval()
    spread(model)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def spread(model: torch.nn.Module, seed: int = 3) -> None:
    """Random trained weights that have an effect; the frozen ones stay."""
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            scale = 0.05 if "bias" in name or "original_module" in name else 0.3
            parameter.data += torch.randn_like(parameter) * scale


def adapted(base: Path, method: str, seed: int = 3, added: int = 0) -> Any:
    """Our network with an adapter whose weights are random, and its tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokens = len(tokenizer)
    tokenizer.add_tokens([f"new{i}" for i in range(added)])
    model = AutoModelForCausalLM.from_pretrained(base)
    if added:
        torch.manual_seed(0)
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    setup = AdapterSetup("CAUSAL_LM", str(base), None, 100, tuple(range(tokens, len(tokenizer))), str(base), 0)
    model = adapt_network(model.train(), AdaptSection.model_validate(METHODS[method]), setup)
    spread(model, seed)
    return model.eval(), tokenizer


def export(model: Any, tokenizer: Any, folder: Path) -> Path:
    write_adapter(model, stored_tensors(model), folder)
    tokenizer.save_pretrained(folder)
    return folder


def logits(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    """The logits at the positions of `ids`, without those of virtual tokens."""
    with torch.no_grad():
        values: torch.Tensor = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    return values[:, -ids.shape[1] :]


def plain_peft(folder: Path, base: Path, tokens: int = 0) -> Any:
    """The adapter as a user of peft loads it."""
    bottleneck.register()
    model = AutoModelForCausalLM.from_pretrained(base)
    if tokens:
        model.resize_token_embeddings(tokens)
    return PeftModel.from_pretrained(model, folder).eval()


@pytest.mark.parametrize("method", METHODS)
def test_plain_peft_loads_what_we_save_and_we_generate_with_it(base: Path, tmp_path: Path, method: str) -> None:
    model, tokenizer = adapted(base, method)
    expected = logits(model)
    theirs = plain_peft(export(model, tokenizer, tmp_path), base)
    torch.testing.assert_close(logits(theirs), expected, atol=2e-5, rtol=1e-5)
    assert (logits(AutoModelForCausalLM.from_pretrained(base)) - expected).abs().max() > 0.1
    again = load_adapters({"a": read_adapter(tmp_path)}, "a", torch.float32)
    torch.testing.assert_close(logits(again), logits(theirs), atol=0, rtol=0)
    with torch.no_grad():  # padding on the left, as lm-eval generates
        found = again(**left_padded([IDS[0].numpy(), IDS[1, :4].numpy()], pad_id=0)).logits[1, -1]
    torch.testing.assert_close(found, logits(again, IDS[1:2, :4])[0, -1], atol=2e-5, rtol=1e-5)

    assert api.generate(tmp_path, PROMPT, max_new_tokens=6, temperature=0) == naive(theirs, tokenizer)


def naive(model: Any, tokenizer: Any, new_tokens: int = 6) -> str:
    """Greedy decoding without a cache, with one forward pass of the whole text for each token."""
    ids = tokenizer(PROMPT, add_special_tokens=False, return_tensors="pt").input_ids
    for _ in range(new_tokens):
        ids = torch.cat([ids, logits(model, ids)[:, -1:].argmax(-1)], 1)
        if ids[0, -1] == tokenizer.eos_token_id:
            break
    return str(tokenizer.decode(ids[0], skip_special_tokens=True)).strip()


@pytest.mark.parametrize("method", ["lora", "ia3", "prompt_tuning", "prefix_tuning"])
def test_we_load_what_plain_peft_saves(base: Path, tmp_path: Path, method: str) -> None:
    """For training too: `model.adapt: {adapter: DIR}`."""
    config: Any = {
        "lora": LoraConfig(task_type="CAUSAL_LM", r=3, target_modules=["q_proj", "down_proj"]),
        "ia3": IA3Config(task_type="CAUSAL_LM"),
        "prompt_tuning": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        "prefix_tuning": PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    }[method]
    theirs = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    spread(theirs)
    expected = logits(theirs.eval())
    theirs.save_pretrained(tmp_path)
    section = AdaptSection(adapter=str(tmp_path))
    setup = AdapterSetup("CAUSAL_LM", str(base), None, 100, (), str(base), 0)
    ours = adapt_network(AutoModelForCausalLM.from_pretrained(base).train(), section, setup)
    assert any(parameter.requires_grad for parameter in ours.parameters())
    torch.testing.assert_close(logits(ours.eval()), expected, atol=2e-5, rtol=1e-5)
    export(ours, AutoTokenizer.from_pretrained(base), tmp_path / "again")
    torch.testing.assert_close(logits(plain_peft(tmp_path / "again", base)), expected, atol=2e-5, rtol=1e-5)
    assert api.generate(tmp_path, PROMPT, max_new_tokens=6, temperature=0) == naive(
        theirs, AutoTokenizer.from_pretrained(base)
    )


def test_a_method_of_peft_without_a_mode_for_inference(base: Path, tmp_path: Path) -> None:
    config = AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=3, adapter_layers=2)
    theirs = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    spread(theirs)
    theirs.save_pretrained(tmp_path)
    again = load_adapters({"a": read_adapter(tmp_path)}, "a", torch.float32)
    torch.testing.assert_close(logits(again), logits(theirs.eval()))


def test_tokens_that_the_base_has_not(base: Path, tmp_path: Path) -> None:
    model, tokenizer = adapted(base, "lora", added=3)
    expected = logits(model, IDS + 60)
    theirs = plain_peft(export(model, tokenizer, tmp_path), base, len(tokenizer))
    ours = load_adapters({"a": read_adapter(tmp_path)}, "a", torch.float32)
    ids = torch.tensor([[len(tokenizer) - 1, 8, len(tokenizer) - 3]])
    torch.testing.assert_close(logits(ours, ids), logits(model, ids), atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(logits(ours, ids), logits(theirs, ids), atol=2e-5, rtol=1e-5)
    assert expected.shape[-1] == len(tokenizer)


@pytest.mark.parametrize("method", ["lora", "ia3", "prompt_tuning", "prefix_tuning", "bottleneck"])
def test_several_adapters_do_not_change_each_other(base: Path, tmp_path: Path, method: str, capsys: Any) -> None:
    folders = {}
    for seed, name in enumerate(("first", "second")):
        folders[name] = export(*adapted(base, method, seed + 10), tmp_path / name)
    options: dict[str, Any] = {"max_new_tokens": 8, "temperature": 0}
    alone = {name: api.generate(folder, PROMPT, **options) for name, folder in folders.items()}
    assert alone["first"] != alone["second"]
    for run in (base, folders["first"]):
        for use in ("first", "second"):
            given = folders if run == base else {"second": folders["second"]}
            chosen = "default" if use == "first" and run != base else use
            assert api.generate(run, PROMPT, adapters=given, use=chosen, **options) == alone[use]
    assert api.generate(base, PROMPT, adapters=folders, **options) == alone["second"]  # the last one
    named = [f"{name}={folder}" for name, folder in folders.items()]
    command.generate(base, PROMPT, max_new_tokens=8, temperature=0.0, adapter=named, use="first")
    assert capsys.readouterr().out.strip() == alone["first"]


@pytest.mark.parametrize("options", [{"init_lora_weights": "pissa"}, {"bias": "all"}], ids=str)
def test_an_adapter_that_changes_the_base_is_loaded_alone(base: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    """Else another adapter would compute something else beside it."""
    config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], **options)
    theirs = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    spread(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    alone = read_adapter(tmp_path / "theirs")
    torch.testing.assert_close(logits(load_adapters({"a": alone}, "a", torch.float32)), logits(theirs.eval()))
    other = read_adapter(export(*adapted(base, "lora"), tmp_path / "other"))
    with pytest.raises(RecipeError, match=r"adapter a: .*theirs changes weights of the base.*Load it alone"):
        load_adapters({"a": alone, "b": other}, "b", torch.float32)


def test_what_is_wrong_with_adapters_is_said(base: Path, tmp_path: Path) -> None:
    folder = export(*adapted(base, "lora"), tmp_path / "lora")
    more = export(*adapted(base, "lora", added=2), tmp_path / "more")
    other = shutil.copytree(base, tmp_path / "other")
    cases: list[tuple[Any, dict[str, Any], str]] = [
        (base, {"adapters": {"a": folder}, "use": "b"}, "there is no adapter b. Adapters: a"),
        (folder, {"use": "a"}, "use: chooses among several adapters"),
        (folder, {"adapters": {"default": folder}}, "Use another name"),
        (other, {"adapters": {"a": folder}}, f"was trained on {base}, not on {other}"),
        (folder, {"adapters": {"more": more}}, "different numbers of token embeddings"),
    ]
    for run, options, message in cases:
        with pytest.raises(RecipeError, match=message.replace("(", r"\(")):
            api.generate(run, PROMPT, **options)
    with pytest.raises(CheckpointError, match="there is no model"):
        api.generate(base, PROMPT, adapters={"a": tmp_path / "nothing"})
    with pytest.raises(RecipeError, match="expected NAME=DIR"):
        command.generate(base, PROMPT, adapter=["nothing"])


def test_a_missing_base(base: Path, tmp_path: Path) -> None:
    folder = export(*adapted(base, "lora"), tmp_path / "lora")
    expected = api.generate(folder, PROMPT, max_new_tokens=4, temperature=0)
    file = folder / "adapter_config.json"
    gone = str(tmp_path / "gone")
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": gone}))
    with pytest.raises(RecipeError, match=f"its base {gone} does not exist"):
        api.generate(folder, PROMPT)
    assert api.generate(base, PROMPT, adapters={"a": folder}, max_new_tokens=4, temperature=0) == expected


def test_what_the_task_has_set_in_the_network(base: Path, tmp_path: Path) -> None:
    """The end token of a chat, the prefix of sources, labels and padding, which are in no file of peft."""
    model, tokenizer = adapted(base, "lora", added=1)
    network = model.get_base_model()
    network.generation_config.eos_token_id = [5, 6]
    network.config.update({"pad_token_id": len(tokenizer) - 1, "task_specific_params": {"ptft": {"prefix": "sort: "}}})
    network.config.id2label = {0: "animal", 1: "thing", 2: "none"}
    export(model, tokenizer, tmp_path)
    read = load_adapters({"a": read_adapter(tmp_path)}, "a", torch.float32).get_base_model()
    assert read.generation_config.eos_token_id == [5, 6]
    assert (read.config.pad_token_id, read.config.num_labels) == (len(tokenizer) - 1, 3)
    assert read.config.id2label[2] == "none"
    assert source_prefix(read.config) == "sort: "


def test_the_section_for_reading_an_adapter(base: Path, tmp_path: Path) -> None:
    folder = export(*adapted(base, "lora"), tmp_path)
    section = ModelSection(path="elsewhere", new_head=True, adapt=AdaptSection(lora={}))
    read = reading_section(section, str(folder))
    assert (read.path, read.adapt.adapter, read.new_head) == (str(base), str(folder), True)
    model = load_adapter(AutoModelForCausalLM.from_pretrained(base), str(folder), trained=False)
    assert not any(parameter.requires_grad for parameter in model.parameters())
