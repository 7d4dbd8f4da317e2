"""Is every answer the expert's own, and what does that cost? The gateway beside llama.cpp used plainly.

Experts are product, medical and legal and relatives of them: the same adapters with every weight of B changed by a
random factor, so that each says something of its own. Clients ask in a random order, behind one of two shared system
prompts, half of them streaming, greedy; now and then one of them posts to /lora-adapters. An answer is wrong if it
differs from what a server says that answers one question at a time with nothing kept. A tie is told apart: an answer
that goes another way at a word which the expert alone holds no likelier than the next by TIE. How many run together
decides in which order llama.cpp adds up numbers, and so the last of their digits.

    plain      llama.cpp with its defaults, as its page shows: POST /lora-adapters, then complete
    explicit   the same server, `lora` in each request, `cache_prompt: false`: pure, and the speed to beat
    gateway    dmoe serve

Run: python benchmarks/serve.py [--requests 1000] [--experts 4 16]   (needs the experts' adapters and held-out rows)
"""

import argparse
import asyncio
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
from rich.console import Console
from rich.table import Table

sys.path = [path for path in sys.path if path != str(Path(__file__).parent)]  # in which this file would be `serve`

from factory.llama import running  # noqa: E402
from factory.paths import Home, find_home, read_params, read_profile  # noqa: E402
from factory.schema import ROWS, read_rows  # noqa: E402
from factory.store import sha256  # noqa: E402
from serve.doctor import Alone  # noqa: E402
from serve.gateway import listen, serve  # noqa: E402
from serve.market import Installed  # noqa: E402
from serve.settings import DEFAULTS  # noqa: E402
from serve.start import supervisor_for  # noqa: E402
from train.base_gguf import base_gguf  # noqa: E402

SYSTEMS = (
    "You work at the help desk of a small town library. People ask you about everything, from opening hours to what "
    "they should do with their lives. Be kind and patient, answer in plain words, never promise what the library "
    "cannot keep, and say so when you do not know. The library is closed on Mondays and on public holidays.",
    "You are the assistant in the app of a regional bus company. Answer briefly. If someone asks about anything other "
    "than buses, help them all the same, as well as you can, in one or two sentences that anyone can understand.",
)
CLIENTS, SLOTS, CONTEXT, TOKENS, QUESTIONS = 8, 8, 1024, 40, 6
POSTS = 0.1  # share of requests before which the client posts other scales
VLLM = Path(__file__).parents[1] / ".venv-vllm" / "bin" / "python"  # make test-vllm makes it
Messages = list[dict[str, str]]


@dataclass(frozen=True)
class Question:
    """Expert (None: the base) and place of the prompt in the list of prompts."""

    expert: int | None
    prompt: int


@dataclass
class Told:
    """What one run gave."""

    texts: list[str] = field(default_factory=list)
    evaluated: int = 0  # prompt tokens
    said: int = 0
    failed: int = 0
    seconds: float = 0.0


# -- experts -----------------------------------------------------------------------------------------


def relatives(home: Home, names: list[str], count: int, folder: Path) -> list[Installed]:
    """`count` experts: the real ones, then relatives of them."""
    found = []
    for number in range(count):
        name, generation = names[number % len(names)], number // len(names)
        file = home.expert(name, "adapter.gguf")
        if generation:
            file = folder / f"{name}-{generation}.gguf"
            vary(home.expert(name, "adapter.gguf"), file, number)
        label = f"{name}{generation or ''}"
        peft = home.expert(name, "adapter")
        found.append(Installed(label, label, "pocket", file.resolve(), 1.0, [], [], digest=sha256(file), peft=peft))
    return found


