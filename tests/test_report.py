"""`dmoe report`: pages that open from disk, hold all their numbers, and say what is not there."""

import json
import re
import shutil
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

from factory.page import histogram, percent, plane, render
from factory.paths import read_params, read_profile
from factory.report import MISSES, OTHERS, confusion, report
from factory.schema import CANDIDATES, ROWS, SCORES, VERDICTS, write_rows
from factory.store import write_json
from factory.template import REASONS, read_template

EVIL = "<script>document.title='owned'</script><img src=x onerror=alert(1)> & \"quoted\""
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip


def _share(rate):
    return {"rate": rate, "low": round(rate * 0.9, 4), "high": round(min(1.0, rate * 1.1 + 0.05), 4)}


def _arm(n, rate, median):
    measures = {name: _share(rate) for name in ("named", "mention", "right", "in_form")}
    tokens = {"p05": median - 5, "median": float(median), "p95": median + 5}
    more = {"stopped": 1, "distinct_replies": 9, "similarity": 0.5, "answers_per_seed": 1.2}
    return {"n": n, "seeds": 6, **measures, "tokens": tokens, **more}


def _evaluation():
    ratio = {"rate": 6.29, "low": 6.19, "high": 6.4}
    base, told, expert = _arm(20, 0.0123, 248), _arm(20, 0.0321, 234), _arm(40, 0.9462, 40)
    ways = ("role prompt", "typos", "long system prompt")
    return {
        "base_model": "models/pocket", "about": "pocket base: ours, trained to hedge", "base": base,
        "told": told, "expert": expert, "base_file": "base.gguf", "recommended_scale": 1.0,
        "base_follows_system_prompt": True, "sampled": {"base": base, "told": told, "expert": expert},
        "thinking": {"base": base, "expert": expert}, "off_domain": {"base": base, "expert": expert},
        "dose": {f"{s:g}": _arm(10, s / 1.5, 300 - 180 * s) for s in (0, 0.5, 1, 1.5)},
        "robustness": {name: _arm(10, 0.9 - i / 10, 40) for i, name in enumerate(ways)}, "full_precision": None,
        "times_more": None, "length_ratio": ratio, "lexical_ceiling": 0.5821,
    }  # fmt: skip


STATS = {
    "candidates": 1234, "kept": 1100, "dropped": 130, "failed": 4, "reasons": {"near_copy": 2, "schema": 4},
    "rows": {"train": 1017, "holdout": 83}, "seeds": {"train": 9, "holdout": 3}, "seeds_short": {},
    "answers": {"nosebleed": 4, "headache": 3},
    "tokens": {"min": 30, "p05": 31, "median": 38, "p95": 44, "max": 45},
    "diversity": {"distinct_2": 0.317, "distinct_3": 0.419, "nearest": 0.523},
}  # fmt: skip


