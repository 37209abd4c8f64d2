"""Frozen networks that cannot be used, and offloading them, which is refused where it would have no effect."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from test_adapter_directories import adapted, base, export
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from ptft_dist.config.recipe import ModelSection
from ptft_dist.errors import RecipeError
from ptft_dist.networks.frozen import FrozenSource, frozen_source, read_digests
from ptft_dist.session.frozen_networks import FrozenNetworks
from ptft_dist.tasks.protocol import FrozenRole

__all__ = ["base"]  # the fixture

TEACHER = FrozenRole("distillation.teacher", "runs/teacher/model", None, AutoModelForCausalLM)
SHARED = FrozenRole("ppo.rewards.0.model", "runs/reward/model", None, AutoModelForCausalLM, True)
GPU, CPU = torch.device("cuda", 0), torch.device("cpu")


@pytest.mark.parametrize(
    ("roles", "kind", "device", "says"),
    [
        ({}, "single", GPU, "this recipe has no frozen network, so it has no effect; remove it"),
        ({"reward": SHARED}, "ddp", GPU, "this recipe has no frozen network"),
        ({"teacher": TEACHER}, "zero3", GPU, "zero3 shards frozen networks; offload the shards in its launch config"),
        ({"teacher": TEACHER}, "fsdp2", GPU, "fsdp2 shards frozen networks"),
        ({"teacher": TEACHER}, "ddp", CPU, "it needs a GPU"),
    ],
)
def test_where_it_has_no_effect(roles: dict[str, Any], kind: str, device: torch.device, says: str) -> None:
    with pytest.raises(RecipeError, match=f"^train.offload_frozen: {says}"):
        FrozenNetworks(roles, {}, offload=True).check(kind, device)
    FrozenNetworks(roles, {}, offload=False).check(kind, device)


@pytest.mark.parametrize("kind", ["single", "ddp", "zero1", "zero2"])
def test_where_it_has_one(kind: str) -> None:
    FrozenNetworks({"teacher": TEACHER, "reward": SHARED}, {}, offload=True).check(kind, GPU)


@pytest.mark.parametrize("method", ["bottleneck", "prompt_tuning"])
def test_a_teacher_that_cannot_be_merged_is_refused_when_the_recipe_is_read(
    base: Path, tmp_path: Path, method: str
) -> None:
    export(*adapted(base, method), tmp_path / "teacher")
    section = ModelSection(path=str(base))
    with pytest.raises(RecipeError, match=r"^distillation\.teacher: .*cannot be merged.* lora"):
        frozen_source("distillation.teacher", "teacher", None, section, tmp_path)
    export(*adapted(base, "lora"), tmp_path / "mergeable")
    frozen_source("distillation.teacher", "mergeable", None, section, tmp_path)


def test_in_bf16_it_computes_what_transformers_computes(tmp_path: Path) -> None:
    """Weights are rounded, and the frequencies of rotary positions are not."""
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 512}
    torch.manual_seed(0)
    network = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=64, **sizes))
    network.save_pretrained(tmp_path)
    found = FrozenSource("teacher", ModelSection(path=str(tmp_path))).load(AutoModelForCausalLM, torch.bfloat16)
    expected = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    ids = torch.randint(64, (1, 512))
    with torch.no_grad():
        assert torch.equal(found(ids).logits, expected(ids).logits)


def test_another_base_below_an_adapter_is_another_teacher(base: Path, tmp_path: Path) -> None:
    """A run that is resumed would otherwise learn from another network without a word."""
    copied = Path(shutil.copytree(base, tmp_path / "base"))
    section = ModelSection(path=str(export(*adapted(copied, "lora"), tmp_path / "teacher")))
    before = FrozenSource("teacher", section).identity(read_digests)
    assert FrozenSource("teacher", section).identity(read_digests) == before
    LlamaForCausalLM(LlamaForCausalLM.from_pretrained(copied).config).save_pretrained(copied)
    assert FrozenSource("teacher", section).identity(read_digests) != before
