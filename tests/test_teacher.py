"""The teacher on a server: every reply fits, none is paid for twice, none is lost. Against tests/teacher_server.py."""

import asyncio
import json
import os
import random
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from factory.build import build
from factory.errors import Problems, UserError
from factory.generate import generate
from factory.paths import Home, read_params, read_profile
from factory.replies import useless
from factory.schema import CANDIDATES, ROWS, read_rows, write_rows
from factory.store import read_json
from factory.teacher.cache import Cache, Kept
from factory.teacher.chat import longest, own_words, read_variants, remember
from factory.teacher.launch import Standing
from factory.teacher.limit import MOST, START, Limiter
from factory.template import read_template

ROOT = Path(__file__).parents[1]
SERVER = ROOT / "tests" / "teacher_server.py"
SEEDS = 12
VARIANTS = 4


@contextmanager
def server(*options):
    """The port of a teacher's server."""
    process = subprocess.Popen([sys.executable, str(SERVER), *options], stdout=subprocess.PIPE, text=True)
    try:
        yield int(process.stdout.readline())
    finally:
        process.kill()
        process.communicate()


def count(port):
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/count") as reply:
        return json.load(reply)


@pytest.fixture(scope="module")
def good():
    with server() as port:
        yield port


def ready(home, **changes):
    """`home` with one expert, few seeds and a teacher on a server."""
    teacher = {"kind": "openai", "model": "mock", "revision": None, "variants": VARIANTS, "sampling": {}, **changes}
    home.params.write_text(f"experts: [product]\nprofile: pocket\nteacher: {json.dumps(teacher)}\n")
    path = home.seeds("product")
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:SEEDS]))
    return home


@pytest.fixture
def taught(checkout, monkeypatch):
    """A checkout whose teacher is on a server, and a function that runs generate against a port."""
    ready(checkout)
    monkeypatch.delenv("DMOE_TEACHER_KEY", raising=False)

    def run(port, home=checkout):
        monkeypatch.setenv("DMOE_TEACHER_URL", f"http://127.0.0.1:{port}/v1")
        return generate(home, "product", read_params(home), read_profile(home, "pocket"))

    return checkout, run


def candidates(home):
    return home.dataset("product", "candidates.parquet")


def rows(home):
    return read_rows(candidates(home), CANDIDATES, "")


def judged(home):
    """Builds, and returns the statistics and the dataset's rows."""
    stats = build(home, "product", read_profile(home, "pocket"))
    kept = [
        row for name in ("train", "holdout") for row in read_rows(home.dataset("product", f"{name}.parquet"), ROWS, "")
    ]
    return stats, kept


@pytest.fixture(scope="module")
def unbroken(home, tmp_path_factory, good):
    """The bytes that a run against a good server writes."""
    root = tmp_path_factory.mktemp("unbroken")
    for name in ("profiles", "templates", "seeds"):
        shutil.copytree(home.root / name, root / name)
    (root / "models" / "pocket").mkdir(parents=True)
    shutil.copy(home.root / "models/pocket/tokenizer.json", root / "models/pocket")
    profile = root / "profiles" / "pocket.yaml"
    profile.write_text(re.sub(r"revision: .*", "revision: null", profile.read_text()))
    ready(Home(root))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DMOE_TEACHER_URL", f"http://127.0.0.1:{good}/v1")
        generate(Home(root), "product", read_params(Home(root)), read_profile(Home(root), "pocket"))
    return candidates(Home(root)).read_bytes()


# -- what a run makes ---------------------------------------------------------------------------


def test_every_row_is_in_form_and_the_first_of_a_seed_is_its_own_words(taught, good):
    home, run = taught
    made = run(good)
    template = read_template(home.template("product"))
    seeds = {seed["id"]: seed for seed in map(json.loads, home.seeds("product").read_text().splitlines())}
    assert made.accepted == made.wanted == SEEDS * template.declaration.generate.per_seed and not made.short
    assert made.candidates == len(rows(home))
    for row in rows(home):
        assert template.in_form(row["output"], "default") and row["failure"] == "" and row["teacher"] == "mock"
        assert re.fullmatch(r"[0-9a-f]{64}", row["request"])
        assert (row["instruction"] == seeds[row["seed_id"]]["instruction"]) == (row["sample"] == 0)
        assert {s["name"]: s["value"] for s in row["slots"]}.items() >= seeds[row["seed_id"]].get("slots", {}).items()


def test_a_reply_and_its_tokens_stand_once_in_the_file(taught, good):
    home, run = taught
    run(good)
    with Cache(home.replies) as cache:
        kept = cache.keys()
    told = {row["request"]: row for row in rows(home) if row["reply"]}
    assert set(told) == set(kept) and len(told) == sum(bool(row["reply"]) for row in rows(home))
    assert sum(row["prompt_tokens"] + row["completion_tokens"] for row in rows(home)) == sum(kept.values())


