"""Near copies: which rows stay, which fall, to which row and at what likeness. Pure.

Likeness is rapidfuzz's token-sort ratio (0 to 100) of the *instructions*: outputs are meant to be
alike. Only rows of one answer are compared: "my head hurts" and "my hand hurts" are 97 alike and
are exactly the rows that teach the difference. What falls is what comparing all pairs would say;
`blocking.py` finds the pairs of many rows without that.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from rapidfuzz import fuzz, process
from rapidfuzz.utils import default_process

from factory import blocking
from factory.blocking import Array, Pairs, Texts

FEW = 100  # texts that are compared sooner than threads are started
SOME = 1000  # texts that are compared sooner than counted
BLOCK = (1 << 12, 1 << 16)  # rows that are compared with the kept ones at a time: the first, the largest


@dataclass(frozen=True)
class Item:
    """One row as dedup sees it."""

    row_id: str
    answer: str
    instruction: str
    held_out: bool


@dataclass(frozen=True)
class Copy:
    """Why a row falls: like which kept row, how much."""

    reason: str  # exact_copy, near_copy or like_held_out
    like: str
    score: float


def copies(items: list[Item], threshold: float) -> dict[str, Copy]:
    """The rows that fall, by row_id; the same as comparing all pairs of an answer by brute force.

    Held-out rows come first, so that a training row falls to a held-out one and never the other way
    round; among equals the earlier row stays. A row is compared with kept rows alone.
    """
    return fall(items, _pairs(items, lambda texts, rows: _to_kept(texts, rows, threshold), threshold), threshold)


def alike(items: list[Item], floor: float) -> Pairs:
    """All pairs of `items`, by their places, that can decide what falls at `floor` or at any threshold above it.

    Those are the pairs of different texts of one answer, and for each further row of a text the one with its first
    row, at 100. They come in the order of the later row, then of the earlier one.
    """

    def all_of_them(texts: Texts, rows: Array) -> Pairs:
        return blocking.pairs(texts, np.arange(len(texts.texts)), None, floor)

    pairs, rank = _pairs(items, all_of_them, floor), np.argsort(_order(items))
    order = np.lexsort((rank[pairs.right], rank[pairs.left]))
    return Pairs(*(part[order] for part in pairs))


def fall(items: list[Item], pairs: Pairs, threshold: float) -> dict[str, Copy]:
    """What `copies` finds at `threshold`, from the pairs that `alike` found at a floor not above it."""
    near: defaultdict[int, list[tuple[int, float]]] = defaultdict(list)
    first: dict[int, int] = {}
    for i, j, score in zip(pairs.left.tolist(), pairs.right.tolist(), pairs.score.tolist(), strict=True):
        if score == 100:
            first[i] = j
        elif score >= threshold:
            near[i].append((j, score))
            near[j].append((i, score))
    kept: dict[int, int] = {}
    found: dict[str, Copy] = {}
    for i in _order(items):
        own = first.get(i, i)
        scores = [(100.0, -kept[own], own)] if own in kept else []
        scores += [(score, -kept[j], j) for j, score in near.get(own, ()) if j in kept]
        if scores:
            score, _, best = max(scores)
            found[items[i].row_id] = Copy(_reason(items[i], items[best], score), items[best].row_id, score)
        else:
            kept[i] = len(kept)
    return found


def _order(items: list[Item]) -> list[int]:
    """Places of the held-out items, then of the others."""
    return sorted(range(len(items)), key=lambda i: not items[i].held_out)


def _reason(item: Item, other: Item, score: float) -> str:
    if other.held_out and not item.held_out:
        return "like_held_out"
    return "exact_copy" if score == 100 else "near_copy"


def _pairs(items: list[Item], find: Callable[[Texts, Array], Pairs], cutoff: float) -> Pairs:
    """The pairs of each answer's different texts, and of each further row of a text with its first row."""
    found = [np.empty((0, 3))]
    for places in _groups(items):
        # Sorting the tokens once and taking the plain ratio gives the token-sort ratio, several times faster.
        sorted_ = [" ".join(sorted(default_process(items[i].instruction).split())) for i in places]
        numbers: dict[str, int] = {}
        rows = [numbers.setdefault(text, len(numbers)) for text in sorted_]
        texts, firsts = list(numbers), np.full(len(numbers), -1)
        again = []
        for place, number in zip(places, rows, strict=True):
            if firsts[number] < 0:
                firsts[number] = place
            else:
                again.append((place, firsts[number], 100))
        near = _few(texts, cutoff) if len(texts) <= SOME else find(blocking.read(texts), np.array(rows))
        late, early = np.maximum(near.left, near.right), np.minimum(near.left, near.right)
        found += [np.column_stack((firsts[late], firsts[early], near.score)), np.array(again).reshape(-1, 3)]
    left, right, score = np.concatenate(found).T
    return Pairs(left.astype(np.int64), right.astype(np.int64), score)


