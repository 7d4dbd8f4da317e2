"""The figures of the claim: intervals, ratios, questions, ceilings and gates."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from factory.errors import UserError
from factory.store import read_yaml
from factory.template import Declaration, Template
from train.gate import judge
from train.score import evaluate, interval, length_ratio, lexical_ceiling, spread, wilson


def test_wilson_agrees_with_the_textbook():
    low, high = wilson(0.9, 100)
    assert (round(low, 4), round(high, 4)) == (0.8256, 0.9448)


def test_outcomes_that_differ_within_seeds_count_each_for_itself():
    outcomes = [(f"s{i}", j < 4) for i in range(50) for j in range(5)]  # every seed 4 of 5: no variance between seeds
    assert interval(outcomes)["low"] == pytest.approx(wilson(0.8, 250)[0], abs=1e-4)


def test_outcomes_that_agree_within_seeds_count_as_one_draw_a_seed():
    outcomes = [(f"s{i}", i < 40) for i in range(50) for _ in range(5)]
    assert interval(outcomes)["low"] == pytest.approx(wilson(0.8, 50)[0], abs=0.01)


def test_a_perfect_score_counts_seeds_and_not_questions():
    outcomes = [(f"s{i}", True) for i in range(50) for _ in range(5)]
    assert interval(outcomes)["low"] == pytest.approx(wilson(1.0, 50)[0], abs=1e-4)


@given(st.lists(st.tuples(st.sampled_from("abcdefgh"), st.booleans()), min_size=1))
def test_an_interval_holds_its_rate_and_stays_between_0_and_1(outcomes):
    found = interval(outcomes)
    assert 0 <= found["low"] <= found["rate"] + 1e-4 and found["rate"] - 1e-4 <= found["high"] <= 1


def _question(i, seed):
    return {"row_id": f"r{i:03}", "seed_id": seed}


def test_questions_are_taken_from_all_seeds_in_turn():
    questions = [_question(i, f"s{i // 10}") for i in range(100)]
    chosen = spread(questions, 20)
    assert len(chosen) == 20 and {q["seed_id"] for q in chosen} == {f"s{i}" for i in range(10)}
    assert spread(questions, 500) == questions


def _row(i, arm, tokens, mention=True):
    flags = dict.fromkeys(("named", "mention", "right", "in_form"), mention)
    return {
        "row_id": f"r{i}",
        "seed_id": f"s{i % 7}",
        "arm": arm,
        "tokens": tokens,
        "stopped": True,
        "reply": "x",
        **flags,
    }


def test_lengths_are_compared_on_the_same_questions():
    base = [_row(i, "base", 300) for i in range(20)]
    expert = [_row(i, "expert", 30) for i in range(40)]  # twenty more were asked of the expert alone
    assert length_ratio(base, expert)["rate"] == 10.0


def test_a_base_that_never_gives_the_answer_has_no_ratio():
    rows = [_row(i, "base", 300, mention=False) for i in range(20)] + [_row(i, "expert", 30) for i in range(20)]
    found = evaluate(rows)
    assert found["times_more"] is None and found["base"]["mention"]["rate"] == 0


def test_the_lexical_ceiling_is_learnt_from_words_alone():
    def rows(*pairs):
        return [{"instruction": text, "answer": answer} for text, answer in pairs]

    training = rows(
        ("my nose bleeds", "nose"), ("blood from my nose", "nose"), ("my head hurts", "head"), ("a sore head", "head")
    )
    assert lexical_ceiling(training, rows(("the nose is bleeding", "nose"), ("head ache", "head"))) == 1.0
    assert lexical_ceiling(training, rows(("the nose is bleeding", "head"))) == 0.0


def _measured(**lows):
    expert = {name: {"low": lows.get(name, 1.0)} for name in ("mention", "right", "in_form")}
    return {"expert": expert, "length_ratio": {"low": lows.get("length_ratio", 9.0)}}


@pytest.mark.parametrize(
    "measure, gate", [("mention", "mention"), ("right", "right"), ("in_form", "form"), ("length_ratio", "length_ratio")]
)
def test_each_gate_is_missed_by_its_own_measure_alone(home, measure, gate):
    template = Template(Declaration.model_validate(read_yaml(home.template("medical"))))
    found = judge(_measured(**{measure: 0.5}), template, ["mention", "form", "length_ratio"])
    assert [name for name, g in found.items() if not g["passed"]] == [gate]
    assert found["right"]["gated"] is False  # the profile reports it only


def test_a_missed_gate_fails_by_name_and_amount_and_writes_nothing(checkout, monkeypatch):
    from factory.paths import Profile
    from factory.store import write_json
    from train.gate import gate

    write_json(checkout.expert("product", "eval.json"), _measured(mention=0.71))
    profile = Profile("pocket", "models/pocket", None, None, "", {}, ["mention", "form", "length_ratio"])
    with pytest.raises(UserError, match=r"product: gate missed: mention 0\.710 at the lower end, 0\.8 wanted"):
        gate(checkout, "product", profile)
    assert not checkout.expert("product", "gate.json").exists()
