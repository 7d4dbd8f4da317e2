"""The gateway over a real engine: who answers, why, and what never gets through."""

import json
import socket
from dataclasses import replace

import pytest
from starlette.testclient import TestClient

from factory.errors import UserError
from factory.paths import Home
from factory.store import sha256
from serve.engine import ask, started
from serve.gateway import app, serve
from serve.market import Installed, installed
from serve.router import make_router

ASKED = {"max_tokens": 12, "temperature": 0, "seed": 1}


def expert(name, keywords, not_keywords=(), adapter=None):
    return Installed(name, f"{name}_expert", "tiny", adapter, 1.0, list(keywords), list(not_keywords))


def messages(question):
    return [{"role": "user", "content": question}]


@pytest.fixture(scope="module")
def engine(tiny_gguf, tiny_ggufs, tmp_path_factory):
    experts = [
        expert("red", ["rose", "fire engine"], ["rose tinted"], tiny_ggufs[0]),
        expert("blue", ["sky"], [], tiny_ggufs[1]),
    ]
    with started(tiny_gguf, experts, threads=1, log=tmp_path_factory.mktemp("log") / "llama.log") as running:
        yield running


@pytest.fixture(scope="module")
def client(engine):
    with TestClient(app(engine, make_router(engine.experts))) as found:
        yield found


def post(client, model, question="hello", **fields):
    return client.post("/v1/chat/completions", json={"model": model, "messages": messages(question), **ASKED, **fields})


def content(reply):
    return reply["choices"][0]["message"]["content"]


# -- the engine and the gateway -------------------------------------------------------------------


def test_each_model_answers_as_its_own_adapter_alone(client, engine):
    own = {name: content(ask(engine, messages("hello"), name, **ASKED)) for name in ("red", "blue", None)}
    assert len(set(own.values())) == 3
    for name, text in own.items():
        reply = post(client, name or "base")
        assert reply.headers["x-dmoe-expert"] == (name or "base")
        assert reply.json()["dmoe"] == {"expert": name, "reason": "asked for by name"}
        assert content(reply.json()) == text


def test_auto_is_routed_by_the_last_question(client):
    reply = post(client, "auto", "which rose?").json()
    assert reply["model"] == "red" and reply["dmoe"] == {"expert": "red", "reason": "keywords: rose"}
    assert post(client, "auto", "which tulip?").json()["dmoe"] == {"expert": None, "reason": "no keyword"}
    talk = [*messages("which rose?"), {"role": "assistant", "content": "sky"}, *messages("and now?")]
    body = {"model": "auto", "messages": talk, **ASKED}
    assert client.post("/v1/chat/completions", json=body).json()["dmoe"]["expert"] is None


def test_a_stream_says_the_same_and_its_first_chunk_who_said_it(client):
    # A random model may write half a character, which a stream holds back: ask what it answers in whole ones.
    wholes = {q: content(post(client, "red", q).json()) for q in ("hello", "which rose?", "one", "two", "three")}
    question, whole = next((q, text) for q, text in wholes.items() if text and "\ufffd" not in text)
    reply = post(client, "red", question, stream=True)
    assert reply.headers["content-type"].startswith("text/event-stream") and reply.headers["x-dmoe-expert"] == "red"
    events = [line[6:] for line in reply.text.splitlines() if line.startswith("data: ")]
    assert events[-1] == "[DONE]"
    chunks = [json.loads(event) for event in events[:-1]]
    assert chunks[0]["dmoe"]["expert"] == "red" and not any("dmoe" in chunk for chunk in chunks[1:])
    assert {chunk["model"] for chunk in chunks} == {"red"}
    assert "".join(c["choices"][0]["delta"].get("content") or "" for c in chunks if c["choices"]) == whole


def test_an_unknown_model_is_404_in_openais_shape(client):
    reply = post(client, "green")
    assert reply.status_code == 404
    error = reply.json()["error"]
    assert error["code"] == "model_not_found" and "auto, base, red, blue" in error["message"]


