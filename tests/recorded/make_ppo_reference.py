"""Write trl_ppo.json: what the PPOTrainer of TRL 1.12.0, the last TRL with PPO, computes on recorded rollouts.

    python3 -m venv /path/to/trl112
    /path/to/trl112/bin/pip install torch==2.13.0 trl==1.12.0 transformers==5.23.0 accelerate==1.15.0 datasets==5.2.0 \\
        peft==0.21.2 numpy==2.4.6
    /path/to/trl112/bin/python tests/recorded/make_ppo_reference.py [--out tests/recorded/trl_ppo.json]

TRL's own code runs: PPOTrainer.train for one batch. Three things are replaced or watched, and no formula is repeated
here: the sampler of transformers' generate() returns the recorded tokens, np.random.permutation and masked_whiten
write down what passes through them, and PPOTrainer.log reads the local variables of train(). A second run writes the
same file.

Conventions of TRL 1.12.0 (B rollouts, T = response_length, t counts response tokens from 0):

- Tokens. Prompts are padded on the left, responses on the right, with pad_token_id. attention_mask is `ids !=
  pad_token_id`, position ids count real tokens from 0, and pad tokens enter the network as id 0. If stop_token is
  set, a response is cut after its first stop token. Let L be the index of its last token, the stop token included:
  the first pad minus 1, or T - 1 without pad.
- Masks, written here as True = contributes. response_mask (TRL: ~padding_mask) is t <= L. value_mask (TRL:
  ~padding_mask_p1) is t <= L + 1: one position more, the state after the stop token.
- values[t] is read at the token before response token t, values[0] at the last prompt token. So values[L + 1] is the
  value of the finished response. Values outside value_mask are 0. The head reads the last hidden state, after the
  final norm.
- logprobs come from the scores of generate(), that is logits / (temperature + 1e-7); ref_logprobs and the logprobs of
  an update divide by temperature + 1e-7 as well. Outside response_mask all three are 1.0, so their differences are 0.
  The entropy is that of the scaled logits, too.
- The score is the reward head at token L. missing_eos_penalty is subtracted if the response has no
  tokenizer.eos_token_id; a custom stop token does not count as one. Scores are neither normalized nor clipped.
- KL per token, with d = ref_logprobs - logprobs: k1 is -d; k3 is exp(d) - 1 - d. rewards = -kl_coef * kl at all t <=
  L, the stop token included.
- The score is added at L + 1, one after the stop token, where KL is 0. Only if L = T - 1 it is added at L.
  whiten_rewards (not recorded) then divides by the standard deviation over value_mask, and keeps the mean.
- GAE runs backwards over all T columns with next value 0 after column T - 1. Since the score lies at L + 1, the last
  action is bootstrapped with values[L + 1] and gets the score only by the factor gamma * lam.
- returns = unwhitened advantages + values. They count in value_mask.
- Advantages are whitened once per batch (not per minibatch, and on each rank by itself) over response_mask: minus
  mean, times rsqrt(variance + 1e-8), variance with n - 1. Outside response_mask they are 0 afterwards.
- Minibatches: np.random.permutation of the rank's rollouts in each epoch, cut into num_mini_batches equal parts.
- Policy loss: mean over response_mask of max(-A * ratio, -A * clamp(ratio, 1 - cliprange, 1 + cliprange)). Value
  loss: 0.5 * mean over value_mask of max((v - R)^2, (clamp(v, v_old - cliprange_value, v_old + cliprange_value) -
  R)^2). Loss: policy loss + vf_coef * value loss; no entropy bonus.
- Clip fractions are means over the same two masks of "the second term is strictly larger". approxkl (half the mean
  square of the difference of logprobs), entropy and ratio are means over ALL T columns, padding included.
- Means are taken per micro-batch, then averaged over gradient_accumulation_steps: with several micro-batches, tokens
  of short responses weigh more. gradient_accumulation_steps counts the micro-batches of the whole batch, so with more
  than one the optimizer steps once per epoch, whatever num_mini_batches is; in the dataloader's last batch it steps
  after every micro-batch, with the gradient still divided. We record gradient_accumulation_steps = 1: one step per
  minibatch.
- No gradient clipping (max_grad_norm is not read). The learning rate changes once per batch. Dropout modules are set
  to 0.
- One optimizer trains policy and value network together.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import accelerate
import numpy as np
import torch
import transformers
import trl
from datasets import Dataset
from ppo_networks import CONFIG, EOS, NOISE, PAD, build, sha256, summary
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

QUERIES = [
    [17, 40, 9, 33, 21, 50],
    [12, 44, 8],
    [60, 5, 31, 0],
    [22, EOS, 47, 13, 29],  # a stop token of the prompt ends no response
    [7, 7, 38, 55, 16, 4],
    [41, 19, 26],
    [0, 63, 52, 11],
    [35, 24, 3, 58, 45],
]
"""Prompts of different lengths. TRL's dataloader shuffles them; the file has the order in which they were used."""
RESPONSES = [
    [14, 39, 27, EOS],
    [6, 51, 30, 48, 23, 10, 57, 36, 42, EOS],  # the last token is the stop token: no column after it
    [EOS],
    [18, 62, 34, 20, 0, 53, 28, 46, EOS],  # one column after the stop token
    [49, 15, 61, 37, 25, 43, 56, 32, 59, 54],  # no stop token
    [33, 9, EOS],
    [21, 0, 45, 16, 50, 12, EOS],
    [5, 5, 60, 41, 8, 29, 44, 31, 13, 47],  # no stop token
]
LENGTH = max(map(len, RESPONSES))
CASES: dict[str, dict[str, Any]] = {
    "k1": {
        "kl_estimator": "k1",
        "kl_coef": 0.05,
        "gamma": 1.0,
        "lam": 0.95,
        "cliprange": 0.2,
        "cliprange_value": 0.2,
        "vf_coef": 0.1,
        "temperature": 0.7,
        "missing_eos_penalty": 1.0,
        "whiten_rewards": False,
        "num_mini_batches": 2,
        "num_ppo_epochs": 2,
    },
    "k3": {
        "kl_estimator": "k3",
        "kl_coef": 0.2,
        "gamma": 0.97,
        "lam": 0.9,
        "cliprange": 0.1,
        "cliprange_value": 0.05,
        "vf_coef": 0.5,
        "temperature": 1.0,
        "missing_eos_penalty": None,
        "whiten_rewards": False,
        "num_mini_batches": 4,
        "num_ppo_epochs": 2,
    },
}
OPTIMIZER = {"name": "AdamW", "lr": 1e-3, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.0}
STATISTICS = {
    "policy_loss": "pg_loss_stats",
    "value_loss": "vf_loss_stats",
    "policy_clip_fraction": "pg_clipfrac_stats",
    "value_clip_fraction": "vf_clipfrac_stats",
    "approxkl": "approxkl_stats",
    "entropy": "entropy_stats",
    "ratio": "ratio_stats",
}


