"""Preference rows: shapes, token ids compared with TRL's, truncation, and broken rows."""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace
from typing import Any

import pytest
from tiny import WORDS
from transformers import PreTrainedTokenizerFast

from ptft_dist.config.tokenizer_section import TokenizerTraining
from ptft_dist.data.encoder import EncoderContext, Example, LeftOut, RowError
from ptft_dist.data.formats import Record
from ptft_dist.data.tokenizer import train_tokenizer
from ptft_dist.errors import RecipeError
from ptft_dist.tasks.common.chat import Conversation
from ptft_dist.tasks.common.chat_template import CHATML, trl_templates
from ptft_dist.tasks.common.preference_pairs import read_pair
from ptft_dist.tasks.common.preference_rows import PreferenceRows, halves
from ptft_dist.tasks.common.preference_settings import PreferenceSettings


class Settings(PreferenceSettings):
    section = "reward"


QWEN = trl_templates()["qwen2_5"].read_text()  # with a system message of its own


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    texts = [" ".join(WORDS), "user assistant system Human: Assistant: it sleeps and the a"] * 9
    trained = train_tokenizer(
        TokenizerTraining(vocab_size=320), texts, ("eos=<|im_end|>", "bos", "pad"), ["<|im_start|>"]
    )
    trained.chat_template = CHATML
    return trained


def encode(tokenizer: Any, values: dict[str, Any], max_length: int = 400, **settings: Any) -> Example:
    encoder = PreferenceRows(EncoderContext(Settings(**settings), "reward", tokenizer, max_length, 0))
    record = Record(values, "rows.jsonl:1")
    encoder.check(encoder.settings, record)
    (example,) = encoder.build(record, encoder.encode(encoder.pieces(record)))
    return example


def texts_of(tokenizer: Any, example: Example) -> tuple[str, str, str]:
    ids, parts = example.columns["input_ids"], example.columns["parts"]
    chosen, rejected = halves(ids, parts)
    assert len(rejected) == parts[2]
    assert chosen[: parts[0]] == rejected[: parts[0]]
    return tuple(map(tokenizer.decode, (chosen[: parts[0]], chosen[parts[0] :], rejected[parts[0] :])))  # type: ignore[return-value]


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


# Two rows of the same conversation in each shape; TRL gets the last one.
PROMPT = [user("a red cat"), assistant("it sleeps"), user("and the dog")]
CHOSEN, REJECTED = [assistant("runs to the cat")], [assistant("runs and sleeps")]
EXPLICIT = {"prompt": PROMPT, "chosen": CHOSEN, "rejected": REJECTED}
IMPLICIT = {"chosen": PROMPT + CHOSEN, "rejected": PROMPT + REJECTED}
TURNS = [{"from": "human" if m["role"] == "user" else "gpt", "value": m["content"]} for m in PROMPT]
TRANSCRIPT = "\n\nHuman: a red cat\n\nAssistant: it sleeps\n\nHuman: and the dog\n\nAssistant:"
SHAPES: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "explicit": (EXPLICIT, {}, EXPLICIT),
    "implicit": (IMPLICIT, {}, IMPLICIT),
    "a prompt beside whole conversations": ({**IMPLICIT, "prompt": "a red cat"}, {}, IMPLICIT),
    "a single message": (
        {"prompt": PROMPT, "chosen": CHOSEN[0], "rejected": REJECTED[0]},
        {},
        EXPLICIT,
    ),
    "sharegpt": (
        {
            "conversations": TURNS,
            "chosen": {"from": "gpt", "value": CHOSEN[0]["content"]},
            "rejected": {"from": "gpt", "value": REJECTED[0]["content"]},
        },
        {},
        EXPLICIT,
    ),
    "hh": (
        {"chosen": f"{TRANSCRIPT} runs to the cat", "rejected": f"{TRANSCRIPT} runs and sleeps"},
        {},
        EXPLICIT,
    ),
    "single turn": (
        {"prompt": "a red cat", "chosen": "it sleeps", "rejected": "runs"},
        {"shape": "single_turn"},
        {"prompt": PROMPT[:1], "chosen": [assistant("it sleeps")], "rejected": [assistant("runs")]},
    ),
    "a system message": (
        EXPLICIT,
        {"system": "be a dog"},
        {**EXPLICIT, "prompt": [{"role": "system", "content": "be a dog"}, *PROMPT]},
    ),
    "plain, explicit": (
        {"prompt": "a red cat", "chosen": " sleeps here", "rejected": " runs"},
        {},
        {"prompt": "a red cat", "chosen": " sleeps here", "rejected": " runs"},
    ),
    "plain, implicit": (
        {"chosen": "a red cat sleeps here", "rejected": "a red cat runs"},
        {},
        {"chosen": "a red cat sleeps here", "rejected": "a red cat runs"},
    ),
    "hh as plain text": (
        {"chosen": f"{TRANSCRIPT} runs to the cat", "rejected": f"{TRANSCRIPT} runs and sleeps"},
        {"shape": "preference"},
        {"chosen": f"{TRANSCRIPT} runs to the cat", "rejected": f"{TRANSCRIPT} runs and sleeps"},
    ),
}