def test_a_second_run_sends_nothing_and_writes_the_same_bytes(taught, good, unbroken):
    home, run = taught
    run(good)
    sent = count(good)["tries"]
    assert run(good).status == "24 requests, 24 answered from the cache, 0 tokens"
    assert count(good)["tries"] == sent and candidates(home).read_bytes() == unbroken
    with Cache(home.replies) as cache:
        assert cache.summary()[0][:4] == ("product", "mock", 24, 24)


def test_a_clone_with_the_candidates_alone_needs_no_server(taught, good, unbroken, monkeypatch):
    home, run = taught
    run(good)
    shutil.rmtree(home.replies.parent)
    monkeypatch.delenv("DMOE_TEACHER_URL")
    generate(home, "product", read_params(home), read_profile(home, "pocket"))
    assert candidates(home).read_bytes() == unbroken


def test_one_edited_seed_sends_its_own_requests_and_equals_a_clean_build(taught, good, tmp_path_factory):
    home, run = taught
    run(good)
    reword_a_seed(home)
    sent = count(good)["tries"]
    run(good)
    assert count(good)["tries"] - sent == 2  # five rows wanted, four a request
    clean = Home(shutil.copytree(home.root, tmp_path_factory.mktemp("clean") / "x"))
    shutil.rmtree(clean.replies.parent)
    candidates(clean).unlink()
    run(good, clean)
    assert candidates(clean).read_bytes() == candidates(home).read_bytes()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("Get the {answer}. {reason}", "Just get the {answer}. {reason}"), ("- it depends", "- it all depends"),
        ("dedup: {instruction: 90}", "dedup: {instruction: 80}"), ("per_seed: 5", "per_seed: 3"),
    ],
)  # fmt: skip
def test_an_edited_form_hedge_or_threshold_asks_nobody(taught, good, old, new):
    home, run = taught
    run(good)
    text = home.template("product").read_text()
    assert old in text
    home.template("product").write_text(text.replace(old, new))
    sent = count(good)["tries"]
    run(good)
    assert count(good)["tries"] == sent


def test_a_seed_that_falls_short_is_asked_about_again_until_its_budget_is_spent(taught):
    home, run = taught
    with server("--faults", "same", "--share", "1") as port:
        made = run(port)
        assert count(port)["tries"] == SEEDS * 2 * 4
    assert set(made.short.values()) == {2} and made.rules["exact_copy"].alone > 0
    stats, _ = judged(home)
    assert set(stats["seeds_short"]) == set(made.short)


# -- without a server ---------------------------------------------------------------------------


def recorded(home):
    return generate(home, "product", read_params(home), read_profile(home, "pocket"), recorded=True)


def reword_a_seed(home):
    """Gives the sixth seed another text, so that no reply to it is kept; returns its id."""
    lines = home.seeds("product").read_text().splitlines(keepends=True)
    seed = json.loads(lines[5]) | {"instruction": "Which notebook is right for a painter?"}
    home.seeds("product").write_text("".join([*lines[:5], json.dumps(seed) + "\n", *lines[6:]]))
    return seed["id"]


def open_a_slot(home):
    """Takes the phrases of `reason` away: only a teacher who can write may fill it."""
    text = home.template("product").read_text()
    start, end = text.index("      phrases:                    # true"), text.index("  # A reply with one of these")
    home.template("product").write_text(text[:start] + "      phrases: []\n" + text[end:])


@pytest.mark.parametrize("where", ["the cache", "the candidates"])
def test_recorded_replies_are_used_wherever_they_are_kept(taught, good, unbroken, monkeypatch, where):
    home, run = taught
    run(good)
    candidates(home).unlink() if where == "the cache" else shutil.rmtree(home.replies.parent)
    monkeypatch.delenv("DMOE_TEACHER_URL")
    made = recorded(home)
    assert candidates(home).read_bytes() == unbroken and set(made.teachers) == {"mock"}


def test_a_seed_without_recorded_replies_is_the_embedded_teachers_and_says_so(taught, good, unbroken):
    home, run = taught
    run(good)
    before, seeds = {row["row_id"] for row in rows(home)}, home.seeds("product").read_text()
    seed, sent = reword_a_seed(home), count(good)["tries"]
    made = recorded(home)
    assert {row["seed_id"] for row in rows(home) if row["teacher"] == "phrases"} == {seed}
    assert {row["row_id"] for row in rows(home) if row["teacher"] == "mock"} < before
    assert made.teachers == {"mock": len(rows(home)) - 10, "phrases": 10} and not made.lost
    assert judged(home)[0]["kept"] > 0 and count(good)["tries"] == sent
    home.seeds("product").write_text(seeds)
    run(good)  # what was paid for is still there
    assert candidates(home).read_bytes() == unbroken and count(good)["tries"] == sent


def test_where_nothing_is_recorded_all_rows_are_the_embedded_teachers_without_openai(checkout):
    ready(checkout)
    code = "import sys; sys.modules['openai'] = sys.modules['aiohttp'] = None; from factory.cli import app; app()"
    command = [sys.executable, "-c", code, "generate", "product", "--recorded"]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("DMOE_")} | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=checkout.root, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "product: 120 candidates" in done.stdout and "; 120 by phrases" in done.stdout
    assert {row["teacher"] for row in rows(checkout)} == {"phrases"}


