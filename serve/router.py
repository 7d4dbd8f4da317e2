"""Which expert answers: keywords, the meaning of the question, a threshold of each expert's own; else the base.

A keyword counts at word boundaries; a negative keyword bars its expert. What `dmoe fit` learned of an expert
(factory/routing.py) then scores the question: without a keyword it must reach the expert's threshold, with one a lower
threshold. An expert that brings nothing of the kind is chosen by its keywords alone. Of those that reach theirs, the
one that is furthest above answers; one whose keyword was said goes before one without. A later turn of a conversation
stays with the expert of the turn before where it only makes sense as its continuation.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from factory.embed import Encoder, Floats
from factory.routing import BUCKETS, LONGEST, WORDS, Routing, View, buckets, read_routing, words
from serve.market import Installed

Gram = tuple[str, ...]
Rows = NDArray[np.int64]

TURNS = 8  # of a conversation, the last ones that count
TOP = 5  # scores that are told

# how a message begins, or points back, that goes on with the last; and how one begins that does not
OPENERS = {
    *words("and but or so then also ok okay why really sure even only since because worse better without with for")
}
BACK = {*words("it its that this these those they them one ones he she his her there instead either too")}
ANEW = {*words("tell write set give sing play plan translate spell hello hi hey thanks recommend")}
LOSES_BACK, LOSES = 7.0, 3.0  # log odds that the topic may lose by it: pointing back, or not


@dataclass(frozen=True)
class Score:
    """How a question stands with one expert: log odds, and what they must reach; both 0 where it has keywords alone."""

    expert: str
    score: float
    threshold: float


@dataclass(frozen=True)
class Route:
    """Who answers (None: the base) and why, in words a person can check."""

    expert: str | None
    reason: str
    hits: tuple[tuple[str, str], ...] = ()  # (expert, keyword)
    vetoes: tuple[tuple[str, str], ...] = ()  # (expert, negative keyword)
    scores: tuple[Score, ...] = ()  # the one that would answer first
    encoder: str = ""  # empty: keywords and words alone
    stayed: bool = False  # with the expert of an earlier turn

    def explain(self) -> dict[str, Any]:
        """All of it, ready for JSON. `margin`: how much further above its threshold the first is than the second;
        below 0 where a keyword put it first."""
        above = [one.score - one.threshold for one in self.scores]
        return {
            "expert": self.expert, "reason": self.reason, "stayed": self.stayed, "encoder": self.encoder or None,
            "hits": [{"expert": expert, "keyword": keyword} for expert, keyword in self.hits],
            "vetoes": [{"expert": expert, "keyword": keyword} for expert, keyword in self.vetoes],
            "scores": [vars(one) for one in self.scores],
            "threshold": self.scores[0].threshold if self.scores else None,
            "margin": round(above[0] - above[1], 3) if len(above) > 1 else None,
        }  # fmt: skip


@dataclass(frozen=True)
class Fitted:
    """What was fitted of all experts, side by side. An expert is a row; its directions begin at `starts[row]`."""

    names: list[str]
    joints: Floats  # [experts, 5]: words, meaning, bias, threshold, threshold_hit
    starts: Rows  # [experts + 1]
    by_words: NDArray[
        np.float16
    ]  # flat: of direction i the weight of bucket b lies at words_at[i] + b * words_step[i],
    words_at: Rows  # so that what one look reads lies together: all experts' weights of a bucket where there is no
    words_step: Rows  # encoder, else one expert's
    words_bias: Floats  # [directions]
    by_meaning: Floats  # [directions, axes]; no axes where there is no encoder
    meaning_bias: Floats
    coarse: Floats  # [experts, telling axes] centroids
    blind: Rows  # rows that know nothing of the encoder: told by words


@dataclass(frozen=True)
class Router:
    """Word n-gram -> the experts it speaks for, and against: looking up costs the same for any number of experts."""

    wanted: dict[Gram, list[str]]
    vetoed: dict[Gram, list[str]]
    longest: int  # words in the longest keyword
    fitted: Fitted | None = None
    rows: dict[str, int] | None = None  # name -> row of `fitted`
    encoder: Encoder | None = None

    @property
    def slow(self) -> bool:
        """Whether a look takes milliseconds, because a model reads the question."""
        return self.encoder is not None and self.encoder.name == "minilm"


def make_router(experts: Iterable[Installed], encoder: Encoder | None = None) -> Router:
    """A router over the experts that `auto` may choose.

    Raises:
        UserError: what was fitted of one of them is damaged.
    """
    wanted: dict[Gram, list[str]] = {}
    vetoed: dict[Gram, list[str]] = {}
    known: dict[str, Routing] = {}
    for expert in experts:
        if not expert.routed:
            continue
        for table, keywords in ((wanted, expert.keywords), (vetoed, expert.not_keywords)):
            for gram in {words(keyword) for keyword in keywords} - {()}:
                table.setdefault(gram, []).append(expert.name)
        if expert.routing:
            known[expert.name] = read_routing(expert.routing)
    return over(wanted, vetoed, known, encoder)


def over(
    wanted: dict[Gram, list[str]], vetoed: dict[Gram, list[str]], known: dict[str, Routing], encoder: Encoder | None
) -> Router:
    """A router over tables of keywords and what was fitted."""
    longest = max(map(len, [*wanted, *vetoed]), default=0)
    if not known:
        return Router(wanted, vetoed, longest)
    fitted = side_by_side(known, encoder)
    return Router(wanted, vetoed, longest, fitted, {name: row for row, name in enumerate(fitted.names)}, encoder)


def side_by_side(known: dict[str, Routing], encoder: Encoder | None) -> Fitted:
    """One matrix of all experts' directions in each space; an expert fitted with another encoder is told by words."""
    axes = len(encoder.encode(["axes"])[0]) if encoder else 0
    meant = {name: view for name in known if (view := _meant(known[name], encoder, axes))}
    joints = [known[name].joints[encoder.name if encoder and name in meant else WORDS] for name in known]
    views = [routing.views[WORDS] for routing in known.values()]
    starts = np.cumsum([0, *(len(view.bias) for view in views)])
    by_meaning, meaning_bias = np.zeros((starts[-1], axes), np.float32), np.zeros(starts[-1], np.float32)
    telling = slice(*encoder.telling) if encoder else slice(0)
    coarse = np.zeros((len(known), len(range(axes)[telling])), np.float32)
    for row, name in enumerate(known):
        if name in meant:
            place = slice(starts[row], starts[row + 1])
            by_meaning[place], meaning_bias[place] = meant[name].weights, meant[name].bias
            coarse[row] = meant[name].centroid[telling]
    sizes = np.diff(starts)
    if encoder:
        by_words = np.concatenate([view.weights.T.ravel() for view in views])
        within = np.arange(starts[-1]) - np.repeat(starts[:-1], sizes)
        words_at, words_step = np.repeat(starts[:-1] * BUCKETS, sizes) + within, np.repeat(sizes, sizes)
    else:
        by_words = np.concatenate([view.weights for view in views]).T.ravel()
        words_at, words_step = np.arange(starts[-1]), np.full(starts[-1], starts[-1])
    numbers = [[j.words, j.meaning, j.bias, j.threshold, j.threshold_hit] for j in joints]
    return Fitted(
        list(known), np.array(numbers, np.float32), starts, by_words, words_at, words_step,
        np.concatenate([view.bias for view in views]), by_meaning, meaning_bias, coarse,
        np.array([row for row, name in enumerate(known) if name not in meant], np.int64),
    )  # fmt: skip


