"""The review page: what it refuses, what it writes, and a reviewer's hour in a real browser."""

import csv
import io
import json
import shutil
import socket
import subprocess
import threading
import time

import pytest
from starlette.testclient import TestClient

from factory.errors import UserError
from factory.lint import lint
from factory.paths import read_params, read_profile
from factory.review import LARGEST_BODY, Desk, app, review
from factory.store import read_yaml
from factory.tokens import counter

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
QUIET = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]  # fmt: skip


@pytest.fixture
def desk(checkout):
    """A checkout of one small expert: quick to judge whole."""
    seeds = checkout.seeds("product")
    seeds.write_text("".join(line + "\n" for line in seeds.read_text().split("\n")[:16]))
    params = read_params(checkout)
    return Desk(checkout, params, counter(checkout, read_profile(checkout, params.profile)), "secret")


def disk(desk):
    return {name: path.read_text() for name, path in desk.paths("product").items()}


def client(desk, **headers):
    return TestClient(app(desk), base_url="http://127.0.0.1:8090", headers={"x-dmoe-token": "secret", **headers})


def post(desk, name, body=None, **headers):
    return client(desk, **headers).post(f"/api/{name}/product", json=body or {})


def row_of(desk, texts, **wanted):
    rows = post(desk, "rows", texts | {"all": True}).json()["rows"]
    return next(row for row in rows if all(row[key] == value for key, value in wanted.items()))


# -- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"x-dmoe-token": ""}, 403),
        ({"x-dmoe-token": "wrong"}, 403),
        ({"origin": "http://evil.example"}, 403),
        ({"origin": "http://127.0.0.1:9999"}, 403),
        ({"origin": "null"}, 403),
        ({"host": "evil.example"}, 400),
        ({"host": "127.0.0.1.evil.example:8090"}, 400),
        ({"origin": "http://127.0.0.1:8090"}, 200),
    ],
)
def test_only_the_page_itself_with_this_runs_token_is_answered(desk, headers, status):
    assert post(desk, "files", **headers).status_code == status
    assert client(desk, **headers).post("/api/experts").status_code == status


def test_only_experts_of_params_yaml_are_opened(desk):
    for expert in ("general", "..%2F..%2Fetc%2Fpasswd", "nobody"):
        assert client(desk).post(f"/api/files/{expert}").status_code == 404
    assert client(desk).get("/static/..%2f..%2freview.py").status_code == 404


def test_a_body_that_is_too_large_or_no_texts_is_refused(desk):
    big = client(desk).post("/api/check/product", content=b"x" * (LARGEST_BODY + 1))
    assert big.status_code == 413
    for body in ({}, {"template": 1, "seeds": ""}, {"template": "\ud800", "seeds": ""}, []):
        answer = client(desk).post("/api/check/product", content=json.dumps(body))
        assert answer.status_code == 400 and answer.json()["error"]


def test_the_page_runs_no_script_but_its_own(desk):
    answer = client(desk).get("/")
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "script-src 'self';" in policy and "unsafe" not in policy
    assert "secret" not in answer.text


def test_a_port_that_is_taken_is_said(desk):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"port {port} .*--port"):
            profile = read_profile(desk.home, desk.params.profile)
            review(desk.home, desk.params, profile, print, port, "product")


# -- what is written ----------------------------------------------------------------------------


def test_saving_writes_only_what_was_changed_and_nothing_over_a_change_underneath(desk):
    loaded, texts = post(desk, "files").json(), disk(desk)
    base = {name: file["sha"] for name, file in loaded.items()}
    assert texts == {name: file["text"] for name, file in loaded.items()}
    before = desk.home.template("product").stat().st_mtime_ns
    edited = texts | {"seeds": texts["seeds"] + "\n"}
    saved = post(desk, "save", edited | {"base": base}).json()
    assert saved["moved"] == [] and disk(desk) == edited
    assert desk.home.template("product").stat().st_mtime_ns == before

    desk.home.template("product").write_text(texts["template"] + "# another\n")
    refused = post(desk, "save", texts | {"base": {n: f["sha"] for n, f in saved["disk"].items()}}).json()
    assert refused["moved"] == ["template"] and refused["disk"]["template"]["text"].endswith("# another\n")
    assert disk(desk) == {"template": texts["template"] + "# another\n", "seeds": edited["seeds"]}


