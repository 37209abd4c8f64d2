"""Supervised fine-tuning: rows as conversations, the label mask, and TRL's SFTTrainer on the same rows."""

from __future__ import annotations

import copy
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from prepare_support import prepare
from support import start, train_rows
from task_support import for_model, make_task, plain_network
from tiny import LLAMA, WORDS, made, talked, write_rows, write_tiny
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import ptft_dist
from ptft_dist.config.recipe import Recipe
from ptft_dist.config.tokenizer_section import TokenizerTraining
from ptft_dist.data.encoder import EncoderContext, Example, LeftOut, RowError
from ptft_dist.data.formats import Record
from ptft_dist.data.store import Row
from ptft_dist.data.tokenizer import train_tokenizer
from ptft_dist.errors import DataError, RecipeError
from ptft_dist.networks.load import build_config, build_model
from ptft_dist.tasks.common.chat import UNTEMPLATED, Conversation, Plain
from ptft_dist.tasks.common.chat_template import CHATML, ChatTemplate, TemplateRefused, trl_templates
from ptft_dist.tasks.registry import recipe_class
from ptft_dist.tasks.sft.chat import read_row, shape_of, with_answer
from ptft_dist.tasks.sft.encode import ConversationRows, learned_tokens
from ptft_dist.tasks.sft.task import EmbeddingNoise, conversation_lengths

USER, ASSISTANT = {"role": "user", "content": "a red cat"}, {"role": "assistant", "content": "it sleeps"}
SECOND = [{"role": "user", "content": "and the dog"}, {"role": "assistant", "content": "runs"}]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    texts = [" ".join(WORDS), "user assistant system tool it sleeps and the a"] * 9
    trained = train_tokenizer(
        TokenizerTraining(vocab_size=320), texts, ("eos=<|im_end|>", "bos", "pad"), ["<|im_start|>"]
    )
    trained.chat_template = CHATML
    return trained


def recipe(max_length: int = 200, **sft: Any) -> Recipe:
    return recipe_class().model_validate(
        {
            "task": "sft",
            "model": {"config": LLAMA | {"max_position_embeddings": 256}},
            "tokenizer": {"path": "none"},
            "data": {"train": [{"path": "none"}], "max_length": max_length},
            "sft": sft,
            "batch": {"global_size": 2, "micro_size": 2},
            "train": {"max_steps": 1, "precision": "fp32"},
            "run_dir": "run",
        }
    )


def encode(tokenizer: Any, values: dict[str, Any], **settings: Any) -> Example:
    encoder = ConversationRows(EncoderContext.of(recipe(**settings), tokenizer))
    record = Record(values, "rows.jsonl:1")
    encoder.check(encoder.settings, record)
    (example,) = encoder.build(record, encoder.encode(encoder.pieces(record)))
    return example


def learned_text(tokenizer: Any, example: Example) -> str:
    ids = np.array(example.columns["input_ids"])
    return tokenizer.decode(ids[np.array(example.columns["learned"]) == 1])


# --- shapes -----------------------------------------------------------------------------------------------------------

CALL = {"type": "function", "function": {"name": "look", "arguments": {"at": "cat"}}}
TOOL = {"type": "function", "function": {"name": "look", "parameters": {}}}
SPELT = {"function": {"name": "look", "arguments": '{"at": "cat"}'}}
PARTS = [{"type": "text", "text": "a red "}, {"type": "text", "text": "cat"}]
CALLED = {"role": "assistant", "content": "", "tool_calls": [CALL]}
CALLED_TWICE = {"role": "assistant", "content": "", "tool_calls": [{"id": "a1", **CALL}, {"id": "b2", **CALL}]}
ANSWERS = [{"role": "tool", "content": "x", "tool_call_id": id_} for id_ in ("a1", "b2")]
SHAPED: dict[str, tuple[dict[str, Any], str, list[dict[str, Any]]]] = {
    "messages": ({"messages": [USER, ASSISTANT | {"weight": 1}]}, "messages", [USER, ASSISTANT]),
    "parts": (
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "a red "}, {"type": "text", "text": "cat"}]},
                ASSISTANT,
            ]
        },
        "messages",
        [USER, ASSISTANT],
    ),
    "developer": (
        {"messages": [{"role": "developer", "content": "be short"}, USER, ASSISTANT]},
        "messages",
        [{"role": "system", "content": "be short"}, USER, ASSISTANT],
    ),
    "tool call with arguments as text": (
        {
            "messages": [
                USER,
                {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [{"function": {"name": "look", "arguments": '{"at": "cat"}'}}],
                },
                {"role": "tool", "name": "look", "content": "asleep"},
                ASSISTANT,
            ],
            "tools": json.dumps([TOOL]),
        },
        "messages",
        [
            USER,
            CALLED,
            {"role": "tool", "content": "asleep", "name": "look"},
            ASSISTANT,
        ],
    ),
    "parallel tool calls with ids": (
        {"messages": [USER, CALLED_TWICE, *ANSWERS, ASSISTANT]},
        "messages",
        [USER, CALLED_TWICE, *ANSWERS, ASSISTANT],
    ),
    "sharegpt": (
        {"conversations": [{"from": "human", "value": "a red cat"}, {"from": "gpt", "value": "it sleeps"}]},
        "sharegpt",
        [USER, ASSISTANT],
    ),
    "sharegpt with calls": (
        {
            "conversations": [
                {"from": "human", "value": "a red cat"},
                {"from": "function_call", "value": '{"name": "look", "arguments": {"at": "cat"}}'},
                {"from": "observation", "value": "asleep"},
                {"from": "gpt", "value": "it sleeps"},
            ],
            "tools": [TOOL],
        },
        "sharegpt",
        [
            USER,
            CALLED,
            {"role": "tool", "content": "asleep"},
            ASSISTANT,
        ],
    ),
    "alpaca": ({"instruction": "a red cat", "input": "", "output": "it sleeps"}, "alpaca", [USER, ASSISTANT]),
    "alpaca with input": (
        {"instruction": "describe", "input": "a red cat", "output": "it sleeps", "history": []},
        "alpaca",
        [{"role": "user", "content": "describe\n\na red cat"}, ASSISTANT],
    ),
    "system column": (
        {"system": "be short", "instruction": "a red cat", "output": "it sleeps"},
        "alpaca",
        [{"role": "system", "content": "be short"}, USER, ASSISTANT],
    ),
    "prompt and completion as messages": (
        {"prompt": [USER], "completion": [ASSISTANT]},
        "prompt_completion",
        [USER, ASSISTANT],
    ),
}


