"""Masking of personal data: what is masked and what is not, in English and Chinese."""

from __future__ import annotations

import datetime
import random

import pytest
from cleaning_support import clean, step

MASKED = [
    ("mail bob@example.com now", "mail <EMAIL> now", "EMAIL"),
    ("first.last+tag@sub.domain.co.uk.", "<EMAIL>.", "EMAIL"),
    ("邮箱zhang_san@163.com。", "邮箱<EMAIL>。", "EMAIL"),
    ("联系：12345@qq.com，谢谢", "联系：<EMAIL>，谢谢", "EMAIL"),
    ("13812345678@qq.com", "<EMAIL>", "EMAIL"),
    ("müller@bücher.de", "<EMAIL>", "EMAIL"),
    ("<a@b.org>, (c@d.org)", "<<EMAIL>>, (<EMAIL>)", "EMAIL"),
    ("mailto:a-b@c-d.museum", "mailto:<EMAIL>", "EMAIL"),
    ("8.8.8.8", "<IP>", "IP"),
    ("from 203.0.114.7:8080", "from <IP>:8080", "IP"),
    ("IP：114.114.114.114。", "IP：<IP>。", "IP"),
    ("服务器52.95.110.1/24", "服务器<IP>/24", "IP"),
    ("Ping 1.1.1.1.", "Ping <IP>.", "IP"),
    ("2001:4860:4860::8888", "<IP>", "IP"),
    ("[2606:4700:4700::1111]:443", "[<IP>]:443", "IP"),
    ("2a00:1450:4001:0830:0000:0000:0000:200e", "<IP>", "IP"),
    ("call 212-555-0187 today", "call <PHONE> today", "PHONE"),
    ("(415) 555-2671", "<PHONE>", "PHONE"),
    ("(415)555-2671", "<PHONE>", "PHONE"),
    ("1-650-253-0000", "<PHONE>", "PHONE"),
    ("650.253.0000", "<PHONE>", "PHONE"),
    ("650 253 0000,", "<PHONE>,", "PHONE"),
    ("+1 650 253 0000", "<PHONE>", "PHONE"),
    ("+1 (650) 253-0000", "<PHONE>", "PHONE"),
    ("+442079460958", "<PHONE>", "PHONE"),
    ("+44 20 7946 0958", "<PHONE>", "PHONE"),
    ("+49 30 901820", "<PHONE>", "PHONE"),
    ("+33 1 42 68 53 00", "<PHONE>", "PHONE"),
    ("+81-3-3210-7000", "<PHONE>", "PHONE"),
    ("+86 10 6552 9988", "<PHONE>", "PHONE"),
    ("电话010-65529988。", "电话<PHONE>。", "PHONE"),
    ("（021）58888888", "<PHONE>", "PHONE"),
    ("(021) 58888888", "<PHONE>", "PHONE"),
    ("0755-26770000", "<PHONE>", "PHONE"),
    ("手机13812345678。", "手机<CHINESE_MOBILE>。", "CHINESE_MOBILE"),
    ("电话：138-1234-5678", "电话：<CHINESE_MOBILE>", "CHINESE_MOBILE"),
    ("199 1234 5678", "<CHINESE_MOBILE>", "CHINESE_MOBILE"),
    ("+86 13812345678", "<CHINESE_MOBILE>", "CHINESE_MOBILE"),
    ("+86-138-1234-5678", "<CHINESE_MOBILE>", "CHINESE_MOBILE"),
    ("8613812345678", "<CHINESE_MOBILE>", "CHINESE_MOBILE"),
    ("008613812345678", "<CHINESE_MOBILE>", "CHINESE_MOBILE"),
    ("身份证11010519491231002X，", "身份证<CHINESE_ID>，", "CHINESE_ID"),
    ("440524188001010014", "<CHINESE_ID>", "CHINESE_ID"),
    ("ID 11010519491231002x.", "ID <CHINESE_ID>.", "CHINESE_ID"),
]

