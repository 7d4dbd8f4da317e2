"""The gateway over a real engine: who answers, why, and what never gets through."""

import asyncio
import json
import random
import re
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
from serving import expert, kill_engine, red_and_blue, supervised
from starlette.testclient import TestClient

from factory.errors import UserError
from factory.paths import Home
from factory.store import sha256
from serve.clients import Defaults, hashed
from serve.engine import ask, started
from serve.forward import Reply
from serve.gateway import app, listen
from serve.market import Probe, installed
from serve.settings import DEFAULTS

ASKED = {"max_tokens": 12, "temperature": 0, "seed": 1}


def messages(question):
    return [{"role": "user", "content": question}]


def client_for(supervisor, settings, **told):
    return TestClient(app(supervisor, settings, **told), base_url="http://127.0.0.1")


@pytest.fixture(scope="module")
def experts(tiny_ggufs):
    return red_and_blue(tiny_ggufs)


@pytest.fixture(scope="module")
def alone(tiny_gguf, experts, tmp_path_factory):
    """question, expert's name or None -> what a server says that answers nothing else."""
    with started(tiny_gguf, experts, slots=1, threads=1, log=tmp_path_factory.mktemp("log") / "llama.log") as loaded:
        yield lambda question, name=None: content(ask(loaded, messages(question), name, **ASKED))


@pytest.fixture(scope="module")
def client(tiny_gguf, experts, tmp_path_factory):
    with client_for(*supervised(tiny_gguf, lambda: experts, tmp_path_factory.mktemp("log"))) as found:
        yield found


def post(client, model, question="hello", **fields):
    return client.post("/v1/chat/completions", json={"model": model, "messages": messages(question), **ASKED, **fields})


def content(reply):
    return reply["choices"][0]["message"]["content"]


# -- the engine and the gateway -------------------------------------------------------------------


def test_each_model_answers_as_its_own_adapter_alone(client, alone):
    own = {name: alone("hello", name) for name in ("red", "blue", None)}
    assert len(set(own.values())) == 3
    for name in ("red", "blue", None, "red", "red", None):
        reply = post(client, name or "base")
        assert reply.headers["x-dmoe-expert"] == (name or "base")
        told = reply.json()["dmoe"]
        assert (told["expert"], told["reason"]) == (name, "asked for by name")
        assert (told["adapter"] or "")[:1] == {"red": "d", "blue": "e"}.get(name, "")
        assert content(reply.json()) == own[name]


def test_whoever_asks_at_once_each_is_answered_by_their_own_adapter(client, alone):
    questions = [(name, f"tell me {i % 3}") for i in range(12) for name in ("red", "blue", None)]
    random.Random(1).shuffle(questions)
    with ThreadPoolExecutor(8) as pool:
        replies = list(pool.map(lambda q: content(post(client, q[0] or "base", q[1]).json()), questions))
    assert replies == [alone(question, name) for name, question in questions]


def test_a_second_question_reuses_the_prompt_of_the_same_client_and_expert_alone(client):
    long = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen"

    def reused(name, key, **headers):
        body = {"model": name, "messages": messages(long), **ASKED}
        told = {"Authorization": f"Bearer {key}", **headers}
        return client.post("/v1/chat/completions", json=body, headers=told).json()["timings"]["cache_n"]

    assert reused("red", "one") == 0 and reused("red", "one") > 10
    assert reused("blue", "one") == 0 and reused("red", "two") == 0
    assert reused("red", "one") > 10 and reused("red", "one", **{"Cache-Control": "no-store"}) == 0


def test_two_names_for_one_file_apply_it_once(tiny_gguf, experts, tmp_path, alone):
    twins = [experts[0], replace(experts[0], name="crimson"), replace(experts[0], name="pink", scale=0.5)]
    with client_for(*supervised(tiny_gguf, lambda: twins, tmp_path)) as client:
        said = {name: content(post(client, name).json()) for name in ("red", "crimson", "pink")}
    assert said["red"] == said["crimson"] == alone("hello", "red") != said["pink"]


def test_a_text_is_completed_by_the_expert_that_is_named(client):
    body = {"model": "red", "prompt": "once upon", "max_tokens": 4, "temperature": 0}
    reply = client.post("/v1/completions", json=body).json()
    assert reply["model"] == "red" and reply["dmoe"]["expert"] == "red" and reply["choices"][0]["text"]
    assert client.post("/v1/completions", json={**body, "model": "base"}).json()["choices"] != reply["choices"]
    assert client.post("/v1/completions", json={**body, "prompt": ["a", "b"]}).status_code == 400


