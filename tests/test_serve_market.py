"""Experts of the marketplace in a server that runs: installed, promoted and taken back with no request failed."""

import json
import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from package_shapes import make
from serving import live, supervised

from factory.errors import UserError
from factory.gguf_file import read_base
from factory.paths import Home
from serve.engine import ask, started
from serve.gateway import poke
from serve.install import install
from serve.market import market_experts, promote, read_manifest, remove, rollback, served

ROOT = Path(__file__).parents[1]
TALK = [{"role": "user", "content": "hello"}]


@pytest.fixture
def shop(tmp_path, tiny_gguf, tiny_adapters, tiny_ggufs):
    """What puts a package of the name `red` with one of the two tiny adapters into this test's $DMOE_HOME."""

    def put(version, adapter, probe=(), name="red"):
        source = make(tmp_path / f"{name}-{version}", name, tiny_adapters[adapter], tiny_ggufs[adapter], tiny_gguf,
                      version=version, probe=list(probe))  # fmt: skip
        return install(str(source), tmp_path / "home", read_base(tiny_gguf), {})

    return put


@pytest.fixture(scope="module")
def alone(tiny_gguf, tiny_ggufs, tmp_path_factory):
    """What each of the two adapters says when nothing else is asked."""
    from serving import red_and_blue

    with started(
        tiny_gguf, red_and_blue(tiny_ggufs), slots=1, threads=1, log=tmp_path_factory.mktemp("log") / "llama.log"
    ) as loaded:
        return [text(ask(loaded, TALK, name, temperature=0, max_tokens=12)) for name in ("red", "blue")]


def text(reply):
    return reply["choices"][0]["message"]["content"]


def test_an_upgrade_is_tried_promoted_and_taken_back_and_no_request_fails(shop, tmp_path, tiny_gguf, alone):
    folder, note = tmp_path / "home", tmp_path / "note"
    shop(1, 0)
    supervisor, settings = supervised(tiny_gguf, lambda: market_experts(folder), tmp_path)
    with live(supervisor, settings, "token") as url, httpx.Client(base_url=url, timeout=60) as client:
        note.write_text(json.dumps({"url": url, "token": "token"}))
        over, codes = threading.Event(), []

        def keep_asking():
            while not over.is_set():
                codes.append(said("red")[0])

        def said(model):
            reply = client.post("/v1/chat/completions", json={
                "model": model, "messages": TALK, "temperature": 0, "max_tokens": 12})  # fmt: skip
            return reply.status_code, text(reply.json()) if reply.is_success else reply.text

        with ThreadPoolExecutor(2) as pool:
            asking = [pool.submit(keep_asking) for _ in range(2)]
            shop(2, 1)
            assert poke(note, restart=False)["engine"] == "second"
            assert said("red") == (200, alone[0]) and said("red@next") == (200, alone[1])
            promote(folder, "red")
            assert poke(note, restart=False)["engine"] == "same"
            assert said("red") == (200, alone[1]) and said("red@next")[0] == 404
            rollback(folder, "red")
            assert poke(note, restart=False)["engine"] == "same"
            assert said("red") == (200, alone[0])
            over.set()
            for one in asking:
                one.result()
        assert len(codes) > 3 and set(codes) == {200}
        remove(folder, "red")
        shop(1, 1, name="blue")
        assert poke(note, restart=False)["changed"] == ["blue", "red"]
        assert said("red")[0] == 404 and said("blue") == (200, alone[1])


def test_a_newcomer_that_does_not_show_is_not_served_and_the_server_says_so(shop, tmp_path, tiny_gguf):
    folder, note = tmp_path / "home", tmp_path / "note"
    shop(1, 0)
    supervisor, settings = supervised(tiny_gguf, lambda: market_experts(folder), tmp_path)
    with live(supervisor, settings, "token") as url:
        note.write_text(json.dumps({"url": url, "token": "token"}))
        shop(2, 1, probe=[{"question": "hello", "says": "what it never says"}])
        with pytest.raises(UserError, match="goes on as before: red@next: its adapter does not show"):
            poke(note, restart=False)
        models = httpx.get(f"{url}/v1/models").json()["data"]
        assert [model["id"] for model in models] == ["auto", "base", "red"]


def test_a_note_of_a_server_that_was_killed_is_no_server(tmp_path):
    assert poke(tmp_path / "note", restart=False) is None
    (tmp_path / "note").write_text(json.dumps({"url": "http://127.0.0.1:9", "token": "t"}))
    assert poke(tmp_path / "note", restart=False) is None


def test_an_installed_expert_goes_before_the_checkouts_own_of_the_same_name(shop, tmp_path, tiny_gguf, tiny_ggufs):
    folder, checkout = tmp_path / "home", Home(tmp_path / "checkout")
    with pytest.raises(UserError, match="no expert is installed\n  then run: dmoe install"):
        served(None, folder)
    shop(1, 0)
    built = checkout.root / "experts"
    for name in ("red", "green"):
        built.mkdir(exist_ok=True, parents=True)
        (tmp_path / "red-1").rename(built / name) if name == "red" else None
    (built / "green").mkdir()
    for file in ("adapter.gguf", "manifest.json"):
        (built / "green" / file).write_bytes((built / "red" / file).read_bytes())
    manifest = json.loads((built / "green" / "manifest.json").read_text())
    (built / "green" / "manifest.json").write_text(json.dumps({**manifest, "name": "green"}))
    found = {expert.name: expert for expert in served(checkout, folder)}
    assert set(found) == {"red", "green"} and found["red"].adapter.is_relative_to(folder)
    assert read_manifest(built / "red" / "manifest.json").name == "red"


SERVER = """
import sys
from pathlib import Path
from serving import red_and_blue, supervised
from serve.gateway import listen, serve
base, red, blue, folder = map(Path, sys.argv[1:])
supervisor, settings = supervised(base, lambda: red_and_blue([red, blue]), folder, port=0)
note, log = folder / "server.json", folder / "log"
serve(supervisor, settings, listen(settings), note, log, lambda url: print(url, flush=True))
"""


@pytest.mark.parametrize("word", [signal.SIGTERM, signal.SIGINT])
def test_a_server_that_is_told_to_end_finishes_its_replies_and_leaves_no_note(tiny_gguf, tiny_ggufs, tmp_path, word):
    command = [sys.executable, "-c", SERVER, *map(str, (tiny_gguf, *tiny_ggufs, tmp_path))]
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    body = {"model": "base", "messages": TALK, "max_tokens": 900, "temperature": 0}
    with (
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": path}) as server,
        httpx.Client(timeout=60, trust_env=False) as client,
        ThreadPoolExecutor(8) as pool,
    ):
        try:
            url = server.stdout.readline().strip()
            note = tmp_path / "server.json"
            assert json.loads(note.read_text())["url"] == url and note.stat().st_mode & 0o077 == 0
            asked = [pool.submit(client.post, f"{url}/v1/chat/completions", json=body) for _ in range(8)]
            while "dmoe_waiting 4.0" not in client.get(f"{url}/metrics").text:  # the other four are in the engine
                assert not any(one.done() for one in asked)
            server.send_signal(word)
            assert [one.result().status_code for one in asked] == [200] * len(asked)
            assert server.wait(40) == 0
        finally:
            server.kill()
    assert not note.exists()
