"""deploy/: the example loads, alerts know their metrics and stand in the docs, image and unit fit the house."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from serve.gateway import app
from serve.metrics import Metrics
from serve.settings import DEFAULTS, Settings, read_settings
from serve.supervisor import Supervisor

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"
SAMPLES = {"counter": ["_total"], "gauge": [""], "histogram": ["_bucket", "_sum", "_count"]}


def text(name):
    return (DEPLOY / name).read_text(encoding="utf-8")


def test_the_example_says_the_defaults_and_what_each_key_means():
    assert read_settings(DEPLOY / "serve.yaml") == DEFAULTS
    for key in Settings.model_fields:
        assert re.search(rf"^{key}: \S.*# \w", text("serve.yaml"), re.M), key


def test_the_example_of_a_route_in_it_loads(tmp_path):
    path = tmp_path / "serve.yaml"
    path.write_text(re.sub(r"^#(  )", r"\1", text("serve.yaml").replace("routes: {}", "routes:"), flags=re.M))
    assert read_settings(path).routes["product"].keywords == ["laptop", "notebook"]


def test_every_alert_asks_for_metrics_that_are_there_and_stands_in_the_docs_with_a_command():
    known = {metric.name + end for metric in Metrics().registry.collect() for end in SAMPLES[metric.type]}
    table = (ROOT / "docs" / "operating.md").read_text(encoding="utf-8")
    rules = [rule for group in yaml.safe_load(text("alerts.yaml"))["groups"] for rule in group["rules"]]
    for rule in rules:
        assert set(re.findall(r"\bdmoe_\w+", rule["expr"])) <= known, rule["alert"]
        assert re.search(rf"^\| `{rule['alert']}` \| .+ \| .*`.+` *.*\|$", table, re.M), rule["alert"]
    assert len(rules) == len(re.findall(r"^\| `Dmoe", table, re.M))


def test_the_image_copies_what_is_there_and_asks_a_route_that_is_there():
    copied = [word for line in re.findall(r"^COPY (.+) \S+$", text("Dockerfile"), re.M) for word in line.split()]
    assert copied and all((ROOT / word).exists() for word in copied)
    assert {"factory", "train", "serve"} <= set(copied)  # the packages of pyproject.toml
    asked = re.search(r"http://127\.0\.0\.1:8080(/\w+)", text("Dockerfile")).group(1)
    supervisor = Supervisor(lambda experts: None, list, lambda experts: None)
    assert asked in {route.path for route in app(supervisor, DEFAULTS).routes}


def test_the_unit_is_one_that_systemd_reads(tmp_path):
    if not shutil.which("systemd-analyze"):
        pytest.skip("no systemd-analyze")
    unit = tmp_path / "dmoe.service"
    unit.write_text(text("dmoe.service").replace("/opt/dmoe/bin/dmoe", shutil.which("true")))
    done = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True)
    assert done.returncode == 0 and str(unit) not in done.stderr, done.stderr