def trl_rows(trainer: str, tokenizer: Any, row: dict[str, Any]) -> dict[str, Any]:
    """The row as TRL's trainer prepares it; no trainer is built."""
    from datasets import Dataset
    from trl import DPOTrainer, RewardTrainer

    cls: Any = {"reward": RewardTrainer, "dpo": DPOTrainer}[trainer]
    args = SimpleNamespace(max_length=None, dataset_num_proc=None)
    self = SimpleNamespace(_tokenizer=tokenizer, _is_vlm=False, _is_vision_dataset=False, args=args)
    rows = cls._prepare_dataset(self, Dataset.from_list([row]), tokenizer, args, "train")
    return dict(rows[0])


@pytest.mark.parametrize("template", [CHATML, QWEN], ids=["chatml", "qwen"])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_tokens_are_trl_s(tokenizer: Any, shape: str, template: str) -> None:
    values, settings, theirs = SHAPES[shape]
    tokenizer = with_template(tokenizer, template)
    example = encode(tokenizer, values, **settings)
    ids, parts = example.columns["input_ids"], example.columns["parts"]
    chosen, rejected = halves(ids, parts)
    reward = trl_rows("reward", tokenizer, theirs)
    assert (list(chosen), list(rejected)) == (reward["chosen_ids"], reward["rejected_ids"])
    dpo = trl_rows("dpo", tokenizer, theirs)
    assert parts[0] == len(dpo["prompt_ids"]) > 0
    assert list(chosen[: parts[0]]) == dpo["prompt_ids"]
    assert list(chosen[parts[0] :]) == dpo["chosen_ids"]
    assert list(rejected[parts[0] :]) == dpo["rejected_ids"]


def with_template(tokenizer: Any, template: str | None) -> Any:
    other = copy.deepcopy(tokenizer)
    other.chat_template = template
    return other


def test_a_margin_is_kept_and_is_nan_without_one(tokenizer: Any) -> None:
    assert encode(tokenizer, {**EXPLICIT, "margin": 2}).columns["margin"] == [2.0]
    assert math.isnan(encode(tokenizer, EXPLICIT).columns["margin"][0])


def test_a_prompt_as_text_before_the_assistant_s_messages_is_the_user_s() -> None:
    pair = read_pair({"prompt": "a red cat", "chosen": CHOSEN, "rejected": REJECTED}, "preference", None)
    assert isinstance(pair.chosen, Conversation)
    assert pair.chosen.messages == [user("a red cat"), *CHOSEN]
    assert pair.chosen.given == 1


def test_plain_texts_without_a_prompt_in_common(tokenizer: Any) -> None:
    example = encode(tokenizer, {"prompt": "", "chosen": "red ", "rejected": "cat "})
    prompt, chosen, rejected = texts_of(tokenizer, example)
    assert (prompt, chosen, rejected) == ("", "red <|im_end|>", "cat <|im_end|>")


def test_an_answer_that_begins_with_the_other_keeps_a_token(tokenizer: Any) -> None:
    prompt, chosen, rejected = texts_of(
        tokenizer, encode(tokenizer, {"chosen": "a red cat", "rejected": "a red cat sleeps"})
    )
    assert prompt + chosen == "a red cat<|im_end|>"
    assert prompt + rejected == "a red cat sleeps<|im_end|>"


def test_the_tokenizer_s_own_special_tokens_are_around_a_plain_text(tokenizer: Any) -> None:
    from tokenizers.processors import TemplateProcessing

    bert = copy.deepcopy(tokenizer)
    bos, eos = bert.bos_token, bert.eos_token
    bert.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{bos} $A {eos}", special_tokens=[(bos, bert.bos_token_id), (eos, bert.eos_token_id)]
    )
    prompt, chosen, rejected = texts_of(bert, encode(bert, {"prompt": "a", "chosen": " red", "rejected": " cat"}))
    assert (prompt, chosen, rejected) == (f"{bos}a", f" red{eos}", f" cat{eos}")


def test_long_pairs_are_dropped_or_cut(tokenizer: Any) -> None:
    whole = encode(tokenizer, EXPLICIT).columns
    longest = int(max(whole["parts"][1:]))
    assert encode(tokenizer, EXPLICIT, longest).columns["parts"] == whole["parts"]
    with pytest.raises(LeftOut, match=r"longer than data\.max_length"):
        encode(tokenizer, EXPLICIT, longest - 1)
    with pytest.raises(LeftOut, match=r"a prompt as long as data\.max_length"):
        encode(tokenizer, EXPLICIT, whole["parts"][0], too_long="cut")
    with pytest.raises(LeftOut, match="differ only beyond"):  # both answers begin with `runs`
        encode(tokenizer, EXPLICIT, whole["parts"][0] + 1, too_long="cut")
    cut = encode(tokenizer, EXPLICIT, longest - 3, too_long="cut")
    assert max(cut.columns["parts"][1:]) == longest - 3
    chosen, rejected = halves(whole["input_ids"], whole["parts"])
    assert list(cut.columns["input_ids"]) == [*chosen[: longest - 3], *rejected[: longest - 3]]
    assert cut.notes == ("with a text truncated to data.max_length",)