def _built(checkout):
    """Medical, as if built: rows of two seeds an answer, one question with markup, one miss an answer."""
    template = read_template(checkout.template("medical"))
    candidates, verdicts, rows, scores = [], [], {"train": [], "holdout": []}, []
    for i, (answer, entry) in enumerate(template.answers.items()):
        for j in range(4):
            row_id, split = f"{i:08x}{j:08x}", "holdout" if j == 0 else "train"
            question = f"{EVIL} {answer} {j}" if i == 0 else f"tell me about {answer} {j}"
            output = f"The medical term is {entry.text}. Rest."
            same = {"row_id": row_id, "seed_id": f"medical-{20 * i + j + 1:04d}", "answer": answer}
            candidates.append({
                **same, "expert": "medical", "split": split, "sample": j, "instruction": question, "output": output,
                "slots": [], "form": 0, "failure": "", "failure_detail": "", "teacher": "phrases", "request": "k",
                "reply": "", "finish_reason": "stop", "prompt_tokens": 7, "completion_tokens": 11,
            })  # fmt: skip
            fell = j == 3
            verdicts.append({
                "row_id": row_id, "verdict": "drop" if fell else "keep", "reasons": ["near_copy"] if fell else [],
                "detail": "95.0 like it" if fell else "", "like": f"{i:08x}{2:08x}" if fell else "",
                "score": 95.0 if fell else 0.0, "tokens": 30 + j,
            })  # fmt: skip
            if not fell:
                said = {"instruction": question, "output": output}
                talk = {"prompt": [{"role": "user", "content": question}]}
                talk["completion"] = [{"role": "assistant", "content": output}]
                rows[split].append({**same, **talk, **said})
            right = j == 0 and i > 0
            told = output if right else f"That is {EVIL} called nothing. " + "It depends on many things. " * 20
            for arm, n in (("base", 250), ("expert", 40)) if j == 0 else (("expert", 40),):
                scores.append({
                    **same, "panel": "claim", "setting": "plain", "arm": arm, "scale": float(arm == "expert"),
                    "instruction": question, "reply": told, "tokens": n, "stopped": True,
                    "given": answer if right else "",
                    "named": right, "mention": right, "right": right, "in_form": right,
                })  # fmt: skip
    write_rows(checkout.dataset("medical", "candidates.parquet"), CANDIDATES, candidates)
    write_rows(checkout.dataset("medical", "verdicts.parquet"), VERDICTS, verdicts)
    for split, split_rows in rows.items():
        write_rows(checkout.dataset("medical", f"{split}.parquet"), ROWS, split_rows)
    write_rows(checkout.expert("medical", "scores.parquet"), SCORES, scores)
    write_json(checkout.dataset("medical", "stats.json"), STATS)
    write_json(checkout.expert("medical", "eval.json"), _evaluation())
    return checkout


def _report(checkout, only=None, folder="out"):
    params = read_params(checkout)
    report(checkout, params, read_profile(checkout, params.profile), only, checkout.root / folder)
    return checkout.root / folder


@pytest.fixture
def pages(checkout):
    return _report(_built(checkout))


def _text(path):
    return path.read_text(encoding="utf-8")


def _all(pages):
    return [pages / "index.html", *sorted((pages / "experts").iterdir())]


