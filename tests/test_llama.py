"""llama.cpp in a process of its own: pure swaps, plain errors, and no orphan."""

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from factory.errors import UserError
from factory.llama import many_asked, running
from train.base_gguf import export_base
from train.panel import HOUSE_RULES

POCKET = Path(__file__).parents[1] / "models" / "pocket"

STATES = {"red": (1.0, 0.0), "blue": (0.0, 1.0), "base": (0.0, 0.0)}
QUESTIONS = ["My head hurts, what is it?", "Which laptop should I buy?", "My landlord keeps the deposit"]


def text(llama, question, scales):
    """What is said, seen at the level of tokens: a random model's bytes need not be text."""
    prompt = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
    return llama.complete(prompt, scales, n_predict=16, temperature=0, ignore_eos=True, return_tokens=True)["tokens"]


@pytest.fixture(scope="module")
def llama(tiny_gguf, tiny_ggufs, tmp_path_factory):
    with running(tiny_gguf, tiny_ggufs, slots=4, threads=1, log=tmp_path_factory.mktemp("log") / "llama.log") as server:
        yield server


def test_swapping_among_concurrent_clients_changes_no_reply(llama, tiny_gguf, tiny_ggufs, tmp_path):
    alone = {}
    for name, scales in STATES.items():
        with running(tiny_gguf, tiny_ggufs, slots=1, threads=1, log=tmp_path / f"{name}.log") as single:
            alone.update({(name, question): text(single, question, scales) for question in QUESTIONS})
    assert len({tuple(tokens) for tokens in alone.values()}) == len(alone)  # else the test could not tell them apart
    order = [(name, question) for name in ("red", "base", "blue", "red") for question in QUESTIONS] * 4
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda job: text(llama, job[1], STATES[job[0]]), order))
    assert found == [alone[job] for job in order]


def test_a_reply_is_the_same_whatever_is_asked_beside_it_and_on_how_many_cores(
    tiny_gguf, tiny_ggufs, tmp_path, monkeypatch
):
    """Long prompts, and words drawn at a high temperature: every bit of a probability counts."""
    draw = {"n_predict": 24, "temperature": 2.0, "ignore_eos": True, "return_tokens": True}
    states = list(STATES.values())
    cases = [(f"{HOUSE_RULES} {q} {i}", states[i % 3], i) for i in range(8) for q in QUESTIONS]
    found = []
    for cores, order in ((1, cases), (3, cases[::-1])):
        monkeypatch.setenv("OMP_NUM_THREADS", str(cores))
        log = tmp_path / f"{cores}.log"
        with (
            many_asked(tiny_gguf, tiny_ggufs, at_once=8, context=512, log=log) as servers,
            ThreadPoolExecutor(8) as pool,
        ):

            def ask(case, servers=servers):
                with servers.turn() as llama:
                    return llama.complete(case[0], case[1], seed=case[2], **draw)["tokens"]

            found.append(dict(zip(order, pool.map(ask, order), strict=True)))
        assert len(list(tmp_path.glob(f"{cores}*.log"))) == cores  # so many servers
    assert found[0] == found[1]


def test_a_base_that_is_missing_is_told_before_its_size_is_asked(tmp_path):
    missing = many_asked(tmp_path / "none.gguf", [], at_once=8, context=64, log=tmp_path / "log")
    with pytest.raises(UserError, match=r"none\.gguf: cannot be read: No such file"), missing:
        pass


def test_a_chat_reply_has_openais_shape(llama):
    reply = llama.chat([{"role": "user", "content": "hello"}], [0.0, 1.0], max_tokens=5, temperature=0)
    assert reply["choices"][0]["message"]["role"] == "assistant"
    assert reply["usage"]["completion_tokens"] <= 5


def test_an_empty_think_block_is_no_part_of_the_content(tmp_path):
    if not (POCKET / "model.safetensors").exists():  # a random base writes none
        pytest.skip("models/pocket is not trained yet; run: make pocket")
    export_base(POCKET, tmp_path / "pocket.gguf")
    with running(tmp_path / "pocket.gguf", threads=1, log=tmp_path / "llama.log") as llama:
        prompt = "<|im_start|>user\nMy head hurts.<|im_end|>\n<|im_start|>assistant\n"
        raw = llama.complete(prompt, n_predict=24, temperature=0)["content"]
        reply = llama.chat([{"role": "user", "content": "My head hurts."}], max_tokens=20, temperature=0)
    assert raw.startswith("<think>\n\n</think>\n\n")
    assert reply["choices"][0]["message"]["content"] == raw.removeprefix("<think>\n\n</think>\n\n")


def test_a_scale_for_each_adapter_is_demanded(llama):
    with pytest.raises(ValueError, match="1 scales for 2 adapters"):
        llama.chat([{"role": "user", "content": "hello"}], [1.0])


def test_what_the_engine_refuses_is_told_in_one_line(llama):
    with pytest.raises(UserError, match=r"^llama\.cpp: /v1/chat/completions: 400: .*context size.*$"):
        llama.chat([{"role": "user", "content": "word " * 3000}], [0.0, 0.0])


def test_others_on_this_machine_are_kept_out(llama):
    reply = httpx.post(llama.url + "/completion", json={"prompt": "x", "n_predict": 1}, trust_env=False)
    assert reply.status_code == 401


@pytest.mark.parametrize(
    ("damage", "told"), [("cut", "corrupted or incomplete"), ("text", "not a GGUF"), ("gone", "No such")]
)
@pytest.mark.parametrize("which", ["base", "adapter"])
def test_a_damaged_file_is_named_in_one_line(tiny_gguf, tiny_ggufs, tmp_path, which, damage, told):
    source, bad = tiny_gguf if which == "base" else tiny_ggufs[0], tmp_path / "bad.gguf"
    if damage != "gone":
        bad.write_bytes(source.read_bytes()[: -(source.stat().st_size // 10)] if damage == "cut" else b"hello")
    base, adapters = (bad, []) if which == "base" else (tiny_gguf, [tiny_ggufs[1], bad])
    with pytest.raises(UserError) as caught, running(base, adapters, log=tmp_path / "llama.log"):
        pass
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(str(bad)) and told in str(caught.value)


def alive(process):
    try:
        return "\nState:\tZ" not in Path(f"/proc/{process}/status").read_text()
    except FileNotFoundError:
        return False


def test_the_server_dies_with_its_parent(tiny_gguf, tmp_path):
    code = f"""
import os, sys, time
from pathlib import Path
from factory.llama import running
with running(Path({str(tiny_gguf)!r}), threads=1, log=Path({str(tmp_path / "llama.log")!r})) as llama:
    children = Path(f"/proc/{{os.getpid()}}/task/{{os.getpid()}}/children").read_text()
    sys.stdout.write(children.split()[0] + "\\n"); sys.stdout.flush()
    time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as parent:
        child = int(parent.stdout.readline())
        assert alive(child)
        os.kill(parent.pid, signal.SIGKILL)
    deadline = time.monotonic() + 10
    while alive(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(child)


def test_a_server_that_is_gone_is_told_in_one_line(tiny_gguf, tmp_path):
    with running(tiny_gguf, threads=1, log=tmp_path / "llama.log") as llama:
        pass
    gone = type(llama)(llama.url, llama.key, [], httpx.Client(base_url=llama.url, trust_env=False))
    with gone.client, pytest.raises(UserError, match=r"^llama\.cpp: no answer to /tokenize .*$"):
        gone.tokenize("hello")
