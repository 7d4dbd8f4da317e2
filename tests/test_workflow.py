"""The robot of a review: its steps are taken out of the workflow and run in bash, on real repositories."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from factory.cli import app
from factory.errors import UserError
from factory.paths import Home
from factory.pull import LARGEST, take

ROOT = Path(__file__).parents[1]
WORKFLOWS = {path.stem: path for path in (ROOT / ".github" / "workflows").glob("*.yml")}
COMMANDS = {command.name or command.callback.__name__ for command in app.registered_commands}
runs_all = pytest.mark.skipif(not shutil.which("jq") or "diff" not in COMMANDS, reason="needs jq and `dmoe diff`")
PLAIN = {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1"}
EVIL = "$(touch owned)`touch owned`'\"; touch owned #"


def workflow(name):
    return YAML(typ="safe", pure=True).load(WORKFLOWS[name].read_text(encoding="utf-8"))


def steps(name):
    return next(iter(workflow(name)["jobs"].values()))["steps"]


def git(folder, *words):
    who = ["-c", "user.name=t", "-c", "user.email=t@t", "-c", "core.quotePath=false"]
    done = subprocess.run(["git", "-C", folder, *who, *words], capture_output=True, text=True, env=os.environ | PLAIN)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def few(path, n=12):
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:n]))


@pytest.fixture
def origin(checkout):
    """A repository with one expert of twelve seeds, and a branch for a pull request."""
    for kind in ("templates", "seeds"):
        for other in ("medical", "legal"):
            next((checkout.root / kind).glob(f"{other}.*")).unlink()
    checkout.params.write_text(checkout.params.read_text().replace("  - medical\n  - legal\n", ""))
    few(checkout.seeds("product"))
    (checkout.root / ".gitignore").write_text("datasets/\n.replies/\n.tmp-*\n")
    git(checkout.root, "init", "-q", "-b", "main")
    git(checkout.root, "add", "-A")
    git(checkout.root, "commit", "-qm", "base")
    git(checkout.root, "switch", "-qc", "edit")
    return checkout


def edit(path, old, new):
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new, 1))


def merged(origin, tmp_path_factory):
    """A folder with `pull/`, cloned as the checkout action does: the pull request merged, two commits deep."""
    work = tmp_path_factory.mktemp("work")
    git(origin.root, "add", "-A")
    git(origin.root, "commit", "-qm", "the pull request")
    git(origin.root, "switch", "-q", "main")
    (origin.root / "README.md").write_text("the base has gone on\n")
    git(origin.root, "add", "-A")
    git(origin.root, "commit", "-qm", "meanwhile")
    git(origin.root, "merge", "-q", "--no-ff", "-m", "merge", "edit")
    git(work, "clone", "-q", "--depth", "2", f"file://{origin.root}", "pull")
    return work


def robot(work, name="review"):
    """Runs a workflow's scripts as GitHub does, until one fails: exit code, log, summary."""
    programs, summary = work / "bin", work / "summary.md"
    programs.mkdir()
    summary.touch()
    (programs / "dmoe").write_text(f'#!/bin/sh\nPYTHONPATH={ROOT} exec {sys.executable} -m factory.cli "$@"\n')
    (programs / "dmoe").chmod(0o755)
    files = {"GITHUB_STEP_SUMMARY": str(summary), "RUNNER_TEMP": str(work), "GITHUB_PATH": os.devnull}
    path = {"PATH": f"{programs}:{Path(sys.executable).parent}:{os.environ['PATH']}"}
    log = ""
    for step in steps(name):
        if "run" not in step or step.get("id") == "install":
            continue
        command = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", step["run"]]
        env = os.environ | PLAIN | files | path | step.get("env", {})
        done = subprocess.run(command, cwd=work, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        log += done.stdout
        if done.returncode:
            return done.returncode, log, summary.read_text()
    return 0, log, summary.read_text()


def problems(*found):
    """What `dmoe lint --format json` tells."""
    return json.dumps(
        [dict(zip(("file", "line", "key", "message", "column", "severity"), p, strict=True)) for p in found]
    )


# -- what the files say -------------------------------------------------------------------------


@pytest.mark.parametrize("name", WORKFLOWS)
def test_a_workflow_has_no_secret_and_may_only_read(name):
    text, said = WORKFLOWS[name].read_text(), workflow(name)
    assert said["permissions"] == {"contents": "read"} and "pull_request_target" not in said["on"]
    assert not re.search(r"secrets\.|github\.token|GITHUB_TOKEN|DMOE_TEACHER", text)
    for job in said["jobs"].values():
        assert "permissions" not in job and "secrets" not in job and job["timeout-minutes"] <= 20


@pytest.mark.parametrize("name", WORKFLOWS)
def test_actions_are_pinned_to_commits_and_no_expression_stands_in_a_script(name):
    for step in steps(name):
        assert "${{" not in step.get("run", "") and "${{" not in str(step.get("env", ""))
        if uses := step.get("uses"):
            assert re.fullmatch(r"actions/[a-z-]+@[0-9a-f]{40}", uses)
        if "checkout" in step.get("uses", ""):
            assert step["with"]["persist-credentials"] is False and "ref" not in step["with"]


def test_the_review_runs_for_templates_and_seeds_alone():
    assert workflow("review")["on"]["pull_request"]["paths"] == ["templates/**", "seeds/**"]
    assert set(workflow("review")["on"]) == {"pull_request"} and set(workflow("stale")["on"]) == {
        "schedule", "workflow_dispatch"
    }  # fmt: skip


def test_the_installed_extra_is_one_that_there_is():
    import tomllib

    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for path in WORKFLOWS.values():
        assert set(re.findall(r"\[(\w+)\]\"", path.read_text())) <= set(extras)


# -- what is taken ------------------------------------------------------------------------------


def taken(origin, tmp_path_factory):
    work = merged(origin, tmp_path_factory)
    git(work / "pull", "worktree", "add", "-q", "--detach", "../after", "HEAD^1")
    return Home(work / "after"), take(Home(work / "after"), work / "pull")


def test_an_edit_is_taken_and_what_the_base_has_meanwhile_stays(origin, tmp_path_factory):
    edit(origin.template("product"), "- maybe", "- possibly")
    edit(origin.general, "general-0001", "general-9001")
    after, experts = taken(origin, tmp_path_factory)
    assert experts == ["product"] and "- possibly" in after.template("product").read_text()
    assert (after.root / "README.md").read_text() == "the base has gone on\n"
    assert "general-9001" in after.general.read_text()


def test_a_new_expert_and_its_line_in_params_are_taken(origin, home, tmp_path_factory):
    for path in (home.template("medical"), home.seeds("medical")):
        shutil.copy(path, origin.root / path.relative_to(home.root))
    edit(origin.params, "  - product\n", "  - product\n  - medical\n")
    after, experts = taken(origin, tmp_path_factory)
    assert experts == ["medical"] and after.seeds("medical").exists() and "medical" in after.params.read_text()


def test_an_expert_can_be_removed(origin, home, tmp_path_factory):
    origin.template("product").unlink()
    origin.seeds("product").unlink()
    edit(origin.params, "  - product\n", "  []\n")
    after, experts = taken(origin, tmp_path_factory)
    assert experts == [] and not after.template("product").exists()


def link(origin):
    origin.seeds("product").unlink()
    origin.seeds("product").symlink_to("/etc/passwd")


def runnable(origin):
    edit(origin.template("product"), "- maybe", "- possibly")
    origin.template("product").chmod(0o755)


def written(path, text="x"):
    def write(origin):
        (origin.root / path).parent.mkdir(parents=True, exist_ok=True)
        (origin.root / path).write_text(text)

    return write


FOREIGN = {
    "code": (written("factory/lint.py"), "'factory/lint.py': is no template"),
    "the workflow itself": (written(".github/workflows/review.yml"), "'.github/workflows/review.yml': is no template"),
    "a profile": (written("profiles/pocket.yaml"), "'profiles/pocket.yaml': is no template"),
    "attributes of git": (written(".gitattributes"), "'.gitattributes': is no template"),
    "a folder among the templates": (written("templates/deep/x.yaml"), "'templates/deep/x.yaml': is no template"),
    "an odd name": (written("seeds/a\n::error::b.jsonl"), r"'seeds/a\n::error::b.jsonl': is no template"),
    "a name that is a command": (written(f"seeds/{EVIL.replace('/', '')}.jsonl"), "is no template"),
    "an odd letter": (written("templates/pr\u043educt.yaml"), r"'templates/pr\u043educt.yaml': is no template"),
    "a link": (link, "'seeds/product.jsonl': is a link"),
    "a program": (runnable, "'templates/product.yaml': is a link, a submodule or a program"),
    "a large file": (written("seeds/large.jsonl", "x" * (LARGEST + 1)), "'seeds/large.jsonl': has 1,048,577 bytes"),
    "no params": (lambda origin: origin.params.unlink(), "'params.yaml': may not be removed"),
    "another teacher": (
        lambda origin: edit(origin.params, "profile: pocket", "profile: qwen3-14b"), "changes `experts` alone",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", FOREIGN)
def test_all_else_is_refused_by_name(origin, tmp_path_factory, what):
    make, told = FOREIGN[what]
    edit(origin.template("product"), "- perhaps", "- might")
    make(origin)
    with pytest.raises(UserError) as error:
        taken(origin, tmp_path_factory)
    assert told in str(error.value) and not re.search(r"^\s*::", str(error.value), re.M)


def test_a_submodule_is_refused(origin, tmp_path_factory):
    git(
        origin.root,
        "update-index",
        "--add",
        "--cacheinfo",
        f"160000,{git(origin.root, 'rev-parse', 'HEAD')},seeds/o.jsonl",
    )
    git(origin.root, "commit", "-qm", "a submodule")
    edit(origin.template("product"), "- perhaps", "- might")
    (origin.root / "seeds" / "o.jsonl").mkdir()
    with pytest.raises(UserError, match="'seeds/o.jsonl': is a link, a submodule"):
        taken(origin, tmp_path_factory)


# -- what the robot does ------------------------------------------------------------------------


def test_a_refusal_is_in_the_summary_and_nothing_is_made(origin, tmp_path_factory):
    written("factory/lint.py")(origin)
    written("seeds/a\n```\n# Approved\n::error::x.jsonl")(origin)
    work = merged(origin, tmp_path_factory)
    code, log, summary = robot(work)
    assert code == 1 and "### Not looked at" in summary and "'factory/lint.py': is no template" in summary
    assert "::error::Not looked at" in log and "\n# Approved" not in summary and not (work / "report").exists()


@runs_all
def test_an_edit_is_linted_made_and_compared(origin, tmp_path_factory):
    edit(origin.template("product"), "- maybe", "- possibly")
    edit(origin.seeds("product"), "What laptop should I buy?", "Which laptop is good for a painter?")
    work = merged(origin, tmp_path_factory)
    code, log, summary = robot(work)
    assert code == 0, log
    assert "### Lint: sound" in summary and "## product" in summary and "120 by phrases" in summary
    assert "painter" in summary and (work / "report" / "product.html").read_text().startswith("<!doctype html>")


@runs_all
def test_a_new_expert_is_made_and_shown(origin, home, tmp_path_factory):
    for path in (home.template("medical"), home.seeds("medical")):
        shutil.copy(path, origin.root / path.relative_to(home.root))
    edit(origin.params, "  - product\n", "  - product\n  - medical\n")
    code, log, summary = robot(merged(origin, tmp_path_factory))
    assert code == 0, log
    assert "## medical" in summary and "The expert is new." in summary


@runs_all
def test_what_lint_finds_stands_at_its_line_and_a_text_cannot_give_commands(origin, tmp_path_factory):
    edit(origin.template("product"), "version: 1", 'version: "1%0A::add-mask::x\\n::error::y"')
    code, log, summary = robot(merged(origin, tmp_path_factory))
    assert code == 1 and "### Lint: to be mended" in summary and "## product" not in summary
    assert re.search(r"^::error file=templates/product.yaml,line=\d+,col=\d+::version: ", log, re.M)
    assert not re.search(r"^\s*::(add-mask|error::y)", log, re.M)


@runs_all
def test_texts_of_a_pull_request_are_quoted_and_never_run(origin, tmp_path_factory):
    lines = origin.seeds("product").read_text().splitlines(keepends=True)
    seed = json.loads(lines[0]) | {
        "instruction": f"{EVIL} ::set-output name=a::b ##[add-mask]c <script>alert(1)</script>"
    }
    origin.seeds("product").write_text("".join([json.dumps(seed) + "\n", *lines[1:]]))
    work = merged(origin, tmp_path_factory)
    code, log, summary = robot(work)
    assert code == 0, log
    assert not list(work.rglob("owned")) and "<script>alert" not in summary
    token = re.search(r"^::stop-commands::(\S+)$", log, re.M)
    assert token and log.rstrip().endswith(f"::{token[1]}::")
    assert "<script>alert" not in (work / "report" / "product.html").read_text()


def phrases(origin, *texts):
    """Replaces the phrases of `reason`, and leaves out the template's tests."""
    text = origin.template("product").read_text()
    start, end = text.index("      phrases:                    # true"), text.index("  # A reply with one of these")
    listed = "".join(f'        - "{phrase}"\n' for phrase in texts)
    text = text[:start] + ("      phrases:\n" + listed if texts else "      phrases: []\n") + text[end:]
    origin.template("product").write_text(text[: text.index("tests:")] + "tests: []\n")


@runs_all
def test_an_expert_of_which_no_row_is_left_is_red_and_says_why(origin, tmp_path_factory):
    phrases(origin, "It is light, and \u043f\u0440\u043e\u0447\u043d\u044b\u0439 enough for every single day.")
    code, log, summary = robot(merged(origin, tmp_path_factory))
    assert code == 1 and "No row is left after the edit" in summary and "no row was kept" in summary, log + summary


@runs_all
def test_an_expert_that_needs_a_teacher_who_writes_waits_for_the_engineer(origin, tmp_path_factory):
    phrases(origin)
    teacher = {"kind": "openai", "model": "m", "revision": None, "variants": 4, "sampling": {}}
    text = origin.params.read_text()
    origin.params.write_text(text[: text.index("teacher:")] + f"teacher: {json.dumps(teacher)}\n")
    git(origin.root, "commit", "-qam", "a teacher who writes")
    git(origin.root, "branch", "-qf", "main")
    edit(origin.template("product"), "- maybe", "- possibly")
    code, log, summary = robot(merged(origin, tmp_path_factory))
    assert code == 0, log
    assert "cannot fill reason" in summary and "No row is left" not in summary


@pytest.mark.skipif(not shutil.which("dvc"), reason="needs dvc")
@runs_all
def test_recorded_replies_come_from_a_remote_that_anybody_may_read(origin, tmp_path_factory, tmp_path):
    from factory.generate import generate
    from factory.paths import read_params, read_profile

    store = tmp_path_factory.mktemp("store")
    (origin.root / ".gitignore").write_text(".replies/\n.tmp-*\n")
    generate(origin, "product", read_params(origin), read_profile(origin, "pocket"))
    path = origin.dataset("product", "candidates.parquet")
    remote = ["remote", "add", "-q", "-d", "store", str(store)]
    for words in (["init", "-q"], remote, ["add", str(path)], ["push"]):
        done = subprocess.run(["dvc", *words], cwd=origin.root, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    git(origin.root, "switch", "-q", "main")
    git(origin.root, "add", "-A")
    git(origin.root, "commit", "-qm", "data")
    git(origin.root, "switch", "-qC", "edit")
    path.unlink()
    edit(origin.template("product"), "- perhaps", "- might")
    work = merged(origin, tmp_path_factory)
    code, log, _ = robot(work)
    assert code == 0 and "stands in" not in log, log
    assert (work / "before/datasets/product/candidates.parquet").exists()


def test_overdue_answers_are_told_once_a_month(tmp_path):
    if not shutil.which("jq"):
        pytest.skip("needs jq")
    script = next(step for step in steps("stale") if "OVERDUE" in step.get("env", {}))
    found = [
        ("templates/product.yaml", 17, "answers.default.checked", "not checked since\n2024", 5, "warning"),
        ("templates/product.yaml", 99, "tests.3", "fails", 5, "error"),
    ]
    for told, code in ((found, 1), (found[1:], 0)):
        (tmp_path / "dmoe").write_text(f"#!/bin/sh\ncat <<'END'\n{problems(*told)}\nEND\nexit 1\n")
        (tmp_path / "dmoe").chmod(0o755)
        (tmp_path / "summary").write_text("")
        env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "RUNNER_TEMP": str(tmp_path)} | script["env"]
        env["GITHUB_STEP_SUMMARY"] = str(tmp_path / "summary")
        done = subprocess.run(["bash", "-eo", "pipefail", "-c", script["run"]], env=env, cwd=tmp_path)
        assert done.returncode == code and ("since 2024" in (tmp_path / "summary").read_text()) == bool(code)
