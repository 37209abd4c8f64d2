"""Steps that only drop texts: quality, repetition and decontamination, beside naive loops."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
from cleaning_support import DATA, clean, needs_data, random_texts, step

from ptft_dist.data.cache import HashMemo
from ptft_dist.data.cleaning.lines import lines, paragraphs, repeated
from ptft_dist.data.cleaning.repetition import REPEATED_NGRAMS, TOP_NGRAM, ngram_fractions
from ptft_dist.data.cleaning.words import folded_words
from ptft_dist.errors import DataError

SENTENCE = "The cat sat with the dog on that old mat and looked at it. "  # 14 words, 4 different stop words
ENGLISH = """Everyone knows that the bridge of Lyon is beautiful, so we have to see it with our own eyes.
Nobody believed in a long history for this town, but old maps in the library were proof enough.
Teachers explain to their pupils how Spanish verbs change, which is easy to learn and hard to forget!
My sister thinks about moving to London, where rain falls on many days and flats are expensive."""  # 70 words
CHINESE = "\n".join(
    [
        "司马迁是西汉时期的历史学家，他写成了一部伟大的史书。",
        "这本书记载了从黄帝到汉武帝三千多年间的事情，内容丰富。",
        "后来的人都很喜欢读它，因为文字优美，人物生动！",
    ]
)  # 24 + 25 + 19 characters


def gopher(text: str, **settings: int) -> str | None:
    return clean("quality", text, rules=["gopher"], **settings).dropped


def test_good_texts_pass() -> None:
    for text in (ENGLISH, CHINESE):
        assert clean("quality", text) == (text, None, ())
        assert clean("repetition", text) == (text, None, ())


@pytest.mark.parametrize("unit", ["that with ", "猫狗"])
def test_gopher_number_of_words(unit: str) -> None:
    few, many = "gopher: fewer than 50 words", "gopher: more than 60 words"
    for count, expected in [(48, few), (50, None), (60, None), (62, many)]:
        assert gopher(unit * (count // 2), max_words=60) == expected
    assert gopher(unit * 24 + unit.split()[0][:4], max_words=60) == (few if " " in unit else None)
    assert gopher(unit * 30 + unit[0], max_words=60) == many
    assert gopher(ENGLISH, min_words=80) == "gopher: fewer than 80 words"
    assert gopher(SENTENCE * 7143) == "gopher: more than 100,000 words"  # 100,002
    assert gopher(SENTENCE * 7142) is None


def test_gopher_mean_word_length() -> None:
    reason = "gopher: mean word length not between 3 and 10"
    stop = "the that "  # 7 characters in 2 words
    assert gopher(stop + "ab " * 10 + "abcd " * 10, min_words=1) is None  # 67 in 22
    assert gopher(stop + "ab " * 10 + "abc " * 9, min_words=1) == reason  # 54 in 21
    assert gopher(stop + "ab " * 10 + "abc " * 9 + "abcdefghi ", min_words=1) == reason  # 63 in 22
    assert gopher(stop + "ab " * 10 + "abc " * 9 + "abcdefghijkl ", min_words=1) is None  # 66 in 22: exactly 3
    assert gopher(stop + "abcdefghijk " * 13, min_words=1) is None  # 150 in 15: exactly 10
    assert gopher(stop + "abcdefghijk " * 14, min_words=1) == reason  # 161 in 16
    assert gopher("猫" * 50) is None  # mean 1


@pytest.mark.parametrize("symbol", ["#", "...", "…", "......", "……"])
@pytest.mark.parametrize("word", ["that with ", "猫狗"])
def test_gopher_symbols(symbol: str, word: str) -> None:
    reason = "gopher: more than 0.1 hash signs per word" if symbol == "#" else "gopher: more than 0.1 ellipses per word"
    text = word * 50  # 100 words
    assert gopher(text + f"{symbol}, " * 10) is None
    assert gopher(text + f"{symbol}, " * 11) == reason


@pytest.mark.parametrize("bullet", ["-", "*", "•", "·", "●"])
def test_gopher_bullets(bullet: str) -> None:
    reason = "gopher: more than 90% of lines begin with a bullet"
    line = "the cat sat with that dog\n"
    assert gopher(f"  {bullet} {line}" * 9 + line + "\n\n") is None
    assert gopher(f"  {bullet} {line}" * 10 + "\n\n") == reason
    assert gopher(f"{bullet}项目内容项目内容\n" * 19 + "项目\n") == reason


@pytest.mark.parametrize("ellipsis", ["...", "…", "……"])
def test_gopher_lines_with_ellipsis(ellipsis: str) -> None:
    reason = "gopher: more than 30% of lines end with an ellipsis"
    line = "the cat sat with that dog and it has been an old friend of the family"
    assert gopher(f"{line}{ellipsis}  \n" * 3 + f"{line}\n" * 7) is None
    assert gopher(f"{line}{ellipsis}  \n" * 4 + f"{line}\n" * 6) == reason
    assert gopher(f"今天天气很好{ellipsis}\n" * 4 + "今天天气很好\n" * 6) == reason


def test_gopher_words_with_a_letter() -> None:
    reason = "gopher: fewer than 80% of words have a letter"
    for other in ("123 ", "-- ", "12.5% ", "| ", "½ "):
        assert gopher("that with " * 40 + other * 20) in (None, "gopher: mean word length not between 3 and 10")
        assert gopher("that with them " * 27 + other * 21) == reason  # 81 of 102
    assert gopher("猫" * 80 + " 12" * 20) is None
    assert gopher("猫" * 79 + " 12" * 20) == reason


def test_gopher_stop_words_are_for_english_only() -> None:
    reason = "gopher: fewer than 2 English stop words"
    without = "Cheap shoes, great prices, free shipping worldwide, buy now online today, best quality guaranteed. "
    assert gopher(without * 5) == reason
    assert gopher(without * 5 + "the") == reason
    assert gopher(without * 5 + "the the The") == reason
    assert gopher(without * 5 + "The AND") is None
    german = "Das Wetter ist heute sehr schön, und deshalb gehen wir mit den Kindern in den großen Park am Fluss. "
    assert gopher(german * 4) is None


def test_c4() -> None:
    def c4(text: str) -> str | None:
        return clean("quality", text, rules=["c4"]).dropped

    assert c4("One. Two! Three?") is None
    assert c4('He said "one." (Two.) Three...') is None
    assert c4("One. Two!") == "c4: fewer than 3 sentences"
    assert c4("Version 1.2.3 of example.com. Next.") == "c4: fewer than 3 sentences"
    assert c4("第一句。第二句！第三句？") is None
    assert c4("第一句。第二句……") == "c4: fewer than 3 sentences"
    assert c4("第一句。“第二句！”第三句……") is None
    assert c4("पहला वाक्य। दूसरा। तीसरा।") is None
    assert c4("One. Two. Three. Lorem  Ipsum") is None
    assert c4("One. Two. Three. LOREM ipsum dolor") == "c4: lorem ipsum"
    assert c4("One. Two. Three. if (x) { y }") == "c4: curly bracket"


def fineweb(text: str) -> str | None:
    return clean("quality", text, rules=["fineweb"]).dropped


@pytest.mark.parametrize(
    "end", [".", "!", "?", '"', "”", ".)", "...", "…", "。", "！", "？", "…」", "。”", "。）", "』", "»"]
)
def test_fineweb_lines_that_end_with_punctuation(end: str) -> None:
    reason = "fineweb: at most 12% of lines end with punctuation"
    rows = [f"line number {i} has more than thirty characters" for i in range(25)]
    assert fineweb("\n".join(row + end * (i < 4) for i, row in enumerate(rows))) is None  # 16%
    assert fineweb("\n\n".join(row + end * (i < 3) for i, row in enumerate(rows))) == reason  # exactly 12%
    assert fineweb("\n".join(row + "," for row in rows)) == reason


@pytest.mark.parametrize("end", [",", ";", ":", "，", "；", "：", "、", "-", ")", "）", "》", "a", "字"])
def test_ends_of_lines_that_are_no_punctuation(end: str) -> None:
    assert (
        fineweb(f"this line has more than thirty characters{end}")
        == "fineweb: at most 12% of lines end with punctuation"
    )


def test_fineweb_repeated_lines() -> None:
    reason = "fineweb: at least 10% of characters in repeated lines"
    rows = [f"line {i} with 30 characters or more." for i in range(10, 19)]
    assert [len(row) for row in rows] == [35] * 9
    assert fineweb("\n".join([*rows, f"  {rows[0]}"])) == reason  # exactly 10%
    assert fineweb("\n".join([*rows, f"another {rows[1]}", rows[0]])) is None  # 35 of 393


@pytest.mark.parametrize(
    ("shortest", "line"), [(30, "{}: this line has 30 letters. ok."), (10, "{}这一行有十个字呀。")], ids=["en", "zh"]
)
def test_fineweb_short_lines(shortest: int, line: str) -> None:
    reason = f"fineweb: at least 67% of lines shorter than {shortest} characters"
    long = [line.format(chr(0x4E00 + i) if shortest == 10 else i) for i in range(10, 43)]
    assert {len(row) for row in long} == ({10} if shortest == 10 else {33})
    exact = [row[:2] + row[2 + len(row) - shortest :] for row in long]
    assert {len(row) for row in exact} == {shortest}
    short = [f"{i} so short." if shortest == 30 else f"{chr(0x5000 + i)}很短。" for i in range(67)]
    assert fineweb("\n".join([*short, *exact])) == reason  # exactly 67%
    assert fineweb("\n".join([*short[1:], *exact])) is None
    less = [row[:2] + row[3:] for row in exact]
    assert {len(row) for row in less} == {shortest - 1}
    assert fineweb("\n".join(less)) == reason


def test_sets_are_used_in_the_order_of_the_recipe() -> None:
    text = "lorem ipsum"
    assert clean("quality", text).dropped == "gopher: fewer than 50 words"
    assert clean("quality", text, rules=["c4", "gopher"]).dropped == "c4: lorem ipsum"
    assert clean("quality", text, rules=["fineweb"]).dropped == "fineweb: at most 12% of lines end with punctuation"


def test_lines_and_paragraphs() -> None:
    text = " a\nb \n\n\n c\n \t\nd\n"
    assert lines(text) == ["a", "b", "c", "d"]
    assert paragraphs(text) == ["a\nb", "c", "d"]


def naive_repeated(parts: Sequence[str]) -> tuple[float, float]:
    again = [part for i, part in enumerate(parts) if part in parts[:i]]
    if not parts:
        return 0, 0
    return len(again) / len(parts), sum(map(len, again)) / sum(map(len, parts))


def naive_top(words: Sequence[str], n: int) -> float:
    grams = Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))
    most = max(grams.values(), default=0)
    if most < 2:
        return 0
    return most * max(sum(map(len, g)) for g, count in grams.items() if count == most) / sum(map(len, words))


def naive_covered(words: Sequence[str], n: int) -> float:
    inside, seen = set(), set()
    for i in range(len(words) - n + 1):
        if tuple(words[i : i + n]) in seen:
            inside |= set(range(i, i + n))
        seen.add(tuple(words[i : i + n]))
    return sum(len(words[i]) for i in inside) / sum(map(len, words)) if words else 0


@pytest.mark.parametrize("seed", range(60))
def test_repetition_beside_naive_loops(seed: int) -> None:
    rng = random.Random(seed)
    vocabulary = random_texts("abc", rng.choice([1, 2, 5, 20]), seed, longest=5)
    words = rng.choices(vocabulary, k=rng.randint(0, 120))
    for _ in range(rng.randint(0, 3)):  # copied parts
        at = rng.randint(0, len(words))
        words[at:at] = words[: rng.randint(0, 30)]
    assert repeated(words) == pytest.approx(naive_repeated(words))
    top, covered = ((2, 3, 4), (5, 6, 7, 8, 9, 10)) if seed % 2 else ((3, 4, 6), (7, 9, 10, 12, 13, 15))
    expected = [*(naive_top(words, n) for n in top), *(naive_covered(words, n) for n in covered)]
    found = list(ngram_fractions(words, dict.fromkeys(top, 0.0), dict.fromkeys(covered, 0.0)))
    assert found + [0] * (len(expected) - len(found)) == pytest.approx(expected)
    for limit in (0.05, 0.2, 0.4):  # it ends where the rest is within the limits
        early = list(ngram_fractions(words, dict.fromkeys(top, limit), dict.fromkeys(covered, limit)))
        assert early == pytest.approx(expected[: len(early)])
        assert all(fraction <= limit for fraction in expected[len(early) :])


def test_a_longer_ngram_may_have_more_characters_than_any_shorter_one() -> None:
    assert list(ngram_fractions(list("abcxabcy"), {2: 0.6, 3: 0.6}, {5: 0.5})) == [0.5, 0.75]


def numbered(count: int, start: int = 0) -> list[str]:
    """Words that differ, of 4 letters each."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    return ["".join(letters[i // 26**k % 26] for k in (3, 2, 1, 0)) for i in range(start, start + count)]