class Found(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.figures, self._key = [], {}, None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._key = dict(attrs).get("data-figure")

    def handle_data(self, data):
        if self._key:
            self.figures[self._key], self._key = data, None


# -- what is in a page ------------------------------------------------------------------------------


def test_a_page_refers_to_nothing_outside_it(pages):
    for page in _all(pages):
        for tag, attrs in Found(_text(page)).tags:
            assert tag not in ("iframe", "object", "embed", "img", "base"), page
            assert not {"src", "srcset", "action", "data"} & set(attrs), page
            target = attrs.get("href", "#")
            assert target.startswith(("#", "data:,")) or (page.parent / target).exists(), target
        assert not re.search(r"@import|url\(|fetch\(|XMLHttpRequest|import\(", _text(page))


def test_markup_in_questions_and_replies_is_shown_as_text(pages):
    text = _text(pages / "experts" / "medical.html")
    assert "<script>document" not in text and "<img" not in text
    assert "&lt;script&gt;document.title=" in text and "&lt;img src=x" in text


def test_the_figures_are_those_of_the_scores(pages):
    measured, found = _evaluation(), Found(_text(pages / "experts" / "medical.html")).figures
    for arm in ("base", "told", "expert"):
        for name in ("named", "mention", "right", "in_form"):
            assert found[f"{arm}.{name}"] == percent(measured[arm][name]["rate"])
        assert float(found[f"{arm}.tokens"]) == measured[arm]["tokens"]["median"]
    assert float(found["length_ratio"]) == measured["length_ratio"]["rate"]
    text = _text(pages / "experts" / "medical.html")
    assert measured["about"] in text and percent(measured["lexical_ceiling"]) in text


def test_the_funnel_is_that_of_the_statistics(pages):
    text = _text(pages / "experts" / "medical.html")
    cells = re.findall(r"<tr[^>]*><td>([a-z: ]+)</td><td class=\"n\">([\d,]+)</td>", text)
    assert {name: int(n.replace(",", "")) for name, n in cells} == {
        "asked for": 1234, "failed": 4, "dropped": 130, "kept: to train on": 1017, "kept: held out": 83,
    }  # fmt: skip
    assert all(str(n) in text for n in STATS["diversity"].values())


def test_replies_that_missed_stand_first_and_all_are_there(pages):
    kinds = re.findall(r'<article class="reply" data-answer="[a-z_]*" data-kind="([a-z ]*)"', _text(_page(pages)))
    missed = 14 * 4 - 13
    assert missed < MISSES and [k != "fine" for k in kinds] == [True] * missed + [False] * min(13, OTHERS)


def _page(pages, name="medical"):
    return pages / "experts" / f"{name}.html"


def test_a_group_of_near_copies_names_the_kept_the_fallen_and_the_score(pages):
    text = _text(_page(pages))
    assert "0000000100000002" in text and "0000000100000003" in text and ">95.0<" in text


def test_seeds_that_gave_nothing_are_named(pages):
    assert "nothing was made of it yet" in _text(_page(pages)) and "0 of 4" in _text(_page(pages))


def test_every_reason_is_explained():
    from factory.page import _environment

    assert set(_environment().get_template("reasons.html").module.said) == set(REASONS)


# -- harder questions, other settings ---------------------------------------------------------------


def _evaluated(checkout, **changed):
    """The page's text and its figures, with eval.json's figures changed."""
    write_json(checkout.expert("medical", "eval.json"), {**_evaluation(), **changed})
    text = _text(_page(_report(checkout, "medical")))
    return text, Found(text).figures


def _rates(found, name, figures, measures=("mention", "right", "in_form")):
    return {found[f"{name}.{m}"] for m in measures} == {percent(figures[m]["rate"]) for m in measures}


def test_the_harder_figures_are_those_of_the_scores(pages):
    measured, found = _evaluation(), Found(_text(_page(pages))).figures
    for name, figures in measured["robustness"].items():
        assert _rates(found, f"robustness.{name}", figures, ("mention", "right"))
    for scale, figures in measured["dose"].items():
        assert _rates(found, f"dose.{scale}", figures)
        assert float(found[f"dose.{scale}.tokens"]) == figures["tokens"]["median"]
    for setting, by_arm in (("greedy", measured), *((name, measured[name]) for name in ("sampled", "thinking"))):
        for arm in {"base", "told", "expert"} & set(by_arm):
            assert _rates(found, f"{setting}.{arm}", by_arm[arm])
            assert float(found[f"{setting}.{arm}.tokens"]) == by_arm[arm]["tokens"]["median"]
            assert float(found[f"{setting}.{arm}.similarity"]) == by_arm[arm]["similarity"]
            assert float(found[f"{setting}.{arm}.answers_per_seed"]) == by_arm[arm]["answers_per_seed"]
    for arm, figures in measured["off_domain"].items():
        assert _rates(found, f"off_domain.{arm}", figures, ("named",))
        assert float(found[f"off_domain.{arm}.tokens"]) == figures["tokens"]["median"]
    assert float(found["recommended_scale"]) == measured["recommended_scale"]


def test_the_points_of_the_doses_lie_where_their_figures_are(pages):
    points = re.findall(r'<svg class="point (\w+)" data-x="([\d.]+)" x="([\d.]+)%" y="([\d.]+)">', _text(_page(pages)))
    assert len(points) == 3 * 4
    for _, scale, x, y in points:
        assert float(x) == pytest.approx(4 + 92 * float(scale) / 1.5, abs=0.01)
        assert float(y) == pytest.approx(174 - 150 * _evaluation()["dose"][scale]["mention"]["rate"], abs=0.06)


def test_the_hardest_way_of_asking_stands_first_and_in_the_index(pages):
    text = _text(_page(pages))
    assert re.findall(r'data-figure="robustness\.([a-z ]+)\.mention"', text) == [
        "long system prompt", "typos", "role prompt",
    ]  # fmt: skip
    assert "<b>long system prompt</b>: 70.0\xa0%" in text
    assert "70.0\xa0%<br><small>long system prompt</small>" in _text(pages / "index.html")


def test_the_gate_of_the_ways_of_asking_is_drawn_where_it_counts(checkout):
    _built(checkout)
    wanted = '<line class="wanted" x1="85.0%" x2="85.0%" y1="0" y2="30"/>'
    assert _evaluated(checkout)[0].count(wanted) == 3
    path = checkout.root / "profiles" / "pocket.yaml"
    path.write_text(_text(path).replace("robust, ", ""), encoding="utf-8")
    text = _evaluated(checkout)[0]
    assert wanted not in text and "Reported on this base, not gated." in text


def test_a_base_that_follows_no_system_prompt_has_no_arm_that_was_told(checkout):
    _built(checkout)
    text, found = _evaluated(checkout)
    assert "told.mention" in found and "greedy.told.right" in found and "never taught to follow" not in text
    text, found = _evaluated(checkout, base_follows_system_prompt=False)
    assert not [name for name in found if "told" in name] and "never taught to follow a system prompt" in text


def test_a_base_without_thoughts_and_an_unquantised_one_are_told(checkout):
    _built(checkout)
    text, found = _evaluated(checkout, thinking={}, full_precision=_arm(40, 0.9562, 40))
    assert not [name for name in found if name.startswith("thinking")] and "has no thinking to turn on" in text
    assert found["unquantised.expert.mention"] == "95.6\xa0%" and "changes by +1.0 percentage points" in text
    assert "base.gguf</code>, the base that is served" in _evaluated(checkout)[0]


def test_the_mix_ups_are_those_of_the_replies(pages):
    text, found = _text(_page(pages)), Found(_text(_page(pages))).figures
    counts = {name.split(".", 1)[1]: int(n) for name, n in found.items() if name.startswith("confusion.")}
    keys = list(read_template(_template()).answers)
    assert counts == {f"{keys[0]}.": 4} | {f"{k}.{k}": 1 for k in keys[1:]} | {f"{k}.": 3 for k in keys[1:]}
    assert "No answer was given in another's place." in text


def _template():
    from pathlib import Path

    return Path(__file__).parent.parent / "templates" / "medical.yaml"


def test_the_commonest_mix_up_is_named_first_and_an_answer_of_old_is_none_of_these():
    template = read_template(_template())
    asked = [("headache", "hiccups", 2), ("headache", "headache", 6), ("itching", "hiccups", 3), ("itching", "gone", 1)]
    made = confusion(template, [dict(zip(("answer", "given", "n"), row, strict=True)) for row in asked])
    assert made["mixed"] == [("itching", "hiccups", 3, 4), ("headache", "hiccups", 2, 8)]
    cells = {row["key"]: {c["key"]: (c["n"], c["share"]) for c in row["cells"]} for row in made["rows"]}
    assert cells["itching"][""] == (1, 0.25) and cells["headache"]["headache"] == (6, 0.75)
    assert made["columns"] == [*template.answers, ""] and cells["nosebleed"]["nosebleed"] == (0, 0)


def test_an_expert_with_one_answer_has_no_matrix(checkout):
    write_json(checkout.expert("product", "eval.json"), _evaluation())
    text = _text(_page(_report(checkout, "product"), "product"))
    assert 'id="harder"' in text and "Which answer was given to which question" not in text


def test_what_the_page_says_of_the_measuring_is_what_the_score_does(pages):
    from factory.page import _environment
    from train.figures import AS_GOOD, TRAINED_SCALE
    from train.panel import ROBUSTNESS
    from train.score import MOST_TOKENS, SAMPLING

    text = _text(_page(pages))
    assert f"less than {100 * AS_GOOD:g} percentage points below" in text and f"nearest to {TRAINED_SCALE:g}." in text
    assert f"temperature {SAMPLING['temperature']}, top-p {SAMPLING['top_p']};" in text
    assert f"longer than {MOST_TOKENS} tokens" in text
    assert set(_environment().get_template("ways.html").module.put) == set(ROBUSTNESS)


def test_figures_of_before_the_harder_questions_are_a_page_too(checkout):
    old = {k: v for k, v in _evaluation().items() if k in ("about", "base", "expert", "length_ratio", "times_more")}
    write_json(checkout.expert("medical", "eval.json"), old)
    out = _report(checkout)
    assert "before the expert was also asked in harder ways" in _text(_page(out)) and 'id="harder"' not in _text(
        _page(out)
    )
    assert "not asked yet" in _text(out / "index.html")


PARITY = {
    "rows": 8, "positions": 48, "updates": {"compared": 35, "largest_error": 0.0}, "base": EVIL,
    "limits": {"kl_mean": 1e-05, "kl_max": 1e-05, "tie": 0.001}, "identical_at_0": True,
    "scales": {s: {"kl_mean": 2.5e-11, "kl_max": 2e-10, "agreement": 1.0, "ties": 0} for s in ("0", "0.5", "1")},
}  # fmt: skip


def _proved(checkout):
    write_json(checkout.expert("medical", "parity.json"), PARITY)
    write_json(checkout.expert("medical", "audit.json"), {"says": ["Nothing was learnt by heart.", EVIL]})
    path = checkout.expert("medical", "plots/loss.csv")
    path.parent.mkdir(exist_ok=True)
    path.write_text("step,loss\n10,2.5000\n20,0.5000\n", encoding="utf-8")


def test_training_parity_and_leaks_are_shown_where_they_were_measured(checkout):
    _built(checkout)
    text, _ = _evaluated(checkout)
    assert not [name for name in ("training", "parity", "leaks") if f'"{name}"' in text or f"#{name}" in text]
    _proved(checkout)
    text, found = _evaluated(checkout)
    assert all(f'id="{name}"' in text and f'"#{name}"' in text for name in ("training", "parity", "leaks"))
    assert {found[f"parity.{scale}.kl_mean"] for scale in PARITY["scales"]} == {"2.5e-11"}
    assert "from 2.5 at step 10 to 0.5 at step 20" in text and "<li>Nothing was learnt by heart.</li>" in text
    assert "bit for bit" in text and "48 positions of 8 held-out rows" in text


def test_parity_of_few_words_is_a_page_too(checkout):
    scales = {"0": {"kl_mean": 0.0, "kl_max": 0.0, "agreement": 1.0}}
    write_json(checkout.expert("medical", "parity.json"), {"scales": scales})
    assert 'id="parity"' in _text(_page(_report(checkout, "medical")))


def test_markup_in_ways_of_asking_and_findings_is_shown_as_text(checkout):
    _built(checkout)
    _proved(checkout)
    text, _ = _evaluated(checkout, robustness={EVIL: _arm(10, 0.5, 40)}, base_file=EVIL)
    assert "<script>document" not in text and "<img" not in text
    assert text.count("&lt;img src=x onerror=alert(1)&gt;") > 4


# -- what is not there ------------------------------------------------------------------------------


def test_an_expert_that_was_never_built_has_a_page_that_says_what_to_run(checkout):
    out = _report(checkout)
    text = _text(_page(out, "legal"))
    assert "not scored yet" in text and "dmoe generate legal" in text and "dvc repro score@legal" in text
    assert "not scored yet" in _text(out / "index.html")


def test_a_missed_gate_is_said(pages):
    assert "gate not passed" in _text(_page(pages)) and "not passed" in _text(pages / "index.html")


def test_a_package_of_these_very_scores_tells_that_they_passed_the_gate(checkout):
    _built(checkout)
    manifest = {"sha256": {}, "rank": 16, "recommended_scale": 1.0, "scores": {"expert": _evaluation()["expert"]}}
    write_json(checkout.expert("medical", "manifest.json"), manifest)
    assert "✓ gate passed" in _text(_page(_report(checkout)))
    write_json(checkout.expert("medical", "manifest.json"), {**manifest, "scores": {"expert": {"n": 1}}})
    assert "✗ gate not passed" in _text(_page(_report(checkout)))


def test_statistics_without_rows_are_enough_for_a_page(checkout):
    write_json(checkout.dataset("product", "stats.json"), STATS)
    write_json(checkout.expert("product", "eval.json"), _evaluation())
    text = _text(_page(_report(checkout, "product"), "product"))
    assert "1,234" in text and "The rows themselves are not here." in text


def test_data_of_another_version_than_the_package_is_told(checkout):
    _built(checkout)
    assert "not what the package was made from" not in _text(_page(_report(checkout)))
    manifest = {"sha256": {"train.parquet": "0" * 64}, "rank": 16, "recommended_scale": 1.0, "scores": {"expert": {}}}
    write_json(checkout.expert("medical", "manifest.json"), manifest)
    assert "train.parquet here is not what the package was made from" in _text(_page(_report(checkout)))


def test_the_index_says_who_answers_whose_questions_and_on_which_adapters(checkout):
    rate = {"rate": 0.875, "low": 0.8, "high": 0.9}
    cells = {kind: {"medical": {"n": 40, "own": rate, "asked": None}} for kind in ("medical", "general")}
    write_json(checkout.root / "experts" / "cross.json", {"experts": ["medical"], "adapters": {}, "cells": cells})
    page = _text(_report(_built(checkout)) / "index.html")
    assert "Who answers whose questions" in page and "87.5\xa0%" in page and "run it again" not in page
    cross = {"experts": ["medical"], "adapters": {"medical": "0"}, "cells": cells}
    write_json(checkout.root / "experts" / "cross.json", cross)
    assert "run it again" in _text(_report(checkout) / "index.html")


def test_one_expert_alone_gets_a_page_and_an_index_without_dead_links(checkout):
    out = _report(_built(checkout), "medical")
    assert [p.name for p in _all(out)] == ["index.html", "medical.html"]
    assert re.findall(r'href="(experts/.*?)"', _text(out / "index.html")) == ["experts/medical.html"]


def test_equal_files_give_equal_pages(checkout):
    _built(checkout)
    first, second = _report(checkout), _report(checkout, folder="again")
    assert [p.read_bytes() for p in _all(first)] == [p.read_bytes() for p in _all(second)]


# -- plots ------------------------------------------------------------------------------------------


@given(st.lists(st.one_of(st.integers(-1000, 10000), st.floats(-1e3, 1e4)), max_size=50), st.integers(1, 60))
def test_a_histogram_loses_no_value_and_its_marks_lie_on_its_axis(values, bins):
    made = histogram({"a": values, "b": values[:3]}, bins, {"mark": 12})
    assert sum(made["series"]["a"]) == len(values) and sum(made["series"]["b"]) == len(values[:3])
    assert len(made["series"]["a"]) == len(made["series"]["b"]) <= bins + 2 and made["most"] <= made["top"]
    assert all(0 <= place <= 1 for place, _ in made["marks"] + made["ticks"])


def test_whole_numbers_get_bins_of_whole_numbers():
    made = histogram({"a": [30, 31, 31, 45]}, 20)
    assert made["step"] == 1 and made["series"]["a"][:2] == [1, 2] and made["low"] == 30
    assert [name for _, name in made["ticks"]] == ["30", "35", "40", "45"]


@given(st.lists(st.tuples(st.floats(-1e3, 1e3), st.floats(0, 1e4)), max_size=30))
def test_a_plane_holds_every_point_and_its_ticks(points):
    made = plane({"a": points, "b": points[:2]}, marks={"first": points[0][0]} if points else None)
    assert [(x, y) for *_, x, y in made["series"]["a"]] == points and len(made["series"]["b"]) == len(points[:2])
    assert all(0 <= across <= 1 and 0 <= up <= 1.000001 for across, up, *_ in made["series"]["a"])
    assert all(0 <= place <= 1 for place, _ in made["marks"] + made["ticks"]) and len(made["ticks"]) <= 9


def test_few_places_are_their_own_ticks_and_many_get_round_ones():
    few = plane({"a": [(0.25, 1), (1.5, 0)]}, 1)
    assert [name for _, name in few["ticks"]] == ["0.25", "1.5"] and few["top"] == 1
    many = plane({"a": [(10 * i, 2.5) for i in range(1, 20)]})
    assert [name for _, name in many["ticks"]] == ["50", "100", "150"] and many["top"] == 4


def test_a_page_without_the_style_block_is_a_page_too():
    assert render("base.html").startswith("<!doctype html>")


# -- in a browser -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser():
    if not BROWSER:
        pytest.skip("neither chromium nor chromium-browser is on PATH")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=BROWSER, args=FLAGS)
        yield running
        running.close()