def test_recorded_is_the_embedded_teacher_where_that_is_the_teacher(checkout):
    profile = read_profile(checkout, "pocket")
    generate(checkout, "product", read_params(checkout), profile)
    before = candidates(checkout).read_bytes()
    assert generate(checkout, "product", read_params(checkout), profile, recorded=True).teachers.keys() == {"phrases"}
    assert candidates(checkout).read_bytes() == before


def test_a_seed_that_only_a_writer_could_serve_is_told_and_the_others_are_made(taught, good, capsys):
    from factory.table import print_made

    home, run = taught
    open_a_slot(home)
    run(good)
    seed = reword_a_seed(home)
    made = recorded(home)
    assert set(made.lost) == {seed} and set(made.teachers) == {"mock"}
    assert seed not in {row["seed_id"] for row in rows(home)}
    print_made("product", made)
    assert "1 seeds could not be made (no reply is kept, and the embedded teacher" in capsys.readouterr().out


def test_where_no_seed_can_be_made_it_is_one_error_and_the_old_file_stays(taught, good):
    home, run = taught
    run(good)
    before = candidates(home).read_bytes()
    open_a_slot(home)
    with pytest.raises(UserError, match="the embedded teacher cannot fill reason .*\n  then ask the teacher: dmoe gen"):
        recorded(home)
    assert candidates(home).read_bytes() == before


# -- a server at fault --------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["429", "500", "503", "close", "half", "burst", "429,500,503,close,half"])
def test_faults_on_the_way_change_nothing_in_what_is_written(taught, unbroken, fault):
    home, run = taught
    with server("--faults", fault, "--share", "0.2") as port:
        run(port)
        assert count(port)["answered"] == count(port)["different"] == 24
    assert candidates(home).read_bytes() == unbroken


def test_a_server_that_hangs_is_asked_again(taught, unbroken, monkeypatch):
    from factory.teacher import client

    monkeypatch.setattr(client, "UNSURE", 0.5)
    monkeypatch.setattr(client, "FASTEST", 0.5)
    home, run = taught
    with server("--faults", "hang", "--share", "0.2") as port:
        run(port)
        assert count(port)["tries"] > 24
    assert candidates(home).read_bytes() == unbroken


FAULTS = {
    "cut": {"truncated"}, "empty": {"empty"}, "shape": {"schema"}, "language": {"language"}, "script": {"script"},
    "rival": {"rival"}, "answer": {"rival"}, "large": {"too_large"}, "same": {"exact_copy"},
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_reply_of_bad_content_is_counted_and_kept_out(taught, fault):
    home, run = taught
    with server("--faults", fault, "--share", "0.5") as port:
        run(port)
        assert count(port)["faults"][fault] > 0
    stats, kept = judged(home)
    assert stats["kept"] + stats["dropped"] + stats["failed"] == stats["candidates"] == len(rows(home))
    assert set(stats["reasons"]) >= FAULTS[fault]
    assert stats["failed"] == 0 or fault in ("cut", "empty", "shape", "large")
    template = read_template(home.template("product"))
    for row in kept:
        assert template.in_form(row["output"]) and not re.search("MacBook|Dell", row["output"])
        assert not re.search("Welcher|\u043a", row["instruction"])


def test_the_variants_before_a_cut_are_kept(taught):
    home, run = taught
    with server("--faults", "cut", "--share", "1") as port:
        run(port)
    cut = [row for row in rows(home) if row["finish_reason"] == "length"]
    assert {row["failure"] for row in cut} == {"", "truncated"}


def test_a_reply_too_large_is_not_read_to_its_end(taught):
    home, run = taught
    with server("--faults", "large", "--share", "1") as port:
        run(port)
    assert {row["failure"] for row in rows(home)} == {"too_large"}
    assert home.replies.stat().st_size < 1_000_000


def test_a_port_where_nobody_listens_is_one_line_and_the_old_file_stays(taught, good, monkeypatch):
    from factory.teacher import client

    home, run = taught
    run(good)
    before = candidates(home).read_bytes()
    shutil.rmtree(home.replies.parent)
    home.params.write_text(home.params.read_text().replace("mock", "other"))
    monkeypatch.setattr(client, "UNHEARD", 0.5)
    with pytest.raises(UserError, match=r"^http://127.0.0.1:9/v1: no answer for \d s: nobody answers at that address$"):
        run(9)
    assert candidates(home).read_bytes() == before


def test_a_server_that_is_busy_for_ever_ends_the_run(taught, monkeypatch):
    from factory.teacher import client

    monkeypatch.setattr(client, "SILENT", 0.5)
    home, run = taught
    with server("--faults", "down") as port, pytest.raises(UserError, match="no answer for .* 503: no, not now"):
        run(port)
    assert not candidates(home).exists()


def test_a_wrong_key_ends_the_run_and_is_not_told(taught, monkeypatch):
    home, run = taught
    monkeypatch.setenv("DMOE_TEACHER_KEY", "wrong-secret-key")
    with server("--key", "right-secret-key") as port:
        with pytest.raises(UserError, match="401: wrong key") as error:
            run(port)
        assert "secret" not in str(error.value)
        monkeypatch.setenv("DMOE_TEACHER_KEY", "right-secret-key")
        run(port)
    assert b"secret-key" not in candidates(home).read_bytes()


def test_seeds_that_were_refused_are_named_and_asked_alone_the_next_time(taught, unbroken, good):
    home, run = taught
    with server("--faults", "400", "--share", "0.2") as port:
        with pytest.raises(UserError, match=r"seeds got no reply.*\n  \d times: 400: .*product-00") as error:
            run(port)
        answered = count(port)["answered"]
    assert "only these are asked: dmoe generate product" in str(error.value) and not candidates(home).exists()
    assert 0 < answered < 24
    sent = count(good)["tries"]
    run(good)
    assert count(good)["tries"] - sent == 24 - answered and candidates(home).read_bytes() == unbroken


def test_requests_that_bring_nothing_one_after_another_end_the_run(taught):
    _, run = taught
    with server("--faults", "400", "--share", "1") as port:
        with pytest.raises(UserError, match="16 requests one after another brought nothing: 400"):
            run(port)
        assert count(port)["tries"] < 32


@pytest.mark.parametrize("environment", [
    {"DMOE_TEACHER_KEY": "sk-hidden-1234567"}, {"user": "anna:hidden-1234567@"},
    {"DMOE_TEACHER_KEY": "sk-hidden-1234567", "query": "?token=hidden-1234567"},
])  # fmt: skip
@pytest.mark.parametrize("faults", ["", "500", "400"])
def test_no_key_and_no_password_is_written_anywhere(checkout, environment, faults):
    ready(checkout)
    with server("--secret", "--faults", faults, "--share", "0.2") as port:
        place = f"http://{environment.get('user', '')}127.0.0.1:{port}/v1{environment.get('query', '')}"
        key = {"DMOE_TEACHER_KEY": environment.get("DMOE_TEACHER_KEY", "")}
        done = dmoe("generate", "product", cwd=checkout.root, DMOE_TEACHER_URL=place, **key)
        assert done.returncode == (1 if faults == "400" else 0), done.stderr
    hidden = [b"hidden-1234567", b"YW5uYTpoaWRkZW4tMTIzNDU2Nw"]
    files = [p.read_bytes() for p in checkout.root.rglob("*") if p.is_file() and "models" not in p.parts]
    texts = [*files, done.stdout.encode(), done.stderr.encode()]
    assert any(b"***" in text for text in texts)
    assert not any(secret in text for text in texts for secret in hidden)


def dmoe(*words, cwd, **env):
    command = [sys.executable, "-m", "factory.cli", *words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **env}
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=environment)


