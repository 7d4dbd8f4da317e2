"""`dmoe preview`: what it shows is what generate and build would make, and it says so within a save."""

import io
import os
import queue
import re
import signal
import subprocess
import sys
import threading
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from factory.build import build
from factory.errors import Problems, UserError
from factory.generate import generate
from factory.paths import read_params, read_profile
from factory.preview import BAR, Wanted, histogram, preview, show, some, spread, voice
from factory.schema import CANDIDATES, VERDICTS, read_rows
from factory.seeds import held_out, read_seeds
from factory.teacher.phrases import PhrasesTeacher
from factory.template import read_template
from factory.tokens import counter

ROOT = Path(__file__).parents[1]
VOICES = ["terse", "chatty"]


def parts(home, expert="product"):
    params = read_params(home)
    profile = read_profile(home, params.profile)
    template = read_template(home.template(expert))
    return params, profile, template, read_seeds(home.seeds(expert), template), counter(home, profile)


def shown(home, capsys, expert="product", **wanted):
    params = read_params(home)
    show(home, expert, params, read_profile(home, params.profile), Wanted(**wanted))
    return capsys.readouterr().out


def edit(path, old, new):
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new, 1), encoding="utf-8")


# -- the rows -----------------------------------------------------------------------------------


def test_the_rows_are_those_that_generate_and_build_would_write(checkout):
    params, profile, template, seeds, count = parts(checkout, "medical")
    rows = preview(template, seeds, count)
    generate(checkout, "medical", params, profile)
    build(checkout, "medical", profile)
    for name, table in (("candidates", CANDIDATES), ("verdicts", VERDICTS)):
        made = read_rows(checkout.dataset("medical", f"{name}.parquet"), table, "")
        assert [{column: row[column] for column in table.columns} for row in rows] == made


def test_rows_of_a_few_seeds_are_judged_beside_the_other_seeds_own_words(home):
    *_, template, seeds, count = parts(home)
    outside = held_out(seeds)
    taken = next(seed for seed in seeds if seed.id in outside)
    trained = next(seed for seed in seeds if seed.id not in outside)
    seeds[seeds.index(trained)] = replace(trained, instruction=f"{taken.instruction} !")
    first = preview(template, seeds, count, only={trained.id})[0]
    assert first["seed_id"] == trained.id and first["reasons"] == ["like_held_out"]


class Drifter:
    """Asks another seed's question for every seed."""

    name, variants, spare, budget = "drifter", 1, 1, 1

    def __init__(self, template, question):
        self.own, self.question = PhrasesTeacher(template), question

    async def reply(self, request):
        reply = await self.own.reply(request)
        return replace(reply, variants=[replace(v, instruction=self.question) for v in reply.variants if request.number]
                       or reply.variants)  # fmt: skip

    def status(self):
        return ""


def test_a_paraphrase_that_is_another_answers_question_drifts_though_only_its_seed_is_shown(home):
    *_, template, seeds, count = parts(home, "medical")
    one, other = seeds[0], next(seed for seed in seeds if seed.answer != seeds[0].answer)
    rows = preview(template, seeds, count, Drifter(template, other.instruction), {one.id})
    assert "drift" not in rows[0]["reasons"] and all("drift" in row["reasons"] for row in rows[1:])


# -- which of them ------------------------------------------------------------------------------


def test_the_seeds_shown_are_the_same_each_time_and_of_different_answers(home):
    *_, seeds, _ = parts(home, "medical")
    chosen = some(seeds, 6)
    assert chosen == some(list(reversed(seeds)), 6) and len({seed.answer for seed in chosen}) == 6


def test_the_rows_shown_are_spread_over_forms_voices_and_verdicts():
    rows = [
        {"seed_id": f"s{i // 10}", "sample": i % 10, "form": i % 3, "reasons": ["surplus"] if i % 10 > 6 else []}
        for i in range(40)
    ]
    taken = spread(rows, 8, VOICES)
    assert taken == spread(rows, 8, VOICES) and len(taken) == 8
    assert {row["form"] for row in taken} == {0, 1, 2} and {len(row["reasons"]) for row in taken} == {0, 1}
    assert {voice(row, VOICES) for row in taken} == {"own words", *VOICES}
    assert {row["seed_id"] for row in taken} == {"s0", "s1", "s2", "s3"}


