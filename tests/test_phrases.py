"""The embedded teacher: deterministic, true to the seed, and within the template's own phrases."""

import asyncio
import random
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from factory.errors import UserError
from factory.seeds import Seed, read_seeds
from factory.store import read_yaml
from factory.teacher import Request
from factory.teacher.phrases import AFTER, BEFORE, STYLES, PhrasesTeacher, reword
from factory.template import Declaration, Template, fields, find_any, read_template

EXPERTS = ("product", "medical", "legal")
QUESTION = "Can you tell me what the best laptop for a student is?"
SEED = Seed("product-0001", QUESTION, "desk", "CC0-1.0", "default")


@pytest.fixture(scope="module")
def product(home):
    return read_template(home.template("product"))


def _replies(template, seed=SEED, samples=range(12)):
    return [asyncio.run(PhrasesTeacher(template).reply(Request(seed, n))) for n in samples]


def _variants(template, seed=SEED, samples=range(12)):
    return [variant for reply in _replies(template, seed, samples) for variant in reply.variants]


def _with_voices(home, voices):
    raw = read_yaml(home.template("product"))
    raw["generate"]["voices"] = voices
    plain = read_template(home.template("product")).declaration.model_dump()
    plain["generate"]["voices"] = voices
    return Template(Declaration.model_validate(plain), raw)


def test_the_same_requests_get_the_same_replies(product):
    assert _replies(product) == _replies(product)


def test_a_reply_does_not_depend_on_the_other_requests(product):
    assert _replies(product, samples=[7]) == _replies(product)[7:8]
    assert _replies(product, samples=[3, 1]) == [_replies(product)[3], _replies(product)[1]]


def test_every_reply_has_a_key_of_its_own(product):
    others = [Seed("product-0002", QUESTION, "desk", "CC0-1.0", "default"), SEED]
    keys = [reply.key for seed in others for reply in _replies(product, seed)]
    assert len(set(keys)) == len(keys) == 24


def test_sample_0_is_the_seed_in_its_own_words(product):
    assert _variants(product)[0].instruction == QUESTION


def test_other_samples_say_it_in_other_words(product):
    found = [variant.instruction for variant in _variants(product)[1:]]
    assert QUESTION not in found and len(set(found)) > 8


@pytest.mark.parametrize("expert", EXPERTS)
def test_every_voice_of_a_template_is_known_to_the_teacher(home, expert):
    voices = set(read_template(home.template(expert)).declaration.generate.voices)
    assert voices <= set(STYLES) and set(STYLES) == set(BEFORE) == set(AFTER)


@pytest.mark.parametrize("voice", sorted(STYLES))
def test_each_voice_puts_its_own_words_around_the_question(home, voice):
    around = [words.lower() for words in (*BEFORE[voice], *AFTER[voice])]
    for reply in _variants(_with_voices(home, [voice]))[1:]:
        assert any(words in reply.instruction.lower() for words in around)
        assert find_any(["laptop"], reply.instruction)


def test_samples_take_the_voices_in_turn(home):
    voices = sorted(STYLES)
    turns = _variants(_with_voices(home, voices), samples=range(1, 6))
    for voice, reply in zip(voices, turns, strict=True):
        assert any(words.lower() in reply.instruction.lower() for words in (*BEFORE[voice], *AFTER[voice]))


def test_on_a_phone_everything_is_lower_case_and_short(home):
    for reply in _variants(_with_voices(home, ["on a phone"]))[1:]:
        assert reply.instruction == reply.instruction.lower() and "?" not in reply.instruction


def test_a_voice_that_the_teacher_does_not_know_keeps_the_question_and_puts_any_words_around_it(home):
    found = _variants(_with_voices(home, ["like a pirate"]))
    assert all(QUESTION in reply.instruction for reply in found)
    assert len({reply.instruction for reply in found}) > len(found) / 2


def test_a_statement_ends_in_a_full_stop_and_a_question_in_its_mark():
    rng = random.Random(1)
    for text, end in (("laptop for college", "."), ("which laptop", "?"), ("Whatever laptop", "."), ("buy one!", "!")):
        found = reword(Seed("s", text, "desk", "CC0-1.0"), "like a pirate", rng)
        assert text in found and found[found.index(text) + len(text.rstrip("!")) :].startswith(end)


@settings(deadline=None)
@given(
    text=st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Zs", "Zl", "Zp", "Cf"]), min_size=1),
    voice=st.sampled_from([*sorted(STYLES), "like a pirate"]),
    seed=st.integers(0, 1000),
)
def test_any_seed_can_be_reworded(text, voice, seed):
    first, second = (reword(Seed("s", text, "desk", "CC0-1.0"), voice, random.Random(seed)) for _ in range(2))
    assert first == second and first == first.strip() and "  " not in first
    assert first or voice == "like a pirate"


@settings(deadline=None)
@given(
    words=st.lists(st.sampled_from(["my", "laptop", "is", "slow", "grandma", "needs", "and"]), min_size=3, max_size=9),
    voice=st.sampled_from(["terse", "chatty", "non-native", "annoyed"]),
    seed=st.integers(0, 1000),
)
def test_a_question_s_own_words_stay_in_their_order(words, voice, seed):
    found = reword(Seed("s", " ".join(words), "desk", "CC0-1.0"), voice, random.Random(seed))
    assert " ".join(words) in found


@pytest.mark.parametrize("expert", EXPERTS)
def test_every_slot_of_every_form_is_filled_from_the_phrases(home, expert):
    template = read_template(home.template(expert))
    seeds = read_seeds(home.seeds(expert), template)
    for answer, reply in ((seed.answer, reply) for seed in seeds for reply in _variants(template, seed, range(4))):
        assert set(reply.slots) == set(template.output.slots)
        assert all(value in template.phrases(name, answer) for name, value in reply.slots.items())
        for form in range(len(template.output.forms)):
            text = template.render(form, answer, reply.slots)
            assert template.in_form(text, answer) and not re.search(r"[{}]", text)


def test_a_seed_s_own_slots_are_kept_and_the_others_filled(product):
    seed = Seed("product-0001", QUESTION, "desk", "CC0-1.0", "default", {"use": "study"})
    found = _variants(product, seed)
    assert {reply.slots["use"] for reply in found} == {"study"}
    assert len({reply.slots["reason"] for reply in found}) > 3


def test_slots_that_are_left_open_vary(product):
    assert {len({reply.slots[name] for reply in _variants(product)}) > 3 for name in ("use", "reason")} == {True}


@pytest.mark.parametrize("expert", EXPERTS)
def test_a_form_uses_no_name_that_the_teacher_leaves_open(home, expert):
    template = read_template(home.template(expert))
    for answer in template.answers:
        known = set(template.fixed(answer)) | {n for n in template.output.slots if template.phrases(n, answer)}
        assert all(set(fields(form)) <= known for form in template.output.forms)


def test_a_slot_that_it_cannot_fill_is_told_before_anything_is_asked(product):
    raw = product.declaration.model_dump()
    raw["output"]["slots"]["use"]["phrases"] = None
    with pytest.raises(UserError, match=r"product\.yaml: output\.slots\.use: has no phrases, .*; add phrases"):
        PhrasesTeacher(Template(Declaration.model_validate(raw)))


def test_a_reply_is_one_variant_that_ended_by_itself_and_cost_nothing(product):
    for reply in _replies(product):
        assert len(reply.variants) == PhrasesTeacher.variants == 1 and reply.text == ""
        assert (reply.finish_reason, reply.prompt_tokens, reply.completion_tokens) == ("stop", 0, 0)
