"""Extractive question answering: windows as in transformers, targets, SQuAD's scores, the loss of BERT's head."""

from __future__ import annotations

import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from prepare_support import prepare
from support import merge
from task_support import for_model, make_task
from tiny import write_rows
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, BertConfig, BertForQuestionAnswering

from ptft_dist.config.recipe import Recipe
from ptft_dist.config.tokenizer_section import TokenizerTraining
from ptft_dist.data.store import Row
from ptft_dist.data.tokenizer import train_tokenizer
from ptft_dist.errors import DataError, RecipeError
from ptft_dist.tasks.common.frame import Frame
from ptft_dist.tasks.common.scores.spans import answer_scores, answer_words, span_scores
from ptft_dist.tasks.question_answering.encode import BROKEN, NO_ROOM
from ptft_dist.tasks.question_answering.task import QuestionAnswering
from ptft_dist.tasks.registry import recipe_class
from ptft_dist.training.batches import mask_all

WORDS = ["red", "green", "blue", "tiger", "panda", "river", "mountain", "sleeps", "runs", "Ä", "日本", "don't", "x-ray"]
NO_ANSWER: dict[str, list[Any]] = {"text": [], "answer_start": []}


def question(chance: random.Random, longest: int = 40) -> dict[str, Any]:
    """One in four has no answer, one in four has two gold answers."""
    words = chance.choices(WORDS, k=chance.randint(3, longest))
    context, kind = " ".join(words), chance.randrange(4)
    answers: dict[str, list[Any]] = {"text": [], "answer_start": []}
    for _ in range(min(kind, 1) + (kind == 3)):
        first = chance.randrange(len(words))
        last = min(first + chance.randrange(4), len(words) - 1)
        start = len(" ".join([*words[:first], ""]))
        answers["text"].append(" ".join(words[first : last + 1]))
        answers["answer_start"].append(start)
    return {"question": f"where is the {chance.choice(WORDS)}?", "context": context, "answers": answers}


def questions(count: int = 50, seed: int = 0, longest: int = 40) -> list[dict[str, Any]]:
    chance = random.Random(seed)
    return [question(chance, longest) for _ in range(count)]


def make_recipe(folder: Path, train: list[dict[str, Any]], validation: list[dict[str, Any]], **changes: Any) -> Recipe:
    write_rows(folder / "train.jsonl", train)
    write_rows(folder / "valid.jsonl", validation)
    recipe: dict[str, Any] = {
        "task": "question_answering",
        "model": {"config": {"model_type": "bert"}},
        "tokenizer": {"train": {"vocab_size": 320}},
        "data": {"train": [{"path": "train.jsonl"}], "validation": [{"path": "valid.jsonl"}], "max_length": 40},
        "question_answering": {"stride": 7},
        "batch": {"global_size": 1, "micro_size": 1},
        "train": {"max_steps": 1},
        "run_dir": "run",
    }
    recipe["data"]["cache_dir"] = str(folder / "cache")
    return recipe_class().model_validate(merge(recipe, changes))


def made(folder: Path, train: list[dict[str, Any]], validation: list[dict[str, Any]], **changes: Any) -> Any:
    """(what was prepared, its tokenizer, the task)."""
    recipe = make_recipe(folder, train, validation, **changes)
    prepared = prepare(recipe, folder)
    tokenizer = AutoTokenizer.from_pretrained(prepared.tokenizer_path)
    return prepared, tokenizer, make_task(recipe, tokenizer, prepared.survey)