class RecordingTrainer(PPOTrainer):
    """Keeps the local variables of train() at the end of a batch."""

    def log(self, logs: dict[str, float], *_: Any, **__: Any) -> None:
        self.seen = dict(sys._getframe(1).f_locals)
        self.logged = dict(logs)


@contextmanager
def recorded_tokens() -> Iterator[None]:
    """Let generate() sample the recorded responses, column by column."""
    padded = [response + [PAD] * (LENGTH - len(response)) for response in RESPONSES]
    columns = iter(torch.tensor(padded).T.unsqueeze(-1))
    with patch.object(torch, "multinomial", lambda *_, **__: next(columns)):
        yield
    assert next(columns, None) is None, "generate() did not use all columns"


@contextmanager
def watched(owner: Any, name: str, calls: list[Any]) -> Iterator[None]:
    """Append (arguments, result) of each call."""
    plain = getattr(owner, name)

    def call(*arguments: Any, **keywords: Any) -> Any:
        result = plain(*arguments, **keywords)
        calls.append((arguments, result))
        return result

    with patch.object(owner, name, call):
        yield


def tokenizer() -> PreTrainedTokenizerFast:
    words = {f"<{number}>": number for number in range(CONFIG["vocab_size"])}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words)), pad_token=f"<{PAD}>", eos_token=f"<{EOS}>", padding_side="left"
    )


