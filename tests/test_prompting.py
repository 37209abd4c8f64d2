"""Prompting: log-likelihoods, calibration and generation against naive loops with transformers; choice of examples."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from prompting_support import (
    LABELS,
    ROWS,
    TEMPLATE,
    naive_log_likelihoods,
    naive_shots,
    save_model,
    write_recipe,
)
from support import start
from tiny import write_rows
from transformers import AutoModelForCausalLM, AutoTokenizer

from ptft_dist import api
from ptft_dist.errors import DataError, RecipeError

CHAT = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
CHAT_PROMPT = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
CHAT += "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PTFT_CACHE", str(cache))


def judged(model: Path, recipe: Path, out: str = "out.json") -> tuple[Any, list[dict[str, Any]]]:
    result = api.evaluate_model(model, recipe, out=out)
    lines = Path(out).with_suffix(".rows.jsonl").read_text().splitlines()
    return result, [json.loads(line) for line in lines]


def context_of(text: str, shots: int = 0) -> str:
    """A prompt as the documentation describes it."""
    before = [TEMPLATE.format(text=row["text"]) + LABELS[row["label"]] for row in naive_shots(ROWS[:40], shots)]
    return "\n\n".join([*before, TEMPLATE.format(text=text)])


def softmax(scores: list[float]) -> list[float]:
    largest = max(scores)
    powers = [math.exp(score - largest) for score in scores]
    return [power / sum(powers) for power in powers]


@pytest.mark.parametrize("shots", [0, 3])
def test_log_likelihoods_are_those_of_single_forward_passes(model: Path, tmp_path: Path, shots: int) -> None:
    result, rows = judged(model, write_recipe(tmp_path, model, prompting={"shots": shots}))
    right, loss = 0, 0.0
    for row, line in zip(ROWS[40:], rows, strict=True):
        found = naive_log_likelihoods(model, context_of(row["text"], shots), list(LABELS.values()))
        expected = dict(zip(LABELS, [total for total, _ in found], strict=True))
        assert line["answer"]["log_likelihoods"] == pytest.approx(expected, abs=1e-4)
        assert line["answer"]["label"] == max(expected, key=expected.__getitem__)
        probabilities = dict(zip(LABELS, softmax(list(expected.values())), strict=True))
        assert line["answer"]["probabilities"] == pytest.approx(probabilities, abs=1e-4)
        right += line["answer"]["label"] == row["label"]
        loss -= math.log(probabilities[row["label"]])
    assert result.metrics["eval/accuracy"] == right / 20
    assert result.metrics["eval/loss"] == pytest.approx(loss / 20, abs=1e-4)
    assert {line["answer"]["label"] for line in rows} == set(LABELS)  # a test with one answer would show little


@pytest.mark.parametrize("normalize", ["tokens", "bytes"])
def test_scores_are_calibrated_and_normalized(model: Path, tmp_path: Path, normalize: str) -> None:
    changes = {"shots": 2, "normalize": normalize, "calibrate": "N/A"}
    _, rows = judged(model, write_recipe(tmp_path, model, prompting=changes))
    free = naive_log_likelihoods(model, context_of("N/A", 2), list(LABELS.values()))
    for row, line in zip(ROWS[40:], rows, strict=True):
        found = naive_log_likelihoods(model, context_of(row["text"], 2), list(LABELS.values()))
        sizes = [count for _, count in found] if normalize == "tokens" else [len(answer) for answer in LABELS.values()]
        scores = [(a - b) / size for (a, _), (b, _), size in zip(found, free, sizes, strict=True)]
        expected = dict(zip(LABELS, softmax(scores), strict=True))
        assert line["answer"]["probabilities"] == pytest.approx(expected, abs=1e-4)
        # What is shown as log-likelihood stays one.
        assert line["answer"]["log_likelihoods"]["thing"] == pytest.approx(found[1][0], abs=1e-4)


@pytest.mark.parametrize("kind", ["cpu", "cpu_zero3"])
def test_two_processes_find_the_same(model: Path, tmp_path: Path, cache: Path, kind: str) -> None:
    """Each chooses the same examples by itself; the second one also calibrates."""
    recipe = write_recipe(tmp_path, model, prompting={"shots": 3, "calibrate": "N/A"}, data={"cache_dir": "cache"})
    done = start(
        "evaluate", str(model), str(recipe), "--out", "two.json", cwd=tmp_path, cache=cache, ranks=2, kind=kind
    )
    assert done.wait() == 0, done.stderr
    two = [json.loads(line) for line in (tmp_path / "two.rows.jsonl").read_text().splitlines()]
    _, one = judged(model, recipe)
    assert len(one) == len(two) == 20
    for mine, theirs in zip(one, two, strict=True):
        assert theirs["id"] == mine["id"]
        for name in ("log_likelihoods", "probabilities"):
            assert theirs["answer"][name] == pytest.approx(mine["answer"][name], abs=1e-4)


def test_the_seed_chooses_other_examples(model: Path, tmp_path: Path) -> None:
    write_recipe(tmp_path, model)
    chosen = {}
    for seed in (0, 1):
        recipe = write_recipe(tmp_path, model, prompting={"shots": 3}, train={"seed": seed})
        shots = api.prepare(recipe).survey["shots"]
        expected = naive_shots(ROWS[:40], 3, seed)
        assert shots == [[TEMPLATE.format(text=row["text"]), LABELS[row["label"]]] for row in expected]
        chosen[seed] = shots
        assert api.prepare(write_recipe(tmp_path, model, prompting={"shots": 1}, train={"seed": seed})).survey[
            "shots"
        ] == [shots[0]]
    assert chosen[0] != chosen[1]
    assert {answer for _, answer in chosen[0]} == set(LABELS.values())


def test_generated_texts_and_losses_of_references(model: Path, tmp_path: Path) -> None:
    for name, rows in (("train", ROWS[:40]), ("validation", ROWS[40:])):
        write_rows(tmp_path / f"own-{name}.jsonl", [{**row, "target": row["text"][::-1]} for row in rows])
    changes = {
        "data": {"train": [{"path": "own-train.jsonl"}], "validation": [{"path": "own-validation.jsonl"}]},
        "prompting": {
            "labels": None,
            "separator": "e",
            "generation": {"max_new_tokens": 12, "metrics": ["exact_match"]},
        },
    }
    result, rows = judged(model, write_recipe(tmp_path, model, **changes))
    network, tokenizer = AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model)
    total, count, cut = 0.0, 0, 0
    for row, line in zip(ROWS[40:], rows, strict=True):
        ids = tokenizer(context_of(row["text"]), add_special_tokens=False, return_tensors="pt")["input_ids"]
        written = network.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=tokenizer.pad_token_id)
        text = tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True).strip()
        cut += "e" in text
        assert line["answer"] == {"text": text.split("e")[0].strip()}
        found, tokens = naive_log_likelihoods(model, context_of(row["text"]), [row["text"][::-1]])[0]
        assert line["values"]["loss"] == pytest.approx([-found, tokens], abs=1e-3)
        total, count = total - found, count + tokens
    assert cut
    assert result.metrics["eval/loss"] == pytest.approx(total / count, rel=1e-4)
    assert result.metrics["eval/perplexity"] == pytest.approx(math.exp(total / count), rel=1e-3)
    assert result.metrics["eval/exact_match"] == 0
    assert result.details["perplexity"]["token"] == pytest.approx(math.exp(total / count), rel=1e-3)


def test_a_text_of_an_adapter_ends_where_it_has_learned_to_end(model: Path, tmp_path: Path) -> None:
    """Such as at the end of a turn, which is no end for its base."""
    network, tokenizer = AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model)
    prompts = [tokenizer(row["text"], add_special_tokens=False, return_tensors="pt")["input_ids"] for row in ROWS[40:]]
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": tokenizer.pad_token_id}
    end = int(network.generate(prompts[0], **options)[0, prompts[0].shape[1] + 2])
    ends = [tokenizer.eos_token_id, end]
    written = [network.generate(ids, eos_token_id=ends, **options)[0, ids.shape[1] :] for ids in prompts]
    get_peft_model(network, LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear")).save_pretrained("adapter")
    tokenizer.save_pretrained("adapter")
    (tmp_path / "adapter/task_config.json").write_text(json.dumps({"eos_token_id": ends}))
    write_rows(tmp_path / "new.jsonl", [{"text": row["text"]} for row in ROWS[40:]])
    prompting = {"template": "{text}", "labels": None, "separator": "#", "generation": {"max_new_tokens": 6}}
    recipe = write_recipe(tmp_path, model, prompting=prompting)
    api.predict("adapter", "new.jsonl", "answers.jsonl", source=recipe)
    answers = [json.loads(line)["prediction"] for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    expected = [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in written]
    assert [each["text"] for each in answers] == expected


def test_new_rows_get_the_answers_of_the_evaluation(model: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, model, prompting={"shots": 2, "calibrate": "N/A"})
    _, rows = judged(model, recipe)
    write_rows(tmp_path / "new.jsonl", [{"text": row["text"]} for row in ROWS[40:]])
    api.predict(model, "new.jsonl", "answers.jsonl", source=recipe)
    answers = [json.loads(line)["prediction"] for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    for answer, line in zip(answers, rows, strict=True):
        assert answer["probabilities"] == pytest.approx(line["answer"]["probabilities"], abs=1e-4)


def test_a_content_free_prompt_must_fit(model: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, model, prompting={"calibrate": "N/A " * 200})
    with pytest.raises(RecipeError, match=r"prompting\.calibrate: the prompt with .* longer than data\.max_length"):
        api.evaluate_model(model, recipe)


def test_a_chat_template_renders_the_examples(model: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHAT
    network = AutoModelForCausalLM.from_pretrained(model)
    torch.manual_seed(1)
    network.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    network.save_pretrained(tmp_path / "chat")
    tokenizer.save_pretrained(tmp_path / "chat")
    section = {"labels": {"animal": "the cat", "thing": "old tree"}, "chat": True, "shots": 1}
    recipe = write_recipe(tmp_path, tmp_path / "chat", prompting=section)
    _, rows = judged(tmp_path / "chat", recipe)
    shot = naive_shots(ROWS[:40], 1)[0]
    for row, line in zip(ROWS[40:43], rows, strict=False):
        messages = [
            {"role": "user", "content": TEMPLATE.format(text=shot["text"])},
            {"role": "assistant", "content": section["labels"][shot["label"]]},  # type: ignore[index]
            {"role": "user", "content": TEMPLATE.format(text=row["text"])},
        ]
        context = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        found = naive_log_likelihoods(tmp_path / "chat", context, ["the cat", "old tree"])
        assert list(line["answer"]["log_likelihoods"].values()) == pytest.approx([x for x, _ in found], abs=1e-4)
    write_rows(tmp_path / "validation.jsonl", [{"text": "a <|im_end|> b", "label": "thing"}])
    with pytest.raises(DataError, match=r"validation\.jsonl:1: .*contains the special token '<\|im_end\|>'"):
        api.prepare(recipe)
    with pytest.raises(RecipeError, match=r"prompting\.chat: this tokenizer has no chat template"):
        api.prepare(write_recipe(tmp_path, model, prompting={"chat": True}))


def test_a_text_of_a_chat_ends_with_its_turn(model: Path, tmp_path: Path) -> None:
    """The end of a turn is no EOS of this tokenizer or generation config."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template, end = CHAT, tokenizer.convert_tokens_to_ids("<|im_end|>")
    network = AutoModelForCausalLM.from_pretrained(model)
    torch.manual_seed(1)
    network.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    texts = [CHAT_PROMPT.format(row["text"]) for row in ROWS[40:]]
    prompts = [tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"] for text in texts]
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": tokenizer.pad_token_id}
    third = network.generate(prompts[0], **options)[0, prompts[0].shape[1] + 2]
    network.lm_head.weight.data[end] = 1.01 * network.lm_head.weight.data[third]  # now this is written instead

    def written(ends: list[int]) -> list[str]:
        texts = [network.generate(ids, eos_token_id=ends, **options)[0, ids.shape[1] :] for ids in prompts]
        return [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in texts]

    expected = written([tokenizer.eos_token_id, end])
    assert expected != written([tokenizer.eos_token_id])
    network.save_pretrained(tmp_path / "chat")
    tokenizer.save_pretrained(tmp_path / "chat")
    write_rows(tmp_path / "new.jsonl", [{"text": row["text"]} for row in ROWS[40:]])
    prompting = {"template": "{text}", "labels": None, "chat": True, "generation": {"max_new_tokens": 6}}
    recipe = write_recipe(tmp_path, tmp_path / "chat", prompting=prompting)
    api.predict(tmp_path / "chat", "new.jsonl", "answers.jsonl", source=recipe)
    answers = [json.loads(line)["prediction"] for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert [each["text"] for each in answers] == expected


def test_a_row_is_not_its_own_example(model: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, model, prompting={"shots": 2})
    first, second = naive_shots(ROWS[:40], 2)
    write_rows(tmp_path / "validation.jsonl", [first])
    result, rows = judged(model, recipe)
    context = "\n\n".join(
        [TEMPLATE.format(text=second["text"]) + LABELS[second["label"]], TEMPLATE.format(text=first["text"])]
    )
    found = naive_log_likelihoods(model, context, list(LABELS.values()))
    assert list(rows[0]["answer"]["log_likelihoods"].values()) == pytest.approx([x for x, _ in found], abs=1e-4)
    assert result.rows == 1
    assert "with one example less, because it is itself one of prompting.shots" in api.prepare(recipe).report.notes


def test_what_does_not_fit_is_dropped_and_said(model: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, model)
    write_rows(tmp_path / "validation.jsonl", [*ROWS[40:45], {"text": "dog " * 300, "label": "animal"}])
    assert judged(model, recipe)[0].rows == 5
    assert api.prepare(recipe).report.dropped["longer than data.max_length"].times == 1


def test_training_is_refused_before_it_starts(model: Path, tmp_path: Path, cache: Path) -> None:
    recipe = write_recipe(tmp_path, model)
    message = "task: prompting is evaluated only: ptft evaluate MODEL RECIPE"
    with pytest.raises(RecipeError, match=message):
        api.train(recipe)
    done = start("train", str(recipe), cwd=tmp_path, cache=cache)
    assert done.wait() == 2
    assert message in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "a"}, "there is no field 'label'"),
        ({"text": "a", "label": "plant"}, "the label 'plant' is none of animal, thing. .* in prompting.labels"),
        ({"text": " ", "label": "thing"}, "the field 'text' is empty"),
        ({"text": ["a"], "label": "thing"}, "the field 'text' is a list"),
    ],
)
def test_bad_rows_are_named(model: Path, tmp_path: Path, row: dict[str, Any], message: str) -> None:
    recipe = write_recipe(tmp_path, model)
    write_rows(tmp_path / "validation.jsonl", [ROWS[0], row])
    with pytest.raises(DataError, match=f"validation.jsonl:2: {message}"):
        api.prepare(recipe)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"template": "no column"}, "it has no column, so all rows have the same prompt"),
        ({"template": "{text} {}"}, r"\{\} is no column"),
        ({"template": "{text.x}"}, r"\{text.x\} is no column"),
        ({"template": "{text"}, "double a brace that is part of the text"),
        ({"template": "{text} {label}"}, r"\{label\} is the answer; remove it"),
        ({"labels": {"a": "x", "b": "x"}}, "two labels have the same text"),
        ({"labels": None, "calibrate": "N/A"}, "calibrate: has no effect here: it needs labels"),
        ({"generation": {"max_new_tokens": 3}}, "generation: has no effect here: it needs free generation"),
    ],
)
def test_wrong_settings_are_refused(model: Path, tmp_path: Path, section: dict[str, Any], message: str) -> None:
    recipe = write_recipe(tmp_path, model)
    contents = json.loads(recipe.read_text())
    contents["prompting"] |= section
    with pytest.raises(RecipeError, match=message):
        api.load_recipe(contents)


