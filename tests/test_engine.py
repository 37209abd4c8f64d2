"""The engine in one process: updates, contents of checkpoints, and refused settings."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from ptft_dist.config.recipe import OptimSection
from ptft_dist.engine import Engine, complete_deepspeed_config, reset_accelerate, why_not_loadable
from ptft_dist.engine.loss_module import LossModule
from ptft_dist.engine.parameters import persistent_buffers, require_tied, tied_groups
from ptft_dist.engine.state import write_parts, write_tensors
from ptft_dist.errors import CheckpointError, RecipeError


def llama(tied: bool = False, seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    config = LlamaConfig(vocab_size=50, num_attention_heads=2, tie_word_embeddings=tied, **sizes)
    return LlamaForCausalLM(config)


def cross_entropy(model: Any, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor]:
    logits = model(input_ids=inputs["ids"]).logits
    return (nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), inputs["ids"][:, 1:].flatten()),)


def rows(seed: int) -> dict[str, torch.Tensor]:
    return {"ids": torch.randint(0, 50, (2, 7), generator=torch.Generator().manual_seed(seed))}


def section(**settings: Any) -> OptimSection:
    return OptimSection.model_validate({"name": "adamw", "lr": 0.01, "max_grad_norm": 1.0} | settings)


def update(engine: Engine, step: int, scale: float = 1.0) -> float:
    with engine.micro_batch(last=True):
        (loss,) = engine.forward(cross_entropy, rows(step))
        engine.backward(scale * loss)
    engine.clip_gradients()
    engine.step(0.01)
    return loss.item()


@pytest.fixture
def engine() -> Iterator[Engine]:
    yield Engine("fp32", None)
    reset_accelerate()


# --- updates and sums -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [None, 0.5])
def test_max_grad_norm_null_does_not_clip(engine: Engine, limit: float | None) -> None:
    """SGD changes weights by lr x gradient, or with clipping by lr x gradient x limit / norm."""
    engine.prepare(llama(), section(name="sgd", weight_decay=0.0, max_grad_norm=limit))
    reference = llama()
    (100 * cross_entropy(reference, rows(0))[0]).backward()
    gradients = {name: p.grad for name, p in reference.named_parameters()}
    norm = torch.stack([g.square().sum() for g in gradients.values() if g is not None]).sum().sqrt()
    assert norm > 10
    before = {name: p.detach().clone() for name, p in engine.model.named_parameters()}
    update(engine, 0, scale=100)
    factor = 1.0 if limit is None else limit / float(norm)
    for name, p in engine.model.named_parameters():
        torch.testing.assert_close(before[name] - p.detach(), 0.01 * factor * gradients[name], rtol=1e-3, atol=1e-6)


def test_a_deepspeed_config_without_limit_does_not_clip() -> None:
    launch = {"zero_optimization": {"stage": 2}}
    assert complete_deepspeed_config(launch, "fp32", None, 1, 1)["gradient_clipping"] == 0.0
    assert complete_deepspeed_config(launch, "fp32", 0.3, 1, 1)["gradient_clipping"] == 0.3


def test_counts_are_summed_exactly(engine: Engine) -> None:
    """2**24 + 1 is the first whole number that fp32 has not."""
    assert engine.all_sum(2**24 + 1.0, torch.tensor(2.5), 2**53 - 1.0).tolist() == [2**24 + 1, 2.5, 2**53 - 1]


def test_every_process_is_a_data_parallel_rank(engine: Engine) -> None:
    assert (engine.dp_rank, engine.dp_size) == (engine.rank, engine.world_size) == (0, 1)


# --- the network ------------------------------------------------------------------------------------------------------


def test_what_libraries_ask_of_a_network_is_passed_on() -> None:
    model = llama(tied=True)
    module = LossModule(model)
    assert module.get_input_embeddings() is model.model.embed_tokens
    assert module.get_output_embeddings() is model.lm_head
    assert getattr(module, module.base_model_prefix) is model.model
    assert not module.is_gradient_checkpointing
    model.gradient_checkpointing_enable()
    assert module.is_gradient_checkpointing
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    module.tie_weights()
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_lost_tie_is_an_error_that_names_both() -> None:
    model = llama(tied=True)
    groups = tied_groups(model)
    assert groups == [["model.embed_tokens.weight", "lm_head.weight"]]
    require_tied(model, groups, "fsdp2")
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    with pytest.raises(RecipeError, match=r"fsdp2 untied .* model\.embed_tokens\.weight, lm_head\.weight"):
        require_tied(model, groups, "fsdp2")


def test_a_backend_that_unties_is_refused(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare = engine.accelerator.prepare

    def untie(module: LossModule, optimizer: Any) -> Any:
        module.model.lm_head.weight = nn.Parameter(module.model.lm_head.weight.detach().clone())
        return prepare(module, optimizer)

    monkeypatch.setattr(engine.accelerator, "prepare", untie)
    with pytest.raises(RecipeError, match="would be trained separately"):
        engine.prepare(llama(tied=True), section())


@pytest.mark.parametrize("name", ["adamw_8bit", "paged_adamw", "paged_adamw_8bit"])
def test_optimizers_of_bitsandbytes_are_refused_under_fsdp2(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(engine, "kind", "fsdp2")
    with pytest.raises(RecipeError, match=f"optim.name: {name} cannot update the shards of fsdp2; use adamw"):
        engine.prepare(llama(), section(name=name))


def test_a_network_without_trained_parameters_is_refused(engine: Engine) -> None:
    model = llama()
    model.requires_grad_(False)
    with pytest.raises(RecipeError, match="nothing is trained"):
        engine.prepare(model, section())


# --- what a checkpoint holds ------------------------------------------------------------------------------------------


def half_frozen(**settings: Any) -> LlamaForCausalLM:
    """A network whose first layer and embedding are frozen."""
    model = llama(**settings)
    model.model.embed_tokens.requires_grad_(False)
    model.model.layers[0].requires_grad_(False)
    return model


def test_only_what_is_trained_is_stored_and_counted(engine: Engine, tmp_path: Path) -> None:
    engine.prepare(half_frozen(), section())
    layer = 4 * 16 * 16 + 3 * 16 * 32 + 2 * 16
    assert engine.trained_count == layer + 16 + 50 * 16
    assert engine.parameter_count == engine.trained_count + layer + 50 * 16
    assert 12 * engine.trained_count < engine.state_bytes() < 12 * engine.trained_count + 2**21
    update(engine, 0)
    files = engine.save_state(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert sorted(stored) == sorted(engine.trainable_names)
    assert not [name for name in stored if "layers.0." in name or "embed" in name]
    assert sum(t.numel() for t in stored.values()) == engine.trained_count
    for name, facts in files.items():
        raw = (tmp_path / name).read_bytes()
        assert facts == {"bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
    assert sorted(files) == sorted(path.name for path in tmp_path.iterdir())


def test_buffers_are_stored_unless_they_are_made_anew() -> None:
    module = nn.Sequential(nn.BatchNorm1d(2))
    module[0].register_buffer("scratch", torch.zeros(1), persistent=False)
    assert sorted(persistent_buffers(module)) == ["0.num_batches_tracked", "0.running_mean", "0.running_var"]


CHANGES = {
    "missing": (lambda t: t.pop("model.norm.weight"), "missing: model.norm.weight"),
    "not trained": (lambda t: t.update(other=torch.zeros(1)), "not trained by this run: other"),
    "another shape": (
        lambda t: t.update({"model.norm.weight": torch.zeros(1)}),
        "of another shape: model.norm.weight",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_state_of_other_parameters_is_refused(engine: Engine, tmp_path: Path, change: str) -> None:
    engine.prepare(half_frozen(), section())
    engine.save_state(tmp_path)
    edit, said = CHANGES[change]
    stored = load_file(tmp_path / "model.safetensors")
    edit(stored)
    save_file(stored, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"{said}"):
        engine.load_state(tmp_path)


def test_either_name_of_a_tied_parameter_is_loaded(engine: Engine, tmp_path: Path) -> None:
    """Checkpoints of earlier versions store the head, or both."""
    engine.prepare(llama(tied=True), section())
    update(engine, 0)
    engine.save_state(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    embedding = stored.pop("model.embed_tokens.weight")
    assert "lm_head.weight" not in stored
    for names in (["lm_head.weight"], ["lm_head.weight", "model.embed_tokens.weight"]):
        save_file(stored | {name: embedding.clone() for name in names}, tmp_path / "model.safetensors")
        with torch.no_grad():
            engine.model.lm_head.weight.zero_()
        engine.load_state(tmp_path)
        assert torch.equal(engine.model.lm_head.weight, embedding)
        assert engine.model.lm_head.weight is engine.model.model.embed_tokens.weight


# --- files ------------------------------------------------------------------------------------------------------------


def test_tensors_are_read_back_by_safetensors(tmp_path: Path) -> None:
    tensors = {
        "matrix": torch.arange(6.0).reshape(2, 3).t(),  # not contiguous
        "half": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
        "scalar": torch.tensor(3, dtype=torch.int64),
        "nothing": torch.empty(0, 4),
        "truth": torch.tensor([True, False, True]),
        "bytes": torch.arange(5, dtype=torch.uint8),
    }
    tensors["again"] = tensors["matrix"]
    write_tensors(tmp_path / "a.safetensors", tensors)
    read = load_file(tmp_path / "a.safetensors")
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor)


def test_a_file_is_flushed_to_the_disk_before_its_hash_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.fstat(descriptor).st_size))
    files = write_parts(tmp_path / "a", iter([b"one", b"two"]))
    assert synced == [6]
    assert files == {"a": {"bytes": 6, "sha256": hashlib.sha256(b"onetwo").hexdigest()}}


# --- which state can be loaded ----------------------------------------------------------------------------------------

LOADABLE = [
    ("single", 1, "ddp", 4),
    ("ddp", 4, "single", 1),
    ("fsdp2", 2, "fsdp2", 8),
    ("zero2", 2, "zero2", 2),
    ("zero3", 1, "zero3", 1),
]
NOT_LOADABLE = [("zero2", 2, "zero2", 3), ("zero2", 2, "zero3", 2), ("fsdp2", 2, "ddp", 2), ("ddp", 2, "zero1", 2)]


@pytest.mark.parametrize("case", LOADABLE)
def test_state_that_can_be_loaded(case: tuple[str, int, str, int]) -> None:
    assert why_not_loadable(*case) is None


@pytest.mark.parametrize("case", NOT_LOADABLE)
def test_state_that_cannot_be_loaded(case: tuple[str, int, str, int]) -> None:
    saved_kind, saved_ranks, kind, ranks = case
    reason = why_not_loadable(*case)
    assert reason is not None
    assert f"contains the state of {saved_ranks} processes under {saved_kind}" in reason
    assert f"this run has {ranks} under {kind}" in reason


def test_weights_of_a_mapped_file_are_aligned(engine: Engine, tmp_path: Path) -> None:
    """A network that is read again computes the bits of the one that was trained."""
    trained = llama().eval()
    trained.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    raw = file.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    padding = -(8 + size) % 64 + 8  # the tensors begin 8 bytes after a multiple of 64
    file.write_bytes((size + padding).to_bytes(8, "little") + raw[8 : 8 + size] + b" " * padding + raw[8 + size :])
    again = LlamaForCausalLM.from_pretrained(tmp_path).eval()
    assert {parameter.data_ptr() % 64 for parameter in again.parameters()} == {8}
    engine.prepare_reading(again)
    assert {parameter.data_ptr() % 64 for parameter in again.parameters()} == {0}
    with torch.no_grad():
        assert cross_entropy(again, rows(0))[0].equal(cross_entropy(trained, rows(0))[0])
