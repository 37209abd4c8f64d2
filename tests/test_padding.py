"""Networks whose outputs depend on padding are refused before training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from prepare_support import prepare
from support import start
from task_support import for_model, make_task
from test_classification import CONFIGS, ROLES, SIZES, TEXTS, encoded, keys, made, recipe, tokenizer
from tiny import write_tiny
from tokenizers.processors import TemplateProcessing

from ptft_dist.api import load_recipe
from ptft_dist.data.tokenizer import load_tokenizer
from ptft_dist.errors import RecipeError
from ptft_dist.networks.load import build_config, build_model
from ptft_dist.tasks.protocol import TaskSetup

XLNET_SIZES = {"d_model": 32, "d_inner": 64, "n_layer": 2, "n_head": 2}


@pytest.mark.parametrize(
    ("kind", "sizes", "refused"),
    [
        ("bert", SIZES, False),
        ("modernbert", SIZES, False),
        ("gpt2", CONFIGS["gpt2"], False),
        ("t5", {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2}, False),
        ("xlnet", {**XLNET_SIZES, "summary_type": "first"}, False),
        ("xlnet", XLNET_SIZES, True),  # summary_type: last, the last column
        ("xlnet", {**XLNET_SIZES, "summary_type": "mean"}, True),
        ("fnet", {"hidden_size": 32, "intermediate_size": 64}, True),  # takes no attention_mask, and does not say so
    ],
)
def test_a_network_that_reads_padding_is_refused(
    monkeypatch: pytest.MonkeyPatch, kind: str, sizes: dict[str, Any], refused: bool
) -> None:
    monkeypatch.setitem(CONFIGS, kind, sizes)
    ours = recipe(kind)
    words = tokenizer(("eos", "pad") if kind in ("gpt2", "t5") else ROLES)
    if kind == "t5":
        words.backend_tokenizer.post_processor = TemplateProcessing(
            single="$A <|endoftext|>", special_tokens=[("<|endoftext|>", words.eos_token_id)]
        )
    rows = encoded(ours, words, [{"text": text, "label": "thing"} for text in TEXTS])
    task, model = made(ours, words)
    with torch.no_grad():
        together = task.loss(model, task.collate(rows, keys(12)).inputs).predictions
        alone = torch.cat([task.loss(model, task.collate([row], keys(1)).inputs).predictions for row in rows])
    assert torch.allclose(together, alone, rtol=1e-4, atol=1e-5) != refused
    probe = task.probe()
    assert probe is not None
    with torch.no_grad():
        outputs = probe.outputs(model, probe.inputs)
    if refused:
        with pytest.raises(RecipeError, match=r"depend on its padding.*summary_type: first"):
            probe.check(outputs)
    else:
        probe.check(outputs)


@pytest.mark.parametrize("kind", ["convbert", "nystromformer", "yoso", "big_bird"])
def test_networks_known_to_read_padding_are_refused(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setitem(CONFIGS, kind, SIZES | ({"embedding_size": 32} if kind == "convbert" else {}))
    with pytest.raises(RecipeError, match="original_full" if kind == "big_bird" else f"a {kind} network reads padding"):
        made(recipe(kind), tokenizer())


def test_the_run_asks(tmp_path: Path, cache: Path) -> None:
    path = write_tiny(tmp_path, "classification")
    raw = json.loads(path.read_text())
    raw["model"] = {"config": {"model_type": "fnet", "hidden_size": 32, "intermediate_size": 64}}
    path.write_text(json.dumps(raw))
    ended = start("train", "recipe.yaml", cwd=tmp_path, cache=cache)
    assert ended.wait() == 2, ended.stderr
    assert "depend on its padding" in ended.stderr


@pytest.mark.parametrize("kind", ["token_classification", "question_answering"])
@pytest.mark.parametrize("network", ["bert", "fnet", "canine"])
def test_outputs_of_every_token(tmp_path: Path, kind: str, network: str) -> None:
    """Also of networks whose first token alone is not moved by padding."""
    path = write_tiny(tmp_path, kind, data={"cache_dir": "cache"})
    raw = json.loads(path.read_text())
    raw["model"] = {"config": {"model_type": network, **(SIZES | {"max_position_embeddings": 64})}}
    if network == "fnet":
        del raw["model"]["config"]["num_attention_heads"]
    path.write_text(json.dumps(raw))
    loaded = load_recipe(str(path))
    ours, prepared = loaded.recipe, prepare(loaded.recipe, loaded.base)
    words = load_tokenizer(prepared.tokenizer_path)
    task = make_task(ours, words, prepared.survey)
    config = build_config(ours.model, words, 32, type(task).config_settings(TaskSetup.of(ours, words, prepared.survey)))
    model = build_model(ours.model, config, 0, task.auto_class).eval()
    task = for_model(task, model)
    probe = task.probe()
    with torch.no_grad():
        outputs = probe.outputs(model, probe.inputs)
    assert outputs.shape[:2] == (2, 4)
    assert outputs.ndim == 4
    if network == "bert":
        probe.check(outputs)
    else:
        with pytest.raises(RecipeError, match="depend on its padding"):
            probe.check(outputs)
