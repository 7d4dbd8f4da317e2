"""The three attacks of the audit: each shown finding what it must find, and nothing where nothing is."""

import math
import random
import shutil
from dataclasses import replace

import pytest

from factory.build import build
from factory.errors import UserError
from factory.generate import generate
from factory.paths import Home, read_params, read_profile
from factory.schema import ROWS, read_rows
from factory.store import read_json
from factory.template import read_template
from train import sft
from train.audit import Plan, _bits, audit, canaries, draw_codes, plant_canaries, rows_known
from train.base import load_base, load_tokenizer
from train.exposure import auc, difference, exposure, exposures
from train.figures import wilson
from train.losses import Text, encode, read, read_codes

pytestmark = pytest.mark.filterwarnings("default")  # TRL, PEFT and transformers warn of one another

EPOCHS = 20
SMALL = Plan(
    examples=32 * EPOCHS, in_questions=6, in_answers=2, seen=2 * EPOCHS, words=3, references=63, reply_references=7,
    rows=24, draws=200,
)  # fmt: skip


@pytest.fixture(scope="module")
def small(home, tiny_base, tmp_path_factory):
    """A checkout on the tiny base with the data of 28 seeds of one expert, to be learnt by heart."""
    root = tmp_path_factory.mktemp("audit")
    for name in ("params.yaml", "profiles", "templates", "seeds"):
        copy = shutil.copytree if (home.root / name).is_dir() else shutil.copy
        copy(home.root / name, root / name)
    shutil.copytree(tiny_base, root / "models" / "pocket")
    small = Home(root)
    small.seeds("product").write_text("".join(home.seeds("product").read_text().splitlines(keepends=True)[:28]))
    _rewrite(small.profile("pocket"), "revision:", "  revision: null")
    _rewrite(small.template("product"), "train:", f"train: {{rank: 16, alpha: 32, epochs: {EPOCHS}}}")
    _rewrite(small.profile("pocket"), "learning_rate:", "  learning_rate: 0.02")
    profile = read_profile(small, "pocket")
    generate(small, "product", read_params(small), profile)
    build(small, "product", profile)
    return small


def _rewrite(path, key, line):
    lines = path.read_text().splitlines()
    path.write_text("\n".join(line if old.strip().startswith(key) else old for old in lines) + "\n")


@pytest.fixture(scope="module")
def profile(small):
    return read_profile(small, "pocket")


@pytest.fixture(scope="module")
def tokenizer(small, profile):
    return load_tokenizer(small, profile)


@pytest.fixture(scope="module")
def training(small):
    return read_rows(small.dataset("product", "train.parquet"), ROWS, "")


@pytest.fixture(scope="module")
def planted(tokenizer, training):
    return plant_canaries(tokenizer, training, SMALL, EPOCHS)


@pytest.fixture(scope="module")
def trained(small, profile, planted, tmp_path_factory):
    """The expert's own recipe on rows with canaries."""
    return _fitted(small, profile, planted.rows, tmp_path_factory.mktemp("state"))


def _fitted(small, profile, rows, state):
    run = sft.Run("canaries", state)
    return sft.fit(sft.load(small, profile), read_template(small.template("product")), profile, rows, run).model.eval()


# -- formulas ---------------------------------------------------------------------------------------


def test_exposure_is_what_a_hand_computes():
    others = [2.0, 3.0, 4.0]
    assert exposure(1.0, others) == 2  # first of four
    assert exposure(2.5, others) == 1  # second
    assert exposure(3.5, others) == pytest.approx(2 - math.log2(3))
    assert exposure(5.0, others) == 0  # last
    assert exposure(2.0, others) == pytest.approx(2 - math.log2(1.5))  # beside one


def test_what_chance_gives_is_the_mean_over_all_ranks():
    found = exposures([(2.0, 0.0), (1.0, 1.0)], 3, 100)
    assert found["chance"] == round((2 + 1 + 2 - math.log2(3) + 0) / 4, 2) and found["most"] == 2
    assert found["planted"]["bits"] == 1.5 and found["never_planted"]["bits"] == 0.5
    assert exposures([(1.0, 1.0)], 1023, 9)["chance"] == pytest.approx(1 / math.log(2), abs=0.02)


