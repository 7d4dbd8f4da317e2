"""Clients who mean ill or know no better: the others are served."""

import json
import resource
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from serving import live, red_and_blue, supervised


@pytest.fixture(scope="module")
def server(tiny_gguf, tiny_ggufs, tmp_path_factory):
    """A gateway on a port, its engine with one place, and its supervisor."""
    experts = red_and_blue(tiny_ggufs)
    supervisor, settings = supervised(tiny_gguf, lambda: experts, tmp_path_factory.mktemp("log"), slots=1)
    with live(supervisor, settings) as url, httpx.Client(base_url=url, timeout=60, trust_env=False) as client:
        yield client, supervisor


def talk(**more):
    return {
        "model": "red",
        "messages": [{"role": "user", "content": "hello"}],
        "temperature": 0,
        "max_tokens": 5,
        **more,
    }


def raw(client, body, rcvbuf=None):
    """A socket that has sent a request and reads nothing yet."""
    data = json.dumps(body).encode()
    sock = socket.socket()
    if rcvbuf:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, rcvbuf)
    sock.connect((client.base_url.host, client.base_url.port))
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(data)}\r\n\r\n"
    sock.sendall(head.encode() + data)
    return sock


def until(true, seconds=30):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


def answered(client):
    reply = client.post("/v1/chat/completions", json=talk())
    return reply.status_code == 200 and bool(reply.json()["choices"])


def test_who_does_not_read_holds_no_place(server):
    client, supervisor = server
    slow = [raw(client, talk(max_tokens=300, stream=True, model="base"), rcvbuf=2048) for _ in range(3)]
    try:
        assert answered(client)
        until(lambda: not supervisor.serving.engine.turns.running)
    finally:
        for sock in slow:
            sock.close()
    assert answered(client)


def test_who_leaves_ends_the_engines_work(server):
    client, supervisor = server
    for stream in (True, False):
        sock = raw(client, talk(max_tokens=900, stream=stream, model="base"))
        until(lambda: supervisor.serving.engine.turns.running)
        began = time.monotonic()
        sock.close()
        until(lambda: not supervisor.serving.engine.turns.running)
        assert answered(client), time.monotonic() - began


def test_who_leaves_while_waiting_is_forgotten(server):
    client, supervisor = server
    first = raw(client, talk(max_tokens=900, model="base"))  # still at it when the others have come
    until(lambda: supervisor.serving.engine.turns.running)
    waiting = [raw(client, talk()) for _ in range(5)]
    until(lambda: supervisor.serving.engine.turns.length == 5)
    for sock in waiting:
        sock.close()
    until(lambda: supervisor.serving.engine.turns.length == 0)
    first.close()
    assert answered(client)


def test_idle_connections_take_nobodys_place(server):
    client, _ = server
    most = min(1000, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4)
    idle = [socket.create_connection((client.base_url.host, client.base_url.port)) for _ in range(most)]
    for sock in idle[::2]:
        sock.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\n")  # and never a word more
    try:
        assert answered(client)
    finally:
        for sock in idle:
            sock.close()


def test_a_body_of_fifty_megabytes_is_refused_before_it_is_read(server):
    client, _ = server
    sent = 0

    def pieces():
        nonlocal sent
        for _ in range(50):
            sent += 1 << 20
            yield b" " * (1 << 20)

    try:
        assert client.post("/v1/chat/completions", content=pieces()).status_code == 413
    except httpx.TransportError:
        assert sent < 50 << 20  # it was cut off while it still sent
    assert answered(client)


@pytest.mark.parametrize(
    "data", [b"[" * 100_000, b'{"a":' * 100_000, b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
             b'{"model": "red", "max_tokens": 1e999, "messages": [{"role": "user", "content": "x"}]}',
             b'{"model": {"a": 1}, "messages": [{}]}', b'{"messages": [{"role": "user", "content": {"a": 1}}]}',
             b'{"model": "base", "messages": [{"role": 7, "content": []}]}', b"\x00" * 1000]
)  # fmt: skip
def test_strange_json_is_a_4xx_in_openais_shape(server, data):
    client, _ = server
    reply = client.post("/v1/chat/completions", content=data)
    assert 400 <= reply.status_code < 500 and reply.json()["error"]["message"], reply.text
    assert answered(client)


def test_many_clients_at_once_are_all_answered(server):
    client, _ = server
    with ThreadPoolExecutor(16) as pool:
        codes = list(
            pool.map(lambda i: client.post("/v1/chat/completions", json=talk(stream=i % 2 == 0)).status_code, range(60))
        )
    assert set(codes) == {200}
