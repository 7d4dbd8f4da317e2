"""From seeds to a dataset, for the three experts as they are: every row judged once, nothing leaks."""

import shutil
from collections import Counter
from types import SimpleNamespace

import pyarrow.parquet as pq
import pytest
from rapidfuzz import fuzz, process
from rapidfuzz.utils import default_process

from factory.build import build, diversity, judge
from factory.dedup import copies, fall
from factory.errors import UserError
from factory.generate import generate
from factory.paths import Home, read_params, read_profile
from factory.schema import CANDIDATES, ROWS, VERDICTS, read_rows, write_rows
from factory.seeds import held_out, read_seeds
from factory.store import read_json
from factory.teacher.phrases import PhrasesTeacher
from factory.template import REASONS, read_template
from factory.thresholds import changed, known, table
from factory.tokens import counter

EXPERTS = ("product", "medical", "legal")
FILES = ("candidates.parquet", "pairs.parquet", "verdicts.parquet", "train.parquet", "holdout.parquet", "stats.json")


def _copy(home, folder):
    """A copy of what people edit in `folder`; a module's worth, unlike the fixture `checkout`."""
    for name in ("params.yaml", "profiles", "templates", "seeds"):
        copy = shutil.copytree if (home.root / name).is_dir() else shutil.copy
        copy(home.root / name, folder / name)
    (folder / "models" / "pocket").mkdir(parents=True)
    shutil.copy(home.root / "models" / "pocket" / "tokenizer.json", folder / "models" / "pocket")
    profile = folder / "profiles" / "pocket.yaml"
    lines = profile.read_text().splitlines(keepends=True)
    profile.write_text("".join("  revision: null\n" if "revision:" in line else line for line in lines))
    return Home(folder)


@pytest.fixture(scope="module", params=EXPERTS)
def made(request, home, tmp_path_factory):
    """One expert, generated and built in two folders of their own, with everything read back from the first."""
    homes = [_copy(home, tmp_path_factory.mktemp(f"{request.param}-{n}")) for n in (1, 2)]
    for h in homes:
        generate(h, request.param, read_params(h), read_profile(h, "pocket"))
        build(h, request.param, read_profile(h, "pocket"))
    first = homes[0]
    template = read_template(first.template(request.param))
    tables = {"candidates": CANDIDATES, "verdicts": VERDICTS, "train": ROWS, "holdout": ROWS}
    rows = {
        name: read_rows(first.dataset(request.param, f"{name}.parquet"), table, "") for name, table in tables.items()
    }
    return SimpleNamespace(
        expert=request.param, homes=homes, template=template, seeds=read_seeds(first.seeds(request.param), template),
        stats=read_json(first.dataset(request.param, "stats.json")), **rows,
    )  # fmt: skip


def test_every_candidate_has_exactly_one_verdict_in_its_order(made):
    assert [v["row_id"] for v in made.verdicts] == [c["row_id"] for c in made.candidates]


def test_a_row_is_kept_exactly_when_it_has_no_reason(made):
    for verdict in made.verdicts:
        assert (verdict["verdict"] == "keep") == (not verdict["reasons"]) == (not verdict["detail"])
        assert set(verdict["reasons"]) <= set(REASONS)


def test_kept_and_dropped_are_what_was_asked_for(made):
    asked = len(made.seeds) * made.template.declaration.generate.per_seed * PhrasesTeacher.spare
    dropped = sum(v["verdict"] == "drop" for v in made.verdicts)
    assert len(made.candidates) == asked
    assert len(made.train) + len(made.holdout) + dropped == asked


def test_the_rows_written_are_the_rows_kept(made):
    kept = [v["row_id"] for v in made.verdicts if v["verdict"] == "keep"]
    split = {c["row_id"]: c["split"] for c in made.candidates}
    assert [r["row_id"] for r in made.train] == [r for r in kept if split[r] == "train"]
    assert [r["row_id"] for r in made.holdout] == [r for r in kept if split[r] == "holdout"]


