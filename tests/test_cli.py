"""The command line as a user meets it: help, one-line errors, nothing half-made."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.main import get_command

from factory.cli import app

ROOT = Path(__file__).parents[1]
COMMANDS = sorted(get_command(app).commands)


def dmoe(*words, cwd, **env):
    command = [sys.executable, "-m", "factory.cli", *map(str, words)]
    path = {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, env={**os.environ, **path, **env})


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command):
    from typer.testing import CliRunner

    shown = CliRunner().invoke(app, [command, "--help"])
    assert shown.exit_code == 0 and len(get_command(app).commands[command].help) > 20


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_stands_in_the_documents(command):
    texts = [p.read_text(encoding="utf-8") for p in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"))]
    assert any(f"dmoe {command}" in text for text in texts)


def test_outside_a_checkout_every_command_says_so(tmp_path):
    done = dmoe("lint", cwd=tmp_path)
    assert done.returncode == 1 and "no params.yaml" in done.stderr and "Traceback" not in done.stderr


def test_an_unknown_expert_is_one_line_that_names_the_known_ones(checkout):
    done = dmoe("build", "laptop", cwd=checkout.root)
    assert done.returncode == 1
    assert done.stderr.strip() == "error: 'laptop' is no expert of params.yaml; there are product, medical, legal"


def test_a_stage_without_its_input_names_the_command_that_makes_it(checkout):
    done = dmoe("build", "product", cwd=checkout.root)
    assert done.returncode == 1 and "then run: dmoe generate product" in done.stderr and "Traceback" not in done.stderr


def test_an_unknown_profile_and_a_missing_base_are_one_line_each(checkout):
    params = checkout.params.read_text()
    checkout.params.write_text(params.replace("profile: pocket", "profile: none"))
    assert "there is no profiles/none.yaml; known are pocket" in dmoe("lint", cwd=checkout.root).stderr
    checkout.params.write_text(params)
    profile = checkout.profile("pocket")
    profile.write_text(profile.read_text().replace("model: models/pocket", "model: models/nowhere"))
    done = dmoe("lint", cwd=checkout.root, HF_HUB_OFFLINE="1")
    assert (
        done.returncode == 1 and "no tokenizer for 'models/nowhere'" in done.stderr and "Traceback" not in done.stderr
    )


def test_another_base_in_the_same_folder_is_told(checkout):
    profile = checkout.profile("pocket")
    text = profile.read_text()
    start = text.index("revision:")
    profile.write_text(text[:start] + 'revision: "0000000000000000"' + text[text.index("\n", start) :])
    done = dmoe("lint", cwd=checkout.root)
    assert done.returncode == 1 and "base.revision" in done.stderr and "is not what models/pocket holds" in done.stderr


def test_ask_refuses_flags_that_contradict_each_other(checkout):
    assert "--base asks the base alone" in dmoe("ask", "x", "--base", "--beside", cwd=checkout.root).stderr


def test_ask_and_serve_without_experts_name_the_next_command(checkout):
    for words in (("ask", "which laptop?"), ("serve", "--port", "0")):
        done = dmoe(*words, cwd=checkout.root)
        assert done.returncode == 1 and "then run: dvc repro" in done.stderr, done.stderr
