"""`dmoe doctor` against real gateways: silent where all is pure, loud where one thing is not."""

import shlex
import shutil
import socket
import subprocess
import time
from contextlib import contextmanager, suppress
from dataclasses import replace

import httpx
import pytest
from serving import live, red_and_blue, supervised

from factory.errors import UserError
from factory.llama import running
from serve.doctor import TIE, Alone, doctor
from serve.engine import LlamaEngine, ask, started
from serve.market import Probe
from serve.settings import DEFAULTS
from serve.start import command

CHECKS = ["ready", "applied: red", "applied: blue", "different", "A, B, A", "streamed", "a POST in between",
          "several turns", "8 clients at once"]  # fmt: skip


@pytest.fixture(scope="module")
def experts(tiny_gguf, tiny_ggufs, tmp_path_factory):
    """With probes: what each really says of a question, by which it can be told from the base."""
    experts = red_and_blue(tiny_ggufs)
    with started(tiny_gguf, experts, slots=1, threads=1, log=tmp_path_factory.mktemp("log") / "llama.log") as loaded:
        talk = [{"role": "user", "content": "hello"}]
        says = {
            name: ask(loaded, talk, name, temperature=0, max_tokens=30)["choices"][0]["message"]["content"][:12]
            for name in ("red", "blue")
        }
    return [replace(e, probes=(Probe("hello", says[e.name]),)) for e in experts]


@contextmanager
def own(base, experts, folder):
    with live(*supervised(base, lambda: experts, folder)) as url:
        yield url


@contextmanager
def external(base, experts, folder, monkeypatch=None):
    """A llama.cpp that someone else started, its adapters in another order and one more of them."""
    files = [e.adapter for e in experts][::-1] + [experts[0].adapter]
    with running(base, files, slots=4, threads=1, log=folder / "external.log") as llama:
        monkeypatch.setenv("DMOE_ENGINE_KEY", llama.key)
        with live(*supervised(base, lambda: experts, folder, engine="llama-server", url=llama.url)) as url:
            yield url


def test_an_engine_of_our_own_passes_every_check(tiny_gguf, experts, tmp_path):
    with own(tiny_gguf, experts, tmp_path) as url:
        findings = list(doctor(url))
    assert [(f.what, f.good) for f in findings] == [(what, True) for what in CHECKS], findings


def test_a_llama_server_of_someone_else_passes_every_check(tiny_gguf, experts, tmp_path, monkeypatch):
    with external(tiny_gguf, experts, tmp_path, monkeypatch) as url:
        findings = list(doctor(url))
    assert [(f.what, f.good) for f in findings] == [(what, True) for what in CHECKS], findings


@pytest.mark.skipif(not shutil.which("llama-server"), reason="no llama-server on the path: llama.cpp is to be built")
def test_a_llama_server_started_by_the_printed_line_passes_every_check(tiny_gguf, experts, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    line = command(DEFAULTS.model_copy(update={"slots": 4, "context": 1024, "threads": 1}), tiny_gguf, experts)
    url = f"http://127.0.0.1:{port}"
    with (tmp_path / "log").open("wb") as log:
        server = subprocess.Popen(shlex.split(line.replace("8081", port)), stdout=log, stderr=log)
        try:
            while server.poll() is None:
                with suppress(httpx.HTTPError):
                    if httpx.get(f"{url}/health", trust_env=False).is_success:
                        break
                time.sleep(0.1)
            assert server.poll() is None, (tmp_path / "log").read_text(errors="replace")[-2000:]
            with live(*supervised(tiny_gguf, lambda: experts, tmp_path, engine="llama-server", url=url)) as gateway:
                findings = list(doctor(gateway))
        finally:
            server.terminate()
            server.wait()
    assert [(f.what, f.good) for f in findings] == [(what, True) for what in CHECKS], findings


def test_the_printed_line_loads_every_adapter_at_nothing_and_keeps_no_prompt_in_memory(tiny_gguf, experts):
    words = shlex.split(command(DEFAULTS, tiny_gguf, experts))
    told = dict(zip(words, words[1:], strict=False))
    assert told["--lora-scaled"] == ",".join(f"{expert.adapter}:0" for expert in experts)
    assert told["--cache-ram"] == told["--ctx-checkpoints"] == "0" and told["--ctx-size"] == "16384"
    odd = [replace(experts[0], adapter=experts[0].adapter.with_name("red,blue.gguf"))]
    with pytest.raises(UserError, match=r"red,blue.gguf: llama-server takes no path with a comma"):
        command(DEFAULTS, tiny_gguf, odd)


def test_one_answer_in_seven_by_whoever_was_asked_before_is_found(tiny_gguf, experts, tmp_path, monkeypatch):
    right, asked = LlamaEngine.fields, []

    def late(self, scales, place, client):
        told = right(self, scales, place, client)
        asked.append(told["lora"])
        return told if len(asked) % 7 else {**told, "lora": asked[-2]}

    monkeypatch.setattr(LlamaEngine, "fields", late)
    with own(tiny_gguf, experts, tmp_path) as url:
        findings = {finding.what: finding for finding in doctor(url)}
    assert not findings["A, B, A"].good and not findings["8 clients at once"].good
    assert "differ from the expert alone" in findings["A, B, A"].found


@pytest.mark.parametrize(
    ("ahead", "said", "tie"),
    [
        ((9.0, TIE / 2, 9.0), "the red one", True),
        ((9.0, 2 * TIE, 9.0), "the red one", False),
        ((TIE / 2, 9.0, 9.0), "the red one", False),  # the tie is not where it went another way
        ((9.0, 9.0, TIE / 2), "the blue", True),  # it ended there
        ((9.0, TIE / 2, 9.0), "", False),
    ],
)
def test_another_answer_is_a_tie_only_where_two_words_were_as_good_as_equal(ahead, said, tie):
    alone = Alone("the blue one", list(zip(("the", " blue", " one"), ahead, strict=True)))
    assert alone.ties_with(said) == tie


def test_an_adapter_that_is_not_applied_is_found(tiny_gguf, experts, tmp_path, monkeypatch):
    monkeypatch.setattr(LlamaEngine, "fields", lambda self, scales, place, client: {"cache_prompt": False})
    with own(tiny_gguf, experts, tmp_path) as url:
        findings = {finding.what: finding.good for finding in doctor(url)}
    assert not findings["applied: red"] and not findings["different"]


def test_where_nothing_answers_one_line_says_so():
    with pytest.raises(UserError, match="^http://127.0.0.1:9: no answer to /v1/models"):
        list(doctor("http://127.0.0.1:9"))
