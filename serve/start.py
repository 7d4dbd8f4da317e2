"""From settings to a supervisor: which engine is started, how, and what memory a second one takes."""

import os
import shlex
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path

from serve.engine import Engine, llama_command, llama_server, own, vllm
from serve.market import Installed
from serve.router import make_router
from serve.settings import Settings, overridden
from serve.supervisor import Supervisor


def supervisor_for(
    settings: Settings, base: Path, find: Callable[[], list[Installed]], log: Path, scaled: Path
) -> Supervisor:
    """A supervisor over the engine that the settings name.

    Args:
        base: GGUF of the base, for an engine of our own.
        find: the experts that are there now.
        log: llama.cpp's, written anew at each start.
        scaled: a folder for adapters that vLLM must be given at another scale.
    """
    key = os.environ.get("DMOE_ENGINE_KEY", "")

    def start(experts: list[Installed]) -> AbstractAsyncContextManager[Engine]:
        if settings.engine == "llama-server":
            return llama_server(settings.url or "", key, experts, settings.queue)
        if settings.engine == "vllm":
            return vllm(settings.url or "", key, experts, settings.queue, scaled)
        return own(
            base, experts, slots=settings.slots, context=settings.context, threads=settings.threads,
            most=settings.queue, log=log,
        )  # fmt: skip

    def need(experts: list[Installed]) -> int:
        return memory(settings, base, experts) if settings.engine == "xllamacpp" else 0

    def experts() -> list[Installed]:
        return overridden(find(), settings.routes)

    return Supervisor(start, experts, make_router, need, available)


def command(settings: Settings, base: Path, experts: list[Installed]) -> str:
    """The llama-server that does what an engine of our own would, as a line for a shell."""
    words = llama_command(
        base.resolve(), experts, slots=settings.slots, context=settings.context, threads=settings.threads
    )
    return shlex.join(words)


def memory(settings: Settings, base: Path, experts: list[Installed]) -> int:
    """About what one engine of our own takes, bytes."""
    return base.stat().st_size + sum(expert.adapter.stat().st_size for expert in experts)


def memory_plan(settings: Settings, base: Path, experts: list[Installed]) -> list[tuple[str, str]]:
    """What an engine of our own takes, and what is free, as lines to print."""
    adapters = sum(expert.adapter.stat().st_size for expert in experts)
    parts = {"base": base.stat().st_size, f"{len(experts)} adapters": adapters}
    total = memory(settings, base, experts)
    lines = {**parts, "together": total, "free now": available(), "while replaced by a second": 2 * total}
    return [(name, f"{size / 1e6:,.0f} MB") for name, size in lines.items()]


def available() -> int:
    """Bytes of memory that could be had now (Linux); without limit where nobody tells."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return 1 << 62
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
