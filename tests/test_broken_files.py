"""Broken files as reviewers break them, each a small edit of a sound pair, and exactly what lint says of it.

broken_files.json holds them: what was done, to which file, the text replaced (null: the whole file) and by what, and
all lines that must be told.
"""

import datetime
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from factory.errors import Problem
from factory.lint import check, check_texts
from factory.paths import read_params, read_profile
from factory.tokens import counter
from factory.yaml12 import NotPlain, YAMLError, _judged, _plain

HERE = Path(__file__).parent
TEA = (HERE / "tea.yaml").read_text(encoding="utf-8")
CASES = json.loads((HERE / "broken_files.json").read_text(encoding="utf-8"))
TODAY = datetime.date(2026, 11, 24)
QUESTIONS = {
    "black": ["a strong one, please", "what wakes me up", "tea for the early shift", "I need a full pot before work"],
    "green": ["something light", "which tea after lunch", "a fresh cup for the garden", "nothing bitter for my aunt"],
}
ASKED = [(answer, question) for answer, questions in QUESTIONS.items() for question in questions]
SEEDS = "".join(
    json.dumps({"id": f"tea-{n}", "instruction": text, "answer": answer, "source": "desk", "licence": "CC0-1.0"}) + "\n"
    for n, (answer, text) in enumerate(ASKED, 1)
)


@pytest.fixture
def tea_home(checkout, monkeypatch):
    """A checkout with one sound expert, and the working folder in it."""
    monkeypatch.chdir(checkout.root)
    for path in [*checkout.root.glob("templates/*"), *checkout.root.glob("seeds/[!g]*")]:
        path.unlink()
    checkout.params.write_text("experts: [tea]\nprofile: pocket\nteacher: {kind: phrases}\n")
    checkout.template("tea").write_text(TEA, encoding="utf-8")
    checkout.seeds("tea").write_text(SEEDS, encoding="utf-8")
    return checkout


def edited(text, old, new):
    if old is None:
        return new
    assert old in text, f"{old!r} is not there"
    return text.replace(old, new, 1)


def told(home):
    return [f"{'' if p.severity == 'error' else 'warning: '}{p}" for p in check(home, today=TODAY)[1]]


def test_the_pair_itself_is_sound(tea_home):
    assert told(tea_home) == []


@pytest.mark.parametrize("case", CASES, ids=[case["name"] for case in CASES])
def test_a_broken_file_is_told_exactly(tea_home, case):
    path, sound = (tea_home.template("tea"), TEA) if case["file"] == "template" else (tea_home.seeds("tea"), SEEDS)
    path.write_text(edited(sound, case["old"], case["new"]), encoding="utf-8")
    assert told(tea_home) == case["told"]


@pytest.mark.parametrize("kind", ["template", "seeds"])
def test_latin_1_is_told_with_its_line_and_windows_files_are_sound(tea_home, kind):
    path = getattr(tea_home, kind)("tea")
    sound = path.read_bytes()
    path.write_bytes(b"\xef\xbb\xbf" + sound.replace(b"\n", b"\r\n"))
    assert told(tea_home) == []
    path.write_bytes(sound.replace(b"the", "th\u00e9".encode("latin-1"), 1))
    [line] = told(tea_home)
    assert "not UTF-8 at byte" in line and line.endswith("; save it as UTF-8")


def test_there_are_enough_of_them():
    assert len(CASES) >= 60


# -- fuzzed -------------------------------------------------------------------------------------

