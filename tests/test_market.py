"""The market on the disk: install, upgrade, go back, remove, sign, trust, and what a kill leaves."""

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import package_shapes as packages
import pytest
from typer.testing import CliRunner

from factory.cli import app
from factory.errors import UserError
from factory.gguf_file import read_base
from factory.package import package, probes
from factory.paths import read_profile
from factory.store import sha256
from factory.template import read_template
from serve.install import install
from serve.market import Installed, dmoe_home, market_experts, promote, read_state, remove, rollback
from serve.package_check import opened
from serve.router import make_router
from serve.signing import Signer, sign, signer, trust
from train.base_gguf import base_gguf

ROOT = Path(__file__).parents[1]

KEY = ["openssl", "ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out"]

NO_SERVER = "no server of this DMOE_HOME runs; the next one goes by it\n"


@pytest.fixture(scope="session")
def base(tiny_gguf):
    return read_base(tiny_gguf)


@pytest.fixture
def make(tmp_path, tiny_adapters, tiny_ggufs, tiny_gguf):
    """Makes the package `name`; which = 0 or 1 is the adapter, so that there can be two versions."""

    def make(name="red", which=0, folder=None, **changes):
        folder = tmp_path / (folder or f"{name}-{which}-{len(changes)}")
        return packages.make(folder, name, tiny_adapters[which], tiny_ggufs[which], tiny_gguf, **changes)

    return make


@pytest.fixture
def house(tmp_path):
    return tmp_path / "house"


@pytest.fixture
def put(house, base):
    return lambda source, asked=None, **options: install(str(source), house, base, asked or {}, **options)


@pytest.fixture(scope="session")
def keys(tmp_path_factory):
    """Two key pairs: (private, public), as docs/market.md makes them."""
    pairs = []
    for name in ("ann", "bob"):
        private = tmp_path_factory.mktemp("keys") / f"{name}.pem"
        public = private.with_suffix(".pub")
        subprocess.run([*KEY, private], check=True, capture_output=True)
        subprocess.run(["openssl", "ec", "-in", private, "-pubout", "-out", public], check=True, capture_output=True)
        pairs.append((private, public))
    return pairs


def named(house):
    return [(expert.name, expert.routed) for expert in market_experts(house)]


# -- install, promote, rollback, remove -------------------------------------------------------------


def test_a_first_install_answers_at_once_and_is_what_the_package_says(make, put, house):
    folder = make()
    done = put(folder)
    assert (done.state, done.name, done.digest, str(done.signed)) == (
        "current",
        "red",
        packages.name_of(folder),
        "unsigned",
    )
    (found,) = market_experts(house)
    assert (found.name, found.lora_id, found.keywords, found.scale) == ("red", "red_expert", ["red"], 1.0)
    assert found.adapter == house / "installed" / "red_expert" / done.digest / "adapter.gguf"
    assert found.digest == sha256(folder / "adapter.gguf") and found.peft.is_dir() and found.probes[0].says
    assert not (house / "incoming").exists()


def test_a_tar_and_its_folder_are_one_package(make, put, tmp_path):
    folder = make()
    put(folder)
    again = put(packages.pack(folder, tmp_path / "red.tar", "red_expert"))
    assert (again.state, again.digest) == ("there", packages.name_of(folder))


def test_an_upgrade_waits_is_promoted_and_can_be_taken_back(make, put, house):
    old, new = put(make()).digest, put(make(which=1, version=2)).digest
    assert named(house) == [("red", True), ("red@next", False)]
    promote(house, "red")
    assert [e.adapter.parent.name for e in market_experts(house)] == [new]
    rollback(house, "red")
    assert [e.adapter.parent.name for e in market_experts(house)] == [old]
    rollback(house, "red_expert")
    state = read_state(house / "installed" / "red_expert")
    assert (state.current, state.next, state.previous) == (new, None, old)
    with pytest.raises(UserError, match="nothing waits to be promoted"):
        promote(house, "red")


def test_the_package_before_the_current_can_be_installed_again(make, put, house):
    old = make()
    put(old), put(make(which=1))
    promote(house, "red")
    assert put(old).state == "next" and named(house) == [("red", True), ("red@next", False)]


