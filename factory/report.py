"""`dmoe report`: one page an expert and an index, for people who judge an expert before they trust it.

Reads what the stages wrote (datasets/<expert>, experts/<expert>), the template and its seeds; asks nothing and
measures nothing anew. What is not there yet is named on the page, with the command that makes it.
"""

from __future__ import annotations

import csv
import re
from collections import Counter as Tally
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from factory import card
from factory.errors import UserError
from factory.package import claim_kept
from factory.page import render
from factory.paths import Home, Params, Profile
from factory.query import connect
from factory.seeds import Seed, held_out, read_seeds
from factory.store import read_json, read_text, sha256, write_text
from factory.template import Template, any_pattern, read_template

if TYPE_CHECKING:
    import duckdb

Row = dict[str, Any]
MISSES, OTHERS = 200, 60  # replies on a page: those where the expert missed something, and others
FIRST = re.compile(r".{60,240}?[.!?](?= )|.{160}\S*(?= )", re.DOTALL)  # of a long reply, what is shown of it folded
SAMPLES, CLUSTERS, SHORT = 8, 20, 100  # dropped rows of a reason, groups of near copies, seeds that fell short
WRITTEN = ("eval", "manifest", "parity", "audit")  # by stages, into experts/<expert>/<name>.json
EVERYDAY, MIXED = 6, 5  # replies to questions of another kind, answers given in another's place most often


def report(home: Home, params: Params, profile: Profile, only: str | None, out: Path) -> Path:
    """Writes the page of the expert `only`, or of all, and the index; returns the one to look at first."""
    connection = connect(home)
    for expert in [only] if only else params.experts:
        write_text(_page(out, expert), render("report.html", **gather(home, expert, profile, connection)))
    index = out / "index.html"
    summaries = [{**_made(home, expert), "page": _page(out, expert).exists()} for expert in params.experts]
    write_text(index, render("index.html", experts=summaries, profile=profile, cross=_cross(home, summaries)))
    return _page(out, only) if only else index


def _cross(home: Home, summaries: list[Row]) -> Row | None:
    """What `dmoe cross` wrote, and whether it asked other adapters than the packed ones; None where it never ran."""
    path = home.root / "experts" / "cross.json"
    if not path.exists():
        return None
    found: Row = read_json(path)
    packed = {one["name"]: one["manifest"]["sha256"].get("adapter.gguf") for one in summaries if one["manifest"]}
    return found | {"old": found["adapters"] != packed}


def _page(out: Path, expert: str) -> Path:
    return out / "experts" / f"{expert}.html"


def _made(home: Home, expert: str) -> Row:
    """What an expert says of itself and the figures that its stages wrote; None where a stage has not run."""
    files = {
        "stats": home.dataset(expert, "stats.json"),
        **{name: home.expert(expert, f"{name}.json") for name in WRITTEN},
    }
    template = read_template(home.template(expert))
    read = {name: read_json(path) if path.exists() else None for name, path in files.items()}
    kept = claim_kept(home, expert)
    return {"name": expert, "template": template, "declared": template.declaration, "passed": kept, **read}


