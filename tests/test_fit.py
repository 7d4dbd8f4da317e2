"""What is learned of an expert for the router: deterministic, its own questions above the threshold, others below."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from factory.embed import find_encoder, load_encoder
from factory.errors import UserError
from factory.fit import _threshold, everyday, fit
from factory.paths import Home
from factory.routing import WORDS, read_routing, write_routing
from factory.schema import ROWS, write_rows
from serve.market import Installed
from serve.router import make_router, route

ROOT = Path(__file__).parents[1]
USES = ["travel", "my office", "college", "accounting", "the train", "photos", "music", "my mother", "coding", "a farm"]
ASKS = ["Which laptop should I buy for {}?", "best notebook for {}", "I need a light machine for {}, which one?"]


@pytest.fixture
def home(tmp_path):
    """A project with one expert of thirty rows."""
    for name in ("templates/product.yaml", "seeds/everyday.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    asked = [ask.format(use) for use in USES for ask in ASKS]
    write_rows(tmp_path / "datasets" / "product" / "train.parquet", ROWS, [
        {
            "row_id": f"{i:016x}", "seed_id": f"product-{i // 3:04}", "answer": "default", "instruction": text,
            "prompt": [{"role": "user", "content": text}], "output": "X",
            "completion": [{"role": "assistant", "content": "X"}],
        }
        for i, text in enumerate(asked)
    ])  # fmt: skip
    return Home(tmp_path)


@pytest.fixture
def table(home):
    """An encoder over the words of the everyday questions, each at random."""
    known = sorted({word for text in [*everyday(home), *ASKS, *USES] for word in text.lower().split()})
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["?", *known])}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    rows = np.random.default_rng(0).normal(size=(tokenizer.get_vocab_size(), 16)).astype(np.float16)
    home.table.parent.mkdir()
    save_file({"table": rows}, home.table, {"tokenizer": tokenizer.to_str()})
    return load_encoder(home.table)


def routed(home, encoder, text):
    file = home.expert("product", "route.safetensors")
    return route(make_router([Installed("product", "p", "b", None, 1.0, ["laptop"], [], routing=file)], encoder), text)


def test_equal_data_give_equal_bytes_and_are_read_as_written(home, table):
    first = fit(home, "product", [table])
    path = home.expert("product", "route.safetensors")
    before = path.read_bytes()
    fit(home, "product", [table])
    assert path.read_bytes() == before
    read = read_routing(path)
    assert read.joints == first.joints and read.joints["static"].digest == table.digest
    assert np.array_equal(read.views[WORDS].weights, first.views[WORDS].weights)


def test_its_own_questions_come_to_it_and_others_do_not_with_and_without_an_encoder(home, table):
    fit(home, "product", [table])
    for encoder in (None, table):
        assert routed(home, encoder, "I need a light machine for the garden, which one?").expert == "product"
        assert routed(home, encoder, "how do I boil rice").expert is None
        assert routed(home, encoder, "what rhymes with laptop").expert is None


def test_recall_asks_for_less_than_precision(home):
    precise = fit(home, "product", []).joints[WORDS]
    template = home.template("product")
    template.write_text(template.read_text().replace("prefer: precision", "prefer: recall"))
    lenient = fit(home, "product", []).joints[WORDS]
    assert lenient.threshold < precise.threshold and lenient.threshold_hit <= precise.threshold_hit


def test_the_threshold_takes_few_others_and_fewer_where_that_costs_little_of_its_own():
    others = np.arange(1000.0)  # 1 % of them is taken from 990 on
    assert _threshold(np.full(100, 2000.0), others, 0.01, 10) == pytest.approx(2000)  # apart: none need be taken
    mixed = np.concatenate([np.full(50, 900.0), np.full(50, 2000.0)])  # half of its own lie below the line already
    assert _threshold(mixed, others, 0.01, 10) == pytest.approx(989, abs=1)
    half = np.concatenate([np.full(5, 992.0), np.full(95, 2000.0)])  # 5 % of its own are worth 0.5 % of the others
    assert 992 < _threshold(half, others, 0.01, 10) <= 996
    assert _threshold(np.full(3, 2000.0), others, 0.01, 10) == pytest.approx(989, abs=1)  # too few to tell


def test_an_example_of_the_template_counts_as_its_own_question(home):
    fit(home, "product", [])
    odd = "gimme a zorbulator for the moonbase"
    before = routed(home, None, odd).scores[0].score
    template = home.template("product")
    template.write_text(template.read_text().replace("- which machine should I get for college", f"- {odd}"))
    fit(home, "product", [])
    assert routed(home, None, odd).scores[0].score > before + 1


def test_too_few_everyday_questions_are_refused(home):
    (home.root / "seeds" / "everyday.txt").write_text("# nothing\nhello\n")
    with pytest.raises(UserError, match="everyday.txt: holds 1 questions"):
        fit(home, "product", [])


def test_an_encoder_that_is_not_there_is_told_with_its_cure(home):
    assert find_encoder(home) is None and find_encoder(home, "none") is None
    with pytest.raises(UserError, match="there is no encoder\n  then run: make encoder"):
        find_encoder(home, "static")
    with pytest.raises(UserError, match="'word2vec' is no encoder; there are static, minilm and none"):
        find_encoder(home, "word2vec")
    home.table.parent.mkdir()
    home.table.write_bytes(b"not a table")
    with pytest.raises(UserError, match="is no encoder: .*\n  then run: make encoder"):
        find_encoder(home)


def test_a_matrix_that_lies_transposed_in_memory_is_written_right(home):
    found = fit(home, "product", [])
    view = found.views[WORDS]
    object.__setattr__(view, "weights", np.asfortranarray(view.weights))
    path = home.root / "again.safetensors"
    write_routing(path, found)
    assert np.array_equal(read_routing(path).views[WORDS].weights, view.weights)


def test_minilm_gives_vectors_of_length_one_whatever_stands_beside_them():
    home = Home(ROOT)
    if not home.minilm.exists():
        pytest.skip("no encoder; run: make encoder")
    encoder = find_encoder(home, "minilm")
    texts = ["", "short", "a rather long question about nothing, " * 40]
    together, alone = encoder.encode(texts), np.concatenate([encoder.encode([text]) for text in texts])
    assert np.isfinite(together).all() and np.linalg.norm(together, axis=1) == pytest.approx(1, abs=1e-5)
    assert np.abs(together - alone).max() < 1e-4
    assert together[1] @ together[2] < 0.7  # measured from the middle of all texts: unlike ones do not look alike