# -- killed -------------------------------------------------------------------------------------


def test_a_run_killed_at_any_moment_goes_on_where_it_was(taught, unbroken):
    home, _ = taught
    rng = random.Random(3)
    command = [sys.executable, "-m", "factory.cli", "generate", "product"]
    with server("--delay", "0.05") as port:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "DMOE_TEACHER_URL": f"http://127.0.0.1:{port}/v1"}
        lost = 0
        for _ in range(4):
            before = count(port)["tries"]
            process = subprocess.Popen(command, cwd=home.root, env=environment, stderr=subprocess.DEVNULL)
            while count(port)["tries"] == before and process.poll() is None:
                time.sleep(0.005)
            time.sleep(rng.uniform(0, 0.06))
            process.send_signal(signal.SIGKILL)
            process.wait()
            assert not candidates(home).exists()
            with sqlite3.connect(home.replies) as database:
                kept = database.execute("SELECT count(*) FROM replies").fetchone()[0]
            newly, lost = count(port)["tries"] - kept - lost, count(port)["tries"] - kept
            assert newly <= count(port)["most_active"]
        subprocess.run(command, cwd=home.root, env=environment, check=True, capture_output=True)
        assert count(port)["tries"] == 24 + lost and count(port)["different"] == 24
    assert candidates(home).read_bytes() == unbroken


# -- reading replies ----------------------------------------------------------------------------

PROPERTIES = {
    "instruction": {"type": "string", "minLength": 4, "maxLength": 400}, "use": {"type": "string", "enum": ["work"]},
}  # fmt: skip
SCHEMA = {"properties": {"variants": {"maxItems": 2, "items": {"properties": PROPERTIES}}}}
ONE = {"instruction": "which one", "use": "work"}


def reply(text, finish="stop"):
    return Kept("k", "product", "product-0001", "mock", text, finish, 1, 1)


@pytest.mark.parametrize(
    ("variant", "detail"),
    [
        ("text", "not an object"), ({"instruction": "which one"}, "not an object"),
        (ONE | {"more": "x"}, "not an object"),
        (ONE | {"use": 7}, "use: no text"), (ONE | {"use": "play"}, "use: none of the allowed"),
        (ONE | {"instruction": "x" * 401}, "instruction: 401 characters"),
        (ONE | {"instruction": "  a  "}, "instruction: 5 characters"),
    ],
)  # fmt: skip
def test_a_variant_that_does_not_fit_the_schema_fails_and_the_others_stay(variant, detail):
    good, bad = read_variants(reply(json.dumps({"variants": [ONE, variant]})), SCHEMA, 2)
    assert good.instruction == "which one" and good.slots == {"use": "work"} and not good.failure
    assert bad.failure == "schema" and bad.detail.startswith(detail)


