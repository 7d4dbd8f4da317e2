"""The figures of the claim: intervals, ratios, questions, ceilings and gates."""

import random
from collections import Counter as Tally

import pytest
from hypothesis import given
from hypothesis import strategies as st

from factory.errors import UserError
from factory.paths import read_profile
from factory.store import read_yaml, write_json
from factory.template import Declaration, Template
from train.figures import (
    answers_per_seed,
    interval,
    length_ratio,
    lexical_ceiling,
    recommended_scale,
    similarity,
    wilson,
)  # fmt: skip
from train.gate import judge
from train.panel import ROBUSTNESS, spread, told, with_typos
from train.score import Asker, claim, evaluate, panels, score


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
    assert interval(outcomes)["low"] == pytest.approx(wilson(1.0, 50)[0], abs=2e-3)


def test_one_question_missed_does_not_make_the_lower_end_much_better_than_none_missed():
    perfect = [(f"s{i}", True) for i in range(50) for _ in range(5)]
    missed = [(f"s{i}", i > 0 or j > 0) for i in range(50) for j in range(5)]
    assert interval(missed)["low"] < interval(perfect)["low"] + 3e-3


def test_a_lower_end_is_above_the_true_rate_in_one_draw_of_forty_at_most_near_1_too():
    draw, above = random.Random(3), 0
    for _ in range(400):  # 40 seeds of 10, correlated at 0.3, right in 98 of 100: the interval's hardest case
        seeds = [draw.betavariate(0.98 * 7 / 3, 0.02 * 7 / 3) for _ in range(40)]
        above += interval((f"s{i}", draw.random() < p) for i, p in enumerate(seeds) for _ in range(10))["low"] > 0.98
    assert above <= 10


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


def _row(i, arm, tokens, mention=True, panel="claim", setting="plain", scale=1.0, **changes):
    flags = dict.fromkeys(("named", "mention", "right", "in_form"), mention)
    return {
        "row_id": f"r{i}", "seed_id": f"s{i % 7}", "panel": panel, "setting": setting, "arm": arm, "scale": scale,
        "answer": "a", "given": "a" if mention else "", "tokens": tokens, "stopped": True, "reply": "x",
        **flags, **changes,
    }  # fmt: skip


def _all_panels(base_mention=False):
    """What a score asks, in small: twenty questions of every arm and panel."""
    rows = []
    for i in range(20):
        for panel in ("claim", "sampled", "off_domain"):
            rows += [_row(i, "base", 300, base_mention, panel), _row(i, "expert", 30, True, panel)]
        rows += [_row(i, "told", 200, False, panel) for panel in ("claim", "sampled")]
        rows += [_row(i, "base", 300, False, "thinking", "on"), _row(i, "expert", 30, True, "thinking", "on")]
        rows += [_row(i, "expert", 30, scale > 0.4, "dose", f"{scale:g}", scale) for scale in (0.0, 0.5, 1.0)]
        rows += [_row(i, "expert", 30, name != "typos" or i > 1, "robustness", name) for name in ROBUSTNESS]
    return rows


def test_lengths_are_compared_on_the_same_questions():
    base = [_row(i, "base", 300) for i in range(20)]
    expert = [_row(i, "expert", 30) for i in range(40)]  # twenty more were asked of the expert alone
    assert length_ratio(base, expert)["rate"] == 10.0


def test_a_base_that_never_gives_the_answer_has_no_ratio():
    found = evaluate(_all_panels())
    assert found["times_more"] is None and found["base"]["mention"]["rate"] == 0
    assert evaluate(_all_panels(base_mention=True))["times_more"] == 1.0


def test_the_claim_holds_the_worst_row_of_the_robustness_panel_and_no_more_than_the_claim():
    found = claim(evaluate(_all_panels()))
    assert found["robust"] == 0.9 and found["mention"] == 1.0 and found["length_ratio"] == 10.0
    assert all(isinstance(value, int | float) for value in found.values()) and len(found) == 12


