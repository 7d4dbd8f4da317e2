"""`dmoe diff`: how an expert's dataset has changed between two versions, in words, numbers and samples.

A version is the working tree, a folder, or a git revision, whose dvc.lock names the files in DVC's cache: DVC itself is
not asked. Rows are paired by seed and sample, so an edited form is a row changed, not one gone and one come.
"""

import configparser
import hashlib
import io
import re
import subprocess
from collections import Counter as Tally
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from factory.errors import UserError, relative
from factory.paths import Home
from factory.store import write_text
from factory.yaml12 import parse_yaml

if TYPE_CHECKING:
    from rich.console import Console

FILES = {"candidates.parquet": "generate", "verdicts.parquet": "build"}  # and the stage that makes each
COLUMNS = {
    "candidates.parquet": ["row_id", "seed_id", "split", "sample", "answer", "instruction", "output"],
    "verdicts.parquet": ["row_id", "verdict", "reasons", "detail", "tokens"],
}
COMPARED = ("split", "answer", "instruction", "output")
FIXED = ("candidates", "to train on", "held out", "dropped", "failed")
QUANTILES = {"shortest": 0.0, "5 %": 0.05, "median": 0.5, "95 %": 0.95, "longest": 1.0}
SAMPLES, LONGEST, BAR, NAMED = 5, 400, 24, 12  # samples each way, their characters, a bar's width, seeds named
Row = dict[str, Any]
Key = tuple[str, int]  # seed id, sample
Pair = tuple[float, float]


@dataclass(frozen=True)
class Version:
    """All candidates of one version with their verdicts."""

    name: str
    rows: dict[Key, Row]

    @property
    def kept(self) -> dict[Key, Row]:
        return {key: row for key, row in self.rows.items() if row["verdict"] == "keep"}

    @property
    def seeds(self) -> dict[str, tuple[str, str]]:
        """Seed id -> its own words and its answer: its sample 0."""
        return {seed: (row["instruction"], row["answer"]) for (seed, sample), row in self.rows.items() if sample == 0}


@dataclass(frozen=True)
class Sample:
    """One row as it was and as it is; either is None where there was, or is, no such row."""

    place: str
    why: str
    before: Row | None
    after: Row | None


@dataclass(frozen=True)
class Diff:
    """What has changed; every pair is (before, after)."""

    expert: str
    before: str
    after: str
    sentence: str
    counts: dict[str, int]  # rows added, removed, changed, unchanged
    samples: dict[str, list[Sample]]  # of the first three
    verdicts: dict[str, Pair]  # rows to train on, held out; candidates, dropped, failed; then each reason
    seeds: dict[str, list[str]]  # ids added, removed, edited
    tokens: dict[str, Pair]
    lengths: dict[str, list[int]]
    diversity: dict[str, Pair]


# -- where the data is --------------------------------------------------------------------------


def diff(home: Home, expert: str, revisions: str = "HEAD", before: Path | None = None) -> Diff:
    """`revisions`: one (compared with the working tree) or two (`A..B`); `before`: a folder in their place.

    Raises:
        UserError: the data of a version is not there; it names the command that brings it.
    """
    old, dots, new = revisions.partition("..")
    first = in_folder(before) if before else of_revision(home, expert, old or "HEAD")
    second = of_revision(home, expert, new or "HEAD") if dots else in_folder(home.dataset(expert, ""), expert)
    return compared(expert, first, second)


def in_folder(folder: Path, expert: str | None = None) -> Version:
    """What candidates.parquet and verdicts.parquet in `folder` hold; with `expert`, the working tree's."""
    for name, stage in FILES.items():
        if not (folder / name).exists():
            cure = f"\n  then run: dvc pull {stage}@{expert}, or dmoe {stage} {expert}" if expert else ""
            raise UserError(f"{relative(folder / name)}: there is no such file{cure}")
    return _version("working tree" if expert else relative(folder), [folder / name for name in FILES])


