"""Pairs of texts that are alike enough, found without comparing most pairs; the same pairs as comparing all. Pure.

Likeness is rapidfuzz's `ratio`: 100 x (1 - d / (m + n)) for texts of m and n characters, d being how many characters
must be taken out or put in to make one of the other. A pair that reaches the cutoff has therefore few of those, and
lengths that are near. Of the shorter text at most e = (d - difference of lengths) / 2 characters may be without a
partner in the longer one, so no more than e can be too many of their kind. That is what is counted first, for it is
cheap: how often each frequent character stands in a text is written in unary, a bit saying "at least so many of it".
The bits set in the shorter text and not in the longer one never outnumber e, whichever bits are left out. 64 of them
fit a word: one AND and one population count, about a nanosecond a pair, set most pairs aside; three more words those
that are left. So a pair is never lost, and rapidfuzz alone says how alike the survivors are. Bits are chosen anew for
each band of lengths: those that split it most evenly. Long texts (300 characters and more) are hardly told apart by
their characters; there and wherever most pairs survive, whole blocks are compared directly.

Numpy and rapidfuzz hold Python's lock, so this keeps one core busy. With numba (the `data` extra) many texts are
tested by fused.py instead, on all cores: the same words, then how many characters of survivors have no partner.
"""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from rapidfuzz import fuzz, process

Array = NDArray[Any]
Space = tuple[Array, Array]  # a tile's words and its counts, used again for each tile
KINDS = 40  # the most frequent characters are counted each, all others together
WORDS = 4  # of 64 bits each
LOTS = 20_000  # texts for which loading numba pays
TILE = (32, 4096)  # pairs that are tested at a time: a megabyte of words
FUSED = (256, 1 << 14)  # the same for numba: two words of a tile's columns fit the second-level cache
BAND = 1.08  # longest by shortest text for which the same bits are used
SAMPLE = 512  # texts of a band by which its bits are chosen
SPARSE = 50  # one survivor in so many pairs is few enough to pick them out
DENSE = 4  # one survivor in so many pairs is too many: comparing the whole block is faster
MANY = 32  # survivors of one text that are compared at once
BATCH = 1 << 18  # survivors that are compared at a time


class Texts(NamedTuple):
    """Texts, their lengths, and how often each kind of character stands in each, at most 255: uint8 [KINDS, texts].

    `kinds` are those of all characters, one text after the other: text i's are at starts[i] to starts[i + 1].
    """

    texts: Array
    lengths: Array
    counts: Array
    kinds: Array
    starts: Array


class Pairs(NamedTuple):
    """Numbers of two texts and their likeness, 0 to 100, a pair in each place."""

    left: Array
    right: Array
    score: Array


def read(texts: list[str]) -> Texts:
    """Counts the characters of `texts`."""
    counts = np.empty((KINDS, len(texts)), np.uint8)
    lengths = np.array([len(text) for text in texts], np.int64)
    starts = np.concatenate(([0], np.cumsum(lengths)))
    all_kinds = np.empty(starts[-1], np.uint8)
    kinds = None
    for start in range(0, len(texts), 1 << 15):
        part = texts[start : start + (1 << 15)]
        codes = np.frombuffer("".join(part).encode("utf-32-le", "surrogatepass"), np.uint32)
        kinds = _kinds(codes) if kinds is None else kinds
        own = kinds[codes]
        all_kinds[starts[start] : starts[start] + len(own)] = own
        places = np.repeat(np.arange(len(part)) * KINDS, lengths[start : start + len(part)]) + own
        found = np.bincount(places, minlength=len(part) * KINDS).reshape(len(part), KINDS)
        counts[:, start : start + len(part)] = np.minimum(found, 255).T
    return Texts(np.array(texts, object), lengths, counts, all_kinds, starts)


def _kinds(codes: Array) -> Array:
    """Code point -> the number of its kind; the frequent ones have their own."""
    kinds = np.full(0x110000, KINDS - 1, np.uint8)
    frequent = np.argsort(-np.bincount(codes, minlength=KINDS), kind="stable")[: KINDS - 1]
    kinds[frequent] = np.arange(len(frequent))
    return kinds


def pairs(texts: Texts, left: Array, right: Array | None, cutoff: float) -> Pairs:
    """All pairs of a text numbered in `left` with one in `right` that are at least `cutoff` alike, each once.

    `right` shares none with `left`; None is for all pairs within `left`. Their order is always the same.
    """
    left = left[np.argsort(texts.lengths[left], kind="stable")]
    if right is None:
        work = [(left[band], left, True) for band in _bands(texts.lengths[left])]
    else:
        right = right[np.argsort(texts.lengths[right], kind="stable")]
        work = [(left[band], right, False) for band in _bands(texts.lengths[left])]
        work += [(right[band], left, True) for band in _bands(texts.lengths[right])]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        bands = list(pool.map(lambda job: _Band(texts, cutoff, *job), work))
        jobs = [(band, *job) for band in bands for job in band.jobs()]
        found = list(pool.map(lambda job: job[0].pairs(*job[1:], right is None), jobs))
    return Pairs(*(np.concatenate(part) for part in zip(_NONE, *found, strict=True)))


