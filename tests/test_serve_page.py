"""The page at `/`: a question asked in a real browser, both replies, the reason, the load, and what goes wrong."""

import shutil
import threading
from contextlib import contextmanager
from dataclasses import replace

import httpx
import pytest
from serving import kill_engine, live, red_and_blue, supervised

from serve.clients import hashed
from serve.market import Probe

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
QUIET = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]  # fmt: skip
OF_FETCH = "Failed to load resource"  # what a browser logs of every refusal; the page says it in words


@pytest.fixture(scope="module")
def browser():
    if not CHROMIUM:
        pytest.skip("no chromium on PATH")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def experts(tiny_ggufs):
    red, blue = red_and_blue(tiny_ggufs)
    return [red, replace(blue, routed=False, scale=0.5, probes=(Probe("What?", "never said"),))]


@pytest.fixture(scope="module")
def url(tiny_gguf, experts, tmp_path_factory):
    with live(*supervised(tiny_gguf, lambda: experts, tmp_path_factory.mktemp("log"), probe_seconds=60.0)) as url:
        yield url


@contextmanager
def opened(browser, url, **size):
    """A page in a tab of its own; all that it logs, but refusals, fails the test."""
    context = browser.new_context(viewport={"width": 1200, "height": 800, **size})
    page, said = context.new_page(), []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.goto(url)
    yield page
    context.close()
    assert [line for line in said if OF_FETCH not in line] == []


def ask(page, question):
    page.locator("#question").fill(question)
    page.keyboard.press("Enter")


def answered(page, replies):
    """The texts of all replies, as soon as there are so many and none is being written."""
    from playwright.sync_api import expect

    expect(page.locator(".reply .length")).to_have_count(replies)
    expect(page.locator("#stop")).to_be_hidden(timeout=60_000)
    return page.locator(".reply .text").all_inner_texts()


