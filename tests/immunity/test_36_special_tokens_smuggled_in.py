"""36: special tokens injected by tool descriptions, keys of arguments, or the boundary of prompt and completion."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from tiny import LLAMA, WORDS

from ptft_dist.config.recipe import Recipe
from ptft_dist.config.tokenizer_section import TokenizerTraining
from ptft_dist.data.encoder import EncoderContext, RowError
from ptft_dist.data.formats import Record
from ptft_dist.data.tokenizer import train_tokenizer
from ptft_dist.tasks.common.chat_template import CHATML, trl_templates
from ptft_dist.tasks.registry import recipe_class
from ptft_dist.tasks.sft.encode import ConversationRows

END, USER, ASSISTANT = "<|im_end|>", {"role": "user", "content": "a cat"}, {"role": "assistant", "content": "it sleeps"}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    texts = [" ".join(WORDS), "user assistant system tool it sleeps and the a <|im_ end|>"] * 9
    roles = ("eos=<|im_end|>", "bos", "pad")
    return train_tokenizer(TokenizerTraining(vocab_size=330), texts, roles, ["<|im_start|>", "<s>"])


def recipe(max_length: int) -> Recipe:
    return recipe_class().model_validate(
        {
            "task": "sft",
            "model": {"config": LLAMA},
            "tokenizer": {"path": "none"},
            "data": {"train": [{"path": "none"}], "max_length": max_length},
            "batch": {"global_size": 2, "micro_size": 2},
            "train": {"max_steps": 1},
            "run_dir": "run",
        }
    )


def encode(tokenizer: Any, values: dict[str, Any], template: str = CHATML, max_length: int = 4000) -> list[int]:
    """The ids of a row."""
    tokenizer.chat_template = template
    encoder = ConversationRows(EncoderContext.of(recipe(max_length), tokenizer))
    record = Record(values, "rows.jsonl:1")
    encoder.check(encoder.settings, record)
    (example,) = encoder.build(record, encoder.encode(encoder.pieces(record)))
    return np.array(example.columns["input_ids"]).tolist()


def call(name: str = "look", **arguments: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": name, "arguments": arguments}}]}


def tool(**changes: Any) -> dict[str, Any]:
    function = {"name": "look", "description": "looks", "parameters": {"type": "object", "properties": {}}}
    return {"type": "function", "function": function | changes}


AT = {"properties": {"at": {"type": "string"}}}
SPELT: dict[str, tuple[dict[str, Any], str]] = {
    "content": ({"messages": [{"role": "user", "content": f"a{END}"}, ASSISTANT]}, r"message 1\.content"),
    "description": ({"messages": [USER, ASSISTANT], "tools": [tool(description=f"looks{END}")]}, r"tools\[0\].*descr"),
    "key of a tool": (
        {"messages": [USER, ASSISTANT], "tools": [tool(parameters={"properties": {f"a{END}": {}}})]},
        r"tools\[0\]\.function\.parameters\.properties, key ",
    ),
    "value in a tool": (
        {"messages": [USER, ASSISTANT], "tools": [tool(parameters={"properties": {"a": {"enum": ["b", END]}}})]},
        r"tools\[0\]\.function\.parameters\.properties\.a\.enum\[1\]",
    ),
    "tools as text": (
        {"messages": [USER, ASSISTANT], "tools": '[{"name": "look", "description": "\\u003c|im_end|>"}]'},
        r"tools\[0\]\.description",
    ),
    "key of an argument": (
        {"messages": [USER, call(**{f"at{END}": 1})], "tools": [tool(parameters=AT)]},
        r"message 2\.tool_calls\[0\]\.function\.arguments, key ",
    ),
    "value of an argument": (
        {"messages": [USER, call(at={"deep": [END]})], "tools": [tool(parameters=AT)]},
        r"message 2\.tool_calls\[0\]\.function\.arguments\.at\.deep\[0\]",
    ),
    "name of a call": ({"messages": [USER, call(name=f"look{END}")], "tools": [tool()]}, r"message 2.*function\.name"),
    "name of a message": ({"messages": [USER | {"name": f"eve{END}"}, ASSISTANT]}, r"message 1\.name"),
    "id of a call": (
        {"messages": [USER, call(), {"role": "tool", "content": "b", "tool_call_id": END}, ASSISTANT]},
        r"message 3\.tool_call_id",
    ),
    "reasoning": ({"messages": [USER, ASSISTANT | {"reasoning_content": f"so{END}"}]}, r"message 2\.reasoning_content"),
    "prompt": ({"prompt": f"a{END}", "completion": "b"}, "prompt: "),
    "completion": ({"prompt": "a", "completion": f"b{END}"}, "completion: "),
    "text": ({"text": f"b{END}"}, "text: "),
    "system column": ({"system": END, "instruction": "a", "output": "b"}, r"message 1\.content"),
}


@pytest.mark.parametrize("name", SPELT)
def test_a_special_token_in_any_text_of_a_row_is_refused_by_the_field_s_name(tokenizer: Any, name: str) -> None:
    values, place = SPELT[name]
    with pytest.raises(RowError, match=rf"{place}.*contains the special token '<\|im_end\|>'"):
        encode(tokenizer, values)


# The content stands directly behind a "<", and names are put between "<" and ">".
TIGHT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<{{ c.function.name }}>{% for k in c.function.arguments %}<{{ k }}>{% endfor %}"
    "{% endfor %}<|im_end|>{% endgeneration %}{% else %}<{{ m.content }}{{ m.name or '' }}<|im_end|>{% endif %}"
    "{% endfor %}{% for t in tools or [] %}<{{ t.name }}>{{ t.description }}{% endfor %}"
)
SEAMS: dict[str, tuple[dict[str, Any], str]] = {
    "prompt and completion": ({"prompt": "a<|im_", "completion": "end|>b"}, "prompt and completion: "),
    "completion and EOS": ({"prompt": "a", "completion": "b<|im_end|"}, ""),
    "template and content": (
        {"messages": [{"role": "user", "content": "|im_end|>you may"}, ASSISTANT]},
        r"message 1\.content: ",
    ),
    "content and name": (
        {"messages": [{"role": "user", "content": "a<|im_", "name": "end|>"}, ASSISTANT]},
        r"message 1\.content and message 1\.name: ",
    ),
    "a tool's name": (
        {"messages": [USER, ASSISTANT], "tools": [{"name": "s", "description": "b"}]},
        r"tools\[0\]\.name",
    ),
    "a call's name": ({"messages": [USER, call(name="s")]}, r"message 2\.tool_calls\[0\]\.function\.name"),
    "a key of arguments": (
        {"messages": [USER, call(s=1)]},
        r"message 2\.tool_calls\[0\]\.function\.arguments, key 's'",
    ),
}


@pytest.mark.parametrize("name", SEAMS)
def test_a_special_token_formed_with_the_text_next_to_it_is_refused(tokenizer: Any, name: str) -> None:
    values, place = SEAMS[name]
    if name == "completion and EOS":  # "<|im_end|" + "<|im_end|>": no token more or less
        assert encode(tokenizer, values, TIGHT).count(tokenizer.eos_token_id) == 1
        return
    with pytest.raises(RowError, match=f"{place}.*changes the special tokens of the row"):
        encode(tokenizer, values, TIGHT)


TEMPLATES = {name: path.read_text() for name, path in trl_templates().items() if name.startswith(("qwen", "llama3"))}


@pytest.mark.parametrize("name", ["chatml", "tight", *TEMPLATES])
def test_rows_whose_texts_are_texts_pass_under_any_template(tokenizer: Any, name: str) -> None:
    """Texts that only resemble special tokens are accepted, and so are tools, calls, ids and numbers."""
    template = {"chatml": CHATML, "tight": TIGHT}.get(name) or TEMPLATES[name]
    if END not in template:
        pytest.skip("a template with other special tokens than this tokenizer's")
    odd = {"role": "user", "content": "1 < 2 <|im_ end|> \n<think>a</think> <|x|> [/INST] </s>"}
    answer = {"role": "assistant", "content": " |im_end|> <"}
    rows = [
        {"messages": [odd, answer, USER, ASSISTANT]},
        {"messages": [{"role": "system", "content": "b"}, odd, answer]},
    ]
    if "message.reasoning_content" in template:
        rows.append({"messages": [USER, ASSISTANT | {"reasoning_content": "if a < b"}]})
    result = {"role": "tool", "content": "3 < 4", "name": "look", "tool_call_id": "abcdefghi"}
    called = [USER, call(at="x < y", many=[1, 2.5, None, True, {"deep": "<"}]), result, ASSISTANT]
    if "tool" in template and name != "tight":
        rows.append({"messages": called, "tools": [tool(parameters=AT), tool(name="other")]})
    for row in rows:
        assert encode(tokenizer, row, template).count(tokenizer.eos_token_id) >= 1


def test_a_row_that_is_tokenized_in_part_is_checked_too(tokenizer: Any) -> None:
    long = {"role": "assistant", "content": "it sleeps " * 20_000}
    assert len(encode(tokenizer, {"messages": [USER, long]}, max_length=500)) == 500
    with pytest.raises(RowError, match="changes the special tokens"):
        encode(tokenizer, {"messages": [{"role": "user", "content": "|im_end|>"}, long]}, TIGHT, max_length=500)
