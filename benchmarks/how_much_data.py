"""How much data does an expert need? What it answers by rows, by variants of a seed, by seeds of an answer.

Adapters are trained on nested subsets of the expert's own rows, whole seeds first, all answers in turn, exported, and
asked one question a seed in llama.cpp. Passes over the rows are the template's, so fewer rows are fewer steps; one
panel keeps the steps instead. Beside it a classifier that knows the same rows' words alone.

Questions are *validation* seeds: a quarter of the training seeds of each answer, chosen by the hash that chose the
held-out ones, and not trained on here. What is chosen by this benchmark is so never chosen on the questions that are
reported. `--holdout` trains on all training seeds and asks the held-out ones, to confirm once what was chosen.

Writes docs/data/how_much_data.csv and docs/how_much_data.svg. A point once measured is kept in .dmoe/how-much-data:
a killed run goes on. One training seed a point.
Run: python benchmarks/how_much_data.py [EXPERT ...] [--holdout | --recipe] [--try]
     --recipe   passes and learning rate on all rows instead, on validation seeds alone; printed
     --try      tiny: one pass, few points and questions; into build/
About 11 (product), 17 (medical) and 26 minutes (legal) on two quiet cores.
"""

import argparse
import csv
import hashlib
import json
import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rich.console import Console
from rich.table import Table

from factory.llama import many_asked
from factory.paths import Home, Profile, find_home, read_params, read_profile
from factory.schema import CANDIDATES, ROWS, VERDICTS, read_rows
from factory.seeds import held_out, read_seeds
from factory.store import read_json, sha256, whole, write_json, write_text
from factory.template import Template, read_template
from train.base import read_config
from train.base_gguf import base_gguf
from train.export import export_adapter
from train.figures import brief, lexical_ceiling
from train.panel import plain, spread
from train.score import AT_ONCE, Asker, Case, ask_all
from train.sft import Run, fit, load

ROW_COUNTS = (25, 50, 100, 200, 400, 800)
MOST_TOKENS = 128  # an expert ends long before; an answer that comes later is none of its own
SAME_STEPS = (100,)  # and all
VARIANTS = (1, 2, 4)  # of a seed; with all seeds no more than the template trains on
SEEDS = (1, 4, 16, 64)  # of one answer, and all
RECIPE = {"passes": (0.5, 1, 2), "learning rate": (0.5, 1)}  # times the template's and the profile's
MEASURES = ("mention", "right", "in_form")
Row = dict[str, Any]


@dataclass(frozen=True)
class Point:
    """One adapter: what it is trained on, and how."""

    panel: str
    x: float
    rows: list[Row]
    passes: float
    rate: float


@dataclass(frozen=True)
class Study:
    """One expert, its base, its rows by seed in the order in which they are taken, and what is asked."""

    home: Home
    expert: str
    profile: Profile
    template: Template
    base: Path
    seeds: list[list[Row]]  # the rows that are trained on first, then those that were surplus
    questions: list[Row]

    def taken(self, seeds: int | None = None, variants: int | None = None, rows: int | None = None) -> list[Row]:
        """The first rows: of so many seeds, so many of each, so many in all."""
        variants = variants or self.template.declaration.generate.per_seed
        return [row for of_seed in self.seeds[:seeds] for row in of_seed[:variants]][:rows]


# -- rows and questions ---------------------------------------------------------------------------


def study(home: Home, expert: str, on_holdout: bool) -> Study:
    """Rows to train on and questions to ask; by default none of the reported questions are read."""
    template, profile = read_template(home.template(expert)), read_profile(home, read_params(home).profile)
    by_seed = rows_by_seed(home, expert)
    if on_holdout:
        asked = read_rows(home.dataset(expert, "holdout.parquet"), ROWS, f"dmoe build {expert}")
    else:
        trained = [seed for seed in read_seeds(home.seeds(expert), template) if seed.id in by_seed]
        asked = [row for seed in sorted(held_out(trained)) for row in by_seed.pop(seed)]
    questions = spread(asked, len({row["seed_id"] for row in asked}))
    return Study(home, expert, profile, template, base_gguf(home, profile), in_turn(by_seed), questions)


