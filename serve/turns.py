"""Whose turn it is: which requests are in the engine together, and on which slot each may go on from a kept prompt.

llama.cpp never puts two adapters into one batch: with requests of eight experts in its slots it works them off one by
one. So requests of one expert (a *group*) are sent together, and the next group's are sent while the last of the turn
before still run, which llama.cpp lets wait. A turn ends when nobody of the group waits, or after `QUOTA` requests a
slot while others wait: nobody starves.

A slot keeps the keys and values of its last prompt. They may be used again by the same *owner* alone: the same
adapters at the same scales, asked by the same client. Whose they are is written down when the engine has answered,
never before: a request that was cut off may not have reached it, and its slot is nobody's.
"""

import asyncio
from collections import Counter, deque
from collections.abc import AsyncIterator, Hashable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

QUOTA = 2  # requests a slot that one turn admits while others wait


class Busy(Exception):
    """As many requests wait as may."""


class Gone(Exception):
    """The engine went away while this request waited."""


@dataclass(eq=False)
class Slot:
    """One of the engine's places: who asked there last, and what, as one hash a message."""

    index: int
    owner: Hashable = None  # None: unknown, and nobody's to use
    messages: tuple[int, ...] = ()
    used: int = 0  # the number of its last request
    busy: bool = False


@dataclass(eq=False)
class Place:
    """Where a request runs: the slot's number, and whether its kept prompt is the owner's own.

    `answered` is set by whoever has the engine's reply to it.
    """

    index: int
    reuse: bool
    answered: bool = False


@dataclass(eq=False)
class Waiter:
    owner: Hashable
    messages: tuple[int, ...]
    ready: asyncio.Future[Slot]


@dataclass
class Turns:
    """Admits requests to an engine of `slots` places; `most` may wait. One event loop, no locks."""

    slots: int
    most: int
    waiting: dict[Hashable, deque[Waiter]] = field(default_factory=dict)  # the group that waits longest first
    running: Counter[Hashable] = field(default_factory=Counter)
    _places: list[Slot] = field(default_factory=list)
    _current: Hashable = None
    _admitted: int = 0  # in this turn
    _number: int = 0
    _closed: bool = False

    def __post_init__(self) -> None:
        self._places = [Slot(index) for index in range(self.slots)]

    @property
    def length(self) -> int:
        """How many requests wait."""
        return sum(map(len, self.waiting.values()))

    @property
    def full(self) -> bool:
        """Whether one more would be sent away."""
        return self.length >= self.most

    @asynccontextmanager
    async def turn(self, group: Hashable, owner: Hashable, messages: Sequence[int] = ()) -> AsyncIterator[Place]:
        """The place of one request, for as long as it runs.

        Args:
            group: requests of one group can run together.
            owner: who may use what the slot has kept.
            messages: a hash of each message, to find the slot that has most of them.

        Raises:
            Busy: too many wait already.
            Gone: `close` was called.
        """
        if self._closed:
            raise Gone
        if self.full:
            raise Busy
        waiter = Waiter(owner, tuple(messages), asyncio.get_running_loop().create_future())
        self.waiting.setdefault(group, deque()).append(waiter)
        self._admit()
        try:
            slot = await asyncio.shield(waiter.ready)  # a cancelled future could no longer be told that it is let in
        except asyncio.CancelledError:
            if waiter.ready.done() and not waiter.ready.exception():
                self._leave(group, waiter.ready.result())  # it was let in at the moment when its client left
            else:
                self._forget(group, waiter)
            raise
        place = Place(slot.index, slot.owner == owner and slot.owner is not None)
        slot.owner = None
        try:
            yield place
        finally:
            if place.answered:
                self._number += 1
                slot.owner, slot.messages, slot.used = owner, waiter.messages, self._number
            self._leave(group, slot)

    def close(self) -> None:
        """Sends all away that wait or come: the engine is gone. Those that run find out by themselves."""
        self._closed = True
        for waiters in self.waiting.values():
            for waiter in waiters:
                if not waiter.ready.done():
                    waiter.ready.set_exception(Gone())
        self.waiting.clear()

    def _admit(self) -> None:
        while any(not slot.busy for slot in self._places) and self._choose():
            waiters = self.waiting[self._current]
            waiter = waiters.popleft()
            if not waiters:
                del self.waiting[self._current]
            slot = self._slot_for(waiter)
            slot.busy = True
            self.running[self._current] += 1
            self._admitted += 1
            waiter.ready.set_result(slot)

    def _choose(self) -> bool:
        """Makes the group whose turn it is the current one; whether one of it may go in now."""
        over = len(self.waiting) > 1 and self._admitted >= QUOTA * self.slots
        if self._current in self.waiting and not over:
            return True
        if set(self.running) - {self._current}:  # two groups at most: the one that runs, and the next
            return False
        following = next((group for group in self.waiting if group != self._current), None)
        if following is None:
            return False
        if self._current in self.waiting:  # its turn is over, not its work: to the end of the line
            self.waiting[self._current] = self.waiting.pop(self._current)
        self._current, self._admitted = following, 0
        return True

    def _slot_for(self, waiter: Waiter) -> Slot:
        """The owner's slot with most of these messages; else one of nobody; else of whoever has most, the oldest."""
        free = [slot for slot in self._places if not slot.busy]
        own = [slot for slot in free if slot.owner is not None and slot.owner == waiter.owner]
        best = max(own, key=lambda slot: (_common(slot.messages, waiter.messages), -slot.used), default=None)
        if best and (_common(best.messages, waiter.messages) or not waiter.messages):
            return best
        owned = Counter(slot.owner for slot in self._places)
        return min(free, key=lambda slot: (slot.owner is not None, -owned[slot.owner], slot.used))

    def _leave(self, group: Hashable, slot: Slot) -> None:
        slot.busy = False
        self.running[group] -= 1
        if not self.running[group]:
            del self.running[group]
        self._admit()

    def _forget(self, group: Hashable, waiter: Waiter) -> None:
        waiters = self.waiting.get(group)
        if waiters and waiter in waiters:
            waiters.remove(waiter)
            if not waiters:
                del self.waiting[group]
            self._admit()


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many hashes two prompts share from their beginning."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
