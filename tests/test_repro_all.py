"""`dmoe repro-all` ends as `dvc repro --keep-going` does: the same files, the same dvc.lock, nothing left to do."""

import shutil

import pytest
import typer
from lines import dvc, edit, made, make_line

from factory import cli
from factory.store import read_yaml

STAGES = ("generate", "build", "train", "export", "score", "gate", "audit")
pytestmark = [pytest.mark.filterwarnings("default"), pytest.mark.slow]


@pytest.fixture(scope="module")
def line(home, tiny_base, tmp_path_factory):
    """Two small experts: `red` keeps its gate, `blue` cannot. Audit comes later and reads nothing of it."""
    root = tmp_path_factory.mktemp("line") / "checkout"
    return make_line(home, tiny_base, root, {"red": 0.0, "blue": 0.9}, STAGES, seeds=24)


def test_all_at_once_is_what_dvc_makes_one_by_one(line, tmp_path, monkeypatch, capsys):
    """Files and dvc.lock, of two experts of which one misses its gate; the base is loaded once."""
    from train import audit, sft

    assert audit.load is sft.load  # it has its own base, and is not counted
    one_by_one = tmp_path / "one"
    shutil.copytree(line.root, one_by_one)
    code, told = dvc(one_by_one, "repro", "--keep-going")
    assert code != 0 and "failed to reproduce 'gate@blue'" in told

    loads, load = [], sft.load
    monkeypatch.setattr(sft, "load", lambda *words: loads.append(words) or load(*words))
    monkeypatch.chdir(line.root)
    with pytest.raises(typer.Exit):
        cli.repro_all([])
    told = capsys.readouterr().out
    assert "failed: gate@blue" in told and "blue: gate missed: mention" in told
    assert len(loads) == 1

    assert made(line.root) == made(one_by_one)
    assert read_yaml(line.root / "dvc.lock") == read_yaml(one_by_one / "dvc.lock")
    code, told = dvc(line.root, "repro", "--keep-going")
    assert "Running stage 'gate@blue'" in told and told.count("Running stage") == 1  # what failed, and nothing else


def test_an_edit_runs_again_what_it_must_and_what_was_made_before_is_put_back(line, monkeypatch, capsys):
    """After the test before: another rank for one expert, and back again from DVC's run-cache."""
    monkeypatch.chdir(line.root)
    template, before = line.template("red"), made(line.root)
    edit(template, r"rank: 16", "rank: 4")
    with pytest.raises(typer.Exit):
        cli.repro_all([])
    told = capsys.readouterr().out
    assert "train 1 of 1: red" in told and "generate" not in told and "made         4 stages" not in told
    assert made(line.root)["experts/red/adapter.gguf"] != before["experts/red/adapter.gguf"]
    edit(template, r"rank: 4", "rank: 16")
    cli.repro_all(["red"])
    told = capsys.readouterr().out
    assert "train 1 of 1" not in told and "DVC's cache had them" in told  # the adapter was there
    assert made(line.root) == before


def test_a_kill_in_the_middle_loses_only_what_was_not_done(line, monkeypatch, capsys):
    """Stopped before the second expert's training, the first one's is recorded."""
    monkeypatch.chdir(line.root)
    profile = line.profile("pocket")
    edit(profile, r"learning_rate: 0.004", "learning_rate: 0.003")
    from train import sft

    train = sft.train

    def killed(home, expert, *others):
        if expert == "blue":
            raise KeyboardInterrupt
        return train(home, expert, *others)

    monkeypatch.setattr(sft, "train", killed)
    with pytest.raises(KeyboardInterrupt):
        cli.repro_all([])
    monkeypatch.setattr(sft, "train", train)
    capsys.readouterr()
    with pytest.raises(typer.Exit):
        cli.repro_all([])
    told = capsys.readouterr().out
    assert "train 1 of 1: blue" in told


def test_a_missing_key_stops_its_own_expert_and_removes_nothing(line, monkeypatch, capsys):
    monkeypatch.chdir(line.root)
    edit(line.template("red"), r"(?m)^rivals:", "rivls:")
    before = {name for name in made(line.root) if "/red/" in name}
    with pytest.raises(typer.Exit):
        cli.repro_all([])
    told = capsys.readouterr().out
    assert "failed: generate@red: Parameters 'rivals' are missing from 'templates/red.yaml'" in told
    assert "Traceback" not in told and "train@red" in told.rpartition("held back")[2]
    assert before <= made(line.root).keys() and line.expert("blue", "adapter.gguf").exists()
    edit(line.template("red"), r"(?m)^rivls:", "rivals:")