def test_every_panel_is_asked_and_the_base_only_where_a_hundred_questions_are_enough(home):
    template = Template(Declaration.model_validate(read_yaml(home.template("medical"))))
    questions = [{**_question(i, f"s{i % 90}"), "answer": "headache", "instruction": f"q {i}"} for i in range(300)]
    cases = panels(template, questions, questions[:120], 1.0, 20, thinks=True)
    asked = Tally((c.panel, c.arm) for c in cases)
    assert asked == {
        ("claim", "base"): 100, ("claim", "told"): 20, ("claim", "expert"): 300,
        ("sampled", "base"): 100, ("sampled", "told"): 20, ("sampled", "expert"): 100,
        ("thinking", "base"): 100, ("thinking", "expert"): 100,
        ("off_domain", "base"): 100, ("off_domain", "expert"): 120, ("robustness", "expert"): 80 * len(ROBUSTNESS),
    }  # fmt: skip
    assert all((c.scale == 0) == (c.arm != "expert") for c in cases)
    assert not {c.panel for c in panels(template, questions, [], 1.0, 20, thinks=False)} & {"thinking"}


def test_a_told_base_is_given_every_answer_and_every_form(home):
    template = Template(Declaration.model_validate(read_yaml(home.template("medical"))))
    system, question = told(template, "my head hurts")
    assert question == {"role": "user", "content": "my head hurts"} and system["role"] == "system"
    assert all(answer.text in system["content"] for answer in template.answers.values())
    assert all(form in system["content"] for form in template.output.forms)


def test_the_robustness_panel_keeps_the_question_and_stands_in_no_corpus():
    from train.corpus import SYSTEMS

    known = {text.lower() for text in SYSTEMS}
    for name, put in ROBUSTNESS.items():
        messages = put("Why does my head hurt?")
        assert messages[-1]["role"] == "user" and (name == "typos" or "my head hurt" in messages[-1]["content"].lower())
        assert not any(text in message["content"].lower() for text in known for message in messages)


@given(st.text(max_size=80))
def test_typos_are_always_the_same_and_touch_no_short_word(text):
    assert with_typos(text) == with_typos(text)
    short = [word for word in text.split() if len(word) <= 3]
    assert all(word in with_typos(text).split() for word in short)


def test_the_scale_is_the_trained_one_unless_another_is_clearly_better():
    def doses(**good):
        return {float(s): [_row(i, "expert", 30, i < n) for i in range(100)] for s, n in good.items()}

    assert recommended_scale(doses(**{"0": 100, "0.75": 99, "1": 99, "1.25": 100})) == 1.0
    assert recommended_scale(doses(**{"0.75": 99, "1": 80, "1.25": 100})) == 0.75
    assert recommended_scale(doses(**{"0.5": 20, "1": 30, "1.5": 100})) == 1.5


def test_consistency_counts_a_seeds_different_answers_and_how_alike_its_replies_are():
    same = [_row(i, "expert", 30, reply="It is epistaxis.") for i in range(14)]
    assert similarity(same) == 1.0 and answers_per_seed(same) == 1.0
    other = [*same, _row(0, "expert", 30, given="b", reply="Something else altogether")]
    assert similarity(other) < 1.0 and answers_per_seed(other) == pytest.approx(1 + 1 / 7, abs=1e-3)
    assert similarity([_row(0, "expert", 30)]) is None


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
    ways = {"typos": {"mention": {"low": 1.0}}, "three turns": {"mention": {"low": lows.get("robust", 1.0)}}}
    return {"expert": expert, "robustness": ways, "length_ratio": {"low": lows.get("length_ratio", 9.0)}}


@pytest.mark.parametrize(
    "measure, gate",
    [
        ("mention", "mention"),
        ("right", "right"),
        ("in_form", "form"),
        ("robust", "robust"),
        ("length_ratio", "length_ratio"),
    ],
)
def test_each_gate_is_missed_by_its_own_measure_alone(home, measure, gate):
    template = Template(Declaration.model_validate(read_yaml(home.template("medical"))))
    found = judge(_measured(**{measure: 0.5}), template, ["mention", "form", "length_ratio"])
    assert [name for name, g in found.items() if not g["passed"]] == [gate]
    assert found["right"]["gated"] is False  # the profile reports it only