# --- windows ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ["bpe", "wordpiece"])
def test_windows_and_targets_are_those_of_transformers(tmp_path: Path, algorithm: str) -> None:
    """Windows of tokenizer(..., return_overflowing_tokens=True), and in each the first right answer, found by walking
    over the offsets; [CLS] where it is not whole."""
    rows = questions()
    tokenizer_section = {"train": {"algorithm": algorithm, "vocab_size": 320}}
    prepared, tokenizer, _ = made(tmp_path, rows, rows, tokenizer=tokenizer_section)
    theirs = tokenizer(
        [row["question"] for row in rows],
        [row["context"] for row in rows],
        truncation="only_second",
        max_length=40,
        stride=7,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
        return_token_type_ids=True,
    )
    assert len(prepared.train) == len(theirs["input_ids"]) > len(rows) * 1.3
    answered = 0
    for i, (ids, of) in enumerate(zip(theirs["input_ids"], theirs["overflow_to_sample_mapping"], strict=True)):
        row, found = rows[of], prepared.train.row(i)
        assert found.input_ids.tolist() == ids
        assert found.columns["token_type_ids"].tolist() == theirs["token_type_ids"][i]
        places = [p for p, text in enumerate(theirs.sequence_ids(i)) if text == 1]
        assert found.columns["context"].tolist() == [places[0], places[-1] + 1]
        expected = (0, 0)
        if row["answers"]["text"]:
            begin = row["answers"]["answer_start"][0]
            end = begin + len(row["answers"]["text"][0])
            holds = [
                p
                for p in places
                if max(theirs["offset_mapping"][i][p][0], begin) < min(theirs["offset_mapping"][i][p][1], end)
            ]
            shown = [theirs["offset_mapping"][i][p] for p in holds]
            if shown and shown[0][0] <= begin and shown[-1][1] >= end:
                expected = (holds[0], holds[-1])
                answered += 1
        assert (found.columns["start"][0], found.columns["end"][0]) == expected
        assert "meta" not in found.columns
    assert answered > 30
    assert prepared.survey == {"unanswerable": sum(not row["answers"]["text"] for row in rows)}


def test_a_target_has_all_tokens_of_the_answer_and_no_other(tmp_path: Path) -> None:
    """Answers without spaces around them, in bytes, one token each (two for Ä): (text, first, last)."""
    context = "(re)bl-Äx"
    cases = [("re", 1, 2), ("bl", 4, 5), (")", 3, 3), ("Ä", 7, 8), ("x", 9, 9), ("(", 0, 0), (context, 0, 9)]
    rows = [
        {"question": "?", "context": context, "answers": {"text": [text], "answer_start": [context.index(text)]}}
        for text, _, _ in cases
    ]
    bytes_alone = {"train": {"vocab_size": 260, "min_frequency": 10**6}}
    prepared, _, _ = made(tmp_path, rows, questions(1), tokenizer=bytes_alone)
    for i, (_, first, last) in enumerate(cases):
        found = prepared.train.row(i).columns
        begins = found["context"][0]
        assert (found["start"][0] - begins, found["end"][0] - begins) == (first, last)


@pytest.mark.parametrize(
    ("single", "pair"),
    [
        ("<s> $A </s>", "<s> $A </s> </s> $B </s>"),  # RoBERTa
        ("$A </s> <s>:2", "$A </s> $B:1 </s>:1 <s>:2"),  # XLNet
        ("$A", "$A $B"),
        ("<s> $A", "<s> $A <s>:1 $B:1"),  # Llama
    ],
)
def test_special_tokens_stand_where_the_tokenizer_has_them(single: str, pair: str) -> None:
    tokenizer = train_tokenizer(TokenizerTraining(vocab_size=300), WORDS, ("bos=<s>", "eos=</s>", "pad"))
    backend = tokenizer.backend_tokenizer
    special = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<s>", "</s>")]
    backend.post_processor = TemplateProcessing(single=single, pair=pair, special_tokens=special)
    texts = ["a red panda", "runs"]
    plain = [backend.encode(text, add_special_tokens=False).ids for text in texts]
    for count in (1, 2):
        whole, frame = backend.encode(*texts[:count]), Frame.of(tokenizer, backend, count)
        assert frame.fill(*plain[:count]) == (whole.ids, whole.type_ids)
        assert len(frame) == len(whole.ids) - sum(map(len, plain[:count]))


def test_an_evaluation_reads_the_answer_back(tmp_path: Path) -> None:
    """The targets of every window, as a prediction, are the answers: all questions right, each counted once."""
    rows = questions(40)
    prepared, _, task = made(tmp_path, rows, rows)
    store = prepared.validation
    perfect = {}
    for i in range(len(store)):
        start, end = (int(store.row(i).columns[name][0]) for name in ("start", "end"))
        perfect[i] = [start, end, 5.0, -5.0] if start else [0, 0, -np.inf, 5.0]
    scores, samples = task.scores(perfect, store.row)
    assert samples == []
    assert {"loss", *scores} == set(task.settings.metric_names)
    assert scores == {"exact_match": 1.0, "f1": 1.0}
    wrong = {i: [*store.row(i).columns["context"][:1].repeat(2), -9.0, 9.0] for i in range(len(store))}
    empty = sum(not row["answers"]["text"] for row in rows) / len(rows)
    assert task.scores(wrong, store.row)[0] == {"exact_match": empty, "f1": empty}


