"""What several test modules need to serve: experts on the tiny base, a supervisor, a gateway on a real port."""

import asyncio
import os
import signal
import threading
from contextlib import contextmanager, suppress
from pathlib import Path

import uvicorn

from serve.gateway import app, listen, opened
from serve.market import Installed
from serve.settings import DEFAULTS
from serve.start import supervisor_for


def expert(name, keywords, not_keywords=(), adapter=None, **more):
    return Installed(name, f"{name}_expert", "tiny", adapter, 1.0, list(keywords), list(not_keywords), **more)


def red_and_blue(ggufs, folders=(None, None)):
    """Two experts whose hashes are made up, so that a test can tell them at a glance."""
    return [
        expert("red", ["rose", "fire engine"], ["rose tinted"], ggufs[0], digest="d" * 64, peft=folders[0]),
        expert("blue", ["sky"], [], ggufs[1], digest="e" * 64, peft=folders[1]),
    ]


def supervised(base, find, log, **changed):
    """A supervisor over an engine of its own, unless `changed` says another, and its settings."""
    settings = DEFAULTS.model_copy(update={"threads": 1, "slots": 4, "context": 1024, "probe_seconds": None, **changed})
    return supervisor_for(settings, base, find, log / "llama.log", log / "scaled"), settings


@contextmanager
def live(supervisor, settings, token=""):
    """A gateway on a port of its own, in a thread; yields its URL."""
    listener = listen(settings.model_copy(update={"port": 0}))
    config = uvicorn.Config(app(supervisor, settings, token), log_level="critical", lifespan="off")
    server, failed = uvicorn.Server(config), []

    async def run():
        async with opened(supervisor, settings):
            await server.serve(sockets=[listener])

    def thread():
        try:
            asyncio.run(run())
        except Exception as error:
            failed.append(error)

    running = threading.Thread(target=thread)
    running.start()
    try:
        while not server.started and running.is_alive():
            running.join(0.02)
        if failed:
            raise failed[0]
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        running.join()
        listener.close()


def kill_engine(supervisor):
    """As the kernel would: without a word. Its pid is that of the only child that runs llama.cpp."""
    port = str(supervisor.serving.engine.session._base_url.port)
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if b"factory.llama" in (process / "cmdline").read_bytes() and port in listening(process):
                os.kill(int(process.name), signal.SIGKILL)
                return
    raise AssertionError("no engine found")


def listening(process):
    """The ports on which a process listens."""
    inodes = {os.readlink(fd)[8:-1] for fd in (process / "fd").iterdir() if os.readlink(fd).startswith("socket:[")}
    rows = [line.split() for line in (process / "net/tcp").read_text().splitlines()[1:]]
    return {str(int(row[1].split(":")[1], 16)) for row in rows if row[3] == "0A" and row[9] in inodes}
