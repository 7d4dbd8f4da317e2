"""From settings to a supervisor: which engine is started, how, and what memory a second one takes."""

import os
import shlex
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path

from factory.embed import Encoder, find_encoder, load_encoder
from factory.gguf_file import read_gguf
from factory.paths import Home
from serve.engine import Engine, llama_command, llama_server, own, vllm
from serve.market import Installed
from serve.router import make_router
from serve.settings import Settings, overridden
from serve.supervisor import Supervisor


def supervisor_for(
    settings: Settings,
    base: Path,
    find: Callable[[], list[Installed]],
    log: Path,
    scaled: Path,
    encoder: Encoder | None = None,
) -> Supervisor:
    """A supervisor over the engine that the settings name.

    Args:
        base: GGUF of the base, for an engine of our own.
        find: the experts that are there now.
        log: llama.cpp's, written anew at each start.
        scaled: a folder for adapters that vLLM must be given at another scale.
        encoder: of the router.
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

    return Supervisor(start, experts, lambda found: make_router(found, encoder), need, available)


def encoder_for(settings: Settings, home: Home | None, folder: Path) -> Encoder | None:
    """What the router reads questions with: what the settings name, else what lies in the checkout or in `folder`.

    Raises:
        UserError: what is named cannot be read.
    """
    if settings.encoder:
        return load_encoder(folder / settings.encoder)
    if home:
        return find_encoder(home)
    table = folder / "static.safetensors"
    return load_encoder(table) if table.exists() else None


def command(settings: Settings, base: Path, experts: list[Installed]) -> str:
    """The llama-server that does what an engine of our own would, as a line for a shell."""
    words = llama_command(
        base.resolve(), experts, slots=settings.slots, context=settings.context, threads=settings.threads
    )
    return shlex.join(words)


COMPUTE_TOKENS = 512  # llama.cpp works on so many at once; each has its logits and some vectors in float32


def parts(settings: Settings, base: Path, experts: list[Installed]) -> dict[str, int]:
    """About what one engine of our own takes, bytes, by what for.

    Keys and values are float16, of every layer and slot; that is for attention as Qwen, Llama and alike have it.
    """
    found = read_gguf(base)
    arch = found.metadata.get("general.architecture")

    def number(key: str, default: int = 0) -> int:
        value = found.metadata.get(f"{arch}.{key}", default)
        return int(max(value) if isinstance(value, list) else value)

    heads, width = number("attention.head_count", 1), number("embedding_length")
    size = number("attention.key_length", width // heads) + number("attention.value_length", width // heads)
    a_token = number("block_count") * number("attention.head_count_kv", heads) * size * 2
    vocabulary = len(found.metadata.get("tokenizer.ggml.tokens", ()))
    compute = COMPUTE_TOKENS * 4 * (vocabulary + 8 * max(width, number("feed_forward_length")))
    adapters = {expert.digest: expert.adapter.stat().st_size for expert in experts}
    return {
        "base": base.stat().st_size,
        f"{len(adapters)} adapters": sum(adapters.values()),
        f"kept prompts ({settings.slots} slots x {settings.context} tokens)": settings.slots
        * settings.context
        * a_token,
        "work space": compute,
    }


def memory(settings: Settings, base: Path, experts: list[Installed]) -> int:
    """About what one engine of our own takes, bytes."""
    return sum(parts(settings, base, experts).values())


def memory_plan(settings: Settings, base: Path, experts: list[Installed]) -> list[tuple[str, str]]:
    """What an engine of our own takes, and what is free, as lines to print."""
    total, free = memory(settings, base, experts), available()
    lines = {**parts(settings, base, experts), "together": total, "free now": free}
    told = [(name, f"{size / 1e6:,.0f} MB") for name, size in lines.items()]
    verdict = {2: "yes, and a second engine beside it for new experts", 1: "yes; new experts need --restart"}
    return [*told, ("fits", verdict.get(min(free // max(total, 1), 2), "no: fewer slots, or a smaller context"))]


def available() -> int:
    """Bytes of memory that could be had now (Linux); without limit where nobody tells."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return 1 << 62
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
