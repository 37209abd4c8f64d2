"""Learning rate and weight decay of each parameter; an optimizer saved without pickle resumes bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from ptft_dist.config.recipe import OptimSection
from ptft_dist.engine.optim import build_optimizer, moment_bytes, parameter_groups, set_lr
from ptft_dist.engine.state import flatten_optimizer, unflatten_optimizer, write_tensors
from ptft_dist.errors import RecipeError

CPU = torch.device("cpu")


def optim(**settings: Any) -> OptimSection:
    return OptimSection.model_validate(settings)


def llama() -> PreTrainedModel:
    sizes: dict[str, int] = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    return LlamaForCausalLM(LlamaConfig(vocab_size=50, **sizes))


def gpt2() -> PreTrainedModel:
    return GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=32))


def settings_by_name(model: nn.Module, section: OptimSection) -> dict[str, tuple[float, float]]:
    """name -> (lr_scale, weight_decay); every parameter in exactly one group."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found: dict[str, tuple[float, float]] = {}
    for group in parameter_groups(model.named_parameters(), section):
        for parameter in group["params"]:
            assert names[id(parameter)] not in found
            found[names[id(parameter)]] = (group["lr_scale"], group["weight_decay"])
    assert found.keys() == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    return found


@pytest.mark.parametrize("model", [llama(), gpt2()], ids=["llama", "gpt2"])
def test_matrices_decay_and_vectors_do_not(model: PreTrainedModel) -> None:
    found = settings_by_name(model, optim(weight_decay=0.3))
    for name, (lr_scale, decay) in found.items():
        vector = "norm" in name or "ln_" in name or name.endswith("bias")
        assert (lr_scale, decay) == (1.0, 0.0 if vector else 0.3), name
    assert {decay for _, decay in found.values()} == {0.0, 0.3}


def test_the_first_group_that_matches_takes_a_parameter() -> None:
    groups = [
        {"match": r"layers\.0\.", "lr_scale": 0.5},
        {"match": "norm", "weight_decay": 0.7},
        {"match": "embed", "lr_scale": 0.0, "weight_decay": 0.0},
    ]
    found = settings_by_name(llama(), optim(weight_decay=0.1, groups=groups))
    assert found["model.layers.0.mlp.up_proj.weight"] == (0.5, 0.1)
    assert found["model.layers.0.input_layernorm.weight"] == (0.5, 0.0)  # not the second group's 0.7
    assert found["model.layers.1.input_layernorm.weight"] == (1.0, 0.7)
    assert found["model.layers.1.mlp.up_proj.weight"] == (1.0, 0.1)
    assert found["model.embed_tokens.weight"] == (0.0, 0.0)
    assert found["lm_head.weight"] == (1.0, 0.1)


def test_a_group_without_effect_is_an_error_that_names_it() -> None:
    groups = [{"match": "mlp"}, {"match": "no_such_layer"}, {"match": "nor_this"}]
    with pytest.raises(RecipeError, match="'no_such_layer', 'nor_this'") as caught:
        parameter_groups(llama().named_parameters(), optim(groups=groups))
    assert "mlp" not in str(caught.value)


def test_a_group_that_only_repeats_an_earlier_one_is_an_error() -> None:
    groups = [{"match": "embed"}, {"match": "embed_tokens"}]
    with pytest.raises(RecipeError, match="'embed_tokens'"):
        parameter_groups(llama().named_parameters(), optim(groups=groups))


def test_frozen_parameters_are_left_out() -> None:
    model = llama()
    model.get_input_embeddings().requires_grad_(False)
    assert "model.embed_tokens.weight" not in settings_by_name(model, optim())
    with pytest.raises(RecipeError, match="'embed'"):
        parameter_groups(model.named_parameters(), optim(groups=[{"match": "embed"}]))