def test_packages_that_nothing_names_are_gone(make, put, house):
    for version in (1, 2, 3, 4):
        put(make(version=version, folder=f"v{version}"))
        if version > 1:
            promote(house, "red")
    assert len([p for p in (house / "installed" / "red_expert").iterdir() if p.is_dir()]) == 2  # current and previous


def test_remove_takes_one_expert_and_leaves_the_others(make, put, house):
    put(make()), put(make("blue", 1)), put(make(which=1, version=2))
    remove(house, "red@next")
    assert named(house) == [("blue", True), ("red", True)]
    remove(house, "red")
    assert named(house) == [("blue", True)]
    with pytest.raises(UserError, match="'red' is not installed; there are blue"):
        remove(house, "red")


def test_a_file_changed_after_the_install_is_told_with_the_cure(make, put, house):
    put(make())
    adapter = market_experts(house)[0].adapter
    adapter.write_bytes(adapter.read_bytes()[:-1])
    with pytest.raises(UserError, match="is not the file that .*\n  then run: dmoe remove red_expert"):
        market_experts(house)
    remove(house, "red_expert")
    assert market_experts(house) == []


def test_a_name_that_another_expert_has_needs_as(make, put, house):
    put(make())
    other = make(lora_id="scarlet", folder="scarlet")
    template = json.loads((other / "template.json").read_text())
    template["market"]["lora_id"] = "scarlet"
    (other / "template.json").write_text(json.dumps(template))
    packages.seal(other)
    with pytest.raises(UserError, match="'red' is another expert here already\n  then run: dmoe install .* --as NAME"):
        put(other)
    assert put(other, name="crimson").name == "crimson"
    assert named(house) == [("crimson", True), ("red", True)]
    with pytest.raises(UserError, match="'crimson' is installed already, and is another expert"):
        put(make("blue", 1), name="crimson")
    mine = Installed("green", "green_expert", "tiny", house, 1.0, [], [])
    with pytest.raises(UserError, match="'green' is another expert here already"):
        put(make("green"), checkout=[mine])
    for name in ("auto", "a@next", "../x", ""):
        with pytest.raises(UserError, match="is no name for an expert"):
            put("anything", name=name)


def test_other_weights_of_the_base_warn_and_another_tokenizer_refuses(make, put, base):
    facts = {**base.facts(), "weights": "0" * 64, "file": "theirs.gguf"}
    assert put(make(base=facts)).warnings == (
        f"measured on theirs.gguf, not on yours ({base.file}): the figures may not hold",
    )
    for key, told in (("tokenizer", "tokenizer"), ("chat_template", "chat template")):
        with pytest.raises(UserError, match=f"is for a base with another {told}"):
            put(make("blue", folder=key, base={**base.facts(), key: "0" * 64}))


def test_a_package_that_is_refused_leaves_nothing_and_touches_nobody(make, put, house):
    put(make())
    before = sorted(house.rglob("*"))
    for bad in (make("blue", 1, recommended_scale=9.0), make(which=1, rank=8)):
        with pytest.raises(UserError):
            put(bad)
        assert sorted(house.rglob("*")) == before and named(house) == [("red", True)]


# -- killed at any time -------------------------------------------------------------------------------

INSTALL = """
import sys
from pathlib import Path
from factory.gguf_file import read_base
from serve.install import install
while True:
    for source in sys.argv[3:]:
        install(source, Path(sys.argv[1]), read_base(Path(sys.argv[2])), {})
"""


def test_a_kill_at_any_time_leaves_every_installed_expert_whole(make, put, house, tiny_gguf):
    put(make("blue", 1))
    sources = [make(version=v, folder=f"v{v}") for v in (1, 2, 3)]
    seen = set()
    for turn in range(12):
        process = subprocess.Popen([sys.executable, "-c", INSTALL, house, tiny_gguf, *sources], stderr=subprocess.PIPE)
        deadline = time.monotonic() + 20
        while not (house / "incoming").exists() and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(0.4 + 0.03 * turn)  # through its start, and into its work
        process.send_signal(signal.SIGKILL)
        process.communicate()
        experts = market_experts(house)  # reads each adapter and its hash
        seen.add(tuple(expert.name for expert in experts))
        assert "blue" in {expert.name for expert in experts}
    put(sources[0])
    assert not (house / "incoming").exists() and "red" in {name for name, _ in named(house)}
    assert all(expert.adapter.exists() for expert in market_experts(house))