BAD_ROWS = {
    "no answers": ({"question": "q", "context": "c"}, "no field 'answers'"),
    "no question": ({"question": " ", "context": "c", "answers": NO_ANSWER}, "the field 'question' is empty"),
    "a context that is none": ({"question": "q", "context": 7, "answers": NO_ANSWER}, "'context' is a number"),
    "a list of answers": ({"question": "q", "context": "c", "answers": ["c"]}, "'answers' is a list and not {text"),
    "no places": ({"question": "q", "context": "c", "answers": {"text": ["c"]}}, "'answer_start' is not a list"),
    "a place too few": (
        {"question": "q", "context": "c", "answers": {"text": ["c", "c"], "answer_start": [0]}},
        "text has 2 items, answer_start has 1",
    ),
    "an empty answer": (
        {"question": "q", "context": "c", "answers": {"text": [""], "answer_start": [0]}},
        "an answer is empty. If there is no answer, leave both lists empty",
    ),
    "a place as text": (
        {"question": "q", "context": "c", "answers": {"text": ["c"], "answer_start": ["0"]}},
        "answer_start of 'c' is '0' and not a whole number",
    ),
    "an answer elsewhere": (
        {"question": "q", "context": "Ärzte in Bonn", "answers": {"text": ["Bonn"], "answer_start": [10]}},
        "'Bonn' is not at answer_start 10, where the context has 'onn'; it is at 9",
    ),
    "an answer nowhere": (
        {"question": "q", "context": "abc", "answers": {"text": ["abc", "d"], "answer_start": [0, 1]}},
        "'d' is not at answer_start 1, where the context has 'b'; the context does not contain it",
    ),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_broken_row_is_named(tmp_path: Path, name: str) -> None:
    row, why = BAD_ROWS[name]
    with pytest.raises(DataError) as caught:
        made(tmp_path, [*questions(3), row], questions(2))
    assert f"{tmp_path}/train.jsonl:4: " in str(caught.value)
    assert why in str(caught.value)


def test_what_has_no_room_is_left_out_and_counted(tmp_path: Path) -> None:
    """A question as long as a row; one that leaves less room than windows share; and an answer that no window holds."""
    context = " ".join(WORDS * 4)
    rows = [
        {"question": "where " * 60, "context": "red", "answers": NO_ANSWER},
        {"question": "where " * 31, "context": context, "answers": NO_ANSWER},
        {"question": "where " * 30, "context": "red", "answers": NO_ANSWER},  # a short context has room
        {"question": "where", "context": context, "answers": {"text": [context], "answer_start": [0]}},
    ]
    prepared, _, _ = made(tmp_path, [*questions(30), *rows], questions(2))
    dropped = prepared.report.dropped
    assert dropped[NO_ROOM] == (2, [f"{tmp_path}/train.jsonl:31", f"{tmp_path}/train.jsonl:32"])
    assert prepared.report.notes[BROKEN] == (1, [f"{tmp_path}/train.jsonl:34"])
    # To the token: 40 less 3 special ones and a stride of 7. The tokenizer knows no ~, which is a byte each time.
    known = {"train": None, "path": str(prepared.tokenizer_path)}
    rows = [{"question": "~" * n, "context": context, "answers": NO_ANSWER} for n in (29, 30)]
    prepared, _, _ = made(tmp_path, rows, questions(2), tokenizer=known)
    assert prepared.report.dropped[NO_ROOM] == (1, [f"{tmp_path}/train.jsonl:2"])
    with pytest.raises(RecipeError, match=r"question_answering\.stride: 37 leaves no room in data\.max_length \(40\)"):
        made(tmp_path, questions(3), questions(2), question_answering={"stride": 37})


# --- loss and predictions ---------------------------------------------------------------------------------------------


def network(tokenizer: Any) -> BertForQuestionAnswering:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = BertConfig(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, **sizes)
    model = BertForQuestionAnswering(config).eval()
    model.qa_outputs.weight.data *= 30  # so that predictions differ
    return model


def rows_of(store: Any, numbers: list[int]) -> tuple[list[Row], list[tuple[int, int]]]:
    return [store.row(i) for i in numbers], [(0, i) for i in numbers]


def test_the_loss_is_that_of_transformers(tmp_path: Path) -> None:
    """On windows of one length in one batch. On ragged ones theirs may choose padding, and depends on how much there
    is; ours is that of each window alone."""
    rows = questions()
    prepared, tokenizer, task = made(tmp_path, rows, rows)
    model, store = network(tokenizer), prepared.train
    task = for_model(task, model)

    def theirs(inputs: dict[str, torch.Tensor]) -> float:
        names = ("input_ids", "attention_mask", "token_type_ids")
        targets = {"start_positions": inputs["targets_start"], "end_positions": inputs["targets_end"]}
        return model(**{name: inputs[name] for name in names}, **targets).loss.item()

    full = [i for i in range(len(store)) if len(store.row(i).input_ids) == 40][:8]
    batch = task.collate(*rows_of(store, full))
    assert batch.inputs["token_type_ids"].any()
    with torch.no_grad():
        assert task.loss(model, batch.inputs).loss_sum.item() / batch.count == pytest.approx(
            theirs(batch.inputs), rel=1e-5
        )
        ragged = [i for i in range(len(store)) if i not in full][:12]
        together = task.collate(*rows_of(store, ragged))
        assert (together.inputs["attention_mask"] == 0).any()
        loss, metrics, *_ = task.loss(model, together.inputs)
        alone = [theirs(task.collate(*rows_of(store, [i])).inputs) for i in ragged]
    assert together.count == len(ragged)
    assert loss.item() == pytest.approx(sum(alone), rel=1e-5)
    assert metrics["accuracy"][1] == len(ragged)


def test_a_stand_in_counts_nothing(tmp_path: Path) -> None:
    prepared, tokenizer, task = made(tmp_path, questions(20), questions(2))
    model = network(tokenizer)
    task = for_model(task, model)
    batch = task.collate(*rows_of(prepared.train, [0, 1, 2]))
    loss, metrics, *_ = task.loss(model, mask_all(batch.inputs))
    loss.backward()
    assert loss.item() == 0
    assert [x.item() for x in metrics["accuracy"]] == [0, 0]
    assert model.qa_outputs.weight.grad is not None
    assert not model.qa_outputs.weight.grad.any()


def naive_best(
    start: list[float], end: list[float], context: tuple[int, int], n_best: int, longest: int
) -> tuple[int, int, float] | None:
    """All pairs of the best starts and ends, one by one."""
    inside = range(*context)
    starts = sorted(inside, key=lambda i: -start[i])[:n_best]
    ends = sorted(inside, key=lambda i: -end[i])[:n_best]
    pairs = [(start[i] + end[j], i, j) for i in starts for j in ends if i <= j < i + longest]
    if not pairs:
        return None
    score, first, last = max(pairs)
    return first, last, score


@pytest.mark.parametrize(("n_best", "longest"), [(20, 30), (3, 30), (20, 2), (1, 5)])
def test_the_best_span_of_a_window(tmp_path: Path, n_best: int, longest: int) -> None:
    settings = {"n_best": n_best, "max_answer_length": longest}
    _, _, task = made(tmp_path, questions(20), questions(2), question_answering=settings)
    chance = np.random.default_rng(0)
    start, end = chance.normal(size=(2, 60, 25)).astype(np.float32)
    first = chance.integers(1, 15, 60)
    context = np.stack([first, first + chance.integers(1, 10, 60)], 1)
    nowhere = chance.integers(0, 1, 60)
    inputs = {"context": torch.from_numpy(context), "nowhere": torch.from_numpy(nowhere)}
    found = task.best_spans(inputs, torch.from_numpy(start), torch.from_numpy(end)).tolist()
    for i, (a, b, score, none) in enumerate(found):
        expected = naive_best(start[i].tolist(), end[i].tolist(), tuple(context[i]), n_best, longest)
        assert none == pytest.approx(start[i][nowhere[i]] + end[i][nowhere[i]], abs=1e-6)
        if expected is None:
            assert score == -np.inf
        else:
            assert (a, b) == expected[:2]
            assert score == pytest.approx(expected[2], abs=1e-6)
    assert any(score == -np.inf for _, _, score, _ in found) == (n_best == 1)


def test_evaluation_gives_the_spans_of_the_logits(tmp_path: Path) -> None:
    prepared, tokenizer, task = made(tmp_path, questions(20), questions(2))
    model = network(tokenizer)
    task = for_model(task, model)
    batch = task.collate(*rows_of(prepared.train, list(range(10))))
    with torch.no_grad():
        out = task.evaluate(model, batch.inputs)
        assert out.loss_sum == task.loss(model, batch.inputs).loss_sum
        names = ("input_ids", "attention_mask", "token_type_ids")
        logits = model(**{name: batch.inputs[name] for name in names})
    for i, found in enumerate(task.predictions(out.predictions)):
        context = tuple(prepared.train.row(i).columns["context"].tolist())
        expected = naive_best(logits.start_logits[i].tolist(), logits.end_logits[i].tolist(), context, 20, 30)
        assert expected is not None
        assert (found[0], found[1]) == expected[:2]
        assert found[3] == pytest.approx((logits.start_logits[i, 0] + logits.end_logits[i, 0]).item(), abs=1e-5)


def window(number: int, text: str, answers: list[str]) -> Any:
    """A row whose context begins at position 2, a token a character."""
    meta = {"question": number, "context": text, "offsets": [[i, i + 1] for i in range(len(text))], "answers": answers}
    return SimpleNamespace(meta=meta, columns={"context": np.array([2, 2 + len(text)])})


def bare_task(tmp_path: Path, unanswerable: int, **section: Any) -> QuestionAnswering:
    recipe = make_recipe(tmp_path, [], [], question_answering=section)
    tokenizer = train_tokenizer(TokenizerTraining(vocab_size=262), ["a"], recipe.settings.special_tokens)
    return make_task(recipe, tokenizer, {"unanswerable": unanswerable})


def test_a_question_has_one_answer_over_its_windows(tmp_path: Path) -> None:
    """The best span of all windows wins; no answer only if every window prefers it by more than the margin."""
    rows = [window(7, "abcd", ["cd"]), window(7, "cdef", ["cd"]), window(8, "x y", []), window(9, "pq", ["q", "p q"])]
    predictions = {
        0: [2, 3, 1.0, 0.5],  # "ab"
        1: [2, 3, 2.0, 2.6],  # "cd": better; and one window's no answer is worse than both
        2: [2, 2, 1.0, 1.5],  # "x", but no answer is better
        3: [3, 3, 1.0, -4.0],  # "q"
    }
    score = lambda task: task.scores(predictions, lambda i: rows[i])[0]["exact_match"]  # noqa: E731
    assert score(bare_task(tmp_path, 5)) == 1.0
    assert score(bare_task(tmp_path, 5, no_answer_margin=0.6)) == pytest.approx(2 / 3)  # "x" instead of nothing
    assert score(bare_task(tmp_path, 5, no_answer_margin=-2.0)) == pytest.approx(2 / 3)  # nothing instead of "cd"
    assert score(bare_task(tmp_path, 0)) == pytest.approx(2 / 3)  # training knew no question without an answer
    with pytest.raises(RecipeError, match="no_answer_margin has no effect"):
        bare_task(tmp_path, 0, no_answer_margin=0.6)
    predictions[3] = [2, 2, -np.inf, -4.0]  # no span at all
    assert score(bare_task(tmp_path, 5)) == pytest.approx(2 / 3)


# --- scores -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("The  Cat, a-an the THEATRE.", ["cat", "aan", "theatre"]),  # punctuation goes first, then articles
        ("U.S.\tdollars\n", ["us", "dollars"]),
        ("an “a–b” of the", ["“", "–b”", "of"]),  # only ASCII punctuation goes; an article may be what is left
        ("", []),
        ("the !?", []),
        ("北京，中国。", ["北", "京", "中", "国"]),
        ("2022年 Tokyoで", ["2022", "年", "tokyo", "で"]),
        ("Straße 12", ["straße", "12"]),
    ],
)
def test_what_is_compared(text: str, words: list[str]) -> None:
    assert answer_words(text) == words


@pytest.mark.parametrize(
    ("ours", "answers", "exact", "f1"),
    [
        ("the cat", ["Cat!"], 1, 1),
        ("black cat", ["cat", "dog"], 0, 2 / 3),
        ("black cat", ["dog", "black black cat"], 0, 4 / 5),
        ("cat", ["dog"], 0, 0),
        ("", [], 1, 1),
        ("the", [], 1, 1),
        ("cat", [], 0, 0),
        ("", ["cat"], 0, 0),
        ("", ["the", "cat"], 0, 0),  # an answer without words does not count beside another
        ("", ["the"], 1, 1),
        ("北京市", ["北京"], 0, 4 / 5),
        ("北 京", ["北京"], 1, 1),
    ],
)
def test_scores_by_hand(ours: str, answers: list[str], exact: float, f1: float) -> None:
    assert answer_scores(ours, answers) == (exact, pytest.approx(f1))


def test_scores_are_averaged_over_questions() -> None:
    scores = span_scores(["cat", "black cat", ""], [["a cat"], ["cat"], ["dog"]])
    assert scores == {"exact_match": pytest.approx(1 / 3), "f1": pytest.approx((1 + 2 / 3) / 3)}