@pytest.mark.parametrize("field", ["lora", "id_slot", "cache_prompt", "chat_template_kwargs", "n_predict"])
def test_a_field_that_reaches_into_the_engine_is_400(client, field):
    reply = post(client, "base", **{field: []})
    assert reply.status_code == 400 and reply.json()["error"]["param"] == field


def test_an_unknown_field_is_ignored_and_named(client):
    reply = post(client, "base", **{"temprature": 3, "bad\r\nheader": 1})
    assert reply.status_code == 200 and reply.headers["x-dmoe-ignored"] == "temprature"


@pytest.mark.parametrize(
    "data", [b"{", b"[]", b'{"model": "base"}', b'{"messages": []}', b'{"messages": ["x"]}', b"\xff"]
)
def test_a_broken_body_is_400(client, data):
    reply = client.post("/v1/chat/completions", content=data)
    assert reply.status_code == 400 and reply.json()["error"]["message"]


def test_a_body_too_large_is_413(client):
    assert client.post("/v1/chat/completions", content=b" " * (1 << 21)).status_code == 413


def test_what_the_engine_refuses_keeps_its_status(client):
    reply = post(client, "base", "word " * 3000)
    assert reply.status_code == 400 and "context" in reply.json()["error"]["message"]


def test_models_and_health_are_told(client):
    assert [model["id"] for model in client.get("/v1/models").json()["data"]] == ["auto", "base", "red", "blue"]
    assert client.get("/health").json() == {"status": "ok"}


def test_an_engine_that_is_gone_is_502_and_unhealthy(tiny_gguf, tmp_path):
    with started(tiny_gguf, [], threads=1, log=tmp_path / "llama.log") as engine:
        pass
    with TestClient(app(engine, make_router([]))) as client:
        assert post(client, "base").status_code == 502
        assert client.get("/health").status_code == 503


def test_a_taken_port_is_told_before_anything_is_loaded(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"^port {port} on 127.0.0.1 cannot be used: .*choose another"):
            serve(tmp_path / "none.gguf", [], port=port, log=tmp_path / "llama.log", ready=str)


# -- manifests ------------------------------------------------------------------------------------


def write(root, **changes):
    folder = root / "experts" / "red"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter.gguf").write_bytes(b"GGUF")
    manifest = {
        "name": "red", "lora_id": "red_expert", "base_model": "tiny", "adapter_file": "adapter.gguf",
        "recommended_scale": 1, "keywords": ["rose"], "not_keywords": [], **changes,
    }  # fmt: skip
    (folder / "manifest.json").write_text(json.dumps({k: v for k, v in manifest.items() if v is not None}))


def test_installed_experts_are_read_from_their_manifests(tmp_path):
    write(tmp_path)
    adapter = tmp_path / "experts" / "red" / "adapter.gguf"
    found = expert("red", ["rose"], [], adapter)
    assert installed(Home(tmp_path)) == [replace(found, digest=sha256(adapter))]


def test_no_expert_is_told_with_what_to_run(tmp_path):
    with pytest.raises(UserError, match="then run: dvc repro"):
        installed(Home(tmp_path))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"keywords": None}, "keywords: is missing"),
        ({"name": 3}, "name: cannot be 3"),
        ({"name": "base"}, "taken by the gateway"),
        ({"recommended_scale": 0}, "recommended_scale: 0.0"),
        ({"recommended_scale": float("nan")}, "recommended_scale: nan"),
        ({"adapter_file": "../../../etc/passwd"}, "outside the expert's folder"),
        ({"adapter_file": "none.gguf"}, "no such file"),
        ({"sha256": {"adapter.gguf": "0" * 64}}, "is not the file that"),
    ],
)
def test_a_wrong_manifest_is_named_with_its_key(tmp_path, change, told):
    write(tmp_path, **change)
    with pytest.raises(UserError, match=told):
        installed(Home(tmp_path))