def gather(home: Home, expert: str, profile: Profile, connection: duckdb.DuckDBPyConnection) -> Row:
    """All that the page of one expert shows, as plain values."""
    made = _made(home, expert)
    template, seeds = made["template"], read_seeds(home.seeds(expert), made["template"])

    def ask(sql: str) -> list[Row]:
        result = connection.execute(sql, {"expert": expert})
        names = [column[0] for column in result.description or []]
        return [dict(zip(names, row, strict=True)) for row in result.fetchall()]

    scored, rows = ask(SCORED_SQL), ask("SELECT * FROM rows WHERE expert = $expert ORDER BY row_id")
    fallen = ask("""SELECT "like", score FROM verdicts WHERE expert = $expert AND "like" <> '' ORDER BY score""")
    misses = [row for row in scored if row["missed"]]
    return {
        **made,
        "profile": profile,
        "absent": absent(home, expert),
        "other_data": _other_data(home, expert, made["manifest"]),
        "answers": answers(template, rows, scored),
        "scored": {"all": len(scored), "misses": len(misses)},
        "shown": [_marked(row, template) for row in misses[:MISSES] + scored[len(misses) :][:OTHERS]],
        "reasons": {row["reason"]: row for row in ask(REASON_SQL)},
        "dropped": _by(ask(DROPPED_SQL), "reason"),
        "lengths": _by([row for row in ask(LENGTHS_SQL) if row["arm"] in _arms(made["eval"])], "arm"),
        "confusion": confusion(template, ask(CONFUSION_SQL)),
        "everyday": ask(EVERYDAY_SQL),
        "losses": losses(home.expert(expert, "plots/loss.csv")),
        "probes": probes(home.expert(expert, "plots/probe.csv")),
        "tokens": [row["tokens"] for row in ask(TOKENS_SQL)],
        "likeness": likeness(rows),
        "fallen": [row["score"] for row in fallen],
        "groups": len({row["like"] for row in fallen}),
        "clusters": [_compared(row) for row in ask(CLUSTER_SQL)],
        "coverage": coverage(template, seeds, rows, _by(ask(SEED_SQL), "seed_id")),
        "facts": facts(home, expert),
    }


def _arms(measured: Row | None) -> tuple[str, ...]:
    """The arms worth a look: what a base does that was told means nothing where it follows no system prompt."""
    follows = measured and measured.get("base_follows_system_prompt")
    return ("base", "told", "expert") if follows else ("base", "expert")


def absent(home: Home, expert: str) -> list[tuple[str, str]]:
    """(what is not there, the command that makes it), in the order in which the stages run."""
    data, made = home.dataset(expert, ""), home.expert(expert, "")
    steps = (
        ([data / "candidates.parquet"], "candidates", f"dmoe generate {expert}"),
        ([data / "verdicts.parquet", data / "stats.json"], "verdicts and rows", f"dmoe build {expert}"),
        ([made / "scores.parquet", made / "eval.json"], "measured replies", f"dvc repro score@{expert}"),
        ([made / "parity.json"], "comparison with the trained adapter", f"dvc repro parity@{expert}"),
        ([made / "gate.json"], "passed gate", f"dvc repro gate@{expert}"),
        ([made / "audit.json"], "audit for leaks", f"dvc repro audit@{expert}"),
        ([made / "manifest.json"], "package", f"dvc repro package@{expert}"),
    )
    return [(what, command) for paths, what, command in steps if not all(path.exists() for path in paths)]


def _other_data(home: Home, expert: str, manifest: Row | None) -> list[str]:
    """The files that are here and are not the ones that the package was made from."""
    hashes = manifest["sha256"] if manifest else {}
    places = {
        "train.parquet": home.dataset(expert, "train.parquet"),
        "holdout.parquet": home.dataset(expert, "holdout.parquet"),
        "adapter.gguf": home.expert(expert, "adapter.gguf"),
    }
    return [n for n, path in places.items() if n in hashes and path.exists() and sha256(path) != hashes[n]]


def _by(rows: list[Row], key: str) -> dict[str, list[Row]]:
    groups: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        groups[row[key]].append(row)
    return dict(groups)


def answers(template: Template, rows: list[Row], scored: list[Row]) -> list[Row]:
    """Each answer with its rows, how often it was right, and what was given in its place."""
    kept = Tally((row["answer"], row["split"]) for row in rows)
    found = []
    for key, answer in template.answers.items():
        asked = [row for row in scored if row["answer"] == key]
        instead = Tally(other for row in asked for other in template.names_in(row["reply"])[0] - {key})
        found.append({
            "key": key, "text": answer.text, "also": answer.also, "source": answer.source, "checked": answer.checked,
            "train": kept[key, "train"], "holdout": kept[key, "holdout"], "asked": len(asked),
            "right": sum(row["right"] for row in asked),
            "instead": sorted(instead.items(), key=lambda item: (-item[1], item[0])),
        })  # fmt: skip
    return found


