"""One running llama.cpp with all experts loaded: an expert's name becomes a full vector of scales."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from factory.llama import Llama, running
from serve.market import Installed


@dataclass(frozen=True)
class Engine:
    """A server and its experts, in the order in which they are loaded."""

    llama: Llama
    experts: list[Installed]

    def scales(self, expert: str | None) -> list[float]:
        """One scale per loaded adapter: the expert's own at its place, 0 elsewhere; None is the base.

        Raises:
            KeyError: no such expert.
        """
        if expert is not None and expert not in {e.name for e in self.experts}:
            raise KeyError(expert)
        return [e.scale if e.name == expert else 0.0 for e in self.experts]


@contextmanager
def started(
    base: Path,
    experts: Sequence[Installed],
    *,
    slots: int = 4,
    context: int = 1024,
    threads: int | None = None,
    log: Path,
) -> Iterator[Engine]:
    """An engine with all `experts` on `base`; see factory.llama.running for arguments and errors."""
    adapters = [expert.adapter for expert in experts]
    with running(base, adapters, slots=slots, context=context, threads=threads, log=log) as llama:
        yield Engine(llama, list(experts))


def ask(engine: Engine, messages: list[dict[str, Any]], expert: str | None, **options: Any) -> dict[str, Any]:
    """One chat completion by `expert`, or by the base where that is None."""
    return engine.llama.chat(messages, engine.scales(expert), **options)