def _meant(routing: Routing, encoder: Encoder | None, axes: int) -> View | None:
    """The expert's directions in this very encoder's space, if it has any."""
    joint = routing.joints.get(encoder.name) if encoder else None
    if encoder is None or joint is None or joint.digest != encoder.digest:
        return None
    view = routing.views[encoder.name]
    return view if view.weights.shape[1] == axes else None  # strangers may claim any digest


def route(router: Router, turns: str | Sequence[str]) -> Route:
    """Who answers the last of `turns`: the user's messages of a conversation, oldest first; a text is one turn."""
    chosen, topic = Route(None, "no question"), ""
    for text in [turns] if isinstance(turns, str) else turns[-TURNS:]:
        found = _alone(router, text)
        if found.expert is None and chosen.expert and _goes_on(router, chosen.expert, topic, text):
            reason = f"stays with {chosen.expert}: goes on with what was asked before"
            chosen, topic = replace(found, expert=chosen.expert, reason=reason, stayed=True), f"{topic} {text}"
        else:
            chosen, topic = found, text
    return chosen


def _goes_on(router: Router, expert: str, topic: str, text: str) -> bool:
    """Whether `text`, no expert's by itself, is about what `topic` was.

    Said in one breath with the topic it must still be the expert's, and not much less so than the topic alone: how much
    less it may be depends on whether it points back (`it`, `and ...`). A request that begins anew never goes on.
    """
    spoken = words(text[:LONGEST])
    if not spoken or spoken[0] in ANEW or expert in _keywords(router, text)[1]:
        return False
    points_back = spoken[0] in OPENERS or not BACK.isdisjoint(spoken)
    row = (router.rows or {}).get(expert)
    if row is None or router.fitted is None:  # keywords alone: the topic is nothing that can be measured
        return points_back
    whole, alone = (_above_of(router, row, part) for part in (f"{topic} {text}", topic))
    return whole > 0 and alone - whole < (LOSES_BACK if points_back else LOSES)