def confusion(template: Template, counts: list[Row]) -> Row:
    """Which answer was given to questions of which, as a matrix: the key "" stands for none or several.

    Args:
        counts: {answer, given, n}.
    Returns: {columns: [key, ...], rows: [{key, n, cells: [{key, n, share, own}, ...]}, ...], mixed: the pairs
    (key, given, n, of) that were mixed up most often}.
    """
    found: Tally[tuple[str, str]] = Tally()
    for row in counts:
        found[row["answer"], row["given"] if row["given"] in template.answers else ""] += row["n"]
    keys = list(template.answers)
    columns = keys + [""] * any(found[key, ""] for key in keys)
    rows: list[Row] = []
    for key in keys:
        n = sum(found[key, given] for given in columns)
        cells = [
            {"key": given, "n": found[key, given], "share": found[key, given] / (n or 1), "own": given == key}
            for given in columns
        ]
        rows.append({"key": key, "n": n, "cells": cells})
    others = [
        (row["key"], cell["key"], cell["n"], row["n"]) for row in rows for cell in row["cells"] if not cell["own"]
    ]
    mixed = sorted((other for other in others if other[1] and other[2]), key=lambda other: (-other[2], other))
    return {"columns": columns, "rows": rows, "mixed": mixed[:MIXED]}


def losses(path: Path) -> list[tuple[float, float]]:
    """(step, training loss) as `dmoe train` wrote them; none where it has not."""
    if not path.exists():
        return []
    return [(int(line["step"]), float(line["loss"])) for line in csv.DictReader(read_text(path).splitlines())]


def probes(path: Path) -> list[dict[str, float]]:
    """What held-out questions showed after each epoch, as `dmoe train` wrote it; none where it has not."""
    if not path.exists():
        return []
    lines = csv.DictReader(read_text(path).splitlines())
    return [{name: float(value) for name, value in line.items()} for line in lines]


def _marked(row: Row, template: Template) -> Row:
    """A scored row with its replies in pieces: (text, good or bad where it names an answer, else "").

    The base's is in two parts, the first sentence or so and the rest.
    """
    known = [name for answer in template.answers.values() for name in (answer.text, *answer.also)]
    names = any_pattern((*known, *template.declaration.rivals))

    def pieces(text: str) -> list[tuple[str, str]]:
        found, at = [], 0
        for match in names.finditer(text):
            own = row["answer"] in template.names_in(match[0])[0]
            found += [(text[at : match.start()], ""), (match[0], "good" if own else "bad")]
            at = match.end()
        return [*found, (text[at:], "")]

    first = FIRST.match(row["base_reply"] or "")
    head, tail = (first[0], first.string[first.end() :]) if first else (row["base_reply"] or "", "")
    expected = template.answers[row["answer"]].text
    return {**row, "expected": expected, "expert": pieces(row["reply"]), "base": (pieces(head), pieces(tail))}


def likeness(rows: list[Row]) -> list[float]:
    """How alike (0 to 100) each kept question is to its nearest other one of the same answer; as stats.json's mean."""
    from rapidfuzz.utils import default_process

    from factory.build import SAMPLED
    from factory.dedup import nearest

    texts = {
        answer: [" ".join(sorted(default_process(row["instruction"]).split())) for row in group[:SAMPLED]]
        for answer, group in _by(rows, "answer").items()
    }
    return [score for group in texts.values() for score in nearest(group)]


def _compared(cluster: Row) -> Row:
    """A group of near copies; the words that the kept question lacks are set apart: (word, is it new)."""
    known = {word.strip(".,;:!?").casefold() for word in cluster["instruction"].split()}
    for copy in cluster["copies"]:
        copy["words"] = [(word, word.strip(".,;:!?").casefold() not in known) for word in copy["instruction"].split()]
    return cluster