KEPT = """
127.0.0.1 | 0.0.0.0 | 192.168.1.1 | 10.0.0.1 | 172.16.5.4 | 255.255.255.0 | 169.254.1.1 | 192.0.2.1 | 1.2.3 | 1.2.3.4.5
999.1.1.1 | 01.02.03.04 | version 1.2.3.4 | Version: 12.30.4.1 | v4.18.0.193 | 版本1.22.33.44 | 版本号：1.22.33.44
Section 3.2.1.4 | §1.2.3 | fe80::1 | ::1 | 2001:db8::1 | std::vector | 12:30:45 | a::b | 2023:11:05 10:20:30 | 2001:
ISBN 978-7-111-40701-0 | ISBN 0-306-40615-2 | 9787111407010 | ISSN 2049-3630 | 2019-11-18 | 18.11.2019 | 2023年11月18日
20231118 | 10:30-12:45 | 1998-2004 | $1,234,567.89 | ￥13812345678 | 13812345678元 | 营收13812345678 万 | €19912345678
订单号20231145678901234 | order 4111 1111 1111 1111 | No. 1234567890123 | 1700000000000 | 1234567890
6502530000 | 123-45-6789 | 110105194912310021
11010519491331002X | 110105194902300022 | 990105194912310025 | 123456789012345678 | 110105491231002
11010519491231002X5 | 12812345678 | 0.13812345678 | 138123456789 | ab13812345678 | 13812345678f | 138-12345-678
555-0187 | 123-456-7890 | 000-000-0000 | 911 | 400-820-8820 | 3.14159265358979 | +1 000 000 0000 | +12 | x+12025550123
2 + 1 650 253 | +40.7128, -74.0060 | 1+2+3 | C++11 | @handle | icon@2x.png | logo@3x.webp
user@localhost | pkg@1.2.3 | a @ b.com
bob@ | @example.com | 010-1234 | 第12345678号 | 199.5.3 | <EMAIL> | 100 000 000 | 2,147,483,647 | GB 11643-1999
"""


@pytest.mark.parametrize(("text", "expected", "kind"), MASKED)
def test_masked(text: str, expected: str, kind: str) -> None:
    assert clean("pii", text) == (expected, None, (f"masked {kind}",))
    assert clean("pii", f"一 {text} 二").text == f"一 {expected} 二"


@pytest.mark.parametrize("text", [each.strip() for line in KEPT.strip().splitlines() for each in line.split(" | ")])
def test_kept(text: str) -> None:
    assert clean("pii", text) == (text, None, ())
    assert clean("pii", f"一 {text} 二").text == f"一 {text} 二"


def test_each_kind_alone() -> None:
    text = "bob@example.com 8.8.8.8 650-253-0000 11010519491231002X 13812345678"
    masks = {"email": "<EMAIL>", "ip": "<IP>", "phone": "<PHONE>", "chinese_id": "<CHINESE_ID>"}
    masks["chinese_mobile"] = "<CHINESE_MOBILE>"
    for i, (kind, mask) in enumerate(masks.items()):
        expected = text.split()
        expected[i] = mask
        assert clean("pii", text, kinds=[kind]) == (" ".join(expected), None, (f"masked {mask[1:-1]}",))
    assert clean("pii", text).text == " ".join(masks.values())
    assert clean("pii", "+86 13812345678", kinds=["phone"]).text == "<PHONE>"


def test_a_note_for_each_kind_once() -> None:
    text = "a@b.org 8.8.8.8 c@d.org 8.8.4.4"
    assert clean("pii", text) == ("<EMAIL> <IP> <EMAIL> <IP>", None, ("masked EMAIL", "masked IP"))


def test_chinese_ids_need_their_check_digit() -> None:
    """Of the eleven possible last characters of random IDs exactly one is right, by the rule as ISO 7064 writes it: the
    sum of digit x 2**(position from the right) is 1 modulo 11."""
    rng, pii = random.Random(0), step("pii")
    for _ in range(50):
        born = datetime.date(1930, 1, 1) + datetime.timedelta(days=rng.randrange(30_000))
        region = rng.choice(["11", "31", "44", "54", "65"])
        start = f"{region}{rng.randrange(10_000):04}{born:%Y%m%d}{rng.randrange(1000):03}"
        for last in "0123456789X":
            digits = [int(digit) for digit in start] + [10 if last == "X" else int(last)]
            valid = sum(digit * 2 ** (17 - i) for i, digit in enumerate(digits)) % 11 == 1
            assert (pii(start + last).text == "<CHINESE_ID>") is valid


@pytest.mark.parametrize("start", ["16010519491231002", "39010519491231002", "70010519491231002", "11010519490230002"])
def test_chinese_ids_of_no_province_or_day(start: str) -> None:
    for last in "0123456789X":  # one of them is the right check digit
        assert clean("pii", start + last).notes == ()


def test_long_runs_take_linear_time() -> None:
    for text in (
        "1" * 200_000,
        "a" * 200_000 + "@",
        "1-" * 100_000,
        "a." * 100_000 + "@b",
        "+1 " * 70_000,
        "2000:" * 40_000,
    ):
        clean("pii", text)


def test_longer_digits_are_no_match() -> None:
    assert clean("pii", "1" * 5000 + "13812345678").notes == ()