@pytest.mark.parametrize(
    ("text", "finish", "failure"),
    [
        ("", "stop", "empty"), ("  \n", "stop", "empty"), ("no JSON", "stop", "schema"), ("[1]", "stop", "schema"),
        ("{", "length", "truncated"),
        ('{"variants": 3}', "stop", "schema"), ('{"variants": {"a": 1}}', "stop", "schema"), 
        ("", "too_large", "too_large"), ("I will not.", "declined", "declined"), ('{"variants": []}', "stop", "schema"),
        ('{"variants": [{"instruction": "\\ud800 which"', "stop", "schema"),
    ],
)  # fmt: skip
def test_a_reply_that_is_no_list_of_variants_fails_as_a_whole(text, finish, failure):
    found = read_variants(reply(text, finish), SCHEMA, 2)
    assert [variant.failure for variant in found] == [failure] * 2 and all(variant.detail for variant in found)


def test_more_variants_than_asked_for_are_left_and_fewer_fail():
    assert len(read_variants(reply(json.dumps({"variants": [ONE] * 5})), SCHEMA, 2)) == 2
    assert [v.failure for v in read_variants(reply(json.dumps({"variants": [ONE]})), SCHEMA, 2)] == ["", "schema"]


@given(whole=st.lists(st.fixed_dictionaries({"instruction": st.text(), "use": st.text()}), max_size=3), data=st.data())
def test_a_reply_cut_off_anywhere_gives_what_was_whole_and_never_half_a_text(whole, data):
    text = json.dumps({"variants": whole})
    cut = text[: data.draw(st.integers(0, len(text)))]
    found = read_variants(reply(cut, "length"), SCHEMA, 3)
    assert len(found) == 3
    for variant, item in zip(found, whole, strict=False):
        assert variant.failure or (variant.instruction, variant.slots["use"]) == (item["instruction"], item["use"])


@given(text=st.text())
def test_whatever_a_server_says_is_read(text):
    for finish in ("stop", "length"):
        assert all(variant.failure for variant in read_variants(reply(text, finish), SCHEMA, 2))


def test_there_is_room_for_the_longest_reply(home):
    template = read_template(home.template("product"))
    assert 1000 < longest(template.schema("default", 4, {})) < longest(template.schema("default", 8, {})) < 4000


# -- limits -------------------------------------------------------------------------------------


def test_no_more_are_active_than_there_are_places():
    async def run():
        limiter, most = Limiter(), 0

        async def one():
            nonlocal most
            async with limiter:
                most = max(most, limiter.active)
                assert limiter.active <= limiter.places
                await asyncio.sleep(0)

        await asyncio.gather(*(one() for _ in range(100)))
        assert (most, limiter.active) == (START, 0)

    asyncio.run(run())


def test_places_are_halved_once_a_flight_and_grow_again():
    async def run():
        limiter = Limiter()
        limiter.places = 64
        sent = time.monotonic()
        await asyncio.sleep(0.001)
        limiter.cut(sent)
        limiter.cut(sent)
        assert limiter.places == 32
        limiter.cut(time.monotonic())
        assert limiter.places == 16
        for _ in range(10):
            limiter.cut(time.monotonic())
        assert limiter.places == 1

    asyncio.run(run())


def test_places_double_while_throughput_does_and_stop_at_most():
    async def run():
        limiter = Limiter()

        async def one():
            async with limiter:
                await asyncio.sleep(0.002)
                limiter.replied()

        await asyncio.gather(*(one() for _ in range(600)))
        assert START < limiter.places <= MOST

    asyncio.run(run())


@settings(deadline=None, max_examples=50)
@given(st.lists(st.sampled_from(["enter", "leave", "cancel", "cut", "reply"]), max_size=60))
def test_no_place_is_lost_or_made_whatever_happens(steps):
    async def run():
        limiter = Limiter()
        limiter.places = 2

        async def hold(leave):
            async with limiter:
                await leave.wait()

        held = []
        for step in steps:
            if step == "enter":
                leave = asyncio.Event()
                held.append((asyncio.create_task(hold(leave)), leave))
            elif step == "leave" and held:
                held.pop(0)[1].set()
            elif step == "cancel" and held:
                held.pop()[0].cancel()
            elif step == "cut":
                limiter.cut(time.monotonic())
            elif step == "reply":
                limiter.replied()
            await asyncio.sleep(0)
        for _, leave in held:
            leave.set()
        await asyncio.wait_for(asyncio.gather(*(task for task, _ in held), return_exceptions=True), 5)
        await asyncio.sleep(0.001)
        others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        await asyncio.wait_for(asyncio.gather(*others, return_exceptions=True), 5)
        assert limiter.active == 0 and limiter.places >= 1

    asyncio.run(run())


# -- addresses ----------------------------------------------------------------------------------