def test_lr_and_scale_reach_the_weights() -> None:
    """SGD by hand: w - lr x scale x (gradient + decay x w); a vector does not decay."""
    model = nn.ModuleDict({"slow": nn.Linear(2, 2, bias=False), "fast": nn.Linear(2, 2)})
    section = optim(name="sgd", weight_decay=0.5, groups=[{"match": "slow", "lr_scale": 0.1}])
    optimizer = build_optimizer(parameter_groups(model.named_parameters(), section), section, CPU)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    set_lr(optimizer, 0.2)
    optimizer.step()
    after = dict(model.named_parameters())
    slow, fast = before["slow.weight"], before["fast.weight"]
    torch.testing.assert_close(after["slow.weight"].data, slow - 0.02 * (1 + 0.5 * slow))
    torch.testing.assert_close(after["fast.weight"].data, fast - 0.2 * (1 + 0.5 * fast))
    torch.testing.assert_close(after["fast.bias"].data, before["fast.bias"] - 0.2)


def test_adamw_by_hand() -> None:
    """Loshchilov and Hutter 2019, algorithm 2, two updates of one matrix at two learning rates."""
    parameter = nn.Parameter(torch.tensor([[1.0, -2.0]]))
    section = optim(weight_decay=0.1, betas=(0.8, 0.9), eps=1e-3)
    optimizer = build_optimizer(parameter_groups([("w", parameter)], section), section, CPU)
    weights, first, second = [1.0, -2.0], [0.0, 0.0], [0.0, 0.0]
    for t, (lr, gradient) in enumerate([(0.1, [0.5, -1.0]), (0.05, [2.0, 0.25])], start=1):
        parameter.grad = torch.tensor([gradient])
        set_lr(optimizer, lr)
        optimizer.step()
        for i, g in enumerate(gradient):
            first[i] = 0.8 * first[i] + 0.2 * g
            second[i] = 0.9 * second[i] + 0.1 * g * g
            unbiased_first, unbiased_second = first[i] / (1 - 0.8**t), second[i] / (1 - 0.9**t)
            weights[i] -= lr * 0.1 * weights[i] + lr * unbiased_first / (unbiased_second**0.5 + 1e-3)
        assert parameter.tolist()[0] == pytest.approx(weights, rel=1e-6)


def test_momentum_by_hand() -> None:
    parameter = nn.Parameter(torch.tensor([1.0]))
    section = optim(name="sgd", momentum=0.5, weight_decay=0.0)
    optimizer = build_optimizer(parameter_groups([("w", parameter)], section), section, CPU)
    for expected in (1 - 0.1 * 1, 0.9 - 0.1 * 1.5, 0.75 - 0.1 * 1.75):
        parameter.grad = torch.ones(1)
        set_lr(optimizer, 0.1)
        optimizer.step()
        assert parameter.item() == pytest.approx(expected, rel=1e-6)


# --- saved and restored -----------------------------------------------------------------------------------------------

OPTIMIZERS = [
    {"name": "adamw"},
    {"name": "sgd"},
    {"name": "sgd", "momentum": 0.9},
    {"name": "adafactor"},
    {"name": "adamw_8bit"},
    {"name": "paged_adamw"},
    {"name": "paged_adamw_8bit"},
]


class Fit:
    """A regression with two matrices of 8192 weights (bitsandbytes keeps 8-bit state from 4096 on) and a small rest."""

    def __init__(self, section: OptimSection) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 64), nn.Tanh(), nn.Linear(64, 1))
        self.optimizer = build_optimizer(parameter_groups(self.model.named_parameters(), section), section, CPU)
        self.losses: list[float] = []

    def steps(self, first: int, last: int) -> None:
        for step in range(first, last):
            generator = torch.Generator().manual_seed(step)
            x = torch.randn(32, 64, generator=generator)
            loss = (self.model(x).squeeze(1) - x[:, 0]).square().mean()
            loss.backward()
            set_lr(self.optimizer, 0.01 / (step + 1))
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.losses.append(loss.item())

    def save(self, folder: Path) -> None:
        tensors, rest = flatten_optimizer(self.optimizer.state_dict())
        write_tensors(folder / "optimizer.safetensors", tensors)
        save_file(self.model.state_dict(), folder / "model.safetensors")
        (folder / "optimizer.json").write_text(json.dumps(rest))

    def load(self, folder: Path) -> None:
        self.model.load_state_dict(load_file(folder / "model.safetensors"))
        rest = json.loads((folder / "optimizer.json").read_text())
        self.optimizer.load_state_dict(unflatten_optimizer(load_file(folder / "optimizer.safetensors"), rest))


