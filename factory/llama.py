"""llama.cpp's own server, from the xllamacpp wheel, in a process of its own on loopback.

`running` starts it, waits until it answers and ends it. As a program (`python -m factory.llama`) this
file is that process: it reads its settings as one line of JSON, answers with its address, and ends
when its standard input does, so that it never outlives the process that started it.
"""

import json
import os
import queue
import re
import secrets
import select
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from factory.errors import UserError, relative

if TYPE_CHECKING:
    import httpx

START_SECONDS = 300.0  # a large base is read from a cold disk
REPLY_SECONDS = 600.0
SMALL = 1 << 30  # bytes of a base's GGUF
CONNECTIONS = 64  # of one client; llama.cpp keeps a thread for each open connection, even an idle one


@dataclass(frozen=True)
class Llama:
    """A running server. `adapters` are the loaded files' paths: position in it = id in llama.cpp."""

    url: str
    key: str  # bearer token: other users of this machine can reach loopback too
    adapters: list[str]
    client: "httpx.Client"  # safe to use from many threads

    def lora(self, scales: Sequence[float]) -> dict[str, Any]:
        """The request field that switches adapters: always the full vector.

        llama.cpp reads a missing or empty list as "as the server stands", not as "none".

        Raises:
            ValueError: not one scale for each adapter.
        """
        if len(scales) != len(self.adapters):
            raise ValueError(f"{len(scales)} scales for {len(self.adapters)} adapters")
        return {"lora": [{"id": i, "scale": float(s)} for i, s in enumerate(scales)]} if scales else {}

    def chat(self, messages: list[dict[str, Any]], scales: Sequence[float] = (), **options: Any) -> dict[str, Any]:
        """One chat completion (OpenAI's form) with exactly these adapter scales; `options` go to llama.cpp."""
        body = {"messages": messages, "cache_prompt": False, **options, **self.lora(scales)}
        return self.post("/v1/chat/completions", body)

    def complete(self, prompt: str | list[int], scales: Sequence[float] = (), **options: Any) -> dict[str, Any]:
        """One raw completion (llama.cpp's own form) of a text or of token ids."""
        return self.post("/completion", {"prompt": prompt, "cache_prompt": False, **options, **self.lora(scales)})

    def tokenize(self, text: str) -> list[int]:
        """Token ids of `text`, special tokens read as such."""
        return list(self.post("/tokenize", {"content": text, "parse_special": True})["tokens"])

    def thinks(self) -> bool:
        """Whether the base's chat template has a switch for thinking."""
        return "enable_thinking" in self.client.get("/props").raise_for_status().json()["chat_template"]

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """One request to the server.

        Raises:
            UserError: it refused (with its message) or is gone.
        """
        import httpx

        try:
            response = self.client.post(path, json=body)
        except httpx.HTTPError as error:
            raise UserError(f"llama.cpp: no answer to {path} ({error or type(error).__name__})") from error
        if response.is_error:
            raise UserError(f"llama.cpp: {path}: {response.status_code}: {refusal(response.text)}")
        return dict(response.json())


def refusal(text: str) -> str:
    """The message inside an error reply of llama.cpp, on one line."""
    try:
        return " ".join(str(json.loads(text)["error"]["message"]).split())
    except (ValueError, KeyError, TypeError):
        return " ".join(text.split())[:200]


@contextmanager
def running(
    base: Path,
    adapters: Sequence[Path] = (),
    *,
    slots: int = 4,
    context: int = 1024,
    threads: int | None = None,
    exact: bool = False,
    log: Path,
) -> Iterator[Llama]:
    """A server with `base` and all `adapters` loaded, each at scale 0.

    Args:
        base: GGUF of the base model.
        adapters: GGUF adapters made for it.
        slots: requests worked on at once.
        context: tokens per slot, prompt and reply together.
        threads: of the CPU; None leaves it to llama.cpp.
        exact: nothing is rounded to float16 that is float32 in torch; slower, for comparing numbers.
        log: file that llama.cpp writes to; replaced.

    Raises:
        UserError: a file is missing or damaged, or the server did not start.
    """
    import httpx

    for file in (base, *adapters):
        _refuse_file(file)
    key = secrets.token_hex(16)
    settings = {
        "base": str(base),
        "adapters": list(map(str, adapters)),
        "slots": slots,
        "context": context,
        "threads": threads,
        "exact": exact,
        "key": key,
    }
    log.parent.mkdir(parents=True, exist_ok=True)
    process = _start(settings, log)
    try:
        url = _address(process, base, log)
        limits = httpx.Limits(max_connections=CONNECTIONS)
        # trust_env: a proxy of the environment must never stand between us and loopback.
        with httpx.Client(
            base_url=url,
            headers={"Authorization": f"Bearer {key}"},
            timeout=REPLY_SECONDS,
            limits=limits,
            trust_env=False,
        ) as client:
            yield Llama(url, key, list(map(str, adapters)), client)
    finally:
        _end(process)


class Turns:
    """Servers with the same files, each of which answers so many requests at once as it is put in here."""

    def __init__(self) -> None:
        self._free: queue.SimpleQueue[Llama] = queue.SimpleQueue()

    def put(self, server: Llama) -> None:
        self._free.put(server)

    @contextmanager
    def turn(self) -> Iterator[Llama]:
        """A server for one request; waits until one is free."""
        server = self._free.get()
        try:
            yield server
        finally:
            self._free.put(server)


