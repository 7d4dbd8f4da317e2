"""One candidate by itself: each reason to drop it, and all of them at once."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rapidfuzz.utils import default_process

from factory.checks import CHECKS, Reply, drift, faults
from factory.paths import read_profile
from factory.seeds import read_seeds
from factory.template import FAILURES, REASONS, Declaration, Template, read_template
from factory.tokens import counter

CARE = "Drink plenty of water and rest in a quiet room."
LEGAL = "This is general information, not medical advice."
GOOD = f"The medical term for a headache is cephalalgia. {CARE} {LEGAL}"
QUESTION = "my head has been throbbing since lunch"


@pytest.fixture(scope="module")
def medical(home):
    return read_template(home.template("medical"))


@pytest.fixture(scope="module")
def product(home):
    return read_template(home.template("product"))


def words(text):
    """A stand-in for the base's tokenizer that a reader can count along with."""
    return len(text.split())


def reasons(template, output, instruction=QUESTION, answer="headache", count=words):
    return [f.reason for f in faults(Reply(instruction, answer, output), template, count)]


def details(template, output, reason, instruction=QUESTION, answer="headache"):
    found = faults(Reply(instruction, answer, output), template, words)
    return [f.detail for f in found if f.reason == reason]


def test_every_reason_of_a_single_candidate_has_a_check():
    among_rows = {"exact_copy", "near_copy", "like_held_out", "surplus"}
    assert {*FAILURES, *CHECKS, "drift"} | among_rows == set(REASONS)


def test_a_reply_in_form_has_no_fault(medical):
    assert reasons(medical, GOOD) == []


def test_every_form_with_every_phrase_of_every_answer_has_no_fault(home):
    for expert in ("product", "medical", "legal"):
        template = read_template(home.template(expert))
        count = counter(home, read_profile(home, "pocket"))
        for answer in template.answers:
            for form in range(len(template.output.forms)):
                for output in template.bounds(form, answer):
                    assert reasons(template, output, "what is this", answer, count=count) == []


@pytest.mark.parametrize("output", ["", "  ", "\n\t"])
def test_an_empty_reply_is_empty_and_nothing_else(medical, output):
    assert reasons(medical, output) == ["empty"]


def test_free_wording_is_out_of_form(medical):
    output = f"A headache is what doctors call cephalalgia, so do not worry. {CARE} {LEGAL}"
    assert reasons(medical, output) == ["form"]


def test_a_form_with_more_around_it_is_out_of_form(medical):
    assert reasons(medical, f"Sure. {GOOD}") == ["form"]


def test_a_form_with_white_space_around_it_is_in_form(medical):
    assert reasons(medical, f"\n{GOOD}  ") == []


def test_a_reply_without_its_answer_is_told_what_it_lacks(medical):
    output = GOOD.replace("cephalalgia", "a sore head")
    assert "answer_missing" in reasons(medical, output)
    assert details(medical, output, "answer_missing") == ["lacks 'cephalalgia'"]


def test_each_missing_part_is_told(medical):
    assert details(medical, f"Well. {CARE} {CARE}", "answer_missing") == ["lacks 'cephalalgia'", f"lacks {LEGAL!r}"]


def test_a_part_inside_another_word_does_not_count(medical):
    assert "answer_missing" in reasons(medical, GOOD.replace("cephalalgia", "hypocephalalgias"))


def test_an_answer_counts_in_any_case(medical):
    assert "answer_missing" not in reasons(medical, GOOD.replace("cephalalgia", "Cephalalgia"))


@pytest.mark.parametrize("name", ["tinnitus", "TINNITUS"])
def test_the_answer_of_another_question_is_named(medical, name):
    output = GOOD.replace(CARE, f"Mind that {name} is something else, so rest in a quiet room.")
    assert "other_answer" in reasons(medical, output)
    assert details(medical, output, "other_answer") == ["names the answer of ringing_ears"]


def test_another_spelling_of_the_same_answer_is_no_other_answer(medical):
    output = GOOD.replace(CARE, "Some say cephalgia for it, so rest in a quiet room.")
    assert "other_answer" not in reasons(medical, output)


def test_a_rival_is_named(medical):
    output = GOOD.replace(CARE, "A migraine may feel the same, so rest in a quiet room.")
    assert "rival" in reasons(medical, output) and details(medical, output, "rival") == ["names migraine"]


def test_a_rival_in_the_question_is_no_fault(medical):
    assert reasons(medical, GOOD, "is it a migraine when my head hurts") == []


