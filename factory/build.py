"""Stage build: candidates -> a verdict on each, rows to train on, rows held out.

Reads datasets/<expert>/candidates.parquet, the template and the base's tokenizer; writes
pairs.parquet, verdicts.parquet, train.parquet, holdout.parquet and, last, stats.json.
Run: dmoe build <expert>
"""

from collections import Counter as Tally
from typing import Any

from rapidfuzz.utils import default_process

from factory.blocking import Pairs
from factory.checks import Counter, Fault, Reply, drift, faults
from factory.dedup import Copy, Item, alike, fall, nearest
from factory.errors import UserError
from factory.paths import Home, Profile
from factory.schema import CANDIDATES, PAIRS, ROWS, VERDICTS, read_rows, write_rows
from factory.store import write_json
from factory.template import REASONS, Template, read_template
from factory.tokens import counter

Row = dict[str, Any]
QUANTILES = {"min": 0.0, "p05": 0.05, "median": 0.5, "p95": 0.95, "max": 1.0}
BELOW = 10  # pairs.parquet reaches so far below the template's threshold, and to 80 at least
SAMPLED = 2000  # questions of one answer that are compared with each other


def build(home: Home, expert: str, profile: Profile) -> dict[str, Any]:
    """Judges every candidate, writes the dataset, and returns its statistics."""
    template = read_template(home.template(expert))
    candidates = read_rows(home.dataset(expert, "candidates.parquet"), CANDIDATES, f"dmoe generate {expert}")
    count = counter(home, profile)
    verdicts, items, pairs = judged(candidates, template, count)
    kept = {v["row_id"] for v in verdicts if v["verdict"] == "keep"}
    rows = {
        split: [_row(c) for c in candidates if c["row_id"] in kept and c["split"] == split]
        for split in ("train", "holdout")
    }
    if not all(rows.values()):
        raise UserError(
            f"datasets/{expert}: no row was kept\n"
            '  then see why: dmoe query "SELECT reasons, count(*) FROM verdicts GROUP BY 1"'
        )
    write_rows(home.dataset(expert, "pairs.parquet"), PAIRS, _named(items, pairs))
    write_rows(home.dataset(expert, "verdicts.parquet"), VERDICTS, verdicts)
    for split, kept_rows in rows.items():
        write_rows(home.dataset(expert, f"{split}.parquet"), ROWS, kept_rows)
    stats = statistics(candidates, verdicts, template)
    write_json(home.dataset(expert, "stats.json"), stats)
    return stats


def floor(threshold: int) -> int:
    """The likeness from which on pairs are kept, so that another threshold needs no recomputing."""
    return max(1, min(80, threshold - BELOW))


def judge(candidates: list[Row], template: Template, count: Counter) -> list[Row]:
    """One verdict a candidate, in their order, with *all* its reasons. Pure."""
    return judged(candidates, template, count)[0]


def judged(candidates: list[Row], template: Template, count: Counter) -> tuple[list[Row], list[Item], Pairs]:
    """The verdicts, and the clean rows with the pairs of them that are alike, from which near copies fell."""
    own = _faults(candidates, template, count)
    clean = [c for c in candidates if not own[c["row_id"]]]
    items = [item_of(c) for c in clean]
    threshold = template.declaration.dedup.instruction
    pairs = alike(items, floor(threshold))
    return _verdicts(candidates, own, fall(items, pairs, threshold), template, count), items, pairs


def item_of(candidate: Row) -> Item:
    """A candidate as dedup sees it."""
    held_out = candidate["split"] == "holdout"
    return Item(candidate["row_id"], candidate["answer"], candidate["instruction"], held_out)


def _named(items: list[Item], pairs: Pairs) -> list[Row]:
    """The pairs by row ids."""
    return [
        {"row_id": items[i].row_id, "like": items[j].row_id, "score": float(score)}
        for i, j, score in zip(*pairs, strict=True)
    ]


def _verdicts(
    candidates: list[Row], own: dict[str, list[Fault]], fallen: dict[str, Copy], template: Template, count: Counter
) -> list[Row]:
    kept: Tally[str] = Tally()
    verdicts = []
    for c in candidates:
        found, copy = list(own[c["row_id"]]), fallen.get(c["row_id"])
        if copy:
            found.append(Fault(copy.reason, f"{copy.score:.1f} like {copy.like}"))
        elif not found and kept[c["seed_id"]] >= template.declaration.generate.per_seed:
            found.append(Fault("surplus", f"its seed has {kept[c['seed_id']]} rows already"))
        kept[c["seed_id"]] += not found
        verdicts.append({
            "row_id": c["row_id"], "verdict": "fail" if c["failure"] else "drop" if found else "keep",
            "reasons": [f.reason for f in found],
            "detail": "; ".join(f.detail for f in found), "like": copy.like if copy else "",
            "score": copy.score if copy else 0.0, "tokens": count(c["output"]),
        })  # fmt: skip
    return verdicts


