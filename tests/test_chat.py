"""`ptft chat`: the answers of transformers to all messages so far."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from adapt_support import METHODS, write_adapted
from support import start, write_recipe
from tiny import write_tiny
from transformers import AutoModelForCausalLM, AutoTokenizer

from ptft_dist import api
from ptft_dist.cli import command
from ptft_dist.config.tokenizer_section import TokenizerTraining
from ptft_dist.data.tokenizer import train_tokenizer
from ptft_dist.errors import RecipeError
from ptft_dist.inference import chatting
from ptft_dist.tasks.common.chat import UNTEMPLATED

QUESTIONS = ("red cat", "a small dog runs", "old")
GREEDY: dict[str, Any] = {"temperature": 0, "max_new_tokens": 6}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    folder = tmp_path_factory.mktemp("chat")
    model = {"config": {"max_position_embeddings": 256, "initializer_range": 0.3}}  # long, with many things to say
    write_tiny(folder, "sft", train={"max_steps": 2}, eval={"every": None}, save={"every": None}, model=model)
    trained = start("train", "recipe.yaml", cwd=folder, cache=cache)
    assert trained.wait() == 0, trained.stderr
    return folder / "run"


@pytest.mark.parametrize("algorithm", ["bpe", "unigram"])
def test_what_is_shown_is_the_answer(algorithm: Any) -> None:
    """Characters that are split over tokens, and lines that begin with spaces, which decoders may remove."""
    settings = {"algorithm": algorithm, "vocab_size": 300} | ({"byte_fallback": True} if algorithm == "unigram" else {})
    tokenizer = train_tokenizer(TokenizerTraining.model_validate(settings), ["def f(x): return x one two"] * 9)
    text, shown = "def f(x):\n    return x\n  # 鹦鹉螺号你好 🙂\n\n 한국어 ひらがな end", []
    streamer = chatting._Streamer(tokenizer, shown.append)
    streamer.put(torch.tensor([[1, 2]]))  # the prompt
    for i in tokenizer(text, add_special_tokens=False)["input_ids"]:
        streamer.put(torch.tensor([i]))
    streamer.end()
    assert "".join(shown) == text
    assert "�" not in "".join(shown)
    assert len(shown) > 10


@pytest.mark.parametrize("system", [None, "small house"])
def test_it_answers_as_transformers_does(run: Path, system: str | None) -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(run / "model"), AutoTokenizer.from_pretrained(run / "model")
    messages = [{"role": "system", "content": system}] if system else []
    chat, shown = api.chat(run, system=system, **GREEDY), []
    for question in QUESTIONS:
        messages.append({"role": "user", "content": question})
        given = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
        said = model.generate(**given, do_sample=False, max_new_tokens=6)[0, given["input_ids"].shape[1] :]
        text = tokenizer.decode(said, skip_special_tokens=True).strip()
        messages.append({"role": "assistant", "content": text})
        assert chat.answer(question, shown.append) == text
        assert "".join(shown).strip() == text
        shown.clear()
    assert chat.messages == messages
    assert len({each["content"] for each in messages if each["role"] == "assistant"}) > 1


def test_the_seed_and_a_new_chat(run: Path) -> None:
    answers = []
    for seed in (1, 1, 2):
        chat = api.chat(run, seed=seed, temperature=2.0, max_new_tokens=12)
        answers.append([chat.answer(question) for question in QUESTIONS])
        chat.restart()
        assert chat.messages == []
        assert chat.answer(QUESTIONS[0]) == answers[-1][0]
    assert answers[0] == answers[1] != answers[2]


def test_a_chat_that_is_too_long_is_refused_and_goes_on(run: Path) -> None:
    chat = api.chat(run, **GREEDY)
    chat.answer("cat")
    before = list(chat.messages)
    with pytest.raises(RecipeError, match=r"tokens, and its answer up to 6: more than .* 256\. Start a new chat"):
        chat.answer("cat " * 300)
    assert chat.messages == before
    chat.answer("dog")
    assert len(chat.messages) == 4


def test_models_that_cannot_chat(tmp_path: Path, documents: Path, cache: Path) -> None:
    for name, what in (("clm", "has no chat template"), ("seq2seq", "is an encoder-decoder")):
        changes: dict[str, Any] = {"train": {"max_steps": 1}, "eval": {"every": None}, "save": {"every": None}}
        if name == "clm":
            write_recipe(tmp_path / name, documents, **changes)
        else:
            (tmp_path / name).mkdir()
            write_tiny(tmp_path / name, name, **changes)
        trained = start("train", "recipe.yaml", cwd=tmp_path / name, cache=cache)
        assert trained.wait() == 0, trained.stderr
        with pytest.raises(RecipeError, match=f"the model {what}, so it cannot chat. Use ptft generate"):
            api.chat(tmp_path / name / "run")


def test_a_run_on_texts_without_the_template_is_refused(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    file = tmp_path / "run/data_report.json"
    report = json.loads(file.read_text())
    file.write_text(json.dumps(report | {"notes": {UNTEMPLATED: [1_000, "rows.jsonl:1"]}}))
    with pytest.raises(RecipeError, match="trained on texts without the chat template, so it cannot chat"):
        api.chat(tmp_path / "run")


def test_a_template_may_reject_a_system_message(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run / "model", tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(run / "model")
    tokenizer.chat_template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}a"
    tokenizer.save_pretrained(tmp_path / "model")
    api.chat(tmp_path / "model", **GREEDY).answer("cat")
    with pytest.raises(RecipeError, match="the chat template rejects these messages: no system"):
        api.chat(tmp_path / "model", system="red", **GREEDY).answer("cat")


def test_adapters_chat(run: Path, tmp_path: Path, cache: Path) -> None:
    """By themselves and by name; the first answers are those of `generate`, which are not the base's."""
    long = {"optim": {"lr": 0.3}, "eval": {"every": None}, "save": {"every": None}}
    write_adapted(tmp_path, run / "model", "sft", METHODS["lora"], **long)
    trained = start("train", "recipe.yaml", cwd=tmp_path, cache=cache)
    assert trained.wait() == 0, trained.stderr
    adapter = tmp_path / "run"
    base, own = (api.generate(model, QUESTIONS[0], seed=0, **GREEDY) for model in (run, adapter))
    assert base != own
    assert api.chat(adapter, **GREEDY).answer(QUESTIONS[0]) == own
    assert api.chat(run, adapters={"lora": adapter}, **GREEDY).answer(QUESTIONS[0]) == own
    with pytest.raises(RecipeError, match="use: chooses among several adapters"):
        api.chat(run, use="lora")