@contextmanager
def crowd(url):
    """Others who ask without end, more than there is room for."""
    over = threading.Event()
    body = {"model": "base", "messages": [{"role": "user", "content": "on"}], "max_tokens": 900}

    def one():
        with httpx.Client(timeout=60, trust_env=False) as client:
            while not over.wait(0.02):
                client.post(f"{url}/v1/chat/completions", json=body)

    threads = [threading.Thread(target=one) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        over.set()
        for thread in threads:
            thread.join()


def reply_of(url, model, *turns, key=""):
    """What the gateway says to a client that is no browser, as a page shows it."""
    roles = ["user", "assistant"] * len(turns)
    body = {"model": model, "messages": [{"role": r, "content": t} for r, t in zip(roles, turns, strict=False)]}
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    asked = body | {"temperature": 0, "max_tokens": 512}
    reply = httpx.post(f"{url}/v1/chat/completions", json=asked, headers=headers, timeout=60).json()
    return reply["choices"][0]["message"]["content"]


# -- what is served -----------------------------------------------------------------------------


def test_the_page_runs_no_script_but_its_own_and_nothing_else_is_served(url):
    page = httpx.get(url)
    policy = page.headers["content-security-policy"]
    assert page.headers["content-type"].startswith("text/html")
    assert "default-src 'none'; script-src 'self';" in policy and "unsafe" not in policy
    assert "<script>" not in page.text and "style=" not in page.text
    assert "javascript" in httpx.get(f"{url}/page/page.js").headers["content-type"]
    for name in ("nothing.js", "..%2fgateway.py", "%2e%2e/gateway.py"):
        assert httpx.get(f"{url}/page/{name}").status_code == 404


def test_status_tells_load_and_probes_and_no_client(url):
    status = httpx.get(f"{url}/status").json()
    assert status["ready"] and (status["slots"], status["queue"], status["restarts"]) == (4, 256, 0)
    assert set(status["experts"]) == {"red", "blue"} and status["experts"]["red"] == {
        "adapter": "d" * 64,
        "applied": None,
    }
    before = status["tokens"]
    reply_of(url, "red", "hello")
    assert httpx.get(f"{url}/status").json()["tokens"] > before


# -- in a browser -------------------------------------------------------------------------------


def test_a_question_is_answered_by_the_expert_and_the_base_beside_it_and_then_goes_on(browser, url):
    from playwright.sync_api import expect

    with opened(browser, url) as page:
        expect(page.locator("#empty")).to_be_visible()
        expect(page.locator("#state")).to_contain_text("ready, 0 running")
        first = "Which rose is <b>this</b>?"
        ask(page, first)
        of_red, of_base = answered(page, 2)
        assert of_red == shown(reply_of(url, "red", first)) and of_base == shown(reply_of(url, "base", first))
        assert page.locator(".asked").inner_text() == first
        expect(page.locator(".why")).to_contain_text("auto chose red (keywords: rose)")
        expect(page.locator(".reply h3").nth(0)).to_contain_text("red" + "d" * 12)
        expect(page.locator(".reply .length").nth(0)).to_contain_text("tokens: the first after")
        # it goes on: each one's own words go along
        ask(page, "And another rose?")
        texts = answered(page, 4)
        raw = reply_of(url, "red", first)
        assert texts[2] == shown(reply_of(url, "red", first, raw, "And another rose?"))
        # by hand
        page.locator("#model").select_option("blue")
        ask(page, "hello")
        answered(page, 6)
        expect(page.locator(".why").nth(2)).to_contain_text(
            "Chosen by hand: blue. auto would have taken base (no keyword)"
        )
        # anew: no word of before goes along
        page.locator("#anew").click()
        expect(page.locator("#empty")).to_be_visible()
        page.locator("#model").select_option("auto")
        ask(page, "hello")
        assert answered(page, 1) == [shown(reply_of(url, "base", "hello"))]
        expect(page.locator(".reply h3")).to_have_text("base")


def shown(text):
    """As inner_text gives a text whose white space is kept."""
    return text.replace("\r\n", "\n").replace("\r", "\n")


def test_load_and_experts_are_shown_and_the_probe_that_failed(browser, url):
    from playwright.sync_api import expect

    with opened(browser, url) as page:
        expect(page.locator("#load")).to_contain_text("running0 of 4")
        red, blue = page.locator("#experts li").nth(0), page.locator("#experts li").nth(1)
        expect(red).to_contain_text("scale 1, auto may choose it")
        expect(red).to_contain_text("its package has no probe")
        expect(blue).to_contain_text("scale 0.5, by name only")
        expect(blue).to_contain_text("last probe: adapter does NOT show", timeout=30_000)
        ask(page, "Which rose?")
        answered(page, 2)
        expect(page.locator("#load")).not_to_contain_text("tokens/s0.0")


def test_all_of_it_can_be_reached_on_a_phone_and_by_keyboard_alone(browser, url):
    from playwright.sync_api import expect

    with opened(browser, url, width=380, height=700) as page:
        expect(page.locator("#state")).to_contain_text("ready")
        page.locator("#question").focus()
        page.keyboard.type("Which rose")
        page.keyboard.press("Shift+Enter")
        page.keyboard.type("is this?")
        page.keyboard.press("Tab")
        page.keyboard.type("blue")
        page.keyboard.press("Tab")
        page.keyboard.press("Enter")
        answered(page, 2)
        assert page.locator(".asked").inner_text() == "Which rose\nis this?"
        expect(page.locator(".reply h3").nth(0)).to_contain_text("blue")
        assert page.evaluate("() => document.documentElement.scrollWidth") == 380


def test_a_key_is_asked_for_and_kept_in_the_tab_alone(browser, tiny_gguf, experts, tmp_path):
    from playwright.sync_api import expect

    keys = {"ann": hashed("right")}
    with live(*supervised(tiny_gguf, lambda: experts, tmp_path, keys=keys)) as url, opened(browser, url) as page:
        assert httpx.get(f"{url}/status").status_code == 401
        expect(page.locator("#state")).to_have_text("a key is needed")
        page.locator("#key-text").fill("wrong")
        page.keyboard.press("Enter")
        expect(page.locator("#key-said")).to_have_text("The server does not know this key.")
        page.locator("#key-text").fill("right")
        page.keyboard.press("Enter")
        expect(page.locator("#key")).to_be_hidden()
        ask(page, "Which rose?")
        assert answered(page, 2)[0] == shown(reply_of(url, "red", "Which rose?", key="right"))
        kept = "() => [sessionStorage.length, localStorage.length, document.cookie]"
        assert page.evaluate(kept) == [1, 0, ""]
        page.reload()
        expect(page.locator("#state")).to_contain_text("ready")
        page.locator("#forget").click()
        expect(page.locator("#key")).to_be_visible()
        assert page.evaluate(kept) == [0, 0, ""]


def test_a_full_server_and_a_dead_engine_are_told_in_words_and_asked_again(browser, tiny_gguf, experts, tmp_path):
    from playwright.sync_api import expect

    supervisor, settings = supervised(tiny_gguf, lambda: experts, tmp_path, slots=1, queue=1)
    with live(supervisor, settings) as url, opened(browser, url) as page:
        expect(page.locator("#state")).to_contain_text("ready")
        with crowd(url):
            expect(page.locator("#state")).to_contain_text("1 waiting", timeout=60_000)
            ask(page, "Which rose?")
            answered(page, 2)
            full = page.locator(".reply .bad", has_text="The server is full: too many requests wait already")
            expect(full.first).to_contain_text("Try again in 2 s.")
        while page.get_by_role("button", name="Ask again").count():
            page.get_by_role("button", name="Ask again").first.click()
            expect(page.locator("#stop")).to_be_hidden(timeout=60_000)
        assert answered(page, 2)[0] == shown(reply_of(url, "red", "Which rose?"))

        page.locator("#anew").click()
        kill_engine(supervisor)
        ask(page, "hello")
        expect(page.locator(".bad", has_text="The engine is not ready: ").first).to_be_visible()
        expect(page.locator("#load")).to_contain_text("restarts1", timeout=30_000)
        again = page.get_by_role("button", name="Ask again")
        (again if again.count() else page.locator("#send")).click()  # the latter where it was dead before it was asked
        assert answered(page, 1) == [shown(reply_of(url, "base", "hello"))]
