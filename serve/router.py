"""Which expert answers: keywords at word boundaries, vetoed by negative keywords, else the base."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from serve.market import Installed

WORD = re.compile(r"\w+(?:'\w+)*")
Gram = tuple[str, ...]


@dataclass(frozen=True)
class Route:
    """Who answers (None: the base) and why, in words a person can check."""

    expert: str | None
    reason: str


@dataclass(frozen=True)
class Router:
    """Word n-gram -> the experts it speaks for, and against. Looking up costs the same for any number of experts."""

    wanted: dict[Gram, list[str]]
    vetoed: dict[Gram, list[str]]
    longest: int  # words in the longest keyword


def words(text: str) -> Gram:
    """The words of a text, in lower case, without a possessive's ending; a hyphen parts words."""
    return tuple(word.removesuffix("'s") for word in WORD.findall(text.casefold().replace("\u2019", "'")))


def make_router(experts: Iterable[Installed]) -> Router:
    """A router over the experts' keywords."""
    wanted: dict[Gram, list[str]] = {}
    vetoed: dict[Gram, list[str]] = {}
    for expert in experts:
        for table, keywords in ((wanted, expert.keywords), (vetoed, expert.not_keywords)):
            for gram in {words(keyword) for keyword in keywords} - {()}:
                table.setdefault(gram, []).append(expert.name)
    return Router(wanted, vetoed, max(map(len, [*wanted, *vetoed]), default=0))


def route(router: Router, turns: str | Sequence[str]) -> Route:
    """The expert whose keywords cover most words of the last turn; the base on none, on a veto or on a tie."""
    text_words = words(turns if isinstance(turns, str) else turns[-1])
    # A set: a word said twice counts once.
    grams = {text_words[i : i + n] for n in range(1, router.longest + 1) for i in range(len(text_words) - n + 1)}
    vetoes = {name: gram for gram in sorted(grams & router.vetoed.keys()) for name in router.vetoed[gram]}
    hits: dict[str, list[Gram]] = {}
    for gram in sorted(grams & router.wanted.keys()):
        for name in router.wanted[gram]:
            hits.setdefault(name, []).append(gram)
    points = {name: sum(map(len, found)) for name, found in hits.items() if name not in vetoes}
    if not points:
        barred = [f"{name} (not: {' '.join(vetoes[name])})" for name in sorted(hits)]
        return Route(None, f"vetoed: {', '.join(barred)}" if barred else "no keyword")
    best = sorted(name for name in points if points[name] == max(points.values()))
    if len(best) > 1:
        return Route(None, f"tie: {', '.join(best)}")
    return Route(best[0], "keywords: " + ", ".join(" ".join(gram) for gram in hits[best[0]]))