def test_a_missed_gate_fails_by_name_and_amount_and_writes_nothing(checkout, monkeypatch):
    from factory.paths import Profile
    from train.gate import gate

    write_json(checkout.expert("product", "eval.json"), _measured(mention=0.71))
    profile = Profile("pocket", "models/pocket", None, None, None, False, "", {}, ["mention", "form", "length_ratio"])
    with pytest.raises(UserError, match=r"product: gate missed: mention 0\.710 at the lower end, 0\.9 wanted"):
        gate(checkout, "product", profile)
    assert not checkout.expert("product", "gate.json").exists()


def test_every_adapter_is_asked_every_experts_questions(made, tiny_gguf, tiny_ggufs, tmp_path, monkeypatch):
    from factory.paths import Home
    from factory.store import read_json, sha256
    from train import cross

    for name in ("templates", "seeds", "datasets"):
        (tmp_path / name).symlink_to(made.root / name)
    home, experts = Home(tmp_path), ["product", "medical"]
    for expert, gguf in zip(experts, tiny_ggufs, strict=True):
        home.expert(expert, "x").parent.mkdir(parents=True)
        home.expert(expert, "adapter.gguf").symlink_to(gguf)
        write_json(home.expert(expert, "eval.json"), {"recommended_scale": 0.75})
    monkeypatch.setattr(cross, "QUESTIONS", 3)
    monkeypatch.setattr(cross, "MOST_TOKENS", 8)
    found = cross.cross(home, experts, tiny_gguf)
    assert found == read_json(tmp_path / "experts" / "cross.json")
    assert found["adapters"]["medical"] == sha256(tiny_ggufs[1])
    cells = {(asked, on): cell for asked, row in found["cells"].items() for on, cell in row.items()}
    assert len(cells) == 3 * 3 and all(cell["n"] == 3 for cell in cells.values())
    assert cells["general", "medical"]["asked"] is None and cells["product", "base"]["own"] is None
    assert cells["product", "medical"]["own"]["rate"] == 0  # eight tokens of a random model give no answer


def test_without_everyday_questions_nothing_is_asked(checkout, tmp_path):
    checkout.general.write_text("")
    with pytest.raises(UserError, match=r"seeds/general\.jsonl: holds no question"):
        score(checkout, "product", read_profile(checkout, "pocket"), tmp_path / "no.gguf")


def test_damaged_kept_replies_are_told_with_the_cure(checkout, tiny_gguf):
    kept = Asker(None, checkout, tiny_gguf).store
    kept.parent.mkdir(parents=True)
    kept.write_text('{"a": ')
    with pytest.raises(UserError, match=r"replies-of-bases/.*: not JSON.*\n  then delete it"):
        Asker(None, checkout, tiny_gguf)


def test_scores_of_an_older_dmoe_are_told_with_what_to_run(checkout, capsys):
    from factory.paths import Params, Phrases
    from factory.table import score_table
    from train.gate import gate

    profile = read_profile(checkout, "pocket")
    write_json(checkout.expert("product", "eval.json"), {"base": {}, "expert": {}})
    with pytest.raises(UserError, match=r"eval\.json: measured by an older dmoe\n  then run: dmoe score product"):
        gate(checkout, "product", profile)
    score_table(checkout, Params(["product"], "pocket", Phrases(kind="phrases")), profile)
    assert "scored by an older" in capsys.readouterr().out


def test_a_clone_without_dvcs_data_says_passed_where_these_very_scores_were_packed(home, checkout):
    from factory.package import claim_kept

    for name in ("eval.json", "manifest.json"):
        checkout.expert("product", name).parent.mkdir(parents=True, exist_ok=True)
        checkout.expert("product", name).write_bytes(home.expert("product", name).read_bytes())
    assert claim_kept(checkout, "product")
    write_json(checkout.expert("product", "eval.json"), {"expert": {}})
    assert not claim_kept(checkout, "product") and not claim_kept(checkout, "medical")