def _faults(candidates: list[Row], template: Template, count: Counter) -> dict[str, list[Fault]]:
    """Row id -> its own faults, drift included; a seed's own words are its variant 0."""
    seeds = {c["seed_id"]: c for c in candidates if c["sample"] == 0}
    texts: dict[str, list[str]] = {}
    for seed in seeds.values():
        texts.setdefault(seed["answer"], []).append(default_process(seed["instruction"]))
    found = {}
    for c in candidates:
        if c["failure"]:
            found[c["row_id"]] = [Fault(c["failure"], c["failure_detail"])]
            continue
        list_ = faults(Reply(c["instruction"], c["answer"], c["output"]), template, count)
        if c["sample"]:
            fault = drift(c["instruction"], seeds[c["seed_id"]]["instruction"], c["answer"], template, texts)
            list_ += [fault] if fault else []
        found[c["row_id"]] = list_
    return found


def _row(candidate: Row) -> Row:
    """A dataset row, in TRL's conversational prompt-completion form."""
    return {
        "row_id": candidate["row_id"], "seed_id": candidate["seed_id"], "answer": candidate["answer"],
        "prompt": [{"role": "user", "content": candidate["instruction"]}],
        "completion": [{"role": "assistant", "content": candidate["output"]}],
        "instruction": candidate["instruction"], "output": candidate["output"],
    }  # fmt: skip


def statistics(candidates: list[Row], verdicts: list[Row], template: Template) -> dict[str, Any]:
    """Counts by verdict and reason, seeds that fell short, rows per answer, token quantiles, diversity."""
    kept = [(c, v) for c, v in zip(candidates, verdicts, strict=True) if v["verdict"] == "keep"]
    reasons = Tally(reason for v in verdicts for reason in v["reasons"])
    verdict = Tally(v["verdict"] for v in verdicts)
    per_seed = Tally(c["seed_id"] for c, _ in kept)
    wanted = template.declaration.generate.per_seed
    lengths = sorted(v["tokens"] for _, v in kept)
    return {
        "candidates": len(candidates),
        "kept": verdict["keep"],
        "dropped": verdict["drop"],
        "failed": verdict["fail"],
        "reasons": {reason: reasons[reason] for reason in REASONS if reasons[reason]},
        "rows": {split: sum(c["split"] == split for c, _ in kept) for split in ("train", "holdout")},
        "seeds": {split: len({c["seed_id"] for c, _ in kept if c["split"] == split}) for split in ("train", "holdout")},
        "seeds_short": {s: per_seed[s] for s in sorted({c["seed_id"] for c in candidates}) if per_seed[s] < wanted},
        "answers": {key: sum(c["answer"] == key for c, _ in kept) for key in template.answers},
        "tokens": {name: lengths[min(len(lengths) - 1, int(q * len(lengths)))] for name, q in QUANTILES.items()},
        "diversity": diversity([(c["answer"], c["instruction"]) for c, _ in kept]),
    }


def diversity(questions: list[tuple[str, str]]) -> dict[str, float]:
    """How much (answer, question) pairs differ; 1 is best for the first two, 0 for the last.

    distinct_2, distinct_3: different word n-grams in all n-grams. nearest: the mean likeness (token-sort
    ratio, 0 to 1) of a question to its nearest other one of the same answer, among the first `SAMPLED`.
    """
    words = [default_process(text).split() for _, text in questions]
    groups: dict[str, list[str]] = {}
    for (answer, _), text in zip(questions, words, strict=True):
        groups.setdefault(answer, []).append(" ".join(sorted(text)))
    likeness = [score for texts in groups.values() for score in nearest(texts[:SAMPLED])]
    return {
        "distinct_2": _distinct(words, 2),
        "distinct_3": _distinct(words, 3),
        "nearest": round(sum(likeness) / len(likeness) / 100, 3) if likeness else 0.0,
    }


def _distinct(texts: list[list[str]], n: int) -> float:
    grams = [tuple(words[i : i + n]) for words in texts for i in range(len(words) - n + 1)]
    return round(len(set(grams)) / len(grams), 3) if grams else 0.0