# -- a client's own choice of adapters, by llama.cpp's contract --------------------------------------


def test_a_posted_choice_is_the_clients_own_and_only_where_no_model_is_named(client, alone):
    mine, other = {"Authorization": "Bearer mine"}, {"Authorization": "Bearer other"}
    shown = client.get("/lora-adapters", headers=mine).json()
    assert [(a["id"], a["scale"]) for a in shown] == [(0, 0.0), (1, 0.0)] and "red" in shown[0]["path"]
    assert client.post("/lora-adapters", json=[{"id": 1, "scale": 1.0}], headers=mine).json() == {"success": True}
    assert [a["scale"] for a in client.get("/lora-adapters", headers=mine).json()] == [0.0, 1.0]
    assert [a["scale"] for a in client.get("/lora-adapters", headers=other).json()] == [0.0, 0.0]

    def said(headers, **model):
        body = {"messages": messages("which rose?"), **ASKED, **model}
        return content(client.post("/v1/chat/completions", json=body, headers=headers).json())

    assert said(mine) == alone("which rose?", "blue")
    assert said(mine, model="red") == said(other) == alone("which rose?", "red")
    client.post("/lora-adapters", json=[], headers=mine)
    assert said(mine) == alone("which rose?")


@pytest.mark.parametrize(
    "body", [{}, [1], [{"id": 0}], [{"id": 7, "scale": 1}], [{"id": -1, "scale": 1}], [{"id": 0, "scale": "1"}],
             [{"id": True, "scale": 1}], [{"id": 0, "scale": 1e9}]]
)  # fmt: skip
def test_a_wrong_choice_of_adapters_is_400_and_changes_nothing(client, body):
    before = client.get("/lora-adapters").json()
    assert client.post("/lora-adapters", json=body).status_code == 400
    assert client.post("/lora-adapters", content=b'[{"id": 0, "scale": NaN}]').status_code == 400
    assert client.get("/lora-adapters").json() == before


