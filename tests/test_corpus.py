"""The pocket base's corpus knows nothing of the experts, and is the same every time."""

import random
import re

import pytest

from factory.seeds import read_seeds
from factory.template import fields, read_template
from train.corpus import cores, noisy, read_bank, reply

EXPERTS = ("product", "medical", "legal")


@pytest.fixture(scope="module")
def bank(home):
    return read_bank(home.root / "models" / "pocket" / "corpus")


def _words(text):
    return " ".join(re.findall(r"[a-z0-9']+", text.lower()))


@pytest.fixture(scope="module")
def texts(bank):
    """Everything that documents are made of, and a sample of documents."""
    rng = random.Random(1)
    found = [x for t in bank for x in (*t.say, *t.advice)]
    found += [reply(rng.choice(bank), ["this", "that"], rng) for _ in range(2000)]
    return {_words(text) for text in found}


def test_the_bank_holds_hundreds_of_topics_with_a_dozen_wordings_each(bank):
    assert len(bank) >= 300 and min(len(t.say) for t in bank) >= 12 and min(len(t.advice) for t in bank) == 4


@pytest.mark.parametrize("expert", EXPERTS)
def test_no_seed_is_a_wording_of_the_corpus(home, texts, expert):
    template = read_template(home.template(expert))
    seeds = {_words(seed.instruction) for seed in read_seeds(home.seeds(expert), template)}
    assert not seeds & texts


@pytest.mark.parametrize("expert", EXPERTS)
def test_no_form_of_an_expert_stands_in_the_corpus(home, texts, expert):
    everything = " | ".join(texts)
    for form in read_template(home.template(expert)).output.forms:
        for name in fields(form):
            form = form.replace(f"{{{name}}}", "|")
        for part in form.split("|"):
            if len(part.split()) >= 4:
                assert _words(part) not in everything


def test_a_reply_names_its_topic_at_once_and_is_long(bank):
    rng = random.Random(3)
    for topic in rng.sample(bank, 40):
        text = reply(topic, ["this", "that"], rng)
        assert topic.name.lower() in text.split(".")[0].lower() and 210 < len(text.split()) < 370


def test_equal_seeds_give_equal_documents(bank):
    def made(seed):
        rng = random.Random(seed)
        return [noisy(core, rng) for core in cores(bank[0], rng, {})]

    assert made(5) == made(5) != made(6)
