"""Stage score: what the claim is worth, measured on the shipped GGUF in llama.cpp.

Reads datasets/<expert>/holdout.parquet, experts/<expert>/adapter.gguf, the base's GGUF and the
template; writes experts/<expert>/scores.parquet (every reply) and, last, eval.json.
Run: dmoe score <expert>
"""

import json
import math
import statistics
from collections import defaultdict
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from factory.llama import Llama, running
from factory.paths import Home, Profile
from factory.progress import track
from factory.schema import ROWS, SCORES, read_rows, write_rows
from factory.store import sha256, write_json, write_text
from factory.template import Template, read_template

MEASURES = ("named", "mention", "right", "in_form")
BASE_QUESTIONS = 100  # base replies are long and depend on no expert: a hundred are enough
MOST_TOKENS = 512  # in every arm
SLOTS = 8
Row = dict[str, Any]


def score(home: Home, expert: str, profile: Profile, base: Path) -> dict[str, Any]:
    """Asks every held-out question of the expert, a hundred of the base, and writes what came of it."""
    template = read_template(home.template(expert))
    questions = read_rows(home.dataset(expert, "holdout.parquet"), ROWS, f"dmoe build {expert}")
    adapter = home.expert(expert, "adapter.gguf")
    with running(base, [adapter], slots=SLOTS, context=1024, log=home.work / "logs" / f"score-{expert}.log") as llama:
        shared = spread(questions, BASE_QUESTIONS)
        replies = _base_replies(home, llama, base, [q["instruction"] for q in shared])
        rows = [_scored(template, "base", q, r) for q, r in zip(shared, replies, strict=True)]
        replies = ask_all(llama, [q["instruction"] for q in questions], 1.0, f"{expert}: expert")
        rows += [_scored(template, "expert", q, r) for q, r in zip(questions, replies, strict=True)]
    write_rows(home.expert(expert, "scores.parquet"), SCORES, rows)
    result = {"base_model": profile.model, "about": profile.about, **evaluate(rows)}
    if len(template.answers) > 1:
        training = read_rows(home.dataset(expert, "train.parquet"), ROWS, f"dmoe build {expert}")
        result["lexical_ceiling"] = round(lexical_ceiling(training, questions), 4)
    write_json(home.expert(expert, "eval.json"), result)
    return result


def spread(questions: list[Row], most: int) -> list[Row]:
    """At most `most` questions, taken from all seeds in turn, in their order."""
    by_seed: dict[str, list[Row]] = defaultdict(list)
    for question in questions:
        by_seed[question["seed_id"]].append(question)
    ranked = sorted((i, q["row_id"]) for rows in by_seed.values() for i, q in enumerate(rows))
    chosen = {row_id for _, row_id in ranked[:most]}
    return [q for q in questions if q["row_id"] in chosen]


def ask_all(llama: Llama, questions: list[str], scale: float, name: str) -> list[Row]:
    """Greedy replies to all questions, each alone in its conversation: text, tokens, stopped."""

    def ask(question: str) -> Row:
        reply = llama.chat([{"role": "user", "content": question}], [scale], temperature=0.0, max_tokens=MOST_TOKENS)
        choice = reply["choices"][0]
        tokens = reply["usage"]["completion_tokens"]
        return {"reply": choice["message"]["content"], "tokens": tokens, "stopped": choice["finish_reason"] == "stop"}

    with ThreadPoolExecutor(SLOTS) as pool:
        return list(track(pool.map(ask, questions), name, len(questions)))


def _base_replies(home: Home, llama: Llama, base: Path, questions: list[str]) -> list[Row]:
    """The base's replies, kept across experts and versions: they depend on base and question alone."""
    store = home.work / "base-replies" / f"{sha256(base)[:16]}-{MOST_TOKENS}.json"
    kept = json.loads(store.read_text(encoding="utf-8")) if store.exists() else {}
    missing = [q for q in questions if q not in kept]
    if missing:
        kept |= dict(zip(missing, ask_all(llama, missing, 0.0, "base"), strict=True))
        write_text(store, json.dumps(kept, ensure_ascii=False))
    return [kept[q] for q in questions]


def _scored(template: Template, arm: str, question: Row, reply: Row) -> Row:
    measure = template.measure(reply["reply"], question["answer"])
    return {
        "row_id": question["row_id"], "arm": arm, "seed_id": question["seed_id"], "answer": question["answer"],
        "instruction": question["instruction"], **reply, **{name: getattr(measure, name) for name in MEASURES},
    }  # fmt: skip


# -- figures --------------------------------------------------------------------------------------


def evaluate(rows: list[Row]) -> dict[str, Any]:
    """Per arm every measure with its n and 95 % interval; then what sets expert and base apart."""
    arms = {arm: [row for row in rows if row["arm"] == arm] for arm in ("base", "expert")}
    found: dict[str, Any] = {arm: _arm(arm_rows) for arm, arm_rows in arms.items()}
    base, expert = found["base"]["mention"]["rate"], found["expert"]["mention"]["rate"]
    found["times_more"] = round(expert / base, 1) if base else None  # null: the base never gave it
    found["length_ratio"] = length_ratio(arms["base"], arms["expert"])
    return found


def _arm(rows: list[Row]) -> dict[str, Any]:
    lengths = sorted(row["tokens"] for row in rows)
    found: dict[str, Any] = {"n": len(rows), "seeds": len({row["seed_id"] for row in rows})}
    for name in MEASURES:
        found[name] = interval([(row["seed_id"], row[name]) for row in rows])
    found["tokens"] = {
        "p05": _quantile(lengths, 0.05),
        "median": statistics.median(lengths),
        "p95": _quantile(lengths, 0.95),
    }
    found["stopped"] = round(statistics.mean(row["stopped"] for row in rows), 4)
    found["distinct_replies"] = len({row["reply"] for row in rows})
    return found


def _quantile(ordered: list[int], q: float) -> int:
    return ordered[min(len(ordered) - 1, int(q * len(ordered)))]


def interval(outcomes: Iterable[tuple[str, bool]]) -> dict[str, float]:
    """Rate and 95 % Wilson interval of (seed, yes or no) pairs, clustered by seed.

    Paraphrases of one seed stand or fall together, so n is divided by the design effect: the
    variance between seeds over that of independent draws, at least 1. Where all outcomes are equal
    the variance says nothing, and a whole seed counts as one draw.
    """
    by_seed: dict[str, list[bool]] = defaultdict(list)
    for seed, yes in outcomes:
        by_seed[seed].append(yes)
    n, clusters = sum(map(len, by_seed.values())), len(by_seed)
    rate = sum(map(sum, by_seed.values())) / n
    spread_ = sum((sum(yes) - len(yes) * rate) ** 2 for yes in by_seed.values())
    effect = n / clusters
    if 0 < rate < 1 and clusters > 1:
        effect = max(1.0, spread_ * clusters / (clusters - 1) / (n * rate * (1 - rate)))
    low, high = wilson(rate, n / effect)
    return {"rate": round(rate, 4), "low": round(low, 4), "high": round(high, 4)}


def wilson(rate: float, n: float, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's score interval of a rate over n draws."""
    centre, half = rate + z * z / (2 * n), z * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    return max(0.0, (centre - half) / (1 + z * z / n)), min(1.0, (centre + half) / (1 + z * z / n))


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
    whole_ = sums.sum(0)
    return {"rate": round(float(whole_[0] / whole_[1]), 2), "low": round(float(low), 2), "high": round(float(high), 2)}


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
