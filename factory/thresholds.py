"""`dmoe dedup`: what another threshold for near copies would do, from the pairs that build kept. Nothing is compared.

What falls here falls to a near copy; `surplus`, the cap on a seed's rows, comes after and is not counted.
"""

from collections import Counter
from typing import Any, NamedTuple

import numpy as np

from factory.blocking import Pairs
from factory.build import floor, item_of
from factory.dedup import Copy, Item, fall
from factory.errors import UserError
from factory.paths import Home
from factory.schema import CANDIDATES, PAIRS, VERDICTS, read_rows
from factory.template import read_template

REASONS = ("exact_copy", "near_copy", "like_held_out")
COLUMNS = ["threshold", "stay", "fall", *REASONS]


class Known(NamedTuple):
    """An expert's clean rows, their pairs, the template's threshold and the lowest that the pairs can answer."""

    items: list[Item]
    pairs: Pairs
    threshold: int
    floor: int


def known(home: Home, expert: str) -> Known:
    """Reads what `dmoe build` left.

    Raises:
        UserError: a table is missing, or at the template's threshold other rows fall than fell in the build.
    """
    threshold, made_by = read_template(home.template(expert)).declaration.dedup.instruction, f"dmoe build {expert}"
    candidates = read_rows(home.dataset(expert, "candidates.parquet"), CANDIDATES, f"dmoe generate {expert}")
    verdicts = read_rows(home.dataset(expert, "verdicts.parquet"), VERDICTS, made_by)
    rows = read_rows(home.dataset(expert, "pairs.parquet"), PAIRS, made_by)
    clean = {v["row_id"] for v in verdicts if set(v["reasons"]) <= {*REASONS, "surplus"}}
    items = [item_of(c) for c in candidates if c["row_id"] in clean]
    place = {item.row_id: i for i, item in enumerate(items)}
    left, right = (np.array([place[row[side]] for row in rows], np.int64) for side in ("row_id", "like"))
    pairs = Pairs(left, right, np.array([row["score"] for row in rows]))
    if set(fall(items, pairs, threshold)) != {v["row_id"] for v in verdicts if v["like"]}:
        raise UserError(
            f"{home.template(expert)}: dedup.instruction: {threshold} is new since the build\n  run: {made_by}"
        )
    return Known(items, pairs, threshold, floor(threshold))


def table(found: Known) -> list[tuple[Any, ...]]:
    """For thresholds from the floor up: how many rows stay and fall, and why; see COLUMNS."""
    rows = []
    for threshold in sorted({*range(found.floor, 101, 2), found.threshold, 100}):
        why = Counter(copy.reason for copy in fall(found.items, found.pairs, threshold).values())
        mark = " (template)" if threshold == found.threshold else ""
        counts = (why[reason] for reason in REASONS)
        rows.append((f"{threshold}{mark}", len(found.items) - why.total(), why.total(), *counts))
    return rows


def changed(found: Known, threshold: int) -> tuple[list[str], list[tuple[Any, ...]]]:
    """(columns, rows): what would newly fall or come back at `threshold`, and like which row, by likeness.

    Raises:
        UserError: the pairs do not reach so low.
    """
    if not found.floor <= threshold <= 100:
        cure = f"set dedup.instruction lower in the template and build again, for pairs below {found.floor}"
        raise UserError(f"--threshold {threshold}: pairs are known from {found.floor} to 100\n  then {cure}")
    now, then = (fall(found.items, found.pairs, at) for at in (found.threshold, threshold))
    by_id = {item.row_id: item for item in found.items}

    def row(change: str, row_id: str, copy: Copy) -> tuple[Any, ...]:
        texts = by_id[row_id].instruction, by_id[copy.like].instruction
        return change, round(copy.score, 1), row_id, texts[0], copy.like, texts[1]

    rows = [row("falls", i, copy) for i, copy in then.items() if i not in now]
    rows += [row("comes back", i, copy) for i, copy in now.items() if i not in then]
    return ["change", "score", "row", "instruction", "like", "its instruction"], sorted(rows, key=lambda r: -r[1])
