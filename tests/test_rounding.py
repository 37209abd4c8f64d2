"""What remains of a training in weights that are rounded. Expected values are computed number by number."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import start
from test_adapter_directories import adapted, base, export
from tiny import LLAMA, write_tiny
from transformers import AutoConfig, AutoModelForCausalLM

from ptft_dist import api
from ptft_dist.config.recipe import ModelSection
from ptft_dist.networks import rounding
from ptft_dist.networks.rounding import kept_change, little_kept

__all__ = ["base"]  # the fixture

SAYS = "of what the training has changed in the weights"


def start_weights(folder: Path, names: tuple[str, ...] = ("a", "b")) -> dict[str, torch.Tensor]:
    """Weights in bf16 in a file of this folder."""
    torch.manual_seed(0)
    weights = {name: torch.randn(40, 50).bfloat16() for name in names}
    folder.mkdir(exist_ok=True)
    save_file(weights, folder / "model.safetensors")
    return weights


def moved(weights: dict[str, torch.Tensor], by: float) -> dict[str, torch.Tensor]:
    return {name: x.float() + by * torch.randn(x.shape) for name, x in weights.items()}


def by_hand(weights: dict[str, torch.Tensor], trained: dict[str, torch.Tensor], dtype: torch.dtype) -> float:
    kept = whole = 0.0
    for name, before in weights.items():
        after = trained[name].to(dtype).flatten().tolist()
        for old, new, stored in zip(before.flatten().tolist(), trained[name].flatten().tolist(), after, strict=True):
            kept += (stored - old) * (new - old)
            whole += (new - old) ** 2
    return kept / whole


@pytest.mark.parametrize(("by", "least", "most"), [(1e-5, 0.0, 0.1), (1e-3, 0.2, 0.9), (0.1, 0.99, 1.01)])
def test_it_is_the_share_of_the_change_that_is_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by: float, least: float, most: float
) -> None:
    monkeypatch.setattr(rounding, "CHUNK", 300)
    weights = start_weights(tmp_path)
    trained = moved(weights, by)
    kept = kept_change(ModelSection(path=str(tmp_path)), "model", trained, torch.bfloat16)
    assert kept == pytest.approx(by_hand(weights, trained, torch.bfloat16), rel=1e-6)
    assert kept is not None
    assert least <= kept <= most


def test_rounding_that_is_noise_keeps_all(tmp_path: Path) -> None:
    """A base in fp32 does not lie on the numbers of bf16, so as many changes are rounded up as down."""
    torch.manual_seed(0)
    weights = {"a": torch.randn(1000, 1000)}
    save_file(weights, tmp_path / "model.safetensors")
    trained = {"a": weights["a"] + 1e-4}
    kept = kept_change(ModelSection(path=str(tmp_path)), "model", trained, torch.bfloat16)
    assert kept == pytest.approx(1.0, abs=0.1)
    start_weights(tmp_path, ("a",))
    again = {"a": load_file(tmp_path / "model.safetensors")["a"].float() + 1e-4}
    assert (kept_change(ModelSection(path=str(tmp_path)), "model", again, torch.bfloat16) or 0.0) < 0.1


def test_names_without_the_prefix_and_weights_of_another_shape(tmp_path: Path) -> None:
    weights = start_weights(tmp_path)
    trained = {f"bert.{name}": x for name, x in moved(weights, 1e-3).items()}
    section = ModelSection(path=str(tmp_path))
    kept = kept_change(section, "bert", trained, torch.bfloat16)
    known = {name: trained[f"bert.{name}"] for name in weights}
    assert kept == pytest.approx(by_hand(weights, known, torch.bfloat16), rel=1e-6)
    grown = trained | {"bert.b": torch.cat([trained["bert.b"], torch.ones(3, 50)]), "head": torch.ones(2)}
    only = {"a": weights["a"]}
    assert kept_change(section, "bert", grown, torch.bfloat16) == pytest.approx(by_hand(only, known, torch.bfloat16))


def test_a_base_in_float8(tmp_path: Path) -> None:
    """Which has no arithmetic in PyTorch."""
    weights = {"a": start_weights(tmp_path, ("a",))["a"].to(torch.float8_e4m3fn)}
    save_file(weights, tmp_path / "model.safetensors")
    trained = {"a": weights["a"].float() + 1e-3}
    kept = kept_change(ModelSection(path=str(tmp_path)), "model", trained, torch.bfloat16)
    assert kept == pytest.approx(by_hand({"a": weights["a"].float()}, trained, torch.bfloat16), rel=1e-6)


def test_of_a_large_network_some_tensors_are_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = start_weights(tmp_path, tuple("abcdef"))
    trained = moved(weights, 1e-3)
    monkeypatch.setattr(rounding, "SAMPLED", 3 * 40 * 50)
    kept = kept_change(ModelSection(path=str(tmp_path)), "model", trained, torch.bfloat16)
    assert kept == pytest.approx(by_hand({name: weights[name] for name in "ace"}, trained, torch.bfloat16), rel=1e-6)


def test_where_nothing_is_known_nothing_is_said(tmp_path: Path) -> None:
    weights = start_weights(tmp_path / "base")
    section, trained = ModelSection(path=str(tmp_path / "base")), moved(weights, 1e-5)
    assert kept_change(section, "model", trained, torch.float32) is None
    assert kept_change(section, "model", {name: x.float() for name, x in weights.items()}, torch.bfloat16) is None
    assert kept_change(section, "model", {"other": torch.ones(3)}, torch.bfloat16) is None
    assert kept_change(ModelSection(path="nobody/nothing"), "model", trained, torch.bfloat16) is None
    (tmp_path / "base/model.safetensors").write_bytes(b"damaged")
    assert kept_change(section, "model", trained, torch.bfloat16) is None
    assert little_kept(None, torch.bfloat16, "") is little_kept(0.95, torch.bfloat16, "") is None
    assert str(little_kept(0.021, torch.bfloat16, "Do X")).startswith(f"bf16 keeps 2% {SAYS}: ")


@pytest.mark.parametrize(
    ("kind", "precision", "lr", "told"), [("cpu_zero2", "bf16", 1e-6, True), ("cpu", "fp32", 0.01, False)]
)
def test_a_run_says_that_its_export_has_lost_it(
    tmp_path: Path, cache: Path, kind: str, precision: str, lr: float, told: bool
) -> None:
    """The command that it names exports what was trained: under ZeRO the weights of its optimizer."""
    torch.manual_seed(0)
    network = AutoModelForCausalLM.from_config(AutoConfig.for_model(**{**LLAMA, "vocab_size": 320}))
    network.to(torch.bfloat16).save_pretrained(tmp_path / "source")
    changes = {"train": {"max_steps": 2, "precision": precision}, "sft": {"generation": None}, "optim": {"lr": lr}}
    recipe = write_tiny(tmp_path, "sft", **changes)
    values = json.loads(recipe.read_text())
    recipe.write_text(json.dumps({**values, "model": {"path": str(tmp_path / "source")}}))
    run = start("train", str(recipe), cwd=tmp_path, cache=cache, ranks=2, kind=kind)
    assert run.wait() == 0, run.stderr
    assert run.stderr.count(SAYS) == told
    if told:
        (named,) = re.findall(r"ptft (export .*); or set save", run.stderr)
        again = start(*shlex.split(named.replace("DIR", "exported")), cwd=tmp_path, cache=cache)
        assert again.wait() == 0, again.stderr
        assert SAYS not in again.stderr
        plain = start("export", "run", "--out", "plain", cwd=tmp_path, cache=cache)
        assert plain.wait() == 0, plain.stderr
        assert SAYS in plain.stderr
        exported, source = (load_file(tmp_path / each / "model.safetensors") for each in ("exported", "source"))
        changed = {name for name, x in exported.items() if not x.equal(source[name].float())}
        assert {x.dtype for x in exported.values()} == {torch.float32}
        assert len(changed) == len(exported)


@pytest.mark.parametrize("scale", [1.0, 1e-4])
def test_a_merge_says_how_much_of_the_adapter_is_left(base: Path, tmp_path: Path, capsys: Any, scale: float) -> None:
    """A base in bf16, and LoRA matrices of which one is scaled."""
    folder = tmp_path / "base"
    AutoModelForCausalLM.from_pretrained(base).to(torch.bfloat16).save_pretrained(folder)
    for file in base.glob("tokenizer*"):
        (folder / file.name).write_bytes(file.read_bytes())
    model, tokenizer = adapted(folder, "lora")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.mul_(scale)
    adapter = export(model, tokenizer, tmp_path / "adapter")
    api.merge(adapter, tmp_path / "merged")
    assert (SAYS in capsys.readouterr().err) == (scale < 1)
    api.merge(adapter, tmp_path / "whole", dtype="fp32")
    assert SAYS not in capsys.readouterr().err