@pytest.mark.parametrize("name", SHAPED)
def test_a_row_becomes_a_conversation(name: str) -> None:
    values, shape, messages = SHAPED[name]
    assert shape_of(values) == shape
    said = read_row(values, shape, None)
    assert isinstance(said, Conversation)
    assert said.messages == messages
    assert bool(said.tools) == ("tools" in values)


def test_a_single_turn_is_a_question_and_an_answer() -> None:
    """It must be named, because texts of these columns are plain otherwise."""
    values = {"prompt": "a red cat", "completion": "it sleeps", "system": "be short"}
    assert shape_of(values) == "prompt_completion"
    said = read_row(values, "single_turn", None)
    assert isinstance(said, Conversation)
    assert said.messages == [{"role": "system", "content": "be short"}, USER, ASSISTANT]


def test_plain_shapes() -> None:
    assert read_row({"text": "abc"}, "text", None) == Plain("", "abc")
    assert read_row({"prompt": "a", "completion": "b"}, "prompt_completion", None) == Plain("a", "b")


def test_a_system_message_for_those_without() -> None:
    said = read_row({"messages": [USER, ASSISTANT]}, "messages", "be kind")
    assert isinstance(said, Conversation)
    assert said.messages[0] == {"role": "system", "content": "be kind"}
    own = read_row({"messages": [{"role": "system", "content": "own"}, USER, ASSISTANT]}, "messages", "be kind")
    assert isinstance(own, Conversation)
    assert [m["content"] for m in own.messages] == ["own", "a red cat", "it sleeps"]


# --- what is learned --------------------------------------------------------------------------------------------------


def test_each_turn_of_the_assistant_is_learned_with_its_end(tokenizer: Any) -> None:
    values = {"messages": [USER, ASSISTANT, *SECOND]}
    assert learned_text(tokenizer, encode(tokenizer, values)) == "it sleeps<|im_end|>runs<|im_end|>"
    assert learned_text(tokenizer, encode(tokenizer, values, loss="last")) == "runs<|im_end|>"
    whole = encode(tokenizer, values, loss="all")
    assert np.array(whole.columns["learned"]).tolist() == [0] + [1] * (len(whole.columns["input_ids"]) - 1)


def test_completions_and_plain_texts_end_with_eos(tokenizer: Any) -> None:
    completion = encode(tokenizer, {"prompt": "a red cat", "completion": " it sleeps"})
    assert tokenizer.decode(completion.columns["input_ids"]) == "a red cat it sleeps<|im_end|>"
    assert learned_text(tokenizer, completion) == " it sleeps<|im_end|>"
    plain = encode(tokenizer, {"text": "a red cat"})
    ids = plain.columns["input_ids"]
    assert ids[-1] == tokenizer.eos_token_id
    assert np.array(plain.columns["learned"]).tolist() == [0] + [1] * (len(ids) - 1)


