"""Secrets and personal data in a text: what kind, and where. Pure.

Shapes alone are seen, and checksums where a number has one: card numbers, IBANs. A person's name, a telephone number
in words, or a street without its number goes unseen.
"""

import ipaddress
import re
import unicodedata
from collections.abc import Callable

SECRETS = [  # keys as their makers write them
    r"(?:AKIA|ASIA)[0-9A-Z]{16}\b",  # AWS
    r"gh[pousr]_[A-Za-z0-9]{16,}|github_pat_\w{22,}|glpat-[\w-]{20,}",  # GitHub, GitLab
    r"xox[abeprs]-[\w-]{10,}",  # Slack
    r"sk-(?:[a-z]+-)*(?=[\w-]*\d)[\w-]{16,}",  # OpenAI, Anthropic and others
    r"AIza[\w-]{35}",  # Google
    r"[srp]k_(?:live|test)_[A-Za-z0-9]{16,}",  # Stripe
    r"hf_[A-Za-z0-9]{30,}|npm_[A-Za-z0-9]{36}",  # Hugging Face, npm
    r"eyJ[\w-]{8,}\.eyJ[\w-]{8,}\.[\w-]{8,}",  # JSON web tokens
]
SAID = r"""\s*(?:is|was|=|:)\s*["']?(?=\S*\d)"""  # "is", and then a word with a digit in it
PERSONAL = {  # what one has seen the next does not see again
    "a password": rf"\b(?:password|passphrase|passcode|passwd|pwd){SAID}\S{{6,}}|://[^/\s:@]+:[^/\s@]+@",
    "an e-mail address": r"(?<![\w.+-])[\w.+-]+(?:@|\s?[\[(]at[\])]\s?)[\w-]+(?:\.[\w-]+)*"
    r"(?:\.|\s?[\[(]dot[\])]\s?)[a-z]{2,}",
    "a social security number": r"(?<![\w-])(?!000|666|9)\d{3}([- ])(?!00)\d{2}\1(?!0000)\d{4}(?![\w-])",
    "a national insurance number": r"\b(?-i:[A-CEGHJ-PR-TW-Z]{2} ?\d\d ?\d\d ?\d\d ?[A-D])\b",
    "a card number": r"(?<![\w.-])[2-6](?:[ -]?\d){12,18}(?![\w-])",
    "an IBAN": r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]){11,30}",
    "a telephone number": "|".join([
        r"(?<![\w.])(?:\+\d{1,3}[ .-]?)?(?<![\d-])(?:1[ .-])?\(?\d{3}\)?[ .-]\d{3}[ .-]\d{4}(?![\w-])",  # North America
        r"(?<![\w.])(?:\+|00)[1-9](?:[ ./-]?(?:\(0\))?[(]?\d[)]?){7,14}(?!\w)",  # with its country
        r"(?<![\w./:$-])(?!\d\d[./-]\d\d[./-]\d\d)\(?0[1-9]\d{0,4}(?:\)|[ /-]|\) |(?<=\d{5}))"
        r"\d{2,4}(?:[ -]?\d{2,4}){1,3}(?![\w/:])",  # with a nought in front
        r"(?<!\w)0[1-9](?:[ .]\d\d){4}(?!\w)",  # in pairs, as the French do
        r"\b(?:tel|phone|mobile|cell|call|whatsapp|text|ring)\b[^\d\n]{0,20}(?:\d{3}[ .-]\d{4}|\d{9,12})(?![\w-])",
    ]),
    "a secret key": rf"\b(?-i:{'|'.join(SECRETS)})|-----BEGIN [A-Z ]*PRIVATE KEY",
    "a token": rf"\bbearer (?=\S*\d)[\w.~+/-]{{16,}}|\b(?:api[_ -]?key|secret|token){SAID}[\w+/.-]{{12,}}",
    "an IP address": r"(?<![\w.])(?:\d{1,3}\.){3}\d{1,3}(?![\w.]*\d)",
    "a date of birth": r"\b(?:dob|date of birth|born on)\b\W*(?:is |was )?\d{1,4}[./-]\d{1,2}[./-]\d{1,4}\b",
    "a street address": r"\b(?!(?:19|20)\d\d )\d{1,5}[A-Z]? (?-i:(?:[A-Z][a-z]+ ){1,3}"
    r"(?:Street|Avenue|Ave|Road|Rd|Lane|Boulevard|Blvd|Drive|St(?!\.? [A-Z])))\b",
}  # fmt: skip
PATTERNS = {name: re.compile(pattern, re.IGNORECASE) for name, pattern in PERSONAL.items()}
# Without one of these none of the patterns can match: most texts are done with this one look.
SUSPECT = re.compile(r"[\d@]|[\[(]at[\])]|-----BEGIN|\b(?:gh[pousr]_|glpat-|AKIA|ASIA|AIza|xox|[srp]k_|hf_|npm_|eyJ)")
IBANS = dict(
    re.findall(
        r"([A-Z]{2})(\d\d)",
        (
            "AD24AE23AL28AT20AZ28BA20BE16BG22BH22BR29CH21CR22CY28CZ24DE22DK18EE20ES24FI18FO18FR27GB22GE22GI23GL18GR27"
            "GT28HR21HU28IE22IL23IS26IT27JO30KW30KZ20LB28LI21LT20LU20LV21MC27MD24ME22MK19MR27MT31MU30NL18NO15PK24PL28"
            "PS29PT25QA29RO24RS22SA24SE24SI19SK24SM27TN24TR26UA29VG24XK20"
        ),
    )
)  # country -> characters
PLAIN = str.maketrans(dict.fromkeys(range(0x2010, 0x2016), "-") | {0x2212: "-"})