def of_revision(home: Home, expert: str, revision: str) -> Version:
    """What the dvc.lock of a git revision names, from DVC's cache; empty where it does not know the expert."""
    commit = _commit(home, revision)
    name = revision if commit.startswith(revision) else f"{revision} ({commit[:7]})"
    lock = _git(home, "show", f"{commit}:./dvc.lock")
    hashes = {f: _hash(lock or "", f"{stage}@{expert}", f"datasets/{expert}/{f}") for f, stage in FILES.items()}
    if not all(hashes.values()):
        return Version(f"{name}, which has no {expert}", {})
    paths = [cache_folder(home) / "files" / "md5" / md5[:2] / md5[2:] for md5 in hashes.values() if md5]
    for file, path in zip(FILES, paths, strict=True):
        if not path.is_file():
            raise UserError(
                f"datasets/{expert}/{file} of {name} is not in DVC's cache ({relative(path)})\n"
                f"  then run: dvc fetch --all-commits {' '.join(f'datasets/{expert}/{f}' for f in FILES)}"
            )
    return _version(name, paths)


def _git(home: Home, *words: str) -> str | None:
    """What git says, or None where it ends with an error."""
    try:
        done = subprocess.run(["git", *words], cwd=home.root, capture_output=True, text=True, encoding="utf-8")
    except FileNotFoundError:
        raise UserError("git is not installed; compare with a folder instead: dmoe diff NAME --before FOLDER") from None
    return done.stdout if done.returncode == 0 else None


