"""benchmarks/how_much_data.py: what is trained on, asked and drawn; quantised.py: what such a base holds and loses."""

import importlib.util
from itertools import pairwise
from xml.etree import ElementTree

import numpy as np
import pytest

from factory.schema import ROWS, read_rows


def benchmark(home, name):
    spec = importlib.util.spec_from_file_location(name, home.root / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def how_much(home):
    return benchmark(home, "how_much_data")


@pytest.fixture(scope="module")
def medical(how_much, made):
    return how_much.study(made, "medical", on_holdout=False)


def seeds_of(rows):
    return {row["seed_id"] for row in rows}


def test_validation_seeds_are_neither_trained_on_nor_held_out(medical, made):
    asked, trained = seeds_of(medical.questions), seeds_of(medical.taken(variants=100))
    held = seeds_of(read_rows(made.dataset("medical", "holdout.parquet"), ROWS, ""))
    assert asked and not asked & trained and not held & (asked | trained)
    assert len({q["answer"] for q in medical.questions}) == len(medical.template.answers)


def test_confirming_on_the_held_out_seeds_trains_on_all_others(how_much, medical, made):
    confirmed = how_much.study(made, "medical", on_holdout=True)
    assert seeds_of(confirmed.taken()) == seeds_of(medical.taken()) | seeds_of(medical.questions)
    assert seeds_of(confirmed.questions) == seeds_of(read_rows(made.dataset("medical", "holdout.parquet"), ROWS, ""))


def test_subsets_are_nested_and_hold_the_answers_evenly(how_much, medical):
    points = list(how_much.points(medical))
    for panel in ("rows", "seeds an answer"):
        subsets = [{row["row_id"] for row in p.rows} for p in points if p.panel == panel]
        assert all(small < large for small, large in pairwise(subsets))
    for p in points:
        if p.panel == "seeds an answer":
            count = len(seeds_of(p.rows)) / len(medical.template.answers)
            assert count == p.x


def test_what_is_said_to_be_fixed_is_fixed(how_much, medical):
    points = list(how_much.points(medical))
    assert len({len(p.rows) for p in points if p.panel == "variants, rows fixed"}) == 1
    assert len({len(seeds_of(p.rows)) for p in points if p.panel == "variants, seeds fixed"}) == 1
    batch = medical.profile.train.examples_per_step
    steps = {round(p.passes * -(-len(p.rows) // batch)) for p in points if p.panel == "rows, same steps"}
    assert len(steps) == 1


def test_no_row_stands_twice_among_kept_and_surplus(medical):
    rows = [row["row_id"] for row in medical.taken(variants=100)]
    assert len(rows) == len(set(rows)) > len(medical.taken())


def test_the_figure_is_well_formed_and_holds_every_point(how_much):
    rates = {f"{m}{end}": 0.5 for m in how_much.MEASURES for end in ("", "_low", "_high")}
    lines = [
        {"expert": "tea & cake", "panel": "rows", "x": x, "words_alone": words, **rates}
        for x, words in ((25, ""), (50, 0.4))
    ]
    drawn = ElementTree.fromstring(how_much.svg(lines))
    assert len(drawn.findall("{*}circle")) == 4


def test_a_quantised_base_keeps_its_norms_and_little_of_its_size(home, tiny_gguf, tmp_path):
    from gguf import GGUFReader, dequantize

    quantised = benchmark(home, "quantised")
    quantised.quantise(tiny_gguf, "Q4_0", tmp_path / "q.gguf")
    before, after = GGUFReader(tiny_gguf), GGUFReader(tmp_path / "q.gguf")
    assert set(after.fields) == set(before.fields) | {"general.quantization_version"}
    for old, new in zip(before.tensors, after.tensors, strict=True):
        kind = "F32" if old.data.ndim == 1 else "Q8_0" if old.name == "token_embd.weight" else "Q4_0"
        assert (new.name, new.tensor_type.name) == (old.name, kind)
        error = np.abs(dequantize(new.data, new.tensor_type) - old.data.astype(np.float32)).max()
        assert error <= {"F32": 0, "Q8_0": 0.01, "Q4_0": 0.2}[kind]


def test_a_loss_is_paired_and_none_seen_is_not_none_proved(home):
    quantised = benchmark(home, "quantised")
    full = [{"row_id": f"r{i}", "seed_id": f"s{i // 4}", "right": True} for i in range(400)]
    worse = [{**row, "right": i >= 40} for i, row in enumerate(full)]
    lost, low, high = quantised.loss(full, worse, "right")
    assert lost == 10.0 and 3 < low < 10 < high
    lost, low, high = quantised.loss(full, full, "right")
    assert lost == 0.0 and -4 < low < 0 < high < 4


def test_equal_distributions_do_not_diverge(home):
    quantised = benchmark(home, "quantised")
    even, odd = {1: np.log(0.5), 2: np.log(0.5)}, {1: np.log(0.9), 2: np.log(0.1)}
    assert quantised.divergence(even, even) == 0.0
    assert quantised.divergence(even, odd) == pytest.approx(0.5 * np.log(0.5 / 0.9) + 0.5 * np.log(0.5 / 0.1))