def luhn(digits: str) -> bool:
    """Whether the last of `digits` is the check digit of the others, as on every payment card."""
    values = [int(d) * (1 + i % 2) for i, d in enumerate(reversed(digits))]
    return sum(v - 9 if v > 9 else v for v in values) % 10 == 0


def iban(text: str) -> bool:
    """Whether `text` begins with an IBAN of its country's length and right check digits."""
    code = "".join(text.upper().split())
    length = int(IBANS.get(code[:2], 99))
    return len(code) >= length and int("".join(str(int(c, 36)) for c in code[4:length] + code[:4])) % 97 == 1


def _card(text: str) -> bool:
    digits = re.sub(r"\D", "", text)
    return luhn(digits) and len(set(digits)) > 1


def _telephone(text: str) -> bool:
    digits = [c for c in text if c.isdigit()]
    return text[:1].isalpha() or len(digits) >= 9 and len(set(digits)) > 2


def _public(text: str) -> bool:
    """An address of the open network. Eight digits at least: `2.3.1.4` is more often a section than an address."""
    try:
        return ipaddress.ip_address(text).is_global and len(text) > 10
    except ValueError:
        return False


CONFIRMED: dict[str, Callable[[str], bool]] = {
    "a card number": _card, "an IBAN": iban, "a telephone number": _telephone, "an IP address": _public
}  # fmt: skip


def personal(text: str) -> dict[str, str]:
    """Kind -> the first of it that stands in `text`; empty where nothing was seen."""
    if not text.isascii():  # wide digits, invisible characters between digits, dashes that are no hyphens
        text = unicodedata.normalize("NFKC", text).translate(PLAIN)
        text = "".join(c for c in text if unicodedata.category(c) != "Cf")
    if not SUSPECT.search(text):
        return {}
    found = {}
    for name, pattern in PATTERNS.items():
        confirmed = CONFIRMED.get(name, bool)
        if hit := next((m[0] for m in pattern.finditer(text) if confirmed(m[0])), None):
            found[name] = hit
            text = text.replace(hit, " ")
    return found
