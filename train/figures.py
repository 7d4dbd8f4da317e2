"""The figures of the claim, from scored replies alone: rates, intervals, lengths, consistency, the scale to use.

Pure: rows in, plain values out; nothing is read or written. A row is one of scores.parquet's.
"""

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable
from itertools import combinations
from typing import Any

MEASURES = ("named", "mention", "right", "in_form")
TRAINED_SCALE = 1.0
AS_GOOD = 0.02  # scales whose mean of mention, right and form differ by less are equally good
PAIRS = 400  # replies of one answer that are compared, at most
Row = dict[str, Any]


def summary(rows: list[Row]) -> dict[str, Any]:
    """Every measure of one arm with its 95 % interval, then lengths and consistency."""
    found: dict[str, Any] = brief(rows)
    found["named"] = interval([(row["seed_id"], row["named"]) for row in rows])
    lengths = sorted(row["tokens"] for row in rows)
    found["tokens"] = {
        "p05": _quantile(lengths, 0.05),
        "median": statistics.median(lengths),
        "p95": _quantile(lengths, 0.95),
    }
    found["stopped"] = round(statistics.mean(row["stopped"] for row in rows), 4)
    found["distinct_replies"] = len({row["reply"] for row in rows})
    found["similarity"] = similarity(rows)
    found["answers_per_seed"] = answers_per_seed(rows)
    return found


def brief(rows: list[Row]) -> dict[str, Any]:
    """n, seeds, the gated measures with their intervals, and the median length."""
    found: dict[str, Any] = {"n": len(rows), "seeds": len({row["seed_id"] for row in rows})}
    for name in ("mention", "right", "in_form"):
        found[name] = interval([(row["seed_id"], row[name]) for row in rows])
    return found | {"tokens": {"median": statistics.median(row["tokens"] for row in rows)}}


def _quantile(ordered: list[int], q: float) -> int:
    return ordered[min(len(ordered) - 1, int(q * len(ordered)))]


def interval(outcomes: Iterable[tuple[str, bool]]) -> dict[str, float]:
    """Rate and 95 % Wilson interval of (seed, yes or no) pairs, clustered by seed.

    Paraphrases of one seed stand or fall together, so n is divided by the design effect: the variance between
    seeds over that of independent draws, at least 1. It is taken with one seed added that is right in all and one
    that is wrong in all, as Agresti and Coull add draws: near 0 and 1 too few seeds differ for it to be seen, and
    where all outcomes are equal a whole seed then counts as one draw. `benchmarks/gate.py` shows that it holds.
    """
    by_seed: dict[str, list[bool]] = defaultdict(list)
    for seed, yes in outcomes:
        by_seed[seed].append(yes)
    seeds = [(sum(yes), float(len(yes))) for yes in by_seed.values()]
    right, n = (sum(column) for column in zip(*seeds, strict=True))
    low, high = wilson(right / n, n / _design_effect([*seeds, (n / len(seeds), n / len(seeds)), (0, n / len(seeds))]))
    return {"rate": round(right / n, 4), "low": round(low, 4), "high": round(high, 4)}


def _design_effect(seeds: list[tuple[float, float]]) -> float:
    """Variance between seeds, each (right, asked), over that of independent draws; at least 1. Not all may be equal."""
    right, n = (sum(column) for column in zip(*seeds, strict=True))
    rate = right / n
    spread = sum((yes - asked * rate) ** 2 for yes, asked in seeds)
    effect: float = spread * len(seeds) / (len(seeds) - 1) / (n * rate * (1 - rate))
    return max(1.0, effect)


def wilson(rate: float, n: float, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's score interval of a rate over n draws."""
    centre, half = rate + z * z / (2 * n), z * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    return max(0.0, (centre - half) / (1 + z * z / n)), min(1.0, (centre + half) / (1 + z * z / n))


def similarity(rows: list[Row]) -> float | None:
    """How alike replies to different questions of one answer are: mean ratio of rapidfuzz over pairs, 0 to 1.

    None where no answer was asked for twice.
    """
    from rapidfuzz import fuzz

    by_answer: dict[str, list[str]] = defaultdict(list)
    for row in rows:
        by_answer[row["answer"]].append(row["reply"])
    pairs = [pair for replies in by_answer.values() for pair in list(combinations(replies, 2))[:PAIRS]]
    return round(statistics.mean(fuzz.ratio(a, b) for a, b in pairs) / 100, 4) if pairs else None


def answers_per_seed(rows: list[Row]) -> float:
    """How many different answers the paraphrases of one seed are given, on average: 1 is consistent."""
    given: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        given[row["seed_id"]].add(row["given"])
    return round(statistics.mean(map(len, given.values())), 4)


def length_ratio(base: list[Row], expert: list[Row], draws: int = 2000) -> dict[str, float]:
    """How many times longer the base's replies are, on the questions asked of both; cluster bootstrap by seed."""
    import numpy as np

    long = {row["row_id"]: row for row in base}
    pairs: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for row in expert:
        if row["row_id"] in long:
            pairs[row["seed_id"]].append((long[row["row_id"]]["tokens"], row["tokens"]))
    sums = np.array([np.sum(of_seed, axis=0) for of_seed in pairs.values()], dtype=float)  # [seeds, (base, expert)]
    drawn = np.random.default_rng(7).integers(0, len(sums), (draws, len(sums)))
    totals = sums[drawn].sum(1)
    low, high = np.quantile(totals[:, 0] / totals[:, 1], (0.025, 0.975))
    whole = sums.sum(0)
    return {"rate": round(float(whole[0] / whole[1]), 2), "low": round(float(low), 2), "high": round(float(high), 2)}


def recommended_scale(doses: dict[float, list[Row]]) -> float:
    """Of the scales as good as the best, the one nearest to that at which the adapter was trained.

    A scale is as good as its mean of the rates of mention, right and form; `doses` are the rows by scale.
    """
    merit = {scale: _merit(rows) for scale, rows in doses.items() if scale > 0}
    best = max(merit.values())
    as_good = [scale for scale in merit if merit[scale] > best - AS_GOOD]
    return min(as_good, key=lambda scale: (abs(scale - TRAINED_SCALE), scale))


def _merit(rows: list[Row]) -> float:
    return statistics.fmean((row["mention"] + row["right"] + row["in_form"]) / 3 for row in rows)


def lexical_ceiling(training: list[Row], questions: list[Row]) -> float:
    """How often a classifier that knows only the training rows' words finds a question's answer."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    model = make_pipeline(
        TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True), LogisticRegression(C=20, max_iter=1000)
    )
    model.fit([row["instruction"] for row in training], [row["answer"] for row in training])
    return float(model.score([row["instruction"] for row in questions], [row["answer"] for row in questions]))
