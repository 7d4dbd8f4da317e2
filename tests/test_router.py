"""Who answers: keywords, then what was fitted of each expert, then the base; later turns stay or change."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from factory.embed import Encoder, find_encoder
from factory.errors import UserError
from factory.paths import Home
from factory.routing import BUCKETS, WORDS, Joint, Routing, View, buckets, read_routing, write_routing
from factory.schema import ROWS, read_rows
from factory.seeds import read_seeds
from factory.store import read_yaml
from factory.template import read_template
from serve.market import Installed
from serve.router import make_router, over, route

ROOT = Path(__file__).parents[1]


def expert(name, keywords, not_keywords=(), **more):
    return Installed(name, f"{name}_expert", "tiny", None, 1.0, list(keywords), list(not_keywords), **more)


ROUTER = make_router(
    [
        expert("red", ["rose", "fire engine"], ["rose tinted"]),
        expert("blue", ["sky", "fire"]),
        expert("odd", ["can't fly"]),
    ]
)


@pytest.mark.parametrize(
    ("text", "chosen", "reason"),
    [
        ("What ROSE is this?", "red", "keywords: rose"),
        ("Is the rose's stem green?", "red", "keywords: rose"),
        ("It rosé up, prosely", None, "no keyword"),
        ("a rose-coloured thing", "red", "keywords: rose"),
        ("a rose-tinted view", None, "vetoed: red (not: rose tinted)"),
        ("rose and sky", None, "tie: blue, red"),
        ("a fire   engine!", "red", "keywords: fire engine"),
        ("rose tinted sky", "blue", "keywords: sky"),
        ("it can\u2019t fly", "odd", "keywords: can't fly"),
        ("", None, "no keyword"),
    ],
)
def test_keywords_choose_at_word_boundaries_and_say_why(text, chosen, reason):
    found = route(ROUTER, text)
    assert (found.expert, found.reason) == (chosen, reason)


# -- what was fitted of an expert -------------------------------------------------------------------


def fitted(shift=0.0, names=(), **joint):
    """A routing by words alone, which likes `names` (of one direction) and dislikes all else."""
    weights = np.zeros((1, BUCKETS), np.float16)
    weights[0, buckets(" ".join(names))] = 10
    numbers = {"words": 1.0, "meaning": 0.0, "bias": shift, "threshold": 3.0, "threshold_hit": 0.0} | joint
    return Routing({WORDS: View(weights, np.float32([-5]), np.zeros(0, np.float32))}, {WORDS: Joint(**numbers)})


def router_of(tmp_path, **known):
    """A router over experts with one keyword, `key<name>`, and one negative, `not<name>`."""
    made = []
    for name, routing in known.items():
        path = tmp_path / f"{name}.safetensors"
        write_routing(path, routing)
        made.append(expert(name, [f"key{name}"], [f"not{name}"], routing=path))
    return make_router(made)


def test_meaning_chooses_where_no_keyword_is_and_a_veto_still_bars(tmp_path):
    router = router_of(tmp_path, red=fitted(names=["crimson", "petals"]))
    found = route(router, "crimson petals")
    assert found.expert == "red" and found.reason.startswith("words: ") and found.explain()["margin"] is None
    assert route(router, "crimson petals notred").expert is None
    below = route(router, "what is the time")
    assert below.expert is None and below.reason.startswith("none is near enough: red ")


def test_a_keyword_asks_for_less_but_is_not_blind(tmp_path):
    assert route(router_of(tmp_path, red=fitted(shift=6.0)), "keyred").reason == "keywords: keyred"
    assert route(router_of(tmp_path, red=fitted(shift=6.0)), "hello").expert is None
    assert route(router_of(tmp_path, red=fitted(shift=-6.0)), "keyred").expert is None


def test_the_one_furthest_above_its_threshold_answers(tmp_path):
    router = router_of(tmp_path, red=fitted(names=["petals"]), blue=fitted(names=["petals"], shift=2.0))
    found = route(router, "petals").explain()
    assert found["expert"] == "blue" and found["margin"] == pytest.approx(2.0, abs=0.01)
    assert [one["expert"] for one in found["scores"]] == ["blue", "red"] and found["threshold"] == 3.0
    json.dumps(found)


def test_one_whose_keyword_was_said_goes_before_one_further_above_without(tmp_path):
    router = router_of(tmp_path, red=fitted(shift=6.0), blue=fitted(names=["petals"], shift=6.0))
    found = route(router, "petals keyred").explain()
    assert found["expert"] == "red" and found["reason"] == "keywords: keyred" and found["margin"] < 0
    assert route(router, "petals keyred notred").expert == "blue"
    below = router_of(tmp_path, red=fitted(shift=-6.0), blue=fitted(names=["petals"], shift=6.0))
    assert route(below, "petals keyred").expert == "blue"


def test_an_expert_fitted_with_another_encoder_is_told_by_words(tmp_path):
    path = tmp_path / "red.safetensors"
    write_routing(path, fitted(names=["petals"]))
    axes = Encoder("static", "f" * 64, lambda texts: np.ones((len(texts), 8), np.float32))
    assert route(make_router([expert("red", ["x"], routing=path)], axes), "petals").expert == "red"


def test_an_expert_that_is_not_routed_is_never_chosen(tmp_path):
    assert route(make_router([expert("red", ["rose"], routed=False)]), "a rose").expert is None


@pytest.mark.parametrize(("telling", "kept"), [((0, 64), 16), ((2, 8), 64)])
def test_the_first_look_at_many_experts_keeps_those_with_a_keyword_and_the_near(telling, kept):
    rng = np.random.default_rng(0)
    places = {f"e{i}": rng.normal(size=8).astype(np.float32) for i in range(200)}
    places = {name: place / np.linalg.norm(place) for name, place in places.items()}
    read = lambda texts: np.stack([places.get(text.split()[0], places["e0"]) for text in texts])  # noqa: E731
    encoder = Encoder("static", "f" * 64, read, telling, kept)
    known = {}
    for name, place in places.items():
        own = fitted(threshold=5.0, encoder="static", digest="f" * 64, words=0.0, meaning=1.0)
        view = View((10 * place[None]).astype(np.float16), np.float32([0]), place)
        known[name] = Routing(
            own.views | {"static": view}, {WORDS: fitted().joints[WORDS], "static": own.joints[WORDS]}
        )
    router = over({("keyed",): ["e7"]}, {}, known, encoder)
    assert all(route(router, name).expert == name for name in places)
    assert "e7" in [score.expert for score in route(router, "e7 keyed").scores]


BROKEN = {
    "nothing": lambda path, whole: path.write_bytes(b""),
    "cut off": lambda path, whole: path.write_bytes(whole[:-7]),
    "a header that claims more than there is": lambda path, whole: path.write_bytes(b"\xff" * 7 + b"\x00" + whole[8:]),
    "no number": lambda path, whole: write_routing(path, with_view(bias=np.float32([np.nan]))),
    "another shape": lambda path, whole: write_routing(path, with_view(weights=np.zeros((1, 9), np.float16))),
    "another kind": lambda path, whole: write_routing(path, with_view(bias=np.float64([0]))),
    "too few biases": lambda path, whole: write_routing(path, with_view(bias=np.zeros(0, np.float32))),
    "a threshold that is no number": lambda path, whole: write_routing(path, fitted(threshold=float("inf"))),
    "a text for a number": lambda path, whole: write_routing(path, fitted(threshold="3")),
    "no metadata": lambda path, whole: save_file({"words.bias": np.float32([0])}, path),
    "no words": lambda path, whole: write_routing(path, Routing({}, {})),
    "too large": lambda path, whole: path.write_bytes(whole + bytes(17 << 20)),
    "no file": lambda path, whole: path.unlink(),
}


def with_view(**parts):
    own = fitted()
    return Routing({WORDS: replace(own.views[WORDS], **parts)}, own.joints)


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_no_routing_is_refused_in_one_line(tmp_path, name):
    path = tmp_path / "route.safetensors"
    write_routing(path, fitted())
    BROKEN[name](path, path.read_bytes())
    with pytest.raises(UserError, match="is no routing of an expert: ") as told:
        read_routing(path)
    assert len(str(told.value).splitlines()) == 2 and "\n  then run: dmoe fit" in str(told.value)


# -- turns --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("turns", "chosen"),
    [
        (["which rose is it?", "and in winter?"], "red"),
        (["which rose is it?", "tell me about it"], None),
        (["which rose is it?", "is it tall?", "does it smell?"], "red"),
        (["which rose is it?", "what is the time", "is it late?"], None),
        (["which rose is it?", "is the sky blue"], "blue"),
        (["which rose is it?", "and rose tinted ones?"], None),
        (["hello", "and that?"], None),
        ([], None),
    ],
)
def test_a_later_turn_stays_where_it_points_back_and_begins_anew_where_it_does_not(turns, chosen):
    found = route(ROUTER, turns)
    assert found.expert == chosen
    assert found.stayed == (chosen == "red") and ("stays with red" in found.reason) == found.stayed


# -- the built experts --------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "least", "most"), [("static", 0.84, 0.03), ("minilm", 0.95, 0.02)])
def test_the_built_experts_get_their_held_out_questions_and_few_everyday_ones(name, least, most):
    """Floors below what benchmarks/route.py finds: a change that breaks the router falls through them."""
    home, names = Home(ROOT), ("product", "medical", "legal")
    files = {name: home.expert(name, "route.safetensors") for name in names}
    held = {name: home.dataset(name, "holdout.parquet") for name in names}
    place = home.table if name == "static" else home.minilm
    if not all(path.exists() for path in (place, *files.values(), *held.values())):
        pytest.skip("not built; run: make encoder, then dvc repro")
    declared = {name: read_template(home.template(name)).declaration.route for name in names}
    asked = [(row["instruction"], n) for n in names for row in read_rows(held[n], ROWS, "dvc repro")]
    everyday = [seed.instruction for seed in read_seeds(home.general, None)]
    known = [expert(n, declared[n].keywords, declared[n].not_keywords, routing=files[n]) for n in names]
    router = make_router(known, at_once(find_encoder(home, name), [*(text for text, _ in asked), *everyday]))
    right = [route(router, text).expert == wanted for text, wanted in asked]
    taken = [route(router, text).expert is not None for text in everyday]
    assert np.mean(right) > least and np.mean(taken) < most
    told = read_yaml(ROOT / "tests" / "routes.yaml")
    talks = [one for kind in ("stays", "changes") for one in told[kind]]
    assert np.mean([(route(router, one["turns"]).expert or "base") == one["now"] for one in talks]) > 0.8


def at_once(encoder, texts):
    """The same encoder, which has read `texts` in one go: a model is many times quicker so."""
    kept = dict(zip(texts, encoder.encode(texts), strict=True))
    return replace(
        encoder, encode=lambda asked: np.stack([kept[t] if t in kept else encoder.encode([t])[0] for t in asked])
    )
