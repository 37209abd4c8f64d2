"""Scores of generated texts against direct calls of sacrebleu and rouge_score, for many scripts."""

from __future__ import annotations

import random
from typing import Any, get_args

import pytest
from pydantic import ValidationError
from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenizers import DefaultTokenizer
from sacrebleu.metrics import BLEU, CHRF

from ptft_dist.tasks.common.generation_settings import GenerationSettings
from ptft_dist.tasks.common.scores.text import Words, text_scores

PAIRS = [  # prediction, reference
    ("", "a cat sat on the mat"),
    ("a cat sat on the mat", "a cat sat on the mat"),
    ("The CAT, sat: on the mat!", "the cat sat on a mat."),
    ("!!! ...", "?!"),
    ("word", "a very much longer reference than what was written for it"),
    ("it goes on and on and on and on and on and on and on and on", "it goes on"),
    ("snake_case and 3.14", "snake case and 3 14"),
    ("Die größte Übung fällt aus.", "Die größte Übung fiel gestern aus."),
    ("高祖东进攻打项羽", "高祖向东进攻，攻打项羽。"),
    ("赵国灭亡后", "赵国灭亡后"),
]
ENGLISH = [pair for pair in PAIRS if all(text.isascii() for text in pair)]


def scores(pairs: list[tuple[str, str]], **settings: Any) -> dict[str, float]:
    return text_scores([a for a, _ in pairs], [b for _, b in pairs], GenerationSettings(**settings))


@pytest.mark.parametrize("tokenize", [None, "13a", "zh", "char", "intl", "none"])
@pytest.mark.parametrize("pairs", [PAIRS, PAIRS[:1], PAIRS[3:4], PAIRS[8:]], ids=["all", "empty", "marks", "zh"])
def test_bleu_and_chrf_are_sacrebleus(pairs: list[tuple[str, str]], tokenize: Any) -> None:
    found = scores(pairs, metrics=["bleu", "chrf"], bleu_tokenize=tokenize)
    ours, theirs = [a for a, _ in pairs], [b for _, b in pairs]
    assert found["bleu"] == BLEU(tokenize=tokenize or "13a").corpus_score(ours, [theirs]).score
    assert found["chrf"] == CHRF().corpus_score(ours, [theirs]).score


def test_the_tokenizer_of_bleu_matters_for_chinese() -> None:
    assert scores(PAIRS[8:], metrics=["bleu"], bleu_tokenize="zh")["bleu"] > 40
    assert scores(PAIRS[8:], metrics=["bleu"])["bleu"] == 0


def by_default(pairs: list[tuple[str, str]]) -> dict[str, float]:
    """rouge_score with its own tokenizer, averaged in a loop."""
    names = ["rouge1", "rouge2", "rougeL"]
    totals = dict.fromkeys(names, 0.0)
    for prediction, reference in pairs:
        for name, score in RougeScorer(names).score(reference, prediction).items():
            totals[name] += score.fmeasure
    return {name: total / len(pairs) for name, total in totals.items()}


def test_rouge_of_english_is_rouge_scores_own() -> None:
    found = scores(ENGLISH, metrics=["rouge"])
    assert found == pytest.approx(by_default(ENGLISH), abs=1e-12)
    assert 0.3 < found["rougeL"] < 1


def test_words_of_ascii_are_rouge_scores_own() -> None:
    chance, default = random.Random(0), DefaultTokenizer()
    for _ in range(2000):
        text = "".join(chance.choices([chr(i) for i in range(128)], k=chance.randint(0, 40)))
        assert Words().tokenize(text) == default.tokenize(text), repr(text)


def test_rouge_of_other_scripts_is_that_of_the_same_words_in_ascii() -> None:
    """Chinese characters spelt as English words, and umlauts as other letters, leave the score as it is."""
    letters = {ord(c): s for c, s in zip("äöüßÄÖÜ", ["qa", "qo", "qu", "qs", "QA", "QO", "QU"], strict=True)}
    signs = {i: f" sign{i} " for _, pair in enumerate(PAIRS[8:]) for text in pair for i in map(ord, text)}
    signs |= {ord("，"): ",", ord("。"): "."}
    respelt = [tuple(text.translate(letters).translate(signs) for text in pair) for pair in PAIRS[7:]]
    assert all(text.isascii() for pair in respelt for text in pair)
    expected = by_default(respelt)  # type: ignore[arg-type]
    assert scores(PAIRS[7:], metrics=["rouge"]) == pytest.approx(expected, abs=1e-12)
    assert expected["rouge1"] > 0.7 > by_default(PAIRS[7:])["rouge1"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Die größte KATZE, 3.5-mal!", ["die", "größte", "katze", "3", "5", "mal"]),
        ("gro\u0308ßte", ["größte"]),  # o and a combining diaeresis
        ("我爱Python3和C", ["我", "爱", "python3", "和", "c"]),
        ("東京タワー", ["東", "京", "タ", "ワ", "ー"]),
        ("한국어 문장", ["한국어", "문장"]),
        ("हिन्दी भाषा", ["हिन्दी", "भाषा"]),  # marks stay with their letters
        ("“…” — ！", []),
        ("", []),
    ],
)
def test_words_by_hand(text: str, words: list[str]) -> None:
    assert Words().tokenize(text) == words


def test_exact_match_is_a_share() -> None:
    pairs = [("a", "a"), (" a\n", "a"), ("A", "a"), ("", "a"), ("a b", "a  b"), ("好", "好")]
    assert scores(pairs, metrics=["exact_match"]) == {"exact_match": 3 / 6}


def test_the_names_are_those_of_the_scores() -> None:
    kinds = get_args(get_args(GenerationSettings.model_fields["metrics"].annotation)[0])
    assert set(kinds) == {"exact_match", "bleu", "chrf", "rouge"}
    for chosen in ([*kinds], ["rouge"], ["chrf", "exact_match"], []):
        settings = GenerationSettings(metrics=tuple(chosen))
        assert settings.metric_names == tuple(text_scores(["a"], ["a"], settings))
    assert GenerationSettings(metrics=("rouge",)).metric_names == ("rouge1", "rouge2", "rougeL")


def test_settings_without_effect_are_refused() -> None:
    with pytest.raises(ValidationError, match="bleu_tokenize"):
        GenerationSettings(metrics=("chrf",), bleu_tokenize="zh")
    with pytest.raises(ValidationError, match="no metrics"):
        GenerationSettings(metrics=(), show=0)
