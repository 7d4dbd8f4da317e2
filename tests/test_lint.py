"""`dmoe lint`: what can be known to be wrong is told at once, for all files, before anything is made."""

import datetime
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest

from factory.errors import Problems, UserError
from factory.lint import check, lint
from factory.seeds import held_out, read_seeds
from factory.store import read_yaml
from factory.template import json_schema, read_template

ROOT = Path(__file__).parents[1]


def change(path, old, new):
    text = path.read_text(encoding="utf-8")
    assert old in text, f"{old!r} is not in {path.name}"
    path.write_text(text.replace(old, new, 1), encoding="utf-8")


def problems(home, only=None):
    with pytest.raises(Problems) as told:
        lint(home, only)
    return told.value.problems


def the_one(home, key, words):
    """The one problem of a checkout, which must have this key and these words."""
    [found] = problems(home)
    assert found.key == key and re.search(words, found.message), found
    return found


def command(home, *words):
    """`dmoe lint` as a user runs it: (exit status, stdout, stderr)."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    code = [sys.executable, "-m", "factory.cli", "lint", *words]
    done = subprocess.run(code, cwd=home.root, env=env, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


def files(home):
    return {path: path.read_bytes() for path in home.root.rglob("*") if path.is_file()}


# -- through the command line -------------------------------------------------------------------


def test_a_sound_project_passes_and_says_what_was_read(checkout):
    before = files(checkout)
    status, out, err = command(checkout, "--today", "2026-11-24")
    assert (status, err) == (0, "")
    assert re.fullmatch(r"sound: 3 templates, \d+ seeds, \d+ tests, \d{3} general\n", out)
    assert files(checkout) == before


def test_all_problems_of_all_files_are_told_at_once_without_a_traceback(checkout):
    change(checkout.template("product"), "version: 1", "version: one")
    change(checkout.template("medical"), "{care} This", "{cure} This")
    change(checkout.seeds("legal"), '"licence": "CC0-1.0"', '"license": "CC0-1.0"')
    change(checkout.seeds("product"), "{", "")  # told though its template is broken
    change(checkout.general, "{", "")
    (checkout.root / "templates" / "spare.yaml").write_text("expert: spare\n")
    before = files(checkout)
    status, out, err = command(checkout)
    assert (status, out) == (1, "") and "Traceback" not in err and files(checkout) == before
    lines = err.removeprefix("error: ").splitlines()
    places = [line.split(": ")[0] for line in lines]
    form = 1 + checkout.template("medical").read_text().split("{cure} This")[0].count("\n")
    assert places == [
        "seeds/general.jsonl:1", "seeds/legal.jsonl:1", "seeds/legal.jsonl:1", "seeds/product.jsonl:1",
        f"templates/medical.yaml:{form}", "templates/product.yaml:5", "templates/spare.yaml:1",
    ]  # fmt: skip
    assert all(re.search(r"; |is missing|not JSON|not 'one'", line) for line in lines)


def test_one_expert_can_be_checked_alone(checkout):
    change(checkout.template("product"), "version: 1", "version: one")
    assert command(checkout, "medical")[0] == 0
    status, out, err = command(checkout, "product")
    assert (status, out) == (1, "") and err.startswith("error: templates/product.yaml:5: version: ")


# -- params and files ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["template", "seeds"])
def test_an_expert_without_a_file_is_told(checkout, kind):
    path = getattr(checkout, kind)("legal")
    path.unlink()
    found = the_one(checkout, "experts", rf"'legal' has no .*{path.name}; write it, or remove the name")
    assert found.file.endswith("params.yaml")


@pytest.mark.parametrize("name", ["templates/spare.yaml", "seeds/spare.jsonl"])
def test_a_file_without_an_expert_is_told(checkout, name):
    shutil.copy(checkout.root / name.replace("spare", "legal"), checkout.root / name)
    found = the_one(checkout, "", "'spare' is not in params.yaml's experts; add it there, or remove the file")
    assert found.file.endswith(name)


def test_an_expert_named_twice_is_told(checkout):
    change(checkout.params, "  - legal", "  - legal\n  - legal")
    the_one(checkout, "experts", "a name is there twice; remove one")


def test_names_that_begin_one_another_are_told(checkout):
    change(checkout.params, "  - legal", "  - legal\n  - legal_tax")
    shutil.copy(checkout.template("legal"), checkout.template("legal_tax"))
    change(checkout.template("legal_tax"), "expert: legal", "expert: legal_tax")
    shutil.copy(checkout.seeds("legal"), checkout.seeds("legal_tax"))
    the_one(checkout, "experts", "'legal' begins 'legal_tax', which breaks PEFT's hot swap; rename one")


def test_missing_general_questions_are_told_beside_all_else(checkout):
    checkout.general.unlink()
    change(checkout.template("product"), "version: 1", "version: one")
    assert [(Path(p.file).name, p.line) for p in problems(checkout)] == [("general.jsonl", 0), ("product.yaml", 5)]


def test_a_base_without_a_tokenizer_is_told_beside_all_else(checkout):
    (checkout.root / "models" / "pocket" / "tokenizer.json").unlink()
    change(checkout.template("product"), "version: 1", "version: one")
    with pytest.raises(UserError, match=r"(?s)product\.yaml:5: version: .*\n.*base\.model: no tokenizer for"):
        lint(checkout)


def test_with_a_broken_template_its_seeds_are_read_as_far_as_can_be(checkout):
    change(checkout.template("medical"), "version: 1", "version: one")
    change(checkout.seeds("medical"), '"answer": "nosebleed"', '"answer": "none such"')
    change(checkout.seeds("medical"), '"source": "hand-written"', '"source": 3')
    assert [(Path(p.file).name, p.key) for p in problems(checkout)] == [
        ("medical.jsonl", "source"), ("medical.yaml", "version"),
    ]  # fmt: skip


# -- what only the whole can tell ---------------------------------------------------------------


def first_form(home, expert, form):
    path = home.template(expert)
    old = path.read_text(encoding="utf-8").split("  forms:\n")[1].splitlines()[0]
    change(path, old, f'    - "{form}"')
    return 1 + path.read_text(encoding="utf-8").split("  forms:\n")[0].count("\n") + 1


def test_a_form_that_can_never_be_long_enough_is_told(checkout):
    line = first_form(checkout, "product", "Buy the {answer} for {use}.")
    found = [p for p in problems(checkout) if p.key == "output.forms.0"]
    assert [p.line for p in found] == [line]
    assert re.fullmatch(r"has \d+ tokens at most .*, never within 20 to 50; lengthen it", found[0].message)


def test_a_form_that_is_always_too_long_is_told(checkout):
    line = first_form(
        checkout, "product", "{answer} " + "is the one that you should really buy " * 8 + "{use} {reason}"
    )
    found = [p for p in problems(checkout) if p.key == "output.forms.0"]
    assert [p.line for p in found] == [line]
    assert re.fullmatch(r"has \d+ tokens at least .*, never within 20 to 50; shorten it", found[0].message)


def test_a_form_too_long_for_one_answer_alone_is_told_with_that_answer(checkout):
    change(checkout.template("medical"), "complaint: hiccups", "complaint: " + "what people call the hiccups " * 12)
    found = [p for p in problems(checkout) if p.key.startswith("output.forms")]
    assert found and all("with answer hiccups" in p.message for p in found)


def test_a_slot_that_the_embedded_teacher_cannot_fill_is_told(checkout):
    path = checkout.template("product")
    head, _, rest = path.read_text(encoding="utf-8").partition("      phrases:\n")
    path.write_text(head + "    reason:" + rest.partition("    reason:")[2], encoding="utf-8")
    found = [p for p in problems(checkout, "product") if p.key == "output.slots.use"]
    assert len(found) == 1 and "has no phrases, and the embedded teacher" in found[0].message


def test_a_templates_own_test_that_fails_is_told_with_what_was_seen(checkout):
    change(checkout.template("product"), "expect: {verdict: drop, reason: rival}", "expect: {verdict: keep}")
    found = the_one(checkout, "tests.5", "'a competitor .*' expects to be kept, but it is dropped for rival")
    name = checkout.template("product").read_text(encoding="utf-8").splitlines()[found.line - 1]
    assert name == "  - name: a competitor beside the answer is dropped"


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("{verdict: keep}", "{verdict: drop, reason: hedge}", "expects a drop for hedge, but it is kept"),
        ("reason: hedge}", "reason: rival}", "expects a drop for rival, but it is dropped for form, hedge"),
    ],
)
def test_a_drop_must_be_for_the_reason_that_the_test_names(checkout, old, new, words):
    change(checkout.template("product"), old, new)
    [found] = problems(checkout)
    assert found.key.startswith("tests.") and words in found.message


def test_a_new_rival_that_stands_in_a_phrase_is_told(checkout):
    change(checkout.template("product"), "  - Dynabook", "  - Dynabook\n  - Linux")
    found = [p for p in problems(checkout) if p.key.startswith("output.slots.reason.phrases.")]
    assert found and found[0].message.endswith("names linux; reword it")


# -- for programs and editors -------------------------------------------------------------------


def test_problems_as_json_have_a_place_a_key_and_a_severity(checkout):
    assert command(checkout, "--format", "json", "--today", "2026-11-24")[:2] == (0, "[]\n")
    change(checkout.template("product"), "version: 1", "version: one")
    status, out, err = command(checkout, "--format", "json", "--today", "2026-11-24")
    [found] = json.loads(out)
    assert (status, err) == (1, "") and found == {
        "file": "templates/product.yaml", "line": 5, "column": 1, "key": "version", "severity": "error",
        "message": "input should be a valid integer, not 'one'",
    }  # fmt: skip


def test_problems_for_editors_are_lines_that_they_jump_to(checkout):
    change(checkout.seeds("product"), '"source": "hand-written"', '"source": 3')
    change(checkout.template("product"), 'checked: "2026-11-02"', 'checked: "2025-11-02"')
    status, out, _ = command(checkout, "--format", "editor", "--today", "2026-11-24")
    assert status == 1 and out.splitlines() == [
        "seeds/product.jsonl:1:72: error: source: must be a text, not 3",
        'templates/product.yaml:16:5: warning: answers.default.checked: not checked since "2025-11-02", over a '
        "year ago; verify the answer, then write today's date",
    ]


def test_a_warning_alone_fails_nothing(checkout):
    change(checkout.template("product"), 'checked: "2026-11-02"', 'checked: "2025-11-02"')
    status, out, err = command(checkout, "--today", "2026-11-24")
    assert status == 0 and out.startswith("sound: ") and err.startswith("warning: templates/product.yaml:16: ")


def test_a_broken_params_file_is_told_beside_all_else(checkout):
    change(checkout.params, "profile:", "profil:")
    change(checkout.template("product"), "version: 1", "version: one")
    status, out, err = command(checkout)
    assert (status, out) == (1, "")
    assert [line.split(": ")[:2] for line in err.removeprefix("error: ").splitlines()] == [
        ["params.yaml:1", "profile"], ["params.yaml:6", "profil"], ["templates/product.yaml:5", "version"],
    ]  # fmt: skip


def test_a_training_question_that_is_a_copy_of_a_held_out_one_is_told(checkout):
    template = read_template(checkout.template("product"))
    outside = held_out(read_seeds(checkout.seeds("product"), template))
    lines = [json.loads(line) for line in checkout.seeds("product").read_text().splitlines()]
    held = next(n for n, line in enumerate(lines) if line["id"] in outside and len(line["instruction"]) > 60)
    trained = next(n for n, line in enumerate(lines) if line["id"] not in outside)
    lines[trained]["instruction"] = lines[held]["instruction"] + " x"
    checkout.seeds("product").write_text("\n".join(map(json.dumps, lines)) + "\n")
    [found] = check(checkout, "product", datetime.date(2026, 11, 24))[1]
    assert (found.line, found.severity) == (trained + 1, "warning")
    assert re.search(rf"near copy .* of the held-out question on line {held + 1}; its rows would", found.message)


# -- the schema ---------------------------------------------------------------------------------


def test_the_committed_schema_is_the_generated_one():
    committed = (ROOT / "docs" / "template.schema.json").read_text(encoding="utf-8")
    assert committed == json_schema(), "run: dmoe lint --schema > docs/template.schema.json"


@pytest.mark.parametrize("expert", ["product", "medical", "legal"])
def test_the_templates_keep_to_the_schema_and_name_it(home, expert):
    schema = json.loads(json_schema())
    jsonschema.Draft202012Validator.check_schema(schema)
    judge = jsonschema.Draft202012Validator(schema)
    raw = read_yaml(home.template(expert))
    assert list(judge.iter_errors(raw)) == []
    for wrong in ({"colour": "red"}, {"answers": {"Default": {}}}, {"language": "de"}, {"dedup": {"instruction": 900}}):
        assert list(judge.iter_errors({**raw, **wrong}))
    assert (
        home.template(expert).read_text().startswith("# yaml-language-server: $schema=../docs/template.schema.json\n")
    )


def test_every_key_of_the_schema_explains_itself():
    schema = json.loads(json_schema())
    for kind in (schema, *schema["$defs"].values()):
        assert all(value.get("description") for value in kind["properties"].values())