LINES = TEA.splitlines(keepends=True)
ODD = [
    "&a [*a]", "*a", "&a x", "<<: *a", "!!python/object:os.system x", "!x y", "!!int x", "? x", "- -", "{a: b:c}",
    "[a,]", "0x" + "f" * 5000, "9" * 5000, "0o17", "1_000", "1e3", ".nan", "-.inf", "2026-02-30", "2026-11-02 10:00",
    "~", "=", "[" * 60, "{a: " * 60, '"\\x41"', '"\\/"', "'it''s'", "|\n  a\n   b\n", ">-\n  a\n\n  b\n", "\t", "\x85",
    "\u2028", "\ufeff", "\U0001f600", "%YAML 1.1\n---\n", "---", "...", "# x", "a: b", "yes", "No", "null", "True", "'",
    '"', "``", "\u201cx\u201d", "12:30", "+1", "01", "-0", "1.", ".5", "0.90", "\r", "a #b", "a# b", ":", "::", "x:y",
    "@x", "%x", ">#", "|2-#",
]  # fmt: skip
PLACES = st.integers(0, len(LINES) - 1)
EDIT = st.one_of(
    st.tuples(st.just("delete"), PLACES, st.just("")),
    st.tuples(st.just("double"), PLACES, st.just("")),
    st.tuples(st.just("swap"), PLACES, PLACES),
    st.tuples(st.just("value"), PLACES, st.sampled_from(ODD)),
    st.tuples(st.just("insert"), PLACES, st.sampled_from(ODD) | st.text(max_size=5)),
    st.tuples(st.just("cut"), PLACES, st.integers(0, 30)),
)


def mutated(edits):
    lines = list(LINES)
    for what, at, how in edits:
        line = lines[at]
        if what == "swap":
            lines[at], lines[how] = lines[how], line
        else:
            lines[at] = {
                "delete": "", "double": line * 2, "value": f"{line.partition(':')[0]}: {how}\n",
                "insert": f"{line[: len(line) // 2]}{how}{line[len(line) // 2 :]}",
                "cut": line[: how if what == "cut" else 0],
            }[what]  # fmt: skip
    return "".join(lines)


@pytest.fixture(scope="module")
def desk(home):
    params = read_params(home)
    return home, params, counter(home, read_profile(home, params.profile))


@given(st.lists(EDIT, min_size=1, max_size=4))
@settings(deadline=None)
def test_a_fuzzed_template_is_sound_or_told(desk, edits):
    found = check_texts(*desk, "tea", mutated(edits), SEEDS, TODAY)
    assert all(isinstance(p, Problem) and p.file and str(p) for p in found)


@given(st.text(max_size=60) | st.lists(st.sampled_from([*SEEDS, *ODD]), max_size=30).map("".join), st.integers(0, 900))
@settings(deadline=None)
def test_a_fuzzed_seeds_file_is_sound_or_told(desk, text, at):
    seeds = SEEDS[:at] + text + SEEDS[at + len(text) // 2 :]
    assert all(isinstance(p, Problem) for p in check_texts(*desk, "tea", TEA, seeds, TODAY))


def test_laughs_and_snakes_are_refused_at_once(desk):
    laughs = "a: &a [x, x]\n" + "".join(
        f"{b}: &{b} [*{a}, *{a}, *{a}]\n" for a, b in zip("abcdefghij", "bcdefghijk", strict=True)
    )
    for text in (laughs, "a: &a [*a]\n", "a: &a {<<: *a}\n", "[" * 5000, "a: " + "{a: " * 3000, "- " * 3000 + "x"):
        assert check_texts(*desk, "tea", text, SEEDS, TODAY)
    assert check_texts(*desk, "tea", TEA, "[" * 100_000 + "\n" + '{"id": ' * 50_000, TODAY)


def same(a, b):
    """Whether two readings are equal in value, kind and place."""
    if type(a) is not type(b) or a != b or getattr(a, "places", 0) != getattr(b, "places", 0):
        return False
    inner = list(a) if isinstance(a, dict) else range(len(a)) if isinstance(a, list) else []
    return all(same(a[key], b[key]) for key in inner)


@given(
    st.lists(EDIT, max_size=3).map(mutated)
    | st.lists(st.sampled_from([*"ab:-,[]{}#'\" \n", *ODD]), max_size=12).map("".join)
)
@settings(deadline=None)
def test_what_is_read_fast_is_read_as_dvc_reads_it(text):
    try:
        fast = _plain(text)
    except (NotPlain, YAMLError):
        return
    assert same(fast, _judged(text, "x"))