_NONE = Pairs(np.empty(0, np.int32), np.empty(0, np.int32), np.empty(0, np.float32))


def _bands(lengths: Array) -> Iterator[slice]:
    """Runs of a sorted array whose largest is at most BAND times the smallest."""
    start = 0
    while start < len(lengths):
        stop = int(np.searchsorted(lengths, lengths[start] * BAND, side="right"))
        yield slice(start, stop)
        start = stop


class _Band:
    """`longer`, whose lengths are near each other, against `shorter`: both numbers of texts, sorted by length.

    Pairs of equal length are looked for if `equal`, which one of two directions does.
    """

    def __init__(self, texts: Texts, cutoff: float, longer: Array, shorter: Array, equal: bool) -> None:
        lengths = texts.lengths[shorter]
        low, high = (int(texts.lengths[longer[i]]) for i in (0, -1))
        start = np.searchsorted(lengths, low * cutoff / (200 - cutoff) - 1e-6)
        stop = np.searchsorted(lengths, high, side="right" if equal else "left")
        self.texts, self.longer, self.shorter, self.cutoff = texts, longer, shorter[start:stop], cutoff
        self.equal, self.lengths = equal, lengths[start:stop]
        if len(self.shorter):
            bits = _bits(texts, np.concatenate((longer, self.shorter)))
            self.lacking, self.having = ~_words(texts, longer, bits), _words(texts, self.shorter, bits)

    def jobs(self) -> list[tuple[int, int]]:
        """Runs of `longer` of one length: start, stop."""
        lengths = self.texts.lengths[self.longer]
        marks = [0, *(np.flatnonzero(np.diff(lengths)) + 1).tolist(), len(lengths)]
        return list(pairwise(marks)) if len(self.shorter) else []

    def pairs(self, start: int, stop: int, within: bool) -> Pairs:
        """The pairs of the texts start to stop of `longer`, all of one length, with all that are short enough.

        Of a text with itself and of a pair's two directions none, if `within`.
        """
        length = int(self.texts.lengths[self.longer[start]])
        first = int(np.searchsorted(self.lengths, length * self.cutoff / (200 - self.cutoff) - 1e-6))
        last = int(np.searchsorted(self.lengths, length, side="right" if self.equal else "left"))
        # 1e-6 is more than all rounding: an edit that is just allowed must not be lost
        edits = np.floor((1 - self.cutoff / 100) * (length + self.lengths[first:last]) + 1e-6).astype(np.int64)
        allowed = ((edits - length + self.lengths[first:last]) // 2).clip(0, 255).astype(np.uint8)
        fused = _fused(len(self.texts.texts))
        height, width = FUSED if fused else TILE
        space = np.empty(height * width, np.uint64), np.empty(height * width, np.uint8)
        found: list[Pairs] = []
        waiting: list[tuple[Array, Array]] = []
        for x in range(start, stop, height):
            rows = slice(x, min(stop, x + height))
            for y in range(first, last, width):
                columns = slice(y, min(last, y + width))
                tile = self.lacking[:, rows], self.having[:, columns], allowed[y - first : columns.stop - first], space
                near = fused.survivors(*tile, DENSE) if fused else _survivors(*tile)
                a, b = self.longer[rows], self.shorter[columns]
                if near is None:
                    i, j, scores = self._whole(a, b)
                    keep = self._once(i, j) if within else slice(None)
                    found.append(Pairs(i[keep], j[keep], scores[keep]))
                elif len(near[0]):
                    i, j = a[near[0]], b[near[1]]
                    keep = self._once(i, j) if within else slice(None)
                    waiting.append((i[keep], j[keep]))
            if sum(len(i) for i, _ in waiting) > BATCH:
                found.append(self._compare(waiting, fused))
                waiting = []
        return Pairs(*(np.concatenate(part) for part in zip(_NONE, *found, self._compare(waiting, fused), strict=True)))

    def _once(self, i: Array, j: Array) -> Array:
        kept: Array = (self.texts.lengths[i] > self.texts.lengths[j]) | (i < j)
        return kept

    def _whole(self, a: Array, b: Array) -> Pairs:
        """Compares each of a with each of b."""
        texts = self.texts.texts
        scores = process.cdist(texts[a], texts[b], scorer=fuzz.ratio, score_cutoff=self.cutoff, dtype=np.float32)
        i, j = np.nonzero(scores >= self.cutoff)
        return Pairs(a[i], b[j], scores[i, j])

    def _compare(self, waiting: list[tuple[Array, Array]], fused: ModuleType | None) -> Pairs:
        """Asks rapidfuzz about the survivors: those of one text at once, if they are many, which is twice as fast."""
        if not waiting:
            return _NONE
        i, j = (np.concatenate(side) for side in zip(*waiting, strict=True))
        if fused:
            reach = self._reach(fused, i, j)
            i, j = i[reach], j[reach]
        order = np.argsort(i, kind="stable")
        i, j = i[order], j[order]
        marks = np.concatenate(([0], np.flatnonzero(np.diff(i)) + 1, [len(i)]))
        many = np.diff(marks) >= MANY
        ends = zip(marks[:-1][many], marks[1:][many], strict=True)
        found = [self._whole(i[start : start + 1], j[start:stop]) for start, stop in ends]
        rest = ~np.repeat(many, np.diff(marks))
        a, b = self.texts.texts[i[rest]], self.texts.texts[j[rest]]
        scores = process.cpdist(a, b, scorer=fuzz.ratio, score_cutoff=self.cutoff, dtype=np.float32)
        alike = scores >= self.cutoff
        found.append(Pairs(i[rest][alike], j[rest][alike], scores[alike]))
        return Pairs(*(np.concatenate(part) for part in zip(*found, strict=True)))

    def _reach(self, fused: ModuleType, i: Array, j: Array) -> Array:
        """Whether each pair can reach the cutoff; rare characters pass for one kind, so a few more can."""
        both = self.texts.lengths[i] + self.texts.lengths[j]
        edits = both - 2 * fused.common(self.texts.kinds, self.texts.starts, i, j)
        reach: Array = edits <= (1 - self.cutoff / 100) * both + 1e-6
        return reach


@cache
def _load() -> ModuleType | None:
    try:
        from factory import fused
    except ImportError:  # numba is not there
        return None
    return fused


def _fused(count: int) -> ModuleType | None:
    """What numba has compiled, if there are texts enough and numba is there."""
    return _load() if count > LOTS else None


def _bits(texts: Texts, band: Array) -> list[tuple[int, int]]:
    """(kind, count): "at least so many of it", the bits that split a band's texts most evenly, best first."""
    sample = texts.counts[:, band[:: max(1, len(band) // SAMPLE)]]
    least = np.arange(1, max(2, int(sample.max()) + 1))
    share = (sample[:, None, :] >= least[:, None]).mean(axis=2)
    best = np.argsort(-(share * (1 - share)).ravel(), kind="stable")[: 64 * WORDS]
    return [(int(i) // len(least), int(least[i % len(least)])) for i in best]


def _words(texts: Texts, numbers: Array, bits: list[tuple[int, int]]) -> Array:
    """The bits of each text, uint64 [WORDS, texts]; there may be fewer bits than fit."""
    words = np.zeros((WORDS, len(numbers)), np.uint64)
    counts = texts.counts[:, numbers]
    if fused := _fused(len(texts.texts)):
        kinds, least = np.array(bits).T.copy()
        fused.words(counts, kinds, least, words)
        return words
    for place, (kind, least) in enumerate(bits):
        words[place // 64] |= (counts[kind] >= least).astype(np.uint64) << np.uint64(place % 64)
    return words


def _survivors(lacking: Array, having: Array, allowed: Array, space: Space) -> tuple[Array, Array] | None:
    """Places (row, column) where at most `allowed` of a column's bits are lacking in the row; None if most are."""
    shape = lacking.shape[1], having.shape[1]
    both, total = space[0][: shape[0] * shape[1]].reshape(shape), space[1][: shape[0] * shape[1]].reshape(shape)
    for word in range(WORDS):
        np.bitwise_and(lacking[word][:, None], having[word], out=both)
        total = total + np.bitwise_count(both) if word else np.bitwise_count(both, out=total)
        near = total <= allowed
        if (left := np.count_nonzero(near)) * SPARSE <= near.size:
            break
    if left * DENSE > near.size:
        return None
    places = _places(near.ravel())
    found = total.ravel()[places]
    i, j = np.divmod(places, shape[1])
    for later in range(word + 1, WORDS):
        found = found + np.bitwise_count(lacking[later][i] & having[later][j])
        keep = found <= allowed[j]
        i, j, found = i[keep], j[keep], found[keep]
    return i, j


def _places(near: Array) -> Array:
    """Where a sparse array of truth values is true: by eights first, which is several times faster."""
    whole = len(near) // 8 * 8
    eights = np.flatnonzero(near[:whole].view(np.uint64))
    found = np.flatnonzero(near[:whole].reshape(-1, 8)[eights])
    return np.concatenate((eights[found >> 3] * 8 + (found & 7), whole + np.flatnonzero(near[whole:])))