@contextmanager
def many_asked(base: Path, adapters: Sequence[Path], *, at_once: int, context: int, log: Path) -> Iterator[Turns]:
    """As `running`, for many requests.

    A small base is loaded once a core, each time for one thread and one request. A reply is then a function of its
    request alone: what shares a batch, and how many threads add up, decides last bits, and where two words are as
    good as tied, the reply. A large base is loaded once, for `at_once` requests, and is not so exact.

    Raises:
        UserError: as `running` does.
    """
    _refuse_file(base)
    small = base.stat().st_size < SMALL
    cores = int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)
    turns = Turns()
    with ExitStack() as stack:
        for i in range(min(at_once, cores) if small else 1):
            settings: dict[str, Any] = {"slots": 1 if small else at_once, "threads": threads_for(base)}
            name = log.with_stem(f"{log.stem}-{i + 1}") if i else log
            server = stack.enter_context(running(base, adapters, context=context, log=name, **settings))
            for _ in range(settings["slots"]):
                turns.put(server)
        yield turns


def threads_for(base: Path) -> int | None:
    """One for a small base: it is computed while more would still wait for one another."""
    return 1 if base.stat().st_size < SMALL else None


def _refuse_file(file: Path) -> None:
    try:
        with file.open("rb") as stream:
            magic = stream.read(4)
    except OSError as error:
        raise UserError(f"{relative(file)}: cannot be read: {error.strerror}") from None
    if magic != b"GGUF":
        raise UserError(f"{relative(file)}: is not a GGUF file; make it again")


def _start(settings: dict[str, Any], log: Path) -> subprocess.Popen[str]:
    root = str(Path(__file__).parents[1])
    path = os.pathsep.join(p for p in (root, os.environ.get("PYTHONPATH")) if p)
    with log.open("wb") as stream:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "factory.llama"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stream,
            text=True, env={**os.environ, "PYTHONPATH": path},
            start_new_session=True,  # Ctrl-C in the terminal is the parent's to handle, after the last reply
        )  # fmt: skip
    assert process.stdin is not None
    with suppress(BrokenPipeError):  # it died at once: `_address` tells why
        process.stdin.write(json.dumps(settings) + "\n")
        process.stdin.flush()
    return process


def _address(process: subprocess.Popen[str], base: Path, log: Path) -> str:
    """The child's URL, once it is ready; it prints it only when the model is loaded and /health says so."""
    assert process.stdout is not None
    ready, _, _ = select.select([process.stdout], [], [], START_SECONDS)
    line = process.stdout.readline().strip() if ready else ""
    if line:
        return line
    file, reason = _blame(log, base) if ready else (base, f"it was not ready after {START_SECONDS:.0f} s")
    raise UserError(f"{relative(file)}: llama.cpp cannot load it: {reason} (see {relative(log)})")


def _blame(log: Path, base: Path) -> tuple[Path, str]:
    """Which file, and why: the first error of a log is the cause, those after it only follow."""
    text = log.read_text(encoding="utf-8", errors="replace")
    adapter = re.search(r"failed to load lora adapter '(.+)'", text)
    lines = re.findall(r"^[\d.]+ E (?:\w+ +)?[\w()]+: (.+)$", text, re.MULTILINE) or text.strip().splitlines()[-1:]
    return Path(adapter[1]) if adapter else base, (lines or ["it ended without a word"])[0].strip()[:300]


def _end(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None and process.stdout is not None
    process.kill()  # it holds nothing that needs saving
    process.wait()
    process.stdin.close()
    process.stdout.close()


# -- the child ----------------------------------------------------------------------------------


def _serve(settings: dict[str, Any]) -> str:
    """Starts the server inside this process and returns its address."""
    import httpx
    import xllamacpp as xl

    p = xl.CommonParams()
    p.model.path = settings["base"]
    # Scale 0 here: `lora_init_without_apply` does not zero the scales in current builds.
    p.lora_adapters = [xl.CommonAdapterLoraInfo(path, 0.0) for path in settings["adapters"]]
    p.n_parallel, p.n_ctx = settings["slots"], settings["slots"] * settings["context"]
    if settings["threads"]:
        p.cpuparams.n_threads = p.cpuparams_batch.n_threads = settings["threads"]
    if settings["exact"]:  # flash attention rounds keys and values to float16 even from a float32 cache
        p.cache_type_k = p.cache_type_v = xl.ggml_type.GGML_TYPE_F32
        p.flash_attn_type = xl.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    p.cache_ram_mib = 0  # the RAM prompt cache gives one expert's keys and values to another
    p.n_ctx_checkpoints = 0
    p.fit_params = False  # the context is asked for, never shrunk to what fits
    p.warmup = p.ui = False
    p.use_jinja = True
    # Thinking off, said and not guessed: llama.cpp would think or not by what it makes of the template, and a grammar
    # or JSON schema would then forbid the think block. The prompt ends with an empty one, as experts are trained.
    p.enable_reasoning = 0
    p.reasoning_format = xl.common_reasoning_format.COMMON_REASONING_FORMAT_DEEPSEEK
    p.n_threads_http = 2 * CONNECTIONS  # this module's client, and a gateway's own
    p.hostnames, p.port = ["127.0.0.1"], 0
    p.api_keys = [settings["key"]]
    server = xl.Server(p)
    globals()["_server"] = server  # it ends when it is collected
    address = server.listening_address
    httpx.get(address + "/health", timeout=START_SECONDS, trust_env=False).raise_for_status()
    return str(address)


def _main() -> None:
    settings = json.loads(sys.stdin.readline())

    def watch() -> None:
        sys.stdin.read()
        os._exit(0)

    threading.Thread(target=watch, daemon=True).start()
    try:
        address = _serve(settings)
    except Exception as error:
        time.sleep(0.5)  # llama.cpp's log is written by a thread of its own, and its reason stands there
        sys.stderr.write(f"error: {error}\n")
        os._exit(1)
    sys.stdout.write(address + "\n")
    sys.stdout.flush()
    while True:
        time.sleep(3600)


if __name__ == "__main__":
    _main()