def test_the_difference_of_two_rates_is_newcombes():
    """His first example: 56 of 70 and 48 of 80."""
    a, b = (dict(zip(("rate", "low", "high"), (p, *wilson(p, n)), strict=True)) for p, n in ((0.8, 70), (0.6, 80)))
    assert difference(a, b) == {"rate": 0.2, "low": 0.0524, "high": 0.3339}


def test_equal_distributions_have_an_auc_of_a_half_and_apart_ones_do_not():
    dice = random.Random(3)
    scores = [(f"s{i // 4}", dice.gauss(0, 1)) for i in range(400)]
    same = auc(scores[:200], scores[200:], 500)
    assert same["low"] < 0.5 < same["high"] and same["high"] - same["low"] < 0.2
    apart = auc([(seed, score - 1) for seed, score in scores[:200]], scores[200:], 500)
    assert apart["auc"] == pytest.approx(0.76, abs=0.06) and apart["low"] > 0.6  # of two normals one apart
    assert auc([("a", 0.0)], [("b", 1.0)], 9)["auc"] == 1 and auc([("a", 1.0)], [("b", 1.0)], 9)["auc"] == 0.5


def test_rows_of_one_seed_that_stand_together_widen_the_interval():
    dice = random.Random(3)
    levels = [dice.gauss(0, 1) for _ in range(40)]
    alike = [(str(i), level) for i, level in enumerate(levels) for _ in range(10)]
    alone = [(str(i), score) for i, (_, score) in enumerate(alike)]
    wide, narrow = auc(alike[:200], alike[200:], 500), auc(alone[:200], alone[200:], 500)
    assert wide["high"] - wide["low"] > 2 * (narrow["high"] - narrow["low"])


# -- losses -----------------------------------------------------------------------------------------


def test_a_row_falls_into_question_and_reply(tokenizer, training):
    row = training[2]
    text = encode(tokenizer, row)
    assert tokenizer.decode(text.ids[text.question]) == row["instruction"]
    assert row["instruction"].endswith(tokenizer.decode(text.ids[text.rest]))
    assert tokenizer.decode(text.ids[text.reply]) == "<think>\n\n</think>\n\n" + row["output"] + tokenizer.eos_token


def test_what_is_likeliest_everywhere_is_what_greedy_decoding_says(small, profile, tokenizer, training):
    import torch

    model = load_base(small, profile).eval()
    text = encode(tokenizer, training[0])
    start = text.reply.start
    said = model.generate(torch.tensor([text.ids[:start]]), do_sample=False, max_new_tokens=8, min_new_tokens=8)[0]
    like = replace(text, ids=said.tolist(), reply=slice(start, len(said)))
    other = replace(like, ids=[*like.ids[:-1], like.ids[-1] ^ 1])
    (loss, hits), (_, missed) = read(model, [like, other], "")
    assert hits[start:].all() and not missed[start:].all() and missed[start:-1].all()
    alone = model(input_ids=said[None], labels=torch.tensor([[-100] * start + said[start:].tolist()])).loss
    assert loss[start:].mean() == pytest.approx(alone.item(), rel=1e-4)


def test_codes_behind_a_kept_prefix_lose_what_they_lose_in_the_whole(small, profile, tokenizer, training):
    model = load_base(small, profile).eval()
    head, codes = encode(tokenizer, training[0]).ids[:9], [[300, 301, 302], [700, 800, 900]]
    whole = read(model, [Text(head + code, slice(0, 1), slice(9, 12)) for code in codes], "")
    assert read_codes(model, head, codes) == pytest.approx([loss[9:].sum() for loss, _ in whole], rel=1e-4)


# -- attacks ----------------------------------------------------------------------------------------


def test_codes_are_one_token_a_word_and_none_is_drawn_twice(tokenizer):
    codes = draw_codes(tokenizer, 500, 3)
    assert len(set(codes)) == 500 and codes == draw_codes(tokenizer, 500, 3)
    assert {len(ids) for ids in tokenizer(codes)["input_ids"]} == {3}