def test_row_ids_are_unique(made):
    ids = [c["row_id"] for c in made.candidates]
    assert len(set(ids)) == len(ids)


def test_there_are_hundreds_of_rows_and_enough_held_out_questions(made):
    assert len(made.train) + len(made.holdout) >= 600
    assert len(made.holdout) >= 200
    assert len({r["seed_id"] for r in made.holdout}) >= 40


def test_every_answer_is_trained_on_and_held_out(made):
    for rows in (made.train, made.holdout):
        assert {r["answer"] for r in rows} == set(made.template.answers)


def test_no_held_out_seed_is_trained_on(made):
    outside = held_out(made.seeds)
    assert not {r["seed_id"] for r in made.train} & outside
    assert {r["seed_id"] for r in made.holdout} <= outside


def test_no_training_question_is_like_a_held_out_one_of_its_answer(made):
    threshold = made.template.declaration.dedup.instruction
    for answer in made.template.answers:
        train, held = ([r["instruction"] for r in rows if r["answer"] == answer] for rows in (made.train, made.holdout))
        found = process.cdist(train, held, scorer=fuzz.token_sort_ratio, processor=default_process)
        assert found.max() < threshold


def test_no_question_is_both_trained_on_and_held_out_under_any_answer(made):
    train, held = ({" ".join(default_process(r["instruction"]).split()) for r in x} for x in (made.train, made.holdout))
    assert not train & held


def test_every_reply_has_20_to_50_tokens_and_its_length_is_told(made):
    count = counter(made.homes[0], read_profile(made.homes[0], "pocket"))
    lengths = {r["row_id"]: count(r["output"]) for r in made.train + made.holdout}
    assert all(20 <= n <= 50 for n in lengths.values())
    assert {v["row_id"]: v["tokens"] for v in made.verdicts if v["verdict"] == "keep"} == lengths


def test_every_reply_is_right_and_in_form_by_the_measure_of_scoring(made):
    for row in made.train + made.holdout:
        measured = made.template.measure(row["output"], row["answer"])
        assert measured.right and measured.in_form and measured.mention and measured.named


def test_every_form_is_used(made):
    kept = {r["row_id"] for r in made.train}
    assert {c["form"] for c in made.candidates if c["row_id"] in kept} == set(range(len(made.template.output.forms)))


def test_prompt_and_completion_say_what_the_row_says(made):
    for row in made.train + made.holdout:
        assert row["prompt"] == [{"role": "user", "content": row["instruction"]}]
        assert row["completion"] == [{"role": "assistant", "content": row["output"]}]


def test_no_seed_gets_more_rows_than_the_template_wants(made):
    rows = [r["seed_id"] for r in made.train + made.holdout]
    assert max(map(rows.count, set(rows))) <= made.template.declaration.generate.per_seed


def test_a_row_that_fell_to_another_names_one_that_stays_or_is_surplus(made):
    reasons = {v["row_id"]: v["reasons"] for v in made.verdicts}
    copies = {"exact_copy", "near_copy", "like_held_out"}
    for v in made.verdicts:
        assert bool(copies & set(v["reasons"])) == bool(v["like"]) == (v["score"] > 0)
        if v["like"]:
            assert reasons[v["like"]] in ([], ["surplus"]) and v["score"] >= made.template.declaration.dedup.instruction


def test_pairs_of_a_build_answer_other_thresholds_without_comparing_again(made):
    found = known(made.homes[0], made.expert)
    assert found.threshold == 90 and found.floor == 80
    for threshold in (80, 85, 90, 97, 100):
        assert fall(found.items, found.pairs, threshold) == copies(found.items, threshold)
    fallen = {v["row_id"] for v in made.verdicts if v["like"]}
    assert set(fall(found.items, found.pairs, 90)) == fallen
    row = next(row for row in table(found) if row[0] == "90 (template)")
    assert row[2] == len(fallen) and row[1] + row[2] == len(found.items)


