"""Sampling with vLLM instead of transformers, an optional extra, through TRL's bridge.

vLLM computes other numbers than the network that is trained: other kernels, another order of sums. So its responses are
weighted, see `rl.advantages.importance_weights`, and a seed repeats them only as far as vLLM repeats itself.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from ptft_dist.config.recipe import ModelSection
from ptft_dist.config.rollouts import SamplingSettings
from ptft_dist.errors import RecipeError
from ptft_dist.rl.rollout import Phase, Response
from ptft_dist.rl.sampling import until_end

REQUESTS = 64
"""Requests to a server at a time."""
_OF_A_LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""Variables that TRL sets for vLLM's start. Later they would mean that a launcher has started this process."""


def check_vllm(key: str, section: ModelSection) -> None:
    """Raises RecipeError if vLLM is not installed, or cannot take over the weights of this network.

    key: the recipe's key that asks for it.
    """
    method = section.adapt.method if section.adapt.adds_adapter else "lora"
    if section.path is None:
        raise RecipeError(f"{key}: vLLM reads the network's directory: set model.path")
    if section.quantize is not None:
        raise RecipeError(f"{key}: the weights of a quantized network cannot be given to vLLM; remove model.quantize")
    if method != "lora":
        raise RecipeError(f"{key}: model.adapt.{method} cannot be merged into the weights that vLLM gets; use lora")
    if importlib.util.find_spec("vllm") is None:
        raise RecipeError(f"{key}: vLLM is not installed. It needs a GPU: pip install 'ptft_dist[vllm]'")


class VllmSampler:
    """A `Sampler`: vLLM in every process, or a server that the first process asks.

    Before it samples, it gives vLLM the policy's weights, with adapters merged. TRL gathers sharded ones.
    """

    def __init__(self, settings: SamplingSettings, eos_ids: Sequence[int], longest: int, added: Sequence[str]) -> None:
        """longest: the most tokens of prompt and response. added: prefixes of names of weights that are not the
        policy's, such as those of a critic."""
        self.settings, self.eos_ids, self.longest, self.added = settings, list(eos_ids), longest, tuple(added)
        self.bridge: Any = None

    def __call__(self, phase: Phase, prompts: Sequence[np.ndarray], seeds: Sequence[int]) -> list[Response]:
        if self.bridge is None:
            self.bridge = self._connect(phase.processes.model, phase.processes.accelerator)
        with phase.processes.evaluating():
            self.bridge.sync_weights()
        rank = phase.processes.rank
        if self.bridge.mode == "server":
            rows, ask = list(range(len(prompts))) if rank == 0 else [], self._ask_server
        else:
            parts = phase.split_sampling(np.array([len(ids) for ids in prompts]))
            rows, ask = [int(i) for part in parts for i in part[rank]], self._ask_here
        answers = ask([prompts[i].tolist() for i in rows], [seeds[i] for i in rows]) if rows else []
        return phase.gathered({i: self._response(*each) for i, each in zip(rows, answers, strict=True)}, len(prompts))

    def _response(self, ids: Sequence[int], logprobs: Sequence[float]) -> Response:
        kept, ended = until_end(np.array(ids, np.int64), self.eos_ids)
        return Response(kept, ended, np.array(logprobs, np.float32)[: len(kept)])

    def _ask_here(self, prompts: list[list[int]], seeds: list[int]) -> list[tuple[list[int], list[float]]]:
        from vllm import SamplingParams

        llm, sleeps = self.bridge.llm, self.bridge.enable_sleep_mode
        if sleeps:
            llm.wake_up(tags=["kv_cache"])
        wanted = [SamplingParams(seed=seed, detokenize=False, **self._options, **self._stop) for seed in seeds]
        found = llm.generate([{"prompt_token_ids": ids} for ids in prompts], sampling_params=wanted, use_tqdm=False)
        if sleeps:
            llm.sleep(level=2)
            self.bridge._llm_weights_sleeping = True  # as TRL's `generate` does
        answers = [each.outputs[0] for each in found]
        return [
            (list(each.token_ids), [row[i].logprob for i, row in zip(each.token_ids, each.logprobs, strict=True)])
            for each in answers
        ]

    def _ask_server(self, prompts: list[list[int]], seeds: list[int]) -> list[tuple[list[int], list[float]]]:
        def ask(ids: list[int], seed: int) -> tuple[list[int], list[float]]:
            client = self.bridge.vllm_client
            found = client.generate([ids], generation_kwargs={"seed": seed, **self._stop}, **self._options)
            return found["completion_ids"][0], [first for first, *_ in found["logprobs"][0]]

        with ThreadPoolExecutor(REQUESTS) as pool:
            return list(pool.map(ask, prompts, seeds))

    @property
    def _options(self) -> dict[str, Any]:
        settings = self.settings
        return {
            "max_tokens": settings.max_new_tokens,
            "temperature": settings.temperature,
            "top_k": settings.top_k or 0,
            "top_p": settings.top_p or 1.0,
            "min_p": settings.min_p or 0.0,
            "logprobs": 0,  # those of the sampled token only
        }

    @property
    def _stop(self) -> dict[str, Any]:
        return {"stop_token_ids": self.eos_ids}

    def _connect(self, model: Any, accelerator: Any) -> Any:
        from transformers import AutoConfig
        from trl.generation.vllm_generation import VLLMGeneration

        stored = AutoConfig.from_pretrained(model.name_or_path).get_text_config().vocab_size
        if model.config.get_text_config().vocab_size != stored:
            raise RecipeError(f"sampling.vllm: tokens were added to {model.name_or_path}, which vLLM does not know of")
        added = self.added

        class Bridge(VLLMGeneration):
            """Without the weights that vLLM's network does not have."""

            def _iter_named_params(self) -> Iterator[tuple[str, torch.Tensor]]:
                for name, parameter in super()._iter_named_params():
                    if not name.startswith(added):
                        yield name, parameter

        options = self.settings.vllm
        assert options is not None
        server: Any = {"mode": "server", "server_base_url": options.server}
        here: Any = {
            "mode": "colocate",
            "gpu_memory_utilization": options.memory,
            "enable_sleep_mode": options.sleep,
            "max_model_length": self.longest,
        }
        tokenizer: Any = None  # prompts are token ids
        before = {name: os.environ.get(name) for name in _OF_A_LAUNCHER}
        try:
            bridge = Bridge(model, accelerator, tokenizer, **(here if options.server is None else server))
        finally:
            for name, value in before.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value
        if options.server is not None and accelerator.is_main_process:
            _check_server(bridge.vllm_client)
        return bridge


def _check_server(client: Any) -> None:
    """Raises RecipeError if the server's log-probabilities are not those that the policy's are compared with."""
    mode = client.get_server_info()["model_config"]["logprobs_mode"]
    if mode != "processed_logprobs":
        raise RecipeError(
            f"sampling.vllm.server: its log-probabilities are {mode}, without the temperature, so what tokens learn "
            "would be weighted wrongly. Start it with --logprobs-mode processed_logprobs"
        )
