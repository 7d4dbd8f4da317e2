"""Near copies: which rows stay, which fall, to which row and at what likeness. Pure.

Likeness is rapidfuzz's token-sort ratio (0 to 100) of the *instructions*: outputs are meant to be
alike. Only rows of one answer are compared: "my head hurts" and "my hand hurts" are 97 alike and
are exactly the rows that teach the difference.
"""

from dataclasses import dataclass

import numpy as np
from rapidfuzz import fuzz, process
from rapidfuzz.utils import default_process

FEW = 100  # texts that are compared sooner than threads are started


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


def copies(items: list[Item], threshold: int) -> dict[str, Copy]:
    """The rows that fall, by row_id; the same as comparing all pairs of an answer by brute force.

    Held-out rows come first, so that a training row falls to a held-out one and never the other way
    round; among equals the earlier row stays. A row is compared with kept rows alone.
    """
    found: dict[str, Copy] = {}
    for answer in dict.fromkeys(item.answer for item in items):
        group = sorted((i for i in items if i.answer == answer), key=lambda item: not item.held_out)
        found |= _group(group, threshold)
    return found


def _group(group: list[Item], threshold: int) -> dict[str, Copy]:
    # Sorting the tokens once and taking the plain ratio gives the token-sort ratio, several times faster.
    texts = [" ".join(sorted(default_process(item.instruction).split())) for item in group]
    workers = -1 if len(texts) > FEW else 1
    likeness = process.cdist(texts, texts, scorer=fuzz.ratio, score_cutoff=threshold, dtype=np.float32, workers=workers)
    kept: list[int] = []
    found: dict[str, Copy] = {}
    for i, item in enumerate(group):
        scores = likeness[i, kept]
        if len(kept) and scores.max() >= threshold:
            best = kept[int(scores.argmax())]
            found[item.row_id] = Copy(
                _reason(item, group[best], texts[i] == texts[best]), group[best].row_id, float(scores.max())
            )
        else:
            kept.append(i)
    return found


def _reason(item: Item, other: Item, same: bool) -> str:
    if other.held_out and not item.held_out:
        return "like_held_out"
    return "exact_copy" if same else "near_copy"


def nearest(texts: list[str]) -> list[float]:
    """The likeness (0 to 100) of each of `texts`, whose words are sorted, to its nearest other one."""
    if len(texts) < 2:
        return []
    likeness = process.cdist(texts, texts, scorer=fuzz.ratio, dtype=np.float32, workers=-1)
    np.fill_diagonal(likeness, 0.0)
    return [float(score) for score in likeness.max(axis=1)]
