"""Who answers: keywords, then what was fitted of each expert, then the base; later turns stay or change."""

import pytest

from serve.market import Installed
from serve.router import make_router, route


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