def rows_by_seed(home: Home, expert: str) -> dict[str, list[Row]]:
    """Training rows of each seed, then those that were dropped only because the seed had enough."""
    found: dict[str, list[Row]] = defaultdict(list)
    for row in read_rows(home.dataset(expert, "train.parquet"), ROWS, f"dmoe build {expert}"):
        found[row["seed_id"]].append(row)
    verdicts = read_rows(home.dataset(expert, "verdicts.parquet"), VERDICTS, f"dmoe build {expert}")
    surplus = {verdict["row_id"] for verdict in verdicts if verdict["reasons"] == ["surplus"]}
    for row in read_rows(home.dataset(expert, "candidates.parquet"), CANDIDATES, f"dmoe generate {expert}"):
        if row["row_id"] in surplus and row["seed_id"] in found:
            prompt = [{"role": "user", "content": row["instruction"]}]
            completion = [{"role": "assistant", "content": row["output"]}]
            whole_row = {**row, "prompt": prompt, "completion": completion}
            found[row["seed_id"]].append({name: whole_row[name] for name in ROWS.columns})
    return dict(found)


def in_turn(by_seed: dict[str, list[Row]]) -> list[list[Row]]:
    """Seeds of all answers in turn, within an answer in order of hash: any first part holds the answers evenly."""
    by_answer: dict[str, list[str]] = defaultdict(list)
    for seed in sorted(by_seed, key=lambda i: hashlib.sha256(i.encode()).hexdigest()):
        by_answer[by_seed[seed][0]["answer"]].append(seed)
    ranked = sorted((i, answer, seed) for answer, ids in by_answer.items() for i, seed in enumerate(ids))
    return [by_seed[seed] for _, _, seed in ranked]


# -- points ---------------------------------------------------------------------------------------


def points(s: Study) -> Iterator[Point]:
    """Every adapter of the plot; those that several panels share are trained once."""
    passes, rate = (
        s.template.declaration.train.epochs * s.profile.train.epochs_factor,
        s.profile.train.learning_rate,
    )
    count, answers, everything = len(s.seeds), len(s.template.answers), len(s.taken())
    counts = [n for n in (*ROW_COUNTS, everything) if n <= everything]
    batch = s.profile.train.examples_per_step
    for n in counts:
        yield Point("rows", n, s.taken(rows=n), passes, rate)
    for n in (n for n in counts if n in SAME_STEPS or n == everything):
        longer = passes * -(-everything // batch) / -(-n // batch)
        yield Point("rows, same steps", n, s.taken(rows=n), longer, rate)
    for v in VARIANTS:
        yield Point("variants, rows fixed", v, s.taken(variants=v, rows=count), passes, rate)
    for v in (v for v in VARIANTS if v <= s.template.declaration.generate.per_seed):
        yield Point("variants, seeds fixed", v, s.taken(variants=v), passes, rate)
    most = count // answers
    for k in [*(k for k in SEEDS if 1.5 * k < most), most]:
        yield Point("seeds an answer", k, s.taken(seeds=k * answers), passes, rate)


def recipes(s: Study) -> Iterator[Point]:
    """Passes and learning rate on all rows."""
    passes, rate = (
        s.template.declaration.train.epochs * s.profile.train.epochs_factor,
        s.profile.train.learning_rate,
    )
    for more in RECIPE["passes"]:
        for faster in RECIPE["learning rate"]:
            yield Point(f"recipe: {passes * more:g} passes", rate * faster, s.taken(), passes * more, rate * faster)


def tiny(s: Study, some: list[Point]) -> tuple[Study, list[Point]]:
    """The same for a try: the two smallest points of each panel, one pass, eight questions."""
    first = [p for p in some if p.x in sorted({q.x for q in some if q.panel == p.panel})[:2]]
    return replace(s, questions=s.questions[:8]), [replace(p, rows=p.rows[:32], passes=1) for p in first]


def measured(s: Study, point: Point) -> Row:
    """{steps, replies: [...]} of one adapter, kept by a hash of all that it follows from."""
    template, taught = s.template.declaration.train, s.profile.train
    recipe = {"learning_rate": point.rate, "epochs_factor": point.passes / template.epochs}
    profile = replace(s.profile, train=taught.model_copy(update=recipe))
    inputs = [
        sha256(s.base), sha256(s.home.root / "train" / "sft.py"), profile.train.model_dump(), template.model_dump(),
        [[row["instruction"], row["output"]] for row in point.rows],
        [[row["instruction"], row["answer"]] for row in s.questions], s.template.declaration.model_dump(mode="json"),
    ]  # fmt: skip
    key = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:24]
    kept = s.home.work / "how-much-data" / f"{key}.json"
    if not kept.exists():
        write_json(kept, trained(s, profile, point))
    return dict(read_json(kept))