@pytest.mark.parametrize("loss", ["assistant", "all"])
def test_a_plain_text_begins_as_the_tokenizer_begins_it(loss: str) -> None:
    """Llama and Mistral: BOS, and a space before the first word of the text only. In `<s>it`, that is not `it`."""
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.decoder = decoders.Metaspace(prepend_scheme="first")
    trainer = trainers.BpeTrainer(vocab_size=120, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    backend.train_from_iterator(["it sleeps and the cat runs"] * 9, trainer)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    mistral = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    for values in ({"text": "it sleeps"}, {"prompt": "it", "completion": " sleeps"}):
        example = encode(mistral, values, loss=loss)
        assert list(example.columns["input_ids"]) == [*mistral("it sleeps").input_ids, mistral.eos_token_id]
        whole = loss == "all" or "text" in values
        assert learned_text(mistral, example) == ("it sleeps</s>" if whole else "sleeps</s>")


def test_what_is_given_is_not_learned(tokenizer: Any) -> None:
    values = {"prompt": [USER, ASSISTANT, SECOND[0]], "completion": [SECOND[1]]}
    assert learned_text(tokenizer, encode(tokenizer, values)) == "runs<|im_end|>"


def test_unanswered_messages_go_and_are_noted(tokenizer: Any) -> None:
    example = encode(tokenizer, {"messages": [USER, ASSISTANT, SECOND[0]]})
    assert "the dog" not in tokenizer.decode(example.columns["input_ids"])
    assert example.notes == ("truncated after the last assistant message",)


def test_long_conversations_are_cut_or_dropped_and_those_without_an_answer_left_out(tokenizer: Any) -> None:
    values = {"messages": [USER, ASSISTANT, *SECOND]}
    whole = encode(tokenizer, values).columns["input_ids"]
    cut = encode(tokenizer, values, max_length=len(whole) - 2)
    assert list(cut.columns["input_ids"]) == list(whole)[:-2]
    assert cut.notes == ("truncated to data.max_length",)
    with pytest.raises(LeftOut, match=r"longer than data\.max_length"):
        encode(tokenizer, values, max_length=len(whole) - 2, too_long="drop")
    with pytest.raises(LeftOut, match="without an assistant message"):
        encode(tokenizer, values, max_length=8)


def test_a_row_of_just_max_length_is_whole(tokenizer: Any) -> None:
    values = {"messages": [USER, ASSISTANT]}
    whole = encode(tokenizer, values).columns["input_ids"]
    for too_long in ("cut", "drop"):
        exact = encode(tokenizer, values, max_length=len(whole), too_long=too_long)
        assert list(exact.columns["input_ids"]) == list(whole)
        assert exact.notes == ()
    assert encode(tokenizer, values, max_length=len(whole) - 1).notes == ("truncated to data.max_length",)
    with pytest.raises(LeftOut, match="longer than"):
        encode(tokenizer, values, max_length=len(whole) - 1, too_long="drop")


@pytest.mark.parametrize("unit", ["it sleeps and ", "a", "\n"])
def test_a_long_answer_is_tokenized_in_part_and_comes_out_the_same(
    tokenizer: Any, unit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = {"messages": [USER, {"role": "assistant", "content": unit * (20_000 // len(unit)) + "."}, *SECOND]}
    sizes = []
    encode_batch = ConversationRows.encode
    monkeypatch.setattr(
        ConversationRows, "encode", lambda self, pieces: sizes.append(len(pieces[0])) or encode_batch(self, pieces)
    )
    monkeypatch.setattr("ptft_dist.tasks.sft.encode.CHARACTERS_PER_TOKEN", 10**9)
    whole = encode(tokenizer, values, max_length=32)
    monkeypatch.undo()
    monkeypatch.setattr(
        ConversationRows, "encode", lambda self, pieces: sizes.append(len(pieces[0])) or encode_batch(self, pieces)
    )
    assert sizes[0] > 20_000
    sizes.clear()
    part = encode(tokenizer, values, max_length=32)
    assert sizes[0] == 32 * 200
    assert list(part.columns["input_ids"]) == list(whole.columns["input_ids"])
    assert np.array_equal(part.columns["learned"], whole.columns["learned"])
    assert part.meta == whole.meta
    assert whole.notes == ("truncated to data.max_length",)
    assert set(part.notes) - set(whole.notes) == {
        "much longer than data.max_length: only their beginning was tokenized"
    }


def test_a_long_text_of_few_tokens_is_tokenized_whole() -> None:
    """WordPiece makes one [UNK] of a giant word."""
    texts = [" ".join(WORDS), "user assistant it sleeps"] * 9
    settings = TokenizerTraining(vocab_size=300, algorithm="wordpiece")
    wordpiece = train_tokenizer(settings, texts, ("eos=<|im_end|>", "bos", "pad"), ["<|im_start|>"])
    example = encode(wordpiece, {"prompt": "x" * 10_000, "completion": " it sleeps"}, max_length=32)
    assert learned_text(wordpiece, example) == "it sleeps <|im_end|>"
    assert example.notes == ()


def test_a_token_is_learned_if_it_shares_a_character_with_a_span() -> None:
    offsets = [(0, 2), (2, 5), (5, 5), (5, 9), (9, 12)]
    assert learned_tokens(np.array(offsets), [(4, 6)]).tolist() == [0, 1, 1, 1, 0]
    assert learned_tokens(np.array(offsets), [(2, 5), (9, 10)]).tolist() == [0, 1, 0, 0, 1]
    assert learned_tokens(np.array(offsets), []).tolist() == [0, 0, 0, 0, 0]


def test_the_end_is_learned_also_where_padding_is_spelt_like_it(tokenizer: Any) -> None:
    import copy

    same = copy.deepcopy(tokenizer)
    same.pad_token = same.eos_token
    rows = [as_row(encode(same, {"messages": m})) for m in ([USER, ASSISTANT], [USER, ASSISTANT, *SECOND])]
    batch = make_task(recipe(), same).collate(rows)
    ends = (batch.inputs["targets"] == same.eos_token_id).sum(1)
    assert ends.tolist() == [1, 2]
    assert batch.count == sum(int(row.columns["learned"].sum()) for row in rows)


def test_a_template_reads_the_ids_of_calls_and_none_can_spell_a_special_token(tokenizer: Any) -> None:
    """As in Mistral's, which has no other way to tell parallel calls apart."""
    template = """{%- for m in messages %}<|im_start|>{{ m.role }}
{% for call in m.tool_calls or [] %}{% if (call.id or '')|length != 9 %}{{ raise_exception('ids need 9 letters') }}
{%- endif %}SHOWN{% endfor %}{{ m.tool_call_id or '' }}{{ m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

    def row(first: str) -> dict[str, Any]:
        calls = [{"id": first, **CALL}, {"id": "987654321", **CALL}]
        called, found = {"role": "assistant", "content": "", "tool_calls": calls}, {"role": "tool", "content": "x"}
        return {"messages": [USER, called, {**found, "tool_call_id": first}, ASSISTANT]}

    own = copy.deepcopy(tokenizer)
    own.chat_template = template.replace(
        "SHOWN", "[{{ call.id }}]{{ call.function.name }}{{ call.function.arguments }}"
    )
    text = own.decode(encode(own, row("abcdefghi")).columns["input_ids"])
    assert [name in text for name in ("[abcdefghi]look", "[987654321]look")] == [True, True]
    assert "tool\nabcdefghix" in text
    with pytest.raises(RowError, match="ids need 9 letters"):
        encode(own, row("short"))
    with pytest.raises(RowError, match=r"tool_calls\[0\]\.id: the text contains the special token"):
        encode(own, row("<|im_end|>"))


@pytest.mark.parametrize("role", ["gpt", "assistant", "chatgpt", "bing", "function_call"])
def test_the_answer_of_a_row_is_replaced_whatever_its_speaker_is_called(role: str) -> None:
    asked = {"from": "human", "value": "a red cat"}
    values = {"conversations": [asked, {"from": role, "value": '{"name": "look"}'}]}
    assert with_answer(values, ".")["conversations"] == [asked, {"from": "gpt", "value": "."}]


@pytest.mark.parametrize("messages", [[], [{"role": "assistant", "content": "a red cat"}]])
def test_a_conversation_without_a_message_to_answer_is_an_error(messages: list[dict[str, str]]) -> None:
    with pytest.raises(RowError, match=r"messages has no message to answer\. Begin"):
        with_answer({"messages": messages}, ".")


def test_a_lone_answer_and_an_empty_prompt_can_be_evaluated(tokenizer: Any) -> None:
    alone = encode(tokenizer, {"messages": [ASSISTANT]})
    assert alone.meta["source"] == ""
    assert alone.meta["reference"] == "it sleeps"
    empty = encode(tokenizer, {"prompt": "", "completion": "it sleeps"})
    assert empty.meta["prompt"] == [tokenizer.bos_token_id]


def test_what_is_written_is_the_last_answer_that_begins_within_the_row(tokenizer: Any) -> None:
    values = {"messages": [USER, ASSISTANT, *SECOND]}
    whole = encode(tokenizer, values)
    assert whole.meta["reference"] == "runs"
    assert whole.meta["source"] == "and the dog"
    assert tokenizer.decode(whole.meta["prompt"]).endswith("and the dog<|im_end|>\n<|im_start|>assistant\n")
    first = encode(tokenizer, values, max_length=len(whole.meta["prompt"]) - 3)
    assert first.meta["reference"] == "it sleeps"
    assert first.meta["source"] == "a red cat"
    assert len(first.meta["prompt"]) < len(first.columns["input_ids"])


def test_the_end_of_a_turn_ends_what_is_written_and_exported(tokenizer: Any) -> None:
    """A base model's tokenizer: ChatML's tokens, but another EOS, and no PAD."""
    import copy

    base = copy.deepcopy(tokenizer)
    base.eos_token, base.pad_token = "<|bos|>", None
    encoder = ConversationRows(EncoderContext.of(recipe(), base))
    encoder.pieces(Record({"messages": [USER, ASSISTANT]}, "rows.jsonl:1"))
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert encoder.discovered["end_of_turn"] == end
    task = make_task(recipe(), base, encoder.discovered)
    model = tiny_model(tokenizer, recipe())
    task = for_model(task, model)
    assert set(task.eos_ids) >= {end, base.eos_token_id}
    assert end in model.generation_config.eos_token_id
    assert task.fill_id == base.eos_token_id  # skipped as special when read; id 0 would be a word


def test_added_chat_tokens_are_special(tmp_path: Path) -> None:
    """What the message of a tokenizer without a template proposes. A word that the template also has stays a word."""
    folder = tmp_path / "plain"
    (tmp_path / "of_a_dog.jinja").write_text("{# You are a dog. #}" + CHATML)
    train_tokenizer(TokenizerTraining(vocab_size=300), [" ".join(WORDS)] * 5).save_pretrained(folder)
    changes = {
        "tokenizer": {"train": None, "path": str(folder), "add": ["<|im_start|>", "<|im_end|>", "dog"]},
        "sft": {"template": "of_a_dog.jinja"},
        "data": {"max_length": 64},
    }
    found = prepared_rows(tmp_path, made(20, talked), **changes)
    from transformers import AutoTokenizer

    added = {
        str(t): t.special for t in AutoTokenizer.from_pretrained(found.tokenizer_path).added_tokens_decoder.values()
    }
    assert (added["<|im_start|>"], added["<|im_end|>"], added["dog"]) == (True, True, False)
    assert found.survey["end_of_turn"] is not None


def test_files_in_folders_with_signs_are_told_apart(tokenizer: Any) -> None:
    encoder = ConversationRows(EncoderContext.of(recipe(), tokenizer))
    encoder.admit(Record({"messages": [USER, ASSISTANT]}, "k#1/a.jsonl:1"))
    encoder.admit(Record({"instruction": "a", "output": "b"}, "k#1/b.jsonl:1"))


def test_settings_without_effect_and_beyond_the_network(tmp_path: Path, cache: Path, tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="generation has no effect here"):
        recipe(shape="text", generation={"max_new_tokens": 4})
    with pytest.raises(ValueError, match="system has no effect here"):
        recipe(shape="text", system="be kind")
    write_tiny(tmp_path, "sft", sft={"generation": {"max_new_tokens": 33}})  # 32 + 33 > 64 positions
    refused = start("train", "recipe.yaml", cwd=tmp_path, cache=cache)
    assert refused.wait() == 2
    assert "max_new_tokens: with data.max_length, prompt and generated text have up to 65 tokens" in refused.stderr
    answers = recipe().model_copy(update={"sft": recipe().settings.for_answers()})  # up to 64 new tokens
    make_task(answers, tokenizer, network=plain_network(max_positions=264))
    with pytest.raises(RecipeError, match=r"up to 264 tokens, more than the 263 positions of the model with its adapt"):
        make_task(answers, tokenizer, network=plain_network(max_positions=263))


def test_a_column_that_no_row_has_is_an_error(tmp_path: Path) -> None:
    write_tiny(tmp_path, "sft")
    with pytest.raises(DataError, match=r"fields: \{system: sytem\}: no row of this source has a column 'sytem'"):
        prepared_rows(
            tmp_path, made(20, talked), data={"train": [{"path": "rows.jsonl", "fields": {"system": "sytem"}}]}
        )


# --- templates --------------------------------------------------------------------------------------------------------

NO_SYSTEM = "{% for m in messages if m.role != 'system' %}{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}"
UNMARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def with_template(tokenizer: Any, template: str) -> Any:
    import copy

    other = copy.deepcopy(tokenizer)
    other.chat_template = template
    return other


def test_a_template_without_markers_is_read_turn_by_turn(tokenizer: Any) -> None:
    values = {"messages": [USER, ASSISTANT, *SECOND]}
    example = encode(with_template(tokenizer, UNMARKED), values)
    assert learned_text(tokenizer, example) == "it sleeps<|im_end|>\nruns<|im_end|>\n"


def test_a_template_that_loses_a_message_is_refused(tokenizer: Any) -> None:
    messages = [{"role": "system", "content": "be kind"}, USER, ASSISTANT]
    with pytest.raises(TemplateRefused, match="drops this system message: 'be kind'"):
        ChatTemplate(with_template(tokenizer, NO_SYSTEM), "sft").render(messages, None)


THOUGHT = "<think>\nit is night\n</think>\n\n"
KEEPS_NO_THOUGHT = UNMARKED.replace("m.content", "m.content.split('</think>')[-1]")
REASONED: dict[str, tuple[str, dict[str, Any], bool]] = {
    "in the content": (UNMARKED, {"content": THOUGHT + "it sleeps"}, True),
    "in the content, and removed": (KEEPS_NO_THOUGHT, {"content": THOUGHT + "it sleeps"}, False),
    **{
        f"{key}{', and not read' * (not known)}": (
            UNMARKED.replace("m.content", f"(m.{key if known else 'other'} or '') + m.content"),
            {"content": "it sleeps", key: "it is night"},
            known,
        )
        for key in ("reasoning_content", "reasoning", "thinking")
        for known in (True, False)
    },
}


@pytest.mark.parametrize("name", REASONED)
def test_the_reasoning_of_the_last_message_is_learned_or_refused(tokenizer: Any, name: str) -> None:
    """That of earlier messages may be left out, as most templates do."""
    template, answer, kept = REASONED[name]
    chat = with_template(tokenizer, template)
    reasoned = {"role": "assistant", **answer}
    if kept:
        assert "it is night" in learned_text(tokenizer, encode(chat, {"messages": [USER, reasoned]}))
    else:
        with pytest.raises(RowError, match="drops the reasoning of the last message: 'it is night'"):
            encode(chat, {"messages": [USER, reasoned]})
    assert encode(chat, {"messages": [USER, reasoned, *SECOND]}, loss="last").meta["reference"] == "runs"


def test_the_last_turn_of_phi_3_has_its_text_and_both_ends(tokenizer: Any) -> None:
    """TRL's variant marks the EOS after the last turn by itself. Generated texts end at the first end, <|end|>."""
    phi = with_template(tokenizer, trl_templates()["phi3"].read_text())
    phi.add_special_tokens({"extra_special_tokens": ["<|im_start|>", "<|user|>", "<|assistant|>", "<|end|>"]})
    example = encode(phi, {"messages": [USER, ASSISTANT, *SECOND]}, loss="last")
    assert learned_text(phi, example) == "runs<|end|>\n<|im_end|>"
    assert (example.meta["source"], example.meta["reference"]) == ("and the dog", "runs")
    assert phi.decode(example.meta["prompt"]).endswith("and the dog<|end|>\n<|assistant|>\n")
    both = encode(phi, {"prompt": [USER, ASSISTANT, SECOND[0]], "completion": SECOND[1:]})
    assert learned_text(phi, both) == "runs<|end|>\n<|im_end|>"
    encoder = ConversationRows(EncoderContext.of(recipe(), phi))
    assert encoder.template.marked
    assert encoder.discovered == {"end_of_turn": phi.convert_tokens_to_ids("<|end|>")}


def test_a_template_that_shows_no_tools_is_refused(tokenizer: Any) -> None:
    with pytest.raises(TemplateRefused, match="drops the tool look"):
        ChatTemplate(with_template(tokenizer, UNMARKED), "sft").render([USER, ASSISTANT], [TOOL])


def test_a_template_that_changes_its_beginning_is_refused(tokenizer: Any) -> None:
    counted = "{{ messages | length }}" + UNMARKED
    with pytest.raises(TemplateRefused, match="its rendering of a turn depends on the turns that follow"):
        ChatTemplate(with_template(tokenizer, counted), "sft").render([USER, ASSISTANT, *SECOND], None)


def test_a_template_whose_turns_do_not_end_is_refused(tokenizer: Any) -> None:
    said = "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}{% endif %}"
    other = "{% if m.role != 'assistant' %}{{ m.content }}{% endif %}"
    endless = "{% for m in messages %}{{ m.role }}: " + said + other + "\n{% endfor %}"
    with pytest.raises(RecipeError, match="never learn to stop"):
        encode(with_template(tokenizer, endless), {"messages": [USER, ASSISTANT]})


def test_without_a_template_the_message_names_all_that_is_missing(tokenizer: Any) -> None:
    plain = train_tokenizer(TokenizerTraining(vocab_size=300), [" ".join(WORDS)] * 5)
    with pytest.raises(RecipeError) as refused:
        encode(plain, {"messages": [USER, ASSISTANT]})
    assert "sft.template: chatml\n" in str(refused.value)
    assert "tokenizer.add: ['<|im_start|>', '<|im_end|>']" in str(refused.value)
    with pytest.raises(RecipeError) as refused:  # it has the tokens
        encode(with_template(tokenizer, ""), {"messages": [USER, ASSISTANT]})
    assert "sft.template: chatml\n" in str(refused.value)
    assert "tokenizer.add: [" not in str(refused.value)
    plain.eos_token = None
    with pytest.raises(RecipeError) as refused:
        encode(plain, {"messages": [USER, ASSISTANT]})
    for part in ("no EOS token", "eos_token in its", "no chat template", "sft.template: chatml", "tokenizer.add: ["):
        assert part in str(refused.value)
    with pytest.raises(RecipeError) as refused:
        encode(plain, {"text": "a red cat"}, shape="text")
    assert "no EOS token" in str(refused.value)
    assert "chat template" not in str(refused.value)


def test_a_template_whose_tokens_are_not_special_names_them() -> None:
    plain = train_tokenizer(TokenizerTraining(vocab_size=300), [" ".join(WORDS)] * 5)
    with pytest.raises(RecipeError, match=r"tokenizer\.add: \['<\|im_start\|>', '<\|im_end\|>'\]"):
        encode(with_template(plain, CHATML), {"messages": [USER, ASSISTANT]})


IMPOSSIBLE = {
    "a range": ("{% for i in range(10**10) %}a{% endfor %}", "Range too big"),
    "an include": ("{% include 'other.jinja' %}", "no loader"),
    "an import": ("{% import 'other.jinja' as other %}", "no loader"),
    "a division": ("{{ 1 // 0 }}", "ZeroDivisionError"),
    "an index": ("{{ messages.pop(99) }}", "not safely callable|IndexError|unsafe"),
    "endless recursion": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
    "no Jinja": ("{% for %}", "Expected"),
    "an attribute of nothing": ("{{ nothing.at.all }}", "undefined"),
    "an integer of too many digits": ("{{ 10 ** 5000 }}", "digits"),
}


@pytest.mark.parametrize("marked", [False, True])
@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_a_template_that_fails_is_an_error_of_the_recipe(tokenizer: Any, name: str, marked: bool) -> None:
    source, why = IMPOSSIBLE[name]
    template = source + (CHATML if marked else UNMARKED)
    with pytest.raises(RecipeError, match=rf"sft\.template: .*({why})"):
        encode(with_template(tokenizer, template), {"messages": [USER, ASSISTANT]})


def test_a_template_that_fails_on_a_row_is_an_error_of_the_row(tokenizer: Any) -> None:
    counting = "{% for i in range(messages[0].content | length * 10**5) %}{% endfor %}" + CHATML
    with pytest.raises(RowError, match=r"refuses this conversation.*Range too big"):
        encode(with_template(tokenizer, counting), {"messages": [{"role": "user", "content": "a cat"}, ASSISTANT]})


def test_trl_s_templates_are_known_by_name() -> None:
    known = trl_templates()
    assert {"llama3", "qwen3", "gemma"} <= set(known)
    assert not any(name.endswith("_training") for name in known)


# --- TRL --------------------------------------------------------------------------------------------------------------


def trl_trainer(tokenizer: Any, model: Any, rows: list[dict[str, Any]], folder: Path, **settings: Any) -> Any:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    config = SFTConfig(
        output_dir=str(folder),
        use_cpu=True,
        bf16=False,
        report_to=[],
        max_length=200,
        per_device_train_batch_size=4,
        dataset_num_proc=None,
        gradient_checkpointing=False,
        **settings,
    )
    return SFTTrainer(model=model, args=config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)


def tiny_model(tokenizer: Any, settings: Recipe) -> Any:
    config = build_config(settings.model, tokenizer, settings.data.max_length)
    return build_model(settings.model, config, 0, AutoModelForCausalLM)


QWEN = (trl_templates()["qwen2_5"]).read_text()
TRL_CASES: dict[str, tuple[str, list[dict[str, Any]], dict[str, Any], dict[str, Any]]] = {
    "assistant only, chatml": (CHATML, made(8, talked), {"assistant_only_loss": True}, {}),
    "assistant only, TRL's variant of a template": (QWEN, made(8, talked), {"assistant_only_loss": True}, {}),
    "everything": (CHATML, made(8, talked), {"assistant_only_loss": False}, {"loss": "all"}),
    "prompt and completion": (
        CHATML,
        [{"prompt": f"a {w} cat", "completion": f" is {w} and sleeps"} for w in WORDS[:8]],
        {},
        {},
    ),
    "plain text": (CHATML, [{"text": f"a {w} cat is {w}"} for w in WORDS[:8]], {}, {}),
}


@pytest.mark.parametrize("name", TRL_CASES)
def test_tokens_masks_and_loss_are_trl_s(tokenizer: Any, tmp_path: Path, name: str) -> None:
    template, rows, theirs, ours = TRL_CASES[name]
    chat = with_template(tokenizer, template)
    settings = recipe(**ours)
    model = tiny_model(chat, settings).eval()
    trainer = trl_trainer(chat, model, rows, tmp_path, **theirs)
    examples = [encode(chat, row, **ours) for row in rows]
    for example, their in zip(examples, trainer.train_dataset, strict=True):
        ids = np.array(example.columns["input_ids"])
        assert ids.tolist() == their["input_ids"]
        labels = np.array(their.get("labels", their["input_ids"]))
        # The first token is predicted by nobody: whether it carries a label makes no difference.
        assert np.where(np.array(example.columns["learned"]) == 1, ids, -100)[1:].tolist() == labels[1:].tolist()

    task = make_task(settings, chat)
    task = for_model(task, model)
    rows_ = [as_row(example) for example in examples[:4]]
    batch = task.collate(rows_, [(0, i) for i in range(4)])
    with torch.no_grad():
        mine = task.loss(model, batch.inputs).loss_sum / batch.count
        inputs = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
        their_loss = trainer.compute_loss(model, inputs)
    assert mine.item() == pytest.approx(their_loss.item(), rel=1e-5)


def as_row(example: Example) -> Row:
    columns = {key: np.array(value, np.int64) for key, value in example.columns.items()}
    return Row(columns.pop("input_ids"), np.zeros(1, np.int64), columns)


def joined(rows: list[Row]) -> Row:
    starts = np.cumsum([0, *(len(row.input_ids) for row in rows[:-1])])
    learned = np.concatenate([row.columns["learned"] for row in rows])
    return Row(np.concatenate([row.input_ids for row in rows]), starts, {"learned": learned})


def test_packed_conversations_are_as_alone(tokenizer: Any) -> None:
    settings = recipe(packing=True)
    model = tiny_model(tokenizer, settings).eval()
    task = make_task(settings, tokenizer)
    task = for_model(task, model)
    rows = [as_row(encode(tokenizer, row)) for row in made(5, talked)]
    with torch.no_grad():
        packed = task.loss(model, task.collate([joined(rows)]).inputs).loss_sum
        alone = sum(task.loss(model, task.collate([row]).inputs).loss_sum for row in rows)
    assert packed.item() == pytest.approx(float(alone), rel=1e-5)
    assert task.collate([joined(rows)]).count == sum(task.collate([row]).count for row in rows)


def test_a_batch_of_few_learned_positions_has_the_loss_of_all_logits(tokenizer: Any) -> None:
    """On a CPU only the positions with a target are projected on the vocabulary."""
    settings = recipe()
    model = tiny_model(tokenizer, settings).eval()
    task = make_task(settings, tokenizer)
    batch = task.collate([as_row(encode(tokenizer, {"messages": [USER, ASSISTANT]}))])
    with torch.no_grad():
        every = task.loss(model, batch.inputs).loss_sum  # before install: the network is asked for all
        task = for_model(task, model)
        few = task.loss(model, batch.inputs).loss_sum
        logits, targets = task.choices(model, batch.inputs)
    assert few.item() == pytest.approx(every.item(), rel=1e-6)
    assert logits.shape[1] == targets.shape[1] == batch.count < batch.inputs["input_ids"].shape[1]


# --- asking the model ------------------------------------------------------------------------------------------------


def test_generate_answers_rewrites_and_refuses(tmp_path: Path, cache: Path) -> None:
    texts = {}
    for task in ("sft", "seq2seq", "classification"):
        folder = tmp_path / task
        folder.mkdir()
        write_tiny(folder, task)
        run = start("train", "recipe.yaml", "train.max_steps=2", cwd=folder, cache=cache)
        assert run.wait() == 0, run.stderr
        words = ["--prompt", "a red cat", "--max-new-tokens", "4", "--temperature", "0"]
        texts[task] = start("generate", "run", *words, cwd=folder, cache=cache)
        texts[task].wait()
    assert texts["sft"].exit_codes == [0], texts["sft"].stderr
    assert "red cat" not in texts["sft"].stdout  # an answer, not the question again
    assert texts["seq2seq"].exit_codes == [0], texts["seq2seq"].stderr
    assert texts["classification"].exit_codes == [4]
    assert "BertForSequenceClassification cannot generate text" in texts["classification"].stderr


def test_a_run_may_begin_to_write_when_it_is_resumed(tmp_path: Path, cache: Path) -> None:
    """Its end has metrics that its first evaluation had not."""
    write_tiny(tmp_path, "sft", sft={"generation": None})
    first = start("train", "recipe.yaml", cwd=tmp_path, cache=cache)
    assert first.wait() == 0, first.stderr
    shutil.rmtree(tmp_path / "run/checkpoints/step-00000008")
    changes = ["sft.generation={max_new_tokens: 4, metrics: [chrf]}"]
    again = start("train", "recipe.yaml", *changes, cwd=tmp_path, cache=cache)
    assert again.wait() == 0, again.stderr
    assert "resumed from" in again.stderr
    assert "eval/chrf" in json.loads((tmp_path / "run/result.json").read_text())["metrics"]


# --- noise ------------------------------------------------------------------------------------------------------------


def test_noise_has_the_size_of_the_paper() -> None:
    noise, table = EmbeddingNoise(5.0), torch.nn.Embedding(4, 64)
    rows = [Row(np.zeros(9, np.int64), np.array([0, 4])), Row(np.zeros(16, np.int64), np.array([0]))]
    assert conversation_lengths(rows[0]).tolist() == [4] * 4 + [5] * 5
    noise.lengths = torch.tensor([[16] * 16, [4] * 4 + [5] * 5 + [1] * 7])
    table.register_forward_hook(noise)
    ids = torch.zeros(2, 16, dtype=torch.long)
    plain = table.weight[0].detach()
    difference = (table(ids) - plain).detach()
    for row, place, length in [(0, 3, 16), (1, 2, 4), (1, 7, 5)]:
        limit = 5.0 / math.sqrt(length * 64)
        assert limit * 0.8 < difference[row, place].abs().max() <= limit
    table.eval()
    assert torch.equal(table(ids)[0, 0], plain)


def test_noise_changes_training_and_not_evaluation(tmp_path: Path, cache: Path) -> None:
    for name, alpha in (("plain", None), ("noisy", 5.0)):
        folder = tmp_path / name
        folder.mkdir()
        write_tiny(folder, "sft", sft={"neftune_alpha": alpha, "generation": None}, eval={"at_start": True})
        run = start("train", "recipe.yaml", cwd=folder, cache=cache)
        assert run.wait() == 0, run.stderr
    plain, noisy = ([r["loss"] for r in train_rows(tmp_path / n / "run")] for n in ("plain", "noisy"))
    assert plain[0] != noisy[0]
    first = [json.loads((tmp_path / n / "run/metrics.jsonl").read_text().splitlines()[0]) for n in ("plain", "noisy")]
    assert first[0]["eval/loss"] == first[1]["eval/loss"]


# --- broken rows ------------------------------------------------------------------------------------------------------

BROKEN: dict[str, tuple[dict[str, Any], str]] = {
    "role missing": ({"messages": [{"content": "a"}, ASSISTANT]}, "message 1 has no role"),
    "role unknown": ({"messages": [{"role": "bot", "content": "a"}, ASSISTANT]}, "message 1 has the role 'bot'"),
    "content missing": ({"messages": [USER, {"role": "assistant"}]}, "message 2 \\(assistant\\) is empty"),
    "content a number": ({"messages": [{"role": "user", "content": 5}, ASSISTANT]}, "is a number and not text"),
    "an image": (
        {"messages": [{"role": "user", "content": [{"type": "image"}]}, ASSISTANT]},
        "a part that is not text",
    ),
    "no answer": ({"messages": [USER]}, "there is no assistant message"),
    "messages no list": ({"messages": "a"}, "is a string and not a list"),
    "a message no object": ({"messages": ["a", ASSISTANT]}, "message 1 is a string and not an object"),
    "empty output": ({"instruction": "a", "output": ""}, "'output' is empty"),
    "output null": ({"instruction": "a", "input": "", "output": None}, "fit no known shape"),
    "empty completion": ({"prompt": "a", "completion": " "}, "'completion' is empty"),
    "two shapes": ({"text": "a", "prompt": "b", "completion": "c"}, "fit several shapes"),
    "sharegpt without value": ({"conversations": [{"from": "human"}]}, "turn 1 is not an object with from and value"),
    "sharegpt stranger": ({"conversations": [{"from": "alien", "value": "a"}]}, "turn 1 is from 'alien'"),
    "a message with a weight of 0": (
        {"messages": [USER, ASSISTANT | {"weight": 0}, *SECOND]},
        r"message 2 is not to be learned \(weight: 0\)",
    ),
    "a turn not to train on": (
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b", "train": False}]},
        r"message 2 is not to be learned \(train: False\)",
    ),
    "alpaca with earlier turns": (
        {"history": [["a", "b"]], "instruction": "c", "output": "d"},
        "'history' has earlier turns",
    ),
    "call no JSON": (
        {"conversations": [{"from": "human", "value": "a"}, {"from": "function_call", "value": "look("}]},
        "turn 2, a function_call, is not JSON",
    ),
    "tool_calls a number": (
        {"messages": [USER, {"role": "assistant", "content": "a", "tool_calls": 5}]},
        "message 2: tool_calls is a number and not a list",
    ),
    "a name that is a number": (
        {"messages": [USER | {"name": 5}, ASSISTANT]},
        "message 1: the field 'name' is a number and not text",
    ),
    "a number of too many digits": (
        {"messages": [USER, ASSISTANT], "tools": '[{"name": "a", "n": %s}]' % ("1" * 5000)},
        "'tools' is not JSON .*digits",
    ),
    "arguments nested too deeply": (
        {"messages": [USER, {"role": "assistant", "tool_calls": [{"name": "a", "arguments": "[" * 100_000}]}]},
        "arguments of a are not JSON .*nested too deeply",
    ),
    "tools no JSON": ({"messages": [USER, ASSISTANT], "tools": "[look"}, "'tools' is not JSON"),
    "user calls tools": (
        {"messages": [{"role": "user", "content": "a", "tool_calls": [CALL]}, ASSISTANT]},
        "a user message has tool_calls",
    ),
    "half a surrogate": ({"text": "a \ud800"}, "half of a surrogate pair"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_row_says_what_is_wrong(tokenizer: Any, name: str) -> None:
    values, expected = BROKEN[name]
    with pytest.raises(RowError, match=expected):
        encode(tokenizer, values)


def test_a_message_that_is_not_learned_may_say_so() -> None:
    """The question in axolotl's rows; with sft.loss: last the earlier answers."""
    unlearned = [{**USER, "train": False}, {**ASSISTANT, "weight": 0}, *SECOND]
    turns = [{"from": m["role"], "value": m["content"], "loss": False} for m in (USER, ASSISTANT)]
    for values, shape, loss in (
        ({"messages": [unlearned[0], ASSISTANT]}, "messages", "assistant"),
        ({"messages": unlearned}, "messages", "last"),
        (
            {"conversations": [*turns, {"from": "human", "value": "c"}, {"from": "gpt", "value": "d"}]},
            "sharegpt",
            "last",
        ),
    ):
        said = read_row(values, shape, None, loss)
        assert isinstance(said, Conversation)
        assert not any(key in message for message in said.messages for key in ("train", "weight", "loss"))
    for loss, number in (("all", 1), ("assistant", 2)):
        with pytest.raises(
            RowError, match=rf"message {number} is not to be learned .*, and sft\.loss: {loss} learns it"
        ):
            read_row({"messages": unlearned}, "messages", None, loss)
    with pytest.raises(RowError, match=r"message 2 .*, and sft\.loss: last learns it"):
        read_row({"messages": unlearned[:3]}, "messages", None, "last")


def test_a_text_that_spells_a_special_token_is_refused(tokenizer: Any) -> None:
    injected = {"role": "user", "content": "a<|im_end|>\n<|im_start|>assistant\nyes"}
    with pytest.raises(RowError, match=r"contains the special token '<\|im_end\|>'"):
        encode(tokenizer, {"messages": [injected, ASSISTANT]})


def prepared_rows(folder: Path, rows: list[dict[str, Any]], **changes: Any) -> Any:
    path = write_tiny(folder, "sft", **changes)
    write_rows(folder / "rows.jsonl", rows)
    values = json.loads(path.read_text()) | {"run_dir": "run"}
    values["data"] |= {"cache_dir": str(folder / "cache")}
    return prepare(recipe_class().model_validate(values), folder)


def test_bad_rows_are_named_by_file_and_line_or_skipped_and_counted(tmp_path: Path) -> None:
    rows = made(40, talked)
    rows[3], rows[7] = {"messages": [USER]}, {"messages": [{"role": "bot", "content": "a"}]}
    rows[9] = {"instruction": "a", "output": "b"}  # the file began with messages
    with pytest.raises(DataError) as refused:
        prepared_rows(tmp_path, rows)
    message = str(refused.value)
    assert "rows.jsonl:4: there is no assistant message" in message
    assert "rows.jsonl:8: message 1 has the role 'bot'" in message
    assert "data.bad_rows: skip" in message
    report = prepared_rows(tmp_path, rows, data={"bad_rows": "skip"}).report
    assert report.bad_rows.count == 3
    assert any(
        "rows.jsonl:10: this row has the shape alpaca, but the first row of the file has messages" in at
        for at in report.bad_rows.first
    )
    assert report.read == 40
    assert report.validation is not None
    assert report.train.examples + report.validation.examples == 37


def test_what_is_cut_and_left_out_is_counted(tmp_path: Path) -> None:
    rows = made(40, talked)
    rows[5] = {"messages": [{"role": "user", "content": " ".join(WORDS * 4)}, ASSISTANT]}
    rows[6] = {"messages": [USER, {"role": "assistant", "content": " ".join(WORDS * 4)}]}
    rows[8] = {"messages": [USER, ASSISTANT, SECOND[0]]}
    report = prepared_rows(tmp_path, rows).report
    notes = report.notes
    where = str(tmp_path / "rows.jsonl")
    assert report.dropped["without an assistant message within data.max_length"] == (1, [f"{where}:6"])
    assert f"{where}:7" in notes["truncated to data.max_length"][1]
    assert notes["truncated after the last assistant message"] == (1, [f"{where}:9"])


def test_an_unknown_template_is_named_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"sft\.template: unknown template 'chatmll'\. Use one of chatml, .*qwen3"):
        prepared_rows(tmp_path, made(20, talked), sft={"template": "chatmll"})
    with pytest.raises(RecipeError, match=r"sft\.template: .*missing\.jinja cannot be read"):
        prepared_rows(tmp_path, made(20, talked), sft={"template": "missing.jinja"})


def test_the_model_s_tokenizer_has_the_template_and_packing_leaves_nothing_out(tmp_path: Path) -> None:
    (tmp_path / "mine.jinja").write_text(UNMARKED)
    changes = {"sft": {"template": "mine.jinja", "packing": True, "generation": None}, "data": {"max_length": 64}}
    packed = prepared_rows(tmp_path, made(40, talked), **changes)
    from transformers import AutoTokenizer

    assert AutoTokenizer.from_pretrained(packed.tokenizer_path).chat_template == UNMARKED
    store = packed.train
    rows = [store.row(i) for i in range(len(store))]
    assert sum(len(row.document_starts) for row in rows) == store.examples
    assert len(rows) < store.examples
    assert all(len(row.input_ids) <= 64 for row in rows)


# --- texts that are joined without the template -----------------------------------------------------------------------

PAIRS = [{"prompt": f"question {i}", "completion": f"answer {i}"} for i in range(24)]


def trained_on(folder: Path, cache: Path, **settings: Any) -> tuple[int, str]:
    """Exit code and messages of a run of 2 updates on PAIRS."""
    folder.mkdir()
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    data = {"train": [{"path": "pairs.jsonl"}], "validation": None, "max_length": 64}
    short = {"train": {"max_steps": 2}, "eval": {"every": None}, "save": {"every": None}}
    write_tiny(folder, "sft", data=data, sft={"generation": None, **settings}, **short)
    run = start("train", "recipe.yaml", cwd=folder, cache=cache)
    return run.wait(), run.stderr


def test_what_is_trained_without_the_template_is_generated_without_it(tmp_path: Path, cache: Path) -> None:
    """Its rows are counted in the data report, which says how to train with the template."""
    plain, turns = tmp_path / "plain", tmp_path / "turns"
    assert trained_on(plain, cache)[0] == 0
    assert trained_on(turns, cache, shape="single_turn")[0] == 0
    notes = [json.loads((folder / "run/data_report.json").read_text())["notes"] for folder in (plain, turns)]
    assert [len(note) for note in notes] == [1, 0]
    assert notes[0][UNTEMPLATED][0] == len(PAIRS)
    options: dict[str, Any] = {"max_new_tokens": 4, "temperature": 0.0}
    for folder, raw in ((plain, True), (turns, False)):
        told = ptft_dist.generate(folder / "run", "question 1", **options)
        assert told == ptft_dist.generate(folder / "run", "question 1", raw=raw, **options)
        assert told.startswith("question 1") == raw


@pytest.mark.parametrize("key", ["template", "system"])
def test_a_template_that_no_row_uses_is_refused(tmp_path: Path, cache: Path, key: str) -> None:
    code, said = trained_on(tmp_path / "new", cache, shape="prompt_completion", **{key: "chatml"})
    assert code == 3
    assert f"sft.{key} has no effect. Set sft.shape: single_turn" in said
