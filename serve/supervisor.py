"""Keeps one engine answering: starts it, watches it, starts it again when it dies, and replaces it while it runs.

What requests see is a `Serving`: one engine, the experts by name and their router, swapped as a whole. A request keeps
the one that it began with, so an engine that was replaced ends when its last request does.
"""

import asyncio
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractAsyncContextManager, suppress
from dataclasses import dataclass, field
from typing import Any

from factory.errors import UserError
from serve.engine import Engine, scales_of
from serve.market import Installed
from serve.router import Router
from serve.turns import Busy, Gone

WATCH_SECONDS = 1.0
DEAD_AFTER = 2  # health checks in a row without an answer
BACK_OFF = (0.0, 1.0, 2.0, 4.0, 8.0, 15.0)  # seconds before each new start; the last for all further ones
DRAIN_SECONDS = 600.0  # for the last requests of a replaced engine
PROBE_TOKENS = 96

Start = Callable[[list[Installed]], AbstractAsyncContextManager[Engine]]


@dataclass(frozen=True)
class Serving:
    """What answers requests now."""

    engine: Engine
    experts: dict[str, Installed]
    router: Router


@dataclass
class _Held:
    """An engine that is kept open by a task of its own until `stop` is set."""

    task: "asyncio.Task[None]"
    stop: asyncio.Event
    engine: Engine


@dataclass
class Supervisor:
    """Args: `start` opens an engine with these experts; `find` reads which there are; `router` is made of them."""

    start: Start
    find: Callable[[], list[Installed]]
    router: Callable[[Iterable[Installed]], Router]
    need: Callable[[list[Installed]], int] = lambda experts: 0  # bytes of a second engine
    free: Callable[[], int] = lambda: 1 << 62
    serving: Serving | None = None
    trouble: str = "starting"  # why nothing serves, or what to say should the engine not answer
    suspected: bool = False  # someone got no answer from the engine, and it has not been looked at since
    restarts: int = 0
    applied: dict[str, bool] = field(default_factory=dict)  # expert -> whether its last probe showed its adapter
    _held: _Held | None = None
    _planned: asyncio.Event | None = None  # set when a planned restart is over
    _nudge: asyncio.Event = field(default_factory=asyncio.Event)
    _changing: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def open(self) -> None:
        """The first start; raises UserError where it fails."""
        await self._begin(self.find())

    async def close(self) -> None:
        if self._held:
            await _end(self._held)

    async def ready(self, seconds: float) -> Serving:
        """What serves now; a planned restart is waited for.

        Raises:
            Gone: nothing serves, and that was not planned, or it took too long.
        """
        if self.serving is None and self._planned is not None:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._planned.wait(), seconds)
        if self.serving is None:
            raise Gone
        return self.serving

    def suspect(self) -> None:
        """Someone got no answer from the engine: look at it now."""
        self.suspected = True
        self._nudge.set()

    async def watch(self) -> None:
        """Runs for ever: an engine that does not answer is ended and started again."""
        silent = 0
        while True:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._nudge.wait(), WATCH_SECONDS if not silent else WATCH_SECONDS / 4)
            self._nudge.clear()
            held = self._held
            if held is None or await held.engine.alive():
                silent, self.suspected = 0, False
                continue
            silent += 1
            if silent >= DEAD_AFTER and held is self._held:
                silent = 0
                await self._again()

    async def _again(self) -> None:
        async with self._changing:
            held, self._held = self._held, None
            assert held is not None
            self.serving, self.trouble = None, "the engine ended; it is being started again"
            held.engine.turns.close()
            await _end(held)
            for attempt in range(1 << 30):
                await asyncio.sleep(BACK_OFF[min(attempt, len(BACK_OFF) - 1)])
                try:
                    await self._begin(self.find())
                    self.restarts += 1
                    return
                except UserError as error:
                    self.trouble = str(error)

    async def reload(self, restart: bool = False) -> dict[str, Any]:
        """Serves what is installed now, without a failed request.

        Args:
            restart: where memory does not allow a second engine, end the first one; requests wait meanwhile.

        Returns: {"changed": [names], "engine": "same" | "second" | "restarted", "seconds": float}

        Raises:
            UserError: nothing was changed: a newcomer cannot be loaded or does not show, or memory does not allow it.
        """
        began = time.monotonic()
        async with self._changing:
            before, experts = self.serving, self.find()
            if before is None:
                raise UserError(f"the engine is not ready ({self.trouble}); try again")
            old = {(e.name, e.digest, e.routed) for e in before.experts.values()}
            changed = sorted({name for name, *_ in old ^ {(e.name, e.digest, e.routed) for e in experts}})
            loaded = {adapter.digest for adapter in before.engine.adapters}
            if {expert.digest for expert in experts} <= loaded:
                how = "same"
                self.serving = self._serving(before.engine, experts)
            elif self.need(experts) <= self.free():
                how = "second"
                await self._second(experts)
            elif restart:
                how = "restarted"
                await self._restart(experts)
            else:
                need, free = (f"{n / 1e6:,.0f} MB" for n in (self.need(experts), self.free()))
                raise UserError(f"a second engine takes about {need}, and {free} are free; with --restart the first one"
                                " ends before, and requests wait while the new one loads")  # fmt: skip
        return {"changed": changed, "engine": how, "seconds": round(time.monotonic() - began, 3)}

    async def _second(self, experts: list[Installed]) -> None:
        """A second engine takes over once each newcomer has shown itself; the first one ends when it is idle."""
        held = await self._hold(experts)
        try:
            known = {expert.digest for expert in self.serving.experts.values()} if self.serving else set()
            await self._prove(held.engine, [e for e in experts if e.digest not in known])
        except BaseException:
            await _end(held)
            raise
        first, self._held = self._held, held
        self.serving = self._serving(held.engine, experts)
        if first:
            asyncio.get_running_loop().create_task(_drain(first))

    async def _restart(self, experts: list[Installed]) -> None:
        before, first = self.serving, self._held
        assert before is not None and first is not None
        self._planned, self.serving, self.trouble = asyncio.Event(), None, "restarting with other experts"
        try:
            await _drain(first)
            self._held = None
            try:
                await self._begin(experts)
            except UserError:
                await self._begin(list(before.experts.values()))
                raise
        finally:
            self._planned.set()
            self._planned = None

    async def _begin(self, experts: list[Installed]) -> None:
        self._held = await self._hold(experts)
        self.serving, self.suspected = self._serving(self._held.engine, experts), False
        self.trouble = "it went silent, and is looked at"

    def _serving(self, engine: Engine, experts: list[Installed]) -> Serving:
        return Serving(engine, {expert.name: expert for expert in experts}, self.router(experts))

    async def _hold(self, experts: list[Installed]) -> _Held:
        ready: asyncio.Future[Engine] = asyncio.get_running_loop().create_future()
        stop = asyncio.Event()

        adapters = list({expert.digest: expert for expert in reversed(experts)}.values())[::-1]  # each file once

        async def hold() -> None:
            try:
                async with self.start(adapters) as engine:
                    ready.set_result(engine)
                    await stop.wait()
            except Exception as error:
                if ready.done():
                    raise
                ready.set_exception(error)

        task = asyncio.create_task(hold())
        return _Held(task, stop, await ready)

    # -- whether an adapter is really applied ---------------------------------------------------------

    async def _prove(self, engine: Engine, experts: list[Installed]) -> None:
        for expert in experts:
            if expert.probes and not await shows(engine, expert):
                question = expert.probes[0].question
                raise UserError(f"{expert.name}: its adapter does not show: {question!r} was not answered as its"
                                " package says; it is not served")  # fmt: skip

    async def probe(self, seconds: float) -> None:
        """Runs for ever: asks every expert its probe, `seconds` between two rounds."""
        while True:
            serving = self.serving
            for expert in serving.experts.values() if serving else []:
                if serving is not None and serving is self.serving and expert.probes:
                    with suppress(Gone, Busy, UserError):
                        self.applied[expert.name] = await shows(serving.engine, expert)
            await asyncio.sleep(seconds)