def test_a_problem_has_its_place_and_held_out_marks_stay_while_something_is_wrong(desk):
    texts = disk(desk)
    sound = post(desk, "check", texts).json()
    assert sound["problems"] == [] and len(sound["held"]) == 4
    lines = texts["seeds"].split("\n")
    lines[2] = lines[2].replace('"licence"', '"license"')
    broken = {"template": texts["template"].replace("version: 1", "versoin: 1"), "seeds": "\n".join(lines)}
    found = post(desk, "check", broken).json()
    places = {(p["file"], p["line"]) for p in found["problems"]}
    number = texts["template"].split("\n").index("version: 1") + 1
    assert {("template", number), ("seeds", 3)} <= places and found["held"] == sound["held"]


def test_never_say_removes_what_says_it_and_its_test_proves_it(desk):
    texts = disk(desk)
    row = row_of(desk, texts, sample=0, seed_id="product-0001")
    (slot,) = [s["value"] for s in row["slots"] if s["name"] == "use"]
    got = post(desk, "choices", texts | {"row_id": row["row_id"], "phrase": "free to choose"}).json()
    never = got[0]
    assert never["title"].startswith("Never say") and "Linux and Windows" in never["why"] and not never["refused"]
    for name, path in desk.paths("product").items():
        path.write_text(never["texts"][name])
    declared = read_yaml(desk.home.template("product"))
    assert "free to choose" in declared["output"]["never"]
    assert declared["tests"][-1]["expect"] == {"verdict": "drop", "reason": "hedge"}
    titles = [choice["title"] for choice in got]
    assert f"Remove “{slot}” from slot use" in titles and "Remove the seed product-0001" in titles
    for choice in got:
        assert choice["refused"] or choice["diff"]
    assert [p for choice in got[1:] for p in choice.get("problems", [])] == []
    answer = post(desk, "choices", texts | {"row_id": row["row_id"], "phrase": "ThinkPad"}).json()[0]
    assert "fixed text of answer" in answer["refused"]


def test_similar_rows_are_of_the_same_answer_nearest_first(desk):
    texts = disk(desk)
    row = row_of(desk, texts, sample=0)
    alike = post(desk, "similar", texts | {"row_id": row["row_id"]}).json()
    scores = [r["likeness"] for r in alike["rows"]]
    assert alike["threshold"] == 90 and scores == sorted(scores, reverse=True)
    gone = post(desk, "similar", texts | {"row_id": "nothing"})
    assert gone.status_code == 400 and "not made any more" in gone.json()["error"]


def test_the_diff_is_against_the_last_commit_and_the_disk(desk):
    texts = disk(desk)
    assert post(desk, "diff", texts).json()["new"] == ["templates/product.yaml", "seeds/product.jsonl"]
    subprocess.run(
        "git init -q && git add -A && git -c user.name=a -c user.email=a@b.c commit -qm x",
        shell=True,
        cwd=desk.home.root,
        check=True,
    )
    got = post(desk, "diff", texts | {"template": texts["template"].replace("version: 1", "version: 2")}).json()
    assert "-version: 1\n+version: 2" in got["head"] and got["head"] == got["disk"]
    assert got["commands"][0] == "git add templates/product.yaml" and got["new"] == []


# -- in a browser -------------------------------------------------------------------------------


@pytest.fixture
def served(desk):
    import uvicorn

    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app(desk), log_level="warning", ws="none", lifespan="off"))
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    yield f"http://127.0.0.1:{listener.getsockname()[1]}/#secret/product"
    server.should_exit = True
    thread.join()


@pytest.fixture
def page(served):
    if not CHROMIUM:
        pytest.skip("no chromium on PATH")
    from playwright.sync_api import sync_playwright

    said = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        page = browser.new_page(viewport={"width": 1400, "height": 900})
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.goto(served)
        yield page
        browser.close()
    assert said == []


