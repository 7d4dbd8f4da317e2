"""Seeds: every mistake told with its line, and a split that no edit of a text can move."""

import json
import re
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from factory.errors import Problems
from factory.seeds import FEWEST, Seed, held_out, read_seeds
from factory.template import read_template

EXPERTS = ("product", "medical", "legal")


@pytest.fixture(scope="module")
def medical(home):
    return read_template(home.template("medical"))


@pytest.fixture(scope="module")
def product(home):
    return read_template(home.template("product"))


def entry(number, **changes):
    seed = {"id": f"product-{number:04}", "instruction": f"laptop for job {number}?"}
    seed |= {"source": "hand-written", "licence": "CC0-1.0", **changes}
    return {key: value for key, value in seed.items() if value is not None}


def problems(folder, template, lines, name="product"):
    """(line, key, message) of all that is wrong with a file of `lines`: texts, bytes, or entries."""
    data = [line if isinstance(line, bytes) else line.encode() for line in map(dumped, lines)]
    (folder / f"{name}.jsonl").write_bytes(b"\n".join(data) + b"\n")
    with pytest.raises(Problems) as told:
        read_seeds(folder / f"{name}.jsonl", template)
    assert all(str(p).startswith(f"{folder / name}.jsonl:{p.line}: ") for p in told.value.problems)
    return [(p.line, p.key, p.message) for p in told.value.problems]


def dumped(line):
    return json.dumps(line, ensure_ascii=False) if isinstance(line, (dict, list)) else line


GOOD = [entry(n) for n in range(1, 7)]
MISTAKES = {
    "an id twice": (entry(1), "id", "'product-0001' is on line 1 too; give it an id of its own"),
    "no licence": (entry(9, licence=None), "licence", "is missing; every seed says its licence"),
    "no source": (entry(9, source=None), "source", "is missing; every seed says its source"),
    "an empty source": (entry(9, source=" "), "source", "must be a text, not ' '"),
    "a number as an id": (entry(9, id=9), "id", "must be a text, not 9"),
    "no question": (entry(9, instruction=""), "instruction", "must be a text, not ''"),
    "an unknown answer": (entry(9, answer="mac"), "answer", "'mac' is no answer of .*product.yaml; one of default"),
    "an unknown key": (entry(9, note="x"), "note", "unknown key; known are id, instruction"),
    "an unknown slot": (entry(9, slots={"usage": "study"}), "slots.usage", "unknown slot; known are use, reason"),
    "a slot's own phrase": (entry(9, slots={"use": "yoga"}), "slots.use", "'yoga' is none of the slot's phrases; add"),
    "a slot that is no text": (entry(9, slots={"use": 3}), "slots.use", "must be a text, not 3"),
    "slots that are no mapping": (entry(9, slots=["use"]), "slots", "must be a mapping"),
    "a question twice": (
        entry(9, instruction="LAPTOP for  job 1?"), "instruction", "the same question is on line 1; remove one",
    ),
    "no JSON": ("{oops", "", "not JSON at column 2: "),
    "JSON cut short": ('{"id": "product-0009"', "", "not JSON at column"),
    "no object": (["product-0009"], "", "must be a JSON object, not "),
    "half a character": (json.dumps(entry(9, id="\ud800")), "id", "must be a text"),
}  # fmt: skip


VALUE = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=8),
    lambda inner: st.dictionaries(st.sampled_from(["id", "instruction", "answer", "slots", "source", "use"]), inner),
)


@given(line=st.binary(max_size=80) | VALUE.map(lambda value: json.dumps(value).encode()))
def test_any_line_is_read_or_its_problems_are_told(tmp_path_factory, product, line):
    path = tmp_path_factory.getbasetemp() / "product.jsonl"
    path.write_bytes(line)
    for template in (None, product):
        try:
            assert all(isinstance(seed, Seed) for seed in read_seeds(path, template))
        except Problems as error:
            assert error.problems


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_told_with_its_line_key_and_cure(tmp_path, product, name):
    wrong, key, words = MISTAKES[name]
    [(line, found, message)] = problems(tmp_path, product, [*GOOD, wrong])
    assert (line, found) == (7, key) and re.match(words, message)


def test_the_good_seeds_have_no_mistake(tmp_path, product):
    path = tmp_path / "product.jsonl"
    path.write_text("\n\n".join(map(json.dumps, GOOD)))
    seeds = read_seeds(path, product)
    assert [seed.id for seed in seeds] == [e["id"] for e in GOOD] and {seed.answer for seed in seeds} == {"default"}


def test_all_mistakes_of_a_file_are_told_at_once(tmp_path, product):
    wrong = [entry(1, source=None, licence=None), "{oops", entry(3, answer="x")]
    told = problems(tmp_path, product, [*wrong, *GOOD])
    assert [(line, key) for line, key, _ in told] == [(1, "licence"), (1, "source"), (2, ""), (3, "answer")]