def test_too_few_examples_are_refused(model: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"prompting\.shots: 41 examples are wanted, and the training rows have 40"):
        api.prepare(write_recipe(tmp_path, model, prompting={"shots": 41}))


def test_braces_numbers_and_labels_from_yaml(model: Path, tmp_path: Path) -> None:
    """A number in a column or as a label is text; a doubled brace is one."""
    rows = [{"text": 4.5, "kind": i % 2} for i in range(4)]
    recipe = write_recipe(
        tmp_path,
        model,
        data={
            "train": [{"path": "own.jsonl", "fields": {"label": "kind"}}],
            "validation": [{"path": "own.jsonl", "fields": {"label": "kind"}}],
        },
        prompting={"template": "{{x}} {text}:"},
    )
    write_rows(tmp_path / "own.jsonl", rows)
    text = recipe.read_text().replace('{"animal": " the cat", "thing": " old tree"}', '{0: " no", 1: " yes"}')
    recipe.write_text(text)
    _, found = judged(model, recipe)
    assert [line["reference"] for line in found] == ["0", "1", "0", "1"]
    expected = naive_log_likelihoods(model, "{x} 4.5:", [" no", " yes"])
    assert list(found[0]["answer"]["log_likelihoods"].values()) == pytest.approx([x for x, _ in expected], abs=1e-4)


def test_an_answer_without_a_token_is_refused(model: Path, tmp_path: Path) -> None:
    """` cat` is one token, and ` ca` are three."""
    recipe = write_recipe(tmp_path, model)
    contents = json.loads(recipe.read_text())
    contents["prompting"] = {"template": "{text} ca", "labels": {"thing": "t", "animal": " x"}}
    recipe.write_text(json.dumps(contents))
    with pytest.raises(DataError, match="the tokenizer gives the answer no token of its own: 't'"):
        api.prepare(recipe)
