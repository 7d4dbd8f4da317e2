"""Secrets and personal data: each kind is seen in its many spellings, and ordinary figures are left alone."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from factory.personal import PERSONAL, iban, luhn, personal

FOUND = {
    "a password": [
        "my password is hunter2x", "password: Tr0ub4dor&3", "pwd=abc12345",
        "https://joe:s3cret@example.org/x",
    ],
    "an e-mail address": [
        "jo.bloggs+x@mail.example.org", "JO@EXAMPLE.CO.UK",
        "jo [at] example [dot] com", "jo(at)example.com",
    ],
    "a social security number": ["078-05-1120", "my ssn is 219 09 9999 ok"],
    "a national insurance number": ["AB123456C", "AB 12 34 56 C"],
    "a card number": [
        "4111 1111 1111 1111", "4111-1111-1111-1111", "4111111111111111", "378282246310005", "3782 822463 10005",
        "6011111111111117", "\uff14\uff11\uff11\uff11 1111 1111 1111", "4111\u200b1111\u200b1111\u200b1111",
        "4111\u20111111\u20111111\u20111111",
    ],
    "an IBAN": [
        "DE89 3704 0044 0532 0130 00", "GB82WEST12345698765432", "es91 2100 0418 4502 0005 1332 from me",
        "NL91ABNA0417164300", "FR14 2004 1010 0505 0001 3M02 606",
    ],
    "a telephone number": [
        "(555) 010-1234", "+1 555-010-1234", "555.010.1234", "1-800-555-0199", "+44 20 7946 0018", "020 7946 0018",
        "07700 900123", "(020) 7946 0018", "06 12 34 56 78", "06.12.34.56.78", "+33 (0)6 12 34 56 78", "0170 1234567",
        "030/901820 12", "+49 30 901820", "0049 30 901820", "call me on 5550101234", "phone: 555-0199",
        "(02) 9374 4000", "0412 345 678", "+91 98765 43210", "07700900123", "+5511912345678",
    ],
    "a secret key": [
        "sk-abcdefghijklmnop1234", "sk-proj-abcdEFGH1234567890_x", "sk-ant-api03-AbCdEf123456789",
        "ghp_abcdefghijklmnop1234", "github_pat_11ABCDEFG0abcdefghijklmno", "glpat-" + "a1B2c3D4e5F6g7H8i9J0",
        "AKIAIOSFODNN7EXAMPLE", "xox" + "b-123456789012-abcdefghij", "AIza" + "SyA1234567890abcdefghijklmnopqrstuv",
        "sk_" + "live_abcdefghij1234567890", "-----BEGIN RSA PRIVATE KEY-----", "hf_" + "a1B2" * 9,
        "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.SflKxwRJSMeKKF2QT4",
    ],
    "a token": [
        "Authorization: Bearer abcdef0123456789abcdef", "api_key = 0a1b2c3d4e5f6g7h", "secret: 9f8e7d6c5b4a3210",
    ],
    "an IP address": ["85.214.132.117", "from 203.1.113.254 today"],
    "a date of birth": ["dob 12/03/1980", "date of birth: 1980-03-12", "born on 3.12.1980"],
    "a street address": ["12 Oak Street", "221B Baker Street", "4 Old Mill Lane", "9 Elm St, Springfield"],
}  # fmt: skip
ORDINARY = """15 U.S.C. 1692c|29 U.S.C. 2612 (a)(1)|title 12 CFR 1026.43|section 2.3.1.4|Pub. L. 111-203|in 2024-2025
01/02/2026 10:30|01.02.2026 at 9|05-06-2026 1200 people|04-05-06 07-08-09|2026-11-02T10:20:30|at 10.30 or 11:45
24/7 @home|$1,234.50|1 000 000 dollars|2,147,483,647|0.123456789|3.14159265358979|1234567890|order 9876543210
0110 1001 0110
4111 1111 1111 1112|0000 0000 0000 0000|1111111111111111|123 456|1 2 3 4 5 6 7 8 9 10|01 02 03 04|00 1234
192.168.1.1|127.0.0.1|version 10.0.19045.3448|8.8.8.8|DE12 and other things|GB22 and then more words come here
my password is always rejected|password is 8 characters long|secret is out in 2026|token is 5|bearer of bad news
task-sk-list|ask-me-anything-about-laptops-2024|look at that dot com|a (at) b|call 911 now|call between 10 and 12
phone costs 1200 dollars|phone from 2024-2025|mobile 128 256 512|text 10 people|0800 desk|ThinkPad X1 Carbon Gen 11
a 2 lane road|in 1929 Wall Street crashed|on 3 March St Patrick came|in 2024 Supreme Court ruled|born on 3 May
ISBN 978-3-16-148410-0|3840 x 2160|the 401(k)|form 1099-MISC""".replace("\n", "|").split("|")


def around(text):
    return f"my head hurts, reach me at {text} please"


@pytest.mark.parametrize(("kind", "text"), [(kind, text) for kind, texts in FOUND.items() for text in texts])
def test_what_is_personal_is_seen_as_what_it_is_and_as_nothing_else(kind, text):
    assert list(personal(around(text))) == [kind]


def test_every_kind_is_tested():
    assert set(FOUND) == set(PERSONAL)


@pytest.mark.parametrize("text", ORDINARY)
def test_ordinary_figures_are_nothing_personal(text):
    assert personal(around(text)) == {}


def test_every_kind_in_one_text_is_told():
    assert set(personal("; ".join(texts[0] for texts in FOUND.values()))) == set(PERSONAL)


def test_no_seed_and_no_line_of_a_template_is_taken_for_personal_data(home):
    seeds = "".join(file.read_text(encoding="utf-8") for file in home.root.glob("seeds/*.jsonl")).splitlines()
    texts = [json.loads(line)["instruction"] for line in seeds]
    texts += "".join(f.read_text(encoding="utf-8") for f in home.root.glob("templates/*.yaml")).splitlines()
    assert len(texts) > 1000 and [(text, personal(text)) for text in texts if personal(text)] == []


@given(st.integers(10**11, 10**18))
def test_each_number_has_one_check_digit(number):
    assert sum(luhn(f"{number}{digit}") for digit in range(10)) == 1


@given(st.integers(0, 10**18 - 1), st.integers(0, 17), st.integers(1, 9))
def test_an_iban_with_one_digit_changed_is_none(account, place, change):
    body = f"{account:018}"
    code = f"DE{98 - int(f'{body}131400') % 97:02}{body}"
    at = 4 + place
    assert iban(code) and not iban(code[:at] + str((int(code[at]) + change) % 10) + code[at + 1 :])


@given(st.text())
def test_whatever_is_said_what_is_found_has_a_known_kind(text):
    assert set(personal(text)) <= set(PERSONAL)
