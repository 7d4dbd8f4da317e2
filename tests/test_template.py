"""A template: read strictly, with every mistake told at its place, and compiled into what must agree."""

import re
from itertools import product
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from factory.errors import Problems
from factory.template import Declaration, Template, any_pattern, fields, find_any, phrase_pattern, read_template

TEA = (Path(__file__).parent / "tea.yaml").read_text(encoding="utf-8")


def read(folder, *changes, name="tea"):
    """The template TEA with each (old, new) of `changes` made, read from a file."""
    text = TEA
    for old, new in changes:
        assert text.count(old) >= 1, f"{old!r} is not in TEA"
        text = text.replace(old, new, 1)
    path = folder / f"{name}.yaml"
    path.write_text(text, encoding="utf-8")
    return read_template(path)


@pytest.fixture(scope="module")
def tea(tmp_path_factory):
    return read(tmp_path_factory.mktemp("tea"))


@pytest.fixture(scope="module", params=["product", "medical", "legal"])
def real(request, home):
    return read_template(home.template(request.param))


# -- compiled -----------------------------------------------------------------------------------


def test_each_real_template_compiles_with_enough_to_say(real):
    assert len(real.output.forms) >= 4 and len(real.declaration.tests) >= 6
    assert {case.expect.verdict for case in real.declaration.tests} == {"keep", "drop"}
    assert all(real.phrases(slot, answer) for slot in real.output.slots for answer in real.answers)


def test_a_form_is_filled_with_fixed_text_and_slots(tea):
    slots = {"use": "a long day", "why": "It is fresh."}
    assert tea.render(0, "green", slots) == "Take Sencha, a green tea, for a long day. It is fresh."


def test_doubled_braces_are_braces(tea):
    text = tea.render(1, "black", {"use": "breakfast", "why": "It is strong."})
    assert text == "{For breakfast} Assam! It is strong." and tea.in_form(text, "black")


def test_answers_and_phrases_are_never_parsed(tmp_path):
    braces = read(tmp_path, ("text: Assam", 'text: "As{use}am"'), ("breakfast", '"{answer}"'))
    text = braces.render(0, "black", {"use": "{answer}", "why": "It is strong."})
    assert text == "Take As{use}am, a black tea, for {answer}. It is strong." and braces.measure(text, "black").right


def test_phrases_are_a_list_for_all_or_a_list_for_each_answer(tea):
    assert tea.phrases("use", "black") == tea.phrases("use", "green") == ["breakfast", "a long day"]
    assert tea.phrases("why", "black") == ["It is strong."]
    assert tea.phrases("why", "green") == ["It is light.", "It is fresh."]


def test_a_word_that_other_yaml_reads_as_false_stays_a_word(tmp_path):
    assert read(tmp_path, ("breakfast", "no")).phrases("use", "black") == ["no", "a long day"]


def test_white_space_in_what_replies_are_made_of_is_single_spaces(tmp_path):
    loose = read(tmp_path, ("breakfast", '" my  break\\nfast "'), ('"Take', '"  Take'))
    assert loose.phrases("use", "black")[0] == "my break fast"
    assert loose.in_form(loose.render(0, "black", {"use": "my break fast", "why": "It is strong."}), "black")


def test_the_shortest_and_the_longest_text_of_a_form_are_known(tea, tmp_path):
    assert tea.bounds(0, "green")[0] == "Take Sencha, a green tea, for breakfast. It is light."
    assert tea.bounds(0, "green")[1] == "Take Sencha, a green tea, for a long day. It is light."
    assert read(tmp_path, (", phrases: [breakfast, a long day]", "")).bounds(0, "green")[1] is None


def test_a_key_knows_its_line(tea):
    lines = TEA.splitlines()
    for key in (("version",), ("answers", "green"), ("output", "forms", 1), ("tests", 0)):
        assert str(key[-1]) in lines[tea.line(*key) - 1] or isinstance(key[-1], int)
    assert lines[tea.line("output", "forms", 1) - 1].strip().startswith('- "{{For')