def trained(s: Study, profile: Profile, point: Point) -> Row:
    """Trains, exports and asks."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        trainer = fit(load(s.home, profile), s.template, profile, point.rows, Run(point.panel, folder / "state"))
        trainer.model.save_pretrained(folder / "adapter")
        gguf = folder / "adapter.gguf"
        export_adapter(folder / "adapter", read_config(s.home, profile), gguf, {"general.name": s.expert})
        short = {"max_tokens": MOST_TOKENS}
        cases = [Case("claim", "plain", "expert", 1.0, q, plain(q["instruction"]), short) for q in s.questions]
        log = s.home.work / "logs" / "how-much-data.log"
        with many_asked(s.base, [gguf], at_once=AT_ONCE, context=2048, log=log) as servers:
            replies = ask_all(Asker(servers, s.home, s.base), s.template, cases, "asked")
    columns = ("seed_id", "answer", "tokens", "given", *MEASURES)
    return {"steps": trainer.state.global_step, "replies": [{name: row[name] for name in columns} for row in replies]}


def line(s: Study, point: Point, asked: str) -> Row:
    """One line of the table."""
    found = measured(s, point)
    figures = brief(found["replies"])
    made: Row = {
        "expert": s.expert, "panel": point.panel, "x": point.x, "rows": len(point.rows),
        "seeds": len({row["seed_id"] for row in point.rows}), "answers": len({row["answer"] for row in point.rows}),
        "passes": round(point.passes, 2), "steps": found["steps"], "learning_rate": point.rate, "asked": asked,
        "questions": figures["n"],
    }  # fmt: skip
    for name in MEASURES:
        made |= {
            name: figures[name]["rate"],
            f"{name}_low": figures[name]["low"],
            f"{name}_high": figures[name]["high"],
        }
    words = round(lexical_ceiling(point.rows, s.questions), 3) if made["answers"] > 1 else ""  # one answer: no choice
    return made | {"words_alone": words}


# -- what is shown --------------------------------------------------------------------------------


def show(lines: list[Row]) -> None:
    names = ("expert", "panel", "x", "rows", "seeds", "answers", "passes", "steps")
    table = Table(*names, *MEASURES, "words", title=f"asked: {lines[0]['asked']} seeds, one question each")
    for at, before in zip(lines, [lines[0], *lines], strict=False):
        if (at["expert"], at["panel"]) != (before["expert"], before["panel"]):
            table.add_section()
        rates = [f"{at[m]:.2f} ({at[m + '_low']:.2f}-{at[m + '_high']:.2f})" for m in MEASURES]
        table.add_row(
            *(f"{at[name]:g}" if name == "x" else str(at[name]) for name in names), *rates, str(at["words_alone"])
        )
    Console(width=160).print(table)


WIDE, HIGH, LEFT, TOP, GAP = 190, 150, 92, 46, 22  # of a panel, before the first, between two; pixels
STYLE = """text{font:12px system-ui,sans-serif;fill:#333} path{fill:none;stroke-width:2}
.g{stroke:#ddd;stroke-width:1} .w{stroke-width:1;opacity:.6} .words{stroke:#777;stroke-dasharray:4 3}
.right{stroke:#0b6e99} .mention{stroke:#c4622d} circle.right{fill:#0b6e99} circle.mention{fill:#c4622d}
@media(prefers-color-scheme:dark){svg{background:#16181c} text{fill:#ccc} .g{stroke:#3a3d44}}"""


def svg(lines: list[Row]) -> str:
    """One figure: a row of panels an expert, rates with 95 % whiskers over x in powers of two."""
    experts, names = (list(dict.fromkeys(at[key] for at in lines)) for key in ("expert", "panel"))
    width, height = LEFT + len(names) * (WIDE + GAP), TOP + len(experts) * (HIGH + 44)
    parts = [f'<text x="{LEFT + i * (WIDE + GAP)}" y="38">{name}</text>' for i, name in enumerate(names)]
    keys = (("mention", "an answer is given"), ("right", "the right one"), ("words", "words alone find it"))
    for i, (kind, text) in enumerate(keys):
        parts.append(
            f'<path class="{kind}" d="M{LEFT + 150 * i} 12h22"/><text x="{LEFT + 150 * i + 28}" y="16">{text}</text>'
        )
    for j, expert in enumerate(experts):
        y = TOP + j * (HIGH + 44)
        parts.append(f'<text x="4" y="{y + HIGH / 2}">{escape(expert)}</text>')
        for i, name in enumerate(names):
            here = [at for at in lines if (at["expert"], at["panel"]) == (expert, name)]
            parts += panel(here, LEFT + i * (WIDE + GAP), y) if here else []
    title = "<title>Answer rates by rows, variants of a seed and seeds of an answer</title>"
    view = f'xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img"'
    return "\n".join([f"<svg {view}>{title}<style>{STYLE}</style>", *parts, "</svg>", ""])


def panel(lines: list[Row], x: int, y: int) -> list[str]:
    """Axes, ticks and the curves of one panel with its upper left corner at (x, y)."""
    low, high = (float(edge(at["x"] for at in lines)) for edge in (min, max))

    def across(value: float) -> float:
        return round(x + 8 + (WIDE - 16) * (math.log2(value / low) / math.log2(high / low) if high > low else 0.5), 1)

    def up(rate: float) -> float:
        return round(y + HIGH * (1 - rate), 1)

    parts = []
    for rate in (0, 0.5, 1):
        parts.append(f'<path class="g" d="M{x} {up(rate)}h{WIDE}"/>')
        if x == LEFT:
            parts.append(f'<text x="{x - 4}" y="{up(rate) + 4}" text-anchor="end">{rate:g}</text>')
    ticks = [at["x"] for i, at in enumerate(lines) if i % 2 == 0 or len(lines) < 6]
    parts += [f'<text x="{across(v)}" y="{y + HIGH + 16}" text-anchor="middle">{v:g}</text>' for v in ticks]
    for kind in ("mention", "right"):
        at = [(across(line["x"]), up(line[kind])) for line in lines]
        parts.append(f'<path class="{kind}" d="M{" L".join(f"{a} {b}" for a, b in at)}"/>')
        for (a, b), line in zip(at, lines, strict=True):
            whisker = f"M{a} {up(line[kind + '_low'])}V{up(line[kind + '_high'])}"
            parts.append(f'<path class="{kind} w" d="{whisker}"/><circle class="{kind}" cx="{a}" cy="{b}" r="3"/>')
    words = [(across(line["x"]), up(line["words_alone"])) for line in lines if line["words_alone"] != ""]
    return parts + ([f'<path class="words" d="M{" L".join(f"{a} {b}" for a, b in words)}"/>'] if words else [])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experts", nargs="*", default=["product", "medical", "legal"])
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--validation", action="store_true", help="ask validation seeds (this is the default)")
    which.add_argument("--holdout", action="store_true", help="ask the reported held-out seeds")
    which.add_argument("--recipe", action="store_true", help="sweep passes and learning rate, on validation seeds")
    parser.add_argument("--try", action="store_true", dest="small", help="tiny, to see that it runs")
    wanted = parser.parse_args()
    home, lines = find_home(), []
    for expert in wanted.experts:
        s = study(home, expert, wanted.holdout)
        some = list(recipes(s) if wanted.recipe else points(s))
        s, some = tiny(s, some) if wanted.small else (s, some)
        for i, point in enumerate(some, 1):
            Console(stderr=True).print(f"{expert}, {i} of {len(some)}: {point.panel}, {point.x:g}", style="bold")
            lines.append(line(s, point, "held-out" if wanted.holdout else "validation"))
    show(lines)
    if not wanted.recipe:
        write(home.root / ("build" if wanted.small else "docs"), "_holdout" if wanted.holdout else "", lines)


def write(folder: Path, suffix: str, lines: list[Row]) -> None:
    with whole(folder / "data" / f"how_much_data{suffix}.csv") as out, out.open("w", newline="") as file:
        table = csv.DictWriter(file, list(lines[0]), lineterminator="\n")
        table.writeheader()
        table.writerows(lines)
    write_text(folder / f"how_much_data{suffix}.svg", svg(lines))


if __name__ == "__main__":
    main()