def test_a_planted_row_carries_its_code_where_it_is_trained(planted, tokenizer):
    question, answer = planted.canaries[0], planted.canaries[-1]
    carrying = [r for r in planted.rows if question.code in r["prompt"][-1]["content"]]
    assert len(carrying) == planted.repeats == 2 and not any(
        question.code in r["completion"][0]["content"] for r in carrying
    )
    carrying = [r for r in planted.rows if answer.code in r["completion"][0]["content"]]
    assert len(carrying) == planted.repeats == 2 and carrying[0]["output"] == carrying[0]["completion"][0]["content"]
    assert len(planted.rows) == SMALL.examples / EPOCHS and not any(c.row in planted.rows for c in planted.canaries)


def test_few_rows_get_fewer_canaries_and_too_few_are_told(tokenizer, training):
    few = plant_canaries(tokenizer, training[:20], Plan(), EPOCHS)
    assert [c.where for c in few.canaries] == ["instruction"] * 8 + ["output"] * 2
    with pytest.raises(UserError, match="7 rows to train on, 8 at least are needed"):
        plant_canaries(tokenizer, training[:7], Plan(), EPOCHS)


def test_completion_only_training_keeps_codes_of_questions_and_shows_those_of_answers(trained, tokenizer, planted):
    found = canaries(trained, tokenizer, planted, SMALL)
    question, answer = found["question"]["planted"], found["answer"]["planted"]
    assert question["low"] <= found["question"]["chance"] <= question["high"] and question["bits"] < 3
    assert answer["bits"] > 5 and found["answer"]["never_planted"]["bits"] < 3


def test_training_on_whole_rows_is_caught_by_the_codes_in_questions(
    small, profile, tokenizer, planted, tmp_path, monkeypatch
):
    encode = sft.encode
    monkeypatch.setattr(sft, "encode", lambda *w: [{**row, "labels": row["input_ids"]} for row in encode(*w)])
    monkeypatch.setattr(sft, "prove_labels", lambda *_: None)  # it would refuse
    model = _fitted(small, profile, planted.rows, tmp_path)
    found = canaries(model, tokenizer, planted, SMALL)["question"]
    assert found["planted"]["low"] > 4 and found["never_planted"]["bits"] < 3


def test_an_overtrained_adapter_is_told_by_membership_and_by_its_exact_answers(trained, tokenizer, planted, training):
    known = [row for row in planted.rows if row in training]
    seeds = {row["seed_id"] for row in planted.rows}
    unknown = [row for row in training if row["seed_id"] not in seeds]
    found = rows_known(trained, tokenizer, known, unknown, 200)
    assert found["membership"]["reply"]["low"] > 0.5
    assert found["membership"]["question"]["low"] < 0.5 < found["membership"]["question"]["high"]
    assert found["rows"]["train"]["n"] == len(known) and found["verbatim"]["rest"]["train"]["expert"]["rate"] == 0


def test_the_audit_is_written_with_its_words_and_twice_with_the_same_bytes(small, profile, trained):
    trained.save_pretrained(small.expert("product", "adapter"))
    plan = replace(SMALL, examples=20, in_questions=2, in_answers=2, seen=1, references=7)
    first = audit(small, "product", profile, plan)
    path = small.expert("product", "audit.json")
    before = path.read_bytes()
    assert read_json(path) == first and first["settings"]["references"] == 7
    assert "not a guarantee" in first["says"][-1] and not any("nan" in line for line in first["says"])
    audit(small, "product", profile, plan)
    assert path.read_bytes() == before


def test_chance_is_told_from_what_stands_above_it():
    flat, high = [(i / 4, i / 4) for i in range(12)], [(6.0, 0.0)] * 12
    assert "not told from chance (1.23)" in _bits(exposures(flat, 15, 200))
    assert "6.00 (6.00 to 6.00) bits, above chance (1.38)" in _bits(exposures(high, 63, 200))