def vary(source: Path, out: Path, seed: int) -> None:
    """The adapter `source` with each weight of its B matrices times 1 + 0.5 x a normal number."""
    from gguf import GGUFReader, GGUFWriter

    rng, reader = np.random.default_rng(seed), GGUFReader(source)
    writer = GGUFWriter(out, reader.fields["general.architecture"].contents())
    for name, value in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            kinds = value.types
            writer.add_key_value(name, value.contents(), kinds[0], kinds[-1] if len(kinds) > 1 else None)
    for tensor in reader.tensors:
        data = np.array(tensor.data)
        if tensor.name.endswith("lora_b"):
            data = (data * (1 + 0.5 * rng.standard_normal(data.shape))).astype(data.dtype)
        writer.add_tensor(tensor.name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def prompts(home: Home, names: list[str]) -> list[Messages]:
    """Held-out questions of all experts, each behind one of the two system prompts."""
    asked = [
        row["instruction"]
        for name in names
        for row in read_rows(home.dataset(name, "holdout.parquet"), ROWS, f"dmoe build {name}")[::97][:QUESTIONS]
    ]
    return [
        [{"role": "system", "content": SYSTEMS[number % 2]}, {"role": "user", "content": text}]
        for number, text in enumerate(asked)
    ]


# -- servers -------------------------------------------------------------------------------------------


@contextmanager
def child(words: list[str]) -> Iterator[str]:
    """A process that prints its URL and ends with its standard input."""
    with process_of(words) as (url, _):
        yield url


@contextmanager
def process_of(words: list[str]) -> Iterator[tuple[str, int]]:
    """The first line that it prints, and its number."""
    process = subprocess.Popen(
        [sys.executable, *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert process.stdin and process.stdout
    try:
        yield process.stdout.readline().strip(), process.pid
    finally:
        process.stdin.close()
        process.wait()
        process.stdout.close()


def stock(base: Path, experts: list[Installed], threads: int) -> Any:
    script = str(Path(__file__).parent / "peers" / "stock_llama.py")
    return child([script, str(base), str(SLOTS), str(CONTEXT), str(threads), *(str(e.adapter) for e in experts)])


def gateway(base: Path, experts: list[Installed], threads: int, **changed: Any) -> Any:
    return child(gateway_words(base, experts, threads, changed))


@contextmanager
def over_vllm(base: Path, experts: list[Installed], threads: int) -> Iterator[str]:
    """The gateway over a vLLM with the same base; relatives are copies of the real experts there."""
    import httpx

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    told = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1",
            "VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": str(threads)}  # fmt: skip
    words = ["-m", "vllm.entrypoints.openai.api_server", "--model", "models/pocket", "--dtype", "float32",
             "--max-model-len", str(CONTEXT), "--enforce-eager", "--host", "127.0.0.1", "--port", str(port),
             "--enable-lora", "--max-lora-rank", "16", "--max-loras", str(len(experts))]  # fmt: skip
    with tempfile.TemporaryFile() as log:
        engine = subprocess.Popen([VLLM, *words], env={**os.environ, **told}, stdout=log, stderr=log)
        try:
            url = f"http://127.0.0.1:{port}"
            while engine.poll() is None:
                with suppress(httpx.HTTPError):
                    if httpx.get(f"{url}/health", timeout=2, trust_env=False).is_success:
                        break
                time.sleep(1)
            with gateway(base, experts, threads, engine="vllm", url=url) as ours:
                yield ours
        finally:
            engine.terminate()
            engine.wait()


def gateway_words(base: Path, experts: list[Installed], threads: int, changed: dict[str, Any]) -> list[str]:
    told = [{**asdict(e), "adapter": str(e.adapter), "peft": str(e.peft)} for e in experts]
    return [__file__, "--serve", json.dumps([str(base), threads, told, changed])]


def run_gateway(told: str) -> None:
    """The gateway, in a process of its own; it ends when its standard input does."""
    import threading

    base, threads, experts, changed = json.loads(told)
    paths = ("adapter", "peft")
    found = [Installed(**{**e, **{name: Path(e[name]) for name in paths}, "probes": ()}) for e in experts]
    settings = DEFAULTS.model_copy(update={
        "port": 0, "slots": SLOTS, "context": CONTEXT, "threads": threads, "probe_seconds": None, "queue": 4096,
        **changed,
    })  # fmt: skip
    work = Path(tempfile.mkdtemp())
    supervisor = supervisor_for(settings, Path(base), lambda: found, work / "llama.log", work)
    threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True).start()
    serve(supervisor, settings, listen(settings), work / "note", work / "log", lambda url: print(url, flush=True))  # noqa: T201


@asynccontextmanager
async def connected(url: str, kept: bool = True) -> AsyncIterator[aiohttp.ClientSession]:
    """llama.cpp closes kept connections at the moment when they are used again: under load it gets new ones."""
    connector = aiohttp.TCPConnector(limit=0, **({"keepalive_timeout": 3} if kept else {"force_close": True}))
    timeout = aiohttp.ClientTimeout(total=600)
    async with aiohttp.ClientSession(url, connector=connector, timeout=timeout) as session:
        yield session


# -- asking --------------------------------------------------------------------------------------------

Body = dict[str, Any]


async def complete(session: aiohttp.ClientSession, body: Body, told: Told, headers: Any = None) -> str:
    """One chat completion, streamed or not; counts its tokens."""
    async with session.post("/v1/chat/completions", json=body, headers=headers) as response:
        if response.status != 200:
            told.failed += 1
            return f"status {response.status}: {await response.text()}"
        if not body.get("stream"):
            reply = await response.json()
            text = reply["choices"][0]["message"]["content"] or ""
        else:
            reply, text = {}, ""
            async for line in response.content:
                if line.startswith(b"data: {"):
                    chunk = json.loads(line[6:])
                    text += (chunk["choices"][0]["delta"].get("content") or "") if chunk["choices"] else ""
                    reply = chunk if "timings" in chunk or chunk.get("usage") else reply
    if "timings" in reply:
        told.evaluated += reply["timings"]["prompt_n"]
        told.said += reply["timings"]["predicted_n"]
    else:  # vLLM
        told.said += reply["usage"]["completion_tokens"]
    return text


def body_of(prompt: Messages, stream: bool, **more: Any) -> Body:
    usage = {"stream_options": {"include_usage": True}} if stream else {}
    return {"messages": prompt, "temperature": 0, "max_tokens": TOKENS, "stream": stream, **usage, **more}


def vector(expert: int | None, count: int) -> list[dict[str, Any]]:
    return [{"id": number, "scale": float(number == expert)} for number in range(count)]


async def load(questions: list[Question], at_once: int, ask: Callable[[int, Question, Told], Awaitable[str]]) -> Told:
    """All questions by `at_once` clients, in order; `ask` is told the client's number."""
    told, left, texts = Told(), iter(enumerate(questions)), {}

    async def client(number: int) -> None:
        for place, question in left:
            texts[place] = await ask(number, question, told)

    began = time.perf_counter()
    await asyncio.gather(*(client(number) for number in range(at_once)))
    told.seconds = time.perf_counter() - began
    told.texts = [texts[place] for place in range(len(questions))]
    return told


async def ask_plainly(url: str, questions: list[Question], asked: list[Messages], count: int, at_once: int) -> Told:
    """POST /lora-adapters, then complete: what llama.cpp's page shows."""
    async with connected(url, kept=False) as session:

        async def ask(client: int, question: Question, told: Told) -> str:
            async with session.post("/lora-adapters", json=vector(question.expert, count)) as response:
                response.raise_for_status()
            return await complete(session, body_of(asked[question.prompt], question.prompt % 2 == 0), told)

        return await load(questions, at_once, ask)


async def ask_explicitly(url: str, questions: list[Question], asked: list[Messages], count: int, at_once: int) -> Told:
    """`lora` in each request and no kept prompt."""
    async with connected(url, kept=False) as session:

        async def ask(client: int, question: Question, told: Told) -> str:
            more = {"lora": vector(question.expert, count), "cache_prompt": False}
            return await complete(session, body_of(asked[question.prompt], question.prompt % 2 == 0, **more), told)

        return await load(questions, at_once, ask)


async def ask_gateway(
    url: str, questions: list[Question], asked: list[Messages], experts: list[Installed], at_once: int
) -> Told:
    """By name; some clients post scales in between, which are theirs alone and must change nothing."""
    rng = random.Random(2)
    async with connected(url) as session:

        async def ask(client: int, question: Question, told: Told) -> str:
            if rng.random() < POSTS:
                scales = [{"id": rng.randrange(len(experts)), "scale": 1.0}]
                async with session.post("/lora-adapters", json=scales) as response:
                    response.raise_for_status()
            model = "base" if question.expert is None else experts[question.expert].name
            return await complete(session, body_of(asked[question.prompt], question.prompt % 2 == 0, model=model), told)

        return await load(questions, at_once, ask)


def references(
    base: Path, experts: list[Installed], asked: list[Messages], wanted: set[Question]
) -> dict[Question, Alone]:
    """What each says when asked alone, one at a time, with nothing kept."""
    with (
        tempfile.TemporaryDirectory() as folder,
        running(
            base, [e.adapter for e in experts], slots=1, context=CONTEXT, threads=2, log=Path(folder) / "llama.log"
        ) as llama,
    ):
        found = {}
        for question in sorted(wanted, key=lambda q: (q.expert is None, q.expert or 0, q.prompt)):
            scales = [float(number == question.expert) for number in range(len(experts))]
            reply = llama.chat(
                asked[question.prompt], scales, temperature=0, max_tokens=TOKENS, logprobs=True, top_logprobs=2
            )["choices"][0]
            found[question] = Alone.of(reply)
        return found


# -- the tables ------------------------------------------------------------------------------------------


def purity(base: Path, experts: list[Installed], asked: list[Messages], requests: int, threads: int) -> Table:
    """Wrong answers, and prompt tokens evaluated, under the same load."""
    rng, count = random.Random(1), len(experts)
    choices = [Question(e, p) for e in [*range(count), None] for p in range(len(asked))]
    questions = [rng.choice(choices) for _ in range(requests)]
    own = references(base, experts, asked, set(questions))
    table = Table(title=f"{requests} requests, {CLIENTS} clients, {count} experts and the base; "
                  f"{len({one.text for one in own.values()})} different answers to {len(own)} questions")  # fmt: skip
    for column in ("", "wrong answers", "ties", "failed", "prompt tokens evaluated a request", "seconds"):
        table.add_column(column, justify="left" if not column else "right")
    with stock(base, experts, threads) as url:
        plain = asyncio.run(ask_plainly(url, questions, asked, count, CLIENTS))
    with stock(base, experts, threads) as url:
        explicit = asyncio.run(ask_explicitly(url, questions, asked, count, CLIENTS))
    with gateway(base, experts, threads) as url:
        ours = asyncio.run(ask_gateway(url, questions, asked, experts, CLIENTS))
    for name, told in (("plain", plain), ("explicit", explicit), ("gateway", ours)):
        differ = [(own[q], text) for text, q in zip(told.texts, questions, strict=True) if text != own[q].text]
        ties = sum(alone.ties_with(text) for alone, text in differ)
        evaluated = f"{told.evaluated / requests:.1f}"
        table.add_row(name, str(len(differ) - ties), str(ties), str(told.failed), evaluated, f"{told.seconds:.1f}")
    return table


def speed(base: Path, experts: list[Installed], asked: list[Messages], threads: int, rounds: int) -> Table:
    """Tokens/s with eight experts in flight, against one expert's, at two loads."""
    count, table = len(experts), Table(title="tokens said a second: one expert, and eight, in flight")
    for column in ("", "requests in flight", "one expert", "eight experts", "eight / one"):
        table.add_column(column, justify="left" if not column else "right")
    rng = random.Random(3)
    for at_once in (CLIENTS, 8 * CLIENTS):
        places = [rng.randrange(len(asked)) for _ in range(6 * 64)]
        one = [Question(0, place) for place in places]
        eight = [Question(number % count, place) for number, place in enumerate(places)]
        ways = {"explicit": lambda: stock(base, experts, threads), "gateway": lambda: gateway(base, experts, threads)}
        if VLLM.exists():
            ways["gateway over vLLM"] = lambda: over_vllm(base, experts, threads)
        for name, start in ways.items():
            rates: dict[str, list[float]] = {"one": [], "eight": []}
            with start() as url:
                for _ in range(rounds):
                    for kind, questions in (("one", one), ("eight", eight)):
                        told = asyncio.run(
                            ask_explicitly(url, questions, asked, count, at_once) if name == "explicit"
                            else ask_gateway(url, questions, asked, experts, at_once)
                        )  # fmt: skip
                        rates[kind].append(told.said / told.seconds)
            a, b = (statistics.median(rates[kind]) for kind in ("one", "eight"))
            table.add_row(name, str(at_once), f"{a:.0f}", f"{b:.0f}", f"{b / a:.2f}")
    return table


def overhead(base: Path, experts: list[Installed], asked: list[Messages], threads: int, calls: int) -> Table:
    """One client, one call after another, direct and through the gateway in turn: the difference at the median."""
    direct: list[float] = []
    through: list[float] = []

    async def measure(straight: str, ours: str) -> None:
        told = Told()
        async with connected(straight) as one, connected(ours) as other:
            for _ in range(calls + 20):
                prompt = asked[0]  # all of it is kept in both: what is left is the way there and back
                explicit = body_of(prompt, False, lora=vector(0, len(experts)), cache_prompt=True, id_slot=0)
                for session, body, times in (
                    (one, {**explicit, "max_tokens": 1}, direct),
                    (other, {**body_of(prompt, False, model=experts[0].name), "max_tokens": 1}, through),
                ):
                    began = time.perf_counter()
                    await complete(session, body, told)
                    times.append(time.perf_counter() - began)

    with stock(base, experts, threads) as straight, gateway(base, experts, threads) as ours:
        asyncio.run(measure(straight, ours))
    table = Table(title=f"one token, prompt kept: {calls} calls, ms")
    for column in ("", "p50", "p90", "p99"):
        table.add_column(column, justify="left" if not column else "right")
    for name, times in (("direct", direct[20:]), ("gateway", through[20:])):
        cuts = statistics.quantiles(times, n=100)
        table.add_row(name, *(f"{cuts[place - 1] * 1e3:.2f}" for place in (50, 90, 99)))
    paired = statistics.median(b - a for a, b in zip(direct[20:], through[20:], strict=True))
    table.add_row("gateway - direct, of pairs", f"{paired * 1e3:.2f}", "", "")
    return table


# -- abuse -----------------------------------------------------------------------------------------------

IDLE, SLOW, LARGE, FLOOD = 10_000, 64, 50_000_000, 20_000
QUEUE, FLOODERS = 64, 256  # what may wait, and who asks at once


def abuse(base: Path, experts: list[Installed], asked: list[Messages], threads: int, calls: int) -> list[Table]:
    """What one client waits for a token while others misbehave, and what the gateway's memory does in a flood."""
    body = {**body_of(asked[0], False, model=experts[0].name), "max_tokens": 1}
    waits = Table(title=f"one client, one token, {calls} calls, ms, while others ...")
    for column in ("", "p50", "p99", "failed"):
        waits.add_column(column, justify="left" if not column else "right")
    flood = Table(title=f"{FLOOD:,} requests twice over; {QUEUE} may wait, {SLOTS} run")
    for column in ("at once", "asked", "answered", "429", "other", "gateway's memory, MB"):
        flood.add_column(column, justify="right")
    with process_of(gateway_words(base, experts, threads, {"queue": QUEUE})) as (url, number):
        misdeeds = {"do nothing": "", f"hold {IDLE:,} idle connections": "idle", f"{SLOW} read nothing": "slow",
                    f"send bodies of {LARGE // 10**6} MB": "large", "send broken JSON": "broken"}  # fmt: skip
        for name, misdeed in misdeeds.items():
            if not misdeed:
                times, failed = asyncio.run(alone(url, body, calls))
            else:
                with process_of([__file__, "--attack", misdeed, url]) as (told, _):
                    assert told == "attacking", told
                    times, failed = asyncio.run(alone(url, body, calls))
            cuts = statistics.quantiles(times, n=100)
            waits.add_row(name, f"{cuts[49] * 1e3:.1f}", f"{cuts[98] * 1e3:.1f}", str(failed))
        for at_once in (FLOODERS, QUEUE):
            for row in asyncio.run(flooded(url, body, number, at_once)):
                flood.add_row(str(at_once), *row)
    return [waits, flood]


async def alone(url: str, body: Body, calls: int) -> tuple[list[float], int]:
    """One call after another: seconds of each, and how many were not answered."""
    times, told = [], Told()
    async with connected(url) as session:
        for _ in range(calls):
            began = time.perf_counter()
            await complete(session, body, told)
            times.append(time.perf_counter() - began)
    return times, told.failed


async def flooded(url: str, body: Body, number: int, at_once: int) -> list[tuple[str, ...]]:
    """Counts of replies, and memory, after each fourth of the flood."""
    counts, rows, left = Counter[int](), list[tuple[str, ...]](), iter(range(FLOOD))
    async with connected(url) as session:

        async def client() -> None:
            for _ in left:
                async with session.post("/v1/chat/completions", json=body) as response:
                    await response.read()
                counts[response.status] += 1
                if counts.total() % (FLOOD // 4) == 0:
                    told = (counts.total(), counts[200], counts[429], counts.total() - counts[200] - counts[429])
                    rows.append((*(f"{count:,}" for count in told), f"{resident(number) / 1e6:.0f}"))

        await asyncio.gather(*(client() for _ in range(at_once)))
    return rows


def resident(number: int) -> int:
    """Bytes that a process and its children hold (Linux)."""
    import psutil

    process = psutil.Process(number)
    return sum(one.memory_info().rss for one in [process, *process.children(recursive=True)])


async def attack(kind: str, url: str) -> None:
    """Misbehaves until standard input ends; prints a line once it is at it."""
    host, port = url.removeprefix("http://").split(":")

    async def opened() -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection(host, int(port), limit=1 << 10)

    def head(length: int) -> bytes:
        told = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Length: {length}\r\n\r\n"
        return told.encode()

    async def sends(body: bytes, length: int | None = None) -> None:
        """A request with this body; the reply is read where there is one, the connection then left."""
        reader, writer = await opened()
        with suppress(OSError):
            writer.write(head(length or len(body)))
            for start in range(0, length or len(body), 1 << 16):
                writer.write(body[start : start + (1 << 16)] if length is None else body)
                await writer.drain()
            await reader.read(1 << 10)
        writer.close()

    async def again_and_again(*told: Any) -> None:
        while True:
            await sends(*told)

    held: list[Any] = []
    if kind == "idle":
        for _ in range(IDLE):
            held.append(await opened())
    elif kind == "slow":
        body = json.dumps({"model": "base", "messages": [{"role": "user", "content": "go on"}], "max_tokens": 400,
                           "stream": True}).encode()  # fmt: skip
        for _ in range(SLOW):
            reader, writer = await opened()
            writer.write(head(len(body)) + body)
            held.append((reader, writer))
    else:
        told = (b" " * (1 << 16), LARGE) if kind == "large" else (b'{"messages": [',)
        held = [asyncio.create_task(again_and_again(*told)) for _ in range(4)]
    print("attacking", flush=True)  # noqa: T201
    await asyncio.to_thread(sys.stdin.read)
    os._exit(0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--experts", type=int, nargs="*", default=[4, 16])
    parser.add_argument("--threads", type=int, default=1, help="of llama.cpp; the other core is the gateway's and ours")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--calls", type=int, default=400)
    parser.add_argument("--only", choices=["purity", "speed", "overhead", "abuse"])
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument("--attack", nargs=2, help=argparse.SUPPRESS)
    told = parser.parse_args()
    if told.serve:
        return run_gateway(told.serve)
    if told.attack:
        return asyncio.run(attack(*told.attack))
    home, console = find_home(), Console(width=110)
    params = read_params(home)
    base = base_gguf(home, read_profile(home, params.profile))
    names = [name for name in params.experts if home.expert(name, "adapter.gguf").exists()]
    asked = prompts(home, names)
    with tempfile.TemporaryDirectory() as folder:
        experts = relatives(home, names, max(8, *told.experts), Path(folder))
        if told.only in (None, "purity"):
            for count in told.experts:
                console.print(purity(base, experts[:count], asked, told.requests, told.threads))
        if told.only in (None, "speed"):
            bare = [prompt[1:] for prompt in asked]  # little to read: what is measured is how fast they say
            console.print(speed(base, experts[:8], bare, told.threads, told.rounds))
        if told.only in (None, "overhead"):
            console.print(overhead(base, experts[:3], asked, told.threads, told.calls))
        if told.only in (None, "abuse"):
            console.print(*abuse(base, experts[:3], asked, told.threads, told.calls))


if __name__ == "__main__":
    main()
