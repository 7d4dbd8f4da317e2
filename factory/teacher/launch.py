"""A vLLM of one's own for as long as a stage needs it: started, waited for, ended, with its log in a file.

`DMOE_VLLM` names the Python that has vllm, where it is not this one: vLLM wants an environment to itself.
The kernel ends the server when its parent ends, so that no killed run leaves a GPU taken.
"""

import asyncio
import importlib.util
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Self

import httpx

from factory.errors import UserError, relative
from factory.paths import Home, Launched
from factory.teacher.client import Address, Client, connected

START_SECONDS = 3600.0  # a large model may have to be downloaded first
END_SECONDS = 30.0
# JSON without white space between its tokens: fewer of them, and a weak model cannot lose itself in blank lines.
COMPACT = '{"backend": "xgrammar", "disable_any_whitespace": true}'
SHIM = """
import ctypes, os, signal, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG, which outlives the exec
os.execvp(sys.argv[1], sys.argv[1:])
"""


class Standing:
    """A vLLM with `served`, started when it is first needed, ended with the block: several stages may share it."""

    def __init__(self, served: Launched, home: Home) -> None:
        self.served, self.log = served, home.work / "logs" / "vllm.log"
        self._home = home
        self._process: subprocess.Popen[bytes] | None = None
        self._address = Address("", {}, ())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process:
            _end(self._process)
        self._process = None

    @asynccontextmanager
    async def connect(self) -> AsyncIterator[Client]:
        """A client of it, in the running loop.

        Raises:
            UserError: there is no vLLM, it does not start, or it ended in the middle; with its log's reason.
        """
        try:
            if self._process is None:
                await self._start()
            async with connected(self._address) as client:
                yield client
        finally:
            if self._process and (ended := self._process.poll()) is not None:
                await asyncio.to_thread(self.__exit__)
                raise UserError(f"vLLM ended with {ended}: {_reason(self.log)} (see {relative(self.log)})")

    async def _start(self) -> None:
        key, port = secrets.token_urlsafe(24), _free_port()
        self._process = _start(command(self.served, self._home, port), key, self.log)
        sys.stderr.write(f"starting vLLM with {self.served.model} (log: {relative(self.log)})\n")
        url = f"http://127.0.0.1:{port}"
        try:
            await _ready(self._process, url, self.log)
        except BaseException:
            if self._process.poll() is None:  # one that has ended is told of by `connect`
                await asyncio.to_thread(self.__exit__)
            raise
        self._address = Address(f"{url}/v1", {"Authorization": f"Bearer {key}"}, (key,), local=True)


@asynccontextmanager
async def launched(served: Launched, home: Home) -> AsyncIterator[Client]:
    """A client of a vLLM with `served`, which ends with the block.

    Raises:
        UserError: there is no vLLM, it does not start, or it ended in the middle; with its log's reason.
    """
    standing = Standing(served, home)
    try:
        async with standing.connect() as client:
            yield client
    finally:
        await asyncio.to_thread(standing.__exit__)


def command(served: Launched, home: Home, port: int) -> list[str]:
    """The command line of vLLM's server; a folder of this checkout is served by the name that params.yaml gives it."""
    folder = home.root / served.model
    model = ["--model", str(folder) if folder.is_dir() else served.model, "--served-model-name", served.model]
    revision = ["--revision", served.revision] if served.revision and not folder.is_dir() else []
    compact = ["--structured-outputs-config", COMPACT] if "--structured-outputs-config" not in served.serve else []
    place = ["--host", "127.0.0.1", "--port", str(port)]
    # not the `vllm` program: the CPU build's fails for want of metadata
    return [_python(), "-m", "vllm.entrypoints.openai.api_server", *model, *revision, *place, *compact, *served.serve]


def _python() -> str:
    given = os.environ.get("DMOE_VLLM")
    if given and not shutil.which(given):
        raise UserError(f"DMOE_VLLM: {given!r} is no program; name the Python of the environment that has vllm")
    if not given and importlib.util.find_spec("vllm") is None:
        raise UserError(
            "params.yaml: teacher.kind is vllm, and there is no vllm here\n"
            "  then install it into an environment of its own and run: export DMOE_VLLM=/that/environment/bin/python"
        )
    return str(Path(given).absolute()) if given and os.sep in given else given or sys.executable


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def _start(words: list[str], key: str, log: Path) -> subprocess.Popen[bytes]:
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "VLLM_API_KEY": key, "VLLM_NO_USAGE_STATS": "1"}
    with log.open("wb") as stream:
        return subprocess.Popen(
            [sys.executable, "-c", SHIM, *words],
            stdin=subprocess.DEVNULL, stdout=stream, stderr=subprocess.STDOUT, env=environment, start_new_session=True,
        )  # fmt: skip


async def _ready(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    """Returns when /health says yes, or when the process has ended, which the caller then tells."""
    until = time.monotonic() + START_SECONDS
    async with httpx.AsyncClient(trust_env=False, timeout=5.0) as client:
        while time.monotonic() < until:
            if process.poll() is not None:
                raise UserError("vLLM has ended")
            with suppress(httpx.HTTPError):
                if (await client.get(f"{url}/health")).is_success:
                    return
            await asyncio.sleep(0.5)
    raise UserError(f"vLLM was not ready after {START_SECONDS:.0f} s (see {relative(log)})")


def _reason(log: Path) -> str:
    """The first error that a log tells: those after it only follow."""
    text = log.read_text(encoding="utf-8", errors="replace")
    errors = re.findall(r"(?:^|\s)((?:\w+\.)*\w*(?:Error|Exception): .+|[\w.-]+: error: .+)$", text, re.MULTILINE)
    lines = errors or text.strip().splitlines()[-1:] or ["without a word"]
    return str(lines[0]).strip()[:300]


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends the server and its workers: politely, then not."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        process.wait(END_SECONDS)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