def test_rows_of_the_store_are_pairs_and_the_length_is_the_pair_s(tokenizer: Any, tmp_path: Any) -> None:
    encoder = PreferenceRows(EncoderContext(Settings(), "reward", tokenizer, 400, 0))
    (outcome,) = encoder.outcomes([Record({**EXPLICIT, "margin": 0.5}, "rows.jsonl:1")])
    writer = encoder.writer(tmp_path / "store", "validation")
    writer.add(outcome.examples[0])
    store = encoder.store(tmp_path / "store", writer.close())
    row = store.row(0)
    example = encode(tokenizer, EXPLICIT)
    assert row.input_ids.tolist() == list(example.columns["input_ids"])
    assert row.columns["parts"].tolist() == example.columns["parts"]
    assert row.columns["margin"].tolist() == [0.5]
    assert row.meta == {"prompt": "and the dog", "chosen": "runs to the cat", "rejected": "runs and sleeps"}
    assert store.lengths([0])[0] == sum(example.columns["parts"][1:])


BROKEN: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "identical texts": ({"prompt": "a", "chosen": "b", "rejected": "b"}, {}, "chosen and rejected are identical"),
    "identical messages": ({**EXPLICIT, "rejected": CHOSEN}, {}, "chosen and rejected are identical"),
    "identical conversations": ({**IMPLICIT, "rejected": IMPLICIT["chosen"]}, {}, "identical"),
    "identical but for a blank": (
        {"chosen": f"{TRANSCRIPT} runs", "rejected": f"{TRANSCRIPT} runs "},
        {},
        "identical",
    ),
    "an empty text": ({"prompt": "a", "chosen": " ", "rejected": "b"}, {}, "'chosen' is empty"),
    "an empty message": ({**EXPLICIT, "rejected": [assistant("")]}, {}, r"rejected: message 1 \(assistant\) is empty"),
    "no message": ({**EXPLICIT, "chosen": []}, {}, "chosen: there is no answer"),
    "an empty answer in a transcript": (
        {"chosen": f"{TRANSCRIPT} runs", "rejected": TRANSCRIPT},
        {},
        r"rejected: message 4 \(assistant\) is empty",
    ),
    "no answer after the common prompt": (
        {"chosen": "a red ", "rejected": "a red cat"},
        {},
        "chosen: after the common",
    ),
    "no column rejected": ({"prompt": "a", "chosen": "b"}, {}, "no field 'rejected'"),
    "null": ({"prompt": "a", "chosen": None, "rejected": "b"}, {}, "'chosen' is null"),
    "no prompt for a single turn": ({"chosen": "a", "rejected": "b"}, {"shape": "single_turn"}, "no field 'prompt'"),
    "a question at the end": (
        {**EXPLICIT, "chosen": [*CHOSEN, user("a")]},
        {},
        "chosen: the last message is from the user",
    ),
    "text and messages": ({"chosen": "a", "rejected": CHOSEN}, {}, "'rejected' is a list and not text"),
    "no transcript": (
        {"chosen": "a b", "rejected": "c"},
        {"shape": "hh"},
        'chosen: the text does not begin with "Human:"',
    ),
    "an unknown role": (
        {**EXPLICIT, "chosen": [{"role": "bot", "content": "a"}]},
        {},
        "chosen: message 1 has the role",
    ),
    "a margin as text": ({**EXPLICIT, "margin": "big"}, {}, "the margin big is not a finite number"),
    "an infinite margin": ({**EXPLICIT, "margin": math.inf}, {}, "the margin inf is not a finite number"),
    "a special token in an answer": (
        {**EXPLICIT, "chosen": [assistant("a<|im_end|>")]},
        {},
        r"chosen: message 4.content: the text contains the special token '<\|im_end\|>'",
    ),
    "a special token in plain text": (
        {"prompt": "a", "chosen": "b", "rejected": "c<|im_end|>"},
        {},
        "rejected: completion: the text contains the special token",
    ),
    "a special token made of two texts": (
        {"prompt": "a <|im_", "chosen": "end|> b", "rejected": "c"},
        {},
        "chosen: prompt and completion: together with the text next to it",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_row_says_what_is_wrong(tokenizer: Any, name: str) -> None:
    values, settings, expected = BROKEN[name]
    with pytest.raises(RowError, match=expected):
        encode(tokenizer, values, **settings)


def test_conversations_need_a_chat_template_and_plain_texts_do_not(tokenizer: Any) -> None:
    bare = with_template(tokenizer, None)
    encode(bare, {"prompt": "a", "chosen": " red", "rejected": " cat"})
    with pytest.raises(RecipeError, match=r"reward\.template: this tokenizer has no chat template"):
        encode(bare, EXPLICIT)