def _above_of(router: Router, row: int, text: str) -> float:
    """How far above its threshold one expert stands, its keywords left aside."""
    fitted, vector = router.fitted, router.encoder.encode([text])[0] if router.encoder else None
    assert fitted is not None
    return float(_score(fitted, np.array([row]), buckets(text), vector)[0] - fitted.joints[row, 3])


def _alone(router: Router, text: str) -> Route:
    """The choice for one question without a conversation."""
    hits, vetoes = _keywords(router, text)
    barred = dict(vetoes)
    held = {name: sum(len(gram) for gram in grams) for name, grams in hits.items() if name not in barred}
    scores = _scores(router, text, held, barred)
    told = Route(
        None, "no keyword",
        tuple((name, " ".join(gram)) for name in sorted(hits) for gram in hits[name]),
        tuple((name, " ".join(gram)) for name, gram in sorted(vetoes.items())), tuple(scores[:TOP]),
        router.encoder.name if router.encoder and router.fitted else "",
    )  # fmt: skip
    if scores and _above(scores[0]) > 0:
        return _decided(told, scores, hits)
    if hits and not held:
        return replace(
            told, reason="vetoed: " + ", ".join(f"{name} (not: {' '.join(barred[name])})" for name in sorted(hits))
        )
    if scores:
        return replace(told, reason=f"none is near enough: {_told(scores[0])}")
    return told


def _decided(told: Route, scores: list[Score], hits: dict[str, list[Gram]]) -> Route:
    alike = [one for one in scores if (one.expert in hits) == (scores[0].expert in hits)]
    tied = sorted(one.expert for one in alike if _above(one) == _above(scores[0]))
    if len(tied) > 1:
        return replace(told, reason=f"tie: {', '.join(tied)}")
    name = scores[0].expert
    if name in hits:
        return replace(told, expert=name, reason="keywords: " + ", ".join(" ".join(gram) for gram in hits[name]))
    how = "meaning" if told.encoder else "words"
    return replace(told, expert=name, reason=f"{how}: {scores[0].score:.1f} over {scores[0].threshold:.1f}")


def _told(one: Score) -> str:
    return f"{one.expert} {one.score:.1f} under {one.threshold:.1f}"


def _above(one: Score) -> float:
    return one.score - one.threshold