def address(url, key=""):
    from factory.teacher.client import address

    return address({"DMOE_TEACHER_URL": url, "DMOE_TEACHER_KEY": key})


def test_an_address_is_shown_without_its_secrets():
    found = address("https://anna:hidden%21pass@[::1]:8443/v1?token=hidden-token")
    assert found.shown == "https://[::1]:8443/v1" and "hidden" not in found.shown
    assert found.headers == {"Authorization": "Basic YW5uYTpoaWRkZW4hcGFzcw=="}
    assert {"hidden!pass", "hidden-token"} <= set(found.secrets)
    assert address("http://h/v1", "sk-12345678").headers == {"Authorization": "Bearer sk-12345678"}
    assert address("http://h/v1", "none").secrets == ()  # would tear holes into replies


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://h/v1", "http://", "http://h:port/v1", "http://[::1/v1"])
def test_what_is_no_address_is_told_without_being_shown(url):
    with pytest.raises(UserError, match="DMOE_TEACHER_URL: is no http URL; it looks like http://127"):
        address(url)


def test_a_missing_address_and_a_broken_key_say_what_to_do():
    with pytest.raises(UserError, match="then run: export DMOE_TEACHER_URL="):
        address("")
    with pytest.raises(UserError, match="DMOE_TEACHER_KEY: holds a character") as error:
        address("http://h/v1", "sk-hidden\nx")
    assert "hidden" not in str(error.value)


# -- params.yaml --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("teacher", "key", "message"),
    [
        ("{kind: oracle}", "teacher.kind", "must be 'phrases', 'openai' or 'vllm', not 'oracle'"),
        ("{}", "teacher.kind", "must be 'phrases', 'openai' or 'vllm', not None"),
        ("{kind: phrases, model: x}", "teacher.model", "unknown key; remove it or mend its name"),
        ("{kind: openai, model: x, revision: null, variants: 8}", "teacher.sampling", "is missing"),
        ("{kind: openai, model: x, revision: null, variants: 0, sampling: {}}", "teacher.variants", "not 0"),
        ("{kind: openai, model: x, revision: 7, variants: 8, sampling: {}}", "teacher.revision", "put it in quotes"),
        (
            "{kind: openai, model: x, revision: null, variants: 8, sampling: {temperature: 1}}", "teacher.sampling",
            "'temperature' stands in the templates (generate.sampling); remove it here",
        ),
        (
            "{kind: openai, model: x, revision: null, variants: 8, sampling: {n: 3}}", "teacher.sampling",
            "'n' is written by dmoe itself; remove it here",
        ),
    ],
)  # fmt: skip
def test_a_mistake_in_the_teacher_of_params_is_told_at_its_place(checkout, teacher, key, message):
    checkout.params.write_text(f"experts: [product]\nprofile: pocket\nteacher: {teacher}\n")
    with pytest.raises(Problems) as error:
        read_params(checkout)
    (problem,) = error.value.problems
    assert (problem.line, problem.key) == (3, key) and message in problem.message


def test_a_field_of_sampling_goes_out_and_null_takes_one_away(taught, good, monkeypatch):
    from factory.seeds import read_seeds
    from factory.teacher import Request
    from factory.teacher.chat import ChatTeacher

    home, _ = taught
    ready(home, sampling={"min_p": 0.1, "max_tokens": None})
    template = read_template(home.template("product"))
    with Cache(home.replies) as cache:
        teacher = ChatTeacher(template, read_params(home).teacher, cache, None)
        body = teacher.body(Request(read_seeds(home.seeds("product"), template)[0], 1))
    assert body["min_p"] == 0.1 and "max_tokens" not in body and "seed" not in body
    assert [line for line in body["messages"][0]["content"].splitlines() if line[:2] in ("1.", "2.")] == [
        "1. on a phone", "2. terse"  # the first request's four voices were those before
    ]  # fmt: skip


def test_lint_lets_a_slot_have_no_phrases_where_the_teacher_can_write(checkout):
    from factory.lint import lint

    text = checkout.template("product").read_text()
    start = text.index("      phrases:\n        - everyday work")
    checkout.template("product").write_text(text[:start] + text[text.index("    reason:") :])
    with pytest.raises(Problems, match="the embedded teacher .* cannot write"):
        lint(checkout, "product")
    teacher = "{kind: openai, model: x, revision: null, variants: 8, sampling: {}}"
    checkout.params.write_text(f"experts: [product, medical, legal]\nprofile: pocket\nteacher: {teacher}\n")
    assert lint(checkout, "product")["templates"] == 1


# -- what is kept -------------------------------------------------------------------------------


def test_prune_removes_what_no_seed_asks_for_any_more(taught, good):
    home, run = taught
    run(good)
    path = home.seeds("product")
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-2]))
    done = dmoe("teacher", "cache", "--prune", cwd=home.root)
    assert "4 replies (" in done.stdout and done.returncode == 1  # nobody there to say yes
    with Cache(home.replies) as cache:
        assert len(cache.keys()) == 24
    assert "removed" in dmoe("teacher", "cache", "--prune", "--yes", cwd=home.root).stdout
    with Cache(home.replies) as cache:
        assert len(cache.keys()) == 20
    sent = count(good)["tries"]
    run(good)
    assert count(good)["tries"] == sent


