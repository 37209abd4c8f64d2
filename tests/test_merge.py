"""`ptft merge`: expected weights are those of plain peft's merge_and_unload."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from test_adapter_directories import IDS, adapted, base, export, logits, plain_peft
from transformers import AutoModelForCausalLM, AutoTokenizer

from ptft_dist import api
from ptft_dist.cli import merge as command
from ptft_dist.errors import CheckpointError, RecipeError
from ptft_dist.networks.adapt import merging

__all__ = ["base"]  # the fixture


@pytest.mark.parametrize("method", ["lora", "dora", "pissa", "ia3", "adalora"])
def test_the_merged_weights_are_those_of_plain_peft(base: Path, tmp_path: Path, method: str) -> None:
    folder = export(*adapted(base, method), tmp_path / "adapter")
    expected = plain_peft(folder, base).merge_and_unload().state_dict()
    before = AutoModelForCausalLM.from_pretrained(base).state_dict()
    assert api.merge(folder, tmp_path / "merged") == tmp_path / "merged"
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(weight, expected[name], atol=1e-6, rtol=1e-5)
    assert any(not torch.equal(before[name], weight) for name, weight in model.state_dict().items())
    torch.testing.assert_close(logits(model.eval()), logits(plain_peft(folder, base)), atol=5e-5, rtol=1e-5)
    names = {path.name for path in (tmp_path / "merged").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= names
    assert "adapter_config.json" not in names


def test_a_merged_model_has_a_card(base: Path, tmp_path: Path) -> None:
    folder = export(*adapted(base, "lora"), tmp_path / "adapter")
    kept = "## Metrics\n\n| loss | 1.5 |\n\n## Recipe\n\nx\n"
    card = f"---\nlibrary_name: peft\n---\n# An adapter\n\n## Use\n\nPeftModel\n\n{kept}"
    for name, given in (("with", card), ("without", None)):
        (folder / "README.md").unlink(missing_ok=True)
        if given is not None:
            (folder / "README.md").write_text(given)
        text = (api.merge(folder, tmp_path / name) / "README.md").read_text()
        assert text.startswith("---\n# license: not set.")
        assert "library_name: transformers\n" in text
        assert f"# A model: an adapter merged into {base.name}\n" in text
        assert 'AutoModelForCausalLM.from_pretrained("DIRECTORY")' in text
        assert "PeftModel" not in text
        assert (kept in text) == (given is not None)


@pytest.mark.parametrize(("dtype", "eps"), [("bf16", 2**-7), ("fp16", 2**-10)])
def test_sixteen_bits_round_once(base: Path, tmp_path: Path, capsys: Any, dtype: str, eps: float) -> None:
    folder = export(*adapted(base, "lora"), tmp_path / "adapter")
    expected = plain_peft(folder, base).merge_and_unload().state_dict()
    command.merge(folder, tmp_path / "merged", dtype=dtype)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    for name, weight in model.state_dict().items():
        assert weight.dtype == {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
        rounded = expected[name].to(weight.dtype).float()
        torch.testing.assert_close(weight.float(), rounded, atol=1e-6, rtol=eps)
    printed = capsys.readouterr().err
    difference = float(re.search(r"largest difference of logits: (\S+) of", printed)[1])  # type: ignore[index]
    reference = logits(plain_peft(folder, base))
    assert 0 < difference < 16 * eps
    assert (logits(model.float()) - reference).abs().max() < 20 * difference * reference.abs().max()


def test_tokens_that_the_base_has_not(base: Path, tmp_path: Path) -> None:
    model, tokenizer = adapted(base, "lora", added=3)
    folder = export(model, tokenizer, tmp_path / "adapter")
    api.merge(folder, tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert merged.config.vocab_size == len(AutoTokenizer.from_pretrained(tmp_path / "merged")) == len(tokenizer)
    ids = torch.tensor([[len(tokenizer) - 1, 8, len(tokenizer) - 3]])
    torch.testing.assert_close(logits(merged, ids), logits(model, ids), atol=5e-5, rtol=1e-5)


def test_a_merged_model_that_differs_is_not_left(base: Path, tmp_path: Path, monkeypatch: Any) -> None:
    folder = export(*adapted(base, "lora"), tmp_path / "adapter")
    write = merging.write_model

    def wrong(content: Any, state: dict[str, torch.Tensor], target: Path) -> None:
        name = "model.layers.1.mlp.up_proj.weight"
        write(content, {**state, name: state[name] * 1.001}, target)

    monkeypatch.setattr(merging, "write_model", wrong)
    with pytest.raises(RecipeError, match=r"logits by .* of the largest logit; the tolerance for fp32 is 1.4e-05"):
        api.merge(folder, tmp_path / "merged")
    assert {path.name for path in tmp_path.iterdir()} == {"adapter"}


@pytest.mark.parametrize("method", ["prompt_tuning", "prefix_tuning", "bottleneck"])
def test_what_cannot_be_merged(base: Path, tmp_path: Path, method: str) -> None:
    folder = export(*adapted(base, method), tmp_path / "adapter")
    with pytest.raises(RecipeError, match="so it cannot be merged"):
        api.merge(folder, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"lora_bias": True}, "peft cannot merge it: Impossible to merge LoRA with `lora_bias=True`"),
        ({"layer_replication": [[0, 2], [0, 2]]}, "LORA repeats layers of the base, which no weight of the base can"),
    ],
    ids=str,
)
def test_options_of_peft_that_cannot_be_merged(base: Path, tmp_path: Path, options: Any, said: str) -> None:
    lora = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], **options)
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), lora).save_pretrained(tmp_path / "adapter")
    with pytest.raises(RecipeError, match=said):
        api.merge(tmp_path / "adapter", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_what_is_wrong_is_said(base: Path, tmp_path: Path) -> None:
    folder = export(*adapted(base, "lora"), tmp_path / "adapter")
    full = tmp_path / "full"
    full.mkdir()
    (full / "file").touch()
    with pytest.raises(RecipeError, match="already exists and is not empty"):
        api.merge(folder, full)
    with pytest.raises(RecipeError, match="contains a complete model and no adapter"):
        api.merge(base, tmp_path / "merged")
    with pytest.raises(CheckpointError, match="there is no adapter"):
        api.merge(tmp_path / "nothing", tmp_path / "merged")
    with pytest.raises(RecipeError, match="expected fp32, bf16 or fp16, got 'int8'"):
        api.merge(folder, tmp_path / "merged", dtype="int8")
    shutil.copytree(folder, tmp_path / "lost")
    file, gone = tmp_path / "lost/adapter_config.json", tmp_path / "gone"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": str(gone)}))
    with pytest.raises(RecipeError, match=f"its base {gone} does not exist"):
        api.merge(tmp_path / "lost", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    assert IDS.shape[0] == 3