def test_a_prompt_carries_the_seeds_own_answer_alone(tea):
    system, user = tea.prompt("what shall I drink", "black", ["terse", "chatty", "terse"], {})
    text = system["content"]
    assert user == {"role": "user", "content": "what shall I drink"}
    assert "what a black tea is wanted for (at most 3 words; for example breakfast / a long day)" in text
    assert "Write 3 variants" in text and "1. terse\n2. chatty\n3. terse" in text
    assert "green" not in text and "answered with: Assam" in text and "never says Assam" in text


def test_a_prompt_lets_a_question_name_the_answer_where_the_seed_does(tea):
    assert "never says" not in tea.prompt("is Assam any good", "black", ["terse"], {})[0]["content"]


def test_a_prompt_holds_no_form_so_that_an_edited_form_asks_nobody(tea):
    text = tea.prompt("what shall I drink", "black", ["terse"], {})[0]["content"]
    assert not any(form.split("{")[0].strip() and form.split("{")[0] in text for form in tea.output.forms)


def test_a_slot_that_the_seed_fills_is_told_and_not_asked_for(tea):
    system, _ = tea.prompt("what shall I drink", "black", ["terse"], {"use": "a long day"})
    assert "use: is 'a long day' already" in system["content"] and "is wanted for" not in system["content"]
    one = tea.schema("black", 2, {"use": "a long day"})["properties"]["variants"]["items"]
    assert list(one["properties"]) == ["instruction", "why"] == one["required"]


@pytest.mark.parametrize(
    ("name", "text", "tidy"),
    [
        ("use", "  Breakfast.  ", "breakfast"), ("use", "A  long\nday", "a long day"), ("use", "PDF work", "PDF work"),
        ("use", "I travel", "I travel"), ("use", "", ""), ("why", "it is strong", "It is strong."),
        ("why", "It is strong!", "It is strong!"),
    ],
)  # fmt: skip
def test_a_teachers_text_is_set_as_the_phrases_of_its_slot_are(tea, name, text, tidy):
    assert tea.tidy(name, text, "black") == tidy


def test_a_text_for_a_slot_without_phrases_is_left_as_it_is(tmp_path):
    bare = read(tmp_path, (", phrases: [breakfast, a long day]", ""))
    assert bare.tidy("use", " Three  Words. ", "black") == "Three Words."


@given(phrases=st.lists(st.text(st.sampled_from("abAB -.é"), min_size=1).filter(str.strip), min_size=1), text=st.text())
def test_looking_for_many_phrases_at_once_finds_what_looking_one_by_one_does(phrases, text):
    text += f" {phrases[0]}" if len(text) % 2 else ""
    one_by_one = any(re.search(phrase_pattern(phrase), text, re.IGNORECASE) for phrase in phrases)
    assert bool(any_pattern(tuple(phrases)).search(text)) == one_by_one == (find_any(phrases, text) is not None)


def test_the_schema_bounds_every_text_and_closes_a_slot_without_an_ask(tea):
    variants = tea.schema("green", 3, {})["properties"]["variants"]
    assert (variants["minItems"], variants["maxItems"]) == (3, 3)
    one = variants["items"]
    assert one["required"] == list(one["properties"]) == ["instruction", "use", "why"]
    assert one["additionalProperties"] is False and one["properties"]["use"]["maxLength"] == 36
    assert one["properties"]["why"] == {"type": "string", "enum": ["It is light.", "It is fresh."]}


# -- in form ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "answer", "expected"),
    [
        ("Take Assam, a black tea, for breakfast. It is strong.", "black", True),
        ("Take Assam, a black tea, for breakfast. It is strong.", "green", False),
        ("Take Assam, a black tea, for breakfast. It is strong.", None, True),
        ("Take Sencha, a black tea, for breakfast. It is strong.", None, False),  # one answer's text, another's kind
        ("\n Take Assam, a black tea, for three other words. It is strong.\n", "black", True),
        ("Take Assam, a black tea, for now four other words. It is strong.", "black", False),
        ("Take Assam, a black tea, for . It is strong.", "black", False),
        ("Take Assam, a black tea, for breakfast. It is light.", "black", False),  # a closed slot of another answer
        ("Take assam, a black tea, for breakfast. It is strong.", "black", False),
        ("Well. Take Assam, a black tea, for breakfast. It is strong.", "black", False),
        ("Take Assam, a black tea, for breakfast. It is strong. Enjoy.", "black", False),
        ("", None, False),
    ],
)
def test_in_form_means_one_form_whole_with_one_answer(tea, text, answer, expected):
    assert tea.in_form(text, answer) is expected