# -- signatures -----------------------------------------------------------------------------------------


def test_signing_changes_no_hash_and_ends_in_one_of_three_words(make, put, house, base, keys, tmp_path):
    folder = make()
    tar = packages.pack(folder, tmp_path / "red.tar", "red_expert")
    before = tar.read_bytes()
    signed = sign(tar, keys[0][0])
    assert signed.name == "red.signed.tar" and tar.read_bytes() == before
    with opened(signed, base) as package:
        assert package.digest == packages.name_of(folder)
        assert str(signer(package.folder, house / "trusted", "")) == "signed, key unknown"
        assert trust(keys[0][1], house / "trusted") == "ann"
        assert str(signer(package.folder, house / "trusted", "")) == "signed by ann, trusted here"
    sign(folder, keys[0][0])
    assert str(put(folder).signed) == "signed by ann, trusted here"
    with pytest.raises(UserError, match="is signed already"):
        sign(signed, keys[0][0])


def test_a_signed_expert_is_upgraded_by_its_publisher_alone(make, put, keys):
    first, own, foreign = make(), make(which=1, version=2), make(version=3)
    sign(first, keys[0][0]), sign(own, keys[0][0]), sign(foreign, keys[1][0])
    put(first)
    for source, who in ((foreign, "another publisher"), (make(version=4, folder="bare"), "an unsigned package")):
        with pytest.raises(UserError, match=f"was signed by key .* this is of {who}\n  then run: .* --as NAME"):
            put(source)
    assert put(own).state == "next" and put(foreign, name="theirs").state == "current"


def test_a_forged_signature_is_an_error(make, base, keys, house):
    folder, other = make(), make("blue", 1)
    sign(folder, keys[0][0]), sign(other, keys[0][0])
    good = {name: (folder / name).read_bytes() for name in ("signature.json", "publisher.pub")}

    def refused(match):
        with pytest.raises(UserError, match=match), opened(folder, base) as package:
            signer(package.folder, house / "trusted", "red")

    for name, data in (
        ("signature.json", (other / "signature.json").read_bytes()),  # of other files
        ("signature.json", re.sub(rb'("sig": ?")....', rb"\1AAAA", good["signature.json"])),
        ("signature.json", b"{}"), ("signature.json", b"[" * 5000), ("publisher.pub", keys[1][1].read_bytes()),
    ):  # fmt: skip
        (folder / name).write_bytes(data)
        refused("red: the signature is forged or broken|JSON nested")
        (folder / name).write_bytes(good[name])
    (folder / "publisher.pub").unlink()
    refused("has only one of")
    (folder / "publisher.pub").write_bytes(good["publisher.pub"])
    (folder / "README.md").write_text("Buy it.")
    packages.seal(folder)
    refused("forged or broken")


def test_a_signature_that_leaves_files_out_is_no_signature(make, base, keys, house):
    from model_signing import hashing, signing

    folder = make()
    sign(folder, keys[0][0])
    (folder / "signature.json").unlink()
    left_out = ["README.md", "publisher.pub", "signature.json"]
    config = signing.Config().use_elliptic_key_signer(private_key=keys[0][0])
    config.set_hashing_config(hashing.Config().set_ignored_paths(paths=left_out)).sign(
        folder, folder / "signature.json"
    )
    with pytest.raises(UserError, match="leaves out 'README.md'"), opened(folder, base) as package:
        signer(package.folder, house / "trusted", "red")


def test_only_public_elliptic_keys_are_trusted(keys, house, tmp_path):
    with pytest.raises(UserError, match="is no public key in PEM"):
        trust(keys[0][0], house / "trusted")
    trust(keys[0][1], house / "trusted")
    with pytest.raises(UserError, match="'ann' is another key already"):
        trust(keys[1][1], house / "trusted", "ann")
    with pytest.raises(UserError, match="is no name for a key"):
        trust(keys[1][1], house / "trusted", "../x")
    assert str(Signer("00", None)) == "signed, key unknown"


