"""Sampling with vLLM: TRL's own bridge, over a stand-in for vLLM that holds a network of its own on the CPU.

The stand-in has the names and the rules of vLLM's interface that TRL 1.16 uses. It samples as `rl.sampling` does, so
that responses can be compared one by one.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import os
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import import_module
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from pydantic import ValidationError
from reference_pages.metrics import WITH_VLLM
from rl_support import EOS, PAD, llama, recipe, task_for
from test_rollouts import PROMPTS, OneProcess, one_row, parts_of, store_of
from transformers import LlamaForCausalLM

from ptft_dist.config.recipe import ModelSection
from ptft_dist.config.rollouts import SamplingSettings
from ptft_dist.engine.processes import reset_accelerate
from ptft_dist.errors import RecipeError
from ptft_dist.rl.advantages import importance_weights
from ptft_dist.rl.rollout import Phase, Trajectory
from ptft_dist.rl.sampling import response_seed, sample
from ptft_dist.rl.vllm import check_vllm

SAMPLING = {"max_new_tokens": 6, "temperature": 0.8}


@dataclasses.dataclass
class SamplingParams:
    seed: int
    max_tokens: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    logprobs: int
    stop_token_ids: list[int]
    detokenize: bool = True


class Llm:
    """As vLLM's: asleep it has neither weights nor cache, and it knows the names of its own weights only."""

    bias: ClassVar[float] = 0.0
    """Added to the log-probabilities that it reports."""

    def __init__(self, model: str, enable_sleep_mode: bool, max_model_len: int, **_options: Any) -> None:
        self.network = LlamaForCausalLM.from_pretrained(model).eval()
        self.awake, self.sleeps, self.longest = {"weights", "kv_cache"}, enable_sleep_mode, max_model_len
        runner = SimpleNamespace(model=SimpleNamespace(load_weights=self.load_weights))
        worker = SimpleNamespace(driver_worker=SimpleNamespace(model_runner=runner))
        self.llm_engine = SimpleNamespace(model_executor=worker)

    def load_weights(self, weights: list[tuple[str, torch.Tensor]]) -> None:
        assert "weights" in self.awake
        own = dict(self.network.named_parameters())
        for name, value in weights:
            own[name].data.copy_(value)

    def wake_up(self, tags: list[str]) -> None:
        assert self.sleeps
        self.awake |= set(tags)

    def sleep(self, level: int) -> None:
        assert self.sleeps
        assert level == 2
        self.awake = set()
        for parameter in self.network.parameters():
            parameter.data.fill_(float("nan"))

    def reset_prefix_cache(self) -> None:
        pass

    def generate(self, prompts: list[dict[str, Any]], sampling_params: list[SamplingParams], **options: Any) -> Any:
        assert self.awake == {"weights", "kv_cache"}
        assert options == {"use_tqdm": False}
        results = []
        for prompt, wanted in zip(prompts, sampling_params, strict=True):
            assert len(prompt["prompt_token_ids"]) + SAMPLING["max_new_tokens"] <= self.longest
            ids, logprobs = answer(self.network, prompt["prompt_token_ids"], wanted)
            told = [{i: SimpleNamespace(logprob=x)} for i, x in zip(ids, logprobs, strict=True)]
            results.append(SimpleNamespace(outputs=[SimpleNamespace(token_ids=tuple(ids), logprobs=told)]))
        return results


def answer(network: Any, ids: list[int], options: SamplingParams) -> tuple[list[int], list[float]]:
    """The response to one prompt and its log-probabilities."""
    settings = SamplingSettings(
        max_new_tokens=options.max_tokens, temperature=options.temperature, top_k=options.top_k or None
    )
    inputs = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}
    with torch.no_grad():
        found = sample(network, inputs, settings, [options.seed], pad_id=PAD, eos_ids=options.stop_token_ids)
    response = found[0].numpy()
    each = SimpleNamespace(prompt=SimpleNamespace(ids=np.array(ids)), response=response)
    logprobs = one_row(network, each, options.temperature)[0]  # type: ignore[arg-type]
    return response.tolist(), [x + Llm.bias for x in logprobs]


def module(name: str, **content: Any) -> ModuleType:
    made = ModuleType(name)
    made.__spec__ = ModuleSpec(name, None)
    made.__dict__.update(content)
    return made


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Llm]]:
    """vLLM 0.26 as far as TRL and we know it."""
    for name, content in {
        "vllm": {"LLM": Llm, "RequestOutput": object, "SamplingParams": SamplingParams},
        "vllm.sampling_params": {"StructuredOutputsParams": object},
        "vllm.utils": {},
        "vllm.utils.network_utils": {"get_ip": object},
        "vllm.distributed": {},
        "vllm.distributed.weight_transfer": {},
        "vllm.distributed.weight_transfer.nccl_engine": {
            "NCCLTrainerSendWeightsArgs": object,
            "NCCLWeightTransferEngine": object,
        },
    }.items():
        monkeypatch.setitem(sys.modules, name, module(name, **content))
    monkeypatch.setattr(
        import_module("trl.import_utils"),
        "is_vllm_available",
        lambda min_version=None: min_version is None or min_version <= "0.26.0",
    )
    for name in ("trl.generation.vllm_generation", "trl.generation.vllm_client"):
        monkeypatch.delitem(sys.modules, name, raising=False)  # they look for vLLM when they are imported
    monkeypatch.setattr(Llm, "bias", 0.0)
    yield Llm
    reset_accelerate()
    for name in ("trl.generation.vllm_generation", "trl.generation.vllm_client"):
        sys.modules.pop(name, None)