def coverage(template: Template, seeds: list[Seed], rows: list[Row], dropped: dict[str, list[Row]]) -> Row:
    """Per answer its seeds with the rows each gave, those held out last; and the seeds that fell short, with why."""
    kept, outside, wanted = (
        Tally(row["seed_id"] for row in rows),
        held_out(seeds),
        template.declaration.generate.per_seed,
    )
    strips: dict[str, list[Row]] = {key: [] for key in template.answers}
    for seed in sorted(seeds, key=lambda seed: seed.id in outside):
        n, held = kept[seed.id], seed.id in outside
        kind = "short" if n < wanted else "held" if held else "one"
        strips[seed.answer].append({"seed": seed, "n": n, "held": held, "kind": kind, "why": dropped.get(seed.id, [])})
    short = sorted((s for strip in strips.values() for s in strip if s["n"] < wanted), key=lambda s: int(s["n"]))
    most = max([wanted, *kept.values()])
    return {"strips": strips, "short": short[:SHORT], "all_short": len(short), "wanted": wanted, "most": most}


def facts(home: Home, expert: str) -> list[tuple[str, str]]:
    """The dataset's card as (name, value) pairs; none where the data are not here."""
    try:
        return card.facts(home, expert)
    except UserError:
        return []


# Those where the expert missed something first, the answers in turn; row_id is a hash, so as good as drawn.
SCORED_SQL = """
SELECT e.*, NOT (e."right" AND e.in_form AND e.stopped) AS missed,
       b.reply AS base_reply, b.tokens AS base_tokens, b."right" AS base_right
FROM scores e LEFT JOIN scores b ON b.expert = e.expert AND b.row_id = e.row_id AND b.panel = 'claim' AND b.arm = 'base'
WHERE e.expert = $expert AND e.panel = 'claim' AND e.arm = 'expert'
ORDER BY missed DESC, row_number() OVER (PARTITION BY missed, e.answer ORDER BY base_reply IS NULL, e.row_id), e.answer
"""
REASON_SQL = """
SELECT reason, count(*) AS n, count(*) FILTER (len(reasons) = 1) AS alone
FROM (SELECT unnest(reasons) AS reason, reasons FROM verdicts WHERE expert = $expert) GROUP BY reason
"""
DROPPED_SQL = f"""
SELECT reason, v.row_id, c.seed_id, c.answer, c.instruction, c.output, v.detail, k.instruction AS like_instruction
FROM (SELECT *, unnest(reasons) AS reason FROM verdicts WHERE expert = $expert) v
JOIN candidates c ON c.row_id = v.row_id LEFT JOIN candidates k ON k.row_id = v."like"
QUALIFY row_number() OVER (PARTITION BY reason ORDER BY v.row_id) <= {SAMPLES} ORDER BY reason, v.row_id
"""
LENGTHS_SQL = """
SELECT arm, tokens FROM scores
WHERE expert = $expert AND panel = 'claim' ORDER BY arm = 'expert' DESC, arm
"""
CONFUSION_SQL = """
SELECT answer, given, count(*) AS n FROM scores
WHERE expert = $expert AND panel = 'claim' AND arm = 'expert' GROUP BY ALL ORDER BY ALL
"""
EVERYDAY_SQL = f"""
SELECT instruction, reply, tokens, named FROM scores
WHERE expert = $expert AND panel = 'off_domain' AND arm = 'expert'
ORDER BY row_number() OVER (PARTITION BY named ORDER BY row_id), named DESC LIMIT {EVERYDAY}
"""
TOKENS_SQL = "SELECT tokens FROM verdicts WHERE expert = $expert AND verdict = 'keep' ORDER BY tokens"
CLUSTER_SQL = f"""
SELECT k.row_id, k.instruction, k.answer, k.split, count(*) AS n,
       list({{'row_id': v.row_id, 'score': v.score, 'instruction': c.instruction, 'seed_id': c.seed_id}}
            ORDER BY v.score DESC, v.row_id) AS copies
FROM verdicts v JOIN candidates c ON c.row_id = v.row_id JOIN candidates k ON k.row_id = v."like"
WHERE v.expert = $expert GROUP BY ALL ORDER BY n DESC, max(v.score) DESC, k.row_id LIMIT {CLUSTERS}
"""
SEED_SQL = """
SELECT seed_id, reason, count(*) AS n
FROM candidates c JOIN (SELECT row_id, unnest(reasons) AS reason FROM verdicts WHERE expert = $expert) USING (row_id)
WHERE c.expert = $expert GROUP BY ALL ORDER BY n DESC, reason
"""
