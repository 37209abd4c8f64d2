"""P1 and P2 for the methods of adapting a network, as test_tasks.py for the tasks."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapt_support import METHODS, write_adapted, write_base
from safetensors.torch import load_file
from support import eval_rows, outcome, start, train_rows

RUNS = {"ddp": (2, "cpu"), "zero2": (2, "cpu_zero2"), "zero3": (2, "cpu_zero3"), "fsdp2": (2, "fsdp2")}
PROMISED = ("lora", "qlora", "bitfit", "prompt_tuning", "bottleneck", "adalora")
CASES = [(method, name) for method in PROMISED for name in RUNS]
CASES += [(method, "zero3") for method in ("dora", "pissa", "ia3", "last_layers")]
CASES += [("eva", "ddp")]
TRAIN: dict[str, Any] = {"train": {"max_steps": 4}, "save": {"every": 2}, "eval": {"every": 2}}
TRAIN["batch"] = {"micro_size": 6}  # one micro-batch for each of two ranks


SEVERAL_LAYERS = ("last_layers", "adalora")  # methods that treat layers differently


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    """A network of one layer."""
    return write_base(tmp_path_factory.mktemp("base"), cache, "classification", layers=1)


@pytest.fixture(scope="module")
def base_of(tmp_path_factory: pytest.TempPathFactory, cache: Path, base: Path) -> Callable[[str], Path]:
    """The network that a method adapts."""
    deep = functools.cache(lambda: write_base(tmp_path_factory.mktemp("deep"), cache, "classification"))
    return lambda method: deep() if method in SEVERAL_LAYERS else base


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, cache: Path, base_of: Callable[[str], Path]) -> Any:
    """The run of one process, which is started once for each method."""
    folders: dict[str, Path] = {}

    def provide(method: str) -> Path:
        if method not in folders:
            folder = tmp_path_factory.mktemp(method)
            write_adapted(folder, base_of(method), "classification", METHODS[method], **TRAIN)
            run = start("train", "recipe.yaml", cwd=folder, cache=cache)
            assert run.wait() == 0, run.stderr
            folders[method] = folder / "run"
        return folders[method]

    return provide


@pytest.mark.parametrize(("method", "name"), CASES)
def test_any_split_has_the_same_losses_and_a_killed_run_goes_on_exactly(
    tmp_path: Path, cache: Path, base_of: Callable[[str], Path], whole: Any, method: str, name: str
) -> None:
    """The run is ended after its last save but one, and goes on from there with the same bits."""
    ranks, kind = RUNS[name]
    place: dict[str, Any] = {"cwd": tmp_path, "cache": cache, "ranks": ranks, "kind": kind}
    write_adapted(tmp_path, base_of(method), "classification", METHODS[method], **TRAIN)
    first = start("train", "recipe.yaml", **place)
    assert first.wait() == 0, first.stderr
    reference, run_dir = whole(method), tmp_path / "run"
    for ours, expected in zip(train_rows(run_dir), train_rows(reference), strict=True):
        assert ours["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert ours["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)
    assert eval_rows(run_dir)[-1]["eval/loss"] == pytest.approx(eval_rows(reference)[-1]["eval/loss"], rel=1e-5)

    expected_outcome = outcome(run_dir)
    shutil.rmtree(run_dir / "checkpoints/step-00000004")
    shutil.rmtree(run_dir / "model")
    again = start("train", "recipe.yaml", **place)
    assert again.wait() == 0, again.stderr
    assert "resumed from" in again.stderr
    assert outcome(run_dir) == expected_outcome


@pytest.mark.parametrize(
    ("precision", "sharded"), [("fp32", "cpu_zero3"), ("fp32", "fsdp2_efficient"), ("bf16", "cpu_zero2")]
)
def test_adalora_keeps_the_same_ranks_however_matrices_are_sharded(
    tmp_path: Path, cache: Path, base: Path, precision: str, sharded: str
) -> None:
    """The exported ranks and singular values; in bf16 the averages of importance stay in fp32."""
    patterns, values = [], []
    for folder, (ranks, kind) in (("one", (1, "cpu")), ("two", (3, sharded))):
        changes: dict[str, Any] = {
            "train": {"max_steps": 6, "precision": precision},
            "save": {"every": 6},
            "optim": {"max_grad_norm": 0.05},
            "batch": {"global_size": 12, "micro_size": 2},
        }
        place = tmp_path / folder
        place.mkdir()
        write_adapted(place, base, "classification", METHODS["adalora"], **changes)
        run = start("train", "recipe.yaml", cwd=place, cache=cache, ranks=ranks, kind=kind)
        assert run.wait() == 0, run.stderr
        patterns.append(json.loads((place / "run/model/adapter_config.json").read_text())["rank_pattern"])
        state = load_file(place / "run/model/adapter_model.safetensors")
        values.append({key: tensor for key, tensor in state.items() if "lora_E" in key})
    assert 0 < sum(map(sum, patterns[0].values())) < sum(map(len, patterns[0].values()))
    if precision == "fp32":
        assert patterns[1] == patterns[0]
        for key, value in values[0].items():
            torch.testing.assert_close(values[1][key], value, rtol=1e-3, atol=1e-6)
    else:
        (file,) = (tmp_path / "two/run").glob("checkpoints/*/deepspeed/mp_rank_00_model_states.pt")
        module = torch.load(file, weights_only=False)["module"]
        buffers = {key: tensor for key, tensor in module.items() if key.endswith(("_importance", "_uncertainty"))}
        assert {tensor.dtype for tensor in buffers.values()} == {torch.float32}
        assert any(not tensor.equal(tensor.bfloat16().float()) for tensor in buffers.values())


BESIDE: list[dict[str, Any]] = [{"lora": {"r": 4}, "embeddings": "all"}, {"peft": {"type": "vera", "r": 4}}]


@pytest.mark.parametrize("model", BESIDE, ids=str)
def test_what_is_trained_beside_the_adapters_is_exported(tmp_path: Path, cache: Path, model: dict[str, Any]) -> None:
    """The whole table of embeddings with the head, and matrices that all layers share, under ZeRO-3."""
    base = write_base(tmp_path / "base", cache, "clm", layers=1)
    states = []
    for name, ranks, kind in (("one", 1, "cpu"), ("zero3", 2, "cpu_zero3")):
        write_adapted(tmp_path / name, base, "clm", {"adapt": model}, **TRAIN)
        run = start("train", "recipe.yaml", cwd=tmp_path / name, cache=cache, ranks=ranks, kind=kind)
        assert run.wait() == 0, run.stderr
        states.append(load_file(tmp_path / name / "run/model/adapter_model.safetensors"))
    assert states[0].keys() == states[1].keys()
    assert any("embed_tokens" in name or "vera_A" in name for name in states[0])
    start_table = load_file(base / "model.safetensors")["model.embed_tokens.weight"]
    assert not any("embed_tokens" in name and tensor.equal(start_table) for name, tensor in states[0].items())
    for name, tensor in states[0].items():
        torch.testing.assert_close(states[1][name], tensor, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("quantize", [{"type": "nf4"}, {"type": "int8"}, {"type": "nf4", "storage_dtype": "bf16"}])
def test_what_fsdp2_cannot_shard_is_refused(tmp_path: Path, cache: Path, base: Path, quantize: dict[str, Any]) -> None:
    write_adapted(tmp_path, base, "classification", {"adapt": "lora", "quantize": quantize})
    run = start("train", "recipe.yaml", cwd=tmp_path, cache=cache, ranks=2, kind="fsdp2")
    assert run.wait() == 2
    assert "FSDP2 cannot shard" in run.stderr
    assert "storage_dtype: fp32" in run.stderr


def test_a_quantized_base_that_fsdp2_cannot_export_is_refused(tmp_path: Path, cache: Path, base: Path) -> None:
    model = {"adapt": "bitfit", "quantize": {"type": "nf4", "storage_dtype": "fp32"}}
    write_adapted(tmp_path, base, "classification", model)
    run = start("train", "recipe.yaml", cwd=tmp_path, cache=cache, ranks=2, kind="fsdp2")
    assert run.wait() == 2
    assert "model.quantize: with model.adapt: bitfit the quantized weights are exported too" in run.stderr


@pytest.mark.parametrize("name", ["ddp", "zero3", "fsdp2"])
def test_a_base_in_16_bits_under_an_adapter_in_fp32(tmp_path: Path, cache: Path, base: Path, name: str) -> None:
    """Without sharding the same losses; ZeRO keeps trained weights in bf16 too, with fp32 copies in the optimizer."""
    losses = []
    for folder, (ranks, kind) in (("one", (1, "cpu")), ("two", RUNS[name])):
        (tmp_path / folder).mkdir()
        changes: dict[str, Any] = {"train": {"max_steps": 3, "precision": "bf16"}, "save": {"every": None}}
        model = {"adapt": {"lora": {"r": 4}}, "dtype": "bf16"}
        write_adapted(tmp_path / folder, base, "classification", model, **changes)
        run = start("train", "recipe.yaml", cwd=tmp_path / folder, cache=cache, ranks=ranks, kind=kind)
        assert run.wait() == 0, run.stderr
        losses.append([row["loss"] for row in train_rows(tmp_path / folder / "run")])
    assert losses[1] == pytest.approx(losses[0], rel=5e-3)


@pytest.mark.parametrize("task", ["reward", "dpo"])
def test_preferences_with_a_quantized_base_under_fsdp2(tmp_path: Path, cache: Path, task: str) -> None:
    """A head of one score is trained beside the adapter of a base whose quantized weights are sharded."""
    base = write_base(tmp_path / "base", cache, "sft", layers=1)
    seen = {}
    for name, ranks, kind in (("one", 1, "cpu"), ("fsdp2", 2, "fsdp2")):
        write_adapted(tmp_path / name, base, task, METHODS["qlora"], **TRAIN)
        run = start("train", "recipe.yaml", cwd=tmp_path / name, cache=cache, ranks=ranks, kind=kind)
        assert run.wait() == 0, run.stderr
        seen[name] = [row["loss"] for row in train_rows(tmp_path / name / "run")]
    assert seen["fsdp2"] == pytest.approx(seen["one"], rel=1e-5)
    assert seen["one"][-1] != seen["one"][0]
