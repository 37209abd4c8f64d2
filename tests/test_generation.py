"""Generation at evaluations: token ids of a naive loop for any batch, and an unchanged network."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from support import eval_rows, start
from tiny import made, rewritten, write_rows, write_tiny
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    BartConfig,
    BartForConditionalGeneration,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from ptft_dist.cli import generate as command
from ptft_dist.config.adapt import AdaptSection
from ptft_dist.config.tokenizer_section import TokenizerTraining
from ptft_dist.data.example_store import meta_bytes
from ptft_dist.data.store import Row
from ptft_dist.data.tokenizer import train_tokenizer
from ptft_dist.errors import RecipeError
from ptft_dist.inference.generation import Sampling, continue_prompt
from ptft_dist.networks.adapt import adapt_network
from ptft_dist.networks.adapt.peft_configs import AdapterSetup
from ptft_dist.reporting.metrics import JsonLines
from ptft_dist.tasks.common.generation import generate, generation_scores, left_padded
from ptft_dist.tasks.common.generation_settings import GenerationSettings

V, PAD, START = 40, 0, 2
LENGTH = 9
COMMON: dict[str, Any] = {"vocab_size": V, "pad_token_id": PAD, "eos_token_id": 1, "bos_token_id": None}
BART = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
BART |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_position_embeddings": 64}
LLAMA = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
NETWORKS: dict[str, tuple[Any, Any]] = {
    "t5": (
        T5ForConditionalGeneration,
        T5Config(d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2, decoder_start_token_id=START, **COMMON),
    ),
    "bart": (
        BartForConditionalGeneration,
        BartConfig(decoder_start_token_id=START, forced_eos_token_id=None, **BART, **COMMON),
    ),
    "llama": (LlamaForCausalLM, LlamaConfig(max_position_embeddings=64, **LLAMA, **COMMON)),
    "gpt2": (GPT2LMHeadModel, GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=64, **COMMON)),
}


def network(name: str) -> PreTrainedModel:
    """Random weights that give high probabilities to varying tokens, so that texts do not repeat one token."""
    made, config = NETWORKS[name]
    torch.manual_seed(3)
    model: PreTrainedModel = made(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.4)
    model.config.use_cache = False
    return model


def prompts(count: int = 5) -> list[np.ndarray]:
    chance = np.random.default_rng(0)
    return [chance.integers(3, V, size=int(chance.integers(2, 12))) for _ in range(count)]


def batch_of(model: PreTrainedModel, rows: Sequence[np.ndarray]) -> dict[str, torch.Tensor]:
    """As a task gives them: padded on the right for an encoder, on the left for a decoder."""
    if not model.config.is_encoder_decoder:
        return left_padded(rows, PAD)
    width = max(map(len, rows))
    ids = torch.tensor([[*row, *[PAD] * (width - len(row))] for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    return {"input_ids": ids, "attention_mask": mask}


@torch.no_grad()
def naive(model: PreTrainedModel, prompt: np.ndarray, eos: Sequence[int]) -> list[int]:
    """Greedy decoding of one row at a time, without a cache."""
    source, written = torch.from_numpy(prompt)[None], [START]
    while len(written) <= LENGTH and (len(written) == 1 or written[-1] not in eos):
        if model.config.is_encoder_decoder:
            logits = model(input_ids=source, decoder_input_ids=torch.tensor([written])).logits
        else:
            logits = model(input_ids=torch.cat([source, torch.tensor([written[1:]], dtype=torch.long)], 1)).logits
        written.append(int(logits[0, -1].argmax()))
    return written[1:]


def ends(model: PreTrainedModel) -> list[int]:
    """Two tokens that some row writes in its middle, to be its end."""
    free = [naive(model, prompt, []) for prompt in prompts()]
    return [free[0][3], free[1][5]]


@pytest.mark.parametrize("name", NETWORKS)
def test_greedy_is_the_naive_loop(name: str) -> None:
    model, settings = network(name), GenerationSettings(max_new_tokens=LENGTH)
    eos = ends(model)
    expected = [naive(model, prompt, eos) for prompt in prompts()]
    assert len({len(ids) for ids in expected}) > 1, "all rows are of one length: a weak test"
    found = generate(model, batch_of(model, prompts()), settings, pad_id=PAD, eos_ids=eos)
    assert found.tolist() == [ids + [PAD] * (LENGTH - len(ids)) for ids in expected]


@pytest.mark.parametrize("name", NETWORKS)
def test_beams_are_those_of_each_row_alone(name: str) -> None:
    """transformers' own beam search, one unpadded row at a time and without a cache."""
    model, settings = network(name), GenerationSettings(max_new_tokens=LENGTH, num_beams=3)
    eos = ends(model)
    found = generate(model, batch_of(model, prompts()), settings, pad_id=PAD, eos_ids=eos)
    options = {"num_beams": 3, "max_new_tokens": LENGTH, "eos_token_id": eos, "use_cache": False, "pad_token_id": PAD}
    differs = False
    for prompt, ids in zip(prompts(), found.tolist(), strict=True):
        alone = model.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), **options)[0].tolist()
        alone = alone[1 if model.config.is_encoder_decoder else len(prompt) :]
        assert ids == alone + [PAD] * (LENGTH - len(alone))
        differs |= ids[: len(alone)] != naive(model, prompt, eos)
    assert differs, "beams find what greedy finds: a weak test"