class Processes(OneProcess):
    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.accelerator = Accelerator(cpu=True)


def rolled(task: Any, model: Any) -> tuple[list[Trajectory], dict[str, float]]:
    """The responses of one rollout, scored by their lengths, and its metrics."""
    task.rewards.functions["final_number"] = lambda completion_ids, **_: [float(len(ids)) for ids in completion_ids]
    phase = Phase(0, Processes(model), parts_of(2), parts_of(2))
    rollout = task.rollout(phase, store_of(PROMPTS), range(len(PROMPTS)))
    return rollout.trajectories, rollout.metrics


def stored(tmp_path: Path, seed: int = 0) -> LlamaForCausalLM:
    """A network that was read from a directory, where vLLM finds it too."""
    llama(seed).save_pretrained(tmp_path / "model")
    model: LlamaForCausalLM = LlamaForCausalLM.from_pretrained(tmp_path / "model")
    return model


def changed(model: Any) -> None:
    """As after updates."""
    chance = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.2 * torch.randn(parameter.shape, generator=chance)


SETTINGS: dict[str, dict[str, Any]] = {
    "ppo": {"kl": 0.0, "sampling": SAMPLING},
    "grpo": {"kl": 0.0, "group_size": 3, "sampling": SAMPLING},
}


def with_vllm(task: str, **options: Any) -> dict[str, Any]:
    return {**SETTINGS[task], "sampling": {**SAMPLING, "vllm": options}}


def by_the_network(task: str, model: Any, trajectories: list[Trajectory]) -> list[tuple[list[int], bool]]:
    """What transformers samples from the network with the seeds of these responses."""
    plain = task_for(llama(), task, SETTINGS[task])
    phase = Phase(0, Processes(model), parts_of(2), parts_of(2))
    seeds = [response_seed(plain.setup.seed, 0, each.prompt.row, each.number) for each in trajectories]
    return [
        (each.ids.tolist(), each.ended)
        for each in plain.sampler(phase, [each.prompt.ids for each in trajectories], seeds)
    ]


@pytest.mark.parametrize("task", SETTINGS)
@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
def test_vllm_samples_from_the_present_weights(vllm: type[Llm], tmp_path: Path, task: str, adapter: bool) -> None:  # noqa: ARG001
    """The responses of two rollouts, with updates between, are those of the network; a value head stays here."""
    model: Any = stored(tmp_path)
    if adapter:
        model = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    made = task_for(model, task, with_vllm(task))
    variables, seen = dict(os.environ), []
    for _ in range(2):
        trajectories, _ = rolled(made, model)
        seen.append([(each.response.tolist(), each.ended) for each in trajectories])
        assert seen[-1] == by_the_network(task, model, trajectories)
        for each in trajectories:
            assert each.tokens["sampled"].tolist() == pytest.approx(one_row(model, each, 0.8)[0], abs=1e-4)
        changed(model)
    assert seen[0] != seen[1]
    llm = made.sampler.bridge.llm
    assert llm.awake == set()  # between rollouts the GPU is the trainer's
    assert llm.longest == 16 + SAMPLING["max_new_tokens"]
    assert dict(os.environ) == variables


@pytest.mark.parametrize("task", SETTINGS)
@pytest.mark.parametrize("bias", [0.0, 0.25, -3.0])
def test_what_a_token_learns_is_weighted(vllm: type[Llm], tmp_path: Path, task: str, bias: float) -> None:
    """By the ratio of the network's probability to vLLM's, at most max_weight; returns of the critic are not."""
    vllm.bias, model = bias, stored(tmp_path)
    trajectories, metrics = rolled(task_for(model, task, with_vllm(task)), model)
    plain = task_for(model, task, SETTINGS[task])
    again = [copy.deepcopy(each) for each in trajectories]
    plain.advantages(again)
    limited = 0
    for weighted, each in zip(trajectories, again, strict=True):
        logprobs = one_row(model, each, 0.8)[0]
        for t, (now, then) in enumerate(zip(logprobs, (x + bias for x in logprobs), strict=True)):
            weight = min(math.exp(now - then), 2.0)
            limited += weight == 2.0
            assert weighted.tokens["advantages"][t] == pytest.approx(each.tokens["advantages"][t] * weight, abs=1e-4)
    if task == "ppo":
        assert all((a.tokens["returns"] == b.tokens["returns"]).all() for a, b in zip(trajectories, again, strict=True))
    assert {name for name in metrics if name.startswith("sampler")} == WITH_VLLM.keys()
    assert metrics["sampler_gap"] == pytest.approx(abs(bias), abs=1e-4)
    assert metrics["sampler_weight"] == pytest.approx(min(math.exp(-bias), 2.0), rel=1e-3)
    assert metrics["sampler_weight_limited"] == (1.0 if limited else 0.0)