def test_a_reviewers_hour(page, desk, tmp_path):
    from playwright.sync_api import expect

    before = disk(desk)
    expect(page.locator("#row-count")).to_contain_text("in all")
    # an error is marked at its line, told, and mended
    page.locator(".cm-line", has_text="version: 1").click()
    page.keyboard.press("End")
    page.keyboard.type("x")
    expect(page.locator(".cm-lint-marker-error")).to_have_count(1)
    expect(page.locator("#problems")).to_have_text("1 error")
    page.locator("#problems").click()
    expect(page.locator("#dialog")).to_contain_text("version: input should be a valid integer")
    page.get_by_role("button", name="template line 5").click()
    page.keyboard.press("End")
    page.keyboard.press("Backspace")
    expect(page.locator("#state")).to_have_text("saved")
    # a seed is edited, one added, and the rows follow
    page.locator("tr[data-line='1'] td[data-key=instruction]").click()
    page.keyboard.press("Control+A")
    page.keyboard.type('Which laptop, "light" and quick, do I buy for Zürich?')
    page.keyboard.press("Enter")
    expect(page.locator("#row-list")).to_contain_text("for Zürich?")
    page.locator("#seed-add").click()
    page.keyboard.type("a machine for my translations, please?")
    page.keyboard.press("Enter")
    expect(page.locator("#seed-rows")).to_contain_text("product-0017")
    page.locator("#seed-find").fill("product-0017")
    expect(page.locator("#seed-rows tr")).to_have_count(1)
    page.locator("#seed-find").fill("")
    # CSV out and, with one change, in
    with page.expect_download() as download:
        page.locator("#csv-out").click()
    rows = list(csv.reader(io.StringIO(download.value.path().read_text("utf-8-sig"), newline="")))
    assert rows[2][1].startswith('Which laptop, "light"') and len(rows) == 18
    rows[3][1] = 'Two, "lines"\nin one: é'
    changed = tmp_path / "back.csv"
    with changed.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
    page.locator("#csv-file").set_input_files(changed)
    expect(page.locator("#dialog h3")).to_have_text("back.csv: 1 changed, 0 new, 0 missing")
    page.get_by_text("Take changed and new").click()
    # a draft outlives a reload of the page
    expect(page.locator("#state")).to_have_text("unsaved changes")
    page.wait_for_timeout(400)
    page.once("dialog", lambda dialog: dialog.accept())
    page.reload()
    expect(page.locator("#notice")).to_contain_text("are here again")
    expect(page.locator("#seed-rows")).to_contain_text("translations")
    # never say this
    expect(page.locator("#row-count")).to_contain_text("in all")
    page.locator(".drop-row").first.click()
    page.locator("#dialog input").fill("free to choose")
    expect(page.locator(".choice").first).to_contain_text("Never say “free to choose” and remove what says it")
    page.locator(".choice button").first.click()
    expect(page.locator("#notice")).to_contain_text("not yet saved")
    expect(page.locator("#problems")).to_be_hidden()
    assert disk(desk) == before
    page.locator("#diff").click()
    expect(page.locator("#dialog")).to_contain_text("+    - free to choose")
    page.keyboard.press("Escape")
    page.keyboard.press("Control+s")
    expect(page.locator("#state")).to_have_text("saved")
    after = disk(desk)
    declared = read_yaml(desk.home.template("product"))
    assert "free to choose" in declared["output"]["never"]
    assert declared["tests"][-1]["name"] == "never says “free to choose”"
    lines, old = after["seeds"].split("\n"), before["seeds"].split("\n")
    assert [i for i in range(16) if lines[i] != old[i]] == [1, 2]
    seed = json.loads(lines[16])
    assert (seed["id"], seed["source"], seed["licence"]) == ("product-0017", "hand-written", "CC0-1.0")
    assert lint(desk.home, "product")["templates"] == 1


def test_a_change_underneath_is_noticed_and_nothing_is_lost(page, desk):
    from playwright.sync_api import expect

    expect(page.locator("#row-count")).to_contain_text("in all")
    path, text = desk.home.template("product"), disk(desk)["template"]
    path.write_text("# from outside\n" + text)
    expect(page.locator("#notice")).to_contain_text("was read again")
    expect(page.locator(".cm-content")).to_contain_text("# from outside")
    page.locator(".cm-line").first.click()
    page.keyboard.type("# mine")
    path.write_text("# again\n" + text)
    expect(page.locator("#notice")).to_contain_text("changed on disk while you were editing")
    page.locator("#save").click()
    time.sleep(0.3)
    assert path.read_text() == "# again\n" + text
    page.get_by_text("Show both").click()
    expect(page.locator("#dialog .minus").last).to_have_text("-# again")
    page.get_by_text("Keep mine").click()
    page.locator("#save").click()
    expect(page.locator("#state")).to_have_text("saved")
    assert "# mine" in path.read_text()
