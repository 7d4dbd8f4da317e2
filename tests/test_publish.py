"""Publishing: nothing is sent unless for real; a folder and a Hub on loopback take it; whatever fails is told."""

import base64
import json
import os
import shutil
import subprocess
import sys
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from factory.errors import UserError
from factory.paths import Home, read_params
from factory.publish import Target, prepare, publish, target
from factory.store import sha256

ROOT = Path(__file__).parents[1]
NAMES = {"README.md", "SHA256SUMS", "seeds.jsonl", "stats.json", "template.yaml", "test.parquet", "train.parquet"}


def send(made, to, for_real=True, allow_leaks=False, expert="product"):
    return publish(made, read_params(made), expert, str(to), for_real, allow_leaks)


@pytest.mark.parametrize(
    ("to", "found"),
    [
        ("hf://datasets/me/laptops", Target(None, "me/laptops")),
        ("hf://datasets/me/laptops/", Target(None, "me/laptops")),
        ("file:///a/b%20c", Target(Path("/a/b c"), "")),
        ("out/here", Target(Path("out/here"), "")),
    ],
)
def test_a_target_is_a_folder_or_a_dataset_on_the_hub(to, found):
    assert target(to) == found


@pytest.mark.parametrize(
    "to", ["", "hf://me/x", "hf://datasets/x", "hf://models/a/b", "s3://a/b", "file://host/a", "http://x"]
)
def test_anything_else_is_no_target(to):
    with pytest.raises(UserError, match="is no target\n  give hf://datasets/OWNER/NAME, file:///FOLDER or a folder"):
        target(to)


def test_the_prepared_folder_holds_all_and_its_hashes_are_right(made):
    folder = prepare(made, "product")
    assert {path.name for path in folder.iterdir()} == NAMES
    sums = dict(reversed(line.split("  ")) for line in (folder / "SHA256SUMS").read_text().splitlines())
    assert sums == {name: sha256(folder / name) for name in NAMES - {"SHA256SUMS"}}
    before = sha256(folder)
    assert sha256(prepare(made, "product")) == before


def test_a_dry_run_says_what_would_go_where_and_sends_nothing(made, tmp_path):
    lines = send(made, tmp_path / "out", for_real=False)
    assert {line.split()[-1] for line in lines[: len(NAMES)]} == NAMES
    assert "nothing was sent" in lines[-1] and "--for-real" in lines[-1] and not list(tmp_path.iterdir())