def _keywords(router: Router, text: str) -> tuple[dict[str, list[Gram]], dict[str, Gram]]:
    """What the question holds: for each expert its keywords, and one negative keyword."""
    spoken = words(text[:LONGEST])
    # A set: a word said twice counts once.
    grams = {spoken[i : i + n] for n in range(1, router.longest + 1) for i in range(len(spoken) - n + 1)}
    vetoes = {name: gram for gram in sorted(grams & router.vetoed.keys()) for name in router.vetoed[gram]}
    hits: dict[str, list[Gram]] = {}
    for gram in sorted(grams & router.wanted.keys()):
        for name in router.wanted[gram]:
            hits.setdefault(name, []).append(gram)
    return hits, vetoes


def _scores(router: Router, text: str, held: dict[str, int], barred: dict[str, Gram]) -> list[Score]:
    """The experts that come into question, the one that would answer first. `held`: words of each one's keywords."""
    known = router.rows or {}
    found = [Score(name, float(held[name]), 0.0) for name in held if name not in known]
    if router.fitted:
        hit = np.array([known[name] for name in held if name in known], np.int64)
        rows, vector = _nearest(router.fitted, router.encoder, text, hit)
        score = _score(router.fitted, rows, buckets(text), vector)
        keyed = set(hit.tolist())
        column = [4 if row in keyed else 3 for row in rows.tolist()]
        needed = router.fitted.joints[rows, column]
        first = (score > needed) & np.isin(rows, hit)
        best = np.lexsort((needed - score, ~first))[: TOP + len(barred)]
        told = (
            Score(router.fitted.names[rows[i]], round(float(score[i]), 3), round(float(needed[i]), 3)) for i in best
        )
        found += [one for one in told if one.expert not in barred]
    return sorted(found, key=lambda one: (_above(one) <= 0 or one.expert not in held, -_above(one)))


def _nearest(fitted: Fitted, encoder: Encoder | None, text: str, hit: Rows) -> tuple[Rows, Floats | None]:
    """The rows to look at closely, by their centroids' telling axes, and the question's vector."""
    everyone = np.arange(len(fitted.names))
    vector = encoder.encode([text])[0] if encoder else None
    if encoder is None or vector is None or len(everyone) <= encoder.kept:
        return everyone, vector
    likeness = fitted.coarse @ vector[slice(*encoder.telling)]
    near = np.argpartition(-likeness, encoder.kept)[: encoder.kept]
    return np.unique(np.concatenate([near, hit, fitted.blind])), vector


def _directions(fitted: Fitted, rows: Rows) -> tuple[Rows, Rows]:
    """The directions of these experts, one after the other, and where among them each expert's begin."""
    sizes = fitted.starts[rows + 1] - fitted.starts[rows]
    ends = np.cumsum(sizes)
    return np.arange(ends[-1]) + np.repeat(fitted.starts[rows] - ends + sizes, sizes), ends - sizes


def _score(fitted: Fitted, rows: Rows, hashed: Rows, vector: Floats | None) -> Floats:
    """Log odds of these rows: float32 [rows]."""
    picked, starts = _directions(fitted, rows)
    weights = fitted.by_words[fitted.words_at[picked] + hashed[:, None] * fitted.words_step[picked]]
    by_words = weights.sum(axis=0, dtype=np.float32) * max(len(hashed), 1) ** -0.5 + fitted.words_bias[picked]
    by_words = _joined(by_words, starts)
    numbers = fitted.joints[rows]
    score = numbers[:, 0] * by_words + numbers[:, 2]
    if vector is not None:
        by_meaning = _joined(fitted.by_meaning[picked] @ vector + fitted.meaning_bias[picked], starts)
        score = score + numbers[:, 1] * by_meaning
    return np.asarray(score, np.float32)


def _joined(scores: Floats, starts: Rows) -> Floats:
    return np.asarray(np.logaddexp.reduceat(scores, starts), np.float32)