# -- measured -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reply", "named", "mention", "right"),
    [
        ("Assam, I say", True, True, True),
        ("ASSAM\nit is", True, True, True),
        ("Sencha", True, True, False),  # an answer of the expert, not the question's own
        ("Assam, or else Sencha", True, True, False),
        ("Darjeeling will do", True, False, False),  # `also` names, but does not give
        ("Assam, never Darjeeling", True, True, True),
        ("Assam or an Earl Grey", True, False, False),
        ("earl grey", False, False, False),
        ("Assamese or preAssam", False, False, False),
        ("(Assam)", True, True, True),
        ("tea", False, False, False),
        ("", False, False, False),
    ],
)
def test_a_reply_is_measured_at_word_boundaries_in_any_case(tea, reply, named, mention, right):
    found = tea.measure(reply, "black")
    assert (found.named, found.mention, found.right, found.in_form) == (named, mention, right, False)


def test_the_longest_name_wins(tmp_path):
    grey = read(tmp_path, ("text: Assam", "text: Grey"), ("[Grey, Earl Grey]", "[Earl Grey]"), ("Assam, a", "Grey, a"))
    assert grey.names_in("Grey") == ({"black"}, set())
    assert grey.names_in("Earl  GREY") == (set(), {"earl grey"})
    assert grey.names_in("Grey and Earl Grey") == ({"black"}, {"earl grey"})
    assert grey.measure("Earl Grey", "black") == type(grey.measure("", "black"))(False, False, False, False, "")


def test_with_two_musts_both_must_stand(tmp_path):
    both = read(
        tmp_path, ('must: ["{answer}"]', 'must: ["{answer}", "{kind}"]'), ("{{For {use}}}", "{{For {use}}} {kind}")
    )
    assert both.musts("green") == ["Sencha", "a green tea"]
    assert both.measure("Sencha is a green tea", "green").right
    assert not both.measure("Sencha", "green").mention
    assert not both.measure("Sencha is a black tea", "green").mention


def test_every_bound_of_every_real_form_is_right_and_in_form(real):
    for form, answer in product(range(len(real.output.forms)), real.answers):
        for text in real.bounds(form, answer):
            found = real.measure(text, answer)
            assert found.right and found.mention and found.named and found.in_form, text


@given(data=st.data())
def test_any_render_of_any_listed_phrases_is_in_form_and_right(real, data):
    answer = data.draw(st.sampled_from(sorted(real.answers)))
    form = data.draw(st.integers(0, len(real.output.forms) - 1))
    slots = {name: data.draw(st.sampled_from(real.phrases(name, answer))) for name in real.output.slots}
    text = real.render(form, answer, slots)
    found = real.measure(text, answer)
    assert found.right and found.in_form and real.in_form(text, answer)
    others = set(real.answers) - {answer}
    assert not any(real.in_form(text, other) or real.measure(text, other).right for other in others)


WORDS = st.lists(st.text(min_size=1, max_size=8).filter(str.strip), min_size=1, max_size=3).map(" ".join)


@given(use=WORDS, why=WORDS)
def test_any_phrases_at_all_make_a_reply_in_form_and_right(tea, use, why):
    assume(len(use.split()) <= 3 and len(why.split()) <= 6)
    assume(not any(find_any([name], f"{use} {why}") for name in ("Assam", "Darjeeling", "Sencha", "Grey")))
    raw = tea.declaration.model_dump()
    raw["output"]["slots"] = {"use": {"ask": "x", "max_words": 3}, "why": {"max_words": 6, "phrases": [why]}}
    made = Template(Declaration.model_validate(raw))
    for form, answer in product((0, 1), made.answers):
        text = made.render(form, answer, {"use": " ".join(use.split()), "why": made.phrases("why", answer)[0]})
        assert made.measure(text, answer).right and made.in_form(text, answer)


