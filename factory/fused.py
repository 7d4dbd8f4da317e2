"""What blocking.py does with numpy and rapidfuzz, compiled by numba: without Python's lock, four pairs at a time.

Numba is heavy, so this is imported late and may be missing; the pairs that are found are the same without it.
"""

from typing import Any

import numba
import numpy as np
from numba.extending import intrinsic
from numpy.typing import NDArray

Array = NDArray[Any]
Words = tuple[Array, ...]  # each of one piece: with strides, nothing is tested by fours
STEP = 32  # columns that are tested before looking whether one survived
BLOCK = 1024  # texts whose words fit the first-level cache
LETTERS = 256  # kinds of character that fit a byte


def _count(_: Any, word: Any) -> Any:
    signature = numba.types.int64(numba.types.uint64)
    return signature, lambda context, builder, signature, arguments: builder.ctpop(arguments[0])


_ones = intrinsic(_count)


def _search(lacking: Words, having: Words, allowed: Array, places: Array, most: int) -> int:
    """Writes row x columns + column of the survivors; how many, or -1 for more than `most`.

    `allowed` never falls from one column to the next, which are sorted by length.
    """
    found, width = 0, len(allowed)
    h0, h1, h2, h3 = having
    for row in range(len(lacking[0])):
        l0, l1, l2, l3 = lacking[0][row], lacking[1][row], lacking[2][row], lacking[3][row]
        for step in range(width // STEP + 1):
            start = step * STEP
            if start + STEP <= width:  # always the same number, or the loop is several times slower
                sign, limit = np.int64(0), np.int64(allowed[start + STEP - 1]) + 1
                for j in range(start, start + STEP):
                    sign |= _ones(l0 & h0[j]) + _ones(l1 & h1[j]) - limit
                if sign >= 0:  # none is below the limit
                    continue
            for j in range(start, min(width, start + STEP)):
                total = _ones(l0 & h0[j]) + _ones(l1 & h1[j])
                if total <= allowed[j] and total + _ones(l2 & h2[j]) + _ones(l3 & h3[j]) <= allowed[j]:
                    if found == most:
                        return -1
                    places[found] = row * width + j
                    found += 1
    return found


def _words(counts: Array, kinds: Array, least: Array, words: Array) -> None:
    """Sets bit b of each text in whose `counts` kind kinds[b] stands at least least[b] times."""
    for start in range(0, counts.shape[1], BLOCK):
        for bit in range(len(kinds)):
            own, word = counts[kinds[bit], start : start + BLOCK], words[bit // 64, start : start + BLOCK]
            for j in range(len(own)):
                word[j] |= np.uint64(own[j] >= least[bit]) << np.uint64(bit % 64)


def _common(codes: Array, starts: Array, left: Array, right: Array) -> Array:
    """How long the longest common subsequence of each two texts is, 64 characters of the left one at a time.

    Hyyro's: a zero in `row` is a character of the left text by which the subsequence grew.
    """
    found = np.empty(len(left), np.int64)
    last, size = -1, 0
    masks, row = np.empty((LETTERS, 0), np.uint64), np.empty(0, np.uint64)
    for pair in range(len(left)):
        i, j = left[pair], right[pair]
        if i != last:
            last, length = i, starts[i + 1] - starts[i]
            if (length + 63) // 64 != size:
                size = (length + 63) // 64
                masks, row = np.empty((LETTERS, size), np.uint64), np.empty(size, np.uint64)
            masks[:] = 0
            for k in range(length):
                masks[codes[starts[i] + k], k // 64] |= np.uint64(1) << np.uint64(k % 64)
        if size == 1:  # the same without a carry, several times faster
            only = ~np.uint64(0)
            for k in range(starts[j], starts[j + 1]):
                both = only & masks[codes[k], 0]
                only = (only + both) | (only - both)
            found[pair] = _ones(~only)
            continue
        row[:] = ~np.uint64(0)
        for k in range(starts[j], starts[j + 1]):
            carry = np.uint64(0)
            for word in range(size):
                old = row[word]
                both = old & masks[codes[k], word]
                added = old + both
                total = added + carry
                carry = np.uint64((added < old) | (total < added))
                row[word] = total | (old - both)
        found[pair] = 0
        for word in range(size):
            found[pair] += _ones(~row[word])
    return found


search = numba.njit(nogil=True, cache=True)(_search)
words = numba.njit(nogil=True, cache=True)(_words)
common = numba.njit(nogil=True, cache=True)(_common)


def survivors(
    lacking: Array, having: Array, allowed: Array, space: tuple[Array, Array], dense: int
) -> tuple[Array, Array] | None:
    """The same as blocking's."""
    places, size = space[0], lacking.shape[1] * having.shape[1]
    count = search(tuple(lacking), tuple(having), allowed, places, size // dense)
    if count < 0:
        return None
    i, j = np.divmod(places[:count].astype(np.int64), having.shape[1])
    return i, j
