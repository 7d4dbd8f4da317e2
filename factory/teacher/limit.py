"""How many requests may be in flight: as many as the server gains from, half as many when it has too much."""

import asyncio
import time
from collections import deque
from typing import Self

START, MOST = 8, 512  # requests in flight: at first, ever
GAIN = 1.05  # more in flight must bring this much more throughput, or they go back
HOLD = 8  # epochs to stay where more did not help


class Limiter:
    """An `async with` takes one place and gives it back; waiting is in order of arrival.

    Places double until throughput stops to gain, then grow by a tenth at a time, epoch by epoch (an epoch
    is twice as many replies as places). `cut` halves them, and doubling then ends below where it hurt.
    """

    def __init__(self) -> None:
        self.places, self.active = START, 0
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._doubles_to = MOST
        self._before: tuple[int, float] | None = None  # places and replies a second before the last growth
        self._hold = 0
        self._last_cut = 0.0
        self._begin()

    async def __aenter__(self) -> Self:
        if self._waiting or self.active >= self.places:
            place: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiting.append(place)
            try:
                await place
            except asyncio.CancelledError:
                if place.done() and not place.cancelled():
                    self._give_back()
                raise
        else:
            self.active += 1
        return self

    async def __aexit__(self, *_: object) -> None:
        self._give_back()

    def _give_back(self) -> None:
        self.active -= 1
        self._wake()

    def _wake(self) -> None:
        while self._waiting and self.active < self.places:
            place = self._waiting.popleft()
            if not place.done():
                self.active += 1  # taken for it here, so that nobody comes in between
                place.set_result(None)

    def _begin(self) -> None:
        self._since, self._replies = time.monotonic(), 0

    def replied(self) -> None:
        """One reply has come."""
        self._replies += 1
        if self._replies < max(2 * self.places, 2 * START):
            return
        rate = self._replies / max(time.monotonic() - self._since, 1e-6)
        if self._before and rate < GAIN * self._before[1]:  # the last growth brought nothing
            self.places, self._doubles_to, self._hold = self._before[0], 0, HOLD
            self._before = None
        elif self._hold:
            self._hold -= 1
        elif self._waiting:
            self._before = (self.places, rate)
            more = self.places if 2 * self.places <= self._doubles_to else max(1, self.places // 10)
            self.places = min(MOST, self.places + more)
            self._wake()
        self._begin()

    def cut(self, sent: float) -> None:
        """The server has too much; `sent`: when the request that says so went out (time.monotonic).

        Once a flight: whatever was sent before the last cut says the same thing again.
        """
        if sent < self._last_cut:
            return
        self._last_cut = time.monotonic()
        self._doubles_to = self.places * 3 // 4
        self.places = max(1, self.places // 2)
        self._before, self._hold = None, 0
        self._begin()