def test_weights_by_hand() -> None:
    logprobs, sampled = np.log(np.array([0.5, 0.2, 0.9], np.float32)), np.log(np.array([0.25, 0.4, 0.1], np.float32))
    assert importance_weights(logprobs, sampled, 3.0).tolist() == pytest.approx([2.0, 0.5, 3.0])


def test_a_server(vllm: type[Llm], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: ARG001
    """TRL's client asks it over HTTP; only the transfer of weights, over NCCL, is replaced."""
    model, network = stored(tmp_path), stored(tmp_path)
    asked: list[dict[str, Any]] = []
    config = {"logprobs_mode": "raw_logprobs"}  # vLLM's default

    class Server(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            info = self.path.startswith("/server_info")
            self.reply({"vllm_config": {"model_config": config}} if info else {"data": [{"id": "model"}]})

        def do_POST(self) -> None:
            if self.path.startswith("/reset_prefix_cache"):
                return self.reply({"success": True})
            wanted = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append(wanted)
            (ids,) = wanted["prompt"]
            names = {field.name for field in dataclasses.fields(SamplingParams)}
            options = SamplingParams(**{name: value for name, value in wanted.items() if name in names})
            response, logprobs = answer(network, ids, options)
            tokens = [f"token_id:{i}" for i in response]
            told = {"tokens": tokens, "token_logprobs": logprobs, "top_logprobs": [None] * len(tokens)}
            return self.reply({"choices": [{"prompt_token_ids": ids, "token_ids": response, "logprobs": told}]})

        def reply(self, content: Any) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps(content).encode())

        def log_message(self, *_: Any) -> None:
            pass

    client = import_module("trl.generation.vllm_client").VLLMClient

    def update(_self: Any, metadata: Any, weights: Iterator[tuple[str, torch.Tensor]]) -> None:
        given = dict(weights)
        assert [(name, list(x.shape)) for name, x in given.items()] == [(name, shape) for name, _, shape in metadata]
        network.load_state_dict(given, strict=False)

    monkeypatch.setattr(client, "init_communicator", lambda *_args, **_options: None)
    monkeypatch.setattr(client, "update_named_params", update)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    changed(model)  # the server has older weights at first
    url = f"http://127.0.0.1:{server.server_port}"
    with pytest.raises(RecipeError, match=r"are raw_logprobs.*--logprobs-mode processed_logprobs"):
        rolled(task_for(model, "ppo", with_vllm("ppo", server=url)), model)
    config["logprobs_mode"] = "processed_logprobs"
    trajectories, _ = rolled(task_for(model, "ppo", with_vllm("ppo", server=url)), model)
    server.shutdown()
    server.server_close()
    assert [(each.response.tolist(), each.ended) for each in trajectories] == by_the_network("ppo", model, trajectories)
    assert len(asked) == len(PROMPTS)
    assert all(each["stop_token_ids"] == [EOS] for each in asked)


@pytest.mark.parametrize(
    ("section", "says"),
    [
        ({"path": "m"}, "vLLM is not installed. It needs a GPU: pip install 'ptft_dist.vllm.'"),
        ({"config": {"model_type": "llama"}}, "set model.path"),
        ({"path": "m", "quantize": "nf4", "adapt": "lora"}, "remove model.quantize"),
        ({"path": "m", "adapt": {"prompt_tuning": {"tokens": 4}}}, "model.adapt.prompt_tuning cannot be merged"),
    ],
)
def test_what_vllm_cannot_do(section: dict[str, Any], says: str) -> None:
    with pytest.raises(RecipeError, match=rf"^ppo\.sampling\.vllm: .*{says}"):
        check_vllm("ppo.sampling.vllm", ModelSection.model_validate(section))


def test_tokens_that_vllm_does_not_know(vllm: type[Llm], tmp_path: Path) -> None:  # noqa: ARG001
    model = stored(tmp_path)
    model.resize_token_embeddings(30)
    with pytest.raises(RecipeError, match=r"tokens were added to .*/model, which vLLM does not know of"):
        rolled(task_for(model, "ppo", with_vllm("ppo")), model)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"server": "http://a:1", "memory": 0.5}, "memory: has no effect with a server"),
        ({"server": "http://a:1", "sleep": False}, "sleep: has no effect with a server"),
        ({"server": "node7:8000"}, "'node7:8000' is no address; write it as http://HOST:PORT"),
    ],
)
def test_settings_that_do_not_fit(given: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        recipe("ppo", {"sampling": {"vllm": given}})