def test_fewer_rows_than_asked_for_are_all_shown():
    rows = [{"seed_id": "a", "sample": 0, "form": 0, "reasons": []}]
    assert spread(rows, 5, VOICES) == rows


@given(st.lists(st.integers(0, 400), max_size=60), st.tuples(st.integers(1, 60), st.integers(0, 60)))
def test_every_length_is_in_one_bar_and_those_out_of_bounds_in_bars_of_their_own(lengths, ends):
    bounds = [ends[0], ends[0] + ends[1]]
    bars = histogram(lengths, bounds)
    assert sum(number for _, number, _ in bars) == len(lengths)
    assert bars[0][:2] == (f"< {bounds[0]}", sum(n < bounds[0] for n in lengths))
    assert bars[-1][:2] == (f"> {bounds[1]}", sum(n > bounds[1] for n in lengths))
    assert all(len(bar) <= BAR and bool(bar) == bool(number) for _, number, bar in bars)


# -- on the screen ------------------------------------------------------------------------------


def test_prompt_rows_lengths_and_totals_are_shown_and_read_without_colour(checkout, capsys):
    told = shown(checkout, capsys, rows=12)
    assert "What a teacher on a server is asked for product-" in told and "Someone asks" in told
    assert re.search(r"^kept .*tokens", told, re.M) and re.search(r"^dropped .*tokens", told, re.M)
    assert re.search(r"surplus: its seed has \d+ rows already", told) and "-> " in told
    assert "Of 3,400 candidates" in told and "< 20" in told and "> 50" in told and "\x1b" not in told
    assert told == shown(checkout, capsys, rows=12)


def test_a_hedge_that_a_reviewer_forbids_is_seen_as_dropped_rows(checkout, capsys):
    edit(checkout.template("product"), "- as an AI", "- as an AI\n    - and nothing else")
    with pytest.raises(Problems, match="and nothing else"):  # a form that says it can never be kept
        shown(checkout, capsys)


def test_rows_that_another_seeds_rows_bring_down_are_told(home):
    from rich.console import Console

    from factory.preview import _corrected

    row = {"seed_id": "s", "sample": 1, "verdict": "keep", "reasons": [], "detail": ""}
    now = row | {"verdict": "drop", "reasons": ["near_copy"], "detail": "93.0 like ab"}
    told = io.StringIO()
    _corrected(Console(width=110, file=told), [row], {("s", 1): now})
    assert told.getvalue().strip() == "among the rows of all seeds, s/1 is dropped (near_copy: 93.0 like ab)"


def test_one_seed_can_be_asked_for_and_an_unknown_one_is_told(checkout, capsys):
    told = shown(checkout, capsys, seed="product-0017", rows=3)
    assert len(re.findall(r"^(?:kept|dropped) +product-0017/", told, re.M)) == 3
    with pytest.raises(UserError, match=r"seeds/product\.jsonl: there is no seed 'none'"):
        shown(checkout, capsys, seed="none")


def test_what_is_wrong_with_both_files_is_told_at_once(checkout, capsys):
    edit(checkout.template("product"), "per_seed:", "per_sed:")
    edit(checkout.seeds("product"), '"source"', '"sauce"')
    with pytest.raises(Problems) as told:
        shown(checkout, capsys)
    assert "per_sed" in str(told.value) and "sauce" in str(told.value)


def test_nothing_in_a_seed_can_steer_the_terminal(checkout, capsys):
    edit(checkout.seeds("product"), '"instruction": "', '"instruction": "\\u001b[31m\\u202e[bold]')
    seed = read_seeds(checkout.seeds("product"), read_template(checkout.template("product")))[0]
    told = shown(checkout, capsys, seed=seed.id)
    assert "[bold]" in told and "\x1b" not in told and "\u202e" not in told


# -- the teacher --------------------------------------------------------------------------------


def test_live_with_the_embedded_teacher_says_what_to_do(checkout, capsys):
    with pytest.raises(UserError, match=r"params\.yaml: teacher: is the embedded one(.|\n)*then name a server"):
        shown(checkout, capsys, live=True)