@pytest.mark.parametrize("settings", OPTIMIZERS, ids=lambda s: "-".join(map(str, s.values())))
def test_saved_and_restored_it_goes_on_bit_for_bit(tmp_path: Path, settings: dict[str, Any]) -> None:
    section = optim(weight_decay=0.01, groups=[{"match": "2", "lr_scale": 0.5}], **settings)
    whole = Fit(section)
    whole.steps(0, 12)
    assert whole.losses[-1] < whole.losses[0], "it learns"

    interrupted, resumed = Fit(section), Fit(section)
    interrupted.steps(0, 6)
    interrupted.save(tmp_path)
    tensors = load_file(tmp_path / "optimizer.safetensors")
    stored = sum(tensor.nbytes for name, tensor in tensors.items() if not name.endswith(".step"))
    assert stored == moment_bytes(section, [parameter.shape for parameter in whole.model.parameters()])
    resumed.load(tmp_path)
    for group, saved in zip(resumed.optimizer.param_groups, interrupted.optimizer.param_groups, strict=True):
        assert plain(group) == plain(saved)
    resumed.steps(6, 12)

    assert resumed.losses == whole.losses[6:]
    for mine, expected in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(mine, expected)
    mine, expected = resumed.optimizer.state_dict()["state"], whole.optimizer.state_dict()["state"]
    assert_same(mine, expected)


def plain(group: dict[str, Any]) -> Any:
    """A parameter group without its parameters, as JSON gives it back: lists for tuples."""
    return json.loads(json.dumps({key: value for key, value in group.items() if key != "params"}))


def assert_same(mine: Any, expected: Any) -> None:
    """The same tree of values, data types and bits."""
    assert type(mine) is type(expected)
    if isinstance(mine, torch.Tensor):
        assert mine.dtype == expected.dtype
        assert torch.equal(mine, expected)
    elif isinstance(mine, dict):
        assert mine.keys() == expected.keys()
        for key in mine:
            assert_same(mine[key], expected[key])
    else:
        assert mine == expected


def test_eight_bit_state_is_eight_bit() -> None:
    fit = Fit(optim(name="adamw_8bit"))
    fit.steps(0, 1)
    assert fit.optimizer.state[next(fit.model.parameters())]["state1"].dtype == torch.uint8


@pytest.mark.parametrize(("name", "unpaged"), [("paged_adamw", "adamw"), ("paged_adamw_8bit", "adamw_8bit")])
def test_a_paged_optimizer_runs_unpaged_on_a_cpu_and_says_so_once(name: str, unpaged: str) -> None:
    """One recipe runs on any machine: the updates are those of the optimizer without paging."""
    told: list[str] = []
    optimizers = []
    for chosen in (name, unpaged):
        torch.manual_seed(0)
        weights = nn.Parameter(torch.randn(64, 128))
        section = optim(name=chosen, weight_decay=0.1)
        optimizer = build_optimizer(parameter_groups([("w", weights)], section), section, CPU, told.append)
        for step in range(3):
            weights.grad = torch.sin(weights.detach() + step)
            set_lr(optimizer, 0.01)
            optimizer.step()
        optimizers.append(weights.detach())
    torch.testing.assert_close(optimizers[0], optimizers[1], rtol=1e-5, atol=1e-6)
    assert told == [f"optim.name: {name} runs without paging on a CPU; the updates are the same"]
