"""Write the seeded networks and prompts of the PPO benchmark to a folder.

    python benchmarks/make_ppo_networks.py FOLDER [--seed 0] [--prompts 256] [--prompt-tokens 64]

policy, reward and value are Llamas of 5M parameters with random weights. reward is the policy with a LoRA adapter
merged and a scalar head; reward_adapter is the same network as an adapter, for a trainer that keeps one base for all
roles. value starts as reward. Each folder has the tokenizer. A line of prompts.jsonl has a prompt as
input_ids and as text. Needs transformers and peft only, so it runs in our environment and in TRL 1.12.0's.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

PAD, EOS, FIRST_WORD = 0, 1, 2
LORA_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj"]


def make_networks(folder: Path, seed: int, *, hidden_size: int, layers: int, vocabulary: int) -> None:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden_size,
        intermediate_size=hidden_size * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=hidden_size // 64,
        num_key_value_heads=hidden_size // 64,
        max_position_embeddings=1024,
        tie_word_embeddings=False,
        pad_token_id=PAD,
        bos_token_id=None,
        eos_token_id=EOS,
    )
    words = Tokenizer(WordLevel({f"<{i}>": i for i in range(vocabulary)}, unk_token=f"<{FIRST_WORD}>"))
    words.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token=f"<{PAD}>", eos_token=f"<{EOS}>", padding_side="left"
    )
    policy = LlamaForCausalLM(config)
    policy.save_pretrained(folder / "policy")
    adapted = get_peft_model(
        LlamaForSequenceClassification.from_pretrained(folder / "policy", num_labels=1),
        LoraConfig(task_type="SEQ_CLS", r=8, lora_alpha=16, target_modules=LORA_TARGETS),
    )
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:  # zero in a new adapter, which would make reward and policy share all their weights
            torch.nn.init.normal_(parameter, std=0.02)
        elif "modules_to_save" in name:
            torch.nn.init.normal_(parameter, std=hidden_size**-0.5)
    adapted.save_pretrained(folder / "reward_adapter")
    merged = adapted.merge_and_unload()
    for role in ("reward", "value"):
        merged.save_pretrained(folder / role)
    for role in ("policy", "reward", "value", "reward_adapter"):
        tokenizer.save_pretrained(folder / role)


def write_prompts(path: Path, seed: int, *, count: int, tokens: int, vocabulary: int) -> None:
    generator = random.Random(seed)
    prompts = [[generator.randrange(FIRST_WORD, vocabulary) for _ in range(tokens)] for _ in range(count)]
    rows = [{"input_ids": ids, "prompt": " ".join(f"<{number}>" for number in ids)} for ids in prompts]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--hidden-size", type=int, default=256, help="a multiple of 64")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--prompts", type=int, default=256, help="number of prompts")
    parser.add_argument("--prompt-tokens", type=int, default=64)
    options = parser.parse_args()
    make_networks(
        options.folder,
        options.seed,
        hidden_size=options.hidden_size,
        layers=options.layers,
        vocabulary=options.vocabulary,
    )
    write_prompts(
        options.folder / "prompts.jsonl",
        options.seed,
        count=options.prompts,
        tokens=options.prompt_tokens,
        vocabulary=options.vocabulary,
    )


if __name__ == "__main__":
    main()