def test_repeated_lines_and_paragraphs() -> None:
    def reason(parts: list[str], between: str = "\n") -> str | None:
        return clean("repetition", between.join(parts)).dropped

    rows = [" ".join(numbered(8, 8 * i)) for i in range(70)]  # 39 characters each
    again = ["ab"] * 31
    assert reason(rows) is None
    assert reason([*rows[:69], *again]) is None  # 30 of 100 lines
    assert reason([*rows[:68], *again]) == "repetition: more than 30% of lines repeated"
    assert reason([*rows[:3], rows[0]]) == "repetition: more than 20% of characters in repeated lines"  # 1 of 4
    # 1 of 5: exactly 20% of the characters; then the repeated line is found as n-grams.
    assert reason([*rows[:4], rows[0]]) == "repetition: more than 16% of characters in the most frequent 4-gram"

    # Paragraphs of lines that are repeated rarely, or in another order.
    blocks = [f"{row}\nline {i}" for i, row in enumerate(rows[:50])]
    swapped = [f"a{i % 2}\nb{i}" for i in range(40)]
    assert reason([*blocks, *swapped], "\n\n") is None
    parts = ["a\nb", *blocks, *["a\nb"] * 22]
    assert reason(parts, "\n\n") == "repetition: more than 30% of lines repeated"


