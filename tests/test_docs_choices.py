"""The computed tables of docs/choices.md, repeated; measured numbers, looked up in the benchmarks' README."""

from __future__ import annotations

import re

import pytest
from support import ROOT

PAGE = (ROOT / "docs/choices.md").read_text()
BENCHMARKS = (ROOT / "benchmarks/README.md").read_text()


def numbers(line: str) -> list[float]:
    return [float(each) for each in re.findall(r"([\d.]+) GB", line)]


@pytest.mark.parametrize(("billions", "gpus"), [(1, 8), (8, 8), (70, 64)])
def test_memory_of_the_optimizer_state(billions: int, gpus: int) -> None:
    (line,) = re.findall(rf"^\| {billions}B parameters, {gpus} GPUs .*$", PAGE, re.MULTILINE)
    weights, gradients, state = 2, 2, 12  # bytes, of mixed precision
    whole = 4 + 4 + 8
    each = [
        whole,
        weights + gradients + state / gpus,
        weights + (gradients + state) / gpus,
        whole / gpus,
    ]
    assert numbers(line) == pytest.approx([billions * value for value in each], abs=0.051)


def test_memory_of_a_frozen_base() -> None:
    (text,) = re.findall(r"8B parameters take ([\d.]+ GB in bf16 and [\d.]+ GB) in nf4", PAGE)
    assert numbers(text) == pytest.approx([8 * 2, 8 * 4.127 / 8], abs=0.051)


@pytest.mark.parametrize("method", ["plain", "replay", "distillation", "lora", "ewc", "l2_sp"])
def test_measured_accuracies_are_those_of_the_benchmark(method: str) -> None:
    old, new = re.findall(rf"^\| {method} \| ([\d.]+) \| ([\d.]+) \|$", BENCHMARKS, re.MULTILINE)[0]
    name = {"plain": "all weights, nothing else"}.get(method, method)
    (line,) = (line for line in PAGE.splitlines() if name in line and re.search(r"\d\.\d{3}", line) and "|" in line)
    assert old in line
    assert new in line


def test_measured_memory_and_rewards_are_those_of_the_benchmark() -> None:
    for size, memory in re.findall(r"^\| (5M|30M) \| (.*) \|$", PAGE, re.MULTILINE):
        ours = re.findall(rf"^\| {size}, .*\| ([\d.]+), [\d.]+ GB \|", BENCHMARKS, re.MULTILINE)
        assert numbers(memory) == [float(each) for each in ours], size
    row = re.compile(r"^\| (ppo|grpo), (rule|reward model) \| \d \| (-?[\d.]+), ([\d.]+) \|", re.MULTILINE)
    gains: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for task, kind, before, after in row.findall(BENCHMARKS):
        gains.setdefault((task, kind), []).append((float(before), float(after)))
    text = " ".join(PAGE.split())
    assert "to " + ", ".join(f"{after:.2f}" for _, after in gains["ppo", "rule"]) in text
    assert "GRPO to " + ", ".join(f"{after:.2f}" for _, after in gains["grpo", "rule"]) in text
    for name, task in (("PPO raises it by ", "ppo"), ("GRPO by ", "grpo")):
        assert name + ", ".join(f"{after - before:.2f}" for before, after in gains[task, "reward model"]) in text
