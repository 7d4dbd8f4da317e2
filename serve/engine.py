"""The engines: what answers. llama.cpp (ours in a subprocess, or one somewhere else) and vLLM, behind one interface.

An engine has adapters in a fixed order; `scales` is one number for each of them, and all zeros are the base. How that
becomes a request, and which requests may run together, is all in which the engines differ.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from factory.errors import UserError
from factory.llama import REPLY_SECONDS, Llama, running
from factory.store import whole
from serve.market import Installed
from serve.turns import Place, Turns

if TYPE_CHECKING:
    import aiohttp

Scales = tuple[float, ...]
IDLE_SECONDS = 3.0  # llama.cpp closes a connection that was idle for five


class Engine(Protocol):
    """A running engine. Where `turns` admits a request, `fields` says how it is told who answers."""

    kind: str
    adapters: list[Installed]
    turns: Turns

    def group(self, scales: Scales) -> Scales | None:
        """Requests of one group can run together in one batch."""

    def fields(self, scales: Scales, place: Place, client: str) -> dict[str, Any]:
        """What is added to a request of `client`."""

    async def send(self, path: str, body: dict[str, Any]) -> "aiohttp.ClientResponse":
        """The reply to a request as soon as its headers are there; raises aiohttp.ClientError where none comes."""

    async def alive(self) -> bool:
        """Whether it answers its health check."""


def scales_of(engine: Engine, expert: Installed | None) -> Scales:
    """The expert's own scale at its adapter's place, 0 elsewhere; None is the base.

    Raises:
        KeyError: the engine does not have this adapter.
    """
    digests = [adapter.digest for adapter in engine.adapters]
    if expert is None:
        return (0.0,) * len(digests)
    if expert.digest not in digests:
        raise KeyError(expert.name)
    place = digests.index(expert.digest)
    return tuple(expert.scale if number == place else 0.0 for number in range(len(digests)))


@dataclass
class _Http:
    """The connections to an engine: one for each request that runs in it."""

    session: "aiohttp.ClientSession"

    async def send(self, path: str, body: dict[str, Any]) -> "aiohttp.ClientResponse":
        import aiohttp

        try:
            return await self.session.post(path, json=body)
        except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError):
            # It may have closed a kept connection at the moment when we took it: a dead engine refuses a new one.
            return await self.session.post(path, json=body)

    async def alive(self) -> bool:
        import aiohttp

        try:
            async with self.session.get("/health", timeout=aiohttp.ClientTimeout(total=5)) as response:
                return response.ok
        except (aiohttp.ClientError, TimeoutError):
            return False

    async def json(self, method: str, path: str, body: Any = None) -> Any:
        """One small exchange.

        Raises:
            UserError: it refused, or does not answer.
        """
        import aiohttp

        try:
            async with self.session.request(method, path, json=body) as response:
                text = await response.text()
        except (aiohttp.ClientError, TimeoutError) as error:
            where = self.session._base_url  # what a person typed
            raise UserError(f"{where}: no answer to {path} ({error or type(error).__name__})") from None
        if not response.ok:
            raise UserError(f"{self.session._base_url}: {path}: {response.status}: {' '.join(text.split())[:300]}")
        return json.loads(text) if text.startswith(("{", "[")) else text


@asynccontextmanager
async def _connected(url: str, key: str) -> AsyncIterator["aiohttp.ClientSession"]:
    import aiohttp

    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=IDLE_SECONDS)
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    timeout = aiohttp.ClientTimeout(total=None, connect=10, sock_read=REPLY_SECONDS)
    async with aiohttp.ClientSession(url, connector=connector, headers=headers, timeout=timeout) as session:
        yield session


# -- llama.cpp ------------------------------------------------------------------------------------


@dataclass
class LlamaEngine(_Http):
    """llama.cpp's server. Adapters are told by number, all of them in every request."""

    adapters: list[Installed]
    turns: Turns
    order: list[int]  # llama.cpp's number of each adapter
    count: int  # of all adapters that it has loaded
    kind: str = "llama.cpp"

    def group(self, scales: Scales) -> Scales | None:
        """llama.cpp never batches two vectors of scales together."""
        return scales

    def fields(self, scales: Scales, place: Place, client: str) -> dict[str, Any]:
        """All scales, said outright: a missing or empty list would mean "as the server stands"."""
        told = dict.fromkeys(range(self.count), 0.0) | dict(zip(self.order, scales, strict=True))
        lora = {"lora": [{"id": number, "scale": scale} for number, scale in told.items()]} if told else {}
        return {"id_slot": place.index, "cache_prompt": place.reuse, **lora}


@asynccontextmanager
async def own(
    base: Path,
    experts: Sequence[Installed],
    *,
    slots: int,
    context: int,
    threads: int | None,
    most: int,
    log: Path,
) -> AsyncIterator[LlamaEngine]:
    """An engine of our own, ended with the block. Loading happens in a thread: others are served meanwhile."""
    adapters = [expert.adapter for expert in experts]
    starting = running(base, adapters, slots=slots, context=context, threads=threads, log=log)
    llama = await asyncio.to_thread(starting.__enter__)
    try:
        async with _connected(llama.url, llama.key) as session:
            order = list(range(len(experts)))
            yield LlamaEngine(session, list(experts), Turns(slots, most), order, len(order))
    finally:
        await asyncio.to_thread(starting.__exit__, None, None, None)