def record(settings: dict[str, Any], folder: str) -> dict[str, Any]:
    """One batch of PPOTrainer with these settings."""
    networks = {role: build(role) for role in NOISE}
    arguments = PPOConfig(
        **settings,
        output_dir=folder,
        response_length=LENGTH,
        stop_token="eos",
        total_episodes=len(QUERIES),
        per_device_train_batch_size=len(QUERIES),
        gradient_accumulation_steps=1,
        local_rollout_forward_batch_size=len(QUERIES),
        num_sample_generations=0,
        bf16=False,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        seed=0,
    )
    trained = [*networks["policy"].parameters(), *networks["value"].parameters()]
    optimizer = torch.optim.AdamW(trained, **{key: value for key, value in OPTIMIZER.items() if key != "name"})
    trainer = RecordingTrainer(
        arguments,
        tokenizer(),
        networks["policy"],
        networks["reference"],
        networks["reward"],
        Dataset.from_dict({"input_ids": QUERIES}),
        networks["value"],
        optimizers=(optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)),
    )
    np.random.seed(0)
    permutations: list[Any] = []
    whitened: list[Any] = []
    with (
        recorded_tokens(),
        watched(np.random, "permutation", permutations),
        watched(ppo_trainer, "masked_whiten", whitened),
    ):
        trainer.train()
    seen = trainer.seen
    assert len(whitened) == 1, "only the advantages are whitened"
    assert len(permutations) == settings["num_ppo_epochs"]
    arrays = {name: seen[name] for name in ("logprobs", "ref_logprobs", "values", "scores", "kl", "rewards", "returns")}
    arrays |= {"unwhitened_advantages": whitened[0][0][0], "advantages": seen["advantages"]}
    return {
        "settings": settings,
        "query_ids": seen["queries"].tolist(),
        "response_ids": seen["responses"].tolist(),
        "response_mask": (~seen["padding_mask"]).int().tolist(),
        "value_mask": (~seen["padding_mask_p1"]).int().tolist(),
        "rollout": {name: array.tolist() for name, array in arrays.items()},
        "updates": updates(settings, [result for _, result in permutations], seen),
        "logged": {name: trainer.logged[name] for name in sorted(trainer.logged) if "/" in name},
        "after": {role: summary(build(role), networks[role]) for role in ("policy", "value")},
    }


def updates(settings: dict[str, Any], orders: list[Any], seen: dict[str, Any]) -> list[dict[str, Any]]:
    """One entry per optimizer step: the rollouts of its minibatch, and the statistics."""
    size = len(QUERIES) // settings["num_mini_batches"]
    return [
        {
            "epoch": epoch,
            "minibatch": minibatch,
            "rows": order[minibatch * size : (minibatch + 1) * size].tolist(),
            **{name: seen[variable][epoch, minibatch, 0].item() for name, variable in STATISTICS.items()},
        }
        for epoch, order in enumerate(orders)
        for minibatch in range(settings["num_mini_batches"])
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("trl_ppo.json"))
    options = parser.parse_args()
    assert trl.__version__ == "1.12.0", f"this is TRL {trl.__version__}; see the head of this file"
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    packages = (torch, transformers, accelerate, trl, np)
    with tempfile.TemporaryDirectory() as folder:
        cases = {name: record(settings, folder) for name, settings in CASES.items()}
    written = {
        "made_by": "tests/recorded/make_ppo_reference.py",
        "versions": {package.__name__: package.__version__.split("+")[0] for package in packages},
        "networks": {role: {"sha256": sha256(build(role))} for role in NOISE},
        "config": CONFIG,
        "optimizer": OPTIMIZER,
        "cases": cases,
    }
    options.out.write_text(pretty(written) + "\n", encoding="utf-8")
    print(f"wrote {options.out}: {options.out.stat().st_size:,} bytes")


def pretty(value: Any, indent: str = "") -> str:
    """JSON with a line for each list of numbers, so that a difference is readable."""
    if isinstance(value, dict) and value:
        inner = [f"{indent}  {json.dumps(key)}: {pretty(item, indent + '  ')}" for key, item in value.items()]
        return "{\n" + ",\n".join(inner) + f"\n{indent}}}"
    if isinstance(value, list) and value and isinstance(value[0], list | dict):
        inner = [f"{indent}  {pretty(item, indent + '  ')}" for item in value]
        return "[\n" + ",\n".join(inner) + f"\n{indent}]"
    return json.dumps(value)


if __name__ == "__main__":
    main()