@pytest.mark.parametrize("form", ["{}", "file://{}"])
def test_a_folder_takes_it_and_takes_it_again(made, tmp_path, form):
    out = tmp_path / "deep" / "out"
    for _ in range(2):
        assert send(made, form.format(out))[-1] == f"published: {out}"
        assert sha256(out) == sha256(prepare(made, "product"))
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_a_folder_of_something_else_is_never_overwritten(made, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="is there and is no publication of dmoe"):
        send(made, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.fixture
def leaky(made, tmp_path):
    """A copy of the made data with an e-mail address in a seed."""
    for name in ("params.yaml", "templates", "seeds", "datasets"):
        copy = shutil.copytree if (made.root / name).is_dir() else shutil.copy
        copy(made.root / name, tmp_path / name)
    home = Home(tmp_path)
    first = home.seeds("product").read_text().split("\n", 1)
    seed = json.loads(first[0]) | {"instruction": "laptop? jo@example.org"}
    home.seeds("product").write_text(json.dumps(seed) + "\n" + first[1])
    return home


def test_data_with_leaks_are_not_published_unless_that_is_said(leaky, tmp_path):
    with pytest.raises(UserError, match="product: not published, 1 leaks\n(.|\n)*holds an e-mail(.|\n)*--allow-leaks"):
        send(leaky, tmp_path / "out")
    assert not (tmp_path / "out").exists() and not (tmp_path / "build").exists()
    assert "leaks: 1;" in send(leaky, tmp_path / "out", allow_leaks=True)[-2] and (tmp_path / "out").exists()


# -- a hub on loopback --------------------------------------------------------------------------


@contextmanager
def hub(refuse=0):
    """A Hub that knows what an upload of small files asks of it; yields its address and what it was sent."""
    asked, files = [], {}

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def answer(self, value, status=200):
            data = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def do_GET(self):
            self.answer({"id": "me/laptops", "sha": "0" * 40, "siblings": [], "private": False})

        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"] or 0))
            here = f"http://{self.headers['Host']}/datasets/me/laptops"
            asked.append((self.path, self.headers.get("Authorization")))
            if refuse:
                self.answer({"error": "no"}, refuse)
            elif "/preupload/" in self.path:
                names = [file["path"] for file in json.loads(body)["files"]]
                self.answer({"files": [{"path": n, "uploadMode": "regular", "shouldIgnore": False} for n in names]})
            elif "/commit/" in self.path:
                for line in map(json.loads, body.splitlines()):
                    if line["key"] == "file":
                        files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                self.answer({"commitUrl": f"{here}/commit/1", "commitOid": "1" * 40, "success": True})
            elif self.path == "/api/validate-yaml":
                self.answer({"errors": [], "warnings": []})
            else:
                self.answer({"url": here, "id": "me/laptops"})

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked, files
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def dmoe(made, endpoint, token, tmp_path, *words):
    """`dmoe publish product` to the hub at `endpoint`, in a process of its own."""
    pytest.importorskip("huggingface_hub")
    env = {**os.environ, "PYTHONPATH": str(ROOT), "HF_ENDPOINT": endpoint, "HF_TOKEN": token, "HF_HOME": str(tmp_path)}
    env |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1"}
    env.pop("HF_HUB_OFFLINE", None)
    command = [sys.executable, "-m", "factory.cli", "publish", "product", "--to", "hf://datasets/me/laptops", *words]
    return subprocess.run(command, cwd=made.root, env=env, capture_output=True, text=True)


def test_a_hub_gets_every_file_byte_for_byte_and_the_token(made, tmp_path):
    with hub() as (endpoint, asked, files):
        done = dmoe(made, endpoint, "hf_test", tmp_path, "--for-real")
        assert done.returncode == 0 and "published: " in done.stdout, done.stderr
    assert asked[0][0] == "/api/repos/create" and {token for _, token in asked} == {"Bearer hf_test"}
    assert any("/api/datasets/me/laptops/commit/main" in path for path, _ in asked)
    folder = prepare(made, "product")
    assert files == {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_dry_run_asks_the_hub_for_nothing(made, tmp_path):
    with hub() as (endpoint, asked, files):
        done = dmoe(made, endpoint, "hf_test", tmp_path)
    assert done.returncode == 0 and asked == [] and files == {}


@pytest.mark.parametrize("status", [401, 403])
def test_a_hub_that_refuses_is_told_in_two_lines(made, tmp_path, status):
    with hub(refuse=status) as (endpoint, _, files):
        done = dmoe(made, endpoint, "hf_test", tmp_path, "--for-real")
    assert done.returncode == 1 and files == {} and "Traceback" not in done.stderr
    assert "the Hub refused: " in done.stderr and str(status) in done.stderr and "hf auth whoami" in done.stderr


def test_without_a_token_the_command_that_gets_one_is_named(made, tmp_path):
    with hub() as (endpoint, asked, _):
        done = dmoe(made, endpoint, "", tmp_path, "--for-real")
    assert done.returncode == 1 and asked == [] and "hf auth login" in done.stderr and "Traceback" not in done.stderr


def test_without_a_network_it_is_told_that_nothing_was_published(made, tmp_path):
    done = dmoe(made, "http://127.0.0.1:9", "hf_test", tmp_path, "--for-real")
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert "the Hub was not reached: " in done.stderr and "nothing was published" in done.stderr


def test_without_its_package_it_is_told_what_to_install(made, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match="hf:// needs huggingface_hub\n  then run: pip install huggingface_hub"):
        send(made, "hf://datasets/me/laptops")