def test_another_threshold_tells_which_rows_fall_and_come_back_and_like_which(made):
    found = known(made.homes[0], made.expert)
    for threshold in (85, 95):
        columns, rows = changed(found, threshold)
        now, then = (set(fall(found.items, found.pairs, at)) for at in (90, threshold))
        by = [dict(zip(columns, row, strict=True)) for row in rows]
        assert {r["row"] for r in by if r["change"] == "falls"} == then - now
        assert {r["row"] for r in by if r["change"] == "comes back"} == now - then
        assert rows and all(r["score"] >= min(90, threshold) and r["like"] != r["row"] for r in by)
    assert changed(found, 90)[1] == []
    with pytest.raises(UserError, match="pairs are known from 80 to 100"):
        changed(found, 79)


def test_a_threshold_edited_since_the_build_is_told(made, tmp_path):
    home = Home(shutil.copytree(made.homes[1].root, tmp_path / "edited"))
    text = home.template(made.expert).read_text()
    assert "instruction: 90" in text
    home.template(made.expert).write_text(text.replace("instruction: 90", "instruction: 70"))
    with pytest.raises(UserError, match="dedup.instruction: 70 is new since the build\n  run: dmoe build"):
        known(home, made.expert)


@pytest.mark.parametrize("name", FILES)
def test_equal_inputs_give_equal_bytes(made, name):
    first, second = (home.dataset(made.expert, name).read_bytes() for home in made.homes)
    assert first == second


def test_a_file_tells_no_time_and_no_place(made):
    raw = made.homes[0].dataset(made.expert, "train.parquet").read_bytes()
    assert str(made.homes[0].root).encode() not in raw
    assert pq.read_schema(made.homes[0].dataset(made.expert, "train.parquet")).names == list(ROWS.columns)


def test_the_statistics_add_up(made):
    stats = made.stats
    assert stats["candidates"] == len(made.candidates)
    assert stats["rows"] == {"train": len(made.train), "holdout": len(made.holdout)}
    assert stats["kept"] == sum(stats["rows"].values()) == sum(stats["answers"].values())
    told = [reason for v in made.verdicts for reason in v["reasons"]]
    assert stats["reasons"] == {reason: told.count(reason) for reason in REASONS if reason in told}
    assert stats["kept"] + stats["dropped"] + stats["failed"] == stats["candidates"]
    assert stats["dropped"] <= sum(stats["reasons"].values()) and stats["failed"] == 0
    seeds = {"train": made.train, "holdout": made.holdout}
    assert stats["seeds"] == {split: len({r["seed_id"] for r in rows}) for split, rows in seeds.items()}
    wanted = made.template.declaration.generate.per_seed
    kept = Counter(r["seed_id"] for r in (*made.train, *made.holdout))
    assert stats["seeds_short"] == {s.id: kept[s.id] for s in made.seeds if kept[s.id] < wanted}
    assert 0 < stats["diversity"]["distinct_2"] < stats["diversity"]["distinct_3"] < 1
    assert 0.3 < stats["diversity"]["nearest"] < 0.9
    quantiles = list(stats["tokens"].values())
    assert list(stats["tokens"]) == ["min", "p05", "median", "p95", "max"] and quantiles == sorted(quantiles)


def test_an_answer_s_rows_are_the_same_whatever_the_order_of_the_seeds(made, tmp_path, home):
    turned = _copy(home, tmp_path)
    path = turned.seeds(made.expert)
    path.write_text("".join(reversed(path.read_text().splitlines(keepends=True))))
    generate(turned, made.expert, read_params(turned), read_profile(turned, "pocket"))
    first, second = (h.dataset(made.expert, "candidates.parquet").read_bytes() for h in (made.homes[0], turned))
    assert first == second


# -- judging ------------------------------------------------------------------------------------