@pytest.mark.parametrize("method", ["prompt_tuning", "p_tuning", "prefix_tuning"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_virtual_tokens_stand_right_before_each_prompt(name: str, method: str) -> None:
    """Padding on the left is between them, and must not move a prompt away from them."""
    section = AdaptSection.model_validate({method: {"tokens": 3}})
    setup = AdapterSetup("CAUSAL_LM", "nowhere", None, 10, (), "nowhere", 0)
    model = adapt_network(network(name), section, setup).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.4)
    found = generate(
        model, batch_of(model, prompts()), GenerationSettings(max_new_tokens=LENGTH), pad_id=PAD, eos_ids=[]
    )
    assert found.tolist() == [naive(model, prompt, []) for prompt in prompts()]


@pytest.mark.parametrize("name", ["t5", "llama"])
def test_all_rows_that_end_early_still_have_the_full_width(name: str) -> None:
    model = network(name)
    first = naive(model, prompts(1)[0], [])[0]
    found = generate(
        model, batch_of(model, prompts(1)), GenerationSettings(max_new_tokens=LENGTH), pad_id=PAD, eos_ids=[first]
    )
    assert found.tolist() == [[first] + [PAD] * (LENGTH - 1)]


@pytest.mark.parametrize("name", NETWORKS)
def test_a_prompt_is_read_with_its_padding_tokens(name: str) -> None:
    """`ptft generate` and `ptft chat`: PAD may be UNK, or stand in the text."""
    model, prompt = network(name), np.array([7, 5, 9, 11, 5, 20, 8])
    tokenizer: Any = SimpleNamespace(pad_token_id=5, eos_token_id=1)
    found = continue_prompt(model, tokenizer, torch.from_numpy(prompt)[None], Sampling(LENGTH, 0.0, 1.0, 0)).tolist()
    expected = naive(model, prompt, [1])
    assert found == ([START] if model.config.is_encoder_decoder else prompt.tolist()) + expected


@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize(
    "own",
    [
        {"min_length": 7},
        {"encoder_repetition_penalty": 9.0, "repetition_penalty": 3.0},
        {"no_repeat_ngram_size": 1},
        {"encoder_no_repeat_ngram_size": 1},
        {"min_length": 20, "min_new_tokens": 5},
    ],
)
def test_penalties_of_a_decoder_do_not_count_padding(own: dict[str, Any], beams: int) -> None:
    """Those of each row alone, as transformers applies them. PAD is the end of a text, as in many chat models."""
    model, settings = network("llama"), GenerationSettings(max_new_tokens=LENGTH, num_beams=beams)
    end = naive(model, prompts()[2], [])[2]
    options = {"num_beams": beams, "max_new_tokens": LENGTH, "eos_token_id": end, "pad_token_id": end}
    rows = prompts()

    def alone() -> list[list[int]]:
        texts = [
            model.generate(torch.from_numpy(row)[None], attention_mask=torch.ones(1, len(row)), **options)[
                0, len(row) :
            ]
            for row in rows
        ]
        return [[*text.tolist(), *[end] * (LENGTH - len(text))] for text in texts]

    plain = alone()
    model.generation_config.update(**own)
    expected = alone()
    assert expected != plain
    found = generate(model, left_padded(rows, end), settings, pad_id=end, eos_ids=[end])
    assert found.tolist() == expected


@pytest.mark.parametrize("name", ["t5", "llama"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_tokens_are_chosen_as_the_user_says(name: str, temperature: float) -> None:
    """`ptft generate` and `ptft chat`: neither top_k 50, transformers' default, nor what the network brings along."""
    model, text = network(name), torch.from_numpy(prompts(1)[0])[None]
    tokenizer: Any = SimpleNamespace(pad_token_id=PAD, eos_token_id=1)

    def sampled() -> list[int]:
        torch.manual_seed(0)
        return continue_prompt(model, tokenizer, text, Sampling(LENGTH, temperature, 1.0, 0)).tolist()

    own = model.generation_config
    own.top_k, own.do_sample = 0, True
    expected = sampled()
    for changes in (
        {"top_k": 1},
        {"top_k": 0, "min_p": 0.9, "typical_p": 0.1, "eta_cutoff": 0.9, "epsilon_cutoff": 0.9, "top_h": 0.1},
        {"num_beams": 3, "num_return_sequences": 2, "return_dict_in_generate": True},
    ):
        own.update(**changes)
        assert sampled() == expected
    if not temperature:
        begin = [START] if model.config.is_encoder_decoder else text[0].tolist()
        assert expected == begin + naive(model, text[0].numpy(), [1])


def test_stop_strings_of_a_network_and_the_end_of_a_turn_end_its_texts(tmp_path: Path) -> None:
    tokenizer = exported(tmp_path, "llama")
    model = LlamaForCausalLM.from_pretrained(tmp_path)
    own, prompt = model.generation_config, np.array(tokenizer("one two").input_ids)
    own.suppress_tokens = [i for token, i in tokenizer.get_vocab().items() if not (token.isascii() and token.isalpha())]

    def written(*, chat: bool = False) -> list[int]:
        ids, greedy = torch.from_numpy(prompt)[None], Sampling(LENGTH, 0.0, 1.0, 0)
        return continue_prompt(model, tokenizer, ids, greedy, chat=chat)[len(prompt) :].tolist()

    free = written()
    own.stop_strings = tokenizer.convert_ids_to_tokens(free[2])
    expected = free[: free.index(free[2]) + 1]
    assert written() == expected != free
    settings = GenerationSettings(max_new_tokens=LENGTH)
    found = generate(model, left_padded([prompt], PAD), settings, pad_id=PAD, eos_ids=[1], tokenizer=tokenizer)
    assert found[0].tolist() == expected + [PAD] * (LENGTH - len(expected))
    end, own.stop_strings = own.stop_strings, None
    tokenizer.add_special_tokens({"additional_special_tokens": [end]})
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}" + end + "{% endfor %}"
    assert (written(), written(chat=True)) == (free, expected)


@pytest.mark.parametrize("name", NETWORKS)
def test_nothing_is_changed_and_nothing_drawn(name: str) -> None:
    model, settings = network(name), GenerationSettings(max_new_tokens=LENGTH, num_beams=2)
    before = model.config.to_json_string(), model.generation_config.to_json_string(), torch.get_rng_state()
    generate(model, batch_of(model, prompts()), settings, pad_id=PAD, eos_ids=[1])
    after = model.config.to_json_string(), model.generation_config.to_json_string()
    assert after == before[:2]
    assert model.config.use_cache is False
    assert not model.training
    assert torch.equal(torch.get_rng_state(), before[2])


def test_the_cache_is_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each step but the first reads one token, although training has switched the cache off."""
    model = network("llama")
    widths, forward = [], model.forward

    def counted(*args: Any, **kwargs: Any) -> Any:
        widths.append(kwargs["input_ids"].shape[1])
        return forward(*args, **kwargs)

    counted.__signature__ = __import__("inspect").signature(forward)  # type: ignore[attr-defined]
    monkeypatch.setattr(model, "forward", counted)
    rows = prompts()
    generate(model, batch_of(model, rows), GenerationSettings(max_new_tokens=4), pad_id=PAD, eos_ids=[])
    assert widths == [max(map(len, rows)), 1, 1, 1]


def test_what_a_network_brings_along() -> None:
    """Sampling, returning several texts and its own lengths are not used; tokens that it must write are."""
    model = network("t5")
    eos = [1]
    expected = naive(model, prompts(1)[0], eos)
    own = model.generation_config
    own.do_sample, own.temperature, own.top_k, own.num_beams, own.num_return_sequences, own.max_length = (
        True,
        5.0,
        3,
        4,
        2,
        3,
    )
    settings = GenerationSettings(max_new_tokens=LENGTH)
    found = generate(model, batch_of(model, prompts(1)), settings, pad_id=PAD, eos_ids=eos)
    assert found.tolist() == [expected + [PAD] * (LENGTH - len(expected))]
    own.forced_bos_token_id = 7
    assert generate(model, batch_of(model, prompts(1)), settings, pad_id=PAD, eos_ids=eos)[0, 0] == 7


def test_gradient_checkpointing_does_not_touch_it() -> None:
    model = network("t5")
    settings = GenerationSettings(max_new_tokens=LENGTH)
    plain = generate(model, batch_of(model, prompts()), settings, pad_id=PAD, eos_ids=[1])
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert torch.equal(generate(model, batch_of(model, prompts()), settings, pad_id=PAD, eos_ids=[1]), plain)


def test_under_autocast() -> None:
    """As mixed precision runs it; the texts of a network that is sure of itself are hardly touched by bf16."""
    model, settings = network("llama"), GenerationSettings(max_new_tokens=LENGTH)
    plain = generate(model, batch_of(model, prompts()), settings, pad_id=PAD, eos_ids=[1])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = generate(model, batch_of(model, prompts()), settings, pad_id=PAD, eos_ids=[1])
    assert mixed.shape == plain.shape
    assert mixed.dtype == torch.int64
    assert (mixed[:, :2] == plain[:, :2]).float().mean() > 0.7


def test_left_padding_by_hand() -> None:
    found = left_padded([np.array([5, 6, 7]), np.array([8])], 9)
    assert found["input_ids"].tolist() == [[5, 6, 7], [9, 9, 8]]
    assert found["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]
    assert left_padded([np.array([5])], 9, 4)["input_ids"].tolist() == [[9, 9, 9, 5]]


def test_scores_and_samples() -> None:
    """Special tokens are not text, references are the data's own, and samples are the first rows."""
    texts = ["one two three", "vier fünf", "六七"]
    tokenizer = train_tokenizer(TokenizerTraining(vocab_size=300), texts * 9, ("eos", "pad"))
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    metas = [{"source": text.upper(), "reference": text} for text in [*texts, "never"]]
    rows = {
        4 + i: Row(np.zeros(1), np.zeros(1), {"meta": np.frombuffer(meta_bytes(m), np.uint8)})
        for i, m in enumerate(metas)
    }
    written = {4 + i: [*tokenizer(text).input_ids, eos, pad, pad] for i, text in enumerate(texts)} | {7: [eos, pad]}
    settings = GenerationSettings(metrics=("exact_match",), show=2)
    scores, samples = generation_scores(tokenizer, settings, written, rows.__getitem__)
    assert scores == {"exact_match": 3 / 4}
    assert samples == [
        {"row": 4, "source": "ONE TWO THREE", "reference": "one two three", "prediction": "one two three"},
        {"row": 5, "source": "VIER FÜNF", "reference": "vier fünf", "prediction": "vier fünf"},
    ]
    json.dumps(samples)


def test_samples_of_every_script_are_readable_and_cut_at_a_resume(tmp_path: Path) -> None:
    path, texts = tmp_path / "samples.jsonl", ["高祖东进", "a\u2028b\x85c\nd", "\ud800 half", "später"]
    file = JsonLines(path, 0, -1)
    for step, text in enumerate(texts, start=1):
        file.write({"step": step, "prediction": text})
    file.close()
    assert "高祖东进" in path.read_text(encoding="utf-8")
    with path.open("ab") as torn:
        torn.write('{"step": 1, "prediction": "高'.encode()[:-1])  # a kill in the middle of a character
    again = JsonLines(path, 3, 3)
    again.write({"step": 4, "prediction": "von vorn"})
    again.close()
    found = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]
    assert [row["step"] for row in found] == [1, 2, 3, 4]
    assert [row["prediction"] for row in found] == [*texts[:3], "von vorn"]


# --- ptft generate ----------------------------------------------------------------------------------------------------


def exported(folder: Path, name: str, *, template: str | None = None, pad: int | None = None) -> Any:
    """A random network and a learned tokenizer, as an export has them. template: what the tokenizer adds to a text;
    pad: the token with this id becomes PAD."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = train_tokenizer(TokenizerTraining(vocab_size=300), ["one two three vier"] * 9, ("bos", "eos"))
    if template is not None:
        special = [(token, tokenizer.convert_tokens_to_ids(token)) for token in tokenizer.all_special_tokens]
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=special)
    if pad is not None:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad)
    kind, config = NETWORKS[name]
    torch.manual_seed(0)
    model = kind(type(config)(**config.to_dict() | {"vocab_size": len(tokenizer)}))
    model.config.architectures = [kind.__name__]
    if name == "t5":
        model.config.task_specific_params = {"ptft": {"prefix": "translate: "}}
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return tokenizer


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[int], dict[str, Any]]]:
    """The ids and options of each call of generate, which returns its input."""
    from transformers.generation.utils import GenerationMixin

    seen: list[tuple[list[int], dict[str, Any]]] = []

    def generate(_model: Any, input_ids: torch.Tensor, **options: Any) -> torch.Tensor:
        seen.append((input_ids[0].tolist(), options))
        return input_ids

    monkeypatch.setattr(GenerationMixin, "generate", generate)
    return seen


@pytest.mark.parametrize("template", [None, "<|bos|> $A", "<|bos|> $A <|endoftext|>"])
def test_a_prompt_begins_with_what_the_tokenizer_adds(tmp_path: Path, calls: Any, template: str | None) -> None:
    tokenizer = exported(tmp_path, "llama", template=template)
    command.generate(tmp_path, "one two", max_new_tokens=2, temperature=0.0)
    begin = [] if template is None else [tokenizer.bos_token_id]
    assert calls[0][0] == [*begin, *tokenizer("one two", add_special_tokens=False).input_ids]


@pytest.mark.parametrize(
    ("name", "prompt", "new"), [("gpt2", "one two", 64), ("bart", "one two " * 60, 4)], ids=["gpt2", "bart"]
)
def test_a_text_longer_than_the_position_table_is_refused(tmp_path: Path, name: str, prompt: str, new: int) -> None:
    exported(tmp_path, name)
    with pytest.raises(
        RecipeError, match=rf"^prompt: it has .* up to {new}: more than the model's .* \(64\)\. Shorten"
    ):
        command.generate(tmp_path, prompt, max_new_tokens=new, temperature=0.0)
    if name == "gpt2":
        command.generate(tmp_path, prompt, max_new_tokens=new - 1, temperature=0.0)


@pytest.mark.parametrize(("pad", "expected"), [(0, 0), (5, 5), (None, None)])
def test_pad_0_is_a_pad(tmp_path: Path, calls: Any, pad: int | None, expected: int | None) -> None:
    tokenizer = exported(tmp_path, "llama", pad=pad)
    command.generate(tmp_path, "one two", max_new_tokens=2, temperature=0.0)
    assert calls[0][1]["pad_token_id"] == (tokenizer.eos_token_id if expected is None else expected)


def test_a_source_gets_the_prefix_of_its_training(tmp_path: Path, calls: Any) -> None:
    tokenizer = exported(tmp_path, "t5", pad=0)
    command.generate(tmp_path, "one two", max_new_tokens=2, temperature=0.0)
    assert calls[0][0] == [*tokenizer("translate: one two").input_ids, tokenizer.eos_token_id]
    command.generate(tmp_path, "one two", max_new_tokens=2, temperature=0.0, raw=True)
    assert calls[1][0] == [*tokenizer("one two").input_ids, tokenizer.eos_token_id]


# --- whole runs -------------------------------------------------------------------------------------------------------


def thirteen(folder: Path, **changes: Any) -> Path:
    """The tiny recipe with 13 validation rows of their own, all of them shown."""
    path = write_tiny(folder, "seq2seq")
    write_rows(folder / "validation.jsonl", made(13, rewritten))
    raw = json.loads(path.read_text()) | changes
    raw["data"]["validation"] = [{"path": "validation.jsonl"}]
    raw["seq2seq"]["generation"] = {"max_new_tokens": 10, "show": 100}
    path.write_text(json.dumps(raw))
    return path


def samples(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "samples.jsonl").read_text().splitlines()]


def test_every_row_is_written_once_whatever_the_ranks_and_batches(tmp_path: Path, cache: Path) -> None:
    thirteen(tmp_path, train={"max_steps": 4, "precision": "fp32"}, eval={"every": 2})
    runs = {"whole": (1, "cpu", []), "one": (1, "cpu", ["eval.micro_size=1"]), "two": (2, "cpu", ["eval.micro_size=4"])}
    runs["sharded"] = (2, "cpu_zero3", ["eval.micro_size=2"])  # ranks whose rows end at different steps
    for name, (ranks, kind, more) in runs.items():
        run = start("train", "recipe.yaml", f"run_dir={name}", *more, cwd=tmp_path, cache=cache, ranks=ranks, kind=kind)
        assert run.wait() == 0, run.stderr
    expected = samples(tmp_path / "whole")
    assert [(row["step"], row["row"]) for row in expected] == [(step, row) for step in (2, 4) for row in range(13)]
    rows = made(13, rewritten)
    assert [{"source": s["source"], "target": s["reference"]} for s in expected[:13]] == rows
    assert len({len(row["prediction"]) for row in expected[13:]}) > 1
    for name in ("one", "two", "sharded"):
        assert samples(tmp_path / name) == expected
        for row, other in zip(eval_rows(tmp_path / name), eval_rows(tmp_path / "whole"), strict=True):
            assert row == pytest.approx(other, rel=1e-5)
    assert eval_rows(tmp_path / "whole")[-1]["eval/exact_match"] == pytest.approx(
        sum(row["prediction"].strip() == row["reference"] for row in expected[13:]) / 13
    )


def test_the_exported_model_writes_the_samples(tmp_path: Path, cache: Path) -> None:
    """Loaded with transformers alone, from the run's last evaluation."""
    thirteen(
        tmp_path,
        model={"config": {"model_type": "bart", "dropout": 0.0, **BART}},
        train={"max_steps": 4, "precision": "fp32"},
    )
    run = start("train", "recipe.yaml", cwd=tmp_path, cache=cache)
    assert run.wait() == 0, run.stderr
    model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "run/model").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run/model")
    for sample in samples(tmp_path / "run"):
        ids = torch.tensor([[*tokenizer(sample["source"]).input_ids[:31], tokenizer.eos_token_id]])
        written = model.generate(ids, max_new_tokens=10)[0]
        assert tokenizer.decode(written, skip_special_tokens=True) == sample["prediction"]


def test_a_resume_cuts_the_samples_behind_its_checkpoint(tmp_path: Path, cache: Path) -> None:
    thirteen(tmp_path, eval={"every": 2})
    whole = start("train", "recipe.yaml", cwd=tmp_path, cache=cache)
    assert whole.wait() == 0, whole.stderr
    expected = samples(tmp_path / "run")
    assert {row["step"] for row in expected} == {2, 4, 6, 8}
    shutil.rmtree(tmp_path / "run/checkpoints/step-00000008")
    with (tmp_path / "run/samples.jsonl").open("a") as file:
        file.write('{"step": 8, "row": 0, "torn')  # as a kill leaves it
    again = start("train", "recipe.yaml", cwd=tmp_path, cache=cache)
    assert again.wait() == 0, again.stderr
    assert "update 4 of 8" in again.stderr
    assert samples(tmp_path / "run") == expected