def _groups(items: list[Item]) -> Iterator[list[int]]:
    groups: defaultdict[str, list[int]] = defaultdict(list)
    for i in _order(items):
        groups[items[i].answer].append(i)
    return iter(groups.values())


def _few(texts: list[str], cutoff: float) -> Pairs:
    """All pairs of a few texts."""
    workers = -1 if len(texts) > FEW else 1
    likeness = process.cdist(texts, texts, scorer=fuzz.ratio, score_cutoff=cutoff, dtype=np.float32, workers=workers)
    left, right = np.nonzero(np.tril(likeness >= cutoff, -1))
    return Pairs(left, right, likeness[left, right])


def _to_kept(texts: Texts, rows: Array, threshold: float) -> Pairs:
    """Of the pairs of texts those with a text whose row stays; `rows` are the texts' numbers in the rows' order.

    Blocks of rows are compared with what was kept before them, so that many copies make it faster, not slower.
    """
    kept = np.zeros(len(texts.texts), bool)
    found = []
    start, size = 0, BLOCK[0]
    while start < len(rows):
        block = np.unique(rows[start : start + size])
        block = block[~kept[block]]
        before = blocking.pairs(texts, block, np.flatnonzero(kept), threshold)
        fallen = np.isin(block, before.left) | np.isin(block, before.right)
        rest = block[~fallen]
        within = blocking.pairs(texts, rest, None, threshold)
        across = blocking.pairs(texts, block[fallen], rest, threshold)
        kept[_staying(rest, within)] = True
        found += [before, *(_with(pairs, kept) for pairs in (within, across))]
        start, size = start + size, min(2 * size, BLOCK[1])
    return Pairs(*(np.concatenate(part) for part in zip(*found, strict=True)))


def _staying(rest: Array, pairs: Pairs) -> list[int]:
    """Those of `rest` that stay when each falls to any earlier one that stays."""
    late, early = np.maximum(pairs.left, pairs.right), np.minimum(pairs.left, pairs.right)
    order = np.lexsort((early, late))
    fallen: set[int] = set()
    for i, j in zip(late[order].tolist(), early[order].tolist(), strict=True):
        if j not in fallen:
            fallen.add(i)
    return [i for i in rest.tolist() if i not in fallen]


def _with(pairs: Pairs, kept: Array) -> Pairs:
    """The pairs of which a text is kept."""
    keep = kept[pairs.left] | kept[pairs.right]
    return Pairs(*(part[keep] for part in pairs))


def nearest(texts: list[str]) -> list[float]:
    """The likeness (0 to 100) of each of `texts`, whose words are sorted, to its nearest other one."""
    if len(texts) < 2:
        return []
    likeness = process.cdist(texts, texts, scorer=fuzz.ratio, dtype=np.float32, workers=-1)
    np.fill_diagonal(likeness, 0.0)
    return [float(score) for score in likeness.max(axis=1)]
