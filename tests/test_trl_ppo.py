"""The mathematics of PPO equals that of TRL 1.12.0, the last TRL with PPO, on recorded rollouts.

recorded/make_ppo_reference.py made the numbers. TRL gives the score one state after the EOS and learns a value there
too; here it is given at the EOS (docs/alignment.md). So our functions get TRL's rewards here, of one state more.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from recorded.ppo_networks import EOS, PAD, build, sha256
from support import ROOT

from ptft_dist.rl.advantages import gae, kl_per_token, whiten
from ptft_dist.rl.losses import clipped_policy_loss, clipped_value_loss, token_logprobs
from ptft_dist.rl.reward_model import read_scores
from ptft_dist.rl.rewards import shaped
from ptft_dist.rl.sampling import until_end

RECORDED: dict[str, Any] = json.loads((ROOT / "tests/recorded/trl_ppo.json").read_text())
CASES = list(RECORDED["cases"])


class Recording:
    """One case: settings, ids [B, P] and [B, R], and arrays [B, R]."""

    def __init__(self, name: str) -> None:
        case = RECORDED["cases"][name]
        self.settings, self.updates, self.after = case["settings"], case["updates"], case["after"]
        self.queries, self.responses = torch.tensor(case["query_ids"]), torch.tensor(case["response_ids"])
        self.mask = torch.tensor(case["response_mask"]).float()
        self.value_mask = torch.tensor(case["value_mask"]).float()
        self.arrays = {key: np.array(value, np.float32) for key, value in case["rollout"].items()}
        self.lengths = self.mask.sum(1).int().tolist()

    def inputs(self, rows: slice | list[int] = slice(None)) -> dict[str, torch.Tensor]:
        ids = torch.cat([self.queries, self.responses], 1)[rows]
        mask = (ids != PAD).long()
        return {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}

    def logprobs(self, model: Any, rows: slice | list[int] = slice(None)) -> torch.Tensor:
        logits = model(**self.inputs(rows)).logits[:, self.queries.shape[1] - 1 : -1]
        return token_logprobs(logits, self.responses[rows], self.settings["temperature"])[0]

    def values(self, model: Any, rows: slice | list[int] = slice(None)) -> torch.Tensor:
        hidden = model.model(**self.inputs(rows)).last_hidden_state
        values: torch.Tensor = model.score(hidden)[:, self.queries.shape[1] - 1 : -1, 0]
        return values


@pytest.fixture(params=CASES)
def recording(request: pytest.FixtureRequest) -> Recording:
    return Recording(request.param)


@pytest.mark.parametrize("role", RECORDED["networks"])
def test_the_networks_are_those_of_the_recording(role: str) -> None:
    assert sha256(build(role)) == RECORDED["networks"][role]["sha256"]


def test_log_probabilities_values_and_scores(recording: Recording) -> None:
    with torch.no_grad():
        for name, role in (("logprobs", "policy"), ("ref_logprobs", "reference")):
            ours = recording.logprobs(build(role))
            torch.testing.assert_close(
                ours * recording.mask, torch.from_numpy(recording.arrays[name]) * recording.mask, rtol=0, atol=1e-5
            )
        values = recording.values(build("value")) * recording.value_mask
        torch.testing.assert_close(values, torch.from_numpy(recording.arrays["values"]), rtol=0, atol=1e-5)
        scores = []
        for query, response, length in zip(recording.queries, recording.responses, recording.lengths, strict=True):
            ids = torch.cat([query[query != PAD], response[:length]])[None]
            scores.append(read_scores(build("reward"), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}))
    ended = np.array([EOS in response.tolist() for response in recording.responses])
    penalty = recording.settings["missing_eos_penalty"]
    lengths = np.array(recording.lengths)
    ours_scores = shaped(torch.cat(scores).numpy(), lengths, ended, missing_eos_penalty=penalty)
    np.testing.assert_allclose(ours_scores, recording.arrays["scores"], atol=1e-5)


def test_responses_end_where_trl_s_end(recording: Recording) -> None:
    for response, length in zip(recording.responses.numpy(), recording.lengths, strict=True):
        assert len(until_end(response[response != PAD], [EOS])[0]) == length


def test_kl_and_advantages(recording: Recording) -> None:
    settings, arrays = recording.settings, recording.arrays
    advantages = []
    for b, length in enumerate(recording.lengths):
        kl = kl_per_token(arrays["logprobs"][b, :length], arrays["ref_logprobs"][b, :length], settings["kl_estimator"])
        np.testing.assert_allclose(kl, arrays["kl"][b, :length], atol=1e-5)
        states = min(length + 1, arrays["rewards"].shape[1])  # with TRL's state after the EOS
        rewards = arrays["rewards"][b, :states]
        np.testing.assert_allclose(rewards[: length - 1], -settings["kl_coef"] * kl[:-1], atol=1e-6)
        ours = gae(rewards, arrays["values"][b, :states], settings["gamma"], settings["lam"])
        np.testing.assert_allclose(ours, arrays["unwhitened_advantages"][b, :states], atol=1e-5)
        np.testing.assert_allclose(ours + arrays["values"][b, :states], arrays["returns"][b, :states], atol=1e-5)
        advantages.append(ours[:length])
    for b, whitened in enumerate(whiten(advantages)):
        np.testing.assert_allclose(whitened, arrays["advantages"][b, : len(whitened)], atol=1e-5)


def test_losses_and_weights_after_every_update(recording: Recording) -> None:
    settings, arrays = recording.settings, {key: torch.from_numpy(x) for key, x in recording.arrays.items()}
    policy, value = build("policy"), build("value")
    start = {role: dict(build(role).named_parameters()) for role in ("policy", "value")}
    optimizer = torch.optim.AdamW(
        [*policy.parameters(), *value.parameters()], lr=1e-3, betas=(0.9, 0.999), weight_decay=0
    )
    assert RECORDED["optimizer"] == {"name": "AdamW", "lr": 1e-3, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0}
    for update in recording.updates:
        rows = update["rows"]
        mask, value_mask = recording.mask[rows], recording.value_mask[rows]
        clip, value_clip = settings["cliprange"], settings["cliprange_value"]
        ours = clipped_policy_loss(
            recording.logprobs(policy, rows), arrays["logprobs"][rows], arrays["advantages"][rows], mask, clip, clip
        )
        value_losses, value_metrics = clipped_value_loss(
            recording.values(value, rows), arrays["values"][rows], arrays["returns"][rows], value_mask, value_clip
        )
        policy_loss, value_loss = ours.losses.sum() / mask.sum(), value_losses.sum() / value_mask.sum()
        assert policy_loss.item() == pytest.approx(update["policy_loss"], abs=1e-5)
        assert value_loss.item() == pytest.approx(update["value_loss"], abs=1e-5)
        fractions = {"policy_clip_fraction": ours.metrics["clip_fraction"]}
        fractions["value_clip_fraction"] = value_metrics["value_clip_fraction"]
        for name, (total, count) in fractions.items():
            assert (total / count).item() == pytest.approx(update[name], abs=1e-6), name
        optimizer.zero_grad()
        (policy_loss + settings["vf_coef"] * value_loss).backward()
        optimizer.step()
    for role, model in (("policy", policy), ("value", value)):
        for name, parameter in model.named_parameters():
            expected = recording.after[role][name]
            assert parameter.norm().item() == pytest.approx(expected["norm"], rel=1e-5)
            change = (parameter - start[role][name]).norm().item()
            assert change == pytest.approx(expected["change_norm"], rel=1e-3), name