def test_prune_under_the_embedded_teacher_removes_nothing(taught, good):
    home, run = taught
    run(good)
    home.params.write_text("experts: [product]\nprofile: pocket\nteacher: {kind: phrases}\n")
    done = dmoe("teacher", "cache", "--prune", "--yes", cwd=home.root)
    assert done.returncode == 1 and "all would be removed" in done.stderr
    with Cache(home.replies) as cache:
        assert len(cache.keys()) == 24


def test_failed_replies_can_be_asked_for_again_once_the_server_is_mended(taught, good, unbroken):
    home, run = taught
    with server("--faults", "empty", "--share", "0.4") as port:
        run(port)
    bad = useless(candidates(home))
    assert bad and "replies forgotten" in dmoe("teacher", "cache", "--failed", cwd=home.root).stdout
    assert not candidates(home).exists()
    sent = count(good)["tries"]
    run(good)
    assert count(good)["tries"] > sent
    assert candidates(home).read_bytes() == unbroken


def test_candidates_that_are_damaged_or_of_an_older_form_are_passed_over(tmp_path, checkout):
    with Cache(tmp_path / "replies.sqlite") as cache:
        path = tmp_path / "candidates.parquet"
        remember(path, cache)
        path.write_bytes(b"PAR1 and nothing more")
        remember(path, cache)
        path.unlink()
        write_rows(path, ROWS, [])
        remember(path, cache)
        assert useless(path) == set()
        assert cache.keys() == {}


# -- dmoe teacher check -------------------------------------------------------------------------


def check(home, port):
    return dmoe("teacher", "check", cwd=home.root, DMOE_TEACHER_URL=f"http://127.0.0.1:{port}/v1", DMOE_TEACHER_KEY="")


def test_check_tells_in_one_screen_that_a_server_will_do_and_keeps_what_it_asked(taught, good, unbroken):
    home, run = taught
    done = check(home, good)
    assert done.returncode == 0, done.stderr
    assert [line.split()[:2] for line in done.stdout.splitlines()] == [
        ["ok", name] for name in ("answers", "model", "schema", "variants", "speed")
    ]
    assert "32 of 32 fit" in done.stdout and "tokens/s" in done.stdout
    sent = count(good)["tries"]
    run(good)
    assert count(good)["tries"] - sent == 24 - 8 and candidates(home).read_bytes() == unbroken


def test_check_says_no_to_a_server_that_ignores_the_schema_or_lacks_the_model(taught):
    home, _ = taught
    ready(home, model="other")
    with server("--faults", "ignore", "--share", "1") as port:
        done = check(home, port)
    assert done.returncode == 1
    assert "NO  model     'other' is not among its models: mock" in done.stdout
    assert "NO  schema    not honoured, it said" in done.stdout and "NO  variants  0 of 32" in done.stdout


def test_check_of_a_server_that_is_not_there_is_one_line(taught):
    done = check(taught[0], 9)
    assert done.returncode == 1 and done.stderr == "error: http://127.0.0.1:9/v1: nobody answers at that address\n"


def test_check_of_the_embedded_teacher_says_that_there_is_nothing_to_check(checkout):
    done = dmoe("teacher", "check", cwd=checkout.root)
    assert done.returncode == 1 and "there is no server to check" in done.stderr


# -- a vLLM of one's own ------------------------------------------------------------------------

FAKE = f"""#!{sys.executable}
import os, runpy, sys
words = sys.argv[1:]
assert words[:2] == ["-m", "vllm.entrypoints.openai.api_server"], words
assert words[words.index("--host") + 1] == "127.0.0.1" and "--structured-outputs-config" in words
print("started", os.getpid(), flush=True)
if "--broken" in words:
    raise ValueError("the model does not fit")
sys.argv = ["x", "--port", words[words.index("--port") + 1], "--key", os.environ["VLLM_API_KEY"]]
runpy.run_path({str(SERVER)!r}, run_name="__main__")
"""


@pytest.fixture
def own(taught, tmp_path, monkeypatch):
    """A checkout that starts a vLLM of its own: a program that takes vLLM's arguments and is teacher_server.py."""
    home, _ = taught
    program = home.root / "python-with-vllm"
    program.write_text(FAKE)
    program.chmod(0o755)
    ready(home, kind="vllm", serve=["--max-model-len", "512"])
    monkeypatch.delenv("DMOE_TEACHER_URL", raising=False)
    monkeypatch.setenv("DMOE_VLLM", str(program))
    return home, home.work / "logs" / "vllm.log"


def make(home):
    return generate(home, "product", read_params(home), read_profile(home, "pocket"))


def alive(log):
    process = re.search(r"started (\d+)", log.read_text())[1]
    return Path(f"/proc/{process}").exists()


def test_a_vllm_of_ones_own_is_started_when_it_is_needed_and_ended(own, unbroken):
    home, log = own
    make(home)
    assert candidates(home).read_bytes() == unbroken and not alive(log)
    log.unlink()
    make(home)  # everything is kept
    assert not log.exists()