def test_repeated_paragraphs() -> None:
    """Where paragraphs have different numbers of lines, their fractions are not those of lines."""

    def reason(parts: list[str]) -> str | None:
        return clean("repetition", "\n\n".join(parts)).dropped

    rows = [" ".join(numbered(8, 8 * i)) for i in range(70)]
    long = ["\n".join(rows[i : i + 10]) for i in range(0, 70, 10)]  # 7 paragraphs of 10 lines
    assert reason([*long, "ab", *["ab"] * 3]) is None  # 3 of 11
    assert reason([*long, "ab", *["ab"] * 4]) == "repetition: more than 30% of paragraphs repeated"  # 4 of 12
    # A repeated paragraph of 20 lines of one letter: 20 of 124 characters in lines, but with its line ends 39 of 162.
    letters, others = "\n".join("abcdefghijklmnopqrst"), [str(i) for i in range(100, 128)]
    parts = [letters, *others, letters]
    assert repeated(lines("\n\n".join(parts))) == (20 / 68, 20 / 124)
    assert reason(parts) == "repetition: more than 20% of characters in repeated paragraphs"


@pytest.mark.parametrize("n", TOP_NGRAM)
@pytest.mark.parametrize("chinese", [False, True])
def test_most_frequent_ngram(n: int, chinese: bool) -> None:
    """The n-gram occurs `count` times between words that occur once; 4 times more is above the threshold."""
    size = n * 3 // 2 if chinese else n
    total = 1000
    for extra, expected in [
        (0, None),
        (1, f"repetition: more than {TOP_NGRAM[n]:.0%} of characters in the most frequent {n}-gram"),
    ]:
        count = int(TOP_NGRAM[n] * total / size) + extra
        unique = iter([chr(0x5000 + i) for i in range(total)] if chinese else numbered(total))
        gram = [chr(0x4E00 + i) for i in range(size)] if chinese else [f"zz{letter}q" for letter in "abcdef"[:size]]
        words: list[str] = []
        for _ in range(count):
            words += [*gram, next(unique), next(unique)]
        words += [next(unique) for _ in range(total - len(words))]
        assert len(words) == total
        assert clean("repetition", ("" if chinese else " ").join(words)).dropped == expected