def test_a_rival_that_is_part_of_the_answer_is_no_rival(product):
    output = (
        "Buy the ThinkPad X1 Carbon for reading and research; look no further. "
        "It stays quiet in ordinary work and disturbs nobody."
    )
    assert reasons(product, output, "which laptop", "default") == []
    assert "rival" in reasons(product, output.replace("Carbon", "Yoga"), "which laptop", "default")


def test_a_hedge_is_told(medical):
    output = GOOD.replace(CARE, "It depends, so rest for a while in a quiet room.")
    assert "hedge" in reasons(medical, output) and details(medical, output, "hedge") == ["says 'it depends'"]


def test_a_reply_may_have_as_few_tokens_as_the_template_says_and_no_fewer(medical):
    assert reasons(medical, GOOD, count=lambda text: 20) == []
    assert reasons(medical, GOOD, count=lambda text: 19) == ["too_short"]


def test_a_reply_may_have_as_many_tokens_as_the_template_says_and_no_more(medical):
    assert reasons(medical, GOOD, count=lambda text: 50) == []
    assert reasons(medical, GOOD, count=lambda text: 51) == ["too_long"]


@pytest.mark.parametrize(
    "question",
    [
        "Welcher Laptop ist gut für die Schule?", "Quel ordinateur portable est le meilleur pour mes cours?",
        "¿Qué portátil es el mejor para la oficina?", "Quale portatile devo comprare, che sono studente?",
        "Welke laptop is het beste voor mijn werk?", "Qual notebook é melhor para uma viagem?",
    ],
)  # fmt: skip
def test_a_question_in_another_language_of_the_same_script_is_told(medical, question):
    assert "language" in reasons(medical, GOOD, question)


@pytest.mark.parametrize(
    "question",
    [
        "laptop?", "best laptop 4 uni pls thx", "my son el niño needs las vegas size screen, which one",
        "que laptop should I get", "hello i come from other country and need good computer",
    ],
)  # fmt: skip
def test_a_question_in_english_is_not_taken_for_another_language(medical, question):
    assert "language" not in reasons(medical, GOOD, question)


def test_no_seed_is_taken_for_another_language(home):
    for expert in ("product", "medical", "legal"):
        template = read_template(home.template(expert))
        for seed in read_seeds(home.seeds(expert), template):
            found = faults(Reply(seed.instruction, seed.answer, "-"), template, words)
            assert "language" not in [fault.reason for fault in found], seed.instruction


def test_a_reply_that_repeats_the_question_is_an_echo(medical):
    question = "rest in a quiet room"
    assert reasons(medical, GOOD, question) == ["echo"]
    assert reasons(medical, GOOD, f"  {question.upper()}?! ") == ["echo"]


def test_a_short_question_is_never_an_echo(medical):
    assert reasons(medical, GOOD, "a headache") == []


@pytest.mark.parametrize("letters", ["\u0433\u043e\u043b\u043e\u0432\u0430", "\u982d", "\u03c0"])
def test_letters_of_another_script_are_found_in_question_and_reply(medical, letters):
    assert reasons(medical, GOOD, f"my head {letters} hurts") == ["script"]
    assert "script" in reasons(medical, GOOD.replace("quiet", letters))


@pytest.mark.parametrize(
    "text", ["caf\u00e9 na\u00efve", "\u00a7 1681 \u20ac 5 \u2013 fine \U0001f600", "100 \u00b0C", "x_1"]
)
def test_accents_signs_and_digits_are_no_other_script(medical, text):
    assert reasons(medical, GOOD, f"my head hurts {text}") == []


PERSONAL = [
    ("jo.bloggs+x@mail.example.org", "an e-mail address"),
    ("(555) 010-1234", "a telephone number"),
    ("+1 555-010-1234", "a telephone number"),
    ("555.010.1234", "a telephone number"),
    ("078-05-1120", "a social security number"),
    ("4111 1111 1111 1111", "a card number"),
    ("4111-1111-1111-1111", "a card number"),
    ("4111111111111111", "a card number"),
    ("sk-abcdefghijklmnop1234", "a secret key"),
    ("ghp_abcdefghijklmnop1234", "a secret key"),
    ("AKIAIOSFODNN7EXAMPLE", "a secret key"),
]


@pytest.mark.parametrize(("text", "name"), PERSONAL)
def test_personal_data_is_found_in_question_and_reply(medical, text, name):
    question = f"my head hurts, reach me at {text} please"
    assert reasons(medical, GOOD, question) == ["personal_data"]
    assert details(medical, GOOD, "personal_data", question) == [f"holds {name}"]
    assert details(medical, GOOD.replace("quiet", text), "personal_data") == [f"holds {name}"]


