"""The four tiny networks of trl_ppo.json, built alike in TRL's environment and in ours.

Weights follow from a parameter's name and the network's seed alone, by a generator that NumPy has frozen. So neither
the version of transformers nor the order of its initialization matters; the recorded sha256 shows that both sides
agree.
"""

from __future__ import annotations

import hashlib
import zlib
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedModel

PAD, EOS = 1, 2
"""Token ids. Id 0 is an ordinary token, and the pad token is a token of its own."""
CONFIG: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "pad_token_id": PAD,
    "eos_token_id": EOS,
    "bos_token_id": 3,
    "attn_implementation": "eager",
}
NOISE: dict[str, dict[int, float]] = {
    "policy": {1: 1.0},
    "reference": {1: 0.9, 2: 0.25},
    "reward": {3: 1.0},
    "value": {4: 1.0},
}
"""Role -> seed -> weight of its noise. The reference is the policy, perturbed."""


def build(role: str) -> PreTrainedModel:
    """The network of a role, fp32, on CPU. Reward and value networks have a scalar head."""
    if role in ("policy", "reference"):
        model: PreTrainedModel = LlamaForCausalLM(LlamaConfig(**CONFIG))
    else:
        model = LlamaForSequenceClassification(LlamaConfig(**CONFIG, num_labels=1))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = sum(share * uniform(seed, name, parameter.shape) for seed, share in NOISE[role].items())
            values = 1 + noise / 2 if name.endswith("norm.weight") else noise
            parameter.copy_(torch.from_numpy(values.astype(np.float32)))
    return model.eval()


def uniform(seed: int, name: str, shape: torch.Size) -> np.ndarray[Any, Any]:
    generator = np.random.RandomState(zlib.crc32(f"{seed} {name}".encode()))
    return generator.uniform(-0.5, 0.5, size=tuple(shape))


def sha256(model: torch.nn.Module) -> str:
    """Digest of names and fp32 bytes of all parameters, by name."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        digest.update(name.encode())
        digest.update(parameter.detach().numpy().astype("<f4").tobytes())
    return digest.hexdigest()


def summary(before: torch.nn.Module, after: torch.nn.Module) -> dict[str, dict[str, Any]]:
    """Parameter name -> norms of its values and of their change, and its first values, to compare after training."""
    started = {name: parameter.detach().double() for name, parameter in before.named_parameters()}
    ended = {name: parameter.detach().double() for name, parameter in after.named_parameters()}
    return {
        name: {
            "norm": ended[name].norm().item(),
            "change_norm": (ended[name] - started[name]).norm().item(),
            "first": ended[name].flatten()[:3].tolist(),
        }
        for name in sorted(ended)
    }