# -- what traffic a newcomer would take -------------------------------------------------------------------


def test_a_newcomer_that_takes_others_traffic_is_reached_by_name_alone(make, put, house):
    put(make("blue", 1))
    asked = {"everyday questions": ["where is the sea"] * 98 + ["a red rose", "red wine"], "blue": ["blue or red?"] * 3}
    done = put(make(), asked)
    assert [(t.of, t.number, t.share) for t in done.taken] == [("everyday questions", 100, 0.02), ("blue", 3, 1.0)]
    assert not done.routed and named(house) == [("blue", True), ("red", False)]
    remove(house, "red")
    assert put(make(folder="again"), asked, routed=True).routed and named(house) == [("blue", True), ("red", True)]
    assert make_router(market_experts(house)).wanted


def test_a_twin_takes_what_a_tie_would_leave_to_nobody(make, put):
    put(make("blue"))
    done = put(make("blue", folder="twin"), {"blue": ["is the blue sky blue?", "what is a sea?"]}, name="twin")
    assert [(t.of, t.share) for t in done.taken] == [("blue", 0.5)] and not done.routed


def test_routing_of_an_upgrade_comes_and_goes_with_it(make, put, house):
    put(make())
    put(make(keywords=["sea"]), {"everyday questions": ["where is the sea"]})
    promote(house, "red")
    assert named(house) == [("red", False)]
    rollback(house, "red")
    assert named(house) == [("red", True)]


# -- from elsewhere ---------------------------------------------------------------------------------------