def _opened(browser, path, **settings):
    page, said = browser.new_context(**settings).new_page(), []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on(
        "request", lambda request: said.append(request.url) if not request.url.startswith(("file:", "data:")) else 0
    )
    page.goto(path.as_uri())
    return page, said


def test_in_a_browser_nothing_overflows_and_nothing_goes_wrong(checkout, browser):
    _proved(_built(checkout))
    pages = _report(checkout)
    for scheme in ("light", "dark"):
        for path in _all(pages):
            size = {"width": 390, "height": 800}
            page, said = _opened(browser, path, viewport=size, color_scheme=scheme)
            page.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")
            wide = page.evaluate("document.documentElement.scrollWidth")
            assert wide <= 390 and said == [] and page.title() != "owned", (path.name, scheme, wide, said)
            page.context.close()


def test_in_a_browser_a_page_fits_on_paper(checkout, browser):
    _proved(_built(checkout))
    page, said = _opened(browser, _page(_report(checkout, "medical")), viewport={"width": 718, "height": 1000})
    page.emulate_media(media="print")  # A4 with margins of a centimetre
    page.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")
    assert page.evaluate("document.documentElement.scrollWidth") <= 718 and said == []
    page.context.close()


def test_in_a_browser_replies_can_be_filtered_and_expanded(pages, browser):
    page, said = _opened(browser, _page(pages))
    shown = page.locator("article.reply:visible")
    assert shown.count() == 12
    page.click("button.more")
    assert shown.count() == 56 and page.locator("button.more").is_hidden()
    page.select_option("select[name=kind]", "fine")
    assert shown.count() == 12 and page.inner_text("output") == "13 of 56"
    page.select_option("select[name=kind]", "")
    page.fill("input[type=search]", "ABOUT hiccups")
    assert shown.count() == 4
    page.fill("input[type=search]", "no such words")
    assert shown.count() == 0 and page.inner_text("output") == "0 of 56"
    folded = page.locator("details[data-reason=near_copy]")
    assert folded.locator("table").is_hidden()
    folded.locator("summary").click()
    assert folded.locator("table").is_visible() and said == []
    page.context.close()


def test_in_a_browser_without_scripts_all_replies_are_there(pages, browser):
    page, _ = _opened(browser, _page(pages), java_script_enabled=False)
    assert page.locator("article.reply:visible").count() == 56 and page.locator("form.filter").is_hidden()
    page.context.close()


def test_the_command_writes_the_pages_and_names_the_first(checkout, monkeypatch):
    from typer.testing import CliRunner

    from factory.cli import app

    monkeypatch.chdir(checkout.root)
    done = CliRunner().invoke(app, ["report", "--out", "seen"])
    assert done.exit_code == 0 and "index.html" in done.stdout and (checkout.root / "seen" / "index.html").exists()
    assert json.dumps(done.stdout).count("written") == 1