async def shows(engine: Engine, expert: Installed) -> bool:
    """Whether the expert answers its probe as its package says; any one of them is proof.

    Raises:
        Busy, Gone: the engine has no room, or is gone.
        UserError: it refused.
    """
    for probe in expert.probes:
        if probe.says in await say(engine, expert, probe.question, PROBE_TOKENS):
            return True
    return False


async def say(engine: Engine, expert: Installed | None, question: str, tokens: int) -> str:
    """One greedy reply, from scratch."""
    import aiohttp

    scales = scales_of(engine, expert)
    body = {"messages": [{"role": "user", "content": question}], "temperature": 0, "max_tokens": tokens}
    async with engine.turns.turn(engine.group(scales), None) as place:
        try:
            response = await engine.send("/v1/chat/completions", body | engine.fields(scales, place, "dmoe-probe"))
            async with response:
                reply = await response.json()
        except (aiohttp.ClientError, TimeoutError):
            raise Gone from None
    if "error" in reply:
        raise UserError(f"the engine refused a probe: {str(reply['error'])[:200]}")
    return str(reply["choices"][0]["message"]["content"] or "")


async def _drain(held: _Held) -> None:
    """Ends an engine when nothing runs in it any more."""
    end = time.monotonic() + DRAIN_SECONDS
    while (held.engine.turns.running or held.engine.turns.length) and time.monotonic() < end:
        await asyncio.sleep(0.02)
    held.engine.turns.close()
    await _end(held)


async def _end(held: _Held) -> None:
    held.stop.set()
    with suppress(Exception):  # it may have died long ago
        await held.task
