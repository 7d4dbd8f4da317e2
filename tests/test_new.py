"""`dmoe new`: an expert that lint passes at once, or nothing at all."""

import datetime
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from factory import new as module
from factory.errors import Problems, UserError
from factory.lint import check
from factory.new import Wanted, keyed, new, with_expert
from factory.template import read_template

ROOT = Path(__file__).parents[1]
TODAY = datetime.date(2026, 11, 24)
COFFEE = Wanted("coffee", ["Flat White"], keywords=["coffee"], rivals=["Latte"])
TEAS = Wanted("tea", ["black=Assam: the strong one", "green=Sencha"], "Names a tea.", "kettle-desk")


def files(home):
    return {path: path.read_bytes() for path in home.root.rglob("*") if path.is_file()}


def refused(home, wanted, words):
    """Nothing may be written, and why must be told."""
    before = files(home)
    with pytest.raises(UserError, match=words):
        new(home, wanted, TODAY)
    assert files(home) == before


@pytest.mark.parametrize("wanted", [COFFEE, TEAS], ids=lambda wanted: wanted.name)
def test_a_new_expert_passes_lint_with_a_warning_for_each_placeholder(checkout, wanted):
    written = new(checkout, wanted, TODAY)
    assert [path.name for path in written] == [f"{wanted.name}.yaml", f"{wanted.name}.jsonl", "params.yaml"]
    counts, found = check(checkout, wanted.name, TODAY)
    assert {p.severity for p in found} == {"warning"} and all("placeholder" in p.message for p in found)
    assert counts["seeds"] == len(found) == 4 * len(wanted.answers) and counts["tests"] >= 3
    assert len(read_template(checkout.template(wanted.name)).answers) == len(wanted.answers)


def test_questions_that_are_given_become_the_seeds_of_their_answers(checkout):
    asked = {"black": ("work", "an early shift", "cold nights", "me"), "green": ("lunch", "a cat", "hot days", "aunts")}
    questions = [f"{key}: which tea for {use}" for key, uses in asked.items() for use in uses]
    new(checkout, Wanted("tea", TEAS.answers, seeds=questions), TODAY)
    seeds = [json.loads(line) for line in checkout.seeds("tea").read_text().splitlines()]
    assert [(s["answer"], s["instruction"]) for s in seeds] == [tuple(q.split(": ")) for q in questions]
    assert check(checkout, "tea", TODAY)[1] == []


def test_params_keeps_its_comments_and_gains_one_line(checkout):
    before = checkout.params.read_text()
    after = with_expert(before, "coffee")
    assert after == before.replace("  - legal\n", "  - legal\n  - coffee\n")


def test_awkward_texts_stay_what_they_are(checkout):
    text = 'say "no": 50% & *more* # {twice}'
    new(checkout, Wanted("odd", ["yes"], description=text, owner="null", rivals=["12:30"]), TODAY)
    made = read_template(checkout.template("odd")).declaration
    assert (made.description, made.owner, made.rivals) == (text, "null", ["12:30"])


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        (Wanted("Coffee", ["x"]), "'Coffee' is no name"),
        (Wanted("../x", ["x"]), "is no name"),
        (Wanted("general", ["x"]), "'general' is no name.*; not general, base, auto"),
        (Wanted("legal", ["x"]), "'legal' is an expert already"),
        (Wanted("legal_tax", ["x"]), "'legal_tax' and 'legal' begin alike"),
        (Wanted("leg", ["x"]), "begin alike"),
        (Wanted("coffee"), "what does it answer"),
        (Wanted("coffee", ["a=x", "a=y"]), "two answers are called 'a'"),
        (Wanted("tea", TEAS.answers, seeds=["which tea"]), "names no answer; write it as KEY: QUESTION"),
        (Wanted("coffee", ["Latte"], rivals=["latte"]), "'latte' is answer default itself"),
        (Wanted("coffee", ["Latte"], phrases=["Maybe it is good."]), "holds 'maybe' of output.never"),
        (Wanted("coffee", ["Latte"], seeds=["ask ann@example.com about it"]), "holds an e-mail address"),
    ],
)
def test_what_would_not_pass_is_told_and_nothing_is_written(checkout, wanted, words):
    refused(checkout, wanted, words)


def test_a_file_that_is_there_is_left_alone(checkout):
    checkout.seeds("coffee").write_text("mine\n")
    refused(checkout, COFFEE, "is there already")


def test_an_error_in_between_leaves_nothing(checkout, monkeypatch):
    write = module.write_text

    def full(path, text):
        if path.name == "params.yaml":
            raise UserError("no space left")
        write(path, text)

    monkeypatch.setattr(module, "write_text", full)
    refused(checkout, COFFEE, "no space left")


def test_keys_come_from_the_answers_where_none_are_given():
    assert keyed(["Flat White"]) == {"default": "Flat White"}
    assert keyed(["Flat White", "b=Tea = hot"]) == {"flat_white": "Flat White", "b": "Tea = hot"}


def test_a_new_expert_can_be_built_from_the_command_line(checkout):
    env = {**os.environ, "PYTHONPATH": str(ROOT)}

    def dmoe(*words):
        command = [sys.executable, "-m", "factory.cli", *words]
        return subprocess.run(command, cwd=checkout.root, env=env, capture_output=True, text=True)

    made = dmoe("new", "coffee", "--answer", "Flat White", "--keyword", "coffee", "--yes")
    assert made.returncode == 0 and "dmoe lint coffee\n  dmoe preview coffee" in made.stdout, made.stderr
    for stage in ("generate", "build"):
        done = dmoe(stage, "coffee")
        assert done.returncode == 0, done.stderr
    assert re.search(r"coffee: \d+ rows to train on", done.stdout)
    again = dmoe("new", "coffee", "--answer", "x", "--yes")
    assert again.returncode == 1 and "is an expert already" in again.stderr


def test_a_broken_params_file_is_told(checkout):
    checkout.params.write_text("experts: [")
    with pytest.raises(Problems, match="params.yaml"):
        new(checkout, COFFEE, TODAY)
    assert not checkout.template("coffee").exists()
