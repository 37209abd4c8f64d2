"""The base class of tasks that learn from rewards of their own responses."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PretrainedConfig, PreTrainedModel

from ptft_dist.config.recipe import ModelSection
from ptft_dist.data.store import Row, Store
from ptft_dist.data.tokenizer import after_answer
from ptft_dist.errors import RecipeError
from ptft_dist.networks.adapt.switching import (
    adapters_off,
    add_frozen_scorer,
    check_base_stays,
    check_no_dropout,
    check_start_is_base,
    shares_base,
)
from ptft_dist.networks.critic import CRITIC, VALUE_HEAD
from ptft_dist.networks.facts import NetworkFacts
from ptft_dist.networks.frozen import FrozenSource
from ptft_dist.networks.names import directory_or_hub_name
from ptft_dist.rl.advantages import kl_per_token
from ptft_dist.rl.losses import token_logprobs
from ptft_dist.rl.reward_model import Ask, RewardModel, check_reward_model, tokenizer_of
from ptft_dist.rl.rewards import find_function, module_file, shaped
from ptft_dist.rl.rollout import (
    Clock,
    NetworkSampler,
    Phase,
    Prompt,
    Rollout,
    Sampler,
    Trajectory,
    look_up,
    sample_responses,
    weigh,
)
from ptft_dist.rl.sampling import response_seed, sample, until_end
from ptft_dist.rl.scoring import Rewards, functions_of
from ptft_dist.rl.vllm import VllmSampler, check_vllm
from ptft_dist.tasks.common.dropout import turn_off_dropout
from ptft_dist.tasks.common.generation import PROMPT, end_ids, end_texts_with, left_padded, prompts_of
from ptft_dist.tasks.common.network_checks import check_room
from ptft_dist.tasks.common.padding import pad_id, pad_multiple
from ptft_dist.tasks.common.response_batches import as_bytes, from_bytes, padded_columns, padded_responses, prompt_of
from ptft_dist.tasks.common.rollout_settings import RolloutSettings
from ptft_dist.tasks.protocol import IGNORE, BaseTask, Batch, FrozenRole, LossOut, TaskSetup

REFERENCE = "reference"
SCORER = "reward_"
"""Prefix of the names of adapters that are reward models, and of their heads."""


class RolloutTask(BaseTask):
    """Samples responses, scores them, and turns them into rows for updates.

    A subclass defines `advantages` (from scores to what each token learns) and `loss`.
    """

    auto_class = AutoModelForCausalLM
    settings: RolloutSettings

    # --- before there is a network -----------------------------------------------------------------------------------

    @classmethod
    def fit_config(cls, setup: TaskSetup, config: PretrainedConfig) -> None:
        """Switch dropout off, because the same tokens must have the same probabilities at every pass.

        Raises:
            RecipeError: the network is no decoder, or has too few positions for prompt and response.
        """
        if config.is_encoder_decoder:
            raise RecipeError(f"model: task {setup.name} needs a decoder such as llama, qwen3 or gpt2")
        text = config.get_text_config()
        for name, value in list(text.to_dict().items()):
            if "drop" in name and isinstance(value, float):  # OPT also drops layers: layerdrop
                setattr(text, name, 0.0)
        positions = getattr(text, "max_position_embeddings", None)
        if isinstance(positions, int) and positions > 0:
            check_room(setup, positions, f"the model's max_position_embeddings ({positions})")

    @classmethod
    def frozen_roles(cls, setup: TaskSetup, section: ModelSection) -> dict[str, FrozenRole]:
        """The reward models, and the reference: where all weights are trained, a second copy of model.path."""
        roles: dict[str, FrozenRole] = {}
        check_no_dropout(section.adapt, setup.name)
        if setup.settings.sampling.vllm is not None:
            check_vllm(f"{setup.name}.sampling.vllm", section)
        if setup.settings.kl and not section.adapt.adds_adapter:
            if section.path is None:
                raise RecipeError(f"{setup.name}.kl: the reference is the network of model.path, and there is none")
            roles[REFERENCE] = FrozenRole("model.path", section.path, section.revision, AutoModelForCausalLM)
        elif setup.settings.kl:
            check_start_is_base(section.adapt, f"{setup.name}.kl")
            check_base_stays(section.adapt, f"{setup.name}.kl")
        for i, source in enumerate(setup.settings.rewards):
            if source.model is not None:
                key = f"{setup.name}.rewards.{i}.model"
                path = directory_or_hub_name(source.model, setup.base, key)
                roles[source.label] = FrozenRole(
                    key, path, source.revision, AutoModelForSequenceClassification, shares_base(path, section)
                )
        return roles

    @classmethod
    def check_setup(cls, setup: TaskSetup, frozen: Mapping[str, FrozenSource]) -> None:
        """Import the modules of reward functions; read the configs and tokenizers of reward models."""
        for key, named in functions_of(setup.settings.rewards, setup.name):
            find_function(named, key, setup.base)
        longest = setup.max_length + setup.settings.sampling.max_new_tokens + len(after_answer(setup.tokenizer))
        for role, source in frozen.items():
            if role != REFERENCE:
                check_reward_model(source.key, source.path, source.config(), longest)
                tokenizer_of(source)

    @classmethod
    def named_files(cls, setup: TaskSetup) -> dict[str, Path]:
        """The modules of reward functions that lie beside the recipe."""
        named = functions_of(setup.settings.rewards, setup.name)
        files = {key: module_file(source, setup.base) for key, source in named}
        return {key: file for key, file in files.items() if file.is_file()}

    # --- the networks ------------------------------------------------------------------------------------------------

    def __init__(self, setup: TaskSetup, network: NetworkFacts, device: torch.device) -> None:
        super().__init__(setup, network, device)
        if (positions := network.max_positions) is not None:  # less than the config says, with an offset
            check_room(setup, positions, f"the {positions} positions of the model with its adapter")
        self.pad_id, self.pad_multiple = pad_id(self.tokenizer.pad_token_id), pad_multiple(device)
        self.eos_ids = end_ids(setup, network)
        if not self.eos_ids:
            raise RecipeError("tokenizer: it has no EOS token, so no response would end; name one as its eos_token")
        self.fill_id = self.eos_ids[0] if self.tokenizer.pad_token_id is None else self.pad_id
        self.sampler: Sampler = self._make_sampler()
        self.reference: Any = None
        self.rewards = Rewards(self.settings.rewards, setup.name, setup.base)

    def _make_sampler(self) -> Sampler:
        sampling = self.settings.sampling
        if sampling.vllm is not None:
            longest = self.setup.max_length + sampling.max_new_tokens
            return VllmSampler(sampling, self.eos_ids, longest, [f"{VALUE_HEAD}.", f"{CRITIC}.", SCORER])
        padded = partial(left_padded, pad_id=self.pad_id, multiple=self.pad_multiple)
        return NetworkSampler(sampling, padded, self.fill_id, self.eos_ids)

    def prepare_network(self, model: PreTrainedModel) -> None:
        super().prepare_network(model)
        end_texts_with(model, self.eos_ids)

    def prepare_frozen(self, role: str, model: PreTrainedModel, source: FrozenSource) -> None:
        if role == REFERENCE:
            return
        if model.get_output_embeddings() is not None:  # an adapter without a score head
            raise RecipeError(
                f"{source.key}: {source.path} is a {type(model).__name__}, which gives tokens and no scores. Train a "
                "reward model with task: reward"
            )
        self.rewards.models[role] = RewardModel(source.key, source.path, self.tokenizer, tokenizer_of(source))

    def adopt(self, role: str, network: Any, facts: NetworkFacts) -> None:
        if role == REFERENCE:
            self.reference = network
        else:
            reward_model = self.rewards.models[role]
            reward_model.network, reward_model.positions = network, facts.max_positions

    def extend_network(self, model: Any, section: ModelSection) -> None:
        """Add the adapters of reward models that share the base of the policy; switch all dropout off."""
        for number, (role, each) in enumerate(self.frozen_roles(self.setup, section).items()):
            if each.shared:
                name = f"{SCORER}{number}"
                add_frozen_scorer(model, each.path, name)
                own = tokenizer_of(FrozenSource(each.key, ModelSection(path=each.path)))
                scorer = RewardModel(each.key, each.path, self.tokenizer, own, shared=name)
                self.rewards.models[role], scorer.positions = scorer, self.network.max_positions
        turn_off_dropout(model)  # also that of an adapter which is trained on

    # --- batches -----------------------------------------------------------------------------------------------------

    def collate(self, rows: Sequence[Row], keys: Sequence[tuple[int, int]] = ()) -> Batch:
        """Rows of a rollout: see `padded_responses`, and the token columns as fp32 [B, R].

        Validation rows are prompts: prompt/input_ids and prompt/attention_mask [B, P], prompt/seeds [B], prompt/text
        [B, L] if there are reward models, and targets [B], which is -100 for a row that does not count.
        """
        tokens = sum(len(row.input_ids) for row in rows)
        if "response" not in rows[0].columns:
            prompts = left_padded([row.input_ids for row in rows], self.pad_id, self.pad_multiple)
            inputs = {PROMPT + name: x for name, x in prompts.items()}
            number = 2**32 - 1  # no phase has this number
            seeds = [response_seed(self.setup.seed, number, row, 0) for _, row in keys] or [0] * len(rows)
            inputs |= {PROMPT + "seeds": torch.tensor(seeds), "targets": torch.zeros(len(rows), dtype=torch.long)}
            if self.rewards.models:
                inputs[PROMPT + "text"] = as_bytes([[row.meta["prompt"], row.meta.get("tools")] for row in rows])
            return Batch(inputs, len(rows), tokens)
        split = [(row.input_ids, int(row.columns["response"][0])) for row in rows]
        inputs = self._padded([ids[:-n] for ids, n in split], [ids[-n:] for ids, n in split])
        inputs |= padded_columns(rows, self.token_columns, inputs["targets"].shape[1])
        return Batch(inputs, self.count_of(rows), tokens)

    def longest_rows(self, rows: Sequence[Row]) -> Sequence[Row]:
        """Prompts with responses of max_new_tokens."""
        tokens = self.settings.sampling.max_new_tokens
        response, zeros = np.full(tokens, self.fill_id, np.int64), np.zeros(tokens, np.float32)
        columns = {"response": np.array([tokens]), **dict.fromkeys(self.token_columns, zeros)}
        return [Row(np.concatenate([row.input_ids, response]), row.document_starts, columns) for row in rows]

    @property
    def token_columns(self) -> tuple[str, ...]:
        """The numbers of each response token that `loss` reads: keys of Trajectory.tokens."""
        return ("logprobs", "advantages", *(["reference"] if self.settings.kl else []))

    def as_row(self, each: Trajectory) -> Row:
        """A trajectory as a row for `collate`."""
        columns = {
            "response": np.array([len(each.response)]),
            **{name: each.tokens[name] for name in self.token_columns},
        }
        return Row(np.concatenate([each.prompt.ids, each.response]), np.zeros(1, np.int64), columns)

    def count_of(self, rows: Sequence[Row]) -> float:
        """The denominator of the mean loss: by default the number of response tokens."""
        return float(sum(int(row.columns["response"][0]) for row in rows))

    def _padded(self, prompts: Sequence[np.ndarray], responses: Sequence[np.ndarray]) -> dict[str, torch.Tensor]:
        return padded_responses(prompts, responses, self.pad_id, self.pad_multiple, self.network.position_offset)

    # --- the policy --------------------------------------------------------------------------------------------------

    def policy(
        self, model: Any, inputs: Mapping[str, torch.Tensor], *, hidden: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor, Any]:
        """Log-probabilities of the response tokens and entropies, fp32 [B, R], and with `hidden` the last hidden
        states [B, R, H] of the positions before the tokens."""
        names = ["input_ids", "attention_mask"] + ["position_ids"] * self.network.takes("position_ids")
        plain = {name: inputs[name] for name in names}
        width = inputs["targets"].size(1)
        if self.network.takes("logits_to_keep"):
            plain["logits_to_keep"] = width + 1  # type: ignore[assignment]
        output = model(**plain, use_cache=False, output_hidden_states=hidden)
        logits = output.logits[:, -width - 1 : -1]
        logprobs, entropy = token_logprobs(logits, inputs["targets"], self.settings.sampling.temperature)
        states = output.hidden_states[-1][:, -width - 1 : -1] if hidden else None
        return logprobs, entropy, states

    def look_at_policy(self, model: Any, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """What is remembered of the policy that sampled: its log-probabilities."""
        return {"logprobs": self.policy(model, inputs)[0]}

    def look_at_reference(self, model: Any, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"reference": self.policy(model, inputs)[0]}

    def ask_reference(self, policy: Ask, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The reference's log-probabilities: those of a network of its own, or of the base under the adapter."""
        if self.reference is None:
            return policy(self.base_as_reference, inputs)
        return self.reference.forward(self.look_at_reference, inputs)

    def base_as_reference(self, model: Any, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        with adapters_off(model):
            return self.look_at_reference(model, inputs)

    # --- a rollout ---------------------------------------------------------------------------------------------------

    def rollout(self, phase: Phase, store: Store, rows: Sequence[int]) -> Rollout:
        """The rollout of one phase: responses to the prompts `rows` of `store`. All ranks return the same."""
        clock = Clock()
        # 1. Sample responses with the policy.
        prompts = [prompt_of(store.row(row), row) for row in rows]
        settings, policy = self.settings, phase.processes.forward
        trajectories = sample_responses(phase, prompts, settings.samples_per_prompt, self.setup.seed, self.sampler)
        clock.lap("generation_s")
        # 2. What do the policy, the critic and the reference say about the sampled tokens?
        with phase.processes.evaluating():
            look_up(phase, trajectories, partial(policy, self.look_at_policy), self._inputs_of)
            if settings.kl:
                look_up(phase, trajectories, partial(self.ask_reference, policy), self._inputs_of)
            # 3. Score the responses.
            self.write_texts(trajectories)
            self.rewards.ask_models(phase, trajectories, policy)
        self.rewards.call_functions(phase, trajectories)
        raw = self.rewards.mix(trajectories)
        lengths = np.array([len(each.response) for each in trajectories])
        ended = np.array([each.ended for each in trajectories])
        scores = shaped(
            raw,
            lengths,
            ended,
            moments=self.rewards.moments if settings.normalize_rewards else None,
            clip=settings.clip_rewards,
            missing_eos_penalty=settings.missing_eos_penalty,
            length_target=settings.length_target,
            length_penalty=settings.length_penalty,
        )
        for each, score in zip(trajectories, scores, strict=True):
            each.score = float(score)
        clock.lap("scoring_s")
        # 4. From scores to advantages.
        metrics = self.describe(trajectories, raw)
        metrics["score"] = float(np.mean([each.score for each in trajectories]))
        if settings.kl:
            metrics["kl"] = float(np.mean([self.kl_of(each).sum() for each in trajectories]))
        metrics |= self.advantages(trajectories)
        if settings.sampling.vllm is not None:
            metrics |= weigh(trajectories, settings.sampling.vllm.max_weight)
        return Rollout(trajectories, metrics | clock.laps, self.samples_of(trajectories[: settings.show]))

    def advantages(self, trajectories: Sequence[Trajectory]) -> dict[str, float]:
        """Add `advantages` to the tokens of each trajectory, and what else the loss needs; return metrics."""
        raise NotImplementedError

    def _inputs_of(self, trajectories: Sequence[Trajectory]) -> dict[str, torch.Tensor]:
        return self._padded([t.prompt.ids for t in trajectories], [t.response for t in trajectories])

    def write_texts(self, trajectories: Sequence[Trajectory]) -> None:
        texts = self.tokenizer.batch_decode([t.response.tolist() for t in trajectories], skip_special_tokens=True)
        for each, text in zip(trajectories, texts, strict=True):
            each.text = text

    def describe(self, trajectories: Sequence[Trajectory], raw: np.ndarray) -> dict[str, float]:
        """Averages over responses. raw: the scores before they are shaped [N]."""
        return {
            "reward": float(raw.mean()),
            "reward_std": float(raw.std()),
            **self.rewards.averages(trajectories),
            "response_tokens": float(np.mean([len(each.response) for each in trajectories])),
            "without_eos": float(np.mean([not each.ended for each in trajectories])),
        }

    def kl_of(self, each: Trajectory) -> np.ndarray:
        """The estimated KL from the reference at each token of a response: nats [R]."""
        return kl_per_token(each.tokens["logprobs"], each.tokens["reference"], self.settings.kl_estimator)

    def samples_of(self, trajectories: Sequence[Trajectory]) -> list[dict[str, Any]]:
        return [
            {
                "row": each.prompt.row,
                "prompt": each.prompt.text,
                "response": each.text,
                "score": each.score,
                "rewards": each.rewards,
            }
            for each in trajectories
        ]

    def phase_is_over(self, metrics: Mapping[str, float]) -> bool:  # noqa: ARG002
        """Whether no more updates follow on this rollout. metrics: of the last update."""
        return False

    # --- state that a resume restores --------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        return {"rewards": self.rewards.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rewards.load_state_dict(state["rewards"])

    # --- evaluation --------------------------------------------------------------------------------------------------

    def evaluate(self, model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> LossOut:
        """Sample a response to each prompt, with the same random numbers at every evaluation.

        Returns predictions [B, N + M], fp64: the response's ids padded with -1, and the scores of the M reward models.
        """
        counts = inputs["targets"] != IGNORE
        prompts = prompts_of(inputs)
        seeds = prompts.pop("seeds").tolist()
        texts = from_bytes(prompts.pop("text")) if "text" in prompts else [("", None)] * len(seeds)
        together = dist.is_initialized() and dist.get_world_size() > 1
        ids = sample(
            model, prompts, self.settings.sampling, seeds, pad_id=self.fill_id, eos_ids=self.eos_ids, together=together
        )
        found = [until_end(each, self.eos_ids) for each in ids.cpu().numpy()]
        masks = prompts["attention_mask"].bool()
        trajectories = [
            Trajectory(Prompt(0, row[mask].cpu().numpy(), text, {}, tools), 0, response, end)
            for row, mask, (text, tools), (response, end) in zip(prompts["input_ids"], masks, texts, found, strict=True)
        ]
        metrics = {}

        def policy(call: Callable[..., Any], inputs: dict[str, torch.Tensor]) -> Any:
            return call(model, {name: x.to(ids.device) for name, x in inputs.items()})

        if self.settings.kl:
            given = {name: x.to(ids.device) for name, x in self._inputs_of(trajectories).items()}
            logprobs = self.look_at_policy(model, given)["logprobs"]
            reference = self.ask_reference(policy, given)["reference"]
            kl = ((logprobs - reference) * (given["targets"] != IGNORE)).sum(1)
            metrics["kl"] = ((kl * counts).sum(), counts.sum())
        self.write_texts(trajectories)
        columns = [torch.full((len(found), self.settings.sampling.max_new_tokens), -1.0, dtype=torch.float64)]
        for i, (response, _) in enumerate(found):
            columns[0][i, : len(response)] = torch.from_numpy(response).double()
        for reward_model in self.rewards.models.values():
            scores = reward_model.scores(policy, reward_model.padded(reward_model.texts(trajectories)))
            columns.append(scores.double().cpu()[:, None])
        return LossOut(ids.new_zeros((), dtype=torch.float32), metrics, torch.cat(columns, 1))

    def scores(
        self, predictions: Mapping[int, Any], row: Callable[[int], Row]
    ) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """The rewards of all responses. predictions: see `evaluate`."""
        width, trajectories = self.settings.sampling.max_new_tokens, []
        for number, numbers in predictions.items():
            ids = np.array([i for i in numbers[:width] if i >= 0], np.int64)
            response, ended = until_end(ids, self.eos_ids)
            each = Trajectory(prompt_of(row(number), number), 0, response, ended)
            each.rewards = dict(zip(self.rewards.models, numbers[width:], strict=True))
            trajectories.append(each)
        self.write_texts(trajectories)
        self.rewards.call_functions_here(trajectories)
        raw = self.rewards.mix(trajectories)
        for each, score in zip(trajectories, raw, strict=True):
            each.score = float(score)
        shown = self.describe(trajectories, raw)
        return {**shown, "loss": -shown["reward"]}, self.samples_of(trajectories[: self.settings.show])
