"""The dataset card: its figures are those of the data, and the Hub's own loader reads the folder by it."""

import re

import pytest

from factory.card import SIZES, dataset_card, facts
from factory.errors import UserError
from factory.package import LICENCES
from factory.publish import prepare
from factory.store import parse_yaml, read_json, sha256

EXPERTS = ["product", "medical", "legal"]


def front(card):
    """The YAML in front of a card."""
    return parse_yaml(card.split("---\n")[1], "README.md")


@pytest.mark.parametrize("expert", EXPERTS)
def test_the_facts_are_those_of_the_data(made, expert):
    stats, told = read_json(made.dataset(expert, "stats.json")), dict(facts(made, expert))
    assert told["rows"] == f"{stats['rows']['train']:,} train, {stats['rows']['holdout']:,} test"
    assert told["sha256 of test"] == sha256(made.dataset(expert, "holdout.parquet"))
    assert told["licence of the seeds"] == "CC0-1.0" and told["source of the seeds"] == "hand-written"
    assert told["questions and replies"].startswith("generated") and "no language model" in told["teacher"]
    assert all(told.values())


def test_an_expert_that_is_not_built_names_the_command(checkout):
    with pytest.raises(UserError, match=r"datasets/legal/stats\.json(.|\n)*then run: dmoe build legal"):
        dataset_card(checkout, "legal")


@pytest.mark.parametrize("expert", EXPERTS)
def test_the_front_matter_is_what_the_hub_wants(made, expert):
    found = front(dataset_card(made, expert))
    assert found["language"] == ["en"] and found["license"] in LICENCES and "synthetic" in found["tags"]
    assert found["task_categories"] == ["text-generation"] and found["size_categories"][0] in dict(SIZES).values()
    assert [dict(file) for file in found["configs"][0]["data_files"]] == [
        {"split": "train", "path": "train.parquet"}, {"split": "test", "path": "test.parquet"}
    ]  # fmt: skip


def test_the_hub_s_own_reader_takes_the_front_matter(made):
    hub = pytest.importorskip("huggingface_hub")
    data = hub.DatasetCard(dataset_card(made, "medical")).data
    assert data.license == "cc-by-4.0" and data.size_categories == ["1K<n<10K"]


def test_a_licence_that_the_hub_does_not_know_is_named_beside_other(made, checkout):
    import shutil

    shutil.copytree(made.root / "datasets", checkout.root / "datasets")
    path = checkout.template("product")
    path.write_text(path.read_text().replace("licence: CC-BY-4.0", "licence: House-1.0"))
    found = front(dataset_card(checkout, "product"))
    assert (found["license"], found["license_name"]) == ("other", "house-1.0")


def test_every_answer_is_in_the_card_with_its_rows(made):
    stats, card = read_json(made.dataset("medical", "stats.json")), dataset_card(made, "medical")
    assert dict(re.findall(r"^\| (\w+) \| [^|]+ \| (\d+) \|$", card, re.M)) == {
        answer: str(rows) for answer, rows in stats["answers"].items()
    }


def test_equal_data_give_an_equal_card(made):
    assert dataset_card(made, "legal") == dataset_card(made, "legal")


@pytest.mark.parametrize("expert", EXPERTS)
def test_datasets_loads_the_prepared_folder_with_its_splits(made, expert, tmp_path):
    datasets = pytest.importorskip("datasets")
    folder = prepare(made, expert)
    datasets.disable_progress_bars()
    loaded = datasets.load_dataset(str(folder), cache_dir=str(tmp_path))
    rows = read_json(made.dataset(expert, "stats.json"))["rows"]
    assert {split: len(data) for split, data in loaded.items()} == {"train": rows["train"], "test": rows["holdout"]}
    alone = datasets.Dataset.from_parquet(str(folder / "test.parquet"), cache_dir=str(tmp_path))
    assert alone.to_list() == loaded["test"].to_list() and alone[0]["prompt"][0]["role"] == "user"