@pytest.fixture
def server(tmp_path):
    """Serves the folder `web` on loopback."""
    (tmp_path / "web").mkdir()

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

        def do_GET(self):
            if self.path == "/away":
                self.send_response(302)
                self.send_header("Location", "http://example.com/x.tar")
                self.end_headers()
            else:
                super().do_GET()

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=tmp_path / "web")) as served:
        threading.Thread(target=served.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{served.server_port}"
        served.shutdown()


def test_a_package_comes_by_url_and_only_by_a_safe_one(make, put, house, server, tmp_path, monkeypatch):
    packages.pack(make(), tmp_path / "web" / "red.tar", "red_expert")
    monkeypatch.setattr("serve.fetch.LARGEST_DOWNLOAD", 1000)
    with pytest.raises(UserError, match="is larger than 1,000 bytes"):
        put(f"{server}/red.tar")
    monkeypatch.undo()
    assert put(f"{server}/red.tar").name == "red"
    for source, told in (
        (f"{server}/none.tar", "the server says 404"), (f"{server}/away", "packages come by https://"),
        ("http://example.com/x.tar", "packages come by https://"), ("ftp://example.com/x", "packages come by https://"),
        ("https://127.0.0.1:1/x.tar", "cannot be had"), ("hf://x", "is no hf://OWNER/NAME"),
        ("nowhere.tar", "there is no such file"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=told):
            put(source)
    assert not (house / "incoming").exists()


# -- the commands -----------------------------------------------------------------------------------------


def test_the_house_is_an_environment_variable_else_in_the_users_own(monkeypatch, tmp_path):
    monkeypatch.setenv("DMOE_HOME", str(tmp_path))
    assert dmoe_home() == tmp_path
    monkeypatch.delenv("DMOE_HOME")
    assert dmoe_home().name == ".dmoe" and str(dmoe_home()).startswith(os.path.expanduser("~"))


@pytest.fixture
def shop(checkout, tiny_base, house, monkeypatch):
    """Runs `dmoe` in a checkout on the tiny base, with a $DMOE_HOME of its own; returns what it printed."""
    shutil.copytree(tiny_base, checkout.root / "models" / "pocket", dirs_exist_ok=True)
    monkeypatch.chdir(checkout.root)
    monkeypatch.setenv("DMOE_HOME", str(house))

    def run(*words, code=0):
        done = CliRunner().invoke(app, [str(word) for word in words])
        assert done.exit_code == code, done.output
        return done.output

    return run


def test_a_package_is_signed_trusted_verified_installed_shown_and_removed(make, shop, keys):
    folder = make(keywords=["flamingo"])
    assert shop("verify", folder).splitlines()[-1] == "unsigned"
    shop("sign", folder, "--key", keys[0][0])
    assert shop("verify", folder).splitlines()[-1] == "signed, key unknown"
    assert shop("trust", keys[0][1]).startswith("trusted: ann, key ")
    told = shop("verify", folder).splitlines()
    assert told[0].startswith("red_expert 1, ") and told[-1] == "signed by ann, trusted here" and len(told) == 2
    told = shop("install", folder)
    assert "takes 0.0% of" in told and "everyday questions" in told and told.endswith("answers now\n" + NO_SERVER)
    assert "red_expert" in shop("list") and "signed by ann, trusted here" in shop("list")
    for what in ("red", folder):
        told = shop("show", what)
        assert "0.500 -> 0.500 (0.400 to 0.600)" in told and "claimed by the publisher" in told and "# red" in told
        assert told.splitlines()[-1] == "signed by ann, trusted here"
    assert shop("remove", "red") == "removed: red\n" + NO_SERVER and "is not installed" in shop("show", "red", code=1)


def test_an_upgrade_goes_by_commands(make, shop):
    shop("install", make(keywords=["flamingo"]))
    assert "waits as red@next\n  then run: dmoe promote red" in shop("install", make(which=1, keywords=["flamingo"]))
    assert "answers now" in shop("promote", "red") and "answers again" in shop("rollback", "red")


def test_a_newcomer_of_everyday_words_is_told_to_be_by_name_only(make, shop, house):
    told = shop("install", make(keywords=["the", "how", "what"]))
    assert "reached by name alone: it takes more than 1 % of others' traffic" in told and named(house) == [
        ("red", False)
    ]


def test_a_package_is_tried_and_measured_again_without_being_installed(make, shop, house):
    told = shop("try", make(), "Which laptop?")
    assert "base (beside;" in told and "red (asked for by name;" in told and told.splitlines()[-1] == "unsigned"
    told = shop("verify", "--rescore", "--questions", "2", make(folder="again"))
    assert (
        "claimed, of these" in told and "word for word the same reply" in told and told.splitlines()[-1] == "unsigned"
    )
    assert not (house / "installed").exists()


# -- from the Hub, and what the package holds ---------------------------------------------------------------


@pytest.fixture
def hub(tmp_path):
    """The few addresses of a hub that a download asks, for the files of the folder `repository`."""
    root, commit = tmp_path / "repository", "c" * 40

    class Hub(BaseHTTPRequestHandler):
        def log_message(self, *args):
            pass

        def do_HEAD(self):
            self.do_GET()

        def do_GET(self):
            path, resolve = self.path.partition("?")[0], f"/ann/red/resolve/{commit}/"
            files = {str(p.relative_to(root)): p for p in root.rglob("*") if p.is_file()}
            oids = {name: hashlib.sha1(p.read_bytes()).hexdigest() for name, p in files.items()}
            if path.startswith(resolve):
                name = path.removeprefix(resolve)
                return self.send(files[name].read_bytes(), ETag=f'"{oids[name]}"')
            if path.startswith("/api/models/ann/red/tree/"):
                tree = [{"type": "file", "path": n, "size": p.stat().st_size, "oid": oids[n]} for n, p in files.items()]
                return self.send(json.dumps(tree).encode())
            if path.startswith("/api/models/ann/red"):
                siblings = [{"rfilename": n, "size": p.stat().st_size, "blobId": oids[n]} for n, p in files.items()]
                return self.send(json.dumps({"id": "ann/red", "sha": commit, "siblings": siblings}).encode())
            self.send_error(404)

        def send(self, data, **headers):
            self.send_response(200)
            for key, value in {"Content-Length": len(data), "X-Repo-Commit": commit, **headers}.items():
                self.send_header(key, str(value))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(data)

    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as served:
        threading.Thread(target=served.serve_forever, daemon=True).start()
        yield root, f"http://127.0.0.1:{served.server_port}"
        served.shutdown()


FROM_HUB = """
import sys
from pathlib import Path
from factory.errors import UserError
from factory.gguf_file import read_base
from serve.install import install
try:
    print(install(sys.argv[1], Path(sys.argv[2]), read_base(Path(sys.argv[3])), {}).name)
except UserError as error:
    print(error)
"""


def test_a_package_comes_from_a_hub_without_what_a_hub_adds(make, house, hub, tiny_gguf):
    root, url = hub
    make(folder="repository")
    (root / ".gitattributes").write_text("*.gguf lfs")
    env = {**os.environ, "HF_ENDPOINT": url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}

    def get(source):
        command = [sys.executable, "-c", FROM_HUB, source, house, tiny_gguf]
        return subprocess.run(command, env=env, capture_output=True, text=True).stdout.strip()

    assert get("hf://ann/red@main") == "red"
    assert get("hf://ann/green").startswith("'hf://ann/green': the Hub did not give it: ")
    assert named(house) == [("red", True)]


@pytest.mark.filterwarnings("default::FutureWarning")  # PEFT asks transformers for a property that it has renamed
def test_a_package_unpacked_is_a_folder_that_peft_loads(make, base, tiny_base):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    with opened(make(), base) as package:
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_base), package.folder / "adapter")
    assert model.peft_config["default"].r == 4