@asynccontextmanager
async def llama_server(url: str, key: str, experts: Sequence[Installed], most: int) -> AsyncIterator[LlamaEngine]:
    """A llama-server that someone else started, by `print_command` or alike.

    Raises:
        UserError: it does not answer, or has not loaded an expert's adapter.
    """
    async with _connected(url, key) as session:
        http = _Http(session)
        loaded = await http.json("GET", "/lora-adapters")
        paths = {adapter["path"]: adapter["id"] for adapter in loaded}
        if missing := [expert.name for expert in experts if str(expert.adapter) not in paths]:
            raise UserError(
                f"{url}: has not loaded {', '.join(missing)}; end it\n  then run: dmoe serve --print-command"
            )
        slots = int((await http.json("GET", "/props"))["total_slots"])
        order = [paths[str(expert.adapter)] for expert in experts]
        yield LlamaEngine(session, list(experts), Turns(slots, most), order, len(loaded))


def llama_command(
    base: Path, experts: Sequence[Installed], *, slots: int, context: int, threads: int | None
) -> list[str]:
    """The command line of a llama-server that serves what `own` would, in the same way.

    Raises:
        UserError: an adapter's path cannot be told in it.
    """
    if odd := [expert for expert in experts if set(",:") & set(str(expert.adapter))]:
        raise UserError(f"{odd[0].adapter}: llama-server takes no path with a comma or a colon for an adapter; move it")
    words = ["llama-server", "--model", str(base), "--host", "127.0.0.1", "--port", "8081"]
    words += ["--parallel", str(slots), "--ctx-size", str(slots * context)]
    words += ["--threads", str(threads), "--threads-batch", str(threads)] if threads else []
    # Scale 0: --lora-init-without-apply leaves the scales at 1 in current builds.
    if experts:
        words += ["--lora-scaled", ",".join(f"{expert.adapter}:0" for expert in experts)]
    words += ["--cache-ram", "0", "--ctx-checkpoints", "0"]  # kept prompts go from one adapter to another otherwise
    return [*words, "--jinja", "--reasoning", "off", "--no-warmup", "--threads-http", "128", "--no-webui"]


# -- vLLM -----------------------------------------------------------------------------------------

VLLM_AT_ONCE = 256  # requests sent to vLLM; it queues what it cannot run


@dataclass
class VllmEngine(_Http):
    """vLLM with LoRA. Adapters are told by the name under which they were loaded; all run in one batch."""

    adapters: list[Installed]
    turns: Turns
    base: str  # the base's name there
    names: list[str] = field(default_factory=list)
    kind: str = "vLLM"

    def group(self, scales: Scales) -> Scales | None:
        """All run together."""
        return None

    def fields(self, scales: Scales, place: Place, client: str) -> dict[str, Any]:
        """A salt for each client: what one has asked is no other's to find in the cache.

        Raises:
            UserError: more than one adapter, or another scale than the one it was loaded with.
        """
        chosen = [number for number, scale in enumerate(scales) if scale]
        if len(chosen) > 1 or any(scales[n] != self.adapters[n].scale for n in chosen):
            raise UserError("vLLM applies one adapter, at the scale that it was loaded with; ask for it by that scale")
        salt = {"cache_salt": client or "-"}
        # As llama.cpp is started: no thinking, and an empty think block where the base's template has one.
        return {"model": self.names[chosen[0]] if chosen else self.base, "chat_template_kwargs": {
            "enable_thinking": False}, **salt}  # fmt: skip


@asynccontextmanager
async def vllm(url: str, key: str, experts: Sequence[Installed], most: int, scaled: Path) -> AsyncIterator[VllmEngine]:
    """A vLLM that someone else started with --enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=1.

    Args:
        scaled: a folder for adapters whose recommended scale is not 1; vLLM must be able to read it, and theirs.

    Raises:
        UserError: it does not answer, or cannot load an adapter.
    """
    async with _connected(url, key) as session:
        http = _Http(session)
        models = (await http.json("GET", "/v1/models"))["data"]
        base = next(model["id"] for model in models if not model.get("parent"))
        there = {model["id"] for model in models}
        names = [f"{expert.lora_id}-{expert.digest[:12]}" for expert in experts]
        for name, expert in zip(names, experts, strict=True):
            if name not in there:
                folder = _scaled(expert, scaled / name)
                body = {"lora_name": name, "lora_path": str(folder.resolve())}
                await http.json("POST", "/v1/load_lora_adapter", body)
        yield VllmEngine(session, list(experts), Turns(VLLM_AT_ONCE, most), base, names)


def _scaled(expert: Installed, folder: Path) -> Path:
    """The PEFT adapter, or a copy of it that says alpha x scale: vLLM knows no other way to scale one."""
    if expert.peft is None:
        raise UserError(
            f"{expert.name}: has no PEFT adapter in its package, and vLLM reads no GGUF\n  then run: dvc repro"
        )
    if expert.scale == 1:
        return expert.peft
    config = json.loads((expert.peft / "adapter_config.json").read_text(encoding="utf-8"))
    with whole(folder) as temporary:
        temporary.mkdir()
        config["lora_alpha"] *= expert.scale
        (temporary / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
        (temporary / "adapter_model.safetensors").symlink_to((expert.peft / "adapter_model.safetensors").resolve())
    return folder


# -- a few questions, one after another -------------------------------------------------------------


@dataclass(frozen=True)
class Loaded:
    """A short-lived llama.cpp and its experts, in the order in which they are loaded."""

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
) -> Iterator[Loaded]:
    """llama.cpp with all `experts` on `base`; see factory.llama.running for arguments and errors."""
    adapters = [expert.adapter for expert in experts]
    with running(base, adapters, slots=slots, context=context, threads=threads, log=log) as llama:
        yield Loaded(llama, list(experts))


def ask(loaded: Loaded, messages: list[dict[str, Any]], expert: str | None, **options: Any) -> dict[str, Any]:
    """One chat completion by `expert`, or by the base where that is None."""
    return loaded.llama.chat(messages, loaded.scales(expert), **options)