def test_a_file_that_is_not_utf_8_is_told_with_the_line(tmp_path, product):
    told = problems(tmp_path, product, [GOOD[0], '{"id": "caf\u00e9"}'.encode("latin-1")])
    assert [(line, key) for line, key, _ in told] == [(2, "")] and "save it as UTF-8" in told[0][2]


def test_the_same_question_under_two_answers_names_both(tmp_path, medical):
    lines = [entry(1, answer="headache", instruction="it hurts"), entry(2, answer="itching", instruction="It hurts")]
    [(line, key, message)] = problems(tmp_path, medical, lines, "medical")
    assert (line, key) == (2, "instruction")
    assert message == "the same question is on line 1; it has answers headache and itching; choose one"


def test_where_there_are_several_answers_a_seed_names_its_own(tmp_path, medical):
    [(line, key, message)] = problems(tmp_path, medical, [entry(1)], "medical")
    assert (line, key) == (1, "answer") and message.startswith("is missing; one of nosebleed, headache")


def test_an_answer_with_too_few_seeds_to_split_is_told(tmp_path, product):
    [(_, key, message)] = problems(tmp_path, product, GOOD[: FEWEST - 1])
    assert (key, message) == ("answer", "default has 3 seeds; write 4 at least")


def test_general_questions_have_no_answer(tmp_path):
    [(line, key, message)] = problems(tmp_path, None, [entry(1), entry(2, answer="default")], "general")
    assert (line, key) == (2, "answer") and "unknown key" in message


def test_a_line_ends_at_a_line_feed_alone(tmp_path, product):
    lines = [*GOOD, entry(8, instruction="one\u2028two\x85three"), "{oops"]
    assert [line for line, _, _ in problems(tmp_path, product, lines)] == [8]
    path = tmp_path / "product.jsonl"
    path.write_bytes("\r\n".join(map(dumped, lines[:-1])).encode())
    assert read_seeds(path, product)[-1].instruction == "one two three"


# -- the split ----------------------------------------------------------------------------------


def seeds_of(ids, answer="default", text="what laptop"):
    return [Seed(i, f"{text} {i}", "hand-written", "CC0-1.0", answer) for i in ids]


IDS = st.lists(st.text(min_size=1, max_size=8), min_size=FEWEST, max_size=60, unique=True)


@given(IDS)
def test_a_quarter_is_held_out_and_three_at_least(ids):
    held = held_out(seeds_of(ids))
    assert len(held) == max(3, len(ids) // 4) and held < set(ids)


@given(IDS, st.randoms(use_true_random=False))
def test_neither_a_text_nor_the_order_moves_a_seed(ids, rng):
    before = held_out(seeds_of(ids))
    edited = seeds_of(ids, text="which notebook")
    rng.shuffle(edited)
    assert held_out(edited) == before


@given(IDS, st.text(min_size=9, max_size=9))
def test_one_more_seed_moves_one_at_most(ids, new):
    before = held_out(seeds_of(ids))
    assert len(before - held_out(seeds_of([*ids, new]))) <= 1


@given(IDS)
def test_each_answer_is_split_by_itself(ids):
    seeds = seeds_of([f"a-{i}" for i in ids], "a") + seeds_of([f"b-{i}" for i in ids[:FEWEST]], "b")
    held = held_out(seeds)
    assert held & {s.id for s in seeds if s.answer == "a"} == held_out([s for s in seeds if s.answer == "a"])
    assert len(held & {s.id for s in seeds if s.answer == "b"}) == 3


# -- the real files -----------------------------------------------------------------------------


@pytest.mark.parametrize("expert", EXPERTS)
def test_the_real_seeds_are_sound_many_and_split(home, expert):
    template = read_template(home.template(expert))
    seeds = read_seeds(home.seeds(expert), template)
    assert len(seeds) >= 160 and set(Counter(s.answer for s in seeds)) == set(template.answers)
    held = held_out(seeds)
    assert len(seeds) / 5 <= len(held) <= len(seeds) / 3
    assert all(sum(s.answer == a for s in seeds if s.id in held) >= 3 for a in template.answers)


def test_the_general_questions_are_sound_and_many(home):
    assert len(read_seeds(home.general, None)) >= 150


def test_no_id_and_no_question_is_in_two_files(home):
    files = {name: read_seeds(home.seeds(name), read_template(home.template(name))) for name in EXPERTS}
    seeds = [seed for found in (*files.values(), read_seeds(home.general, None)) for seed in found]
    for values in ([s.id for s in seeds], [s.instruction.casefold() for s in seeds]):
        assert [value for value, count in Counter(values).items() if count > 1] == []