def test_probes_are_what_the_expert_alone_gets_right_shortest_first_and_one_of_each_answer(home):
    template = read_template(home.template("medical"))
    one, two = list(template.answers)[:2]

    def row(i, answer, tokens, arm="expert", right=True, reply=None):
        reply = reply or f"It is {template.answers[answer].text}."
        return {
            **packages.score(arm, i),
            "answer": answer,
            "tokens": tokens,
            "right": right,
            "in_form": right,
            "reply": reply,
        }

    rows = [
        row(0, one, 9),
        row(1, one, 5),
        row(2, two, 20),
        row(3, one, 4, right=False),
        row(4, one, 1),
        row(6, two, 1),
    ]
    base = [row(i, one, 300, "base", reply="It depends.") for i in (0, 1, 2, 3)]
    base.append(row(4, one, 300, "base"))  # the base says it too; question 6 was not asked of it
    found = probes(template, rows + base)
    assert [probe["question"][-2] for probe in found] == ["1", "2", "0"]
    assert found[1]["says"] == template.answers[two].text


def test_what_the_stage_packs_is_sound_and_its_card_is_one_for_the_hub(checkout, tiny_base, tiny_adapters, tiny_ggufs):
    from huggingface_hub import ModelCard

    shutil.copytree(tiny_base, checkout.root / "models" / "pocket", dirs_exist_ok=True)
    folder, data, ours = checkout.expert("product", ""), checkout.dataset("product", ""), ROOT / "experts" / "product"
    shutil.copytree(tiny_adapters[0], folder / "adapter")
    shutil.copy(tiny_ggufs[0], folder / "adapter.gguf")
    for name in ("eval.json", "audit.json"):
        shutil.copy(ours / name, folder)
    parity = json.loads((ours / "parity.json").read_text())
    parity["sha256"] = {name: sha256(folder / name) for name in parity["sha256"]}
    (folder / "parity.json").write_text(json.dumps(parity))
    (folder / "gate.json").write_text("{}")
    data.mkdir(parents=True)
    for name in ("train.parquet", "holdout.parquet"):
        (data / name).write_bytes(b"rows")
    packages.write_rows(folder / "scores.parquet", packages.SCORES, [packages.score("expert", 1)])
    profile = read_profile(checkout, "pocket")
    gguf = base_gguf(checkout, profile)
    for routed in (False, True):
        if routed:
            packages.write_safetensors(folder / "route.safetensors", {"prototypes": np.ones((2, 3), np.float32)})
        package(checkout, "product", profile, gguf)
        with opened(folder / "product.tar", read_base(gguf)) as found:
            assert found.warnings == () and found.manifest.lora_id == "product_expert"
            assert (found.folder / "route.safetensors").exists() == routed
            front = ModelCard((found.folder / "README.md").read_text()).data
            assert (front.library_name, front.license, front.base_model) == ("peft", "cc-by-4.0", "models/pocket")