def _commit(home: Home, revision: str) -> str:
    found = _git(home, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{revision}^{{commit}}")
    if found:
        return found.strip().splitlines()[-1]
    if _git(home, "rev-parse", "--git-dir") is None:
        raise UserError(f"{home.root} is no git repository; compare with a folder instead: --before FOLDER")
    shallow = (_git(home, "rev-parse", "--is-shallow-repository") or "").strip() == "true"
    cure = "git fetch --unshallow" if shallow else "git fetch, and see what there is: git log --oneline --all"
    why = " in this shallow clone" if shallow else ""
    raise UserError(f"there is no revision {revision!r}{why}\n  then run: {cure}")


def _hash(lock: str, stage: str, path: str) -> str | None:
    """The md5 of a stage's output. The stage's `outs` alone are parsed: the whole file would take a second."""
    block = re.search(rf"^  {re.escape(stage)}:\n((?:   .*\n?)*)", lock, re.M)
    outs = re.search(r"^    outs:\n((?:    [- ].*\n?)*)", block[1], re.M) if block else None
    entries = parse_yaml(outs[1], "dvc.lock") if outs else []
    return next((str(entry["md5"]) for entry in entries if entry.get("path") == path and "md5" in entry), None)


def cache_folder(home: Home) -> Path:
    """DVC's cache: `[cache] dir` of .dvc/config.local or .dvc/config, else .dvc/cache."""
    folder, place = home.root / ".dvc", "cache"
    for name in ("config", "config.local"):
        config = configparser.ConfigParser(interpolation=None)
        try:
            config.read(folder / name, encoding="utf-8")
        except (configparser.Error, UnicodeDecodeError) as error:
            raise UserError(f"{relative(folder / name)}: cannot be read: {str(error).splitlines()[0]}") from None
        place = config.get("cache", "dir", fallback=place)
    return folder / Path(place).expanduser()  # a relative one is relative to .dvc


def _version(name: str, paths: list[Path]) -> Version:
    candidates, verdicts = (_table(path, columns) for path, columns in zip(paths, COLUMNS.values(), strict=True))
    judged = {verdict["row_id"]: verdict for verdict in verdicts}
    if missing := [row["row_id"] for row in candidates if row["row_id"] not in judged]:
        raise UserError(
            f"{name}: {len(missing)} candidates have no verdict, the first is {missing[0]}: they are of two versions\n"
            "  then run: dvc repro, or dmoe build NAME"
        )
    return Version(name, {(row["seed_id"], row["sample"]): {**row, **judged[row["row_id"]]} for row in candidates})


def _table(path: Path, columns: list[str]) -> list[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:  # read_table would import pandas: a second
            rows: list[Row] = file.read(columns=columns).to_pylist()
    except (pa.ArrowException, OSError, KeyError) as error:
        raise UserError(f"{relative(path)}: damaged parquet ({error})\n  then run: dvc repro, or dvc pull") from None
    if rows and list(rows[0]) != columns:
        raise UserError(f"{relative(path)}: lacks {', '.join(c for c in columns if c not in rows[0])}: an older form")
    return rows


# -- what has changed ---------------------------------------------------------------------------


def compared(expert: str, before: Version, after: Version) -> Diff:
    """Everything that any of the three forms shows."""
    old, new = before.kept, after.kept
    both = old.keys() & new.keys()
    keys = {
        "added": new.keys() - old.keys(),
        "removed": old.keys() - new.keys(),
        "changed": {key for key in both if any(old[key][c] != new[key][c] for c in COMPARED)},
    }
    counts = {name: len(found) for name, found in keys.items()}
    counts["unchanged"] = len(both) - counts["changed"]
    samples = {name: [_sample(key, before, after) for key in _some(found)] for name, found in keys.items()}
    verdicts, seeds = _verdicts(before, after), _seeds(before.seeds, after.seeds)
    lengths = {name: sorted(row["tokens"] for row in kept.values()) for name, kept in (("before", old), ("after", new))}
    nothing = "no change" if before.rows == after.rows else "the same rows are kept; others have changed"
    said = "; ".join(_sentence(counts, verdicts, seeds)) or nothing
    return Diff(
        expert, before.name, after.name, f"{expert}: {said}", counts, samples, verdicts, seeds,
        {name: (_quantile(lengths["before"], q), _quantile(lengths["after"], q)) for name, q in QUANTILES.items()},
        lengths, _diversity(old, new),
    )  # fmt: skip


def _some(keys: set[Key]) -> list[Key]:
    """A few of `keys`, the same ones each time, each of a seed of its own where there are as many."""
    turn: Tally[str] = Tally()
    placed = []
    for key in sorted(keys, key=lambda key: hashlib.sha256(f"{key[0]}/{key[1]}".encode()).digest()):
        placed.append((turn[key[0]], key))
        turn[key[0]] += 1
    return [key for _, key in sorted(placed, key=lambda pair: pair[0])[:SAMPLES]]


def _sample(key: Key, before: Version, after: Version) -> Sample:
    was, now = before.rows.get(key), after.rows.get(key)
    old = _shown(was) if was and was["verdict"] == "keep" else None
    new = _shown(now) if now and now["verdict"] == "keep" else None
    return Sample(one_line(f"{key[0]}/{key[1]}"), _why(key, old, new, before, after), old, new)


def _why(key: Key, old: Row | None, new: Row | None, before: Version, after: Version) -> str:
    """Why a row came or went, or what of it has changed."""
    if old and new:
        return ", ".join(f"another {name}" for name in COMPARED if old[name] != new[name])
    other, seeds, when = (before, before.seeds, "was") if new else (after, after.seeds, "now")
    row = other.rows.get(key)
    if row is None:
        lone = "a new seed" if new else "its seed is gone"
        return lone if key[0] not in seeds else "asked for more" if new else "asked for less"
    return one_line(f"{when} {'failed' if row['verdict'] == 'fail' else 'dropped'}: {', '.join(row['reasons'])}")


def _shown(row: Row) -> Row:
    return {name: one_line(row[name]) for name in COMPARED} | {"tokens": row["tokens"]}


def one_line(text: str, longest: int = LONGEST) -> str:
    """`text` as it may be shown anywhere: without what moves a cursor or turns letters round, and not too long."""
    text = "".join(c if c.isprintable() else " " for c in text)
    return text if len(text) <= longest else text[: longest - 3] + "..."


def _verdicts(before: Version, after: Version) -> dict[str, Pair]:
    def count(version: Version) -> Tally[str]:
        rows, kept = version.rows.values(), version.kept.values()
        tally = Tally(reason for row in rows for reason in row["reasons"])
        tally["to train on"] = sum(row["split"] == "train" for row in kept)
        tally["held out"] = len(kept) - tally["to train on"]
        tally["candidates"] = len(rows)
        tally["dropped"] = sum(row["verdict"] == "drop" for row in rows)
        tally["failed"] = sum(row["verdict"] == "fail" for row in rows)
        return tally

    first, second = count(before), count(after)
    reasons = sorted((first | second).keys() - set(FIXED), key=lambda name: (-max(first[name], second[name]), name))
    return {name: (first[name], second[name]) for name in [*FIXED, *reasons]}


def _seeds(before: dict[str, tuple[str, str]], after: dict[str, tuple[str, str]]) -> dict[str, list[str]]:
    edited = {seed for seed in before.keys() & after.keys() if before[seed] != after[seed]}
    found = {"added": after.keys() - before.keys(), "removed": before.keys() - after.keys(), "edited": edited}
    return {name: [one_line(seed) for seed in sorted(seeds)] for name, seeds in found.items()}


def _quantile(ordered: list[int], share: float) -> int:
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0


def _diversity(old: dict[Key, Row], new: dict[Key, Row]) -> dict[str, Pair]:
    from factory.build import diversity

    names = {
        "distinct_2": "different word pairs",
        "distinct_3": "different word triples",
        "nearest": "likeness to the nearest",
    }
    questions = [[(row["answer"], row["instruction"]) for row in kept.values()] for kept in (old, new)]
    first = diversity(questions[0])
    second = first if questions[0] == questions[1] else diversity(questions[1])
    return {name: (first[key], second[key]) for key, name in names.items()}


def _sentence(counts: dict[str, int], verdicts: dict[str, Pair], seeds: dict[str, list[str]]) -> list[str]:
    """The parts of the change in plain words; none where no count has changed."""
    parts: list[str] = []
    for name in ("to train on", "held out"):
        was, now = verdicts[name]
        if was != now:
            rows = "" if parts else f" row{'s' * (abs(now - was) != 1)}"
            parts.append(f"{abs(now - was):,.0f}{rows} {'more' if now > was else 'fewer'} {name}")
    parts = [", ".join(parts)] if parts else []
    if counts["changed"]:
        parts.append(f"{counts['changed']:,} row{'s' * (counts['changed'] != 1)} changed")
    if not parts and counts["added"]:
        parts.append(f"as many rows, {counts['added']:,} of them others")
    parts += [f"{len(ids):,} seed{'s' * (len(ids) != 1)} {name}" for name, ids in seeds.items() if ids]
    moved = sorted(verdicts.items(), key=lambda item: -abs(item[1][1] - item[1][0]))
    for name, (was, now) in [item for item in moved if item[0] not in FIXED and item[1][0] != item[1][1]][:2]:
        parts.append(f"{name.replace('_', ' ')} {'up' if now > was else 'down'} from {was:,.0f} to {now:,.0f}")
    return parts


# -- how it is told -----------------------------------------------------------------------------


def bars(lengths: dict[str, list[int]]) -> list[tuple[str, list[tuple[str, int, str]]]]:
    """For each range of lengths that has rows: its label, and of either version its name, count and bar."""
    from factory.page import histogram

    h = histogram(dict(lengths), bins=10)
    width, lines = (h["high"] - h["low"]) / 10, []
    for i, both in enumerate(zip(*h["series"].values(), strict=True)):
        label = f"{h['low'] + i * width:.0f} to {h['low'] + (i + 1) * width:.0f}"
        marks = [(name, n, "#" * -(-BAR * n // max(1, h["most"]))) for name, n in zip(lengths, both, strict=True)]
        if any(both):
            lines.append((label, marks))
    return lines


def tables(diff: Diff) -> dict[str, list[tuple[str, str, str, str]]]:
    """The figures by title: name, before, after, and by how much, as text."""
    figures = {"Verdicts": diff.verdicts, "Length in tokens": diff.tokens, "Diversity of the questions": diff.diversity}
    return {
        title: [
            (name.replace("_", " "), f"{a:,}", f"{b:,}", f"{round(b - a, 3):+,}" if a != b else "")
            for name, (a, b) in rows.items()
        ]
        for title, rows in figures.items()
    }


def heading(diff: Diff, name: str) -> str:
    """The heading of one kind of rows."""
    n, shown = diff.counts[name], len(diff.samples[name])
    return f"{n:,} row{'s' * (n != 1)} {name}" + (f" ({shown} shown)" if shown < n else "")


def seeds_told(diff: Diff) -> list[str]:
    """Which seeds were added, removed, edited; one line each."""
    return [
        f"{len(ids)} {name}: {', '.join(ids[:NAMED])}{', ...' if len(ids) > NAMED else ''}"
        for name, ids in diff.seeds.items()
        if ids
    ]


def told_in_terminal(diff: Diff, console: "Console") -> None:
    """Prints it, for people."""
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    console.print(Text(diff.sentence, style="bold"))
    console.print(Text(f"{diff.before} -> {diff.after}", style="dim"))
    for line in seeds_told(diff):
        console.print(Text(f"seeds: {line}"))
    for title, rows in tables(diff).items():
        table = Table(title, "before", "after", "change", box=None, padding=(0, 2, 0, 0), title_justify="left")
        for row in rows:
            table.add_row(*map(Text, row), style="" if row[3] else "dim")
        console.print("", table)
    console.print()
    for label, marks in bars(diff.lengths):
        for name, n, bar in marks:
            line = f"{label if name == 'before' else '':>9}  {name:<6}  {bar:<{BAR}}  {n:,}"
            console.print(Text(line, style="blue" if name == "before" else "yellow"))
    for name, samples in diff.samples.items():
        console.print(Text(f"\n{heading(diff, name)}", style="bold"))
        for sample in samples:
            console.print(Text(f"  {sample.place}: {sample.why}", style="dim"))
            for sign, style, side in (("-", "red", sample.before), ("+", "green", sample.after)):
                if side:
                    text = f"{sign} {side['instruction']}\n  -> {side['output']} ({side['tokens']} tokens)"
                    console.print(Padding(Text(text, style=style), (0, 0, 0, 4)))


def markdown(diff: Diff) -> str:
    """The same for a pull request. Seeds are foreign text: nothing in it can be markup, a link or a mention."""
    lines = [f"### {quoted(diff.sentence, code=False)}", "", f"{quoted(diff.before)} \u2192 {quoted(diff.after)}", ""]
    lines += [f"- seeds: {quoted(line)}" for line in seeds_told(diff)]
    for title, rows in tables(diff).items():
        lines += ["", f"| {title} | before | after | change |", "|---|---:|---:|---:|"]
        lines += ["| " + " | ".join(row) + " |" for row in rows if row[3] or row[0] in FIXED or title != "Verdicts"]
    lines += ["", "<details><summary>Lengths</summary>", "", "```"]
    for label, marks in bars(diff.lengths):
        lines += [f"{label if n == 'before' else '':>9}  {n:<6}  {bar:<{BAR}}  {count:,}" for n, count, bar in marks]
    lines += ["```", "", "</details>"]
    for name, samples in diff.samples.items():
        if samples:
            lines += ["", f"#### {heading(diff, name)}", ""]
            lines += ["| row | why | | question | reply |", "|---|---|---|---|---|"]
        for sample in samples:
            for word, side in (("before", sample.before), ("after", sample.after)):
                if side:
                    cells = (sample.place, sample.why, word, side["instruction"], side["output"])
                    lines.append("| " + " | ".join(map(quoted, cells)) + " |")
    return "\n".join(lines) + "\n"


def quoted(text: str, code: bool = True) -> str:
    """`text` inside Markdown, as nothing but text.

    Punctuation as numbers cannot be Markdown, HTML or an address; GitHub looks for mentions and issues outside `code`.
    """
    plain = re.sub(r"[^\w\s,?!';:()/+=%.-]|:(?=/)|\.(?=\w)|_", lambda match: f"&#{ord(match[0])};", one_line(text))
    return f"<code>{plain}</code>" if code else plain


def html(diff: Diff) -> str:
    """The same as one page that opens from disk."""
    from factory.page import render

    return render("diff.html", diff=diff, tables=tables(diff), heading=heading, seeds=seeds_told(diff))


def write(diff: Diff, form: str, out: Path | None) -> None:
    """Prints the diff as `form` (terminal, markdown, html), or writes it to `out`, whole."""
    import sys

    from rich.console import Console

    if form == "terminal":
        told = io.StringIO()
        width = None if sys.stdout.isatty() and not out else 110
        told_in_terminal(diff, Console(file=told if out else sys.stdout, width=width, highlight=False))
        if out:
            write_text(out, told.getvalue())
        return
    text = markdown(diff) if form == "markdown" else html(diff)
    if out:
        write_text(out, text)
    else:
        sys.stdout.write(text)