def test_a_choice_is_forgotten_when_its_client_is_idle_and_the_oldest_when_there_are_too_many(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("serve.clients.time.monotonic", lambda: now[0])
    defaults = Defaults(10.0)
    defaults.set("a", {"x": 1.0})
    now[0] = 9.0
    assert defaults.get("a") == {"x": 1.0}
    now[0] = 18.0
    assert defaults.get("a") == {"x": 1.0}
    now[0] = 29.0
    assert defaults.get("a") is None
    monkeypatch.setattr("serve.clients.MOST_DEFAULTS", 3)
    for name in "bcde":
        defaults.set(name, {})
    assert [defaults.get(name) for name in "bcde"] == [None, {}, {}, {}]


def test_auto_is_routed_by_the_last_question(client):
    reply = post(client, "auto", "which rose?").json()
    assert reply["model"] == "red" and reply["dmoe"]["reason"] == "keywords: rose"
    nobody = post(client, "auto", "which tulip?").json()["dmoe"]
    assert nobody == {"expert": None, "reason": "no keyword", "adapter": None}
    talk = [*messages("which rose?"), {"role": "assistant", "content": "sky"}, *messages("and now?")]
    body = {"model": "auto", "messages": talk, **ASKED}
    assert client.post("/v1/chat/completions", json=body).json()["dmoe"]["expert"] == "red"  # it goes on


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


@pytest.mark.parametrize("field", ["lora", "id_slot", "cache_prompt", "chat_template_kwargs", "cache_salt"])
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


def test_models_are_told_with_their_parent(client):
    models = client.get("/v1/models").json()["data"]
    assert [model["id"] for model in models] == ["auto", "base", "red", "blue"]
    assert models[2]["parent"] == "base" and models[2]["dmoe"]["adapter"] == "d" * 64


def test_the_route_of_a_question_is_explained_without_asking_it(client):
    assert client.get("/route", params={"q": "which rose?"}).json()["expert"] == "red"
    assert client.post("/route", json={"messages": messages("the sky")}).json()["reason"] == "keywords: sky"
    assert client.get("/route").status_code == 400 and client.post("/route", json=[]).status_code == 400


def test_metrics_count_by_expert_and_hold_no_text(client):
    post(client, "red", "a question with aardvark in it")
    text = client.get("/metrics").text
    assert 'dmoe_requests_total{expert="red",status="200"}' in text and "dmoe_engine_up 1.0" in text
    assert 'dmoe_tokens_total{expert="red",kind="said"}' in text and "aardvark" not in text


def test_metrics_count_what_is_refused_too(client):
    def count():
        text = client.get("/metrics").text
        return sum(
            float(line.split()[-1])
            for line in text.splitlines()
            if line.startswith('dmoe_requests_total{expert="-",status="4')
        )

    before = count()
    post(client, "nobody"), post(client, "red", n=2)
    assert count() == before + 2


def test_a_line_is_logged_for_each_request_and_text_only_where_the_settings_ask(client, caplog, tiny_gguf, tmp_path):
    caplog.set_level("INFO", "dmoe.requests")
    post(client, "red", "an aardvark?")
    line = json.loads(caplog.messages[-1])
    assert line["model"] == "red" and line["status"] == 200 and "aardvark" not in caplog.text
    with client_for(*supervised(tiny_gguf, list, tmp_path, log_text=True)) as talkative:
        said = content(post(talkative, "base", "an aardvark?").json())
        post(talkative, "base", "an aardvark?", stream=True)
    lines = [json.loads(message) for message in caplog.messages[-2:]]
    assert [line["said"] for line in lines] == [said, said] or "\ufffd" in said
    assert "aardvark" in str(lines[0]["asked"])


def test_pages_of_other_sites_and_names_that_are_not_loopback_are_refused(client):
    assert client.get("/v1/models", headers={"Origin": "https://evil.example"}).status_code == 403
    assert client.get("/v1/models", headers={"Host": "rebound.example"}).status_code == 403
    assert client.get("/v1/models", headers={"Origin": "http://127.0.0.1"}).status_code == 200


def test_what_is_for_operators_takes_the_admin_key(client):
    assert client.post("/admin/reload", json={}).status_code == 403


def test_with_keys_each_client_needs_its_own_and_metrics_the_admins(tiny_gguf, tmp_path):
    keys = {"keys": {"ann": hashed("secret")}, "admin": hashed("boss")}
    with client_for(*supervised(tiny_gguf, list, tmp_path, **keys)) as client:
        codes = {}
        for key in ("", "wrong", "secret", "boss"):
            headers = {"Authorization": f"Bearer {key}"} if key else {}
            codes[key] = [client.get(path, headers=headers).status_code for path in ("/v1/models", "/metrics")]
        assert codes == {"": [401, 401], "wrong": [401, 401], "secret": [200, 403], "boss": [200, 200]}
        assert client.get("/health").json() == {"status": "ok"} and client.get("/ready").json()["experts"] == 0


# -- an engine that dies, and experts that come while it runs -------------------------------------------


def until(client, path, status, seconds=60):
    end = time.monotonic() + seconds
    while (found := client.get(path)).status_code != status:
        assert time.monotonic() < end, found.text
        time.sleep(0.05)
    return found


def test_a_killed_engine_is_503_with_retry_after_and_comes_back_by_itself(tiny_gguf, experts, tmp_path, alone):
    supervisor, settings = supervised(tiny_gguf, lambda: experts, tmp_path)
    with client_for(supervisor, settings) as client:
        with ThreadPoolExecutor(4) as pool:
            asked = [pool.submit(post, client, "red", max_tokens=600, ignore_eos=True) for _ in range(6)]
            time.sleep(0.3)
            kill_engine(supervisor)
            replies = [one.result(timeout=60) for one in asked]
        failed = [reply for reply in replies if reply.status_code != 200]
        assert {reply.status_code for reply in failed} == {503} and failed[0].headers["retry-after"] == "2"
        until(client, "/ready", 200)
        assert content(post(client, "red").json()) == alone("hello", "red")
        assert supervisor.restarts == 1


def test_a_stream_that_loses_its_engine_ends_with_an_error(tiny_gguf, experts, tmp_path):
    supervisor, settings = supervised(tiny_gguf, lambda: experts, tmp_path)
    body = {"model": "red", "messages": messages("hello"), "max_tokens": 900, "stream": True, "logit_bias": {}}
    with client_for(supervisor, settings) as client:
        with ThreadPoolExecutor(1) as pool:
            stream = pool.submit(client.post, "/v1/chat/completions", json=body)
            while not supervisor.serving.engine.turns.running:
                time.sleep(0.01)
            time.sleep(0.05)
            kill_engine(supervisor)
            reply = stream.result(timeout=60)
        if reply.status_code == 200 and "[DONE]" not in reply.text:
            assert json.loads(reply.text.strip().splitlines()[-1][6:])["error"]["code"] == "engine_down"
        until(client, "/ready", 200)


def test_a_newcomer_is_served_by_a_second_engine_and_no_request_fails_meanwhile(tiny_gguf, experts, tmp_path, alone):
    there = [experts[0]]
    supervisor, settings = supervised(tiny_gguf, lambda: list(there), tmp_path)
    with client_for(supervisor, settings, admin_token="t") as client:
        admin = {"Authorization": "Bearer t"}
        assert post(client, "blue").status_code == 404
        there.append(experts[1])
        with ThreadPoolExecutor(5) as pool:
            change = pool.submit(client.post, "/admin/reload", json={}, headers=admin)
            replies = []
            while not change.done():
                replies += list(pool.map(lambda _: post(client, "red"), range(4)))
        done = change.result().json()
        assert done["engine"] == "second" and done["changed"] == ["blue"]
        assert replies and {content(reply.json()) for reply in replies} == {alone("hello", "red")}
        assert content(post(client, "blue").json()) == alone("hello", "blue")
        there[:] = [replace(experts[0], name="crimson"), experts[1]]  # a new name for what is loaded: no engine needed
        assert client.post("/admin/reload", json={}, headers=admin).json()["engine"] == "same"
        assert post(client, "red").status_code == 404
        assert content(post(client, "crimson").json()) == alone("hello", "red")


def test_a_request_whose_engine_is_replaced_before_its_turn_goes_to_the_next(
    tiny_gguf, experts, tmp_path, alone, monkeypatch
):
    there = [experts[1]]
    supervisor, settings = supervised(tiny_gguf, lambda: list(there), tmp_path)
    read = Reply._read

    async def late(self, events):
        while not self.serving.engine.turns._closed:
            await asyncio.sleep(0.01)
        await read(self, events)

    with client_for(supervisor, settings, admin_token="t") as client, ThreadPoolExecutor(1) as pool:
        monkeypatch.setattr(Reply, "_read", late)
        asked = pool.submit(post, client, "blue")
        there.insert(0, experts[0])  # blue's adapter has another number in the new engine
        assert client.post("/admin/reload", json={}, headers={"Authorization": "Bearer t"}).status_code == 200
        assert content(asked.result(timeout=60).json()) == alone("hello", "blue")


def test_a_newcomer_that_does_not_show_is_refused_and_nothing_changes(tiny_gguf, experts, tmp_path):
    there = [experts[0]]
    supervisor, settings = supervised(tiny_gguf, lambda: list(there), tmp_path)
    with client_for(supervisor, settings, admin_token="t") as client:
        there.append(replace(experts[1], probes=(Probe("hello", "words that it never says"),)))
        refused = client.post("/admin/reload", json={}, headers={"Authorization": "Bearer t"})
        assert refused.status_code == 409 and "blue: its adapter does not show" in refused.json()["error"]["message"]
        assert post(client, "red").status_code == 200 and post(client, "blue").status_code == 404


def test_without_memory_for_a_second_engine_its_cost_is_told_and_a_restart_queues(tiny_gguf, experts, tmp_path):
    there = [experts[0]]
    supervisor, settings = supervised(tiny_gguf, lambda: list(there), tmp_path)
    supervisor.free = lambda: 1000
    with client_for(supervisor, settings, admin_token="t") as client:
        there.append(experts[1])
        admin = {"Authorization": "Bearer t"}
        told = client.post("/admin/reload", json={}, headers=admin)
        assert told.status_code == 409 and "--restart" in told.json()["error"]["message"]
        with ThreadPoolExecutor(5) as pool:
            change = pool.submit(client.post, "/admin/reload", json={"restart": True}, headers=admin)
            codes = []
            while not change.done():
                codes += [reply.status_code for reply in pool.map(lambda _: post(client, "red"), range(4))]
        assert change.result().json()["engine"] == "restarted" and set(codes) == {200}
        assert post(client, "blue").status_code == 200


def test_more_requests_than_may_wait_are_429_with_retry_after(tiny_gguf, tmp_path):
    with client_for(*supervised(tiny_gguf, list, tmp_path, slots=1, queue=2)) as client, ThreadPoolExecutor(12) as pool:
        replies = list(pool.map(lambda i: post(client, "base", f"{i}", max_tokens=60), range(12)))
        codes = [reply.status_code for reply in replies]
        assert set(codes) == {200, 429} and codes.count(200) >= 3
        told = re.findall(r'^dmoe_requests_total{expert="[^"]*",status="429"} (\S+)', client.get("/metrics").text, re.M)
        assert sum(map(float, told)) == codes.count(429)  # at the door, or at the queue
    assert next(r for r in replies if r.status_code == 429).headers["retry-after"] == "2"


def test_a_taken_port_is_told_before_anything_is_loaded():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"^port {port} on 127.0.0.1 cannot be used: .*choose another"):
            listen(DEFAULTS.model_copy(update={"port": port}))


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