@contextmanager
def served(home, monkeypatch, *options):
    teacher = "{kind: openai, model: mock, revision: null, variants: 4, sampling: {}}"
    params = re.sub(r"^teacher:\n(?:  .*\n?)+", "", home.params.read_text(), flags=re.M)
    home.params.write_text(f"{params}\nteacher: {teacher}\n")
    command = [sys.executable, str(ROOT / "tests" / "teacher_server.py"), *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    monkeypatch.setenv("DMOE_TEACHER_URL", f"http://127.0.0.1:{int(process.stdout.readline())}/v1")
    try:
        yield
    finally:
        process.kill()
        process.communicate()


def test_live_asks_the_teacher_for_the_seeds_shown_and_keeps_what_it_says(checkout, monkeypatch, capsys):
    pytest.importorskip("openai")
    with served(checkout, monkeypatch):
        told = shown(checkout, capsys, live=True, seed="product-0017")
    assert "some rows, by mock" in told and "product-0017/1" in told and checkout.replies.exists()
    assert told == shown(checkout, capsys, live=True, seed="product-0017"), "the second time no server is there"


def test_live_without_a_server_is_one_error(checkout, monkeypatch, capsys):
    with served(checkout, monkeypatch):
        pass
    monkeypatch.delenv("DMOE_TEACHER_URL")
    with pytest.raises(UserError, match="DMOE_TEACHER_URL is not set"):
        shown(checkout, capsys, live=True)


# -- at every save ------------------------------------------------------------------------------


class Watched:
    """A `dmoe preview --watch` in a process of its own, and what it prints."""

    def __init__(self, home, *words):
        command = [sys.executable, "-u", "-m", "factory.cli", "preview", "product", "--watch", "--rows", "2", *words]
        self.process = subprocess.Popen(
            command, cwd=home.root, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        self.lines = queue.Queue()
        threading.Thread(target=lambda: [self.lines.put(line) for line in self.process.stdout], daemon=True).start()

    def until(self, wanted):
        """All that is printed up to the line that holds `wanted`."""
        told = ""
        while wanted not in told:
            told += self.lines.get(timeout=60)
        return told


@pytest.fixture
def watched(checkout):
    running = Watched(checkout)
    yield running
    if running.process.poll() is None:
        running.process.kill()
    running.process.wait()
    running.process.stdout.close()


def test_it_shows_again_at_every_save_tells_what_changed_and_ends_at_ctrl_c(checkout, watched):
    template = checkout.template("product")
    good = template.read_text(encoding="utf-8")
    assert "kept" in watched.until("Ctrl-C ends it")

    edit(template, "per_seed:", "per_sed:")  # broken: what is wrong stands in place of the rows
    told = watched.until("Ctrl-C ends it")
    assert "per_sed" in told and "kept" not in told

    fewer = template.with_suffix(".new")  # mended, by an editor that saves by a rename
    fewer.write_text(re.sub(r"per_seed: \d+", "per_seed: 2", good), encoding="utf-8")
    os.replace(fewer, template)
    assert "Of 1,360 candidates" in watched.until("Ctrl-C ends it")

    edit(template, "dedup: {instruction: 90}", "dedup: {instruction: 60}")
    told = watched.until("Ctrl-C ends it")
    assert re.search(r"Since the last save: 0 rows more, 0 gone, 0 answered in other words, \d+ judged otherwise", told)
    assert re.search(r"kept -> dropped \(\w+_", told)

    template.unlink()  # gone, as between the two renames of some editors
    assert "there is no such file" in watched.until("Ctrl-C ends it")
    template.write_text(good, encoding="utf-8")
    assert "kept" in watched.until("Ctrl-C ends it")

    watched.process.send_signal(signal.SIGINT)
    assert watched.process.wait(20) == 0


def test_watch_and_live_together_are_refused(checkout):
    done = subprocess.run(
        [sys.executable, "-m", "factory.cli", "preview", "product", "--watch", "--live"], cwd=checkout.root,
        env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1 and done.stderr.startswith("error: --watch runs at every save")
