"""Near copies: the same as comparing all pairs, and never across answers or against the split."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rapidfuzz import fuzz, process
from rapidfuzz.distance import LCSseq
from rapidfuzz.utils import default_process

from factory import blocking, dedup
from factory.dedup import Copy, Item, alike, copies, fall

WORDS = st.sampled_from(
    ["my", "head", "Head,", "hand", "hurts", "aches", "a", "for", "college", "colleges", "What?", "it's", "\u00fc", "!"]
)
ITEMS = st.lists(
    st.tuples(st.sampled_from("xyz"), st.lists(WORDS, max_size=7).map(" ".join), st.booleans()), max_size=25
).map(lambda found: [Item(f"r{i}", answer, text, held) for i, (answer, text, held) in enumerate(found)])
THRESHOLDS = st.sampled_from([50, 75, 90, 97, 100])


@pytest.fixture(autouse=True, scope="module", params=["all pairs", "by the index"])
def way(request):
    """Every test goes both ways: as a few rows do, and as many do, in blocks and tiles small enough to be crossed."""
    names = [(dedup, "SOME", 0), (dedup, "BLOCK", (2, 4)), (blocking, "TILE", (2, 3)), (blocking, "BATCH", 4)]
    names += [(blocking, "DENSE", 1), (blocking, "MANY", 2)]
    saved = [getattr(module, name) for module, name, _ in names]
    for module, name, value in names if request.param == "by the index" else ():
        setattr(module, name, value)
    yield
    for (module, name, _), value in zip(names, saved, strict=True):
        setattr(module, name, value)


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


@settings(deadline=None, max_examples=200)
@given(ITEMS, st.integers(50, 90), st.integers(0, 50))
def test_pairs_kept_at_a_floor_answer_every_threshold_above_it(items, floor, more):
    threshold = min(100, floor + more)
    assert fall(items, alike(items, floor), threshold) == copies(items, threshold)


@settings(deadline=None)
@given(ITEMS, THRESHOLDS)
def test_pairs_come_in_the_order_of_their_rows_and_each_once(items, floor):
    pairs = list(zip(*(part.tolist() for part in alike(items, floor)), strict=True))
    order = sorted(range(len(items)), key=lambda i: not items[i].held_out)
    assert pairs == sorted(pairs, key=lambda pair: (order.index(pair[0]), order.index(pair[1])))
    assert len({pair[:2] for pair in pairs}) == len(pairs)
    assert all(order.index(i) > order.index(j) and items[i].answer == items[j].answer for i, j, _ in pairs)


def test_a_further_row_of_a_text_falls_to_the_likest_row_kept_until_then():
    a, b, c = "abcdefghijklmnopqrst", "abcdefghijklmnopqr", "abcdefghijklmnopq"
    items = [Item(str(i), "x", text, False) for i, text in enumerate((a, b, c, b))]
    found = copies(items, 92)
    assert (found["1"].like, found["3"].like) == ("0", "2") and found["3"].score > found["1"].score


# -- the index itself ---------------------------------------------------------------------------

LONG = st.lists(st.sampled_from(["a", "bb", "abc ", "the ", "\u00fc", "x" * 70]), max_size=60).map("".join)
EDITED = st.tuples(LONG, st.lists(st.tuples(st.integers(0, 300), st.sampled_from("abz ")), max_size=9)).map(
    lambda made: [made[0], "".join([made[0][: made[1][0][0]], *(c for _, c in made[1])]) if made[1] else made[0]]
)
ANY = st.lists(st.one_of(EDITED, st.text(max_size=9).map(lambda t: [t])), max_size=9).map(lambda ts: sum(ts, []))


def _brute(texts, left, right, cutoff):
    return {
        (min(i, j), max(i, j)): np.float32(fuzz.ratio(texts[i], texts[j]))
        for i in left for j in right if i != j and fuzz.ratio(texts[i], texts[j]) >= cutoff
    }  # fmt: skip


def _as_dict(pairs):
    found = {(min(i, j), max(i, j)): score for i, j, score in zip(*pairs, strict=True)}
    assert len(found) == len(pairs.left), "a pair came twice"
    return found


@settings(deadline=None, max_examples=100)
@given(ANY, st.integers(50, 100))
def test_the_index_finds_the_pairs_of_a_comparison_of_all(texts, cutoff):
    everything = range(len(texts))
    found = blocking.pairs(blocking.read(texts), np.arange(len(texts)), None, cutoff)
    assert _as_dict(found) == _brute(texts, everything, everything, cutoff)


@settings(deadline=None, max_examples=100)
@given(ANY, st.integers(50, 100), st.integers(1, 4))
def test_the_index_finds_the_pairs_between_two_sets(texts, cutoff, step):
    left = list(range(0, len(texts), step + 1))
    right = [i for i in range(len(texts)) if i not in left]
    found = blocking.pairs(blocking.read(texts), np.array(left, int), np.array(right, int), cutoff)
    assert _as_dict(found) == _brute(texts, left, right, cutoff)


@pytest.mark.parametrize("threshold", range(50, 101))
def test_a_pair_that_just_reaches_the_threshold_is_not_lost_by_rounding(threshold):
    """Lengths m + n = 200: each edit is worth half a point. Whether 92.99999999999999 is 93 is for rapidfuzz to say."""
    kept = threshold
    texts = ["a" * 100, "a" * kept + "b" * (100 - kept), "a" * (kept - 1) + "b" * (101 - kept)]
    scores = process.cdist(texts, texts, scorer=fuzz.ratio, score_cutoff=threshold, dtype=np.float32)
    found = _as_dict(blocking.pairs(blocking.read(texts), np.arange(3), None, threshold))
    assert found == {(i, j): scores[i, j] for i in range(3) for j in range(i + 1, 3) if scores[i, j] >= threshold}
    assert (0, 2) not in found


def test_more_bits_than_are_tested_and_more_than_255_of_a_character_lose_no_pair():
    texts = ["e" * 900 + "abc" * 40, "e" * 980 + "abc" * 40, "z" * 1020]
    found = _as_dict(blocking.pairs(blocking.read(texts), np.arange(3), None, 90))
    assert set(found) == {(0, 1)}


def test_an_index_that_allows_one_edit_less_loses_pairs(monkeypatch):
    real = blocking._survivors

    def stricter(lacking, having, allowed, space):
        return real(lacking, having, np.maximum(allowed, 1) - 1, space)

    monkeypatch.setattr(blocking, "DENSE", 1)
    texts = ["abcdefghij" * 4, "abcdefghij" * 3 + "zabcdefghy", "other"]
    assert len(blocking.pairs(blocking.read(texts), np.arange(3), None, 95).left) == 1
    monkeypatch.setattr(blocking, "_survivors", stricter)
    assert len(blocking.pairs(blocking.read(texts), np.arange(3), None, 95).left) == 0


# -- with numba ---------------------------------------------------------------------------------


@pytest.fixture
def fused(monkeypatch):
    """What numba compiled, used for the fewest texts."""
    pytest.importorskip("numba", reason="numba is not installed: pip install '.[data]'")
    monkeypatch.setattr(blocking, "LOTS", 0)
    assert blocking._fused(1) is not None


@settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(ANY, st.integers(50, 100))
def test_numba_finds_the_pairs_of_a_comparison_of_all(fused, texts, cutoff):
    everything = range(len(texts))
    found = blocking.pairs(blocking.read(texts), np.arange(len(texts)), None, cutoff)
    assert _as_dict(found) == _brute(texts, everything, everything, cutoff)


@pytest.mark.parametrize("threshold", range(50, 101))
def test_numba_loses_no_pair_at_the_threshold(fused, threshold):
    test_a_pair_that_just_reaches_the_threshold_is_not_lost_by_rounding(threshold)


def test_numba_finds_in_many_texts_what_numpy_finds(fused, monkeypatch):
    """Enough texts for whole steps of columns and for what is left of them."""
    rng = np.random.default_rng(1)
    texts = ["".join(rng.choice(list("abcdefgh "), size)) for size in rng.integers(30, 140, 300)]
    texts += [text[:k] + "z" + text[k + n :] for text in texts for k, n in ((3, 0), (9, 4), (20, 9))]
    numbers = blocking.read(texts)
    by_numba = _as_dict(blocking.pairs(numbers, np.arange(len(texts)), None, 90))
    monkeypatch.setattr(blocking, "LOTS", len(texts))
    assert by_numba == _as_dict(blocking.pairs(numbers, np.arange(len(texts)), None, 90)) and len(by_numba) > 300


@pytest.mark.parametrize("size", [0, 1, 63, 64, 65, 128, 200])
def test_the_common_characters_that_numba_counts_are_those_of_rapidfuzz(fused, size):
    rng = np.random.default_rng(size)
    texts = ["".join(rng.choice(list("abcd"), n)) for n in (size, 70, 3, 130, size)]
    read, i = blocking.read(texts), np.arange(5)
    for j in range(5):
        found = blocking._load().common(read.kinds, read.starts, i, np.full(5, j))
        assert found.tolist() == [LCSseq.similarity(text, texts[j]) for text in texts]