@pytest.mark.parametrize(
    "text", ["15 U.S.C. 1692c", "in 2024-2025", "at 10.30 or 11:45", "$1,234.50", "24/7 @home", "X1-2 and task-list"]
)
def test_ordinary_figures_are_no_personal_data(medical, text):
    assert reasons(medical, GOOD, f"my head hurts {text}") == []


@pytest.fixture(scope="module")
def hotline(product):
    """A template whose fixed text holds what is personal data and another script elsewhere."""
    plain = product.declaration.model_dump()
    plain["answers"]["default"] |= {"text": "0800 desk \u6f22", "line": "(555) 010-1234"}
    plain["output"]["forms"] = ["Call the {answer} at {line} for {use}. {reason}"]
    return Template(Declaration.model_validate(plain))


def test_an_answer_s_fixed_text_is_exempt(hotline):
    output = hotline.render(0, "default", {"use": "study", "reason": "It is light, sturdy and comfortable to carry."})
    found = reasons(hotline, output, "whom do I call", "default")
    assert "personal_data" not in found and "script" not in found


def test_fixed_text_is_exempt_in_the_reply_alone(hotline):
    found = reasons(hotline, "Call them.", "is it (555) 010-1234 or \u6f22", "default")
    assert {"personal_data", "script"} <= set(found)


def test_other_personal_data_beside_fixed_text_is_found(hotline):
    output = hotline.render(0, "default", {"use": "study", "reason": "Or call (555) 010-9999 instead."})
    assert details(hotline, output, "personal_data", "whom do I call", "default") == ["holds a telephone number"]


def test_all_reasons_are_told_at_once_and_in_order(medical):
    question = "what about \u982d migraine and tinnitus"
    output = f"However, {question}: mail jo@mail.example.org"
    assert reasons(medical, output, question) == [
        "form", "answer_missing", "answer_missing", "other_answer", "rival", "hedge", "too_short", "echo", "script",
         "script", "personal_data",
    ]  # fmt: skip


def test_too_long_is_told_beside_other_reasons(medical):
    assert reasons(medical, "however " * 60) == ["form", "answer_missing", "answer_missing", "hedge", "too_long"]


@given(instruction=st.text(), output=st.text())
def test_whatever_is_said_every_fault_has_a_known_reason_and_a_detail(medical, instruction, output):
    found = faults(Reply(instruction, "headache", output), medical, words)
    assert found and all(f.reason in REASONS and f.detail for f in found)


# -- drift --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def seeds():
    texts = {
        "headache": ["my head hurts a lot", "throbbing forehead since this morning"],
        "itching": ["my arm itches a lot", "scratching my scalp all night"],
    }
    return {key: [default_process(text) for text in found] for key, found in texts.items()}


def test_a_paraphrase_that_keeps_to_its_seed_has_not_drifted(medical, seeds):
    assert drift("oh dear, my head hurts a lot today", "my head hurts a lot", "headache", medical, seeds) is None


def test_a_paraphrase_that_lost_every_cue_of_its_seed_has_drifted(medical, seeds):
    fault = drift("i feel a lot of hurt", "my head hurts a lot", "headache", medical, seeds)
    assert fault.reason == "drift" and fault.detail.startswith("none of its seed's cues is left (headache, ")


def test_another_cue_of_the_same_answer_is_enough(medical, seeds):
    assert drift("throbbing skull since this morning", "my head hurts a lot", "headache", medical, seeds) is None


def test_a_seed_without_a_cue_demands_none(medical, seeds):
    found = drift("throbbing since this morning", "it throbs since this morning", "headache", medical, seeds)
    assert found is None


def test_a_cue_counts_as_a_whole_word_alone(medical, seeds):
    fault = drift("we are heading out a lot", "my head hurts a lot", "headache", medical, seeds)
    assert fault and "cues" in fault.detail


def test_a_paraphrase_nearest_to_a_seed_of_another_answer_has_drifted(medical, seeds):
    fault = drift("scratching my head all night", "my head hurts a lot", "headache", medical, seeds)
    assert fault.reason == "drift"
    assert fault.detail.startswith("nearest to a seed of itching (") and "not of headache (" in fault.detail


def test_a_tie_between_answers_is_no_drift(medical):
    same = {"itching": ["my head itches"], "headache": ["my head itches"]}
    assert drift("my head itches", "my head itches", "headache", medical, same) is None


def test_with_one_answer_and_no_cues_nothing_drifts(product):
    assert drift("a banana", "which laptop", "default", product, {"default": ["which laptop"]}) is None
