"""Near copies: the same as comparing all pairs, and never across answers or against the split."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rapidfuzz import fuzz
from rapidfuzz.utils import default_process

from factory.dedup import Copy, Item, copies

WORDS = st.sampled_from(
    ["my", "head", "Head,", "hand", "hurts", "aches", "a", "for", "college", "colleges", "What?", "it's", "\u00fc", "!"]
)
ITEMS = st.lists(
    st.tuples(st.sampled_from("xyz"), st.lists(WORDS, max_size=7).map(" ".join), st.booleans()), max_size=25
).map(lambda found: [Item(f"r{i}", answer, text, held) for i, (answer, text, held) in enumerate(found)])
THRESHOLDS = st.sampled_from([50, 75, 90, 97, 100])


def _likeness(a, b):
    return fuzz.token_sort_ratio(a.instruction, b.instruction, processor=default_process)


def _reference(items, threshold):
    """All pairs by brute force: held-out rows first, a row falls to the likest kept row of its answer."""
    kept, found = [], {}
    for item in [i for i in items if i.held_out] + [i for i in items if not i.held_out]:
        pairs = [(_likeness(item, other), other) for other in kept if other.answer == item.answer]
        score, other = max(pairs, key=lambda pair: pair[0], default=(0, None))
        if other and score >= threshold:
            found[item.row_id] = (other.row_id, score)
        else:
            kept.append(item)
    return found


@settings(deadline=None, max_examples=300)
@given(ITEMS, THRESHOLDS)
def test_the_rows_that_fall_are_those_of_a_brute_force_search(items, threshold):
    found = {row: (copy.like, pytest.approx(copy.score, abs=1e-4)) for row, copy in copies(items, threshold).items()}
    assert _reference(items, threshold) == found


@settings(deadline=None)
@given(st.lists(st.tuples(st.text(max_size=12), st.booleans()), max_size=12), THRESHOLDS)
def test_any_text_is_compared_as_by_brute_force(texts, threshold):
    items = [Item(f"r{i}", "x", text, held) for i, (text, held) in enumerate(texts)]
    assert {row: copy.like for row, copy in copies(items, threshold).items()} == {
        row: like for row, (like, _) in _reference(items, threshold).items()
    }


@settings(deadline=None)
@given(ITEMS, THRESHOLDS)
def test_no_two_rows_that_stay_are_alike_and_each_that_falls_is_like_one_that_stays(items, threshold):
    found, by_id = copies(items, threshold), {i.row_id: i for i in items}
    kept = [i for i in items if i.row_id not in found]
    for i, a in enumerate(kept):
        assert all(_likeness(a, b) < threshold for b in kept[i + 1 :] if b.answer == a.answer)
    for row, copy in found.items():
        assert copy.like not in found and by_id[copy.like].answer == by_id[row].answer
        assert copy.score >= threshold


@settings(deadline=None)
@given(ITEMS, THRESHOLDS)
def test_a_held_out_row_never_falls_to_a_training_row(items, threshold):
    by_id = {i.row_id: i for i in items}
    for row, copy in copies(items, threshold).items():
        assert by_id[copy.like].held_out or not by_id[row].held_out
        assert (copy.reason == "like_held_out") == (by_id[copy.like].held_out and not by_id[row].held_out)


@settings(deadline=None)
@given(ITEMS, THRESHOLDS)
def test_what_falls_in_an_answer_does_not_depend_on_other_answers(items, threshold):
    apart = {}
    for answer in "xyz":
        apart |= copies([i for i in items if i.answer == answer], threshold)
    assert copies(items, threshold) == apart


def test_the_held_out_row_stays_though_it_comes_last():
    items = [Item("train", "x", "my head hurts", False), Item("held", "x", "my head hurts!", True)]
    assert copies(items, 90) == {"train": Copy("like_held_out", "held", 100.0)}


def test_two_held_out_rows_are_compared_as_well():
    items = [Item("a", "x", "my head hurts", True), Item("b", "x", "My head hurts.", True)]
    assert copies(items, 90) == {"b": Copy("exact_copy", "a", 100.0)}


def test_rows_of_other_answers_are_not_compared():
    items = [Item("a", "headache", "my head hurts", True), Item("b", "sore_hand", "my head hurts", False)]
    assert copies(items, 50) == {}


def test_the_same_words_in_any_order_case_and_punctuation_are_an_exact_copy():
    items = [Item("a", "x", "My head hurts, why?", False), Item("b", "x", "why: HURTS my head", False)]
    assert copies(items, 90) == {"b": Copy("exact_copy", "a", 100.0)}


def test_the_likest_kept_row_is_told_with_its_score():
    items = [
        Item("far", "x", "my head hurts at night", False),
        Item("near", "x", "my head hurts badly today at work", False),
        Item("falls", "x", "my head hurts badly today at works", False),
    ]
    found = copies(items, 90)["falls"]
    assert (found.reason, found.like) == ("near_copy", "near")
    assert found.score == pytest.approx(_likeness(items[1], items[2]), abs=1e-4)


def test_a_row_is_not_compared_with_one_that_fell():
    a, b, c = "abcdefghijklmnopqrst", "abcdefghijklmnopqr", "abcdefghijklmnop"
    items = [Item(name, "x", text, False) for name, text in (("a", a), ("b", b), ("c", c))]
    assert _likeness(items[1], items[2]) >= 90 > _likeness(items[0], items[2])
    assert set(copies(items, 90)) == {"b"}


def test_the_threshold_itself_counts_as_alike():
    items = [Item("a", "x", "abcdefghi z", False), Item("b", "x", "abcdefghi y", False)]
    score = _likeness(*items)
    assert 90 < score < 91
    assert set(copies(items, 90)) == {"b"} and copies(items, 91) == {}


def test_a_likeness_that_is_the_threshold_to_the_digit_falls():
    items = [Item("a", "x", "abcdefghij", False), Item("b", "x", "abcdefghix", False)]
    assert _likeness(*items) == 90 and set(copies(items, 90)) == {"b"}


def test_no_rows_give_no_copies():
    assert copies([], 90) == {}