# --- the command ------------------------------------------------------------------------------------------------------


def chat(run: Path, *words: str) -> None:
    words = ("chat", str(run), "--temperature", "0", "--max-new-tokens", "6", *words)
    with command("chat").make_context("ptft", list(words)) as context:
        context.command.invoke(context)


def test_messages_from_a_pipe(run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [QUESTIONS[0], "", QUESTIONS[1], "/new", QUESTIONS[1]]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))
    chat(run)
    one, other = api.chat(run, **GREEDY), api.chat(run, **GREEDY)
    expected = [one.answer(QUESTIONS[0]), one.answer(QUESTIONS[1]), other.answer(QUESTIONS[1])]
    assert [line.strip() for line in capsys.readouterr().out.splitlines()] == expected

    monkeypatch.setattr("sys.stdin", io.StringIO("cat " * 300))
    with pytest.raises(RecipeError, match="more than the model's max_position_embeddings"):
        chat(run)


def test_ctrl_c_ends_an_answer_and_an_error_not_the_chat(
    run: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    typed = iter([QUESTIONS[0], "cat " * 300, QUESTIONS[0]])
    begun: list[str] = []

    def type_in(prompt: str) -> str:
        assert prompt == "> "
        if (line := next(typed, None)) is None:
            raise EOFError
        return line

    class Interrupted(chatting._Streamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            begun.append(text)
            if len(begun) == 1:
                raise KeyboardInterrupt
            super().on_finalized_text(text, stream_end)

    monkeypatch.setattr("builtins.input", type_in)
    monkeypatch.setattr("sys.stdin", type("Terminal", (), {"isatty": lambda _self: True})())
    monkeypatch.setattr(chatting, "_Streamer", Interrupted)
    from ptft_dist.reporting.messages import messages

    with messages():
        chat(run)
    out, err = capfd.readouterr()
    assert out.strip() == api.chat(run, **GREEDY).answer(QUESTIONS[0])
    assert "interrupted: the message and its answer are not part of the chat" in err
    assert "error: the chat has" in err