def _judged(made, change):
    """The verdicts after `change(candidates)` of a copy, by row id."""
    candidates = [dict(c) for c in made.candidates]
    change(candidates)
    found = judge(candidates, made.template, lambda text: 30)
    assert [v["row_id"] for v in found] == [c["row_id"] for c in candidates]
    return {v["row_id"]: v for v in found}


def test_a_bad_candidate_has_all_its_reasons_and_others_are_not_compared_with_it(made):
    first = made.candidates[0]["row_id"]

    def spoil(candidates):
        candidates[0] |= {"output": "it depends", "instruction": "mail me: a@b.example.org"}

    found = _judged(made, spoil)
    assert {"form", "answer_missing", "personal_data"} <= set(found[first]["reasons"])
    assert found[first]["like"] == "" and not any(v["like"] == first for v in found.values())


def test_a_failed_candidate_is_told_as_such_and_keeps_nobody_out(made):
    bad = [made.candidates[0]["row_id"], made.candidates[1]["row_id"]]

    def spoil(candidates):
        nothing = {"output": "", "slots": [], "failure": "schema", "failure_detail": "not JSON"}
        candidates[0] |= nothing  # even the seed's own words
        candidates[1] |= nothing | {"instruction": ""}

    found = _judged(made, spoil)
    for row_id in bad:
        assert (found[row_id]["verdict"], found[row_id]["reasons"]) == ("fail", ["schema"])
        assert found[row_id]["detail"] == "not JSON"
    kept = {v["row_id"] for v in made.verdicts if v["verdict"] == "keep"}
    assert kept - set(bad) <= {row_id for row_id, v in found.items() if v["verdict"] == "keep"}


def test_diversity_is_worst_where_all_say_the_same_and_best_where_nobody_does():
    same = [("a", "which laptop is best")] * 3
    assert diversity(same) == {"distinct_2": 0.333, "distinct_3": 0.333, "nearest": 1.0}
    apart = diversity([("a", "one two three"), ("a", "vier gelb uhu")])
    assert (apart["distinct_2"], apart["distinct_3"]) == (1.0, 1.0) and apart["nearest"] < 0.5
    assert diversity([("a", "one two three"), ("b", "one two three")])["nearest"] == 0.0  # of other answers
    assert diversity([]) == {"distinct_2": 0.0, "distinct_3": 0.0, "nearest": 0.0}


def test_a_seed_fills_up_with_spare_candidates_when_some_fall(made):
    kept = [r for r in made.train if r["seed_id"] == made.train[0]["seed_id"]]

    def spoil(candidates):
        for c in candidates:
            if c["row_id"] == kept[-1]["row_id"]:
                c["output"] = "no"

    found = _judged(made, spoil)
    ids = {c["row_id"] for c in made.candidates if c["seed_id"] == kept[0]["seed_id"]}
    assert found[kept[-1]["row_id"]]["verdict"] == "drop"
    assert len(kept) - 1 <= sum(found[i]["verdict"] == "keep" for i in ids) <= len(kept)


# -- what goes wrong ----------------------------------------------------------------------------


def test_build_before_generate_names_the_command(checkout):
    with pytest.raises(UserError, match=r"candidates\.parquet: there is no such file\n  then run: dmoe generate legal"):
        build(checkout, "legal", read_profile(checkout, "pocket"))


def test_a_dataset_without_a_row_is_an_error_and_nothing_is_written(checkout):
    path, profile = checkout.dataset("product", "candidates.parquet"), read_profile(checkout, "pocket")
    generate(checkout, "product", read_params(checkout), profile)
    write_rows(path, CANDIDATES, [c | {"output": "no"} for c in read_rows(path, CANDIDATES, "")])
    with pytest.raises(UserError, match="datasets/product: no row was kept\n  then see why: dmoe query"):
        build(checkout, "product", read_profile(checkout, "pocket"))
    assert [p.name for p in checkout.dataset("product", "x").parent.iterdir()] == ["candidates.parquet"]