@pytest.mark.parametrize("n", REPEATED_NGRAMS)
@pytest.mark.parametrize("chinese", [False, True])
def test_repeated_ngrams(n: int, chinese: bool) -> None:
    """Pieces of exactly n words occur twice each, between words that occur once."""
    size, total = n * 3 // 2 if chinese else n, 2400
    most = int(REPEATED_NGRAMS[n] * total / size)
    for pieces in (most, most + 1):
        unique = iter([chr(0x4E00 + i) for i in range(total)] if chinese else numbered(total))
        grams = [[next(unique) for _ in range(size)] for _ in range(pieces)]
        words = [word for gram in (*grams, *reversed(grams)) for word in (*gram, next(unique))]
        words += [next(unique) for _ in range(total - len(words))]
        assert naive_covered(words, size) == pytest.approx(pieces * size / total)
        expected = f"repetition: more than {REPEATED_NGRAMS[n]:.0%} of characters in repeated {n}-grams"
        # Shorter n-grams have a higher threshold, so that only this one is exceeded, if any.
        assert clean("repetition", ("" if chinese else " ").join(words)).dropped == (
            expected if pieces > most else None
        )


EVALUATION = "What is the capital of the country that borders Spain and has the Eiffel Tower in it?"  # 17 words


@pytest.fixture
def evaluation(tmp_path: Path) -> Path:
    rows = [
        {"question": "Short one.", "choices": ["one two three four five six seven", {"text": EVALUATION}], "number": 3},
        {"question": "北京大学的校长是谁，他在什么时候当上校长的？"},
        {"question": "alpha beta gamma delta epsilon zeta eta theta iota"},  # 9 words
    ]
    (tmp_path / "eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "eval.txt").write_text("First paragraph of a text file with twelve words in it here.\n\nnine " * 2)
    return tmp_path


def dropped(folder: Path, text: str, ngram: int = 13) -> str | None:
    return step("decontaminate", folder, files=["eval.*"], ngram=ngram)(text).dropped


def test_decontaminate(evaluation: Path) -> None:
    words = folded_words(EVALUATION)
    reason = "contaminated: shares 13 words with eval.jsonl"
    for start in range(5):  # each 13-gram
        part = words[start : start + 13]
        assert dropped(evaluation, f"Before, {' - '.join(part).upper()}! After") == reason
        assert dropped(evaluation, " ".join(part[:12])) is None
        assert dropped(evaluation, " ".join([*part[:6], "other", *part[6:]])) is None
    assert dropped(evaluation, "one two three four five six seven") is None  # too short to search for
    assert (
        dropped(evaluation, "他问：北京大学的校长是谁,他在什么时候") == "contaminated: shares 13 words with eval.jsonl"
    )
    assert dropped(evaluation, "北京大学的校长是谁，他在什") is None
    nine = "alpha beta gamma delta epsilon zeta eta theta iota"
    assert dropped(evaluation, f"omega {nine} omega") == "contaminated: shares 9 words with eval.jsonl"
    assert dropped(evaluation, nine.removesuffix(" iota")) is None
    twelve = "first paragraph of a text file with twelve words in it here"
    assert dropped(evaluation, twelve) == "contaminated: shares 12 words with eval.txt"
    assert dropped(evaluation, "") is None
    assert dropped(evaluation, "capital of the country", ngram=4) == "contaminated: shares 4 words with eval.jsonl"
    assert dropped(evaluation, "two three four", ngram=3) == "contaminated: shares 3 words with eval.jsonl"


def test_decontaminate_by_a_text_that_is_a_list_of_words(tmp_path: Path) -> None:
    """As those of .conll files, whose single words are too short to search for."""
    words = "the european commission said on thursday it disagreed with german advice ."
    (tmp_path / "eval.conll").write_text("".join(f"{word} O\n" for word in words.split()))
    assert dropped(tmp_path, words.upper()) == "contaminated: shares 11 words with eval.conll"


def test_decontaminate_beside_a_naive_search(tmp_path: Path) -> None:
    rng = random.Random(0)
    texts = [" ".join(rng.choices("abcd", k=rng.randint(1, 30))) for _ in range(20)]
    (tmp_path / "e.jsonl").write_text("".join(json.dumps({"t": text}) + "\n" for text in texts))
    made = step("decontaminate", tmp_path, files=["e.jsonl"], ngram=9)
    found = 0
    for _ in range(400):
        words = rng.choices("abcde", weights=[9, 9, 9, 9, 1], k=rng.randint(0, 80))
        if rng.random() < 0.5:
            piece = rng.choice(texts).split()
            words[5:5] = piece[: rng.randint(6, 10)]
        parts = set()
        for text in texts:
            each = text.split()
            if len(each) == 8:
                parts.add(tuple(each))
            parts |= {tuple(each[i : i + 9]) for i in range(len(each) - 8)}
        expected = any(tuple(words[i : i + n]) in parts for n in (8, 9) for i in range(len(words) - n + 1))
        assert (made(" ".join(words)).dropped is not None) is expected
        found += expected
    assert 50 < found < 350


def test_contents_of_decontaminate(evaluation: Path, tmp_path: Path) -> None:
    memo = HashMemo(tmp_path / "memo")
    before = step("decontaminate", evaluation, files=["eval.*"]).contents(memo)  # type: ignore[attr-defined]
    assert len(before) == 2
    (evaluation / "eval.txt").write_text("another text with more than eight words in it")
    after = step("decontaminate", evaluation, files=["eval.*", "eval.txt"]).contents(memo)  # type: ignore[attr-defined]
    assert after[0] == before[0]
    assert after[1] != before[1]
    assert len(after) == 2


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["eval.txt", "missing.jsonl"], r"data.steps: decontaminate: files\[1\]: path: missing.jsonl: no such file"),
        (["short.txt"], "data.steps: decontaminate: files: no text has 8 words"),
        (["broken.jsonl"], "broken.jsonl:1: not JSON"),
    ],
)
def test_wrong_evaluation_files(evaluation: Path, files: list[str], message: str) -> None:
    (evaluation / "short.txt").write_text("one two three four five six seven")
    (evaluation / "broken.jsonl").write_text("{")
    with pytest.raises(DataError, match=message):
        step("decontaminate", evaluation, files=files)


@needs_data
def test_rules_on_real_texts() -> None:
    """Most texts of C4 pass, and all chapters of a Chinese novel."""
    rows = [json.loads(line)["text"] for line in (DATA / "text/en_c4_demo.jsonl").read_text().splitlines()]
    quality, repetition = step("quality"), step("repetition")
    assert sum(quality(row).dropped is None for row in rows) / len(rows) > 0.85
    assert sum(repetition(row).dropped is None for row in rows) / len(rows) > 0.9
    novel = (DATA / "text/zh_sanguoyanyi.txt").read_text().splitlines()
    for start in range(0, len(novel), 100):
        text = "\n".join(novel[start : start + 100])
        assert quality(text).dropped is None
        assert repetition(text).dropped is None