def test_one_vllm_serves_several_stages_and_is_started_again_when_it_has_died(own, unbroken):
    """As `dmoe repro-all` keeps it for all experts. Replies are forgotten in between, so that it is asked each time."""
    home, log = own
    with Standing(read_params(home).teacher, home) as standing:
        servers = []
        for _ in range(3):
            home.replies.unlink(missing_ok=True)
            candidates(home).unlink(missing_ok=True)
            generate(home, "product", read_params(home), read_profile(home, "pocket"), standing=standing)
            assert candidates(home).read_bytes() == unbroken and alive(log)
            servers.append(log.read_text().split("started ")[1].split()[0])
        assert len(set(servers)) == 1
        os.kill(int(servers[0]), signal.SIGKILL)
        home.replies.unlink()
        candidates(home).unlink()
        with pytest.raises(UserError, match="vLLM ended with -9"):
            generate(home, "product", read_params(home), read_profile(home, "pocket"), standing=standing)
        generate(home, "product", read_params(home), read_profile(home, "pocket"), standing=standing)
        assert candidates(home).read_bytes() == unbroken and alive(log)
    assert not alive(log)


def test_a_vllm_that_does_not_start_is_one_line_with_its_reason(own):
    home, log = own
    ready(home, kind="vllm", serve=["--broken"])
    with pytest.raises(UserError, match=r"vLLM ended with 1: ValueError: the model does not fit \(see .*vllm\.log\)"):
        make(home)
    assert not alive(log)


def test_a_vllm_ends_with_the_run_that_is_killed(own):
    home, log = own
    program = Path(os.environ["DMOE_VLLM"])
    program.write_text(FAKE.replace('"--key"', '"--delay", "60", "--key"'))
    command = [sys.executable, "-m", "factory.cli", "generate", "product"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, cwd=home.root, env=environment, stderr=subprocess.DEVNULL)
    while not (log.exists() and "started" in log.read_text()):
        time.sleep(0.05)
    process.kill()
    process.wait()
    until = time.monotonic() + 10
    while alive(log) and time.monotonic() < until:
        time.sleep(0.05)
    assert not alive(log)


def test_a_missing_vllm_says_what_to_do(own, monkeypatch):
    home, _ = own
    monkeypatch.delenv("DMOE_VLLM")
    with pytest.raises(UserError, match="there is no vllm here\n  then install it .* export DMOE_VLLM="):
        make(home)
    monkeypatch.setenv("DMOE_VLLM", "/no/such/python")
    with pytest.raises(UserError, match="DMOE_VLLM: '/no/such/python' is no program"):
        make(home)


# -- llama.cpp ----------------------------------------------------------------------------------


def test_llama_cpp_is_a_teacher_too_and_honours_the_schema(taught, tiny_gguf, tmp_path, monkeypatch):
    from factory.llama import running

    home, _ = taught
    path = home.seeds("product")
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:4]))
    template = home.template("product")
    template.write_text(re.sub(r"\n +ask: (what the person|one plain).*", "", template.read_text()))
    teacher = "{kind: openai, model: tiny, revision: null, variants: 1, sampling: {max_tokens: 900}}"
    home.params.write_text(f"experts: [product]\nprofile: pocket\nteacher: {teacher}\n")
    with running(tiny_gguf, slots=4, context=2048, log=tmp_path / "llama.log") as llama:
        monkeypatch.setenv("DMOE_TEACHER_URL", llama.url + "/v1")
        monkeypatch.setenv("DMOE_TEACHER_KEY", llama.key)
        make(home)
    found = rows(home)
    # A random model: shape without sense, at times half a character, or more characters than it was given.
    assert {row["failure"] for row in found} <= {"", "truncated", "schema"}
    assert sum(row["failure"] == "schema" for row in found) <= len(found) / 2
    whole = [json.loads(row["reply"]) for row in found if row["reply"] and row["finish_reason"] == "stop"]
    reasons = read_template(template).phrases("reason", "default")
    assert whole and all(reply["variants"][0]["reason"] in reasons for reply in whole)  # no chance hit: a closed slot
    assert llama.key.encode() not in candidates(home).read_bytes() + home.replies.read_bytes()


def test_own_words_take_the_slots_of_the_first_good_variant_or_its_failure(taught):
    from factory.seeds import Seed
    from factory.teacher import Request, Variant

    request = Request(Seed("s", "which one", "desk", "CC0-1.0"), 0)
    bad, good = Variant(failure="schema", detail="x"), Variant("other words", {"use": "work"})
    assert own_words(request, [bad, good]) == Variant("which one", {"use": "work"})
    assert own_words(request, [bad, bad]) == Variant("which one", {}, "schema", "x")


def test_stats_tell_the_diversity_of_what_a_teacher_wrote(taught, good):
    home, run = taught
    run(good)
    judged(home)
    stats = read_json(home.dataset("product", "stats.json"))
    assert set(stats["diversity"]) == {"distinct_2", "distinct_3", "nearest"} and stats["diversity"]["distinct_3"] > 0.5