@given(st.text())
def test_any_reply_can_be_measured(tea, reply):
    found = tea.measure(reply, "black")
    assert found.mention or not found.right
    assert found.named or not found.mention


@given(st.text(alphabet="{}ab !:."))
def test_any_form_has_plain_names_or_is_refused(form):
    try:
        names = fields(form)
    except ValueError:
        return
    assert all(name.isidentifier() for name in names) and form.format(**dict.fromkeys(names, "x")) is not None


# -- mistakes -----------------------------------------------------------------------------------

FORM = '"Take {answer}, {kind}, for {use}. {why}"'
PLAIN_USE = 'use: {ask: "what {kind} is wanted for", max_words: 3, phrases: [breakfast, a long day]}'
MISTAKES = {
    "an unknown key": ("version: 1", "version: 1\ncolour: red", "colour: red", "colour", "unknown key; remove it"),
    "an unknown key inside": (
        "  never:", "  nevr: []\n  never:", "nevr", "output.nevr", "unknown key; remove it or mend",
    ),
    "a missing key": (
        "dedup: {instruction: 90}\n", "", "expert: tea", "dedup", "is missing; every key is always there",
    ),
    "a missing key inside": ("    also: []\n", "", "  green:", "answers.green.also", "is missing"),
    "no answers": (
        "answers:", "answers: {}\nold:", "answers: {}", "answers", "dictionary should have at least 1 item|needs 1",
    ),
    "no forms": (
        f"forms:\n    - {FORM}\n    - ", "forms: []\n    # ", "forms: []", "output.forms", "needs 1 at least; add",
    ),
    "an empty form": (FORM, '""', '- ""', "output.forms.0", "at least 1 character, not ''"),
    "an unknown slot": (
        FORM, '"{answer} {usee}"', "usee", "output.forms.0", r"unknown slot \{usee\}; known are answer, kind, use, why",
    ),
    "an unknown name in must": (
        'must: ["{answer}"]', 'must: ["{use}"]', "must:", "output.must.0",
        r"unknown name \{use\}; known are answer, kind",
    ),
    "an open brace in must": (
        'must: ["{answer}"]', 'must: ["{answer"]', "must:", "output.must.0", r"write \{\{ and \}\} for braces",
    ),
    "an open brace": (FORM, '"{answer} {use"', '{use"', "output.forms.0", r"write \{\{ and \}\} for braces"),
    "a lone brace": (FORM, '"{answer} } {use}"', "} {use}", "output.forms.0", r"write \{\{ and \}\} for braces"),
    "a field that does more": (FORM, '"{answer!r} {use}"', "!r", "output.forms.0", r"is no plain name; write \{\{"),
    "a field without a name": (FORM, '"{answer} {}"', " {}", "output.forms.0", r"\{\} is no plain name"),
    "a form without the answer": (
        FORM, '"Tea for {use}. {why}"', "Tea for", "output.forms.0", r"lacks '\{answer\}', which output.must demands",
    ),
    "a form with a hedge": (
        FORM, '"It depends: {answer} for {use}. {why}"', "It depends", "output.forms.0",
        "holds 'it depends' of output.never",
    ),
    "a form with a rival": (
        FORM, '"No Earl Grey, {answer} for {use}. {why}"', "No Earl", "output.forms.0",
        "names earl grey with answer black",
    ),
    "a slot that no form uses": (
        PLAIN_USE, PLAIN_USE + "\n    odd: {max_words: 1, phrases: [x]}", "odd:", "output.slots.odd",
        "used by no form; remove it or use it",
    ),
    "a slot with nothing to fill it": (
        PLAIN_USE, "use: {max_words: 3}", "use: {max", "output.slots.use", "needs `ask`",
    ),
    "a phrase too long": (
        "a long day", "a very long day", "use: {ask", "output.slots.use.phrases.1",
        "has 4 words, more than max_words 3; shorten it",
    ),
    "a phrase with a rival": (
        "[It is strong.]", "[Not Earl Grey.]", "Not Earl", "output.slots.why.phrases.black.0",
        "names earl grey; reword it",
    ),
    "a phrase with another answer": (
        "[It is strong.]", "[No Sencha.]", "No Sencha", "output.slots.why.phrases.black.0", "names green; reword it",
    ),
    "a phrase with a hedge": (
        "a long day", "it depends", "use: {ask", "output.slots.use.phrases.1", "of output.never; reword it",
    ),
    "phrases of no answer": (
        "green: [It is light., It is fresh.]", "white: [It is light.]", "why:|phrases:$|white: ",
        "output.slots.why.phrases.white", "'white' is no answer; the answers are black, green",
    ),
    "a number as a phrase": (
        "breakfast", "5", "use: {ask", "output.slots.use.phrases.0", r"must be text; put it in quotes \(value 5\)",
    ),
    "a date as a phrase": (
        "[It is strong.]", "[2026-11-02]", "2026-11-02]", "output.slots.why.phrases.black.0",
        "must be text; put it in quotes .value '2026-11-02'",
    ),
    "phrases of no kind": (
        "phrases: [breakfast, a long day]", "phrases: 3", "phrases: 3", "output.slots.use.phrases", "valid list, not 3",
    ),
    "a bare date": (
        'checked: "2026-11-02"', "checked: 2026-11-02", "checked: 2026-11-02", "answers.black.checked",
        'a date stands in quotes, "2026-11-02"',
    ),
    "no date": (
        'valid_until: "2027-11-02"', 'valid_until: "soon"', "soon", "market.declares.valid_until",
        'written as "2026-11-02"',
    ),
    "a date that is none": (
        'checked: "2026-11-02"', "checked: 2026-02-30", "2026-02-30", "", "not YAML: day .*; put text in quotes",
    ),
    "text for a number": ("per_seed: 2", "per_seed: two", "per_seed", "generate.per_seed", "valid integer, not 'two'"),
    "a number out of range": (
        "{instruction: 90}", "{instruction: 900}", "dedup", "dedup.instruction", "less than or equal to 100, not 900",
    ),
    "a word that is not among the known": (
        "prefer: precision", "prefer: yes", "prefer", "route.prefer", "'precision' or 'recall', not 'yes'",
    ),
    "lengths the wrong way round": (
        "[5, 50]", "[50, 5]", "tokens", "output.tokens", r"must be \[fewest, most\], not \[50, 5\]",
    ),
    "another file's name": (
        "expert: tea", "expert: coffee", "expert:", "expert", "must be 'tea', the file's name, not 'coffee'",
    ),
    "an answer inside another": (
        "text: Sencha", "text: Assam Gold", "text: Assam Gold", "answers.green.text",
        "'Assam' stands inside 'Assam Gold' .*; tell them apart",
    ),
    "a name of two answers": (
        "also: []", "also: [darjeeling]", "also: [dar", "answers.green.also",
        "'darjeeling' is a name of answer black too; tell them apart",
    ),
    "a rival that is an answer": (
        "[Grey,", "[assam,", "rivals", "rivals", "'assam' is answer black itself; remove it from one",
    ),
    "a fixed text that one answer lacks": (
        "    kind: a green tea\n", "", "  green:", "answers.green", "lacks kind, which other answers have; add it",
    ),
    "a fixed text called as a slot": (
        "    kind: a black", "    use: x\n    kind: a black", "  black:", "answers.black",
        "use is the name of a slot too; rename one",
    ),
    "a fixed text called answer": (
        "    kind: a black", "    answer: x\n    kind: a black", "answer: x", "answers.black.answer",
        "is what forms call the answer's text; rename it",
    ),
    "a test of no answer": (
        "{answer: black, i", "{answer: white, i", "given:", "tests.0.given.answer",
        "'white' is no answer; one of black, green",
    ),
    "a test without an answer": (
        "{answer: black, i", "{i", "given:", "tests.0.given", "answer is missing; one of black, green",
    ),
    "a test of no reason": (
        "{verdict: keep}", "{verdict: drop, reason: boredom}", "expect:", "tests.0.expect.reason",
        "'boredom' is no reason; one of empty, truncated",
    ),
    "a drop without a reason": (
        "{verdict: keep}", "{verdict: drop}", "expect:", "tests.0.expect", "a drop names its reason",
    ),
    "an answer's key in capitals": ("  black:\n", "  Black:\n", "  Black:", "answers.Black", "not 'Black'"),
    "a key twice": (
        "version: 1", "version: 1\nversion: 2", "version: 2", "",
        'not YAML: found duplicate key "version" .*; remove one',
    ),
    "no YAML": ("[Grey, Earl", "[Grey, Earl: [", "output:", "", "not YAML: expected"),
    "a tab": ("  tokens:", "\ttokens:", "tokens:", "", "not YAML: found character"),
    "a control character": (
        "Names a tea", "Names a \x07tea", "Names", "",
        r"not YAML: the character '\\x07' may not stand in it; remove it",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_told_with_file_line_key_and_cure(tmp_path, name):
    old, new, place, key, words = MISTAKES[name]
    with pytest.raises(Problems) as told:
        read(tmp_path, (old, new))
    lines = (tmp_path / "tea.yaml").read_text(encoding="utf-8").splitlines()
    found = [p for p in told.value.problems if p.key == key and re.search(words, p.message)]
    assert found, told.value
    assert re.search(place, lines[found[0].line - 1]) if "|" in place else place in lines[found[0].line - 1]
    assert str(found[0]).startswith(f"{tmp_path / 'tea.yaml'}:{found[0].line}: ")


def test_the_template_itself_has_no_mistake(tea):
    assert set(tea.answers) == {"black", "green"}


def test_several_mistakes_are_told_at_once_in_the_order_of_the_file(tmp_path):
    with pytest.raises(Problems) as told:
        read(
            tmp_path,
            ("version: 1", "version: one"),
            ("[5, 50]", "[5]"),
            ("prefer: precision", "prefer: x"),
            ("terse", "''"),
        )
    keys = [p.key for p in told.value.problems]
    assert keys == ["version", "output.tokens", "generate.voices.0", "route.prefer"]
    assert len(str(told.value).splitlines()) == 4


def test_several_contradictions_are_told_at_once(tmp_path):
    with pytest.raises(Problems) as told:
        read(
            tmp_path,
            (FORM, '"{answer} {use} {why} {x} {y}"'),
            ("[5, 50]", "[50, 5]"),
            ("{{For", "{For"),
            ("expert: tea", "expert: x"),
        )
    assert [p.key for p in told.value.problems] == [
        "expert", "output.tokens", "output.forms.0", "output.forms.0", "output.forms.1",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("data", "words"), [(b"", "must be a mapping"), (b"- a\n", "must be a mapping"), (b"tea", "mapping")]
)
def test_a_file_that_is_no_mapping_is_told(tmp_path, data, words):
    (tmp_path / "tea.yaml").write_bytes(data)
    with pytest.raises(Problems, match=rf"tea\.yaml:1: {words}.*docs/template.md|{words}"):
        read_template(tmp_path / "tea.yaml")


def test_a_file_that_is_not_utf_8_is_told_with_the_line(tmp_path):
    (tmp_path / "tea.yaml").write_bytes(TEA.replace("Names a tea", "Names a t\u00e9").encode("latin-1"))
    with pytest.raises(Problems, match=r"tea\.yaml:4: not UTF-8 at byte \d+; save it as UTF-8"):
        read_template(tmp_path / "tea.yaml")


def test_a_byte_order_mark_and_windows_line_ends_are_no_mistake(tmp_path):
    (tmp_path / "tea.yaml").write_bytes(b"\xef\xbb\xbf" + TEA.replace("\n", "\r\n").encode())
    assert read_template(tmp_path / "tea.yaml").line("version") == 2


@given(st.text())
def test_any_file_is_read_or_its_problems_are_told(tmp_path_factory, text):
    path = tmp_path_factory.getbasetemp() / "tea.yaml"
    path.write_text(text, encoding="utf-8", errors="surrogatepass")
    with pytest.raises(Problems):
        read_template(path)
